"""UAE's own pair, 512 px: Qwen2.5-VL-3B captions, Stable Diffusion 3.5 draws from its states. By UAE (the preset
without a name, or :uae) or by GvU (:gvu), where the captioner's probabilities of the prompt's words are the reward.

    hf download zhiyuanyan1/UAE --local-dir UAE
    hf download stabilityai/stable-diffusion-3.5-large --local-dir UAE/SD3
    python -m gvu_jax.convert --src=UAE/llm --dst=checkpoints/uae_sd35 --image_size=512
    python -m gvu_jax.train --config=configs/uae_sd35.py --workdir=runs/uae_sd35 \\
        --config.pictures.folder=train --config.pictures.held_out=test \\
        --config.data.prompts=train.jsonl --config.data.held_out=held_out.jsonl

A folder holds pictures; the caption of ID.png, which the cold start alone reads, is ID.txt. UAE's own settings of the
two RL stages are not published. What is below for drawing is Flow-GRPO's for Stable Diffusion 3.5, in its repository:
10 noisy steps where 40 without noise are used later, by gvu_jax.generate and by the evaluations of a run, guidance in
both, a clip of 1e-4. A caption is judged by a picture of 10 steps without noise. Each stage trains its own half.
"""
import runpy
from pathlib import Path


def get_config(method="uae"):
    if method not in ("uae", "gvu"):
        raise ValueError(f"configs/uae_sd35.py has no preset {method!r}; it has uae and gvu")
    of_xomni = {"uae": "xomni_uae.py", "gvu": "xomni.py"}[method]
    config = runpy.run_path(str(Path(__file__).with_name(of_xomni)))["get_config"]()
    config.family = "qwen_sd35"
    config.mesh.tensor = 2         # over how many devices the captioner's heads (16 query, 2 key/value) are divided
    # A folder that gvu_jax.convert has written. A name on the Hub is not enough: the captioner is one of several
    # folders.
    config.model.checkpoint = "checkpoints/uae_sd35"
    del config.model.override
    # grid: rows and columns of patches of 16 px, here 512 px; UAE draws 64 x 64 in the end.
    config.model.override = dict(grid=(32, 32))
    # min_p: leaves improbable words out; 0 leaves out none. guidance: classifier-free; 1 is none. logps: of which
    # policy the log-probabilities are, guided as what was drawn, or "conditional", which takes the steps as if there
    # were no guidance. steps: of the flow in training. noise: of a step, which makes it a decision; 0 draws by the ODE.
    # kind: of the noisy step, sde (Flow-GRPO), dance (DanceGRPO) or cps (Flow-CPS). window: so many steps in a row are
    # noisy and trained; 0: all are noisy, and all but the last are trained. between: where the window may lie; ()
    # anywhere. even: an even grid of noise levels. same_noise: the pictures of a prompt begin with the same noise.
    # negative_gradient: the branch of guidance without a prompt is trained through as well.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=4.5, logps="guided",
                           flow=dict(steps=10, noise=0.7, kind="sde", window=0, between=(), even=False,
                                     same_noise=False, negative_gradient=True))
    # In place of gvu.clip and gvu.beta, which are of no effect here. clip: how far the ratio of mean log-probabilities
    # may move from 1. beta: weight of the KL to the base. spread: whose spread of rewards divides an advantage, all or
    # group. advantage_max: advantages are cut there; 0: nowhere. ratio: plain, guard (GRPO-Guard's) or guard_published
    # (with the mistake of its published line). kl: gaussian, of the two steps' distributions, or published, the same
    # distance over another variance.
    config.flow = dict(clip=1e-4, beta=0.04, spread="all", advantage_max=5.0, ratio="plain", kl="gaussian")
    config[method].update(prompts=16, group=24, micro_batches=48)
    targets = {"gvu": r"^dit/.*attn/(to|add)_", "uae": r"^llm/layers/|^dit/.*attn/(to|add)_"}[method]
    # rank: the adapter's; 0 trains the whole backbone. alpha: the adapter is scaled by alpha / rank. targets: the
    # modules that have one, a regular expression: the eight matrices of joint attention; UAE trains the captioner too.
    config.lora = dict(rank=32, alpha=64, targets=targets)
    config.optim = dict(lr=3e-4, warmup=0, schedule="constant", b2=0.999, weight_decay=1e-4, clip_norm=1.0)
    if method == "uae":
        config.uae.update(cold=0, pairs=384)
    config.steps = 2000
    return config
