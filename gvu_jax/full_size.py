"""How fast are the published sizes on the card at hand? The part of benchmark.py for machines that can hold them.

    python -m gvu_jax.benchmark --size=janus-pro-1b [--batches=8,32] [--pictures=32] [--phases=sample] [--report=DIR]
    python -m gvu_jax.benchmark --size=janus-pro-7b --remat=all [--micro=8]                        # and the other sizes

Weights are random, in bfloat16, and made on the device: nothing is downloaded, and what is drawn means nothing. Each
phase is the program of a GvU step with an adapter of rank 8, and its floor is the larger of

    (float operations of its products) / (rate at which this card multiplies large bfloat16 matrices)
    (bytes of weights and data that its products read and write) / (rate at which it reads or copies a large array)

both measured at the start (costs.py counts). "Of the floor" is the floor over the time: at these rates no program
exceeds 100 %. A phase holds what it uses and nothing else, so this says nothing about what fits together: that is
plan.py's. `sample_int8` draws with weights and cache in int8 (rollout.py), where the family can. The last line is the
whole step, which runs these programs one after the other, where all of them were timed for --pictures. Where the family
has a peer and PyTorch sees the card, it draws as many pictures without an adapter, with random weights as well; that
both sides compute the same is seen at the small sizes.
"""
import dataclasses
import functools
import gc
import importlib
import importlib.util
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from gvu_jax import costs, families, plan, sharding

PHASES = ("sample", "sample_int8", "render", "see", "read", "update")
STEP = tuple(name for name in PHASES if name != "sample_int8")            # what one step runs
GROUP = 8                              # pictures of a prompt, where there are so many
PRODUCTS = 10                          # of matrices, that are timed together


def measure(size, batches, pictures, wanted, rounds, say, remat="nothing", micro=GROUP):
    """Every figure of one of families.SIZES, as a dict. batches: how many pictures are drawn at once, one line for
    each; pictures: of the other phases; wanted: of PHASES, None for all that the family has; say(line) is told what is
    known as soon as it is; remat: of qwen2.REMAT, for the update; micro: pictures of one of its micro-batches, at
    most. ValueError where a phase is wanted that the family does not have."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")     # the peer needs memory as well, one by one
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    if jax.default_backend() == "cpu":
        raise ValueError(f"--size={size} is for a card, and JAX sees none here; tiny, small and medium are for CPUs")
    umm, params = model_of(size, remat)
    if wanted and "sample_int8" in wanted and not umm.int8:
        raise ValueError(f"--phases=sample_int8: {size} draws by a flow, which is never rounded")
    wanted = wanted or [name for name in PHASES if name != "sample_int8" or umm.int8]
    peers = peer_seconds(families.SIZES[size][0], umm, batches, say) if "sample" in wanted else {}
    card = probe()
    say(f"{size} on {card.name}: {card.flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s; "
        f"jax {jax.__version__}")
    found = [trace_phase(*phase) for phase in phases(umm, params, batches, pictures, wanted, micro)]
    with ThreadPoolExecutor(8) as pool:                                 # the compiler works outside of Python
        compiled = list(pool.map(lambda phase: phase.lowered.compile(), found))
    say(f"compiled\n\n{HEADER}")
    lines = []
    for phase, program in zip(found, compiled):
        lines.append(time_phase(phase, program, card, rounds))
        if phase.name == "sample" and phase.pictures in peers:
            lines[-1]["peer"] = peers[phase.pictures]
        say(row(lines[-1]))
    if (step := whole_step(lines, pictures)):
        say(row(step))
    return dict(size=size, card=card._asdict(), remat=remat, micro=micro, phases=lines, step=step)


def model_of(size, remat="nothing"):
    """(umm, shapes of its params in bfloat16) of one of families.SIZES."""
    family, override, name = families.SIZES[size]
    umm = families.FAMILIES[family].published(override, name)
    umm = dataclasses.replace(umm, ar=dataclasses.replace(umm.ar, remat=remat))
    return umm, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
                             jax.eval_shape(umm.init, jax.random.key(0)))


def peer_seconds(family, umm, batches, say):
    """{pictures: seconds} of what a PyTorch user would draw with, {} where nothing is installed that could. It runs
    first and gives its memory back: JAX does not give back what it has had. say(line) is told where it fails: there are
    versions of transformers whose Janus does not draw (5.17)."""
    name = f"{families.__name__}.{family}_peers"
    if importlib.util.find_spec(name) is None or importlib.util.find_spec("peft") is None:
        return {}
    import torch
    if not torch.cuda.is_available():
        return {}
    found, sample = {}, None
    try:
        peers = importlib.import_module(name)
        if not hasattr(peers, "sampler"):
            return {}
        sample = peers.sampler(umm, "cuda", torch.bfloat16)
        sample(1, 2, plan.PROMPT, 4)                                     # loads what the first call loads
        for S in sorted(batches):
            found[S] = seconds(lambda: sample(S // min(GROUP, S), min(GROUP, S), plan.PROMPT))
    except Exception as error:                                           # whatever it is, ours can be measured
        first_line = (str(error).splitlines() or [""])[0]
        say(f"no peer for {'more' if found else 'any'} pictures: {type(error).__name__} in PyTorch's: {first_line}")
    del sample
    gc.collect()
    torch.cuda.empty_cache()
    return found


# ---- the card --------------------------------------------------------------------------------------------------------

class Card(NamedTuple):
    name: str
    flops: float                       # a second, bfloat16 products of large matrices
    bandwidth: float                   # bytes a second, reading a large array, or copying it


def probe(side=8192, size=2 ** 32):
    """Seconds of measurement. side: of the matrices; size: of the array in bytes."""
    def best(run, *args):
        return min(seconds(functools.partial(run, *args)) for _ in range(8))

    def products(a, b):                # several, or calling them would be measured as well
        for _ in range(PRODUCTS):
            a = a @ b
        return a

    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) * side ** -0.5 for i in range(2))
    multiply = best(jax.jit(products), a, b) / PRODUCTS
    array = jnp.ones((size // 2,), jnp.bfloat16)
    read = best(jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), array)
    copy = best(jax.jit(lambda x: -x), array)
    return Card(jax.devices()[0].device_kind, 2 * side ** 3 / multiply, max(size / read, 2 * size / copy))


def seconds(run):
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


# ---- phases ----------------------------------------------------------------------------------------------------------

def phases(umm, params, batches, pictures, wanted, micro=GROUP):
    """(name, function, its args as shapes, pictures) of each phase that is wanted, drawing once for each batch."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    counts = {name: [pictures] for name in PHASES} | dict.fromkeys(("sample", "sample_int8"), batches)

    @functools.cache                                                    # it traces all phases: seconds
    def rehearsed(S, width):
        config = step_config(umm, S, micro, dict.fromkeys(umm.int8, width) if width else {})
        return plan.rehearse(config, umm, params, mesh)[0]["step"].calls

    for name, S in [(name, S) for name in PHASES if name in wanted for S in counts[name]]:
        program, _, width = name.partition("_")
        call = rehearsed(S, width)[program]
        yield name, call.program.jitted, call.args, S


def step_config(umm, pictures, micro=GROUP, rollout={}):
    """What plan.rehearse asks of a config: a step of GvU with an adapter of rank 8."""
    group, parts = min(GROUP, pictures), range(1, pictures + 1)
    micro_batches = next(n for n in parts if pictures % n == 0 and pictures // n <= micro)
    return ConfigDict(dict(
        method="gvu", steps=1, rollout=rollout,
        sampling=dict(guidance=umm.guidance, flow=dict(steps=10, noise=0.7, window=2)),
        gvu=dict(prompts=pictures // group, group=group, clip=0.2, beta=0.03, anchor=0.0, advantage_eps=1e-4,
                 inner_steps=1, micro_batches=micro_batches, waves=1),
        reward=dict(teacher="base", view="pixels", mean="geometric"), lora=dict(rank=8, alpha=32, targets="_proj"),
        flow=dict(clip=1e-3, beta=0.01, spread="all", advantage_max=5.0, ratio="plain", kl="gaussian"),
        optim=dict(lr=1e-6, warmup=0, schedule="constant", b2=0.99, weight_decay=0.0, clip_norm=1.0)))


class Phase(NamedTuple):
    name: str
    pictures: int
    cost: costs.Cost
    lowered: jax.stages.Lowered        # of a list of arrays
    arrays: Callable                   # makes them


def trace_phase(name, function, args, pictures):
    """-> Phase, not compiled."""
    traced, arrays = only_what_it_reads(function, args)
    weights = [costs.DATA if x.ndim < 2 or x.dtype != jnp.bfloat16 else 1.0 for x in traced.jaxpr.in_avals]
    return Phase(name, pictures, costs.count(traced.jaxpr, weights), traced.lower(), arrays)


def only_what_it_reads(function, args):
    """-> (traced program, how to make its arrays): the function of args, shapes, as one of a list of those arrays alone
    that its result depends on, and what fills these at random."""
    flat, tree = jax.tree.flatten_with_path(args)
    traced = jax.make_jaxpr(function)(*args)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=False)

    def run(arrays):
        arrays = iter(arrays)
        rest = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
        return function(*jax.tree.unflatten(tree, [next(arrays) if u else rest(x) for u, (_, x) in zip(used, flat)]))

    names = lambda path: {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
    kind = lambda path: next((name for name in ("nu", *KINDS) if name in names(path)), None)
    read = [(kind(path), jax.ShapeDtypeStruct(x.shape, x.dtype)) for u, (path, x) in zip(used, flat) if u]
    make = jax.jit(fill, static_argnums=(0, 1))
    return (jax.jit(run).trace([shape for _, shape in read]),
            lambda: [make(*what, jax.random.key(i)) for i, what in enumerate(read)])


KINDS = ("kernel", "a", "b", "scale", "embedding", "bias")                # of parameters


def fill(kind, leaf, key):
    """A random array for a shape: ids are 0, masks True; matrices [in, out] have variance 1 / in, so that activations
    keep their size; scales are near 1; second moments, "nu", are no less than 0, as all that is none of
    KINDS: pixels, rewards, log-probs."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return key
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.full(leaf.shape, leaf.dtype == bool, leaf.dtype)
    if kind not in KINDS:
        return jax.random.uniform(key, leaf.shape, leaf.dtype)
    spread = leaf.shape[-2] ** -0.5 if kind in ("kernel", "a") else 0.1
    return (jax.random.normal(key, leaf.shape, leaf.dtype) * spread + (kind == "scale")).astype(leaf.dtype)


# ---- time ------------------------------------------------------------------------------------------------------------

def time_phase(phase, program, card, rounds):
    """One dict: seconds of each round, floor, pictures a second; with "error" where the card has too little memory."""
    cost, line = phase.cost, dict(phase=phase.name, pictures=phase.pictures)
    try:
        run = functools.partial(program, phase.arrays())
        jax.block_until_ready(run())
        line["seconds"] = [seconds(run) for _ in range(rounds)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return line | {"error": "does not fit"}
    finally:
        gc.collect()
    took = statistics.median(line["seconds"])
    floors = dict(compute=cost.flops / card.flops, memory=(cost.weights + cost.data) / card.bandwidth)
    return line | dict(floors=floors, tflop=cost.flops / 1e12, gbytes=(cost.weights + cost.data) / 1e9,
                       of_floor=max(floors.values()) / took, pictures_per_second=phase.pictures / took)


def whole_step(lines, pictures):
    """The line of a step that runs all its phases for so many pictures, one after the other; None where one is not
    among the lines. It takes the sum of their medians: nothing else of a step has weight."""
    ran = {line["phase"]: line for line in lines
           if line["phase"] in STEP and line["pictures"] == pictures and "seconds" in line}
    if len(ran) != len(STEP):
        return None
    ran = ran.values()
    total = lambda name: sum(line[name] for line in ran)
    took = sum(statistics.median(line["seconds"]) for line in ran)
    floors = {bound: sum(line["floors"][bound] for line in ran if max(line["floors"], key=line["floors"].get) == bound)
              for bound in ("compute", "memory")}
    return dict(phase="the whole step", pictures=pictures, seconds=[took], floors=floors, tflop=total("tflop"),
                gbytes=total("gbytes"), of_floor=sum(floors.values()) / took, pictures_per_second=pictures / took)


HEADER = ("| phase | pictures | s | pictures/s | of the floor | TFLOP | GB | peer, s | peer / ours |\n"
          "|---|---|---|---|---|---|---|---|---|")


def row(line):
    if "error" in line:
        return f"| {line['phase']} | {line['pictures']} | {line['error']} | | | | | | |"
    took, bound = statistics.median(line["seconds"]), max(line["floors"], key=line["floors"].get)
    peer = f"{line['peer']:.1f} | {line['peer'] / took:.1f}" if "peer" in line else " | "
    return (f"| {line['phase']} | {line['pictures']} | {took:.3f} | {line['pictures_per_second']:.2f} | "
            f"{line['of_floor']:.0%} ({bound}) | {line['tflop']:.1f} | {line['gbytes']:.1f} | {peer} |")
