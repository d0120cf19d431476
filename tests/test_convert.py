"""Conversion of published checkpoints: what comes out, what comes back, and what is refused."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import copied, least_size, one_device
from flax import traverse_util
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from safetensors.numpy import load_file

from gvu_jax import adapters, checkpoint, convert, lora, tensor_files
from gvu_jax.described import Described
from gvu_jax.families.xomni import PUBLISHED, XOmni, ar_config
from gvu_jax.models import flux, siglip_vq, text_encoders, torch_keys, vae, xomni
from gvu_jax.policy import init_trainable, policy_params
from gvu_jax.tensor_files import ParameterStore, Spec, TensorFile
from test_decode import DOWNLOADS

torch = pytest.importorskip("torch")
BF16 = np.dtype(jnp.bfloat16)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def same_bytes(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def edit(path, **changes):
    """Changes entries of a JSON file: "a__b" is entry b of entry a, and a function makes the new value of the old."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = values
        for key in outer:
            inner = inner[key]
        inner[last] = value(inner[last]) if callable(value) else value
    path.write_text(json.dumps(values))


def save(path, tensors):
    path.unlink(missing_ok=True)
    specs = {name: Spec(array.dtype, array.shape, 0) for name, array in tensors.items()}
    tensor_files.write_file(path, tensor_files.safetensors_header(specs), tensors.__getitem__)


def save_shards(folder, shards, weight_map=None):
    for name, tensors in shards.items():
        save(folder / name, tensors)
    weight_map = weight_map or {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def other_size(fixtures):
    """(pixels, grid) of a picture that the golden model can draw, but not by default."""
    vision = json.loads((fixtures / "xomni/config.json").read_text())["vision_config"]
    step, long_size = vision["decoder"]["upscale_factor"], vision["transform"]["long_size"]
    side = 576 if long_size >= 576 else least_size(fixtures)
    side = side + step if side + step <= long_size else side - step
    return side, (side // step,) * 2


@pytest.fixture
def golden_copy(fixtures, tmp_path):
    """The golden checkpoint as a directory of its own, to be damaged: the model directory in it."""
    for name in ("xomni", "siglip_vq", "flux"):
        copied(fixtures / name, tmp_path / name)
    return tmp_path / "xomni"


@pytest.fixture(scope="module")
def published(fixtures, tmp_path_factory):
    """A directory as it is published: all parts inside, the backbone in bfloat16 and in shards. -> (source, model)"""
    root = tmp_path_factory.mktemp("published")
    source = root / "X-Omni"
    copied(fixtures / "xomni", source, "expected", "model.safetensors")
    copied(fixtures / "siglip_vq", source / "vit", "expected*", "images")
    copied(fixtures / "flux/decoder_transformer", source / "decoder")
    edit(source / "config.json", vision_config__decoder__model_path="decoder",
         vision_config__encoder__siglip_path="vit/siglip_vit.pt",
         vision_config__encoder__projector_path="vit/vq_projector.pt")
    tensors = {k: v.astype(BF16) for k, v in load_file(fixtures / "xomni/model.safetensors").items()}
    names = sorted(tensors)
    save_shards(source, {"model-00001-of-00002.safetensors": {k: tensors[k] for k in names[::2]},
                         "model-00002-of-00002.safetensors": {k: tensors[k] for k in names[1::2]}})
    convert.convert(source, root / "model", image_size=other_size(fixtures)[0], flux=fixtures / "flux/base")
    return source, root / "model"


# ------------------------------------------------------------------ what comes out

def test_every_parameter_is_the_one_of_from_torch(fixtures, converted):
    umm, params = checkpoint.load_model(converted, one_device())
    base = fixtures / "flux/base"
    vit, projector = ({k: v.numpy() for k, v in torch.load(fixtures / "siglip_vq" / name, weights_only=True).items()}
                      for name in ("siglip_vit.pt", "vq_projector.pt"))
    expected = {
        "ar": xomni.from_torch(load_file(fixtures / "xomni/model.safetensors"), umm.ar),
        "vision": siglip_vq.from_torch(vit, projector, umm.vision),
        "flux": flux.from_torch(
            load_file(fixtures / "flux/decoder_transformer/diffusion_pytorch_model.safetensors"), umm.flux),
        "vae": vae.from_torch(load_file(base / "vae/diffusion_pytorch_model.safetensors"), umm.vae),
        "t5": text_encoders.from_torch(load_file(base / "text_encoder_2/model.safetensors"), umm.t5),
        "clip": text_encoders.from_torch(load_file(base / "text_encoder/model.safetensors"), umm.clip)}
    expected, params = flat(expected), flat(params)
    assert params.keys() == expected.keys()
    for path, leaf in expected.items():
        same_bytes(params[path], leaf)


def test_settings_come_from_the_files(fixtures, converted):
    umm, read = checkpoint.read_metadata(converted), lambda name: json.loads((fixtures / name).read_text())
    told, tower = read("xomni/config.json"), read("siglip_vq/config.json")
    decoder, transform = told["vision_config"]["decoder"], told["vision_config"]["transform"]
    assert (umm.diffusion_steps, umm.diffusion_guidance) == (decoder["num_inference_steps"], decoder["cfg_scale"])
    assert all(value == told[name] for name, value in vars(umm.ar).items() if name in told and "window" not in name)
    assert umm.ar.sliding_window == (told["sliding_window"] if told["use_sliding_window"] else None)
    sizes = tower | tower["siglip_config"] | {"groups": tower["groupnorm_groups"]}
    assert vars(umm.vision) == {name: sizes[name] for name in vars(umm.vision)}
    assert vars(umm.transform) == {name: transform[name] for name in vars(umm.transform)}
    s, v = read("flux/base/scheduler/scheduler_config.json"), read("flux/base/vae/config.json")
    assert umm.schedule == flux.Schedule(
        s["base_image_seq_len"], s["max_image_seq_len"], s["base_shift"], s["max_shift"])
    assert list(umm.flux.axes_dims_rope) == read("flux/decoder_transformer/config.json")["axes_dims_rope"]
    assert (umm.vae.scaling_factor, umm.vae.shift_factor) == (v["scaling_factor"], v["shift_factor"])


def test_tokenizers_give_the_recorded_ids(fixtures, converted):
    umm = checkpoint.read_metadata(converted)
    expected = json.loads((fixtures / "tokenizer/expected.json").read_text())
    for case in expected["encode"]:
        assert umm._ids(case["text"]) == case["ids"]
    for case in expected["chat"]:
        text = umm.tokenizer.apply_chat_template(case["messages"], tokenize=False,
                                                 add_generation_prompt=case["add_generation_prompt"])
        assert (text, umm._ids(text)) == (case["text"], case["ids"])
    expected = json.loads((fixtures / "flux/expected.json").read_text())
    for tokenizer, cases in ((umm.t5_tokenizer, "t5_tokenizer_cases"), (umm.clip_tokenizer, "clip_tokenizer_cases")):
        for text, ids in expected[cases].items():
            assert tokenizer(text)["input_ids"] == ids
    arrays = np.load(fixtures / "flux/expected.npz")
    t5, clip = umm._head_ids([expected["prompt"], ""])
    np.testing.assert_array_equal(t5, np.concatenate([arrays["t5_ids_prompt"], arrays["t5_ids_empty"]]))
    np.testing.assert_array_equal(clip, np.concatenate([arrays["clip_ids_prompt"], arrays["clip_ids_empty"]]))


def test_published_layout_in_shards_keeps_its_dtypes(fixtures, published):
    umm, params = checkpoint.load_model(published[1], one_device())
    assert umm.grid == other_size(fixtures)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params["ar"])} == {BF16}
    assert {leaf.dtype for leaf in jax.tree.leaves(params["flux"])} == {np.dtype(np.float32)}
    plain = flat(ocp.load(published[1] / "params"))                       # without being told what to expect
    for path, leaf in flat(params).items():
        same_bytes(plain[path], leaf)


def test_loads_without_torch_and_without_the_source(fixtures, published, tmp_path):
    shutil.copytree(published[1], tmp_path / "model")
    code = ("import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
            "import gvu_jax; print(gvu_jax.load(sys.argv[1]).umm.grid)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.stdout.strip() == str(other_size(fixtures)[1]), done.stderr


def test_params_that_do_not_fit_the_metadata_are_named(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    edit(tmp_path / "model/metadata.json", ar__intermediate_size=lambda n: n + 8,
         vae__layers_per_block=lambda n: n + 1)
    with pytest.raises(ValueError, match="missing: vae/decoder.*misshapen: ar/layers/layer/mlp/down_proj/kernel"):
        checkpoint.load_model(tmp_path / "model", one_device())


# ------------------------------------------------------------------ and back

def test_the_source_comes_back_bit_for_bit(fixtures, converted, published, tmp_path):
    convert.export_hf(converted, tmp_path / "back")
    for name in ("xomni", "flux/decoder_transformer", "flux/base"):
        for file in (fixtures / name).rglob("*"):
            if not file.is_file() or "expected" in file.parts or file.parent == fixtures / "flux/base/transformer":
                continue
            back = tmp_path / "back" / (file.relative_to(fixtures / "xomni") if name == "xomni" else
                                        file.relative_to(fixtures))
            assert back.read_bytes() == file.read_bytes(), file
    for name in ("siglip_vit.pt", "vq_projector.pt"):
        one, other = (torch.load(folder / "siglip_vq" / name, weights_only=True, mmap=mmap)
                      for folder, mmap in ((fixtures, False), (tmp_path / "back", True)))
        assert list(one) == list(other)                                   # the unread norm.weight among them
        for key in one:
            assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key])

    source, model = published
    convert.export_hf(model, tmp_path / "again")
    for file in source.rglob("*"):
        if file.is_file() and file.suffix != ".pt":
            assert (tmp_path / "again" / file.relative_to(source)).read_bytes() == file.read_bytes(), file
    again = convert.read_source(tmp_path / "again")                       # and it is whole: FLUX's base lies in it
    assert again.umm.ar == checkpoint.read_metadata(model).ar


def test_export_of_a_model_that_was_never_converted(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model", ignore=shutil.ignore_patterns("source"))
    with pytest.raises(ValueError, match="was not converted"):
        convert.export_hf(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------ interruptions

def test_an_interrupted_conversion_goes_on(fixtures, converted, tmp_path, monkeypatch):
    writes, write, room = [], ParameterStore.write, [40]

    def failing(self, path, row, values):
        if room and len(writes) == room[0]:
            room.clear()                                                  # it fails once
            raise OSError("no space left on the disk")
        writes.append((path, row))
        write(self, path, row, values)

    monkeypatch.setattr(ParameterStore, "write", failing)
    with pytest.raises(OSError, match="no space"):
        convert.convert(fixtures / "xomni", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model.partial"]
    assert not (tmp_path / "model.partial/metadata.json").exists()
    with pytest.raises(FileExistsError, match="another source"):
        convert.convert(fixtures / "xomni", tmp_path / "model", image_size=other_size(fixtures)[0])

    before, writes[:] = list(writes), []
    convert.convert(fixtures / "xomni", tmp_path / "model")
    assert writes and not set(before) & set(writes)
    one, other = (flat(checkpoint.load_model(folder, one_device())[1]) for folder in (converted, tmp_path / "model"))
    for path in one:
        same_bytes(one[path], other[path])
    writes[:] = []
    convert.convert(fixtures / "xomni", tmp_path / "model")               # whole: nothing to do
    assert not writes
    with pytest.raises(FileExistsError, match="choose another"):
        convert.convert(fixtures / "xomni", tmp_path / "model", image_size=other_size(fixtures)[0])


def test_a_store_knows_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 4096)
    store = ParameterStore(tmp_path / "params")
    values = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32)
    for path in ("a/w", "a/v"):
        store.create(path, (3, 50, 70), values.dtype, stacked=True)
    store.write("a/w", 1, values)
    assert [store.holds("a/w", row) for row in range(3)] == [False, True, False]
    assert not store.holds("a/v", None)
    same_bytes(store.read("a/w", 1), values)
    again = ParameterStore(tmp_path / "params")
    with pytest.raises(OSError, match="shape"):
        again.create("a/w", (4, 50, 70), values.dtype, stacked=True)
    needle = values[:10, :10].tobytes()[:40]                              # flip one bit of what is stored
    for file in (tmp_path / "params/state/d").iterdir():
        data = bytearray(file.read_bytes())
        if (at := data.find(needle)) >= 0:
            data[at] ^= 1
            file.write_bytes(data)
    assert not again.holds("a/w", 1)
    again.write("a/w", 1, values)
    assert again.holds("a/w", 1)


def test_the_store_describes_itself_as_orbax_does(tmp_path):
    tree = {"ar": {"w": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.ones(3, BF16)}}
    store = ParameterStore(tmp_path / "ours")
    for path, leaf in flat(tree).items():
        store.create(path, leaf.shape, leaf.dtype, stacked=leaf.ndim == 3)
        for row in range(2) if leaf.ndim == 3 else [None]:
            store.write(path, row, leaf[row] if leaf.ndim == 3 else leaf)
    store.finish()
    ocp.save(tmp_path / "theirs", jax.tree.map(jnp.asarray, tree))
    for name in ("_METADATA", "_sharding"):
        ours, theirs = (json.loads((tmp_path / who / "state" / name).read_text()) for who in ("ours", "theirs"))
        assert ours == theirs
    ours, theirs = (json.loads((tmp_path / who / "_CHECKPOINT_METADATA").read_text()) for who in ("ours", "theirs"))
    assert ours["item_handlers"] == theirs["item_handlers"] and ours.keys() == theirs.keys()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(
        mesh, jax.P(*[None] * (x.ndim - 1), "fsdp"))), tree)
    jax.tree.map(same_bytes, ocp.load(tmp_path / "ours", like), tree)


# ------------------------------------------------------------------ memory

def test_no_more_than_a_few_tensors_are_held(golden_copy):
    """0.25 GB of backbone, its largest tensor 8 MB: the peak rises by a fraction of the whole."""
    edit(golden_copy / "config.json", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
         num_attention_heads=8, num_key_value_heads=2)
    config = ar_config(Described(golden_copy / "config.json"))
    specs = {key: Spec(BF16, shape, 0) for key, shape in backbone_shapes(config).items()}
    header, file = tensor_files.safetensors_header(specs), golden_copy / "model.safetensors"
    file.unlink()
    file.write_bytes(header)
    total = sum(spec.nbytes for spec in specs.values())
    os.truncate(file, len(header) + total)
    code = ("import resource, sys; from gvu_jax import convert\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "convert.read_source(sys.argv[1]); before = peak()\n"             # libraries, headers, tokenizers
            "convert.convert(sys.argv[1], sys.argv[2]); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code, golden_copy, golden_copy.parent / "model"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert total > 2.4e8 and int(done.stdout) < 3 * max(spec.nbytes for spec in specs.values()) + 1e8


# ------------------------------------------------------------------ full size, headers alone

def backbone_shapes(c):
    """Names and shapes of a published backbone, from transformers' own Qwen2 on no device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, tie_word_embeddings=False))
    table, norm = (c.mm_vocab_size, c.hidden_size), (c.hidden_size,)
    shapes = {k.replace("model.embed_tokens", "model.lm_embed_tokens").replace("model.norm", "model.lm_norm"):
              tuple(v.shape) for k, v in qwen.state_dict().items()}
    return shapes | {"model.mm_embed_tokens.weight": table, "mm_head.weight": table, "model.mm_norm.weight": norm}


def test_the_full_size_checkpoint_has_a_place_for_every_key():
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
    from transformers import T5Config as TheirT5Config
    head, auto, t5, clip = (dataclasses.asdict(PUBLISHED[part]) for part in ("flux", "vae", "t5", "clip"))
    for ours in ("siglip_channels", "remat"):
        head.pop(ours)
    with torch.device("meta"):
        theirs = {"flux": FluxTransformer2DModel(**head), "t5": T5EncoderModel(TheirT5Config(**t5)),
                  "clip": CLIPTextModel(CLIPTextConfig(**clip)),
                  "vae": AutoencoderKL(**auto, down_block_types=["DownEncoderBlock2D"] * 4,
                                       up_block_types=["UpDecoderBlock2D"] * 4, use_quant_conv=False,
                                       use_post_quant_conv=False)}
    found = {part: {k: tuple(v.shape) for k, v in module.state_dict().items()} for part, module in theirs.items()}
    found["t5"].pop("encoder.embed_tokens.weight", None)                  # tied, so files have one of the two
    found["flux"]["siglip_embed.weight"] = (3072, 1536)
    found["ar"] = backbone_shapes(PUBLISHED["ar"])
    block = {"norm1.weight": (1536,), "norm1.bias": (1536,), "attn.qkv.weight": (4608, 1536), "attn.qkv.bias": (4608,),
             "attn.proj.weight": (1536, 1536), "attn.proj.bias": (1536,), "norm2.weight": (1536,),
             "norm2.bias": (1536,), "mlp.fc1.weight": (6144, 1536), "mlp.fc1.bias": (6144,),
             "mlp.fc2.weight": (1536, 6144), "mlp.fc2.bias": (1536,)}
    found["vision/vit"] = {f"blocks.{i}.{k}": v for i in range(40) for k, v in block.items()} | {
        "pos_embed": (1, 576, 1536), "patch_embed.proj.weight": (1536, 3, 16, 16), "patch_embed.proj.bias": (1536,),
        "norm.weight": (1536,), "norm.bias": (1536,)}
    found["vision"] = {"quantize.embedding.weight": (16384, 2048), "quant_conv.weight": (2048, 1536, 1, 1),
                       "quant_conv.bias": (2048,), "post_quant_conv.weight": (1536, 2048, 1, 1),
                       "post_quant_conv.bias": (1536,)}
    for i in range(2):
        for j in (1, 2):
            found["vision"] |= {f"post_conv.{i}.{name}": shape for name, shape in (
                (f"conv{j}.weight", (1536, 1536, 3, 3)), (f"conv{j}.bias", (1536,)), (f"norm{j}.weight", (1536,)),
                (f"norm{j}.bias", (1536,)))}
    umm = XOmni(**PUBLISHED, tokenizer=None, grid=(36, 36))
    planned = convert.plan(umm, found)
    assert all(set(found[part]) - set(places) <= {"norm.weight", "norm.bias"} for part, places in planned.items())
    assert len(planned["ar"]) == 36 * 12 + 6 and len(planned["flux"]) == len(found["flux"])
    assert planned["ar"]["model.layers.31.mlp.up_proj.weight"][:2] == ("ar/layers/layer/mlp/up_proj/kernel", 31)
    assert planned["ar"]["model.layers.32.mlp.up_proj.weight"][:2] == ("ar/mm_head_layers/layer/mlp/up_proj/kernel", 0)
    assert planned["ar"]["model.mm_norm.weight"][:2] == ("ar/mm_norm/scale", None)

    specs = {part: {key: Spec(BF16, shape, 0) for key, shape in of.items()} for part, of in found.items()}
    shape, dtype, stacked = convert.leaves(planned, specs)["ar/layers/layer/mlp/up_proj/kernel"]
    assert (shape, dtype, stacked) == ((32, 3584, 18944), BF16, True)
    assert len({place for places in planned.values() for place in places.values()}) == sum(map(len, planned.values()))

    del found["ar"]["model.layers.35.mlp.up_proj.weight"]
    found["ar"]["model.layers.36.mlp.up_proj.weight"] = (18944, 3584)
    with pytest.raises(ValueError, match=r"ar: .*missing keys \['model.layers.35.*unknown keys \['model.layers.36"):
        convert.plan(umm, found)
    del found["ar"]["model.layers.36.mlp.up_proj.weight"]
    found["ar"]["model.layers.35.mlp.up_proj.weight"] = (3584, 18944)
    with pytest.raises(ValueError, match="ar: key model.layers.35.mlp.up_proj.weight"):
        convert.plan(umm, found)
    specs["ar"]["model.layers.7.mlp.up_proj.weight"] = Spec(np.dtype(np.float16), (18944, 3584), 0)
    with pytest.raises(ValueError, match="differ in dtype.*layers.7.mlp.up_proj.weight float16"):
        convert.leaves(planned, specs)


# ------------------------------------------------------------------ what is refused

def damage_config(**changes):
    return lambda src: edit(src / "config.json", **changes)


def damage_base(file, **changes):
    return lambda src: edit(src / "../flux" / file, **changes)


def cut(name):
    def damage(src):
        path = src / name
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:len(data) * 2 // 3])
    return damage


def pickled(src):
    path = src / "../siglip_vq/siglip_vit.pt"
    path.unlink()
    torch.save({"pos_embed": Path("/")}, path)


def unnamed_tower(src):
    (src / "../siglip_vq/config.json").unlink()


@pytest.mark.parametrize("damage, message", [
    (lambda src: shutil.rmtree(src), "there is no directory"),
    (lambda src: (src / "config.json").unlink(), "there is no .*config.json"),
    (lambda src: (src / "model.safetensors").unlink(), "has no safetensors"),
    (lambda src: shutil.rmtree(src / "../flux/base"), "pass --flux"),
    (lambda src: shutil.rmtree(src / "../flux/decoder_transformer"), "no decoder transformer"),
    (lambda src: (src / "../flux/base/tokenizer_2/tokenizer.json").unlink(), "there is no .*tokenizer_2/tokenizer"),
    (lambda src: (src / "../siglip_vq/vq_projector.pt").unlink(), "there is no file .*vq_projector.pt"),
    (cut("model.safetensors"), "model.safetensors: it has .* truncated"),
    (cut("../siglip_vq/siglip_vit.pt"), "siglip_vit.pt: it is truncated"),
    (pickled, "siglip_vit.pt: .*tensors alone"),
    (unnamed_tower, "how many attention heads"),
    (damage_config(vision_config__decoder__cfg_scale_2=lambda x: x + 1), "cfg_scale = .* and cfg_scale_2 = "),
    (damage_config(vision_config__decoder={}), "decoder, does not say 'cfg_scale_2'"),
    (damage_config(vision_config__encoder__codebook_size=lambda n: n + 1), "codebook_size = .*, its tensors"),
    (damage_config(vision_config__decoder__upscale_factor=lambda n: 2 * n), "upscale_factor = "),
    (damage_config(vocab_size=lambda n: n + 1), "no token <MM-Token-0> with an id from"),
    (damage_config(hidden_act="gelu"), "hidden_act = 'gelu'; implemented is 'silu'"),
    (damage_base("base/scheduler/scheduler_config.json", shift_terminal=0.1), "shift_terminal = 0.1"),
    (damage_base("base/scheduler/scheduler_config.json", use_dynamic_shifting=False), "use_dynamic_shifting"),
    (damage_base("base/vae/config.json", use_quant_conv=True), "quantisation convolutions"),
    (damage_base("decoder_transformer/config.json", siglip_channels=lambda n: n + 1),
     "tokenizer and decoder differ"),
    (damage_base("base/text_encoder_2/config.json", feed_forward_proj="swish"), "text_encoder_2.*'swish'"),
    (damage_config(vision_config__transform__filtering=False), "filtering = False; implemented is True"),
    (lambda src: edit(src / "generation_config.json", eos_token_id=[10 ** 7]), "generation_config.json says eos_token"),
])
def test_a_damaged_source_is_refused_in_one_line(golden_copy, damage, message):
    damage(golden_copy)
    with pytest.raises((ValueError, OSError), match=message) as error:
        convert.convert(golden_copy, golden_copy.parent / "model")
    assert not list(golden_copy.parent.glob("model*")) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["git lfs pull", "web page", "empty"])
def test_a_download_that_is_not_the_file_is_told(golden_copy, words):
    """In place of each file that a conversion reads: weights, an index, settings, tokenizers."""
    vision = json.loads((golden_copy / "config.json").read_text())["vision_config"]
    head = golden_copy / vision["decoder"]["model_path"]
    base = head.parent / "base"
    files = [golden_copy / "config.json", golden_copy / "tokenizer.json", head / "config.json",
             *(golden_copy / vision["encoder"][path] for path in ("siglip_path", "projector_path")),
             base / "scheduler/scheduler_config.json", base / "tokenizer/merges.txt",
             *golden_copy.glob("model*.safetensors*"), *head.glob("*.safetensors*"), *base.glob("vae/*.safetensors"),
             *base.glob("text_encoder_2/*.safetensors")]
    for file in [file for file in files if file.exists()]:
        whole = file.read_bytes()
        file.write_bytes(DOWNLOADS[words])
        with pytest.raises(ValueError) as error:
            convert.read_source(golden_copy)
        assert words in str(error.value) and file.name in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(whole)
    convert.read_source(golden_copy)


def test_a_download_that_is_no_part_of_a_model_folder_is_told(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    data = sorted((tmp_path / "model/params/state/d").iterdir())
    for file in (tmp_path / "model/params/state/_METADATA", max(data, key=lambda path: path.stat().st_size)):
        whole = file.read_bytes()
        for words in ("git lfs pull", "empty"):
            file.write_bytes(DOWNLOADS[words])
            with pytest.raises(ValueError, match=f"{file.name} cannot be read: it is .*{words}"):
                checkpoint.load_model(tmp_path / "model")
        file.write_bytes(whole)


def test_settings_that_follow_the_files(golden_copy):
    edit(golden_copy / "config.json", use_sliding_window=True, sliding_window=9,
         vision_config__transform__long_size=640, vision_config__encoder__siglip_name="siglip2_giant_patch16_384")
    unnamed_tower(golden_copy)
    umm = convert.read_source(golden_copy).umm
    assert umm.ar.sliding_window == 9 and umm.grid == (576 // umm.vision.patch_size,) * 2 and umm.vision.heads == 16
    with pytest.raises(ValueError, match="image_size=1024"):
        convert.read_source(golden_copy, image_size=1024)


def test_settings_that_the_published_loader_takes_from_elsewhere(golden_copy):
    decoder = golden_copy / "../flux/decoder_transformer/config.json"
    described = json.loads(decoder.read_text())
    silent = {name: value for name, value in described.items() if name not in ("siglip_channels", "axes_dims_rope")}
    decoder.unlink()                                                        # it may be a link
    decoder.write_text(json.dumps(silent | {"attention_head_dim": 128}))
    umm = convert.read_source(golden_copy).umm
    assert umm.flux.siglip_channels == umm.vision.z_channels and umm.flux.axes_dims_rope == (16, 56, 56)
    other = next(i for i in range(len(umm.tokenizer)) if i != umm.tokenizer.eos_token_id)
    edit(golden_copy / "generation_config.json", eos_token_id=[other])
    assert convert.read_source(golden_copy).umm.tokenizer.eos_token_id == other
    edit(golden_copy / "generation_config.json", eos_token_id=[other, umm.tokenizer.eos_token_id])
    assert convert.read_source(golden_copy).umm.tokenizer.eos_token_id == umm.tokenizer.eos_token_id


def test_index_files_are_not_trusted(tmp_path):
    a, b = np.zeros(2, np.float32), np.ones((3, 2), BF16)
    save_shards(tmp_path, {"one.safetensors": {"a": a}, "two.safetensors": {"b": b}})
    assert [list(file.specs) for file in tensor_files.weight_files(tmp_path)] == [["a"], ["b"]]
    for weight_map, message in (
            ({"a": "../one.safetensors", "b": "two.safetensors"}, "outside of its directory"),
            ({"a": "/one.safetensors", "b": "two.safetensors"}, "outside of its directory"),
            ({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}, r"keys \['b', 'c'\]"),
            ({"a": "one.safetensors", "b": "three.safetensors"}, "no file .*three.safetensors")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((ValueError, OSError), match=message):
            tensor_files.weight_files(tmp_path)
    save_shards(tmp_path, {"one.safetensors": {"a": a}, "two.safetensors": {"b": b, "a": a}},
                {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ValueError, match="duplicate keys .*a in one.safetensors and two.safetensors"):
        tensor_files.weight_files(tmp_path)
    save(tmp_path / "model.safetensors", {"a": a})
    with pytest.raises(ValueError, match="several sets of weights"):
        tensor_files.weight_files(tmp_path)


def test_safetensors_headers_are_checked(tmp_path):
    path, array = tmp_path / "x.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    save(path, {"a": array, "b": array.astype(BF16)})
    with safe_open(path, "np") as file:                                   # the library reads what we write
        same_bytes(file.get_tensor("a"), array)
    same_bytes(TensorFile(path).read("b"), array.astype(BF16))
    whole = path.read_bytes()

    def header(text, data=b"\0" * 8):
        return len(text).to_bytes(8, "little") + text + data
    one = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    for data, message in (
            (whole[:5], "truncated"), (whole[:40], "truncated"), (whole[:-1], "truncated"), (whole + b"x", "truncated"),
            (header(b"{" + one + b"," + one + b"}"), r"duplicate keys \['a'\]"),
            (header(b"{" + one.replace(b"[2]", b"[3]") + b"}"), "bytes of key a"),
            (header(b"{" + one + b"," + one.replace(b"a", b"b", 1) + b"}"), "bytes of key b"),
            (header(b"{" + one.replace(b"F32", b"F8_E4M3") + b"}"), "F8_E4M3"),
            (header(b"[]"), "cannot read"), (header(b"{"), "cannot read")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TensorFile(path)


def test_the_command_line_fails_in_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    end = command("convert", f"--src={tmp_path}/empty", f"--dst={tmp_path}/x")
    assert end == f"error: there is no {tmp_path}/empty/config.json"


# ------------------------------------------------------------------ adapters

class Nest(torch.nn.Module):
    """A torch module with the checkpoint's modules under their names, and nothing else."""

    def __init__(self, modules):
        super().__init__()
        for name, module in modules.items():
            parent = self
            for part in name.split(".")[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(name.split(".")[-1], module)


def torch_modules(params, config):
    """Every kernel and table of a backbone as torch modules: {name: Linear or Embedding}."""
    modules = {}
    for path, leaf in flat(params).items():
        if path.endswith(("kernel", "embedding")):
            pattern = torch_keys.torch_name(path, xomni.rules(config)).removesuffix(".weight")
            for row, name in enumerate(torch_keys.layer_names(pattern, len(leaf))):
                weight = torch.tensor(np.asarray(leaf[row] if "{layer" in pattern else leaf))
                if path.endswith("embedding"):
                    modules[name] = torch.nn.Embedding.from_pretrained(weight)
                else:
                    modules[name] = torch.nn.Linear(*weight.shape, bias=False)
                    modules[name].weight.data = weight.T.contiguous()
    return modules


def ours_and_peft_agree(folder, params, adapter, config, inputs=4):
    """Loads `folder` with peft and compares every adapted module with W + a b of the scaled adapter."""
    from peft import PeftModel
    nest = PeftModel.from_pretrained(Nest(torch_modules(params, config)), folder)
    flat_params, flat_adapter, compared = flat(params), flat(adapter), 0
    for path in flat_adapter:
        if not path.endswith("/a"):
            continue
        module = path.removesuffix("/a")
        kind = "embedding" if f"{module}/embedding" in flat_params else "kernel"
        weight = flat_params[f"{module}/{kind}"] + flat_adapter[path] @ flat_adapter[f"{module}/b"]  # [.., in, out]
        pattern = torch_keys.torch_name(f"{module}/kernel", xomni.rules(config)).removesuffix(".weight")
        for row, name in enumerate(torch_keys.layer_names(pattern, len(weight))):
            matrix = np.asarray(weight[row] if "{layer" in pattern else weight)
            theirs = nest.get_submodule(f"base_model.model.{name}")
            assert hasattr(theirs, "lora_A")
            with torch.no_grad():
                if kind == "embedding":
                    given, expected = torch.arange(inputs), matrix[:inputs]
                else:
                    given = torch.randn(inputs, matrix.shape[0])
                    expected = given.numpy() @ matrix
                np.testing.assert_allclose(theirs(given).numpy(), expected, rtol=1e-3, atol=1e-4)
            compared += 1
    adapted = sum(hasattr(module, "lora_A") for module in nest.modules())
    assert compared == adapted                                            # and peft put none anywhere else


@pytest.mark.parametrize("targets", ["self_attn|mlp|embed_tokens|mm_head/", "^{last}/.*(q_proj|down_proj)"])
def test_a_run_gives_an_adapter_that_peft_loads(converted, tmp_path, targets):
    trailing = checkpoint.read_metadata(converted).ar.num_mm_head_layers                          # a stack of their own
    targets = targets.format(last="mm_head_layers" if trailing else "layers")
    config = ConfigDict({"model": {}, "lora": {"rank": 3, "alpha": 6, "targets": targets}})
    run = tmp_path / "run"
    run.mkdir()
    (run / "base").symlink_to(converted)
    (run / "config.json").write_text(config.to_json())
    umm, params = checkpoint.load_model(converted, one_device())
    trainable = init_trainable(umm, params, config, jax.random.key(1))
    trainable = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), trainable)
    states = checkpoint.Checkpoints(run)
    states.save(1, trainable=trainable, opt_state={"count": jnp.zeros(())})
    states.close()
    convert.export_peft(run, tmp_path / "adapter")
    policy = policy_params(params, trainable, config.lora)
    ours_and_peft_agree(tmp_path / "adapter", params["ar"], policy["adapter"], umm.ar)
    again, scale = adapters.read_peft(tmp_path / "adapter", umm)
    assert scale == 2
    jax.tree.map(same_bytes, trainable["adapter"], again)
    with pytest.raises(FileExistsError):
        convert.export_peft(run, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["lora_adapter", "lora_all_adapter"])
def test_golden_adapters_come_in_and_go_out(fixtures, converted, tmp_path, name):
    umm, params = checkpoint.load_model(converted, one_device())
    adapter, scale = adapters.read_peft(fixtures / "grpo" / name, umm)
    told = json.loads((fixtures / "grpo" / name / "adapter_config.json").read_text())
    assert scale == told["lora_alpha"] / told["r"] and ("mm_head" in adapter) == (name == "lora_all_adapter")
    golden = load_file(fixtures / "grpo" / name / "adapter_model.safetensors")
    tensors = lora.to_peft(adapter, xomni.rules(umm.ar))
    assert tensors.keys() == golden.keys()
    for key in golden:
        same_bytes(tensors[key], golden[key])
    convert.write_peft(tmp_path, tensors, told["r"], told["lora_alpha"])
    ours_and_peft_agree(tmp_path, params["ar"], lora.scaled(adapter, scale), umm.ar)


def test_adapters_that_do_not_fit_are_named(fixtures, converted, tmp_path):
    copied(fixtures / "grpo/lora_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    umm = checkpoint.read_metadata(converted)
    tensors = load_file(file)
    for module in ("", ".layers.0."):                    # one layer of a stack is named as a module by itself is
        key = min(name for name in tensors if module in name and name.endswith("lora_B.weight"))
        rows, rank = tensors[key].shape
        for change, message in (({key: None}, rf": 1 missing keys \({key}\)$"),
                                ({key: np.zeros((rows + 1, rank), np.float32)}, rf": 1 misshapen keys \({key}\)$"),
                                ({key: np.zeros((rows, rank + 1), np.float32)}, rf": 1 misshapen keys \({key}\)$"),
                                ({"other": np.zeros(1, np.float32)}, r": 1 unknown keys \(other\)$")):
            save(file, {k: v for k, v in (tensors | change).items() if v is not None})
            with pytest.raises(ValueError, match=message):
                adapters.read_peft(tmp_path / "adapter", umm)
    edit(tmp_path / "adapter/adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        adapters.read_peft(tmp_path / "adapter", umm)
    with pytest.raises(FileNotFoundError, match="no run's folder"):
        convert.export_peft(tmp_path / "adapter", tmp_path / "x")


def test_a_run_without_adapter_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "lora": {"rank": 0}}))
    with pytest.raises(ValueError, match="lora.rank = 0"):
        convert.export_peft(tmp_path, tmp_path / "x")


def test_views_of_one_storage_are_read_where_they_begin(tmp_path):
    """torch saves what shares a storage once; a view says how many elements of its dtype lie before it."""
    torch = pytest.importorskip("torch")
    whole, half = torch.arange(12, dtype=torch.float32), torch.arange(20, dtype=torch.float16)
    tensors = {"all": whole, "rows": whole[4:].view(2, 4), "last": whole[11:], "half": half[6:9]}
    torch.save(tensors, tmp_path / "x.pt")
    file = TensorFile(tmp_path / "x.pt")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor.numpy(), err_msg=name)
