"""What training moves, of whatever method: a subtree of the parameters, and the policy that it makes of the base.

The subtree is {"adapter": ...} for LoRA, {"ar": ...} for full fine-tuning, or only those parts of them that
config.trains names. The policy is the base with that subtree laid over it; the reference is the base itself.
"""
import re

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from gvu_jax import lora, sharding

TRAINS = "backbone", "all", "backbone+projector"        # what of the backbone; each family says which paths these are


@struct.dataclass
class State:
    """All that training changes. Everything else of a step follows from the config, the seed and `step`."""
    step: jax.Array                     # int32
    trainable: dict
    opt_state: optax.OptState
    reference: dict | None = None       # the trainable subtree that KL is measured to; None: the base itself

    def saved(self):
        """What a checkpoint holds, by name."""
        return {name: part for name in ("trainable", "opt_state", "reference")
                if (part := getattr(self, name)) is not None}


def check_trainable(config):
    """Raises ValueError, in one line, for settings that name nothing to train."""
    if (trains := config.get("trains", "all")) not in TRAINS:
        raise ValueError(f"trains is {trains!r}; it must be one of {', '.join(TRAINS)}")
    try:
        re.compile(config.lora.get("targets", ""))
    except re.error as error:
        raise ValueError(f"lora.targets = {config.lora.targets!r} is no regular expression: {error}") from error


def init_trainable(umm, base, config, key):
    """The subtree that training moves: a fresh adapter, or a copy of the backbone when lora.rank is 0; of the parts
    that config.trains names, where the config has it (TRAINS)."""
    pattern, flat = umm.trains[config.get("trains", "all")], traverse_util.flatten_dict(base["ar"], sep="/")
    part = traverse_util.unflatten_dict({path: x for path, x in flat.items() if re.search(pattern, path)}, sep="/")
    if config.lora.rank == 0:
        return {"ar": jax.tree.map(jnp.copy, part)}
    return {"adapter": lora.init(key, part, config.lora.rank, config.lora.targets)}


def policy_params(base, trainable, lora_config):
    """Base parameters with the trained subtree laid over them; what every `umm` call of the policy takes."""
    if "adapter" in trainable:
        return {**base, "adapter": lora.scaled(trainable["adapter"], lora_config.alpha / lora_config.rank)}
    whole, moved = (traverse_util.flatten_dict(tree["ar"]) for tree in (base, trainable))
    return {**base, "ar": traverse_util.unflatten_dict(whole | moved)}


def pick(partition, pattern, new, old):
    """Of two trees alike the leaves of `new` whose paths `pattern` finds, and the others of `old`: trainable subtrees,
    or states of an optimizer, whose counters are those of `new`. partition: a family's; paths are those below a part of
    the model, as in config.trains."""
    def choose(path, new, old):
        part, name = sharding.parameter(partition, path)
        return new if part is None or re.search(pattern, name) else old
    return jax.tree_util.tree_map_with_path(choose, new, old)


def restrict(part, policy, optimizer):
    """(policy, optimizer) for a step that trains a part alone: the other parameters stay, as do their moments.

    part: (new, old) -> tree, see `pick`; policy: (base, trainable) -> params. The optimizer's counters, of Adam's young
    moments and of the schedule, go on with every step of the run, whichever part it trains.
    """
    def update(gradients, state, trainable):
        updates, after = optimizer.update(gradients, state, trainable)
        return part(updates, jax.tree.map(jnp.zeros_like, updates)), part(after, state)

    restricted = lambda base, trainable: policy(base, part(trainable, jax.lax.stop_gradient(trainable)))
    return restricted, optax.GradientTransformation(optimizer.init, update)


def mean_gradient(loss, trainable, slices):
    """Gradients of `loss(trainable, one of the slices) -> (scalar, (metrics, rest))`, meant over the slices' leading
    axis: (gradients, (metrics, rest), each stacked). One slice after the other, so that one at a time is in memory."""
    count = jax.tree.leaves(slices)[0].shape[0]

    def add(grads, x):
        new, found = jax.grad(loss, has_aux=True)(trainable, x)
        return jax.tree.map(lambda g, n: g + n / count, grads, new), found

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), slices)


def skipped(opt_state):
    """The metrics that say how many steps were not finite and changed nothing (see optim.py)."""
    return {"skipped": optax.tree.get(opt_state, "total_notfinite", 0),
            "skipped_in_a_row": optax.tree.get(opt_state, "notfinite_count", 0)}


def place_state(umm, begin, base, key, mesh):
    """The state before the first step, begin(base, key), each part of it where it stays on the mesh."""
    where = sharding.shardings(umm.partition, jax.eval_shape(begin, base, key), mesh)
    return sharding.Program(begin, mesh, out_shardings=where)(base, key)


def init_state(umm, base, config, optimizer, key):
    """The state before the first step. Pure: under jax.eval_shape, its shapes.

    Raises ValueError for full fine-tuning of a backbone in less than float32, which would round most updates away: one
    of 1e-6 on a weight of 1 needs 20 bits, bfloat16 has 8.
    """
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(base["ar"])} - {"float32"}
    if config.lora.rank == 0 and narrow:
        raise ValueError(f"lora.rank = 0 trains the backbone itself, which is in {', '.join(sorted(narrow))}: too "
                         f"coarse for its updates. Train an adapter instead, e.g. --config.lora.rank=8")
    trainable = init_trainable(umm, base, config, key)
    return State(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable))
