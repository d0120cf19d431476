"""The Qwen2 decoder layer: pre-norm, grouped-query attention with biases on q, k, v, rotary positions, SwiGLU.

The key/value cache is one pair of arrays for all layers, carried through the layers' scan and written in place.
"""
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from gvu_jax.models import splash
from gvu_jax.models.layers import Dense, RMSNorm, attention, rotary, spread


@struct.dataclass
class Cache:
    """Keys and values of the positions read so far: each [layers, B, K, S, E], S slots allocated up front; or those of
    one layer by itself, [B, K, S, E], whose `layer` is None.

    Heads stand before slots, as the products of attention read them: otherwise every step would move the whole cache.
    """
    k: jax.Array
    v: jax.Array

    @staticmethod
    def empty(config, batch, slots, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def repeat(self, times):
        """Each row `times` times, neighbours together: one prompt's prefill serves all samples of its group."""
        return jax.tree.map(lambda x: spread(jnp.repeat(x, times, axis=1), "tensor", axis=1), self)

    def write(self, layer, at, k, v):                                                 # k, v [B, T, K, E]
        def put(slots, new):
            new, where = new.swapaxes(1, 2), (0, 0, at, 0)
            if layer is not None:
                new, where = new[None], (layer, *where)
            return spread(jax.lax.dynamic_update_slice(slots, new, where), "tensor", axis=slots.ndim - 4)
        return Cache(put(self.k, k), put(self.v, v))

    def read(self, layer):                                                            # two of [B, S, K, E]
        if layer is None:
            return self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)
        take = lambda slots: jax.lax.dynamic_index_in_dim(slots, layer, axis=0, keepdims=False).swapaxes(1, 2)
        return take(self.k), take(self.v)


class Attention(nn.Module):
    config: object

    @nn.compact
    def __call__(self, x, cache, layer, positions, mask, at):
        c, (B, T, _) = self.config, x.shape
        heads = lambda name, n: Dense(n * c.head_dim, True, 1, name=name)(x).reshape(B, T, n, c.head_dim)
        q = rotary(heads("q_proj", c.num_attention_heads), positions, c.rope_theta)                 # [B, T, H, E]
        k = rotary(heads("k_proj", c.num_key_value_heads), positions, c.rope_theta)                 # [B, T, K, E]
        v = heads("v_proj", c.num_key_value_heads)                                                  # [B, T, K, E]
        if cache is not None:
            cache = cache.write(layer, at, k, v)
        if mask.ndim == 2:
            y = splash.attention(q, k, v, mask, causal=True)                                        # [B, T, H, E]
        else:
            k, v = (k, v) if cache is None else cache.read(layer)                                   # [B, S, K, E]
            y = attention(q, k, v, mask, causal=cache is None)                                      # [B, T, H, E]
        y = y.reshape(B, T, c.num_attention_heads * c.head_dim)
        return Dense(c.hidden_size, divided=0, name="o_proj")(y), cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), width `intermediate_size`."""
    config: object

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate, up = (Dense(c.intermediate_size, divided=1, name=name)(x) for name in ("gate_proj", "up_proj"))
        # The backward pass finds the activation again from gate and up: cheaper than keeping three more arrays.
        mixed = jax.checkpoint(lambda gate, up: nn.silu(gate) * up)(gate, up)
        return Dense(c.hidden_size, divided=0, name="down_proj")(mixed)


class DecoderLayer(nn.Module):
    """One layer of the stack; scanned, so it takes and returns the carry (x [B, T, D], cache or None).

    layer: index of this layer in the cache. positions [B, T], at: the first cache slot these T tokens are written to.
    mask: [B, T, S], True where a key may be read; or [B, T], True for a real token, of rows that begin at slot 0: these
    splash reads, in causal order.
    """
    config: object

    @nn.compact
    def __call__(self, x, cache, layer, positions, mask, at):
        c, x = self.config, spread(x)
        y, cache = Attention(c, name="self_attn")(
            RMSNorm(c.rms_norm_eps, name="input_layernorm")(x), cache, layer, positions, mask, at)
        x = x + y
        x = x + MLP(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))
        return x, cache
