"""The class `Scores`: a number for each unit, and optionally a number for each class and unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.errors import PluginError

SCALES = ("site", "loss", "plan")
"""The allowed values of `Scores.scale`, which says whether scores of different sites can be compared."""


@dataclass(frozen=True)
class LowRank:
    """A table of class-wise scores of one site for many classes, stored as a product of two small matrices.

    Row c of the table holds the scores of class c. It is computed as `offset + left[c] @ right`. With thousands of
    classes, the two matrices need far less memory than the whole table.

    Args:
        left: A matrix (classes, rank).
        right: A matrix (rank, units).
        offset: A vector (units,), which is added to every row.

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
        """The shape of the whole table, (classes, units)."""
        return len(self.left), self.right.shape[1]

    def __getitem__(self, classes: Any) -> Tensor:
        """Computes the rows of some classes, and returns them as an ordinary tensor.

        Args:
            classes: An int, a slice, or a tensor of indices or bools, as in `tensor[classes]`.
        """
        return self.offset + self.left[classes] @ self.right


@dataclass(frozen=True)
class Scores:
    """The scores of all units, as a criterion returns them.

    Args:
        sites: The sites whose units are scored.
        values: For each site, a float32 tensor (units,) of finite numbers. Units with higher scores stay.
        criterion: The name of the criterion.
        classwise: For each site, a float32 table (classes, units) with a score for each class and unit. Rows are in the
            order of the class indices. If the criterion saw no sample of a class, the row of this class is NaN. None if
            the criterion gives no class-wise scores.
        info: Notes of the criterion, such as its settings, the number of samples and the seconds. They are numbers,
            strings, lists and dicts.
        scale: How scores of different sites can be compared. "site": they cannot be compared, only units of the same
            site can. "loss": each score estimates a change of the loss, so a selection divides the score by the cost of
            the unit. "plan": the criterion has considered the costs already, so a selection uses one threshold for all
            sites.

    Raises:
        PluginError: A tensor in `values` has a wrong shape or is not finite, or the scale is unknown.

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
        """The indices of the classes without class-wise scores, because the criterion saw no sample of them.

        It is an empty tuple if every class has scores, or if the criterion gives no class-wise scores.
        """
        if not self.classwise:
            return ()
        # A row of `LowRank.left` with NaN gives a row of NaN in the table. So the product need not be computed.
        rows = [table.left if isinstance(table, LowRank) else table for table in self.classwise]
        # A class is unseen if its scores are missing at one site or more. The shape is (classes,).
        unseen = torch.stack([row.isnan().any(1) for row in rows]).any(0)
        return tuple(unseen.nonzero().flatten().tolist())

    @property
    def tied(self) -> tuple[str, ...]:
        """The names of the sites whose units all have the same score, so that the scores do not say which should stay.

        Sites with one unit are left out.
        """
        pairs = zip(self.sites, self.values, strict=True)
        return tuple(site.name for site, value in pairs if site.size > 1 and bool((value == value[0]).all()))

    @property
    def note(self) -> str:
        """A sentence about the sites in `tied`, for warnings and tables. "" if there are none."""
        if not self.tied:
            return ""
        where = "every site" if len(self.tied) == len(self.sites) else f"{', '.join(self.tied[:3])}"
        where += f" and {len(self.tied) - 3} more sites" if len(self.tied) > 3 and where != "every site" else ""
        return (
            f"{self.criterion} gives all units of {where} the same score, so the choice of the units that stay is "
            "arbitrary there. For example, the loss does not depend on them if the weights of a later layer are all 0."
        )
