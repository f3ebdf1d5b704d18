"""Recipes: named configurations, each measured or cited in the header of its file.

    config = load_recipe("coco2017_r50_fpn_1x", ["train.base_lr=0.01"])

`recipes/<name>.yaml` holds a header of comments and the values that differ from the defaults of the configuration
classes, or from the recipe that `extends: <name>` names. A comment beside a value is inherited with it. Only
`stability.output_dir` is not inherited: it is runs/<name>_stability unless stated. `recipes/` is beside `components/`
in the repository and in an installed package.
"""

import difflib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from components.config import Config
from components.params import build_config, parse_yaml, read_utf8
from components.runs.identity import deciding, differences
from model.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


class RecipeError(UserError):
    """A recipe cannot be read or written; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything that it inherits."""

    path: Path
    header: str  # the comment atop its own file
    config: Config  # complete
    comments: dict[str, str]  # beside values, by dotted name

    def overridden(self, overrides: Iterable[str]) -> Config:
        """The configuration with `section.key=value` overrides applied.

        Raises:
            ConfigError: if an override cannot be used.
        """
        return build_config(self.config.model_dump(mode="json"), overrides, str(self.path))


@dataclass(frozen=True)
class Nearest:
    """The recipe that is most like a configuration, and the changes: key → (recipe's value, configuration's value)."""

    recipe: str
    changes: dict[str, tuple[Any, Any]]


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Config:
    """The complete configuration of a recipe, with `section.key=value` overrides applied.

    Raises:
        RecipeError: as `read_recipe`.
        ConfigError: as `read_recipe`, or if an override cannot be used.
    """
    return read_recipe(name).overridden(overrides)


def read_recipe(name: str) -> Recipe:
    """Read a recipe and those that it extends.

    Raises:
        RecipeError: if there is no such recipe, or it extends one that does not exist, or itself in the end.
        ConfigError: if a file is not YAML, or a key is unknown, or a value out of range.
    """
    if name not in recipe_names():
        raise RecipeError(f"{name!r} is not a recipe; {_hint(name)}")
    return _read(name, ())


def read_header(name: str) -> str:
    """The comment atop a recipe's file."""
    lines = io.StringIO(read_utf8(_path(name)))
    return "".join(takewhile(lambda line: line.startswith("#"), lines))


def nearest_recipe(flat: dict[str, Any]) -> Nearest:
    """Find the recipe with the fewest other deciding values.

    Args:
        flat: a configuration by dotted names, maybe of an older version.
    """
    ours, found = deciding(flat), []
    for name in recipe_names():
        theirs = {key: value for key, value in deciding(load_recipe(name).flat()).items() if key in ours}
        changes = differences([theirs, {key: ours[key] for key in theirs}])
        found.append(Nearest(name, {key: (recipe, own) for key, (recipe, own) in changes.items()}))
    return min(found, key=lambda near: len(near.changes))


def _path(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(recipe_names())}"


def _read(name: str, extending: tuple[str, ...]) -> Recipe:
    """Read a recipe; `extending` are the recipes that lead to it, from the one that the caller asked for."""
    path = _path(name)
    own = _parsed(read_utf8(path), str(path)).copy()
    if "extends" in own:
        base = _read(_base(own.pop("extends"), path, (*extending, name)), (*extending, name))
        config, comments = base.config, base.comments
    else:
        config, comments = Config(), {}
    # Seeds of two recipes in one folder would not be one study.
    base_tree = _merged(config.model_dump(mode="json"), {"stability": {"output_dir": f"runs/{name}_stability"}})
    # All of the base's values are right already, so what is found wrong here stands in this file.
    config = build_config(_merged(base_tree, own), (), str(path))
    stated = _stated(own)
    inherited = {key: comment for key, comment in comments.items() if key not in stated}
    return Recipe(path, read_header(name), config, inherited | {key: text for key, text in stated.items() if text})


@lru_cache(maxsize=128)
def _parsed(text: str, where: str) -> Any:
    """Parse a recipe's text. Cached, since `nearest_recipe` reads every recipe and what it extends, at 10 ms a file."""
    return parse_yaml(text, where, comments=True)


def _base(name: Any, path: Path, extending: tuple[str, ...]) -> str:
    """The name of the recipe that `path` extends, if it may."""
    if not isinstance(name, str) or name not in recipe_names():
        raise RecipeError(f"{path}: extends: must be the name of a recipe, got {name!r}; {_hint(str(name))}")
    if name in extending:
        way = " → ".join((*extending[extending.index(name) :], name))
        raise RecipeError(f"{path}: extends: must not lead back to the recipe itself, got {way}; name another, or none")
    return str(name)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The tree of a base with a recipe's own values in it."""
    tree = dict(base)
    for name, value in own.items():
        section = base.get(name)
        if isinstance(section, dict) and isinstance(value, dict):
            value = _merged(section, value)
        tree[name] = value
    return tree


def _stated(tree: Any, prefix: str = "") -> dict[str, str]:
    """The keys that a file states, by dotted name, each with the comment beside it; empty where there is none."""
    stated: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            stated |= _stated(value, f"{prefix}{name}.")
        else:
            _, _, beside, _ = tree.ca.items.get(name) or (None,) * 4
            stated[f"{prefix}{name}"] = beside.value.split("\n")[0].lstrip("# ") if beside else ""
    return stated
