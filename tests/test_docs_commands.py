"""Command lines in the documents are right: each is read by the parser it is for, and what docs/kubeflow.md quotes and
applies is there.
"""

import argparse
import ast
import base64
import importlib
import json
import random
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipelines.cli import STAGES, module_of

REPOSITORY = Path(__file__).resolve().parents[1]
KUBEFLOW = REPOSITORY / "docs" / "kubeflow.md"
# Quoted in the table of failures, but said by pip, Kubernetes, MLflow or the system.
SAID_BY_OTHERS = {
    "ResolutionImpossible", "unbound immediate PersistentVolumeClaims", 'secret "mlflow" not found',
    "Invalid Host header", '… exec: "tini": executable file not found …',
    "PermissionError", "/workspace", "Read-only file system", "train",
    "Temporary failure in name resolution", "CERTIFICATE_VERIFY_FAILED", "No module named 'psycopg'",
    'no matches for kind "Queue" in version "scheduling.volcano.sh/v1beta1"', "ensure CRDs are installed first",
    '"ClusterQueue" in version "kueue.x-k8s.io/v1beta2"', "Insufficient nvidia.com/gpu",
    'storageclass.storage.k8s.io "shared-ssd" not found',
}  # fmt: skip


def markdown_of(document: Path) -> str:
    if document.suffix != ".ipynb":
        return document.read_text()
    cells = json.loads(document.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language; those of none show output."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", markdown_of(document), flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def shell_blocks(document: Path) -> list[str]:
    return blocks(document, "bash")


def command_lines(document: Path) -> list[str]:
    """What stands in a shell block or between backticks and calls our program."""
    lines = [line for block in shell_blocks(document) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(maskrcnn [^`]+)`", markdown_of(document))
    return sorted({line.strip() for line in lines if line.strip().startswith("maskrcnn ") and "<" not in line})


PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES.append(REPOSITORY / "docs" / "tour.ipynb")
DOCUMENTS = [page for page in PAGES if shell_blocks(page)]
EXAMPLES = {"maskrcnn count", "maskrcnn train train.nesterov=true"}  # what CONTRIBUTING.md shows how to add


class ParsedError(Exception):
    """A command line was read without fault."""


@pytest.mark.parametrize(
    "line",
    [line for document in DOCUMENTS for line in command_lines(document) if line not in EXAMPLES],
    ids=lambda line: line[:60],
)
def test_command_lines_are_read_by_their_parsers(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stage's own `main` is called, and left as soon as it has read the command line and the parameters."""
    monkeypatch.chdir(REPOSITORY)
    stage, *words = shlex.split(line, comments=True)[1:]
    assert stage in STAGES
    module = importlib.import_module(module_of(stage))
    if stage == "recipe":
        module.main([*words, *([] if "--list" in words else ["--output", str(tmp_path / "params.yaml")])])
        return

    own = [name for name in ("parse_words", "parse") if hasattr(module, name)]
    owner, name = (module, own[0]) if own else (argparse.ArgumentParser, "parse_args")
    read = getattr(owner, name)

    def read_then_leave(*arguments: Any) -> None:
        read(*arguments)
        raise ParsedError

    monkeypatch.setattr(owner, name, read_then_leave)
    with pytest.raises(ParsedError):
        module.main(words)


@pytest.mark.parametrize("words", [["train", "--skip-tests"], ["train", "train.max_iter=5"], ["pipeline", "compile"]])
def test_a_wrong_command_line_is_found(words: list[str]):
    module = importlib.import_module("pipelines.pipeline" if words[0] == "pipeline" else f"components.{words[0]}")
    with pytest.raises(SystemExit):
        module.main(words[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shell_blocks_are_shell(document: Path):
    for block in shell_blocks(document):
        text = re.sub(r"<[a-z ]+>", "PLACE", block)
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("page", ["docs/serving.md", "components/tracking/pyfunc.py"])
def test_the_request_of_the_served_model_has_room_for_a_photo(page: str, tmp_path: Path):
    """The lines are run as they stand; only the ports are others."""
    received: list[bytes] = []

    class Model(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    text = (REPOSITORY / page).read_text()
    text = ast.get_docstring(ast.parse(text)) or "" if page.endswith(".py") else text
    lines = [line.strip() for line in text.splitlines() if "request.json" in line]
    photo = random.Random(0).randbytes(300_000)
    (tmp_path / "photo.jpg").write_bytes(photo)
    with HTTPServer(("127.0.0.1", 0), Model) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            script = re.sub(r"(?<=127\.0\.0\.1:)\d+", str(server.server_port), "\n".join(lines))
            subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, capture_output=True)
        finally:
            server.shutdown()
            thread.join()
    assert len(received) == text.count("curl ")
    assert all(base64.b64decode(json.loads(request)["inputs"][0]) == photo for request in received)


def test_documents_with_commands_are_found():
    assert {"README.md", "kubeflow.md", "stability.md", "tour.ipynb"} <= {document.name for document in DOCUMENTS}


def test_paths_exist():
    text = re.sub(r"https?://\S+|github\.com/\S+", "", KUBEFLOW.read_text())
    named = set(re.findall(r"(?<![\w/.])(?:k8s|docs|components|recipes|pipelines)/[\w./-]*\w", text))
    assert {"k8s/prepare.yaml", "k8s/overlays/pipelines"} <= named
    assert {path for path in named if not (REPOSITORY / path).exists()} == set()


def test_every_overlay_is_named():
    overlays = {path.name for path in (REPOSITORY / "k8s" / "overlays").iterdir()}
    assert set(re.findall(r"k8s/overlays/([\w-]+)", KUBEFLOW.read_text())) == overlays


@cache
def applied() -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` of the document's own walk makes. Only to be read."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl, which resolves overlays")
    folders = re.findall(r"^kubectl apply -k (k8s/\S+)", "\n".join(shell_blocks(KUBEFLOW)), flags=re.MULTILINE)
    assert folders == ["k8s/overlays/pipelines"]
    command = ["kubectl", "kustomize", str(REPOSITORY / folders[0])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [document for document in YAML(typ="safe").load_all(output) if document]


def test_what_the_walk_waits_for_and_forwards_is_made_by_it():
    made = {(d["kind"].lower(), d["metadata"]["name"]): d["metadata"].get("namespace") for d in applied()}
    made[("job", YAML(typ="safe").load((REPOSITORY / "k8s" / "prepare.yaml").read_text())["metadata"]["name"])] = (
        "kubeflow"
    )
    text = "\n".join(shell_blocks(KUBEFLOW))
    others = {("service", "ml-pipeline-ui")}  # of Kubeflow Pipelines
    named = set(re.findall(r"-n kubeflow [^\n]*\b(service|deployment|job)/([a-z-]+)", text)) - others
    assert named == {("service", "mlflow"), ("deployment", "mlflow"), ("job", "prepare")}
    assert {made[what] for what in named} == {"kubeflow"}
    role = re.search(r"create rolebinding \S+ --role=(\S+)", text)
    assert role is not None
    assert ("role", role[1]) in made


def test_the_secret_has_every_key_that_is_asked_for():
    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["secretKeyRef"]["key"]} if "secretKeyRef" in node else set()
            return own.union(*map(keys, node.values()))
        return set().union(*map(keys, node)) if isinstance(node, list) else set()

    assert set(re.findall(r"--from-literal=([a-z-]+)=", KUBEFLOW.read_text())) == keys(applied())


@cache
def texts_of_our_code() -> list[str]:
    """Every text in our code, as far as it stands in one piece, and the Makefile's."""
    texts = [(REPOSITORY / "Makefile").read_text()]
    for path in [REPOSITORY / "setup.py", *REPOSITORY.glob("components/**/*.py"), *REPOSITORY.glob("pipelines/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def fragments(quoted: str) -> list[str]:
    """The pieces between the places where names and numbers stand, and where the code joins two texts."""
    pieces = re.split(r"…|; check |(?<=exit code )\d+, ", quoted)
    return [piece.strip(" .:;") for piece in pieces if len(piece.strip(" .:;()s,")) > 3]


def in_code(texts: list[str]) -> Callable[[str], bool]:
    return lambda piece: any(piece in text for text in texts)


def test_what_the_table_of_failures_quotes_is_what_the_code_says():
    rows = re.findall(
        r"^\| (.+?) \| .+ \| .+ \|$", KUBEFLOW.read_text().partition("## When a step fails")[2], flags=re.MULTILINE
    )
    quoted = {text for row in rows for text in re.findall(r"`([^`]+)`", row)} - SAID_BY_OTHERS
    assert len(quoted) > 30
    is_said = in_code(texts_of_our_code())
    assert {piece for text in quoted for piece in fragments(text) if not is_said(piece)} == set()


def test_the_output_that_is_shown_is_what_the_code_says():
    shown = blocks(KUBEFLOW, "")
    assert len(shown) == 3
    is_said = in_code(texts_of_our_code())
    for piece in (
        "created in namespace",
        "started after",
        "trained to step",
        "succeeded",
        "the run has ended:",
        "MLflow: experiment",
        "is served",
    ):
        assert is_said(piece)
        assert piece in "".join(shown)
