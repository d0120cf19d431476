"""How good is a model in the shapes world? Drawing, judged by the exact checker, and understanding, by likelihood.

    draw         samples pictures for held-out prompts; the checker reads the pixels; GenEval's score by category.
                 The same pictures give the AUC: does the intrinsic reward rank right pictures above wrong ones?
    understand   true renderings; which of several captions does the model find most probable?
                 four_way      the true caption against three others of its category
                 relation      "A left of B" against "A right of B"          count    n against n +- 1
                 binding       colors exchanged                              (two-way: 0.5 is chance)
"""
import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import rewards
from gvu_jax.shapes import checker, world

TESTS = ("four_way", *world.HARD_KINDS)


def choose_prompts(metas, count, rng):
    """`count` prompts, as many of each category as of any other (with repetition where a category has too few)."""
    chosen = []
    for i, tag in enumerate(world.TAGS):
        of_tag = [meta for meta in metas if meta["tag"] == tag]
        need = count // len(world.TAGS) + (i < count % len(world.TAGS))
        chosen += [of_tag[j] for k in range(-(-need // len(of_tag))) for j in rng.permutation(len(of_tag))][:need]
        chosen = chosen if len(chosen) < count else chosen[:count]
    return [chosen[i] for i in rng.permutation(len(chosen))]


class Suite:
    """Fixed prompts, pictures and tests, and the compiled programs that a run already has.

    umm, programs (umm.Programs): the model. metas: prompts to draw; their number is a multiple of `batch`, the
    prompts of one call. group: pictures of each. choices: understanding choices per test. lengths: umm.Lengths.
    """

    def __init__(self, umm, programs, metas, batch, group, choices, lengths, forbidden, seed):
        if len(metas) % batch:
            raise ValueError(f"{len(metas)} evaluation prompts are not a multiple of the batch of {batch}")
        self.umm, self.programs, self.metas, self.group, self.lengths = umm, programs, metas, group, lengths
        self.rows = batch * group                                   # samples, or rows of reading, in one call
        self.batches = [metas[i:i + batch] for i in range(0, len(metas), batch)]
        self.key = jax.random.key(seed)
        rng, place = np.random.default_rng(seed), world.World(side=umm.grid[0])
        self.tests = {"four_way": world.four_way(rng, world.sample_scenes(rng, 4096, place), choices, forbidden)}
        self.tests |= {kind: world.hard_pairs(rng, kind, choices, place) for kind in world.HARD_KINDS}
        self.pictures = {name: world.render(np.stack([choice.scene for choice in test]), rng)
                         for name, test in self.tests.items()}
        self.mean = jax.jit(rewards.geometric_mean)

    def draw(self, policy, teacher):
        """Returns ({"overall", "<category>", "reward"}, {"<category>" | "overall": AUC}, pictures uint8
        [prompts, G, H, W, 3], right bool [prompts, G]). policy draws, teacher scores; both are params."""
        pictures, right, scores = [], [], []
        for i, metas in enumerate(self.batches):
            prompts = self.umm.encode_prompts([meta["prompt"] for meta in metas], self.lengths)
            grouped = prompts.repeat(self.group)
            keys = jax.random.split(jax.random.fold_in(self.key, i))
            tokens, _ = self.programs.sample(policy, prompts, keys[0])
            pixels = self.programs.render(policy, tokens, prompts, keys[1])
            logps, mask = self.programs.read(teacher, self.programs.see(teacher, pixels), grouped)
            scores.append(np.asarray(self.mean(logps, mask)))
            pixels = np.asarray(pixels)
            right.append(checker.judge(pixels, [meta for meta in metas for _ in range(self.group)]))
            pictures.append((pixels * 255).round().astype(np.uint8).reshape(len(metas), self.group, *pixels.shape[1:]))
        right = np.concatenate(right).reshape(-1, self.group)
        scores = np.concatenate(scores).reshape(-1, self.group)
        tags = np.array([meta["tag"] for meta in self.metas])
        by_tag = {tag: tags == tag for tag in world.TAGS}
        drawn = {tag: float(right[rows].mean()) for tag, rows in by_tag.items()}
        drawn = {"overall": float(np.mean(list(drawn.values()))), **drawn, "reward": float(scores.mean())}
        areas = {tag: auc(scores[rows], right[rows]) for tag, rows in by_tag.items()}
        areas = {"overall": auc(scores, right), **areas}
        return drawn, {tag: area for tag, area in areas.items() if area is not None}, np.concatenate(pictures), right

    def understand(self, params):
        """{test: share of choices where the true caption has the highest mean log-probability}."""
        return {name: self._choose(params, test, self.pictures[name]) for name, test in self.tests.items()}

    def _choose(self, params, test, pictures):
        ways = len(test[0].prompts)
        texts = [meta["prompt"] for choice in test for meta in choice.prompts]
        index = np.repeat(np.arange(len(test)), ways)
        scores = []
        for start in range(0, len(texts), self.rows):
            # The last call is filled up by repeating its first rows: one set of shapes, one compilation.
            rows = (start + np.arange(self.rows)) % len(texts)
            prompts = self.umm.encode_prompts([texts[i] for i in rows], self.lengths)
            seen = self.programs.see(params, jnp.asarray(pictures[index[rows]]))
            scores.append(np.asarray(self.mean(*self.programs.read(params, seen, prompts))))
        scores = np.concatenate(scores)[:len(texts)].reshape(-1, ways)
        return float((scores.argmax(axis=1) == 0).mean())


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
