"""GvU on Show-o: 256 px (the preset without a name, or :256), 512 px (:512), or the model that reads CLIP's features
(:clip), which draws at 256 px.

    hf download showlab/show-o --local-dir show-o                        # or show-o-512x512, show-o-w-clip-vit
    hf download showlab/magvitv2 --local-dir magvitv2
    hf download microsoft/phi-1_5 --local-dir phi-1_5 --exclude "*.safetensors"
    python -m gvu_jax.convert --src=show-o --magvit=magvitv2 --llm=phi-1_5 --dst=checkpoints/showo_256
    python -m gvu_jax.train --config=configs/showo.py --workdir=runs/showo \\
        --config.data.prompts=train.jsonl --config.data.held_out=test.jsonl

show-o-w-clip-vit needs --clip=DIR besides, of openai/clip-vit-large-patch14-336. The weights take 6.2 GB as published
(float32), 7.4 GB with CLIP's tower. What a step takes on top, and on which chips it fits:

    python -m gvu_jax.plan --config=configs/showo.py --topology=v5e:4x4

Prompts, schedule and alarms are those of configs/xomni.py: nobody has published GvU on this model. The policy is exact
for the choices made: each code in its round, which takes as many forwards a picture as there are rounds, and with
guidance twice as many. --config.sampling.guidance=1 halves that, and draws worse pictures. What is estimated instead
costs one forward for each random mask, --config.model.override.estimates=4, and is no longer the likelihood of what was
drawn: logp_gap says how far off it is.
"""
import runpy
from pathlib import Path

SIZES = {"256": dict(rounds=16, guidance=2.75), "512": dict(rounds=50, guidance=6.0),
         "clip": dict(rounds=16, guidance=2.75)}


def get_config(size="256"):
    if size not in SIZES:
        raise ValueError(f"configs/showo.py has no preset {size!r}; it has {', '.join(SIZES)}")
    config = runpy.run_path(str(Path(__file__).with_name("xomni.py")))["get_config"]()
    config.family = "showo"
    config.mesh.tensor = 1                               # over how many devices the 32 heads are divided
    config.model.size = size                                             # for a plan without the checkpoint
    # A folder that gvu_jax.convert has written, or hf:OWNER/NAME; the model with CLIP has to be converted with --clip.
    config.model.checkpoint = f"checkpoints/showo_{size}"
    del config.model.override
    # Over what the checkpoint says. rounds: how many a picture is drawn in, mask by mask. text_length: longer prompts
    # are cut where they are drawn, as published. heat: how much chance there is in which codes the first round takes
    # back. estimates: 0 scores each code in the round in which it was drawn; else the mean of so many estimates, each
    # under a random mask and of one forward. instruction: what the prompt is read as the answer to.
    config.model.override = dict(rounds=SIZES[size]["rounds"], text_length=128, heat=1.0, estimates=0,
                                 instruction="Please describe this image in detail.")
    # min_p: leaves improbable codes out; 0 leaves out none. guidance: classifier-free, as published (on a scale where 1
    # is none). logps: of which policy the log-probabilities are, guided as what was drawn, or "conditional", as if
    # without guidance.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=SIZES[size]["guidance"],
                           logps="guided")
    # pixels, or tokens: read what was drawn without rendering it. Of codes that are rendered and tokenised again less
    # than half come back: with tokens what is judged is what was drawn.
    config.reward.view = "pixels" if size == "clip" else "tokens"
    # The modules that have an adapter, a regular expression: all matrices of the layers.
    config.lora.targets = r"layers/.*(_proj|dense|fc\d)"
    return config
