"""Evaluates a checkpoint, or pictures, on a suite.

    python -m gvu_jax.evaluate --checkpoint=DIR --suite=shapes --out=DIR [--prompts=192] [--images_per_prompt=4]
    python -m gvu_jax.evaluate --suite=questions --judge=DIR --pictures=DIR --out=DIR

    shapes           held-out prompts of the shapes world judged by its exact checker: pictures that are right, those
                     that show nothing else besides (exact), objects a picture, haze where nothing stands; AUC and
                     calibration of the intrinsic reward; understanding by likelihood
    understanding    multiple choice by likelihood: the tests of the shapes world, or those of a TSV file of VLMEvalKit
                     (--tsv=MMT-Bench_VAL.tsv), of which rows that cannot be asked are left out and counted by reason
    nonunification   the share of its own pictures that the model rejects: no to "Does this image describe ..?"
    cycle            prompt -> picture -> caption: the share of the prompt's words that the caption says again
    unified          picture -> caption -> picture: similarity to the vision encoder, length of the captions, and in the
                     shapes world what its checker says of captions and pictures; of rendered scenes, or of
                     --pictures=FOLDER. --prompts counts pictures, --images_per_prompt captions, each drawn once. With
                     --scorers=hf:openai/clip-vit-large-patch14,hf:facebook/dinov2-large also what these encoders from
                     outside say, as in Unified-Bench: mean, least, greatest, and the mean of all means
    questions        another model, --judge, is asked about each picture whether what the prompt's metadata say is so
                     (questions.py). --checkpoint draws the pictures, or they are those of --pictures: of GenEval's
                     layout, or 00000_0.png .. by the places of the prompts in --prompt_file. With neither they are
                     renderings of the shapes world, true and damaged ones, by which the judge itself is judged

Nonunification, cycle and questions draw held-out prompts of the shapes world, or those of --prompt_file (.txt, .jsonl,
.json, .csv, a folder, tfds:..; --prompt_key says where the text stands). Prints a table and writes OUT/results.json,
OUT/samples.png where pictures are drawn, and OUT/answers.jsonl with all questions. Intervals hold 95 %: a bootstrap
over prompts, questions or pictures.
"""
import collections
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags

import gvu_jax
from gvu_jax import cli, data, questions, scorers, suite
from gvu_jax.closeup import sample_grid
from gvu_jax.methods.uae import Loop
from gvu_jax.metrics import replace_file
from gvu_jax.pictures import image_grid, write_picture
from gvu_jax.sampling import How
from gvu_jax.shapes import checker, world
from gvu_jax.shapes import suite as shapes_suite
from gvu_jax.umm import compile_programs

_CHECKPOINT = cli.path_flag("checkpoint", "A run's folder, a model folder or a name, hf:OWNER/NAME.")
_ADAPTER = cli.path_flag("adapter", "A folder of peft's (convert --export=peft) to lay over the checkpoint's model.")
_SUITE = flags.DEFINE_enum("suite", None, ["shapes", "understanding", "nonunification", "cycle", "unified",
                                           "questions"], "What to measure.", required=True)
_JUDGE = cli.path_flag("judge", "Who is asked in questions: a run's folder, a model folder or a name, hf:OWNER/NAME.")
_OUT = cli.path_flag("out", "Folder for results.json.", required=True)
_PROMPTS = flags.DEFINE_integer("prompts", 192, "Held-out prompts, evenly over the categories.", lower_bound=6)
_PROMPT_FILE = cli.path_flag("prompt_file", "Prompts of nonunification, cycle and questions, instead of the "
                            "world's.")
_PROMPT_KEY = flags.DEFINE_string("prompt_key", "prompt", "Where a prompt stands in JSON; a/b is b in a.")
_IMAGES = flags.DEFINE_integer("images_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.", lower_bound=0.0)
_PICTURES = cli.path_flag("pictures", "A folder of pictures for unified, instead of rendered scenes, or for questions.")
_MOST = flags.DEFINE_integer("most", None, "unified: the most objects of a rendered scene; without it, nine.",
                             lower_bound=1)
_SCORERS = flags.DEFINE_list("scorers", [], "unified: vision encoders from outside that say how alike two pictures "
                             "are, several with commas: folders or names of CLIP, DINOv2, DINOv3, SigLIP, LongCLIP.")
_WORDS = flags.DEFINE_integer("words", 64, "Most tokens of a caption of unified.", lower_bound=2)
_CHOICES = flags.DEFINE_integer("choices", 288, "Questions of each understanding test.", lower_bound=1)
_TSV = cli.path_flag("tsv", "Multiple-choice questions in the format of VLMEvalKit, for understanding.")
_QUESTION = flags.DEFINE_string("question", "Describe the image in detail.", "What cycle asks about each picture.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts and of the pictures.", 0, 2**31 - 1)
_BATCH = flags.DEFINE_integer("batch", 24, "Prompts, or pictures of unified, at a time: fewer where memory is short.",
                              lower_bound=1)


def main(_):
    if _TSV.value and _SUITE.value != "understanding":
        raise ValueError("--tsv goes with --suite=understanding")
    if _PROMPT_FILE.value and _SUITE.value not in ("nonunification", "cycle", "questions"):
        raise ValueError("--prompt_file goes with --suite=nonunification, --suite=cycle and --suite=questions")
    if _PICTURES.value and _SUITE.value not in ("unified", "questions"):
        raise ValueError("--pictures goes with --suite=unified and --suite=questions")
    if _SCORERS.value and _SUITE.value != "unified":
        raise ValueError("--scorers goes with --suite=unified")
    if bool(_JUDGE.value) != (_SUITE.value == "questions"):
        raise ValueError("--suite=questions needs a --judge, who is asked, and no other suite has one")
    if not _CHECKPOINT.value and _SUITE.value != "questions":
        raise ValueError("--checkpoint is missing: give a run's folder, a model folder or a name, hf:OWNER/NAME")
    if _SUITE.value == "questions" and bool(_CHECKPOINT.value) < bool(_ADAPTER.value):
        raise ValueError("--adapter is laid over --checkpoint, which is missing")
    if _SUITE.value == "questions" and _CHECKPOINT.value and _PICTURES.value:
        raise ValueError("--checkpoint draws pictures, and --pictures has some already: give one of the two")
    left_out = collections.Counter()
    choices = data.read_choices(_TSV.value, left_out) if _TSV.value else None
    metas = data.read_prompts(_PROMPT_FILE.value, _PROMPT_KEY.value) if _PROMPT_FILE.value else None
    if _PICTURES.value and _SUITE.value == "unified":
        data.check_pictures(_PICTURES.value)
    for source in _SCORERS.value:
        scorers.place(source)
    drawn = data.drawn_pictures(_PICTURES.value, metas) if _PICTURES.value and _SUITE.value == "questions" else None
    cli.keep_compiled()
    given, out = {"adapter": _ADAPTER.value} if _ADAPTER.value else {}, Path(_OUT.value)
    model = gvu_jax.load(_CHECKPOINT.value, **given) if _CHECKPOINT.value else None
    if model:
        check_world(model, choices or metas or _PICTURES.value)
    out.mkdir(parents=True, exist_ok=True)
    if _SUITE.value == "questions":
        results, picture, told = asked_about(model, metas, drawn)
        replace_file(out / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in told))
    elif _SUITE.value == "shapes":
        results, picture = shapes(model)
    elif _SUITE.value == "understanding":
        results, picture = understanding(model, choices, left_out), None
    elif _SUITE.value == "unified":
        results, picture = unified(model)
    else:
        results, picture = own_pictures(model, metas)
    print(table(results))
    given |= {name: str(flag.value) for name, flag in (("judge", _JUDGE), ("folder", _PICTURES)) if flag.value}
    given |= {"scorers": _SCORERS.value} if _SCORERS.value else {}
    results = {"suite": _SUITE.value, "checkpoint": _CHECKPOINT.value and str(_CHECKPOINT.value), **given,
               "temperature": _TEMPERATURE.value} | results
    replace_file(out / "results.json", json.dumps(results, indent=1))
    if picture:
        write_picture(out / "samples.png", picture)


def check_world(model, given):
    """Raises ValueError where the suite takes pictures of the shapes world, no others being `given`, and the model is
    of another one."""
    instead = {"shapes": "another --suite", "understanding": "--tsv=FILE", "nonunification": "--prompt_file=FILE",
               "unified": "--pictures=FOLDER", "questions": "--prompt_file=FILE"}
    if _SUITE.value in instead and not given and not model.umm.of_shapes:
        raise ValueError(f"{_CHECKPOINT.value} is no model of the shapes world, whose pictures --suite={_SUITE.value} "
                         f"takes: give {instead[_SUITE.value]}")


def shapes(model):
    """The results of the shapes world, and a grid of pictures."""
    metas, batched = build_shapes(model)
    pictures, rewards, verdicts = batched.sample(model.params, model.params)
    (_, found), tested, right = batched.grade(rewards, verdicts), batched.choices(model.params), verdicts.right
    calibration = {"overall": suite.reliability(rewards, right)} | {
        tag: suite.reliability(rewards[rows], right[rows]) for tag, rows in suite.rows_by_tag(metas).items()}
    results = {"pictures": int(right.size), **with_intervals(suite.by_category(right, metas)),
               "exact": with_intervals(suite.by_category(verdicts.exact, metas)),
               "objects": with_intervals(suite.by_category(verdicts.objects, metas)) | {"asked": found["asked"]},
               "haze": with_intervals(suite.by_category(verdicts.haze, metas)),
               "reward": float(rewards.mean()), "auc": found["auc"], "calibration": calibration,
               "understanding": with_intervals({name: share(chosen) for name, chosen in tested.items()})}
    return results, sample_grid(pictures, metas, verdicts.marks)


def build_shapes(model):
    """The prompts and the Suite (see shapes/suite.py)."""
    train, held_out = world.split_prompts()
    how = How(images_per_prompt=_IMAGES.value, temperature=_TEMPERATURE.value, guidance=model.umm.guidance)
    metas = suite.choose_prompts(held_out, whole_batches(), np.random.default_rng(_SEED.value))
    lengths = model.umm.lengths([meta["prompt"] for meta in train + held_out])
    return metas, shapes_suite.build(
        model.umm, compile_programs(model.umm, how, model.mesh), metas, _BATCH.value, _IMAGES.value, _CHOICES.value,
        lengths, world.compositions(held_out), _SEED.value)


def understanding(model, choices, left_out):
    """The shares of questions answered rightly: of data.read_choices, or, where these are None, of the shapes world.
    left_out: the Counter of read_choices; what turns out to be no picture or no text to this model is left out, too."""
    if choices is None:
        tested = build_shapes(model)[1].choices(model.params)
        return with_intervals({name: share(chosen) for name, chosen in tested.items()})
    asked, refusals, broken, unread = [], [], [], []
    for choice in choices:
        try:
            refusal = model.refusal(data.decode_choice(choice).shape[:2])
        except ValueError as error:
            left_out["whose picture cannot be read"] += 1
            broken.append(str(error))
            continue
        if refusal:
            refusals.append(f"{choice['name']}: {refusal}")
            continue
        try:                                                            # one row's text ends no other row
            model.umm.lengths(choice["options"], [choice["question"]] * len(choice["options"]))
        except ValueError as error:
            left_out["whose text the model does not take"] += 1
            unread.append(f"{choice['name']}: {error}")
            continue
        asked.append(choice)
    if not asked:
        told = [data.count_reasons(left_out)] * bool(left_out) + refusals[:1] + broken[:1] + unread[:1]
        raise ValueError(f"no question can be asked: {'; '.join(told)}")
    for what, told in ("pictures cannot be read", broken), ("rows have text that the model does not take", unread):
        if told:
            print(f"note: {len(told)} {what}. The first: {told[0]}", file=sys.stderr)
    right = suite.choose(model, asked)
    metas = [{"prompt": choice["name"], "tag": choice["category"]} for choice in asked]
    found = {"overall": share(right)} | {tag: share(right[rows]) for tag, rows in suite.rows_by_tag(metas).items()}
    return {"questions": len(asked), "refused": len(refusals), "left_out": dict(left_out), **with_intervals(found)}


def own_pictures(model, metas):
    """Nonunification and cycle: how the model reads what it draws for `metas`, or, where these are None, for held-out
    prompts of the shapes world, whose checker then says which pictures it should have rejected."""
    judged = metas is None
    if judged:
        metas = suite.choose_prompts(world.split_prompts()[1], _PROMPTS.value, np.random.default_rng(_SEED.value))
    prompts, how = [meta["prompt"] for meta in metas], How(temperature=_TEMPERATURE.value, guidance=model.umm.guidance)
    pictures = model.generate(prompts, _SEED.value, _IMAGES.value, how, _BATCH.value)
    if _SUITE.value == "cycle":
        captions, found = suite.cycle(model, pictures, prompts, _QUESTION.value)
        examples = dict(zip(prompts, captions[::_IMAGES.value]))
        return {**with_intervals(suite.by_category(found, metas)), "captions": examples}, sample_grid(pictures, metas)
    believed = suite.unify(model, pictures, prompts)
    results = {"yes": float(believed.mean()), **with_intervals(suite.by_category(believed < 0.5, metas))}
    if judged:
        each = [meta for meta in metas for _ in range(_IMAGES.value)]
        verdicts = checker.judge(pictures.reshape(-1, *pictures.shape[2:]) / np.float32(255), each)
        right, exact = (of.reshape(believed.shape) for of in (verdicts.right, verdicts.exact))
        results["rejected_of"] = {
            name: {"pictures": int(rows.sum()), "share": float((believed[rows] < 0.5).mean()) if rows.any() else None}
            for name, rows in {"wrong": ~right, "right": right, "exact": exact}.items()}
        results["auc"] = {"overall": suite.auc(believed, right)}
    return results, sample_grid(pictures, metas, believed >= 0.5)


def asked_about(model, metas, drawn):
    """What --judge answers about pictures: the results, a grid of pictures (None where they differ in size), and what
    was asked and answered, dicts.

    drawn: (prompts, pictures) of data.drawn_pictures; or None, and `model` draws `metas`, or, where these are None,
    held-out prompts of the shapes world; without a model these are rendered, rightly and wrongly.
    """
    judge = gvu_jax.load(_JUDGE.value)
    of_world = drawn is None and metas is None
    if of_world:
        metas = suite.choose_prompts(world.split_prompts()[1], _PROMPTS.value, np.random.default_rng(_SEED.value))
    if drawn is None and model is None and not of_world:
        raise ValueError("--prompt_file needs pictures: give --checkpoint, which draws them, or --pictures")
    if drawn is None and model is None:
        pictures = shapes_suite.renderings(metas, np.random.default_rng(_SEED.value))
    if drawn is not None:
        metas, pictures = drawn
    atoms = questions.atoms_for(judge.umm, metas)                       # before anything is drawn
    if model is not None:
        how = How(temperature=_TEMPERATURE.value, guidance=model.umm.guidance)
        pictures = model.generate([meta["prompt"] for meta in metas], _SEED.value, _IMAGES.value, how, _BATCH.value)
    for size in {picture.shape[:2] for of_prompt in pictures for picture in of_prompt}:
        if refusal := judge.refusal(size):
            raise ValueError(f"the judge cannot read these pictures: {refusal}")
    answers = questions.judge(judge, pictures, atoms)
    found = questions.scores(answers, metas)
    results = {"pictures": int(answers.hard.size), "questions": sum(map(np.size, answers.chosen)),
               **{name: with_intervals(of) for name, of in found.items()}}
    if of_world:                       # its own models read captions, which tell all there is
        each = [meta for meta in metas for _ in pictures[0]]
        verdicts = checker.judge(np.concatenate(pictures) / np.float32(255), each)
        true = (verdicts.exact if judge.umm.of_shapes else verdicts.right).reshape(answers.hard.shape)
        results["agreement"] = with_intervals(suite.by_category(answers.hard == true, metas))
        results["agreement"]["auc"] = {"overall": suite.auc(answers.soft, true)}
        results["accepted_of"] = {name: {"pictures": int(rows.sum()), "share": float(answers.hard[rows].mean())}
                                  for name, rows in (("true", true), ("damaged or wrong", ~true)) if rows.any()}
    whole = len({picture.shape for of_prompt in pictures for picture in of_prompt}) == 1
    grid = sample_grid(np.stack(list(map(np.stack, pictures))), metas, answers.hard) if whole else None
    return results, grid, questions.lines(answers, metas)


def unified(model):
    """What survives picture -> caption -> picture, and a grid: each picture, and what was drawn from its captions. With
    scorers from outside, as in Unified-Bench: the mean, least and greatest of each, and the mean of their means."""
    size = model.umm.picture_size
    stream = (data.picture_stream(_PICTURES.value, size, _SEED.value) if _PICTURES.value else
              shapes_suite.picture_stream((_SEED.value, 1), 1.0, shapes_suite.place_of(model.umm), _MOST.value))
    examples = data.batch(stream, 0, whole_batches())
    originals = np.stack([example["pixels"] for example in examples])
    how = How(images_per_prompt=_IMAGES.value, temperature=_TEMPERATURE.value, guidance=model.umm.guidance)
    outside = scorers.Scorers(dict.fromkeys([scorers.OWN, *_SCORERS.value], 1.0), model.mesh)
    found, captions, pictures = suite.Unified(
        Loop(model.umm, how, model.mesh, _WORDS.value, outside=outside), originals, _BATCH.value, _SEED.value,
        None if _PICTURES.value else shapes_suite.judge_captions).measure(model.params, model.params)
    texts = [of_picture[0] for of_picture in captions]
    # A folder of few pictures is gone through more than once: a picture goes with all of its repetitions.
    each = [{"prompt": hashlib.sha256(original.tobytes()).hexdigest()} for original in originals]
    results = with_intervals({name: suite.by_category(values, each)["overall"] for name, values in found.items()})
    if names := [scorer.name for scorer in outside.each]:
        results["bench"] = {name: {"mean": float(found[name].mean()), "min": float(found[name].min()),
                                   "max": float(found[name].max())} for name in names}
        results["bench"]["overall"] = float(np.mean([results["bench"][name]["mean"] for name in names]))
    shown = np.concatenate([np.round(originals[:, None] * 255).astype(np.uint8), pictures], axis=1)[:12, :7]
    return ({"pictures": len({meta["prompt"] for meta in each}), **results, "captions": texts},
            image_grid(shown, texts[:12], max(1, 96 // size[0])))


def whole_batches():
    """--prompts, rounded up to whole batches."""
    return -(-_PROMPTS.value // _BATCH.value) * _BATCH.value


def share(right):
    """[mean, low, high] of independent answers, bool [M]."""
    return suite.by_category(right[:, None], [{"prompt": str(i)} for i in range(len(right))])["overall"]


def with_intervals(found):
    """{name: [mean, low, high]} -> the parts of results.json."""
    return {"scores": {name: mean for name, (mean, *_) in found.items()},
            "intervals": {name: interval for name, (_, *interval) in found.items()}}


def table(results, heading=""):
    """The results as text: a line for each score, with its interval and, where there is one, its AUC, or what was asked
    for."""
    last, beside = ("asked", results["asked"]) if "asked" in results else ("AUC", results.get("auc", {}))
    lines = [f"{heading:<28}{'score':>8}{'95 %':>17}{last:>8}"[:None if beside else -8]] * ("scores" in results)
    for name, score in results.get("scores", {}).items():
        low, high = results["intervals"][name]
        other = f"{beside[name]:8.3f}" if beside.get(name) is not None else ""
        lines.append(f"{name:<28}{score:8.3f}  [{low:6.3f},{high:6.3f}]{other}")
    if results.get("refused"):
        lines.append(f"left out: {results['refused']} questions whose pictures the model's tokenizer refuses")
    if results.get("left_out"):
        lines.append(f"left out: {data.count_reasons(results['left_out'])}")
    for part, title in (("exact", "right and nothing else"), ("objects", "objects a picture"),
                        ("haze", "haze where nothing stands"), ("understanding", "understanding"),
                        ("soft", "geometric mean"), ("hard", "all answers right"),
                        ("skills", "each question, mean"), ("agreement", "agrees with the checker")):
        if part in results:
            lines += [""] * bool(lines) + [table(results[part], title)]
    for name, found in results.get("bench", {}).items():
        lines.append(f"{name:<28}{found:8.3f}" if name == "overall" else
                     f"{name:<28}{found['mean']:8.3f}  from {found['min']:.3f} to {found['max']:.3f}")
    for name, found in results.get("accepted_of", {}).items():
        lines.append(f"all right, of {found['pictures']} {name}".ljust(28) + f"{found['share']:8.3f}")
    for name, found in results.get("rejected_of", {}).items():
        if found["pictures"]:
            lines.append(f"of {found['pictures']} {name} ones".ljust(28) + f"{found['share']:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
