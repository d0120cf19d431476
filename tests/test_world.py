"""The shapes world: scenes, pictures, prompts and their truth."""

import time
from collections import Counter

import numpy as np
import pytest

from conftest import find, scene

from gvu_jax.shapes import sentences
from gvu_jax.shapes import world as w

WORLD = w.World()


# Scenes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [WORLD, w.World(2, 3), w.World(4, 6), w.World(5, 5)])
def test_scenes_hold_a_legal_number_of_legal_objects(world):
    scenes = w.sample_scenes(np.random.default_rng(1), 2000, world)
    assert scenes.shape == (2000, world.side**2) and scenes.dtype == np.int8
    assert scenes.min() == 0 and scenes.max() == len(w.SHAPES) * len(w.COLORS)
    objects = (scenes > 0).sum(1)
    assert objects.min() == 1 and objects.max() == world.max_objects
    assert ((scenes > 0).mean(0) > 0).all()


def test_mixture_of_scenes(scenes):
    shapes = np.where(scenes > 0, (scenes - 1) // len(w.COLORS), -1)
    objects = (scenes > 0).sum(1)
    per_shape = np.stack([(shapes == s).sum(1) for s in range(len(w.SHAPES))])  # [shape, scene]
    two = (objects == 2) & (per_shape.max(0) == 1)
    number = (objects >= 2) & (per_shape.max(0) == objects)
    assert abs((objects == 1).mean() - w.SCENES["one"]) < 0.03
    assert abs(two.mean() - w.SCENES["two"]) < 0.03
    assert abs(number.mean() - w.SCENES["number"]) < 0.03
    for count in range(2, 10):  # each number has scenes to be learned from
        assert (number & (objects == count)).mean() > 0.005, count
    colors = [len({code for code in one.tolist() if code}) for one in scenes[number & (objects > 3)]]
    assert 0.5 < np.mean(np.array(colors) == 1) < 0.7


def test_scenes_of_one_kind():
    scenes = w.sample_scenes(np.random.default_rng(0), 500, WORLD, {"two": 1.0})
    shapes = [sorted((one[one > 0] - 1) // len(w.COLORS)) for one in scenes]
    assert all(len(found) == 2 and found[0] != found[1] for found in shapes)


def test_scenes_follow_the_seed():
    first, again, other = (w.sample_scenes(np.random.default_rng(seed), 50) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("side, max_objects", [(1, 3), (6, 5), (3, 10), (3, 2), (5, 10)])
def test_impossible_worlds_are_refused(side, max_objects):
    with pytest.raises(ValueError):
        w.World(side, max_objects)


# Pictures -----------------------------------------------------------------------------------------------------------


def test_render_shape_range_and_determinism(scenes):
    pictures = w.render(scenes[:64], np.random.default_rng(0))
    assert pictures.shape == (64, WORLD.pixels, WORLD.pixels, 3) and pictures.dtype == np.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert np.array_equal(pictures, w.render(scenes[:64], np.random.default_rng(0)))
    assert np.array_equal(w.render(scenes[:8]), w.render(scenes[:8]))
    assert np.allclose(w.render(np.zeros((1, 9), np.int8)), w.BACKGROUND)


def test_render_puts_each_object_into_its_own_cell():
    for cell in range(9):
        picture = w.render(scene(**{f"c{cell}": "red square"})[None], np.random.default_rng(cell))[0]
        inked = np.abs(picture - w.BACKGROUND).max(-1) > 1e-3
        rows, columns = np.nonzero(inked)
        assert set(rows // w.CELL) == {cell // 3} and set(columns // w.CELL) == {cell % 3}


def test_render_varies_size_and_brightness():
    pictures = w.render(np.tile(scene(c4="blue circle"), (200, 1)), np.random.default_rng(0))[:, 16:32, 16:32]
    coverage = (np.abs(pictures - w.BACKGROUND).sum(-1) / np.abs(pictures - w.BACKGROUND).sum(-1).max((1, 2), keepdims=True))
    areas = coverage.sum((1, 2))  # in pixels
    assert 1.2 < areas.max() / areas.min() < (max(w.RADII) / min(w.RADII)) ** 2 + 0.02
    assert 0.1 < pictures[:, 8, 8, 2].max() - pictures[:, 8, 8, 2].min() < 0.2
    assert len(np.unique(pictures.reshape(200, -1), axis=0)) > 190


def test_no_glyph_is_cut_off_at_its_cell():
    border = np.ones((w.CELL, w.CELL), bool)
    border[1:-1, 1:-1] = False
    assert (w.GLYPHS[..., border] == 0).all()


def test_unknown_shape_and_odd_grid_are_refused():
    with pytest.raises(ValueError, match="star"):
        w.draw_glyph("star", 5)
    with pytest.raises(ValueError, match="square number"):
        w.render(np.zeros((1, 8), np.int8))


def test_render_is_fast(scenes):
    start = time.perf_counter()
    w.render(scenes, np.random.default_rng(0))
    assert time.perf_counter() - start < 2.5  # usually 0.3 s for 4,000


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_unique_and_made_like_geneval():
    prompts = w.all_prompts()
    assert len({meta["prompt"] for meta in prompts}) == len(prompts)
    assert set(Counter(meta["tag"] for meta in prompts)) == set(w.TAGS)
    assert find("a photo of three crosses") == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert find("an image of two red circles")["exclude"] == [{"class": "circle", "count": 3, "color": "red"}]
    assert find("a picture of a red circle left of a square")["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    assert find("a photo of a red circle and a blue square")["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]


def test_specs_and_metas_are_two_forms_of_one_thing():
    for meta in w.all_prompts():
        assert w.write(w.read(meta)) == meta


@pytest.mark.parametrize("seed", range(5))
def test_split_is_disjoint_and_complete(seed):
    train, held_out = w.split_prompts(0.2, seed)
    assert len(train) + len(held_out) == len(w.all_prompts())
    assert not w.compositions(train) & w.compositions(held_out)
    assert len(train) >= 2000
    words = [set(" ".join(meta["prompt"] for meta in metas).split()) for metas in (train, held_out)]
    assert words[0] == words[1]
    for tag in w.TAGS:
        share = len(w.compositions([m for m in held_out if m["tag"] == tag]))
        share /= len(w.compositions([m for m in w.all_prompts() if m["tag"] == tag]))
        assert 0.15 <= share <= 0.25, tag


def test_split_follows_the_seed():
    assert w.split_prompts(0.2, 1) == w.split_prompts(0.2, 1) != w.split_prompts(0.2, 2)
    with pytest.raises(ValueError):
        w.split_prompts(held_out=1.0)


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("a photo of a circle left of a square", "an image of a square right of a circle", True),
        ("a photo of a red circle above a square", "a photo of a square below a red circle", True),
        ("a photo of a circle left of a square", "a photo of a square left of a circle", False),
        ("a photo of a red circle above a square", "a photo of a circle above a red square", False),
        ("a photo of a circle and a square", "a picture of a square and a circle", True),
        ("a photo of a red circle and a blue square", "a photo of a blue square and a red circle", True),
        ("a photo of a red circle and a blue square", "a photo of a blue circle and a red square", False),
        ("a photo of two circles", "a picture of two circles", True),
        ("a photo of two circles", "a photo of three circles", False),
        ("a photo of a circle", "a picture of a circle", False),
    ],
)
def test_composition_ignores_wording_only(one, other, equal):
    assert (w.composition(find(one)) == w.composition(find(other))) is equal


def test_prompts_of_one_composition_are_true_of_the_same_scenes(scenes):
    groups = {}
    for meta in w.all_prompts():
        groups.setdefault(w.composition(meta), []).append(meta)
    rng = np.random.default_rng(0)
    for metas in groups.values():
        for chosen in scenes[rng.integers(len(scenes), size=10)]:
            assert len({w.judge_scene(chosen, meta) for meta in metas}) == 1


def test_different_compositions_differ_on_some_scene(scenes):
    """Else a held-out composition could be a train one in disguise. (The lead-in does not change what is true.)"""
    metas = {w.composition(meta): meta for meta in w.all_prompts() if meta["prompt"].startswith("a photo of")}
    metas = list(metas.values())
    truth = np.array([[w.judge_scene(one, meta) for one in scenes[:1500]] for meta in metas[::5]])
    assert len(np.unique(truth, axis=0)) == len(truth)


# Truth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, objects, truth",
    [
        ("a circle", dict(c0="red circle"), True),
        ("a circle", dict(c0="red square"), False),
        ("a circle", dict(c0="red circle", c1="red circle", c5="blue square"), True),
        ("a circle and a square", dict(c0="red circle", c8="blue square"), True),
        ("a circle and a square", dict(c0="red circle", c8="blue cross"), False),
        ("three circles", dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("two circles", dict(c0="red circle", c1="blue circle", c2="red circle"), False),
        ("four circles", dict(c0="red circle", c1="blue circle", c2="red circle"), False),
        ("two red circles", dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("two red circles", dict(c0="red circle", c1="red circle", c2="red circle"), False),
        ("a red circle", dict(c0="blue circle", c1="red square"), False),
        ("a red circle", dict(c0="blue circle", c1="red circle"), True),
        ("a circle left of a square", dict(c0="red circle", c1="red square"), True),
        ("a circle left of a square", dict(c1="red circle", c0="red square"), False),
        ("a circle left of a square", dict(c0="red circle", c3="red square"), False),  # the same column
        ("a circle above a square", dict(c0="red circle", c3="red square"), True),
        ("a circle above a square", dict(c0="red circle", c4="red square"), True),  # a diagonal is both
        ("a circle left of a square", dict(c0="red circle", c4="red square"), True),
        ("a circle right of a square", dict(c0="red square", c4="red circle"), True),
        ("a circle below a square", dict(c0="red square", c4="red circle"), True),
        ("a circle below a square", dict(c4="red square", c0="red circle", c8="red circle"), True),  # any pair
        ("a red circle below a square", dict(c4="red square", c0="red circle", c8="blue circle"), False),
        ("a circle below a red square", dict(c4="red square", c7="blue circle"), True),
        ("a circle below a red square", dict(c4="blue square", c7="blue circle", c8="red square"), False),
        ("a red circle and a blue square", dict(c0="red circle", c1="blue square"), True),
        ("a red circle and a blue square", dict(c0="blue circle", c1="red square"), False),
    ],
)
def test_judge_scene(prompt, objects, truth):
    assert w.judge_scene(scene(**objects), find(f"a photo of {prompt}")) is truth


def test_unreadable_cells_are_no_objects():
    assert not any(w.judge_scene(np.full(9, -1, np.int8), meta) for meta in w.all_prompts())


@pytest.mark.parametrize(
    "prompt, asked, objects, exact",
    [
        ("a circle", 1, dict(c0="red circle"), True),
        ("a circle", 1, dict(c0="red circle", c1="red circle"), False),  # another of what was asked for
        ("a circle", 1, dict(c0="red circle", c1="blue square"), False),  # something else
        ("a circle", 1, dict(c0="red square"), False),  # one object, and a wrong one
        ("a circle and a square", 2, dict(c0="red circle", c8="blue square"), True),
        ("a circle and a square", 2, dict(c0="red circle", c8="blue square", c4="blue square"), False),
        ("three circles", 3, dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("three circles", 3, dict(c0="red circle", c1="blue circle", c2="red circle", c3="red cross"), False),
        ("two red circles", 2, dict(c0="red circle", c1="blue circle", c2="red circle"), False),  # right, and more
        ("a circle left of a square", 2, dict(c0="red circle", c1="red square"), True),
        ("a circle left of a square", 2, dict(c1="red circle", c0="red square"), False),
        ("a circle left of a square", 2, dict(c0="red circle", c1="red square", c2="red circle"), False),
        ("a red circle and a blue square", 2, dict(c0="red circle", c1="blue square"), True),
    ],
)
def test_exact_scene(prompt, asked, objects, exact):
    meta, one = find(f"a photo of {prompt}"), scene(**objects)
    assert w.objects_asked(meta) == asked and w.exact_scene(one, meta) is exact
    one[np.flatnonzero(one == 0)[-1]] = -1
    assert not w.exact_scene(one, meta), "what cannot be read was not asked for"


def test_what_is_right_is_exact_without_the_rest(scenes):
    """Every prompt's own objects, and no others: by leaving out of a scene whatever can be left out."""
    rng = np.random.default_rng(0)
    for one in scenes[:200]:
        one, meta = one.copy(), sentences.true_prompt(one, rng)
        for cell in np.flatnonzero(one):
            less = np.where(np.arange(len(one)) == cell, 0, one)
            one = less if w.judge_scene(less, meta) else one
        assert w.exact_scene(one, meta)
        for cell in np.flatnonzero(one == 0)[:1]:
            one[cell] = next(code for code in range(1, 26) if code not in one)
            assert not w.exact_scene(one, meta)
