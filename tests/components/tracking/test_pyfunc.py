"""Requests to the registered model: what it takes as an image and as a parameter, and how it refuses the rest."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from pandas import DataFrame
from PIL import Image

from components.config import Config
from components.tracking.pyfunc import Detector
from model.engine.pointers import last_checkpoint

SETTINGS = {"score_threshold": 0.0, "batch_size": 4}


@pytest.fixture(scope="module")
def detector(trained_run: Config) -> Detector:
    detector = Detector()
    detector.load_context(SimpleNamespace(artifacts={"checkpoint": last_checkpoint(trained_run.train.output_dir)}))
    return detector


def ask(detector: Detector, images: list[Any], params: dict[str, Any]) -> list[dict[str, Any]]:
    return detector.predict(None, DataFrame({0: images}), params)


def encoded(kind: str, color: str = "teal") -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 30), color).save(file, kind)
    return file.getvalue()


def test_an_image_is_bytes_base64_or_any_data_url(detector: Detector) -> None:
    png, jpeg = encoded("PNG"), encoded("JPEG")
    text = base64.b64encode(png).decode()
    given = [
        *(png, bytearray(png), text, text.encode(), f" {text}\n", base64.encodebytes(png).decode(), text.rstrip("=")),
        *(f"data:image/png;base64,{text}", f"DATA:image/PNG;Base64,{text}", f"data:;base64,{text}"),
        *(
            f"data:image/png;name=a.png;base64,{text}",
            f"data:image/png;base64,{quote_from_bytes(text.encode(), safe='')}",
        ),
        *(f"data:image/png,{quote_from_bytes(png)}", f"data:,{quote_from_bytes(png)}"),
        *(f"data:image/png;base64,{text}".encode(), encoded("PPM"), b"P3 40 30 255 " + b"0 128 128 " * 1200),
    ]
    answers = ask(detector, [*given, jpeg, f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"], SETTINGS)
    *same, first, second = [[found["bbox"] for found in answer["detections"]] for answer in answers]
    assert all(answer["size"] == [30, 40] for answer in answers)
    assert len(same[0]) > 0
    assert all(np.allclose(boxes, same[0], atol=0.01) for boxes in same)
    assert np.allclose(first, second, atol=0.01)


def test_what_is_no_image_is_refused_with_its_place(detector: Detector) -> None:
    png = encoded("PNG")
    text = base64.b64encode(png).decode()
    bad = [
        "",
        b"",
        "no image",
        "data:image/png;base64",
        "data:,",
        f"data:image/png;base64,{text[:60]}",
        f"data:image/png,{text}",
    ]
    bad += [
        png[:50],
        f"{text}!",
        None,
        7,
        float("nan"),
        {"b64": text},
        [text],
        "<html></html>",
        "été",
        "https://host/a.png",
    ]
    for image in bad:
        with pytest.raises(MlflowException, match="image 1: must be the bytes of an image file") as refused:
            ask(detector, [png, image], SETTINGS)
        assert refused.value.get_http_status_code() == 400


def test_parameters_out_of_range_are_refused_by_name(detector: Detector) -> None:
    bad: list[tuple[str, Any]] = [
        ("score_threshold", value) for value in (7, -0.1, float("nan"), "0.5", True, None, [0.5])
    ]
    bad += [("batch_size", value) for value in (0, -1, 1.5, "4", True, None)] + [("threshold", 0.5)]
    for name, value in bad:
        with pytest.raises(MlflowException, match=f"params: {name}: .*, got ") as refused:
            ask(detector, [encoded("PNG")], {**SETTINGS, name: value})
        assert refused.value.get_http_status_code() == 400
    assert ask(detector, [encoded("PNG")], {"score_threshold": 1, "batch_size": 1}) == [
        {"size": [30, 40], "detections": []}
    ]


def test_requests_at_the_same_time_take_turns(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, running, most = detector._predictor.objects, 0, 0

    def counted(*images: Any, **options: Any) -> Iterator[Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield from objects(*images, **options)
        running -= 1

    monkeypatch.setattr(detector._predictor, "objects", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda color: ask(detector, [encoded("PNG", color)], SETTINGS), ["teal", "red"] * 4))
    assert most == 1, "each network needs memory of its own"
    assert found[0] == found[2] != found[1]
