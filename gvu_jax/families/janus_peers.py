"""What a PyTorch user would run for Janus-Pro, carrying our weights: the other side of benchmark.py for Janus.

transformers' JanusForConditionalGeneration is all of it: `generate` draws, with guidance and the static cache that is
its own default; its vision tower sees, its VQ-16 renders. LoRA comes from peft. The guided log-probabilities that an
update needs are two of its forwards: no library has them.

The vision tower has one patch for each code, so that what is drawn is read as it is.
"""
import jax
import torch
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration, LlamaConfig

from gvu_jax.families.janus import BEGIN, BOS, PICTURE, Janus
from gvu_jax.families.janus_tiny import words_of_shapes
from gvu_jax.models import llama, siglip, vq
from gvu_jax.peers import Adapted, Reads, drawn, picked, side_of, slots, tensor, tensors

SIZES = {                                              # parameters of the backbone: 0.6M, 25M, 150M
    "tiny": dict(
        ar=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                num_key_value_heads=4),
        vision=dict(width=64, layers=2, heads=4, mlp_hidden=128),
        vq=dict(codebook_size=32, codebook_dim=8, z_channels=32, channels=32, multipliers=(1, 1), res_blocks=1)),
    "small": dict(
        ar=dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=8),
        vision=dict(width=256, layers=4, heads=4, mlp_hidden=1024),
        vq=dict(codebook_size=1024, codebook_dim=8, z_channels=64, channels=32, multipliers=(1, 1, 2, 2),
                res_blocks=1)),
    "medium": dict(
        ar=dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
                num_key_value_heads=16),
        vision=dict(width=512, layers=8, heads=8, mlp_hidden=2048),
        vq=dict(codebook_size=4096, codebook_dim=8, z_channels=128, channels=64, multipliers=(1, 1, 2, 2, 4),
                res_blocks=1)),
}
PARTS = ()                                             # of render: it is one network
NAMES = {"sample": "transformers generate", "render": "transformers VQ-16", "see": "transformers SigLIP"}


def build(sizes, tokens):
    """A Janus of one of SIZES, in transformers' layout, that draws `tokens` image tokens."""
    side, codes, tokenizer = side_of(tokens), vq.Config(**sizes["vq"]), words_of_shapes()
    tower = siglip.Config(**sizes["vision"], patch_size=codes.downscale, pos_table_side=side)
    ar = llama.Config(**sizes["ar"], vocab_size=len(tokenizer), image_vocab_size=codes.codebook_size,
                      code_width=codes.codebook_dim, vision_width=tower.width,
                      image_head_width=sizes["ar"]["hidden_size"])
    transform = siglip.Transform(image_size=side * codes.downscale, min_size=1)
    return Janus(ar=ar, vision=tower, vq=codes, tokenizer=tokenizer, grid=(side, side), transform=transform,
                 of_shapes=True, layout="transformers")


def alike(params):
    """Params as the peers can carry them: all of them."""
    return params


def config_of(umm):
    """The model in transformers' words."""
    ar, tower, codes = umm.ar, umm.vision, umm.vq
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "rms_norm_eps")
    return JanusConfig(
        text_config=LlamaConfig(**{name: getattr(ar, name) for name in shared}, tie_word_embeddings=False,
                                rope_parameters={"rope_type": "default", "rope_theta": ar.rope_theta}),
        vision_config=dict(
            hidden_size=tower.width, num_hidden_layers=tower.layers, num_attention_heads=tower.heads,
            mlp_ratio=tower.mlp_hidden / tower.width, patch_size=tower.patch_size,
            image_size=tower.patch_size * tower.pos_table_side, projection_dim=ar.hidden_size,
            num_image_tokens=umm.image_tokens),
        vq_config=dict(
            embed_dim=codes.codebook_dim, num_embeddings=codes.codebook_size, latent_channels=codes.z_channels,
            base_channels=codes.channels, channel_multiplier=list(codes.multipliers), num_res_blocks=codes.res_blocks,
            projection_dim=ar.hidden_size, image_token_embed_dim=ar.hidden_size),
        tie_word_embeddings=False, image_token_id=umm._id(PICTURE))


def model_of(umm, params, device="cpu", dtype=torch.float32):
    """transformers' Janus with these params; random ones where they are None."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = JanusForConditionalGeneration(config_of(umm)).eval()
    finally:
        torch.set_default_dtype(before)
    if params is None:
        return model
    rules = {"ar": llama.RULES, "vision": siglip.RULES, "vq": vq.RULES}
    state = {name: array for part, rule in rules.items() for name, array in
             tensors(params[part], rule["transformers"]).items()}
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def generate(umm, model, prompts, group, steps):
    """Codes [B * group, steps] of prompts [B, P], ids, drawn by transformers' Janus; steps: all of a picture's."""
    return model.generate(
        inputs=prompts, attention_mask=torch.ones_like(prompts), generation_mode="image",
        generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=group,
            guidance_scale=umm.guidance, pad_token_id=umm.pad, bos_token_id=umm._id(BOS),
            max_length=prompts.shape[1] + steps, generation_kwargs={"boi_token_id": umm._id(BEGIN)}))


def sampler(umm, device, dtype):
    """For full_size.py: (B, group, P, steps) -> codes on the host, of prompts that mean nothing, by a model with random
    weights; steps: fewer than a picture has codes, to warm up."""
    model = model_of(umm, None, device, dtype)

    def sample(B, group, P, steps=umm.image_tokens):
        model.model.vision_model.config.num_image_tokens = steps         # where generate reads how many
        return generate(umm, model, torch.ones((B, P), dtype=torch.long, device=device), group, steps).cpu()

    return sample


class Backbone(Reads):
    """transformers' Janus; LoRA on its language model is `policy`."""

    def __init__(self, umm, params, adapter, lora_config, optim):
        self.umm, self.base = umm, model_of(umm, params)
        self.adapted = Adapted(model_of(umm, params), adapter, f".*language_model.*({lora_config.targets}).*",
                               lora_config, optim)
        self.policy = self.adapted.model

    ids = staticmethod(tensor)                         # texts have the same ids on both sides

    def inner(self, model):
        """The transformers model itself, which peft wraps."""
        return model.get_base_model() if model is self.policy else model

    def image_scores(self, model, prompts, codes):
        """Logits [S, N, K] of the codes [S, N] behind prompts [S, P], in one uncached forward."""
        model = self.inner(model)
        embedded = torch.cat([model.get_input_embeddings()(prompts),
                              model.prepare_embeddings_for_image_generation(codes[:, :-1])], dim=1)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return model.model.generation_head(hidden[:, -codes.shape[1]:])

    def guided(self, conditional, unconditional):
        """u + guidance (c - u) of two arrays of logits [S, N, K]."""
        return unconditional + self.umm.guidance * (conditional - unconditional)

    def image_logps(self, model, prompts, codes):
        """log pi(code_t | prompt, codes_<t) of the guided policy in two forwards: [S, N]."""
        without = torch.full_like(prompts, self.umm.pad)
        without[:, 0], without[:, -1] = prompts[:, 0], prompts[:, -1]
        return picked(self.guided(*(self.image_scores(model, ids, codes) for ids in (prompts, without))), codes)

    def sample(self, model, prompts, group, steps, scores=False):
        """generate: [B * group, steps] codes, with scores=True also the log-probabilities they were drawn with, taken
        from the head as it runs: generate gives back the last step's alone."""
        model, said = self.inner(model), []
        hook = model.model.generation_head.register_forward_hook(lambda _, __, out: said.append(out))
        codes = generate(self.umm, model, prompts, group, steps)
        hook.remove()
        if not scores:
            return codes
        return codes, picked(self.guided(*torch.stack(said, dim=1).chunk(2)), codes)

    def asked(self, seen, prompts):
        """The chat before the answer, ids [S, C] with PICTURE where a patch stands, and the tower's features."""
        before = [*self.umm._around(self.umm.instruction)[0], *[self.umm._id(PICTURE)] * self.umm.image_tokens]
        before = torch.tensor(before).expand(len(seen), -1)
        return torch.cat([before, tensor(prompts.question)], dim=1), tensor(seen)

    def text_scores(self, asked, more, keep):
        """The last `keep` positions' logits [S, keep, V] of one uncached forward over the chat and `more` ids."""
        (ids, seen), model = asked, self.base
        ids = torch.cat([ids, more], dim=1)
        embedded = model.get_input_embeddings()(ids).masked_scatter(
            (ids == self.umm._id(PICTURE))[..., None], model.model.aligner(seen))
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -keep:])

    def update(self, prompts, codes, advantages, clip, beta):
        """One GRPO step of the adapter on codes [S, N] behind prompts [S, P], advantages [S]: loss, KL (nats a token),
        gradient norm."""
        with torch.no_grad():
            reference = self.image_logps(self.base, prompts, codes)
        return self.adapted.update(self.image_logps(self.policy, prompts, codes), reference, advantages, clip, beta)


class Pictures:
    """VQ-16 and the vision tower of transformers' Janus."""

    def __init__(self, umm, params):
        self.model = model_of(umm, params).model
        nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        self.bytes_of = {"render": nbytes(params["vq"]["decoder"]), "see": nbytes(params["vision"])}

    def noise(self, key, samples):
        """None: nothing is random between codes and pixels."""
        return None

    @torch.inference_mode()
    def render(self, codes, noise):
        """codes [S, N] -> pixels [S, 3, H, W] in [0, 1], on the grid of 8 bits."""
        return ((self.model.vqmodel.decode(codes) + 1) / 2 * 255).clamp(0, 255).floor() / 255

    @torch.inference_mode()
    def see(self, pixels):
        """pixels [S, 3, H, W] in [0, 1] -> features [S, N, D]."""
        return self.model.vision_model(pixels * 2 - 1).last_hidden_state
