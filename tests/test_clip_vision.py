"""CLIP's image tower against transformers on random weights, and against the recorded values of Unified-Bench."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.described import Described
from gvu_jax.models import clip_vision

TINY = [clip_vision.Config(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
                           image_size=12, patch_size=4, projection_dim=10),
        clip_vision.Config(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=1,
                           image_size=10, patch_size=5, projection_dim=18, hidden_act="gelu", layer_norm_eps=1e-6)]


@pytest.mark.parametrize("config", TINY, ids=["quick_gelu", "gelu"])
def test_equals_transformers(config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vars(config))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    params = clip_vision.from_torch({name: x.numpy() for name, x in model.state_dict().items()}, config)
    x = np.random.default_rng(0).standard_normal((3, config.image_size, config.image_size, 3)).astype(np.float32)
    ours = jax.jit(clip_vision.ClipVision(config).apply)({"params": params}, x)
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).image_embeds
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)


@pytest.mark.parametrize("size, side", [((24, 32), 32), ((7, 9), 20), ((50, 41), 12), ((16, 16), 16)])
def test_pictures_are_squared_as_torch_does(size, side):
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).random((2, *size, 3), np.float32)
    # In double, for torch finds the places of its float32 weights in float32 as well.
    theirs = torch.nn.functional.interpolate(torch.from_numpy(np.moveaxis(pixels, -1, 1).astype(float)), (side, side),
                                             mode="bicubic", align_corners=False)
    np.testing.assert_allclose(np.moveaxis(np.asarray(clip_vision.squared(jnp.array(pixels), side)), -1, 1),
                               theirs.numpy(), atol=2e-6)


def read(folder):
    """(config, params in float32) of a folder of CLIP's."""
    from safetensors.numpy import load_file
    told = Described(folder / "config.json").a(dict, "vision_config")
    config = told.numbers(clip_vision.Config)
    params = clip_vision.from_torch(load_file(folder / "model.safetensors"), config)
    return config, jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def test_golden_features(fixtures):
    folder = fixtures / "uae/uae/bench"
    expected, (config, params) = np.load(folder / "expected.npz"), read(folder / "clip")
    run = jax.jit(lambda x: clip_vision.ClipVision(config).apply({"params": params}, x))
    found = {which: run(np.moveaxis(expected[f"clip_pixels_{which}"], 1, -1)) for which in ("ref", "gen")}
    for which, features in found.items():
        np.testing.assert_allclose(features, expected[f"clip_features_{which}"], atol=2e-4)
    np.testing.assert_allclose(clip_vision.cosine(*found.values()), expected["clip_similarity"], atol=1e-4)
