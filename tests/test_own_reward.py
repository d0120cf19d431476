"""A reward of one's own: asked on the host about the pictures of a step, alone or beside the model's own."""
import os

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import load_config
from gvu_jax import cli, rewards, train
from test_train import METAS, method_of

FILE = '''
import numpy as np

calls = []

def red(pixels, prompts):
    calls.append((pixels, prompts))
    return pixels[..., 0].mean((1, 2)) / 255

def listed(pixels, prompts):
    return [len(prompt) for prompt in prompts]

def scalar(pixels, prompts):
    return 1.0

def nan(pixels, prompts):
    return np.where(np.arange(len(prompts)) == 2, np.nan, 0.0)

def broken(pixels, prompts):
    return {}["red"]

number = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_of_ones_own_is_the_reward_alone_or_beside_the_models(tiny, key, file):
    alone, base, state, prompts = method_of(tiny, **{"reward.function": f"{file}:red"})
    metas, group = METAS * (alone.config.gvu.prompts // 2), alone.config.gvu.group
    pixels = np.linspace(0, 1, len(metas) * group, dtype=np.float32)[:, None, None, None] * np.ones((48, 48, 3), np.float32)
    tokens = jnp.zeros((len(pixels), alone.umm.image_tokens), int)
    read = lambda method: np.asarray(method.reward(base, base, tokens, pixels, prompts.repeat(group), metas)[0])
    own = read(method_of(tiny)[0])
    theirs = read(alone)
    np.testing.assert_allclose(theirs, np.round(pixels[:, 0, 0, 0] * 255) / 255, atol=1e-6)
    given, texts = alone.function.__globals__["calls"][0]
    assert given.dtype == np.uint8 and given.shape == pixels.shape
    assert texts == [meta["prompt"] for meta in metas for _ in range(group)]
    mixed = read(method_of(tiny, **{"reward.function": f"{file}:red", "reward.own": 0.25})[0])
    np.testing.assert_allclose(mixed, 0.25 * own + 0.75 * theirs, rtol=1e-5)


@pytest.mark.parametrize("name, told", [
    ("scalar", r"an array of shape \(\) for 4 pictures"), ("nan", "gave nan for picture 2"), ("broken", "KeyError: 'red'")])
def test_what_is_no_reward_is_one_line(file, name, told):
    with pytest.raises(ValueError, match=f"reward.function .*{told}"):
        rewards.ask(rewards.load_function(f"{file}:{name}"), np.zeros((4, 8, 8, 3)), ["a"] * 4)
    assert rewards.ask(rewards.load_function(f"{file}:listed"), np.zeros((2, 8, 8, 3)), ["a", "bcd"]).tolist() == [1, 3]


@pytest.mark.parametrize("settings, told", [
    ({"reward.function": "none.py:red"}, "there is no file none.py"), ({"reward.function": "{}:blue"}, "no function blue"),
    ({"reward.function": "{}:number"}, "no function number"), ({"reward.function": "{}"}, "must be FILE.py:NAME"),
    ({"reward.function": "{}:red", "reward.view": "tokens"}, "reads pictures"),
    ({"reward.function": "{}:red", "reward.mean": "oracle"}, "take one"),
    ({"reward.function": "{}:red", "reward.own": 1.0}, "would not be asked"), ({"reward.own": 0.5}, "there is none")])
def test_what_cannot_be_is_said_before_anything_is_trained(tiny, file, settings, told):
    settings = {name: value.format(file) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises((ValueError, OSError), match=told):
        method_of(tiny, **settings)


def test_a_file_is_run_once_until_it_changes(file):
    first = rewards.load_function(f"{file}:red")
    assert rewards.load_function(f"{file}:red") is first
    file.write_text("red = max\n")
    os.utime(file, ns=(0, 0))
    assert rewards.load_function(f"{file}:red") is max


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(ValueError, match="bad.py cannot be run: ModuleNotFoundError"):
        rewards.load_function(f"{tmp_path}/bad.py:red")


def test_internal_gap_has_its_own_judge(file):
    config = load_config("shapes_gap", "sft")
    config.reward.function = f"{file}:red"
    with pytest.raises(ValueError, match="goes with config.method = 'gvu'"):
        train.method_of(config).check(config)


def test_settings_that_a_run_did_not_have_are_off():
    """A run of an earlier version goes on; one with another value does not."""
    old = {"reward": {"mean": "geometric"}, "steps": 3}
    new = {"reward": {"mean": "geometric", "function": "", "own": 0.0}, "steps": 3}
    assert cli.differing(new, old) == [] == cli.differing(old, new)
    assert cli.differing({"eval": {"pictures": True}}, {"eval": {}}) == []                  # came later, and is on
    assert cli.differing(new | {"steps": 4}, old) == ["steps"]
    new["reward"]["own"] = 0.5
    assert cli.differing(new, old) == ["reward.own"]
    how = {"weights": "full", "cache": "full", "truncate": 2.0}
    assert cli.differing(new | {"rollout": how}, new) == [] == cli.differing(new, new | {"rollout": how})
    assert cli.differing(new | {"rollout": how | {"weights": "int8"}}, new) == ["rollout.weights"]
    assert cli.differing({"a": 0}, {"a": 1}) == ["a"] and cli.differing({"a": 0}, {"a": ""}) == ["a"]
