"""Things in words: articles, plurals and numbers, as prompts.py and questions.py say them."""
import re
from typing import NamedTuple

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MEASURES = {"skis": "pair", "scissors": "pair", "broccoli": "head"}              # what one of them is called: a pair of
IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}


class Thing(NamedTuple):
    """Objects of one class that a prompt names together."""
    name: str
    count: int = 1
    color: str | None = None
    size: str | None = None


def phrase(thing):
    """A Thing in words: "an orange kite", "three knives", "two pairs of red skis", "a large head of broccoli"."""
    measure = MEASURES.get(thing.name)
    noun = thing.name if measure or thing.count == 1 else plural(thing.name)
    noun = f"{thing.color} {noun}" if thing.color else noun
    if measure:
        noun = f"{measure if thing.count == 1 else plural(measure)} of {noun}"
    noun = f"{thing.size} {noun}" if thing.size else noun
    if thing.count > 1:
        return f"{NUMBERS[thing.count - 1]} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun):
    return IRREGULAR.get(noun) or noun + ("es" if re.search("(s|sh|ch)$", noun) else "s")
