"""latency: measures the time of a forward pass."""

from typing import Any

from torch import nn

from xprune.core.target import Target
from xprune.costs.stopwatch import Stopwatch
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def latency(
    model: nn.Module,
    example_inputs: Any,
    seconds: float = 0.5,
    target: Target = Target(),  # noqa: B008 - immutable
    *,
    batch_axis: int | None = None,
) -> float:
    """Measures how long a forward pass takes, in eval mode and without gradients.

    To compare two models, do not divide two results of this function: the computer may be busier in one measurement
    than in the other. `xprune.costs.stopwatch.Stopwatch` runs both models in turn. The result of a run of `Pruner`
    holds such a comparison as `result.metrics["pruned"].speedup`.

    Args:
        model: The model. It is not changed.
        example_inputs: One batch, with which the model is called: a tensor, a tuple of arguments, or a dict of keyword
            arguments. It is moved to the device of the target.
        seconds: The forward pass is repeated for at least this time, in seconds.
        target: Where and how the model runs, for example compiled, or in bfloat16 on another device. `Target()` is the
            model and the batch as they are. The `table` of a target is not used.
        batch_axis: The axis of the inputs along which samples lie. It is needed only if `target.batch` is given and the
            axis cannot be found.

    Returns:
        The median time of one forward pass of the whole batch, in milliseconds.

    Raises:
        ModelError: The model does not run, for example because its weights are on the meta device.
        TargetError: This computer does not have the device, or the model does not run there in this way.

    Example:
        >>> import torch
        >>> latency(nn.Linear(4, 2), torch.randn(3, 4), seconds=0.01, target=Target(batch=64)) > 0
        True
    """
    return Stopwatch(target, model, example_inputs, batch_axis).alone(seconds).median(0)
