"""A tiny Show-o for the shapes world: how it is made, and how its image tokenizer learns before its backbone learns to
read and to draw (shapes/pretrain.py). One code of MAGVIT is 16 pixels, which is one cell; it is read and drawn alike.

    codes        MAGVIT learns to tell a code's bits, which are of a shape, a color and a column, and to paint them
"""
import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax.families.showo import ADDED, PAD, Showo
from gvu_jax.models import magvit, phi
from gvu_jax.models.vae import depth_to_space, space_to_depth
from gvu_jax.models.vq import to_pixels
from gvu_jax.shapes import world
from gvu_jax.shapes.learn import fit, tell_what_comes_back
from gvu_jax.shapes.tokenizer import UNKNOWN, of_words

# What of config.model and config.pretrain is this family's.
PARTS = "magvit", "rounds", "heat", "codes"
END_OF_TEXT = "<|endoftext|>"


def tiny(config):
    """The model of a config of the shapes world, without parameters: of model.ar it takes what its own Phi has."""
    model, side = config.model, config.world.side
    vq = magvit.Config(**{name: tuple(x) if isinstance(x, (list, tuple)) else x for name, x in model.magvit.items()})
    if vq.bits < (bits := bits_needed(side)):
        raise ValueError(f"model.magvit.bits is {vq.bits}, but a world of side {side} needs {bits}, for the shape, the "
                         "color and the column of what a code stands for")
    if vq.downscale != world.CELL:
        raise ValueError(f"model.magvit.encoder_blocks has {len(vq.encoder_blocks)} levels, so that a code is "
                         f"{vq.downscale} pixels wide, but a cell {world.CELL}")
    tokenizer = words_of_shapes()
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "rope_theta")
    ar = phi.Config(**{name: model.ar[name] for name in shared}, vocab_size=len(tokenizer) + vq.codebook_size + 1,
                    image_vocab_size=vq.codebook_size, remat=model.get("remat", "nothing"))
    return Showo(ar=ar, vq=vq, tokenizer=tokenizer, grid=(side, side), rounds=model.rounds, heat=model.heat,
                 instruction=model.instruction, guidance=1.0, of_shapes=True)


def words_of_shapes():
    """A tokenizer of the shapes world's words, with what Show-o adds behind them."""
    return of_words((END_OF_TEXT, UNKNOWN, "USER", "ASSISTANT"), (PAD, *ADDED), silent=":\n", pad_token=PAD,
                    eos_token=END_OF_TEXT)


def learn_pictures(umm, params, scenes, settings, rng, key):
    """Everything but the backbone learns from scenes [M, cells]. settings: config.pretrain. Returns the params."""
    params = train_codes(umm, params, scenes, settings.codes, rng, key)
    there_and_back = jax.jit(lambda vq, pixels: magvit.Magvit(umm.vq).apply({"params": vq}, pixels)[1])
    few = scenes[:256]
    back = there_and_back(params["vq"], world.render(few, np.random.default_rng(0)))
    tell_what_comes_back("codes", few, np.asarray(to_pixels(back)))
    return params


def begin(params, rng):
    """The backbone, whose codes begin alike where their bits are: their rows in the table and in the head are random
    projections of the bits, at the size that they have by chance."""
    ar, vq = params["ar"], params["vq"]
    bits = len(vq["encoder"]["quant_conv"]["bias"])
    signs = np.asarray(magvit.vectors(jnp.arange(2 ** bits), bits))                                 # [K, bits]
    table, head = np.array(ar["lm_embed_tokens"]["embedding"]), np.array(ar["lm_head"]["kernel"])   # [V, D], [D, V]
    codes = slice(len(table) - 1 - len(signs), len(table) - 1)
    project = lambda like: like.std() * signs @ rng.normal(0, bits ** -0.5, (bits, table.shape[1]))
    table[codes], head[:, codes] = project(table), project(head).T
    return {**ar, "lm_embed_tokens": {"embedding": jnp.asarray(table)},
            "lm_head": {**ar["lm_head"], "kernel": jnp.asarray(head)}}


# ---- the image tokenizer -----------------------------------------------------------------------------------------

def train_codes(umm, params, scenes, settings, rng, key):
    """MAGVIT's two halves side by side: the encoder learns the bits of code_of, the decoder to paint from them.

    An autoencoder that had to find bits of its own found the same ones for green and for purple, with some seeds.
    Whoever draws may put any code anywhere: so the decoder paints the cells in an order of their own.
    """
    model, cell = magvit.Magvit(umm.vq), world.CELL
    apply = lambda vq, x, method: model.apply({"params": vq}, x, method=method)
    paint = lambda magvit, signs: magvit.decoder(signs)                                             # of magvit.Magvit

    def loss(vq, batch, key):
        pixels, signs = batch["pictures"]["pixels"], magvit.vectors(batch["pictures"]["codes"], umm.vq.bits)
        latents = apply(vq, pixels, "latents")                                                      # [B, r, c, bits]
        wrong = -jax.nn.log_sigmoid(latents * signs.reshape(latents.shape)).sum(axis=-1).mean()
        places = jnp.argsort(jax.random.uniform(key, signs.shape[:2]), axis=1)[..., None]
        moved = lambda x: jnp.take_along_axis(x.reshape(signs.shape[:2] + (-1,)), places, axis=1).reshape(x.shape)
        target = depth_to_space(moved(space_to_depth(pixels * 2 - 1, cell)), cell)
        painted = jnp.mean((apply(vq, moved(signs.reshape(latents.shape)), paint) - target) ** 2)
        return PAINTING * painted + wrong, {"painting": painted, "bits": wrong}

    data = {"pictures": {"pixels": world.render(scenes, rng), "codes": code_of(scenes, umm.grid[1])}}
    return {**params, "vq": fit("codes", loss, params["vq"], data, settings, key)}


PAINTING = 20                                                                          # the weight of what is painted


def code_of(scenes, columns):
    """scenes [M, cells] -> the code of each cell, int32 [M, cells]: bits of the shape, 0 for none; of the color; and of
    the column, because the backbone could hardly find it by itself (see xomni_tiny.py)."""
    shape, color = np.divmod(scenes.astype(np.int32) - 1, len(world.COLORS))                     # an empty cell: -1
    shape, color = shape + 1, np.where(scenes > 0, color, 0)
    return (shape << COLOR_BITS | color) << (columns - 1).bit_length() | np.arange(scenes.shape[1]) % columns


def bits_needed(columns):
    """Of code_of, in a world of so many columns."""
    return SHAPE_BITS + COLOR_BITS + (columns - 1).bit_length()


SHAPE_BITS, COLOR_BITS = len(world.SHAPES).bit_length(), (len(world.COLORS) - 1).bit_length()
