"""Tokens become words; the command prints what Model.score says, draws it, and refuses mistakes in one line."""
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import gvu_jax
from conftest import ROOT
from gvu_jax import checkpoint, rewards

PROMPT = "a photo of a red circle, above a Unicorn"


@pytest.mark.parametrize("tokens, words", [
    ([" a", " red", " cir", "cle"], ["a", "red", "circle"]),
    (["a", " ", " ", "red", " ", "c", "ircle", " ", "\n"], ["a", "red", "circle"]),
    ([" ", "a", " red,", " x"], ["a", "red,", "x"]),
    (["two", ",", " dog", "'s", " 1", "2", " blue", "-", "ish"], ["two", ",", "dog", "'s", "12", "blue", "-", "ish"]),
    (["红色", "圆形"], ["红色", "圆形"]),
    (["na", "ïve", " n", "e\u0301e"], ["naïve", "ne\u0301e"])])
def test_tokens_join_into_words_and_their_product_is_kept(tokens, words):
    ends = np.cumsum([len(token) for token in tokens])
    spans = [(int(end) - len(token), int(end)) for token, end in zip(tokens, ends)]
    probabilities = np.random.default_rng(0).uniform(0.1, 1, len(tokens))
    joined, products = rewards.join_tokens("".join(tokens), spans, probabilities)
    assert joined == words and len(products) == len(words)
    np.testing.assert_allclose(np.prod(products), np.prod(probabilities))


@pytest.mark.parametrize("text, tokens, words", [
    ("cafe\u0301s au", ["cafe", "\u0301", "s", " au"], ["cafe\u0301s", "au"]),                # an acute accent of its own
    ("\u0928\u092e\u0938\u094d\u0924\u0947", ["\u0928\u092e\u0938", "\u094d", "\u0924", "\u0947"],
     ["\u0928\u092e\u0938\u094d\u0924\u0947"])])                                            # Hindi's vowels and virama
def test_a_combining_mark_goes_on_with_its_word(text, tokens, words):
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    spans = [(end - len(token), end) for token, end in zip(tokens, ends)]
    joined, products = rewards.join_tokens(text, spans, [0.5] * len(tokens))
    assert joined == words and products[0] == 0.5 ** (len(tokens) - len(words) + 1)


def test_a_character_of_several_tokens_is_one_word():
    text = "a 🦄 红"                                      # as byte-level tokenizers count: each byte spans its character
    spans = [(0, 1), (1, 3), (2, 3), (2, 3), (3, 4), (4, 5), (4, 5)]
    assert rewards.join_tokens(text, spans, [0.5] * 7) == (["a", "🦄", "红"], [0.5, 0.125, 0.125])


@pytest.mark.parametrize("text", ["an unbelievable dog's  graph, naïve", "红色圆形 🦄!", " two\tred\n\ncircles \n"])
def test_words_of_the_published_tokenizer_make_up_the_text(fixtures, text):
    from transformers import PreTrainedTokenizerFast
    encoded = PreTrainedTokenizerFast.from_pretrained(fixtures / "tokenizer")(
        text, add_special_tokens=False, return_offsets_mapping=True)
    words, products = rewards.join_tokens(text, encoded.offset_mapping, [0.5] * len(encoded.input_ids))
    assert "".join(words) == "".join(text.split()) and all(words)
    assert np.log2(products).sum() == -len(encoded.input_ids)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with `model`, an untrained model, and `picture.png`."""
    folder = tmp_path_factory.mktemp("score")
    checkpoint.save_model(folder / "model", *tiny[1:])
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    Image.fromarray(picture).save(folder / "picture.png")
    Image.fromarray(picture[:32]).save(folder / "small.png")
    (folder / "cut.png").write_bytes((folder / "picture.png").read_bytes()[:100])
    return folder


def run(place, **flags):
    return subprocess.run([sys.executable, "-m", "gvu_jax.score", *(f"--{k}={v}" for k, v in flags.items())],
                          cwd=place, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_it_prints_what_the_model_says_and_draws_it(place):
    done = run(place, checkpoint="model", image="picture.png", prompt=PROMPT, heatmap="new/heat.png")
    assert done.returncode == 0 and "does not know Unicorn;" in done.stderr, done.stderr
    expected = gvu_jax.load(place / "model").score(np.asarray(Image.open(place / "picture.png"))[None], [PROMPT])[0]
    assert expected.words == PROMPT.replace(",", " ,").split()
    reward, _, *table = done.stdout.splitlines()
    assert reward.split() == ["reward", f"{expected.reward:.4f}"]
    assert [line.split() for line in table] == [
        [f"{p:.4f}", word] for p, word in zip(expected.probabilities, expected.words)]
    assert len({line.index(line.split()[1]) for line in table}) == 1, "the columns are aligned"
    with Image.open(place / "new/heat.png") as drawn:
        drawn.load()
        assert drawn.format == "PNG" and drawn.mode == "RGB"
        assert 600 < drawn.width < 1200 and 288 <= drawn.height < 600


@pytest.mark.parametrize("wrong, words", [
    ({"checkpoint": "nowhere"}, ["nowhere"]),
    ({"image": "none.png"}, ["no picture file", "none.png"]),
    ({"image": "cut.png"}, ["cut.png", "cannot be read"]),
    ({"image": "small.png"}, ["32 x 48", "48 x 48"]),
    ({"prompt": " "}, ["--prompt is empty"])])
def test_a_mistake_ends_in_one_line(place, command, monkeypatch, capfd, wrong, words):
    monkeypatch.chdir(place)
    flags = {"checkpoint": "model", "image": "picture.png", "prompt": "a cross"} | wrong
    said = command("score", *(f"--{name}={value}" for name, value in flags.items()))
    assert said.startswith("error: ") and all(word in said for word in words) and capfd.readouterr() == ("", "")
