"""Internal Gap on UAE's pair: Stable Diffusion 3.5 learns from those of its own pictures that Qwen2.5-VL accepts. The
model is that of configs/uae_sd35.py, where the commands that fetch and convert it stand.

    python -m gvu_jax.train --config=configs/uae_sd35_gap.py:csft --workdir=runs/sd35_gap \\
        --config.data.prompts=train.jsonl --config.data.held_out=held_out.jsonl

Presets: sft, dpo, and csft, cdpo with the curriculum. SFT is flow matching on accepted pictures; DPO compares the same
loss of an accepted and a rejected one under the same noise, as Diffusion-DPO does. The paper has no such model: ten
candidates, 20 epochs and replay after ten are its settings for Janus-Pro, DPO's beta is Diffusion-DPO's, and the others
are ours and untried at full size. Pictures are drawn in 40 steps without noise, as the pair is used.
"""
import runpy
from pathlib import Path


def get_config(preset="csft"):
    beside = lambda name: runpy.run_path(str(Path(__file__).with_name(name)))["get_config"]
    if preset not in ("sft", "dpo", "csft", "cdpo"):
        raise ValueError(f"configs/uae_sd35_gap.py has no preset {preset!r}; it has sft, dpo, csft and cdpo")
    config, gap = beside("uae_sd35.py")("gvu"), beside("xomni_gap.py")(preset)
    del config.gvu, config.flow
    config.method, config.reward, config.trains, config.eval = gap.method, gap.reward, gap.trains, gap.eval
    config.internal_gap, config.steps = gap.internal_gap, gap.steps
    # draws: where a family cannot compute a picture's likelihood exactly, DPO takes the mean of so many estimates of
    # it. beta: DPO's, of a mean over a picture's latents; half of the 5000 of Diffusion-DPO, which halves it itself.
    config.internal_gap.update(draws=4, beta=2500.0)
    # steps: of the flow. noise: of a step, which makes it a decision; 0 draws by the ODE.
    config.sampling.flow.update(steps=40, noise=0.0)
    config.optim.update(lr=1e-4, warmup=20)
    return config
