"""Prompts: read from files, streamed in an order that is a pure function of the seed and the step. Pictures and
multiple-choice questions about them: read."""
import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import string
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
from PIL import Image, ImageOps

from gvu_jax import cli
from gvu_jax.decode import decode_picture, from_base64, read_picture, read_text



def read_prompts(source, key="prompt"):
    """Prompts from where they stand -> list of dicts with the key "prompt", in a fixed order.

    FILE.txt                               one prompt a line
    FILE.jsonl                             an object a line (GenEval's metadata; its "tag" names the category)
    FILE.json                              an array of objects or of texts, or one object
    FILE.csv                               a table with a line of names (OneIG-Bench's; `key` is a column)
    FOLDER                                 each ID.txt in it holds one prompt (DPG-Bench): {"id": ID, "prompt": ..}
    tfds:NAME/SPLIT:FEATURE                a text feature of a dataset of TensorFlow Datasets, e.g.
                                           tfds:coco_captions/val[:100]:captions/text

    `key` says where the text stands in an object: a/b is b in a. FEATURE is such a key. Where a list stands there, each
    entry is a prompt. What an object holds besides is kept in the dict.

    Files are text as `read_text` reads it. Blank lines are skipped; a prompt that stands there twice counts twice; in a
    folder only what `list_files` names is read. Raises FileNotFoundError, or ValueError naming the file and line that
    is wrong, and the keys that are there.
    """
    path = cli.path(source)
    if not key:
        raise ValueError("the key of a prompt is empty: leave out --prompt_key, or name one")
    if str(source).startswith("tfds:"):
        metas = [(f"{source}, record {i}", {"prompt": text}) for i, text in enumerate(read_tfds(str(source)))]
    elif path.is_dir():
        texts = {file: read_text(file).strip() for file in list_files(path, (".txt",))}
        metas = [(file, {"id": file.stem, "prompt": " ".join(text.split("\n"))}) for file, text in texts.items()]
    elif not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}")
    elif path.suffix not in (".txt", ".jsonl", ".json", ".csv"):
        raise ValueError(f"{path} is neither .txt (one prompt a line) nor .jsonl or .json (objects with a \"prompt\" "
                         f"key), nor .csv")
    elif path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
        filled = ((number, row) for number, row in enumerate(rows, 1) if any(
            cell and str(cell).strip() for cell in row.values()))
        metas = [(place, meta) for number, row in filled
                 for place in [f"{path}, row {number}"] for meta in metas_of(place, row, key)]
    else:
        lines = enumerate(read_text(path).split("\n"), 1)        # splitlines() would also cut JSON at a raw U+2028
        lines = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
        if path.suffix == ".txt" or not lines:
            metas = [(place, {"prompt": line}) for place, line in lines]
        else:
            metas = [(place, meta) for place, record in records_of(lines) for meta in metas_of(place, record, key)]
    for place, meta in metas:
        check_prompt(place, meta)
    if not metas:
        raise ValueError(f"{source} holds no prompts")
    return [meta for _, meta in metas]


def records_of(lines):
    """The records of JSON, (place, value) each; lines: (place, text). Either each line is a value, or all together are
    one. Of an array each entry is a record, and a text in it stands for {"prompt": text}."""
    try:
        json.loads(lines[0][1])
    except (ValueError, RecursionError):                                # not line by line, then
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(whole := "\n".join(line for _, line in lines))
            lines = [(lines[0][0].rpartition(", line")[0], whole)]
    for place, line in lines:
        value = parse(place, line)
        if isinstance(value, list):
            yield from ((f"{place}, entry {i}", {"prompt": entry} if isinstance(entry, str) else entry)
                        for i, entry in enumerate(value, 1))
        else:
            yield place, value


def parse(place, line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def metas_of(place, record, key):
    """The prompts of one record: dicts of what it holds and of what stands beside the text, with the text as "prompt".
    Raises ValueError naming the place and the keys that are there."""
    if not isinstance(record, dict):
        raise ValueError(f"{place} has no \"{key}\": it is no object but {json.dumps(record)[:40]}")
    try:
        found = list(find(record, key))
    except KeyError:
        found = []
    if len(found) == 1:
        return [{**record, **found[0][0], "prompt": found[0][1]}]
    if not found:
        keys = ", ".join(f'"{there}"' for there in itertools.islice(keys_of(record), 12)) or "nothing"
        raise ValueError(f"{place} has no \"{key}\", which is a text of at least one word. There is {keys}: name one "
                         f"with --prompt_key, in training with --config.data.prompt_key")
    return [{**{name: x for name, x in beside.items() if not isinstance(x, (list, dict))}, "prompt": text}
            for beside, text in found]


def find(record, key, beside=None):
    """What stands at `key` in a record of dicts and lists: pairs of (the dict it stands in, the value), of a list those
    of each entry. The name of a key may itself hold slashes. Raises KeyError with the part that is not there."""
    if isinstance(record, (list, tuple, np.ndarray)):
        for entry in record:
            yield from find(entry, key, beside)
    elif not key:
        yield beside, record
    else:
        parts = key.split("/")
        for i in range(len(parts), 0, -1):
            if isinstance(record, dict) and (name := "/".join(parts[:i])) in record:
                yield from find(record[name], "/".join(parts[i:]), record)
                return
        raise KeyError(key)


def keys_of(record, before=""):
    """The keys of a record as `find` takes them."""
    for name, value in record.items():
        yield f"{before}{name}"
        entry = value[0] if isinstance(value, list) and value else value
        if isinstance(entry, dict):
            yield from keys_of(entry, f"{before}{name}/")


def check_prompt(place, meta):
    """Raises ValueError, naming the place, for a dict whose "prompt" is no text, or whose "tag" (if any) is none."""
    prompt, tag = meta["prompt"], meta.get("tag", "")
    if not isinstance(prompt, str) or not prompt.strip() or prompt.strip() in NOTHING:
        raise ValueError(f"{place} has no \"prompt\", which is a text of at least one word, but {str(prompt)[:40]!r}")
    if not isinstance(tag, str):
        raise ValueError(f"{place} has the \"tag\" {tag!r}, which is no text")
    if tag in ("overall", "reward", "exact", "objects", "haze"):
        raise ValueError(f"{place} has the \"tag\" {tag!r}, which is what results are called that are of no tag")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in prompt + tag):
        raise ValueError(f"{place} holds NUL or half a character (is the file UTF-16?)")


def read_tfds(source):
    """The texts of tfds:NAME/SPLIT:FEATURE, read record by record without TensorFlow; downloaded where needed."""
    address, _, feature = source.removeprefix("tfds:").rpartition(":")
    name, _, split = address.rpartition("/")
    if not (name and split and feature):
        raise ValueError(f"{source} is not of the form tfds:NAME/SPLIT:FEATURE, e.g. "
                         f"tfds:coco_captions/val:captions/text")
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
        try:
            found = [value for _, value in find(record, feature)]
        except KeyError as error:
            keys = ", ".join(itertools.islice(keys_of(record), 12)) if isinstance(record, dict) else "no dict"
            raise ValueError(f"{source}: a record has no feature {error}. There is {keys}") from error
        for text in found:
            if not isinstance(text, (bytes, str)):
                raise ValueError(f"{source}: the feature is no text but a {type(text).__name__}")
            texts.append(text.decode(errors="replace") if isinstance(text, bytes) else text)
    return texts


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
NOT_MEANT = re.compile(r"[.~#].*|(readme.*|licen[cs]e|copying|notice|changelog|requirements)\.txt", re.IGNORECASE)


def list_files(folder, suffixes):
    """The files of a folder with one of these endings (lower case), sorted: not those that systems and editors leave
    there (hidden ones as ._x, .#x and .x.swp; ~$x, #x#), and no README.txt or LICENSE.txt."""
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes
                  and not NOT_MEANT.fullmatch(path.name) and path.is_file())


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


# What programs write where a table has nothing; and words that they write, but that people write too.
NOTHING = {"nan", "NaN", "NAN", "-nan", "-NaN", "<NA>", "NaT", "#N/A", "#NA", "#N/A N/A", "1.#QNAN", "-1.#QNAN",
           "1.#IND", "-1.#IND"}
PERHAPS = {"None", "none", "NONE", "null", "NULL", "Null", "NA", "N/A", "n/a", "undefined"}
ERRORS = {"#NAME?", "#VALUE!", "#REF!", "#DIV/0!", "#NULL!", "#NUM!"}           # of a spreadsheet, in place of text
USED = {"index", "image", "image_path", "question", "hint", "answer", "category", *string.ascii_uppercase}


def read_choices(path, left_out=None):
    """Multiple-choice questions about pictures, in the TSV format of VLMEvalKit (MMT-Bench, MMBench, SEED-Bench ..).

    Columns: index; image, the base64 of a picture file, or the index of the row whose picture it is; or image_path, a
    file beside the table; question; hint (optional); options A, B, C .. of which a row may leave some empty; answer,
    one of these letters; category (optional). Returns a list of dicts: "name" (what to call it in errors), "image"
    (base64, or a Path), "question", "options" (2 texts or more), "answer" (an index into them), "category".
    `decode_choice` makes the picture of one.

    A cell is empty where a program wrote that nothing is there (nan, <NA> ..); where it wrote a word (None), an option
    is one still, unless the row has the same one twice. Rows that cannot be asked are left out and counted by reason in
    `left_out`, a Counter. Raises FileNotFoundError, or ValueError naming the file of which no row is left.
    """
    path, choices, left_out = Path(path), [], collections.Counter() if left_out is None else left_out
    rows = read_table(path)
    images = {row["index"]: row.get("image", "") for row in rows if row["index"]}
    for row in rows:
        options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
        answer = row["answer"].strip(" ().:[]").upper()
        try:
            if "torn" in row:
                raise ValueError("whose cells do not fit the columns (a quote that is not closed?)")
            if ERRORS & {row["question"], row.get("hint"), *options.values()}:
                raise ValueError("with an error of a spreadsheet (#NAME?) in place of text")
            if not row["question"]:
                raise ValueError("without a question")
            if len(options) < 2:
                raise ValueError("with fewer than two options")
            if answer not in options:
                raise ValueError("without an answer that is the letter of one option")
            image = find_picture(row, images, path.parent)
        except ValueError as reason:
            left_out[str(reason)] += 1
            continue
        choices.append({"name": f"{path}, index {row['index']}", "image": image, "answer": [*options].index(answer),
                        "question": "\n".join(text for text in (row.get("hint"), row["question"]) if text),
                        "options": [*options.values()], "category": row.get("category") or "all"})
    if not choices:
        raise ValueError(f"{path} has no row that can be asked: {count_reasons(left_out) or 'it has none at all'}")
    return choices


def count_reasons(left_out):
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def read_table(path):
    """The rows of a TSV file of VLMEvalKit as dicts {column: text, "" where there is none}. Says once how many cells a
    program had filled in. Raises FileNotFoundError, or ValueError naming the file and the columns that are there."""
    if not path.is_file():
        raise FileNotFoundError(f"no TSV file {path}")
    limit = csv.field_size_limit(2 ** 31 - 1)                                        # a picture is one field
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
                          if any(map(str.strip, line))] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is no TSV file: {error}") from error
    finally:
        csv.field_size_limit(limit)
    header = [name.strip().upper() if len(name.strip()) == 1 else name.strip().lower() for name in header]
    missing = {"index", "question", "A", "B", "answer"} - set(header)
    missing |= {"image"} if not {"image", "image_path"} & set(header) else set()
    if missing:
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: it should be a TSV file of VLMEvalKit "
                         f"with multiple-choice questions. Its columns are "
                         f"{', '.join(name[:40] for name in header[:30])}")
    rows, filled, floats = [], 0, 0
    for line in lines:
        row = dict.fromkeys(header, "") | {name: cell.strip() for name, cell in zip(header, line) if name in USED}
        options = [cell for name, cell in row.items() if len(name) == 1]
        for name, cell in row.items():
            if cell in NOTHING or cell in PERHAPS and (len(name) > 1 or options.count(cell) > 1):
                row[name], filled = "", filled + 1
            elif name in ("index", "image") and re.fullmatch(r"\d+\.0+", cell):     # a column with gaps is of floats
                row[name] = cell.partition(".")[0]
        if any(map(str.strip, line[len(header):])) or any("\t" in cell and "\n" in cell for cell in row.values()):
            row["torn"] = True
        rows.append(row)
    letters = set(header) & set(string.ascii_uppercase)
    for name in letters if not all(row[name] for row in rows for name in letters) else ():      # there are gaps
        if all(re.fullmatch(r"-?\d+\.0|", row[name]) for row in rows):
            for row in rows:
                row[name], floats = row[name].removesuffix(".0"), floats + bool(row[name])
    if filled or floats:
        said = [f"{filled} cells that say nan or the like are read as empty"] * bool(filled) + [
            f"{floats} options that became floats (2.0) are whole numbers again"] * bool(floats)
        print(f"note: {path}: {'; '.join(said)}", file=sys.stderr)
    return rows


def find_picture(row, images, folder):
    """The picture of a row: its base64, or the Path of the file. images: {index: the cell "image"}. ValueError with the
    reason where there is not just one."""
    cell, seen = row.get("image", ""), set()
    while (cell := alone(cell)) in images and cell not in seen:                      # another row's
        seen.add(cell)
        cell = images[cell]
    name = cell if Path(cell[-10:]).suffix.lower() in SUFFIXES else "" if cell else alone(row.get("image_path", ""))
    if name:
        if not os.path.isfile(folder / name):                                       # of which any text may be asked
            raise ValueError("whose picture is a file that is not there")
        return folder / name
    if not cell or cell in seen:
        raise ValueError("without a picture")
    return cell


def alone(cell):
    """The text in a cell that may be a list, ['..'], of one."""
    if cell[:1] in ("[", "(") and cell[-1:] in ("]", ")"):
        quoted = [text for _, text in re.findall(r"(['\"])(.*?)\1", cell, re.DOTALL)]
        entries = quoted or re.split(r"[\s,]+", cell[1:-1].strip())
        if len(entries) != 1:
            raise ValueError("of several pictures")
        return entries[0].strip()
    if re.search(r"[\s,;](iVBORw0KGgo|/9j/4|R0lGOD|UklGR)", cell) and not cell[:5].lower() == "data:":
        raise ValueError("of several pictures")
    return cell


def decode_choice(choice):
    """The picture of one of `read_choices`, as `read_picture` returns it. Raises ValueError where it is none."""
    name, image = choice["name"], choice["image"]
    if isinstance(image, Path):
        return read_picture(image)
    try:
        return decode_picture(from_base64(alone(image)), "its image")
    except ValueError as error:
        why = "its image is cut off after 32767 characters, as spreadsheets do" if len(image) == 2 ** 15 - 1 else error
        raise ValueError(f"{name}: {why}") from error


def picture_files(folder):
    """The pictures of a folder, sorted, without the grid.png in which gvu_jax.generate shows others of them. Raises
    FileNotFoundError where there is no such folder, ValueError where it has none."""
    folder = cli.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures {folder}")
    paths = [path for path in list_files(folder, SUFFIXES) if path.name != "grid.png"]
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return paths


def drawn_pictures(folder, metas=None):
    """(prompts, pictures): pictures that were drawn for prompts, uint8 [h, w, 3], as many of each, lists of lists.

    metas None: GenEval's layout, FOLDER/00000/metadata.jsonl beside samples/0000.png and so on. Else dicts, of which
    number i has the pictures FOLDER/i_0.png, i_1.png .., or i.png alone, the numbers with as many zeros as one likes.
    Raises FileNotFoundError or ValueError that says what is missing.
    """
    folder = cli.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures {folder}")
    if metas is None:
        told = sorted(folder.glob("*/metadata.jsonl"))
        if not told:
            raise ValueError(f"{folder} is not of GenEval's layout (00000/metadata.jsonl beside samples/): give "
                             f"--prompt_file, the prompts that its pictures were drawn for")
        metas = [json.loads(read_text(file)) for file in told]
        files = [picture_files(file.parent / "samples") for file in told]
        for file, meta in zip(told, metas):
            check_prompt(file, {"prompt": None, **meta})
    else:
        numbered = collections.defaultdict(list)
        for file in picture_files(folder):
            if number := re.fullmatch(r"0*(\d+)(_\d+)?", file.stem):
                numbered[int(number[1])].append(file)
        files = [numbered[i] for i in range(len(metas))]
    counts = collections.Counter(map(len, files))
    if len(counts) > 1 or 0 in counts:
        usual = counts.most_common(1)[0][0] or max(counts)
        odd = next(i for i, of_prompt in enumerate(files) if len(of_prompt) != usual or not of_prompt)
        raise ValueError(f"{folder} has {len(files[odd])} pictures of prompt {odd} ({metas[odd]['prompt'][:40]!r}), "
                         f"and {usual} of others: draw as many of each, named by their prompt's place (00000_0.png ..)")
    return metas, [[read_picture(file) for file in of_prompt] for of_prompt in files]


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
