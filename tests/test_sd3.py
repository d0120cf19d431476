"""Stable Diffusion 3.5's transformer and its flow against diffusers on random weights, and against recorded values."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gvu_jax import lora
from gvu_jax.described import Described
from gvu_jax.models import sd3, text_encoders, vae

PLAIN = [
    sd3.Config(in_channels=4, num_layers=3, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=10,
               pooled_projection_dim=6, pos_embed_max_size=8),
    sd3.Config(in_channels=3, num_layers=4, attention_head_dim=8, num_attention_heads=3, joint_attention_dim=7,
               pooled_projection_dim=5, pos_embed_max_size=5, dual_attention_layers=(0, 1)),
    sd3.Config(in_channels=6, num_layers=1, attention_head_dim=20, num_attention_heads=1, joint_attention_dim=16,
               pooled_projection_dim=9, pos_embed_max_size=7),
    sd3.Config(in_channels=5, num_layers=5, attention_head_dim=4, num_attention_heads=4, joint_attention_dim=6,
               pooled_projection_dim=4, pos_embed_max_size=9, patch_size=1, dual_attention_layers=(1, 2, 4)),
]


def random_inputs(config, size, batch=2, text_tokens=5, seed=0):
    """latents, text, sigma for latents of a size."""
    normal = np.random.default_rng(seed).standard_normal
    return (normal((batch, *size, config.in_channels), np.float32),
            sd3.Text(normal((batch, text_tokens, config.joint_attention_dim), np.float32),
                     normal((batch, config.pooled_projection_dim), np.float32)),
            np.linspace(0.9, 0.2, batch, dtype=np.float32))


def of_diffusers(torch, model, latents, text, sigma):
    """The velocity, channels first, of diffusers' transformer."""
    with torch.no_grad():
        return model(hidden_states=torch.from_numpy(latents).permute(0, 3, 1, 2),
                     encoder_hidden_states=torch.from_numpy(text.context),
                     pooled_projections=torch.from_numpy(text.pooled), timestep=1000 * torch.from_numpy(sigma)
                     ).sample.numpy()


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def channels_last(x):
    return np.moveaxis(np.asarray(x), -3, -1)


# ------------------------------------------------------------------ against diffusers

def torch_module(config, sample_size=6):
    fields = {name: value for name, value in vars(config).items() if name != "remat"}
    return pytest.importorskip("diffusers").SD3Transformer2DModel(
        sample_size=sample_size, caption_projection_dim=config.width, out_channels=config.in_channels,
        qk_norm="rms_norm", **fields).eval()


def torch_model(config, seed=0):
    """diffusers' transformer with every parameter, norms included, drawn at random; and its state dict in numpy."""
    torch, model = pytest.importorskip("torch"), torch_module(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), model.pos_embed.pos_embed]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("config, size, batch, text_tokens", [
    (PLAIN[0], (6, 4), 2, 5), (PLAIN[1], (4, 10), 3, 1), (PLAIN[2], (2, 14), 1, 12), (PLAIN[3], (3, 8), 2, 4)],
    ids=["large", "medium", "one-block", "dual-anywhere"])
def test_velocity_equals_diffusers(config, size, batch, text_tokens):
    torch = pytest.importorskip("torch")
    theirs, tensors = torch_model(config)
    inputs, params = random_inputs(config, size, batch, text_tokens), sd3.from_torch(tensors, config)
    ours = jax.jit(sd3.SD3Transformer(config).apply)({"params": params}, *inputs)
    np.testing.assert_allclose(channels_first(ours), of_diffusers(torch, theirs, *inputs), atol=5e-4)


@pytest.mark.parametrize("side, sample_size", [(5, 6), (8, 16)])
def test_a_new_table_of_positions_equals_diffusers(side, sample_size):
    config = dataclasses.replace(PLAIN[0], pos_embed_max_size=side)
    table = torch_module(config, sample_size).pos_embed.pos_embed
    np.testing.assert_allclose(sd3.positions(config, sample_size), table.numpy(), atol=1e-5)


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (2, 3.0), (7, 3.0), (40, 3.0), (10, 1.5), (28, 5.0)])
def test_flow_equals_diffusers_scheduler(steps, shift):
    """Noise levels, and the Euler steps along a velocity that depends on position and level."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    levels = sd3.sigmas(steps, shift)
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), atol=1e-6)

    noise = np.random.default_rng(0).standard_normal((1, 4, 6, 3), np.float32)
    theirs = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(torch.sin(theirs) + timestep / 1000, timestep, theirs).prev_sample
    run = sd3.guided_velocity(lambda x, text, sigma: jnp.sin(x) + sigma[:, None, None, None],
                              sd3.Text(jnp.zeros((1, 1, 2)), jnp.zeros((1, 2))))
    np.testing.assert_allclose(sd3.sample(run, noise, levels), theirs.numpy(), atol=1e-5)


# ------------------------------------------------------------------ at full size, shapes only

LARGE = sd3.Config(in_channels=16, num_layers=38, attention_head_dim=64, num_attention_heads=38,
                   joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=192)
MEDIUM = sd3.Config(in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
                    joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
                    dual_attention_layers=tuple(range(13)))


@pytest.mark.parametrize("config, billions", [(LARGE, 8.057), (MEDIUM, 2.243)], ids=["large", "medium"])
def test_full_size(config, billions):
    torch = pytest.importorskip("torch")
    shapes = jax.eval_shape(lambda: sd3.init(config, jax.random.key(0)))
    learned = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - shapes["pos_embed"].size
    with torch.device("meta"):
        assert learned == sum(parameter.numel() for parameter in torch_module(config, 128).parameters())
    assert round(learned / 1e9, 3) == billions
    velocity = jax.eval_shape(lambda params, inputs: sd3.SD3Transformer(config).apply({"params": params}, *inputs),
                              shapes, random_inputs(config, (128, 96), 2, 105))
    assert velocity.shape == (2, 128, 96, 16)


# ------------------------------------------------------------------ against the fixture

@pytest.fixture(scope="module")
def recorded(fixtures):
    folder = fixtures / "uae/sd35"
    return json.loads((folder / "expected.json").read_text()), np.load(folder / "expected.npz")


def read(folder):
    """(config, params in float32) of a transformer's folder, every size from its own file."""
    config = Described(folder / "config.json").numbers(sd3.Config)
    params = sd3.from_torch(load_file(folder / "diffusion_pytorch_model.safetensors"), config)
    return config, jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


@pytest.fixture(scope="module", params=["base/transformer", "transformer_medium"])
def golden(request, fixtures):
    """(config, params, prefix of the recorded values)."""
    return (*read(fixtures / "uae/sd35" / request.param), "medium_" if "medium" in request.param else "")


def test_every_value_on_the_way(golden, recorded):
    """Positions, conditioning, context, both streams after each block, and what a model without its first block draws.
    """
    (config, params, prefix), expected = golden, recorded[1]
    latents, context, pooled = channels_last(expected["vel_hidden"]), expected["vel_context"], expected["vel_pooled"]
    sigma = expected["vel_timestep"] / 1000

    def close(value, name):
        np.testing.assert_allclose(value, expected[prefix + name], atol=2e-4, err_msg=name)

    def apply(module, name, *inputs):
        return module.apply({"params": params[name]}, *inputs)

    vector = apply(sd3.Conditioning(config.width), "time_text_embed", sigma, pooled)
    size = (config.patch_size,) * 2
    image = apply(sd3.nn.Conv(config.width, size, strides=size, padding="VALID"), "patch_embed", latents)
    crop = sd3.cropped(params["pos_embed"], latents.shape[1:3], config)
    image = image.reshape(len(latents), -1, config.width) + crop
    text = context @ params["context_embedder"]["kernel"] + params["context_embedder"]["bias"]
    close(vector, "dbg_temb"), close(image, "dbg_x_embed"), close(text, "dbg_context")
    if not prefix:
        np.testing.assert_allclose(crop, expected["cropped_pos_embed"], atol=1e-6)

    def blocks(skip=()):
        streams = image, text
        for first, count, (dual, last) in config.runs:
            for i in range(count):
                if first + i in skip:
                    continue
                of_block = {"params": jax.tree.map(lambda leaf: leaf[i], params[f"blocks_{first}"])}
                streams, _ = sd3.Block(config, dual, last).apply(of_block, streams, vector, None)
                if not skip:
                    close(streams[0], f"dbg_block{first + i}_image")
                    if not last:
                        close(streams[1], f"dbg_block{first + i}_text")
        scale, shift = apply(sd3.Modulation(2), "norm_out", vector)
        normed = sd3.modulated_norm(streams[0], shift, scale)
        return normed, normed @ params["proj_out"]["kernel"] + params["proj_out"]["bias"]

    close(blocks()[0], "dbg_norm_out")
    patches = blocks(skip=(0,))[1].reshape(len(latents), *(n // config.patch_size for n in latents.shape[1:3]),
                                           *size, -1)
    skipped = np.asarray(patches).transpose(0, 1, 3, 2, 4, 5).reshape(latents.shape)
    np.testing.assert_allclose(channels_first(skipped), expected[f"{prefix}velocity_skip0"], atol=5e-4)


def test_velocity(golden, recorded):
    (config, params, prefix), expected = golden, recorded[1]
    ours = jax.jit(sd3.SD3Transformer(config).apply)(
        {"params": params}, channels_last(expected["vel_hidden"]),
        sd3.Text(expected["vel_context"], expected["vel_pooled"]), expected["vel_timestep"] / 1000)
    np.testing.assert_allclose(channels_first(ours), expected[f"{prefix}velocity"], atol=5e-4)


def test_levels(recorded):
    told, expected = recorded
    names = [name for name in expected if name.startswith("sigmas_")]
    assert names
    for name in names:
        levels = sd3.sigmas(int(name.removeprefix("sigmas_")), told["shift"])
        np.testing.assert_allclose(levels, expected[name], atol=1e-6)
        np.testing.assert_allclose(1000 * levels[:-1], expected[name.replace("sigmas", "timesteps")], rtol=1e-6)


def test_pooled_vectors(fixtures, recorded):
    """Of the prompt and of none: both towers, whose pooled vectors are joined; and what the last layer reads."""
    told, expected = recorded
    for which in ("prompt", "empty"):
        pooled = []
        for i, name in enumerate(("text_encoder", "text_encoder_2")):
            folder = fixtures / "uae/sd35/base" / name
            told_here = Described(folder / "config.json")
            config = told_here.numbers(text_encoders.ClipConfig, projected=told_here["projection_dim"])
            params = text_encoders.from_torch(load_file(folder / "model.safetensors"), config)
            params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
            ids = expected[f"clip{i + 1}_ids_{which}"]
            assert ids[0, 0] == told["clip_bos"] and ids[0, -1] in (told["clip_eos"], told["clip_pad"][i])
            _, of_tower, second = jax.jit(text_encoders.ClipText(config).apply)({"params": params}, ids)
            np.testing.assert_allclose(second, expected[f"clip{i + 1}_penultimate_{which}"], atol=2e-4)
            pooled.append(of_tower)
        np.testing.assert_allclose(np.concatenate(pooled, axis=1), expected[f"pooled_{which}"], atol=2e-4)


@pytest.fixture(scope="module")
def autoencoder(fixtures):
    folder = fixtures / "uae/sd35/base/vae"
    config = vae.read_config(Described(folder / "config.json"))
    params = vae.from_torch(load_file(folder / "diffusion_pytorch_model.safetensors"), config)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    return config, lambda x, method: jax.jit(
        lambda x: vae.AutoencoderKL(config).apply({"params": params}, x, method=method))(x)


def test_autoencoder(autoencoder, recorded):
    (config, run), (told, expected) = autoencoder, recorded
    assert (config.downscale, config.scaling_factor, config.shift_factor) == (
        told["vae_scale_factor"], told["scaling_factor"], told["shift_factor"])
    mean, log_variance = run(channels_last(expected["vae_image"]) / 2 + 0.5, "encode")
    np.testing.assert_allclose(channels_first(mean), expected["vae_mean"], atol=5e-4)
    np.testing.assert_allclose(np.clip(channels_first(log_variance), -30, 20), expected["vae_logvar"], atol=5e-4)
    np.testing.assert_allclose(channels_first(vae.to_latents(mean, config)), expected["vae_scaled"], atol=5e-4)
    np.testing.assert_allclose(channels_first(run(channels_last(expected["vae_latent"]), "decode")),
                               expected["vae_decoded"], atol=5e-4)


def test_guided_loop_to_the_picture(fixtures, autoencoder, recorded):
    """Every single step from the recorded latents, the whole loop with guidance and without, every byte of the
    picture."""
    (told, expected), (config, params) = recorded, read(fixtures / "uae/sd35/base/transformer")
    velocity = jax.jit(lambda *inputs: sd3.SD3Transformer(config).apply({"params": params}, *inputs))
    text = sd3.Text(expected["loop_context"], expected["loop_pooled"])
    negative = sd3.Text(expected["loop_context_negative"], expected["loop_pooled_negative"])
    run = sd3.guided_velocity(velocity, text, negative, told["guidance_scale"])
    noise, levels = channels_last(expected["loop_init_latents"]), sd3.sigmas(told["num_inference_steps"], told["shift"])
    np.testing.assert_allclose(levels, expected["loop_sigmas"], atol=1e-6)
    latents = [noise, *channels_last(expected["loop_step_latents"])]
    for before, after, sigma, following in zip(latents, latents[1:], levels, levels[1:]):
        np.testing.assert_allclose(before + (following - sigma) * run(before, sigma), after, atol=5e-4)
    final = jax.jit(lambda noise: sd3.sample(run, noise, levels))(noise)
    np.testing.assert_allclose(channels_first(final), expected["loop_final_latents"], atol=5e-4)
    alone = jax.jit(lambda noise: sd3.sample(sd3.guided_velocity(velocity, text), noise, levels))(noise)
    np.testing.assert_allclose(channels_first(alone), expected["loop_final_latents_nocfg"], atol=5e-4)

    of_vae, run = autoencoder
    raw = run(vae.from_latents(final, of_vae), "decode")
    np.testing.assert_allclose(channels_first(raw), expected["loop_vae_raw"], atol=2e-3)
    pixels = vae.to_pixels(raw)
    np.testing.assert_allclose(pixels, expected["image_float"], atol=2e-3)
    off = np.abs(np.round(np.asarray(pixels[0]) * 255) - expected["image_uint8"])
    assert off.max() <= 1 and np.mean(off > 0) <= 0.01


# ------------------------------------------------------------------ contracts

@pytest.fixture(scope="module")
def random_params():
    """Every leaf random, so that nothing is hidden by zero biases."""
    normal = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: sd3.init(PLAIN[1], jax.random.key(0)))
    return jax.tree.map(lambda leaf: 0.2 * normal(leaf.shape, np.float32), shapes)


def test_guided_sample_of_a_batch_equals_that_of_its_row(random_params):
    """Negative and positive halves are not mixed up between pictures, and one negative serves the whole batch."""
    velocity = lambda *x: sd3.SD3Transformer(PLAIN[1]).apply({"params": random_params}, *x)
    noise, text, _ = random_inputs(PLAIN[1], (4, 2))
    negative = sd3.Text(*(np.ones_like(x[:1]) for x in text[:2]))
    of_rows = lambda rows: sd3.guided_velocity(velocity, sd3.Text(*(x[rows] for x in text[:2])), negative, 2.5)
    sample = lambda rows: jax.jit(lambda noise: sd3.sample(of_rows(rows), noise, sd3.sigmas(2)))(noise[rows])
    np.testing.assert_allclose(sample(slice(None))[1:], sample(slice(1, 2)), atol=1e-4)
    with pytest.raises(ValueError, match="negative"):
        sd3.guided_velocity(velocity, text, None, 2.5)


def test_text_that_is_not_there_is_not_read(random_params):
    """A row with fewer vectors among longer ones is drawn as it is alone."""
    latents, text, sigma = random_inputs(PLAIN[1], (4, 2))
    apply = jax.jit(lambda *x: sd3.SD3Transformer(PLAIN[1]).apply({"params": random_params}, *x))
    real = np.arange(5)[None] < np.array([[5], [3]])
    together = apply(latents, text._replace(real=real), sigma)
    np.testing.assert_allclose(together[:1], apply(latents[:1], sd3.Text(*(x[:1] for x in text[:2])), sigma[:1]),
                               atol=1e-5)
    np.testing.assert_allclose(together[1:], apply(latents[1:], sd3.Text(text.context[1:, :3], text.pooled[1:]),
                                                   sigma[1:]), atol=1e-5)


def test_adapters_reach_every_matrix(random_params):
    """What peft lays over all linear layers of diffusers' model."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config, inputs = PLAIN[1], random_inputs(PLAIN[1], (4, 6))
    theirs, tensors = torch_model(config)
    targets = [name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets,
                                                         init_lora_weights=False)).eval()
    of_peft = {name: tensor.numpy() for name, tensor in peft.get_peft_model_state_dict(theirs).items()}
    params = sd3.from_torch(tensors, config)
    adapter = lora.from_peft(of_peft, params, sd3.RULES)
    ours = jax.jit(sd3.SD3Transformer(config).apply)({"params": params, "lora": lora.scaled(adapter, 2.0)}, *inputs)
    np.testing.assert_allclose(channels_first(ours), of_diffusers(torch, theirs, *inputs), atol=5e-4)
    assert lora.to_peft(adapter, sd3.RULES).keys() == of_peft.keys()
    new = lora.init(jax.random.key(0), params, 3, "")
    assert lora.to_peft(new, sd3.RULES).keys() == of_peft.keys()               # and none of the convolution


def test_remat_changes_no_value(random_params):
    latents, *rest = random_inputs(PLAIN[1], (4, 2))
    results = []
    for config in (PLAIN[1], dataclasses.replace(PLAIN[1], remat=True)):
        gradient = jax.grad(lambda x: (sd3.SD3Transformer(config).apply({"params": random_params}, x, *rest) ** 2
                                       ).mean())
        traced = jax.jit(gradient).trace(latents)
        assert ("remat" in str(traced.jaxpr)) == config.remat
        results.append(traced.lower().compile()(latents))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_bfloat16_in_bfloat16_out(random_params):
    half = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)
    latents, text, sigma = random_inputs(PLAIN[1], (4, 2))
    velocity = jax.eval_shape(sd3.SD3Transformer(PLAIN[1]).apply, {"params": half(random_params)}, half(latents),
                              half(text), sigma)
    assert velocity.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [(12, 4), (3, 4), (4, 11)])
def test_latents_without_positions_are_refused(random_params, size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*at most 10"):
        jax.eval_shape(sd3.SD3Transformer(PLAIN[1]).apply, {"params": random_params}, *random_inputs(PLAIN[1], size))


@pytest.mark.parametrize("damage, key", [
    (lambda tensors: tensors.pop("transformer_blocks.2.ff.net.0.proj.bias"), r"missing.*blocks\.2\.ff\.net\.0\.proj"),
    (lambda tensors: tensors.update({"transformer_blocks.2.attn2.to_q.bias": np.zeros(24)}), r"unknown.*2\.attn2"),
    (lambda tensors: tensors.update({"proj_out.weight": np.zeros((8, 25))}), r"proj_out\.weight"),
    (lambda tensors: tensors.update({"pos_embed.pos_embed": np.zeros((1, 36, 24))}), r"pos_embed\.pos_embed"),
])
def test_checkpoint_errors_name_the_key(damage, key):
    _, tensors = torch_model(PLAIN[1])
    damage(tensors)
    with pytest.raises(ValueError, match=key):
        sd3.from_torch(tensors, PLAIN[1])
