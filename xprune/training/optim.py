"""Optimisation: groups of parameters by weight decay, and the learning rate over time."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups the parameters of a model that are trained, by their weight decay.

    Args:
        model: The model. Parameters that need no gradient are left out.
        weight_decay: The weight decay of parameters with two or more axes. Parameters with one axis, such as biases and
            the weights of norm layers, get 0.

    Returns:
        Parameter groups for an optimizer. Groups without parameters are left out.

    Example:
        >>> [(len(group["params"]), group["weight_decay"]) for group in decayed(nn.Linear(4, 2), 0.05)]
        [(1, 0.05), (1, 0.0)]
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Returns a schedule in which the learning rate rises linearly and then falls to 0, as half a cosine.

    Args:
        optimizer: The optimizer. Its learning rate is the largest one of the schedule.
        steps: The number of all steps.
        warmup: The length of the linear rise, as a fraction of all steps.
    """
    warm = int(warmup * steps)

    def rate(step: int) -> float:
        """Returns the factor by which the learning rate is multiplied at a step."""
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return LambdaLR(optimizer, rate)


class Position:
    """The state of a schedule for a checkpoint: the step that the schedule has reached.

    All other values of the schedule follow from the settings of the run.

    Args:
        schedule: The schedule.
    """

    def __init__(self, schedule: LambdaLR) -> None:
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """Returns the step that the schedule has reached, under the key "last_epoch"."""
        return {"last_epoch": self.schedule.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the schedule to the step of a state that `state_dict` returned."""
        self.schedule.last_epoch = state["last_epoch"]
