"""Prompts: read from files, streamed in an order that is a pure function of the seed and the step. Pictures and
multiple-choice questions about them: read."""
import base64
import binascii
import csv
import functools
import io
import json
import math
import string
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
from PIL import Image, ImageOps

from gvu_jax import cli


def read_prompts(source):
    """Prompts from where they stand -> list of dicts with the key "prompt", in a fixed order.

    FILE.txt                               one prompt a line
    FILE.jsonl                             objects with a "prompt" (GenEval's metadata; its "tag" names the category)
    FOLDER                                 each ID.txt in it holds one prompt (DPG-Bench): {"id": ID, "prompt": ..}
    tfds:NAME/SPLIT:FEATURE                a text feature of a dataset of TensorFlow Datasets, e.g.
                                           tfds:coco_captions/val[:100]:caption; a/b is feature b in feature a

    Files are UTF-8, with or without a byte order mark. Blank lines are skipped; a prompt that stands there twice counts
    twice. Raises FileNotFoundError, or ValueError naming the file and line that is wrong.
    """
    path = cli.path(source)
    if str(source).startswith("tfds:"):
        metas = [(f"{source}, record {i}", {"prompt": text}) for i, text in enumerate(read_tfds(str(source)))]
    elif path.is_dir():
        texts = {file: read_text(file).strip() for file in sorted(path.glob("*.txt"))}
        metas = [(file, {"id": file.stem, "prompt": " ".join(text.split("\n"))}) for file, text in texts.items()]
    elif not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    elif path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt (one prompt a line) nor .jsonl (objects with a \"prompt\" key)")
    else:
        lines = enumerate(read_text(path).split("\n"), 1)        # splitlines() would also cut JSON at a raw U+2028
        lines = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
        metas = [(place, {"prompt": line} if path.suffix == ".txt" else parse(place, line)) for place, line in lines]
    for place, meta in metas:
        check_prompt(place, meta)
    if not metas:
        raise ValueError(f"{source} holds no prompts")
    return [meta for _, meta in metas]


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def parse(place, line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def check_prompt(place, meta):
    """Raises ValueError, naming the place, for what is no dict with a "prompt" (and a "tag", where there is one)."""
    prompt, tag = (meta.get("prompt"), meta.get("tag", "")) if isinstance(meta, dict) else (None, "")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} has no \"prompt\", which is a text of at least one word")
    if not isinstance(tag, str):
        raise ValueError(f"{place} has the \"tag\" {tag!r}, which is no text")
    if tag in ("overall", "reward"):
        raise ValueError(f"{place} has the \"tag\" {tag!r}, which is what results are called that are of no tag")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt + tag):
        raise ValueError(f"{place} holds NUL or half a character (is the file UTF-16?)")


def read_tfds(source):
    """The texts of tfds:NAME/SPLIT:FEATURE, read record by record without TensorFlow; downloaded where needed."""
    address, _, feature = source.removeprefix("tfds:").rpartition(":")
    name, _, split = address.rpartition("/")
    if not (name and split and feature):
        raise ValueError(f"{source} is not of the form tfds:NAME/SPLIT:FEATURE, e.g. tfds:coco_captions/val:caption")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"{source} needs TensorFlow Datasets ({error}): pip install 'gvu_jax[tfds]'") from error
    try:
        records = tfds.data_source(name, split=split)
    except (ValueError, AssertionError, NotImplementedError) as error:  # an unknown name or split; files that are not
                                                                        # there; a format that cannot be read by record
        said = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{source} cannot be read: {said[0]}") from error
    texts = []
    for record in records:
        for key in feature.split("/"):
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"{source}: a record has no feature {key!r}")
            record = record[key]
        if not isinstance(record, (bytes, str)):
            raise ValueError(f"{source}: the feature is no text but a {type(record).__name__}")
        texts.append(record.decode() if isinstance(record, bytes) else record)
    return texts


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture file {path}")
    return decode_picture(path, path)


def decode_picture(source, name):
    """As `read_picture`, of a path or an open file; errors call it `name`."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=FORMATS) as file:
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
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def read_choices(path):
    """Multiple-choice questions about pictures, in the TSV format of VLMEvalKit (MMT-Bench, MMBench, SEED-Bench ..).

    Columns: index; image, the base64 of a picture file, or the index of the row whose picture it is; question; hint
    (optional); options A, B, C .. of which a row may leave some empty; answer, one of these letters; category
    (optional). Returns a list of dicts: "name" (what to call it in errors), "image" (base64), "question", "options"
    (2 texts or more), "answer" (an index into them), "category". `decode_choice` makes the picture of one.

    Raises FileNotFoundError, or ValueError naming the file and the row that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no TSV file {path}")
    limit = csv.field_size_limit(2 ** 31 - 1)                                        # a picture is one field
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    except csv.Error as error:
        raise ValueError(f"{path} is no TSV file: {error}") from error
    finally:
        csv.field_size_limit(limit)
    missing = {"index", "image", "question", "A", "B", "answer"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path} has no rows, or no column {', '.join(sorted(missing))}: it should be a TSV file of "
                         f"VLMEvalKit with multiple-choice questions")
    images, choices = {row["index"]: row["image"] or "" for row in rows}, []
    for row in rows:
        name = f"{path}, index {row['index']}"
        image = images.get(row["image"], row["image"])                               # another row's, or its own
        letters = [letter for letter in string.ascii_uppercase if (row.get(letter) or "").strip()]
        answer = (row["answer"] or "").strip()
        if not (row["question"] or "").strip() or len(letters) < 2 or answer not in letters or not image:
            raise ValueError(f"{name} needs a question, a picture, two options or more, and one of their letters as "
                             f"the answer, which is {answer!r}")
        question = "\n".join(text.strip() for text in (row.get("hint"), row["question"]) if (text or "").strip())
        choices.append({"name": name, "image": image, "question": question, "answer": letters.index(answer),
                        "options": [row[letter].strip() for letter in letters],
                        "category": (row.get("category") or "").strip() or "all"})
    return choices


def decode_choice(choice):
    """The picture of one of `read_choices`, as `read_picture` returns it. Raises ValueError where it is none."""
    try:
        file = io.BytesIO(base64.b64decode(choice["image"], validate=True))
    except binascii.Error as error:
        raise ValueError(f"{choice['name']}: the image is not one base64 text ({error}); rows of several pictures are "
                         f"not supported") from error
    return decode_picture(file, choice["name"])


def picture_files(folder):
    """The pictures of a folder, sorted. FileNotFoundError where there is no such folder, ValueError where it has none."""
    folder = cli.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return paths


def check_pictures(folder):
    """Raises ValueError, naming every one, where pictures of a folder, or the texts beside them, cannot be read: before
    a run that takes them in turn, and not when their turn comes. Also what `picture_files` raises."""
    def read(path):
        read_picture(path)
        if (caption := path.with_suffix(".txt")).exists():
            read_text(caption)

    paths = picture_files(folder)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:          # reading one changes how all threads warn
        refuse("pictures", folder, len(paths), pool.map(functools.partial(refusal, read), paths))


def check_captions(folder, encode):
    """Raises ValueError, naming every one, where pictures of a folder have no ID.txt beside ID.png, or one of which
    encode([text]) raises ValueError: before a run that needs all captions, and not when their turn comes."""
    def read(caption):
        if not caption.exists():
            raise ValueError(f"there is no {caption}")
        try:
            encode([read_text(caption).strip()])
        except ValueError as error:
            raise ValueError(f"{caption} is no caption of at most uae.words tokens: {error}") from error

    captions = [path.with_suffix(".txt") for path in picture_files(folder)]
    refuse("captions", folder, len(captions), map(functools.partial(refusal, read), captions),
           ": write it, or set uae.cold=0 (the cold start needs one beside each picture)")


def refusal(read, path):
    """Why read(path) refuses a file, in one line, or None."""
    try:
        read(path)
    except (OSError, ValueError) as error:
        return str(error)


def refuse(what, folder, count, refusals, advice=""):
    """Raises ValueError with all refusals among those of `count` files (None: it is well), where there are any."""
    if told := [refusal for refusal in refusals if refusal]:
        raise ValueError(f"{len(told)} of the {count} {what} in {folder} cannot be used: {'; '.join(told)}{advice}")


def picture_stream(folder, size, seed):
    """The pictures of a folder in a shuffled, endless grain dataset, as `prompt_stream`'s: dicts of "pixels" [H, W, 3]
    float32 in [0, 1], cut at the sides and resized to `size` (height, width), and "prompt", what the file ID.txt beside
    ID.png says, or None.

    Raises what `picture_files` raises; a picture that cannot be read raises `read_picture`'s when its turn comes, so
    `check_pictures` first.
    """
    def example(path):
        fitted = ImageOps.fit(Image.fromarray(read_picture(path)), size[::-1], Image.Resampling.BICUBIC)
        caption = path.with_suffix(".txt")
        return {"pixels": np.asarray(fitted, np.float32) / 255,
                "prompt": read_text(caption).strip() if caption.exists() else None}
    return grain.MapDataset.source(picture_files(folder)).seed(seed).shuffle().repeat().map(example)
