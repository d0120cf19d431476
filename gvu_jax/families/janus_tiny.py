"""A tiny Janus for the shapes world: how it is made, and how it learns to see and to paint before it learns to read and
to draw (shapes/pretrain.py). One patch of SigLIP's tower and one code of VQ-16 are 16 pixels, which is one cell.

    tower        the tower learns to name what stands in each cell, and in which column the cell is
    codes        VQ-16, which is drawn with, is an autoencoder through noisy unit vectors; they are clustered into the
                 codebook
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gvu_jax.families.janus import ASSISTANT, BEGIN, BOS, END, PAD, PICTURE, USER, Janus
from gvu_jax.models import llama, siglip, vq
from gvu_jax.shapes import world
from gvu_jax.shapes.learn import NAMES, cluster, fit, unit
from gvu_jax.shapes.tokenizer import UNKNOWN, of_words

# What of config.model and config.pretrain is this family's.
PARTS = "vision", "vq", "tower", "codes"
END_OF_TEXT = "<｜end▁of▁sentence｜>"


def tiny(config):
    """The model of a config of the shapes world, without parameters: of model.ar and model.vision it takes what its own
    Llama and SigLIP have."""
    model, side = config.model, config.world.side
    if model.vq.codebook_size < NAMES:
        raise ValueError(f"model.vq.codebook_size is {model.vq.codebook_size}, but there are {NAMES} things to draw")
    codes = vq.Config(**{**model.vq, "multipliers": tuple(model.vq.multipliers)})
    if codes.downscale != world.CELL:
        raise ValueError(f"model.vq.multipliers has {len(codes.multipliers)} levels, so that a code is "
                         f"{codes.downscale} pixels wide, but a cell {world.CELL}")
    tokenizer = words_of_shapes()
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "rope_theta")
    ar = llama.Config(**{name: model.ar[name] for name in shared}, vocab_size=len(tokenizer),
                      image_vocab_size=model.vq.codebook_size, code_width=model.vq.codebook_dim,
                      vision_width=model.vision.width, image_head_width=model.ar.hidden_size,
                      remat=model.get("remat", "nothing"))
    tower = "width", "layers", "heads", "mlp_hidden", "patch_size"
    vision = siglip.Config(**{name: model.vision[name] for name in tower}, pos_table_side=side)
    pixels = side * world.CELL
    return Janus(ar=ar, vision=vision, vq=codes, tokenizer=tokenizer, grid=(side, side), instruction=model.instruction,
                 transform=siglip.Transform(image_size=pixels, min_size=world.CELL), guidance=1.0, of_shapes=True)


def words_of_shapes():
    """The tokenizer: the world's words, and what stands around them."""
    return of_words((PAD, UNKNOWN, BOS, END_OF_TEXT, USER, ASSISTANT, PICTURE, BEGIN, END), silent=":\n",
                    pad_token=PAD, eos_token=END_OF_TEXT, bos_token=BOS)


def learn_pictures(umm, params, scenes, settings, rng, key):
    """Everything but the backbone learns from scenes [M, cells]. settings: config.pretrain. Returns the params."""
    params = train_tower(umm, params, scenes, settings.tower, rng, key)
    return train_vq(umm, params, scenes, settings.codes, rng, key)


def begin(params, rng):
    """The backbone, whose codes begin alike where their vectors are: the table of codes is the codebook, and the head's
    columns are random projections of it, each at the size that it has by chance."""
    ar, codebook = params["ar"], np.asarray(params["vq"]["codebook"])                               # [V, C]
    table, head = ar["gen_embed_tokens"]["embedding"], ar["gen_head"]["fc2"]                    # [V, C]; kernel [D, V]
    directions = (codebook - codebook.mean(axis=0)) / codebook.std()
    mixed = rng.normal(0, directions.shape[1] ** -0.5, (len(head["kernel"]), directions.shape[1])) @ directions.T
    sized = lambda values, like: jnp.asarray(values * np.std(like) / np.std(values), jnp.float32)
    return {**ar, "gen_embed_tokens": {"embedding": sized(directions, table)},
            "gen_head": {**ar["gen_head"], "fc2": {**head, "kernel": sized(mixed, head["kernel"])}}}


# ---- the tower ---------------------------------------------------------------------------------------------------

def train_tower(umm, params, scenes, settings, rng, key):
    """From a patch's features, with noise added, linear heads name what is in the cell and its column. Columns, because
    the backbone could hardly find them by itself (see xomni_tiny.py)."""
    def loss(trained, batch, key):
        pictures = batch["pictures"]
        features = umm.see({"vision": trained["vision"]}, pictures["pixels"])
        noisy = features + NOISE * jax.random.normal(key, features.shape)                           # [B, N, D]
        named = sum(optax.softmax_cross_entropy_with_integer_labels(noisy @ trained[what], pictures[what]).mean()
                    for what in ("object", "column"))
        return named, {"naming": named}

    D, columns = umm.vision.width, umm.grid[1]
    heads = {"object": jax.random.normal(key, (D, NAMES)) * D ** -0.5,
             "column": jax.random.normal(key, (D, columns)) * D ** -0.5}
    data = {"pictures": {"pixels": world.render(scenes, rng), "object": scenes.astype(np.int32),
                         "column": np.broadcast_to(np.arange(scenes.shape[1]) % columns, scenes.shape)}}
    trained = fit("tower", loss, {"vision": params["vision"], **heads}, data, settings, key)
    return {**params, "vision": trained["vision"]}


NOISE = 0.5       # beside features of variance 1


# ---- the tokenizer that is drawn with ------------------------------------------------------------------------------

def train_vq(umm, params, scenes, settings, rng, key):
    """VQ-16 as an autoencoder whose middle is a unit vector a cell with noise added, as wide as what a code leaves out.
    A linear head names what is in the cell, so that what looks alike (a yellow circle and a yellow square) has codes of
    its own. The vectors are then clustered into the codebook, which the decoder, used to noise, reads as it is."""
    model, pixels = vq.VQ(umm.vq), world.render(scenes, rng)
    apply = lambda params, x, method: model.apply({"params": params}, x, method=method)
    paint = lambda vq, vectors: vq.decoder(vq.post_quant_conv(vectors))                             # of vq.VQ

    def loss(trained, batch, key):
        pictures = batch["pictures"]
        vectors = unit(apply(trained["vq"], pictures["pixels"], "project"))                         # [B, r, c, C]
        vectors = unit(vectors + BLUR * jax.random.normal(key, vectors.shape))
        named = optax.softmax_cross_entropy_with_integer_labels(
            vectors.reshape(*pictures["object"].shape, -1) @ trained["object"], pictures["object"]).mean()
        painted = jnp.mean((apply(trained["vq"], vectors, paint) - (pictures["pixels"] * 2 - 1)) ** 2)
        return PAINTING * painted + named, {"painting": painted, "naming": named}

    head = 3 * jax.random.normal(key, (umm.vq.codebook_dim, NAMES))
    data = {"pictures": {"pixels": pixels, "object": scenes.astype(np.int32)}}
    trained = fit("codes", loss, {"vq": params["vq"], "object": head}, data, settings, key)["vq"]
    vectors = unit(jax.jit(lambda params, pixels: apply(params, pixels, "project"))(trained, pixels[:1024]))
    codebook = cluster(np.asarray(vectors).reshape(-1, umm.vq.codebook_dim), umm.vq.codebook_size, rng)
    return {**params, "vq": {**trained, "codebook": jnp.asarray(codebook)}}


BLUR, PAINTING = 0.1, 10     # the noise in each direction; weight of the picture beside what it is called
