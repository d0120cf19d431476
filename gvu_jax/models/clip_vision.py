"""How alike two pictures are to CLIP (Radford et al. 2021; the tower is that of clip.py), for UAE's cold start.

    pixels [B, H, W, 3] in [0, 1] -> `squared`, `normalised` -> ClipVision -> features [B, projection_dim]

Everything is differentiable, so that a drawer can be taught by it; computed in the dtype of the parameters, norm
statistics and softmax in float32.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import clip, torch_keys
from gvu_jax.models.text_encoders import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(clip.Config):
    """The numbers of the checkpoint's vision_config, under its names; files may lack the ones with a default."""
    projection_dim: int


class ClipVision(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        """x [B, S, S, 3] from `normalised`, S = image_size -> [B, projection_dim]: the class token, projected."""
        x = clip.blocks(self, x, self.config.num_hidden_layers)
        return nn.Dense(self.config.projection_dim, use_bias=False, name="visual_projection")(
            layer_norm(self.config, "post_layernorm")(x[:, 0]))


def bicubic(old, new):
    """torch's bicubic weights (Keys 1981, a = -3/4), a matrix [new, old] float32: half-pixel centres, the border
    repeated, and no wider where the picture shrinks."""
    a, centre = -0.75, (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(centre).astype(int), np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(centre - (first + tap))
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def squared(pixels, side):
    """Pictures [B, H, W, 3] -> [B, side, side, 3], whatever their sides' ratio; values may leave their range."""
    rows, cols = (bicubic(n, side) for n in pixels.shape[1:3])
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("rh,bhwc,sw->brsc", rows, pixels, cols)


def normalised(pixels):
    """[..., 3] in [0, 1] -> less CLIP's mean, over its spread."""
    return (pixels - np.float32(clip.MEAN)) / np.float32(clip.STD)


def cosine(one, other):
    """Of features [B, D] -> [B]."""
    return jnp.sum(one * other, axis=-1) / (jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1))


# ------------------------------------------------------------------ parameters

RULES = ((r"^(class_embedding)$", r"vision_model.embeddings.\1"),
         (r"^(position_embedding)$", r"vision_model.embeddings.\1.weight"),
         (r"^patch_embedding", "vision_model.embeddings.patch_embedding"),
         (r"^layers/", "vision_model.encoder.layers.{layer}."),
         (r"^(pre_layrnorm|post_layernorm)", r"vision_model.\1"))


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return ClipVision(config).init(key, jnp.zeros((1, config.image_size, config.image_size, 3)))["params"]


def from_torch(tensors, config):
    """transformers' state dict of a CLIPModel, or of its image tower alone -> params, numpy. ValueError names missing,
    unknown, misshapen keys; of the text tower nothing is read."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    ignored = [name for name in tensors if name.startswith(("text_", "logit_scale")) or name.endswith("position_ids")]
    return torch_keys.to_params(tensors, shapes, RULES, ignored)
