"""What all commands share: how they read paths, what they keep for the next time, and that they say nothing needless."""
import glob
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from gvu_jax import ACCELERATORS, checkpoint, cli
from gvu_jax import __main__ as commands


@pytest.mark.parametrize("text, found", [
    ("~", "HOME"), ("~/a/b.txt", "HOME/a/b.txt"), ("a~/~b", "a~/~b"), ("./~x", "~x"), ("/a b/\u00fc", "/a b/\u00fc")])
def test_a_path_is_what_the_shell_would_have_made_of_it(monkeypatch, text, found):
    monkeypatch.setenv("HOME", "/somewhere")
    assert cli.path(text) == Path(found.replace("HOME", "/somewhere"))


@pytest.mark.parametrize("text", ["", "  ", "gs://bucket/x", "https://example.com/x.png", "~no_such_user/x"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(ValueError):
        cli.path(text)


def run(*arguments, **environment):
    """A command as a user starts it: (stdout, stderr)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_command_that_fails_ends_though_a_thread_of_a_library_waits():
    program = ("import threading, time\nfrom gvu_jax import cli\ndef main(_):\n"
               "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
               "    print('said before')\n    raise OSError('the disk is full')\ncli.run(main)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (1, "said before\n", "error: the disk is full\n")


@pytest.mark.skipif(any(map(glob.glob, ACCELERATORS)), reason="this machine has accelerators, whose libraries may speak")
def test_a_machine_without_accelerators_hears_nothing_of_them():
    program = ("import gvu_jax.train, gvu_jax.evaluate, jax, sys; "
               "print(jax.default_backend(), jax.config.jax_platforms, 'torch' in sys.modules)")
    assert run("-c", program, JAX_PLATFORMS=None) == ("cpu cpu False\n", "")      # to import torch takes seconds
    assert run("-c", "import gvu_jax, os; print(os.environ['JAX_PLATFORMS'])", JAX_PLATFORMS="cuda,cpu")[0] == "cuda,cpu\n"


def test_what_one_command_compiles_the_next_one_has(tiny, tmp_path):
    """And neither of them prints more than it has to say."""
    checkpoint.save_model(tmp_path / "model", *tiny[1:])
    (tmp_path / "p.txt").write_text("a photo of a red circle")
    cache, kept = tmp_path / "cache", []
    for turn in "12":
        out, err = run("-m", "gvu_jax.generate", f"--checkpoint={tmp_path}/model", f"--prompts={tmp_path}/p.txt",
                       f"--out={tmp_path}/{turn}", "--images_per_prompt=1", GVU_CACHE=str(cache), JAX_PLATFORMS=None,
                       JAX_COMPILATION_CACHE_DIR=None)
        assert out.count("\n") == 1 and all(line.startswith("drawing") for line in err.split("\n") if line)
        kept.append(sorted(path.name for path in (cache / "compiled").iterdir() if path.name.endswith("-cache")))
    assert kept[0] == kept[1] and any("sample" in name for name in kept[0]) and any("render" in name for name in kept[0])
    assert (tmp_path / "1/00000_0.png").read_bytes() == (tmp_path / "2/00000_0.png").read_bytes()


@pytest.mark.parametrize("config, told", [
    ("shapes.py:smokee", "has no preset 'smokee'; it has normal, weak, smoke, showo and sd35"),
    ("xomni.py:big", "has no presets"), ("janus_pro.py:3b", "it has 1b and 7b")])
def test_a_mistyped_preset_is_one_line(command, config, told, tmp_path):
    end = command("train", f"--config={ROOT}/configs/{config}", f"--workdir={tmp_path}/run")
    assert end.startswith("error: ") and end.count("rror") == 1 and told in end and "Traceback" not in end


def test_the_package_lists_its_commands():
    """All that can be run, and the help of one that needs torch where there is none."""
    told = run("-m", "gvu_jax")[0]
    runnable = {".".join(path.relative_to(ROOT / "gvu_jax").with_suffix("").parts)
                for path in (ROOT / "gvu_jax").rglob("*.py") if "\n    cli.run(main)" in path.read_text()}
    assert set(commands.COMMANDS) == runnable
    for name in commands.COMMANDS:
        assert f"python -m gvu_jax.{name} " in told and len(commands.first_line(name)) > 10
    program = ("import sys; sys.modules['torch'] = None; sys.argv[1:] = ['--help']; import runpy; "
               "runpy.run_module('gvu_jax.benchmark', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--phases" in done.stdout and "Traceback" not in done.stderr, done.stderr
