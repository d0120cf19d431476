"""The language model of Show-o (Xie et al. 2024): Phi-1.5, which reads text and fills in the codes of a picture.

One table and one head serve all ids, V = vocab_size and K = image_vocab_size:

    id < V - K - 1            text and the tokens that steer the model
    V - K - 1 + code          a code of a picture
    V - 1                     a code that is not known yet
    id >= V                   a patch of the picture that is read: row `id - V` of what `project` makes of its features

Each layer is parallel: h = LayerNorm(x), x + attention(h) + MLP(h), with biases everywhere. Queries and keys pass a
LayerNorm over the width of a head before they are rotated, and only their first channels are rotated.

Text reads what is before it; within a picture every token reads every other one. So text never reads the picture that
is drawn behind it, its keys and values are the same in every round of drawing, and they are computed once (`before`)
for all pictures of a prompt (`behind`).
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax.models import qwen2, torch_keys
from gvu_jax.models.layers import Dense, Embed, attention, rotary, spread, with_seen
from gvu_jax.models.llama import Projector
from gvu_jax.models.qwen2 import Cache


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of Phi under the names of its config.json, but for the vocabulary: that is Show-o's."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int                       # text, what steers, codes, and the mask
    image_vocab_size: int                 # codes
    vision_width: int = 0                 # of the features of a tower that reads; 0: codes are read
    layer_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    partial_rotary_factor: float = 0.5    # of the channels of a head, how many are rotated
    remat: str = "nothing"                # see qwen2.REMAT

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def rotated(self):
        """The first so many channels of each head tell positions."""
        return int(self.partial_rotary_factor * self.head_dim)

    @property
    def first_code(self):
        """Id of code 0. The one of code K is that of the mask."""
        return self.vocab_size - 1 - self.image_vocab_size

    def __post_init__(self):
        qwen2.check_remat(self.remat)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, layer, prefix, positions, mask, at):
        c, (B, T, _) = self.config, x.shape
        heads = lambda name, n: Dense(n * c.head_dim, True, 1, name=name)(x).reshape(B, T, n, c.head_dim)

        def turned(name, n):
            y = nn.LayerNorm(c.layer_norm_eps, name=f"{name}_layernorm")(heads(f"{name}_proj", n))
            told = rotary(y[..., :c.rotated], positions, c.rope_theta)
            return jnp.concatenate([told, y[..., c.rotated:]], axis=-1)

        q = turned("q", c.num_attention_heads)                                                      # [B, T, H, E]
        k, v = turned("k", c.num_key_value_heads), heads("v_proj", c.num_key_value_heads)           # [B, T, K, E]
        kept = k, v
        if prefix is not None:                             # a text's are repeated for the pictures behind it
            behind = lambda text, own: jnp.concatenate([jnp.repeat(text, B // len(text), axis=0), own], axis=1)
            k, v = map(behind, prefix, kept)                                                        # [B, P + T, K, E]
        elif cache is not None:
            cache = cache.write(layer, at, k, v)
            k, v = cache.read(layer, k.dtype)                                                       # [B, S, K, E]
        y = attention(q, k, v, mask).reshape(B, T, c.num_attention_heads * c.head_dim)
        return Dense(c.hidden_size, True, 0, name="dense")(y), cache, kept


class MLP(nn.Module):
    """fc2(gelu(fc1 x)), GELU in its form with tanh, width `intermediate_size`."""
    config: Config

    @nn.compact
    def __call__(self, x):
        y = Dense(self.config.intermediate_size, True, 1, name="fc1")(x)
        return Dense(self.config.hidden_size, True, 0, name="fc2")(nn.gelu(y, approximate=True))


class Layer(nn.Module):
    """A decoder layer as the scan sees it: it takes and returns the carry (x [B, T, D], cache or None), and gives its
    keys and values [B, T, K, E] besides.

    layer: its index in the cache. prefix: keys and values [R, P, K, E] of what is read before by B / R rows each, or
    None. positions [B, T]. mask: [B, T, S] of the slots of the cache, or of T without one; or [B, 1, P + T] behind a
    prefix. at: the first slot.
    """
    config: Config

    @nn.compact
    def __call__(self, carry, layer, prefix, positions, mask, at):
        (x, cache), c = carry, self.config
        self.sow("intermediates", "layer_input", x)
        x = spread(x)
        h = nn.LayerNorm(c.layer_norm_eps, name="input_layernorm")(x)
        y, cache, kept = Attention(c, name="self_attn")(h, cache, layer, prefix, positions, mask, at)
        return (x + y + MLP(c, name="mlp")(h), cache), kept


class Phi(nn.Module):
    """picture: the slots (first, end) of a picture that is read: every token reads them, whatever its place."""
    config: Config
    picture: tuple[int, int] = (0, 0)
    apart: bool = False                   # every layer by itself instead of in a scan; see `for_steps`

    def setup(self):
        c = self.config
        self.lm_embed_tokens = Embed(c.vocab_size, c.hidden_size)
        if c.vision_width:
            self.mm_projector = Projector(c.hidden_size, c.hidden_size)
        if self.apart:
            self.layers = [qwen2.rematted(Layer, c)(c) for _ in range(c.num_hidden_layers)]
        else:
            self.layers = qwen2.stack(Layer, c, c.num_hidden_layers, per_layer=2, shared=3)
        self.final_layernorm = nn.LayerNorm(c.layer_norm_eps)
        self.lm_head = Dense(c.vocab_size, True, 1)

    def __call__(self, tokens, mask, positions=None, cache=None, at=0, text_only=True, seen=None):
        """Reads `tokens`, and returns what the heads read.

        tokens     [B, T] int
        mask       [B, S] bool, True where the key slot holds a real token; S = T without a cache. Or [B, T, S]: what
                   each position may read besides, where texts that share a beginning are packed into one row
        positions  [B, T] int for the rotary embedding; None: 0..T-1 counted from the padded start
        cache, at  keys and values of S slots (of layers that are apart, a list), and the slot of tokens[:, 0]
        text_only  no matter: all ids are rows of one table
        seen       [B, N, D] from `project`, the picture of each row that is read; None where its codes are tokens
        Returns (hidden [B, T, D] after the final norm, cache).
        """
        x = with_seen(self.embed(tokens), tokens - self.config.vocab_size, seen)
        slots = jnp.arange(mask.shape[-1])
        first, end = self.picture
        may = (at + jnp.arange(tokens.shape[1]))[:, None] >= slots                                  # [T, S]
        may = may | ((slots >= first) & (slots < end))
        mask = may & (mask if mask.ndim == 3 else mask[:, None, :])                                 # [B, T, S]
        hidden, cache, _ = self.run(x, cache, None, positions, mask, at)
        return hidden, cache

    def before(self, tokens, mask):
        """Reads texts [R, P], mask bool, that pictures are drawn behind. Returns hidden [R, P, D] and the texts' keys
        and values, [layers, R, P, K, E]."""
        T = tokens.shape[1]
        mask = jnp.tril(jnp.ones((T, T), bool)) & mask[:, None, :]                                  # [R, P, P]
        hidden, _, kept = self.run(self.embed(tokens), None, None, None, mask, 0)
        return hidden, kept

    def behind(self, prefix, mask, tokens):
        """Reads pictures, the G behind one text side by side: tokens [R*G, T] from their first one to their last.

        prefix: of `before`; mask [R, P] of the texts. Returns hidden [R*G, T, D] after the final norm.
        """
        S, T = tokens.shape
        positions = jnp.broadcast_to(mask.shape[1] + jnp.arange(T), (S, T))
        mask = jnp.pad(jnp.repeat(mask, S // len(mask), axis=0), ((0, 0), (0, T)), constant_values=True)[:, None]
        return self.run(self.embed(tokens), None, prefix, positions, mask, 0)[0]

    def run(self, x, cache, prefix, positions, mask, at):
        """x [B, T, D] through all layers and the final norm, as in `Layer`: hidden, cache, keys and values."""
        c, (B, T, _), x, kept = self.config, x.shape, spread(x), None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        if self.apart:
            cache = list(cache)
            for i, layer in enumerate(self.layers):
                (x, cache[i]), _ = layer((x, cache[i]), None, None, positions, mask, at)
        else:
            (x, cache), kept = self.layers((x, cache), jnp.arange(c.num_hidden_layers), prefix, positions, mask, at)
        return spread(self.final_layernorm(x)), cache, kept

    def embed(self, tokens):
        """[..] int -> [.., D]; a patch has no row of its own."""
        return self.lm_embed_tokens(jnp.where(tokens < self.config.vocab_size, tokens, 0))

    def project(self, features):
        """What a vision tower sees, [B, N, vision_width] -> `seen` [B, N, D]."""
        return self.mm_projector(features)

    def text_logits(self, hidden):
        """[..., D] -> [..., vocab_size] float32, of all ids: nothing is left out."""
        return self.lm_head(hidden).astype(jnp.float32)

    def image_logits(self, hidden):
        """[..., D] -> [..., image_vocab_size] float32: of the codes alone, the mask not among them."""
        first = self.config.first_code
        return self.lm_head(hidden, slice(first, first + self.config.image_vocab_size)).astype(jnp.float32)

    def everything(self, tokens, mask):
        """Touches every parameter; what `init` runs."""
        if self.config.vision_width:
            self.project(jnp.zeros((*tokens.shape, self.config.vision_width)))
        return self.text_logits(self(tokens, mask)[0])

    def empty_cache(self, batch, slots, dtype):
        return Cache.empty(self.config, batch, slots, dtype)

    @nn.nowrap
    def for_steps(self, variables, cache):
        """What reads one token after the other: see qwen2.for_steps."""
        return qwen2.for_steps(self, variables, cache, {"layers": 0})


def init(config, key):
    """Random parameters, a nested dict of float32 arrays; layers are stacked on the leading axis."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Phi(config).init(key, tokens, jnp.ones_like(tokens, bool), method="everything")["params"]


# The width is divided over fsdp; heads, channels of the feed-forward parts and the vocabulary over tensor.
PARTITION = (
    (r"lm_embed_tokens/embedding$", ("vocab", "width")),
    (r"[qkv]_proj/kernel$", ("width", "heads")),
    (r"self_attn/dense/kernel$", ("heads", "width")),
    (r"fc1/kernel$", ("width", "channels")),
    (r"fc2/kernel$", ("channels", "width")),
    (r"lm_head/kernel$", ("width", "vocab")),
    (r"(scale|bias)$", (None,)),
)

# What of the backbone a run may train, as a regex for paths; "projector": codes on their way in and out, which share
# their table and head with text.
TRAINS = {"backbone": r"^(layers|final_layernorm)/", "all": r"",
          "backbone+projector": r"^(layers|final_layernorm|lm_embed_tokens|lm_head)/"}

# Names of the tensors in Show-o's checkpoints.
RULES = (
    (r"^mm_projector/fc1", "mm_projector.0"), (r"^mm_projector/fc2", "mm_projector.2"),
    (r"^layers/", "showo.model.layers.{layer}."),
    (r"^lm_embed_tokens", "showo.model.embed_tokens"),
    (r"^final_layernorm", "showo.model.final_layernorm"),
    (r"^lm_head", "showo.lm_head"),
    (r"embedding$", "weight"),
)


def from_torch(tensors, config):
    """The tensors (name -> array) of a Show-o checkpoint -> params, numpy. ValueError names missing, unknown and
    misshapen keys."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES)
