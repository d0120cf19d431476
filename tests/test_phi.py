"""Show-o's language model against the golden data, and against transformers' Phi on random weights."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvu_jax.models import phi, torch_keys

TINY = phi.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=4, vocab_size=50, image_vocab_size=8, partial_rotary_factor=0.25)


def call(config, params, method, *arguments, picture=(0, 0), **more):
    """A method of the network, compiled."""
    run = jax.jit(lambda params, *arguments: phi.Phi(config, picture).apply(
        {"params": params}, *arguments, method=method, **more))
    return run(params, *arguments)


# ------------------------------------------------------------------ against the fixture

def halves(ids, N):
    """Ids of rows of t2i [B, T] -> the text's [B, P] and the picture's with soi and eoi [B, N + 2]."""
    return ids[:, :-N - 2], ids[:, -N - 2:]


def test_golden_hidden_states_and_logits(showo):
    """Row 0 as a whole, text and picture apart: each layer's input, and all columns of the head."""
    told, expected, config = showo.told, showo.arrays("t2i"), showo.config
    N, pad = told["num_vq_tokens"], told["special_ids"]["<|pad|>"]
    text, picture = halves(expected["partial_input_ids"], N)
    real = text != pad

    @jax.jit
    def run(params):
        model, variables = phi.Phi(config), {"params": params}
        (before, prefix), one = model.apply(variables, text, real, method="before", mutable=["intermediates"])
        after, two = model.apply(variables, prefix, real, picture, method="behind", mutable=["intermediates"])
        hidden = jnp.concatenate([before, after], axis=1)
        layers = jnp.concatenate([state["intermediates"]["layers"]["layer_input"][0] for state in (one, two)], axis=2)
        return layers, hidden, model.apply(variables, hidden, method="text_logits")

    layers, hidden, logits = jax.device_get(run(showo.params))
    counted = np.concatenate([real[0], np.ones(N + 2, bool)])
    states = [*layers[:, 0], hidden[0]]
    assert len(states) == len(expected["hidden_states_row0"])
    for found, recorded in zip(states, expected["hidden_states_row0"]):
        np.testing.assert_allclose(found[counted], recorded[counted], atol=5e-4)
    np.testing.assert_allclose(logits[0][counted], expected["logits_full_row0"][counted], atol=2e-4)
    np.testing.assert_allclose(logits[:, -N - 1:-1, config.first_code:config.first_code + config.image_vocab_size],
                               call(config, showo.params, "image_logits", hidden[:, -N - 1:-1]), atol=1e-5)


def test_golden_attention_mask(showo):
    """Who reads whom, as the network behaves: a token's state moves with exactly those that it may read."""
    told, expected, config = showo.told, showo.arrays("t2i"), showo.config
    N, pad = told["num_vq_tokens"], told["special_ids"]["<|pad|>"]
    text, picture = (part[:1] for part in halves(expected["input_ids"], N))
    real, T = text != pad, expected["input_ids"].shape[1]

    @jax.jit
    def run(text, picture):
        model, variables = phi.Phi(config), {"params": showo.params}
        before, prefix = model.apply(variables, text, real, method="before")
        return jnp.concatenate([before, model.apply(variables, prefix, real, picture, method="behind")], axis=1)[0]

    start, reads = np.asarray(run(text, picture)), np.zeros((T, T), bool)
    for column in range(T):
        ids = np.concatenate([text, picture], axis=1)
        ids[0, column] = 0 if ids[0, column] else 1
        reads[:, column] = np.abs(np.asarray(run(*halves(ids, N))) - start).max(axis=1) > 1e-6
    rows = np.concatenate([real[0], np.ones(N + 2, bool)])
    np.testing.assert_array_equal(reads[rows], expected["attention_mask"][0][rows])


def test_golden_reading(showo):
    """Whole rows of context and answer: logits of all columns where the answer is said."""
    told, expected, config = showo.told, showo.arrays("understand"), showo.config
    eoi = told["special_ids"]["<|eoi|>"]
    for i, _ in enumerate(told["understand"]):
        context, answer = expected[f"context_ids_{i}"], expected[f"answer_ids_{i}"]
        row, end = np.concatenate([context, answer])[None], int(np.flatnonzero(context == eoi)[0]) + 1
        T = expected[f"attention_mask_{i}"].shape[0]
        hidden, _ = call(config, showo.params, None, row[:, :T], np.ones((1, T), bool), picture=(0, end))
        logits = call(config, showo.params, "text_logits", hidden)[0, len(context) - 1:len(context) - 1 + len(answer)]
        np.testing.assert_allclose(logits, expected[f"answer_logits_{i}"], atol=2e-4)


# ------------------------------------------------------------------ against transformers

def theirs_of(config, seed=0, std=0.3):
    """transformers' Phi with every parameter drawn at random, and its tensors under Show-o's names."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.PhiForCausalLM(transformers.PhiConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, qk_layernorm=True, layer_norm_eps=config.layer_norm_eps,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta,
                             partial_rotary_factor=config.partial_rotary_factor),
        attn_implementation="eager", pad_token_id=0, bos_token_id=0, eos_token_id=0)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model, {f"showo.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "num_key_value_heads": 2}],
                         ids=["phi", "grouped"])
def test_equals_transformers(changes):
    """A row of text, and a text with a picture behind it, whose tokens read each other: theirs is given the mask."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(TINY, **changes)
    theirs, tensors = theirs_of(config)
    params, rng = phi.from_torch(tensors, config), np.random.default_rng(0)
    P, T, G = 5, 6, 3
    text, picture = rng.integers(0, 50, (2, P)), rng.integers(0, 50, (2 * G, T))
    real = np.array([[False, False, True, True, True], [True] * 5])
    rows = np.concatenate([np.repeat(text, G, axis=0), picture], axis=1)
    mask = np.tril(np.ones((P + T, P + T), bool))
    mask[P:, P:] = True
    mask = mask & np.concatenate([np.repeat(real, G, axis=0), np.ones((2 * G, T), bool)], axis=1)[:, None, :]
    with torch.no_grad():
        bias = torch.where(torch.from_numpy(mask)[:, None], 0.0, torch.finfo(torch.float32).min)
        expected = theirs(torch.from_numpy(rows), attention_mask=bias).logits.numpy()
        causal = theirs(torch.from_numpy(rows)).logits.numpy()

    _, prefix = call(config, params, "before", text, real)
    found = call(config, params, "text_logits", call(config, params, "behind", prefix, real, picture))
    np.testing.assert_allclose(found, expected[:, P:], atol=2e-4)
    found = call(config, params, "text_logits", call(config, params, None, rows, np.ones(rows.shape, bool))[0])
    np.testing.assert_allclose(found, causal, atol=2e-4)
    first = config.first_code
    codes = call(config, params, "image_logits", call(config, params, "behind", prefix, real, picture))
    np.testing.assert_allclose(codes, expected[:, P:, first:first + config.image_vocab_size], atol=2e-4)


def test_token_after_token_is_what_all_at_once_find(key):
    """With layers in a scan, and with each by itself."""
    params, rng = phi.init(TINY, key), np.random.default_rng(1)
    text, real = rng.integers(0, 50, (2, 4)), np.ones((2, 4), bool)

    def steps(params):
        model, variables = phi.Phi(TINY), {"params": params}
        cache = model.empty_cache(2, 4, jnp.float32)
        stepper, weights, apart = model.for_steps(variables, cache)
        assert stepper.apart
        for t in range(4):
            at = text[:, t:t + 1], real, jnp.full((2, 1), t)
            one, cache = model.apply(variables, *at, cache, t)
            other, apart = stepper.apply(weights, *at, apart, t)
            yield one[:, 0], other[:, 0]

    whole, _ = call(TINY, params, None, text, real)
    for t, found in enumerate(jax.jit(lambda params: list(steps(params)))(params)):
        for hidden in found:
            np.testing.assert_allclose(hidden, whole[:, t], atol=1e-5)


def test_checkpoint_errors_name_the_key():
    config = dataclasses.replace(TINY, vision_width=6)
    shapes = jax.eval_shape(lambda: phi.init(config, jax.random.key(0)))
    tensors = torch_keys.to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), phi.RULES)
    phi.from_torch(tensors, config)
    name = "mm_projector.2.bias"
    without = {k: v for k, v in tensors.items() if k != name}
    for message, spoilt in {"missing keys": without, "key": {**tensors, name: np.zeros(3)},
                            "unknown keys": {**tensors, f"{name}s": np.zeros(1)}}.items():
        with pytest.raises(ValueError, match=message + ".*" + re.escape(name)):
            phi.from_torch(spoilt, config)
