"""What a program costs, without running it: arithmetic and memory traffic counted on its jaxpr, traffic between chips
read from its compiled HLO.

XLA's own cost analysis counts the body of a loop once, however often it runs; both readers here multiply. They tell
three kinds of value apart: constants, what follows from weights alone, and everything else ("data").
"""
import dataclasses
import functools
import math
import re

import numpy as np
from jax.extend.core import Literal, jaxprs_in_params
from jax.interpreters import partial_eval

# ------------------------------------------------------------------ the jaxpr

CONSTANT, DATA = 0.0, math.inf     # a weight is the fraction of it, in (0, 1], that one chip computes with
UNFUSED = "dot_general", "conv_general_dilated", "scan", "while", "cond"         # their results lie in memory


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole program on all its chips together, but for the weights, of which every chip reads its own."""
    flops: float = 0.0             # of matrix products and convolutions: 2 M N K
    data: float = 0.0              # bytes these read and write besides weights; what lies between them counts as fused
    weights: float = 0.0           # bytes of weights that they read, per chip

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.data + other.data, self.weights + other.weights)

    def __mul__(self, times):
        return Cost(times * self.flops, times * self.data, times * self.weights)


def count(traced, fractions):
    """The cost of a traced program: a `ClosedJaxpr`.

    fractions: for each of its arguments, DATA, or for a weight the fraction that one chip computes with. A loop counts
    as often as it runs; a `while` whose end is decided at run time counts once, a branch as its dearest side. Weights,
    and whatever lies in int8, are read as they lie, not as a product takes them; what rounds a weight reads and writes
    it once.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    return _count(jaxpr, fractions)[0]


def _count(jaxpr, fractions):
    """-> the cost, and the fraction of each output."""
    of = dict(zip(jaxpr.invars, fractions)) | {var: CONSTANT for var in jaxpr.constvars}
    read = lambda atom: CONSTANT if isinstance(atom, Literal) else of[atom]
    # A product reads what its operands were made of, where that is a weight or int8: bytes of it in memory.
    total, lies = Cost(), {}
    known = lambda atom: CONSTANT < read(atom) and (read(atom) < DATA or atom in lies or atom.aval.dtype == np.int8)
    bytes_of = lambda atom: min(_bytes([atom]), math.inf if isinstance(atom, Literal) else lies.get(atom, math.inf))
    for eqn in jaxpr.eqns:
        ins, params = [read(atom) for atom in eqn.invars], eqn.params
        outs = [max(ins, default=CONSTANT)] * len(eqn.outvars)
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
                total += _product(eqn, ins, inner, bytes_of)
            case "conv_general_dilated":
                kernel = eqn.invars[1].aval
                features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
                total += _product(eqn, ins, kernel.size // features, bytes_of)
            case "scan":
                body = params["jaxpr"].jaxpr
                # Which are carried: versions of jax say it in ways of their own, but all put constants first, then what
                # is carried, which leaves the body as it entered the loop, then what the loop cuts into slices.
                carry = sum(out.aval.ndim == var.aval.ndim for out, var in zip(body.outvars, eqn.outvars))
                sliced = sum(var.aval.ndim < atom.aval.ndim for var, atom in zip(body.invars, eqn.invars))
                carried = slice(len(ins) - sliced - carry, len(ins) - sliced)
                ins[carried] = [DATA] * carry
                total += _count(body, ins)[0] * params["length"]
            case "cond":
                sides = [_count(side.jaxpr, ins[1:])[0] for side in params["branches"]]
                total += max(sides, key=lambda cost: cost.flops)
            case "shard_map":
                total += _count(params["jaxpr"], ins)[0] * math.prod(
                    params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            case "pallas_call":
                cost, _ = _count(params["jaxpr"], [DATA] * len(params["jaxpr"].invars))
                total += Cost(cost.flops * math.prod(params["grid_mapping"].grid), _bytes(eqn.invars + eqn.outvars))
            case "dot_product_attention_fwd_wrapper" | "dot_product_attention_bwd_wrapper" as name:     # cuDNN's
                (B, T, H, E), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
                products = 2 if "fwd" in name else 5                                       # one is computed again
                share = 0.5 if "CAUSAL" in params["mask_type"].name else 1.0                # of all pairs
                total += Cost(2.0 * products * share * B * H * T * S * E, _bytes(eqn.invars + eqn.outvars))
            case _:
                for inner in jaxprs_in_params(params):
                    plain = len(inner.invars) == len(ins)
                    cost, found = _count(inner, ins if plain else [DATA] * len(inner.invars))
                    total += cost
                    outs = found if plain and len(found) == len(outs) else outs
        of |= zip(eqn.outvars, outs)
        if eqn.primitive.name in UNFUSED:
            continue
        for made in eqn.outvars:
            sources = [bytes_of(atom) for atom in eqn.invars if atom.aval.size == made.aval.size and known(atom)]
            if eqn.primitive.name == "convert_element_type" and made.aval.dtype == np.int8:          # this is written
                total += Cost(weights=of[made] * (sum(sources) + _bytes([made]))) if of[made] < DATA else Cost()
            elif sources:
                lies[made] = min(sources)
    return total, [read(atom) for atom in jaxpr.outvars]


def _product(eqn, ins, inner, bytes_of):
    data = sum(bytes_of(atom) for atom, fraction in zip(eqn.invars, ins) if fraction == DATA)
    weights = sum(bytes_of(atom) * fraction for atom, fraction in zip(eqn.invars, ins) if fraction != DATA)
    return Cost(2 * eqn.outvars[0].aval.size * inner, data + _bytes(eqn.outvars), weights)


def _bytes(atoms):
    return sum(atom.aval.size * np.dtype(atom.aval.dtype).itemsize for atom in atoms)


# ------------------------------------------------------------------ compiled HLO

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of one chip's program."""
    kind: str                # of KINDS; an asynchronous pair counts once
    shape: str               # of its result, e.g. "bf16[4096,1024]"
    bytes: int               # of its result, each time
    group: int               # chips that exchange
    loops: tuple             # how often each loop around it runs, outermost first; () outside of all
    weights: bool            # what it moves, or part of it, follows from weights alone
    carried: int = 0         # its channel, where it runs in pieces beside other work; 0 for all others

    @property
    def times(self):
        return math.prod(self.loops)

    @property
    def wire(self):
        """Bytes that a chip receives each time: the others' shares of the result; twice those for an all-reduce, which
        scatters and gathers; for a reduce-scatter, whose result is one share, as many as there are others."""
        others = self.group - 1
        return self.bytes * {"all-reduce": 2 * others / self.group, "reduce-scatter": others,
                             "collective-permute": 1}.get(self.kind, others / self.group)


def collectives(hlo, weights):
    """Every `Collective` of a compiled program. hlo: `compiled.as_text()`. weights: a regular expression that finds the
    weights among the names of the program's arguments, such as params['ar']['lm_head']['kernel'].

    The computations are walked from the entry through loops, fusions, calls and branches. Raises ValueError where a
    loop does not say how often it runs.
    """
    computations, chips, found = parse(hlo), int(re.search(r"num_partitions=(\d+)|$", hlo)[1] or 1), []

    def walk(computation, given, loops):
        """-> what the result follows from: CONSTANT, 1 (weights) or DATA, or a list of those for a tuple."""
        of = {}
        for op in computation:
            ins = [of[operand] for operand in op.operands]
            if op.opcode == "parameter":
                of[op.name] = given[op.number] if given else (
                    1 if re.search(weights, op.argument) else DATA)
            elif op.opcode == "tuple":
                of[op.name] = ins
            elif op.opcode == "get-tuple-element" and isinstance(ins[0], list):
                of[op.name] = ins[0][op.number]
            elif op.opcode == "while":
                condition, body = (computations[op.called[key]] for key in ("condition", "body"))
                around, before = (*loops, trips(op, condition)), len(found)
                state, after = None, ins[0]
                while state != after:                        # what the body leaves is what it starts from again
                    del found[before:]
                    state = after
                    after = either(state, walk(body, [state], around))
                of[op.name] = state
            elif op.opcode == "conditional":
                sides = [walk(computations[side], [value], loops) for side, value in zip(op.branches, ins[1:])]
                of[op.name] = functools.reduce(either, sides)
            elif op.opcode in ("fusion", "call", "async-start"):
                of[op.name] = walk(computations[op.called["calls" if "calls" in op.called else "to_apply"]], ins, loops)
            else:
                of[op.name] = functools.reduce(either, ins, CONSTANT)
                if (kind := op.opcode.removesuffix("-start")) in KINDS:
                    of[op.name] = ins if len(ins) > 1 else ins[0]
                    # A TPU can carry one collective in pieces through a loop: it counts where its first piece is.
                    if not op.carried or op.carried not in [c.carried for c in found]:
                        found.append(Collective(kind, " ".join(op.result), sum(map(size, op.result)),
                                                op.group or chips, loops, 1 in ins, op.carried))
            if op.root:
                root = of[op.name]
        return root

    walk(computations["ENTRY"], None, ())
    return found


def either(one, other):
    """What follows from two values, or from one of them, not known which; a tuple and a single value join as one."""
    if isinstance(one, list) and isinstance(other, list):
        return [either(a, b) for a, b in zip(one, other)]
    one, other = (functools.reduce(either, x, CONSTANT) if isinstance(x, list) else x for x in (one, other))
    return max(one, other)


@dataclasses.dataclass
class Instruction:
    """A line of HLO, as far as it matters here."""
    name: str
    root: bool
    opcode: str
    operands: list           # names
    number: int              # of a parameter or a tuple's element; the value of a constant
    argument: str            # where it came from in Python; of the entry's parameters, the argument's name
    called: dict             # attribute -> computation
    branches: list           # the computations of a conditional
    result: list             # "dtype[dims]" of its parts; of an asynchronous start, of what it will give
    group: int               # chips of a replica group; 0: all
    trips: int               # of a while, where XLA knows; 0: it does not say
    carried: int             # see Collective


def parse(hlo):
    """HLO text -> {computation: its instructions}; the entry is called "ENTRY"."""
    computations = {}
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "ENTRY" if line.startswith("ENTRY") else re.match(r"%?([\w.\-]+)", line)[1]
            current = computations[name] = []
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            root, name, kind, opcode, rest = found.groups()
            inside, rest = closed(rest)
            number = re.search(r"\bindex=(\d+)", rest) or re.fullmatch(r"(\d+)", inside)
            argument = re.search(r'op_name="([^"]*)"', rest)
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            called = dict(re.findall(r"\b(\w+)=%([\w.\-]+)", rest))
            carried = re.search(r"channel_id=(\d+).*async_collective_fusion_config", rest)
            current.append(Instruction(
                name, bool(root), opcode, re.findall(r"%([\w.\-]+)", inside), int(number[1]) if number else None,
                argument[1].replace("\\", "") if argument else "", called,
                re.findall(r"%([\w.\-]+)", branches[1]) if branches else
                [called[key] for key in ("true_computation", "false_computation") if key in called],
                parts(kind, opcode), group(rest), int(known[1]) if known else 0,
                int(carried[1]) if carried else 0))
    return computations


def closed(text):
    """'operands), attributes' -> ('operands', 'attributes'), at the parenthesis that closes."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i], text[i + 1:]
    raise ValueError(f"an operand list without an end: {text[:80]!r}")


def parts(kind, opcode):
    """The arrays of an instruction's type: of an asynchronous start, (operands, results, ..), the results."""
    kind = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", kind)                            # layouts and comments
    if opcode.endswith("-start") and opcode != "all-reduce-start" and kind.startswith("("):
        depth, pieces = 0, [""]
        for letter in kind[1:-1]:
            depth += (letter in "([") - (letter in ")]")
            pieces = [*pieces, ""] if letter == "," and depth == 0 else [*pieces[:-1], pieces[-1] + letter]
        kind = pieces[1]
    return re.findall(r"\w+\[[\d,]*\]", kind)


def size(array):
    """Bytes of "bf16[4096,1024]"."""
    dtype, dims = array.rstrip("]").split("[")
    bits = int(re.search(r"\d+|$", dtype)[0] or 8)                              # pred is a byte
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def group(rest):
    """How many chips exchange, from the three ways in which XLA writes replica groups; 0 where it means all."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):                        # [groups, chips]<=[..]
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):                      # {{0,1},{2,3}}
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):    # mesh['a'=2,'b'=4] {'b'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in
                         re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))         # 'a':(1)2 is a part of an axis
    return 0


def trips(loop, condition):
    """How often a while runs: XLA says so, or its condition compares with the one constant in it."""
    limits = [op.number for op in condition if op.opcode == "constant"]
    if not loop.trips and len(limits) != 1:
        raise ValueError(f"the loop {loop.name} ({loop.argument}) does not say how often it runs")
    return loop.trips or limits[0]
