"""The figures of a published size are those of the programs that training runs. (Sizes here are tiny ones.)"""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax import benchmark, families, full_size
from gvu_jax.families import janus_peers
from gvu_jax.sampling import How
from gvu_jax.umm import check_rollout
from test_benchmark import NANO_JANUS

CARD = full_size.Card("here", 1e9, 1e9)


@pytest.fixture(scope="module")
def umm():
    return janus_peers.build(NANO_JANUS, 4)


@pytest.fixture(scope="module")
def shapes(umm):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
                        jax.eval_shape(umm.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def found(umm, shapes):
    """{name: phase}"""
    return {phase[0]: full_size.trace_phase(*phase)
            for phase in full_size.phases(umm, shapes, [2], 2, ("sample", "see", "update"))}


def test_a_phase_runs_on_what_it_reads_alone(umm, shapes, found):
    results = {}
    for name in ("sample", "update"):
        arrays = found[name].arrays()
        held = {x.shape for x in arrays}
        assert shapes["ar"]["gen_head"]["fc2"]["kernel"].shape in held
        assert not any(x.shape in held for x in jax.tree.leaves(shapes["vq"]["decoder"]) if x.ndim == 4)
        results[name] = found[name].lowered.compile()(arrays)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(results[name]))
    (codes, logps), (_, metrics) = results.values()
    assert codes.shape == logps.shape == (2, umm.image_tokens) and metrics["grad_norm"] > 0


def test_a_token_reads_the_backbone_once(umm, shapes, found):
    layers = sum(x.size * 2 for x in jax.tree.leaves(shapes["ar"]["layers"]) if x.ndim == 3)
    head = sum(shapes["ar"]["gen_head"][name]["kernel"].size * 2 for name in ("fc1", "fc2"))
    codes = sum(shapes["ar"]["gen_aligner"][name]["kernel"].size * 2 for name in ("fc1", "fc2"))
    N = umm.image_tokens                                        # read for the prompts with and without words, and then
    assert found["sample"].cost.weights == (N - 1 + 2) * layers + N * head + (N - 1 + 2) * codes


def test_a_line_says_how_far_it_is_from_the_floor(found):
    phase = found["see"]
    line = full_size.time_phase(phase, lambda arrays: jnp.zeros(()), CARD, 3)
    assert len(line["seconds"]) == 3 and line["of_floor"] * np.median(line["seconds"]) == pytest.approx(
        max(phase.cost.flops, phase.cost.weights + phase.cost.data) / 1e9)

    def too_large(arrays):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    lines = [line, line | {"peer": 2.0}, full_size.time_phase(phase, too_large, CARD, 3)]
    assert "does not fit" in full_size.row(lines[-1])
    assert {full_size.row(line).count("|") for line in lines} == {full_size.HEADER.split("\n")[0].count("|")}


def test_a_peer_that_fails_is_told_and_what_it_drew_before_stays(umm, monkeypatch):
    import torch

    def sample(B, group, P, steps=4):
        if B > 1:
            raise TypeError("the library changed")
        return torch.zeros(B * group, steps)

    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(janus_peers, "sampler", lambda *_: sample)
    assert list(full_size.peer_seconds("janus", umm, [16, 8], told.append)) == [8]
    assert told == ["no peer for more pictures: TypeError in PyTorch's: the library changed"]

    def sampler(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nThe rest is long.")

    monkeypatch.setattr(janus_peers, "sampler", sampler)
    assert full_size.peer_seconds("janus", umm, [8], told.append) == {}
    assert told[1:] == ["no peer for any pictures: OutOfMemoryError in PyTorch's: CUDA out of memory."]


def test_a_step_is_the_sum_of_its_phases(found):
    see = full_size.time_phase(found["see"], lambda arrays: jnp.zeros(()), CARD, 1)
    bound = lambda line, compute, memory: line | dict(floors=dict(compute=compute, memory=memory))
    lines = [bound(see, 1.0, 3.0) | dict(phase="sample", pictures=2, seconds=[6.0, 4.0, 5.0]),
             bound(see, 1.0, 3.0) | dict(phase="sample", pictures=8, seconds=[50.0]),
             bound(see, 1.0, 3.0) | dict(phase="sample_int8", pictures=2, seconds=[50.0]),
             *(bound(see, 2.0, 1.0) | dict(phase=name, pictures=2, seconds=[3.0])
               for name in ("render", "see", "read", "update"))]
    step = full_size.whole_step(lines, 2)
    assert step["seconds"] == [17.0] and step["pictures_per_second"] == 2 / 17
    assert step["floors"] == dict(compute=8.0, memory=3.0) and step["of_floor"] == 11 / 17
    assert "| the whole step | 2 | 17.000 | 0.12 | 65%" in full_size.row(step)
    assert full_size.whole_step(lines, 8) is None                       # only drawing was measured


def test_drawing_in_int8_is_a_phase_of_rounded_weights(umm, shapes):
    phases = list(full_size.phases(umm, shapes, [2], 2, ("sample_int8",)))
    assert [(name, S) for name, _, _, S in phases] == [("sample_int8", 2)]
    text = str(jax.make_jaxpr(phases[0][1])(*phases[0][2]))
    assert "i8[" in text


def test_what_cannot_be_measured_is_refused(monkeypatch):
    set_to = lambda flag, value, present=False: monkeypatch.setattr(
        benchmark, flag, types.SimpleNamespace(value=value, present=present, name=flag[1:].lower()))
    for flag in ("_FAMILY", "_TOKENS", "_PROMPTS", "_GROUP", "_REPORT"):
        set_to(flag, None)
    set_to("_SIZE", "janus-pro-1b")
    for name, default in (("_BATCHES", ["8", "32"]), ("_PICTURES", 32), ("_PHASES", None), ("_ROUNDS", 1),
                          ("_REMAT", "nothing"), ("_MICRO", 8)):
        set_to(name, default)
    with pytest.raises(ValueError, match="is for a card, and JAX sees none here"):
        benchmark.main(None)
    set_to("_BATCHES", ["8", "12", "x", "1"])
    with pytest.raises(ValueError, match="12, x, 1; give 2 to 7, or multiples of 8"):
        benchmark.main(None)
    set_to("_PHASES", ["linear"])
    with pytest.raises(ValueError, match="there is no linear"):
        benchmark.main(None)
    set_to("_GROUP", 4, present=True)
    with pytest.raises(ValueError, match="says itself what --group would say"):
        benchmark.main(None)


@pytest.mark.parametrize("size", families.SIZES)
def test_the_sizes_are_published_ones(size):
    family, override, name = families.SIZES[size]
    umm = families.FAMILIES[family].published(override, name)
    assert umm.kind == family
    rounded = full_size.step_config(umm, 8, rollout=dict.fromkeys(umm.int8, "int8")).rollout
    check_rollout(umm, How(**rounded))
    parts = [full_size.step_config(umm, 32, micro).gvu.micro_batches for micro in (8, 12, 3, 1, 64)]
    assert parts == [4, 4, 16, 32, 1]                                   # of 8, 8, 2, 1 and 32 pictures


def test_what_a_family_cannot_round_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(full_size, "peer_seconds", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="--phases=sample_int8: sd35 draws by a flow, which is never rounded"):
        full_size.measure("sd35", [2], 2, ["sample_int8"], 1, print)
