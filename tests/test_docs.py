"""The documents name only what exists: parameters, recipes, targets, files, sections. They are short, and their lines
too.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config import Config
from components.runs.recipes import recipe_names
from pipelines.cli import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
DOCUMENTS = [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "SECURITY.md", *PAGES]
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
MAX_README_LINES, MAX_COLUMNS = 150, 120
# The examples of CONTRIBUTING.md: what they would add.
EXAMPLES = {
    "train.nesterov",
    *("components/count.py", "components/counting/", "tests/components/test_count.py", "count"),
    *("cuda_ops/operators/clip_boxes.py", "cuda_ops/benchmark/clip_boxes.py", "tests/cuda_ops/test_clip_boxes.py"),
    *("cuda_ops/csrc/clip_boxes.h", "cuda_ops/csrc/clip_boxes.cpp", "cuda_ops/csrc/cuda/clip_boxes.cu"),
    *("recipes/mask_rcnn_r50_fpn_4x.yaml", "mask_rcnn_r50_fpn_4x"),
}


@by_document
def test_parameters_exist(document: Path):
    known = set(Config().flat()) | EXAMPLES
    sections = "|".join(Config.model_fields)
    text = re.sub(r"https?://\S+|^ *from .+ import .+$", "", document.read_text(), flags=re.MULTILINE)
    named = set(re.findall(rf"(?<![\w./])(?:{sections})\.[a-z][a-z_0-9.]*[a-z0-9](?![\w/*{{(])", text))
    files = {name for name in named if name.endswith((".json", ".yaml", ".py", ".csv", ".md", ".pt", ".pth"))}
    assert {
        name for name in named - files if not any(key == name or key.startswith(f"{name}.") for key in known)
    } == set()


@by_document
def test_stages_and_recipes_exist(document: Path):
    # A namespace and an experiment have the program's name too.
    words = re.findall(r"(?<!-n )(?<!experiment )maskrcnn (?!-)([a-z]+)", document.read_text())
    assert set(words) <= {*STAGES} | EXAMPLES
    recipes = {*recipe_names()} | EXAMPLES
    assert set(re.findall(r"maskrcnn recipe ([a-z0-9_]+)", document.read_text())) <= recipes


@by_document
def test_make_targets_exist(document: Path):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    text = document.read_text()
    code = "\n".join(set(text.splitlines()) - set(prose(text)))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    assert set(re.findall(r"^make ([a-z-]+)", code, flags=re.MULTILINE)) <= targets


@by_document
def test_files_between_backticks_exist(document: Path):
    if document.name == "measurements.md":  # which tells of former commits too
        return
    folders = "components|model|cuda_ops|pipelines|recipes|stability|k8s|tests|docs|\\.ci"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text())) - EXAMPLES
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


def sections(document: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for path, section in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        target = document.parent / path if path else document
        if "://" not in path and not (target.exists() and (not section or section in sections(target))):
            broken.append(f"{path}#{section}")
    return broken


@pytest.mark.parametrize("document", [*DOCUMENTS, REPOSITORY / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    assert broken_links(document, document.read_text()) == []


def test_a_broken_link_is_found():
    text = (
        "[a](docs/gpu.md), [b](docs/no.md), [c](docs/kubeflow.md#beyond-the-demo), "
        "[d](docs/kubeflow.md#smaller), [e](https://x.org)"
    )
    assert broken_links(README, text) == ["docs/no.md#", "docs/kubeflow.md#smaller"]


def test_links_of_the_tour_lead_somewhere():
    tour = REPOSITORY / "docs" / "tour.ipynb"
    assert broken_links(tour, "".join("".join(cell["source"]) for cell in json.loads(tour.read_text())["cells"])) == []


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    links = re.findall(r"\]\(([^)#]+)\)", text)
    others = ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "docs/tour.ipynb"]
    assert {*others, *(f"docs/{page.name}" for page in PAGES)} <= set(links)


def test_badges_say_what_setup_allows():
    setup = (REPOSITORY / "setup.py").read_text()
    minors = re.search(r"for minor in \((\d+),.* (\d+)\)", setup)
    torch = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', setup)
    assert minors is not None
    assert torch is not None
    assert f"badge/python-3.{minors[1]}_to_3.{minors[2]}-" in README.read_text()
    assert f"badge/pytorch-2.{torch[1]}_to_2.{int(torch[2]) - 1}-" in README.read_text()


def test_every_stage_is_in_the_table_of_stages():
    rows = re.findall(r"^\| `(\w+)`", (REPOSITORY / "docs" / "runs.md").read_text(), flags=re.MULTILINE)
    assert set(rows) == set(STAGES)


def prose(text: str) -> Iterator[str]:
    """The lines outside of tables and code blocks."""
    is_code = False
    for line in text.splitlines():
        is_code ^= line.lstrip().startswith("```")
        if not is_code and not line.startswith("|"):
            yield line


@pytest.mark.parametrize("document", [*DOCUMENTS, REPOSITORY / "CHANGELOG.md"], ids=lambda path: path.name)
def test_lines_of_prose_end_in_time(document: Path):
    assert [line for line in prose(document.read_text()) if len(line) > MAX_COLUMNS] == []
