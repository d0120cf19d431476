"""The KL autoencoder of FLUX.1 (diffusers' `AutoencoderKL` without quantisation convolutions), channels last. Its
encoder and decoder serve VQ-16 too (vq.py).

    pixels [B, H, W, 3] -> encoder -> mean, log-variance [B, h, w, C]        h = H / 2^(levels - 1)
    latents [B, h, w, C] -> decoder -> pixels

The diffusion model works on shifted and scaled latents: see `to_latents` and `from_latents`. Everything is
computed in the common dtype of inputs and parameters; norm statistics and softmax are float32.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import torch_keys
from gvu_jax.models.layers import AXES, spread
from gvu_jax.models.splash import full_attention


@dataclasses.dataclass(frozen=True)
class Config:
    latent_channels: int
    block_out_channels: tuple[int, ...]      # one entry per level, from pixels down
    layers_per_block: int        # residual blocks per level of the encoder; the decoder has one more
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float

    # What FLUX's encoder and decoder have otherwise than VQ-16's (vq.py), which are built of the same blocks.
    projection = nn.Dense        # in the attention
    attends = False              # whether attention follows each residual block of the deepest level

    @property
    def downscale(self):
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def stem_channels(self):
        """What the encoder's first convolution gives."""
        return self.block_out_channels[0]

    @property
    def moment_channels(self):
        """What the encoder's last one gives: mean and log-variance."""
        return 2 * self.latent_channels


def read_config(described):
    """The autoencoder's config.json, described.Described -> Config. ValueError where it is of another kind."""
    levels = len(described.a(list, "block_out_channels"))
    described.insist(act_fn="silu", in_channels=3, out_channels=3, latents_mean=None, latents_std=None,
                     mid_block_add_attention=True, down_block_types=["DownEncoderBlock2D"] * levels,
                     up_block_types=["UpDecoderBlock2D"] * levels)
    if described.get("use_quant_conv", True) or described.get("use_post_quant_conv", True):
        raise ValueError(f"{described.path} asks for quantisation convolutions, which are not implemented")
    return described.numbers(Config)


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias, statistics in float32 over the positions of a group of
    channels (Wu & He 2018).

    Each channel's positions are summed first, and few channels then: XLA on a CPU is slow at sums over both at once,
    which would be up to a sixth of what the decoder does.
    """
    groups: int

    @nn.compact
    def __call__(self, x):                                                                          # [B, h, w, D]
        B, _, _, D = x.shape
        scale = self.param("scale", nn.initializers.ones, (D,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (D,)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)

        def mean_of(values):                                                                        # -> [B, 1, 1, D]
            means = jnp.mean(jnp.mean(values, axis=(1, 2)).reshape(B, self.groups, -1), axis=2)
            return jnp.repeat(means, D // self.groups, axis=1)[:, None, None]

        mean = mean_of(x32)
        factor = jax.lax.rsqrt(jnp.maximum(mean_of(x32 * x32) - mean * mean, 0.0) + 1e-6) * scale
        return ((x32 - mean) * factor + bias).astype(x.dtype)


class ResnetBlock(nn.Module):
    config: Config
    features: int

    @nn.compact
    def __call__(self, x):                                                     # [B, h, w, in] -> [B, h, w, features]
        groups, x = self.config.norm_num_groups, spread(x, over=AXES)
        y = nn.silu(GroupNorm(groups, name="norm1")(x))
        y = nn.Conv(self.features, (3, 3), name="conv1")(y)
        y = nn.silu(GroupNorm(groups, name="norm2")(y))
        y = nn.Conv(self.features, (3, 3), name="conv2")(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="conv_shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """Every position reads every other one, with a single head as wide as the channels.

    projection: nn.Dense, or what does the same with a kernel that the checkpoint keeps otherwise.
    """
    config: Config
    projection: Any = nn.Dense

    @nn.compact
    def __call__(self, x):                                                                          # [B, h, w, D]
        B, h, w, D = x.shape
        y = GroupNorm(self.config.norm_num_groups, name="group_norm")(x).reshape(B, h * w, D)
        q, k, v = (self.projection(D, name=name)(y)[:, :, None, :] for name in ("to_q", "to_k", "to_v"))
        y = self.projection(D, name="to_out_0")(full_attention(q, k, v)[:, :, 0, :])                # [B, h*w, D]
        return x + y.reshape(B, h, w, D)


class MidBlock(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                                                          # [B, h, w, D]
        x = ResnetBlock(self.config, x.shape[-1], name="resnets_0")(x)
        x = AttentionBlock(self.config, self.config.projection, name="attentions_0")(x)
        return ResnetBlock(self.config, x.shape[-1], name="resnets_1")(x)


class Downsample(nn.Module):
    @nn.compact
    def __call__(self, x):                                                       # [B, h, w, D] -> [B, h/2, w/2, D]
        # The zero border is below and to the right only: SAME padding of an even side, spelled out.
        return nn.Conv(x.shape[-1], (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), name="conv")(x)


class Upsample(nn.Module):
    @nn.compact
    def __call__(self, x):                                                       # [B, h, w, D] -> [B, 2h, 2w, D]
        return nn.Conv(x.shape[-1], (3, 3), name="conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level `attends`; then the way to the next
    one (`resample`), except at the last level."""
    config: Config
    features: int
    layers: int
    resample: str                                                                # "downsamplers", "upsamplers" or ""
    attends: bool

    @nn.compact
    def __call__(self, x):                                                                          # [B, h, w, in]
        for i in range(self.layers):
            x = ResnetBlock(self.config, self.features, name=f"resnets_{i}")(x)
            if self.attends:
                x = AttentionBlock(self.config, self.config.projection, name=f"attentions_{i}")(x)
        if self.resample:
            x = (Downsample if self.resample == "downsamplers" else Upsample)(name=f"{self.resample}_0")(x)
        return x


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                # [B, H, W, 3] in [-1, 1] -> [B, h, w, moment_channels]
        c = self.config
        x = nn.Conv(c.stem_channels, (3, 3), name="conv_in")(x)
        for i, features in enumerate(c.block_out_channels):
            deepest = i + 1 == len(c.block_out_channels)
            x = Level(c, features, c.layers_per_block, "" if deepest else "downsamplers", c.attends and deepest,
                      name=f"down_blocks_{i}")(x)
        x = MidBlock(c, name="mid_block")(x)
        x = nn.silu(GroupNorm(c.norm_num_groups, name="conv_norm_out")(x))
        return nn.Conv(c.moment_channels, (3, 3), name="conv_out")(x)


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                             # [B, h, w, C] -> [B, H, W, 3] about [-1, 1]
        c = self.config
        x = nn.Conv(c.block_out_channels[-1], (3, 3), name="conv_in")(x)
        x = MidBlock(c, name="mid_block")(x)
        for i, features in enumerate(reversed(c.block_out_channels)):
            resample = "upsamplers" if i + 1 < len(c.block_out_channels) else ""
            x = Level(c, features, c.layers_per_block + 1, resample, c.attends and i == 0, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(c.norm_num_groups, name="conv_norm_out")(x))
        return nn.Conv(3, (3, 3), name="conv_out")(x)


class AutoencoderKL(nn.Module):
    config: Config

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> their reconstruction from the mean, [B, H, W, 3] about [-1, 1]."""
        return self.decode(self.encode(pixels)[0])

    def encode(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of the downscale -> mean, log-variance, each [B, h, w, C]."""
        if pixels.shape[1] % self.config.downscale or pixels.shape[2] % self.config.downscale:
            raise ValueError(f"picture of {pixels.shape[1:3]} pixels: sides must be multiples of "
                             f"{self.config.downscale}")
        mean, log_variance = jnp.split(self.encoder(pixels * 2 - 1), 2, axis=-1)                    # [B, h, w, C]
        return mean, log_variance

    def decode(self, latents):
        """latents [B, h, w, C] (from `from_latents`) -> raw pixels [B, H, W, 3], about [-1, 1] and not clipped."""
        return self.decoder(latents)


def to_latents(mean, config):
    """The autoencoder's latents -> what the diffusion model sees (about unit variance); any shape."""
    return (mean - config.shift_factor) * config.scaling_factor


def from_latents(latents, config):
    """The inverse of `to_latents`."""
    return latents / config.scaling_factor + config.shift_factor


def to_pixels(raw):
    """Raw decoder output, about [-1, 1] -> pixels in [0, 1]; any shape."""
    return jnp.clip(raw / 2 + 0.5, 0, 1)


# ------------------------------------------------------------------ the tiny one

@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """`PatchAutoencoder`: what the shapes world uses, where a convolutional decoder would dominate a laptop's time."""
    latent_channels: int
    patch_size: int              # pixels; a patch becomes 2 x 2 latents, one token of the diffusion model
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @property
    def downscale(self):
        return self.patch_size // 2


class PatchAutoencoder(nn.Module):
    """One linear map from each patch of pixels to its 2 x 2 latents and one back; the calls of `AutoencoderKL`.

    The best such pair is known in closed form: `principal_components`.
    """
    config: PatchConfig

    def setup(self):
        self.encoder = nn.Dense(4 * self.config.latent_channels)
        self.decoder = nn.Dense(3 * self.config.patch_size ** 2)

    def __call__(self, pixels):
        return self.decode(self.encode(pixels)[0])

    def encode(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> mean, log-variance, each [B, h, w, C]; the map is exact, the latter -inf."""
        mean = depth_to_space(self.encoder(space_to_depth(2 * pixels - 1, self.config.patch_size)), 2)
        return mean, jnp.full_like(mean, -jnp.inf)

    def decode(self, latents):
        """latents [B, h, w, C] -> raw pixels [B, H, W, 3], about [-1, 1] and not clipped."""
        return depth_to_space(self.decoder(space_to_depth(latents, 2)), self.config.patch_size)


def space_to_depth(x, size):
    """[B, H, W, C] -> [B, H/size, W/size, size size C]: each square patch becomes one vector."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size, W // size, size * size * C)


def depth_to_space(x, size):
    """The inverse of `space_to_depth`."""
    B, rows, cols, D = x.shape
    x = x.reshape(B, rows, cols, size, size, D // size ** 2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, rows * size, cols * size, D // size ** 2)


def principal_components(pixels, config):
    """Parameters of a `PatchAutoencoder` from pictures [B, H, W, 3] in [0, 1], numpy: the leading principal
    components of their patches. Latents have mean 0 and mean variance 1; a component of spread s gets spread sqrt(s)
    (up to that scale), half-way between pixels as they are, where the first ones are all that a diffusion model
    learns, and whitened ones, where it spends as much on the last."""
    patches = space_to_depth(2 * pixels - 1, config.patch_size).reshape(-1, 3 * config.patch_size ** 2)   # [M, D]
    mean = patches.mean(axis=0)
    variance, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))                        # ascending
    keep = slice(None, -4 * config.latent_channels - 1, -1)
    spread, vectors = np.sqrt(variance[keep]), vectors[:, keep]                                     # [4C], [D, 4C]
    unit = np.sqrt(spread) * np.sqrt(spread.mean())                             # one latent unit, in component units
    encoder = {"kernel": vectors / unit, "bias": -mean @ vectors / unit}
    decoder = {"kernel": (vectors * unit).T, "bias": mean}
    return jax.tree.map(np.float32, {"encoder": encoder, "decoder": decoder})


def module(config):
    """The autoencoder of a config: AutoencoderKL, or the tiny PatchAutoencoder."""
    return PatchAutoencoder(config) if isinstance(config, PatchConfig) else AutoencoderKL(config)


# ------------------------------------------------------------------ parameters

PARTITION = ((r"kernel$", ("any",)), (r"(bias|scale)$", (None,)))          # as in flux.py

RULES = ((r"(blocks|resnets|attentions|samplers|to_out)_(\d+)", r"\1.\2"),)


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    pixels = jnp.zeros((1, 2 * config.downscale, 2 * config.downscale, 3))
    return module(config).init(key, pixels)["params"]


def from_torch(tensors, config):
    """diffusers' state dict (name -> array) -> params, numpy. ValueError names missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES)
