"""The suite of the shapes world: held-out prompts judged by the exact checker, and tests of understanding.

    four_way      the true caption against three others of its category
    relation      "A left of B" against "A right of B"          count    n against n +- 1
    binding       colors exchanged                              (two-way: 0.5 is chance)
"""
import functools
import re

import grain
import numpy as np

from gvu_jax.shapes import checker, world
from gvu_jax.suite import Suite

WORDS = {"numbers": world.NUMBERS, "colors": world.COLORS, "relations": world.RELATIONS}


def remove_words(prompt, kind):
    """The prompt without its words of one kind of WORDS; a relation leaves "and" behind."""
    less = re.sub(rf"\b({'|'.join(WORDS[kind])})\b", "and" if kind == "relations" else "", prompt)
    return " ".join(less.split())


def place_of(umm):
    """The World whose scenes test a model: as wide as its pictures, five objects at most."""
    side = umm.grid[0]
    return world.World(side, min(5, side * side))


def build(umm, programs, metas, batch, group, choices, lengths, forbidden, seed):
    """The suite for prompts `metas`, with `choices` questions in each test; four_way mentions nothing `forbidden`."""
    rng, place = np.random.default_rng(seed), place_of(umm)
    tests = {"four_way": world.four_way(rng, world.sample_scenes(rng, 4096, place), choices, forbidden)}
    tests |= {kind: world.hard_pairs(rng, kind, choices, place) for kind in world.HARD_KINDS}
    tests = {name: (world.render(np.stack([choice.scene for choice in test]), rng),
                    [tuple(meta["prompt"] for meta in choice.prompts) for choice in test])
             for name, test in tests.items()}
    return Suite(umm, programs, metas, batch, group, lengths, seed, checker.judge, tests)


# ---- picture -> caption -> picture -------------------------------------------------------------------------------

def picture_stream(seed, told, place, most=None):
    """Rendered scenes of the World `place`, an endless dataset: element i is {"pixels" [H, W, 3] float32 in [0, 1],
    "prompt"} and depends on seed (a tuple of ints) and i alone.

    A scene keeps `most` of its objects (None: all). The caption is `world.describe`'s, in which each object is told
    with probability `told`, and one at least.
    """
    def example(i):
        rng = np.random.default_rng((*seed, i))
        scene = world.sample_scenes(rng, 1, place)[0]
        scene[rng.permutation(np.flatnonzero(scene))[most or place.cells:]] = 0
        kept = rng.random(len(scene)) < told
        kept[rng.choice(np.flatnonzero(scene))] = True
        return {"pixels": world.render(scene[None], rng)[0], "prompt": world.describe(np.where(kept, scene, 0))}
    return grain.MapDataset.range(2**31 - 1).map(example)


def judge_captions(originals, captions, pictures):
    """What the checker says of captions and of the pictures drawn from them, {name: bool [M]}:

    language      the caption is a sentence of this world: a description, or a prompt
    correct       and what it says is so
    complete      it describes everything there is, and correctly
    recovery      the picture shows the same scene as the original, every cell of it

    originals and pictures [M, H, W, 3] in [0, 1], captions M texts.
    """
    side = originals.shape[1] // world.CELL
    scenes, drawn = checker.read_pixels(originals, side), checker.read_pixels(pictures, side)
    judged = np.array([judge_caption(caption, scene) for caption, scene in zip(captions, scenes)])
    return dict(zip(("language", "correct", "complete"), judged.T)) | {"recovery": (scenes == drawn).all(axis=1)}


def judge_caption(caption, scene):
    """(language, correct, complete) of one caption for a scene [cells]."""
    if caption in prompts():
        return True, world.judge_scene(scene, prompts()[caption]), False
    try:
        told = world.read_description(caption, world.side_of(len(scene)))
    except ValueError:
        return False, False, False
    complete = bool((told == scene).all())
    return True, complete or bool(told.any() and (told == scene)[told > 0].all()), complete


@functools.cache
def prompts():
    """{text: meta} of every prompt of the world."""
    return {meta["prompt"]: meta for meta in world.all_prompts()}
