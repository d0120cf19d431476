"""The autoregressive backbone of X-Omni: one Qwen2 stack that reads and writes both text and image tokens.

    id <  vocab_size     text, row `id` of lm_embed_tokens
    id >= vocab_size     multimodal, row `id - vocab_size` of mm_embed_tokens: image codes first, then special tokens

The first `num_mm_adap_layers` and last `num_mm_head_layers` layers are multimodal: evaluated for the whole sequence
(text supplies keys and values there), after which every text position gets its incoming state back. Image and text
positions end in norms of their own, and two heads read the result. The trailing layers are a stack of their own,
because text can do without them.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax.models import qwen2, torch_keys
from gvu_jax.models.layers import Dense, Embed, RMSNorm, spread
from gvu_jax.models.qwen2 import Cache, DecoderLayer


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of the checkpoint's config.json, under its names."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int                       # text ids
    mm_vocab_size: int                    # rows of the multimodal table: codes, special tokens, fillers
    image_vocab_size: int                 # image codes among them, from row 0
    num_mm_adap_layers: int
    num_mm_head_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    sliding_window: int | None = None     # None: every position is read; else the last `sliding_window`
    max_window_layers: int = 0            # layers below this index ignore the window
    remat: str = "nothing"                # see qwen2.REMAT

    qkv_bias = True                       # of every Qwen2
    mrope_section = None

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self):
        qwen2.check_remat(self.remat)


class Layer(nn.Module):
    """A decoder layer as the scan sees it, with the switch that makes it a multimodal one."""
    config: Config

    @nn.compact
    def __call__(self, carry, layer, multimodal, windowed, positions, mask, near, at, is_image):
        x, cache = carry
        self.sow("intermediates", "layer_input", x)
        if near is not None:
            mask = mask & (near | ~windowed)
        y, cache = DecoderLayer(self.config, name="layer")(x, cache, layer, positions, mask, at)
        keep = multimodal & ~is_image[:, :, None]                                                   # [B, T, 1]
        return (jnp.where(keep, x, y), cache), None


class XOmni(nn.Module):
    config: Config
    apart: bool = False                   # every layer by itself instead of in a scan; see `for_steps`

    def setup(self):
        c = self.config
        self.lm_embed_tokens = Embed(c.vocab_size, c.hidden_size)
        self.mm_embed_tokens = Embed(c.mm_vocab_size, c.hidden_size)
        stack = lambda length: qwen2.stack(Layer, c, length, per_layer=3, shared=5)
        if self.apart:
            self.layers = [qwen2.rematted(Layer, c)(c) for _ in range(c.num_hidden_layers)]
        else:
            self.layers = stack(c.num_hidden_layers - c.num_mm_head_layers)
            self.mm_head_layers = stack(c.num_mm_head_layers) if c.num_mm_head_layers else None
        self.lm_norm = RMSNorm(c.rms_norm_eps)
        self.mm_norm = RMSNorm(c.rms_norm_eps)
        self.lm_head = Dense(c.vocab_size, divided=1)
        self.mm_head = Dense(c.mm_vocab_size, divided=1)

    def __call__(self, tokens, mask, positions=None, cache=None, at=0, text_only=False):
        """Runs the stack over `tokens` and returns what the heads read.

        tokens     [B, T] int
        mask       [B, S] bool, True where the key slot holds a real token; S = T without a cache. Or [B, T, S]: what
                   each position may read, where texts that share a beginning are packed into one row
        positions  [B, T] int for the rotary embedding; None: 0..T-1 counted from the padded start
        cache, at  keys and values of S slots (of layers that are apart, a list), and the slot of tokens[:, 0];
                   the int 0 says that rows begin here, which is what splash can read
        text_only  the caller reads text positions alone: the trailing multimodal layers give those back untouched,
                   so they are not run, and the result at image positions means nothing
        Returns (hidden [B, T, D] after the final norm, cache).
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        is_image = tokens >= c.vocab_size                                                           # [B, T]
        text = self.lm_embed_tokens(jnp.where(is_image, 0, tokens))
        image = self.mm_embed_tokens(jnp.where(is_image, tokens - c.vocab_size, 0))
        x = spread(jnp.where(is_image[:, :, None], image, text))                                    # [B, T, D]

        readable, near = qwen2.readable(mask, T, at, c.head_dim, c.sliding_window)
        index = jnp.arange(c.num_hidden_layers)
        multimodal = (index < c.num_mm_adap_layers) | (index >= c.num_hidden_layers - c.num_mm_head_layers)
        per_layer = (index, multimodal, index >= c.max_window_layers)
        cut, rest = c.num_hidden_layers - c.num_mm_head_layers, (positions, readable, near, at, is_image)
        if self.apart:
            cache = list(cache)
            for i, layer in enumerate(self.layers[:cut] if text_only else self.layers):
                _, multimodal, windowed = (flag[i] for flag in per_layer)
                (x, cache[i]), _ = layer((x, cache[i]), None, multimodal, windowed, *rest)
        else:
            carry, _ = self.layers((x, cache), *(flag[:cut] for flag in per_layer), *rest)
            if self.mm_head_layers is not None and not text_only:
                carry, _ = self.mm_head_layers(carry, *(flag[cut:] for flag in per_layer), *rest)
            x, cache = carry
        return spread(jnp.where(is_image[:, :, None], self.mm_norm(x), self.lm_norm(x))), cache

    def text_logits(self, hidden):
        """[..., D] -> [..., vocab_size] float32. In text mode no multimodal id has any probability."""
        return self.lm_head(hidden).astype(jnp.float32)

    def image_logits(self, hidden):
        """[..., D] -> [..., image_vocab_size] float32. In image mode only image codes have any probability."""
        return self.mm_head(hidden)[..., :self.config.image_vocab_size].astype(jnp.float32)

    def everything(self, tokens, mask):
        """Touches every parameter; what `init` runs."""
        hidden, _ = self(tokens, mask)
        return self.text_logits(hidden), self.image_logits(hidden)

    def empty_cache(self, batch, slots, dtype):
        return Cache.empty(self.config, batch, slots, dtype)

    @nn.nowrap
    def for_steps(self, variables, cache):
        """What reads one token after the other: see qwen2.for_steps."""
        cut = self.config.num_hidden_layers - self.config.num_mm_head_layers
        return qwen2.for_steps(self, variables, cache, {"layers": 0, "mm_head_layers": cut})


def init(config, key):
    """Random parameters, a nested dict of float32 arrays; layers are stacked on the leading axis."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return XOmni(config).init(key, tokens, jnp.ones_like(tokens, bool), method="everything")["params"]


# The width is divided over fsdp; heads, channels of the feed-forward part and vocabularies over tensor.
PARTITION = (
    (r"embed_tokens/embedding$", ("vocab", "width")),
    (r"[qkv]_proj/kernel$", ("width", "heads")),
    (r"[qkv]_proj/bias$", ("heads",)),
    (r"o_proj/kernel$", ("heads", "width")),
    (r"(gate|up)_proj/kernel$", ("width", "channels")),
    (r"down_proj/kernel$", ("channels", "width")),
    (r"(lm|mm)_head/kernel$", ("width", "vocab")),
    (r"(norm|layernorm)/scale$", (None,)),
)


# What of the backbone a run may train, as a regex for paths; "projector": image tokens on their way in and out.
TRAINS = {"backbone": r"^(layers|mm_head_layers|lm_norm|mm_norm)/", "all": r"",
          "backbone+projector": r"^(layers|mm_head_layers|lm_norm|mm_norm|mm_embed_tokens|mm_head)/"}


def rules(config):
    """How the parameters are called in a checkpoint (see torch_keys): both stacks are `model.layers` there."""
    return (
        (r"^(lm_embed_tokens|mm_embed_tokens|lm_norm|mm_norm)", r"model.\1"),
        (r"^layers/layer/", "model.layers.{layer}."),
        (r"^mm_head_layers/layer/", f"model.layers.{{layer+{config.num_hidden_layers - config.num_mm_head_layers}}}."),
        (r"embedding$", "weight"),
    )


def from_torch(tensors, config):
    """The checkpoint's tensors (name -> array) -> params, numpy. ValueError names missing, unknown, misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, rules(config))
