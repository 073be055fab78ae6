"""The mean average precision (mAP) of detections, as a metric that computes one number.

This file imports torchmetrics, and that import takes a second. So other files import this file only inside the
functions that make a metric.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from xprune.errors import DataError, ModelError

DETECTIONS = 100
"""The number of detections of an image that count, those with the highest scores, as in COCO."""

BACKENDS: tuple[Literal["pycocotools", "faster_coco_eval"], ...] = ("pycocotools", "faster_coco_eval")
"""The packages that torchmetrics can compute the mAP with. The first one that is installed is used."""


class MeanPrecision(MeanAveragePrecision):
    """The mAP of all classes, as one number from 0 to 1.

    `MeanAveragePrecision` of torchmetrics computes a dict of many numbers. This class returns the number "map" of this
    dict. `update` has the arguments of torchmetrics: two lists with a dict for each image. The dicts have the keys
    "boxes", "labels", and for detections "scores". Boxes are (x0, y0, x1, y1).

    Args:
        iou: The intersection over union from which a detection counts as right, between 0 and 1. None means the mean
            over the values 0.5, 0.55, ..., 0.95, as in COCO.

    Raises:
        ModelError: Neither pycocotools nor faster_coco_eval is installed.
    """

    def __init__(self, iou: float | None = None) -> None:
        backend = next((name for name in BACKENDS if find_spec(name)), None)
        if backend is None:
            raise ModelError(
                "the mean average precision of detections needs pycocotools, which is not installed. Run: pip install "
                "'xprune[detection]'."
            )
        super().__init__(box_format="xyxy", iou_thresholds=None if iou is None else [iou], backend=backend)
        # The task gives at most `DETECTIONS` detections of an image, so torchmetrics need not warn of more.
        self.warn_on_many_detections = False

    def compute(self) -> Tensor:  # type: ignore[override]
        """Returns the mAP of all images so far, a tensor with one number.

        Raises:
            DataError: No image has an object, so that the mAP is not defined.
        """
        numbers: dict[str, Any] = super().compute()
        # torchmetrics returns -1 if there are no objects.
        if float(numbers["map"]) < 0:
            raise DataError(
                "no image of the data has an object, so there is no mean average precision. Measure on images with "
                "objects."
            )
        return torch.as_tensor(numbers["map"])
