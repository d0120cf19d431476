"""UAE on Show-o: the model and settings of configs/showo.py, where the commands that fetch and convert it stand;
pictures from a folder.

    python -m gvu_jax.train --config=configs/showo_uae.py --workdir=runs/showo_uae \\
        --config.pictures.folder=train --config.pictures.held_out=test \\
        --config.data.prompts=train.jsonl --config.data.held_out=held_out.jsonl

A folder holds pictures; the caption of ID.png, which the cold start alone reads, is ID.txt. Without captions:
--config.uae.cold=0. The prompts are for the evaluation. The picture encoder that compares a picture with what its
caption brings back is the image tokenizer's, before codes are made of it (with :clip, CLIP's).
"""
import runpy
from pathlib import Path


def get_config(size="256"):
    config = runpy.run_path(str(Path(__file__).with_name("showo.py")))["get_config"](size)
    del config.gvu, config.reward
    config.method = "uae"
    config.pictures = dict(folder="pictures/train", held_out="pictures/held_out")
    # words: the most tokens of a caption, which must fit into the row of a prompt: text_length less what stands around
    # them.
    config.uae = dict(prompts=16, group=8, cold=1000, pairs=128, stages="caption:50,draw:50", words=120, clip=0.2,
                      beta=0.03, advantage_eps=1e-4, inner_steps=1, micro_batches=8, waves=1, scorers="")
    config.steps = config.uae.cold + 2000
    return config
