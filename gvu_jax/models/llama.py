"""The language model of Janus-Pro (Chen et al. 2025): a Llama that reads text, what a vision tower sees, and codes.

Three kinds of ids make one causal stream, V = vocab_size and K = image_vocab_size:

    id < V              text, row `id` of lm_embed_tokens
    V <= id < V + K     a code of a picture that is drawn: gen_aligner(gen_embed_tokens[id - V])
    id >= V + K         a patch of the picture that is read: row `id - V - K` of what `align` makes of its features

Nothing else marks the modality. Two heads read the same final state. The layers are Qwen2's without biases.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gvu_jax.models import qwen2, torch_keys
from gvu_jax.models.layers import Dense, Embed, RMSNorm, spread, with_seen
from gvu_jax.models.qwen2 import Cache, DecoderLayer


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of Llama under the names of its config.json, and the widths of what is around it."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    image_vocab_size: int                 # codes of VQ-16
    code_width: int                       # of the table of codes
    vision_width: int                     # of the tower's features
    image_head_width: int                 # inside the head for codes
    rms_norm_eps: float = 1e-6            # Llama's defaults, this one and the next: the published config
    rope_theta: float = 1e4               # leaves them out
    remat: str = "nothing"                # see qwen2.REMAT

    qkv_bias = False                      # of every Llama
    mrope_section = None

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self):
        qwen2.check_remat(self.remat)


class Layer(nn.Module):
    """A decoder layer as the scan sees it."""
    config: Config

    @nn.compact
    def __call__(self, carry, layer, positions, mask, at):
        x, cache = carry
        self.sow("intermediates", "layer_input", x)
        return DecoderLayer(self.config, name="layer")(x, cache, layer, positions, mask, at), None


class Projector(nn.Module):
    """linear, exact GELU, linear, all with biases. divided: the sides that stay divided over `tensor`, as in Dense."""
    hidden: int
    out: int
    divided: tuple = (1, 0)

    @nn.compact
    def __call__(self, x):                                                            # [..., in] -> [..., out]
        x = Dense(self.hidden, True, self.divided[0], name="fc1")(x)
        return Dense(self.out, True, self.divided[1], name="fc2")(nn.gelu(x, approximate=False))


class Llama(nn.Module):
    config: Config
    apart: bool = False                   # every layer by itself instead of in a scan; see `for_steps`

    def setup(self):
        c = self.config
        self.lm_embed_tokens = Embed(c.vocab_size, c.hidden_size)
        self.gen_embed_tokens = Embed(c.image_vocab_size, c.code_width)
        self.gen_aligner = Projector(c.hidden_size, c.hidden_size)
        self.aligner = Projector(c.hidden_size, c.hidden_size)
        if self.apart:
            self.layers = [qwen2.rematted(Layer, c)(c) for _ in range(c.num_hidden_layers)]
        else:
            self.layers = qwen2.stack(Layer, c, c.num_hidden_layers, per_layer=1, shared=3)
        self.norm = RMSNorm(c.rms_norm_eps)
        self.lm_head = Dense(c.vocab_size, divided=1)
        self.gen_head = Projector(c.image_head_width, c.image_vocab_size, divided=(None, 1))

    def __call__(self, tokens, mask, positions=None, cache=None, at=0, text_only=False, seen=None):
        """Runs the stack over `tokens` and returns what the heads read.

        tokens     [B, T] int
        mask       [B, S] bool, True where the key slot holds a real token; S = T without a cache. Or [B, T, S]: what
                   each position may read, where texts that share a beginning are packed into one row
        positions  [B, T] int for the rotary embedding; None: 0..T-1 counted from the padded start
        cache, at  keys and values of S slots (of layers that are apart, a list), and the slot of tokens[:, 0];
                   the int 0 says that rows begin here, which is what splash can read
        text_only  there are no codes among the tokens: they are not looked up
        seen       [B, N, D] from `align`, the picture of each row that is read; None where there is none
        Returns (hidden [B, T, D] after the final norm, cache).
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        patch = tokens - c.vocab_size - c.image_vocab_size
        x = self.lm_embed_tokens(jnp.where(tokens < c.vocab_size, tokens, 0))                       # [B, T, D]
        if not text_only:
            is_code = (tokens >= c.vocab_size) & (patch < 0)
            codes = self.embed_codes(jnp.where(is_code, tokens - c.vocab_size, 0))
            x = jnp.where(is_code[:, :, None], codes, x)
        x = spread(with_seen(x, patch, seen))

        readable, _ = qwen2.readable(mask, T, at, c.head_dim)
        if self.apart:
            cache = list(cache)
            for i, layer in enumerate(self.layers):
                (x, cache[i]), _ = layer((x, cache[i]), None, positions, readable, at)
        else:
            (x, cache), _ = self.layers((x, cache), jnp.arange(c.num_hidden_layers), positions, readable, at)
        return spread(self.norm(x)), cache

    def embed_codes(self, codes):
        """codes [..] int -> [.., D], as the stack reads them. The table is no codebook: its rows enter as they are."""
        return self.gen_aligner(self.gen_embed_tokens(codes))

    def align(self, features):
        """What the vision tower sees, [B, N, vision_width] -> `seen` [B, N, D]."""
        return self.aligner(features)

    def text_logits(self, hidden):
        """[..., D] -> [..., vocab_size] float32."""
        return self.lm_head(hidden).astype(jnp.float32)

    def image_logits(self, hidden):
        """[..., D] -> [..., image_vocab_size] float32."""
        return self.gen_head(hidden).astype(jnp.float32)

    def everything(self, tokens, mask):
        """Touches every parameter; what `init` runs."""
        seen = self.align(jnp.zeros((*tokens.shape, self.config.vision_width)))
        hidden, _ = self(tokens, mask, seen=seen)
        return self.text_logits(hidden), self.image_logits(hidden)

    def empty_cache(self, batch, slots, dtype):
        return Cache.empty(self.config, batch, slots, dtype)

    @nn.nowrap
    def for_steps(self, variables, cache):
        """What reads one token after the other: see qwen2.for_steps."""
        return qwen2.for_steps(self, variables, cache, {"layers": 0})


def without_prompt(tokens, mask, pad):
    """The context that guidance compares with: tokens [B, T], mask [B, T] bool, left-padded -> tokens [B, T].

    As long as the prompt, whose real tokens but the first (beginning of text) and the last (of the picture) become
    `pad`, and are read: so it depends on the prompt's length and on nothing else of it.
    """
    first = mask & (jnp.cumsum(mask, axis=1) == 1)
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
    return jnp.where(mask & ~first & ~last, pad, tokens)


def init(config, key):
    """Random parameters, a nested dict of float32 arrays; layers are stacked on the leading axis."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Llama(config).init(key, tokens, jnp.ones_like(tokens, bool), method="everything")["params"]


# The width is divided over fsdp; heads, channels of the feed-forward parts and vocabularies over tensor.
PARTITION = (
    (r"lm_embed_tokens/embedding$", ("vocab", "width")),
    (r"gen_embed_tokens/embedding$", ("vocab", None)),
    (r"[qkv]_proj/kernel$", ("width", "heads")),
    (r"o_proj/kernel$", ("heads", "width")),
    (r"(gate|up)_proj/kernel$", ("width", "channels")),
    (r"down_proj/kernel$", ("channels", "width")),
    (r"aligner/fc1/kernel$", ("width", "channels")),
    (r"aligner/fc2/kernel$", ("channels", "width")),
    (r"gen_head/fc1/kernel$", ("width", None)),
    (r"(lm_head|gen_head/fc2)/kernel$", ("width", "vocab")),
    (r"(norm/scale|layernorm/scale|bias)$", (None,)),
)


# What of the backbone a run may train, as a regex for paths; "projector": codes on their way in and out.
TRAINS = {"backbone": r"^(layers|norm)/", "all": r"",
          "backbone+projector": r"^(layers|norm|gen_embed_tokens|gen_aligner|gen_head)/"}

# Names of the tensors in Janus-Pro's checkpoints, as DeepSeek published them and as transformers has them.
KEYS = {
    "published": r"(language_model|aligner|gen_aligner|gen_embed|gen_head)\.",
    "transformers": r"(lm_head|model\.(language_model|aligner|generation_(aligner|embeddings|head)))\.",
}
RULES = {
    "published": (
        (r"^(layers|norm|lm_embed_tokens)", r"language_model.model.\1"),
        (r"^lm_head", "language_model.lm_head"),
        (r"layers/layer/", "layers.{layer}."),
        (r"lm_embed_tokens", "embed_tokens"),
        (r"gen_embed_tokens", "gen_embed"),
        (r"gen_head/fc1", "gen_head.output_mlp_projector"), (r"gen_head/fc2", "gen_head.vision_head"),
        (r"aligner/fc1", "aligner.layers.0"), (r"aligner/fc2", "aligner.layers.2"),
        (r"embedding$", "weight")),
    "transformers": (
        (r"^(layers|norm|lm_embed_tokens)", r"model.language_model.\1"),
        (r"layers/layer/", "layers.{layer}."),
        (r"lm_embed_tokens", "embed_tokens"),
        (r"gen_embed_tokens", "model.generation_embeddings"),
        (r"gen_head/fc1", "model.generation_head.proj_out"), (r"gen_head/fc2", "model.generation_head.vision_head"),
        (r"^gen_aligner", "model.generation_aligner"), (r"^aligner", "model.aligner"),
        (r"aligner/fc2", "aligner.hidden_layers.0"),
        (r"embedding$", "weight")),
}


def from_torch(tensors, config, layout="published"):
    """The language model's tensors (name -> array) of a Janus-Pro checkpoint -> params, numpy.

    layout: of RULES. Raises ValueError naming every key that is missing, unknown or misshapen.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return torch_keys.to_params(tensors, shapes, RULES[layout])
