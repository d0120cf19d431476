"""The families: one file each, and the one table that lists them.

A family's file has the model behind the interface of umm.py, `MODEL`, and of its own

    published(override, size)                  -> umm at one of its published sizes, for plans; it needs no folder
    tiny(config, tokenizer)                    -> umm of a config of the shapes world
    read_source(src, image_size, **FOLDERS)    -> tensor_files.Source of a published folder; FOLDERS {name: help} are
                                                  what is read from elsewhere, options of gvu_jax.convert
    FROM_HUB {name: (hf:OWNER/NAME, patterns)}    where a model that is converted by its name has that, and which files
                                                  of it are read; only where there is a FOLDERS
"""
from gvu_jax.described import Described
from gvu_jax.families import janus, xomni

FAMILIES = {"xomni": xomni, "janus": janus}                    # what a model folder calls its kind -> the family
# What a published config.json calls its model_type -> the family. Janus' is DeepSeek's or transformers'.
MODEL_TYPES = {"x-omni": xomni, "multi_modality": janus, "janus": janus}
FIRST = next(iter(FAMILIES))                   # what model folders and configs mean that name none


def of(config):
    """The family that a config names, `family`. ValueError where there is none such."""
    if (kind := config.get("family", FIRST)) not in FAMILIES:
        raise ValueError(f"config.family is {kind!r}; it must be one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def of_published(folder):
    """The family of a published folder. Raises ValueError or OSError where its config.json names none of ours."""
    described = Described(folder / "config.json")
    found = described.get("model_type")
    if found not in list(MODEL_TYPES):
        raise ValueError(f"{described.path} says model_type = {found!r}; implemented is {' or '.join(MODEL_TYPES)}")
    return MODEL_TYPES[found]
