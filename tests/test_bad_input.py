"""Whatever a user or a stranger's file brings ends in one clear line: settings, full disks, folders that mean harm, and
bytes that nobody chose (hypothesis: the same few inputs each time; GVU_EXAMPLES=5000 makes it as many new ones)."""
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image

import gvu_jax
from conftest import ROOT, least_size, load_config, one_device, tiny_config
from gvu_jax import checkpoint, cli, convert, data, decode, families, optim, tensor_files, train
from gvu_jax.families import xomni
from gvu_jax.methods.gvu import GvU
from gvu_jax.models import siglip_vq
from gvu_jax.pictures import image_grid, word_heatmap
from gvu_jax.policy import init_state
from gvu_jax.sampling import How
from gvu_jax.shapes import pretrain
from gvu_jax.suite import Verdicts

EXAMPLES = int(os.environ.get("GVU_EXAMPLES", 0))
some = settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
OURS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def tiny(folder):
    """(config, umm, params) as in conftest, but all parameters are zero: nothing here is compiled for them."""
    config = tiny_config()
    umm = families.tiny_of(config).tiny(config)
    return config, umm, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), checkpoint.shapes(umm))


@pytest.fixture(scope="module")
def model(tiny, folder):
    """A model and its folder."""
    checkpoint.save_model(folder / "model", *tiny[1:])
    return tiny[1], folder / "model"


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


PICTURES = [saved(kind) for kind in decode.FORMATS] + [
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
TENSOR = JSON | st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "I8", "F8"]) | JSON, "shape": st.lists(SIZES, max_size=2),
    "data_offsets": st.lists(SIZES, max_size=3)})
NEGATIVE = {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},           # adds up, all the same
            "b": {"dtype": "F32", "shape": [8], "data_offsets": [-4, 28]}}


def with_header(described):
    header = json.dumps(described).encode()
    return len(header).to_bytes(8, "little") + header + bytes(28)


@some
@given(content=mutated(tensor_files.safetensors_header(SPECS) + bytes(28)) | JSON.map(with_header) | st.binary()
       | st.dictionaries(st.text(max_size=2), TENSOR, max_size=3).map(with_header) | st.just(with_header(NEGATIVE)))
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
VALUE = st.text() | st.sampled_from(
    ["nan", "-1", "0", "inf", "1e30", "", "[", "None", "True", "(1, 2)", "3", "0.5", "{}", "é", "9" * 30])


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
        assert config.optim.clip_norm > 0 and config.gvu.advantage_eps > 0
        GvU.check(config)
        How(images_per_prompt=config.gvu.group, **config.sampling, **config.rollout)
        optim.build(config.optim, config.steps)
        jax.random.key(config.seed)
    except ValueError:
        pass


@settings(some, max_examples=EXAMPLES or 25)
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


# ------------------------------------------------------------------ settings and texts

@pytest.mark.parametrize("preset, setting, message", [
    ("shapes", "optim.lr=nan", "optim.lr is nan; it must be a number from 0"),
    ("shapes", "steps=-3", "steps is -3"),
    ("shapes", "eval.batches=0", "eval.batches is 0; it must be a number from 1"),
    ("shapes", "pretrain.backbone.lr=inf", "pretrain.backbone.lr is inf"),
    ("shapes", "optim.b2=1", "optim.b2 is 1.0"),
    ("shapes", "gvu.group=abc", "invalid literal for int"),
    ("shapes", "optim.lr=fast", "could not convert string to float"),
    ("shapes", "gvu=5", "is not a dict"),
    ("shapes", "lora.targets=[", r"lora.targets = '\[' is no regular expression"),
    ("shapes", "sampling.top_p=2", "top_p 2.0"),
    ("shapes", "model.vision.heads=3", "no model has these sizes"),
    ("shapes", "model.flux.siglip_channels=16", "channels of image tokenizer and decoder differ: 32 and 16"),
    ("shapes", "model.vision.codebook_size=30", "codebook_size is 30, but a world of side 3 needs 78 codes"),
    ("shapes", "family=flux", "config.family is 'flux'; it must be one of xomni, janus, showo"),
    ("shapes", "family=janus --config.model.vq.codebook_size=8", "codebook_size is 8, but there are 26 things"),
    ("shapes", "family=janus --config.model.vq.multipliers=(1,1)", "a code is 2 pixels wide, but a cell 16"),
    ("shapes", "family=janus --config.model.vision.heads=3", "no model has these sizes"),
    ("shapes", "family=showo --config.model.magvit.bits=6", "bits is 6, but a world of side 3 needs 8"),
    ("shapes", "family=showo --config.model.magvit.encoder_blocks=(1,)", "as many levels"),
    ("shapes", "family=showo --config.model.rounds=0", "rounds 0 must be at least 1"),
    ("shapes", "family=qwen_sd35 --config.model.vae.patch_size=8", "model.vae.patch_size 8, but a cell is 16"),
    ("shapes", "family=qwen_sd35 --config.model.vision.heads=3", "3 heads no width"),
    ("xomni", "steps=1", "python -m gvu_jax.convert"),
    ("xomni", "model.checkpoint=..", "no prompt file prompts/train.jsonl")])
def test_a_setting_that_cannot_work_is_named(command, tmp_path, preset, setting, message):
    line = command("train", f"--config={ROOT}/configs/{preset}.py", f"--workdir={tmp_path}/w",
                   *f"--config.{setting}".split(), f"--config.cache={tmp_path}/cache")
    assert isinstance(line, str) and re.search(message, line), line
    assert not list(tmp_path.glob("**/metadata.json"))


@pytest.mark.parametrize("preset, change, said", [
    ("shapes_uae", {"uae.reconstruct": "rescaled"}, "models of the kind xomni cannot"),
    ("shapes:sd35", {"sampling.flow.noise": 0.0}, "a flow learns from noisy steps alone"),
    ("shapes", {"gvu.prompts": 3, "gvu.waves": 1, "gvu.group": 2, "gvu.micro_batches": 1, "mesh.data": 4},
     "6 samples a step"),
    ("shapes", {"lora.rank": 4, "lora.targets": "nothing"}, "nothing")])
def test_what_a_base_cannot_do_is_said_before_it_is_pretrained(preset, change, said, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "prepare_base", lambda *_: pytest.fail("it began"))
    config = load_config(*preset.split(":"))
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=said):
        train.train(config, tmp_path)


def test_captions_alone_need_no_noise_of_a_flow():
    config = load_config("shapes_uae", "sd35")
    config.sampling.flow.noise = 0.0
    how, optimizer = How(images_per_prompt=config.uae.group, **config.sampling), optim.build(config.optim, config.steps)
    with pytest.raises(ValueError, match="noisy steps alone"):
        train.check_base(config, how, optimizer, one_device())
    config.uae.stages = "caption:10"
    train.check_base(config, how, optimizer, one_device())


def test_a_config_without_a_world_cannot_be_pretrained():
    with pytest.raises(ValueError, match="no world to pretrain"):
        pretrain.ensure_base(load_config("xomni"))


def test_a_backbone_in_bfloat16_is_not_trained_itself(tiny):
    config, umm, base = tiny
    base = {**base, "ar": jax.tree.map(lambda x: x.astype(jnp.bfloat16), base["ar"])}
    optimizer = optim.build(config.optim, 10)
    start = lambda config: jax.eval_shape(lambda: init_state(umm, base, config, optimizer, jax.random.key(0)))
    with pytest.raises(ValueError, match="is in bfloat16: too coarse.*lora.rank=8"):
        start(config)
    config = config.copy_and_resolve_references()
    config.lora.rank = 2
    assert start(config).trainable.keys() == {"adapter"}


@pytest.mark.parametrize("prompt, message", [
    ("", "prompt 1 is empty"), ("\ud800", "prompt 1 is no Unicode text"),
    ("a <MM-Token-3>", "prompt 1 holds <MM-Token-3>, which is a piece of a picture"),
    ("a red circle " * 8_000, "has 24000 tokens, but the model reads at most 512: shorten it")])
def test_a_prompt_that_cannot_be_read_whole_is_refused(tiny, prompt, message):
    for call in (tiny[1].lengths, tiny[1].encode_prompts):
        with pytest.raises(ValueError, match=message) as error:
            call(["a red circle", prompt])
        assert len(str(error.value)) < 200


class Wordy:
    """A tokenizer that makes too much of everything."""
    added_tokens_decoder, unk_token_id = {}, 0

    def __call__(self, texts, **_):
        return {"input_ids": [[0] * 513]}


def test_what_the_text_encoders_read_of_a_prompt_is_explicit(converted, monkeypatch):
    umm, said = checkpoint.read_metadata(converted), []
    monkeypatch.setattr("absl.logging.log_first_n", lambda _, message, n, *values: said.append((n, message % values)))
    words = lambda tokenizer, most: " ".join(["a"] * (most - len(tokenizer("")["input_ids"])))
    short = words(umm.clip_tokenizer, umm.clip.max_position_embeddings)
    umm.encode_prompts([short])
    assert not said
    umm.encode_prompts([short + " a"])
    assert said[0][0] == 1 and "CLIP" in said[0][1]
    with pytest.raises(ValueError, match="T5 reads at most 512"):
        object.__setattr__(umm, "t5_tokenizer", Wordy())
        umm.encode_prompts(["a"])


def test_repeated_prompts_are_kept_and_counted(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\na dog\na  cat\n")
    (tmp_path / "test.txt").write_text("a cat\na bird\n")
    both = data.read_prompts(tmp_path / "train.txt"), data.read_prompts(tmp_path / "test.txt")
    assert len(both[0]) == 3
    assert data.overlap(*both) == (
        "prompts: 3 to train on (1 repeated), 2 held out (0 repeated, 1 also trained on)")


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("1", (20_000, 4_000)).save(tmp_path / "bomb.png")             # a kilobyte, or 240 megabytes as RGB
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    with pytest.raises(ValueError, match="it has 20000 x 4000 pixels"):
        data.read_picture(tmp_path / "bomb.png")
    Image.new("1", (20_000, 10)).save(tmp_path / "strip.png")
    assert data.read_picture(tmp_path / "strip.png").shape == (10, 20_000, 3)


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.eps")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        data.read_picture(tmp_path / "picture.eps")


# ------------------------------------------------------------------ folders

@pytest.mark.parametrize("content, message", [
    ("[]", "holds a list"), ("{", "not valid JSON"), ('{"model_type": "xomni"}', "a published model is converted")])
def test_what_is_no_run_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        gvu_jax.load(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"format": 3}, "it is format 3 of kind 'xomni'; .* reads format 2"), ({"format": 1}, "write the folder again"),
    ({"kind": "dreamer"}, "kind 'dreamer'"), ({"ar": 5}, "ar is 5, which is no Config"),
    ({"grid": [3]}, r"grid is \(3,\), which is no tuple\[int, int\]"), ({"grid": [0, 3]}, "at least 1"),
    ({"diffusion_steps": "two"}, "diffusion_steps is 'two', which is no int"), ({"colour": 1}, "unknown .*: colour")])
def test_metadata_of_another_version_or_type_is_named(model, tmp_path, change, message):
    shutil.copytree(model[1], tmp_path / "model")
    metadata = json.loads((model[1] / "metadata.json").read_text())
    (tmp_path / "model/metadata.json").write_text(json.dumps(metadata | change))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path / "model")


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", "{}", "cannot read the tokenizer"), ("tokenizer_config.json", "[]", "cannot read the tokenizer"),
    ("tokenizer_config.json", "{}", "has no eos_token"),
    ("chat_template.jinja", "{{ [].__class__.__mro__ }}", "chat template .* unsafe"),
    ("chat_template.jinja", "{% if %}", "chat template"), ("chat_template.jinja", "hello", "chat template")])
def test_a_broken_tokenizer_is_named(model, tmp_path, file, content, message):
    shutil.copytree(model[1], tmp_path / "model")
    (tmp_path / "model/tokenizer" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(tmp_path / "model")


# ------------------------------------------------------------------ folders that mean harm

class Harm:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "tar", "pickle"])
def test_a_torch_file_is_not_executed(tmp_path, kind):
    torch, mark = pytest.importorskip("torch"), tmp_path / "mark"
    harm = {"weight": Harm(mark)}
    if kind == "pickle":
        (tmp_path / "x.pt").write_bytes(pickle.dumps(harm))
    else:
        torch.save(harm, tmp_path / "x.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="no state dict of tensors alone"):
        tensor_files.TensorFile(tmp_path / "x.pt")
    assert not mark.exists()
    with contextlib.suppress(RuntimeError):                               # which the bare pickle ends in, afterwards
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists(), "the file would have done harm"


def test_a_tokenizer_folder_is_not_executed(model, tmp_path, monkeypatch):
    """Neither from a model folder nor from a published one, and nobody is asked whether it may."""
    tokenizer, mark = tmp_path / "model/tokenizer", tmp_path / "mark"
    shutil.copytree(model[1], tmp_path / "model")
    told = json.loads((tokenizer / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": ["harm.Tokenizer", "harm.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "model" / checkpoint.DIGEST).unlink()                               # as whoever means harm would
    (tokenizer / "harm.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n"
                                       "from transformers import PreTrainedTokenizerFast\n"
                                       "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    assert len(checkpoint.load_model(tmp_path / "model")[0].tokenizer) == len(model[0].tokenizer)
    xomni.read_tokenizer(tokenizer, "tokenizer")
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot read tokenizer"):
        xomni.read_tokenizer(tokenizer, "tokenizer")
    assert not mark.exists()
    from transformers import AutoTokenizer
    with pytest.raises(Exception):
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=True)
    assert mark.exists(), "the folder would have done harm"


def test_an_export_stays_in_its_directory(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    manifest = tmp_path / "model/source/manifest.json"
    whole = json.loads(manifest.read_text())
    for name in ("../harm.safetensors", str(tmp_path / "harm.safetensors"), "a/../../harm.pt"):
        manifest.write_text(json.dumps(whole | {"parts": {name: "ar"}}))
        with pytest.raises(ValueError, match="outside of its directory"):
            convert.export_hf(tmp_path / "model", tmp_path / "out")
    manifest.write_text(json.dumps({"parts": ["ar"]}))
    with pytest.raises(ValueError, match="no dict"):
        convert.export_hf(tmp_path / "model", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ------------------------------------------------------------------ disks that refuse

class Disk:
    """A file system of its own, of `size` kB."""

    def __init__(self, path, size):
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", path], check=True, capture_output=True)

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def leave(self, kilobytes):
        """Fills it up to the last `kilobytes`."""
        free = os.statvfs(self.path)
        (self.path / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - 1024 * kilobytes))


@pytest.fixture
def disk(tmp_path):
    try:
        disk = Disk(tmp_path / "disk", 400)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a real full disk needs the right to mount one (root)")
    yield disk
    subprocess.run(["umount", disk.path], check=True)


FULL, LOCKED = "No space left on device", "Read-only file system"


@pytest.fixture
def quick(tiny, monkeypatch):
    """Commands load a model that answers at once: what the disk does is not its affair."""
    class Quick:
        umm, params = tiny[1:]
        mesh, step = one_device(), None

        def draw(self, prompts, *_, batch, places):
            for start in range(0, len(places), 4):                          # noise: 5 kB a picture
                yield np.stack([np.random.default_rng(i).integers(0, 256, (1, 40, 40, 3), np.uint8)
                                for i in places[start:start + 4]])

        def score(self, pictures, prompts):
            return [gvu_jax.Score(0.5, prompts, np.ones(1), prompts, np.full(1, 0.5))]
    monkeypatch.setattr(gvu_jax, "load", lambda path: Quick())


def test_generate_on_a_disk_that_refuses(command, quick, disk, tmp_path):
    (tmp_path / "eight.txt").write_text("a photo of a red circle\n" * 8)
    arguments = ["--checkpoint=x", f"--prompts={tmp_path}/eight.txt", "--images_per_prompt=1"]
    assert command("generate", *arguments, f"--out={tmp_path}/whole") is None
    out = disk.path / "out"
    out.mkdir()
    disk.leave(52)
    line = command("generate", *arguments, f"--out={out}")
    assert FULL in line and str(out) in line
    names = sorted(path.name for path in out.iterdir())                     # what is there is whole
    assert names == [f"{i:05d}_0.png" for i in range(len(names))] and 4 < len(names) < 8
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    disk.remount("ro")
    for folder in (out, disk.path / "new"):
        assert LOCKED in command("generate", *arguments, f"--out={folder}")


def test_score_on_a_disk_that_refuses(command, quick, disk, tmp_path, capsys):
    Image.new("RGB", (48, 48)).save(tmp_path / "picture.png")
    arguments = ["--checkpoint=x", f"--image={tmp_path}/picture.png", "--prompt=a <script>alert(1)</script>"]
    disk.leave(4)
    line = command("score", *arguments, f"--heatmap={disk.path}/heat.png")
    assert FULL in line and "heat.png" in line and "reward" in capsys.readouterr().out
    assert [path.name for path in disk.path.iterdir()] == ["filler"]
    disk.remount("ro")
    assert LOCKED in command("score", *arguments, f"--heatmap={disk.path}/heat.png")
    assert "heat.png" in command("score", *arguments, f"--heatmap={tmp_path}/heat.doc")
    assert command("score", *arguments, f"--heatmap={tmp_path}/heat.jpg") is None


def test_evaluate_on_a_disk_that_refuses(command, quick, disk, monkeypatch, capsys):
    """The table is on the screen all the same, and the results of before are not lost."""
    class Suite:
        sample = lambda self, *_: (np.zeros((192, 1, 8, 8, 3), np.uint8), np.zeros((192, 1)),
                                   Verdicts(*np.zeros((2, 192, 1), bool), *np.zeros((3, 192, 1), int)))
        grade = lambda self, *_: ({}, {"auc": {}, "asked": {}})
        choices = lambda self, *_: {"long name": np.array([True, True, True, False])} | {
            f"{i}": np.array([True, False]) for i in range(200)}
    monkeypatch.setattr("gvu_jax.shapes.suite.build", lambda *_: Suite())
    (disk.path / "results.json").write_text("old")
    disk.leave(4)
    line = command("evaluate", "--checkpoint=x", "--suite=shapes", f"--out={disk.path}")
    assert FULL in line and "results.json" in line and "0.750" in capsys.readouterr().out
    assert (disk.path / "results.json").read_text() == "old" and not list(disk.path.glob("*.tmp"))


def test_a_state_that_finds_no_room_leaves_those_before_it(disk):
    """And when there is room again, the next sitting saves the same step."""
    noise = np.random.default_rng(0).normal(size=40000).astype(np.float32)                  # 160 kB, and no zip helps
    trainable = {"ar": {"lm_norm": {"scale": noise}}}
    like = dict(trainable=trainable, opt_state=optax.adam(1e-3).init(trainable))
    states = checkpoint.Checkpoints(disk.path, one_device(), writing=True)
    with pytest.raises(OSError, match="step .* could not be saved"):
        for step in range(1, 20):
            states.save(step, **like)
    assert 1 < step < 19
    disk.remount("ro")
    again = checkpoint.Checkpoints(disk.path, one_device())
    assert again.newest_whole() == step - 1
    with pytest.raises(OSError, match="could not be saved"):
        again.save(step, **like)
    disk.remount("rw,size=64m")
    again = checkpoint.Checkpoints(disk.path, one_device(), writing=True)
    again.save(step, **like)
    assert again.newest_whole() == step
    np.testing.assert_array_equal(again.load(step, trainable=trainable)["trainable"]["ar"]["lm_norm"]["scale"], noise)
    again.close()


def test_pretraining_does_not_begin_where_it_cannot_end(tiny, disk, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", lambda config: pytest.fail("it began"))
    config = tiny[0].copy_and_resolve_references()
    config.cache = str(disk.path / "cache")
    disk.path.joinpath("cache").mkdir()
    disk.remount("ro")
    with pytest.raises(OSError, match=LOCKED):
        pretrain.ensure_base(config)


def test_convert_on_a_disk_that_refuses(fixtures, converted, disk, monkeypatch):
    """It says how much it needs; where the space goes while it works, it ends in one line and can go on later."""
    size, target = least_size(fixtures), disk.path / "model"
    with pytest.raises(OSError, match="no space left .* bytes are needed"):
        convert.convert(fixtures / "xomni", target, image_size=size)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        with pytest.raises(OSError, match=FULL):
            convert.convert(fixtures / "xomni", target, image_size=size)
    assert not target.exists()
    disk.remount("size=64m")
    convert.convert(fixtures / "xomni", target, image_size=size)
    jax.tree.map(np.testing.assert_array_equal, *(checkpoint.load_model(path)[1] for path in (target, converted)))
    disk.remount("ro")
    with pytest.raises(OSError, match=LOCKED):
        convert.export_hf(target, disk.path / "back")
