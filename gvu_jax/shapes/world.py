"""The shapes world: scenes on a small grid, their pictures, the prompts that ask for them, and what is true.

A scene is a grid of cells, each empty or holding one coloured shape. One cell is 16 x 16 pixels, which is one image
token of the model, so a tiny model can learn this world on a laptop; and because the world knows which sentence is
true of which scene, progress can be judged exactly. The file reads in the order things happen:

    scenes       sample_scenes           which shapes stand where
    pictures     render                  scene -> pixels, with small natural variation
    prompts      all_prompts, split      GenEval-style prompts; held-out compositions
    truth        judge_scene             does a scene show what a prompt asks for?

What a model in this world reads is said in sentences.py, how it is tested in suite.py.

Prompts are dicts with the keys of GenEval's metadata (Ghosh et al., 2023): `tag`, `include`, `exclude`, `prompt`.
A scene is an int8 array [side * side] in reading order: 0 is an empty cell, 1 + shape * len(COLORS) + color an object,
and -1 a cell that the checker could not read: none of the objects, but not empty either. Every random choice comes from
an explicit `rng`.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
ANY = "shape"  # what a caption calls things that differ in shape: "five shapes". Prompts never do
COLORS = ("red", "green", "blue", "yellow", "purple")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_SIDE = 5  # of a grid
CELL = 16  # pixels along the side of a cell: one ViT patch, one image token

PALETTE = np.array(  # [color, RGB] in [0, 1]
    [[0.87, 0.17, 0.19], [0.16, 0.65, 0.29], [0.14, 0.39, 0.90], [0.98, 0.79, 0.10], [0.60, 0.22, 0.80]], np.float32
)
BACKGROUND = np.array([0.95, 0.95, 0.95], np.float32)


@dataclass(frozen=True)
class World:
    """The size of the world: a `side` x `side` grid holding 1 to `max_objects` objects."""

    side: int = 3
    max_objects: int = 9

    def __post_init__(self):
        if not 2 <= self.side <= MOST_SIDE:
            raise ValueError(f"side must be between 2 and {MOST_SIDE}, got {self.side}")
        most = min(self.cells, len(NUMBERS))
        if not 3 <= self.max_objects <= most:
            raise ValueError(f"max_objects must be between 3 and {most} (cells, or what can be counted), got "
                             f"{self.max_objects}")

    @property
    def cells(self) -> int:
        """Cells in a scene, and image tokens in a picture."""
        return self.side * self.side

    @property
    def pixels(self) -> int:
        """Height and width of a picture in pixels."""
        return self.side * CELL


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


# What scenes are made of: one object; two of different shapes; a number of one shape; or anything. The first three are
# what prompts ask for. The last is what a picture must not become: captions speak of it in other words.
SCENES = {"one": 0.15, "two": 0.3, "number": 0.4, "anything": 0.15}


def sample_scenes(rng: np.random.Generator, count: int, world: World = World(), kinds: dict = SCENES) -> np.ndarray:
    """Draws `count` scenes, int8 [count, cells], of the kinds of SCENES, each with its probability in `kinds`.

    A number is two to `max_objects`, in three of four scenes five at most; in 60 % of them all are of one color.
    Anything is three to `max_objects` objects of any shape and color, in half of these scenes three.
    """
    kind = rng.choice(list(kinds), size=(count, 1), p=list(kinds.values()))
    one, two, number = (kind == name for name in ("one", "two", "number"))
    slot = np.arange(world.max_objects)  # an object's place in the drawing order
    few = np.where(rng.random((count, 1)) < 0.75, min(5, world.max_objects), world.max_objects)
    many = np.where(rng.random((count, 1)) < 0.5, 3, world.max_objects)
    objects = np.where(number, rng.integers(2, few, endpoint=True), rng.integers(3, many, endpoint=True))
    objects = np.where(one, 1, np.where(two, 2, objects))

    shape = rng.integers(len(SHAPES), size=(count, world.max_objects))
    other = (shape[:, :1] + rng.integers(1, len(SHAPES), size=(count, 1))) % len(SHAPES)  # never the first again
    shape[:, 1:2] = np.where(two, other, shape[:, 1:2])
    shape = np.where(number, shape[:, :1], shape)
    color = rng.integers(len(COLORS), size=shape.shape)
    color = np.where(number & (rng.random((count, 1)) < 0.6), color[:, :1], color)
    codes = np.where(slot < objects, 1 + shape * len(COLORS) + color, 0)

    places = rng.permuted(np.tile(np.arange(world.cells), (count, 1)), axis=1)[:, : world.max_objects]
    scenes = np.zeros((count, world.cells), np.int8)
    np.put_along_axis(scenes, places, codes.astype(np.int8), axis=1)
    return scenes


def crowded_scenes(rng: np.random.Generator, count: int, world: World = World(), share: float = 0.75) -> np.ndarray:
    """Draws `count` scenes, int8 [count, cells], in which each cell holds an object with probability `share`.

    For those parts of a model that see cells and not scenes, and for learning what is where.
    """
    codes = rng.integers(1, 1 + len(SHAPES) * len(COLORS), (count, world.cells))
    return np.where(rng.random(codes.shape) < share, codes, 0).astype(np.int8)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

RADII = (5.3, 5.6, 5.9)  # pixels
CANONICAL = 1  # the middle size
BRIGHTNESS = 0.08  # an object's color is scaled by a factor in 1 +- this


def draw_glyph(shape: str, radius: float, down: float = 0.0, right: float = 0.0) -> np.ndarray:
    """Antialiased coverage of one cell by one shape, float32 [CELL, CELL] in [0, 1].

    `radius`, `down` and `right` (the shift from the cell's centre) are in pixels. The proportions are chosen so that
    the five shapes look equally large. An unknown shape raises ValueError.
    """
    fine = 8  # samples per pixel and axis
    centre = CELL / 2
    grid = (np.arange(CELL * fine) + 0.5) / fine
    y = ((grid - centre - down) / radius)[:, None]
    x = ((grid - centre - right) / radius)[None, :]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.9
    elif shape == "triangle":  # apex up; base at y = 0.85
        inside = (y <= 0.85) & (np.abs(x) <= 1.05 * (y + 1.05) / 1.9)
    elif shape == "diamond":  # taller than wide, and thereby unlike both circle and square
        inside = np.abs(x) / 0.8 + np.abs(y) / 1.1 <= 1
    elif shape == "cross":
        inside = (np.minimum(np.abs(x), np.abs(y)) <= 0.34) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    else:
        raise ValueError(f"no shape {shape!r}; the shapes are {', '.join(SHAPES)}")
    return inside.reshape(CELL, fine, CELL, fine).mean((1, 3), dtype=np.float32)


GLYPHS = np.stack([[draw_glyph(shape, radius) for radius in RADII] for shape in SHAPES])  # [shape, radius, CELL, CELL]


def render(scenes: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draws pictures, float32 [B, H, W, 3] in [0, 1], of scenes [B, cells].

    Each object gets its own size and brightness from `rng`, so that many pictures belong to one scene and
    writing pixels is a truly one-to-many task. Without `rng` every object is drawn in its canonical form.
    """
    scenes = np.asarray(scenes)
    batch, side = len(scenes), side_of(scenes.shape[-1])
    image, cell = np.nonzero(scenes > 0)
    shape, color = np.divmod(scenes[image, cell].astype(int) - 1, len(COLORS))
    objects = len(shape)
    if rng is None:
        size = CANONICAL
        light = np.ones((objects, 1), np.float32)
    else:
        size = rng.integers(len(RADII), size=objects)
        light = rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS, (objects, 1)).astype(np.float32)

    ink = np.clip(PALETTE[color] * light, 0, 1) - BACKGROUND  # [objects, RGB], relative to the background
    patches = GLYPHS[shape, size][..., None] * ink[:, None, None]  # [objects, CELL, CELL, RGB]
    patches += BACKGROUND
    # Only occupied cells are written: most of a picture is background.
    pictures = np.empty((batch, side, CELL, side, CELL, 3), np.float32)
    pictures[:] = BACKGROUND
    pictures[image, cell // side, :, cell % side] = patches
    return pictures.reshape(batch, side * CELL, side * CELL, 3)


def side_of(cells: int) -> int:
    """The grid's side for a number of cells; ValueError where that is no square number."""
    side = round(cells**0.5)
    if side * side != cells:
        raise ValueError(f"a scene must have a square number of cells, got {cells}")
    return side


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------

LEAD_INS = ("a photo of", "a picture of", "an image of")
COUNTS = (2, 3, 4)
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # the six of GenEval


class Spec(NamedTuple):
    """What a prompt says, before it is put into words.

    `things` are (shape, color or None) pairs in the order of mention; `link` is the relation of a position prompt
    (first thing to second), the number of a counting prompt, and None otherwise.
    """

    lead_in: str
    tag: str
    things: tuple[tuple[str, str | None], ...]
    link: str | int | None = None


def all_prompts(counts: tuple[int, ...] = COUNTS) -> list[dict]:
    """Every prompt of the world in a fixed order, with the numbers `counts`. At most one object of a position prompt
    carries a color."""
    specs = []
    for lead_in, shape in itertools.product(LEAD_INS, SHAPES):
        specs.append(Spec(lead_in, "single_object", ((shape, None),)))
        specs.extend(Spec(lead_in, "colors", ((shape, color),)) for color in COLORS)
        for color, number in itertools.product((None, *COLORS), counts):
            specs.append(Spec(lead_in, "counting", ((shape, color),), number))
    for lead_in, (first, second) in itertools.product(LEAD_INS, itertools.permutations(SHAPES, 2)):
        specs.append(Spec(lead_in, "two_object", ((first, None), (second, None))))
        for colors in itertools.permutations(COLORS, 2):
            specs.append(Spec(lead_in, "color_attr", tuple(zip((first, second), colors))))
        one_colored = [(None, None), *((color, None) for color in COLORS), *((None, color) for color in COLORS)]
        for relation, colors in itertools.product(RELATIONS, one_colored):
            specs.append(Spec(lead_in, "position", tuple(zip((first, second), colors)), relation))
    return [write(spec) for spec in sorted(specs, key=lambda spec: TAGS.index(spec.tag))]


def split_prompts(held_out: float = 0.2, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Splits `all_prompts` into (train, held out), such that no composition (see `composition`) is in both.

    A share `held_out` of the compositions is held out within every form of every category (plain and colored
    prompts are different forms), at least one each. A share outside (0, 1) raises ValueError.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out}")
    prompts = all_prompts()
    forms: dict[tuple, list[str]] = {}
    for meta in prompts:
        form = forms.setdefault((meta["tag"], sum("color" in item for item in meta["include"])), [])
        form.append(composition(meta))
    rng = np.random.default_rng(seed)
    hidden = set()
    for keys in forms.values():
        keys = list(dict.fromkeys(keys))
        hidden.update(keys[i] for i in rng.permutation(len(keys))[: max(1, round(held_out * len(keys)))])
    return [p for p in prompts if composition(p) not in hidden], [p for p in prompts if composition(p) in hidden]


def composition(meta: dict) -> str:
    """What a prompt asks for, whatever its wording: prompts with equal compositions are true of the same scenes.

    The lead-in, the order of objects joined by "and", and "A left of B" against "B right of A" do not matter. The
    exception is single_object: five shapes are too few to hold some out, so there the lead-in counts too.
    """
    return spec_composition(read(meta))


def compositions(metas: list[dict]) -> frozenset[str]:
    """The set of compositions of many prompts: of the held-out ones, what sentences.py takes as forbidden."""
    return frozenset(composition(meta) for meta in metas)


def spec_composition(spec: Spec) -> str:
    names = [noun(thing) for thing in spec.things]
    if spec.tag == "single_object":
        return f"single_object: {spec.lead_in} {names[0]}"
    if spec.tag == "counting":
        return f"counting: {spec.link} {names[0]}"
    if spec.tag == "position":
        if spec.link in ("right of", "below"):
            return f"position: {names[1]} {INVERSE[spec.link]} {names[0]}"
        return f"position: {names[0]} {spec.link} {names[1]}"
    return f"{spec.tag}: {' and '.join(sorted(names))}"


def noun(thing: tuple[str, str | None]) -> str:
    shape, color = thing
    return f"{color} {shape}" if color else shape


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def write(spec: Spec) -> dict:
    """Puts a spec into GenEval's metadata. No color or shape starts with a vowel, so every article is "a"."""
    lead_in, tag, things, link = spec
    number = link if tag == "counting" else 1
    include = [{"class": shape, "count": number} | ({"color": color} if color else {}) for shape, color in things]
    if tag == "counting":
        phrase = f"{NUMBERS[number - 1]} {plural(noun(things[0]))}"
        exclude = [include[0] | {"count": number + 1}]
        return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"{lead_in} {phrase}"}
    if tag == "position":  # as in GenEval, the object that stands still comes first, and the position refers to it
        phrase = f"a {noun(things[0])} {link} a {noun(things[1])}"
        include = [include[1], include[0] | {"position": [link, 0]}]
    else:
        phrase = " and ".join([f"a {noun(thing)}" for thing in things])
    return {"tag": tag, "include": include, "exclude": [], "prompt": f"{lead_in} {phrase}"}


def read(meta: dict) -> Spec:
    """The inverse of `write`."""
    include, tag = meta["include"], meta["tag"]
    lead_in = " ".join(meta["prompt"].split(" ", 3)[:3])  # every lead-in has three words
    things = tuple((item["class"], item.get("color")) for item in include)
    if tag == "position":
        return Spec(lead_in, tag, things[::-1], include[1]["position"][0])
    return Spec(lead_in, tag, things, include[0]["count"] if tag == "counting" else None)


# ---------------------------------------------------------------------------------------------------------------------
# Truth
# ---------------------------------------------------------------------------------------------------------------------


def judge_scene(scene: np.ndarray, meta: dict) -> bool:
    """Whether a scene [cells] shows what a prompt asks for, by GenEval's rules.

    Every `include` item needs at least `count` objects of its class (and color, where given); an `exclude` item
    forbids `count` or more of them, which makes counting exact; a `position` needs its relation between the item and
    the earlier item that it names. GenEval compares the centres of detected boxes with a tolerance; cells need none,
    so "left of" is a strictly smaller column and "above" a strictly smaller row, and diagonal neighbours are both.
    GenEval looks at the most confident detections only; a scene has no confidences, so any fitting pair will do.
    """
    codes = scene.tolist()
    side = side_of(len(codes))
    groups = []  # the cells that match each include item
    for item in meta["include"]:
        found = find(codes, item)
        if len(found) < item["count"]:
            return False
        if "position" in item:
            relation, target = item["position"]
            if not any(holds(relation, a, b, side) for a in found for b in groups[target]):
                return False
        groups.append(found)
    return all(len(find(codes, item)) < item["count"] for item in meta.get("exclude", ()))


def objects_asked(meta: dict) -> int:
    """How many objects a prompt asks for."""
    return sum(item["count"] for item in meta["include"])


def exact_scene(scene: np.ndarray, meta: dict) -> bool:
    """Whether a scene [cells] shows what a prompt asks for and nothing else: no more objects than it asks for.

    GenEval's rules do not mind what else there is, so that a picture full of red circles is right for "a red circle".
    A cell that holds something which is no clear object (-1, see checker.py) holds something that was not asked for.
    """
    return judge_scene(scene, meta) and int(np.count_nonzero(scene)) == objects_asked(meta)


def find(codes: list[int], item: dict) -> list[int]:
    """The cells that hold an object of the item's class (ANY: of whichever) and, where it names one, color."""
    shapes = SHAPES if item["class"] == ANY else (item["class"],)
    colors = (item["color"],) if "color" in item else COLORS
    wanted = {1 + SHAPES.index(shape) * len(COLORS) + COLORS.index(color) for shape in shapes for color in colors}
    return [cell for cell, code in enumerate(codes) if code in wanted]


def holds(relation: str, a: int, b: int, side: int) -> bool:
    """Whether cell `a` stands in the relation to cell `b`."""
    if relation == "left of":
        return a % side < b % side
    if relation == "right of":
        return a % side > b % side
    if relation == "above":
        return a // side < b // side
    if relation == "below":
        return a // side > b // side
    raise ValueError(f"no relation {relation!r}; the relations are {', '.join(RELATIONS)}")
