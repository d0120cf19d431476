"""VQ-16 against the golden data, and against transformers' on random weights."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.models import torch_keys, vae, vq

TINY = vq.Config(codebook_size=11, codebook_dim=6, z_channels=8, channels=32, multipliers=(1, 2), res_blocks=1)


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def bytes_of(pixels):
    """[B, H, W, 3] in [0, 1] on the grid of 8 bits -> the bytes."""
    np.testing.assert_allclose(np.asarray(pixels) * 255, np.round(np.asarray(pixels) * 255), atol=1e-4)
    return np.round(np.asarray(pixels) * 255).astype(np.uint8)


# ------------------------------------------------------------------ against the fixture

def everything_of(janus, method, x, *more):
    """What `method` gives, and what each of its modules gave, by path."""
    model, variables = vq.VQ(janus.configs["vq"]), {"params": janus.params["vq"]}
    result, state = jax.jit(lambda x: model.apply(
        variables, x, *more, method=method, capture_intermediates=True, mutable=["intermediates"]))(x)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["intermediates"]):
        names = [key.key for key in path if hasattr(key, "key")]
        if names[-1] == "__call__":
            found["/".join(names[:-1])] = leaf
    return result, found


def test_golden_decode_at_every_step(janus):
    expected, config = janus.arrays("vq"), janus.configs["vq"]
    codes, grid = expected["decode_codes"], expected["decode_quant"].shape[2:]
    decoded, found = everything_of(janus, "decode", codes, grid)
    found["quant"] = vq.VQ(config).apply({"params": janus.params["vq"]}, codes, grid, method="vectors")
    steps = {"decode_quant": "quant", "post_quant_conv": "post_quant_conv", "decoder_conv_in": "decoder/conv_in",
             "decoder_mid_0": "decoder/mid_block/resnets_0", "decoder_mid_1": "decoder/mid_block/attentions_0",
             "decoder_mid_2": "decoder/mid_block/resnets_1",
             "decoder_level0_last_res": f"decoder/up_blocks_0/resnets_{config.res_blocks}"}
    for name, path in steps.items():
        np.testing.assert_allclose(channels_first(found[path]), expected[name], atol=5e-4)
    np.testing.assert_allclose(channels_first(decoded), expected["decoded"], atol=5e-4)


def test_golden_encode_at_every_step(janus):
    expected, config = janus.arrays("vq"), janus.configs["vq"]
    model, params, grid = vq.VQ(config), janus.params["vq"], expected["pre_quant"].shape[2:]
    pixels = channels_last(expected["encode_images"]) / 2 + 0.5
    projected, found = everything_of(janus, "project", pixels)
    steps = {"encoder_mid_0": "mid_block/resnets_0", "encoder_mid_1": "mid_block/attentions_0",
             "encoder_mid_2": "mid_block/resnets_1", "encoder_out": "conv_out"}
    for name in expected:
        if level := re.fullmatch(r"encoder_level(\d+)_downsample", name):
            steps[name] = f"down_blocks_{level[1]}/downsamplers_0"
    assert len(steps) > 4 or len(config.multipliers) == 1
    for name, path in steps.items():
        np.testing.assert_allclose(channels_first(found[f"encoder/{path}"])[:1], expected[name], atol=5e-4)
    np.testing.assert_allclose(channels_first(projected), expected["pre_quant"], atol=5e-4)

    codes = model.apply({"params": params}, projected, method="quantise")
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected["encode_codes"])
    # transformers compares vectors and rows as they are, a known difference: its codes are others.
    away = np.sum((np.asarray(projected)[..., None, :] - params["codebook"]) ** 2, axis=-1)
    theirs = np.load(janus.folder.with_name("janus_hf") / "expected/outputs.npz")
    np.testing.assert_array_equal(np.argmin(away, axis=-1).reshape(codes.shape), theirs["vq_encode_codes_hf"])
    distances = 2 - 2 * np.asarray(vq.cosines(projected, params["codebook"])).reshape(*codes.shape, -1)     # [B, N, K]
    np.testing.assert_allclose(distances[:1], expected["encode_distances"], atol=5e-4)
    np.testing.assert_allclose(np.sort(distances)[..., :2], expected["encode_distance_top2"], atol=5e-4)
    quant = model.apply({"params": params}, codes[:1], grid, method="vectors")
    np.testing.assert_allclose(channels_first(quant), expected["encode_quant"], atol=5e-4)
    again, raw = jax.jit(lambda pixels: model.apply({"params": params}, pixels))(pixels[:1])
    np.testing.assert_array_equal(again, codes[:1])
    np.testing.assert_allclose(channels_first(raw), expected["reconstructed"], atol=5e-4)


def test_golden_pictures(janus):
    """Greedy codes -> raw pixels -> bytes, which are cut."""
    expected = janus.arrays("generate")
    codes = np.concatenate([expected["greedy_codes_cfg5"], expected["greedy_codes_cfg5_prompt2"]])
    raw = jax.jit(lambda codes: vq.VQ(janus.configs["vq"]).apply(
        {"params": janus.params["vq"]}, codes, (janus.cases["generate"]["grid"],) * 2, method="decode"))(codes)
    np.testing.assert_allclose(channels_first(raw[:1]), expected["decoded_cfg5"], atol=5e-4)
    theirs = np.load(janus.folder.with_name("janus_hf") / "expected/outputs.npz")["decoded"]
    np.testing.assert_allclose(channels_first(raw[:1]), theirs, atol=5e-4)
    drawn = bytes_of(vq.to_pixels(raw))
    recorded = np.concatenate([expected["uint8_cfg5"], expected["uint8_cfg5_prompt2"]])
    exact = np.clip((np.asarray(raw) + 1) / 2 * 255, 0, 255)
    on_a_boundary = np.abs(exact - np.round(exact)) < 5e-4 * 255 / 2
    np.testing.assert_array_equal(drawn[~on_a_boundary], recorded[~on_a_boundary])
    assert np.abs(drawn.astype(int) - recorded).max() <= 1
    np.testing.assert_array_equal(recorded, janus.arrays("reward")["pictures_uint8"])


def test_golden_block_with_two_channels_in_a_group(janus):
    expected = janus.arrays("vq_blocks")
    tensors = {name: array.astype(np.float32) for name, array in expected.items() if name.startswith("res.")}
    x = channels_last(expected["x"]).astype(np.float32)
    block = vae.ResnetBlock(janus.configs["vq"], expected["res_out"].shape[1])
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x))["params"]
    params = torch_keys.to_params(tensors, shapes, ((r"conv_shortcut", "nin_shortcut"), (r"^", "res.")))
    np.testing.assert_allclose(channels_first(block.apply({"params": params}, x)), expected["res_out"], atol=5e-4)


# ------------------------------------------------------------------ against transformers

def theirs_of(config, grid, seed=0):
    """transformers' VQ-VAE with every parameter drawn at random, and its tensors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusVQVAE
    model = JanusVQVAE(transformers.JanusVQVAEConfig(
        embed_dim=config.codebook_dim, num_embeddings=config.codebook_size, latent_channels=config.z_channels,
        base_channels=config.channels, channel_multiplier=list(config.multipliers), num_res_blocks=config.res_blocks,
        num_patches=grid)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, {f"model.vqmodel.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config", [
    TINY, vq.Config(codebook_size=20, codebook_dim=4, z_channels=16, channels=32, multipliers=(2, 1, 3), res_blocks=2)],
    ids=lambda config: f"{len(config.multipliers)}-levels")
def test_equals_transformers(config):
    """A known difference, not copied: theirs compares vectors and rows as they are when it encodes. So its codebook is
    given rows of length 1, where both find the same."""
    torch, side = pytest.importorskip("torch"), 3
    theirs, tensors = theirs_of(config, side)
    with torch.no_grad():
        rows = theirs.quantize.embedding.weight
        rows.copy_(torch.nn.functional.normalize(rows))
    params, ours = vq.from_torch(tensors, config, "transformers"), vq.VQ(config)
    pixels = np.random.default_rng(0).random((2, side * config.downscale, side * config.downscale, 3), np.float32)
    codes = np.random.default_rng(1).integers(0, config.codebook_size, (2, side * side))
    with torch.no_grad():
        encoded = theirs.encode(torch.from_numpy(channels_first(pixels) * 2 - 1)).image_tokens.numpy()
        decoded = theirs.decode(torch.from_numpy(codes)).numpy()
    raw = jax.jit(lambda codes: ours.apply({"params": params}, codes, (side, side), method="decode"))(codes)
    np.testing.assert_allclose(channels_first(raw), decoded, atol=5e-4)
    found = jax.jit(lambda pixels: ours.apply({"params": params}, pixels, method="encode"))(pixels)
    np.testing.assert_array_equal(found, encoded.reshape(2, -1))
    assert len(set(encoded.ravel().tolist())) > 1


def test_full_size():
    """The sizes that VQ-16 means: the parameters of transformers' at its defaults, and shapes of a picture of 384."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusVQVAE
    with torch.device("meta"):
        theirs = JanusVQVAE(transformers.JanusVQVAEConfig())
    config = vq.Config(codebook_size=16384, codebook_dim=8)
    shapes = jax.eval_shape(lambda: vq.init(config, jax.random.key(0)))
    found = {f"model.vqmodel.{name}": tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    torch_keys.places(found, shapes, vq.RULES["transformers"])               # each key, in its shape
    pixels = jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.float32)
    codes, raw = jax.eval_shape(lambda params, pixels: vq.VQ(config).apply({"params": params}, pixels), shapes, pixels)
    assert codes.shape == (2, 576) and raw.shape == (2, 384, 384, 3)


# ------------------------------------------------------------------ contracts

def test_ties_go_to_the_first_code():
    codebook = np.zeros((11, 6), np.float32)
    codebook[4, 0], codebook[7, 0], codebook[2, 1] = 1.0, 5.0, 1.0           # 4 and 7 point the same way
    projected = jnp.zeros((1, 1, 2, 6)).at[0, 0, 0, 0].set(3.0).at[0, 0, 1, 1].set(0.1)
    found = vq.VQ(TINY).apply({"params": {"codebook": codebook}}, projected, method="quantise")
    np.testing.assert_array_equal(found, [[4, 2]])


def test_pixels_are_cut_to_bytes():
    raw = jnp.array([-2, -1, 0, 1, 3, 2 * 99.99 / 255 - 1])
    np.testing.assert_allclose(vq.to_pixels(raw) * 255, [0, 0, 127, 255, 255, 99], atol=1e-4)


def test_sides_must_be_multiples_of_the_downscale():
    with pytest.raises(ValueError, match="multiples of 2"):
        vq.VQ(TINY).apply({"params": {"codebook": jnp.ones((11, 6))}}, jnp.ones((1, 4, 5, 3)), method="encode")


@pytest.mark.parametrize("layout", vq.RULES)
def test_checkpoint_errors_name_the_key(layout):
    shapes = jax.eval_shape(lambda: vq.init(TINY, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = torch_keys.to_torch(params, vq.RULES[layout])
    used = {"gen_vision_model.quantize.codebook_used": np.zeros(4)}
    vq.from_torch({**tensors, **used}, TINY, layout)
    name = next(name for name in tensors if "attn" in name and name.endswith("k.weight"))
    without = {k: v for k, v in tensors.items() if k != name}
    for message, spoilt in {"missing keys": without, "key": {**tensors, name: np.zeros((32, 32))},
                            "unknown keys": {**tensors, f"{name}s": np.zeros(1)}}.items():
        with pytest.raises(ValueError, match=message + ".*" + re.escape(name)):
            vq.from_torch(spoilt, TINY, layout)
