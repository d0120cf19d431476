"""The filters against transformers' own, and against the golden distributions."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from gvu_jax.models.layers import beside, repeat
from gvu_jax.sampling import How, decode, filter_logits, stretches


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
    assert settings
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


# ------------------------------------------------------------------ drawing one token after the other

@pytest.mark.parametrize("steps, count", [(0, 1), (1, 1), (8, 1), (127, 1), (128, 2), (255, 3), (575, 4), (1295, 4)])
def test_stretches_are_all_steps_in_turn(steps, count):
    found = stretches(steps)
    assert [t for stretch in found for t in stretch] == list(range(steps))
    assert len(found) == count and max(map(len, found)) - min(map(len, found)) <= 1


@struct.dataclass
class Sum:
    """The cache of `Memory`."""
    read: jax.Array                                                                                     # [B, D]

    def grown(self, slots):
        return self

    def repeat(self, times, rows=1):
        return Sum(repeat(self.read, times, rows))

    def beside(self, other):
        return Sum(beside(self.read, other.read))


class Memory:
    """A model whose state is the sum of what it has read, each id's row of a table times its position, and whose logits
    are a matrix of that: enough to tell which tokens were read, where, and in which order."""
    V, D = 5, 4
    table, matrix = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((12, D), (D, V)))
    params = {"params": {"lm_embed_tokens": {"embedding": jnp.asarray(table)}}}

    def empty_cache(self, rows, slots, dtype):
        return Sum(jnp.zeros((rows, self.D), dtype))

    def for_steps(self, variables, cache):
        return self, variables, cache

    def apply(self, variables, ids, mask=None, positions=None, cache=None, at=0, text_only=False, method=None):
        if method:
            return ids @ self.matrix
        real = mask[:, at:at + ids.shape[1]] if isinstance(at, int) else jnp.ones(ids.shape, bool)
        read = jnp.where(real[..., None], (1 + positions[..., None]) * jnp.asarray(self.table)[ids], 0.0)
        states = cache.read[:, None] + jnp.cumsum(read, axis=1)
        return states / 8, Sum(states[:, -1])

    def logits(self, ids):
        """In numpy: after these ids, the first of them at position 0."""
        return (np.arange(1, 1 + len(ids))[:, None] * self.table[ids]).sum(axis=0) / 8 @ self.matrix


@pytest.mark.parametrize("how, stop", [
    (How(images_per_prompt=3), None), (How(images_per_prompt=2, temperature=0.5, top_k=3, suppress=(1,)), None),
    (How(images_per_prompt=3), 2), (How(guidance=2.0), None), (How(temperature=0.0), None)])
def test_each_token_is_drawn_with_its_own_key_after_those_before_it(how, stop):
    """Token t of sample s with fold_in(fold_in(key, s), t), the last one too; its log-probability is the policy's, guided
    and unfiltered. Prompts of unequal length, of which the padding is not read."""
    model, key, steps, offset = Memory(), jax.random.key(3), 5, 6
    prompts, negative = [[1, 4, 2], [3], [5, 0]], [2]
    tokens = np.array([[9] * (3 - len(ids)) + ids for ids in prompts])
    mask = np.arange(3) >= 3 - np.array([[len(ids)] for ids in prompts])
    places = 7 + 2 * np.arange(3 * how.images_per_prompt)                               # in a whole that is larger
    drawn, logps = jax.jit(lambda key: decode(
        model, model.params, jnp.asarray(tokens), jnp.asarray(mask), key, how, steps=steps, head="any", offset=offset,
        index=jnp.asarray(places), negative=jnp.array(negative), stop=stop))(key)
    scores_of = jax.jit(lambda logits, unguided: filter_logits(logits, how, unguided))
    pick = jax.jit(lambda scores, place, t: jnp.argmax(scores) if how.temperature == 0 else jax.random.categorical(
        jax.random.fold_in(jax.random.fold_in(key, place), t), scores))
    for s, (place, row) in enumerate(zip(places, np.asarray(drawn))):
        ids, other, before = list(prompts[s // how.images_per_prompt]), list(negative), []
        for t in range(steps):
            logits = model.logits(ids)
            policy = model.logits(other) + how.guidance * (logits - model.logits(other))
            token, ended = int(pick(scores_of(logits, model.logits(other)), place, t)), stop in before
            assert row[t] == (stop if ended else token), (s, t)
            likely = policy[token] - np.log(np.exp(policy).sum())
            np.testing.assert_allclose(logps[s, t], 0 if ended else likely, atol=1e-4)
            before.append(row[t])
            ids, other = [*ids, row[t] + offset], [*other, row[t] + offset]


def test_guidance_moves_from_the_unguided_towards_the_prompts():
    conditional, negative = np.log([[0.5, 0.3, 0.2]]), np.log([[0.2, 0.3, 0.5]])
    scores = filter_logits(jnp.asarray(conditional), How(guidance=3.0), jnp.asarray(negative))
    np.testing.assert_allclose(scores, negative + 3 * (conditional - negative), rtol=1e-5)
