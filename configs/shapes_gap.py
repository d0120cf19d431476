"""Internal Gap in the shapes world: base, prompts and evaluation are those of configs/shapes.py.

    python -m gvu_jax.train --config=configs/shapes_gap.py:sft --workdir=runs/sft       # or dpo, csft, cdpo
    python -m gvu_jax.train --config=configs/shapes_gap.py:sft --workdir=runs/sft2 --config.internal_gap.group=2
    python -m gvu_jax.train --config=configs/shapes_gap.py:sft-showo --workdir=runs/sft3   # presets of shapes.py

csft and cdpo are the curriculum: prompts of which no candidate was accepted are drawn again half-way.
"""
import runpy
from pathlib import Path


def get_config(preset="sft"):
    preset, _, base = preset.partition("-")
    if preset not in ("sft", "dpo", "csft", "cdpo"):
        raise ValueError(f"configs/shapes_gap.py has no preset {preset!r}; it has sft, dpo, csft and cdpo, and each of "
                         "them with -weak, -smoke, -showo or -sd35")
    config = runpy.run_path(str(Path(__file__).with_name("shapes.py")))["get_config"](base or "normal")
    del config.gvu, config.flow
    # steps, noise: of a flow: whole pictures are learned from, drawn as in use, by the ODE.
    config.sampling.flow.update(steps=config.model.flow.steps, noise=0.0)
    config.method = "internal_gap"
    config.steps = 600 if preset.endswith("sft") else 450
    # yes: as in the paper the model is asked "Does this image describe ..?", and what it answers with yes rather than
    # no is accepted. The prompt's words judge as well: geometric, with a threshold of eval.words.
    config.reward.mean = "yes"
    # objective: sft or dpo. pool: prompts of the first round. prompts: prompts of a call that draws. group: candidates
    # of each prompt. waves: parts of a call; more take less memory and more time. threshold: a score above it is
    # accepted. keep: most accepted candidates of a prompt that SFT learns from; of one alone it learns that picture by
    # heart. batch: rows of an update. micro_batches: parts that an update is computed in. beta: DPO's. nll: weight of
    # the accepted picture's own likelihood in DPO. draws: where a family cannot compute a picture's likelihood exactly,
    # DPO takes the mean of so many estimates of it. anchor: weight of a KL that holds reading to the base's. replay:
    # the step at which discarded prompts are drawn again; 0: never. probe: steps between looks whether it is time for
    # the replay, 0: none; replay is then the latest.
    config.internal_gap = dict(objective=preset[-3:], pool=2880, prompts=24, group=12, waves=1, threshold=0.5, keep=4,
                               batch=96, micro_batches=1, beta=0.2, nll=1.0, draws=1, anchor=10.0, replay=0, probe=0)
    if base == "sd35":
        config.internal_gap.anchor = 0.0                                   # the captioner stays what it is
    config.trains = "backbone"              # what learns: backbone (its layers), backbone+projector, or all
    # Learning rate of AdamW. A pair says more than a picture, and moves the policy further.
    config.optim.update(lr=1e-3 if preset.endswith("sft") else 2e-4)
    # group: pictures of each held-out prompt.
    config.eval.update(every=config.steps // 2, group=12)
    config.checkpoint_every = 100
    if preset.startswith("c"):
        config.internal_gap.replay = config.steps // 2
    return config
