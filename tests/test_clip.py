"""CLIP's image tower against transformers' on random weights; and how pictures are brought to it, against PIL."""
import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

from gvu_jax.models import clip, torch_keys

TINY = clip.Config(hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=3, image_size=12,
                   patch_size=4)
PLAIN = clip.Transform(12, 12, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_equals_transformers(act):
    """What goes into its last layer, without the class token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, hidden_act=act)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        **dataclasses.asdict(config), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    pixels = np.random.default_rng(0).random((2, 12, 12, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), output_hidden_states=True)
    params = clip.from_torch(tensors, config)
    found = jax.jit(lambda params, pixels: clip.VisionTransformer(config).apply(
        {"params": params}, pixels, PLAIN, method="features"))(params, pixels)
    np.testing.assert_allclose(found, expected.hidden_states[-2][:, 1:].numpy(), atol=2e-4)


@pytest.mark.parametrize("size", [(20, 20), (37, 20), (9, 31), (16, 16)])
def test_pictures_are_resized_and_cut_as_pil_does(size):
    """Larger, smaller, not square, and a square cut out of a larger one: bit for bit."""
    transform = clip.Transform(16, 13, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    found = jax.jit(lambda x: clip.fitted(x, transform))(pixels.astype(np.float32) / 255)
    height, width = (16 if side == min(size) else int(16 * side / min(size)) for side in size)
    top, left = (height - 13) // 2, (width - 13) // 2
    for one, picture in zip(np.round(np.asarray(found) * 255), pixels):
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(one, np.asarray(image.crop((left, top, left + 13, top + 13))))


def test_checkpoint_errors_name_the_key():
    shapes = jax.eval_shape(lambda: clip.init(TINY, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    for prefix in ("vision_model.", ""):
        tensors = torch_keys.to_torch(params, clip.rules([prefix]))
        unread = {f"{prefix}encoder.layers.2.mlp.fc1.bias": np.zeros(36), f"{prefix}post_layernorm.bias": np.zeros(24)}
        clip.from_torch({**tensors, **unread}, TINY)
        name = f"{prefix}encoder.layers.1.mlp.fc1.bias"
        without = {k: v for k, v in tensors.items() if k != name}
        for message, spoilt in {"missing keys": without, "key": {**tensors, name: np.zeros(3)},
                                "unknown keys": {**tensors, f"{name}s": np.zeros(1)}}.items():
            with pytest.raises(ValueError, match=message + ".*" + re.escape(name)):
                clip.from_torch(spoilt, TINY)


@pytest.mark.parametrize("make, said", [
    (lambda: clip.Transform(8, 9, (0.0,), (1.0,)), "cannot be cut out"),
    (lambda: clip.Config(24, 36, 1, 3, 12, 4), "cannot be read"),
    (lambda: clip.Config(24, 36, 3, 3, 12, 4, hidden_act="relu"), "hidden_act 'relu'")])
def test_sizes_that_cannot_be_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
