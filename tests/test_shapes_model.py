"""Pretraining's parts and the suite: what each must achieve before the next can work."""
import numpy as np
import pytest

from conftest import one_device

from gvu_jax.models import vae
from gvu_jax.shapes import pretrain, suite, world
from gvu_jax.umm import compile_programs
from gvu_jax.sampling import How
from gvu_jax.suite import auc, choose_prompts


def test_principal_components_keep_pictures_readable():
    from gvu_jax.shapes.checker import read_pixels
    rng = np.random.default_rng(0)
    config, scenes = vae.PatchConfig(latent_channels=4, patch_size=16), world.crowded_scenes(rng, 1000)
    params = vae.principal_components(world.render(scenes, rng), config)
    model, test = vae.PatchAutoencoder(config), world.crowded_scenes(rng, 100)
    latents, _ = model.apply({"params": params}, world.render(test, rng), method="encode")
    assert latents.shape == (100, 6, 6, 4) and abs(latents.mean()) < 0.1 and 0.8 < latents.var() < 1.2
    drawn = vae.to_pixels(model.apply({"params": params}, latents, method="decode"))
    assert (read_pixels(np.asarray(drawn), 3) == test).mean() > 0.99


def test_space_to_depth_and_back():
    x = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    deep = vae.space_to_depth(x, 2)
    np.testing.assert_array_equal(deep[0, 1, 2].reshape(2, 2, 3), x[0, 2:4, 4:6])
    np.testing.assert_array_equal(vae.depth_to_space(deep, 2), x)


def test_clusters_find_well_separated_groups():
    rng = np.random.default_rng(0)
    centres = np.eye(6)[:5]
    vectors = np.repeat(centres, 40, axis=0) + 0.05 * rng.standard_normal((200, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = pretrain.cluster(vectors, 5, rng)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found @ centres.T).max(axis=0).min() > 0.99


def test_nothing_held_out_is_ever_written_for_pretraining():
    rng = np.random.default_rng(0)
    train, held_out = world.split_prompts()
    texts = pretrain.write_texts(world.sample_scenes(rng, 300), rng, world.compositions(held_out), 2)
    secret = {meta["prompt"] for meta in held_out}
    said = [text for part in ("captions", "questions") for row in texts[part] for text in row[1:] if text]
    assert len(said) > 800 and not any(prompt == text or f"describe {prompt}?" in text for text in said for prompt in secret)


def test_the_cache_key_changes_with_what_shapes_the_base_and_with_nothing_else(tiny):
    config = tiny[0].copy_and_resolve_references()
    before = pretrain.base_folder(config)
    config.gvu.beta = 0.7
    assert pretrain.base_folder(config) == before
    config.pretrain.backbone.steps += 1
    assert pretrain.base_folder(config) != before


@pytest.mark.parametrize("scores, right, expected", [
    ([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([1, 2, 3, 4], [1, 1, 0, 0], 0.0), ([5, 5, 5], [0, 1, 1], 0.5),
    ([1, 2, 2, 3], [0, 1, 0, 1], 0.875), ([1, 2], [1, 1], None)])
def test_auc(scores, right, expected):
    assert auc(np.array(scores, float), np.array(right, bool)) == expected


def test_prompts_are_chosen_evenly():
    _, held_out = world.split_prompts()
    tags = [meta["tag"] for meta in choose_prompts(held_out, 24, np.random.default_rng(0))]
    assert {tag: tags.count(tag) for tag in world.TAGS} == dict.fromkeys(world.TAGS, 4)


def test_an_untrained_model_scores_at_chance(tiny):
    config, umm, params = tiny
    _, held_out = world.split_prompts()
    metas = choose_prompts(held_out, 12, np.random.default_rng(0))
    shapes = suite.build(umm, compile_programs(umm, How(images_per_prompt=2), one_device()), metas, 6, 2, 60,
                         umm.lengths([meta["prompt"] for meta in held_out]), world.compositions(held_out), 0)
    pictures, rewards, right = shapes.sample(params, params)
    scores, _ = shapes.grade(rewards, right)
    assert scores["overall"] < 0.5 and pictures.shape == (12, 2, 48, 48, 3) and right.shape == (12, 2)
    understanding = shapes.understand(params)
    assert understanding["four_way"] < 0.5 and 0.25 < understanding["relation"] < 0.75
