"""The decoder layer of Qwen2 and Llama: pre-norm, grouped-query attention, rotary positions, SwiGLU; and how it is
stacked.

Qwen2 has biases on q, k, v and Llama has none: the config's `qkv_bias`. Where pictures have places in rows and columns
(Qwen2.5-VL), `mrope_section` says which of the rotary angles read which; None elsewhere. The key/value cache is one
pair of arrays for all layers, carried through the layers' scan and written in place.
"""
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from gvu_jax.models import splash
from gvu_jax.models.layers import Dense, RMSNorm, attention, beside, platform, repeat, rotary, spread, to_int8

# What of a layer is computed again in the backward pass: "nothing", "all", or all but the results of its matrix
# products ("elementwise").
REMAT = {"nothing": None, "all": None, "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def check_remat(remat):
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; it must be one of {', '.join(REMAT)}")


@struct.dataclass
class Cache:
    """Keys and values of the positions read so far: each [layers, B, K, S, E], S slots allocated up front; or those of
    one layer by itself, [B, K, S, E], whose `layer` is None. In int8, each key and each value has a step [.., S, 1].

    Heads stand before slots, as the products of attention read them: otherwise every step would move the whole cache.
    """
    k: jax.Array
    v: jax.Array
    k_step: jax.Array | None = None       # float32
    v_step: jax.Array | None = None

    @staticmethod
    def empty(config, batch, slots, dtype):
        def zeros(width, dtype):
            shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, width)
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return Cache(*zeros(config.head_dim, dtype), *(zeros(1, jnp.float32) if dtype == jnp.int8 else ()))

    def repeat(self, times, rows=1):
        """Each `rows` neighbouring rows `times` times: one prompt's prefill serves all samples of its group."""
        return jax.tree.map(lambda x: spread(repeat(x, times, rows, axis=1), "tensor", axis=1), self)

    def beside(self, other):
        """The rows of both caches, the i-th of each as neighbours."""
        return jax.tree.map(lambda one, other: beside(one, other, axis=1), self, other)

    def grown(self, slots):
        """The same with room for so many slots."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)]), self)

    def write(self, layer, at, k, v):                                                 # k, v [B, T, K, E]
        def put(slots, new):
            new, where = new.swapaxes(1, 2), (0, 0, at, 0)
            if layer is not None:
                new, where = new[None], (layer, *where)
            return spread(jax.lax.dynamic_update_slice(slots, new, where), "tensor", axis=slots.ndim - 4)
        if self.k_step is None:
            return Cache(put(self.k, k), put(self.v, v))
        (k, k_step), (v, v_step) = to_int8(k, -1), to_int8(v, -1)
        return Cache(put(self.k, k), put(self.v, v), put(self.k_step, k_step), put(self.v_step, v_step))

    def read(self, layer, dtype):                                                     # two of [B, S, K, E]
        def take(slots, step):
            if layer is not None:
                slots = jax.lax.dynamic_index_in_dim(slots, layer, axis=0, keepdims=False)
            slots = slots.swapaxes(1, 2)
            return slots if step is None else (slots * take(step, None)).astype(dtype)
        return take(self.k, self.k_step), take(self.v, self.v_step)


class Attention(nn.Module):
    config: object

    @nn.compact
    def __call__(self, x, cache, layer, positions, mask, at):
        c, (B, T, _) = self.config, x.shape
        heads = lambda name, n: Dense(n * c.head_dim, c.qkv_bias, 1, name=name)(x).reshape(B, T, n, c.head_dim)
        turn = lambda x: rotary(x, positions, c.rope_theta, c.mrope_section)
        q = turn(heads("q_proj", c.num_attention_heads))                                            # [B, T, H, E]
        k = turn(heads("k_proj", c.num_key_value_heads))                                            # [B, T, K, E]
        v = heads("v_proj", c.num_key_value_heads)                                                  # [B, T, K, E]
        if cache is not None:
            cache = cache.write(layer, at, k, v)
        if mask.ndim == 2:
            y = splash.attention(q, k, v, mask, causal=True)                                        # [B, T, H, E]
        else:
            k, v = (k, v) if cache is None else cache.read(layer, k.dtype)                          # [B, S, K, E]
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

    layer: index of this layer in the cache. positions [B, T], or [B, T, 3] (see `rotary`). at: the first cache slot
    these T tokens are written to. mask: [B, T, S], True where a key may be read; or [B, T], True for a real token, of
    rows that begin at slot 0: these splash reads, in causal order.
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


def rematted(layer, config):
    """The module class `layer`, of which the backward pass computes again what the config says."""
    return layer if config.remat == "nothing" else nn.remat(layer, prevent_cse=False, policy=REMAT[config.remat])


def stack(layer, config, length, per_layer, shared):
    """`length` layers in a scan. layer: a module class called with a carry, `per_layer` arguments that differ from
    layer to layer and `shared` ones; it returns the carry and None.

    On a GPU, XLA copies each layer's weights out of their stack before it multiplies with them, and what the backward
    pass needs into stacks and out of them again: an update takes a sixth less without the loop, which is therefore
    written out there. Not where layers are computed again (`remat`): little is kept there, and without the loop XLA
    would merge the second computation with the first.
    """
    written_out = platform() == "gpu" and config.remat == "nothing"
    return nn.scan(
        rematted(layer, config), variable_axes={"params": 0, "lora": 0, "intermediates": 0},
        split_rngs={"params": True}, in_axes=(0,) * per_layer + (nn.broadcast,) * shared, length=length,
        unroll=length if written_out else 1)(config)


def readable(mask, T, at, head_dim, window=None):
    """What each of T positions from slot `at` on may read, as `DecoderLayer` takes it: (mask, near).

    mask     [B, S] bool, True where the slot holds a real token, read in causal order; or [B, T, S], what a position
             may read besides
    at       int or traced; the int 0 says that rows begin here, which is what splash can read
    window   a position reads the last so many; near [T, S] says which, None without a window
    """
    ago = (at + jnp.arange(T))[:, None] - jnp.arange(mask.shape[-1])[None, :]                       # [T, S]
    near = None if window is None else ago < window                                                 # [T, S]
    if near is None and mask.ndim == 2 and isinstance(at, int) and at == 0 and splash.serves(T, head_dim):
        return mask[:, :T], near                                        # the rows begin here: the rest is causal order
    return (ago >= 0) & (mask if mask.ndim == 3 else mask[:, None, :]), near                        # [B, T, S]


def for_steps(model, variables, cache, stacks):
    """(model, variables, cache) that read one token after the other: what this one gave, as every step reads it.

    A loop over tokens around a loop over layers makes XLA copy each layer's weights and slots out of their stacks
    before it multiplies with them, three times the traffic of a step that does little else; so each layer is then
    by itself. Not on a TPU, which reads from the stack, and where a second copy of the weights would be the cost.

    stacks: {name of a stack in the variables: the layer it begins with}. A model whose `apart` is set calls its layers
    `layers_0`, `layers_1`, .. and takes a list of caches.
    """
    if platform() == "tpu":
        return model, variables, cache

    def each_layer(tree):
        whole = {name: part for name, part in tree.items() if name not in stacks}
        for name, first in stacks.items():
            for i in range(jax.tree.leaves(tree[name])[0].shape[0] if name in tree else 0):
                whole[f"layers_{first + i}"] = jax.tree.map(lambda x: x[i], tree[name])
        return whole

    slots = [jax.tree.map(lambda x: x[i], cache) for i in range(model.config.num_hidden_layers)]
    weights = {name: each_layer(tree) for name, tree in variables.items()}
    return model.clone(apart=True), weights, slots
