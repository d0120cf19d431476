"""The families: one file each, and the one table that lists them.

A family's file has the model behind the interface of umm.py, `MODEL`, and of its own

    published(override, size)                  -> umm at one of its published sizes, for plans; it needs no folder
    read_source(src, image_size, **FOLDERS)    -> tensor_files.Source of a published folder; FOLDERS {name: help} are
                                                  what is read from elsewhere, options of gvu_jax.convert
    FROM_HUB {name: (hf:OWNER/NAME, patterns)}    where a model that is converted by its name has that, and which files
                                                  of it are read; only where there is a FOLDERS

NAME_tiny.py beside it is for the shapes world (shapes/pretrain.py); not every family has one:

    tiny(config)                               -> umm of a config of the shapes world
    learn_pictures(umm, params, scenes, settings, rng, key) -> params: everything but the backbone has learned
    begin(params, rng)                         -> "ar", as the backbone's lessons begin
    learn_drawing(umm, params, texts, settings, key) -> params: a last lesson of what draws alone, from {"prompts" |
                                                  "descriptions": Pairs and targets}, where the family has such a part
    PARTS                                      what of config.model and config.pretrain only some families have
"""
import importlib
import importlib.util

from gvu_jax.described import Described
from gvu_jax.families import janus, qwen_sd35, showo, xomni

# What a model folder calls its kind -> the family.
FAMILIES = {"xomni": xomni, "janus": janus, "showo": showo, "qwen_sd35": qwen_sd35}
# What a published config.json calls its model_type -> the family. Janus' is DeepSeek's or transformers', UAE's that of
# its captioner; Show-o's, which has the form of diffusers, calls it _class_name.
MODEL_TYPES = {"x-omni": xomni, "multi_modality": janus, "janus": janus, "Showo": showo, "qwen2_5_vl": qwen_sd35}
# The published models by the names that people call them -> the family, and what its `published` is given.
SIZES = {"janus-pro-1b": ("janus", {}, "1b"), "janus-pro-7b": ("janus", {}, "7b"),
         "xomni": ("xomni", {"grid": (36, 36)}, None), "showo": ("showo", {}, "256"),
         "sd35": ("qwen_sd35", {}, "large")}
FIRST = next(iter(FAMILIES))                   # what model folders and configs mean that name none


def of(config):
    """The family that a config names, `family`. ValueError where there is none such."""
    if (kind := config.get("family", FIRST)) not in FAMILIES:
        raise ValueError(f"config.family is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def tiny_of(config):
    """What makes the family of a config tiny. ValueError where it has no such version."""
    of(config)
    name = f"{__name__}.{config.get('family', FIRST)}_tiny"
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"config.family is {config.family!r}, which has no tiny version for the shapes world yet")
    return importlib.import_module(name)


def of_published(folder):
    """The family of a published folder. Raises ValueError or OSError where its config.json names none of ours."""
    described = Described(folder / "config.json")
    found = described.get("model_type", described.get("_class_name"))
    if found not in list(MODEL_TYPES):
        raise ValueError(f"{described.path} says model_type = {found!r}; implemented is {' or '.join(MODEL_TYPES)}")
    return MODEL_TYPES[found]
