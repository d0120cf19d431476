"""GvU: Learning to Generate via Understanding (CVPR 2026).

One training step, for a batch of B prompts with G pictures each (S = B * G samples, a prompt's side by side):

    1. sample   the policy draws image tokens for every prompt                     umm.sample_image
    2. render   the diffusion head turns them into pixels                          umm.render
    3. reward   the understanding branch reads the pixels and says how probable    umm.see, umm.text_logps
                each word of the prompt is; the geometric mean is the reward
    4. update   rewards become advantages within each group; clipped ratio and     umm.image_logps, grpo.py
                KL to the frozen base move the policy (GRPO)

The backbone is shared, so learning to draw can spoil reading. `gvu.anchor` weighs a second KL term that holds what the
policy reads in its own pictures to what the frozen base read there: the same estimator, on the prompt's words.
"""
import functools
import re

import jax
from flax import struct

from gvu_jax import data, objectives, rewards, sharding
from gvu_jax.methods import grpo
from gvu_jax.policy import State, init_state, policy_params
from gvu_jax.umm import compile_programs

ANCHORED = 2         # every second picture holds reading in place, at half the cost


class GvU:
    """The four programs of a step, each compiled once.

    umm: a model of `umm.py`. config: `group`, `clip`, `beta`, `anchor`, `advantage_eps`, `inner_steps`, `micro_batches`
    and `waves` under `gvu`; `reward.teacher` ("base" | "policy") and `reward.view` ("pixels" | "tokens"); `lora`. how:
    how the policy samples, with images_per_prompt = group. mesh: see sharding.py. lengths: umm.Lengths that hold every
    prompt of the run; only `rollout` needs them.
    """

    def __init__(self, umm, config, how, optimizer, mesh, lengths=None):
        self.check(config)
        sharding.check(umm, mesh, config.gvu)
        self.umm, self.config, self.optimizer, self.mesh, self.lengths = umm, config, optimizer, mesh, lengths
        self.programs = compile_programs(umm, how, mesh, config.gvu.waves)
        self.policy = functools.partial(policy_params, lora_config=config.lora)      # no jit: it would copy the base
        self.mean = sharding.Program(rewards.geometric_mean, mesh)
        self.update = sharding.Program(self._update, mesh, donate_argnums=0)

    @staticmethod
    def check(config):
        """Raises ValueError, in one line, for settings that cannot train."""
        gvu, samples = config.gvu, config.gvu.prompts * config.gvu.group
        grpo.check(gvu, "gvu")
        if gvu.anchor and gvu.micro_batches > 1 and samples // gvu.micro_batches % ANCHORED:
            raise ValueError(f"with gvu.anchor, the {samples // gvu.micro_batches} samples of a micro-batch must be a "
                             f"multiple of {ANCHORED}")
        if config.reward.teacher not in ("base", "policy"):
            raise ValueError(f"reward.teacher is {config.reward.teacher!r}; it must be 'base' or 'policy'")
        if gvu.anchor and config.reward.teacher != "base":
            raise ValueError("gvu.anchor holds reading to the base: it needs reward.teacher = 'base', or gvu.anchor = 0")
        try:
            re.compile(config.lora.get("targets", ""))
        except re.error as error:
            raise ValueError(f"lora.targets = {config.lora.targets!r} is no regular expression: {error}") from error
        if config.reward.view not in ("pixels", "tokens"):
            raise ValueError(f"reward.view is {config.reward.view!r}; it must be 'pixels' or 'tokens'")

    def init(self, base, key):
        """The state before the first step, each part where it stays."""
        begin = functools.partial(init_state, config=self.config, optimizer=self.optimizer)
        where = sharding.shardings(jax.eval_shape(begin, base, key=key), self.mesh)
        return sharding.Program(begin, self.mesh, out_shardings=where)(base, key=key)

    def rollout(self, state, base, step, stream, keys, clock):
        """Programs 1 to 3 for the prompts of `step`: what `update` takes after (state, base).

        stream: the training prompts (see data.py). keys: two, for sampling and for rendering. clock.lap(phase, result)
        is told of each phase and returns its result.
        """
        texts = [meta["prompt"] for meta in data.batch(stream, step, self.config.gvu.prompts)]
        prompts, grouped = (sharding.place_prompts(self.umm, texts, self.lengths, self.mesh, times)
                            for times in (1, self.config.gvu.group))
        policy = self.policy(base, state.trainable)
        image_tokens, logps = clock.lap("sample", self.sample(policy, prompts, keys[0]))
        pixels = clock.lap("render", self.render(base, image_tokens, prompts, keys[1]))
        reward, read = clock.lap("reward", self.reward(base, policy, image_tokens, pixels, grouped))
        return grouped, image_tokens, logps, reward, read

    def sample(self, policy, prompts, key):
        """-> image_tokens [S, N], logps [S, N] of the sampler."""
        return self.programs.sample(policy, prompts, key)

    def render(self, base, image_tokens, prompts, key):
        """-> pixels [S, H, W, 3], or None where the reward reads the sampled tokens. prompts: one row per prompt."""
        return self.programs.render(base, image_tokens, prompts, key) if self.config.reward.view == "pixels" else None

    def reward(self, base, policy, image_tokens, pixels, prompts):
        """-> reward [S] in (0, 1] and what it came from, (seen, word log-probs [S, L]). prompts: a row per sample."""
        teacher = base if self.config.reward.teacher == "base" else policy
        seen = self.programs.see(teacher, pixels) if pixels is not None else image_tokens.reshape(-1, *self.umm.grid)
        logps, mask = self.programs.read(teacher, seen, prompts)
        return self.mean(logps, mask), (seen, logps)

    def _logps(self, policy, rows):
        return self.umm.image_logps(policy, rows.prompts, rows.tokens), None

    def _hold_reading(self, policy, rows):
        """The KL of what the policy reads in every second picture to what the base read there, and its weight."""
        part = jax.tree.map(lambda x: x[::ANCHORED], rows)
        words, mask = self.umm.text_logps(policy, part.seen, part.prompts)
        read_kl = objectives.token_mean(objectives.k3(words, part.word_logps), mask)
        return self.config.gvu.anchor * read_kl, {"read_kl": read_kl}

    def _update(self, state, base, prompts, image_tokens, sampler_logps, reward, read):
        """GRPO on S samples. prompts [S], image_tokens and sampler_logps [S, N], reward [S] and read as `reward`
        returns them. Returns the state after step + 1 and a dict of scalar metrics."""
        gvu = self.config.gvu
        state, metrics = grpo.update(
            state, Drawn(prompts, image_tokens, *read), reward, sampler_logps, reference=base,
            policy_of=functools.partial(policy_params, base, lora_config=self.config.lora), logps_of=self._logps,
            settings=gvu, optimizer=self.optimizer, penalty=self._hold_reading if gvu.anchor else None)
        return sharding.constrain(state), metrics | {"duplicates": objectives.duplicates(image_tokens, gvu.group)}


@struct.dataclass
class Drawn:
    """S samples: prompts and image tokens [S, ..]; what the teacher saw, and its log-probs of the prompt's words
    [S, L]."""
    prompts: object
    tokens: jax.Array
    seen: jax.Array
    word_logps: jax.Array
