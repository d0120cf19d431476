"""The page a person opens after a run: did it learn, when, and what did it cost?

    python -m gvu_jax.report WORKDIR

reads what the run left in WORKDIR (config.json, metrics.jsonl, samples/, summary.json) and writes WORKDIR/report.html:
one self-contained page, with curves as inline SVG and pictures as base64 PNG. Whatever the run has not written yet is
left out. The trainer calls `write_report` itself, so that the command is only for writing the page anew.
`write_comparison` does the same for several runs side by side, the arms of an experiment, and `write_benchmark` for the
timings of benchmark.py.

The file reads in that order: gather the run, work out each section, put arms side by side, take the close-ups apart,
lay the curves out, write numbers for people. The pages are the jinja2 templates report.html.j2 and comparison.html.j2,
both made of parts.html.j2; they escape every string they are given.
"""

import argparse
import base64
import json
import math
import os
import sys
from pathlib import Path

import jinja2
import numpy as np
from scipy.special import stdtrit

from gvu_jax.metrics import METRICS_FILE, read_json, read_metrics, replace_file
from gvu_jax.pictures import HEATMAP_COLORS, probability_color, text_color

PHASES = ("sample", "render", "reward", "update")
NOT_CATEGORIES = ("overall", "reward")  # the `eval/` names that are no category of the held-out prompts,
MEASURES = ("exact", "objects", "haze")  # nor are these, or these with a category behind them: `eval/exact_counting`
EXACT = "share of pictures that are right and show nothing else"
HAZE = "levels of 255 between empty cells and the background: a rise is a pattern that the reader does not mind"
MOST_STEP_PICTURES = 6
MOST_HARDEST = 10

Points = list[tuple[float, float]]  # a curve: (step, value), in the order of steps


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

    scores, exact, objects, _ = _evaluated_rows(run, summary)
    asked = summary.get("asked_before", {})
    understanding = _before_and_after(
        run, "understanding/", summary.get("understanding_before"), summary.get("understanding_after")
    )
    unified = _before_and_after(run, "unified/", summary.get("unified_before"), summary.get("unified_after"))
    judge = _before_and_after(run, "judge/", summary.get("judge_before"), summary.get("judge_after"))
    areas = _before_and_after({}, "", summary.get("auc_before") or summary.get("auc"), summary.get("auc_after"))
    before, after = (read(f"samples/{moment}.json") or {} for moment in ("before", "after"))
    trust = [told.get("reliability", {}) for told in (before, after)]
    html = _page("report.html.j2").render(
        name=workdir.resolve().name,
        steps=max(run, default=0),
        headline=_headline(run, scores, exact),
        scores=scores,
        exact=exact,
        objects=[row | {"asked": asked.get(row["name"])} for row in objects],
        spam=summary.get("spam"),
        understanding=understanding,
        unified=unified,
        judge=judge,
        closeups=_closeups(before, after),
        scale=[_css(color) for color in HEATMAP_COLORS],
        hardest=_hardest(before.get("prompts", []), after.get("prompts", [])),
        auc=areas,
        calibration=_before_and_after({}, "", *({name: of["error"] for name, of in told.items()} for told in trust)),
        reliability=_reliability_curves(*trust),
        learning=_learning_curves(run, summary.get("judged", True)),
        health=_health_curves(run),
        not_finite=_count_not_finite(metrics),
        pictures=_pictures(workdir / "samples"),
        cost=_cost(run, summary.get("timings") or {}),
        config=None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
    )
    replace_file(workdir / "report.html", html)
    return workdir / "report.html"


def write_comparison(folder: str | os.PathLike) -> Path:
    """Writes `folder/report.html`, the arms of an experiment side by side over their seeds, and returns its path.

    folder/experiments.json says {"name": text, "arms": [{"label": text, "overrides": {setting: value}, "runs": [the
    folder of one run, relative to `folder`, for each seed]}]}. Of each run, summary.json, metrics.jsonl and samples/
    are read; a run that is not finished only counts as such.

    Raises:
      FileNotFoundError: there is no experiments.json.
      ValueError: it, or a file of a run, is not what it should be; the message names the file.
    """
    folder, path = Path(folder), Path(folder) / "experiments.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: it says which runs to compare")
    told = read_json(path)
    try:
        name, arms = told["name"], [_read_arm(folder, **arm) for arm in told["arms"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of the form of write_comparison in gvu_jax/report.py: {error}") from error
    html = _page("comparison.html.j2").render(
        name=name, arms=arms, sections=_compare(arms), charts=_comparison_curves(arms), pictures=_arm_pictures(arms)
    )
    replace_file(folder / "report.html", html)
    return folder / "report.html"


def write_benchmark(folder: str | os.PathLike) -> Path:
    """Writes `folder/report.html` from the benchmark.json there, and returns its path."""
    folder = Path(folder)
    found = read_json(folder / "benchmark.json")
    charts = [
        _chart(f"Cost of a step with {what}", "seconds, median; dashed: the same for every picture",
               {"ours": [list(zip(line["pictures"], line["seconds"]))],
                "linear": [[(0, 0), (line["pictures"][-1], line["seconds"][-1])]]}, (0.0,), along="pictures")
        for what, line in found.get("linear", {}).items()
    ]
    html = _page("benchmark.html.j2").render(found=found, charts=charts, spread=spread)
    replace_file(folder / "report.html", html)
    return folder / "report.html"


def spread(values: list[float], digits: int) -> str:
    """The median, and the least and the largest in brackets."""
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _page(name: str) -> jinja2.Template:
    """A template of this package, with what all of them use: the filters and the frame of a chart."""
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("gvu_jax", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters.update(number=_number, signed=_signed, direction=_direction, percent=_percent, duration=_duration)
    pages.filters.update(interval=_interval, spaced=lambda name: name.replace("_", " "))
    pages.globals.update(frame=dict(width=CHART_WIDTH, height=CHART_HEIGHT, left=LEFT, right=RIGHT, bottom=BOTTOM))
    return pages.get_template(name)


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
    others = {*NOT_CATEGORIES, *MEASURES, *(f"{measure}_{name}" for measure in MEASURES for name in names)}
    return [name for name in names if name not in others]


def _evaluated(run: dict[int, dict[str, float]], measure: str = "") -> dict[int, dict[str, float]]:
    """Of the held-out pictures their score, or one of MEASURES: {step: {"overall" | category: value}}."""
    names = {f"eval/{measure}_{tag}" if measure else f"eval/{tag}": tag for tag in _categories(run)}
    names |= {f"eval/{measure or 'overall'}": "overall"}
    return {step: {tag: values[name] for name, tag in names.items() if name in values} for step, values in run.items()}


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


def _evaluated_rows(run: dict, summary: dict) -> list[list[dict]]:
    """`_before_and_after` of the score of the held-out pictures and of each of MEASURES."""
    return [_before_and_after(_evaluated(run, measure), "", summary.get(f"{part}before"), summary.get(f"{part}after"))
            for measure, part in (("", ""), *((measure, f"{measure}_") for measure in MEASURES))]


def _headline(run: dict, scores: list[dict], exact: list[dict]) -> dict:
    """What the top of the page says; see the template for the keys."""
    overall, exact = (next((row for row in rows if row["name"] == "overall"), {"before": None, "after": None})
                      for rows in (scores, exact))
    rewards = _curve(run, "reward/mean")
    few = max(1, len(rewards) // 20)  # one step's reward is noisy: compare the first and the last twentieth
    ends = [sum(value for _, value in part) / few for part in (rewards[:few], rewards[-few:])] if rewards else []
    return overall | {
        "half_way": _half_way(_curve(run, "eval/overall")),
        "exact": exact,
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
        "hardest": [_embed(path) for path in [samples / "hardest.png"] if path.exists()],
    }


def _embed(path: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    word, _, step = path.stem.partition("_")
    return {"title": f"{word.capitalize()} {step.lstrip('0')}".strip(), "source": f"data:image/png;base64,{data}"}


# ---------------------------------------------------------------------------------------------------------------
# An experiment: several arms, each run with several seeds
# ---------------------------------------------------------------------------------------------------------------


def _read_arm(folder: Path, label: str, overrides: dict, runs: list[str]) -> dict:
    """{label, overrides, all: how many runs; of the finished ones folders, runs {step: {name: value}} and tables}."""
    summaries = {run: read_json(run / "summary.json") for run in map(folder.joinpath, runs)
                 if (run / "summary.json").exists()}
    finished = [run for run, summary in summaries.items() if "after" in summary]
    merged = [_merge_steps(read_metrics(run / METRICS_FILE)) for run in finished]
    return {
        "label": label,
        "overrides": ", ".join(f"{setting} = {value}" for setting, value in overrides.items()),
        "all": len(runs),
        "folders": finished,
        "runs": merged,
        "tables": [_tables(steps, summaries[run]) for run, steps in zip(finished, merged)],
    }


def _tables(run: dict, summary: dict) -> dict[str, list[dict]]:
    """{section: rows {name, before, after}} of one run."""
    scores, exact, objects, haze = _evaluated_rows(run, summary)
    understanding = summary.get("understanding_before"), summary.get("understanding_after")
    return {
        "Held-out score": scores,
        "Exact: right, and nothing else": exact,
        "Objects a picture": objects,
        "Objects asked for": [{"name": name, "before": None, "after": count} for name, count in
                              summary.get("asked_before", {}).items()],
        "Haze where nothing stands": haze,
        "Understanding": _before_and_after(run, "understanding/", *understanding),
        "AUC of the reward": _before_and_after({}, "", summary.get("auc_before"), summary.get("auc_after")),
        "Judgement of its own pictures": _before_and_after(
            run, "judgement/", summary.get("judgement_before"), summary.get("judgement_after")),
        "Another model's answers": _before_and_after(
            run, "judge/", summary.get("judge_before"), summary.get("judge_after")),
        "Picture, caption, picture": _before_and_after(
            run, "unified/", summary.get("unified_before"), summary.get("unified_after")),
        "Wall time, seconds": [{"name": name, "before": None, "after": seconds} for name, seconds in
                    summary.get("timings", {}).items()],
    }


def _compare(arms: list[dict]) -> dict[str, list[dict]]:
    """{section: rows {name, cells: one an arm}}; a cell has the means and intervals of before, after and change."""
    sections: dict[str, dict[str, list]] = {}
    for arm in arms:
        for section, rows in ((section, rows) for tables in arm["tables"] for section, rows in tables.items()):
            sections.setdefault(section, {}).update(dict.fromkeys(row["name"] for row in rows))
    return {
        section: [
            {"name": name, "cells": [_cell([row for tables in arm["tables"] for row in tables[section]
                                            if row["name"] == name]) for arm in arms]}
            for name in names
        ]
        for section, names in sections.items()
        if names
    }


def _cell(rows: list[dict]) -> dict:
    """What an arm's seeds say of one measure: {before, after, change}, each {mean, half} or None where none has it."""
    rows = [row | {"change": _change(row)} for row in rows]
    return {name: mean_interval([row[name] for row in rows if _is_finite(row[name])])
            for name in ("before", "after", "change")}


def mean_interval(values: list[float]) -> dict | None:
    """{mean, half}: the mean of independent runs, and half the width of its 95 % interval by Student's t.

    half = t(0.975, n - 1) s / sqrt(n) with the sample's standard deviation s; None for one value. None for no value.
    """
    if not values:
        return None
    n = len(values)
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(np.mean(values)), "half": half}


def _comparison_curves(arms: list[dict]) -> list[dict]:
    """Scores, exact pictures, reward, KL and entropy: one thin line a seed, a thick one for the mean of an arm."""
    categories = dict.fromkeys(name for arm in arms for run in arm["runs"] for name in _categories(run))
    of = lambda name: {arm["label"]: [_curve(run, name) for run in arm["runs"]] for arm in arms}
    charts = [
        _chart("Held-out score", "share of pictures that the checker calls right", of("eval/overall")),
        _chart("Exact", EXACT, of("eval/exact")),
        _chart("Objects a picture", "held-out prompts", of("eval/objects")),
        _chart("Haze", HAZE, of("eval/haze"), (0.0,)),
        _chart("Reward", "training prompts", of("reward/mean")),
        *(_chart(name.replace("_", " "), "held-out score", of(f"eval/{name}"), (0.0,)) for name in categories
          if name != "overall"),
        _chart("KL to the base model", "nats a token", of("kl"), (0.0,)),
        _chart("Entropy", "nats a token; a fall to zero is collapse", of("entropy")),
    ]
    return [chart for chart in charts if chart]


def _arm_pictures(arms: list[dict]) -> list[dict]:
    """The grids of each arm's first run; arms that start from the same base share the one from before training."""
    embedded = {}  # source -> picture
    for arm in arms:
        for picture in _pictures(arm["folders"][0] / "samples")["pair"] if arm["folders"] else []:
            embedded.setdefault(picture["source"], picture | {"title": f"{arm['label']}: {picture['title'].lower()}"})
    return list(embedded.values())


# ---------------------------------------------------------------------------------------------------------------
# The close-ups that closeup.py writes: words, prompts, reliability
# ---------------------------------------------------------------------------------------------------------------


def _closeups(before: dict, after: dict) -> list[dict]:
    """One a prompt: the picture drawn before training and the one drawn after it, each with its readings."""
    readings = before.get("readings", []) + after.get("readings", [])
    series: dict[tuple, list] = {}  # (drawn, read) -> the prompts' readings, in the prompts' order
    for reading in readings:
        series.setdefault((reading["drawn"], reading["read"]), []).append(reading)
    readers = sorted(series, reverse=True)  # "before" before "after"
    pngs = {"before": before.get("pictures", []), "after": after.get("pictures", [])}
    return [
        {
            "prompt": first["prompt"],
            "tag": first["tag"],
            "pictures": [
                {
                    "drawn": drawn,
                    "source": f"data:image/png;base64,{png[i]}",
                    "readings": [_reading(series[key][i]) for key in readers if key[0] == drawn],
                }
                for drawn, png in pngs.items()
                if i < len(png)
            ],
        }
        for i, first in enumerate(next(iter(series.values()), []))
    ]


def _reading(reading: dict) -> dict:
    colors = [probability_color(probability) for probability in reading["probabilities"]]
    words = zip(reading["words"], reading["probabilities"], colors, strict=True)
    return reading | {
        "words": [{"text": w, "probability": p, "color": _css(c), "ink": text_color(c)} for w, p, c in words]
    }


def _css(color: tuple[int, int, int]) -> str:
    return "rgb({}, {}, {})".format(*color)


def _hardest(before: list[dict], after: list[dict]) -> list[dict]:
    """The hardest prompts of the last evaluation: {prompt, score, exact, reward}, the numbers as {before, after}."""
    told = [{row["prompt"]: row for row in rows} for rows in (before, after)]
    pair = lambda prompt, name: dict(zip(("before", "after"), (rows.get(prompt, {}).get(name) for rows in told)))
    return [
        {"prompt": row["prompt"]} | {name: pair(row["prompt"], name) for name in ("score", "exact", "reward")}
        for row in (after or before)[:MOST_HARDEST]
    ]


def _reliability_curves(before: dict[str, dict], after: dict[str, dict]) -> list[dict]:
    """The share of right pictures over the reward: all before and after, then by category as of the last evaluation."""
    points = lambda told: [[(bin["score"], bin["right"]) for bin in told["bins"]]]
    both = {moment: told["overall"] for moment, told in (("before", before), ("after", after)) if told}
    last = {name: told for name, told in (after or before).items() if name != "overall"}
    note = "share of right pictures over their reward; dashed: the reward is that share"
    charts = [
        _chart(title, note, {name: points(told) for name, told in of.items()}, (0.0, 1.0), width=1.0, along="reward")
        for title, of in (("Reliability", both), (f"By category, {'after' if after else 'before'}", last))
    ]
    return [chart for chart in charts if chart]


# ---------------------------------------------------------------------------------------------------------------
# Curves: values to coordinates. The template draws them.
# ---------------------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 546, 12, 222  # the frame inside the chart, in SVG units
MOST_DOTS = 40  # curves with fewer points show each of them; longer ones are smoothed


def _learning_curves(run: dict, judged: bool) -> list[dict]:
    """Scores over the evaluations and reward over the steps: did it learn, and when."""
    curves = lambda of: {name: [_curve(of, name)] for name in ["overall", *_categories(run)]}
    by_category, exact, objects, haze = (curves(_evaluated(run, measure)) for measure in ("", *MEASURES))
    reward = {"training prompts": [_curve(run, "reward/mean")], "held-out prompts": [_curve(run, "eval/reward")]}
    unified = {name: [_curve(run, f"unified/{name}")] for name in ("recovery", "complete", "correct", "language")}
    lengths = {"training": [_curve(run, "caption/length")], "held-out": [_curve(run, "unified/length")]}
    charts = [
        _chart("Held-out score by category",
               "share of pictures that the checker calls right" if judged else "the reward: nothing else judges",
               by_category, (0.0,)),
        _chart("Exact by category", EXACT, exact, (0.0,)),
        _chart("Objects a picture", "more than was asked for is the sign of spam", objects, (0.0,)),
        _chart("Haze", HAZE, {"overall": haze["overall"]}, (0.0,)),
        _chart("Reward", "what the method maximises", reward),
        _chart("Picture, caption, picture", "share of captions", unified, (0.0,)),
        _chart("Caption length", "tokens, with the end", lengths, (0.0,)),
    ]
    return [chart for chart in charts if chart]


def _health_curves(run: dict) -> list[dict]:
    """What a researcher watches to see whether the optimisation is sound."""
    charts = [
        _chart("KL to the base model", "nats a token", {"kl": [_curve(run, "kl")]}, (0.0,)),
        _chart("Entropy", "nats a token; a fall to zero is collapse", {"entropy": [_curve(run, "entropy")]}),
        _chart("Flat groups", "share of groups whose rewards are all equal: nothing is learned from them",
               {"flat groups": [_curve(run, "reward/flat")]}, (0.0, 1.0)),
        _chart("Gradient norm", "before clipping", {"grad norm": [_curve(run, "grad_norm")]}, (0.0,)),
        _chart("Log-prob gap", "sampler against trainer, nats a token; rounding alone, but for int8",
               {"logp gap": [_curve(run, "logp_gap")]}),
    ]
    return [chart for chart in charts if chart]


def _chart(title: str, note: str, curves: dict[str, list[Points]], reach: tuple = (), width: float = 0,
           along: str = "step") -> dict | None:
    """Lays curves {name: one [(step, value), ...] for each seed} out in one frame; None where none has a point.

    Seeds become thin lines, and their mean a thick one. Steps count from 0; the y axis spans the values and reaches
    those of `reach`. With a `width`, what counts from 0 to it is no step but what the values should be: the chart gets
    a diagonal. `along` is what counts. See the template's `chart` for the keys of the result.
    """
    curves = {name: [points for points in seeds if points] for name, seeds in curves.items()}
    curves = {name: seeds for name, seeds in curves.items() if _mean_curve(seeds)}
    if not curves:
        return None
    values = [value for seeds in curves.values() for points in seeds for _, value in points]
    y_ticks = _round_numbers(min(values + [*reach]), max(values + [*reach]))
    last = width or max(1, *(points[-1][0] for seeds in curves.values() for points in seeds))

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)

    def path(points: Points) -> str:
        return " ".join(f"{x(step)},{y(value)}" for step, value in points)

    drawn = []
    for index, (name, seeds) in enumerate(curves.items()):
        mean = _mean_curve(seeds)
        smooth = len(mean) > MOST_DOTS
        thin = seeds if len(seeds) == 1 else [_smooth(points) if smooth else points for points in seeds]
        drawn.append({
            "name": name,
            "color": "ink" if name == "overall" else f"c{index % 8}",
            "low": min(value for _, value in mean),
            "high": max(value for _, value in mean),
            "last": mean[-1][1],
            "faint": [path(points) for points in thin] if smooth or len(seeds) > 1 else [],
            "line": path(_smooth(mean) if smooth else mean),
            "dots": [] if smooth else [(x(s), y(v), f"{name}, {along} {s:.4g}: {v:.4g}")
                                       for s, v in mean],
        })
    return {
        "title": title,
        "note": note,
        "y_ticks": [(y(value), f"{value:.4g}".replace("e-0", "e-")) for value in y_ticks],
        "x_ticks": [(x(step), f"{step:g}") for step in _round_numbers(0, last)
                    if step <= last and (width or step % 1 == 0)],
        "diagonal": path([(0, 0), (width, width)]) if width else "",
        "curves": drawn,
    }


def _mean_curve(seeds: list[Points]) -> Points:
    """The mean over seeds, at the steps that all of them have."""
    values = [dict(points) for points in seeds]
    shared = [step for step in (values or [{}])[0] if all(step in other for other in values)]
    return [(step, sum(of[step] for of in values) / len(values)) for step in shared]


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
# Numbers for people: the template's filters
# ---------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return f"{value:.3f}" if _is_finite(value) else "–"


def _change(row: dict) -> float | None:
    """after - before of a row {before, after} to three decimals; None where one of them is missing."""
    known = _is_finite(row["before"]) and _is_finite(row["after"])
    return round(row["after"] - row["before"], 3) + 0.0 if known else None  # + 0.0: no change has no sign


def _interval(measured: dict | None, form: str = ".3f") -> str:
    """A mean and its interval, e.g. "0.746 ± 0.020"; without the interval where one run only has the value."""
    if measured is None:
        return "–"
    half = "" if measured["half"] is None else f" ± {measured['half']:{form.strip('+')}}"
    return f"{measured['mean']:{form}}{half}".replace("-", "−")


def _signed(row: dict) -> str:
    """The change of a row {before, after}, e.g. "+0.120"."""
    change = _change(row)
    return "–" if change is None else f"{change:+.3f}".replace("-", "−")


def _direction(row: dict, falling: bool = False) -> str:
    """The CSS class for a row's change: is it for the better? `falling` values are the better the lower they are."""
    change = _change(row)
    return "soft" if not change else "up" if (change > 0) != falling else "down"


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
    workdir = parser.parse_args().workdir.expanduser()
    if not any((workdir / name).is_file() for name in ("config.json", METRICS_FILE)):
        sys.exit(f"{workdir} is not a run's workdir: it holds neither config.json nor {METRICS_FILE}")
    try:
        print(write_report(workdir))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
