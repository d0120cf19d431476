"""The exact checker: reads a picture of the shapes world back into a scene, and judges it against prompts.

It plays the part that object detectors and color classifiers play in GenEval, but over pixels whose every cell it can
name or refuse. For each cell:

    ink        which pixels differ from the background, and what color is their core?
    color      the nearest palette color at any brightness of the renderer's; unlike all of them: unreadable
    coverage   how far each pixel went from the background towards the ink; many pixels of a third color: unreadable
    shape      the best overlap with ideal glyphs over a range of sizes and shifts wider and finer than the renderer's;
               a poor overlap, or two shapes that fit about as well (a blend): unreadable

An unreadable cell is -1. It is none of the objects that a prompt asks for, as for a detector that finds nothing there,
but it is not empty either: a picture that holds one is not exact.
"""

import itertools

import numpy as np

from gvu_jax.shapes.world import (
    BACKGROUND, BRIGHTNESS, CELL, COLORS, PALETTE, SHAPES, draw_glyph, exact_scene, judge_scene, objects_asked)
from gvu_jax.suite import Verdicts

UNREADABLE = -1

# Distances are Euclidean in RGB, each channel in [0, 1].
INK_DISTANCE = 0.25  # from the background: five times the pixel noise that must be tolerated; yellow ink is at 0.86
LEAST_INK = 20  # pixels; fewer are a speck or a neighbour's blur. The smallest glyph covers over 50.
COLOR_DISTANCE = 0.18  # from the palette, whose closest two colors are about 0.5 apart
CONTRAST = 1.5  # by which coverages are sharpened before they are compared: undoes slight blur and noise
# Of overlaps (see `_shapes`; 1 is perfect). The closest pair are circle and square: 0.93 for ideal glyphs.
LEAST_OVERLAP = 0.88
LEAST_MARGIN = 0.033  # of the best shape above the next
CHUNK = 1024  # cells compared with all templates at a time, which bounds the memory (8 MB)


def _sharpen(coverage: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + CONTRAST * (coverage - 0.5), 0, 1)


_FORMS = list(itertools.product(np.arange(4.4, 6.7, 0.3), np.arange(-1.5, 1.6, 0.5), np.arange(-1.5, 1.6, 0.5)))
_TEMPLATES = _sharpen(  # [shape and form, pixel]: the ideal coverages to compare with; a form is (radius, down, right)
    np.stack([draw_glyph(shape, *form).ravel() for shape in SHAPES for form in _FORMS])
)


def read_pixels(pixels: np.ndarray, side: int) -> np.ndarray:
    """Reads pictures [B, side * CELL, side * CELL, 3] in [0, 1] into scenes, int8 [B, side * side].

    A cell holds 0 if empty, the object's code (see `world`) if it is clear, and -1 if it shows something that is no
    clear object of this world. Pictures of another size raise ValueError.
    """
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim != 4 or pixels.shape[1:] != (side * CELL, side * CELL, 3):
        raise ValueError(f"expected pictures [B, {side * CELL}, {side * CELL}, 3], got {list(pixels.shape)}")
    cells, distance = _cells(pixels, side)
    # Written so that NaN counts as ink: a picture full of them is unreadable, not empty.
    (inked,) = np.nonzero((~(distance <= INK_DISTANCE)).sum(1) >= LEAST_INK)

    codes = np.zeros(len(cells), np.int8)
    codes[inked] = UNREADABLE
    cells, distance = cells[inked], distance[inked]
    ink = _core_color(cells, distance)
    color = _colors(ink + BACKGROUND)
    coverage, foreign = _coverage(cells, ink)
    shape = _shapes(coverage)
    clear = (color != UNREADABLE) & (shape != UNREADABLE) & (foreign < LEAST_INK)
    codes[inked[clear]] = 1 + shape[clear] * len(COLORS) + color[clear]
    return codes.reshape(len(pixels), side * side)


def haze(pixels: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """How far the empty cells of pictures [B, H, W, 3], read as `scenes` [B, side * side], are from the background:
    the mean over their pixels of the distance in RGB, in levels of 255, [B]; 0 where no cell is empty.

    It is too little to be ink, and a reader may not mind it: a pattern that training draws there shows itself in this.
    """
    pixels = np.asarray(pixels, np.float32)
    _, distance = _cells(pixels, pixels.shape[1] // CELL)
    empty, of_cell = scenes == 0, 255 * distance.mean(1).reshape(scenes.shape)
    return np.where(empty, of_cell, 0).sum(1) / np.maximum(empty.sum(1), 1)


def _cells(pixels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells of all pictures, relative to the background, [cell, pixel, RGB], and how far that is, [cell, pixel]."""
    cells = pixels.reshape(len(pixels), side, CELL, side, CELL, 3).swapaxes(2, 3)
    cells = cells.reshape(-1, CELL * CELL, 3) - BACKGROUND
    return cells, np.sqrt(np.einsum("npc,npc->np", cells, cells))


def judge(pixels: np.ndarray, metas: list[dict]) -> Verdicts:
    """What each picture [B, H, W, 3] in [0, 1] makes of its prompt (one of `metas` each), Verdicts of [B].

    Right is `world.judge_scene`, exact is `world.exact_scene`, objects are the cells that are not empty, and haze is
    of the others. The grid follows from the pictures' height. ValueError where it does not fit, or where the numbers of
    pictures and prompts differ.
    """
    if len(pixels) != len(metas):
        raise ValueError(f"{len(pixels)} pictures cannot be judged by {len(metas)} prompts")
    scenes = read_pixels(pixels, np.shape(pixels)[1] // CELL)
    each = lambda judge, kind: np.array([judge(scene, meta) for scene, meta in zip(scenes, metas)], kind)
    return Verdicts(each(judge_scene, bool), each(exact_scene, bool), np.count_nonzero(scenes, axis=1),
                    np.array([objects_asked(meta) for meta in metas], int), haze(pixels, scenes))


def _core_color(cells: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Mean color, relative to the background, of each cell's pixels of fullest ink: [N, pixel, RGB] -> [N, RGB].

    The edges of a glyph are mixed with the background and would pull the mean towards it.
    """
    # The twentieth strongest pixel stands for full ink: more robust to noise than the very strongest.
    full = np.partition(distance, -LEAST_INK, axis=1)[:, -LEAST_INK, None]
    core = (distance >= 0.85 * full).astype(np.float32)
    return np.einsum("np,npc->nc", core, cells) / np.maximum(core.sum(1, keepdims=True), 1)


def _colors(rgb: np.ndarray) -> np.ndarray:
    """The palette color of each mean color [N, RGB], int [N]; UNREADABLE where none is near."""
    light = rgb @ PALETTE.T / (PALETTE**2).sum(1)  # [N, color]: the brightness at which each color fits best
    light = np.clip(light, 1 - BRIGHTNESS, 1 + BRIGHTNESS)
    distance = np.linalg.norm(rgb[:, None] - light[..., None] * PALETTE, axis=-1)
    return np.where(distance.min(1) <= COLOR_DISTANCE, distance.argmin(1), UNREADABLE)


def _coverage(cells: np.ndarray, ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel has gone from the background to the cell's ink, in [0, 1]: [N, pixel]; and the number [N]
    of foreign pixels, which are far from every mixture of the two."""
    along = np.einsum("npc,nc->np", cells, ink) / np.maximum((ink**2).sum(1), 1e-6)[:, None]
    beside = cells - along[..., None] * ink[:, None]
    foreign = (np.einsum("npc,npc->np", beside, beside) > INK_DISTANCE**2).sum(1)
    return np.clip(along, 0, 1), foreign


def _shapes(coverage: np.ndarray) -> np.ndarray:
    """The shape of each coverage [N, pixel], int [N]; UNREADABLE where none fits well or two fit about as well.

    The overlap of coverages a and b is <a, b> / (|a|^2 + |b|^2 - <a, b>): for sharp masks it is intersection over
    union, and unlike that it also falls when a pixel is only half covered.
    """
    overlap = np.empty((len(coverage), len(SHAPES)), np.float32)
    for start in range(0, len(coverage), CHUNK):
        chunk = _sharpen(coverage[start : start + CHUNK])
        common = chunk @ _TEMPLATES.T
        total = (chunk**2).sum(1)[:, None] + (_TEMPLATES**2).sum(1)
        overlaps = (common / (total - common)).reshape(len(chunk), len(SHAPES), len(_FORMS))
        overlap[start : start + CHUNK] = overlaps.max(-1)
    ranked = np.sort(overlap, axis=1)
    clear = (ranked[:, -1] >= LEAST_OVERLAP) & (ranked[:, -1] - ranked[:, -2] >= LEAST_MARGIN)
    return np.where(clear, overlap.argmax(1), UNREADABLE)
