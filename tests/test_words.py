"""Words of docstrings, comments and documents: subject first, the field's terms, lines of at most 120 columns."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("components", "cuda_ops", "model", "pipelines", "docs", ".ci")
# First words that leave a description without a subject: "Of one image." instead of "Objects found in one image."
MID_AIR = re.compile(r"(as|by|how|of|such|that|those|what|where|whether|which|whose|why)\b", re.IGNORECASE)
BANNED = {
    r"\bthe seed'?s?\b (code|document|README)|\bseed's \"": "NVIDIA's README, or its code; a seed is a random seed",
    r"\btold\b": "reason, message, reported",
    r"\btroubles?\b": "failure, error",
    r"\bthrough and through\b": "recursively",
    r"(?<!=)\bmend(s|ed|ing)?\b": "fix",  # but data.on_invalid=mend
    r"\bwhoever\b|\bsomebody\b": "the subject's name",
}
# Documents: pages, and other files whose comments people read.
DOCUMENTS = (
    *("*.md", "docs/*.md", "docs/tour.ipynb", "Makefile", "Dockerfile", ".ci/*", ".ci/gpu/*"),
    *("*.yaml", "stability/*.yaml", "recipes/*.yaml", "k8s/**/*.yaml"),
)
BANNED_IN_DOCUMENTS = {
    r"\bby heart\b": "overfit",
    r"\b(other work|tests?|trainings?) beside (it|them|both)\b": "running",
    r"\bfor want of\b": "without, because there is no",
    r"\b(built|made|trained) anew\b": "rebuilt, regenerated, retrained",
    r"\bwithout a word\b|\bin silence\b": "silently",
    r"\bone's own\b": "your own",
    r"\bto be learned\b": "measured, tested",
    r"\btwins?\b": "version in plain torch",
}
MAX_COLUMNS = 120
# Files of all kinds whose lines are limited; those of Markdown are limited outside of tables (tests/test_docs.py).
FILES = (
    *(
        "*.py",
        "tests/**/*.py",
        "Makefile",
        "Dockerfile",
        "*.yaml",
        "*.toml",
        ".ci/*",
        ".ci/gpu/*",
        "docs/*.py",
        "stability/*.yaml",
    ),
    *(f"{package}/**/*.py" for package in ("components", "cuda_ops", "model", "pipelines")),
    *("components/reports/templates/*.[chj]*", "cuda_ops/csrc/**/*.*", "k8s/**/*.yaml", "recipes/*.yaml"),
)
_PRAGMA = re.compile(r"#\s*(noqa|type:|fmt:|ruff:)")


class Prose(NamedTuple):
    """A docstring or a comment; consecutive lines of comments are one."""

    where: str  # path:line
    text: str
    columns: int  # width of its longest line


@cache
def prose() -> list[Prose]:
    """All docstrings and comments of Python files in PACKAGES."""
    found: list[Prose] = []
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name, source = path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
            found += [*docstrings(name, source), *comments(name, source)]
    return found


def docstrings(name: str, source: str) -> Iterator[Prose]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                first, last = node.body[0].lineno, node.body[0].end_lineno
                columns = max(map(len, lines[first - 1 : last]))
                yield Prose(f"{name}:{first}", text, columns)


def comments(name: str, source: str) -> Iterator[Prose]:
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _PRAGMA.match(token.string):
            continue
        is_alone = token.line.lstrip().startswith("#")
        if block and not (is_alone and token.start == (block[-1].start[0] + 1, block[-1].start[1])):
            yield _comment(name, block)
            block = []
        block.append(token)
    if block:
        yield _comment(name, block)


def _comment(name: str, block: list[tokenize.TokenInfo]) -> Prose:
    text = "\n".join(token.string.lstrip("# ") for token in block)
    return Prose(f"{name}:{block[0].start[0]}", text, max(token.end[1] for token in block))


def documents() -> Iterator[Prose]:
    """Lines of pages and of the tour, and of comments in the other DOCUMENTS."""
    for path in sorted(path for pattern in DOCUMENTS for path in REPOSITORY.glob(pattern) if path.is_file()):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        elif path.suffix != ".md":
            text = comments_of(text)
        yield from document_lines(path.relative_to(REPOSITORY).as_posix(), text)


def document_lines(name: str, text: str) -> Iterator[Prose]:
    """The lines of a text, without what is between backticks."""
    for number, line in enumerate(re.sub(r"`[^`\n]*`", "``", text).splitlines(), start=1):
        yield Prose(f"{name}:{number}", line, len(line))


def comments_of(text: str) -> str:
    """The comment in each line, or an empty line."""
    return "\n".join((re.search(r"(?:^|\s)#+(?:\s.*|$)", line) or [""])[0] for line in text.splitlines())


def test_docstrings_and_comments_have_a_subject():
    assert [f"{one.where}: {one.text.splitlines()[0]}" for one in prose() if MID_AIR.match(one.text)] == []


def test_docstrings_and_comments_use_the_words_of_the_field():
    faults = [
        f"{one.where}: {match[0]!r}; say {better}"
        for one in prose()
        for banned, better in BANNED.items()
        if (match := re.search(banned, one.text, re.IGNORECASE))
    ]
    assert faults == []


def test_documents_use_the_words_of_the_field():
    faults = [
        f"{one.where}: {match[0]!r}; say {better}"
        for one in documents()
        for banned, better in (BANNED | BANNED_IN_DOCUMENTS).items()
        if (match := re.search(banned, one.text, re.IGNORECASE))
    ]
    assert faults == []


def test_lines_of_docstrings_and_comments_end_at_120_columns():
    assert [f"{one.where}: {one.columns} columns" for one in prose() if one.columns > MAX_COLUMNS] == []


def test_lines_of_all_other_files_end_at_120_columns():
    files = [path for pattern in FILES for path in REPOSITORY.glob(pattern) if path.is_file()]
    assert {".py", ".css", ".html", ".js", ".cu", ".yaml", ""} <= {path.suffix for path in files}
    lines = [(path, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [f"{path}: {line}" for path, line in lines if len(line) > MAX_COLUMNS] == []


def test_both_kinds_of_prose_are_found():
    source = '''"""Module."""


def f():
    """Of one image."""
    x = 1  # of a
    # One comment
    # of two lines.
    return x  # noqa: F821
'''
    assert [(one.where, one.text) for one in docstrings("a.py", source)] == [
        ("a.py:1", "Module."),
        ("a.py:5", "Of one image."),
    ]
    assert [(one.where, one.text) for one in comments("a.py", source)] == [
        ("a.py:6", "of a"),
        ("a.py:7", "One comment\nof two lines."),
    ]
    assert len(prose()) > 1000


def test_all_kinds_of_documents_are_found():
    assert [one.text for one in document_lines("a.md", "Say `told` once.\nTwice.")] == ["Say `` once.", "Twice."]
    assert comments_of("a: 1  # of a\n\nurl: http://x/#y\n## two") == " # of a\n\n\n## two"
    found = {one.where.split(":")[0] for one in documents()}
    assert {"README.md", "docs/kubeflow.md", "docs/tour.ipynb", "k8s/job/pod.yaml", "Makefile", ".ci/run"} <= found
