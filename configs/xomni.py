"""GvU on X-Omni, as published: 576 px, LoRA on the shared backbone, KL to the frozen base.

    python -m gvu_jax.convert --src=X-Omni-En --flux=FLUX.1-dev --dst=checkpoints/xomni
    python -m gvu_jax.train --config=configs/xomni.py --workdir=runs/xomni \\
        --config.model.checkpoint=checkpoints/xomni --config.data.prompts=train.jsonl --config.data.held_out=test.jsonl

Prompts are JSON lines with a "prompt" (GenEval's metadata will do; its "tag" gives the categories of the evaluation),
or with another key that data.prompt_key names, or plain text, one a line. Where the published code and the paper
differ, the comment says so.
"""
import os

from ml_collections import ConfigDict

PROMPTS = 50_000                   # of the paper
EPOCHS = 4


def get_config():
    config = ConfigDict()
    config.method = "gvu"
    config.seed = 0
    config.cache = os.environ.get("GVU_CACHE", "~/.cache/gvu_jax")       # compiled programs

    # What fits where: launch/README.md, or python -m gvu_jax.plan. tensor divides the 28 query and 4 key/value heads.
    config.mesh = dict(data=1, fsdp=-1, tensor=4)

    config.model = ConfigDict()
    config.model.checkpoint = "checkpoints/xomni"                        # a folder that gvu_jax.convert has written
    # Over what the checkpoint says: 36 x 36 tokens of 16 px; fewer diffusion steps than for final pictures would do.
    config.model.override = dict(grid=(36, 36), diffusion_steps=28,
                                 instruction="Describe the image in detail.")
    config.model.remat = "all"                                           # recompute layers in the backward pass

    # prompt_key: where the text stands in an object; "meta/prompt" is the prompt in its meta.
    config.data = dict(prompts="prompts/train.jsonl", held_out="prompts/held_out.jsonl", prompt_key="prompt")

    # The published sampler adds top-k 50 unseen (a default of its library) and trains on unfiltered log-probabilities.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.03, guidance=1.0)
    # The published code means the frozen base to be the teacher but leaves the adapter on ("policy").
    config.reward = dict(teacher="base", view="pixels", mean="geometric")           # or product, minimum, yes
    config.gvu = dict(prompts=16, group=8, clip=0.2, beta=0.03, anchor=0.0, advantage_eps=1e-4,
                      inner_steps=1, micro_batches=8, waves=1)
    config.lora = dict(rank=8, alpha=32, targets=r"_proj")               # the published list adapts every matrix
    config.optim = dict(lr=1e-6, warmup=0, schedule="constant", b2=0.999, weight_decay=0.0, clip_norm=1.0)

    config.steps = PROMPTS * EPOCHS // config.gvu.prompts
    config.eval = dict(every=250, batches=4)
    # When to warn that the policy collapses, or (stop) to end; how many steps in a row may be skipped as not finite.
    config.alarm = dict(kl=2.0, entropy=0.01, duplicates=0.9, stop=False, skipped=10)
    config.log_every = 1
    config.checkpoint_every = 50
    return config
