"""Write a recipe, complete and with comments, as the parameter file that every stage reads.

    maskrcnn recipe --list
    maskrcnn recipe coco2017_r50_fpn_1x train.base_lr=0.01

A file as a recipe left it is overwritten. A file that was changed since stays unless --force is given.
"""

import argparse
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from components.cli import user_errors
from components.config import Config
from components.runs.recipes import RecipeError, read_header, read_recipe, recipe_names
from model.config import Section

_KEYS = "# Keys: model/config.py and components/config.py say what each means and allows.\n"
_PLAIN = re.compile(r"[\w./][\w./:=-]*", re.ASCII)
_PLAIN_IN_LIST = re.compile(r"\w+", re.ASCII)


@dataclass(frozen=True)
class RecipeResult:
    """What was written where."""

    recipe: str
    output: Path


def run(name: str, overrides: Sequence[str] = (), *, output: Path, force: bool = False) -> RecipeResult:
    """Write the recipe `name`, complete, with overrides applied and comments kept, to `output`.

    Raises:
        RecipeError: if there is no such recipe, or `output` is a file that this function did not write and `force` is false.
        ConfigError: if an override cannot be used.
    """
    text = recipe_text(name, overrides)
    if output.is_file() and not force and not _is_pristine(output.read_text(encoding="utf-8"), text):
        raise RecipeError(
            f"{output}: must be as a recipe left it to be overwritten, but it was changed since; "
            "keep a copy and give --force, or name another file with --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return RecipeResult(name, output)


def recipe_text(name: str, overrides: Sequence[str] = ()) -> str:
    """The parameter file of a recipe: the command that writes it, the recipe's header, and every value with its comment.

    Raises:
        RecipeError, ConfigError: as `run`.
    """
    recipe = read_recipe(name)
    config = recipe.overridden(overrides)
    values = "\n".join(_lines(Config, config.model_dump(mode="json"), recipe.comments))
    told = f"# {name} with {' '.join(overrides)}\n" if overrides else ""
    return f"{told}{recipe.header}{_KEYS}{values}\n"


@dataclass(frozen=True)
class Summary:
    """What the header of a recipe says."""

    name: str
    purpose: str
    hardware: str
    time: str  # each of time and ap: and whether measured, cited or computed
    ap: str

    def __str__(self) -> str:
        return f"{self.name}\n  {self.purpose}\n  Hardware: {self.hardware}\n  Time:     {self.time}\n  AP:       {self.ap}"


def list_recipes() -> list[Summary]:
    """All recipes, by name."""
    return [_summary(name, read_header(name)) for name in recipe_names()]


def _summary(name: str, header: str) -> Summary:
    """The first line is the purpose, lines of `# Word: …` are what the word names."""
    purpose, *lines = [line[1:].strip() for line in header.splitlines()]
    said = {word: text.strip() for word, _, text in (line.partition(":") for line in lines)}
    return Summary(name, purpose, said["Hardware"], said["Time"], said["AP"])


def _is_pristine(present: str, text: str) -> bool:
    """Whether nothing of the user's is lost when `present` is overwritten by `text`."""
    return present == text or any(present == recipe_text(name) for name in recipe_names())


def _lines(
    section: type[Section], values: Mapping[str, Any], comments: Mapping[str, str], prefix: str = ""
) -> Iterator[str]:
    """A section's keys in the order of their declaration, each with the recipe's comment, or else with what its field says."""
    indent = "  " * prefix.count(".")
    for name, field in section.model_fields.items():
        value = values[name]
        if isinstance(value, dict):
            assert isinstance(field.annotation, type)
            yield from ([] if prefix else [""])
            yield f"{indent}{name}:"
            yield from _lines(field.annotation, value, comments, f"{prefix}{name}.")
        else:
            comment = comments.get(f"{prefix}{name}", field.description)
            yield f"{indent}{name}: {_inline(value)}{f'  # {comment}' if comment else ''}"


def _inline(value: Any, plain: re.Pattern[str] = _PLAIN) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_inline(one, _PLAIN_IN_LIST) for one in value)}]"
    if isinstance(value, str):
        return value if plain.fullmatch(value) and _stays_text(value) else _quoted(value)
    if isinstance(value, float) and 1e-9 < abs(value) < 1e16:
        return f"{Decimal(repr(value)):f}"  # 0.00004 for 4e-05
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)


def _stays_text(text: str) -> bool:
    """Whether YAML 1.1 and 1.2 both read it as it is, unlike `off`, `1e5` or `a:`."""
    return all(_loaded(text, version) == text for version in ((1, 1), (1, 2)))


def _loaded(text: str, version: tuple[int, int]) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = version
    return yaml.load(text)


def _quoted(text: str) -> str:
    yaml, stream = YAML(), io.StringIO()
    yaml.width = 1 << 30
    yaml.dump(DoubleQuotedScalarString(text), stream)
    return stream.getvalue().rstrip("\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn recipe`."""
    parser = argparse.ArgumentParser(
        prog="maskrcnn recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
    parser.add_argument("--output", type=Path, default=Path("params.yaml"), help="file to write (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that has been edited")
    parser.add_argument("--list", action="store_true", help="list the recipes, each with its hardware, time and AP")
    args = parser.parse_intermixed_args(argv)
    with user_errors():
        if args.list or not args.name:
            print("\n\n".join(str(recipe) for recipe in list_recipes()))
            return
        result = run(args.name, args.overrides, output=args.output, force=args.force)
        print(f"{result.output}: {result.recipe}; now run `dvc repro`, or `maskrcnn download`, `prepare`, `train`, …")


if __name__ == "__main__":
    main()
