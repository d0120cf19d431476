"""The benchmark compares like with like, notices when it does not, and counts what it divides by."""
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gvu_jax import benchmark, report
from gvu_jax.families import janus_peers, showo_peers, xomni_peers

AR = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
NANO = dict(
    ar=AR,
    vision=dict(width=16, layers=1, heads=2, mlp_hidden=16, codebook_size=16, codebook_dim=8, z_channels=8, groups=2),
    flux=dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
              axes_dims_rope=(4, 2, 2)),
    vae=dict(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2))
NANO_JANUS = dict(
    ar=AR, vision=dict(width=16, layers=1, heads=2, mlp_hidden=16),
    vq=dict(codebook_size=16, codebook_dim=8, z_channels=8, channels=32, multipliers=(1, 1), res_blocks=1))


NANO_SHOWO = dict(
    ar=AR, vq=dict(bits=4, encoder_channels=32, decoder_channels=32, encoder_multipliers=(1, 2),
                   decoder_multipliers=(1, 2), encoder_blocks=(1, 2), decoder_blocks=(2, 1)))


@pytest.fixture(scope="module", params=[(xomni_peers, NANO), (janus_peers, NANO_JANUS), (showo_peers, NANO_SHOWO)],
                ids=["xomni", "janus", "showo"])
def bench(request):
    torch.set_num_threads(1)                               # more would wait for each other beside the other tests
    return benchmark.Bench(*request.param, tokens=4, prompts=2, group=2)


@pytest.fixture(scope="module")
def lines(bench):
    """The table of everything: each phase compared, then timed."""
    return benchmark.measure(bench, benchmark.phases_of(bench.peers), 3, benchmark.Machine("here", 1e9, 1e9))


def test_every_phase_equals_its_peers_and_gets_its_lines(bench, lines):
    assert [line["phase"] for line in lines] == [
        "sample", *bench.peers.PARTS, "render", "see", "reward", "reward", "update", "step", "step"]
    for line in lines:
        assert line["ratio"] == np.median(np.divide(line["theirs"], line["ours"]))
        assert benchmark.row(line).count("|") == benchmark.HEADER.split("\n")[0].count("|")
        assert line["over_floor"] * line["floor"] == pytest.approx(np.median(line["ours"]))


def test_one_forward_beats_one_forward_per_word(lines):
    assert next(line for line in lines if line["phase"] == "reward")["ratio"] > 3


@pytest.mark.parametrize("phase, leaf", [
    ("sample", "ar/.*q_proj/kernel"), ("reward", "ar/lm_head/kernel"),
    ("see", "vision/.*(codebook|norm/scale)|vq/encoder/quant_conv/bias")])
def test_a_peer_with_other_weights_is_not_timed(bench, lines, monkeypatch, phase, leaf):
    """leaf: the path of what is moved, a regular expression."""
    moved = lambda path: re.fullmatch(leaf, "/".join(p.key for p in path))
    shift = lambda path, x: x + jnp.linspace(0, 1, x.size).reshape(x.shape) if moved(path) else x
    other = jax.tree_util.tree_map_with_path(shift, bench.params)
    monkeypatch.setattr(bench, "params", other)                       # the peers hold the weights from before
    with pytest.raises(ValueError, match="differ"):
        bench.phase(phase).check()


def test_products_are_counted_through_loops():
    w, x = jnp.ones((8, 8)), jnp.ones((2, 8))
    loop = lambda x: jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, length=5)[0]
    assert benchmark.flops(loop, x) == 5 * 2 * 2 * 8 * 8
    assert benchmark.flops(jax.grad(lambda x: loop(x).sum()), x) == 2 * 5 * 2 * 2 * 8 * 8
    picture, kernel = jnp.ones((1, 6, 6, 3)), jnp.ones((3, 3, 3, 7))
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    assert benchmark.flops(convolve, picture) == 2 * 36 * 7 * 3 * 9


def test_sides_take_turns():
    seen = []
    taken = benchmark.alternate({name: lambda name=name: seen.append(name) for name in "AB"}, 2)
    assert seen == ["A", "B", "A", "B"] and [len(x) for x in taken.values()] == [2, 2]


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_of_the_cost(monkeypatch, power):
    class Costly:
        def __init__(self, peers, sizes, tokens, prompts, group):
            self.our_step = lambda: lambda: 0.1 * (prompts * group) ** power

    monkeypatch.setattr(benchmark, "Bench", Costly)
    monkeypatch.setattr(benchmark, "seconds", lambda run: run())
    for line in benchmark.linear(xomni_peers, NANO, 4, 3, 2, times=(1, 2, 4)).values():
        assert line["pictures"] == [2, 4, 8] and line["exponent"] == pytest.approx(power)


def test_the_page_has_the_table_and_the_plot(lines, tmp_path):
    growth = {what: dict(pictures=[2, 4, 8], seconds=[0.2, 0.4, 0.8], exponent=1.0) for what in ("G", "prompts")}
    (tmp_path / "benchmark.json").write_text(json.dumps(dict(
        size="nano", tokens=4, prompts=2, group=2, machine=benchmark.Machine("a <slow> one", 1e9, 1e9)._asdict(),
        phases=lines, linear=growth)))
    page = report.write_benchmark(tmp_path).read_text()
    assert page.count("<svg") == 2 and "a &lt;slow&gt; one" in page
    assert all(report.spread(line["ratios"], 1) in page and line["peer"] in page for line in lines)


def test_a_size_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="no square number"):
        xomni_peers.build(NANO, 250)


def test_a_family_without_peers_is_refused(monkeypatch):
    for flag, value in (("_SIZE", "small"), ("_FAMILY", "qwen_sd35")):
        monkeypatch.setattr(benchmark, flag, types.SimpleNamespace(value=value))
    with pytest.raises(ValueError, match="not been written; compare xomni, janus or showo"):
        benchmark.main(None)


def test_rounding_passes_and_nothing_else():
    x = np.linspace(-1, 1, 9)
    benchmark.assert_equal("x", x * (1 + 1e-6), x)
    for wrong in (x + 1e-3, x * np.nan):
        with pytest.raises(ValueError, match="x differ"):
            benchmark.assert_equal("x", wrong, x)
