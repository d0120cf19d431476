"""X-Omni (Geng et al. 2025): one Qwen2 trunk that reads and draws the same tokens, and a FLUX head that paints them.

Top to bottom: the model behind the interface of umm.py, its published sizes, and how its published folder is read.
"""
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from gvu_jax import described, rollout, sampling
from gvu_jax.described import Described
from gvu_jax.models import flux, siglip_vq, text_encoders, vae, xomni
from gvu_jax.tensor_files import Source, TensorFile, small_files, weight_files
from gvu_jax.umm import (
    Lengths, check_plain, check_texts, gather_logps, hidden_of_words, lengths_of, pad_prompts, prompt_shapes, until_end)

MOST_TOKENS = 512       # of a prompt: what the published diffusion head's T5 reads. Longer ones are refused, not cut


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

    kind = "xomni"
    int8 = ("weights", "cache")
    exact_likelihood = True
    loads = "AutoModelForCausalLM"                      # the class of transformers that reads the published folder
    guidance = 1.0                                      # of the backbone; the head that paints has its own
    # What of the backbone a run may train; "projector": image tokens on their way in and out.
    trains = xomni.TRAINS
    partition = {"ar": xomni.PARTITION, "adapter": xomni.PARTITION, "vision": siglip_vq.PARTITION,
                 "flux": flux.PARTITION, "vae": vae.PARTITION, "t5": text_encoders.PARTITION,
                 "clip": text_encoders.PARTITION}

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

    @property
    def _stop(self):
        """Id of what ends a turn."""
        return self.tokenizer.eos_token_id

    def said(self, text):
        """A text as an answer: what its words' ids are of."""
        return text

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
        check_texts(texts)
        words = self._ids(list(texts))
        for i, ids in enumerate(words):
            if not ids:
                raise ValueError(f"prompt {i} is empty: every prompt needs at least one word")
            if max(ids) >= self.ar.vocab_size:
                mark = self.tokenizer.decode(max(ids))
                raise ValueError(f"prompt {i} holds {mark}, which is a piece of a picture and no word")
        for tokenizer in filter(None, (self.tokenizer, self.t5_tokenizer, self.clip_tokenizer)):
            check_plain(tokenizer, texts, "prompt {}")
        check_plain(self.tokenizer, list(dict.fromkeys(questions)), "question {}")
        self._check_read_whole(texts, words)
        stop = [self._stop] if end else []
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
        return pad_prompts(texts, parts, lengths, self.tokenizer.pad_token_id, self._head_ids(texts))

    def prompt_shapes(self, B, prompt, words, asked=0):
        """The shapes of B encoded texts of these padded lengths, Prompts of jax.ShapeDtypeStruct; asked: by how many
        tokens their questions are longer than the instruction."""
        question = len(self._around(self.instruction, self.grid)[1]) + asked
        head = () if self.t5 is None else (MOST_TOKENS, self.clip.max_position_embeddings)
        return prompt_shapes(B, Lengths(prompt, question, words), head)

    def _head_ids(self, texts):
        """What the diffusion head's text encoders read: (T5 ids [B, X], CLIP ids [B, Y]), or () without them.

        Both are padded to their full length, and the padding is read as well: that is how the head was trained.
        """
        if self.t5 is None:
            return ()
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
        backbone = rollout.backbone(self.partition, params, how)
        return sampling.decode(
            xomni.XOmni(self.ar), self._variables(backbone), prompts.tokens, prompts.mask, key, how,
            steps=self.image_tokens, head="image_logits", offset=self.ar.vocab_size, index=index, negative=negative)

    def drawn_shapes(self, S):
        """The shape of S pictures as a policy draws them: image tokens [S, N] int32."""
        return jax.ShapeDtypeStruct((S, self.image_tokens), jnp.int32)

    def image_logps(self, params, prompts, image_tokens, how=sampling.How(), key=None):
        """log pi(I_t | prompt, I_<t) of given pictures in one forward, with guidance in two. image_tokens [B, N] ->
        [B, N] float32."""
        B, N = image_tokens.shape
        model, variables = xomni.XOmni(self.ar), self._variables(params)

        def logits(context, mask):                                                       # [B, P] -> [B, N, V]
            tokens = jnp.concatenate([context, image_tokens[:, :-1] + self.ar.vocab_size], axis=1)  # [B, P+N-1]
            mask = jnp.pad(mask, ((0, 0), (0, N - 1)), constant_values=True)
            hidden, _ = model.apply(variables, tokens, mask)
            return model.apply(variables, hidden[:, -N:], method="image_logits")

        def without():
            header = jnp.array(self._ids(self.image_header), jnp.int32)
            header = jnp.broadcast_to(header, (B, len(header)))
            return logits(header, jnp.ones_like(header, bool))

        return gather_logps(sampling.policy_logits(how, logits(prompts.tokens, prompts.mask), without), image_tokens)

    def image_target(self, params, pixels):
        """Outside pictures as something to learn to draw: the tokens [B, N] that the understanding branch reads."""
        return self.see(params, pixels).reshape(len(pixels), -1)

    def image_nll(self, params, prompts, target, key=None):
        """Nats of each decision of a target, [B, N] float32; exact, so that the key is not used."""
        return -self.image_logps(params, prompts, target)

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
            G = S // len(prompts.head[0])
            context, pooled = (jnp.repeat(x, G, axis=0) for x in self._head_text(params, *prompts.head))
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
        _, pooled, _ = text_encoders.ClipText(self.clip).apply({"params": params["clip"]}, clip_ids)
        return context, pooled

    # ---- understanding branch ----------------------------------------------------------------------------------

    def see(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> the SigLIP-VQ tokens [B, r, c] that the understanding branch reads."""
        tokens = siglip_vq.SiglipVQ(self.vision).apply({"params": params["vision"]}, pixels, method="encode")  # [B, N]
        return tokens.reshape(len(pixels), *(side // self.vision.patch_size for side in pixels.shape[1:3]))

    def seen_of(self, image_tokens):
        """Drawn tokens [B, N] as the understanding branch reads them, [B, r, c]: both branches have the same."""
        return image_tokens.reshape(-1, *self.grid)

    def picture_of(self, image_tokens):
        """What was drawn without the way there: itself."""
        return image_tokens

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
        K = len(prompts.words) // len(seen)
        if K > 1 and self.ar.sliding_window is not None:
            raise ValueError("texts of one picture cannot share a row under a sliding window: pass the picture K times")
        asked, asked_mask = self._asked(seen, jax.tree.map(lambda x: x[::K], prompts))              # [B, C]
        model, variables = xomni.XOmni(self.ar), self._variables(params)
        run = lambda tokens, mask, positions: model.apply(
            variables, tokens, mask, positions=positions, text_only=True)[0]
        hidden = hidden_of_words(run, asked, asked_mask, prompts)                                   # [B*K, L, D]
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
        backbone = rollout.backbone(self.partition, params, how)
        end, how = self._stop, dataclasses.replace(how, guidance=1.0)
        words, logps = sampling.decode(
            xomni.XOmni(self.ar), self._variables(backbone), asked, mask, key, how, steps=steps, head="text_logits",
            offset=0, index=index, stop=end)
        return words, logps, until_end(words, end)

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

    # ---- pictures of any size, on the host ---------------------------------------------------------------------

    def fitted_size(self, size):
        """(height, width) to which a picture of this (height, width) is brought. ValueError where it cannot be read."""
        if self.transform is not None:
            return siglip_vq.fitted_size(*size[::-1], self.transform)
        height, width = self.picture_size
        if tuple(size) != (height, width):
            raise ValueError(f"a picture of {' x '.join(map(str, size))} pixels given; this model reads {height} x "
                             f"{width} pixels (height x width) in RGB")
        return height, width

    def fit(self, image):
        """A picture, uint8 or float in [0, 1], [h, w, 3] -> float32 [H, W, 3] in [0, 1], which `see` takes. Without a
        transform it must fit."""
        image = np.asarray(image)
        if self.transform is not None:
            image = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
            return siglip_vq.fit_image(Image.fromarray(image), self.transform)
        self.fitted_size(image.shape[:2])
        if image.shape[2:] != (3,):
            raise ValueError(f"a picture of shape {image.shape} given; this model reads RGB, [H, W, 3]")
        return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image

    @property
    def of_shapes(self):
        """Whether this is a model of the shapes world."""
        return isinstance(self.vae, vae.PatchConfig)

    # ---- parameters --------------------------------------------------------------------------------------------

    def init(self, key):
        """Random parameters of all parts; under jax.eval_shape, their shapes."""
        keys = jax.random.split(key, 6)
        params = {"ar": xomni.init(self.ar, keys[0]), "vision": siglip_vq.init(self.vision, keys[1]),
                  "flux": flux.init(self.flux, keys[2]), "vae": vae.init(self.vae, keys[3])}
        if self.t5 is not None:
            params |= {"t5": text_encoders.init(self.t5, keys[4]), "clip": text_encoders.init(self.clip, keys[5])}
        return params

    def check_parts(self):
        """ValueError where the sizes of two parts do not fit."""
        fits = {"codes of backbone and image tokenizer": (self.ar.image_vocab_size, self.vision.codebook_size),
                "channels of image tokenizer and decoder": (self.vision.z_channels, self.flux.siglip_channels),
                "channels of VAE and decoder": (4 * self.vae.latent_channels, self.flux.in_channels)}
        if self.t5 is not None:
            fits |= {"widths of T5 and decoder": (self.t5.d_model, self.flux.joint_attention_dim),
                     "widths of CLIP and decoder": (self.clip.hidden_size, self.flux.pooled_projection_dim)}
        for what, (one, other) in fits.items():
            if one != other:
                raise ValueError(f"the {what} differ: {one} and {other}")

    def check_text(self, specials=()):
        """ValueError unless the tokenizers are there and speak of pictures as the backbone does."""
        def insist(token, low, high):
            at = self.tokenizer.convert_tokens_to_ids(token)
            if token not in self.tokenizer.get_vocab() or not low <= at < high:
                raise ValueError(f"the tokenizer has no token {token} with an id from {low} to {high - 1}")
        V, codes = self.ar.vocab_size, self.ar.image_vocab_size
        insist("<MM-Token-0>", V, V + 1)
        insist(f"<MM-Token-{codes - 1}>", V + codes - 1, V + codes)
        for token in {"<SOM>", "<EOM>", "<IMAGE>", *specials}:
            insist(token, V + codes, V + self.ar.mm_vocab_size)
        for what in ("chat_template", "eos_token", "pad_token"):
            if getattr(self.tokenizer, what) is None:
                raise ValueError(f"the tokenizer has no {what}")
        for part in ("t5", "clip"):
            if getattr(self, part) is not None and getattr(self, f"{part}_tokenizer") is None:
                raise ValueError(f"there is no {part}_tokenizer")
        try:
            self._around(self.instruction, self.grid)
        except Exception as error:                       # a template is a program, which jinja2 fences in; it may fail
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"its chat template cannot be used: {reason}") from error

    # ---- names in the published folder -------------------------------------------------------------------------

    @property
    def adapter_rules(self):
        """How the parameters of the backbone are called in a checkpoint, and so in peft's adapters (see torch_keys)."""
        return xomni.rules(self.ar)

    def published_parts(self, shapes, found):
        """{part: (parameters, rules, keys to ignore)} of the published files, see torch_keys.places. shapes: of the
        params; found: {part: {key: shape}}."""
        vision = dict(shapes["vision"])
        vit, texts = vision.pop("vit"), {"t5": self.t5, "clip": self.clip}
        return {"ar": (shapes["ar"], xomni.rules(self.ar), ()), "vision": (vision, siglip_vq.RULES, ()),
                "flux": (shapes["flux"], flux.RULES, ()), "vae": (shapes["vae"], vae.RULES, ()),
                **{part: (shapes[part], text_encoders.rules(config, found[part]),
                          text_encoders.IGNORED[type(config)]) for part, config in texts.items()},
                "vision/vit": (vit, siglip_vq.RULES, ("norm.weight", "norm.bias"))}


MODEL = XOmni


# ------------------------------------------------------------------ sizes

# The published model in numbers, for planning and for tests at full size where its weights are not. The backbone is
# Qwen2.5-7B with four layers before and four after its 28; the pictures' side is a giant SigLIP with 16384 codes and
# FLUX.1-dev: transformer, autoencoder, T5-XXL and CLIP-L. A converted checkpoint says all this itself.
PUBLISHED = dict(                                                            # fields of XOmni
    ar=xomni.Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=36, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, mm_vocab_size=16448, image_vocab_size=16384, num_mm_adap_layers=4, num_mm_head_layers=4),
    vision=siglip_vq.Config(
        width=1536, layers=40, heads=16, mlp_hidden=6144, patch_size=16, pos_table_side=24, codebook_size=16384,
        codebook_dim=2048, z_channels=1536),
    flux=flux.Config(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        siglip_channels=1536),
    vae=vae.Config(
        latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159),
    t5=text_encoders.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu"),
    clip=text_encoders.ClipConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    diffusion_steps=28, diffusion_guidance=2.5)                              # guided: two forwards a step


class Sizes(XOmni):
    """The published model where its folder is not: texts have lengths here, and ids that mean nothing."""
    _stop = 0

    def _ids(self, text):
        return [0] * 8

    def _around(self, question, grid):
        return (0,) * 24, (0,) * 16

    def _head_ids(self, texts):
        return (np.zeros((len(texts), MOST_TOKENS), np.int32),
                np.zeros((len(texts), self.clip.max_position_embeddings), np.int32))


def published(override, size=None):
    """The published model for a plan. override: fields to set, `grid` among them. size: there is one only."""
    return described.typed(Sizes, PUBLISHED | dict(override, tokenizer=None))


# ------------------------------------------------------------------ the published folder

FOLDERS = {"flux": "A FLUX.1-dev folder, or hf:OWNER/NAME; default: `base` beside the decoder transformer, for "
                   "--src=hf:.. hf:black-forest-labs/FLUX.1-dev."}                              # from elsewhere
FROM_HUB = {"flux": ("hf:black-forest-labs/FLUX.1-dev", (
    "vae/*", "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*", "scheduler/*"))}
IMAGE_SIZE = 576                                       # what X-Omni and GvU draw
HEADS = {"so400m": 16, "giant": 16}                    # of the published SigLIP towers, whose names contain these


def ar_config(described):
    """config.json -> xomni.Config."""
    head_dim = described.a(int, "hidden_size") // max(1, described.a(int, "num_attention_heads"))
    described.insist(hidden_act="silu", rope_scaling=None, tie_word_embeddings=False, head_dim=head_dim)
    windowed = described["use_sliding_window"]
    return described.numbers(
        xomni.Config, rms_norm_eps=described["rms_norm_eps"], rope_theta=described["rope_theta"],
        sliding_window=described["sliding_window"] if windowed else None,
        max_window_layers=described["max_window_layers"] if windowed else 0)


def vision_config(encoder, transform, folder, vit, projector):
    """siglip_vq.Config from the tensors' shapes ({name: Spec} of both files); only the number of heads is not there."""
    encoder.insist(with_norm=True)
    try:
        width, _, patch, _ = vit["patch_embed.proj.weight"].shape
        side = math.isqrt(vit["pos_embed"].shape[1])
        layers = 1 + max(int(name.split(".")[1]) for name in vit if name.startswith("blocks."))
        config = siglip_vq.Config(
            width=width, layers=layers, heads=_heads(encoder, folder), patch_size=patch,
            mlp_hidden=vit["blocks.0.mlp.fc1.weight"].shape[0], pos_table_side=side,
            codebook_size=projector["quantize.embedding.weight"].shape[0],
            codebook_dim=projector["quantize.embedding.weight"].shape[1],
            z_channels=projector["post_quant_conv.weight"].shape[0], **_groups(folder))
    except (KeyError, IndexError) as error:
        raise ValueError(f"the image tokenizer's files have no key {error}") from error
    for name in ("codebook_size", "codebook_dim", "z_channels"):
        if encoder[name] != getattr(config, name):
            raise ValueError(f"{encoder.path} says {name} = {encoder[name]}, its tensors {getattr(config, name)}")
    if transform["patch_size"] != patch:
        raise ValueError(f"{transform.path} says patch_size = {transform['patch_size']}, the tensors {patch}")
    return config


def _groups(folder):
    beside = folder / "config.json"
    groups = Described(beside).get("groupnorm_groups") if beside.is_file() else None
    return {"groups": groups} if groups else {}


def _heads(encoder, folder):
    if (folder / "config.json").is_file():
        described = Described(folder / "config.json")
        heads = described.get("heads") or (described.get("siglip_config") or {}).get("heads")
        if heads:
            return heads
    name = encoder.a(str, "siglip_name").lower()
    for part, heads in HEADS.items():
        if part in name:
            return heads
    raise ValueError(f"how many attention heads has the image tower {encoder['siglip_name']!r}? Say it in "
                     f'{folder / "config.json"}: {{"siglip_config": {{"heads": N}}}}')


def flux_config(described, z_channels):
    """The decoder's config.json -> flux.Config. z_channels: of the image tokenizer's latents, which it reads."""
    described.insist(patch_size=1, out_channels=None)
    # What FLUX.1-dev's own config leaves unsaid, and what the published loader passes by hand.
    described.values = {"axes_dims_rope": (16, 56, 56), "siglip_channels": z_channels} | described.values
    return described.numbers(flux.Config)


def schedule_config(described):
    described.insist(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift_terminal=None,
                     time_shift_type="exponential", invert_sigmas=False, stochastic_sampling=False,
                     use_beta_sigmas=False, use_exponential_sigmas=False, use_karras_sigmas=False)
    if not described["use_dynamic_shifting"]:
        raise ValueError(f"{described.path} says use_dynamic_shifting = false; implemented is true only")
    return flux.Schedule(base_tokens=described["base_image_seq_len"], max_tokens=described["max_image_seq_len"],
                         base_shift=described["base_shift"], max_shift=described["max_shift"])


def read_tokenizer(folder, name):
    """The tokenizer in `folder`, from its own tokenizer.json where there is one.

    transformers 5 rebuilds T5's from the vocabulary, with other ids than the model was trained on, so T5 needs one.
    """
    if (folder / "tokenizer.json").is_file():
        return described.read_tokenizer(folder)
    if name == "t5_tokenizer":
        raise FileNotFoundError(f"there is no {folder / 'tokenizer.json'}")
    described.check_tokenizer_files(folder)
    from transformers import AutoTokenizer                                           # which imports torch: seconds
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)        # and do not ask whether to
    except Exception as error:                           # transformers raises anything from KeyError to its own
        raise ValueError(f"cannot read {name} in {folder}: {error}") from error


def read_source(src, image_size=None, flux=None):
    """A published directory -> Source. Raises ValueError or OSError with one line about what is missing or wrong.

    It has config.json with a vision_config that names the other parts, safetensors (one file, or shards with an index),
    tokenizer files, the image tokenizer's .pt files, the image decoder in diffusers' layout, and a FLUX.1-dev folder
    for VAE, text encoders, their tokenizers and the scheduler: `base` beside the decoder, or `flux`. FLUX's own
    transformer is not read. image_size: side in pixels of the pictures to draw.
    """
    described = Described(src / "config.json")
    vision, ar = described.a(dict, "vision_config"), ar_config(described)
    encoder, decoder, transform = (vision.a(dict, part) for part in ("encoder", "decoder", "transform"))
    transform.insist(filtering=True, random_ratio=None)
    fitted = transform.numbers(siglip_vq.Transform)
    if decoder["cfg_scale_2"] != decoder["cfg_scale"]:
        raise ValueError(f"{decoder.path} says cfg_scale = {decoder['cfg_scale']} and cfg_scale_2 = "
                         f"{decoder['cfg_scale_2']}; implemented are equal ones only")
    head = src / decoder.a(str, "model_path")
    base = Path(flux).absolute() if flux else head.parent / "base"
    if not head.is_dir():
        raise FileNotFoundError(f"there is no decoder transformer {head}, which {src / 'config.json'} names")
    if not base.is_dir():
        raise FileNotFoundError(f"there is no FLUX.1-dev folder {base}: pass --flux=DIR")

    siglip = {"vision/vit": src / encoder.a(str, "siglip_path"), "vision": src / encoder.a(str, "projector_path")}
    folders = {"ar": src, "flux": head, "vae": base / "vae", "t5": base / "text_encoder_2",
               "clip": base / "text_encoder"}
    weights = {part: weight_files(folder) for part, folder in folders.items()}
    weights |= {part: [TensorFile(path)] for part, path in siglip.items()}

    of_file = lambda part: Described(folders[part] / "config.json")
    tokenizers = {"tokenizer": src, "t5_tokenizer": base / "tokenizer_2", "clip_tokenizer": base / "tokenizer"}
    vae_of_it = vae.read_config(of_file("vae"))
    upscale = 2 * vae_of_it.downscale
    if decoder["upscale_factor"] != upscale:
        raise ValueError(f"{decoder.path} says upscale_factor = {decoder['upscale_factor']}, but the decoder draws "
                         f"{upscale} pixels a token")
    if image_size is None:
        least = IMAGE_SIZE if IMAGE_SIZE <= fitted.long_size else fitted.short_size
        image_size = -(-least // upscale) * upscale
    if image_size % upscale or image_size > fitted.long_size:
        raise ValueError(f"--image_size={image_size}: it must be a multiple of {upscale}, and at most "
                         f"{fitted.long_size}, the long_size that the model reads")
    umm = XOmni(
        ar=ar, vision=vision_config(encoder, transform, siglip["vision/vit"].parent,
                                    *(weights[part][0].specs for part in siglip)),
        flux=flux_config(of_file("flux"), encoder["z_channels"]), vae=vae_of_it,
        schedule=schedule_config(Described(base / "scheduler" / "scheduler_config.json")),
        transform=fitted,
        t5=of_file("t5").numbers(text_encoders.T5Config), clip=of_file("clip").numbers(text_encoders.ClipConfig),
        grid=(image_size // upscale,) * 2, diffusion_steps=decoder.a(int, "num_inference_steps"),
        diffusion_guidance=float(decoder.a(float, "cfg_scale")),
        **{name: read_tokenizer(folder, name) for name, folder in tokenizers.items()})
    umm.check_text(described.get("mm_special_tokens") or ())
    _set_end(umm.tokenizer, src / "generation_config.json")
    return Source(umm, weights, *_export_paths(src, head, base, weights, siglip.values()))


def _set_end(tokenizer, path):
    """Makes what generation_config.json, if there is one, says to end a turn the tokenizer's end, where that is none of
    it: it is where the published model stops."""
    ends = Described(path).get("eos_token_id") if path.is_file() else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < len(tokenizer) for end in ends):
        raise ValueError(f"{path} says eos_token_id = {ends}, which is no id of the tokenizer's {len(tokenizer)}")
    if ends and tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def _export_paths(src, head, base, weights, siglip):
    """Where an export puts the files, relative to the model directory and never above it: `kept`, `names` of Source.

    A FLUX.1-dev folder from elsewhere (--flux) goes to where it would be found, beside the decoder.
    """
    inside = lambda path: Path(*(part for part in Path(os.path.relpath(path, src)).parts if part != ".."))
    folders = {src: Path(), head: inside(head), base: inside(head.parent / "base")}
    folders |= {base / sub: folders[base] / sub for sub in
                ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")}
    kept = {(to / file.name).as_posix(): file for folder, to in folders.items() for file in small_files(folder)}
    for path in siglip:
        if (path.parent / "config.json").is_file():
            kept[(inside(path.parent) / "config.json").as_posix()] = path.parent / "config.json"
    names = {file.path: (folders.get(file.path.parent, inside(file.path.parent)) / file.path.name).as_posix()
             for files in weights.values() for file in files}
    return kept, names
