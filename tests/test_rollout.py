"""Rollouts in int8: the rounding against numpy, and the rounded sampler against the model that it stands for."""
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conftest import one_device, tiny_config
from gvu_jax import families, lora, objectives, rollout
from gvu_jax.methods import UAE, grpo
from gvu_jax.models import qwen2
from gvu_jax.models.layers import to_int8
from gvu_jax.sampling import How
from gvu_jax.train import build_suite, train
from gvu_jax.umm import check_rollout, compile_programs, in_use
from test_uae import uae_config

TEXTS = ["a photo of a red circle", "an image of two squares"]


def kernel(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_rounding_against_numpy():
    W = kernel(3, 8, 5) * np.array([1e-3, 1, 30, 1, 1], np.float32)
    W[1, :, 3] = 0
    q, step = jax.tree.map(np.asarray, to_int8(jnp.asarray(W), 1))
    greatest = np.abs(W).max(axis=1, keepdims=True)
    assert q.dtype == np.int8 and step.dtype == np.float32 and step.shape == (3, 1, 5)
    np.testing.assert_allclose(step[greatest > 0], greatest[greatest > 0] / 127, rtol=1e-6)
    np.testing.assert_array_equal(q, np.rint(W / step))
    assert (np.abs(q).max(axis=1) == np.where(greatest[:, 0] > 0, 127, 0)).all()
    assert (np.abs(q * step - W) <= step * 0.5001).all()


def test_of_a_tree_the_kernels_are_rounded_and_nothing_else():
    tree = {"layer": {"proj": {"kernel": kernel(2, 4, 3), "bias": kernel(2, 3)}, "norm": {"scale": kernel(2, 4)}},
            "conv": {"kernel": kernel(3, 3, 2, 2)}, "table": {"embedding": kernel(6, 4)}}
    flat, rounded = (traverse_util.flatten_dict(t, sep="/") for t in (tree, rollout.rounded(tree)))
    assert rounded.keys() - flat.keys() == {"layer/proj/step"}
    assert [path for path in flat if rounded[path] is not flat[path]] == ["layer/proj/kernel"]


def dequantised(params):
    """Params whose backbone has, in float32, what int8 makes of its kernels."""
    flat = traverse_util.flatten_dict(rollout.rounded(params["ar"]))
    whole = {path: np.float32(x) * flat[path[:-1] + ("step",)] if x.dtype == np.int8 else x for path, x in flat.items()}
    return params | {"ar": traverse_util.unflatten_dict({path: x for path, x in whole.items() if path[-1] != "step"})}


@pytest.mark.parametrize("guidance, adapted", [(1.0, True), (3.0, False)])
def test_what_draws_is_the_model_of_the_rounded_weights(each, key, guidance, adapted):
    """To the last token, and its log-probs are that model's in one forward, while the policy's own differ. The adapter
    is not rounded."""
    config, umm, params = each
    how = How(images_per_prompt=2, guidance=guidance, weights="int8")
    if hasattr(umm, "image_moves"):
        with pytest.raises(ValueError, match="rollout.weights"):
            compile_programs(umm, how, one_device())
        return
    if adapted:
        adapter = lora.init(key, params["ar"], 4, "_proj|fc")
        params = params | {"adapter": jax.tree.map(lambda x: x + 0.05, adapter)}
    prompts, other = umm.encode_prompts(TEXTS), dequantised(params)
    draw = jax.jit(lambda params, how: umm.sample_image(params, prompts, key, how), static_argnames="how")
    drawn, logps = draw(params, how)
    expected, expected_logps = draw(other, dataclasses.replace(how, weights="full"))
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    np.testing.assert_allclose(logps, expected_logps, atol=1e-4)
    forward = jax.jit(lambda params: umm.image_logps(params, prompts.repeat(2), drawn, how))
    np.testing.assert_allclose(logps, forward(other), atol=1e-4)
    assert 1e-4 < np.abs(logps - forward(params)).mean() < 0.2


def test_words_are_drawn_by_the_rounded_weights_too(tiny, key):
    _, umm, params = tiny
    prompts, seen = umm.encode_prompts(TEXTS), jnp.zeros((2, *umm.grid), jnp.int32)
    say = jax.jit(lambda params, how: umm.sample_text(params, seen, prompts, key, how, 3), static_argnames="how")
    for ours, theirs in zip(say(params, How(weights="int8")), say(dequantised(params), How())):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def put_rounded(monkeypatch):
    """The plain cache keeps, in its own dtype, what the int8 one would give back."""
    plain = qwen2.Cache.write

    def write(self, layer, at, k, v):
        rounded = [(q * step).astype(x.dtype) for x in (k, v) for q, step in [to_int8(x, -1)]]
        return plain(self, layer, at, *rounded)
    monkeypatch.setattr(qwen2.Cache, "write", write)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_cache_in_int8_gives_back_rounded_keys_and_values(tiny, key, monkeypatch, guidance):
    _, umm, params = tiny
    prompts, how = umm.encode_prompts(TEXTS), How(images_per_prompt=2, guidance=guidance, cache="int8")
    draw = lambda how: jax.jit(lambda params: umm.sample_image(params, prompts, key, how))(params)
    (drawn, logps), (_, exact) = draw(how), draw(in_use(umm, how))
    put_rounded(monkeypatch)
    expected, expected_logps = draw(in_use(umm, how))
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_allclose(logps, expected_logps, atol=1e-4)
    assert 1e-5 < np.abs(logps - exact).mean() < 0.2


def test_in_full_there_is_no_int8_in_the_program(tiny, key):
    _, umm, params = tiny
    prompts = umm.encode_prompts(TEXTS)
    texts = [jax.jit(lambda params: umm.sample_image(params, prompts, key, how)).lower(params).as_text()
             for how in (How(), How(weights="int8"), How(cache="int8"))]
    assert ["xi8>" in text for text in texts] == [False, True, True]


# ------------------------------------------------------------------ what an update makes of it

def test_importance_weights_against_numpy():
    rng = np.random.default_rng(0)
    old, sampler = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2))
    w = np.minimum(np.exp(old - sampler), 2.0)
    assert (w == 2).any() and (w < 1).any()
    np.testing.assert_allclose(objectives.importance(old, sampler, 2.0), w, rtol=1e-6)
    assert not jax.grad(lambda old: objectives.importance(old, sampler, 2.0).sum())(old).any()

    logps, ref, A = old + 0.3 * rng.standard_normal((4, 6)), old - 0.1, rng.standard_normal(4)
    ratio, d = np.exp(logps - old), ref - logps
    gain = w * np.minimum(ratio * A[:, None], np.clip(ratio, 0.8, 1.2) * A[:, None]) - 0.03 * (np.exp(d) - d - 1)
    loss, _ = objectives.clipped_policy_loss(logps, old, ref, A, 0.2, 0.03, weights=w)
    np.testing.assert_allclose(loss, -gain.mean(), rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_tokens_count_by_the_policy_at_the_start_of_the_step_against_the_sampler(first):
    rng = np.random.default_rng(0)
    logps, old, ref, sampler = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(4))
    A, mask, settings = rng.standard_normal(4), np.arange(6) < np.array([[6], [3], [1], [5]]), SimpleNamespace(
        clip=0.2, beta=0.03)
    value, (told, _) = grpo.loss(
        logps, grpo.Batch(None, ref, A, np.where(mask, sampler, 0)), old, first, policy_of=lambda policy: policy,
        logps_of=lambda policy, rows: (policy, mask), settings=settings, truncate=1.5)
    old = logps if first else old
    w = np.minimum(np.exp(old - sampler), 1.5)
    expected, _ = objectives.clipped_policy_loss(logps, old, ref, A, 0.2, 0.03, mask, w)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(told["truncated"], np.mean(((w == 1.5) & mask).sum(1) / mask.sum(1)), rtol=1e-5)


@pytest.mark.parametrize("bad, word", [
    (dict(weights="int4"), "rollout.weights"), (dict(cache="half"), "rollout.cache"),
    (dict(truncate=-1.0), "rollout.truncate"), (dict(truncate=0.5), "rollout.truncate"),
    (dict(truncate=float("nan")), "rollout.truncate"),
    (dict(weights="int8", guidance=5.0, logps="conditional"), "sampling.logps")])
def test_settings_that_mean_nothing_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        How(**bad)


@pytest.mark.parametrize("family, how, word", [
    ("qwen_sd35", How(weights="int8"), "by a flow"), ("qwen_sd35", How(cache="int8"), "rollout.cache"),
    ("showo", How(cache="int8"), "token by token")])
def test_what_a_family_cannot_round_is_refused_before_anything_is_made(family, how, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        check_rollout(families.of({"family": family}).MODEL, how)
    config = tiny_config(family=family)
    config.rollout = dict(weights=how.weights, cache=how.cache, truncate=2.0)
    with pytest.raises(ValueError, match=word):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_estimates_correct_nothing(tiny_showo):
    _, umm, params = tiny_showo
    umm = dataclasses.replace(umm, estimates=2)
    with pytest.raises(ValueError, match="rollout.truncate = 0, or model.override.estimates"):
        jax.eval_shape(lambda drawn: umm.image_logps(params, umm.encode_prompts(TEXTS), drawn, How(weights="int8")),
                       umm.drawn_shapes(2))


def test_evaluations_are_drawn_by_the_policy_itself(tiny, split):
    """Those of prompts and those of captions, whatever draws in training; and each update knows who has drawn."""
    config, umm = tiny[0].copy_and_resolve_references(), tiny[1]
    metas, mesh = split[1], one_device()
    lengths = umm.lengths([meta["prompt"] for meta in metas])
    how = How(images_per_prompt=config.gvu.group, weights="int8", cache="int8")
    for eval_group in (config.gvu.group, 2 * config.gvu.group):
        config.eval.group = eval_group
        programs = compile_programs(umm, how, mesh, 1)
        suite = build_suite(config, umm, programs, how, metas, lengths)
        assert suite.programs.sample is compile_programs(
            umm, dataclasses.replace(in_use(umm, how), images_per_prompt=eval_group), mesh, 1
        ).sample is not programs.sample
    for drawn_by in (how, in_use(umm, how)):
        method = UAE(umm, uae_config(), drawn_by, None, mesh)
        assert method.plain.groups is compile_programs(umm, in_use(umm, how), mesh, 1, method.loop.words)
        assert (method.plain is method.loop) == (drawn_by == in_use(umm, how))
        assert method.how.correction == (2 if drawn_by == how else 0)


def test_only_rounded_rollouts_are_corrected():
    assert How().correction == How(weights="int8", truncate=0).correction == 0
    assert How(weights="int8").correction == How(cache="int8").correction == 2


def test_in_use_a_flow_takes_all_of_its_own_steps_without_noise(each):
    """To other families the section means nothing, and what they train by is what they are used by."""
    umm, flow = each[1], {"steps": 3, "noise": 0.7, "window": 2}
    how, by_flow = How(weights="int8", cache="int8", guidance=2.0, flow=flow), each[0].family == "qwen_sd35"
    assert in_use(umm, how) == How(guidance=2.0, flow=None if by_flow else flow)
    if by_flow:
        umm, params, key = each[1], each[2], jax.random.key(0)
        drawn, logps = umm.sample_image(params, umm.encode_prompts(TEXTS), key, in_use(umm, How(flow=flow)))
        assert logps.shape == (2, 0) and umm.flow.steps > 3
        own, _ = umm.sample_image(params, umm.encode_prompts(TEXTS), key, How(flow={"steps": umm.flow.steps}))
        np.testing.assert_array_equal(drawn.final, own.final)
