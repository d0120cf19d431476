"""Draws pictures for prompts, in the folders that public evaluators read.

    python -m gvu_jax.generate --checkpoint=DIR --prompts=FILE --out=DIR [--layout=flat] [--images_per_prompt=4]

    --layout       --prompts                      writes
    flat           any                            OUT/00000_0.png .., OUT/grid.png
    geneval        evaluation_metadata.jsonl      OUT/00000/metadata.jsonl, samples/0000.png .., grid.png
    genevalpp      Geneval++.jsonl or .txt        OUT/1.jpg .., one picture a prompt, by its line in the file
    dpg            the folder of ID.txt           OUT/ID.png, four pictures in one: side by side, two above two
    t2icompbench   color_val.txt ..               OUT/samples/PROMPT_000000.png .., numbered through all prompts
    geneval2       geneval2_data.jsonl            OUT/00000.png .., one picture a prompt, and OUT/images.json, the file
                                                  of each prompt
    oneig          OneIG-Bench.csv                OUT/anime/gvu_jax/000.webp .., a folder for each category, four
                                                  pictures in one; with --prompt_key=prompt_en, or prompt_cn

as in the repositories djghosh13/geneval, yejy53/Echo-4o, TencentQQGYLab/ELLA, Karine-Huang/T2I-CompBench (whose newer
categories, T2I-CompBench++, are drawn alike), facebookresearch/GenEval2 and OneIG-Bench/OneIG-Benchmark. --prompts also
takes .json and tfds:NAME/SPLIT:FEATURE; --prompt_key=instruction or meta/prompt says where in an object the text
stands. A number is the prompt's place in the file, so that a prompt that stands there twice is drawn twice, and
differently. Given again, the command goes on where it stopped: each picture carries how it was drawn, and what is there
whole and was drawn so is not drawn again.
"""
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, PngImagePlugin

import gvu_jax
from gvu_jax import cli, hub
from gvu_jax.checkpoint import DIGEST
from gvu_jax.data import read_picture, read_prompts
from gvu_jax.metrics import Progress, replace_file, replacing
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.sampling import How

LAYOUTS = {"flat": 4, "geneval": 4, "genevalpp": 1, "dpg": 4, "t2icompbench": 10, "geneval2": 1,
           "oneig": 4}                                                                # pictures a prompt, as published
FIXED = ("genevalpp", "dpg", "geneval2", "oneig")                                     # whose evaluators take no others
ONEIG = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object", "Text_Rendering": "text",
         "Knowledge_Reasoning": "reasoning", "Multilingualism": "multilingualism"}    # its categories -> their folders
DESCRIPTION = 0x010E                                                                  # Exif's tag for a text

_CHECKPOINT = cli.path_flag("checkpoint", "A run's folder, a model folder or a name, hf:OWNER/NAME.", required=True)
_ADAPTER = cli.path_flag("adapter", "A folder of peft's (convert --export=peft) to lay over the checkpoint's model.")
_PROMPTS = cli.path_flag("prompts", ".txt (a prompt a line), .jsonl, .json or .csv (see --prompt_key), a folder of "
                         ".txt files (a prompt each), or tfds:NAME/SPLIT:FEATURE.", required=True)
_PROMPT_KEY = flags.DEFINE_string("prompt_key", "prompt", "Where a prompt stands in JSON; a/b is b in a.")
_OUT = cli.path_flag("out", "Folder for the pictures.", required=True)
_IMAGES = flags.DEFINE_integer("images_per_prompt", None, "Pictures of each prompt; the layout's own unless given.",
                               lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", gvu_jax.BATCH, "Prompts drawn at a time: fewer where memory is short, the same "
                              "pictures.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same pictures.", 0, 2**31 - 1)
_LAYOUT = flags.DEFINE_enum("layout", "flat", list(LAYOUTS), "How the files are named.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Drops tokens less probable than this share of the likeliest one's.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keeps the k most probable tokens; 0 keeps all.")
_STEPS = flags.DEFINE_integer("diffusion_steps", None, "Steps of X-Omni's diffusion decoder; without it, as many as "
                              "the model's or the run's.", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance scale; 1 is none. Without it, what the "
                               "model was published with.")


def main(_):
    metas, layout = read_prompts(_PROMPTS.value, _PROMPT_KEY.value), _LAYOUT.value
    count = _IMAGES.value or LAYOUTS[layout]
    if layout in FIXED and count != LAYOUTS[layout]:
        raise ValueError(f"--layout={layout} has {LAYOUTS[layout]} pictures a prompt, not {count}")
    how = How(temperature=_TEMPERATURE.value, min_p=_MIN_P.value, top_k=_TOP_K.value,
              **({} if _GUIDANCE.value is None else {"guidance": _GUIDANCE.value}))
    out, prompts = Path(_OUT.value), [meta["prompt"] for meta in metas]
    if layout == "geneval":
        check_geneval(metas)
    if layout == "geneval2" and len(set(prompts)) < len(prompts):
        raise ValueError("--layout=geneval2 finds a picture by the text of its prompt, and some stand there twice")
    files = [name_files(layout, out, i, meta, count) for i, meta in enumerate(metas)]
    check_folder(layout, out, files)
    cli.keep_compiled()
    given = {"diffusion_steps": _STEPS.value, "adapter": _ADAPTER.value}
    folder = hub.model_folder(_CHECKPOINT.value)
    out.mkdir(parents=True, exist_ok=True)                              # which may fail, so before the work
    model = gvu_jax.load(folder, **{name: value for name, value in given.items() if value})
    if _GUIDANCE.value is None:
        how = dataclasses.replace(how, guidance=model.umm.guidance)
    origin = {"model": identify(folder, model.step), "step": model.step, "seed": _SEED.value,
              **({"adapter": identify(Path(_ADAPTER.value))} if _ADAPTER.value else {}),
              "diffusion_steps": getattr(model.umm, "diffusion_steps", None),
              **{name: value for name, value in dataclasses.asdict(how).items()
                 if name not in ("images_per_prompt", "logps")}}
    records = [json.dumps({"prompt": prompt, **origin}) for prompt in prompts]
    places = [i for i in range(len(metas)) if not all(is_drawn(file, records[i]) for file in files[i])]
    if layout == "geneval":
        for row, meta in zip(files, metas):                             # of what is drawn already, too
            row[0].parent.mkdir(parents=True, exist_ok=True)
            replace_file(row[0].parent.parent / "metadata.jsonl", json.dumps(meta) + "\n")
    if layout == "geneval2":
        named = {prompt: str(row[0].resolve()) for prompt, row in zip(prompts, files)}
        replace_file(out / "images.json", json.dumps(named, indent=1))
    with Progress(len(metas), "prompt", "drawing", done=len(metas) - len(places)) as progress:
        for batch in model.draw(prompts, _SEED.value, count, how, batch=_BATCH.value, places=places):
            for i, pictures in zip(places, batch):                      # each is on disk before the next batch begins
                write(files[i], pictures, records[i], layout)
            places = places[len(batch):]
            progress.update(len(batch))
    if layout == "flat":
        shown = np.stack([[read_picture(file) for file in row] for row in files[:12]])
        write_picture(out / "grid.png", image_grid(shown, prompts[:12], max(1, 96 // shown.shape[2])))
    print(f"{len(metas) * count} pictures of {len(metas)} prompts in {out}")


def name_files(layout, out, i, meta, count):
    """The picture files of prompt number i. ValueError where the prompt cannot be named as the layout wants it."""
    if layout == "flat":
        return [out / f"{i:05d}_{j}.png" for j in range(count)]
    if layout == "geneval":
        return [out / f"{i:05d}" / "samples" / f"{j:04d}.png" for j in range(count)]
    if layout == "genevalpp":
        return [out / f"{i + 1}.jpg"]
    if layout == "geneval2":
        return [out / f"{i:05d}.png"]
    if layout == "oneig":
        folder, name = ONEIG.get(meta.get("category")), str(meta.get("id"))
        if folder is None or not is_name(f"{name}.webp"):
            raise ValueError(f"--layout=oneig puts pictures into folders by category, and prompt {i} has the category "
                             f"{meta.get('category')!r:.40} and the id {name!r:.40}: give OneIG-Bench.csv as --prompts")
        return [out / folder / "gvu_jax" / f"{name}.webp"]
    if layout == "dpg":
        if not isinstance(meta.get("id"), str) or not is_name(f"{meta['id']}.png"):
            raise ValueError(f"--layout=dpg names pictures after prompts, and prompt {i} has the \"id\" "
                             f"{meta.get('id')!r:.40}: give DPG-Bench's folder of ID.txt as --prompts, or a .jsonl "
                             f"with an \"id\" that is a file's name")
        return [out / f"{meta['id']}.png"]
    names = [f"{meta['prompt']}_{i * count + j:06d}.png" for j in range(count)]
    if "_" in meta["prompt"] or not is_name(names[-1]):
        raise ValueError(f"--layout=t2icompbench names pictures after prompts, which {meta['prompt'][:40]!r} does not "
                         f"allow: it is too long, begins with a dot, or holds _ or /")
    return [out / "samples" / name for name in names]


def is_name(text):
    """Whether a file of a folder may have this name: one that stays there, is not hidden, and leaves room for .tmp."""
    return not (text.startswith(".") or "/" in text or "\0" in text or len(text.encode()) > 251)


def check_geneval(metas):
    """Raises ValueError for prompts that GenEval's evaluator could not grade: it reads a "tag" and, in "include" and
    "exclude", objects by "class" and "count", of which "position" names one before."""
    def graded(meta):
        wanted = meta.get("include"), meta.get("exclude", [])
        if not meta.get("tag") or not all(isinstance(objects, list) for objects in wanted):
            return False
        whole = all(isinstance(one, dict) and isinstance(one.get("class"), str) and type(one.get("count")) is int
                    for objects in wanted for one in objects)
        places = [(i, one["position"]) for i, one in enumerate(wanted[0]) if whole and one.get("position") is not None]
        return whole and all(isinstance(at, list) and len(at) == 2 and at[1] in range(i) for i, at in places)

    wrong = [i for i, meta in enumerate(metas) if not graded(meta)]
    if wrong:
        raise ValueError(f"--layout=geneval is graded by what each prompt carries, a \"tag\" and an \"include\" of "
                         f"objects with \"class\" and \"count\", and {len(wrong)} of {len(metas)} prompts lack it, the "
                         f"first {metas[wrong[0]]['prompt'][:40]!r}: give GenEval's evaluation_metadata.jsonl as "
                         f"--prompts, or take --layout=flat")


def check_folder(layout, out, files):
    """ValueError where two pictures would be one file, or where `out` holds pictures of something else, which the
    layout's evaluator would grade with these: they take whatever lies there."""
    expected = [file for row in files for file in row]
    if len(set(expected)) < len(expected):
        twice = next(file for i, file in enumerate(expected) if file in expected[:i])
        raise ValueError(f"two prompts would be drawn into {twice}: give each an \"id\" of its own")
    if layout != "flat":
        strays = sorted({file for kind in ("*.png", "*.jpg", "*.webp") for file in out.rglob(kind)
                         if file.name != "grid.png"} - set(expected))
        if strays:
            raise ValueError(f"{strays[0]}, one of {len(strays)}, is no picture of these prompts and would be graded "
                             f"with them: remove {'it' if len(strays) == 1 else 'them'}, or choose another --out")


def identify(checkpoint, step=None):
    """The name of a model or an adapter and what its files are: a name alone may have been another one's."""
    told = [checkpoint / DIGEST, checkpoint / "source" / "manifest.json", checkpoint / "base" / DIGEST,
            checkpoint / "checkpoints" / str(step) / DIGEST, checkpoint / "adapter_config.json",
            checkpoint / "adapter_model.safetensors"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in told if path.exists()))
    return f"{checkpoint.resolve().name} {digest.hexdigest()[:16]}"


def is_drawn(file, record):
    """Whether the file is a whole picture that carries this record."""
    try:
        read_picture(file)                                              # decodes all of it
    except (FileNotFoundError, ValueError):
        return False
    with Image.open(file) as picture:
        said = picture.info.get("gvu_jax") or picture.info.get("comment") or picture.getexif().get(DESCRIPTION)
    return said in (record, record.encode())


def write(files, pictures, record, layout):
    """Pictures uint8 [G, H, W, 3] of one prompt into its files, and before them what its layout wants beside them."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    if layout == "geneval":
        write_picture(files[0].parent.parent / "grid.png", image_grid(pictures[None]))
    if layout in ("dpg", "oneig"):
        pictures = np.concatenate(np.concatenate(pictures.reshape(2, 2, *pictures.shape[1:]), axis=1), axis=1)[None]
    for file, picture in zip(files, pictures):
        with replacing(file) as temporary:
            if file.suffix == ".jpg":
                Image.fromarray(picture).save(temporary, "JPEG", quality=95, comment=record)
            elif file.suffix == ".webp":
                carried = Image.Exif()
                carried[DESCRIPTION] = record
                Image.fromarray(picture).save(temporary, "WEBP", lossless=True, exif=carried)
            else:
                carried = PngImagePlugin.PngInfo()
                carried.add_text("gvu_jax", record)
                Image.fromarray(picture).save(temporary, "PNG", pnginfo=carried)


if __name__ == "__main__":
    cli.run(main)
