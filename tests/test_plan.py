"""Plans of small slices by the real TPU compiler, of the full-size model by its shapes, and what is refused."""
import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from conftest import load_config, tiny_config
from gvu_jax import plan, sharding
from gvu_jax.families import xomni


@pytest.fixture(scope="module")
def small():
    """(config, umm, params) of a tiny model that compiles in seconds and whose backbone two chips can share."""
    config = tiny_config()
    config.model.ar.num_key_value_heads = 2
    config.gvu.update(prompts=4, group=4, anchor=0.0, micro_batches=2)
    config.lora.rank = 2
    return (config, *plan.model_of(config))


@pytest.fixture(scope="module")
def planned(small):
    mesh = sharding.make_mesh("fsdp:2,tensor:2", plan.chips_of("v5e:2x2"))
    return plan.make_plan(*small, mesh, plan.CHIPS["v5e"])


def test_decoding_moves_activations_and_no_weights(planned):
    moved = planned["programs"]["sample"]["collectives"]
    assert {c["moves"] for c in moved if c["where"] == "decode loop"} == {"data"}
    assert any(c["moves"] == "weights" and c["where"] == "once" for c in moved)             # before the first token


def test_a_plan_adds_up(small, planned):
    config, umm, params = small
    assert list(planned["programs"]) == ["sample", "render", "see", "read", "update"] and planned["fits"]
    parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert {name: part["parameters"] for name, part in planned["parts"].items() if name != "trained"} == parts
    for program in planned["programs"].values():
        assert program["needs"] >= planned["resident"] + program["temporaries"]
        assert program["seconds"] == max(program["seconds_of"].values()) > 0
        assert program["flops"] > 0 and program["collectives"]
    assert planned["seconds"] == pytest.approx(sum(program["seconds"] for program in planned["programs"].values()))
    assert planned["images_per_second"] == pytest.approx(16 / planned["seconds"])
    assert planned["chip_hours"] == pytest.approx(config.steps * planned["seconds"] * 4 / 3600)


GATHER = """HloModule x, num_partitions=4

ENTRY %main (p: f32[8], q: f32[4]) -> f32[32] {
  %p = f32[8]{0} parameter(0), metadata={op_name="base[\\'ar\\'][\\'mm_head\\'][\\'kernel\\']"}
  %q = f32[4]{0} parameter(1), metadata={op_name="x"}
  ROOT %gathered = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_what_a_program_needs_and_takes():
    """By hand: [16, 8] times a kernel [8, 12] over fsdp 2 x tensor 2. Results that take an argument's place count with
    it; a chip reads its half of the kernel, and its share of what goes in and out."""
    mesh = sharding.make_mesh("fsdp:2,tensor:2", jax.devices()[:4])
    kernel, umm = {"ar": {"mm_head": {"kernel": jax.ShapeDtypeStruct((8, 12), jnp.float32)}}}, xomni.MODEL
    base = sharding.place(umm.partition, kernel, mesh)
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding.batch_sharding(mesh, 16))
    traced = jax.jit(lambda base, x: x @ base["ar"]["mm_head"]["kernel"]).trace(base, x)
    compiled = types.SimpleNamespace(as_text=lambda: GATHER, memory_analysis=lambda: types.SimpleNamespace(
        output_size_in_bytes=700, alias_size_in_bytes=400, temp_size_in_bytes=5000, argument_size_in_bytes=90,
        peak_memory_in_bytes=80))
    lowered = types.SimpleNamespace(compile=lambda compiler_options: compiled)
    program = types.SimpleNamespace(jitted=types.SimpleNamespace(
        trace=lambda *args: types.SimpleNamespace(jaxpr=traced.jaxpr, lower=lambda: lowered)))
    chip = plan.Chip(memory=8000, flops=100.0, bandwidth=10.0, links=1.0)
    found = plan.plan_program(umm, program, (base, x), mesh, chip, resident=1000, busy=4, decoded=None)
    batch = 16 * 8 * 4 // 2                                                      # rows over fsdp, alike over tensor
    assert found["needs"] == 1000 + batch + 5000 + (700 - 400) and found["fits"] == (found["needs"] <= 0.9 * 8000)
    assert found["flops"] == 2 * 16 * 8 * 12 / 4
    read = 8 * 12 * 4 / 2 + (16 * 8 + 16 * 12) * 4 / 4 + 32 * 4
    assert found["traffic"] == read
    assert found["seconds_of"] == {"compute": found["flops"] / 100, "memory": read / 10, "links": 32 * 4 * 3 / 4}
    assert found["seconds"] == 96 and [c["bytes"] for c in found["collectives"]] == [96]
    less = dataclasses.replace(chip, memory=7000)
    assert not plan.plan_program(umm, program, (base, x), mesh, less, 1000, 4, None)["fits"]


def test_a_plan_as_text_and_as_json(planned):
    text = plan.describe(planned)
    assert max(map(len, text.splitlines())) <= 120
    for word in ("from the compiler", "estimated", "decode loop", "chip-hours", "It fits"):
        assert word in text
    assert json.loads(json.dumps(planned)) == planned


def test_what_the_compiler_finds_too_large(small):
    """A batch of pictures that no v5e holds: the plan says so, and still counts."""
    config, umm, params = small
    config = config.copy_and_resolve_references()
    config.gvu.update(prompts=2 ** 16, group=64)
    mesh = sharding.make_mesh("fsdp:4", plan.chips_of("v5e:2x2"))
    step, _, _ = plan.step_of(config, umm, params, mesh)
    see = plan.plan_program(umm, *step["see"], mesh, plan.CHIPS["v5e"], resident=0, busy=4, decoded=None)
    assert not see["fits"] and "HBM" in see["error"] and see["seconds"] > 0


def test_parameters_per_chip_fall_with_fsdp_and_tensor():
    """The published model at full size: 27.7 billion parameters in bfloat16, by their shapes."""
    umm, params = plan.model_of(load_config("xomni"))
    whole = 2 * sum(x.size for x in jax.tree.leaves(params))
    assert 55e9 < whole < 56e9
    for sizes, shares in (("fsdp:8", 8), ("fsdp:2,tensor:4", 8), ("data:2,fsdp:2,tensor:2", 4)):
        share = whole / shares
        assert share <= plan.held(sharding.place(umm.partition, params, sharding.make_mesh(sizes))) <= 1.05 * share


def test_a_mesh_that_cannot_work_is_refused_with_the_reason(small):
    config, umm, params = small
    config = config.copy_and_resolve_references()
    config.gvu.micro_batches = 4
    for sizes, reason in (("tensor:4", "heads"), ("fsdp:8", "micro-batches"), ("fsdp:16", "16 devices")):
        with pytest.raises(ValueError, match=reason):
            plan.step_of(config, umm, params, sharding.make_mesh(sizes))


@pytest.mark.parametrize("topology, word", [("v9:2x2", "v5e, v5p, v6e"), ("v5e:3x5", "no slice v5e:3x5")])
def test_slices_that_do_not_exist(topology, word):
    with pytest.raises(ValueError, match=word):
        plan.chips_of(topology)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"gvu_jax\[tpu\]\""):
        plan.chips_of("v5e:2x2")
