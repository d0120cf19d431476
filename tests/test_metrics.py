"""metrics.jsonl can be read back, survives crashes and resumes, and is valid JSON whatever the numbers are."""

import json
import math
import sys

import numpy as np
import pytest

from gvu_jax.metrics import MetricsWriter, Progress, read_metrics


def _reject(constant: str):
    raise AssertionError(f"{constant} is not JSON")


def test_round_trip(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(0, {"eval/overall": 0.25})
        writer.write(np.int64(1), {"reward/mean": np.float32(0.1), "images_per_second": 1234567.0, "kl": 3e-9})
        path = tmp_path / "new" / "run" / "metrics.jsonl"
        assert len(read_metrics(path)) == 2, "each line is there as soon as it is written"
    assert read_metrics(path) == [
        {"step": 0, "eval/overall": 0.25},
        {"step": 1, "reward/mean": 0.1, "images_per_second": 1234570.0, "kl": 3e-9},
    ]
    assert path.read_text().splitlines()[1].startswith('{"step": 1, ')


def test_values_that_json_lacks_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "entropy": 1.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=_reject)
    assert line == {"step": 3, "loss": None, "grad_norm": None, "kl": None, "entropy": 1.5}


def test_resume_leaves_each_step_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the run was killed here; its last checkpoint is of step 2

    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_without_metrics_starts_a_file(tmp_path):
    with MetricsWriter(tmp_path, resume_step=7) as writer:
        writer.write(8, {"loss": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 8, "loss": 1.0}]


def test_a_new_run_does_not_overwrite_another(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    with MetricsWriter(tmp_path) as writer:  # an empty file is no run
        writer.write(0, {"loss": 1.0})
    before = path.read_text()
    with pytest.raises(FileExistsError, match="already holds a run") as error:
        MetricsWriter(tmp_path)
    assert "\n" not in str(error.value)
    assert path.read_text() == before


def test_read_drops_a_cut_last_line_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
        writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward/mean" in events.read_bytes() and b"samples" in events.read_bytes()


def test_without_tensorboard_the_metrics_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
        writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_progress_in_a_log_file_prints_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr("gvu_jax.metrics.SECONDS_BETWEEN_LOG_LINES", 0.0)
    with Progress(total=4, unit="step", label="train", done=1) as progress:
        progress.update(reward=0.4321)
        progress.update(2, reward=0.5)
    out = capsys.readouterr().err
    assert "\r" not in out and "\x1b" not in out
    lines = out.splitlines()
    assert all(line.startswith("train: ") for line in lines)
    assert lines[0].startswith("train: 1/4 (25%)")
    assert any(line.startswith("train: 2/4 (50%)") and line.endswith("reward 0.432") for line in lines)
    assert lines[-1].startswith("train: 4/4 (100%)") and "step/s" in lines[-1] and lines[-1].endswith("reward 0.5")
