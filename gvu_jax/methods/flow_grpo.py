"""Flow-GRPO (Liu et al. 2025): GRPO where a picture is drawn by a flow, and its decisions are Gaussian steps.

What grpo.py is for words and codes, with three things that a flow has otherwise: a log-probability is a mean over the
entries of a step, so that ratios are clipped at about 1e-4; KL to the reference is that of two Gaussians and needs no
estimate, while their entropy follows from the noise alone and is not told; and the spread of rewards is that of all
samples of a step. Families that draw so have `image_moves`, see flow.py, and configs for them a section `flow`:

    clip, beta            of the objective
    spread                "all" or "group": whose spread of rewards divides an advantage
    advantage_max         advantages are cut at plus and minus this; 0: they are not
    ratio, kl             flow.RATIOS and flow.KLS
"""
import functools

import jax
import jax.numpy as jnp

from gvu_jax import flow, objectives, sharding
from gvu_jax.methods import grpo


def check(config):
    """Raises ValueError, in one line, for a section `flow` that cannot train."""
    if "flow" not in config:
        return
    flow.check(config.flow, "flow")
    if config.flow.spread not in ("all", "group"):
        raise ValueError(f"flow.spread is {config.flow.spread!r}; it must be all or group")
    if not (config.flow.clip > 0 and config.flow.beta >= 0 and config.flow.advantage_max >= 0):
        raise ValueError(f"flow.clip {config.flow.clip} must be above 0, flow.beta {config.flow.beta} and "
                         f"flow.advantage_max {config.flow.advantage_max} not negative")


def check_how(umm, config, how):
    """Raises ValueError where pictures of a family that draws by a flow could not be learned from."""
    if not hasattr(umm, "image_moves"):
        return
    if "flow" not in config:
        raise ValueError(f"a model of kind {umm.kind!r} draws by a flow: its config needs a section `flow`, see "
                         f"configs/uae_sd35.py")
    if how.flow is None or not how.flow.noise or not how.flow.trained:
        raise ValueError("a flow learns from noisy steps alone: set sampling.flow.noise, e.g. 0.7, and at least 2 "
                         "sampling.flow.steps")


def update_pictures(umm, how, config, state, rows, reward, sampler_logps, **rest):
    """GRPO on S pictures as their family draws them: `update` below for one that draws by a flow, else grpo.update.

    rows: a tuple of prompts [S], drawn [S, ..] and what else a penalty reads. rest: what both of the two take.
    """
    if hasattr(umm, "image_moves"):
        moves_of = lambda policy, rows: umm.image_moves(policy, *rows[:2], how)
        return update(state, rows, reward, sampler_logps, moves_of=moves_of, of_flow=config.flow, **rest)
    logps_of = lambda policy, rows: (umm.image_logps(policy, *rows[:2], how), None)
    return grpo.update(state, rows, reward, sampler_logps, logps_of=logps_of, truncate=how.correction, **rest)


def update(state, rows, reward, sampler_logps, reference, policy_of, moves_of, settings, of_flow, optimizer,
           penalty=None):
    """`inner_steps` optimizer steps on S samples, each over `micro_batches` slices of them.

    rows [S, ..], reward [S], sampler_logps [S, T]; reference: params that KL is measured to; moves_of(params, rows) ->
    flow.Moves. settings: `group`, `advantage_eps`, `inner_steps`, `micro_batches`; of_flow: the section `flow`. penalty
    as in grpo.loss. Returns the state after step + 1 and a dict of scalar metrics.
    """
    split, join = functools.partial(sharding.split_rows, slices=settings.micro_batches), sharding.join_rows
    advantages = objectives.group_advantages(reward, settings.group, settings.advantage_eps, of_flow.spread, ddof=0)
    batches, once = split((rows, advantages)), settings.inner_steps == 1
    old = None if once else jax.lax.map(lambda rows: moves_of(policy_of(state.trainable), rows), batches[0])

    def loss(trainable, part, first):
        policy, ((rows, A), old) = policy_of(trainable), part
        moves = moves_of(policy, rows)
        now = jax.lax.stop_gradient(moves)                       # at the first step the ratio is 1 to the last bit
        old = now if once else jax.tree.map(lambda new, was: jnp.where(first, new, was), now, old)
        held = moves_of(reference, rows) if of_flow.beta else None
        value, metrics = flow.policy_loss(moves, old, held, A, of_flow)
        if penalty:
            more, told = penalty(policy, rows)
            value, metrics = value + more, metrics | told
        return value, (metrics | {"loss": value}, now.logps)

    def inner_step(carry, i):
        trainable, opt_state, metrics, logps = grpo.descend(
            lambda trainable, part: loss(trainable, part, i == 0), *carry, (batches, old), optimizer)
        return (trainable, opt_state), (metrics, logps)

    (trainable, opt_state), (metrics, logps) = jax.lax.scan(
        inner_step, (state.trainable, state.opt_state), jnp.arange(settings.inner_steps))
    metrics = jax.tree.map(lambda x: x[-1], metrics) | grpo.told(reward, settings.group, opt_state) | {
        "logp_gap": jnp.mean(jnp.abs(join(logps[0]) - sampler_logps))}
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics
