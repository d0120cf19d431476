"""Converts a published checkpoint to a model folder, and back.

    python -m gvu_jax.convert --src=hf:deepseek-ai/Janus-Pro-1B --dst=DIR
    python -m gvu_jax.convert --src=Janus-Pro-1B --dst=DIR
    python -m gvu_jax.convert --src=X-Omni-En --dst=DIR [--flux=FLUX.1-dev] [--image_size=576]
    python -m gvu_jax.convert --src=show-o --dst=DIR --magvit=magvitv2 --llm=phi-1_5 [--clip=CLIP]
    python -m gvu_jax.convert --src=UAE/llm --dst=DIR [--sd3=SD3.5] [--dit=UAE/dit] [--processor=UAE/llm_processor]
    python -m gvu_jax.convert --export=hf --src=DIR --dst=AS-PUBLISHED
    python -m gvu_jax.convert --export=peft --src=RUN --dst=ADAPTER [--base=X-Omni/X-Omni-En]

The way in reads a directory as published, or fetches one from the Hugging Face Hub by its name (see hub.py); what is
in it, its family's file says (families/NAME.py). What comes out is described in checkpoint.py, and needs neither the
source nor torch. Nothing in the source is executed.

One tensor is held at a time, and nothing is written before every key of every file has its place. Interrupted, the
same command goes on where it stopped: it reads what is there, compares checksums, and writes the rest.

A converted folder also has `source/`: the small files of the source as they were, the headers of its large ones and
the few tensors that the model does not read. --export=hf restores the source from them: the safetensors byte for
byte, files of torch tensor for tensor (their zip checksums are not filled in; torch does not ask for them). Parts that
config.json names outside of the model directory ("../decoder") are written inside of it ("decoder").
"""
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from gvu_jax import base_of_run, checkpoint, cli, families, hub, lora, read_run_config, sharding
from gvu_jax.adapters import write_peft
from gvu_jax.described import Described
from gvu_jax.metrics import Progress, read_json, replace_file
from gvu_jax.models import torch_keys
from gvu_jax.policy import init_trainable
from gvu_jax.tensor_files import ParameterStore, TensorFile, insist_inside, read_header, safetensors_header, write_file

_SRC = cli.path_flag("src", "What to convert: a published directory or its name, hf:OWNER/NAME; for --export a model "
                     "folder or a run's folder.", required=True)
_DST = cli.path_flag("dst", "The folder to write; it must not exist yet.", required=True)
_FOLDERS = {name: cli.path_flag(name, what) for family in families.FAMILIES.values()
            for name, what in family.FOLDERS.items()}                  # what a family reads from elsewhere
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side in pixels of the pictures to draw; without it, as the model was published.",
    lower_bound=1)
_BASE = flags.DEFINE_string("base", None, "What an exported adapter calls its base, for peft to load: a name on the "
                            "Hugging Face Hub or a folder; without it, what the base was converted from.")
_EXPORT = flags.DEFINE_enum("export", None, ["hf", "peft"], "The way back: the published layout (safetensors byte for "
                            "byte, files of torch tensor for tensor), or a peft adapter.")


def read_source(src, image_size=None, **folders):
    """A published directory, or a name on the hub -> tensor_files.Source. ValueError or OSError, in one line, for what
    is wrong. Of a name, what its family reads from elsewhere has a name, too, unless it is given."""
    found = hub.fetch(src) if hub.is_name(src) else Path(src).absolute()
    if not found.is_dir():
        raise FileNotFoundError(f"there is no directory {found}")
    family = families.of_published(found)
    elsewhere = getattr(family, "FROM_HUB", {})
    if unread := folders.keys() - family.FOLDERS.keys():
        raise ValueError(f"{found} is of a family that reads nothing from --{min(unread)}: leave that out")
    if hub.is_name(src):
        folders = {name: by_name for name, (by_name, _) in elsewhere.items()} | folders
    folders = {name: hub.fetch(folder, *elsewhere.get(name, ("", ("*",)))[1:]) if hub.is_name(folder) else folder
               for name, folder in folders.items()}
    return family.read_source(found, image_size, **folders)


# ------------------------------------------------------------------ the plan

class Place(NamedTuple):
    path: str              # of the parameter, "ar/layers/layer/mlp/up_proj/kernel"
    row: Any               # on its leading axis, which stacks the layers; None: the tensor is the parameter
    keys: tuple            # the tensors that make up this row, equal shares of its last axis: mostly one


def plan(umm, found):
    """Where every tensor of a checkpoint goes, from names and shapes alone.

    found: {part: {key: shape}} for the parts of the params that its files hold ("ar", "vision/vit", ..; "" is all).
    Returns {part: {key: Place}}; what a part may hold besides has no place. Raises ValueError naming missing,
    unknown and misshapen keys.
    """
    planned = {}
    for part, (tree, rules, ignored) in umm.published_parts(checkpoint.shapes(umm), found).items():
        try:
            places = torch_keys.places(found[part], tree, rules, ignored)
        except ValueError as error:
            raise ValueError(f"{part or 'weights'}: {error}") from error
        rows = {}
        for key, (path, row, _) in places.items():
            rows.setdefault((path, row), []).append(key)
        planned[part] = {key: Place(f"{part}/{path}" if part else path, row, tuple(rows[path, row]))
                         for key, (path, row, _) in places.items()}
    return planned


def leaves(planned, specs):
    """What the plan fills: {path: (shape, dtype, stacked)} in our layout.

    specs: {part: {key: Spec}}. Raises ValueError where layers of one stack differ in dtype, or a dtype is no float of
    at most 32 bits.
    """
    rows = {}
    for part, places in planned.items():
        for key, (path, row, keys) in places.items():
            spec = specs[part][key]
            if spec.dtype.name not in ("float32", "float16", "bfloat16"):
                raise ValueError(f"{part or 'weights'}: key {key} has dtype {spec.dtype}, which is not implemented for "
                                 f"parameters")
            rows.setdefault(path, []).append((key, spec, row, len(keys)))
    result = {}
    for path, group in rows.items():
        if len({spec.dtype for _, spec, *_ in group}) > 1:
            raise ValueError("layers of one parameter differ in dtype: " + ", ".join(
                f"{key} {spec.dtype}" for key, spec, *_ in group))
        _, spec, row, shares = group[0]
        *shape, last = torch_keys.to_flax_layout(np.broadcast_to(0, spec.shape), path).shape
        shape = *shape, last * shares
        rows = len(group) // shares
        result[path] = (shape, spec.dtype, False) if row is None else ((rows, *shape), spec.dtype, True)
    return result


# ------------------------------------------------------------------ there

def convert(src, dst, image_size=None, **folders):
    """A published directory, or a name on the hub -> a model folder. Returns the number of bytes of its tensors.

    folders: what its family reads from elsewhere (FOLDERS in its file). The folder is `DST.partial` until it is whole.
    Raises ValueError or OSError with one line that says what is wrong.
    """
    source, dst = read_source(src, image_size, **folders), Path(dst).absolute()
    partial = dst.with_name(dst.name + ".partial")
    specs = {part: {key: spec for file in files for key, spec in file.specs.items()}
             for part, files in source.weights.items()}
    total = sum(spec.nbytes for of in specs.values() for spec in of.values())
    files = [*source.names.items(), *((path, name) for name, path in source.kept.items())]
    identity = {"grid": list(source.umm.grid), "files": {name: _fingerprint(path) for path, name in files}}
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        if _identity(dst) == identity and (dst / "metadata.json").exists():
            return total                                                     # done by an earlier call
        raise FileExistsError(f"{dst} exists and is not this conversion of {src}: remove it, or choose another --dst")
    resumed = partial.exists()
    if resumed and _identity(partial) not in (identity, None):
        raise FileExistsError(f"{partial} is an unfinished conversion of another source: remove it first")

    planned = plan(source.umm, {part: {key: spec.shape for key, spec in of.items()} for part, of in specs.items()})
    parameters = leaves(planned, specs)
    partial.mkdir(parents=True, exist_ok=True)
    needed = total - sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(partial).free) < needed:
        raise OSError(f"no space left for {dst}: {needed} bytes are needed, {free} are free")
    _keep_source(partial / "source", source, planned, identity, src)
    store = ParameterStore(partial / "params")
    for path, (shape, dtype, stacked) in parameters.items():
        store.create(path, shape, dtype, stacked)
    with Progress(total, "B", "converting") as progress:
        for part, files in source.weights.items():
            holder = {key: file for file in files for key in file.specs}
            for key, file in holder.items():
                path, row, keys = planned[part].get(key, (None, None, ()))
                if key in keys[:1] and not (resumed and store.holds(path, row)):
                    shares = [torch_keys.to_flax_layout(holder[share].read(share), path) for share in keys]
                    store.write(path, row, np.concatenate(shares, axis=-1) if len(shares) > 1 else shares[0])
                progress.update(file.specs[key].nbytes)
    store.finish()
    checkpoint.write_metadata(partial, source.umm)
    partial.rename(dst)
    return total


def _fingerprint(path):
    """Size and a hash of the first and last MiB: enough to tell two checkpoints apart."""
    size, block = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(block))
        file.seek(max(size - block, 0))
        digest.update(file.read(block))
    return [size, digest.hexdigest()]


def _identity(folder):
    """What the folder was, or is being, converted from; None where that is not known (yet)."""
    manifest = folder / "source" / "manifest.json"
    return read_json(manifest).get("identity") if manifest.is_file() else None


def _keep_source(folder, source, planned, identity, src):
    """Writes `source/`: files as they were, X.header and X.unread.safetensors of each weight file X, manifest.json."""
    for name, path in source.kept.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "files" / name)
    for part, files in source.weights.items():
        for file in files:
            target = folder / "weights" / source.names[file.path]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(target.name + ".header").write_bytes(file.header)
            unread = {key: spec for key, spec in file.specs.items() if key not in planned[part]}
            if unread:
                write_file(target.with_name(target.name + ".unread.safetensors"), safetensors_header(unread), file.read)
    parts = {source.names[file.path]: part for part, files in source.weights.items() for file in files}
    called = hub.parse(src)[0] if hub.is_name(src) else str(Path(src).absolute())                    # as peft finds it
    revision = hub.commit_of(src, source.names) if hub.is_name(src) else None
    replace_file(folder / "manifest.json", json.dumps(
        {"parts": parts, "identity": identity, "source": called, "revision": revision}, indent=1))


# ------------------------------------------------------------------ and back

def export_hf(src, dst):
    """A converted model folder -> the published directory it came from. Returns the bytes of the weights."""
    src, dst = Path(src).absolute(), Path(dst).absolute()
    if not (src / "metadata.json").exists():
        raise FileNotFoundError(f"{src} is no model folder: it has no metadata.json")
    manifest = src / "source" / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{src} was not converted from a published checkpoint: it has no source/manifest.json")
    parts = Described(manifest).a(dict, "parts").values
    for name in parts:
        insist_inside(name, manifest)
    kept = src / "source" / "weights"
    headers = {name: (kept / f"{name}.header").read_bytes() for name in parts}
    found = {}
    for name, part in parts.items():
        found.setdefault(part, {}).update({key: spec.shape for key, spec in read_header(headers[name]).items()})
    planned = plan(checkpoint.read_metadata(src), found)
    store = ParameterStore(src / "params")
    total = sum(spec.nbytes for header in headers.values() for spec in read_header(header).values())
    with _Whole(dst) as partial, Progress(total, "B", "exporting") as progress:
        shutil.copytree(src / "source" / "files", partial, dirs_exist_ok=True)
        for name, part in parts.items():
            unread = kept / f"{name}.unread.safetensors"
            unread = TensorFile(unread) if unread.exists() else None

            def read(key):
                if key in planned[part]:
                    path, row, keys = planned[part][key]
                    array = np.split(store.read(path, row), len(keys), axis=-1)[keys.index(key)]
                    array = torch_keys.to_torch_layout(array, path)
                else:
                    array = unread.read(key)
                progress.update(array.nbytes)
                return array

            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(partial / name, headers[name], read)
    return total


class _Whole:
    """A folder that appears under its name only when whole; it begins anew each time."""

    def __init__(self, folder):
        self.folder, self.partial = folder, folder.with_name(folder.name + ".partial")

    def __enter__(self):
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileExistsError(f"{self.folder} exists: remove it, or choose another --dst")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, failed, *_):
        if not failed:
            self.partial.rename(self.folder)


# ------------------------------------------------------------------ adapters

def export_peft(run, dst, base=None):
    """The newest adapter of a run's folder -> a folder that peft loads. base: what it is an adapter of, as transformers
    finds it; None: what the run's base was converted from. Returns the number of its tensors."""
    run = Path(run)
    if not (run / "config.json").exists() or not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run} is no run's folder: it has no config.json and checkpoints/")
    config = read_run_config(run)
    if config.lora.rank == 0:
        raise ValueError(f"{run} trained the whole backbone (lora.rank = 0): there is no adapter to export")
    folder = base_of_run(run, config)
    umm, manifest, revision = checkpoint.read_metadata(folder), folder / "source" / "manifest.json", None
    if base is None and manifest.is_file():
        base, revision = map(read_json(manifest).get, ("source", "revision"))
    states = checkpoint.Checkpoints(run)
    try:
        if (step := states.newest_whole()) is None:
            raise FileNotFoundError(f"{run} has no checkpoint yet: the run ended before its first one")
        like = jax.eval_shape(
            lambda params: init_trainable(umm, params, config, jax.random.key(0)), checkpoint.shapes(umm))
        like = sharding.place(umm.partition, like, states.mesh)
        adapter = states.load(step, trainable=like)["trainable"]["adapter"]
    finally:
        states.close()
    tensors = lora.to_peft(adapter, umm.adapter_rules)
    with _Whole(Path(dst).absolute()) as partial:
        write_peft(partial, tensors, config.lora.rank, config.lora.alpha, base, umm.loads, revision)
    return len(tensors)


# ------------------------------------------------------------------ the command line

def main(_):
    src, dst = _SRC.value, _DST.value
    if _BASE.value and _EXPORT.value != "peft":
        raise ValueError("--base is for --export=peft")
    folders = {name: flag.value for name, flag in _FOLDERS.items() if flag.value}
    if _EXPORT.value and hub.is_name(src):
        raise ValueError(f"--export takes a converted folder or a run, not {src}: convert it first")
    if _EXPORT.value and (folders or _IMAGE_SIZE.value):
        raise ValueError(f"--{', --'.join(_FOLDERS)} and --image_size are for the way in, not for --export")
    if _EXPORT.value == "hf":
        print(f"{export_hf(src, dst) / 1e9:.3f} GB in {dst}")
    elif _EXPORT.value == "peft":
        print(f"{export_peft(src, dst, _BASE.value)} tensors in {dst}")
    else:
        print(f"{convert(src, dst, _IMAGE_SIZE.value, **folders) / 1e9:.3f} GB in {dst}")


if __name__ == "__main__":
    cli.run(main)
