"""What is said of scenes (see world.py): the captions, descriptions and questions that pretraining reads.

People's captions tell what there is: one object, two, a number of a kind, or of shapes where they differ, and nothing
that stands there is left out. So must these. If any true statement would do, a model learns that the more stands in a
picture, the more is true of it, and a reward that asks it for a prompt's probability is best served by filling the
picture.

    captions     caption, wrong_caption  a prompt that tells all there is, and one that does not
    statements   true_prompt             a prompt that is true of a scene, whatever else it holds
    places       describe, ask           what is where, in full or one question at a time
    words        vocabulary              every word that any of the above can produce

Every random choice comes from an explicit `rng`. Compositions (world.composition) in `forbidden` are never said.
"""

import numpy as np

from gvu_jax.shapes.world import (
    ANY, COLORS, COUNTS, INVERSE, LEAD_INS, MOST_SIDE, NUMBERS, RELATIONS, SHAPES, TAGS, Spec, exact_scene, holds, noun,
    plural, side_of, spec_composition, write)

INSTRUCTIONS = ("Describe the image.", "Describe the image in detail.")
ANSWERS = ("yes", "no")
TRIES = 8  # draws before a category is given up for a scene

# How often pretraining meets each category where a scene allows several: relations are learned last and need the most
# practice, and two colors have to be bound to two shapes.
TAG_WEIGHTS = dict(zip(TAGS, (1, 1, 3, 1, 4, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def caption(
    scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset(), weights: dict = TAG_WEIGHTS,
    careless: float = 0.0,
) -> dict | None:
    """Draws a prompt that tells what there is in a scene [cells]: all of its objects, and no other.

    Its category is drawn by `weights` among those that can. A share `careless` may be any true prompt, as people's
    captions sometimes are. None where `forbidden` leaves none, or where there is nothing.
    """
    if rng.random() < careless:
        return true_prompt(scene, rng, forbidden, weights)
    objects, side = objects_of(scene), side_of(len(scene))
    make = lambda tag: whole_spec(tag, objects, side, rng)
    spec = draw(make, lambda spec: spec_composition(spec) not in forbidden, rng, weights)
    return None if spec is None else write(spec)


def whole_spec(tag: str, objects: list[tuple[int, str, str]], side: int, rng: np.random.Generator) -> Spec | None:
    """A random spec of one category that tells all of a scene's objects, or None where there is none."""
    if tag == "counting":
        shapes, colors = {shape for _, shape, _ in objects}, {color for _, _, color in objects}
        if len(objects) < 2 or (len(objects) == 2 and len(shapes) == 2):
            return None
        shape = shapes.pop() if len(shapes) == 1 else ANY
        color = colors.pop() if len(colors) == 1 and rng.random() < 0.75 else None
        return Spec(pick(rng, LEAD_INS), tag, ((shape, color),), len(objects))
    if len(objects) != (1 if tag in ("single_object", "colors") else 2):
        return None
    return true_spec(tag, objects, side, rng)


def wrong_caption(
    scene: np.ndarray, another: dict, rng: np.random.Generator, forbidden: frozenset[str] = frozenset()
) -> dict | None:
    """Draws a prompt that does not tell what there is in a scene [cells]: something of it is false, or left out.

    Half of the time it is `another`, a caption of another scene: so the same sentences are right and wrong, and none
    can be told by its words. Else one of the scene's own captions is missed narrowly: in the one point that its
    category is about (see `near_miss`), or in any one word. None where nothing is found.
    """
    objects, side = objects_of(scene), side_of(len(scene))
    miss = near_miss if rng.random() < 0.5 else slip

    def near(tag):
        spec = whole_spec(tag, objects, side, rng)
        return None if spec is None else miss(spec, rng)

    def accepts(spec):
        return spec_composition(spec) not in forbidden and not exact_scene(scene, write(spec))

    if rng.random() < 0.5 and (spec := draw(near, accepts, rng)):
        return write(spec)
    return None if exact_scene(scene, another) else another


# ---------------------------------------------------------------------------------------------------------------------
# Statements
# ---------------------------------------------------------------------------------------------------------------------


def true_prompt(
    scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset(), weights: dict = TAG_WEIGHTS
) -> dict | None:
    """Draws a prompt that is true of a scene [cells], its category by `weights` among those the scene allows.

    It is built from the scene's own objects, hence fast. None means that there was nothing to say (of an empty scene).
    """
    objects, side = objects_of(scene), side_of(len(scene))
    make = lambda tag: true_spec(tag, objects, side, rng)
    spec = draw(make, lambda spec: spec_composition(spec) not in forbidden, rng, weights)
    return None if spec is None else write(spec)


def draw(make, accepts, rng: np.random.Generator, weights: dict = TAG_WEIGHTS) -> Spec | None:
    """Draws a category by weight and a spec `make(tag)` in it that is accepted. A category that yields none is struck
    off and another drawn; None when all are struck off."""
    weights = dict(weights)
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


def true_spec(tag: str, objects: list[tuple[int, str, str]], side: int, rng: np.random.Generator) -> Spec | None:
    """A random spec of one category that is true of a scene's objects, or None where there is none."""
    if not objects:
        return None
    lead_in = pick(rng, LEAD_INS)
    if tag in ("single_object", "colors"):
        _, shape, color = pick(rng, objects)
        return Spec(lead_in, tag, ((shape, color if tag == "colors" else None),))

    if tag == "counting":
        numbers: dict[tuple[str, str | None], int] = {}
        for _, shape, color in objects:
            for thing in ((shape, None), (shape, color)):
                numbers[thing] = numbers.get(thing, 0) + 1
        things = [thing for thing, number in numbers.items() if number > 1]
        if not things:
            return None
        thing = pick(rng, things)
        return Spec(lead_in, tag, (thing,), numbers[thing])

    # The others speak of two objects of different shapes; those of color_attr differ in color too.
    pairs = [(a, b) for a in objects for b in objects if a[1] != b[1] and (tag != "color_attr" or a[2] != b[2])]
    if not pairs:
        return None
    (cell, shape, color), (other_cell, other_shape, other_color) = pick(rng, pairs)
    if tag == "color_attr":
        return Spec(lead_in, tag, ((shape, color), (other_shape, other_color)))
    if tag == "two_object":
        return Spec(lead_in, tag, ((shape, None), (other_shape, None)))
    relation = pick(rng, [relation for relation in RELATIONS if holds(relation, cell, other_cell, side)])
    return Spec(lead_in, tag, color_at_most_one(shape, color, other_shape, other_color, rng), relation)


def any_spec(tag: str, rng: np.random.Generator) -> Spec:
    """A random spec of one category that a prompt could have, whatever the scene."""
    lead_in = pick(rng, LEAD_INS)
    shape, other_shape = two_of(SHAPES, rng)
    color, other_color = two_of(COLORS, rng)
    if tag == "single_object":
        return Spec(lead_in, tag, ((shape, None),))
    if tag == "colors":
        return Spec(lead_in, tag, ((shape, color),))
    if tag == "counting":
        return Spec(lead_in, tag, ((shape, pick(rng, (None, color))),), pick(rng, COUNTS))
    if tag == "two_object":
        return Spec(lead_in, tag, ((shape, None), (other_shape, None)))
    if tag == "color_attr":
        return Spec(lead_in, tag, ((shape, color), (other_shape, other_color)))
    return Spec(lead_in, tag, color_at_most_one(shape, color, other_shape, other_color, rng), pick(rng, RELATIONS))


def near_miss(spec: Spec, rng: np.random.Generator) -> Spec:
    """The spec changed in the one point that its category is about. It may still happen to be true of a scene."""
    if spec.tag == "position":
        return spec._replace(link=INVERSE[spec.link])
    if spec.tag == "counting":
        return spec._replace(link=pick(rng, [n for n in range(2, len(NUMBERS) + 1) if abs(n - spec.link) == 1]))
    if spec.tag == "color_attr":
        (shape, color), (other_shape, other_color) = spec.things
        return spec._replace(things=((shape, other_color), (other_shape, color)))
    if spec.tag == "colors":
        return change_color(spec, 0, rng)
    return change_shape(spec, rng)


def slip(spec: Spec, rng: np.random.Generator) -> Spec:
    """The spec with any one word changed: a shape, a color, the number or the relation. It may still be true."""
    colored = [place for place, (_, color) in enumerate(spec.things) if color]
    point = pick(rng, ("shape", *["color"] * bool(colored), *["link"] * bool(spec.link)))
    if point == "shape":
        return change_shape(spec, rng)
    if point == "color":
        return change_color(spec, pick(rng, colored), rng)
    if spec.tag == "counting":
        return spec._replace(link=pick(rng, [n for n in range(2, len(NUMBERS) + 1) if n != spec.link]))
    return spec._replace(link=pick(rng, [relation for relation in RELATIONS if relation != spec.link]))


def change_shape(spec: Spec, rng: np.random.Generator) -> Spec:
    """One of the things gets a shape that none of them has."""
    place, shapes = int(rng.random() * len(spec.things)), [shape for shape, _ in spec.things]
    return change(spec, place, (pick(rng, [shape for shape in SHAPES if shape not in shapes]), spec.things[place][1]))


def change_color(spec: Spec, place: int, rng: np.random.Generator) -> Spec:
    """The thing at `place` gets a color that none of them has."""
    colors = [color for _, color in spec.things]
    return change(spec, place, (spec.things[place][0], pick(rng, [color for color in COLORS if color not in colors])))


def change(spec: Spec, place: int, thing: tuple[str, str | None]) -> Spec:
    return spec._replace(things=(*spec.things[:place], thing, *spec.things[place + 1 :]))


def color_at_most_one(shape, color, other_shape, other_color, rng: np.random.Generator):
    """The two things of a position prompt: plain, or one of them with its color."""
    which = int(rng.random() * 3)
    return (shape, color if which == 1 else None), (other_shape, other_color if which == 2 else None)


def two_of(items: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Two different items at random."""
    first = int(rng.random() * len(items))
    return items[first], items[first - 1 - int(rng.random() * (len(items) - 1))]


def pick(rng: np.random.Generator, items):
    """One item at random. (Several times faster than rng.choice or rng.integers for a single draw.)"""
    return items[int(rng.random() * len(items))]


def objects_of(scene: np.ndarray) -> list[tuple[int, str, str]]:
    """(cell, shape, color) of each object in reading order."""
    return [
        (cell, SHAPES[(code - 1) // len(COLORS)], COLORS[(code - 1) % len(COLORS)])
        for cell, code in enumerate(scene.tolist())
        if code > 0
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


def ask(scene: np.ndarray, rng: np.random.Generator, forbidden: frozenset[str] = frozenset()) -> tuple | None:
    """Draws a question about a scene [cells], and its answer: where the only one of a kind of object is ("Where is the
    red circle?", "top left"), what is at a place ("What is at the top left?", "red circle"), or how many there are
    ("How many circles are there?", "three").

    Captions alone teach places and numbers slowly, because they name them only in relation to other things. Nothing
    in `forbidden` is asked about; None means that the scene leaves nothing to ask.
    """
    cells: dict[tuple[str, str | None], list[int]] = {}
    for cell, shape, color in objects_of(scene):
        for thing in ((shape, None), (shape, color)):
            cells.setdefault(thing, []).append(cell)
    hidden = lambda thing: (f"colors: {noun(thing)}" in forbidden or
                            f"counting: {len(cells[thing])} {noun(thing)}" in forbidden)
    things = [thing for thing in cells if not hidden(thing)]
    if not things:
        return None
    thing = pick(rng, things)
    if len(cells[thing]) == 1 and rng.random() < 0.75:
        place = place_names(side_of(len(scene)))[cells[thing][0]]
        if thing[1] and rng.random() < 0.5:
            return f"What is at the {place}?", noun(thing)
        return f"Where is the {noun(thing)}?", place
    return f"How many {plural(noun(thing))} are there?", NUMBERS[len(cells[thing]) - 1]


def describe(scene: np.ndarray) -> str:
    """The one full description of a scene [cells]: its objects in reading order, e.g.
    "top left red circle, middle center blue square"; "nothing" for an empty scene. `read_description` is the inverse.
    """
    places = place_names(side_of(len(scene)))
    return ", ".join([f"{places[cell]} {color} {shape}" for cell, shape, color in objects_of(scene)]) or "nothing"


def read_description(text: str, side: int = 3) -> np.ndarray:
    """The scene, int8 [side * side], that `describe` has put into words; ValueError where the text is not of its form.

    The order of the objects is free, so that a model's description can be read too.
    """
    places = place_names(side)
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


def place_names(side: int) -> list[str]:
    """The name of each cell in reading order."""
    if side == 3:
        return [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
    return [f"row {row} column {column}" for row in NUMBERS[:side] for column in NUMBERS[:side]]


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

PUNCTUATION = (",", ".", "?")


def vocabulary() -> list[str]:
    """Every word and punctuation mark, in lower case, that the functions above and world.py's prompts can produce for
    any grid, and the digits of the grid sizes; in a fixed order and without repetition."""
    texts = [*LEAD_INS, *COLORS, *SHAPES, *map(plural, (*SHAPES, ANY)), "and", *RELATIONS, *NUMBERS]
    texts += [*place_names(3), *place_names(2), "nothing", "does this image describe", "where is the", "what is at the",
              "how many are there", *ANSWERS]
    texts += [instruction.rstrip(".").lower() for instruction in INSTRUCTIONS]
    texts += [str(side) for side in range(2, MOST_SIDE + 1)]
    return list(dict.fromkeys([*" ".join(texts).split(" "), *PUNCTUATION]))
