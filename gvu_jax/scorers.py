"""Vision encoders from outside that say how alike two pictures are: Unified-Bench's scorers (UAE, Yan et al. 2025).

    score = cosine of the two pictures' features: CLIP's and LongCLIP's projected, DINO's class token, SigLIP's pooled

They measure (`evaluate --suite=unified --scorers=..`), and where a config asks for it (`uae.scorers`) their weighted
sum is UAE's reward; without that nothing from outside teaches. A scorer is read from its published files: a folder or
a name on the Hub of CLIP, DINOv2, DINOv3 or SigLIP as transformers has them, or LongCLIP's one file.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gvu_jax import cli, described, hub, sharding
from gvu_jax.described import Described
from gvu_jax.models import clip, clip_vision, dino
from gvu_jax.models.siglip import resized
from gvu_jax.tensor_files import TensorFile, weight_files

OWN = "own"              # stands for the model's own vision encoder among the scorers of a reward
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILES = "config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*.bin*", "longclip*.pt"


class Scorer(NamedTuple):
    name: str            # clip, longclip, dinov2, dinov3 or siglip
    tower: Any           # flax module: normalised pixels -> features [B, D]
    fit: Any             # pixels [B, H, W, 3] float32 in [0, 1] on the grid of 8 bits -> what the tower takes
    params: Any          # float32

    def alike(self, params, pictures, originals, darker=1):
        """Cosines [S] float32 of pictures [S, H, W, 3] with one of the originals [B, H, W, 3], S/B side by side; the
        pictures so many times darker. That comes after `fit`, which rounds, and is else affine in the pixels."""
        with jax.default_matmul_precision("highest"):
            shown = self.fit(pictures)
            if darker != 1:
                black = self.fit(jnp.zeros_like(pictures))
                shown = black + (shown - black) / darker
            of_pictures, of_originals = (self.tower.apply({"params": params}, x) for x in (shown, self.fit(originals)))
        times = len(pictures) // len(originals)
        return clip_vision.cosine(of_pictures, jnp.repeat(of_originals, times, axis=0))


class Scorers:
    """Several of them, read and put on the mesh, whole on each device, when they are first asked for.

    weights: {source: its weight in a reward}, OWN among the sources or not. Attributes each, a tuple of Scorer, and
    params, theirs on the mesh; errors as in `read`, and ValueError where two have one name.
    """

    def __init__(self, weights, mesh):
        self.weights, self.mesh = weights, mesh

    @functools.cached_property
    def each(self):
        sources = [source for source in self.weights if source != OWN]
        found = tuple(map(read, sources))
        names = [scorer.name for scorer in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of the scorers {', '.join(sources)} are called {name}: take one of each")
        return found

    @functools.cached_property
    def params(self):
        return sharding.put_whole([scorer.params for scorer in self.each], self.mesh)

    def weighted(self, own, others):
        """The reward [S] of the own encoder's cosines [S] and of the others', in the order of their weights. A plan has
        no others, and leaves their part out."""
        others = iter(others)
        return sum(weight * (own if source == OWN else next(others, jnp.zeros_like(own)))
                   for source, weight in self.weights.items())


def weights_of(told):
    """What uae.scorers says, "own=0.5,hf:facebook/dinov2-large=0.5" -> {source: weight}; "" -> {"own": 1.0}. Raises
    ValueError for another form, and FileNotFoundError for a folder or file that is not there."""
    weights = {}
    for part in filter(None, map(str.strip, told.split(","))):
        source, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not source or source in weights or not 0 < value < math.inf:
            raise ValueError(f"uae.scorers is {told!r}; it must be of the form own=0.5,hf:facebook/dinov2-large=0.5: "
                             f"sources, each once, and positive weights")
        weights[source] = value
    for source in weights.keys() - {OWN}:
        place(source)
    return weights or {OWN: 1.0}


def place(source):
    """The file or folder (Path) of a source, None for a name on the Hub, whose form is checked. Nothing is read."""
    if hub.is_name(source):
        hub.parse(source)
        return None
    path = cli.path(source)
    if not (path.is_file() or (path / "config.json").is_file() or len(list(path.glob("*.pt"))) == 1):
        raise FileNotFoundError(f"{source} is no scorer: there is neither a config.json nor one file *.pt")
    return path


@functools.lru_cache(maxsize=8)
def read(source):
    """A scorer from a folder, LongCLIP's file, or a name on the Hub. ValueError or OSError, in one line, for what is
    none."""
    path = place(source) or hub.fetch_or_find(source, FILES)
    try:
        file = path if path.is_file() else None if (path / "config.json").is_file() else next(path.glob("*.pt"), None)
        return described.named(file, lambda: read_longclip(TensorFile(file))) if file else read_folder(path)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:      # entries of kinds nobody expects
        raise ValueError(f"{path} cannot be read as a scorer: {type(error).__name__}: {error}") from error


def read_folder(path):
    told = Described(path / "config.json")
    if told.get("model_type") not in READERS:
        raise ValueError(f"{told.path} describes a model of the type {told.get('model_type')!r}; scorers are of "
                         f"{', '.join(READERS)}")
    tensors = {name: file.read(name) for file in weight_files(path) for name in file.specs}
    images = path / "preprocessor_config.json"
    images = Described(images) if images.is_file() else None
    name, tower, fit, params = READERS[told["model_type"]](told, tensors, images)
    return Scorer(name, tower, fit, in_float32(params))


def in_float32(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


# ---- one kind after the other: (config.json, tensors, preprocessor_config.json or None) -> Scorer's four -------------

def read_clip(told, tensors, images):
    sizes = told.a(dict, "vision_config") if told["model_type"] == "clip" else told
    values = {**clip.TOWER_DEFAULTS, **sizes.values, "projection_dim": told.get("projection_dim", 512)}
    config = Described(told.path, values).numbers(clip_vision.Config)
    return "clip", clip_vision.ClipVision(config), middle(told, images), fitting(
        told, lambda: clip_vision.from_torch(tensors, config))


def read_siglip(told, tensors, images):
    sizes = told.a(dict, "vision_config") if told["model_type"] == "siglip" else told
    values = {**clip.TOWER_DEFAULTS, "patch_size": 16, **sizes.values}
    config = Described(told.path, values).numbers(clip_vision.SiglipConfig)
    if images:
        images.insist(do_resize=True, do_rescale=True, do_normalize=True, resample=3, rescale_factor=1 / 255)
    mean, std = (tuple(images[name]) if images else (0.5,) * 3 for name in ("image_mean", "image_std"))
    fit = lambda pixels: (resized(pixels, (config.image_size,) * 2) - np.float32(mean)) / np.float32(std)
    return "siglip", clip_vision.SiglipVision(config), fit, fitting(
        told, lambda: clip_vision.from_torch(tensors, config))


def read_dinov2(told, tensors, images):
    told.insist(hidden_act="gelu", use_swiglu_ffn=False, qkv_bias=True)
    side, patch = told.a(int, "image_size"), told.a(int, "patch_size")
    config = told.numbers(dino.Config, table=side // patch,
                          intermediate_size=int(told["hidden_size"] * told.get("mlp_ratio", 4)))
    return "dinov2", dino.Dino(config), middle(told, images), fitting(
        told, lambda: dino.from_torch(tensors, config))


def read_dinov3(told, tensors, images):
    told.insist(hidden_act="gelu", use_gated_mlp=False, proj_bias=True, mlp_bias=True)
    config = told.numbers(
        dino.Config, table=0, registers=told.get("num_register_tokens", 0),
        biases=tuple(told.get(f"{of}_bias", of != "key") for of in ("query", "key", "value")))
    side = told.get("image_size", 224)
    if images:
        images.insist(do_resize=True, do_rescale=True, do_normalize=True, resample=2, rescale_factor=1 / 255)
        side = images.a(dict, "size").a(int, "height")
        images["size"].insist(width=side)
    mean, std = (tuple(images[name]) if images else of for name, of in zip(("image_mean", "image_std"), IMAGENET))

    def fit(pixels):                                      # in float32, and only then less the mean, as published
        square = (len(pixels), side, side, 3)
        with jax.default_matmul_precision("highest"):
            return (jax.image.resize(pixels, square, "linear", antialias=True) - np.float32(mean)) / np.float32(std)
    return "dinov3", dino.Dino(config), fit, fitting(told, lambda: dino.from_torch(tensors, config))


READERS = {"clip": read_clip, "clip_vision_model": read_clip, "siglip": read_siglip, "siglip_vision_model": read_siglip,
           "dinov2": read_dinov2, "dinov3_vit": read_dinov3}


def read_longclip(file):
    """LongCLIP's file, in which CLIP's image tower has the names that OpenAI gave it."""
    if "visual.ln_pre.weight" not in file.specs:
        raise ValueError("it holds no image tower of CLIP in OpenAI's form")
    tensors, sizes = clip_vision.from_openai({name: file.read(name) for name in file.specs if "visual." in name})
    config = clip_vision.Config(**sizes)
    transform = clip.Transform(config.image_size, config.image_size, clip.MEAN, clip.STD)
    return Scorer("longclip", clip_vision.ClipVision(config), normaliser(transform, lambda rest: round(rest / 2)),
                  in_float32(clip_vision.from_torch(tensors, config)))


def fitting(told, read):
    """read(), whose complaints about keys are said of the folder."""
    return described.named(told.path.parent, read)


def middle(told, images):
    """How a picture is fitted to a tower that is shown its middle: as its preprocessor_config.json says."""
    if images is None:
        raise FileNotFoundError(f"there is no {told.path.parent / 'preprocessor_config.json'}, which says how pictures "
                                f"are shown to the tower")
    return normaliser(clip.image_transform(images))


def normaliser(transform, *half):
    """clip.Transform -> pixels of any size to what the tower takes, bit for bit as PIL shrinks and cuts."""
    mean, std = np.float32(transform.image_mean), np.float32(transform.image_std)
    return lambda pixels: (clip.fitted(pixels, transform, *half) - mean) / std
