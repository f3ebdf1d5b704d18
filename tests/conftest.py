"""Fixtures that every floor shares."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """80 + 80 real COCO images with annotations; absent outside the team's machines, where such tests skip."""
    path = REPOSITORY.parent / "shared" / "data" / "coco_tiny"
    if not path.is_dir():
        reason = f"real COCO images are not at {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
