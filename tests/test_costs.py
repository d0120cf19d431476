"""Arithmetic against hand counts and XLA's own, traffic between chips on programs where it is known."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from gvu_jax import costs
from gvu_jax.models import layers, xomni
from gvu_jax.sampling import How

SMALL = xomni.Config(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=32, mm_vocab_size=24, image_vocab_size=20, num_mm_adap_layers=1,
                     num_mm_head_layers=1)


def counted(function, weights, *data):
    """The cost of function(weights, *data), where a chip computes with half of every weight."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights, *data))
    fractions = [0.5] * len(jax.tree.leaves(weights)) + [costs.DATA] * len(jax.tree.leaves(data))
    return costs.count(jax.jit(function).trace(*shapes).jaxpr, fractions)


def test_products_and_convolutions_are_what_xla_counts_itself():
    def product(w, x):
        return jnp.einsum("bsd,de->bse", x, w)

    def convolution(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for function, w, x in ((product, (8, 12), (3, 5, 8)), (convolution, (3, 3, 8, 4), (2, 9, 9, 8))):
        w, x = jnp.zeros(w, jnp.bfloat16), jnp.zeros(x)
        cost = counted(function, w.astype(jnp.float32), x)
        assert cost.flops == jax.jit(function).lower(w.astype(jnp.float32), x).compile().cost_analysis()["flops"]
        assert cost.weights == 2 * w.size and cost.data == 4 * (x.size + function(w.astype(jnp.float32), x).size)


def test_what_lies_in_int8_is_read_in_int8():
    """And rounding a weight reads it, as it was, and writes it once. A chip computes with half of the weight."""
    def product(w, x):
        q, step = layers.to_int8(w, 0)
        return jax.lax.scan(lambda x, _: ((x @ q.astype(x.dtype)) * step, None), x, None, length=10)[0]

    def attended(_, k, x):
        q, step = layers.to_int8(k, -1)
        return jax.lax.scan(lambda x, _: ((q * step).astype(x.dtype) @ x, None), x, None, length=10)[0]

    w, x, y = jnp.zeros((16, 16), jnp.bfloat16), jnp.zeros((2, 16)), jnp.zeros((16, 2), jnp.bfloat16)
    cost = counted(product, w, x)
    assert cost.weights == 256 * (2 + 1 + 10) / 2 and cost.data == 10 * 4 * (32 + 32)
    assert counted(attended, (), w, y).data == 10 * (256 + 2 * (32 + 32))


def forward_flops(c, rows, length, keys):
    """By hand: a forward of `rows` x `length` positions through all layers, each reading `keys` positions."""
    E = c.hidden_size // c.num_attention_heads
    matrices = c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * E + 3 * c.intermediate_size)
    return c.num_hidden_layers * 2 * rows * length * (matrices + 2 * keys * c.hidden_size)


def backbone(c):
    shapes = jax.eval_shape(lambda: xomni.init(c, jax.random.key(0)))
    tokens, mask = jax.ShapeDtypeStruct((2, 7), jnp.int32), jax.ShapeDtypeStruct((2, 7), bool)
    return shapes, tokens, mask


def test_a_scanned_forward_and_its_backward_by_hand():
    params, tokens, mask = backbone(SMALL)

    def loss(params, tokens, mask, config=SMALL):
        hidden, _ = xomni.XOmni(config).apply({"params": params}, tokens, mask)
        return jnp.sum(hidden)

    once = forward_flops(SMALL, 2, 7, 7)
    assert counted(loss, params, tokens, mask).flops == once
    assert counted(jax.grad(loss), params, tokens, mask).flops == 3 * once                # backward: two for one
    again = functools.partial(loss, config=dataclasses.replace(SMALL, remat="all"))
    down = SMALL.num_hidden_layers * 2 * 14 * SMALL.hidden_size * SMALL.intermediate_size   # nothing needs its result
    assert counted(jax.grad(again), params, tokens, mask).flops == 4 * once - down


def test_decoding_reads_every_weight_for_every_token():
    from gvu_jax import sampling
    params, tokens, mask = backbone(SMALL)
    steps, G = 5, 3

    def draw(params, tokens, mask, key):
        return sampling.decode(xomni.XOmni(SMALL), {"params": params}, tokens, mask, key, How(images_per_prompt=G),
                               steps=steps, head="image_logits", offset=SMALL.vocab_size)

    cost = counted(draw, params, tokens, mask, jax.random.key(0))
    slots = 7 + steps - 1                                       # of the prompt, and of what was drawn but the last
    head = 2 * 2 * G * SMALL.hidden_size * SMALL.mm_vocab_size * steps
    assert cost.flops == forward_flops(SMALL, 2, 7, 7) + (steps - 1) * forward_flops(SMALL, 2 * G, 1, slots) + head
    matrices = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(params["layers"]["layer"])
                   + jax.tree_util.tree_leaves_with_path(params["mm_head_layers"]) if path[-1].key == "kernel")
    assert cost.weights == 4 * 0.5 * steps * (matrices + params["mm_head"]["kernel"].size)


def test_what_runs_on_each_device_and_in_a_kernel_counts_for_all(sharded):
    def halves(w, x):
        return jax.shard_map(lambda x, w: x @ w, mesh=sharded((8,), "fsdp").sharding.mesh, in_specs=(
            PartitionSpec("fsdp"), PartitionSpec(None, "tensor")), out_specs=PartitionSpec("fsdp", "tensor"))(x, w)

    def kernel(w, x):
        def tile(x, w, out):
            out[...] = x[...] @ w[...]
        rows = pl.BlockSpec((8, 64), lambda i: (i, 0))
        return pl.pallas_call(tile, jax.ShapeDtypeStruct((16, 64), jnp.float32), grid=(2,), in_specs=[
            rows, pl.BlockSpec((64, 64), lambda i: (0, 0))], out_specs=rows, interpret=True)(x, w)

    w, x = jnp.zeros((64, 64)), jnp.zeros((16, 64))
    assert counted(halves, w, x).flops == counted(kernel, w, x).flops == 2 * 16 * 64 * 64
    assert counted(kernel, w, x).data == 4 * (16 * 64 + 64 * 64 + 16 * 64)


# ------------------------------------------------------------------ compiled programs

@pytest.fixture(scope="module")
def sharded():
    """shape, axes -> ShapeDtypeStruct on a mesh of fsdp 2 x tensor 4."""
    if jax.device_count() < 8:
        pytest.fail("conftest gives 8 devices")
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return lambda shape, *axes: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_what_moves_and_where(sharded):
    """Weights divided over fsdp: gathered in every one of 6 turns, or once before the loop when told so."""
    def turns(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["ar"])[0]

    def gathered_first(params, x):
        whole = jax.lax.with_sharding_constraint(params["ar"], sharded((6, 64, 64), None, None, "tensor").sharding)
        return turns({"ar": whole}, x)

    params, x = {"ar": sharded((6, 64, 64), None, "fsdp", "tensor")}, sharded((16, 64), "fsdp")
    found = costs.collectives(compiled(turns, params, x), r"\['ar'\]")
    inside = [c for c in found if c.loops]
    weights = [c for c in inside if c.weights]
    assert [(c.kind, c.bytes, c.group, c.loops) for c in weights] == [("all-gather", 64 * 16 * 4, 2, (6,))]
    assert weights[0].times * weights[0].wire == 6 * 64 * 16 * 4 / 2
    activations = [c for c in inside if not c.weights]
    assert [(c.kind, c.bytes, c.group) for c in activations] == [("all-gather", 8 * 64 * 4, 4)]

    found = costs.collectives(compiled(gathered_first, params, x), r"\['ar'\]")
    assert not any(c.weights for c in found if c.loops)
    assert [(c.bytes, c.loops) for c in found if c.weights] == [(6 * 64 * 16 * 4, ())]
    assert not any(c.weights for c in costs.collectives(compiled(gathered_first, params, x), "nothing"))


def test_sums_and_loops_in_loops(sharded):
    def function(w, x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w @ w.T), x), None
        return jnp.sum(jax.lax.scan(outer, x, length=5)[0])

    found = costs.collectives(compiled(function, sharded((64, 64), None, "tensor"), sharded((16, 64), "fsdp")), "^w$")
    sums = [c for c in found if c.kind == "all-reduce"]
    assert {(c.loops, c.bytes) for c in sums} == {((5, 3), 8 * 64 * 4), ((), 4)}
    inner = next(c for c in sums if c.loops)
    assert inner.group == 4 and inner.times == 15 and inner.wire == 2 * inner.bytes * 3 / 4


def test_every_way_of_writing_a_collective():
    """Asynchronous pairs count once, with the shape of what they give; groups are written in three ways."""
    text = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%scatter (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
}

%left (l: bf16[4]) -> bf16[4] {
  ROOT %l = bf16[4]{0} parameter(0)
}

%right (r: bf16[4]) -> bf16[4] {
  %r = bf16[4]{0} parameter(0)
  ROOT %turn = bf16[4]{0} all-to-all(%r), replica_groups={}, dimensions={0}
}

ENTRY %main (x: f32[8,4], y: bf16[4], i: s32[]) -> bf16[4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="params[\\'ar\\'][\\'w\\']"}
  %y = bf16[4]{0} parameter(1), metadata={op_name="x"}
  %i = s32[] parameter(2), metadata={op_name="i"}
  %start = (f32[8,4]{1,0}, f32[16,4]{1,0:T(8,128)(2,1)}) all-gather-start(%x), replica_groups={{0,1},{2,3}}
  %done = f32[16,4]{1,0} all-gather-done(%start)
  %async = ((f32[8,4]{1,0}), f32[2,4]{1,0}, s32[]) async-start(%x), calls=%scatter
  %waited = f32[2,4]{1,0} async-done(%async)
  %sum = (f32[8,4]{1,0}, bf16[4]{0}) all-reduce-start(%x, %y), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}
  %summed = (f32[8,4]{1,0}, /*index=1*/bf16[4]{0}) all-reduce-done(%sum)
  %second = bf16[4]{0} get-tuple-element(%summed), index=1
  %sent = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%second), source_target_pairs={{0,1},{1,0}}
  %got = bf16[4]{0} collective-permute-done(%sent)
  ROOT %chosen = bf16[4]{0} conditional(%i, %got, %got), branch_computations={%left, %right}
}
"""
    found = {c.kind: c for c in costs.collectives(text, r"\['ar'\]")}
    assert len(found) == len(costs.collectives(text, "")) == 5
    kinds = {kind: (c.shape, c.bytes, c.group, c.weights, c.wire) for kind, c in found.items()}
    assert kinds == {"all-gather": ("f32[16,4]", 256, 2, True, 128), "reduce-scatter": ("f32[2,4]", 32, 4, True, 96),
                     "all-reduce": ("f32[8,4] bf16[4]", 136, 4, True, 204),
                     "collective-permute": ("bf16[4]", 8, 8, False, 8), "all-to-all": ("bf16[4]", 8, 8, False, 7)}


def test_a_collective_carried_through_a_loop_counts_once():
    text = """HloModule m, num_partitions=2

%piece (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=7, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = f32[4]{0} get-tuple-element(%b), index=1
  %more = f32[8]{0} fusion(%w), kind=kCustom, calls=%piece
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %w)
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4]{0} parameter(0), metadata={op_name="w"}
  %first = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
  %zero = s32[] constant(0)
  %state = (s32[], f32[4]{0}) tuple(%zero, %x)
  %loop = (s32[], f32[4]{0}) while(%state), condition=%condition, body=%body
  ROOT %last = f32[8]{0} fusion(%x), kind=kCustom, calls=%piece
}
"""
    (once,) = costs.collectives(text, "w")
    assert once.loops == () and once.weights and once.bytes == 32
    loose = costs.collectives(text.replace("async_collective_fusion_config", "other"), "w")
    assert [c.loops for c in loose] == [(), (5,), ()]


def test_a_loop_without_an_end_is_refused():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < x[0] * 7, lambda x: x * 2, x)

    with pytest.raises(ValueError, match="does not say how often it runs"):
        costs.collectives(compiled(until, jnp.ones(3)), "x")


def test_attention_by_cudnn_counts_as_its_products(monkeypatch):
    """Twice the multiplications of q k^T and of what is mixed; the scores once more for the gradient, which has four
    products of its own; half of all where it is causal. It is traced, and not run, as on a card."""
    for name, answer in (("check_cudnn_version", 91300), ("check_compute_capability", True),
                         ("is_cuda_compute_capability_equal", False)):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)
    B, T, H, K, E = 2, 8, 4, 2, 16
    q, k = (jax.ShapeDtypeStruct((B, T, heads, E), jnp.bfloat16) for heads in (H, K))
    for causal in (True, False):
        attend = functools.partial(layers.cudnn_attention, mask=None, causal=causal)
        one, share = 2 * B * H * T * T * E, 0.5 if causal else 1.0
        cost = costs.count(jax.jit(attend).trace(q, k, k).jaxpr, [costs.DATA] * 3)
        assert cost.flops == 2 * one * share and cost.data == 2 * (2 * B * T * H * E + 2 * B * T * K * E)
        gradient = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        assert costs.count(jax.jit(gradient).trace(q, k, k).jaxpr, [costs.DATA] * 3).flops == 7 * one * share
