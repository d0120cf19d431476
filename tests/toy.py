"""A unified model of 111 numbers, twice: as the methods take it, and in plain numpy, where an equation fits on a line.

`Toy` has the calls of `gvu_jax.umm` that methods make, over two tables of logits and no network. The functions below it
say the same of texts and numbers in float64, and know nothing of the package: not its masks, nor its order of rows.

    drawing   a picture has N tokens out of CODES; their logits are a row of the table "mm_head", which the prompt picks
    reading   a text's letters are words, the letter 0 ends it; their logits are a row of the table "lm_head", which the
              picture and the question pick, and in it one for the word before
    rendering token c becomes the grey value 10 c + noise, noise of 0, 1 or 2; what is seen is (c + noise) modulo CODES

A test of a method: let the method take a step, let `descend` take the same one down a loss that is written out, and
compare.
"""
import types

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import sampling
from gvu_jax.umm import Lengths, Prompts

N, CODES, WORDS, ROWS = 3, 4, 5, 3
LETTERS = "dabc"                                             # in the order of their ids, 1 to 4


def ids(text):
    return [1 + ord(letter) % 4 for letter in text]


def tables(seed, spread=1.0):
    """Two tables of logits, float64."""
    rng = np.random.default_rng(seed)
    return {"mm_head": spread * rng.standard_normal((ROWS, N, CODES)),
            "lm_head": spread * rng.standard_normal((ROWS, WORDS, WORDS))}


def as_params(theta):
    return {"ar": {name: {"kernel": jnp.asarray(table, jnp.float32)} for name, table in theta.items()}}


def as_tables(params):
    return {name: np.asarray(part["kernel"], np.float64) for name, part in params["ar"].items()}


class Toy:
    grid, image_tokens, picture_size, instruction = (1, N), N, (1, N), "d"
    ar = types.SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, intermediate_size=1)
    partition, trains, exact_likelihood = {}, {"all": ""}, True
    tokenizer = types.SimpleNamespace(batch_decode=lambda words, skip_special_tokens: [
        "".join(LETTERS[i - 1] for i in row if i) for row in np.asarray(words)])

    def lengths(self, texts, questions=None, end=False):
        longest = max(map(len, texts))
        return Lengths(longest, max(map(len, questions or [self.instruction])), longest + end)

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        if not all(texts):
            raise ValueError("empty")
        lengths, arrays = lengths or self.lengths(texts, questions, end), []
        rows = [ids(text) for text in texts]
        asked = [ids(question) for question in questions or [self.instruction] * len(texts)]
        for part, width, left in zip((rows, asked, [row + [0] * end for row in rows]), lengths, (True, True, False)):
            blank = [[-7] * (width - len(row)) for row in part]                     # what a mask leaves out is no word
            arrays.append(np.array([b + r if left else r + b for b, r in zip(blank, part)], np.int32))
            arrays.append(arrays[-1] != -7)
        return Prompts(*arrays)

    def _image_logits(self, params, prompts):
        row = jnp.sum(jnp.where(prompts.mask, prompts.tokens, 0), axis=1) % ROWS
        return jax.nn.log_softmax(params["ar"]["mm_head"]["kernel"][row])                            # [B, N, CODES]

    def sample_image(self, params, prompts, key, how, index=None):
        logits = jnp.repeat(self._image_logits(params, prompts), how.images_per_prompt, axis=0)
        keys = sampling.sample_keys(key, jnp.arange(len(logits)) if index is None else index)
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
        return tokens, jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]

    def image_logps(self, params, prompts, image_tokens, how=None, key=None):
        return jnp.take_along_axis(self._image_logits(params, prompts), image_tokens[..., None], axis=-1)[..., 0]

    def drawn_shapes(self, S):
        return jax.ShapeDtypeStruct((S, N), jnp.int32)

    def image_target(self, params, pixels):
        return self.see(params, pixels)[:, 0]

    def image_nll(self, params, prompts, target, key):
        return -self.image_logps(params, prompts, target)

    def seen_of(self, image_tokens):
        return image_tokens[:, None]

    def picture_of(self, image_tokens):
        return image_tokens

    def render(self, params, image_tokens, prompts, key, index=None):
        keys = sampling.sample_keys(key, jnp.arange(len(image_tokens)) if index is None else index)
        noise = jax.vmap(lambda k: jax.random.randint(k, (N,), 0, 3))(keys)
        return jnp.repeat((10 * image_tokens + noise)[:, None, :, None] / 255, 3, axis=-1)

    def see(self, params, pixels):
        grey = jnp.round(pixels[..., 0] * 255).astype(jnp.int32)
        return (grey // 10 + grey % 10) % CODES                                                          # [B, 1, N]

    def features(self, params, pixels):
        grey = pixels[:, 0, :, 0] * 25.5
        return jnp.stack([grey, jnp.ones_like(grey)], axis=-1)                                           # [B, N, 2]

    def _row(self, seen, prompts):
        asked = jnp.sum(jnp.where(prompts.question_mask, prompts.question, 0), axis=1)
        return (jnp.repeat(jnp.sum(seen, axis=(1, 2)), len(asked) // len(seen)) + asked) % ROWS

    def text_logits(self, params, seen, prompts):
        before = jnp.pad(prompts.words[:, :-1], ((0, 0), (1, 0)))
        return params["ar"]["lm_head"]["kernel"][self._row(seen, prompts)[:, None], before]          # [S, L, WORDS]

    def text_logps(self, params, seen, prompts):
        logps = jax.nn.log_softmax(self.text_logits(params, seen, prompts))
        return jnp.take_along_axis(logps, prompts.words[..., None], axis=-1)[..., 0], prompts.words_mask

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        row = jnp.repeat(self._row(seen, prompts), how.images_per_prompt)
        keys = sampling.sample_keys(key, jnp.arange(len(row)) if index is None else index)
        word, done, found = jnp.zeros_like(row), jnp.zeros(len(row), bool), []
        for t in range(steps):
            logits = jax.nn.log_softmax(params["ar"]["lm_head"]["kernel"][row, word])
            word = jax.vmap(jax.random.categorical)(jax.vmap(lambda k: jax.random.fold_in(k, t))(keys), logits)
            word = jnp.where(done, 0, word)
            logp = jnp.where(done, 0.0, jnp.take_along_axis(logits, word[:, None], axis=-1)[:, 0])
            found.append((word, logp, ~done))
            done = done | (word == 0)
        return tuple(jnp.stack(column, axis=1) for column in zip(*found))


# ------------------------------------------------------------------ the same in plain numpy

def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def drawing(theta, texts):
    """Log-probabilities of the tokens of a picture of each text [S, N, CODES]."""
    return log_softmax(theta["mm_head"][[sum(ids(text)) % ROWS for text in texts]])


def drawn(theta, texts, tokens):
    """log p of pictures [S, N] of texts: [S, N]."""
    return np.take_along_axis(drawing(theta, texts), np.asarray(tokens)[..., None], axis=-1)[..., 0]


def reading(theta, seen, words, question="d"):
    """Log-probabilities of a text's words [L, WORDS], where a picture [.., N] is seen."""
    row = (int(np.sum(seen)) + sum(ids(question))) % ROWS
    return log_softmax(theta["lm_head"][row][[0, *words[:-1]]])


def read(theta, seen, words, question="d"):
    """log p of the words: [L]."""
    return reading(theta, seen, words, question)[np.arange(len(words)), words]


def look(pixels):
    grey = np.round(np.asarray(pixels)[..., 0] * 255).astype(int)
    return (grey // 10 + grey % 10) % CODES


def draw(theta, texts, key):
    """One picture of each text, number s drawn with the key folded with s: tokens [S, N]."""
    return np.array([jax.random.categorical(jax.random.fold_in(key, s), logits.astype(np.float32))
                     for s, logits in enumerate(drawing(theta, texts))])


def paint(tokens, key):
    noise = np.array([jax.random.randint(jax.random.fold_in(key, s), (N,), 0, 3) for s in range(len(tokens))])
    return np.repeat((10 * tokens + noise)[:, None, :, None] / 255, 3, axis=-1)


def tell(theta, seen, steps, key):
    """One caption of each picture, word t of number s drawn with the key folded with s and then with t: lists of words,
    with their end where they come to it."""
    captions = []
    for s, picture in enumerate(seen):
        words = []
        while len(words) < steps and 0 not in words:
            of_word = jax.random.fold_in(jax.random.fold_in(key, s), len(words))
            logits = reading(theta, picture, [*words, 0])[-1].astype(np.float32)
            words.append(int(jax.random.categorical(of_word, logits)))
        captions.append(words)
    return captions


def slope(theta, loss):
    """The gradient of loss(theta), by differences."""
    def along(name, at, step=1e-5):
        moved = [theta[name].copy() for _ in range(2)]
        moved[0][at] += step
        moved[1][at] -= step
        return (loss({**theta, name: moved[0]}) - loss({**theta, name: moved[1]})) / (2 * step)
    return {name: np.array([along(name, at) for at in np.ndindex(table.shape)]).reshape(table.shape)
            for name, table in theta.items()}


def descend(theta, loss, rate):
    """One step of gradient descent; and the norm of the gradient."""
    down = slope(theta, loss)
    return ({name: table - rate * down[name] for name, table in theta.items()},
            np.sqrt(sum((part ** 2).sum() for part in down.values())))


def grpo(theta, reference, logps, reward, settings, rate, penalties={}):
    """GRPO as its paper has it: `inner_steps` steps up the clipped ratio to the policy that drew, less KL to the
    reference, less penalties.

    logps(theta) -> S arrays, of each sample's tokens. penalties: {name: (weight, function of theta)}. Returns the
    tables, and metrics as they stand before the last of the steps.
    """
    groups = np.asarray(reward, np.float64).reshape(-1, settings.group)
    A = ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True)
                                                    + settings.advantage_eps)).ravel()
    old, ref = logps(theta), logps(reference)

    def parts(theta):
        for new, was, base, a in zip(logps(theta), old, ref, A):
            ratio = np.exp(new - was)
            gain = np.minimum(ratio * a, np.clip(ratio, 1 - settings.clip, 1 + settings.clip) * a)
            yield gain, np.exp(base - new) - (base - new) - 1, gain != ratio * a, ratio

    mean = lambda theta, which: np.mean([np.mean(part[which]) for part in parts(theta)])
    loss = lambda theta: -mean(theta, 0) + settings.beta * mean(theta, 1) + sum(
        weight * value(theta) for weight, value in penalties.values())
    for _ in range(settings.inner_steps):
        metrics = {"loss": loss(theta), "kl": mean(theta, 1), "clipped": mean(theta, 2),
                   "ratio_max": max(part[3].max() for part in parts(theta))}
        metrics |= {name: value(theta) for name, (_, value) in penalties.items()}
        theta, metrics["grad_norm"] = descend(theta, loss, rate)
    return theta, metrics | {"reward/mean": groups.mean(), "reward/std": groups.std(axis=1).mean(),
                             "entropy": -np.mean([np.mean(one) for one in old])}
