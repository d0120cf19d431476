"""The suite of the shapes world: held-out prompts judged by the exact checker, and tests of understanding.

    four_way      the true caption against three others of its category
    relation      "A left of B" against "A right of B"          count    n against n +- 1
    binding       colors exchanged                              (two-way: 0.5 is chance)
"""
import re

import numpy as np

from gvu_jax.shapes import checker, world
from gvu_jax.suite import Suite

WORDS = {"numbers": world.NUMBERS, "colors": world.COLORS, "relations": world.RELATIONS}


def choose_prompts(metas, count, rng):
    """`count` prompts, category by category, as many of each (with repetition where a category has too few)."""
    chosen = []
    for i, tag in enumerate(world.TAGS):
        of_tag = [meta for meta in metas if meta["tag"] == tag]
        need = count // len(world.TAGS) + (i < count % len(world.TAGS))
        chosen += [of_tag[j] for k in range(-(-need // len(of_tag))) for j in rng.permutation(len(of_tag))][:need]
    return chosen


def remove_words(prompt, kind):
    """The prompt without its words of one kind of WORDS; a relation leaves "and" behind."""
    less = re.sub(rf"\b({'|'.join(WORDS[kind])})\b", "and" if kind == "relations" else "", prompt)
    return " ".join(less.split())


def build(umm, programs, metas, batch, group, choices, lengths, forbidden, seed):
    """The suite for prompts `metas`, with `choices` questions in each test; four_way mentions nothing `forbidden`."""
    rng, place = np.random.default_rng(seed), world.World(side=umm.grid[0])
    tests = {"four_way": world.four_way(rng, world.sample_scenes(rng, 4096, place), choices, forbidden)}
    tests |= {kind: world.hard_pairs(rng, kind, choices, place) for kind in world.HARD_KINDS}
    tests = {name: (world.render(np.stack([choice.scene for choice in test]), rng),
                    [tuple(meta["prompt"] for meta in choice.prompts) for choice in test])
             for name, test in tests.items()}
    return Suite(umm, programs, metas, batch, group, lengths, seed, checker.judge, tests)
