"""The tests of understanding of the shapes world."""

from collections import Counter

import numpy as np
import pytest

from gvu_jax.shapes import sentences, suite
from gvu_jax.shapes import world as w


def test_four_way(scenes):
    choices = suite.four_way(np.random.default_rng(0), scenes, 120)
    assert Counter(choice.prompts[0]["tag"] for choice in choices) == {tag: 20 for tag in w.TAGS}
    for choice in choices:
        assert [w.judge_scene(choice.scene, meta) for meta in choice.prompts] == [True, False, False, False]
        assert len({meta["tag"] for meta in choice.prompts}) == 1
        assert len(w.compositions(choice.prompts)) == 4
        assert len({meta["prompt"].split()[1] for meta in choice.prompts}) == 1  # the same lead-in


def test_four_way_respects_forbidden_and_refuses_useless_scenes(scenes, split):
    forbidden = w.compositions(split[1])
    for choice in suite.four_way(np.random.default_rng(0), scenes, 30, forbidden):
        assert not w.compositions(choice.prompts) & forbidden
    with pytest.raises(ValueError, match="two_object"):
        suite.four_way(np.random.default_rng(0), np.eye(9, dtype=np.int8)[:1], 6)


@pytest.mark.parametrize("kind", suite.HARD_KINDS)
def test_hard_pairs(kind):
    pairs = suite.hard_pairs(np.random.default_rng(0), kind, 200)
    assert len(pairs) == 200
    for one, (true, false) in pairs:
        assert w.judge_scene(one, true) and not w.judge_scene(one, false)
        same_words = sorted(true["prompt"].split()) == sorted(false["prompt"].split())
        assert same_words is (kind == "binding")
    if kind == "count":  # text alone is at chance
        numbers = Counter((t["include"][0]["count"], f["include"][0]["count"]) for _, (t, f) in pairs)
        assert numbers == {(2, 3): 50, (3, 2): 50, (3, 4): 50, (4, 3): 50}
    with pytest.raises(ValueError):
        suite.hard_pairs(np.random.default_rng(0), "colour", 1)


def test_captions_of_this_world_are_sentences_of_it(scenes):
    """Whatever pretraining may say of a picture, the judge of captions finds true."""
    rng = np.random.default_rng(0)
    for one in scenes[:1000]:
        if meta := sentences.caption(one, rng, careless=0.1):
            assert suite.judge_caption(meta["prompt"], one)[:2] == (True, True)
        assert suite.judge_caption(sentences.describe(one), one) == (True, True, True)


@pytest.mark.parametrize("side", [2, 4, 5])
def test_grids_of_other_sides_have_their_tests(side):
    rng, place = np.random.default_rng(0), w.World(side, min(9, side * side))
    for kind, tag in suite.HARD_KINDS.items():
        for one, (true, false) in suite.hard_pairs(rng, kind, 20, place):
            assert len(one) == side * side and true["tag"] == tag
            assert w.judge_scene(one, true) and not w.judge_scene(one, false)
    assert len(suite.four_way(rng, w.sample_scenes(rng, 1000, place), 12)) == 12
