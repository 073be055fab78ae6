"""The mean average precision (mAP) of detections, as a metric that computes one number.

This file imports torchmetrics, and that import takes a second. So other files import this file only inside the
functions that make a metric.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torchmetrics.detection import MeanAveragePrecision

from xprune.errors import DataError, ModelError
from xprune.modules.calls import map_tensors

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
        # torchmetrics combines the images of several processes one by one, so each process needs the same number of
        # images. `compute` combines them instead.
        super().__init__(
            box_format="xyxy", iou_thresholds=None if iou is None else [iou], backend=backend, sync_on_compute=False
        )
        # The task gives at most `DETECTIONS` detections of an image, so torchmetrics need not warn of more.
        self.warn_on_many_detections = False

    def compute(self) -> Tensor:  # type: ignore[override]
        """Returns the mAP of all images so far, of all processes, a tensor with one number.

        Raises:
            DataError: No image has an object, so that the mAP is not defined.
        """
        own: dict[str, Any] = dict(self.metric_state)
        try:
            for name, images in _of_all_processes(own, self.process_group).items():
                setattr(self, name, images)
            numbers: dict[str, Any] = super().compute()
        finally:
            for name, images in own.items():
                setattr(self, name, images)
        # torchmetrics returns -1 if there are no objects.
        if float(numbers["map"]) < 0:
            raise DataError(
                "no image of the data has an object, so there is no mean average precision. Measure on images with "
                "objects."
            )
        return torch.as_tensor(numbers["map"])


def _of_all_processes(state: Mapping[str, Any], group: Any) -> dict[str, list[Any]]:
    """Returns the state of a metric over all processes.

    Args:
        state: The state of this process: lists with an entry for each image.
        group: The group of the processes. None means all processes.

    Returns:
        The lists of all processes, one after another. The state itself if there is one process.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size(group) == 1:
        return dict(state)
    # On the CPU, since a process need not have the devices of another one.
    own = {name: map_tensors(images, Tensor.cpu) for name, images in state.items()}
    parts: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(parts, own, group=group)
    return {name: [image for part in parts for image in part[name]] for name in state}
