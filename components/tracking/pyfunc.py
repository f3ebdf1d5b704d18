"""Model that MLflow loads and serves: image files in, objects out.

MLflow runs this file itself, so it may only import the packages logged with it, `model` and `cuda_ops`.

    mlflow.pyfunc.load_model("models:/maskrcnn@champion").predict([Path("photo.jpg").read_bytes()])
    (printf '{"inputs": ["'; base64 < photo.jpg | tr -d '\\n'; printf '"]}') > request.json
    curl -H 'Content-Type: application/json' --data-binary @request.json http://127.0.0.1:5001/invocations

Each image becomes {"size": [height, width], "detections": [objects as in model/inference/predictor.py]}.
"""

import base64
import binascii
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from pandas import DataFrame

from model.data.file_kinds import why_unreadable
from model.data.transforms import UNREADABLE, Pixels, read_image
from model.distributed import pick_device
from model.errors import UserError
from model.inference.predictor import Predictor


class Detector(PythonModel):
    """Network of a checkpoint, on a GPU if there is one."""

    def load_context(self, context: PythonModelContext) -> None:
        self._predictor = Predictor.load(Path(context.artifacts["checkpoint"]), pick_device("auto"))

    def predict(
        self, context: PythonModelContext, model_input: DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Find the objects in each image.

        Args:
            model_input: one column: content of JPEG, PNG or other files that Pillow reads, as bytes or base64.
            params: score_threshold and batch_size, as in the section `predict` of params.yaml.

        Raises:
            MlflowException: if an input is not an image; a server answers 400 then.
        """
        settings = params or {}
        images = [_decode(i, file, self._predictor.pixel_range) for i, file in enumerate(model_input.iloc[:, 0])]
        try:
            found = dict(
                self._predictor.objects(
                    enumerate(images),
                    batch_size=settings["batch_size"],
                    score_threshold=settings["score_threshold"],
                )
            )
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [{"size": list(pixels.shape[:2]), "detections": found[i]} for i, pixels in enumerate(images)]


def _decode(i: int, file: bytes | str, pixel_range: Sequence[float]) -> Pixels:
    content = file.encode() if isinstance(file, str) else file
    # MLflow passes bytes or base64; no image file consists only of base64's characters.
    with suppress(binascii.Error):
        content = base64.b64decode(content.strip(), validate=True)
    try:
        return read_image(BytesIO(content), pixel_range=pixel_range)
    except UNREADABLE as error:
        raise MlflowException.invalid_parameter_value(
            f"image {i}: must be the bytes of an image file, or their base64, but cannot be decoded: "
            f"{why_unreadable(content, error)}"
        ) from error


mlflow.models.set_model(Detector())
