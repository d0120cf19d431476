"""What the evaluations at the start and at the end of a run leave for its report, beside their grid of samples.

samples/before.json and samples/after.json hold

    readings      what the model makes of each word of some prompts, in one picture of each. A picture `drawn` before
                  training, or after it, is `read` by the model of before and by that of after:
                  [{"prompt", "tag", "drawn", "read", "reward", "words", "probabilities"}]
    pictures      those pictures, PNG in base64, in the same order: how the second evaluation finds those of the first
    prompts       every held-out prompt, the hardest first: [{"prompt", "tag", "score", "exact", "reward"}], means over
                  its pictures; score, the share that are right, and exact are null where nothing judges them
    reliability   how far the reward says how often pictures are right: {category: see suite.reliability}

and samples/hardest.png shows the hardest prompts of the last evaluation.
"""
import base64
import io
import json

import numpy as np
from PIL import Image

from gvu_jax.metrics import read_json, replace_file
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.suite import reliability, rows_by_tag

MOST = 6           # prompts that are read word by word, or shown as the hardest; pictures of each of these


def write_closeup(suite, policy, base, drawn, moment, workdir, notes):
    """Writes notes/samples/{moment}.json and hardest.png; moment is "before" or "after".

    policy: params. base: those of the moment before. drawn: what suite.sample returns. workdir: the run's, which all
    hosts see and where the second evaluation finds what the first has written; notes: where this process writes.
    """
    (pictures, rewards, verdicts), categories = drawn, rows_by_tag(suite.metas)
    right, exact, marks = (verdicts.right, verdicts.exact, verdicts.marks) if verdicts else (None, None, None)
    tags = {i: tag for tag, rows in categories.items() for i in np.flatnonzero(rows)}
    prompts = [meta["prompt"] for meta in suite.metas]
    groups = [np.flatnonzero(rows) for rows in categories.values()]
    places = [group[i] for i in range(MOST) for group in groups if i < len(group)][:MOST]     # of each category in turn

    def read(params, reader, drawn):
        """`drawn`: {moment: pictures uint8 [places, H, W, 3]}, read together."""
        texts = [prompts[i] for i in places] * len(drawn)
        said = suite.read_words(params, np.concatenate(list(drawn.values())).astype(np.float32) / 255, texts)
        origins = [(i, moment) for moment in drawn for i in places]
        return [{"prompt": prompts[i], "tag": tags[i], "drawn": moment, "read": reader} | what
                for (i, moment), what in zip(origins, said, strict=True)]

    shown = {moment: pictures[places, 0]}
    readings, earlier = read(base, "before", shown), workdir / "samples" / "before.json"
    if moment == "after":
        if earlier.exists():
            shown = {"before": np.stack([_from_png(png) for png in read_json(earlier)["pictures"]])} | shown
        readings += read(policy, "after", shown)

    rows_of = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in prompts}
    mean = lambda values, rows: None if values is None else float(values[rows].mean())
    means = [{"prompt": prompt, "tag": tags[rows[0]], "score": mean(right, rows), "exact": mean(exact, rows),
              "reward": mean(rewards, rows)} for prompt, rows in rows_of.items()]
    means.sort(key=lambda of: (of["score"] or 0.0, of["reward"]))
    hardest = [rows_of[of["prompt"]][0] for of in means[:MOST]]
    curves = {} if right is None else {"overall": reliability(rewards, right)} | {
        tag: reliability(rewards[rows], right[rows]) for tag, rows in categories.items()}
    replace_file(notes / "samples" / f"{moment}.json", json.dumps(
        {"readings": readings, "pictures": [_to_png(picture) for picture in pictures[places, 0]],
         "prompts": means, "reliability": curves}))
    write_picture(notes / "samples" / "hardest.png", image_grid(
        pictures[hardest][:, :MOST], [prompts[i] for i in hardest], max(1, 96 // pictures.shape[2]),
        None if marks is None else marks[hardest][:, :MOST]))


def sample_grid(pictures, metas, marks=None):
    """Two prompts of each category, up to six pictures of each, framed where something judged them.

    pictures uint8 [prompts, G, H, W, 3], marks [prompts, G] as image_grid takes them, or None.
    """
    chosen = [i for rows in rows_by_tag(metas).values() for i in np.flatnonzero(rows)[:2]][:2 * MOST]
    return image_grid(pictures[chosen][:, :MOST], [metas[i]["prompt"] for i in chosen],
                      max(1, 96 // pictures.shape[2]), None if marks is None else marks[chosen][:, :MOST])


def _to_png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_png(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
