"""python -m gvu_jax: the commands, each with what its file begins with."""
import ast
from pathlib import Path

COMMANDS = ("train", "generate", "score", "evaluate", "prompts", "convert", "plan", "experiments", "benchmark",
            "shapes.pretrain")


def first_line(command):
    """What the docstring of a command's file begins with; the file is not run."""
    source = Path(__file__).parent.joinpath(*command.split(".")).with_suffix(".py").read_text()
    return " ".join(ast.get_docstring(ast.parse(source)).split("\n\n")[0].split())


if __name__ == "__main__":
    print("The commands of gvu_jax. What each takes: python -m gvu_jax.NAME --help\n")
    for command in COMMANDS:
        print(f"  python -m gvu_jax.{command:<16} {first_line(command)}")
