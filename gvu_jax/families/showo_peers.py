"""What a PyTorch user would run for Show-o, carrying our weights: the other side of benchmark.py for Show-o.

The published code draws with a Phi that it changed a little. Here it is transformers' PhiForCausalLM with norms of
queries and keys, under masks of its own, and the published loop: in every round one forward over text and picture, with
the prompt and without it in one batch, and nothing kept between rounds. Its picture tokenizer is put together from
diffusers' blocks, LoRA comes from peft. An update scores each code in its round, a forward a round.
"""
import jax
import numpy as np
import torch
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig, PhiForCausalLM

from gvu_jax.families.showo import Showo
from gvu_jax.families.showo_tiny import words_of_shapes
from gvu_jax.models import magvit, phi
from gvu_jax.peers import Adapted, Reads, picked, side_of, tensor, tensors

SIZES = {                                              # parameters of the backbone: .5M, 26M, 154M
    "tiny": dict(
        ar=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
                num_key_value_heads=4),
        vq=dict(bits=8, encoder_channels=32, decoder_channels=32, encoder_multipliers=(1, 1),
                decoder_multipliers=(1, 1), encoder_blocks=(1, 1), decoder_blocks=(1, 1))),
    "small": dict(
        ar=dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=8),
        vq=dict(bits=10, encoder_channels=32, decoder_channels=32, encoder_multipliers=(1, 1, 2, 2),
                decoder_multipliers=(1, 1, 2, 2), encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))),
    "medium": dict(
        ar=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
                num_key_value_heads=16),
        vq=dict(bits=12, encoder_channels=64, decoder_channels=64, encoder_multipliers=(1, 1, 2, 2, 4),
                decoder_multipliers=(1, 1, 2, 2, 4), encoder_blocks=(1,) * 5, decoder_blocks=(1,) * 5)),
}
PARTS = ()                                             # of render: it is one network
NAMES = {"sample": "published loop, transformers Phi", "render": "diffusers blocks", "see": "diffusers blocks"}


def build(sizes, tokens):
    """A Show-o of one of SIZES that draws `tokens` image tokens, in the published 16 rounds."""
    side, codes, tokenizer = side_of(tokens), magvit.Config(**sizes["vq"]), words_of_shapes()
    ar = phi.Config(**sizes["ar"], vocab_size=len(tokenizer) + codes.codebook_size + 1,
                    image_vocab_size=codes.codebook_size, remat="all")
    return Showo(ar=ar, vq=codes, tokenizer=tokenizer, grid=(side, side), of_shapes=True)


def alike(params):
    """Params as the peers can carry them: all of them."""
    return params


def drawn(umm, key, S):
    """S pictures that mean nothing, as a policy draws them."""
    codes, order = (jax.random.randint(k, (S, umm.image_tokens), 0, most)
                    for k, most in zip(jax.random.split(key), (umm.ar.image_vocab_size, umm.rounds)))
    return {"codes": codes, "round": order}


def slots(umm, P, group):
    """How many kept keys each forward of a picture must read, behind a prompt of P tokens that a group shares."""
    return [P / group] * umm.rounds


class Phi(nn.Module):
    """transformers' Phi, where the published names expect it."""

    def __init__(self, c):
        super().__init__()
        shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "layer_norm_eps")
        self.showo = PhiForCausalLM(PhiConfig(
            **{name: getattr(c, name) for name in shared}, qk_layernorm=True, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta,
                             "partial_rotary_factor": c.partial_rotary_factor}))

    def forward(self, ids, may, keep):
        """Logits of the last `keep` positions [B, keep, V]; may: which pairs see each other, bool [B, T, T]."""
        return self.showo(input_ids=ids, attention_mask=may[:, None], use_cache=False, logits_to_keep=keep).logits


class Backbone(Reads):
    """transformers' Phi; LoRA on it is `policy`."""

    def __init__(self, umm, params, adapter, lora_config, optim):
        self.umm, state = umm, tensors(params["ar"], phi.RULES)

        def carrying():
            model = Phi(umm.ar).eval()
            model.load_state_dict(state)
            return model

        self.base = carrying()
        self.adapted = Adapted(carrying(), adapter, f".*({lora_config.targets}).*", lora_config, optim)
        self.policy = self.adapted.model
        self.begin, self.end = (umm._picture(np.zeros(0, int))[i].item() for i in (0, 1))

    ids = staticmethod(tensor)                         # texts have the same ids on both sides

    # ---- drawing ----

    def contexts(self, prompts):
        """What pictures are drawn behind, [2 S, P] ids and which of them are real: prompts, and behind them as many
        empty texts, which are padded on the left."""
        empty = self.umm._head([])
        without = torch.full_like(prompts, self.umm.tokenizer.pad_token_id)
        without[:, -len(empty):] = torch.tensor(empty)
        real = torch.ones_like(prompts, dtype=torch.bool)
        behind = torch.zeros_like(real)
        behind[:, -len(empty):] = True
        return torch.cat([prompts, without]), torch.cat([real, behind])

    def scores(self, model, contexts, codes):
        """Guided logits [S, N, K] of all codes, given what is known of codes [S, N]; K: nothing is."""
        (text, real), N, first = contexts, codes.shape[1], self.umm.ar.first_code
        around = lambda token: torch.full((len(text), 1), token)
        ids = torch.cat([text, around(self.begin), (codes + first).repeat(2, 1), around(self.end)], dim=1)
        P, T = text.shape[1], ids.shape[1]
        may = torch.ones(T, T, dtype=torch.bool).tril()
        may[P:, P:] = True
        padded = torch.cat([~real, torch.zeros(len(real), T - P, dtype=torch.bool)], dim=1)
        may = may & ~padded[:, None, :] | torch.eye(T, dtype=torch.bool)          # a row that sees nothing would be nan
        logits = model(ids, may, N + 2)[:, 1:-1, first:-1]
        return self.guided(*logits.chunk(2))

    def guided(self, conditional, unconditional):
        """u + guidance (c - u) of two arrays of logits [S, N, K]."""
        return unconditional + self.umm.guidance * (conditional - unconditional)

    @torch.inference_mode()
    def sample(self, model, prompts, group, steps, scores=False):
        """The published loop: drawn [B * group, steps], with scores=True also the log-probabilities [B * group, steps]
        of the rounds that codes were fixed in."""
        umm, heat, contexts = self.umm, self.umm.heat, self.contexts(prompts.repeat_interleave(group, 0))
        codes = torch.full((len(prompts) * group, steps), umm.ar.image_vocab_size)
        order, said = torch.full_like(codes, -1), torch.zeros(codes.shape)
        for t in range(umm.rounds):
            unknown = codes == umm.ar.image_vocab_size
            p = self.scores(model, contexts, codes).softmax(-1)
            tokens = torch.where(unknown, torch.multinomial(p.flatten(0, 1), 1).view(codes.shape), codes)
            chosen = p.gather(-1, tokens[..., None])[..., 0]
            r = torch.tensor((t + 1) / umm.rounds)
            heat = heat * (1 - r)
            noise = -(-torch.rand(codes.shape).clamp(1e-20).log()).clamp(1e-20).log()
            sure = torch.where(unknown, chosen.clamp(1e-20), torch.finfo(torch.float32).max).log() + heat * noise
            left = torch.floor(steps * torch.cos(r * torch.pi / 2))
            left = torch.minimum(unknown.sum(1, keepdim=True) - 1, left).clamp(1).long()
            again = sure < sure.sort(1).values.gather(1, left)
            fixed = unknown & (~again | torch.tensor(t + 1 == umm.rounds))
            codes = torch.where(fixed | ~unknown, tokens, codes)
            order, said = torch.where(fixed, t, order), torch.where(fixed, chosen.log(), said)
        found = {"codes": codes, "round": order}
        return (found, said) if scores else found

    def image_logps(self, model, prompts, drawn):
        """log pi of each code of pictures drawn [S, N] behind prompts [S, P] in its round: [S, N]. Each round is
        computed again in the backward pass, as ours is: the memory of all of them is more than a machine has."""
        contexts, total = self.contexts(prompts), torch.zeros(drawn["codes"].shape)
        for t in range(self.umm.rounds):
            known = torch.where(drawn["round"] < t, drawn["codes"], self.umm.ar.image_vocab_size)
            of_round = lambda known: picked(self.scores(model, contexts, known), drawn["codes"])
            logps = checkpoint(of_round, known, use_reentrant=False) if torch.is_grad_enabled() else of_round(known)
            total = total + torch.where(drawn["round"] == t, logps, 0.0)
        return total

    def update(self, prompts, drawn, advantages, clip, beta):
        """One GRPO step of the adapter on pictures drawn [S, N] behind prompts [S, P], advantages [S]: loss, KL (nats a
        token), gradient norm."""
        with torch.no_grad():
            reference = self.image_logps(self.base, prompts, drawn)
        return self.adapted.update(self.image_logps(self.policy, prompts, drawn), reference, advantages, clip, beta)

    # ---- reading ----

    def asked(self, seen, prompts):
        """The chat before the answer, ids [S, C], and how many of its first tokens all others see."""
        before, after = self.umm._around(self.umm.instruction)
        row = lambda ids: torch.tensor(ids).expand(len(seen), -1)
        picture = torch.cat([row(before), tensor(seen) + self.umm.ar.first_code, row(after[:1])], dim=1)
        return torch.cat([picture, tensor(prompts.question)], dim=1), picture.shape[1]

    def text_scores(self, asked, more, keep):
        """The last `keep` positions' logits [S, keep, V] of one uncached forward over the chat and `more` ids."""
        ids, picture = torch.cat([asked[0], more], dim=1), asked[1]
        may = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        may[:, :picture] = True
        return self.base(ids, may.expand(len(ids), -1, -1), keep)


# ---- pictures ----------------------------------------------------------------------------------------------------

class Half(nn.Module):
    """MAGVIT-v2's encoder or decoder. Levels count from pixels down; width: channels of each, and how many blocks."""

    def __init__(self, c, decodes):
        super().__init__()
        channels, multipliers, blocks = ((c.decoder_channels, c.decoder_multipliers, c.decoder_blocks) if decodes else
                                         (c.encoder_channels, c.encoder_multipliers, c.encoder_blocks))
        widths, last, groups = [channels * m for m in multipliers], len(blocks) - 1, c.norm_num_groups
        shared = dict(resnet_eps=1e-6, resnet_groups=groups, temb_channels=None)
        ends = (c.bits, 3) if decodes else (3, c.bits)
        self.decodes = decodes
        if decodes:
            wider = [*widths[1:], widths[-1]]                                   # what comes from the level below
            self.up = nn.ModuleList(UpDecoderBlock2D(wider[i], widths[i], num_layers=n, add_upsample=i > 0, **shared)
                                    for i, n in enumerate(blocks))
            self.post_quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        else:
            narrower = [channels, *widths[:-1]]
            del shared["temb_channels"]
            self.down = nn.ModuleList(
                DownEncoderBlock2D(narrower[i], widths[i], num_layers=n, add_downsample=i < last, downsample_padding=0,
                                   **shared) for i, n in enumerate(blocks))
            self.quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        self.conv_in = nn.Conv2d(ends[0], widths[-1] if decodes else channels, 3, padding=1)
        self.mid = UNetMidBlock2D(widths[-1], temb_channels=None, resnet_eps=1e-6, resnet_groups=groups,
                                  attention_head_dim=widths[-1], resnet_time_scale_shift="default")
        self.norm_out = nn.GroupNorm(groups, widths[0] if decodes else widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0] if decodes else widths[-1], ends[1], 3, padding=1)

    def forward(self, x):                                              # [B, C, h, w]
        out = lambda x: self.conv_out(nn.functional.silu(self.norm_out(x)))
        if self.decodes:
            x = self.mid(self.conv_in(self.post_quant_conv(x)))
            for level in reversed(self.up):
                x = level(x)
            return out(x)
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(out(self.mid(x)))


RULES = ((r"(down|up)_(\d+)/", r"\1.\2."), (r"(resnets|attentions|downsamplers|upsamplers)_(\d+)", r"\1.\2"),
         (r"to_out_0", "to_out.0"))                    # from our names to those of the modules above


class Pictures:
    """Both halves of MAGVIT-v2."""

    def __init__(self, umm, params):
        self.umm, halves = umm, {"encoder": Half(umm.vq, False), "decoder": Half(umm.vq, True)}
        for name, half in halves.items():
            state = tensors(params["vq"][name], RULES)
            linear = lambda key, x: x[..., 0, 0] if ".to_" in key and x.ndim == 4 else x   # diffusers attends by these
            half.load_state_dict({key: linear(key, x) for key, x in state.items()})
        self.encoder, self.decoder = (half.eval() for half in halves.values())
        nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        self.bytes_of = {"render": nbytes(params["vq"]["decoder"]), "see": nbytes(params["vq"]["encoder"])}
        self.powers = 2 ** torch.arange(umm.vq.bits - 1, -1, -1)

    def noise(self, key, samples):
        """None: nothing is random between codes and pixels."""
        return None

    @torch.inference_mode()
    def render(self, drawn, noise):
        """Drawn [S, N] -> pixels [S, 3, H, W] in [0, 1], on the grid of 8 bits."""
        bits = (drawn["codes"][..., None] // self.powers % 2 * 2.0 - 1).transpose(1, 2).unflatten(2, self.umm.grid)
        return ((self.decoder(bits) + 1) / 2 * 255).clamp(0, 255).floor() / 255

    @torch.inference_mode()
    def see(self, pixels):
        """pixels [S, 3, H, W] in [0, 1] -> codes [S, N]."""
        return ((self.encoder(pixels * 2 - 1) > 0) * self.powers[:, None, None]).sum(1).flatten(1)
