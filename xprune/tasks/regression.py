"""The task of regression: one number, or a tensor of numbers, for each sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, checked_batch_axis, unpacked
from xprune.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric

ERRORS: Mapping[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""The losses by the name that `Regression.error` accepts."""
MEASURES = ("R2", "MAE", "RMSE")
"""The allowed values of `Regression.measure`."""


@dataclass(frozen=True)
class Regression(Task):
    """Prediction of numbers. The metric is R2, the mean absolute error or the root mean squared error.

    A batch is a pair (inputs, targets), or a mapping with the key "labels", see `Classification`. Targets are numbers
    (batch, ...), of any shape. The model returns numbers of the same shape. One of the two may have a last axis of
    length 1 that the other one does not have: outputs (batch, 1) fit targets (batch,).

    Args:
        error: The loss. "mse" is the squared error, "l1" is the absolute error, and "huber" is the Huber loss with a
            delta of 1. It is the mean over samples and over all numbers of a sample.
        measure: The metric. "R2" is the coefficient of determination, as the mean over the numbers of a sample. 1 is a
            perfect prediction, and 0 is as good as the mean of the targets. "MAE" is the mean absolute error, and
            "RMSE" is the root of the mean squared error. For these two, smaller is better.
        batch_axis: The axis of the model's inputs along which samples lie. Samples of targets and outputs lie along
            axis 0.

    Raises:
        DataError: `error` or `measure` is unknown, or `batch_axis` is negative or not an integer.

    Example:
        >>> import torch
        >>> task = Regression(measure="RMSE")
        >>> inputs, targets = task.unpack((torch.randn(2, 4), torch.tensor([1.0, 3.0])))
        >>> task.loss(torch.zeros(2, 1), targets)  # (1 + 9) / 2
        tensor(5.)
        >>> task.metric_name, task.higher_is_better
        ('RMSE', False)
    """

    error: str = "mse"
    measure: str = "R2"
    batch_axis: int = 0
    name: ClassVar[str] = "regression"
    percent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for setting, allowed in (("error", tuple(ERRORS)), ("measure", MEASURES)):
            given = getattr(self, setting)
            if given not in allowed:
                raise DataError(f"{setting}={given!r} is unknown: Regression knows {', '.join(allowed)}.")
        checked_batch_axis(self.batch_axis)
        # The class is frozen, so attributes are set in this way.
        object.__setattr__(self, "metric_name", self.measure)
        object.__setattr__(self, "higher_is_better", self.measure == "R2")

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, targets float32 (batch, ...)).

        Targets of float64 stay float64. Raises DataError if the batch has another form, or if a target is not finite.
        See Task.unpack.
        """
        inputs, targets = unpacked(batch)
        if not isinstance(targets, Tensor) or targets.dim() < 1 or targets.is_complex():
            what = f"a tensor {tuple(targets.shape)}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
            raise DataError(f"targets are {what}, wanted a tensor of real numbers of shape (batch, ...).")
        # Integers and low precisions become float32. float64 is kept.
        numbers = targets if targets.is_floating_point() and targets.element_size() > 4 else targets.float()
        if not bool(numbers.isfinite().all()):
            raise DataError(
                "a target is NaN or infinite. Leave out samples without a target, or write a task of your own that "
                "skips them."
            )
        return inputs, numbers

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if the outputs do not have the shape of the targets. See Task.check."""
        fits = isinstance(outputs, Tensor) and _squeezed(outputs, targets).shape == targets.shape
        if not fits:
            what = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise DataError(
                f"the model returns {what}, but the targets have the shape {tuple(targets.shape)}. Without equal "
                "shapes, torch would compare each output with each target. Reshape the targets, or give a task of your "
                "own."
            )

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean error over samples and numbers. `label_smoothing` is ignored. See Task.loss."""
        return ERRORS[self.error](_squeezed(outputs, targets).to(targets.dtype), targets)

    def sample_scores(self, outputs: Any, targets: Any, dense: Any) -> Tensor | None:
        """Returns the negative loss of each sample, (batch,). See Task.sample_scores."""
        errors = ERRORS[self.error](_squeezed(outputs, targets).to(targets.dtype), targets, reduction="none")
        return -errors.reshape(len(errors), -1).mean(1)

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns a metric without samples yet. See Task.new_metric."""
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        from xprune.core.metric import in_double

        kinds: dict[str, Callable[[], Metric]] = {
            "R2": R2Score,
            "MAE": MeanAbsoluteError,
            "RMSE": lambda: MeanSquaredError(squared=False),
        }
        # R2 is computed from sums of squares, which lose digits in float32.
        return in_double(kinds[self.measure](), outputs)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds a batch to the metric. See Task.update."""
        # MPS devices have no float64.
        dtype = torch.float32 if targets.device.type == "mps" else torch.float64
        pair = (each.detach().to(dtype) for each in (_squeezed(outputs, targets), targets))
        # R2 reads (samples,), or (samples, numbers).
        metric.update(*(each.flatten(1) if each.dim() > 1 else each for each in pair))

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean squared error to the outputs of the teacher. The temperature is ignored.

        See Task.distillation.
        """
        return F.mse_loss(outputs.float(), teacher.float())


def _squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the outputs in the shape of the targets, if they differ by a last axis of length 1 only."""
    if outputs.dim() == targets.dim() + 1 and outputs.shape[-1] == 1:
        return outputs[..., 0]
    if outputs.dim() == targets.dim() - 1 and targets.shape[-1] == 1:
        return outputs[..., None]
    return outputs
