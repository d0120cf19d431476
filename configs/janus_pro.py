"""GvU on Janus-Pro, 1B (the preset without a name, or :1b) or 7B (:7b): 384 px, drawn with guidance 5 as published.

    hf download deepseek-ai/Janus-Pro-1B --local-dir Janus-Pro-1B
    python -m gvu_jax.convert --src=Janus-Pro-1B --dst=checkpoints/janus_pro_1b
    python -m gvu_jax.train --config=configs/janus_pro.py:1b --workdir=runs/janus_pro \\
        --config.data.prompts=train.jsonl --config.data.held_out=test.jsonl

The weights take 4.2 GB (1B) or 14.8 GB (7B) in bfloat16, and the conversion as much disk again. What a step takes on
top, and on which chips it fits: python -m gvu_jax.plan --config=configs/janus_pro.py:1b --topology=v5e:2x2.

Prompts, schedule, adapter and alarms are those of configs/xomni.py: nobody has published GvU on this model. What is
trained is the distribution that is drawn from: guidance belongs to it (sampling.logps), and nothing is filtered.
"""
import runpy
from pathlib import Path


def get_config(size="1b"):
    if size not in ("1b", "7b"):
        raise ValueError(f"configs/janus_pro.py has no preset {size!r}; it has 1b and 7b")
    config = runpy.run_path(str(Path(__file__).with_name("xomni.py")))["get_config"]()
    config.family = "janus"                                              # whose sizes a plan takes: gvu_jax/families
    config.mesh.tensor = {"1b": 1, "7b": 4}[size]     # over how many devices the 16 (1B) or 32 (7B) heads are divided
    config.model.size = size                                             # for a plan without the checkpoint
    # A folder that gvu_jax.convert has written, or hf:deepseek-ai/Janus-Pro-1B or -7B.
    config.model.checkpoint = f"checkpoints/janus_pro_{size}"
    del config.model.override
    # instruction: what the prompt is read as the answer to.
    config.model.override = dict(instruction="Describe the image in detail.")
    # min_p: leaves improbable codes out; 0 leaves out none. guidance: classifier-free, as published. logps: of which
    # policy the log-probabilities are, guided as what was drawn, or "conditional", which scores the codes as if they
    # had been drawn without guidance, as most trainers of this model do; how far that is from what was drawn is logged
    # as logp_gap.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=5.0, logps="guided")
    return config
