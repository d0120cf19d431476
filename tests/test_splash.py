"""The TPU's attention kernel, interpreted step by step on the CPU, equals `layers.attention`; and who uses it."""
import contextlib
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax import sampling, sharding
from gvu_jax.families import qwen_sd35
from gvu_jax.models import flux, layers, splash, vae, xomni

EIGHT = "data:2,fsdp:2,tensor:2"
WIDE = xomni.Config(hidden_size=256, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=20, mm_vocab_size=12, image_vocab_size=8, num_mm_adap_layers=1,
                    num_mm_head_layers=0, remat="all")


def cpus(mesh):
    return jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext()


def tpus(sizes):
    """Traces and lowers for TPUs that are not there."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
        sizes, layers.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=device))


def padding(B, T):
    """[B, T] bool: rows padded on the left, on the right, not at all, on both sides, in turn."""
    return np.stack([(np.arange(T) >= left) & (np.arange(T) < T - right)
                     for left, right in ((7, 0), (0, 9), (0, 0), (5, 3))][:B])


def outcome(attend, B, T, H, K, real):
    """Results at real positions and the gradients by q, k, v of a loss over these."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (B, T, n, 128)) for key, n in zip(keys, (H, K, K, H)))

    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(q, k, v):
        y = jnp.where(real[:, :, None, None], attend(q, k, v), 0)
        return (y * weight).sum(), y
    return jax.jit(gradients)(q, k, v)


@pytest.mark.parametrize("B, T, H, K, causal, padded, mesh, over", [
    (3, 128, 2, 1, True, True, None, layers.BATCH),
    (1, 130, 2, 2, False, False, None, layers.BATCH),    # whole blocks only by padding
    (1, 520, 1, 1, True, False, None, layers.BATCH),     # more than one block
    (2, 128, 2, 1, True, True, EIGHT, layers.BATCH),     # neither `fsdp` nor `tensor` divides
    (8, 128, 2, 2, False, False, EIGHT, layers.AXES),    # rows over all of the mesh
])
def test_equals_plain_attention(B, T, H, K, causal, padded, mesh, over):
    real = padding(B, T) if padded else np.ones((B, T), bool)
    mask = real[:, None, :] & (np.tri(T, dtype=bool) if causal else True)
    expected = outcome(lambda q, k, v: layers.attention(q, k, v, mask), B, T, H, K, real)
    with cpus(mesh):
        found = outcome(lambda q, k, v: splash.attention(
            q, k, v, real if padded else None, causal, over, interpret=True), B, T, H, K, real)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_what_padding_holds_reaches_nothing():
    """Neither results nor gradients of real positions, whatever stands in the padding; and all stays finite."""
    real = padding(2, 128)

    def run(fill):
        def loss(x):
            x = jnp.where(real[:, :, None, None], x, fill)
            return jnp.where(real[:, :, None, None], splash.attention(x, x, x, real, True, interpret=True), 0).sum()
        return jax.value_and_grad(loss)(jax.random.normal(jax.random.key(0), (2, 128, 1, 128)))
    run = jax.jit(run)
    (loss, gradient), other = run(0.0), run(1e4)
    np.testing.assert_array_equal(loss, other[0])
    np.testing.assert_array_equal(gradient, other[1])
    assert np.isfinite(gradient).all() and np.abs(gradient[real]).min(axis=(-1, -2)).max() > 0


def test_the_backbone_under_a_mesh(monkeypatch):
    """Through scan, remat and shard_map on 8 devices, a prefill of more slots than it fills, and its gradient, equal
    those without kernel and mesh."""
    model, rng = xomni.XOmni(WIDE), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: xomni.init(WIDE, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(x.dtype), shapes)
    tokens, real = jax.random.randint(jax.random.key(1), (4, 24), 0, 28), padding(4, 24)
    slots = np.pad(real, ((0, 0), (0, 2)), constant_values=True)

    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        hidden, cache = model.apply({"params": params}, tokens, slots, None, model.empty_cache(4, 26, jnp.float32))
        hidden = jnp.where(real[:, :, None], hidden, 0)
        return jnp.sin(hidden).sum(), (hidden, jnp.where(slots[:, None, :, None], cache.v, 0))
    expected, calls, kernel = jax.jit(lambda p: gradient(p))(params), [], splash.attention
    monkeypatch.setattr(splash, "serves", lambda T, E: True)
    monkeypatch.setattr(splash, "attention", lambda *args, **kwargs: calls.append(args) or kernel(
        *args, **kwargs, interpret=True))
    with cpus(EIGHT):
        found = jax.jit(lambda p: gradient(p))(params)
    assert calls
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), found, expected)


# ------------------------------------------------------------------ the choice

def test_the_mesh_says_what_is_compiled_for():
    """One jitted function, traced for both: no scores on a TPU, and no kernel elsewhere."""
    table = flux.rotary_table(512, (36, 36), (16, 56, 56))
    grad = jax.jit(jax.grad(lambda q: flux.attend(q, q, q, table).astype(jnp.float32).sum()))
    q = jax.ShapeDtypeStruct((2, 1808, 4, 128), jnp.bfloat16)
    with tpus((1, 2, 2)):
        text = grad.trace(q).lower(lowering_platforms=("tpu",)).as_text()
        assert not splash.serves(1, 128) and not splash.serves(1808, 72)
    assert text.count("tpu_custom_call") == 3 and "1808x1808" not in text        # forward; by q; by k and v
    for context in (cpus(None), cpus(EIGHT)):
        with context:
            text = grad.lower(q).as_text()
            assert "custom_call" not in text.replace("@Sharding", "") and "256x1808" in text    # in blocks


def attentions(T, S, f, *args):
    """Which attention stands in f, over rows of T that read S slots, as traced for a TPU: "splash", or "plain" with a
    table of scores."""
    with tpus((1, 1, 1)):
        trace = str(jax.make_jaxpr(f)(*args))
    signs = {"splash": "name=splash_", "plain": rf"f32\[1,1,\d,{T},{S}\]"}
    return {name for name, sign in signs.items() if re.search(sign, trace)}


@pytest.mark.parametrize("change, mask, at, expected", [
    ({}, (1, 128), 0, "splash"), (dict(num_mm_head_layers=1), (1, 128), 0, "splash"),
    (dict(hidden_size=128), (1, 128), 0, "plain"), (dict(sliding_window=9), (1, 128), 0, "plain"),
    ({}, (1, 128, 128), 0, "plain"), ({}, (1, 160), 0, "splash"), ({}, (1, 160), 3, "plain")])
def test_where_the_backbone_uses_it(change, mask, at, expected):
    config = dataclasses.replace(WIDE, **change)
    params, model = jax.eval_shape(lambda: xomni.init(config, jax.random.key(0))), xomni.XOmni(config)

    def run(params):
        cache = None if mask[-1] == 128 else model.empty_cache(1, mask[-1], jnp.float32)
        return model.apply({"params": params}, jnp.zeros((1, 128), int), jnp.ones(mask, bool), None, cache, at)[0]
    assert attentions(128, mask[-1], run, params) == {expected}


def test_the_diffusion_head_uses_it():
    config = flux.Config(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=128,
                         num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False,
                         axes_dims_rope=(64, 32, 32), siglip_channels=0)
    params = jax.eval_shape(lambda: flux.init(config, jax.random.key(0)))
    run = lambda params: flux.FluxTransformer(config).apply(
        {"params": params}, jnp.zeros((1, 120, 4)), None, jnp.zeros((1, 16, 8)), jnp.zeros((1, 8)), jnp.ones(1),
        jnp.ones(1), (10, 12))
    assert attentions(136, 136, run, params) == {"splash"}


def test_the_vae_uses_it():
    block, x = vae.AttentionBlock(types.SimpleNamespace(norm_num_groups=8)), jnp.zeros((1, 12, 12, 128))
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    assert attentions(144, 144, lambda params: block.apply(params, x), params) == {"splash"}


def test_what_a_run_hands_to_it(tiny, monkeypatch):
    """Prefill, the policy's and the reader's forward; never a decode step, nor texts packed behind one picture."""
    _, umm, params = tiny
    prompts = jax.tree.map(jnp.asarray, umm.encode_prompts(["one red circle", "one green square"]))
    codes, seen = jnp.zeros((2, umm.image_tokens), int), jnp.zeros((2, *umm.grid), int)
    lengths = []

    def traced(f, *args):
        lengths.clear()
        jax.eval_shape(f, params, *args)
        return set(lengths)
    monkeypatch.setattr(splash, "serves", lambda T, E: T > 1)
    monkeypatch.setattr(splash, "attention", lambda q, k, v, real, causal: lengths.append(q.shape[1]) or q)
    P, N = prompts.tokens.shape[1], umm.image_tokens
    assert traced(lambda p: umm.sample_image(p, prompts, jax.random.key(0), sampling.How())) == {P}
    assert traced(lambda p: umm.image_logps(p, prompts, codes)) == {P + N - 1}
    assert len(traced(lambda p: umm.text_logps(p, seen, prompts))) == 1
    assert traced(lambda p: umm.text_logps(p, seen[:1], prompts)) == set()


def test_what_a_drawer_reads_of_padding_is_not_handed_to_it(monkeypatch):
    """Padding of UAE's chats reads the whole chat, which in segments of the kernel it could not."""
    umm, handed = qwen_sd35.published({}), []
    params = jax.eval_shape(umm.init, jax.random.key(0))
    tokens, mask = jnp.zeros((2, 128), int), jnp.arange(128) < jnp.array([[128], [40]])
    monkeypatch.setattr(splash, "serves", lambda T, E: True)
    monkeypatch.setattr(splash, "attention", lambda q, *args, **kwargs: handed.append(q.shape) or q)
    context = jax.eval_shape(umm.context, params, tokens, mask)
    assert context.shape == (2, 128, umm.dit.joint_attention_dim) and not handed
