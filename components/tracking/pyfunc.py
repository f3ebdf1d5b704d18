"""The model as MLflow loads and serves it: files of images in, objects out. MLflow runs this very file, so it must need nothing
but the packages logged beside it: `model` and `cuda_ops`.

    mlflow.pyfunc.load_model("models:/maskrcnn@champion").predict([Path("photo.jpg").read_bytes()])
    curl -d '{"inputs": ["<base64 of photo.jpg>"]}' -H 'Content-Type: application/json' http://127.0.0.1:5001/invocations

Each image becomes {"size": [height, width], "detections": [objects as in model/inference/predictor.py]}.
"""

import base64
import binascii
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from pandas import DataFrame

from model.data.transforms import UNREADABLE, Pixels, read_image
from model.distributed import pick_device
from model.errors import UserError
from model.inference.predictor import Predictor


class Detector(PythonModel):
    """A checkpoint's network, on the GPU where there is one."""

    def load_context(self, context: PythonModelContext) -> None:
        self._predictor = Predictor.load(Path(context.artifacts["checkpoint"]), pick_device("auto"))

    def predict(
        self, context: PythonModelContext, model_input: DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The objects in each image.

        Args:
            model_input: one column: the bytes of JPEG, PNG or other files that Pillow reads, or their base64.
            params: score_threshold and batch_size, as in the section `predict` of params.yaml.

        Raises:
            MlflowException: if something is no image; a server answers 400 then.
        """
        settings = params or {}
        images = [_decode(i, file) for i, file in enumerate(model_input.iloc[:, 0])]
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


def _decode(i: int, file: bytes | str) -> Pixels:
    content = file.encode() if isinstance(file, str) else file
    # No image file is made of base64's letters alone, and what MLflow hands over of a request may be either.
    with suppress(binascii.Error):
        content = base64.b64decode(content.strip(), validate=True)
    try:
        return read_image(BytesIO(content))
    except UNREADABLE as error:
        raise MlflowException.invalid_parameter_value(
            f"image {i}: must be the bytes of an image file, or their base64, but cannot be decoded: {error}"
        ) from error


mlflow.models.set_model(Detector())
