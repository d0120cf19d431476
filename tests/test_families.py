"""Methods ask of a family what umm.py says and nothing else: all three train one that is a few numbers, and those
that draw otherwise than token by token."""
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import load_config, one_device, tiny_config
from gvu_jax import checkpoint, convert, data, families, optim, sampling, sharding
from gvu_jax.methods import anchor
from gvu_jax.metrics import Stopwatch
from gvu_jax.sampling import How
from gvu_jax.methods import METHODS
from gvu_jax.umm import Lengths, Prompts, gather_logps

W, V, T = 5, 4, 2          # words and codes there are, codes of a picture


class Toy:
    """Draws each of T codes by the words of the prompt, and reads all words by the codes: two matrices."""
    kind, instruction, trains, partition = "toy", "What is it?", {"all": "", "backbone": ""}, {"ar": [("", ())]}
    ar = types.SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, intermediate_size=1)
    tokenizer = types.SimpleNamespace(batch_decode=lambda words, **_: [" ".join("a" * w for w in row) for row in words])
    shared = exact_likelihood = True

    def init(self, key):
        return {"ar": {"draw": jax.random.normal(key, (W, V)), "read": jax.random.normal(key, (V, W))}}

    def lengths(self, texts, questions=None, end=False):
        return Lengths(8, 1, 8)

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        lengths = lengths or self.lengths(texts)
        arrays = [np.zeros((len(texts), length), dtype) for length in lengths for dtype in (np.int32, bool)]
        for i, text in enumerate(texts):
            ids = [len(word) % W for word in text.split()][:arrays[-1].shape[1]] or [0]
            for at in (0, 4):
                arrays[at][i, :len(ids)], arrays[at + 1][i, :len(ids)] = ids, True
        return Prompts(*arrays)

    def _codes(self, params, prompts):
        words = jax.nn.one_hot(prompts.tokens, W) * prompts.mask[:, :, None]
        return jnp.repeat((words.sum(axis=1) @ params["ar"]["draw"])[:, None], T, axis=1)              # [B, T, V]

    def sample_image(self, params, prompts, key, how, index=None):
        logits = jnp.repeat(self._codes(params, prompts), how.images_per_prompt, axis=0)
        codes = jax.vmap(jax.random.categorical)(sampling.sample_keys(key, index), logits)
        return {"codes": codes, "with": {"more": jnp.ones((len(codes), 1, 2))}}, gather_logps(logits, codes)

    def drawn_shapes(self, S):
        shape = jax.ShapeDtypeStruct
        return {"codes": shape((S, T), jnp.int32), "with": {"more": shape((S, 1, 2), jnp.float32)}}

    def image_logps(self, params, prompts, drawn, how=How(), key=None):
        return gather_logps(self._codes(params, prompts), drawn["codes"])

    def image_target(self, params, pixels):
        return {"codes": self.see(params, pixels)}

    def image_nll(self, params, prompts, target, key):
        return -self.image_logps(params, prompts, target)

    def render(self, params, drawn, prompts, key, index=None):
        return jnp.broadcast_to(((drawn["codes"] + 1) / V)[:, None, :, None], (len(drawn["codes"]), 1, T, 3))

    def see(self, params, pixels):
        return jnp.round(pixels[:, 0, :, 0] * V).astype(int) - 1

    def seen_of(self, drawn):
        return drawn["codes"] if self.shared else None

    def picture_of(self, drawn):
        return drawn["codes"]

    def text_logits(self, params, seen, prompts):
        S, L = prompts.words.shape
        logits = jnp.repeat(params["ar"]["read"][seen].sum(axis=1), S // len(seen), axis=0)            # [B*K, W]
        return jnp.repeat(logits[:, None], L, axis=1)

    def text_logps(self, params, seen, prompts):
        return gather_logps(self.text_logits(params, seen, prompts), prompts.words), prompts.words_mask

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        said = jax.tree.map(lambda x: jnp.repeat(x, how.images_per_prompt, axis=0), seen)
        logits = jnp.repeat(params["ar"]["read"][said].sum(axis=1)[:, None], steps, axis=1)
        words = jax.vmap(jax.random.categorical)(sampling.sample_keys(key, index), logits)
        return words, gather_logps(logits, words), jnp.ones_like(words, bool)

    def features(self, params, pixels):
        return pixels.reshape(len(pixels), T, 3)


PICTURES = [{"prompt": text, "pixels": np.full((1, T, 3), (i % V + 1) / V, np.float32)}
            for i, text in enumerate(("a bb", "ccc a", "bb bb", "dddd", "a a ccc", "bb"))]


def settings(name, **changes):
    config = load_config(name, "sft" if name == "shapes_gap" else "smoke")
    size = dict(pool=4, prompts=2, batch=8, threshold=0.01) if name == "shapes_gap" else dict(prompts=4)
    config[config.method].update(group=4, **size)
    if name == "shapes_uae":
        config.uae.update(cold=1, pairs=4, stages="caption:1,draw:1")
    config.optim.update(warmup=0)
    config.update_from_flattened_dict(changes)
    return config


def method_of(umm, config, workdir=None):
    how, optimizer = How(images_per_prompt=config[config.method].group), optim.build(config.optim, 10)
    return METHODS[config.method](umm, config, how, optimizer, one_device(), umm.lengths([]), workdir)


@pytest.mark.parametrize("name, changes, steps", [
    ("shapes", {"gvu.anchor": 1.0, "gvu.inner_steps": 2}, 1), ("shapes", {"reward.view": "tokens"}, 1),
    ("shapes", {"reward.mean": "yes", "gvu.waves": 2, "gvu.anchor": 0.0}, 1),
    ("shapes_gap", {"internal_gap.objective": "dpo", "internal_gap.threshold": 0.5}, 1),
    ("shapes_gap", {"reward.view": "tokens"}, 1), ("shapes_uae", {"uae.micro_batches": 2}, 3)])
def test_every_method_trains_a_family_of_which_it_knows_the_protocol(name, changes, steps, tmp_path):
    method = method_of(Toy(), settings(name, **changes), tmp_path)
    base = method.umm.init(jax.random.key(0))
    state, stream = method.init(base, jax.random.key(1)), data.prompt_stream(PICTURES, 0)
    for step in range(steps):
        before, key = jax.device_get(state.trainable), jax.random.key(step)
        batch = method.rollout(state, base, step, stream, key, Stopwatch(None, lambda: False))
        state, metrics = method.update(state, base, *batch)
        assert all(np.isfinite(value) for value in jax.device_get(metrics).values())
        assert metrics.get("logp_gap", 0) < 1e-5
        assert not np.array_equal(before["ar"]["draw"], state.trainable["ar"]["draw"]) or method.config.method == "uae"


class Estimated(Toy):
    """Knows no log-probability of a picture: as a flow without noise it says none when it draws; and no two pictures
    come about in the same way, although all are the same."""
    exact_likelihood = False

    def sample_image(self, params, prompts, key, how, index=None):
        drawn, logps = super().sample_image(params, prompts, key, how, index)
        way = jnp.arange(len(logps), dtype=jnp.float32)[:, None, None]
        return {"codes": 0 * drawn["codes"], "with": {"more": drawn["with"]["more"] * way}}, logps[:, :0]


def test_internal_gap_tells_no_kl_where_likelihoods_are_estimates(tmp_path):
    method = method_of(Estimated(), settings("shapes_gap", **{"internal_gap.threshold": 1e-6}), tmp_path)
    base = method.umm.init(jax.random.key(0))
    state = method.init(base, jax.random.key(1))
    batch = method.rollout(state, base, 0, data.prompt_stream(PICTURES, 0), jax.random.key(0),
                           Stopwatch(None, lambda: False))
    _, metrics = method.update(state, base, *batch)
    assert metrics["gap"] == 0 and metrics["duplicates"] == 0.75 and not {"kl", "entropy", "logp_gap"} & set(metrics)


WORDS = ("a photo of a red circle", "two blue crosses", "a green square", "an image of a red diamond", "a blue circle",
         "three red squares")


@pytest.mark.parametrize("each, name, changes", [
    ("showo", "shapes_gap", {"internal_gap.draws": 3, "reward.view": "tokens", "sampling.guidance": 2.5}),
    ("showo", "shapes_gap", {"internal_gap.objective": "sft", "reward.view": "tokens"}),
    ("showo", "shapes_uae", {"sampling.guidance": 2.5}),
    ("qwen_sd35", "shapes_gap", {"internal_gap.draws": 2}),
    ("qwen_sd35", "shapes_gap", {"internal_gap.objective": "sft"}), ("qwen_sd35", "shapes_uae", {"uae.waves": 2})],
    indirect=["each"])
def test_internal_gap_and_uae_train_those_that_draw_otherwise(each, name, changes, tmp_path):
    """Mask by mask, with guidance, which is part of its policy, and by a flow: the first update finds the sampler's
    log-probabilities. GvU trains them in tests/test_train.py."""
    _, umm, base = each
    config = settings(name, **({"internal_gap.objective": "dpo", "internal_gap.anchor": 1.0} | changes
                                if name == "shapes_gap" else changes))
    config.sampling.flow.update(steps=3, window=2)
    config.optim.weight_decay = 0.1
    if hasattr(umm, "image_moves"):          # its drawer begins with an output of zero, which passes no gradient on
        leaves, structure = jax.tree.flatten(base["ar"]["dit"])
        moved = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        base = base | {"ar": base["ar"] | {"dit": jax.tree.unflatten(structure, moved)}}
    pixels = np.random.default_rng(0).integers(0, 256, (6, *umm.picture_size, 3)).astype(np.float32) / 255
    stream = data.prompt_stream([{"prompt": text, "pixels": picture} for text, picture in zip(WORDS, pixels)], 0)
    mesh, how, clock = one_device(), How(images_per_prompt=4, **config.sampling), Stopwatch(None, lambda: False)
    base = jax.device_put(base, sharding.shardings(umm.partition, base, mesh))
    method = METHODS[config.method](umm, config, how, optim.build(config.optim, 10), mesh, umm.lengths(WORDS), tmp_path)
    state = method.init(base, jax.random.key(1))
    if name == "shapes_gap":                              # a threshold that some candidates of the first prompt pass
        first = [meta["prompt"] for meta in data.batch(stream, 0, config.internal_gap.prompts)]
        key = jax.random.fold_in(jax.random.key(0), 0)
        _, _, score, _ = method.draw(first, key, base, method.policy(base, state.trainable), clock)
        config.internal_gap.threshold = float(np.sort(score[0])[-2:].mean())
    for step in range(3 if name == "shapes_uae" else 1):
        before = jax.device_get((state.trainable, state.opt_state))
        batch = method.rollout(state, base, step, stream, jax.random.key(step), clock)
        state, metrics = method.update(state, base, *batch)
        metrics = jax.device_get(metrics)
        assert all(np.isfinite(value) for value in metrics.values()), metrics
        if name == "shapes_uae" and "logp_gap" in metrics:
            assert metrics["logp_gap"] < 1e-4 and metrics["ratio_max"] == 1
        assert ("margin_error" in metrics) == (name == "shapes_gap" and config.internal_gap.objective == "dpo")
        assert metrics["grad_norm"] > 1e-4
        after = jax.device_get((state.trainable, state.opt_state))
        changed = jax.tree.map(lambda x, y: np.any(np.asarray(x) != y), before, after)
        moved = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(changed) if x}
        drawer = [path for path in moved if "['dit']" in path or not hasattr(umm, "halves")]
        assert [path for path in (drawer if name == "shapes_gap" else moved) if path.startswith("[0]")]
        if name == "shapes_uae" and step and hasattr(umm, "halves"):          # a stage trains its own half, no other,
            halves = {"draw" if "['dit']" in path or "['projector']" in path else "caption"         # nor its moments
                      for path in moved if "['ar']" in path}
            assert halves == {method.stage(step)} and {path[:3] for path in moved if "['ar']" in path} == {"[0]", "[1]"}
        if name == "shapes_uae" and step == 2 and hasattr(umm, "halves"):
            assert metrics["kl"] < 1e-9, "the captioner has moved, the drawer has not: there is nothing to hold yet"
    if name == "shapes_uae" and hasattr(umm, "image_moves"):              # what judges a caption is drawn by the ODE
        _, logps, _ = method.loop.draw(method.loop.singles, base, base, list(WORDS[:4]) * 4, jax.random.key(0))
        assert logps.shape == (16, 0)


@pytest.mark.parametrize("each", ["qwen_sd35"], indirect=True)
def test_a_stage_of_uae_that_has_nothing_to_train_ends_in_one_line(each):
    _, umm, base = each
    both = "caption:1,draw:1"
    for stages, targets, said in ((both, "^dit/", "stage caption of"), ("draw:1", "^dit/", None),
                                  (both, "^llm/layers", "stage draw of"), ("caption:1", "^llm/layers", None)):
        config = settings("shapes_uae", **{"lora.rank": 2, "lora.targets": targets, "uae.stages": stages})
        how, optimizer = How(images_per_prompt=4, **config.sampling), optim.build(config.optim, 10)
        uae = METHODS["uae"](umm, config, how, optimizer, one_device())
        begin = lambda: jax.eval_shape(uae.begin, base, jax.random.key(0))
        if said is None:
            begin()
        else:
            with pytest.raises(ValueError, match=f"{said} .*mend lora.targets or trains, or leave the stage out"):
                begin()


def test_what_was_drawn_comes_back_from_disk_as_it_was(tmp_path):
    config, stream = settings("shapes_gap"), data.prompt_stream(PICTURES, 0)
    first, again = (method_of(Toy(), config, tmp_path) for _ in range(2))
    base = first.umm.init(jax.random.key(0))
    for method in (first, again):
        state = method.init(base, jax.random.key(1))
        method.rollout(state, base, 0, stream, jax.random.key(2), Stopwatch(None, lambda: False))
    jax.tree.map(np.testing.assert_array_equal, first.rounds[0].drawn, again.rounds[0].drawn)
    assert first.rounds[0].drawn["with"]["more"].shape == (4, 4, 1, 2)


@pytest.mark.parametrize("name", ["shapes", "shapes_gap"])
def test_what_a_family_draws_is_not_read_where_it_cannot_be(name):
    umm = Toy()
    umm.shared = False
    with pytest.raises(ValueError, match="reward.view = 'tokens'.*kind 'toy'"):
        method_of(umm, settings(name, **{"reward.view": "tokens"}))


def test_what_cannot_be_read_as_drawn_is_painted_anew_for_the_anchor():
    """Of every fourth picture: what the base sees in the pixels that it paints."""
    umm, base = Toy(), Toy().init(jax.random.key(0))
    drawn = {"codes": jax.random.randint(jax.random.key(1), (8, T), 0, V), "with": {"more": jnp.ones((8, 1, 2))}}
    as_drawn = anchor.seen_again(umm, base, drawn, umm.encode_prompts(["a bb"] * 8))
    umm.shared = False
    painted = anchor.seen_again(umm, base, drawn, umm.encode_prompts(["a bb"] * 8))
    np.testing.assert_array_equal(as_drawn, drawn["codes"][::4])
    np.testing.assert_array_equal(painted, drawn["codes"][::4])


# ---- the table ---------------------------------------------------------------------------------------------------

def test_folders_from_before_there_were_families_are_read(tiny, tmp_path):
    _, umm, params = tiny
    checkpoint.save_model(tmp_path / "model", umm, params)
    path = tmp_path / "model/metadata.json"
    metadata = json.loads(path.read_text())
    assert metadata.pop("kind") == umm.kind in families.FAMILIES
    path.write_text(json.dumps(metadata))
    again = checkpoint.read_metadata(tmp_path / "model")
    assert type(again) is type(umm) and (again.ar, again.vae, again.grid) == (umm.ar, umm.vae, umm.grid)


def test_a_family_that_is_not_there_is_named(tmp_path, monkeypatch):
    config = tiny_config()
    config.family = "other"
    with pytest.raises(ValueError, match="config.family is 'other'; it must be one of xomni, janus, showo"):
        families.of(config)
    with pytest.raises(ValueError, match="config.family is 'other'"):
        families.tiny_of(config)
    monkeypatch.setitem(families.FAMILIES, "other", families.xomni)
    with pytest.raises(ValueError, match="'other', which has no tiny version for the shapes world yet"):
        families.tiny_of(config)
    (tmp_path / "config.json").write_text('{"model_type": ["other"]}')
    with pytest.raises(ValueError, match=r"model_type = \['other'\]; implemented is x-omni or .*janus"):
        families.of_published(tmp_path)


def test_what_a_family_reads_from_elsewhere_has_a_name_too_and_nothing_else_is_taken(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(convert.hub, "fetch", lambda name, wanted=("*",): asked.append((name, wanted)) or tmp_path)
    monkeypatch.setattr(families.showo, "read_source", lambda src, image_size, **folders: folders)
    (tmp_path / "config.json").write_text('{"_class_name": "Showo"}')
    found = convert.read_source("hf:showlab/show-o", clip="hf:openai/clip", llm=tmp_path)
    assert found == {"magvit": tmp_path, "clip": tmp_path, "llm": tmp_path}
    assert asked == [("hf:showlab/show-o", ("*",)), ("hf:showlab/magvitv2", ("*",)), ("hf:openai/clip", ("*",))]
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    with pytest.raises(ValueError, match="reads nothing from --flux: leave that out"):
        convert.read_source(tmp_path, flux="FLUX.1-dev")
