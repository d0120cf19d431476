"""Attention on a GPU: what cuDNN is handed. (JAX's own arithmetic stands in for it; on an H100 it gave the same.)"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax import sharding
from gvu_jax.models import layers


@pytest.fixture
def handed(monkeypatch):
    """What cuDNN was handed: (implementation, queries, whether the mask was of all of them)."""
    told, real = [], jax.nn.dot_product_attention

    def stand_in(*args, implementation, mask=None, **options):
        shape = None if mask is None else (args[0].shape[0], 1, args[0].shape[1], args[1].shape[1])
        told.append((implementation, args[0].shape[1], mask is None or mask.shape == shape))
        return real(*args, mask=mask, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return told


MASKS = {                                                # of rows [2, T]; the first one's first two are padding
    "none": lambda T: None, "keys": lambda T: padding(T)[:, None], "causal": lambda T: padding(T)[:, None] & lower(T),
    "one for all": lambda T: lower(T)[None]}
padding = lambda T: np.arange(T)[None] >= np.array([[2], [0]])
lower = lambda T: np.tril(np.ones((T, T), bool))


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)], ids=str)
@pytest.mark.parametrize("T, H, K, mask, causal", [
    (7, 4, 4, "causal", True), (6, 4, 2, "causal", True), (7, 2, 2, "none", False), (8, 2, 2, "none", False),
    (9, 4, 1, "keys", False), (7, 4, 2, "one for all", False)])
def test_cudnn_is_handed_the_same_attention(handed, T, H, K, mask, causal, sizes):
    rng, mask = np.random.default_rng(0), MASKS[mask](T)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, T, heads, 8)), jnp.float32) for heads in (H, K, K, H))
    weigh = (padding(T) if mask is not None and len(mask) > 1 else np.ones((2, T)))[:, :, None, None]

    def outcome(attention):                                             # what padding gets means nothing
        y, backward = jax.vjp(lambda *qkv: attention(*qkv) * weigh, q, k, v)
        return y, *backward(g * weigh)

    expected = outcome(lambda *qkv: layers.attend(*qkv, mask))
    ours = lambda: outcome(functools.partial(layers.cudnn_attention, mask=mask, causal=causal))
    if sizes:
        with jax.set_mesh(sharding.make_mesh(sizes)):
            found = jax.jit(ours)()
    else:
        found = jax.jit(ours)()
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, atol=2e-6)
    assert handed == [("cudnn", T + T % 2, True)]                       # even lengths, with a mask of all of them


def test_cudnn_serves_rows_in_half_precision_on_gpus(monkeypatch):
    shape = lambda T, E, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, 2, E), dtype)
    assert not layers.cudnn_serves(shape(8, 64))                                                    # of a CPU
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    monkeypatch.setattr(layers, "has_cudnn", lambda: True)
    assert not layers.cudnn_serves(shape(8, 64))                        # eight devices, and nobody says who does what
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert layers.cudnn_serves(shape(8, 64)) and layers.cudnn_serves(shape(8, 72, jnp.float16))
    assert not any(map(layers.cudnn_serves, (
        shape(1, 64), shape(8, 64, jnp.float32), shape(8, 20), shape(8, 256))))
