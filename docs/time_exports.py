"""Processor time of a network and of its exported files, for one image at a time: figures of measurements.md.

    python docs/time_exports.py CHECKPOINT IMAGE_FOLDER ROUNDS FORMAT…

Each format is written for the first bucket of the checkpoint, compared with the network on the folder's first images
that belong to that bucket, and timed. The candidates take turns with each image, on one thread. Processor time counts,
since other work on the machine changes it less than wall time.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from components.inference.programs import compare
from model.config import DataConfig
from model.data.collate import collate, smallest_bucket
from model.data.dataset import Sample
from model.data.transforms import read_image, resize_image, resized_size
from model.engine.checkpoint import load_model
from model.inference.export import Detector, export_detector
from model.inference.formats import FORMATS, Detect
from model.structures import Batch

IMAGES = 2


def batches(data: DataConfig, folder: Path) -> list[Batch]:
    """Batches of one image each: the first that belong to the first bucket."""
    found: list[Batch] = []
    for path in sorted(folder.iterdir()):
        pixels = read_image(path)
        old = (pixels.shape[0], pixels.shape[1])
        size = resized_size(old, data.eval_min_size_px, data.eval_max_size_px)
        if len(found) < IMAGES and smallest_bucket([size], data.buckets) == data.buckets[0]:
            sample = Sample(resize_image(pixels, size), 0, old, seed=0, instances=None)
            found.append(collate([sample], data.buckets[:1]))
    return found


def main(checkpoint: str, images: str, rounds: str, *formats: str) -> None:
    """Print a row per candidate: median processor time per image, differences from the network."""
    torch.set_num_threads(1)
    loaded = load_model(Path(checkpoint), torch.device("cpu"))
    model = loaded.model.eval()
    data = DataConfig.model_validate_json(json.dumps(loaded.config["data"]))
    given = batches(data, Path(images))
    candidates: dict[str, Detect] = {"network": Detector(model)}
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            file_format = FORMATS[name]
            path = Path(folder, f"{name}.{file_format.ending}")
            start, before = time.perf_counter(), time.process_time()
            file_format.save(export_detector(model, data.buckets[0]), path)
            times = time.perf_counter() - start, time.process_time() - before
            print(
                f"{name}: written in {times[0]:.0f} s ({times[1]:.0f} s of this process), {path.stat().st_size:,} bytes"
            )
            candidates[name] = file_format.load(path)
            worst: dict[str, float] = {}
            objects = 0
            for batch in given:
                found, count = compare(model, batch, candidates[name])
                objects += count
                worst = {key: max(value, worst.get(key, 0.0)) for key, value in found.items()}
            print(f"  largest differences on {len(given)} images with {objects} objects: {worst}")
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        with torch.inference_mode():
            for _ in range(int(rounds)):
                for batch in given:
                    for name, detect in candidates.items():
                        before = time.process_time()
                        detect(batch.images, batch.image_sizes)
                        seconds[name].append(time.process_time() - before)
    for name, values in seconds.items():
        ratio = statistics.median(values) / statistics.median(seconds["network"])
        print(f"{name}: {statistics.median(values):.4f} s ({min(values):.4f} to {max(values):.4f}), {ratio:.2f}×")


if __name__ == "__main__":
    main(*sys.argv[1:])
