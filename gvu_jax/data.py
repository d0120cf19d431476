"""Prompts: read from files, streamed in an order that is a pure function of the seed and the step. Pictures: read."""
import json
from pathlib import Path

import grain
import numpy as np
from PIL import Image, ImageOps


def read_prompts(path):
    """A .txt file (one prompt a line) or .jsonl (objects with a "prompt" key, GenEval's metadata) -> list of dicts.

    Blank lines are skipped. Raises FileNotFoundError, or ValueError naming the file and line that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt (one prompt a line) nor .jsonl (objects with a \"prompt\" key)")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    metas = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            meta = {"prompt": line.strip()} if path.suffix == ".txt" else json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(meta, dict) or not str(meta.get("prompt", "")).strip():
            raise ValueError(f"{path}, line {number} has no \"prompt\"")
        metas.append(meta)
    if not metas:
        raise ValueError(f"{path} holds no prompts")
    return metas


def prompt_stream(metas, seed):
    """An endless shuffled grain dataset; element i depends only on the seed and i, so resuming needs no state.

    Where prompts carry a "tag" (GenEval's category), the tags take turns, so that each batch holds them evenly.
    """
    tags = sorted({meta.get("tag", "") for meta in metas})
    parts = [grain.MapDataset.source([meta for meta in metas if meta.get("tag", "") == tag])
             .seed(seed + i).shuffle().repeat() for i, tag in enumerate(tags)]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts)


def batch(stream, step, size):
    """The prompts of one step: a list of `size` dicts."""
    return [stream[step * size + i] for i in range(size)]


def read_picture(path):
    """Any file that PIL opens -> uint8 [H, W, 3], as a viewer shows it: turned as EXIF says, transparency over white.

    Takes the first frame of an animation and the upper 8 bits of 16-bit grey. Raises FileNotFoundError where there is
    no such file, ValueError where it is no picture or a broken one; both name it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture file {path}")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):                # 16-bit grey, which PIL would cut off at 255
            picture = Image.fromarray((np.clip(np.asarray(picture), 0, 2**16 - 1) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.asarray(picture.convert("RGB"))
    except Exception as error:                          # PIL's readers let every kind of exception out of a broken file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
