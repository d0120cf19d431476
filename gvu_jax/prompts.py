"""Writes prompts to train on, and others to evaluate with, about the 80 objects that GenEval's detector knows.

    python -m gvu_jax.prompts --out=train.jsonl --count=50000 --held_out=held_out.jsonl [--avoid=FILE]

    single_object             a photo of a bench
    two_object                a photo of a bench and an umbrella
    counting                  a photo of three knives                                   two to seven
    colors                    a photo of an orange kite
    position                  a photo of a dog right of a teddy bear
    color_attr                a photo of a purple wine glass, a black apple and a red cup           two objects or three
    color_count_attr          a photo of two red buses and three white sheep             one kind or two
    color_spatial_attr        a photo of a red bus left of a white truck
    spatial_count_attr        a photo of two buses above three birds
    size_spatial_attr         a photo of a large bird below a small bus
    multi_object_count_attr   a photo of two buses, three birds and four cups            two kinds or three

The first six are the categories of GenEval (Ghosh et al., 2023), the others those that GenEval++ (Ye et al., 2025)
adds; of colors and numbers it also asks for more at a time. Each line is an object with the keys of GenEval's metadata:
"tag", "include" and "exclude" (objects by "class" and "count", perhaps with "color" and "position": a relation and
which object of "include" it is to), and "prompt". "size" is ours: GenEval's evaluator does not read it, GenEval++'s
judges from the prompt.

Two prompts that ask for the same, whatever their words, have the same composition. The seed assigns each composition
either to training or, one in five, to the held-out file, however many of either are written; those of --avoid (other
people's tests; may be given several times) are in neither. Every category gets the same share of the prompts, as far as
it has that many; training says the same composition in up to four ways ("a picture of ..").
"""
import collections
import hashlib
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from absl import flags

from gvu_jax import cli
from gvu_jax.data import read_prompts
from gvu_jax.metrics import replace_file
from gvu_jax.nouns import Thing, phrase

# COCO's objects by the names that GenEval's evaluator has for them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SIZES = ("large", "small")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LEAD_INS = ("a photo of", "a picture of", "an image of", "a photograph of")       # the first is GenEval's
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "color_count_attr",
        "color_spatial_attr", "spatial_count_attr", "size_spatial_attr", "multi_object_count_attr")
HELD_OUT = 5                                     # one composition in so many is held out

_OUT = cli.path_flag("out", "Where to write the prompts to train on, e.g. train.jsonl.", required=True)
_COUNT = flags.DEFINE_integer("count", 50_000, "How many of them.", lower_bound=len(TAGS))
_HELD_OUT = cli.path_flag("held_out", "Where to write those to evaluate with, e.g. held_out.jsonl.", required=True)
_HELD_OUT_COUNT = flags.DEFINE_integer("held_out_count", 550, "How many of them.", lower_bound=len(TAGS))
_AVOID = flags.DEFINE_multi(cli.PathParser(), flags.ArgumentSerializer(), "avoid", [], "Prompts that neither may hold, "
                            "of any kind that generate --prompts takes.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed writes the same files.", 0, 2**31 - 1)


class Spec(NamedTuple):
    """What a prompt says, before it is put into words: things in the order of mention, and the relation of the first to
    the second, if any."""
    tag: str
    things: tuple[Thing, ...]
    relation: str | None = None


def main(_):
    out, held_out = Path(_OUT.value), Path(_HELD_OUT.value)
    if out.resolve() == held_out.resolve():
        raise ValueError(f"--out and --held_out are both {out}: give two files")
    for path in (out, held_out):
        if path.suffix != ".jsonl":
            raise ValueError(f"{path} must end in .jsonl: an object a line is written")
    avoided = [meta for source in _AVOID.value for meta in read_prompts(source)]
    training, testing = make_prompts(_COUNT.value, _HELD_OUT_COUNT.value, _SEED.value, avoided)
    for path, metas in (out, training), (held_out, testing):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(json.dumps(meta) + "\n" for meta in metas))
        counts = collections.Counter(meta["tag"] for meta in metas)
        print(f"{len(metas)} prompts in {path}: {', '.join(f'{counts[tag]} {tag}' for tag in TAGS)}")


def make_prompts(count, held_out, seed, avoided=()):
    """(training prompts, held-out prompts), lists of `count` and `held_out` dicts in a random order.

    avoided: dicts with a "prompt" and perhaps an "include", none of which is said again. ValueError where there are not
    so many different prompts.
    """
    compositions, texts = {composition(meta) for meta in avoided} - {None}, {plain(meta["prompt"]) for meta in avoided}
    result = []
    for held, number, lead_ins in (False, count, LEAD_INS), (True, held_out, LEAD_INS[:1]):
        rng = random.Random(f"{seed} {held}")

        def allowed(meta):
            asked = composition(meta)
            return is_held_out(asked, seed) == held and asked not in compositions and plain(meta["prompt"]) not in texts

        result.append(fill(number, {tag: different(tag, rng, lead_ins, allowed) for tag in TAGS}))
        rng.shuffle(result[-1])
    return tuple(result)


def fill(count, sources):
    """`count` prompts of several sources, {name: iterator of prompts}, in turn; a source that has no more drops out."""
    metas = []
    while len(metas) < count:
        for name in list(sources):
            if (meta := next(sources[name], None)) is None:
                del sources[name]
            elif len(metas) < count:
                metas.append(meta)
        if not sources:
            raise ValueError(f"there are only {len(metas)} such prompts, not {count}: ask for fewer")
    return metas


def different(tag, rng, lead_ins, allowed):
    """Prompts of a category, all different, in the order of `rng`, until there are hardly any others: a composition in
    as many ways as there are `lead_ins`, in turn with all others."""
    found, in_vain = {}, 0
    while in_vain < 20 * len(found) + 1000:          # with one of n missing, it is overlooked with a chance of e^-20
        spec = draw(tag, rng)
        asked, lead_in = spec_composition(spec), rng.choice(lead_ins)
        said = found.setdefault(asked, set())
        meta = write(spec, lead_in)
        if lead_in in said or not allowed(meta):
            in_vain += 1
            continue
        in_vain = 0
        said.add(lead_in)
        yield meta


def is_held_out(asked, seed):
    """Whether a composition is one of those that are never trained on: a fixed share, by chance, always the same."""
    return hashlib.sha256(f"{seed} {asked}".encode()).digest()[0] * HELD_OUT < 256


# ------------------------------------------------------------------ what a prompt asks for

def draw(tag, rng):
    """A random Spec of a category. As in GenEval nobody is colored, and no orange is called orange."""
    kinds = rng.choice((2, 3) if tag in ("color_attr", "multi_object_count_attr") else
                       (1, 2) if tag == "color_count_attr" else
                       (1,) if tag in ("single_object", "counting", "colors") else (2,))
    colored, counted = tag.startswith("color"), "count" in tag
    names = rng.sample(CLASSES[1:] if colored else CLASSES, kinds)
    colors = rng.sample(COLORS, kinds) if colored else [None] * kinds
    if any(name == color for name, color in zip(names, colors)):
        return draw(tag, rng)
    most = 7 if tag == "counting" else 4
    counts = [rng.randint(2, most) if counted else 1 for _ in names]
    sizes = rng.sample(SIZES, kinds) if tag == "size_spatial_attr" else [None] * kinds
    relation = rng.choice(list(INVERSE)) if tag == "position" or "spatial" in tag else None
    return Spec(tag, tuple(map(Thing, names, counts, colors, sizes)), relation)


def spec_composition(spec):
    """What is asked for, as a text, whatever the order: A left of B is B right of A."""
    told = [" ".join(str(part) for part in (thing.count, thing.size, thing.color, thing.name) if part)
            for thing in spec.things]
    if spec.relation in ("right of", "below"):
        told = told[::-1]
        return f"{told[0]} {INVERSE[spec.relation]} {told[1]}"
    return f"{told[0]} {spec.relation} {told[1]}" if spec.relation else " and ".join(sorted(told))


def composition(meta):
    """The composition of a prompt of GenEval's metadata (dict): equal ones are true of the same pictures. None where
    the metadata are others."""
    try:
        things = [Thing(*(one.get(key, default) for key, default in
                          (("class", None), ("count", 1), ("color", None), ("size", None)))) for one in meta["include"]]
        places = [(i, *one["position"]) for i, one in enumerate(meta["include"]) if one.get("position")]
        if not places:
            return spec_composition(Spec(meta.get("tag"), things))
        (i, relation, to), = places
        return spec_composition(Spec(meta.get("tag"), (things[i], things[to]), relation))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


# ------------------------------------------------------------------ in words

def write(spec, lead_in):
    """A Spec as GenEval's metadata. In a position the thing that stays comes first, and the other refers to it."""
    phrases = [phrase(thing) for thing in spec.things]
    words = f"{phrases[0]} {spec.relation} {phrases[1]}" if spec.relation else join(phrases)
    include = [{"class": thing.name, "count": thing.count} | ({"color": thing.color} if thing.color else {})
               | ({"size": thing.size} if thing.size else {}) for thing in spec.things]
    if spec.relation:
        include = [include[1], include[0] | {"position": [spec.relation, 0]}]
    exclude = [{"class": thing.name, "count": thing.count + 1} for thing in spec.things if thing.count > 1]
    return {"tag": spec.tag, "include": include, "exclude": exclude, "prompt": f"{lead_in} {words}"}


def join(phrases):
    """"a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def plain(prompt):
    """A prompt's words without its lead-in, to tell whether two say the same: lower case, no punctuation."""
    words = " ".join(re.findall(r"\w+", prompt.lower()))
    return next((words.removeprefix(f"{lead_in} ") for lead_in in LEAD_INS if words.startswith(f"{lead_in} ")), words)


if __name__ == "__main__":
    cli.run(main)
