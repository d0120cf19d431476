"""Intervals, calibration, questions of others; and what a model says of its own pictures."""
import base64
import collections
import csv
import dataclasses
import io
import json
import re
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gvu_jax
from conftest import one_device
import toy
from gvu_jax import data, rewards, suite
from gvu_jax.models import vae
from gvu_jax.sampling import How
from gvu_jax.umm import compile_programs
from test_decode import some


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


def test_a_prompt_goes_with_its_repetitions():
    """Three prompts, one of which was drawn four times: the interval is that of three draws among three prompts, each
    with all of its rows, and overall of the means of the categories; by the bootstrap in a loop."""
    prompts = ["x", "y", "x", "x", "z", "x"]
    values = np.random.default_rng(1).uniform(size=(6, 3)) + np.array([0, 2, 0, 0, 4, 0])[:, None]
    rng, means = np.random.default_rng(2), []
    for _ in range(4000):
        drawn = [values[[i for i, prompt in enumerate(prompts) if prompt == one]] for one in rng.choice(list("xyz"), 3)]
        means.append(np.concatenate(drawn).mean())
    metas = [{"prompt": prompt, "tag": "a"} for prompt in prompts] + [{"prompt": "w", "tag": "b"}]
    found = suite.by_category(np.concatenate([values, [[7.0] * 3]]), metas, draws=4000)
    np.testing.assert_allclose(found["a"], [values.mean(), *np.percentile(means, [2.5, 97.5])], atol=0.05)
    np.testing.assert_allclose(found["overall"], (np.array(found["a"]) + 7) / 2)


def test_what_pictures_come_to():
    """Means over the pictures of a category, and over categories; the AUC by counting pairs."""
    metas = [{"prompt": f"{tag}{i}", "tag": tag} for tag in "ab" for i in range(2)]
    of_a, of_b = [[1, 1], [1, 0]], [[0, 0], [1, 0]]
    verdicts = suite.Verdicts(np.array(of_a + of_b, bool), np.array([[1, 0], [0, 0]] + of_b, bool),
                              np.array([[1, 2], [3, 0], [1, 1], [2, 9]]), np.array([[1, 1], [1, 1], [1, 1], [2, 2]]),
                              np.array([[0, .5], [.5, 0], [.25, 0], [0, .25]]))
    rewards = np.arange(8).reshape(4, 2) / 8
    graded = types.SimpleNamespace(metas=metas)
    scores, found = suite.Suite.grade(graded, rewards, verdicts)
    assert scores == {"overall": 0.5, "a": 0.75, "b": 0.25, "reward": 3.5 / 8}
    assert found["exact"] == {"overall": 0.25, "a": 0.25, "b": 0.25}
    assert found["objects"] == {"overall": (1.5 + 3.25) / 2, "a": 1.5, "b": 3.25}
    assert found["asked"] == {"overall": 1.25, "a": 1.0, "b": 1.5}
    assert found["haze"] == {"overall": 0.1875, "a": 0.25, "b": 0.125}
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


def test_rewards_are_read_from_what_the_run_reads():
    """With the view "tokens" from what was drawn as it is: of the toy, whose pixels are seen with noise."""
    umm, how, mesh = toy.Toy(), How(images_per_prompt=3), one_device()
    programs, metas = compile_programs(umm, how, mesh), [{"prompt": text} for text in ("ab", "cd", "a", "b")]
    params, found = toy.as_params(toy.tables(0)), {}
    for view in ("pixels", "tokens"):
        of_run = suite.Suite(umm, programs, metas, 2, 3, umm.lengths([meta["prompt"] for meta in metas]), 0, view=view)
        found[view] = of_run.sample(params, params)[1]
        for i, of_batch in enumerate((metas[:2], metas[2:])):
            prompts = umm.encode_prompts([meta["prompt"] for meta in of_batch], of_run.lengths)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
            drawn, _ = umm.sample_image(params, prompts, keys[0], how)
            seen = umm.seen_of(drawn) if view == "tokens" else umm.see(params, umm.render(params, drawn, prompts, keys[1]))
            reward = rewards.geometric_mean(*umm.text_logps(params, seen, prompts.repeat(3)))
            np.testing.assert_allclose(found[view][2 * i:2 * i + 2].ravel(), reward, rtol=1e-5)
    assert not np.allclose(found["pixels"], found["tokens"])


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


NO_ANSWER = "without an answer that is the letter of one option"


@pytest.mark.parametrize("row, column, value, reason", [
    (1, 6, "D", NO_ANSWER), (2, 6, "C", NO_ANSWER), (1, 6, "", NO_ANSWER), (1, 6, "nan", NO_ANSWER),
    (1, 6, "AB", NO_ANSWER), (1, 2, " ", "without a question"), (1, 2, "NaN", "without a question"),
    (1, 4, "#NAME?", "with an error of a spreadsheet (#NAME?) in place of text"),
    (3, 4, "", "with fewer than two options"), (2, 8, "", "without a picture"), (2, 8, "1", "without a picture"),
    (2, 8, "x/0.png", "whose picture is a file that is not there"),
    (2, 8, "x" * 5000 + ".png", "whose picture is a file that is not there"),
    (2, 8, "['AAAA', 'BBBB']", "of several pictures"), (2, 8, "['AAAA' 'BBBB']", "of several pictures"),
    (2, 8, "[0, 2]", "of several pictures"), (2, 8, "/9j/4AAA /9j/4AAA", "of several pictures"),
    (2, 8, "AAAA\tmore", "whose cells do not fit the columns (a quote that is not closed?)"),
    (2, 2, '"What?', "whose cells do not fit the columns (a quote that is not closed?)")])
def test_rows_that_cannot_be_asked_are_left_out_and_counted(tsv, row, column, value, reason):
    path, rows, _ = tsv
    rows[row][column], left_out = value, collections.Counter()
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    choices = data.read_choices(path, left_out)
    gone = 2 if value == '"What?' else 1                                    # a quote takes the rows after it along
    assert left_out == {reason: 1} and len(choices) == 3 - gone
    assert f"index {row - 1}" not in [choice["name"].split(", ")[-1] for choice in choices]
    path.write_text("".join("\t".join(cells) + "\n" for cells in (rows[0], rows[row])))
    with pytest.raises(ValueError, match="has no row that can be asked: 1 w|has no row that can be asked: 1 of sev"):
        data.read_choices(path)


def test_a_table_that_is_another_one_names_its_columns(tsv):
    path, rows, _ = tsv
    rows[0][6] = "solution"
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    with pytest.raises(ValueError, match="no column answer: .*Its columns are index, hint, .*solution"):
        data.read_choices(path)


EMPTY = ["", " ", "nan", "NaN", "<NA>", "NaT", "#N/A"]


@pytest.mark.parametrize("mark", EMPTY)
def test_an_empty_cell_is_empty_whatever_wrote_it(tsv, mark, capsys):
    path, rows, _ = tsv
    expected = data.read_choices(path)
    path.write_text("".join("\t".join(cell or mark for cell in cells) + "\n" for cells in rows))
    assert data.read_choices(path) == expected
    cells = sum(cell == "" for row in rows for cell in row)
    said = capsys.readouterr().err
    assert said.count("note:") == (mark.strip() != "") and (not mark.strip() or f"{cells} cells" in said)


@pytest.mark.parametrize("options, read", [
    (["yes", "no", "None", "nan"], ["yes", "no", "None"]), (["yes", "no", "None", "None"], ["yes", "no"]),
    (["NA", "Na", "K", "nan"], ["NA", "Na", "K"]), (["Nan", "bread", "nan", "<NA>"], ["Nan", "bread"]),
    (["null", "0", "null", "null"], None), (["2.0", "3.0", "nan", "nan"], ["2", "3"]), (["2.0", "2.5", "", ""], None)])
def test_words_that_people_write_too_stay_options(tmp_path, options, read):
    """A word is an option unless the row has it twice; of floats, those columns that hold nothing else are whole."""
    header, row = ["index", "question", *"ABCD", "answer", "image", "hint"], ["1.0", "?", *options, "b", "AAAA", "None"]
    (tmp_path / "q.tsv").write_text("\t".join(header) + "\n" + "\t".join(row) + "\n")
    if read is None and options[0] == "null":
        with pytest.raises(ValueError, match="fewer than two"):
            data.read_choices(tmp_path / "q.tsv")
    else:
        choice, = data.read_choices(tmp_path / "q.tsv")
        assert choice["options"] == (read or ["2", "2.5"]) and choice["question"] == "?" and choice["answer"] == 1
        assert choice["name"].endswith("index 1")


@pytest.mark.parametrize("encoding, end", [("utf-8", "\r\n"), ("utf-8-sig", "\n"), ("utf-16", "\r\n"), ("utf-8", "\r")])
def test_a_table_from_a_spreadsheet(tsv, encoding, end):
    path, _, _ = tsv
    expected, text = data.read_choices(path), path.read_text()
    path.write_bytes(text.replace("\n", end).replace("index", "index ", 1).encode(encoding))
    assert data.read_choices(path) == expected


def test_a_picture_beside_the_table_or_of_another_row(tsv, tmp_path):
    """image_path instead of image; indices that became floats; chains of rows."""
    path, rows, pictures = tsv
    rows[3][-1], rows[1][0] = "0.0", "0.0"
    rows.append(["3.0", *rows[3][1:-1], "['2']"])
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    for choice, expected in zip(data.read_choices(path), (0, 1, 0, 0), strict=True):
        np.testing.assert_array_equal(data.decode_choice(choice), pictures[expected])
    Image.fromarray(pictures[1]).save(tmp_path / "a.png")
    names = ["image_path", "a.png", "['a.png']", "['a.png', 'a.png']", "b.png"]
    path.write_text("".join("\t".join([*cells[:-1], name]) + "\n" for cells, name in zip(rows, names)))
    choices = data.read_choices(path)
    assert len(choices) == 2 and all((data.decode_choice(choice) == pictures[1]).all() for choice in choices)


CELL = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(
    lambda text: text and text not in data.NOTHING | data.PERHAPS and not re.fullmatch(r"-?\d+\.0+", text))


@some
@given(asked=st.lists(st.tuples(CELL, st.lists(CELL, min_size=2, max_size=5), st.integers(0, 4)), min_size=1,
                      max_size=4),
       mark=st.sampled_from(EMPTY), dialect=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), lower=st.booleans())
def test_any_table_comes_back_as_it_was_written(tmp_path_factory, asked, mark, dialect, encoding, lower):
    letters, buffer = "ABCDE", io.StringIO()
    table = csv.writer(buffer, delimiter="\t", quoting=dialect)
    table.writerow(["index", "question", *letters, "answer", "image"])
    for i, (question, options, answer) in enumerate(asked):
        letter = letters[answer % len(options)]
        empty = [mark] * (5 - len(options))
        table.writerow([i, question, *options, *empty, letter.lower() if lower else letter, "AA=="])
    path = tmp_path_factory.mktemp("tables") / "q.tsv"
    path.write_bytes(buffer.getvalue().encode(encoding))
    assert [(c["question"], c["options"], c["answer"]) for c in data.read_choices(path)] == [
        (question, options, answer % len(options)) for question, options, answer in asked]


@some
@given(content=st.binary() | st.lists(st.lists(
    st.text(max_size=6) | st.sampled_from(["A", "nan", "['", "0", '"', "1.0"]), min_size=1, max_size=8), max_size=5
    ).map(lambda rows: "\n".join(map("\t".join, [["index", "question", *"AB", "answer", "image"], *rows])).encode(
            errors="replace")))
def test_any_table_is_read_or_refused(tmp_path_factory, content):
    path, left_out = tmp_path_factory.mktemp("tables") / "q.tsv", collections.Counter()
    path.write_bytes(content)
    try:
        choices = data.read_choices(path, left_out)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(len(c["options"]) > 1 and c["question"] and 0 <= c["answer"] < len(c["options"]) for c in choices)
        for choice in choices:
            with pytest.raises(ValueError, match=re.escape(choice["name"])):
                data.decode_choice(choice)


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


def test_rows_left_out_are_in_the_results(evaluate, tsv):
    """A truncated picture, two of several, one without an answer: the rest is asked."""
    path, rows, _ = tsv
    rows += [["9", *rows[1][1:-1], rows[1][-1][:100]], ["10", *rows[1][1:-1], "['AAAA', 'BBBB']"],
             ["11", *rows[1][1:-1], "[0, 1]"], ["12", *rows[1][1:6], "", "count", "0"]]
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    results, printed = evaluate("understanding", f"--tsv={path}")
    assert results["questions"] == 3 and results["left_out"] == {
        "of several pictures": 2, NO_ANSWER: 1, "whose picture cannot be read": 1}
    assert f"left out: 2 of several pictures, 1 {NO_ANSWER}, 1 whose picture cannot be read" in printed
    path.write_text("".join("\t".join(cells) + "\n" for cells in (rows[0], rows[4])))
    line, _ = evaluate("understanding", f"--tsv={path}")
    assert "no question can be asked: 1 whose picture cannot be read" in line
    assert "index 9" in line and "truncated" in line


def test_a_row_whose_text_the_model_does_not_take_ends_no_other(evaluate, tsv):
    path, rows, _ = tsv
    rows += [["9", "", "Is it red?", "yes<|user|>", "no", "", "A", "count", rows[1][-1]],
             ["10", "", "Is it red?<|im_end|>", "yes", "no", "", "A", "count", rows[1][-1]]]
    path.write_text("".join("\t".join(cells) + "\n" for cells in rows))
    results, printed = evaluate("understanding", f"--tsv={path}")
    assert results["questions"] == 3 and results["left_out"] == {"whose text the model does not take": 2}
    assert "left out: 2 whose text the model does not take" in printed
    path.write_text("".join("\t".join(cells) + "\n" for cells in (rows[0], rows[5])))
    line, _ = evaluate("understanding", f"--tsv={path}")
    assert "no question can be asked: 1 whose text" in line and "index 10" in line and "<|im_end|>" in line


def test_questions_from_the_command_line(evaluate, tsv):
    results, printed = evaluate("understanding", f"--tsv={tsv[0]}")
    assert results["questions"] == 3 and set(results["scores"]) == {"overall", "count", "place"}
    assert "place" in printed
    assert "--suite=understanding" in evaluate("cycle", f"--tsv={tsv[0]}")[0]
    assert "--suite=unified" in evaluate("shapes", f"--pictures={tsv[0].parent}")[0]
    assert "--prompt_file" in evaluate("understanding", "--prompt_file=x.txt")[0]
