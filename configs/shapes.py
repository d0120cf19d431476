"""GvU in the shapes world, on a laptop, with nothing to download.

    python -m gvu_jax.train --config=configs/shapes.py --workdir=runs/shapes            # twenty minutes
    python -m gvu_jax.train --config=configs/shapes.py:smoke --workdir=runs/smoke       # four minutes
    python -m gvu_jax.train --config=configs/shapes.py:weak --workdir=runs/weak         # generation barely pretrained
    python -m gvu_jax.train --config=configs/shapes.py:showo --workdir=runs/showo       # a tiny Show-o, an hour
    python -m gvu_jax.train --config=configs/shapes.py:sd35 --workdir=runs/sd35         # Qwen2.5-VL + SD3.5, an hour

Any value can be set from the command line: --config.gvu.group=8 --config.lora.rank=16. The model is a tiny X-Omni; with
--config.family=janus it is a tiny Janus, whose settings are X-Omni's. The presets showo and sd35 are of the families
showo and qwen_sd35, with what was tuned for them; docs/evidence.md says what has been measured. The same holds for
shapes_gap.py and shapes_uae.py.
"""
import os

from ml_collections import ConfigDict


def get_config(preset="normal"):
    if preset not in ("normal", "weak", "smoke", "showo", "sd35"):
        raise ValueError(f"configs/shapes.py has no preset {preset!r}; it has normal, weak, smoke, showo and sd35")
    config = ConfigDict()
    config.method = "gvu"                                              # gvu, internal_gap or uae: gvu_jax/methods
    config.family = "xomni"                                            # a NAME of gvu_jax/families/NAME_tiny.py
    config.seed = 0                                                    # of training and evaluation, not of the base
    config.steps = 250                                                 # updates of the policy
    config.cache = os.environ.get("GVU_CACHE", "~/.cache/gvu_jax")     # where pretrained bases are kept

    # data, fsdp, tensor: over how many devices rows, parameters and heads are divided; -1: all that the others leave.
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    # side: cells along the side of a picture, each of 16 pixels. max_objects: the most objects in a picture.
    config.world = dict(side=3, max_objects=9)

    # ---- the model: a family's modules, tiny. One image token is one patch of 16 pixels, which is one cell. ----
    # X-Omni is made of ar, vision, flux and vae; Janus of ar, vision (a tower alone) and vq; Show-o of ar and magvit;
    # Qwen2.5-VL with SD3.5 of ar, vision (a tower alone), dit, flow and vae.
    config.model = ConfigDict()
    # Sizes of the backbone, as transformers' Qwen2Config calls them, and X-Omni's own layers for images.
    config.model.ar = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                           num_key_value_heads=4, num_mm_adap_layers=1, num_mm_head_layers=1, rope_theta=100.0)
    # Sizes of the picture tokenizer: its ViT, codebook and projector.
    config.model.vision = dict(width=64, layers=2, heads=4, mlp_hidden=128, patch_size=16, pos_table_side=3,
                               codebook_size=96, codebook_dim=16, z_channels=32, groups=8)
    # Sizes of the diffusion head that draws tokens as pixels, as diffusers' FluxTransformer2DModel calls them.
    config.model.flux = dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
                             num_attention_heads=4, joint_attention_dim=8, pooled_projection_dim=8,
                             guidance_embeds=False, axes_dims_rope=(4, 6, 6), siglip_channels=32)
    # Sizes of the autoencoder between pixels and the diffusion head's latents.
    config.model.vae = dict(latent_channels=4, patch_size=16)
    # Sizes of the tokenizer that Janus draws with: VQ-16's encoder, codebook and decoder. codebook_size: a few more
    # than the 26 things to draw; with many codes for the same thing it is chance which one a picture has, and chance
    # is hard to learn.
    config.model.vq = dict(codebook_size=32, codebook_dim=16, z_channels=32, channels=4, multipliers=(1, 2, 4, 8, 8),
                           res_blocks=1, norm_num_groups=2)
    # Sizes of the tokenizer that Show-o reads and draws with: MAGVIT-v2's encoder and decoder. bits: of a code.
    config.model.magvit = dict(bits=8, encoder_channels=4, encoder_multipliers=(1, 2, 4, 8, 8),
                               encoder_blocks=(1, 1, 1, 1, 1), decoder_channels=4, decoder_multipliers=(1, 2, 4, 8, 8),
                               decoder_blocks=(1, 1, 1, 1, 1), norm_num_groups=2)
    # rounds: in how many Show-o draws a picture, mask by mask; codes of one round do not know of each other. heat: how
    # much chance there is in what the first round takes back. At 1000 it is chance alone, and the log-probabilities of
    # what was kept are then all that decided; the published 1 keeps what the model is surest of, which are empty cells,
    # and at 10 GvU learned to draw more than is asked.
    config.model.update(rounds=9, heat=1000.0)
    # Sizes of the transformer of SD3.5, as diffusers' SD3Transformer2DModel calls them; no other family has one.
    config.model.dit = dict(num_layers=4, attention_head_dim=20, num_attention_heads=4, joint_attention_dim=80,
                            pooled_projection_dim=8)
    # How SD3.5 draws. steps: of its flow in use, by gvu_jax.generate and in evaluations; training has sampling.flow's.
    # shift: how far levels of noise are moved towards noise; 1 leaves them even.
    config.model.flow = dict(steps=16, shift=2.0)
    config.model.diffusion_steps = 2         # steps of noise to a picture
    # all: layers are computed again in the backward pass, which saves memory and, on a CPU, time; nothing: they are
    # kept; elementwise: all but the products are computed again.
    config.model.remat = "all"
    config.model.instruction = "Describe the image."                   # what the prompt is read as the answer to

    # ---- pretraining of the base ----
    config.pretrain = ConfigDict()
    config.pretrain.seed = 0                 # the seed of the base
    config.pretrain.scenes = 8192            # pictures that it is taught with
    config.pretrain.crowded = 8192           # fuller pictures, for the parts that see cells and not scenes
    # X-Omni learns to see and to paint in these two. steps: updates. lr: learning rate. pictures: pictures of a batch.
    config.pretrain.tokenizer = dict(steps=1200, lr=2e-3, batch=dict(pictures=32))
    # steps: updates. lr: learning rate. pictures: pictures of a batch.
    config.pretrain.diffusion = dict(steps=3000, lr=5e-4, batch=dict(pictures=32))
    # Janus learns to see and to paint in these two, Qwen2.5-VL to see in the first. steps: updates. lr: learning rate.
    # pictures: pictures of a batch.
    config.pretrain.tower = dict(steps=800, lr=2e-3, batch=dict(pictures=32))
    # The second is Show-o's as well. steps: updates. lr: learning rate. pictures: pictures of a batch.
    config.pretrain.codes = dict(steps=2500, lr=3e-3, batch=dict(pictures=8))
    # SD3.5's last lesson, behind those of the backbone: it draws from what the reader, which stands still, says. steps:
    # updates. lr: learning rate. prompts, descriptions: pictures of a batch that are drawn from the one or the other.
    config.pretrain.drawing = dict(steps=6000, lr=3e-3, batch=dict(prompts=64, descriptions=32))
    # The two lessons of the backbone. Batches count pictures, of which positions, captions and questions say several
    # things. steps: updates. lr: learning rate. positions, prompts: pictures of a batch whose
    # positions are told, or that are drawn.
    config.pretrain.positions = dict(steps=400, lr=3e-3, batch=dict(positions=24, prompts=32))
    # mismatched: the share of pictures that drawing is taught with under another picture's prompt, as people's pictures
    # often are. Reading never is: so it knows better than drawing, in every category. steps: updates. lr: learning
    # rate. captions, descriptions, questions, prompts: pictures of a batch of which each is told, or that are drawn.
    config.pretrain.backbone = dict(steps=1200, lr=3e-3, mismatched=0.2,
                                    batch=dict(captions=17, descriptions=2, questions=7, prompts=32))

    # ---- GvU ----
    # temperature: 1 draws from the policy itself. top_k: the most tokens to choose from; 0: all. top_p: the share of
    # probability to choose from; 1: all. min_p: leave out tokens less probable than this share of the most probable
    # one; 0: none. guidance: classifier-free; 1 is none. steps: steps of the flow in training, in families that draw by
    # one, as are the settings that follow. noise: of a step, which makes it a decision; 0 draws by the ODE. kind: of
    # the noisy step, sde (Flow-GRPO), dance (DanceGRPO) or cps (Flow-CPS). window: so many steps in a row are noisy and
    # trained; 0: all are noisy, and all but the last are trained. between: where the window may lie; () anywhere. even:
    # an even grid of noise levels. same_noise: the pictures of a prompt begin with the same noise. negative_gradient:
    # the branch of guidance without a prompt is trained through as well.
    config.sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0,
                           flow=dict(steps=8, noise=0.7, kind="sde", window=4, between=(), even=False,
                                     same_noise=False, negative_gradient=True))
    # What draws in training; evaluations are drawn in full. weights: full, the policy's own, or int8, which reads half
    # of bfloat16's bytes in each step. cache: full or int8, of keys and values, where pictures or answers are drawn
    # token by token. truncate: with int8, the largest weight by which a token counts, in GvU and UAE, that the policy
    # itself would have drawn more often; 0: all count alike. Internal Gap learns from what is accepted, whoever drew
    # it.
    config.rollout = dict(weights="full", cache="full", truncate=2.0)
    # Flow-GRPO's, where the family draws by a flow, in place of the method's own clip and beta. clip: how far the ratio
    # of mean log-probabilities may move from 1. beta: weight of the KL to the base. spread: whose spread of rewards
    # divides an advantage, all or group. advantage_max: advantages are cut at plus and minus this; 0: nowhere. ratio:
    # plain, guard (GRPO-Guard's) or guard_published (with the mistake of its published line). kl: gaussian, of the two
    # steps' distributions, or published, the same distance over another variance.
    config.flow = dict(clip=1e-3, beta=0.01, spread="all", advantage_max=5.0, ratio="plain", kl="gaussian")
    # teacher: whose reading judges, the frozen base's or the policy's own. view: pixels, or tokens: read what was
    # drawn without rendering it. mean: geometric, product, minimum, yes (asked about the sentence), or oracle (the
    # checker: a ceiling, no method). function: FILE.py:NAME, a reward of one's own, (pixels uint8 [S, H, W, 3],
    # prompts) -> [S]; own: weight of the model's reward beside that function's.
    config.reward = dict(teacher="base", view="pixels", mean="geometric", function="", own=0.0)
    # prompts: prompts of a step. group: pictures of each prompt, which are compared. clip: how far the probability
    # ratio may move from 1. beta: weight of the KL to the base. anchor: weight of a second KL, which holds reading to
    # the base's. advantage_eps: added to the standard deviation that advantages are divided by. Where all pictures of a
    # prompt are right, their rewards differ little, and what makes one better is a taste for some corner or color.
    # inner_steps: updates on the same pictures. micro_batches: parts that an update is computed in. waves: parts that
    # pictures are drawn, rendered and read in. More parts take less memory and more time.
    config.gvu = dict(prompts=24, group=12, clip=0.2, beta=0.03, anchor=20.0, advantage_eps=0.03,
                      inner_steps=1, micro_batches=1, waves=1)
    # rank: the adapter's; 0 trains the whole backbone. alpha: the adapter is scaled by alpha / rank. targets: the
    # modules that have one, a regular expression. An adapter on what only drawing runs (lora.rank=32
    # lora.targets=mm_head) leaves understanding what it was bit for bit.
    config.lora = dict(rank=0, alpha=32, targets=r"_proj")
    # lr: learning rate of AdamW. warmup: steps until the learning rate is reached. schedule: constant, or cosine, to
    # 0 at the end. b2: AdamW's second moment's decay. weight_decay: AdamW's, of matrices. clip_norm: greatest norm of
    # a gradient. At a rate that stays high the last steps add noise, from which reading suffers first.
    config.optim = dict(lr=5e-4, warmup=10, schedule="cosine", b2=0.99, weight_decay=0.0, clip_norm=1.0)

    # every: steps between evaluations. batches: batches of held-out prompts, each as large as a step. choices:
    # questions of each test of understanding. words: least mean of a prompt's words in a picture that is accepted by
    # them. judge: another model, a folder or a name, that is asked about the pictures of each evaluation.
    config.eval = dict(every=125, batches=4, choices=1152, words=0.45, judge="")
    # Signs that the policy collapses. kl: warn when the KL to the base is above this. entropy: warn when the policy's
    # entropy, in nats a token, is below this. duplicates: warn when more than this share of a group's pictures are
    # the same. objects: warn when pictures hold so many more objects than before, above what is asked, which is spam.
    # stop: end the run instead of warning. skipped: how many steps in a row may be skipped as not finite.
    config.alarm = dict(kl=5.0, entropy=0.01, duplicates=0.9, objects=0.5, stop=False, skipped=10)
    config.log_every = 5                                               # steps between lines of metrics.jsonl
    config.checkpoint_every = 50                                       # steps between saved states

    if preset == "weak":                       # generation is taught by pictures of which most belong to other prompts
        config.pretrain.backbone.mismatched = 0.6
    if preset == "smoke":
        config.steps = 60
        config.pretrain.tokenizer.steps = 600
        config.pretrain.diffusion.update(steps=1200, lr=1e-3)
        config.pretrain.drawing.steps = 600
        config.pretrain.positions.steps = 0                            # left and right take longer than a smoke run has
        config.pretrain.backbone.steps = 300
        config.pretrain.backbone.batch.update(captions=10, descriptions=1, questions=3, prompts=24)
        config.pretrain.scenes = 4096
        config.pretrain.crowded = 4096
        config.gvu.prompts = 12
        config.eval.update(every=30, choices=48)
    if preset == "showo":
        config.family = "showo"
        config.steps = 150
        # A picture that is drawn mask by mask teaches a part of its codes at a time, so drawing takes more lessons; and
        # with more of drawing alone the teacher no longer told one object from two.
        config.pretrain.backbone.steps = 3000
        config.pretrain.backbone.batch.update(captions=34, descriptions=4, questions=14, prompts=64)
        # At 20 the gradient of what holds reading was a hundred times the reward's, and reading is held as well at 3.
        config.gvu.anchor = 3.0
        config.eval.every = 75
    if preset == "sd35":
        config.family = "qwen_sd35"
        config.steps = 120
        # The drawer learns, by an adapter, and the captioner stays what it is, bit for bit; so nothing has to hold it.
        config.lora.update(rank=32, targets=r"^dit/")
        config.gvu.anchor = 0.0
        config.optim.lr = 2e-3
        # At 0.01 a pale pattern grew in every empty cell, which the captioner does not mind.
        config.flow.beta = 0.05
        config.eval.every = 60
    return config
