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
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from components.cli import user_errors
from components.config import Config, load_config
from model.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


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


def nearest_recipe(config: Config) -> tuple[str, dict[str, Any]]:
    """The recipe that a configuration differs from in the fewest values, and those values: what makes a run's result, told shortly."""
    mine = _deciding(config)
    changes = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        theirs = _deciding(load_config(path))
        changes[path.stem] = {name: value for name, value in mine.items() if theirs[name] != value}
    name = min(changes, key=lambda name: len(changes[name]))
    return name, changes[name]


def _deciding(config: Config) -> dict[str, Any]:
    """The values that decide how a model is trained and scored; not where files lie."""
    return {
        name: value
        for name, value in config.flat().items()
        if name.startswith(("data.", "model.", "train.", "evaluate.")) and not name.endswith("_dir")
    }


def list_recipes() -> dict[str, str]:
    """The names of all recipes, each with the first line of its header."""
    return {path.stem: _first_line(path) for path in sorted(RECIPES.glob("*.yaml"))}


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _find(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if path.parent != RECIPES or not path.is_file():
        known = sorted(list_recipes())
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
    parser.add_argument("--list", action="store_true", help="list the recipes")
    args = parser.parse_intermixed_args(argv)
    with user_errors():
        if args.list or not args.name:
            for name, purpose in list_recipes().items():
                print(f"{name:<26} {purpose}")
            return
        result = run(args.name, args.overrides, output=args.output, force=args.force)
        print(
            f"{result.output}: {result.recipe.stem}; now run `dvc repro`, or `maskrcnn download`, `prepare`, `train`, …"
        )


if __name__ == "__main__":
    main()
