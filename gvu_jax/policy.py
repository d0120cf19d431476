"""What training moves, of whatever method: a subtree of the parameters, and the policy that it makes of the base.

The subtree is {"adapter": ...} for LoRA, {"ar": ...} for full fine-tuning. The policy is the base with that subtree laid
over it; the reference is the base itself.
"""
import jax
import jax.numpy as jnp
import optax
from flax import struct

from gvu_jax import lora


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


def init_trainable(base, config, key):
    """The subtree that training moves: a fresh adapter, or a copy of the backbone when lora.rank is 0."""
    if config.lora.rank == 0:
        return {"ar": jax.tree.map(jnp.copy, base["ar"])}
    return {"adapter": lora.init(key, base["ar"], config.lora.rank, config.lora.targets)}


def policy_params(base, trainable, lora_config):
    """Base parameters with the trained subtree laid over them; what every `umm` call of the policy takes."""
    if "adapter" in trainable:
        return {**base, "adapter": lora.scaled(trainable["adapter"], lora_config.alpha / lora_config.rank)}
    return {**base, **trainable}


def init_state(base, config, optimizer, key):
    """The state before the first step. Pure: under jax.eval_shape, its shapes.

    Raises ValueError for full fine-tuning of a backbone in less than float32, which would round most updates away: one
    of 1e-6 on a weight of 1 needs 20 bits, bfloat16 has 8.
    """
    narrow = {leaf.dtype.name for leaf in jax.tree.leaves(base["ar"])} - {"float32"}
    if config.lora.rank == 0 and narrow:
        raise ValueError(f"lora.rank = 0 trains the backbone itself, which is in {', '.join(sorted(narrow))}: too "
                         f"coarse for its updates. Train an adapter instead, e.g. --config.lora.rank=8")
    trainable = init_trainable(base, config, key)
    return State(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable))
