"""Pictures for people: grids of samples, and one picture beside the probabilities of its prompt's words."""

import math
import os
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gvu_jax.metrics import replacing

GAP, BORDER, FONT_SIZE, LINE_HEIGHT = 8, 3, 14, 18  # pixels
# A red, an amber and a green that the colour-blind can tell apart: frames of what is wrong, in between and right.
WRONG_COLOR, MIDDLE_COLOR, RIGHT_COLOR = (213, 40, 40), (240, 170, 20), (0, 158, 115)


def image_grid(
    rows: np.ndarray, captions: list[str] | None = None, scale: int = 1, marks: np.ndarray | None = None
) -> Image.Image:
    """Paints R rows of C pictures on white, each row under its caption.

    Args:
      rows: [R, C, H, W, 3], uint8 or float in [0, 1].
      captions: R texts, mostly the prompts, or None. A caption longer than two lines is cut short.
      scale: each picture is enlarged this many times, a pixel becoming a square of pixels.
      marks: [R, C], bool or in (0, 0.5, 1), or None: a thin border round each picture, green where 1 (it shows what
        the prompt asks for), red where 0, amber in between (it shows that, and more than was asked). The border lies
        outside the picture and covers none of it.
    """
    rows = _to_uint8(np.asarray(rows)).repeat(scale, axis=2).repeat(scale, axis=3)  # [R, C, scale H, scale W, 3]
    count, columns, height, width = rows.shape[:4]
    grid_width = GAP + columns * (width + GAP)
    font = ImageFont.load_default(FONT_SIZE)
    characters = max(12, int((grid_width - 2 * GAP) // font.getlength("n")))
    texts = [textwrap.wrap(text, characters, max_lines=2, placeholder=" ...") for text in captions or [""] * count]
    if len(texts) != count:
        raise ValueError(f"{count} rows of pictures need as many captions, not {len(texts)}")

    above = [GAP + len(text) * LINE_HEIGHT + (GAP if text else 0) for text in texts]  # pixels, of each row
    canvas_height = sum(above) + count * height + GAP
    canvas = Image.new("RGB", (grid_width, canvas_height), "white")
    pen = ImageDraw.Draw(canvas)
    top = 0
    for r, text in enumerate(texts):
        for i, line in enumerate(text):
            pen.text((GAP, top + GAP + i * LINE_HEIGHT), line, fill="black", font=font)
        top += above[r]
        for c in range(columns):
            left = GAP + c * (width + GAP)
            if marks is not None:
                box = (left - BORDER, top - BORDER, left + width + BORDER - 1, top + height + BORDER - 1)
                pen.rectangle(box, fill=(WRONG_COLOR, MIDDLE_COLOR, RIGHT_COLOR)[int(2 * marks[r][c])])
            canvas.paste(Image.fromarray(rows[r, c]), (left, top))
        top += height
    return canvas


def write_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    """Writes a picture in the format that the path's ending names, whole or not at all.

    Raises ValueError for an unknown ending, OSError naming the path where the disk refuses.
    """
    kind = picture_kind(path)
    with replacing(path) as temporary:
        picture.save(temporary, kind)


def picture_kind(path: str | os.PathLike) -> str:
    """The format that a path's ending names. Raises ValueError for an unknown one."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} does not end as a picture does: call it, for example, {Path(path).stem}.png")
    return kind


HEATMAP_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, p = 0 to 1
PANEL, PICTURE, WORD_SIZE, WORD_HEIGHT, LEGEND_HEIGHT = 420, 288, 20, 34, 64  # pixels


def word_heatmap(picture: np.ndarray, words: list[str], probabilities: np.ndarray, reward: float) -> Image.Image:
    """A picture beside the words of its prompt, each on the colour of its probability, with the scale below.

    Args:
      picture: [H, W, 3], uint8 or float in [0, 1]. A small one is enlarged by a whole factor, a big one shrunk.
      words: the prompt; a word that is wider than the panel is cut short.
      probabilities: one of each word, in [0, 1].
      reward: written above the words.
    """
    shown = Image.fromarray(_to_uint8(np.asarray(picture)))
    scale = max(1, PICTURE // max(shown.size))
    shown = shown.resize((scale * shown.width, scale * shown.height), Image.Resampling.NEAREST)
    shown.thumbnail((2 * PICTURE, 2 * PICTURE))
    font, small = ImageFont.load_default(WORD_SIZE), ImageFont.load_default(FONT_SIZE)

    placed, x, y = [], 0, WORD_HEIGHT  # (word, probability, x, y, width), from the panel's corner
    for word, probability in zip(words, probabilities, strict=True):
        word = _cut_short(word, font, PANEL - 2 * GAP)
        width = math.ceil(font.getlength(word)) + 2 * GAP
        if x > 0 and x + width > PANEL:
            x, y = 0, y + WORD_HEIGHT
        placed.append((word, probability, x, y, width))
        x += width + BORDER

    panel_height = y + WORD_HEIGHT + LEGEND_HEIGHT
    left = shown.width + 3 * GAP
    canvas = Image.new("RGB", (left + PANEL + 2 * GAP, max(shown.height, panel_height) + 2 * GAP), "white")
    canvas.paste(shown, (GAP, GAP))
    pen = ImageDraw.Draw(canvas)
    pen.text((left, GAP), f"reward {reward:.3g}", fill="black", font=font)
    for word, probability, x, y, width in placed:
        color = probability_color(probability)
        x, y = left + x, GAP + y
        pen.rounded_rectangle((x, y, x + width - 1, y + WORD_HEIGHT - BORDER - 1), radius=BORDER + 1, fill=color)
        middle = y + (WORD_HEIGHT - BORDER) / 2
        pen.text((x + GAP, middle), word, fill=text_color(color), font=font, anchor="lm")

    top = GAP + panel_height - LEGEND_HEIGHT + GAP
    pen.text((left, top), "probability of the word, given the picture and the words before", fill="black", font=small)
    for i in range(PANEL):
        pen.line((left + i, top + 20, left + i, top + 32), fill=probability_color(i / (PANEL - 1)))
    for tick, anchor in ((0, "la"), (0.25, "ma"), (0.5, "ma"), (0.75, "ma"), (1, "ra")):
        pen.text((left + tick * PANEL, top + 36), f"{tick:g}", fill="black", font=small, anchor=anchor)
    return canvas


def _cut_short(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + "...") > width:
        text = text[: len(text) * 9 // 10]
    return text + "..."


def probability_color(probability: float) -> tuple[int, int, int]:
    """Dark violet for 0, over blue and green, to yellow for 1: equal steps look equal, to the colour-blind too."""
    stops = np.linspace(0, 1, len(HEATMAP_COLORS))
    return tuple(round(float(np.interp(probability, stops, channel))) for channel in zip(*HEATMAP_COLORS))


def text_color(background: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more (WCAG's relative luminance): a contrast of 4.5 at the least."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(background) / 255]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "white"


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8)
