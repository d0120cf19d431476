"""What JSON files and tokenizers of people's folders say, checked: every error is one line that names the file."""
import dataclasses
import math
import types
import typing
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from gvu_jax.decode import check_files
from gvu_jax.metrics import read_json


def typed(cls, values, name=""):
    """cls(**values), a dataclass, from what JSON or a config says; lists become tuples.

    Raises ValueError for a missing or unknown entry and for one of another type than its field. A whole number is a
    size, a count or an id: none of them is negative.
    """
    where = f"{name}." if name else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {entry: tuple(x) if isinstance(x, list) else x for entry, x in values.items()}
    missing = [n for n, field in fields.items() if n not in values and field.default is dataclasses.MISSING]
    unknown = [n for n in values if n not in fields]
    if missing or unknown:
        raise ValueError(f"missing: {', '.join(where + n for n in missing)}" if missing else
                         f"unknown to this version of gvu_jax: {', '.join(where + n for n in unknown)}")
    for entry, value in values.items():
        kind = fields[entry].type
        if not is_a(value, kind):
            name = str(kind) if typing.get_args(kind) else kind.__name__
            raise ValueError(f"{where}{entry} is {value!r}, which is no {name}")
    return cls(**values)


def is_a(value, kind):
    """Whether a value may stand in a field of type `kind`, e.g. int | None or tuple[int, int]."""
    if isinstance(kind, types.UnionType):
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        first, *rest = typing.get_args(kind)
        return isinstance(value, tuple) and all(is_a(x, first) for x in value) and (
            rest == [...] or len(value) == 1 + len(rest))
    if kind is int:
        return type(value) is int and 0 <= value < 2 ** 63
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return kind is typing.Any or isinstance(value, kind)


class Described:
    """The dict of a JSON file, which names itself when asked for what it does not have or for what is not ours."""

    def __init__(self, path, values=None):
        self.path, self.values = path, values
        if values is None:
            if not path.is_file():
                raise FileNotFoundError(f"there is no {path}")
            self.values = read_json(path)
        if not isinstance(self.values, dict):
            raise ValueError(f"{path} holds no JSON object")

    def __getitem__(self, name):
        if name not in self.values:
            raise ValueError(f"{self.path} does not say {name!r}")
        value = self.values[name]
        return Described(f"{self.path}, {name},", value) if isinstance(value, dict) else value

    def a(self, kind, name):
        """The entry `name`, which is a `kind`: dict (as Described), list, str, int or float."""
        value = self[name]
        if not isinstance(value, Described) if kind is dict else not is_a(value, kind):
            raise ValueError(f"{self.path} says {name} = {self.values[name]!r}, which is no {kind.__name__}")
        return value

    def get(self, name, default=None):
        return self.values.get(name, default)

    def insist(self, **wanted):
        """Refuses a file whose settings, where it has them, differ from `wanted`: the ones that are implemented."""
        for name, value in wanted.items():
            if self.values.get(name, value) != value:
                raise ValueError(f"{self.path} says {name} = {self.values[name]!r}; implemented is {value!r} only")

    def numbers(self, cls, **more):
        """A config of ours whose fields have the names of the file; `more` are the fields that do not."""
        asked = [f for f in dataclasses.fields(cls) if f.name not in more and f.name != "remat"]
        values = {f.name: self[f.name] for f in asked if f.default is dataclasses.MISSING or f.name in self.values}
        return named(self.path, lambda: typed(cls, values | more))


def named(path, read):
    """read(), whose ValueError is said of `path`."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(folder):
    """The tokenizer of a folder with a tokenizer.json. Raises ValueError naming it where it is broken."""
    check_tokenizer_files(folder)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:                           # transformers raises anything from KeyError to its own
        raise ValueError(f"cannot read the tokenizer in {folder}: {error}") from error


def check_tokenizer_files(folder):
    """ValueError for a file of the tokenizer that is none: as merges.txt, a pointer would be taken for merges."""
    names = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
    check_files(sorted(path for name in names for path in Path(folder).glob(name) if path.is_file()))
