"""Internal Gap on Janus-Pro, the paper's main model, with its settings: the 6,000 prompts of T2I-CompBench++, ten
candidates each, 20 epochs, the discarded prompts drawn again after ten of them; only the language model is trained.

    hf download deepseek-ai/Janus-Pro-1B --local-dir Janus-Pro-1B
    python -m gvu_jax.convert --src=Janus-Pro-1B --dst=checkpoints/janus_pro_1b
    git clone https://github.com/Karine-Huang/T2I-CompBench
    cat T2I-CompBench/examples/dataset/*_train.txt > train.txt; cat T2I-CompBench/examples/dataset/*_val.txt > test.txt
    python -m gvu_jax.train --config=configs/janus_pro_gap.py:csft --workdir=runs/janus_gap \\
        --config.data.prompts=train.txt --config.data.held_out=test.txt

Which prompts of the benchmark the paper took is not known here: these are the training prompts of all its categories,
and where they are fewer than 6,000, some are drawn for twice. Presets: sft, dpo, and csft, cdpo with the curriculum;
of the 1B, or of the 7B with a hyphen, as in :csft-7b.

Memory and disk for the weights are as in configs/janus_pro.py. No picture is drawn or read in an update; a call that
draws makes 16 x 10 pictures, and where they do not fit, --config.internal_gap.waves=2 or more draws them one part after
the other. What both take, and on which chips they fit:

    python -m gvu_jax.plan --config=configs/janus_pro_gap.py:csft --topology=v5e:2x2

Ours are an adapter instead of the language model's own weights, which in bfloat16 are too coarse to be trained
(lora.rank, and lora.targets for which matrices), batch, rate and threshold, and that pictures are drawn with guidance
and learned without it, as a language model learns a text.
"""
import runpy
from pathlib import Path

PROMPTS = 6000
EPOCHS, REPLAY = 20, 10            # passes over the prompts in all, and those before the replay


def get_config(preset="csft"):
    name, _, size = preset.partition("-")
    if name not in ("sft", "dpo", "csft", "cdpo") or size not in ("", "1b", "7b"):
        raise ValueError(f"configs/janus_pro_gap.py has no preset {preset!r}; it has sft, dpo, csft and cdpo, and each "
                         f"of them with -1b or -7b")
    config = runpy.run_path(str(Path(__file__).with_name("janus_pro.py")))["get_config"](size or "1b")
    del config.gvu
    config.method = "internal_gap"
    config.reward.mean = "yes"
    config.internal_gap = dict(objective=name[-3:], pool=PROMPTS, prompts=16, group=10, waves=1, threshold=0.5, keep=1,
                               batch=48, micro_batches=4, beta=0.1, nll=1.0, draws=1, anchor=0.0, replay=0, probe=0)
    config.trains = "backbone"
    epoch = PROMPTS // config.internal_gap.batch
    config.steps = EPOCHS * epoch
    if name.startswith("c"):
        config.internal_gap.replay = REPLAY * epoch
    config.eval.group = 8
    config.optim.update(lr=1e-5, warmup=20)
    return config
