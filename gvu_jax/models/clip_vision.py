"""How alike two pictures are to CLIP (Radford et al. 2021; its tower is that of clip.py) and SigLIP (Zhai et al. 2023).

    pixels [B, H, W, 3] in [0, 1] -> `squared`, `normalised` -> ClipVision -> features [B, projection_dim]

SigLIP has the same blocks, no class token, and a head that asks all patches one learned question. Everything is
differentiable, so that a drawer can be taught by it (UAE's cold start); computed in the dtype of the parameters, norm
statistics and softmax in float32.
"""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import clip, torch_keys
from gvu_jax.models.layers import attention
from gvu_jax.models.text_encoders import ClipLayer, ClipMlp, layer_norm


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


@dataclasses.dataclass(frozen=True)
class SiglipConfig(clip.Config):
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    cut = True                                # of 384 pixels, 14 a patch, the last 6


class SiglipVision(nn.Module):
    config: SiglipConfig

    @nn.compact
    def __call__(self, x):
        """x [B, S, S, 3] normalised, S = image_size -> [B, D]."""
        c, patch, D = self.config, (self.config.patch_size,) * 2, self.config.hidden_size
        x = nn.Conv(D, patch, strides=patch, padding="VALID", name="patch_embedding")(x).reshape(len(x), c.patches, D)
        x = x + self.param("position_embedding", nn.initializers.normal(0.02), (c.patches, D))
        layers = nn.scan(ClipLayer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.num_hidden_layers)
        x = layer_norm(c, "post_layernorm")(layers(c, name="layers")(x, None)[0])
        return AskedPatches(c, name="head")(x)


class AskedPatches(nn.Module):
    config: SiglipConfig

    @nn.compact
    def __call__(self, x):                                                                  # [B, N, D] -> [B, D]
        (B, N, D), H, of_all = x.shape, self.config.num_attention_heads, nn.Dense(3 * x.shape[-1], name="in_proj")
        probe = jnp.repeat(self.param("probe", nn.initializers.normal(0.02), (1, 1, D)), B, axis=0)
        (q, _, _), (_, k, v) = (jnp.split(of_all(y).reshape(B, -1, 3 * H, D // H), 3, axis=2) for y in (probe, x))
        x = nn.Dense(D, name="out_proj")(attention(q, k, v).reshape(B, 1, D))
        return (x + ClipMlp(self.config, name="mlp")(layer_norm(self.config, "layernorm")(x)))[:, 0]


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
         (r"^(pre_layrnorm|post_layernorm)", r"vision_model.\1"),
         (r"^head/in_proj/kernel", "head/attention.in_proj_weight"),
         (r"^head/in_proj/bias", "head/attention.in_proj_bias"),
         (r"^head/out_proj", "head/attention.out_proj"), (r"^head/", "vision_model.head."))


def tower(config):
    """The module of a config, CLIP's or SigLIP's."""
    return SiglipVision(config) if isinstance(config, SiglipConfig) else ClipVision(config)


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return tower(config).init(key, jnp.zeros((1, config.image_size, config.image_size, 3)))["params"]


def from_torch(tensors, config):
    """transformers' state dict of a CLIPModel or SiglipModel, or of its image tower alone -> params, numpy. ValueError
    names missing, unknown, misshapen keys; of the text tower nothing is read."""
    if not any(name.startswith("vision_model.") for name in tensors):                 # the tower alone, in newer files
        tensors = {f"vision_model.{name}": x for name, x in tensors.items()}
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    ignored = [name for name in tensors if name.startswith(("text_", "logit_")) or name.endswith("position_ids")]
    return torch_keys.to_params(tensors, shapes, RULES, ignored)


def from_openai(tensors):
    """A state dict as OpenAI writes it, LongCLIP's among them, as transformers' of an image tower; the text tower is
    left out. KeyError, ValueError where it is none."""
    found, D = {}, len(tensors["visual.ln_pre.weight"])
    for name, x in tensors.items():
        if not name.startswith("visual."):
            continue
        name = "vision_model." + name.removeprefix("visual.")
        for pattern, theirs in OPENAI:
            name = re.sub(pattern, theirs, name)
        if "self_attn.in_proj_" in name:
            found |= {name.replace("in_proj_", f"{part}_proj."): share for part, share in zip("qkv", np.split(x, 3))}
        else:
            found[name] = x.T if name == "visual_projection.weight" else x
    return found, dict(
        hidden_size=D, intermediate_size=len(found["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.bias") for name in found), num_attention_heads=max(1, D // 64),
        patch_size=(patch := found["vision_model.embeddings.patch_embedding.weight"].shape[-1]),
        image_size=patch * round((len(found["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5),
        projection_dim=len(found["visual_projection.weight"]))


OPENAI = ((r"(class_embedding)$", r"embeddings.\1"), (r"positional_embedding$", "embeddings.position_embedding.weight"),
          (r"conv1\.", "embeddings.patch_embedding."), (r"ln_pre\.", "pre_layrnorm."),
          (r"ln_post\.", "post_layernorm."),
          (r"^vision_model\.proj$", "visual_projection.weight"), (r"transformer\.resblocks\.", "encoder.layers."),
          (r"\.ln_(\d)\.", r".layer_norm\1."), (r"\.attn\.", ".self_attn."), (r"mlp\.c_fc", "mlp.fc1"),
          (r"mlp\.c_proj", "mlp.fc2"))
