"""The image tokenizer against the recorded values of the reference implementation, and its own contracts."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from gvu_jax.models import siglip_vq, torch_keys

TINY = siglip_vq.Config(width=32, layers=2, heads=2, mlp_hidden=48, patch_size=4, pos_table_side=3, codebook_size=11,
                        codebook_dim=6, z_channels=32)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "siglip_vq"


@pytest.fixture(scope="module")
def golden(folder):
    """(config, params, model, described, expected), every size from the fixture's own files."""
    torch = pytest.importorskip("torch")
    described = json.loads((folder / "config.json").read_text())
    names = ("width", "layers", "heads", "mlp_hidden", "patch_size", "pos_table_side")
    config = siglip_vq.Config(
        **{name: described["siglip_config"][name] for name in names}, groups=described["groupnorm_groups"],
        **{name: described[name] for name in ("codebook_size", "codebook_dim", "z_channels")})
    vit, projector = ({name: tensor.numpy() for name, tensor in torch.load(folder / file, weights_only=True).items()}
                      for file in ("siglip_vit.pt", "vq_projector.pt"))
    params = siglip_vq.from_torch(vit, projector, config)
    return config, params, siglip_vq.SiglipVQ(config), described, dict(np.load(folder / "expected.npz"))


def transform_of(described):
    names = ("short_size", "long_size", "patch_size", "min_short_size", "max_aspect_ratio")
    return siglip_vq.Transform(**{name: described["transform"][name] for name in names})


def channels_last(x):
    return np.moveaxis(x, -3, -1)


def test_picture_to_latents(golden, folder):
    config, params, model, described, expected = golden

    def everything(model, pixels):
        projected = model.project(pixels)
        tokens = model.encode(pixels)
        return model.features(pixels), projected, tokens, model.decode(tokens, projected.shape[1:3])

    run = jax.jit(lambda pixels: model.apply({"params": params}, pixels, method=everything))
    pictures = sorted((folder / "images").glob("image_*.png"), key=lambda path: int(path.stem.split("_")[1]))
    assert pictures
    for i, picture in enumerate(pictures):
        fitted = siglip_vq.fit_image(Image.open(picture), transform_of(described))
        np.testing.assert_allclose(fitted * 2 - 1, channels_last(expected[f"pixels_{i}"]), atol=1e-6)
        features, projected, tokens, latents = run(fitted[None])
        np.testing.assert_allclose(features, expected[f"features_{i}"], atol=5e-4)
        np.testing.assert_allclose(projected, channels_last(expected[f"pre_quant_{i}"]), atol=5e-4)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, expected[f"tokens_{i}"].reshape(1, -1))
        np.testing.assert_allclose(latents, channels_last(expected[f"latents_{i}"]), atol=5e-4)


def test_each_block(golden):
    """A tower cut after n blocks ends where the reference's n-th block does."""
    config, params, _, _, expected = golden
    pixels = channels_last(expected["pixels_1"])[None]
    for n, after_block in enumerate(expected["vit_blocks_1"], start=1):
        cut = {**params["vit"], "blocks": jax.tree.map(lambda leaf: leaf[:n], params["vit"]["blocks"])}
        tower = siglip_vq.VisionTransformer(siglip_vq.Config(**{**vars(config), "layers": n}))
        np.testing.assert_allclose(tower.apply({"params": cut}, pixels), after_block, atol=5e-4)


def test_decode_of_random_codes(golden):
    _, params, model, _, expected = golden
    codes = expected["grid_tokens"]
    latents = model.apply({"params": params}, codes.reshape(1, -1), codes.shape[1:], method="decode")
    np.testing.assert_allclose(latents, channels_last(expected["grid_latents"]), atol=5e-4)


def test_resize_cases(golden):
    described = golden[3]
    for case in described["resize_cases"]:
        if case["out_hw"] is None:
            with pytest.raises(ValueError, match="refused"):
                siglip_vq.fitted_size(case["width"], case["height"], transform_of(described))
        else:
            size = siglip_vq.fitted_size(case["width"], case["height"], transform_of(described))
            assert size == tuple(case["out_hw"]), case


# ------------------------------------------------------------------ at full size, shapes only

def test_full_size():
    """The giant ViT (40 layers of width 1536) and the projector: parameters counted by hand, a picture's shapes."""
    D, F, P, side, codes, C, Z = 1536, 6144, 16, 24, 16384, 2048, 1536
    config = siglip_vq.Config(width=D, layers=40, heads=16, mlp_hidden=F, patch_size=P, pos_table_side=side,
                              codebook_size=codes, codebook_dim=C, z_channels=Z)
    shapes = jax.eval_shape(lambda: siglip_vq.init(config, jax.random.key(0)))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    block = 2 * 2 * D + (D * 3 * D + 3 * D) + (D * D + D) + (D * F + F) + (F * D + D)    # norms, qkv, proj, fc1, fc2
    assert count(shapes["vit"]) == (P * P * 3 * D + D) + side * side * D + 40 * block
    residual = 2 * (2 * Z + 3 * 3 * Z * Z + Z)                                           # two norms, two convolutions
    assert count(shapes) - count(shapes["vit"]) == (D * C + C) + codes * C + (C * Z + Z) + 2 * residual
    pixels = jax.ShapeDtypeStruct((2, 576, 384, 3), jnp.float32)
    tokens, latents = jax.eval_shape(siglip_vq.SiglipVQ(config).apply, {"params": shapes}, pixels)
    assert tokens.shape == (2, 36 * 24) and latents.shape == (2, 36, 24, Z)


# ------------------------------------------------------------------ contracts

@pytest.fixture(scope="module")
def tiny_params():
    normal = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: siglip_vq.init(TINY, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.shape), jnp.float32), shapes)


def test_refusals_name_the_picture_and_the_rule():
    transform = siglip_vq.Transform(short_size=64, long_size=192, patch_size=16, min_short_size=32, max_aspect_ratio=3)
    with pytest.raises(ValueError, match="100x31 .* below 32"):
        siglip_vq.fitted_size(100, 31, transform)
    with pytest.raises(ValueError, match="121x40 .* exceeds 3"):
        siglip_vq.fitted_size(121, 40, transform)
    assert siglip_vq.fitted_size(120, 40, transform) == (64, 192)
    grey = siglip_vq.fit_image(Image.new("L", (72, 64), 51), transform)       # 72 / 16 = 4.5: half goes to even
    assert grey.shape == (64, 64, 3) and grey.dtype == np.float32
    np.testing.assert_allclose(grey, 0.2, atol=1e-6)


def test_ties_go_to_the_first_code(tiny_params):
    codebook = np.zeros((11, 6), np.float32)
    codebook[4, 0], codebook[7, 0], codebook[2, 1] = 1.0, 5.0, 1.0            # 4 and 7 point the same way
    model, variables = siglip_vq.SiglipVQ(TINY), {"params": {**tiny_params, "codebook": codebook}}
    projected = jnp.zeros((1, 1, 2, 6)).at[0, 0, 0, 0].set(3.0).at[0, 0, 1, 1].set(0.1)
    np.testing.assert_array_equal(model.apply(variables, projected, method="quantise"), [[4, 2]])


def test_decode_is_lookup_then_decode_rows(tiny_params):
    model, variables = siglip_vq.SiglipVQ(TINY), {"params": tiny_params}
    tokens = jnp.arange(6).reshape(1, 6)
    vectors = tiny_params["codebook"][tokens].reshape(1, 2, 3, 6)
    decoded = model.apply(variables, tokens, (2, 3), method="decode")
    assert decoded.shape == (1, 2, 3, TINY.z_channels)
    np.testing.assert_array_equal(decoded, model.apply(variables, vectors, method="decode_rows"))


def test_bfloat16_in_bfloat16_out(tiny_params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params)
    tokens, latents = jax.jit(siglip_vq.SiglipVQ(TINY).apply)({"params": half}, jnp.ones((2, 8, 12, 3), jnp.bfloat16))
    assert tokens.shape == (2, 6) and latents.shape == (2, 2, 3, 32) and latents.dtype == jnp.bfloat16


def test_sides_must_be_whole_patches(tiny_params):
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        siglip_vq.SiglipVQ(TINY).apply({"params": tiny_params}, jnp.ones((1, 8, 10, 3)))


def blank_checkpoint(config):
    """Zeros: the tensors (name -> array) of the ViT's file and of the projector's."""
    files = {}, {}
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: siglip_vq.init(config, jax.random.key(0))), sep="/")
    for path, leaf in shapes.items():
        name = torch_keys.torch_name(path.removeprefix("vit/"), siglip_vq.RULES)
        shape = leaf.shape[1:] if "{layer" in name else leaf.shape
        if path.endswith("kernel"):                                            # as torch keeps it
            shape = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
        rows = torch_keys.layer_names(name, leaf.shape[0])
        files[0 if path.startswith("vit/") else 1].update({row: np.zeros(shape) for row in rows})
    return files


@pytest.mark.parametrize("damage, key", [
    (lambda vit, projector: vit.pop("blocks.1.attn.qkv.bias"), r"missing.*blocks\.1\.attn\.qkv\.bias"),
    (lambda vit, projector: vit.update({"blocks.2.norm1.bias": np.zeros(64)}), r"unknown.*blocks\.2\.norm1\.bias"),
    (lambda vit, projector: projector.update({"norm.weight": np.zeros(64)}), r"unknown.*norm\.weight"),
    (lambda vit, projector: projector.update({"quant_conv.weight": np.zeros((1, 1, 1, 1))}), r"quant_conv\.weight"),
])
def test_checkpoint_errors_name_the_key(damage, key):
    vit, projector = blank_checkpoint(TINY)
    siglip_vq.from_torch(vit, projector, TINY)
    damage(vit, projector)
    with pytest.raises(ValueError, match=key):
        siglip_vq.from_torch(vit, projector, TINY)
