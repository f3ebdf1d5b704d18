"""Processor time of the first picture, from a shell prompt to its drawing: figures of measurements.md.

    python docs/time_first_picture.py PHOTO ROUNDS

The candidates take turns: to import torch, `maskrcnn predict`, and torchvision's Mask R-CNN used as its documentation
does, with threads that spin (OpenMP's default) or sleep between tasks; all with torchvision's file, or one like it, in
torch's cache. The network alone is a second call from Python.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORCHVISIONS = """
import sys, torch
from torchvision.io import decode_image, write_jpeg
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
weights = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
model = maskrcnn_resnet50_fpn(weights=weights).eval()
image = decode_image(sys.argv[1], mode="RGB")
with torch.inference_mode():
    (found,) = model([weights.transforms()(image)])
sure = found["scores"] >= 0.3
drawing = draw_segmentation_masks(image, found["masks"][sure, 0] >= 0.5)
names = [weights.meta["categories"][label] for label in found["labels"][sure].tolist()]
write_jpeg(draw_bounding_boxes(drawing, found["boxes"][sure], names), "drawing.jpg")
"""
ALONE = """
import sys, time, maskrcnn
model = maskrcnn.load("coco", dtype=sys.argv[2])
model(sys.argv[1], threshold=0.3)
before = time.process_time()
model(sys.argv[1], threshold=0.3)
print(time.process_time() - before)
"""


SLEEPING = {"OMP_WAIT_POLICY": "passive"}


def candidates(photo: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command lines and variables by name; the last prints the processor time of a part of it."""
    command = ["-m", "pipelines.cli", "predict", photo, "--weights", "coco", "--threshold", "0.3"]
    return {
        "import torch": (["-c", "import torch"], {}),
        "maskrcnn predict": (command, {}),
        "maskrcnn predict --dtype bfloat16": ([*command, "--dtype", "bfloat16"], {}),
        "torchvision": (["-c", TORCHVISIONS, photo], {}),
        "torchvision, threads sleep": (["-c", TORCHVISIONS, photo], SLEEPING),
        "the network alone": (["-c", ALONE, photo, "trained"], SLEEPING),
        "the network alone, bfloat16": (["-c", ALONE, photo, "bfloat16"], SLEEPING),
    }


def main(photo: str, rounds: str) -> None:
    """Print a row per candidate: least and median processor time and wall time."""
    words = candidates(str(Path(photo).resolve()))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in words}
    root = str(Path(__file__).resolve().parents[1])
    environment = {"PYTHONPATH": root} | os.environ
    for _ in range(int(rounds)):
        for name, (arguments, variables) in words.items():
            with tempfile.TemporaryDirectory() as folder:
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                done = subprocess.run(
                    [sys.executable, *arguments],
                    cwd=folder,
                    env=environment | variables,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            seconds[name].append((float(done.stdout) if name.startswith("the network alone") else used, wall))
    for name, pairs in seconds.items():
        processor, walls = ([pair[i] for pair in pairs] for i in (0, 1))
        print(
            f"{name}: processor {min(processor):.2f} s, median {statistics.median(processor):.2f}; "
            f"wall {min(walls):.2f} s, median {statistics.median(walls):.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
