"""GRPO (Shao et al. 2024): samples of a group are compared, and the policy moves towards the better ones.

One code path for policies of text and of pictures. Which of the two a method trains is said by its

    logps_of(params, rows) -> logps [S, T], mask [S, T] bool or None

the log-probabilities of what was drawn, teacher-forced and differentiable, and which of the T tokens count (those of a
text up to and including its end token; None: all). `rows` is whatever arrays that takes, leading axis S.
"""
import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gvu_jax import objectives, sharding
from gvu_jax.policy import mean_gradient, skipped


def check(settings, name):
    """Raises ValueError, in one line, for settings of a method (the section `name` of its config) that cannot train."""
    samples = settings.prompts * settings.group
    if settings.group < 2:
        raise ValueError(f"{name}.group is {settings.group}; GRPO compares samples of a prompt, so it needs at least 2")
    if settings.waves < 1 or settings.prompts % settings.waves:
        raise ValueError(f"{name}.waves = {settings.waves} does not divide the {settings.prompts} prompts of a step")
    if settings.micro_batches < 1 or samples % settings.micro_batches:
        raise ValueError(f"{name}.micro_batches = {settings.micro_batches} does not divide the {samples} samples of a "
                         f"step")
    if settings.inner_steps < 1:
        raise ValueError(f"{name}.inner_steps is {settings.inner_steps}; it must be at least 1")


@struct.dataclass
class Batch:
    """S samples: the rows that tell what they are, the reference's log-probs of them [S, T], and advantages [S]; where
    another policy drew them than the one that learns, its log-probs [S, T]."""
    rows: object
    ref_logps: jax.Array
    advantages: jax.Array
    sampler_logps: jax.Array | None = None


def loss(trainable, batch, old_logps, first, policy_of, logps_of, settings, penalty=None, truncate=0.0):
    """The objective on one micro-batch (Batch); at the first inner step old = current, so the ratio is exactly 1.

    policy_of(trainable) -> params. settings: `clip` and `beta`. penalty(policy, rows) -> (scalar, {name: scalar}) is
    added. truncate: the largest of the weights by which tokens that another policy drew count (objectives.importance);
    0: all count alike. Returns (scalar, (metrics, log-probs [S, T])).
    """
    policy = policy_of(trainable)
    logps, mask = logps_of(policy, batch.rows)
    old_logps = jnp.where(first, jax.lax.stop_gradient(logps), old_logps)
    weights = objectives.importance(old_logps, batch.sampler_logps, truncate) if truncate else None
    value, metrics = objectives.clipped_policy_loss(
        logps, old_logps, batch.ref_logps, batch.advantages, settings.clip, settings.beta, mask, weights)
    if truncate:
        metrics |= {"truncated": objectives.token_mean(weights == truncate, mask)}
    if penalty:
        more, told = penalty(policy, batch.rows)
        value, metrics = value + more, metrics | told
    return value, (metrics | {"loss": value}, logps)


def update(state, rows, reward, sampler_logps, reference, policy_of, logps_of, settings, optimizer, penalty=None,
           truncate=0.0):
    """`inner_steps` optimizer steps on S samples, each over `micro_batches` slices of them.

    rows [S, ..], reward [S], sampler_logps [S, T]; reference: params that KL is measured to; settings: also `group` and
    `advantage_eps`; truncate as in `loss`. Returns the state after step + 1 and a dict of scalar metrics.
    """
    split, join = functools.partial(sharding.split_rows, slices=settings.micro_batches), sharding.join_rows
    ref_logps, mask = join(jax.lax.map(functools.partial(logps_of, reference), split(rows)))
    advantages = objectives.group_advantages(reward, settings.group, settings.advantage_eps)
    batches = split(Batch(rows, ref_logps, advantages, sampler_logps if truncate else None))
    part_loss = functools.partial(loss, policy_of=policy_of, logps_of=logps_of, settings=settings, penalty=penalty,
                                  truncate=truncate)

    def inner_step(carry, i):
        trainable, opt_state, old_logps = carry
        trainable, opt_state, metrics, logps = descend(
            lambda trainable, part: part_loss(trainable, *part, i == 0), trainable, opt_state, (batches, old_logps),
            optimizer)
        return (trainable, opt_state, jnp.where(i == 0, logps, old_logps)), metrics

    start = (state.trainable, state.opt_state, split(jnp.zeros_like(sampler_logps)))
    (trainable, opt_state, old_logps), metrics = jax.lax.scan(inner_step, start, jnp.arange(settings.inner_steps))
    metrics = jax.tree.map(lambda x: x[-1], metrics) | told(reward, settings.group, opt_state) | {
        "entropy": -objectives.token_mean(join(old_logps), mask),    # nats a token; unbiased where it draws, unfiltered
        "logp_gap": objectives.token_mean(jnp.abs(join(old_logps) - sampler_logps), mask)}
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics


def told(reward, group, opt_state):
    """Metrics of any update by comparison: of its rewards [S], and of the steps that the optimizer skipped."""
    return {"reward/mean": jnp.mean(reward), "reward/std": jnp.mean(jnp.std(reward.reshape(-1, group), axis=1)),
            "reward/flat": objectives.flat_groups(reward, group)} | skipped(opt_state)


def descend(loss, trainable, opt_state, slices, optimizer):
    """One optimizer step down the mean gradient of loss(trainable, slice) -> (scalar, (metrics, rest)) over slices, a
    tree of [slices, ..]. Returns the new trainable and opt_state, metrics of the whole, and rest [slices, ..]."""
    grads, (metrics, rest) = mean_gradient(loss, trainable, slices)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics = {name: jnp.max(x) if name.endswith("_max") else jnp.mean(x) for name, x in metrics.items()}
    return (optax.apply_updates(trainable, updates), opt_state, metrics | {"grad_norm": optax.tree.norm(grads)}, rest)
