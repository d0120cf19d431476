"""The shapes world: scenes on a small grid, their pictures, and everything that can be said about them.

A scene is a grid of cells, each empty or holding one coloured shape. One cell is 16 x 16 pixels, which is one image
token of the model, so a tiny model can learn this world on a laptop; and because the world knows which sentence is
true of which scene, progress can be judged exactly. The file reads in the order things happen:

    scenes       sample_scenes           which shapes stand where
    pictures     render                  scene -> pixels, with small natural variation
    prompts      all_prompts, split      GenEval-style prompts; held-out compositions
    truth        judge_scene             does a scene show what a prompt asks for?
    sentences    true_prompt, false_prompt, describe, question      what pretraining reads
    tests        four_way, hard_pairs    does the model understand what it sees?
    words        vocabulary              every word any of the above can produce

Prompts are dicts with the keys of GenEval's metadata (Ghosh et al., 2023): `tag`, `include`, `exclude`, `prompt`.
A scene is an int8 array [side * side] in reading order: 0 is an empty cell (so is -1, a cell that the checker could
not read), and 1 + shape * len(COLORS) + color is an object. Every random choice comes from an explicit `rng`.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple")
NUMBERS = ("one", "two", "three", "four", "five")
CELL = 16  # pixels along the side of a cell: one ViT patch, one image token

PALETTE = np.array(  # [color, RGB] in [0, 1]
    [[0.87, 0.17, 0.19], [0.16, 0.65, 0.29], [0.14, 0.39, 0.90], [0.98, 0.79, 0.10], [0.60, 0.22, 0.80]], np.float32
)
BACKGROUND = np.array([0.95, 0.95, 0.95], np.float32)


@dataclass(frozen=True)
class World:
    """The size of the world: a `side` x `side` grid holding 1 to `max_objects` objects."""

    side: int = 3
    max_objects: int = 5

    def __post_init__(self):
        if not 2 <= self.side <= len(NUMBERS):
            raise ValueError(f"side must be between 2 and {len(NUMBERS)}, got {self.side}")
        if not 3 <= self.max_objects <= self.cells:
            raise ValueError(f"max_objects must be between 3 and {self.cells} (the cells), got {self.max_objects}")

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


def sample_scenes(rng: np.random.Generator, count: int, world: World = World()) -> np.ndarray:
    """Draws `count` scenes, int8 [count, cells].

    Two fifths of them hold one to three objects of distinct shapes, as short prompts ask for, but seldom one. A fifth
    holds up to `max_objects` objects of any kind: more crowded than prompts need, because relations are learned from
    crowds. Two fifths are made for counting: two to `max_objects` objects of one shape, in half of these scenes all of
    one color, and objects of other shapes in some of the remaining places.
    """
    kind = rng.integers(5, size=(count, 1))  # 0, 1: distinct shapes; 2: anything; 3, 4: counting
    slot = np.arange(world.max_objects)  # an object's place in the drawing order
    distinct = kind < 2
    counting = kind > 2

    shape = rng.integers(len(SHAPES), size=(count, world.max_objects))
    shape_order = rng.permuted(np.tile(np.arange(len(SHAPES)), (count, 1)), axis=1)
    shape[:, :3] = np.where(distinct, shape_order[:, :3], shape[:, :3])
    same = rng.integers(2, world.max_objects, size=(count, 1), endpoint=True)
    counted = counting & (slot < same)
    # The others in a counting scene are of any shape but the counted one: adding 1..4 modulo 5 never comes back to it.
    other = (shape[:, :1] + rng.integers(1, len(SHAPES), size=shape.shape)) % len(SHAPES)
    shape = np.where(counting, np.where(counted, shape[:, :1], other), shape)

    color = rng.integers(len(COLORS), size=shape.shape)
    one_color = counted & (rng.random((count, 1)) < 0.5)
    color = np.where(one_color, color[:, :1], color)

    fewest = np.where(rng.random((count, 1)) < 0.8, 2, 1)  # a lone object has nothing to teach but its name
    objects = rng.integers(fewest, np.where(distinct, 3, world.max_objects), size=(count, 1), endpoint=True)
    objects = np.where(counting, rng.integers(same, world.max_objects, endpoint=True), objects)
    codes = np.where(slot < objects, 1 + shape * len(COLORS) + color, 0)

    places = rng.permuted(np.tile(np.arange(world.cells), (count, 1)), axis=1)[:, : world.max_objects]
    scenes = np.zeros((count, world.cells), np.int8)
    np.put_along_axis(scenes, places, codes.astype(np.int8), axis=1)
    return scenes


def crowded_scenes(rng: np.random.Generator, count: int, world: World = World()) -> np.ndarray:
    """Draws `count` scenes, int8 [count, cells], in which each cell holds an object with probability 3/4.

    For those parts of a model that see cells and not scenes: nothing is to be learned from empty ones.
    """
    codes = rng.integers(1, 1 + len(SHAPES) * len(COLORS), (count, world.cells))
    return np.where(rng.random(codes.shape) < 0.75, codes, 0).astype(np.int8)


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

# The six GenEval tags, and how often pretraining meets each: relations are learned last and need the most practice.
TAG_WEIGHTS = {"single_object": 1, "two_object": 1, "counting": 6, "colors": 1, "position": 8, "color_attr": 2}
TAGS = tuple(TAG_WEIGHTS)


class _Spec(NamedTuple):
    """What a prompt says, before it is put into words.

    `things` are (shape, color or None) pairs in the order of mention; `link` is the relation of a position prompt
    (first thing to second), the number of a counting prompt, and None otherwise.
    """

    lead_in: str
    tag: str
    things: tuple[tuple[str, str | None], ...]
    link: str | int | None = None


def all_prompts() -> list[dict]:
    """Every prompt of the world in a fixed order. At most one object of a position prompt carries a color."""
    specs = []
    for lead_in, shape in itertools.product(LEAD_INS, SHAPES):
        specs.append(_Spec(lead_in, "single_object", ((shape, None),)))
        specs.extend(_Spec(lead_in, "colors", ((shape, color),)) for color in COLORS)
        for color, number in itertools.product((None, *COLORS), COUNTS):
            specs.append(_Spec(lead_in, "counting", ((shape, color),), number))
    for lead_in, (first, second) in itertools.product(LEAD_INS, itertools.permutations(SHAPES, 2)):
        specs.append(_Spec(lead_in, "two_object", ((first, None), (second, None))))
        for colors in itertools.permutations(COLORS, 2):
            specs.append(_Spec(lead_in, "color_attr", tuple(zip((first, second), colors))))
        one_colored = [(None, None), *((color, None) for color in COLORS), *((None, color) for color in COLORS)]
        for relation, colors in itertools.product(RELATIONS, one_colored):
            specs.append(_Spec(lead_in, "position", tuple(zip((first, second), colors)), relation))
    return [_write(spec) for spec in sorted(specs, key=lambda spec: TAGS.index(spec.tag))]


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
    return _composition(_read(meta))


def compositions(metas: list[dict]) -> frozenset[str]:
    """The set of compositions of many prompts: of the held-out ones, it is what `true_prompt` takes as forbidden."""
    return frozenset(composition(meta) for meta in metas)


def _composition(spec: _Spec) -> str:
    names = [_noun(thing) for thing in spec.things]
    if spec.tag == "single_object":
        return f"single_object: {spec.lead_in} {names[0]}"
    if spec.tag == "counting":
        return f"counting: {spec.link} {names[0]}"
    if spec.tag == "position":
        if spec.link in ("right of", "below"):
            return f"position: {names[1]} {INVERSE[spec.link]} {names[0]}"
        return f"position: {names[0]} {spec.link} {names[1]}"
    return f"{spec.tag}: {' and '.join(sorted(names))}"


def _noun(thing: tuple[str, str | None]) -> str:
    shape, color = thing
    return f"{color} {shape}" if color else shape


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _write(spec: _Spec) -> dict:
    """Puts a spec into GenEval's metadata. No color or shape starts with a vowel, so every article is "a"."""
    lead_in, tag, things, link = spec
    number = link if tag == "counting" else 1
    include = [{"class": shape, "count": number} | ({"color": color} if color else {}) for shape, color in things]
    if tag == "counting":
        phrase = f"{NUMBERS[number - 1]} {_plural(_noun(things[0]))}"
        exclude = [include[0] | {"count": number + 1}]
        return {"tag": tag, "include": include, "exclude": exclude, "prompt": f"{lead_in} {phrase}"}
    if tag == "position":  # as in GenEval, the object that stands still comes first, and the position refers to it
        phrase = f"a {_noun(things[0])} {link} a {_noun(things[1])}"
        include = [include[1], include[0] | {"position": [link, 0]}]
    else:
        phrase = " and ".join([f"a {_noun(thing)}" for thing in things])
    return {"tag": tag, "include": include, "exclude": [], "prompt": f"{lead_in} {phrase}"}


def _read(meta: dict) -> _Spec:
    """The inverse of `_write`."""
    include, tag = meta["include"], meta["tag"]
    lead_in = " ".join(meta["prompt"].split(" ", 3)[:3])  # every lead-in has three words
    things = tuple((item["class"], item.get("color")) for item in include)
    if tag == "position":
        return _Spec(lead_in, tag, things[::-1], include[1]["position"][0])
    return _Spec(lead_in, tag, things, include[0]["count"] if tag == "counting" else None)


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
        found = _find(codes, item)
        if len(found) < item["count"]:
            return False
        if "position" in item:
            relation, target = item["position"]
            if not any(_holds(relation, a, b, side) for a in found for b in groups[target]):
                return False
        groups.append(found)
    return all(len(_find(codes, item)) < item["count"] for item in meta.get("exclude", ()))


def objects_asked(meta: dict) -> int:
    """How many objects a prompt asks for."""
    return sum(item["count"] for item in meta["include"])


def exact_scene(scene: np.ndarray, meta: dict) -> bool:
    """Whether a scene [cells] shows what a prompt asks for and nothing else: no more objects than it asks for.

    GenEval's rules do not mind what else there is, so that a picture full of red circles is right for "a red circle".
    A cell that holds something which is no clear object (-1, see checker.py) holds something that was not asked for.
    """
    return judge_scene(scene, meta) and int(np.count_nonzero(scene)) == objects_asked(meta)


def _find(codes: list[int], item: dict) -> list[int]:
    """The cells that hold an object of the item's class and, where it names one, color."""
    first = 1 + SHAPES.index(item["class"]) * len(COLORS)
    if "color" in item:
        wanted = first + COLORS.index(item["color"])
        return [cell for cell, code in enumerate(codes) if code == wanted]
    return [cell for cell, code in enumerate(codes) if first <= code < first + len(COLORS)]


def _holds(relation: str, a: int, b: int, side: int) -> bool:
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


# ---------------------------------------------------------------------------------------------------------------------
# Sentences about a scene: true prompts, false prompts, descriptions, questions
# ---------------------------------------------------------------------------------------------------------------------

INSTRUCTIONS = ("Describe the image.", "Describe the image in detail.")
ANSWERS = ("yes", "no")
TRIES = 8  # draws before a category is given up for a scene


def true_prompt(scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset()) -> dict | None:
    """Draws a prompt that is true of a scene [cells], its category by TAG_WEIGHTS among those the scene allows.

    It is built from the scene's own objects, hence fast. Compositions in `forbidden` are never produced; None means
    that no other was found (an empty scene, for one).
    """
    objects, side = _objects(scene), side_of(len(scene))
    spec = _draw(lambda tag: _true_spec(tag, objects, side, rng), lambda spec: _composition(spec) not in forbidden, rng)
    return None if spec is None else _write(spec)


def false_prompt(scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset()) -> dict | None:
    """Draws a prompt that is FALSE of a scene [cells], its category by TAG_WEIGHTS.

    Half of the draws are near misses of a true prompt (the inverse relation, one object more or less, exchanged
    colors, another color or shape); the others may be about anything. `forbidden` and None are as in `true_prompt`.
    """
    objects, side = _objects(scene), side_of(len(scene))

    def near(tag):
        spec = _true_spec(tag, objects, side, rng)
        return None if spec is None else _near_miss(spec, rng)

    def accepts(spec):
        return _composition(spec) not in forbidden and not judge_scene(scene, _write(spec))

    spec = _draw(near, accepts, rng) if rng.random() < 0.5 else None
    if spec is None:
        spec = _draw(lambda tag: _any_spec(tag, rng), accepts, rng)
    return None if spec is None else _write(spec)


def ask(scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset()) -> tuple | None:
    """Draws a question about one kind of object in a scene [cells], and its answer: where the only one is
    ("Where is the red circle?", "top left") or how many there are ("How many circles are there?", "three").

    Captions alone teach places and numbers slowly, because they name them only in relation to other things. Nothing
    in `forbidden` is asked about; None means that the scene leaves nothing to ask.
    """
    cells: dict[tuple[str, str | None], list[int]] = {}
    for cell, shape, color in _objects(scene):
        for thing in ((shape, None), (shape, color)):
            cells.setdefault(thing, []).append(cell)
    hidden = lambda thing: (f"colors: {_noun(thing)}" in forbidden or
                            f"counting: {len(cells[thing])} {_noun(thing)}" in forbidden)
    things = [thing for thing in cells if not hidden(thing)]
    if not things:
        return None
    thing = _pick(rng, things)
    if len(cells[thing]) == 1 and rng.random() < 0.75:
        return f"Where is the {_noun(thing)}?", _places(side_of(len(scene)))[cells[thing][0]]
    return f"How many {_plural(_noun(thing))} are there?", NUMBERS[len(cells[thing]) - 1]


def describe(scene: np.ndarray) -> str:
    """The one full description of a scene [cells]: its objects in reading order, e.g.
    "top left red circle, middle center blue square"; "nothing" for an empty scene. `read_description` is the inverse.
    """
    places = _places(side_of(len(scene)))
    return ", ".join([f"{places[cell]} {color} {shape}" for cell, shape, color in _objects(scene)]) or "nothing"


def read_description(text: str, side: int = 3) -> np.ndarray:
    """The scene, int8 [side * side], that `describe` has put into words; ValueError where the text is not of its form.

    The order of the objects is free, so that a model's description can be read too.
    """
    places = _places(side)
    scene = np.zeros(side * side, np.int8)
    if text == "nothing":
        return scene
    for part in text.split(", "):
        place, color, shape = (["", "", *part.rsplit(" ", 2)])[-3:]
        if place not in places or color not in COLORS or shape not in SHAPES:
            raise ValueError(f"cannot read {part!r} in the description {text!r}")
        if scene[places.index(place)]:
            raise ValueError(f"{place!r} is described twice in {text!r}")
        scene[places.index(place)] = 1 + SHAPES.index(shape) * len(COLORS) + COLORS.index(color)
    return scene


def _places(side: int) -> list[str]:
    """The name of each cell in reading order."""
    if side == 3:
        return [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
    return [f"row {row} column {column}" for row in NUMBERS[:side] for column in NUMBERS[:side]]


def _objects(scene: np.ndarray) -> list[tuple[int, str, str]]:
    """(cell, shape, color) of each object in reading order."""
    return [
        (cell, SHAPES[(code - 1) // len(COLORS)], COLORS[(code - 1) % len(COLORS)])
        for cell, code in enumerate(scene.tolist())
        if code > 0
    ]


def _pick(rng: np.random.Generator, items):
    """One item at random. (Several times faster than rng.choice or rng.integers for a single draw.)"""
    return items[int(rng.random() * len(items))]


def _draw(make, accepts, rng: np.random.Generator) -> _Spec | None:
    """Draws a category by weight and a spec `make(tag)` in it that is accepted. A category that yields none is struck
    off and another drawn; None when all are struck off."""
    weights = dict(TAG_WEIGHTS)
    while weights:
        point = rng.random() * sum(weights.values())
        for tag, weight in weights.items():
            point -= weight
            if point < 0:
                break
        del weights[tag]
        for _ in range(TRIES):
            spec = make(tag)
            if spec is None:  # the scene has nothing for this category
                break
            if accepts(spec):
                return spec
    return None


def _true_spec(tag: str, objects: list[tuple[int, str, str]], side: int, rng: np.random.Generator) -> _Spec | None:
    """A random spec of one category that is true of a scene's objects, or None where there is none."""
    if not objects:
        return None
    lead_in = _pick(rng, LEAD_INS)
    if tag in ("single_object", "colors"):
        _, shape, color = _pick(rng, objects)
        return _Spec(lead_in, tag, ((shape, color if tag == "colors" else None),))

    if tag == "counting":
        numbers: dict[tuple[str, str | None], int] = {}
        for _, shape, color in objects:
            for thing in ((shape, None), (shape, color)):
                numbers[thing] = numbers.get(thing, 0) + 1
        things = [thing for thing, number in numbers.items() if number in COUNTS]
        if not things:
            return None
        # Small numbers are common in any scene: without this weight "two" would be the answer to everything.
        thing = _pick(rng, [thing for thing in things for _ in range(numbers[thing] - 1)])
        return _Spec(lead_in, tag, (thing,), numbers[thing])

    # The others speak of two objects of different shapes; those of color_attr differ in color too.
    pairs = [(a, b) for a in objects for b in objects if a[1] != b[1] and (tag != "color_attr" or a[2] != b[2])]
    if not pairs:
        return None
    (cell, shape, color), (other_cell, other_shape, other_color) = _pick(rng, pairs)
    if tag == "color_attr":
        return _Spec(lead_in, tag, ((shape, color), (other_shape, other_color)))
    if tag == "two_object":
        return _Spec(lead_in, tag, ((shape, None), (other_shape, None)))
    relation = _pick(rng, [relation for relation in RELATIONS if _holds(relation, cell, other_cell, side)])
    return _Spec(lead_in, tag, _color_at_most_one(shape, color, other_shape, other_color, rng), relation)


def _any_spec(tag: str, rng: np.random.Generator) -> _Spec:
    """A random spec of one category, whatever the scene."""
    lead_in = _pick(rng, LEAD_INS)
    shape, other_shape = _two_of(SHAPES, rng)
    color, other_color = _two_of(COLORS, rng)
    if tag == "single_object":
        return _Spec(lead_in, tag, ((shape, None),))
    if tag == "colors":
        return _Spec(lead_in, tag, ((shape, color),))
    if tag == "counting":
        return _Spec(lead_in, tag, ((shape, _pick(rng, (None, color))),), _pick(rng, COUNTS))
    if tag == "two_object":
        return _Spec(lead_in, tag, ((shape, None), (other_shape, None)))
    if tag == "color_attr":
        return _Spec(lead_in, tag, ((shape, color), (other_shape, other_color)))
    return _Spec(lead_in, tag, _color_at_most_one(shape, color, other_shape, other_color, rng), _pick(rng, RELATIONS))


def _near_miss(spec: _Spec, rng: np.random.Generator) -> _Spec:
    """The spec changed in the one point that its category is about. It may still happen to be true of a scene."""
    if spec.tag == "position":
        return spec._replace(link=INVERSE[spec.link])
    if spec.tag == "counting":
        return spec._replace(link=_pick(rng, [n for n in COUNTS if abs(n - spec.link) == 1]))
    if spec.tag == "color_attr":
        (shape, color), (other_shape, other_color) = spec.things
        return spec._replace(things=((shape, other_color), (other_shape, color)))
    shape, color = spec.things[0]
    if spec.tag == "colors":
        return spec._replace(things=((shape, _pick(rng, [c for c in COLORS if c != color])),))
    shapes = [thing[0] for thing in spec.things]
    new = (_pick(rng, [s for s in SHAPES if s not in shapes]), None)
    place = int(rng.random() * len(shapes))
    return spec._replace(things=(*spec.things[:place], new, *spec.things[place + 1 :]))


def _color_at_most_one(shape, color, other_shape, other_color, rng: np.random.Generator):
    """The two things of a position prompt: plain, or one of them with its color."""
    which = int(rng.random() * 3)
    return (shape, color if which == 1 else None), (other_shape, other_color if which == 2 else None)


def _two_of(items: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Two different items at random."""
    first = int(rng.random() * len(items))
    return items[first], items[first - 1 - int(rng.random() * (len(items) - 1))]


# ---------------------------------------------------------------------------------------------------------------------
# Tests of understanding
# ---------------------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """One question of an understanding test: which of the `prompts` is true of the `scene`? It is number 0."""

    scene: np.ndarray  # int8 [cells]
    prompts: tuple[dict, ...]


def four_way(
    rng: np.random.Generator, scenes: np.ndarray, count: int, forbidden: frozenset[str] = frozenset()
) -> list[Choice]:
    """Builds `count` four-way choices about scenes [B, cells], the six categories in turn.

    The four prompts of a choice are of one category, share the lead-in and have different compositions, none of them
    in `forbidden`; the first false one is a near miss where the scene allows it. ValueError where the scenes cannot
    serve some category (too few, or all alike).
    """
    choices: list[Choice] = []
    for attempt in itertools.count():
        if len(choices) == count:
            return choices
        tag = TAGS[len(choices) % len(TAGS)]
        if attempt > 100 * count + 1000:
            raise ValueError(f"these {len(scenes)} scenes cannot serve {tag} (choice {len(choices)} of {count})")
        scene = _pick(rng, scenes)
        spec = _true_spec(tag, _objects(scene), side_of(len(scene)), rng)
        if spec is None or _composition(spec) in forbidden:
            continue
        others = [_near_miss(spec, rng), *(_any_spec(tag, rng)._replace(lead_in=spec.lead_in) for _ in range(32))]
        others = {_composition(other): _write(other) for other in others}  # one wording of each, still in order
        false = [meta for key, meta in others.items() if key not in forbidden and not judge_scene(scene, meta)]
        if len(false) >= 3:
            choices.append(Choice(scene, (_write(spec), *false[:3])))


HARD_KINDS = {"relation": "position", "count": "counting", "binding": "color_attr"}


def hard_pairs(rng: np.random.Generator, kind: str, count: int, world: World = World()) -> list[Choice]:
    """Builds `count` two-way choices that bags of words cannot solve: a true prompt against its near miss.

    `kind` is "relation" (A left of B against A right of B), "count" (n against n +- 1) or "binding" (exchanged
    colors); another raises ValueError. Text alone is at chance: every pair of prompts is as likely either way round,
    for counts by drawing (true, false) evenly from (2, 3), (3, 2), (3, 4), (4, 3), for the others by the symmetry
    of the scenes.
    """
    if kind not in HARD_KINDS:
        raise ValueError(f"no kind {kind!r}; the kinds are {', '.join(HARD_KINDS)}")
    number_pairs = [(a, b) for a in COUNTS for b in COUNTS if abs(a - b) == 1]
    pairs: list[Choice] = []
    while len(pairs) < count:
        for scene in sample_scenes(rng, 256, world):
            spec = _true_spec(HARD_KINDS[kind], _objects(scene), world.side, rng)
            if spec is None or len(pairs) == count:
                continue
            if kind == "count":
                true_number, false_number = number_pairs[len(pairs) % len(number_pairs)]
                if spec.link != true_number:
                    continue
                false = _write(spec._replace(link=false_number))
            else:
                false = _write(_near_miss(spec, rng))
            if not judge_scene(scene, false):
                pairs.append(Choice(scene, (_write(spec), false)))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

PUNCTUATION = (",", ".", "?")


def vocabulary() -> list[str]:
    """Every word and punctuation mark, in lower case, that the functions above can produce for any grid, and the
    digits of the grid sizes; in a fixed order and without repetition."""
    texts = [*LEAD_INS, *COLORS, *SHAPES, *map(_plural, SHAPES), "and", *RELATIONS, *NUMBERS]
    texts += [*_places(3), *_places(2), "nothing", "does this image describe", "where is the", "how many are there"]
    texts += ANSWERS
    texts += [instruction.rstrip(".").lower() for instruction in INSTRUCTIONS]
    texts += [str(side) for side in range(2, len(NUMBERS) + 1)]
    return list(dict.fromkeys([*" ".join(texts).split(" "), *PUNCTUATION]))
