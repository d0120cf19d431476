"""What Janus-Pro reads pictures with: the image transform and SigLIP's tower, against the golden data."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gvu_jax.models import llama, siglip, torch_keys

TINY = siglip.Config(width=32, layers=2, heads=2, mlp_hidden=48, patch_size=4, pos_table_side=3)


class Bare(siglip.Config):
    """The tower as it is before its final norm."""
    final_norm = False


def transform_of(folder):
    described = json.loads((folder / "preprocessor_config.json").read_text())
    return siglip.Transform(described["image_size"], described["min_size"])


def channels_last(x):
    return np.moveaxis(x, -3, -1)


# ------------------------------------------------------------------ against the fixture

def test_golden_image_transform(janus):
    expected, transform = janus.arrays("image_transform"), transform_of(janus.folder)
    cases = janus.cases["image_transform"]["cases"]
    for i, case in enumerate(cases):
        size = siglip.fitted_size(case["width"], case["height"], transform)
        assert size == (case["resized_height"], case["resized_width"]), case
        with Image.open(janus.folder / f"images/image_{i}.png") as image:
            fitted = siglip.fit_image(image, transform)
        assert fitted.dtype == np.float32
        np.testing.assert_array_equal(fitted * 255, channels_last(expected[f"square_{i}"]))
        if f"pixels_{i}" in expected:
            pixels = siglip.centred(fitted[None], janus.configs["vision"].patch_size)[0]
            np.testing.assert_allclose(pixels, channels_last(expected[f"pixels_{i}"]), atol=1e-6)
    assert cases and set(janus.cases["image_transform"]["background"]) == {siglip.BACKGROUND}


def test_golden_tower(janus):
    """Features, what the aligner makes of them, and every step before: a tower cut after k blocks ends where block k-1
    does."""
    expected, config, params = janus.arrays("vision"), janus.configs["vision"], janus.params["vision"]
    squares = janus.arrays("image_transform")
    pixels = np.stack([channels_last(squares[f"square_{i}"]) for i in expected["pixels_index"]]) / np.float32(255)
    features, state = jax.jit(lambda pixels: siglip.VisionTransformer(config).apply(
        {"params": params}, pixels, method="features", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "patch_embed"))(pixels)
    patches = state["intermediates"]["patch_embed"]["__call__"][0]
    np.testing.assert_allclose(patches.reshape(features.shape), expected["patch_embed"], atol=5e-4)
    np.testing.assert_allclose(features, expected["features"], atol=5e-4)
    aligned = llama.Llama(janus.configs["ar"]).apply({"params": janus.params["ar"]}, features, method="align")
    np.testing.assert_allclose(aligned, expected["aligned"], atol=5e-4)
    for depth, name in enumerate(["plus_position", *(f"block_{k}" for k in range(config.layers))]):
        cut = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])}
        tower = siglip.VisionTransformer(Bare(**{**vars(config), "layers": depth}))
        found = jax.jit(lambda pixels: tower.apply({"params": cut}, pixels, method="features"))(pixels)
        np.testing.assert_allclose(found, expected[name], atol=5e-4)


# ------------------------------------------------------------------ contracts

def test_pictures_become_grey_bordered_squares():
    transform = siglip.Transform(image_size=8, min_size=2)
    fitted = siglip.fit_image(Image.new("L", (40, 20), 255), transform)
    assert fitted.shape == (8, 8, 3)
    np.testing.assert_allclose(fitted[[0, 1, 6, 7]], 127 / 255, atol=1e-6)
    np.testing.assert_array_equal(fitted[2:6], 1)
    assert siglip.fitted_size(1000, 3, transform) == (2, 8)                  # no thinner than min_size
    assert siglip.fitted_size(53, 37, siglip.Transform(80, 14)) == (55, 80)  # 55.8, cut


def test_bfloat16_in_bfloat16_out():
    normal = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: siglip.init(TINY, jax.random.key(0)))
    half = jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.shape), jnp.bfloat16), shapes)
    run = lambda pixels: siglip.VisionTransformer(TINY).apply({"params": half}, pixels, method="features")
    features = jax.jit(run)(jnp.ones((2, 12, 12, 3)))
    assert features.shape == (2, 9, 32) and features.dtype == jnp.bfloat16


def test_sides_must_be_whole_patches():
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        siglip.centred(np.ones((1, 8, 10, 3)), TINY.patch_size)


def test_the_pooling_head_is_passed_over_and_nothing_else():
    shapes = jax.eval_shape(lambda: siglip.init(TINY, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    for layout, rules in siglip.RULES.items():
        tensors = torch_keys.to_torch(params, rules)
        assert jax.tree.map(jnp.shape, siglip.from_torch(tensors, TINY, layout)) == jax.tree.map(jnp.shape, params)
        name = next(name for name in tensors if re.search(r"1\..*(qkv|k_proj)\.weight", name))
        with pytest.raises(ValueError, match="missing keys .*" + re.escape(name)):
            siglip.from_torch({k: v for k, v in tensors.items() if k != name}, TINY, layout)
        with pytest.raises(ValueError, match="key " + re.escape(name)):
            siglip.from_torch({**tensors, name: np.zeros((32, 33))}, TINY, layout)
    tensors = torch_keys.to_torch(params, siglip.RULES["published"])
    siglip.from_torch({**tensors, "vision_model.vision_tower.attn_pool.q.weight": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"unknown keys .*head\.weight"):
        siglip.from_torch({**tensors, "vision_model.vision_tower.head.weight": np.zeros(1)}, TINY)
