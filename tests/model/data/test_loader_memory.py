"""What a worker keeps to itself, on an index as large as that of COCO's train split: nothing that grows."""

import multiprocessing
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.loader import train_loader

IMAGES, INSTANCES, VERTICES = 118_000, 860_000, 24
WORKERS, BATCHES, READINGS, BATCH_SIZE = 8, 200, 40, 2
WARM = 5  # batches of each worker before its memory is taken as its own
LIMIT_MIB = 50

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux, whose /proc it reads")


@pytest.fixture(scope="module")
def large_index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    """As many images and polygons as COCO's train split has; the images share one file."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(folder / "shared.jpg")
    angles = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    outline = np.stack([320 + 200 * np.cos(angles), 240 + 200 * np.sin(angles)], axis=1).astype(np.float32)
    instance = Instance(1, (120.0, 40.0, 520.0, 440.0), [outline], is_crowd=False, was_clipped=False)
    bounds = np.linspace(0, INSTANCES, IMAGES + 1).astype(int)
    images = [
        IndexedImage(ImageRecord(i, "shared.jpg", 480, 640), False, [instance] * count)
        for i, count in enumerate(np.diff(bounds).tolist())
    ]
    location = images_location(folder, Path(), folder)
    write_index(folder / "train", images, categories={1: "a"}, data_hash="", origin=location)
    return CocoIndex.open(folder, "train")


def private_mib(pid: int) -> float:
    """Memory that is the process's own, without the batches it has in transit, which lie in shared memory until they
    are taken.

    Pages of the index are the system's, which drops them when memory is wanted.
    """
    kib, is_own = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_own = "/dev/shm/" not in line
        elif is_own and line.startswith("Private_Dirty:"):
            kib += int(line.split()[1])
    return kib / 1024


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """How workers are made: with the memory of this process, or anew."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


@pytest.mark.slow
def test_a_worker_on_an_index_of_118_000_images_grows_by_less_than_50_mib(large_index: CocoIndex, start_method: str):
    assert len(large_index) == IMAGES
    before = {child.pid for child in multiprocessing.active_children()}
    batches = iter(train_loader(large_index, DataConfig(workers=WORKERS), batch_size=BATCH_SIZE, seed=0))
    pids = [child.pid for child in multiprocessing.active_children() if child.pid not in before and child.pid]
    assert len(pids) == WORKERS
    warm = list(
        islice(batches, WARM * WORKERS)
    )  # by then a worker has imported all it needs, and its heap has seen the largest
    start = [private_mib(pid) for pid in pids]
    drawn = sum(len(batch) for batch in [*warm, *islice(batches, BATCHES)])
    # What a worker has in hand comes and goes by tens of MiB; what it keeps is there at each of many readings.
    readings = [[private_mib(pid) for pid in pids] for _ in islice(batches, READINGS)]
    growth = np.min(readings, axis=0) - start
    print(f"{start_method}: MiB after {WARM} batches {np.round(start, 1)}, growth {np.round(growth, 1)}")
    assert drawn == (WARM * WORKERS + BATCHES) * BATCH_SIZE
    assert max(growth) < LIMIT_MIB
    if start_method == "fork":  # all that the worker has besides what it was born with
        assert max(start) + max(growth) < 2 * LIMIT_MIB
