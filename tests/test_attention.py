"""Attention on a GPU: what cuDNN is handed. (JAX's own arithmetic stands in for it; on an H100 it gave the same.)"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.models import layers


@pytest.mark.parametrize("T, H, K, E, causal, padded", [
    (7, 4, 4, 8, True, True), (6, 4, 2, 8, True, True), (7, 2, 2, 16, False, False), (8, 2, 2, 16, False, False),
    (9, 4, 1, 8, False, True)])
def test_cudnn_is_handed_the_same_attention(monkeypatch, T, H, K, E, causal, padded):
    told = []

    def stand_in(*args, implementation, mask=None, **options):
        told.append((implementation, args[0].shape[1], mask is None or mask.shape[2:] == (args[0].shape[1],) * 2))
        return real(*args, mask=mask, implementation="xla", **options)

    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, T, heads, E)), jnp.float32) for heads in (H, K, K, H))
    real_ones = np.arange(T)[None] >= np.array([[2], [0]]) if padded else None                          # [B, T]
    mask = real_ones[:, None, :] if padded else None
    if causal:
        mask = mask & np.tril(np.ones((T, T), bool))
    weigh = (real_ones if padded else np.ones((2, T)))[:, :, None, None]           # what padding gets means nothing

    def outcome(attention):
        y, backward = jax.vjp(lambda *qkv: attention(*qkv) * weigh, q, k, v)
        return y, *backward(g * weigh)

    ours = outcome(functools.partial(layers.cudnn_attention, mask=mask, causal=causal))
    for found, expected in zip(ours, outcome(lambda *qkv: layers.attend(*qkv, mask))):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert told == [("cudnn", T + T % 2, True)]                         # even lengths, with a mask of all of them


def test_cudnn_serves_rows_in_half_precision_on_gpus(monkeypatch):
    shape = lambda T, E, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, 2, E), dtype)
    assert not layers.cudnn_serves(shape(8, 64))                                                    # of a CPU
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    assert layers.cudnn_serves(shape(8, 64)) and layers.cudnn_serves(shape(8, 72, jnp.float16))
    assert not any(map(layers.cudnn_serves, (
        shape(1, 64), shape(8, 64, jnp.float32), shape(8, 20), shape(8, 256))))
