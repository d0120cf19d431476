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


def to_torch_layout(leaf, path):
    """The inverse of `to_flax_layout`."""
    if not path.endswith("kernel"):
        return leaf
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def places(found, shapes, rules, ignored=()):
    """Where each tensor of a checkpoint belongs, from names and shapes alone: {torch name: (path, row)}.

    found: {torch name: shape}. shapes: nested dict of anything with a `.shape`, the tree to fill. row is the index on
    a stacked parameter's leading axis, None where the parameter is one tensor. ignored: names that may be present and
    get no place. Raises ValueError that names every missing and unknown key, or every misshapen one.
    """
    places, asked = {}, {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        name = torch_name(path, rules)
        stacked = "{layer" in name
        for row, key in enumerate(layer_names(name, leaf.shape[0] if stacked else 1)):
            places[key] = path, row if stacked else None
            asked[key] = leaf.shape[1:] if stacked else leaf.shape
    missing, unknown = sorted(set(places) - set(found)), sorted(set(found) - set(places) - set(ignored))
    if missing or unknown:
        raise ValueError(f"the checkpoint does not fit the config: missing keys {missing}, unknown keys {unknown}")
    in_our_layout = {key: to_flax_layout(np.broadcast_to(0, found[key]), path).shape
                     for key, (path, _) in places.items()}
    misshapen = [f"key {key}: {shape} in our layout, but the config asks for {asked[key]}"
                 for key, shape in sorted(in_our_layout.items()) if shape != tuple(asked[key])]
    if misshapen:
        raise ValueError("; ".join(misshapen))
    return places


def to_params(tensors, shapes, rules, ignored=()):
    """A torch state dict as a parameter tree: a nested dict of numpy arrays in the dtypes of `tensors`.

    tensors: mapping of torch name -> array; the other arguments and the errors are those of `places`.
    """
    rows = {}                                                              # path -> its rows in order, or its one leaf
    for name, (path, _) in places({k: np.shape(v) for k, v in tensors.items()}, shapes, rules, ignored).items():
        rows.setdefault(path, []).append(to_flax_layout(np.asarray(tensors[name]), path))
    stacked = lambda path: "{layer" in torch_name(path, rules)
    return traverse_util.unflatten_dict(
        {path: np.stack(leaves) if stacked(path) else leaves[0] for path, leaves in rows.items()}, sep="/")


def to_torch(params, rules):
    """The inverse of `to_params`: {torch name: numpy array}, the rows of a stack under names of their own."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        name, leaf = torch_name(path, rules), np.asarray(leaf)
        rows = leaf if "{layer" in name else leaf[None]
        tensors |= {key: to_torch_layout(row, path) for key, row in zip(layer_names(name, len(rows)), rows)}
    return tensors
