"""What a detection task reads: the objects in the targets of a batch, and the outputs of a detection model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.errors import DataError, ModelError
from xprune.tasks.boxes import to_corners

OUTSIDE = 0.01
"""How far a box may lie outside of the range from 0 to 1, in fractions of the image's size. Rounding causes this."""


@dataclass(frozen=True)
class Objects:
    """The objects of an image, in one form for all kinds of targets.

    Attributes:
        labels: The class of each object, int64 (objects,).
        boxes: The box of each object, float (objects, 4), as the target holds it.
        centred: True if boxes are (centre x, centre y, width, height) in fractions of the image's size, as in models of
            transformers. False if they are (x0, y0, x1, y1) in pixels, as in torchvision.

    Example:
        >>> target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
        >>> Objects.read(target, index=0).labels
        tensor([1])
    """

    labels: Tensor
    boxes: Tensor
    centred: bool

    @classmethod
    def read(cls, target: Mapping[str, Any], index: int) -> "Objects":
        """Reads the objects of one image from its target.

        Args:
            target: The target, with "boxes" and either "class_labels" or "labels".
            index: The index of the image in the batch, for errors.

        Raises:
            DataError: An entry is missing, or has a wrong shape or value.
        """
        centred = "class_labels" in target
        name = "class_labels" if centred else "labels"
        labels, boxes = target.get(name), target.get("boxes")
        where = f"the target of image {index} of the batch"
        if not isinstance(labels, Tensor) or not isinstance(boxes, Tensor):
            raise DataError(
                f"{where} has the entries {', '.join(map(str, target)) or 'none'}. It needs two tensors: 'boxes', and "
                "'class_labels' (boxes in fractions of the image) or 'labels' (boxes in pixels)."
            )
        if labels.dim() != 1 or labels.is_floating_point():
            raise DataError(f"{where}: '{name}' has to be integers of shape (objects,), got {_form(labels)}.")
        if boxes.shape != (len(labels), 4) or not boxes.is_floating_point():
            raise DataError(
                f"{where}: 'boxes' has to be a float tensor of shape {(len(labels), 4)}, one row for each label, got "
                f"{_form(boxes)}. For an image without objects, give torch.zeros(0, 4)."
            )
        if len(labels) and int(labels.min()) < 0:
            raise DataError(f"{where} has the label {int(labels.min())}. Labels are numbers of at least 0.")
        _check_boxes(boxes, centred, where)
        return cls.unchecked(target)

    @classmethod
    def unchecked(cls, target: Mapping[str, Any]) -> "Objects":
        """Reads the objects of one image from a target that `read` has checked before."""
        centred = "class_labels" in target
        return cls(target["class_labels" if centred else "labels"].long(), target["boxes"], centred)


def _form(tensor: Tensor) -> str:
    """Returns the dtype and the shape of a tensor, as a text for errors."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_boxes(boxes: Tensor, centred: bool, where: str) -> None:
    """Raises DataError for the first box that is not in the form that its target promises."""
    low, high = boxes[:, :2], boxes[:, 2:]
    fine = boxes.isfinite().all(1)
    if centred:
        fine &= (high >= 0).all(1) & ((boxes >= -OUTSIDE) & (boxes <= 1 + OUTSIDE)).all(1)
        wanted = (
            "(centre x, centre y, width, height), each from 0 to 1 as a fraction of the image's size, because its "
            "target has 'class_labels'. For boxes in pixels, name the classes 'labels'"
        )
    else:
        fine &= (high > low).all(1)
        wanted = "(x0, y0, x1, y1) in pixels with x0 < x1 and y0 < y1, because its target has 'labels'"
    wrong = (~fine).nonzero().flatten().tolist()
    if wrong:
        values = ", ".join(f"{value:g}" for value in boxes[wrong[0]].tolist())
        raise DataError(f"{where}: the box {wrong[0]} is ({values}). It has to be {wanted}.")


def check_range(objects: Sequence[Objects], classes: int) -> None:
    """Raises DataError if the label of an object is not one of the classes 0 to `classes` - 1."""
    for index, each in enumerate(objects):
        if len(each.labels) and int(each.labels.max()) >= classes:
            raise DataError(
                f"the target of image {index} of the batch has the label {int(each.labels.max())}, but the model has "
                f"{classes} classes, 0 to {classes - 1}. Remap the labels, or give the model a head of the right size."
            )


def in_fractions(boxes: Tensor, size: tuple[int, int], centred: bool) -> Tensor:
    """Converts boxes to (x0, y0, x1, y1) in fractions of the image's size, float32 (..., 4).

    Args:
        boxes: The boxes, (..., 4).
        size: (height, width) of the image, in pixels.
        centred: The form of the boxes, see `Objects`.
    """
    if centred:
        return to_corners(boxes.float())
    return boxes.float() / boxes.new_tensor([size[1], size[0]] * 2, dtype=torch.float32)


def in_pixels(boxes: Tensor, size: tuple[int, int], centred: bool) -> Tensor:
    """Converts boxes to (x0, y0, x1, y1) in pixels, float32 (..., 4). The arguments are those of `in_fractions`.

    Example:
        >>> in_pixels(torch.tensor([[0.5, 0.5, 0.5, 0.5]]), size=(40, 80), centred=True)
        tensor([[20., 10., 60., 30.]])
    """
    if not centred:
        return boxes.float()
    return in_fractions(boxes, size, centred) * boxes.new_tensor([size[1], size[0]] * 2, dtype=torch.float32)


def image_sizes(images: Any) -> list[tuple[int, int]]:
    """Returns (height, width) of each image of a batch, in pixels.

    Args:
        images: A tensor (batch, channels, height, width), a list of tensors (channels, height, width), or a mapping
            with one of the two. In a mapping, the entry "pixel_values" holds the images, or else the first entry of
            this form. Padding counts as a part of an image.

    Raises:
        DataError: There are no images of this form.

    Example:
        >>> image_sizes([torch.zeros(3, 40, 80), torch.zeros(3, 50, 70)])
        [(40, 80), (50, 70)]
    """
    if isinstance(images, Mapping):
        entries = [images["pixel_values"]] if "pixel_values" in images else list(images.values())
    else:
        entries = [images]
    for each in entries:
        # A tensor with four axes is a list of images too.
        images = list(each) if isinstance(each, (Tensor, list)) else []
        if images and all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
            return [(int(image.shape[1]), int(image.shape[2])) for image in images]
    raise DataError(
        "a batch has no images. Give a tensor (batch, channels, height, width), or a list with a tensor (channels, "
        "height, width) for each image. In a mapping, their key is 'pixel_values'."
    )


@dataclass(frozen=True)
class Detected:
    """What a detection model returned for a batch, in one form for all models.

    Attributes:
        loss: The model's own loss, a tensor with one number.
        sizes: (height, width) of each image, in pixels.
        logits: The logits of the classes at each query, (batch, queries, columns). None if the model returns no
            queries.
        boxes: The boxes of the queries, (batch, queries, 4), in the form of the boxes of the targets. None if the model
            returns no queries.
        centred: The form of the boxes of the queries, see `Objects`.
        background: True if the last column of the logits is "no object", and the softmax over a row gives the
            probabilities. False if the sigmoid of each logit is the probability of its class.
        ordered: True if a query of one index means the same in the dense and in the pruned model. False if a model
            sorts its queries, as RT-DETR does.
        found: The detections of a model that returns no queries: a dict with "scores", "labels" and "boxes" in pixels
            for each image. None if the model returned only its loss.

    Example:
        >>> logits = torch.tensor([[[0.0, 4.0, 0.0]]])  # one image, one query, two classes and "no object"
        >>> outputs = Detected(torch.tensor(0.0), [(40, 80)], logits, torch.full((1, 1, 4), 0.5))
        >>> outputs.classes
        2
    """

    loss: Tensor
    sizes: Sequence[tuple[int, int]]
    logits: Tensor | None = None
    boxes: Tensor | None = None
    centred: bool = True
    background: bool = True
    ordered: bool = True
    found: Sequence[Mapping[str, Tensor]] | None = None

    @property
    def classes(self) -> int | None:
        """The number of classes, without "no object". None if the model returns no queries."""
        return None if self.logits is None else self.logits.shape[-1] - self.background

    def queries(self, image: int) -> tuple[Tensor, Tensor]:
        """Returns the queries of an image.

        Returns:
            (log probabilities (queries, columns), boxes (queries, 4)), both float32. The columns are those of the
            logits. Boxes are (x0, y0, x1, y1) in fractions of the image's size.
        """
        assert self.logits is not None and self.boxes is not None
        logits = self.logits[image].float()
        logs = logits.log_softmax(-1) if self.background else F.logsigmoid(logits)
        return logs, in_fractions(self.boxes[image], self.sizes[image], self.centred)

    def log_absences(self, image: int, kind: int) -> Tensor:
        """Returns the log of the probability that a query shows no object of a class, float32 (queries,).

        Args:
            image: The index of the image.
            kind: The class.
        """
        assert self.logits is not None
        logits = self.logits[image].float()
        if not self.background:
            return F.logsigmoid(-logits[:, kind])
        # The log of the sum over all other columns is exact even if the probability of the class is almost 1.
        others = torch.arange(logits.shape[-1], device=logits.device) != kind
        return logits.log_softmax(-1)[:, others].logsumexp(-1)


def entry(outputs: Any, name: str) -> Any:
    """Returns an entry or attribute of a model's outputs. Returns None if there is none of this name."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def own_loss(outputs: Any, model: nn.Module) -> Tensor:
    """Returns the loss in the outputs of a model: the entry "loss", or the sum of all entries of a dict of losses.

    Raises:
        ModelError: The outputs have no loss.
    """
    loss = entry(outputs, "loss")
    if isinstance(loss, Tensor):
        return loss
    values = list(outputs.values()) if isinstance(outputs, Mapping) else []
    if not values or not all(isinstance(value, Tensor) and value.numel() == 1 for value in values):
        raise ModelError(
            f"{type(model).__name__} returned no loss for images with targets. It has to return outputs with 'loss', "
            "'logits' and 'pred_boxes'. Or it has to return a dict of losses in train mode, and a list of dicts of "
            "detections in eval mode. For other models, give a subclass of xprune.Detection that overrides `forward`."
        )
    return torch.stack([value.float().reshape(()) for value in values]).sum()


@contextmanager
def losses_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Makes a model as in torchvision return its losses inside a `with` block, although it is in eval mode.

    Such a model returns losses only if the modules that compute them are in train mode. These modules have a forward
    with an argument `targets`. They are in train mode inside the block. All other modules keep their mode, so dropout
    is off and batch norms use their stored statistics.
    """
    changed = [m for m in model.modules() if not m.training and "targets" in signature(m.forward).parameters]
    for module in changed:
        # `train()` would change the modules inside it too.
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False
