"""What happens to a run from outside: killed, told to stop, its files damaged. The same command must go on from there.

    python -m pytest tests/test_faults.py --faults=30     # as many kills, and stops, of a run of each method

The default is one of each, of a run of GvU.
"""
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from conftest import ROOT, one_device, put_untrained, tiny_config
from gvu_jax import alarms, checkpoint, optim
from gvu_jax.metrics import read_metrics
from gvu_jax.stop import STOPPED
from gvu_jax.train import alone
from test_internal_gap import gap_config
from test_uae import uae_config

PROGRAM = """
import json, sys
from pathlib import Path
from ml_collections import ConfigDict
from gvu_jax import train
from gvu_jax.stop import STOPPED, Stop
with Stop() as stop:
    sys.exit(STOPPED if train.train(ConfigDict(json.loads(sys.argv[1])), Path(sys.argv[2]), stop) is None else 0)
"""


CONFIGS = {"gvu": tiny_config, "internal_gap": lambda: gap_config("csft", **{"internal_gap.threshold": 0.75}),
           "uae": uae_config}                                            # half of the prompts are drawn again; three stages


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", list(CONFIGS) if metafunc.config.getoption("faults") > 1 else ["gvu"])


def undisturbed(method, folder):
    """(config, the metrics of the undisturbed run, seconds that a start takes when all is compiled)."""
    config = CONFIGS[method]()
    config.update(steps=8, checkpoint_every=1, log_every=2)
    config.eval.every = 4
    put_untrained(config)
    assert start(config, folder / "whole").wait() == 0
    began = time.time()
    assert start(config, folder / "again").wait() == 0
    return config, timeless(folder / "whole"), time.time() - began


def start(config, work):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, config.to_json(), str(work)], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=(work.parent / f"{work.name}.log").open("a"))


def timeless(work):
    return [{name: value for name, value in line.items() if "second" not in name}
            for line in read_metrics(work / "metrics.jsonl")]


def test_a_disturbed_run_goes_on_as_if_nothing_had_happened(method, faults, tmp_path):
    """Killed at any moment, saving included, or told to stop, when it ends with the documented status, in turn: the
    metrics at the end are the undisturbed run's, bit for bit. Sittings that end before their signal do not count."""
    config, whole, seconds = undisturbed(method, tmp_path)
    work, moments, ends = tmp_path / "disturbed", random.Random(0), []
    while min(ends.count(-signal.SIGKILL), ends.count(STOPPED)) < faults:
        assert len(ends) < 20 * faults, ends
        if (work / "summary.json").exists() and '"after"' in (work / "summary.json").read_text():
            shutil.rmtree(work)                                       # it came to its end: disturb another one
        number = signal.SIGKILL if ends.count(-signal.SIGKILL) <= ends.count(STOPPED) else signal.SIGTERM
        process = start(config, work)
        try:
            ends.append(process.wait(timeout=moments.uniform(0.1, 1.1) * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            ends.append(process.wait(timeout=120))
        # Before Python has loaded the package, nothing listens yet and the signal ends it as it ends any program.
        assert ends[-1] in ({0, STOPPED, -number} if number == signal.SIGTERM else {0, -number})
    assert start(config, work).wait(timeout=600) == 0, (tmp_path / "disturbed.log").read_text()[-3000:]
    assert timeless(work) == whole
    print(f"{ends.count(-signal.SIGKILL)} sittings killed, {ends.count(STOPPED)} stopped, {ends.count(0)} ended before")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match="another process trains in"):
        with alone(tmp_path):
            pass
    with alone(tmp_path):                                                          # the first one has ended
        pass


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture
def states(tmp_path):
    """A run's folder with the states of steps 1 and 2, and what is in them."""
    trainable = {"ar": {"lm_norm": {"scale": np.arange(6.0, dtype=np.float32)}}}
    opt_state = optax.adam(1e-3).init(trainable)
    writer = checkpoint.Checkpoints(tmp_path, one_device())
    for step in (1, 2):
        writer.save(step, trainable=jax.tree.map(lambda x: x + step, trainable), opt_state=opt_state)
    writer.close()
    return tmp_path, trainable, opt_state


def test_every_damage_to_every_file_of_a_state_is_noticed(states, tmp_path):
    newest, table = states[0] / "checkpoints/2", {}
    for file in [path for path in newest.rglob("*") if path.is_file()]:
        for name, damage in DAMAGE.items():
            whole = file.read_bytes()
            if whole:
                damage(file)
                table[f"{name} {file.relative_to(newest)}"] = checkpoint.differing(newest)
                file.write_bytes(whole)
    assert checkpoint.differing(newest) == "" and len(table) > 40
    assert [damage for damage, noticed in table.items() if not noticed] == [f"deleted {checkpoint.DIGEST}"]
    print(f"{len(table)} damages: {sum(map(bool, table.values()))} noticed, the rest harmless")


def test_every_damage_to_every_file_of_a_base_is_refused(tiny, tmp_path):
    checkpoint.save_model(tmp_path / "base", *tiny[1:])
    files = [path for path in (tmp_path / "base").rglob("*") if path.is_file() and path.name != checkpoint.DIGEST]
    assert len(files) > 10
    for file in files:
        for damage in DAMAGE.values():
            whole = file.read_bytes()
            if not whole:
                continue
            damage(file)
            with pytest.raises((ValueError, OSError)) as refusal:
                checkpoint.describe_model(tmp_path / "base")
            assert str(tmp_path / "base") in str(refusal.value)
            file.write_bytes(whole)
    checkpoint.describe_model(tmp_path / "base")


def test_the_state_before_a_broken_one_is_used_and_the_run_goes_on(states, capsys):
    work, trainable, opt_state = states
    DAMAGE["flipped"](next(path for path in (work / "checkpoints/2").rglob("d/*") if path.is_file()))
    again = checkpoint.Checkpoints(work, one_device(), writing=True)
    assert again.newest_whole() == 1
    warning = capsys.readouterr().err
    assert "step 2" in warning and "step 1" in warning
    loaded = again.load(1, trainable=trainable)["trainable"]["ar"]["lm_norm"]["scale"]
    np.testing.assert_array_equal(loaded, np.arange(6.0) + 1)
    again.save(2, trainable=trainable, opt_state=opt_state)
    assert again.newest_whole() == 2 and not capsys.readouterr().err
    again.close()


def test_where_no_state_is_whole_the_run_does_not_silently_start_over(states):
    for step in (1, 2):
        (states[0] / f"checkpoints/{step}" / checkpoint.DIGEST).write_text("{")
    again = checkpoint.Checkpoints(states[0], one_device())
    with pytest.raises(ValueError, match="no state .* is whole"):
        again.newest_whole()
    again.close()


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    config = tiny_config().optim
    optimizer = optim.build(config, 10)
    params = {"w": np.ones(3, np.float32)}
    state = optimizer.init(params)
    for bad in range(1, 4):
        updates, after = optimizer.update({"w": np.full(3, np.nan, np.float32)}, state, params)
        assert not np.any(updates["w"]) and int(after.notfinite_count) == int(after.total_notfinite) == bad
        for old, new in zip(*map(jax.tree.leaves, (state.inner_state, after.inner_state))):
            np.testing.assert_array_equal(old, new)
        state = after


@pytest.mark.parametrize("sign, word", [
    ({"kl": 9.0}, "kl 9"), ({"entropy": 1e-4}, "entropy"), ({"duplicates": 1.0}, "100%")])
def test_signs_of_collapse_warn_and_can_end_a_run(sign, word, capsys):
    config = tiny_config().alarm
    healthy = {"kl": 0.1, "entropy": 2.0, "duplicates": 0.0, "skipped_in_a_row": 0}
    alarms.collapse(config, 5, healthy)
    assert not capsys.readouterr().err
    alarms.collapse(config, 5, healthy | sign)
    assert word in capsys.readouterr().err
    config.stop = True
    with pytest.raises(FloatingPointError, match=word):
        alarms.collapse(config, 5, healthy | sign)
    with pytest.raises(FloatingPointError, match="in a row"):
        alarms.collapse(config, 5, healthy | {"skipped_in_a_row": config.skipped})


def drawn(**objects):
    return {"asked": {"overall": 1.5, "single": 1.0, "two": 2.0}, "objects": {"overall": 9.0} | objects}


def test_pictures_that_fill_up_warn_and_can_end_a_run(capsys):
    config, before = tiny_config().alarm, {"overall": 1.5, "single": 1.3, "two": 1.4}
    fine = [drawn(single=1.3, two=1.4), drawn(single=1.79, two=2.49), drawn(single=0.0, two=0.0)]
    assert [alarms.spam(config, 5, found, before) for found in fine] == [None] * 3
    assert alarms.spam(config, 0, drawn(single=9.0, two=9.0), {}) is None, "nothing to compare with"
    assert not capsys.readouterr().err

    warning = alarms.spam(config, 5, drawn(single=1.81, two=2.1), before)
    assert capsys.readouterr().err == f"warning: {warning}\n" and "\n" not in warning
    assert "single prompts ask for 1.00 objects a picture and get 1.81 (1.30 before training)" in warning
    assert "spam" in warning and "two prompts" not in warning and "overall" not in warning
    assert "two prompts" in alarms.spam(config, 5, drawn(single=1.81, two=2.51), before)

    config.stop = True
    with pytest.raises(FloatingPointError, match="two prompts ask for 2.00 .* get 2.60 .*alarm.stop"):
        alarms.spam(config, 5, drawn(single=1.0, two=2.6), before)
    del config.objects
    assert alarms.spam(config, 5, drawn(single=9.0, two=9.0), before) is None, "a config that wants no warning"


@pytest.mark.parametrize("metrics, words", [
    ([{"reward/flat": 0.5, "loss": 0.1, "grad_norm": 1.0}, {"reward/flat": 0.25, "loss": 0.2, "grad_norm": 1.1}], []),
    ([{"reward/flat": 0.9, "loss": 0.1, "grad_norm": 1.0}, {"reward/flat": 0.4, "loss": 0.2, "grad_norm": 1.1}], ["65% of the"]),
    ([{"loss": 0.7, "grad_norm": 0.0}] * 2, ["have not changed"]), ([{"loss": 0.7}, {"loss": 0.7 + 1e-9}], ["have not changed"]),
    ([{"loss": 0.0, "grad_norm": 1.0}, {"loss": 0.0, "grad_norm": 2.0}], []), ([{"loss": 1e-9}, {"loss": 2e-9}], []),
    ([{"reward/flat": 1.0, "loss": 0.0, "grad_norm": 0.0}] * 2, ["100% of the", "have not changed"]), ([{"skipped": 0}] * 2, [])])
def test_signs_that_nothing_is_learned(metrics, words):
    signs = alarms.idle_signs(metrics)
    assert len(signs) == len(words) and all(word in sign for word, sign in zip(words, signs))
