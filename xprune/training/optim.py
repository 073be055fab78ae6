"""Optimisation: groups of parameters by weight decay, and the learning rate over time."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from xprune.errors import ModelError
from xprune.modules.blocks import blocks_of


def decayed(
    model: nn.Module, weight_decay: float, lr: float = 0.0, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups the parameters of a model that are trained, by their weight decay and their learning rate.

    Args:
        model: The model. Parameters that need no gradient are left out.
        weight_decay: The weight decay of parameters with two or more axes. Parameters with one axis, such as biases and
            the weights of norm layers, get 0.
        lr: The learning rate of the head. It is used only if `layer_decay` is given.
        layer_decay: The factor by which the learning rate falls from each layer to the layer before it, see
            `layer_scales`. None means that the groups have no learning rates of their own.

    Returns:
        Parameter groups for an optimizer. Groups without parameters are left out.

    Raises:
        ModelError: `layer_decay` is given, and the model has no layers that are known.

    Example:
        >>> [(len(group["params"]), group["weight_decay"]) for group in decayed(nn.Linear(4, 2), 0.05)]
        [(1, 0.05), (1, 0.0)]
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if layer_decay is None:
        return groups
    scales = layer_scales(model, layer_decay)
    return [
        {**group, "params": params, "lr": lr * scale}
        for group in groups
        for scale in sorted(set(scales.values()))
        if (params := [p for p in group["params"] if scales[id(p)] == scale])
    ]


def layer_scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """Returns the factor of the learning rate of each parameter that is trained, by the id of the parameter.

    The factor is `layer_decay ** (top - layer)`. Layer 0 is the embedding, and layer `top` is the head, whose factor is
    1. Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022.

    Models of timm say which parameter belongs to which layer, and timm computes the factors. In other models, the
    layers are the blocks that `blocks_of` finds, numbered from 1. A parameter outside of the blocks belongs to the
    block before it, in the order in which the model holds its parameters. Parameters before the first block belong to
    layer 0, and parameters after the last one to the head.

    Args:
        model: The model.
        layer_decay: The factor from a layer to the layer before it.

    Raises:
        ModelError: The model has no `group_matcher` as in timm, and no blocks.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> scales = layer_scales(model, 0.5)
        >>> [scales[id(model.get_parameter(name))] for name in ("0.weight", "1.layers.1.norm1.weight", "2.weight")]
        [0.125, 0.5, 1.0]
    """
    if callable(getattr(model, "group_matcher", None)):
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        groups = param_groups_layer_decay(model, layer_decay=layer_decay)
        return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = blocks_of(model)
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no layers for Finetune(layer_decay={layer_decay}): no part of it repeats, and "
            "it has no group_matcher as models of timm do. Give layer_decay=None."
        )
    numbers = {
        id(parameter): number for number, block in enumerate(blocks.values(), 1) for parameter in block.parameters()
    }
    scales, layer, seen = {}, 0, 0
    last = next(reversed(blocks.values()))
    ends = {id(parameter) for parameter in last.parameters()}
    for parameter in model.parameters():
        number = numbers.get(id(parameter))
        layer = layer if number is None else max(layer, number)
        seen += id(parameter) in ends
        is_head = number is None and seen == len(ends)
        depth = len(blocks) + 1 if is_head else layer if number is None else number
        if parameter.requires_grad:
            scales[id(parameter)] = layer_decay ** (len(blocks) + 1 - depth)
    return scales


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
