"""GvU: Learning to Generate via Understanding (CVPR 2026).

One training step, for a batch of B prompts with G pictures each (S = B * G samples, a prompt's side by side):

    1. sample   the policy draws image tokens for every prompt                     umm.sample_image
    2. render   the diffusion head turns them into pixels                          umm.render
    3. reward   the understanding branch reads the pixels and says how probable    umm.see, umm.text_logps
                each word of the prompt is; the geometric mean is the reward
    4. update   rewards become advantages within each group; clipped ratio and     umm.image_logps
                KL to the frozen base move the policy (GRPO)

The backbone is shared, so learning to draw can spoil reading. `gvu.anchor` weighs a second KL term that holds what the
policy reads in its own pictures to what the frozen base reads there, of the picture's own prompt and of another one, for
reading is to tell true from false: the same estimator, on the prompts' words.
"""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gvu_jax import data, objectives, rewards, sharding
from gvu_jax.policy import State, mean_gradient, place_state, policy_params, skipped
from gvu_jax.umm import compile_programs

ANCHORED = 4         # every fourth picture holds reading in place: enough, at a part of the cost


class GvU:
    """The four programs of a step, each compiled once.

    umm: a model of `umm.py`. config: `group`, `clip`, `beta`, `anchor`, `advantage_eps`, `inner_steps`, `micro_batches`
    and `waves` under `gvu`; `reward.teacher` ("base" | "policy"), `reward.view` ("pixels" | "tokens") and `reward.mean`
    (rewards.MEANS, or "oracle"); `lora`. how: how the policy samples, with images_per_prompt = group. mesh: see
    sharding.py. lengths: umm.Lengths that hold every prompt of the run; `rollout` needs them. The attribute `judge`,
    (pixels [S, H, W, 3], S metas) -> bool [S] on the host, is the oracle; `pictures` is how many a step learns from.
    workdir: of the run, for methods that keep data there; GvU does not.
    """

    def __init__(self, umm, config, how, optimizer, mesh, lengths=None, workdir=None):
        self.check(config)
        sharding.check(umm, mesh, config.gvu, config.gvu.prompts * config.gvu.group)
        slices = config.gvu.micro_batches * sharding.batch_shards(mesh)
        if config.gvu.anchor and config.gvu.prompts * config.gvu.group % (ANCHORED * slices):
            raise ValueError(f"gvu.anchor holds every {ANCHORED}th sample: gvu.prompts x gvu.group must be a multiple of "
                             f"{ANCHORED * slices} ({ANCHORED} x micro-batches x data x fsdp), or gvu.anchor 0")
        self.umm, self.config, self.optimizer, self.mesh, self.lengths = umm, config, optimizer, mesh, lengths
        self.programs = compile_programs(umm, how, mesh, config.gvu.waves)
        self.policy = functools.partial(policy_params, lora_config=config.lora)      # no jit: it would copy the base
        self.mean = sharding.Program(rewards.MEANS.get(config.reward.mean, rewards.geometric_mean), mesh)
        self.judge = None
        self.update = sharding.Program(self._update, mesh, donate_argnums=0)
        self.pictures = config.gvu.prompts * config.gvu.group

    @staticmethod
    def check(config):
        """Raises ValueError, in one line, for settings that cannot train."""
        gvu, samples = config.gvu, config.gvu.prompts * config.gvu.group
        if gvu.group < 2:
            raise ValueError(f"gvu.group is {gvu.group}; GRPO compares samples of a prompt, so it needs at least 2")
        if gvu.waves < 1 or gvu.prompts % gvu.waves:
            raise ValueError(f"gvu.waves = {gvu.waves} does not divide the {gvu.prompts} prompts of a step")
        if gvu.micro_batches < 1 or samples % gvu.micro_batches:
            raise ValueError(f"gvu.micro_batches = {gvu.micro_batches} does not divide the {samples} samples of a step")
        if gvu.inner_steps < 1:
            raise ValueError(f"gvu.inner_steps is {gvu.inner_steps}; it must be at least 1")
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
        if config.reward.mean not in (*rewards.MEANS, "oracle"):
            raise ValueError(f"reward.mean is {config.reward.mean!r}; it must be one of {', '.join(rewards.MEANS)}, "
                             f"oracle")
        if config.reward.mean == "oracle" and not (config.get("world") and config.reward.view == "pixels"):
            raise ValueError("reward.mean = 'oracle' is the checker of the shapes world, which reads pixels: it needs "
                             "configs/shapes.py and reward.view = 'pixels'")

    def init(self, base, key):
        """The state before the first step, each part where it stays."""
        return place_state(base, self.config, self.optimizer, key, self.mesh)

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
        image_tokens, logps = clock.lap("sample", self.sample(policy, prompts, keys[0]))
        pixels = clock.lap("render", self.render(base, image_tokens, prompts, keys[1]))
        reward, seen = clock.lap("reward", self.reward(base, policy, image_tokens, pixels, grouped, metas))
        return grouped, image_tokens, logps, reward, seen

    def sample(self, policy, prompts, key):
        """-> image_tokens [S, N], logps [S, N] of the sampler."""
        return self.programs.sample(policy, prompts, key)

    def render(self, base, image_tokens, prompts, key):
        """-> pixels [S, H, W, 3], or None where the reward reads the sampled tokens. prompts: one row per prompt."""
        return self.programs.render(base, image_tokens, prompts, key) if self.config.reward.view == "pixels" else None

    def reward(self, base, policy, image_tokens, pixels, prompts, metas=()):
        """-> reward [S] in [0, 1] and what it was read from, seen [S, r, c]. prompts: a row per sample.

        metas: dicts with the B prompts themselves, for reward.mean = "yes" and "oracle", which do not add up words.
        """
        teacher = base if self.config.reward.teacher == "base" else policy
        seen = self.programs.see(teacher, pixels) if pixels is not None else image_tokens.reshape(-1, *self.umm.grid)
        each = [meta for meta in metas for _ in range(self.config.gvu.group)]
        if self.config.reward.mean == "yes":
            texts = [meta["prompt"] for meta in metas]
            asked = sharding.place_questions(self.umm, texts, self.lengths, self.mesh, self.config.gvu.group)
            return self.mean(*self.programs.read(teacher, seen, asked)), seen
        if self.config.reward.mean == "oracle":
            right = self.judge(sharding.fetch(pixels), each)
            return sharding.put(right.astype(np.float32), self.mesh), seen
        return self.mean(*self.programs.read(teacher, seen, prompts)), seen

    def loss(self, trainable, base, batch, old_logps, first):
        """The objective on one micro-batch; at the first inner step old = current, so the ratio is exactly 1."""
        gvu = self.config.gvu
        policy = policy_params(base, trainable, self.config.lora)
        logps = self.umm.image_logps(policy, batch.prompts, batch.tokens)
        old_logps = jnp.where(first, jax.lax.stop_gradient(logps), old_logps)
        loss, metrics = objectives.clipped_policy_loss(
            logps, old_logps, batch.ref_logps, batch.advantages, gvu.clip, gvu.beta)
        if gvu.anchor:
            seen, texts = batch.held                                                                # [A], [A, 2]
            texts = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts)                       # [A * 2]
            words, mask = self.umm.text_logps(policy, seen, texts)                                  # [A * 2, L]
            kl = jnp.where(mask, objectives.k3(words, self.umm.text_logps(base, seen, texts)[0]), 0.0)
            read_kl = jnp.mean(jnp.sum(kl, axis=1) / jnp.sum(mask, axis=1))
            loss, metrics = loss + gvu.anchor * read_kl, metrics | {"read_kl": read_kl}
        return loss, (metrics | {"loss": loss}, logps)

    def _update(self, state, base, prompts, image_tokens, sampler_logps, reward, seen):
        """GRPO on S samples: `inner_steps` optimizer steps, each over `micro_batches` slices of the batch.

        prompts [S], image_tokens and sampler_logps [S, N], reward [S] and seen [S, r, c] as `reward` returns them. Returns
        the state after step + 1 and a dict of scalar metrics. Gradients of the slices are averaged before the one
        optimizer step they make.
        """
        gvu, slices = self.config.gvu, self.config.gvu.micro_batches
        split, join = functools.partial(sharding.split_rows, slices=slices), sharding.join_rows
        ref_logps = join(jax.lax.map(lambda x: self.umm.image_logps(base, *x), split((prompts, image_tokens))))
        advantages = objectives.group_advantages(reward, gvu.group, gvu.advantage_eps)
        held = (seen[::ANCHORED], own_and_other(prompts, gvu.group)) if gvu.anchor else ()
        batches = split(Batch(prompts, image_tokens, ref_logps, advantages, held))

        def inner_step(carry, i):
            trainable, opt_state, old_logps = carry
            grads, (metrics, logps) = mean_gradient(
                lambda trainable, x: self.loss(trainable, base, *x, i == 0), trainable, (batches, old_logps))
            updates, opt_state = self.optimizer.update(grads, opt_state, trainable)
            largest = jnp.max(metrics["ratio_max"])
            metrics = jax.tree.map(jnp.mean, metrics) | {"ratio_max": largest, "grad_norm": optax.tree.norm(grads)}
            old_logps = jnp.where(i == 0, logps, old_logps)
            return (optax.apply_updates(trainable, updates), opt_state, old_logps), metrics

        start = (state.trainable, state.opt_state, split(jnp.zeros_like(sampler_logps)))
        (trainable, opt_state, old_logps), metrics = jax.lax.scan(inner_step, start, jnp.arange(gvu.inner_steps))
        metrics = jax.tree.map(lambda x: x[-1], metrics)
        groups = reward.reshape(-1, gvu.group)
        metrics |= {
            "reward/mean": jnp.mean(reward), "reward/std": jnp.mean(jnp.std(groups, axis=1)),
            "entropy": -jnp.mean(join(old_logps)),       # nats a token; unbiased where sampling is unfiltered
            "logp_gap": jnp.mean(jnp.abs(join(old_logps) - sampler_logps)),
            "duplicates": objectives.duplicates(image_tokens, gvu.group), **skipped(opt_state),
        }
        return sharding.constrain(State(state.step + 1, trainable, opt_state)), metrics


@struct.dataclass
class Batch:
    """One micro-batch: prompts and tokens [S, ..], reference log-probs [S, N], advantages [S]; and, with an anchor, what
    was seen of A = S / ANCHORED samples [A, r, c] with two prompts each [A, 2, ..]."""
    prompts: object
    tokens: jax.Array
    ref_logps: jax.Array
    advantages: jax.Array
    held: tuple


def own_and_other(prompts, group):
    """Of every ANCHORED-th sample its own prompt and that of the next group: [S / ANCHORED, 2, ..]."""
    pair = lambda x: jnp.stack([x[::ANCHORED], jnp.roll(x, -group, axis=0)[::ANCHORED]], axis=1)
    return jax.tree.map(pair, prompts)
