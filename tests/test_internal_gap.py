"""Internal Gap on a model that is too small to learn: its data, its batches, its update, and that it resumes."""
import json
import shutil

import jax
import numpy as np
import pytest

from conftest import load_config, one_device, put_untrained, tiny_config
from gvu_jax import data, optim, sharding
from gvu_jax.methods import internal_gap
from gvu_jax.methods.internal_gap import InternalGap, Round
from gvu_jax.metrics import Stopwatch, read_metrics
from gvu_jax.sampling import How
from gvu_jax.shapes import world
from gvu_jax.train import train

POOL, GROUP = 8, 4        # prompts in two calls of six, the second filled up


def gap_config(preset="csft", **changes):
    config = tiny_config("shapes_gap", preset)
    config.eval.group = GROUP
    config.internal_gap.update(pool=POOL, batch=4, anchor=0.0)
    config.internal_gap.replay = 2 if preset.startswith("c") else 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def threshold(tiny, tmp_path_factory):
    """What half of the untrained model's prompts reach with a candidate: the others are discarded."""
    drawn = Method(tiny, gap_config("sft", **{"internal_gap.threshold": 1e-6}), tmp_path_factory.mktemp("probe"))
    drawn.rollout(0)
    return float(np.median(drawn.method.rounds[0].score.max(axis=1)))


class Method:
    """A method in a folder, and the loop's part in it."""

    def __init__(self, tiny, config, workdir):
        _, umm, base = tiny
        self.metas = world.split_prompts()[0]
        lengths = umm.lengths([meta["prompt"] for meta in self.metas])
        self.method = InternalGap(umm, config, How(images_per_prompt=config.internal_gap.group),
                                  optim.build(config.optim, 10), one_device(), lengths, workdir)
        self.base = jax.device_put(base, sharding.shardings(umm.partition, base, self.method.mesh))
        self.state = self.method.init(self.base, jax.random.key(1))
        self.stopped = lambda: False

    def rollout(self, step):
        clock = Stopwatch(None, self.stopped)
        return self.method.rollout(self.state, self.base, step, data.prompt_stream(self.metas, 0),
                                   jax.random.fold_in(jax.random.key(0), step), clock)

    def update(self, batch):
        self.state, metrics = self.method.update(self.state, self.base, *batch)
        return metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory, threshold):
    """(config, workdir) of a finished run: replay after two of four steps."""
    config, folder = gap_config(**{"internal_gap.threshold": threshold}), tmp_path_factory.mktemp("gap")
    put_untrained(config)
    train(config, folder / "work")
    return config, folder / "work"


def manifest(work, number):
    return [json.loads(line) for line in (work / f"data/round_{number}/manifest.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_data_to_look_at(run):
    config, work = run
    threshold, pool, replayed = config.internal_gap.threshold, manifest(work, 0), manifest(work, 1)
    assert len(pool) == POOL * GROUP and [line["candidate"] for line in pool] == list(range(GROUP)) * POOL
    discarded = []
    for i in range(0, len(pool), GROUP):
        group = pool[i:i + GROUP]
        assert len({line["prompt"] for line in group}) == 1
        passed = [line["score"] > threshold for line in group]
        assert [line["verdict"] for line in group] == [
            "accepted" if one else "rejected" if any(passed) else "discarded" for one in passed]
        discarded += [group[0]["prompt"]] * (not any(passed))
    assert 0 < len(discarded) < POOL
    assert [line["prompt"] for line in replayed] == [text for text in discarded for _ in range(GROUP)]
    for number in (0, 1):
        assert (work / f"data/round_{number}/pictures.png").stat().st_size > 0
        assert not (work / f"data/round_{number}/parts").exists()


def test_it_writes_what_its_contract_says(run):
    _, work = run
    training = [line for line in read_metrics(work / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for name in ("reward/mean reward/std kl entropy loss grad_norm logp_gap images_per_second seconds/sample "
                 "seconds/render seconds/reward seconds/update duplicates data/prompts data/discarded").split():
        assert all(line[name] is not None for line in training), name
    assert all(line["logp_gap"] < 1e-4 for line in training) and training[0]["kl"] < 1e-6 < training[-1]["kl"]
    np.testing.assert_allclose(training[0]["reward/mean"], np.mean([line["score"] for line in manifest(work, 0)]), 1e-4)
    recovered = {line["prompt"] for line in manifest(work, 1) if line["verdict"] == "accepted"}
    assert [line["data/recovered"] for line in training] == [0, 0, len(recovered), len(recovered)]
    summary = json.loads((work / "summary.json").read_text())
    names = {name + by for name in ("non_unification", "accuracy", "false_positives") for by in ("", "_by_words")}
    told = lambda moment: {name for name in summary[f"judgement_{moment}"] if not name.startswith("auc")}   # not always
    assert told("before") == names and told("after") == names | {f"{name}_on_base" for name in names}


def test_a_run_killed_in_its_replay_draws_the_same_again(run, tmp_path):
    _, work = run
    again = tmp_path / "work"
    shutil.copytree(work, again)
    shutil.rmtree(again / "checkpoints/4")
    shutil.rmtree(again / "data/round_1")
    train(run[0], again)
    assert manifest(again, 1) == manifest(work, 1)
    assert all(np.array_equal(*pair) for pair in zip(*(internal_gap.read_drawn(
        folder / "data/round_1/drawn.npz") for folder in (again, work))))
    timeless = lambda path: [{k: v for k, v in line.items() if "second" not in k} for line in
                             read_metrics(path / "metrics.jsonl")]
    assert timeless(again) == timeless(work)


def test_a_round_that_was_stopped_goes_on_with_its_next_call(run, tiny, tmp_path, capsys):
    """And says how far it has come, for the first takes long."""
    config, work = run
    first = Method(tiny, config, tmp_path)
    first.stopped = lambda: any(tmp_path.rglob("parts/000000.jsonl"))
    assert first.rollout(0) is None and not (tmp_path / "data/round_0/manifest.jsonl").exists()
    second, whole = Method(tiny, config, tmp_path), Method(tiny, config, tmp_path / "whole")
    drawn, draw = [], second.method.draw
    second.method.draw = lambda *a, **k: drawn.append(a) or draw(*a, **k)
    capsys.readouterr()
    second.rollout(0)
    progress = capsys.readouterr().err
    assert "round_0: 1/2 (50%)" in progress and "2/2 (100%)" in progress and "accepted" in progress
    whole.rollout(0)
    assert len(drawn) == 1 and manifest(tmp_path, 0) == manifest(tmp_path / "whole", 0)
    assert [line["prompt"] for line in manifest(tmp_path, 0)] == [line["prompt"] for line in manifest(work, 0)]


def test_a_later_sitting_needs_the_data_it_trained_on(run, tiny, tmp_path):
    config, work = run
    with pytest.raises(ValueError, match="round_0 has no manifest.jsonl.*since step 0"):
        Method(tiny, config, tmp_path).rollout(3)
    shutil.copytree(work / "data", tmp_path / "data")
    path = tmp_path / "data/round_1/manifest.jsonl"
    lines, prompt = path.read_text(), manifest(work, 1)[0]["prompt"]
    for broken in (lines[:-30], lines.replace(prompt, "a photo of a car")):
        path.write_text(broken)
        with pytest.raises(ValueError, match="round_1/manifest.jsonl is not what this run wrote"):
            Method(tiny, config, tmp_path).rollout(3)
    path.write_text(lines)
    kept = path.with_name("drawn.npz")
    for broken in (kept.read_bytes()[:-30], (work / "data/round_0/drawn.npz").read_bytes()):
        kept.write_bytes(broken)
        with pytest.raises(ValueError, match="round_1/manifest.jsonl is not what this run wrote"):
            Method(tiny, config, tmp_path).rollout(3)


def test_replay_begins_where_the_share_that_passes_rises_no_more(tiny, tmp_path, threshold):
    """Probed every second step, by step 20 at the latest; a later sitting remembers what was found."""
    changes = {"internal_gap.threshold": threshold, "internal_gap.replay": 20, "internal_gap.probe": 2}
    def method(shares):
        fresh = Method(tiny, gap_config(**changes), tmp_path).method
        fresh.rounds = [Round(0, ["a"] * 8, None, None, np.zeros((8, GROUP)))]
        return fresh, lambda *_, shown: (None, None, np.repeat(
            np.arange(8)[:, None] < next(shares), GROUP, axis=1).astype(float), None)
    (tmp_path / "data").mkdir()
    fresh, draw = method(iter([0, 2, 5, 5]))                              # of 8 prompts, at steps 2, 4, 6 and 8
    assert [fresh.replay_step(step, None, draw) for step in range(10)] == [None] * 8 + [8, 8]
    later, draw = method(iter([]))
    assert [later.replay_step(step, None, draw) for step in (3, 7, 9)] == [None, None, 8]
    (tmp_path / "data/probes.json").unlink()
    fresh, draw = method(iter(range(9)))
    assert [fresh.replay_step(step, None, draw) for step in range(22)] == [None] * 20 + [20, 20]


def test_batches_take_the_accepted_by_turns_and_the_pairs_farthest_apart():
    score = np.array([[0.9, 0.2, 0.7], [0.1, 0.2, 0.3], [0.6, 0.8, 0.9]], np.float32)
    tokens = np.arange(9, dtype=np.int32).reshape(3, 3, 1)                    # a candidate's token is its number
    drawn = Round(0, ["a", "b", "c"], tokens, -np.arange(9.0).reshape(3, 3), score)
    replayed = Round(6, ["b"], tokens[:1] + 9, -9 - np.arange(3.0)[None], score[:1])
    assert drawn.discarded(0.5) == ["b"]
    gap = gap_config("sft", **{
        "internal_gap.group": 3, "internal_gap.threshold": 0.5, "internal_gap.keep": 2}).internal_gap
    pairs = internal_gap.choose_pairs([drawn, replayed], gap)
    texts, chosen, _, logp, by_base = pairs.rows(range(9), gap, seed=0)       # three epochs of a, c and the second b
    taken = [[int(c) for text, c in zip(texts, chosen[:, 0]) if text == name] for name in "acb"]
    assert taken == [[0, 2, 0], [8, 7, 8], [9, 11, 9]]
    assert all(sorted(texts[i:i + 3]) == ["a", "b", "c"] for i in (0, 3, 6)) and texts[:3] + texts[3:6] != texts[3:9]
    assert (logp == -chosen[:, 0]).all() and [text != "b" for text in texts] == by_base.tolist()
    again = [pairs.rows(range(i, i + 3), gap, seed=0)[0] for i in (0, 3, 6)]
    assert sum(again, []) == texts
    gap.objective = "dpo"
    pairs = internal_gap.choose_pairs([drawn, replayed], gap)                 # of c nothing was rejected
    _, chosen, rejected, *_ = pairs.rows(range(2), gap, seed=0)
    assert sorted(zip(chosen[:, 0], rejected[:, 0])) == [(0, 1), (9, 10)]
    gap.threshold = 0.95
    with pytest.raises(ValueError, match="none of 4 prompts has an accepted and a rejected candidate"):
        internal_gap.choose_pairs([drawn, replayed], gap)


@pytest.mark.parametrize("preset", ["sft", "dpo"])
def test_an_update_raises_the_accepted_over_the_rejected(tiny, tmp_path, threshold, preset):
    method = Method(tiny, gap_config(preset, **{
        "internal_gap.threshold": threshold, "optim.lr": 1e-3, "optim.warmup": 0}), tmp_path)
    batch = method.rollout(0)
    logps = jax.jit(lambda trainable, tokens: method.method.umm.image_logps(
        method.method.policy(method.base, trainable), batch[0], tokens).sum(axis=1))
    before = [logps(method.state.trainable, tokens) for tokens in batch[2:4]]
    metrics = method.update(batch)
    gain, other = (logps(method.state.trainable, tokens) - old for tokens, old in zip(batch[2:4], before))
    assert gain.mean() > 0 and (preset == "sft" or gain.mean() > other.mean())
    assert set(metrics) >= ({"preferred", "margin"} if preset == "dpo" else set())


@pytest.mark.parametrize("trains, rank, moved", [
    ("backbone", 0, {"layers", "mm_head_layers", "lm_norm", "mm_norm"}), ("backbone", 4, {"layers", "mm_head_layers"}),
    ("backbone+projector", 0, {"layers", "mm_head_layers", "lm_norm", "mm_norm", "mm_embed_tokens", "mm_head"})])
def test_only_what_the_config_names_is_trained(tiny, tmp_path, threshold, trains, rank, moved):
    method = Method(tiny, gap_config("sft", trains=trains, **{
        "internal_gap.threshold": threshold, "optim.warmup": 0, "lora.rank": rank}), tmp_path)
    method.update(method.rollout(0))
    (trained,) = method.state.trainable.values()
    assert set(trained) == moved
    policy = method.method.policy(method.base, method.state.trainable)
    for name, part in method.base["ar"].items():
        same = all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (part, policy["ar"][name]))))
        assert same == (rank > 0 or name not in moved - {"lm_norm"}), name          # which drawing does not go through


def test_the_anchor_holds_reading_in_place(tiny, tmp_path, threshold):
    """A policy that has moved away from the base is drawn back to what the base reads."""
    method = Method(tiny, gap_config("sft", **{
        "internal_gap.threshold": threshold, "internal_gap.anchor": 1000.0, "optim.lr": 1e-4, "optim.warmup": 0}),
        tmp_path)
    batch = method.rollout(0)
    method.state = method.state.replace(trainable=jax.tree.map(lambda x: x * 1.05, method.state.trainable))
    distances = [float(method.update(batch)["read_kl"]) for _ in range(6)]
    assert 1e-4 < distances[-1] < 0.7 * distances[0], distances
    with pytest.raises(ValueError, match="internal_gap.anchor holds every 4th sample: the 6 samples"):
        Method(tiny, gap_config("sft", **{"internal_gap.anchor": 1.0, "internal_gap.batch": 6}), tmp_path)


def test_micro_batches_accumulate_to_the_whole_gradient(tiny, tmp_path, threshold):
    norms = []
    for slices in (1, 2):
        method = Method(tiny, gap_config("dpo", **{
            "internal_gap.threshold": threshold, "internal_gap.micro_batches": slices}), tmp_path)
        norms.append(method.update(method.rollout(0)))
    np.testing.assert_allclose(norms[0]["grad_norm"], norms[1]["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(norms[0]["loss"], norms[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("changes, said", [
    ({"internal_gap.objective": "ppo"}, "objective is 'ppo'"), ({"internal_gap.pool": 0}, "pool is 0"),
    ({"internal_gap.objective": "dpo", "internal_gap.group": 1}, "group is 1.*at least 2"),
    ({"internal_gap.threshold": 1.0}, "threshold is 1.0"), ({"internal_gap.waves": 4}, "does not divide the 6 prompts"),
    ({"internal_gap.micro_batches": 3}, "does not divide the batch of 4"), ({"reward.view": "eyes"}, "reward.view"),
    ({"internal_gap.probe": 2, "internal_gap.replay": 0}, "latest"), ({"reward.teacher": "me"}, "reward.teacher"),
    ({"trains": "head"}, "trains is 'head'; it must be one of backbone, all"), ({"method": "magic"}, "config.method")])
def test_a_wrong_setting_is_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train(gap_config(**changes), tmp_path)
    with pytest.raises(ValueError, match="has sft, dpo, csft and cdpo"):
        load_config("shapes_gap", "tft")
