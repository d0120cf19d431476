"""Adapters in the folders of peft: written, read, laid over a model, and taken as the start of a run."""
import json

import jax
import jax.numpy as jnp
from flax import traverse_util

from gvu_jax import cli, lora, sharding
from gvu_jax.described import Described
from gvu_jax.tensor_files import Spec, TensorFile, safetensors_header, write_file


def write_peft(folder, tensors, rank, alpha, base=None, loads=None, revision=None):
    """adapter_model.safetensors and adapter_config.json; tensors as from `lora.to_peft`. base: the name or folder by
    which transformers finds what it is an adapter of, revision: its commit on the hub, and loads, the class that reads
    it, so that peft's AutoPeftModel finds it too."""
    # Modules by their full names: a short one ("q_proj") would also mean layers that have no adapter.
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    described = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "revision": revision,
                 "inference_mode": True,
                 "auto_mapping": base and loads and {"base_model_class": loads, "parent_library": "transformers"},
                 "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
                 "use_rslora": False, "use_dora": False, "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1))
    specs = {name: Spec(array.dtype, array.shape, 0) for name, array in tensors.items()}
    write_file(folder / "adapter_model.safetensors", safetensors_header(specs), tensors.__getitem__)


def read_peft(folder, umm):
    """A peft adapter of the backbone of `umm` -> (adapter tree for `lora.scaled`, alpha / r).

    Raises ValueError for keys that do not fit and for kinds of adapter that are not implemented.
    """
    folder = cli.path(folder)
    described = Described(folder / "adapter_config.json")
    described.insist(peft_type="LORA", bias="none", fan_in_fan_out=False, use_dora=False, use_rslora=False,
                     lora_bias=False, modules_to_save=None, alpha_pattern={}, rank_pattern={},
                     trainable_token_indices=None, target_parameters=None, layer_replication=None)
    file = TensorFile(folder / "adapter_model.safetensors")
    shapes = jax.eval_shape(umm.init, jax.random.key(0))["ar"]
    try:
        adapter = lora.from_peft({name: file.read(name) for name in file.specs}, shapes, umm.adapter_rules)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return adapter, described.a(float, "lora_alpha") / max(1, described.a(int, "r"))


def laid_over(params, umm, folder):
    """The params of a model with the adapter of a folder beside them, on the same mesh.

    Raises ValueError for params that have an adapter already, and what `read_peft` raises.
    """
    if "adapter" in params:
        raise ValueError(f"the checkpoint has an adapter of its own: lay {folder} over its base instead, the model "
                         f"folder that the run started from")
    adapter, scale = read_peft(folder, umm)
    scaled = {"adapter": lora.scaled(adapter, scale)}
    return params | sharding.lay(umm.partition, scaled, sharding.mesh_under(params))


def check_start(settings):
    """Raises ValueError or OSError where `settings`, the config's `lora`, name an `adapter` to start from that differs
    from them in rank or scale. The rest of it is read when the model is there."""
    if folder := settings.get("adapter"):
        described = Described(cli.path(folder) / "adapter_config.json")
        rank, alpha = described.a(int, "r"), described.a(float, "lora_alpha")
        if (settings.rank, settings.alpha) != (rank, alpha):
            raise ValueError(f"the adapter in {folder} has rank {rank} and alpha {alpha:g}: to go on with it, give "
                             f"--config.lora.rank={rank} --config.lora.alpha={alpha:g}")


def start_from(state, umm, folder, mesh):
    """The state (policy.State) before the first step, with the adapter of a folder instead of a fresh one; where the
    state has a reference of its own, that too. ValueError where it covers other modules than lora.targets says."""
    flat = lambda tree: traverse_util.flatten_dict(tree, sep="/")
    adapter, _ = read_peft(folder, umm)
    ours, theirs = flat(state.trainable["adapter"]), flat(adapter)
    if differ := sorted({path.rpartition("/")[0] for path in ours.keys() ^ theirs.keys()}):
        raise ValueError(f"lora.targets and the adapter in {folder} cover other modules ({', '.join(differ[:3])}; "
                         f"{len(differ)} in all): set --config.lora.targets to a regular expression that finds its own")
    if wrong := [path for path in ours if ours[path].shape != theirs[path].shape]:
        raise ValueError(f"{folder}: {wrong[0]} has the shape {theirs[wrong[0]].shape}, not {ours[wrong[0]].shape}")
    typed = jax.tree.map(lambda x, like: x.astype(like.dtype), adapter, state.trainable["adapter"])
    trainable = sharding.lay(umm.partition, {"adapter": typed}, mesh)
    return state.replace(trainable=trainable,
                         reference=state.reference and jax.tree.map(jnp.copy, trainable))
