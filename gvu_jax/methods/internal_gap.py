"""Internal Gap: Turning Internal Gap into Self-Improvement (ICLR 2026).

A unified model often rejects what it has drawn itself: asked "Does this image describe ...?", it says no. The share of
such pictures is its non-unification; what it accepts and what it rejects are data to learn from.

    1. draw      the base draws N candidates for each prompt of a pool; the understanding      umm.sample_image, render,
                 branch scores each: how probable is "yes" against "no"?                       see, text_logps
    2. train     sft: the negative log-likelihood of accepted candidates                       umm.image_nll
                 dpo: a prompt's most accepted candidate against its most rejected one         umm.image_logps
    3. replay    prompts without an accepted candidate were discarded. The policy, stronger now, draws and judges
                 them again, and what passes joins the data (the curriculum: C-SFT, C-DPO)

WORKDIR/data/round_0 (the pool) and round_1 (the replay) hold what was drawn: manifest.jsonl, a line for each candidate
with its prompt, score, verdict ("accepted" | "rejected" | "discarded": its prompt has none accepted) and logp (nats,
when it was drawn); drawn.npz, what was drawn, each leaf of its tree [P, N, ..] (of image tokens, one); pictures.png,
some prompts' candidates from the most accepted to the most rejected one, framed green or red. Until a round is whole,
its calls stand in parts/: a run that is killed goes on with the next one.
"""
import functools
import itertools
import json
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gvu_jax import data, objectives, rewards, sharding
from gvu_jax.methods import anchor, grpo
from gvu_jax.metrics import Progress, read_json, replace_file, replacing
from gvu_jax.policy import State, check_trainable, init_state, place_state, policy_params, skipped
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.umm import check_shared, compile_programs


class InternalGap:
    """The rounds of data, and the one program of a step.

    umm: a model of `umm.py`. config: under `internal_gap`, `objective` ("sft" | "dpo"), `pool` (prompts of round 0),
    `prompts` (of a call that draws), `group` (N), `waves`, `threshold` (of the score; what is above it is accepted),
    `keep` (SFT learns from at most so many accepted candidates of a prompt, the best), `batch` (rows of an update),
    `micro_batches`, `beta`, `nll` and `draws` (of DPO: how many draws of masks or noise a likelihood is the mean of,
    where the family has none that is exact), `anchor` (see anchor.py), and when to replay: at step `replay`, 0 for
    never. With `probe` > 0 that is the latest step: every `probe` steps one call of discarded prompts is drawn, and
    replay begins once the share of them that now passes has risen and rises no more. `reward.teacher` ("base" |
    "policy") judges, `reward.view` ("pixels" | "tokens") is what it reads, and `reward.mean` (rewards.MEANS) the score:
    "yes" as in the paper, or of the prompt's words as in GvU; `lora`, `trains`. how, mesh, lengths: as in gvu.py.
    workdir: of the run.
    """

    def __init__(self, umm, config, how, optimizer, mesh, lengths=None, workdir=None):
        self.check(config)
        self.settings, self.folder = config.internal_gap, workdir and Path(workdir) / "data"
        sharding.check(umm, mesh, self.settings, self.settings.batch)
        anchor.check(self.settings, "internal_gap", self.settings.batch, mesh)
        if config.reward.view == "tokens":
            check_shared(umm, "reward.view = 'tokens'")
        if how.flow is not None and how.flow.noise:
            raise ValueError("internal_gap learns from whole pictures, not from noisy steps: set sampling.flow.noise "
                             "= 0")
        self.umm, self.config, self.optimizer, self.mesh, self.lengths = umm, config, optimizer, mesh, lengths
        self.programs = compile_programs(umm, how, mesh, self.settings.waves)
        self.policy = functools.partial(policy_params, lora_config=config.lora)
        self.score = sharding.Program(rewards.MEANS[config.reward.mean], mesh)
        self.update = sharding.Program(self._update, mesh, donate_argnums=0)
        self.pictures, self.rounds, self.pairs = self.settings.batch, [], None           # filled by `rollout`

    @staticmethod
    def check(config):
        """Raises ValueError, in one line, for settings that cannot train."""
        gap = config.internal_gap
        if gap.objective not in ("sft", "dpo"):
            raise ValueError(f"internal_gap.objective is {gap.objective!r}; it must be 'sft' or 'dpo'")
        for name in ("prompts", "pool", "group", "keep", "batch", "waves", "micro_batches", "draws"):
            least = 2 if (name, gap.objective) == ("group", "dpo") else 1
            if gap[name] < least:
                raise ValueError(f"internal_gap.{name} is {gap[name]}; it must be at least {least}")
        if gap.prompts % gap.waves:
            raise ValueError(f"internal_gap.waves = {gap.waves} does not divide the {gap.prompts} prompts of a call")
        if gap.batch % gap.micro_batches:
            raise ValueError(f"internal_gap.micro_batches = {gap.micro_batches} does not divide the batch of "
                             f"{gap.batch}")
        if not 0 < gap.threshold < 1:
            raise ValueError(f"internal_gap.threshold is {gap.threshold}; it must lie between 0 and 1")
        if gap.probe and not gap.replay:
            raise ValueError("internal_gap.probe looks for the moment to replay: set internal_gap.replay to the latest")
        rewards.check(config.reward, rewards.MEANS)
        check_trainable(config)

    def begin(self, base, key):
        """The state before the first step. Pure: see policy.init_state."""
        return init_state(self.umm, base, self.config, self.optimizer, key)

    def init(self, base, key):
        """The state before the first step, each part where it stays."""
        return place_state(self.umm, self.begin, base, key, self.mesh)

    def rehearse(self, on):
        """What a call that draws and an update run, and on what: plan.Rehearsal. A round of the pool is sure; replay
        and probes draw for discarded prompts alone, and how many these are nobody knows before."""
        gap, S = self.settings, self.settings.prompts * self.settings.group
        calls, steps = -(-gap.pool // gap.prompts), self.config.steps
        more = calls if 0 < gap.replay < steps else 0
        if gap.probe:
            more += (min(gap.replay, steps) - 1) // gap.probe
        judge = on.base if self.config.reward.teacher == "base" else on.policy
        by_pixels, prompts = self.config.reward.view == "pixels", on.prompts(gap.prompts)
        on.step("draw", calls, S, more)
        drawn, _ = on.run("sample", "sample", self.programs.sample, on.policy, prompts, on.key)
        pixels = on.run("render", "render", self.programs.render, on.base, drawn, prompts, on.key,
                        times=1 if by_pixels else 1 / calls)                      # a round's first pictures are shown
        seen = on.run("reward", "see", self.programs.see, judge, pixels) if by_pixels else (
            on.shapes(self.umm.seen_of, drawn))
        on.run("reward", "read", self.programs.read, judge, seen,
               on.questions(2 * S) if self.config.reward.mean == "yes" else on.prompts(S))
        rows = gap.batch
        some, asked = on.rows(self.umm.drawn_shapes(rows)), on.questions(rows) if gap.anchor else None
        on.step("update", steps, rows)
        on.run("update", "update", self.update, on.state, on.base, on.prompts(rows), asked, some, some, on.floats(rows),
               on.floats(rows, bool), {}, on.key)

    # ---- 1. draw and 3. replay -----------------------------------------------------------------------------------

    def rollout(self, state, base, step, stream, key, clock):
        """The batch of `step`, and its round before it where one begins: what `update` takes after (state, base); None
        where clock.stopped() cut a round short. Arguments as in gvu.py."""
        draw = functools.partial(self.draw, base=base, policy=self.policy(base, state.trainable), clock=clock)
        if not self.rounds:
            pool = [meta["prompt"] for meta in data.batch(stream, 0, self.settings.pool)]
            if not self.add_round(pool, 0, step, key, draw, clock):
                return None
        if len(self.rounds) == 1 and (begins := self.replay_step(step, key, draw)) is not None:
            if not self.add_round(self.rounds[0].discarded(self.settings.threshold), begins, step, key, draw, clock):
                return None
        for phase in ("sample", "render", "reward"):
            clock.lap(phase, None)                              # most steps draw nothing, and say so
        first = (step - self.rounds[-1].begins) * self.settings.batch
        prompts, *arrays = self.pairs.rows(range(first, first + self.settings.batch), self.settings, self.config.seed)
        asked = anchor.questions(self.umm, prompts, self.lengths, self.mesh) if self.settings.anchor else None
        prompts = sharding.place_prompts(self.umm, prompts, self.lengths, self.mesh)
        of_masks = jax.random.fold_in(key, 2 ** 31 - 1)                 # a probe draws and renders with halves of `key`
        return prompts, asked, *sharding.put((*arrays, self.facts, of_masks), self.mesh)

    def draw(self, texts, key, base, policy, clock, shown=True):
        """One call: `prompts` texts, N candidates each -> drawn [B, N, ..], logp [B, N], score [B, N], and, where they
        are to be shown, pixels [B, N, H, W, 3] float32, else None."""
        keys = sharding.put(tuple(jax.random.split(key)), self.mesh)
        prompts = sharding.place_prompts(self.umm, texts, self.lengths, self.mesh)
        asked = (sharding.place_questions if self.config.reward.mean == "yes" else sharding.place_prompts)(
            self.umm, texts, self.lengths, self.mesh, self.settings.group)
        judge, pixels = base if self.config.reward.teacher == "base" else policy, None
        drawn, logps = clock.lap("sample", self.programs.sample(policy, prompts, keys[0]))
        if shown or self.config.reward.view == "pixels":
            pixels = clock.lap("render", self.programs.render(base, drawn, prompts, keys[1]))
        seen = self.programs.see(judge, pixels) if self.config.reward.view == "pixels" else (
            self.umm.seen_of(drawn))
        score = clock.lap("reward", self.score(*self.programs.read(judge, seen, asked)))
        drawn, logps, score, pixels = jax.tree.map(
            lambda x: x.reshape(len(texts), self.settings.group, *x.shape[1:]),
            sharding.fetch((drawn, logps, score, pixels if shown else None)))
        return drawn, logps.sum(axis=2), score, pixels

    def add_round(self, texts, begins, step, key, draw, clock):
        """Adds the round of `texts`, which begins at step `begins`: drawn now, or read where that was done before.
        False where clock.stopped() cut it short."""
        gap, folder, size = self.settings, self.folder / f"round_{len(self.rounds)}", self.settings.prompts
        shapes = self.umm.drawn_shapes(1)
        if not sharding.first_says((folder / "manifest.jsonl").exists()):
            if step != begins:
                raise ValueError(f"{folder} has no manifest.jsonl, which this run has trained on since step {begins}: "
                                 f"put it back, or give another --workdir")
            (folder / "parts").mkdir(parents=True, exist_ok=True)
            parts = [folder / "parts" / f"{start:06d}.jsonl" for start in range(0, len(texts), size)]
            first = sharding.first_says(sum(part.exists() for part in parts))
            with Progress(len(parts), "call", folder.name, first, silent=jax.process_index() != 0) as progress:
                for i in range(first, len(parts)):
                    if clock.stopped():
                        return False
                    some = [texts[j % len(texts)] for j in range(i * size, (i + 1) * size)]      # the last is filled up
                    *drawn, pixels = draw(some, jax.random.fold_in(key, i), shown=i == 0)
                    if jax.process_index() == 0:
                        if i == 0:
                            write_picture(folder / "pictures.png", picture(some, drawn[2], pixels, gap.threshold))
                        rows = slice(0, len(texts) - i * size)
                        write_drawn(parts[i].with_suffix(".npz"), [x[rows] for x in jax.tree.leaves(drawn[0])])
                        replace_file(parts[i], lines(some[rows], *drawn[1:], gap.threshold))
                    progress.update(score=drawn[2].mean(), accepted=(drawn[2] > gap.threshold).mean())
            if jax.process_index() == 0:
                none = [np.zeros((0, gap.group, *like.shape[1:]), like.dtype) for like in jax.tree.leaves(shapes)]
                calls = [none, *(read_drawn(part.with_suffix(".npz")) for part in parts)]
                write_drawn(folder / "drawn.npz", [np.concatenate(leaves) for leaves in zip(*calls)])
                replace_file(folder / "manifest.jsonl", "".join(part.read_text() for part in parts))
                shutil.rmtree(folder / "parts")
        sharding.wait_for_all("the data of a round")
        self.rounds.append(read_round(folder / "manifest.jsonl", texts, gap.group, shapes, begins))
        self.pairs = choose_pairs(self.rounds, gap)
        self.facts = facts(self.rounds, self.pairs, gap, self.umm.picture_of)
        if jax.process_index() == 0:
            print(f"{folder}: {self.rounds[-1].describe(gap.threshold)}")
        return True

    def replay_step(self, step, key, draw):
        """The step, at most `step`, at which the replay begins; None where it does not yet."""
        gap, path = self.settings, self.folder / "probes.json"
        if gap.probe and gap.replay:
            shares = read_json(path) if sharding.first_says(path.exists()) else {}
            hard = self.rounds[0].discarded(gap.threshold)
            if step % gap.probe == 0 and 0 < step < gap.replay and hard and str(step) not in shares:
                _, _, score, _ = draw([hard[i % len(hard)] for i in range(gap.prompts)], key, shown=False)
                shares[str(step)] = float((score > gap.threshold).any(axis=1).mean())
                if jax.process_index() == 0:
                    replace_file(path, json.dumps(shares))
                sharding.wait_for_all("a probe")
            known = sorted((int(at), share) for at, share in shares.items() if int(at) <= step)
            for (_, before), (at, share) in itertools.pairwise(known):
                if 0 < before >= share:
                    return at
        return gap.replay if 0 < gap.replay <= step else None

    # ---- 2. train ------------------------------------------------------------------------------------------------

    def loss(self, trainable, base, batch, key):
        """The objective on one micro-batch, and its metrics. The policy draws nothing here, so kl (k3) and entropy
        (cross-entropy), nats a token, are those of the accepted pictures. Where likelihoods are estimates, there is
        only gap: nats a decision by which the base's estimate lies above the policy's. key: what masks or noise of
        estimates come from, the same for policy and base, chosen and rejected."""
        gap, policy = self.settings, policy_params(base, trainable, self.config.lora)
        if gap.objective == "dpo":
            of_draw = lambda params, drawn: jax.vmap(
                lambda key: self.umm.image_logps(params, batch.prompts, drawn, key=key))                     # [M, B, T]
            four = [of_draw(params, drawn)(jax.random.split(key, gap.draws))
                    for drawn in (batch.chosen, batch.rejected) for params in (policy, base)]
            chosen, ref, rejected, ref_rejected = (jnp.mean(logps, axis=0) for logps in four)
            loss, metrics = objectives.dpo_loss(chosen, rejected, ref, ref_rejected, gap.beta, gap.nll)
            if gap.draws > 1:
                metrics["margin_error"] = objectives.standard_error(
                    jnp.sum(four[0] - four[1] - four[2] + four[3], axis=2))
        else:
            chosen, ref = (-self.umm.image_nll(params, batch.prompts, batch.chosen, key) for params in (policy, base))
            loss, metrics = -jnp.mean(chosen), {}
        if gap.anchor:
            # Half of it in rejected pictures: held in accepted ones alone, "yes" spreads to all the others. (A
            # micro-batch of fewer than 8 rows holds one picture, an accepted one.)
            half = len(batch.logp) // 2
            both = jax.tree.map(lambda *of: jnp.concatenate([of[0][:half], of[1][half:]]), batch.chosen, batch.rejected)
            _, *held = anchor.held((), batch.prompts, batch.asked)
            seen = anchor.seen_again(self.umm, base, both, batch.prompts)
            metrics["read_kl"] = anchor.reading_kl(self.umm, policy, base, seen, *held)
            loss = loss + gap.anchor * metrics["read_kl"]
        if self.umm.exact_likelihood:
            away = jnp.abs(jnp.sum(ref, axis=1) - batch.logp) / ref.shape[1]                  # of base and sampler
            metrics |= {"kl": jnp.mean(objectives.k3(chosen, ref)), "entropy": -jnp.mean(chosen),
                        "logp_gap": jnp.sum(away * batch.by_base) / jnp.maximum(jnp.sum(batch.by_base), 1)}
        else:
            metrics["gap"] = jnp.mean(ref - chosen)
        return loss, (metrics | {"loss": loss}, None)

    def _update(self, state, base, prompts, asked, chosen, rejected, logp, by_base, facts, key):
        """One optimizer step on B rows, over `micro_batches` slices of them.

        prompts [B] and, with an anchor, asked [B] (anchor.questions); chosen and rejected drawn [B, ..], logp [B] of
        the chosen one when drawn, by_base [B] bool: by the base. key: of `loss`, one for each micro-batch. Returns the
        state after step + 1 and a dict of scalar metrics, `facts` among them.
        """
        batch = Batch(prompts, asked, chosen, rejected, logp, by_base)
        count = self.settings.micro_batches
        batches = sharding.split_rows(batch, count), jax.random.split(key, count)
        trainable, opt_state, metrics, _ = grpo.descend(
            lambda trainable, part: self.loss(trainable, base, *part), state.trainable, state.opt_state, batches,
            self.optimizer)
        state = sharding.constrain(self.umm.partition, State(state.step + 1, trainable, opt_state))
        return state, metrics | facts | skipped(opt_state)


@struct.dataclass
class Batch:
    """Rows of one micro-batch; see `InternalGap._update`."""
    prompts: object
    asked: object
    chosen: object
    rejected: object
    logp: jax.Array
    by_base: jax.Array


# ---- a round, in memory and on disk --------------------------------------------------------------------------------

class Round(NamedTuple):
    """Candidates of P prompts, N each, and how they were judged."""
    begins: int              # the step
    prompts: list            # P texts
    drawn: object            # tree of [P, N, ..]
    logp: np.ndarray         # [P, N] float32, of the whole picture, nats
    score: np.ndarray        # [P, N] float32

    def discarded(self, threshold):
        """The prompts without an accepted candidate."""
        return [text for text, score in zip(self.prompts, self.score) if not (score > threshold).any()]

    def describe(self, threshold):
        kept, accepted = len(self.prompts) - len(self.discarded(threshold)), (self.score > threshold).sum()
        return (f"{accepted} of {self.score.size} candidates accepted; {kept} prompts of {len(self.prompts)} have one, "
                f"{len(self.prompts) - kept} are discarded")


def lines(texts, logp, score, threshold):
    """The manifest's lines of the first prompts of a call, as many as there are texts."""
    found = []
    for text, *candidates in zip(texts, logp.tolist(), score.tolist()):
        any_accepted = max(candidates[1]) > threshold
        for n, (nats, p) in enumerate(zip(*candidates)):
            verdict = "accepted" if p > threshold else "rejected" if any_accepted else "discarded"
            found.append({"prompt": text, "candidate": n, "score": p, "verdict": verdict, "logp": nats})
    return "".join(json.dumps(line) + "\n" for line in found)


def write_drawn(path, leaves):
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, *leaves)


def read_drawn(path):
    """The leaves of what was drawn, in order."""
    with np.load(path) as found:
        return [found[f"arr_{k}"] for k in range(len(found.files))]


def read_round(path, texts, group, shapes, begins):
    """A manifest, with drawn.npz beside it -> Round. Raises ValueError where it is not that of `texts`, `group`
    candidates each, drawn as in `shapes` [1, ..]."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        if [line["prompt"] for line in found] != [text for text in texts for _ in range(group)]:
            raise ValueError("its prompts are others")
        drawn, (leaves, structure) = read_drawn(path.with_name("drawn.npz")), jax.tree.flatten(shapes)
        if [x.shape for x in drawn] != [(len(texts), group, *like.shape[1:]) for like in leaves]:
            raise ValueError("what was drawn has other shapes")
        column = lambda name: np.array([line[name] for line in found], np.float32).reshape(len(texts), group)
        return Round(begins, list(texts), jax.tree.unflatten(structure, drawn), column("logp"), column("score"))
    except (ValueError, LookupError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not what this run wrote ({error}): put that back, or give another "
                         f"--workdir") from error


def picture(texts, score, pixels, threshold, rows=12, columns=12):
    """Some prompts' candidates, the most accepted first. score [B, N], pixels [B, N, H, W, 3]."""
    order = np.argsort(-score[:rows], axis=1, kind="stable")[:, :columns]
    sort = lambda x: np.take_along_axis(x[:rows], order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    captions = [f"{text}  (score {best:.2f} to {worst:.2f})" for text, best, worst
                in zip(texts, score.max(axis=1), score.min(axis=1))][:rows]
    return image_grid(sort(pixels), captions, max(1, 96 // pixels.shape[2]), sort(score) > threshold)


class Pairs(NamedTuple):
    """The M prompts to train on, each with its candidates from the most accepted to the most rejected one."""
    prompts: list            # M texts
    drawn: object            # tree of [M, N, ..]
    logp: np.ndarray         # [M, N] float32
    kept: np.ndarray         # [M] how many of them, from the first on, SFT learns from
    by_base: np.ndarray      # [M] bool: drawn in round 0

    def rows(self, places, gap, seed):
        """Prompts, chosen [B, ..], rejected [B, ..], logp [B] and by_base [B] of the given places in an endless order:
        each epoch shuffles anew. The e-th epoch of SFT takes the e-th candidate kept of a prompt, round and round; DPO
        always takes the first."""
        epochs, places = np.divmod(np.array(places), len(self.prompts))
        shuffled = {e: np.random.default_rng((seed, e)).permutation(len(self.prompts)) for e in set(epochs.tolist())}
        rows = np.array([shuffled[e][place] for e, place in zip(epochs.tolist(), places)])
        which = epochs % self.kept[rows] if gap.objective == "sft" else np.zeros_like(rows)
        pick = lambda which: jax.tree.map(lambda x: x[rows, which], self.drawn)
        return [self.prompts[row] for row in rows], pick(which), pick(-1), self.logp[rows, which], self.by_base[rows]


def choose_pairs(rounds, gap):
    """All rounds' prompts with an accepted candidate and, for DPO, a rejected one. ValueError where there is none."""
    join = lambda name: jax.tree.map(lambda *x: np.concatenate(x), *(getattr(drawn, name) for drawn in rounds))
    score, texts = join("score"), [text for drawn in rounds for text in drawn.prompts]
    accepted = (score > gap.threshold).sum(axis=1)
    rows = np.flatnonzero((accepted > 0) & ((accepted < gap.group) | (gap.objective == "sft")))
    if not rows.size:
        wanted = "an accepted candidate" if gap.objective == "sft" else "an accepted and a rejected candidate"
        raise ValueError(f"none of {len(score)} prompts has {wanted}: raise internal_gap.pool or internal_gap.group, "
                         f"or change internal_gap.threshold")
    order = np.argsort(-score[rows], axis=1, kind="stable")                                            # [M, N]
    drawn, logp = jax.tree.map(lambda x: x[rows[:, None], order], (join("drawn"), join("logp")))
    return Pairs([texts[row] for row in rows], drawn, logp, np.minimum(accepted[rows], gap.keep),
                 rows < len(rounds[0].prompts))


def facts(rounds, pairs, gap, picture_of):
    """Metrics of the newest round's candidates and of the data as a whole, float32 scalars. picture_of: of umm.py."""
    newest = next(drawn for drawn in reversed(rounds) if drawn.prompts)
    found = {"reward/mean": newest.score.mean(), "reward/std": newest.score.std(axis=1).mean(),
             "duplicates": jax.jit(objectives.duplicates, static_argnums=1)(
                 picture_of(jax.tree.map(np.concatenate, newest.drawn)), gap.group),
             "data/prompts": len(pairs.prompts), "data/recovered": (~pairs.by_base).sum(),
             "data/discarded": len(rounds[-1].discarded(gap.threshold))}
    return {name: np.float32(value) for name, value in found.items()}
