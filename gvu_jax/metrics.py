"""What a run says about itself while it runs: numbers for later, a bar for now.

`MetricsWriter` appends one JSON object per line to `workdir/metrics.jsonl`, the file that the report, the notebooks
and the tests read back with `read_metrics`. The same numbers go to `workdir/tensorboard` where the `[tensorboard]`
extra is installed. `Progress` tells whoever waits how fast the work goes and when it will be done.

On several hosts all values are global by the time they arrive here, and only what process 0 writes is kept.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from gvu_jax.decode import what_it_is

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LOG_LINES = 10.0


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl`, and to TensorBoard where it is installed.

    Args:
      workdir: the run's directory; made if missing.
      resume_step: None for a new run. For a run that continues from its checkpoint of step k, k: the lines after
        step k are removed, because the resumed run is about to write them again.

    Raises:
      FileExistsError: a new run was asked for, and `workdir` already holds the metrics of another.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        if path.exists() and path.stat().st_size > 0:
            if resume_step is None:
                raise FileExistsError(f"{path} already holds a run: resume it, or choose another workdir")
            _keep_until(path, resume_step)
        path.touch()
        self._path = path
        self._tensorboard = _open_tensorboard(workdir / "tensorboard", resume_step)

    def has(self, step: int, name: str) -> bool:
        """Whether a line of this step holds a value of this name."""
        return any(line["step"] == step and name in line for line in read_metrics(self._path))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line `{"step": step, name: value, ...}`. The file is closed each time: a mounted bucket shows
        what is in a file only then.

        Values are Python, numpy or JAX scalars. They are kept to six significant digits; NaN and the infinities,
        which JSON lacks, become null.
        """
        scalars = {name: float(value) for name, value in values.items()}
        line = {"step": int(step)} | {name: _json_number(value) for name, value in scalars.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, int(step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Shows `pixels` [H, W, 3], uint8 or float in [0, 1], in TensorBoard; without it, does nothing."""
        if self._tensorboard:
            self._tensorboard.add_image(name, np.asarray(pixels), int(step), dataformats="HWC")

    def close(self) -> None:
        """Closes TensorBoard's files; the writer is of no use afterwards."""
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Reads a metrics file back: one dict per line, in the order written, null as None.

    A last line that is cut short, as a killed run or one that is just writing leaves it, is dropped.

    Raises:
      ValueError: any other line is not a JSON object with a `step`.
    """
    text_lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(text_lines, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(text_lines):
            raise ValueError(f"{path}, line {number}, is not a JSON object with a step: {text[:60]!r}")
    return lines


@contextlib.contextmanager
def replacing(path: str | os.PathLike):
    """Gives a path to write to that becomes `path` at the end: a reader, or a crash, sees the old file or the new one.

    Raises OSError naming `path` where the disk refuses; nothing half-written is left then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in `path`. Raises FileNotFoundError, or ValueError naming the file that holds something else."""
    try:
        value = json.loads(content := Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {what_it_is(content) or error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def _keep_until(path: Path, last_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))


def _json_number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _open_tensorboard(logdir: Path, resume_step: int | None):
    """A `tensorboardX.SummaryWriter` that hides events after `resume_step`, or None where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        logging.info("No TensorBoard events: `pip install 'gvu_jax[tensorboard]'` adds them.")
        return None
    return SummaryWriter(str(logdir), purge_step=None if resume_step is None else resume_step + 1)


# ---------------------------------------------------------------------------------------------------------------
# Seconds
# ---------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of each phase of a step. It waits for the device only when given the state that the step starts from:
    other steps run asynchronously, and what they left running must not be counted."""

    def __init__(self, state, stopped):
        self.on, self.laps, self.stopped = state is not None, {}, stopped
        jax.block_until_ready(state)
        self.began = time.perf_counter()

    def lap(self, phase, result):
        if self.on:
            jax.block_until_ready(result)
            now = time.perf_counter()
            self.laps[f"seconds/{phase}"] = self.laps.get(f"seconds/{phase}", 0.0) + now - self.began
            self.began = now
        return result

    def seconds(self, pictures):
        return self.laps | {"images_per_second": pictures / sum(self.laps.values())}


# ---------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------


class Progress:
    """A progress bar with rate, time left and the latest values; in a log file, a plain line about every 10 s.

    Args:
      total: how many units the work has.
      unit: what one unit is called, e.g. "step"; bytes, "B", are shown as kB, MB, GB.
      label: what the work is called, shown in front.
      done: units finished before this process began, e.g. the step that a run resumes from; they do not count
        towards the rate.
      silent: shows nothing; on several hosts one process speaks for all.
    """

    def __init__(self, total: int, unit: str, label: str, done: int = 0, silent: bool = False):
        if sys.stderr.isatty():
            look = dict(dynamic_ncols=True)
        else:
            look = dict(
                file=_LineStream(),
                mininterval=SECONDS_BETWEEN_LOG_LINES,
                miniters=1,
                position=0,
                bar_format="{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {elapsed} so far, {remaining} left, "
                "{rate_fmt}{postfix}",
            )
        bytes_ = unit == "B"
        self._bar = tqdm(total=total, unit=unit if bytes_ else f" {unit}", unit_scale=bytes_, desc=label,
                         initial=done, disable=silent, **look)

    def update(self, n: int = 1, **shown: float) -> None:
        """Counts `n` more units as done and shows values such as `reward=0.43` at the end of the line."""
        if shown:
            self._bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in shown.items()), refresh=False)
        self._bar.update(n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()


class _LineStream:
    """A stream for tqdm that prints what would be redrawn in place as lines of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing waits: each line is flushed as it is printed."""
