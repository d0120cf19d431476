"""The one interface between methods and families of models. It names no family.

A method (GvU, SFT/DPO on own judgements, UAE) is written over these calls alone, and a family (families/NAME.py)
provides them. B prompts, G pictures of each, S = B * G, a prompt's side by side; L words. A picture is a chain of T
decisions, and what a policy drew is its family's own pytree, **drawn** [S, ..]: methods keep it, cut it into
micro-batches, hand it back, and never look inside. All that take `params` are pure and jittable.

    encode_prompts(texts)                       -> Prompts: everything the model needs to know of B texts, as arrays
    sample_image(params, prompts, key, how)     -> drawn [S, ..], logps [S, T]
    image_logps(params, prompts, drawn, how)    -> logps [S, T]    teacher-forced, differentiable; equals the sampler's,
                                                                   unless how.logps asks for another policy's
    image_logps(.., key=key)                    -> [S, T']         of pictures by whomever: the same where it is exact
                                                                   (next token), else terms of which only the sum over
                                                                   T' means something, an estimate, whose masks or noise
                                                                   come from the key: the same for the same key
    image_target(params, pixels)                -> target [B, ..]  outside pictures as something to learn to draw
    image_nll(params, prompts, target, key)     -> [B, T']         what supervised training descends: its mean over the
                                                                   batch, and only that. Nats a code (next token: exact;
                                                                   masks: [B, N + 2], scaled so that the mean is that
                                                                   of what is masked), or a flow's mean square error
                                                                   [B, 1]. What was drawn is a target as well
    render(params, drawn, prompts, key)         -> pixels [S, H, W, 3] float32 in [0, 1], on the 8-bit grid
    see(params, pixels)                         -> seen [B, ..]: a pytree of what the understanding branch reads
    seen_of(drawn)                              -> seen, or None where reading and drawing do not share their tokens
    picture_of(drawn)                           -> [S, ..], what of it is the picture itself and not how it came about:
                                                   where that is equal, the same was drawn twice
    text_logps(params, seen, prompts)           -> logps [B*K, L], mask [B*K, L]   one forward for K texts a picture
    text_logits(params, seen, prompts)          -> [B*K, L, V], what the words are picked from
    sample_text(params, seen, prompts, key, how, steps) -> words [S, L], logps [S, L], mask [S, L]
    answer(params, seen, question, key)         -> texts
    features(params, pixels)                    -> [B, N, D] float32: what the frozen vision encoder makes of pictures
    fit(image)                                  -> pixels: how a picture of any size is brought to this model, and
    fitted_size((h, w))                         -> (H, W), or a ValueError that says why it cannot be read

A family that draws by a flow has image_moves(params, prompts, drawn, how) -> flow.Moves (flow.py) and may have
reconstruction(params, seen, prompts, key, how) -> pixels that captions of the pictures seen give, which can be
differentiated through the drawing. One whose captioner and drawer are networks of their own has `halves`, {"caption" |
"draw": regex of the backbone's paths}.
`exact_likelihood` says whether `image_logps` with a key and `image_nll` are log p(picture) itself; where they are
estimates or bounds, no KL and no entropy follows from them. `int8` names what of config.rollout can be int8 when it
draws, "weights" and "cache", the keys and values of what it draws token by token.

Besides these, a model says what its arrays are like: `kind`, its name in families/__init__.py, which model folders
write down; `of_shapes`, whether it is a model of the shapes world, whose suites then need no files; `lengths(texts)`,
`prompt_shapes`, `drawn_shapes`, `grid`, `picture_size`, `tokenizer`, `instruction`, `said(text)`, the characters whose
ids are a text's `words`; `guidance`, what pictures are drawn with unless told; `init(key)`, `check_parts()` and
`check_text()`; `ar`, the config of the backbone, whose heads and channels a mesh divides; `partition` (part of the
params -> table, see sharding.py); `trains` (what config.trains names -> regex of the backbone's paths); and how its
parameters are called in the published folder (`adapter_rules`, `published_parts`), which the class `loads` of
transformers reads, if one does.

`params` is a nested dict: "ar", the backbone that is trained, other parts by names of the family's own, and, in a
policy that carries one, "adapter". Without "adapter" the same call is the reference policy, bit for bit.
"""
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gvu_jax import sharding


class Lengths(NamedTuple):
    """Padded lengths of the three parts of `Prompts`; one set for a whole run means one compilation."""
    prompt: int
    question: int
    words: int


@struct.dataclass
class Prompts:
    """B encoded texts. All ids int32, all masks bool (True = real)."""
    tokens: Any          # [B, P] prompt and image header, left-padded: what generation continues. Right-padded where a
                         # picture does not continue the row but is drawn from its hidden states
    mask: Any            # [B, P]
    question: Any        # [B, Q] what the understanding branch is asked about the picture, left-padded
    question_mask: Any   # [B, Q]
    words: Any           # [B, L] the text whose probability is asked, right-padded
    words_mask: Any      # [B, L]
    head: Any = ()       # [B, ..] ids for the part that renders, where it reads the prompt by itself

    def repeat(self, times):
        """Each row `times` times, neighbours together: the samples of a group stand side by side."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


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


def check_texts(texts):
    """ValueError for a text that no tokenizer takes."""
    for i, text in enumerate(texts):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"prompt {i} is no Unicode text: {text[:40]!r}")
        if not text.strip():
            raise ValueError(f"prompt {i} is empty: every prompt needs at least one word")


def ids_of_words(umm, texts, questions, most):
    """The ids of B texts as answers to `questions`, lists of rows. Raises ValueError for a text that is empty, is no
    Unicode, or has more than `most` tokens, and for one, or a question, that would steer the model."""
    check_texts(texts)
    check_plain(umm.tokenizer, texts, "prompt {}")
    check_plain(umm.tokenizer, list(dict.fromkeys(questions)), "question {}")
    words = umm.tokenizer([umm.said(text) for text in texts], add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, words):
        if len(ids) > most:
            raise ValueError(f"the prompt {text[:40]!r}... has {len(ids)} tokens, but the model reads at most {most}: "
                             f"shorten it")
    return words


def pad_prompts(texts, parts, lengths, pad, head=(), left=(True, True, False)):
    """Prompts of int32 / bool numpy arrays from the ids of B texts: prompts, questions and words, lists of rows.

    left: which of the three are padded at their beginning. lengths: padded lengths; None takes the smallest that hold
    these texts. ValueError for a text that is longer.
    """
    arrays = []
    for rows, width, name, before in zip(parts, lengths or lengths_of(parts), Lengths._fields, left):
        ids, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            if len(row) > width:
                raise ValueError(f"the {name} of {texts[i][:40]!r} has {len(row)} tokens, more than the {width} this "
                                 f"run is padded to")
            where = slice(width - len(row), None) if before else slice(0, len(row))
            ids[i, where], mask[i, where] = row, True
        arrays += [ids, mask]
    return Prompts(*arrays, head)


def prompt_shapes(B, lengths, head=()):
    """The shapes of B encoded texts of these padded lengths, Prompts of jax.ShapeDtypeStruct. head: its widths."""
    arrays = [jax.ShapeDtypeStruct((B, length), dtype) for length in lengths for dtype in (jnp.int32, bool)]
    return Prompts(*arrays, tuple(jax.ShapeDtypeStruct((B, length), jnp.int32) for length in head))


def hidden_of_words(run, asked, asked_mask, prompts):
    """What the head for text reads at each word of B*K texts, the K about a picture side by side: [B*K, L, D].

    asked, asked_mask [B, C]: the chat about each picture up to where the answer begins. It is read once: the K texts
    follow it in one row, and none of them reads another. run(tokens, mask, positions) -> hidden [B, T, D].
    """
    (S, L), (B, C) = prompts.words.shape, asked.shape
    K = S // B
    said, said_mask = prompts.words[:, :-1], prompts.words_mask[:, :-1]                             # [B*K, L-1]
    tokens = jnp.concatenate([asked, said.reshape(B, -1)], axis=1)                                  # [B, C+K(L-1)]
    mask = jnp.concatenate([asked_mask, said_mask.reshape(B, -1)], axis=1)
    if K > 1:
        text = jnp.concatenate([jnp.full(C, -1), jnp.repeat(jnp.arange(K), L - 1)])                 # -1: read by all
        mask = mask[:, None, :] & ((text[None, :] == -1) | (text[:, None] == text[None, :]))        # [B, T, T]
    counted = jnp.concatenate([jnp.repeat(asked_mask, K, axis=0), said_mask], axis=1)               # [B*K, C+L-1]
    positions = count_positions(counted)
    positions = jnp.concatenate([positions[::K, :C], positions[:, C:].reshape(B, -1)], axis=1)
    hidden = run(tokens, mask, positions)
    ends = jnp.repeat(hidden[:, C - 1:C], K, axis=0)                          # each text's first word is said from here
    return jnp.concatenate([ends, hidden[:, C:].reshape(S, L - 1, -1)], axis=1)                     # [B*K, L, D]


def until_end(words, end):
    """Which words [.., T] count: those up to and including the first that is `end`. Bool [.., T]."""
    return jnp.cumsum(words == end, axis=-1) - (words == end) == 0


def gather_logps(logits, ids):
    """log-softmax of logits [B, T, V] float32 at ids [B, T] -> [B, T]."""
    return jnp.take_along_axis(logits, ids[:, :, None], axis=-1)[:, :, 0] - jax.nn.logsumexp(logits, axis=-1)


def check_rollout(umm, how):
    """ValueError where `how` rounds what this family, or a model of it, cannot draw with rounded."""
    for name in ("weights", "cache"):
        if getattr(how, name) == "int8" and name not in umm.int8:
            why = "do not draw pictures token by token" if umm.int8 else "draw by a flow"
            raise ValueError(f"rollout.{name} = 'int8' is not for models of kind {umm.kind!r}, which {why}: set "
                             f"rollout.{name} = 'full'")


def in_use(umm, how):
    """How a policy that trains by `how` is evaluated: itself and not rounded, and by a flow through all of the family's
    own steps, without the noise and the shortness that training wants. Guidance and filters stay training's."""
    by_flow = {"flow": None} if hasattr(umm, "image_moves") else {}
    return dataclasses.replace(how, weights="full", cache="full", **by_flow)


def check_shared(umm, setting):
    """ValueError where a setting reads what was drawn as it is, and the family cannot."""
    if jax.eval_shape(umm.seen_of, umm.drawn_shapes(1)) is None:
        raise ValueError(f"{setting} reads what was drawn without rendering it, but a model of kind {umm.kind!r} reads "
                         f"other things than it draws: leave that out")


class Programs(NamedTuple):
    """The compiled calls that sampling, evaluation and every method share; each compiles once per set of shapes.

    Samples are drawn and read in waves, one after the other, where all at once would not fit into memory.
    """
    sample: Any          # (params, prompts [B], key)            -> drawn [S, ..], logps [S, T]
    render: Any          # (params, drawn [S], prompts [B], key) -> pixels [S, H, W, 3]
    see: Any             # (params, pixels)                      -> seen
    learn: Any           # (params, pixels)                      -> seen and target, of pictures from outside
    read: Any            # (params, seen, prompts [S])           -> logps [S, L], mask [S, L]
    say: Any             # (params, seen [B], prompts [B], key)  -> words [S, L], logps [S, L], mask [S, L]


@functools.lru_cache(maxsize=16)                 # who asks again for the same gets the same, compiled already
def compile_programs(umm, how, mesh, waves=1, words=32):
    """The interface on a mesh, for one way of sampling. The rows of a call are a multiple of waves x data x fsdp, or
    there is one wave. words: how long `say` lets an answer be. ValueError for a way that the family does not have."""
    check_rollout(umm, how)
    in_waves = functools.partial(sharding.in_waves, waves=waves)

    def places(prompts, times):                                                         # [B, G]: of the B*G samples
        rows = prompts.tokens.shape[0]
        return jnp.arange(rows * times).reshape(rows, times)

    def sample(params, prompts, key):
        draw = lambda prompts, place: umm.sample_image(params, prompts, key, how, place.ravel())
        return in_waves(draw, prompts, places(prompts, how.images_per_prompt))

    def render(params, drawn, prompts, key):
        paint = lambda drawn, prompts, place: umm.render(params, drawn, prompts, key, place.ravel())
        samples = jax.tree.leaves(drawn)[0].shape[0]
        return in_waves(paint, drawn, prompts, places(prompts, samples // len(prompts.tokens)))

    def see(params, pixels):
        return in_waves(lambda pixels: umm.see(params, pixels), pixels)

    def learn(params, pixels):
        return in_waves(lambda pixels: (umm.see(params, pixels), umm.image_target(params, pixels)), pixels)

    def read(params, seen, prompts):
        return in_waves(lambda seen, prompts: umm.text_logps(params, seen, prompts), seen, prompts)

    def say(params, seen, prompts, key):
        answer = lambda seen, prompts, place: umm.sample_text(params, seen, prompts, key, how, words, place.ravel())
        return in_waves(answer, seen, prompts, places(prompts, how.images_per_prompt))

    return Programs(*(sharding.Program(function, mesh) for function in (sample, render, see, learn, read, say)))
