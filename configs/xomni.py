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
    config.method = "gvu"                                                # gvu, internal_gap or uae: gvu_jax/methods
    config.seed = 0                                                      # of training and evaluation
    config.cache = os.environ.get("GVU_CACHE", "~/.cache/gvu_jax")       # compiled programs

    # data, fsdp, tensor: over how many devices rows, parameters and heads (28 query, 4 key/value) are divided; -1: all
    # that the others leave. What fits where: launch/README.md, or python -m gvu_jax.plan.
    config.mesh = dict(data=1, fsdp=-1, tensor=4)

    config.model = ConfigDict()
    config.model.checkpoint = "checkpoints/xomni"         # a folder that gvu_jax.convert has written, or hf:OWNER/NAME
    # Over what the checkpoint says. grid: 36 x 36 tokens of 16 px. diffusion_steps: fewer than for final pictures would
    # do. instruction: what the prompt is read as the answer to.
    config.model.override = dict(grid=(36, 36), diffusion_steps=28,
                                 instruction="Describe the image in detail.")
    config.model.remat = "all"                                           # recompute layers in the backward pass

    # prompts: what is trained on. held_out: what is evaluated with. prompt_key: where the text stands in an object;
    # "meta/prompt" is the prompt in its meta.
    config.data = dict(prompts="prompts/train.jsonl", held_out="prompts/held_out.jsonl", prompt_key="prompt")

    # temperature: 1 draws from the policy itself. top_k: the most tokens to choose from; 0: all. top_p: the share of
    # probability to choose from; 1: all. min_p: leave out tokens less probable than this share of the most probable
    # one; 0: none. guidance: classifier-free; 1 is none. The published sampler adds top-k 50 unseen (a default of its
    # library) and trains on unfiltered log-probabilities.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.03, guidance=1.0)
    # What draws in training; evaluations are drawn in full. weights: full, the policy's own, or int8, which reads half
    # of bfloat16's bytes in each step. cache: full or int8, of keys and values, where pictures or answers are drawn
    # token by token. truncate: with int8, the largest weight by which a token counts, in GvU and UAE, that the policy
    # itself would have drawn more often; 0: all count alike. Internal Gap learns from what is accepted, whoever drew
    # it.
    config.rollout = dict(weights="full", cache="full", truncate=2.0)
    # teacher: whose reading judges, the frozen base's or the policy's own; the published code means the base but
    # leaves the adapter on. view: pixels, or tokens: read what was drawn without rendering it. mean: geometric, or
    # product, minimum, yes. function: FILE.py:NAME, a reward of one's own, (pixels uint8 [S, H, W, 3], prompts) ->
    # [S]; own: weight of the model's reward beside that function's.
    config.reward = dict(teacher="base", view="pixels", mean="geometric", function="", own=0.0)
    # prompts: prompts of a step. group: pictures of each prompt, which are compared. clip: how far the probability
    # ratio may move from 1. beta: weight of the KL to the base. anchor: weight of a second KL, which holds reading to
    # the base's. advantage_eps: added to the standard deviation that advantages are divided by. inner_steps: updates on
    # the same pictures. micro_batches: parts that an update is computed in. waves: parts that pictures are drawn,
    # rendered and read in; both save memory.
    config.gvu = dict(prompts=16, group=8, clip=0.2, beta=0.03, anchor=0.0, advantage_eps=1e-4,
                      inner_steps=1, micro_batches=8, waves=1)
    # rank: the adapter's; 0 trains the whole backbone. alpha: the adapter is scaled by alpha / rank. targets: the
    # modules that have one, a regular expression; the published list adapts every matrix.
    config.lora = dict(rank=8, alpha=32, targets=r"_proj")
    # lr: learning rate of AdamW. warmup: steps until the learning rate is reached. schedule: constant, or cosine, to
    # 0 at the end. b2: AdamW's second moment's decay. weight_decay: AdamW's, of matrices. clip_norm: greatest norm of
    # a gradient.
    config.optim = dict(lr=1e-6, warmup=0, schedule="constant", b2=0.999, weight_decay=0.0, clip_norm=1.0)

    config.steps = PROMPTS * EPOCHS // config.gvu.prompts                # updates of the policy
    # every: steps between evaluations. batches: batches of held-out prompts, each as large as a step. judge: another
    # model, a folder or a name, that is asked about the pictures of each evaluation. pictures: False makes none, in GvU
    # with view=tokens, and leaves all but the backbone out of memory; gvu_jax.generate paints later, elsewhere.
    config.eval = dict(every=250, batches=4, judge="", pictures=True)
    # Signs that the policy collapses. kl: warn when the KL to the base is above this. entropy: warn when the policy's
    # entropy, in nats a token, is below this. duplicates: warn when more than this share of a group's pictures are
    # the same. stop: end the run instead of warning. skipped: how many steps in a row may be skipped as not finite.
    config.alarm = dict(kl=2.0, entropy=0.01, duplicates=0.9, stop=False, skipped=10)
    config.log_every = 1                                                 # steps between lines of metrics.jsonl
    config.checkpoint_every = 50                                         # steps between saved states
    return config
