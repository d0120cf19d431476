"""How fast is a GvU step? Each phase, ours against what PyTorch libraries offer, side by side in one run.

    pip install ".[test]"
    python -m gvu_jax.benchmark --size=small [--tokens=256] [--phases=sample,reward] [--rounds=5] [--report=DIR]

Both sides carry the same random weights and get the same shapes (families/NAME_peers.py says what the peers are), and
no phase is timed before its outputs were found equal within float32 rounding. Then they take turns, A B A B, so that a
machine that slows down slows both. The table gives medians, the range over the rounds, the median of the rounds'
ratios, and how far ours is from the floor: the larger of

    (float operations of the products in our program) / (rate at which this machine multiplies large matrices)
    (bytes of weights and cache that must be read)    / (rate at which it reads arrays as large as those)

both measured at the start. A published size, such as --size=janus-pro-1b, is for a card: see full_size.py, which has
a table of its own. The phase `linear` times our step alone, for growing groups and growing numbers of prompts.
With --report, every timing goes to DIR/benchmark.json, and table and plot to the page DIR/report.html (of a published
size the first alone).
"""
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from gvu_jax import cli, families, full_size, lora, objectives, optim, report, sampling, sharding
from gvu_jax.methods import gvu
from gvu_jax.metrics import replace_file
from gvu_jax.models import qwen2
from gvu_jax.policy import State, init_trainable
from gvu_jax.shapes.sentences import vocabulary

MISSING = "the peers are not installed: pip install '.[test]' in a clone of the repository"
try:
    import torch
except ImportError:
    torch = None                                       # --help needs none; main says what is missing

SIZES = "tiny", "small", "medium"                      # of the backbone: 0.6M, 25M, 150M parameters, or thereabouts
WORDS = 36                                             # tokens of a prompt

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

    S = prompts * group pictures of `tokens` image tokens, prompts of WORDS tokens, nothing padded. peers: the family's
    module; sizes: an entry of its SIZES. Raises ValueError where it has no pictures of so many tokens.
    """

    def __init__(self, peers, sizes, tokens, prompts, group, seed=0):
        self.peers, self.umm = peers, peers.build(sizes, tokens)
        rng = np.random.default_rng(seed)
        self.params = peers.alike(random_like(jax.eval_shape(self.umm.init, jax.random.key(0)), rng))
        self.config = ConfigDict(dict(
            gvu=dict(prompts=prompts, group=group, clip=0.2, beta=0.03, anchor=0.0, advantage_eps=1e-4, inner_steps=1,
                     micro_batches=1, waves=1),
            reward=dict(teacher="base", view="pixels", mean="geometric"), lora=dict(rank=8, alpha=32, targets="_proj"),
            optim=dict(lr=1e-6, warmup=0, schedule="constant", b2=0.99, weight_decay=0.0, clip_norm=1.0)))
        self.optimizer = optim.build(self.config.optim, steps=1)
        self.how = sampling.How(images_per_prompt=group, guidance=self.umm.guidance)
        self.mesh = sharding.make_mesh({}, jax.devices()[:1])
        self.method = gvu.GvU(self.umm, self.config, self.how, self.optimizer, self.mesh)
        self.key = jax.random.key(seed + 1)
        shapes = jax.eval_shape(lambda: init_trainable(self.umm, self.params, self.config, self.key)["adapter"])
        self.adapter = jax.tree.map(lambda x: 0.1 * x, random_like(shapes, rng))    # small, but b is not 0
        words = vocabulary()
        texts = [" ".join(words[(7 * i + j) % len(words)] for j in range(WORDS)) for i in range(prompts)]
        encoded = self.umm.encode_prompts(texts)
        spare = int(np.sum(~encoded.mask.any(axis=0)))                        # padding on the left that all have
        self.prompts = jax.device_put(encoded.replace(tokens=encoded.tokens[:, spare:], mask=encoded.mask[:, spare:]))
        if not all(np.all(mask) for mask in (self.prompts.mask, self.prompts.question_mask, self.prompts.words_mask)):
            raise ValueError("the peers read no padding: the prompts must all be of one length")
        self.samples = prompts * group
        self.grouped = self.prompts.repeat(group)
        self.drawn = peers.drawn(self.umm, self.key, self.samples)
        self.rewards = jax.random.uniform(self.key, (self.samples,))
        self.pixels = jax.random.uniform(self.key, (self.samples, *self.umm.picture_size, 3))

    @functools.cached_property
    def seen(self):
        """What a reading begins from: what was drawn, or where that means nothing to it, what it sees of `pixels`."""
        seen = self.umm.seen_of(self.drawn)
        return self.method.programs.see.jitted(self.params, self.pixels) if seen is None else seen

    @functools.cached_property
    def backbone(self):
        adapter = lora.to_peft(self.adapter, self.umm.adapter_rules)
        return self.peers.Backbone(self.umm, self.params, adapter, self.config.lora, self.config.optim)

    @functools.cached_property
    def pictures(self):
        return self.peers.Pictures(self.umm, self.params)

    def to_torch(self, drawn):
        return jax.tree.map(self.peers.tensor, drawn)

    def state(self):
        adapter = jax.tree.map(jnp.copy, self.adapter)                        # an update takes its state with it
        state = State(jnp.zeros((), jnp.int32), {"adapter": adapter}, self.optimizer.init({"adapter": adapter}))
        where = sharding.shardings(self.umm.partition, state, self.mesh)            # where an update leaves it
        return jax.device_put(state, where)

    # ---- phases ----

    def phase(self, name):
        """The phase of this name: one of those below, or a piece of them that the family's peers compare by itself."""
        if name not in self.peers.PARTS:
            return getattr(self, name)()
        label, ours, theirs, weights = getattr(self.pictures, f"compare_{name}")(self.key, self.samples)
        return Phase(ready(ours), {label: theirs}, lambda: assert_equal(name, ours(), theirs()), flops(ours), weights)

    def sample(self):
        """Image tokens of all prompts at temperature 1, by the frozen base."""
        umm, N, group, peer = self.umm, self.umm.image_tokens, self.how.images_per_prompt, self.backbone
        ours = functools.partial(self.method.programs.sample.jitted, self.params, self.prompts, self.key)
        prompts = peer.ids(self.prompts.tokens)

        def check():                                                          # each side scores what the other drew
            (drawn, logps), (peer_drawn, peer_logps) = ours(), peer.sample(peer.base, prompts, group, N, scores=True)
            with torch.inference_mode():
                told = peer.image_logps(peer.base, prompts.repeat_interleave(group, 0), self.to_torch(drawn))
            assert_equal("log-probabilities of our samples", logps, told)
            told = jax.jit(umm.image_logps, static_argnums=3)(
                self.params, self.grouped, jax.tree.map(lambda x: jnp.asarray(x.numpy(), jnp.int32), peer_drawn),
                self.how)
            assert_equal("log-probabilities of the peer's samples", told, peer_logps)

        ar, P = umm.ar, self.prompts.tokens.shape[1]
        contexts = 1 if self.how.guidance == 1.0 else 2                       # with the prompt, and without
        slots = self.peers.slots(umm, P, group)                               # of the cache, that each forward reads
        weights = nbytes(self.params["ar"]["layers"]) + ar.hidden_size * ar.image_vocab_size * 4
        slot = ar.num_hidden_layers * 2 * ar.num_key_value_heads * ar.head_dim * 4
        cache = sum(slots) * self.samples * contexts * slot
        return Phase(ready(ours), {self.peers.NAMES["sample"]: lambda: peer.sample(peer.base, prompts, group, N)},
                     check, flops(ours), len(slots) * weights + cache)

    def render(self):
        """Image tokens to pixels: the tokenizer's latents, every denoising step, the autoencoder."""
        ours = functools.partial(self.method.programs.render.jitted, self.params, self.drawn, self.prompts, self.key)
        noise = self.pictures.noise(self.key, self.samples)
        theirs = functools.partial(self.pictures.render, self.to_torch(self.drawn), noise)

        def check():                                               # a byte may round either way, and no more than that
            apart = np.abs(channels_first(ours()).numpy() - theirs().numpy()) * 255
            if apart.max() > 1.01 or np.mean(apart > 0.5) > 0.01:
                raise ValueError(f"pixels differ by up to {apart.max():.1f} of 255")

        return Phase(ready(ours), {self.peers.NAMES["render"]: theirs}, check, flops(ours),
                     self.pictures.bytes_of["render"])

    def see(self):
        """Pixels to the tokens or features that the understanding branch reads."""
        ours = functools.partial(self.method.programs.see.jitted, self.params, self.pixels)
        theirs = functools.partial(self.pictures.see, channels_first(self.pixels))

        def check():                                               # a code whose rival is as near may fall either way
            found, told = np.asarray(ours()), theirs().numpy()
            if np.issubdtype(found.dtype, np.floating):
                return assert_equal("features", found, told)
            differ = np.mean(found.reshape(told.shape) != told)
            if differ > 1e-3:
                raise ValueError(f"{differ:.1%} of the image tokens differ")

        return Phase(ready(ours), {self.peers.NAMES["see"]: theirs}, check, flops(ours), self.pictures.bytes_of["see"])

    def reward(self):
        """The probability of every word of the prompt given the picture."""
        ours = functools.partial(self.method.programs.read.jitted, self.params, self.seen, self.grouped)
        asked, words = self.backbone.asked(self.seen, self.grouped), self.peers.tensor(self.grouped.words)
        theirs = {"one uncached forward per word": functools.partial(self.backbone.read_in_loop, asked, words),
                  "one torch forward": functools.partial(self.backbone.read, asked, words)}

        def check():
            for label, run in theirs.items():
                assert_equal(f"word log-probabilities, {label},", ours()[0], run())

        return Phase(ready(ours), theirs, check, flops(ours), nbytes(self.params["ar"]["layers"]))

    def update(self):
        """Reference, policy and its gradient, one AdamW step of a rank-8 adapter."""
        g, state, peer = self.config.gvu, self.state(), self.backbone
        logps = jnp.zeros((self.samples, self.umm.image_tokens))
        inputs = (self.grouped, self.drawn, logps, self.rewards, self.seen)

        def ours():
            nonlocal state
            state, metrics = self.method.update(state, self.params, *inputs)
            return state, metrics

        prompts, drawn = peer.ids(self.grouped.tokens), self.to_torch(self.drawn)
        advantages = self.peers.tensor(objectives.group_advantages(self.rewards, g.group, g.advantage_eps))
        theirs = functools.partial(peer.update, prompts, drawn, advantages, g.clip, g.beta)

        def check():
            (after, metrics), (loss, kl, norm) = ours(), theirs()
            assert_equal("loss, kl and gradient norm", [metrics[k] for k in ("loss", "kl", "grad_norm")],
                         [loss, kl, norm])
            moments = next(s for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
                           if hasattr(s, "mu")).mu["adapter"]
            told = peer.adapted.first_moments()
            for name, moment in lora.to_peft(moments, self.umm.adapter_rules).items():
                assert_equal(f"gradient of {name}", moment, told[name])

        count = flops(functools.partial(self.method.update.jitted, self.state(), self.params, *inputs))
        return Phase(ready(ours), {"torch and peft": theirs}, check, count, 3 * nbytes(self.params["ar"]["layers"]))

    def step(self):
        """All of them, one after another: what training pays for S pictures."""
        umm, peer, pictures, g, ours = self.umm, self.backbone, self.pictures, self.config.gvu, self.our_step()
        prompts, grouped = peer.ids(self.prompts.tokens), peer.ids(self.grouped.tokens)
        noise = pictures.noise(self.key, self.samples)
        words = self.peers.tensor(self.grouped.words)

        def theirs(read):
            drawn = jax.tree.map(torch.clone, peer.sample(peer.policy, prompts, g.group, umm.image_tokens))
            seen = pictures.see(pictures.render(drawn, noise))
            rewards = read(peer.asked(seen.numpy(), self.grouped), words).mean(1).exp()
            advantages = self.peers.tensor(objectives.group_advantages(
                jnp.asarray(rewards.numpy()), g.group, g.advantage_eps))
            return peer.update(grouped, drawn, advantages, g.clip, g.beta)

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


def phases_of(peers):
    """All phases of a family, in the order of a step."""
    return ("sample", *peers.PARTS, "render", "see", "reward", "update", "step")


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


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
        phase = bench.phase(name)
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


def linear(peers, sizes, tokens, rounds, least, times=(1, 2, 4, 8)):
    """Median seconds of our step for `least` pictures and so many times more, one prompt with growing groups and groups
    of two of growing number; and the exponent e of seconds ~ pictures^e, 1 where the cost is linear."""
    found = {}
    counts = [least * n for n in times]
    for what, shapes in {"G": [(1, n) for n in counts], "prompts": [(n // 2, 2) for n in counts]}.items():
        runs = {}
        for count, (prompts, group) in zip(counts, shapes):
            runs[count] = Bench(peers, sizes, tokens, prompts, group).our_step()
            runs[count]()                                                                           # compiles
        medians = [statistics.median(taken) for taken in alternate(runs, rounds).values()]
        exponent = np.polyfit(np.log(counts), np.log(medians), 1)[0]
        found[what] = dict(pictures=counts, seconds=medians, exponent=float(exponent))
    return found


_FAMILY = flags.DEFINE_enum("family", families.FIRST, list(families.FAMILIES), "Whose models.")
_SIZE = flags.DEFINE_enum("size", "small", [*SIZES, *families.SIZES],
                          "How large the models are; a published size says the family as well, and needs a card.")
_PHASES = flags.DEFINE_list("phases", None, "Which phases, also linear; default: all but that.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Image tokens of a picture, a square number.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 2, "Prompts of a step.", lower_bound=1)
_GROUP = flags.DEFINE_integer("group", 4, "Pictures of a prompt.", lower_bound=2)
_BATCHES = flags.DEFINE_list("batches", "8,32", "Of a published size: how many pictures are drawn at once.")
_PICTURES = flags.DEFINE_integer("pictures", 32, "Of a published size: pictures of all phases but sample.",
                                 lower_bound=2)
_REMAT = flags.DEFINE_enum("remat", "nothing", list(qwen2.REMAT), "Of a published size: what the update's backward "
                           "pass computes again; all where memory is short.")
_MICRO = flags.DEFINE_integer("micro", full_size.GROUP, "Of a published size: how many pictures an update takes at "
                              "once, at most.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each side is timed.", lower_bound=1)
_REPORT = cli.path_flag("report", "Folder for every timing and the page.")


def main(_):
    if _SIZE.value in families.SIZES:
        return on_a_card()
    module = "gvu_jax.families.{}_peers".format
    if _FAMILY.value not in (there := [name for name in families.FAMILIES if importlib.util.find_spec(module(name))]):
        raise ValueError(f"--family={_FAMILY.value}: its PyTorch side has not been written; compare "
                         f"{', '.join(there[:-1])} or {there[-1]}")
    try:
        peers = importlib.import_module(module(_FAMILY.value))
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error
    known = phases_of(peers)
    asked = _PHASES.value or known
    if unknown := [name for name in asked if name not in (*known, "linear")]:
        raise ValueError(f"--phases: there is no {', '.join(unknown)}; there are {', '.join(known)} and linear")
    torch.set_num_threads(os.cpu_count())
    sizes, names = peers.SIZES[_SIZE.value], [name for name in asked if name != "linear"]
    bench = Bench(peers, sizes, _TOKENS.value, _PROMPTS.value, _GROUP.value)
    machine = probe(max(nbytes(bench.params["ar"]["layers"]), 8 << 20))       # a smaller array would time the threads
    weights = nbytes(bench.params["ar"]) / 4e6                                                      # float32
    print(f"{_SIZE.value}: backbone of {weights:.1f}M parameters, {bench.samples} pictures of {_TOKENS.value} tokens "
          f"({_PROMPTS.value} prompts of {WORDS} tokens), median (range) of {_ROUNDS.value}\n"
          f"{machine.name}: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s; "
          f"jax {jax.__version__}, torch {torch.__version__}\n\n{HEADER}")
    found = dict(size=_SIZE.value, tokens=_TOKENS.value, prompts=_PROMPTS.value, group=_GROUP.value,
                 machine=machine._asdict(),
                 phases=measure(bench, names, _ROUNDS.value, machine, functools.partial(print, flush=True)))
    if "linear" in asked:
        found["linear"] = linear(peers, sizes, _TOKENS.value, _ROUNDS.value, bench.samples)
        for what, line in found["linear"].items():
            costs = ", ".join(f"{n} pictures {s:.2f} s" for n, s in zip(line["pictures"], line["seconds"]))
            print(f"\n{what}: {costs}; seconds ~ pictures^{line['exponent']:.2f}")
    if _REPORT.value:
        Path(_REPORT.value).mkdir(parents=True, exist_ok=True)
        replace_file(Path(_REPORT.value) / "benchmark.json", json.dumps(found, indent=1))
        print(f"\n{report.write_benchmark(_REPORT.value)}")


def on_a_card():
    """The table of a published size, and the same as JSON where there is a --report."""
    if given := [f"--{flag.name}" for flag in (_FAMILY, _TOKENS, _PROMPTS, _GROUP) if flag.present]:
        raise ValueError(f"--size={_SIZE.value} says itself what {', '.join(given)} would say: leave that out, and "
                         f"give --batches and --pictures")
    wanted = _PHASES.value
    if unknown := [name for name in wanted or () if name not in full_size.PHASES]:
        raise ValueError(f"--phases: there is no {', '.join(unknown)}; there are {', '.join(full_size.PHASES)}")
    counts = [*_BATCHES.value, str(_PICTURES.value)]
    if wrong := [n for n in counts if not n.isdecimal() or int(n) < 2 or int(n) % min(full_size.GROUP, int(n))]:
        raise ValueError(f"--batches, --pictures: {', '.join(wrong)}; give 2 to 7, or multiples of {full_size.GROUP}")
    if _REPORT.value:
        Path(_REPORT.value).mkdir(parents=True, exist_ok=True)
    found = full_size.measure(_SIZE.value, [int(n) for n in counts[:-1]], _PICTURES.value, wanted, _ROUNDS.value,
                              functools.partial(print, flush=True), _REMAT.value, _MICRO.value)
    if _REPORT.value:
        replace_file(Path(_REPORT.value) / "benchmark.json", json.dumps(found, indent=1))


if __name__ == "__main__":
    cli.run(main)
