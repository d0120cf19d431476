"""Torch checkpoints as parameter trees: names, layouts, and hard errors for whatever does not fit.

A model file states how its parameter paths are called in torch as a short table of regular expressions. Going from
our path to the torch name (and not back) lists every tensor a checkpoint must hold, so that a missing key can be
named, tensors can be fetched one leaf at a time from a lazy mapping, and the way back to torch is the same table.
"""
import re

import numpy as np
from flax import traverse_util


def torch_name(path, rules):
    """The torch name of the parameter `path` ("blocks/attn/qkv/kernel"); `{layer}` in it stands for a stacked axis,
    `{layer+4}` for one whose first row is layer 4.

    `rules` are (regex, replacement) pairs applied in order; what every model shares comes last.
    """
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return re.sub(r"(kernel|scale)$", "weight", path).replace("/", ".")


def layer_names(name, count):
    """The torch names of the rows of a stacked parameter, or the one name of another: list of str."""
    if "{layer" not in name:
        return [name]
    return [re.sub(r"\{layer(\+\d+)?\}", lambda m: str(i + int(m[1] or 0)), name) for i in range(count)]


def to_flax_layout(tensor, path):
    """Dense kernels [out, in] -> [in, out], convolution kernels [out, in, h, w] -> [h, w, in, out], others as is."""
    if not path.endswith("kernel"):
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_params(tensors, shapes, rules, ignored=()):
    """A torch state dict as a parameter tree.

    tensors: mapping of torch name -> array. shapes: nested dict of anything with a `.shape`, the tree to fill.
    ignored: torch names that may be present and are not read. Returns a nested dict of numpy arrays in the dtypes of
    `tensors`. Raises ValueError that names each unknown or missing key, or the first misshapen one.
    """
    shapes = traverse_util.flatten_dict(shapes, sep="/")
    names = {}                                                     # path -> the torch names that fill it, in order
    for path, leaf in shapes.items():
        names[path] = layer_names(torch_name(path, rules), leaf.shape[0])
    wanted = {name for group in names.values() for name in group}
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - set(ignored))
    if missing or unknown:
        raise ValueError(f"the checkpoint does not fit the config: missing keys {missing}, unknown keys {unknown}")

    params = {}
    for path, group in names.items():
        stacked = "{layer" in torch_name(path, rules)
        expected = shapes[path].shape[1:] if stacked else shapes[path].shape
        leaves = [to_flax_layout(np.asarray(tensors[name]), path) for name in group]
        for name, leaf in zip(group, leaves):
            if leaf.shape != expected:
                raise ValueError(f"key {name}: {leaf.shape} in our layout, but the config asks for {expected}")
        params[path] = np.stack(leaves) if stacked else leaves[0]
    return traverse_util.unflatten_dict(params, sep="/")
