"""Experiments of DVC in a clone that is deleted: what outlasts it, or was never in git, is in the user's own tree."""

from pathlib import Path

import pytest

from components.config import TrackingConfig
from components.datasets.shared import link_raw
from components.runs.experiment import in_working_tree, working_tree
from components.tracking.server import MlflowServer
from cuda_ops import library
from model.config import DataConfig, ShapesConfig
from model.data.synthetic import write_shapes

SHAPES = ShapesConfig(train_images=1, val_images=1, height_px=64, width_px=64, crowd_probability=0.0)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's tree, from which an experiment runs in the current directory, a clone of it."""
    clone = tmp_path / "tree" / ".dvc" / "tmp" / "exps" / "clone"
    (clone / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(clone)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "tree"))
    return tmp_path / "tree"


def test_only_in_a_clone_do_relative_paths_start_in_the_tree(tree: Path, monkeypatch: pytest.MonkeyPatch):
    assert in_working_tree(Path("a")) == tree / "a"
    assert in_working_tree(Path("/a")) == Path("/a")
    Path("part").mkdir()
    monkeypatch.chdir("part")  # of a repository whose part is ours
    assert working_tree() == tree / "part"
    for folder in (tree, tree / "part"):  # a stage of `dvc repro`
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        assert working_tree() is None
    monkeypatch.delenv("DVC_ROOT")
    assert in_working_tree(Path("a")) == Path("a")


def test_runs_go_to_the_database_of_the_tree_under_its_configured_name(tree: Path):
    uri = TrackingConfig().uri
    server = MlflowServer(uri, "e", "r")
    assert server.uri == uri  # so the tree continues the run after `dvc exp apply`
    assert server._full_uri == f"sqlite:///{tree}/mlflow.db"
    for elsewhere in ("sqlite:////a/b.db", "http://mlflow:5000"):
        assert MlflowServer(elsewhere, "e", "r")._full_uri == elsewhere


def test_raw_data_of_the_tree_are_linked_unless_others_are_wanted(tree: Path):
    write_shapes(SHAPES, tree / "raw")
    data = DataConfig(source="shapes", shapes=SHAPES, raw_dir=Path("raw"))
    link_raw(data.model_copy(update={"shapes": SHAPES.model_copy(update={"seed": 1})}))
    assert not Path("raw").exists()
    link_raw(data)
    assert not write_shapes(SHAPES, Path("raw"))  # it is complete
    assert Path("raw").resolve() == tree / "raw"
    link_raw(data.model_copy(update={"source": "coco2017", "raw_dir": Path("data/coco")}))
    assert Path("data/coco").resolve(strict=True) == tree / "data/coco"


def test_the_library_of_the_tree_serves_a_clone_with_the_same_sources(tree: Path, monkeypatch: pytest.MonkeyPatch):
    for root in (tree, Path()):
        (root / "cuda_ops" / "csrc").mkdir(parents=True)
        (root / "cuda_ops" / "csrc" / "a.cpp").write_text("int a;")
    (tree / "cuda_ops" / "_C.abi3.so").touch()
    monkeypatch.setattr(library, "__file__", str(Path("cuda_ops/library.py").absolute()))
    assert library.find() == tree / "cuda_ops" / "_C.abi3.so"
    Path("cuda_ops/csrc/a.cpp").write_text("int b;")
    assert library.find() is None
    Path("cuda_ops/_C.abi3.so").touch()
    assert library.find() == Path("cuda_ops/_C.abi3.so").absolute()
