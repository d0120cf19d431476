"""Writes docs/settings.md: every setting of every config with its value and the meaning that its comments give.

    python docs/write_settings.py            # from the root of a clone; tests/test_docs.py checks that it is current

A comment belongs to the statement below it, or beside it. Where it says "name: .." or "name, name: .." of settings of
that statement, each part is about those; what stands before is about all the others. A config that starts from another
takes over what that one says of a setting, unless its own comment speaks of it: then that stands instead.
"""
import ast
import itertools
import os
import re
import runpy
from pathlib import Path

from gvu_jax.cli import flatten

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"shapes": ("normal", "weak", "smoke", "showo", "sd35"),
           "shapes_gap": ("sft", "dpo", "csft", "cdpo", "sft-showo", "sft-sd35"),
           "shapes_uae": ("normal", "weak", "smoke", "showo", "sd35"), "xomni": (),
           "xomni_gap": ("csft", "sft", "dpo", "cdpo"), "xomni_uae": (), "janus_pro": ("1b", "7b"),
           "janus_pro_gap": ("csft", "sft", "dpo", "cdpo", "csft-7b"),
           "janus_pro_uae": ("1b", "7b"), "showo": ("256", "512", "clip"),
           "showo_gap": ("csft", "sft", "dpo", "cdpo", "csft-512", "csft-clip"),
           "showo_uae": ("256", "512", "clip"), "uae_sd35": ("uae", "gvu"),
           "uae_sd35_gap": ("csft", "sft", "dpo", "cdpo")}                       # the first is meant without a name
# What each starts from, and whose words for its settings it takes besides.
STARTS_FROM = {"shapes_gap": ("shapes",), "shapes_uae": ("shapes",), "xomni_gap": ("xomni",), "xomni_uae": ("xomni",),
               "janus_pro": ("xomni",), "janus_pro_gap": ("janus_pro", "xomni_gap"),
               "janus_pro_uae": ("janus_pro", "xomni_uae"), "showo": ("xomni", "janus_pro"),
               "showo_gap": ("showo", "xomni_gap"), "showo_uae": ("showo", "xomni_uae"),
               "uae_sd35": ("xomni_uae", "janus_pro"), "uae_sd35_gap": ("uae_sd35", "xomni_gap")}


def comments_of(lines, statement):
    """The text of the comment above a statement (ast node) and beside its lines."""
    first, above, beside = statement.lineno - 1, [], []
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
        above.insert(0, lines[first].strip().lstrip("# ").strip())
    for line in lines[statement.lineno - 1:statement.end_lineno]:
        if "  #" in line:
            beside.append(line.split("  #", 1)[1].strip())
    if any(set(text) <= set("- ") or text.startswith("----") for text in above):               # a banner
        above = above[max(i for i, text in enumerate(above) if text.startswith("----")) + 1:]
    return " ".join(above + beside)


def settings_of(statement):
    """(dotted name, names of what it sets below that: [] for a plain value) of an assignment to the config or of its
    update(..); None for any other statement."""
    if isinstance(statement, ast.Assign):
        target, value = statement.targets[0], statement.value
        inner = value.keywords if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict" else []
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and (
            ast.unparse(statement.value.func).endswith(".update")):
        target, inner = statement.value.func.value, statement.value.keywords
    else:
        return None
    name = ast.unparse(target)
    return (name.removeprefix("config").lstrip("."), list(leaves(inner))) if name.startswith("config") else None


def leaves(keywords, before=""):
    for keyword in keywords:
        if isinstance(keyword.value, ast.Call) and ast.unparse(keyword.value.func) == "dict":
            yield from leaves(keyword.value.keywords, f"{before}{keyword.arg}.")
        else:
            yield f"{before}{keyword.arg}"


def meanings(config):
    """{setting: what the comments of configs/CONFIG.py say of it}."""
    source = (ROOT / "configs" / f"{config}.py").read_text()
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)).body
    found = {}
    for statement in body:
        if (told := settings_of(statement)) is None or not (text := comments_of(source.split("\n"), statement)):
            continue
        name, inner = told
        parts = split(text, {leaf.split(".")[-1] for leaf in inner})
        for leaf in inner or [""]:
            own = parts.get(leaf.split(".")[-1], parts[""]).rstrip(".; ")
            if own:
                found[".".join(filter(None, (name, leaf)))] = own
    return found


def split(text, names):
    """{name: its part of a comment, "": what stands before the first of them}."""
    parts, at = {"": text}, r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): "
    starts = [match for match in re.finditer(at, text) if set(match[1].split(", ")) <= names]
    for match, following in zip(starts, [*starts[1:], None]):
        for name in match[1].split(", "):
            parts[name] = text[match.end():following.start() if following else None].strip()
    parts[""] = text[:starts[0].start()].strip() if starts else text
    return parts


def values(config, preset=None):
    """{setting: value} of a config, as flags name them."""
    cache = os.environ.pop("GVU_CACHE", None)
    try:
        get_config = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]
        return flatten(get_config(*[preset] * bool(preset)))
    finally:
        if cache is not None:
            os.environ["GVU_CACHE"] = cache


def section(config, known):
    """The Markdown of one config. known: {setting: meaning} of what it starts from."""
    presets, found, base = CONFIGS[config], values(config), STARTS_FROM.get(config, (None,))[0]
    before = values(base) if base else {}
    told = known | meanings(config)
    docstring = ast.get_docstring(ast.parse((ROOT / "configs" / f"{config}.py").read_text()))
    lines = [f"## configs/{config}.py", "", " ".join(docstring.split("\n\n")[0].split()), ""]
    if base:
        gone = sorted({name.split(".")[0] for name in before} - {name.split(".")[0] for name in found})
        lines += [f"It starts from [configs/{base}.py](#configs{base}py), and this is what it changes"
                  + (f"; it has no {' and no '.join(f'`{name}`' for name in gone)}" if gone else "") + ".", ""]
    lines += ["| setting | value | meaning |", "|---|---|---|"]
    shown = [name for name, value in found.items() if name not in before or before[name] != value]
    for (_, meaning), names in itertools.groupby(shown, lambda name: (name.rpartition(".")[0], told.get(name, ""))):
        names = list(names)                                                    # of which all is said at once
        cells = (f"`{name}`" for name in names), (show(found[name]) for name in names), [meaning]
        lines.append("| " + " | ".join(map("<br>".join, cells)) + " |")
    for preset in presets[1:]:
        differ = {name: value for name, value in values(config, preset).items() if found.get(name) != value}
        lines += ["", f"The preset `:{preset}` sets " + ", ".join(
            f"`{name}` to {show(value)}" for name, value in differ.items()) + "."]
    return "\n".join(lines)


def show(value):
    """A value as a cell of a table has it, where a bar would end the cell."""
    return f"`{value!r}`".replace("|", r"\|") if value != "" else "nothing"


def inherited():
    """What is known of the settings of each config from those it starts from, and with its own: ({config: {setting:
    meaning}}, the same)."""
    before, known = {}, {}
    for config in CONFIGS:
        before[config] = {name: text for other in reversed(STARTS_FROM.get(config, ())) for name, text in
                          known[other].items()}
        known[config] = before[config] | meanings(config)
    return before, known


def page():
    """The text of docs/settings.md."""
    before, _ = inherited()
    parts = [section(config, before[config]) for config in CONFIGS]
    return "\n\n".join([
        "# Every setting", "This page is written by `python docs/write_settings.py` from the configs and their "
        "comments: change those, not this page.", "Any value can be given on the command line, as `python -m "
        "gvu_jax.train --config=configs/shapes.py --workdir=DIR --config.gvu.group=8`. A name or a value that cannot "
        "be is refused in one line.", *parts]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/settings.md").write_text(page())
