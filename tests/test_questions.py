"""Atomic questions from metadata, their answers, and what they come to; who is asked is compared with transformers."""
import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

import gvu_jax
from conftest import one_device, tiny_config
from gvu_jax import data, questions, suite
from gvu_jax.questions import YES_NO, Atom
from gvu_jax.shapes import checker, world
from gvu_jax.shapes import suite as shapes_suite
from test_qwen25_vl import PICTURE, TINY, torch_model


def item(name, count=1, **more):
    return {"class": name, "count": count, **more}


# ------------------------------------------------------------------ from metadata to questions

@pytest.mark.parametrize("include, asked", [
    ([item("bench"), item("dog", position=["right of", 0])],
     [("object", "Is there a bench in the image?", "Yes"), ("object", "Is there a dog in the image?", "Yes"),
      ("position", "Is the dog to the right of the bench?", "Yes")]),
    ([item("bus", 3, color="white"), item("umbrella", size="large", position=["above", 0])],
     [("object", "Are there any buses in the image?", "Yes"), ("count", "How many buses are in the image?", "three"),
      ("color", "Are the buses white?", "Yes"), ("object", "Is there an umbrella in the image?", "Yes"),
      ("size", "Is the umbrella large?", "Yes"), ("position", "Is the umbrella above the buses?", "Yes")]),
    ([item("skis", 2), item("scissors", color="red")],
     [("object", "Are there any pairs of skis in the image?", "Yes"),
      ("count", "How many pairs of skis are in the image?", "two"),
      ("object", "Is there a pair of scissors in the image?", "Yes"),
      ("color", "Is the pair of scissors red?", "Yes")]),
    ([item("cup", color="blue"), item("cup", color="red")],
     [("object", "Is there a blue cup in the image?", "Yes"), ("object", "Is there a red cup in the image?", "Yes")])])
def test_each_part_of_a_prompt_is_a_question(include, asked):
    atoms = questions.atoms_of({"prompt": "p", "include": include})
    assert [(atom.skill, atom.question, atom.answers[atom.right][0]) for atom in atoms] == [
        (skill, f"{question} Answer in one word.", answer) for skill, question, answer in asked]


def test_the_questions_of_geneval2_are_asked_as_they_are():
    meta = {"prompt": "four white bicycles", "atom_count": 3, "skills": ["count", "attribute"],
            "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"]]}
    count, color = questions.atoms_of(meta)
    assert count == Atom("count", "How many bicycles are in the image? Answer in one word.", questions.COUNTS, 4)
    assert set(count.answers[4]) == {"four", "Four", "4"} and (color.skill, color.answers, color.right) == (
        "attribute", YES_NO, 0)


@pytest.mark.parametrize("meta, word", [
    ({}, "include"), ({"include": []}, "asks for no object"), ({"include": [item("dog", 11)]}, "count of 11"),
    ({"include": [item("dog", position=["near", 0])]}, "near"),
    ({"include": [item("dog", position=["above", 1])]}, "object 1"),
    ({"include": ["dog"]}, "GenEval"), ({"vqa_list": [["What is it?", "a dog"]]}, "a dog")])
def test_what_cannot_be_asked_is_said(meta, word):
    with pytest.raises(ValueError, match=word):
        questions.atoms_of({"prompt": "a photo of a dog", **meta})


def test_in_the_shapes_world_only_the_prompt_is_true_of_its_picture(split):
    """Every other caption of an atom is false of a scene that shows the prompt and nothing else; "shapes" is what it
    calls things that differ in shape."""
    rng, captions = np.random.default_rng(0), shapes_suite.prompts()
    skills = {"counting": {"object", "count", "color"}, "position": {"object", "position", "color"},
              "colors": {"object", "color"}, "color_attr": {"object", "color"}}
    for meta in split[1][::7]:
        scene, atoms = shapes_suite.shown(world.read(meta), rng), shapes_suite.atoms_of(meta)
        assert {atom.skill for atom in atoms} <= skills.get(meta["tag"], {"object"}) and atoms
        for atom in atoms:
            (right,), *others = atom.answers
            assert (atom.question, atom.right, right) == (None, 0, meta["prompt"])
            for other, in others:
                assert "shapes" in other or not world.exact_scene(scene, captions[other]), (meta["prompt"], other)


def test_damaged_renderings_do_not_show_their_prompt(split):
    metas = suite.choose_prompts(split[1], 48, np.random.default_rng(0))
    pictures = shapes_suite.renderings(metas, np.random.default_rng(1))
    each = [meta for meta in metas for _ in range(2)]
    exact = checker.judge(pictures.reshape(-1, *pictures.shape[2:]) / np.float32(255), each).exact
    np.testing.assert_array_equal(exact.reshape(-1, 2), [[True, False]] * 48)


# ------------------------------------------------------------------ from questions to scores

class Table:
    """A judge that knows the probabilities of texts: {(shade of the picture, question, text): p}."""
    umm = types.SimpleNamespace(instruction="Describe.", of_shapes=False)

    def __init__(self, table):
        self.table = table

    def read(self, pictures, texts, asked, end):
        K = len(texts) // len(pictures)
        p = [self.table[int(pictures[i // K].flat[0]), asked[i // K], text] for i, text in enumerate(texts)]
        logps = np.log(np.array(p))[:, None] * [0.25, 0.75, 5.0]                    # over two tokens; the third is none
        return logps, np.array([[True, True, False]] * len(p))


def test_a_probability_is_shared_out_among_the_answers_offered():
    either = Atom("object", "here?", (("Yes", "yes"), ("No",)), 0)
    number = Atom("count", None, (("one",), ("two",), ("three",)), 1)
    judge = Table({(0, "here?", "Yes"): .1, (0, "here?", "yes"): .2, (0, "here?", "No"): .1, (9, "here?", "Yes"): .01,
                   (9, "here?", "yes"): .01, (9, "here?", "No"): .03, (9, "Describe.", "one"): .1,
                   (9, "Describe.", "two"): .3, (9, "Describe.", "three"): .2})
    dark, light = (np.full((1, 1, 3), shade, np.uint8) for shade in (0, 9))
    p, chosen = questions.ask(judge, [dark, light, light], [either, number, either])
    np.testing.assert_allclose(p, [.75, .5, .4], rtol=1e-6)
    assert chosen.tolist() == [True, True, False]


def test_a_picture_has_the_geometric_mean_of_its_answers():
    atoms = [[Atom("object", None, YES_NO, 0), Atom("color", None, YES_NO, 0)], [Atom("object", None, YES_NO, 0)]]
    answers = questions.Answers(atoms, [np.array([[.9, .4], [.0, .8]]), np.array([[.25], [.5]])],
                                [np.array([[True, True], [False, True]]), np.array([[False], [True]])])
    np.testing.assert_allclose(answers.soft, [[.6, np.sqrt(questions.LEAST * .8)], [.25, .5]])
    assert answers.hard.tolist() == [[True, False], [False, True]]
    metas = [{"prompt": "x", "tag": "colors"}, {"prompt": "y", "tag": "single_object"}]
    found = questions.scores(answers, metas)
    assert found["hard"]["overall"][0] == found["hard"]["colors"][0] == .5
    np.testing.assert_allclose(found["soft"]["single_object"], [.375] * 3)
    np.testing.assert_allclose([found["skills"]["object"][0], found["skills"]["color"][0]], [(.45 + .375) / 2, .6])
    told = list(questions.lines(answers, metas))
    assert [(line["prompt"], line["picture"]) for line in told] == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert told[0]["atoms"][1] == {"skill": "color", "question": None, "right": "Yes", "probability": .4}


def test_a_judge_answers_as_transformers_does():
    """A tiny random Qwen2.5-VL: pictures of two sizes, whether and how many; every spelling by itself in torch."""
    torch = pytest.importorskip("torch")
    from gvu_jax.families import qwen_sd35 as family
    from gvu_jax.models import qwen25_vl as vl
    from gvu_jax.shapes.tokenizer import UNKNOWN, of_words
    tokenizer = of_words((family.PAD, family.BEGIN, family.PICTURE, "<|video_pad|>", family.END, UNKNOWN, family.TURN,
                          family.STOP), pad_token=family.PAD)
    config, vision = dataclasses.replace(TINY[0][0], vocab_size=len(tokenizer)), TINY[0][1]
    theirs, tensors = torch_model(config, vision)
    params, tower = vl.from_torch(tensors, config, vision)
    step = vision.multiple
    umm = family.QwenSD35(config, vision, types.SimpleNamespace(patch_size=1), types.SimpleNamespace(downscale=step),
                          None, tokenizer, (5, 5), vl.Transform(min_pixels=step ** 2, max_pixels=(9 * step) ** 2), ())
    model = gvu_jax.Model(umm, {"ar": {"llm": params}, "vision": tower}, one_device())
    meta = {"prompt": "three circles", "include": [item("circle", 3)]}
    atoms, rng = questions.atoms_of(meta), np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (rows * step, cols * step, 3), np.uint8) for rows, cols in ((5, 5), (4, 6))]
    found, _ = questions.ask(model, [picture for picture in pictures for _ in atoms], atoms * 2)

    def logp(picture, question, text):
        before, after = umm._around(question)
        said, (rows, cols) = umm._ids(umm.said(text)), (side // step for side in picture.shape[:2])
        ids = torch.tensor([[*before, *[PICTURE] * (rows * cols), *after, *said]])
        values = np.asarray(vl.patches(picture[None].astype(np.float32) / 255, vision))[0]
        shown = dict(image_grid_thw=torch.tensor([[1, 2 * rows, 2 * cols]]), attention_mask=torch.ones_like(ids))
        places, _ = theirs.model.get_rope_index(ids, (ids == PICTURE).int(), **shown)
        with torch.no_grad():
            logits = theirs(input_ids=ids, position_ids=places, pixel_values=torch.from_numpy(values),
                            mm_token_type_ids=(ids == PICTURE).int(), **shown).logits[0].log_softmax(-1)
        return sum(float(logits[-len(said) - 1 + i, word]) for i, word in enumerate(said))

    expected = []
    for picture in pictures:
        for atom in atoms:
            p = [sum(np.exp(logp(picture, atom.question, text)) for text in spelled) for spelled in atom.answers]
            expected.append(p[atom.right] / sum(p))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert np.ptp(found) > 1e-3


# ------------------------------------------------------------------ pictures from anywhere

def save(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((48, 48, 3), shade, np.uint8)).save(path)


METAS = [{"tag": "colors", "prompt": "a photo of a red circle", "include": [item("circle", color="red")]},
         {"tag": "counting", "prompt": "a photo of two crosses", "include": [item("cross", 2)], "exclude": []}]


@pytest.fixture
def drawn(tmp_path):
    """The same pictures in GenEval's layout and by their prompts' places, and the file of prompts."""
    for i, meta in enumerate(METAS):
        for j in range(2):
            save(tmp_path / f"geneval/{i:05d}/samples/{j:04d}.png", 10 * i + j)
            save(tmp_path / f"flat/{i:05d}_{j}.png", 10 * i + j)
        (tmp_path / f"geneval/{i:05d}/metadata.jsonl").write_text(json.dumps(meta))
        save(tmp_path / f"geneval/{i:05d}/grid.png", 200)
    save(tmp_path / "flat/grid.png", 200)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(meta) + "\n" for meta in METAS))
    return tmp_path


def test_pictures_go_with_their_prompts(drawn):
    for metas, pictures in (data.drawn_pictures(drawn / "geneval"), data.drawn_pictures(drawn / "flat", METAS)):
        assert metas == METAS and [[int(p.flat[0]) for p in of] for of in pictures] == [[0, 1], [10, 11]]
    with pytest.raises(ValueError, match="--prompt_file"):
        data.drawn_pictures(drawn / "flat")
    (drawn / "flat/00001_1.png").unlink()
    with pytest.raises(ValueError, match="1 pictures of prompt 1 .* and 2 of others"):
        data.drawn_pictures(drawn / "flat", METAS)
    (drawn / "flat/00001_0.png").unlink()
    with pytest.raises(ValueError, match="0 pictures of prompt 1"):
        data.drawn_pictures(drawn / "flat", METAS)


@pytest.fixture
def evaluate(tiny, command, monkeypatch, tmp_path, capsys):
    model = gvu_jax.Model(*tiny[1:], one_device())
    monkeypatch.setattr(gvu_jax, "load", lambda path: model)

    def run(*arguments):
        end = command("evaluate", "--suite=questions", f"--out={tmp_path}/out", *arguments)
        return end or json.loads((tmp_path / "out/results.json").read_text()), capsys.readouterr().out
    return run


def test_the_command_asks_about_renderings_folders_and_what_it_draws(evaluate, drawn, monkeypatch):
    results, printed = evaluate("--judge=x", "--prompts=6")
    assert results["pictures"] == 12 and {"soft", "hard", "skills", "agreement"} <= set(results)
    assert "agrees with the checker" in printed and f"{results['soft']['scores']['overall']:.3f}" in printed
    assert sum(found["pictures"] for found in results["accepted_of"].values()) == 12
    by_layout = evaluate("--judge=x", f"--pictures={drawn}/geneval")[0]
    assert by_layout["pictures"] == 4 and set(by_layout["skills"]["scores"]) == {"object", "color", "count"}
    by_place = evaluate("--judge=x", f"--pictures={drawn}/flat", f"--prompt_file={drawn}/prompts.jsonl")[0]
    assert by_place["soft"] == by_layout["soft"] and "agreement" not in by_place
    told = [json.loads(line) for line in (drawn / "out/answers.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(by_place["soft"]["scores"]["colors"], np.mean([line["soft"] for line in told[:2]]),
                               atol=1e-5)
    results, _ = evaluate("--judge=x", "--checkpoint=x", f"--prompt_file={drawn}/prompts.jsonl", "--images_per_prompt=2")
    assert results["pictures"] == 4 and (drawn / "out/samples.png").exists()


@pytest.mark.parametrize("arguments, word", [
    ((), "needs a --judge"), (("--judge=x", "--prompt_file=prompts.jsonl"), "needs pictures"),
    (("--judge=x", "--checkpoint=x", "--pictures=flat"), "one of the two"),
    (("--judge=x", "--pictures=flat"), "--prompt_file"), (("--judge=x", "--pictures=nowhere"), "no folder"),
    (("--judge=x", "--pictures=flat", "--prompt_file=other.jsonl"), "no other prompts")])
def test_what_does_not_go_together_is_said(evaluate, drawn, monkeypatch, arguments, word):
    monkeypatch.chdir(drawn)
    (drawn / "other.jsonl").write_text("".join(json.dumps({**meta, "prompt": f"a {i} dog"}) + "\n"
                                               for i, meta in enumerate(METAS)))
    assert word in evaluate(*arguments)[0]


def test_the_judge_of_a_run(tiny, monkeypatch, split, tmp_path):
    """What training asks at each evaluation is what the suite asks of the same pictures."""
    model, config = gvu_jax.Model(*tiny[1:], one_device()), tiny_config()
    monkeypatch.setattr(gvu_jax, "load", lambda path: model)
    metas = suite.choose_prompts(split[1], 6, np.random.default_rng(0))
    assert questions.build_judge(config, metas) is None
    config.eval.judge = str(tmp_path)
    questions.check_judge(config)
    pictures = shapes_suite.renderings(metas, np.random.default_rng(0))
    told = questions.build_judge(config, metas)(pictures)
    answers = questions.judge(model, pictures, questions.atoms_for(model.umm, metas))
    np.testing.assert_allclose([told["soft_overall"], told["hard_overall"]], [answers.soft.mean(), answers.hard.mean()])
    assert f"soft_{metas[0]['tag']}" in told
    config.eval.judge = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="eval.judge"):
        questions.check_judge(config)
