"""The one interface between models and methods, and X-Omni behind it.

A method (GvU, SFT/DPO on own judgements, UAE) is written over these calls alone, and a new model family provides
them. B images, N image tokens, L prompt words. Those that take `params` are pure and jittable.

    encode_prompts(texts)                       -> Prompts: everything the model needs to know of B texts, as arrays
    sample_image(params, prompts, key, how)     -> image_tokens [B*G, N], logps [B*G, N], a prompt's G side by side
    image_logps(params, prompts, image_tokens)  -> [B, N]              teacher-forced, differentiable
    render(params, image_tokens, prompts, key)  -> pixels [B*G, H, W, 3] float32 in [0, 1], on the 8-bit grid
    see(params, pixels)                         -> seen: what the understanding branch reads (tokens [B, r, c] here)
    text_logps(params, seen, prompts)           -> logps [B*K, L], mask [B*K, L]   one forward for K texts a picture
    sample_text(params, seen, prompts, key, how, steps) -> words [B*G, T], logps [B*G, T], mask [B*G, T]
    answer(params, seen, question, key)         -> texts
    features(params, pixels)                    -> [B, N, D] float32: what the frozen vision encoder makes of pictures

Besides these, a model says what its arrays are like: `lengths(texts)`, `grid`, `image_tokens`, `picture_size`,
`tokenizer` and `ar`, whose heads and channels a mesh divides (sharding.check).

`params` is a nested dict: "ar", "vision", "flux", "vae", "t5" and "clip" where the diffusion head reads the prompt,
and, in a policy that carries one, "adapter". Without "adapter" the same call is the reference policy, bit for bit.
"""
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct

from gvu_jax import sampling, sharding
from gvu_jax.models import flux, siglip_vq, text_encoders, vae, xomni

MOST_TOKENS = 512       # of a prompt: what the published diffusion head's T5 reads. Longer ones are refused, not cut


class Lengths(NamedTuple):
    """Padded lengths of the three parts of `Prompts`; one set for a whole run means one compilation."""
    prompt: int
    question: int
    words: int


@struct.dataclass
class Prompts:
    """B encoded texts. All ids int32, all masks bool (True = real)."""
    tokens: Any          # [B, P] prompt and image header, left-padded: what generation continues
    mask: Any            # [B, P]
    question: Any        # [B, Q] what follows the picture when the understanding branch is asked, left-padded
    question_mask: Any   # [B, Q]
    words: Any           # [B, L] the text whose probability is asked, right-padded
    words_mask: Any      # [B, L]
    t5: Any = None       # [B, X] the prompt for the diffusion head's text encoders, where it has them
    clip: Any = None     # [B, Y]

    def repeat(self, times):
        """Each row `times` times, neighbours together: the samples of a group stand side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


@dataclasses.dataclass(frozen=True, eq=False)
class XOmni:
    """X-Omni: one Qwen2 trunk with two vocabularies, a SigLIP-VQ tokenizer that reads, a FLUX head that writes.

    The same class serves the published model and the tiny one of the shapes world: only the configs differ.
    """
    ar: xomni.Config
    vision: siglip_vq.Config
    flux: flux.Config
    vae: vae.Config | vae.PatchConfig
    tokenizer: Any                                      # a transformers tokenizer with a chat template
    grid: tuple[int, int]                               # rows, columns of image tokens in a picture
    diffusion_steps: int
    diffusion_guidance: float = 1.0
    instruction: str = "Describe the image in detail."
    schedule: flux.Schedule = flux.Schedule()
    transform: siglip_vq.Transform | None = None        # how pictures of any size are fitted; None: they must fit
    t5: text_encoders.T5Config | None = None            # None: the diffusion head has no text stream
    clip: text_encoders.ClipConfig | None = None
    t5_tokenizer: Any = None
    clip_tokenizer: Any = None

    def __post_init__(self):
        if min(*self.grid, self.diffusion_steps) < 1:
            raise ValueError(f"grid {self.grid} and diffusion_steps {self.diffusion_steps} must be at least 1")

    # ---- text, on the host -------------------------------------------------------------------------------------

    @property
    def image_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def picture_size(self):
        """Height and width, in pixels, of a picture of this grid."""
        return tuple(side * self.vision.patch_size for side in self.grid)

    @property
    def image_header(self):
        return f"<SOM>{self.grid[0]} {self.grid[1]}<IMAGE>"

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.lru_cache(maxsize=4096)
    def _around(self, question, grid):
        """Ids before and after a picture's tokens when `question` is put about it, up to where the answer begins."""
        rows, cols = grid
        picture = f"<SOM>{rows} {cols}<IMAGE>{'<MM-Token-0>' * (rows * cols)}<EOM>"
        chat = [{"role": "user", "content": f"{picture}\n{question}"}]
        ids = self._ids(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        start = ids.index(self.ar.vocab_size)           # <MM-Token-0> is the first multimodal id
        return tuple(ids[:start]), tuple(ids[start + rows * cols:])

    def _encode(self, texts, questions, end):
        for i, text in enumerate(texts):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"prompt {i} is no Unicode text: {text[:40]!r}")
        words = self._ids(list(texts))
        for i, (text, ids) in enumerate(zip(texts, words)):
            if not text.strip() or not ids:
                raise ValueError(f"prompt {i} is empty: every prompt needs at least one word")
            if max(ids) >= self.ar.vocab_size:
                mark = self.tokenizer.decode(max(ids))
                raise ValueError(f"prompt {i} holds {mark}, which is a piece of a picture and no word")
        for tokenizer in filter(None, (self.tokenizer, self.t5_tokenizer, self.clip_tokenizer)):
            check_plain(tokenizer, texts, "prompt {}")
        check_plain(self.tokenizer, list(dict.fromkeys(questions)), "question {}")
        self._check_read_whole(texts, words)
        stop = [self.tokenizer.eos_token_id] if end else []
        return (self._ids([text + self.image_header for text in texts]),
                [list(self._around(question, self.grid)[1]) for question in questions],
                [ids + stop for ids in words])

    def _check_read_whole(self, texts, words):
        """ValueError for a prompt longer than what the backbone or T5 reads; what CLIP will leave out is said once."""
        readers = {"the model": words}
        if self.t5 is not None:
            readers["T5"] = self.t5_tokenizer(list(texts))["input_ids"]
            most = self.clip.max_position_embeddings
            if max(map(len, self.clip_tokenizer(list(texts))["input_ids"])) > most:
                logging.log_first_n(logging.WARNING, "a prompt is longer than the %d tokens that CLIP reads: what CLIP "
                                    "makes of it leaves the rest out, as in FLUX; T5 and the backbone do not", 1, most)
        for reader, rows in readers.items():
            for text, ids in zip(texts, rows):
                if len(ids) > MOST_TOKENS:
                    raise ValueError(f"the prompt {text[:40]!r}... has {len(ids)} tokens, but {reader} reads at most "
                                     f"{MOST_TOKENS}: shorten it")

    def lengths(self, texts, questions=None, end=False):
        """The smallest padded lengths that hold all of `texts`; of prompt and words, rounded up to a multiple of 4."""
        return lengths_of(self._encode(texts, questions or [self.instruction] * len(texts), end))

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        """B texts -> Prompts of int32 / bool numpy arrays.

        lengths: padded lengths; None takes the smallest that hold these texts. questions: what the understanding
        branch is asked, one per text (None: the instruction). end: also score the end-of-turn token (pretraining
        does; the reward does not). Raises ValueError for a text that is empty, longer than `lengths` or MOST_TOKENS, or
        that holds pieces of pictures (<MM-Token-5>, <SOM>): no text is cut.
        """
        questions = questions or [self.instruction] * len(texts)
        parts = self._encode(texts, questions, end)
        lengths = lengths or lengths_of(parts)
        arrays = []
        for rows, width, name, left in zip(parts, lengths, Lengths._fields, (True, True, False)):
            ids, mask = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int32), np.zeros(
                (len(rows), width), bool)
            for i, row in enumerate(rows):
                if len(row) > width:
                    raise ValueError(f"the {name} of {texts[i][:40]!r} has {len(row)} tokens, more than the {width} "
                                     f"this run is padded to")
                where = slice(width - len(row), None) if left else slice(0, len(row))
                ids[i, where], mask[i, where] = row, True
            arrays += [ids, mask]
        return Prompts(*arrays, *self._head_ids(texts))

    def _head_ids(self, texts):
        """What the diffusion head's text encoders read: T5 ids [B, X], CLIP ids [B, Y], or two Nones.

        Both are padded to their full length, and the padding is read as well: that is how the head was trained.
        """
        if self.t5 is None:
            return None, None
        ids = lambda tokenizer, length: tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np")["input_ids"]
        return (ids(self.t5_tokenizer, MOST_TOKENS).astype(np.int32),
                ids(self.clip_tokenizer, self.clip.max_position_embeddings).astype(np.int32))

    # ---- generation branch -------------------------------------------------------------------------------------

    def _variables(self, params):
        return {"params": params["ar"]} | ({"lora": params["adapter"]} if "adapter" in params else {})

    def sample_image(self, params, prompts, key, how, index=None):
        """Draws how.images_per_prompt pictures a prompt: codes [B*G, N] int32 and the policy's log-probs [B*G, N].

        index: [B*G] int, the place of each sample in the whole that `key` is for; None where this batch is the whole.
        """
        negative = jnp.array(self._ids(self.image_header), jnp.int32)
        backbone = sharding.constrain({name: params[name] for name in ("ar", "adapter") if name in params}, "rollout")
        return sampling.decode(
            xomni.XOmni(self.ar), self._variables(backbone), prompts.tokens, prompts.mask, key, how,
            steps=self.image_tokens, head="image_logits", offset=self.ar.vocab_size, index=index, negative=negative)

    def image_logps(self, params, prompts, image_tokens):
        """log pi(I_t | prompt, I_<t) of given pictures in one forward. image_tokens [B, N] -> [B, N] float32."""
        N = self.image_tokens
        tokens = jnp.concatenate([prompts.tokens, image_tokens[:, :-1] + self.ar.vocab_size], axis=1)  # [B, P+N-1]
        mask = jnp.pad(prompts.mask, ((0, 0), (0, N - 1)), constant_values=True)
        model, variables = xomni.XOmni(self.ar), self._variables(params)
        hidden, _ = model.apply(variables, tokens, mask)
        logits = model.apply(variables, hidden[:, -N:], method="image_logits")                      # [B, N, V]
        return gather_logps(logits, image_tokens)

    def render(self, params, image_tokens, prompts, key, index=None):
        """Image tokens [B*G, N] of B prompts -> pixels [B*G, H, W, 3] float32 in [0, 1], on the grid of 8 bits.

        index as in `sample_image`. A prompt is encoded once for its G pictures. A head without text encoders does not
        read it at all: nothing can reach the pixels then except through the tokens.
        """
        S = image_tokens.shape[0]
        siglip = siglip_vq.SiglipVQ(self.vision).apply(
            {"params": params["vision"]}, image_tokens, self.grid, method="decode")                 # [S, r, c, Z]
        noise = jax.vmap(lambda k: jax.random.normal(k, (self.image_tokens, self.flux.in_channels)))(
            sampling.sample_keys(key, jnp.arange(S) if index is None else index))                   # [S, N, C]
        if self.t5 is None:
            context = jnp.zeros((S, 1, self.flux.joint_attention_dim))
            pooled = jnp.zeros((S, self.flux.pooled_projection_dim))
            negative = context, pooled
        else:
            G = S // prompts.t5.shape[0]
            context, pooled = (jnp.repeat(x, G, axis=0) for x in self._head_text(params, prompts.t5, prompts.clip))
            negative = self._head_text(params, *self._head_ids([""]))
        velocity = functools.partial(flux.FluxTransformer(self.flux).apply, {"params": params["flux"]}, grid=self.grid)
        packed = flux.sample(velocity, noise, siglip.reshape(S, self.image_tokens, -1), context, pooled,
                             self.diffusion_steps, self.diffusion_guidance, negative, self.schedule)
        latents = vae.from_latents(flux.unpack(packed, self.grid), self.vae)                        # [S, 2r, 2c, C/4]
        dtype = jax.tree.leaves(params["vae"])[0].dtype
        raw = vae.module(self.vae).apply({"params": params["vae"]}, latents.astype(dtype), method="decode")
        return jnp.round(vae.to_pixels(raw.astype(jnp.float32)) * 255) / 255

    def _head_text(self, params, t5_ids, clip_ids):
        """-> context [B, X, .] and pooled vector [B, .] of the diffusion head."""
        context = text_encoders.T5Encoder(self.t5).apply({"params": params["t5"]}, t5_ids)
        _, pooled = text_encoders.ClipText(self.clip).apply({"params": params["clip"]}, clip_ids)
        return context, pooled

    # ---- understanding branch ----------------------------------------------------------------------------------

    def see(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> the SigLIP-VQ tokens [B, r, c] that the understanding branch reads."""
        tokens = siglip_vq.SiglipVQ(self.vision).apply({"params": params["vision"]}, pixels, method="encode")  # [B, N]
        return tokens.reshape(len(pixels), *(side // self.vision.patch_size for side in pixels.shape[1:3]))

    def _asked(self, seen, prompts):
        """The chat up to where the answer begins: ids and mask [B, C]."""
        B, *grid = seen.shape
        before = jnp.array(self._around(self.instruction, tuple(grid))[0], jnp.int32)
        before = jnp.broadcast_to(before, (B, len(before)))
        tokens = jnp.concatenate([before, seen.reshape(B, -1) + self.ar.vocab_size, prompts.question], axis=1)
        mask = jnp.pad(prompts.question_mask, ((0, 0), (tokens.shape[1] - prompts.question.shape[1], 0)),
                       constant_values=True)
        return tokens, mask

    def text_logps(self, params, seen, prompts):
        """log p(word_j | picture, question, word_<j) for all words in one forward: [B*K, L] float32, mask [B*K, L].

        seen [B, r, c]; prompts of B*K texts, the K of a picture side by side and with one question among them. Picture
        and question are read once: the K texts follow them in one row, and none of them reads another.
        """
        return gather_logps(self.text_logits(params, seen, prompts), prompts.words), prompts.words_mask

    def text_logits(self, params, seen, prompts):
        """What `text_logps` picks the words from: logits [B*K, L, V] float32 of the word at each place."""
        (S, L), B = prompts.words.shape, seen.shape[0]
        K = S // B
        if K > 1 and self.ar.sliding_window is not None:
            raise ValueError("texts of one picture cannot share a row under a sliding window: pass the picture K times")
        asked, asked_mask = self._asked(seen, jax.tree.map(lambda x: x[::K], prompts))              # [B, C]
        C = asked.shape[1]
        said, said_mask = prompts.words[:, :-1], prompts.words_mask[:, :-1]                         # [B*K, L-1]
        tokens = jnp.concatenate([asked, said.reshape(B, -1)], axis=1)                              # [B, C+K(L-1)]
        mask = jnp.concatenate([asked_mask, said_mask.reshape(B, -1)], axis=1)
        if K > 1:
            text = jnp.concatenate([jnp.full(C, -1), jnp.repeat(jnp.arange(K), L - 1)])             # -1: read by all
            mask = mask[:, None, :] & ((text[None, :] == -1) | (text[:, None] == text[None, :]))    # [B, T, T]
        counted = jnp.concatenate([jnp.repeat(asked_mask, K, axis=0), said_mask], axis=1)           # [B*K, C+L-1]
        positions = count_positions(counted)
        positions = jnp.concatenate([positions[::K, :C], positions[:, C:].reshape(B, -1)], axis=1)
        model, variables = xomni.XOmni(self.ar), self._variables(params)
        hidden, _ = model.apply(variables, tokens, mask, positions=positions, text_only=True)
        ends = jnp.repeat(hidden[:, C - 1:C], K, axis=0)                      # each text's first word is said from here
        hidden = jnp.concatenate([ends, hidden[:, C:].reshape(S, L - 1, -1)], axis=1)               # [B*K, L, D]
        return model.apply(variables, hidden, method="text_logits")                                 # [B*K, L, V]

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        """Draws how.images_per_prompt answers to the question of each picture seen [B, r, c], which is read once.

        prompts: B rows, of which only the question is read. Returns words [B*G, T] int32, the policy's log-probs
        [B*G, T] float32 and mask [B*G, T] bool, T = steps: True up to and including the end of turn, from where on
        words repeat it at log-probability 0; a row that has not come to its end by then counts whole. As `words` and
        `words_mask` of prompts they are what `text_logps` takes. index as in `sample_image`; how's guidance is for
        pictures and not applied.
        """
        asked, mask = self._asked(seen, prompts)
        backbone = sharding.constrain({name: params[name] for name in ("ar", "adapter") if name in params}, "rollout")
        end, how = self.tokenizer.eos_token_id, dataclasses.replace(how, guidance=1.0)
        words, logps = sampling.decode(
            xomni.XOmni(self.ar), self._variables(backbone), asked, mask, key, how, steps=steps, head="text_logits",
            offset=0, index=index, stop=end)
        ended = jnp.cumsum(words == end, axis=1) - (words == end)                       # [B*G, T]: how often, before
        return words, logps, ended == 0

    def answer(self, params, seen, question, key, max_words=32, how=sampling.How(temperature=0.0)):
        """Answers one question about each picture seen [B, r, c]. Returns B strings (what precedes the end of turn)."""
        prompts = self.encode_prompts(["-"] * len(seen), questions=[question] * len(seen))
        words, _, _ = self._sample_text(params, seen, prompts, key, how, max_words)
        return self.tokenizer.batch_decode(np.asarray(words), skip_special_tokens=True)

    _sample_text = jax.jit(sample_text, static_argnums=(0, 5, 6))

    def features(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> [B, N, D] float32: the vision encoder's output, before quantisation."""
        return siglip_vq.SiglipVQ(self.vision).apply(
            {"params": params["vision"]}, pixels, method="features").astype(jnp.float32)


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer):
    """{id: token} of those that steer a model and that no text may spell: whatever the tokenizer has as special, and
    what else was added to it in brackets, such as <tool_call>. Added letters and runs of blanks are text."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content)}


def check_plain(tokenizer, texts, name):
    """Raises ValueError where a text would become a control token; name: what to call text number {}.

    The unknown token is what a tokenizer makes of any strange word: only who writes it out is refused.
    """
    control, unknown = control_tokens(tokenizer), tokenizer.unk_token_id
    for i, (text, ids) in enumerate(zip(texts, tokenizer(list(texts), add_special_tokens=False)["input_ids"])):
        spelled = [control[id] for id in ids
                   if id in control and (id != unknown or control[id].lower() in text.lower())]
        if spelled:
            raise ValueError(f"{name.format(i)} ({text[:40]!r}) holds {spelled[0]}, which steers the model and is no "
                             f"text: leave it out, or write it otherwise")


def count_positions(mask):
    """Positions that count real tokens only; equal to 0..T-1 where nothing is padded. [B, T] bool -> int."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def lengths_of(parts):
    """The Lengths that hold ids of prompts, questions and words: lists of rows."""
    up = lambda n: -(-n // 4) * 4
    return Lengths(*(max(map(len, part)) if i == 1 else up(max(map(len, part))) for i, part in enumerate(parts)))


def gather_logps(logits, ids):
    """log-softmax of logits [B, T, V] float32 at ids [B, T] -> [B, T]."""
    return jnp.take_along_axis(logits, ids[:, :, None], axis=-1)[:, :, 0] - jax.nn.logsumexp(logits, axis=-1)


class Programs(NamedTuple):
    """The compiled calls that sampling, evaluation and every method share; each compiles once per set of shapes.

    Samples are drawn and read in waves, one after the other, where all at once would not fit into memory.
    """
    sample: Any          # (params, prompts [B], key)            -> image_tokens [B*G, N], logps [B*G, N]
    render: Any          # (params, image_tokens [S], prompts [B], key) -> pixels [S, H, W, 3]
    see: Any             # (params, pixels)                      -> seen
    read: Any            # (params, seen, prompts [S])           -> logps [S, L], mask [S, L]
    say: Any             # (params, seen [B], prompts [B], key)  -> words [B*G, T], logps [B*G, T], mask [B*G, T]


@functools.lru_cache(maxsize=16)                 # who asks again for the same gets the same, compiled already
def compile_programs(umm, how, mesh, waves=1, words=32):
    """The interface on a mesh, for one way of sampling. The rows of a call are a multiple of waves x data x fsdp, or
    there is one wave. words: how long `say` lets an answer be."""
    def in_waves(function, *batch):
        parts = sharding.split_rows(batch, waves)
        return sharding.join_rows(jax.lax.map(lambda part: function(*part), parts)) if waves > 1 else function(*batch)

    def places(prompts, times):                                                         # [B, G]: of the B*G samples
        rows = prompts.tokens.shape[0]
        return jnp.arange(rows * times).reshape(rows, times)

    def sample(params, prompts, key):
        draw = lambda prompts, place: umm.sample_image(params, prompts, key, how, place.ravel())
        return in_waves(draw, prompts, places(prompts, how.images_per_prompt))

    def render(params, image_tokens, prompts, key):
        paint = lambda tokens, prompts, place: umm.render(params, tokens, prompts, key, place.ravel())
        return in_waves(paint, image_tokens, prompts, places(prompts, len(image_tokens) // len(prompts.tokens)))

    def see(params, pixels):
        return in_waves(lambda pixels: umm.see(params, pixels), pixels)

    def read(params, seen, prompts):
        return in_waves(lambda seen, prompts: umm.text_logps(params, seen, prompts), seen, prompts)

    def say(params, seen, prompts, key):
        answer = lambda seen, prompts, place: umm.sample_text(params, seen, prompts, key, how, words, place.ravel())
        return in_waves(answer, seen, prompts, places(prompts, how.images_per_prompt))

    return Programs(*(sharding.Program(function, mesh) for function in (sample, render, see, read, say)))
