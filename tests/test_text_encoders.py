"""The text encoders against transformers on random weights, and against the recorded values of the reference."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gvu_jax.described import Described
from gvu_jax.models import text_encoders, torch_keys
from gvu_jax.models.text_encoders import ClipConfig, ClipText, T5Config, T5Encoder

T5 = {
    "wide-heads": T5Config(vocab_size=40, d_model=24, d_kv=16, d_ff=40, num_layers=3, num_heads=2,
                           feed_forward_proj="gated-gelu"),
    "narrow-heads": T5Config(vocab_size=31, d_model=20, d_kv=3, d_ff=12, num_layers=1, num_heads=5,
                             relative_attention_num_buckets=8, relative_attention_max_distance=20,
                             layer_norm_epsilon=1e-3, feed_forward_proj="gated-gelu"),
    "first-t5": T5Config(vocab_size=17, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                         relative_attention_num_buckets=18, relative_attention_max_distance=50),
}
CLIP = {
    "quick-gelu, largest id": ClipConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                                         num_attention_heads=4, max_position_embeddings=13, eos_token_id=2),
    "gelu, largest id": ClipConfig(vocab_size=30, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
                                   num_attention_heads=1, max_position_embeddings=9, hidden_act="gelu",
                                   layer_norm_eps=1e-3, eos_token_id=2),
    "gelu, own end": ClipConfig(vocab_size=44, hidden_size=30, intermediate_size=25, num_hidden_layers=1,
                                num_attention_heads=5, max_position_embeddings=9, hidden_act="gelu", eos_token_id=7),
    "quick-gelu, own end": ClipConfig(vocab_size=21, hidden_size=12, intermediate_size=36, num_hidden_layers=2,
                                      num_attention_heads=3, max_position_embeddings=11, eos_token_id=20),
}


def torch_model(config, device="cpu", seed=0):
    """transformers' encoder with every parameter, norms and biases included, drawn at random."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs, described = ((transformers.T5EncoderModel, transformers.T5Config) if isinstance(config, T5Config) else
                         (transformers.CLIPTextModel, transformers.CLIPTextConfig))
    with torch.device(device):
        model = theirs(described(**vars(config), attn_implementation="eager")).eval()
    if device != "meta":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tensors_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_close(ours, theirs):
    """Equal up to 1e-5 of the largest value: float32, sums in another order."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# ------------------------------------------------------------------ against transformers

@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("name", T5)
def test_t5_equals_transformers(name, length):
    torch, config = pytest.importorskip("torch"), T5[name]
    model = torch_model(config)
    ids = np.random.default_rng(length).integers(0, config.vocab_size, (3, length))
    params = text_encoders.from_torch(tensors_of(model), config)
    ours = jax.jit(T5Encoder(config).apply)({"params": params}, ids)
    assert ours.shape == (3, length, config.d_model)
    with torch.no_grad():
        assert_close(ours, model(torch.from_numpy(ids)).last_hidden_state.numpy())


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (18, 50), (4, 9), (64, 256), (10, 1000)])
def test_position_buckets_equal_transformers(buckets, max_distance):
    """Every pair of 600 positions, where the buckets' borders fall on exact powers and where they do not."""
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention
    place = torch.arange(600)
    theirs = T5Attention._relative_position_bucket(place[None, :] - place[:, None], True, buckets, max_distance)
    np.testing.assert_array_equal(text_encoders.position_buckets(600, buckets, max_distance), theirs.numpy())


def clip_ids(config, length):
    """Four rows: the end of text early and padded with itself, late, twice, and missing."""
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = np.random.default_rng(length).integers(0, config.vocab_size - 1, (4, length))
    ids[ids == end] = 0
    ids[0, 1:], ids[1, -1], ids[2, [1, -2]] = end, end, end
    return ids


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("name", CLIP)
def test_clip_equals_transformers(name, short):
    torch, config = pytest.importorskip("torch"), CLIP[name]
    model = torch_model(config)
    ids = clip_ids(config, config.max_position_embeddings - 3 * short)
    params = text_encoders.from_torch(tensors_of(model), config)
    last, pooled, second = jax.jit(ClipText(config).apply)({"params": params}, ids)
    assert last.shape == (*ids.shape, config.hidden_size) and pooled.shape == (4, config.hidden_size)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), output_hidden_states=True)
    assert_close(last, theirs.last_hidden_state.numpy())
    assert_close(pooled, theirs.pooler_output.numpy())
    assert_close(second, theirs.hidden_states[-2].numpy())


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def golden(fixtures):
    """folder of the checkpoint -> (config, params), every size from its own files; and the expected values."""
    safetensors = pytest.importorskip("safetensors.numpy")

    def read(folder, kind):
        config = Described(fixtures / "flux/base" / folder / "config.json").numbers(kind)
        tensors = safetensors.load_file(fixtures / "flux/base" / folder / "model.safetensors")
        return config, text_encoders.from_torch(tensors, config)

    return read, np.load(fixtures / "flux/expected.npz")


@pytest.mark.parametrize("which", ["prompt", "empty"])
def test_golden_t5(golden, which):
    read, expected = golden
    config, params = read("text_encoder_2", T5Config)
    ours = jax.jit(T5Encoder(config).apply)({"params": params}, expected[f"t5_ids_{which}"])
    np.testing.assert_allclose(ours, expected[f"t5_out_{which}"], atol=5e-4)


@pytest.mark.parametrize("which", ["prompt", "empty"])
def test_golden_clip(golden, which):
    read, expected = golden
    config, params = read("text_encoder", ClipConfig)
    last, pooled, _ = jax.jit(ClipText(config).apply)({"params": params}, expected[f"clip_ids_{which}"])
    np.testing.assert_allclose(last, expected[f"clip_last_{which}"], atol=5e-4)
    np.testing.assert_allclose(pooled, expected[f"clip_pooled_{which}"], atol=5e-4)


# ------------------------------------------------------------------ at full size, shapes only

XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
               feed_forward_proj="gated-gelu")
CLIP_L = ClipConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, eos_token_id=2)


@pytest.mark.parametrize("config, ids, outputs", [
    (XXL, (2, 512), [(2, 512, 4096)]), (CLIP_L, (2, 77), [(2, 77, 768), (2, 768), (2, 77, 768)])],
    ids=["t5-xxl", "clip-l"])
def test_full_size(config, ids, outputs):
    shapes = jax.eval_shape(lambda: text_encoders.init(config, jax.random.key(0)))
    result = jax.eval_shape(text_encoders.module(config).apply, {"params": shapes}, jax.ShapeDtypeStruct(ids, int))
    assert [leaf.shape for leaf in jax.tree.leaves(result)] == outputs
    model = torch_model(config, device="meta")
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------ contracts

@pytest.mark.parametrize("config", [T5["wide-heads"], CLIP["gelu, own end"]], ids=["t5", "clip"])
def test_bfloat16_in_bfloat16_out(config):
    params = text_encoders.from_torch(drawn(config), config)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    ids, apply = jnp.array([[3, 5, 7]]), jax.jit(text_encoders.module(config).apply)
    for exact, rounded in zip(*(jax.tree.leaves(apply({"params": p}, ids)) for p in (params, half))):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())


def test_clip_has_no_more_positions_than_its_table():
    with pytest.raises(ValueError, match="10 ids, .* positions for 9"):
        ClipText(CLIP["gelu, own end"]).apply({"params": {}}, jnp.zeros((1, 10), int))


def read(kind, values):
    return Described("config.json", values).numbers(kind)


def test_configs_are_read_from_config_json():
    for config in (T5["narrow-heads"], CLIP["gelu, own end"]):
        assert read(type(config), vars(config) | {"architectures": ["Some"], "dropout_rate": 0.1}) == config
    described = {k: v for k, v in vars(XXL).items() if not k.startswith("relative")}        # as old files are
    assert read(T5Config, described) == XXL


@pytest.mark.parametrize("config, change, message", [
    (XXL, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not implemented"),
    (XXL, {"relative_attention_num_buckets": 2}, "buckets 2"),
    (XXL, {"relative_attention_max_distance": 8}, "max_distance 8"),
    (CLIP_L, {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not implemented"),
    (CLIP_L, {"eos_token_id": [2, 3]}, r"eos_token_id is \(2, 3\), which is no int"),
    (CLIP_L, {"num_attention_heads": 10}, "768 is not a multiple of 10 heads"),
])
def test_what_is_not_implemented_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        read(type(config), vars(config) | change)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="config.json does not say 'd_kv'"):
        read(T5Config, {k: v for k, v in vars(XXL).items() if k not in ("d_kv", "d_ff")})


# ------------------------------------------------------------------ checkpoints under their several names

def drawn(config, prefix=""):
    """A random checkpoint (name -> array) for a config, named as `rules` says, so that no torch is needed."""
    rows, normal = {}, np.random.default_rng(0).standard_normal
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: text_encoders.init(config, jax.random.key(0))), sep="/")
    for path, leaf in shapes.items():
        name = torch_keys.torch_name(path, text_encoders.rules(config, [prefix]))
        shape = leaf.shape[1:] if "{layer" in name else leaf.shape
        for row in torch_keys.layer_names(name, leaf.shape[0]):
            rows[row] = normal(shape[::-1] if path.endswith("kernel") else shape, np.float32)
    return rows


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_t5_table_under_either_name_or_both():
    config = T5["wide-heads"]
    tensors = drawn(config)
    params = text_encoders.from_torch(tensors, config)
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    same(text_encoders.from_torch(both, config), params)
    del both["shared.weight"]
    same(text_encoders.from_torch(both, config), params)
    del both["encoder.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"missing keys \['shared\.weight'\]"):
        text_encoders.from_torch(both, config)


def test_clip_with_and_without_prefix_and_position_numbers():
    config = CLIP["gelu, own end"]
    bare, prefixed = drawn(config), drawn(config, "text_model.")
    assert sorted(prefixed) == sorted("text_model." + name for name in bare)
    params = text_encoders.from_torch(bare, config)
    same(text_encoders.from_torch(prefixed, config), params)
    numbers = np.arange(config.max_position_embeddings)[None]
    same(text_encoders.from_torch(bare | {"embeddings.position_ids": numbers}, config), params)
    same(text_encoders.from_torch(prefixed | {"text_model.embeddings.position_ids": numbers}, config), params)


@pytest.mark.parametrize("config, damage, message", [
    (T5["wide-heads"], lambda t: t.pop("encoder.block.2.layer.1.DenseReluDense.wi_1.weight"),
     r"missing.*block\.2\.layer\.1\.DenseReluDense\.wi_1"),
    (T5["wide-heads"], lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
     r"missing.*block\.0\..*relative_attention_bias"),
    (T5["wide-heads"], lambda t: t.update({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": 0}),
     r"unknown.*block\.1\..*relative_attention_bias"),
    (T5["wide-heads"], lambda t: t.update({"shared.weight": np.zeros((41, 24))}), r"key shared\.weight: \(41, 24\)"),
    (dataclasses.replace(T5["wide-heads"], feed_forward_proj="relu"),
     lambda t: t.update({"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": 0}), r"unknown.*wi_0"),
    (CLIP["gelu, own end"], lambda t: t.pop("encoder.layers.0.mlp.fc1.bias"), r"missing.*layers\.0\.mlp\.fc1\.bias"),
    (CLIP["gelu, own end"], lambda t: t.update({"encoder.layers.1.mlp.fc1.bias": 0}), r"unknown.*layers\.1\.mlp"),
    (CLIP["gelu, own end"], lambda t: t.update({"embeddings.position_embedding.weight": np.zeros((8, 30))}),
     r"position_embedding\.weight: \(8, 30\)"),
    (CLIP["gelu, own end"], lambda t: t.update({"text_projection.weight": 0}), r"unknown.*text_projection"),
])
def test_checkpoint_errors_name_the_key(config, damage, message):
    tensors = drawn(config)
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        text_encoders.from_torch(tensors, config)
