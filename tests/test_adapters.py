"""Adapters come back: as a model's, as the start of a run, and to peft with the base that they name."""
import json
import shutil

import jax
import numpy as np
import pytest

import gvu_jax
from conftest import ROOT, one_device, put_untrained, tiny_config
from gvu_jax import convert
from gvu_jax.metrics import read_metrics
from gvu_jax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir, exported adapter) of a run of two steps that trained an adapter."""
    folder, config = tmp_path_factory.mktemp("adapters"), tiny_config()
    config.lora.update(rank=2, alpha=6, targets="^layers/.*(q|down)_proj")
    config.update(steps=2)
    config.optim.lr = 0.05
    put_untrained(config)
    train(config, folder / "run")
    convert.export_peft(folder / "run", folder / "adapter", base="some/base")
    return config, folder / "run", folder / "adapter"


def test_what_was_exported_is_loaded_over_the_base_again(run):
    _, work, adapter = run
    theirs, ours = gvu_jax.load(work, one_device()), gvu_jax.load(work / "base", one_device(), adapter=adapter)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert "adapter" not in gvu_jax.load(work / "base", one_device()).params
    with pytest.raises(ValueError, match="has an adapter of its own"):
        gvu_jax.load(work, one_device(), adapter=adapter)


def test_every_command_takes_an_adapter(run, command, monkeypatch, tmp_path):
    from PIL import Image
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    (tmp_path / "p.txt").write_text("a red circle")
    for tool, needs in {"generate": [f"--prompts={tmp_path}/p.txt", f"--out={tmp_path}/o"],
                        "score": [f"--image={tmp_path}/a.png", "--prompt=a red circle"],
                        "evaluate": [f"--out={tmp_path}/e", "--suite=shapes"]}.items():
        def load(path, adapter=None):
            raise ValueError(f"{path} with {adapter}")
        with monkeypatch.context() as patch:
            patch.setattr(gvu_jax, "load", load)
            assert command(tool, "--checkpoint=m", "--adapter=x", *needs) == "error: m with x"
            assert command(tool, "--checkpoint=m", *needs) == "error: m with None"
        missing = command(tool, f"--checkpoint={run[1]}/base", f"--adapter={tmp_path}/none", *needs)
        assert f"there is no {tmp_path}/none/adapter_config.json" in missing


def test_pictures_of_another_adapter_are_not_taken_for_these(run, command, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    draw = lambda *more: command("generate", f"--checkpoint={run[1]}/base", f"--prompts={tmp_path}/p.txt", f"--out={tmp_path}",
                                 "--images_per_prompt=1", *more)
    assert draw() is None
    plain = (tmp_path / "00000_0.png").read_bytes()
    assert draw(f"--adapter={run[2]}") is None and (tmp_path / "00000_0.png").read_bytes() != plain
    assert draw() is None and (tmp_path / "00000_0.png").read_bytes() == plain


def test_a_run_starts_from_an_adapter(run, tmp_path, command):
    """Its first evaluation is the last one of the run that the adapter is from, and its KL is measured to the base."""
    config, work, adapter = run
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lora.adapter = str(adapter)
    train(config, tmp_path / "run")
    last = [line for line in read_metrics(work / "metrics.jsonl") if "eval/reward" in line][-1]
    first, *_ = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "eval/reward" in line]
    assert (first["step"], last["step"]) == (0, 2) and first["eval/reward"] == pytest.approx(last["eval/reward"], rel=1e-5)
    kl = [[line["kl"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line] for folder in (work, tmp_path / "run")]
    assert max(kl[0]) < 1e-6 < min(kl[1]), "the first step of a run warms up, and moves nothing"


@pytest.mark.parametrize("changes, said", [
    ({"lora.rank": 4}, "--config.lora.rank=2 --config.lora.alpha=6"), ({"lora.alpha": 2}, "--config.lora.alpha=6"),
    ({"lora.rank": 0}, "--config.lora.rank=2"), ({"lora.targets": "_proj"}, "cover other modules")])
def test_an_adapter_of_other_settings_is_no_start(run, tmp_path, changes, said):
    config = run[0].copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with config.unlocked():
        config.lora.adapter = str(run[2])
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path / "run")


def test_train_notes_the_adapter_among_the_settings(command, tmp_path):
    line = command("train", f"--config={ROOT}/configs/shapes.py:smoke", f"--workdir={tmp_path}/w", f"--adapter={tmp_path}/none")
    assert f"there is no {tmp_path}/none/adapter_config.json" in line and not (tmp_path / "w").exists()


def test_peft_finds_the_base_that_the_export_names(run, tmp_path):
    """AutoPeftModel and its like load the base by the name in the adapter, and the adapter onto it."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ar, adapter = gvu_jax.load(run[1] / "base", one_device()).umm.ar, tmp_path / "adapter"
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=ar.hidden_size, intermediate_size=ar.intermediate_size, num_hidden_layers=ar.num_hidden_layers,
        num_attention_heads=ar.num_attention_heads, num_key_value_heads=ar.num_key_value_heads, vocab_size=ar.vocab_size))
    base.save_pretrained(tmp_path / "base")
    convert.export_peft(run[1], adapter, base=str(tmp_path / "base"))
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    assert json.loads((run[2] / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    from safetensors.numpy import load_file
    tensors = load_file(adapter / "adapter_model.safetensors")
    for auto in (peft.AutoPeftModelForCausalLM, peft.AutoPeftModel):
        found = dict(auto.from_pretrained(str(adapter)).named_parameters())
        ours = {name.replace(".default.weight", ".weight"): x for name, x in found.items() if "lora_" in name}
        assert ours.keys() == tensors.keys()
        for name, x in ours.items():
            np.testing.assert_array_equal(x.detach().numpy(), tensors[name])


def test_an_export_without_a_base_names_what_was_converted(run, tmp_path):
    """Where the run's base says what it came from; else nothing, and --base is there to say it."""
    convert.export_peft(run[1], tmp_path / "plain")
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["base_model_name_or_path"] is None
    shutil.copytree(run[1], tmp_path / "run")
    (tmp_path / "run/base/source").mkdir()
    (tmp_path / "run/base/source/manifest.json").write_text('{"source": "X-Omni/X-Omni-En", "revision": "4f2c"}')
    convert.export_peft(tmp_path / "run", tmp_path / "named")
    told = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("X-Omni/X-Omni-En", "4f2c")
