"""CLIP's image tower (Radford et al. 2021): pictures -> one vector a patch, which is what one of Show-o's models reads.

    picture of any size -> resized, its middle cut out -> patches + positions -> norm, pre-norm blocks -> features

The features are what goes into the last block: that one, the norm behind it and the class token are not read. The
blocks are those of CLIP's text tower (text_encoders.py). Everything is computed in the common dtype of inputs and
parameters; norm statistics and softmax are float32. Letters as in layers.py, N = rows * columns of patches.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax import described
from gvu_jax.described import Described
from gvu_jax.models import torch_keys
from gvu_jax.models.siglip import resized
from gvu_jax.models.text_encoders import CLIP_ACTIVATIONS, ClipLayer, layer_norm

# Of red, green and blue in [0, 1], which pictures are normalised by.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of the tower under the names of its config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int                    # of which all but the last one are read
    num_attention_heads: int
    image_size: int                           # pixels of a side
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in CLIP_ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not implemented, only {', '.join(CLIP_ACTIVATIONS)}")
        if self.num_hidden_layers < 2 or self.patch_size < 1 or self.image_size % self.patch_size and not self.cut:
            raise ValueError(f"a tower of {self.num_hidden_layers} layers with patches of {self.patch_size} pixels for "
                             f"pictures of {self.image_size} cannot be read")

    cut = False                               # whether pixels behind the last whole patch are let go

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2


def blocks(tower, x, count):
    """What comes out of the first `count` blocks of a tower (a module with a `config`, which calls this) for normalised
    pictures [B, image_size, image_size, 3]: the class token and the patches, [B, 1 + N, D]."""
    c, patch, D = tower.config, (tower.config.patch_size,) * 2, tower.config.hidden_size
    x = nn.Conv(D, patch, strides=patch, padding="VALID", use_bias=False, name="patch_embedding")(x)    # [B, r, c, D]
    first = tower.param("class_embedding", nn.initializers.normal(0.02), (D,))
    positions = tower.param("position_embedding", nn.initializers.normal(0.02), (c.patches + 1, D))
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, D)), x.reshape(len(x), c.patches, D)], axis=1)
    layers = nn.scan(ClipLayer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                     length=count)
    return layers(c, name="layers")(layer_norm(c, "pre_layrnorm")(x + positions), None)[0]


class VisionTransformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):                                     # [B, image_size, image_size, 3], normalised -> [B, N, D]
        return blocks(self, x, self.config.num_hidden_layers - 1)[:, 1:]

    def features(self, pixels, transform):
        """pixels [B, h, w, 3] in [0, 1], of any size -> [B, N, D]."""
        pixels = (fitted(pixels, transform) - jnp.array(transform.image_mean)) / jnp.array(transform.image_std)
        return self(pixels.astype(self.get_variable("params", "class_embedding").dtype))


# ------------------------------------------------------------------ parameters

PARTITION = ((r"kernel$", ("any",)), (r"(bias|scale|embedding)$", (None,)))            # as in flux.py


def rules(names):
    """How the parameters are called in a checkpoint (see torch_keys) whose keys are `names`, with or without the prefix
    `vision_model`: the tower by itself, or CLIP as a whole."""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    return ((r"^(patch|position)_embedding(/kernel)?$", prefix + r"embeddings.\1_embedding.weight"),
            (r"^class_embedding$", prefix + "embeddings.class_embedding"),
            (r"^pre_layrnorm", prefix + "pre_layrnorm"),
            (r"^layers/", prefix + "encoder.layers.{layer}."))


def unused(names, config):
    """Those of the keys `names` that are not read: the last block, what is behind it, and CLIP's text."""
    last = f"encoder.layers.{config.num_hidden_layers - 1}."
    behind = last, "post_layernorm.", "embeddings.position_ids"
    return [name for name in names if name.startswith(("text_model.", "text_projection.", "visual_projection."))
            or name == "logit_scale" or name.removeprefix("vision_model.").startswith(behind)]


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return VisionTransformer(config).init(key, jnp.zeros((1, config.image_size, config.image_size, 3)))["params"]


def from_torch(tensors, config):
    """transformers' state dict of a CLIPVisionModel or CLIPModel (name -> array) -> params, numpy. ValueError names
    missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, rules(tensors), unused(tensors, config))


# ------------------------------------------------------------------ pictures of any size

@dataclasses.dataclass(frozen=True)
class Transform:
    """How a picture becomes the square that the tower reads: preprocessor_config.json. Sizes in pixels."""
    shortest_edge: int
    crop_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __post_init__(self):
        if not 0 < self.crop_size <= self.shortest_edge:
            raise ValueError(f"a square of {self.crop_size} pixels cannot be cut out of pictures whose shorter side "
                             f"has {self.shortest_edge}")


def fitted(pixels, transform, half=lambda rest: rest // 2):
    """Pictures [B, h, w, 3] float32 in [0, 1] on the grid of 8 bits -> [B, crop_size, crop_size, 3], inside a program
    and bit for bit as PIL does it. half: of what is cut off, how much is before the middle."""
    height, width = covering(pixels.shape[1:3], transform.shortest_edge)
    pixels, side = resized(pixels, (height, width)), transform.crop_size
    top, left = half(height - side), half(width - side)
    return pixels[:, top:top + side, left:left + side]


def covering(size, side):
    """(height, width) of a picture of this (height, width) whose shorter side becomes `side`; the longer is cut down to
    whole pixels."""
    shorter = min(size)
    return tuple(side if length == shorter else int(side * length / shorter) for length in size)


# ------------------------------------------------------------------ what the folder says

def tower_config(told):
    """config.json of CLIP, of the tower alone or of the whole -> Config."""
    if told.get("model_type") == "clip":
        told = told.a(dict, "vision_config")
    told.values = TOWER_DEFAULTS | told.values
    told.insist(model_type="clip_vision_model", num_channels=3)
    return told.numbers(Config)


TOWER_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                      image_size=224, patch_size=32)               # those of transformers, which files leave out


def image_transform(told):
    """preprocessor_config.json of CLIP, or of another tower that is shown the middle of a picture -> Transform."""
    told.insist(do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True, resample=3,
                rescale_factor=1 / 255)
    edge, crop = told["size"], told["crop_size"]
    edge = edge.a(int, "shortest_edge") if isinstance(edge, Described) else edge
    if isinstance(crop, Described):
        crop.insist(width=crop["height"])
        crop = crop["height"]
    values = dict(shortest_edge=edge, crop_size=crop, image_mean=told["image_mean"], image_std=told["image_std"])
    return described.named(told.path, lambda: described.typed(Transform, values))
