"""The suite of the shapes world: held-out prompts judged by the exact checker, and tests of understanding.

    four_way      the true caption against three others of its category
    relation      "A left of B" against "A right of B"          count    n against n +- 1
    binding       colors exchanged                              (two-way: 0.5 is chance)
"""
import functools
import itertools
import re
from typing import NamedTuple

import grain
import numpy as np

from gvu_jax.shapes import checker, sentences, world
from gvu_jax.suite import Suite

WORDS = {"numbers": world.NUMBERS, "colors": world.COLORS, "relations": world.RELATIONS}


def remove_words(prompt, kind):
    """The prompt without its words of one kind of WORDS; a relation leaves "and" behind."""
    less = re.sub(rf"\b({'|'.join(WORDS[kind])})\b", "and" if kind == "relations" else "", prompt)
    return " ".join(less.split())


def place_of(umm):
    """The World whose scenes test a model: as wide as its pictures, nine objects at most."""
    side = umm.grid[0]
    return world.World(side, min(len(world.NUMBERS), side * side))


def build(umm, programs, metas, batch, group, choices, lengths, forbidden, seed):
    """The suite for prompts `metas`, with `choices` questions in each test; four_way mentions nothing `forbidden`."""
    rng, place = np.random.default_rng(seed), place_of(umm)
    tests = {"four_way": four_way(rng, world.sample_scenes(rng, 4096, place), choices, forbidden)}
    tests |= {kind: hard_pairs(rng, kind, choices, place) for kind in HARD_KINDS}
    tests = {name: (world.render(np.stack([choice.scene for choice in test]), rng),
                    [tuple(meta["prompt"] for meta in choice.prompts) for choice in test])
             for name, test in tests.items()}
    return Suite(umm, programs, metas, batch, group, lengths, seed, checker.judge, tests)


# ---- tests of understanding --------------------------------------------------------------------------------------

class Choice(NamedTuple):
    """One question of an understanding test: which of the `prompts` is true of the `scene`? It is number 0."""

    scene: np.ndarray            # int8 [cells]
    prompts: tuple[dict, ...]


def four_way(rng, scenes, count, forbidden=frozenset()):
    """Builds `count` four-way Choices about scenes [B, cells], the six categories in turn.

    The four prompts of a choice are of one category, share the lead-in and have different compositions, none of them
    in `forbidden`; the first false one is a near miss where the scene allows it. ValueError where the scenes cannot
    serve some category (too few, or all alike).
    """
    choices = []
    for attempt in itertools.count():
        if len(choices) == count:
            return choices
        tag = world.TAGS[len(choices) % len(world.TAGS)]
        if attempt > 100 * count + 1000:
            raise ValueError(f"these {len(scenes)} scenes cannot serve {tag} (choice {len(choices)} of {count})")
        scene = sentences.pick(rng, scenes)
        spec = sentences.true_spec(tag, sentences.objects_of(scene), world.side_of(len(scene)), rng)
        if spec is None or not is_prompt(spec) or world.spec_composition(spec) in forbidden:
            continue
        others = [sentences.near_miss(spec, rng), *(sentences.any_spec(tag, rng) for _ in range(32))]
        others = [other._replace(lead_in=spec.lead_in) for other in others if is_prompt(other)]
        others = {world.spec_composition(other): world.write(other) for other in others}  # one wording each, in order
        false = [meta for key, meta in others.items() if key not in forbidden and not world.judge_scene(scene, meta)]
        if len(false) >= 3:
            choices.append(Choice(scene, (world.write(spec), *false[:3])))


def is_prompt(spec):
    """Whether a prompt can say this: captions count further than prompts ask."""
    return spec.tag != "counting" or spec.link in world.COUNTS


HARD_KINDS = {"relation": "position", "count": "counting", "binding": "color_attr"}


def hard_pairs(rng, kind, count, place=world.World()):
    """Builds `count` two-way Choices that words alone cannot solve: a true prompt against its near miss.

    `kind` is "relation" (A left of B against A right of B), "count" (n against n +- 1) or "binding" (exchanged
    colors); another raises ValueError. Text alone is at chance: every pair of prompts is as likely either way round,
    for counts by drawing (true, false) evenly from (2, 3), (3, 2), (3, 4), (4, 3), for the others by the symmetry
    of the scenes of the World `place`.
    """
    if kind not in HARD_KINDS:
        raise ValueError(f"no kind {kind!r}; the kinds are {', '.join(HARD_KINDS)}")
    number_pairs = [(a, b) for a in world.COUNTS for b in world.COUNTS if abs(a - b) == 1]
    pairs = []
    while len(pairs) < count:
        for scene in world.sample_scenes(rng, 256, place):
            spec = sentences.true_spec(HARD_KINDS[kind], sentences.objects_of(scene), place.side, rng)
            if spec is None or len(pairs) == count:
                continue
            if kind == "count":
                true_number, false_number = number_pairs[len(pairs) % len(number_pairs)]
                if spec.link != true_number:
                    continue
                false = world.write(spec._replace(link=false_number))
            else:
                false = world.write(sentences.near_miss(spec, rng))
            if not world.judge_scene(scene, false):
                pairs.append(Choice(scene, (world.write(spec), false)))
    return pairs


# ---- picture -> caption -> picture -------------------------------------------------------------------------------

def picture_stream(seed, told, place, most=None):
    """Rendered scenes of the World `place`, an endless dataset: element i is {"pixels" [H, W, 3] float32 in [0, 1],
    "prompt"} and depends on seed (a tuple of ints) and i alone.

    A scene keeps `most` of its objects (None: all). The caption is `sentences.describe`'s, in which each object is told
    with probability `told`, and one at least.
    """
    def example(i):
        rng = np.random.default_rng((*seed, i))
        scene = world.sample_scenes(rng, 1, place)[0]
        scene[rng.permutation(np.flatnonzero(scene))[most or place.cells:]] = 0
        kept = rng.random(len(scene)) < told
        kept[rng.choice(np.flatnonzero(scene))] = True
        return {"pixels": world.render(scene[None], rng)[0], "prompt": sentences.describe(np.where(kept, scene, 0))}
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
        told = sentences.read_description(caption, world.side_of(len(scene)))
    except ValueError:
        return False, False, False
    complete = bool((told == scene).all())
    return True, complete or bool(told.any() and (told == scene)[told > 0].all()), complete


@functools.cache
def prompts():
    """{text: meta} of every prompt of the world, and of the captions that count further."""
    counts = range(2, len(world.NUMBERS) + 1)
    crowds = [world.Spec(lead_in, "counting", ((world.ANY, color),), count) for lead_in in world.LEAD_INS
              for color in (None, *world.COLORS) for count in counts]
    return {meta["prompt"]: meta for meta in [*world.all_prompts(counts), *map(world.write, crowds)]}
