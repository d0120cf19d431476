"""How good is a model? Held-out prompts drawn and judged, and understanding measured by likelihood.

    draw         samples pictures for fixed prompts; a judge, where the world has one, says which are right: GenEval's
                 score by category, and the AUC of the intrinsic reward (does it rank right pictures above wrong ones?).
                 Without a judge the score is the intrinsic reward itself.
    understand   pictures with several captions each: how often does the model find the true one most probable?
    Unified      picture -> caption -> picture: what comes back, and was it said or guessed?
"""
import collections

import jax
import numpy as np

from gvu_jax import rewards, sharding


class Suite:
    """Fixed prompts, pictures and tests, and the compiled programs that a run already has.

    umm, programs (umm.Programs): the model. metas: prompts to draw, dicts with "prompt" and perhaps "tag"; their number
    is a multiple of `batch`, the prompts of one call. group: pictures of each. lengths: umm.Lengths. judge: (pixels,
    metas) -> bool [B], or None. tests: {name: (pictures [M, H, W, 3], M tuples of captions, the true one first)}.
    """

    def __init__(self, umm, programs, metas, batch, group, lengths, seed, judge=None, tests=()):
        if len(metas) % batch:
            raise ValueError(f"{len(metas)} evaluation prompts are not a multiple of the batch of {batch}")
        self.umm, self.programs, self.metas, self.group, self.lengths = umm, programs, metas, group, lengths
        self.rows = batch * group                                   # samples, or rows of reading, in one call
        self.batches = [metas[i:i + batch] for i in range(0, len(metas), batch)]
        self.key, self.judge, self.tests = jax.random.key(seed), judge, dict(tests)
        self.mesh = programs.sample.mesh
        self.mean = sharding.Program(rewards.geometric_mean, self.mesh)

    def draw(self, policy, teacher):
        """Returns ({"overall", "<category>", "reward"}, {"<category>" | "overall": AUC}, pictures uint8
        [prompts, G, H, W, 3], right bool [prompts, G] or None). policy draws, teacher scores; both are params."""
        pictures, right, scores = [], [], []
        for i, metas in enumerate(self.batches):
            texts = [meta["prompt"] for meta in metas]
            prompts, grouped = (sharding.place_prompts(self.umm, texts, self.lengths, self.mesh, times)
                                for times in (1, self.group))
            keys = sharding.put(tuple(jax.random.split(jax.random.fold_in(self.key, i))), self.mesh)
            tokens, _ = self.programs.sample(policy, prompts, keys[0])
            pixels = self.programs.render(policy, tokens, prompts, keys[1])
            logps, mask = self.programs.read(teacher, self.programs.see(teacher, pixels), grouped)
            reward, pixels = sharding.fetch((self.mean(logps, mask), pixels))
            scores.append(reward)
            if self.judge:
                right.append(self.judge(pixels, [meta for meta in metas for _ in range(self.group)]))
            pictures.append((pixels * 255).round().astype(np.uint8).reshape(len(metas), self.group, *pixels.shape[1:]))
        in_groups = lambda parts: np.concatenate(parts).reshape(-1, self.group)
        pictures, scores = np.concatenate(pictures), in_groups(scores)
        right = in_groups(right) if self.judge else None
        tags = np.array([meta.get("tag", "prompts") for meta in self.metas])
        by_tag = {tag: tags == tag for tag in dict.fromkeys(tags.tolist())}
        drawn = {tag: float((scores if right is None else right)[rows].mean()) for tag, rows in by_tag.items()}
        drawn = {"overall": float(np.mean(list(drawn.values()))), **drawn, "reward": float(scores.mean())}
        if right is None:
            return drawn, {}, pictures, None
        areas = {"overall": auc(scores, right)} | {tag: auc(scores[rows], right[rows]) for tag, rows in by_tag.items()}
        return drawn, {tag: area for tag, area in areas.items() if area is not None}, pictures, right

    def understand(self, params):
        """{test: share of its choices where the true caption has the highest mean log-probability}."""
        return {name: self._choose(params, *test) for name, test in self.tests.items()}

    def _choose(self, params, pictures, captions):
        ways = len(captions[0])
        texts = [text for choice in captions for text in choice]
        index = np.repeat(np.arange(len(captions)), ways)
        scores = []
        for start in range(0, len(texts), self.rows):
            # The last call is filled up by repeating its first rows: one set of shapes, one compilation.
            rows = (start + np.arange(self.rows)) % len(texts)
            prompts = sharding.place_prompts(self.umm, [texts[i] for i in rows], self.lengths, self.mesh)
            seen = self.programs.see(params, sharding.put(pictures[index[rows]], self.mesh))
            scores.append(sharding.fetch(self.mean(*self.programs.read(params, seen, prompts))))
        scores = np.concatenate(scores)[:len(texts)].reshape(-1, ways)
        return float((scores.argmax(axis=1) == 0).mean())


class Unified:
    """What survives the way from a picture to its caption and back (Unified-Bench of UAE).

    loop: methods.uae.Loop, which draws one picture for each of a group of captions. pictures: [M, H, W, 3] float32 in
    [0, 1], M a multiple of `batch`. judge: (originals, captions, pictures, one row a caption) -> {name: bool [rows]}, or
    None.
    """

    def __init__(self, loop, pictures, batch, seed, judge=None):
        self.loop, self.judge, self.key = loop, judge, jax.random.key(seed)
        self.batches = np.split(pictures, len(pictures) // batch)

    def measure(self, policy, base):
        """Returns {name: [M, G]}: "similarity" (the reward), "length" (tokens of a caption, with the end) and what the
        judge says; captions, M lists of G texts; and what was drawn from them, uint8 [M, G, H, W, 3]."""
        scores, texts, pictures, loop = collections.defaultdict(list), [], [], self.loop
        for i, originals in enumerate(self.batches):
            keys = sharding.put(tuple(jax.random.split(jax.random.fold_in(self.key, i))), loop.mesh)
            pixels = sharding.put(originals, loop.mesh)
            *_, words, _, mask = loop.say(loop.groups, policy, base, pixels, keys[0])
            captions = loop.texts(words)
            _, _, drawn = loop.draw(loop.singles, policy, base, captions, keys[1])
            alike, mask, drawn = sharding.fetch((loop.alike(base, drawn, pixels), mask, drawn))
            judged = self.judge(np.repeat(originals, len(captions) // len(originals), axis=0), captions, drawn) if (
                self.judge) else {}
            for name, found in {"similarity": alike, "length": mask.sum(axis=1), **judged}.items():
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
