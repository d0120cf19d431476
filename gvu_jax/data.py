"""Prompts: read from files, streamed in an order that is a pure function of the seed and the step. Pictures: read."""
import json
import math
import warnings
from pathlib import Path

import grain
import numpy as np
from PIL import Image, ImageOps


def read_prompts(path):
    """A .txt file (one prompt a line) or .jsonl (objects with a "prompt" key, GenEval's metadata) -> list of dicts.

    UTF-8, with or without a byte order mark. Blank lines are skipped; a prompt that stands there twice counts twice.
    Raises FileNotFoundError, or ValueError naming the file and line that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt (one prompt a line) nor .jsonl (objects with a \"prompt\" key)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    metas = []
    for number, line in enumerate(text.split("\n"), 1):           # splitlines() would also cut JSON at a raw U+2028
        if not line.strip():
            continue
        try:
            meta = {"prompt": line.strip()} if path.suffix == ".txt" else json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        prompt, tag = (meta.get("prompt"), meta.get("tag", "")) if isinstance(meta, dict) else (None, "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path}, line {number} has no \"prompt\", which is a text of at least one word")
        if not isinstance(tag, str):
            raise ValueError(f"{path}, line {number} has the \"tag\" {tag!r}, which is no text")
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt + tag):
            raise ValueError(f"{path}, line {number} holds NUL or half a character (is the file UTF-16?)")
        metas.append(meta)
    if not metas:
        raise ValueError(f"{path} holds no prompts")
    return metas


def overlap(training, held_out):
    """One line on what two lists of prompts (dicts) have in common with themselves and with each other."""
    trained, held = ([" ".join(meta["prompt"].split()) for meta in metas] for metas in (training, held_out))
    known = set(trained)
    return (f"prompts: {len(trained)} to train on ({len(trained) - len(known)} repeated), {len(held)} held out "
            f"({len(held) - len(set(held))} repeated, {sum(prompt in known for prompt in held)} also trained on)")


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


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # of pictures; PIL's others run more code (EPS a program)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MOST_PIXELS = 2 ** 26                                       # of a picture; a small file may claim to hold any number


def read_picture(path):
    """A picture file of one of FORMATS -> uint8 [H, W, 3], as a viewer shows it: turned as EXIF says, transparency over
    white.

    Takes the first frame of an animation and the upper 8 bits of 16-bit grey. Raises FileNotFoundError where there is
    no such file, ValueError where it is no picture, a broken one or one of more than MOST_PIXELS; both name it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no picture file {path}")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            if math.prod(file.size) > MOST_PIXELS:
                raise ValueError(f"it has {file.width} x {file.height} pixels, more than {MOST_PIXELS}")
            picture = ImageOps.exif_transpose(file)
        if picture.mode == "F":
            raise ValueError("its pixels are floats, of which nothing says what is black and white: save 8 bits")
        if picture.mode.startswith("I"):                # 16-bit grey, which PIL would cut off at 255
            picture = Image.fromarray((np.clip(np.asarray(picture), 0, 2**16 - 1) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.asarray(picture.convert("RGB"))
    except Exception as error:                          # PIL's readers let every kind of exception out of a broken file
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def picture_stream(folder, size, seed):
    """The pictures of a folder in a shuffled, endless grain dataset, as `prompt_stream`'s: dicts with "pixels" [H, W, 3]
    float32 in [0, 1], cut at the sides and resized to `size` (height, width), and "prompt", what the file ID.txt beside
    ID.png says, or None.

    Raises FileNotFoundError where there is no such folder, ValueError where it holds no picture; a picture that cannot
    be read raises `read_picture`'s when its turn comes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")

    def example(path):
        fitted = ImageOps.fit(Image.fromarray(read_picture(path)), size[::-1], Image.Resampling.BICUBIC)
        caption = path.with_suffix(".txt")
        return {"pixels": np.asarray(fitted, np.float32) / 255,
                "prompt": caption.read_text(encoding="utf-8-sig").strip() if caption.exists() else None}
    return grain.MapDataset.source(paths).seed(seed).shuffle().repeat().map(example)
