"""GvU: Learning to Generate via Understanding (CVPR 2026).

One training step, for a batch of B prompts with G pictures each (S = B * G samples, a prompt's side by side):

    1. sample   the policy draws pictures for every prompt                         umm.sample_image
    2. render   they become pixels                                                 umm.render
    3. reward   the understanding branch reads the pixels and says how probable    umm.see, umm.text_logps
                each word of the prompt is; the geometric mean is the reward
    4. update   rewards become advantages within each group; clipped ratio and     umm.image_logps, grpo.py
                KL to the frozen base move the policy (GRPO)

The backbone is shared, so learning to draw can spoil reading: `gvu.anchor` weighs a second KL term, see anchor.py.
"""
import functools

import jax
import numpy as np

from gvu_jax import data, objectives, rewards, sharding
from gvu_jax.methods import anchor, flow_grpo, grpo
from gvu_jax.policy import check_trainable, init_state, place_state, policy_params
from gvu_jax.umm import check_shared, compile_programs


class GvU:
    """The four programs of a step, each compiled once.

    umm: a model of `umm.py`. config: `group`, `clip`, `beta`, `anchor`, `advantage_eps`, `inner_steps`, `micro_batches`
    and `waves` under `gvu`; `reward.teacher` ("base" | "policy"), `reward.view` ("pixels" | "tokens"), `reward.mean`
    (rewards.MEANS, or "oracle"), `reward.function`, and `reward.own`, the own reading's share beside that; `lora`.
    how: how the policy samples, with images_per_prompt = group. mesh: see sharding.py. lengths: umm.Lengths that hold
    every prompt of the run; `rollout` needs them. The attribute `judge`, (pixels [S, H, W, 3], S metas) ->
    suite.Verdicts on the host, is the oracle; `pictures` is how many a step learns from. workdir: of the run, for
    methods that keep data there; GvU does not.
    """

    def __init__(self, umm, config, how, optimizer, mesh, lengths=None, workdir=None):
        self.check(config)
        sharding.check(umm, mesh, config.gvu, config.gvu.prompts * config.gvu.group)
        anchor.check(config.gvu, "gvu", config.gvu.prompts * config.gvu.group, mesh)
        if config.reward.view == "tokens":
            check_shared(umm, "reward.view = 'tokens'")
        flow_grpo.check_how(umm, config, how)
        self.umm, self.config, self.optimizer, self.mesh, self.lengths = umm, config, optimizer, mesh, lengths
        self.how = how
        self.programs = compile_programs(umm, how, mesh, config.gvu.waves)
        self.policy = functools.partial(policy_params, lora_config=config.lora)      # no jit: it would copy the base
        self.mean = sharding.Program(rewards.MEANS.get(config.reward.mean, rewards.geometric_mean), mesh)
        self.judge, function = None, config.reward.get("function")
        self.function = rewards.load_function(function) if function else None
        self.update = sharding.Program(self._update, mesh, donate_argnums=0)
        self.pictures = config.gvu.prompts * config.gvu.group

    @staticmethod
    def check(config):
        """Raises ValueError, in one line, for settings that cannot train."""
        gvu = config.gvu
        grpo.check(gvu, "gvu")
        flow_grpo.check(config)
        rewards.check(config.reward, (*rewards.MEANS, "oracle"))
        check_trainable(config)
        if gvu.anchor and config.reward.teacher != "base":
            raise ValueError("gvu.anchor holds reading to the base's: set reward.teacher = 'base' or gvu.anchor = 0")
        if config.reward.mean == "oracle" and not (config.get("world") and config.reward.view == "pixels"):
            raise ValueError("reward.mean = 'oracle' is the checker of the shapes world, which reads pixels: it needs "
                             "configs/shapes.py and reward.view = 'pixels'")

    @staticmethod
    def paints(config):
        """Whether a step makes pictures; else it needs no more of the model than its backbone."""
        return config.reward.view == "pixels"

    def begin(self, base, key):
        """The state before the first step. Pure: see policy.init_state."""
        return init_state(self.umm, base, self.config, self.optimizer, key)

    def init(self, base, key):
        """The state before the first step, each part where it stays."""
        return place_state(self.umm, self.begin, base, key, self.mesh)

    def rollout(self, state, base, step, stream, key, clock):
        """Programs 1 to 3 for the prompts of `step`: what `update` takes after (state, base).

        stream: the training prompts (see data.py). key: the step's own. clock.lap(phase, result) is told of each phase
        and returns its result; clock.stopped() says, to a method that takes its time, that nobody waits for the rest.
        """
        keys = sharding.put(tuple(jax.random.split(key)), self.mesh)
        metas = data.batch(stream, step, self.config.gvu.prompts)
        texts = [meta["prompt"] for meta in metas]
        prompts, grouped = (sharding.place_prompts(self.umm, texts, self.lengths, self.mesh, times)
                            for times in (1, self.config.gvu.group))
        policy = self.policy(base, state.trainable)
        drawn, logps = clock.lap("sample", self.sample(policy, prompts, keys[0]))
        pixels = clock.lap("render", self.render(base, drawn, prompts, keys[1]))
        reward, seen = clock.lap("reward", self.reward(base, policy, drawn, pixels, grouped, metas))
        asked = anchor.questions(self.umm, texts, self.lengths, self.mesh, self.config.gvu.group) if (
            self.config.gvu.anchor) else None
        return grouped, drawn, logps, reward, seen, asked

    def rehearse(self, on):
        """What a step runs, and on what: plan.Rehearsal."""
        gvu, S = self.config.gvu, self.pictures
        teacher = on.base if self.config.reward.teacher == "base" else on.policy
        prompts, grouped = on.prompts(gvu.prompts), on.prompts(S)
        on.step("step", self.config.steps, S)
        drawn, logps = on.run("sample", "sample", self.programs.sample, on.policy, prompts, on.key)
        seen = on.shapes(self.umm.seen_of, drawn)
        if self.config.reward.view == "pixels":
            pixels = on.run("render", "render", self.programs.render, on.base, drawn, prompts, on.key)
            seen = on.run("reward", "see", self.programs.see, teacher, pixels)
        if self.own:
            on.run("reward", "read", self.programs.read, teacher, seen,
                   on.questions(2 * S) if self.config.reward.mean == "yes" else grouped)
        on.run("update", "update", self.update, on.state, on.base, grouped, drawn, logps, on.floats(S), seen,
               on.questions(S) if gvu.anchor else None)

    @property
    def own(self):
        """The share of the model's own reading in the reward."""
        return self.config.reward.get("own", 0.0) if self.function else float(self.config.reward.mean != "oracle")

    def sample(self, policy, prompts, key):
        """-> drawn [S, ..], logps [S, T] of the sampler."""
        return self.programs.sample(policy, prompts, key)

    def render(self, base, drawn, prompts, key):
        """-> pixels [S, H, W, 3], or None where the reward reads what was drawn itself. prompts: a row per prompt."""
        return self.programs.render(base, drawn, prompts, key) if self.config.reward.view == "pixels" else None

    def reward(self, base, policy, drawn, pixels, prompts, metas=()):
        """-> reward [S] in [0, 1] and what it was read from, seen [S, ..]. prompts: a row per sample.

        metas: dicts with the B prompts themselves, for rewards that do not add up words. One from outside the model,
        reward.function or the oracle, is asked on the host; beside the first the model's own may have a share.
        """
        teacher = base if self.config.reward.teacher == "base" else policy
        seen = self.programs.see(teacher, pixels) if pixels is not None else self.umm.seen_of(drawn)
        own = self.own
        read = self.read(teacher, seen, prompts, metas) if own else None
        if own == 1:
            return read, seen
        outside = self.outside(sharding.fetch(pixels), [meta for meta in metas for _ in range(self.config.gvu.group)])
        mixed = own * sharding.fetch(read) + (1 - own) * outside if own else outside
        return sharding.put(mixed.astype(np.float32), self.mesh), seen

    def read(self, teacher, seen, prompts, metas):
        """The model's own reward [S]."""
        if self.config.reward.mean == "yes":
            texts = [meta["prompt"] for meta in metas]
            prompts = sharding.place_questions(self.umm, texts, self.lengths, self.mesh, self.config.gvu.group)
        return self.mean(*self.programs.read(teacher, seen, prompts))

    def outside(self, pixels, metas):
        """The verdict from outside on S pictures, float32 [S]: of process 0, for all, where there are several."""
        if not self.function:
            return self.judge(pixels, metas).right.astype(np.float32)
        found = np.zeros(len(metas), np.float32)
        if jax.process_index() == 0:
            found = rewards.ask(self.function, pixels, [meta["prompt"] for meta in metas])
        return sharding.first_says_all(found)

    def _hold_reading(self, policy, rows, base):
        prompts, drawn, held = rows
        read_kl = anchor.reading_kl(self.umm, policy, base, *held)
        return self.config.gvu.anchor * read_kl, {"read_kl": read_kl}

    def _update(self, state, base, prompts, drawn, sampler_logps, reward, seen, asked=None):
        """GRPO on S samples. prompts [S], drawn [S, ..], sampler_logps [S, T], reward [S] and seen [S, ..] as `reward`
        returns them; asked: anchor.questions, where there is an anchor that is to hold their answers. Returns the state
        after step + 1 and a dict of scalar metrics."""
        gvu = self.config.gvu
        held = anchor.held(seen, prompts, asked, gvu.group) if gvu.anchor else ()
        state, metrics = flow_grpo.update_pictures(
            self.umm, self.how, self.config, state, (prompts, drawn, held), reward, sampler_logps, reference=base,
            policy_of=functools.partial(self.policy, base), settings=gvu, optimizer=self.optimizer,
            penalty=functools.partial(self._hold_reading, base=base) if gvu.anchor else None)
        return sharding.constrain(self.umm.partition, state), metrics | {
            "duplicates": objectives.duplicates(self.umm.picture_of(drawn), gvu.group)}
