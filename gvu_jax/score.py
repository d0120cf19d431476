"""Asks a model how well a picture fits a prompt, word by word: the intrinsic reward of GvU.

    python -m gvu_jax.score --checkpoint=DIR --image=PNG --prompt="a photo of a red circle" [--heatmap=out.png]

Prints the reward, the geometric mean over the prompt's tokens, and the probability of each word. --heatmap draws the
picture beside the words, each on the colour of its probability.
"""
import sys
from pathlib import Path

from absl import flags

import gvu_jax
from gvu_jax import cli
from gvu_jax.data import read_picture
from gvu_jax.decode import FORMATS
from gvu_jax.pictures import picture_kind, word_heatmap, write_picture

_CHECKPOINT = cli.path_flag("checkpoint", "A run's folder, a model folder or a name, hf:OWNER/NAME.", required=True)
_ADAPTER = cli.path_flag("adapter", "A folder of peft's (convert --export=peft) to lay over the checkpoint's model.")
_IMAGE = cli.path_flag("image", f"The picture: {', '.join(FORMATS)}.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "What the picture should show.", required=True)
_HEATMAP = cli.path_flag("heatmap", "Where to draw the words' probabilities, e.g. out.png.")


def main(_):
    if not _PROMPT.value.strip():
        raise ValueError("--prompt is empty: it needs at least one word")
    if _HEATMAP.value:
        picture_kind(_HEATMAP.value)
    cli.keep_compiled()
    picture, model = read_picture(_IMAGE.value), gvu_jax.load(
        _CHECKPOINT.value, **({"adapter": _ADAPTER.value} if _ADAPTER.value else {}))
    score = model.score(picture[None], [_PROMPT.value])[0]
    print(f"{'reward':>11}  {figure(score.reward)}\n{'probability':>11}  word")
    for word, probability in zip(score.words, score.probabilities):
        print(f"{figure(probability):>11}  {word}")
    tokenizer = model.umm.tokenizer
    if unknown := [word for word in score.words if tokenizer.unk_token_id in tokenizer(word)["input_ids"]]:
        print(f"note: this model does not know {', '.join(unknown)}; it reads {tokenizer.unk_token}", file=sys.stderr)
    if _HEATMAP.value:
        Path(_HEATMAP.value).parent.mkdir(parents=True, exist_ok=True)
        write_picture(_HEATMAP.value, word_heatmap(picture, score.words, score.probabilities, score.reward))


def figure(probability):
    """Four decimals, or an exponent where they would all be zero."""
    return f"{probability:.4f}" if probability >= 5e-5 else f"{probability:.1e}"


if __name__ == "__main__":
    cli.run(main)
