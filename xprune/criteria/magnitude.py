"""The criterion Magnitude: the score of a unit is the L1 or L2 norm of all weights that are removed with the unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.errors import PluginError
from xprune.modules.paths import tensor_at

PART = 2**20
"""The largest number of weights that are converted to float64 at a time."""


@dataclass(frozen=True)
class Magnitude(Criterion):
    """A criterion whose score is the norm of a unit's weights, (sum of |w|^p)^(1/p). It uses no data.

    The sum is over all parameters that surgery removes with the unit: rows of producers, columns of consumers, biases,
    and entries of tables such as position biases.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, for p = 1. The paper sums over the weights
    of the filter only. We sum over everything that is removed.

    Args:
        p: 1 for the L1 norm, 2 for the L2 norm.

    Raises:
        PluginError: `p` is neither 1 nor 2.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> model = nn.Sequential(nn.Flatten(), mlp)
        >>> _ = nn.init.ones_(mlp[0].weight), nn.init.ones_(mlp[2].weight)
        >>> mlp[0].weight.data[1] = 2.0  # neuron 1 has larger weights than neurons 0 and 2
        >>> sites = xprune.find_sites(model, torch.randn(3, 4))
        >>> xprune.score(model, sites, criterion="magnitude,p=1").values[0]
        tensor([ 6., 10.,  6.])
    """

    p: int = 2
    name: ClassVar[str] = "magnitude"
    needs: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise PluginError(f"magnitude: p={self.p!r}, allowed are 1 and 2.")

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Computes the norm of the weights of each unit.

        Args:
            context: The inputs of a criterion. Only `context.model` is used.
            sites: The sites to score.

        Returns:
            The scores. Their scale is "site", which means that only scores of the same site can be compared.
        """
        values = tuple(self._norms(context.model, site) for site in sites)
        return Scores(tuple(sites), values, self.name, info={"p": self.p})

    @torch.no_grad()
    def _norms(self, model: nn.Module, site: Site) -> Tensor:
        """Returns the norm of the weights of each unit of one site, float32 (units,)."""
        # The sum of many small squares is not precise in float32, and less so in float16. So it is computed in float64.
        total = torch.zeros(site.size, dtype=torch.float64)
        for cut in site.cuts:
            weight = tensor_at(model, cut.tensor)
            # Cuts also contain buffers, such as running statistics. These are not weights, so they are skipped.
            if isinstance(weight, nn.Parameter):
                index = cut.units(site.size).to(weight.device)
                # Some units at a time, because float64 needs four times the memory of bfloat16.
                few = max(1, PART * len(index) // max(1, weight.numel()))
                for start in range(0, len(index), few):
                    some = index[start : start + few]
                    rows = weight.detach().index_select(cut.axis, some.flatten()).movedim(cut.axis, 0)
                    # The shape (units * entries of one unit, rest) becomes (units, entries of one unit * rest).
                    values = rows.reshape(len(some), -1).to(torch.float64)
                    total[start : start + few] += values.abs_().pow_(self.p).sum(1).cpu()
        return total.pow(1 / self.p).float()
