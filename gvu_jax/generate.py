"""Draws pictures for a file of prompts.

    python -m gvu_jax.generate --checkpoint=DIR --prompts=FILE --out=DIR [--images_per_prompt=4] [--seed=0]

--layout=flat writes OUT/00000_0.png, ...; --layout=geneval writes OUT/00000/metadata.jsonl and
OUT/00000/samples/00000.png, the folders that GenEval's evaluation reads. Both write OUT/grid.png.
"""
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

import gvu_jax
from gvu_jax import cli
from gvu_jax.data import read_prompts
from gvu_jax.metrics import Progress
from gvu_jax.report import image_grid
from gvu_jax.sampling import How

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder or a model folder.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, ".txt (a prompt a line) or .jsonl (with a prompt key).", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures.", required=True)
_IMAGES = flags.DEFINE_integer("images_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same pictures.")
_LAYOUT = flags.DEFINE_enum("layout", "flat", ["flat", "geneval"], "How the files are named.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Drops tokens less probable than this share of the likeliest one's.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keeps the k most probable tokens; 0 keeps all.")
_GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance scale; 1 is none.")


def main(_):
    metas = read_prompts(_PROMPTS.value)
    how = How(temperature=_TEMPERATURE.value, min_p=_MIN_P.value, top_k=_TOP_K.value, guidance=_GUIDANCE.value)
    model, out = gvu_jax.load(_CHECKPOINT.value), Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(len(metas), "prompt", "drawing") as progress:
        pictures = model.generate([meta["prompt"] for meta in metas], _SEED.value, _IMAGES.value, how,
                                  progress=progress.update)
    for i, (meta, row) in enumerate(zip(metas, pictures)):
        folder = out / f"{i:05d}" / "samples" if _LAYOUT.value == "geneval" else out
        folder.mkdir(parents=True, exist_ok=True)
        for j, picture in enumerate(row):
            name = f"{j:05d}.png" if _LAYOUT.value == "geneval" else f"{i:05d}_{j}.png"
            Image.fromarray(picture).save(folder / name)
        if _LAYOUT.value == "geneval":
            (folder.parent / "metadata.jsonl").write_text(json.dumps(meta) + "\n")
    shown = pictures[:12]
    scale = max(1, 96 // pictures.shape[2])
    image_grid(np.asarray(shown), [meta["prompt"] for meta in metas[:12]], scale).save(out / "grid.png")
    print(f"{pictures.shape[0] * pictures.shape[1]} pictures of {len(metas)} prompts in {out}")


if __name__ == "__main__":
    cli.run(main)
