"""What each method means: its steps against the same in numpy, on a model of 111 numbers (toy.py).

What moves, towards what, measured to what, drawn from which key, in which order, at which inner step. The cases are
those where right and wrong differ: three inner steps, several groups, micro-batches of unequal content, texts of
unequal length, a policy that is not the base any more.
"""
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import toy
from conftest import one_device
from gvu_jax import rewards
from gvu_jax.methods import anchor
from gvu_jax.methods.gvu import GvU
from gvu_jax.methods.internal_gap import InternalGap
from gvu_jax.methods.uae import UAE
from gvu_jax.sampling import How

KEY = jax.random.key(7)
RATE = 4.0
BASE, POLICY, REFERENCE = toy.tables(0), toy.tables(1, 0.8), toy.tables(2, 0.6)
TEXTS = ["a", "bc", "dab", "c", "ca", "d", "bbb", "adcc"]
CONFIG = dict(lora=dict(rank=0, alpha=1.0, targets=""), seed=3, reward=dict(teacher="base", view="pixels",
                                                                           mean="geometric"))
UMM = toy.Toy()


class NoClock:
    lap = staticmethod(lambda phase, result: result)
    stopped = staticmethod(lambda: False)


def build(method, rate, workdir=None, group=3, **settings):
    """A method on the toy model, moved by plain gradient descent; its base, and a state that is not the base."""
    config = ConfigDict(CONFIG | settings)
    built = method(UMM, config, How(images_per_prompt=group), optax.sgd(rate), one_device(),
                   UMM.lengths(TEXTS, [UMM.instruction]), workdir)
    base = toy.as_params(BASE)
    state = built.init(base, KEY)
    assert all(np.array_equal(new, old) for new, old in zip(*map(jax.tree.leaves, (state.trainable, base))))
    return built, base, state.replace(trainable=toy.as_params(POLICY))


def assert_moved(state, expected):
    for name, table in toy.as_tables(state.trainable).items():
        assert np.abs(expected[name] - POLICY[name]).max() > 1e-3, "nothing of it would be noticed"
        np.testing.assert_allclose(table, expected[name], atol=2e-4, err_msg=name)


def assert_told(metrics, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


def prompts_of(step, size):
    """What a stream that counts up has for a step."""
    return [STREAM[i]["prompt"] for i in range(step * size, (step + 1) * size)]


STREAM = type("Stream", (), {"__getitem__": lambda self, i: {"prompt": TEXTS[(i + i // 8) % 8]}})()


# ------------------------------------------------------------------ GvU

def gvu(rate=RATE, **changes):
    settings = dict(prompts=8, group=3, clip=0.05, beta=0.3, anchor=0.5, advantage_eps=0.05, inner_steps=3,
                    micro_batches=3, waves=2) | changes
    return build(GvU, rate, gvu=settings)


@pytest.fixture(scope="module")
def rolled():
    """A method, its base, its state, and the batch of step 3."""
    built, base, state = gvu()
    return built, base, state, built.rollout(state, base, 3, STREAM, KEY, NoClock())


def test_gvu_draws_with_the_policy_and_reads_with_the_base(rolled):
    _, _, _, (prompts, tokens, logps, reward, seen, _) = rolled
    texts = [text for text in prompts_of(3, 8) for _ in range(3)]
    of_tokens, of_pixels = jax.random.split(KEY)
    expected = toy.draw(POLICY, texts, of_tokens)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(logps, toy.drawn(POLICY, texts, expected), atol=1e-5)
    np.testing.assert_array_equal(seen, toy.look(toy.paint(expected, of_pixels)))
    likely = [np.exp(toy.read(BASE, picture, toy.ids(text)).mean()) for picture, text in zip(np.asarray(seen), texts)]
    np.testing.assert_allclose(reward, likely, rtol=1e-5)
    for row, text in enumerate(texts):
        assert prompts.words[row][prompts.words_mask[row]].tolist() == toy.ids(text)


def test_gvu_asks_about_each_picture_its_own_prompt():
    """reward.mean = "yes": p(Yes) against p(No) to the question about the whole prompt; judged by the policy, tokens
    read as they are."""
    built, base, state = gvu(anchor=0.0)
    built.config.reward.update(mean="yes", teacher="policy", view="tokens")
    built.mean = rewards.yes
    prompts, tokens, _, reward, *_ = built.rollout(state, base, 0, STREAM, KEY, NoClock())
    for picture, text, found in zip(np.asarray(tokens), np.repeat(TEXTS, 3), reward):
        yes, no = (np.exp(toy.read(POLICY, picture, toy.ids(word), f"Does this image describe {text}?").sum())
                   for word in ("Yes", "No"))
        np.testing.assert_allclose(found, yes / (yes + no), rtol=1e-5)


def read_kl(theta, seen, texts, groups):
    """KL, nats a word, from the base's reading to the policy's of every fourth picture, of its own prompt and of one
    of the next group; and, twice, of the answer to the question about its own."""
    def apart(picture, text, question=UMM.instruction):
        held, new = (toy.reading(of, picture, toy.ids(text), question) for of in (BASE, theta))
        return (np.exp(held) * (held - new)).sum(axis=1).mean()

    words, answers = [], []
    for s in range(0, len(texts), 4):
        words += [apart(seen[s], text) for text in (texts[s], texts[(s + groups) % len(texts)])]
        answers.append(apart(seen[s], "Yes", f"Does this image describe {texts[s]}?"))
    return np.mean(words) + 2 * np.mean(answers)


def test_a_step_of_gvu(rolled):
    """Three inner steps over three micro-batches, KL to the base, the anchor, and a clip that acts."""
    built, base, state, (prompts, tokens, logps, reward, seen, asked) = rolled
    texts, seen_ = [text for text in prompts_of(3, 8) for _ in range(3)], np.asarray(seen)
    sampler = logps + 0.25
    after, metrics = built.update(jax.tree.map(jnp.copy, state), base, prompts, tokens, sampler, reward, seen, asked)
    expected, told = toy.grpo(POLICY, BASE, lambda theta: toy.drawn(theta, texts, tokens), reward, built.config.gvu,
                              RATE, {"read_kl": (0.5, lambda theta: read_kl(theta, seen_, texts, 3))})
    assert 0.02 < told["clipped"] < 0.9 and int(after.step) == 1 + int(state.step)
    assert_moved(after, expected)
    same = [len({tuple(row) for row in group}) for group in np.asarray(tokens).reshape(-1, 3, toy.N)]
    assert_told(metrics, told | {"logp_gap": 0.25, "duplicates": np.mean([(3 - n) / 3 for n in same]),
                                 "reward/flat": np.mean(np.ptp(np.reshape(reward, (-1, 3)), axis=1) < 1e-7)})


def test_what_the_anchor_holds():
    """Of every fourth sample its own prompt and the next group's, in that order; never one of its own group. And the
    question about its own."""
    prompts = UMM.encode_prompts([text for text in TEXTS for _ in range(3)])
    asked = anchor.questions(UMM, TEXTS, UMM.lengths(TEXTS), one_device(), 3)
    seen, pairs, asked = anchor.held(np.arange(24)[:, None, None], prompts, asked, group=3)
    assert seen.ravel().tolist() == [0, 4, 8, 12, 16, 20]
    for number, (words, mask) in zip(seen.ravel(), zip(pairs.words, pairs.words_mask)):
        own, other = (toy.ids(TEXTS[(number // 3 + next) % 8]) for next in (0, 1))
        assert [row[real].tolist() for row, real in zip(words, mask)] == [own, other]
    for number, row, mask in zip(seen.ravel(), np.asarray(asked.question), asked.question_mask):
        assert row[mask].tolist() == toy.ids(f"Does this image describe {TEXTS[number // 3]}?")


# ------------------------------------------------------------------ Internal Gap

def gap(folder, rate=0.5, **changes):
    settings = dict(objective="sft", pool=6, prompts=4, group=3, waves=1, threshold=0.5, keep=2, batch=8,
                    micro_batches=2, beta=0.4, nll=0.3, draws=2, anchor=2.0, replay=2, probe=0) | changes
    built, base, state = build(InternalGap, rate, folder, internal_gap=settings)
    built.config.reward.mean, built.score = "yes", rewards.yes
    return built, base, state


def judged(texts, key, drawer):
    """Candidates of texts, three each, and what the base says of them: tokens, log p, score."""
    of_tokens, of_pixels = jax.random.split(key)
    each = [text for text in texts for _ in range(3)]
    tokens = toy.draw(drawer, each, of_tokens)
    seen = toy.look(toy.paint(tokens, of_pixels))
    answers = np.array([[toy.read(BASE, picture, toy.ids(word), f"Does this image describe {text}?").sum()
                         for word in ("Yes", "No")] for picture, text in zip(seen, each)])
    return tokens, toy.drawn(drawer, each, tokens).sum(axis=1), np.exp(toy.log_softmax(answers))[:, 0]


@pytest.fixture(scope="module")
def threshold():
    """Which some candidates pass, and of which some prompts have none."""
    best = judged(TEXTS[:4], jax.random.fold_in(KEY, 0), POLICY)[2].reshape(-1, 3).max(axis=1)
    return float(np.sort(best)[1:3].mean())


def test_internal_gap_draws_its_pool_and_what_was_discarded(tmp_path, threshold):
    built, base, state = gap(tmp_path, threshold=threshold, pool=6)
    built.rollout(state, base, 0, STREAM, KEY, NoClock())
    later = jax.random.fold_in(KEY, 99)
    built.rollout(state.replace(trainable=toy.as_params(REFERENCE)), base, 2, STREAM, later, NoClock())
    lines = [[json.loads(line) for line in (tmp_path / f"data/round_{i}/manifest.jsonl").read_text().splitlines()]
             for i in (0, 1)]
    codes = [np.load(tmp_path / f"data/round_{i}/drawn.npz")["arr_0"].reshape(len(lines[i]), -1) for i in (0, 1)]
    texts, discarded = TEXTS[:6], []
    for found, kept, pool, key, drawer in ((lines[0], codes[0], texts, KEY, POLICY),
                                           (lines[1], codes[1], discarded, later, REFERENCE)):
        assert len(found) == 3 * len(pool) > 0
        for call in range(-(-len(pool) // 4)):
            some = [pool[i % len(pool)] for i in range(4 * call, 4 * call + 4)]       # the last call is filled up
            tokens, logp, score = judged(some, jax.random.fold_in(key, call), drawer)
            for line, row, *expected in zip(found[12 * call:], kept[12 * call:], tokens, logp, score):
                np.testing.assert_array_equal(row, expected[0])
                np.testing.assert_allclose([line["logp"], line["score"]], expected[1:], rtol=1e-4)
        discarded += [text for i, text in enumerate(texts) if found is lines[0]
                      and max(line["score"] for line in found[3 * i:3 * i + 3]) <= threshold]
    assert 0 < len(discarded) < 6 and [line["prompt"] for line in lines[1]] == list(np.repeat(discarded, 3))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_step_of_internal_gap(tmp_path, objective):
    """Two micro-batches, the anchor within each, on accepted and rejected pictures, and rows of which the base drew
    some."""
    built, base, state = gap(tmp_path, objective=objective, batch=16)
    rng, texts, slices = np.random.default_rng(5), np.tile(TEXTS, 2), (slice(0, 8), slice(8, 16))
    chosen, rejected = rng.integers(0, toy.CODES, (2, 16, toy.N))
    logp, by_base = rng.standard_normal(16).astype(np.float32), np.array([1, 0, 1, 1, 1, 0, 1, 1] * 2, bool)
    of = lambda theta, tokens: toy.drawn(theta, texts, tokens)
    either = np.where(np.arange(16)[:, None] % 8 < 4, chosen, rejected)

    def held(theta):
        return np.mean([read_kl(theta, either[rows], texts[rows], 1) for rows in slices])

    def margin(theta):
        return (of(theta, chosen) - of(BASE, chosen) - of(theta, rejected) + of(BASE, rejected)).sum(axis=1)

    def loss(theta):
        likely = of(theta, chosen).mean()
        if objective == "sft":
            return -likely + 2.0 * held(theta)
        return np.log1p(np.exp(-0.4 * margin(theta))).mean() - 0.3 * likely + 2.0 * held(theta)

    asked = anchor.questions(UMM, texts.tolist(), UMM.lengths(TEXTS), one_device())
    batch = UMM.encode_prompts(texts.tolist()), asked, chosen, rejected, logp, by_base, {"data/prompts": np.float32(5)}, KEY
    after, metrics = built.update(jax.tree.map(jnp.copy, state), base, *batch)
    expected, norm = toy.descend(POLICY, loss, 0.5)
    assert_moved(after, expected)
    away = of(BASE, chosen) - of(POLICY, chosen)
    gaps = np.abs(of(BASE, chosen).sum(axis=1) - logp) / toy.N
    told = {"loss": loss(POLICY), "grad_norm": norm, "read_kl": held(POLICY), "data/prompts": 5,
            "kl": (np.exp(away) - away - 1).mean(), "entropy": -of(POLICY, chosen).mean(),
            "logp_gap": np.mean([gaps[rows][by_base[rows]].mean() for rows in slices])}
    if objective == "dpo":
        told |= {"margin": margin(POLICY).mean(), "preferred": (margin(POLICY) > 0).mean()}
        assert 0 < told["preferred"] < 1
    assert_told(metrics, told)


# ------------------------------------------------------------------ UAE

PICTURES = np.random.default_rng(8).integers(0, 36, (16, 1, toy.N, 1)).repeat(3, axis=3) / np.float32(255)
CAPTIONS = ["ab", "c", "dabc", "bb", "a", "cad", "d", "bca"]
ALBUM = type("Album", (), {"__getitem__": lambda self, i: {"pixels": PICTURES[i % 16], "prompt": CAPTIONS[i % 8]}})()


def uae(rate=RATE, **changes):
    settings = dict(prompts=4, group=3, clip=0.05, beta=0.3, advantage_eps=0.05, inner_steps=3, micro_batches=2,
                    waves=1, cold=2, pairs=8, stages="caption:1,draw:2", words=5) | changes
    built, base, state = build(UAE, rate, uae=settings)
    return built, base, state.replace(reference=toy.as_params(REFERENCE))


def cosine(pixels, others):
    """Mean over the patches of two pictures of the cosine of (grey, 1)."""
    a, b = (np.stack([np.asarray(x)[0, :, 0] * 25.5, np.ones(toy.N)], axis=1) for x in (pixels, others))
    return np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.fixture(scope="module")
def loop():
    return uae()


def test_the_cold_start_teaches_both_ways(loop):
    """-log p a word, all words of the step alike, and a token; what it leaves is what KL is measured to."""
    built, base, state = loop
    stage, *batch = built.rollout(state, base, 1, ALBUM, KEY, NoClock())
    assert stage == "cold"
    seen = toy.look(PICTURES[8:])

    def loss(theta):
        words = [toy.read(theta, picture, [*toy.ids(text), 0]) for picture, text in zip(seen, CAPTIONS)]
        return -np.concatenate(words).mean() - toy.drawn(theta, CAPTIONS, seen[:, 0]).mean()

    after, metrics = built.update(jax.tree.map(jnp.copy, state), base, stage, *batch)
    expected, norm = toy.descend(POLICY, loss, RATE)
    assert_moved(after, expected)
    assert_told(metrics, {"loss": loss(POLICY), "grad_norm": norm})
    jax.tree.map(np.testing.assert_array_equal, after.reference, after.trainable)


def test_stages_take_turns(loop):
    assert [loop[0].stage(step) for step in range(9)] == ["cold"] * 2 + ["caption", "draw", "draw"] * 2 + ["caption"]


def test_uae_compares_each_reconstruction_with_its_own_original(loop):
    """The captioner tells three captions of a picture, each drawn once; the drawer draws one caption three times."""
    built, base, state = loop
    of_words, of_pictures = jax.random.split(KEY)
    of_tokens, of_pixels = jax.random.split(of_pictures)
    for step, each in ((2, 3), (4, 1)):
        originals = PICTURES[(4 * step + np.arange(4)) % 16]
        stage, *batch, reward = built.rollout(state, base, step, ALBUM, KEY, NoClock())
        captions = toy.tell(POLICY, np.repeat(toy.look(originals), each, axis=0), 5, of_words)
        texts = ["".join(toy.LETTERS[i - 1] for i in words if i) or "-" for words in captions]
        texts = [text for text in texts for _ in range(3 // each)]
        tokens = toy.draw(POLICY, texts, of_tokens)
        drawn = toy.paint(tokens, of_pixels)
        np.testing.assert_allclose(reward, [cosine(drawn[s], originals[s // 3]) for s in range(12)], atol=1e-5)
        if stage == "caption":
            seen, _, words, logps, mask = batch
            np.testing.assert_array_equal(seen, toy.look(originals))
            assert [row[real].tolist() for row, real in zip(np.asarray(words), np.asarray(mask))] == captions
            for s, (row, real) in enumerate(zip(logps, np.asarray(mask))):
                likely = toy.read(POLICY, toy.look(originals[s // 3]), captions[s])
                np.testing.assert_allclose(row[real], likely, atol=1e-5)
        else:
            prompts, drew, logps = batch
            np.testing.assert_array_equal(drew, tokens)
            np.testing.assert_allclose(logps, toy.drawn(POLICY, texts, tokens), atol=1e-5)
            for row, real, text in zip(np.asarray(prompts.words), np.asarray(prompts.words_mask), texts):
                assert row[real].tolist() == toy.ids(text)


def test_a_step_of_the_captioner(loop):
    """Captions of unequal length count alike, equal ones share their mean, KL is measured to the reference."""
    built, base, state = loop
    _, seen, asked, words, logps, mask, _ = built.rollout(state, base, 2, ALBUM, KEY, NoClock())
    words = jnp.concatenate([words[:1], words[:1], words[2:]])                       # two of the first group are equal
    mask = jnp.concatenate([mask[:1], mask[:1], mask[2:]])
    reward = np.random.default_rng(1).uniform(size=12).astype(np.float32)
    captions = [row[real].tolist() for row, real in zip(np.asarray(words), np.asarray(mask))]
    shared = [np.mean([reward[r] for r in range(s // 3 * 3, s // 3 * 3 + 3) if captions[r] == captions[s]])
              for s in range(12)]
    after, metrics = built.update(jax.tree.map(jnp.copy, state), base, "caption", seen, asked, words, logps, mask,
                                  jnp.asarray(reward))
    pictures = np.asarray(seen).repeat(3, axis=0)
    logps_of = lambda theta: [toy.read(theta, picture, caption) for picture, caption in zip(pictures, captions)]
    expected, told = toy.grpo(POLICY, REFERENCE, logps_of, shared, built.config.uae, RATE)
    assert len(set(map(len, captions))) > 1 and told["clipped"] > 0
    changed = toy.as_tables(after.trainable)
    np.testing.assert_allclose(changed["lm_head"], expected["lm_head"], atol=2e-4)
    np.testing.assert_allclose(changed["mm_head"], POLICY["mm_head"], atol=1e-6)
    assert np.abs(expected["lm_head"] - POLICY["lm_head"]).max() > 1e-3
    assert_told(metrics, told | {"caption/length": np.mean([len(caption) for caption in captions])})
    jax.tree.map(np.testing.assert_array_equal, after.reference, state.reference)


def test_a_step_of_the_drawer(loop):
    built, base, state = loop
    texts, rng = [text for text in CAPTIONS[:4] for _ in range(3)], np.random.default_rng(2)
    tokens, reward = rng.integers(0, toy.CODES, (12, toy.N)), rng.uniform(size=12).astype(np.float32)
    after, metrics = built.update(jax.tree.map(jnp.copy, state), base, "draw", UMM.encode_prompts(texts), tokens,
                                  jnp.zeros((12, toy.N)), reward)
    expected, told = toy.grpo(POLICY, REFERENCE, lambda theta: toy.drawn(theta, texts, tokens), reward,
                              built.config.uae, RATE)
    np.testing.assert_allclose(toy.as_tables(after.trainable)["mm_head"], expected["mm_head"], atol=2e-4)
    assert np.abs(expected["mm_head"] - POLICY["mm_head"]).max() > 1e-3
    assert_told(metrics, told)
