"""SigLIP's image tower (Zhai et al. 2023): pictures -> one vector a patch, which is what Janus-Pro reads.

    picture of any size -> `fit_image`: a square of pixels -> patches + positions -> pre-norm blocks -> features

SigLIP-VQ (siglip_vq.py) has the same tower without the norm behind it. Everything is computed in the common dtype of
inputs and parameters; norm statistics and softmax are float32. Letters as in layers.py, N = rows * columns of patches.
"""
import dataclasses
import functools

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
    layers: int              # those that are kept, where the published config cuts the tower short
    heads: int
    mlp_hidden: int
    patch_size: int
    pos_table_side: int      # the learned position table is a square of this side

    final_norm = True


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
    """Patches and their positions through pre-norm blocks, and a final norm where the config has it; no class token."""
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
        x, _ = blocks(c, name="blocks")(x, None)
        return nn.LayerNorm(1e-6, name="norm")(x) if c.final_norm else x

    def features(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of `patch_size` -> [B, N, D]."""
        dtype = self.get_variable("params", "pos_embed").dtype
        return self(centred(pixels, self.config.patch_size).astype(dtype))


def centred(pixels, patch_size):
    """pixels [B, H, W, 3] in [0, 1] -> [-1, 1], in float32: bfloat16 is finest at 0. ValueError for broken patches."""
    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size:
        raise ValueError(f"picture of {pixels.shape[1:3]} pixels: sides must be multiples of the patch size "
                         f"{patch_size}")
    return (pixels - 0.5) / 0.5


# ------------------------------------------------------------------ parameters

# As in flux.py; of fc1 the rows, because 4304 columns divide badly.
PARTITION = ((r"(?<!fc1)/kernel$", ("any",)), (r"fc1/kernel$", ("any", None)),
             (r"(bias|scale|codebook|pos_embed)$", (None,)))

TOWER = ((r"^blocks/", "blocks.{layer}."), (r"^patch_embed", "patch_embed.proj"))

# Names of the tensors in Janus-Pro's checkpoints, as DeepSeek published them and as transformers has them.
KEYS = {"published": r"vision_model\.", "transformers": r"model\.vision_model\."}
RULES = {
    "published": TOWER + ((r"^", "vision_model.vision_tower."),),
    "transformers": (
        (r"^patch_embed", "embeddings/patch_embedding"),
        (r"^pos_embed$", "embeddings/position_embedding.weight{only}"),
        (r"^blocks/", "encoder/layers.{layer}/"),
        (r"/norm(\d)/", r"/layer_norm\1/"),
        (r"attn/qkv", "self_attn/{q,k,v}_proj"),
        (r"attn/proj", "self_attn/projection_layer"),
        (r"^norm/", "post_layernorm/"),
        (r"^", "model/vision_model/")),
}
UNUSED = "vision_model.vision_tower.attn_pool."            # SigLIP's pooling head, which nothing here reads


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    side = config.pos_table_side * config.patch_size
    return VisionTransformer(config).init(key, jnp.zeros((1, side, side, 3)))["params"]


def from_torch(tensors, config, layout="published"):
    """The tower's tensors (name -> array) of a Janus-Pro checkpoint -> params, numpy.

    layout: of RULES. Raises ValueError naming every key that is missing, unknown or misshapen.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    ignored = [name for name in tensors if name.startswith(UNUSED)]
    return torch_keys.to_params(tensors, shapes, RULES[layout], ignored)


# ------------------------------------------------------------------ pictures of any size, on the host

@dataclasses.dataclass(frozen=True)
class Transform:
    """How a picture becomes the square that the tower reads; sizes in pixels."""
    image_size: int          # the longer side
    min_size: int            # what the shorter one has at least


BACKGROUND = 127             # int(255 * the mean of 0.5), in all three channels


def fitted_size(width, height, transform):
    """The (height, width) in pixels that a picture of width x height is resized to, before it is made a square."""
    longer = max(width, height)
    # In this order and cut, not rounded: 37 / 53 * 80 is 55.8 and becomes 55.
    return tuple(max(int(side / longer * transform.image_size), transform.min_size) for side in (height, width))


def squared(pixels, transform):
    """What `fit_image` makes of pictures [B, h, w, 3] float32 in [0, 1] on the grid of 8 bits, inside a program and bit
    for bit."""
    height, width = fitted_size(*pixels.shape[2:0:-1], transform)
    pixels, side = resized(pixels, (height, width)), max(height, width)
    around = [(0, 0)] + [((side - n) // 2, side - n - (side - n) // 2) for n in (height, width)] + [(0, 0)]
    return jnp.pad(pixels, around, constant_values=BACKGROUND / 255)


def passes(old, new):
    """In which order PIL resizes from old (height, width) to new: axes, 0 the height. A picture is widened or narrowed
    first, unless it loses more than twice as much in height. Between the two it is rounded, so that the order is seen;
    before Pillow 13 it was always the width's turn first."""
    (height, width), (to_height, to_width) = old, new
    return (0, 1) if height - to_height > max(0, 2 * (width - to_width)) else (1, 0)


def resize(image, size):
    """A PIL picture brought to size (height, width), bicubic, in the order of `passes` whatever the version of PIL."""
    for axis in passes((image.height, image.width), size):
        sides = (size[0], image.width) if axis == 0 else (image.height, size[1])
        image = image.resize(sides[::-1], Image.Resampling.BICUBIC)
    return image


def resized(pixels, size):
    """What `resize` makes of pictures [B, h, w, 3] float32 in [0, 1] on the grid of 8 bits, inside a program and bit
    for bit: along one axis and then along the other, in whole numbers. Its derivative is that of the weighted sum,
    straight through the rounding and the limits."""
    for side in passes(pixels.shape[1:3], size):
        axis, to = side + 1, size[side]
        if pixels.shape[axis] != to:
            pixels = jnp.moveaxis(resized_last(jnp.moveaxis(pixels, axis, -1), to), -1, axis)
    return pixels


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def resized_last(pixels, to):
    """The last axis of [.., n] resized to `to`."""
    levels = jnp.round(pixels * 255).astype(jnp.int32)
    levels = (levels @ resizing(pixels.shape[-1], to) + (1 << BITS - 1)) >> BITS
    return jnp.clip(levels, 0, 255).astype(jnp.float32) / 255


@resized_last.defjvp
def _(to, primals, tangents):
    (pixels,), (slope,) = primals, tangents
    weights = (resizing(pixels.shape[-1], to) / (1 << BITS)).astype(np.float32)
    return resized_last(pixels, to), jnp.matmul(slope, weights, precision="highest")


BITS = 22                    # behind the point, of PIL's weights


def resizing(old, new):
    """PIL's bicubic weights (Keys 1981, a = -1/2), a matrix [old, new] int32 of 1 / 2^BITS: each column sums to 1 at
    the borders too, and is widened where the picture shrinks."""
    scale = old / new
    widened, centre = max(scale, 1.0), (np.arange(new) + 0.5) * scale
    place = np.arange(old)[:, None]
    first, end = np.floor(centre - 2 * widened + 0.5), np.floor(centre + 2 * widened + 0.5)
    x = np.abs((place - centre + 0.5) / widened)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((x - 5) * x + 8) * x * -0.5 + 2, 0))
    weights = np.where((place >= first) & (place < end), weights, 0)
    return np.floor(weights / weights.sum(axis=0) * (1 << BITS) + 0.5).astype(np.int32)


def fit_image(image, transform):
    """A PIL picture of any mode -> float32 [S, S, 3] in [0, 1]: resized, and in the middle of a grey square."""
    height, width = fitted_size(*image.size, transform)
    side = max(height, width)
    square = Image.new("RGB", (side, side), (BACKGROUND,) * 3)
    square.paste(resize(image.convert("RGB"), (height, width)), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square, np.float32) / 255
