"""The task of object detection: the classes and boxes of the objects in images."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.task import Task, unpacked
from xprune.errors import DataError
from xprune.modules.calls import first_rows
from xprune.modules.copies import unwrap
from xprune.tasks.boxes import cheapest_pairs, queries_of_objects
from xprune.tasks.detected import (
    Detected,
    Objects,
    check_range,
    entry,
    image_sizes,
    in_fractions,
    in_pixels,
    losses_in_eval_mode,
    own_loss,
)
from xprune.tasks.pointwise import one_of

if TYPE_CHECKING:
    from torchmetrics import Metric

NO_OBJECT = 0.1
"""The weight of a query without an object, compared with a query with an object. It is the weight of DETR."""

BOX = 5.0
"""The weight of the L1 distance of boxes in the distillation. It is the weight of DETR."""

DETECTIONS = 100
"""The number of detections of an image that count, those with the highest scores, as in COCO."""


class Detection(Task):
    """Detection of objects in images. The metric is the mean average precision (mAP).

    A batch is a pair (images, targets), or a mapping with the key "labels", which holds the targets. Images are a
    tensor (batch, channels, height, width), or a list with a tensor (channels, height, width) for each image. Targets
    are a list with a dict for each image. There are two kinds of targets:

    - "class_labels" and "boxes", as in transformers. Boxes are (centre x, centre y, width, height) in fractions of the
      image's size.
    - "labels" and "boxes", as in torchvision. Boxes are (x0, y0, x1, y1) in pixels.

    Labels are int64 (objects,), and boxes are float (objects, 4). An image may have no objects.

    The model is called with the images and the targets, and computes its own loss. If its forward has an argument
    `labels`, the targets get this name. Otherwise they are the second argument. There are three kinds of models:

    - Models of transformers, such as DETR, Conditional DETR, Deformable DETR, RT-DETR and YOLOS. Their outputs have
      "loss", "logits" and "pred_boxes": the logits of the classes and one box for each query. A query is one of the
      fixed number of detections that the model makes for each image, most of them of no object. A batch is a mapping,
      and the targets have "class_labels".
    - Models of a user with the same outputs. The boxes have the same form as those of the targets.
    - Models as in torchvision. In train mode they return a dict of losses, which are added up. In eval mode they return
      a list of detections. xprune needs the loss in eval mode too, and calls the model a second time for it. In this
      call, only modules whose forward has an argument `targets` are in train mode. So dropout is off, and batch norms
      do not change.

    The logits show which kind of probability a model computes. With one column more than there are classes, the last
    column is "no object", and the probabilities are a softmax, as in DETR and YOLOS. With one column for each class,
    each probability is a sigmoid, as in Conditional DETR, Deformable DETR and RT-DETR.

    Label smoothing of fine-tuning has no effect, because the model computes the loss.

    Some criteria need one class for each image. It is the class of one object of the image, which is chosen at random.
    For an image without objects, it is any class. A model that returns no logits has no class-wise scores.

    Args:
        classes: The number of classes, without "no object". Labels are less than it. None means
            `model.config.num_labels`. If the model has no such attribute, xprune assumes that the last column of its
            logits is "no object". For models as in torchvision, whose labels start with 1, leave it out.
        iou: The intersection over union from which a detection counts as right, between 0 and 1. None means the mean of
            the mAP over 0.5, 0.55, ..., 0.95, as in COCO.

    Raises:
        DataError: `classes` or `iou` is out of range.

    Example:
        >>> task = Detection(classes=2)
        >>> target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
        >>> inputs, targets = task.unpack({"pixel_values": torch.zeros(1, 3, 40, 80), "labels": [target]})
        >>> logits = torch.tensor([[[0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]])  # 2 queries
        >>> outputs = Detected(torch.tensor(0.0), [(40, 80)], logits, target["boxes"].expand(1, 2, 4))
        >>> task.detections(outputs)[0]["scores"]  # the second query shows no object
        tensor([0.9647, 0.0177])
    """

    name: ClassVar[str] = "detection"
    metric_name: ClassVar[str] = "mAP"

    def __init__(self, *, classes: int | None = None, iou: float | None = None) -> None:
        super().__init__()
        if classes is not None and (type(classes) is not int or classes < 1):
            raise DataError(f"Detection(classes={classes!r}): wanted a whole number of at least 1, or None.")
        if iou is not None and not 0 < iou < 1:
            raise DataError(
                f"Detection(iou={iou!r}): wanted a number between 0 and 1, or None for the mean over several numbers."
            )
        self.number, self.iou = classes, iou
        # In tables, this mAP must not be mistaken for the mean over several IoUs. Type checkers expect the name on the
        # class, so it is not assigned as an attribute.
        if iou is not None:
            vars(self)["metric_name"] = f"mAP at IoU {iou:g}"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Splits a batch into inputs and targets. The inputs hold the targets too, since the model computes the loss.

        Returns:
            (inputs, targets). If the batch is a mapping, the inputs are a dict of its entries. Otherwise they are a
            tuple (images, targets of the batch). The returned targets are a list with an `Objects` for each image.

        Raises:
            DataError: The batch or a target has another form.
        """
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        # `tuple(zip(*rows))` is the usual `collate_fn` of detection. It returns the images as a tuple, which would be
        # several arguments.
        images, labels = (list(batch[0]), batch[1]) if pair and isinstance(batch[0], (tuple, list)) else unpacked(batch)
        labels = list(labels) if isinstance(labels, (tuple, list)) else labels
        if not isinstance(labels, list) or not all(isinstance(each, Mapping) for each in labels):
            raise DataError(
                f"the targets are a {type(labels).__name__}. They have to be a list with a dict for each image, which "
                "holds 'class_labels' and 'boxes', or 'labels' and 'boxes'."
            )
        sizes = image_sizes(images)
        if len(sizes) != len(labels):
            raise DataError(
                f"the batch has {len(sizes)} images, but {len(labels)} targets. Give one target for each image, also "
                "if it has no objects."
            )
        targets = [Objects.read(each, index) for index, each in enumerate(labels)]
        return {**images, "labels": labels} if isinstance(images, Mapping) else (images, labels), targets

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """Returns the first two images without their targets, so that the model computes no loss. See Task.example."""
        return first_rows(_split(inputs)[0], 2, samples)

    def forward(self, model: nn.Module, inputs: Any) -> Detected:
        """Calls the model with the images and their targets. Returns its outputs, in one form for all models.

        Raises:
            DataError: A target does not fit the model, or the logits do not fit the number of classes.
            ModelError: The model returns no loss.
        """
        plain, (images, labels) = unwrap(model), _split(inputs)
        config = getattr(plain, "config", None)
        number = self.number or getattr(config, "num_labels", None)
        # `unpack` has checked the targets already.
        objects = [Objects.unchecked(each) for each in labels]
        centred = all(each.centred for each in objects)
        parameters = signature(plain.forward).parameters
        if config is not None and "labels" in parameters and not centred:
            raise DataError(
                f"{type(plain).__name__} needs targets with 'class_labels' and 'boxes', (centre x, centre y, width, "
                "height) in fractions of the image's size. The targets of this batch have 'labels'."
            )
        # The model itself would end with an IndexError.
        if number is not None:
            check_range(objects, number)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(images, Mapping):
            # A wrapper may hide the names of the arguments. The batch itself calls the targets "labels".
            kwargs = {**images, "targets" if "targets" in parameters else "labels": labels}
        elif "labels" in parameters:
            # The second argument of a model of transformers may be a mask.
            args, kwargs = (images,), {"labels": labels}
        else:
            args = images, labels
        outputs, found = model(*args, **kwargs), None
        if isinstance(outputs, (list, tuple)) and all(isinstance(each, Mapping) for each in outputs):
            found = [{name: value.detach() for name, value in each.items()} for each in outputs]
            with losses_in_eval_mode(plain):
                outputs = model(*args, **kwargs)
        loss, sizes = own_loss(outputs, plain), image_sizes(images)
        logits, boxes = entry(outputs, "logits"), entry(outputs, "pred_boxes")
        if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
            return Detected(loss, sizes, found=found)
        # RT-DETR puts queries for its training (denoising) in front of the others.
        extra = (entry(outputs, "denoising_meta_values") or {}).get("dn_num_split", (0,))[0]
        sorts = any(isinstance(entry(outputs, name), Tensor) for name in ("enc_topk_logits", "enc_outputs_class"))
        background = _has_background(logits.shape[-1], number)
        return Detected(loss, sizes, logits[:, extra:], boxes[:, extra:], centred, background, not sorts)

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if the label of an object is not a class of the model. See Task.check."""
        if outputs.classes is not None:
            check_range(targets, outputs.classes)

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the model's own loss. `label_smoothing` has no effect. See Task.loss."""
        return outputs.loss

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an mAP without images yet. See Task.new_metric.

        Raises:
            ModelError: pycocotools is not installed.
        """
        from xprune.tasks.mean_precision import MeanPrecision

        return MeanPrecision(self.iou)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the images of a batch to the metric. See Task.update."""
        wanted = [
            {"labels": each.labels, "boxes": in_pixels(each.boxes, size, each.centred)}
            for each, size in zip(targets, outputs.sizes, strict=True)
        ]
        metric.update(self.detections(outputs), wanted)

    def detections(self, outputs: Detected) -> list[dict[str, Tensor]]:
        """Returns the detections of each image, those with the highest scores first.

        If the last column of the logits is "no object", a query gives one detection, of its most probable class.
        Otherwise it gives one for each class. At most `DETECTIONS` detections of an image are returned.

        Args:
            outputs: The outputs of the model for a batch.

        Returns:
            A dict for each image: "scores" (detections,), from 0 to 1, "labels" int64 (detections,), and "boxes"
            (detections, 4), (x0, y0, x1, y1) in pixels.

        Raises:
            DataError: The model returned neither queries nor detections.
        """
        if outputs.found is not None:
            return [_first(each["scores"], each["labels"], each["boxes"]) for each in outputs.found]
        if outputs.logits is None or outputs.boxes is None:
            raise DataError("the model returned its loss, but no detections: it is in train mode. Call model.eval().")
        result = []
        for image, size in enumerate(outputs.sizes):
            probabilities = outputs.queries(image)[0].exp()
            boxes = in_pixels(outputs.boxes[image], size, outputs.centred)
            if outputs.background:
                scores, labels = probabilities[:, :-1].max(-1)
            else:
                classes = probabilities.shape[1]
                # Entry i of the flat scores belongs to query i // classes and to class i % classes.
                scores, labels = probabilities.flatten(), torch.arange(probabilities.numel(), device=boxes.device)
                labels, boxes = labels % classes, boxes.repeat_interleave(classes, 0)
            result.append(_first(scores, labels, boxes))
        return result

    def present(self, targets: Sequence[Objects], classes: int) -> Tensor:
        """Returns True for each class that an image has an object of, bool (batch, classes)."""
        device = targets[0].labels.device
        found = torch.zeros(len(targets), classes, dtype=torch.bool, device=device)
        for row, each in zip(found, targets, strict=True):
            row[each.labels] = True
        return found

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """Returns (one class for each image, number of classes). See Task.classes.

        The class is that of one object of the image, which is chosen at random. For an image without objects, it is any
        class. Returns None if the model returns no logits.
        """
        if outputs.classes is None:
            return None
        rows = []
        for each in targets:
            labels = each.labels if len(each.labels) else torch.arange(outputs.classes, device=each.labels.device)
            rows.append(labels[torch.randint(len(labels), (), device=labels.device)])
        return torch.stack(rows), outputs.classes

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """Returns a random class that an image has no object of, for each image, int64 (batch,). See Task.other.

        If an image has objects of all classes, it is any class except `own`.
        """
        absent = ~self.present(targets, classes)
        rest = ~F.one_hot(own, classes).bool()
        return one_of(torch.where(absent.any(1, keepdim=True), absent & rest, rest))

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """Returns a loss that is small if units are needed for the chosen class of an image and for no other class.

        It is a mean over the images. Let c be the chosen class of an image. If it has objects of c and `gone` is False,
        the loss is the mean of `-log(p_c)` over the queries of these objects. If it has objects of c and `gone` is
        True, it is the sum of `-log(1 - p_c)` over all queries, divided by the number of these objects: no query may
        detect c. If it has no objects of c and `gone` is False, it is the same sum, without the division. If it has no
        objects of c and `gone` is True, it is the loss of DETR for the classes of all queries. Queries and objects are
        paired as in DETR. See Task.one_vs_rest.
        """
        losses = []
        for image, (each, kind) in enumerate(zip(targets, drawn.tolist(), strict=True)):
            here = int((each.labels == kind).sum())
            if bool(here) == gone:
                losses.append(-outputs.log_absences(image, kind).sum() / max(here, 1))
            elif here:
                losses.append(-_of_class(outputs, image, each, kind))
            elif gone:
                losses.append(_class_loss(outputs, image, each))
        return torch.stack(losses).mean()

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Returns the mean log probability of one class over the queries of its objects, for each image, (batch,).

        The class is `own`. The result is 0 for an image without objects. See Task.class_scores.
        """
        rows = enumerate(zip(targets, own.tolist(), strict=True))
        return torch.stack([_of_class(outputs, image, each, kind) for image, (each, kind) in rows])

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns how much the queries of a model differ from those of the dense model.

        For each query, let p be the probability of an object, as the dense model sees it. The result is the weighted
        mean of KL(teacher || student) of the class probabilities over the queries, with the weights 0.1 + 0.9 p, plus 5
        times the weighted mean of the L1 distance of the boxes, with the weights p. Then the mean over images is taken.
        Boxes are in fractions of the image's size. The divergence is multiplied by temperature squared. For
        probabilities of a sigmoid, it is the sum of the divergences of all classes.

        A query is compared with the query of the same index. If the model sorts its queries, as RT-DETR does, the
        queries of the two models are paired one to one, so that the sum of the differences is smallest.

        Args:
            outputs: The outputs of the student, which is the model that is trained.
            teacher: The outputs of the dense model.
            temperature: The logits of both models are divided by it.

        Raises:
            DataError: The model returns no logits.
        """
        if outputs.logits is None or teacher.logits is None:
            raise DataError(
                "distillation of a detection task compares logits and boxes of queries, but the model returns none. "
                "Use Finetune(distill=0)."
            )
        losses = []
        for image in range(len(outputs.sizes)):
            (logs, boxes), (wanted_logs, wanted_boxes) = outputs.queries(image), teacher.queries(image)
            student, target = outputs.logits[image].float(), teacher.logits[image].float()
            if not outputs.ordered:
                cost = torch.cdist(logs.exp(), wanted_logs.exp(), p=1) + BOX * torch.cdist(boxes, wanted_boxes, p=1)
                mine, its = cheapest_pairs(cost)
                student, boxes = student[mine], boxes[mine]
                target, wanted_logs, wanted_boxes = target[its], wanted_logs[its], wanted_boxes[its]
            p = wanted_logs.exp()
            objects = 1 - p[:, -1] if outputs.background else p.amax(-1)
            divergence = _divergence(student / temperature, target / temperature, outputs.background) * temperature**2
            weights = NO_OBJECT + (1 - NO_OBJECT) * objects
            distance = (boxes - wanted_boxes).abs().sum(-1)
            tiny = torch.finfo(objects.dtype).tiny
            of_boxes = (objects * distance).sum() / objects.sum().clamp_min(tiny)
            losses.append((weights * divergence).sum() / weights.sum() + BOX * of_boxes)
        return torch.stack(losses).mean()


def _split(inputs: Any) -> tuple[Any, Any]:
    """Returns the images and the targets in the inputs that `Detection.unpack` returned.

    The images are a dict without "labels", a tensor or a list.
    """
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]
    images, labels = inputs
    return images, labels


def _has_background(columns: int, classes: int | None) -> bool:
    """Returns True if the last column of the logits is "no object". `classes` is None if the number is not known."""
    if classes is None or columns == classes + 1:
        return True
    if columns == classes:
        return False
    raise DataError(
        f"the logits have {columns} columns, but there are {classes} classes. Wanted are {classes} columns, or "
        f'{classes + 1} with "no object" as the last one. Give Detection(classes=...).'
    )


def _first(scores: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Returns the detections with the highest scores, as a dict with "scores", "labels" and "boxes"."""
    order = scores.argsort(descending=True, stable=True)[:DETECTIONS]
    return {"scores": scores[order], "labels": labels[order], "boxes": boxes[order]}


def _queries(outputs: Detected, image: int, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs the objects of an image with queries.

    Returns:
        (log probabilities at all queries (queries, columns), the query of each object int64 (pairs,), the class of each
        of these objects int64 (pairs,)). An object without a query is left out.
    """
    logs, boxes = outputs.queries(image)
    wanted = in_fractions(objects.boxes, outputs.sizes[image], objects.centred)
    queries = queries_of_objects(logs.detach().exp(), boxes.detach(), objects.labels, wanted)
    return logs, queries[queries >= 0], objects.labels[queries >= 0]


def _of_class(outputs: Detected, image: int, objects: Objects, kind: int) -> Tensor:
    """Returns the mean log probability of a class over the queries of its objects in an image. 0 without objects."""
    logs, queries, labels = _queries(outputs, image, objects)
    # An empty sum keeps the gradient, which the mean of nothing would turn into NaN.
    own = logs[queries[labels == kind], kind]
    return own.sum() / max(len(own), 1)


def _class_loss(outputs: Detected, image: int, objects: Objects) -> Tensor:
    """Returns the loss of DETR for the classes of all queries of an image.

    With "no object", it is a cross-entropy in which queries without an object have the weight `NO_OBJECT`. Otherwise it
    is the focal loss of Deformable DETR, divided by the number of objects.
    """
    logs, queries, labels = _queries(outputs, image, objects)
    columns = logs.shape[1]
    if outputs.background:
        wanted = torch.full((len(logs),), columns - 1, device=logs.device)
        wanted[queries] = labels
        weight = logs.new_ones(columns)
        weight[-1] = NO_OBJECT
        return F.nll_loss(logs, wanted, weight)
    assert outputs.logits is not None
    logits, wanted = outputs.logits[image].float(), torch.zeros_like(logs)
    wanted[queries, labels] = 1
    crossed = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    balance = 0.25 * wanted + 0.75 * (1 - wanted)
    return (balance * (1 - (-crossed).exp()) ** 2 * crossed).sum() / max(len(labels), 1)


def _divergence(student: Tensor, target: Tensor, background: bool) -> Tensor:
    """Returns KL(target || student) of the class probabilities at each query, (queries,). Both are logits."""
    if background:
        logs, wanted = student.log_softmax(-1), target.log_softmax(-1)
        return F.kl_div(logs, wanted, log_target=True, reduction="none").sum(-1)
    parts = [
        F.kl_div(F.logsigmoid(sign * student), F.logsigmoid(sign * target), log_target=True, reduction="none")
        for sign in (1, -1)
    ]
    return (parts[0] + parts[1]).sum(-1)
