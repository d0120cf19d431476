"""The optimizer: clip by global norm, then AdamW under a schedule with warm-up; what is not finite is skipped."""
import jax
import numpy as np
import optax


def build(config, steps):
    """config: lr, warmup (steps), schedule ("constant" | "cosine"), b2, weight_decay, clip_norm. steps: updates in all.

    Returns an optax.GradientTransformation. A gradient that is not finite changes nothing and is counted in the state
    (`notfinite_count` in a row, `total_notfinite`), however often it comes: the loop decides when to give up. Weight
    decay leaves vectors (norm scales, biases) alone; parameters are stacked over layers, so a vector of one layer has
    two dimensions here and is told by its name. Raises ValueError for an unknown schedule.
    """
    if config.b2 >= 1:
        raise ValueError(f"optim.b2 is {config.b2}; it must be below 1")
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup, max(steps, config.warmup + 1))
    elif config.schedule == "constant":
        # optax reads a warm-up of no steps as "stay at the initial value", which would be a rate of zero for ever.
        rate = optax.warmup_constant_schedule(0.0, config.lr, config.warmup) if config.warmup else config.lr
    else:
        raise ValueError(f"optim.schedule is {config.schedule!r}; it must be 'constant' or 'cosine'")
    adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm),
                        optax.adamw(rate, b1=0.9, b2=config.b2, weight_decay=config.weight_decay, mask=decays))
    return optax.apply_if_finite(adamw, max_consecutive_errors=np.iinfo(np.int32).max)


def decays(params):
    """True where weight decay applies: everything but scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
