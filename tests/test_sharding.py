"""Meshes, partition tables, and the one promise: what several devices compute together is what one computes alone."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from conftest import ROOT, TINY, load_config, one_device, put_untrained, tiny_config, untrained
from gvu_jax import checkpoint, hosts, plan, sharding
from gvu_jax.families.xomni import XOmni
from gvu_jax.methods import gvu
from gvu_jax.metrics import read_metrics
from gvu_jax.sampling import How
from gvu_jax.stop import STOPPED
from test_internal_gap import gap_config
from test_uae import uae_config

TEXTS = ["a photo of a red circle", "a photo of two crosses", "an image of a square", "a picture of a blue diamond"]


@pytest.fixture(scope="module")
def divisible():
    """(config, umm, params) of an untrained model whose sides are multiples of eight."""
    return divisible_of(TINY[0])


def divisible_of(family):
    config, *model = untrained(family)
    config = config.copy_and_resolve_references()
    config.gvu.update(prompts=4, group=8)
    return config, *model


def a_step(divisible, mesh, **changes):
    """Numbers of one whole GvU step on a mesh, the method and the state after it."""
    config, umm, params = divisible
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"lora.rank": 4} | changes)
    mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
    how = How(images_per_prompt=config.gvu.group, **config.sampling, **config.rollout)
    method = gvu.GvU(umm, config, how, optax.adam(1e-3), mesh)
    base = jax.device_put(params, sharding.shardings(umm.partition, params, mesh))
    state = method.init(base, sharding.put(jax.random.key(1), mesh))
    lengths, key = umm.lengths(TEXTS), sharding.put(jax.random.key(2), mesh)
    prompts, grouped = (sharding.place_prompts(umm, TEXTS, lengths, mesh, times) for times in (1, config.gvu.group))
    policy = method.policy(base, state.trainable)
    tokens, logps = method.sample(policy, prompts, key)
    pixels = method.render(base, tokens, prompts, key)
    reward, seen = method.reward(base, policy, tokens, pixels, grouped)
    state, metrics = method.update(state, base, grouped, tokens, logps, reward, seen)
    return sharding.fetch(dict(tokens=tokens, logps=logps, pixels=pixels, reward=reward, metrics=metrics,
                               gradients=state.opt_state[0].mu)), method, state      # Adam's first mean is 0.1 gradient


@pytest.fixture(scope="module")
def alone(divisible):
    return a_step(divisible, one_device())[0]


@pytest.fixture(scope="module")
def divided(divisible):
    return a_step(divisible, "fsdp:4,tensor:2")


def assert_same_step(ours, theirs, slack=1):
    """slack: how much further what is read of the pixels, and follows from it, may lie apart."""
    jax.tree.map(np.testing.assert_array_equal, ours["tokens"], theirs["tokens"])
    np.testing.assert_array_equal(ours["pixels"], theirs["pixels"])
    np.testing.assert_allclose(ours["logps"], theirs["logps"], atol=1e-5)
    np.testing.assert_allclose(ours["reward"], theirs["reward"], rtol=slack * 1e-5)
    for name, value in theirs["metrics"].items():
        np.testing.assert_allclose(ours["metrics"][name], value, rtol=slack * 2e-4, atol=slack * 1e-6, err_msg=name)
    largest = theirs["metrics"]["grad_norm"]
    assert largest > 1e-3
    for one, other in zip(*map(jax.tree.leaves, (ours["gradients"], theirs["gradients"]))):
        np.testing.assert_allclose(one, other, rtol=0, atol=slack * 1e-5 * largest)


def test_a_step_divided_three_ways_is_a_step_on_one_device(divided, alone):
    """And the state comes out where it went in, so that the next step is the same program."""
    together, method, state = divided
    assert_same_step(together, alone)
    stays = sharding.shardings(method.umm.partition, state, method.mesh)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(stays)):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


@pytest.mark.parametrize("mesh, changes", [
    ("data:2,fsdp:2,tensor:2", {"gvu.micro_batches": 2}), ("data:2,tensor:2", {"gvu.waves": 2})])
def test_a_step_on_several_devices_is_a_step_on_one(divisible, alone, mesh, changes):
    assert_same_step(a_step(divisible, mesh, **changes)[0], alone)


def test_a_step_of_rounded_rollouts_divided_three_ways_is_one_on_one_device(divisible):
    together, alone = (a_step(divisible, mesh, **{"rollout.weights": "int8", "reward.view": "tokens"})[0]
                       for mesh in ("data:2,fsdp:2,tensor:2", one_device()))
    assert_same_step(together, alone)
    assert alone["metrics"]["logp_gap"] > 1e-4 and 0 <= alone["metrics"]["truncated"] < 0.5


@pytest.mark.parametrize("family, view", [("janus", "pixels"), ("showo", "tokens")])
def test_a_guided_step_divided_three_ways_is_a_step_on_one_device(family, view):
    """But that pixels are floored to 8 bits, as published, where a rounding may be a level: the codes are the same,
    so few pixels differ, by one level, and what follows from those by little. Where they are tokenised again it may be
    another code: so Show-o reads what it drew."""
    divisible = divisible_of(family)
    together, alone = (a_step(divisible, mesh, **{"sampling.guidance": 3.0, "gvu.anchor": 1.0, "reward.view": view})[0]
                       for mesh in ("data:2,fsdp:2,tensor:2", one_device()))
    if view == "pixels":                                                          # else nothing is painted
        apart = np.abs(together["pixels"] - alone["pixels"])
        assert apart.max() < 1.01 / 255 and (apart > 0).mean() < 1e-3
    assert_same_step(together | {"pixels": alone["pixels"]}, alone, slack=100)


def test_without_training_the_backbone_is_divided_by_its_heads(divisible):
    assert dict(sharding.mesh_of(divisible[1]).shape) == {"data": 1, "fsdp": 4, "tensor": 2}


def test_pictures_that_hold_reading_need_not_divide(divisible):
    """Of 24 samples on eight devices six hold reading in place."""
    ours, theirs = (a_step(divisible, mesh, **{"gvu.group": 6})[0] for mesh in ("data:8", one_device()))
    assert theirs["metrics"]["read_kl"] >= 0
    assert_same_step(ours, theirs)


def test_of_several_processes_a_defect_keeps_its_stack_trace(monkeypatch, capsys):
    def fail(error):
        with pytest.raises(SystemExit), sharding.one_fails_all_fail():
            raise error
        return capsys.readouterr().err
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert "Traceback" in fail(KeyError("ar")) and "Traceback" not in fail(ValueError("no such folder"))
    monkeypatch.setenv("GVU_TRACEBACK", "1")
    assert "Traceback" in fail(ValueError("no such folder"))


@pytest.mark.parametrize("sizes, shape", [
    ({"data": -1}, (8, 1, 1)), ("fsdp:-1", (1, 8, 1)), ("data:2, tensor:2", (2, 1, 2)),
    ("fsdp:-1,tensor:4", (1, 2, 4))])
def test_meshes(sizes, shape):
    assert sharding.make_mesh(sizes).devices.shape == shape


@pytest.mark.parametrize("sizes, reason", [
    ("model:8", "no axis model"), ("data:8,tensor:2", "16 devices"), ("data:3,fsdp:-1", "cannot be divided"),
    ("data", "form"), ("data:x", "form"), ("data:0", "at least 1"), ("data:-1,fsdp:-1", "at most one")])
def test_a_mesh_that_cannot_be_is_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        sharding.make_mesh(sizes)


SLICES = ["v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16",            # Google's tables
          "v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16",
          "v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8",
          "v5p:8x8x12", "v5p:8x8x16", "v5p:8x12x16", "v5p:8x16x16", "v5p:12x16x16", "v5p:16x16x16", "v5p:16x16x24"]
DOCUMENTED = ["fsdp:-1,tensor:4", "data:-1", "fsdp:-1", "fsdp:-1,tensor:2", "data:-1,tensor:4", "data:2,fsdp:-1,tensor:2",
              "data:2,fsdp:-1,tensor:4", "fsdp:4,tensor:4", "data:4,tensor:4", "fsdp:4,tensor:2"]


@pytest.mark.parametrize("topology", SLICES)
def test_every_documented_mesh_on_every_slice(topology):
    """Of libtpu's descriptions of slices that are not here. What shares a token's work are neighbours, one link apart."""
    chips = plan.chips_of(topology)
    configs = [dict(load_config(name).mesh) for name in ("shapes", "xomni")]
    for sizes in [*configs, *DOCUMENTED]:
        try:
            mesh = sharding.make_mesh(sizes, chips)
        except ValueError as error:                                              # a small slice has not so many chips
            assert re.search("needs \\d+ devices|cannot be divided", str(error)) and len(chips) < 16
            continue
        assert len(set(mesh.devices.flat)) == mesh.size
        for row in mesh.devices.reshape(-1, mesh.shape["tensor"]):
            places = np.array([chip.coords for chip in row])
            hops = np.abs(places[:, None] - places).sum(axis=-1)
            assert hops.max(initial=0) < len(row), "further apart than in a line of neighbours"
            assert all((hop == 1).any() for hop in hops) or len(row) == 1


@pytest.mark.parametrize("mesh, changes, reason", [
    ("tensor:8", {}, "4 query heads"), ("tensor:4", {}, "2 key/value heads"),
    ("data:8", {"gvu.prompts": 3, "gvu.group": 3}, "9 samples"), ("data:8", {"gvu.waves": 2}, "waves"),
    ("data:8", {"gvu.micro_batches": 8}, "micro-batches")])
def test_a_mesh_on_which_the_run_cannot_be_divided_is_refused(divisible, mesh, changes, reason):
    with pytest.raises(ValueError, match=reason):
        a_step(divisible, mesh, **changes)


def test_every_parameter_matches_one_rule(divisible):
    _, umm, params = divisible
    mesh = sharding.make_mesh("fsdp:2,tensor:2")
    assert {leaf.mesh for leaf in jax.tree.leaves(sharding.shardings(umm.partition, params, mesh))} == {mesh}
    for path, count in {"new_proj/kernel": 0, "lm_norm/scale": 1}.items():
        if count == 1:
            assert sharding.logical_axes(path, umm.partition["ar"]) == (None,)
        else:
            with pytest.raises(ValueError, match=f"{path} matches {count} rules"):
                sharding.logical_axes(path, umm.partition["ar"])
    with pytest.raises(ValueError, match="matches 2 rules"):
        sharding.logical_axes("a/kernel", [("kernel", ()), ("a/", ())])


def test_adapters_and_optimizer_states_follow_their_matrices():
    mesh = sharding.make_mesh("fsdp:2,tensor:2")
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {"adapter": {"layers": {"layer": {"mlp": {"down_proj": {"a": leaf(3, 48, 4), "b": leaf(3, 4, 32)}}}}}}
    state = optax.adam(1e-3).init(jax.tree.map(lambda x: jnp.zeros(x.shape), tree))
    for specs in (sharding.shardings(XOmni.partition, tree, mesh), sharding.shardings(XOmni.partition, state, mesh)[0].mu):
        pair = specs["adapter"]["layers"]["layer"]["mlp"]["down_proj"]
        assert pair["a"].spec == PartitionSpec(None, ("tensor",), None)
        assert pair["b"].spec == PartitionSpec(None, None, ("fsdp",))
    assert sharding.shardings(XOmni.partition, state, mesh)[0].count.spec == PartitionSpec()


def test_a_large_axis_that_does_not_divide_is_refused_and_a_vocabulary_stays_whole():
    mesh = sharding.make_mesh("fsdp:2,tensor:4")
    layout = sharding.LAYOUTS["stored"]
    assert sharding.divide((1001, 4096), ("vocab", "width"), mesh, layout, "t") == PartitionSpec(None, ("fsdp",))
    with pytest.raises(ValueError, match="axis 1 cannot be divided by tensor = 4"):
        sharding.divide((4096, 1001), ("width", "heads"), mesh, layout, "t")


def test_a_state_moves_to_another_mesh(divided, tmp_path):
    _, method, state = divided
    states = checkpoint.Checkpoints(tmp_path, method.mesh, writing=True)
    states.save(1, trainable=state.trainable, opt_state=state.opt_state)
    states.close()
    mesh, parts = sharding.make_mesh("data:2,tensor:2"), {"trainable": state.trainable, "opt_state": state.opt_state}
    other = checkpoint.Checkpoints(tmp_path, mesh)
    loaded = other.load(1, **sharding.place(method.umm.partition, parts, mesh))
    other.close()
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(parts)):
        assert len(ours.sharding.device_set) == 4
        np.testing.assert_array_equal(ours, theirs)


# ---- several processes -----------------------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
from ml_collections import ConfigDict
import jax
from gvu_jax import sharding, train
from gvu_jax.stop import STOPPED, Stop
hosts, work, config = sys.argv[1:]
if hosts != "-":
    sharding.join_hosts(hosts)
with Stop() as stop, sharding.one_fails_all_fail():
    result = train.train(ConfigDict(json.loads(config)), Path(work), stop)
print("devices", jax.device_count(), jax.local_device_count())
sys.exit(STOPPED if result is None else 0)
"""


def start(hosts, work, config, devices):
    """A process of a run with so many devices of its own. hosts: as in --hosts, or "-"."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen([sys.executable, "-c", RUN, hosts, str(work), config.to_json()],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "1"})


def start_two(work, config):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [start(f"localhost:{port},2,{i}", work, config, 1) for i in range(2)]


@pytest.mark.parametrize("index, missing", [(0, "processes 1, 2 of 3 did not come"), (1, "process 0 of 3 is missing")])
def test_one_process_alone_says_who_is_missing(command, tmp_path, index, missing):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    began = time.time()
    line = command("train", f"--config={ROOT}/configs/shapes.py", f"--workdir={tmp_path}/w", "--hosts_timeout=1",
                   f"--hosts={address},3,{index}")
    assert missing in line and address in line and "--hosts_timeout" in line and time.time() - began < 60
    assert not (tmp_path / "w").exists()


def test_machines_that_do_not_know_each_other_are_told_so(tmp_path):
    ended = subprocess.run([sys.executable, "-m", "gvu_jax.train", f"--config={ROOT}/configs/shapes.py", "--hosts=auto",
                            f"--workdir={tmp_path}/w"], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == 1 and not (tmp_path / "w").exists()
    assert ended.stderr.count("\n") == 1 and "--hosts=ADDRESS:PORT,COUNT,INDEX" in ended.stderr


def test_processes_meet_or_all_of_them_hear_why_not(monkeypatch):
    def meet(count, *indices, timeout=20):
        """What each process says, or None where it has met the others; by its place in `indices`."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"

        def one(index, count=count):
            try:
                hosts.meet(address, count, index, timeout)
            except ValueError as error:
                return str(error)
        with ThreadPoolExecutor(len(indices)) as pool:
            waiting = [pool.submit(one, *np.atleast_1d(index).tolist()) for index in indices]
            with contextlib.suppress(OSError), socket.create_connection(address.split(":"), 5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return [of.result() for of in waiting]

    assert meet(3, 2, 0, 1) == [None] * 3
    assert all("process 2 of 3 did not come" in said for said in meet(3, 1, 0, timeout=3))
    assert any("two processes say that they are number 1 of 3" in said for said in meet(3, 1, 1, 0, timeout=5))
    assert all("started as one of 4" in said for said in meet(3, (1, 4), 0))
    with pytest.raises(ValueError, match="names no port"):
        hosts.meet("localhost", 2, 0, 1)
    with socket.create_server(("", 0)) as taken, pytest.raises(ValueError, match="cannot listen at port"):
        hosts.meet(f"localhost:{taken.getsockname()[1]}", 2, 0, 1)


def ended(process):
    """(exit status, stdout, stderr) of a process that is about to end."""
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


def run_alone(config, folder):
    """The config of a run of two steps, which one process with two devices has finished in folder/one."""
    config.mesh.update(data=1, fsdp=2)
    config.update(steps=2, checkpoint_every=1)
    config.pretrain.seed = 2                    # no other test's base: that of test_train.py is pretrained
    put_untrained(config)
    status, output, errors = ended(start("-", folder / "one", config, 2))
    assert status == 0 and "devices 2 2" in output, errors
    return config


def assert_same_metrics(both, one, longer=False):
    """GRPO's loss is a mean of advantages, of size one, that cancel at the first step: what is left is their rounding."""
    assert len(one) == len(both) >= 4
    for line, other in zip(one, both):
        at_end = longer and line is one[-1] and "eval/overall" in other      # where a run ends, it is evaluated further
        assert line.keys() == other.keys() or at_end
        for name, value in other.items():
            if "second" not in name:
                atol = 1e-5 if name == "loss" else 1e-6
                np.testing.assert_allclose(value, line[name], rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("config", [
    gap_config("sft", **{"family": "showo", "internal_gap.threshold": 1e-6}),               # every picture is accepted
    uae_config(**{"uae.cold": 0})], ids=["internal_gap", "uae"])                                # captions, then pictures
def test_two_processes_write_the_metrics_of_one(config, tmp_path):
    """GvU's are those of the next test."""
    config = run_alone(config, tmp_path)
    for process in start_two(tmp_path / "two", config):
        status, output, errors = ended(process)
        assert status == 0 and "devices 2 1" in output, errors
    assert_same_metrics(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one")))
    assert (tmp_path / "two/report.html").exists() and json.loads((tmp_path / "two/summary.json").read_text())["after"]


def test_a_signal_to_one_process_ends_both_and_both_go_on(tmp_path):
    """Killed: the other one ends with a message. Started again and told to stop: both save the same step. No step is
    lost or doubled, and the metrics are those of one process."""
    config, work = run_alone(tiny_config(), tmp_path), tmp_path / "two"
    config.steps = 1000
    lines = lambda: read_metrics(work / "metrics.jsonl") if (work / "metrics.jsonl").exists() else []
    for number, statuses in ((signal.SIGKILL, [1, -signal.SIGKILL]), (signal.SIGTERM, [STOPPED, STOPPED])):
        enough, processes = max(len(lines()) + 2, 2 if number == signal.SIGKILL else 5), start_two(work, config)
        while len(lines()) < enough:
            assert all(process.poll() is None for process in processes), [ended(p)[2][-2000:] for p in processes]
            time.sleep(0.1)
        processes[1].send_signal(number)
        found, _, errors = zip(*map(ended, processes))
        assert list(found) == statuses, errors[0][-2000:] + errors[1][-2000:]
        assert "start all of them again" in errors[0] or number == signal.SIGTERM
    steps = [line["step"] for line in lines() if "loss" in line]
    assert steps == list(range(1, checkpoint.Checkpoints(work, one_device()).newest_whole() + 1))
    assert_same_metrics(lines()[:4], read_metrics(tmp_path / "one/metrics.jsonl"), longer=True)


@pytest.mark.parametrize("rest", [(), (3,), (0,), (2, 0)])
def test_rows_are_cut_into_slices_and_joined_again(rest):
    """Also those of arrays without entries, as the log-probabilities of a flow drawn without noise."""
    x = np.arange(24 * int(np.prod(rest)), dtype=np.float32).reshape(24, *rest)
    mesh = sharding.make_mesh("data:2,fsdp:2", jax.devices()[:4])
    cut = sharding.Program(lambda x: sharding.split_rows(x, 3), mesh)(x)
    assert cut.shape == (3, 8, *rest)
    for i, part in enumerate(np.asarray(cut)):                             # of each device's six rows, two at a time
        np.testing.assert_array_equal(part, np.concatenate([x[6 * d + 2 * i:6 * d + 2 * i + 2] for d in range(4)]))
    np.testing.assert_array_equal(sharding.Program(sharding.join_rows, mesh)(cut), x)
    waves = sharding.Program(lambda x: sharding.in_waves(lambda part: (part + 1, part), x, waves=3), mesh)
    jax.tree.map(np.testing.assert_array_equal, waves(x), (x + 1, x))
