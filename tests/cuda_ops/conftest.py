"""Every test of an operator runs twice: compiled, and in plain torch. Where its CUDA kernels run; random boxes."""

import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import library

RandomBoxes = Callable[..., Tensor]
Seeds = Callable[..., Iterator[int]]
SEED = pytest.StashKey[int]()


@pytest.fixture(params=library.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[library.Backend]:
    """The implementation under test; in CI both must be there."""
    if request.param == "compiled" and not library.HAS_CPU and not os.environ.get("CI"):
        pytest.skip("needs the compiled operators; `python -m cuda_ops` tells why there are none")
    with cuda_ops.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """The module emulator/emulator.py."""
    path = Path(__file__).parent / "emulator" / "emulator.py"
    spec = importlib.util.spec_from_file_location("emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulator(emulation: ModuleType) -> Any:
    """The CUDA kernels on a CPU, built at first use; in CI they must be there."""
    try:
        return emulation.load()
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        return pytest.skip(f"needs g++: {error}")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, backend: library.Backend) -> Iterator[torch.device]:
    """The device of tests of CUDA kernels: a GPU; or the CPU, where the compiled operators then are the emulated
    kernels.

    Emulated, each test has its own order of blocks and threads, and also fails where a kernel did wrong: see emulator/.
    """
    yield from serve_cuda(request)


def serve_cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "gpu":
        yield torch.device("cuda")
        return
    emulator = request.getfixturevalue("emulator")
    emulator.schedule(zlib.crc32(request.node.nodeid.encode()))
    emulator.faults()
    with emulator.serving():
        yield torch.device("cpu")
    assert_no_faults(emulator)


@pytest.fixture(params=["as it is", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda_or_cpu(request: pytest.FixtureRequest, backend: library.Backend) -> Iterator[torch.device]:
    """The device of tests that every implementation passes: the CPU, then as `cuda`."""
    if request.param == "as it is":
        yield torch.device("cpu")
    else:
        yield from serve_cuda(request)


def assert_no_faults(emulator: Any) -> None:
    faults = emulator.faults()
    assert not faults, "\n".join(faults)


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Seeds:
    """`for seed in seeds(200): …` is a loop over random cases; where the test fails, the message names the seed.

    With the fixture `cuda` emulated kernels run each case in another order, and a fault is reported with its seed.
    """
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    is_emulated = "emulated" in (params.get("cuda"), params.get("cuda_or_cpu"))
    emulator = request.getfixturevalue("emulator") if is_emulated else None

    def count(*bounds: int) -> Iterator[int]:
        for seed in range(*bounds):
            request.node.stash[SEED] = seed
            if emulator:
                emulator.schedule(zlib.crc32(f"{request.node.nodeid} {seed}".encode()))
            yield seed
            if emulator:
                assert_no_faults(emulator)
        del request.node.stash[SEED]

    return count


@pytest.fixture(scope="session")
def no_waiting(no_sync: Any) -> Callable[[torch.device], AbstractContextManager[Any]]:
    """`with no_waiting(device): …` fails where the host would wait for the device: a GPU's driver refuses it."""

    @contextmanager
    def by_the_driver() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return lambda device: by_the_driver() if device.type == "cuda" else no_sync()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the seed to the message of a test that failed in a loop of `seeds`."""
    if call.excinfo is not None and SEED in item.stash:
        call.excinfo.value.add_note(f"with seed {item.stash[SEED]}")
    return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out plain torch on the emulator, which runs compiled kernels alone."""
    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    is_void = [
        "emulated" in (row.get("cuda"), row.get("cuda_or_cpu")) and row.get("backend") == "reference" for row in params
    ]
    config.hook.pytest_deselected(items=[item for item, void in zip(items, is_void, strict=True) if void])
    items[:] = [item for item, void in zip(items, is_void, strict=True) if not void]


@pytest.fixture(scope="session")
def random_boxes() -> RandomBoxes:
    """random_boxes(*shape, seed=…, extent=…, whole=…): [*shape, 4] boxes; whole pixels give ties and boxes without
    area.
    """

    def draw(*shape: int, seed: int, extent: float = 100.0, whole: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(*shape, 2, generator=generator) * extent
        side = torch.rand(*shape, 2, generator=generator) ** 2 * extent * 0.6
        boxes = torch.cat((start, start + side), dim=-1)
        return (boxes / 8).round() * 8 if whole else boxes

    return draw
