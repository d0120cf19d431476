"""Show-o (Xie et al. 2024): a Phi that reads and draws the codes of MAGVIT-v2, and draws them mask by mask.

A picture begins as N masks. In each of `rounds` rounds the model draws all that are not known at once, and takes back
those it is least sure of, until none is left (sampling.reveal). What was **drawn** is its codes and the round in which
each was drawn for good.

Three likelihoods, the first two of codes alone, for the model never draws anything else in a picture:

    image_logps          of the choices that were made: log p(code | what was known in its round). Exact for those, one
                         forward a round; which places are taken back counts as part of the world, not of the policy
    image_logps, key     of a picture from anywhere: the mean of log p(code | the rest) over the codes of a random mask.
                         |mask| is uniform on 1..N, which makes N times its expectation a lower bound of log p(picture);
                         one forward. Masks come from the key, so that whoever is compared is so under the same ones
    image_nll            what the published training descends: the cross-entropy of codes under the masks of its cosine
                         schedule, over all ids, of the tokens around the picture as well

The first published model reads the same codes; another one reads what CLIP sees. Top to bottom: the model behind the
interface of umm.py, its published sizes, and how its published folder is read.
"""
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from gvu_jax import described, rollout, sampling
from gvu_jax.described import Described
from gvu_jax.models import clip, magvit, phi, siglip, vq
from gvu_jax.models.clip import image_transform, tower_config
from gvu_jax.tensor_files import Source, small_files, weight_files
from gvu_jax.umm import (
    Lengths, gather_logps, hidden_of_words, ids_of_words, lengths_of, pad_prompts, prompt_shapes, until_end)

MOST_TOKENS = 512       # of a text that is said about a picture: with the picture, inside the 2048 positions of Phi-1.5

# What Show-o adds to Phi's tokenizer, in this order. Begin and end of a text are the tokenizer's own end of text.
PAD = "[PAD]"
ADDED = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
BEGIN, END, DRAW, READ = "<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>"

# What the model that reads CLIP's features is told first.
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")


@dataclasses.dataclass(frozen=True, eq=False)
class Showo:
    """Show-o: the backbone `ar`, the image tokenizer `vq`, and where it reads what CLIP sees, the tower `vision`."""
    ar: phi.Config
    vq: magvit.Config
    tokenizer: Any
    grid: tuple[int, int]                               # rows, columns of codes in a picture: a square
    vision: clip.Config | None = None                   # None: it reads codes
    transform: clip.Transform | None = None
    text_length: int = 128                              # ids of a prompt's row; longer ones are cut, as published
    rounds: int = 16
    heat: float = 1.0                                   # of the noise that decides what the first round takes back
    estimates: int = 0                                  # 0: a drawn picture's likelihood is exact, of the choices made;
                                                        # else the mean of so many estimates, of one forward each
    instruction: str = "Please describe this image in detail."
    guidance: float = 2.75                              # published as 1.75, on a scale that begins with 0
    of_shapes: bool = False                             # whether this is a model of the shapes world

    kind = "showo"
    int8 = ("weights",)
    exact_likelihood = False                            # of a picture from anywhere; of choices made it is
    loads = None                                        # no class of transformers reads the published folder
    trains = phi.TRAINS
    partition = {"ar": phi.PARTITION, "adapter": phi.PARTITION, "vq": magvit.PARTITION, "vision": clip.PARTITION}

    def __post_init__(self):
        if min(self.grid) < 1 or self.grid[0] != self.grid[1]:
            raise ValueError(f"grid {self.grid} must be a square of at least 1: nothing tells the model where rows end")
        if self.rounds < 1 or self.text_length < 4:
            raise ValueError(f"rounds {self.rounds} must be at least 1 and text_length {self.text_length} at least 4")

    # ---- text, on the host -------------------------------------------------------------------------------------

    @property
    def image_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def picture_size(self):
        """Height and width, in pixels, of a picture of this grid."""
        return tuple(side * self.vq.downscale for side in self.grid)

    def _id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def _stop(self):
        """Id of what begins and ends a text."""
        return self.tokenizer.eos_token_id

    def said(self, text):
        """A text as an answer: what its words' ids are of."""
        return " " + text.strip()

    def _head(self, ids):
        """The row of a prompt of these ids, up to where its picture begins; too long a one is cut, as published."""
        head = [self._id(DRAW), *([] if ids[:1] == [self._stop] else [self._stop]), *ids, self._stop]
        if len(head) > self.text_length + 1:
            logging.log_first_n(logging.WARNING, "a prompt has %d tokens, of which %d are read when it is drawn: the "
                                "rest is left out, as in the published code (text_length)", 1, len(ids),
                                self.text_length - 2)
            head = [*head[:self.text_length], self._stop]
        return head

    @functools.lru_cache(maxsize=4096)
    def _around(self, question):
        """Ids before and after a picture's codes or patches when `question` is put about it, up to where the answer
        begins."""
        if self.vision is None:
            return (self._id(READ), self._id(BEGIN)), (
                self._id(END), self._stop, *self._ids(f"USER: \n{question.strip()} ASSISTANT:"))
        return (self._id(READ), *self._ids(SYSTEM), self._id(BEGIN)), (
            self._id(END), *self._ids(f"USER: {question.strip()} ASSISTANT:"))

    def _encode(self, texts, questions, end):
        words = ids_of_words(self, texts, questions, MOST_TOKENS)
        stop = [self._stop] if end else []
        return ([self._head(ids) for ids in self._ids([text.strip() for text in texts])],
                [list(self._around(question)[1][1:]) for question in questions], [ids + stop for ids in words])

    def lengths(self, texts, questions=None, end=False):
        """The smallest padded lengths that hold all of `texts`; of prompt and words, rounded up to a multiple of 4.

        The published rows are all padded to one length. Only distances between tokens count, and no padding is read,
        so that a shorter row gives the same.
        """
        return lengths_of(self._encode(texts, questions or [self.instruction] * len(texts), end))

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        """B texts -> Prompts of int32 / bool numpy arrays; arguments and errors are those of XOmni.encode_prompts, but
        that a prompt longer than text_length is cut where it is drawn (with a warning)."""
        parts = self._encode(texts, questions or [self.instruction] * len(texts), end)
        return pad_prompts(texts, parts, lengths, self._id(PAD))

    def prompt_shapes(self, B, prompt, words, asked=0):
        """The shapes of B encoded texts of these padded lengths, Prompts of jax.ShapeDtypeStruct; asked: by how many
        tokens their questions are longer than the instruction."""
        question = len(self._around(self.instruction)[1]) - 1 + asked
        return prompt_shapes(B, Lengths(min(prompt, self.text_length + 1), question, words))

    # ---- generation branch -------------------------------------------------------------------------------------

    def _variables(self, params):
        return {"params": params["ar"]} | ({"lora": params["adapter"]} if "adapter" in params else {})

    def _contexts(self, variables, prompts, negative):
        """What pictures are drawn behind, as pairs of keys and values and mask [R, P]: the prompts, and with `negative`
        the empty text, one row for all.

        Both are read once, for all rounds and all pictures of a prompt: a text comes before its picture and reads
        nothing of it. The tokens of the picture read each other, so all of theirs are computed anew in every round.
        """
        read = lambda tokens, mask: (phi.Phi(self.ar).apply(variables, tokens, mask, method="before")[1], mask)
        contexts = (read(prompts.tokens, prompts.mask),)
        if negative:
            empty = jnp.array([self._head([])], jnp.int32)
            contexts += (read(empty, jnp.ones(empty.shape, bool)),)
        return contexts

    def _picture(self, codes):
        """Codes [.., N], image_vocab_size where they are masked -> ids with what stands around them [.., N + 2]."""
        around = [(0, 0)] * (codes.ndim - 1)
        ids = jnp.pad(codes + self.ar.first_code, [*around, (1, 0)], constant_values=self._id(BEGIN))
        return jnp.pad(ids, [*around, (0, 1)], constant_values=self._id(END))

    def code_logits(self, params, prompts, codes, negative=False):
        """Logits [B, N, K] float32 of the code at every place, given what is known of codes [B, N]; K: nothing is.

        negative: without the prompt, which guidance compares with.
        """
        model, variables = phi.Phi(self.ar), self._variables(params)
        context = self._contexts(variables, prompts, negative)[-1]
        hidden = model.apply(variables, *context, self._picture(codes), method="behind")
        return model.apply(variables, hidden[:, 1:-1], method="image_logits")

    def sample_image(self, params, prompts, key, how, index=None):
        """Draws how.images_per_prompt pictures a prompt: drawn [B*G, ..] and the policy's log-probs [B*G, N], each of
        the round in which its code was drawn for good.

        index: [B*G] int, the place of each sample in the whole that `key` is for; None where this batch is the whole.
        """
        S, shape = len(prompts.tokens) * how.images_per_prompt, (self.image_tokens, self.ar.image_vocab_size)
        keys = sampling.sample_keys(key, jnp.arange(S) if index is None else index)

        def noise(t):
            def of_sample(key):
                draws, takes_back = jax.random.split(jax.random.fold_in(key, t))
                return jax.random.exponential(draws, shape), jax.random.uniform(takes_back, shape[:1])
            return jax.vmap(of_sample)(keys)

        codes, order, logps, _ = self.reveal(
            params, prompts, jnp.full((S, self.image_tokens), self.ar.image_vocab_size), noise, how)
        return {"codes": codes, "round": order}, logps

    def reveal(self, params, prompts, codes, noise, how):
        """`sampling.reveal` of pictures of which codes [B*G, N] are known, with the given noise."""
        model, variables = phi.Phi(self.ar), self._variables(rollout.backbone(self.partition, params, how))
        contexts = self._contexts(variables, prompts, how.guidance != 1.0)

        def logits_of(codes):
            logits = []
            for context in contexts:      # one after the other: side by side, they take twice as long on a CPU
                codes, logits = jax.lax.optimization_barrier((codes, logits))
                hidden = model.apply(variables, *context, self._picture(codes), method="behind")
                logits.append(model.apply(variables, hidden[:, 1:-1], method="image_logits"))
            return logits

        return sampling.reveal(logits_of, codes, noise, how, self.rounds, self.heat)

    def drawn_shapes(self, S):
        """The shapes of S pictures as a policy draws them: codes and the rounds they are of, int32 [S, N] each."""
        shape = jax.ShapeDtypeStruct((S, self.image_tokens), jnp.int32)
        return {"codes": shape, "round": shape}

    def image_logps(self, params, prompts, drawn, how=sampling.How(), key=None):
        """log pi(code | prompt, what was known in its round) of given pictures, drawn [B, ..] -> [B, N] float32; 0 of
        codes that were given. With guidance, twice as many forwards, all differentiated.

        key: the estimate under one random mask a picture instead (see above), whatever the rounds: `masked_logps`. With
        `estimates`, and no key, the mean of so many, whose masks are the picture's own: policy and reference, and an
        update and the next, find the same.
        """
        codes = drawn["codes"]
        if key is not None:
            return self.masked_logps(params, prompts, codes, self._mask(jax.random.split(key, len(codes))), how)
        if not self.estimates:
            return self._logps(params, prompts, codes, drawn["round"], self.rounds, how)
        if how.correction:
            raise ValueError("model.override.estimates tells no log-probability of what was drawn, by which int8 is "
                             "corrected: set rollout.truncate = 0, or model.override.estimates = 0")
        own = jnp.sum(codes.astype(jnp.uint32) * (31 ** jnp.arange(self.image_tokens, dtype=jnp.uint32)), axis=1)
        masks = jax.vmap(lambda i: self._mask(sampling.sample_keys(jax.random.key(i), own)))(jnp.arange(self.estimates))
        return jnp.mean(jax.vmap(lambda mask: self.masked_logps(params, prompts, codes, mask, how))(masks), axis=0)

    def masked_logps(self, params, prompts, codes, mask, how=sampling.How()):
        """[B, N] whose mean over N is that of log p(code | the codes that are not masked) over a mask, bool [B, N]; 0
        of a code that is not masked."""
        logps = self._logps(params, prompts, codes, jnp.where(mask, 0, -1), 1, how)
        return logps * (self.image_tokens / jnp.sum(mask, axis=1, keepdims=True))

    def _logps(self, params, prompts, codes, order, rounds, how):
        """log pi of each of the codes [B, N] in its round, order [B, N] below `rounds`, given those of earlier ones."""
        model, variables = phi.Phi(self.ar), self._variables(params)
        contexts = self._contexts(variables, prompts, how.guidance != 1.0 and how.logps == "guided")

        def logits_of(context):
            def one_round(found, t):                               # of each code, what the head reads in its own round
                known = jnp.where(order < t, codes, self.ar.image_vocab_size)
                hidden = model.apply(variables, *context, self._picture(known), method="behind")[:, 1:-1]
                return jnp.where((order == t)[..., None], hidden, found), None
            if self.ar.remat != "nothing":
                one_round = jax.checkpoint(one_round, prevent_cse=False)
            start = jnp.zeros((*codes.shape, self.ar.hidden_size), params["ar"]["lm_embed_tokens"]["embedding"].dtype)
            hidden, _ = jax.lax.scan(one_round, start, jnp.arange(rounds))                          # [B, N, D]
            return model.apply(variables, hidden, method="image_logits")

        logits = [logits_of(context) for context in contexts]
        logps = gather_logps(sampling.policy_logits(how, logits[0], lambda: logits[-1]), codes)
        return jnp.where(order >= 0, logps, 0.0)

    def _mask(self, keys):
        """A random mask for each of B pictures, keys [B] -> bool [B, N], of a uniformly random number of codes from 1
        to N."""
        def of_picture(key):
            count, places = jax.random.split(key)
            return masked(places, jax.random.randint(count, (1,), 1, self.image_tokens + 1), self.image_tokens)[0]
        return jax.vmap(of_picture)(keys)

    def image_target(self, params, pixels):
        """Outside pictures as something to learn to draw: drawn [B, ..], all of it in one round."""
        codes = self._codes(params, pixels)
        return {"codes": codes, "round": jnp.zeros_like(codes)}

    def image_nll(self, params, prompts, target, key):
        """The published cross-entropy, nats: [B, N + 2] float32, whose mean is the loss of the batch.

        Of each picture max(1, round(N cos(pi u / 2))) codes are masked, u uniform; the loss is the mean over all masked
        codes of the batch, and over the tokens before and behind each picture, of -log p over all ids.
        """
        ratio, places = jax.random.split(key)
        u = jax.random.uniform(ratio, (len(target["codes"]),))
        count = jnp.maximum(1, jnp.round(self.image_tokens * jnp.cos(jnp.pi / 2 * u))).astype(jnp.int32)
        return self.masked_nll(params, prompts, target["codes"], masked(places, count, self.image_tokens))

    def masked_nll(self, params, prompts, codes, mask):
        """`image_nll` of codes [B, N] under a given mask, bool [B, N]."""
        model, variables = phi.Phi(self.ar), self._variables(params)
        (context,) = self._contexts(variables, prompts, False)
        shown = self._picture(jnp.where(mask, self.ar.image_vocab_size, codes))
        logits = model.apply(variables, model.apply(variables, *context, shown, method="behind"), method="text_logits")
        labelled = jnp.pad(mask, ((0, 0), (1, 1)), constant_values=True)                            # [B, N + 2]
        nll = jnp.where(labelled, -gather_logps(logits, self._picture(codes)), 0.0)
        return nll * (labelled.size / jnp.sum(labelled))

    def render(self, params, drawn, prompts, key, index=None):
        """Drawn [S, ..] -> pixels [S, H, W, 3] float32 in [0, 1], on the grid of 8 bits. Nothing here is random."""
        raw = magvit.Magvit(self.vq).apply({"params": params["vq"]}, drawn["codes"], self.grid, method="decode")
        return vq.to_pixels(raw)

    # ---- understanding branch ----------------------------------------------------------------------------------

    def _codes(self, params, pixels):
        return magvit.Magvit(self.vq).apply({"params": params["vq"]}, pixels, method="encode")

    def see(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1], as drawn or as `fit` gives them -> what is read: codes [B, N] int32, or CLIP's
        features [B, N, width], whose projector belongs to the backbone, so that each policy reads them by its own."""
        if self.vision is None:
            return self._codes(params, pixels)
        return clip.VisionTransformer(self.vision).apply(
            {"params": params["vision"]}, pixels, self.transform, method="features")

    def seen_of(self, drawn):
        """The codes themselves, or None where reading and drawing do not share them. Read so they are what was drawn;
        of codes that are rendered and tokenised again, less than half come back as they were."""
        return drawn["codes"] if self.vision is None else None

    def picture_of(self, drawn):
        """What was drawn without the way there: codes, whatever their rounds."""
        return drawn["codes"]

    def _asked(self, params, seen, prompts):
        """The chat up to where the answer begins, ids and mask [B, C], and what a row's patches are to the backbone
        (None where they are codes); and the network, which knows where the picture is."""
        (B, N), aligned = seen.shape[:2], None
        before, after = self._around(self.instruction)
        first = (0, len(before))[self.vision is not None]           # of what every token of the chat reads
        end = len(before) + N + (self.vision is None)               # codes are read with what stands around them
        if self.vision is None:
            picture = seen + self.ar.first_code
        else:
            picture = jnp.broadcast_to(self.ar.vocab_size + jnp.arange(N), (B, N))
            aligned = phi.Phi(self.ar).apply(self._variables(params), seen, method="project")
        row = lambda ids: jnp.broadcast_to(jnp.array(ids, jnp.int32), (B, len(ids)))
        ids = jnp.concatenate([row(before), picture, row(after[:1])], axis=1)
        mask = jnp.concatenate([jnp.ones_like(ids, bool), prompts.question_mask], axis=1)
        return jnp.concatenate([ids, prompts.question], axis=1), mask, aligned, phi.Phi(self.ar, (first, end))

    def text_logps(self, params, seen, prompts):
        """log p(word_j | picture, question, word_<j) for all words in one forward: [B*K, L] float32, mask [B*K, L].

        seen [B, N, ..]; prompts of B*K texts, the K of a picture side by side and with one question among them.
        """
        return gather_logps(self.text_logits(params, seen, prompts), prompts.words), prompts.words_mask

    def text_logits(self, params, seen, prompts):
        """What `text_logps` picks the words from: logits [B*K, L, V] float32 of the word at each place, of all ids."""
        K, variables = len(prompts.words) // len(seen), self._variables(params)
        asked, mask, aligned, model = self._asked(params, seen, jax.tree.map(lambda x: x[::K], prompts))
        run = lambda tokens, mask, positions: model.apply(
            variables, tokens, mask, positions=positions, seen=aligned)[0]
        hidden = hidden_of_words(run, asked, mask, prompts)
        return model.apply(variables, hidden, method="text_logits")

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        """Draws how.images_per_prompt answers to the question of each picture seen [B, N, ..], which is read once.

        prompts: B rows, of which only the question is read. Returns words [B*G, T] int32, the policy's log-probs
        [B*G, T] float32 and mask [B*G, T] bool, T = steps: True up to and including the end of the answer, from where
        on words repeat it at log-probability 0; a row that has not come to its end by then counts whole. index as in
        `sample_image`; how's guidance is for pictures and not applied.
        """
        backbone, how = rollout.backbone(self.partition, params, how), dataclasses.replace(how, guidance=1.0)
        asked, mask, aligned, model = self._asked(backbone, seen, prompts)
        words, logps = sampling.decode(model, self._variables(backbone), asked, mask, key, how, steps=steps,
                                       head="text_logits", offset=0, index=index, stop=self._stop, seen=aligned)
        return words, logps, until_end(words, self._stop)

    def answer(self, params, seen, question, key, max_words=32, how=sampling.How(temperature=0.0)):
        """Answers one question about each picture seen [B, N, ..]. Returns B strings, without their end."""
        prompts = self.encode_prompts(["-"] * len(seen), questions=[question] * len(seen))
        words, _, _ = self._sample_text(params, seen, prompts, key, how, max_words)
        return [text.strip() for text in self.tokenizer.batch_decode(np.asarray(words), skip_special_tokens=True)]

    _sample_text = jax.jit(sample_text, static_argnums=(0, 5, 6))

    def features(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> [B, N, D] float32: what the model reads of them, before codes are made."""
        if self.vision is not None:
            return self.see(params, pixels).astype(jnp.float32)
        latents = magvit.Magvit(self.vq).apply({"params": params["vq"]}, pixels, method="latents")
        return latents.reshape(len(pixels), -1, self.vq.bits).astype(jnp.float32)

    # ---- pictures of any size, on the host ---------------------------------------------------------------------

    def fitted_size(self, size):
        """(height, width) to which a picture of this (height, width) is brought: as drawn, or as `see` resizes it."""
        if self.vision is None or tuple(size) == self.picture_size:
            return self.picture_size
        return (self.transform.shortest_edge,) * 2

    def fit(self, image):
        """A picture, uint8 or float in [0, 1], [h, w, 3] -> float32 [H, W, 3] in [0, 1], which `see` takes: its shorter
        side resized, and its middle."""
        image = np.asarray(image)
        image = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
        if image.shape[:2] == self.picture_size:
            return image.astype(np.float32) / 255
        # The published codes round what is cut off above and on the left differently: to even numbers, and down. For
        # CLIP a square is left from which `see` cuts what is read, as it does where a picture was drawn.
        if self.vision is None:
            side, start = self.picture_size[0], lambda n: round((n - side) / 2)
        else:
            side, crop = self.transform.shortest_edge, self.transform.crop_size
            start = lambda n: (n - crop) // 2 - (side - crop) // 2
        height, width = clip.covering(image.shape[:2], side)
        image = siglip.resize(Image.fromarray(image).convert("RGB"), (height, width))
        top, left = start(height), start(width)
        return np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255

    # ---- parameters --------------------------------------------------------------------------------------------

    def init(self, key):
        """Random parameters of all parts; under jax.eval_shape, their shapes."""
        keys = jax.random.split(key, 3)
        params = {"ar": phi.init(self.ar, keys[0]), "vq": magvit.init(self.vq, keys[1])}
        return params | ({"vision": clip.init(self.vision, keys[2])} if self.vision else {})

    def check_parts(self):
        """ValueError where the sizes of two parts do not fit."""
        fits = {"codes of backbone and image tokenizer": (self.ar.image_vocab_size, self.vq.codebook_size),
                "channels of vision tower and projector": (
                    self.vision.hidden_size if self.vision else 0, self.ar.vision_width),
                "sides of image transform and vision tower": (
                    self.transform and self.transform.crop_size, self.vision and self.vision.image_size)}
        for what, (one, other) in fits.items():
            if one != other:
                raise ValueError(f"the {what} differ: {one} and {other}")

    def check_text(self):
        """ValueError unless the tokenizer is there and ends with the tokens that Show-o adds, where its codes begin."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer")
        known = self.tokenizer.get_vocab()
        first = self.ar.first_code - 1 - len(ADDED)
        for i, token in enumerate((PAD, *ADDED)):
            if known.get(token) != first + i or self._ids(token) != [first + i]:
                raise ValueError(f"the tokenizer has no token {token} with the id {first + i}, where "
                                 f"{self.ar.vocab_size} ids with {self.ar.image_vocab_size} codes and a mask ask for "
                                 f"it")
        if self._stop is None:
            raise ValueError("the tokenizer has no token that ends a text")

    # ---- names in the published folder -------------------------------------------------------------------------

    @property
    def adapter_rules(self):
        """How the parameters of the backbone are called in a checkpoint, and so in peft's adapters (see torch_keys)."""
        return phi.RULES

    def published_parts(self, shapes, found):
        """{part: (parameters, rules, keys to ignore)} of the published files, see torch_keys.places. shapes: of the
        params; found: {part: {key: shape}}."""
        parts = {"ar": (shapes["ar"], phi.RULES, ()), "vq": (shapes["vq"], magvit.RULES, magvit.UNUSED)}
        if self.vision:
            names = found["vision"]
            parts["vision"] = shapes["vision"], clip.rules(names), clip.unused(names, self.vision)
        return parts


MODEL = Showo


def masked(key, counts, N):
    """Masks of counts [B] of N places each, uniformly random: bool [B, N]."""
    place = jnp.argsort(jnp.argsort(jax.random.uniform(key, (len(counts), N)), axis=1), axis=1)
    return place < counts[:, None]


# ------------------------------------------------------------------ sizes

PHI = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
           num_key_value_heads=32, vocab_size=58498, image_vocab_size=8192)
TOWER = clip.Config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    image_size=336, patch_size=14)

PUBLISHED = {                                  # the published models in numbers, for planning
    "256": dict(grid=(16, 16)),
    "512": dict(grid=(32, 32), guidance=6.0, rounds=50),
    "clip": dict(grid=(16, 16), ar=phi.Config(**PHI, vision_width=1024), vision=TOWER,
                 transform=clip.Transform(336, 336, clip.MEAN, clip.STD))}


class Sizes(Showo):
    """The published model where its folder is not: texts have lengths here, and ids that mean nothing."""
    _stop = 0

    def _id(self, token):
        return 0

    def _ids(self, text):
        return [0] * (28 if text == SYSTEM else 12)


def published(override, size=None):
    """A published model for a plan. override: fields to set; size: of PUBLISHED, None is the first."""
    if (size := str(size or next(iter(PUBLISHED)))) not in PUBLISHED:
        raise ValueError(f"config.model.size is {size!r}; it must be one of {', '.join(PUBLISHED)}")
    fields = dict(ar=phi.Config(**PHI), vq=magvit.Config()) | PUBLISHED[size]
    return described.typed(Sizes, fields | dict(override, tokenizer=None))


# ------------------------------------------------------------------ the published folder

FOLDERS = {"magvit": "For Show-o: the folder of its image tokenizer, a copy of showlab/magvitv2;"
                    " for --src=hf:.. it is found by its name.",
           "clip": "For the Show-o that reads CLIP's features: the folder of CLIP's tower, a copy of "
                   "openai/clip-vit-large-patch14-336.",
           "llm": "For Show-o: the folder with the config.json and the tokenizer of Phi-1.5, a copy of "
                  "microsoft/phi-1_5, whose weights are not read."}
FROM_HUB = {"magvit": ("hf:showlab/magvitv2", ("*",)), "llm": ("hf:microsoft/phi-1_5", ("*.json", "*.txt"))}


def read_source(src, image_size=None, magvit=None, clip=None, llm=None):
    """A published directory -> Source. Raises ValueError or OSError with one line about what is missing or wrong.

    It has config.json and the backbone's weights; what that names or leaves out lies in folders of its own. image_size:
    side in pixels of the pictures to draw.
    """
    told = Described(src / "config.json")
    named = Path(told.a(str, "llm_model_path"))                       # on the Hub; or a folder inside of this one
    inside = not named.is_absolute() and ".." not in named.parts and (src / named).is_dir()
    folders = {"llm": src / named if inside else llm, "magvit": magvit, "clip": clip}
    if not told.get("w_clip_vit"):
        if clip:
            raise ValueError(f"{told.path} says that the model reads codes (w_clip_vit): leave --clip out")
        del folders["clip"]
    for name, folder in folders.items():
        if not folder or not Path(folder).is_dir():
            where = f"there is no folder {folder}" if folder else f"{told.path} does not say where its {name} is"
            raise FileNotFoundError(f"{where}: pass --{name}=DIR ({FOLDERS[name].rstrip('.')})")
    folders = {"ar": src, **{name: Path(folder).absolute() for name, folder in folders.items()}}
    vision = transform = None
    if "clip" in folders:
        vision, transform = tower_config(Described(folders["clip"] / "config.json")), image_transform(
            Described(folders["clip"] / "preprocessor_config.json"))
    vq = magvit_config(Described(folders["magvit"] / "config.json"))
    side, left = math.isqrt(told.a(int, "num_vq_tokens")), 0
    if side ** 2 != told["num_vq_tokens"]:
        raise ValueError(f"{told.path} says num_vq_tokens = {told['num_vq_tokens']}, which is no square")
    if image_size is not None:
        side, left = divmod(image_size, vq.downscale)
    if left:
        raise ValueError(f"--image_size={image_size}: it must be a multiple of {vq.downscale}")
    ar = ar_config(told, Described(folders["llm"] / "config.json"), vision.hidden_size if vision else 0)
    umm = Showo(ar=ar, vq=vq, tokenizer=with_added(described.read_tokenizer(folders["llm"])), grid=(side, side),
                vision=vision, transform=transform)
    umm.check_text()
    weights = {"ar": weight_files(src), "vq": weight_files(folders["magvit"])}
    if vision:
        weights["vision"] = weight_files(folders["clip"])
    places = {"ar": Path(), "llm": named if inside else Path("llm"),
              "magvit": Path("magvitv2"), "clip": Path("clip")}
    kept = {(places[name] / file.name).as_posix(): file for name, folder in folders.items()
            for file in small_files(folder)}
    names = {file.path: (places[name] / file.path.relative_to(folders[name])).as_posix()
             for name, part in (("ar", "ar"), ("magvit", "vq"), ("clip", "vision")) for file in weights.get(part, ())}
    return Source(umm, weights, kept, names)


def with_added(tokenizer):
    """Phi's tokenizer with what Show-o adds to it, in the published order."""
    tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.add_tokens(list(ADDED))
    return tokenizer


def ar_config(told, llm, vision_width=0):
    """config.json of Show-o and of the language model it names -> phi.Config. What the latter says of its vocabulary
    and of norms of queries and keys is Phi's own, and not Show-o's."""
    codes, total = told.a(int, "codebook_size"), told.a(int, "vocab_size")
    text = total - codes - 2 - len(ADDED)
    told.insist(mask_token_id=total - 1, llm_vocab_size=text)
    llm.values = PHI_DEFAULTS | llm.values
    heads = llm.a(int, "num_attention_heads")
    rope = llm.get("rope_parameters") or {}
    llm.insist(model_type="phi", hidden_act="gelu_new", rope_scaling=None, tie_word_embeddings=False)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{llm.path} says rope_parameters = {rope}; implemented is rope_type 'default' only")
    more = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return llm.numbers(phi.Config, num_key_value_heads=llm.get("num_key_value_heads") or heads, vocab_size=total,
                       image_vocab_size=codes, vision_width=vision_width, **more)


PHI_DEFAULTS = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32)


def magvit_config(told):
    """config.json of the image tokenizer -> magvit.Config. The published one has no sizes: they are its defaults."""
    told.insist(_class_name="MAGVITv2")
    values = {"bits": told["codebook_dim"]} if "codebook_dim" in told.values else {}
    for part in ("encoder", "decoder"):
        sizes = told.a(dict, part) if part in told.values else Described(told.path, {})
        sizes.insist(z_channels=values.get("bits", sizes.get("z_channels")))
        for ours, theirs in (("channels", "ch"), ("multipliers", "ch_mult"), ("blocks", "num_res_blocks")):
            if theirs in sizes.values:
                values[f"{part}_{ours}"] = sizes[theirs]
    return described.named(told.path, lambda: described.typed(magvit.Config, values))
