"""Internal Gap on X-Omni: model, prompts and sampling are those of configs/xomni.py.

    python -m gvu_jax.train --config=configs/xomni_gap.py:csft --workdir=runs/xomni_gap \\
        --config.model.checkpoint=checkpoints/xomni --config.data.prompts=train.jsonl --config.data.held_out=test.jsonl

Presets: sft, dpo, and csft, cdpo with the curriculum. The paper's models are Janus-Pro and Show-o: of its settings, ten
candidates, replay after ten epochs and training of the backbone alone are kept; the others are ours.
"""
import runpy
from pathlib import Path

EPOCHS, REPLAY = 20, 10            # passes over the pool in all, and those before the replay


def get_config(preset="csft"):
    if preset not in ("sft", "dpo", "csft", "cdpo"):
        raise ValueError(f"configs/xomni_gap.py has no preset {preset!r}; it has sft, dpo, csft and cdpo")
    config = runpy.run_path(str(Path(__file__).with_name("xomni.py")))["get_config"]()
    del config.gvu
    config.method = "internal_gap"
    config.reward.mean = "yes"
    # objective: sft or dpo. pool: prompts of the first round. prompts: prompts of a call that draws. group: candidates
    # of each prompt. waves: parts of a call; more take less memory and more time. threshold: a score above it is
    # accepted. keep: most accepted candidates of a prompt that SFT learns from. batch: rows of an update.
    # micro_batches: parts that an update is computed in. beta: DPO's. nll: weight of the accepted picture's own
    # likelihood in DPO. draws: where a family cannot compute a picture's likelihood exactly, DPO takes the mean of so
    # many estimates of it. anchor: weight of a KL that holds reading to the base's. replay: the step at which discarded
    # prompts are drawn again; 0: never. probe: steps between looks whether it is time for the replay, 0: none; replay
    # is then the latest.
    config.internal_gap = dict(objective=preset[-3:], pool=6400, prompts=16, group=10, waves=1, threshold=0.5, keep=1,
                               batch=64, micro_batches=4, beta=0.1, nll=1.0, draws=1, anchor=0.0, replay=0, probe=0)
    config.trains = "backbone"              # what learns: backbone (its layers), backbone+projector, or all
    epoch = config.internal_gap.pool // config.internal_gap.batch
    config.steps = EPOCHS * epoch
    if preset.startswith("c"):
        config.internal_gap.replay = REPLAY * epoch
    config.eval.group = 8                                # pictures of each held-out prompt
    config.optim.update(lr=1e-5, warmup=20)
    return config
