"""Scores: one number for each unit, and optionally one for each class and unit. Units with higher scores stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.errors import PluginError

SCALES = ("site", "loss", "plan")
"""How scores of two sites may be compared, see `Scores.scale`."""


@dataclass(frozen=True)
class LowRank:
    """Class-wise scores of one site for many classes, kept as the factors of a matrix of low rank.

    The row of class c is `offset + left[c] @ right`. With thousands of classes this takes far less memory than the
    table.

    Args:
        left: (classes, rank).
        right: (rank, units).
        offset: (units,).

    Example:
        >>> table = LowRank(torch.ones(1000, 2), torch.ones(2, 5), torch.zeros(5))
        >>> table.shape
        (1000, 5)
        >>> table[7]
        tensor([2., 2., 2., 2., 2.])
    """

    left: Tensor
    right: Tensor
    offset: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(classes, units), as of the whole table."""
        return len(self.left), self.right.shape[1]

    def __getitem__(self, classes: Any) -> Tensor:
        """Returns the rows of some classes.

        Args:
            classes: An int, a slice, or a tensor of indices or bools, as in `tensor[classes]`.
        """
        return self.offset + self.left[classes] @ self.right


@dataclass(frozen=True)
class Scores:
    """The scores of all units, as a criterion returns them.

    Args:
        sites: The sites whose units are scored.
        values: For each site, float32 (units,). Every value is finite. Units with higher scores stay.
        criterion: Name of the criterion.
        classwise: For each site, float32 (classes, units), if the criterion scores units for each class, else None.
            Rows are in the order of the class indices. The row of a class that no sample showed is NaN.
        info: Notes of the criterion, such as seconds, samples and settings: numbers, strings, lists and dicts.
        scale: How values of two sites compare. "site": not at all, only units of the same site compare. "loss": each
            value estimates a change of the loss, so selections divide it by the cost of the unit. "plan": the cost is
            in the value already, so one threshold serves all sites.

    Raises:
        PluginError: Values do not fit the sites, are not finite, or the scale is unknown.

    Example:
        >>> site = Site("mlp", "neuron", size=3, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> scores = Scores((site,), values=(torch.tensor([0.2, 0.9, 0.4]),), criterion="mine", scale="loss")
        >>> scores.values[0].argmax().item()
        1
        >>> scores.unseen
        ()
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
            raise PluginError(
                f"{self.criterion}: {len(self.values)} score tensors for {len(self.sites)} sites. Give one tensor for "
                "each site, in the same order."
            )
        for site, value in zip(self.sites, self.values, strict=True):
            if tuple(value.shape) != (site.size,):
                raise PluginError(
                    f"{self.criterion}: {site.name} has {site.size} units, but its scores have the shape "
                    f"{tuple(value.shape)}. Give a tensor of shape ({site.size},)."
                )
            if not bool(torch.isfinite(value).all()):
                raise PluginError(
                    f"{self.criterion}: {site.name} has scores that are not finite. Check that the weights of the "
                    "model are finite."
                )

    @property
    def unseen(self) -> tuple[int, ...]:
        """Indices of the classes that have no class-wise scores, since no sample showed them. () if there are none."""
        if not self.classwise:
            return ()
        # A row of factors is NaN where the row of the table is: NaN passes through the product.
        rows = [table.left if isinstance(table, LowRank) else table for table in self.classwise]
        # A class counts as unseen as soon as one site lacks its scores. Shape: (classes,).
        unseen = torch.stack([row.isnan().any(1) for row in rows]).any(0)
        return tuple(unseen.nonzero().flatten().tolist())
