"""Pretraining of the tiny base model, all in the shapes world, from nothing.

    1. pictures         what sees and what paints, each family in its own way (families/NAME_tiny.py)
    2. backbone         next-token prediction in both directions: pictures -> captions, full descriptions, answers to
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
from flax import struct

from gvu_jax import checkpoint, cli, families, objectives, rewards
from gvu_jax.models.layers import platform
from gvu_jax.shapes import sentences, world
from gvu_jax.shapes.learn import fit, muon

STAGES = 6         # to be raised when a stage changes what comes out: no older base is then taken for a new one
# What of config.model and config.pretrain shapes the base of every family.
SHARED = "ar", "instruction", "seed", "scenes", "crowded", "positions", "backbone"


def base_folder(config):
    """Where the base of this config is cached: <config.cache>/base-<hash of what shapes it>."""
    parts = (*SHARED, *families.tiny_of(config).PARTS)
    shaping = {name: {part: x for part, x in config[name].to_dict().items() if part in parts}
               for name in ("model", "pretrain")} | {"world": config.world.to_dict()}
    shaping |= {"family": kind} if (kind := config.get("family", families.FIRST)) != families.FIRST else {}
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


def build(config):
    """The untrained model of a config: (umm, params)."""
    umm = families.tiny_of(config).tiny(config)
    checkpoint.shapes(umm)
    # It runs once, and is hundreds of small kernels: on a CPU most of its time is to compile them well.
    options = {"xla_backend_optimization_level": 0} if platform() == "cpu" else None
    init = checkpoint.traced_init(umm).lower().compile(compiler_options=options)
    return umm, init(jax.random.key(config.pretrain.seed))


def pretrain(config):
    """Runs both stages. Returns (umm, params)."""
    settings, place, tiny = config.pretrain, world.World(**config.world), families.tiny_of(config)
    umm, params = build(config)
    rng = np.random.default_rng(settings.seed)
    key = jax.random.key(settings.seed + 1)
    crowded = world.crowded_scenes(rng, settings.crowded, place)
    params = tiny.learn_pictures(umm, params, crowded, settings, rng, key)
    ar, draw = tiny.begin(params, rng), getattr(tiny, "learn_drawing", None)
    return umm, train_backbone(umm, params, ar, place, settings, rng, key, draw)


# ---- backbone --- -------------------------------------------------------------------------------------------------

@struct.dataclass
class Pairs:
    """Pictures seen, a tree of [M, ..], and what is said of each: prompts (umm.Prompts) [M, ..] or, K texts each,
    [M, K, ..]. answer: which of their words are learned, bool [M, (K,) L]; None: all. For drawing, `seen` is what the
    pictures are as something to draw (umm.image_target)."""
    seen: object
    prompts: object
    answer: object = None


def train_backbone(umm, params, ar, place, settings, rng, key, draw=None):
    """Next-token prediction both ways, through the very calls that GvU uses, in two lessons.

    Which of two objects stands left of the other is learned last among many things to learn, and soon where there is
    nothing else: so positions of two objects, read and drawn, are the first lesson (unless it has 0 steps), and a
    quarter of the captions in the second. What had never been drawn rightly would earn no reward. Of drawing a share
    `mismatched` is taught with pictures of other prompts: that decides how weak it starts.

    ar: the backbone as it begins. draw: a family's last lesson, learn_drawing, which draws from descriptions as well,
    each of its own picture.
    """
    see, target, forbidden = jax.jit(umm.see), jax.jit(umm.image_target), world.compositions(world.split_prompts()[1])

    def look(scenes, *calls):
        """What each of `calls` makes of one picture of each scene, trees of [M, ..]."""
        found = []
        for chunk in np.array_split(scenes, -(-len(scenes) // 512)):
            pixels = world.render(chunk, rng)
            found.append([jax.device_get(call(params, pixels)) for call in calls])
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def loss(ar, batch, key):
        trained, losses = {"ar": ar}, {}
        for name, part in batch.items():
            prompts = jax.tree.map(flat, part.prompts)                                              # [M*K, ..]
            if name == "prompts":
                logps = -umm.image_nll(trained, prompts, part.seen, key)
                losses["drawing"] = objectives.cross_entropy(logps, jnp.ones_like(logps, bool))
            else:
                seen = part.seen
                if name == "questions" and asks_first(umm):
                    seen = jax.tree.map(lambda x: jnp.repeat(x, QUESTIONS, axis=0), seen)
                logps, mask = umm.text_logps(trained, seen, prompts)
                losses[name] = objectives.cross_entropy(logps, mask if part.answer is None else flat(part.answer))
        return sum(losses.values()) + (EMPHASIS - 1) * losses.get("drawing", 0.0), losses

    lesson = settings.backbone
    if settings.positions.steps:
        scenes = world.sample_scenes(rng, settings.scenes, place, {"two": 1.0})
        told = write_captions(umm, look(scenes, see, target), scenes, rng, forbidden, {"position": 1})
        positions, drawing = (told.replace(seen=looked) for looked in told.seen)
        data = {"positions": positions, "prompts": to_draw(drawing, lesson.mismatched, rng)}
        ar = fit("positions", loss, ar, data, settings.positions, key, muon)

    scenes = world.sample_scenes(rng, settings.scenes, place)
    crowds = world.crowded_scenes(rng, settings.crowded, place, share=0.4)
    seen, drawn = look(scenes, see, target)
    captions = write_captions(umm, seen, scenes, rng, forbidden)
    if settings.positions.steps:                                            # else they would be forgotten
        captions = jax.tree.map(lambda x, y: np.concatenate([x, y[:len(x) // 3]]), captions, positions)
    drawing = to_draw(write_captions(umm, drawn, scenes, rng, forbidden, DRAWN), lesson.mismatched, rng)
    descriptions = [(i, sentences.INSTRUCTIONS[1], sentences.describe(scene)) for i, scene in enumerate(crowds)]
    data = {"captions": captions, "descriptions": encode_pairs(umm, *look(crowds, see), descriptions),
            "questions": write_questions(umm, seen, scenes, rng, forbidden), "prompts": drawing}
    params = {**params, "ar": fit("backbone", loss, ar, data, lesson, jax.random.fold_in(key, 1), muon)}
    if draw is None:
        return params
    others = world.sample_scenes(rng, settings.scenes, place, {"anything": 1.0})
    others = others[[no_prompt_asks_for(scene) for scene in others]]
    described = [(i, None, sentences.describe(scene)) for i, scene in enumerate(others)]
    texts = {"prompts": drawing, "descriptions": encode_pairs(umm, *look(others, target), described)}
    return draw(umm, params, texts, settings, jax.random.fold_in(key, 2))


def to_draw(told, mismatched, rng):
    """Pairs of one text each that drawing is taught with: of the share `mismatched` the prompt is another picture's."""
    each = np.repeat(np.arange(len(told.prompts.words)), CAPTIONS)
    mixed = np.where(rng.random(len(each)) < mismatched, rng.permutation(len(each)), np.arange(len(each)))
    return Pairs(jax.tree.map(lambda x: x[each[mixed]], told.seen), jax.tree.map(flat, told.prompts))


def no_prompt_asks_for(scene):
    """Whether a scene holds three or four objects that are not all of one shape. Prompts ask for two things at most, or
    for several of one shape: so no picture of a held-out prompt is taught in a description's words."""
    shapes = {shape for _, shape, _ in sentences.objects_of(scene)}
    return 3 <= np.count_nonzero(scene) <= 4 and len(shapes) > 1


def flat(x):
    """K texts of each of M pictures, [M, K, ..] -> [M*K, ..]."""
    return x.reshape(-1, x.shape[-1])


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
    pairs = encode_pairs(umm, seen, asked)
    return side_by_side(pairs if asks_first(umm) else put_into_words(pairs), QUESTIONS)


def asks_first(umm):
    """Whether a family's question stands before the picture, which then has to be read for each question anew."""
    return getattr(umm, "asks_first", False)


QUESTIONS = 6       # of one picture: two for yes or no, four of detail


def ask_all(scene, caption, others, rng, forbidden):
    """QUESTIONS about a scene, (question, answer): whether a prompt describes it, twice, and its details. Or none,
    where the scene leaves too little to ask.

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
    return Pairs(jax.tree.map(lambda x: x[np.array(index)], seen), jax.tree.map(lambda x: x[said], prompts))


def side_by_side(pairs, K):
    """Each K rows, which are of one picture, become one: it is read once for all of its texts."""
    return pairs.replace(seen=jax.tree.map(lambda x: x[::K], pairs.seen), **{name: jax.tree.map(
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
