"""README and docs: links lead somewhere, commands are ones that the package takes, what is marked so is run, the code on
the page of extensions works, and what is written by a command is what that command writes now."""
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from absl import flags

import gvu_jax
from conftest import ROOT, load_config, one_device
from gvu_jax import checkpoint, cli, data, optim, rewards, umm
from gvu_jax.__main__ import COMMANDS
from gvu_jax.methods import method_of
from gvu_jax.metrics import Stopwatch
from gvu_jax.pictures import probability_color
from gvu_jax.sampling import How
from test_families import PICTURES, Toy, settings

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
WRITER = runpy.run_path(str(ROOT / "docs/write_settings.py"))
SMALL = {"evaluate": ["--prompts=6", "--batch=6", "--choices=6", "--images_per_prompt=1"]}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page, language):
    """(the comment above it or "", the text) of each block of code."""
    pattern = rf"(?:^ *<!-- (.*?) -->\n)? *```{language}\n(.*?)^ *```"
    return [(mark or "", "\n".join(line.strip() if language == "bash" else line for line in code.split("\n")))
            for mark, code in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)]


def commands(code):
    """The commands of a block as lists of words, without comments."""
    joined = code.replace("\\\n", " ")
    return [words for line in joined.split("\n") for command in line.split("&&")
            if (words := shlex.split(command, comments=True))]


def anchors(page):
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists() and found.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(found), target
    assert "OWNER/gvu_jax" not in text


@pages
def test_every_command_is_one_that_the_package_takes(page, monkeypatch):
    """Flags, configs, presets and settings are parsed as `python -m` parses them; nothing runs."""
    def parse(main, flags_parser):
        assert len(flags_parser(sys.argv)) == 1
        sys.exit("parsed")

    def forget(names):
        for name in names:
            delattr(flags.FLAGS, name)

    monkeypatch.setattr("absl.app.run", parse)
    monkeypatch.chdir(ROOT)
    of_module = flags.FLAGS.find_module_defining_flag
    for mark, code in blocks(page, "bash"):
        if mark.startswith("needs: a clone of GenEval"):                                   # those are its own commands
            continue
        for words in commands(code):
            if words[:2] == ["python", "-m"] and words[2].startswith("gvu_jax"):
                forget([name for name in flags.FLAGS if name.startswith("config.") or of_module(name).startswith("gvu_jax")])
                for name in COMMANDS:                         # of which one imports another for its flags
                    monkeypatch.delitem(sys.modules, f"gvu_jax.{name}", raising=False)
                    monkeypatch.delattr(gvu_jax, name, raising=False)
                others = set(flags.FLAGS)
                monkeypatch.setattr(sys, "argv", words[2:])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(words[2], run_name="__main__")
                forget(set(flags.FLAGS) - others)
                assert ended.value.code == "parsed", f"{' '.join(words)}: {ended.value.code}"
            elif words[0] == "python" and not words[1].startswith("-"):
                assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "launch"], ids=lambda page: page.name)
def test_every_command_says_what_it_needs_or_is_run(page):
    for mark, code in blocks(page, "bash"):
        assert re.match(r"(needs|run): \w", mark), code


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/evaluate.md"], ids=lambda page: page.name)
def test_what_is_said_to_run_runs(page, command, tiny, tmp_path, monkeypatch, capsys):
    checkpoint.save_model(tmp_path / "runs/shapes", *tiny[1:])
    monkeypatch.chdir(tmp_path)
    ran = [words for mark, code in blocks(page, "bash") if mark.startswith("run") for words in commands(code)]
    assert len(ran) >= 4
    for words in ran:
        if words[0] == "echo":
            (tmp_path / words[3]).write_text(words[1] + "\n")
        else:
            name = words[2].removeprefix("gvu_jax.")
            assert command(name, *words[3:], *SMALL.get(name, [])) is None, words
    if page.name == "README.md":
        assert (tmp_path / "heat.png").exists() and (tmp_path / "results/shapes/results.json").exists()
        (_, code), = blocks(page, "python")
        exec(compile(code, page.name, "exec"), found := {})
        assert found["picture"].shape == (1, 48, 48, 3) and found["picture"].dtype == np.uint8


def test_the_readme_is_short_and_has_its_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    pictures = [ROOT / target for target in re.findall(r'(?:srcset|src)="([^"]+)"', text)]
    assert len(pictures) == 2 and sum(picture.stat().st_size for picture in pictures) < 300_000
    assert text.index("What has been run") < text.index("## Two commands")


# ---- what is written by a command ----------------------------------------------------------------------------------

def test_the_settings_are_those_of_the_configs(monkeypatch):
    monkeypatch.setenv("GVU_CACHE", "/somewhere")                               # of which the page knows nothing
    assert (ROOT / "docs/settings.md").read_text() == WRITER["page"](), "python docs/write_settings.py"


def test_every_setting_has_a_meaning():
    assert set(WRITER["CONFIGS"]) == {path.stem for path in (ROOT / "configs").glob("*.py")}
    _, known = WRITER["inherited"]()
    for config in WRITER["CONFIGS"]:
        silent = [name for name in WRITER["values"](config) if not known[config].get(name)]
        assert not silent, f"configs/{config}.py does not say what {', '.join(silent)} mean"
    assert known["shapes"]["sampling.temperature"] == "1 draws from the policy itself", "each has its own"


@pytest.mark.parametrize("config, preset", [
    (config, preset) for config, presets in WRITER["CONFIGS"].items() for preset in presets or (None,)])
def test_every_preset_can_train_as_it_is(config, preset):
    settings = load_config(config, *filter(None, [preset]))
    cli.check_numbers(settings)
    method_of(settings).check(settings)


def test_comments_are_divided_among_the_settings_they_name():
    parts = WRITER["split"]("Both of it. lr: a rate; 0 is none. b1, b2: moments of AdamW: two.", {"lr", "b1", "b2"})
    assert parts == {"": "Both of it.", "lr": "a rate; 0 is none.", "b1": "moments of AdamW: two.",
                     "b2": "moments of AdamW: two."}
    assert WRITER["split"]("what it is: a word", {"lr"}) == {"": "what it is: a word"}


def test_the_picture_is_painted_from_a_run():
    """On both grounds: the pictures of before and after, the words on the colours of their probabilities, the prompt
    whose reward rose most below the others."""
    others = set(flags.FLAGS)
    painter = runpy.run_path(str(ROOT / "docs/picture.py"))
    for name in set(flags.FLAGS) - others:                     # no other command of this process has them
        delattr(flags.FLAGS, name)
    of = {moment: [{"prompt": f"prompt {i}", "reward": 0.1 + rise * i / 10, "words": ["a", "word"],
                    "probabilities": [0.2, 0.1 * i]} for i in range(4)] for moment, rise in (("before", 0), ("after", 1))}
    pictures = {moment: [np.full((48, 48, 3), value + i, np.uint8) for i in range(4)]
                for moment, value in (("before", 50), ("after", 200))}
    for ground, *inks in painter["PAGES"].values():
        found = np.asarray(painter["compose"](of, pictures, ground, *inks))
        count = lambda color: (found == color).all(axis=-1).sum()
        times = [count((value + i,) * 3) / painter["SIDE"] ** 2 for value in (50, 200) for i in range(4)]
        assert times == [1, 1, 1, 2, 1, 1, 1, 2]
        assert count(ground) > found[..., 0].size / 3
        assert count(probability_color(0.2)) > 100 and count(probability_color(0.1 * 3)) > 100


# ---- extending -----------------------------------------------------------------------------------------------------

def test_the_reward_of_the_page_is_one(tmp_path):
    for page, name in (ROOT / "docs/extending.md", "bright"), (ROOT / "docs/methods.md", "red"):
        (tmp_path / "mine.py").write_text(blocks(page, "python")[0][1])
        found = rewards.ask(rewards.load_function(f"{tmp_path}/mine.py:{name}"), np.ones((3, 8, 8, 3)) / 5, ["a"] * 3)
        np.testing.assert_allclose(found, 0.2)


def test_the_method_of_the_page_makes_the_best_pictures_likelier():
    exec(compile(blocks(ROOT / "docs/extending.md", "python")[1][1], "best_of.py", "exec"), found := {})
    config, toy = settings("shapes"), Toy()
    config.gvu.anchor = 0.0
    found["BestOf"].check(config)
    method = found["BestOf"](toy, config, How(images_per_prompt=config.gvu.group), optim.build(config.optim, 10),
                             one_device(), toy.lengths([]))
    base = toy.init(jax.random.key(0))
    state, stream = method.init(base, jax.random.key(1)), data.prompt_stream(PICTURES, 0)
    prompts, drawn, _, reward, *rest = batch = method.rollout(
        state, base, 0, stream, jax.random.key(2), Stopwatch(None, lambda: False))
    best = np.asarray(reward).reshape(-1, config.gvu.group).argmax(axis=1) + config.gvu.group * np.arange(
        config.gvu.prompts)
    logps = lambda state: np.asarray(toy.image_logps(method.policy(base, state.trainable), prompts, drawn))[best].sum()
    before = logps(state)
    state, metrics = method.update(state, base, *batch)
    assert logps(state) > before and int(state.step) == 1
    np.testing.assert_allclose(metrics["loss"], -before / len(reward), rtol=1e-5)


def test_the_calls_that_the_page_asks_of_a_family_are_those_of_the_interface():
    text = (ROOT / "docs/extending.md").read_text()
    calls = re.findall(r"`(\w+)`", text[text.index("with the calls of"):text.index("and what it says of its arrays")])
    assert len(calls) == len(set(calls)) > 12
    documented = set(re.findall(r"^    (\w+)\(", umm.__doc__, re.MULTILINE)) | {"fitted_size"}
    assert set(calls) == documented
    assert set(calls) - {"answer", "fit", "fitted_size"} <= set(dir(Toy))


# ---- the habits of an open project ---------------------------------------------------------------------------------

def test_the_project_says_how_to_cite_test_and_install_it(tmp_path):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all(reference["url"] in (ROOT / "README.md").read_text() for reference in citation["references"])
    version = re.search(r'version="(.*?)"', (ROOT / "setup.py").read_text())[1]
    assert citation["version"] == version and f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    shutil.copy(ROOT / "setup.py", tmp_path)                                     # as a worker of launch/tpu.sh has it
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith(version), done.stderr
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["tests"]["steps"]]
