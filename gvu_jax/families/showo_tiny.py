"""A tiny Show-o for the shapes world: how it is made, and how its image tokenizer learns before its backbone learns to
read and to draw (shapes/pretrain.py). One code of MAGVIT is 16 pixels, which is one cell; it is read and drawn alike.

    codes        MAGVIT is an autoencoder whose middle is the signs of its channels
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gvu_jax.families.showo import ADDED, PAD, Showo
from gvu_jax.models import magvit, phi
from gvu_jax.models.vae import depth_to_space, space_to_depth
from gvu_jax.models.vq import to_pixels
from gvu_jax.shapes import world
from gvu_jax.shapes.learn import NAMES, fit, tell_what_comes_back
from gvu_jax.shapes.tokenizer import UNKNOWN, of_words

# What of config.model and config.pretrain is this family's.
PARTS = "magvit", "rounds", "heat", "codes"
END_OF_TEXT = "<|endoftext|>"


def tiny(config):
    """The model of a config of the shapes world, without parameters: of model.ar it takes what its own Phi has."""
    model, side = config.model, config.world.side
    vq = magvit.Config(**{name: tuple(x) if isinstance(x, (list, tuple)) else x for name, x in model.magvit.items()})
    if vq.codebook_size < (codes := NAMES * side):
        raise ValueError(f"model.magvit.bits is {vq.bits}, which makes {vq.codebook_size} codes, but a world of side "
                         f"{side} needs {codes}: one for each thing in each column")
    if vq.downscale != world.CELL:
        raise ValueError(f"model.magvit.encoder_blocks has {len(vq.encoder_blocks)} levels, so that a code is "
                         f"{vq.downscale} pixels wide, but a cell {world.CELL}")
    tokenizer = of_words((END_OF_TEXT, UNKNOWN, "USER", "ASSISTANT"), (PAD, *ADDED), silent=":\n", pad_token=PAD,
                         eos_token=END_OF_TEXT)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "rope_theta")
    ar = phi.Config(**{name: model.ar[name] for name in shared}, vocab_size=len(tokenizer) + vq.codebook_size + 1,
                    image_vocab_size=vq.codebook_size, remat=model.get("remat", "nothing"))
    return Showo(ar=ar, vq=vq, tokenizer=tokenizer, grid=(side, side), rounds=model.rounds, heat=model.heat,
                 instruction=model.instruction, guidance=1.0, of_shapes=True)


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
    """MAGVIT as an autoencoder through the signs of its channels, to which noise is added; the gradient passes them as
    that of tanh.

    The bits must tell apart what is in the cell, and in which column the cell is: linear heads name both. Columns,
    because the backbone could hardly find them by itself (see xomni_tiny.py). Whoever draws may put any code anywhere:
    so the decoder paints the cells in an order of their own.
    """
    model, columns, cell = magvit.Magvit(umm.vq), umm.grid[1], world.CELL
    apply = lambda vq, x, method: model.apply({"params": vq}, x, method=method)
    paint = lambda magvit, signs: magvit.decoder(signs)                                             # of magvit.Magvit

    def loss(trained, batch, key):
        pictures, keys = batch["pictures"], jax.random.split(key)
        latents = apply(trained["vq"], pictures["pixels"], "latents")                               # [B, r, c, bits]
        soft = jnp.tanh(latents)
        hard = jnp.where(latents + BLUR * jax.random.normal(keys[0], latents.shape) > 0, 1.0, -1.0)
        signs = soft + jax.lax.stop_gradient(hard - soft)
        flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])                                     # [B, N, ..]
        named = {what: optax.softmax_cross_entropy_with_integer_labels(
            flat(signs) @ trained[what], pictures[what]).mean() for what in ("object", "column")}
        places = jnp.argsort(jax.random.uniform(keys[1], pictures["object"].shape), axis=1)[..., None]
        moved = lambda x: jnp.take_along_axis(flat(x), places, axis=1).reshape(x.shape)
        target = depth_to_space(moved(space_to_depth(pictures["pixels"] * 2 - 1, cell)), cell)
        painted = jnp.mean((apply(trained["vq"], moved(signs), paint) - target) ** 2)
        return PAINTING * painted + sum(named.values()), {"painting": painted, **named}

    heads = {"object": jax.random.normal(key, (umm.vq.bits, NAMES)),
             "column": jax.random.normal(key, (umm.vq.bits, columns))}
    data = {"pictures": {"pixels": world.render(scenes, rng), "object": scenes.astype(np.int32),
                         "column": np.broadcast_to(np.arange(scenes.shape[1]) % columns, scenes.shape)}}
    return {**params, "vq": fit("codes", loss, {"vq": params["vq"], **heads}, data, settings, key)["vq"]}


BLUR, PAINTING = 0.5, 20       # noise beside channels that training drives away from zero; weight of the picture
