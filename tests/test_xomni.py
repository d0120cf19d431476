"""The backbone against the golden data of the published model, and against transformers' Qwen2 where they coincide."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gvu_jax import sampling
from gvu_jax.models import layers, torch_keys, xomni

TINY = xomni.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=50, mm_vocab_size=12, image_vocab_size=8, num_mm_adap_layers=1,
                    num_mm_head_layers=1)


@pytest.fixture(scope="module")
def golden(fixtures):
    """(config, params, folder of expected values) of the golden checkpoint."""
    from safetensors.numpy import load_file
    folder = fixtures / "xomni"
    told = json.loads((folder / "config.json").read_text())
    names = [field.name for field in dataclasses.fields(xomni.Config)]
    config = xomni.Config(**{k: v for k, v in told.items() if k in names} | {
        "sliding_window": told["sliding_window"] if told["use_sliding_window"] else None})
    return config, xomni.from_torch(load_file(folder / "model.safetensors"), config), folder / "expected"


def test_golden_logits_and_every_layer(golden):
    config, params, folder = golden
    expected, model = np.load(folder / "logits.npz"), xomni.XOmni(config)
    tokens, mask = expected["input_ids"], expected["attention_mask"].astype(bool)
    for suffix, positions in (("", None), ("_explicit_pos", expected["position_ids_generate"])):
        @jax.jit
        def run(params):
            (hidden, _), state = model.apply({"params": params}, tokens, mask, positions, mutable=["intermediates"])
            return hidden, state, *(model.apply({"params": params}, hidden, method=head)
                                    for head in ("text_logits", "image_logits"))
        hidden, state, text, image = run(params)
        V, K = config.vocab_size, config.image_vocab_size
        np.testing.assert_allclose(text[mask], expected[f"logits_text{suffix}"][mask][:, :V], atol=2e-4)
        np.testing.assert_allclose(image[mask], expected[f"logits_image{suffix}"][mask][:, V:V + K], atol=2e-4)
        if positions is None:
            np.testing.assert_allclose(hidden[mask], expected["last_hidden_state"][mask], atol=2e-4)
            inputs = np.concatenate([state["intermediates"][stack]["layer_input"][0]                # [layers, B, T, D]
                                     for stack in ("layers", "mm_head_layers") if stack in state["intermediates"]])
            np.testing.assert_allclose(inputs[:, mask], expected["layer_hidden_states"][:, mask], atol=2e-4)


def test_golden_greedy_pictures(golden):
    """Without guidance and with every scale that is recorded."""
    config, params, folder = golden
    expected = np.load(folder / "generate.npz")
    suppress = [t - config.vocab_size for t in expected["suppress_tokens"].tolist()]
    scales = [name.removeprefix("tokens_cfg") for name in expected if name.startswith("tokens_cfg")]
    assert len(scales) > 1 and "1" in scales
    for scale in scales:
        codes = expected[f"tokens_cfg{scale}"] - config.vocab_size
        how = sampling.How(temperature=0.0, guidance=float(scale),
                           suppress=tuple(t for t in suppress if 0 <= t < config.image_vocab_size))
        drawn, _ = sampling.decode(
            xomni.XOmni(config), {"params": params}, jnp.asarray(expected["input_ids"]),
            jnp.asarray(expected["attention_mask"], bool), jax.random.key(0), how, steps=codes.shape[1],
            head="image_logits", offset=config.vocab_size, negative=jnp.asarray(expected["negative_prompt_ids"][0]))
        np.testing.assert_array_equal(drawn, codes)


def test_golden_answer(golden):
    config, params, folder = golden
    expected = np.load(folder / "understand.npz")
    tokens = jnp.asarray(expected["input_ids"])
    drawn, _ = sampling.decode(
        xomni.XOmni(config), {"params": params}, tokens, jnp.ones_like(tokens, bool), jax.random.key(0),
        sampling.How(temperature=0.0), steps=expected["tokens"].shape[1], head="text_logits", offset=0)
    np.testing.assert_array_equal(drawn, expected["tokens"])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("width, heads, kv_heads, layers, theta", [
    (32, 4, 2, 3, 1e6), (48, 3, 3, 2, 1e4), (64, 8, 1, 4, 500.0)])
def test_on_text_without_multimodal_layers_it_is_qwen2(width, heads, kv_heads, layers, theta, window):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = dataclasses.replace(
        TINY, num_mm_adap_layers=0, num_mm_head_layers=0, sliding_window=window, max_window_layers=1, vocab_size=50,
        mm_vocab_size=12, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, rope_theta=theta)
    theirs = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=50, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, rope_theta=theta, rms_norm_eps=1e-6, tie_word_embeddings=False, max_window_layers=1,
        use_sliding_window=window is not None, sliding_window=window, attn_implementation="eager")).eval()
    tensors = {k.replace("embed_tokens", "lm_embed_tokens").replace("model.norm", "model.lm_norm"): v.detach().numpy()
               for k, v in theirs.state_dict().items()}
    tensors |= {"model.mm_embed_tokens.weight": np.zeros((12, width), np.float32),
                "model.mm_norm.weight": np.ones(width, np.float32), "mm_head.weight": np.zeros((12, width), np.float32)}
    params, model = xomni.from_torch(tensors, config), xomni.XOmni(config)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 11))
    ours = jax.jit(lambda params: model.apply({"params": params}, model.apply(
        {"params": params}, tokens, np.ones_like(tokens, bool))[0], method="text_logits"))(params)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_full_size():
    """Qwen2-7B's 28 layers and 4 multimodal ones on either side: the parameters of a Qwen2 of 36 layers, and the
    multimodal table, head and norm."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = xomni.Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=36, num_attention_heads=28,
                          num_key_value_heads=4, vocab_size=152064, mm_vocab_size=16448, image_vocab_size=16384,
                          num_mm_adap_layers=4, num_mm_head_layers=4)
    shared = {name: value for name, value in vars(config).items() if "mm" not in name and hasattr(Qwen2Config(), name)}
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=False))
    shapes = jax.eval_shape(lambda: xomni.init(config, jax.random.key(0)))
    multimodal = 2 * config.mm_vocab_size * config.hidden_size + config.hidden_size
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(p.numel() for p in qwen2.parameters()) + multimodal
    assert shapes["mm_head_layers"]["layer"]["self_attn"]["k_proj"]["kernel"].shape == (4, 3584, 4 * 128)

    def run(params, tokens):
        hidden, _ = xomni.XOmni(config).apply({"params": params}, tokens, jnp.ones_like(tokens, bool))
        return [xomni.XOmni(config).apply({"params": params}, hidden, method=head)
                for head in ("text_logits", "image_logits")]

    text, image = jax.eval_shape(run, shapes, jax.ShapeDtypeStruct((2, 1400), jnp.int32))
    assert text.shape == (2, 1400, 152064) and image.shape == (2, 1400, 16384)


def test_multimodal_layers_leave_text_alone_but_let_pictures_read_it():
    """With every layer multimodal, a text position ends as norm(embedding), and a picture still depends on the text."""
    config = dataclasses.replace(TINY, num_mm_adap_layers=3, num_mm_head_layers=0)
    params, model = jax.jit(xomni.init, static_argnums=0)(config, jax.random.key(0)), xomni.XOmni(config)
    tokens = jnp.array([[3, 4, 51, 52]])
    run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, jnp.ones_like(tokens, bool))[0])
    embedded = params["lm_embed_tokens"]["embedding"][jnp.array([3, 4])]
    rms = jnp.sqrt(jnp.mean(embedded ** 2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(run(tokens)[0, :2], embedded / rms, rtol=1e-5)
    assert not np.allclose(run(tokens)[0, 2:], run(tokens.at[0, 0].set(9))[0, 2:])


def test_padding_on_the_left_changes_nothing():
    params, model = jax.jit(xomni.init, static_argnums=0)(TINY, jax.random.key(0)), xomni.XOmni(TINY)
    tokens = jnp.array([[3, 4, 51, 52]])
    padded, mask = jnp.pad(tokens, ((0, 0), (3, 0))), jnp.pad(jnp.ones((1, 4), bool), ((0, 0), (3, 0)))
    plain, _ = model.apply({"params": params}, tokens, jnp.ones((1, 4), bool))
    np.testing.assert_allclose(model.apply({"params": params}, padded, mask)[0][:, 3:], plain, atol=1e-5)


@pytest.mark.parametrize("spoil, word", [
    (lambda t: t.pop("model.lm_norm.weight"), "model.lm_norm.weight"),
    (lambda t: t.update(extra=np.zeros(1)), "extra"),
    (lambda t: t.update({"mm_head.weight": np.zeros((3, 32))}), "mm_head.weight")])
def test_a_wrong_checkpoint_is_named_by_its_key(spoil, word):
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: xomni.init(TINY, jax.random.key(0))), sep="/")
    tensors = {}
    for path, leaf in shapes.items():
        name = torch_keys.torch_name(path, xomni.rules(TINY))
        shape = leaf.shape[1:] if "{layer" in name else leaf.shape
        for row in torch_keys.layer_names(name, leaf.shape[0]):
            tensors[row] = np.zeros(shape[::-1] if path.endswith("kernel") else shape)
    xomni.from_torch(tensors, TINY)
    spoil(tensors)
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        xomni.from_torch(tensors, TINY)


def test_text_can_do_without_the_trailing_multimodal_layers():
    params, model = jax.jit(xomni.init, static_argnums=0)(TINY, jax.random.key(0)), xomni.XOmni(TINY)
    tokens = jnp.array([[3, 51, 52, 4, 7]])
    whole, cut = (model.apply({"params": params}, tokens, jnp.ones_like(tokens, bool), text_only=t)[0] for t in (0, 1))
    np.testing.assert_array_equal(whole[0, 3:], cut[0, 3:])
    assert not np.allclose(whole[0, 1:3], cut[0, 1:3])


@pytest.mark.parametrize("causal, mask_rows", [(True, 600), (False, 600), (False, 1), (False, None)])
def test_long_rows_in_blocks_are_the_rows_at_once(causal, mask_rows):
    """600 positions go in three blocks, the last of them shorter; values and gradients."""
    rng, T = np.random.default_rng(0), 600
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, T, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    mask = None
    if mask_rows:
        mask = jnp.asarray(rng.random((2, mask_rows, T)) < 0.5) | jnp.eye(T, dtype=bool)[:mask_rows]
        mask = mask & jnp.tril(jnp.ones((T, T), bool)) if causal else mask
    both = [jax.jit(lambda q, k, v, g, of=of: (of(q, k, v), *jax.vjp(of, q, k, v)[1](g)))(q, k, v, g) for of in (
        lambda q, k, v: layers.attend(q, k, v, mask), lambda q, k, v: layers.attention(q, k, v, mask, causal))]
    for expected, found in zip(*both):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
