"""UAE's pair in the shapes world: how it is made and taught. What every family is asked, stands in the tests that take
the family as a parameter."""
import jax
import numpy as np
import pytest

from conftest import one_device, tiny_config
from gvu_jax.families import qwen_sd35, qwen_sd35_tiny
from gvu_jax.shapes import pretrain, world
from test_sharding import a_step, divisible_of

FAMILY = "qwen_sd35"


@pytest.fixture(scope="module")
def taught():
    """(config, umm, params) that have had their lessons about pictures: a few steps."""
    config = tiny_config(family=FAMILY)
    umm, params = pretrain.build(config)
    rng = np.random.default_rng(0)
    return config, umm, params, qwen_sd35_tiny.learn_pictures(
        umm, params, world.crowded_scenes(rng, 64), config.pretrain, rng, jax.random.key(0))


def test_a_chat_is_as_short_as_can_be(taught):
    _, umm, _, _ = taught
    prompts = umm.encode_prompts(["a photo of a red circle"], questions=["Describe the image."])
    unknown, turn, stop = (umm._id(token) for token in (umm.tokenizer.unk_token, qwen_sd35.TURN, qwen_sd35.STOP))
    said = umm._ids("a photo of a red circle")
    assert unknown not in said and prompts.words[0, :len(said)].tolist() == said
    assert prompts.tokens[prompts.mask].tolist() == [turn, unknown, *said, stop, turn, unknown]
    assert prompts.question.shape[1] == 2 + len(umm._ids("Describe the image.")) + 1
    assert umm.tokenizer.decode(said) == "a photo of a red circle" and umm.of_shapes


def test_what_was_drawn_is_read_as_it_is(taught):
    """No picture of the world's size is resized on the way, and one of another size is brought to cells."""
    _, umm, params, _ = taught
    assert umm.picture_size == umm.fitted_size((48, 48)) == (48, 48) and umm.fitted_size((90, 64)) == (48, 32)
    pixels = world.render(world.crowded_scenes(np.random.default_rng(0), 2))
    np.testing.assert_array_equal(umm.fit(np.round(pixels[0] * 255).astype(np.uint8)) * 255, np.round(pixels[0] * 255))
    assert umm.see(params, pixels).cells.shape == (2, 9, umm.ar.hidden_size)


def test_cells_are_as_large_as_words(taught):
    _, umm, params, now = taught
    cells = umm.see(now, world.render(world.crowded_scenes(np.random.default_rng(1), 64))).cells
    words = np.std(params["ar"]["llm"]["lm_embed_tokens"]["embedding"])
    assert abs(np.std(cells) / words - 1) < 0.2


def test_the_drawers_last_lesson_leaves_the_reader_alone(taught):
    config, umm, _, params = taught
    rng, scenes = np.random.default_rng(0), world.sample_scenes(np.random.default_rng(0), 32)
    target = jax.jit(umm.image_target)(params, world.render(scenes, rng))
    drawing = pretrain.to_draw(pretrain.write_captions(umm, target, scenes, rng, frozenset()), 0.0, rng)
    texts = {"prompts": drawing, "descriptions": drawing}
    now = qwen_sd35_tiny.learn_drawing(umm, params, texts, config.pretrain, jax.random.key(0))
    moved = {name: any(not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (old, new))))
             for half in ("llm", "dit") for name, old in params["ar"][half].items()
             for new in [now["ar"][half][name]]}
    assert {name for name in params["ar"]["llm"] if moved[name]} == {"projector"}
    assert all(moved[name] for name in params["ar"]["dit"])
    assert all(now[part] is params[part] for part in ("vision", "vae"))


def test_a_guided_step_divided_three_ways_is_a_step_on_one_device():
    """Latents are rounded otherwise where sums are divided, and so a few pixels differ by one level. The drawer begins
    with gates and an output of zero, which would pass nothing on: here they are not."""
    config, umm, params = divisible_of(FAMILY)
    leaves, structure = jax.tree.flatten(params["ar"]["dit"])
    moved = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    divisible = config, umm, params | {"ar": params["ar"] | {"dit": jax.tree.unflatten(structure, moved)}}
    ours, theirs = (a_step(divisible, mesh, **{"sampling.guidance": 2.0, "gvu.anchor": 0.0})[0]
                    for mesh in ("data:2,fsdp:2,tensor:2", one_device()))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours["tokens"], theirs["tokens"])
    apart = np.abs(ours["pixels"] - theirs["pixels"])
    assert apart.max() < 1.01 / 255 and (apart > 0).mean() < 1e-2
    np.testing.assert_allclose(ours["logps"], theirs["logps"], atol=1e-4)
    np.testing.assert_allclose(ours["reward"], theirs["reward"], rtol=1e-3)
    largest = theirs["metrics"]["grad_norm"]
    assert largest > 1e-4 and ours["metrics"]["ratio_max"] == 1
    for one, other in zip(*map(jax.tree.leaves, (ours["gradients"], theirs["gradients"]))):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * largest)
