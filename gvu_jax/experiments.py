"""The claims of the GvU paper in the shapes world: each experiment is a list of settings, trained with several seeds.

    python -m gvu_jax.experiments --config=configs/shapes.py --name=reward --out=evidence [--seeds=3]

    normal           GvU on a base that draws about half of its prompts rightly
    weak             on one that was taught to draw badly
    understanding    what becomes of its reading, with and without the anchor
    words            the reward of pictures that are drawn without a prompt's numbers, colors or relations
    teacher          who judges, the base or the policy, and what it sees, pixels or tokens
    reward           what one number is made of the probabilities of the words
    group            pictures of a prompt, at as many pictures a step
    cost             what reading image tokens instead of pixels, and one diffusion step instead of two, save and lose
    beta             KL to the base; at 0, and with the policy its own judge, what collapse looks like
    oracle           the ceiling: the verdict of the checker on the pixels, which no method has, as the reward
    gap              GvU against learning from accepted pictures (Internal Gap, configs/shapes_gap.py) and the ceiling
    methods          all methods on one base, and the ceiling
    uae              picture -> caption -> picture (configs/shapes_uae.py): both stages in turn, and each alone
    all              all of these

Seeds vary the base and its training alike. Runs lie in OUT/runs and serve every experiment that has their settings;
arms with the same base share it in config.cache. Given again, the command goes on where it stopped, and does not repeat
what is finished. Writes OUT/results.json, OUT/experiments.json (what was compared) and OUT/report.html, of the
experiment named last, and prints its table: means over the seeds with 95 % of Student's t.
"""
import json
import re
import runpy
from pathlib import Path

import numpy as np
from absl import flags
from flax import traverse_util

import gvu_jax
from gvu_jax import cli, report, rewards, train
from gvu_jax.metrics import read_json, replace_file
from gvu_jax.shapes import checker, suite, world
from gvu_jax.stop import STOPPED, Stop

ALONE = {"reward.teacher": "policy", "gvu.anchor": 0.0}          # the policy judges itself: nothing holds its reading
SAME_EVALUATION = {"eval.prompts": 24, "eval.group": 12}         # else as many as a step has
UAE = {"config": "configs/shapes_uae.py"}
ARMS = {                                                         # {} is the config as given
    "normal": [{}],
    "weak": [{"pretrain.backbone.mismatched": 0.6}],                                          # the preset of this name
    "understanding": [{}, {"gvu.anchor": 0.0}],
    "words": [{}],
    "teacher": [{}, {"gvu.anchor": 0.0}, ALONE, {"reward.view": "tokens"}],
    "reward": [{}, *({"reward.mean": mean} for mean in ("product", "minimum", "yes"))],
    "group": [{"gvu.group": group, "gvu.prompts": 288 // group} | SAME_EVALUATION for group in (2, 4, 8, 16)],
    "beta": [{}, *({"gvu.beta": beta} for beta in (0.5, 0.1, 0.004, 0.0)), {"gvu.beta": 0.0} | ALONE],
    "cost": [{}, {"reward.view": "tokens"}, {"model.override.diffusion_steps": 1}],
    "oracle": [{}, {"reward.mean": "oracle"}],
    "gap": [{}, *({"config": f"configs/shapes_gap.py:{preset}"} for preset in ("sft", "csft", "dpo", "cdpo")),
            *({"config": f"configs/shapes_gap.py:{preset}", "internal_gap.group": 2} for preset in ("sft", "csft")),
            {"reward.mean": "oracle"}],
    "methods": [{}, *({"config": f"configs/shapes_gap.py:{preset}"} for preset in ("sft", "csft", "dpo", "cdpo")), UAE,
                {"reward.mean": "oracle"}],
    "uae": [UAE, UAE | {"uae.stages": "draw:1"}, UAE | {"uae.stages": "caption:1", "steps": 200}],
}
ARMS["all"] = [dict(arm) for arm in dict.fromkeys(tuple(arm.items()) for arms in ARMS.values() for arm in arms)]
PARTS = ("exact", "objects", "haze", "auc", "understanding", "judgement", "unified")       # of a summary, measured
PROMPTS, GROUP = 64, 4                                         # of drop_words: prompts a kind, pictures a prompt

_NAME = flags.DEFINE_enum("name", None, list(ARMS), "Which experiment.", required=True)
_OUT = cli.path_flag("out", "Folder for runs and results; the same for all experiments.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each arm: seed and pretrain.seed are 0, 1, ..", lower_bound=1)


def main(_):
    if flags.FLAGS.config is None:
        raise ValueError("--config is missing: give configs/shapes.py, or, for a first impression, "
                         "configs/shapes.py:smoke")
    with Stop() as stop:
        if run(_NAME.value, flags.FLAGS.config, Path(_OUT.value), _SEEDS.value, stop) is None:
            return STOPPED


def run(name, config, out, seeds, stop=Stop()):
    """Trains what experiment `name` compares, `seeds` runs of each arm, and writes and prints what came out.

    Returns the results (dict), or None where `stop` ended it before its time. ValueError where `out` holds runs with
    other settings than `config` (ConfigDict) has.
    """
    if not config.get("world"):
        raise ValueError("the experiments need a world with a checker: give --config=configs/shapes.py")
    arms = []
    for overrides in ARMS[name]:
        arm = {"label": label(overrides), "overrides": overrides, "runs": []}
        for seed in range(seeds):
            folder = Path("runs") / re.sub(r"[^\w.=]+", "_", arm["label"]) / f"seed{seed}"
            if not finish(config, overrides | {"seed": seed, "pretrain.seed": seed}, out / folder, stop):
                return None
            arm["runs"].append(str(folder))
        arms.append(arm)
    replace_file(out / "experiments.json", json.dumps({"name": name, "arms": arms}, indent=1))
    measured = [measure(arm, [read_json(out / folder / "summary.json") for folder in arm["runs"]]) for arm in arms]
    results = {"name": name, "seeds": seeds, "arms": measured}
    if name in ("words", "all"):
        results["words"] = measure_words([out / folder for folder in arms[0]["runs"]])
    replace_file(out / "results.json", json.dumps(results, indent=1))
    print(table(results), f"\n{out}: report in {report.write_comparison(out)}")
    return results


def label(overrides):
    """What a table calls an arm."""
    told = [f"{key}={value}" for key, value in overrides.items() if key not in SAME_EVALUATION]
    return ", ".join(told) or "as given"


def finish(config, overrides, folder, stop):
    """Trains a run to its end, unless it is there already. False where `stop` came first."""
    config = configure(config, overrides)
    summary, settings = folder / "summary.json", folder / "config.json"
    if summary.exists() and "after" in read_json(summary) and not cli.differing(
            json.loads(config.to_json()), read_json(settings)):
        return True
    print(f"{folder}: training", flush=True)
    (folder / "words.json").unlink(missing_ok=True)                                   # of what the run was before
    return train.train(config, folder, stop) is not None


def configure(config, overrides):
    """The config of an arm: the given one, or that of the file "config" with the same base and evaluation, and what
    else is said."""
    overrides = dict(overrides)
    if other := overrides.pop("config", None):
        path, _, preset = other.partition(":")
        if not Path(path).exists():
            raise ValueError(f"there is no {path} here: start the experiments where the folder configs is")
        other = runpy.run_path(path)["get_config"](*[preset] * bool(preset))
        other.update({name: config[name] for name in ("cache", "mesh", "family", "model", "world", "pretrain")})
        other.eval.update(batches=config.eval.batches, choices=config.eval.choices)
        config = other
    config = config.copy_and_resolve_references()
    with config.unlocked():                                    # model.override and eval.group may be new to a config
        config.update(traverse_util.unflatten_dict(overrides, sep="."))
    return config


def measure(arm, summaries):
    """An arm with {"before" | "after" | "change": {measure: [mean, low, high]}} over the summaries of its runs, and
    "minutes", training and evaluation without the base's pretraining. A measure that some run lacks (an AUC where all
    pictures are right) is left out."""
    minutes = [(summary["timings"]["training"] + summary["timings"]["evaluation"]) / 60 for summary in summaries]
    found = {}
    for summary in summaries:                                  # before training the base's pictures are the model's own
        own = summary.get("judgement_before", {})
        own |= {f"{name}_on_base": value for name, value in own.items()}
    for moment in ("before", "after"):
        found[moment] = [summary[moment] | {f"{part} {name}": summary[f"{part}_{moment}"][name]
                                            for part in PARTS
                                            for name in summary.get(f"{part}_{moment}", {})} for summary in summaries]
    shared = [name for name in found["after"][0] if all(name in values for runs in found.values() for values in runs)]
    found["change"] = [{name: after[name] - before[name] for name in shared}
                       for before, after in zip(found["before"], found["after"])]
    return arm | {"minutes": interval(minutes)} | {
        moment: {name: interval([values[name] for values in runs]) for name in shared}
        for moment, runs in found.items()}


def interval(values):
    """[mean, low, high]: 95 % of Student's t over the seeds; with one seed there is no interval, but two None."""
    mean, half = report.mean_interval(values).values()
    return [mean, None, None] if half is None else [mean, mean - half, mean + half]


def measure_words(folders):
    """{kind of words: {"full" | "removed" | "change": [mean, low, high]}} over runs; each keeps what it gave."""
    runs = []
    for folder in folders:
        if not (folder / "words.json").exists():
            drops = drop_words(gvu_jax.load(folder), gvu_jax.load(folder / "base"))
            replace_file(folder / "words.json", json.dumps(drops, indent=1))
        runs.append(read_json(folder / "words.json"))
    return {kind: {name: interval([run[kind][name] for run in runs]) for name in runs[0][kind]} for kind in runs[0]}


def drop_words(policy, teacher):
    """What numbers, colors and relations are worth: {kind: {"full", "removed", "change"}}, mean rewards, and the same
    under "kind (checker)", shares of right pictures, and "kind (exact)", shares of exact ones.

    The policy draws held-out prompts as they are, and again without their words of one kind; the teacher (both are
    gvu_jax.Model) and the checker judge all pictures by the full prompts. What a word did for the picture is what its
    loss costs.
    """
    rng, held_out, rows = np.random.default_rng(0), world.split_prompts()[1], []
    for kind in suite.WORDS:
        pairs = [(kind, meta, suite.remove_words(meta["prompt"], kind)) for meta in held_out]
        pairs = [(kind, meta, less) for kind, meta, less in pairs if less != meta["prompt"]]
        rows += [pairs[i] for i in rng.permutation(len(pairs))[:PROMPTS]]
    kinds, metas, less = map(list, zip(*rows))
    pictures = policy.generate([meta["prompt"] for meta in metas] + less, images_per_prompt=GROUP)
    pictures = pictures.reshape(-1, *pictures.shape[2:])
    asked = [meta for meta in metas + metas for _ in range(GROUP)]
    reward = rewards.geometric_mean(*teacher.read(pictures, [meta["prompt"] for meta in asked]))
    verdicts = checker.judge(pictures.astype(np.float32) / 255, asked)
    kinds, found = np.array(kinds), {}
    for name, values in ("{}", reward), ("{} (checker)", verdicts.right), ("{} (exact)", verdicts.exact):
        values = np.asarray(values, np.float64).reshape(2, len(rows), GROUP).mean(axis=2)
        for kind in suite.WORDS:
            drawn, without = values[:, kinds == kind].mean(axis=1).tolist()
            found[name.format(kind)] = {"full": drawn, "removed": without, "change": without - drawn}
    return found


def table(results):
    """The results as text: every measure of a single arm, else what was drawn and read overall."""
    few = lambda arm: list(arm["after"]) if len(results["arms"]) == 1 else [
        "overall", "exact overall", "objects overall", "haze overall", "auc overall", "understanding four_way",
        "understanding relation", "understanding count", "understanding binding", "judgement non_unification",
        "judgement accuracy_on_base", "judgement auc_on_base", "judgement non_unification_by_words",
        *(f"unified {name}" for name in ("recovery", "complete", "correct", "language"))]
    labels = [arm["label"] for arm in results["arms"]]
    wide = 2 + max(map(len, (*labels, "reward of pictures, share of right")))
    start = lambda first, second: f"{first:<{wide}}{second:<38}"
    head = lambda first, second, *names: start(first, second) + "".join(f"{n:>9}" for n in names) + "   95 %"
    lines = [head("arm", "measure", "before", "after", "change")]
    row = lambda first, second, *parts: start(first, second) + "".join(f"{p[0]:9.3f}" for p in parts) + (
        f"   [{parts[-1][1]:+.3f}, {parts[-1][2]:+.3f}]" if parts[-1][1] is not None else "")
    lines += [row(arm["label"], name, arm["before"][name], arm["after"][name], arm["change"][name])
              for arm in results["arms"] for name in few(arm) if name in arm["after"]]
    lines += [start(arm["label"], "minutes") + f"{arm['minutes'][0]:18.1f}" for arm in results["arms"]]
    if "words" in results:
        lines += ["", head("reward of pictures, share of right", "drawn without", "full", "removed", "change")]
        lines += [row("", kind, *found.values()) for kind, found in results["words"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
