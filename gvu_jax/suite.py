"""How good is a model? Held-out prompts drawn and judged, and understanding measured by likelihood.

    sample       pictures for fixed prompts, which a judge, where the world has one, calls right or wrong
    grade        what that comes to: GenEval's score by category, the share of pictures that are right and show nothing
                 else, the objects a picture, the haze where nothing stands, and the AUC of the intrinsic reward (does
                 it rank right pictures above wrong ones?). Without a judge the score is the intrinsic reward itself.
    judge_own    what the model itself says of those pictures when asked, against the judge
    understand   pictures with several captions each: how often does the model find the true one most probable?
    Unified      picture -> caption -> picture: what comes back, and was it said or guessed?

Then what needs no world and only a `gvu_jax.Model`: `choose` (multiple choice by likelihood), `unify` (does the model
believe its own pictures?) and `cycle` (are a prompt's words found again in the caption of its picture?). And what is
made of many yes and no: `by_category` (means with intervals), `auc`, `reliability`.
"""
import collections
import re
from typing import NamedTuple

import jax
import numpy as np

from gvu_jax import data, rewards, sharding


class Verdicts(NamedTuple):
    """What a judge says of pictures: arrays of one shape, one value a picture.

    right     bool: it shows what its prompt asks for, whatever else it shows
    exact     bool: it is right, and shows nothing that was not asked for
    objects   int: how many objects stand in it
    asked     int: how many its prompt asks for
    haze      float: how far what should be empty is from that, in levels of 255; 0 for a clean ground
    """
    right: np.ndarray
    exact: np.ndarray
    objects: np.ndarray
    asked: np.ndarray
    haze: np.ndarray

    @property
    def marks(self):
        """For the frames of pictures.image_grid: 1 for exact, 0.5 for right with more than was asked, 0 for wrong."""
        return (self.right.astype(float) + self.exact) / 2


class Suite:
    """Fixed prompts, pictures and tests, and the compiled programs that a run already has.

    umm, programs (umm.Programs): the model. metas: prompts to draw, dicts with "prompt" and perhaps "tag"; their number
    is a multiple of `batch`, the prompts of one call. group: pictures of each. lengths: umm.Lengths. judge: (pixels
    [B, H, W, 3] in [0, 1], B metas) -> Verdicts of [B], or None. tests: {name: (pictures [M, H, W, 3], M tuples of
    captions, the true one first)}. view: what rewards are read from, "pixels", or "tokens", what was drawn as it is.
    paints: whether pictures are made at all; else what is read stands for them, and no judge sees any.
    """

    def __init__(self, umm, programs, metas, batch, group, lengths, seed, judge=None, tests=(), view="pixels",
                 paints=True):
        if len(metas) % batch:
            raise ValueError(f"{len(metas)} evaluation prompts are not a multiple of the batch of {batch}")
        self.umm, self.programs, self.metas, self.group, self.lengths = umm, programs, metas, group, lengths
        self.rows = batch * group                                   # samples, or rows of reading, in one call
        self.batches = [metas[i:i + batch] for i in range(0, len(metas), batch)]
        self.key, self.judge, self.tests, self.view = jax.random.key(seed), judge, dict(tests), view
        self.paints = paints
        if not paints and view != "tokens":
            raise ValueError("a suite that makes no pictures reads what was drawn as it is: give it view = 'tokens'")
        self.mesh = programs.sample.mesh
        self.mean, self.yes = (sharding.Program(call, self.mesh) for call in (rewards.geometric_mean, rewards.yes))

    def grade(self, scores, verdicts):
        """Rewards [prompts, G] and Verdicts of [prompts, G] or None, as `sample` returns them -> {"overall",
        "<category>", "reward"}, and what else the judge finds: {"auc": .., "exact": share, "objects", "asked" and
        "haze": means a picture}, each {"overall" | "<category>": value}; {"auc": {}} without a judge."""
        by_tag = rows_by_tag(self.metas)

        def means(values):
            found = {tag: float(values[rows].mean()) for tag, rows in by_tag.items()}
            return {"overall": float(np.mean(list(found.values()))), **found}

        reward = {"reward": float(scores.mean())}
        if verdicts is None:
            return means(scores) | reward, {"auc": {}}
        right = verdicts.right
        areas = {"overall": auc(scores, right)} | {tag: auc(scores[rows], right[rows]) for tag, rows in by_tag.items()}
        return means(right) | reward, {"auc": {tag: area for tag, area in areas.items() if area is not None}} | {
            name: means(getattr(verdicts, name)) for name in ("exact", "objects", "asked", "haze")}

    def sample(self, policy, teacher):
        """Pictures uint8 [prompts, G, H, W, 3] (where none are made what is read of them, [prompts, G, ..]), their
        rewards [prompts, G], and Verdicts of [prompts, G] or None. policy draws, teacher scores; both are params."""
        pictures, verdicts, scores = [], [], []
        for i, metas in enumerate(self.batches):
            texts = [meta["prompt"] for meta in metas]
            prompts, grouped = (sharding.place_prompts(self.umm, texts, self.lengths, self.mesh, times)
                                for times in (1, self.group))
            keys = sharding.put(tuple(jax.random.split(jax.random.fold_in(self.key, i))), self.mesh)
            tokens, _ = self.programs.sample(policy, prompts, keys[0])
            pixels = self.programs.render(policy, tokens, prompts, keys[1]) if self.paints else None
            seen = self.umm.seen_of(tokens) if self.view == "tokens" else self.programs.see(teacher, pixels)
            logps, mask = self.programs.read(teacher, seen, grouped)
            reward, made = sharding.fetch((self.mean(logps, mask), pixels if self.paints else seen))
            scores.append(reward)
            if self.judge:
                verdicts.append(self.judge(made, [meta for meta in metas for _ in range(self.group)]))
            if self.paints:
                made = (made * 255).round().astype(np.uint8)
            pictures.append(made.reshape(len(metas), self.group, *made.shape[1:]))
        in_groups = lambda parts: np.concatenate(parts).reshape(-1, self.group)
        verdicts = Verdicts(*map(in_groups, zip(*verdicts))) if self.judge else None
        return np.concatenate(pictures), in_groups(scores), verdicts

    def judge_own(self, params, pictures, verdicts, words=None):
        """What the understanding branch of `params` says of the pictures that `sample` returned: {"non_unification":
        share that it rejects} and, with Verdicts, "accuracy" (share on which both agree: accepted here, exact there),
        "false_positives" (share of the others that it accepts) and, where there are both kinds, "auc_<category>" (does
        it tell exact pictures from others?) and "auc", their mean.

        It accepts what it answers with "yes" rather than "no" when asked whether the picture shows its prompt; or, with
        `words`, what gives the prompt's words a geometric mean above that. Either way a prompt that leaves out what
        stands there describes it badly: so the judge is asked for exact pictures.
        """
        place, score, least = (sharding.place_questions, self.yes, 0.5) if words is None else (
            sharding.place_prompts, self.mean, words)
        found = []
        for metas, some in zip(self.batches, np.split(pictures, len(self.batches))):
            some = some.reshape(-1, *some.shape[2:])
            asked = place(self.umm, [meta["prompt"] for meta in metas], self.lengths, self.mesh, self.group)
            seen = self.programs.see(params, sharding.put(some.astype(np.float32) / 255, self.mesh)) if (
                self.paints) else sharding.put(some, self.mesh)
            scores = score(*self.programs.read(params, seen, asked))
            found.append(sharding.fetch(scores).reshape(-1, self.group))
        scores = np.concatenate(found)
        accepted = scores > least
        found = {"non_unification": float(1 - accepted.mean())}
        if verdicts is not None:
            exact = verdicts.exact
            areas = {f"auc_{tag}": auc(scores[rows], exact[rows]) for tag, rows in rows_by_tag(self.metas).items()}
            areas = {name: area for name, area in areas.items() if area is not None}
            found |= areas | ({"auc": float(np.mean(list(areas.values())))} if areas else {})
            found |= {"accuracy": float((accepted == exact).mean()),
                      "false_positives": float(accepted[~exact].mean()) if not exact.all() else 0.0}
        return found

    def understand(self, params):
        """{test: share of its choices where the true caption has the highest mean log-probability}."""
        return {name: float(right.mean()) for name, right in self.choices(params).items()}

    def choices(self, params):
        """{test: whether the true caption was chosen, bool [M]}."""
        return {name: self._choose(params, *test) for name, test in self.tests.items()}

    def _choose(self, params, pictures, captions):
        ways = len(captions[0])
        texts = [text for choice in captions for text in choice]
        index = np.repeat(np.arange(len(captions)), ways)
        scores = [sharding.fetch(self.mean(*read)) for read in self._read(params, pictures, index, texts)]
        scores = np.concatenate(scores)[:len(texts)].reshape(-1, ways)
        return scores.argmax(axis=1) == 0

    def read_words(self, params, pictures, texts):
        """What `params` reads of each text in its picture, [M, H, W, 3] in [0, 1]: M dicts of "reward", "words" and
        their "probabilities"."""
        reads = [sharding.fetch((self.mean(*read), *read))
                 for read in self._read(params, pictures, np.arange(len(texts)), texts)]
        told = []
        for text, (reward, logps, mask) in zip(texts, (row for read in reads for row in zip(*read))):
            said = self.umm.said(text)
            spans = self.umm.tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            words, probabilities = rewards.join_tokens(said, spans, np.exp(logps[mask]))
            told.append({"reward": float(reward), "words": words, "probabilities": probabilities})
        return told

    def _read(self, params, pictures, index, texts):
        """logps and mask [rows, L] of one call after the other; texts[i] is about pictures[index[i]]."""
        for start in range(0, len(texts), self.rows):
            # The last call is filled up by repeating its first rows: one set of shapes, one compilation.
            rows = (start + np.arange(self.rows)) % len(texts)
            prompts = sharding.place_prompts(self.umm, [texts[i] for i in rows], self.lengths, self.mesh)
            seen = self.programs.see(params, sharding.put(pictures[index[rows]], self.mesh))
            yield self.programs.read(params, seen, prompts)


# ---- suites of any model -------------------------------------------------------------------------------------------

CHUNK = 256          # questions whose pictures are in memory at a time


def choose(model, choices):
    """For each of data.read_choices: whether the right option has the highest mean log-probability, bool [M].

    The options are compared over picture and question, without a list of them in between.
    """
    most, right = max(len(choice["options"]) for choice in choices), []
    pairs = [(option, choice["question"]) for choice in choices for option in choice["options"]]
    lengths = model.umm.lengths(*map(list, zip(*pairs)))                            # one compilation for all chunks
    for start in range(0, len(choices), CHUNK):
        chunk = choices[start:start + CHUNK]
        texts = [(choice["options"] * most)[:most] for choice in chunk]             # filled up with options again
        logps, mask = model.read([data.decode_choice(choice) for choice in chunk], sum(texts, []),
                                 [choice["question"] for choice in chunk], lengths)
        best = np.asarray(rewards.geometric_mean(logps, mask)).reshape(-1, most).argmax(axis=1)
        right += [found % len(choice["options"]) == choice["answer"] for found, choice in zip(best, chunk)]
    return np.array(right)


def unify(model, pictures, prompts):
    """P(yes) [prompts, G] that the model gives to "Does this image describe ..?" of pictures [prompts, G, H, W, 3]."""
    asked = [prompt for prompt in prompts for _ in range(pictures.shape[1])]
    return model.believes(pictures.reshape(-1, *pictures.shape[2:]), asked).reshape(pictures.shape[:2])


STOP_WORDS = set("a an the of and in on with is are there photo picture image".split())


def content(text):
    """The words of a text that say what it shows: lower case, in the singular, as a set."""
    words = (re.sub("(?<=s)es$|(?<!s)s$", "", word) for word in re.findall(r"\w+", text.lower()))
    return set(words) - STOP_WORDS


def cycle(model, pictures, prompts, question):
    """Captions of pictures [prompts, G, ..], what the model answers to `question`, and the share of their prompt's
    words in them: (list of prompts x G texts, float [prompts, G])."""
    captions = model.answer(pictures.reshape(-1, *pictures.shape[2:]), question, max_words=64)
    asked = [content(prompt) for prompt in prompts for _ in range(pictures.shape[1])]
    found = [len(words & content(caption)) / max(len(words), 1) for words, caption in zip(asked, captions)]
    return captions, np.array(found).reshape(pictures.shape[:2])


# ---- many yes and no -----------------------------------------------------------------------------------------------

def choose_prompts(metas, count, rng):
    """`count` prompts, category by category, as many of each (with repetition where a category has too few)."""
    chosen, by_tag = [], rows_by_tag(metas)
    for i, rows in enumerate(by_tag.values()):
        of_tag, need = np.flatnonzero(rows), count // len(by_tag) + (i < count % len(by_tag))
        rounds = range(-(-need // len(of_tag)))
        chosen += [metas[of_tag[j]] for _ in rounds for j in rng.permutation(len(of_tag))][:need]
    return chosen


def rows_by_tag(metas):
    """{category: which of the metas are of it, bool [prompts]}; those without a "tag" are one category."""
    tags = np.array([meta.get("tag", "prompts") for meta in metas])
    return {tag: tags == tag for tag in dict.fromkeys(tags.tolist())}


def by_category(values, metas, draws=2000):
    """{"overall" | category: [mean, low, high]} of values [prompts, G]; overall is the mean over categories.

    low and high bound the 95 % of a bootstrap over prompts: means of as many prompts drawn with replacement. Pictures
    of one prompt resemble each other, so a prompt goes with all of them, and with its repetitions. Where all values are
    equal the interval is a point, as always with the bootstrap.
    """
    rng, found = np.random.default_rng(0), {}
    prompts, values = np.array([meta["prompt"] for meta in metas]), np.asarray(values, float)
    for tag, rows in rows_by_tag(metas).items():
        _, which = np.unique(prompts[rows], return_inverse=True)
        sums, counts = np.bincount(which, values[rows].mean(axis=1)), np.bincount(which)
        drawn = rng.integers(len(sums), size=(draws, len(sums)))
        found[tag] = values[rows].mean(), sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    means, drawn = zip(*found.values())
    found = {"overall": (np.mean(means), np.mean(drawn, axis=0)), **found}
    return {tag: [float(mean), *np.percentile(draws, [2.5, 97.5]).tolist()] for tag, (mean, draws) in found.items()}


def reliability(scores, right, bins=10):
    """How far a score can be taken for the probability of being right: {"error", "bins"}.

    scores in [0, 1] and right bool, same shape. bins: as many scores in each, from the lowest to the highest; of each
    its mean score, its share of right ones and its size. error: the expected calibration error, the mean distance of
    the two (Naeini et al. 2015, here with bins of equal size).
    """
    order = np.argsort(np.ravel(scores), kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    found = [{"score": float(np.ravel(scores)[part].mean()), "right": float(np.ravel(right)[part].mean()),
              "count": len(part)} for part in parts]
    return {"error": sum(abs(b["score"] - b["right"]) * b["count"] for b in found) / len(order), "bins": found}


class Unified:
    """What survives the way from a picture to its caption and back (Unified-Bench of UAE).

    loop: methods.uae.Loop, which draws one picture for each of a group of captions. pictures: [M, H, W, 3] float32 in
    [0, 1], M a multiple of `batch`. judge: (originals, captions, pictures, a row for each caption) -> {name: bool
    [rows]}, or None.
    """

    def __init__(self, loop, pictures, batch, seed, judge=None):
        self.loop, self.judge, self.key = loop, judge, jax.random.key(seed)
        self.batches = np.split(pictures, len(pictures) // batch)

    def measure(self, policy, base):
        """Returns {name: [M, G]}: "similarity" (to the model's own encoder), how alike the loop's scorers find them,
        "length" (tokens of a caption, with the end) and what the judge says; captions, M lists of G texts; and what was
        drawn from them, uint8 [M, G, H, W, 3]."""
        scores, texts, pictures, loop = collections.defaultdict(list), [], [], self.loop
        for i, originals in enumerate(self.batches):
            keys = sharding.put(tuple(jax.random.split(jax.random.fold_in(self.key, i))), loop.mesh)
            pixels = sharding.put(originals, loop.mesh)
            *_, words, _, mask = loop.say(loop.groups, policy, base, pixels, keys[0])
            captions = loop.texts(words)
            _, _, drawn = loop.draw(loop.singles, policy, base, captions, keys[1])
            compared = loop.compare(base, loop.outside.params, drawn, pixels)
            (_, alike), mask, drawn = sharding.fetch((compared, mask, drawn))
            judged = self.judge(np.repeat(originals, len(captions) // len(originals), axis=0), captions, drawn) if (
                self.judge) else {}
            for name, found in {**alike, "length": mask.sum(axis=1), **judged}.items():
                scores[name].append(found)
            texts += captions
            pictures.append((drawn * 255).round().astype(np.uint8))
        M = sum(map(len, self.batches))
        scores = {name: np.concatenate(parts).reshape(M, -1) for name, parts in scores.items()}
        pictures = np.concatenate(pictures)
        return scores, np.reshape(texts, (M, -1)).tolist(), pictures.reshape(M, -1, *pictures.shape[1:])


def auc(scores, right):
    """Area under the ROC curve: how often a right picture outscores a wrong one, ties half (Mann-Whitney).

    scores float, right bool, same shape. None where all are right or all are wrong.
    """
    scores, right = np.ravel(scores), np.ravel(right)
    if right.all() or not right.any():
        return None
    _, rank, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[rank]                    # 1-based, ties share their mean rank
    wins = mean_rank[right].sum() - right.sum() * (right.sum() + 1) / 2
    return float(wins / (right.sum() * (~right).sum()))
