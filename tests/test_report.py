"""The report shows a run's numbers, survives runs that have few, and trusts no string; the grids show the pictures."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gvu_jax.metrics import MetricsWriter
from gvu_jax.pictures import (
    BORDER, GAP, RIGHT_COLOR, WRONG_COLOR, image_grid, probability_color, text_color, word_heatmap)
from gvu_jax.report import write_report

EVIL = "<script>alert('a red circle')</script>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and text, and fails where a tag is left open or closed twice."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.links, self._open = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


def _full_run(workdir: Path) -> Path:
    """A run of 60 steps with evaluations at 0, 20, 40 and 60, a NaN, sample grids and a summary."""
    with MetricsWriter(workdir) as writer:
        for step in range(61):
            if step % 20 == 0:
                score = 0.2 + step / 200
                scores = {"eval/overall": score, "eval/counting": score / 2, f"eval/{EVIL}": score, "eval/reward": 0.4}
                writer.write(step, scores | {"understanding/vqa": 0.7 + step / 1000})
            if step > 0:
                seconds = {"sample": 90.0 if step == 1 else 1.0, "render": 0.5, "reward": 0.25, "update": 0.25}
                health = {"kl": 0.01, "entropy": 4.0, "loss": 0.0, "grad_norm": float("nan") if step == 7 else 1.0}
                timings = {f"seconds/{phase}": value for phase, value in seconds.items()}
                writer.write(step, {"reward/mean": 0.3 + step / 600, "reward/std": 0.1} | health | timings)
    (workdir / "samples").mkdir()
    for name in ("before", "after", "step_000020"):
        image_grid(np.zeros((1, 2, 4, 4, 3)), [EVIL], 2, None).save(workdir / "samples" / f"{name}.png")
    (workdir / "config.json").write_text(json.dumps({"prompt": EVIL, "learning_rate": 0.00037}))
    areas = {"auc_before": {"counting": 0.8125}, "auc_after": {"counting": 0.75}}
    summary = areas | {"timings": {"training": 4000, "evaluation": 1000}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def test_full_run(tmp_path):
    path = write_report(_full_run(tmp_path))
    page = Page(path)
    text = " ".join(page.text.split())
    assert "0.200 → 0.500 +0.300 +150 %" in text, "the headline"
    assert "half of the gain by step 40" in text
    assert "counting 0.100 0.250 +0.150 +150 %" in text
    assert "vqa 0.700 0.760 +0.060 +9 %" in text
    assert "counting 0.812 0.750 −0.062 −8 %" in text, "the AUC table"
    assert "sample 1 s 50 %" in text, "the first line, which compiles, does not count"
    assert "training 1 h 6 min 80 %" in text
    assert "grad_norm was not finite in 1 line." in text
    assert '"learning_rate": 0.00037' in text
    assert page.tags.count("svg") == 5, "scores, reward, kl, entropy, grad norm; no log-prob gap was written"
    assert page.tags.count("img") == 3
    assert path == tmp_path / "report.html" and not list(tmp_path.glob("*.tmp"))


def test_no_string_becomes_markup_and_nothing_is_fetched(tmp_path):
    path = write_report(_full_run(tmp_path))
    page = Page(path)
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 3, "the category in legend and table, the prompt in the config"
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "://" not in path.read_text() and "@import" not in path.read_text()


def test_the_summary_outranks_the_metrics(tmp_path):
    _full_run(tmp_path)
    summary = {
        "before": {"overall": 0.21, "color": 0.5},
        "after": {"overall": 0.5, "color": None},
        "understanding_before": {"ocr": 0.0},
        "understanding_after": {"ocr": 0.25},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = " ".join(Page(write_report(tmp_path)).text.split())
    assert "0.210 → 0.500 +0.290 +138 %" in text
    assert "color 0.500 – –" in text
    assert "ocr 0.000 0.250 +0.250" in text and "vqa" not in text


def test_empty_run(tmp_path):
    page = Page(write_report(tmp_path))
    assert "no evaluation yet" in page.text and "nothing trained yet" in page.text
    assert "svg" not in page.tags and "img" not in page.tags and "table" not in page.tags


@pytest.mark.parametrize(
    "lines",
    [
        '{"step": 0, "eval/overall": 0.25}\n',
        '{"step": 0, "eval/overall": null}\n{"step": 1, "reward/mean": null, "seconds/sample": null}\n',
        '{"step": 1, "reward/mean": 0.0, "kl": 0.0, "grad_norm": 1e-30, "seconds/sample": 0.0}\n{"step": 2, "rew',
        '{"step": 0, "eval/overall": 0.0, "eval/a": -5}\n{"step": 10, "eval/overall": 0.0, "eval/a": 1e12}\n',
    ],
    ids=["only step 0", "only nulls", "one training line, cut", "flat and wild"],
)
def test_young_and_odd_runs(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    path = write_report(tmp_path)
    Page(path)
    assert "nan" not in path.read_text().split("<body>")[1]


def test_pictures_of_an_unfinished_run(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ["before", *(f"step_{step:06d}" for step in range(10, 110, 10))]:
        Image.new("RGB", (2, 2)).save(tmp_path / "samples" / f"{name}.png")
    text = Page(write_report(tmp_path)).text
    assert text.index("Before") < text.index("Step 100") < text.index("6 of 10 grids")


def test_command(tmp_path):
    def run(workdir: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "gvu_jax.report", str(workdir)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)

    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 1 and "is not a run's workdir" in missing.stderr
    assert missing.stderr.count("\n") == 1

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.json").write_text("{")
    broken = run(tmp_path)
    assert broken.returncode == 1 and "config.json is not valid JSON" in broken.stderr
    assert broken.stderr.count("\n") == 1

    (tmp_path / "config.json").write_text("{}")
    assert run(tmp_path).returncode == 0 and (tmp_path / "report.html").exists()


def test_image_grid_pixels():
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(rows, None, scale=2, marks=np.array([[True, False, True], [False, True, False]])))
    assert grid.shape == (GAP + 2 * (8 + GAP), GAP + 3 * (10 + GAP), 3)
    for r in range(2):
        for c in range(3):
            top, left = GAP + r * (8 + GAP), GAP + c * (10 + GAP)
            picture = grid[top : top + 8, left : left + 10]
            np.testing.assert_array_equal(picture, rows[r, c].repeat(2, axis=0).repeat(2, axis=1))
            expected = RIGHT_COLOR if (r + c) % 2 == 0 else WRONG_COLOR
            for y, x in [(top - 1, left), (top + 8, left), (top, left - 1), (top, left + 10), (top - BORDER, left)]:
                assert tuple(grid[y, x]) == expected
            assert tuple(grid[top, left - BORDER - 1]) == (255, 255, 255)


def test_image_grid_floats_and_captions():
    rows = np.full((2, 2, 8, 8, 3), 0.5)
    rows[1] = 2.0  # out of range: clipped, not wrapped round
    plain = np.asarray(image_grid(rows, None, 4, None))
    captioned = np.asarray(image_grid(rows, ["a red circle", "a very long prompt " * 20], 4, None))
    assert tuple(plain[GAP, GAP]) == (128, 128, 128) and tuple(plain[-GAP - 1, GAP]) == (255, 255, 255)
    assert captioned.shape[1] == plain.shape[1] and captioned.shape[0] > plain.shape[0]
    assert captioned[GAP : GAP + 18].min() < 100, "there is dark text above the first row"
    with pytest.raises(ValueError, match="captions"):
        image_grid(rows, ["one"], 1, None)


def test_word_heatmap_paints_each_word_in_its_colour():
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    words, probabilities = ["a", "red", "circle"], [0.9, 0.5, 0.01]
    drawn = np.asarray(word_heatmap(picture, words, probabilities, 0.2))
    np.testing.assert_array_equal(drawn[GAP : GAP + 288, GAP : GAP + 288], picture.repeat(6, axis=0).repeat(6, axis=1))
    panel = drawn[:, 288 + 2 * GAP :]
    for probability in probabilities:
        patch = (panel == probability_color(probability)).all(axis=2)
        assert patch.sum() > 200, probability


@pytest.mark.parametrize("words", [["x" * 500], ["w"] * 400, ["红色", "🦄", "É"]], ids=["long", "many", "other"])
@pytest.mark.parametrize("shape", [(1, 1), (2000, 100), (48, 48)])
def test_word_heatmap_of_odd_prompts_and_pictures(words, shape):
    drawn = word_heatmap(np.zeros((*shape, 3)), words, np.linspace(0, 1, len(words)), 0.0)
    assert drawn.width < 1100 and 288 <= drawn.height < 2000
    assert (np.asarray(drawn)[:, -GAP:] == 255).all(), "nothing reaches the right edge"


def test_text_on_every_colour_is_legible():
    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(color) / 255]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    lights = [luminance(probability_color(p)) for p in np.linspace(0, 1, 101)]
    assert all(a < b for a, b in zip(lights, lights[1:])), "the scale only grows lighter"
    for p, light in zip(np.linspace(0, 1, 101), lights):
        ink = luminance((0, 0, 0) if text_color(probability_color(p)) == "black" else (255, 255, 255))
        assert (max(ink, light) + 0.05) / (min(ink, light) + 0.05) >= 4.5
