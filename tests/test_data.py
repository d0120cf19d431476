"""Prompt files and the stream; picture files."""
import contextlib
import io
import json
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gvu_jax import data
from test_decode import some


@pytest.mark.parametrize("name, content, word", [
    ("p.txt", b"\n \n", "no prompts"), ("p.tsv", b"a\n", "neither"), ("p.txt", b"\xff\xfe\x00", "UTF-8"),
    ("p.csv", b"a\nb\n", "row 1 has no"), ("p.csv", b"prompt,b\na,1\n , \nnan,2\n", "row 3 has no .* 'nan'"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"), ("p.jsonl", b'{"prompt": "a"}\n{oops\n', "line 2"),
    ("p.jsonl", b'"a"\n', "line 1"), ("p.jsonl", b'{"prompt": " "}\n', "line 1")])
def test_a_bad_file_is_refused_with_the_place(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=word):
        data.read_prompts(tmp_path / name)


def test_both_formats(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog  \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "tag": "single_object"}\n')
    assert data.read_prompts(tmp_path / "p.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert data.read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a cat", "tag": "single_object"}]
    with pytest.raises(FileNotFoundError, match="q.txt"):
        data.read_prompts(tmp_path / "q.txt")


def test_a_folder_holds_a_prompt_in_each_file(tmp_path):
    """DPG-Bench's: the file's name is the prompt's id."""
    (tmp_path / "midjourney32.txt").write_text("A tall house\nby the sea.\n")
    (tmp_path / "COCOval2014000000000241.txt").write_text("\ufeffA dog")
    (tmp_path / "notes.md").write_text("no prompt")
    assert data.read_prompts(tmp_path) == [{"id": "COCOval2014000000000241", "prompt": "A dog"},
                                           {"id": "midjourney32", "prompt": "A tall house by the sea."}]
    (tmp_path / "partiprompts7.txt").write_text(" ")
    with pytest.raises(ValueError, match="partiprompts7.txt has no"):
        data.read_prompts(tmp_path)


def test_files_that_nobody_meant_are_not_read(tmp_path):
    """What systems, editors and archives leave beside prompts and pictures; none of it is text or a picture."""
    strays = (".DS_Store", "Thumbs.db", "desktop.ini", "._a", ".#a", "#a", "~$a", ".a")
    for kind in (".txt", ".png"):
        named = [name + kind for name in strays[3:8]] + [f"a{kind}~", f"#a{kind}#", f".a{kind}.swp"]
        for name in [*strays[:3], *named]:
            (tmp_path / name).write_bytes(b"\xff\0")
        for name in ("__MACOSX", ".ipynb_checkpoints", f"folder{kind}"):
            (tmp_path / name).mkdir(exist_ok=True)
    for name in ("README.txt", "readme.TXT", "LICENSE.txt", "README.md"):
        (tmp_path / name).write_text("About these files.")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.TXT").write_text("a dog")
    (tmp_path / "license.png").write_bytes(b"")
    (tmp_path / "grid.png").write_bytes(b"")                                         # gvu_jax.generate's, of the others
    assert data.read_prompts(tmp_path) == [{"id": "a", "prompt": "a cat"}, {"id": "b", "prompt": "a dog"}]
    assert [path.name for path in data.picture_files(tmp_path)] == ["license.png"]
    (tmp_path / "license.png").unlink()
    with pytest.raises(ValueError, match="holds no pictures"):
        data.picture_files(tmp_path)


@pytest.mark.parametrize("name, text, key, prompts", [
    ("p.jsonl", '{"instruction": "a cat"}\n{"instruction": "a dog"}', "instruction", ["a cat", "a dog"]),
    ("p.jsonl", '{"type": "x", "short_description": "a cat"}', "short_description", ["a cat"]),
    ("p.jsonl", '{"id": 3, "meta": {"prompt": "a cat", "tag": "one"}}', "meta/prompt", ["a cat"]),
    ("p.jsonl", '{"a/b": {"c/d": "a cat"}}', "a/b/c/d", ["a cat"]),
    ("p.jsonl", '{"captions": [{"text": "a cat"}, {"text": "a dog"}]}', "captions/text", ["a cat", "a dog"]),
    ("p.json", '["a cat", "a dog"]', "prompt", ["a cat", "a dog"]),
    ("p.json", '[\n {"prompt": "a cat"},\n {"prompt": "a dog"}\n]', "prompt", ["a cat", "a dog"]),
    ("p.json", '{"version": 1,\n "prompts": ["a cat", "a dog"]}', "prompts", ["a cat", "a dog"]),
    ("p.json", '{"data": [{"p": "a cat"}, {"p": "a dog"}]}', "data/p", ["a cat", "a dog"]),
    ("p.json", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "prompt", ["a cat", "a dog"]),
    ("p.jsonl", '[{"prompt": "a cat"}]', "prompt", ["a cat"])])
def test_prompts_under_the_names_that_files_use(tmp_path, name, text, key, prompts):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
        metas = data.read_prompts(tmp_path / name, key)
        assert [meta["prompt"] for meta in metas] == prompts
    if "tag" in text:
        assert metas[0]["tag"] == "one" and metas[0]["id"] == 3, "what stands beside the prompt, and around it"


@pytest.mark.parametrize("name, text, words", [
    ("p.jsonl", '{"prompt": "a"}\n{"instruction": "a cat", "meta": {"tag": 1}}',
     'line 2 has no "prompt", .*There is "instruction", "meta", "meta/tag": .*--prompt_key'),
    ("p.json", '[{"prompt": "a"}, {"text": "b"}]', 'entry 2 has no "prompt", .*There is "text"'),
    ("p.json", '[{"prompt": "a"}, 5]', 'entry 2 has no "prompt": it is no object but 5'),
    ("p.jsonl", '{"prompt": []}', 'line 1 has no "prompt"'), ("p.jsonl", "{}", "There is nothing"),
    ("p.json", '[{"prompt": "a"},', "is not JSON")])
def test_the_keys_that_are_there_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        data.read_prompts(tmp_path / name)


def test_rows_of_nothing_are_blank_and_an_empty_key_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,tag\na cat,x\n,\n , \na dog,x\n")
    assert [meta["prompt"] for meta in data.read_prompts(tmp_path / "p.csv")] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="key of a prompt is empty"):
        data.read_prompts(tmp_path / "p.csv", "")


KEY = st.text("ab/", min_size=1, max_size=3)
TREE = st.recursive(st.text("xyz", min_size=1, max_size=3),
                    lambda inner: st.dictionaries(KEY, inner, min_size=1, max_size=3)
                    | st.lists(inner, min_size=1, max_size=3), max_leaves=8)


@some
@given(tree=st.dictionaries(KEY, TREE, min_size=1, max_size=3))
def test_every_key_that_an_error_names_leads_somewhere(tree):
    """Whatever the names are; a longer name goes before a path of the same spelling."""
    flat = lambda value: [x for entry in value for x in flat(entry)] if isinstance(value, list) else [value]
    for key in data.keys_of(tree):
        with contextlib.suppress(KeyError):                             # of a list whose entries differ
            assert list(data.find(tree, key))
    for name, value in tree.items():
        assert [(id(beside), found) for beside, found in data.find(tree, name)] == [(id(tree), x) for x in flat(value)]


@some
@given(prompts=st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")).filter(str.strip),
                        min_size=1, max_size=5), indent=st.sampled_from([None, 1]), key=KEY, where=st.sampled_from(
    [".json", ".jsonl"]), mark=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_any_array_of_prompts_is_read(tmp_path_factory, prompts, indent, key, where, mark):
    path = tmp_path_factory.mktemp("prompts") / f"p{where}"
    path.write_bytes(json.dumps([{key: prompt} for prompt in prompts], indent=indent, ensure_ascii=False).encode(mark))
    assert [meta["prompt"] for meta in data.read_prompts(path, key)] == prompts


def test_prompts_of_tensorflow_datasets(monkeypatch):
    """The module is a stand-in here: names, splits and records are as tensorflow_datasets 4.9 takes and gives them."""
    def data_source(name, split):
        if name != "captions/long:1.0.0":
            raise ValueError(f"Dataset {name} not found.\nAvailable datasets:\n...")
        captions = {"id": [1, 2], "text": [b"a cat", b"cats"]}                 # as coco_captions has them
        records = [{"text": {"en": b"a cat"}, "id": 1, "captions": captions, "a/b": b"x"},
                   {"text": {"en": "a bl\u00e5 dog".encode()}, "id": 2, "captions": {"id": [], "text": []},
                    "a/b": b"y"}]
        return records[:int(split.removeprefix("train[:").removesuffix("]"))]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow_datasets", types.SimpleNamespace(data_source=data_source))
        assert data.read_prompts("tfds:captions/long:1.0.0/train[:2]:text/en") == [
            {"prompt": "a cat"}, {"prompt": "a bl\u00e5 dog"}]
        assert data.read_prompts("tfds:captions/long:1.0.0/train[:2]:captions/text") == [
            {"prompt": "a cat"}, {"prompt": "cats"}]
        assert data.read_prompts("tfds:captions/long:1.0.0/train[:2]:a/b") == [{"prompt": "x"}, {"prompt": "y"}]
        for source, words in (("tfds:captions/long:1.0.0/train[:1]:id", "no text but a int"),
                              ("tfds:captions/long:1.0.0/train[:1]:text/de", "no feature 'de'. There is text, text/en"),
                              ("tfds:captions/long:1.0.0/train[:1]:caption", "'caption'. There is .*captions/text"),
                              ("tfds:nothing/train[:1]:text", "Dataset nothing not found.$"),
                              ("tfds:captions/long:1.0.0/train[:0]:id", "holds no prompts"),
                              ("tfds:x:y", "of the form")):
            with pytest.raises(ValueError, match=words):
                data.read_prompts(source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'gvu_jax\[tfds\]'"):
        data.read_prompts("tfds:captions/train:text")


def test_the_stream_depends_on_seed_and_step_alone_and_visits_everything():
    metas = [{"prompt": str(i)} for i in range(10)]
    drawn = [meta["prompt"] for step in range(5) for meta in data.batch(data.prompt_stream(metas, 3), step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [str(i) for i in range(10)]
    assert data.batch(data.prompt_stream(metas, 3), 4, 4) == [{"prompt": p} for p in drawn[16:]]
    assert data.batch(data.prompt_stream(metas, 4), 0, 4) != data.batch(data.prompt_stream(metas, 3), 0, 4)


def test_every_batch_holds_the_tags_evenly():
    metas = [{"prompt": str(i), "tag": "many"} for i in range(90)] + [{"prompt": "x", "tag": "few"}]
    for step in range(10):
        tags = [meta["tag"] for meta in data.batch(data.prompt_stream(metas, 0), step, 6)]
        assert tags.count("few") == tags.count("many") == 3


RED, WHITE = (255, 0, 0), (255, 255, 255)


def palette(transparent):
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((0, 0), 0)
    return picture, {"transparency": 0} if transparent else {}


def alpha():
    picture = Image.new("RGBA", (2, 2), (*RED, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 51))
    return picture


@pytest.mark.parametrize("picture, options, pixels", [
    (*palette(False), [(0, 0, 0), RED, RED, RED]),
    (*palette(True), [WHITE, RED, RED, RED]),
    (alpha(), {}, [WHITE, (204, 204, 204), RED, RED]),
    (Image.new("LA", (1, 1), (0, 0)), {}, [WHITE]),
    (Image.new("L", (1, 1), 7), {}, [(7, 7, 7)]),
    (Image.new("1", (1, 1), 1), {}, [WHITE]),
    (Image.fromarray(np.array([[0, 257], [32768, 65535]], np.uint16)), {}, [(0,) * 3, (1,) * 3, (128,) * 3, WHITE])],
    ids=["palette", "transparent palette", "alpha", "grey and alpha", "1x1 grey", "1 bit", "16-bit grey"])
def test_a_picture_of_any_kind_becomes_rgb(tmp_path, picture, options, pixels):
    picture.save(tmp_path / "picture.png", **options)
    read = data.read_picture(tmp_path / "picture.png")
    assert read.dtype == np.uint8 and read.shape == (*picture.size[::-1], 3)
    assert [tuple(pixel) for pixel in read.reshape(-1, 3).tolist()] == pixels


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # Orientation: turn clockwise by a quarter
    picture = Image.new("RGB", (3, 2))
    picture.putpixel((0, 0), RED)
    picture.save(tmp_path / "picture.png", exif=exif)
    read = data.read_picture(tmp_path / "picture.png")
    assert read.shape == (3, 2, 3) and tuple(read[0, 1]) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_broken_picture_is_refused_by_its_name(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, kind)
    whole, path = buffer.getvalue(), tmp_path / "picture"
    path.write_bytes(whole)
    assert data.read_picture(path).shape == (40, 40, 3)
    for part in (0, 1, 10, 30, len(whole) // 2):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match="picture cannot be read as a picture"):
            data.read_picture(path)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "notes.png").write_text("a photo of a red circle")
    with pytest.raises(ValueError, match="notes.png"):
        data.read_picture(tmp_path / "notes.png")
    for missing in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(FileNotFoundError, match="no picture file"):
            data.read_picture(missing)
