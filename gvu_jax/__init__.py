"""gvu_jax: teach a unified multimodal model to draw what it already understands.

    model = gvu_jax.load("path/of/a/run/or/model")
    pictures = model.generate(["a photo of a red circle"], seed=0)[0]        # uint8 [images_per_prompt, H, W, 3]
    model.score(pictures, ["a photo of a red circle"])[0].reward
    model.describe(pictures)
    model.answer(pictures, "Does this image describe a photo of a red circle?")
    model.believes(pictures, ["a photo of a red circle"])[0]                  # the probability of yes against no
"""
import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
from pathlib import Path

# libtpu, of which plan.py needs the compiler, looks for chips wherever it is installed, and complains in several lines
# where there are none. jax does not ask it where this machine has no device that could be one, or a GPU.
ACCELERATORS = "/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg"
if importlib.util.find_spec("libtpu") and not any(map(glob.glob, ACCELERATORS)):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")       # else it tells everyone that torch is not installed
# On a CPU the newer convolutions of jaxlib 0.10 take up to twice as long as its older ones; those of 0.12 do not. XLA
# ends a process that names a flag it does not know, so that no other version hears of this one.
KERNELS, given = "--xla_cpu_experimental_ynn_fusion_type", os.environ.get("XLA_FLAGS", "")
if importlib.metadata.version("jaxlib").startswith("0.10.") and KERNELS not in given:
    os.environ["XLA_FLAGS"] = f"{given} {KERNELS}=-individual_convolution".lstrip()

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gvu_jax import adapters, checkpoint, cli, hub, rewards, sharding
from gvu_jax.metrics import read_json
from gvu_jax.policy import init_trainable, policy_params
from gvu_jax.sampling import How


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a picture fits a prompt, in the model's own eyes."""
    reward: float                      # geometric mean of token_probabilities, in (0, 1]
    tokens: list[str]                  # the prompt as the model reads it
    token_probabilities: np.ndarray    # [tokens] float32: p(token | picture, instruction, the tokens before)
    words: list[str]                   # the prompt's words, each of one token or more
    probabilities: np.ndarray          # [words] float32: the product over a word's tokens


def load(path, mesh=None, adapter=None, **override):
    """A `Model` from a model folder, from the newest checkpoint of a run's folder, or by its name on the Hugging Face
    Hub, hf:OWNER/NAME[@REVISION], which is converted into the cache the first time (see hub.py).

    mesh: sharding.make_mesh(..); None takes all devices (sharding.mesh_of). adapter: a folder of peft's, as
    `convert --export=peft` writes it, to be laid over the model. override: fields of the umm that are to have other
    values than those stored or trained with, such as diffusion_steps=28.
    Raises FileNotFoundError or ValueError with one line that says what is missing or wrong.
    """
    path = hub.model_folder(path)
    if (path / "metadata.json").exists():
        return _model(*checkpoint.load_model(path, mesh, override), None, adapter)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is neither a model folder (metadata.json) nor a run (config.json)")
    config = read_run_config(path)
    umm, base = checkpoint.load_model(base_of_run(path, config), mesh, {**config.model.get("override", {}), **override})
    mesh = sharding.mesh_under(base)
    checkpoints = checkpoint.Checkpoints(path, mesh)
    try:
        step = checkpoints.newest_whole()
        if step is None:
            raise FileNotFoundError(f"{path} has no checkpoint yet: the run ended before its first one")
        like = jax.eval_shape(lambda: init_trainable(umm, base, config, jax.random.key(0)))
        trainable = checkpoints.load(step, trainable=sharding.place(umm.partition, like, mesh))["trainable"]
    finally:
        checkpoints.close()
    return _model(umm, policy_params(base, trainable, config.lora), step, adapter)


def _model(umm, params, step, adapter):
    params = adapters.laid_over(params, umm, adapter) if adapter else params
    return Model(umm, params, sharding.mesh_under(params), step)


def read_run_config(workdir):
    """The config (ConfigDict) of a run's folder. ValueError where config.json is another kind of config."""
    path = Path(workdir) / "config.json"
    settings = read_json(path)
    if not all(isinstance(settings.get(part), dict) for part in ("model", "lora")):
        raise ValueError(f"{path} is not of a run of gvu_jax.train; a published model is converted first: "
                         f"python -m gvu_jax.convert --src={workdir} --dst=DIR")
    return ConfigDict(settings)


def base_of_run(workdir, config):
    """The model folder that a run started from: its own copy, or the converted checkpoint that its config names."""
    base = Path(workdir) / "base"
    return base if base.exists() else hub.model_folder(config.model.get("checkpoint", base), config.get("cache"))


BATCH = 16              # prompts drawn, or pictures read, at a time
MOST_IMAGES = 1024      # of one prompt: each has a random key of its own


class Model:
    """A unified model and its parameters. Texts are lists; pictures are uint8 [B, H, W, 3] or float in [0, 1], or a
    list of them, of several sizes where the model fits pictures to itself. Whatever their number, each program compiles
    once (what reads, once for each size of picture): the last batch is filled up."""

    def __init__(self, umm, params, mesh, step=None):
        self.umm, self.params, self.mesh, self.step = umm, params, mesh, step       # step: of a run's checkpoint
        self._sample = sharding.Program(umm.sample_image, mesh, static_argnames="how")
        self._render, self._see, self._read = (
            sharding.Program(call, mesh) for call in (umm.render, umm.see, umm.text_logps))

    def generate(self, prompts, seed=0, images_per_prompt=1, how=None, batch=BATCH, progress=None):
        """Draws pictures: uint8 [prompts, images_per_prompt, H, W, 3].

        A picture depends on the seed, its prompt, the prompt's place in the list and its own place among the prompt's
        pictures: not on their number, nor on `batch`, the prompts drawn at a time. how: None draws from the policy
        itself, with the guidance that its family was published with. progress: called with the number of finished
        prompts after each batch.
        """
        batches = []
        for pictures in self.draw(prompts, seed, images_per_prompt, how, batch):
            batches.append(pictures)
            if progress:
                progress(len(pictures))
        return np.concatenate(batches)

    def draw(self, prompts, seed=0, images_per_prompt=1, how=None, batch=BATCH, places=None):
        """As `generate`, but yields the pictures of `batch` prompts at a time, as soon as they are drawn.

        places: which of the prompts to draw, their places in the list; None: all of them.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError("prompts is a list of at least one text")
        if images_per_prompt > MOST_IMAGES:
            raise ValueError(f"images_per_prompt is {images_per_prompt}; it must be at most {MOST_IMAGES}")
        how = dataclasses.replace(how or How(guidance=self.umm.guidance), images_per_prompt=images_per_prompt)
        keys, places = jax.random.split(jax.random.key(seed)), range(len(prompts)) if places is None else places
        lengths, batch = self.umm.lengths(prompts), min(batch, len(prompts))
        for start in range(0, len(places), batch):
            rows = [places[i % len(places)] for i in range(start, start + batch)]       # the last batch is filled up
            encoded = self.umm.encode_prompts([prompts[i] for i in rows], lengths)
            index = (np.array(rows)[:, None] * MOST_IMAGES + np.arange(images_per_prompt)).ravel()
            drawn, _ = self._sample(self.params, encoded, keys[0], how=how, index=index)
            pixels = self._render(self.params, drawn, encoded, keys[1], index=index)
            pictures = np.asarray(jnp.round(pixels * 255), np.uint8)
            yield pictures.reshape(batch, images_per_prompt, *pixels.shape[1:])[:len(places) - start]

    def read(self, images, texts, questions=None, lengths=None, end=False):
        """How probable each token of K texts a picture is: log p(token | picture, question, the tokens before).

        texts: those of a picture side by side; questions: one a picture, None is the umm's instruction; lengths:
        umm.Lengths that hold them all, None: the smallest. end: whether a text's end is a token of it. Returns logps
        [B * K, L] float32 and mask [B * K, L] bool, which is True at the texts' tokens; see rewards.py for what to make
        of them.
        """
        K, left = divmod(len(texts), len(images))
        if left or not K:
            raise ValueError(f"{len(images)} pictures cannot be read with {len(texts)} texts")
        if questions and len(questions) != len(images):
            raise ValueError(f"{len(images)} pictures cannot be asked {len(questions)} questions")
        questions = [question for question in questions or [self.umm.instruction] * len(images) for _ in range(K)]
        lengths = lengths or self.umm.lengths(texts, questions, end)
        logps, mask = np.zeros((len(texts), lengths.words), np.float32), np.zeros((len(texts), lengths.words), bool)
        for rows, seen in self._look(images):
            rows = (np.array(rows)[:, None] * K + np.arange(K)).ravel()
            said, asked = ([of[i] for i in rows] for of in (texts, questions))
            encoded = self.umm.encode_prompts(said, lengths, asked, end)
            logps[rows], mask[rows] = jax.device_get(self._read(self.params, seen, encoded))
        return logps, mask

    def score(self, images, prompts):
        """The intrinsic reward of each picture for its prompt, token by token and word by word: a list of `Score`."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures cannot be scored for {len(prompts)} prompts")
        logps, mask = self.read(images, prompts)
        tokenizer, scores = self.umm.tokenizer, []
        for prompt, reward, row, real in zip(prompts, rewards.geometric_mean(logps, mask), logps, mask):
            probabilities, said = np.exp(row[real]), self.umm.said(prompt)
            encoded = tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)
            words, products = rewards.join_tokens(said, encoded["offset_mapping"], probabilities)
            scores.append(Score(float(reward), [tokenizer.decode([t]) for t in encoded["input_ids"]], probabilities,
                                words, np.array(products, np.float32)))
        return scores

    def believes(self, images, prompts):
        """The model's probability of yes, against no, when asked of each picture "Does this image describe ..?" with
        its prompt: [B] float32."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures cannot be asked about {len(prompts)} prompts")
        asked = [rewards.question(prompt) for prompt in prompts]
        return np.asarray(rewards.yes(*self.read(images, rewards.ANSWERS * len(asked), asked)))

    def describe(self, images):
        """What the model says to each picture when given its instruction: a list of strings."""
        return self.answer(images, self.umm.instruction)

    def answer(self, images, question, max_words=32):
        """The model's most probable answer to one question about each picture, of `max_words` tokens at most: a list of
        strings."""
        answers = [None] * len(images)
        for rows, seen in self._look(images):
            with jax.set_mesh(self.mesh):
                texts = self.umm.answer(self.params, seen, question, jax.random.key(0), max_words)
            for i, text in zip(rows, texts):
                answers[i] = text
        return answers

    def _look(self, images):
        """Pictures as the understanding branch sees them, those of one size together, BATCH at a time: pairs of their
        places in the list and seen [b, ..].

        The last batch of a size is filled up from its beginning: what is read twice is the same twice.
        """
        batch, sizes = min(BATCH, len(images)), {}
        for i, image in enumerate(images):
            sizes.setdefault(self.umm.fitted_size(np.shape(image)[:2]), []).append(i)
        for rows in sizes.values():
            for start in range(0, len(rows), batch):
                chunk = [rows[i % len(rows)] for i in range(start, start + batch)]
                yield chunk, self._see(self.params, jnp.asarray(np.stack([self.umm.fit(images[i]) for i in chunk])))

    def refusal(self, size):
        """Why a picture of `size` (height, width) pixels cannot be read, in one line (str); None where it can."""
        try:
            self.umm.fitted_size(size)
        except ValueError as error:
            return str(error)
        return None
