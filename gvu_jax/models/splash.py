"""Attention over long rows on a TPU: JAX's splash kernel, which never holds the scores [T, T], under the mesh.

What is compiled for is known when tracing (`layers.platform`): a switch inside the program (`lax.platform_dependent`)
would keep the residuals of both branches for the backward pass.
Letters as in layers.py.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from gvu_jax.models import layers
from gvu_jax.models.layers import AXES, BATCH, dividing

LANES = 128     # of the TPU's vector unit: head width and block are multiples of it
BLOCK = 512     # at most so many queries meet so many keys at a time


def serves(T, E):
    """Whether `attention` is for rows of T positions with heads of width E, where this call is traced.

    It is on TPUs (the mesh's devices; without a mesh, the default backend), from 128 positions on, with E a multiple
    of 128. Everything else stays with `layers.attention`: other devices, short rows such as a decode step, SigLIP's
    heads of 72; and, by their callers' choice, what the kernel has no mask for: a sliding window, texts packed behind
    one picture, a row that continues a cache.
    """
    return layers.platform() == "tpu" and T >= LANES and E % LANES == 0


def attention(q, k, v, real=None, causal=False, over=BATCH, interpret=False):
    """softmax(q k^T / sqrt(E)) v of rows that read themselves, block by block (Dao et al. 2022), with its gradient.

    q [B, T, H, E], k and v [B, T, K, E], where every H/K query heads share one key/value head -> [B, T, H, E].
    real       [B, T] bool, True where a position holds a real token, or None. Real positions read real ones; what
               padding gets is finite and means nothing
    causal     no position reads a later one
    over       the mesh axes that the rows are divided over, as in `layers.spread`. The heads are divided over `tensor`
               if rows are not; what an axis does not divide is computed on its devices alike
    interpret  run the kernel step by step in JAX, on any device: for tests
    T is padded to whole blocks.
    """
    B, T, H, E = q.shape
    blocks = -(-T // BLOCK)
    block = -(-T // (blocks * LANES)) * LANES
    padded = blocks * block
    if padded > T:
        real = jnp.ones((B, T), bool) if real is None else real
        real = jnp.pad(real, ((0, 0), (0, padded - T)))
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
                              block_kv_dq=block)

    def on_a_device(q, k, v, real):                                                # its share of the rows and heads
        shape = (padded, padded)
        mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * q.shape[2]), block_sizes=sizes, interpret=interpret)
        # A position reads its own segment only: real ones are one, padding is the other.
        segments = None if real is None else splash.SegmentIds(*[real.astype(jnp.int32)] * 2)
        q, k, v = (x.swapaxes(1, 2) for x in (q * E ** -0.5, k, v))                                 # [B, H, T, E]
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = dividing(B, mesh, over)
        heads = "tensor" if "tensor" not in rows and k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(rows, None, heads)
        # The kernel does not say over which axes its results vary, so that cannot be checked.
        on_a_device = jax.shard_map(on_a_device, in_specs=(spec, spec, spec, PartitionSpec(rows)), out_specs=spec,
                                    check_vma=False)
    return on_a_device(q, k, v, real)[:, :T]


def full_attention(q, k, v, real=None):
    """Every position reads every other one: `attention` where it serves, else `layers.attention`. All [B, T, H, E],
    the pictures B divided over all the mesh. real [B, T] bool: which positions are read, None: all."""
    if serves(q.shape[1], q.shape[3]):
        return attention(q, k, v, real, over=AXES)
    return layers.attention(q, k, v, None if real is None else real[:, None, :])
