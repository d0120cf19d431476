"""Low-rank adapters (LoRA, Hu et al. 2021) as a tree of their own beside the frozen weights.

For a kernel W [.., in, out] the adapter holds a [.., in, r] and b [.., r, out], and the layer computes
x W + (alpha / r) x a b. Layers stacked on a leading axis keep it. b starts at zero, so a new adapter changes nothing.
"""
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gvu_jax.models import torch_keys


def init(key, params, rank, targets):
    """A new adapter for every kernel or embedding table whose path matches `targets` (regular expression, search).

    params: nested dict of arrays (or of shapes). Returns the nested dict {module path: {"a", "b"}}; a is normal with
    standard deviation 1/sqrt(in), b zero, float32. Raises ValueError where the pattern matches nothing.
    """
    adapter = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[-1] not in ("kernel", "embedding") or leaf.ndim > 3 or not re.search(targets, "/".join(path)):
            continue                                             # more than three axes: a convolution's
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


# ------------------------------------------------------------------ peft's names

def to_peft(adapter, rules):
    """The tensors of a peft adapter, {name: numpy}: one pair for each layer of a stack.

    rules: of the model the adapter belongs to (see torch_keys). A linear layer has lora_A [r, in] and lora_B [out, r],
    an embedding lora_embedding_A [r, V] and lora_embedding_B [D, r].
    """
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(adapter, sep="/").items():
        pattern, leaf = _peft_name(path, rules), np.asarray(leaf)
        names = torch_keys.layer_names(pattern, len(leaf))
        for name, row in zip(names, leaf if "{layer" in pattern else [leaf]):
            tensors[name] = np.ascontiguousarray(row.T)
    return tensors


def from_peft(tensors, params, rules):
    """The inverse of `to_peft`: the adapter of the modules that `tensors` ({name: array}) name, in their dtype.

    params: the model's params, or their shapes. Raises ValueError that names the keys which belong to no kernel or
    embedding, miss their other half or a layer of their stack, or do not fit the kernel's shape.
    """
    tensors, adapter, missing, misshapen = dict(tensors), {}, [], []
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        module, _, kind = path.rpartition("/")
        if kind not in ("kernel", "embedding"):
            continue
        halves = {half: torch_keys.layer_names(_peft_name(f"{module}/{half}", rules), leaf.shape[0]) for half in "ab"}
        found = {name: np.asarray(tensors.pop(name)) for name in halves["a"] + halves["b"] if name in tensors}
        if not found:
            continue
        # Which rank most of them have says which of them are wrong.
        rank = statistics.mode(x.shape[:1] if name in halves["a"] else x.shape[-1:] for name, x in found.items())
        fan_in, fan_out = leaf.shape[-2:]
        for (half, names), shape in zip(halves.items(), ((*rank, fan_in), (fan_out, *rank))):
            missing += [name for name in names if name not in found]
            misshapen += [name for name in names if name in found and found[name].shape != shape]
            if not missing and not misshapen:
                rows = [found[name].T for name in names]
                adapter[f"{module}/{half}"] = np.stack(rows) if leaf.ndim == 3 else rows[0]
    if missing or misshapen or tensors:
        told = [f"{len(names)} {what} keys ({', '.join(names[:2])}{', ..' * (len(names) > 2)})" for what, names in (
            ("missing", missing), ("misshapen", misshapen), ("unknown", sorted(tensors))) if names]
        raise ValueError(f"the adapter does not fit the model, so it is of another one: {', '.join(told)}")
    return traverse_util.unflatten_dict(adapter, sep="/")


def _peft_name(path, rules):
    """peft's name of an adapter's leaf ("layers/layer/mlp/up_proj/a"), with "{layer}" for a stacked axis."""
    module, _, half = path.rpartition("/")
    name = "base_model.model." + torch_keys.torch_name(f"{module}/kernel", rules).removesuffix(".weight")
    return f"{name}.lora_embedding_{half.upper()}" if module.endswith("embed_tokens") else (
        f"{name}.lora_{half.upper()}.weight")
