"""Models and training states on disk.

A model folder holds everything that loading needs, and nothing that must be executed to load it:

    metadata.json     format version, kind of model, every config
    tokenizer/        tokenizer.json and the chat template; t5_tokenizer/ and clip_tokenizer/ where the head reads text
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
import math
import os
import shutil
import sys
import time
import types
import typing
from pathlib import Path

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerFast

from gvu_jax import sharding
from gvu_jax.decode import check_files
from gvu_jax.metrics import read_json, replace_file
from gvu_jax.models import flux, siglip_vq, text_encoders, vae, xomni
from gvu_jax.umm import XOmni

FORMAT = 2
DIGEST = "sha256.json"
TOKENIZERS = ("tokenizer", "t5_tokenizer", "clip_tokenizer")


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
    metadata = {"format": FORMAT, "kind": "xomni", "vae_class": type(umm.vae).__name__, "grid": umm.grid,
                "diffusion_steps": umm.diffusion_steps, "diffusion_guidance": umm.diffusion_guidance,
                "instruction": umm.instruction}
    for part in ("ar", "vision", "flux", "vae", "schedule", "transform", "t5", "clip"):
        config = getattr(umm, part)
        metadata[part] = None if config is None else dataclasses.asdict(config)
    for name in TOKENIZERS:
        if (tokenizer := getattr(umm, name)) is not None:
            tokenizer.save_pretrained(folder / name)
    replace_file(folder / "metadata.json", json.dumps(metadata, indent=1))


def read_metadata(folder):
    """The umm of a model folder. Raises ValueError or OSError, in one line, where the metadata is not ours.

    The tokenizers are data: code that a folder brings along ("auto_map") is not looked at.
    """
    path = folder / "metadata.json"
    metadata = read_json(path)
    if metadata.get("format") != FORMAT or metadata.get("kind") != "xomni":
        raise ValueError(f"it is format {metadata.get('format')!r} of kind {metadata.get('kind')!r}; this version of "
                         f"gvu_jax reads format {FORMAT} of kind 'xomni': update gvu_jax, or write the folder again")
    classes = {"ar": xomni.Config, "vision": siglip_vq.Config, "flux": flux.Config, "schedule": flux.Schedule,
               "vae": vae.PatchConfig if metadata.pop("vae_class", None) == "PatchConfig" else vae.Config,
               "transform": siglip_vq.Transform, "t5": text_encoders.T5Config, "clip": text_encoders.ClipConfig}
    for part, cls in classes.items():
        if isinstance(metadata.get(part), dict):
            metadata[part] = typed(cls, metadata[part], part)
    tokenizers = {name: read_tokenizer(folder / name) for name in TOKENIZERS if (folder / name).exists()}
    rest = {name: x for name, x in metadata.items() if name not in ("format", "kind", *TOKENIZERS)}
    umm = typed(XOmni, rest | tokenizers)
    for name, needed in zip(TOKENIZERS, (True, umm.t5, umm.clip)):
        if needed and name not in tokenizers:
            raise FileNotFoundError(f"there is no {folder / name}")
    return umm


def typed(cls, values, name=""):
    """cls(**values), a dataclass, from what JSON or a config says; lists become tuples.

    Raises ValueError for a missing or unknown entry and for one of another type than its field. A whole number is a
    size, a count or an id: none of them is negative.
    """
    where = f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {entry: tuple(x) if isinstance(x, list) else x for entry, x in values.items()}
    missing = [n for n, field in fields.items() if n not in values and field.default is dataclasses.MISSING]
    unknown = [n for n in values if n not in fields]
    if missing or unknown:
        raise ValueError(f"missing: {', '.join(where + n for n in missing)}" if missing else
                         f"unknown to this version of gvu_jax: {', '.join(where + n for n in unknown)}")
    for entry, value in values.items():
        kind = fields[entry].type
        if not is_a(value, kind):
            name = str(kind) if typing.get_args(kind) else kind.__name__
            raise ValueError(f"{where}{entry} is {value!r}, which is no {name}")
    return cls(**values)


def is_a(value, kind):
    """Whether a value may stand in a field of type `kind`, e.g. int | None or tuple[int, int]."""
    if isinstance(kind, types.UnionType):
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        return isinstance(value, tuple) and all(is_a(x, first) for x in value) and (
            rest == [...] or len(value) == 1 + len(rest))
    if kind is int:
        return type(value) is int and 0 <= value < 2 ** 63
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return kind is typing.Any or isinstance(value, kind)


class Described:
    """The dict of a JSON file, which names itself when asked for what it does not have or for what is not ours."""

    def __init__(self, path, values=None):
        self.path, self.values = path, values
        if values is None:
            if not path.is_file():
                raise FileNotFoundError(f"there is no {path}")
            self.values = read_json(path)
        if not isinstance(self.values, dict):
            raise ValueError(f"{path} holds no JSON object")

    def __getitem__(self, name):
        if name not in self.values:
            raise ValueError(f"{self.path} does not say {name!r}")
        value = self.values[name]
        return Described(f"{self.path}, {name},", value) if isinstance(value, dict) else value

    def a(self, kind, name):
        """The entry `name`, which is a `kind`: dict (as Described), list, str, int or float."""
        value = self[name]
        if not isinstance(value, Described) if kind is dict else not is_a(value, kind):
            raise ValueError(f"{self.path} says {name} = {self.values[name]!r}, which is no {kind.__name__}")
        return value

    def get(self, name, default=None):
        return self.values.get(name, default)

    def insist(self, **wanted):
        """Refuses a file whose settings, where it has them, differ from `wanted`: the ones that are implemented."""
        for name, value in wanted.items():
            if self.values.get(name, value) != value:
                raise ValueError(f"{self.path} says {name} = {self.values[name]!r}; implemented is {value!r} only")

    def numbers(self, cls, **more):
        """A config of ours whose fields have the names of the file; `more` are the fields that do not."""
        asked = [f for f in dataclasses.fields(cls) if f.name not in more and f.name != "remat"]
        values = {f.name: self[f.name] for f in asked if f.default is dataclasses.MISSING or f.name in self.values}
        return named(self.path, lambda: typed(cls, values | more))


def named(path, read):
    """read(), whose ValueError is said of `path`."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(folder):
    """The tokenizer of a folder with a tokenizer.json. Raises ValueError naming it where it is broken."""
    check_tokenizer_files(folder)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:                           # transformers raises anything from KeyError to its own
        raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from error


def check_tokenizer_files(folder):
    """ValueError for a file of the tokenizer that is none: as merges.txt, a pointer would be taken for merges."""
    names = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
    check_files(sorted(path for name in names for path in Path(folder).glob(name) if path.is_file()))


def check_tokenizer(tokenizer, ar, specials=()):
    """ValueError unless the tokenizer speaks of pictures as the backbone does."""
    def insist(token, low, high):
        at = tokenizer.convert_tokens_to_ids(token)
        if token not in tokenizer.get_vocab() or not low <= at < high:
            raise ValueError(f"the tokenizer has no token {token} with an id from {low} to {high - 1}")
    V = ar.vocab_size
    insist("<MM-Token-0>", V, V + 1)
    insist(f"<MM-Token-{ar.image_vocab_size - 1}>", V + ar.image_vocab_size - 1, V + ar.image_vocab_size)
    for token in {"<SOM>", "<EOM>", "<IMAGE>", *specials}:
        insist(token, V + ar.image_vocab_size, V + ar.mm_vocab_size)
    for what in ("chat_template", "eos_token", "pad_token"):
        if getattr(tokenizer, what) is None:
            raise ValueError(f"the tokenizer has no {what}")


def _try_template(umm):
    try:
        umm._around(umm.instruction, umm.grid)
    except Exception as error:                           # a template is a program, which jinja2 fences in; it may fail
        raise ValueError(f"its chat template cannot be used: {_first_line(error)}") from error


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
        umm = typed(XOmni, {field.name: getattr(umm, field.name) for field in dataclasses.fields(umm)} | dict(override))
        check_tokenizer(umm.tokenizer, umm.ar)
        _try_template(umm)
        if wrong := differing(folder):
            raise ValueError(f"{wrong}. Remove the folder to have it made again (or only its {DIGEST}, if the change "
                             f"is yours)")
        return umm, stored_shapes(folder, umm)
    except ValueError as error:
        raise ValueError(f"cannot read the model in {folder}: {error}") from error


def load_model(folder, mesh=None, override=()):
    """A model folder -> (umm, params), each array in the dtype it is stored in and where it belongs on the mesh.

    A model too large for one device is never whole in one place. mesh: None takes all devices, see `sharding.mesh_of`.
    override and errors as in `describe_model`.
    """
    umm, found = describe_model(folder, override)
    found = sharding.place(found, mesh or sharding.mesh_of(umm))
    return umm, _read_params(Path(folder).absolute() / "params", lambda params: ocp.load(params, found))


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
        found = jax.eval_shape(lambda: init(umm, jax.random.key(0)))
    except Exception as error:                           # a layer of an impossible size fails in a way of its own
        raise ValueError(f"no model has these sizes: {_first_line(error)}") from error
    fits = {"codes of backbone and image tokenizer": (umm.ar.image_vocab_size, umm.vision.codebook_size),
            "channels of image tokenizer and decoder": (umm.vision.z_channels, umm.flux.siglip_channels),
            "channels of VAE and decoder": (4 * umm.vae.latent_channels, umm.flux.in_channels)}
    if umm.t5 is not None:
        fits |= {"widths of T5 and decoder": (umm.t5.d_model, umm.flux.joint_attention_dim),
                 "widths of CLIP and decoder": (umm.clip.hidden_size, umm.flux.pooled_projection_dim)}
    for what, (one, other) in fits.items():
        if one != other:
            raise ValueError(f"the {what} differ: {one} and {other}")
    return found


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


def init(umm, key):
    """Random parameters of all parts; under jax.eval_shape, their shapes."""
    keys = jax.random.split(key, 6)
    params = {"ar": xomni.init(umm.ar, keys[0]), "vision": siglip_vq.init(umm.vision, keys[1]),
              "flux": flux.init(umm.flux, keys[2]), "vae": vae.init(umm.vae, keys[3])}
    if umm.t5 is not None:
        params |= {"t5": text_encoders.init(umm.t5, keys[4]), "clip": text_encoders.init(umm.clip, keys[5])}
    return params


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
        """The items named in `like` (trainable=..., opt_state=...: arrays or shapes), each in the given structure."""
        return self._checkpointer.load_checkpointables(
            step, {name: sharding.place(tree, self.mesh) for name, tree in like.items()})

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
