"""Janus-Pro's language model against the golden data: reading, drawing, what is rewarded, and gradients."""
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from conftest import janus_params
from gvu_jax import described, objectives, rewards, sampling, sharding, umm
from gvu_jax.models import llama, qwen2, siglip, torch_keys, vq

TINY = llama.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=50, image_vocab_size=8, code_width=4, vision_width=12,
                    image_head_width=24)


# ------------------------------------------------------------------ how the layers are run

@pytest.mark.parametrize("remat", ["nothing", "all"])
def test_layers_written_out_on_a_gpu_give_the_same_gradients(remat, monkeypatch, key):
    config = dataclasses.replace(TINY, remat=remat)
    params, tokens = llama.init(config, key), jnp.arange(12).reshape(2, 6)

    def loss(params):
        hidden, _ = llama.Llama(config).apply({"params": params}, tokens, jnp.ones_like(tokens, bool))
        return jnp.sum(hidden ** 2)

    loops = lambda: jax.jit(jax.grad(lambda params: loss(params))).lower(params).as_text().count("stablehlo.while")
    expected, before = jax.jit(jax.grad(loss))(params), loops()
    monkeypatch.setattr(qwen2, "platform", lambda: "gpu")
    assert before == 2 and loops() == (0 if remat == "nothing" else 2)       # forwards and backwards
    found = jax.jit(jax.grad(lambda params: loss(params)))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected)


# ------------------------------------------------------------------ the golden model, read in one program

class Reader:
    """Teacher-forced forwards of the golden model: rows of ids -> what the heads read, in one compiled shape."""

    def __init__(self, janus):
        self.janus, self.config, self.params = janus, janus.configs["ar"], janus.params["ar"]
        self.model = llama.Llama(self.config)
        self.first_code = self.config.vocab_size
        self.first_patch = self.config.vocab_size + self.config.image_vocab_size
        self.placeholder = janus.cases["tokenizer"]["ids"]["image_placeholder"]
        described = json.loads((janus.folder / "preprocessor_config.json").read_text())
        self.transform = siglip.Transform(described["image_size"], described["min_size"])
        self.patches = janus.configs["vision"].pos_table_side ** 2
        asked, told, drawn = janus.arrays("understand"), janus.cases["reward"]["cases"], janus.arrays("grpo")["codes"]
        longest = max(
            asked["full_ids"].shape[1], asked["batch_input_ids"].shape[1] + max(
                asked[name].shape[1] for name in ("greedy_tokens", "batch_greedy_tokens")),
            len(told[0]["context_ids"]) + max(len(case["target_ids"]) for case in told),
            *(len(case["context_ids"]) for case in janus.cases["yesno"]["cases"]),
            max(map(len, [*prompts_of(janus)[2], *policy_prompts(janus)])) + drawn.shape[1])
        self.length = -(-longest // 64) * 64

        @jax.jit
        def run(params, tokens, mask, seen):
            (hidden, _), state = self.model.apply(
                {"params": params}, tokens, mask, seen=seen, mutable=["intermediates"])
            return hidden, state["intermediates"]["layers"]["layer_input"][0]

        self.run = run
        self.text = jax.jit(lambda hidden: self.model.apply({"params": self.params}, hidden, method="text_logits"))
        self.image = jax.jit(lambda hidden: self.model.apply({"params": self.params}, hidden, method="image_logits"))

    def see(self, pictures):
        """PIL pictures -> [B, N, D]."""
        pixels = np.stack([siglip.fit_image(picture, self.transform) for picture in pictures])
        features = siglip.VisionTransformer(self.janus.configs["vision"]).apply(
            {"params": self.janus.params["vision"]}, pixels, method="features")
        return self.model.apply({"params": self.params}, features, method="align")

    def patched(self, ids):
        """Ids as published, [T] -> ours: the k-th placeholder of a row is the k-th patch of its picture."""
        ids = np.asarray(ids)
        holds = ids == self.placeholder
        return np.where(holds, self.first_patch + np.cumsum(holds) - 1, ids)

    def rows(self, rows, masks=None):
        """Rows of ids [T] -> tokens, mask [rows, length], padded on the right, where a causal model reads nothing."""
        tokens = np.zeros((len(rows), self.length), np.int64)
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            tokens[i, :len(row)], mask[i, :len(row)] = row, True if masks is None else masks[i]
        return tokens, mask

    def read(self, rows, seen=None, masks=None):
        """-> hidden [rows, length, D], each layer's input [layers, rows, length, D]; four rows are read at a time."""
        seen = np.zeros((len(rows), self.patches, self.config.hidden_size), np.float32) if seen is None else seen
        parts, whole = [], (*self.rows(rows, masks), np.asarray(seen))
        for start in range(0, len(rows), 4):
            four = np.minimum(np.arange(start, start + 4), len(rows) - 1)
            parts.append(jax.device_get(self.run(self.params, *(x[four] for x in whole))))
        hidden, inputs = zip(*parts)
        return np.concatenate(hidden)[:len(rows)], np.concatenate(inputs, axis=1)[:, :len(rows)]

    def code_logits(self, prompts, codes):
        """Logits [rows, N, K] of each code, teacher-forced; prompts: rows of ids, codes [rows, N]."""
        hidden, _ = self.read([[*prompt, *(row[:-1] + self.first_code)] for prompt, row in zip(prompts, codes)])
        N = codes.shape[1]
        return np.asarray(self.image(np.stack([h[len(p) - 1:len(p) - 1 + N] for h, p in zip(hidden, prompts)])))


@pytest.fixture(scope="module")
def reader(janus):
    return Reader(janus)


def picture(janus, name):
    with Image.open(janus.folder / name) as image:
        return image.convert("RGB")


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))


# ------------------------------------------------------------------ reading

def test_golden_answer(janus, reader):
    """A chat about a picture: embeddings, every layer, logits of a given answer, and of the greedy one."""
    expected, told = janus.arrays("understand"), janus.cases["understand"]
    seen = reader.see([picture(janus, told["image"])])
    prompt, full = reader.patched(expected["input_ids"][0]), reader.patched(expected["full_ids"][0])
    np.testing.assert_array_equal(prompt >= reader.first_patch, expected["images_seq_mask"][0])
    assert expected["images_emb_mask"].all() and expected["images_emb_mask"].sum() == reader.patches
    greedy = expected["greedy_tokens"][0]
    hidden, inputs = reader.read([full, [*prompt, *greedy[:-1]]], np.repeat(seen, 2, axis=0))
    T, tail = len(full), expected["last_hidden_state_tail"].shape[1]
    np.testing.assert_allclose(inputs[0, 0, :len(prompt)], expected["inputs_embeds"][0], atol=5e-4)
    np.testing.assert_allclose(inputs[:, :1, T - tail:T], expected["layer_hidden_states_tail"], atol=5e-4)
    np.testing.assert_allclose(hidden[:1, T - tail:T], expected["last_hidden_state_tail"], atol=5e-4)

    answer = expected["answer_ids"]
    np.testing.assert_array_equal(full[None, len(prompt):], answer)
    logits = reader.text(hidden[:1, len(prompt) - 1:T - 1])
    np.testing.assert_allclose(logits, expected["answer_logits"], atol=2e-4)
    theirs = np.load(janus.folder.with_name("janus_hf") / "expected/outputs.npz")["answer_logits"]
    np.testing.assert_allclose(logits, theirs, atol=2e-4)
    np.testing.assert_allclose(umm.gather_logps(logits, answer), expected["answer_logprobs"], atol=2e-4)
    logits = reader.text(hidden[1:, len(prompt) - 1:len(prompt) - 1 + len(greedy)])
    np.testing.assert_allclose(logits, expected["greedy_logits"], atol=2e-4)


def test_golden_batch_of_chats(janus, reader):
    """Two chats of different length and pictures: a bare forward, and greedy answers beside that of the test above."""
    expected, told = janus.arrays("understand"), janus.cases["understand"]
    seen = reader.see([picture(janus, name) for name in (told["image"], told["second_image"])])
    tokens, mask = map(np.array, (expected["batch_input_ids"], expected["batch_attention_mask"].astype(bool)))
    np.testing.assert_array_equal(tokens == reader.placeholder, expected["batch_images_seq_mask"])
    tokens = np.stack([reader.patched(row) for row in tokens])
    hidden, _ = reader.read(tokens, seen, masks=mask)
    T = tokens.shape[1]
    np.testing.assert_allclose(reader.text(hidden[:, T - 1]), expected["batch_last_logits"], atol=2e-4)

    alone = reader.patched(expected["input_ids"][0])
    P = max(T, len(alone))
    rows, real = np.zeros((3, P), int), np.zeros((3, P), bool)
    for i, (row, kept) in enumerate([(alone, np.ones(len(alone), bool)), *zip(tokens, mask)]):
        rows[i, P - len(row):], real[i, P - len(row):] = row, kept
    batch = expected["batch_greedy_tokens"]
    steps, eos = max(expected["greedy_tokens"].shape[1], batch.shape[1]), janus.cases["tokenizer"]["ids"]["eos"]
    drawn, logps = jax.jit(lambda seen: sampling.decode(
        reader.model, {"params": reader.params}, jnp.asarray(rows), jnp.asarray(real), jax.random.key(0),
        sampling.How(temperature=0.0), steps, "text_logits", 0, stop=eos, seen=seen))(jnp.concatenate([seen[:1], seen]))
    for of, said, logps_of in (("greedy", drawn[:1], logps[:1]), ("batch_greedy", drawn[1:], logps[1:])):
        words = expected[f"{of}_tokens"]
        np.testing.assert_array_equal(said[:, :words.shape[1]], words)
        recorded = np.where(umm.until_end(words, eos), umm.gather_logps(expected[f"{of}_logits"], words), 0)
        np.testing.assert_allclose(logps_of[:, :words.shape[1]], recorded, atol=2e-4)
    # The same rows without their padding, which a forward whose positions follow the mask is equal to.
    forced = [[*row[kept], *said[:-1]] for row, kept, said in zip(tokens, mask, batch)]
    hidden, _ = reader.read(forced, seen)
    ends = [kept.sum() - 1 for kept in mask]
    found = np.stack([h[end:end + batch.shape[1]] for h, end in zip(hidden, ends)])
    np.testing.assert_allclose(reader.text(found), expected["batch_greedy_logits"], atol=2e-4)


def test_golden_rewards(janus, reader):
    """The prompt's own words after a drawn picture, and yes or no about it."""
    expected, told = janus.arrays("reward"), janus.cases["reward"]["cases"]
    pictures = [Image.fromarray(drawn) for drawn in expected["pictures_uint8"]]
    pixels = siglip.centred(siglip.fit_image(pictures[0], reader.transform)[None], janus.configs["vision"].patch_size)
    np.testing.assert_allclose(np.moveaxis(pixels, -1, 1), expected["pixel_values_0"], atol=1e-6)
    seen = reader.see(pictures)
    context = reader.patched(told[0]["context_ids"])             # the same for all cases: the prompt is not asked about
    rows = [[*context, *case["target_ids"]] for case in told]
    hidden, _ = reader.read(rows, np.stack([seen[case["picture"]] for case in told]))
    logps = log_softmax(reader.text(hidden[:, len(context) - 1:]))
    words, L = expected["token_logprobs"], expected["token_logprobs"].shape[1]
    found = np.full(words.shape, np.nan)
    for i, case in enumerate(told):
        length = len(case["target_ids"])
        found[i, :length] = logps[i, np.arange(length), case["target_ids"]]
        eos = logps[i, length, janus.cases["tokenizer"]["ids"]["eos"]]
        np.testing.assert_allclose(eos, case["eos_logprob"], atol=2e-4)
    np.testing.assert_allclose(found, words, atol=2e-4)
    mask = ~np.isnan(words)
    reward = rewards.geometric_mean(np.where(mask, found, 0).astype(np.float32), mask)
    np.testing.assert_allclose(np.log(reward), expected["mean_logprob"], atol=1e-4)
    np.testing.assert_allclose(np.log(reward), [case["mean_logprob"] for case in told], atol=1e-4)
    np.testing.assert_allclose(reward, [case["geometric_mean"] for case in told], rtol=1e-4)
    np.testing.assert_allclose(np.nansum(found, axis=1), [case["sum_logprob"] for case in told], atol=1e-4 * L)

    told = janus.cases["yesno"]["cases"]
    rows = [reader.patched(case["context_ids"]) for case in told]
    hidden, _ = reader.read(rows, np.stack([seen[case["picture"]] for case in told]))
    logits = np.asarray(reader.text(np.stack([h[len(row) - 1] for h, row in zip(hidden, rows)])))
    np.testing.assert_allclose(logits, expected["yesno_last_logits"], atol=2e-4)
    answers = log_softmax(logits)[:, expected["yesno_ids"][:2]]                                     # [B, 2]: yes, no
    np.testing.assert_allclose(np.exp(answers), [[case["p_yes"], case["p_no"]] for case in told], rtol=2e-4)
    two_way = rewards.yes(answers.reshape(-1, 1), np.ones((answers.size, 1), bool))
    np.testing.assert_allclose(two_way, expected["yesno_p_yes_two_way"], atol=1e-4)
    np.testing.assert_allclose(two_way, [case["p_yes_two_way"] for case in told], atol=1e-4)


# ------------------------------------------------------------------ drawing

def prompts_of(janus):
    """Both prompts left-padded: tokens, mask [2, P]; and as rows of their own length."""
    expected = janus.arrays("generate")
    alone = [expected["prompt_ids"][0], expected["prompt2_ids"][0]]
    P, pad = max(map(len, alone)), janus.cases["tokenizer"]["ids"]["pad"]
    tokens = jnp.array([[pad] * (P - len(row)) + row.tolist() for row in alone])
    return tokens, jnp.array([[i >= P - len(row) for i in range(P)] for row in alone]), alone


def policy_prompts(janus):
    """The prompt of each picture that the policy is asked about, as rows of ids."""
    chats = [f"<|User|>: {text}\n\n<|Assistant|>:<begin_of_image>" for text in janus.cases["grpo"]["prompts"]]
    ids = described.read_tokenizer(janus.folder)(chats, add_special_tokens=False)["input_ids"]
    return [[janus.cases["tokenizer"]["ids"]["bos"], *ids[i]] for i in janus.arrays("grpo")["prompt_index"]]


def unprompted(janus, prompt):
    pad = janus.cases["tokenizer"]["ids"]["pad"]
    prompt = jnp.asarray(prompt)[None]
    return np.asarray(llama.without_prompt(prompt, jnp.ones_like(prompt, bool), pad))[0]


def test_golden_image_logits(janus, reader):
    """Of given codes: with the prompt, without it, guided; and every layer's input."""
    expected = janus.arrays("generate")
    prompt, codes = expected["prompt_ids"][0], expected["forced_codes"]
    negative = unprompted(janus, prompt)
    np.testing.assert_array_equal(np.stack([prompt, negative] * len(codes)), expected["pair_tokens"])
    conditional = reader.code_logits([prompt] * len(codes), codes)
    unconditional = reader.code_logits([negative] * len(codes), codes)
    guided = np.asarray(sampling.guided(conditional, unconditional, 5.0))
    np.testing.assert_allclose(conditional, expected["cond_logits"], atol=2e-4)
    np.testing.assert_allclose(unconditional, expected["uncond_logits"], atol=2e-4)
    np.testing.assert_allclose(guided, expected["guided_logits_cfg5"], atol=1e-3)
    for temperature, name in (1.0, "t1"), (0.7, "t07"):
        scores = sampling.filter_logits(jnp.asarray(conditional[:, 0]), sampling.How(1, temperature, guidance=5.0),
                                        jnp.asarray(unconditional[:, 0]))
        np.testing.assert_allclose(jax.nn.softmax(scores), expected[f"probs_cfg5_{name}_first"], atol=2e-4)

    embedded = reader.params["gen_embed_tokens"]["embedding"][codes[:1]]
    np.testing.assert_array_equal(embedded, expected["gen_embed"])
    aligned = reader.model.apply({"params": reader.params}, codes[:1], method="embed_codes")
    np.testing.assert_allclose(aligned, expected["gen_aligned"], atol=5e-4)

    hidden, inputs = reader.read([[*context, *(codes[0, :-1] + reader.first_code)] for context in (prompt, negative)])
    T, tail = len(prompt) + codes.shape[1] - 1, expected["layer_hidden_states"].shape[2]
    np.testing.assert_allclose(inputs[:, :, T - tail:T], expected["layer_hidden_states"], atol=5e-4)
    np.testing.assert_allclose(hidden[:, :T], expected["last_hidden_state"], atol=5e-4)


def test_golden_greedy_pictures(janus, reader):
    """Guided: both prompts in one batch, left-padded, equal each alone; unguided; and the sampler's log-probabilities
    equal the teacher-forced ones."""
    expected = janus.arrays("generate")
    tokens, mask, alone = prompts_of(janus)
    negative = llama.without_prompt(tokens, mask, janus.cases["tokenizer"]["ids"]["pad"])
    draw = lambda guidance: map(np.asarray, jax.jit(lambda: sampling.decode(
        reader.model, {"params": reader.params}, tokens, mask, jax.random.key(0),
        sampling.How(temperature=0.0, guidance=guidance), janus.cases["generate"]["image_token_num"], "image_logits",
        reader.first_code, negative=negative))())
    codes, logps = draw(5.0)
    np.testing.assert_array_equal(codes[:1], expected["greedy_codes_cfg5"])
    np.testing.assert_array_equal(codes[1:], expected["greedy_codes_cfg5_prompt2"])
    theirs = np.load(janus.folder.with_name("janus_hf") / "expected/outputs.npz")
    np.testing.assert_array_equal(codes[:1], theirs["image_codes_cfg5"])
    conditional = reader.code_logits(alone, codes)
    np.testing.assert_allclose(conditional[:1], expected["greedy_cond_cfg5"], atol=2e-4)
    np.testing.assert_allclose(conditional[:1], theirs["image_cond_logits"], atol=2e-4)
    unconditional = reader.code_logits([unprompted(janus, prompt) for prompt in alone], codes)
    np.testing.assert_allclose(unconditional[:1], expected["greedy_uncond_cfg5"], atol=2e-4)
    np.testing.assert_allclose(unconditional[:1], theirs["image_uncond_logits"], atol=2e-4)
    np.testing.assert_allclose(
        logps, umm.gather_logps(sampling.guided(conditional, unconditional, 5.0), codes), atol=1e-4)

    codes, logps = draw(1.0)
    np.testing.assert_array_equal(codes[:1], expected["greedy_codes_cfg1"])
    conditional = reader.code_logits(alone, codes)
    np.testing.assert_allclose(conditional[:1], expected["greedy_cond_cfg1"], atol=2e-4)
    np.testing.assert_allclose(logps, umm.gather_logps(conditional, codes), atol=1e-4)


def test_golden_policy(janus, reader):
    """Log-probabilities of given codes, entropy, supervised loss, prompt dropout, and the guided policy."""
    expected = janus.arrays("grpo")
    codes, prompts = expected["codes"], policy_prompts(janus)
    logits = reader.code_logits(prompts, codes)
    logps = np.asarray(umm.gather_logps(logits, codes))
    np.testing.assert_allclose(logps, expected["logprobs"], atol=2e-4)
    every = log_softmax(logits)
    np.testing.assert_allclose(-np.sum(np.exp(every) * every, axis=-1), expected["entropy"], atol=2e-4)
    N = codes.shape[1]
    np.testing.assert_allclose(logps.sum(axis=1), expected["sum_logprobs"], atol=1e-4 * N)
    np.testing.assert_allclose(logps.sum(), expected["total"], atol=1e-4 * codes.size)
    nll = [objectives.cross_entropy(row, np.ones(N, bool)) for row in logps]
    np.testing.assert_allclose(nll, expected["sft_nll_mean"], atol=1e-4)
    unconditional = reader.code_logits([unprompted(janus, prompt) for prompt in prompts], codes)
    np.testing.assert_allclose(umm.gather_logps(unconditional, codes), expected["uncond_logprobs"], atol=2e-4)
    guided = umm.gather_logps(sampling.guided(logits, unconditional, 5.0)[:1], codes[:1])
    np.testing.assert_allclose(guided[0], expected["guided_cfg5_logprobs_row0"], atol=1e-3)


def test_golden_gradients(janus, reader):
    expected = janus.arrays("grpo")
    norms = json.loads((janus.folder / "expected/grpo_grad_norms.json").read_text())
    codes, prompts = expected["codes"], policy_prompts(janus)
    tokens, mask = reader.rows([[*prompt, *(row[:-1] + reader.first_code)] for prompt, row in zip(prompts, codes)])
    ends = np.array([len(prompt) for prompt in prompts])[:, None] - 1 + np.arange(codes.shape[1])   # [B, N]

    def total(params):
        hidden, _ = reader.model.apply({"params": params}, tokens, mask)
        logits = reader.model.apply({"params": params}, jnp.take_along_axis(hidden, ends[:, :, None], axis=1),
                                    method="image_logits")
        return jnp.sum(umm.gather_logps(logits, codes))

    value, gradients = jax.jit(jax.value_and_grad(total))(reader.params)
    np.testing.assert_allclose(value, expected["total"], atol=1e-4 * codes.size)
    gradients = torch_keys.to_torch(gradients, llama.RULES["published"])
    parts = {}
    for name, gradient in gradients.items():
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
        if any(name.startswith(part) for part in norms["no_gradient"]):
            assert norm == 0, name
        else:
            np.testing.assert_allclose(norm, norms["parameters"][name], rtol=2e-3, err_msg=name)
            parts.setdefault(name.split(".")[0], []).append(norm)
    assert len(norms["parameters"]) == sum(map(len, parts.values()))
    for part, norm in norms["groups"].items():
        np.testing.assert_allclose(np.linalg.norm(parts[part]), norm, rtol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(sum(parts.values(), [])), norms["total"], rtol=2e-3)
    recorded = {name.removeprefix("grad/"): array for name, array in expected.items() if name.startswith("grad/")}
    assert recorded
    for name, array in recorded.items():
        np.testing.assert_allclose(gradients[name], array, atol=2e-3 * np.abs(array).max(), err_msg=name)
    rows = expected["grad_embed_rows"]
    found = gradients["language_model.model.embed_tokens.weight"][expected["embed_rows"]]
    np.testing.assert_allclose(found, rows, atol=2e-3 * np.abs(rows).max())


# ------------------------------------------------------------------ the two layouts

def test_both_layouts_are_one_model(janus):
    """Bit for bit the same params, and back to each layout bit for bit."""
    from safetensors.numpy import load_file
    rooms, found = {"ar": llama, "vision": siglip, "vq": vq}, {}
    for layout, folder in ("published", janus.folder), ("transformers", janus.folder.with_name("janus_hf")):
        tensors = load_file(folder / "model.safetensors")
        found[layout] = janus_params(tensors, janus.configs, layout)
        back = {name: array for part, room in rooms.items()
                for name, array in torch_keys.to_torch(found[layout][part], room.RULES[layout]).items()}
        assert all(re.match(siglip.UNUSED, name) for name in set(tensors) - set(back))
        for name, array in back.items():
            assert array.dtype == tensors[name].dtype, name
            np.testing.assert_array_equal(array, tensors[name], err_msg=name)
        with pytest.raises(ValueError, match="unknown keys .'stranger'"):
            janus_params({**tensors, "stranger": np.zeros(1)}, janus.configs, layout)
    first, second = (traverse_util.flatten_dict(found[layout]) for layout in found)
    assert first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)


@pytest.mark.parametrize("layout", llama.RULES)
def test_checkpoint_errors_name_the_key(layout):
    shapes = jax.eval_shape(lambda: llama.init(TINY, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    tensors = torch_keys.to_torch(params, llama.RULES[layout])
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.k_proj.weight"))
    without = {k: v for k, v in tensors.items() if k != name}
    bias = name.replace("weight", "bias")                         # Qwen2 has it, Llama has none
    for message, spoilt in {"missing keys": without, "key": {**tensors, name: np.zeros((32, 32))}}.items():
        with pytest.raises(ValueError, match=message + ".*" + re.escape(name)):
            llama.from_torch(spoilt, TINY, layout)
    with pytest.raises(ValueError, match="unknown keys.*" + re.escape(bias)):
        llama.from_torch({**tensors, bias: np.zeros(16)}, TINY, layout)


# ------------------------------------------------------------------ against transformers, and at full size

def theirs_of(ar, vision, codes, **more):
    """transformers' Janus of these configs: (its config, the class). Its heads and aligners know one width alone."""
    transformers = pytest.importorskip("transformers")
    text = dict(
        vocab_size=ar.vocab_size, hidden_size=ar.hidden_size, intermediate_size=ar.intermediate_size,
        num_hidden_layers=ar.num_hidden_layers, num_attention_heads=ar.num_attention_heads,
        num_key_value_heads=ar.num_key_value_heads, rms_norm_eps=ar.rms_norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ar.rope_theta}, **more)
    return transformers.JanusForConditionalGeneration, transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**text), tie_word_embeddings=False, image_token_id=ar.vocab_size - 1,
        vision_config=dict(
            hidden_size=vision.width, num_hidden_layers=vision.layers, num_attention_heads=vision.heads,
            mlp_ratio=vision.mlp_hidden / vision.width, patch_size=vision.patch_size,
            image_size=vision.patch_size * vision.pos_table_side, projection_dim=ar.hidden_size,
            num_image_tokens=vision.pos_table_side ** 2),
        vq_config=dict(
            embed_dim=codes.codebook_dim, num_embeddings=codes.codebook_size, latent_channels=codes.z_channels,
            base_channels=codes.channels, channel_multiplier=list(codes.multipliers), num_res_blocks=codes.res_blocks,
            projection_dim=ar.hidden_size, image_token_embed_dim=ar.hidden_size))


@pytest.mark.parametrize("width, heads, kv_heads, layers, theta", [(32, 4, 2, 2, 1e4), (48, 3, 3, 1, 500.0)])
def test_equals_transformers(width, heads, kv_heads, layers, theta):
    """Text after a picture, and codes after a prompt, on random weights. What is known to differ in transformers (how
    VQ-16 encodes, the filters of its sampler, guidance 1, the image transform) is not asked."""
    torch = pytest.importorskip("torch")
    ar = llama.Config(
        hidden_size=width, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=30, image_vocab_size=11, code_width=4, vision_width=24,
        image_head_width=width, rope_theta=theta)
    vision = siglip.Config(24, layers=2, heads=2, mlp_hidden=48, patch_size=4, pos_table_side=3)
    configs = {"ar": ar, "vision": vision, "vq": vq.Config(11, 4, 8, channels=32, multipliers=(1, 1), res_blocks=1)}
    janus, config = theirs_of(*configs.values())
    torch.manual_seed(0)
    theirs = janus(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    params = janus_params({k: v.numpy() for k, v in theirs.state_dict().items()}, configs, "transformers")
    rng, N = np.random.default_rng(0), 9
    pixels = rng.random((2, 12, 12, 3), np.float32)
    before, after = rng.integers(0, 29, (2, 3)), rng.integers(0, 29, (2, 5))
    with torch.no_grad():
        ids = np.concatenate([before, np.full((2, N), 29), after], axis=1)
        text = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=int),
                      pixel_values=torch.from_numpy(np.moveaxis(pixels, -1, 1) * 2 - 1)).logits.numpy()
        codes = torch.from_numpy(rng.integers(0, 11, (2, 6)))
        embedded = torch.cat([theirs.get_input_embeddings()(torch.from_numpy(before)),
                              theirs.prepare_embeddings_for_image_generation(codes)], dim=1)
        hidden = theirs.model.language_model(inputs_embeds=embedded).last_hidden_state
        image = theirs.model.generation_head(hidden).numpy()

    model, variables, V = llama.Llama(ar), {"params": params["ar"]}, ar.vocab_size

    @jax.jit
    def ours(pixels):
        features = siglip.VisionTransformer(vision).apply({"params": params["vision"]}, pixels, method="features")
        seen = model.apply(variables, features, method="align")
        patches = np.broadcast_to(V + ar.image_vocab_size + np.arange(N), (2, N))
        reads = jnp.asarray(np.concatenate([before, patches, after], axis=1))
        draws = jnp.asarray(np.concatenate([before, codes.numpy() + V], axis=1))
        hidden, _ = model.apply(variables, reads, jnp.ones_like(reads, bool), text_only=True, seen=seen)
        drawn, _ = model.apply(variables, draws, jnp.ones_like(draws, bool))
        logits = lambda hidden, method: model.apply(variables, hidden, method=method)
        return logits(hidden, "text_logits"), logits(drawn, "image_logits")

    for found, wanted in zip(ours(pixels), (text, image)):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("width, hidden, layers, heads, billions", [
    (2048, 5632, 24, 16, 2.089), (4096, 11008, 30, 32, 7.420)], ids=["1B", "7B"])
def test_full_size(width, hidden, layers, heads, billions):
    """The published numbers of parameters, which count the tower's pooling head; every key of transformers' model has
    its place; and shapes of a forward."""
    torch = pytest.importorskip("torch")
    ar = llama.Config(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=102400, image_vocab_size=16384, code_width=8, vision_width=1024,
        image_head_width=width)
    vision = siglip.Config(1024, layers=24, heads=16, mlp_hidden=4096, patch_size=16, pos_table_side=24)
    configs, rooms = {"ar": ar, "vision": vision, "vq": vq.Config(16384, 8)}, {"ar": llama, "vision": siglip, "vq": vq}
    shapes = {part: jax.eval_shape(lambda: room.init(configs[part], jax.random.key(0))) for part, room in rooms.items()}
    # Of the pooling head: q, k, v and the way out, the vector that asks, a norm, an MLP.
    pooling = 4 * (1024 * 1024 + 1024) + 1024 + 2 * 1024 + 2 * 4096 * 1024 + 4096 + 1024
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes)) + pooling
    assert round(total / 1e9, 3) == billions

    janus, config = theirs_of(*configs.values())
    with torch.device("meta"):
        theirs = janus(config)
    found = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    parts = torch_keys.split(found, {part: room.KEYS["transformers"] for part, room in rooms.items()})
    for part, room in rooms.items():
        torch_keys.places(parts[part], shapes[part], room.RULES["transformers"])

    def run(params, tokens, seen):
        model, variables = llama.Llama(ar), {"params": params}
        hidden, _ = model.apply(variables, tokens, jnp.ones_like(tokens, bool), seen=seen)
        return [model.apply(variables, hidden, method=head) for head in ("text_logits", "image_logits")]

    text, image = jax.eval_shape(run, shapes["ar"], jax.ShapeDtypeStruct((2, 640), jnp.int32),
                                 jax.ShapeDtypeStruct((2, 576, width), jnp.float32))
    assert text.shape == (2, 640, 102400) and image.shape == (2, 640, 16384)


# ------------------------------------------------------------------ contracts

@pytest.fixture(scope="module")
def tiny():
    return llama.Llama(TINY), {"params": jax.jit(llama.init, static_argnums=0)(TINY, jax.random.key(0))}


@pytest.mark.parametrize("room, config", [
    (llama, TINY), (siglip, siglip.Config(24, layers=2, heads=2, mlp_hidden=48, patch_size=4, pos_table_side=3)),
    (vq, vq.Config(11, 4, 8, channels=32, multipliers=(1, 2), res_blocks=1))],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "")
def test_every_parameter_has_one_place_on_a_mesh(room, config):
    shapes = jax.eval_shape(lambda: room.init(config, jax.random.key(0)))
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        assert len(sharding.logical_axes(path, room.PARTITION)) <= leaf.ndim, path


def test_padding_on_the_left_changes_nothing(tiny):
    """Neither a drawn picture's states nor what it is compared with without its prompt."""
    model, variables = tiny
    tokens = jnp.array([[1, 7, 8, 2, 50, 53, 57]])
    plain, _ = model.apply(variables, tokens, jnp.ones_like(tokens, bool))
    padded, mask = jnp.pad(tokens, ((0, 0), (3, 0))), jnp.pad(jnp.ones_like(tokens, bool), ((0, 0), (3, 0)))
    np.testing.assert_allclose(model.apply(variables, padded, mask)[0][:, 3:], plain, atol=1e-5)
    np.testing.assert_array_equal(llama.without_prompt(padded[:, :7], mask[:, :7], 9), [[0, 0, 0, 1, 9, 9, 2]])


def test_remat_changes_no_value(tiny):
    """Nor gradient, and it recomputes."""
    _, variables = tiny
    tokens = jnp.array([[1, 7, 8, 2, 50, 53, 57]])

    def loss(params, config):
        return jnp.sum(llama.Llama(config).apply({"params": params}, tokens, jnp.ones_like(tokens, bool))[0] ** 2)

    plain, *others = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        variables["params"], dataclasses.replace(TINY, remat=remat)) for remat in ("nothing", "all", "elementwise"))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)
    with pytest.raises(ValueError, match="remat is 'some'"):
        dataclasses.replace(TINY, remat="some")
