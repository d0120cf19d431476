"""Internal Gap on Show-o, one of the paper's own models. Model and sampling are those of configs/showo.py, where the
commands that fetch and convert it stand; the prompts are T2I-CompBench++'s, whose training files hold 5600:

    git clone https://github.com/Karine-Huang/T2I-CompBench
    cat T2I-CompBench/examples/dataset/*_train.txt > train.txt; cat T2I-CompBench/examples/dataset/*_val.txt > test.txt
    python -m gvu_jax.train --config=configs/showo_gap.py:csft --workdir=runs/showo_gap \\
        --config.data.prompts=train.txt --config.data.held_out=test.txt

Presets: sft, dpo, and csft, cdpo with the curriculum; of the 256 px model, or with a hyphen of another one, as in
:csft-512 and :csft-clip. Ten candidates a prompt, 30 epochs, replay after ten of them and
training of the backbone alone are the paper's; batch, learning rate and the adapter are ours. Its code is not published
and how it computes the likelihoods of DPO is not known: here they are the mean of `draws` estimates, each under a
random mask that winner, loser, policy and base share; margin_error is the standard error of a pair's margin.
"""
import runpy
from pathlib import Path

EPOCHS, REPLAY = 30, 10            # passes over the pool in all, and those before the replay


def get_config(preset="csft"):
    name, _, size = preset.partition("-")
    if name not in ("sft", "dpo", "csft", "cdpo") or size not in ("", "256", "512", "clip"):
        raise ValueError(f"configs/showo_gap.py has no preset {preset!r}; it has sft, dpo, csft and cdpo, and each of "
                         f"them with -256, -512 or -clip")
    config = runpy.run_path(str(Path(__file__).with_name("showo.py")))["get_config"](size or "256")
    del config.gvu
    config.method = "internal_gap"
    config.reward.mean = "yes"
    # beta: DPO's, of a picture's log-probability, the sum over its codes; of the mean over 256 codes it would be 10.
    config.internal_gap = dict(objective=name[-3:], pool=5600, prompts=16, group=10, waves=1, threshold=0.5, keep=1,
                               batch=64, micro_batches=4, beta=0.04, nll=1.0, draws=4, anchor=0.0, replay=0, probe=0)
    config.trains = "backbone"
    epoch = config.internal_gap.pool // config.internal_gap.batch
    config.steps = EPOCHS * epoch
    if name.startswith("c"):
        config.internal_gap.replay = REPLAY * epoch
    config.eval.group = 8
    config.optim.update(lr=1e-5, warmup=20)
    return config
