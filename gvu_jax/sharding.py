"""Where every array lies: one mesh, one partition table per model, one rule for batches.

The mesh has three axes. A picture, a prompt, a sample is a row of a batch; its parameters are split, too:

    data      copies of the model, each with rows of its own
    fsdp      rows of its own as well, and a share of every weight, gathered layer by layer when it is needed
    tensor    the backbone's heads, feed-forward channels and vocabulary are divided; the same rows

Each model's file names the logical axes of its parameters (`PARTITION`: path regex -> logical axes, of the trailing
dimensions), and a family which part of its params has which table (`umm.partition`, here an argument `partition`);
`LAYOUTS` says which mesh axes a logical axis is divided over. The adapter and the optimizer's state follow the
parameters they belong to. The backbone draws tokens in a layout of its own, "rollout": gathered over fsdp
once, before the first token, so that decoding moves activations between chips and never weights.

Nothing in a model depends on the mesh: samples get their keys from their place in the whole, and sharded programs
compute what one device does, up to the order of sums.
"""
import contextlib
import functools
import math
import os
import re
import sys
import traceback

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from gvu_jax import hosts, rewards
from gvu_jax.models.layers import AXES, BATCH

LAYOUTS = {
    "stored": {"width": ("fsdp",), "heads": ("tensor",), "channels": ("tensor",), "vocab": ("tensor",),
               "any": ("fsdp", "tensor")},
    "rollout": {"width": (), "heads": ("tensor",), "channels": ("tensor",), "vocab": ("tensor",), "any": ()},
}
SMALL = 2 ** 20          # elements; a smaller array whose axis does not divide lies whole on every device


# ---- meshes --------------------------------------------------------------------------------------------------------

def make_mesh(sizes="fsdp:-1", devices=None):
    """A mesh with the axes data, fsdp, tensor (Auto: XLA places what no constraint does).

    sizes: {"data": 4, "tensor": 2} or "data:4,tensor:2"; an axis not named is 1, and one may be -1, "the rest".
    devices: jax.devices() where None; a mesh may leave some of them out. Raises ValueError that says why there is no
    such mesh.
    """
    devices = jax.devices() if devices is None else list(devices)
    if isinstance(sizes, str):
        try:
            sizes = {name.strip(): int(size) for name, size in (part.split(":") for part in sizes.split(","))}
        except ValueError as error:
            raise ValueError(f"mesh {sizes!r} is not of the form data:4,fsdp:2,tensor:2") from error
    sizes = dict(sizes)
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"the mesh has no axis {', '.join(sorted(unknown))}; its axes are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh {named(shape)}: sizes are at least 1, and at most one is -1, the rest")
    if -1 in shape:
        known = -math.prod(shape)
        if len(devices) % known:
            raise ValueError(f"{len(devices)} devices cannot be divided by the mesh's other axes, {named(shape)}: set "
                             f"--config.mesh.tensor and its like")
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) > len(devices):
        raise ValueError(f"the mesh {named(shape)} needs {math.prod(shape)} devices, but there are {len(devices)}")
    if jax.process_count() > 1 and math.prod(shape) < jax.device_count():
        raise ValueError(f"the mesh {named(shape)} leaves out some of the {jax.device_count()} devices of "
                         f"{jax.process_count()} processes: set one axis to -1")
    arrange = functools.partial(mesh_utils.create_device_mesh, shape, devices[:math.prod(shape)])
    try:
        placed = arrange()
    except NotImplementedError:         # no axis of the slice has this length: parts of one then, the nearest to tensor
        placed = arrange(allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def mesh_of(umm):
    """All devices, for drawing and reading without training: over `tensor` as far as the backbone's heads and channels
    divide, so that each holds a share of it while it draws, and the rest over `fsdp`."""
    ar = umm.ar
    tensor = math.gcd(len(jax.devices()), ar.num_attention_heads, ar.num_key_value_heads, ar.intermediate_size)
    return make_mesh({"fsdp": -1, "tensor": tensor})


def mesh_under(params):
    """The mesh on which parameters lie."""
    return jax.tree.leaves(params)[0].sharding.mesh


def join_hosts(how, timeout=300):
    """Joins the processes of a run; before anything asks for a device.

    how: "auto" where the machines know each other (TPU pods, Slurm), or "ADDRESS:PORT,COUNT,INDEX". timeout: seconds to
    wait for each other. ValueError for anything else, and, naming them, where processes do not come in time.
    """
    if how == "auto":
        with hosts.watch(timeout):
            try:
                return jax.distributed.initialize(initialization_timeout=2 * timeout)
            except ValueError as error:                        # "coordinator_address should be defined."
                raise ValueError("--hosts=auto: nothing here tells of other machines, as TPU pods and Slurm do: give "
                                 "--hosts=ADDRESS:PORT,COUNT,INDEX, or leave it out where there is one machine"
                                 ) from error
    try:
        address, count, index = how.split(",")
        count, index = int(count), int(index)
    except ValueError as error:
        raise ValueError(f"--hosts={how} is neither auto nor ADDRESS:PORT,COUNT,INDEX") from error
    if not 0 <= index < count or ":" not in address:
        raise ValueError(f"--hosts={how}: the index must lie in [0, {count}), and the address must name a port")
    left = hosts.meet(address, count, index, timeout)
    jax.distributed.initialize(address, count, index, initialization_timeout=max(60, int(left)))


@contextlib.contextmanager
def one_fails_all_fail():
    """With several processes, ends this one with one line at any error, its own or that another one is gone; and with
    the stack trace where it is a defect, or GVU_TRACEBACK is set."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        foreseen = (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError)   # the last: another is gone
        if os.environ.get("GVU_TRACEBACK") or not isinstance(error, foreseen):
            traceback.print_exc()
        what = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"error: process {jax.process_index()} of {jax.process_count()} ends: {what} - where another process has "
              f"ended first, start all of them again: they go on from the newest state", file=sys.stderr, flush=True)
        os._exit(1)                          # an orderly exit would wait for the others


def wait_for_all(what):
    """Returns when all processes have come here. One may take its time: it is pretraining for the others."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(what, timeout=24 * 3600)


def first_says(value):
    """What process 0 says, in all processes. value: bool or a number."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(np.array(value)).item()


def first_says_all(array):
    """An array of the host as process 0 has it, in all processes."""
    return array if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))


def named(shape):
    return ",".join(f"{axis}:{size}" for axis, size in zip(AXES, shape))


def check(umm, mesh, settings, samples):
    """Raises ValueError, in one line, for a mesh on which this model or this batch cannot be divided.

    settings: the method's, of which `prompts`, `micro_batches` and `waves` are read. samples: rows of an update.
    """
    tensor, rows = mesh.shape["tensor"], batch_shards(mesh)
    of_mesh = f"mesh {named(mesh.devices.shape)}"
    for what, count in {"query heads": umm.ar.num_attention_heads, "key/value heads": umm.ar.num_key_value_heads,
                        "feed-forward channels": umm.ar.intermediate_size}.items():
        if count % tensor:
            raise ValueError(f"{of_mesh}: the {count} {what} of the backbone cannot be divided by tensor = {tensor}")
    if samples % (rows * settings.micro_batches):
        raise ValueError(f"{of_mesh}: {samples} samples a step in {settings.micro_batches} micro-batches cannot be "
                         f"divided by data x fsdp = {rows}")
    if settings.waves > 1 and settings.prompts % (rows * settings.waves):
        raise ValueError(f"{of_mesh}: {settings.prompts} prompts in {settings.waves} waves cannot be divided by "
                         f"data x fsdp = {rows}")


# ---- parameters ----------------------------------------------------------------------------------------------------

def shardings(partition, tree, mesh, layout="stored"):
    """NamedShardings of a tree of arrays or shapes whose paths name a part of the model ("ar", "adapter", ..) anywhere
    on their way: params, a trainable subtree, an optimizer's state. What belongs to no part lies whole.

    Raises ValueError for a parameter that no rule or more than one rule matches, and for a large one whose axis does
    not divide.
    """
    def place(path, leaf):
        part, name = parameter(partition, path)
        if part is None or leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        axes = logical_axes(name, partition[part])
        return NamedSharding(mesh, divide(leaf.shape, axes, mesh, LAYOUTS[layout], jax.tree_util.keystr(
            path, simple=True, separator="/")))
    return jax.tree_util.tree_map_with_path(place, tree)


def parameter(partition, path):
    """Which parameter a path of jax.tree_util leads to: the part of the model, and its path there ("layers/layer/..");
    (None, "") for what belongs to no part."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    part = next((i for i, name in enumerate(names) if name in partition), None)
    return (None, "") if part is None else (names[part], "/".join(names[part + 1:]))


def logical_axes(path, table):
    """The logical axes of a parameter's trailing dimensions. An adapter's a [.., in, r] and b [.., r, out] take the
    first and the last of those of the matrix they stand beside; the step [.., 1, out] of a rounded one, the last."""
    module, _, leaf = path.rpartition("/")
    half = leaf if leaf in ("a", "b", "step") else None
    paths = [f"{module}/kernel", f"{module}/embedding"] if half else [path]
    found = [axes for pattern, axes in table for path in paths if re.search(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"parameter {path} matches {len(found)} rules of its model's PARTITION; it must be one")
    first, last = found[0] if half else (None, None)
    return {"a": (first, None), "b": (None, last), "step": (None, last), None: found[0]}[half]


def divide(shape, axes, mesh, layout, name):
    """The PartitionSpec of an array: its trailing dimensions' logical axes over the mesh axes of the layout.

    The vocabulary stays whole where it does not divide, and so does an array of fewer than SMALL elements.
    """
    spec = [None] * len(shape)
    for i, axis in enumerate(axes, start=len(shape) - len(axes)):
        over = tuple(mesh_axis for mesh_axis in layout.get(axis, ()) if mesh.shape[mesh_axis] > 1)
        count = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
        if shape[i] % count == 0:
            spec[i] = over or None
        elif axis != "vocab" and math.prod(shape) >= SMALL:
            raise ValueError(f"{name} {tuple(shape)}: axis {i} cannot be divided by {' x '.join(over)} = {count}; "
                             f"choose another mesh")
    return PartitionSpec(*spec)


def place(partition, tree, mesh):
    """Shapes and dtypes -> the same with their shardings: what Orbax reads into and what programs are lowered for."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        tree, shardings(partition, tree, mesh))


def lay(partition, tree, mesh):
    """Arrays of the host, whole in every process, where their paths put them on the mesh: parameters."""
    return jax.tree.map(lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
                        tree, shardings(partition, tree, mesh))


def constrain(partition, tree, layout="stored"):
    """Inside a program: parameters, or what has their paths, in the given layout. Without a mesh nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(
        tree, shardings(partition, tree, mesh, layout))


# ---- batches -------------------------------------------------------------------------------------------------------

def batch_shards(mesh):
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh, rows):
    """The leading axis over data and fsdp; whole where the rows cannot be divided so."""
    return NamedSharding(mesh, PartitionSpec(BATCH) if rows % batch_shards(mesh) == 0 else PartitionSpec())


def place_prompts(umm, texts, lengths, mesh, times=1, questions=None, end=False):
    """Prompts of B texts, each row `times` times, on the mesh: [B * times, ..]; questions, end: see umm.encode_prompts.

    Every process gives the same texts and encodes those whose rows its own devices hold.
    """
    rows = len(texts) * times
    sharding, text_of = batch_sharding(mesh, rows), np.arange(rows) // times
    ours = np.unique(np.concatenate([text_of[index] for index in
                                     sharding.addressable_devices_indices_map((rows,)).values()]))
    encoded = umm.encode_prompts([texts[i] for i in ours], lengths, questions and [questions[i] for i in ours], end)
    pick = lambda x: jax.make_array_from_callback(
        (rows, *x.shape[1:]), sharding, lambda index: x[np.searchsorted(ours, text_of[index[0]])])
    return jax.tree.map(pick, encoded)


def place_questions(umm, texts, lengths, mesh, times):
    """Whether a picture shows what B texts say, asked `times` times each: Prompts [B * times * 2], "yes" beside "no".

    lengths: umm.Lengths that hold the texts; see rewards.yes.
    """
    asked = [rewards.question(text) for text in texts for _ in range(times * len(rewards.ANSWERS))]
    answers = rewards.ANSWERS * (len(texts) * times)
    return place_prompts(umm, answers, rewards.question_lengths(umm, lengths), mesh, questions=asked)


def put(tree, mesh):
    """Arrays of the host, the same in every process, on the mesh: keys and scalars whole, batches by their rows."""
    def place(x, where):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def put_leaf(x):
        where = batch_sharding(mesh, x.shape[0]) if x.ndim else NamedSharding(mesh, PartitionSpec())
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x), where))
        return place(x, where)
    return jax.tree.map(put_leaf, tree)


def put_whole(tree, mesh):
    """Arrays of the host, the same in every process, whole on each device."""
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), tree)


def fetch(tree):
    """Arrays of the mesh as numpy arrays, whole, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def split_rows(tree, slices):
    """[S, ..] -> [slices, S / slices, ..] for a scan over slices. Each device cuts the rows that it has: none moves.

    Raises ValueError where the rows of a device cannot be cut into so many slices.
    """
    def split(x):
        shards, (rows, *rest) = _shards(slices), x.shape
        if rows % (slices * shards):
            raise ValueError(f"{rows} rows on {shards} devices cannot be cut into {slices} slices")
        each = rows // (slices * shards)                    # told, for of arrays without entries it cannot be inferred
        return x.reshape(shards, slices, each, *rest).swapaxes(0, 1).reshape(slices, shards * each, *rest)
    return jax.tree.map(split, tree)


def join_rows(tree):
    """The inverse of `split_rows`: [slices, S / slices, ..] -> [S, ..]."""
    def join(x):
        (slices, rows, *rest), shards = x.shape, _shards(x.shape[0])
        return x.reshape(slices, shards, rows // shards, *rest).swapaxes(0, 1).reshape(slices * rows, *rest)
    return jax.tree.map(join, tree)


def in_waves(function, *batch, waves=1):
    """function(*batch) of trees [S, ..] -> a tree [S, ..], whose rows go through it in so many parts, one after the
    other, where all at once would not fit into memory. ValueError as in `split_rows`."""
    if waves == 1:
        return function(*batch)
    return join_rows(jax.lax.map(lambda part: function(*part), split_rows(batch, waves)))


def _shards(slices):
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if slices == 1 or mesh.empty else batch_shards(mesh)


# ---- programs ------------------------------------------------------------------------------------------------------

class Program:
    """A jitted function that is traced, lowered and run under a mesh; `options` are those of jax.jit."""

    def __init__(self, function, mesh, **options):
        self.mesh, self.jitted = mesh, jax.jit(function, **options)

    def __call__(self, *args, **kwargs):
        with jax.set_mesh(self.mesh):
            return self.jitted(*args, **kwargs)

    def lower(self, *args, **kwargs):
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args, **kwargs)
