"""How fast is a GvU step? Each phase, ours against what PyTorch libraries offer, side by side in one run.

    pip install ".[test]"
    python -m gvu_jax.benchmark --size=small [--tokens=256] [--phases=sample,reward] [--rounds=5] [--report=DIR]

Both sides carry the same random weights and get the same shapes (benchmark_peers.py says what the peers are), and no
phase is timed before its outputs were found equal within float32 rounding. Then they take turns, A B A B, so that a
machine that slows down slows both. The table gives medians, the range over the rounds, the median of the rounds'
ratios, and how far ours is from the floor: the larger of

    (float operations of the products in our program) / (rate at which this machine multiplies large matrices)
    (bytes of weights and cache that must be read)    / (rate at which it reads arrays as large as those)

both measured at the start. The phase `linear` times our step alone, for growing groups and growing numbers of prompts.
With --report, every timing goes to DIR/benchmark.json, and table and plot to the page DIR/report.html.
"""
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from gvu_jax import checkpoint, cli, lora, objectives, optim, report, sampling, sharding
from gvu_jax.methods import gvu
from gvu_jax.metrics import replace_file
from gvu_jax.models import flux, siglip_vq, vae, xomni
from gvu_jax.policy import State, init_trainable
from gvu_jax.shapes.tokenizer import build_tokenizer
from gvu_jax.shapes.sentences import vocabulary
from gvu_jax.umm import XOmni

try:
    import torch

    from gvu_jax import benchmark_peers as peers
except ImportError as error:
    sys.exit(f"error: the peers are not installed ({error}): pip install '.[test]' in a clone of the repository")

WORDS = 36                                             # tokens of a prompt
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


# ---- what is measured --------------------------------------------------------------------------------------------

class Phase(NamedTuple):
    """One line (or two) of the table. The callables take nothing and return only when their result is there."""
    ours: Callable
    theirs: dict[str, Callable]
    check: Callable                        # raises ValueError where the two sides differ
    flops: float                           # of the products in our program
    bytes: float                           # that it cannot help reading


class Bench:
    """Both sides of a comparison: one model, its weights on either side, and the inputs of every phase.

    S = prompts * group pictures of `tokens` image tokens, prompts of WORDS tokens, nothing padded. sizes: an entry of
    SIZES. Raises ValueError where `tokens` is no square.
    """

    def __init__(self, sizes, tokens, prompts, group, seed=0):
        self.umm = build(sizes, tokens)
        rng = np.random.default_rng(seed)
        self.params = random_like(jax.eval_shape(lambda: checkpoint.init(self.umm, jax.random.key(0))), rng)
        self.params["ar"]["mm_norm"] = self.params["ar"]["lm_norm"]                                 # Qwen2 has one
        self.config = ConfigDict(dict(
            gvu=dict(prompts=prompts, group=group, clip=0.2, beta=0.03, anchor=0.0, advantage_eps=1e-4, inner_steps=1,
                     micro_batches=1, waves=1),
            reward=dict(teacher="base", view="pixels", mean="geometric"), lora=dict(rank=8, alpha=32, targets="_proj"),
            optim=dict(lr=1e-6, warmup=0, schedule="constant", b2=0.99, weight_decay=0.0, clip_norm=1.0)))
        self.optimizer = optim.build(self.config.optim, steps=1)
        self.how = sampling.How(images_per_prompt=group)
        self.mesh = sharding.make_mesh({}, jax.devices()[:1])
        self.method = gvu.GvU(self.umm, self.config, self.how, self.optimizer, self.mesh)
        self.key = jax.random.key(seed + 1)
        shapes = jax.eval_shape(lambda: init_trainable(self.params, self.config, self.key)["adapter"])
        self.adapter = jax.tree.map(lambda x: 0.1 * x, random_like(shapes, rng))    # small, but b is not 0
        self.names = xomni.rules(self.umm.ar)
        words = vocabulary()
        texts = [" ".join(words[(7 * i + j) % len(words)] for j in range(WORDS)) for i in range(prompts)]
        self.prompts = jax.device_put(self.umm.encode_prompts(texts))
        if not all(np.all(mask) for mask in (self.prompts.mask, self.prompts.question_mask, self.prompts.words_mask)):
            raise ValueError("the peers read no padding: the prompts must all be of one length")
        self.samples = prompts * group
        self.grouped = self.prompts.repeat(group)
        self.codes = jax.random.randint(self.key, (self.samples, tokens), 0, self.umm.ar.image_vocab_size)
        self.rewards = jax.random.uniform(self.key, (self.samples,))

    @functools.cached_property
    def backbone(self):
        return peers.Backbone(self.umm.ar, self.params["ar"], lora.to_peft(self.adapter, self.names), self.config.lora,
                              self.config.optim)

    @functools.cached_property
    def pictures(self):
        return peers.Pictures(self.umm, self.params)

    def state(self):
        adapter = jax.tree.map(jnp.copy, self.adapter)                        # an update takes its state with it
        state = State(jnp.zeros((), jnp.int32), {"adapter": adapter}, self.optimizer.init({"adapter": adapter}))
        return jax.device_put(state, sharding.shardings(state, self.mesh))      # where an update leaves it

    # ---- phases ----

    def sample(self):
        """Image tokens of all prompts at temperature 1, by the frozen base."""
        umm, N, group, peer = self.umm, self.umm.image_tokens, self.how.images_per_prompt, self.backbone
        ours = functools.partial(self.method.programs.sample.jitted, self.params, self.prompts, self.key)
        prompts = peer.ids(self.prompts.tokens)

        def check():                                                          # each side scores what the other drew
            (codes, logps), (peer_codes, peer_logps) = ours(), peer.sample(peer.base, prompts, group, N, scores=True)
            with torch.inference_mode():
                told = peer.image_logps(peer.base, prompts.repeat_interleave(group, 0), peers.tensor(codes))
            assert_equal("log-probabilities of our samples", logps, told)
            told = jax.jit(umm.image_logps)(self.params, self.grouped, jnp.asarray(peer_codes.numpy(), jnp.int32))
            assert_equal("log-probabilities of the peer's samples", told, peer_logps)

        ar, P = umm.ar, self.prompts.tokens.shape[1]
        slots = sum(P + t for t in range(N)) * self.samples                   # cache slots read in all
        weights = nbytes(self.params["ar"]["layers"]) + ar.hidden_size * ar.image_vocab_size * 4
        cache = slots * ar.num_hidden_layers * 2 * ar.num_key_value_heads * ar.head_dim * 4
        return Phase(ready(ours), {"transformers generate": lambda: peer.sample(peer.base, prompts, group, N)}, check,
                     flops(ours), N * weights + cache)

    def denoise(self):
        """One evaluation of the diffusion head."""
        c, S, N = self.umm.flux, self.samples, self.umm.image_tokens
        noise, siglip = (jax.random.normal(self.key, (S, N, width)) for width in (c.in_channels, c.siglip_channels))
        context, pooled = jnp.zeros((S, 1, c.joint_attention_dim)), jnp.zeros((S, c.pooled_projection_dim))
        velocity = functools.partial(flux.FluxTransformer(c).apply, grid=self.umm.grid)
        ours = functools.partial(jax.jit(velocity), {"params": self.params["flux"]}, noise, siglip, context, pooled,
                                 jnp.full(S, 0.7), jnp.ones(S))
        theirs = functools.partial(self.pictures.velocity, peers.tensor(noise), peers.tensor(siglip), 0.7)
        return Phase(ready(ours), {"diffusers FLUX": theirs}, lambda: assert_equal("velocity", ours(), theirs()),
                     flops(ours), nbytes(self.params["flux"]))

    def decode(self):
        """Latents to pixels by the autoencoder."""
        c, (rows, cols) = self.umm.vae, self.umm.grid
        latents = jax.random.normal(self.key, (self.samples, 2 * rows, 2 * cols, c.latent_channels))
        module = functools.partial(vae.module(c).apply, method="decode")
        ours = functools.partial(jax.jit(module), {"params": self.params["vae"]}, latents)
        theirs = functools.partial(self.pictures.decode, channels_first(latents))
        return Phase(ready(ours), {"diffusers AutoencoderKL": theirs},
                     lambda: assert_equal("pixels", channels_first(ours()), theirs()), flops(ours),
                     nbytes(self.params["vae"]["decoder"]))

    def render(self):
        """Image tokens to pixels: the tokenizer's latents, every denoising step, the autoencoder."""
        ours = functools.partial(self.method.programs.render.jitted, self.params, self.codes, self.prompts, self.key)
        theirs = functools.partial(self.pictures.render, peers.tensor(self.codes), self.noise())

        def check():                                               # a byte may round either way, and no more than that
            apart = np.abs(channels_first(ours()).numpy() - theirs().numpy()) * 255
            if apart.max() > 1.01 or np.mean(apart > 0.5) > 0.01:
                raise ValueError(f"pixels differ by up to {apart.max():.1f} of 255")

        weights = nbytes([self.params["vae"]["decoder"]]) + self.umm.diffusion_steps * nbytes(self.params["flux"])
        return Phase(ready(ours), {"diffusers": theirs}, check, flops(ours), weights)

    def see(self):
        """Pixels to the tokens that the understanding branch reads."""
        side = (self.umm.grid[0] * self.umm.vision.patch_size, self.umm.grid[1] * self.umm.vision.patch_size)
        pixels = jax.random.uniform(self.key, (self.samples, *side, 3))
        ours = functools.partial(self.method.programs.see.jitted, self.params, pixels)
        theirs = functools.partial(self.pictures.see, channels_first(pixels))

        def check():                                               # a code whose rival is as near may fall either way
            differ = np.mean(np.asarray(ours()).reshape(self.samples, -1) != theirs().numpy())
            if differ > 1e-3:
                raise ValueError(f"{differ:.1%} of the image tokens differ")

        return Phase(ready(ours), {"torch": theirs}, check, flops(ours), nbytes(self.params["vision"]["vit"]))

    def reward(self):
        """The probability of every word of the prompt given the picture."""
        seen = self.codes.reshape(-1, *self.umm.grid)
        ours = functools.partial(self.method.programs.read.jitted, self.params, seen, self.grouped)
        asked, words = self.asked(self.codes), peers.tensor(self.grouped.words)
        theirs = {"one uncached forward per word": functools.partial(self.backbone.read_in_loop, asked, words),
                  "one torch forward": functools.partial(self.backbone.read, asked, words)}

        def check():
            for label, run in theirs.items():
                assert_equal(f"word log-probabilities, {label},", ours()[0], run())

        return Phase(ready(ours), theirs, check, flops(ours), nbytes(self.params["ar"]["layers"]))

    def update(self):
        """Reference, policy and its gradient, one AdamW step of a rank-8 adapter."""
        g, state, peer = self.config.gvu, self.state(), self.backbone
        inputs = (self.grouped, self.codes, jnp.zeros(self.codes.shape), self.rewards,
                  self.codes.reshape(-1, *self.umm.grid))

        def ours():
            nonlocal state
            state, metrics = self.method.update(state, self.params, *inputs)
            return state, metrics

        prompts, codes = peer.ids(self.grouped.tokens), peers.tensor(self.codes)
        advantages = peers.tensor(objectives.group_advantages(self.rewards, g.group, g.advantage_eps))
        theirs = functools.partial(peer.update, prompts, codes, advantages, g.clip, g.beta)

        def check():
            (after, metrics), (loss, kl, norm) = ours(), theirs()
            assert_equal("loss, kl and gradient norm", [metrics[k] for k in ("loss", "kl", "grad_norm")],
                         [loss, kl, norm])
            moments = next(s for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
                           if hasattr(s, "mu")).mu["adapter"]
            told = peer.first_moments()
            for name, moment in lora.to_peft(moments, self.names).items():
                assert_equal(f"gradient of {name}", moment, told[name])

        count = flops(functools.partial(self.method.update.jitted, self.state(), self.params, *inputs))
        return Phase(ready(ours), {"torch and peft": theirs}, check, count, 3 * nbytes(self.params["ar"]["layers"]))

    def step(self):
        """All of them, one after another: what training pays for S pictures."""
        umm, peer, pictures, g, ours = self.umm, self.backbone, self.pictures, self.config.gvu, self.our_step()
        prompts, grouped, noise = peer.ids(self.prompts.tokens), peer.ids(self.grouped.tokens), self.noise()
        words = peers.tensor(self.grouped.words)

        def theirs(read):
            codes = peer.sample(peer.policy, prompts, g.group, umm.image_tokens).clone()
            seen = pictures.see(pictures.render(codes, noise))
            rewards = read(self.asked(seen.numpy()), words).mean(1).exp()
            advantages = peers.tensor(objectives.group_advantages(jnp.asarray(rewards.numpy()), g.group,
                                                                  g.advantage_eps))
            return peer.update(grouped, codes, advantages, g.clip, g.beta)

        count = sum(getattr(self, name)().flops for name in ("sample", "render", "see", "reward", "update"))
        # Both draw at random here; each part was compared in its own phase.
        return Phase(ours, {"peers, scoring loop": lambda: theirs(peer.read_in_loop),
                                   "peers, one forward": lambda: theirs(peer.read)}, ours, count, self.sample().bytes)

    def our_step(self):
        """The step as train.py takes it; every call goes on from the state that the one before left."""
        method, base, state = self.method, self.params, self.state()

        def step():
            nonlocal state
            policy = method.policy(base, state.trainable)
            image_tokens, logps = method.sample(policy, self.prompts, self.key)
            pixels = method.render(base, image_tokens, self.prompts, self.key)
            reward, seen = method.reward(base, policy, image_tokens, pixels, self.grouped)
            state, metrics = method.update(state, base, self.grouped, image_tokens, logps, reward, seen)
            return metrics

        return ready(step)

    # ---- inputs of several phases ----

    def noise(self):
        draw = jax.vmap(lambda key: jax.random.normal(key, (self.umm.image_tokens, self.umm.flux.in_channels)))
        return peers.tensor(draw(sampling.sample_keys(self.key, jnp.arange(self.samples))))

    def asked(self, codes):
        """The chat before the answer, in the peer's ids [S, C]."""
        seen = jnp.asarray(codes, jnp.int32).reshape(-1, *self.umm.grid)
        return self.backbone.ids(self.umm._asked(seen, self.grouped)[0])


PHASES = ("sample", "denoise", "decode", "render", "see", "reward", "update", "step")


def build(sizes, tokens):
    """An XOmni of one of SIZES, without multimodal layers (Qwen2 has none), that draws `tokens` image tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens or not side:
        raise ValueError(f"--tokens={tokens} is no square number; 256 (16 x 16) and 1296 (36 x 36) are")
    tokenizer = build_tokenizer(sizes["vision"]["codebook_size"])
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


def random_like(shapes, rng):
    """Arrays for a tree of shapes, float32, none of them all zero or one: a new diffusion head would compute nothing.
    Kernels [.., in, out] have variance 1 / in, so that activations keep their size."""
    def draw(path, leaf):
        x, kind = rng.standard_normal(leaf.shape, np.float32), path[-1].key
        if kind in ("kernel", "a", "b"):
            return x / np.sqrt(leaf.shape[-2])
        return 1 + 0.1 * x if kind == "scale" else 0.2 * x

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def assert_equal(what, ours, theirs):
    """Raises ValueError where two arrays differ by more than float32 rounding: 2e-4 of the largest entry."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    apart, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    if not apart <= 2e-4 * largest:
        raise ValueError(f"{what} differ from the peer's by {apart:.2g} where the largest is {largest:.2g}: nothing is "
                         f"timed")


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


# ---- how it is measured ------------------------------------------------------------------------------------------

def ready(program):
    return lambda: jax.block_until_ready(program())


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(runs, rounds):
    """Seconds [rounds] of each of `runs` (label -> callable), which take turns."""
    taken = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            taken[label].append(seconds(run))
    return taken


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def flops(program, *args):
    """Float operations of all matrix products and convolutions that a program runs, loops multiplied out."""
    def count(jaxpr):
        total = 0
        for op in jaxpr.eqns:
            shapes = [x.aval.shape for x in op.invars]
            if op.primitive.name == "dot_general":
                (contracted, _), _ = op.params["dimension_numbers"]
                total += 2 * math.prod(op.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contracted)
            elif op.primitive.name == "conv_general_dilated":
                features = shapes[1][op.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * math.prod(op.outvars[0].aval.shape) * math.prod(shapes[1]) // features
            inner = sum(map(count, jaxprs_in_params(op.params)))
            total += inner * op.params.get("length", 1) if op.primitive.name == "scan" else inner
        return total

    return count(jax.make_jaxpr(program)(*args).jaxpr)


class Machine(NamedTuple):
    name: str
    flops: float                           # float operations a second, float32 matrix product of side 2048
    bandwidth: float                       # bytes a second, reading an array as large as the weights


def probe(size):
    """A second or two of measurement; `size` in bytes. The better of what JAX and torch reach."""
    square, array = np.ones((2048, 2048), np.float32), torch.ones(size // 4)
    product, ours, theirs = jax.jit(jnp.dot), jnp.asarray(square), torch.from_numpy(square)
    best = lambda run: min(seconds(run) for _ in range(6))
    multiply = min(best(lambda: product(ours, ours).block_until_ready()), best(lambda: theirs @ theirs))
    return Machine(f"{platform.machine()}, {os.cpu_count()} cores", 2 * 2048 ** 3 / multiply, size / best(array.sum))


def measure(bench, names, rounds, machine, say=lambda line: None):
    """One dict a line of the table. Every phase is checked, which also compiles it, and then timed."""
    lines = []
    for name in names:
        phase = getattr(bench, name)()
        phase.check()
        taken = alternate({"ours": phase.ours, **phase.theirs}, rounds)
        floor = max(phase.flops / machine.flops, phase.bytes / machine.bandwidth)
        for label in phase.theirs:
            ratios = [theirs / ours for ours, theirs in zip(taken["ours"], taken[label])]
            lines.append(dict(phase=name, peer=label, ours=taken["ours"], theirs=taken[label], ratios=ratios,
                              ratio=statistics.median(ratios), floor=floor, gflop=phase.flops / 1e9,
                              over_floor=statistics.median(taken["ours"]) / floor))
            say(row(lines[-1]))
    return lines


HEADER = "| phase | peer | ours, s | peer, s | peer / ours | ours / floor |\n|---|---|---|---|---|---|"


def row(line):
    spreads = [report.spread(line[name], digits) for name, digits in (("ours", 3), ("theirs", 3), ("ratios", 1))]
    return (f"| {line['phase']} | {line['peer']} | {' | '.join(spreads)} | {line['over_floor']:.1f} |")


def linear(sizes, tokens, rounds, least, times=(1, 2, 4, 8)):
    """Median seconds of our step for `least` pictures and so many times more, one prompt with growing groups and groups
    of two of growing number; and the exponent e of seconds ~ pictures^e, 1 where the cost is linear."""
    found = {}
    counts = [least * n for n in times]
    for what, shapes in {"G": [(1, n) for n in counts], "prompts": [(n // 2, 2) for n in counts]}.items():
        runs = {}
        for count, (prompts, group) in zip(counts, shapes):
            runs[count] = Bench(sizes, tokens, prompts, group).our_step()
            runs[count]()                                                                           # compiles
        medians = [statistics.median(taken) for taken in alternate(runs, rounds).values()]
        exponent = np.polyfit(np.log(counts), np.log(medians), 1)[0]
        found[what] = dict(pictures=counts, seconds=medians, exponent=float(exponent))
    return found


_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "How large the models are.")
_PHASES = flags.DEFINE_list("phases", list(PHASES), f"Which of {', '.join(PHASES)}, linear.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Image tokens of a picture, a square number.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 2, "Prompts of a step.", lower_bound=1)
_GROUP = flags.DEFINE_integer("group", 4, "Pictures of a prompt.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each side is timed.", lower_bound=1)
_REPORT = cli.path_flag("report", "Folder for every timing and the page.")


def main(_):
    if unknown := [name for name in _PHASES.value if name not in (*PHASES, "linear")]:
        raise ValueError(f"--phases: there is no {', '.join(unknown)}; there are {', '.join(PHASES)} and linear")
    torch.set_num_threads(os.cpu_count())
    sizes, names = SIZES[_SIZE.value], [name for name in _PHASES.value if name != "linear"]
    bench = Bench(sizes, _TOKENS.value, _PROMPTS.value, _GROUP.value)
    machine = probe(max(nbytes(bench.params["ar"]["layers"]), 8 << 20))       # a smaller array would time the threads
    weights = nbytes(bench.params["ar"]) / 4e6                                                      # float32
    print(f"{_SIZE.value}: backbone of {weights:.1f}M parameters, {bench.samples} pictures of {_TOKENS.value} tokens "
          f"({_PROMPTS.value} prompts of {WORDS} tokens), median (range) of {_ROUNDS.value}\n"
          f"{machine.name}: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s; "
          f"jax {jax.__version__}, torch {torch.__version__}\n\n{HEADER}")
    found = dict(size=_SIZE.value, tokens=_TOKENS.value, prompts=_PROMPTS.value, group=_GROUP.value,
                 machine=machine._asdict(),
                 phases=measure(bench, names, _ROUNDS.value, machine, functools.partial(print, flush=True)))
    if "linear" in _PHASES.value:
        found["linear"] = linear(sizes, _TOKENS.value, _ROUNDS.value, bench.samples)
        for what, line in found["linear"].items():
            costs = ", ".join(f"{n} pictures {s:.2f} s" for n, s in zip(line["pictures"], line["seconds"]))
            print(f"\n{what}: {costs}; seconds ~ pictures^{line['exponent']:.2f}")
    if _REPORT.value:
        Path(_REPORT.value).mkdir(parents=True, exist_ok=True)
        replace_file(Path(_REPORT.value) / "benchmark.json", json.dumps(found, indent=1))
        print(f"\n{report.write_benchmark(_REPORT.value)}")


if __name__ == "__main__":
    cli.run(main)
