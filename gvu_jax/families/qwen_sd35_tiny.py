"""A tiny Qwen2.5-VL with SD3.5 for the shapes world: how it is made, and how it learns to see before it learns to read
and to draw (shapes/pretrain.py). A cell of the tower, 2 x 2 patches, is one of the world's, and so is a patch of the
drawer, 2 x 2 latents.

    tower        learns to name what stands in each cell; where a cell is, the captioner's positions say
    autoencoder  pixels <-> latents, by principal components
    drawing      behind the backbone's lessons, which teach both halves, the drawer goes on from a reader that stands
                 still, as UAE's does: from prompts, and from descriptions, which say where each thing is
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gvu_jax.families.qwen_sd35 import BEGIN, END, PAD, PICTURE, STOP, TURN, QwenSD35
from gvu_jax.flow import Flow
from gvu_jax.models import qwen25_vl, sd3, vae
from gvu_jax.shapes import world
from gvu_jax.shapes.learn import NAMES, fit, muon
from gvu_jax.shapes.tokenizer import UNKNOWN, of_words

# What of config.model and config.pretrain is this family's.
PARTS = "vision", "vae", "dit", "flow", "tower", "drawing"
# Columns have the slowest angles of a head. With the published base, or X-Omni's, they would hardly turn from one cell
# to the next, and left could not be told from right; much faster ones would lose what stands twenty words away.
ROPE_THETA = 30.0


def tiny(config):
    """The model of a config of the shapes world, without parameters: of model.ar and model.vision it takes what its own
    Qwen2 and tower have."""
    model, side = config.model, config.world.side
    if model.vision.patch_size != world.CELL or model.vae.patch_size != world.CELL:
        raise ValueError(f"model.vision.patch_size is {model.vision.patch_size} and model.vae.patch_size "
                         f"{model.vae.patch_size}, but a cell is {world.CELL} pixels wide: both must be that")
    tokenizer = of_words((PAD, UNKNOWN, TURN, STOP, BEGIN, PICTURE, END), silent="\n", pad_token=PAD, eos_token=STOP)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    half, width = model.ar.hidden_size // model.ar.num_attention_heads // 2, model.dit.joint_attention_dim
    places = (half - 2) // 2                                     # angles of rows, and of columns; the rest are of time
    ar = qwen25_vl.Config(
        **{name: model.ar[name] for name in shared}, vocab_size=len(tokenizer), tie_word_embeddings=False,
        mrope_section=(half - 2 * places, places, places), rms_norm_eps=1e-6, rope_theta=ROPE_THETA,
        projected=(width, width), remat=model.get("remat", "nothing"))
    vision = qwen25_vl.VisionConfig(
        depth=model.vision.layers, hidden_size=model.vision.width, intermediate_size=model.vision.mlp_hidden,
        num_heads=model.vision.heads, out_hidden_size=model.ar.hidden_size, patch_size=world.CELL // 2,
        spatial_merge_size=2, temporal_patch_size=1, window_size=world.CELL,
        fullatt_block_indexes=(model.vision.layers - 1,))
    autoencoder = vae.PatchConfig(**model.vae)
    dit = sd3.Config(in_channels=autoencoder.latent_channels, pos_embed_max_size=side, **model.dit)
    return QwenSD35(
        ar=ar, vision=vision, dit=dit, vae=autoencoder, flow=Flow(model.flow.steps), tokenizer=tokenizer,
        grid=(side, side), transform=qwen25_vl.Transform(world.CELL ** 2, (side * world.CELL) ** 2, twice=False),
        pooled=(0.0,) * dit.pooled_projection_dim, instruction=model.instruction, negative="", guidance=1.0,
        shift=model.flow.shift)


def learn_pictures(umm, params, scenes, settings, rng, key):
    """Tower and autoencoder learn from scenes [M, cells]. settings: config.pretrain. Returns the params."""
    params = {**params, "vae": jax.device_put(vae.principal_components(world.render(scenes, rng), umm.vae))}
    return train_tower(umm, params, scenes, settings.tower, rng, key)


def begin(params, rng):
    """The backbone, as chance has made it, but for the drawer's table of positions: as long as the published sinusoids,
    sqrt(D / 2), but each place in a direction of its own. Of sinusoids made for 192 patches a side three neighbours
    hardly differ, and the drawer did not learn where things are to be."""
    dit, table = params["ar"]["dit"], params["ar"]["dit"]["pos_embed"]                              # [1, side^2, D]
    apart = rng.standard_normal(table.shape).astype(np.float32) * np.sqrt(0.5, dtype=np.float32)
    return {**params["ar"], "dit": {**dit, "pos_embed": jnp.asarray(apart)}}


# ---- the tower ---------------------------------------------------------------------------------------------------

def train_tower(umm, params, scenes, settings, rng, key):
    """From a cell's features, with noise added, a linear head names what is in it. The features are then made as large
    as the captioner's words are."""
    def loss(trained, batch, key):
        pictures = batch["pictures"]
        features = umm.see({"vision": trained["vision"]}, pictures["pixels"]).cells                 # [B, M, D]
        noisy = features / (1e-6 + jnp.std(features)) + NOISE * jax.random.normal(key, features.shape)
        named = optax.softmax_cross_entropy_with_integer_labels(noisy @ trained["object"], pictures["object"]).mean()
        return named, {"naming": named}

    D, pixels = umm.ar.hidden_size, world.render(scenes, rng)
    head = jax.random.normal(key, (D, NAMES)) * D ** -0.5
    data = {"pictures": {"pixels": pixels, "object": scenes.astype(np.int32)}}
    vision = fit("tower", loss, {"vision": params["vision"], "object": head}, data, settings, key)["vision"]
    spread = jnp.std(jax.jit(umm.see)({"vision": vision}, pixels[:512]).cells)
    last = jax.tree.map(lambda x: x * jnp.std(params["ar"]["llm"]["lm_embed_tokens"]["embedding"]) / spread,
                        vision["merger"]["fc2"])
    return {**params, "vision": {**vision, "merger": {**vision["merger"], "fc2": last}}}


NOISE = 0.5       # beside features of variance 1


# ---- the drawer --------------------------------------------------------------------------------------------------

def learn_drawing(umm, params, texts, settings, key):
    """The drawer and the projector learn by the flow-matching loss; the captioner stays as it is.

    texts: {"prompts" | "descriptions": Pairs of texts [M, ..] and targets [M, h, w, C]}. settings: config.pretrain.
    """
    llm = params["ar"]["llm"]
    both = lambda trained: {"llm": {**llm, "projector": trained["projector"]}, "dit": trained["dit"]}

    def loss(trained, batch, key):
        errors = {name: jnp.mean(umm.image_nll({"ar": both(trained)}, pairs.prompts, pairs.seen,
                                               jax.random.fold_in(key, i)))
                  for i, (name, pairs) in enumerate(batch.items())}
        return sum(errors.values()), errors

    begins = {"projector": llm["projector"], "dit": params["ar"]["dit"]}
    trained = fit("drawing", loss, begins, texts, settings.drawing, key, muon)
    return {**params, "ar": both(trained)}
