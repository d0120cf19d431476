"""Intervals, calibration, questions of others; and what a model says of its own pictures."""
import base64
import dataclasses
import io
import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

import gvu_jax
from conftest import one_device
from gvu_jax import data, suite
from gvu_jax.models import vae


@pytest.fixture(scope="module")
def model(tiny):
    return gvu_jax.Model(*tiny[1:], one_device())


def test_intervals_hold_what_they_promise():
    """Prompts that differ much and pictures of one prompt that do not: 95 % of the intervals hold the true mean."""
    rng, held, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        chance = rng.uniform(size=(40, 1)) < 0.3                          # of a prompt's pictures: all right, or none
        metas = [{"prompt": str(i), "tag": "ab"[i % 2]} for i in range(40)]
        found = suite.by_category(np.repeat(chance, 8, axis=1), metas, draws=400)
        mean, low, high = found["overall"]
        np.testing.assert_allclose(mean, (found["a"][0] + found["b"][0]) / 2)
        held, widths = held + (low <= 0.3 <= high), [*widths, high - low]
    assert 180 <= held <= 198, "binomial(200, 0.95) lies there"
    assert 0.2 < np.mean(widths) < 0.32, "2 x 1.96 x sqrt(0.21 / 40) = 0.28, and not the width for 320 pictures"
    twice = suite.by_category([[1.0], [0.0], [1.0], [0.0]], [{"prompt": p} for p in ("x", "y", "x", "y")])["prompts"]
    assert twice == [0.5, 0.0, 1.0], "two prompts, however often they are drawn"


def test_what_pictures_come_to():
    """Means over the pictures of a category, and over categories; the AUC by counting pairs."""
    metas = [{"prompt": f"{tag}{i}", "tag": tag} for tag in "ab" for i in range(2)]
    of_a, of_b = [[1, 1], [1, 0]], [[0, 0], [1, 0]]
    verdicts = suite.Verdicts(np.array(of_a + of_b, bool), np.array([[1, 0], [0, 0]] + of_b, bool),
                              np.array([[1, 2], [3, 0], [1, 1], [2, 9]]), np.array([[1, 1], [1, 1], [1, 1], [2, 2]]))
    rewards = np.arange(8).reshape(4, 2) / 8
    graded = types.SimpleNamespace(metas=metas)
    scores, found = suite.Suite.grade(graded, rewards, verdicts)
    assert scores == {"overall": 0.5, "a": 0.75, "b": 0.25, "reward": 3.5 / 8}
    assert found["exact"] == {"overall": 0.25, "a": 0.25, "b": 0.25}
    assert found["objects"] == {"overall": (1.5 + 3.25) / 2, "a": 1.5, "b": 3.25}
    assert found["asked"] == {"overall": 1.25, "a": 1.0, "b": 1.5}
    assert found["auc"] == {"overall": 3 / 16, "a": 0.0, "b": 2 / 3}
    assert verdicts.marks.tolist() == [[1, 0.5], [0.5, 0], [0, 0], [1, 0]]
    scores, found = suite.Suite.grade(graded, rewards, None)
    assert scores == {"overall": 3.5 / 8, "a": 1.5 / 8, "b": 5.5 / 8, "reward": 3.5 / 8} and found == {"auc": {}}


def test_reliability():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=20000)
    right = rng.uniform(size=20000) < scores
    honest, boastful = suite.reliability(scores, right), suite.reliability(np.sqrt(scores), right)
    assert honest["error"] < 0.02 and abs(boastful["error"] - (2 / 3 - 1 / 2)) < 0.02
    assert [b["count"] for b in honest["bins"]] == [2000] * 10
    assert all(abs(b["score"] - (i + 0.5) / 10) < 0.01 for i, b in enumerate(honest["bins"]))


def test_content_words():
    assert suite.content("A photo of two crosses and a red glass.") == {"two", "cross", "red", "glass"}


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def tsv(tmp_path):
    """As pandas writes it: a quoted field with a line break, an option left empty, a picture that is another row's."""
    pictures = [np.full((48, 48, 3), shade, np.uint8) for shade in (20, 200)]
    rows = [["index", "hint", "question", "A", "B", "C", "answer", "category", "image"],
            ["0", "", "How many circles are there?", "one", "two", "three", "B", "count", encoded(pictures[0])],
            ["1", '"Look\nclosely."', "Where is the cross?", "top left", "bottom right", "", "A", "place",
             encoded(pictures[1])],
            ["2", "", "How many crosses are there?", "one", "two", "", "A", "count", "0"]]
    (tmp_path / "q.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return tmp_path / "q.tsv", rows, pictures


def test_questions_of_vlmevalkit(tsv):
    path, _, pictures = tsv
    choices = data.read_choices(path)
    assert [(c["question"], c["options"], c["answer"], c["category"]) for c in choices] == [
        ("How many circles are there?", ["one", "two", "three"], 1, "count"),
        ("Look\nclosely.\nWhere is the cross?", ["top left", "bottom right"], 0, "place"),
        ("How many crosses are there?", ["one", "two"], 0, "count")]
    for choice, expected in zip(choices, (0, 1, 0)):
        np.testing.assert_array_equal(data.decode_choice(choice), pictures[expected])


@pytest.mark.parametrize("row, column, value, words", [
    (0, 6, "solution", "no column answer"), (1, 6, "C", "index 0 needs"), (2, 6, "C", "index 1 needs"),
    (1, 2, " ", "index 0 needs"), (3, 4, "", "index 2 needs"), (1, 8, "", "index 0 needs")])
def test_bad_questions_are_refused_with_the_place(tsv, row, column, value, words):
    path, rows, _ = tsv
    rows[1][5] = ""                                                         # now C is no answer anywhere
    rows[row][column] = value
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    with pytest.raises(ValueError, match=words):
        data.read_choices(path)


@pytest.mark.parametrize("image, words", [("['AAAA', 'BBBB']", "several pictures"), ("AAAA", "read as a picture")])
def test_bad_pictures_are_refused_with_the_place(image, words):
    with pytest.raises(ValueError, match=f"index 7.*{words}"):
        data.decode_choice({"name": "q.tsv, index 7", "image": image})


def test_the_most_probable_option_is_chosen(tsv, model):
    """Whatever the number of options: as the mean log-probabilities of one option at a time would have it."""
    choices, best = data.read_choices(tsv[0]), []
    umm, see, read = model.umm, jax.jit(model.umm.see), jax.jit(model.umm.text_logps)
    lengths = umm.lengths(["bottom right"], questions=[choices[1]["question"]])
    for choice in choices:
        seen, scores = see(model.params, data.decode_choice(choice)[None].astype(np.float32) / 255), []
        for option in choice["options"]:
            logps, mask = read(model.params, seen, umm.encode_prompts([option], lengths, [choice["question"]]))
            scores.append(float(logps[mask].mean()))
        best.append(int(np.argmax(scores)))
    right = suite.choose(model, choices)
    np.testing.assert_array_equal(right, np.array(best) == [choice["answer"] for choice in choices])


def test_reading_in_batches_is_reading_one_by_one(model, monkeypatch):
    """Several texts a picture, more pictures than a batch holds, and a last batch that has to be filled up."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 48, 48, 3), np.uint8)
    texts = ["a red circle", "two crosses"] * 5
    monkeypatch.setattr(gvu_jax, "BATCH", 3)
    logps, mask = model.read(pictures, texts)
    monkeypatch.setattr(gvu_jax, "BATCH", 16)
    for i in (0, 4):
        alone, real = model.read(pictures[i:i + 1], texts[2 * i:2 * i + 2])
        np.testing.assert_allclose(logps[2 * i:2 * i + 2][real], alone[real], rtol=2e-5)
    assert mask.sum(axis=1).tolist() == [3, 2] * 5
    with pytest.raises(ValueError, match="5 pictures cannot be read with 7 texts"):
        model.read(pictures, texts[:7])
    with pytest.raises(ValueError, match="5 pictures cannot be asked 2 questions"):
        model.read(pictures, texts, ["which?"] * 2)
    with pytest.raises(ValueError, match="5 pictures cannot be asked about 10 prompts"):
        model.believes(pictures, texts)


def test_of_questions_with_few_options_every_copy_of_the_right_one_counts(monkeypatch):
    """Fewer options than others have are filled up by themselves; a copy may come out a rounding more probable."""
    told = np.log([[.2, .5, .2, .51], [.1, .2, .3, .4]]).reshape(-1, 1)                   # four of either question
    model = types.SimpleNamespace(umm=types.SimpleNamespace(lengths=lambda *texts: None),
                                  read=lambda *given: (told, np.ones(told.shape, bool)))
    monkeypatch.setattr(data, "decode_choice", lambda choice: None)
    few, many = (dict(question="?", options=list("abcd")[:count], answer=answer) for count, answer in ((2, 1), (4, 2)))
    assert suite.choose(model, [few, many]).tolist() == [True, False]


def test_prompts_are_chosen_evenly_over_the_categories():
    """A file may be sorted by them, as GenEval's is."""
    metas = [{"prompt": f"{tag} {i}", "tag": tag} for tag, count in (("a", 80), ("b", 1), ("c", 9)) for i in range(count)]
    chosen = suite.choose_prompts(metas, 8, np.random.default_rng(0))
    assert [meta["tag"] for meta in chosen] == list("aaabbbcc") and len({meta["prompt"] for meta in chosen}) == 6
    plain = suite.choose_prompts([{"prompt": str(i)} for i in range(9)], 9, np.random.default_rng(0))
    assert sorted(meta["prompt"] for meta in plain) == list("012345678")


@pytest.fixture
def evaluate(model, command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gvu_jax, "load", lambda path: model)

    def run(name, *arguments):
        end = command("evaluate", "--checkpoint=x", f"--suite={name}", f"--out={tmp_path}/out", *arguments)
        return end or json.loads((tmp_path / "out/results.json").read_text()), capsys.readouterr().out
    return run


def test_does_the_model_believe_its_own_pictures(evaluate, model, tmp_path):
    results, printed = evaluate("nonunification", "--prompts=6", "--images_per_prompt=2")
    counts = {name: found["pictures"] for name, found in results["rejected_of"].items()}
    assert counts["wrong"] + counts["right"] == 12 and counts["exact"] <= counts["right"] and set(results["scores"]) == set(results["intervals"]) and "overall" in results["scores"]
    assert f"{results['scores']['overall']:.3f}" in printed and (tmp_path / "out/samples.png").exists()
    (tmp_path / "p.txt").write_text("a photo of a red circle\na photo of two crosses\n")
    results, _ = evaluate("nonunification", f"--prompt_file={tmp_path}/p.txt", "--images_per_prompt=2", "--seed=3")
    prompts = ["a photo of a red circle", "a photo of two crosses"]
    believed = [model.believes(pictures, [prompt] * 2) for pictures, prompt in
                zip(model.generate(prompts, seed=3, images_per_prompt=2), prompts)]
    np.testing.assert_allclose(results["scores"]["overall"], np.mean(np.array(believed) < 0.5))
    np.testing.assert_allclose(results["yes"], np.mean(believed), rtol=1e-4)


def test_are_the_words_found_again(evaluate, model, monkeypatch, tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a red circle\na photo of two crosses\n")
    asked = []

    def answer(pictures, question, max_words):
        asked.append(question)
        return ["top left red square", "red circle", "bottom left green cross, top right green cross", "nothing"]
    monkeypatch.setattr(model, "answer", answer)
    results, _ = evaluate("cycle", f"--prompt_file={tmp_path}/p.txt", "--images_per_prompt=2")
    assert asked == ["Describe the image in detail."] and results["scores"]["overall"] == (0.5 + 1 + 0.5 + 0) / 4


@pytest.mark.parametrize("name, instead", [("shapes", "--suite"), ("understanding", "--tsv"), ("unified", "--pictures"),
                                           ("nonunification", "--prompt_file")])
def test_the_shapes_world_is_for_its_own_models(evaluate, model, monkeypatch, name, instead):
    published = dataclasses.replace(model.umm, vae=vae.Config(4, (8, 8), 1, 4, 1.0, 0.0))
    monkeypatch.setattr(model, "umm", published)
    line, _ = evaluate(name)
    assert "no model of the shapes world" in line and instead in line


def test_questions_whose_pictures_cannot_be_read_are_left_out(evaluate, tsv):
    path, rows, _ = tsv
    rows[1][-1] = encoded(np.zeros((48, 96, 3), np.uint8))
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    results, printed = evaluate("understanding", f"--tsv={path}")
    assert (results["questions"], results["refused"]) == (1, 2), "the third row shows the picture of the first"
    assert "left out: 2 questions" in printed


def test_questions_from_the_command_line(evaluate, tsv):
    results, printed = evaluate("understanding", f"--tsv={tsv[0]}")
    assert results["questions"] == 3 and set(results["scores"]) == {"overall", "count", "place"}
    assert "place" in printed
    assert "--suite=understanding" in evaluate("cycle", f"--tsv={tsv[0]}")[0]
    assert "--suite=unified" in evaluate("shapes", f"--pictures={tsv[0].parent}")[0]
    assert "--prompt_file" in evaluate("understanding", "--prompt_file=x.txt")[0]
