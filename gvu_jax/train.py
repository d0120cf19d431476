"""The training loop.

    python -m gvu_jax.train --config=configs/shapes.py --workdir=DIR [--config.key=value ...]

What can be set, and what it means: docs/settings.md.

Order: config -> mesh -> base model -> prompts -> method and state (resumed if DIR holds a checkpoint) -> loop ->
report. DIR gets config.json, metrics.jsonl, checkpoints/, samples/*.png, summary.json and report.html. A run that was
stopped goes on when the same command is given again; one that a signal stopped ends with status 75 (see stop.py).

On several hosts the same command runs on each of them, with a DIR that all of them see: --hosts=auto where the machines
know each other (TPU pods, Slurm), else --hosts=ADDRESS:PORT,COUNT,INDEX with the address of process 0. They wait for
each other for --hosts_timeout seconds. Each process encodes the prompts of its own devices; process 0 writes metrics
and pictures; checkpoints are written by all.
"""
import collections
import contextlib
import dataclasses
import fcntl
import json
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from ml_collections import config_flags

import gvu_jax
from gvu_jax import adapters, alarms, checkpoint, cli, data, families, hub, optim, questions, sharding
from gvu_jax.closeup import sample_grid, write_closeup
from gvu_jax.methods import method_of, parts_of
from gvu_jax.metrics import MetricsWriter, Progress, Stopwatch, read_json, replace_file
from gvu_jax.policy import State
from gvu_jax.report import write_report
from gvu_jax.sampling import How
from gvu_jax.stop import STOPPED, Stop
from gvu_jax.suite import Suite, Unified, choose_prompts
from gvu_jax.umm import check_rollout, compile_programs, in_use

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, e.g. configs/shapes.py:smoke.")
_WORKDIR = cli.path_flag("workdir", "Where the run writes; give it again to resume.")
_ADAPTER = cli.path_flag("adapter", "A folder of peft's (convert --export=peft) whose adapter the run starts from.")
_HOSTS = flags.DEFINE_string("hosts", None, "auto, or ADDRESS:PORT,COUNT,INDEX: this is process INDEX of COUNT.")
_HOSTS_TIMEOUT = flags.DEFINE_integer("hosts_timeout", 300, "How many seconds the processes of --hosts wait for each "
                                      "other.", lower_bound=1)


def main(_):
    if _CONFIG.value is None:
        raise ValueError("--config is missing: give a file of configs/, e.g. --config=configs/shapes.py:smoke")
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing: where should the run write?")
    if _ADAPTER.value:
        with _CONFIG.value.unlocked():
            _CONFIG.value.lora.adapter = _ADAPTER.value                # of the run's settings: it says what it began as
    if _HOSTS.value:
        sharding.join_hosts(_HOSTS.value, _HOSTS_TIMEOUT.value)
    with Stop() as stop, sharding.one_fails_all_fail():      # after joining, which has handlers of its own
        if train(_CONFIG.value, Path(_WORKDIR.value), stop) is None:
            return STOPPED


def train(config, workdir, stop=Stop()):
    """Runs the whole training described by `config` (ConfigDict) in `workdir`.

    Returns the run's summary (dict), or None where `stop` ended it before its time.
    """
    cli.check_numbers(config)
    method_of(config).check(config)
    parts_of(config)
    check_rollout(families.of(config).MODEL, How(**config.get("rollout", {})))
    hub.check(config.model.get("checkpoint"))
    adapters.check_start(config.lora)
    questions.check_judge(config)
    with alone(workdir):
        return train_alone(config, workdir, stop)


def train_alone(config, workdir, stop):
    """`train`, when nobody else does in `workdir`."""
    mesh, first_process = sharding.make_mesh(config.mesh), jax.process_index() == 0
    settings = config[config.method]
    how = How(images_per_prompt=settings.group, **config.sampling, **config.get("rollout", {}))
    optimizer = optim.build(config.optim, config.steps * settings.get("inner_steps", 1))
    train_metas, held_out = prompts_of(config)
    if "pictures" in config and not config.get("world"):
        for folder in (config.pictures.folder, config.pictures.held_out):
            data.check_pictures(folder)
    check_base(config, how, optimizer, mesh)
    started = time.time()
    cli.keep_compiled(config.cache)
    if first_process:
        claim(workdir, config)
        prepare_base(config, workdir)
    sharding.wait_for_all("the base model")
    notes = workdir if first_process else Path(tempfile.mkdtemp())      # what other processes write, nobody reads
    (notes / "samples").mkdir(parents=True, exist_ok=True)

    # ---- base model: pretrained here, or converted before -------------------------------------------------------
    umm, base = load_base(config, workdir, mesh)
    summary = read_json(path) if (path := workdir / "summary.json").exists() else {}
    timings = summary.setdefault("timings", {"pretraining": 0.0, "training": 0.0, "evaluation": 0.0})   # seconds,
    timings["pretraining"] += time.time() - started                             # summed over the sittings of a run
    print(", ".join(f"{name}: {parameter_overview.count_parameters(part):,} parameters" for name, part in base.items()))

    # ---- prompts, or pictures -----------------------------------------------------------------------------------
    stream, pictures = pictures_of(config, umm) if "pictures" in config else (
        data.prompt_stream(train_metas, config.seed), None)
    lengths = umm.lengths([meta["prompt"] for meta in train_metas + held_out])

    # ---- method, state, evaluation ------------------------------------------------------------------------------
    method = method_of(config)(umm, config, how, optimizer, mesh, lengths, workdir)
    root = jax.random.key(config.seed)
    state = method.init(base, sharding.put(jax.random.fold_in(root, 0), mesh))
    checkpoints = checkpoint.Checkpoints(workdir, mesh, writing=True)
    resumed = checkpoints.newest_whole()
    if resumed is not None:
        state = State(sharding.put(np.int32(resumed), mesh), **checkpoints.load(resumed, **state.saved()))
    elif config.lora.get("adapter"):
        state = adapters.start_from(state, umm, config.lora.adapter, mesh)
    suite = build_suite(config, umm, method.programs, how, held_out, lengths)
    method.judge = suite.judge                                                  # heard only by reward.mean = "oracle"
    ask = questions.build_judge(config, suite.metas)
    unified = pictures and build_unified(config, method.plain, pictures)
    if unified and settings.cold and not config.get("world"):
        data.check_captions(config.pictures.folder, method.loop.encode)

    # ---- the loop -----------------------------------------------------------------------------------------------
    first, start = int(state.step), settings.get("cold", 0)          # a cold start is over before there is a "before"
    summary["judged"] = suite.judge is not None                      # else the scores are the model's own rewards
    if first < config.steps:                                         # a longer run continues a finished one
        for name in [name for name in summary if name.endswith("after") or name == "spam"]:
            del summary[name]
        replace_file(notes / "summary.json", json.dumps(summary, indent=1))
    # A run stopped before its first checkpoint starts over, and so do its metrics: no line of theirs is kept.
    with (MetricsWriter(notes, resume_step=-1 if resumed is None else resumed) as writer,
          Progress(config.steps, "step", config.method, done=first, silent=not first_process) as progress):

        def save(step):
            checkpoints.save(step, **state.saved())
            replace_file(notes / "summary.json", json.dumps(summary, indent=1))
            stop.unsaved = False

        def evaluate(step):
            """Held-out pictures judged; at the start and the end also understanding and the reward's AUC."""
            began, thorough = time.time(), step in (start, config.steps)
            policy = method.policy(base, state.trainable)
            drawn, rewards, verdicts = suite.sample(policy, base)
            scores, found = suite.grade(rewards, verdicts)
            values = {f"eval/{name}": score for name, score in scores.items()} | {
                f"eval/{part}" + f"_{tag}" * (tag != "overall"): value
                for part in ("exact", "objects", "haze") for tag, value in found.get(part, {}).items()}
            moment = "before" if step == start else "after" if step == config.steps else f"step_{step:06d}"
            if unified:
                measured, captions, _ = unified.measure(policy, base)
                survived = {name: float(of_each.mean()) for name, of_each in measured.items()}
                values |= {f"unified/{name}": share for name, share in survived.items()}
            if ask:
                told = ask(drawn)
                values |= {f"judge/{name}": value for name, value in told.items()}
                summary.update({f"judge_{moment}": told} if thorough else {})
            if thorough:
                understanding = suite.understand(policy)
                earlier = base if state.reference is None else method.policy(base, state.reference)     # at "before"
                judged = {"": (drawn, verdicts)} | (
                    {"_on_base": suite.sample(earlier, base)[::2]} if step != start else {})
                judgement = judge_pictures(suite, policy, judged, config)
                values |= {f"understanding/{name}": score for name, score in understanding.items()}
                values |= {f"judgement/{name}": value for name, value in judgement.items()}
                summary.update({moment: {k: v for k, v in scores.items() if k != "reward"},
                                f"understanding_{moment}": understanding, f"judgement_{moment}": judgement})
                summary.update({f"{part}_{moment}": of for part, of in found.items()})
                if unified:
                    summary.update({f"unified_{moment}": survived,
                                    f"captions_{moment}": [of_picture[0] for of_picture in captions[:8]]})
                if step == start:
                    summary["auc"] = found["auc"]
                if suite.paints:
                    write_closeup(suite, policy, earlier, (drawn, rewards, verdicts), moment, workdir, notes)
            if suite.paints:
                picture = sample_grid(drawn, suite.metas, verdicts and verdicts.marks)
                picture.save(notes / "samples" / f"{moment}.png")
                writer.image(step, "samples", np.asarray(picture))
            timings["evaluation"] += time.time() - began
            replace_file(notes / "summary.json", json.dumps(summary, indent=1))
            writer.write(step, values)                                    # after the rest: it says that that is there
            if spam := alarms.spam(config.alarm, step, found, summary.get("objects_before", {})):
                summary["spam"] = spam
                replace_file(notes / "summary.json", json.dumps(summary, indent=1))

        def evaluation_due(step):
            return step in (0, start, config.steps) or step % config.eval.every == 0

        # A run that was stopped during an evaluation repeats it.
        if evaluation_due(first) and not sharding.first_says(writer.has(first, "eval/overall")):
            evaluate(first)
        recent = collections.deque(maxlen=alarms.PATIENCE)                      # metrics of the last logged steps
        for step in range(first, config.steps):
            began = time.time()
            if stop.requested():
                break
            logged = step % config.log_every == config.log_every - 1 or step == 0
            clock = Stopwatch(state if logged else None, stop.requested)
            batch = method.rollout(state, base, step, stream, jax.random.fold_in(root, step + 1), clock)
            if stop.requested():
                break
            stop.unsaved = True
            state, metrics = clock.lap("update", method.update(state, base, *batch))

            shown = {}
            if clock.on:
                metrics = jax.device_get(metrics)
                writer.write(step + 1, metrics | clock.seconds(method.pictures))
                recent.append(metrics)
                shown = {name: metrics[of] for name, of in (("loss", "loss"), ("reward", "reward/mean"), ("kl", "kl"))
                         if of in metrics}
                alarms.collapse(config.alarm, step + 1, metrics)
                alarms.idle(step + 1, recent)
            progress.update(1, **shown)
            timings["training"] += time.time() - began
            if evaluation_due(step + 1) or (step + 1) % config.checkpoint_every == 0:
                save(step + 1)               # before the evaluation: whatever ends that one, the step is not lost
            if evaluation_due(step + 1):
                if stop.requested():
                    break
                evaluate(step + 1)
        else:
            step = config.steps
        if stop.unsaved:
            save(step)

    checkpoints.close()
    if step < config.steps:
        return None
    if first_process:
        report = write_report(workdir)
        print(table(summary), f"\n{workdir}: report in {report}, {time.time() - started:.0f} s in all")
        if not suite.paints:
            print(f"It made no pictures; this will, and loads the whole model for it: python -m gvu_jax.generate "
                  f"--checkpoint={workdir} --prompts=FILE --out=FOLDER")
    return summary


# ---- the parts named above ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(workdir):
    """Keeps other runs out of `workdir` while this one lasts, however it ends. ValueError where one is there."""
    if jax.process_index() > 0:                              # process 0 speaks for all of a run
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process trains in {workdir}: wait for its end, or give another "
                             f"--workdir") from error
        except OSError:
            pass                                             # a file system without locks
        yield


def check_base(config, how, optimizer, mesh):
    """ValueError, before minutes of pretraining or reading, for what the method cannot do with this base or mesh."""
    if hub.is_name(name := config.model.get("checkpoint")) and not hub.place(name, config.cache).exists():
        return                                                      # its sizes are known once it has been fetched
    umm, params = checkpoint.describe_base(config, parts_of(config))
    method = method_of(config)(umm, config, how, optimizer, mesh)
    if hasattr(method, "begin"):                                                    # a method may leave it to its init
        jax.eval_shape(method.begin, params, jax.eval_shape(lambda: jax.random.key(0)))


def claim(workdir, config):
    """Makes `workdir` this run's: writes config.json, or checks that the one there is the same.

    A longer run may continue a shorter one, on another mesh, and save its state more or less often: `steps`, `mesh` and
    `checkpoint_every` may differ. Raises ValueError naming the other settings that do.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, ours = workdir / "config.json", json.loads(config.to_json())
    if path.exists() and any((workdir / name).exists() for name in ("base", "checkpoints", "metrics.jsonl")):
        ignored = ("steps", "cache", "checkpoint_every", "mesh.data", "mesh.fsdp", "mesh.tensor")
        if differ := [name for name in cli.differing(ours, read_json(path)) if name not in ignored]:
            raise ValueError(f"{workdir} holds a run with other settings ({', '.join(differ[:5])}): "
                             f"give another --workdir, or the settings of {path}")
    replace_file(path, json.dumps(ours, indent=1))


def prepare_base(config, workdir):
    """A pretrained tiny base is copied into the run's folder, which thereby needs nothing else; a name on the hub is
    fetched and converted into the cache."""
    folder = workdir / "base"
    if config.model.get("checkpoint") or folder.exists():
        gvu_jax.base_of_run(workdir, config)
        return
    from gvu_jax.shapes import pretrain
    cached, partial = pretrain.ensure_base(config), workdir / "base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(cached, partial)
    partial.rename(folder)


def load_base(config, workdir, mesh):
    """(umm, params) of the model that training starts from: the run's own copy of a tiny base, or a converted
    checkpoint, which stays where config.model.checkpoint says.

    Raises ValueError where the model would not read the pictures that it draws at their own size: training reads them
    as they are, and score and evaluate would read others.
    """
    folder = gvu_jax.base_of_run(workdir, config)
    umm, params = checkpoint.load_model(folder, mesh, config.model.get("override", {}), parts_of(config))
    drawn, read = umm.picture_size, umm.fitted_size(umm.picture_size)
    if read != drawn:
        grid = tuple(cells * side // of for cells, side, of in zip(umm.grid, read, drawn))
        raise ValueError(f"this model draws {drawn[0]} x {drawn[1]} pixels but reads such a picture at {read[0]} x "
                         f"{read[1]}: set config.model.override.grid to what it reads, e.g. {grid}")
    remat = config.model.get("remat", "nothing")
    return dataclasses.replace(umm, ar=dataclasses.replace(umm.ar, remat=remat)), params


def prompts_of(config):
    """(training prompts, held-out prompts), lists of dicts: the shapes world's own, or those of the config's files."""
    if config.get("world"):
        from gvu_jax.shapes import world
        return world.split_prompts()
    train_metas, held_out = (data.read_prompts(source, config.data.get("prompt_key", "prompt"))
                             for source in (config.data.prompts, config.data.held_out))
    print(data.overlap(train_metas, held_out))
    return train_metas, held_out


def pictures_of(config, umm):
    """(training pictures, held-out pictures), each a stream of dicts (see data.py) with "pixels" [H, W, 3] float32 in
    [0, 1] and "prompt", a caption: rendered scenes in the shapes world, else those of the config's folders."""
    if config.get("world"):
        from gvu_jax.shapes import suite, world
        place = world.World(**config.world)
        return tuple(suite.picture_stream((config.seed, held_out), config.pictures.told, place, config.pictures.most)
                     for held_out in (0, 1))
    return tuple(data.picture_stream(folder, umm.picture_size, config.seed)
                 for folder in (config.pictures.folder, config.pictures.held_out))


def build_unified(config, loop, pictures):
    batch = config[config.method].prompts
    examples = data.batch(pictures, 0, config.eval.batches * batch)
    judge = None
    if config.get("world"):
        from gvu_jax.shapes.suite import judge_captions as judge
    return Unified(loop, np.stack([example["pixels"] for example in examples]), batch, config.seed, judge)


def build_suite(config, umm, programs, how, held_out, lengths):
    """The suite of the held-out prompts, with the method's own programs where it draws as much in a call; drawn as
    in use, whatever draws in training."""
    settings = config[config.method]
    batch, group = (config.eval.get(name, settings[name]) for name in ("prompts", "group"))
    count = config.eval.batches * batch
    used = dataclasses.replace(in_use(umm, how), images_per_prompt=group)
    if (batch, group) != (settings.prompts, settings.group):
        programs = compile_programs(umm, used, programs.sample.mesh, settings.waves)
    elif used != how:
        programs = programs._replace(sample=compile_programs(umm, used, programs.sample.mesh, settings.waves).sample)
    metas = choose_prompts(held_out, count, np.random.default_rng(config.seed))
    view = config.reward.view if "reward" in config else "pixels"
    if not config.get("world"):
        return Suite(umm, programs, metas, batch, group, lengths, config.seed, view=view,
                     paints=config.eval.get("pictures", True))
    from gvu_jax.shapes import suite, world
    return suite.build(umm, programs, metas, batch, group, config.eval.choices, lengths,
                       world.compositions(held_out), config.seed, view)


def judge_pictures(suite, policy, drawn, config):
    """Suite.judge_own of {suffix: (pictures, verdicts)}, by asking and, with config.eval.words, by the prompt's words:
    the policy's own pictures change as it learns, those of the base remain."""
    judges = {"": None} | ({"_by_words": config.eval.words} if "words" in config.eval else {})
    return {f"{name}{by}{of}": value for by, words in judges.items() for of, (pictures, verdicts) in drawn.items()
            for name, value in suite.judge_own(policy, pictures, verdicts, words).items()}


def table(summary):
    """The before / after table as text."""
    before, after = summary.get("before", {}), summary.get("after", {})
    score = "held-out checker score" if summary["judged"] else "held-out reward"
    lines = [f"{score:<24}{'before':>8}{'after':>8}{'change':>8}"]
    sections = {"": (before, after)}
    for name in ("exact", "objects", "haze", "understanding", "judgement", "judge", "unified"):
        sections[f"{name} "] = summary.get(f"{name}_before", {}), summary.get(f"{name}_after", {})
    for section, (old, new) in sections.items():
        asked = summary.get("asked_after", {}) if section == "objects " else {}
        lines += [f"{section + name:<24}{old[name]:8.3f}{new[name]:8.3f}{new[name] - old[name]:+8.3f}"
                  + (f"   {asked[name]:.3f} asked for" if name in asked else "") for name in new if name in old]
    lines += [f"{'reward AUC ' + name:<24}{area:8.3f}" for name, area in summary.get("auc", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
