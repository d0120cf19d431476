"""Qwen2.5-VL (Bai et al. 2025): a vision tower for pictures of any size, and a Qwen2 whose positions have rows and
columns.

    picture -> `fit_image` -> pixels -> `patches` -> VisionTower -> one vector for each 2 x 2 patches   `seen`
    ids and `seen` -> Qwen25VL -> hidden states -> text_logits, or project: what an image decoder reads (UAE)

Two kinds of ids make one causal stream: id < vocab_size is text, id >= vocab_size stands for row `id - vocab_size` of
`seen`. The layers are Qwen2's. Letters as in layers.py, N patches of a picture, M = N / 4 of its cells; everything is
computed in the common dtype of inputs and parameters, norm statistics, softmax and angles in float32.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from gvu_jax.models import clip, qwen2, torch_keys
from gvu_jax.models.layers import AXES, Dense, Embed, RMSNorm, alike, attention, rotated, spread, with_seen
from gvu_jax.models.llama import Projector
from gvu_jax.models.qwen2 import Cache, DecoderLayer
from gvu_jax.models.siglip import resize, resized
from gvu_jax.models.splash import full_attention


# ------------------------------------------------------------------ pictures of any size

MOST_UNEQUAL = 200           # times longer than the other may a side be


@dataclasses.dataclass(frozen=True)
class Transform:
    """How large pictures are read, in pixels: each of them lies between the two after resizing."""
    min_pixels: int
    max_pixels: int
    twice: bool = True                     # as the published tools do it


FIRST = Transform(3136, 12845056)          # of the two times, this is the first


def fitted_size(height, width, transform, multiple, least=0):
    """The (height, width) to which the processor resizes a picture: multiples of `multiple`, as near to its own sides
    as the number of pixels allows. least: what sides are rounded to at least; at 0 a side may be rounded to none, and
    then the picture counts as too small. ValueError for one that is a line."""
    if max(height, width) > MOST_UNEQUAL * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels cannot be read: one side is more than {MOST_UNEQUAL} "
                         f"times as long as the other")
    sides = [max(least, round(side / multiple) * multiple) for side in (height, width)]
    if math.prod(sides) > transform.max_pixels:
        by = math.sqrt(height * width / transform.max_pixels)
        sides = [max(multiple, math.floor(side / by / multiple) * multiple) for side in (height, width)]
    elif math.prod(sides) < transform.min_pixels:
        by = math.sqrt(transform.min_pixels / (height * width))
        sides = [math.ceil(side * by / multiple) * multiple for side in (height, width)]
    return tuple(sides)


def sizes(height, width, transform, multiple):
    """Those a picture is brought to, one after the other."""
    if not transform.twice:
        return fitted_size(height, width, transform, multiple),
    first = fitted_size(height, width, FIRST, multiple, least=multiple)
    return first, fitted_size(*first, transform, multiple)


def fit_image(image, transform, multiple):
    """A PIL picture of any mode -> float32 [H, W, 3] in [0, 1]; what is transparent lies on white."""
    if image.mode == "RGBA":
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        image = ground
    image = image.convert("RGB")
    for size in sizes(image.height, image.width, transform, multiple):
        image = resize(image, size)
    return np.asarray(image, np.float32) / 255


def fitted(pixels, transform, multiple):
    """What `fit_image` makes of pictures [B, h, w, 3] float32 in [0, 1] on the grid of 8 bits, inside a program and bit
    for bit."""
    for size in sizes(*pixels.shape[1:3], transform, multiple):
        pixels = resized(pixels, size)
    return pixels


# ------------------------------------------------------------------ the vision tower

@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The numbers of the checkpoint's vision_config, under its names."""
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int               # a cell is so many patches wide and high
    temporal_patch_size: int              # frames of a patch: a picture is a film that stands still
    window_size: int                      # pixels
    fullatt_block_indexes: tuple[int, ...]

    @property
    def multiple(self):
        """What the sides of a picture are multiples of: pixels of a cell."""
        return self.patch_size * self.spatial_merge_size

    @property
    def runs(self):
        """Blocks of one kind that follow each other, each a stack: tuples (first block, count, windowed)."""
        return alike([i not in self.fullatt_block_indexes for i in range(self.depth)])

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} gives {self.num_heads} heads no width that 4 divides")
        if self.window_size < self.multiple or not set(self.fullatt_block_indexes) <= set(range(self.depth)):
            raise ValueError(f"a window of {self.window_size} pixels and full attention in blocks "
                             f"{self.fullatt_block_indexes} do not fit cells of {self.multiple} pixels and "
                             f"{self.depth} blocks")


def patches(pixels, config):
    """pixels [B, H, W, 3] in [0, 1], sides multiples of a cell's -> [B, N, 3 frames patch^2] float32.

    The patches of a cell are consecutive, and cells and their patches are in the order of reading; inside a patch:
    channel, frame, row, column.
    """
    (B, H, W, _), patch, cell, c = pixels.shape, config.patch_size, config.spatial_merge_size, config
    if H % c.multiple or W % c.multiple:
        raise ValueError(f"picture of {H} x {W} pixels: sides must be multiples of {c.multiple}")
    x = (pixels.astype(jnp.float32) - np.float32(clip.MEAN)) / np.float32(clip.STD)
    x = x.reshape(B, H // c.multiple, cell, patch, W // c.multiple, cell, patch, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)                                 # [B, r, c, cell, cell, 3, patch, patch]
    x = jnp.repeat(x[:, :, :, :, :, :, None], c.temporal_patch_size, axis=6)
    return x.reshape(B, H * W // patch ** 2, -1)


def places(grid, config):
    """Row and column of each patch, in the order of `patches`: int [N, 2]. grid: rows and columns of patches."""
    (rows, cols), cell = grid, config.spatial_merge_size
    at = np.stack(np.indices((rows, cols)), axis=-1)                                                # [rows, cols, 2]
    at = at.reshape(rows // cell, cell, cols // cell, cell, 2).transpose(0, 2, 1, 3, 4)
    return at.reshape(-1, 2)


def angles(grid, config):
    """The rotary angles of each patch, float32 [N, E/2]: those of its row, then those of its column."""
    quarter = config.hidden_size // config.num_heads // 4
    frequency = 10000.0 ** (-np.arange(quarter) / quarter)                                          # [E/4]
    return (places(grid, config)[:, :, None] * frequency).reshape(-1, 2 * quarter).astype(np.float32)


def windows(grid, config):
    """The cells of each window, a list of int arrays, in the order of reading: squares, those at the right and below
    perhaps smaller."""
    rows, cols = (n // config.spatial_merge_size for n in grid)
    side = config.window_size // config.multiple
    cells = np.arange(rows * cols).reshape(rows, cols)
    return [cells[top:top + side, left:left + side].ravel() for top in range(0, rows, side)
            for left in range(0, cols, side)]


def window_order(grid, config):
    """In which order the tower has cells: int [M]."""
    return np.concatenate(windows(grid, config))


class VisionAttention(nn.Module):
    """windowed: a patch reads those of its window alone."""
    config: VisionConfig
    windowed: bool
    grid: tuple

    @nn.compact
    def __call__(self, x, angle):                                             # [B, N, D], [1, N, E/2]
        (B, N, D), H = x.shape, self.config.num_heads
        qkv = nn.Dense(3 * D, name="qkv")(x).reshape(B, N, 3, H, D // H)                            # [B, N, 3, H, E]
        q, k, v = rotated(qkv[:, :, 0], angle), rotated(qkv[:, :, 1], angle), qkv[:, :, 2]
        if self.windowed:
            sizes = [self.config.spatial_merge_size ** 2 * len(cells) for cells in windows(self.grid, self.config)]
            real = np.arange(max(sizes))[None, :] < np.array(sizes)[:, None]                        # [W, P]
            at, back = np.cumsum(real.ravel()).reshape(real.shape) - 1, np.flatnonzero(real)        # [W, P], [N]
            q, k, v = (x[:, np.maximum(at, 0)].reshape(-1, real.shape[1], H, D // H) for x in (q, k, v))
            mixed = attention(q, k, v, jnp.tile(real[:, None], (B, 1, 1)))                          # [B W, P, H, E]
            mixed = mixed.reshape(B, -1, D)[:, back]                                                # [B, N, D]
        else:
            mixed = full_attention(q, k, v).reshape(B, N, D)
        return nn.Dense(D, name="proj")(mixed)


class VisionMLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):                                                                          # [B, N, D]
        gate, up = nn.Dense(self.hidden, name="gate_proj")(x), nn.Dense(self.hidden, name="up_proj")(x)
        return nn.Dense(x.shape[-1], name="down_proj")(nn.silu(gate) * up)


class VisionBlock(nn.Module):
    """Pre-norm transformer block; the None is for nn.scan."""
    config: VisionConfig
    windowed: bool
    grid: tuple

    @nn.compact
    def __call__(self, x, angle):
        c, x = self.config, spread(x, over=AXES)
        x = x + VisionAttention(c, self.windowed, self.grid, name="attn")(RMSNorm(name="norm1")(x), angle)
        return x + VisionMLP(c.intermediate_size, name="mlp")(RMSNorm(name="norm2")(x)), None


class VisionTower(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x, grid):
        """x [B, N, ..] from `patches` of pictures of grid (rows, columns) of patches -> [B, M, out_hidden_size].

        Patches are brought to the order of their windows once, before the first block, and cells back behind the last.
        """
        c, B, cell = self.config, len(x), self.config.spatial_merge_size ** 2
        patch = (c.patch_size, c.patch_size, c.temporal_patch_size, 3)      # the order in which torch_keys has 5 axes
        kernel = self.param("patch_embed_kernel", nn.initializers.normal(0.02), (*patch, c.hidden_size))
        x = x.astype(kernel.dtype) @ kernel.transpose(3, 2, 1, 0, 4).reshape(-1, c.hidden_size)     # [B, N, D]
        self.sow("intermediates", "patch_embed", x)

        order = window_order(grid, c)                                                               # [M]
        in_cells = lambda x: x.reshape(len(x), len(order), cell, -1)[:, order].reshape(x.shape)
        x, angle = in_cells(x), jnp.asarray(in_cells(angles(grid, c)[None]))
        for first, count, windowed in c.runs:
            stack = nn.scan(VisionBlock, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True},
                            in_axes=nn.broadcast, length=count)
            x, _ = stack(c, windowed, grid, name=f"blocks_{first}")(x, angle)

        x = RMSNorm(name="ln_q")(x).reshape(B, len(order), cell * c.hidden_size)
        x = Projector(cell * c.hidden_size, c.out_hidden_size, name="merger")(x)                    # [B, M, D]
        return x[:, np.argsort(order)]

    def see(self, pixels):
        """pixels [B, H, W, 3] in [0, 1], sides multiples of a cell's -> [B, M, out_hidden_size]."""
        return self(patches(pixels, self.config), tuple(side // self.config.patch_size for side in pixels.shape[1:3]))


# ------------------------------------------------------------------ the language model

@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of the checkpoint's config.json, under its names; `projected` is UAE's."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    mrope_section: tuple[int, ...]        # of the angles of a head, how many read time, row and column
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    projected: tuple[int, ...] = ()       # widths inside and behind the projector to an image decoder; (): none
    remat: str = "nothing"                # see qwen2.REMAT

    qkv_bias = True                       # of every Qwen2

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self):
        qwen2.check_remat(self.remat)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must be three numbers that add up to half the head's "
                             f"width, {self.head_dim // 2}")


def rope_positions(count, pictures=()):
    """Places in time, rows and columns [B, T, 3] of tokens that are counted [B, T] int (real ones from 0, see umm).

    pictures: (start [B] int, where a row's count is at its first cell; (rows, columns) of cells), in the order in which
    they stand; a row without the picture starts it behind its end. A cell has the time of the picture's first and its
    own row and column after that; text goes on one after the largest place so far, and its three places are one.
    """
    at, shrunk = jnp.stack([count] * 3, axis=-1), 0                                                 # [B, T, 3], [B]
    for start, (rows, cols) in pictures:
        first, cell = (start - shrunk)[:, None], count - start[:, None]                             # [B, 1], [B, T]
        within = jnp.stack([first + 0 * cell, first + cell // cols, first + cell % cols], axis=-1)
        saved = rows * cols - max(rows, cols)
        after = jnp.where((cell >= rows * cols)[..., None], at - saved, at)
        at = jnp.where(((cell >= 0) & (cell < rows * cols))[..., None], within, after)
        shrunk = shrunk + saved
    return at


class Layer(nn.Module):
    """A decoder layer as the scan sees it."""
    config: Config

    @nn.compact
    def __call__(self, carry, layer, positions, mask, at):
        x, cache = carry
        self.sow("intermediates", "layer_input", x)
        return DecoderLayer(self.config, name="layer")(x, cache, layer, positions, mask, at), None


class Qwen25VL(nn.Module):
    config: Config
    apart: bool = False                   # every layer by itself instead of in a scan; see `qwen2.for_steps`

    def setup(self):
        c = self.config
        self.lm_embed_tokens = Embed(c.vocab_size, c.hidden_size)
        if self.apart:
            self.layers = [qwen2.rematted(Layer, c)(c) for _ in range(c.num_hidden_layers)]
        else:
            self.layers = qwen2.stack(Layer, c, c.num_hidden_layers, per_layer=1, shared=3)
        self.norm = RMSNorm(c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Dense(c.vocab_size, divided=1)
        self.projector = Projector(*c.projected) if c.projected else None

    def __call__(self, tokens, mask, positions=None, cache=None, at=0, text_only=True, seen=None):
        """Runs the stack over `tokens` and returns what the heads read.

        tokens     [B, T] int
        mask       [B, S] bool, True where the key slot holds a real token; S = T without a cache. Or [B, T, S]: what
                   each position may read, where texts that share a beginning are packed into one row
        positions  [B, T, 3] from `rope_positions`, or [B, T] int where there is text alone; None: 0..T-1
        cache, at  keys and values of S slots (of layers that are apart, a list), and the slot of tokens[:, 0];
                   the int 0 says that rows begin here, which is what splash can read
        text_only  ours has no other head
        seen       [B, M, D], the cells of the pictures of each row; None where there are none
        Returns (hidden [B, T, D] after the final norm, cache).
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        cell = tokens - c.vocab_size
        x = self.lm_embed_tokens(jnp.where(cell < 0, tokens, 0))                                    # [B, T, D]
        x = spread(with_seen(x, cell, seen))

        readable, _ = qwen2.readable(mask, T, at, c.head_dim)
        if self.apart:
            cache = list(cache)
            for i, layer in enumerate(self.layers):
                (x, cache[i]), _ = layer((x, cache[i]), None, positions, readable, at)
        else:
            (x, cache), _ = self.layers((x, cache), jnp.arange(c.num_hidden_layers), positions, readable, at)
        return spread(self.norm(x)), cache

    def text_logits(self, hidden):
        """[..., D] -> [..., vocab_size] float32."""
        if self.lm_head is None:
            return self.lm_embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def project(self, hidden):
        """[..., D] -> [..., projected[1]], what an image decoder reads (UAE)."""
        return self.projector(hidden)

    def everything(self, tokens, mask):
        """Touches every parameter; what `init` runs."""
        hidden, _ = self(tokens, mask)
        return self.text_logits(hidden), self.project(hidden) if self.config.projected else ()

    def empty_cache(self, batch, slots, dtype):
        return Cache.empty(self.config, batch, slots, dtype)

    @nn.nowrap
    def for_steps(self, variables, cache):
        """What reads one token after the other: see qwen2.for_steps."""
        return qwen2.for_steps(self, variables, cache, {"layers": 0})


# ------------------------------------------------------------------ parameters

def init(config, key):
    """Random parameters, a nested dict of float32 arrays; layers are stacked on the leading axis."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Qwen25VL(config).init(key, tokens, jnp.ones_like(tokens, bool), method="everything")["params"]


def init_vision(config, key):
    """The same of the tower."""
    side = 2 * config.multiple
    return VisionTower(config).init(key, jnp.zeros((1, side, side, 3)), method="see")["params"]


# The width is divided over fsdp; heads, channels of the feed-forward part and the vocabulary over tensor.
PARTITION = (
    (r"embed_tokens/embedding$", ("vocab", "width")),
    (r"[qkv]_proj/kernel$", ("width", "heads")),
    (r"[qkv]_proj/bias$", ("heads",)),
    (r"o_proj/kernel$", ("heads", "width")),
    (r"(gate|up)_proj/kernel$", ("width", "channels")),
    (r"down_proj/kernel$", ("channels", "width")),
    (r"projector/fc1/kernel$", ("width", "channels")),
    (r"projector/fc2/kernel$", ("channels", "width")),
    (r"lm_head/kernel$", ("width", "vocab")),
    (r"(norm/scale|layernorm/scale|fc[12]/bias)$", (None,)),
)
# The published 3420 channels of the feed-forward are no multiple of 8, the width of 1280 is.
VISION_PARTITION = ((r"(gate|up)_proj/kernel$", ("any", None)), (r"(bias|scale|patch_embed_kernel)$", (None,)),
                    (r"(?<!gate_proj/)(?<!up_proj/)(?<!patch_embed_)kernel$", ("any",)))

# Names of the tensors in checkpoints: as published, which transformers wrote up to 4.51, and as it writes them since.
OF_TEXT = ((r"^layers/layer/", "layers.{layer}."), (r"lm_embed_tokens", "embed_tokens"), (r"embedding$", "weight"),
           (r"^projector/fc1", "projector.0"), (r"^projector/fc2", "projector.2"))
OF_VISION = ((r"^blocks_(\d+)/", r"blocks.{layer+\1}."), (r"^patch_embed_kernel", "patch_embed.proj.kernel"),
             (r"^ln_q", "merger.ln_q"), (r"^merger/fc1", "merger.mlp.0"), (r"^merger/fc2", "merger.mlp.2"))
RULES = {"published": OF_TEXT + ((r"^(layers|embed_tokens|norm)\b", r"model.\1"),),
         "transformers": OF_TEXT + ((r"^(layers|embed_tokens|norm)\b", r"model.language_model.\1"),)}
VISION_RULES = {"published": OF_VISION + ((r"^", "visual."),), "transformers": OF_VISION + ((r"^", "model.visual."),)}


def layout_of(names):
    """Of RULES, that in which a checkpoint has these names."""
    return "transformers" if any(name.startswith("model.language_model.") for name in names) else "published"


def from_torch(tensors, config, vision):
    """A checkpoint's tensors (name -> array), in either layout -> params of the language model and of the tower, numpy.

    ValueError names missing, unknown, misshapen keys.
    """
    layout = layout_of(tensors)
    shapes = {"llm": jax.eval_shape(lambda: init(config, jax.random.key(0))),
              "vision": jax.eval_shape(lambda: init_vision(vision, jax.random.key(0)))}
    rules = {"llm": RULES[layout], "vision": VISION_RULES[layout]}
    params = torch_keys.to_params(tensors, shapes, rules, unread(tensors, config))
    return params["llm"], params["vision"]


def unread(names, config):
    """Tensors that a checkpoint may hold and nothing here reads: a tied head, under its own name."""
    return [name for name in names if name == "lm_head.weight"] if config.tie_word_embeddings else []
