"""The interface, on an untrained model: sampler, trainer and reward must agree on every number."""
import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conftest import FIXTURES
from gvu_jax import checkpoint, lora, rewards
from gvu_jax.policy import policy_params
from gvu_jax.sampling import How
from gvu_jax.shapes.tokenizer import build_tokenizer
from gvu_jax.umm import check_plain, control_tokens

def jitted(call):
    """A call of the interface, compiled: eager, each of its thousand small operations would be compiled alone."""
    static = {"sample_image": 3, "image_logps": 3, "sample_text": (4, 5)}
    return jax.jit(call, static_argnums=static.get(call.__name__, ()))


@pytest.fixture(params=["xomni", "showo"])
def model(request):
    """(umm, params) of an untrained model of each way to draw: token by token, and mask by mask."""
    return request.getfixturevalue({"xomni": "tiny", "showo": "tiny_showo"}[request.param])[-2:]


def seen_by(umm, key, count):
    """What `count` pictures of random codes are to the understanding branch."""
    codes = jax.random.randint(key, (count, umm.image_tokens), 0, umm.ar.image_vocab_size)
    return codes.reshape(count, *umm.grid) if umm.kind == "xomni" else codes


TEXTS = ["a photo of a red circle", "an image of three blue crosses", "a photo of a square left of a green diamond"]


@pytest.mark.parametrize("how", [How(images_per_prompt=3), How(temperature=0.6, top_k=5), How(guidance=2.5, min_p=0.1)])
def test_the_sampler_knows_the_log_probabilities_that_the_trainer_finds(model, key, how):
    umm, params = model
    prompts = umm.encode_prompts(TEXTS)
    tokens, logps = jitted(umm.sample_image)(params, prompts, key, how)
    assert logps.shape == (3 * how.images_per_prompt, umm.image_tokens)
    for leaf, told in zip(jax.tree.leaves(tokens), jax.tree.leaves(umm.drawn_shapes(len(logps))), strict=True):
        assert (leaf.shape, leaf.dtype) == (told.shape, told.dtype)
    teacher_forced = jitted(umm.image_logps)(params, prompts.repeat(how.images_per_prompt), tokens, how)
    np.testing.assert_allclose(logps, teacher_forced, atol=1e-4)


def test_sampled_answers_know_their_log_probabilities_and_their_ends(model, key):
    """A group's answers are those of its pictures read one by one; each counts up to and including its end."""
    umm, params = model
    seen = seen_by(umm, key, 3)
    asked = umm.encode_prompts(["-"] * 3)
    say = jitted(umm.sample_text)
    words, logps, mask = say(params, seen, asked, key, How(images_per_prompt=24), 20)
    repeated = jnp.repeat(seen, 24, axis=0)
    apart = say(params, repeated, asked.repeat(24), key, How(), 20)
    np.testing.assert_array_equal(words, apart[0])
    said = asked.repeat(24).replace(words=words, words_mask=mask)
    teacher_forced, counted = jitted(umm.text_logps)(params, repeated, said)
    np.testing.assert_array_equal(counted, mask)
    np.testing.assert_allclose(logps, jnp.where(mask, teacher_forced, 0), atol=1e-4)
    end, lengths = umm.tokenizer.eos_token_id, np.asarray(mask.sum(axis=1))
    for row, real, n in zip(np.asarray(words), np.asarray(mask), lengths):
        assert real[:n].all() and end not in row[:n - 1] and (n == 20 or (row[n - 1:] == end).all())
    assert lengths.min() < 20 == lengths.max(), "some of these end in time, and some do not"


def test_one_prefill_serves_the_group(model, key):
    """G samples of B prompts are what B * G single prompts with the same keys give."""
    umm, params = model
    prompts = umm.encode_prompts(TEXTS)
    together, _ = jitted(umm.sample_image)(params, prompts, key, How(images_per_prompt=4))
    apart, _ = jitted(umm.sample_image)(params, prompts.repeat(4), key, How())
    jax.tree.map(np.testing.assert_array_equal, together, apart)


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(model, key):
    umm, params = model
    lengths = umm.lengths(TEXTS)
    whole, _ = jitted(umm.sample_image)(params, umm.encode_prompts(TEXTS, lengths), key, How())
    last, _ = jitted(umm.sample_image)(params, umm.encode_prompts(TEXTS[2:], lengths), key, How(), np.array([2]))
    jax.tree.map(lambda whole, last: np.testing.assert_array_equal(whole[2:], last), whole, last)


def test_temperature_one_draws_from_the_policy(tiny, key):
    """Over many samples, the first token's frequencies are its probabilities."""
    _, umm, params = tiny
    prompts = umm.encode_prompts(TEXTS[:1])
    tokens, _ = jitted(umm.sample_image)(params, prompts, key, How(images_per_prompt=4000))
    K = umm.ar.image_vocab_size
    every = jnp.tile(jnp.arange(K)[:, None], (1, umm.image_tokens))
    probabilities = np.exp(jitted(umm.image_logps)(params, prompts.repeat(K), every)[:, 0])
    frequencies = np.bincount(tokens[:, 0], minlength=K) / 4000
    assert abs(probabilities.sum() - 1) < 1e-4
    np.testing.assert_allclose(frequencies, probabilities, atol=4 * np.sqrt(probabilities.max() / 4000))


def test_the_reward_word_by_word_equals_the_single_forward(tiny, key):
    """One forward per word, each on the chat up to that word and unpadded, as the published code does it."""
    _, umm, params = tiny
    from gvu_jax.models.xomni import XOmni
    texts = TEXTS[:2]
    seen = jax.random.randint(key, (len(texts), *umm.grid), 0, umm.ar.image_vocab_size)
    prompts = umm.encode_prompts(texts)
    logps, mask = jitted(umm.text_logps)(params, seen, prompts)
    before, after = umm._around(umm.instruction, umm.grid)

    @jax.jit
    def last_logps(tokens):
        hidden, _ = XOmni(umm.ar).apply({"params": params["ar"]}, tokens, jnp.ones_like(tokens, bool))
        return jax.nn.log_softmax(XOmni(umm.ar).apply({"params": params["ar"]}, hidden[0, -1], method="text_logits"))

    for i, text in enumerate(texts):
        context, slowly = [*before, *(np.asarray(seen[i]).ravel() + umm.ar.vocab_size), *after], []
        for word in umm.tokenizer(text)["input_ids"]:
            slowly.append(float(last_logps(jnp.array([context]))[word]))
            context.append(word)
        assert mask[i].sum() == len(slowly)
        np.testing.assert_allclose(logps[i][mask[i]], slowly, atol=1e-5)
        np.testing.assert_allclose(rewards.geometric_mean(logps, mask)[i], np.exp(np.mean(slowly)), rtol=1e-4)


def test_texts_that_share_a_picture_are_scored_as_if_each_had_its_own(model, key):
    umm, params = model
    texts = [*TEXTS, *TEXTS[::-1]]
    seen = seen_by(umm, key, 2)
    prompts = umm.encode_prompts(texts)
    shared, mask = jitted(umm.text_logps)(params, seen, prompts)
    alone, _ = jitted(umm.text_logps)(params, jnp.repeat(seen, len(TEXTS), axis=0), prompts)
    assert shared.shape == mask.shape == prompts.words.shape
    np.testing.assert_allclose(shared[mask], alone[mask], atol=2e-6)


def test_pictures_of_any_grid_are_read(tiny, key):
    """The chat around a picture names its own rows and columns, not those of the pictures that the model draws."""
    _, umm, params = tiny
    patch = umm.vision.patch_size
    seen = jitted(umm.see)(params, jax.random.uniform(key, (1, 2 * patch, 4 * patch, 3)))
    assert seen.shape == (1, 2, 4)
    assert "2 4" in umm.tokenizer.decode(umm._around(umm.instruction, (2, 4))[0])
    logps, mask = jitted(umm.text_logps)(params, seen, umm.encode_prompts(TEXTS[:1]))
    assert np.isfinite(logps[mask]).all()


def test_without_the_adapter_the_policy_is_the_base_bit_for_bit(tiny, model, key):
    config, (umm, base) = tiny[0].copy_and_resolve_references(), model
    config.lora.rank = 4
    adapter = lora.init(key, base["ar"], 4, r"_proj|lm_head")
    tokens = jax.tree.map(lambda x: jax.random.randint(key, x.shape, 0, 3), umm.drawn_shapes(3))
    logps = jax.jit(umm.image_logps)
    prompts = umm.encode_prompts(TEXTS)
    reference = logps(base, prompts, tokens)
    fresh = policy_params(base, {"adapter": adapter}, config.lora)
    np.testing.assert_array_equal(logps(fresh, prompts, tokens), reference)            # b is zero: nothing changed yet
    trained = jax.tree.map(lambda x: x + 0.1, adapter)
    policy = policy_params(base, {"adapter": trained}, config.lora)
    assert not np.allclose(logps(policy, prompts, tokens), reference)
    off = {name: part for name, part in policy.items() if name != "adapter"}
    np.testing.assert_array_equal(logps(off, prompts, tokens), reference)


def test_an_adapter_equals_the_weights_it_stands_for(tiny, key):
    """x W + s x a b is x (W + s a b)."""
    config, umm, base = tiny
    adapter = jax.tree.map(lambda x: x + 0.02, lora.init(key, base["ar"], 2, r"_proj"))
    flat, low = (traverse_util.flatten_dict(tree) for tree in (base["ar"], adapter))
    merged = traverse_util.unflatten_dict({
        path: w + 8.0 * low[path[:-1] + ("a",)] @ low[path[:-1] + ("b",)]
        if path[-1] == "kernel" and path[:-1] + ("a",) in low else w
        for path, w in flat.items()})
    assert len(low) == 2 * 2 * 7                                                     # a and b, two stacks, 7 kernels
    tokens = jax.random.randint(key, (3, umm.image_tokens), 0, umm.ar.image_vocab_size)
    prompts = umm.encode_prompts(TEXTS)
    adapted = jitted(umm.image_logps)({**base, "adapter": lora.scaled(adapter, 8.0)}, prompts, tokens)
    np.testing.assert_allclose(adapted, jitted(umm.image_logps)({**base, "ar": merged}, prompts, tokens), atol=1e-4)


def test_rendering_is_blind_to_the_prompt_and_rounded_to_bytes(tiny, key):
    _, umm, params = tiny
    tokens = jax.random.randint(key, (2, umm.image_tokens), 0, umm.ar.image_vocab_size)
    one, other = (jitted(umm.render)(params, tokens, umm.encode_prompts([text] * 2), key) for text in TEXTS[:2])
    np.testing.assert_array_equal(one, other)
    assert one.shape == (2, 48, 48, 3) and one.min() >= 0 and one.max() <= 1
    np.testing.assert_allclose(one * 255, np.round(one * 255), atol=1e-3)


def test_answers_end_at_the_end_of_turn(tiny, key):
    _, umm, params = tiny
    seen = jnp.zeros((2, *umm.grid), jnp.int32)
    ask = lambda umm: umm.answer(params, seen, "Does this image describe a photo of a red circle?", key, max_words=5)
    first, *rest = umm.tokenizer(ask(umm)[0])["input_ids"]
    assert set(rest) - {first}                                                      # it goes on where nothing ends it
    ending = copy.deepcopy(umm.tokenizer)
    ending.eos_token = ending.convert_ids_to_tokens(first)
    told = ending(ask(dataclasses.replace(umm, tokenizer=ending)))["input_ids"]     # a row repeats what has ended it
    assert [set(ids) for ids in told] == [{first}, {first}]


@pytest.mark.parametrize("texts, word", [(["a circle", "  "], "prompt 1 is empty"), (["a circle " * 20], "padded")])
def test_prompts_that_cannot_be_encoded_are_refused(tiny, texts, word):
    _, umm, _ = tiny
    with pytest.raises(ValueError, match=word):
        umm.encode_prompts(texts, umm.lengths(TEXTS))


def test_no_text_becomes_a_control_token(tiny, request):
    """Of any tokenizer that a prompt or a question reaches, whatever case and neighbours it has."""
    models = [tiny[1]]
    if FIXTURES.is_dir():
        models.append(checkpoint.read_metadata(request.getfixturevalue("converted")))
    for umm in models:
        for tokenizer in filter(None, (umm.tokenizer, umm.t5_tokenizer, umm.clip_tokenizer)):
            for token in tokenizer.added_tokens_decoder.values():
                for text in (token.content, f"a red circle{token.content}no", f"a {token.content.upper()} b"):
                    said = set(sum(umm.tokenizer([text], add_special_tokens=False)["input_ids"], []))
                    try:
                        umm.encode_prompts([text])
                    except ValueError as error:
                        assert "\n" not in str(error) and len(str(error)) < 200
                    else:                     # nothing of it is control: what it spells in other letters is a word
                        assert text != token.content and not said & set(control_tokens(umm.tokenizer)) - {
                            umm.tokenizer.unk_token_id}
        for token in umm.tokenizer.added_tokens_decoder.values():
            for question in (token.content, f"Is it red?{token.content}Yes"):
                with pytest.raises(ValueError, match="question 0 .* holds .* which steers the model"):
                    umm.encode_prompts(["a"], questions=[question])
    tiny[1].encode_prompts(["<b>a [red] circle</b> < 3 | a @ b"])                     # other brackets are text


def test_letters_that_were_added_to_a_tokenizer_are_text():
    """As DeepSeek's has them; and marks that it does not call special steer all the same."""
    tokenizer = build_tokenizer(4)
    tokenizer.add_tokens(["\xf6", "  ", "<tool_call>", "[INST]"])
    check_plain(tokenizer, ["a r\xf6d  circle"], "prompt {}")
    for mark in ("<tool_call>", "[INST]"):
        with pytest.raises(ValueError, match="prompt 1 "):
            check_plain(tokenizer, ["a", f"a {mark} b"], "prompt {}")


def test_padding_sides_and_masks(tiny):
    _, umm, _ = tiny
    prompts = umm.encode_prompts(TEXTS)
    assert prompts.mask[:, -1].all() and not prompts.mask[0, 0] and prompts.words_mask[:, 0].all()
    decode = lambda ids: umm.tokenizer.decode(ids)
    assert decode(prompts.tokens[0][prompts.mask[0]]) == TEXTS[0] + "<SOM>3 3<IMAGE>"
    assert decode(prompts.words[2][prompts.words_mask[2]]) == TEXTS[2]
