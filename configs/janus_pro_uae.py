"""UAE on Janus-Pro, 1B (the preset without a name, or :1b) or 7B (:7b): the model of configs/janus_pro.py, pictures
from a folder. Nobody has published it on this model; the settings are those of configs/xomni_uae.py.

    hf download deepseek-ai/Janus-Pro-1B --local-dir Janus-Pro-1B
    python -m gvu_jax.convert --src=Janus-Pro-1B --dst=checkpoints/janus_pro_1b
    python -m gvu_jax.train --config=configs/janus_pro_uae.py:1b --workdir=runs/janus_uae \\
        --config.pictures.folder=train --config.pictures.held_out=test \\
        --config.data.prompts=train.jsonl --config.data.held_out=held_out.jsonl

A folder holds pictures; the caption of ID.png, which the cold start alone reads, is ID.txt. Without captions:
--config.uae.cold=0. The prompts are for the evaluation.

Pictures are cut to 384 px. SigLIP reads them, VQ-16 gives the codes that the cold start learns to draw, and what is
drawn of a caption is compared with the original by SigLIP's features. Memory and disk for the weights are as in
configs/janus_pro.py; what a step of each stage takes, and on which chips it fits:

    python -m gvu_jax.plan --config=configs/janus_pro_uae.py:1b --topology=v5e:2x2
"""
import runpy
from pathlib import Path


def get_config(size="1b"):
    if size not in ("1b", "7b"):
        raise ValueError(f"configs/janus_pro_uae.py has no preset {size!r}; it has 1b and 7b")
    read = lambda name, *preset: runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["get_config"](*preset)
    config, theirs = read("janus_pro", size), read("xomni_uae")
    del config.gvu, config.reward
    config.update(method=theirs.method, steps=theirs.steps, pictures=theirs.pictures, uae=theirs.uae)
    return config
