"""UAE's pair as a family: all that the golden data record, through the calls of umm.py, from converted folders."""
import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

import gvu_jax
from conftest import load_config
from test_scorers import small
from gvu_jax import adapters, checkpoint, convert, families, flow, lora, policy, sharding
from gvu_jax.families import qwen_sd35 as family
from gvu_jax.metrics import read_metrics
from gvu_jax.models import clip, torch_keys
from gvu_jax.sampling import How
from gvu_jax.tensor_files import Spec
from gvu_jax.train import train
from gvu_jax.umm import gather_logps


# ------------------------------------------------------------------ the golden model

@pytest.fixture(scope="module")
def uae(fixtures, tmp_path_factory):
    """The golden folders, what they say, two of their prompts, and the model that becomes of them: umm, base, policy
    (both in float32)."""
    folder = fixtures / "uae/uae"
    told = json.loads((folder / "config.json").read_text())
    where = lambda name: (folder / told[name]).resolve()
    model = tmp_path_factory.mktemp("uae") / "model"
    step = told["vae_scale_factor"] * json.loads((where("dit") / "config.json").read_text())["patch_size"]
    convert.convert(where("llm"), model, image_size=step, sd3=where("SD3"), dit=where("dit"),
                    processor=where("llm_processor"))
    umm, params = checkpoint.load_model(model)
    expected = json.loads((folder / "expected.json").read_text())
    umm = dataclasses.replace(umm, grid=(told["height"] // step, told["width"] // step),
                              negative=expected["negative_prompt"])
    base = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), params)
    laid, adapter = family.read_adapters(umm, where("llm_lora"), where("dit_lora"),
                                         told["llm_lora_alpha"] / told["llm_lora_rank"])
    widened = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (laid, adapter))
    return types.SimpleNamespace(
        folder=folder, told=told, where=where, model=model, umm=umm, base=base,
        policy=family.laid_over(base, *widened), expected=expected, texts=list(expected["prompts"].values())[:2],
        arrays=lambda name: dict(np.load(folder / f"{name}.npz")))


def channels_last(x):
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, -3)


# ------------------------------------------------------------------ drawing

def test_golden_chats(uae):
    """The ids of a prompt's chat and of the negative one's; and the constant pooled vector."""
    expected, umm = uae.arrays("embeds"), uae.umm
    assert family.NEGATIVE == uae.expected["negative_prompt"]
    assert family.QUESTION == uae.expected["published_caption_question"]
    for name, text in uae.expected["prompts"].items():
        ids, mask = expected[f"{name}_input_ids"], expected[f"{name}_attention_mask"].astype(bool)
        prompts = umm.encode_prompts([text])
        assert prompts.tokens[0][prompts.mask[0]].tolist() == ids[1][mask[1]].tolist()
        assert list(umm._negative()) == ids[0][mask[0]].tolist()
        assert umm._chat(family.DRAW, text) == uae.expected["rendered"][name]
    np.testing.assert_allclose(umm.pooled, uae.arrays("loop")["pooled"][0], atol=2e-4)


def test_golden_contexts(uae):
    """What the drawer reads of both chats, padding too; each prompt by itself, in one batch with a longer one."""
    expected, umm = uae.arrays("embeds"), uae.umm
    prompts = umm.encode_prompts(list(uae.expected["prompts"].values()))
    found = jax.jit(umm.texts, static_argnums=2)(uae.policy, prompts, True)
    for row, name in enumerate(uae.expected["prompts"]):
        recorded = expected[f"{name}_prompt_embeds"]
        for text, which in zip(found, (1, 0)):
            np.testing.assert_array_equal(np.flatnonzero(text.real[row]), np.arange(recorded.shape[1]))
            np.testing.assert_allclose(text.context[row, :recorded.shape[1]], recorded[which], atol=2e-4)
    ids, mask = expected["long_input_ids"], expected["long_attention_mask"].astype(bool)
    hidden = jax.jit(umm.hidden)(uae.policy, ids, mask)
    np.testing.assert_allclose(hidden, expected["long_last_hidden_state"], atol=2e-4)
    off = {name: part for name, part in uae.policy.items() if name != "adapter"}
    recorded = expected["long_prompt_embeds_adapter_off"]
    context = jax.jit(umm.context)(off, ids, mask)[:, :recorded.shape[1]]
    np.testing.assert_allclose(context, recorded, atol=2e-4)
    assert np.abs(recorded - expected["long_prompt_embeds"][:, :recorded.shape[1]]).max() > 1e-2


def test_golden_pictures(uae):
    """From the prompt over every latent to every byte of the picture."""
    expected, umm, told = uae.arrays("loop"), uae.umm, uae.told
    how = flow.Flow(told["num_inference_steps"])
    prompts = umm.encode_prompts(list(uae.expected["prompts"].values()))
    start = np.concatenate([expected[f"{name}_init_latents"] for name in uae.expected["prompts"]])

    def draw(policy, start):
        texts, levels = umm.texts(policy, prompts, True), flow.levels(how, umm.shift)
        run = umm._run(policy, *texts, told["guidance_scale"], how)
        drawn, _ = flow.sample(how, run, start, levels, 0, None)
        _, chain = jax.lax.scan(lambda x, s: ((x := x + (s[1] - s[0]) * run(x, s[0])), x), start, (
            jnp.array(levels[:-1]), jnp.array(levels[1:])))                                         # [N, S, ..]
        return drawn, chain, umm.decode(policy, drawn.final), umm.render(policy, drawn, prompts, None)
    drawn, chain, pixels, rendered = jax.jit(draw)(uae.policy, channels_last(start))
    assert rendered.shape[1:3] == umm.picture_size == (told["height"], told["width"])
    for row, name in enumerate(uae.expected["prompts"]):
        np.testing.assert_allclose(channels_first(chain[:, row]), expected[f"{name}_step_latents"][:, 0], atol=5e-4)
        np.testing.assert_allclose(channels_first(drawn.final[row]), expected[f"{name}_final_latents"][0], atol=5e-4)
        np.testing.assert_allclose(pixels[row], expected[f"{name}_image_float"][0], atol=2e-3)
        off = np.abs(np.round(np.asarray(rendered[row]) * 255) - expected[f"{name}_image_uint8"])
        assert off.max() <= 1 and np.mean(off > 0) <= 0.01


HOWS = [How(2, guidance=3.0, flow=flow.Flow(4, 0.7)), How(2, flow=flow.Flow(4, 0.8, kind="cps", window=2))]


@pytest.mark.parametrize("how", HOWS, ids=["guided", "window"])
def test_what_was_drawn_has_the_samplers_log_probs(uae, how):
    """Of a policy with an adapter over both halves; in groups, cut into micro-batches, and prompt by prompt."""
    umm, texts = uae.umm, uae.texts
    prompts = umm.encode_prompts(texts)
    drawn, logps = jax.jit(umm.sample_image, static_argnums=3)(uae.policy, prompts, jax.random.key(0), how)
    assert logps.shape == (4, how.flow.trained)
    shape = lambda x: x.shape
    assert jax.tree.map(shape, drawn) == jax.tree.map(shape, umm.drawn_shapes(4, how))
    look = jax.jit(umm.image_logps, static_argnums=3)
    found = look(uae.policy, prompts.repeat(2), drawn, how)
    np.testing.assert_allclose(found, logps, atol=1e-4)
    half = jax.tree.map(lambda x: x[2:], drawn)
    alone = look(uae.policy, umm.encode_prompts(texts[1:]).repeat(2), half, how)
    np.testing.assert_allclose(alone, logps[2:], atol=1e-4)
    assert np.abs(look(uae.base, prompts.repeat(2), drawn, how) - logps).max() > 1e-4
    pixels = jax.jit(umm.render)(uae.base, drawn, prompts, jax.random.key(0))
    assert pixels.shape == (4, *umm.picture_size, 3)
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-4)


# ------------------------------------------------------------------ reading

def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_golden_captions(uae):
    """Both resizes of a picture, the chat about it, and its caption: every token, and the logits it was picked from."""
    expected, umm, told = uae.arrays("caption"), uae.umm, uae.expected["caption"]
    for i, case in enumerate(told["cases"]):
        pixels, vision = umm.fit(picture(uae.folder / case["image"]))[None], umm.vision
        fitted = pixels
        if pixels.shape[1:3] == umm.picture_size:                 # a picture as large as drawn ones is left to `see`
            fitted = family.qwen25_vl.fitted(pixels, umm.transform, vision.multiple)
        patches = family.qwen25_vl.patches(fitted, vision)[0]
        np.testing.assert_allclose(patches, expected[f"pixel_values_{i}"], atol=1e-5)
        assert [1, *(n // vision.patch_size for n in fitted.shape[1:3])] == expected[f"image_grid_thw_{i}"][0].tolist()
        before, after = umm._around(told["question"])
        ids = expected[f"input_ids_{i}"][0]
        cells = np.sum(ids == umm._id(family.PICTURE))
        assert [*before, *[umm._id(family.PICTURE)] * cells, *after] == ids.tolist()
        asked = umm.encode_prompts(["-"], questions=[told["question"]])
        steps = expected[f"tokens_{i}"].shape[1]

        def say(policy, pixels):
            seen = umm.see(policy, pixels)
            words, logps, mask = umm.sample_text(policy, seen, asked, jax.random.key(0), How(temperature=0.0), steps)
            said = asked.replace(words=words, words_mask=mask)
            return words, logps, mask, umm.text_logits(policy, seen, said)
        words, logps, mask, logits = jax.jit(say)(uae.policy, pixels)
        real = np.asarray(mask)
        np.testing.assert_array_equal(np.asarray(words)[real], expected[f"tokens_{i}"][real])
        np.testing.assert_allclose(np.asarray(logits)[real], expected[f"logits_{i}"][real], atol=2e-4)
        recorded = np.asarray(gather_logps(expected[f"logits_{i}"], expected[f"tokens_{i}"]))
        np.testing.assert_allclose(np.asarray(logps)[real], recorded[real], atol=2e-4)


def test_texts_about_one_picture_share_its_row(uae):
    umm = uae.umm
    pixels = np.random.default_rng(0).integers(0, 256, (2, *umm.picture_size, 3)).astype(np.float32) / 255
    prompts = umm.encode_prompts(["a red cube", "two", "a ball", "two cubes on a table"])

    def both(policy, pixels):
        seen = umm.see(policy, pixels)
        return umm.text_logps(policy, seen, prompts)[0], umm.text_logps(
            policy, jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), seen), prompts)[0]
    packed, alone = jax.jit(both)(uae.policy, pixels)
    mask = prompts.words_mask
    np.testing.assert_allclose(np.where(mask, packed, 0), np.where(mask, alone, 0), atol=1e-4)


def test_a_text_cannot_become_a_control_token(uae):
    for text in (f"a {family.PICTURE}", f"{family.STOP} a", family.PAD):
        with pytest.raises(ValueError, match="prompt 1 .* steers the model"):
            uae.umm.encode_prompts(["a cube", text])
    for text, said in (("  ", "empty"), ("\ud800", "no Unicode"), ("a cube " * 4000, "reads at most")):
        with pytest.raises(ValueError, match=said):
            uae.umm.encode_prompts([text])


# ------------------------------------------------------------------ UAE's losses

def parts_of(uae):
    """What the losses move: both adapters as peft has them, the projector, and the drawer's own weights."""
    scale = uae.told["llm_lora_alpha"] / uae.told["llm_lora_rank"]
    drawer = json.loads((uae.where("dit_lora") / "adapter_config.json").read_text())
    scales = {"llm": scale, "dit": drawer["lora_alpha"] / drawer["r"]}
    plain = {half: lora.scaled(tree, 1 / scales[half]) for half, tree in uae.policy["adapter"].items()}
    projector, dit = uae.policy["ar"]["llm"]["projector"], uae.policy["ar"]["dit"]

    def policy_of(adapters, projector, dit):
        llm = uae.policy["ar"]["llm"] | {"projector": projector}
        adapter = {half: lora.scaled(adapters[half], scales[half]) for half in adapters}
        return uae.policy | {"ar": {"llm": llm, "dit": dit}, "adapter": adapter}
    return policy_of, (plain, projector, dit)


def norm(tree):
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))


def assert_projector(slope, expected, prefix):
    """The recorded gradients of the projector, whole or its first rows, in torch's layout."""
    names = [name for name in expected if name.startswith(f"{prefix}/projector.")]
    for name in names:
        _, layer, kind = name.split("/")[-1].split(".")
        found = np.asarray(slope[{"0": "fc1", "2": "fc2"}[layer]][{"bias": "bias", "weight": "kernel"}[kind]]).T
        atol = (1e-2 if prefix.startswith("rec") else 2e-3) * np.abs(expected[name]).max()
        np.testing.assert_allclose(found[:len(expected[name])], expected[name], rtol=0, atol=atol, err_msg=name)
    assert names


def test_golden_diffusion_loss(uae):
    """Weighted by level, from contexts with their padding; and its gradients in all parts."""
    expected, umm, embeds = uae.arrays("losses"), uae.umm, uae.arrays("embeds")
    policy_of, start = parts_of(uae)
    ids, mask = embeds["long_input_ids"], embeds["long_attention_mask"].astype(bool)
    noisy, target = channels_last(expected["sft_noisy"]), channels_last(expected["sft_target"])

    def loss(parts):
        policy = policy_of(*parts)
        text = umm.with_pooled(umm.context(policy, ids, mask))
        v = umm._run(policy, text, None, 1.0, umm.flow)(noisy, expected["sft_timesteps"] / 1000)
        return jnp.mean(expected["sft_weighting"] * (v - target) ** 2)
    value, (adapters, projector, dit) = jax.jit(jax.value_and_grad(loss))(start)
    np.testing.assert_allclose(value, expected["sft_loss"], rtol=1e-3)
    assert_projector(projector, expected, "sft_grad")
    dit = {name: part for name, part in dit.items() if name != "pos_embed"}                 # a buffer, not trained
    found = {"projector": norm(projector), "dit_lora": norm(adapters["dit"]), "llm_lora": norm(adapters["llm"]),
             "dit_base": norm(dit)}
    for name, recorded in uae.expected["sft_grad_norms"].items():
        np.testing.assert_allclose(found[name], recorded, rtol=2e-3, err_msg=name)


def test_flow_matching_is_the_diffusion_loss(uae):
    """With the levels' weights 1 and the target the velocity; its noise and level are the key's, row by row."""
    umm, prompts = uae.umm, uae.umm.encode_prompts(uae.texts)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *umm.picture_size, 3)).astype(np.float32) / 255
    target = jax.jit(umm.image_target)(uae.policy, pixels)
    nll = jax.jit(umm.image_nll)
    first = nll(uae.policy, prompts, target, jax.random.key(0))
    assert first.shape == (2, 1) and (first > 0).all()
    np.testing.assert_array_equal(first, nll(uae.policy, prompts, target, jax.random.key(0)))
    assert (first != nll(uae.policy, prompts, target, jax.random.key(1))).all()
    keys = jax.random.split(jax.random.key(0))
    sigma = jax.nn.sigmoid(jax.random.normal(keys[0], (2,)))[:, None, None, None]
    noise = jax.random.normal(keys[1], target.shape)

    @jax.jit
    def velocity(policy):
        text = umm.texts(policy, prompts, False)[0]
        return umm._run(policy, text, None, 1.0, umm.flow)((1 - sigma) * target + sigma * noise, sigma[:, 0, 0, 0])
    np.testing.assert_allclose(first[:, 0], ((velocity(uae.policy) - noise + target) ** 2).mean((1, 2, 3)), rtol=1e-4)


def test_golden_cold_start(uae):
    """Picture, question and answer -> contexts -> ten steps -> picture -> CLIP, and back through all of it: with the
    published slip of what CLIP is shown, and without."""
    from test_clip_vision import read
    expected, umm, told = uae.arrays("losses"), uae.umm, uae.told
    tower, of_tower = read(uae.folder / "bench/clip")
    policy_of, start = parts_of(uae)
    answered = [row[labels >= 0] for row, labels in zip(expected["rec_input_ids"], expected["rec_labels"])][:-1]
    ids = expected["rec_input_ids"][0]
    grid = tuple(int(n) for n in expected["rec_image_grid_thw"][0, 1:])
    patches = expected["rec_pixel_values"].reshape(len(answered), -1, expected["rec_pixel_values"].shape[1])
    before = ids[:np.flatnonzero(ids == umm._id(family.PICTURE))[0]]
    asked = umm.encode_prompts(["-"] * len(answered))
    rows = lambda x: np.repeat(np.asarray(x)[None], len(answered), axis=0)
    asked = asked.replace(question=rows(before).astype(np.int32), question_mask=rows(np.ones(len(before), bool)),
                          words=np.stack(answered).astype(np.int32), words_mask=rows(answered[0] >= 0))

    originals = channels_last(expected["rec_gt_pixels"]) * np.float32(clip.STD) + np.float32(
        clip.MEAN)                                       # recorded after preprocessing, which leaves them

    def loss(parts):
        policy = policy_of(*parts, uae.policy["ar"]["dit"])
        cells = family.qwen25_vl.VisionTower(umm.vision).apply({"params": policy["vision"]}, patches, grid)
        seen = family.Seen(cells, tuple(n // umm.vision.spatial_merge_size for n in grid))
        pixels = umm.redrawn(policy, seen, asked, channels_last(expected["rec_init_latents"]),
                             family.flow.Flow(told["rec_num_inference_steps"]), told["rec_guidance_scale"])
        both = {name: family.unlike(tower, of_tower, pixels, originals, name == "published")
                for name in ("published", "rescaled")}
        values = {name: value for name, (value, _) in both.items()}
        return values, (both, pixels, umm.answer_states(policy, seen, asked))
    slopes, (both, pixels, (positive, negative)) = jax.jit(jax.jacrev(loss, has_aux=True))(start[:2])
    np.testing.assert_allclose(positive, expected["rec_context"], atol=2e-4)
    np.testing.assert_allclose(negative, expected["rec_context_negative"], atol=2e-4)
    np.testing.assert_allclose(channels_first(pixels), expected["rec_images"], atol=2e-3)
    for name, (value, alike) in both.items():
        np.testing.assert_allclose(alike, expected[f"rec_similarity_{name}"], atol=1e-4)
        np.testing.assert_allclose(value, expected[f"rec_loss_{name}"], rtol=1e-3)
        adapters, projector = slopes[name]
        assert_projector(projector, expected, f"rec_grad_{name}")
        found = {"projector": norm(projector), "llm_lora": norm(adapters["llm"]), "dit_lora": norm(adapters["dit"])}
        for part, recorded in uae.expected["rec_grad_norms"][name].items():
            np.testing.assert_allclose(found[part], recorded, rtol=1e-2, err_msg=f"{name} {part}")


def test_golden_captioner_grpo(uae):
    """Four captions of one picture: log-probabilities of policy and reference, KL, advantages, loss and gradients; said
    by the policy itself, and by an older one."""
    from gvu_jax import objectives
    expected, umm, told = uae.arrays("captioner_grpo"), uae.umm, uae.expected["captioner_grpo"]
    policy_of, start = parts_of(uae)
    mask = expected["completion_mask"].astype(bool)
    P = len(expected["prompt_ids"])
    before = expected["prompt_ids"][:np.flatnonzero(expected["prompt_ids"] == umm._id(family.PICTURE))[0]]
    grid = tuple(int(n) for n in expected["image_grid_thw"][0, 1:])
    prompts = umm.encode_prompts(told["captions"], end=True)
    L = mask.shape[1]
    np.testing.assert_array_equal(prompts.words[:, :L][mask], expected["input_ids"][:, P:][mask])
    rows = lambda x: np.repeat(np.asarray(x)[None], len(mask), axis=0)
    prompts = prompts.replace(question=rows(before).astype(np.int32), question_mask=rows(np.ones(len(before), bool)),
                              words=prompts.words[:, :L], words_mask=prompts.words_mask[:, :L])
    np.testing.assert_array_equal(prompts.words_mask, mask)

    def logps_of(policy):
        cells = family.qwen25_vl.VisionTower(umm.vision).apply(
            {"params": policy["vision"]}, expected["pixel_values"][None], grid)
        seen = family.Seen(cells, tuple(n // umm.vision.spatial_merge_size for n in grid))
        return umm.text_logps(policy, seen, prompts)[0]
    reference = jax.jit(logps_of)({part: x for part, x in uae.policy.items() if part != "adapter"})
    np.testing.assert_allclose(np.where(mask, reference, 0), expected["ref_logps"], atol=2e-4)
    advantages = objectives.group_advantages(jnp.asarray(expected["rewards"]), len(mask), 1e-4)
    np.testing.assert_allclose(advantages, expected["advantages"], atol=2e-5)

    def loss(llm):
        logps = logps_of(policy_of(start[0] | {"llm": llm}, *start[1:]))
        values = {name: objectives.clipped_policy_loss(
            logps, old, reference, advantages, told["epsilon"], told["beta"], mask)[0]
            for name, old in (("onpolicy", jax.lax.stop_gradient(logps)), ("offpolicy", expected["old_logps"]))}
        return values, (values, logps)
    slopes, (values, logps) = jax.jit(jax.jacrev(loss, has_aux=True))(start[0]["llm"])
    np.testing.assert_allclose(np.where(mask, logps, 0), expected["policy_logps"], atol=2e-4)
    np.testing.assert_allclose(np.where(mask, objectives.k3(logps, reference), 0), expected["per_token_kl"],
                               rtol=2e-3, atol=2e-5)
    for name, slope in slopes.items():
        np.testing.assert_allclose(values[name], expected[f"loss_{name}"], atol=2e-5)
        np.testing.assert_allclose(norm(slope), told[f"lora_grad_norm_{name}"], rtol=2e-3)
        slope = lora.to_peft(slope, family.qwen25_vl.RULES["published"])
        names = [key for key in expected if key.startswith(f"grad_{name}/")]
        for key in names:
            found = slope[key.removeprefix(f"grad_{name}/model.").replace(".default.", ".").replace(
                "base_model.model.layers", "base_model.model.model.layers")]
            np.testing.assert_allclose(found, expected[key], rtol=0, atol=2e-3 * np.abs(expected[key]).max())
        assert names


# ------------------------------------------------------------------ folders

def test_the_folders_come_back_byte_for_byte(uae, tmp_path):
    convert.export_hf(uae.model, tmp_path / "back")
    for name, folder in {"llm": uae.where("llm"), "dit": uae.where("dit"), "SD3/vae": uae.where("SD3") / "vae",
                         "SD3/scheduler": uae.where("SD3") / "scheduler", "llm_processor": uae.where("llm_processor")
                         }.items():
        for file in folder.iterdir():
            if file.is_file() and (name != "llm_processor" or file.suffix != ".safetensors"):
                assert (tmp_path / "back" / name / file.name).read_bytes() == file.read_bytes(), file


def test_an_adapter_that_does_not_fit_is_refused(uae, tmp_path):
    from safetensors.numpy import save_file
    save_file({"model.base_model.model.layers.0.self_attn.x_proj.weight": np.zeros((2, 2), np.float32)},
              tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"unknown keys \['model.layers.0.self_attn.x_proj.weight'\]"):
        family.read_adapters(uae.umm, tmp_path)


def test_a_tied_head_is_the_table_of_words(uae, tmp_path):
    """Under whichever of its two names the files of the captioner hold it."""
    from safetensors.numpy import save_file
    umm = dataclasses.replace(uae.umm, ar=dataclasses.replace(uae.umm.ar, tie_word_embeddings=True))
    table = np.random.default_rng(0).random((umm.ar.vocab_size, umm.ar.hidden_size), np.float32)
    save_file({"lm_head.weight": table}, tmp_path / "model-00001-of-00001.safetensors")
    (place, laid), = family.read_adapters(umm, tmp_path)[0].items()
    assert place == ("ar/llm/lm_embed_tokens/embedding", None)
    np.testing.assert_array_equal(laid, table)


def patch_of(uae):
    """The smallest picture that the drawer draws, in pixels of a side."""
    return uae.umm.dit.patch_size * uae.umm.vae.downscale


def edited(src, dst, change, file="config.json"):
    dst.mkdir()
    for path in src.iterdir():
        if path.is_file():
            (dst / path.name).write_bytes(path.read_bytes())
    told = json.loads((dst / file).read_text())
    change(told)
    (dst / file).write_text(json.dumps(told))
    return dst


@pytest.mark.parametrize("which, file, change, said", [
    ("llm", "config.json", lambda c: c.update(rope_scaling=None), "mrope_section"),
    ("llm", "config.json", lambda c: c.update(num_hidden_layers=c["num_hidden_layers"] + 1), "missing keys .'model"),
    ("llm", "config.json", lambda c: c.update(use_sliding_window=True), "use_sliding_window"),
    ("llm", "config.json", lambda c: c.update(model_type="qwen3_vl"), "implemented is"),
    ("dit", "config.json", lambda c: c.update(qk_norm=None), "qk_norm"),
    ("dit", "config.json", lambda c: c.update(dual_attention_layers=[] if c["dual_attention_layers"] else [0]),
     "keys .*attn2"),
    ("dit", "config.json", lambda c: c.update(joint_attention_dim=7), "context_embedder|projector and drawer"),
    ("llm_processor", "preprocessor_config.json", lambda c: c.update(image_std=[1, 1, 1]), "image_std")])
def test_folders_that_are_not_implemented_are_refused(uae, tmp_path, which, file, change, said):
    folders = {name: uae.where(name) for name in ("llm", "dit", "llm_processor")}
    folders[which] = edited(folders[which], tmp_path / which, change, file)
    with pytest.raises((ValueError, OSError), match=said):
        convert.convert(folders["llm"], tmp_path / "model", sd3=uae.where("SD3"), dit=folders["dit"],
                        processor=folders["llm_processor"], image_size=patch_of(uae))
    assert not (tmp_path / "model").exists()


def test_folders_that_are_not_there_are_named(uae, tmp_path):
    src = edited(uae.where("llm"), tmp_path / "llm", lambda c: None)
    with pytest.raises(FileNotFoundError, match="no Stable Diffusion 3.5 folder .*--sd3"):
        convert.convert(src, tmp_path / "model")
    wrong = patch_of(uae) + 1
    with pytest.raises(ValueError, match=f"--image_size={wrong}: it must be a multiple of"):
        convert.convert(uae.where("llm"), tmp_path / "model", image_size=wrong, sd3=uae.where("SD3"),
                        processor=uae.where("llm_processor"))


# ------------------------------------------------------------------ training

def smallest(config, uae, folder):
    """The config with every budget cut to what a test can pay, on the golden model."""
    texts = "\n".join(json.dumps({"prompt": text}) for text in uae.texts)
    (folder / "prompts.jsonl").write_text(texts)
    config.data.update(prompts=str(folder / "prompts.jsonl"), held_out=str(folder / "prompts.jsonl"))
    config.model.checkpoint, config.model.override.grid = str(uae.model), list(uae.umm.grid)
    config.mesh.update(fsdp=1, tensor=1)
    config.sampling.flow.update(steps=3)
    config.lora.update(rank=2, alpha=2)
    config.update(steps=3, eval=dict(every=3, batches=1), checkpoint_every=3)
    return config


def losses(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    return lines


def moved(run):
    """Which halves of the adapter a run has moved."""
    adapter = gvu_jax.load(run).params["adapter"]
    return {half for half, tree in adapter.items() if any(np.abs(leaf).max() > 0 for path, leaf in
            traverse_util.flatten_dict(tree).items() if path[-1] == "b")}


def test_the_three_stages_of_uae(uae, tmp_path):
    """Cold start by reconstruction, captions, drawings: a step each; and the adapter of both halves, written for peft and read back."""
    config = smallest(load_config("uae_sd35"), uae, tmp_path)
    texts = [text[:12] for text in uae.expected["captioner_grpo"]["captions"][:2]]
    config.uae.update(prompts=1, group=2, cold=1, pairs=2, stages="caption:1,draw:1", micro_batches=1,
                      reconstruct="rescaled", scorers=f"own=0.5,{small(tmp_path / 'dino')}=0.5",
                      words=uae.umm.lengths(texts, end=True).words)
    config.pictures.update(folder=str(tmp_path / "pictures"), held_out=str(tmp_path / "pictures"))
    (tmp_path / "pictures").mkdir()
    for i, text in enumerate(texts):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)).save(
            tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(text)
    train(config, tmp_path / "run")
    cold, caption, draw = losses(tmp_path / "run")
    np.testing.assert_allclose(cold["loss"], 1 - (cold["cold/similarity"] + cold["cold/dinov3"]) / 2, rtol=1e-5)
    assert cold["grad_norm"] > 0 and "caption/length" in caption and "approx_kl" in draw
    assert draw["logp_gap"] < 0.2 and draw["ratio_max"] == 1 and draw["kl"] >= 0
    assert moved(tmp_path / "run") == {"llm", "dit"}
    convert.export_peft(tmp_path / "run", tmp_path / "adapter")
    model = gvu_jax.load(tmp_path / "run")
    adapter, scale = adapters.read_peft(tmp_path / "adapter", model.umm)
    jax.tree.map(np.testing.assert_array_equal, lora.scaled(adapter, scale), jax.device_get(model.params["adapter"]))


def test_gvu_through_the_interface(uae, tmp_path):
    """The captioner's probabilities teach the drawer: Flow-GRPO on the words' geometric mean, several steps a batch."""
    config = smallest(load_config("uae_sd35", "gvu"), uae, tmp_path)
    config.gvu.update(prompts=2, group=2, micro_batches=2, inner_steps=2)
    config.flow.update(ratio="guard")
    train(config, tmp_path / "run")
    lines = losses(tmp_path / "run")
    assert all(line["logp_gap"] < 0.2 and line["reward/mean"] > 0 for line in lines)
    assert moved(tmp_path / "run") == {"dit"}


def gap_config(uae, folder, objective):
    config = smallest(load_config("uae_sd35_gap", objective), uae, folder)
    config.internal_gap.update(prompts=2, pool=2, group=2, batch=2, micro_batches=1, threshold=1e-6)
    return config


def test_internal_gap_through_the_interface(uae, tmp_path):
    """Own pictures that the captioner accepts, learned by flow matching."""
    config = gap_config(uae, tmp_path, "sft")
    train(config, tmp_path / "run")
    losses(tmp_path / "run")
    assert moved(tmp_path / "run") == {"dit"}
    config.sampling.flow.update(noise=0.7)
    with pytest.raises(ValueError, match="learns from whole pictures"):
        train(config, tmp_path / "noisy")


def test_pairs_meet_the_same_noise(uae, tmp_path):
    """Of DPO: before the first step policy and base agree on both pictures of a pair, and the margin is exactly 0."""
    from gvu_jax.methods.internal_gap import Batch, InternalGap
    config, umm = gap_config(uae, tmp_path, "dpo"), uae.umm
    config.internal_gap.draws = 1
    how = How(flow=flow.Flow(2))
    method = InternalGap(umm, config, how, None, sharding.make_mesh({}, jax.devices()[:1]))
    shapes, rng = umm.drawn_shapes(2, how), np.random.default_rng(0)
    pictures = [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes) for _ in range(2)]
    prompts = umm.encode_prompts(uae.texts)
    trainable = {"adapter": lora.init(jax.random.key(0), uae.base["ar"], 2, config.lora.targets)}

    def loss(trainable, key):
        value, (metrics, _) = method.loss(trainable, uae.base, Batch(
            prompts, None, *pictures, jnp.zeros(2), jnp.ones(2, bool)), key)
        return value, metrics
    (value, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, jax.random.key(0))
    draw, = jax.random.split(jax.random.key(0), config.internal_gap.draws)
    nll = jax.jit(umm.image_nll)(uae.base, prompts, pictures[0].final, draw)
    assert metrics["margin"] == 0 and norm(slope) > 0
    np.testing.assert_allclose(value, np.log(2) + config.internal_gap.nll * nll.mean(), rtol=1e-4)


@pytest.mark.parametrize("changes, said", [
    ({"sampling.flow.noise": 0.0}, "learns from noisy steps alone"), ({"flow.ratio": "x"}, "flow.ratio is 'x'"),
    ({"flow.spread": "x"}, "flow.spread is 'x'"), ({"sampling.flow.kind": "x"}, "flow.kind is 'x'"),
    ({"flow.clip": 0.0}, "flow.clip 0.0 must be above 0"), ({"sampling.flow.window": 9}, "do not fit between")])
def test_a_mistake_ends_in_one_line(uae, tmp_path, changes, said):
    config = smallest(load_config("uae_sd35", "gvu"), uae, tmp_path)
    config.gvu.update(prompts=2, group=2, micro_batches=1)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path / "run")


def test_a_flow_needs_its_section(uae, tmp_path):
    config = smallest(load_config("uae_sd35", "gvu"), uae, tmp_path)
    config.gvu.update(prompts=2, group=2, micro_batches=1)
    del config.flow
    with pytest.raises(ValueError, match="draws by a flow: its config needs a section `flow`"):
        train(config, tmp_path / "run")


# ------------------------------------------------------------------ full size

@pytest.mark.parametrize("size, billions", [("large", 8.057), ("medium", 2.243)])
def test_full_size(size, billions):
    """3.75 + 8.06 billion parameters and the VAE; every key of the published folders has its place; and each call of
    the interface has the right shapes."""
    umm = family.published({}, size)
    shapes = checkpoint.shapes(umm)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    llm, dit = shapes["ar"]["llm"], shapes["ar"]["dit"]
    projector = 2048 * 8192 + 8192 + 8192 * 4096 + 4096
    assert count(llm["projector"]) == projector
    assert round((count(llm) - projector + count(shapes["vision"])) / 1e9, 3) == 3.755
    assert round((count(dit) - count(dit["pos_embed"])) / 1e9, 3) == billions
    assert round(count(shapes["vae"]) / 1e6, 1) == 83.8
    empty = jax.tree.map(lambda leaf: np.broadcast_to(jnp.bfloat16(0), leaf.shape), shapes)
    for layout in family.qwen25_vl.RULES:
        umm = dataclasses.replace(umm, layout=layout)
        found = {}
        for part, (tree, rules, _) in umm.published_parts(shapes, {"": {}}).items():
            trees = {"": {"ar": {"llm": empty["ar"]["llm"]}, "vision": empty["vision"]}, "ar/dit": empty["ar"]["dit"],
                     "vae": empty["vae"]}
            found[part] = {name: Spec(array.dtype, array.shape, 0)
                           for name, array in torch_keys.to_torch(trees[part], rules).items()}
        planned = convert.plan(umm, {part: {name: spec.shape for name, spec in of.items()}
                                     for part, of in found.items()})
        leaves = convert.leaves(planned, found)
        assert sum(np.prod(shape) for shape, _, _ in leaves.values()) == count(shapes)

    sharding.place(umm.partition, shapes, sharding.make_mesh("fsdp:4,tensor:2"))
    prompts, how = umm.prompt_shapes(2, 60, 32), How(guidance=4.5, flow=flow.Flow(10, 0.7))
    logps = jax.eval_shape(functools.partial(umm.image_logps, how=how), shapes, prompts, umm.drawn_shapes(2, how))
    assert logps.shape == (2, 9)
    seen = jax.eval_shape(umm.see, shapes, jax.ShapeDtypeStruct((2, *umm.picture_size, 3), jnp.float32))
    assert seen.grid == (9, 9) and seen.cells.shape == (2, 81, 2048)
    assert jax.eval_shape(umm.text_logps, shapes, seen, prompts)[0].shape == (2, 32)
    pixels = jax.eval_shape(umm.render, shapes, umm.drawn_shapes(2), prompts, jax.random.key(0))
    assert pixels.shape == (2, 1024, 1024, 3)


@pytest.mark.parametrize("name, preset", [("shapes", "sd35"), ("shapes_gap", "sft-sd35"), ("shapes_uae", "sd35")])
def test_the_tiny_pairs_preset_moves_the_drawer_alone(key, name, preset):
    """So that the captioner reads what it read, bit for bit, and has no need of an anchor; but by UAE both learn."""
    config = load_config(name, preset)
    umm = families.tiny_of(config).tiny(config)
    base = jax.eval_shape(umm.init, key)
    moved = jax.eval_shape(lambda base: policy.init_trainable(umm, base, config, key), base)
    assert set(moved) == {"adapter"} and jax.tree.leaves(moved)
    assert set(moved["adapter"]) == ({"dit"} if name != "shapes_uae" else {"dit", "llm"})
    assert config[config.method].get("anchor", 0) == 0
