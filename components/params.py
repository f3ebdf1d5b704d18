"""Read `params.yaml`, apply overrides, and explain what is wrong with it.

    config = load_config("params.yaml", ["train.base_lr=0.01", "data.workers=4"])

Command-line overrides are `section.key=value`, the value read as YAML. Errors name the file or override, the key, what
it must be and what it got; an unknown key names the nearest known one.
"""

import difflib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, YAMLError

from components.config import RENAMED, Config, flatten
from model.errors import UserError
from model.files import write_atomically


class ConfigError(UserError):
    """The user's configuration cannot be used; the message says what to change."""


def load_config(path: str | Path = "params.yaml", overrides: Iterable[str] = ()) -> Config:
    """Read a parameter file and apply `section.key=value` overrides to it.

    Raises:
        ConfigError: if the file is absent or not YAML, or a key is unknown, or a value out of range.
    """
    return parse_config(_read_text(Path(path)), overrides, str(path))


def parse_config(text: str, overrides: Iterable[str] = (), where: str = "params") -> Config:
    """The configuration of a parameter file's text; `where` names its place in errors.

    Raises:
        ConfigError: as `load_config`.
    """
    return build_config(parse_yaml(text, where), overrides, where)


def build_config(tree: dict[str, Any], overrides: Iterable[str] = (), where: str = "params") -> Config:
    """The configuration of a parameter file's values, which overrides change in place.

    Raises:
        ConfigError: if a key is unknown, or a value out of range.
    """
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree, where)


def config_from_dict(tree: dict[str, Any], where: str) -> Config:
    """The configuration stored as plain data, in a checkpoint say, of this or an earlier version.

    Args:
        where: names its place in errors.
    """
    return _validate(_with_present_names(tree), where)


def load_stored(path: str | Path) -> Config:
    """Read the parameter file that a run keeps, maybe of an earlier version.

    Raises:
        ConfigError: as `load_config`.
    """
    return config_from_dict(parse_yaml(_read_text(Path(path)), str(path)), str(path))


def save_config(config: Config, path: str | Path) -> None:
    """Write every value, defaults too, as a parameter file that `load_config` reads."""
    write_atomically(Path(path), config_text(config))


def config_text(config: Config) -> str:
    """Every value, defaults too, as the text of a parameter file; the same each time for the same configuration."""
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False  # ruamel cannot read all that it writes in flow style: ":'" in a mapping
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def read_flat(path: str | Path) -> dict[str, Any]:
    """The values of a parameter file by dotted name, as they stand and unchecked: the file may be of another version.

    Raises:
        ConfigError: if it is no parameter file at all.
    """
    return flatten(_with_present_names(parse_yaml(_read_text(Path(path)), str(path))))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path}: no such parameter file. `maskrcnn recipe shapes_demo` writes one to params.yaml.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error


def parse_yaml(text: str, where: str, *, comments: bool = False) -> dict[str, Any]:
    """The values of a parameter file's text, unchecked.

    Args:
        where: names its place in errors.
        comments: each section is a mapping of ruamel.yaml, which holds the comments in its `ca`.

    Raises:
        ConfigError: if it is not YAML, or holds no sections.
    """
    try:
        tree = YAML(typ="rt" if comments else "safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: must hold sections ({', '.join(Config.model_fields)}), got a {type(tree).__name__}"
        )
    return tree


def _with_present_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its keys under their present names."""
    return {
        section: {RENAMED.get(f"{section}.{key}", f".{key}").rpartition(".")[2]: value for key, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in tree.items()
    }


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r}: must be section.key=value, for example train.base_lr=0.01")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    node = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    # An empty text value, as in `data.train_images=`, is the empty string, not null.
    node[parts[-1]] = "" if value is None and not text.strip() else value


def _validate(tree: dict[str, Any], where: str) -> Config:
    try:
        # JSON mode: YAML has lists where we have tuples and text where we have paths, but "0.1" is not a number.
        return Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, where) for problem in error.errors())) from error


def _explain(problem: Any, where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if name == "extends":
        return (
            f"{where}: extends: only recipes have it; `maskrcnn recipe NAME` writes a recipe's complete parameter file"
        )
    if problem["type"] == "extra_forbidden":
        return f"{where}: {name}: unknown key{_nearest(location)}"
    if problem["type"] == "value_error":
        return f"{where}: {name}: {problem['ctx']['error']}"
    return f"{where}: {name}: {problem['msg']}, got {problem['input']!r}"


def _nearest(location: list[str]) -> str:
    """Suggest a key in place of an unknown one: a like one in its section, or in another."""
    section = ".".join(location[:-1])
    known = {key.rpartition("."): key for key in _key_names(Config)}
    siblings = {name: key for (parent, _, name), key in known.items() if parent == section}
    others = {name: key for (_, _, name), key in known.items()}
    for candidates, cutoff in ((siblings, 0.6), (others, 0.75)):
        near = difflib.get_close_matches(location[-1], candidates, n=1, cutoff=cutoff)
        if near:
            return f"; did you mean {candidates[near[0]]}?"
    return f"; known: {', '.join(siblings.values())}"


def _key_names(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _key_names(field.annotation, f"{prefix}{name}.")
    return names
