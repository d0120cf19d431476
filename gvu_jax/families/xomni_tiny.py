"""A tiny X-Omni for the shapes world: how it is made, and how it learns to see and to paint before it learns to read
and to draw (shapes/pretrain.py). One image token is one patch of 16 pixels, which is one cell.

    tokenizer        the ViT learns to name what stands in a cell whatever its size, and in which column; its
                     features are clustered into the codebook
    autoencoder      pixels <-> latents of the diffusion head, by principal components
    diffusion        rectified flow from noise to latents, given the image tokens
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gvu_jax.families.xomni import XOmni
from gvu_jax.models import flux, siglip_vq, vae, xomni
from gvu_jax.shapes import world
from gvu_jax.shapes.learn import NAMES, cluster, fit, unit
from gvu_jax.shapes.tokenizer import build_tokenizer

# What of config.model and config.pretrain is this family's.
PARTS = "vision", "flux", "vae", "diffusion_steps", "tokenizer", "diffusion"


def tiny(config):
    """The model of a config of the shapes world, without parameters."""
    model, side = config.model, config.world.side
    if model.vision.codebook_size < (codes := NAMES * side):
        raise ValueError(f"model.vision.codebook_size is {model.vision.codebook_size}, but a world of side {side} "
                         f"needs {codes} codes: one for each thing in each column")
    tokenizer = build_tokenizer(model.vision.codebook_size)
    text_ids = tokenizer.convert_tokens_to_ids("<MM-Token-0>")
    ar = xomni.Config(vocab_size=text_ids, mm_vocab_size=len(tokenizer) - text_ids,
                      image_vocab_size=model.vision.codebook_size, remat=model.get("remat", "nothing"), **model.ar)
    tuples = lambda settings: {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in settings.items()}
    return XOmni(ar=ar, vision=siglip_vq.Config(**model.vision), flux=flux.Config(**tuples(model.flux)),
                 vae=vae.PatchConfig(**model.vae), tokenizer=tokenizer, grid=(side, side),
                 diffusion_steps=model.diffusion_steps, instruction=model.instruction)


def learn_pictures(umm, params, scenes, settings, rng, key):
    """Everything but the backbone learns from scenes [M, cells]. settings: config.pretrain. Returns the params."""
    params = train_tokenizer(umm, params, scenes, settings.tokenizer, rng, key)
    params = fit_autoencoder(umm, params, scenes, rng)
    return train_diffusion(umm, params, scenes, settings.diffusion, rng, key)


def begin(params, rng):
    """The backbone as its own lessons find it."""
    return begin_with_codebook(params["ar"], np.asarray(params["vision"]["codebook"]), rng)


# ---- tokenizer ---------------------------------------------------------------------------------------------------

def train_tokenizer(umm, params, scenes, settings, rng, key):
    """ViT and projection, then the codebook. params["vision"] changes except for its decoding half.

    The features must tell apart what a token stands for and nothing else: what is in the cell, and in which column the
    cell is. From the unit vector of a patch, with noise added, linear heads name both, and another draws the cell in
    its canonical size and light: drawing lays the vectors out as the pictures are, naming keeps those apart that look
    alike (a yellow circle and a yellow square).

    Columns, because features of vision transformers know places too, and because the backbone could hardly find them
    by itself: it would have to take the index of a token modulo 3, and no rotary frequency turns that fast. Rows are
    the slow part of the index, which it reads easily.
    """
    model, patch = siglip_vq.SiglipVQ(umm.vision), umm.vision.patch_size

    def loss(trained, batch, key):
        pictures = batch["pictures"]
        vectors = unit(model.apply({"params": trained["vision"]}, pictures["pixels"], method="project"))
        noisy = vectors + 0.1 * jax.random.normal(key, vectors.shape)                               # [B, r, c, C]
        named = sum(optax.softmax_cross_entropy_with_integer_labels(noisy @ trained[what], pictures[what]).mean()
                    for what in ("object", "column"))
        target = vae.space_to_depth(pictures["canonical"], patch)                                   # [B, r, c, 3pp]
        drawn = jnp.mean((noisy @ trained["draw"]["kernel"] + trained["draw"]["bias"] - target) ** 2)
        return named + DRAWING * drawn, {"naming": named, "drawing": drawn}

    size, C, (rows, columns) = 3 * patch * patch, umm.vision.codebook_dim, umm.grid
    heads = {"object": jax.random.normal(key, (C, NAMES)), "column": jax.random.normal(key, (C, columns)),
             "draw": {"kernel": jax.random.normal(key, (C, size)) * 0.1, "bias": jnp.zeros(size)}}
    data = {"pictures": {"pixels": world.render(scenes, rng), "canonical": world.render(scenes),
                         "object": scenes.astype(np.int32).reshape(-1, rows, columns),
                         "column": np.broadcast_to(np.arange(columns), (len(scenes), rows, columns))}}
    trained = fit("tokenizer", loss, {"vision": params["vision"], **heads}, data, settings, key)

    vectors = unit(jax.jit(lambda p, x: model.apply({"params": p}, x, method="project"))(
        trained["vision"], data["pictures"]["pixels"][:1024]))
    codebook = cluster(np.asarray(vectors).reshape(-1, umm.vision.codebook_dim), umm.vision.codebook_size, rng)
    return {**params, "vision": {**trained["vision"], "codebook": jnp.asarray(codebook)}}


DRAWING = 400   # weight of drawing beside naming: the diffusion head tells apart what is laid out as pictures are


# ---- autoencoder -------------------------------------------------------------------------------------------------

def fit_autoencoder(umm, params, scenes, rng):
    """The patch autoencoder, in closed form."""
    return {**params, "vae": jax.device_put(vae.principal_components(world.render(scenes, rng), umm.vae))}


# ---- diffusion head ----------------------------------------------------------------------------------------------

def train_diffusion(umm, params, scenes, settings, rng, key):
    """Rectified flow (Liu et al. 2023): at x = (1 - s) latents + s noise, predict noise - latents.

    The noise levels s are the few that sampling visits: a small model has no capacity to spare for others. Trains the
    FLUX head and the decoding half of the tokenizer together; the tokens are those of the picture, but in a share
    ASTRAY of the cells the code is that of any column. A policy may pick any code anywhere, and what has never been
    drawn comes out as ghosts, which nobody reads as an object and no reward forbids.
    """
    N, columns = umm.image_tokens, umm.grid[1]
    levels = jnp.asarray(flux.sigmas(umm.diffusion_steps, N)[:-1])
    pixels = world.render(scenes, rng)

    @jax.jit
    def prepare(params, pixels):
        mean, _ = vae.module(umm.vae).apply({"params": params["vae"]}, pixels, method="encode")
        moved = [umm.see(params, jnp.roll(pixels, k * umm.vision.patch_size, axis=2)) for k in range(columns)]
        tokens = jnp.stack([jnp.roll(tokens, -k, axis=2).reshape(-1, N) for k, tokens in enumerate(moved)], axis=1)
        return {"tokens": tokens, "latents": flux.pack(vae.to_latents(mean, umm.vae))}            # [B, c, N], [B, N, C]

    data = [jax.device_get(prepare(params, chunk)) for chunk in np.array_split(pixels, -(-len(pixels) // 256))]
    data = {"pictures": jax.tree.map(lambda *x: np.concatenate(x), *data)}

    def loss(trained, batch, key):
        tokens, latents = batch["pictures"]["tokens"], batch["pictures"]["latents"]
        keys, B = jax.random.split(key, 4), len(tokens)
        other = jax.random.bernoulli(keys[2], ASTRAY, (B, N)) * jax.random.randint(keys[3], (B, N), 0, columns)
        tokens = jnp.take_along_axis(tokens, other[:, None], axis=1)[:, 0]                          # [B, N]
        siglip = siglip_vq.SiglipVQ(umm.vision).apply({"params": trained["vision"]}, tokens, umm.grid, method="decode")
        sigma = jax.random.choice(keys[0], levels, (B,))
        noise = jax.random.normal(keys[1], latents.shape)
        noisy = latents + sigma[:, None, None] * (noise - latents)
        velocity = flux.FluxTransformer(umm.flux).apply(
            {"params": trained["flux"]}, noisy, siglip.reshape(B, N, -1),
            jnp.zeros((B, 1, umm.flux.joint_attention_dim)), jnp.zeros((B, umm.flux.pooled_projection_dim)),
            sigma, jnp.ones(B), umm.grid)
        error = jnp.mean((velocity - (noise - latents)) ** 2)
        return error, {"error": error}

    trained = fit("diffusion", loss, {"vision": params["vision"], "flux": params["flux"]}, data, settings, key)
    # Weight decay touched what the loss does not reach: the encoding half goes on as stage 1 left it.
    vision = {name: (trained if name.startswith("post_") else params)["vision"][name] for name in params["vision"]}
    return {**params, "flux": trained["flux"], "vision": vision}


ASTRAY = 0.5


# ---- backbone -------------------------------------------------------------------------------------------------------

def begin_with_codebook(ar, codebook, rng):
    """The backbone's parameters with image codes that begin alike where their vectors in the codebook [V, C] are: a red
    circle of one column is at first nearly that of another, and what is learned of one holds for both.

    Embedding and head of the codes become random projections of the codebook, its directions made equally long (most of
    its length is light and dark), at the size that they have by chance.
    """
    centred, V = codebook - codebook.mean(axis=0), len(codebook)
    directions, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:, lengths > 0.05 * lengths[0]] * np.sqrt(V)                           # [V, <= C]
    project = lambda table: table.std() * directions @ rng.normal(
        0, directions.shape[1] ** -0.5, (directions.shape[1], table.shape[1])).astype(np.float32)
    embedding = np.array(ar["mm_embed_tokens"]["embedding"])                                       # [vocabulary, D]
    head = np.array(ar["mm_head"]["kernel"]).T                                                     # [vocabulary, D]
    embedding[:V], head[:V] = project(embedding), project(head)
    return {**ar, "mm_embed_tokens": {"embedding": jnp.asarray(embedding)}, "mm_head": {"kernel": jnp.asarray(head.T)}}
