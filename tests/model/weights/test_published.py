"""Detectors that torchvision publishes: constants of ours against its own, and what fetching does."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model_weights

from model.weights.file import WeightsError
from model.weights.published import COCO_CLASSES, COCO_ROWS, Published, fetch, published_detector


@pytest.mark.parametrize(
    ("weights", "task", "name"),
    [
        ("coco", "mask", "maskrcnn_resnet50_fpn"),
        ("coco", "box", "fasterrcnn_resnet50_fpn"),
        ("coco", "proposals", "fasterrcnn_resnet50_fpn"),
        ("coco_v2", "mask", "maskrcnn_resnet50_fpn_v2"),
        ("coco_v2", "box", "fasterrcnn_resnet50_fpn_v2"),
    ],
)
def test_files_and_classes_are_torchvisions(weights: str, task: str, name: str) -> None:
    published = get_model_weights(name)["COCO_V1"]
    assert published_detector(weights, task) == Published(str(published), published.url)
    categories = published.meta["categories"]
    assert len(categories) == COCO_ROWS
    assert {id: name for id, name in enumerate(categories) if name not in ("__background__", "N/A")} == COCO_CLASSES


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Weights as torchvision publishes them: at a URL that ends in the first digits of the file's SHA-256, or of
    another one.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def publish(content: object, digest: str = "") -> Any:
        torch.save(content, tmp_path / "net.pth")
        digest = digest or hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
        path = (tmp_path / "net.pth").rename(tmp_path / f"net-{digest}.pth")
        return Published("Net_Weights.V1", path.as_uri())

    return publish


def test_what_is_fetched_has_the_hash_of_its_name(published: Callable[..., Any], tmp_path: Path) -> None:
    assert fetch(published({"w": torch.ones(2)}))["w"].tolist() == [1, 1]
    with pytest.raises(WeightsError, match=r"cannot be fetched from file:.*net-01234567\.pth.*invalid hash"):
        fetch(published({"w": torch.ones(2)}, "01234567"))
    assert not list((tmp_path / "cache").rglob("*01234567*"))


def test_without_a_network_the_error_says_which_file_goes_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    absent = Published("Net_Weights.V1", (tmp_path / "net-89abcdef.pth").as_uri())
    with pytest.raises(WeightsError) as caught:
        fetch(absent)
    place = tmp_path / "hub" / "checkpoints" / "net-89abcdef.pth"
    message = str(caught.value)
    assert message.startswith("Net_Weights.V1: cannot be fetched from file:")
    assert message.endswith(
        f"(its SHA-256 begins with 89abcdef) and put it at {place}, or give the path of weights that you have"
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.ones(2)}, place)
    assert fetch(absent)["w"].tolist() == [1, 1]


def test_what_is_fetched_runs_nothing(published: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be fetched"):
        fetch(published({"w": torch.ones(2), "x": Trap(tmp_path / "sprung")}))
    assert not (tmp_path / "sprung").exists()
