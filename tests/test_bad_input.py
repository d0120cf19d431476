"""Whatever a user or a stranger's file brings ends in one clear line: settings, full disks, folders that mean harm, and
bytes that nobody chose (hypothesis: the same few inputs each time; GVU_EXAMPLES=5000 makes it as many new ones)."""
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image

import gvu_jax
from conftest import ROOT, load_config
from gvu_jax import checkpoint, cli, convert, data, optim, tensor_files
from gvu_jax.methods import gvu
from gvu_jax.models import siglip_vq
from gvu_jax.report import image_grid, word_heatmap
from gvu_jax.sampling import How
from gvu_jax.shapes import pretrain

EXAMPLES = int(os.environ.get("GVU_EXAMPLES", 0))
some = settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
OURS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def model(tiny, folder):
    """An untrained model and its folder."""
    checkpoint.save_model(folder / "model", *tiny[1:])
    return gvu_jax.Model(*tiny[1:]), folder / "model"


@pytest.fixture
def command(monkeypatch):
    """Runs a command line of the package in this process: (exit status or the line it ends with)."""
    def run(tool, *arguments):
        for name in [name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name).startswith("gvu_jax")]:
            delattr(flags.FLAGS, name)                                  # each command defines its own
        sys.modules.pop(f"gvu_jax.{tool}", None)
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(importlib.import_module(f"gvu_jax.{tool}").main)
        assert "\n" not in str(ended.value.code)
        return ended.value.code
    return run


# ------------------------------------------------------------------ bytes that nobody chose

@st.composite
def mutated(draw, whole):
    """A file with some bytes changed, cut out or put in, or with its end missing."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, new = draw(st.integers(0, len(content))), draw(st.binary(max_size=8))
        content[at:at + draw(st.sampled_from([0, 1, len(new), 100]))] = new
    return bytes(content[:draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)
LINE = st.fixed_dictionaries({"prompt": JSON | st.text()}, optional={"tag": JSON | st.text()}) | JSON
PROMPT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")).filter(str.strip)


@some
@given(content=st.binary() | st.lists(LINE).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())
       | mutated(b'{"prompt": "a cat", "tag": "one"}\n{"prompt": "caf\xc3\xa9"}\n' * 3) | st.just(b"[" * 100_000),
       kind=st.sampled_from([".txt", ".jsonl"]))
def test_any_prompt_file_is_read_or_refused(folder, content, kind):
    path = folder / f"prompts{kind}"
    path.write_bytes(content)
    try:
        metas = data.read_prompts(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert metas and all(meta["prompt"].strip() for meta in metas)
        data.batch(data.prompt_stream(metas, 0), 0, 2)


@some
@given(prompts=st.lists(PROMPT, min_size=1), mark=st.sampled_from(["", "\ufeff"]), end=st.sampled_from(["\n", "\r\n"]))
def test_json_lines_come_back_as_they_were_written(folder, prompts, mark, end):
    metas = [{"prompt": prompt} for prompt in prompts]
    text = "".join(json.dumps(meta, ensure_ascii=False) + end for meta in metas)
    (folder / "written.jsonl").write_bytes((mark + text).encode())
    assert data.read_prompts(folder / "written.jsonl") == metas


def saved(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [saved(kind) for kind in data.FORMATS] + [
    saved("PNG", "P", transparency=1), saved("PNG", "LA"), saved("PNG", "1"), saved("TIFF", "F"), saved("JPEG", "CMYK"),
    saved("TIFF", "RGBA", compression="tiff_lzw"), saved("GIF", "P", transparency=0)]


@some
@given(content=st.sampled_from(PICTURES).flatmap(lambda whole: mutated(whole) | st.just(whole)) | st.binary())
def test_any_picture_file_is_read_or_refused(folder, content):
    (folder / "picture").write_bytes(content)
    try:
        picture = data.read_picture(folder / "picture")
    except ValueError as error:
        assert "picture cannot be read as a picture" in str(error)
    else:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


@some
@given(width=st.integers(1, 40_000), height=st.integers(1, 40_000), patch=st.sampled_from([1, 14, 16]),
       short=st.integers(64, 600), long=st.integers(64, 2000), ratio=st.floats(1, 10))
def test_a_picture_of_any_size_is_fitted_or_refused(width, height, patch, short, long, ratio):
    transform = siglip_vq.Transform(short, max(short, long), patch, min_short_size=28, max_aspect_ratio=ratio)
    try:
        sides = siglip_vq.fitted_size(width, height, transform)
    except ValueError as error:
        assert f"{width}x{height}" in str(error)
    else:
        assert all(side % patch == 0 and 0 < side <= transform.long_size + patch for side in sides)


@some
@given(caption=st.text(), words=st.lists(PROMPT, min_size=1, max_size=3))
def test_any_caption_can_be_drawn(caption, words):
    grid = image_grid(np.zeros((1, 2, 4, 4, 3)), [caption])
    heat = word_heatmap(np.zeros((4, 4, 3)), words, np.full(len(words), 0.5), 0.5)
    assert grid.width < 100 and heat.height < 2000


TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8)}
SPECS = {name: tensor_files.Spec(array.dtype, array.shape, 0) for name, array in TENSORS.items()}
SIZES = st.integers(-3, 9) | JSON
TENSOR = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "I8", "F8"]) | JSON, "shape": st.lists(SIZES, max_size=2),
                                "data_offsets": st.lists(SIZES, max_size=3)}) | JSON


def with_header(described):
    header = json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header + bytes(28)


@some
@given(content=mutated(with_header({}) + bytes(64)) | st.dictionaries(st.text(max_size=2), TENSOR, max_size=3).map(with_header)
       | JSON.map(with_header) | mutated(tensor_files.safetensors_header(SPECS) + bytes(28)) | st.just(
           with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
                        "b": {"dtype": "F32", "shape": [8], "data_offsets": [-4, 28]}})))
def test_any_safetensors_file_is_read_or_refused(folder, content):
    (folder / "x.safetensors").write_bytes(content)
    check_tensors(folder / "x.safetensors")


def check_tensors(path):
    try:
        file = tensor_files.TensorFile(path)
    except ValueError as error:
        assert f"cannot read {path}" in str(error)
    else:
        for name, spec in file.specs.items():
            assert file.read(name).shape == spec.shape


def torch_file(**options):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in TENSORS.items()}, buffer, **options)
    return buffer.getvalue()


@some
@given(content=mutated(torch_file()) | mutated(torch_file(_use_new_zipfile_serialization=False)) | st.binary())
def test_any_torch_file_is_read_or_refused(folder, content):
    (folder / "x.pt").write_bytes(content)
    check_tensors(folder / "x.pt")


def parse(name, *overrides):
    """The config that a command line gives."""
    values = flags.FlagValues()
    arguments = ["x", f"--config={ROOT}/configs/{name}.py", *(f"--config.{key}={value}" for key, value in overrides)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(arguments)
    return values.config


SETTINGS = sorted(set(cli.flatten(load_config("shapes")))), sorted(set(cli.flatten(load_config("xomni"))))
VALUE = st.sampled_from(["nan", "-1", "0", "inf", "1e30", "", "[", "None", "True", "(1, 2)", "3", "0.5", "{}", "é"]) | st.text()


@some
@given(chosen=st.sampled_from([("shapes", SETTINGS[0]), ("xomni", SETTINGS[1])]).flatmap(lambda c: st.tuples(
    st.just(c[0]), st.lists(st.tuples(st.sampled_from(c[1]) | st.text(max_size=5), VALUE), min_size=1, max_size=2))))
def test_any_override_is_taken_or_refused(chosen):
    try:
        config = parse(chosen[0], *chosen[1])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError):
        return                                                          # cli.run makes a line of each of these
    try:
        cli.check_numbers(config)
        gvu.check(config)
        How(images_per_prompt=config.gvu.group, **config.sampling)
        optim.build(config.optim, config.steps)
        jax.random.key(config.seed)
    except ValueError:
        pass


@some
@given(content=st.data())
def test_any_metadata_is_read_or_refused(model, folder, content):
    """One entry of the metadata, at any depth, is something else."""
    whole = json.loads((model[1] / "metadata.json").read_text())
    entries = [(None, name) for name in whole] + [
        (part, name) for part, inner in whole.items() if isinstance(inner, dict) for name in inner]
    part, name = content.draw(st.sampled_from(entries))
    (whole[part] if part else whole)[name] = content.draw(JSON | st.integers(-2, 40))
    (folder / "metadata.json").write_bytes(content.draw(st.just(json.dumps(whole).encode()) | mutated(
        json.dumps(whole).encode())))
    shutil.copytree(model[1] / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    try:
        checkpoint.shapes(checkpoint.read_metadata(folder))
    except OURS:
        pass
