"""Whether a run fits a TPU slice and what it will take, before anyone books one.

    python -m gvu_jax.plan --config=configs/xomni.py --topology=v5e:8x8 [--mesh=fsdp:16,tensor:4] [--json=FILE]

Every program of every kind of step (UAE's three stages; Internal Gap's drawing and its updates) is compiled for the
slice by the real TPU compiler, which runs on any CPU machine (pip install "gvu_jax[tpu]"). Memory and traffic between
chips are the compiler's; arithmetic and memory traffic are counted (see costs.py), and times are what these need at the
chip's peak rates: no run will be faster. Arrays exist only as shapes. Where config.model.checkpoint does not exist, the
published sizes are planned for. The compiler is told to spare its tuning, which takes minutes for render's
convolutions; memory differs from a run's by a few percent.

--topology=h100 is one GPU, for which nothing is compiled: its time is counted as well, but of its memory only what is
there between programs, what one takes and what it gives. So it can show what does not fit, and never what does. Its
attention is counted as a CPU's, which writes its scores to memory; a GPU's need not.
"""
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.interpreters import partial_eval

from gvu_jax import checkpoint, cli, costs, optim, sharding
from gvu_jax.methods import method_of, parts_of
from gvu_jax.models.layers import AXES
from gvu_jax.policy import State
from gvu_jax.sampling import How

GIB = 2 ** 30
FITS = 0.9                       # of a chip's memory; the runtime and what evaluation holds beside a step need the rest
WORDS, PROMPT, ANSWER = 32, 40, 4    # padded lengths planned for: a prompt alone, with the image header; an answer
# What spares the compiler's tuning: an effort up to jax 0.11, and from then on only a level.
UNTUNED = ({"exec_time_optimization_effort": -1.0} if hasattr(jax.config, "jax_exec_time_optimization_effort") else
           {"optimization_level": "O1"})


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e; NVIDIA's data sheet of the H100
    SXM). Each of these is one device."""
    memory: int                  # bytes of HBM
    flops: float                 # bfloat16, a second
    bandwidth: float             # of HBM, bytes a second
    links: float                 # bytes a second that all links together bring in: half of the bidirectional figure
    compiled: bool = True        # whether programs can be compiled for it without it


CHIPS = {"v5e": Chip(16 * GIB, 197e12, 819e9, 200e9), "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
         "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9),
         "h100": Chip(80 * 10 ** 9, 989e12, 3350e9, 450e9, compiled=False)}


def main(_):
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise ValueError("give --config, e.g. configs/xomni.py, and --topology, e.g. v5e:8x8")
    cli.check_numbers(_CONFIG.value)
    method_of(_CONFIG.value).check(_CONFIG.value)
    if _JSON.value:
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    devices = chips_of(_TOPOLOGY.value)
    umm, params = checkpoint.describe_base(_CONFIG.value, parts_of(_CONFIG.value))
    mesh = sharding.make_mesh(_MESH.value or _CONFIG.value.mesh, devices)
    plan = make_plan(_CONFIG.value, umm, params, mesh, CHIPS[_TOPOLOGY.value.split(":")[0]])
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps({"topology": _TOPOLOGY.value} | plan, indent=1))
    print(f"{_TOPOLOGY.value}, {describe(plan)}")


# ---- what is planned for -------------------------------------------------------------------------------------------

def chips_of(topology):
    """The devices of a slice that need not exist, in place of a GPU a CPU. ValueError says what is wrong with its name,
    or what to install."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not CHIPS[name].compiled and shape:
        raise ValueError(f"topology {topology!r}: it is h100, or starts with v5e, v5p, v6e, and its shape follows: "
                         f"v5e:8x8")
    if not CHIPS[name].compiled:
        return jax.devices("cpu")[:1]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('planning needs the TPU compiler, not a TPU: pip install "gvu_jax[tpu]"')
    # Else libtpu asks Google's servers which machine this is, complains that it is none of theirs, and locks the others
    # out, although a plan takes no chip.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                   "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        alone = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}     # else hosts have four
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"there is no slice {topology}: {error}") from error


# ---- a method's steps, on shapes -------------------------------------------------------------------------------------

class Call(NamedTuple):
    """One program of a step."""
    phase: str                   # "sample", "render", "reward" or "update", as a run logs it
    program: sharding.Program
    args: tuple                  # shapes on the mesh
    times: float                 # it runs so often in such a step; less than 1 where some steps do without
    waves: int                   # parts that its batch is cut into, one after the other
    turns: int | None            # of its loop, where it draws token by token


@dataclasses.dataclass
class Step:
    """A kind of step: a method may have several."""
    times: int                   # a run has so many of them
    more: int                    # and at most so many more
    pictures: int                # samples that one draws, or learns from
    calls: dict                  # name -> Call


class Rehearsal:
    """What a method's `rehearse` is given, to say what its steps run: shapes in place of arrays, all on the mesh.

    base, policy, state and key are what they are in `rollout`. Programs of no weight, such as the mean over the words
    of a reward, are left out.
    """

    def __init__(self, umm, mesh, waves, base, policy, state, key):
        self.umm, self.mesh, self.base, self.policy, self.state, self.key = umm, mesh, base, policy, state, key
        self.waves, self.steps = waves, {}

    def step(self, name, times, pictures, more=0):
        """Begins a kind of step, see Step."""
        self.steps[name] = self.now = Step(times, more, pictures, {})

    def run(self, phase, name, program, *args, times=1):
        """Has the step begun last run a program. Returns its results."""
        with jax.set_mesh(self.mesh):
            results = self.rows(jax.eval_shape(program.jitted, *args))
        turns = results[1].shape[1] - 1 if name in ("sample", "say") else None                  # logps [S, T]
        self.now.calls[name] = Call(phase, program, args, times, self.waves, turns)
        return results

    def rows(self, tree):
        """Shapes of a batch, divided by their rows; what has none lies whole."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(
            self.mesh, x.shape[0])) if x.ndim else x, tree)

    def shapes(self, function, *args):
        """What a function of a batch gives, which is no program of its own."""
        return self.rows(jax.eval_shape(function, *args))

    def floats(self, rows, dtype=jnp.float32):
        return self.rows(jax.ShapeDtypeStruct((rows,), dtype))

    def pixels(self, rows):
        """Pictures from outside, as a stream gives them."""
        return self.rows(jax.ShapeDtypeStruct((rows, *self.umm.picture_size, 3), jnp.float32))

    def prompts(self, rows, words=WORDS):
        """Prompts of so many words, or captions."""
        return self.rows(self.umm.prompt_shapes(rows, PROMPT - WORDS + words, words))

    def questions(self, rows):
        """Whether a picture shows a prompt: each with an answer."""
        return self.rows(self.umm.prompt_shapes(rows, PROMPT, ANSWER, asked=WORDS))


def rehearse(config, umm, params, mesh):
    """-> {name: Step} of the config's method, and the shapes of base and state on the mesh.

    Raises ValueError for a mesh on which a step cannot be divided, and for a method that does not say what it runs.
    """
    optimizer, how = optim.build(config.optim, config.steps), How(
        images_per_prompt=config[config.method].group, **config.sampling, **config.get("rollout", {}))
    method = method_of(config)(umm, config, how, optimizer, mesh)
    if not (hasattr(method, "rehearse") and hasattr(method, "begin")):
        raise ValueError(f"the method {config.method} does not say what its steps run: give its class `begin` and "
                         f"`rehearse`, as gvu_jax/methods/gvu.py has them")
    key = jax.eval_shape(lambda: jax.random.key(0))
    place = functools.partial(sharding.place, umm.partition, mesh=mesh)
    base = place(params)
    state = place(jax.eval_shape(method.begin, base, key))
    policy = place(jax.eval_shape(method.policy, base, state.trainable))
    on = Rehearsal(umm, mesh, config[config.method].waves, base, policy, state, key)
    method.rehearse(on)
    return on.steps, base, state


# ---- the plan ------------------------------------------------------------------------------------------------------

PHASES = "sample", "render", "reward", "update"


def make_plan(config, umm, params, mesh, chip):
    """Compiles all kinds of step for a mesh of TPU devices and returns all figures, as dicts of numbers.

    Bytes and FLOPs are per chip and of one call of a program, seconds of a kind of step of one such step; those of the
    whole are the run's over config.steps. `needs` is what a chip must hold while a program runs: all models, the
    trained part and its optimizer, the batch, temporaries and results. `fits` is True, False, or None: not known.
    """
    steps, base, state = rehearse(config, umm, params, mesh)
    parts = {name: {"parameters": sum(x.size for x in jax.tree.leaves(part)), "bytes": held(part)}
             for name, part in (base | {"trained": state}).items()}
    resident, known, kinds = held(base) + held(state), {}, {}
    for kind, step in steps.items():
        programs = {}
        for name, call in step.calls.items():
            same = call.program, jax.tree.structure(call.args), *jax.tree.leaves(call.args)
            if same not in known:
                known[same] = plan_program(umm, call.program, call.args, mesh, chip, resident, call.waves, call.turns)
                if chip.compiled:
                    took = known[same]["compiled_in"]
                    print(f"{kind}, {name}: compiled in {took:.0f} s", file=sys.stderr, flush=True)
            programs[name] = known[same] | {"phase": call.phase, "times": call.times}
        phases = {phase: sum(program["times"] * program["seconds"] for program in programs.values()
                             if program["phase"] == phase) for phase in PHASES}
        seconds = sum(phases.values())
        kinds[kind] = {"times": step.times, "more": step.more, "pictures": step.pictures, "programs": programs,
                       "phases": phases, "seconds": seconds, "pictures_per_second": step.pictures / seconds,
                       "chip_hours": step.times * seconds * mesh.size / 3600,
                       "more_chip_hours": step.more * seconds * mesh.size / 3600}
    hours = sum(kind["chip_hours"] for kind in kinds.values())
    fits = [program["fits"] for kind in kinds.values() for program in kind["programs"].values()]
    return {
        "method": config.method, "mesh": dict(mesh.shape), "chips": mesh.size, "memory_of_chip": chip.memory,
        "compiled": chip.compiled, "parts": parts, "resident": resident, "kinds": kinds, "steps": config.steps,
        "seconds": hours * 3600 / mesh.size / config.steps, "chip_hours": hours,
        "more_chip_hours": sum(kind["more_chip_hours"] for kind in kinds.values()),
        "fits": False if False in fits else None if None in fits else True}


def plan_program(umm, program, args, mesh, chip, resident, waves, turns):
    """What one program needs and takes, see `make_plan`; with "error" for what the compiler finds too large.

    resident: bytes that are on a chip at all times. waves: parts that a batch is drawn and read in. turns: of the
    decode loop, or None. Where nothing can be compiled for the chip, `needs` lacks the temporaries.
    """
    began = time.time()
    with jax.set_mesh(mesh):
        traced = program.jitted.trace(*args)
    # Of the backbone matrices and rows are divided; of the other models rows, over as many axes as they go into.
    batch = [arg for arg in args if not is_params(arg)]
    rows = max(x.shape[0] for x in jax.tree.leaves(batch) if x.ndim)
    busy = mesh.size if uses_backbone(traced.jaxpr, args) else sharers(mesh, rows // waves)
    cost, moved = costs.count(traced.jaxpr, fractions(umm, args, mesh)), []
    figures = {"flops": cost.flops / busy, "traffic": cost.weights + cost.data / busy, "fits": False}
    if not chip.compiled:
        updates = any(isinstance(arg, State) for arg in args)              # whose results take the state's place
        results = 0 if updates else sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(traced.out_info)) // busy
        needs = resident + held(batch) + results
        figures |= {"results": results, "needs": needs, "fits": None if needs <= FITS * chip.memory else False}
    else:
        try:
            compiled = traced.lower().compile(compiler_options=UNTUNED)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            figures["error"] = str(error).splitlines()[0]
        else:
            memory = compiled.memory_analysis()
            moved = costs.collectives(compiled.as_text(), weights_of(umm))
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            needs = resident + held(batch) + memory.temp_size_in_bytes + results
            figures |= {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                        "results": results, "peak": memory.peak_memory_in_bytes, "needs": needs,
                        "fits": needs <= FITS * chip.memory}
    figures["collectives"] = summed(moved, turns)
    figures["traffic"] += sum(c.times * c.bytes for c in moved)                 # what arrives is written once more
    figures["seconds_of"] = {"compute": figures["flops"] / chip.flops, "memory": figures["traffic"] / chip.bandwidth,
                             "links": sum(c.times * c.wire for c in moved) / chip.links}
    return figures | {"seconds": max(figures["seconds_of"].values()), "compiled_in": time.time() - began}


def is_params(arg):
    """Whether an argument of a program is the state, or params of the model, and no batch."""
    return isinstance(arg, State) or isinstance(arg, dict) and "ar" in arg


def uses_backbone(traced, args):
    """Whether what a traced program gives depends on the backbone's parameters."""
    _, used = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=False)
    return any("['ar']" in jax.tree_util.keystr(path) for (path, _), u in
               zip(jax.tree_util.tree_leaves_with_path(args), used) if u)


def sharers(mesh, rows):
    """Chips among which `layers.spread` divides so many rows over all axes."""
    sizes = [mesh.shape[axis] for axis in AXES]
    return next(n for n in (math.prod(sizes[:k]) for k in (3, 2, 1, 0)) if rows % n == 0)


def held(tree):
    """Bytes of a tree of placed shapes on one chip; keys, which are small, do not count."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree) if x.sharding is not None)


def weights_of(umm):
    """A regex for the paths of frozen parameters among the arguments of a program."""
    return rf"\['({'|'.join(name for name in umm.partition if name != 'adapter')})'\]"


def fractions(umm, args, mesh):
    """For each leaf of a program's arguments, what `costs.count` asks: DATA, or the part of a weight that a chip
    computes with, which is what the layout without fsdp leaves it."""
    def fraction(path, x, where):
        if not re.search(weights_of(umm), jax.tree_util.keystr(path)):
            return costs.DATA
        return math.prod(where.shard_shape(x.shape)) / x.size

    found = []
    for arg in args:
        if is_params(arg):
            where = sharding.shardings(umm.partition, arg, mesh, "rollout")
            found += jax.tree.leaves(jax.tree_util.tree_map_with_path(fraction, arg, where))
        else:
            found += [costs.DATA] * len(jax.tree.leaves(arg))
    return found


def summed(moved, turns):
    """Collectives added up by kind, place and content. turns: of the decode loop, or None."""
    times, received, largest = Counter(), Counter(), {}
    for c in moved:
        where = "once" if not c.loops else "decode loop" if turns in c.loops else "loop"
        kind = c.kind, where, "weights" if c.weights else "data"
        times[kind] += c.times
        received[kind] += c.times * c.wire
        largest[kind] = max(largest.get(kind, (0, "")), (c.bytes, c.shape))
    return [{"kind": kind[0], "where": kind[1], "moves": kind[2], "times": times[kind], "bytes": received[kind],
             "largest": largest[kind][1]} for kind in sorted(times, key=lambda kind: -received[kind])]


FIT = {True: "yes", False: "NO", None: "?"}


def describe(plan):
    """The plan as text."""
    gib, hours = lambda n: f"{n / GIB:.2f}", lambda n: f"{n:,.0f}" if n >= 10 else f"{n:.1f}"
    several = len(plan["kinds"]) > 1
    programs = {f"{kind}: {name}" if several else name: program for kind, step in plan["kinds"].items()
                for name, program in step["programs"].items()}
    lines = [f"{plan['chips']} chips of {gib(plan['memory_of_chip'])} GiB, mesh "
             + ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
             + f"; {plan['method']}, {plan['steps']} steps", ""]

    def table(title, head, rows):
        if not rows:
            return
        rows = [head, *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines.extend([title, *("  " + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows), ""])

    table("Parameters (from their layout), GiB", ["part", "parameters", "per chip"],
          [[name, f"{part['parameters']:,}", gib(part["bytes"])] for name, part in plan["parts"].items()]
          + [["all, resident", "", gib(plan["resident"])]])
    columns = ["arguments", "temporaries", "results", "peak", "needs"] if plan["compiled"] else ["results", "needs"]
    table(f"Memory per chip (from the compiler), GiB; needs: resident, batch, temporaries, results; fits to {FITS:.0%}"
          if plan["compiled"] else
          f"Memory (counted, not compiled), GiB; needs: resident, batch, results, but NO temporaries; up to {FITS:.0%}",
          ["program", *columns, "of the chip", "fits", *["compiled in"] * plan["compiled"]],
          [[name, *(gib(p[c]) if c in p else "-" for c in columns),
            f"{p['needs'] / plan['memory_of_chip']:.0%}" if "needs" in p else "-", FIT[p["fits"]],
            *[f"{p['compiled_in']:.0f} s"] * plan["compiled"]] for name, p in programs.items()])
    lines += [textwrap.fill(f"{name}: {p['error']}", 118) for name, p in programs.items() if "error" in p]
    table("Between chips (from the compiler), a call", ["program", "kind", "where", "moves", "times", "GiB", "largest"],
          [[name, c["kind"], c["where"], c["moves"], f"{c['times']:,}", gib(c["bytes"]), c["largest"][:34]]
           for name, p in programs.items() for c in p["collectives"]])
    table("Time at peak rates (estimated), a call; the longest of three counts, latencies do not",
          ["program", "TFLOP per chip", "GiB of HBM", "compute s", "memory s", "links s", "seconds", "calls a step"],
          [[name, f"{p['flops'] / 1e12:.1f}", f"{p['traffic'] / GIB:.1f}",
            *(f"{s:.2f}" for s in p["seconds_of"].values()), f"{p['seconds']:.2f}", f"{p['times']:.3g}"]
           for name, p in programs.items()])
    table("Kinds of step, seconds at best" if several else "A step, seconds at best",
          ["kind", "of a run", *PHASES, "seconds", "pictures", "a second", "chip-hours"],
          [[name, f"{kind['times']:,}", *(f"{s:.1f}" for s in kind["phases"].values()), f"{kind['seconds']:.1f}",
            kind["pictures"], f"{kind['pictures_per_second']:.2f}", hours(kind['chip_hours'])]
           for name, kind in plan["kinds"].items()])
    lines += [f"At most {kind['more']:,} more of {name} (replay, probes): {hours(kind['more_chip_hours'])} chip-hours."
              for name, kind in plan["kinds"].items() if kind["more"]]
    fits = {True: "It fits.", False: "It does NOT fit.",
            None: "Whether it fits is not known: temporaries are not counted."}[plan["fits"]]
    lines += [f"At best {plan['seconds']:.1f} s a step, evened out over the run; {hours(plan['chip_hours'])} "
              f"chip-hours. {fits}"]
    return "\n".join(lines)


if __name__ == "__main__":
    from ml_collections import config_flags
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. configs/xomni.py.")
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape of the slice: v5e:8x8, v5p:2x2x2, v6e:4x4; "
                                   "or h100.")
    _MESH = flags.DEFINE_string("mesh", None, "Sizes of the mesh, e.g. data:2,fsdp:8,tensor:4; default: the config's.")
    _JSON = cli.path_flag("json", "A file for all figures.")
    cli.run(main)
