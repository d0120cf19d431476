"""How every command line of this package starts and how it fails."""
import atexit
import os
import re
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from flax import traverse_util


def flatten(config):
    """{"gvu.group": 12, ..}: the settings of a config (ConfigDict) under the names they have on a command line."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


# What settings are that a run of an earlier version does not have, where that is something.
BEFORE = {"rollout.weights": "full", "rollout.cache": "full", "rollout.truncate": 2.0, "eval.pictures": True}


def differing(ours, theirs):
    """The names of the settings in which two configs (dicts) differ. One that an earlier version did not have is off
    where it is nothing (0, "") or what BEFORE says."""
    ours, theirs = (BEFORE | traverse_util.flatten_dict(config, sep=".") for config in (ours, theirs))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
                  and (ours.get(name) or theirs.get(name) or name in ours and name in theirs))


def path(text):
    """The Path that a flag or a setting means: "~" is the home folder, which shells leave alone in --out=~/x.

    Raises ValueError for an empty one (as of a shell's variable that is not set), a home folder that does not exist,
    and an address such as gs://bucket/x.
    """
    text = os.fspath(text)
    if not text.strip():
        raise ValueError("a path is empty: which file or folder is meant?")
    if "://" in text:
        raise ValueError(f"{text} is no path in a file system: mount the bucket (see launch/README.md), or fetch what "
                         f"is there, and give the path where it appears")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise ValueError(f"{text}: nobody here has the home folder {text.split('/')[0]}")
    return Path(found)


def keep_compiled(cache=None):
    """Keeps compiled programs for the next process, below `cache`. None: where GVU_CACHE says, or in the home folder.
    """
    cache = cache or os.environ.get("GVU_CACHE") or "~/.cache/gvu_jax"
    jax.config.update("jax_compilation_cache_dir", str(path(cache) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


flags.disclaim_key_flags()                       # flags that this file defines belong to the file that asks for them


class PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, text):
        return str(path(text))


def path_flag(name, help, required=False):
    """A flag for a file or folder: a str, as `path` reads it; None where it is not given. Two commands that one process
    imports may both have it."""
    return flags.DEFINE(PathParser(), name, None, help, required=required, allow_override=True)


REST = ("mesh.data", "mesh.fsdp", "mesh.tensor")          # -1: what the others leave
AT_LEAST_ONE = ("log_every", "checkpoint_every", "eval.every", "eval.batches", "eval.choices", "eval.group",
                "eval.prompts", "gvu.prompts", "uae.prompts", "uae.words", "alarm.skipped")
SHARES = ("pretrain.backbone.mismatched", "pictures.told", "reward.own")
NOT_ZERO = ("optim.clip_norm", "gvu.advantage_eps", "uae.advantage_eps")        # both divide: nothing would be learned


def check_numbers(config):
    """Raises ValueError for a number in a config (ConfigDict) that no setting of ours can take: nan, infinite, negative
    or enormous ones, and 0 where there must be one at least."""
    for name, value in flatten(config).items():
        least = 1 if name in AT_LEAST_ONE else -1 if name in REST else 0
        most = 1 if name in SHARES else 2 ** 31 - 1
        if isinstance(value, (int, float)) and not least <= value <= most:                  # nan fails every comparison
            raise ValueError(f"{name} is {value}; it must be a number from {least} to {most}")
        if name in NOT_ZERO and value == 0:
            raise ValueError(f"{name} is 0; it must be above" + (
                " (a large one, as 1e9, clips nothing)" if name == "optim.clip_norm" else ""))


def run(main):
    """Runs main(argv) under absl. A user's mistake ends in one line on stderr and exit status 1.

    Mistakes are what our code raises as ValueError or OSError (a missing file, an empty prompt, a wrong setting), and
    more than fits into a device; anything else is a defect and keeps its stack trace. GVU_TRACEBACK=1 shows the stack
    for those too.
    """
    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            told = " ".join(str(error).split())
            if "Traceback (most recent call last)" in told:             # of a config's get_config: its last line tells
                told = str(error).strip().splitlines()[-1].partition(": ")[2]
                if told.startswith("get_config() takes"):
                    told = "this config has no presets: leave out the colon and what follows it"
            if isinstance(error, (AttributeError, KeyError)) and told.startswith(("'", '"')):       # of ml_collections
                name, near = (re.search(pattern, told) for pattern in (r"\w+", 'Did you mean "(.*?)"'))
                told = f"the config has no setting {name[0]}" + (f": did you mean {near[1]}?" if near else "")
            sys.exit(f"error: {told}")

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)        # libraries are talkative; ours prints what it has to say
        if len(argv) > 1:
            sys.exit(f"error: {argv[1]!r} is no flag: give --name=value, and settings as --config.name=value")
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            if os.environ.get("GVU_TRACEBACK"):
                raise
            sys.exit(f"error: {' '.join(str(error).split())}")
        except jax.errors.JaxRuntimeError as error:
            if os.environ.get("GVU_TRACEBACK") or not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            sys.exit(f"error: the device has too little memory ({str(error).splitlines()[0]}). What takes less: a "
                     f"smaller --batch; in training waves, micro_batches, model.remat, or a mesh of more devices")

    # The flag of the configs reads sys.argv itself, and a preset may follow its path.
    sys.argv[1:] = [f"--config={os.path.expanduser(argument.partition('=')[2])}"
                    if argument.startswith(("--config=~", "-config=~")) else argument for argument in sys.argv[1:]]
    try:
        app.run(guarded, flags_parser=parse)
    except SystemExit as ended:
        if not isinstance(ended.code, str) or getattr(sys.modules["__main__"], "main", None) is not main:
            raise                                                                       # a test's process goes on
        # Said now, and without waiting for threads: where a disk had no room for a state's folder, those of Orbax wait
        # for it ten minutes longer.
        print(ended.code, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)
