"""The flow as a policy: its equations in numpy, what must hold of any of them, and the golden data of Flow-GRPO."""
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gvu_jax import flow, lora, objectives
from gvu_jax.described import Described
from gvu_jax.models import sd3

KINDS = [flow.Flow(6, 0.7), flow.Flow(6, 0.3, kind="dance", even=True), flow.Flow(6, 0.8, kind="cps")]
of_kind = pytest.mark.parametrize("how", KINDS, ids=lambda how: how.kind)
PLAIN = types.SimpleNamespace(clip=1e-4, beta=0.0, advantage_max=5.0, ratio="plain", kl="gaussian")


def changed(settings, **values):
    return types.SimpleNamespace(**vars(settings) | values)


# ------------------------------------------------------------------ equations

@of_kind
def test_a_step_as_the_papers_have_it(how):
    """In float64, written out: Flow-GRPO's, DanceGRPO's and Flow-CPS's own forms, which share no line with ours."""
    rng = np.random.default_rng(0)
    x, v, e = rng.standard_normal((3, 5, 4, 4, 2))
    levels = flow.levels(how, 3.0).astype(np.float64)
    s, after = (level[:, None, None, None] for level in (levels[:5], levels[1:6]))
    a, d = how.noise, after - s
    if how.kind == "sde":
        g = a * np.sqrt(s / (1 - np.where(s == 1, levels[1], s)))
        mean, std = x * (1 + g ** 2 / (2 * s) * d) + v * (1 + g ** 2 * (1 - s) / (2 * s)) * d, g * np.sqrt(-d)
    elif how.kind == "dance":
        x0 = x - s * v
        mean = x + d * v - 0.5 * a ** 2 * -(x - (1 - s) * x0) / s ** 2 * d
        std = a * np.sqrt(-d)
    else:
        std = after * np.sin(a * np.pi / 2)
        mean = (x - s * v) * (1 - after) + (x + (1 - s) * v) * np.sqrt(after ** 2 - std ** 2)
    found = flow.step(how, *(jnp.float32(y) for y in (x, v, levels[:5], levels[1:6], levels[1])), how.noise)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.std, std.ravel(), atol=1e-6)
    following = mean + std * e
    logp = (-e ** 2 / 2 - np.log(std) - np.log(2 * np.pi) / 2 if how.kind != "cps" else -(std * e) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(flow.log_prob(how, jnp.float32(following), found.mean, found.std), logp, atol=2e-5)


@pytest.mark.parametrize("change, said", [
    (dict(kind="ode"), "kind is 'ode'"), (dict(steps=0), "steps 0"), (dict(noise=-0.1), "noise -0.1"),
    (dict(kind="cps", noise=1.2), "of cps at most 1"), (dict(window=6), "do not fit between 0 and 5"),
    (dict(window=2, between=(3, 4)), "do not fit between 3 and 4"), (dict(window=1, between=(2, 6)), "of 6 steps"),
    (dict(between=(1, 4)), "set flow.window")])
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(KINDS[0], **change)
    for field in ("ratio", "kl"):
        with pytest.raises(ValueError, match=f"uae.{field} is 'x'"):
            flow.check(vars(PLAIN) | {field: "x"}, "uae")


# ------------------------------------------------------------------ a tiny network

CONFIG = sd3.Config(in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=6,
                    pooled_projection_dim=4, pos_embed_max_size=6)
SHAPE = (4, 6, 3)


@pytest.fixture(scope="module")
def tiny():
    """(params, run_of(params) -> the guided velocity of four samples)."""
    normal = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: sd3.init(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.float32(0.2 * normal(leaf.shape)), shapes)
    context, pooled, negative = (normal(shape).astype(np.float32) for shape in ((4, 5, 6), (4, 4), (1, 5, 6)))

    def run_of(params, guidance=2.0, **more):
        velocity = lambda *x: sd3.SD3Transformer(CONFIG).apply({"params": params}, *x)
        text, other = sd3.Text(context, pooled), sd3.Text(negative, pooled[:1])
        return sd3.guided_velocity(velocity, text, other, guidance, **more)
    return params, run_of


def drawn_by(how, run, key=0, group=2):
    return flow.draw(how, run, SHAPE, flow.levels(how, 3.0), jax.random.key(key), jnp.arange(4), group)


HOWS = [*KINDS, flow.Flow(5, 0.7, window=2, between=(1, 4)), flow.Flow(5, 0.8, kind="cps", window=3, between=(0, 3)),
        flow.Flow(5, 0.5, same_noise=True)]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.kind}-{how.window}-{how.same_noise}")
def test_the_samplers_log_probs_are_the_policys(tiny, how):
    """As found again from the latents, within 1e-4; and the ratio to itself is exactly 1, at any way of taking it."""
    params, run_of = tiny
    (drawn, logps), again = jax.jit(lambda params: (
        (found := drawn_by(how, run_of(params))), flow.moves(how, run_of(params), found[0], flow.levels(how, 3.0))))(
        params)
    assert logps.shape == (4, how.trained) and np.isfinite(logps).all()
    shapes = flow.drawn_shapes(how, 4, SHAPE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    np.testing.assert_allclose(again.logps, logps, atol=1e-4)
    for ratio in flow.RATIOS:
        assert (flow.ratios(again, again, ratio) == 1).all()
    assert (flow.kl(again, again) == 0).all()


def test_without_noise_the_chain_is_the_ode_bit_for_bit(tiny):
    params, run_of = tiny
    start, levels = jax.random.normal(jax.random.key(3), (4, *SHAPE)), sd3.sigmas(5)
    for kind in ("sde", "cps"):
        how = flow.Flow(5, 0.0, kind=kind)
        drawn, logps = jax.jit(lambda params, start: flow.sample(how, run_of(params), start, levels, 0, None))(
            params, start)
        final = jax.jit(lambda params, start: sd3.sample(run_of(params), start, levels))(params, start)
        np.testing.assert_array_equal(drawn.final, final)
        np.testing.assert_array_equal(drawn.latents[:, 0], start)
        assert logps.shape == (4, 0)


def test_the_ode_of_an_even_grid_tells_the_network_whole_thousandths():
    """As every step with noise does; v = sigma here, so that what was told can be read off."""
    how, levels, start = flow.Flow(7, 0.0, even=True), flow.levels(flow.Flow(7, even=True), 3.0), jnp.zeros((2, *SHAPE))
    drawn, _ = flow.sample(how, lambda x, sigma: jnp.broadcast_to(sigma, x.shape), start, levels, 0, None)
    told = np.floor(1000 * np.float32(levels)) / 1000
    assert (told != levels).any()
    np.testing.assert_allclose(drawn.final, np.sum(np.diff(levels) * told[:-1]), rtol=1e-6)


def test_a_window_is_noisy_inside_and_the_ode_outside(tiny):
    """The trained steps are where the call's key says, the same for all samples; the others follow the velocity."""
    params, run_of = tiny
    how, levels, begun = flow.Flow(6, 0.7, window=2, between=(1, 5)), sd3.sigmas(6), set()
    draw = jax.jit(lambda key: flow.draw(how, run_of(params), SHAPE, levels, key, jnp.arange(4), 2)[0])
    run = jax.jit(run_of(params))
    for seed in range(12):
        drawn = draw(jax.random.key(seed))
        (first,) = set(np.asarray(drawn.first).tolist())
        begun.add(first)
        x = drawn.latents[:, -1]
        for s, after in zip(levels[first + 2:], levels[first + 3:]):
            x = x + (after - s) * run(x, s)
        np.testing.assert_allclose(drawn.final, x, atol=1e-5)
        inside = drawn.latents[:, 0] + (levels[first + 1] - levels[first]) * run(drawn.latents[:, 0], levels[first])
        assert np.abs(drawn.latents[:, 1] - inside).max() > 0.01
    assert begun == {1, 2, 3}


def test_a_sample_has_the_noise_of_its_place(tiny):
    """However the whole is cut; and neighbours begin alike where it is asked."""
    params, run_of = tiny
    draw = jax.jit(lambda params, index, how: flow.draw(
        how, run_of(params), SHAPE, sd3.sigmas(6), jax.random.key(0), index, 2)[0], static_argnums=2)
    whole = draw(params, jnp.arange(4), KINDS[0])
    assert len({row.tobytes() for row in np.asarray(whole.latents[:, 0])}) == 4
    turned = draw(params, jnp.array([2, 3, 0, 1]), KINDS[0])
    np.testing.assert_array_equal(turned.latents[:, 0], whole.latents[jnp.array([2, 3, 0, 1]), 0])
    same = draw(params, jnp.arange(4), dataclasses.replace(KINDS[0], same_noise=True))
    first = np.asarray(same.latents[:, 0])
    assert (first[0] == first[1]).all() and (first[2] == first[3]).all() and (first[0] != first[2]).any()
    assert (same.latents[0, 1] != same.latents[1, 1]).any()


def test_who_is_of_one_prompt_is_said_by_the_rows_and_not_by_their_places():
    """Of places as gvu_jax.Model has them, 1024 to a prompt, a group of three begins alike."""
    how, index = flow.Flow(2, same_noise=True), jnp.array([0, 1, 2, 1024, 1025, 1026])
    drawn, _ = flow.draw(how, lambda x, s: x, (2,), flow.levels(how, 1.0), jax.random.key(0), index, 3)
    first = np.asarray(drawn.latents[:, 0]).reshape(2, 3, 2)
    assert (first == first[:, :1]).all() and (first[0, 0] != first[1, 0]).all()


@of_kind
def test_the_objective_in_numpy(tiny, how):
    """All its terms and settings, of a policy that moved, against float64; and the gradient against differences."""
    params, run_of = tiny
    levels, A = flow.levels(how, 3.0), jnp.array([1.0, -0.5, 9.0, -9.0])
    other = jax.tree.map(lambda x, i=1: x * (1 + 0.003 * np.random.default_rng(i).standard_normal(x.shape)), params)
    drawn, _ = drawn_by(how, run_of(params))
    seen = jax.jit(lambda params: flow.moves(how, run_of(params), drawn, levels))
    old, new = seen(params), seen(other)
    at = {name: np.asarray(getattr(new, name), np.float64) for name in ("logps", "means", "std", "g", "fall")}
    was = {name: np.asarray(getattr(old, name), np.float64) for name in ("logps", "means")}
    apart = ((at["means"] - was["means"]) ** 2).mean((2, 3, 4))
    clipped_A = np.clip(A, -5, 5)[:, None]
    for ratio in flow.RATIOS:
        for published in (False, True):
            D = apart.mean(0, keepdims=True) if ratio == "guard_published" else apart
            log_r = at["logps"] - was["logps"]
            r = np.exp(log_r) if ratio == "plain" else np.exp((log_r + D / (2 * at["std"] ** 2)) * at["std"])
            loss = np.maximum(-clipped_A * r, -clipped_A * np.clip(r, 1 - 1e-4, 1 + 1e-4))
            loss = loss / (1 if ratio == "plain" else at["fall"])
            distance = apart / (2 * at["g" if published else "std"] ** 2)
            settings = changed(PLAIN, beta=0.3, ratio=ratio, kl="published" if published else "gaussian")
            value, told = flow.policy_loss(new, old, old, A, settings)
            np.testing.assert_allclose(value, loss.mean() + 0.3 * distance.mean(), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(told["kl"], distance.mean(), rtol=1e-4)
            np.testing.assert_allclose(told["ratio_max"], r.max(), atol=2e-5)
    assert 0 < told["clipped"] < 1 or how.kind == "cps"

    settings = changed(PLAIN, clip=0.5, beta=0.3)
    value = jax.jit(lambda params: flow.policy_loss(flow.moves(how, run_of(params), drawn, levels), old, old, A,
                                                    settings)[0])
    slope, rng = jax.jit(jax.grad(value))(other), np.random.default_rng(5)
    way = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)) * jnp.abs(x), params)
    along = sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(slope), jax.tree.leaves(way)))
    moved = [value(jax.tree.map(lambda x, y: x + sign * 1e-3 * y, other, way)) for sign in (1, -1)]
    np.testing.assert_allclose(along, (moved[0] - moved[1]) / 2e-3, rtol=0.05, atol=1e-4)


def test_the_negative_branch_may_be_held(tiny):
    params, run_of = tiny
    x = jnp.ones((4, *SHAPE))
    slope = lambda **how: jax.jit(jax.grad(lambda params: jnp.sum(run_of(params, **how)(x, 0.5))))(params)
    both, held = (slope(negative_gradient=on) for on in (True, False))
    alone = slope(guidance=1.0)
    close = lambda a, b: all(np.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(*map(jax.tree.leaves, (a, b))))
    assert close(held, jax.tree.map(lambda x: 2 * x, alone)) and not close(both, held)


# ------------------------------------------------------------------ marginals

MEANS, SPREAD, SHARES = np.array([[2.0, 0.0], [-1.5, 1.0]]), np.array([0.3, 0.5]), np.array([0.7, 0.3])


def mixture_velocity(x, s):
    """E[noise - picture | x] where x = (1 - s) picture + s noise, of a mixture of two Gaussians in the plane."""
    variance = ((1 - s) * SPREAD) ** 2 + s ** 2                                                     # [K]
    apart = x[:, None, :] - (1 - s) * MEANS                                                         # [S, K, 2]
    logs = jnp.log(SHARES) - jnp.log(variance) - jnp.sum(apart ** 2, axis=-1) / (2 * variance)
    of = jax.nn.softmax(logs, axis=-1)[..., None]                                                   # [S, K, 1]
    picture = MEANS + ((1 - s) * SPREAD ** 2 / variance)[:, None] * apart
    noise = (s / variance)[:, None] * apart
    return jnp.sum(of * (noise - picture), axis=1)


def distance(x, y):
    """The greatest distance of the distributions of two samples along eight directions (Wasserstein-1)."""
    return max(np.abs(np.sort(x @ way) - np.sort(y @ way)).mean() for way in
               (np.array([np.cos(t), np.sin(t)]) for t in np.linspace(0, np.pi, 8, endpoint=False)))


@pytest.mark.parametrize("how", [
    flow.Flow(200, 0.7), flow.Flow(200, 0.3, kind="dance"), flow.Flow(200, 0.1, kind="cps"),
    flow.Flow(200, 1.0, window=100, between=(20, 120))], ids=["sde", "dance", "cps", "window"])
def test_noise_leaves_the_marginals_as_they_are(how):
    """At the end the chain is distributed as the ODE's and as the mixture itself, half-way as the mixture with so much
    noise; noise alone, without what pulls back, is not."""
    S, rng = 8000, np.random.default_rng(0)
    levels, keys = sd3.sigmas(how.steps), jax.random.split(jax.random.key(0))

    def drawn(how, key):
        noise = lambda i: jax.random.normal(jax.random.fold_in(key, i), (S, 2))
        with jax.default_matmul_precision("highest"):
            first = how.between[0] if how.window else 0
            return flow.sample(how, mixture_velocity, noise(how.steps), levels, first, noise)[0]
    noisy, ode = jax.jit(drawn, static_argnums=0)(how, keys[0]), jax.jit(drawn, static_argnums=0)(
        dataclasses.replace(how, noise=0.0), keys[1])
    which = rng.random(S) < SHARES[0]
    parts = [mean + spread * rng.standard_normal((S, 2)) for mean, spread in zip(MEANS, SPREAD)]
    true = np.where(which[:, None], *parts)
    at = how.trained // 2
    s = levels[int(noisy.first[0]) + at]
    half_way = (1 - s) * true + s * rng.standard_normal((S, 2))
    assert distance(noisy.final, true) < 0.07 and distance(noisy.final, ode.final) < 0.07
    assert distance(noisy.latents[:, at], half_way) < 0.07
    free = np.asarray(ode.final) + 0.3 * rng.standard_normal((S, 2))
    assert distance(free, true) > 0.07


# ------------------------------------------------------------------ bookkeeping

def test_advantages_over_all_samples():
    """Less the mean of the group, over the spread of the whole; without Bessel's correction where it is asked."""
    rewards = np.array([0.1, 0.5, 0.3, 0.9, 0.9, 0.2])
    groups = rewards.reshape(2, 3)
    centred = groups - groups.mean(1, keepdims=True)
    for over, ddof, spread in (("all", 0, rewards.std()), ("all", 1, rewards.std(ddof=1)),
                               ("group", 0, groups.std(1, keepdims=True))):
        np.testing.assert_allclose(objectives.group_advantages(jnp.array(rewards), 3, 1e-4, over, ddof),
                                   (centred / (spread + 1e-4)).ravel(), rtol=1e-5)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def golden(fixtures):
    folder = fixtures / "uae/flow_grpo"
    return types.SimpleNamespace(
        folder=folder, told=json.loads((folder / "config.json").read_text()),
        book=json.loads((folder / "bookkeeping.json").read_text()),
        arrays=lambda name: dict(np.load(folder / f"{name}.npz")))


@pytest.mark.parametrize("name", ["sde_07", "sde_10", "cps_08", "sde_00", "dance", "mix"])
def test_golden_steps(golden, name):
    """Row i is step i: means, stds, next latents, log-probabilities of them and of others."""
    expected, kind = golden.arrays("steps"), name.split("_")[0]
    even, noise = kind in ("dance", "mix"), {"dance": 0.3, "mix": 0.7}.get(kind) or int(name[-2:]) / 10
    how = flow.Flow(len(expected["timesteps"]), noise, kind="sde" if kind == "mix" else kind, even=even)
    levels = flow.levels(how, golden.told["shift"])
    recorded = expected["dance_sigmas" if even else "sigmas"]
    np.testing.assert_allclose(levels, recorded, atol=1e-6)
    if even:
        np.testing.assert_array_equal(np.round(1000 * np.asarray(flow.seen_level(how, jnp.asarray(levels[:-1])))),
                                      expected["dance_timesteps"])
    x, v, e = expected["sample"], expected["model_output"], expected["noise"]
    found = flow.step(how, x, v, *(jnp.asarray(recorded[i]) for i in (slice(None, -1), slice(1, None), 1)), how.noise)
    following = found.mean + np.asarray(found.std)[:, None, None, None] * e
    np.testing.assert_allclose(following, expected[f"{name}_prev_sample"], atol=1e-5)
    fall = np.sqrt(recorded[:-1] - recorded[1:])
    for key, value in (("mean", found.mean), ("std_dev_t", found.g), ("sqrt_minus_dt", fall)):
        if f"{name}_{key}" in expected:
            np.testing.assert_allclose(value, expected[f"{name}_{key}"], atol=1e-5)
    if f"{name}_log_prob" in expected:
        real = np.asarray(found.std) > 0 if kind != "cps" else np.ones(len(x), bool)
        logp = flow.log_prob(how, expected[f"{name}_prev_sample"], found.mean, found.std)
        np.testing.assert_allclose(logp[real], expected[f"{name}_log_prob"][real], atol=2e-5)
    if f"{name}_log_prob_of_given" in expected:
        given = expected[f"{name}_prev_sample"] + expected["given_prev_delta"]
        np.testing.assert_allclose(flow.log_prob(how, given, found.mean, found.std),
                                   expected[f"{name}_log_prob_of_given"], atol=2e-5, rtol=1e-6)
    if kind == "dance":
        np.testing.assert_allclose(x - recorded[:-1, None, None, None] * v, expected["dance_pred_x0"], atol=1e-5)


def test_golden_schedules(golden):
    expected = golden.arrays("steps")
    names = [name for name in expected if name.startswith("schedule") and name.endswith("_sigmas")]
    assert names
    for name in names:
        N, levels = int(name.split("_")[1]), expected[name]
        how = flow.Flow(N, 0.7)
        np.testing.assert_allclose(flow.levels(how, golden.told["shift"]), levels, atol=1e-6)
        found = flow.step(how, *jnp.zeros((2, N, 1)), levels[:-1], levels[1:], levels[1], how.noise)
        np.testing.assert_allclose(found.g, expected[f"schedule_{N}_std_dev_t_07"], atol=1e-5)
        np.testing.assert_allclose(found.std, expected[f"schedule_{N}_transition_std_07"], atol=1e-5)


@pytest.fixture(scope="module")
def network(golden):
    """run_of(adapter, guidance, ..) of the recorded prompts, and the adapters of both folders as trees."""
    base, expected = (golden.folder / golden.told["base"] / "transformer").resolve(), golden.arrays("rollout")
    config = Described(base / "config.json").numbers(sd3.Config)
    params = sd3.from_torch(load_file(base / "diffusion_pytorch_model.safetensors"), config)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    adapters = {name: lora.from_peft(load_file(golden.folder / name / "adapter_model.safetensors"), params, sd3.RULES)
                for name in ("lora", "lora_step")}
    alpha, rank = golden.told["lora"]["lora_alpha"], golden.told["lora"]["r"]
    each = lambda name: np.repeat(expected[name], golden.told["group_size"], axis=0)
    text = sd3.Text(each("prompt_embeds"), each("pooled_prompt_embeds"))
    negative = sd3.Text(expected["negative_prompt_embeds"], expected["negative_pooled_prompt_embeds"])

    def run_of(adapter, guidance, **more):
        variables = {"params": params} | ({"lora": lora.scaled(adapter, alpha / rank)} if adapter else {})
        return sd3.guided_velocity(lambda *x: sd3.SD3Transformer(config).apply(variables, *x), text, negative, guidance,
                                   **more)
    return run_of, adapters


def last(x):
    return jnp.moveaxis(jnp.asarray(x), -3, -1)


def first(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def recorded_rollout(golden):
    expected = golden.arrays("rollout")
    N = golden.told["num_steps"]
    how = flow.Flow(N, golden.told["noise_level"])
    assert how.trained == golden.told["trained_steps"]
    chain = last(expected["latents"])
    return how, expected, flow.Drawn(chain[:, :N], jnp.zeros(len(chain), jnp.int32), chain[:, N])


def test_golden_rollout(golden, network):
    """Latents of every step and their log-probabilities; and the advantages of the recorded rewards."""
    (run_of, adapters), (how, expected, _) = network, recorded_rollout(golden)
    levels, noise = flow.levels(how, golden.told["shift"]), last(expected["noise"])
    np.testing.assert_allclose(levels, expected["sigmas"], atol=1e-6)
    found, logps = jax.jit(lambda adapter: flow.sample(
        how, run_of(adapter, golden.told["guidance_scale"]), last(expected["init_latents"]), levels, 0,
        lambda i: noise[:, i]))(adapters["lora"])
    np.testing.assert_allclose(first(found.latents), expected["latents"][:, :-1], atol=5e-4)
    np.testing.assert_allclose(first(found.final), expected["latents"][:, -1], atol=5e-4)
    np.testing.assert_allclose(logps, expected["log_probs"][:, :how.trained], atol=2e-5)
    for name, over in (("advantages_global_std", "all"), ("advantages_group_std", "group")):
        found = objectives.group_advantages(jnp.asarray(expected["rewards"]), golden.told["group_size"], 1e-4, over, 0)
        np.testing.assert_allclose(found, expected[name], atol=2e-5)


def assert_gradients(found, expected, prefix, norms):
    """found: of an adapter; expected: an archive with some of them; norms: {peft name: norm}, "total" among them."""
    found = lora.to_peft(found, sd3.RULES)
    if norms:
        total = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in found.values()))
        np.testing.assert_allclose(total, norms["total"], rtol=2e-3)
        for name, norm in norms.items():
            if name != "total":
                np.testing.assert_allclose(np.linalg.norm(found[name]), norm, rtol=2e-3, atol=2e-3 * norms["total"],
                                           err_msg=name)
    names = [name for name in expected if name.startswith(f"{prefix}/grad/")]
    for name in names:
        np.testing.assert_allclose(found[name.removeprefix(f"{prefix}/grad/")], expected[name], rtol=0,
                                   atol=2e-3 * np.abs(expected[name]).max(), err_msg=name)
    return len(names)


@pytest.mark.parametrize("name, policy, spread, more", [
    ("onpolicy", "lora", "global", {}), ("offpolicy", "lora_step", "global", {}),
    ("offpolicy_detach", "lora_step", "global", {"negative_gradient": False}),
    ("offpolicy_group_std", "lora_step", "group", {})])
def test_golden_updates(golden, network, name, policy, spread, more):
    """Log-probs, ratios, each step's losses and KL, and gradients of the adapter."""
    (run_of, adapters), (how, rollout, drawn), told = network, recorded_rollout(golden), golden.told
    expected, levels = golden.arrays("train"), flow.levels(how, told["shift"])
    norms = json.loads((golden.folder / "train_grad_norms.json").read_text())
    settings = types.SimpleNamespace(clip=told["clip_range"], beta=told["beta"], advantage_max=told["adv_clip_max"],
                                     ratio="plain", kl="published")
    A = jnp.float32(rollout[f"advantages_{spread}_std"])
    old = types.SimpleNamespace(logps=rollout["log_probs"][:, :how.trained])
    look = lambda adapter: flow.moves(how, run_of(adapter, told["guidance_scale"], **more), drawn, levels)
    reference = jax.jit(lambda: look(None))()

    def loss(adapter):
        moves = look(adapter)
        was = jax.lax.stop_gradient(moves) if name == "onpolicy" else old
        return flow.policy_loss(moves, was, reference, A, settings)[0], (
            moves, flow.ratios(moves, was), flow.decision_losses(moves, was, reference, A, settings))
    (value, (moves, r, (policy_loss, distance, also))), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        adapters[policy])
    array = lambda key: expected[f"{name}/{key}"]
    np.testing.assert_allclose(moves.logps, array("log_prob"), atol=2e-5)
    np.testing.assert_allclose(r, array("ratio"), atol=2e-5)
    np.testing.assert_allclose(distance, array("kl_per_sample"), rtol=2e-3)
    np.testing.assert_allclose(policy_loss.mean(axis=0), array("policy_loss"), atol=2e-5)
    np.testing.assert_allclose(distance.mean(axis=0), array("kl"), rtol=2e-3)
    np.testing.assert_allclose((policy_loss + told["beta"] * distance).mean(axis=0), array("loss"), atol=2e-5)
    np.testing.assert_allclose(value, array("loss").mean(), atol=2e-5)
    np.testing.assert_allclose(moves.g[0], array("std_dev_t"), atol=1e-5)
    np.testing.assert_allclose(also["clipped"].mean(axis=0), array("clipfrac"), atol=1e-6)
    np.testing.assert_allclose(also["approx_kl"].mean(axis=0), array("approx_kl"), rtol=2e-2, atol=1e-9)
    if name == "onpolicy":
        assert (r == 1).all()
    seen = assert_gradients(slope, expected, name, norms.get(name))
    assert seen or norms.get(name) or name.endswith(("detach", "std"))


def test_golden_guard(golden, network):
    (run_of, adapters), (how, rollout, drawn), told = network, recorded_rollout(golden), golden.told
    expected, levels = golden.arrays("train"), flow.levels(how, told["shift"])
    look = jax.jit(lambda adapter: flow.moves(how, run_of(adapter, told["guidance_scale"]), drawn, levels))
    old, new = look(adapters["lora"]), look(adapters["lora_step"])
    old = old.replace(logps=jnp.asarray(rollout["log_probs"][:, :how.trained]))
    for name, ratio in (("published", "guard_published"), ("per_sample", "guard")):
        settings = types.SimpleNamespace(clip=told["clip_range"], beta=0.0, advantage_max=told["adv_clip_max"],
                                         ratio=ratio, kl="published")
        np.testing.assert_allclose(flow.ratios(new, old, ratio), expected[f"guard/{name}_ratio"], atol=2e-5)
        loss, _, _ = flow.decision_losses(new, old, None, jnp.float32(rollout["advantages_global_std"]), settings)
        np.testing.assert_allclose(loss.mean(axis=0), expected[f"guard/{name}_policy_loss"], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["sde_cfg", "cps_nocfg"])
def test_golden_windows(golden, network, name):
    """Flow-GRPO-Fast: the window's latents, its log-probabilities, the picture's latents, and an update."""
    (run_of, adapters), (_, rollout, _), told = network, recorded_rollout(golden), golden.told["fast"][name]
    expected = {key.removeprefix(f"{name}/"): x for key, x in golden.arrays("fast").items()
                if key.startswith(f"{name}/")}
    window = told["start"], told["start"] + told["win"]
    how = flow.Flow(golden.told["num_steps"], told["noise"], kind=told["kind"], window=told["win"], between=window)
    levels, noise = flow.levels(how, golden.told["shift"]), last(rollout["noise"])
    drawn, logps = jax.jit(lambda adapter: flow.sample(
        how, run_of(adapter, told["cfg"]), last(rollout["init_latents"]), levels, told["start"],
        lambda i: noise[:, i]))(adapters["lora"])
    np.testing.assert_allclose(first(drawn.latents), expected["window_latents"], atol=5e-4)
    np.testing.assert_allclose(first(drawn.final), expected["final_latents"], atol=5e-4)
    np.testing.assert_allclose(logps, expected["log_probs"], atol=2e-5)
    np.testing.assert_allclose(1000 * levels[slice(*window)], expected["timesteps"], rtol=1e-6)

    recorded = drawn.replace(latents=last(expected["window_latents"]))
    settings = types.SimpleNamespace(clip=told["clip"], beta=0.0, advantage_max=golden.told["adv_clip_max"],
                                     ratio="plain", kl="published")
    A, old = jnp.float32(rollout["advantages_global_std"]), types.SimpleNamespace(logps=expected["log_probs"])

    def loss(adapter):
        moves = flow.moves(how, run_of(adapter, told["cfg"]), recorded, levels)
        return flow.policy_loss(moves, old, None, A, settings)[0], (
            moves.logps, flow.ratios(moves, old), flow.decision_losses(moves, old, None, A, settings)[0])
    (_, (new, r, losses)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters["lora_step"])
    np.testing.assert_allclose(new, expected["new_log_prob"], atol=2e-5)
    np.testing.assert_allclose(r, expected["ratio"], atol=2e-5)
    np.testing.assert_allclose(losses.mean(axis=0), expected["policy_loss"], atol=2e-5)
    norms = {"total": golden.told["fast_grad_norms_total"][name]}
    assert assert_gradients(slope, {f"{name}/{key}": x for key, x in expected.items()}, name, norms)


def test_golden_bookkeeping(golden):
    compared = 0
    for case in golden.book["advantages"]:
        prompts = case["prompts"]
        order = sorted(range(len(prompts)), key=lambda i: prompts[i])
        sizes = {prompts.count(prompt) for prompt in prompts}
        if len(sizes) > 1 or sizes == {1}:
            continue                                   # here groups have one size, of at least two
        rewards = jnp.array([case["rewards"][i] for i in order])
        for name, over in (("global_std", "all"), ("group_std", "group")):
            found = objectives.group_advantages(rewards, sizes.copy().pop(), 1e-4, over, 0)
            np.testing.assert_allclose(found, [case[name][i] for i in order], atol=2e-5)
            compared += 1
    assert compared and golden.book["mixgrpo_windows"]
    for case in golden.book["mixgrpo_windows"]:
        told = case["settings"]
        overlap = told.get("prog_overlap")
        decay = {"decay": told["exp_decay_k"], "beyond": told["exp_decay_thre_timestep"]} if (
            told["sample_strategy"] == "exp_decay") else {}
        by = told["prog_overlap_step"] if overlap else told["group_size"]
        found = [flow.mix_window(i, told["group_size"], told["max_timesteps"], told["iters_per_group"], by,
                                 told["roll_back"], **decay)
                 for i in range(len(case["windows"]))]
        assert found == case["windows"]
    told, average = golden.book["ema"], jnp.float32(golden.book["ema"]["start"])
    for k, recorded in enumerate(told["average_after_step"], 1):
        average = flow.averaged(average, jnp.float32(k), k, told["update_step_interval"], told["decay"])
        np.testing.assert_allclose(average, recorded, rtol=1e-5)
