"""UAE on X-Omni as published: the model and settings of configs/xomni.py, pictures from a folder.

    python -m gvu_jax.train --config=configs/xomni_uae.py --workdir=runs/uae \\
        --config.model.checkpoint=checkpoints/xomni --config.pictures.folder=train --config.pictures.held_out=test \\
        --config.data.prompts=train.jsonl --config.data.held_out=held_out.jsonl

A folder holds pictures; the caption of ID.png, which the cold start alone reads, is ID.txt. Without captions:
--config.uae.cold=0. The prompts are for the evaluation.
"""
import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("xomni.py")))["get_config"]()
    del config.gvu, config.reward
    config.method = "uae"
    # folder: pictures to train on, with ID.txt beside ID.png for the cold start. held_out: those to evaluate with.
    config.pictures = dict(folder="pictures/train", held_out="pictures/held_out")
    # prompts: pictures of a step. group: captions of a picture, or pictures of its caption, which are compared. cold:
    # steps of the cold start. pairs: pictures with captions in each step of the cold start. stages: what is trained in
    # turn after that, and for how many steps. words: the most tokens of a caption. clip: how far the probability ratio
    # may move from 1. beta: weight of the KL to the model after the cold start. advantage_eps: added to the standard
    # deviation that advantages are divided by. inner_steps: updates on the same samples. micro_batches: parts that an
    # update is computed in. waves: parts that samples are drawn in; more parts take less memory and more time.
    # reconstruct: where pictures are drawn by a flow, rescaled makes the cold start descend how unlike a picture is to
    # what is drawn of its caption, as the captioner says it of the picture: the paper's cold start; published does it
    # with the slip of the paper's code, which shows what is drawn 255 times darker to the encoders of scorers; empty:
    # both directions are taught by themselves. scorers: whose cosines, weighted, are the reward: empty, the model's own
    # vision encoder's; else encoders from outside, as the paper's CLIP is, e.g.
    # own=0.5,hf:openai/clip-vit-large-patch14=0.5: CLIP, LongCLIP, DINOv2, DINOv3 or SigLIP.
    config.uae = dict(prompts=16, group=8, cold=1000, pairs=128, stages="caption:50,draw:50", words=256, clip=0.2,
                      beta=0.03, advantage_eps=1e-4, inner_steps=1, micro_batches=8, waves=1,
                      reconstruct="", scorers="")
    config.steps = config.uae.cold + 2000
    return config
