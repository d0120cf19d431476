"""The filters against transformers' own, and against the golden distributions."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.sampling import How, filter_logits


def theirs(logits, how):
    import torch
    from transformers.generation import logits_process as p
    scores = torch.from_numpy(logits.copy())
    if how.suppress:
        scores[..., list(how.suppress)] = -torch.inf
    chain = [p.TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    chain += [p.TopKLogitsWarper(how.top_k)] if how.top_k else []
    chain += [p.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    chain += [p.MinPLogitsWarper(how.min_p)] if how.min_p else []
    for warp in chain:
        scores = warp(None, scores)
    return scores.numpy()


@pytest.mark.parametrize("how", [
    How(), How(temperature=0.7), How(top_k=3), How(top_p=0.6), How(min_p=0.2), How(suppress=(0, 5)),
    How(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05, suppress=(2,)), How(temperature=3.0, top_k=50, min_p=1e-4)],
    ids=str)
def test_filters_equal_those_of_transformers(how):
    logits = np.random.default_rng(0).standard_normal((64, 17)).astype(np.float32) * 2
    ours, expected = np.asarray(filter_logits(jnp.asarray(logits), how)), theirs(logits, how)
    assert (np.isinf(ours) == np.isinf(expected)).all()
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_ties_at_the_kth_value_all_stay():
    assert np.isfinite(filter_logits(jnp.array([[1.0, 2.0, 2.0, 0.0]]), How(top_k=1))).sum() == 2


def test_golden_distributions(fixtures):
    folder = fixtures / "xomni" / "expected"
    golden, settings = np.load(folder / "sampling.npz"), json.loads((folder / "sampling.json").read_text())
    suppress = tuple(np.load(folder / "generate.npz")["suppress_tokens"].tolist())
    for i, s in enumerate(settings):
        how = How(temperature=s["temperature"], top_k=s["top_k_effective"], top_p=s["top_p"], min_p=s["min_p"],
                  guidance=s["guidance_scale"], suppress=suppress)
        ours = np.asarray(filter_logits(jnp.asarray(golden["cond_logits"]), how, jnp.asarray(golden["uncond_logits"])))
        expected = golden[f"processed_{i}"]
        assert (np.isinf(ours) == np.isinf(expected)).all(), f"setting {i}"
        kept = np.isfinite(expected)
        np.testing.assert_allclose(ours[kept], expected[kept], atol=2e-4)


@pytest.mark.parametrize("bad", [dict(top_p=0.0), dict(min_p=2.0), dict(temperature=-1.0), dict(images_per_prompt=0)])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError):
        How(**bad)
