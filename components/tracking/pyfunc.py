"""Model that MLflow loads and serves: image files in, objects out.

MLflow runs this file itself, so it may only import the packages logged with it, `model` and `cuda_ops`.

    mlflow.pyfunc.load_model("models:/maskrcnn@champion").predict([Path("photo.jpg").read_bytes()])
    (printf '{"inputs": ["'; base64 < photo.jpg | tr -d '\\n'; printf '"]}') > request.json
    curl -H 'Content-Type: application/json' --data-binary @request.json http://127.0.0.1:5001/invocations

Each image becomes {"size": [height, width], "detections": [objects as in model/inference/predictor.py]}.
"""

import base64
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from pandas import DataFrame
from pydantic import PositiveInt, ValidationError

from model.config import Fraction, Section
from model.data.file_kinds import why_unreadable
from model.data.transforms import UNREADABLE, Pixels, read_image
from model.distributed import pick_device
from model.errors import UserError
from model.inference.predictor import Predictor


class Settings(Section):
    """Parameters of a request, as in the section `predict` of params.yaml."""

    score_threshold: Fraction
    batch_size: PositiveInt


class Detector(PythonModel):
    """Network of a checkpoint, on a GPU if there is one."""

    def load_context(self, context: PythonModelContext) -> None:
        self._predictor = Predictor.load(Path(context.artifacts["checkpoint"]), pick_device("auto"))
        self._turn = Lock()  # MLflow's server has a thread per request; networks side by side only need more memory

    def predict(
        self, context: PythonModelContext, model_input: DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Find the objects in each image.

        Args:
            model_input: one column: content of JPEG, PNG or other files that Pillow reads: bytes, base64, data URLs.
            params: see Settings; the signature has their defaults.

        Raises:
            MlflowException: if an input is not an image, or a parameter out of range; a server answers 400 then.
        """
        settings = _settings(params)
        images = [_decode(i, file, self._predictor.pixel_range) for i, file in enumerate(model_input.iloc[:, 0])]
        try:
            with self._turn:
                found = dict(
                    self._predictor.objects(
                        enumerate(images),
                        batch_size=settings.batch_size,
                        score_threshold=settings.score_threshold,
                    )
                )
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [{"size": list(pixels.shape[:2]), "detections": found[i]} for i, pixels in enumerate(images)]


def _settings(params: dict[str, Any] | None) -> Settings:
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in (params or {}).items()}
    try:
        return Settings.model_validate(plain, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise MlflowException.invalid_parameter_value(
            f"params: {name}: {problem['msg']}, got {problem['input']!r}"
        ) from error


def _decode(i: int, file: Any, pixel_range: Sequence[float]) -> Pixels:
    if isinstance(file, bytes | bytearray):
        with suppress(*UNREADABLE):  # an image file, or else text
            return read_image(BytesIO(file), pixel_range=pixel_range)
    content = file if isinstance(file, bytes) else b""
    try:
        content = _from_text(file)
        return read_image(BytesIO(content), pixel_range=pixel_range)
    except UNREADABLE as error:
        raise MlflowException.invalid_parameter_value(
            f"image {i}: must be the bytes of an image file, their base64, or a data URL of them, but cannot be "
            f"decoded: {why_unreadable(content, error) if content else error}"
        ) from error


def _from_text(text: Any) -> bytes:
    """Decode base64, or the data of a data URL (RFC 2397).

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(text, bytes | bytearray):
        text = text.decode("ascii", errors="strict")
    if not isinstance(text, str):
        raise ValueError(f"got {type(text).__name__}")
    text = "".join(text.split())  # MLflow's clients break lines
    if text[:5].lower() == "data:":
        header, comma, data = text[5:].partition(",")
        if not comma:
            raise ValueError("a data URL has a comma before its data")
        if not header.lower().endswith(";base64"):
            return unquote_to_bytes(data)
        text = unquote(data)
    if not text:
        raise ValueError("it is empty")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


mlflow.models.set_model(Detector())
