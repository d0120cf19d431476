"""MAGVIT-v2, the picture tokenizer of Show-o (Yu et al. 2023; Show-o's own training of it): pixels <-> codes.

    pixels -> encoder -> 1x1 conv -> the sign of each channel -> codes
    codes -> -1 or 1 a channel -> 1x1 conv -> decoder -> pixels

There is no codebook to look up: a channel is a bit, 1 where it is above zero, and the first channel is the most
significant one. One code stands for a square of `downscale` x `downscale` pixels. Encoder and decoder are built of the
blocks of FLUX's autoencoder (vae.py), with so many of them at a level as a table says, and attention in the middle
only. Letters as in layers.py; a grid is (rows, cols) and N = rows * cols, row-major.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax.models import torch_keys, vae
from gvu_jax.models.vq import Pointwise


@dataclasses.dataclass(frozen=True)
class Config:
    """Levels count from pixels down, in the encoder and in the decoder. The defaults are the published sizes."""
    bits: int = 13
    encoder_channels: int = 128
    encoder_multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_channels: int = 128
    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    norm_num_groups: int = 32

    projection = Pointwise                 # what the blocks of vae.py ask for

    def __post_init__(self):
        levels = {len(x) for x in (self.encoder_multipliers, self.encoder_blocks,
                                   self.decoder_multipliers, self.decoder_blocks)}
        if len(levels) > 1 or not self.encoder_blocks:
            raise ValueError(f"encoder and decoder of the image tokenizer need as many levels, each with channels and "
                             f"blocks, not {sorted(levels)}")
        if not 0 < self.bits < 31:
            raise ValueError(f"codes have 1 to 30 bits, not {self.bits}")

    @property
    def codebook_size(self):
        return 2 ** self.bits

    @property
    def downscale(self):
        """Pixels per code, along each side."""
        return 2 ** (len(self.encoder_blocks) - 1)


class Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                         # [B, H, W, 3] in [-1, 1] -> [B, rows, cols, bits]
        c, last = self.config, len(self.config.encoder_blocks) - 1
        x = nn.Conv(c.encoder_channels, (3, 3), name="conv_in")(x)
        for i, (multiplier, blocks) in enumerate(zip(c.encoder_multipliers, c.encoder_blocks)):
            x = vae.Level(c, c.encoder_channels * multiplier, blocks, "downsamplers" if i < last else "", False,
                          name=f"down_{i}")(x)
        x = vae.MidBlock(c, name="mid")(x)
        x = nn.silu(vae.GroupNorm(c.norm_num_groups, name="norm_out")(x))
        return nn.Conv(c.bits, (1, 1), name="quant_conv")(nn.Conv(c.bits, (3, 3), name="conv_out")(x))


class Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                      # [B, rows, cols, bits] -> [B, H, W, 3] about [-1, 1]
        c = self.config
        x = nn.Conv(c.bits, (1, 1), name="post_quant_conv")(x)
        x = nn.Conv(c.decoder_channels * c.decoder_multipliers[-1], (3, 3), name="conv_in")(x)
        x = vae.MidBlock(c, name="mid")(x)
        for i in reversed(range(len(c.decoder_blocks))):
            x = vae.Level(c, c.decoder_channels * c.decoder_multipliers[i], c.decoder_blocks[i],
                          "upsamplers" if i else "", False, name=f"up_{i}")(x)
        x = nn.silu(vae.GroupNorm(c.norm_num_groups, name="norm_out")(x))
        return nn.Conv(3, (3, 3), name="conv_out")(x)


class Magvit(nn.Module):
    config: Config

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, N], raw pixels [B, H, W, 3]: there and back."""
        latents = self.latents(pixels)
        codes = quantise(latents)
        return codes, self.decode(codes, latents.shape[1:3])

    def latents(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of the downscale -> [B, rows, cols, bits]: signs count."""
        if pixels.shape[1] % self.config.downscale or pixels.shape[2] % self.config.downscale:
            raise ValueError(f"picture of {pixels.shape[1:3]} pixels: sides must be multiples of "
                             f"{self.config.downscale}")
        return self.encoder((pixels * 2 - 1).astype(self._dtype("encoder")))

    def encode(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, N]."""
        return quantise(self.latents(pixels))

    def decode(self, codes, grid):
        """codes int [B, N], grid (rows, cols) -> raw pixels [B, H, W, 3], about [-1, 1] and not clipped."""
        signs = vectors(codes, self.config.bits).reshape(len(codes), *grid, -1)                 # [B, rows, cols, bits]
        return self.decoder(signs.astype(self._dtype("decoder")))

    def _dtype(self, part):
        """That of the parameters of a part: what it computes in."""
        return jnp.float32 if self.is_initializing() else self.get_variable("params", part)["conv_in"]["kernel"].dtype


def quantise(latents):
    """[B, rows, cols, bits] -> codes int32 [B, N]: a bit is 1 above zero, the first channel is the highest bit."""
    powers = 2 ** jnp.arange(latents.shape[-1] - 1, -1, -1)
    return jnp.sum((latents > 0) * powers, axis=-1, dtype=jnp.int32).reshape(len(latents), -1)


def vectors(codes, bits):
    """codes int [..] -> [.., bits] of -1 and 1, float32."""
    return jnp.float32(2) * (codes[..., None] >> jnp.arange(bits - 1, -1, -1) & 1) - 1


# ------------------------------------------------------------------ parameters

PARTITION = ((r"kernel$", ("any",)), (r"(bias|scale)$", (None,)))          # as in flux.py

# Names of the tensors in the published checkpoint.
RULES = (
    (r"(down|up)_(\d+)/", r"\1.\2/"),
    (r"mid/resnets_0", "mid/block_1"), (r"mid/attentions_0", "mid/attn_1"), (r"mid/resnets_1", "mid/block_2"),
    (r"resnets_(\d+)", r"block.\1"),
    (r"(down|up)samplers_0", r"\1sample"),
    (r"group_norm", "norm"), (r"conv_shortcut", "nin_shortcut"),
    (r"to_out_0", "proj_out"), (r"to_([qkv])/", r"\1/"),
)
UNUSED = ("quantize.embedding", "quantize.power_vals")                     # they follow from the number of bits


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return Magvit(config).init(key, jnp.zeros((1, config.downscale, config.downscale, 3)))["params"]


def from_torch(tensors, config):
    """The tokenizer's tensors (name -> array) -> params, numpy. ValueError names missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES, UNUSED)
