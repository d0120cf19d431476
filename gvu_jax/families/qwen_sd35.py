"""UAE's own pair (Yan et al. 2025): Qwen2.5-VL reads and captions, Stable Diffusion 3.5 draws from what it says.

    caption -> chat -> Qwen2.5-VL -> its last hidden states -> projector -> SD3.5's context -> a flow -> VAE -> picture

The drawer's other input, the pooled vector, is that of the empty prompt for every picture: a constant. A picture is a
chain of Gaussian steps (flow.py); its latents are never read, so what was drawn is read as pixels alone. Top to bottom:
the model behind the interface of umm.py, its published sizes, and how its published folders are read.

"ar" has both halves, "llm" (with the projector) and "dit", so that one adapter lies over both, and what a run trains is
said by a pattern of paths: ^llm/layers is the captioner, ^dit/.*attn the drawer. `halves` says which of the two a stage
of UAE may move.
"""
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from PIL import Image

from gvu_jax import described, flow, lora, rollout, sampling
from gvu_jax.described import Described
from gvu_jax.models import clip, clip_vision, qwen25_vl, sd3, siglip, text_encoders, torch_keys, vae
from gvu_jax.tensor_files import Source, TensorFile, small_files, weight_files
from gvu_jax.umm import (
    Lengths, count_positions, gather_logps, hidden_of_words, ids_of_words, lengths_of, pad_prompts, prompt_shapes,
    until_end)

MOST_TOKENS = 4096      # of a text: a caption has some hundred
SYSTEM, DRAW = "You are a helpful assistant.", "generate"       # the system message; the role of what is to be drawn
NEGATIVE = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
QUESTION = ('You are an expert vision-language model.  \nYour task is: Given an input image, generate a **textual '
            'description** of the image. If there is text in the image, transcribe it inside double quotes "".  \nNow, '
            'carefully analyze the input image and output the full description. ')
BEGIN, PICTURE, END, TURN, STOP = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"
PAD = "<|endoftext|>"


@struct.dataclass
class Seen:
    """What is read of B pictures of one size: cells [B, M, D], and how many rows and columns of them."""
    cells: Any
    grid: tuple = struct.field(pytree_node=False)

    def __len__(self):
        return len(self.cells)


@dataclasses.dataclass(frozen=True, eq=False)
class QwenSD35:
    """Qwen2.5-VL `ar` with its tower `vision` and a projector, SD3.5's transformer `dit`, and `vae`."""
    ar: qwen25_vl.Config
    vision: qwen25_vl.VisionConfig
    dit: sd3.Config
    vae: vae.Config | vae.PatchConfig
    flow: flow.Flow                                     # how pictures are drawn where sampling.flow is not set
    tokenizer: Any
    grid: tuple[int, int]                               # rows, columns of the drawer's patches in a picture
    transform: qwen25_vl.Transform
    pooled: tuple[float, ...]                           # of the empty prompt, both text towers
    instruction: str = QUESTION
    negative: str = NEGATIVE                            # what guidance leads away from
    guidance: float = 5.0                               # as published
    shift: float = 3.0                                  # of the noise levels
    layout: str = "published"                           # of the captioner's folder: one of qwen25_vl.RULES

    kind = "qwen_sd35"
    int8 = ()
    exact_likelihood = False                            # of a picture nobody knows more than a bound
    asks_first = True                                   # a question stands before the picture, see shapes/pretrain.py
    loads = None                                        # no class of transformers has both halves
    trains = {"backbone": r"^(llm/(layers|norm)|dit/blocks_\d+)/", "all": r"",
              "backbone+projector": r"^(llm/(layers|norm|projector)|dit/(blocks_\d+|context_embedder))/"}
    halves = {"caption": r"^llm/(?!projector)", "draw": r"^(dit|llm/projector)/"}
    _both = tuple((f"^dit/.*?(?:{path})", axes) for path, axes in sd3.PARTITION) + tuple(
        (f"^llm/.*?(?:{path})", axes) for path, axes in qwen25_vl.PARTITION)
    partition = {"ar": _both, "adapter": _both, "vision": qwen25_vl.VISION_PARTITION, "vae": vae.PARTITION}

    def __post_init__(self):
        if min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} must be at least 1")
        if self.layout not in qwen25_vl.RULES:
            raise ValueError(f"layout is {self.layout!r}; it must be {' or '.join(qwen25_vl.RULES)}")

    # ---- text, on the host -------------------------------------------------------------------------------------

    @property
    def of_shapes(self):
        """Whether this is a model of the shapes world."""
        return isinstance(self.vae, vae.PatchConfig)

    @property
    def latents_size(self):
        """Height and width, in latents, of a picture of this grid."""
        return tuple(side * self.dit.patch_size for side in self.grid)

    @property
    def picture_size(self):
        """Height and width, in pixels, of a picture of this grid."""
        return tuple(side * self.vae.downscale for side in self.latents_size)

    @property
    def pad(self):
        """Id of the token that stands where rows are filled up."""
        return self._id(PAD)

    def _id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def said(self, text):
        """A text as an answer, behind the open turn: what its words' ids are of."""
        return text.strip()

    def _chat(self, role, text):
        system = "" if self.of_shapes else f"{TURN}system\n{SYSTEM}{STOP}\n"      # words that world does not know
        return f"{system}{TURN}{role}\n{text}{STOP}\n{TURN}assistant\n"

    @functools.lru_cache(maxsize=4096)
    def _around(self, question):
        """Ids before and after a picture's cells when `question` is put before it, up to where the answer begins."""
        ids = self._ids(self._chat("user", question + BEGIN + PICTURE + END))
        at = ids.index(self._id(PICTURE))
        return tuple(ids[:at]), tuple(ids[at + 1:])

    @functools.lru_cache(maxsize=16)
    def _negative(self):
        return tuple(self._ids(self._chat(DRAW, self.negative)))

    def _encode(self, texts, questions, end):
        words = ids_of_words(self, texts, questions, MOST_TOKENS)
        stop = [self._id(STOP)] if end else []
        return ([self._ids(self._chat(DRAW, text)) for text in texts],
                [list(self._around(question)[0]) for question in questions], [ids + stop for ids in words])

    def lengths(self, texts, questions=None, end=False):
        """The smallest padded lengths that hold all of `texts`; of prompt and words, rounded up to a multiple of 4."""
        return lengths_of(self._encode(texts, questions or [self.instruction] * len(texts), end))

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        """B texts -> Prompts of int32 / bool numpy arrays; arguments and errors are those of XOmni.encode_prompts.

        A prompt is a whole chat and padded at its end; a question is what stands before the picture.
        """
        parts = self._encode(texts, questions or [self.instruction] * len(texts), end)
        return pad_prompts(texts, parts, lengths, self.pad, left=(False, True, False))

    def prompt_shapes(self, B, prompt, words, asked=0):
        """The shapes of B encoded texts of these padded lengths, Prompts of jax.ShapeDtypeStruct; asked: by how many
        tokens their questions are longer than the instruction."""
        return prompt_shapes(B, Lengths(prompt, len(self._around(self.instruction)[0]) + asked, words))

    # ---- generation branch -------------------------------------------------------------------------------------

    def _variables(self, params, part):
        adapter = params.get("adapter", {}).get(part)
        return {"params": params["ar"][part]} | ({"lora": adapter} if adapter else {})

    def hidden(self, params, tokens, mask):
        """Last hidden states of chats without pictures, padded at their end: tokens, mask [B, P] -> [B, P, D].

        Padding is read as the published code reads it: it is no key, but as a query it stands at position 1 and reads
        the whole chat, so that all padding of a row gives one vector. Splash would let it read padding alone, so the
        mask is said for each query, which keeps to the attention that asks keys only.
        """
        positions, (B, P) = jnp.where(mask, count_positions(mask), 1), mask.shape
        keys = jnp.broadcast_to(mask[:, None, :], (B, P, P))
        module = qwen25_vl.Qwen25VL(self.ar)
        return module.apply(self._variables(params, "llm"), tokens, keys, positions)[0]

    def context(self, params, tokens, mask):
        """What the drawer reads of chats: [B, P, joint_attention_dim], padding too."""
        hidden = self.hidden(params, tokens, mask)
        return qwen25_vl.Qwen25VL(self.ar).apply(self._variables(params, "llm"), hidden, method="project")

    def texts(self, params, prompts, guided):
        """sd3.Text of the prompts [B] and, where guided, of the negative one [B].

        As published each of the two chats is padded to the longer one, and its padding is part of its context. So it is
        here for each prompt by itself, whatever longer ones are encoded beside it; unguided there is no padding.
        """
        mask = prompts.mask
        (B, P), length = mask.shape, jnp.sum(mask, axis=1, keepdims=True)                           # [B, 1]
        negative = np.array(self._negative() if guided else (), np.int32)
        X = max(P, len(negative))
        widen = lambda x, fill: jnp.pad(x, ((0, 0), (0, X - x.shape[1])), constant_values=fill)
        real = jnp.arange(X) < jnp.maximum(length, len(negative))                                   # [B, X]

        def text_of(tokens, mask):
            context = self.context(params, widen(tokens, self.pad), widen(mask, False))
            return self.with_pooled(jnp.broadcast_to(context, (B, *context.shape[1:])), real)
        positive = text_of(jnp.where(mask, prompts.tokens, self.pad), mask)
        return positive, text_of(negative[None], np.ones((1, len(negative)), bool)) if guided else None

    def _run(self, params, positive, negative, guidance, how):
        """The velocity of flow.sample and flow.moves; texts have a row per sample."""
        dit = dataclasses.replace(self.dit, remat=self.ar.remat != "nothing")
        velocity = lambda *inputs: sd3.SD3Transformer(dit).apply(self._variables(params, "dit"), *inputs)
        return sd3.guided_velocity(velocity, positive, negative, guidance, how.negative_gradient)

    def _flow(self, how):
        return how.flow or self.flow

    def sample_image(self, params, prompts, key, how, index=None):
        """Draws how.images_per_prompt pictures a prompt: flow.Drawn [B*G, ..] and the policy's log-probs [B*G, T].

        index: [B*G] int, the place of each sample in the whole that `key` is for; None where this batch is the whole.
        """
        settings, group, rows = self._flow(how), how.images_per_prompt, len(prompts.tokens) * how.images_per_prompt
        repeat = lambda text: jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), text)
        texts = repeat(self.texts(params, prompts, how.guidance != 1))
        run = self._run(params, *texts, how.guidance, settings)
        shape, levels = (*self.latents_size, self.dit.in_channels), flow.levels(settings, self.shift)
        index = jnp.arange(rows) if index is None else index
        return flow.draw(settings, run, shape, levels, key, index, group)

    def drawn_shapes(self, S, how=sampling.How()):
        """The shape of S pictures as a policy draws them, flow.Drawn."""
        return flow.drawn_shapes(self._flow(how), S, (*self.latents_size, self.dit.in_channels))

    def image_moves(self, params, prompts, drawn, how):
        """The policy's view of every decision of given pictures, differentiable: flow.Moves [S, T, ..]. A policy whose
        how.logps is "conditional" takes its steps as if there were no guidance."""
        settings = self._flow(how)
        guidance = 1.0 if how.logps == "conditional" else how.guidance
        run = self._run(params, *self.texts(params, prompts, guidance != 1), guidance, settings)
        return flow.moves(settings, run, drawn, flow.levels(settings, self.shift))

    def image_logps(self, params, prompts, drawn, how=sampling.How(), key=None):
        """log pi of each trained step of given pictures, [S, T] float32: means over a step's entries, see flow.py. With
        a key, of the pictures themselves, whose likelihood nobody knows: that of its bound [S, 1], the flow-matching
        loss under the key's noise (Diffusion-DPO, Wallace et al. 2024)."""
        if key is not None:
            return -self.image_nll(params, prompts, drawn, key)
        return self.image_moves(params, prompts, drawn, how).logps

    def image_target(self, params, pixels):
        """Outside pictures as something to learn to draw: the VAE's means, as the flow sees them [B, h, w, C] float32.
        A picture of another size is brought to that of the drawn ones, whatever its sides' ratio."""
        pixels = siglip.resized(pixels, self.picture_size)
        mean, _ = vae.module(self.vae).apply({"params": params["vae"]}, pixels, method="encode")
        return vae.to_latents(mean, self.vae).astype(jnp.float32)

    def image_nll(self, params, prompts, target, key):
        """The flow-matching loss of targets [B, h, w, C], or of what was drawn, flow.Drawn: the mean square of
        v - (noise - target), [B, 1] float32, at one noise level each, drawn as SD3's were: the logistic of a normal
        (Esser et al. 2024). An upper bound of the negative log-likelihood but for weights of the levels. Equal keys
        give rows at one place equal noise.
        """
        target = target.final if isinstance(target, flow.Drawn) else target
        of_level, of_noise = jax.random.split(key)
        sigma = jax.nn.sigmoid(jax.random.normal(of_level, (len(target),)))                         # [B]
        noise = jax.random.normal(of_noise, target.shape)
        return self.flow_matching(params, self.texts(params, prompts, False)[0], target, noise, sigma)[:, None]

    def flow_matching(self, params, text, target, noise, sigma):
        """The mean square of v - (noise - target) at (1 - sigma) target + sigma noise: [B] float32."""
        s = sigma[:, None, None, None]
        v = self._run(params, text, None, 1.0, self.flow)((1 - s) * target + s * noise, sigma)
        return jnp.mean((v - (noise - target)) ** 2, axis=(1, 2, 3))

    # ---- the cold start by reconstruction ------------------------------------------------------------------

    def answer_states(self, params, seen, prompts):
        """What the drawer reads of answers about pictures: the projected states at their words [B, L, ..], those that
        prompts.words_mask names; and, of the negative chat, the first L states [1, L, ..], of its padding, too, where
        an answer is longer."""
        model, variables = qwen25_vl.Qwen25VL(self.ar), self._variables(params, "llm")
        asked, mask, place = self._asked(seen, prompts)
        C, L = asked.shape[1], prompts.words.shape[1]
        tokens = jnp.concatenate([asked, prompts.words], axis=1)                                    # [B, C + L]
        mask = jnp.pad(mask, ((0, 0), (0, L)), constant_values=True)
        hidden, _ = model.apply(variables, tokens, mask, place(count_positions(mask)), seen=seen.cells)
        negative = np.array(self._negative()[:L], np.int32)
        real = np.arange(L)[None] < len(negative)
        negative = np.pad(negative, (0, L - len(negative)), constant_values=self.pad)[None]
        return (model.apply(variables, hidden[:, C:], method="project"),
                self.context(params, jnp.array(negative), jnp.array(real)))

    def reconstruction(self, params, seen, prompts, key, how):
        """Pictures [B, H, W, 3] in [0, 1] that captions of others give, drawn as in training but for the noise of a
        step, differentiable through all of it: UAE's cold start."""
        noise = jax.random.normal(key, (len(prompts.words), *self.latents_size, self.dit.in_channels))
        return self.redrawn(params, seen, prompts, noise, self._flow(how), how.guidance)

    def redrawn(self, params, seen, prompts, noise, settings=flow.Flow(steps=10), guidance=5.0):
        """`reconstruction` from noise [B, h, w, C]; each step is computed again in the backward pass."""
        positive, negative = (self.with_pooled(context, prompts.words_mask)
                              for context in self.answer_states(params, seen, prompts))
        run = jax.checkpoint(self._run(params, positive, negative, guidance, settings))
        by_ode = dataclasses.replace(settings, noise=0.0)
        drawn, _ = flow.sample(by_ode, run, noise, flow.levels(settings, self.shift), 0, None)
        return self.decode(params, drawn.final)

    def with_pooled(self, context, real=None):
        """Context [B, X, ..] beside the constant pooled vector: sd3.Text."""
        pooled = jnp.broadcast_to(jnp.array(self.pooled, context.dtype), (len(context), len(self.pooled)))
        return sd3.Text(context, pooled, real)

    def render(self, params, drawn, prompts, key, index=None):
        """flow.Drawn [S, ..] -> pixels [S, H, W, 3] float32 in [0, 1], on the grid of 8 bits. Nothing is random."""
        return jnp.round(self.decode(params, drawn.final) * 255) / 255

    def decode(self, params, latents):
        """Latents [S, h, w, C] -> pixels [S, H, W, 3] float32 in [0, 1]."""
        dtype = jax.tree.leaves(params["vae"])[0].dtype
        raw = vae.module(self.vae).apply({"params": params["vae"]}, vae.from_latents(latents, self.vae).astype(dtype),
                                         method="decode")
        return vae.to_pixels(raw.astype(jnp.float32))

    # ---- understanding branch ----------------------------------------------------------------------------------

    def see(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1], as drawn or as `fit` gives them -> Seen."""
        pixels = qwen25_vl.fitted(pixels, self.transform, self.vision.multiple)
        cells = qwen25_vl.VisionTower(self.vision).apply({"params": params["vision"]}, pixels, method="see")
        return Seen(cells, tuple(side // self.vision.multiple for side in pixels.shape[1:3]))

    def seen_of(self, drawn):
        """None: reading and drawing do not share their tokens."""
        return None

    def picture_of(self, drawn):
        """What was drawn without the way there: the latents that are rendered."""
        return drawn.final

    def _asked(self, seen, prompts):
        """The chat up to where the answer begins, ids and mask [B, C], and how to place counted tokens [B, T]."""
        (B, M, _), after = seen.cells.shape, self._around(self.instruction)[1]
        behind = jnp.concatenate([self.ar.vocab_size + jnp.arange(M), jnp.array(after, jnp.int32)])
        tokens = jnp.concatenate([prompts.question, jnp.broadcast_to(behind, (B, len(behind)))], axis=1)
        mask = jnp.concatenate([prompts.question_mask, jnp.ones((B, len(behind)), bool)], axis=1)
        start = jnp.sum(prompts.question_mask, axis=1)
        return tokens, mask, lambda count: qwen25_vl.rope_positions(count, [(start, seen.grid)])

    def text_logps(self, params, seen, prompts):
        """log p(word_j | picture, question, word_<j) for all words in one forward: [B*K, L] float32, mask [B*K, L].

        seen [B]; prompts of B*K texts, the K of a picture side by side and with one question among them.
        """
        return gather_logps(self.text_logits(params, seen, prompts), prompts.words), prompts.words_mask

    def text_logits(self, params, seen, prompts):
        """What `text_logps` picks the words from: logits [B*K, L, V] float32 of the word at each place."""
        K = len(prompts.words) // len(seen)
        model, variables = qwen25_vl.Qwen25VL(self.ar), self._variables(params, "llm")
        asked, mask, place = self._asked(seen, jax.tree.map(lambda x: x[::K], prompts))
        run = lambda tokens, mask, count: model.apply(variables, tokens, mask, place(count), seen=seen.cells)[0]
        return model.apply(variables, hidden_of_words(run, asked, mask, prompts), method="text_logits")

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        """Draws how.images_per_prompt answers to the question of each picture seen [B], which is read once.

        prompts: B rows, of which only the question is read. Returns words [B*G, T] int32, the policy's log-probs
        [B*G, T] float32 and mask [B*G, T] bool, T = steps: True up to and including the end of the answer, from where
        on words repeat it at log-probability 0; a row that has not come to its end by then counts whole. index as in
        `sample_image`; how's guidance is for pictures and not applied.
        """
        captioner = {name: {"llm": params[name]["llm"]} for name in ("ar", "adapter") if "llm" in params.get(name, {})}
        captioner = rollout.backbone(self.partition, captioner, how)
        asked, mask, place = self._asked(seen, prompts)
        count = count_positions(jnp.pad(mask, ((0, 0), (0, steps)), constant_values=True))
        end, how = self._id(STOP), dataclasses.replace(how, guidance=1.0)
        words, logps = sampling.decode(
            qwen25_vl.Qwen25VL(self.ar), self._variables(captioner, "llm"), asked, mask, key, how, steps=steps,
            head="text_logits", offset=0, index=index, stop=end, seen=seen.cells, positions=place(count))
        return words, logps, until_end(words, end)

    def answer(self, params, seen, question, key, max_words=32, how=sampling.How(temperature=0.0)):
        """Answers one question about each picture seen [B]. Returns B strings, without their end."""
        prompts = self.encode_prompts(["-"] * len(seen), questions=[question] * len(seen))
        words, _, _ = self._sample_text(params, seen, prompts, key, how, max_words)
        return [text.strip() for text in self.tokenizer.batch_decode(np.asarray(words), skip_special_tokens=True)]

    _sample_text = jax.jit(sample_text, static_argnums=(0, 5, 6))

    def features(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> [B, M, D] float32: the vision tower's output."""
        return self.see(params, pixels).cells.astype(jnp.float32)

    # ---- pictures of any size, on the host ---------------------------------------------------------------------

    def fitted_size(self, size):
        """(height, width) to which a picture of this (height, width) is brought. As drawn it stays: `see` does it."""
        if tuple(size) == self.picture_size:
            return self.picture_size
        return qwen25_vl.sizes(*size, self.transform, self.vision.multiple)[-1]

    def fit(self, image):
        """A picture, uint8 or float in [0, 1], [h, w, 3] -> float32 [H, W, 3] in [0, 1], which `see` takes."""
        image = np.asarray(image)
        image = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
        if image.shape[:2] == self.picture_size:
            return image.astype(np.float32) / 255
        return qwen25_vl.fit_image(Image.fromarray(image), self.transform, self.vision.multiple)

    # ---- parameters --------------------------------------------------------------------------------------------

    def init(self, key):
        """Random parameters of all parts; under jax.eval_shape, their shapes."""
        keys = jax.random.split(key, 4)
        return {"ar": {"llm": qwen25_vl.init(self.ar, keys[0]), "dit": sd3.init(self.dit, keys[1])},
                "vision": qwen25_vl.init_vision(self.vision, keys[2]), "vae": vae.init(self.vae, keys[3])}

    def check_parts(self):
        """ValueError where the sizes of two parts do not fit."""
        fits = {"channels of projector and drawer": (self.ar.projected[-1:], (self.dit.joint_attention_dim,)),
                "channels of vision tower and captioner": (self.vision.out_hidden_size, self.ar.hidden_size),
                "channels of drawer and VAE": (self.dit.in_channels, self.vae.latent_channels),
                "pooled vectors of text towers and drawer": (len(self.pooled), self.dit.pooled_projection_dim)}
        for what, (one, other) in fits.items():
            if one != other:
                raise ValueError(f"the {what} differ: {one} and {other}")
        if max(self.grid) > self.dit.pos_embed_max_size:
            raise ValueError(f"grid {self.grid}: the drawer has positions for {self.dit.pos_embed_max_size} patches a "
                             f"side")

    def check_text(self):
        """ValueError unless the tokenizer is there and knows the chat's tokens, each as one id of the captioner's."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer")
        known = self.tokenizer.get_vocab()
        for token in (PAD, TURN, STOP, BEGIN, PICTURE, END):
            if token not in known or known[token] >= self.ar.vocab_size or self._ids(token) != [known[token]]:
                raise ValueError(f"the tokenizer has no token {token} with an id below {self.ar.vocab_size}")

    # ---- names in the published folder -------------------------------------------------------------------------

    @property
    def adapter_rules(self):
        """How the parameters of both halves are called in a checkpoint, and so in peft's adapters (see torch_keys)."""
        return {"llm": qwen25_vl.RULES[self.layout], "dit": sd3.RULES}

    def published_parts(self, shapes, found):
        """{part: (parameters, rules, keys to ignore)} of the published files, see torch_keys.places: the captioner's
        folder has the tower too. shapes: of the params; found: {part: {key: shape}}."""
        captioner = {"ar": {"llm": shapes["ar"]["llm"]}, "vision": shapes["vision"]}
        rules = {"ar": ((r"^llm/", ""),) + qwen25_vl.RULES[self.layout], "vision": qwen25_vl.VISION_RULES[self.layout]}
        return {"": (captioner, rules, qwen25_vl.unread(found[""], self.ar)),
                "ar/dit": (shapes["ar"]["dit"], sd3.RULES, ()), "vae": (shapes["vae"], vae.RULES, ())}


MODEL = QwenSD35


# ------------------------------------------------------------------ sizes

VAE = vae.Config(latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                 scaling_factor=1.5305, shift_factor=0.0609)
LARGE = sd3.Config(in_channels=16, num_layers=38, attention_head_dim=64, num_attention_heads=38,
                   joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=192)
MEDIUM = dataclasses.replace(LARGE, num_layers=24, num_attention_heads=24, pos_embed_max_size=384,
                             dual_attention_layers=tuple(range(13)))
PUBLISHED = {"large": LARGE, "medium": MEDIUM}         # the drawer, for planning: UAE's, and a smaller one
USED = flow.Flow(40)                                   # how pictures are drawn, as published
IMAGE_SIZE = 1024


class Sizes(QwenSD35):
    """The published model where its folder is not: texts have lengths here, and ids that mean nothing."""
    pad = 0

    def _id(self, token):
        return 0

    def _ids(self, text):
        return [0] * 8

    def _around(self, question):
        return (0,) * 80, (0,) * 8

    def _negative(self):
        return (0,) * 40


def published(override, size=None):
    """The published model for a plan. override: fields to set; size: of PUBLISHED, None is the first."""
    if (size := size or next(iter(PUBLISHED))) not in PUBLISHED:
        raise ValueError(f"config.model.size is {size!r}; it must be one of {', '.join(PUBLISHED)}")
    fields = dict(
        ar=qwen25_vl.Config(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2, vocab_size=151936, mrope_section=(16, 24, 24), tie_word_embeddings=True,
            rms_norm_eps=1e-6, rope_theta=1e6, projected=(8192, 4096)),
        vision=qwen25_vl.VisionConfig(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=(7, 15, 23, 31)),
        dit=PUBLISHED[size], vae=VAE, flow=USED, grid=(IMAGE_SIZE // 16,) * 2, pooled=(0.0,) * 2048,
        transform=qwen25_vl.Transform(3136, 65536))
    return described.typed(Sizes, fields | dict(override, tokenizer=None))


# ------------------------------------------------------------------ the published folders

FOLDERS = {"sd3": "For UAE's pair: the folder of Stable Diffusion 3.5. Without it, `SD3` beside the captioner is read.",
           "dit": "For UAE's pair: the folder of the fine-tuned transformer. Without it, `dit` beside the captioner is "
                  "read, and where that is not there, the transformer of --sd3.",
           "processor": "For UAE's pair: the folder of the tokenizer and of preprocessor_config.json. Without it, "
                        "`llm_processor` beside the captioner is read, and where that is not there, the captioner's "
                        "folder."}


def captioner_configs(told, projected=()):
    """config.json of a Qwen2.5-VL, flat as published or with a text_config as since transformers 4.52 -> its
    qwen25_vl.Config and VisionConfig. projected: widths of UAE's projector, () where there is none."""
    text = told.a(dict, "text_config") if told.get("text_config") else told
    tower = told.a(dict, "vision_config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    text.insist(hidden_act="silu", use_sliding_window=False)
    if rope.get("rope_type", "default") not in ("default", "mrope") or "mrope_section" not in rope:
        raise ValueError(f"{text.path} says rope_scaling = {rope}; implemented is mrope with an mrope_section only")
    config = text.numbers(
        qwen25_vl.Config, mrope_section=tuple(rope["mrope_section"]), projected=tuple(projected),
        rope_theta=rope.get("rope_theta") or text["rope_theta"],
        tie_word_embeddings=told.get("tie_word_embeddings", False), rms_norm_eps=text["rms_norm_eps"])
    tower.insist(hidden_act="silu", in_chans=3, in_channels=3)
    return config, described.named(tower.path, lambda: tower.numbers(qwen25_vl.VisionConfig))


def drawer_config(told):
    """The transformer's config.json -> sd3.Config."""
    told.insist(qk_norm="rms_norm", out_channels=told["in_channels"], caption_projection_dim=(
        told.a(int, "attention_head_dim") * told.a(int, "num_attention_heads")))
    return told.numbers(sd3.Config)


def shift_of(told):
    told.insist(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, use_dynamic_shifting=False,
                invert_sigmas=False, shift_terminal=None, stochastic_sampling=False, use_beta_sigmas=False,
                use_exponential_sigmas=False, use_karras_sigmas=False)
    return float(told.a(float, "shift"))


def empty_pooled(folder):
    """The pooled vectors of the empty prompt of both text towers of a Stable Diffusion 3.5 folder, joined: a tuple.

    Begin and end of text are the last two ids of CLIP's vocabulary; what pads behind them is never read.
    """
    joined = []
    for name in ("text_encoder", "text_encoder_2"):
        told = Described(folder / name / "config.json")
        config = told.numbers(text_encoders.ClipConfig, projected=told.a(int, "projection_dim"))
        tensors = {key: file.read(key) for file in weight_files(folder / name) for key in file.specs}
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), text_encoders.from_torch(tensors, config))
        ids = np.array([[config.vocab_size - 2, config.vocab_size - 1]])
        config = dataclasses.replace(config, eos_token_id=config.vocab_size - 1)
        joined.append(jax.jit(text_encoders.ClipText(config).apply)({"params": params}, ids)[1][0])
    return tuple(float(x) for x in np.concatenate(joined))


def read_source(src, image_size=None, sd3=None, dit=None, processor=None):
    """UAE's published folders -> Source. Raises ValueError or OSError with one line about what is missing or wrong.

    src: the captioner's: config.json, safetensors with the projector. Beside it, or from elsewhere: `SD3`, the
    pipeline's folder, for VAE, scheduler and text towers; `dit`, the fine-tuned transformer; `llm_processor`, tokenizer
    and preprocessor_config.json. image_size: side in pixels of the pictures to draw.
    """
    beside = lambda name, other: src.parent / name if (src.parent / name).is_dir() else other
    pipeline = Path(sd3).absolute() if sd3 else beside("SD3", None)
    if pipeline is None or not pipeline.is_dir():
        raise FileNotFoundError(f"there is no Stable Diffusion 3.5 folder {pipeline or src.parent / 'SD3'}: pass "
                                f"--sd3=DIR")
    drawer = Path(dit).absolute() if dit else beside("dit", pipeline / "transformer")
    texts = Path(processor).absolute() if processor else beside("llm_processor", src)
    files = {"": weight_files(src), "ar/dit": weight_files(drawer), "vae": weight_files(pipeline / "vae")}
    specs = {key: spec for file in files[""] for key, spec in file.specs.items()}
    try:
        projected = tuple(specs[f"projector.{i}.weight"].shape[0] for i in (0, 2))
    except KeyError as error:
        raise ValueError(f"{src} has no key {error}: only a captioner with UAE's projector can draw") from error
    ar, vision = captioner_configs(Described(src / "config.json"), projected)
    of_vae = vae.read_config(Described(pipeline / "vae" / "config.json"))
    config, limits = drawer_config(Described(drawer / "config.json")), Described(texts / "preprocessor_config.json")
    limits.insist(image_mean=list(clip.MEAN), image_std=list(clip.STD), patch_size=vision.patch_size,
                  merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size,
                  do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, resample=3)
    step = of_vae.downscale * config.patch_size
    if image_size is None:
        image_size = min(IMAGE_SIZE, config.pos_embed_max_size * step)
    side, left = divmod(image_size, step)
    if left or side > config.pos_embed_max_size:
        raise ValueError(f"--image_size={image_size}: it must be a multiple of {step}, and at most "
                         f"{config.pos_embed_max_size * step}, what the drawer has positions for")
    umm = QwenSD35(
        ar=ar, vision=vision, dit=config, vae=of_vae, flow=USED, tokenizer=described.read_tokenizer(texts),
        grid=(side, side), transform=limits.numbers(qwen25_vl.Transform), pooled=empty_pooled(pipeline),
        shift=shift_of(Described(pipeline / "scheduler" / "scheduler_config.json")),
        layout=qwen25_vl.layout_of(specs))
    umm.check_text()
    kept, names = {}, {}
    folders = {"llm": src, "dit": drawer, "llm_processor": texts, "SD3": pipeline, "SD3/vae": pipeline / "vae",
               "SD3/scheduler": pipeline / "scheduler"}
    for name, folder in folders.items():
        kept |= {f"{name}/{file.name}": file for file in small_files(folder)}
        names |= {file.path: f"{name}/{file.path.name}" for of in files.values() for file in of
                  if file.path.parent == folder}
    return Source(umm, files, kept, names)


def read_adapters(umm, llm_lora=None, dit_lora=None, scale=2.0):
    """UAE's two published adapters -> (laid, adapter): what `laid_over` takes.

    llm_lora: the folder of the captioner's three files, a state dict of the wrapped model and no adapter of peft's;
    whatever it holds besides takes the place of the base's. Its scale is alpha / r, 64 / 32 as published, and in no
    file. dit_lora: a folder of peft's. laid: {path: array} in place of the base's; adapter: the tree of both halves,
    scaled. Raises ValueError that names keys which belong nowhere.
    """
    shapes, laid, adapter = jax.eval_shape(umm.init, jax.random.key(0)), {}, {}
    if llm_lora:
        tensors, rules = {}, qwen25_vl.RULES["published"]
        for file in map(TensorFile, sorted(Path(llm_lora).glob("*.safetensors"))):
            for name in file.specs:
                plain = name.replace("model.base_model.model.", "model.").replace(".base_layer.", ".")
                tensors[plain.replace(".default.", ".")] = file.read(name)
        if umm.ar.tie_word_embeddings and "lm_head.weight" in tensors:             # one array that has two names
            tensors.setdefault("model.embed_tokens.weight", tensors.pop("lm_head.weight"))
        halves = {f"base_model.model.{name}": x for name, x in tensors.items() if ".lora_" in name}
        adapter["llm"] = lora.scaled(_named(llm_lora, lora.from_peft, halves, shapes["ar"]["llm"], rules), scale)
        rest = {name: x for name, x in tensors.items() if ".lora_" not in name}
        trees = {"ar": {"llm": shapes["ar"]["llm"]}, "vision": shapes["vision"]}
        laid = _named(llm_lora, _placed, rest, trees, {"ar": ((r"^llm/", ""),) + rules,
                                                       "vision": qwen25_vl.VISION_RULES["published"]})
    if dit_lora:
        told = Described(Path(dit_lora) / "adapter_config.json")
        file = TensorFile(Path(dit_lora) / "adapter_model.safetensors")
        tree = _named(dit_lora, lora.from_peft, {name: file.read(name) for name in file.specs}, shapes["ar"]["dit"],
                      sd3.RULES)
        adapter["dit"] = lora.scaled(tree, told.a(float, "lora_alpha") / max(1, told.a(int, "r")))
    return laid, adapter


def _named(folder, read, *arguments):
    return described.named(folder, lambda: read(*arguments))


def _placed(tensors, shapes, rules):
    """{(path, row): array in our layout} of some of a checkpoint's tensors. ValueError names those without a place."""
    places = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        name = torch_keys.torch_name(path, rules)
        stacked = torch_keys.is_stacked(name)
        for row, key in enumerate(torch_keys.layer_names(name, leaf.shape[0] if stacked else 1)):
            places[key] = path, row if stacked else None
    if unknown := sorted(set(tensors) - set(places)):
        raise ValueError(f"unknown keys {unknown}")
    return {places[key]: torch_keys.to_flax_layout(np.asarray(x), places[key][0]) for key, x in tensors.items()}


def unlike(tower, params, pixels, originals, slip=False):
    """UAE's loss of a cold start: 1 - the mean cosine of CLIP's features of reconstructions and of originals, and the
    cosine of each pair. pixels, originals [B, H, W, 3] in [0, 1]; tower, params: clip_vision.Config and its params.

    slip: as the published code has it, the reconstructions are divided by 255 once more, so that CLIP sees them almost
    black.
    """
    def features(pixels):
        x = clip_vision.normalised(clip_vision.squared(pixels, tower.image_size))
        return clip_vision.ClipVision(tower).apply({"params": params}, x)
    alike = clip_vision.cosine(features(pixels / 255 if slip else pixels), jax.lax.stop_gradient(features(originals)))
    return 1 - jnp.mean(alike), alike


def laid_over(params, laid, adapter):
    """The params with what `read_adapters` gave: a policy."""
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for (path, row), x in laid.items():
        flat[path] = jnp.asarray(x, flat[path].dtype) if row is None else jnp.asarray(flat[path]).at[row].set(x)
    return traverse_util.unflatten_dict(flat, sep="/") | {"adapter": adapter}
