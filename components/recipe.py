"""Write a recipe, complete and with comments, as the parameter file that every stage reads.

    maskrcnn recipe --list
    maskrcnn recipe coco2017_r50_fpn_1x train.base_lr=0.01

A file that this command wrote is overwritten. One that has been edited since, or came from elsewhere, stays unless
--force is given.
"""

import argparse
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from components.cli import path_argument, user_errors
from components.config import Config
from components.runs.recipes import RecipeError, load_recipe, read_header, read_recipe, recipe_names
from model.config import Section

_NOT_STATED = "not stated"
_KEYS = "# Keys: model/config.py, model/data_config.py and components/config.py say what each means and allows.\n"
# The first line of a written file. The fingerprint is of the command and of all lines below: an edit of either shows.
_WRITTEN = re.compile(r"# Written by: (?P<command>.*) \(fingerprint (?P<fingerprint>[0-9a-f]+)\)")
# Text that YAML 1.1 and 1.2 both read as it stands; other text is quoted.
_PLAIN = re.compile(r"([A-Za-z_/]|\.\.?/)[\w./:=-]*(?<!:)|\d+[KMGT]i", re.ASCII)
_PLAIN_IN_LIST = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


@dataclass(frozen=True)
class RecipeResult:
    """The recipe that was written, and where to."""

    recipe: str
    output: Path


def run(name: str, overrides: Sequence[str] = (), *, output: Path, force: bool = False) -> RecipeResult:
    """Write the recipe `name`, complete, with overrides applied and comments kept, to `output`.

    Raises:
        RecipeError: if there is no such recipe, or `output` is not as this function wrote it and `force` is false.
        ConfigError: if an override cannot be used.
    """
    text = recipe_text(name, overrides)
    if output.is_dir():
        raise RecipeError(f"{output}: must be a file, is a folder; name a file in it with --output FILE")
    if output.is_file() and not force:  # others, such as /dev/stdout, hold nothing that could be lost
        _refuse_to_lose(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return RecipeResult(name, output)


def recipe_text(name: str, overrides: Sequence[str] = ()) -> str:
    """The parameter file of a recipe: the command that writes it, the recipe's header, every value with its comment.

    Raises:
        RecipeError, ConfigError: as `run`.
    """
    recipe = read_recipe(name)
    config = recipe.overridden(overrides)
    values = "\n".join(_lines(Config, config.model_dump(mode="json"), recipe.comments))
    content = f"{recipe.header}{_KEYS}{values}\n"
    command = " ".join(shlex.join(["maskrcnn", "recipe", name, *overrides]).split())  # on one line
    return f"# Written by: {command} (fingerprint {_fingerprint(command, content)})\n{content}"


@dataclass(frozen=True)
class Summary:
    """The header of a recipe, in parts."""

    name: str
    purpose: str
    hardware: str
    time: str  # with its origin: measured, cited or computed
    ap: str

    def __str__(self) -> str:
        return (
            f"{self.name}\n  {self.purpose}\n"
            f"  Hardware: {self.hardware}\n  Time:     {self.time}\n  AP:       {self.ap}"
        )


def list_recipes() -> list[Summary]:
    """All recipes, by name."""
    return [_summary(name, read_header(name)) for name in recipe_names()]


def _summary(name: str, header: str) -> Summary:
    """The first line is the purpose; `# Word: …` is what the word names, with the indented lines that follow it."""
    unfolded = re.sub(r"\n#  +", " ", header)
    purpose, *lines = [line[1:].strip() for line in unfolded.splitlines()] or [""]
    parts = {word: text.strip() for word, _, text in (line.partition(":") for line in lines)}
    hardware, time, ap = (parts.get(word, _NOT_STATED) for word in ("Hardware", "Time", "AP"))
    return Summary(name, purpose or _NOT_STATED, hardware, time, ap)


def _refuse_to_lose(output: Path) -> None:
    """Raise a RecipeError unless `output` is as `run` wrote it."""
    first, _, content = output.read_text(encoding="utf-8", errors="replace").partition("\n")
    written = _WRITTEN.fullmatch(first)
    if written is None:
        reason = "must be a file that `maskrcnn recipe` wrote, but its first line does not say so"
    elif written["fingerprint"] != _fingerprint(written["command"], content):
        reason = f"must be as `{written['command']}` wrote it, but has been edited"
    else:
        return
    raise RecipeError(
        f"{output}: {reason}; it would be overwritten. Pass --force, or write elsewhere with --output FILE"
    )


def _fingerprint(command: str, content: str) -> str:
    """A hash that every edit changes, but neither other ends of lines nor a newline at the end of the file."""
    return hashlib.sha256(f"{command}\n{content.rstrip()}".encode()).hexdigest()[:16]


def _lines(
    section: type[Section], values: Mapping[str, Any], comments: Mapping[str, str], prefix: str = ""
) -> Iterator[str]:
    """A section's keys in the order of their declaration, each with the recipe's comment, or else with its field's."""
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
        return value if plain.fullmatch(value) and value.lower() not in _NOT_TEXT else _quoted(value)
    if isinstance(value, float) and 1e-9 < abs(value) < 1e16:
        return f"{Decimal(repr(value)):f}"  # 0.00004 for 4e-05
    return json.dumps(value)


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
    parser.add_argument("--output", type=path_argument, default=Path("params.yaml"), help="file to write (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that has been edited")
    parser.add_argument("--list", action="store_true", help="list the recipes, each with its hardware, time and AP")
    args = parser.parse_intermixed_args(argv)
    with user_errors():
        if args.list or not args.name:
            print("\n\n".join(str(recipe) for recipe in list_recipes()))
            return
        result = run(args.name, args.overrides, output=args.output, force=args.force)
        dvc = "`dvc repro`, or " if Path("dvc.yaml").is_file() else ""
        done = f"{result.output}: {result.recipe}; now run {dvc}`maskrcnn download`, `prepare`, `train`, …"
        print(done, file=sys.stderr)  # --output may be /dev/stdout
        if warning := load_recipe(args.name, args.overrides).train.warmup_warning:
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
