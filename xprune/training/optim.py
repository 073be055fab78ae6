"""Parts of optimisation that several learners share: weight decay, and the learning rate over time."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups the trained parameters of a model by weight decay.

    Args:
        model: The model.
        weight_decay: The decay of parameters with two or more axes. Biases, weights of norms and other parameters with
            one axis do not decay.

    Returns:
        Parameter groups for an optimizer.

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
    """Returns a schedule with a linear warm-up and then half a cosine down to 0.

    Args:
        optimizer: The optimizer. Its learning rate is the peak.
        steps: The number of all steps.
        warmup: The length of the warm-up, as a fraction of all steps.
    """
    warm = int(warmup * steps)

    def rate(step: int) -> float:
        """Returns the factor on the learning rate at a step."""
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return LambdaLR(optimizer, rate)


class Position:
    """The position of a schedule as its state for a checkpoint. The rest of a schedule is code.

    Args:
        schedule: The schedule.
    """

    def __init__(self, schedule: LambdaLR) -> None:
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """Returns the step that the schedule has reached."""
        return {"last_epoch": self.schedule.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the schedule to a step."""
        self.schedule.last_epoch = state["last_epoch"]
