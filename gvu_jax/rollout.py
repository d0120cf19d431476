"""The backbone as it draws: in the layout "rollout" (see sharding.py), and where `rollout.weights` is "int8" with its
matrices rounded, so that each step of a decode loop, which does little but read them, reads half of bfloat16's bytes.

Each column of a kernel W [.., in, out], which makes one output, has a step of its own (symmetric, by channel):

    step = max |W| / 127  over in,     q = round(W / step)  int8,     x W  becomes  (x q) step      (layers.Dense)

All kernels of the backbone are rounded, its heads among them: a step reads these as well. Embedding tables, of which a
step reads a few rows, biases and norms are not, nor is the adapter, which `Dense` adds beside the rounded product.
What a step reads besides is the cache of keys and values: `rollout.cache` rounds each of these in the same way by
itself, as it is written (qwen2.Cache). It grows with the pictures that are drawn at once, and the weights do not.

Written here because no library fits: Qwix, which changes Linen models from outside, wants each weight to go straight
from where the module asks for it into a product, and ours first say how they lie on the mesh.
"""
from flax import traverse_util

from gvu_jax import sharding
from gvu_jax.models.layers import to_int8


def backbone(partition, params, how):
    """The parts of params that draw ("ar", "adapter") inside a program, each laid out for it. how: sampling.How."""
    parts = {name: params[name] for name in ("ar", "adapter") if name in params}
    if how.weights == "int8":
        # Rounded where they are stored, and only then gathered: that moves int8.
        parts = sharding.constrain(partition, parts | {"ar": rounded(parts["ar"])})
    return sharding.constrain(partition, parts, "rollout")


def rounded(params):
    """A nested dict of arrays, every kernel [.., in, out] in int8 and beside it its "step" [.., 1, out] float32."""
    flat = traverse_util.flatten_dict(params)
    for path, kernel in list(flat.items()):
        if path[-1] == "kernel" and kernel.ndim <= 3:                   # more than three axes: a convolution's
            flat[path], flat[path[:-1] + ("step",)] = to_int8(kernel, -2)
    return traverse_util.unflatten_dict(flat)
