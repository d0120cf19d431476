"""The published model as one piece: the golden checkpoint converted, then driven through the interface of GvU."""
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import load_file

import gvu_jax
from conftest import assert_same_picture, least_size, load_config, one_device
from gvu_jax import adapters, checkpoint, lora, objectives, rewards, sharding
from gvu_jax.methods import grpo
from gvu_jax.models import flux, torch_keys, vae, xomni
from gvu_jax.metrics import read_metrics
from gvu_jax.policy import policy_params
from gvu_jax.sampling import How
from gvu_jax.train import train

CASES = ("full", "lora", "lora_all")


@pytest.fixture(scope="module")
def model(fixtures, converted):
    """(umm, params), drawing the grid and putting the question of the GRPO cases."""
    umm, params = checkpoint.load_model(converted, one_device())
    told = json.loads((fixtures / "grpo/config.json").read_text())
    return dataclasses.replace(umm, grid=grid_of(told), instruction=told["instruction"]), params


def recorded(fixtures, case):
    return np.load(fixtures / "grpo" / f"{case}.npz"), json.loads((fixtures / "grpo/config.json").read_text())


def trainable_of(fixtures, case, umm):
    """(what is trained, lora settings) of a golden case."""
    if case == "full":
        return {"ar": xomni.from_torch(load_file(fixtures / "grpo/policy/model.safetensors"), umm.ar)}, None
    adapter, scale = adapters.read_peft(fixtures / "grpo" / f"{case}_adapter", umm)
    rank = jax.tree.leaves(adapter["layers"])[0].shape[-1]
    return {"adapter": adapter}, ConfigDict(dict(rank=rank, alpha=scale * rank, targets="."))


def grid_of(config):
    return tuple(map(int, re.search(r"(\d+) (\d+)", config["image_prefix"]).groups()))


def test_rewards_of_the_golden_cases(fixtures, model):
    umm, params = model
    cases = json.loads((fixtures / "reward/cases.json").read_text())
    golden, read = np.load(fixtures / "reward/expected.npz"), jax.jit(umm.text_logps)
    lengths = umm.lengths([case["prompt"] for case in cases])
    for i, case in enumerate(cases):
        seen = jnp.array(case["image_tokens"]).reshape(1, *case["grid"])
        prompts = umm.encode_prompts([case["prompt"]], lengths)
        asked, _ = umm._asked(seen, prompts)
        assert asked[0].tolist() == case["context_ids"]
        assert prompts.words[0][prompts.words_mask[0]].tolist() == case["target_ids"]
        logps, mask = read(params, seen, prompts)
        n = int(golden["token_count"][i])
        np.testing.assert_allclose(logps[mask], golden["token_logprobs"][i, :n], atol=2e-4)
        np.testing.assert_allclose(rewards.geometric_mean(logps, mask), [case["score"]], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_loss_and_gradients_of_grpo(fixtures, model, case):
    umm, base = model
    golden, config = recorded(fixtures, case)
    group = config["num_generations"]
    trainable, lora_config = trainable_of(fixtures, case, umm)
    prompts = umm.encode_prompts([prompt for prompt in config["prompts"] for _ in range(group)])
    P = prompts.tokens.shape[1]
    real = np.asarray(golden["attention_mask"])[:, :golden["prompt_ids"].shape[1]].astype(bool)
    for row, mask, ids, ours in zip(golden["prompt_ids"], real, prompts.tokens, prompts.mask):
        assert row[mask].tolist() == ids[ours].tolist() and ids.shape == (P,)

    settings = ConfigDict(dict(
        gvu=dict(prompts=len(config["prompts"]), group=group, clip=0.2, beta=config["beta"], anchor=0.0,
                 advantage_eps=config["advantage_eps"], inner_steps=1, micro_batches=1, waves=1),
        lora=dict(rank=0)))
    settings.lora = lora_config or settings.lora
    tokens = jnp.asarray(golden["completion_image_tokens"], jnp.int32)
    ref_logps = jax.jit(umm.image_logps)(base, prompts, tokens)
    np.testing.assert_allclose(ref_logps, golden["ref_logps"], atol=2e-4)
    how = How(images_per_prompt=group)
    advantages = objectives.group_advantages(golden["rewards"], group, config["advantage_eps"])
    batch = grpo.Batch((prompts, tokens), ref_logps, advantages)
    loss = functools.partial(
        grpo.loss, policy_of=functools.partial(policy_params, base, lora_config=settings.lora),
        logps_of=lambda params, rows: (umm.image_logps(params, *rows, how), None), settings=settings.gvu)
    grads, (metrics, logps) = jax.jit(jax.grad(loss, has_aux=True))(trainable, batch, jnp.zeros_like(ref_logps), True)
    np.testing.assert_allclose(logps, golden["policy_logps"], atol=2e-4)
    np.testing.assert_allclose(metrics["loss"], golden["loss"], rtol=1e-3)

    named = by_torch_name(grads, umm)
    norms = json.loads((fixtures / "grpo" / f"{case}_grad_norms.json").read_text())
    total, norms = norms["total"], norms["per_parameter"]
    np.testing.assert_allclose(np.sqrt(sum((g ** 2).sum() for g in named.values())), total, rtol=2e-3)
    assert set(norms) <= set(named)
    for name, norm in norms.items():
        if norm is None:
            assert not named[name].any(), name
        else:
            np.testing.assert_allclose(np.linalg.norm(named[name]), norm, rtol=2e-3, atol=1e-6 * total, err_msg=name)
    checked = [name for name in golden.files if name.startswith("grad/")]
    assert checked
    for name in checked:
        expected = golden[name]
        np.testing.assert_allclose(named[name.removeprefix("grad/")], expected, atol=2e-3 * np.abs(expected).max(),
                                   rtol=0, err_msg=name)


def by_torch_name(grads, umm):
    """Gradients under the names, and in the layout, of the golden data."""
    if "adapter" in grads:
        return lora.to_peft(grads["adapter"], xomni.rules(umm.ar))
    named = {}
    for path, leaf in traverse_util.flatten_dict(grads["ar"], sep="/").items():
        pattern, leaf = torch_keys.torch_name(path, xomni.rules(umm.ar)), np.asarray(leaf)
        rows = leaf if "{layer" in pattern else [leaf]
        for name, row in zip(torch_keys.layer_names(pattern, len(leaf)), rows):
            named[name] = row.T if path.endswith("kernel") else row
    return named


@pytest.mark.parametrize("case", CASES[:2])                      # lora_all has no pictures recorded
def test_rewards_of_the_decoded_pictures(fixtures, model, case):
    """Pixels -> tokens exactly, and their reward under the policy and with the adapter off."""
    umm, base = model
    golden, config = recorded(fixtures, case)
    trainable, lora_config = trainable_of(fixtures, case, umm)
    policy = policy_params(base, trainable, lora_config)
    prompts = umm.encode_prompts([p for p in config["prompts"] for _ in range(config["num_generations"])])
    seen = jax.jit(umm.see)(base, jnp.asarray(golden["decoded_images"], jnp.float32) / 255)
    np.testing.assert_array_equal(seen.reshape(len(seen), -1), golden["reencoded_image_tokens"])
    assert seen.shape[1:] == grid_of(config)
    score = lambda params: rewards.geometric_mean(*jax.jit(umm.text_logps)(params, seen, prompts))
    np.testing.assert_allclose(score(policy), golden["rewards"], rtol=1e-4)
    if case == "lora":
        np.testing.assert_allclose(score(base), golden["rewards_adapter_off"], rtol=1e-4)


def test_the_whole_picture_from_recorded_noise(fixtures, model):
    """Prompt -> T5, CLIP -> guided flow -> VAE -> the recorded bytes."""
    umm, params = model
    golden, call = np.load(fixtures / "flux/expected.npz"), json.loads((fixtures / "flux/expected.json").read_text())
    ids = umm._head_ids([call["prompt"], call["negative_prompt"]])
    np.testing.assert_array_equal(ids[0], np.concatenate([golden["t5_ids_prompt"], golden["t5_ids_empty"]]))
    np.testing.assert_array_equal(ids[1], np.concatenate([golden["clip_ids_prompt"], golden["clip_ids_empty"]]))
    context, pooled = jax.jit(umm._head_text)(params, *ids)
    np.testing.assert_allclose(context[:1], golden["t5_out_prompt"], atol=5e-4)
    np.testing.assert_allclose(pooled[:1], golden["clip_pooled_prompt"], atol=5e-4)
    grid = tuple(side // call["upscale_factor"] for side in (call["height"], call["width"]))

    def velocity(*inputs):
        return flux.FluxTransformer(umm.flux).apply({"params": params["flux"]}, *inputs, grid=grid)

    @jax.jit
    def draw(noise, siglip, context, pooled):
        packed = flux.sample(velocity, noise, siglip, context[:1], pooled[:1], call["num_inference_steps"],
                             call["true_cfg_scale"], (context[1:], pooled[1:]), umm.schedule)
        latents = vae.from_latents(flux.unpack(packed, grid), umm.vae)
        return vae.to_pixels(vae.module(umm.vae).apply({"params": params["vae"]}, latents, method="decode"))
    assert_same_picture(draw(golden["loop_init_latents"], golden["loop_siglip"], context, pooled)[0], golden)


def test_a_prompts_text_is_encoded_once_for_its_pictures(model, key):
    umm, params = model
    prompts = umm.encode_prompts(["a red cube", "two dogs"])
    tokens = jax.random.randint(key, (4, umm.image_tokens), 0, umm.ar.image_vocab_size)
    render = jax.jit(umm.render)
    shared = render(params, tokens, prompts, key)
    np.testing.assert_allclose(shared, render(params, tokens, prompts.repeat(2), key), atol=1.01 / 255)
    other = render(params, tokens, umm.encode_prompts(["a red cube", "a green bird"]), key)
    assert np.array_equal(shared[:2], other[:2]) and not np.array_equal(shared[2:], other[2:])


def test_the_facade_reads_pictures_of_any_size(fixtures, converted):
    model = gvu_jax.load(converted)
    side, wider = model.umm.transform.short_size, min(1.5, model.umm.transform.max_aspect_ratio)
    small = np.random.default_rng(0).integers(256, size=(side + 6, int((side + 6) * wider), 3)).astype(np.uint8)
    large = np.random.default_rng(1).integers(256, size=(int(2 * side * wider), 2 * side, 3)).astype(np.uint8)
    scores = model.score([small, large, small], ["a red cube"] * 3)
    assert scores[0].reward == pytest.approx(scores[2].reward, rel=1e-5) and scores[0].reward != scores[1].reward
    assert len(scores[0].tokens) == len(scores[0].token_probabilities) >= len(scores[0].words) == 3
    np.testing.assert_allclose(scores[0].reward, np.exp(np.log(scores[0].token_probabilities).mean()), rtol=1e-4)
    assert len(model.answer([small, large], "What is this?")) == 2


def test_convert_generate_and_score_from_the_command_line(fixtures, command, tmp_path, capsys):
    def run(module, *flags):
        assert command(module, *flags) is None
        return capsys.readouterr().out

    (tmp_path / "prompts.txt").write_text("a red cube\ntwo dogs\n")
    run("convert", f"--src={fixtures / 'xomni'}", f"--dst={tmp_path / 'model'}", f"--image_size={least_size(fixtures)}")
    run("generate", f"--checkpoint={tmp_path / 'model'}", f"--prompts={tmp_path / 'prompts.txt'}",
        f"--out={tmp_path / 'out'}", "--images_per_prompt=1")
    picture = tmp_path / "out/00000_0.png"
    assert picture.exists() and (tmp_path / "out/00001_0.png").exists()
    printed = run("score", f"--checkpoint={tmp_path / 'model'}", f"--image={picture}", "--prompt=a red cube",
                  f"--heatmap={tmp_path / 'heat.png'}")
    assert "reward" in printed and "cube" in printed and (tmp_path / "heat.png").exists()


def test_training_on_the_published_model(converted, tmp_path, capsys):
    """configs/xomni.py, cut to the golden checkpoint's size: two steps, an evaluation, and a model that loads."""
    config = load_config("xomni")
    lines = [{"prompt": "two dogs", "tag": "counting"}, {"prompt": "a red cube left of a ball", "tag": "position"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config.data.update(prompts=str(tmp_path / "prompts.jsonl"), held_out=str(tmp_path / "prompts.jsonl"))
    config.model.update(checkpoint=str(converted), override=dict(
        grid=checkpoint.read_metadata(converted).grid, diffusion_steps=2, instruction="Describe the image in detail."))
    config.gvu.update(prompts=2, group=2, micro_batches=2)
    config.mesh.update(fsdp=1, tensor=1)
    config.update(steps=2, eval=dict(every=2, batches=1))
    summary = train(config, tmp_path / "run")
    assert set(summary["before"]) == {"overall", "counting", "position"}
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(line["logp_gap"] < 1e-4 for line in lines if "loss" in line)
    model = gvu_jax.load(tmp_path / "run")
    assert model.umm.grid == config.model.override.grid and set(model.params) >= {"adapter", "t5", "clip"}
    assert (tmp_path / "run/report.html").stat().st_size > 0
    with config.unlocked():                        # drawn so small, its pictures would be enlarged to be read
        config.model.override.grid = tuple(side - 1 for side in model.umm.grid)
    with pytest.raises(ValueError, match="override.grid|refused"):
        train(config, tmp_path / "small")

    capsys.readouterr()                            # without pictures the backbone is all that is read
    with config.unlocked():
        config.model.override.grid, config.eval.pictures = model.umm.grid, False
    with pytest.raises(ValueError, match="no pictures, and this run learns from them .* does not.: "
                                         "set eval.pictures = True$"):
        train(config, tmp_path / "unseen")
    config.reward.view, config.steps = "tokens", 1
    summary = train(config, tmp_path / "unseen")
    assert set(summary["after"]) == {"overall", "counting", "position"}
    assert 0 <= summary["judgement_after"]["non_unification"] <= 1 and not list((tmp_path / "unseen/samples").iterdir())
    said = capsys.readouterr().out
    assert re.findall(r"(\w+): [\d,]+ parameters", said) == ["ar"] and "It made no pictures; this will" in said
    assert set(gvu_jax.load(tmp_path / "unseen").params) == set(model.params)


def test_eight_devices_draw_and_score_as_one_does(converted):
    """Parameters spread over devices: the same pictures up to a byte, the same reward up to rounding."""
    prompts, found = ["a red cube", "two dogs"], []
    for mesh in (one_device(), sharding.make_mesh("fsdp:8"), None):                # None: by its heads, then fsdp
        model = gvu_jax.load(converted, mesh)
        spread = [x for x in jax.tree.leaves(model.params) if not x.sharding.is_fully_replicated]
        assert bool(spread) == (mesh != one_device()) and model.mesh.size == (8 if spread else 1)
        side = model.umm.transform.short_size
        given = np.random.default_rng(0).integers(256, size=(2, side, side + 16, 3)).astype(np.uint8)
        found.append((model.generate(prompts, seed=3)[:, 0].astype(int),
                      [score.reward for score in model.score(given, prompts)]))
    for pictures, rewards_of in found[1:]:
        assert np.abs(found[0][0] - pictures).max() <= 1
        np.testing.assert_allclose(found[0][1], rewards_of, rtol=1e-4)
