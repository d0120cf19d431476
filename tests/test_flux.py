"""The image decoder's transformer and its flow against diffusers on random weights, and against recorded values."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import assert_same_picture
from gvu_jax.models import flux, siglip_vq, vae

PLAIN = [
    flux.Config(in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=12, num_attention_heads=2,
                joint_attention_dim=10, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 4, 6),
                siglip_channels=0),
    flux.Config(in_channels=12, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=3,
                joint_attention_dim=7, pooled_projection_dim=5, guidance_embeds=False, axes_dims_rope=(4, 2, 2),
                siglip_channels=0),
    flux.Config(in_channels=4, num_layers=3, num_single_layers=2, attention_head_dim=20, num_attention_heads=1,
                joint_attention_dim=16, pooled_projection_dim=9, guidance_embeds=True, axes_dims_rope=(8, 8, 4),
                siglip_channels=0),
]
WITH_SIGLIP = dataclasses.replace(PLAIN[0], siglip_channels=9)


def random_inputs(config, grid, batch=2, text_tokens=5, seed=0):
    """latents, siglip, context, pooled, sigma, guidance for a grid."""
    normal, N = np.random.default_rng(seed).standard_normal, grid[0] * grid[1]
    siglip = normal((batch, N, config.siglip_channels), np.float32) if config.siglip_channels else None
    return (normal((batch, N, config.in_channels), np.float32), siglip,
            normal((batch, text_tokens, config.joint_attention_dim), np.float32),
            normal((batch, config.pooled_projection_dim), np.float32),
            np.linspace(0.9, 0.2, batch, dtype=np.float32), np.linspace(1, 3.5, batch, dtype=np.float32))


# ------------------------------------------------------------------ against diffusers

def torch_module(config):
    """diffusers' transformer of a config, which knows nothing of the siglip term."""
    fields = {name: value for name, value in vars(config).items() if name not in ("siglip_channels", "remat")}
    return pytest.importorskip("diffusers").FluxTransformer2DModel(patch_size=1, **fields).eval()


def torch_model(config, seed=0):
    """The same with every parameter, norms included, drawn at random; and its state dict in numpy."""
    torch, model = pytest.importorskip("torch"), torch_module(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config, grid, batch, text_tokens", [
    (PLAIN[0], (3, 2), 2, 5), (PLAIN[1], (2, 4), 2, 1), (PLAIN[2], (1, 7), 3, 12)],
    ids=["guidance", "no-guidance", "one-head"])
def test_velocity_equals_diffusers(config, grid, batch, text_tokens):
    torch = pytest.importorskip("torch")
    theirs, tensors = torch_model(config)
    inputs = random_inputs(config, grid, batch, text_tokens)
    params = flux.from_torch(tensors, config)
    ours = bound(config, params, grid)(*inputs)
    latents, _, context, pooled, sigma, guidance = (None if x is None else torch.from_numpy(x) for x in inputs)
    image_ids = torch.tensor([[0, row, col] for row in range(grid[0]) for col in range(grid[1])], dtype=torch.float32)
    with torch.no_grad():
        velocity = theirs(hidden_states=latents, encoder_hidden_states=context, pooled_projections=pooled,
                          timestep=sigma, guidance=guidance if config.guidance_embeds else None,
                          img_ids=image_ids, txt_ids=torch.zeros(context.shape[1], 3)).sample
    np.testing.assert_allclose(ours, velocity.numpy(), atol=5e-4)


@pytest.mark.parametrize("steps, tokens, schedule", [
    (1, 16, flux.Schedule()), (4, 1296, flux.Schedule()), (28, 5000, flux.Schedule()),
    (7, 90, flux.Schedule(base_tokens=64, max_tokens=128, base_shift=0.2, max_shift=2.0))])
def test_flow_equals_diffusers_scheduler(steps, tokens, schedule):
    """Noise levels, and the Euler steps along a velocity that depends on position and level."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    mu = calculate_shift(tokens, *dataclasses.astuple(schedule))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(flux.sigmas(steps, tokens, schedule), scheduler.sigmas.numpy(), atol=1e-6)

    noise = np.random.default_rng(0).standard_normal((1, tokens, 4), np.float32)
    theirs = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(torch.sin(theirs) + timestep / 1000, timestep, theirs).prev_sample
    ours = flux.sample(lambda x, siglip, context, pooled, sigma, guidance: jnp.sin(x) + sigma[:, None, None],
                       noise, None, jnp.zeros((1, 1, 2)), jnp.zeros((1, 2)), steps, schedule=schedule)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_pack_equals_diffusers():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    latents = np.random.default_rng(0).standard_normal((2, 6, 4, 3), np.float32)
    theirs = diffusers.FluxPipeline._pack_latents(torch.from_numpy(latents).permute(0, 3, 1, 2), 2, 3, 6, 4)
    np.testing.assert_array_equal(flux.pack(latents), theirs.numpy())
    np.testing.assert_array_equal(flux.unpack(flux.pack(latents), (3, 2)), latents)


# ------------------------------------------------------------------ at full size, shapes only

def test_full_size():
    """FLUX.1 with the siglip term: the parameters of diffusers' model and one matrix, a velocity of the right shape."""
    torch = pytest.importorskip("torch")
    config = flux.Config(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                         num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                         guidance_embeds=True, axes_dims_rope=(16, 56, 56), siglip_channels=1152)
    shapes = jax.eval_shape(lambda: flux.init(config, jax.random.key(0)))
    with torch.device("meta"):
        plain = sum(parameter.numel() for parameter in torch_module(config).parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == plain + config.siglip_channels * config.width
    velocity = jax.eval_shape(lambda params, inputs: flux.FluxTransformer(config).apply(
        {"params": params}, *inputs, (36, 36)), shapes, random_inputs(config, (36, 36), 2, 512))
    assert velocity.shape == (2, 36 * 36, 64)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def golden(fixtures):
    """(config, params, call parameters, expected), every size from the fixture's own files."""
    folder = fixtures / "flux"
    described = json.loads((folder / "decoder_transformer/config.json").read_text())
    fields = set(flux.Config.__dataclass_fields__) - {"remat"}
    config = flux.Config(**{name: tuple(described[name]) if isinstance(described[name], list) else described[name]
                            for name in fields})
    params = flux.from_torch(load_file(folder / "decoder_transformer/diffusion_pytorch_model.safetensors"), config)
    return config, params, json.loads((folder / "expected.json").read_text()), np.load(folder / "expected.npz")


def bound(config, params, grid):
    return jax.jit(lambda *inputs: flux.FluxTransformer(config).apply({"params": params}, *inputs, grid))


def grid_of(expected):
    return tuple(int(last) + 1 for last in expected["vel_img_ids"][-1, 1:])


def drawn_grid(call):
    return call["height"] // call["upscale_factor"], call["width"] // call["upscale_factor"]


def text_of(expected, vectors=None):
    """(context, pooled) of the prompt and of the empty prompt, each with batch 1."""
    return [(expected[f"t5_out_{which}"][:, :vectors], expected[f"clip_pooled_{which}"])
            for which in ("prompt", "empty")]


@pytest.mark.parametrize("name, vectors, with_siglip", [
    ("velocity", None, True), ("velocity_txt10", 10, True), ("velocity_txt10_nosiglip", 10, False)])
def test_velocity(golden, name, vectors, with_siglip):
    config, params, _, expected = golden
    context, pooled = (np.concatenate(pair) for pair in zip(*text_of(expected, vectors)))
    velocity = bound(config, params, grid_of(expected))(
        expected["vel_hidden"], expected["vel_siglip"] if with_siglip else None, context, pooled,
        expected["vel_timestep"], expected["vel_guidance"])
    np.testing.assert_allclose(velocity, expected[name], atol=5e-4)


def test_intermediate_values(golden):
    """Where a wrong velocity would come from: conditioning, embeddings, the siglip term, every block."""
    config, params, _, expected = golden
    context, pooled = (np.concatenate(pair) for pair in zip(*text_of(expected, 10)))
    table = flux.rotary_table(10, grid_of(expected), config.axes_dims_rope)

    def close(value, name):
        np.testing.assert_allclose(value, expected[name], atol=5e-4, err_msg=name)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    def layer(stack, i):
        return {"params": jax.tree.map(lambda leaf: leaf[i], params[stack])}

    vector = flux.Conditioning(config).apply({"params": params["time_text_embed"]}, expected["vel_timestep"],
                                             expected["vel_guidance"], pooled)
    image, text = dense("x_embedder", expected["vel_hidden"]), dense("context_embedder", context)
    close(vector, "dbg_temb"), close(image, "dbg_x_embed"), close(text, "dbg_context")
    for i in range(config.num_layers):
        (image, text), _ = flux.DoubleBlock(config).apply(layer("transformer_blocks", i), (image, text), vector, table)
        close(image, f"dbg_double{i}_image"), close(text, f"dbg_double{i}_text")
    term = dense("siglip_embed", expected["vel_siglip"])
    close(term, "dbg_siglip_embed")
    x = jnp.concatenate([text, image + term], axis=1)
    for i in range(config.num_single_layers):
        x, _ = flux.SingleBlock(config).apply(layer("single_transformer_blocks", i), x, vector, table)
        close(x, f"dbg_single{i}")
    scale, shift = flux.Modulation(2).apply({"params": params["norm_out"]}, vector)
    close(flux.modulated_norm(x[:, 10:], shift, scale), "dbg_norm_out")


def schedule_of(fixtures):
    scheduler = json.loads((fixtures / "flux/base/scheduler/scheduler_config.json").read_text())
    return flux.Schedule(*(scheduler[name] for name in
                           ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")))


def test_guided_loop(golden, fixtures):
    """Noise levels, every single step from the recorded latents, and the whole loop from the noise."""
    config, params, call, expected = golden
    schedule = schedule_of(fixtures)
    noise, siglip, steps = expected["loop_init_latents"], expected["loop_siglip"], call["num_inference_steps"]
    levels = flux.sigmas(steps, noise.shape[1], schedule)
    np.testing.assert_allclose(levels, expected["loop_sigmas"], atol=1e-6)
    np.testing.assert_allclose(levels[:-1] * 1000, expected["loop_timesteps"], rtol=1e-6)

    velocity, scale = bound(config, params, drawn_grid(call)), call["true_cfg_scale"]
    (context, pooled), negative = text_of(expected)
    latents = np.concatenate([noise[None], expected["loop_step_latents"]])                          # [steps+1, 1, N, C]
    for i in range(steps):
        both = velocity(np.concatenate([latents[i]] * 2), np.concatenate([siglip, 0 * siglip]),
                        np.concatenate([context, negative[0]]), np.concatenate([pooled, negative[1]]),
                        np.full(2, levels[i]), np.ones(2, np.float32))
        guided = both[1] + scale * (both[0] - both[1])
        np.testing.assert_allclose(latents[i] + (levels[i + 1] - levels[i]) * guided, latents[i + 1], atol=5e-4)

    final = flux.sample(velocity, noise, siglip, context, pooled, steps, scale, negative, schedule)
    np.testing.assert_allclose(final, expected["loop_final_latents"], atol=5e-4)
    unpacked = np.moveaxis(np.asarray(flux.unpack(final, drawn_grid(call))), -1, 1)
    np.testing.assert_allclose(unpacked, expected["loop_unpacked"], atol=5e-4)


def tokenizer_latents(folder, grid):
    """The latents [1, N, S] of the fixture's random codes, computed by our tokenizer."""
    torch = pytest.importorskip("torch")
    described = json.loads((folder / "config.json").read_text())
    sizes = {**described, **described["siglip_config"], "groups": described["groupnorm_groups"]}
    config = siglip_vq.Config(**{name: sizes[name] for name in siglip_vq.Config.__dataclass_fields__})
    params = siglip_vq.from_torch(*({name: tensor.numpy() for name, tensor in
                                     torch.load(folder / file, weights_only=True).items()}
                                    for file in ("siglip_vit.pt", "vq_projector.pt")), config)
    tokens = np.load(folder / "expected.npz")["grid_tokens"].reshape(1, -1)
    latents = jax.jit(lambda tokens: siglip_vq.SiglipVQ(config).apply(
        {"params": params}, tokens, grid, method="decode"))(tokens)
    return latents.reshape(1, tokens.shape[1], -1)


def test_from_tokens_to_the_picture(golden, fixtures):
    """The whole decoder: codes, tokenizer latents, guided flow, autoencoder, and every byte of the picture."""
    config, params, call, expected = golden
    described = json.loads((fixtures / "flux/base/vae/config.json").read_text())
    vae_config = vae.Config(**{name: tuple(described[name]) if isinstance(described[name], list) else described[name]
                               for name in vae.Config.__dataclass_fields__})
    vae_params = vae.from_torch(load_file(fixtures / "flux/base/vae/diffusion_pytorch_model.safetensors"), vae_config)
    grid = drawn_grid(call)
    (context, pooled), negative = text_of(expected)
    siglip = tokenizer_latents(fixtures / "siglip_vq", grid)
    np.testing.assert_allclose(siglip, expected["loop_siglip"], atol=5e-4)
    final = flux.sample(bound(config, params, grid), expected["loop_init_latents"], siglip, context, pooled,
                        call["num_inference_steps"], call["true_cfg_scale"], negative, schedule_of(fixtures))
    raw = jax.jit(lambda final: vae.AutoencoderKL(vae_config).apply(
        {"params": vae_params}, vae.from_latents(flux.unpack(final, grid), vae_config), method="decode"))(final)
    pixels = np.asarray(vae.to_pixels(raw))
    np.testing.assert_allclose(pixels, expected["image_float"], atol=5e-4)
    assert_same_picture(pixels[0], expected)


# ------------------------------------------------------------------ contracts

@pytest.fixture(scope="module")
def random_params():
    """Every leaf random, so that nothing is hidden by zero biases."""
    normal = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: flux.init(WITH_SIGLIP, jax.random.key(0)))
    return jax.tree.map(lambda leaf: 0.2 * normal(leaf.shape, np.float32), shapes)


def test_without_guidance_the_negative_branch_is_not_computed():
    batches = []

    def velocity(latents, siglip, context, pooled, sigma, guidance):
        batches.append([len(x) for x in (latents, siglip, context, pooled, sigma, guidance)])
        return latents + siglip.sum() + context.sum()

    noise, siglip, context, pooled = jnp.ones((2, 4, 3)), jnp.ones((2, 4, 5)), jnp.ones((2, 6, 7)), jnp.ones((2, 8))
    negative = (jnp.zeros((1, 6, 7)), jnp.zeros((1, 8)))                      # one empty prompt serves the whole batch
    flux.sample(velocity, noise, siglip, context, pooled, 3, 1.0, negative)
    assert batches and all(batch == [2] * 6 for batch in batches)
    batches.clear()
    flux.sample(velocity, noise, siglip, context, pooled, 3, 2.0, negative)
    assert batches and all(batch == [4] * 6 for batch in batches)
    with pytest.raises(ValueError, match="negative"):
        flux.sample(velocity, noise, siglip, context, pooled, 3, 2.0)


def test_guided_sample_of_a_batch_equals_that_of_its_row(random_params):
    """Conditional and negative halves are not mixed up between pictures."""
    grid, velocity = (2, 2), bound(WITH_SIGLIP, random_params, (2, 2))
    noise, siglip, context, pooled, _, _ = random_inputs(WITH_SIGLIP, grid)
    negative = (np.ones_like(context[:1]), np.ones_like(pooled[:1]))
    together = flux.sample(velocity, noise, siglip, context, pooled, 2, 2.5, negative)
    alone = flux.sample(velocity, noise[1:], siglip[1:], context[1:], pooled[1:], 2, 2.5, negative)
    np.testing.assert_allclose(together[1:], alone, atol=1e-4)


def test_the_flow_is_guided_from_the_empty_prompt():
    """Euler steps along n + s (c - n), with the tokenizer's latents for the prompt alone; the step is the fall of
    sigma."""
    def velocity(latents, siglip, context, pooled, sigma, guidance):
        return latents * sigma[:, None, None] + siglip + context.mean(axis=1, keepdims=True) + pooled[:, None]

    rng = np.random.default_rng(0)
    x, siglip, context, pooled, other, other_pooled = (rng.standard_normal(shape).astype(np.float32) for shape in (
        (2, 4, 3), (2, 4, 3), (2, 5, 3), (2, 3), (1, 5, 3), (1, 3)))
    ours = flux.sample(velocity, x, siglip, context, pooled, 3, 2.5, (other, other_pooled))
    levels = flux.sigmas(3, 4)
    assert levels[0] == 1 and levels[-1] == 0
    for sigma, after in zip(levels, levels[1:]):
        c = x * sigma + siglip + context.mean(axis=1, keepdims=True) + pooled[:, None]
        n = x * sigma + other.mean(axis=1, keepdims=True) + other_pooled[:, None]
        x = x + (after - sigma) * (n + 2.5 * (c - n))
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-5)


def test_remat_changes_no_value(random_params):
    grid = (2, 2)
    latents, *rest = random_inputs(WITH_SIGLIP, grid)
    results = []
    for config in (WITH_SIGLIP, dataclasses.replace(WITH_SIGLIP, remat=True)):
        gradient = jax.grad(lambda x: (flux.FluxTransformer(config).apply(
            {"params": random_params}, x, *rest, grid) ** 2).mean())
        traced = jax.jit(gradient).trace(latents)
        assert ("remat" in str(traced.jaxpr)) == config.remat
        results.append(traced.lower().compile()(latents))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_bfloat16_in_bfloat16_out(random_params):
    grid = (2, 3)
    half = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)
    latents, siglip, context, pooled, sigma, guidance = random_inputs(WITH_SIGLIP, grid)
    dtypes = []

    def velocity(*inputs):
        out = flux.FluxTransformer(WITH_SIGLIP).apply({"params": half(random_params)}, *inputs, grid)
        dtypes.append(out.dtype)
        return out

    final = jax.eval_shape(lambda *x: flux.sample(velocity, *x, 2), latents, siglip, half(context), half(pooled))
    assert final.dtype == jnp.float32 and set(dtypes) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("damage, key", [
    (lambda tensors: tensors.pop("transformer_blocks.1.ff.net.0.proj.bias"), r"missing.*blocks\.1\.ff\.net\.0\.proj"),
    (lambda tensors: tensors.update({"siglip_embed.weight": np.zeros((24, 9))}), r"unknown.*siglip_embed\.weight"),
    (lambda tensors: tensors.update({"proj_out.weight": np.zeros((8, 25))}), r"proj_out\.weight"),
])
def test_checkpoint_errors_name_the_key(damage, key):
    _, tensors = torch_model(PLAIN[0])
    damage(tensors)
    with pytest.raises(ValueError, match=key):
        flux.from_torch(tensors, PLAIN[0])
