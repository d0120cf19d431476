"""The notebooks run from the first cell to the last, as small as they get, and are kept without their outputs."""
import json
import os

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT, load_config, tiny_config
from gvu_jax.cli import flatten

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def run(name, parameters, monkeypatch):
    """Executes a notebook whose parameters cell is followed by `parameters` ({name: value}).

    Returns what its cells show: a list of (text printed or shown, number of pictures), one a cell of code.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{variable} = {value!r}" for variable, value in parameters.items())
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
            shown.append(("".join(texts), sum("image/png" in out.get("data", {}) for out in cell.outputs)))
    return shown


def test_shapes_world(tmp_path, monkeypatch):
    tiny, smoke = flatten(tiny_config()), flatten(load_config("shapes", "smoke"))
    settings = {name: value for name, value in tiny.items() if value != smoke[name]}
    settings["cache"] = os.environ["GVU_CACHE"]
    shown = run("shapes_world", {"WORKDIR": str(tmp_path / "run"), "SETTINGS": settings}, monkeypatch)
    assert [pictures for _, pictures in shown] == [0, 0, 0, 2, 1, 1, 3]
    assert "held-out checker score" in shown[2][0] and (tmp_path / "run/report.html").exists()
    assert "a photo of a red circle above a blue square" in shown[-1][0] and "own words" in shown[-1][0]


def test_xomni_tpu(tmp_path, monkeypatch):
    shown = run("xomni_tpu", {"MODEL": str(tmp_path / "model"), "WORKDIR": str(tmp_path / "run")}, monkeypatch)
    assert [pictures for _, pictures in shown] == [0, 0, 0, 0, 1, 1, 0, 2]
    assert "bytes of parameters" in shown[3][0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2] and (tmp_path / "run/report.html").exists()


def test_janus_pro(tmp_path, monkeypatch):
    small = {"gvu.prompts": 2, "gvu.group": 2, "gvu.micro_batches": 1, "gvu.waves": 1}
    shown = run("janus_pro", {"NAME": None, "WORKDIR": str(tmp_path / "run"), "STEPS": 2, "TRAINING_PROMPTS": 22,
                              "SETTINGS": small}, monkeypatch)
    assert [pictures for _, pictures in shown] == [0, 0, 0, 1, 1, 0, 0, 1]
    assert "janus: draws 48 x 48" in shown[2][0] and "22 prompts" in shown[5][0] and "'after'" in shown[7][0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2] and (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid_and_kept_without_outputs(name):
    raw = json.loads(NOTEBOOKS[name].read_text())
    nbformat.validate(nbformat.from_dict(raw))
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in raw["cells"]
               if cell["cell_type"] == "code")
    assert NOTEBOOKS[name].read_text() == json.dumps(raw, indent=1, ensure_ascii=False) + "\n", "as Jupyter saves it"
