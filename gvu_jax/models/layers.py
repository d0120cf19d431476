"""Layers that several models share: a dense layer that can carry an adapter, norms, rotary positions, attention.

Dimension letters, used in every file of this package:

    B batch   T query positions   S key positions   D model width   F feed-forward width
    H query heads   K key/value heads   E head width   V vocabulary   N image tokens   L prompt words (text tokens)
"""
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")     # of every mesh, see sharding.py
BATCH = ("data", "fsdp")              # those that divide the rows of a batch


def dividing(rows, mesh, over=BATCH):
    """The first of the mesh axes `over`, as many of them as divide so many rows."""
    while rows % math.prod(mesh.shape[name] for name in over):
        over = over[:-1]
    return over


def spread(x, *rest, over=BATCH, axis=0):
    """Keeps the rows of x [.., B, ..], which lie along `axis`, divided over the mesh axes `over`.

    Only so many of them are used as divide B: a batch smaller than the mesh is computed on several devices alike.
    rest: a mesh axis or None for each dimension after the rows; what is not said stays whole. Without a mesh, nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    over = dividing(x.shape[axis], mesh, over)
    rest = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(rest, x.shape[axis + 1:])]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, over or None, *rest))


def platform():
    """What the program that is being traced will run on: "cpu", "gpu" or "tpu". The mesh says so, without one the
    default backend: a program for TPUs may well be traced on a machine that has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


class Dense(nn.Module):
    """`x @ kernel + bias`, plus the low-rank update of LoRA (Hu et al. 2021) when the variables hold one.

    The adapter lives in its own collection, `lora`: `a` [in, r] and `b` [r, out], already scaled by alpha / r (see
    `lora.scaled`). A call whose variables lack that collection runs exactly the program of the base model.

    The kernel may be int8, with the `step` [1, out] of its columns beside it (see rollout.py): (x @ kernel) * step.

    divided: the side of the matrix, 0 (in) or 1 (out), that stays divided over the mesh axis `tensor` in the product.
    columns: those of `out` that are computed, where not all are wanted.
    """
    features: int
    use_bias: bool = False
    divided: int | None = None
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, columns=slice(None)):                                       # [..., in] -> [..., out]
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x @ gathered(kernel, self.divided)[:, columns].astype(x.dtype)
        if self.has_variable("params", "step"):
            y = (y * self.get_variable("params", "step")[0, columns]).astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))[columns].astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            a, b = gathered(a, 0 if self.divided == 0 else None), gathered(b, 1 if self.divided == 1 else None)
            y = y + widen(x @ a.astype(x.dtype), b[:, columns].astype(x.dtype))
        return y


@jax.custom_vjp
def widen(x, b):
    """x [..., r] @ b [r, out] -> [..., out], the wide half of an adapter, with a rule of its own for the gradient of b.

    That gradient is a product over all tokens, of whose two sides XLA on a CPU rewrites the left one, transposed. JAX
    puts the gradient of the output there, which is wide (a sixth of the time of an update); here it is x.
    """
    return x @ b


def _widen_backward(saved, g):
    x, b = saved
    tokens = tuple(range(x.ndim - 1))
    return g @ b.T, jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))


widen.defvjp(lambda x, b: (x @ b, (x, b)), _widen_backward)


def gathered(matrix, divided):
    """A matrix as a product reads it: its shares over fsdp brought together, one side perhaps divided over tensor.

    Said here, because XLA might else move the activations of many rows instead of the weights. Its transpose says the
    same of the gradient, which is then scattered to where the matrix is stored.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return matrix
    sides = ["tensor" if i == divided and size % mesh.shape["tensor"] == 0 else None
             for i, size in enumerate(matrix.shape)]
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(*sides))


def to_int8(x, axis):
    """x -> q int8 and step float32, whose `axis` is 1: step = max |x| / 127 along it and q = round(x / step), so that
    no entry of q * step is farther than half a step from x. -128 is left out: both sides of zero are alike."""
    x = x.astype(jnp.float32)
    greatest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    step = jnp.where(greatest > 0, greatest, 1.0) / 127                 # where all are zero any will do
    return jnp.round(x / step).astype(jnp.int8), step


class Embed(nn.Module):
    """A table [V, D] looked up by id; `a` [V, r] and `b` [r, D] are its adapter, as in `Dense`."""
    num_embeddings: int
    features: int

    def setup(self):
        self.embedding = self.param("embedding", nn.initializers.normal(0.5), (self.num_embeddings, self.features))

    def attend(self, x):                                                              # [..., D] -> [..., V]
        """The table as a head: logits of every id. An adapter is not part of it."""
        return x @ gathered(self.embedding.T, 1).astype(x.dtype)

    def __call__(self, ids):                                                          # [...] int -> [..., D]
        y = jnp.take(self.embedding, ids, axis=0, mode="clip")
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + widen(jnp.take(a, ids, axis=0, mode="clip").astype(y.dtype), b.astype(y.dtype))
        return y


def with_seen(x, place, seen):
    """x [B, T, D] with the pictures that are read: where place [B, T] is not negative, x is that row of seen [B, N, D].
    Where there are no pictures, seen is None."""
    if seen is None:
        return x
    rows = jnp.take_along_axis(seen.astype(x.dtype), jnp.maximum(place, 0)[:, :, None], axis=1, mode="clip")
    return jnp.where(place[:, :, None] >= 0, rows, x)


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019); the statistics in float32, the result in the dtype of x."""
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):                                                            # [..., D]
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale.astype(x.dtype)


def rotary(x, positions, theta, sections=None):
    """Rotates the two halves of each head by position / theta^(2i/E) (RoPE, Su et al. 2021, "rotate half" layout).

    x [B, T, H, E], positions [B, T] int -> [B, T, H, E]. Angles are computed in float32. positions [B, T, 3] have a
    place in time, in rows and in columns: the first sections[0] of the E/2 angles read the first of them, the next
    sections[1] the second, the rest the third (Qwen2-VL's mrope).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)                              # [E/2]
    if positions.ndim == 3:
        of_angle = positions[..., np.repeat(np.arange(3), sections)]                                # [B, T, E/2]
    else:
        of_angle = positions[..., None]                                                             # [B, T, 1]
    return rotated(x, of_angle.astype(jnp.float32) * frequency)


def rotated(x, angle):
    """The two halves of each head turned by given angles: x [B, T, H, E], angle float32 [B, T, E/2] -> as x.

    Each half of the result is that half times cos and the other one times -sin or sin. Two halves computed apart and
    joined would be the same; a CPU takes three times as long for it, and five for its gradient.
    """
    angle = angle[:, :, None, None, :]                                                           # [B, T, 1, 1, E/2]
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)                                 # [B, T, H, 2, E/2]
    sin = jnp.sin(angle) * jnp.array([[-1.0], [1.0]])                                            # [B, T, 1, 2, E/2]
    return (halves * jnp.cos(angle) + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)


def alike(kinds):
    """Neighbours of one kind, which are stacked: a list of kinds -> tuples (first, how many, kind)."""
    runs = [list(run) for _, run in itertools.groupby(range(len(kinds)), key=kinds.__getitem__)]
    return [(run[0], len(run), kinds[run[0]]) for run in runs]


def repeat(x, times, rows=1, axis=0):
    """Each `rows` neighbouring rows of [.., B, ..] `times` times, the copies behind each other: [.., times B, ..]."""
    blocks = x.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1:])
    return jnp.repeat(blocks, times, axis=axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])


def beside(one, other, axis=0):
    """The rows of two arrays [.., B, ..] of one shape, the i-th of each as neighbours: [.., 2B, ..]."""
    return jnp.stack([one, other], axis=axis + 1).reshape(*one.shape[:axis], -1, *one.shape[axis + 1:])


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(E)) v with grouped heads: every H/K query heads share one key/value head.

    q [B, T, H, E], k and v [B, S, K, E], mask bool broadcastable to [B, T, S] (True = may be read) or None.
    causal: T = S and the mask lets no position read a later one, so that half of the scores need not be computed.
    Returns [B, T, H, E]. Scores and softmax are float32. A row that may read nothing gets the plain mean of the v that
    it was compared with: its value means nothing, but it is finite.

    Long rows go in up to eight blocks of queries, whose scores the backward pass computes again: together they would
    take most of the memory. Causal ones are cut sooner, as it saves arithmetic. Not on a TPU, where splash reads long
    rows, nor where cuDNN serves.
    """
    if cudnn_serves(q):
        return cudnn_attention(q, k, v, mask, causal)
    T, size = q.shape[1], max(128 if causal else 256, -(-q.shape[1] // 8))
    if T < 2 * size or platform() == "tpu":
        return attend(q, k, v, mask)
    blocks = []
    for start in range(0, T, size):
        rows, reach = slice(start, start + size), min(start + size, T) if causal else k.shape[1]
        seen = mask if mask is None else mask[:, rows if mask.shape[1] > 1 else slice(None), :reach]
        blocks.append(jax.checkpoint(attend)(q[:, rows], k[:, :reach], v[:, :reach], seen))
    return jnp.concatenate(blocks, axis=1)


@functools.cache
def has_cudnn():
    """Whether the first device is a CUDA card that cuDNN's attention is for: Ampere, of capability 8.0, or newer."""
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version.lower() and float(device.compute_capability) >= 8.0


def cudnn_serves(q):
    """Whether cuDNN's attention is for queries [B, T, H, E], where this call is traced: on a GPU, in half precision,
    with heads that it knows, where a mesh says how several devices share the work. A decode step stays with `attend`:
    cuDNN wants slots before heads, the cache has them behind."""
    shared = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    return (platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] > 1 and q.shape[3] % 8 == 0
            and q.shape[3] <= 128 and shared and has_cudnn())


def cudnn_attention(q, k, v, mask, causal):
    """`attention` by cuDNN, which never holds the scores (Dao et al. 2022), and its gradient: arguments as there. Each
    device reads its own rows and heads."""
    B, T, H, _ = q.shape
    mask = None if mask is None else jnp.broadcast_to(mask, (B, T, k.shape[1]))

    def on_a_device(q, k, v, mask):
        odd, lengths = (T % 2, k.shape[1] % 2), None
        if any(odd):                         # of which cuDNN has no gradient: one more position, which nobody reads
            lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if mask is None else None
            q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, odd[0]), (0, odd[1])))[:, None]                       # [B, 1, T, S]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=lengths,
                                         implementation="cudnn")
        return y[:, :T]

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = dividing(B, mesh) or None
        heads = "tensor" if H % mesh.shape["tensor"] == k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(rows, None, heads)
        # cuDNN's call does not say over which axes its results vary, so that cannot be checked.
        on_a_device = jax.shard_map(on_a_device, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec,
                                    check_vma=False)
    return on_a_device(q, k, v, mask)


def attend(q, k, v, mask):
    """`attention` of all queries at once: q [B, T, H, E], k and v [B, S, K, E], mask -> [B, T, H, E]."""
    (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
    # Batch dimensions first and nothing to transpose behind either product: other layouts are copied around on a CPU.
    q = q.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, E)                 # [B, K, G T, E]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)                                # [B, K, E, S], [B, K, S, E]
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) / jnp.sqrt(jnp.float32(E))
    scores = scores.reshape(B, K, H // K, T, S)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)           # [B, 1, 1, T, S]
    # What softmax divides by is divided out behind the second product, where there is less to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.matmul(weights.astype(v.dtype).reshape(B, K, -1, S), v, preferred_element_type=jnp.float32)
    mixed = mixed.reshape(B, K, H // K, T, E) / jnp.sum(weights, axis=-1, keepdims=True)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E).astype(v.dtype)
