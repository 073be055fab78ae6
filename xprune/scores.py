"""Scores: what a criterion hands on. A number per unit, higher = keep; optionally one per class and unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xprune.errors import PluginError
from xprune.site import Site


@dataclass(frozen=True)
class Scores:
    """Scores of all sites.

    sites       the sites scored
    values      per site, float32 (units,), finite, higher = keep
    criterion   name of the criterion
    classwise   per site, float32 (classes, units), where the method has them; a class that was not seen is NaN
    info        seconds, samples, settings: plain data
    """

    sites: tuple[Site, ...]
    values: tuple[Tensor, ...]
    criterion: str
    classwise: tuple[Tensor, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.values):
            raise PluginError(f"{self.criterion}: {len(self.values)} score tensors for {len(self.sites)} sites.")
        for site, value in zip(self.sites, self.values, strict=True):
            if tuple(value.shape) != (site.size,):
                raise PluginError(
                    f"{self.criterion}: {site.name} has {site.size} units, scores are {tuple(value.shape)}."
                )
            if not bool(torch.isfinite(value).all()):
                raise PluginError(
                    f"{self.criterion}: {site.name} has scores that are not finite; are the model's weights?"
                )
