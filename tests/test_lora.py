"""Which weights an adapter covers, and its scale."""
import jax
import numpy as np
import pytest

from gvu_jax import lora

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
