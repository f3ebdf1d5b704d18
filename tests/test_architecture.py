"""The floors of the building, by reading every import: arrows only go down, and each outside system has one door.

A room is a file right below a floor, or a folder there (a wing). An arrow goes from a room to one that it imports.
"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import STAGES, module_of

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = ("pipelines", "maskrcnn", "components", "model", "cuda_ops")  # each may import those to its right
FILES = [path for floor in FLOORS for path in sorted((REPOSITORY / floor).rglob("*.py"))]
SHARED = ("cli", "config", "launch", "params")  # right below components/, beside the stages
OF_MODEL = (
    "config",
    "data_config",
    "distributed",
    "errors",
    "files",
    "structures",
)  # right below model/, beside the wings
OUTSIDE = (".ci", "docs", "setup.py", "tests")  # Python that is part of no floor
CALLED = {"train": {"evaluate"}}  # stages that another stage runs
MAX_ARROWS = {"components": 106, "model": 28}  # one more is a reason to ask whether a name stands in the wrong room
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 60, 6

# Packages that only some files may import: patterns of paths.
DOORS = {
    "mlflow": ("components/tracking/*.py",),
    "kfp": ("components/kubeflow/steps.py", "pipelines/*.py"),
    "kfp_server_api": ("pipelines/*.py",),
    "kubernetes": ("components/cluster/api.py",),
}


def imported(tree: ast.AST) -> set[str]:
    """The full names of all modules that a file imports, inside functions too; a relative one begins with a dot."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
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
        if not package:
            found.append(f"{path} imports {name}; imports are absolute")
        if package in DOORS and not any(Path("/", path).match(f"/{pattern}") for pattern in DOORS[package]):
            found.append(f"{path} imports {name}; only {', '.join(DOORS[package])} may")
        is_benchmark = path.startswith("cuda_ops/benchmark/")  # it measures rivals
        is_needed = package in ("torch", *FLOORS, *sys.stdlib_module_names)
        if floor == "cuda_ops" and package and not is_benchmark and not is_needed:
            found.append(f"{path} imports {name}; cuda_ops needs torch alone")
    return found


def modules(source: str) -> set[str]:
    """What a file imports by full names; `from a import b` gives a.b, be that a module or a name in one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stages_of(path: str, source: str) -> list[str]:
    """The stages that a file of components/ imports and may not; those of kubeflow/ are there to call stages."""
    if not path.startswith("components/") or path.startswith("components/kubeflow/"):
        return []
    allowed = CALLED.get(path.removeprefix("components/").removesuffix(".py"), set())
    stages = {module_of(stage) for stage in {*STAGES} - allowed}
    return [name for name in sorted(modules(source)) if ".".join(name.split(".")[:2]) in stages]


def rooms(floor: str, sources: dict[str, str]) -> dict[str, set[str]]:
    """The rooms of a floor, each with those that it imports. Sources stand by path."""
    room_of = {path: path.removesuffix(".py").split("/")[1] for path in sources if path.startswith(f"{floor}/")}
    arrows: dict[str, set[str]] = {room: set() for room in room_of.values() if room != "__init__"}
    for path, room in room_of.items():
        names = {name.split(".")[1] for name in modules(sources[path]) if name.startswith(f"{floor}.")}
        arrows.get(room, set()).update(names & arrows.keys() - {room})
    return arrows


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
        ("cuda_ops/operators/box_iou.py", "import model.boxes"),
        ("components/train.py", "def f():\n    import mlflow.pytorch"),
        ("model/engine/steps.py", "import mlflow"),
        ("components/train.py", "from kfp import dsl"),
        ("components/kubeflow/context.py", "import kfp"),
        ("pipelines/training.py", "import kubernetes.client"),
        ("cuda_ops/operators/box_iou.py", "from torchvision.ops import nms"),
        ("cuda_ops/operators/box_iou.py", "import scipy.stats"),
        ("cuda_ops/benchmark/box_iou.py", "import model.structures"),
        ("components/studies/seeds.py", "from .. import stability"),
        ("components/studies/seeds.py", "from ..stability import run"),
        ("components/pipelines/new.py", "import kfp"),
        ("components/tracking/new/new.py", "import mlflow"),
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
        ("cuda_ops/operators/box_iou.py", "import math\nimport torch\nfrom cuda_ops import boxes"),
        ("cuda_ops/benchmark/box_iou.py", "from torchvision.ops import nms"),
    ],
)
def test_a_right_import_passes(path: str, source: str):
    assert faults(path, source) == []


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in FILES}


@pytest.mark.parametrize("floor", MAX_ARROWS)
def test_between_rooms_no_arrow_goes_round_and_there_are_few(sources: dict[str, str], floor: str):
    arrows = rooms(floor, sources)
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises where there is a cycle, and names it
    assert sum(map(len, arrows.values())) <= MAX_ARROWS[floor]


def test_rooms_are_files_and_folders_and_a_cycle_of_them_is_found():
    sources = {
        "model/__init__.py": "",
        "model/config.py": "import torch",
        "model/data/__init__.py": "",
        "model/data/index.py": "from model import config\nfrom model.data import rle",
        "model/data/rle.py": "import model.engine.steps",
        "model/engine/steps.py": "def f():\n    from model.data.index import CocoIndex",
    }
    arrows = rooms("model", sources)
    assert arrows == {"config": set(), "data": {"config", "engine"}, "engine": {"data"}}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(arrows).static_order())


def test_only_train_imports_a_stage(sources: dict[str, str]):
    assert not {path: stages for path, source in sources.items() if (stages := stages_of(path, source))}


@pytest.mark.parametrize(
    ("path", "source", "stages"),
    [
        ("components/studies/seeds.py", "from components import stability", ["components.stability"]),
        ("components/studies/seeds.py", "from components.train import run", ["components.train.run"]),
        ("components/studies/seeds.py", "from components.training.loop import Training", []),
        ("components/train.py", "from components import evaluate", []),
        ("components/report.py", "from components import compare", ["components.compare"]),
        ("components/params.py", "import components.recipe", ["components.recipe"]),
        ("components/formats/yolo.py", "from components.import_ import run", ["components.import_.run"]),
        ("components/kubeflow/steps.py", "from components import train", []),
    ],
)
def test_an_import_of_a_stage_is_found(path: str, source: str, stages: list[str]):
    assert stages_of(path, source) == stages


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
    """`self` is not counted; the operators of cuda_ops and their ONNX forms have the signatures of their schemas."""
    with_schemas = ("cuda_ops/", "model/inference/onnx_operators.py")
    found = []
    for path in FILES:
        name = path.relative_to(REPOSITORY).as_posix()
        for function in functions(ast.parse(path.read_text())):
            a = function.args
            arguments = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]
            if len(arguments) > MAX_ARGUMENTS and not name.startswith(with_schemas):
                found.append(f"{name}: {function.name} has {len(arguments)} arguments")
    assert not found, "\n".join(found)


def test_what_names_and_reads_runs_is_quick_to_import():
    """Importing torch takes more than a second, pycocotools and numpy a tenth."""
    light = ("cli", "launch", "recipe", "runs.figures", "runs.identity", "runs.journal", "runs.recipes", "runs.result")
    modules = [*(f"components.{name}" for name in light), "model.files", "model.scoring.names"]
    code = f"import sys, {', '.join(modules)}; print(*{{'torch', 'numpy', 'pycocotools'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    assert done.stdout.split() == []


def test_what_only_some_need_is_imported_by_them():
    """Importing torchvision takes more than a second, matplotlib half of one."""
    for module, absent in (
        ("components.studies.comparison", "torch matplotlib"),
        ("model.weights.load", "torchvision"),
    ):
        command = [sys.executable, "-c", f"import sys, {module}; print(*{{*{absent.split()}}} & {{*sys.modules}})"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True)
        assert done.stdout.split() == [], module


def test_only_a_late_value_is_copied_to_the_host_without_waiting(sources: dict[str, str]):
    """Whoever reads such a copy must first wait for it, which no CPU test notices."""
    copies = re.compile(r"""\((?:"cpu"|CPU|torch\.device\("cpu"\)),\s*non_blocking=True""")
    assert [path for path, source in sources.items() if copies.search(source)] == ["model/engine/late.py"]


def test_right_below_components_lie_stages_and_what_all_of_them_share():
    """What a stage is made of lies in a folder beside them."""
    below = {path.stem for path in (REPOSITORY / "components").glob("*.py")} - {"__init__"}
    assert {f"components.{name}" for name in below - {*SHARED}} == {*map(module_of, STAGES)} - {"pipelines.pipeline"}
    assert {path.stem for path in (REPOSITORY / "model").glob("*.py")} - {"__init__"} == {*OF_MODEL}


def test_what_all_stages_share_is_below_what_they_are_made_of(sources: dict[str, str]):
    arrows = rooms("components", sources)
    assert {room: others for room in SHARED if (others := arrows[room] - {*SHARED})} == {}


def test_python_lies_on_a_floor_and_every_folder_with_some_is_a_package():
    """setup.py finds packages by their __init__.py; what it does not find is missing from the installed program."""
    assert [str(folder) for folder in {path.parent for path in FILES} if not (folder / "__init__.py").is_file()] == []
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout of git, which tells our files from others")
    assert [path for path in listed.stdout.split() if path.split("/")[0] not in (*FLOORS, *OUTSIDE)] == []


def test_every_folder_of_components_and_model_is_on_the_map():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    drawing = text.partition("```mermaid")[2].partition("```")[0]
    for floor in ("components", "model"):
        rooms = {path.parent.name for path in (REPOSITORY / floor).glob("*/__init__.py")}
        assert {f"{floor}/{room}/" for room in rooms if f"`{floor}/{room}/`" not in text} == set()
        assert {room for room in rooms if not re.search(rf"\b{room}\b", drawing)} == set()
