"""What the torch sides of benchmark.py have in common, whatever family they carry (families/NAME_peers.py).

A family that does not draw token after token has `drawn` and `slots` of its own.
"""
import math

import jax
import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from gvu_jax.models import torch_keys


def tensor(array):
    """A JAX or numpy array as a torch tensor of its own; ids become int64, which is what torch indexes with."""
    copy = torch.from_numpy(np.array(array))
    return copy.long() if copy.dtype == torch.int32 else copy


def tensors(params, rules):
    return {name: tensor(array) for name, array in torch_keys.to_torch(params, rules).items()}


def picked(logits, ids):
    """log-softmax of logits [B, T, V] at ids [B, T] -> [B, T]."""
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def side_of(tokens):
    """Of a square picture of so many image tokens; ValueError where there is none."""
    side = math.isqrt(tokens)
    if side * side != tokens or not side:
        raise ValueError(f"--tokens={tokens} is no square number; 256 (16 x 16) and 1296 (36 x 36) are")
    return side


def drawn(umm, key, S):
    """S pictures that mean nothing, of a model that draws token after token: codes [S, N]."""
    return jax.random.randint(key, (S, umm.image_tokens), 0, umm.ar.image_vocab_size)


def slots(umm, P, group):
    """How many kept keys each forward of a picture must read, one forward a token behind a prompt of P tokens."""
    return [P + t for t in range(umm.image_tokens)]


class Reads:
    """Probabilities of words, for who has text_scores(asked, more, keep): the logits [S, keep, V] behind what was asked
    and `more` ids."""

    @torch.inference_mode()
    def read(self, asked, words):
        """log p(word_j | picture, question, word_<j) in one forward: [S, L]. words: ids."""
        return picked(self.text_scores(asked, words[:, :-1], words.shape[1]), words)

    @torch.inference_mode()
    def read_in_loop(self, asked, words):
        """The same with one uncached forward for each word (all pictures in a batch)."""
        said = [self.text_scores(asked, words[:, :j], 1) for j in range(words.shape[1])]
        return picked(torch.cat(said, dim=1), words)


class Adapted:
    """A torch model under peft with our adapter on the modules that `targets` matches, and AdamW as we set it."""

    def __init__(self, model, adapter, targets, lora_config, optim):
        self.model = get_peft_model(model, LoraConfig(
            r=lora_config.rank, lora_alpha=lora_config.alpha, target_modules=targets))
        set_peft_model_state_dict(self.model, {k: tensor(v) for k, v in adapter.items()})
        self.trained = {name.replace(".default", ""): p for name, p in self.model.named_parameters()
                        if p.requires_grad}
        self.clip_norm = optim.clip_norm
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=optim.lr, betas=(0.9, optim.b2), eps=1e-8,
                                           weight_decay=optim.weight_decay)

    def update(self, logps, reference, advantages, clip, beta):
        """One GRPO step from the policy's log-probs [S, N], which carry their graph: loss, KL, gradient norm."""
        A, d = advantages[:, None], reference - logps
        ratio, kl = (logps - logps.detach()).exp(), d.exp() - d - 1
        loss = -(torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A) - beta * kl).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.clip_norm)
        self.optimizer.step()
        return loss.item(), kl.mean().item(), norm.item()

    def first_moments(self):
        """Adam's running mean of the gradients, under peft's names: what one step leaves of the clipped gradient."""
        return {name: self.optimizer.state[p]["exp_avg"].numpy() for name, p in self.trained.items()}
