"""Whether a run fits a TPU slice and what it will take, before anyone books one.

    python -m gvu_jax.plan --config=configs/xomni.py --topology=v5e:8x8 [--mesh=fsdp:16,tensor:4] [--json=FILE]

Every program of a training step is compiled for the slice by the real TPU compiler, which runs on any CPU machine
(pip install "gvu_jax[tpu]"). Memory and traffic between chips are the compiler's; arithmetic and memory traffic are
counted (see costs.py), and times are what these need at the chip's peak rates: no run will be faster. Arrays exist
only as shapes. Where config.model.checkpoint does not exist, the published sizes are planned for. The compiler is told
to spare its tuning, which takes minutes for render's convolutions; memory differs from a run's by a few percent.
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

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from gvu_jax import checkpoint, cli, costs, families, hub, optim, sharding
from gvu_jax.methods import gvu
from gvu_jax.models.layers import AXES
from gvu_jax.policy import State, init_state
from gvu_jax.sampling import How

GIB = 2 ** 30
FITS = 0.9                       # of a chip's memory; the runtime and what evaluation holds beside a step need the rest
WORDS, PROMPT, ANSWER = 32, 40, 4    # padded lengths planned for: a prompt alone, with the image header; an answer
# What spares the compiler's tuning: an effort up to jax 0.11, and from then on only a level.
UNTUNED = ({"exec_time_optimization_effort": -1.0} if hasattr(jax.config, "jax_exec_time_optimization_effort") else
           {"optimization_level": "O1"})


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e). Each of these is one device."""
    memory: int                  # bytes of HBM
    flops: float                 # bfloat16, a second
    bandwidth: float             # of HBM, bytes a second
    links: float                 # bytes a second that all links together bring in: half of the bidirectional figure


CHIPS = {"v5e": Chip(16 * GIB, 197e12, 819e9, 200e9), "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9),
         "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9)}


def main(_):
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise ValueError("give --config, e.g. configs/xomni.py, and --topology, e.g. v5e:8x8")
    if _CONFIG.value.method != "gvu":
        raise ValueError(f"the plan knows the steps of the method gvu, not of {_CONFIG.value.method}: plan for "
                         f"the config of the same model whose method is gvu; its sampling is the same")
    cli.check_numbers(_CONFIG.value)
    if _JSON.value:
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")
    devices = chips_of(_TOPOLOGY.value)
    umm, params = model_of(_CONFIG.value)
    mesh = sharding.make_mesh(_MESH.value or _CONFIG.value.mesh, devices)
    plan = make_plan(_CONFIG.value, umm, params, mesh, CHIPS[_TOPOLOGY.value.split(":")[0]])
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps({"topology": _TOPOLOGY.value} | plan, indent=1))
    print(f"{_TOPOLOGY.value}, {describe(plan)}")


# ---- what is planned for -------------------------------------------------------------------------------------------

def chips_of(topology):
    """The devices of a slice that need not exist. ValueError says what is wrong with its name, or what to install."""
    if topology.split(":")[0] not in CHIPS:
        raise ValueError(f"topology {topology!r}: it starts with {', '.join(CHIPS)}, and its shape follows: v5e:8x8")
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


def model_of(config):
    """(umm, shapes of its params) of a config: of its model folder, of the shapes world, or the published ones."""
    override, folder = config.model.get("override", {}), config.model.get("checkpoint")
    folder = folder and (hub.place(folder, config.cache) if hub.is_name(folder) else cli.path(folder))
    if folder and not config.get("world") and folder.exists():
        umm, params = checkpoint.describe_model(folder, override)
    else:
        umm, dtype = (families.tiny_of(config).tiny(config), jnp.float32) if config.get("world") else (
            families.of(config).published(override, config.model.get("size")), jnp.bfloat16)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), checkpoint.shapes(umm))
    remat = config.model.get("remat", umm.ar.remat)
    return dataclasses.replace(umm, ar=dataclasses.replace(umm.ar, remat=remat)), params


def step_of(config, umm, params, mesh):
    """The programs of one training step: {name: (Program, what it is called with, as shapes on the mesh)}.

    Raises ValueError for a mesh on which the step cannot be divided.
    """
    optimizer = optim.build(config.optim, config.steps)
    how = How(images_per_prompt=config.gvu.group, **config.sampling, **config.rollout)
    method = gvu.GvU(umm, config, how, optimizer, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    place = functools.partial(sharding.place, umm.partition, mesh=mesh)
    base = place(params)
    begin = functools.partial(init_state, umm, config=config, optimizer=optimizer)
    state = place(jax.eval_shape(begin, base, key=key))
    policy = place(jax.eval_shape(method.policy, base, state.trainable))

    B, S = config.gvu.prompts, config.gvu.prompts * config.gvu.group
    teacher = base if config.reward.teacher == "base" else policy
    rows = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, x.shape[0])))
    prompts = lambda n: rows(umm.prompt_shapes(n, PROMPT, WORDS))
    step = {"sample": (method.programs.sample, (policy, prompts(B), key))}

    def result(name):
        program, args = step[name]
        with jax.set_mesh(mesh):
            return rows(jax.eval_shape(program.jitted, *args))

    drawn, logps = result("sample")
    if config.reward.view == "pixels":
        step["render"] = method.programs.render, (base, drawn, prompts(B), key)
        step["see"] = method.programs.see, (teacher, result("render"))
    seen = result("see") if "see" in step else rows(jax.eval_shape(umm.seen_of, drawn))
    step["read"] = method.programs.read, (teacher, seen, prompts(S))
    asked = rows(umm.prompt_shapes(S, PROMPT, ANSWER, asked=WORDS)) if config.gvu.anchor else None
    step["update"] = method.update, (state, base, prompts(S), drawn, logps, rows(
        jax.ShapeDtypeStruct((S,), jnp.float32)), seen, asked)
    return step, base, state


# ---- the plan ------------------------------------------------------------------------------------------------------

def make_plan(config, umm, params, mesh, chip):
    """Compiles a step for a mesh of TPU devices and returns all figures, as dicts of numbers.

    Bytes and FLOPs are per chip and of one step, seconds of one step. `needs` is what a chip must hold while a program
    runs: all models, the trained part and its optimizer, the batch, temporaries and results.
    """
    step, base, state = step_of(config, umm, params, mesh)
    resident = held(base) + held(state)
    parts = {name: {"parameters": sum(x.size for x in jax.tree.leaves(part)), "bytes": held(part)}
             for name, part in (base | {"trained": state}).items()}
    pictures, programs = config.gvu.prompts * config.gvu.group, {}
    decoded = step["update"][1][4].shape[1] - 1                                             # of the log-probs [S, T]
    for name, (program, args) in step.items():
        # Of the backbone matrices and rows are divided; of the other models rows, over as many axes as they go into.
        programs[name] = plan_program(
            umm, program, args, mesh, chip, resident,
            busy=sharers(mesh, pictures // config.gvu.waves) if name in ("render", "see") else mesh.size,
            decoded=decoded if name == "sample" else None)
        print(f"{name}: compiled in {programs[name]['compiled_in']:.0f} s", file=sys.stderr, flush=True)
    phases = {phase: sum(programs[name]["seconds"] for name in names if name in programs) for phase, names in
              {"sample": ["sample"], "render": ["render"], "reward": ["see", "read"], "update": ["update"]}.items()}
    seconds = sum(phases.values())
    return {
        "mesh": dict(mesh.shape), "chips": mesh.size, "memory_of_chip": chip.memory, "parts": parts,
        "resident": resident, "programs": programs, "phases": phases, "seconds": seconds, "steps": config.steps,
        "pictures": pictures, "images_per_second": pictures / seconds,
        "chip_hours": config.steps * seconds * mesh.size / 3600,
        "fits": all(program["fits"] for program in programs.values())}


def plan_program(umm, program, args, mesh, chip, resident, busy, decoded):
    """What one program needs and takes, see `make_plan`; with "error" for what the compiler finds too large.

    resident: bytes that are on a chip at all times. busy: chips that share the work. decoded: turns of the decode loop,
    or None.
    """
    began = time.time()
    with jax.set_mesh(mesh):
        traced = program.jitted.trace(*args)
    cost, moved = costs.count(traced.jaxpr, fractions(umm, args, mesh)), []
    figures = {"flops": cost.flops / busy, "traffic": cost.weights + cost.data / busy, "fits": False}
    try:
        compiled = traced.lower().compile(compiler_options=UNTUNED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures["error"] = str(error).splitlines()[0]
    else:
        memory = compiled.memory_analysis()
        moved = costs.collectives(compiled.as_text(), weights_of(umm))
        batch = held([arg for arg in args if not isinstance(arg, (dict, State))])
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needs = resident + batch + memory.temp_size_in_bytes + results
        figures |= {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                    "results": results, "peak": memory.peak_memory_in_bytes, "needs": needs,
                    "fits": needs <= FITS * chip.memory}
    figures["collectives"] = summed(moved, decoded)
    figures["traffic"] += sum(c.times * c.bytes for c in moved)                 # what arrives is written once more
    figures["seconds_of"] = {"compute": figures["flops"] / chip.flops, "memory": figures["traffic"] / chip.bandwidth,
                             "links": sum(c.times * c.wire for c in moved) / chip.links}
    return figures | {"seconds": max(figures["seconds_of"].values()), "compiled_in": time.time() - began}


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
        if isinstance(arg, (dict, State)):
            where = sharding.shardings(umm.partition, arg, mesh, "rollout")
            found += jax.tree.leaves(jax.tree_util.tree_map_with_path(fraction, arg, where))
        else:
            found += [costs.DATA] * len(jax.tree.leaves(arg))
    return found


def summed(moved, decoded):
    """Collectives added up by kind, place and content. decoded: turns of the decode loop, or None."""
    times, received, largest = Counter(), Counter(), {}
    for c in moved:
        where = "once" if not c.loops else "decode loop" if decoded in c.loops else "loop"
        kind = c.kind, where, "weights" if c.weights else "data"
        times[kind] += c.times
        received[kind] += c.times * c.wire
        largest[kind] = max(largest.get(kind, (0, "")), (c.bytes, c.shape))
    return [{"kind": kind[0], "where": kind[1], "moves": kind[2], "times": times[kind], "bytes": received[kind],
             "largest": largest[kind][1]} for kind in sorted(times, key=lambda kind: -received[kind])]


def describe(plan):
    """The plan as text."""
    gib = lambda n: f"{n / GIB:.2f}"
    lines = [f"{plan['chips']} chips of {gib(plan['memory_of_chip'])} GiB, mesh "
             + ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
             + f"; {plan['pictures']} pictures a step, {plan['steps']} steps", ""]

    def table(title, head, rows):
        rows = [head, *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines.extend([title, *("  " + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows), ""])

    table("Parameters (from their layout), GiB", ["part", "parameters", "per chip"],
          [[name, f"{part['parameters']:,}", gib(part["bytes"])] for name, part in plan["parts"].items()]
          + [["all, resident", "", gib(plan["resident"])]])
    columns = ["arguments", "temporaries", "results", "peak", "needs"]
    table(f"Memory per chip (from the compiler), GiB; needs: resident, batch, temporaries, results; fits to {FITS:.0%}",
          ["program", *columns, "of the chip", "fits", "compiled in"],
          [[name, *(gib(p[c]) if c in p else "-" for c in columns),
            f"{p['needs'] / plan['memory_of_chip']:.0%}" if "needs" in p else "-", "yes" if p["fits"] else "NO",
            f"{p['compiled_in']:.0f} s"] for name, p in plan["programs"].items()])
    lines += [textwrap.fill(f"{name}: {p['error']}", 118) for name, p in plan["programs"].items() if "error" in p]
    table("Between chips (from the compiler), a step", ["program", "kind", "where", "moves", "times", "GiB", "largest"],
          [[name, c["kind"], c["where"], c["moves"], f"{c['times']:,}", gib(c["bytes"]), c["largest"][:40]]
           for name, p in plan["programs"].items() for c in p["collectives"]])
    table("Time at peak rates (estimated), a step; the longest of three counts, latencies do not",
          ["program", "TFLOP per chip", "GiB of HBM", "compute s", "memory s", "links s", "seconds"],
          [[name, f"{p['flops'] / 1e12:.1f}", f"{p['traffic'] / GIB:.1f}",
            *(f"{s:.2f}" for s in p["seconds_of"].values()), f"{p['seconds']:.2f}"]
           for name, p in plan["programs"].items()])
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in plan["phases"].items())
    lines += [f"At best {plan['seconds']:.1f} s a step ({phases}), {plan['images_per_second']:.2f} pictures a second,",
              f"{plan['chip_hours']:,.0f} chip-hours for the run. It {'fits' if plan['fits'] else 'does NOT fit'}."]
    return "\n".join(lines)


if __name__ == "__main__":
    from ml_collections import config_flags
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. configs/xomni.py.")
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and shape of the slice: v5e:8x8, v5p:2x2x2, v6e:4x4.")
    _MESH = flags.DEFINE_string("mesh", None, "Sizes of the mesh, e.g. data:2,fsdp:8,tensor:4; default: the config's.")
    _JSON = cli.path_flag("json", "A file for all figures.")
    cli.run(main)
