"""Prompts that the package writes: what they say, what they carry, and that nothing held out is trained on."""
import collections
import json
import time

import pytest

from gvu_jax import prompts
from gvu_jax.data import prompt_stream, read_prompts
from gvu_jax.prompts import Spec, Thing


@pytest.fixture(scope="module")
def many():
    """(training prompts, held-out prompts) of the default numbers, and the seconds they took."""
    began = time.time()
    return *prompts.make_prompts(50_000, 550, 0), time.time() - began


def test_fifty_thousand_prompts_take_less_than_a_minute_and_none_is_there_twice(many):
    training, held_out, seconds = many
    assert (len(training), len(held_out)) == (50_000, 550) and seconds < 60
    assert len({meta["prompt"] for meta in training}) == 50_000 and len({meta["prompt"] for meta in held_out}) == 550


def test_no_composition_is_on_both_sides(many):
    training, held_out = ({prompts.composition(meta) for meta in metas} for metas in many[:2])
    assert not training & held_out and None not in training | held_out and len(held_out) == 550
    assert any(" left of " in asked for asked in held_out) and not any(" right of " in asked for asked in held_out)


def test_every_category_has_its_share(many):
    for metas in many[:2]:
        counts = collections.Counter(meta["tag"] for meta in metas)
        assert set(counts) == set(prompts.TAGS)
        large = [count for tag, count in counts.items() if tag not in ("single_object", "counting", "colors")]
        assert max(large) - min(large) <= 1 and min(large) >= len(metas) / len(prompts.TAGS)
    assert {name for meta in many[0] for name in (one["class"] for one in meta["include"])} == set(prompts.CLASSES)


def test_the_metadata_are_those_that_genevals_evaluator_reads(many):
    for meta in many[0][:5000]:
        assert set(meta) == {"tag", "include", "exclude", "prompt"}
        for one in meta["include"]:
            assert set(one) <= {"class", "count", "color", "position", "size"} and one["class"] in prompts.CLASSES
            assert one.get("color", "red") in prompts.COLORS and one["class"] != one.get("color")
        counted = {one["class"]: one["count"] for one in meta["include"] if one["count"] > 1}
        assert meta["exclude"] == [{"class": name, "count": count + 1} for name, count in (
            (one["class"], counted.get(one["class"])) for one in meta["exclude"])] and len(meta["exclude"]) == len(counted)


@pytest.mark.parametrize("spec, said, include", [                       # of GenEval's file, as published
    (Spec("single_object", (Thing("bench"),)), "a bench", [{"class": "bench", "count": 1}]),
    (Spec("counting", (Thing("clock", 2),)), "two clocks", [{"class": "clock", "count": 2}]),
    (Spec("colors", (Thing("fire hydrant", color="blue"),)), "a blue fire hydrant",
     [{"class": "fire hydrant", "count": 1, "color": "blue"}]),
    (Spec("position", (Thing("dog"), Thing("teddy bear")), "right of"), "a dog right of a teddy bear",
     [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]),
    (Spec("color_attr", (Thing("wine glass", color="purple"), Thing("apple", color="black"))),
     "a purple wine glass and a black apple", [{"class": "wine glass", "count": 1, "color": "purple"},
                                               {"class": "apple", "count": 1, "color": "black"}])])
def test_a_prompt_of_geneval_is_written_as_there(spec, said, include):
    meta = prompts.write(spec, "a photo of")
    assert meta["prompt"] == f"a photo of {said}" and meta["include"] == include and meta["tag"] == spec.tag


@pytest.mark.parametrize("thing, said", [
    (Thing("umbrella"), "an umbrella"), (Thing("orange"), "an orange"), (Thing("dog", color="orange"), "an orange dog"),
    (Thing("umbrella", color="red"), "a red umbrella"), (Thing("elephant", size="small"), "a small elephant"),
    (Thing("sheep", 3), "three sheep"), (Thing("knife", 2), "two knives"), (Thing("person", 7), "seven people"),
    (Thing("skis"), "a pair of skis"), (Thing("skis", 2, "red"), "two pairs of red skis"),
    (Thing("scissors", size="large"), "a large pair of scissors"), (Thing("broccoli", 4), "four heads of broccoli"),
    (Thing("computer mouse", 2), "two computer mice"), (Thing("bus", 3, "white"), "three white buses"),
    (Thing("bench", 2), "two benches"), (Thing("toothbrush", 2), "two toothbrushes"), (Thing("vase", 2), "two vases"),
    (Thing("wine glass", 5), "five wine glasses"), (Thing("sandwich", 2), "two sandwiches")])
def test_things_are_said_as_people_say_them(thing, said):
    assert prompts.phrase(thing) == said


def test_generate_takes_them_in_genevals_layout(command, many, tmp_path):
    """Which refuses what the evaluator could not grade, before it looks for the model."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(meta) + "\n" for meta in many[1]))
    end = command("generate", f"--checkpoint={tmp_path}/none", f"--prompts={tmp_path}/p.jsonl", f"--out={tmp_path}/out",
                  "--layout=geneval")
    assert "none is neither a model folder" in end


def test_what_asks_for_the_same_has_one_composition():
    left, right = (prompts.write(Spec("position", things, relation), lead_in) for things, relation, lead_in in (
        ((Thing("dog"), Thing("cat")), "left of", "a photo of"), ((Thing("cat"), Thing("dog")), "right of", "an image of")))
    assert prompts.composition(left) == prompts.composition(right)
    other = prompts.write(Spec("position", (Thing("cat"), Thing("dog")), "left of"), "a photo of")
    assert prompts.composition(other) != prompts.composition(left)
    pair = [prompts.write(Spec("two_object", things), "a photo of") for things in (
        (Thing("dog"), Thing("cat")), (Thing("cat"), Thing("dog")))]
    assert len({prompts.composition(meta) for meta in [*pair, left]}) == 2


def test_what_is_to_be_avoided_is_in_neither_file(command, tmp_path, many, capsys):
    """By what it asks for where that is told, else by its words."""
    first = {meta["tag"]: meta for meta in many[0][::-1]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(meta | {"prompt": "said otherwise"}) + "\n"
                                              for meta in first.values()))
    spoken = many[0][1]["prompt"].removeprefix("a photo of ").removeprefix("a picture of ").removeprefix(
        "an image of ").removeprefix("a photograph of ")
    (tmp_path / "b.txt").write_text(f"A photo of {spoken}.\n")
    end = command("prompts", f"--out={tmp_path}/x/train.jsonl", "--count=3000", f"--held_out={tmp_path}/held.jsonl",
                  "--held_out_count=110", f"--avoid={tmp_path}/a.jsonl", f"--avoid={tmp_path}/b.txt")
    assert end is None and "3000 prompts in" in capsys.readouterr().out
    training, held_out = read_prompts(tmp_path / "x/train.jsonl"), read_prompts(tmp_path / "held.jsonl")
    assert (len(training), len(held_out)) == (3000, 110)
    told = {prompts.composition(meta) for meta in training + held_out}
    assert not told & {prompts.composition(meta) for meta in first.values()}
    assert not any(meta["prompt"].endswith(f" of {spoken}") for meta in training + held_out)
    stream = prompt_stream(training, 0)                                               # as every config reads it
    assert {stream[i]["tag"] for i in range(len(prompts.TAGS))} == set(prompts.TAGS)


def test_the_seed_decides_and_the_split_does_not_depend_on_the_numbers(many):
    few = prompts.make_prompts(200, 50, 0)
    assert few == prompts.make_prompts(200, 50, 0) != prompts.make_prompts(200, 50, 1)
    trained = {prompts.composition(meta) for meta in many[0]}
    assert not trained & {prompts.composition(meta) for meta in few[1]}


@pytest.mark.parametrize("arguments, told", [
    (("--out=a.jsonl", "--held_out=a.jsonl"), "give two files"), (("--out=a.txt", "--held_out=b.jsonl"), "end in .jsonl"),
    (("--out=a.jsonl", "--held_out=b.jsonl", "--avoid=none.txt"), "no prompt file none.txt"),
    (("--out=a.jsonl", "--held_out=b.jsonl", "--count=3"), "count")])
def test_a_mistake_is_one_line(command, arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in str(command("prompts", *arguments)) and not list(tmp_path.iterdir())


def test_more_than_there_are_is_said(monkeypatch):
    monkeypatch.setattr(prompts, "TAGS", ("single_object", "colors"))
    with pytest.raises(ValueError, match="only .* such prompts, not 90000"):
        prompts.make_prompts(90_000, 10, 0)
