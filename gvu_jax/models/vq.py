"""VQ-16, the picture tokenizer that Janus-Pro draws with (of LlamaGen, Sun et al. 2024): pixels <-> codes.

    pixels -> encoder -> 1x1 conv -> nearest codebook row -> codes
    codes -> codebook rows -> 1x1 conv -> decoder -> pixels

One code stands for a square of `downscale` x `downscale` pixels. Encoder and decoder are those of FLUX's autoencoder
(vae.py), with attention in the deepest level besides. The rows of the codebook, and the vectors compared with them, are
brought to length 1 on both ways. Everything is computed in the common dtype of inputs and parameters; norm statistics,
softmax and the choice of the code are float32. Letters as in layers.py; a grid is (rows, cols) and N = rows * cols,
row-major.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax.models import torch_keys, vae
from gvu_jax.models.siglip_vq import cosines, unit


class Pointwise(nn.Module):
    """`x @ kernel + bias`, the kernel kept as the convolution of 1 x 1 that it is in the checkpoint."""
    features: int

    @nn.compact
    def __call__(self, x):                                                            # [..., in] -> [..., features]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, x.shape[-1], self.features))
        return x @ kernel[0, 0] + self.param("bias", nn.initializers.zeros, (self.features,))


@dataclasses.dataclass(frozen=True)
class Config:
    codebook_size: int
    codebook_dim: int
    z_channels: int = 256                              # these five are what VQ-16 means: the published config has none
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)     # of the channels, one per level, from pixels down
    res_blocks: int = 2                                # per level of the encoder; the decoder has one more
    norm_num_groups: int = 32

    # What vae.Encoder and vae.Decoder ask for.
    projection = Pointwise
    attends = True

    @property
    def block_out_channels(self):
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def layers_per_block(self):
        return self.res_blocks

    @property
    def stem_channels(self):
        return self.channels

    @property
    def moment_channels(self):
        return self.z_channels

    @property
    def downscale(self):
        """Pixels per code, along each side."""
        return 2 ** (len(self.multipliers) - 1)


class VQ(nn.Module):
    config: Config

    def setup(self):
        c = self.config
        self.encoder = vae.Encoder(c)
        self.decoder = vae.Decoder(c)
        self.quant_conv = nn.Conv(c.codebook_dim, (1, 1))
        self.post_quant_conv = nn.Conv(c.z_channels, (1, 1))
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (c.codebook_size, c.codebook_dim))

    def __call__(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, N], raw pixels [B, H, W, 3]: there and back."""
        projected = self.project(pixels)
        codes = self.quantise(projected)
        return codes, self.decode(codes, projected.shape[1:3])

    def project(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of the downscale -> [B, rows, cols, codebook_dim], before
        normalisation and quantisation."""
        if pixels.shape[1] % self.config.downscale or pixels.shape[2] % self.config.downscale:
            raise ValueError(f"picture of {pixels.shape[1:3]} pixels: sides must be multiples of "
                             f"{self.config.downscale}")
        return self.quant_conv(self.encoder((pixels * 2 - 1).astype(self.codebook.dtype)))

    def quantise(self, projected):
        """[B, rows, cols, codebook_dim] -> codes int32 [B, N]: the nearest row, the first one on ties."""
        return jnp.argmax(cosines(projected, self.codebook), axis=-1).astype(jnp.int32).reshape(len(projected), -1)

    def encode(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> codes int32 [B, N]."""
        return self.quantise(self.project(pixels))

    def vectors(self, codes, grid):
        """codes int [B, N], grid (rows, cols) -> rows of the codebook, of length 1, [B, rows, cols, codebook_dim]."""
        rows = jnp.take(self.codebook, codes, axis=0, mode="clip").astype(jnp.float32)              # [B, N, C]
        return unit(rows).astype(self.codebook.dtype).reshape(len(codes), *grid, -1)

    def decode(self, codes, grid):
        """codes int [B, N], grid (rows, cols) -> raw pixels [B, H, W, 3], about [-1, 1] and not clipped."""
        return self.decoder(self.post_quant_conv(self.vectors(codes, grid)))


def to_pixels(raw):
    """Raw decoder output, about [-1, 1] -> pixels in [0, 1] on the grid of 8 bits: cut, not rounded, as published."""
    return jnp.floor(jnp.clip((raw.astype(jnp.float32) + 1) / 2 * 255, 0, 255)) / 255


# ------------------------------------------------------------------ parameters

PARTITION = ((r"kernel$", ("any",)), (r"(bias|scale|codebook)$", (None,)))          # as in flux.py

_BLOCKS = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"attentions_(\d+)/group_norm", r"attentions_\1/norm"),
    (r"to_out_0", "proj_out"),
    (r"to_([qkv])/", r"\1/"),
    (r"(down|up)samplers_0", r"\1sample"),
    (r"^codebook$", "quantize.embedding.weight"),
)

# Names of the tensors in Janus-Pro's checkpoints, as DeepSeek published them and as transformers has them.
KEYS = {"published": r"gen_vision_model\.", "transformers": r"model\.vqmodel\."}
RULES = {
    "published": _BLOCKS + (
        (r"mid_block/resnets_0", "mid.0"), (r"mid_block/attentions_0", "mid.1"), (r"mid_block/resnets_1", "mid.2"),
        (r"(down|up)_blocks_(\d+)", r"conv_blocks.\2"),
        (r"resnets_(\d+)", r"res.\1"), (r"attentions_(\d+)", r"attn.\1"),
        (r"^", "gen_vision_model.")),
    "transformers": _BLOCKS + (
        (r"mid_block/resnets_0", "mid.block_1"), (r"mid_block/attentions_0", "mid.attn_1"),
        (r"mid_block/resnets_1", "mid.block_2"),
        (r"(down|up)_blocks_(\d+)", r"\1.\2"),
        (r"resnets_(\d+)", r"block.\1"), (r"attentions_(\d+)", r"attn.\1"),
        (r"^", "model.vqmodel.")),
}
UNUSED = ("gen_vision_model.quantize.codebook_used",)          # how often each code was met in training


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return VQ(config).init(key, jnp.zeros((1, config.downscale, config.downscale, 3)))["params"]


def from_torch(tensors, config, layout="published"):
    """VQ-16's tensors (name -> array) of a Janus-Pro checkpoint -> params, numpy.

    layout: of RULES. Raises ValueError naming every key that is missing, unknown or misshapen.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES[layout], UNUSED)
