"""The floors of the building, by reading every import: arrows only go down, and each outside system has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = ("pipelines", "components", "model", "cuda_ops")  # each may import those to its right
FILES = [path for floor in FLOORS for path in sorted((REPOSITORY / floor).rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 60, 6

# Packages that only some files may import: patterns of paths.
DOORS = {
    "mlflow": ("components/tracking/*.py",),
    "kfp": ("components/kubeflow/steps.py", "pipelines/*.py"),
    "kfp_server_api": ("pipelines/*.py",),
    "kubernetes": ("components/cluster/api.py",),
}


def imported(tree: ast.AST) -> set[str]:
    """The full names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return names


def faults(path: str, source: str) -> list[str]:
    """What a file of this path may not import, but does."""
    floor = path.split("/")[0]
    above = FLOORS[: FLOORS.index(floor)]
    found = []
    for name in sorted(imported(ast.parse(source))):
        package = name.split(".")[0]
        if package in above:
            found.append(f"{path} imports {name}, which lies above it")
        if package in DOORS and not any(Path(path).match(pattern) for pattern in DOORS[package]):
            found.append(f"{path} imports {name}; only {', '.join(DOORS[package])} may")
        is_benchmark = path == "cuda_ops/benchmark.py"  # it measures rivals
        if (
            floor == "cuda_ops"
            and not is_benchmark
            and package in ("torchvision", "numpy", "PIL", "pycocotools", "pydantic")
        ):
            found.append(f"{path} imports {name}; cuda_ops needs torch alone")
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_floor_is_looked_at():
    assert {path.relative_to(REPOSITORY).parts[0] for path in FILES} == set(FLOORS)


def test_imports_only_go_down_and_pass_through_the_doors():
    found = [fault for path in FILES for fault in faults(path.relative_to(REPOSITORY).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/engine/steps.py", "from components.tracking.tracker import Tracker"),
        ("cuda_ops/ops.py", "import model.boxes"),
        ("components/train.py", "def f():\n    import mlflow.pytorch"),
        ("model/engine/steps.py", "import mlflow"),
        ("components/train.py", "from kfp import dsl"),
        ("components/kubeflow/context.py", "import kfp"),
        ("pipelines/training.py", "import kubernetes.client"),
        ("cuda_ops/ops.py", "from torchvision.ops import nms"),
        ("cuda_ops/benchmark.py", "import model.structures"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str):
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("components/tracking/tracker.py", "import mlflow\nfrom model.config import TrainConfig"),
        ("pipelines/training.py", "from kfp import dsl\nimport components.kubeflow.steps"),
        ("model/network/rpn.py", "from cuda_ops import batched_nms"),
        ("cuda_ops/benchmark.py", "from torchvision.ops import nms"),
    ],
)
def test_a_right_import_passes(path: str, source: str):
    assert faults(path, source) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_files_and_functions_are_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(text)) if f.end_lineno is not None}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.read_text().strip()], ids=lambda f: f.relative_to(REPOSITORY).as_posix()
)
def test_a_file_opens_with_a_legend(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_a_function_has_six_arguments_at_most():
    """`self` is not counted; the operators of cuda_ops have the signatures of their schemas."""
    found = []
    for path in FILES:
        name = path.relative_to(REPOSITORY).as_posix()
        for function in functions(ast.parse(path.read_text())):
            a = function.args
            arguments = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]
            if len(arguments) > MAX_ARGUMENTS and not name.startswith("cuda_ops/"):
                found.append(f"{name}: {function.name} has {len(arguments)} arguments")
    assert not found, "\n".join(found)


def test_what_names_and_reads_runs_is_quick_to_import():
    """Importing torch takes more than a second, pycocotools and numpy a tenth."""
    light = ("cli", "launch", "recipe", "runs.figures", "runs.identity", "runs.journal", "runs.result")
    modules = [*(f"components.{name}" for name in light), "model.files", "model.scoring.names"]
    told = f"import sys, {', '.join(modules)}; print(*{{'torch', 'numpy', 'pycocotools'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", told], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    assert done.stdout.split() == []


def test_right_below_components_lie_stages_and_what_all_of_them_share():
    """What a stage is made of lies in a folder beside them."""
    below = {path.stem for path in (REPOSITORY / "components").glob("*.py")} - {"__init__"}
    assert below - {"cli", "config", "launch", "params"} == {*STAGES} - {"pipeline"}
