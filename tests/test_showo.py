"""Show-o as a family: all that the golden data record, through the calls of umm.py, from converted folders."""
import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from conftest import copied, one_device
from gvu_jax import checkpoint, convert, objectives, rewards, sampling, sharding
from gvu_jax.families import showo as family
from gvu_jax.models import phi, torch_keys
from gvu_jax.sampling import How
from gvu_jax.tensor_files import Spec
from gvu_jax.suite import Suite
from gvu_jax.umm import Prompts, compile_programs, gather_logps

GREEDY = How(temperature=0.0)


@pytest.fixture(scope="module")
def folders(fixtures, tmp_path_factory):
    """The golden checkpoints as model folders: the one that reads codes, and the one that reads CLIP's features."""
    folder, beside = tmp_path_factory.mktemp("showo"), {"magvit": fixtures / "showo_magvit"}
    convert.convert(fixtures / "showo", folder / "codes", **beside)
    convert.convert(fixtures / "showo_clip", folder / "clip", clip=fixtures / "showo_clip/vit", **beside)
    return {"codes": folder / "codes", "clip": folder / "clip"}


@pytest.fixture(scope="module")
def golden(folders, showo):
    """(umm, params) of the one that reads codes, with the recorded length of its prompts."""
    umm, params = checkpoint.load_model(folders["codes"])
    return dataclasses.replace(umm, text_length=showo.told["max_seq_length"]), params


@functools.cache
def jitted(call):
    return jax.jit(call, static_argnums={"sample_image": 3, "image_logps": 3, "code_logits": 3, "sample_text": (4, 5),
                                         "reveal": (3, 4)}.get(call.__name__, ()))


@pytest.fixture(scope="module")
def call(golden):
    """call(name, *arguments) of the umm with its params, each compiled once."""
    umm, params = golden
    compiled = {}

    def run(name, *arguments):
        if name not in compiled:
            compiled[name] = jitted(getattr(umm, name))
        return compiled[name](params, *arguments)
    return run


def rows_of(prompts, name):
    """The ids of each row without their padding."""
    ids, mask = getattr(prompts, name), getattr(prompts, f"{name}_mask" if name != "tokens" else "mask")
    return [row[real].tolist() for row, real in zip(ids, mask)]


def recorded_prompts(umm, ids):
    """Prompts from recorded rows of t2i, which begin with a padded text and end with a picture."""
    text = ids[:, :-umm.image_tokens - 2]
    none = np.zeros((len(text), 1), np.int32)
    return Prompts(text.astype(np.int32), text != umm._id(family.PAD), none, none.astype(bool), none, none.astype(bool))


def codes_of(umm, ids):
    """The codes of recorded rows of t2i; what is masked is image_vocab_size."""
    return (ids[:, -umm.image_tokens - 1:-1] - umm.ar.first_code).astype(np.int32)


def pictures(showo):
    for name in showo.told["images"]:
        with Image.open(showo.folder / name) as image:
            yield np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------ texts

def test_golden_ids(showo, golden):
    """Of the tokens that Show-o adds, of texts, of rows that are drawn and of questions."""
    umm, _ = golden
    told, drawn, asked = showo.told, showo.arrays("t2i"), showo.arrays("understand")
    assert umm._id(family.PAD) == told["special_ids"]["<|pad|>"]
    for token in family.ADDED:
        assert umm._id(token) == told["special_ids"][token]
    assert umm._stop == told["special_ids"]["<|sot|>"] == told["special_ids"]["<|eot|>"]
    assert umm.ar.first_code == told["image_offset"] == len(umm.tokenizer)
    assert umm.ar.vocab_size == told["vocab_size"] and umm.ar.vocab_size - 1 == told["mask_token_id"]
    for case in told["tokenizer_cases"]:
        assert umm._ids(case["text"]) == case["ids"]

    texts = told["prompts"]
    prompts = umm.encode_prompts(texts, umm.lengths(texts)._replace(prompt=told["max_seq_length"] + 1))
    np.testing.assert_array_equal(prompts.tokens, drawn["input_ids"][:, :-umm.image_tokens - 2])
    empty = umm._head([])
    np.testing.assert_array_equal(drawn["uncond_input_ids"][0, :-umm.image_tokens - 2][-len(empty):], empty)
    masked = np.full((len(texts), umm.image_tokens), umm.ar.image_vocab_size)
    np.testing.assert_array_equal(umm._picture(masked), drawn["input_ids"][:, -umm.image_tokens - 2:])
    for i, case in enumerate(told["understand"]):
        prompts = umm.encode_prompts([case["answer"]], questions=[case["question"]], end=True)
        before, after = umm._around(case["question"])
        context = asked[f"context_ids_{i}"]
        assert [*before, *context[len(before):len(before) + umm.image_tokens], *after] == context.tolist()
        assert rows_of(prompts, "question")[0] == list(after[1:])
        assert rows_of(prompts, "words")[0] == asked[f"answer_ids_{i}"].tolist()


def test_a_text_cannot_become_a_control_token(golden):
    umm, _ = golden
    for text in ("a <|soi|>", "<|mmu|> a", family.PAD, f"two {umm.tokenizer.eos_token}"):
        with pytest.raises(ValueError, match="prompt 1 .* steers the model"):
            umm.encode_prompts(["a cube", text])
        with pytest.raises(ValueError, match="question 0 .* steers the model"):
            umm.encode_prompts(["a cube"], questions=[text])
    for text, said in (("  ", "empty"), ("\ud800", "no Unicode"), ("a cube " * 600, "reads at most")):
        with pytest.raises(ValueError, match=said):
            umm.encode_prompts([text])


# ------------------------------------------------------------------ drawing

def test_golden_logits_of_codes(showo, golden, call):
    """With the prompt and without, guided, some codes known."""
    umm, _ = golden
    expected = showo.arrays("t2i")
    codes, K = codes_of(umm, expected["partial_input_ids"]), umm.ar.image_vocab_size
    assert (codes == K).any() and (codes < K).any()
    for prompts in (recorded_prompts(umm, expected["input_ids"]), umm.encode_prompts(showo.told["prompts"])):
        conditional, without = (call("code_logits", prompts, codes, negative) for negative in (False, True))
        np.testing.assert_allclose(conditional, expected["logits_cond"], atol=2e-4)
        np.testing.assert_allclose(without, expected["logits_uncond"], atol=2e-4)
        scales = [name.removeprefix("logits_guided_") for name in expected if name.startswith("logits_guided_")]
        for scale in scales:
            np.testing.assert_allclose(sampling.guided(conditional, without, 1 + float(scale)),
                                       expected[f"logits_guided_{scale}"], atol=5e-4)
    assert scales


def test_golden_generations(showo, golden):
    """Every round of every recorded run, with its noise."""
    umm, params = golden
    expected, K = showo.arrays("generate"), umm.ar.image_vocab_size

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run_of(rounds, how, prompts, known, noise, uniform, heat):
        of_it = dataclasses.replace(umm, rounds=rounds, heat=heat)
        codes, order, *found = of_it.reveal(params, prompts, known, lambda t: (noise[t], uniform[t]), how)
        return codes, order, *found, of_it.image_logps(params, prompts, {"codes": codes, "round": order}, how)

    assert showo.told["generate"]
    for run, told in showo.told["generate"].items():
        of_run = {name.removeprefix(run + "_"): x for name, x in expected.items() if name.startswith(run + "_")}
        prompts = recorded_prompts(umm, of_run["input_ids"])
        assert rows_of(prompts, "tokens") == rows_of(umm.encode_prompts(told["prompts"]), "tokens")
        codes, order, logps, happened, forced = jax.device_get(run_of(
            told["steps"], How(guidance=1 + told["guidance_scale"]), prompts,
            np.where(of_run["initial_codes"] < 0, K, of_run["initial_codes"]), of_run["token_noise"],
            of_run["mask_uniform"], told["temperature"]))
        np.testing.assert_allclose(sampling.heats(told["temperature"], told["steps"]), of_run["temperature"], atol=1e-6)
        states = np.where(of_run["states"] < 0, K, of_run["states"])
        np.testing.assert_array_equal(happened["states"], states, err_msg=run)
        masked = states == K
        np.testing.assert_array_equal(happened["raw_sample"][masked], of_run["raw_sample"][masked], err_msg=run)
        for name in ("tokens", "mask_len", "remask"):
            np.testing.assert_array_equal(happened[name], of_run[name], err_msg=f"{run} {name}")
        np.testing.assert_allclose(happened["confidence"], of_run["confidence"], atol=5e-4, err_msg=run)
        np.testing.assert_array_equal(codes, of_run["final_codes"], err_msg=run)
        np.testing.assert_array_equal(order, of_run["commit_step"], err_msg=run)
        chosen = np.take_along_axis(of_run["selected_prob"], np.maximum(order, 0)[None], axis=0)[0]
        np.testing.assert_allclose(logps, np.where(order < 0, 0, np.log(chosen)), atol=5e-4, err_msg=run)
        np.testing.assert_allclose(logps, forced, atol=1e-4)


def test_the_peer_of_the_benchmark_draws_the_golden_generations(showo, golden, monkeypatch):
    """The published loop in torch, with the recorded noise: one prompt at a time, for the peer reads no padding."""
    torch, showo_peers = (pytest.importorskip(name) for name in ("torch", "gvu_jax.families.showo_peers"))
    umm, params = golden
    expected, own = showo.arrays("generate"), types.SimpleNamespace(
        rank=1, alpha=1, targets="_proj", lr=0.0, b2=0.9, weight_decay=0.0, clip_norm=1.0)
    peer = showo_peers.Backbone(umm, params, {}, own, own)
    compared = 0
    for run, told in showo.told["generate"].items():
        of_run = {name.removeprefix(run + "_"): x for name, x in expected.items() if name.startswith(run + "_")}
        if np.any(of_run["initial_codes"] >= 0):                                    # the peer begins with masks alone
            continue
        peer.umm = dataclasses.replace(umm, rounds=told["steps"], heat=told["temperature"],
                                       guidance=1 + told["guidance_scale"])
        for i, text in enumerate(rows_of(recorded_prompts(umm, of_run["input_ids"]), "tokens")):
            noise, uniform = (iter(torch.from_numpy(of_run[name][:, i])) for name in ("token_noise", "mask_uniform"))
            monkeypatch.setattr(torch, "multinomial", lambda p, n: (p / next(noise)).argmax(-1, keepdim=True))
            monkeypatch.setattr(torch, "rand", lambda shape: next(uniform).view(shape))
            drawn = peer.sample(peer.base, torch.tensor([text]), 1, umm.image_tokens)
            np.testing.assert_array_equal(drawn["codes"][0], of_run["final_codes"][i], err_msg=f"{run} {i}")
            np.testing.assert_array_equal(drawn["round"][0], of_run["commit_step"][i], err_msg=f"{run} {i}")
            compared += 1
    assert compared


def test_the_schedule_counts_in_float32():
    """At r = 2/3 the product is N / 2 exactly, and counts one less: for every number of rounds that has this r."""
    for N, rounds in ((16, 9), (256, 12), (256, 18), (1024, 3)):
        assert sampling.unmasked(N, rounds)[rounds * 2 // 3 - 1] == N // 2 - 1
    np.testing.assert_array_equal(sampling.unmasked(256, 2)[:1], [181])
    np.testing.assert_allclose(sampling.heats(1.0, 4), [0.75, 0.375, 0.09375, 0])


@pytest.mark.parametrize("how", [How(images_per_prompt=3), How(2, temperature=0.6, top_k=5, guidance=2.5)])
def test_the_sampler_knows_the_log_probabilities_that_the_trainer_finds(showo, golden, call, how):
    umm, _ = golden
    prompts = umm.encode_prompts(showo.told["prompts"])
    drawn, logps = call("sample_image", prompts, jax.random.key(1), how)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), umm.drawn_shapes(len(prompts.tokens) * how.images_per_prompt))
    assert drawn["codes"].max() < umm.ar.image_vocab_size and drawn["round"].max() == umm.rounds - 1
    assert len(np.unique(drawn["round"])) == min(umm.rounds, umm.image_tokens)       # each draws at least one for good
    forced = call("image_logps", prompts.repeat(how.images_per_prompt), drawn, how)
    np.testing.assert_allclose(logps, forced, atol=1e-4)
    plain = dataclasses.replace(how, logps="conditional")
    if how.guidance != 1.0:
        conditional = call("image_logps", prompts.repeat(how.images_per_prompt), drawn, plain)
        assert np.abs(conditional - forced).max() > 1e-2


def test_a_picture_depends_on_its_own_place_alone(showo, golden, call):
    """Not on its group, its batch or the padding of its prompt."""
    umm, _ = golden
    texts, key, how = showo.told["prompts"][:2], jax.random.key(3), How(images_per_prompt=2, guidance=2.0)
    together, _ = call("sample_image", umm.encode_prompts(texts), key, how)
    apart, _ = call("sample_image", umm.encode_prompts(texts).repeat(2), key, How(guidance=2.0))
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    last = umm.encode_prompts(texts[1:], umm.lengths(texts)._replace(prompt=umm.text_length + 1))
    alone, _ = call("sample_image", last, key, how, np.array([2, 3]))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2:], y), together, alone)


# ------------------------------------------------------------------ reading

def test_golden_codes_and_pictures(showo, golden, call):
    umm, params = golden
    expected, count = showo.arrays("magvit"), len(showo.told["images"])
    stack = lambda name: np.stack([expected[f"{name}_{i}"] for i in range(count)])
    pixels = np.stack([umm.fit(picture) for picture in pictures(showo)])
    np.testing.assert_allclose(np.moveaxis(pixels, -1, 1) * 2 - 1, stack("pixels"), atol=1e-6)
    codes = call("see", pixels)
    np.testing.assert_array_equal(codes, stack("codes"))
    target = call("image_target", pixels)
    np.testing.assert_array_equal(target["codes"], codes)
    np.testing.assert_array_equal(umm.seen_of(target), codes)
    drawn = np.round(np.asarray(call("render", target, None, None)) * 255).astype(int)
    away = np.abs(drawn - stack("image_uint8"))
    assert away.max() <= 1 and (away > 0).mean() <= 1e-3
    assert drawn.shape[1:3] == umm.picture_size == (showo.told["resolution"],) * 2
    latents = np.moveaxis(stack("latent"), 1, -1).reshape(count, umm.image_tokens, -1)
    np.testing.assert_allclose(call("features", pixels), latents, atol=5e-4)


def test_golden_answers(showo, golden, call):
    umm, params = golden
    told, expected = showo.told["understand"], showo.arrays("understand")
    seen = call("see", np.stack([umm.fit(picture) for picture in pictures(showo)]))
    for i, case in enumerate(told):
        look, asked = seen[case["image"]][None], [case["question"]]
        prompts = umm.encode_prompts([case["answer"]], questions=asked, end=True)
        L = len(expected[f"answer_ids_{i}"])
        np.testing.assert_allclose(call("text_logits", look, prompts)[0, :L], expected[f"answer_logits_{i}"], atol=2e-4)
        logps, mask = call("text_logps", look, prompts)
        np.testing.assert_allclose(logps[mask], expected[f"answer_logprobs_{i}"], atol=2e-4)
        np.testing.assert_allclose(-logps[mask].mean(), case["nll"], rtol=1e-3)
        greedy = expected[f"greedy_ids_{i}"]
        prompts = umm.encode_prompts(["-"], questions=asked)
        words, logps, mask = call("sample_text", look, prompts, jax.random.key(0), GREEDY, len(greedy))
        np.testing.assert_array_equal(words[0], greedy)
        of_them = gather_logps(jnp.asarray(expected[f"greedy_logits_{i}"])[None], words)
        np.testing.assert_allclose(logps, of_them, atol=2e-4)
        said = umm.answer(params, look, case["question"], jax.random.key(0), len(greedy))
        assert said == [umm.tokenizer.decode(greedy, skip_special_tokens=True).strip()]


def test_golden_rewards(showo, golden, call):
    umm, _ = golden
    expected, told, asked = showo.arrays("understand"), showo.told["reward"], showo.told["yes_no"]
    seen = call("see", np.stack([umm.fit(picture) for picture in pictures(showo)]))
    pick = lambda cases: seen[np.array([case["image"] for case in cases])]
    prompts = umm.encode_prompts([case["prompt"] for case in told], questions=[showo.told["question"]] * len(told))
    assert rows_of(prompts, "words") == [case["target_ids"] for case in told]
    logps, mask = (np.asarray(x) for x in call("text_logps", pick(told), prompts))
    for row, real, case in zip(logps, mask, told):
        np.testing.assert_allclose(row[real], case["logprobs"], atol=2e-4)
    np.testing.assert_allclose(rewards.geometric_mean(logps, mask), [case["score"] for case in told], rtol=1e-4)

    questions = [case["question"] for case in asked for _ in rewards.ANSWERS]
    ids = showo.told["yes_no_ids"]
    for answers, wanted in ((("Yes", "No"), "p_yes"), (("yes", "no"), "p_yes_lower")):
        prompts = umm.encode_prompts(answers * len(asked), questions=questions)
        assert rows_of(prompts, "words") == [[ids[" " + answer]] for answer in answers * len(asked)]
        logits = call("text_logits", pick(asked), prompts)[::2, 0]
        np.testing.assert_allclose(logits, expected["yes_no_logits"], atol=2e-4)
        found = rewards.yes(*call("text_logps", pick(asked), prompts))
        np.testing.assert_allclose(found, [case[wanted] for case in asked], atol=1e-4)


def test_texts_about_one_picture_share_its_row(showo, golden, call):
    umm, _ = golden
    seen = jax.random.randint(jax.random.key(0), (2, umm.image_tokens), 0, umm.ar.image_vocab_size)
    prompts = umm.encode_prompts([*showo.told["prompts"][:2], "a ball", "two cubes"])
    packed, mask = call("text_logps", seen, prompts)
    alone, _ = call("text_logps", jnp.repeat(seen, 2, axis=0), prompts)
    np.testing.assert_allclose(np.where(mask, packed, 0), np.where(mask, alone, 0), atol=1e-4)


def test_golden_reading_of_what_clip_sees(fixtures, folders, showo):
    folder = fixtures / "showo_clip"
    umm, params = checkpoint.load_model(folders["clip"])
    expected, told = dict(np.load(folder / "expected/understand.npz")), json.loads(
        (folder / "expected/expected.json").read_text())
    assert told["system_prompt"] == family.SYSTEM
    run = {name: jitted(getattr(umm, name)) for name in ("see", "text_logits", "text_logps", "sample_text")}
    for i, case in enumerate(told["cases"]):
        with Image.open(folder / case["image"]) as image:
            pixels = umm.fit(np.asarray(image.convert("RGB")))
        normal = family.clip.fitted(pixels[None], umm.transform)[0] - np.array(umm.transform.image_mean)
        normal = normal / np.array(umm.transform.image_std)
        np.testing.assert_allclose(np.moveaxis(normal, -1, 0), expected[f"pixel_values_{i}"], atol=1e-5)
        seen = run["see"](params, pixels[None])
        if f"features_{i}" in expected:
            np.testing.assert_allclose(seen[0], expected[f"features_{i}"], atol=5e-4)
        projected = phi.Phi(umm.ar).apply({"params": params["ar"]}, seen, method="project")[0]
        rows = expected[f"projected_{i}"]
        np.testing.assert_allclose(projected[::len(projected) // len(rows)][:len(rows)], rows, atol=5e-4)

        question = case["text"].removeprefix("USER: ").removesuffix(" ASSISTANT:")
        before, after = umm._around(question)
        assert [*before, *after] == expected[f"input_ids_{i}"].tolist()
        assert len(before) - 2 == case["system_prompt_length"]
        answer = expected[f"answer_ids_{i}"]
        text = umm.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        prompts = umm.encode_prompts([text], questions=[question], end=True)
        assert rows_of(prompts, "words")[0] == answer.tolist()
        logits = run["text_logits"](params, seen, prompts)[0, :len(answer)]
        np.testing.assert_allclose(logits, expected[f"answer_logits_{i}"], atol=2e-4)
        logps, mask = run["text_logps"](params, seen, prompts)
        np.testing.assert_allclose(logps[mask], expected[f"answer_logprobs_{i}"], atol=2e-4)
        np.testing.assert_allclose(-logps[mask].mean(), case["nll"], rtol=1e-3)
        greedy = expected[f"greedy_ids_{i}"]
        asked = umm.encode_prompts(["-"], questions=[question])
        words, _, _ = run["sample_text"](params, seen, asked, jax.random.key(0), GREEDY, len(greedy))
        np.testing.assert_array_equal(words[0], greedy)
    _, _, _, model = umm._asked(params, seen, prompts)
    mask = expected["attention_mask_0"]
    assert len(mask) == told["cases"][0]["sequence_length"]
    reads = np.tril(np.ones_like(mask))
    reads[:, model.picture[0]:model.picture[1]] = True
    np.testing.assert_array_equal(reads, mask)


def test_what_was_drawn_is_read_by_clip_as_pil_would_bring_it(folders):
    """Pictures that are drawn at one size and read at another are resized in the program, bit for bit."""
    umm, params = checkpoint.load_model(folders["clip"])
    drawn = np.random.default_rng(0).integers(0, 256, (2, *umm.picture_size, 3), np.uint8)
    pixels = np.stack([umm.fit(picture) for picture in drawn])
    np.testing.assert_array_equal(pixels, drawn.astype(np.float32) / 255)             # as drawn it stays
    side, edge = umm.transform.crop_size, umm.transform.shortest_edge
    by_pil = np.stack([np.asarray(Image.fromarray(x).resize((edge, edge), Image.Resampling.BICUBIC)) for x in drawn])
    cut = slice((edge - side) // 2, (edge - side) // 2 + side)
    by_pil = by_pil[:, cut, cut]
    found = jax.jit(lambda x: family.clip.fitted(x, umm.transform))(pixels)
    np.testing.assert_array_equal(np.round(np.asarray(found) * 255), by_pil)
    assert umm.seen_of(umm.drawn_shapes(1)) is None
    assert umm.fitted_size((7, 9)) == (edge, edge) and umm.fitted_size(umm.picture_size) == umm.picture_size


@pytest.mark.parametrize("size", [(90, 71), (70, 84)])
def test_what_clip_does_not_read_is_cut_off_once(folders, size):
    """Where pictures are resized to more than is cut out of them: fitted on the host and in the program, or by PIL."""
    umm, _ = checkpoint.load_model(folders["clip"])
    side = umm.transform.crop_size
    for edge in (side, side + 3, side + 8):
        of_it = dataclasses.replace(umm, transform=dataclasses.replace(umm.transform, shortest_edge=edge))
        picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        height, width = (edge * n // min(size) for n in size)
        top, left = (height - side) // 2, (width - side) // 2
        by_pil = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        by_pil = np.asarray(by_pil)[top:top + side, left:left + side]
        pixels = of_it.fit(picture)
        assert pixels.shape[:2] == of_it.fitted_size(size)
        found = family.clip.fitted(pixels[None], of_it.transform)[0]
        np.testing.assert_array_equal(np.round(np.asarray(found) * 255), by_pil)


# ------------------------------------------------------------------ likelihoods

def shifted(logits, labels):
    """The mean cross-entropy of labels [B, T], each predicted one place before; -100 is none."""
    counted, logps = labels[:, 1:] >= 0, gather_logps(logits[:, :-1], jnp.maximum(labels[:, 1:], 0))
    return -jnp.sum(jnp.where(counted, logps, 0)) / counted.sum()


class Recorded:
    """The golden losses and likelihoods as functions of the backbone's parameters."""

    def __init__(self, showo, golden):
        self.umm, self.params = golden
        self.loss, self.likely, self.told = showo.arrays("loss"), showo.arrays("likelihood"), showo.told
        self.umm = dataclasses.replace(self.umm, rounds=self.told["grpo"]["steps"])

    def text_loss(self, ar, ids, labels, picture):
        model = phi.Phi(self.umm.ar, picture)
        hidden, _ = model.apply({"params": ar}, ids, np.ones(ids.shape, bool))
        return shifted(model.apply({"params": ar}, hidden, method="text_logits"), labels)

    def losses(self, ar):
        """t2i, lm, mmu, and that of a conversation."""
        ids, labels, masks = (self.loss[name] for name in ("input_ids", "labels", "image_mask"))
        drawn, read = len(masks), (0, self.umm.image_tokens + 3)
        nll = self.umm.masked_nll({**self.params, "ar": ar}, recorded_prompts(self.umm, ids[:drawn]),
                                  self.loss["image_codes"], masks)
        lm = drawn + len(self.told["loss"]["lm_texts"])
        return (jnp.mean(nll), self.text_loss(ar, ids[drawn:lm], labels[drawn:lm], (0, 0)),
                self.text_loss(ar, ids[lm:], labels[lm:], read),
                self.text_loss(ar, self.loss["llava_input_ids"][None], self.loss["llava_labels"][None], read))

    def estimates(self, ar, which):
        """Of codes under the recorded patterns, [patterns, pictures, N]."""
        prompts, params = self.umm.encode_prompts(self.told["dpo"]["prompts"]), {**self.params, "ar": ar}
        return jax.vmap(lambda mask: self.umm.masked_logps(params, prompts, self.likely[f"{which}_codes"], mask))(
            self.likely["mask_patterns"])

    def rollouts(self, ar, how=How()):
        told = self.told["grpo"]
        prompts = self.umm.encode_prompts(told["prompts"]).repeat(told["group"])
        drawn = {"codes": self.likely["traj_final_codes"], "round": self.likely["traj_commit_step"]}
        return self.umm.image_logps({**self.params, "ar": ar}, prompts, drawn, how)

    def objectives(self, ar):
        """What grad_norms.json has gradients of, by name; and what they are made of.

        DPO's loss on sums of N decisions is that on their means with a beta of N times as much.
        """
        told, weights = self.told, self.told["loss"]["coefficients"]
        dpo_reference, reference = (jax.tree.map(lambda x: x * told[method]["reference_scale"], self.params["ar"])
                                    for method in ("dpo", "grpo"))
        t2i, lm, mmu, llava = self.losses(ar)
        of_pairs = {f"{prefix}{which}": self.estimates(of, which) for prefix, of in (("", ar), ("ref_", dpo_reference))
                    for which in ("win", "lose")}
        four = (of_pairs[name].mean(axis=0) for name in ("win", "lose", "ref_win", "ref_lose"))
        dpo, of_dpo = objectives.dpo_loss(*four, told["dpo"]["beta"] / self.umm.image_tokens, 0.0)
        logps, ref_logps = self.rollouts(ar), self.rollouts(reference)
        advantages = objectives.group_advantages(
            self.likely["rewards"], told["grpo"]["group"], told["grpo"]["advantage_eps"])
        grpo, of_grpo = objectives.clipped_policy_loss(
            logps, jax.lax.stop_gradient(logps), ref_logps, advantages, 0.2, told["grpo"]["beta"])
        total = weights["t2i"] * t2i + weights["lm"] * lm + weights["mmu"] * mmu
        values = {"total": total, "t2i": t2i, "mmu": mmu, "dpo": dpo, "grpo": grpo,
                  "masked_estimate": -of_pairs["win"].mean(), "trajectory": -logps.mean()}
        return values, (values, (lm, llava), of_pairs, of_dpo, logps, ref_logps, advantages, of_grpo)


@pytest.fixture(scope="module")
def recorded(showo, golden):
    return Recorded(showo, golden)


@pytest.fixture(scope="module")
def computed(recorded):
    """Gradients of every objective, {objective: tree}, and all values: one program."""
    return jax.device_get(jax.jit(jax.jacrev(recorded.objectives, has_aux=True))(recorded.params["ar"]))


def test_golden_losses(recorded, computed):
    """The published training's, of pictures, text, captions and a conversation; DPO's and GRPO's."""
    told, likely, (_, found) = recorded.told, recorded.likely, computed
    values, (lm, llava), of_pairs, of_dpo, logps, ref_logps, advantages, of_grpo = found
    for name, value in {"t2i": values["t2i"], "lm": lm, "mmu": values["mmu"], "total": values["total"]}.items():
        np.testing.assert_allclose(value, told["loss"][name], rtol=1e-3)
    np.testing.assert_allclose(llava, told["llava"]["loss"], rtol=1e-3)

    masks, N = likely["mask_patterns"], recorded.umm.image_tokens
    for name, estimates in of_pairs.items():
        each = estimates * masks.sum(axis=2, keepdims=True) / N
        np.testing.assert_allclose(each[masks], likely[f"{name}_logp_codes"][masks], atol=2e-4)
        assert (each[~masks] == 0).all()
        np.testing.assert_allclose(estimates.mean(axis=(0, 2)), likely[f"{name}_estimate"], atol=2e-4)
    np.testing.assert_allclose(values["dpo"], told["dpo"]["loss"], rtol=1e-3)
    np.testing.assert_allclose(of_dpo["margin"] / N, np.mean(told["dpo"]["margins"]), atol=2e-4)

    np.testing.assert_allclose(logps, likely["traj_logp"], atol=2e-4)
    np.testing.assert_allclose(ref_logps, likely["traj_ref_logp"], atol=2e-4)
    np.testing.assert_allclose(logps.sum(axis=1), told["grpo"]["sum_logp"], atol=2e-4 * N)
    np.testing.assert_allclose(advantages, likely["advantages"], atol=1e-4)
    np.testing.assert_allclose(values["grpo"], told["grpo"]["loss"], atol=1e-5)
    np.testing.assert_allclose(of_grpo["kl"], told["grpo"]["mean_kl"], atol=1e-5)
    np.testing.assert_allclose(objectives.k3(logps, ref_logps), likely["kl"], atol=1e-4)
    assert of_grpo["ratio_max"] == 1


def test_golden_gradients(showo, recorded, computed):
    """Of every objective, by parameter."""
    told, (slopes, _) = json.loads((showo.folder / "expected/grad_norms.json").read_text()), computed
    assert set(slopes) == set(told)
    for objective, norms in told.items():
        gradients = torch_keys.to_torch(slopes[objective], phi.RULES)
        assert gradients.keys() == norms["per_parameter"].keys()
        np.testing.assert_allclose(np.sqrt(sum((g ** 2).sum() for g in gradients.values())), norms["total"], rtol=2e-3)
        for name, norm in norms["per_parameter"].items():
            np.testing.assert_allclose(np.linalg.norm(gradients[name]), norm, rtol=2e-3, atol=1e-6,
                                       err_msg=f"{objective} {name}")
    for arrays, prefix, objective in ((recorded.loss, "grad/", "total"), (recorded.likely, "grad_grpo/", "grpo")):
        gradients = torch_keys.to_torch(slopes[objective], phi.RULES)
        names = [name for name in arrays if name.startswith(prefix)]
        assert names
        for name in names:
            found, expected = gradients[name.removeprefix(prefix)], arrays[name]
            np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), err_msg=name)


def test_golden_likelihoods_with_guidance_and_over_all_ids(recorded):
    umm, params, likely, told = recorded.umm, recorded.params, recorded.likely, recorded.told
    how = How(guidance=1 + told["grpo"]["guided_scale"])
    guided = jax.jit(lambda ar: recorded.rollouts(ar, how))(params["ar"])
    np.testing.assert_allclose(guided, likely["traj_logp_guided"], atol=5e-4)
    prompts, masks = umm.encode_prompts(told["dpo"]["prompts"]), likely["mask_patterns"]
    nll = jax.jit(jax.vmap(lambda codes, mask: umm.masked_nll(params, prompts, codes, mask), in_axes=(None, 0)))
    for which in ("win", "lose"):
        labelled = np.pad(masks, ((0, 0), (0, 0), (1, 1)), constant_values=True)                # [M, B, N + 2]
        share = labelled.sum((1, 2), keepdims=True) / labelled[0].size
        of_each = -np.asarray(nll(likely[f"{which}_codes"], masks)) * share
        np.testing.assert_allclose(of_each[:, :, 1:-1][masks], likely[f"{which}_logp_full"][masks], atol=2e-4)
        if which == "win":
            np.testing.assert_allclose(of_each[:, :, [0, -1]], likely["win_soi_eoi_logp_full"], atol=2e-4)
            np.testing.assert_allclose(of_each.sum(axis=2), likely["win_hermesflow_sum"], rtol=1e-4)


def test_the_estimate_is_the_mean_of_single_steps_and_its_masks_are_those_of_the_key(showo, golden, call):
    """Against numpy: the logits of a state, looked up. The same key masks whatever picture alike."""
    umm, _ = golden
    prompts, N, K = umm.encode_prompts(showo.told["prompts"]), umm.image_tokens, umm.ar.image_vocab_size
    rng, B = np.random.default_rng(0), len(showo.told["prompts"])
    pictures = [{"codes": rng.integers(0, K, (B, N)), "round": np.zeros((B, N), int)} for _ in range(2)]
    key = jax.random.key(7)
    one, other = (np.asarray(call("image_logps", prompts, drawn, How(), key)) for drawn in pictures)
    mask = one != 0
    np.testing.assert_array_equal(mask, other != 0)
    state = np.where(mask, K, pictures[0]["codes"])
    logits = np.asarray(call("code_logits", prompts, state, False), np.float64)
    logps = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    picked = np.take_along_axis(logps, pictures[0]["codes"][..., None], axis=2)[..., 0]
    np.testing.assert_allclose(one.mean(axis=1), [row[of].mean() for row, of in zip(picked, mask)], atol=1e-4)
    assert (np.asarray(call("image_logps", prompts, pictures[0], How(), jax.random.key(8))) != one).any()


def test_as_a_setting_pictures_are_scored_under_masks_of_their_own(showo, golden):
    """Alike whoever stands beside them, and of so many masks the mean."""
    umm, params = golden
    umm, texts = dataclasses.replace(umm, estimates=8), showo.told["prompts"][:2]
    codes = np.random.default_rng(0).integers(0, umm.ar.image_vocab_size, (2, umm.image_tokens))
    drawn = {"codes": codes, "round": np.zeros_like(codes)}
    score = jitted(umm.image_logps)
    found = np.asarray(score(params, umm.encode_prompts(texts), drawn))
    turned = np.asarray(score(params, umm.encode_prompts(texts[::-1], umm.lengths(texts)),
                              jax.tree.map(lambda x: x[::-1], drawn)))
    np.testing.assert_allclose(turned[::-1], found, atol=1e-4)
    assert ((found != 0).mean(axis=1) > 0.5).all() and np.isfinite(found).all()


def test_a_suite_that_makes_no_pictures_reads_what_was_drawn(tiny_showo):
    """The same rewards and answers as one that makes some and reads the codes."""
    config, umm, params = tiny_showo
    metas = [{"prompt": prompt} for prompt in ("a photo of a red circle", "a photo of two crosses")]
    programs = compile_programs(umm, How(images_per_prompt=2), one_device())
    lengths, found = umm.lengths([meta["prompt"] for meta in metas]), []
    backbone = {"ar": params["ar"]}
    for paints, held in ((True, params), (False, backbone)):
        suite = Suite(umm, programs, metas, 2, 2, lengths, 0, view="tokens", paints=paints)
        made, rewards_of, _ = suite.sample(held, held)
        found.append(rewards_of)
    assert made.shape == (2, 2, umm.image_tokens) and 0 <= suite.judge_own(backbone, made, None)["non_unification"] <= 1
    np.testing.assert_array_equal(*found)
    with pytest.raises(ValueError, match="makes no pictures reads what was drawn as it is"):
        Suite(umm, programs, metas, 2, 2, lengths, 0, paints=False)


def test_masks_have_the_size_that_is_asked_and_every_place_its_turn():
    counts = jnp.array([1, 3, 8] * 1000)
    masks = np.asarray(family.masked(jax.random.key(0), counts, 8))
    np.testing.assert_array_equal(masks.sum(axis=1), counts)
    share = masks.reshape(-1, 3, 8).mean(axis=0)
    np.testing.assert_allclose(share, np.repeat([[1 / 8], [3 / 8], [1]], 8, axis=1), atol=0.06)


def test_supervised_masks_follow_the_published_schedule(golden, call, showo):
    """The number of masked codes is round(N cos(pi u / 2)), at least 1: its mean is 2 / pi of N, and the loss counts
    the two tokens around a picture."""
    umm, params = golden
    B = 64
    prompts = umm.encode_prompts(showo.told["prompts"][:1]).repeat(B)
    target = {"codes": np.zeros((B, umm.image_tokens), np.int32), "round": np.zeros((B, umm.image_tokens), np.int32)}
    nll = np.asarray(call("image_nll", prompts, target, jax.random.key(0)))
    assert nll.shape == (B, umm.image_tokens + 2) and (nll[:, [0, -1]] != 0).all()
    counts = (nll[:, 1:-1] != 0).sum(axis=1)
    assert counts.min() >= 1
    np.testing.assert_allclose(counts.mean() / umm.image_tokens, 2 / np.pi, atol=4 * 0.31 / np.sqrt(B))


# ------------------------------------------------------------------ folders

def weights_of(folder):
    """{file's name: {key: array}} of a published folder."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = load_file(file)
        elif file.suffix == ".bin":
            found[file.name] = {k: v.numpy() for k, v in torch.load(file, weights_only=True).items()}
    return found


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and one
    for file, tensors in one.items():
        assert tensors.keys() == other[file].keys()
        assert all(np.array_equal(tensors[name], other[file][name]) for name in tensors)


def test_a_folder_goes_there_and_back(folders, fixtures, tmp_path):
    for which, name in (("codes", "showo"), ("clip", "showo_clip")):
        convert.export_hf(folders[which], tmp_path / which)
        for path in (fixtures / name, fixtures / name / "llm"):
            for file in path.iterdir():
                if file.is_file() and file.suffix not in (".bin", ".safetensors"):
                    again = tmp_path / which / file.relative_to(fixtures / name)
                    assert again.read_bytes() == file.read_bytes(), file.name
        assert_same_weights(weights_of(fixtures / name), weights_of(tmp_path / which))
        assert_same_weights(weights_of(fixtures / "showo_magvit"), weights_of(tmp_path / which / "magvitv2"))
    assert_same_weights(weights_of(fixtures / "showo_clip/vit"), weights_of(tmp_path / "clip/clip"))


def settings_of(src, dst):
    """A copy without its weights and golden data."""
    return copied(src, dst, "*.safetensors", "*.bin", "expected", "images")


def test_every_name_that_weights_may_have_is_read(fixtures, folders, tmp_path):
    """Safetensors or torch, one file or shards under the names of diffusers: the same model."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file
    src = settings_of(fixtures / "showo", tmp_path / "showo")
    beside = settings_of(fixtures / "showo_magvit", tmp_path / "magvit")
    (tensors,), (codes,) = (weights_of(fixtures / name).values() for name in ("showo", "showo_magvit"))
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, src / file)
        weight_map |= {name: file for name in names[i::2]}
    (src / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({name: torch.from_numpy(array) for name, array in codes.items()}, beside / "pytorch_model.bin")
    convert.convert(src, tmp_path / "model", magvit=beside)
    params = [checkpoint.load_model(folder)[1] for folder in (tmp_path / "model", folders["codes"])]
    jax.tree.map(np.testing.assert_array_equal, *params)


def last_id(tokenizer):
    return max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))


@pytest.mark.parametrize("file, change, said", [
    ("config.json", lambda c: c.update(mask_token_id=7), "mask_token_id = 7"),
    ("config.json", lambda c: c.update(num_vq_tokens=15), "no square"),
    ("config.json", lambda c: c.update(llm_model_path="microsoft/phi-1_5"), "--llm=DIR"),
    ("config.json", lambda c: c.update(w_clip_vit=True), "--clip=DIR"),
    ("config.json", lambda c: c.pop("codebook_size"), "does not say 'codebook_size'"),
    ("llm/config.json", lambda c: c.update(hidden_act="relu"), "hidden_act"),
    ("llm/config.json", lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1), "missing keys .'showo"),
    ("llm/tokenizer.json", lambda c: c["added_tokens"].append(
        dict(c["added_tokens"][-1], id=1 + last_id(c), content="one more")), "no token .PAD. with"),
    ("magvit/config.json", lambda c: c["encoder"]["ch_mult"].append(1), "as many levels"),
    ("magvit/config.json", lambda c: c.update(_class_name="VQ"), "MAGVITv2")])
def test_folders_that_are_not_implemented_are_refused(fixtures, tmp_path, file, change, said):
    src, beside = tmp_path / "showo", tmp_path / "showo/magvit"
    settings_of(fixtures / "showo", src), settings_of(fixtures / "showo_magvit", beside)
    for name, folder in (("showo", src), ("showo_magvit", beside)):
        for weights in (*(fixtures / name).glob("*.bin"), *(fixtures / name).glob("*.safetensors")):
            (folder / weights.name).symlink_to(weights)
    told = json.loads((src / file).read_text())
    change(told)
    (src / file).write_text(json.dumps(told))
    with pytest.raises((ValueError, OSError), match=said) as caught:
        convert.convert(src, tmp_path / "model", magvit=beside)
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_folders_that_are_needed_besides_are_named(fixtures, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not say where its magvit is: pass --magvit=DIR"):
        convert.convert(fixtures / "showo", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere: pass --magvit=DIR"):
        convert.convert(fixtures / "showo", tmp_path / "model", magvit="nowhere")
    with pytest.raises(ValueError, match="leave --clip out"):
        convert.convert(fixtures / "showo", tmp_path / "model", magvit=fixtures / "showo_magvit",
                        clip=fixtures / "showo_clip/vit")


# ------------------------------------------------------------------ full size

KEYS = {"ar": r"showo\.model\.embed_tokens\.weight"
              r"|showo\.model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|dense|[qk]_layernorm)\.(weight|bias)"
              r"|showo\.model\.layers\.\d+\.(mlp\.(fc1|fc2)|input_layernorm)\.(weight|bias)"
              r"|showo\.model\.final_layernorm\.(weight|bias)|showo\.lm_head\.(weight|bias)"
              r"|mm_projector\.(0|2)\.(weight|bias)",
        "vq": r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)"
              r"|(encoder\.quant_conv|decoder\.post_quant_conv)\.(weight|bias)"
              r"|(encoder|decoder)\.mid\.(block_[12]\.(norm|conv)[12]|attn_1\.(norm|q|k|v|proj_out))\.(weight|bias)"
              r"|(encoder\.down|decoder\.up)\.\d+\.block\.\d+\.(norm1|norm2|conv1|conv2|nin_shortcut)\.(weight|bias)"
              r"|encoder\.down\.\d+\.downsample\.conv\.(weight|bias)|decoder\.up\.\d+\.upsample\.conv\.(weight|bias)",
        "vision": r"vision_model\..*"}


@pytest.mark.parametrize("size, billions, codes, entries", [
    ("256", 1.448, 256, 24 * 18 + 5), ("512", 1.448, 1024, 24 * 18 + 5), ("clip", 1.454, 256, 24 * 18 + 9)])
def test_full_size(size, billions, codes, entries):
    """As published: the number of parameters, each key of the published files, and the shapes of every call."""
    umm = family.published({}, size)
    shapes = checkpoint.shapes(umm)
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(of)) for part, of in shapes.items()}
    assert round(count["ar"] / 1e9, 3) == billions and round(count["vq"] / 1e6, 1) == 95.4
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    found = {}
    for part, (tree, rules, _) in umm.published_parts(shapes, {"vision": ["vision_model."]}).items():
        tensors = torch_keys.to_torch(empty[part], rules)
        assert all(re.fullmatch(KEYS[part], name) for name in tensors), part
        found[part] = {name: Spec(array.dtype, array.shape, 0) for name, array in tensors.items()}
    assert len(found["ar"]) == entries
    found["vq"]["quantize.power_vals"] = Spec(np.dtype(np.int64), (13,), 0)
    planned = convert.plan(umm, {part: {name: spec.shape for name, spec in of.items()} for part, of in found.items()})
    assert {path: shape for path, (shape, _, _) in convert.leaves(planned, found).items()} == {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}

    sharding.place(umm.partition, shapes, sharding.make_mesh("fsdp:4,tensor:2"))
    prompts, how = umm.prompt_shapes(2, 40, 32), How(images_per_prompt=2, guidance=umm.guidance)
    assert umm.image_tokens == codes and umm.ar.first_code == 50305
    drawn, logps = jax.eval_shape(lambda params, prompts: umm.sample_image(params, prompts, jax.random.key(0), how),
                                  shapes, prompts)
    assert jax.tree.map(lambda x: x.shape, drawn) == jax.tree.map(lambda x: x.shape, umm.drawn_shapes(4))
    assert logps.shape == (4, codes)
    drawn = umm.drawn_shapes(2)
    logps = jax.eval_shape(functools.partial(umm.image_logps, how=how), shapes, prompts, drawn)
    nll = jax.eval_shape(umm.image_nll, shapes, prompts, drawn, jax.random.key(0))
    assert logps.shape == (2, codes) and nll.shape == (2, codes + 2)
    pixels = jax.eval_shape(umm.render, shapes, drawn, prompts, jax.random.key(0))
    assert pixels.shape == (2, 16 * umm.grid[0], 16 * umm.grid[0], 3)
    seen = jax.eval_shape(umm.see, shapes, pixels)
    assert seen.shape == ((2, 576, 1024) if size == "clip" else (2, codes))
    assert jax.eval_shape(umm.text_logps, shapes, seen, prompts)[0].shape == (2, 32)
