"""Read `params.yaml`, apply overrides, and explain what is wrong with it.

    config = load_config("params.yaml", ["train.base_lr=0.01", "data.workers=4"])

Command-line overrides are `section.key=value`, the value read as YAML. Errors name the file or override, the key, what
it must be and what it got; an unknown key names the nearest known one.
"""

import difflib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import SafeConstructor

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
    applied = tuple(overrides)
    for override in applied:
        _apply_override(tree, override)
    return _validate(tree, where, applied)


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
    return config_from_dict(_parse_stored(path), str(path))


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
    return flatten(_with_present_names(_parse_stored(path)))


def _parse_stored(path: str | Path) -> dict[str, Any]:
    """The values of a parameter file that a run keeps, which has every value."""
    tree = parse_yaml(_read_text(Path(path)), str(path))
    if not tree:
        raise ConfigError(
            f"{path}: must hold the configuration of a run, but is empty; restore it, or move the run's folder away"
        )
    return tree


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path}: no such parameter file. `maskrcnn recipe shapes_demo` writes one to params.yaml.")
    return read_utf8(path)


def read_utf8(path: Path) -> str:
    """The text of a YAML file, without the byte order mark that some editors put before it.

    Raises:
        ConfigError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
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
        tree = YAML(typ="rt", pure=True).load(text) if comments else _load_yaml(text)
    except (YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: must hold sections ({', '.join(Config.model_fields)}), got a {type(tree).__name__}"
        )
    return tree


class _Constructor(SafeConstructor):
    """Plain values of YAML; text that looks like a date or a time stays as it was written."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _load_yaml(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    return yaml.load(text)


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
        value = _load_yaml(text)
    except (YAMLError, RecursionError) as error:
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


def _validate(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    try:
        # JSON mode: YAML has lists where we have tuples and text where we have paths, but "0.1" is not a number.
        text = json.dumps(tree, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a key that is a list, an anchor within itself
        place = " with ".join(filter(None, (where, " ".join(overrides))))
        raise ConfigError(
            f"{place}: must hold sections of keys with text, numbers, or lists of them, got other YAML ({error})"
        ) from error
    try:
        return Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, where, overrides) for problem in error.errors())) from error


def _explain(problem: Any, where: str, overrides: Sequence[str]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    place = _place(name, where, overrides)
    if name == "extends":
        return (
            f"{place}: extends: only recipes have it; `maskrcnn recipe NAME` writes a recipe's complete parameter file"
        )
    if problem["type"] == "extra_forbidden":
        return f"{place}: {name}: unknown key{_nearest(location)}"
    if problem["type"] == "value_error":
        return f"{place}: {f'{name}: ' if name else ''}{problem['ctx']['error']}"  # the whole file has no name
    return f"{place}: {name}: {problem['msg']}, got {problem['input']!r}"


def _place(name: str, where: str, overrides: Sequence[str]) -> str:
    """The source of a key's value: an override or the file; of a section's values: the file and the overrides in it."""
    given = [(override.partition("=")[0].strip(), override) for override in overrides]
    for key, override in reversed(given):
        if f"{name}.".startswith(f"{key}."):
            return f"override {override!r}"
    within = [override for key, override in given if key.startswith(f"{name}.")]
    return f"{where} with {' '.join(within)}" if within else where


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
