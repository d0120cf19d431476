"""Janus-Pro (Chen et al. 2025): a Llama that reads what SigLIP sees and draws the codes of VQ-16.

Reading and drawing have nothing in common but the Llama, so what was drawn is read as pixels alone. Top to bottom: the
model behind the interface of umm.py, its published sizes, and how its published folder is read, in DeepSeek's layout
and in that of transformers.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from gvu_jax import described, rollout, sampling
from gvu_jax.described import Described
from gvu_jax.models import llama, siglip, vq
from gvu_jax.tensor_files import Source, small_files, weight_files
from gvu_jax.umm import (
    Lengths, gather_logps, hidden_of_words, ids_of_words, lengths_of, pad_prompts, prompt_shapes, until_end)

MOST_TOKENS = 4096      # of a text: with the picture and its question, well inside the 16384 positions of the model

# The chat "deepseek" of the published code: when a picture is read it begins with this system text, when one is drawn
# with none.
SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.")
USER, ASSISTANT, PICTURE = "<|User|>", "<|Assistant|>", "<image_placeholder>"
BEGIN, END = "<begin_of_image>", "<end_of_image>"
BOS, PAD = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>"         # ids differ between the 1B and the 7B, strings do not


@dataclasses.dataclass(frozen=True, eq=False)
class Janus:
    """Janus-Pro: the backbone `ar` with aligners and heads, SigLIP's tower `vision`, and `vq`."""
    ar: llama.Config
    vision: siglip.Config
    vq: vq.Config
    tokenizer: Any
    grid: tuple[int, int]                               # rows, columns of codes in a picture
    transform: siglip.Transform
    instruction: str = "Describe the image in detail."
    guidance: float = 5.0                               # as published
    layout: str = "published"                           # of the folder that it comes from: one of llama.RULES
    of_shapes: bool = False                             # whether this is a model of the shapes world

    kind = "janus"
    int8 = ("weights", "cache")
    exact_likelihood = True
    trains = llama.TRAINS
    partition = {"ar": llama.PARTITION, "adapter": llama.PARTITION, "vision": siglip.PARTITION, "vq": vq.PARTITION}

    def __post_init__(self):
        if min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} must be at least 1")
        if self.layout not in llama.RULES:
            raise ValueError(f"layout is {self.layout!r}; it must be {' or '.join(llama.RULES)}")

    # ---- text, on the host -------------------------------------------------------------------------------------

    @property
    def image_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def picture_size(self):
        """Height and width, in pixels, of a picture of this grid."""
        return tuple(side * self.vq.downscale for side in self.grid)

    @property
    def pad(self):
        """Id of the token that stands where guidance has no prompt, and where rows are filled up."""
        return self._id(PAD)

    def _id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def _stop(self):
        """Id of what ends a text."""
        return self.tokenizer.eos_token_id

    def said(self, text):
        """A text as an answer, behind the open turn: what its words' ids are of."""
        return " " + text.strip()

    @functools.lru_cache(maxsize=4096)
    def _around(self, question):
        """Ids before and after a picture's patches when `question` is put about it, up to where the answer begins."""
        system = "" if self.of_shapes else SYSTEM           # thirty words that the shapes world does not know
        ids = self._ids(f"{system}\n\n{USER}: {PICTURE}\n{question.strip()}\n\n{ASSISTANT}:")
        at = ids.index(self._id(PICTURE))
        return (self._id(BOS), *ids[:at], self._id(BEGIN)), (self._id(END), *ids[at + 1:])

    def _encode(self, texts, questions, end):
        words = ids_of_words(self, texts, questions, MOST_TOKENS)
        chats = self._ids([f"{USER}: {text.strip()}\n\n{ASSISTANT}:{BEGIN}" for text in texts])
        stop = [self._stop] if end else []
        return ([[self._id(BOS), *ids] for ids in chats], [list(self._around(question)[1]) for question in questions],
                [ids + stop for ids in words])

    def lengths(self, texts, questions=None, end=False):
        """The smallest padded lengths that hold all of `texts`; of prompt and words, rounded up to a multiple of 4."""
        return lengths_of(self._encode(texts, questions or [self.instruction] * len(texts), end))

    def encode_prompts(self, texts, lengths=None, questions=None, end=False):
        """B texts -> Prompts of int32 / bool numpy arrays; arguments and errors are those of XOmni.encode_prompts."""
        parts = self._encode(texts, questions or [self.instruction] * len(texts), end)
        return pad_prompts(texts, parts, lengths, self.pad)

    def prompt_shapes(self, B, prompt, words, asked=0):
        """The shapes of B encoded texts of these padded lengths, Prompts of jax.ShapeDtypeStruct; asked: by how many
        tokens their questions are longer than the instruction."""
        return prompt_shapes(B, Lengths(prompt, len(self._around(self.instruction)[1]) + asked, words))

    # ---- generation branch -------------------------------------------------------------------------------------

    def _variables(self, params):
        return {"params": params["ar"]} | ({"lora": params["adapter"]} if "adapter" in params else {})

    def sample_image(self, params, prompts, key, how, index=None):
        """Draws how.images_per_prompt pictures a prompt: codes [B*G, N] int32 and the policy's log-probs [B*G, N].

        index: [B*G] int, the place of each sample in the whole that `key` is for; None where this batch is the whole.
        """
        backbone = rollout.backbone(self.partition, params, how)
        return sampling.decode(
            llama.Llama(self.ar), self._variables(backbone), prompts.tokens, prompts.mask, key, how,
            steps=self.image_tokens, head="image_logits", offset=self.ar.vocab_size, index=index,
            negative=llama.without_prompt(prompts.tokens, prompts.mask, self.pad))

    def drawn_shapes(self, S):
        """The shape of S pictures as a policy draws them: codes [S, N] int32."""
        return jax.ShapeDtypeStruct((S, self.image_tokens), jnp.int32)

    def code_logits(self, params, context, mask, codes):
        """Logits [B, N, K] float32 of each of the codes [B, N] after context, mask [B, P], in one forward."""
        N = codes.shape[1]
        tokens = jnp.concatenate([context, codes[:, :-1] + self.ar.vocab_size], axis=1)             # [B, P+N-1]
        mask = jnp.pad(mask, ((0, 0), (0, N - 1)), constant_values=True)
        model, variables = llama.Llama(self.ar), self._variables(params)
        hidden, _ = model.apply(variables, tokens, mask)
        return model.apply(variables, hidden[:, -N:], method="image_logits")

    def image_logps(self, params, prompts, codes, how=sampling.How(), key=None):
        """log pi(code_t | prompt, codes_<t) of given pictures in one forward; with guidance in two, both
        differentiated: codes [B, N] -> [B, N] float32.

        The context without a prompt is the same for all samples of a prompt, and the sampler reads it once a prompt.
        Here its P of P + N - 1 positions are read with each sample: the codes behind them, the most of a row, differ.
        """
        without = lambda: self.code_logits(
            params, llama.without_prompt(prompts.tokens, prompts.mask, self.pad), prompts.mask, codes)
        logits = self.code_logits(params, prompts.tokens, prompts.mask, codes)
        return gather_logps(sampling.policy_logits(how, logits, without), codes)

    def image_target(self, params, pixels):
        """Outside pictures as something to learn to draw: their codes [B, N]."""
        return vq.VQ(self.vq).apply({"params": params["vq"]}, pixels, method="encode")

    def image_nll(self, params, prompts, target, key=None):
        """Nats of each decision of a target, [B, N] float32; exact, so that the key is not used."""
        return -self.image_logps(params, prompts, target)

    def render(self, params, codes, prompts, key, index=None):
        """Codes [S, N] -> pixels [S, H, W, 3] float32 in [0, 1], on the grid of 8 bits. Nothing here is random."""
        return vq.to_pixels(vq.VQ(self.vq).apply({"params": params["vq"]}, codes, self.grid, method="decode"))

    # ---- understanding branch ----------------------------------------------------------------------------------

    def see(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1], as drawn or as `fit` gives them -> SigLIP's features [B, N, width].

        The aligner belongs to the backbone, so that each policy reads them through its own.
        """
        pixels = siglip.squared(pixels, self.transform)
        return siglip.VisionTransformer(self.vision).apply({"params": params["vision"]}, pixels, method="features")

    def seen_of(self, codes):
        """None: reading and drawing do not share their tokens."""
        return None

    def picture_of(self, codes):
        """What was drawn without the way there: itself."""
        return codes

    def _asked(self, params, seen, prompts):
        """The chat up to where the answer begins, ids and mask [B, C], and what its patches are to the backbone."""
        B, N, _ = seen.shape
        before = jnp.array(self._around(self.instruction)[0], jnp.int32)
        patches = self.ar.vocab_size + self.ar.image_vocab_size + jnp.arange(N)
        before = jnp.broadcast_to(jnp.concatenate([before, patches]), (B, len(before) + N))
        mask = jnp.concatenate([jnp.ones_like(before, bool), prompts.question_mask], axis=1)
        aligned = llama.Llama(self.ar).apply(self._variables(params), seen, method="align")
        return jnp.concatenate([before, prompts.question], axis=1), mask, aligned

    def text_logps(self, params, seen, prompts):
        """log p(word_j | picture, question, word_<j) for all words in one forward: [B*K, L] float32, mask [B*K, L].

        seen [B, N, width]; prompts of B*K texts, the K of a picture side by side and with one question among them.
        """
        return gather_logps(self.text_logits(params, seen, prompts), prompts.words), prompts.words_mask

    def text_logits(self, params, seen, prompts):
        """What `text_logps` picks the words from: logits [B*K, L, V] float32 of the word at each place."""
        K = len(prompts.words) // len(seen)
        model, variables = llama.Llama(self.ar), self._variables(params)
        asked, mask, aligned = self._asked(params, seen, jax.tree.map(lambda x: x[::K], prompts))
        run = lambda tokens, mask, positions: model.apply(
            variables, tokens, mask, positions=positions, text_only=True, seen=aligned)[0]
        return model.apply(variables, hidden_of_words(run, asked, mask, prompts), method="text_logits")

    def sample_text(self, params, seen, prompts, key, how, steps, index=None):
        """Draws how.images_per_prompt answers to the question of each picture seen [B, N, width], which is read once.

        prompts: B rows, of which only the question is read. Returns words [B*G, T] int32, the policy's log-probs
        [B*G, T] float32 and mask [B*G, T] bool, T = steps: True up to and including the end of the answer, from where
        on words repeat it at log-probability 0; a row that has not come to its end by then counts whole. index as in
        `sample_image`; how's guidance is for pictures and not applied.
        """
        backbone = rollout.backbone(self.partition, params, how)
        asked, mask, aligned = self._asked(backbone, seen, prompts)
        end, how = self._stop, dataclasses.replace(how, guidance=1.0)
        words, logps = sampling.decode(
            llama.Llama(self.ar), self._variables(backbone), asked, mask, key, how, steps=steps, head="text_logits",
            offset=0, index=index, stop=end, seen=aligned)
        return words, logps, until_end(words, end)

    def answer(self, params, seen, question, key, max_words=32, how=sampling.How(temperature=0.0)):
        """Answers one question about each picture seen [B, N, width]. Returns B strings, without their end."""
        prompts = self.encode_prompts(["-"] * len(seen), questions=[question] * len(seen))
        words, _, _ = self._sample_text(params, seen, prompts, key, how, max_words)
        return [text.strip() for text in self.tokenizer.batch_decode(np.asarray(words), skip_special_tokens=True)]

    _sample_text = jax.jit(sample_text, static_argnums=(0, 5, 6))

    def features(self, params, pixels):
        """Pixels [B, H, W, 3] in [0, 1] -> [B, N, width] float32: the vision tower's output."""
        return self.see(params, pixels).astype(jnp.float32)

    # ---- pictures of any size, on the host ---------------------------------------------------------------------

    def fitted_size(self, size):
        """(height, width) to which a picture of this (height, width) is brought. As drawn it stays: `see` does it."""
        return self.picture_size if tuple(size) == self.picture_size else (self.transform.image_size,) * 2

    def fit(self, image):
        """A picture, uint8 or float in [0, 1], [h, w, 3] -> float32 [H, W, 3] in [0, 1], which `see` takes."""
        image = np.asarray(image)
        image = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
        if image.shape[:2] == self.picture_size:
            return image.astype(np.float32) / 255
        return siglip.fit_image(Image.fromarray(image), self.transform)

    # ---- parameters --------------------------------------------------------------------------------------------

    def init(self, key):
        """Random parameters of all parts; under jax.eval_shape, their shapes."""
        keys = jax.random.split(key, 3)
        return {"ar": llama.init(self.ar, keys[0]), "vision": siglip.init(self.vision, keys[1]),
                "vq": vq.init(self.vq, keys[2])}

    def check_parts(self):
        """ValueError where the sizes of two parts do not fit."""
        fits = {"codes of backbone and VQ-16": (self.ar.image_vocab_size, self.vq.codebook_size),
                "channels of vision tower and aligner": (self.vision.width, self.ar.vision_width),
                "sides of image transform and vision tower": (
                    self.transform.image_size, self.vision.pos_table_side * self.vision.patch_size)}
        for what, (one, other) in fits.items():
            if one != other:
                raise ValueError(f"the {what} differ: {one} and {other}")
        if not 0 < self.transform.min_size <= self.transform.image_size:
            raise ValueError(f"min_size {self.transform.min_size} of the image transform must lie in 1 to its "
                             f"image_size {self.transform.image_size}")

    def check_text(self):
        """ValueError unless the tokenizer is there and knows the chat's tokens, each as one id of the backbone's."""
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer")
        known = self.tokenizer.get_vocab()
        for token in (BOS, self.tokenizer.eos_token, PAD, BEGIN, END, PICTURE, USER, ASSISTANT):
            if token not in known or known[token] >= self.ar.vocab_size or self._ids(token) != [known[token]]:
                raise ValueError(f"the tokenizer has no token {token or 'that ends a text'} with an id below "
                                 f"{self.ar.vocab_size}")

    # ---- names in the published folder -------------------------------------------------------------------------

    @property
    def adapter_rules(self):
        """How the parameters of the backbone are called in a checkpoint, and so in peft's adapters (see torch_keys)."""
        return llama.RULES[self.layout]

    @property
    def loads(self):
        """The class of transformers that reads the published folder; DeepSeek's layout is read by DeepSeek's code."""
        return "JanusForConditionalGeneration" if self.layout == "transformers" else None

    def published_parts(self, shapes, found):
        """{part: (parameters, rules, keys to ignore)} of the published files, see torch_keys.places: one part, "", of
        all parameters. shapes: of the params; found: {part: {key: shape}}."""
        rules = {part: room.RULES[self.layout] for part, room in (("ar", llama), ("vision", siglip), ("vq", vq))}
        unused = [key for key in found[""] if key in vq.UNUSED or key.startswith(siglip.UNUSED)]
        return {"": (shapes, rules, unused)}


MODEL = Janus


# ------------------------------------------------------------------ sizes

# What the published code has as defaults or tables of its own, under the names of config.json.
LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
TOWERS = {"siglip_large_patch16_384": dict(width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4)}
VQ16 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=256)

PUBLISHED = {                                  # the published models in numbers, for planning
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32)}


class Sizes(Janus):
    """The published model where its folder is not: texts have lengths here, and ids that mean nothing."""
    pad = _stop = 0

    def _id(self, token):
        return 0

    def _ids(self, text):
        return [0] * 8

    def _around(self, question):
        return (0,) * 64, (0,) * 16


def published(override, size=None):
    """A published model for a plan. override: fields to set; size: of PUBLISHED, None is the first."""
    if (size := size or next(iter(PUBLISHED))) not in PUBLISHED:
        raise ValueError(f"config.model.size is {size!r}; it must be one of {', '.join(PUBLISHED)}")
    numbers = PUBLISHED[size]
    fields = dict(
        ar=llama.Config(**numbers, num_key_value_heads=numbers["num_attention_heads"], vocab_size=102400,
                        image_vocab_size=16384, code_width=8, vision_width=1024,
                        image_head_width=numbers["hidden_size"]),
        vision=siglip.Config(width=1024, layers=24, heads=16, mlp_hidden=4096, patch_size=16, pos_table_side=24),
        vq=vq.Config(codebook_size=16384, codebook_dim=8), grid=(24, 24),
        transform=siglip.Transform(image_size=384, min_size=14))
    return described.typed(Sizes, fields | dict(override, tokenizer=None))


# ------------------------------------------------------------------ the published folder

FOLDERS = {}                                               # nothing is read from elsewhere


def read_source(src, image_size=None):
    """A published directory, DeepSeek's or transformers' -> Source. Raises ValueError or OSError with one line about
    what is missing or wrong.

    It has config.json, preprocessor_config.json, tokenizer.json, and weights: safetensors, or else pytorch_model.bin,
    each one file or shards with an index. image_size: side in pixels of the pictures to draw.
    """
    told = Described(src / "config.json")
    layout = "transformers" if told["model_type"] == "janus" else "published"
    read = {"published": published_configs, "transformers": transformers_configs}[layout]
    configs, side = read(told, src)
    if image_size is not None:
        side, left = divmod(image_size, configs["vq"].downscale)
        if left:
            raise ValueError(f"--image_size={image_size}: it must be a multiple of {configs['vq'].downscale}")
    tokenizer = described.read_tokenizer(src)
    if PAD in tokenizer.get_vocab():
        tokenizer.pad_token = PAD                          # the file names none: the published processor does
    umm = Janus(**configs, tokenizer=tokenizer, grid=(side, side), layout=layout,
                transform=image_transform(Described(src / "preprocessor_config.json")))
    umm.check_text()
    files = weight_files(src)
    return Source(umm, {"": files}, {file.name: file for file in small_files(src)},
                  {file.path: file.path.relative_to(src).as_posix() for file in files})


def image_transform(told):
    told.insist(image_mean=[0.5] * 3, image_std=[0.5] * 3, background_color=[siglip.BACKGROUND] * 3,
                rescale_factor=1 / 255, do_resize=True, do_rescale=True, do_pad=True, resample=3)
    if not told.get("do_normalize", True):
        logging.warning("%s says do_normalize = false, as that of the first Janus did by mistake: pictures are "
                        "normalised all the same", told.path)
    size = told.get("size")
    side = size.get("height") if isinstance(size, dict) else told["image_size"]
    if isinstance(size, dict) and size.get("width") != side:
        raise ValueError(f"{told.path} says size = {size}; implemented are squares only")
    return told.numbers(siglip.Transform, image_size=side)


def ar_config(told, **more):
    """The config of a Llama -> llama.Config; Llama's defaults where it leaves something out."""
    told.values = LLAMA | told.values
    heads = told.a(int, "num_attention_heads")
    rope = told.get("rope_parameters") or {}
    told.insist(model_type="llama", hidden_act="silu", rope_scaling=None, attention_bias=False, mlp_bias=False,
                head_dim=told.a(int, "hidden_size") // max(1, heads))
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{told.path} says rope_parameters = {rope}; implemented is rope_type 'default' only")
    if "rope_theta" in rope:
        more["rope_theta"] = rope["rope_theta"]
    return told.numbers(llama.Config, num_key_value_heads=told.get("num_key_value_heads") or heads, **more)


def published_configs(told, src):
    """config.json in DeepSeek's layout -> configs by field of Janus, and the side of the grid that is drawn."""
    tower, codes, head, aligner, gen_aligner = (
        told.a(dict, f"{part}_config").a(dict, "params")
        for part in ("vision", "gen_vision", "gen_head", "aligner", "gen_aligner"))
    told.a(dict, "gen_vision_config").insist(cls="VQ-16")
    processor = Described(src / "processor_config.json")
    processor.insist(add_special_token=False, sft_format="deepseek", image_tag=PICTURE)
    for projector in (aligner, gen_aligner):
        projector.insist(depth=2, projector_type="mlp_gelu")
    head.insist(image_token_size=codes["image_token_size"])
    tower.insist(select_feature="same")
    tower.values = TOWERS.get(tower.get("model_name"), {}) | tower.values
    codes.values = VQ16 | codes.values
    depth, cut = tower.a(int, "layers"), tower.get("select_layer", -1)
    layers = min(depth, depth + cut + 1 if cut <= 0 else cut)
    ar = ar_config(
        told.a(dict, "language_config"), image_vocab_size=codes["image_token_size"],
        code_width=gen_aligner["input_dim"], vision_width=aligner["input_dim"],
        image_head_width=head["image_token_embed"])
    vision = vision_config(tower, width=tower["width"], layers=layers, heads=tower["heads"])
    names = dict(codebook_size="image_token_size", codebook_dim="n_embed", channels="ch", multipliers="ch_mult",
                 res_blocks="num_res_blocks", z_channels="z_channels")
    return dict(ar=ar, vision=vision, vq=vq_config(codes, names)), drawn_side(processor, vision)


def drawn_side(processor, vision):
    """The side of the grid of codes: DeepSeek's examples draw as many as the vision tower has patches."""
    tokens, seen = processor.a(int, "num_image_tokens"), vision.pos_table_side ** 2
    if tokens != seen:
        raise ValueError(f"{processor.path} says num_image_tokens = {tokens}, but the vision tower gives {seen}")
    return math.isqrt(tokens)


def transformers_configs(told, src):
    """config.json in transformers' layout -> configs by field of Janus, and the side of the grid that is drawn."""
    text, tower, codes = (told.a(dict, f"{part}_config") for part in ("text", "vision", "vq"))
    tower.insist(hidden_act="gelu", use_qk_norm=False, attention_bias=True, depth=2, num_channels=3,
                 layer_norm_eps=1e-6, projection_dim=text["hidden_size"])
    codes.insist(double_latent=False, in_channels=3, out_channels=3, num_hidden_layers=2, hidden_act="gelu",
                 projection_dim=text["hidden_size"])
    ar = ar_config(text, image_vocab_size=codes["num_embeddings"], code_width=codes["embed_dim"],
                   vision_width=tower["hidden_size"], image_head_width=codes["projection_dim"])
    vision = vision_config(tower, width=tower["hidden_size"], layers=tower["num_hidden_layers"],
                           heads=tower["num_attention_heads"])
    names = dict(codebook_size="num_embeddings", codebook_dim="embed_dim", channels="base_channels",
                 multipliers="channel_multiplier", res_blocks="num_res_blocks", z_channels="latent_channels")
    return dict(ar=ar, vision=vision, vq=vq_config(codes, names)), codes.a(int, "num_patches")


def vision_config(told, width, layers, heads):
    image, patch = told.a(int, "image_size"), told.a(int, "patch_size")
    if patch < 1 or image % patch:
        raise ValueError(f"{told.path} says image_size = {image} and patch_size = {patch}, which does not divide it")
    return config_of(told, siglip.Config, dict(
        width=width, layers=layers, heads=heads, mlp_hidden=int(width * told.a(float, "mlp_ratio")), patch_size=patch,
        pos_table_side=image // patch))


def vq_config(told, names):
    return config_of(told, vq.Config, {ours: told[theirs] for ours, theirs in names.items()})


def config_of(told, cls, values):
    """cls(**values), whose errors name the file that they come from."""
    return described.named(told.path, lambda: described.typed(cls, values))
