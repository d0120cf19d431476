"""Draws pictures for a file of prompts.

    python -m gvu_jax.generate --checkpoint=DIR --prompts=FILE --out=DIR [--images_per_prompt=4] [--seed=0]

--layout=flat writes OUT/00000_0.png, ...; --layout=geneval writes OUT/00000/metadata.jsonl and
OUT/00000/samples/00000.png, the folders that GenEval's evaluation reads. Both write OUT/grid.png. A number is the
prompt's place in the file, so that a prompt that stands there twice is drawn twice, and differently.
"""
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

import gvu_jax
from gvu_jax import cli
from gvu_jax.data import read_prompts
from gvu_jax.metrics import Progress, replace_file
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.sampling import How

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder or a model folder.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, ".txt (a prompt a line) or .jsonl (with a prompt key).", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures.", required=True)
_IMAGES = flags.DEFINE_integer("images_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same pictures.", 0, 2**31 - 1)
_LAYOUT = flags.DEFINE_enum("layout", "flat", ["flat", "geneval"], "How the files are named.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Drops tokens less probable than this share of the likeliest one's.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keeps the k most probable tokens; 0 keeps all.")
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance scale; 1 is none.")


def main(_):
    metas = read_prompts(_PROMPTS.value)
    how = How(temperature=_TEMPERATURE.value, min_p=_MIN_P.value, top_k=_TOP_K.value, guidance=_GUIDANCE.value)
    model, out, prompts = gvu_jax.load(_CHECKPOINT.value), Path(_OUT.value), [meta["prompt"] for meta in metas]
    out.mkdir(parents=True, exist_ok=True)
    done, shown = 0, []
    with Progress(len(metas), "prompt", "drawing") as progress:
        for batch in model.draw(prompts, _SEED.value, _IMAGES.value, how):      # each is on disk before the next begins
            for i, row in enumerate(batch, done):
                write(out, i, metas[i], row)
            shown += list(batch[:12 - len(shown)])
            done += len(batch)
            progress.update(len(batch))
    write_picture(out / "grid.png", image_grid(np.stack(shown), prompts[:12], max(1, 96 // shown[0].shape[1])))
    print(f"{done * _IMAGES.value} pictures of {done} prompts in {out}")


def write(out, i, meta, row):
    """The pictures uint8 [G, H, W, 3] of prompt i, and in GenEval's layout what it asks for."""
    geneval = _LAYOUT.value == "geneval"
    folder = out / f"{i:05d}" / "samples" if geneval else out
    folder.mkdir(parents=True, exist_ok=True)
    for j, picture in enumerate(row):
        write_picture(folder / (f"{j:05d}.png" if geneval else f"{i:05d}_{j}.png"), Image.fromarray(picture))
    if geneval:
        replace_file(folder.parent / "metadata.jsonl", json.dumps(meta) + "\n")


if __name__ == "__main__":
    cli.run(main)
