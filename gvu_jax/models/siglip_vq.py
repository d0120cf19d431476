"""SigLIP-VQ, the image tokenizer of X-Omni (Geng et al. 2025): pictures -> codes -> latents for the image decoder.

    pixels -> SigLIP ViT -> 1x1 conv -> nearest codebook row (cosine) -> tokens          the understanding side
    tokens -> codebook rows -> 1x1 conv -> 2 residual blocks -> latents                  what FLUX is conditioned on

One token stands for one patch of `patch_size` x `patch_size` pixels, row-major. Everything is computed in the common
dtype of inputs and parameters (cast both to bfloat16 to run in it); norm statistics, softmax and the choice of the
code are float32. Letters as in layers.py; a grid is (rows, cols) and N = rows * cols.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from gvu_jax.models import torch_keys
from gvu_jax.models.layers import AXES, attention, spread


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    layers: int
    heads: int
    mlp_hidden: int
    patch_size: int
    pos_table_side: int      # the learned position table is a square of this side
    codebook_size: int
    codebook_dim: int
    z_channels: int          # channels of the latents
    groups: int = 32         # of the group norms in the residual blocks


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):                                                                          # [B, N, D]
        B, N, D = x.shape
        qkv = nn.Dense(3 * D, name="qkv")(x).reshape(B, N, 3, self.heads, D // self.heads)          # [B, N, 3, H, E]
        mixed = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])                                 # [B, N, H, E]
        return nn.Dense(D, name="proj")(mixed.reshape(B, N, D))


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):                                                                          # [B, N, D]
        hidden = nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False)                   # [B, N, F]
        return nn.Dense(x.shape[-1], name="fc2")(hidden)


class Block(nn.Module):
    """Pre-norm transformer block. The second argument and result are what nn.scan asks for."""
    config: Config

    @nn.compact
    def __call__(self, x, _):                                                                       # [B, N, D]
        x = spread(x, over=AXES)
        x = x + Attention(self.config.heads, name="attn")(nn.LayerNorm(1e-6, name="norm1")(x))
        x = x + Mlp(self.config.mlp_hidden, name="mlp")(nn.LayerNorm(1e-6, name="norm2")(x))
        return x, None


class VisionTransformer(nn.Module):
    """SigLIP's image tower: no class token and no final norm, because the quantiser was trained without one."""
    config: Config

    @nn.compact
    def __call__(self, x):                                             # [B, H, W, 3] in [-1, 1] -> [B, N, D]
        c, patch = self.config, (self.config.patch_size,) * 2
        x = nn.Conv(c.width, patch, strides=patch, padding="VALID", name="patch_embed")(x)          # [B, r, c, D]
        B, rows, cols, D = x.shape
        side = c.pos_table_side
        table = self.param("pos_embed", nn.initializers.normal(0.02), (1, side * side, D))
        if (rows, cols) != (side, side):
            # Half-pixel centres; jax.image.resize would blur when it shrinks the table, torch's interpolate does not.
            table = jax.image.resize(table.reshape(1, side, side, D), (1, rows, cols, D), "bilinear", antialias=False)
        x = x.reshape(B, rows * cols, D) + table.reshape(1, rows * cols, D)                         # [B, N, D]
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
        return blocks(c, name="blocks")(x, None)[0]


class ResidualBlock(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):                                                                          # [B, r, c, Z]
        y = nn.gelu(nn.GroupNorm(self.groups, epsilon=1e-5, name="norm1")(x), approximate=False)
        y = nn.Conv(x.shape[-1], (3, 3), name="conv1")(y)
        y = nn.gelu(nn.GroupNorm(self.groups, epsilon=1e-5, name="norm2")(y), approximate=False)
        return x + nn.Conv(x.shape[-1], (3, 3), name="conv2")(y)


class SiglipVQ(nn.Module):
    config: Config

    def setup(self):
        c = self.config
        self.vit = VisionTransformer(c)
        self.quant_conv = nn.Conv(c.codebook_dim, (1, 1))
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (c.codebook_size, c.codebook_dim))
        self.post_quant_conv = nn.Conv(c.z_channels, (1, 1))
        self.post_conv = [ResidualBlock(c.groups) for _ in range(2)]

    def __call__(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> tokens int32 [B, N], latents [B, rows, cols, Z]: there and back."""
        projected = self.project(pixels)
        tokens = self.quantise(projected)
        return tokens, self.decode(tokens, projected.shape[1:3])

    def features(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of `patch_size` -> [B, N, D], the ViT's output."""
        if pixels.shape[1] % self.config.patch_size or pixels.shape[2] % self.config.patch_size:
            raise ValueError(f"picture of {pixels.shape[1:3]} pixels: sides must be multiples of the patch size "
                             f"{self.config.patch_size}")
        centred = (pixels - 0.5) / 0.5                                      # in float32: bfloat16 is finest at 0
        return self.vit(centred.astype(self.codebook.dtype))

    def project(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> [B, rows, cols, codebook_dim], before normalisation and quantisation."""
        B, H, W, _ = pixels.shape
        grid = self.features(pixels).reshape(B, H // self.config.patch_size, W // self.config.patch_size, -1)
        return self.quant_conv(grid)

    def quantise(self, projected):
        """[B, rows, cols, codebook_dim] -> tokens int32 [B, N]: the nearest code by cosine, the first one on ties."""
        vectors, codes = (_unit(x.astype(jnp.float32)) for x in (projected, self.codebook))
        cosine = jnp.einsum("brcd,kd->brck", vectors, codes, precision="highest")               # [B, rows, cols, K]
        return jnp.argmax(cosine, axis=-1).astype(jnp.int32).reshape(len(projected), -1)

    def encode(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> tokens int32 [B, N]."""
        return self.quantise(self.project(pixels))

    def decode(self, tokens, grid):
        """tokens int [B, N], grid (rows, cols) -> latents [B, rows, cols, Z].

        The codebook rows enter as they are stored: only the search normalises them.
        """
        vectors = jnp.take(self.codebook, tokens, axis=0, mode="clip")                              # [B, N, C]
        return self.decode_rows(vectors.reshape(len(tokens), *grid, -1))

    def decode_rows(self, vectors):
        """vectors [B, rows, cols, codebook_dim] in place of codebook rows -> latents [B, rows, cols, Z]."""
        x = self.post_quant_conv(vectors)
        for block in self.post_conv:
            x = block(x)
        return x


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ------------------------------------------------------------------ parameters

# As in flux.py; of fc1 the rows, because 4304 columns divide badly.
PARTITION = ((r"(?<!fc1)/kernel$", ("any",)), (r"fc1/kernel$", ("any", None)),
             (r"(bias|scale|codebook|pos_embed)$", (None,)))

RULES = (
    (r"^blocks/", "blocks.{layer}."),
    (r"^patch_embed", "patch_embed.proj"),
    (r"^codebook$", "quantize.embedding.weight"),
    (r"^post_conv_(\d)", r"post_conv.\1"),
)


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    pixels = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    return SiglipVQ(config).init(key, pixels)["params"]


def from_torch(vit, projector, config):
    """The state dicts of `siglip_vit.pt` and `vq_projector.pt` (name -> array) -> params, numpy.

    Raises ValueError naming every key that is missing, unknown or misshapen. The ViT file carries a final norm that
    the tokenizer does not use.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    vit_shapes = shapes.pop("vit")
    return {"vit": torch_keys.to_params(vit, vit_shapes, RULES, ignored=("norm.weight", "norm.bias")),
            **torch_keys.to_params(projector, shapes, RULES)}


# ------------------------------------------------------------------ pictures of any size, on the host

@dataclasses.dataclass(frozen=True)
class Transform:
    """How a picture is brought to a size that the tokenizer reads; all sizes in pixels."""
    short_size: int          # smaller pictures are enlarged until their short side has this length
    long_size: int           # then larger ones are shrunk until their long side has this length
    patch_size: int
    min_short_size: int      # pictures with a shorter side are refused
    max_aspect_ratio: float  # and so are pictures with a larger long / short


def fitted_size(width, height, transform):
    """The (height, width) in pixels that a picture of width x height is resized to; ValueError if it is refused."""
    t, short, long = transform, min(width, height), max(width, height)
    if short < t.min_short_size:
        raise ValueError(f"picture of {width}x{height} pixels refused: its short side is below {t.min_short_size}")
    if long / short > t.max_aspect_ratio:
        raise ValueError(f"picture of {width}x{height} pixels refused: long / short exceeds {t.max_aspect_ratio}")
    enlarge = max(1.0, t.short_size / short)
    shrink = min(1.0, t.long_size / (long * enlarge))
    # Sizes stay fractional up to here; Python's round takes exact halves to the even number of patches.
    return tuple(round(side * enlarge * shrink / t.patch_size) * t.patch_size for side in (height, width))


def fit_image(image, transform):
    """A PIL picture of any mode -> float32 [H, W, 3] in [0, 1], H and W from `fitted_size` (whose errors it raises)."""
    height, width = fitted_size(*image.size, transform)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) / 255
