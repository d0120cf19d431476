"""Low-rank adapters (LoRA, Hu et al. 2021) as a tree of their own beside the frozen weights.

For a kernel W [.., in, out] the adapter holds a [.., in, r] and b [.., r, out], and the layer computes
x W + (alpha / r) x a b. Layers stacked on a leading axis keep it. b starts at zero, so a new adapter changes nothing.
"""
import re

import jax
import jax.numpy as jnp
from flax import traverse_util


def init(key, params, rank, targets):
    """A new adapter for every kernel or embedding table whose path matches `targets` (regular expression, search).

    params: nested dict of arrays (or of shapes). Returns the nested dict {module path: {"a", "b"}}; a is normal with
    standard deviation 1/sqrt(in), b zero, float32. Raises ValueError where the pattern matches nothing.
    """
    adapter = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[-1] not in ("kernel", "embedding") or not re.search(targets, "/".join(path)):
            continue
        *stack, fan_in, fan_out = leaf.shape
        key, subkey = jax.random.split(key)
        adapter[path[:-1] + ("a",)] = jax.random.normal(subkey, (*stack, fan_in, rank)) / jnp.sqrt(fan_in)
        adapter[path[:-1] + ("b",)] = jnp.zeros((*stack, rank, fan_out))
    if not adapter:
        raise ValueError(f"lora.targets = {targets!r} matches no kernel of the model")
    return traverse_util.unflatten_dict(adapter)


def scaled(adapter, scale):
    """The adapter as the dense layers take it: b multiplied by alpha / r, so that they need to know neither."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x * scale if path[-1].key == "b" else x, adapter)
