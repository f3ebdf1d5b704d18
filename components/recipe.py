"""Recipes: complete parameter files, each proved or cited in its header.

    maskrcnn recipe --list
    maskrcnn recipe coco2017_r50_fpn_1x train.base_lr=0.01

`recipes/` lies beside `components/`, in the repository and where the package is installed.
"""

import argparse
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from components.cli import user_errors
from components.params import load_config, read_flat
from components.runs.identity import deciding, differences
from model.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class Nearest:
    """The recipe that a configuration is most like, and what it changes there: name → (recipe's value, its own value)."""

    recipe: str
    changes: dict[str, tuple[Any, Any]]


def nearest_recipe(flat: dict[str, Any]) -> Nearest:
    """The recipe of whose deciding values the fewest are others, in a configuration by dotted names (of an older version, maybe)."""
    ours, found = deciding(flat), []
    for path in sorted(RECIPES.glob("*.yaml")):
        theirs = {key: value for key, value in deciding(read_flat(path)).items() if key in ours}
        changes = differences([theirs, {key: ours[key] for key in theirs}])
        found.append(Nearest(path.stem, {key: (recipe, own) for key, (recipe, own) in changes.items()}))
    return min(found, key=lambda near: len(near.changes))


class RecipeError(UserError):
    """A recipe cannot be written; the message says what to change."""


@dataclass(frozen=True)
class RecipeResult:
    """What was written where."""

    recipe: Path
    output: Path


def run(name: str, overrides: Sequence[str] = (), *, output: Path, force: bool = False) -> RecipeResult:
    """Write the recipe `name`, with overrides applied and comments kept, to `output`.

    Raises:
        RecipeError: if there is no such recipe, or `output` holds what no recipe wrote and `force` is false.
        ConfigError: if an override cannot be used.
    """
    recipe = _find(name)
    text = recipe.read_text(encoding="utf-8")
    if overrides:
        text = f"# {name} with {' '.join(overrides)}\n" + _with_overrides(text, recipe, overrides)
    if output.is_file() and not force and not _is_pristine(output.read_text(encoding="utf-8"), text):
        raise RecipeError(
            f"{output}: must be as a recipe left it to be overwritten, but it was changed since; "
            "keep a copy and give --force, or name another file with --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return RecipeResult(recipe=recipe, output=output)


@dataclass(frozen=True)
class Recipe:
    """What the header of a recipe says."""

    name: str
    purpose: str
    hardware: str
    time: str  # each of time and ap: and whether measured, cited or computed
    ap: str

    def __str__(self) -> str:
        return f"{self.name}\n  {self.purpose}\n  Hardware: {self.hardware}\n  Time:     {self.time}\n  AP:       {self.ap}"


def list_recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [_read_header(path) for path in sorted(RECIPES.glob("*.yaml"))]


def _read_header(path: Path) -> Recipe:
    """The first line is the purpose, lines of `# Word: …` are what the word names."""
    with path.open(encoding="utf-8") as file:
        header = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), file)]
    said = {word: text.strip() for word, _, text in (line.partition(":") for line in header[1:])}
    return Recipe(path.stem, header[0], said["Hardware"], said["Time"], said["AP"])


def _find(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if path.parent != RECIPES or not path.is_file():
        known = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise RecipeError(f"{name!r} is not a recipe; {hint}")
    return path


def _with_overrides(text: str, recipe: Path, overrides: Sequence[str]) -> str:
    """The recipe's text with just the overridden values changed."""
    before, after = load_config(recipe).flat(), load_config(recipe, overrides).flat()
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    tree: Any = yaml.load(text)
    for key, value in after.items():
        if value != before[key]:
            *sections, name = key.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[name] = value
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _is_pristine(present: str, text: str) -> bool:
    """Whether nothing of the user's is lost when `present` is overwritten by `text`."""
    return present == text or any(present == path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn recipe`."""
    parser = argparse.ArgumentParser(
        prog="maskrcnn recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to it")
    parser.add_argument("--output", type=Path, default=Path("params.yaml"), help="file to write (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that was changed by hand")
    parser.add_argument("--list", action="store_true", help="list the recipes, each with its hardware, time and AP")
    args = parser.parse_intermixed_args(argv)
    with user_errors():
        if args.list or not args.name:
            print("\n\n".join(str(recipe) for recipe in list_recipes()))
            return
        result = run(args.name, args.overrides, output=args.output, force=args.force)
        print(
            f"{result.output}: {result.recipe.stem}; now run `dvc repro`, or `maskrcnn download`, `prepare`, `train`, …"
        )


if __name__ == "__main__":
    main()
