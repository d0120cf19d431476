"""MAGVIT-v2 against the golden data, against VQ-16's blocks of transformers, and its contracts."""
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.described import Described
from gvu_jax.families.showo import magvit_config
from gvu_jax.models import magvit, torch_keys, vq
from gvu_jax.tensor_files import weight_files

TINY = magvit.Config(bits=5, encoder_channels=32, encoder_multipliers=(1, 2), encoder_blocks=(1, 2),
                     decoder_channels=32, decoder_multipliers=(2, 1), decoder_blocks=(2, 1))


@pytest.fixture(scope="module")
def golden(fixtures):
    """config, params, arrays and what was told."""
    folder = fixtures / "showo_magvit"
    config = magvit_config(Described(folder / "config.json"))
    tensors = {name: file.read(name) for file in weight_files(folder) for name in file.specs}
    told = json.loads((fixtures / "showo/expected/expected.json").read_text())
    return config, magvit.from_torch(tensors, config), np.load(fixtures / "showo/expected/magvit.npz"), told


def call(config, params, method, x, *more):
    run = jax.jit(lambda params, x: magvit.Magvit(config).apply({"params": params}, x, *more, method=method))
    return run(params, x)


def test_golden_codes_and_pictures(golden):
    config, params, expected, told = golden
    count, stack = len(told["images"]), lambda name: np.stack([expected[f"{name}_{i}"] for i in range(count)])
    pixels = np.moveaxis(stack("pixels"), 1, -1) / 2 + 0.5
    latents = call(config, params, "latents", pixels)
    np.testing.assert_allclose(np.moveaxis(latents, -1, 1), stack("latent"), atol=5e-4)
    np.testing.assert_array_equal(call(config, params, "encode", pixels), stack("codes"))
    grid = latents.shape[1:3]
    raw = call(config, params, "decode", stack("codes"), grid)
    np.testing.assert_allclose(np.moveaxis(raw, -1, 1), stack("decoded"), atol=5e-4)
    bytes_of = np.round(np.asarray(vq.to_pixels(raw)) * 255).astype(int)
    away = np.abs(bytes_of - stack("image_uint8"))
    assert away.max() <= 1 and (away > 0).mean() <= 1e-3


def test_golden_pictures_that_are_no_squares(golden):
    config, params, expected, _ = golden
    pixels = np.moveaxis(expected["rect_pixels"][None], 1, -1) / 2 + 0.5
    latents = call(config, params, "latents", pixels)
    np.testing.assert_allclose(np.moveaxis(latents[0], -1, 0), expected["rect_latent"], atol=5e-4)
    np.testing.assert_array_equal(magvit.quantise(latents)[0], expected["rect_codes"])
    codes = expected["grid_codes"]
    raw = call(config, params, "decode", codes.reshape(1, -1), codes.shape)
    np.testing.assert_allclose(np.moveaxis(raw[0], -1, 0), expected["grid_decoded"], atol=5e-4)


def test_a_code_is_the_signs_of_its_channels(golden):
    *_, told = golden
    config = golden[0]
    assert config.codebook_size == told["codebook_size"]
    codes = np.arange(config.codebook_size)
    signs = np.asarray(magvit.vectors(codes, config.bits))
    np.testing.assert_array_equal(signs, [[1 if digit == "1" else -1 for digit in f"{code:0{config.bits}b}"]
                                          for code in codes])
    np.testing.assert_array_equal(magvit.quantise(jnp.asarray(signs)[None, None])[0], codes)
    first = np.zeros((1, 1, 1, config.bits), np.float32)                   # zero counts as no bit
    first[..., 0] = 1e-3
    assert magvit.quantise(jnp.asarray(first))[0, 0] == told["code_of_zero_case"]


def test_full_size():
    shapes = jax.eval_shape(lambda: magvit.init(magvit.Config(), jax.random.key(0)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 1) == 95.4
    pixels = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    codes, raw = jax.eval_shape(
        lambda params, pixels: magvit.Magvit(magvit.Config()).apply({"params": params}, pixels), shapes, pixels)
    assert codes.shape == (2, 256) and raw.shape == pixels.shape and magvit.Config().codebook_size == 8192


@pytest.mark.parametrize("changes, said", [(dict(encoder_blocks=(1,)), "as many levels"), (dict(bits=40), "1 to 30")])
def test_sizes_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **changes)


def test_checkpoint_errors_name_the_key():
    shapes = jax.eval_shape(lambda: magvit.init(TINY, jax.random.key(0)))
    tensors = torch_keys.to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), magvit.RULES)
    magvit.from_torch({**tensors, "quantize.power_vals": np.zeros(5)}, TINY)
    name = "decoder.up.0.block.1.conv2.weight"
    without = {k: v for k, v in tensors.items() if k != name}
    for message, spoilt in {"missing keys": without, "key": {**tensors, name: np.zeros((32, 32))},
                            "unknown keys": {**tensors, f"{name}s": np.zeros(1)}}.items():
        with pytest.raises(ValueError, match=message + ".*" + re.escape(name)):
            magvit.from_torch(spoilt, TINY)
