"""Pretraining of the tiny base model, all in the shapes world, from nothing.

    1. tokenizer        the ViT learns to name what stands in a cell whatever its size, and in which column; its
                        features are clustered into the codebook
    2. autoencoder      pixels <-> latents of the diffusion head, by principal components
    3. diffusion head   rectified flow from noise to latents, given the image tokens
    4. backbone         next-token prediction in both directions: pictures -> captions, full descriptions, answers to
                        questions (understanding); prompts -> pictures (generation, some of them of other prompts)

The result is cached under a hash of everything that shaped it. Held-out prompts occur nowhere in it.

    python -m gvu_jax.shapes.pretrain --config=configs/shapes.py        # trains the base alone and prints its folder
"""
import hashlib
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gvu_jax import checkpoint, cli, families, objectives, rewards
from gvu_jax.metrics import Progress
from gvu_jax.models import flux, siglip_vq, vae
from gvu_jax.shapes import sentences, world
from gvu_jax.shapes.tokenizer import build_tokenizer

STAGES = 5         # to be raised when a stage changes what comes out: no older base is then taken for a new one


def base_folder(config):
    """Where the base of this config is cached: <config.cache>/base-<hash of what shapes it>."""
    shaping = {name: config[name].to_dict() for name in ("model", "world", "pretrain")}
    shaping |= {"family": config.family} if "family" in config else {}
    for name in ("remat", "override"):                                       # of no effect on what comes out, or later
        shaping["model"].pop(name, None)
    shaping["version"] = (checkpoint.FORMAT, STAGES)
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.cache).expanduser() / f"base-{digest}"


def ensure_base(config):
    """The folder of the pretrained base, trained now if the cache does not hold it.

    Raises ValueError for a config without a world to be trained in, OSError where the cache cannot be written.
    """
    if not ("world" in config and "pretrain" in config):
        raise ValueError("this config has no world to pretrain a model in: give configs/shapes.py, or, to train a "
                         "converted model, its folder as --config.model.checkpoint")
    cli.check_numbers(config)
    folder = base_folder(config)
    if not (folder / "metadata.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder.parent):                 # better known now than after pretraining
            pass
        umm, params = pretrain(config)
        checkpoint.save_model(folder, umm, params)
    return folder


def model(config):
    """The model of a config, whose parameters are yet to be made."""
    codes = NAMES * config.world.side
    if config.model.vision.codebook_size < codes:
        raise ValueError(f"model.vision.codebook_size is {config.model.vision.codebook_size}, but a world of side "
                         f"{config.world.side} needs {codes} codes: one for each thing in each column")
    if not hasattr(family := families.of(config), "tiny"):
        raise ValueError(f"config.family is {config.family!r}, which has no tiny version for the shapes world yet")
    return family.tiny(config, build_tokenizer(config.model.vision.codebook_size))


def build(config):
    """The untrained model of a config: (umm, params)."""
    umm = model(config)
    checkpoint.shapes(umm)
    return umm, jax.jit(umm.init)(jax.random.key(config.pretrain.seed))


def pretrain(config):
    """Runs the four stages. Returns (umm, params)."""
    settings, place = config.pretrain, world.World(**config.world)
    umm, params = build(config)
    rng = np.random.default_rng(settings.seed)
    key = jax.random.key(settings.seed + 1)
    crowded = world.crowded_scenes(rng, settings.crowded, place)
    params = train_tokenizer(umm, params, crowded, settings.tokenizer, rng, key)
    params = fit_autoencoder(umm, params, crowded, rng)
    params = train_diffusion(umm, params, crowded, settings.diffusion, rng, key)
    return umm, train_backbone(umm, params, place, settings, rng, key)


def adam(rate):
    return optax.adamw(rate, b2=0.98, weight_decay=0.02)


def muon(rate):
    """Muon (Jordan et al. 2024) for the stacked kernels [layers, in, out], Adam for the rest: the backbone learns in
    60 % of Adam's steps. Its updates are as long as Adam's, so that one rate serves both (Liu et al. 2025)."""
    def matrices(params):
        spec = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        return jax.tree.map(lambda x: spec if x.ndim == 3 else None, params)
    return optax.contrib.muon(rate, weight_decay=0.02, adam_b2=0.98, adam_weight_decay=0.02, consistent_rms=0.2,
                              muon_weight_dimension_numbers=matrices)


def fit(label, loss, params, data, settings, key, optimizer=adam):
    """Minimises `loss(params, batch, key)` for settings.steps steps over random rows of `data`.

    data: {part: tree of arrays [M, ..]}, kept on the device; batch: the same with settings.batch[part] random rows of
    each.
    loss returns the scalar to descend and a dict of scalars to show. optimizer: made from its learning rates, which
    follow a cosine.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.lr, min(50, settings.steps // 4), settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer(rate))
    data = jax.device_put(data)

    @jax.jit
    def step(params, opt_state, data, i):
        rows, noise = jax.random.split(jax.random.fold_in(key, i))
        pick = lambda part, k: jax.tree.map(
            lambda x: x[jax.random.randint(k, (settings.batch[part],), 0, len(x))], data[part])
        batch = {part: pick(part, jax.random.fold_in(rows, j)) for j, part in enumerate(data)}
        grads, shown = jax.grad(loss, has_aux=True)(params, batch, noise)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, shown

    opt_state = optimizer.init(params)
    with Progress(settings.steps, "step", label) as progress:
        for i in range(settings.steps):
            params, opt_state, shown = step(params, opt_state, data, i)
            if i % 50 == 49:                        # reading back waits for the device, so not at every step
                progress.update(50, **jax.device_get(shown))
        progress.update(settings.steps % 50)
    return params


# ---- 1. tokenizer ------------------------------------------------------------------------------------------------

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


NAMES = 1 + len(world.SHAPES) * len(world.COLORS)          # what a cell can hold: nothing, or one object
DRAWING = 400   # weight of drawing beside naming: the diffusion head tells apart what is laid out as pictures are


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def cluster(vectors, count, rng):
    """Spherical k-means with k-means++ seeding: unit vectors [M, C] -> unit centres [count, C] float32."""
    centres = vectors[rng.integers(len(vectors))][None]
    distance = 1 - vectors @ centres[0]
    while len(centres) < count:
        weight = np.maximum(distance, 1e-9) ** 2
        new = vectors[rng.choice(len(vectors), p=weight / weight.sum())]
        centres = np.concatenate([centres, new[None]])
        distance = np.minimum(distance, 1 - vectors @ new)
    for _ in range(10):
        nearest = np.argmax(vectors @ centres.T, axis=1)
        for k in range(count):
            if (members := vectors[nearest == k]).size:
                centres[k] = members.mean(axis=0) / np.linalg.norm(members.mean(axis=0))
    return centres.astype(np.float32)


# ---- 2. autoencoder ----------------------------------------------------------------------------------------------

def fit_autoencoder(umm, params, scenes, rng):
    """The patch autoencoder, in closed form."""
    return {**params, "vae": jax.device_put(vae.principal_components(world.render(scenes, rng), umm.vae))}


# ---- 3. diffusion head -------------------------------------------------------------------------------------------

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
        return {"tokens": tokens, "latents": flux.pack(vae.to_latents(mean, umm.vae))}              # [B, c, N], [B, N, C]

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


# ---- 4. backbone -------------------------------------------------------------------------------------------------

@struct.dataclass
class Pairs:
    """Pictures seen [M, r, c] and what is said of each: prompts (umm.Prompts) [M, ..] or, K texts each, [M, K, ..].
    answer: which of their words are learned, bool [M, (K,) L]; None: all."""
    seen: object
    prompts: object
    answer: object = None


def train_backbone(umm, params, place, settings, rng, key):
    """Next-token prediction both ways, through the very calls that GvU uses, in two lessons.

    Which of two objects stands left of the other is learned last among many things to learn, and soon where there is
    nothing else: so positions of two objects, read and drawn, are the first lesson (unless it has 0 steps), and a
    quarter of the captions in the second. What had never been drawn rightly would earn no reward. Of drawing a share
    `mismatched` is taught with pictures of other prompts: that decides how weak it starts.
    """
    see, forbidden = jax.jit(umm.see), world.compositions(world.split_prompts()[1])
    look = lambda scenes: np.concatenate([jax.device_get(see(params, world.render(chunk, rng)))
                                          for chunk in np.array_split(scenes, -(-len(scenes) // 512))])

    def loss(ar, batch, key):
        trained, losses = {"ar": ar}, {}
        for name, part in batch.items():
            prompts = jax.tree.map(flat, part.prompts)                                              # [M*K, ..]
            if name == "prompts":
                logps = umm.image_logps(trained, prompts, part.seen.reshape(len(part.seen), -1))
                losses["drawing"] = objectives.cross_entropy(logps, jnp.ones_like(logps, bool))
            else:
                logps, mask = umm.text_logps(trained, part.seen, prompts)
                losses[name] = objectives.cross_entropy(logps, mask if part.answer is None else flat(part.answer))
        return sum(losses.values()) + (EMPHASIS - 1) * losses.get("drawing", 0.0), losses

    ar = begin_with_codebook(params["ar"], np.asarray(params["vision"]["codebook"]), rng)
    lesson = settings.backbone
    if settings.positions.steps:
        scenes = world.sample_scenes(rng, settings.scenes, place, {"two": 1.0})
        positions = write_captions(umm, look(scenes), scenes, rng, forbidden, {"position": 1})
        read_and_drawn = {"positions": positions, "prompts": to_draw(positions, lesson.mismatched, rng)}
        ar = fit("positions", loss, ar, read_and_drawn, settings.positions, key, muon)

    scenes = world.sample_scenes(rng, settings.scenes, place)
    crowds = world.crowded_scenes(rng, settings.crowded, place, share=0.4)
    seen = look(scenes)
    captions = write_captions(umm, seen, scenes, rng, forbidden)
    if settings.positions.steps:                                            # else they would be forgotten
        captions = jax.tree.map(lambda x, y: np.concatenate([x, y[:len(x) // 3]]), captions, positions)
    prompts = to_draw(write_captions(umm, seen, scenes, rng, forbidden, DRAWN), lesson.mismatched, rng)
    descriptions = [(i, sentences.INSTRUCTIONS[1], sentences.describe(scene)) for i, scene in enumerate(crowds)]
    data = {"captions": captions, "descriptions": encode_pairs(umm, look(crowds), descriptions),
            "questions": write_questions(umm, seen, scenes, rng, forbidden), "prompts": prompts}
    return {**params, "ar": fit("backbone", loss, ar, data, lesson, jax.random.fold_in(key, 1), muon)}


def to_draw(told, mismatched, rng):
    """Pairs of one text each that drawing is taught with: of the share `mismatched` the prompt is another picture's."""
    seen, prompts = np.repeat(told.seen, CAPTIONS, axis=0), jax.tree.map(flat, told.prompts)
    mixed = np.where(rng.random(len(seen)) < mismatched, rng.permutation(len(seen)), np.arange(len(seen)))
    return Pairs(seen[mixed], prompts)


def flat(x):
    """K texts of each of M pictures, [M, K, ..] -> [M*K, ..]."""
    return x.reshape(-1, x.shape[-1])


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


CAPTIONS = 4        # of one picture
CARELESS = 0.1      # share of them that may leave things out
# Drawing is one loss of four, and the slowest: it counts for three. To put two colors on two shapes is hardest.
EMPHASIS, DRAWN = 3, sentences.TAG_WEIGHTS | {"two_object": 2, "color_attr": 8}


def write_captions(umm, seen, scenes, rng, forbidden, weights=sentences.TAG_WEIGHTS):
    """CAPTIONS of each scene that a caption can tell: Pairs."""
    captions = []
    for i, scene in enumerate(scenes):
        told = [sentences.caption(scene, rng, forbidden, weights, CARELESS) for _ in range(CAPTIONS)]
        if None not in told:
            captions += [(i, None, meta["prompt"]) for meta in told]
    return side_by_side(encode_pairs(umm, seen, captions), CAPTIONS)


def write_questions(umm, seen, scenes, rng, forbidden):
    """What is asked of each scene, and the answers: Pairs."""
    captions = [sentences.caption(scene, rng, forbidden) for scene in scenes]
    others = [meta for meta in captions if meta]
    asked = [(i, *pair) for i, (scene, own) in enumerate(zip(scenes, captions))
             for pair in ask_all(scene, own, [sentences.pick(rng, others) for _ in range(2)], rng, forbidden)]
    return side_by_side(put_into_words(encode_pairs(umm, seen, asked)), QUESTIONS)


QUESTIONS = 6       # of one picture: two for yes or no, four of detail


def ask_all(scene, caption, others, rng, forbidden):
    """QUESTIONS about a scene, (question, answer): whether a prompt describes it, twice, and its details. Or none, where
    the scene leaves too little to ask.

    Yes is said of `caption`, which tells all there is, and no of wrong captions (others: two of other scenes). Where
    the scene's own is held out (caption is None), no is said twice.
    """
    wrong = [sentences.wrong_caption(scene, other, rng, forbidden) for other in others]
    details = [sentences.ask(scene, rng, forbidden) for _ in range(QUESTIONS - 2)]
    if None in (*wrong, *details):
        return []
    judged = [(caption, "yes") if caption else (wrong[1], "no"), (wrong[0], "no")]
    return [*((rewards.question(meta["prompt"]), answer) for meta, answer in judged), *details]


def encode_pairs(umm, seen, texts):
    """Pairs of texts (i, question or None, answer) and what was seen of their picture, seen[i]."""
    index, *said = zip(*texts)
    rows, said = np.unique([f"{question or umm.instruction}\t{answer}" for question, answer in zip(*said)],
                           return_inverse=True)                       # a sentence occurs a hundred times: read it once
    questions, answers = zip(*(row.split("\t") for row in rows))
    prompts = umm.encode_prompts(answers, questions=questions, end=True)
    return Pairs(seen[np.array(index)], jax.tree.map(lambda x: x[said], prompts))


def side_by_side(pairs, K):
    """Each K rows, which are of one picture, become one: it is read once for all of its texts."""
    assert (pairs.seen[::K] == pairs.seen[K - 1::K]).all()
    return pairs.replace(seen=pairs.seen[::K], **{name: jax.tree.map(
        lambda x: x.reshape(-1, K, x.shape[-1]), getattr(pairs, name)) for name in ("prompts", "answer")})


def put_into_words(pairs):
    """The same texts, but a row's own part of the question stands before its answer, as words that are read and not
    learned; what all questions begin with remains. So can one picture be read once for several questions."""
    prompts = pairs.prompts
    rows = [row[mask] for row, mask in zip(prompts.question, prompts.question_mask)]
    least = min(map(len, rows))
    begin = next(n for n in range(least + 1) if n == least or any(row[n] != rows[0][n] for row in rows))
    said = [words[mask] for words, mask in zip(prompts.words, prompts.words_mask)]
    width = max(len(row) - begin + len(words) for row, words in zip(rows, said))
    words, mask, answer = (np.zeros((len(rows), width), dtype) for dtype in (np.int32, bool, bool))
    for i, (row, answered) in enumerate(zip(rows, said)):
        whole = [*row[begin:], *answered]
        words[i, :len(whole)], mask[i, :len(whole)], answer[i, len(row) - begin:len(whole)] = whole, True, True
    question = np.tile(rows[0][:begin], (len(rows), 1))
    return pairs.replace(answer=answer, prompts=prompts.replace(
        question=question, question_mask=np.ones_like(question, bool), words=words, words_mask=mask))


def main(argv):
    del argv
    print(ensure_base(_CONFIG.value))


if __name__ == "__main__":
    from ml_collections import config_flags
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/shapes.py", "The config whose base to train.")
    cli.run(main)
