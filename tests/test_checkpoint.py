"""Model folders and training states survive the way to disk and back; what is broken is named."""
import json

import jax
import numpy as np
import optax
import pytest

from conftest import one_device

from gvu_jax import checkpoint


@pytest.fixture
def saved(tiny, tmp_path):
    _, umm, params = tiny
    checkpoint.save_model(tmp_path / "model", umm, params)
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was(tiny, saved):
    _, umm, params = tiny
    again, loaded = checkpoint.load_model(saved, one_device())
    for name in ("ar", "vision", "flux", "vae", "grid", "instruction", "diffusion_steps"):
        assert getattr(again, name) == getattr(umm, name)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    chat = [{"role": "user", "content": "describe the image."}]
    assert again.tokenizer.apply_chat_template(chat, tokenize=False) == umm.tokenizer.apply_chat_template(
        chat, tokenize=False)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]                       # no half-written folder is left


@pytest.mark.parametrize("change, word", [
    ({"format": 99}, "format 99"), ({"kind": "other"}, "'other'"), ({"ar": {"hidden_size": 3}}, "missing")])
def test_metadata_that_does_not_fit_is_refused(saved, change, word):
    metadata = json.loads((saved / "metadata.json").read_text())
    (saved / "metadata.json").write_text(json.dumps(metadata | change))
    with pytest.raises(ValueError, match=word):
        checkpoint.load_model(saved, one_device())


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.json"):
        checkpoint.load_model(tmp_path, one_device())


def test_training_states_are_kept_and_loaded_by_part(tmp_path):
    trainable = {"ar": {"lm_norm": {"scale": np.arange(6.0, dtype=np.float32)}}}
    opt_state = optax.adam(1e-3).init(trainable)
    states = checkpoint.Checkpoints(tmp_path, one_device(), keep=2)
    assert states.newest_whole() is None
    for step in (1, 2, 3):
        states.save(step, trainable=jax.tree.map(lambda x: x + step, trainable), opt_state=opt_state)
    assert states.newest_whole() == 3
    alone = states.load(3, trainable=trainable)
    np.testing.assert_array_equal(alone["trainable"]["ar"]["lm_norm"]["scale"], np.arange(6.0) + 3)
    whole = states.load(2, trainable=trainable, opt_state=opt_state)
    assert jax.tree.structure(whole["opt_state"]) == jax.tree.structure(opt_state)
    states.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
