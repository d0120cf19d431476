"""What a PyTorch user would assemble a GvU step from, carrying our weights: the other side of benchmark.py for X-Omni.

    sample, reward, update    transformers' Qwen2ForCausalLM, generate with its key/value cache; LoRA from peft
    render                    diffusers' FluxTransformer2DModel, its Euler flow, AutoencoderKL
    see                       torch's own TransformerEncoderLayer, then the nearest code

Qwen2 has neither X-Omni's multimodal layers nor its two vocabularies, so both sides run a backbone without such layers,
whose two final norms are equal. The peer's one vocabulary holds the image codes first and the text behind them, and
its head is cut to the half that a phase asks for. With that, both sides do the same products and no other.

Weights pass through the key rules of the models, so a rule that is wrong ends here as an error or as other outputs.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from gvu_jax import sampling
from gvu_jax.families.xomni import XOmni
from gvu_jax.models import flux, siglip_vq, vae, xomni
from gvu_jax.peers import Adapted, drawn, picked, side_of, slots, tensor, tensors
from gvu_jax.shapes.tokenizer import build_tokenizer

SIZES = {                                              # parameters of the backbone: 0.6M, 25M, 150M
    "tiny": dict(
        ar=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                num_key_value_heads=4, rope_theta=100.0),
        vision=dict(width=64, layers=2, heads=4, mlp_hidden=128, codebook_size=32, codebook_dim=8, z_channels=32,
                    groups=8),
        flux=dict(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
                  axes_dims_rope=(4, 6, 6)),
        vae=dict(latent_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)),
    "small": dict(
        ar=dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=4),
        vision=dict(width=256, layers=4, heads=4, mlp_hidden=1024, codebook_size=1024, codebook_dim=8, z_channels=64,
                    groups=16),
        flux=dict(in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=6,
                  axes_dims_rope=(8, 28, 28)),
        vae=dict(latent_channels=16, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=16)),
    "medium": dict(
        ar=dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
                num_key_value_heads=4),
        vision=dict(width=512, layers=8, heads=8, mlp_hidden=2048, codebook_size=4096, codebook_dim=8, z_channels=128,
                    groups=32),
        flux=dict(in_channels=64, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=12,
                  axes_dims_rope=(8, 28, 28)),
        vae=dict(latent_channels=16, block_out_channels=(64, 128, 256, 256), layers_per_block=2, norm_num_groups=32)),
}
PARTS = "denoise", "decode"                             # of render
NAMES = {"sample": "transformers generate", "render": "diffusers", "see": "torch"}

SIGLIP_RULES = siglip_vq.RULES + (                     # from the checkpoint's names to those of TransformerEncoderLayer
    (r"patch_embed\.proj", "patch_embed"), (r"attn/qkv/kernel", "self_attn/in_proj_weight"),
    (r"attn/qkv/bias", "self_attn/in_proj_bias"), (r"attn/proj", "self_attn/out_proj"), (r"mlp/fc", "linear"))


def build(sizes, tokens):
    """An XOmni of one of SIZES, without multimodal layers (Qwen2 has none), that draws `tokens` image tokens."""
    side, tokenizer = side_of(tokens), build_tokenizer(sizes["vision"]["codebook_size"])
    text_ids, pixels = tokenizer.convert_tokens_to_ids("<MM-Token-0>"), vae.Config(
        **sizes["vae"], scaling_factor=0.3611, shift_factor=0.1159)
    ar = dict(vocab_size=text_ids, mm_vocab_size=len(tokenizer) - text_ids, num_mm_adap_layers=0, num_mm_head_layers=0,
              image_vocab_size=sizes["vision"]["codebook_size"])
    head = dict(joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False,
                siglip_channels=sizes["vision"]["z_channels"])
    return XOmni(
        ar=xomni.Config(**ar, **sizes["ar"]), vae=pixels, flux=flux.Config(**head, **sizes["flux"]),
        vision=siglip_vq.Config(**sizes["vision"], patch_size=2 * pixels.downscale, pos_table_side=side),
        tokenizer=tokenizer, grid=(side, side), diffusion_steps=4)


def alike(params):
    """Params as the peers can carry them: Qwen2 has one final norm."""
    return {**params, "ar": {**params["ar"], "mm_norm": params["ar"]["lm_norm"]}}


class Backbone:
    """Qwen2 with the weights of an X-Omni backbone that has no multimodal layers; LoRA on it is `policy`."""

    def __init__(self, umm, params, adapter, lora_config, optim):
        self.umm, config, params = umm, umm.ar, params["ar"]
        if config.num_mm_adap_layers or config.num_mm_head_layers:
            raise ValueError("Qwen2 has no multimodal layers: compare a config without them")
        if not np.array_equal(params["lm_norm"]["scale"], params["mm_norm"]["scale"]):
            raise ValueError("Qwen2 has one final norm: compare parameters whose lm_norm and mm_norm are equal")
        state = tensors(params, xomni.rules(config))
        state["model.embed_tokens.weight"] = torch.cat(
            [state.pop("model.mm_embed_tokens.weight"), state.pop("model.lm_embed_tokens.weight")])
        state["model.norm.weight"] = state.pop("model.lm_norm.weight")
        del state["model.mm_norm.weight"]
        image, text = state.pop("mm_head.weight")[:config.image_vocab_size], state.pop("lm_head.weight")
        self.heads = {"image": head_of(image), "text": head_of(text)}
        self.text_ids, self.codes = config.vocab_size, config.mm_vocab_size
        shared = {k: v for k, v in vars(config).items() if "mm" not in k and k not in ("image_vocab_size", "remat")}
        shared |= dict(vocab_size=self.text_ids + self.codes, tie_word_embeddings=False, use_sliding_window=False)

        def qwen2():
            model = Qwen2ForCausalLM(Qwen2Config(**shared)).eval()
            model.lm_head = nn.Identity()
            model.load_state_dict(state)
            return model

        self.base = qwen2()
        self.adapted = Adapted(qwen2(), adapter, f".*({lora_config.targets}).*", lora_config, optim)
        self.policy = self.adapted.model

    def ids(self, ours):
        """Our ids, text first, -> the peer's, multimodal first."""
        ours = tensor(ours)
        return torch.where(ours >= self.text_ids, ours - self.text_ids, ours + self.codes)

    def logits(self, model, head, ids, keep):
        """The last `keep` positions' logits [B, keep, V] of one uncached forward."""
        (model.get_base_model() if model is self.policy else model).lm_head = self.heads[head]
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits

    @torch.inference_mode()
    def sample(self, model, prompts, group, steps, scores=False):
        """generate: [B * group, steps] codes, with scores=True also the log-probabilities they were drawn with."""
        (model.get_base_model() if model is self.policy else model).lm_head = self.heads["image"]
        drawn = model.generate(
            inputs=prompts, attention_mask=torch.ones_like(prompts), generation_config=GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group, max_new_tokens=steps,
                pad_token_id=0, return_dict_in_generate=True, output_scores=scores))
        codes = drawn.sequences[:, prompts.shape[1]:]
        return (codes, picked(torch.stack(drawn.scores, dim=1), codes)) if scores else codes

    def image_logps(self, model, prompts, codes):
        """log pi(I_t | prompt, I_<t) in one forward: [S, N]."""
        logits = self.logits(model, "image", torch.cat([prompts, codes[:, :-1]], dim=1), codes.shape[1])
        return picked(logits, codes)

    def asked(self, seen, prompts):
        """The chat before the answer about each picture's codes, in the peer's ids [S, C]."""
        seen = self.umm.seen_of(jnp.asarray(np.asarray(seen), jnp.int32).reshape(len(seen), -1))
        return self.ids(self.umm._asked(seen, prompts)[0])

    @torch.inference_mode()
    def read(self, asked, words):
        """log p(word_j | picture, question, word_<j) in one forward: [S, L]. words: ids of the text half."""
        logits = self.logits(self.base, "text", torch.cat([asked, words[:, :-1] + self.codes], dim=1), words.shape[1])
        return picked(logits, words)

    @torch.inference_mode()
    def read_in_loop(self, asked, words):
        """The same as the published code finds it: one uncached forward for each word (all pictures in a batch)."""
        said = [self.logits(self.base, "text", torch.cat([asked, words[:, :j] + self.codes], dim=1), 1)
                for j in range(words.shape[1])]
        return picked(torch.cat(said, dim=1), words)

    def update(self, prompts, codes, advantages, clip, beta):
        """One GRPO step of the adapter: loss, KL (nats a token), gradient norm."""
        with torch.no_grad():
            reference = self.image_logps(self.base, prompts, codes)
        logps = self.image_logps(self.policy, prompts, codes)
        return self.adapted.update(logps, reference, advantages, clip, beta)


def head_of(weight):
    head = nn.Linear(*reversed(weight.shape), bias=False)
    head.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return head


class Pictures:
    """SigLIP-VQ, FLUX and the autoencoder."""

    def __init__(self, umm, params):
        self.umm, self.params, (self.rows, self.cols) = umm, params, umm.grid
        nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        self.bytes_of = {"denoise": nbytes(params["flux"]), "decode": nbytes(params["vae"]["decoder"]),
                         "see": nbytes(params["vision"]["vit"])}                         # of weights that must be read
        self.bytes_of["render"] = self.bytes_of["decode"] + umm.diffusion_steps * self.bytes_of["denoise"]
        c = umm.vision
        self.vision = Vision(c).eval()
        rest = {name: part for name, part in params["vision"].items() if name != "vit"}
        self.vision.load_state_dict(tensors(params["vision"]["vit"], SIGLIP_RULES) | tensors(rest, SIGLIP_RULES))
        fields = {k: v for k, v in vars(umm.flux).items() if k not in ("siglip_channels", "remat")}
        self.flux = FluxTransformer2DModel(patch_size=1, **fields).eval()
        state = tensors(params["flux"], flux.RULES)
        self.siglip_embed = head_of(state.pop("siglip_embed.weight"))
        self.flux.load_state_dict(state)
        # X-Omni's only change to FLUX: the tokenizer's latents enter between the double and the single blocks.
        self.flux.transformer_blocks[-1].register_forward_hook(
            lambda _, __, streams: (streams[0], streams[1] + self.siglip_embed(self.siglip)))
        levels = len(umm.vae.block_out_channels)
        self.vae = AutoencoderKL(
            **vars(umm.vae), down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, use_quant_conv=False, use_post_quant_conv=False).eval()
        self.vae.load_state_dict(tensors(params["vae"], vae.RULES))
        self.image_ids = torch.tensor(
            [[0, row, col] for row in range(self.rows) for col in range(self.cols)], dtype=torch.float32)

    @torch.inference_mode()
    def velocity(self, latents, siglip, sigma):
        """One denoising step's forward: latents [S, N, C], siglip [S, N, Z], one noise level -> [S, N, C]."""
        self.siglip, S, c = siglip, len(latents), self.umm.flux
        return self.flux(
            hidden_states=latents, encoder_hidden_states=torch.zeros(S, 1, c.joint_attention_dim),
            pooled_projections=torch.zeros(S, c.pooled_projection_dim), timestep=torch.full((S,), float(sigma)),
            guidance=torch.ones(S) if c.guidance_embeds else None, img_ids=self.image_ids, txt_ids=torch.zeros(1, 3),
            return_dict=False)[0]

    @torch.inference_mode()
    def decode(self, latents):
        """The autoencoder's latents [S, C, h, w] -> raw pixels [S, 3, H, W]."""
        return self.vae.decode(latents, return_dict=False)[0]

    @torch.inference_mode()
    def render(self, codes, noise):
        """codes [S, N], noise [S, N, C] -> pixels [S, 3, H, W] in [0, 1], on the grid of 8 bits."""
        siglip = self.vision.decode(codes, (self.rows, self.cols)).flatten(2).transpose(1, 2)
        levels, latents = flux.sigmas(self.umm.diffusion_steps, noise.shape[1], self.umm.schedule), noise
        for sigma, following in zip(levels[:-1], levels[1:]):
            latents = latents + float(following - sigma) * self.velocity(latents, siglip, sigma)
        scale, c = self.umm.vae.downscale, self.umm.vae
        latents = FluxPipeline._unpack_latents(latents, 2 * scale * self.rows, 2 * scale * self.cols, scale)
        raw = self.decode(latents / c.scaling_factor + c.shift_factor)
        return ((raw / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    @torch.inference_mode()
    def see(self, pixels):
        """pixels [S, 3, H, W] in [0, 1] -> codes [S, N]."""
        return self.vision(pixels)

    def noise(self, key, samples):
        """What our render begins with under this key, [S, N, C]."""
        draw = jax.vmap(lambda key: jax.random.normal(key, (self.umm.image_tokens, self.umm.flux.in_channels)))
        return tensor(draw(sampling.sample_keys(key, jnp.arange(samples))))

    # ---- pieces that are compared by themselves: the peer's name, ours, theirs, bytes that must be read ----

    def compare_denoise(self, key, S):
        """One evaluation of the diffusion head."""
        c, N = self.umm.flux, self.umm.image_tokens
        noise, siglip = (jax.random.normal(key, (S, N, width)) for width in (c.in_channels, c.siglip_channels))
        context, pooled = jnp.zeros((S, 1, c.joint_attention_dim)), jnp.zeros((S, c.pooled_projection_dim))
        velocity = functools.partial(flux.FluxTransformer(c).apply, grid=self.umm.grid)
        ours = functools.partial(jax.jit(velocity), {"params": self.params["flux"]}, noise, siglip, context, pooled,
                                 jnp.full(S, 0.7), jnp.ones(S))
        theirs = functools.partial(self.velocity, tensor(noise), tensor(siglip), 0.7)
        return "diffusers FLUX", ours, theirs, self.bytes_of["denoise"]

    def compare_decode(self, key, S):
        """Latents to pixels by the autoencoder."""
        c = self.umm.vae
        latents = jax.random.normal(key, (S, 2 * self.rows, 2 * self.cols, c.latent_channels))
        decode = functools.partial(vae.module(c).apply, method="decode")
        channels_first = jax.jit(lambda params, latents: jnp.moveaxis(decode({"params": params}, latents), -1, 1))
        ours = functools.partial(channels_first, self.params["vae"], latents)
        return "diffusers AutoencoderKL", ours, functools.partial(
            self.decode, tensor(jnp.moveaxis(latents, -1, 1))), self.bytes_of["decode"]


class Vision(nn.Module):
    """SigLIP-VQ from stock parts, with the picture size that its position table was made for."""

    def __init__(self, c):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.pos_table_side ** 2, c.width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp_hidden, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
            norm_first=True) for _ in range(c.layers))
        self.quant_conv = nn.Conv2d(c.width, c.codebook_dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(c.codebook_size, c.codebook_dim)})
        self.post_quant_conv = nn.Conv2d(c.codebook_dim, c.z_channels, 1)
        self.post_conv = nn.ModuleList(ResnetBlock2D(
            in_channels=c.z_channels, temb_channels=None, groups=c.groups, eps=1e-5, non_linearity="gelu")
            for _ in range(2))

    def forward(self, pixels):
        grid = self.patch_embed(pixels * 2 - 1)                                                     # [S, D, r, c]
        x = grid.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        vectors = self.quant_conv(x.transpose(1, 2).reshape(grid.shape)).flatten(2).transpose(1, 2)
        codes = F.normalize(self.quantize["embedding"].weight, dim=-1)
        return (F.normalize(vectors, dim=-1) @ codes.T).argmax(-1)

    def decode(self, codes, grid):
        """codes [S, N] -> latents [S, Z, rows, cols]."""
        vectors = self.quantize["embedding"](codes).transpose(1, 2)
        x = self.post_quant_conv(vectors.reshape(*vectors.shape[:2], *grid))
        for block in self.post_conv:
            x = block(x, None)
        return x
