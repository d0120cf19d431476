"""Qwen2.5-VL against transformers on random weights, and against the recorded values of the reference."""
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gvu_jax.described import Described
from gvu_jax.families.qwen_sd35 import captioner_configs
from gvu_jax.models import qwen25_vl as vl
from gvu_jax.umm import count_positions, gather_logps

TINY = [
    (vl.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
               vocab_size=40, mrope_section=(2, 3, 3), tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e6),
     vl.VisionConfig(depth=4, hidden_size=24, intermediate_size=20, num_heads=2, out_hidden_size=32, patch_size=6,
                     spatial_merge_size=2, temporal_patch_size=2, window_size=24, fullatt_block_indexes=(1, 3))),
    (vl.Config(hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
               vocab_size=50, mrope_section=(4, 2, 2), tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=1e4),
     vl.VisionConfig(depth=3, hidden_size=16, intermediate_size=28, num_heads=1, out_hidden_size=48, patch_size=4,
                     spatial_merge_size=2, temporal_patch_size=2, window_size=40, fullatt_block_indexes=(2,))),
    (vl.Config(hidden_size=40, intermediate_size=56, num_hidden_layers=1, num_attention_heads=5, num_key_value_heads=1,
               vocab_size=33, mrope_section=(1, 1, 2), tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e6),
     vl.VisionConfig(depth=2, hidden_size=32, intermediate_size=24, num_heads=4, out_hidden_size=40, patch_size=5,
                     spatial_merge_size=2, temporal_patch_size=2, window_size=20, fullatt_block_indexes=())),
]
START, PICTURE, VIDEO, END = 1, 2, 3, 4            # ids in the tiny vocabularies


# ------------------------------------------------------------------ against transformers

def torch_model(config, vision, seed=0):
    """transformers' model with every parameter, norms included, drawn at random; and its state dict in numpy."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "rms_norm_eps")
    rope = dict(rope_type="default", rope_theta=config.rope_theta, mrope_section=list(config.mrope_section))
    told = transformers.Qwen2_5_VLConfig(
        text_config=dict({name: getattr(config, name) for name in shared}, rope_parameters=rope,
                         tie_word_embeddings=config.tie_word_embeddings),
        vision_config={name: list(x) if isinstance(x, tuple) else x for name, x in vars(vision).items()},
        image_token_id=PICTURE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=config.tie_word_embeddings)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(told, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=range(len(TINY)))
def pair(request):
    """(config, vision, transformers' model, params, params of the tower)."""
    config, vision = TINY[request.param]
    model, tensors = torch_model(config, vision)
    return config, vision, model, *vl.from_torch(tensors, config, vision)


def apply(module, params, *inputs, **more):
    return jax.jit(lambda params: module.apply({"params": params}, *inputs, **more))(params)


@pytest.mark.parametrize("cells", [(1, 1), (3, 5), (6, 2), (4, 4)])
def test_the_tower_equals_transformers(pair, cells):
    """Windows that are whole, cut at the right and below, and one alone."""
    torch = pytest.importorskip("torch")
    _, vision, model, _, params = pair
    pixels = np.random.default_rng(0).random((2, *(n * vision.multiple for n in cells), 3), np.float32)
    ours = apply(vl.VisionTower(vision), params, pixels, method="see")
    of_them = np.asarray(vl.patches(pixels, vision))
    grid = torch.tensor([[1, *(2 * n for n in cells)]] * 2)
    with torch.no_grad():
        theirs = model.model.visual(torch.from_numpy(of_them.reshape(-1, of_them.shape[2])), grid_thw=grid)
    np.testing.assert_allclose(ours.reshape(-1, ours.shape[2]), theirs.pooler_output.numpy(), atol=2e-4)


def chat(rng, config, pictures):
    """Text, the pictures (sizes in cells) with text behind each: ids as transformers has them, and as ours."""
    text = lambda n: rng.integers(5, config.vocab_size, n).tolist()
    theirs, ours, cells = text(3), None, 0
    ours = list(theirs)
    for rows, cols in pictures:
        behind = text(4)
        theirs += [START, *[PICTURE] * (rows * cols), END, *behind]
        ours += [START, *range(config.vocab_size + cells, config.vocab_size + cells + rows * cols), END, *behind]
        cells += rows * cols
    return theirs, ours


@pytest.mark.parametrize("left", [True, False])
def test_a_chat_about_pictures_equals_transformers(pair, left):
    """One picture in a row, two in the next, none in the last; padded at either side."""
    torch = pytest.importorskip("torch")
    config, vision, model, params, of_tower = pair
    rng, shown = np.random.default_rng(1), [[(2, 3)], [(1, 2), (3, 2)], []]
    rows = [chat(rng, config, pictures) for pictures in shown]
    T = max(len(ours) for _, ours in rows)
    pad = lambda row: [0] * (T - len(row)) + row if left else row + [0] * (T - len(row))
    theirs, ours, mask = (np.array([pad(x) for x in column]) for column in (
        [row[0] for row in rows], [row[1] for row in rows], [[1] * len(row[1]) for row in rows]))
    pixels = [rng.random((1, h * vision.multiple, w * vision.multiple, 3), np.float32)
              for pictures in shown for h, w in pictures]
    found = [np.asarray(apply(vl.VisionTower(vision), of_tower, x, method="see")[0]) for x in pixels]
    M = max(len(found[0]), len(found[1]) + len(found[2]))
    seen = np.zeros((3, M, config.hidden_size), np.float32)
    seen[0, :len(found[0])] = found[0]
    seen[1, :len(found[1]) + len(found[2])] = np.concatenate(found[1:])
    count, positions = count_positions(mask.astype(bool)), []
    for b, pictures in enumerate(shown):
        starts, cells = [], 0
        for size in pictures:
            starts.append((jnp.array([4 + 6 * len(starts) + cells]), size))
            cells += size[0] * size[1]
        positions.append(vl.rope_positions(count[b:b + 1], starts))
    positions = jnp.concatenate(positions)

    values = np.concatenate([np.asarray(vl.patches(x, vision)).reshape(-1, 3 * 2 * vision.patch_size ** 2)
                             for x in pixels])
    grid = torch.tensor([[1, 2 * h, 2 * w] for pictures in shown for h, w in pictures])
    kinds = (theirs == PICTURE).astype(np.int32)
    places, _ = model.model.get_rope_index(torch.from_numpy(theirs), torch.from_numpy(kinds), image_grid_thw=grid,
                                           attention_mask=torch.from_numpy(mask))
    real = mask.astype(bool)
    np.testing.assert_array_equal(np.asarray(positions)[real], np.moveaxis(places.numpy(), 0, -1)[real])
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(theirs), attention_mask=torch.from_numpy(mask), position_ids=places,
                       pixel_values=torch.from_numpy(values), image_grid_thw=grid,
                       mm_token_type_ids=torch.from_numpy(kinds)).logits.numpy()
    module = vl.Qwen25VL(config)
    hidden, _ = apply(module, params, ours, real, positions, seen=seen)
    found = apply(module, params, hidden, method="text_logits")
    np.testing.assert_allclose(np.asarray(found)[real], logits[real], atol=2e-4)


@pytest.mark.parametrize("size", [(100, 150), (27, 40), (3, 500), (28, 28), (600, 33), (90, 64), (2000, 3000)])
def test_pictures_are_resized_as_transformers_does(size):
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    for limits in (vl.Transform(3136, 65536), vl.Transform(3136, 12845056), vl.Transform(784, 10976)):
        if max(size) / min(size) > 28:                   # there transformers refuses, or rounds a side to nothing
            continue
        assert vl.fitted_size(*size, limits, 28) == theirs.smart_resize(
            *size, 28, limits.min_pixels, limits.max_pixels)


@pytest.mark.parametrize("size, limits", [((100, 150), (3136, 10976)), ((20, 37), (3136, 65536)),
                                          ((56, 84), (3136, 65536)), ((280, 56), (3136, 6000))])
def test_pictures_are_fitted_in_a_program_as_on_the_host(size, limits):
    levels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    limits = vl.Transform(*limits)
    found = jax.jit(lambda x: vl.fitted(x, limits, 28))(levels.astype(np.float32) / 255)
    on_host = np.stack([vl.fit_image(Image.fromarray(x), limits, 28) for x in levels])
    np.testing.assert_array_equal(np.round(np.asarray(found) * 255), on_host * 255)
    again = np.stack([vl.fit_image(Image.fromarray((x * 255).astype(np.uint8)), limits, 28) for x in on_host])
    np.testing.assert_array_equal(again, on_host)


def test_a_transparent_picture_lies_on_white():
    image = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    assert (vl.fit_image(image, vl.Transform(3136, 65536), 28) == 1).all()
    with pytest.raises(ValueError, match="1 x 300 pixels cannot be read"):
        vl.fit_image(Image.new("RGB", (300, 1)), vl.Transform(3136, 65536), 28)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def golden(fixtures):
    """Configs, params in float32, texts, and arrays(name) of an archive."""
    from safetensors.numpy import load_file
    folder = fixtures / "uae/qwen25vl"
    told = Described(folder / "model/config.json")
    config, vision = captioner_configs(told)
    tensors = {name: x.astype(np.float32) for name, x in load_file(folder / "model/model.safetensors").items()}
    llm, tower = vl.from_torch(tensors, config, vision)
    return types.SimpleNamespace(
        folder=folder, told=told, config=config, vision=vision, llm=llm, tower=tower, model=vl.Qwen25VL(config),
        cases=json.loads((folder / "expected/cases.json").read_text()),
        arrays=lambda name: dict(np.load(folder / "expected" / f"{name}.npz")))


def grids_of(expected):
    return [tuple(int(n) for n in grid[1:]) for grid in expected["image_grid_thw"]]


def pictures_of(golden):
    """The recorded pictures, as the processor alone fits them (once)."""
    told, found = Described(golden.folder / "model/preprocessor_config.json"), []
    limits = vl.Transform(told["min_pixels"], told["max_pixels"])
    for path in sorted((golden.folder / "images").glob("*.png")):
        with Image.open(path) as image:
            height, width = vl.fitted_size(image.height, image.width, limits, golden.vision.multiple)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            found.append(np.asarray(resized, np.float32) / 255)
    return found


def test_golden_sizes(golden):
    for case in golden.cases["smart_resize"]:
        sides = case["height"], case["width"]
        limits = vl.Transform(case["min_pixels"], case["max_pixels"])
        if case["resized"] is None or isinstance(case["resized"], str):
            with pytest.raises(ValueError):
                vl.fitted_size(*sides, limits, golden.vision.multiple)
        else:
            assert list(vl.fitted_size(*sides, limits, golden.vision.multiple)) == case["resized"], case


def test_golden_tower(golden):
    """Patches of the PNGs, their angles, windows, every block, and what the language model reads."""
    expected, c, window, cells_before = golden.arrays("vision"), golden.vision, [], 0
    bounds, blocks, embeds, first_patches, turned = [0], [], [], [], []
    for i, (grid, pixels) in enumerate(zip(grids_of(expected), pictures_of(golden))):
        found = np.asarray(vl.patches(pixels[None], c))[0]
        np.testing.assert_allclose(found, expected[f"pixel_values_{i}"], atol=1e-5)
        out, state = jax.jit(lambda x: vl.VisionTower(c).apply(
            {"params": golden.tower}, x, grid, capture_intermediates=lambda module, _: isinstance(
                module, vl.VisionBlock), mutable="intermediates"))(found[None])
        state = state["intermediates"]
        blocks.append(np.concatenate([state[f"blocks_{first}"]["__call__"][0][0] for first, _, _ in c.runs])[:, 0])
        first_patches.append(state["patch_embed"][0][0])
        turned.append(vl.angles(grid, c))
        window.append(vl.window_order(grid, c) + cells_before)
        bounds += (bounds[-1] + np.cumsum([c.spatial_merge_size ** 2 * len(w) for w in vl.windows(grid, c)])).tolist()
        cells_before += len(window[-1])
        embeds.append(out[0])
    np.testing.assert_array_equal(np.concatenate(window), expected["window_index"])
    assert bounds == expected["cu_window_seqlens"].tolist()
    for found, name in ((np.concatenate(turned), "rotary_angles"), (np.concatenate(first_patches), "patch_embed"),
                        (np.concatenate(blocks, axis=1), "block_outputs"), (np.concatenate(embeds), "image_embeds")):
        np.testing.assert_allclose(found, expected[name], atol=2e-4, err_msg=name)


def ours(golden, ids, mask, pictures):
    """Ids, positions and what is seen of rows that transformers would read: pictures, of each row which."""
    expected, cell = golden.arrays("vision"), golden.vision.spatial_merge_size
    grids = [tuple(n // cell for n in grid) for grid in grids_of(expected)]
    ends = np.cumsum([0, *(rows * cols for rows, cols in grids)])
    tokens, count = np.array(ids), np.asarray(count_positions(np.asarray(mask, bool)))
    M = max(sum(ends[i + 1] - ends[i] for i in shown) for shown in pictures)
    seen, positions = np.zeros((len(ids), M, golden.config.hidden_size), np.float32), []
    for b, shown in enumerate(pictures):
        where = np.flatnonzero(tokens[b] == golden.told["image_token_id"])
        tokens[b, where] = golden.config.vocab_size + np.arange(len(where))
        rows = [expected["image_embeds"][ends[i]:ends[i + 1]] for i in shown]
        seen[b, :len(where)] = np.concatenate(rows) if rows else 0
        starts = np.cumsum([0, *(len(x) for x in rows)])[:-1]
        positions.append(vl.rope_positions(count[b:b + 1], [
            (jnp.array([count[b, where[start]]]), grids[i]) for start, i in zip(starts, shown)]))
    return tokens, jnp.concatenate(positions), seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_golden_chats(golden, side):
    """Positions, hidden states, logits and log-probabilities of a batch of three."""
    expected = golden.arrays("logits")
    array = lambda name: expected[f"{name}_{side}"]
    mask = array("attention_mask").astype(bool)
    tokens, positions, seen = ours(golden, array("input_ids"), mask, [row["images"] for row in golden.cases["rows"]])
    np.testing.assert_array_equal(np.asarray(positions)[mask], np.moveaxis(array("position_ids"), 0, -1)[mask])
    deltas = np.asarray(positions).max(axis=(1, 2), where=mask[..., None], initial=0) + 1 - mask.shape[1]
    np.testing.assert_array_equal(deltas, array("rope_deltas").ravel())

    (hidden, _), state = jax.jit(lambda: golden.model.apply(
        {"params": golden.llm}, tokens, mask, positions, seen=seen, mutable="intermediates"))()
    logits = apply(golden.model, golden.llm, hidden, method="text_logits")
    if side == "left":
        inputs = state["intermediates"]["layers"]["layer_input"][0]
        for found, recorded in zip((inputs[0], inputs[1], hidden), expected["hidden_states_left"]):
            np.testing.assert_allclose(np.asarray(found)[mask], recorded[mask], atol=2e-4)
        tail = expected["logits_left_tail"].shape[1]
        real = mask[:, -tail:]
        np.testing.assert_allclose(np.asarray(logits)[:, -tail:][real], expected["logits_left_tail"][real], atol=2e-4)
    labels = array("labels")[:, 1:]
    logps = np.where(labels >= 0, gather_logps(logits[:, :-1], np.maximum(labels, 0)), 0)
    np.testing.assert_allclose(logps, array("token_logprobs"), atol=2e-4)
    np.testing.assert_allclose(logps.sum(axis=1), array("answer_logprob_sum"), atol=2e-4 * (labels >= 0).sum(1).max())
    if side == "left":
        np.testing.assert_allclose(-logps.sum() / (labels >= 0).sum(), expected["loss_left"], atol=2e-4)


def test_golden_answers(golden):
    """Greedy, with a cache, one token at a time: every token and the logits it was picked from."""
    from gvu_jax import sampling
    expected = golden.arrays("generate")
    mask = expected["attention_mask"].astype(bool)
    steps, end = expected["tokens"].shape[1], golden.cases["specials"]["<|im_end|>"]
    longer = np.pad(mask, ((0, 0), (0, steps)), constant_values=True)
    tokens, positions, seen = ours(golden, np.pad(expected["input_ids"], ((0, 0), (0, steps))), longer,
                                   [row["images"] for row in golden.cases["rows"]])
    P = mask.shape[1]
    words, logps = jax.jit(lambda key: sampling.decode(
        golden.model, {"params": golden.llm}, tokens[:, :P], mask, key, sampling.How(temperature=0.0), steps=steps,
        head="text_logits", offset=0, stop=end, seen=seen, positions=positions))(jax.random.key(0))
    live = expected["live"].astype(bool)
    np.testing.assert_array_equal(np.asarray(words)[live], expected["tokens"][live])
    recorded = np.asarray(gather_logps(expected["logits"], expected["tokens"]))
    np.testing.assert_allclose(np.asarray(logps)[live], recorded[live], atol=2e-4)
    forced = np.concatenate([tokens[:, :P], np.where(live, expected["tokens"], 0)], axis=1)
    hidden, _ = apply(golden.model, golden.llm, forced, longer, positions, seen=seen)
    logits = np.asarray(apply(golden.model, golden.llm, hidden[:, P - 1:-1], method="text_logits"))
    np.testing.assert_allclose(logits[live], expected["logits"][live], atol=2e-4)


# ------------------------------------------------------------------ at full size, shapes only

def test_full_size():
    """Qwen2.5-VL-3B: 3.75 billion parameters as published."""
    config = vl.Config(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                       num_key_value_heads=2, vocab_size=151936, mrope_section=(16, 24, 24), tie_word_embeddings=True,
                       rms_norm_eps=1e-6, rope_theta=1e6)
    vision = vl.VisionConfig(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048,
                             patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                             fullatt_block_indexes=(7, 15, 23, 31))
    shapes = jax.eval_shape(lambda: (vl.init(config, jax.random.key(0)), vl.init_vision(vision, jax.random.key(0))))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9, 3) == 3.755
    seen = jax.eval_shape(lambda params: vl.VisionTower(vision).apply(
        {"params": params}, jnp.zeros((2, 252, 224, 3)), method="see"), shapes[1])
    assert seen.shape == (2, 72, 2048)


@pytest.mark.parametrize("change, said", [
    (dict(mrope_section=(2, 3, 4)), "add up to half the head's width"), (dict(remat="some"), "remat is 'some'")])
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        vl.Config(**vars(TINY[0][0]) | change)
