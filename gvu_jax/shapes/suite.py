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

from gvu_jax.questions import Atom
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


def build(umm, programs, metas, batch, group, choices, lengths, forbidden, seed, view="pixels"):
    """The suite for prompts `metas`, with `choices` questions in each test; four_way mentions nothing `forbidden`."""
    rng, place = np.random.default_rng(seed), place_of(umm)
    tests = {"four_way": four_way(rng, world.sample_scenes(rng, 4096, place), choices, forbidden)}
    tests |= {kind: hard_pairs(rng, kind, choices, place) for kind in HARD_KINDS}
    tests = {name: (world.render(np.stack([choice.scene for choice in test]), rng),
                    [tuple(meta["prompt"] for meta in choice.prompts) for choice in test])
             for name, test in tests.items()}
    return Suite(umm, programs, metas, batch, group, lengths, seed, checker.judge, tests, view)


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


# ---- questions about a picture of a prompt -----------------------------------------------------------------------

def atoms_of(meta):
    """What is asked about the picture of a prompt of this world: a list of questions.Atom.

    Its models were taught few questions and read captions best. So an atom gives them the prompt and captions that
    differ from it in one point, and asks which one describes the picture; the question is their instruction. Captions
    tell all there is (see sentences.py): among those that differ in objects are some for pictures with more or fewer.
    """
    spec = world.read(meta)
    things, shapes = spec.things, [shape for shape, _ in spec.things]
    say = lambda specs: [world.write(other)["prompt"] for other in specs]
    of_kind = lambda tag, things, link=None: world.Spec(spec.lead_in, tag, tuple(things), link)
    one = lambda thing: of_kind("colors" if thing[1] else "single_object", [thing])
    others = {"object": [sentences.change(spec, i, (shape, color)) for i, (_, color) in enumerate(things)
                         for shape in world.SHAPES if shape not in shapes]}
    if spec.tag != "counting":                     # of two only one, of one more; and more than anything asks for
        others["object"] += list(map(one, things)) if len(things) == 2 else [
            of_kind("two_object", [(shapes[0], None), (shape, None)]) for shape in world.SHAPES if shape != shapes[0]]
        others["object"] += [of_kind("counting", [(shape, None)], 2) for shape in shapes]
        others["object"] += [of_kind("counting", [(world.ANY, None)], 3)]
    else:
        others["object"] += [of_kind("counting", [(world.ANY, None)], spec.link)] * (spec.link > 2)
        others["count"] = [one(things[0])] + [spec._replace(link=number) for number in range(2, len(world.NUMBERS) + 1)
                                              if number != spec.link]
    if any(color for _, color in things):
        colors = [color for _, color in things]
        others["color"] = [sentences.change(spec, i, (shape, color)) for i, (shape, own) in enumerate(things) if own
                           for color in world.COLORS if color not in colors]
        if spec.tag == "color_attr":
            others["color"].append(sentences.near_miss(spec, None))                                  # exchanged
    if spec.tag == "position":
        others["position"] = [spec._replace(link=world.INVERSE[spec.link])]
    return [Atom(skill, None, tuple((text,) for text in (meta["prompt"], *say(of_skill))), 0, end=True)
            for skill, of_skill in others.items()]


def damaged(spec, kind, rng):
    """A scene [9 cells] that does not show a Spec, and nothing much else: one of its words is another one ("word"), or
    the point that its category is about ("point"), or an object is "added" or "missing". None where nothing is found.
    """
    for _ in range(sentences.TRIES):
        if kind in ("word", "point"):
            scene = shown(sentences.slip(spec, rng) if kind == "word" else sentences.near_miss(spec, rng), rng)
        else:
            scene = shown(spec, rng)
            empty, taken = np.flatnonzero(scene == 0), np.flatnonzero(scene)
            if kind == "added":
                scene[rng.choice(empty)] = rng.integers(1, 1 + len(world.SHAPES) * len(world.COLORS))
            elif len(taken) > 1:
                scene[rng.choice(taken)] = 0
        if not world.exact_scene(scene, world.write(spec)):
            return scene
    return None


DAMAGES = "word", "point", "added", "missing"


def shown(spec, rng):
    """A random scene, int8 [9], that shows what a Spec says and nothing else."""
    things = spec.things * (spec.link if spec.tag == "counting" else 1)
    while True:
        scene = np.zeros(9, np.int8)
        for cell, (shape, color) in zip(rng.permutation(9), things):
            color = color or sentences.pick(rng, world.COLORS)
            scene[cell] = 1 + world.SHAPES.index(shape) * len(world.COLORS) + world.COLORS.index(color)
        if world.exact_scene(scene, world.write(spec)):
            return scene


def renderings(metas, rng):
    """Two pictures of each prompt, uint8 [prompts, 2, 48, 48, 3]: of a scene that shows it and nothing else, and of a
    damaged one, the kinds of damage in turn."""
    scenes = []
    for i, spec in enumerate(map(world.read, metas)):
        kinds = np.roll(DAMAGES, -i)
        scenes += [shown(spec, rng), next(scene for kind in kinds if (scene := damaged(spec, kind, rng)) is not None)]
    pixels = np.round(world.render(np.stack(scenes), rng) * 255).astype(np.uint8)
    return pixels.reshape(len(metas), 2, *pixels.shape[1:])


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
