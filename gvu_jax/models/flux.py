"""The FLUX.1 transformer as X-Omni's image decoder: a rectified flow from noise to packed VAE latents.

    dx/d sigma = v(x, sigma | SigLIP-VQ latents, prompt),   sigma from 1 (noise) to 0 (picture)

The layout is diffusers' `FluxTransformer2DModel`: double blocks hold text and image tokens in two streams that attend
jointly, single blocks run over the joined stream. X-Omni adds one linear map of the tokenizer's latents to the image
tokens, between the two kinds of block. An image token is a 2x2 patch of VAE latents, N = rows * cols of them.
Everything is computed in the common dtype of inputs and parameters; norm statistics, softmax, rotary angles and the
sinusoids of sigma are float32. Letters as in layers.py; X is the number of text vectors.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import torch_keys
from gvu_jax.models.layers import AXES, RMSNorm, spread
from gvu_jax.models.splash import full_attention

ROPE_THETA = 10000
SINUSOIDS = 256     # width of the sinusoidal embedding of sigma and of the guidance


@dataclasses.dataclass(frozen=True)
class Config:
    in_channels: int             # of a packed image token: 4 x the VAE's latent channels
    num_layers: int              # double blocks
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int     # width of the text vectors (T5)
    pooled_projection_dim: int   # width of the pooled text vector (CLIP)
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]     # rotary channels of a head for (text, row, column); their sum is the head width
    siglip_channels: int         # 0: plain FLUX
    remat: bool = False          # recompute each block in the backward pass

    @property
    def width(self):
        return self.attention_head_dim * self.num_attention_heads


# ------------------------------------------------------------------ positions and conditioning

def rotary_table(text_tokens, grid, axes_dims):
    """cos, sin float32 [T, E/2] for text tokens at (0, 0, 0) followed by image tokens at (0, row, col), row-major."""
    rows, cols = np.indices(grid).reshape(2, -1)                                                    # [N], [N]
    image_ids = np.stack([np.zeros_like(rows), rows, cols], axis=-1)                                # [N, 3]
    ids = np.concatenate([np.zeros((text_tokens, 3)), image_ids])                                   # [T, 3]
    angles = [ids[:, [axis]] * ROPE_THETA ** (-np.arange(0, dim, 2) / dim) for axis, dim in enumerate(axes_dims)]
    angle = np.concatenate(angles, axis=-1)                                                         # [T, E/2]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x, table):
    """Rotates neighbouring channel pairs (not the halves of `layers.rotary`). x [B, T, H, E] -> [B, T, H, E]."""
    cos, sin = (t[None, :, None, :] for t in table)                                                 # [1, T, 1, E/2]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)                                     # [B, T, H, E/2, 2]
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def sinusoids(t):
    """float [B] -> float32 [B, SINUSOIDS]: cosines, then sines, of 1000 t at geometric frequencies."""
    frequency = jnp.exp(-np.log(10000) * jnp.arange(SINUSOIDS // 2, dtype=jnp.float32) / (SINUSOIDS // 2))
    angle = 1000 * t.astype(jnp.float32)[:, None] * frequency                                       # [B, SINUSOIDS/2]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Embedder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):                                                                     # [B, in] -> [B, D]
        return nn.Dense(self.width, name="linear_2")(nn.silu(nn.Dense(self.width, name="linear_1")(x)))


class Conditioning(nn.Module):
    """One vector per picture from sigma, the distilled guidance and the pooled text."""
    config: Config

    @nn.compact
    def __call__(self, sigma, guidance, pooled):                                        # [B], [B], [B, P] -> [B, D]
        width = self.config.width
        vector = Embedder(width, name="timestep_embedder")(sinusoids(sigma).astype(pooled.dtype))
        if self.config.guidance_embeds:
            vector = vector + Embedder(width, name="guidance_embedder")(sinusoids(guidance).astype(pooled.dtype))
        return vector + Embedder(width, name="text_embedder")(pooled)


class Modulation(nn.Module):
    """The conditioning vector [B, D] -> `parts` vectors [B, 1, D] that shift, scale or gate a stream.

    Zero at first (Peebles & Xie 2023): a new block changes nothing, which is what makes a new model trainable.
    """
    parts: int

    @nn.compact
    def __call__(self, vector):
        zeros = nn.initializers.zeros
        out = nn.Dense(self.parts * vector.shape[-1], kernel_init=zeros, name="linear")(nn.silu(vector))[:, None, :]
        return jnp.split(out, self.parts, axis=-1)


def modulated_norm(x, shift, scale):
    """Layer norm without own parameters, then the conditioning's. x [B, T, D], shift and scale [B, 1, D]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return x32.astype(x.dtype) * (1 + scale) + shift


# ------------------------------------------------------------------ blocks

def queries_keys_values(config, x, q, k, v, norm_q, norm_k):
    """q, k, v [B, T, H, E] of a stream x [B, T, D]; q and k normed per head. Strings name the parameters."""
    def heads(name):
        return nn.Dense(config.width, name=name)(x).reshape(*x.shape[:2], config.num_attention_heads, -1)
    return RMSNorm(1e-6, name=norm_q)(heads(q)), RMSNorm(1e-6, name=norm_k)(heads(k)), heads(v)


def attend(q, k, v, table):
    """Rotary attention over the joined stream, heads merged. [B, T, H, E] each -> [B, T, D]."""
    return full_attention(rotate(q, table), rotate(k, table), v).reshape(*q.shape[:2], -1)


class JointAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, image, text, table):                              # [B, N, D], [B, X, D] -> the same shapes
        c, X = self.config, text.shape[1]
        of_image = queries_keys_values(c, image, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        of_text = queries_keys_values(c, text, "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        joined = [jnp.concatenate([t, i], axis=1) for t, i in zip(of_text, of_image)]               # [B, X+N, H, E]
        mixed = attend(*joined, table)                                                              # [B, X+N, D]
        return nn.Dense(c.width, name="to_out_0")(mixed[:, X:]), nn.Dense(c.width, name="to_add_out")(mixed[:, :X])


class SelfAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, table):                                                                   # [B, T, D]
        return attend(*queries_keys_values(self.config, x, "to_q", "to_k", "to_v", "norm_q", "norm_k"), table)


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):                                                                          # [B, T, D]
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(x), approximate=True)                 # [B, T, 4D]
        return nn.Dense(x.shape[-1], name="down")(hidden)


class DoubleBlock(nn.Module):
    """Image [B, N, D] and text [B, X, D] streams: own weights, one joint attention. The None is for nn.scan."""
    config: Config

    @nn.compact
    def __call__(self, streams, vector, table):
        image, text = (spread(x, over=AXES) for x in streams)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = Modulation(6, name="norm1")(vector)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = Modulation(6, name="norm1_context")(vector)
        image_mixed, text_mixed = JointAttention(self.config, name="attn")(
            modulated_norm(image, shift, scale), modulated_norm(text, t_shift, t_scale), table)
        image = image + gate * image_mixed
        image = image + ff_gate * FeedForward(name="ff")(modulated_norm(image, ff_shift, ff_scale))
        text = text + t_gate * text_mixed
        text = text + t_ff_gate * FeedForward(name="ff_context")(modulated_norm(text, t_ff_shift, t_ff_scale))
        return (image, text), None


class SingleBlock(nn.Module):
    """The joined stream [B, X+N, D]: attention and feed-forward side by side, one projection for both."""
    config: Config

    @nn.compact
    def __call__(self, x, vector, table):
        x = spread(x, over=AXES)
        shift, scale, gate = Modulation(3, name="norm")(vector)
        normed = modulated_norm(x, shift, scale)
        hidden = nn.gelu(nn.Dense(4 * self.config.width, name="proj_mlp")(normed), approximate=True)    # [B, T, 4D]
        mixed = SelfAttention(self.config, name="attn")(normed, table)                                  # [B, T, D]
        out = nn.Dense(self.config.width, name="proj_out")(jnp.concatenate([mixed, hidden], axis=-1))
        return x + gate * out, None


class FluxTransformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, latents, siglip, context, pooled, sigma, guidance, grid):
        """The velocity [B, N, C] of packed latents [B, N, C] at noise level sigma.

        siglip [B, N, S] the tokenizer's latents, or None to leave the term out; context [B, X, joint_attention_dim]
        text vectors, all of them attended to; pooled [B, pooled_projection_dim]; sigma [B] in [0, 1]; guidance [B],
        read only if the config has guidance_embeds; grid (rows, cols) with rows * cols = N.
        """
        c, X = self.config, context.shape[1]
        table = rotary_table(X, grid, c.axes_dims_rope)
        vector = Conditioning(c, name="time_text_embed")(sigma, guidance, pooled)                   # [B, D]
        image = nn.Dense(c.width, name="x_embedder")(latents)                                       # [B, N, D]
        text = nn.Dense(c.width, name="context_embedder")(context)                                  # [B, X, D]

        (image, text), _ = self.stack(DoubleBlock, c.num_layers)(c, name="transformer_blocks")(
            (image, text), vector, table)
        if siglip is not None:
            image = image + nn.Dense(c.width, use_bias=False, name="siglip_embed")(siglip)
        joined = jnp.concatenate([text, image], axis=1)                                             # [B, X+N, D]
        joined, _ = self.stack(SingleBlock, c.num_single_layers)(c, name="single_transformer_blocks")(
            joined, vector, table)

        scale, shift = Modulation(2, name="norm_out")(vector)         # in this order, unlike in the blocks
        image = modulated_norm(joined[:, X:], shift, scale)                                         # [B, N, D]
        return nn.Dense(c.in_channels, kernel_init=nn.initializers.zeros, name="proj_out")(image)

    def stack(self, block, length):
        if self.config.remat:
            block = nn.remat(block, prevent_cse=False)                # inside a scan there is no CSE to prevent
        return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                       length=length)


# ------------------------------------------------------------------ latents and the flow

def pack(latents):
    """VAE latents [B, 2 rows, 2 cols, C] -> image tokens [B, N, 4C], each in the order channel, row, column."""
    B, height, width, C = latents.shape
    patches = latents.reshape(B, height // 2, 2, width // 2, 2, C)                                  # [B, r, 2, c, 2, C]
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, 4 * C)


def unpack(tokens, grid):
    """The inverse of `pack`: [B, N, 4C] with grid (rows, cols) -> [B, 2 rows, 2 cols, C]."""
    (B, _, channels), (rows, cols) = tokens.shape, grid
    patches = tokens.reshape(B, rows, cols, channels // 4, 2, 2)                                    # [B, r, c, C, 2, 2]
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(B, 2 * rows, 2 * cols, channels // 4)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """More image tokens need more time at high noise: the shift is linear in their number (Esser et al. 2024)."""
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15


def sigmas(steps, tokens, schedule=Schedule()):
    """Noise levels float32 [steps + 1], falling from 1 to 0, for pictures of `tokens` image tokens."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_tokens - schedule.base_tokens)
    mu = schedule.base_shift + slope * (tokens - schedule.base_tokens)
    even = np.linspace(1, 1 / steps, steps)
    shifted = np.exp(mu) / (np.exp(mu) + 1 / even - 1)
    return np.append(shifted, 0).astype(np.float32)


def sample(velocity, noise, siglip, context, pooled, steps, guidance_scale=1.0, negative=None, schedule=Schedule()):
    """Euler steps from noise to a picture's packed latents, float32 [B, N, C].

    velocity: (latents, siglip, context, pooled, sigma, guidance) -> [B, N, C], usually a bound FluxTransformer.apply.
    noise [B, N, C] standard normal; siglip [B, N, S] or None; context [B, X, .], pooled [B, .]. The model runs in the
    dtype of `context`, the latents are kept in float32. steps and guidance_scale are Python numbers.
    With guidance_scale s != 1, each step evaluates one batch of 2B, [conditional c, negative n], and moves along
    n + s (c - n); `negative` is (context, pooled) of the empty prompt, batch 1 or B, and its siglip is zero.
    """
    guided = guidance_scale != 1
    if guided:
        if negative is None:
            raise ValueError("guidance_scale != 1 needs `negative`: the context and pooled vector of the empty prompt")
        context, pooled = (jnp.concatenate([positive, jnp.broadcast_to(other, positive.shape).astype(positive.dtype)])
                           for positive, other in zip((context, pooled), negative))                 # [2B, ...]
        siglip = None if siglip is None else jnp.concatenate([siglip, jnp.zeros_like(siglip)])      # [2B, N, S]
    batch, dtype = len(context), context.dtype
    siglip = None if siglip is None else siglip.astype(dtype)

    def step(latents, levels):
        sigma, next_sigma = levels
        inputs = jnp.concatenate([latents, latents]) if guided else latents                         # [2B or B, N, C]
        # The distilled guidance is held at 1: the guidance that counts is the explicit one.
        v = velocity(inputs.astype(dtype), siglip, context, pooled, jnp.full(batch, sigma), jnp.ones(batch))
        v = v.astype(jnp.float32)
        if guided:
            conditional, unconditional = jnp.split(v, 2)
            v = unconditional + guidance_scale * (conditional - unconditional)
        return latents + (next_sigma - sigma) * v, None

    levels = sigmas(steps, noise.shape[1], schedule)
    return jax.lax.scan(step, noise.astype(jnp.float32), (levels[:-1], levels[1:]))[0]


# ------------------------------------------------------------------ parameters

# No product is computed in parts: every matrix is divided by its columns over all devices that share a model.
PARTITION = ((r"kernel$", ("any",)), (r"(bias|scale)$", (None,)))

RULES = (
    (r"^((single_)?transformer_blocks)/", r"\1.{layer}."),
    (r"to_out_0", "to_out.0"),
    (r"ff(_context)?/up", r"ff\1.net.0.proj"),
    (r"ff(_context)?/down", r"ff\1.net.2"),
)


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    c = config
    siglip = jnp.zeros((1, 1, c.siglip_channels)) if c.siglip_channels else None
    return FluxTransformer(c).init(
        key, jnp.zeros((1, 1, c.in_channels)), siglip, jnp.zeros((1, 1, c.joint_attention_dim)),
        jnp.zeros((1, c.pooled_projection_dim)), jnp.ones(1), jnp.ones(1), (1, 1))["params"]


def from_torch(tensors, config):
    """diffusers' state dict (name -> array) -> params, numpy. ValueError names missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES)
