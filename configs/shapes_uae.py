"""UAE in the shapes world: the base of configs/shapes.py learns to tell what it sees so that it can draw it again.

    python -m gvu_jax.train --config=configs/shapes_uae.py --workdir=runs/uae
    python -m gvu_jax.train --config=configs/shapes_uae.py --workdir=runs/uae2 --config.uae.stages=caption:1 \\
        --config.steps=200                                                                 # captions alone, stage 2
    python -m gvu_jax.train --config=configs/shapes_uae.py --workdir=runs/uae3 --config.uae.stages=draw:1  # stage 3

Pictures are rendered scenes. The captions of the cold start leave things out, as people do: each object of a scene is
told with probability `pictures.told`. So the captioner has to find out what a picture takes to be drawn again, and the
drawer to add nothing that was not said.
"""
import runpy
from pathlib import Path


def get_config(preset="normal"):
    config = runpy.run_path(str(Path(__file__).with_name("shapes.py")))["get_config"](preset)
    del config.gvu, config.reward
    config.method = "uae"
    # told: the share of a scene's objects that a caption tells. most: objects of a scene.
    config.pictures = dict(told=0.7, most=2)
    # prompts: pictures of a step. group: captions of a picture, or pictures of its caption, which are compared. cold:
    # steps of the cold start. pairs: pictures with captions in each step of the cold start. stages: what is trained in
    # turn after that, and for how many steps; where the two share a backbone, fewer steps of captions than of drawing
    # make captions tell more but err more. words: the most tokens of a caption; eleven tell two objects, with the end.
    # clip: how far the probability ratio may move from 1. beta: weight of the KL to the model after the cold start.
    # advantage_eps: added to the standard deviation that advantages are divided by; one wrong cell of nine costs a
    # tenth of the reward, the noise that equal pictures are rendered from a thousandth. inner_steps: updates on the
    # same samples. micro_batches: parts that an update is computed in. waves: parts that samples are drawn in; more
    # parts take less memory and more time. reconstruct: where pictures are drawn by a flow, rescaled makes the cold
    # start descend how unlike a picture is to what is drawn of its caption, as the captioner says it of the picture:
    # the paper's cold start; published does it with the slip of the paper's code, which shows what is drawn 255 times
    # darker to the encoders of scorers; empty: both directions are taught by themselves. scorers: whose cosines,
    # weighted, are the reward: empty, the model's own vision encoder's; else e.g. own=0.5,hf:facebook/dinov2-large=0.5,
    # of CLIP, LongCLIP, DINOv2, DINOv3 or SigLIP.
    config.uae = dict(prompts=24, group=12, cold=160, pairs=96, stages="caption:10,draw:10", words=12, clip=0.2,
                      beta=0.04, advantage_eps=1e-2, inner_steps=1, micro_batches=1, waves=1, reconstruct="",
                      scorers="")
    config.steps = config.uae.cold + 160
    # lr: learning rate of AdamW. schedule: constant, or cosine, to 0 at the end; at the rate of the cold start GRPO
    # undoes what that gave.
    config.optim.update(lr=1e-3, schedule="cosine")
    config.eval.update(every=80)
    config.checkpoint_every = 40
    # duplicates, entropy: signs of collapse that are off here, for who tells all there is tells it in the same words
    # every time.
    config.alarm.update(duplicates=1.0, entropy=0.0)
    if preset == "sd35":
        config.lora.targets = r"^(llm/layers|dit)/"                           # both halves learn: the captioner, too
    if preset == "smoke":
        config.uae.update(prompts=12, cold=40)
        config.steps = config.uae.cold + 40
    return config
