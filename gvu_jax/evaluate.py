"""Evaluates a checkpoint on a suite.

    python -m gvu_jax.evaluate --checkpoint=DIR --suite=shapes --out=DIR [--prompts=192] [--images_per_prompt=4]

    shapes     held-out prompts of the shapes world judged by its exact checker, understanding by likelihood, and the AUC
               of the intrinsic reward
    unified    picture -> caption -> picture: similarity to the vision encoder, length of the captions, and in the shapes
               world what its checker says of captions and pictures; of rendered scenes, or of --pictures=FOLDER.
               --prompts counts pictures here, and --images_per_prompt captions of each, each drawn once

Prints a table, writes OUT/results.json and OUT/samples.png.
"""
import json
from pathlib import Path

import numpy as np
from absl import flags

import gvu_jax
from gvu_jax import cli, data
from gvu_jax.methods.uae import Loop
from gvu_jax.metrics import replace_file
from gvu_jax.report import image_grid, write_picture
from gvu_jax.sampling import How
from gvu_jax.shapes import suite, world
from gvu_jax.suite import Unified
from gvu_jax.umm import compile_programs

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder or a model folder.", required=True)
_SUITE = flags.DEFINE_string("suite", None, "shapes or unified", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for results.json.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 192, "Held-out prompts, evenly over the categories.", lower_bound=6)
_IMAGES = flags.DEFINE_integer("images_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_PICTURES = flags.DEFINE_string("pictures", None, "A folder of pictures for unified, instead of rendered scenes.")
_WORDS = flags.DEFINE_integer("words", 64, "Most tokens of a caption of unified.", lower_bound=2)
_CHOICES = flags.DEFINE_integer("choices", 288, "Questions of each understanding test.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts and of the pictures.", 0, 2**31 - 1)

BATCH = 24           # prompts drawn at a time


def main(_):
    if _SUITE.value not in ("shapes", "unified"):
        raise ValueError(f"no suite {_SUITE.value!r}; there are: shapes, unified")
    model, out = gvu_jax.load(_CHECKPOINT.value), Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    results, picture = shapes(model) if _SUITE.value == "shapes" else unified(model)
    results = {"suite": _SUITE.value, "checkpoint": str(_CHECKPOINT.value), "temperature": _TEMPERATURE.value} | results
    replace_file(out / "results.json", json.dumps(results, indent=1))
    write_picture(out / "samples.png", picture)


def shapes(model):
    """Prints and returns the results of the shapes world, and a grid of pictures."""
    train, held_out = world.split_prompts()
    how = How(images_per_prompt=_IMAGES.value, temperature=_TEMPERATURE.value)
    metas = suite.choose_prompts(held_out, -(-_PROMPTS.value // BATCH) * BATCH, np.random.default_rng(_SEED.value))
    built = suite.build(model.umm, compile_programs(model.umm, how, model.mesh), metas, BATCH, _IMAGES.value,
                        _CHOICES.value, model.umm.lengths([meta["prompt"] for meta in train + held_out]),
                        world.compositions(held_out), _SEED.value)
    scores, areas, pictures, right = built.draw(model.params, model.params)
    understanding = built.understand(model.params)
    print(f"{'':<16}{'score':>8}{'AUC':>8}")
    for name in ("overall", *world.TAGS):
        print(f"{name:<16}{scores[name]:8.3f}{areas.get(name, float('nan')):8.3f}")
    print("\n".join(f"understanding {name:<12}{value:8.3f}" for name, value in understanding.items()))
    grid = image_grid(pictures[:12, :6], [meta["prompt"] for meta in metas[:12]], 2, right[:12, :6])
    return {"pictures": int(right.size), "scores": scores, "auc": areas, "understanding": understanding}, grid


def unified(model):
    """Prints and returns what survives picture -> caption -> picture, and a grid: each picture, its first caption, and
    what was drawn from that and others."""
    size, place = model.umm.picture_size, world.World(side=model.umm.grid[0])
    stream = (data.picture_stream(_PICTURES.value, size, _SEED.value) if _PICTURES.value else
              suite.picture_stream((_SEED.value, 1), 1.0, place))
    examples = data.batch(stream, 0, -(-_PROMPTS.value // BATCH) * BATCH)
    originals = np.stack([example["pixels"] for example in examples])
    how = How(images_per_prompt=_IMAGES.value, temperature=_TEMPERATURE.value)
    found, captions, pictures = Unified(
        Loop(model.umm, how, model.mesh, _WORDS.value), originals, BATCH, _SEED.value,
        None if _PICTURES.value else suite.judge_captions).measure(model.params, model.params)
    scores = {name: float(values.mean()) for name, values in found.items()}
    print("\n".join(f"{name:<16}{score:8.3f}" for name, score in scores.items()))
    shown = np.concatenate([np.round(originals[:, None] * 255).astype(np.uint8), pictures], axis=1)[:12, :7]
    texts = [of_picture[0] for of_picture in captions]
    return ({"pictures": len(originals), "scores": scores, "captions": texts},
            image_grid(shown, texts[:12], max(1, 96 // size[0])))


if __name__ == "__main__":
    cli.run(main)
