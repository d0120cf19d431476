"""Stable Diffusion 3.5's transformer (MMDiT, Esser et al. 2024): a rectified flow from noise to VAE latents.

    dx/d sigma = v(x, sigma | context, pooled),   sigma from 1 (noise) to 0 (picture)

The layout is diffusers' `SD3Transformer2DModel`: every block holds image and text tokens in two streams that attend
jointly; the last one drops the text behind its attention. Medium's first blocks have a second attention of the image
alone. An image token is a 2x2 patch of VAE latents, N = rows * columns of them; positions are the middle of a stored
table. Everything is computed in the common dtype of inputs and parameters; norm statistics, softmax and the sinusoids
of sigma are float32. Letters as in layers.py; X is the number of text vectors.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import torch_keys
from gvu_jax.models.flux import modulated_norm, sinusoids
from gvu_jax.models.layers import AXES, Dense, RMSNorm, alike, spread
from gvu_jax.models.splash import full_attention


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of the checkpoint's config.json, under its names."""
    in_channels: int                 # of the VAE's latents
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int         # width of the text vectors
    pooled_projection_dim: int       # width of the pooled text vector
    pos_embed_max_size: int          # rows and columns of the stored table of positions
    patch_size: int = 2
    dual_attention_layers: tuple[int, ...] = ()
    remat: bool = False              # recompute each block in the backward pass

    @property
    def width(self):
        return self.attention_head_dim * self.num_attention_heads

    @property
    def runs(self):
        """Blocks of one kind that follow each other, each a stack: tuples (first block, count, (dual, last))."""
        return alike([(i in self.dual_attention_layers, i == self.num_layers - 1) for i in range(self.num_layers)])

    def __post_init__(self):
        if self.num_layers < 1 or not set(self.dual_attention_layers) <= set(range(self.num_layers)):
            raise ValueError(f"dual_attention_layers {self.dual_attention_layers} are not among the {self.num_layers} "
                             f"layers (num_layers)")


class Text(NamedTuple):
    """What the transformer knows of B texts: context [B, X, joint_attention_dim], pooled [B, pooled_projection_dim],
    and which of the context's vectors there are, real [B, X] bool; None: all. The published model is told of no
    padding, and reads it."""
    context: Any
    pooled: Any
    real: Any = None


class Embedder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):                                                                     # [B, in] -> [B, D]
        hidden = nn.silu(Dense(self.width, True, name="linear_1")(x))
        return Dense(self.width, True, name="linear_2")(hidden)


class Modulation(nn.Module):
    """What flux.Modulation is, of matrices that can carry an adapter: [B, D] -> `parts` vectors [B, 1, D]."""
    parts: int

    @nn.compact
    def __call__(self, vector):
        zeros, width = nn.initializers.zeros, self.parts * vector.shape[-1]
        out = Dense(width, True, kernel_init=zeros, name="linear")(nn.silu(vector))[:, None, :]
        return jnp.split(out, self.parts, axis=-1)


class Conditioning(nn.Module):
    """One vector per picture from sigma and the pooled text."""
    width: int

    @nn.compact
    def __call__(self, sigma, pooled):                                                # [B], [B, P] -> [B, D]
        vector = Embedder(self.width, name="timestep_embedder")(sinusoids(sigma).astype(pooled.dtype))
        return vector + Embedder(self.width, name="text_embedder")(pooled)


# ------------------------------------------------------------------ blocks

def queries_keys_values(config, x, names, norms):
    """q, k, v [B, T, H, E] of a stream x [B, T, D]; q and k normed per head. Strings name the parameters."""
    heads = lambda name: Dense(config.width, True, 1, name=name)(x).reshape(
        *x.shape[:2], config.num_attention_heads, -1)
    q, k, v = (heads(name) for name in names)
    return RMSNorm(1e-6, name=norms[0])(q), RMSNorm(1e-6, name=norms[1])(k), v


OF_IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class JointAttention(nn.Module):
    """last: nobody reads what the text's own queries would get."""
    config: Config
    last: bool

    @nn.compact
    def __call__(self, image, text, real):                               # [B, N, D], [B, X, D] -> the same shapes
        c, N = self.config, image.shape[1]
        streams = queries_keys_values(c, image, *OF_IMAGE), queries_keys_values(c, text, *OF_TEXT)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*streams))                         # [B, N+X, H, E]
        mixed = full_attention(q, k, v, real).reshape(*q.shape[:2], -1)                             # [B, N+X, D]
        image = Dense(c.width, True, 0, name="to_out_0")(mixed[:, :N])
        return image, None if self.last else Dense(c.width, True, 0, name="to_add_out")(mixed[:, N:])


class SelfAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, image):                                                                      # [B, N, D]
        q, k, v = queries_keys_values(self.config, image, *OF_IMAGE)
        mixed = full_attention(q, k, v).reshape(image.shape)
        return Dense(self.config.width, True, 0, name="to_out_0")(mixed)


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):                                                                          # [B, T, D]
        hidden = nn.gelu(Dense(4 * x.shape[-1], True, 1, name="up")(x), approximate=True)           # [B, T, 4D]
        return Dense(x.shape[-1], True, 0, name="down")(hidden)


class Block(nn.Module):
    """Image [B, N, D] and text [B, X, D] streams: own weights, one joint attention. The None is for nn.scan."""
    config: Config
    dual: bool
    last: bool

    @nn.compact
    def __call__(self, streams, vector, real):
        image, text = (spread(x, over=AXES) for x in streams)
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = Modulation(
            9 if self.dual else 6, name="norm1")(vector)
        if self.last:
            t_scale, t_shift = Modulation(2, name="norm1_context")(vector)     # in this order, unlike in the others
        else:
            t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = Modulation(6, name="norm1_context")(vector)
        image_mixed, text_mixed = JointAttention(self.config, self.last, name="attn")(
            modulated_norm(image, shift, scale), modulated_norm(text, t_shift, t_scale), real)
        mixed = gate * image_mixed
        if self.dual:                                # reads the block's input, not what the joint attention made of it
            shift, scale, gate = second
            mixed = mixed + gate * SelfAttention(self.config, name="attn2")(modulated_norm(image, shift, scale))
        image = image + mixed
        image = image + ff_gate * FeedForward(name="ff")(modulated_norm(image, ff_shift, ff_scale))
        if not self.last:
            text = text + t_gate * text_mixed
            text = text + t_ff_gate * FeedForward(name="ff_context")(modulated_norm(text, t_ff_shift, t_ff_scale))
        return (image, text), None


class SD3Transformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, latents, text, sigma):
        """The velocity [B, h, w, C] of latents [B, h, w, C] at noise level sigma.

        text: see `Text`; sigma [B] in [0, 1], a thousandth of diffusers' timestep. ValueError for latents that are no
        whole patches or have more of them than there are positions.
        """
        c, (B, h, w, _), size = self.config, latents.shape, (self.config.patch_size,) * 2
        vector = Conditioning(c.width, name="time_text_embed")(sigma, text.pooled)                  # [B, D]
        image = nn.Conv(c.width, size, strides=size, padding="VALID", name="patch_embed")(latents)  # [B, r, c, D]
        table = self.param("pos_embed", lambda _: positions(c))
        grid = image.shape[1:3]
        image = image.reshape(B, -1, c.width) + cropped(table, (h, w), c).astype(image.dtype)       # [B, N, D]
        real, streams = None, (image, Dense(c.width, True, name="context_embedder")(text.context))
        if text.real is not None:
            real = jnp.concatenate([jnp.ones(image.shape[:2], bool), text.real], axis=1)            # [B, N+X]

        for first, count, (dual, last) in c.runs:
            streams, _ = stack(c, count)(c, dual, last, name=f"blocks_{first}")(streams, vector, real)

        scale, shift = Modulation(2, name="norm_out")(vector)         # in this order, unlike in the blocks
        image = modulated_norm(streams[0], shift, scale)                                            # [B, N, D]
        zeros, out = nn.initializers.zeros, size[0] * size[1] * c.in_channels
        image = Dense(out, True, kernel_init=zeros, name="proj_out")(image)                         # [B, N, 2 2 C]
        patches = image.reshape(B, *grid, *size, c.in_channels)                                     # [B, r, c, 2, 2, C]
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(latents.shape)


def stack(config, length):
    """`length` blocks in a scan."""
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block     # inside a scan there is no CSE to prevent
    return nn.scan(block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                   length=length)


# ------------------------------------------------------------------ positions

def positions(config, sample_size=None):
    """What a new model's table [1, side^2, D] holds: sinusoids of the column in the first half of the channels and of
    the row in the second. A published one is read, for its file holds it rounded.

    sample_size: side in latents of the pictures it is meant for; neighbouring patches are 1 apart there.
    """
    side, quarter = config.pos_embed_max_size, config.width // 4
    base = (sample_size or config.pos_embed_max_size * config.patch_size) / config.patch_size
    place = jnp.arange(side) * (base / side)                                                        # [side]
    angle = place[:, None] * 10000.0 ** (-jnp.arange(quarter) / quarter)                            # [side, D/4]
    of_place = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)                            # [side, D/2]
    column, row = (jnp.broadcast_to(x, (side, side, 2 * quarter)) for x in (of_place[None], of_place[:, None]))
    return jnp.concatenate([column, row], axis=2).reshape(1, side * side, -1)


def cropped(table, size, config):
    """The middle of the table of positions, for latents of this size: [1, side^2, D] -> [1, N, D]."""
    side, patch = config.pos_embed_max_size, config.patch_size
    rows, cols = (n // patch for n in size)
    if size[0] % patch or size[1] % patch or max(rows, cols) > side or min(rows, cols) < 1:
        raise ValueError(f"latents of {size[0]} x {size[1]}: each side must be a multiple of {patch} and at most "
                         f"{patch * side}, what there are positions for")
    top, left = (side - rows) // 2, (side - cols) // 2
    return table.reshape(1, side, side, -1)[:, top:top + rows, left:left + cols].reshape(1, rows * cols, -1)


# ------------------------------------------------------------------ the flow

def shifted(levels, shift):
    """Noise levels moved towards noise: shift s / (1 + (shift - 1) s)."""
    return shift * levels / (1 + (shift - 1) * levels)


def sigmas(steps, shift=3.0, trained=1000):
    """Noise levels float32 [steps + 1], falling from 1 to 0, as diffusers' scheduler has them.

    Its grid is even between 1 and the lowest level that the model was trained on, 1 / `trained` shifted, and is then
    shifted once more: so the last level above 0 is the same whatever the number of steps.
    """
    even = np.linspace(1, shifted(1 / trained, shift), steps)
    return np.append(shifted(even, shift), 0).astype(np.float32)


def guided_velocity(velocity, text, negative=None, guidance=1.0, negative_gradient=True):
    """(latents [S, h, w, C], sigma [] or [S]) -> the guided velocity [S, h, w, C] float32, n + guidance (p - n).

    velocity: (latents, Text, sigma [B]) -> [B, h, w, C], usually a bound SD3Transformer.apply, which runs in the dtype
    of the text. negative: Text that guidance leads away from, batch 1 or S, with as many vectors. Both are read in one
    batch, [negative, positive]; a guidance of 1 reads no negative one. negative_gradient: whether n is differentiated.
    """
    rows, dtype = len(text.context), text.context.dtype
    if guidance != 1:
        if negative is None:
            raise ValueError("guidance other than 1 needs `negative`: the text that it leads away from")
        text = Text(*(None if p is None else jnp.concatenate([jnp.broadcast_to(n, p.shape).astype(p.dtype), p])
                      for n, p in zip(negative, text)))                                             # [2S, ..]

    def run(latents, sigma):
        sigma = jnp.broadcast_to(sigma, rows)
        if guidance == 1:
            return velocity(latents.astype(dtype), text, sigma).astype(jnp.float32)
        twice = jnp.concatenate([latents, latents]).astype(dtype)                                   # [2S, h, w, C]
        v = velocity(twice, text, jnp.concatenate([sigma, sigma])).astype(jnp.float32)
        n, p = v[:rows] if negative_gradient else jax.lax.stop_gradient(v[:rows]), v[rows:]
        return n + guidance * (p - n)
    return run


def sample(run, noise, levels):
    """Euler steps along run (of `guided_velocity`) from noise [S, h, w, C] through levels [N + 1]: latents float32."""
    def step(latents, level):
        sigma, after = level
        return latents + (after - sigma) * run(latents, sigma), None
    levels = jnp.asarray(levels)
    return jax.lax.scan(step, noise.astype(jnp.float32), (levels[:-1], levels[1:]))[0]


# ------------------------------------------------------------------ parameters

# The width is divided over fsdp; heads and channels of the feed-forward parts over tensor. What is read once, or for
# each block but only of one vector, is divided by its columns over all devices.
PARTITION = (
    (r"(to_[qkv]|add_[qkv]_proj)/kernel$", ("width", "heads")),
    (r"(to_out_0|to_add_out)/kernel$", ("heads", "width")),
    (r"up/kernel$", ("width", "channels")),
    (r"down/kernel$", ("channels", "width")),
    (r"(linear(_[12])?|context_embedder|proj_out)/kernel$", (None, "any")),
    (r"patch_embed/kernel$", ("any",)),
    (r"(bias|scale|pos_embed)$", (None,)),
)

RULES = (
    (r"^blocks_(\d+)/", r"transformer_blocks.{layer+\1}."),
    (r"^pos_embed$", "pos_embed.pos_embed"),
    (r"^patch_embed", "pos_embed.proj"),
    (r"to_out_0", "to_out.0"),
    (r"ff(_context)?/up", r"ff\1.net.0.proj"),
    (r"ff(_context)?/down", r"ff\1.net.2"),
)


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    c = config
    return SD3Transformer(c).init(
        key, jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels)), Text(
            jnp.zeros((1, 1, c.joint_attention_dim)), jnp.zeros((1, c.pooled_projection_dim))), jnp.ones(1))["params"]


def from_torch(tensors, config):
    """diffusers' state dict (name -> array) -> params, numpy. ValueError names missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES)
