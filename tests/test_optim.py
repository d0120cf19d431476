"""The optimizer against AdamW in numpy, its rate at every update, and how many updates a run tells it of."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from conftest import load_config
from gvu_jax import lora, optim, train
from gvu_jax.policy import init_trainable, mean_gradient, pick, policy_params, restrict, skipped

CONFIG = dict(lr=0.1, warmup=2, schedule="cosine", b2=0.95, weight_decay=0.3, clip_norm=1.0)
UPDATES = 6


def rate(i, config, updates):
    """Of update i, from 0: it rises from nothing over the warm-up, and falls along half a cosine to nothing."""
    if i < config["warmup"]:
        return config["lr"] * i / config["warmup"]
    if config["schedule"] == "constant":
        return config["lr"]
    return config["lr"] * (1 + np.cos(np.pi * (i - config["warmup"]) / (updates - config["warmup"]))) / 2


@pytest.mark.parametrize("changes", [{}, {"schedule": "constant"}, {"schedule": "constant", "warmup": 0}])
def test_every_update_is_adamw(changes):
    """Clipped by the norm of all gradients together, without decay of scales and biases; one that is not finite is
    counted, and neither moves anything nor takes its turn in the schedule."""
    config, rng = CONFIG | changes, np.random.default_rng(0)
    optimizer = optim.build(ConfigDict(config), UPDATES)
    params = {"q": {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]]), "bias": np.array([1.0, 2.0])},
              "norm": {"scale": np.array([[1.0, 0.5]])}}
    state, ours = optimizer.init(jax.tree.map(jnp.asarray, params)), jax.tree.map(jnp.asarray, params)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    step, update = 0, jax.jit(optimizer.update)
    for i in range(UPDATES + 1):
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape) * 3.0 ** (i - 2), params)
        if i == 3:
            grads["q"]["bias"][0] = np.nan
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        if i == 3:
            assert skipped(state) == {"skipped": 1, "skipped_in_a_row": 1}
        else:
            norm = np.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g: g * min(1, 1 / norm), grads)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, second, grads)
            for part, name in (("q", "kernel"), ("q", "bias"), ("norm", "scale")):
                m, v = first[part][name] / (1 - 0.9 ** (step + 1)), second[part][name] / (1 - 0.95 ** (step + 1))
                decay = 0.3 * params[part][name] if name == "kernel" else 0
                params[part][name] = params[part][name] - rate(step, config, UPDATES) * (
                    m / (np.sqrt(v) + 1e-8) + decay)
            step += 1
            assert skipped(state)["skipped_in_a_row"] == 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, params)
    assert step == UPDATES and skipped(state)["skipped"] == 1


@pytest.mark.parametrize("config, settings, updates", [
    ("shapes", {"gvu.inner_steps": 3, "steps": 4}, 12), ("shapes_uae", {"uae.inner_steps": 2, "steps": 5}, 10),
    ("shapes_gap", {"steps": 7}, 7)])
def test_the_schedule_is_as_long_as_the_run_has_updates(monkeypatch, tmp_path, config, settings, updates):
    class Told(Exception):
        pass

    def build(optim, steps):
        raise Told(steps)

    config = load_config(config)
    config.update_from_flattened_dict(settings)
    config.mesh.data = 1
    monkeypatch.setattr(train.optim, "build", build)
    with pytest.raises(Told) as told:
        train.train(config, tmp_path)
    assert told.value.args == (updates,)


# ------------------------------------------------------------------ what training moves (policy.py)

BASE = {"ar": {"layers": {"q_proj": {"kernel": np.ones((2, 3, 4))}}, "mm_head": {"kernel": np.ones((3, 5))},
               "lm_embed_tokens": {"embedding": np.ones((6, 3))}}, "vae": {"kernel": np.ones(2)}}
UMM = types.SimpleNamespace(trains={"backbone": "^layers/"})


def test_an_adapter_is_laid_over_the_base_at_alpha_by_rank():
    config = ConfigDict(dict(lora=dict(rank=2, alpha=6.0, targets="_proj|mm_head"), trains="backbone"))
    trainable = init_trainable(UMM, BASE, config, jax.random.key(0))
    assert list(trainable) == ["adapter"] and list(trainable["adapter"]) == ["layers"], "the head is no backbone"
    half = jax.tree.map(lambda x: x + 1.0, trainable["adapter"]["layers"]["q_proj"])
    policy = policy_params(BASE, {"adapter": {"layers": {"q_proj": half}}}, config.lora)
    np.testing.assert_allclose(policy["adapter"]["layers"]["q_proj"]["b"], 3.0 * half["b"])
    np.testing.assert_array_equal(policy["adapter"]["layers"]["q_proj"]["a"], half["a"])
    assert policy["ar"] is BASE["ar"] and policy["vae"] is BASE["vae"]


def test_a_new_adapter_has_unit_products_and_changes_nothing():
    adapter = lora.init(jax.random.key(0), {"q_proj": {"kernel": np.ones((400, 7))}}, 50, "q")["q_proj"]
    assert not adapter["b"].any() and adapter["b"].shape == (50, 7)
    np.testing.assert_allclose(np.std(adapter["a"]) * np.sqrt(400), 1, atol=0.03)


def test_only_what_is_trained_takes_the_place_of_the_base():
    config = ConfigDict(dict(lora=dict(rank=0, alpha=1.0, targets=""), trains="backbone"))
    trainable = init_trainable(UMM, BASE, config, None)
    assert list(trainable["ar"]) == ["layers"]
    policy = policy_params(BASE, jax.tree.map(lambda x: x + 1, trainable), config.lora)
    assert (policy["ar"]["layers"]["q_proj"]["kernel"] == 2).all() and (policy["ar"]["mm_head"]["kernel"] == 1).all()


def test_a_step_that_trains_a_part_leaves_the_rest_as_it_is():
    """No gradient, no decay, no momentum of steps before, and no moment that fades, of those whose turn it is not."""
    params = {"ar": {"llm": {"kernel": jnp.array([1.0, -2.0])}, "dit": {"kernel": jnp.array([[3.0], [0.5]])}}}
    adamw = optax.adamw(0.1, weight_decay=0.1)
    loss = lambda policy: jnp.sum(policy["llm"]["kernel"] ** 2) * jnp.sum(policy["dit"]["kernel"] ** 2)
    state = adamw.init(params)
    kernels = lambda half: [tree["ar"][half]["kernel"] for tree in (params, state[0].mu, state[0].nu)]
    for count, (turn, other) in enumerate((("llm", "dit"), ("dit", "llm"), ("llm", "dit"), ("dit", "llm")), 1):
        policy, optimizer = restrict(functools.partial(pick, {"ar": ()}, f"^{turn}/"),
                                     lambda base, trainable: base | trainable["ar"], adamw)
        gradients = jax.grad(lambda trainable: loss(policy({}, trainable)))(params)["ar"]
        np.testing.assert_allclose(gradients[turn]["kernel"], 2 * params["ar"][turn]["kernel"] * jnp.sum(
            params["ar"][other]["kernel"] ** 2), rtol=1e-6)
        assert not gradients[other]["kernel"].any()
        before, whole = (kernels(turn), kernels(other)), adamw.update({"ar": gradients}, state, params)
        updates, state = optimizer.update({"ar": gradients}, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(np.testing.assert_array_equal, kernels(other), before[1])
        np.testing.assert_array_equal(updates["ar"][turn]["kernel"], whole[0]["ar"][turn]["kernel"])
        assert all((x != y).all() for x, y in zip(kernels(turn), before[0])) and state[0].count == count


def test_slices_count_alike_whatever_is_in_them():
    slices = jnp.array([[1.0, 2.0], [30.0, 4.0], [5.0, -6.0]])
    grads, (metrics, rest) = mean_gradient(lambda w, x: (w * x.sum(), ({"x": x[0]}, 2 * x)), jnp.float32(2), slices)
    np.testing.assert_allclose(grads, (3 + 34 - 1) / 3)
    np.testing.assert_array_equal(metrics["x"], slices[:, 0])
    np.testing.assert_array_equal(rest, 2 * slices)
