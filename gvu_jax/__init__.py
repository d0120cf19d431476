"""gvu_jax: teach a unified multimodal model to draw what it already understands (GvU on X-Omni, in JAX).

    model = gvu_jax.load("path/of/a/run/or/model")
    pictures = model.generate(["a photo of a red circle"], seed=0)[0]        # uint8 [images_per_prompt, H, W, 3]
    model.score(pictures, ["a photo of a red circle"])[0].reward
    model.describe(pictures)
    model.answer(pictures, "Does this image describe a photo of a red circle?")
"""
import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")       # else it tells everyone that torch is not installed

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import checkpoint, rewards
from gvu_jax.methods import gvu
from gvu_jax.sampling import How


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a picture fits a prompt, in the model's own eyes."""
    reward: float                  # geometric mean of the words' probabilities, in (0, 1]
    words: list[str]               # the prompt's tokens, as text
    probabilities: np.ndarray      # [words] float32: p(word | picture, instruction, the words before)


def load(path):
    """A `Model` from a model folder, or from the newest checkpoint of a run's folder.

    Raises FileNotFoundError or ValueError with one line that says what is missing or wrong.
    """
    path = Path(path)
    if (path / "metadata.json").exists():
        return Model(*checkpoint.load_model(path))
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is neither a model folder (metadata.json) nor a run (config.json)")
    from ml_collections import ConfigDict
    config = ConfigDict(json.loads((path / "config.json").read_text()))
    umm, base = checkpoint.load_model(base_of_run(path, config))
    checkpoints = checkpoint.Checkpoints(path)
    step = checkpoints.latest()
    if step is None:
        raise FileNotFoundError(f"{path} has no checkpoint yet: the run ended before its first one")
    like = jax.eval_shape(lambda: gvu.init_trainable(base, config, jax.random.key(0)))
    trainable = checkpoints.load(step, trainable=like)["trainable"]
    checkpoints.close()
    return Model(umm, gvu.policy_params(base, trainable, config.lora))


def base_of_run(workdir, config):
    """The model folder that a run started from: its own copy, or the converted checkpoint that its config names."""
    return Path(workdir) / "base" if (Path(workdir) / "base").exists() else Path(config.model.checkpoint)


class Model:
    """A unified model and its parameters. Pictures are uint8 [B, H, W, 3], or float in [0, 1]; texts are lists."""

    def __init__(self, umm, params):
        self.umm, self.params = umm, params
        self._sample = jax.jit(umm.sample_image, static_argnames="how")
        self._render, self._see, self._read = jax.jit(umm.render), jax.jit(umm.see), jax.jit(umm.text_logps)

    def generate(self, prompts, seed=0, images_per_prompt=1, how=How(), batch=16, progress=None):
        """Draws pictures: uint8 [prompts, images_per_prompt, H, W, 3].

        A picture depends on the seed and on its place in the list, not on `batch`, the prompts drawn at a time.
        progress: called with the number of finished prompts after each batch.
        """
        how = dataclasses.replace(how, images_per_prompt=images_per_prompt)
        keys = jax.random.split(jax.random.key(seed))
        lengths, batch, pictures = self.umm.lengths(prompts), min(batch, len(prompts)), []
        for start in range(0, len(prompts), batch):
            rows = [prompts[i % len(prompts)] for i in range(start, start + batch)]     # the last batch is filled up
            encoded, first = self.umm.encode_prompts(rows, lengths), start * images_per_prompt
            tokens, _ = self._sample(self.params, encoded, keys[0], how=how, first=first)
            pixels = self._render(self.params, tokens, encoded, keys[1], first=first)
            pictures.append(np.asarray(jnp.round(pixels * 255), np.uint8).reshape(batch, images_per_prompt,
                                                                                  *pixels.shape[1:]))
            if progress:
                progress(min(batch, len(prompts) - start))
        return np.concatenate(pictures)[:len(prompts)]

    def score(self, images, prompts):
        """The intrinsic reward of each picture for its prompt, word by word: a list of `Score`."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures cannot be scored for {len(prompts)} prompts")
        encoded = self.umm.encode_prompts(prompts)
        logps, mask = self._read(self.params, self._look(images), encoded)
        reward, probabilities = np.asarray(rewards.geometric_mean(logps, mask)), np.exp(np.asarray(logps))
        return [Score(float(reward[i]), [self.umm.tokenizer.decode([t]) for t in encoded.words[i][encoded.words_mask[i]]],
                      probabilities[i][encoded.words_mask[i]]) for i in range(len(prompts))]

    def describe(self, images):
        """What the model says to each picture when given its instruction: a list of strings."""
        return self.answer(images, self.umm.instruction)

    def answer(self, images, question):
        """The model's most probable answer to one question about each picture: a list of strings."""
        return self.umm.answer(self.params, self._look(images), question, jax.random.key(0))

    def _look(self, images):
        images = np.asarray(images)
        pixels = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images
        return self._see(self.params, jnp.asarray(pixels))
