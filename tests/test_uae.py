"""Picture -> caption -> picture: three stages of a model too small to learn much, and the checker's view of captions."""
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from conftest import load_config, one_device, put_untrained, tiny_config
from gvu_jax import checkpoint, data, objectives, optim, sharding
from gvu_jax.methods import uae
from gvu_jax.metrics import read_metrics
from gvu_jax.policy import State
from gvu_jax.sampling import How
from gvu_jax.shapes import sentences, suite, world
from gvu_jax.train import train
from test_scorers import small


def uae_config(**changes):
    """configs/shapes_uae.py, cut as conftest.tiny_config cuts configs/shapes.py."""
    config, small = load_config("shapes_uae", "smoke"), tiny_config()
    for part in ("model", "pretrain", "eval", "mesh", "optim"):
        config[part] = small[part]
    config.uae.update(prompts=6, group=4, cold=2, pairs=8, stages="caption:1,draw:1")
    config.update(steps=4, log_every=1, checkpoint_every=2)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def method(tiny):
    """(method, base, its stream of pictures) of an untrained model."""
    config = uae_config(**{"optim.lr": 1e-3, "optim.warmup": 0})
    _, umm, base = tiny
    built = uae.UAE(umm, config, How(images_per_prompt=4), optim.build(config.optim, 10), one_device())
    stream = suite.picture_stream((0, 0), 0.7, world.World(), most=2)
    return built, jax.device_put(base, sharding.shardings(built.umm.partition, base, built.mesh)), stream


class NoClock:
    def lap(self, phase, result):
        return result


def step_of(method, base, stream, state, step):
    batch = method.rollout(state, base, step, stream, jax.random.key(step), NoClock())
    before = jax.tree.map(jnp.copy, state)                                         # the update takes the state's place
    after, metrics = method.update(before, base, *batch)
    return batch, after, metrics


def test_each_stage_moves_the_policy_towards_its_reward(method):
    built, base, stream = method
    state = built.init(base, jax.random.key(1))
    assert [built.stage(step) for step in range(6)] == ["cold", "cold", "caption", "draw", "caption", "draw"]
    losses = []
    for step in (0, 1):
        _, state, metrics = step_of(built, base, stream, state, step)
        losses.append(float(metrics["loss"]))
    assert losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.trainable, state.reference)

    logps_of = {"caption": jax.jit(lambda policy, seen, asked, words, old, mask: jnp.where(mask, built.umm.text_logps(
                    policy, jnp.repeat(seen, 4, axis=0), asked.repeat(4).replace(words=words, words_mask=mask))[0], 0)),
                "draw": jax.jit(lambda policy, prompts, tokens, old: built.umm.image_logps(policy, prompts, tokens))}
    for step in (2, 3):
        (stage, *drawn, reward), after, metrics = step_of(built, base, stream, state, step)
        assert metrics["reward/flat"] == np.mean(np.ptp(np.asarray(reward).reshape(-1, 4), axis=1) == 0)
        assert metrics["kl"] < 1e-6 and metrics["logp_gap"] < 1e-4 and metrics["ratio_max"] == 1
        jax.tree.map(np.testing.assert_array_equal, after.reference, state.reference)
        old, new = (logps_of[stage](built.policy(base, of.trainable), *drawn).sum(axis=1) for of in (state, after))
        assert jnp.sum((new - old) * objectives.group_advantages(reward, 4, 1e-4)) > 0, stage
    (_, _, _, words, _, mask, _), _, metrics = step_of(built, base, stream, after, 4)
    ends = np.asarray(words) == built.umm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    length = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, built.config.uae.words)
    np.testing.assert_array_equal(mask.sum(axis=1), length)
    np.testing.assert_allclose(metrics["caption/length"], length.mean(), rtol=1e-6)


def test_kl_is_measured_to_what_the_cold_start_left(method, tmp_path):
    """Also by a run that goes on from a checkpoint."""
    built, base, stream = method
    state = built.init(base, jax.random.key(1))
    state = state.replace(trainable=jax.tree.map(lambda x: 1.02 * x, state.trainable))
    _, _, metrics = step_of(built, base, stream, state, 3)
    assert metrics["kl"] > 1e-4
    checkpoints = checkpoint.Checkpoints(tmp_path, built.mesh, writing=True)
    checkpoints.save(3, **state.saved())
    again = State(state.step, **checkpoints.load(3, **built.init(base, jax.random.key(2)).saved()))
    checkpoints.close()
    assert step_of(built, base, stream, again, 3)[2]["kl"] == metrics["kl"]


def test_pictures_are_compared_in_waves_as_all_at_once(method):
    built, base, _ = method
    pictures = jax.random.uniform(jax.random.key(0), (8, *built.umm.picture_size, 3))               # two of each
    whole, parts = (uae.Loop(built.umm, built.how, built.mesh, 4, waves).compare(base, [], pictures, pictures[::2])[0]
                    for waves in (1, 2))
    assert whole.shape == (8,) and len(set(whole[1::2].tolist())) == 4
    np.testing.assert_allclose(whole[::2], 1.0, atol=1e-5)                 # a picture is like itself, and in its place
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_a_caption_that_cannot_be_drawn_is_drawn_as_a_dash(method):
    built, _, _ = method
    ids = lambda text: built.umm.tokenizer(text, add_special_tokens=False, padding="max_length", max_length=12,
                                           padding_side="right")["input_ids"]
    texts = built.loop.texts(jnp.array([ids("top left red circle<|im_end|>"), ids("<|im_end|>"), ids("<MM-Token-3>")]))
    assert texts == ["top left red circle", "-", "-"]


def test_the_checker_judges_captions_and_what_was_drawn_from_them():
    scene = sentences.read_description("top left red circle, bottom right blue square")
    other = sentences.read_description("top left red circle")
    captions = {"top left red circle, bottom right blue square": (True, True, True),
                "bottom right blue square, top left red circle": (True, True, True),
                "top left red circle": (True, True, False), "a photo of a circle left of a square": (True, True, False),
                "a photo of a blue circle": (True, False, False), "top left red square": (True, False, False),
                "top left red circle, middle center blue square": (True, False, False), "nothing": (True, False, False),
                "top left red circle, top left red circle": (False, False, False), "red red red": (False, False, False)}
    originals = world.render(np.repeat(scene[None], len(captions), axis=0), np.random.default_rng(0))
    drawn = world.render(np.stack([scene, other] * (len(captions) // 2)), np.random.default_rng(1))
    found = suite.judge_captions(originals, list(captions), drawn)
    assert list(zip(found["language"], found["correct"], found["complete"])) == list(captions.values())
    assert found["recovery"].tolist() == [True, False] * (len(captions) // 2)


def test_captions_of_the_cold_start_leave_things_out_and_add_nothing():
    whole, part = (suite.picture_stream((3, 0), told, world.World()) for told in (1.0, 0.5))
    shorter = 0
    for i in range(40):
        found = suite.judge_captions(part[i]["pixels"][None], [part[i]["prompt"]], whole[i]["pixels"][None])
        assert found["language"] and found["correct"] and part[i]["prompt"] != "nothing"
        told = suite.judge_captions(whole[i]["pixels"][None], [whole[i]["prompt"]], whole[i]["pixels"][None])
        assert told["complete"]
        shorter += not found["complete"][0]
    assert 10 < shorter < 40
    np.testing.assert_array_equal(whole[7]["pixels"], whole[7]["pixels"])
    few = suite.picture_stream((3, 0), 1.0, world.World(), most=2)
    assert {few[i]["prompt"].count(",") for i in range(40)} == {0, 1}


def test_pictures_of_a_folder(tmp_path, method):
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.picture_stream(tmp_path / "none", (48, 48), 0)
    with pytest.raises(ValueError, match="no pictures"):
        data.picture_stream(tmp_path, (48, 48), 0)
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.JPG", quality=95)
    (tmp_path / "a.txt").write_text("a red square\n")
    stream = data.picture_stream(tmp_path, (48, 48), 0)
    examples = data.batch(stream, 0, 6)
    assert {example["prompt"] for example in examples} == {"a red square", None}
    for example in examples:
        assert example["pixels"].shape == (48, 48, 3) and example["pixels"].dtype == np.float32
        np.testing.assert_allclose(example["pixels"].mean((0, 1)), [1, 0, 0], atol=0.1)     # the middle of it
    with pytest.raises(ValueError, match="no .*b.txt: write it, or set uae.cold=0"):       # the cold start needs all
        data.check_captions(tmp_path, method[0].loop.encode)
    (tmp_path / "b.txt").write_text("a red circle " * 20)
    with pytest.raises(ValueError, match="b.txt is no caption .* has 64 tokens"):
        data.check_captions(tmp_path, method[0].loop.encode)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match="2 of the 2 captions .*no .*a.txt; .*b.txt is no caption"):     # all at once
        data.check_captions(tmp_path, method[0].loop.encode)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a red circle")
    data.check_captions(tmp_path, method[0].loop.encode)


def test_broken_pictures_are_all_named_before_anything_begins(tmp_path, command, monkeypatch):
    """At the start of a run, of either folder, and of an evaluation; not at the step where their turn comes."""
    folders = {name: tmp_path / name for name in ("train", "test")}
    for folder in folders.values():
        folder.mkdir()
        for i in range(4):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{i}.jpg")
        data.check_pictures(folder)
    for name in ("1.jpg", "3.jpg"):
        with open(folders["test"] / name, "r+b") as file:
            file.truncate(400)
    (folders["test"] / "0.txt").write_bytes(b"\xff\xff")
    monkeypatch.setitem(train.__globals__, "load_base", lambda *_: pytest.fail("it began"))
    (tmp_path / "prompts.txt").write_text("a red circle")
    config = load_config("xomni_uae")
    config.mesh.tensor, config.model.checkpoint = 1, str(tmp_path)
    config.pictures.update(folder=str(folders["train"]), held_out=str(folders["test"]))
    config.data.update(prompts=str(tmp_path / "prompts.txt"), held_out=str(tmp_path / "prompts.txt"))
    with pytest.raises(ValueError, match="3 of the 4 pictures in .*test.*0.txt.*1.jpg.*3.jpg") as error:
        train(config, tmp_path / "run")
    assert "2.jpg" not in str(error.value)
    line = command("evaluate", "--checkpoint=nowhere", "--suite=unified", f"--out={tmp_path}/o",
                   f"--pictures={folders['test']}")
    assert "3 of the 4 pictures" in line and not (tmp_path / "o").exists()


@pytest.mark.parametrize("changes, said", [
    ({"uae.stages": "caption"}, "caption:10,draw:10"), ({"uae.stages": "draw:0"}, "caption:10,draw:10"),
    ({"uae.group": 1}, "uae.group is 1"), ({"uae.micro_batches": 5}, "uae.micro_batches"),
    ({"uae.micro_batches": 3}, "uae.pairs"), ({"method": "uea"}, "uae"),
    ({"uae.scorers": "dino"}, "uae.scorers is 'dino'")])
def test_a_mistake_ends_in_one_line(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(uae_config(**changes), tmp_path)


def test_a_scorer_that_is_not_there_is_missed_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(train.__globals__, "load_base", lambda *_: pytest.fail("it began"))
    with pytest.raises(FileNotFoundError, match="/nowhere is no scorer"):
        train(uae_config(**{"uae.scorers": "own=1,/nowhere=1"}), tmp_path)


def test_a_run_goes_on_where_it_was_killed(tmp_path, command, monkeypatch):
    """Its last two steps lost, a run writes them again, to the last digit; and its report, its table and the suite."""
    dino = small(tmp_path / "dino")
    config, work = uae_config(**{"uae.scorers": f"own=0.5,{dino}=0.5"}), tmp_path / "work"
    put_untrained(config)
    summary = train(config, work)
    timeless = lambda: [{k: v for k, v in line.items() if "second" not in k} for line in
                        read_metrics(work / "metrics.jsonl")]
    lines = timeless()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert ["cold/draw" in line for line in lines if "loss" in line] == [True, True, False, False]
    measured = [line for line in lines if "unified/recovery" in line]
    assert [line["step"] for line in measured] == [0, 2, 4]
    assert summary["unified_before"]["similarity"] == pytest.approx(measured[1]["unified/similarity"], rel=1e-4)
    assert {"eval/overall", "unified/language", "unified/length", "unified/dinov3"} <= measured[2].keys()
    assert "Caption length" in (work / "report.html").read_text()
    shutil.rmtree(work / "checkpoints/4")
    train(config, work)
    assert timeless() == lines

    command("evaluate", f"--checkpoint={work}", "--suite=unified", f"--out={tmp_path}/out", "--prompts=24",
            "--images_per_prompt=2", "--words=8")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results["scores"]) == {"similarity", "length", "language", "correct", "complete", "recovery"}
    assert results["scores"]["length"] <= 8 and (tmp_path / "out/samples.png").exists()

    (tmp_path / "mine").mkdir()
    for i in range(2):
        Image.fromarray(np.full((60, 50, 3), 100 * i, np.uint8)).save(tmp_path / f"mine/{i}.png")
    monkeypatch.setattr(world, "World", None)                 # a picture of somebody's may have any grid
    assert not command("evaluate", f"--checkpoint={work}", "--suite=unified", f"--out={tmp_path}/out", "--prompts=6",
                       f"--pictures={tmp_path}/mine", "--batch=2", "--images_per_prompt=2", "--words=8",
                       f"--scorers={dino}")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["pictures"] == 2 and set(results["scores"]) == {"similarity", "length", "dinov3"}
    bench = results["bench"]["dinov3"]
    assert bench["min"] <= bench["mean"] <= bench["max"] and bench["mean"] == results["bench"]["overall"]
    assert bench["mean"] == pytest.approx(results["scores"]["dinov3"])
