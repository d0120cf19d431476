"""DINO's image towers, DINOv2 (Oquab et al. 2023) and DINOv3 (Siméoni et al. 2025), which tell what pictures are alike.

    x [B, H, W, 3] normalised -> class token [, registers], patches -> pre-norm blocks, each branch scaled -> norm
      -> the class token [B, D]

DINOv2 has a learned table of positions. DINOv3 turns the queries and keys of patches instead, by where their middles
lie between -1 and 1: half of the angles by rows, half by columns. Everything is computed in the common dtype of inputs
and parameters, norm statistics and softmax in float32.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import torch_keys
from gvu_jax.models.clip_vision import bicubic
from gvu_jax.models.layers import attention, rotated
from gvu_jax.models.text_encoders import layer_norm


@dataclasses.dataclass(frozen=True)
class Config:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    layer_norm_eps: float
    table: int = 0                       # side of DINOv2's table of positions, in patches; 0: positions turn
    registers: int = 0
    rope_theta: float = 100.0
    biases: tuple[bool, ...] = (True, True, True)                               # of queries, keys and values

    def __post_init__(self):
        if self.hidden_size % max(1, self.num_attention_heads * (1 if self.table else 4)):
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} heads")


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, angles):                                                      # [B, T, D], [1, T, E/2] or None
        (B, T, D), H = x.shape, self.config.num_attention_heads
        q, k, v = (nn.Dense(D, use_bias=bias, name=name)(x).reshape(B, T, H, D // H)
                   for name, bias in zip(("q_proj", "k_proj", "v_proj"), self.config.biases))
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        return nn.Dense(D, name="o_proj")(attention(q, k, v).reshape(B, T, D))


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, angles):
        c, D = self.config, x.shape[-1]
        scale = lambda name: self.param(name, nn.initializers.ones, (D,))
        x = x + scale("scale1") * Attention(c, name="attention")(layer_norm(c, "norm1")(x), angles)
        hidden = nn.gelu(nn.Dense(c.intermediate_size, name="up_proj")(layer_norm(c, "norm2")(x)), approximate=False)
        return x + scale("scale2") * nn.Dense(D, name="down_proj")(hidden), None


class Dino(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        """x [B, H, W, 3] normalised, sides multiples of patch_size -> the class token [B, D], after the norm."""
        c, patch = self.config, (self.config.patch_size,) * 2
        x = nn.Conv(c.hidden_size, patch, strides=patch, padding="VALID", name="patch_embedding")(x)
        B, rows, cols, D = x.shape
        normal, x = nn.initializers.normal(0.02), x.reshape(B, rows * cols, D)
        first = self.param("class_token", normal, (1, 1, D))
        angles = None if c.table else turns(rows, cols, 1 + c.registers, D // c.num_attention_heads, c.rope_theta)
        if c.table:
            positions = self.param("positions", normal, (1, 1 + c.table ** 2, D))
            first, x = first + positions[:, :1], x + resampled(positions[:, 1:], c.table, rows, cols)
        before = [first, self.param("registers", normal, (1, c.registers, D))] if c.registers else [first]
        x = jnp.concatenate([*(jnp.repeat(token, B, axis=0) for token in before), x], axis=1)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.num_hidden_layers)
        return layer_norm(c, "norm")(blocks(c, name="layers")(x, angles)[0][:, 0])


def turns(rows, cols, before, width, theta):
    """Angles [1, before + rows * cols, width / 2] float32 of a head: what stands before the patches is not turned."""
    frequency = 2 * np.pi / theta ** np.arange(0, 1, 4 / width, dtype=np.float32)                            # [E/4]
    places = [2 * (np.arange(n, dtype=np.float32) + 0.5) / n - 1 for n in (rows, cols)]
    grid = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1).reshape(rows * cols, 2, 1)
    angles = (grid * frequency).reshape(rows * cols, width // 2)
    return jnp.asarray(np.pad(angles, ((before, 0), (0, 0)))[None], jnp.float32)


def resampled(table, side, rows, cols):
    """Positions [1, side^2, D] -> [1, rows * cols, D], bicubic, as torch does it."""
    if (rows, cols) == (side, side):
        return table
    down, across = (jnp.asarray(bicubic(side, n), table.dtype) for n in (rows, cols))
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("rh,hwd,cw->rcd", down, table.reshape(side, side, -1), across).reshape(1, rows * cols, -1)


# ------------------------------------------------------------------ parameters

RULES = {
    "dinov2": ((r"^class_token$", "embeddings.cls_token"), (r"^positions$", "embeddings.position_embeddings"),
               (r"^patch_embedding", "embeddings.patch_embeddings.projection"),
               (r"^norm/", "layernorm/"),
               (r"^layers/attention/o_proj", "layers/attention.output.dense"),
               (r"^layers/attention/(q|k|v)_proj", r"layers/attention.attention.\1"),
               (r"attention\.q", "attention.query"), (r"attention\.k", "attention.key"),
               (r"attention\.v", "attention.value"),
               (r"up_proj", "mlp.fc1"), (r"down_proj", "mlp.fc2"), (r"scale(\d)$", r"layer_scale\1.lambda1"),
               (r"^layers/", "encoder.layer.{layer}.")),
    "dinov3_vit": ((r"^class_token$", "embeddings.cls_token"), (r"^registers$", "embeddings.register_tokens"),
                   (r"^patch_embedding", "embeddings.patch_embeddings"),
                   (r"(up|down)_proj", r"mlp.\1_proj"), (r"scale(\d)$", r"layer_scale\1.lambda1"),
                   (r"^layers/", "layer.{layer}.")),
}


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return Dino(config).init(key, jnp.zeros((1, config.patch_size, config.patch_size, 3)))["params"]


def from_torch(tensors, config):
    """transformers' state dict of a Dinov2Model or DINOv3ViTModel -> params, numpy. ValueError names missing, unknown,
    misshapen keys. The token that stands for hidden patches in training is not read."""
    tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES["dinov2" if config.table else "dinov3_vit"],
                                [name for name in tensors if name == "embeddings.mask_token"])
