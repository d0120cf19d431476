"""Converts a published X-Omni checkpoint to a model folder, and back.

    python -m gvu_jax.convert --src=X-Omni-En --dst=DIR [--flux=FLUX.1-dev] [--image_size=576]
    python -m gvu_jax.convert --export=hf --src=DIR --dst=X-OMNI-AGAIN
    python -m gvu_jax.convert --export=peft --src=RUN --dst=ADAPTER [--base=X-Omni/X-Omni-En]

The way in reads a directory as published: config.json with a vision_config that names the other parts, safetensors
(one file, or shards with an index), tokenizer files, the image tokenizer's .pt files, the image decoder in diffusers'
layout, and a FLUX.1-dev folder for VAE, text encoders, their tokenizers and the scheduler: `base` beside the decoder,
or --flux. FLUX's own transformer is not read. What comes out is described in checkpoint.py, and needs neither the
source nor torch. Nothing in the source is executed.

One tensor is held at a time, and nothing is written before every key of every file has its place. Interrupted, the
same command goes on where it stopped: it reads what is there, compares checksums, and writes the rest.

A converted folder also has `source/`: the small files of the source as they were, the headers of its large ones and
the few tensors that the model does not read. --export=hf restores the source from them: the safetensors byte for
byte, the .pt files tensor for tensor (their zip checksums are not filled in; torch does not ask for them). Parts that
config.json names outside of the model directory ("../decoder") are written inside of it ("decoder").
"""
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from transformers import AutoTokenizer

from gvu_jax import base_of_run, checkpoint, cli, lora, read_run_config
from gvu_jax.adapters import write_peft
from gvu_jax.checkpoint import Described
from gvu_jax.metrics import Progress, read_json, replace_file
from gvu_jax.models import flux, siglip_vq, text_encoders, torch_keys, vae, xomni
from gvu_jax.policy import init_trainable
from gvu_jax.tensor_files import ParameterStore, TensorFile, read_header, safetensors_header, write_file
from gvu_jax.umm import XOmni

_SRC = cli.path_flag("src", "What to convert: a published directory, a model folder or a run's folder.", required=True)
_DST = cli.path_flag("dst", "The folder to write; it must not exist yet.", required=True)
_FLUX = cli.path_flag("flux", "A FLUX.1-dev folder; default: `base` beside the decoder transformer.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side in pixels of the pictures to draw; default 576, or the transform's short_size where "
    "its long_size is below 576.", lower_bound=1)
_BASE = flags.DEFINE_string("base", None, "What an exported adapter calls its base, for peft to load: a name on the "
                            "Hugging Face Hub or a folder; without it, what the base was converted from.")
_EXPORT = flags.DEFINE_enum("export", None, ["hf", "peft"], "The way back: the published layout, or a peft adapter.")

IMAGE_SIZE = 576                                       # what X-Omni and GvU draw
HEADS = {"so400m": 16, "giant": 16}                    # of the published SigLIP towers, whose names contain these
SMALL = 64 << 20                                       # bytes; larger files that are not weights are not kept
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


# ------------------------------------------------------------------ what the source says

def ar_config(described):
    """config.json -> xomni.Config."""
    head_dim = described.a(int, "hidden_size") // max(1, described.a(int, "num_attention_heads"))
    described.insist(hidden_act="silu", rope_scaling=None, tie_word_embeddings=False, head_dim=head_dim)
    windowed = described["use_sliding_window"]
    return described.numbers(
        xomni.Config, rms_norm_eps=described["rms_norm_eps"], rope_theta=described["rope_theta"],
        sliding_window=described["sliding_window"] if windowed else None,
        max_window_layers=described["max_window_layers"] if windowed else 0)


def vision_config(encoder, transform, folder, vit, projector):
    """siglip_vq.Config from the tensors' shapes ({name: Spec} of both files); only the number of heads is not there."""
    encoder.insist(with_norm=True)
    try:
        width, _, patch, _ = vit["patch_embed.proj.weight"].shape
        side = math.isqrt(vit["pos_embed"].shape[1])
        layers = 1 + max(int(name.split(".")[1]) for name in vit if name.startswith("blocks."))
        config = siglip_vq.Config(
            width=width, layers=layers, heads=_heads(encoder, folder), patch_size=patch,
            mlp_hidden=vit["blocks.0.mlp.fc1.weight"].shape[0], pos_table_side=side,
            codebook_size=projector["quantize.embedding.weight"].shape[0],
            codebook_dim=projector["quantize.embedding.weight"].shape[1],
            z_channels=projector["post_quant_conv.weight"].shape[0], **_groups(folder))
    except (KeyError, IndexError) as error:
        raise ValueError(f"the image tokenizer's files have no key {error}") from error
    for name in ("codebook_size", "codebook_dim", "z_channels"):
        if encoder[name] != getattr(config, name):
            raise ValueError(f"{encoder.path} says {name} = {encoder[name]}, its tensors {getattr(config, name)}")
    if transform["patch_size"] != patch:
        raise ValueError(f"{transform.path} says patch_size = {transform['patch_size']}, the tensors {patch}")
    return config


def _groups(folder):
    beside = folder / "config.json"
    groups = Described(beside).get("groupnorm_groups") if beside.is_file() else None
    return {"groups": groups} if groups else {}


def _heads(encoder, folder):
    if (folder / "config.json").is_file():
        described = Described(folder / "config.json")
        heads = described.get("heads") or (described.get("siglip_config") or {}).get("heads")
        if heads:
            return heads
    name = encoder.a(str, "siglip_name").lower()
    for part, heads in HEADS.items():
        if part in name:
            return heads
    raise ValueError(f"how many attention heads has the image tower {encoder['siglip_name']!r}? Say it in "
                     f'{folder / "config.json"}: {{"siglip_config": {{"heads": N}}}}')


def flux_config(described, z_channels):
    """The decoder's config.json -> flux.Config. z_channels: of the image tokenizer's latents, which it reads."""
    described.insist(patch_size=1, out_channels=None)
    # What FLUX.1-dev's own config leaves unsaid, and what the published loader passes by hand.
    described.values = {"axes_dims_rope": (16, 56, 56), "siglip_channels": z_channels} | described.values
    return described.numbers(flux.Config)


def vae_config(described):
    levels = len(described.a(list, "block_out_channels"))
    described.insist(act_fn="silu", in_channels=3, out_channels=3, latents_mean=None, latents_std=None,
                     mid_block_add_attention=True, down_block_types=["DownEncoderBlock2D"] * levels,
                     up_block_types=["UpDecoderBlock2D"] * levels)
    if described.get("use_quant_conv", True) or described.get("use_post_quant_conv", True):
        raise ValueError(f"{described.path} asks for quantisation convolutions, which are not implemented")
    return described.numbers(vae.Config)


def schedule_config(described):
    described.insist(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift_terminal=None,
                     time_shift_type="exponential", invert_sigmas=False, stochastic_sampling=False,
                     use_beta_sigmas=False, use_exponential_sigmas=False, use_karras_sigmas=False)
    if not described["use_dynamic_shifting"]:
        raise ValueError(f"{described.path} says use_dynamic_shifting = false; implemented is true only")
    return flux.Schedule(base_tokens=described["base_image_seq_len"], max_tokens=described["max_image_seq_len"],
                         base_shift=described["base_shift"], max_shift=described["max_shift"])


def read_tokenizer(folder, name):
    """The tokenizer in `folder`, from its own tokenizer.json where there is one.

    transformers 5 rebuilds T5's from the vocabulary, with other ids than the model was trained on, so T5 needs one.
    """
    if (folder / "tokenizer.json").is_file():
        return checkpoint.read_tokenizer(folder)
    if name == "t5_tokenizer":
        raise FileNotFoundError(f"there is no {folder / 'tokenizer.json'}")
    checkpoint.check_tokenizer_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)        # and do not ask whether to
    except Exception as error:                           # transformers raises anything from KeyError to its own
        raise ValueError(f"cannot read {name} in {folder}: {error}") from error


# ------------------------------------------------------------------ the files of the source

def weight_files(folder):
    """The safetensors of a directory, one file or the shards of an index: list of TensorFile.

    Raises ValueError for an index that does not agree with its shards or leaves the directory, and for duplicates.
    """
    stems = ("model", "diffusion_pytorch_model")
    single = [folder / f"{stem}.safetensors" for stem in stems if (folder / f"{stem}.safetensors").is_file()]
    index = [path for stem in stems if (path := folder / f"{stem}.safetensors.index.json").is_file()]
    if len(single) + len(index) > 1:
        raise ValueError(f"{folder} has several sets of weights: {', '.join(p.name for p in single + index)}")
    if single:
        return [TensorFile(single[0])]
    if not index:
        raise FileNotFoundError(f"{folder} has no safetensors (model.safetensors or model.safetensors.index.json)")
    weight_map = Described(index[0]).a(dict, "weight_map").values
    for name in weight_map.values():
        _insist_inside(name, index[0])
    files = [TensorFile(folder / name) for name in sorted(set(weight_map.values()))]
    places = {}                                                             # key -> the shards that have it
    for file in files:
        for key in file.specs:
            places.setdefault(key, []).append(file.path.relative_to(folder).as_posix())
    duplicates = {key: shards for key, shards in places.items() if len(shards) > 1}
    if duplicates:
        raise ValueError(f"duplicate keys in {folder}: " + ", ".join(
            f"{key} in {' and '.join(shards)}" for key, shards in sorted(duplicates.items())))
    wrong = sorted(key for key in {*places, *weight_map} if places.get(key) != [weight_map.get(key)])
    if wrong:
        raise ValueError(f"{index[0]} and its shards disagree about the keys {wrong}")
    return files


def _insist_inside(name, where):
    """ValueError unless `name`, which the file `where` gives, stays in its directory as written (links may leave it:
    the files of a download cache are links)."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where} names {name!r}, outside of its directory")


class Source(NamedTuple):
    """A published checkpoint, read but for its weights."""
    umm: XOmni
    weights: dict          # part of the tree ("ar", "vision/vit", ...) -> list of TensorFile
    kept: dict             # path inside our `source/` -> small file of the source
    names: dict            # path of a weight file -> its path in an export


def read_source(src, flux_folder=None, image_size=None):
    """A published directory -> Source. Raises ValueError or OSError with one line about what is missing or wrong."""
    src = Path(src).absolute()
    if not src.is_dir():
        raise FileNotFoundError(f"there is no directory {src}")
    described = Described(src / "config.json")
    vision, ar = described.a(dict, "vision_config"), ar_config(described)
    encoder, decoder, transform = (vision.a(dict, part) for part in ("encoder", "decoder", "transform"))
    transform.insist(filtering=True, random_ratio=None)
    fitted = transform.numbers(siglip_vq.Transform)
    if decoder["cfg_scale_2"] != decoder["cfg_scale"]:
        raise ValueError(f"{decoder.path} says cfg_scale = {decoder['cfg_scale']} and cfg_scale_2 = "
                         f"{decoder['cfg_scale_2']}; implemented are equal ones only")
    head = src / decoder.a(str, "model_path")
    base = Path(flux_folder).absolute() if flux_folder else head.parent / "base"
    if not head.is_dir():
        raise FileNotFoundError(f"there is no decoder transformer {head}, which {src / 'config.json'} names")
    if not base.is_dir():
        raise FileNotFoundError(f"there is no FLUX.1-dev folder {base}: pass --flux=DIR")

    siglip = {"vision/vit": src / encoder.a(str, "siglip_path"), "vision": src / encoder.a(str, "projector_path")}
    folders = {"ar": src, "flux": head, "vae": base / "vae", "t5": base / "text_encoder_2",
               "clip": base / "text_encoder"}
    weights = {part: weight_files(folder) for part, folder in folders.items()}
    weights |= {part: [TensorFile(path)] for part, path in siglip.items()}

    of_file = lambda part: Described(folders[part] / "config.json")
    tokenizers = {"tokenizer": src, "t5_tokenizer": base / "tokenizer_2", "clip_tokenizer": base / "tokenizer"}
    vae_of_it = vae_config(of_file("vae"))
    upscale = 2 * vae_of_it.downscale
    if decoder["upscale_factor"] != upscale:
        raise ValueError(f"{decoder.path} says upscale_factor = {decoder['upscale_factor']}, but the decoder draws "
                         f"{upscale} pixels a token")
    if image_size is None:
        image_size = IMAGE_SIZE if IMAGE_SIZE <= fitted.long_size else fitted.short_size
    if image_size % upscale or image_size > fitted.long_size:
        raise ValueError(f"--image_size={image_size}: it must be a multiple of {upscale}, and at most "
                         f"{fitted.long_size}, the long_size that the model reads")
    umm = XOmni(
        ar=ar, vision=vision_config(encoder, transform, siglip["vision/vit"].parent,
                                    *(weights[part][0].specs for part in siglip)),
        flux=flux_config(of_file("flux"), encoder["z_channels"]), vae=vae_of_it,
        schedule=schedule_config(Described(base / "scheduler" / "scheduler_config.json")),
        transform=fitted,
        t5=of_file("t5").numbers(text_encoders.T5Config), clip=of_file("clip").numbers(text_encoders.ClipConfig),
        grid=(image_size // upscale,) * 2, diffusion_steps=decoder.a(int, "num_inference_steps"),
        diffusion_guidance=float(decoder.a(float, "cfg_scale")),
        **{name: read_tokenizer(folder, name) for name, folder in tokenizers.items()})
    checkpoint.check_tokenizer(umm.tokenizer, ar, described.get("mm_special_tokens") or ())
    _set_end(umm.tokenizer, src / "generation_config.json")
    return Source(umm, weights, *_export_paths(src, head, base, weights, siglip.values()))


def _set_end(tokenizer, path):
    """Makes what generation_config.json, if there is one, says to end a turn the tokenizer's end, where that is none of
    it: it is where the published model stops."""
    ends = Described(path).get("eos_token_id") if path.is_file() else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < len(tokenizer) for end in ends):
        raise ValueError(f"{path} says eos_token_id = {ends}, which is no id of the tokenizer's {len(tokenizer)}")
    if ends and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def _export_paths(src, head, base, weights, siglip):
    """Where an export puts the files, relative to the model directory and never above it: `kept`, `names` of Source.

    A FLUX.1-dev folder from elsewhere (--flux) goes to where it would be found, beside the decoder.
    """
    inside = lambda path: Path(*(part for part in Path(os.path.relpath(path, src)).parts if part != ".."))
    folders = {src: Path(), head: inside(head), base: inside(head.parent / "base")}
    folders |= {base / sub: folders[base] / sub for sub in
                ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")}
    kept = {(to / file.name).as_posix(): file for folder, to in folders.items() for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix not in WEIGHTS and file.stat().st_size <= SMALL}
    for path in siglip:
        if (path.parent / "config.json").is_file():
            kept[(inside(path.parent) / "config.json").as_posix()] = path.parent / "config.json"
    names = {file.path: (folders.get(file.path.parent, inside(file.path.parent)) / file.path.name).as_posix()
             for files in weights.values() for file in files}
    return kept, names


# ------------------------------------------------------------------ the plan

class Place(NamedTuple):
    path: str              # of the parameter, "ar/layers/layer/mlp/up_proj/kernel"
    row: Any               # on its leading axis, which stacks the layers; None: the tensor is the parameter


def plan(umm, found):
    """Where every tensor of a checkpoint goes, from names and shapes alone.

    found: {part: {key: shape}} for the parts "ar", "vision/vit", "vision", "flux", "vae", "t5", "clip".
    Returns {part: {key: Place}}; what a part may hold besides has no place. Raises ValueError naming missing,
    unknown and misshapen keys.
    """
    shapes = checkpoint.shapes(umm)
    vision = dict(shapes["vision"])
    trees = {**shapes, "vision/vit": vision.pop("vit"), "vision": vision}
    rules = {"ar": xomni.rules(umm.ar), "vision/vit": siglip_vq.RULES, "vision": siglip_vq.RULES, "flux": flux.RULES,
             "vae": vae.RULES}
    ignored = {"vision/vit": ("norm.weight", "norm.bias")}
    for part in ("t5", "clip"):
        rules[part] = text_encoders.rules(getattr(umm, part), found[part])
        ignored[part] = text_encoders.IGNORED[type(getattr(umm, part))]
    planned = {}
    for part, tree in trees.items():
        try:
            places = torch_keys.places(found[part], tree, rules[part], ignored.get(part, ()))
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
        planned[part] = {key: Place(f"{part}/{path}", row) for key, (path, row, _) in places.items()}
    return planned


def leaves(planned, specs):
    """What the plan fills: {path: (shape, dtype, stacked)} in our layout.

    specs: {part: {key: Spec}}. Raises ValueError where layers of one stack differ in dtype, or a dtype is no float of
    at most 32 bits.
    """
    rows = {}
    for part, places in planned.items():
        for key, (path, row) in places.items():
            spec = specs[part][key]
            if spec.dtype.name not in ("float32", "float16", "bfloat16"):
                raise ValueError(f"{part}: key {key} has dtype {spec.dtype}, which is not implemented for parameters")
            rows.setdefault(path, []).append((key, spec, row))
    result = {}
    for path, group in rows.items():
        if len({spec.dtype for _, spec, _ in group}) > 1:
            raise ValueError("layers of one parameter differ in dtype: " + ", ".join(
                f"{key} {spec.dtype}" for key, spec, _ in group))
        _, spec, row = group[0]
        shape = torch_keys.to_flax_layout(np.broadcast_to(0, spec.shape), path).shape
        result[path] = (shape, spec.dtype, False) if row is None else ((len(group), *shape), spec.dtype, True)
    return result


# ------------------------------------------------------------------ there

def convert(src, dst, flux_folder=None, image_size=None):
    """A published directory -> a model folder. Returns the number of bytes of its tensors.

    The folder is `DST.partial` until it is whole. Raises ValueError or OSError with one line that says what is wrong.
    """
    source, dst = read_source(src, flux_folder, image_size), Path(dst).absolute()
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
            for file in files:
                for key, spec in file.specs.items():
                    if key in planned[part]:
                        path, row = planned[part][key]
                        if not (resumed and store.holds(path, row)):
                            store.write(path, row, torch_keys.to_flax_layout(file.read(key), path))
                    progress.update(spec.nbytes)
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
    replace_file(folder / "manifest.json", json.dumps(
        {"parts": parts, "identity": identity, "source": str(Path(src).absolute())}, indent=1))


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
        _insist_inside(name, manifest)
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
                    path, row = planned[part][key]
                    array = torch_keys.to_torch_layout(store.read(path, row), path)
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
    umm, manifest = checkpoint.read_metadata(folder), folder / "source" / "manifest.json"
    if base is None and manifest.is_file():
        base = read_json(manifest).get("source")
    states = checkpoint.Checkpoints(run)
    try:
        if (step := states.newest_whole()) is None:
            raise FileNotFoundError(f"{run} has no checkpoint yet: the run ended before its first one")
        like = jax.eval_shape(lambda params: init_trainable(params, config, jax.random.key(0)), checkpoint.shapes(umm))
        adapter = states.load(step, trainable=like)["trainable"]["adapter"]
    finally:
        states.close()
    tensors = lora.to_peft(adapter, xomni.rules(umm.ar))
    with _Whole(Path(dst).absolute()) as partial:
        write_peft(partial, tensors, config.lora.rank, config.lora.alpha, base)
    return len(tensors)


# ------------------------------------------------------------------ the command line

def main(_):
    src, dst = _SRC.value, _DST.value
    if _BASE.value and _EXPORT.value != "peft":
        raise ValueError("--base is for --export=peft")
    if _EXPORT.value and (_FLUX.value or _IMAGE_SIZE.value):
        raise ValueError("--flux and --image_size are for the way in, not for --export")
    if _EXPORT.value == "hf":
        print(f"{export_hf(src, dst) / 1e9:.3f} GB in {dst}")
    elif _EXPORT.value == "peft":
        print(f"{export_peft(src, dst, _BASE.value)} tensors in {dst}")
    else:
        print(f"{convert(src, dst, _FLUX.value, _IMAGE_SIZE.value) / 1e9:.3f} GB in {dst}")


if __name__ == "__main__":
    cli.run(main)
