"""Paints the README's picture from a finished run of the shapes world.

    python docs/picture.py --run=runs/shapes [--out=docs/shapes.webp]

Left: the first held-out prompt of each category in the run's evaluation, and the first picture of it before and after
training. Right: the words of one of these prompts, with both pictures, coloured by how probable the model after
training finds them. Nothing is chosen by what it looks like: the prompt on the right is the one whose reward rose most.
"""
import base64
import io
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from gvu_jax import cli
from gvu_jax.metrics import read_json
from gvu_jax.pictures import FONT_SIZE, GAP, word_heatmap, write_picture

_RUN = cli.path_flag("run", "A finished run of configs/shapes.py.", required=True)
_OUT = flags.DEFINE_string("out", "docs/shapes.webp", "Where to write the picture.")
SIDE = 144                                                    # pixels of a picture


def main(_):
    samples = Path(_RUN.value) / "samples"
    before, after = (read_json(samples / f"{moment}.json") for moment in ("before", "after"))
    readings = [reading for reading in after["readings"] if reading["read"] == "after"]
    of = {moment: [reading for reading in readings if reading["drawn"] == moment] for moment in ("before", "after")}
    pictures = {"before": list(map(decode, before["pictures"])), "after": list(map(decode, after["pictures"]))}
    rise = [new["reward"] - old["reward"] for old, new in zip(of["before"], of["after"], strict=True)]
    most = int(np.argmax(rise))
    words = [word_heatmap(pictures[moment][most], of[moment][most]["words"], of[moment][most]["probabilities"],
                          of[moment][most]["reward"]) for moment in ("before", "after")]
    write_picture(_OUT.value, compose([reading["prompt"] for reading in of["before"]], pictures, words))
    print(f"{Path(_OUT.value).stat().st_size / 1000:.0f} kB in {_OUT.value}")


def decode(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def compose(prompts, pictures, words):
    """Prompts with their pictures before and after, three in a row, and the two heat maps beside them."""
    font, rows = ImageFont.load_default(FONT_SIZE), -(-len(prompts) // 2)
    high = SIDE + 3 * GAP + 40
    left = 2 * (2 * SIDE + 4 * GAP)
    canvas = Image.new("RGB", (left + max(map(lambda image: image.width, words)),
                               max(rows * high, sum(image.height + 28 for image in words))), "white")
    pen = ImageDraw.Draw(canvas)
    for i, prompt in enumerate(prompts):
        x, y = GAP + i % 2 * (2 * SIDE + 4 * GAP), GAP + i // 2 * high
        pen.text((x, y), prompt, fill="black", font=font)
        for j, moment in enumerate(("before", "after")):
            pen.text((x + j * (SIDE + GAP), y + 20), moment, fill=(90, 90, 90), font=font)
            picture = Image.fromarray(pictures[moment][i]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(picture, (x + j * (SIDE + GAP), y + 40))
    y = GAP
    for moment, image in zip(("before", "after"), words):
        pen.text((left + GAP, y), f"drawn {moment} training", fill=(90, 90, 90), font=font)
        canvas.paste(image, (left, y + 20))
        y += image.height + 28
    return canvas


if __name__ == "__main__":
    cli.run(main)
