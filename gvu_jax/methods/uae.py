"""UAE: Can Understanding and Generation Truly Benefit Together, or Just Coexist? (Yan et al. 2025), Unified-GRPO.

Understanding is the encoder, picture -> caption, and generation the decoder, caption -> picture. What survives the way
there and back is the one objective:

    R = cosine of the frozen vision encoder's features of reconstruction and original      umm.features, rewards.py

or, where `uae.scorers` names encoders from outside, as the paper's CLIP is, the weighted sum of cosines (scorers.py).

Three stages, each step belonging to one, on B pictures with groups of G:

    cold       both directions are taught by pictures with captions: next-token prediction on `uae.pairs` pairs. The
               first `uae.cold` steps; as they leave it, the model is the reference of both KL terms from then on.
               With `uae.reconstruct`, as in the paper: 1 - R of the pictures that those captions give, as the captioner
               says them of the picture, descended through every step of a flow without noise ("rescaled"; "published"
               has the released code's slip, by which the encoder sees reconstructions 255 times too dark)
                                                                                                umm.reconstruction
    caption    the captioner is the policy: G captions of each picture, each drawn once             umm.sample_text
    draw       the captions are given, one of each picture, and the drawer is the policy:           umm.sample_image
               G pictures of each caption

The last two take turns as `uae.stages` says; one alone is an ablation. Both are GRPO, on the caption's words and on the
picture's decisions (grpo.py, or flow_grpo.py where a picture is drawn by a flow, as the paper's is). Where captioner
and drawer are networks of their own (a family's `halves`) a stage trains the parameters of its own alone, as in the
paper, and KL is measured to what that half was; where one backbone does both, what a stage teaches the other one meets
in its next turn.
"""
import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import data, objectives, rewards, scorers, sharding
from gvu_jax.methods import flow_grpo, grpo
from gvu_jax.policy import State, check_trainable, init_state, pick, place_state, policy_params, restrict, skipped
from gvu_jax.umm import Lengths, compile_programs, in_use


class UAE:
    """The programs of each stage, each compiled once.

    umm: a model of `umm.py`. config: under `uae` what grpo.py takes, `prompts` (pictures a step), `waves`, `cold`,
    `pairs`, `stages` ("caption:10,draw:10") and `words`, the most tokens of a caption with its end; `lora`. how: how
    captions and pictures are sampled, with images_per_prompt = group. mesh: see sharding.py.
    """

    def __init__(self, umm, config, how, optimizer, mesh, lengths=None, workdir=None):
        self.check(config)
        self.pictures = config.uae.prompts * config.uae.group
        sharding.check(umm, mesh, config.uae, self.pictures)
        for parts in ("micro_batches", "waves") if config.uae.cold else ():
            count, rows = config.uae[parts], sharding.batch_shards(mesh)
            if count > 1 and config.uae.pairs % (count * rows):
                raise ValueError(f"the {config.uae.pairs} pairs of a step of the cold start (uae.pairs) in {count} "
                                 f"parts (uae.{parts}) cannot be divided by data x fsdp = {rows}")
        if "draw" in dict(stages_of(config.uae.stages)):
            flow_grpo.check_how(umm, config, how)
        self.umm, self.config, self.how, self.optimizer, self.mesh = umm, config, how, optimizer, mesh
        loop = functools.partial(
            Loop, umm, mesh=mesh, words=config.uae.words, waves=config.uae.waves,
            outside=scorers.Scorers(scorers.weights_of(config.uae.get("scorers", "")), mesh))
        self.loop = loop(how)
        self.plain = self.loop if how == in_use(umm, how) else loop(in_use(umm, how))      # what draws in evaluations
        self.programs = self.loop.groups
        self.policy = functools.partial(policy_params, lora_config=config.lora)      # no jit: it would copy the base
        self.halves = getattr(umm, "halves", {})
        self.reconstruct = config.uae.get("reconstruct", "")
        if self.reconstruct and not hasattr(umm, "reconstruction"):
            raise ValueError(f"uae.reconstruct = {self.reconstruct!r} descends through how a picture is drawn, which "
                             f"models of the kind {umm.kind} cannot (a flow can): leave it empty")
        self.updates = {stage: sharding.Program(update, mesh, donate_argnums=0) for stage, update in (
            ("cold", self._rebuild if self.reconstruct else self._cold), ("caption", self._caption),
            ("draw", self._draw))}

    @staticmethod
    def check(config):
        """Raises ValueError, in one line, for settings that cannot train."""
        grpo.check(config.uae, "uae")
        flow_grpo.check(config)
        check_trainable(config)
        stages_of(config.uae.stages)
        weights = scorers.weights_of(config.uae.get("scorers", ""))
        if (told := config.uae.get("reconstruct", "")) not in ("", "rescaled", "published"):
            raise ValueError(f"uae.reconstruct is {told!r}; it must be empty, rescaled or published")
        if told and not config.uae.cold:
            raise ValueError(f"uae.reconstruct = {told!r} says how the cold start learns, and there is none: set "
                             f"uae.cold, e.g. 1000, or leave it empty")
        if told == "published" and scorers.OWN in weights:
            raise ValueError("uae.reconstruct = 'published' is a slip in what an encoder from outside is shown: name "
                             "one in uae.scorers, e.g. hf:openai/clip-vit-large-patch14=1, without own, or take "
                             "rescaled")
        if config.uae.cold and (config.uae.pairs < 1 or config.uae.pairs % config.uae.micro_batches):
            raise ValueError(f"uae.micro_batches = {config.uae.micro_batches} does not divide the {config.uae.pairs} "
                             f"pairs of a step of the cold start (uae.pairs)")

    def begin(self, base, key):
        """The state before the first step. Pure: see policy.init_state. ValueError where a stage has nothing to train.
        """
        state = init_state(self.umm, base, self.config, self.optimizer, key)
        paths = [sharding.parameter(self.umm.partition, path)[1] for path, _ in
                 jax.tree_util.tree_leaves_with_path(state.trainable)]
        for stage, half in self.halves.items():
            comes = any(self.stage(step) == stage for step in range(self.config.steps))
            if comes and not any(re.search(half, path) for path in paths):
                raise ValueError(f"the stage {stage} of uae.stages = {self.config.uae.stages!r} trains what matches "
                                 f"{half}, and nothing of that is trained: mend lora.targets or trains, or leave the "
                                 f"stage out")
        return state.replace(reference=jax.tree.map(jnp.copy, state.trainable))

    def init(self, base, key):
        """The state before the first step, each part where it stays."""
        return place_state(self.umm, self.begin, base, key, self.mesh)

    def stage(self, step):
        """The stage that `step` belongs to."""
        turns = [name for name, steps in stages_of(self.config.uae.stages) for _ in range(steps)]
        return "cold" if step < self.config.uae.cold else turns[(step - self.config.uae.cold) % len(turns)]

    def rollout(self, state, base, step, stream, key, clock):
        """What `update` takes after (state, base): the stage of `step`, and what it learns from.

        stream: dicts with "pixels" [H, W, 3] float32 in [0, 1] and, for the cold start, "prompt", their caption. key:
        the step's own. clock.lap(phase, result) is told of each phase and returns its result.
        """
        uae, stage, loop, keys = self.config.uae, self.stage(step), self.loop, sharding.put(
            tuple(jax.random.split(key)), self.mesh)
        self.pictures = uae.pairs if stage == "cold" else uae.prompts * uae.group
        examples = data.batch(stream, step, uae.pairs if stage == "cold" else uae.prompts)
        pixels = sharding.put(np.stack([example["pixels"] for example in examples]), self.mesh)
        if stage == "cold":
            captions = [example["prompt"] for example in examples]                    # see data.check_captions
            prompts = sharding.place_prompts(self.umm, captions, loop.lengths, self.mesh, end=True)
            if self.reconstruct:
                seen = clock.lap("sample", self.programs.see(base, pixels))
                learned = seen, pixels, prompts, keys[0], loop.outside.params
            else:
                seen, target = clock.lap("sample", self.programs.learn(base, pixels))
                learned = seen, target, prompts, keys[0]
            for phase in ("render", "reward"):
                clock.lap(phase, None)                                          # nothing is drawn, and a step says so
            return stage, *learned
        policy = self.policy(base, state.trainable)
        telling, drawing = (loop.groups, loop.singles) if stage == "caption" else (loop.singles, loop.groups)
        told = clock.lap("sample", loop.say(telling, policy, base, pixels, keys[0]))
        texts = loop.texts(told[2])
        drawn, logps, pictures = clock.lap("render", loop.draw(drawing, policy, base, texts, keys[1]))
        reward, _ = clock.lap("reward", loop.compare(base, loop.outside.params, pictures, pixels))
        if stage == "caption":
            return stage, *told, reward
        prompts = sharding.place_prompts(self.umm, texts, loop.lengths, self.mesh, uae.group)
        return stage, prompts, drawn, logps, reward

    def rehearse(self, on):
        """What a step of each stage runs, and on what: plan.Rehearsal."""
        uae, loop = self.config.uae, self.loop
        B, S = uae.prompts, uae.prompts * uae.group
        steps = collections.Counter(map(self.stage, range(self.config.steps)))
        prompts = functools.partial(on.prompts, words=uae.words)
        if steps["cold"]:
            on.step("cold", steps["cold"], uae.pairs)
            pixels, outside = on.pixels(uae.pairs), ([],) if self.reconstruct else ()
            seen, target = ((on.run("sample", "see", self.programs.see, on.base, pixels), pixels) if self.reconstruct
                            else on.run("sample", "learn", self.programs.learn, on.base, pixels))
            on.run("update", "update", self.updates["cold"], on.state, on.base, seen, target, prompts(uae.pairs),
                   on.key, *outside)
        for stage, telling, drawing, captions in (("caption", loop.groups, loop.singles, S),
                                                  ("draw", loop.singles, loop.groups, B)):
            if not steps[stage]:
                continue
            on.step(stage, steps[stage], S)
            seen = on.run("sample", "see", loop.groups.see, on.base, on.pixels(B))
            told = on.run("sample", "say", telling.say, on.policy, seen, prompts(B), on.key)
            drawn, logps = on.run("render", "sample", drawing.sample, on.policy, prompts(captions), on.key)
            pictures = on.run("render", "render", drawing.render, on.base, drawn, prompts(captions), on.key)
            on.run("reward", "compare", loop.compare, on.base, [], pictures, on.pixels(B))
            batch = (seen, prompts(B), *told) if stage == "caption" else (prompts(S), drawn, logps)
            on.run("update", "update", self.updates[stage], on.state, on.base, *batch, on.floats(S))

    def update(self, state, base, stage, *batch):
        """Returns the state after step + 1 and a dict of scalar metrics."""
        return self.updates[stage](state, base, *batch)

    def _cold(self, state, base, seen, target, prompts, key):
        """Supervised, both ways: -log p(caption | picture) a word, and -log p(picture | caption) a decision."""
        words = jnp.sum(prompts.words_mask) / self.config.uae.micro_batches   # each counts alike, in whichever slice

        def loss(trainable, part):
            policy, ((seen, target, prompts), key) = self.policy(base, trainable), part
            telling = objectives.cross_entropy(*self.umm.text_logps(policy, seen, prompts), words)
            drawing = jnp.mean(self.umm.image_nll(policy, prompts, target, key))
            return telling + drawing, ({"loss": telling + drawing, "cold/caption": telling, "cold/draw": drawing}, ())
        return self._supervise(loss, state, (seen, target, prompts), key)

    def _rebuild(self, state, base, seen, originals, prompts, key, outside):
        """1 - R of what the captions' words, as the captioner says them of the pictures, give: originals [B, H, W, 3];
        outside: the parameters of scorers."""
        def loss(trainable, part):
            (seen, originals, prompts), key = part
            pictures = self.umm.reconstruction(self.policy(base, trainable), seen, prompts, key, self.how)
            darker = 255 if self.reconstruct == "published" else 1
            reward, each = self.loop.alike(base, outside, pictures, originals, darker)
            loss = 1 - jnp.mean(reward)
            return loss, ({"loss": loss} | {f"cold/{name}": jnp.mean(alike) for name, alike in each.items()}, ())
        return self._supervise(loss, state, (seen, originals, prompts), key)

    def _supervise(self, loss, state, rows, key):
        parts = self.config.uae.micro_batches
        trainable, opt_state, metrics, _ = grpo.descend(
            loss, state.trainable, state.opt_state, (sharding.split_rows(rows, parts), jax.random.split(key, parts)),
            self.optimizer)
        state = State(state.step + 1, trainable, opt_state, reference=jax.tree.map(jnp.copy, trainable))
        return sharding.constrain(self.umm.partition, state), metrics | skipped(opt_state)

    def _caption(self, state, base, seen, asked, words, logps, mask, reward):
        """GRPO on captions: seen and asked [B], words, logps and mask [S, T], reward [S].

        Each caption was drawn once, so equal captions have unequal rewards. They share their mean: a captioner that
        has settled on its words would else be moved by the drawer's luck alone, and Adam makes long steps of that.
        """
        group = self.config.uae.group
        reward = objectives.pool_equal(reward, words, group)
        said = asked.repeat(group).replace(words=words, words_mask=mask)
        seen = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), seen)
        update = functools.partial(grpo.update, logps_of=lambda policy, rows: self.umm.text_logps(policy, *rows),
                                   truncate=self.how.correction)
        state, metrics = self._compare("caption", update, state, base, (seen, said), reward, logps)
        return state, metrics | {"duplicates": objectives.duplicates(words, group),
                                 "caption/length": jnp.mean(jnp.sum(mask, axis=1))}

    def _draw(self, state, base, prompts, drawn, logps, reward):
        """GRPO on pictures: prompts [S], drawn [S, ..], logps [S, T], reward [S]."""
        update = functools.partial(flow_grpo.update_pictures, self.umm, self.how, self.config)
        state, metrics = self._compare("draw", update, state, base, (prompts, drawn), reward, logps)
        return state, metrics | {"duplicates": objectives.duplicates(
            self.umm.picture_of(drawn), self.config.uae.group)}

    def _compare(self, stage, update, state, base, rows, reward, sampler_logps):
        policy, optimizer, reference = self.policy, self.optimizer, state.reference
        if stage in self.halves:
            half = functools.partial(pick, self.umm.partition, self.halves[stage])
            policy, optimizer = restrict(half, policy, optimizer)
            reference = half(reference, state.trainable)      # a drawer reads the captioner's states: today's, in both
        state, metrics = update(
            state, rows, reward, sampler_logps, reference=self.policy(base, reference),
            policy_of=functools.partial(policy, base), settings=self.config.uae, optimizer=optimizer)
        return sharding.constrain(self.umm.partition, state), metrics


def stages_of(text):
    """"caption:10,draw:10" -> [("caption", 10), ("draw", 10)]. Raises ValueError for what is not of this form."""
    try:
        stages = [(name.strip(), int(steps)) for name, steps in (part.split(":") for part in text.split(","))]
    except ValueError:
        stages = []
    if not stages or any(name not in ("caption", "draw") or steps < 1 for name, steps in stages):
        raise ValueError(f"uae.stages is {text!r}; it must be of the form caption:10,draw:10")
    return stages


class Loop:
    """Picture -> caption -> picture, and how alike the two are. `groups` holds the programs that draw a whole group at
    a time (umm.Programs), `singles` those that draw one sample: by a flow without noise in its steps, for nothing is
    learned from them, and noise would be luck in the caption's reward."""

    def __init__(self, umm, how, mesh, words, waves=1, outside=None):
        self.umm, self.mesh, self.words, self.waves = umm, mesh, words, waves
        self.outside = outside or scorers.Scorers({scorers.OWN: 1.0}, mesh)
        by_ode = how.flow and dataclasses.replace(how.flow, noise=0.0)
        single = dataclasses.replace(how, images_per_prompt=1, flow=by_ode)
        self.groups, self.singles = (compile_programs(umm, each, mesh, waves, words) for each in (how, single))
        self.compare = sharding.Program(self._compare, mesh)

    @functools.cached_property
    def lengths(self):
        """umm.Lengths that hold any caption."""
        least = self.umm.lengths(["-"])
        return Lengths(least.prompt + self.words, least.question, self.words)

    def say(self, programs, policy, base, pixels, key):
        """pixels [B, H, W, 3] -> seen [B], the question asked (Prompts [B]), words, logps and mask [S, T]."""
        asked = sharding.place_prompts(self.umm, ["-"] * len(pixels), self.lengths, self.mesh)
        seen = self.groups.see(base, pixels)                      # one program for both: a picture is seen once
        return seen, asked, *programs.say(policy, seen, asked, key)

    def encode(self, captions):
        """Captions as the cold start learns them, with their end: Prompts. ValueError for what cannot be learned."""
        return self.umm.encode_prompts(captions, self.lengths, end=True)

    def texts(self, words):
        """Captions, words [S, T], as S texts. One that cannot be a prompt (it is empty, or spells a piece of a picture)
        is drawn as "-"."""
        texts = self.umm.tokenizer.batch_decode(sharding.fetch(words), skip_special_tokens=True)

        def prompt(text):
            try:
                self.umm.encode_prompts([text], self.lengths)
            except ValueError:
                return "-"
            return text
        known = {text: prompt(text) for text in set(texts)}
        return [known[text] for text in texts]

    def draw(self, programs, policy, base, texts, key):
        """Texts -> drawn [S, ..], logps [S, T] of the sampler, pixels [S, H, W, 3]."""
        keys = jax.random.split(key)
        prompts = sharding.place_prompts(self.umm, texts, self.lengths, self.mesh)
        drawn, logps = programs.sample(policy, prompts, keys[0])
        return drawn, logps, programs.render(base, drawn, prompts, keys[1])

    def _compare(self, base, params, pictures, originals):
        """The reward [S] of pictures [S, H, W, 3], those of one of the originals [B, H, W, 3] side by side, and how
        alike each encoder finds them: {"similarity" (to the model's own) | a scorer's name: [S]}."""
        return sharding.in_waves(functools.partial(self.alike, base, params), pictures, originals, waves=self.waves)

    def alike(self, base, params, pictures, originals, darker=1):
        """`_compare` of all at once, differentiable in the pictures; darker: see Scorer.alike."""
        features = self.umm.features(base, originals)
        own = rewards.similarity(self.umm.features(base, pictures),
                                 jnp.repeat(features, len(pictures) // len(originals), axis=0))
        each = self.outside.each if params else ()                                 # a plan has none, and reads none
        found = {scorer.name: scorer.alike(of_scorer, pictures, originals, darker)
                 for scorer, of_scorer in zip(each, params)}
        return self.outside.weighted(own, found.values()), {"similarity": own} | found
