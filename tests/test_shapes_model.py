"""Pretraining's parts and the suite: what each must achieve before the next can work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import TINY, one_device, tiny_config, untrained

from gvu_jax.families import janus_tiny, showo_tiny, xomni_tiny
from gvu_jax.models import flux, magvit, vae
from gvu_jax.shapes import learn, pretrain, sentences, suite, world
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


def test_a_tokenizer_that_loses_a_color_is_told(capfd):
    scenes = world.crowded_scenes(np.random.default_rng(0), 64)
    pixels = world.render(scenes, np.random.default_rng(1))
    learn.tell_what_comes_back("codes", scenes, pixels)
    assert capfd.readouterr().err == "codes: 1.000 of the objects of 64 scenes come back\n"
    red = (scenes > 0) & ((scenes - 1) % len(world.COLORS) == 0)
    learn.tell_what_comes_back("codes", scenes, world.render(np.where(red, 0, scenes), np.random.default_rng(1)))
    kept = 1 - red.sum() / (scenes > 0).sum()
    said, warned = capfd.readouterr().err.splitlines()
    assert said == f"codes: {kept:.3f} of the objects of 64 scenes come back"
    assert warned.startswith(f"warning: the picture tokenizer loses {1 - kept:.0%} of all objects")


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
    found = learn.cluster(vectors, 5, rng)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert (found @ centres.T).max(axis=0).min() > 0.99


def test_nothing_held_out_is_ever_written_for_pretraining(tiny):
    _, umm, _ = tiny
    rng, (_, held_out) = np.random.default_rng(0), world.split_prompts()
    scenes, forbidden = world.sample_scenes(rng, 300), world.compositions(held_out)
    seen = np.zeros((300, 3, 3), np.int32)
    secret = {meta["prompt"] for meta in held_out}

    def told(forbidden):
        """How many texts are written, and how many of them say a held-out prompt."""
        parts = [pretrain.write_captions(umm, seen, scenes, rng, forbidden),
                 pretrain.write_captions(umm, seen, scenes, rng, forbidden, {"position": 1}),
                 pretrain.write_questions(umm, seen, scenes, rng, forbidden)]
        said = [text for part in parts for text in umm.tokenizer.batch_decode(
            pretrain.flat(part.prompts.words), skip_special_tokens=True)]
        return len(said), sum(prompt == text or f"describe {prompt}?" in text for text in said for prompt in secret)

    count, leaked = told(forbidden)
    assert count > 1500 and leaked == 0
    assert told(frozenset())[1] > 100, "the search would find them"


@pytest.mark.parametrize("each", [name for name in TINY if name != "qwen_sd35"], indirect=True)     # which asks first
def test_a_question_among_the_words_is_read_as_before_them(each):
    """The same answers have the same probabilities, whether each question is asked of a picture of its own or six share
    one; and nothing but the answers is learned."""
    _, umm, params = each
    rng = np.random.default_rng(1)
    scenes = world.sample_scenes(rng, 8)
    seen = jax.device_get(jax.jit(umm.see)(params, world.render(scenes, rng)))
    captions = [sentences.caption(scene, rng) for scene in scenes]
    others = [meta for meta in captions if meta] * 2
    asked = [(i, *pair) for i, scene in enumerate(scenes)
             for pair in pretrain.ask_all(scene, captions[i], others[:2], rng, frozenset())]
    apart = pretrain.encode_pairs(umm, seen, asked)
    packed = pretrain.side_by_side(pretrain.put_into_words(apart), pretrain.QUESTIONS)
    read = jax.jit(umm.text_logps)
    logps, mask = read(params, apart.seen, apart.prompts)
    shared, _ = read(params, packed.seen, jax.tree.map(pretrain.flat, packed.prompts))
    answer = pretrain.flat(packed.answer)
    np.testing.assert_array_equal(answer.sum(axis=1), np.sum(mask, axis=1))
    np.testing.assert_allclose(np.asarray(shared)[answer], np.asarray(logps)[np.asarray(mask)], atol=2e-5)
    said = umm.tokenizer.batch_decode([row[learned] for row, learned in zip(pretrain.flat(packed.prompts.words), answer)],
                                      skip_special_tokens=True)
    assert said == [text for _, _, text in asked]


def test_janus_begins_with_the_codebook():
    """Codes whose vectors are alike begin alike on their way in and out; sizes are those of chance."""
    config, umm, params = untrained("janus")
    rng, V, C = np.random.default_rng(0), config.model.vq.codebook_size, config.model.vq.codebook_dim
    codebook = np.repeat(rng.normal(size=(V // 2, C)), 2, axis=0) + 0.1 * rng.normal(size=(V, C))
    ar = janus_tiny.begin({**params, "vq": {**params["vq"], "codebook": codebook}}, rng)
    for of in (lambda ar: ar["gen_embed_tokens"]["embedding"], lambda ar: ar["gen_head"]["fc2"]["kernel"].T):
        old, new = np.asarray(of(params["ar"])), np.asarray(of(ar))
        assert new.shape == old.shape and new.dtype == old.dtype and 0.5 < new.std() / old.std() < 2
        unit = new / np.linalg.norm(new, axis=1, keepdims=True)
        alike = unit @ unit.T
        assert np.mean(alike[range(0, V, 2), range(1, V, 2)]) > np.mean(alike) + 0.5
    assert umm.of_shapes and umm.guidance == 1.0


def test_showo_begins_with_its_bits(tiny_showo):
    """Codes of which all bits but one are the same begin alike, and opposite ones opposite; other ids stay."""
    _, umm, params = tiny_showo
    ar, K, first = showo_tiny.begin(params, np.random.default_rng(0)), umm.ar.image_vocab_size, umm.ar.first_code
    for of in (lambda ar: ar["lm_embed_tokens"]["embedding"], lambda ar: ar["lm_head"]["kernel"].T):
        old, new = np.asarray(of(params["ar"])), np.asarray(of(ar))
        assert new.dtype == old.dtype and 0.5 < new[first:-1].std() / old.std() < 2
        np.testing.assert_array_equal(np.delete(new, range(first, first + K), 0), np.delete(old, range(first, first + K), 0))
        unit = new[first:-1] / np.linalg.norm(new[first:-1], axis=1, keepdims=True)
        np.testing.assert_allclose(np.sum(unit * unit[::-1], axis=1), -1, atol=1e-5)
        assert np.mean(np.sum(unit[::2] * unit[1::2], axis=1)) > 0.5


def test_showo_paints_a_code_wherever_it_stands(tiny_showo, monkeypatch):
    """Cells and their codes are moved alike; the encoder is told the codes of what stands in the picture. The code of a
    cell is here how bright it is, and the encoder is nine times as sure of each bit as of a coin's."""
    _, umm, params = tiny_showo
    taught, painted, bits = [], [], umm.vq.bits

    class Bright:
        def __init__(self, config):
            self.powers = 2 ** np.arange(config.bits)[::-1]

        def apply(self, variables, x, method):
            if method == "latents":
                return 9 * magvit.vectors(jnp.round(x[:, ::16, ::16, 0] * 255).astype(int), bits)
            painted.append(jnp.sum((x > 0) * self.powers, axis=-1))
            return jnp.repeat(jnp.repeat(painted[-1], 16, axis=1), 16, axis=2)[..., None] / 255 * 2 - jnp.ones(3)

    monkeypatch.setattr(showo_tiny, "fit", lambda _, loss, trained, data, *rest: taught.append((loss, data)) or trained)
    monkeypatch.setattr(magvit, "Magvit", Bright)
    scenes, rng = world.sample_scenes(np.random.default_rng(0), 4), np.random.default_rng(1)
    showo_tiny.train_codes(umm, params, scenes, tiny_config().pretrain.codes, rng, jax.random.key(2))
    (loss, data), = taught
    np.testing.assert_array_equal(data["pictures"]["pixels"], world.render(scenes, np.random.default_rng(1)))
    np.testing.assert_array_equal(data["pictures"]["codes"], showo_tiny.code_of(scenes, 3))
    levels = np.random.default_rng(3).integers(0, 2 ** bits, (5, 3, 3))
    pixels = np.repeat(np.repeat(levels, 16, axis=1), 16, axis=2)[..., None] / 255 * np.ones(3)
    batch = {"pictures": {"pixels": pixels, "codes": levels.reshape(5, 9)}}
    _, told = loss(params["vq"], batch, jax.random.key(4))
    assert told["painting"] < 1e-8
    np.testing.assert_array_equal(np.sort(painted[0].reshape(5, 9)), np.sort(levels.reshape(5, 9)))
    assert not np.array_equal(painted[0], levels)
    np.testing.assert_allclose(told["bits"], bits * np.log1p(np.exp(-9)), rtol=1e-4)
    _, told = loss(params["vq"], {"pictures": {"pixels": pixels, "codes": levels.reshape(5, 9) ^ 1}}, jax.random.key(4))
    np.testing.assert_allclose(told["bits"], 9 + bits * np.log1p(np.exp(-9)), rtol=1e-4)      # one bit is the other way


def test_showo_has_a_code_for_each_thing_in_each_column():
    """What differs in shape alone, in color alone or in column alone has a code that differs in their bits alone."""
    things = np.arange(26)[:, None].repeat(3, axis=1).astype(np.int8)
    codes = showo_tiny.code_of(things, 3)
    assert codes.shape == (26, 3) and len(np.unique(codes)) == 26 * 3 and codes.max() < 2 ** showo_tiny.bits_needed(3)
    shape, color, column = codes >> 5, codes >> 2 & 7, codes & 3
    assert (column == np.arange(3)).all() and (shape[0] == 0).all() and (color[0] == 0).all()
    assert (shape[1:, 0] == np.repeat(np.arange(1, 6), 5)).all() and (color[1:, 0] == np.tile(np.arange(5), 5)).all()
    assert showo_tiny.bits_needed(4) == 8 and showo_tiny.bits_needed(5) == 9
    np.testing.assert_array_equal(showo_tiny.code_of(np.array([[3, 0, 0, 0, 7]], np.int8), 5) >> 3, [[10, 0, 0, 0, 17]])


def test_the_backbone_begins_with_the_codebook(tiny):
    """Codes whose vectors are alike begin alike; sizes are those of chance; the rest is left as it was."""
    _, umm, params = tiny
    rng = np.random.default_rng(0)
    objects, columns = rng.normal(size=(26, 16)), rng.normal(size=(3, 16))
    codebook = (objects[:, None] + 0.2 * columns).reshape(78, 16).astype(np.float32)
    ar = xomni_tiny.begin_with_codebook(params["ar"], codebook, rng)
    for old, new in ((params["ar"]["mm_embed_tokens"]["embedding"], ar["mm_embed_tokens"]["embedding"]),
                     (params["ar"]["mm_head"]["kernel"].T, ar["mm_head"]["kernel"].T)):
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_array_equal(new[78:], old[78:])
        assert new.dtype == old.dtype and 0.7 < new[:78].std() / old.std() < 1.4
        unit = new[:78] / np.linalg.norm(new[:78], axis=1, keepdims=True)
        alike = (unit @ unit.T).reshape(26, 3, 26, 3)
        same = np.mean([alike[k, 0, k, 1] for k in range(26)])
        other = np.mean([alike[k, 0, (k + 1) % 26, 0] for k in range(26)])
        assert same > other + 0.3


def test_the_head_learns_the_way_from_picture_to_noise(tiny, monkeypatch):
    """Rectified flow: at (1 - s) latents + s noise, noise - latents, at the levels that sampling visits."""
    _, umm, params = tiny
    taught, heard = {}, []

    def fit(label, loss, params, data, settings, key):
        taught.update(loss=loss, data=data)
        return params

    class Head:
        def __init__(self, config):
            pass

        def apply(self, variables, noisy, siglip, context, pooled, sigma, guidance, grid):
            heard.append((noisy, sigma))
            return 0.3 * noisy

    monkeypatch.setattr(xomni_tiny, "fit", fit)
    xomni_tiny.train_diffusion(umm, params, world.sample_scenes(np.random.default_rng(0), 6), None,
                             np.random.default_rng(1), None)
    monkeypatch.setattr(xomni_tiny.flux, "FluxTransformer", Head)
    error, _ = taught["loss"]({name: params[name] for name in ("vision", "flux")}, taught["data"], jax.random.key(2))
    (noisy, sigma), latents = heard[0], taught["data"]["pictures"]["latents"]
    assert set(np.asarray(sigma)) <= set(flux.sigmas(umm.diffusion_steps, umm.image_tokens)[:-1])
    noise = jax.random.normal(jax.random.split(jax.random.key(2), 4)[1], latents.shape)
    s = np.asarray(sigma)[:, None, None]
    np.testing.assert_allclose(noisy, (1 - s) * latents + s * noise, atol=1e-5)
    np.testing.assert_allclose(error, np.mean((0.3 * noisy - (noise - latents)) ** 2), rtol=1e-5)


def test_the_cache_key_changes_with_what_shapes_the_base_and_with_nothing_else(tiny):
    config = tiny[0].copy_and_resolve_references()
    before = pretrain.base_folder(config)
    config.gvu.beta = 0.7
    assert pretrain.base_folder(config) == before
    config.model.vq.channels += 1                                               # X-Omni has none
    assert pretrain.base_folder(config) == before
    config.pretrain.backbone.steps += 1
    assert pretrain.base_folder(config) != before
    of_xomni, config.family = pretrain.base_folder(config), "janus"
    of_janus = pretrain.base_folder(config)
    config.model.vq.channels += 1
    others = pretrain.base_folder(config)
    config.family = "showo"
    assert len({of_xomni, of_janus, others, pretrain.base_folder(config)}) == 4


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
    pictures, rewards, verdicts = shapes.sample(params, params)
    scores, _ = shapes.grade(rewards, verdicts)
    assert scores["overall"] < 0.5 and pictures.shape == (12, 2, 48, 48, 3) and verdicts.right.shape == (12, 2)
    understanding = shapes.understand(params)
    assert understanding["four_way"] < 0.5 and 0.25 < understanding["relation"] < 0.75
