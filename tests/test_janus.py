"""Janus-Pro as a family: all that the golden data record, through the calls of umm.py, from converted folders."""
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

import gvu_jax
from conftest import copied, load_config
from gvu_jax import adapters, checkpoint, convert, objectives, rewards, sampling, sharding
from gvu_jax.families import janus as family
from gvu_jax.methods.internal_gap import InternalGap
from gvu_jax.methods.uae import UAE
from gvu_jax.metrics import read_metrics
from gvu_jax.models import siglip, torch_keys
from gvu_jax.sampling import How, guided
from gvu_jax.tensor_files import Spec
from gvu_jax.train import train
from gvu_jax.umm import gather_logps

LAYOUTS = {"published": "janus", "transformers": "janus_hf"}
FORCED, DRAWN = How(temperature=0.0), How(temperature=0.0, guidance=5.0)


@pytest.fixture(scope="module")
def folders(fixtures, tmp_path_factory):
    """The golden checkpoint in both layouts as model folders."""
    return {layout: _converted(fixtures / name, tmp_path_factory.mktemp("janus")) for layout, name in LAYOUTS.items()}


def _converted(src, folder):
    convert.convert(src, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def golden(folders, janus):
    """(umm, params in float32) of the published layout, drawing pictures of the recorded size."""
    umm, params = checkpoint.load_model(folders["published"])
    umm = dataclasses.replace(umm, grid=(janus.cases["generate"]["grid"],) * 2)
    return umm, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), params)


@functools.cache
def jitted(call):
    return jax.jit(call, static_argnums={"sample_image": 3, "image_logps": 3, "sample_text": (4, 5)}.get(
        call.__name__, ()))


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


def picture(janus, name):
    with Image.open(janus.folder / name) as image:
        return np.asarray(image.convert("RGB"))


def rows_of(prompts, name):
    """The ids of each row without their padding."""
    ids, mask = getattr(prompts, name), getattr(prompts, f"{name}_mask" if name != "tokens" else "mask")
    return [row[real].tolist() for row, real in zip(ids, mask)]


# ------------------------------------------------------------------ texts

def test_golden_chats(janus, golden):
    """Ids of prompts, of questions about a picture, and of words; and what guidance compares with."""
    umm, _ = golden
    told, drawn, asked = janus.cases, janus.arrays("generate"), janus.arrays("understand")
    for name, id in told["tokenizer"]["ids"].items():
        if name in ("bos", "pad", "begin_of_image", "end_of_image", "image_placeholder"):
            assert umm._id({"bos": family.BOS, "pad": family.PAD, "begin_of_image": family.BEGIN,
                            "end_of_image": family.END, "image_placeholder": family.PICTURE}[name]) == id
    assert umm.tokenizer.eos_token_id == told["tokenizer"]["ids"]["eos"]
    for case in told["tokenizer"]["encode"]:
        assert [umm._id(family.BOS), *umm._ids(case["text"])] == case["ids"]
    prompts = umm.encode_prompts(told["generate"]["prompts"][:2])
    assert rows_of(prompts, "tokens") == [drawn[name][0].tolist() for name in ("prompt_ids", "prompt2_ids")]

    told, placeholder = told["understand"], umm._id(family.PICTURE)
    assert told["rendered_open"].startswith(family.SYSTEM)
    for question, ids, mask in (
            (told["question"], asked["input_ids"][0], asked["attention_mask"][0]),
            (told["question"], asked["batch_input_ids"][0], asked["batch_attention_mask"][0]),
            (told["second_question"], asked["batch_input_ids"][1], asked["batch_attention_mask"][1])):
        before, after = umm._around(question)
        patches = [placeholder] * umm.vision.pos_table_side ** 2
        assert [*before, *patches, *after] == ids[mask.astype(bool)].tolist()
    answered = umm.encode_prompts([told["answer"]], end=True)
    assert rows_of(answered, "words") == asked["answer_ids"].tolist()


def test_a_text_cannot_become_a_control_token(golden):
    umm, _ = golden
    for text in (f"a {family.PICTURE}", f"{family.USER} a", family.PAD, f"two {family.BEGIN}"):
        with pytest.raises(ValueError, match="prompt 1 .* steers the model"):
            umm.encode_prompts(["a cube", text])
        with pytest.raises(ValueError, match="question 0 .* steers the model"):
            umm.encode_prompts(["a cube"], questions=[text])
    for text, said in (("  ", "empty"), ("\ud800", "no Unicode"), ("a cube " * 4000, "reads at most")):
        with pytest.raises(ValueError, match=said):
            umm.encode_prompts([text])


# ------------------------------------------------------------------ drawing

def test_golden_pictures(janus, golden, call):
    """Greedy, guided and not, both prompts in one batch; each code's log-probability; and the pixels."""
    umm, _ = golden
    expected, prompts = janus.arrays("generate"), umm.encode_prompts(janus.cases["generate"]["prompts"][:2])
    codes, logps = call("sample_image", prompts, jax.random.key(0), DRAWN)
    np.testing.assert_array_equal(codes, np.concatenate(
        [expected["greedy_codes_cfg5"], expected["greedy_codes_cfg5_prompt2"]]))
    of_them = gather_logps(guided(expected["greedy_cond_cfg5"], expected["greedy_uncond_cfg5"], 5.0), codes[:1])
    np.testing.assert_allclose(logps[:1], of_them, atol=1e-3)
    np.testing.assert_allclose(logps, call("image_logps", prompts, codes, DRAWN), atol=1e-4)
    pixels = np.asarray(call("render", codes, prompts, jax.random.key(0)))
    recorded = np.concatenate([expected["uint8_cfg5"], expected["uint8_cfg5_prompt2"]])
    raw = np.clip((np.moveaxis(expected["decoded_cfg5"], 1, -1) + 1) / 2 * 255, 0, 255)
    drawn = np.round(pixels * 255).astype(int)
    assert np.abs(drawn - recorded).max() <= 1
    sure = np.abs(raw - np.round(raw)) > 5e-4 * 255 / 2
    np.testing.assert_array_equal(drawn[:1][sure], recorded[:1][sure])
    assert pixels.shape[1:3] == umm.picture_size == recorded.shape[1:3]

    codes, logps = call("sample_image", prompts, jax.random.key(0), FORCED)
    np.testing.assert_array_equal(codes[:1], expected["greedy_codes_cfg1"])
    np.testing.assert_allclose(logps[:1], gather_logps(expected["greedy_cond_cfg1"], codes[:1]), atol=2e-4)
    np.testing.assert_allclose(logps, call("image_logps", prompts, codes, FORCED), atol=1e-4)


def test_golden_logits_of_codes(janus, golden, call):
    umm, _ = golden
    expected, prompts = janus.arrays("generate"), umm.encode_prompts(janus.cases["generate"]["prompts"][:1])
    codes = expected["forced_codes"]
    prompts = prompts.repeat(len(codes))
    negative = family.llama.without_prompt(prompts.tokens, prompts.mask, umm.pad)
    conditional, unconditional = (
        call("code_logits", context, prompts.mask, codes) for context in (prompts.tokens, negative))
    np.testing.assert_allclose(conditional, expected["cond_logits"], atol=2e-4)
    np.testing.assert_allclose(unconditional, expected["uncond_logits"], atol=2e-4)
    logps = gather_logps(jnp.asarray(expected["guided_logits_cfg5"]), codes)
    np.testing.assert_allclose(call("image_logps", prompts, codes, DRAWN), logps, atol=1e-3)


def test_golden_policy(janus, golden, call):
    """Conditional and guided log-probabilities, the supervised loss, and gradients of the first."""
    umm, params = golden
    expected, texts = janus.arrays("grpo"), janus.cases["grpo"]["prompts"]
    prompts, codes = umm.encode_prompts([texts[i] for i in expected["prompt_index"]]), expected["codes"]
    logps = np.asarray(call("image_logps", prompts, codes, FORCED))
    np.testing.assert_allclose(logps, expected["logprobs"], atol=2e-4)
    conditional = call("image_logps", prompts, codes, How(guidance=5.0, logps="conditional"))
    np.testing.assert_array_equal(conditional, logps)
    np.testing.assert_allclose(logps.sum(axis=1), expected["sum_logprobs"], atol=1e-4 * codes.shape[1])
    nll = np.asarray(call("image_nll", prompts, codes, None))
    np.testing.assert_allclose(
        [objectives.cross_entropy(-row, np.ones(len(row), bool)) for row in nll], expected["sft_nll_mean"], atol=1e-4)
    found = call("image_logps", prompts, codes, DRAWN)[0]
    np.testing.assert_allclose(found, expected["guided_cfg5_logprobs_row0"], atol=1e-3)

    told = json.loads((janus.folder / "expected/grpo_grad_norms.json").read_text())
    total = lambda ar, how: jnp.sum(umm.image_logps({**params, "ar": ar}, prompts, codes, how))
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    gradients = torch_keys.to_torch(gradient(params["ar"], FORCED), umm.adapter_rules)
    for name, norm in told["parameters"].items():
        np.testing.assert_allclose(np.linalg.norm(gradients[name]), norm, rtol=2e-3, err_msg=name)
    recorded = [name for name in expected if name.startswith("grad/")]
    assert recorded and told["parameters"]
    for name in recorded:
        found, array = gradients[name.removeprefix("grad/")], expected[name]
        np.testing.assert_allclose(found, array, atol=2e-3 * np.abs(array).max(), err_msg=name)

    # Of the guided policy both forwards are differentiated: along a direction, as the difference quotient says.
    ours = gradient(params["ar"], DRAWN)
    step = jax.tree.map(lambda g: 1e-3 * g / norm_of(ours), ours)
    at = lambda sign: float(jax.jit(total, static_argnums=1)(
        jax.tree.map(lambda p, s: p + sign * s, params["ar"], step), DRAWN))
    np.testing.assert_allclose((at(1) - at(-1)) / 2e-3, norm_of(ours), rtol=5e-3)


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("how", [How(images_per_prompt=3), How(2, temperature=0.6, top_k=5, guidance=2.5)])
def test_the_sampler_knows_the_log_probabilities_that_the_trainer_finds(janus, golden, call, how, monkeypatch):
    """Also where the cache grows on the way, as it does for more tokens than these."""
    monkeypatch.setattr(sampling, "stretches", functools.partial(sampling.stretches, least=2))
    umm, _ = golden
    assert len(sampling.stretches(umm.image_tokens - 1)) > 1
    prompts = umm.encode_prompts(janus.cases["generate"]["prompts"])
    codes, logps = call("sample_image", prompts, jax.random.key(1), how)
    forced = call("image_logps", prompts.repeat(how.images_per_prompt), codes, how)
    np.testing.assert_allclose(logps, forced, atol=1e-4)


def test_a_prompt_is_drawn_alike_whatever_stands_beside_it(janus, golden, call):
    """Padding is masked in the context with the prompt and in that without."""
    umm, _ = golden
    texts, codes = janus.cases["generate"]["prompts"], janus.arrays("generate")["forced_codes"][:1]
    lengths = umm.lengths([text * 3 for text in texts])
    for text in texts:
        found = [call("image_logps", umm.encode_prompts([text], of), codes, DRAWN) for of in (None, lengths)]
        np.testing.assert_allclose(*found, atol=1e-4)


# ------------------------------------------------------------------ reading

def test_golden_answers(janus, golden, call):
    umm, params = golden
    told, expected = janus.cases["understand"], janus.arrays("understand")
    pixels = np.stack([umm.fit(picture(janus, told[name])) for name in ("image", "second_image")])
    seen = call("see", pixels)
    prompts = umm.encode_prompts([told["answer"]], questions=[told["question"]], end=True)
    logits = np.asarray(call("text_logits", seen[:1], prompts))
    L = expected["answer_ids"].shape[1]
    np.testing.assert_allclose(logits[:, :L], expected["answer_logits"], atol=2e-4)
    logps, mask = call("text_logps", seen[:1], prompts)
    np.testing.assert_allclose(logps[mask], expected["answer_logprobs"][0], atol=2e-4)
    theirs = np.load(janus.folder.with_name("janus_hf") / "expected/outputs.npz")["answer_logits"]
    np.testing.assert_allclose(logits[:, :L], theirs, atol=2e-4)

    greedy, batch = expected["greedy_tokens"], expected["batch_greedy_tokens"]
    steps = max(greedy.shape[1], batch.shape[1])
    asked = umm.encode_prompts(["-"] * 2, questions=[told["question"], told["second_question"]])
    words, logps, mask = call("sample_text", seen, asked, jax.random.key(0), FORCED, steps)
    np.testing.assert_array_equal(words[:1, :greedy.shape[1]], greedy)
    np.testing.assert_array_equal(words[:, :batch.shape[1]], batch)
    recorded = gather_logps(expected["greedy_logits"], greedy)
    np.testing.assert_allclose(logps[:1, :greedy.shape[1]], recorded, atol=2e-4)
    said = umm.answer(params, seen[:1], told["question"], jax.random.key(0), greedy.shape[1])
    assert said == [told["greedy_text"].strip()]
    forced, _ = call("text_logps", seen, asked.replace(words=words, words_mask=mask))
    np.testing.assert_allclose(np.where(mask, forced, 0), np.where(mask, logps, 0), atol=1e-4)


def test_golden_vision(janus, golden, call):
    umm, _ = golden
    expected = janus.arrays("vision")
    pixels = np.stack([umm.fit(picture(janus, f"images/image_{i}.png")) for i in expected["pixels_index"]])
    np.testing.assert_allclose(call("features", pixels), expected["features"], atol=5e-4)
    codes = np.moveaxis(janus.arrays("vq")["encode_images"], 1, -1) / 2 + 0.5
    np.testing.assert_array_equal(call("image_target", codes), janus.arrays("vq")["encode_codes"])


def test_golden_rewards(janus, golden, call):
    """The prompt's own words after a drawn picture, and yes or no about it; pictures are brought to the tower's size in
    the program that reads them."""
    umm, _ = golden
    expected, told, asked = janus.arrays("reward"), janus.cases["reward"], janus.cases["yesno"]
    drawn = expected["pictures_uint8"].astype(np.float32) / 255
    square = np.asarray(siglip.squared(drawn[:1], umm.transform))
    np.testing.assert_allclose(np.moveaxis(square, -1, 1) * 2 - 1, expected["pixel_values_0"], atol=1e-6)
    np.testing.assert_array_equal(umm.fit(expected["pictures_uint8"][0]), drawn[0])
    seen = call("see", drawn)[np.array([case["picture"] for case in told["cases"]])]
    prompts = umm.encode_prompts([case["prompt"] for case in told["cases"]],
                                 questions=[told["instruction"]] * len(told["cases"]), end=True)
    ids = [[*case["target_ids"], umm.tokenizer.eos_token_id] for case in told["cases"]]
    assert rows_of(prompts, "words") == ids
    logps, mask = (np.asarray(x) for x in call("text_logps", seen, prompts))
    for row, real, case, words in zip(logps, mask, told["cases"], expected["token_logprobs"]):
        np.testing.assert_allclose(row[real], [*words[~np.isnan(words)], case["eos_logprob"]], atol=2e-4)
    prompts = umm.encode_prompts([case["prompt"] for case in told["cases"]],
                                 questions=[told["instruction"]] * len(told["cases"]))
    reward = rewards.geometric_mean(*call("text_logps", seen, prompts))
    np.testing.assert_allclose(np.log(reward), expected["mean_logprob"], atol=1e-4)
    np.testing.assert_allclose(reward, [case["geometric_mean"] for case in told["cases"]], rtol=1e-4)

    questions = [asked["template"].format(p=case["prompt"]) for case in asked["cases"] for _ in rewards.ANSWERS]
    prompts = umm.encode_prompts(rewards.ANSWERS * len(asked["cases"]), questions=questions)
    logits = call("text_logits", seen, prompts)[::2, 0]
    np.testing.assert_allclose(logits, expected["yesno_last_logits"], atol=2e-4)
    two_way = rewards.yes(*call("text_logps", seen, prompts))
    np.testing.assert_allclose(two_way, expected["yesno_p_yes_two_way"], atol=1e-4)


def test_texts_about_one_picture_share_its_row(janus, golden, call):
    umm, _ = golden
    seen = call("see", np.random.default_rng(0).random((2, *umm.picture_size, 3), np.float32))
    prompts = umm.encode_prompts([*janus.cases["generate"]["prompts"][:2], "a ball", "two cubes"])
    packed, mask = call("text_logps", seen, prompts)
    alone, _ = call("text_logps", jnp.repeat(seen, 2, axis=0), prompts)
    np.testing.assert_allclose(np.where(mask, packed, 0), np.where(mask, alone, 0), atol=1e-4)


@pytest.mark.parametrize("size, to", [((20, 20), 80), ((37, 37), 80), ((16, 24), 48), ((24, 9), 24), ((96, 96), 48), ((97, 31), 80)])
def test_pictures_are_resized_as_pil_does(size, to):
    """Wider, smaller, not square: bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    transform = siglip.Transform(to, min_size=4)
    found = jax.jit(lambda x: siglip.squared(x, transform))(pixels.astype(np.float32) / 255)
    fitted = np.stack([siglip.fit_image(Image.fromarray(image), transform) for image in pixels])
    np.testing.assert_array_equal(np.round(np.asarray(found) * 255), fitted * 255)


def test_what_is_resized_is_differentiated_as_if_nothing_were_rounded():
    torch = pytest.importorskip("torch")
    pixels, weights = (np.random.default_rng(i).random((1, *size, 3), np.float32)
                       for i, size in enumerate([(31, 20), (14, 44)]))
    found = jax.jit(jax.grad(lambda x: jnp.sum(weights * siglip.resized(x, (14, 44)))))(pixels)
    image = torch.tensor(pixels).permute(0, 3, 1, 2).requires_grad_()
    torch.nn.functional.interpolate(image, (14, 44), mode="bicubic", antialias=True).backward(
        torch.tensor(weights).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, image.grad.permute(0, 2, 3, 1), atol=1e-5)


# ------------------------------------------------------------------ folders

def test_both_layouts_become_one_model_and_go_back(folders, fixtures, tmp_path):
    from safetensors.numpy import load_file
    found = {}
    for layout, name in LAYOUTS.items():
        umm, params = checkpoint.load_model(folders[layout])
        assert umm.layout == layout
        found[layout] = traverse_util.flatten_dict(jax.device_get(params))
        convert.export_hf(folders[layout], tmp_path / layout)
        for file in (fixtures / name).iterdir():
            if file.is_file() and file.suffix != ".bin":
                assert (tmp_path / layout / file.name).read_bytes() == file.read_bytes(), file.name
    first, second = found.values()
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)
    assert load_file(fixtures / "janus/model.safetensors").keys() == load_file(
        tmp_path / "published/model.safetensors").keys()


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_are_read_and_written(fixtures, folders, tmp_path, shards):
    """DeepSeek publishes pytorch_model.bin, of the 7B in shards."""
    torch = pytest.importorskip("torch")
    src = copied(fixtures / "janus", tmp_path / "src", "*.safetensors", "expected", "images")
    tensors = torch.load(src / "pytorch_model.bin", weights_only=True)
    if shards == 2:
        (src / "pytorch_model.bin").unlink()
        names, weight_map = sorted(tensors), {}
        for i in range(2):
            file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({name: tensors[name] for name in names[i::2]}, src / file)
            weight_map |= {name: file for name in names[i::2]}
        (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert.convert(src, tmp_path / "model")
    convert.export_hf(tmp_path / "model", tmp_path / "back")
    again = {}
    for file in sorted((tmp_path / "back").glob("*.bin")):
        again |= torch.load(file, weights_only=True)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    params = [checkpoint.load_model(folder)[1] for folder in (tmp_path / "model", folders["published"])]
    jax.tree.map(np.testing.assert_array_equal, *params)


def edited(src, dst, file, change):
    copied(src, dst, "expected", "images", "*.bin")
    told = json.loads((dst / file).read_text())
    change(told)
    (dst / file).write_text(json.dumps(told))
    return dst


def more(told, name):
    told[name] += 1


@pytest.mark.parametrize("layout, file, change, said", [
    ("published", "config.json", lambda c: c["language_config"].update(rope_scaling={}), "rope_scaling"),
    ("published", "config.json", lambda c: more(c["language_config"], "num_hidden_layers"), "missing keys .'lang"),
    ("published", "config.json", lambda c: c["gen_vision_config"].update(cls="VQ-8"), "VQ-16"),
    ("published", "config.json", lambda c: more(c["vision_config"]["params"], "image_size"), "does not divide"),
    ("published", "config.json", lambda c: c.pop("gen_head_config"), "does not say 'gen_head_config'"),
    ("published", "processor_config.json", lambda c: c.update(add_special_token=True), "add_special_token"),
    ("published", "processor_config.json", lambda c: more(c, "num_image_tokens"), "the vision tower gives"),
    ("published", "preprocessor_config.json", lambda c: c.update(image_mean=[0.4] * 3), "image_mean"),
    ("published", "preprocessor_config.json", lambda c: more(c, "image_size"), "image transform and vision tower"),
    ("transformers", "config.json", lambda c: c["text_config"].update(attention_bias=True), "attention_bias"),
    ("transformers", "config.json", lambda c: c["vq_config"].update(double_latent=True), "double_latent"),
    ("transformers", "config.json", lambda c: c["vision_config"].update(use_qk_norm=True), "use_qk_norm")])
def test_folders_that_are_not_implemented_are_refused(fixtures, tmp_path, layout, file, change, said):
    src = edited(fixtures / LAYOUTS[layout], tmp_path / "src", file, change)
    with pytest.raises((ValueError, OSError), match=said):
        convert.convert(src, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------ training

@pytest.mark.parametrize("preset, objective, replay, heads", [
    ("csft", "sft", True, 16), ("dpo-1b", "dpo", False, 16), ("cdpo-7b", "dpo", True, 32)])
def test_internal_gap_has_the_papers_settings(preset, objective, replay, heads):
    config = load_config("janus_pro_gap", preset)
    InternalGap.check(config)
    gap = config.internal_gap
    assert (gap.objective, gap.pool, gap.group, config.trains) == (objective, 6000, 10, "backbone")
    assert config.steps * gap.batch == 20 * gap.pool and gap.replay * gap.batch == 10 * gap.pool * replay
    umm = family.published(config.model.override, config.model.size)
    assert umm.ar.num_attention_heads == heads and set(load_config("janus_pro")) - {"gvu"} <= set(config)
    with pytest.raises(ValueError, match="janus_pro_gap.py has no preset 'sft-3b'"):
        load_config("janus_pro_gap", "sft-3b")


def test_uae_has_the_settings_of_its_sibling():
    config, theirs = load_config("janus_pro_uae", "7b"), load_config("xomni_uae")
    UAE.check(config)
    assert config.uae == theirs.uae and config.model == load_config("janus_pro", "7b").model
    assert "gvu" not in config and "reward" not in config
    with pytest.raises(ValueError, match="janus_pro_uae.py has no preset '3b'"):
        load_config("janus_pro_uae", "3b")


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, folders, janus, tmp_path_factory):
    """The layout of a golden model, and the folder of a run of three steps that began with it."""
    folder, config = tmp_path_factory.mktemp("run"), load_config("janus_pro")
    texts = janus.cases["generate"]["prompts"]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    config.data.update(prompts=str(folder / "prompts.jsonl"), held_out=str(folder / "prompts.jsonl"))
    config.model.checkpoint = str(folders[request.param])
    config.gvu.update(prompts=2, group=2, micro_batches=2)
    config.mesh.update(fsdp=1, tensor=1)
    config.optim.lr = 1e-2
    config.lora.targets = "_proj|aligner|gen_head"
    config.update(steps=3, eval=dict(every=3, batches=1))
    train(config, folder / "run")
    return request.param, folder / "run"


def test_three_steps_of_gvu(trained):
    lines = [line for line in read_metrics(trained[1] / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The golden weights are bfloat16, in which one token at a time and all at once differ by more than in float32.
    assert all(line["logp_gap"] < 0.2 and np.isfinite(line["grad_norm"]) for line in lines)
    model = gvu_jax.load(trained[1])
    pictures = model.generate(["a red cube"], images_per_prompt=2)[0]
    scores = model.score(pictures, ["a red cube"] * 2)
    assert scores[0].words == ["a", "red", "cube"] and 0 < scores[0].reward < 1
    np.testing.assert_allclose(scores[0].reward, np.exp(np.log(scores[0].token_probabilities).mean()), rtol=1e-3)


def test_peft_lays_the_adapter_over_transformers_janus(trained, fixtures, janus, tmp_path):
    """And reads back what a run began from DeepSeek's folder says, under its names."""
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    layout, run = trained
    convert.export_peft(run, tmp_path / "adapter")
    model = gvu_jax.load(run)
    adapter, _ = adapters.read_peft(tmp_path / "adapter", model.umm)
    assert any(leaf.any() for leaf in jax.tree.leaves(adapter))
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    if layout == "published":
        assert told["auto_mapping"] is None
        assert "language_model.model.layers.0.self_attn.q_proj" in told["target_modules"]
        return
    assert told["auto_mapping"]["base_model_class"] == "JanusForConditionalGeneration"
    theirs = transformers.JanusForConditionalGeneration.from_pretrained(fixtures / "janus_hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == sum(
        leaf.shape[0] if leaf.ndim == 3 else 1 for leaf in jax.tree.leaves(adapter)) / 2
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), model.params)
    prompts = model.umm.encode_prompts(janus.cases["generate"]["prompts"][:1])
    prompt, codes = janus.arrays("generate")["prompt_ids"], janus.arrays("generate")["forced_codes"][:1]
    with torch.no_grad():
        inner = theirs.base_model.model
        embedded = torch.cat([inner.get_input_embeddings()(torch.from_numpy(prompt)),
                              inner.prepare_embeddings_for_image_generation(torch.from_numpy(codes[:, :-1]))], dim=1)
        hidden = inner.model.language_model(inputs_embeds=embedded).last_hidden_state
        logits = inner.model.generation_head(hidden[:, -codes.shape[1]:]).numpy()
    found = jax.jit(model.umm.code_logits)(params, prompts.tokens, prompts.mask, codes)
    np.testing.assert_allclose(found, logits, atol=1e-3)
    assert np.abs(logits - janus.arrays("generate")["cond_logits"][:1]).max() > 1e-2


# ------------------------------------------------------------------ full size

@pytest.mark.parametrize("size, billions, entries", [("1b", 2.089, 882), ("7b", 7.420, 936)])
def test_full_size(size, billions, entries):
    """As published, which counts SigLIP's pooling head and a buffer; and each key of both layouts has its place."""
    umm = family.published({}, size)
    shapes = checkpoint.shapes(umm)
    pooling = 12 * 1024 ** 2 + 12 * 1024
    assert round((sum(leaf.size for leaf in jax.tree.leaves(shapes)) + pooling) / 1e9, 3) == billions
    empty = jax.tree.map(lambda leaf: np.broadcast_to(jnp.bfloat16(0), leaf.shape), shapes)
    for layout in family.llama.RULES:
        umm = dataclasses.replace(umm, layout=layout)
        rules = umm.published_parts(shapes, {"": {}})[""][1]
        found = {name: Spec(array.dtype, array.shape, 0) for name, array in torch_keys.to_torch(empty, rules).items()}
        if layout == "published":
            assert len(found) + 14 == entries
        planned = convert.plan(umm, {"": {name: spec.shape for name, spec in found.items()}})
        assert {path: shape for path, (shape, _, _) in convert.leaves(planned, {"": found}).items()} == {
            path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}

    sharding.place(umm.partition, shapes, sharding.make_mesh("fsdp:4,tensor:2"))
    prompts = umm.prompt_shapes(2, 40, 32)
    logps = jax.eval_shape(functools.partial(umm.image_logps, how=DRAWN), shapes, prompts, umm.drawn_shapes(2))
    assert logps.shape == (2, 576)
    seen = jax.eval_shape(umm.see, shapes, jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.float32))
    assert jax.eval_shape(umm.text_logps, shapes, seen, prompts)[0].shape == (2, 32)
    pixels = jax.eval_shape(umm.render, shapes, umm.drawn_shapes(2), prompts, jax.random.key(0))
    assert pixels.shape == (2, 384, 384, 3)
