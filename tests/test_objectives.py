"""Every loss against numpy, and against the trainer's own numbers in the golden data."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from gvu_jax import objectives, rewards


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_advantages_are_standard_scores_within_each_group():
    rewards_ = random(3, 5)
    expected = (rewards_ - rewards_.mean(1, keepdims=True)) / (rewards_.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(objectives.group_advantages(rewards_.ravel(), 5, 1e-4), expected.ravel(), rtol=1e-5)


def test_equal_rewards_give_no_advantage():
    assert (objectives.group_advantages(jnp.full(6, 0.3), 3, 1e-4) == 0).all()


@pytest.mark.parametrize("rewards_, share", [
    ([[1, 1, 1], [0, 0, 0]], 1), ([[1, 1, 0], [0, 0, 0]], 0.5), ([[0.3, 0.3 + 1e-8, 0.3], [1e-9, 2e-9, 3e-9]], 0.5),
    ([[np.nan, 1, 1], [-2, -2, -2]], 0.5), ([[0.25, 0.75, 0.75], [0.5, 0.25, 0.5]], 0)])
def test_flat_groups_are_those_with_equal_rewards(rewards_, share):
    rewards_ = np.array(rewards_, np.float32)
    assert objectives.flat_groups(jnp.asarray(rewards_.ravel()), 3) == share


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        objectives.group_advantages(jnp.ones(4), 1, 1e-4)


def test_kl_against_scipy_and_its_gradient_moves_the_second_towards_the_first():
    p, q = random(5, 3, 7), random(5, 3, 7, seed=1)
    expected = scipy.special.rel_entr(scipy.special.softmax(p, -1), scipy.special.softmax(q, -1)).sum(-1)
    np.testing.assert_allclose(objectives.kl(p, q), expected, rtol=1e-5)
    slope = jax.grad(lambda q: objectives.kl(p, q).sum())(q)
    np.testing.assert_allclose(slope, scipy.special.softmax(q, -1) - scipy.special.softmax(p, -1), atol=1e-6)


@pytest.mark.parametrize("apart, slack", [(1e-3, 1e-3), (300.0, 1e-5)])
def test_kl_of_what_is_close_or_far_apart(apart, slack):
    """Of 4,000 words, as the anchor's are: where p and q are close, rounding must not be larger than what is told."""
    p = random(64, 4000)
    q = p + np.float32(apart) * random(64, 4000, seed=1)
    true = [scipy.special.log_softmax(x.astype(np.float64), -1) for x in (p, q)]
    expected = (np.exp(true[0]) * (true[0] - true[1])).sum(-1)
    ours, slope = jax.value_and_grad(lambda q: objectives.kl(p, q).sum())(q)
    np.testing.assert_allclose(objectives.kl(p, q), expected, rtol=slack)
    np.testing.assert_allclose(slope, np.exp(true[1]) - np.exp(true[0]), atol=1e-7 + 1e-6 * (apart > 1))
    assert np.isfinite(ours) and (objectives.kl(p, q) >= 0).all() and (objectives.kl(p, p) == 0).all()


def test_k3_is_zero_only_at_equality_and_averages_to_the_kl():
    p, q = np.array([0.2, 0.5, 0.3], np.float32), np.array([0.4, 0.4, 0.2], np.float32)
    estimate = objectives.k3(np.log(p), np.log(q))
    assert (estimate > 0).all() and (objectives.k3(np.log(p), np.log(p)) == 0).all()
    np.testing.assert_allclose((p * estimate).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)


def test_clipped_loss_against_numpy():
    logps, old, ref, A = random(4, 6), random(4, 6, seed=1), random(4, 6, seed=2), random(4, seed=3)
    ratio, d = np.exp(logps - old), ref - logps
    gain = np.minimum(ratio * A[:, None], np.clip(ratio, 0.8, 1.2) * A[:, None]) - 0.03 * (np.exp(d) - d - 1)
    loss, metrics = objectives.clipped_policy_loss(logps, old, ref, A, 0.2, 0.03)
    np.testing.assert_allclose(loss, -gain.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], ratio.max(), rtol=1e-6)
    assert 0 < metrics["clipped"] < 1


def test_what_a_mask_leaves_out_does_not_count():
    """Texts of unequal length: each counts as the mean over its own tokens, whatever stands behind its end."""
    logps, old, ref, A = random(3, 5), random(3, 5, seed=1), random(3, 5, seed=2), random(3, seed=3)
    lengths = [5, 2, 1]
    mask = np.arange(5) < np.array(lengths)[:, None]
    loss, metrics = objectives.clipped_policy_loss(*(np.where(mask, x, 1e3) for x in (logps, old, ref)), A, 0.2, 0.03,
                                                   mask)
    alone = [objectives.clipped_policy_loss(*(x[i:i + 1, :n] for x in (logps, old, ref)), A[i:i + 1], 0.2, 0.03)
             for i, n in enumerate(lengths)]
    np.testing.assert_allclose(loss, np.mean([one for one, _ in alone]), rtol=1e-5)
    for name in ("kl", "clipped"):
        np.testing.assert_allclose(metrics[name], np.mean([told[name] for _, told in alone]), rtol=1e-5)


def test_where_the_clip_acts_the_policy_gets_no_gradient():
    """Ratio 2 with a positive advantage lies beyond 1.2: only the KL term may move it, and here there is none."""
    old = jnp.zeros((1, 1))
    slope = jax.grad(lambda x: objectives.clipped_policy_loss(x, old, x, jnp.ones(1), 0.2, 0.0)[0])
    assert slope(jnp.log(2.0) + old) == 0 and slope(old) == -1


@pytest.mark.parametrize("ratio, advantage, held", [
    (1.5, 1.0, True), (1.5, -1.0, False), (0.5, 1.0, False), (0.5, -1.0, True), (1.1, 1.0, False), (0.9, -1.0, False)])
def test_which_tokens_the_clip_holds(ratio, advantage, held):
    """One that is likelier than the clip allows and was good, or less likely and was bad; the way back stays open. What
    is counted as clipped is what has no gradient."""
    logps, A = jnp.log(jnp.array([[ratio]])), jnp.array([advantage])
    loss = lambda logps: objectives.clipped_policy_loss(logps, jnp.zeros((1, 1)), logps, A, 0.2, 0.0)
    slope, metrics = jax.grad(loss, has_aux=True)(logps)
    assert metrics["clipped"] == held
    np.testing.assert_allclose(slope, 0 if held else -ratio * advantage, rtol=1e-6)


@pytest.mark.parametrize("beta, of_trl", [
    (0.1, [0.8019744157791138, 0.8170759677886963, 1.016432285308838, 0.565202534198761]),
    (0.5, [1.3388392925262451, 1.4409894943237305, 2.892991542816162, 0.22572098672389984])])
def test_dpo_loss_against_trl_numpy_and_torch(beta, of_trl):
    """of_trl: what DPOTrainer.dpo_loss of trl 0.9.6 (loss_type "sigmoid") gives for these four pairs."""
    torch = pytest.importorskip("torch")
    chosen, rejected, ref_chosen, ref_rejected = logps = [random(4, 6, seed=seed) for seed in range(4)]
    loss = lambda *logps, nll=0.0: objectives.dpo_loss(*logps, beta, nll)[0]
    np.testing.assert_allclose([loss(*(x[i:i + 1] for x in logps)) for i in range(4)], of_trl, rtol=1e-5)
    np.testing.assert_allclose(loss(*logps), np.mean(of_trl), rtol=1e-5)
    np.testing.assert_allclose(loss(*logps, nll=0.3), np.mean(of_trl) - 0.3 * chosen.mean(), rtol=1e-5)
    margin = (chosen - rejected - ref_chosen + ref_rejected).sum(axis=1)
    np.testing.assert_allclose(objectives.dpo_loss(*logps, beta, 0.3)[1]["margin"], margin.mean(), rtol=1e-5)
    w, l, ref_w, ref_l = (torch.tensor(x, requires_grad=i < 2) for i, x in enumerate(logps))
    scores = beta * ((w - ref_w).sum(1) - (l - ref_l).sum(1))
    (-torch.nn.functional.logsigmoid(scores).mean() - 0.3 * w.mean()).backward()
    slopes = jax.grad(lambda w, l: loss(w, l, ref_chosen, ref_rejected, nll=0.3), argnums=(0, 1))(chosen, rejected)
    for ours, theirs in zip(slopes, (w.grad, l.grad)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_reward_is_the_geometric_mean_and_does_not_underflow():
    logps = np.log(np.array([[0.5, 0.25, 0.9], [0.1, 0.1, 0.1]], np.float32))
    mask = np.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(rewards.geometric_mean(logps, mask), [np.sqrt(0.125), 0.1], rtol=1e-5)
    long = rewards.geometric_mean(jnp.full((1, 170), np.log(0.01)), jnp.ones((1, 170), bool))
    np.testing.assert_allclose(long, 0.01, rtol=1e-4)


def test_the_other_rewards():
    logps = np.log(np.array([[0.5, 0.25, 0.9], [0.1, 0.3, 0.2]], np.float32))
    mask = np.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(rewards.product(logps, mask), [0.125, 0.006], rtol=1e-5)
    np.testing.assert_allclose(rewards.minimum(logps, mask), [0.25, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rewards.yes(logps, mask), [0.125 / 0.131], rtol=1e-5)
    assert rewards.question("a photo of a cat. ") == "Does this image describe a photo of a cat?"


def test_similarity_is_the_mean_cosine_of_patches():
    features, others = random(3, 4, 8), random(3, 4, 8, seed=1)
    cosine = (features * others).sum(-1) / np.linalg.norm(features, axis=-1) / np.linalg.norm(others, axis=-1)
    np.testing.assert_allclose(rewards.similarity(features, others), cosine.mean(1), atol=1e-6)
    np.testing.assert_allclose(rewards.similarity(features, 3 * features), 1, atol=1e-6)


@pytest.mark.parametrize("case", ["full", "lora", "lora_all"])
def test_against_the_published_trainer(fixtures, case):
    import json
    golden, config = np.load(fixtures / "grpo" / f"{case}.npz"), json.loads((fixtures / "grpo/config.json").read_text())
    kl = objectives.k3(golden["policy_logps"], golden["ref_logps"])
    np.testing.assert_allclose(kl, golden["per_token_kl"], atol=2e-4)
    advantages = objectives.group_advantages(golden["rewards"], config["num_generations"], config["advantage_eps"])
    np.testing.assert_allclose(advantages, golden["advantages"], atol=2e-4)
    loss, metrics = objectives.clipped_policy_loss(
        golden["policy_logps"], golden["policy_logps"], golden["ref_logps"], advantages, 0.2, config["beta"])
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["kl"], golden["mean_kl"], rtol=1e-3)


def test_equal_samples_share_their_reward():
    tokens = jnp.array([[1, 2], [3, 4], [1, 2], [5, 6], [1, 2], [1, 2]])
    rewards = jnp.array([0.0, 1.0, 4.0, 2.0, 3.0, 7.0])
    np.testing.assert_allclose(objectives.pool_equal(rewards, tokens, 3), [2.0, 1.0, 2.0, 2.0, 5.0, 5.0])


def test_latents_that_hardly_differ_are_the_same():
    near, far = 0.9 * objectives.ALIKE, 1.1 * objectives.ALIKE                           # all entries lie so far apart
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 4)).astype(np.float32)
    drawn = np.concatenate([x, x + near, x + far + near, -x, x, x])
    np.testing.assert_allclose(objectives.duplicates(drawn, 3), (1 + 1) / 6)
    np.testing.assert_allclose(objectives.duplicates({"x": drawn, "n": np.arange(6)}, 3), 0)
