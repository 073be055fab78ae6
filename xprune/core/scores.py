"""Scores: what a criterion hands on. A number per unit, higher = keep; optionally one per class and unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.errors import PluginError

SCALES = ("site", "loss", "plan")


@dataclass(frozen=True)
class LowRank:
    """Class-wise scores of many classes, kept as factors: row c is offset + left[c] @ right.

    left (classes, rank), right (rank, units), offset (units,)
    """

    left: Tensor
    right: Tensor
    offset: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(classes, units)."""
        return len(self.left), self.right.shape[1]

    def __getitem__(self, classes: Any) -> Tensor:
        """The rows of these classes, an index as a tensor takes it along its first axis."""
        return self.offset + self.left[classes] @ self.right


@dataclass(frozen=True)
class Scores:
    """Scores of all sites.

    sites       the sites scored
    values      per site, float32 (units,), finite, higher = keep
    criterion   name of the criterion
    classwise   per site, float32 (classes, units), where the method has them, rows by index; a class that was not
                seen is NaN
    info        seconds, samples, settings: plain data
    scale       what values of two sites say of each other. "site": nothing; "loss": each estimates a change of the
                loss, which has to be weighed against the unit's cost; "plan": the cost is weighed already, so that
                one threshold serves all sites
    """

    sites: tuple[Site, ...]
    values: tuple[Tensor, ...]
    criterion: str
    classwise: tuple[Tensor | LowRank, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "site"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise PluginError(f"{self.criterion}: scale={self.scale!r}, allowed are {', '.join(SCALES)}.")
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

    @property
    def unseen(self) -> tuple[int, ...]:
        """Classes that some site's class-wise scores say nothing of, since no sample told of them."""
        if not self.classwise:
            return ()
        rows = [table.left if isinstance(table, LowRank) else table for table in self.classwise]
        gone = torch.stack([row.isnan().any(1) for row in rows]).any(0)  # (classes,)
        return tuple(gone.nonzero().flatten().tolist())
