"""Which weights an adapter covers, and its scale."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax import lora
from gvu_jax.models import layers

PARAMS = {"layers": {"q_proj": {"kernel": np.zeros((3, 8, 6)), "bias": np.zeros((3, 6))}}, "head": {"kernel": np.zeros((8, 5))},
          "embed": {"embedding": np.zeros((10, 8))}}


def test_targets_choose_kernels_and_tables_and_nothing_else():
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(lora.init(jax.random.key(0), PARAMS, 2, "q_proj")) == {"layers": {"q_proj": {"a": (3, 8, 2), "b": (3, 2, 6)}}}
    assert set(lora.init(jax.random.key(0), PARAMS, 2, "")) == {"layers", "head", "embed"}
    with pytest.raises(ValueError, match="v_proj"):
        lora.init(jax.random.key(0), PARAMS, 2, "v_proj")


def test_the_scale_enters_once():
    adapter = jax.tree.map(lambda x: x + 1.0, lora.init(jax.random.key(0), PARAMS, 2, "head"))
    scaled = lora.scaled(adapter, 4.0)["head"]
    np.testing.assert_array_equal(scaled["a"], adapter["head"]["a"])
    np.testing.assert_array_equal(scaled["b"], 4.0 * adapter["head"]["b"])


def test_the_wide_half_has_the_gradients_of_its_product():
    rng = np.random.default_rng(0)
    x, b, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 5, 2), (2, 7), (3, 5, 7)))
    for ours, plain in zip(jax.vjp(layers.widen, x, b)[1](g), jax.vjp(jnp.matmul, x, b)[1](g)):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-6)
    halves = jax.vjp(layers.widen, x.astype(jnp.bfloat16), b.astype(jnp.bfloat16))[1](g.astype(jnp.bfloat16))
    assert [half.dtype for half in halves] == [jnp.bfloat16] * 2
