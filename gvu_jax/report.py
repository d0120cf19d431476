"""The page a person opens after a run: did it learn, when, and what did it cost?

    python -m gvu_jax.report WORKDIR

reads what the run left in WORKDIR (config.json, metrics.jsonl, samples/*.png, summary.json) and writes
WORKDIR/report.html: one self-contained page, with curves as inline SVG and pictures as base64 PNG. Whatever the run
has not written yet is left out. The trainer calls `write_report` itself, so that the command is only for writing
the page anew.

The file reads in that order: gather the run, work out each section, lay the curves out, paint the pictures, write
numbers for people. The page itself is the jinja2 template report.html.j2; it escapes every string it is given.
"""

import argparse
import base64
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gvu_jax.metrics import METRICS_FILE, read_json, read_metrics, replace_file, replacing

PHASES = ("sample", "render", "reward", "update")
NOT_CATEGORIES = ("overall", "reward")  # the `eval/` names that are no category of the held-out prompts
MOST_STEP_PICTURES = 6

Points = list[tuple[int, float]]  # a curve: (step, value), in the order of steps


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes `workdir/report.html` from what the run has left in `workdir` so far, and returns its path.

    Raises:
      ValueError: a file of the run is not what it should be; the message names the file.
    """
    workdir = Path(workdir)
    read = lambda name: read_json(workdir / name) if (workdir / name).exists() else None
    config, summary = read("config.json"), read("summary.json") or {}
    metrics = read_metrics(workdir / METRICS_FILE) if (workdir / METRICS_FILE).exists() else []
    run = _merge_steps(metrics)

    scores = _before_and_after(run, "eval/", summary.get("before"), summary.get("after"))
    understanding = _before_and_after(
        run, "understanding/", summary.get("understanding_before"), summary.get("understanding_after")
    )
    unified = _before_and_after(run, "unified/", summary.get("unified_before"), summary.get("unified_after"))
    areas = _before_and_after({}, "", summary.get("auc_before") or summary.get("auc"), summary.get("auc_after"))
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("gvu_jax", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page.filters.update(number=_number, signed=_signed, direction=_direction, percent=_percent, duration=_duration)
    html = page.get_template("report.html.j2").render(
        name=workdir.resolve().name,
        steps=max(run, default=0),
        headline=_headline(run, scores),
        scores=[row for row in scores if row["name"] != "reward"],
        understanding=understanding,
        unified=unified,
        auc=areas,
        learning=_learning_curves(run),
        health=_health_curves(run),
        not_finite=_count_not_finite(metrics),
        pictures=_pictures(workdir / "samples"),
        cost=_cost(run, summary.get("timings") or {}),
        config=None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
        frame={"width": CHART_WIDTH, "height": CHART_HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
    )
    replace_file(workdir / "report.html", html)
    return workdir / "report.html"


# ---------------------------------------------------------------------------------------------------------------
# The run, as numbers
# ---------------------------------------------------------------------------------------------------------------


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _merge_steps(lines: list[dict]) -> dict[int, dict[str, float]]:
    """{step: {name: value}} in the order of steps: training and evaluation lines of one step become one."""
    run: dict[int, dict[str, float]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        finite = {name: value for name, value in line.items() if name != "step" and _is_finite(value)}
        run.setdefault(line["step"], {}).update(finite)
    return run


def _count_not_finite(lines: list[dict]) -> dict[str, int]:
    """{name: how many of its values were NaN or infinite}, for the names that had any."""
    counts: dict[str, int] = {}
    for line in lines:
        for name, value in line.items():
            if not _is_finite(value):
                counts[name] = counts.get(name, 0) + 1
    return counts


def _curve(run: dict[int, dict[str, float]], name: str) -> Points:
    """The finite values of one metric: [(step, value), ...]."""
    return [(step, values[name]) for step, values in run.items() if name in values]


def _categories(run: dict[int, dict[str, float]]) -> list[str]:
    """The categories of the held-out prompts, in the order in which the run first names them."""
    names = {name.removeprefix("eval/"): None for values in run.values() for name in values if name.startswith("eval/")}
    return [name for name in names if name not in NOT_CATEGORIES]


def _before_and_after(run: dict, prefix: str, before: dict | None, after: dict | None) -> list[dict]:
    """Rows {name, before, after}, "overall" first; a value that the run does not have is None.

    `before` and `after` are the summary's. Where it lacks one, the first and the last step that carry a metric named
    `prefix` stand in; with one such step only there is no after yet.
    """
    measured = {
        step: {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        for step, values in run.items()
        if any(name.startswith(prefix) for name in values)
    }
    before = before or (measured[min(measured)] if measured else {})
    after = after or (measured[max(measured)] if len(measured) > 1 else {})
    known = [{name: value for name, value in scores.items() if _is_finite(value)} for scores in (before, after)]
    rows = [{"name": name, "before": known[0].get(name), "after": known[1].get(name)} for name in {**before, **after}]
    return sorted(rows, key=lambda row: row["name"] != "overall")


def _headline(run: dict, scores: list[dict]) -> dict:
    """What the top of the page says; see the template for the keys."""
    overall = next((row for row in scores if row["name"] == "overall"), {"before": None, "after": None})
    rewards = _curve(run, "reward/mean")
    few = max(1, len(rewards) // 20)  # one step's reward is noisy: compare the first and the last twentieth
    ends = [sum(value for _, value in part) / few for part in (rewards[:few], rewards[-few:])] if rewards else []
    return overall | {
        "half_way": _half_way(_curve(run, "eval/overall")),
        "reward": ends if len(rewards) > 1 else [],
    }


def _half_way(evaluations: Points) -> int | None:
    """The first evaluated step with at least half of the final gain; None without a gain or with two points."""
    if len(evaluations) < 3 or evaluations[-1][1] <= evaluations[0][1]:
        return None
    half = (evaluations[0][1] + evaluations[-1][1]) / 2
    return next(step for step, value in evaluations if value >= half)


def _cost(run: dict, totals: dict[str, float]) -> dict:
    """Seconds by phase: `step`, the mean over the training lines after the first (it compiles); `total`, the run's."""
    trained = [values for values in run.values() if any(f"seconds/{phase}" in values for phase in PHASES)]
    steady = trained[1:] or trained
    a_step = {}
    for phase in PHASES:
        seconds = [values[f"seconds/{phase}"] for values in steady if f"seconds/{phase}" in values]
        if seconds:
            a_step[phase] = sum(seconds) / len(seconds)
    speeds = [values["images_per_second"] for values in steady if "images_per_second" in values]
    return {
        "step": _stack(a_step),
        "total": _stack({name: seconds for name, seconds in totals.items() if _is_finite(seconds)}),
        "a_step": sum(a_step.values()),
        "run": sum(seconds for seconds in totals.values() if _is_finite(seconds)),
        "images_per_second": sum(speeds) / len(speeds) if speeds else None,
    }


def _stack(seconds: dict[str, float]) -> list[dict]:
    """The parts of a stacked bar: {name, seconds, share in percent}."""
    whole = sum(seconds.values()) or 1.0
    return [{"name": name, "seconds": value, "share": 100 * value / whole} for name, value in seconds.items()]


def _pictures(samples: Path) -> dict:
    """The sample grids: `pair`, the first and the last; `steps`, up to six evenly spaced ones in between."""
    steps = sorted(samples.glob("step_*.png"))
    first = [path for path in [samples / "before.png", *steps[:1]] if path.exists()][:1]
    last = [path for path in [samples / "after.png", *steps[-1:]] if path.exists()][:1]
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, MOST_STEP_PICTURES)}) if steps else []
    return {
        "pair": [_embed(path) for path in dict.fromkeys(first + last)],
        "steps": [_embed(steps[i]) for i in shown],
        "all_steps": len(steps),
    }


def _embed(path: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    word, _, step = path.stem.partition("_")
    return {"title": f"{word.capitalize()} {step.lstrip('0')}".strip(), "source": f"data:image/png;base64,{data}"}


# ---------------------------------------------------------------------------------------------------------------
# Curves: values to coordinates. The template draws them.
# ---------------------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 546, 12, 222  # the frame inside the chart, in SVG units
MOST_DOTS = 40  # curves with fewer points show each of them; longer ones are smoothed


def _learning_curves(run: dict) -> list[dict]:
    """Scores over the evaluations and reward over the steps: did it learn, and when."""
    by_category = {name: _curve(run, f"eval/{name}") for name in ["overall", *_categories(run)]}
    reward = {"training prompts": _curve(run, "reward/mean"), "held-out prompts": _curve(run, "eval/reward")}
    unified = {name: _curve(run, f"unified/{name}") for name in ("recovery", "complete", "correct", "language")}
    lengths = {"training": _curve(run, "caption/length"), "held-out": _curve(run, "unified/length")}
    charts = [
        _chart("Held-out score by category", "share of pictures that the checker calls right", by_category, floor=0.0),
        _chart("Reward", "what the method maximises", reward),
        _chart("Picture, caption, picture", "share of captions", unified, floor=0.0),
        _chart("Caption length", "tokens, with the end", lengths, floor=0.0),
    ]
    return [chart for chart in charts if chart]


def _health_curves(run: dict) -> list[dict]:
    """What a researcher watches to see whether the optimisation is sound."""
    charts = [
        _chart("KL to the base model", "nats a token", {"kl": _curve(run, "kl")}, floor=0.0),
        _chart("Entropy", "nats a token; a fall to zero is collapse", {"entropy": _curve(run, "entropy")}),
        _chart("Gradient norm", "before clipping", {"grad norm": _curve(run, "grad_norm")}, floor=0.0),
        _chart("Log-prob gap", "sampler against trainer, nats a token", {"logp gap": _curve(run, "logp_gap")}),
    ]
    return [chart for chart in charts if chart]


def _chart(title: str, note: str, curves: dict[str, Points], floor: float | None = None) -> dict | None:
    """Lays curves {name: [(step, value), ...]} out in one frame; None where no curve has a point.

    Steps count from 0; the y axis spans the values, and reaches `floor` where one is given. See the template's
    `chart` for the keys of the result.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    values = [value for points in curves.values() for _, value in points] + ([] if floor is None else [floor])
    y_ticks = _round_numbers(min(values), max(values))
    last = max(1, *(points[-1][0] for points in curves.values()))

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    def path(points: Points) -> str:
        return " ".join(f"{x(step)},{y(value)}" for step, value in points)

    return {
        "title": title,
        "note": note,
        "y_ticks": [(y(value), f"{value:.4g}") for value in y_ticks],
        "x_ticks": [(x(step), f"{step:.0f}") for step in _round_numbers(0, last) if step <= last and step % 1 == 0],
        "curves": [
            {
                "name": name,
                "color": "ink" if name == "overall" else f"c{index % 8}",
                "low": min(value for _, value in points),
                "high": max(value for _, value in points),
                "last": points[-1][1],
                "faint": path(points) if len(points) > MOST_DOTS else "",
                "line": path(_smooth(points) if len(points) > MOST_DOTS else points),
                "dots": [(x(s), y(v), f"{name}, step {s}: {v:.4g}") for s, v in points if len(points) <= MOST_DOTS],
            }
            for index, (name, points) in enumerate(curves.items())
        ],
    }


def _round_numbers(low: float, high: float) -> list[float]:
    """Up to six evenly spaced round numbers; the first is at most `low`, the last at least `high`."""
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):  # a flat curve still needs a scale
        margin = 0.1 * abs(high) or 1.0
        low, high = low - margin, high + margin
    magnitude = 10.0 ** math.floor(math.log10((high - low) / 4))
    spacing = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= (high - low) / 4)
    return [k * spacing for k in range(math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9) + 1)]


def _smooth(points: Points) -> Points:
    """The centred moving mean over a twentieth of the points, narrower at both ends."""
    reach = max(1, len(points) // 40)
    values = np.array([value for _, value in points])
    return [(step, float(values[max(0, i - reach) : i + reach + 1].mean())) for i, (step, _) in enumerate(points)]


# ---------------------------------------------------------------------------------------------------------------
# Pictures: grids of samples, and one picture beside the probabilities of its prompt's words
# ---------------------------------------------------------------------------------------------------------------

GAP, BORDER, FONT_SIZE, LINE_HEIGHT = 8, 3, 14, 18  # pixels
RIGHT_COLOR, WRONG_COLOR = (0, 158, 115), (213, 40, 40)  # a green and a red that the colour-blind can tell apart


def image_grid(
    rows: np.ndarray, captions: list[str] | None = None, scale: int = 1, marks: np.ndarray | None = None
) -> Image.Image:
    """Paints R rows of C pictures on white, each row under its caption.

    Args:
      rows: [R, C, H, W, 3], uint8 or float in [0, 1].
      captions: R texts, mostly the prompts, or None. A caption longer than two lines is cut short.
      scale: each picture is enlarged this many times, a pixel becoming a square of pixels.
      marks: bool [R, C] or None: a thin border round each picture, green where True (the checker says that it shows
        what the prompt asks for), red where False. The border lies outside the picture and covers none of it.
    """
    rows = _to_uint8(np.asarray(rows)).repeat(scale, axis=2).repeat(scale, axis=3)  # [R, C, scale H, scale W, 3]
    count, columns, height, width = rows.shape[:4]
    grid_width = GAP + columns * (width + GAP)
    font = ImageFont.load_default(FONT_SIZE)
    characters = max(12, int((grid_width - 2 * GAP) // font.getlength("n")))
    texts = [textwrap.wrap(text, characters, max_lines=2, placeholder=" ...") for text in captions or [""] * count]
    if len(texts) != count:
        raise ValueError(f"{count} rows of pictures need as many captions, not {len(texts)}")

    above = [GAP + len(text) * LINE_HEIGHT + (GAP if text else 0) for text in texts]  # pixels, of each row
    canvas_height = sum(above) + count * height + GAP
    canvas = Image.new("RGB", (grid_width, canvas_height), "white")
    pen = ImageDraw.Draw(canvas)
    top = 0
    for r, text in enumerate(texts):
        for i, line in enumerate(text):
            pen.text((GAP, top + GAP + i * LINE_HEIGHT), line, fill="black", font=font)
        top += above[r]
        for c in range(columns):
            left = GAP + c * (width + GAP)
            if marks is not None:
                box = (left - BORDER, top - BORDER, left + width + BORDER - 1, top + height + BORDER - 1)
                pen.rectangle(box, fill=RIGHT_COLOR if marks[r][c] else WRONG_COLOR)
            canvas.paste(Image.fromarray(rows[r, c]), (left, top))
        top += height
    return canvas


def write_picture(path: str | os.PathLike, picture: Image.Image) -> None:
    """Writes a picture in the format that the path's ending names, whole or not at all.

    Raises ValueError for an unknown ending, OSError naming the path where the disk refuses.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} does not end as a picture does: call it, for example, {Path(path).stem}.png")
    with replacing(path) as temporary:
        picture.save(temporary, kind)


HEATMAP_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, p = 0 to 1
PANEL, PICTURE, WORD_SIZE, WORD_HEIGHT, LEGEND_HEIGHT = 420, 288, 20, 34, 64  # pixels


def word_heatmap(picture: np.ndarray, words: list[str], probabilities: np.ndarray, reward: float) -> Image.Image:
    """A picture beside the words of its prompt, each on the colour of its probability, with the scale below.

    Args:
      picture: [H, W, 3], uint8 or float in [0, 1]. A small one is enlarged by a whole factor, a big one shrunk.
      words: the prompt; a word that is wider than the panel is cut short.
      probabilities: one of each word, in [0, 1].
      reward: written above the words.
    """
    shown = Image.fromarray(_to_uint8(np.asarray(picture)))
    scale = max(1, PICTURE // max(shown.size))
    shown = shown.resize((scale * shown.width, scale * shown.height), Image.Resampling.NEAREST)
    shown.thumbnail((2 * PICTURE, 2 * PICTURE))
    font, small = ImageFont.load_default(WORD_SIZE), ImageFont.load_default(FONT_SIZE)

    placed, x, y = [], 0, WORD_HEIGHT  # (word, probability, x, y, width), from the panel's corner
    for word, probability in zip(words, probabilities, strict=True):
        word = _cut_short(word, font, PANEL - 2 * GAP)
        width = math.ceil(font.getlength(word)) + 2 * GAP
        if x > 0 and x + width > PANEL:
            x, y = 0, y + WORD_HEIGHT
        placed.append((word, probability, x, y, width))
        x += width + BORDER

    panel_height = y + WORD_HEIGHT + LEGEND_HEIGHT
    left = shown.width + 3 * GAP
    canvas = Image.new("RGB", (left + PANEL + 2 * GAP, max(shown.height, panel_height) + 2 * GAP), "white")
    canvas.paste(shown, (GAP, GAP))
    pen = ImageDraw.Draw(canvas)
    pen.text((left, GAP), f"reward {reward:.3g}", fill="black", font=font)
    for word, probability, x, y, width in placed:
        color = probability_color(probability)
        x, y = left + x, GAP + y
        pen.rounded_rectangle((x, y, x + width - 1, y + WORD_HEIGHT - BORDER - 1), radius=BORDER + 1, fill=color)
        middle = y + (WORD_HEIGHT - BORDER) / 2
        pen.text((x + GAP, middle), word, fill=text_color(color), font=font, anchor="lm")

    top = GAP + panel_height - LEGEND_HEIGHT + GAP
    pen.text((left, top), "probability of the word, given the picture and the words before", fill="black", font=small)
    for i in range(PANEL):
        pen.line((left + i, top + 20, left + i, top + 32), fill=probability_color(i / (PANEL - 1)))
    for tick, anchor in ((0, "la"), (0.25, "ma"), (0.5, "ma"), (0.75, "ma"), (1, "ra")):
        pen.text((left + tick * PANEL, top + 36), f"{tick:g}", fill="black", font=small, anchor=anchor)
    return canvas


def _cut_short(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + "...") > width:
        text = text[: len(text) * 9 // 10]
    return text + "..."


def probability_color(probability: float) -> tuple[int, int, int]:
    """Dark violet for 0, over blue and green, to yellow for 1: equal steps look equal, to the colour-blind too."""
    stops = np.linspace(0, 1, len(HEATMAP_COLORS))
    return tuple(round(float(np.interp(probability, stops, channel))) for channel in zip(*HEATMAP_COLORS))


def text_color(background: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more (WCAG's relative luminance): a contrast of 4.5 at the least."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(background) / 255]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "white"


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# Numbers for people: the template's filters
# ---------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return f"{value:.3f}" if _is_finite(value) else "–"


def _change(row: dict) -> float | None:
    """after - before of a row {before, after}; None where one of them is missing."""
    known = _is_finite(row["before"]) and _is_finite(row["after"])
    return row["after"] - row["before"] if known else None


def _signed(row: dict) -> str:
    """The change of a row {before, after}, e.g. "+0.120"."""
    change = _change(row)
    return "–" if change is None else f"{change:+.3f}".replace("-", "−")


def _direction(row: dict) -> str:
    """The CSS class for a row's change."""
    change = _change(row)
    return "up" if change and change > 0 else "down" if change and change < 0 else "soft"


def _percent(row: dict) -> str:
    """The relative change of a row {before, after}, e.g. "+57 %"; empty where there is none."""
    change = _change(row)
    return "" if change is None or row["before"] <= 0 else f"{100 * change / row['before']:+.0f} %".replace("-", "−")


def _duration(seconds: float) -> str:
    """Seconds for people: "0.84 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def main() -> None:
    """`python -m gvu_jax.report WORKDIR`."""
    parser = argparse.ArgumentParser(prog="python -m gvu_jax.report", description="Write a run's report.html anew.")
    parser.add_argument("workdir", type=Path)
    workdir = parser.parse_args().workdir
    if not any((workdir / name).is_file() for name in ("config.json", METRICS_FILE)):
        sys.exit(f"{workdir} is not a run's workdir: it holds neither config.json nor {METRICS_FILE}")
    try:
        print(write_report(workdir))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
