"""The report shows a run's numbers, survives runs that have few, and trusts no string; the grids show the pictures."""

import base64
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import CHROMIUM
from gvu_jax import report
from gvu_jax.metrics import MetricsWriter
from gvu_jax.pictures import (
    BORDER, GAP, MIDDLE_COLOR, RIGHT_COLOR, WRONG_COLOR, image_grid, probability_color, text_color, word_heatmap)
from gvu_jax.report import mean_interval, write_comparison, write_report
from gvu_jax.suite import reliability

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


def _embed_png(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


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
    png = _embed_png(workdir / "samples/after.png")
    for moment, reward in (("before", 0.25), ("after", 0.5)):
        reading = {"prompt": EVIL, "tag": "counting", "read": moment, "reward": reward, "words": ["two", EVIL],
                   "probabilities": [0.0, 1.0]}
        drawn = ["before", "after"][:1 if moment == "before" else 2]
        (workdir / f"samples/{moment}.json").write_text(json.dumps({
            "readings": [reading | {"drawn": at} for at in drawn], "pictures": [png],
            "prompts": [{"prompt": EVIL, "tag": "counting", "score": reward / 2, "reward": reward}],
            "reliability": {"overall": {"error": 0.1875, "bins": [
                {"score": 0.25, "right": 0.5, "count": 3}, {"score": 0.75, "right": 0.75, "count": 1}]}}}))
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
    assert "drawn before read before 0.250 two" in text and "drawn before read before 0.250" in text
    assert "read after 0.500" in text.split("drawn after")[1]
    assert "overall 0.188 0.188 +0.000" in text, "the calibration error"
    assert page.tags.count("svg") == 6, "scores, reward, reliability, kl, entropy, grad norm, but no log-prob gap"
    assert page.tags.count("img") == 5
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


def judged_run(workdir: Path, finished: bool = True) -> Path:
    """A run whose pictures fill up, with a category that is called like a measure."""
    told = {"right": {"overall": (.5, .75), "counting": (.25, .5), "exact_color": (.75, 1.0)},
            "exact": {"overall": (.25, .125), "counting": (.125, 0.0), "exact_color": (.375, .25)},
            "objects": {"overall": (2.5, 5.5), "counting": (3.0, 6.0), "exact_color": (2.0, 5.0)},
            "haze": {"overall": (.002, .008), "counting": (.001, .007), "exact_color": (.003, .009)}}
    with MetricsWriter(workdir) as writer:
        for moment, step in enumerate((0, 20)):
            writer.write(step, {"eval/reward": 0.4} | {
                "eval/" + ("" if part == "right" else part + "_" * (tag != "overall"))
                + (tag if tag != "overall" or part == "right" else ""): values[moment]
                for part, of in told.items() for tag, values in of.items()})
    of = lambda part, moment: {tag: values[moment] for tag, values in told[part].items()}
    summary = {"before": of("right", 0), "exact_before": of("exact", 0), "objects_before": of("objects", 0),
               "haze_before": of("haze", 0),
               "asked_before": {"overall": 2.125, "counting": 3.125, "exact_color": 1.0}}
    if finished:
        summary |= {"after": of("right", 1), "exact_after": of("exact", 1), "objects_after": of("objects", 1),
                    "haze_after": of("haze", 1),
                    "spam": "step 20: counting prompts ask for 3.12 objects a picture and get 6.00"}
    (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_not_asked_for_is_seen(tmp_path, finished):
    page = Page(write_report(judged_run(tmp_path, finished)))
    text = " ".join(page.text.split())
    assert "right and nothing else: 0.250 → 0.125" in text, "the headline"
    score, exact, objects = re.split("Exact, before and after|Objects a picture, before and after",
                                     text.split("Score by category, before and after")[1])
    assert "exact color 0.750 1.000 +0.250" in score and "objects" not in score.split("Exact")[0]
    assert "overall 0.250 0.125 −0.125" in exact and "counting 0.125 0.000 −0.125" in exact
    assert "exact color 0.375 0.250 −0.125" in exact
    assert "overall 2.125 2.500 5.500 +3.000" in objects and "counting 3.125 3.000 6.000 +3.000" in objects
    assert ("Warning at step 20: counting prompts ask for 3.12" in text) == finished
    assert page.tags.count("svg") == 5, "score, exact, objects, haze, reward"


def test_exact_in_a_comparison(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        judged_run(tmp_path / name)
    (tmp_path / "experiments.json").write_text(json.dumps(
        {"name": "x", "arms": [{"label": "normal", "overrides": {}, "runs": ["a", "b"]}]}))
    page = Page(write_comparison(tmp_path))
    text = " ".join(page.text.split())
    assert "counting 0.000 ± 0.000 from 0.125 ± 0.000, −0.125 ± 0.000" in text.split("nothing else")[1]
    assert "counting 6.000 ± 0.000 from 3.000 ± 0.000" in text and "counting 3.125 ± 0.000" in text.split("asked for")[1]
    assert page.tags.count("svg") == 6, "score, exact, objects, haze, two categories"
    assert "overall 0.008 ± 0.000 from 0.002 ± 0.000" in text.split("Haze where nothing stands")[1]


def test_every_word_stands_on_the_colour_of_its_probability(tmp_path):
    path = write_report(_full_run(tmp_path))
    for probability, word in ((0.0, "two"), (1.0, html.escape(EVIL).replace("&#x27;", "&#39;"))):
        color = "rgb({}, {}, {})".format(*probability_color(probability))
        ink = text_color(probability_color(probability))
        shown = rf'background: {re.escape(color)}; color: {ink}">{re.escape(word)}<'
        assert len(re.findall(shown, path.read_text())) == 3, word


def test_reliability_against_counting_by_hand():
    scores, right = np.array([[0.5, 0.1, 0.9], [0.2, 0.6, 0.7]]), np.array([[0, 0, 1], [1, 1, 0]], bool)
    told = reliability(scores, right, bins=2)                                    # 0.1 0.2 0.5 and 0.6 0.7 0.9
    assert [bin["count"] for bin in told["bins"]] == [3, 3]
    np.testing.assert_allclose([bin["score"] for bin in told["bins"]], [0.8 / 3, 2.2 / 3])
    np.testing.assert_allclose([bin["right"] for bin in told["bins"]], [1 / 3, 2 / 3])
    np.testing.assert_allclose(told["error"], 0.2 / 3)


# ---- several runs side by side ---------------------------------------------------------------------------------------


def test_the_interval_is_students():
    told = mean_interval([1.0, 2.0, 4.0])
    assert told["mean"] == pytest.approx(7 / 3)
    assert told["half"] == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-5)
    assert mean_interval([2.0]) == {"mean": 2.0, "half": None} and mean_interval([]) is None


def _experiment(folder: Path) -> Path:
    """Two arms: one of two finished runs and one that has only begun, one of a single run."""
    for name, after in (("a0", 0.5), ("a1", 0.7), ("b0", 0.25)):
        _full_run(folder / name)
        summary = {"before": {"overall": 0.2}, "after": {"overall": after}, "auc_before": {"overall": 0.9},
                   "auc_after": {"overall": 0.8}, "timings": {"training": 100 * after}}
        (folder / name / "summary.json").write_text(json.dumps(summary))
    arms = [{"label": "normal", "overrides": {}, "runs": ["a0", "a1", "begun"]},
            {"label": EVIL, "overrides": {"gvu.beta": EVIL}, "runs": ["b0"]}]
    (folder / "experiments.json").write_text(json.dumps({"name": EVIL, "arms": arms}))
    (folder / "begun").mkdir()
    (folder / "begun/metrics.jsonl").write_text('{"step": 0, "eval/overall": 0.9}\n')
    return folder


def test_comparison(tmp_path):
    path = write_comparison(_experiment(tmp_path))
    page = Page(path)
    text = " ".join(page.text.split())
    assert path == tmp_path / "report.html" and "script" not in page.tags and "://" not in path.read_text()
    assert "normal 2 of 3 runs" in text and "1 of 1 runs gvu.beta = <script>" in text
    assert "overall 0.600 ± 1.271 from 0.200 ± 0.000, +0.400 ± 1.271 0.250 from 0.200, +0.050" in text
    assert "overall 0.800 ± 0.000 from 0.900 ± 0.000, −0.100 ± 0.000 0.800" in text and "training 60 ± 127 25" in text
    svg, lines = page.tags.count("svg"), path.read_text().count('faint"')
    assert svg == 6 and lines == 12 + 3, "score, reward, counting, EVIL, KL, entropy: thin lines"
    assert page.tags.count("img") == 1, "a picture that arms share is shown once, and here all are the same"


@pytest.mark.parametrize("content, words", [
    (None, "there is no"), ("{", "not valid JSON"), ('{"name": "x"}', "arms"), ('{"name": "x", "arms": [1]}', "form"),
    ('{"name": "x", "arms": [{"label": "a", "runs": []}]}', "overrides")])
def test_a_wrong_experiment_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "experiments.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as raised:
        write_comparison(tmp_path)
    assert "experiments.json" in str(raised.value) and "\n" not in str(raised.value)


# ---- as a browser shows it -------------------------------------------------------------------------------------------

WIDTHS = (360, 768, 1280)          # a phone, a tablet, a desk
PAPER = {"dark": (18, 20, 23), "light": (251, 251, 250)}


def _look(path: Path, scheme: str) -> tuple[list[dict], list[str], Image.Image]:
    """Opens the page in Chromium at all WIDTHS. Returns what each has become, console messages and a screenshot."""
    page = html.escape(path.read_text())
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in WIDTHS)
    measure = """onload = () => document.body.dataset.said = JSON.stringify(
        [...document.querySelectorAll("iframe")].map(({contentDocument: d}) => (
            {overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth,
             paper: getComputedStyle(d.body).backgroundColor, heading: d.querySelector("h1").innerText})))"""
    around, shot = path.with_name("around.html"), path.with_name(f"{scheme}.png")
    around.write_text(f"<!DOCTYPE html><body style='margin: 0'>{frames}<script>{measure}</script></body>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
               "--virtual-time-budget=2000", "--window-size=2500,920", f"--screenshot={shot}", "--dump-dom",
               f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.search('data-said="([^"]*)"', done.stdout)
    assert said, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(said[1])), console, Image.open(shot).convert("RGB")


if CHROMIUM:          # where there is none, the header of the tests' output says so (conftest.py)

    @pytest.mark.parametrize("scheme", PAPER)
    def test_nothing_overflows_in_a_browser(tmp_path, scheme):
        write_report(_full_run(tmp_path / "run"))
        write_comparison(_experiment(tmp_path / "experiment"))
        for path, heading in ((tmp_path / "run/report.html", "run"), (tmp_path / "experiment/report.html", EVIL)):
            frames, console, shot = _look(path, scheme)
            assert console == []
            for width, frame in zip(WIDTHS, frames, strict=True):
                assert frame["heading"] == heading and frame["overflow"] == 0, (path, width, frame)
                assert frame["paper"] == "rgb({}, {}, {})".format(*PAPER[scheme])
            assert shot.getpixel((5, 5)) == PAPER[scheme]
            assert len(shot.getcolors(1 << 24)) > 50, "something is drawn on it"

    def test_the_browser_would_see_an_overflow_and_an_error(tmp_path):
        (tmp_path / "report.html").write_text(
            "<!DOCTYPE html><h1>x</h1><p style='width: 800px'>wide</p><script>nothing()</script>")
        frames, console, _ = _look(tmp_path / "report.html", "light")
        assert [frame["overflow"] > 0 for frame in frames] == [True, True, False]
        assert len(console) == 3 and "nothing is not defined" in console[0]


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


def test_command(tmp_path, monkeypatch):
    def end(workdir: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["report", str(workdir)])
        with pytest.raises(SystemExit) as ended:
            report.main()
        return ended.value.code

    missing = end(tmp_path / "nowhere")
    assert "is not a run's workdir" in missing and "\n" not in missing

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "config.json").write_text("{")
    broken = end(tmp_path)
    assert "config.json is not valid JSON" in broken and "\n" not in broken

    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "gvu_jax.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and (tmp_path / "report.html").exists()


def test_image_grid_pixels():
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(rows, None, scale=2, marks=np.array([[1, 0, 1], [0, 0.5, 0]])))
    assert grid.shape == (GAP + 2 * (8 + GAP), GAP + 3 * (10 + GAP), 3)
    for r in range(2):
        for c in range(3):
            top, left = GAP + r * (8 + GAP), GAP + c * (10 + GAP)
            picture = grid[top : top + 8, left : left + 10]
            np.testing.assert_array_equal(picture, rows[r, c].repeat(2, axis=0).repeat(2, axis=1))
            expected = WRONG_COLOR if (r + c) % 2 else MIDDLE_COLOR if r else RIGHT_COLOR
            for y, x in [(top - 1, left), (top + 8, left), (top, left - 1), (top, left + 10), (top - BORDER, left)]:
                assert tuple(grid[y, x]) == expected
            assert tuple(grid[top, left - BORDER - 1]) == (255, 255, 255)


def test_image_grid_marks_may_be_bool():
    rows = np.zeros((1, 2, 4, 4, 3), np.uint8)
    drawn = [np.asarray(image_grid(rows, marks=np.array([marks]))) for marks in ([True, False], [1, 0])]
    np.testing.assert_array_equal(*drawn)


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
