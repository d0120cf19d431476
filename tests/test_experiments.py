"""Experiments: runs that are shared and not repeated, intervals over seeds, and words that are taken out of prompts."""
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import traverse_util

import gvu_jax
from conftest import ROOT, one_device, put_untrained, tiny_config
from gvu_jax import experiments, report, train
from gvu_jax.shapes import pretrain, suite
from gvu_jax.suite import Verdicts


def test_every_arm_can_be_configured(monkeypatch):
    monkeypatch.chdir(ROOT)
    for arm in experiments.ARMS["all"]:
        config = experiments.configure(tiny_config(), arm)
        train.method_of(config).check(config)
        assert experiments.configure(tiny_config(family="janus"), arm).family == "janus"
        known = traverse_util.flatten_dict(experiments.configure(
            tiny_config(), {key: value for key, value in arm.items() if key == "config"}).to_dict(), sep=".")
        assert arm.keys() <= known.keys() | {
            "config", "model.override.diffusion_steps", *experiments.SAME_EVALUATION}
        assert config.method == {"": "gvu", "gap.py": "internal_gap", "uae.py": "uae"}[
            arm.get("config", "").partition(":")[0].partition("_")[2]]
        if not any(key.startswith("pretrain.") for key in arm):
            assert pretrain.base_folder(config) == pretrain.base_folder(tiny_config())
        assert (config.eval.batches, config.eval.choices) == (1, 6)
    assert experiments.ARMS["all"][0] == {} and len(experiments.ARMS["all"]) == 28


def test_runs_are_trained_once_and_compared(tmp_path, monkeypatch, capsys):
    config, written = tiny_config(), []
    config.update(steps=1)
    config.eval.update(every=1)
    put_untrained(config)
    monkeypatch.setitem(experiments.ARMS, "oracle", [{"reward.mean": "oracle"}])
    monkeypatch.setattr(report, "write_comparison", lambda folder: written.append(folder) or folder / "report.html",
                        raising=False)
    results = experiments.run("oracle", config, tmp_path, 1)
    told = json.loads((tmp_path / "experiments.json").read_text())
    assert written == [tmp_path] and told == {"name": "oracle", "arms": [
        {"label": "reward.mean=oracle", "overrides": {"reward.mean": "oracle"},
         "runs": ["runs/reward.mean=oracle/seed0"]}]}
    summary = json.loads((tmp_path / told["arms"][0]["runs"][0] / "summary.json").read_text())
    assert results["arms"][0]["after"]["overall"] == [summary["after"]["overall"], None, None]
    for part in ("exact", "objects", "haze"):
        assert results["arms"][0]["after"][f"{part} counting"] == [summary[f"{part}_after"]["counting"], None, None]
    assert f"{summary['understanding_after']['four_way']:9.3f}" in capsys.readouterr().out

    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it was there already"))
    assert experiments.run("oracle", config, tmp_path, 1) == results
    assert json.loads((tmp_path / "results.json").read_text()) == results
    config.gvu.beta = 0.5
    trained = []
    monkeypatch.setattr(train, "train", lambda config, folder, stop: trained.append(folder))
    assert experiments.run("oracle", config, tmp_path, 1) is None and len(trained) == 1, "stopped in an unfinished run"


def test_a_config_is_asked_for(tmp_path):
    done = subprocess.run([sys.executable, "-m", "gvu_jax.experiments", "--name=normal", f"--out={tmp_path}/o"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "--config" in done.stderr and done.stderr.count("\n") == 1


def test_intervals_over_seeds():
    mean, low, high = experiments.interval([0.2, 0.3, 0.4])
    half = 4.3027 * 0.1 / np.sqrt(3)                                      # t of two degrees of freedom at 0.975
    np.testing.assert_allclose([mean, high - mean, mean - low], [0.3, half, half], rtol=1e-4)
    summaries = [{"before": {"overall": 0.5}, "after": {"overall": after}, "understanding_before": {"four_way": 0.9},
                  "understanding_after": {"four_way": 0.9}, "exact_before": {"overall": 0.1},
                  "exact_after": {"overall": 0.3},
                  "timings": {"pretraining": 5.0, "training": 60.0, "evaluation": 30.0}} for after in (0.6, 0.8)]
    arm = experiments.measure({"label": "as given"}, summaries)
    np.testing.assert_allclose(arm["change"]["overall"], [0.2, 0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1], rtol=1e-3)
    assert arm["change"]["understanding four_way"] == [0, 0, 0]
    assert experiments.table({"arms": [arm, arm]}).count("exact overall") == 2
    told = experiments.table({"arms": [arm]})
    assert "[-1.071, +1.471]" in told and told.splitlines()[-1].split()[-2:] == ["minutes", "1.5"]


@pytest.mark.parametrize("kind, prompt, less", [
    ("numbers", "a photo of two red circles", "a photo of red circles"),
    ("colors", "an image of a red cross above a square", "an image of a cross above a square"),
    ("relations", "a picture of a cross left of a blue square", "a picture of a cross and a blue square")])
def test_words_are_taken_out(kind, prompt, less):
    assert suite.remove_words(prompt, kind) == less
    assert all(suite.remove_words(less, kind) == less for kind in (kind, "numbers"))


def test_what_words_are_worth(tiny, monkeypatch):
    """All pictures are scored for the full prompts, also those that were drawn without some of their words."""
    model = gvu_jax.Model(*tiny[1:], one_device())
    monkeypatch.setattr(experiments, "PROMPTS", 2)
    asked, read = [], model.read

    def remember(pictures, texts):
        asked.extend(texts)
        return read(pictures, texts)
    monkeypatch.setattr(model, "read", remember)
    found = experiments.drop_words(model, model)
    half = len(asked) // 2
    assert half == 3 * 2 * experiments.GROUP and asked[:half] == asked[half:]
    kinds = {"numbers", "colors", "relations"}
    assert set(found) == kinds | {f"{kind} ({said})" for kind in kinds for said in ("checker", "exact")}
    for kind, values in found.items():
        assert 0 <= values["full"] < 1 and values["change"] == values["removed"] - values["full"]
        assert values["full"] > 0 or kind not in kinds


def test_words_taken_out_are_judged_by_the_full_prompt(monkeypatch):
    """A model that draws the number of its prompt and reads a text as likely as it is near: the words cost what the
    pictures lack, prompt by prompt."""
    monkeypatch.setattr(experiments, "PROMPTS", 4)
    code = lambda text: sum(map(ord, text)) % 251

    class Drawer:
        def generate(self, prompts, images_per_prompt):
            pictures = np.zeros((len(prompts), images_per_prompt, 2, 2, 3), np.uint8)
            pictures[:, :, 0, 0, 0] = np.array([[code(prompt)] for prompt in prompts])
            return pictures

        def read(self, pictures, texts):
            near = -np.abs(pictures[:, 0, 0, 0].astype(float) - [code(text) for text in texts]) / 50
            return near[:, None], np.ones((len(texts), 1), bool)

    right = lambda pixels, metas: np.round(pixels[:, 0, 0, 0] * 255).astype(int) == [code(m["prompt"]) for m in metas]
    monkeypatch.setattr(experiments.checker, "judge", lambda pixels, metas: suite_verdicts(right(pixels, metas)))
    found = experiments.drop_words(Drawer(), Drawer())
    for kind in suite.WORDS:
        assert found[kind]["full"] == found[f"{kind} (checker)"]["full"] == 1 and found[f"{kind} (exact)"]["full"] == 0
        assert 0 < found[kind]["removed"] < 1 and found[f"{kind} (checker)"]["removed"] < 0.5
        assert found[kind]["change"] == found[kind]["removed"] - 1


def suite_verdicts(right):
    return Verdicts(right, np.zeros_like(right), *np.ones((3, len(right)), int))
