"""A tiny untrained model of the shapes world, where the golden data is, and eight devices to divide work among."""
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

# Programs of tests run for milliseconds, so they had better be compiled fast than well, and in one piece where a core
# has no other to share with. The second and third flags are ones that XLA may take back, and it ends a process that
# names a flag it does not know.
ALONE = os.environ.get("XLA_FLAGS", "")
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":       # the TPU compiler is installed, but there is no TPU
    ALONE += " --xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        ALONE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{ALONE} --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest
from absl import flags

gc.set_threshold(50_000, 20, 50)         # tracing makes much and leaves little: looking for it took 7 % of the time

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(os.environ.get("GVU_FIXTURES", ROOT.parent / "shared" / "fixtures"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

assert jax.device_count() == 8 or jax.default_backend() != "cpu"         # on a GPU: those tests that need one device
os.environ["XLA_FLAGS"] = ALONE          # the processes that tests start have one device, as their users' have


def one_device():
    """A mesh of one device, for tests that are not about dividing."""
    from gvu_jax import sharding
    return sharding.make_mesh({}, jax.devices()[:1])


def pytest_configure(config):
    """One empty cache for all processes of this session: a program, or a base, is made once and not in every test."""
    if not hasattr(config, "workerinput"):
        os.environ["GVU_CACHE"] = config.gvu_cache = tempfile.mkdtemp(prefix="gvu_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["GVU_CACHE"] + "/compiled"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure(config):
    if hasattr(config, "gvu_cache"):
        shutil.rmtree(config.gvu_cache, ignore_errors=True)


# Files that take longest, the longest first. Whoever has done with a file takes the next one: a long one that is begun
# last is waited for by all others.
LONGEST = ("sharding train published qwen_sd35 uae faults notebooks showo janus internal_gap adapters families cli sd3 "
           "experiments hub plan docs bad_input xomni flow flux").split()


@pytest.hookimpl(trylast=True)                            # pytest itself reorders the tests of shared fixtures
def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_report_header():
    return f"reports are looked at in {CHROMIUM or 'NO BROWSER: there is no Chromium here, their layout is not tested'}"


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=1, help="how often tests/test_faults.py disturbs a run")


@pytest.fixture(scope="session")
def faults(request):
    return request.config.getoption("--faults")


def load_config(name, *preset):
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


TINY = "xomni", "janus", "showo", "qwen_sd35"     # the families that have a tiny version


def tiny_config(name="shapes", preset="smoke", family=TINY[0]):
    """A config of the shapes world with every size and budget cut to what a test can pay."""
    config = load_config(name, preset)
    config.family = family
    config.model.ar.update(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2)
    config.model.vision.update(width=16, layers=1, heads=2, mlp_hidden=16, z_channels=16)
    config.model.flux.update(num_attention_heads=2, num_single_layers=1, siglip_channels=16)
    config.model.vq.update(channels=2, multipliers=(1, 1, 1, 1, 1), z_channels=4, norm_num_groups=1)
    config.model.magvit.update({f"{part}_multipliers": (1, 1, 1, 1, 1) for part in ("encoder", "decoder")}, bits=8,
                               encoder_channels=2, decoder_channels=2, decoder_blocks=(1, 1, 1, 1, 1), norm_num_groups=1)
    config.model.rounds = 3
    config.model.dit.update(num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16)
    config.sampling.flow.update(steps=3, window=2)
    config.pretrain.update(scenes=1024, crowded=512)
    for stage in ("tokenizer", "diffusion", "tower", "codes", "drawing", "positions", "backbone"):
        config.pretrain[stage].steps = 4
    if family != TINY[0]:
        config.pretrain.positions.steps = 0            # the second lesson's loss on other texts: one family's will do
    config[config.method].update(prompts=6, group=4)
    config.mesh.data = 1
    config.eval.update(every=2, batches=1, choices=6)
    config.update(steps=4, log_every=1, checkpoint_every=2)
    config.optim.schedule = "constant"       # a schedule over the run's length would change when a run is prolonged
    return config


def put_untrained(config):
    """An untrained model stands in the cache as the base of this config: what a run does with it, it does without the
    minutes that pretraining takes to compile."""
    from gvu_jax import checkpoint
    from gvu_jax.shapes import pretrain
    folder = pretrain.base_folder(config)
    if not folder.exists():
        checkpoint.save_model(folder, *build(config))


def build(config, built={}):
    """`pretrain.build`, once in a process for all configs of one model."""
    from gvu_jax.shapes import pretrain
    of = config.family, config.model.to_json_best_effort(), config.world.to_json(), config.pretrain.seed
    if of not in built:
        built[of] = pretrain.build(config)
    return built[of]


def untrained(family=TINY[0]):
    """(config, umm, params) of an untrained model of a family."""
    return (config := tiny_config(family=family), *build(config))


@pytest.fixture(scope="session")
def tiny():
    return untrained()


@pytest.fixture(scope="session", params=TINY)
def each(request):
    """`tiny` of every family."""
    return untrained(request.param)


@pytest.fixture(scope="session")
def fixtures():
    if not FIXTURES.is_dir():
        assert "GVU_FIXTURES" not in os.environ, f"GVU_FIXTURES names {FIXTURES}, which is no folder"
        pytest.skip(f"no golden data at {FIXTURES} (set GVU_FIXTURES)")
    return FIXTURES


@pytest.fixture(scope="session")
def converted(fixtures, tmp_path_factory):
    """The golden checkpoint as a model folder."""
    from gvu_jax import convert
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert.convert(fixtures / "xomni", folder, image_size=least_size(fixtures))
    return folder


def least_size(fixtures):
    """Side in pixels of the smallest pictures that the golden X-Omni draws and reads as they are."""
    told = json.loads((fixtures / "xomni/config.json").read_text())["vision_config"]
    step = told["decoder"]["upscale_factor"]
    return -(-told["transform"]["short_size"] // step) * step


def copied(src, dst, *ignored):
    """A copy of a folder of golden data, without what the patterns `ignored` name, which may be written to."""
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns(*ignored))
    for path in (dst, *dst.rglob("*")):
        path.chmod(0o755)
    return dst


def janus_params(tensors, configs, layout):
    """The params of all three parts from a checkpoint's tensors (name -> array), in their dtypes."""
    from gvu_jax.models import llama, siglip, torch_keys, vq
    rooms = {"ar": llama, "vision": siglip, "vq": vq}
    parts = torch_keys.split(tensors, {part: room.KEYS[layout] for part, room in rooms.items()})
    return {part: room.from_torch(parts[part], configs[part], layout) for part, room in rooms.items()}


@pytest.fixture(scope="session")
def janus(fixtures):
    """The golden Janus-Pro in float32: its folder, configs, params, texts and scores, and arrays(name) of an archive."""
    from safetensors.numpy import load_file
    from gvu_jax.described import Described
    from gvu_jax.families.janus import published_configs
    folder = fixtures / "janus"
    configs, _ = published_configs(Described(folder / "config.json"), folder)
    params = janus_params(load_file(folder / "model.safetensors"), configs, "published")
    return types.SimpleNamespace(
        folder=folder, configs=configs, params=jax.tree.map(lambda leaf: leaf.astype(np.float32), params),
        cases=json.loads((folder / "expected/cases.json").read_text()),
        arrays=lambda name: dict(np.load(folder / "expected" / f"{name}.npz")))


@pytest.fixture(scope="session")
def showo(fixtures):
    """The golden Show-o: its folder, the backbone's config and params, what was told, and arrays(name) of an archive."""
    from gvu_jax.described import Described
    from gvu_jax.families.showo import ar_config
    from gvu_jax.models import phi
    from gvu_jax.tensor_files import weight_files
    folder = fixtures / "showo"
    tensors = {name: file.read(name) for file in weight_files(folder) for name in file.specs}
    config = ar_config(Described(folder / "config.json"), Described(folder / "llm" / "config.json"))
    return types.SimpleNamespace(
        folder=folder, config=config, params=phi.from_torch(tensors, config),
        told=json.loads((folder / "expected/expected.json").read_text()),
        arrays=lambda name: dict(np.load(folder / "expected" / f"{name}.npz")))


@pytest.fixture(scope="session")
def tiny_showo():
    """`tiny` of Show-o, which draws mask by mask."""
    return untrained("showo")


def assert_same_picture(pixels, expected):
    """pixels [H, W, 3] in [0, 1] against the recorded bytes: exact but where the recorded float lies so near to a half
    that the rounding of float32 on the way decides, which may move the float by 5e-4 (the golden data's README)."""
    drawn = np.round(np.asarray(pixels) * 255).astype(int)
    away = np.abs(np.asarray(expected["image_float"])[0] * 255 - drawn)
    np.testing.assert_array_less(np.where(drawn == expected["image_uint8"], 0, away), 0.5 + 255 * 5e-4)


@pytest.fixture(scope="session")
def scenes():
    from gvu_jax.shapes import world
    return world.sample_scenes(np.random.default_rng(0), 4000)


@pytest.fixture(scope="session")
def split():
    from gvu_jax.shapes import world
    return world.split_prompts(held_out=0.2, seed=0)


def code(color, shape):
    """How a scene holds an object."""
    from gvu_jax.shapes import world
    return 1 + world.SHAPES.index(shape) * len(world.COLORS) + world.COLORS.index(color)


def scene(**objects):
    """A 3 x 3 scene from pairs such as c0="red circle"."""
    cells = np.zeros(9, np.int8)
    for cell, name in objects.items():
        cells[int(cell[1:])] = code(*name.split())
    return cells


def find(prompt):
    """The prompt of this text, as a dict."""
    from gvu_jax.shapes import world
    return next(meta for meta in world.all_prompts() if meta["prompt"] == prompt)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def command(monkeypatch):
    """Runs a command line of the package in this process: (exit status or the line it ends with)."""
    from gvu_jax import cli

    def run(tool, *arguments):
        ours = [name for name in flags.FLAGS if name.startswith("config.")
                or flags.FLAGS.find_module_defining_flag(name).startswith("gvu_jax")]
        for name in ours:                                               # each command defines its own
            delattr(flags.FLAGS, name)
        sys.modules.pop(f"gvu_jax.{tool}", None)
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(importlib.import_module(f"gvu_jax.{tool}").main)
        assert "\n" not in str(ended.value.code)
        return ended.value.code
    return run
