"""The whole loop on a model that is too small to learn: what it writes, that it resumes, that it compiles once."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import ROOT, TINY, one_device, put_untrained, tiny_config
from gvu_jax import alarms, checkpoint, families, optim, sharding
from gvu_jax.closeup import _from_png
from gvu_jax.methods import gvu
from gvu_jax.metrics import read_json, read_metrics
from gvu_jax.policy import init_state, init_trainable
from gvu_jax.sampling import How
from gvu_jax.stop import Stop
from gvu_jax.suite import Verdicts
from gvu_jax.train import table, train


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(config, workdir) of a finished run of four steps, with a judge. Its base is no other test's, so that it is also
    pretrained, as those of the other families are."""
    config, judge = tiny_config(), tmp_path_factory.mktemp("judge") / "model"
    config.pretrain.seed = 1
    checkpoint.save_model(judge, *tiny[1:])
    config.eval.judge = str(judge)
    return run_of(config, tmp_path_factory)


def run_of(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(config, folder / "work")
    return config, folder / "work"


@pytest.fixture(scope="module", params=TINY)
def run_of_each(request, tmp_path_factory):
    """`run` of every family."""
    return request.getfixturevalue("run") if request.param == TINY[0] else (
        run_of(tiny_config(family=request.param), tmp_path_factory))


def test_a_judge_is_asked_at_each_evaluation(run):
    lines = [line for line in read_metrics(run[1] / "metrics.jsonl") if "eval/overall" in line]
    assert all(0 < line["judge/soft_overall"] < 1 and 0 <= line["judge/hard_position"] <= 1 for line in lines)
    summary = read_json(run[1] / "summary.json")
    for moment, line in (("before", lines[0]), ("after", lines[-1])):
        told = {name.removeprefix("judge/"): value for name, value in line.items() if name.startswith("judge/")}
        assert summary[f"judge_{moment}"] == pytest.approx(told, rel=1e-4)
    assert "judge soft_overall" in table(summary)


def method_of(tiny, **changes):
    config, umm, base = tiny
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    optimizer = optim.build(config.optim, 10)
    method = gvu.GvU(umm, config, How(images_per_prompt=config.gvu.group), optimizer, one_device())
    base = jax.device_put(base, sharding.shardings(umm.partition, base, method.mesh))
    state = method.init(base, jax.random.key(1))
    texts = ["a photo of a red circle", "a photo of two crosses"] * (config.gvu.prompts // 2)
    return method, base, state, umm.encode_prompts(texts)


def one_step(method, base, state, prompts, key):
    """All four programs once. Returns the state, metrics and what was drawn."""
    grouped = prompts.repeat(method.config.gvu.group)
    policy = method.policy(base, state.trainable)
    tokens, logps = method.sample(policy, prompts, key)
    pixels = method.render(base, tokens, prompts, key)
    reward, seen = method.reward(base, policy, tokens, pixels, grouped)
    state, metrics = method.update(state, base, grouped, tokens, logps, reward, seen)
    return state, metrics, (tokens, logps, reward)


def test_it_writes_what_its_contract_says(run_of_each):
    config, work = run_of_each
    lines = read_metrics(work / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/overall" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4] and [line["step"] for line in evaluations] == [0, 2, 4]
    for name in ("reward/mean reward/std reward/flat kl entropy loss grad_norm logp_gap images_per_second seconds/sample "
                 "seconds/render seconds/reward seconds/update").split():
        by_flow = name == "entropy" and hasattr(families.of(config).MODEL, "image_moves")       # it tells none
        assert all((name in line) != by_flow for line in training), name
    for tag in "single_object two_object counting colors position color_attr".split():
        assert all(0 <= line[f"eval/exact_{tag}"] <= line[f"eval/{tag}"] <= 1 for line in evaluations)
        assert all(0 <= line[f"eval/objects_{tag}"] <= 9 for line in evaluations)
    summary = read_json(work / "summary.json")
    for moment, line in (("before", evaluations[0]), ("after", evaluations[-1])):
        for part in ("exact", "objects", "haze"):
            assert line[f"eval/{part}"] == pytest.approx(summary[f"{part}_{moment}"]["overall"], rel=1e-4)
            assert line[f"eval/{part}_counting"] == pytest.approx(summary[f"{part}_{moment}"]["counting"], rel=1e-4)
    assert summary["asked_before"]["single_object"] == 1 and 2 <= summary["asked_before"]["counting"] <= 4
    assert 0 <= summary["haze_before"]["overall"] < 255 and "haze overall" in table(summary)
    assert "objects single_object" in table(summary) and "1.000 asked for" in table(summary)
    for name in "config.json summary.json report.html samples/before.png samples/step_000002.png samples/after.png".split():
        assert (work / name).stat().st_size > 0, name
    assert all(line["logp_gap"] < 1e-4 for line in training)


def test_a_run_that_learns_nothing_says_so(tmp_path, capfd):
    """The checker calls all that an untrained model draws wrong: every group is flat, and nothing moves."""
    config = tiny_config()
    put_untrained(config)
    config.reward.mean = "oracle"
    config.gvu.update(anchor=0.0, beta=0.0)
    config.update(steps=alarms.PATIENCE + 1, checkpoint_every=100)
    config.eval.every = 100
    train(config, tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert all(line["reward/flat"] == 1 and line["grad_norm"] == 0 for line in lines)
    said = capfd.readouterr().err
    assert said.count(f"warning: step {alarms.PATIENCE}: 100% of the groups in the last {alarms.PATIENCE} logged steps") == 1
    assert said.count("loss and gradient have not changed") == 1
    assert "Flat groups" in (tmp_path / "report.html").read_text()


def timeless(work):
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(work / "metrics.jsonl")]


def test_giving_the_command_again_goes_on_where_it_ended(run_of_each, tmp_path):
    """Its last two steps lost, a run writes them again, to the last digit."""
    config, work = run_of_each
    shutil.copytree(work, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/4")
    train(config, tmp_path / "broken")
    assert timeless(tmp_path / "broken") == timeless(work)


def test_giving_the_command_again_continues_a_longer_run(run, tmp_path):
    """Four steps, then two more, are the six steps of an unbroken run: same metrics, no line twice. And who stops the
    prolonged run has no finished one any more."""
    config, work = run
    config = config.copy_and_resolve_references()
    config.update(steps=6, checkpoint_every=1)
    shutil.copytree(work, tmp_path / "broken")
    assert train(config, tmp_path / "broken", Nth(0)) is None
    assert not any(name.endswith("after") for name in read_json(tmp_path / "broken/summary.json"))
    assert "after" in train(config, tmp_path / "broken")
    train(config, tmp_path / "unbroken")
    broken, unbroken = ([line for line in timeless(tmp_path / name) if "loss" in line] for name in ("broken", "unbroken"))
    assert broken == unbroken


class Nth(Stop):
    """A stop that comes when the loop asks for the n-th time."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def requested(self):
        self.left -= 1
        return self.left < 0


def test_who_is_asked_to_stop_does_not_evaluate_first(run, tmp_path):
    """The third question of a step comes between its checkpoint and its evaluation, which the next sitting makes up
    for."""
    config, unbroken = run
    evaluated = lambda work: [line["step"] for line in read_metrics(work / "metrics.jsonl") if "eval/overall" in line]
    assert train(config, tmp_path / "work", Nth(4)) is None
    assert (tmp_path / "work/checkpoints/2").exists() and evaluated(tmp_path / "work") == [0]
    summary = train(config, tmp_path / "work")
    assert evaluated(tmp_path / "work") == [0, 2, 4]
    assert {k: v for k, v in summary.items() if k != "timings"} == {
        k: v for k, v in read_json(unbroken / "summary.json").items() if k != "timings"}


def test_another_config_is_refused_in_the_same_workdir(run):
    config, work = run
    config = config.copy_and_resolve_references()
    config.gvu.beta = 0.5
    with pytest.raises(ValueError, match="gvu.beta"):
        train(config, work)


def test_a_finished_run_can_be_loaded_and_used(run, tmp_path):
    import gvu_jax
    _, work = run
    model = gvu_jax.load(work)
    prompts = ["a photo of a red circle", "an image of two crosses"]
    pictures = model.generate(prompts, seed=3, images_per_prompt=2)
    assert pictures.shape == (2, 2, 48, 48, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, model.generate(prompts, seed=3, images_per_prompt=2, batch=1))
    score = model.score(pictures[:, 0], prompts)[1]
    assert score.words == ["an", "image", "of", "two", "crosses"]
    np.testing.assert_allclose(score.reward, np.exp(np.log(score.probabilities).mean()), rtol=1e-5)
    assert len(model.describe(pictures[:, 0])) == 2


def test_the_same_pictures_are_read_before_and_after(run):
    """What the close-ups say of a picture drawn before training is what the trained model says of it."""
    import gvu_jax
    _, work = run
    before, after = (json.loads((work / f"samples/{moment}.json").read_text()) for moment in ("before", "after"))
    series = {}
    for reading in before["readings"] + after["readings"]:
        series.setdefault((reading["drawn"], reading["read"]), []).append(reading)
    assert series.keys() == {(drawn, read) for drawn in ("before", "after") for read in ("before", "after")}
    pictures = np.stack([_from_png(png) for png in before["pictures"]])
    scores = gvu_jax.load(work).score(pictures, [reading["prompt"] for reading in before["readings"]])
    assert len({reading["tag"] for reading in before["readings"]}) == 6, "one of each category"
    for score, reading in zip(scores, series["before", "after"], strict=True):
        assert reading["words"] == score.words
        np.testing.assert_allclose(reading["probabilities"], score.probabilities, rtol=1e-4)
        np.testing.assert_allclose(reading["reward"], score.reward, rtol=1e-4)
    ranks = [(of["score"], of["reward"]) for of in after["prompts"]]
    assert ranks == sorted(ranks) and sum(bin["count"] for bin in after["reliability"]["overall"]["bins"]) == 24


def test_generate_and_evaluate_from_the_command_line(run, command, tmp_path, capsys):
    def call(tool, *arguments):
        assert command(tool, *arguments) is None
        return capsys.readouterr().out

    _, work = run
    metas = [{"tag": "x", "include": [{"class": "x", "count": 1}], "prompt": f"a photo of a {x}"}
             for x in ("red circle", "cross")]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, metas)))
    call("generate", f"--checkpoint={work}", f"--prompts={tmp_path}/prompts.jsonl", f"--out={tmp_path}/geneval",
         "--layout=geneval", "--images_per_prompt=1")
    assert (tmp_path / "geneval/00001/samples/0000.png").exists()
    assert json.loads((tmp_path / "geneval/00001/metadata.jsonl").read_text())["prompt"] == "a photo of a cross"
    printed = call("evaluate", f"--checkpoint={work}", "--suite=shapes", f"--out={tmp_path}/eval", "--prompts=24",
                   "--images_per_prompt=1", "--choices=6")
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert f"{results['scores']['overall']:.3f}" in printed and set(results["understanding"]["scores"]) == {
        "four_way", "relation", "count", "binding"}
    assert set(results["scores"]) == set(results["intervals"]) == set(results["calibration"])
    assert set(results["scores"]) == set(results["exact"]["scores"]) == set(results["objects"]["asked"])
    assert all(results["exact"]["scores"][tag] <= score for tag, score in results["scores"].items())
    assert results["objects"]["asked"]["single_object"] == 1 and "objects a picture" in printed
    assert 0 <= results["haze"]["scores"]["overall"] < 255 and "haze where nothing stands" in printed
    assert sum(found["count"] for found in results["calibration"]["overall"]["bins"]) == 24


@pytest.mark.parametrize("tool, arguments, word", [
    ("train", ["--config=configs/nothing.py", "--workdir=w"], "nothing.py"),
    ("train", ["--config=configs/shapes.py:odd", "--workdir=w"], "odd"),
    ("train", ["--config=configs/shapes.py", "--workdir=w", "--config.gvu.groop=3"], "the config has no setting groop"),
    ("train", ["--config=configs/shapes.py", "--workdir=w", "--config.gvu.group=1"], "at least 2"),
    ("train", ["--config=configs/shapes.py"], "workdir"),
    ("train", ["--config=configs/shapes.py", "--workdir=w", "--config.pretrain.backbone.mismatched=2.0"], "from 0 to 1"),
    ("train", ["--config=configs/shapes.py", "--workdir=w", "config.gvu.group=8"], "is no flag"),
    ("train", ["--config=configs/shapes.py", "--workdir=w", "--config.optim.clip_norm=0"], "clip_norm is 0"),
    ("train", ["--config=configs/shapes.py", "--workdir=gs://bucket/run"], "mount the bucket"),
    ("generate", ["--checkpoint=nowhere", "--prompts=none.txt", "--out=o"], "none.txt"),
    ("evaluate", ["--checkpoint=nowhere", "--suite=shapes", "--out=o"], "nowhere"),
    ("evaluate", ["--checkpoint=nowhere", "--suite=imagenet", "--out=o"], "imagenet")])
def test_a_mistake_ends_in_one_line(command, tmp_path, monkeypatch, tool, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert word in command(tool, *(argument.replace("configs/", f"{ROOT}/configs/") for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_the_ratio_is_exactly_one_at_the_first_inner_step_and_moves_at_the_second(tiny, key):
    for inner_steps, moved in ((1, False), (2, True)):
        _, metrics, _ = one_step(*method_of(tiny, **{"gvu.inner_steps": inner_steps, "optim.warmup": 0}), key)
        assert (float(metrics["ratio_max"]) != 1.0) == moved


def test_micro_batches_accumulate_to_the_whole_gradient(tiny, key):
    moves = []
    for slices in (1, 3):
        method, base, _, prompts = method_of(tiny, **{"gvu.micro_batches": slices})
        method.optimizer = optax.sgd(1.0)                           # moves by the gradient itself: Adam hides its scale
        state = init_state(method.umm, base, method.config, method.optimizer, key)
        after, metrics, _ = one_step(method, base, state, prompts, key)
        moves.append(jax.tree.map(lambda new, old: new - old, after.trainable["ar"], base["ar"]))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moves[0]))
    assert largest > 1e-4
    for one, other in zip(*map(jax.tree.leaves, moves)):
        np.testing.assert_allclose(one, other, atol=1e-3 * largest)


def test_an_update_makes_better_pictures_likelier(tiny, key):
    """Along a small step, log-probabilities rise with the advantage."""
    method, base, state, prompts = method_of(tiny, **{"optim.lr": 1e-3, "optim.warmup": 0})
    after, _, (tokens, logps, reward) = one_step(method, base, init_state(
        method.umm, base, method.config, method.optimizer, jax.random.key(1)), prompts, key)
    from gvu_jax.objectives import group_advantages
    new = jax.jit(method.umm.image_logps)(
        method.policy(base, after.trainable), prompts.repeat(method.config.gvu.group), tokens)
    gain = (new - logps).sum(axis=1)
    assert jnp.sum(gain * group_advantages(reward, method.config.gvu.group, 1e-4)) > 0


@pytest.mark.parametrize("rank, changed", [(0, {"ar"}), (4, {"adapter"})])
def test_only_the_trainable_part_exists_in_the_state(tiny, key, rank, changed):
    method, base, state, prompts = method_of(tiny, **{"lora.rank": rank, "optim.warmup": 0})
    assert set(state.trainable) == changed
    before = jax.device_get(base["ar"])
    state, metrics, _ = one_step(method, base, state, prompts, key)
    assert float(metrics["grad_norm"]) > 0 and int(state.step) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(base["ar"])):
        np.testing.assert_array_equal(a, b)                                         # the reference has not moved
    fresh = init_trainable(method.umm, base, method.config, jax.random.key(1))
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (fresh, state.trainable))))


def test_teacher_and_view_are_what_the_config_says(tiny, key):
    rewards = {}
    for teacher in ("base", "policy"):
        for view in ("pixels", "tokens"):
            method, base, state, prompts = method_of(tiny, **{
                "reward.teacher": teacher, "reward.view": view, "gvu.anchor": 0.0})
            grouped, moved = prompts.repeat(4), jax.tree.map(lambda x: x * 1.1, state.trainable)
            policy = method.policy(base, moved)
            tokens, _ = method.sample(policy, prompts, key)
            pixels = method.render(base, tokens, grouped, key)
            assert (pixels is None) == (view == "tokens")
            rewards[teacher, view] = np.asarray(method.reward(base, policy, tokens, pixels, grouped)[0])
    assert len({array.tobytes() for array in rewards.values()}) == 4


def test_the_anchor_holds_reading_in_place(tiny, key):
    """Zero where the policy is the base; with it, a policy that has moved away is drawn back."""
    method, base, state, prompts = method_of(tiny, **{"optim.lr": 1e-4, "optim.warmup": 0, "gvu.anchor": 1000.0})
    first = init_state(method.umm, base, method.config, method.optimizer, key)
    _, metrics, _ = one_step(method, base, first, prompts, key)
    assert abs(float(metrics["read_kl"])) < 1e-6
    moved = jax.tree.map(lambda x: x * 1.05, state.trainable)
    state, distances = state.replace(trainable=moved), []
    for _ in range(6):
        state, metrics, _ = one_step(method, base, state, prompts, key)
        distances.append(float(metrics["read_kl"]))
    assert 1e-4 < distances[-1] < 0.7 * distances[0], distances
    with pytest.raises(ValueError, match="gvu.anchor"):
        method_of(tiny, **{"reward.teacher": "policy"})


METAS = [{"prompt": "a photo of a red circle"}, {"prompt": "a photo of two crosses"}]


def test_the_sentence_is_asked_about_as_a_whole(tiny, key):
    """reward.mean=yes: each picture's own question, answered as when it is asked alone."""
    method, base, state, prompts = method_of(tiny, **{"reward.mean": "yes"})
    metas, group, umm = METAS * (method.config.gvu.prompts // 2), method.config.gvu.group, method.umm
    method.lengths = umm.lengths([meta["prompt"] for meta in metas])
    tokens = jax.random.randint(key, (len(metas) * group, umm.image_tokens), 0, 32)
    method.config.reward.view = "tokens"
    reward, _ = method.reward(base, base, tokens, None, prompts.repeat(group), metas)
    for row, place in ((1, 0), (group, 1)):
        asked = umm.encode_prompts(["yes", "no"], questions=[f"Does this image describe {metas[place]['prompt']}?"] * 2)
        seen = np.repeat(tokens[row].reshape(1, *umm.grid), 2, axis=0)
        (yes, *_), (no, *_) = np.exp(jax.jit(umm.text_logps)(base, seen, asked)[0])
        np.testing.assert_allclose(reward[row], yes / (yes + no), rtol=1e-4)


def test_an_oracle_judges_the_pixels(tiny, key):
    method, base, state, prompts = method_of(tiny, **{"reward.mean": "oracle"})
    metas, group = METAS * (method.config.gvu.prompts // 2), method.config.gvu.group
    right, pixels = np.arange(len(metas) * group) % 3 == 0, np.zeros((len(metas) * group, 48, 48, 3), np.float32)

    def judge(given, asked):
        assert np.array_equal(given, pixels) and asked == [meta for meta in metas for _ in range(group)]
        return Verdicts(right, np.zeros_like(right), *np.ones((3, len(right)), int))
    method.judge = judge
    tokens = jnp.zeros((len(right), method.umm.image_tokens), int)
    reward, _ = method.reward(base, base, tokens, pixels, prompts.repeat(group), metas)
    assert np.array_equal(reward, right)
    for wrong in ({"reward.view": "tokens", "reward.mean": "oracle"}, {"reward.mean": "median"}):
        with pytest.raises(ValueError, match="reward.mean"):
            method_of(tiny, **wrong)


def test_nothing_compiles_after_the_first_step(tiny, key):
    method, base, state, prompts = method_of(tiny)
    counts = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: counts.append(event) if event.endswith("backend_compile_duration") else None)
    prompts, key = sharding.put((prompts, key), method.mesh)
    state, _, _ = one_step(method, base, state, prompts, jax.random.fold_in(key, 0))
    jax.block_until_ready(state)
    assert counts
    counts.clear()
    for step in range(1, 4):
        state, _, _ = one_step(method, base, state, prompts, jax.random.fold_in(key, step))
    jax.block_until_ready(state)
    assert not counts
