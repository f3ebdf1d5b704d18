"""The documents name only what exists: parameters, recipes, targets, files."""

import re
from pathlib import Path

import pytest

from components.config import Config
from components.runs.recipes import recipe_names
from pipelines.cli import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@by_document
def test_parameters_exist(document: Path):
    known = set(Config().flat())
    sections = "|".join(Config.model_fields)
    text = re.sub(r"https?://\S+", "", document.read_text())
    named = set(re.findall(rf"(?<![\w./])(?:{sections})\.[a-z][a-z_0-9.]*[a-z0-9](?![\w/*{{(])", text))
    files = {name for name in named if name.endswith((".json", ".yaml", ".py", ".csv", ".md", ".pt", ".pth"))}
    assert {
        name for name in named - files if not any(key == name or key.startswith(f"{name}.") for key in known)
    } == set()


@by_document
def test_stages_and_recipes_exist(document: Path):
    # A namespace and an experiment have the program's name too.
    words = re.findall(r"(?<!-n )(?<!experiment )maskrcnn (?!-)([a-z]+)", document.read_text())
    assert set(words) <= set(STAGES)
    assert set(re.findall(r"maskrcnn recipe ([a-z0-9_]+)", document.read_text())) <= set(recipe_names())


@by_document
def test_make_targets_exist(document: Path):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", document.read_text())) <= targets


@by_document
def test_links_lead_somewhere(document: Path):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert "://" in link or (document.parent / link).exists(), link
