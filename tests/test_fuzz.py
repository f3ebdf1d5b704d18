"""Fuzzing: a file of any content is read, or refused with the error that its reader promises.

Here each reader gets a few damaged files. `make fuzz` takes FUZZ_SECONDS (120) for each, with new seeds all the time.
"""

import io
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, features

from components.params import ConfigError, parse_config
from model.data.annotations import read_coco
from model.data.coco_json import AnnotationError
from model.data.rle import rle_runs
from model.data.transforms import UNREADABLE, read_image
from model.weights.file import WeightsError, read_stored_weights

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLES = 500 if SECONDS else 25

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 10}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 6, 6], "segmentation": [[1, 1, 7, 1, 7, 7]]},
        {
            **{"id": 2, "image_id": 1, "category_id": 3, "bbox": [2, 0, 4, 8], "iscrowd": 1, "area": 32.5},
            "segmentation": {"size": [8, 10], "counts": [16, 32, 32]},
        },
    ],
    "categories": [{"id": 3, "name": "cat"}],
}
YAML = b"""train:
  base_lr: 0.01
  lr_steps: [10, 20]
data: {shapes: {seed: 3}, buckets: [[128, 128]], raw_dir: "a b"}
model: &model
  weights: none
evaluate:
  every_epoch: true  # each time
"""


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of the contents after up to five times some bytes were replaced, inserted, removed or repeated."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from((0, 1, 1, 2, 4, 16, len(content))))
        new = draw(
            st.binary(max_size=4) | st.sampled_from((b"", b"\xff" * 4, b"9" * 30, bytes(content[start:stop]) * 2))
        )
        content[start:stop] = new
    return bytes(content)


def fuzz(contents: list[bytes], check: Callable[[bytes], None]) -> None:
    """Check damaged contents, one round, or round after round until SECONDS are over."""

    def counted(content: bytes) -> None:
        nonlocal examples
        examples += 1
        check(content)

    end, number, examples = time.monotonic() + SECONDS, 0, 0
    while number == 0 or time.monotonic() < end:
        chosen = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        chosen(seed(number + int(SECONDS and time.time()))(given(damaged(contents))(counted)))()
        number += 1
    print(f"{examples:,} files")


def test_annotations_of_any_content(tmp_path: Path):
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            coco = read_coco(path, repairs=len(content) % 2 == 0)
        except AnnotationError:
            return
        json.dumps(coco.raw, allow_nan=False)

    path = tmp_path / "a.json"
    repairable = [[[{"x": 1, "y": 1}, {"x": 7, "y": 1}, {"x": 7, "y": 7}]], "[[1, 1, 7, 1, 7, 7]]"]
    mended = {**COCO, "annotations": [{**COCO["annotations"][0], "segmentation": one} for one in repairable]}
    fuzz([json.dumps(COCO).encode(), json.dumps(mended).encode()], check)


def test_run_lengths_of_any_content():
    def check(content: bytes) -> None:
        try:
            runs = rle_runs(content.decode("latin1"))
        except ValueError:
            return
        assert (runs >= 0).all()

    mask = np.random.default_rng(0).random((40, 30)) > 0.7
    fuzz([coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"], b"`0", b"PPPPP"], check)


def test_images_of_any_content():
    def check(content: bytes) -> None:
        try:
            pixels = read_image(io.BytesIO(content))
        except UNREADABLE:
            return
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3

    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    contents = []
    for kind, mode in (
        *(
            ("JPEG", "RGB"),
            ("JPEG", "L"),
            ("JPEG", "CMYK"),
            ("PNG", "RGB"),
            ("PNG", "P"),
            ("PNG", "I;16"),
            ("PNG", "LA"),
        ),
        *(("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("PPM", "L")),
        *(("AVIF", "RGB") for _ in range(features.check("avif"))),
        *(("DDS", "RGB"), ("BLP", "P"), ("JPEG2000", "RGB"), ("MPO", "RGB"), ("TGA", "RGB"), ("ICO", "RGB")),
    ):
        stream, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        image = Image.fromarray(pixels)
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        image.save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
        contents.append(stream.getvalue())
    fuzz(contents, check)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_any_content(tmp_path: Path):
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            stored = read_stored_weights(path)
        except WeightsError:
            return
        assert stored.tensors

    path = tmp_path / "a.pth"
    state = {"model": {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}, "config": {}}
    contents = []
    for is_zip in (True, False):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=is_zip)
        contents.append(stream.getvalue())
    arrays = {"blobs": {"a_w": np.ones((2, 3), dtype=np.float32)}, "average": {"x": np.ones(1)}, "__author__": "x"}
    contents += [pickle.dumps(arrays, protocol) for protocol in (2, 4)]
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    )
    contents.append(len(header).to_bytes(8, "little") + header + bytes(9))  # safetensors
    others = {"a": np.ones(2, dtype=np.longdouble), "b": np.ones((2, 0), dtype=">f2"), 3: np.ones(1, dtype=np.uint16)}
    contents += [
        pickle.dumps({"model": others, "config": 1, "average": average}) for average in ([1], others, {"x": 1})
    ]
    fuzz(contents, check)


def test_parameters_of_any_content():
    def check(content: bytes) -> None:
        try:
            parse_config(content.decode("utf-8", errors="replace"))
        except ConfigError:
            return

    fuzz([YAML], check)
