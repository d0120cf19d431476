"""Plans of small slices by the real TPU compiler, of the full-size model by its shapes, and what is refused; and that
what a method says of its steps is what they run."""
import collections
import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from conftest import load_config, one_device, tiny_config
from gvu_jax import checkpoint, optim, plan, sharding
from gvu_jax.families import xomni
from gvu_jax.methods import method_of
from gvu_jax.sampling import How
from gvu_jax.train import pictures_of, prompts_of
from gvu_jax.umm import Prompts


@pytest.fixture(scope="module")
def small():
    """(config, umm, params) of a tiny model that compiles in seconds and whose backbone two chips can share."""
    config = tiny_config()
    config.model.ar.num_key_value_heads = 2
    config.gvu.update(prompts=4, group=4, anchor=0.0, micro_batches=2)
    config.lora.rank = 2
    return (config, *checkpoint.describe_base(config))


@pytest.fixture(scope="module")
def planned(small):
    mesh = sharding.make_mesh("fsdp:2,tensor:2", plan.chips_of("v5e:2x2"))
    return plan.make_plan(*small, mesh, plan.CHIPS["v5e"])


def test_decoding_moves_activations_and_no_weights(planned):
    moved = planned["kinds"]["step"]["programs"]["sample"]["collectives"]
    assert {c["moves"] for c in moved if c["where"] == "decode loop"} == {"data"}
    assert any(c["moves"] == "weights" and c["where"] == "once" for c in moved)             # before the first token


def test_a_plan_adds_up(small, planned):
    config, umm, params = small
    step = planned["kinds"]["step"]
    assert list(step["programs"]) == ["sample", "render", "see", "read", "update"] and planned["fits"] is True
    parts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert {name: part["parameters"] for name, part in planned["parts"].items() if name != "trained"} == parts
    for program in step["programs"].values():
        assert program["needs"] >= planned["resident"] + program["temporaries"]
        assert program["seconds"] == max(program["seconds_of"].values()) > 0
        assert program["flops"] > 0 and program["collectives"]
    assert planned["seconds"] == pytest.approx(sum(program["seconds"] for program in step["programs"].values()))
    assert step["pictures_per_second"] == pytest.approx(16 / planned["seconds"])
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
    found = plan.plan_program(umm, program, (base, x), mesh, chip, resident=1000, waves=1, turns=None)
    batch = 16 * 8 * 4 // 2                                                      # rows over fsdp, alike over tensor
    assert found["needs"] == 1000 + batch + 5000 + (700 - 400) and found["fits"] == (found["needs"] <= 0.9 * 8000)
    assert found["flops"] == 2 * 16 * 8 * 12 / 4
    read = 8 * 12 * 4 / 2 + (16 * 8 + 16 * 12) * 4 / 4 + 32 * 4
    assert found["traffic"] == read
    assert found["seconds_of"] == {"compute": found["flops"] / 100, "memory": read / 10, "links": 32 * 4 * 3 / 4}
    assert found["seconds"] == 96 and [c["bytes"] for c in found["collectives"]] == [96]
    less = dataclasses.replace(chip, memory=7000)
    assert not plan.plan_program(umm, program, (base, x), mesh, less, 1000, 1, None)["fits"]


def config_of(name, family, changes):
    config = tiny_config(name, {"shapes_gap": "sft"}.get(name, "smoke"), family)
    config.update_from_flattened_dict({"steps": 2} | changes)
    return config


GAP = {"internal_gap.pool": 10, "internal_gap.batch": 12, "internal_gap.anchor": 1.0}
UAE = {"uae.cold": 1, "uae.pairs": 8, "uae.stages": "caption:1,draw:1", "steps": 3}


@pytest.mark.parametrize("name, family, changes", [
    ("shapes", "janus", {"gvu.anchor": 1.0, "reward.mean": "yes"}), ("shapes_uae", "janus", UAE),
    ("shapes_uae", "qwen_sd35", UAE | {"uae.reconstruct": "rescaled", "uae.scorers": "own=1"}),
    ("shapes_gap", "showo", GAP | {"reward.view": "tokens", "reward.mean": "geometric"})])
def test_what_is_planned_is_what_runs(name, family, changes, tmp_path, monkeypatch):
    """A whole run whose programs are stand-ins that give ones: each program runs as often as the plan counts it, on
    batches of the same shapes. Lengths of texts are the plan's own."""
    config = config_of(name, family, changes)
    (umm, params), ran = checkpoint.describe_base(config), collections.Counter()

    def look(program, args):
        leaves = jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, Prompts))
        return program.jitted.__wrapped__.__name__, *(
            x.tokens.shape[0] if isinstance(x, Prompts) else (x.shape, x.dtype) for x in leaves
            if isinstance(x, Prompts) or x.ndim)

    def stand_in(program, *args):
        ran[look(program, args)] += 1
        with jax.set_mesh(program.mesh):
            like = jax.eval_shape(program.jitted, *args)
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)

    monkeypatch.setattr(sharding.Program, "__call__", stand_in)
    steps, *_ = plan.rehearse(config, umm, params, one_device())
    metas, how = prompts_of(config)[0], How(images_per_prompt=4, **config.sampling)
    lengths = umm.lengths([meta["prompt"] for meta in metas])
    method = method_of(config)(umm, config, how, optim.build(config.optim, 10), one_device(), lengths, tmp_path)
    base = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    state, stream = method.init(base, jax.random.key(0)), pictures_of(config, umm)[0] if "pictures" in config else metas
    ran.clear()
    clock = types.SimpleNamespace(lap=lambda phase, result: result, stopped=lambda: False)
    for step in range(config.steps):
        method.update(state, base, *method.rollout(state, base, step, stream, jax.random.key(step), clock))
    expected = collections.Counter()
    for step in steps.values():
        for call in step.calls.values():
            expected[look(call.program, call.args)] += step.times * call.times
    assert expected == {look: times for look, times in ran.items() if look[0] not in ("geometric_mean", "yes")}


def test_a_run_of_several_kinds_of_step_adds_up(monkeypatch):
    """By hand: every program takes 2 s. Ten prompts are drawn in two calls of four programs, four updates have one. The
    replay draws at most all again, and steps 1 and 2 may probe for it."""
    config = config_of("shapes_gap", "xomni", GAP | {"steps": 4, "internal_gap.replay": 3, "internal_gap.probe": 1})
    monkeypatch.setattr(plan, "plan_program", lambda *_: {"seconds": 2.0, "fits": True, "compiled_in": 0.0})
    mesh = sharding.make_mesh("data:2", jax.devices()[:2])
    found = plan.make_plan(config, *checkpoint.describe_base(config), mesh, plan.CHIPS["v5e"])
    assert {name: (kind["times"], kind["more"], kind["seconds"]) for name, kind in found["kinds"].items()} == {
        "draw": (2, 4, 8.0), "update": (4, 0, 2.0)}
    assert found["kinds"]["draw"]["phases"] == {"sample": 2.0, "render": 2.0, "reward": 4.0, "update": 0.0}
    assert found["seconds"] == pytest.approx((2 * 8 + 4 * 2) / 4)
    hours = pytest.approx((2 * 24 / 3600, 2 * 32 / 3600))
    assert (found["chip_hours"], found["more_chip_hours"]) == hours and found["fits"] is True


def test_captions_are_drawn_without_moving_weights():
    """Of UAE, by the real compiler: what draws captions, whose loop is as long as a caption may be."""
    config = config_of("shapes_uae", "xomni", UAE | {"uae.prompts": 8})
    config.model.ar.num_key_value_heads = 2
    umm, params = checkpoint.describe_base(config)
    mesh = sharding.make_mesh("fsdp:2,tensor:2", plan.chips_of("v5e:2x2"))
    say = plan.rehearse(config, umm, params, mesh)[0]["caption"].calls["say"]
    found = plan.plan_program(umm, say.program, say.args, mesh, plan.CHIPS["v5e"], 0, 1, say.turns)
    assert say.turns == config.uae.words - 1 and found["fits"]
    assert {c["moves"] for c in found["collectives"] if c["where"] == "decode loop"} == {"data"}


def test_a_gpu_is_counted_and_not_compiled(small):
    """It can show what does not fit, and never what does; and it says so."""
    config, umm, params = small
    mesh, card = sharding.make_mesh("fsdp:-1", plan.chips_of("h100")), plan.CHIPS["h100"]
    found = plan.make_plan(config, umm, params, mesh, card)
    assert found["fits"] is None and "temporaries are not counted" in plan.describe(found)
    programs = found["kinds"]["step"]["programs"]
    assert programs["see"]["needs"] > found["resident"] and not any("temporaries" in p for p in programs.values())
    assert programs["update"]["results"] == 0                                  # they take the place of the state
    less = dataclasses.replace(card, memory=found["resident"])
    assert plan.make_plan(config, umm, params, mesh, less)["fits"] is False


def test_a_method_that_does_not_say_what_it_runs(small, monkeypatch):
    monkeypatch.delattr("gvu_jax.methods.gvu.GvU.rehearse")
    with pytest.raises(ValueError, match="gvu does not say what its steps run"):
        plan.rehearse(*small, one_device())


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
    see = plan.rehearse(config, umm, params, mesh)[0]["step"].calls["see"]
    see = plan.plan_program(umm, see.program, see.args, mesh, plan.CHIPS["v5e"], resident=0, waves=1, turns=None)
    assert not see["fits"] and "HBM" in see["error"] and see["seconds"] > 0


def test_parameters_per_chip_fall_with_fsdp_and_tensor():
    """The published model at full size: 27.7 billion parameters in bfloat16, by their shapes."""
    umm, params = checkpoint.describe_base(load_config("xomni"))
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
            plan.rehearse(config, umm, params, sharding.make_mesh(sizes))


@pytest.mark.parametrize("topology, word", [
    ("v9:2x2", "v5e, v5p, v6e"), ("h100:2", "h100"), ("v5e:3x5", "no slice v5e:3x5")])
def test_slices_that_do_not_exist(topology, word):
    with pytest.raises(ValueError, match=word):
        plan.chips_of(topology)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"gvu_jax\[tpu\]\""):
        plan.chips_of("v5e:2x2")
