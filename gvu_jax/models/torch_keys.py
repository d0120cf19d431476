"""Torch checkpoints as parameter trees: names, layouts, and hard errors for whatever does not fit.

A model file states how its parameter paths are called in torch as a short table of regular expressions. Going from
our path to the torch name (and not back) lists every tensor a checkpoint must hold, so that a missing key can be
named, tensors can be fetched one leaf at a time from a lazy mapping, and the way back to torch is the same table.
"""
import re

import numpy as np
from flax import traverse_util


def torch_name(path, rules):
    """The torch name of the parameter `path` ("blocks/attn/qkv/kernel"), or the pattern of several:

        {layer}     stands for a stacked axis, {layer+4} for one whose first row is layer 4
        {only}      for a leading axis of one row that torch does not have; it leaves no trace in the name
        {q,k,v}     for equal shares of the last axis, each a tensor of its own in torch

    `rules` are (regex, replacement) pairs applied in order; what every model shares comes last. A model of several
    parts in one checkpoint has a dict of them, by the first name of the path.
    """
    if isinstance(rules, dict):
        part, path = path.split("/", 1)
        rules = rules[part]
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return re.sub(r"(kernel|scale)$", "weight", path).replace("/", ".")


def is_stacked(name):
    """Whether the leading axis of the parameter of this name is no axis of its tensors."""
    return "{layer" in name or "{only}" in name


def layer_names(name, count):
    """The torch names of the rows of a stacked parameter, or the one name of another: list of str."""
    if not is_stacked(name):
        return [name]
    name = name.replace("{only}", "")
    return [re.sub(r"\{layer(\+\d+)?\}", lambda m: str(i + int(m[1] or 0)), name) for i in range(count)]


def share_names(name):
    """The torch names of the shares of a row, or its one name: list of str."""
    if not (several := re.search(r"\{(\w+(,\w+)+)\}", name)):
        return [name]
    return [name[:several.start()] + share + name[several.end():] for share in several[1].split(",")]


def to_flax_layout(tensor, path):
    """Dense kernels [out, in] -> [in, out], convolution kernels [out, in, h, w] -> [h, w, in, out], those of films
    [out, in, t, h, w] -> [w, h, t, in, out], others as is."""
    if not path.endswith("kernel"):
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_torch_layout(leaf, path):
    """The inverse of `to_flax_layout`."""
    if not path.endswith("kernel"):
        return leaf
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def places(found, shapes, rules, ignored=()):
    """Where each tensor of a checkpoint belongs, from names and shapes alone: {torch name: (path, row, share)}.

    found: {torch name: shape}. shapes: nested dict of anything with a `.shape`, the tree to fill. row is the index on
    a stacked parameter's leading axis, None where it has no such axis; share is (index, how many) of the last axis,
    None where a tensor is all of it. ignored: names that may be present and get no place. Raises ValueError that names
    every missing and unknown key, or every misshapen one.
    """
    places, asked = {}, {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        name = torch_name(path, rules)
        *shape, last = leaf.shape[1:] if is_stacked(name) else leaf.shape
        for row, of_row in enumerate(layer_names(name, leaf.shape[0] if is_stacked(name) else 1)):
            keys = share_names(of_row)
            for i, key in enumerate(keys):
                places[key] = path, row if is_stacked(name) else None, (i, len(keys)) if len(keys) > 1 else None
                asked[key] = (*shape, last // len(keys))
    missing, unknown = sorted(set(places) - set(found)), sorted(set(found) - set(places) - set(ignored))
    if missing or unknown:
        raise ValueError(f"the checkpoint does not fit the config: missing keys {missing}, unknown keys {unknown}")
    in_our_layout = {key: to_flax_layout(np.broadcast_to(0, found[key]), path).shape
                     for key, (path, *_) in places.items()}
    misshapen = [f"key {key}: {shape} in our layout, but the config asks for {asked[key]}"
                 for key, shape in sorted(in_our_layout.items()) if shape != asked[key]]
    if misshapen:
        raise ValueError("; ".join(misshapen))
    return places


def to_params(tensors, shapes, rules, ignored=()):
    """A torch state dict as a parameter tree: a nested dict of numpy arrays in the dtypes of `tensors`.

    tensors: mapping of torch name -> array; the other arguments and the errors are those of `places`.
    """
    rows = {}                                                  # path -> row -> its shares, all in order
    for name, (path, row, _) in places({k: np.shape(v) for k, v in tensors.items()}, shapes, rules, ignored).items():
        rows.setdefault(path, {}).setdefault(row, []).append(to_flax_layout(np.asarray(tensors[name]), path))
    whole = lambda shares: np.concatenate(shares, axis=-1) if len(shares) > 1 else shares[0]
    joined = lambda rows: whole(rows[None]) if None in rows else np.stack([whole(shares) for shares in rows.values()])
    return traverse_util.unflatten_dict({path: joined(of_path) for path, of_path in rows.items()}, sep="/")


def to_torch(params, rules):
    """The inverse of `to_params`: {torch name: numpy array}, rows of a stack and shares under names of their own."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        name, leaf = torch_name(path, rules), np.asarray(leaf)
        rows = leaf if is_stacked(name) else leaf[None]
        for of_row, row in zip(layer_names(name, len(rows)), rows):
            keys = share_names(of_row)
            shares = np.split(row, len(keys), axis=-1) if len(keys) > 1 else [row]
            tensors |= {key: to_torch_layout(share, path) for key, share in zip(keys, shares)}
    return tensors


def split(found, owners):
    """A checkpoint that holds several parts in one: {part: {name: tensor}} of {name: tensor or shape}.

    owners: {part: regex that the names of its tensors begin with}. ValueError names the keys that belong to no part.
    """
    parts = {part: {k: v for k, v in found.items() if re.match(pattern, k)} for part, pattern in owners.items()}
    if unknown := sorted(set(found).difference(*parts.values())):
        raise ValueError(f"the checkpoint does not fit the model: unknown keys {unknown}")
    return parts
