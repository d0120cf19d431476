"""The text encoders of FLUX.1: T5 (Raffel et al. 2020, v1.1) gives the vectors that the image decoder attends to,
CLIP's text tower (Radford et al. 2021) the one vector that conditions all of its blocks. Stable Diffusion 3.5 has two
CLIP towers with a projection, whose pooled vectors are joined.

    ids [B, X] -> T5Encoder -> [B, X, D]                                   `context` of flux.FluxTransformer
    ids [B, T] -> ClipText  -> [B, T, D], pooled [B, D], second last       `pooled` of it and of sd3.SD3Transformer

Neither is told which ids are padding: the decoder was trained on what they give without a mask, so T5 needs every
prompt at the length used there (512 ids) and CLIP at its own (77). Both encoders are frozen and have no dropout here.
Everything is computed in the dtype of the parameters; norm statistics, attention scores and softmax are float32.
Letters as in layers.py.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gvu_jax.models import torch_keys
from gvu_jax.models.layers import AXES, Embed, RMSNorm, attention, spread

T5_FEED_FORWARDS = ("gated-gelu", "relu")            # of v1.1, and of the first T5
CLIP_ACTIVATIONS = {                                 # `hidden_act` -> function
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


# ------------------------------------------------------------------ T5

@dataclasses.dataclass(frozen=True)
class T5Config:
    """The numbers of the checkpoint's config.json, under its names; old files lack the ones with a default."""
    vocab_size: int
    d_model: int
    d_kv: int                                 # of one head; num_heads * d_kv need not be d_model
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    def __post_init__(self):
        if self.feed_forward_proj not in T5_FEED_FORWARDS:
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r} is not implemented, "
                             f"only {', '.join(T5_FEED_FORWARDS)}")
        buckets, max_distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or max_distance <= buckets // 4:
            raise ValueError(f"relative_attention_num_buckets {buckets} and relative_attention_max_distance "
                             f"{max_distance} leave no far buckets")


def position_buckets(length, buckets, max_distance):
    """The bucket of every (query, key) pair, int32 [T, T] with values in [0, buckets).

    Half of the buckets are for keys after the query. In each half, the first half holds one distance each; the others
    grow geometrically up to max_distance, and the last one also takes all that is farther away.
    """
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]                                 # [T, T]
    distance, half = np.abs(ahead), buckets // 2
    exact = half // 2
    # In float32 and in this order of operations, because the checkpoints were trained with the rounding it has.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    return (np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (ahead > 0)).astype(np.int32)


class T5Attention(nn.Module):
    """softmax(q k^T + bias) v: without the 1 / sqrt(E), which T5's initialisation took over."""
    config: T5Config

    @nn.compact
    def __call__(self, x, bias):                                              # [B, T, D], float32 [H, T, T]
        c, (B, T, D) = self.config, x.shape
        heads = lambda name: nn.Dense(c.num_heads * c.d_kv, use_bias=False, name=name)(x).reshape(B, T, -1, c.d_kv)
        q, k, v = heads("q"), heads("k"), heads("v")                                                # [B, T, H, E]
        scores = jnp.einsum("bthe,bshe->bhts", q, k, preferred_element_type=jnp.float32) + bias     # [B, H, T, S]
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhts,bshe->bthe", weights, v)                                           # [B, T, H, E]
        return nn.Dense(D, use_bias=False, name="o")(mixed.reshape(B, T, -1))


class T5FeedForward(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):                                                                          # [B, T, D]
        wide = lambda name: nn.Dense(self.config.d_ff, use_bias=False, name=name)(x)                # [B, T, F]
        if self.config.feed_forward_proj == "gated-gelu":
            hidden = nn.gelu(wide("wi_0"), approximate=True) * wide("wi_1")                         # Shazeer 2020
        else:
            hidden = nn.relu(wide("wi"))
        return nn.Dense(x.shape[-1], use_bias=False, name="wo")(hidden)


class T5Block(nn.Module):
    """Pre-norm transformer block; the None is for nn.scan."""
    config: T5Config

    @nn.compact
    def __call__(self, x, bias):                                              # [B, T, D], [H, T, T]
        eps, x = self.config.layer_norm_epsilon, spread(x, over=AXES)
        x = x + T5Attention(self.config, name="attention")(RMSNorm(eps, name="attention_norm")(x), bias)
        x = x + T5FeedForward(self.config, name="feed_forward")(RMSNorm(eps, name="feed_forward_norm")(x))
        return x, None


class T5Encoder(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, ids):
        """ids int [B, T], of any length -> [B, T, D]. Every position reads every other one, padding included."""
        c, T = self.config, ids.shape[1]
        buckets, max_distance = c.relative_attention_num_buckets, c.relative_attention_max_distance
        table = self.param("relative_attention_bias", nn.initializers.normal(0.1), (buckets, c.num_heads))
        # One table for all blocks (the checkpoint keeps it in the first), so the bias is made once.
        bias = jnp.take(table.astype(jnp.float32).T, position_buckets(T, buckets, max_distance), axis=1)   # [H, T, T]
        x = Embed(c.vocab_size, c.d_model, name="shared")(ids)                                      # [B, T, D]
        blocks = nn.scan(T5Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.num_layers)
        x, _ = blocks(c, name="blocks")(x, bias)
        return RMSNorm(c.layer_norm_epsilon, name="final_layer_norm")(x)


# ------------------------------------------------------------------ CLIP

@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The numbers of the checkpoint's config.json, under its names; files may lack the ones with a default."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407                 # 2 is a mistake of early checkpoints, kept by convention: see ClipText
    projected: int | None = None              # width of the pooled vector where it is projected (text_projection)

    def __post_init__(self):
        if self.hidden_act not in CLIP_ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not implemented, only {', '.join(CLIP_ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")


class ClipAttention(nn.Module):
    config: ClipConfig

    @nn.compact
    def __call__(self, x, mask):                                              # [B, T, D], bool [1, T, T]
        (B, T, D), H = x.shape, self.config.num_attention_heads
        q, k, v = (nn.Dense(D, name=name)(x).reshape(B, T, H, D // H) for name in ("q_proj", "k_proj", "v_proj"))
        return nn.Dense(D, name="out_proj")(attention(q, k, v, mask).reshape(B, T, D))


class ClipMlp(nn.Module):
    config: ClipConfig

    @nn.compact
    def __call__(self, x):                                                                          # [B, T, D]
        hidden = CLIP_ACTIVATIONS[self.config.hidden_act](nn.Dense(self.config.intermediate_size, name="fc1")(x))
        return nn.Dense(x.shape[-1], name="fc2")(hidden)


class ClipLayer(nn.Module):
    """Pre-norm transformer block; the second result, for nn.scan to stack, is what it read."""
    config: ClipConfig

    @nn.compact
    def __call__(self, x, mask):                                              # [B, T, D], [1, T, T]
        read = x = spread(x, over=AXES)
        x = x + ClipAttention(self.config, name="self_attn")(layer_norm(self.config, "layer_norm1")(x), mask)
        x = x + ClipMlp(self.config, name="mlp")(layer_norm(self.config, "layer_norm2")(x))
        return x, read


def layer_norm(config, name):
    # The variance as the mean of squared differences: CLIP's few huge channels cost the fast form its last digits.
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


class ClipText(nn.Module):
    config: ClipConfig

    @nn.compact
    def __call__(self, ids):
        """ids int [B, T], T <= max_position_embeddings -> last [B, T, D] after the final norm, pooled [B, D or
        projected], and what the last layer reads [B, T, D], which SD3 takes for the text's vectors.

        The pooled vector is `last` at the first end-of-text token, or at position 0 where there is none. A config with
        eos_token_id 2 means the largest id of the row: the tokenizer's end of text is the last one of its vocabulary.
        """
        c, T = self.config, ids.shape[1]
        if T > c.max_position_embeddings:
            raise ValueError(f"{T} ids, but the text encoder has positions for {c.max_position_embeddings}")
        positions = self.param("position_embedding", nn.initializers.normal(0.02),
                               (c.max_position_embeddings, c.hidden_size))
        x = Embed(c.vocab_size, c.hidden_size, name="token_embedding")(ids) + positions[:T]         # [B, T, D]
        layers = nn.scan(ClipLayer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast,
                         length=c.num_hidden_layers)
        x, read = layers(c, name="layers")(x, jnp.tril(jnp.ones((1, T, T), bool)))                  # [layers, B, T, D]
        last = layer_norm(c, "final_layer_norm")(x)
        end = jnp.argmax(ids if c.eos_token_id == 2 else ids == c.eos_token_id, axis=-1)            # [B], the first
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]                        # [B, D]
        if c.projected is not None:
            pooled = nn.Dense(c.projected, use_bias=False, name="text_projection")(pooled)
        return last, pooled, read[-1]


# ------------------------------------------------------------------ parameters

def module(config):
    """The encoder of a config: T5Encoder or ClipText."""
    return T5Encoder(config) if isinstance(config, T5Config) else ClipText(config)


# As in flux.py, for both encoders.
PARTITION = ((r"(kernel|embedding)$(?<!position_embedding)", ("any",)),
             (r"(bias|scale|position_embedding)$", (None,)))


def rules(config, names):
    """How the parameters are called in a checkpoint (see torch_keys) whose keys are `names`: the one table of T5 has
    two names, and CLIP's keys stand with and without the prefix `text_model`."""
    if isinstance(config, T5Config):
        alone = "encoder.embed_tokens.weight" in names and "shared.weight" not in names
        return (
            (r"^shared/embedding$", "encoder.embed_tokens.weight" if alone else "shared.weight"),
            (r"^relative_attention_bias$", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            (r"^blocks/attention_norm", "encoder.block.{layer}.layer.0.layer_norm"),
            (r"^blocks/attention", "encoder.block.{layer}.layer.0.SelfAttention"),
            (r"^blocks/feed_forward_norm", "encoder.block.{layer}.layer.1.layer_norm"),
            (r"^blocks/feed_forward", "encoder.block.{layer}.layer.1.DenseReluDense"),
            (r"^final_layer_norm", "encoder.final_layer_norm"),
        )
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    return (
        (r"^token_embedding/embedding$", prefix + "embeddings.token_embedding.weight"),
        (r"^position_embedding$", prefix + "embeddings.position_embedding.weight"),
        (r"^layers/", prefix + "encoder.layers.{layer}."),
        (r"^final_layer_norm", prefix + "final_layer_norm"),
    )


IGNORED = {T5Config: ("encoder.embed_tokens.weight",),
           ClipConfig: ("embeddings.position_ids", "text_model.embeddings.position_ids")}


def init(config, key):
    """Random parameters, a nested dict; under jax.eval_shape, the shapes of all parameters."""
    return module(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def from_torch(tensors, config):
    """transformers' state dict of a T5EncoderModel or CLIPTextModel (name -> array) -> params, numpy.

    ValueError names missing, unknown, misshapen keys. Not read: the second name of T5's one embedding table, and the
    position numbers that old CLIP files carry.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, rules(config, tensors), ignored=IGNORED[type(config)])
