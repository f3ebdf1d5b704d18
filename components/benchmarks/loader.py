"""Benchmark of the data loader, `maskrcnn benchmark loader`, against Pillow, OpenCV (if installed) and torchvision.

The images are generated, so no data is needed: 640 × 480, with the spectrum of photographs, saved like COCO's at
quality 90 with full colour, about 100 kB each. Each is resized to 800 × 1066 pixels and flipped. Times are CPU time of
one thread, which other processes do not lengthen.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich import box
from rich.table import Table

from components.config import Config
from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.loader import train_loader
from model.data.transforms import read_image, resize_image, resized_size

_SOURCE = (480, 640)  # (height, width) of most COCO images
_MIN_SIZE_PX, _MAX_SIZE_PX = 800, 1333
_TARGET = resized_size(_SOURCE, _MIN_SIZE_PX, _MAX_SIZE_PX)
_QUALITY = 90
_ROUNDS = 3

Step = Callable[[Path], Any]
Rival = tuple[Step, Step]  # decoding only; decoding, resizing and flipping


def measure(config: Config) -> dict[str, Any]:
    """Measure milliseconds per image of each library, and the throughput of our data loader, as plain data."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = _write_images(folder, config.benchmark.loader_images)
        return {
            "images": len(paths),
            "image_kb": float(np.mean([path.stat().st_size for path in paths])) / 1000,
            "source_size": list(_SOURCE),
            "target_size": list(_TARGET),
            "versions": _versions(),
            "image_ms": _time_rivals(paths),
            "batches": _time_batches(folder, config),
        }


def metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """Figures by MLflow name, such as `time/loader_ours_ms`."""
    batches = report["batches"]
    return {
        **{f"time/loader_{name}_ms": row["whole"] for name, row in report["image_ms"].items()},
        **{f"time/loader_{name}_decode_ms": row["decode"] for name, row in report["image_ms"].items()},
        "time/loader_batch_ms": batches["batch_ms"]["median"],
        "throughput/loader_images_per_s": batches["images_per_s"],
    }


def table(report: dict[str, Any]) -> Table:
    """Format the report; × is the ratio of our time to that of each library."""
    (height, width), (to_height, to_width) = report["source_size"], report["target_size"]
    batches = report["batches"]
    result = Table(
        title=f"JPEG of {height} × {width}, {report['image_kb']:.0f} kB → {to_height} × {to_width}, flipped; CPU ms "
        "per image",
        caption=f"data loader, {batches['workers']} workers, batches of {batches['batch']}: "
        f"{batches['images_per_s']:.3g} images/s, "
        f"a batch in {batches['batch_ms']['median']:.3g} ms (p90 {batches['batch_ms']['p90']:.3g})",
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "decode", "all", "ours ×"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    ours = report["image_ms"]["ours"]["whole"]
    for name, row in report["image_ms"].items():
        result.add_row(name, f"{row['decode']:.3f}", f"{row['whole']:.3f}", f"{ours / row['whole']:.3f}")
    return result


def _write_images(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{k:06d}.jpg" for k in range(count)]
    for k, path in enumerate(paths):
        pixels = _photograph(np.random.default_rng(k))
        Image.fromarray(pixels).save(path, quality=_QUALITY, subsampling=0)
    return paths


def _photograph(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Make noise [h, w, 3] with the spectrum of photographs and correlated channels."""
    height, width = _SOURCE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf  # the mean is set below
    spectra = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency**1.5  # 1.5 gives about 100 kB
    luminance, *colours = np.fft.irfft2(spectra, (height, width))
    planes = [luminance / luminance.std() * 0.9 + colour / colour.std() * 0.44 for colour in colours]
    return np.clip(128 + 55 * np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def _rivals() -> dict[str, Rival]:
    """Available ways to load an image, ours first."""
    rivals: dict[str, Rival] = {"ours": (read_image, _load_ours), "pillow": (_decode_pillow, _load_pillow)}
    with suppress(ImportError):  # OpenCV is optional
        rivals["opencv"] = _opencv()
    with suppress(ImportError, RuntimeError):  # a build of torchvision without image codecs
        rivals["torchvision"] = _torchvision()
    return rivals


def _load_ours(path: Path) -> Any:
    return resize_image(read_image(path), _TARGET, flip=True)


def _decode_pillow(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _load_pillow(path: Path) -> Any:
    with Image.open(path) as image:
        resized = image.convert("RGB").resize(_TARGET[::-1], Image.Resampling.BILINEAR)
        return np.asarray(ImageOps.mirror(resized))


def _opencv() -> Rival:
    cv2: Any = import_module("cv2")  # not a dependency
    cv2.setNumThreads(0)

    def decode(path: Path) -> Any:
        return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)

    def load(path: Path) -> Any:
        return cv2.flip(cv2.resize(decode(path), _TARGET[::-1], interpolation=cv2.INTER_LINEAR), 1)

    return decode, load


def _torchvision() -> Rival:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2 import functional as F

    def decode(path: Path) -> Any:
        return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)

    def load(path: Path) -> Any:
        return F.horizontal_flip(F.resize(decode(path), list(_TARGET), antialias=True))

    return decode, load


def _time_rivals(paths: list[Path]) -> dict[str, dict[str, float]]:
    """Median milliseconds; libraries take turns, so that disturbances affect all."""
    rivals = _rivals()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rivals}
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision deprecates its codecs
        for _ in range(_ROUNDS):
            for name, steps in rivals.items():
                for step, times_ms in zip(steps, times[name], strict=True):
                    step(paths[0])
                    times_ms += [_milliseconds(step, path) for path in paths]
    return {
        name: {"decode": float(np.median(decode)), "whole": float(np.median(whole))}
        for name, (decode, whole) in times.items()
    }


def _milliseconds(step: Step, path: Path) -> float:
    began = time.thread_time()
    step(path)
    return (time.thread_time() - began) * 1000


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread within the context, as in a worker."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _time_batches(folder: Path, config: Config) -> dict[str, Any]:
    """Time training batches at full speed, in wall-clock time."""
    index, batch_size = _index(folder), config.benchmark.batch_sizes[0]
    data = DataConfig(workers=config.data.workers)  # default sizes, for COCO: shorter side 800, longer at most 1333
    with closing(iter(train_loader(index, data, batch_size=batch_size, seed=0))) as batches:
        for _ in range(data.workers + 1):
            next(batches)
        number = -(-len(index) // batch_size)
        stamps = [time.perf_counter()]
        for _ in islice(batches, number):
            stamps.append(time.perf_counter())
    median, p90 = (np.percentile(np.diff(stamps), (50, 90)) * 1000).tolist()
    return {
        "workers": data.workers,
        "batch": batch_size,
        "batches": number,
        "images_per_s": number * batch_size / (stamps[-1] - stamps[0]),
        "batch_ms": {"median": median, "p90": p90},
    }


def _index(folder: Path) -> CocoIndex:
    """Index the images with seven objects each, COCO's average, of 24 vertices."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    instances = []
    for k in range(7):
        outline = (60 * circle + (80 * (k + 1), 240)).astype(np.float32)
        corners = [*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()]
        instances.append(Instance(1, tuple(corners), [outline], is_crowd=False, was_clipped=False))
    names = sorted(path.name for path in folder.glob("*.jpg"))
    images = [IndexedImage(ImageRecord(i, name, *_SOURCE), False, instances) for i, name in enumerate(names)]
    location = images_location(folder, Path(), folder)
    write_index(folder / "train", images, categories={1: "circle"}, data_hash="", origin=location)
    return CocoIndex.open(folder, "train")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("simplejpeg", "pillow", "opencv-python-headless", "opencv-python", "torch", "torchvision"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
