"""The shapes world: scenes, pictures, prompts and their truth, descriptions, understanding tests, tokenizer."""

import re
import time
from collections import Counter

import numpy as np
import pytest

from gvu_jax.rewards import question
from gvu_jax.shapes import world as w
from gvu_jax.shapes.tokenizer import build_tokenizer

WORLD = w.World()


@pytest.fixture(scope="module")
def scenes():
    return w.sample_scenes(np.random.default_rng(0), 4000, WORLD)


@pytest.fixture(scope="module")
def split():
    return w.split_prompts(held_out=0.2, seed=0)


def code(color, shape):
    return 1 + w.SHAPES.index(shape) * len(w.COLORS) + w.COLORS.index(color)


def scene(**objects):
    """A 3 x 3 scene from pairs such as c0="red circle"."""
    cells = np.zeros(9, np.int8)
    for cell, name in objects.items():
        cells[int(cell[1:])] = code(*name.split())
    return cells


def find(prompt):
    return next(meta for meta in w.all_prompts() if meta["prompt"] == prompt)


# Scenes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [WORLD, w.World(2, 3), w.World(4, 6), w.World(5, 5)])
def test_scenes_hold_a_legal_number_of_legal_objects(world):
    scenes = w.sample_scenes(np.random.default_rng(1), 2000, world)
    assert scenes.shape == (2000, world.side**2) and scenes.dtype == np.int8
    assert scenes.min() == 0 and scenes.max() == len(w.SHAPES) * len(w.COLORS)
    objects = (scenes > 0).sum(1)
    assert objects.min() == 1 and objects.max() == world.max_objects
    assert ((scenes > 0).mean(0) > 0).all()


def test_mixture_of_scenes(scenes):
    shapes = np.where(scenes > 0, (scenes - 1) // len(w.COLORS), -1)
    per_shape = np.stack([(shapes == s).sum(1) for s in range(len(w.SHAPES))])  # [shape, scene]
    distinct = (per_shape.max(0) == 1) & (per_shape.sum(0) <= 3)
    assert 0.4 <= distinct.mean() < 0.6
    assert 0.4 < (per_shape.max(0) >= 2).mean() < 0.6
    for number in w.COUNTS:  # each count has scenes to be learned from
        assert (per_shape == number).any(0).mean() > 0.03


def test_scenes_follow_the_seed():
    first, again, other = (w.sample_scenes(np.random.default_rng(seed), 50) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("side, max_objects", [(1, 3), (6, 5), (3, 10), (3, 2)])
def test_impossible_worlds_are_refused(side, max_objects):
    with pytest.raises(ValueError):
        w.World(side, max_objects)


# Pictures -----------------------------------------------------------------------------------------------------------


def test_render_shape_range_and_determinism(scenes):
    pictures = w.render(scenes[:64], np.random.default_rng(0))
    assert pictures.shape == (64, WORLD.pixels, WORLD.pixels, 3) and pictures.dtype == np.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert np.array_equal(pictures, w.render(scenes[:64], np.random.default_rng(0)))
    assert np.array_equal(w.render(scenes[:8]), w.render(scenes[:8]))
    assert np.allclose(w.render(np.zeros((1, 9), np.int8)), w.BACKGROUND)


def test_render_puts_each_object_into_its_own_cell():
    for cell in range(9):
        picture = w.render(scene(**{f"c{cell}": "red square"})[None], np.random.default_rng(cell))[0]
        inked = np.abs(picture - w.BACKGROUND).max(-1) > 1e-3
        rows, columns = np.nonzero(inked)
        assert set(rows // w.CELL) == {cell // 3} and set(columns // w.CELL) == {cell % 3}


def test_render_varies_size_and_brightness():
    pictures = w.render(np.tile(scene(c4="blue circle"), (200, 1)), np.random.default_rng(0))[:, 16:32, 16:32]
    coverage = (np.abs(pictures - w.BACKGROUND).sum(-1) / np.abs(pictures - w.BACKGROUND).sum(-1).max((1, 2), keepdims=True))
    areas = coverage.sum((1, 2))  # in pixels
    assert 1.2 < areas.max() / areas.min() < (max(w.RADII) / min(w.RADII)) ** 2 + 0.02
    assert 0.1 < pictures[:, 8, 8, 2].max() - pictures[:, 8, 8, 2].min() < 0.2
    assert len(np.unique(pictures.reshape(200, -1), axis=0)) > 190


def test_no_glyph_is_cut_off_at_its_cell():
    border = np.ones((w.CELL, w.CELL), bool)
    border[1:-1, 1:-1] = False
    assert (w.GLYPHS[..., border] == 0).all()


def test_unknown_shape_and_odd_grid_are_refused():
    with pytest.raises(ValueError, match="star"):
        w.draw_glyph("star", 5)
    with pytest.raises(ValueError, match="square number"):
        w.render(np.zeros((1, 8), np.int8))


def test_render_is_fast(scenes):
    start = time.perf_counter()
    w.render(scenes, np.random.default_rng(0))
    assert time.perf_counter() - start < 2.5  # usually 0.3 s for 4,000


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_unique_and_made_like_geneval():
    prompts = w.all_prompts()
    assert len({meta["prompt"] for meta in prompts}) == len(prompts)
    assert set(Counter(meta["tag"] for meta in prompts)) == set(w.TAGS)
    assert find("a photo of three crosses") == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert find("an image of two red circles")["exclude"] == [{"class": "circle", "count": 3, "color": "red"}]
    assert find("a picture of a red circle left of a square")["include"] == [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    assert find("a photo of a red circle and a blue square")["include"] == [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]


def test_specs_and_metas_are_two_forms_of_one_thing():
    for meta in w.all_prompts():
        assert w._write(w._read(meta)) == meta


@pytest.mark.parametrize("seed", range(5))
def test_split_is_disjoint_and_complete(seed):
    train, held_out = w.split_prompts(0.2, seed)
    assert len(train) + len(held_out) == len(w.all_prompts())
    assert not w.compositions(train) & w.compositions(held_out)
    assert len(train) >= 2000
    words = [set(" ".join(meta["prompt"] for meta in metas).split()) for metas in (train, held_out)]
    assert words[0] == words[1]
    for tag in w.TAGS:
        share = len(w.compositions([m for m in held_out if m["tag"] == tag]))
        share /= len(w.compositions([m for m in w.all_prompts() if m["tag"] == tag]))
        assert 0.15 <= share <= 0.25, tag


def test_split_follows_the_seed():
    assert w.split_prompts(0.2, 1) == w.split_prompts(0.2, 1) != w.split_prompts(0.2, 2)
    with pytest.raises(ValueError):
        w.split_prompts(held_out=1.0)


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("a photo of a circle left of a square", "an image of a square right of a circle", True),
        ("a photo of a red circle above a square", "a photo of a square below a red circle", True),
        ("a photo of a circle left of a square", "a photo of a square left of a circle", False),
        ("a photo of a red circle above a square", "a photo of a circle above a red square", False),
        ("a photo of a circle and a square", "a picture of a square and a circle", True),
        ("a photo of a red circle and a blue square", "a photo of a blue square and a red circle", True),
        ("a photo of a red circle and a blue square", "a photo of a blue circle and a red square", False),
        ("a photo of two circles", "a picture of two circles", True),
        ("a photo of two circles", "a photo of three circles", False),
        ("a photo of a circle", "a picture of a circle", False),
    ],
)
def test_composition_ignores_wording_only(one, other, equal):
    assert (w.composition(find(one)) == w.composition(find(other))) is equal


def test_prompts_of_one_composition_are_true_of_the_same_scenes(scenes):
    groups = {}
    for meta in w.all_prompts():
        groups.setdefault(w.composition(meta), []).append(meta)
    rng = np.random.default_rng(0)
    for metas in groups.values():
        for chosen in scenes[rng.integers(len(scenes), size=10)]:
            assert len({w.judge_scene(chosen, meta) for meta in metas}) == 1


def test_different_compositions_differ_on_some_scene(scenes):
    """Else a held-out composition could be a train one in disguise. (The lead-in does not change what is true.)"""
    metas = {w.composition(meta): meta for meta in w.all_prompts() if meta["prompt"].startswith("a photo of")}
    metas = list(metas.values())
    truth = np.array([[w.judge_scene(one, meta) for one in scenes[:1500]] for meta in metas[::5]])
    assert len(np.unique(truth, axis=0)) == len(truth)


# Truth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, objects, truth",
    [
        ("a circle", dict(c0="red circle"), True),
        ("a circle", dict(c0="red square"), False),
        ("a circle", dict(c0="red circle", c1="red circle", c5="blue square"), True),
        ("a circle and a square", dict(c0="red circle", c8="blue square"), True),
        ("a circle and a square", dict(c0="red circle", c8="blue cross"), False),
        ("three circles", dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("two circles", dict(c0="red circle", c1="blue circle", c2="red circle"), False),
        ("four circles", dict(c0="red circle", c1="blue circle", c2="red circle"), False),
        ("two red circles", dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("two red circles", dict(c0="red circle", c1="red circle", c2="red circle"), False),
        ("a red circle", dict(c0="blue circle", c1="red square"), False),
        ("a red circle", dict(c0="blue circle", c1="red circle"), True),
        ("a circle left of a square", dict(c0="red circle", c1="red square"), True),
        ("a circle left of a square", dict(c1="red circle", c0="red square"), False),
        ("a circle left of a square", dict(c0="red circle", c3="red square"), False),  # the same column
        ("a circle above a square", dict(c0="red circle", c3="red square"), True),
        ("a circle above a square", dict(c0="red circle", c4="red square"), True),  # a diagonal is both
        ("a circle left of a square", dict(c0="red circle", c4="red square"), True),
        ("a circle right of a square", dict(c0="red square", c4="red circle"), True),
        ("a circle below a square", dict(c0="red square", c4="red circle"), True),
        ("a circle below a square", dict(c4="red square", c0="red circle", c8="red circle"), True),  # any pair
        ("a red circle below a square", dict(c4="red square", c0="red circle", c8="blue circle"), False),
        ("a circle below a red square", dict(c4="red square", c7="blue circle"), True),
        ("a circle below a red square", dict(c4="blue square", c7="blue circle", c8="red square"), False),
        ("a red circle and a blue square", dict(c0="red circle", c1="blue square"), True),
        ("a red circle and a blue square", dict(c0="blue circle", c1="red square"), False),
    ],
)
def test_judge_scene(prompt, objects, truth):
    assert w.judge_scene(scene(**objects), find(f"a photo of {prompt}")) is truth


def test_unreadable_cells_are_no_objects():
    assert not any(w.judge_scene(np.full(9, -1, np.int8), meta) for meta in w.all_prompts())


@pytest.mark.parametrize(
    "prompt, asked, objects, exact",
    [
        ("a circle", 1, dict(c0="red circle"), True),
        ("a circle", 1, dict(c0="red circle", c1="red circle"), False),  # another of what was asked for
        ("a circle", 1, dict(c0="red circle", c1="blue square"), False),  # something else
        ("a circle", 1, dict(c0="red square"), False),  # one object, and a wrong one
        ("a circle and a square", 2, dict(c0="red circle", c8="blue square"), True),
        ("a circle and a square", 2, dict(c0="red circle", c8="blue square", c4="blue square"), False),
        ("three circles", 3, dict(c0="red circle", c1="blue circle", c2="red circle"), True),
        ("three circles", 3, dict(c0="red circle", c1="blue circle", c2="red circle", c3="red cross"), False),
        ("two red circles", 2, dict(c0="red circle", c1="blue circle", c2="red circle"), False),  # right, and more
        ("a circle left of a square", 2, dict(c0="red circle", c1="red square"), True),
        ("a circle left of a square", 2, dict(c1="red circle", c0="red square"), False),
        ("a circle left of a square", 2, dict(c0="red circle", c1="red square", c2="red circle"), False),
        ("a red circle and a blue square", 2, dict(c0="red circle", c1="blue square"), True),
    ],
)
def test_exact_scene(prompt, asked, objects, exact):
    meta, one = find(f"a photo of {prompt}"), scene(**objects)
    assert w.objects_asked(meta) == asked and w.exact_scene(one, meta) is exact
    one[np.flatnonzero(one == 0)[-1]] = -1
    assert not w.exact_scene(one, meta), "what cannot be read was not asked for"


def test_what_is_right_is_exact_without_the_rest(scenes):
    """Every prompt's own objects, and no others: by leaving out of a scene whatever can be left out."""
    rng = np.random.default_rng(0)
    for one in scenes[:200]:
        meta = w.true_prompt(one, rng)
        for cell in np.flatnonzero(one):
            less = np.where(np.arange(len(one)) == cell, 0, one)
            one = less if w.judge_scene(less, meta) else one
        assert w.exact_scene(one, meta)
        one[np.flatnonzero(one == 0)[0]] = next(code for code in range(1, 26) if code not in one)
        assert not w.exact_scene(one, meta)


def test_true_prompts_are_true_allowed_and_varied(scenes, split):
    train, held_out = split
    forbidden, known = w.compositions(held_out), {meta["prompt"]: meta for meta in w.all_prompts()}
    rng = np.random.default_rng(0)
    tags = Counter()
    for one in scenes:
        meta = w.true_prompt(one, rng, forbidden)
        assert w.judge_scene(one, meta)
        assert w.composition(meta) not in forbidden
        assert known[meta["prompt"]] == meta
        tags[meta["tag"]] += 1
    assert set(tags) == set(w.TAGS) and tags.most_common(1)[0][0] == "position"
    assert w.true_prompt(np.zeros(9, np.int8), rng) is None
    assert w.true_prompt(scenes[0], rng, w.compositions(w.all_prompts())) is None


def test_true_prompts_reach_the_whole_training_space(scenes, split):
    """Every composition can be drawn: nothing that is trained or tested is never seen."""
    rng = np.random.default_rng(0)
    seen = {w.composition(w.true_prompt(one, rng)) for _ in range(8) for one in scenes}
    missing = w.compositions(w.all_prompts()) - seen
    assert len(missing) < 0.02 * len(seen), missing


def test_false_prompts_are_false_allowed_and_often_near(scenes, split):
    forbidden, known = w.compositions(split[1]), {meta["prompt"]: meta for meta in w.all_prompts()}
    rng = np.random.default_rng(0)
    about_present = 0
    for one in scenes:
        meta = w.false_prompt(one, rng, forbidden)
        assert not w.judge_scene(one, meta)
        assert w.composition(meta) not in forbidden
        assert known[meta["prompt"]] == meta
        about_present += all(w._find(one.tolist(), {"class": item["class"]}) for item in meta["include"])
    assert about_present > 0.3 * len(scenes)  # cannot be refused for a missing shape
    assert not w.judge_scene(np.zeros(9, np.int8), w.false_prompt(np.zeros(9, np.int8), rng))


def test_sentences_are_fast(scenes):
    rng = np.random.default_rng(0)
    meta = find("a photo of a red circle above a square")
    for limit_us, act in [(150, w.true_prompt), (250, w.false_prompt), (50, lambda s, _: w.judge_scene(s, meta))]:
        start = time.perf_counter()
        for one in scenes[:1000]:
            act(one, rng)
        assert (time.perf_counter() - start) * 1000 < limit_us  # usually 15, 20 and 3


# Descriptions and questions -----------------------------------------------------------------------------------------


def test_describe_says_what_is_where():
    assert w.describe(scene(c0="red circle", c4="blue square")) == "top left red circle, middle center blue square"
    assert w.describe(np.zeros(9, np.int8)) == "nothing"
    assert w.describe(np.eye(16, dtype=np.int8)[6] * code("green", "cross")) == "row two column three green cross"


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_descriptions_are_invertible_and_short(side):
    world = w.World(side, 4)
    for one in w.sample_scenes(np.random.default_rng(side), 500, world):
        text = w.describe(one)
        assert np.array_equal(w.read_description(text, side), one)
        assert len(text.replace(",", " ,").split()) <= 7 * world.max_objects


@pytest.mark.parametrize("text", ["", "red cross", "top left red", "a b c d", "top left red cross, top left red cross"])
def test_wrong_descriptions_are_refused(text):
    with pytest.raises(ValueError):
        w.read_description(text)


def test_ask_tells_the_place_or_the_number(scenes, split):
    rng, forms = np.random.default_rng(0), Counter()
    hidden = w.compositions(split[1])
    for one in scenes:
        asked = w.ask(one, rng, hidden)
        if asked is None:
            continue
        question, answer = asked
        where = re.fullmatch(r"Where is the (?:(\w+) )?(\w+)\?", question)
        many = re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", question)
        color, shape = (where or many).groups()
        shape = {**{name: name for name in w.SHAPES}, **{w._plural(name): name for name in w.SHAPES}}[shape]
        cells = w._find(one.tolist(), {"class": shape} | ({"color": color} if color else {}))
        if where:
            assert len(cells) == 1 and w.describe(one).count(answer) == 1
            assert f"{answer} {w.COLORS[(one[cells[0]] - 1) % 5]} {shape}" in w.describe(one)
        else:
            assert answer == w.NUMBERS[len(cells) - 1]
        forms["where" if where else "many"] += 1
    assert forms["where"] > 1000 and forms["many"] > 1000
    assert w.ask(np.zeros(9, np.int8), rng) is None


def test_ask_leaves_held_out_compositions_alone():
    rng = np.random.default_rng(0)
    one = scene(c0="red circle", c4="red circle")
    hidden = frozenset({"counting: 2 circle", "colors: red circle"})
    assert {w.ask(one, rng, hidden) for _ in range(50)} == {None}
    assert {w.ask(one, rng) for _ in range(50)} == {("How many circles are there?", "two"),
                                                    ("How many red circles are there?", "two")}


# Understanding tests ------------------------------------------------------------------------------------------------


def test_four_way(scenes):
    choices = w.four_way(np.random.default_rng(0), scenes, 120)
    assert Counter(choice.prompts[0]["tag"] for choice in choices) == {tag: 20 for tag in w.TAGS}
    for choice in choices:
        assert [w.judge_scene(choice.scene, meta) for meta in choice.prompts] == [True, False, False, False]
        assert len({meta["tag"] for meta in choice.prompts}) == 1
        assert len(w.compositions(choice.prompts)) == 4
        assert len({meta["prompt"].split()[1] for meta in choice.prompts}) == 1  # the same lead-in


def test_four_way_respects_forbidden_and_refuses_useless_scenes(scenes, split):
    forbidden = w.compositions(split[1])
    for choice in w.four_way(np.random.default_rng(0), scenes, 30, forbidden):
        assert not w.compositions(choice.prompts) & forbidden
    with pytest.raises(ValueError, match="two_object"):
        w.four_way(np.random.default_rng(0), scene(c0="red circle")[None], 6)


@pytest.mark.parametrize("kind", w.HARD_KINDS)
def test_hard_pairs(kind):
    pairs = w.hard_pairs(np.random.default_rng(0), kind, 200)
    assert len(pairs) == 200
    for one, (true, false) in pairs:
        assert w.judge_scene(one, true) and not w.judge_scene(one, false)
        same_words = sorted(true["prompt"].split()) == sorted(false["prompt"].split())
        assert same_words is (kind == "binding")
    if kind == "count":  # text alone is at chance
        numbers = Counter((t["include"][0]["count"], f["include"][0]["count"]) for _, (t, f) in pairs)
        assert numbers == {(2, 3): 50, (3, 2): 50, (3, 4): 50, (4, 3): 50}
    with pytest.raises(ValueError):
        w.hard_pairs(np.random.default_rng(0), "colour", 1)


# Words and tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(256)


def all_texts():
    rng = np.random.default_rng(0)
    texts = [meta["prompt"] for meta in w.all_prompts()]
    texts += [question(meta["prompt"]) for meta in w.all_prompts()[::50]]
    texts += [w.describe(one) for side in (2, 3, 4, 5) for one in w.sample_scenes(rng, 100, w.World(side, 4))]
    texts += [text for one in w.sample_scenes(rng, 300) for text in w.ask(one, rng)]
    return texts + [*w.INSTRUCTIONS, *w.ANSWERS, "nothing"]


def test_vocabulary_is_exactly_the_words_in_use():
    words = w.vocabulary()
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
    specials = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|im_end|>", "\n", *w.vocabulary()]
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
