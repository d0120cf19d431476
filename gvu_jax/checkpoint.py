"""Models and training states on disk.

A model folder holds everything that loading needs, and nothing that must be executed to load it:

    metadata.json     format version, kind of model (families.FAMILIES), every config
    tokenizer/        tokenizer.json and the chat template; others beside it where a part of the model reads text itself
    params/           the parameters, Orbax
    source/           where the model was converted: what the way back needs (see convert.py)
    sha256.json       DIGEST, where the model was pretrained here

A run's folder (`--workdir`) holds `base/`, a model folder or a link in config.json to one, and `checkpoints/STEP/`,
each with the trained subtree ("trainable") and the optimizer's state ("opt_state") as separate items, and DIGEST, the
SHA-256 of every file: Orbax notices a write that was cut off, but not a byte that changed on disk.
"""
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from gvu_jax import cli, families, hub, sharding
from gvu_jax.decode import check_files
from gvu_jax.described import read_tokenizer, typed
from gvu_jax.metrics import read_json, replace_file

FORMAT = 2
DIGEST = "sha256.json"


def save_model(folder, umm, params):
    """Writes a model folder. It appears under its name only when whole."""
    folder = Path(folder).absolute()
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_metadata(partial, umm)
    ocp.save(partial / "params", jax.device_put(params))      # numpy leaves would be stored differently
    write_digests(partial)
    if folder.exists():                     # another process was faster; its model is as good as this one
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def write_metadata(folder, umm):
    """Everything of a model folder but the parameters: metadata.json and the tokenizers."""
    for field in dataclasses.fields(umm):
        if field.name.endswith("tokenizer") and (tokenizer := getattr(umm, field.name)) is not None:
            tokenizer.save_pretrained(folder / field.name)
    replace_file(folder / "metadata.json", json.dumps(metadata_of(umm), indent=1))


def metadata_of(umm):
    """What metadata.json says: all that a model is but for its tokenizers and parameters."""
    metadata = {"format": FORMAT, "kind": umm.kind}
    for field in dataclasses.fields(umm):
        value = getattr(umm, field.name)
        if field.name.endswith("tokenizer"):
            continue
        if len(configs_of(field)) > 1:
            metadata[f"{field.name}_class"] = type(value).__name__
        metadata[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return metadata


def read_metadata(folder):
    """The umm of a model folder, of the family that its `kind` names. Raises ValueError or OSError, in one line, where
    the metadata is not ours.

    The tokenizers are data: code that a folder brings along ("auto_map") is not looked at.
    """
    metadata = read_json(folder / "metadata.json")
    format, kind = metadata.pop("format", None), metadata.pop("kind", families.FIRST)
    if format != FORMAT or kind not in list(families.FAMILIES):                    # what JSON says may have no hash
        raise ValueError(f"it is format {format!r} of kind {kind!r}; this version of gvu_jax reads format {FORMAT} of "
                         f"kind {' or '.join(map(repr, families.FAMILIES))}: update gvu_jax, or write the folder again")
    model = families.FAMILIES[kind].MODEL
    for field in dataclasses.fields(model):
        name = field.name
        if name.endswith("tokenizer"):
            metadata.pop(name, None)
            if (folder / name).exists():
                metadata[name] = read_tokenizer(folder / name)
        elif configs := configs_of(field):
            called = metadata.pop(f"{name}_class", None)
            config = next((config for config in configs if config.__name__ == called), configs[0])
            if isinstance(metadata.get(name), dict):
                metadata[name] = typed(config, metadata[name], name)
    return typed(model, metadata)


def configs_of(field):
    """The classes of config that may stand in a field of a umm."""
    return [kind for kind in typing.get_args(field.type) or [field.type] if dataclasses.is_dataclass(kind)]


def describe_model(folder, override=()):
    """A model folder -> (umm, shapes and dtypes of its params); no parameter is read.

    override: fields of the umm that take the place of the folder's (a run's config.model.override), e.g. {"grid": [36,
    36]}. Raises ValueError or FileNotFoundError with one line that says what is wrong.
    """
    folder = Path(folder).absolute()
    if not (folder / "metadata.json").exists():
        raise FileNotFoundError(f"{folder} is no model folder: it has no metadata.json (gvu_jax.convert writes model "
                                f"folders from published checkpoints)")
    try:
        umm = read_metadata(folder)
        fields = {field.name: getattr(umm, field.name) for field in dataclasses.fields(umm)}
        umm = typed(type(umm), fields | dict(override))
        umm.check_text()
        if wrong := differing(folder):
            raise ValueError(f"{wrong}. Remove the folder to have it made again (or only its {DIGEST}, if the change "
                             f"is yours)")
        return umm, stored_shapes(folder, umm)
    except ValueError as error:
        raise ValueError(f"cannot read the model in {folder}: {error}") from error


def describe_base(config, parts=None):
    """(umm, shapes of its params) of the model that a run of `config` starts from, which need not be there yet: of its
    model folder; else of the shapes world, or the published ones.

    parts: as in `load_model`. Errors as in `describe_model`.
    """
    override, folder = config.model.get("override", {}), config.model.get("checkpoint")
    folder = folder and (hub.place(folder, config.cache) if hub.is_name(folder) else cli.path(folder))
    if folder and folder.exists():
        umm, params = describe_model(folder, override)
    else:
        umm, dtype = (families.tiny_of(config).tiny(config), jnp.float32) if config.get("world") else (
            families.of(config).published(override, config.model.get("size")), jnp.bfloat16)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes(umm))
    remat = config.model.get("remat", umm.ar.remat)
    return dataclasses.replace(umm, ar=dataclasses.replace(umm.ar, remat=remat)), {
        name: part for name, part in params.items() if parts is None or name in parts}


def load_model(folder, mesh=None, override=(), parts=None):
    """A model folder -> (umm, params), each array in the dtype it is stored in and where it belongs on the mesh.

    A model too large for one device is never whole in one place. mesh: None takes all devices, see `sharding.mesh_of`.
    parts: names of those parts of the params that are read; None: all. override and errors as in `describe_model`.
    """
    umm, found = describe_model(folder, override)
    wanted = {name: part for name, part in found.items() if parts is None or name in parts}
    left_out = jax.tree.map(lambda _: ocp.PLACEHOLDER, found)
    asked = left_out | sharding.place(umm.partition, wanted, mesh or sharding.mesh_of(umm))
    params = _read_params(Path(folder).absolute() / "params", lambda params: ocp.load(params, asked))
    return umm, {name: params[name] for name in wanted}


def _read_params(params, read):
    """read(params), a folder, of which Orbax and tensorstore let every kind of exception out where it is damaged."""
    try:
        return read(params)
    except (OSError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        files = (path for path in params.rglob("*") if path.is_file() and path.name != "orbax.checkpoint")   # a mark
        check_files(sorted(files))
        raise ValueError(f"cannot read the params in {params}: {_first_line(error)}") from error


def shapes(umm):
    """The shapes of all parameters. ValueError where the parts do not fit, each in itself and one to the other."""
    try:
        found = traced_init(umm).out_info
    except Exception as error:                           # a layer of an impossible size fails in a way of its own
        raise ValueError(f"no model has these sizes: {_first_line(error)}") from error
    umm.check_parts()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)


TRACED = {}


def traced_init(umm):
    """umm.init(key), jitted and traced outside of any mesh: that takes a second or more, so it is done once for all
    models of a process that have the same metadata."""
    of = type(umm), json.dumps(metadata_of(umm))
    if of not in TRACED:
        TRACED[of] = jax.jit(umm.init).trace(jax.random.key(0))
    return TRACED[of]


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def stored_shapes(folder, umm):
    """Shapes and dtypes of a folder's params. ValueError names what differs from what the configs ask for."""
    flat = lambda tree: traverse_util.flatten_dict(tree, sep="/")
    asked = flat(shapes(umm))
    stored = _read_params(folder / "params", lambda params: flat(ocp.metadata(params).metadata))
    misshapen = [f"{name} {tuple(stored[name].shape)} instead of {asked[name].shape}"
                 for name in sorted(set(asked) & set(stored)) if tuple(stored[name].shape) != asked[name].shape]
    wrong = {"missing": sorted(set(asked) - set(stored)), "unknown": sorted(set(stored) - set(asked)),
             "misshapen": misshapen}
    if any(wrong.values()):
        raise ValueError("the params do not fit metadata.json: " + "; ".join(
            f"{what}: {', '.join(names)}" for what, names in wrong.items() if names))
    found = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    return traverse_util.unflatten_dict(found, sep="/")


class Checkpoints:
    """The sequence of training states of one run: the newest `keep` are kept, each is written whole or not at all.

    mesh: where states are loaded to, whatever mesh they were saved from; None takes all devices. Only the run itself
    opens them for writing, which clears away what an earlier sitting left half-written.
    """

    def __init__(self, workdir, mesh=None, keep=2, writing=False):
        self.mesh, self._writing = mesh or sharding.make_mesh(), writing
        self._folder = Path(workdir).absolute() / "checkpoints"
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder, preservation_policy=policy, cleanup_tmp_directories=writing)

    def newest_whole(self):
        """The step of the newest state whose files are as they were written, or None where there is no state.

        Newer states that are not are named in a warning and, by the run itself, moved out of the way. Raises ValueError
        where no state is whole.
        """
        found = self._checkpointer.latest and sharding.first_says(self._find_whole() if jax.process_index() == 0 else 0)
        if found == -1:
            raise ValueError(f"no state in {self._folder} is whole: give another --workdir, or remove this one to "
                             f"start over")
        if self._writing:
            self._checkpointer.reload()                       # some may have been moved
        return found

    def _find_whole(self):
        broken = []
        for state in sorted(self._checkpointer.checkpoints, key=lambda state: -state.step):
            wrong = differing(self._folder / str(state.step))
            if not wrong:
                for step, what in broken:
                    print(f"warning: the state of step {step} in {self._folder} is broken ({what}); going on from step "
                          f"{state.step}, the newest whole one", file=sys.stderr)
                    if self._writing:
                        aside = f"broken_state_{step}_{time.time_ns()}"
                        (self._folder / str(step)).rename(self._folder.with_name(aside))
                return state.step
            broken.append((state.step, wrong))
        return -1

    def save(self, step, **parts):
        """Writes a state: trainable, opt_state, reference. Raises OSError where the disk refuses; older ones stay."""
        try:
            self._checkpointer.save_checkpointables(step, parts, overwrite=True)
        except Exception as error:                            # of Orbax, TensorStore or the file system
            raise OSError(f"the state of step {step} could not be saved in {self._folder}: "
                          f"{_first_line(error)}") from error
        if jax.process_index() == 0:
            write_digests(self._folder / str(step))

    def load(self, step, **like):
        """The items named in `like` (trainable=..., opt_state=...: arrays or shapes), each in the given structure and
        where its leaves lie; whole on every device of the mesh where they lie nowhere."""
        def place(leaf):
            where = getattr(leaf, "sharding", None) or jax.NamedSharding(self.mesh, jax.P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return self._checkpointer.load_checkpointables(step, jax.tree.map(place, like))

    def close(self):
        self._checkpointer.close()


def digests(folder):
    """{file's path below folder: its SHA-256}, without DIGEST itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGEST)
    return {str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files}


def write_digests(folder):
    replace_file(folder / DIGEST, json.dumps(digests(folder)))


def differing(folder):
    """What is wrong with the files of a folder, in a few words; "" where they are as they were written.

    One without DIGEST is taken as it is: a state that was whole for Orbax when the process ended, a converted model,
    whose tens of gigabytes are not read twice at every start.
    """
    if not (folder / DIGEST).exists():
        return ""
    try:
        written = json.loads((folder / DIGEST).read_text())
        found = digests(folder)
        wrong = [name for name in written if found.get(name) != written[name]]
    except (OSError, ValueError, AttributeError) as error:
        return f"{DIGEST}: {error}"
    return f"{', '.join(wrong[:3])} differ or are missing" if wrong else ""
