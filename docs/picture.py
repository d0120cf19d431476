"""Paints the README's picture from a finished run of the shapes world, for light pages and for dark ones.

    python docs/picture.py --run=runs/shapes [--out=docs/shapes.webp]

Above: the first held-out prompt of each category in the run's evaluation, and the first picture of it before and after
training. Below: the words of one of these prompts beside both pictures, coloured by how probable the model after
training finds them. Nothing is chosen by what it looks like: the prompt below is the one whose reward rose most. The
one for dark pages has "_dark" in its name. Pages are 850 pixels wide, so that letters keep their size on GitHub.
"""
import base64
import io
import textwrap
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from gvu_jax import cli
from gvu_jax.metrics import read_json
from gvu_jax.pictures import GAP, probability_color, text_color, write_picture

_RUN = cli.path_flag("run", "A finished run of configs/shapes.py.", required=True)
_OUT = flags.DEFINE_string("out", "docs/shapes.webp", "Where to write the picture.")
COLUMNS, SIDE, LINE = 3, 128, 22                              # prompts in a row; pixels of a picture, and of a line
WIDE = 2 * SIDE + GAP                                         # of a prompt's pictures
PAGES = {"": ((255, 255, 255), (31, 35, 40), (89, 99, 110)),          # ground, ink and pale ink of GitHub's pages
         "_dark": ((13, 17, 23), (240, 246, 252), (145, 152, 161))}


def main(_):
    samples = Path(_RUN.value) / "samples"
    before, after = (read_json(samples / f"{moment}.json") for moment in ("before", "after"))
    readings = [reading for reading in after["readings"] if reading["read"] == "after"]
    of = {moment: [reading for reading in readings if reading["drawn"] == moment] for moment in ("before", "after")}
    pictures = {"before": list(map(decode, before["pictures"])), "after": list(map(decode, after["pictures"]))}
    for page, colors in PAGES.items():
        out = Path(_OUT.value)
        out = out.with_stem(out.stem + page)
        write_picture(out, compose(of, pictures, *colors))
        print(f"{out.stat().st_size / 1000:.0f} kB in {out}")


def decode(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def compose(of, pictures, ground, ink, pale):
    """of: of each moment, "before" and "after", what the trained model reads in the first picture of each prompt;
    pictures: of each moment, these pictures, uint8 [H, W, 3]."""
    prompts = [reading["prompt"] for reading in of["before"]]
    rise = [new["reward"] - old["reward"] for old, new in zip(of["before"], of["after"], strict=True)]
    most = int(np.argmax(rise))
    font, small = ImageFont.load_default(17), ImageFont.load_default(15)
    high, rows = 3 * LINE + SIDE + 2 * GAP, -(-len(prompts) // COLUMNS)
    size = COLUMNS * (WIDE + 3 * GAP) - 2 * GAP, rows * high + 2 * (SIDE + 2 * GAP) + 3 * LINE
    canvas = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(canvas)

    def put(picture, x, y):
        canvas.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))

    for i, prompt in enumerate(prompts):
        x, y = i % COLUMNS * (WIDE + 3 * GAP), i // COLUMNS * high
        lines = textwrap.wrap(prompt, 32)[:2]
        for j, line in enumerate(lines):
            pen.text((x, y + (2 - len(lines) + j) * LINE), line, fill=ink, font=font)
        for j, moment in enumerate(pictures):
            pen.text((x + j * (SIDE + GAP), y + 2 * LINE), moment, fill=pale, font=small)
            put(pictures[moment][i], x + j * (SIDE + GAP), y + 3 * LINE)

    for j, (moment, readings) in enumerate(of.items()):
        y, reading = rows * high + GAP + j * (SIDE + 2 * GAP), readings[most]
        put(pictures[moment][most], 0, y)
        x, told = SIDE + 2 * GAP, f"drawn {moment} training, reward {reading['reward']:.2f}"
        pen.text((x, y + LINE), told, fill=pale, font=small)
        for word, probability in zip(reading["words"], reading["probabilities"], strict=True):
            color, width = probability_color(probability), round(font.getlength(word)) + 2 * GAP
            pen.rounded_rectangle((x, y + 2 * LINE + GAP, x + width, y + 4 * LINE), radius=4, fill=color)
            pen.text((x + GAP, y + 3 * LINE + GAP / 2), word, fill=text_color(color), font=font, anchor="lm")
            x += width + 4
    legend, y = "how probable each word is to the model that looks at the picture:  0", canvas.height - 2 * LINE
    pen.text((0, y), legend, fill=pale, font=small)
    x = round(small.getlength(legend)) + GAP
    for i in range(WIDE):
        pen.line((x + i, y + 2, x + i, y + LINE - 4), fill=probability_color(i / (WIDE - 1)))
    pen.text((x + WIDE + GAP, y), "1", fill=pale, font=small)
    return canvas


if __name__ == "__main__":
    cli.run(main)
