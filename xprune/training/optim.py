"""Optimisation that learners share: which weights decay, and the learning rate over time."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights of two axes and more decay, biases, norms and tables of one axis do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """Linear warm-up over that fraction of the steps, then half a cosine to 0."""
    warm = int(warmup * steps)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return LambdaLR(optimizer, rate)


class Position:
    """The step a schedule has reached, as its whole state: what it computes from it is code."""

    def __init__(self, schedule: LambdaLR) -> None:
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_epoch": self.schedule.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from that step."""
        self.schedule.last_epoch = state["last_epoch"]
