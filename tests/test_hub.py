"""Models by name, from a stand-in for the hub that answers what huggingface_hub asks: what is fetched, converted and
kept, and what a user is told where that does not work."""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest

import gvu_jax
from conftest import ROOT, copied, load_config, one_device
from gvu_jax import checkpoint, convert, hub, train

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories {OWNER/NAME: folder}, of which `gated` want a token and `cut` {file's name: bytes} break off."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        state, path = self.server, self.path.partition("?")[0].strip("/").split("/")
        api = path[0] == "api"
        name, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        if name not in state.repositories:
            return self.answer(401 if "authorization" not in self.headers else 404, {"X-Error-Code": "RepoNotFound"})
        if name in state.gated and self.headers.get("authorization") != "Bearer hf_good":
            if not api:
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
        folder = state.repositories[name]
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if rest[:1] in (["revision"], ["tree"], ["resolve"]) and rest[1] not in ("main", "v2", SHA):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if api and rest[:1] == ["tree"]:
            return self.answer(200, body=json.dumps([
                {"type": "file", "path": path, "oid": digest(file), "size": file.stat().st_size}
                for path, file in files.items()]).encode())
        if api:
            return self.answer(200, body=json.dumps({
                "id": name, "sha": SHA, "siblings": [{"rfilename": path} for path in files]}).encode())
        file = "/".join(rest[2:])
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = files[file].read_bytes()
        if self.command == "GET":
            state.sent.append(file)
        self.answer(200, {"ETag": f'"{digest(files[file])}"', "X-Repo-Commit": SHA}, body, state.cut.get(file))

    def answer(self, status, headers=(), body=b"", cut=None):
        self.send_response(status)
        for header, value in dict(headers).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")            # a connection that stays would outlive the server's end
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = True


def digest(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def published(fixtures, tmp_path):
    """Folders as the hub has them: Janus-Pro with things that nobody needs, and an X-Omni whose FLUX.1-dev is another's."""
    janus, xomni, flux = (tmp_path / "repositories" / name for name in ("janus", "xomni", "flux"))
    copied(fixtures / "janus", janus, "expected", "images", "README*")
    (janus / "janus_pro_teaser1.png").write_bytes(b"a picture")
    (janus / "modeling.py").write_text("print('never run')")
    assert (janus / "pytorch_model.bin").exists() and (janus / "model.safetensors").exists()
    copied(fixtures / "xomni", xomni, "expected")
    copied(fixtures / "siglip_vq", xomni / "vit", "expected*", "images")
    copied(fixtures / "flux/decoder_transformer", xomni / "decoder")
    config = json.loads((xomni / "config.json").read_text())
    config["vision_config"]["decoder"]["model_path"] = "decoder"
    config["vision_config"]["encoder"] |= {"siglip_path": "vit/siglip_vit.pt", "projector_path": "vit/vq_projector.pt"}
    (xomni / "config.json").write_text(json.dumps(config))
    copied(fixtures / "flux/base", flux)
    (flux / "flux1-dev.safetensors").write_bytes(b"24 GB")
    return {"tiny/Janus-Pro": janus, "tiny/X-Omni": xomni, "black-forest-labs/FLUX.1-dev": flux}


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """The stand-in, which huggingface_hub takes for the hub in this process and in those that it starts."""
    import huggingface_hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.gated, server.cut, server.sent = published, set(), {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    kept = tmp_path / "hub"
    for name, value in {"HF_ENDPOINT": address, "HF_HOME": str(kept), "HF_HUB_CACHE": str(kept / "hub"),
                        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = huggingface_hub.constants                             # which reads the environment once, when imported
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_CACHE": str(kept / "hub"),
                        "HF_TOKEN_PATH": str(kept / "token"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("GVU_CACHE", str(tmp_path / "cache"))
    yield types.SimpleNamespace(
        **{name: getattr(server, name) for name in ("repositories", "gated", "cut", "sent")}, address=address,
        stop=lambda: (server.shutdown(), server.server_close()))
    server.shutdown()
    server.server_close()


def same_models(one, other):
    (_, a), (_, b) = checkpoint.load_model(one), checkpoint.load_model(other)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_name_is_fetched_as_far_as_it_is_needed_and_converted(server, command, tmp_path, fixtures, capsys):
    assert command("convert", "--src=hf:tiny/Janus-Pro", f"--dst={tmp_path}/model") is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(server.sent)
    assert not {"pytorch_model.bin", "janus_pro_teaser1.png", "modeling.py"} & set(server.sent)
    convert.convert(server.repositories["tiny/Janus-Pro"], tmp_path / "by_hand")
    same_models(tmp_path / "model", tmp_path / "by_hand")
    told = json.loads((tmp_path / "model/source/manifest.json").read_text())
    assert told["source"] == "tiny/Janus-Pro", "what an exported adapter calls its base"
    count = len(server.sent)
    assert command("convert", "--src=hf:tiny/Janus-Pro@v2", f"--dst={tmp_path}/again") is None
    assert len(server.sent) == count, "the same files of another revision"


def test_what_a_family_reads_from_elsewhere_has_a_name_too(server, tmp_path, fixtures):
    convert.convert("hf:tiny/X-Omni", tmp_path / "model")
    assert "vae/config.json" in server.sent and "vit/siglip_vit.pt" in server.sent
    assert "flux1-dev.safetensors" not in server.sent and not any(file.startswith("transformer/") for file in server.sent)
    convert.convert(server.repositories["tiny/X-Omni"], tmp_path / "by_hand", flux=fixtures / "flux/base")
    same_models(tmp_path / "model", tmp_path / "by_hand")


def test_a_checkpoint_may_be_a_name_in_every_command(server, command, tmp_path, capsys):
    """It is converted once; then the hub may be away."""
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    drawn = command("generate", "--checkpoint=hf:tiny/Janus-Pro", f"--prompts={tmp_path}/p.txt", f"--out={tmp_path}/out",
                    "--images_per_prompt=1", "--batch=2")
    assert drawn is None and "converted, once" in capsys.readouterr().err
    place = hub.place("hf:tiny/Janus-Pro")
    assert place == tmp_path / "cache/converted/tiny--Janus-Pro" and (place / "metadata.json").exists()
    server.stop()
    picture = tmp_path / "out/00000_0.png"
    assert command("score", "--checkpoint=hf:tiny/Janus-Pro", f"--image={picture}", "--prompt=a dog") is None
    assert "reward" in (told := capsys.readouterr()).out and "converted" not in told.err
    assert command("evaluate", "--checkpoint=hf:tiny/Janus-Pro", "--suite=cycle", f"--prompt_file={tmp_path}/p.txt",
                   f"--out={tmp_path}/cycle", "--images_per_prompt=1", "--batch=2", "--prompts=6") is None
    assert gvu_jax.load("hf:tiny/Janus-Pro").umm.kind == "janus"
    record = command("generate", "--checkpoint=hf:tiny/Janus-Pro", f"--prompts={tmp_path}/p.txt", f"--out={tmp_path}/out",
                     "--images_per_prompt=1", "--batch=2")
    assert record is None, "what is there is known again"


def test_an_interrupted_download_goes_on(server, tmp_path, monkeypatch):
    """As do a conversion that was cut off, and one that another process makes."""
    weights = server.repositories["tiny/Janus-Pro"] / "model.safetensors"
    server.cut["model.safetensors"] = weights.stat().st_size // 2
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match="hf:tiny/Janus-Pro could not be fetched"):
        hub.model_folder("hf:tiny/Janus-Pro")
    before = {file for file in server.sent if file != "model.safetensors"}
    assert before and not hub.place("hf:tiny/Janus-Pro").exists()
    server.cut.clear()
    server.sent.clear()
    written, calls = convert.ParameterStore.write, []

    def killed(self, path, row, array):
        calls.append(path)
        if len(calls) == 4:
            raise OSError("killed")
        written(self, path, row, array)

    with monkeypatch.context() as patch:
        patch.setattr(convert.ParameterStore, "write", killed)
        with pytest.raises(OSError, match="killed"):
            hub.model_folder("hf:tiny/Janus-Pro")
    assert set(server.sent) & before == set() and "model.safetensors" in server.sent
    server.sent.clear()
    folder = hub.model_folder("hf:tiny/Janus-Pro")
    assert server.sent == [] and (folder / "metadata.json").exists()
    convert.convert(server.repositories["tiny/Janus-Pro"], tmp_path / "by_hand")
    same_models(folder, tmp_path / "by_hand")


@pytest.mark.parametrize("name", ["hf:", "hf:Janus-Pro-1B", "hf:a/b/c", "hf:a/b@", "hf:a b/c", "hf:https://x/y"])
def test_what_is_no_name_is_refused_without_a_question(name):
    with pytest.raises(ValueError, match="it should be hf:OWNER/NAME"):
        hub.model_folder(name)


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(server, command, tmp_path, monkeypatch):
    def end(name):
        told = command("convert", f"--src={name}", f"--dst={tmp_path}/model")
        assert not (tmp_path / "model").exists()
        return told
    assert "there is no public model" in (told := end("hf:tiny/None")) and "HF_TOKEN" in told
    assert "no such revision" in end("hf:tiny/Janus-Pro@v3")
    server.gated.add("tiny/Janus-Pro")
    assert "Agree to the terms on" in (told := end("hf:tiny/Janus-Pro")) and f"{server.address}/tiny/Janus-Pro" in told
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert command("convert", "--src=hf:tiny/Janus-Pro", f"--dst={tmp_path}/with_token") is None
    server.stop()
    assert "cannot be reached" in (told := end("hf:tiny/X-Omni")) and "--local-dir" in told
    assert "convert it first" in command("convert", "--export=hf", "--src=hf:tiny/X-Omni", f"--dst={tmp_path}/x")


def test_training_starts_from_a_name(server, tmp_path):
    """And the run's folder is loaded by it again."""
    config = load_config("janus_pro")
    config.update(cache=str(tmp_path / "cache"))
    config.model.checkpoint = "hf:tiny/Janus-Pro"
    hub.check(config.model.checkpoint)
    train.prepare_base(config, tmp_path / "run")
    assert (folder := hub.place("hf:tiny/Janus-Pro", config.cache)).exists()
    server.stop()
    umm, params = train.load_base(config, tmp_path / "run", one_device())
    assert umm.kind == "janus" and set(params) == set(checkpoint.load_model(folder)[1])
    assert gvu_jax.base_of_run(tmp_path / "run", config) == folder
    with pytest.raises(ValueError, match="hf:OWNER/NAME"):
        hub.check("hf:Janus")


def test_a_process_needs_nothing_but_the_endpoint(server, tmp_path):
    done = subprocess.run([sys.executable, "-m", "gvu_jax.convert", "--src=hf:tiny/Janus-Pro", f"--dst={tmp_path}/model"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "GB in" in done.stdout and "converting" in done.stderr and (tmp_path / "model/metadata.json").exists()
