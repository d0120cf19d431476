"""The checker reads true pictures without error, survives noise and blur, and refuses what is no clear object."""

import time

import numpy as np
import pytest

from gvu_jax.shapes import checker
from gvu_jax.shapes import sentences as s
from gvu_jax.shapes import world as w

CODES = np.arange(1, 1 + len(w.SHAPES) * len(w.COLORS), dtype=np.int8)


@pytest.fixture(scope="module")
def scenes():
    return w.sample_scenes(np.random.default_rng(0), 1000)


@pytest.fixture(scope="module")
def pictures(scenes):
    return w.render(scenes, np.random.default_rng(1))


def blur(pictures, sigma):
    """Gaussian blur of [B, H, W, 3]; sigma in pixels."""
    kernel = np.exp(-np.arange(-3, 4) ** 2 / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        widths = [(3, 3) if a == axis else (0, 0) for a in range(4)]
        wide = np.pad(pictures, widths, mode="edge")
        size = pictures.shape[axis]
        pictures = sum(k * np.take(wide, range(i, i + size), axis) for i, k in enumerate(kernel))
    return pictures


def noisy(pictures, sigma):
    return np.clip(pictures + np.random.default_rng(2).normal(0, sigma, pictures.shape), 0, 1)


def test_true_pictures_are_read_without_error(scenes, pictures):
    assert np.array_equal(checker.read_pixels(pictures, 3), scenes)
    assert np.array_equal(checker.read_pixels(w.render(scenes), 3), scenes)


def test_every_object_in_every_variation():
    for seed in range(3):
        codes = np.tile(CODES, (60, 1))  # every object 60 times in a 5 x 5 scene
        assert np.array_equal(checker.read_pixels(w.render(codes, np.random.default_rng(seed)), 5), codes)


@pytest.mark.parametrize("side", [2, 4])
def test_other_grids(side):
    scenes = w.sample_scenes(np.random.default_rng(0), 200, w.World(side, 4))
    assert np.array_equal(checker.read_pixels(w.render(scenes, np.random.default_rng(0)), side), scenes)


def test_eight_bit_pictures_are_read_without_error(scenes, pictures):
    assert np.array_equal(checker.read_pixels(np.round(pictures * 255) / 255, 3), scenes)


@pytest.mark.parametrize("noise, blurring", [(0.05, 0), (0, 0.6), (0, 0.8), (0.05, 0.6)])
def test_noise_and_slight_blur_do_no_harm(scenes, pictures, noise, blurring):
    spoiled = noisy(blur(pictures, blurring) if blurring else pictures, noise)
    read = checker.read_pixels(spoiled, 3)
    assert (read == scenes).mean() > 0.999
    assert not ((read != scenes) & (read > 0)).any()  # what is not read is refused, never mistaken


def test_blends_are_refused():
    """The average of two pictures, as an undecided decoder draws them, is mostly no object; across colors, never."""
    rng = np.random.default_rng(0)
    one, other = (code.ravel() for code in np.meshgrid(CODES, CODES))
    one, other = (np.repeat(code[one < other], 10)[:, None] for code in (one, other))
    read = checker.read_pixels((w.render(one, rng) + w.render(other, rng)) / 2, 1)
    shape, color = np.divmod(np.concatenate([one, other], 1) - 1, len(w.COLORS))
    same_color = color[:, 0] == color[:, 1]
    assert (read[~same_color] > 0).mean() < 0.01
    assert (read[same_color] > 0).mean() < 0.3


def test_circle_cross_blend_is_refused():
    circle, cross = (np.full((200, 1), 1 + w.SHAPES.index(shape) * len(w.COLORS)) for shape in ("circle", "cross"))
    assert (checker.read_pixels((w.render(circle) + w.render(cross)) / 2, 1) == -1).all()
    rng = np.random.default_rng(0)  # now of two sizes, in two brightnesses: mostly
    blends = (w.render(circle, rng) + w.render(cross, rng)) / 2
    assert (checker.read_pixels(blends, 1) == -1).mean() > 0.5


def test_garbage_is_unreadable_and_blank_is_empty():
    garbage = np.random.default_rng(0).random((20, 48, 48, 3))
    assert (checker.read_pixels(garbage, 3) == -1).all()
    for value in (0.0, 0.5, np.nan):
        assert (checker.read_pixels(np.full((1, 48, 48, 3), value), 3) == -1).all()
    for value in (0.9, 0.95, 1.0):  # about the background
        assert (checker.read_pixels(np.full((1, 48, 48, 3), value), 3) == 0).all()


def test_ghosts_and_foreign_colors_are_unreadable():
    solid = w.render(CODES[:, None])
    ghost = w.BACKGROUND + 0.6 * (solid - w.BACKGROUND)
    assert (checker.read_pixels(ghost, 1) == -1).all()
    orange = w.BACKGROUND + w.GLYPHS[0, 1][None, ..., None] * (np.array([1.0, 0.5, 0.0]) - w.BACKGROUND)
    assert checker.read_pixels(orange, 1) == -1
    half = np.concatenate([solid[0][:, :8], solid[2][:, 8:]], 1)[None]  # left half red, right half blue
    assert checker.read_pixels(half, 1) == -1


def test_haze_is_what_is_drawn_where_nothing_stands():
    """As far as the background is from itself nowhere; a pattern too faint to be ink as far as it is; objects, and
    cells that cannot be read, do not count."""
    scenes = np.zeros((3, 9), np.int8)
    scenes[1, :8], scenes[2] = CODES[0], CODES[1]
    pictures = w.render(scenes)
    clean = checker.haze(pictures, scenes)
    assert (clean < 1e-3).all()
    faint = pictures.copy()
    faint[:, ::2, :, 1] -= 0.1                                                     # every other row, everywhere
    read = checker.read_pixels(faint, 3)
    assert (read[0] == 0).all() and read[1, 8] == 0
    np.testing.assert_allclose(checker.haze(faint, read)[:2], 0.05 * 255, rtol=1e-3)
    assert checker.haze(faint, scenes)[2] == 0, "where no cell is empty"
    faint[0, :, : w.CELL] -= 0.5
    assert (checker.read_pixels(faint, 3)[0, ::3] == checker.UNREADABLE).all()
    np.testing.assert_allclose(checker.haze(faint, checker.read_pixels(faint, 3))[0], 0.05 * 255, rtol=1e-3)


def random_false(scene, prompts, rng):
    """Any of the prompts that is false of a scene."""
    return next(meta for _ in iter(int, 1) for meta in [s.pick(rng, prompts)] if not w.judge_scene(scene, meta))


def test_a_clear_object_beside_a_faint_foreign_color_is_unreadable():
    """The object's own color and shape are as they should be: only the strip of cyan at the edge of its cell is not."""
    code = 1 + w.SHAPES.index("circle") * len(w.COLORS) + w.COLORS.index("red")
    picture = w.render(np.full((1, 9), code, np.int8))
    picture[0, w.CELL : 2 * w.CELL, w.CELL : w.CELL + 2, 0] -= 0.4  # of the middle cell, where no glyph reaches
    assert checker.read_pixels(picture, 3).tolist() == [[code] * 4 + [checker.UNREADABLE] + [code] * 4]


def test_judge_follows_the_scene(scenes, pictures):
    rng, prompts = np.random.default_rng(0), w.all_prompts()
    true = [s.true_prompt(scene, rng) for scene in scenes]
    false = [random_false(scene, prompts, rng) for scene in scenes]
    verdicts = checker.judge(pictures, true)
    assert verdicts.right.all() and verdicts.right.dtype == verdicts.exact.dtype == bool
    assert not checker.judge(pictures, false).right.any()
    assert not checker.judge(np.ones_like(pictures), true).right.any()
    objects, asked = [sum(scene != 0) for scene in scenes], [sum(i["count"] for i in meta["include"]) for meta in true]
    np.testing.assert_array_equal(verdicts.objects, objects)
    np.testing.assert_array_equal(verdicts.asked, asked)
    np.testing.assert_array_equal(verdicts.exact, np.equal(objects, asked))
    assert 0.1 < verdicts.exact.mean() < 0.9
    np.testing.assert_array_equal(verdicts.marks, np.where(verdicts.exact, 1, 0.5))


def test_what_cannot_be_read_is_not_exact():
    """A cell of noise beside what was asked for: right, two objects, not exact."""
    meta = next(meta for meta in w.all_prompts() if meta["prompt"] == "a photo of a red circle")
    picture = w.render(np.array([[1, 0, 0, 0]]))
    found = dict(right=[True], exact=[True], objects=[1], asked=[1], haze=[0])
    assert checker.judge(picture, [meta])._asdict() == found
    picture[0, -w.CELL:, -w.CELL:] = np.random.default_rng(0).random((w.CELL, w.CELL, 3))
    assert checker.read_pixels(picture, 2).tolist() == [[1, 0, 0, -1]]
    assert checker.judge(picture, [meta])._asdict() == found | dict(exact=[False], objects=[2])


def test_wrong_sizes_are_refused(pictures):
    with pytest.raises(ValueError, match="expected pictures"):
        checker.read_pixels(pictures, 4)
    with pytest.raises(ValueError, match="cannot be judged"):
        checker.judge(pictures[:2], [])
    with pytest.raises(ValueError, match="expected pictures"):
        checker.judge(np.zeros((1, 50, 50, 3)), [w.all_prompts()[0]])


def test_reading_is_fast(pictures):
    start = time.perf_counter()
    checker.read_pixels(pictures, 3)
    assert time.perf_counter() - start < 2.0  # usually 0.4 s for 1,000
