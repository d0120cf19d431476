"""From the probabilities of the prompt's tokens to one reward a picture, and to one probability a word.

MEANS are the rewards that reward.mean names: GvU's geometric mean, two other ways to make one number of many, and what
the model answers when asked about the whole sentence. A verdict from outside on the pixels is no reading at all: that
of `reward.function`, a function of one's own, or "oracle", the checker of those worlds that have one: no method, but
the ceiling of all. `similarity` is UAE's: another picture that a picture should be like.
"""
import functools
import importlib.util
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import cli


def geometric_mean(logps, mask):
    """R = (prod_j p(T_j | picture, instruction, T_<j))^(1/L), equation of GvU, computed as exp(mean log p).

    logps [B, L] float32, mask [B, L] bool (True = a word of the prompt; at least one per row). Returns [B] float32.
    The product itself would underflow: 0.01^170 is 0 in float32, while the mean of logarithms is -4.6.
    """
    return jnp.exp(jnp.sum(jnp.where(mask, logps, 0.0), axis=1) / jnp.sum(mask, axis=1))


def product(logps, mask):
    """prod_j p(T_j | ..): [B], arguments as above. Long prompts underflow to 0, and then nothing is learned of them."""
    return jnp.exp(jnp.sum(jnp.where(mask, logps, 0.0), axis=1))


def minimum(logps, mask):
    """min_j p(T_j | ..), the least probable token: [B], arguments as above."""
    return jnp.exp(jnp.min(jnp.where(mask, logps, 0.0), axis=1))


ANSWERS = ("Yes", "No")


def question(prompt):
    """What `yes` asks about a whole prompt."""
    return f"Does this image describe {prompt.strip().rstrip('.')}?"


def question_lengths(umm, lengths):
    """umm.Lengths that hold the question about any prompt that `lengths` hold, and its answers."""
    asked = umm.lengths(ANSWERS, [question("a")] * len(ANSWERS))
    return asked._replace(question=asked.question + lengths.words + 4)     # 4: words may be cut otherwise in a sentence


def yes(logps, mask):
    """p(yes) / (p(yes) + p(no)) of B questions, each with its ANSWERS side by side: logps, mask [2 B, L] -> [B]."""
    answers = jnp.sum(jnp.where(mask, logps, 0.0), axis=1).reshape(-1, len(ANSWERS))
    return jax.nn.softmax(answers)[:, 0]


MEANS = {"geometric": geometric_mean, "product": product, "minimum": minimum, "yes": yes}


def similarity(features, others):
    """How alike pictures are to a vision encoder: the cosine of their features at each patch, mean over patches.

    features, others [B, N, D] float32. Returns [B] float32 in [-1, 1]; 1 is equal up to scale.
    """
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return jnp.mean(jnp.sum(unit(features) * unit(others), axis=-1), axis=-1)


def load_function(told):
    """The function that a text FILE.py:NAME means. ValueError or OSError, in one line, where there is none.

    What it is for a reward: (pixels uint8 [S, H, W, 3], list of S prompts) -> S finite numbers, on the host; see `ask`.
    """
    file, _, name = str(told).rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"reward.function is {told!r}; it must be FILE.py:NAME, a file and a function in it")
    path = cli.path(file)
    if not path.is_file():
        raise FileNotFoundError(f"reward.function: there is no file {path}")
    if not callable(function := getattr(module_of(path, path.stat().st_mtime_ns), name, None)):
        raise ValueError(f"reward.function: {path} has no function {name}")
    return function


@functools.lru_cache(maxsize=1)                    # it may load a model, and is asked for more than once
def module_of(path, changed):
    """The module that a file is, run once as long as it does not change."""
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:                                                   # it is a stranger's code
        raise ValueError(f"reward.function: {path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def ask(function, pixels, prompts):
    """What a function of one's own says of S pictures, float32 [S]. pixels [S, H, W, 3] in [0, 1]; prompts: S texts.

    Raises ValueError, in one line, where it fails or gives anything but a finite number for each picture.
    """
    pixels = np.round(np.asarray(pixels) * 255).astype(np.uint8)
    try:
        found = np.asarray(function(pixels, list(prompts)), np.float32)
    except Exception as error:                                                   # it is a stranger's code
        raise ValueError(f"reward.function failed: {type(error).__name__}: {error} (GVU_TRACEBACK=1 shows "
                         f"where)") from error
    if found.shape != (len(pixels),):
        raise ValueError(f"reward.function gave an array of shape {found.shape} for {len(pixels)} pictures of the "
                         f"shape {pixels.shape[1:]}; it must be one number a picture, of shape ({len(pixels)},)")
    if not np.isfinite(found).all():
        first = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"reward.function gave {found[first]} for picture {first} ({prompts[first]!r:.60}); it must "
                         f"give finite numbers")
    return found


def check(settings, means):
    """Raises ValueError where the config's `reward` names no teacher, no view or none of the `means`, or has a function
    of one's own with what it does not go with."""
    if settings.get("function"):
        load_function(settings.function)
        if settings.view != "pixels":
            raise ValueError(f"reward.function reads pictures: set reward.view = 'pixels', not {settings.view!r}")
        if "oracle" not in means:
            raise ValueError("reward.function goes with config.method = 'gvu'")
        if settings.mean == "oracle":
            raise ValueError("reward.function and reward.mean = 'oracle' are both verdicts from outside: take one")
        if settings.get("own") == 1:
            raise ValueError("reward.own = 1 leaves nothing to reward.function, which would not be asked: set it below "
                             "1, or take the function away")
    elif settings.get("own"):
        raise ValueError("reward.own is the share of the model's own reward beside a reward.function; there is none")
    for name, known in {"teacher": ("base", "policy"), "view": ("pixels", "tokens"), "mean": means}.items():
        if settings[name] not in known:
            raise ValueError(f"reward.{name} is {settings[name]!r}; it must be one of {', '.join(known)}")


def join_tokens(text, spans, probabilities):
    """Tokens to words: (words, probabilities); a word's probability is the product of its tokens'.

    spans: (start, end) of each token in `text`. A token goes on with the word before it where both meet in letters or
    digits ("un|believ|able"), and where it holds only a part of a character. Blanks belong to the word after them, a
    comma is a word of its own, and so is each token of a script that is written without blanks (Chinese, Japanese).
    """
    def is_letter(character):
        return unicodedata.category(character)[0] in "LMN" and unicodedata.east_asian_width(character) not in "WF"

    starts, products, reach = [], [], 0
    for (start, end), probability in zip(spans, probabilities):
        goes_on = starts and (start < reach                                        # the rest of a character
                              or not text[starts[-1]:start].strip()                # nothing but blanks so far
                              or not text[start:].strip()                          # nothing but blanks from here on
                              or is_letter(text[start - 1]) and is_letter(text[start]))
        if goes_on:
            products[-1] *= float(probability)
        else:
            starts.append(start)
            products.append(float(probability))
        reach = max(reach, end)
    words = [" ".join(text[start:end].split()) for start, end in zip(starts, [*starts[1:], len(text)])]
    return words, products
