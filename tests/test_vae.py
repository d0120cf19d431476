"""The autoencoder against diffusers on random weights, and against the recorded values of the reference."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import assert_same_picture
from gvu_jax.models import vae

TINY = [
    vae.Config(latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
               scaling_factor=0.5, shift_factor=0.1),
    vae.Config(latent_channels=3, block_out_channels=(8, 12), layers_per_block=2, norm_num_groups=4,
               scaling_factor=0.5, shift_factor=0.1),
    vae.Config(latent_channels=16, block_out_channels=(4, 8, 8, 16), layers_per_block=1, norm_num_groups=4,
               scaling_factor=0.3611, shift_factor=0.1159),
]


def to_channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


# ------------------------------------------------------------------ against diffusers

def torch_model(config, seed=0):
    """diffusers' autoencoder with every parameter, norms included, drawn at random."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    levels = len(config.block_out_channels)
    fields = {name: value for name, value in vars(config).items()}
    model = diffusers.AutoencoderKL(**fields, down_block_types=("DownEncoderBlock2D",) * levels,
                                    up_block_types=("UpDecoderBlock2D",) * levels,
                                    use_quant_conv=False, use_post_quant_conv=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", TINY, ids=lambda config: f"{len(config.block_out_channels)}-levels")
def test_equals_diffusers(config):
    torch = pytest.importorskip("torch")
    theirs, tensors = torch_model(config)
    params, ours, side = vae.from_torch(tensors, config), vae.AutoencoderKL(config), config.downscale
    pixels = np.random.default_rng(0).random((2, 2 * side, 4 * side, 3), np.float32)
    latents = np.random.default_rng(1).standard_normal((2, 2, 4, config.latent_channels), np.float32)
    mean, log_variance = jax.jit(lambda x: ours.apply({"params": params}, x, method="encode"))(pixels)
    raw = jax.jit(lambda x: ours.apply({"params": params}, x, method="decode"))(latents)
    assert raw.shape == pixels.shape
    with torch.no_grad():
        moments = theirs.encoder(torch.from_numpy(to_channels_first(pixels) * 2 - 1)).numpy()
        decoded = theirs.decode(torch.from_numpy(to_channels_first(latents))).sample.numpy()
    np.testing.assert_allclose(to_channels_first(jnp.concatenate([mean, log_variance], -1)), moments, atol=5e-4)
    np.testing.assert_allclose(to_channels_first(raw), decoded, atol=5e-4)


def test_group_norm_of_faint_channels():
    """Where the variance is as small as the epsilon it says how much is left: torch's with the epsilon of diffusers."""
    torch = pytest.importorskip("torch")
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 3, 5, 8)).astype(np.float32)
    scale, bias = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    ours = vae.GroupNorm(4).apply({"params": {"scale": scale, "bias": bias}}, x)
    theirs = torch.nn.functional.group_norm(
        torch.from_numpy(to_channels_first(x)), 4, torch.from_numpy(scale), torch.from_numpy(bias), eps=1e-6)
    np.testing.assert_allclose(to_channels_first(ours), theirs.numpy(), atol=1e-4)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def golden(fixtures):
    """(config, params, expected), every size from the fixture's own files."""
    folder = fixtures / "flux"
    described = json.loads((folder / "base/vae/config.json").read_text())
    config = vae.Config(**{name: tuple(described[name]) if isinstance(described[name], list) else described[name]
                           for name in vae.Config.__dataclass_fields__})
    tensors = load_file(folder / "base/vae/diffusion_pytorch_model.safetensors")
    return config, vae.from_torch(tensors, config), np.load(folder / "expected.npz")


def decode(config, params, latents):
    run = jax.jit(lambda x: vae.AutoencoderKL(config).apply({"params": params}, x, method="decode"))
    return run(latents)


def test_decode(golden):
    config, params, expected = golden
    raw = decode(config, params, np.moveaxis(expected["vae_latent"], 1, -1))
    np.testing.assert_allclose(to_channels_first(raw), expected["vae_decoded"], atol=5e-4)


def test_from_diffusion_latents_to_picture(golden):
    config, params, expected = golden
    latents = vae.from_latents(np.moveaxis(expected["loop_unpacked"], 1, -1), config)
    raw = decode(config, params, latents)
    np.testing.assert_allclose(to_channels_first(raw), expected["loop_vae_raw"], atol=5e-4)
    pixels = np.asarray(vae.to_pixels(raw))
    np.testing.assert_allclose(pixels, expected["image_float"], atol=5e-4)
    assert_same_picture(pixels[0], expected)


# ------------------------------------------------------------------ contracts

def test_scaling_there_and_back():
    mean = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(vae.to_latents(mean, TINY[1]), (mean - 0.1) * 0.5, atol=1e-6)
    np.testing.assert_allclose(vae.from_latents(vae.to_latents(mean, TINY[1]), TINY[1]), mean, atol=1e-6)


def test_bfloat16_in_bfloat16_out():
    config, normal = TINY[1], np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.shape), jnp.bfloat16), shapes)
    raw = jax.jit(vae.AutoencoderKL(config).apply)({"params": params}, jnp.ones((1, 4, 6, 3), jnp.bfloat16))
    assert raw.shape == (1, 4, 6, 3) and raw.dtype == jnp.bfloat16


def test_sides_must_be_multiples_of_the_downscale():
    with pytest.raises(ValueError, match="multiples of 2"):
        vae.AutoencoderKL(TINY[1]).apply({"params": {}}, jnp.ones((1, 4, 5, 3)), method="encode")


@pytest.mark.parametrize("damage, key", [
    (lambda tensors: tensors.pop("decoder.up_blocks.1.resnets.2.conv1.bias"), r"missing.*up_blocks\.1\.resnets\.2"),
    (lambda tensors: tensors.update({"quant_conv.weight": np.zeros(1)}), r"unknown.*quant_conv\.weight"),
    (lambda tensors: tensors.update({"encoder.conv_in.weight": np.zeros((8, 3, 1, 1))}), r"encoder\.conv_in\.weight"),
])
def test_checkpoint_errors_name_the_key(damage, key):
    _, tensors = torch_model(TINY[1])
    damage(tensors)
    with pytest.raises(ValueError, match=key):
        vae.from_torch(tensors, TINY[1])
