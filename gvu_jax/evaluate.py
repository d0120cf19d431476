"""Evaluates a checkpoint on a suite.

    python -m gvu_jax.evaluate --checkpoint=DIR --suite=shapes --out=DIR [--prompts=192] [--images_per_prompt=4]

Suites: shapes (held-out prompts of the shapes world judged by its exact checker, understanding by likelihood, and the
AUC of the intrinsic reward). Prints a table, writes OUT/results.json and OUT/samples.png.
"""
import json
from pathlib import Path

import numpy as np
from absl import flags

import gvu_jax
from gvu_jax import cli
from gvu_jax.metrics import replace_file
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.sampling import How
from gvu_jax.shapes import suite, world
from gvu_jax.umm import compile_programs

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder or a model folder.", required=True)
_SUITE = flags.DEFINE_string("suite", None, "shapes", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for results.json.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 192, "Held-out prompts, evenly over the categories.", lower_bound=6)
_IMAGES = flags.DEFINE_integer("images_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_CHOICES = flags.DEFINE_integer("choices", 288, "Questions of each understanding test.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts and of the pictures.", 0, 2**31 - 1)

BATCH = 24           # prompts drawn at a time


def main(_):
    if _SUITE.value != "shapes":
        raise ValueError(f"no suite {_SUITE.value!r}; there is: shapes")
    model, out = gvu_jax.load(_CHECKPOINT.value), Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = world.split_prompts()
    how = How(images_per_prompt=_IMAGES.value, temperature=_TEMPERATURE.value)
    metas = suite.choose_prompts(held_out, -(-_PROMPTS.value // BATCH) * BATCH, np.random.default_rng(_SEED.value))
    shapes = suite.build(model.umm, compile_programs(model.umm, how, model.mesh), metas, BATCH, _IMAGES.value,
                         _CHOICES.value, model.umm.lengths([meta["prompt"] for meta in train + held_out]),
                         world.compositions(held_out), _SEED.value)
    scores, areas, pictures, right = shapes.draw(model.params, model.params)
    understanding = shapes.understand(model.params)
    results = {"suite": "shapes", "checkpoint": str(_CHECKPOINT.value), "temperature": _TEMPERATURE.value,
               "pictures": int(right.size), "scores": scores, "auc": areas, "understanding": understanding}
    print(f"{'':<16}{'score':>8}{'AUC':>8}")
    for name in ("overall", *world.TAGS):
        print(f"{name:<16}{scores[name]:8.3f}{areas.get(name, float('nan')):8.3f}")
    print("\n".join(f"understanding {name:<12}{value:8.3f}" for name, value in understanding.items()))
    replace_file(out / "results.json", json.dumps(results, indent=1))
    write_picture(out / "samples.png", image_grid(
        pictures[:12, :6], [meta["prompt"] for meta in metas[:12]], 2, right[:12, :6]))


if __name__ == "__main__":
    cli.run(main)
