"""Encoders from outside against transformers on random weights read from its own files, and against the recorded values
of Unified-Bench; and how they become a reward."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gvu_jax import scorers
from gvu_jax.models import clip, dino

SHAPES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, layer_norm_eps=1e-5)
KINDS = {
    "dinov2": ("Dinov2Model", dict(SHAPES, image_size=20, patch_size=4, mlp_ratio=2), (12, 16)),
    "dinov3": ("DINOv3ViTModel", dict(SHAPES, intermediate_size=40, image_size=16, patch_size=4, num_register_tokens=3,
                                      rope_theta=60.0), (16, 12)),
    "siglip": ("SiglipVisionModel", dict(SHAPES, intermediate_size=40, image_size=18, patch_size=4), (18, 18)),
    "clip": ("CLIPVisionModelWithProjection", dict(SHAPES, intermediate_size=40, image_size=16, patch_size=4,
                                                   projection_dim=10), (16, 16)),
}
IMAGES = dict(do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True, resample=3, image_std=clip.STD,
              rescale_factor=1 / 255, size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16},
              image_mean=clip.MEAN)


def written(kind, folder):
    """A random model of transformers (torch), in a folder as it writes it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, numbers, _ = KINDS[kind]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**numbers)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if kind in ("dinov2", "clip"):
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_equals_transformers(kind, tmp_path):
    model, scorer, size = written(kind, tmp_path), scorers.read(str(tmp_path)), KINDS[kind][2]
    import torch
    assert scorer.name == kind
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    theirs = {"clip": "image_embeds", "siglip": "pooler_output"}.get(kind)
    theirs = getattr(found, theirs) if theirs else found.last_hidden_state[:, 0]
    ours = jax.jit(scorer.tower.apply)({"params": scorer.params}, x)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_longclips_file_is_read_as_transformers_reads_clip(tmp_path, monkeypatch):
    """It has the names that OpenAI gave the tower, and heads of 64 channels without saying so."""
    name, numbers, size = KINDS["clip"]
    monkeypatch.setitem(KINDS, "clip", (name, dict(numbers, hidden_size=128, num_attention_heads=2), size))
    model, torch = written("clip", tmp_path), pytest.importorskip("torch")
    state = model.state_dict()
    theirs = {"visual.proj": state["visual_projection.weight"].T.contiguous(), "token_embedding.weight": torch.ones(2),
              "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
              "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
              "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"]}
    for end in ("weight", "bias"):
        theirs |= {f"visual.ln_pre.{end}": state[f"vision_model.pre_layrnorm.{end}"],
                   f"visual.ln_post.{end}": state[f"vision_model.post_layernorm.{end}"]}
        for i in range(3):
            old, new = f"vision_model.encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
            theirs[f"{new}attn.in_proj_{end}"] = torch.cat([state[f"{old}self_attn.{x}_proj.{end}"] for x in "qkv"])
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                theirs[f"{new}{a}.{end}"] = state[f"{old}{b}.{end}"]
    torch.save({name: x.half() for name, x in theirs.items()}, tmp_path / "longclip-S.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
        expected = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).image_embeds
    scorer = scorers.read(str(tmp_path / "longclip-S.pt"))
    assert scorer.name == "longclip"
    np.testing.assert_allclose(scorer.tower.apply({"params": scorer.params}, x), expected.numpy(), atol=1e-4)
    wide = np.random.default_rng(0).integers(0, 256, (1, 16, 23, 3)).astype(np.float32) / 255
    cut = wide[:, :, 4:20]                                      # 3.5 is rounded to the even one, as torchvision does
    np.testing.assert_allclose(scorer.fit(wide), (cut - np.float32(clip.MEAN)) / np.float32(clip.STD), atol=1e-6)


def test_siglip_is_shown_a_square_as_pil_makes_it(tmp_path):
    written("siglip", tmp_path)
    scorer, rng = scorers.read(str(tmp_path)), np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 31, 22, 3)).astype(np.uint8)
    square = np.stack([Image.fromarray(picture).resize((18, 18), Image.Resampling.BICUBIC) for picture in pictures])
    fit = scorer.fit(pictures.astype(np.float32) / 255)
    expected = (square.astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(fit, expected, atol=2.1 / 255)
    assert np.mean(np.abs(fit - expected) > 1e-5) < 0.02                  # one level: some Pillows take the other turn
    features = scorer.tower.apply({"params": scorer.params}, fit)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    pixels = jnp.asarray(pictures, jnp.float32) / 255
    np.testing.assert_allclose(scorer.alike(scorer.params, pixels, pixels[::2]), np.sum(
        unit * np.repeat(unit[::2], 2, axis=0), axis=-1), atol=1e-5)


def test_reconstructions_can_be_shown_255_times_darker(tmp_path):
    """As UAE's released cold start shows them to CLIP, and after the rounding to 8 bits, which would leave nothing."""
    from gvu_jax.families import qwen_sd35
    written("clip", tmp_path)
    scorer = scorers.read(str(tmp_path))
    pictures, originals = (np.random.default_rng(i).integers(0, 256, (3, 20, 20, 3)).astype(np.float32) / 255
                           for i in (0, 1))
    for darker in (1, 255):
        def ours(pictures):
            return 1 - jnp.mean(scorer.alike(scorer.params, pictures, originals, darker))

        def theirs(pictures):
            middle = (slice(None), slice(2, 18), slice(2, 18))
            return qwen_sd35.unlike(scorer.tower.config, scorer.params, pictures[middle], originals[middle], darker > 1)[0]
        (ours, slope), (theirs, expected) = (jax.jit(jax.value_and_grad(loss))(pictures) for loss in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(slope, expected, atol=1e-3 * np.abs(expected).max())


def test_what_the_hub_once_gave_needs_no_hub(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    from gvu_jax import hub
    folder = small(tmp_path / "dino")

    def fail(*_):
        raise OSError("cannot be reached")
    monkeypatch.setattr(hub, "fetch", fail)

    def found(name, revision, local_files_only):
        if (name, revision) != ("facebook/dinov3", "main"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert scorers.read("hf:facebook/dinov3@main").name == "dinov3"
    assert f"cannot be reached; what was fetched before is taken, {folder}" in capsys.readouterr().err
    with pytest.raises(OSError, match="cannot be reached"):
        scorers.read("hf:facebook/another")


def test_dinov3_is_shown_a_square_as_torch_makes_it(tmp_path):
    torch = pytest.importorskip("torch")
    written("dinov3", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(
        do_resize=True, do_rescale=True, do_normalize=True, resample=2, rescale_factor=1 / 255,
        size={"height": 12, "width": 12}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])))
    pixels = np.random.default_rng(0).random((2, 31, 17, 3), np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()), (12, 12),
                                             mode="bilinear", antialias=True, align_corners=False)
    expected = (np.moveaxis(theirs.numpy(), 1, -1) - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
    np.testing.assert_allclose(scorers.read(str(tmp_path)).fit(pixels), expected, atol=1e-5)


def test_golden_unified_bench(fixtures):
    folder = fixtures / "uae/uae/bench"
    expected, told = np.load(folder / "expected.npz"), json.loads((folder / "expected.json").read_text())
    picture = lambda path: np.asarray(Image.open(folder / path).convert("RGB"), np.float32)[None] / 255
    means = {}
    for name in told["average"]:
        scorer, run = scorers.read(str(folder / name)), None
        run = jax.jit(lambda x: scorer.tower.apply({"params": scorer.params}, x))
        for side, which in enumerate(("ref", "gen")):
            recorded = np.moveaxis(expected[f"{name}_pixels_{which}"], 1, -1)
            np.testing.assert_allclose(run(recorded), expected[f"{name}_features_{which}"], atol=2e-4)
            if name != "dinov3":                                               # whose pixels are no picture's
                for pair, pixels in zip(told["pairs"], recorded):
                    np.testing.assert_allclose(scorer.fit(picture(pair[side]))[0], pixels, atol=1e-5)
        ours = scorers.clip_vision.cosine(run(np.moveaxis(expected[f"{name}_pixels_ref"], 1, -1)),
                                          run(np.moveaxis(expected[f"{name}_pixels_gen"], 1, -1)))
        np.testing.assert_allclose(ours, expected[f"{name}_similarity"], atol=1e-4)
        if name != "dinov3":
            alike = [scorer.alike(scorer.params, *map(picture, pair[::-1])) for pair in told["pairs"]]
            np.testing.assert_allclose(np.concatenate(alike), expected[f"{name}_similarity"], atol=1e-4)
        means[name] = np.mean(ours)
        np.testing.assert_allclose(means[name], told["average"][name], atol=1e-4)
    np.testing.assert_allclose(np.mean(list(means.values())), told["overall"], atol=1e-4)


def small(folder, seed=0):
    """A DINOv3 without torch: random weights in the published format."""
    from safetensors.numpy import save_file

    from gvu_jax.models import torch_keys
    config = dino.Config(16, 20, 1, 1, 8, 1e-5, registers=1, biases=(True, False, True))
    folder.mkdir(exist_ok=True)
    tensors = torch_keys.to_torch(jax.device_get(dino.init(config, jax.random.key(seed))), dino.RULES["dinov3_vit"])
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="dinov3_vit", hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=1,
        patch_size=8, layer_norm_eps=1e-5, num_register_tokens=1, image_size=16)))
    return folder


def test_several_at_once_are_a_weighted_sum(tmp_path, tiny):
    """Each picture is compared with its own original, in waves as at once; the model's own encoder is one of them."""
    from conftest import one_device
    from gvu_jax import rewards
    from gvu_jax.methods.uae import Loop
    from gvu_jax.sampling import How
    _, umm, base = tiny
    scorer = scorers.read(str(small(tmp_path / "dino")))
    weights = scorers.weights_of(f"{tmp_path}/dino=0.25, own=2")
    assert weights == {f"{tmp_path}/dino": 0.25, "own": 2.0}
    pictures = jnp.round(255 * jax.random.uniform(jax.random.key(0), (8, *umm.picture_size, 3))) / 255
    own = rewards.similarity(umm.features(base, pictures), jnp.repeat(umm.features(base, pictures[::2]), 2, axis=0))
    features = scorer.tower.apply({"params": scorer.params}, scorer.fit(pictures))
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    outside = np.sum(unit * np.repeat(unit[::2], 2, axis=0), axis=-1)
    for waves in (1, 2):
        loop = Loop(umm, How(), one_device(), 4, waves, scorers.Scorers(weights, one_device()))
        reward, found = loop.compare(base, loop.outside.params, pictures, pictures[::2])
        assert set(found) == {"similarity", "dinov3"}
        np.testing.assert_allclose(found["similarity"], own, atol=1e-5)
        np.testing.assert_allclose(found["dinov3"], outside, atol=1e-5)
        np.testing.assert_allclose(reward, 2 * own + 0.25 * outside, atol=1e-5)


@pytest.mark.parametrize("told", ["dino", "own=", "own=-1", "own=0.5,own=0.5", "=1", "own=nan"])
def test_weights_that_are_none_end_in_one_line(told):
    with pytest.raises(ValueError, match="uae.scorers is .* of the form own=0.5,hf:facebook/dinov2-large=0.5"):
        scorers.weights_of(told)


def test_what_is_no_scorer_ends_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no scorer: there is neither a config.json nor one file"):
        scorers.read(str(tmp_path))
    folder = small(tmp_path / "dino")
    with pytest.raises(ValueError, match="two of the scorers .* are called dinov3"):
        scorers.Scorers({str(folder): 1.0, str(small(tmp_path / "again")): 1.0}, None).each
    told = json.loads((folder / "config.json").read_text())
    for changes, said in (({"num_hidden_layers": 2}, "dino: .*missing keys.*layer.1"), ({"model_type": "vit"}, "'vit'"),
                          ({"use_gated_mlp": True}, "use_gated_mlp"), ({"hidden_size": 18}, "18 cannot be divided"),
                          ({"num_attention_heads": 0}, "cannot be read as a scorer")):
        (folder / "config.json").write_text(json.dumps(told | changes))
        scorers.read.cache_clear()
        with pytest.raises(ValueError, match=said):
            scorers.read(str(folder))
