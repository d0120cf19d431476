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

from gvu_jax.models import siglip, torch_keys
from gvu_jax.models.siglip import VisionTransformer, centred


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

    final_norm = False       # the quantiser was trained on a tower without one


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
        return self.vit(centred(pixels, self.config.patch_size).astype(self.codebook.dtype))

    def project(self, pixels):
        """pixels [B, H, W, 3] in [0, 1] -> [B, rows, cols, codebook_dim], before normalisation and quantisation."""
        B, H, W, _ = pixels.shape
        grid = self.features(pixels).reshape(B, H // self.config.patch_size, W // self.config.patch_size, -1)
        return self.quant_conv(grid)

    def quantise(self, projected):
        """[B, rows, cols, codebook_dim] -> tokens int32 [B, N]: the nearest code by cosine, the first one on ties."""
        return jnp.argmax(cosines(projected, self.codebook), axis=-1).astype(jnp.int32).reshape(len(projected), -1)

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


def unit(x):
    """Vectors [.., C] brought to length 1, except those shorter than 1e-12, which are only divided by that."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def cosines(projected, codebook):
    """Of each vector [B, rows, cols, C] with each code [K, C]: float32 [B, rows, cols, K]. Between vectors of length 1
    the squared distance is 2 - 2 cosine, so the largest is also the nearest."""
    vectors, codes = (unit(x.astype(jnp.float32)) for x in (projected, codebook))
    return jnp.einsum("brcd,kd->brck", vectors, codes, precision="highest")


# ------------------------------------------------------------------ parameters

PARTITION = siglip.PARTITION

RULES = siglip.TOWER + (
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
    return np.asarray(siglip.resize(image.convert("RGB"), fitted_size(*image.size, transform)), np.float32) / 255
