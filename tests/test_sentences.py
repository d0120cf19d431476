"""What is said of scenes: captions, statements, descriptions and questions, and the tokenizer that reads them."""

import re
import time
from collections import Counter

import numpy as np
import pytest

from conftest import code, find, scene

from gvu_jax.rewards import question
from gvu_jax.shapes import sentences as s
from gvu_jax.shapes import world as w
from gvu_jax.shapes.tokenizer import build_tokenizer

@pytest.fixture(scope="module")
def known():
    return {meta["prompt"]: meta for meta in w.all_prompts()}


# Captions -----------------------------------------------------------------------------------------------------------


def test_captions_tell_all_there_is(scenes, split):
    """All are exact; no word of theirs is of a held-out composition; every category has its share."""
    forbidden, rng = w.compositions(split[1]), np.random.default_rng(0)
    told, tags = 0, Counter()
    for one in scenes:
        if meta := s.caption(one, rng, forbidden):
            assert w.exact_scene(one, meta) and w.composition(meta) not in forbidden
            told += 1
            tags[meta["tag"]] += 1
    assert told > 0.9 * len(scenes)
    assert set(tags) == set(w.TAGS) and min(tags.values()) > 0.03 * told


@pytest.mark.parametrize("objects, said", [
    (dict(c0="red circle", c1="red circle", c2="blue square"), {"three shapes"}),
    (dict(c0="red circle", c1="red cross", c2="red square"), {"three shapes", "three red shapes"}),
    (dict(c0="red circle", c1="blue circle", c2="red circle"), {"three circles"}),
])
def test_a_crowd_is_told_by_its_number(objects, said):
    rng, one = np.random.default_rng(0), scene(**objects)
    assert {s.caption(one, rng)["prompt"].split(" of ")[1] for _ in range(60)} == said


def test_careless_captions_are_true_and_leave_things_out(scenes):
    rng = np.random.default_rng(0)
    told = [(one, meta) for one in scenes if (meta := s.caption(one, rng, careless=1.0))]
    assert all(w.judge_scene(one, meta) for one, meta in told)
    assert 0.2 < np.mean([w.exact_scene(one, meta) for one, meta in told]) < 0.9


def test_wrong_captions_are_wrong_and_say_what_right_ones_say(scenes, split, known):
    """None is exact, some are true of more than they tell; and a category, or a number, is said as often of scenes that
    it describes as of others: what a question says must not tell its answer."""
    forbidden, rng = w.compositions(split[1]), np.random.default_rng(0)
    captions = [s.caption(one, rng, forbidden) for one in scenes]
    others = [meta for meta in captions if meta]
    right, wrong, left_out, near, missing = Counter(), Counter(), 0, 0, 0
    for one, own in zip(scenes, captions):
        if own is None:
            continue
        if (meta := s.wrong_caption(one, s.pick(rng, others), rng, forbidden)) is None:
            missing += 1
            continue
        assert not w.exact_scene(one, meta) and w.composition(meta) not in forbidden
        left_out += w.judge_scene(one, meta)
        near += w.objects_asked(meta) == w.objects_asked(own) and meta["tag"] == own["tag"]
        for found, said in ((right, own), (wrong, meta)):
            found[said["tag"]] += 1
            found.update(word for word in said["prompt"].split() if word in ("two", "three", "four", "five"))
    assert missing < 0.02 * len(scenes) and left_out > 0.01 * len(scenes) and near > 0.2 * len(scenes)
    for what in right:
        assert 0.42 < right[what] / (right[what] + wrong[what]) < 0.58, what


def test_captions_count_as_far_as_there_is_to_count():
    rng = np.random.default_rng(0)
    nine = np.full(9, code("red", "cross"), np.int8)
    said = {s.caption(nine, rng)["prompt"].split(" of ")[1].removeprefix("a ") for _ in range(200)}
    assert {"nine crosses", "nine red crosses"} <= said


@pytest.mark.parametrize("objects, told", [
    (dict(c0="red circle"), {"single_object", "colors"}),
    (dict(c0="red circle", c1="blue square"), {"two_object", "position", "color_attr"}),
    (dict(c0="red circle", c1="red square"), {"two_object", "position"}),
    (dict(c0="red circle", c1="red circle"), {"counting"}),
    (dict(c0="red circle", c1="red circle", c2="blue square"), {"counting"}),
    ({}, set()),
])
def test_which_captions_tell_a_scene(objects, told):
    one = scene(**objects)
    rng = np.random.default_rng(0)
    assert {tag for tag in w.TAGS if s.whole_spec(tag, s.objects_of(one), 3, rng) is not None} == told


# Statements ---------------------------------------------------------------------------------------------------------


def test_true_prompts_are_true_allowed_and_varied(scenes, split, known):
    forbidden = w.compositions(split[1])
    rng = np.random.default_rng(0)
    tags = Counter()
    for one in scenes:
        meta = s.true_prompt(one, rng, forbidden)
        assert w.judge_scene(one, meta)
        assert w.composition(meta) not in forbidden
        assert known.get(meta["prompt"], meta) == meta  # captions count further than prompts
        tags[meta["tag"]] += 1
    assert set(tags) == set(w.TAGS) and min(tags.values()) > 0.03 * len(scenes)
    assert s.true_prompt(np.zeros(9, np.int8), rng) is None
    assert s.true_prompt(scenes[0], rng, w.compositions(w.all_prompts())) is None


def test_true_prompts_reach_the_whole_training_space(scenes, split):
    """Every composition can be drawn: nothing that is trained or tested is never seen."""
    rng = np.random.default_rng(0)
    seen = {w.composition(s.true_prompt(one, rng)) for _ in range(8) for one in scenes}
    missing = w.compositions(w.all_prompts()) - seen
    assert len(missing) < 0.02 * len(seen), missing


def test_sentences_are_fast(scenes):
    rng = np.random.default_rng(0)
    meta = find("a photo of a red circle above a square")
    for limit_us, act in [(150, s.true_prompt), (250, lambda one, rng: s.wrong_caption(one, meta, rng)), (50, lambda one, _: w.judge_scene(one, meta))]:
        start = time.perf_counter()
        for one in scenes[:1000]:
            act(one, rng)
        assert (time.perf_counter() - start) * 1000 < limit_us  # usually 15, 20 and 3


# Descriptions and questions -----------------------------------------------------------------------------------------


def test_describe_says_what_is_where():
    assert s.describe(scene(c0="red circle", c4="blue square")) == "top left red circle, middle center blue square"
    assert s.describe(np.zeros(9, np.int8)) == "nothing"
    assert s.describe(np.eye(16, dtype=np.int8)[6] * code("green", "cross")) == "row two column three green cross"


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_descriptions_are_invertible_and_short(side):
    world = w.World(side, 4)
    for one in w.sample_scenes(np.random.default_rng(side), 500, world):
        text = s.describe(one)
        assert np.array_equal(s.read_description(text, side), one)
        assert len(text.replace(",", " ,").split()) <= 7 * world.max_objects


@pytest.mark.parametrize("text", ["", "red cross", "top left red", "a b c d", "top left red cross, top left red cross"])
def test_wrong_descriptions_are_refused(text):
    with pytest.raises(ValueError):
        s.read_description(text)


def test_ask_tells_the_place_the_thing_or_the_number(scenes, split):
    rng, forms = np.random.default_rng(0), Counter()
    hidden = w.compositions(split[1])
    for one in scenes:
        asked = s.ask(one, rng, hidden)
        if asked is None:
            continue
        question, answer = asked
        if at := re.fullmatch(r"What is at the (.*)\?", question):
            assert f"{at[1]} {answer}" in s.describe(one).split(", ") and s.describe(one).count(answer) == 1
            forms["what"] += 1
            continue
        where = re.fullmatch(r"Where is the (?:(\w+) )?(\w+)\?", question)
        many = re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", question)
        color, shape = (where or many).groups()
        shape = {**{name: name for name in w.SHAPES}, **{w.plural(name): name for name in w.SHAPES}}[shape]
        cells = w.find(one.tolist(), {"class": shape} | ({"color": color} if color else {}))
        if where:
            assert len(cells) == 1 and s.describe(one).count(answer) == 1
            assert f"{answer} {w.COLORS[(one[cells[0]] - 1) % 5]} {shape}" in s.describe(one)
        else:
            assert answer == w.NUMBERS[len(cells) - 1]
            assert f"counting: {len(cells)} {color + ' ' if color else ''}{shape}" not in hidden
        forms["where" if where else "many"] += 1
    assert min(forms[form] for form in ("what", "where", "many")) > 400
    assert s.ask(np.zeros(9, np.int8), rng) is None


def test_ask_leaves_held_out_compositions_alone():
    rng = np.random.default_rng(0)
    one = scene(c0="red circle", c4="red circle")
    hidden = frozenset({"counting: 2 circle", "colors: red circle"})
    assert {s.ask(one, rng, hidden) for _ in range(50)} == {None}
    assert {s.ask(one, rng) for _ in range(50)} == {("How many circles are there?", "two"),
                                                    ("How many red circles are there?", "two")}


# Words and tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(256)


def all_texts():
    rng = np.random.default_rng(0)
    texts = [meta["prompt"] for meta in w.all_prompts()]
    texts += [question(meta["prompt"]) for meta in w.all_prompts()[::50]]
    texts += [s.describe(one) for side in (2, 3, 4, 5) for one in w.sample_scenes(rng, 100, w.World(side, 4))]
    texts += [text for one in w.sample_scenes(rng, 300) for text in s.ask(one, rng)]
    texts += [s.caption(one, rng)["prompt"] for one in w.sample_scenes(rng, 1000)]
    return texts + [*s.INSTRUCTIONS, *s.ANSWERS, "nothing"]


def test_vocabulary_is_exactly_the_words_in_use():
    words = s.vocabulary()
    assert len(set(words)) == len(words) and all(word == word.lower() for word in words)
    used = {piece for text in all_texts() for piece in re.findall(r"[a-z]+|[,.?]", text.lower())}
    assert used | set("2345") == set(words)


def test_everything_said_tokenises_and_comes_back(tokenizer):
    for text in all_texts():
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.lower()


def test_ids_are_text_then_image_then_marks(tokenizer):
    first = tokenizer.convert_tokens_to_ids("<MM-Token-0>")
    assert first % 16 == 0
    assert tokenizer.convert_tokens_to_ids(["<MM-Token-255>", "<SOM>", "<EOM>", "<IMAGE>"]) == [
        first + 255, first + 256, first + 257, first + 258
    ]  # fmt: skip
    assert len(tokenizer) == first + 259
    specials = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|im_end|>", "\n", *s.vocabulary()]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(len(specials)))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|pad|>", "<|im_end|>", "left")
    assert tokenizer(["a red circle", "a"], padding=True).attention_mask == [[1, 1, 1], [0, 0, 1]]


def test_image_strings(tokenizer):
    text = "<SOM>3 3<IMAGE><MM-Token-5><MM-Token-255><EOM>"
    ids = tokenizer(text).input_ids
    first = tokenizer.convert_tokens_to_ids("<MM-Token-0>")
    assert ids[4:6] == [first + 5, first + 255] and len(ids) == 7
    assert tokenizer.decode(ids) == text


def test_unknown_words_become_unk(tokenizer):
    assert tokenizer("a purple zebra").input_ids[-1] == tokenizer.unk_token_id
    assert tokenizer.decode(tokenizer("a zebra , é").input_ids).startswith("a<|unk|>")


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Describe the image."}, {"role": "assistant", "content": "nothing"}]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>Describe the image.<|assistant|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == asked + "nothing<|im_end|>"
    assert tokenizer.decode(tokenizer(whole).input_ids) == whole.lower()
    with pytest.raises(Exception, match="roles"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)


def test_save_and_load(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>Does this image describe a photo of two crosses?\n<SOM>3 3<IMAGE><MM-Token-7><EOM><|assistant|>yes"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids) == text.lower().replace(
        "<som>", "<SOM>"
    ).replace("<image>", "<IMAGE>").replace("<mm-token-7>", "<MM-Token-7>").replace("<eom>", "<EOM>")
    assert (loaded.chat_template, loaded.padding_side) == (tokenizer.chat_template, "left")
    assert len(loaded) == len(tokenizer) and loaded.pad_token_id == 0 and loaded.eos_token == "<|im_end|>"


def test_no_image_tokens_is_refused():
    with pytest.raises(ValueError):
        build_tokenizer(0)
