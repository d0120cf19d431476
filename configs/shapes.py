"""GvU in the shapes world, on a laptop, with nothing to download.

    python -m gvu_jax.train --config=configs/shapes.py --workdir=runs/shapes            # twenty minutes
    python -m gvu_jax.train --config=configs/shapes.py:smoke --workdir=runs/smoke       # four minutes
    python -m gvu_jax.train --config=configs/shapes.py:weak --workdir=runs/weak         # generation barely pretrained

Any value can be set from the command line: --config.gvu.group=8 --config.lora.rank=16. The model is a tiny X-Omni, or
a tiny Janus with --config.family=janus, which holds for shapes_gap.py and shapes_uae.py as well.
"""
import os

from ml_collections import ConfigDict


def get_config(preset="normal"):
    if preset not in ("normal", "weak", "smoke"):
        raise ValueError(f"configs/shapes.py has no preset {preset!r}; it has normal, weak and smoke")
    config = ConfigDict()
    config.method = "gvu"
    config.family = "xomni"                                            # or janus; see families/NAME_tiny.py
    config.seed = 0
    config.steps = 250
    config.cache = os.environ.get("GVU_CACHE", "~/.cache/gvu_jax")     # where pretrained bases are kept

    config.mesh = dict(data=-1, fsdp=1, tensor=1)                      # -1: all devices that the others leave
    config.world = dict(side=3, max_objects=9)

    # ---- the model: a family's modules, tiny. One image token is one patch of 16 pixels, which is one cell. ----
    # X-Omni is made of ar, vision, flux and vae; Janus of ar, vision (a tower alone) and vq.
    config.model = ConfigDict()
    config.model.ar = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                           num_key_value_heads=4, num_mm_adap_layers=1, num_mm_head_layers=1, rope_theta=100.0)
    config.model.vision = dict(width=64, layers=2, heads=4, mlp_hidden=128, patch_size=16, pos_table_side=3,
                               codebook_size=96, codebook_dim=16, z_channels=32, groups=8)
    config.model.flux = dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
                             num_attention_heads=4, joint_attention_dim=8, pooled_projection_dim=8,
                             guidance_embeds=False, axes_dims_rope=(4, 6, 6), siglip_channels=32)
    config.model.vae = dict(latent_channels=4, patch_size=16)
    config.model.vq = dict(codebook_size=96, codebook_dim=16, z_channels=32, channels=4, multipliers=(1, 2, 4, 8, 8),
                           res_blocks=1, norm_num_groups=2)
    config.model.diffusion_steps = 2
    config.model.remat = "all"               # on a CPU, computing a layer again takes less time than keeping it
    config.model.instruction = "Describe the image."

    # ---- pretraining of the base ----
    config.pretrain = ConfigDict()
    config.pretrain.seed = 0
    config.pretrain.scenes = 8192
    config.pretrain.crowded = 8192
    config.pretrain.tokenizer = dict(steps=1200, lr=2e-3, batch=dict(pictures=32))                   # X-Omni's two
    config.pretrain.diffusion = dict(steps=3000, lr=5e-4, batch=dict(pictures=32))
    config.pretrain.tower = dict(steps=800, lr=2e-3, batch=dict(pictures=32))                        # Janus' two
    config.pretrain.codes = dict(steps=2000, lr=3e-3, batch=dict(pictures=8))
    # The two lessons of the backbone. Batches count pictures, of which positions, captions and questions say several
    # things.
    config.pretrain.positions = dict(steps=400, lr=3e-3, batch=dict(positions=24, prompts=32))
    # mismatched: the share of pictures that drawing is taught with under another picture's prompt, as people's pictures
    # often are. Reading never is: so it knows better than drawing, in every category.
    config.pretrain.backbone = dict(steps=1200, lr=3e-3, mismatched=0.2,
                                    batch=dict(captions=17, descriptions=2, questions=7, prompts=32))

    # ---- GvU ----
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0)
    # mean: geometric, product, minimum, yes (asked about the sentence), or oracle (the checker: a ceiling, no method).
    config.reward = dict(teacher="base", view="pixels", mean="geometric")
    # advantage_eps: where all pictures of a prompt are right their rewards differ by a hundredth, and what makes one of
    # them better is a taste for some corner or color. Rewards of right and wrong ones differ by a tenth.
    config.gvu = dict(prompts=24, group=12, clip=0.2, beta=0.03, anchor=20.0, advantage_eps=0.03,
                      inner_steps=1, micro_batches=1, waves=1)
    # Rank 0 trains the whole backbone. An adapter on what only drawing runs (lora.rank=32 lora.targets=mm_head) leaves
    # understanding what it was bit for bit.
    config.lora = dict(rank=0, alpha=32, targets=r"_proj")
    # cosine: what the last steps at a high rate add is noise, and reading suffers from it first.
    config.optim = dict(lr=5e-4, warmup=10, schedule="cosine", b2=0.99, weight_decay=0.0, clip_norm=1.0)

    config.eval = dict(every=125, batches=4, choices=1152, words=0.45)  # words: their least mean in what is accepted
    # When to warn that the policy collapses or (objects a picture above what is asked, more than before) makes spam, or
    # (stop) to end; how many steps in a row may be skipped as not finite.
    config.alarm = dict(kl=5.0, entropy=0.01, duplicates=0.9, objects=0.5, stop=False, skipped=10)
    config.log_every = 5
    config.checkpoint_every = 50

    if preset == "weak":                       # generation is taught by pictures of which most belong to other prompts
        config.pretrain.backbone.mismatched = 0.6
    if preset == "smoke":
        config.steps = 60
        config.pretrain.tokenizer.steps = 600
        config.pretrain.diffusion.update(steps=1200, lr=1e-3)
        config.pretrain.tower.steps = 400
        config.pretrain.codes.steps = 1000
        config.pretrain.positions.steps = 0                            # left and right take longer than a smoke run has
        config.pretrain.backbone.steps = 300
        config.pretrain.backbone.batch.update(captions=10, descriptions=1, questions=3, prompts=24)
        config.pretrain.scenes = 4096
        config.pretrain.crowded = 4096
        config.gvu.prompts = 12
        config.eval.update(every=30, choices=48)
    return config
