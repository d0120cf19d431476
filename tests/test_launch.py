"""launch/: the scripts are clean, print what they would run, and the loop takes a run through preemptions to its end.

Nothing here reaches a cloud. `gcloud` is a stand-in that records its calls and answers each look at the world with the
next line of a script; where a test asks for it, what it is told to do on a worker is done in a folder that plays the
worker's home, with stand-ins for sudo, systemd and uv.
"""
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
TPU = LAUNCH / "tpu.sh"
SETTINGS = {"ZONE": "us-west4-a", "TYPE": "v5litepod-64", "BUCKET": "gs://pictures", "SPOT": "1", "INTERVAL": "0"}
RUN = ["--workdir=/gcs/runs/xomni", "--config.model.override.instruction=Say \"what\" it's; cost $HOME  & more"]

RECORD = 'for word in "${0##*/}" "$@"; do printf "%s\\x1f" "$word"; done >> "$CALLS"; echo >> "$CALLS"\n'
GCLOUD = RECORD + '''
if [[ -s $BROKEN && "$*" == *"$(< "$BROKEN")"* ]]; then rm "$BROKEN"; exit 1; fi        # one call does not get through
case "$*" in
  *"buckets describe"*) echo "${HIERARCHICAL-True}" ;;
  *" list "* | *"worker.sh report"*)
    IFS= read -r answer < "$ANSWERS" || { echo "nothing left to answer to: $*" >&2; kill 0; }
    sed -i 1d "$ANSWERS"
    [[ $answer != unreachable ]] || exit 1
    printf "$answer" ;;
esac
'''
ON_WORKER = RECORD + '''
case "$*" in
  *"buckets describe"*) echo True ;;
  *" scp "*) cp "$5" "$WORKER/${6#*:}" ;;
  *" ssh "*) command=${*: -1}; cd "$WORKER" && HOME=$WORKER bash -c "${command#--command=}" ;;
esac
'''


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """call(*args, answers, **environment) -> (finished process, calls), with `gcloud` and more played by stand-ins."""
    for variable in ("TPU", "RUNTIME", "ATTEMPTS", "DRY_RUN"):
        monkeypatch.delenv(variable, raising=False)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for name, path in {"CALLS": "calls", "ANSWERS": "answers", "BROKEN": "broken", "WORKER": "worker",
                       "TMPDIR": "."}.items():
        monkeypatch.setenv(name, str(tmp_path / path))
    program(tmp_path, "gcloud", GCLOUD)

    def call(*args, answers=(), **environment):
        (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in answers))
        (tmp_path / "calls").write_text("")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(["bash", *map(str, args)], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                              start_new_session=True)
        return done, [line.split("\x1f")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    call.root = tmp_path
    return call


def program(root, name, script):
    path = root / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}")
    path.chmod(0o755)


def acts(calls):
    """What the calls do to the world, in words; looking at it is left out."""
    words = {" create ": "create", " delete ": "delete", " scp ": "setup", "worker.sh run": "run", "journalctl": "log"}
    return [word for call in calls for sign, word in words.items() if sign in " ".join(call)]


def test_the_scripts_are_clean():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 2
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")
    done = subprocess.run([shellcheck, "--norc", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- dry runs ----------------------------------------------------------------------------------------------------

SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "gvu", "--zone=us-west4-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


@pytest.mark.parametrize("args, answers, expected", [
    (["create"], [], [[*QUEUED, "create", "gvu", "--node-id=gvu", "--zone=us-west4-a",
                       "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]]),
    (["setup"], [], None),
    (["run", *RUN], [], None),
    (["status"], ["ACTIVE", "READY", ""], None),
    (["watch", "3"], [], [[*SSH, "--worker=3",
                           "--command=sudo journalctl --unit=gvu_jax --output=cat --lines=100 --follow"]]),
    (["stop"], [], [[*SSH, "--worker=all", "--command=sudo systemctl kill --signal=TERM gvu_jax"]]),
    (["fetch", "/gcs/runs/xomni", "my results"], [], [
        ["gcloud", "storage", "rsync", "gs://pictures/runs/xomni", "my results", "--recursive",
         "--exclude=(base|checkpoints)/"]]),
    (["delete"], [], [[*QUEUED, "delete", "gvu", "--zone=us-west4-a", "--force", "--quiet"]]),
    (["loop", *RUN], ["", "ACTIVE", "READY", "gvu_jax a: new\\n", "ACTIVE", "READY", "gvu_jax a: exit 0\\n"], None),
], ids=lambda value: value[0] if isinstance(value, list) and value and isinstance(value[0], str) else "")
def test_a_dry_run_prints_what_a_run_does(cloud, args, answers, expected):
    printed, nothing = cloud(TPU, *args, DRY_RUN="1")
    assert printed.returncode == 0 and printed.stderr == "" and nothing == []
    real, calls = cloud(TPU, *args, answers=answers, DRY_RUN="")
    assert real.returncode == 0, real.stderr
    pasted, again = cloud("-c", printed.stdout, answers=answers)
    assert pasted.returncode == 0, pasted.stderr
    if args[0] == "loop":                      # it looks as often as it must; what it changes is the same
        calls, again = ([call for call in run if acts([call])] for run in (calls, again))
    assert calls == again and calls
    if expected:
        assert calls == expected


def test_what_the_run_is_told_reaches_python_unchanged(cloud):
    _, [call] = cloud(TPU, "run", *RUN)
    assert call[:-1] == [*SSH, "--worker=all"]
    command = call[-1].removeprefix("--command=")
    assert shlex.split(command) == ["bash", "gvu_jax/launch/worker.sh", "run", *RUN]


@pytest.mark.parametrize("kind, runtime", [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-16", "v2-alpha-tpuv5"),
                                           ("v6e-16", "v2-alpha-tpuv6e")])
def test_each_generation_has_its_image(cloud, kind, runtime):
    _, [call] = cloud(TPU, "create", TYPE=kind, SPOT="0")
    assert f"--runtime-version={runtime}" in call and "--spot" not in call


@pytest.mark.parametrize("args, environment, message", [
    (["create"], {"ZONE": ""}, "ZONE is not set"),
    (["loop", *RUN], {"BUCKET": ""}, "BUCKET is not set"),
    (["create"], {"TYPE": "v9-16"}, "TYPE=v9-16 is none of"),
    (["begin"], {}, "unknown subcommand 'begin'"),
    ([], {}, "unknown subcommand ''"),
    (["run"], {}, "--workdir=/gcs/FOLDER"),
    (["run", "--workdir=runs/xomni"], {}, "--workdir=/gcs/FOLDER"),
    (["fetch", "runs/xomni"], {}, "give the run and a folder"),
    (["setup"], {"HIERARCHICAL": ""}, "has no hierarchical namespace"),
    (["create"], {"PATH": "/nowhere"}, "gcloud is missing"),
])
def test_a_mistake_ends_in_one_line(cloud, args, environment, message):
    if "PATH" in environment:
        bare = cloud.root / "bare"
        bare.mkdir()
        for tool in ("bash", "dirname"):
            (bare / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(bare)}
    done, calls = cloud(TPU, *args, **environment)
    assert done.returncode == 1 and acts(calls) == [] and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


# ---- the loop ----------------------------------------------------------------------------------------------------

def up(*workers):
    """The answers of a slice that is up, and what its workers report."""
    return ["ACTIVE", "READY", "\\n".join(f"gvu_jax host-{i}: {how}" for i, how in enumerate(workers)) + "\\n"]


def test_the_loop_takes_a_run_through_preemption_reboot_and_silence_to_its_end(cloud):
    done, calls = cloud(TPU, "loop", *RUN, answers=[
        "", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "CREATING",
        *up("new", "new"), *up("running", "running"),
        "SUSPENDING", "SUSPENDED", "",                              # preempted, and asked for again
        *up("new", "new"), *up("exit 75", "running"),               # one was stopped; the other has yet to notice
        *up("exit 75", "exit 134"), *up("running", "running"),
        "unreachable", "ACTIVE", "READY", "unreachable",            # the network is away for a while
        *up("new", "exit 134"), *up("running", "running"),          # a machine was rebooted under the run
        "ACTIVE", "PREEMPTED", "FAILED", "",                        # the node is gone before its request knows it
        "ACTIVE", "", "",                                           # someone deleted the node alone
        *up("new", "new"), *up("running", "exit 0"), *up("exit 0", "exit 0")])
    assert done.returncode == 0, done.stderr
    assert acts(calls) == ["create", "setup", "run", "delete", "create", "setup", "run", "run", "setup", "run",
                           "delete", "delete", "create", "delete", "create", "setup", "run", "delete"]
    assert "finished" in done.stdout.splitlines()[-1]
    assert all(RUN == shlex.split(call[-1])[-2:] for call in calls if acts([call]) == ["run"])


@pytest.mark.parametrize("ends", [["exit 134", "exit 1"], ["exit 0", "exit 1"]])
def test_the_loop_does_not_repeat_a_mistake(cloud, ends):
    done, calls = cloud(TPU, "loop", *RUN, answers=[*up("new", "new"), *up(*ends)])
    assert done.returncode == 1 and acts(calls) == ["setup", "run", "log"]
    assert "host-1: exit 1" in done.stderr and "host-0: exit 0" not in done.stderr and "still billed" in done.stderr


@pytest.mark.parametrize("broken, expected", [
    ("scp", ["setup", "setup", "run", "delete", "create", "setup", "run", "delete"]),
    ("worker.sh run", ["setup", "run", "setup", "run", "delete", "create", "setup", "run", "delete"]),
    ("delete", ["setup", "run", "delete", "delete", "create", "setup", "run", "delete"]),
    ("create", ["setup", "run", "delete", "create", "create", "setup", "run", "delete"])])
def test_the_loop_tries_again_when_a_call_fails(cloud, broken, expected):
    (cloud.root / "broken").write_text(broken)
    start, preempted, none = up("new"), ["SUSPENDED"], [""]
    again = {"scp": start, "worker.sh run": start, "delete": preempted, "create": none}[broken]
    turns = [turn for turn in (start, preempted, none) for turn in [turn] * (1 + (turn is again))]
    done, calls = cloud(TPU, "loop", *RUN, answers=sum(turns, []) + up("new") + up("exit 0"))
    assert done.returncode == 0 and acts(calls) == expected


@pytest.mark.parametrize("left", ["exit 0", "exit 1", "exit 75"])
def test_the_loop_starts_its_own_run_where_another_has_ended(cloud, left):
    done, calls = cloud(TPU, "loop", *RUN, answers=[*up(left), *up("exit 0")])
    assert done.returncode == 0 and acts(calls) == ["setup", "run", "delete"]


def test_the_loop_goes_on_watching_a_run_that_is_going(cloud):
    done, calls = cloud(TPU, "loop", *RUN, answers=[*up("running"), *up("exit 75"), *up("exit 0")])
    assert done.returncode == 0 and acts(calls) == ["run", "delete"]


def test_the_loop_does_not_repeat_a_request_that_is_refused(cloud):
    (cloud.root / "broken").write_text("create")
    done, calls = cloud(TPU, "loop", *RUN, answers=[""])
    assert done.returncode == 1 and acts(calls) == ["create"]


@pytest.mark.parametrize("turn, expected", [
    (["", "FAILED"], ["create", "delete"] * 3), (up("exit 75"), ["setup", "run", "run", "run"]),
    (up("new"), ["setup", "run"] * 3),
    (["ACTIVE", "READY", "unreachable"], [])], ids=["failed", "stopped", "rebooted", "silent"])
def test_the_loop_gives_up(cloud, turn, expected):
    done, calls = cloud(TPU, "loop", *RUN, answers=turn * 5, ATTEMPTS="3")
    assert done.returncode == 1 and acts(calls) == expected and "gave up after 3 attempts" in done.stderr


def test_the_loop_ends_at_once_where_nothing_can_be_asked(cloud):
    done, calls = cloud(TPU, "loop", *RUN, answers=["unreachable"])
    assert done.returncode == 1 and len(calls) == 1


# ---- on a worker -------------------------------------------------------------------------------------------------

SYSTEMCTL = RECORD + 'case "$*" in *--property=*) name=${3#*=}; printf "%s\\n" "${!name}" ;; esac\n'


@pytest.fixture
def worker(cloud):
    """The cloud, where what is asked of a worker is done: in a folder, with stand-ins for the machine's programs."""
    program(cloud.root, "gcloud", ON_WORKER)
    program(cloud.root, "sudo", 'exec "$@"')
    program(cloud.root, "mountpoint", "exit 1")
    program(cloud.root, "systemctl", SYSTEMCTL)
    for name in ("systemd-run", "gcsfuse", "python3", "uv"):
        program(cloud.root, name, RECORD)
    program(cloud.root, "mkdir", '[[ $* == *gcs* ]] || /bin/mkdir "$@"')
    (cloud.root / "worker/.local/bin").mkdir(parents=True)
    (cloud.root / "bin/uv").rename(cloud.root / "worker/.local/bin/uv")
    return cloud


def state(load, sub, code="0", status="0"):
    return {"LoadState": load, "SubState": sub, "ExecMainCode": code, "ExecMainStatus": status}


def test_setup_installs_this_checkout_on_top_of_the_mounted_bucket(worker):
    done, calls = worker(TPU, "setup", **state("not-found", "dead"))
    assert done.returncode == 0, done.stderr
    home = worker.root / "worker/gvu_jax"
    assert {path.name for path in home.iterdir()} == {"setup.py", "configs", "gvu_jax", "launch"}
    mount, pip, venv, install = [call for call in calls if call[0] in ("systemd-run", "python3", "uv")]
    assert mount[-2:] == ["pictures", "/gcs"] and "--metadata-cache-ttl-secs=0" in mount and "gcsfuse" in mount
    assert pip[-1] == "uv" and venv[1] == "venv" and install[-1] == ".[tpu]"


def test_run_starts_a_service_with_the_very_arguments(worker):
    worker(TPU, "setup", **state("not-found", "dead"))
    done, calls = worker(TPU, "run", *RUN)
    assert done.returncode == 0, done.stderr
    [service] = [call for call in calls if call[0] == "systemd-run"]
    start = service.index(str(worker.root / "worker/gvu_jax/.venv/bin/python"))
    assert service[start + 1:start + 4] == ["-m", "gvu_jax.train", "--hosts=auto"]
    assert [word.replace("$$", "$") for word in service[start + 4:]] == RUN          # as systemd reads them
    assert "$$HOME" in service[-1] and "--unit=gvu_jax" in service and "--remain-after-exit" in service


@pytest.mark.parametrize("given, report, forgets", [
    (state("not-found", "dead"), "new", []), (state("loaded", "running"), "running", None),
    (state("loaded", "stop-sigterm"), "running", None), (state("loaded", "exited", "1", "0"), "exit 0", ["stop"]),
    (state("loaded", "failed", "1", "75"), "exit 75", ["reset-failed"]),
    (state("loaded", "failed", "2", "9"), "exit 137", ["reset-failed"])])
def test_a_worker_reports_how_its_run_is(worker, given, report, forgets):
    done, _ = worker(LAUNCH / "worker.sh", "report", **given)
    assert done.stdout.startswith("gvu_jax ") and done.stdout.endswith(f": {report}\n")
    again, calls = worker(LAUNCH / "worker.sh", "run")
    if forgets is None:                                             # never twice at once on the same chips
        assert again.returncode == 1 and "already going" in again.stderr
        assert not [call for call in calls if call[0] == "systemd-run"]
    else:
        assert again.returncode == 0
        assert [call[1] for call in calls if call[0] == "systemctl" and call[1] != "show"] == forgets


def test_a_worker_that_was_never_set_up_is_new(worker):
    program(worker.root, "gcloud", ON_WORKER.replace("case", 'case "$*" in *queued*list*) echo ACTIVE ;; '
                                                     '*list*) echo READY ;; esac\ncase', 1))
    done, _ = worker(TPU, "status")
    assert done.returncode == 0 and done.stdout.startswith("gvu: READY\ngvu_jax ") and done.stdout.endswith(": new\n")
