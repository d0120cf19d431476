"""UAE's pair in the shapes world: how it is made and taught. What every family is asked, stands in the tests that take
the family as a parameter."""
import jax
import numpy as np
import optax
import pytest

from conftest import one_device, tiny_config, untrained
from gvu_jax import flow, rewards, sharding
from gvu_jax.families import qwen_sd35, qwen_sd35_tiny
from gvu_jax.methods.uae import UAE
from gvu_jax.sampling import How
from gvu_jax.shapes import pretrain, world
from test_meaning import NoClock
from test_sharding import a_step, divisible_of

FAMILY = "qwen_sd35"


@pytest.fixture(scope="module")
def taught():
    """(config, umm, params) that have had their lessons about pictures: a few steps."""
    config, umm, params = untrained(FAMILY)
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


def test_the_cold_start_by_reconstruction(taught):
    """1 - how like the original the encoder finds what each caption gives, by itself and unpadded; both halves learn of
    it, in micro-batches of captions of unequal length. It is drawn as in training, without the noise of a step."""
    _, umm, _, params = taught
    config = tiny_config("shapes_uae", "sd35", FAMILY)
    config.uae.update(cold=2, pairs=4, micro_batches=2, words=8, reconstruct="rescaled")
    how = How(guidance=2.0, flow=flow.Flow(**dict(config.sampling.flow, even=True)))
    captions = ["top left red circle", "a circle"] * 2
    pixels = world.render(world.sample_scenes(np.random.default_rng(3), 4))
    stream = {i: {"pixels": pixels[i], "prompt": captions[i]} for i in range(4)}
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params["ar"])
    base = jax.device_put(params | {"ar": moved})                       # a drawer begins with an output of zero
    built = UAE(umm, config, how, optax.sgd(1.0), one_device())
    state = built.init(base, jax.random.key(0))
    state = state.replace(trainable=jax.tree.map(lambda x: x + 0.02, state.trainable))         # so does an adapter
    stage, *batch = built.rollout(state, base, 0, stream, jax.random.key(1), NoClock())
    policy, expected = built.policy(base, state.trainable), []
    by_ode = flow.Flow(config.sampling.flow.steps, even=True)

    @jax.jit
    def unlike(policy, pixels, prompts, noise):
        drawn = umm.redrawn(policy, umm.see(base, pixels), prompts, noise, by_ode, 2.0)
        return 1 - rewards.similarity(umm.features(base, drawn), umm.features(base, pixels))[0]
    for half, key in enumerate(jax.random.split(batch[3], 2)):
        noise = jax.random.normal(key, (2, *umm.latents_size, umm.dit.in_channels))
        for i, row in enumerate((2 * half, 2 * half + 1)):
            prompts = umm.encode_prompts(captions[row:row + 1], end=True)
            expected.append(unlike(policy, pixels[row:row + 1], prompts, noise[i:i + 1]))
    before = jax.device_get(state.trainable)
    after, metrics = built.update(state, base, stage, *batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(metrics["cold/similarity"], 1 - np.mean(expected), rtol=1e-4)
    changes = jax.tree.map(lambda new, old: np.abs(new - old).max(), jax.device_get(after.trainable), before)
    assert all(max(jax.tree.leaves(changes["adapter"][half])) > 1e-7 for half in ("llm", "dit"))
    jax.tree.map(np.testing.assert_array_equal, after.reference, after.trainable)

    told, alike = [], built.loop.alike
    built.loop.alike = lambda *inputs: told.append(inputs[-1]) or alike(*inputs[:-1])
    for built.reconstruct in ("rescaled", "published"):
        with jax.set_mesh(built.mesh):
            jax.eval_shape(lambda *inputs: built._rebuild(*inputs), after, base, *batch)         # traced anew
    assert told == [1, 255]


def test_what_no_cold_start_descends_through(tiny):
    """Choices, a cold start that does not come, the published slip for the own encoder, pairs that cannot be divided."""
    _, umm, _ = tiny
    config = tiny_config("shapes_uae")
    config.uae.reconstruct = "rescaled"
    with pytest.raises(ValueError, match="which models of the kind xomni cannot"):
        UAE(umm, config, How(images_per_prompt=4), optax.sgd(1.0), one_device())
    for changes, said in (({"reconstruct": "yes"}, "it must be empty, rescaled or published"),
                          ({"reconstruct": "published"}, "without own, or take rescaled"),
                          ({"cold": 0}, "set uae.cold, e.g. 1000")):
        with pytest.raises(ValueError, match=said):
            config.uae.update({"cold": 4, "reconstruct": "rescaled"} | changes)
            UAE.check(config)
    config.uae.update(cold=4, reconstruct="", prompts=8, pairs=12, micro_batches=2)
    with pytest.raises(ValueError, match="12 pairs .* in 2 parts .* by data x fsdp = 8"):
        UAE(umm, config, How(images_per_prompt=4), optax.sgd(1.0), sharding.make_mesh("data:8"))


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
