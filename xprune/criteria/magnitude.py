"""Weight magnitude: the L1 or L2 norm of every weight that leaves with the unit."""

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


@dataclass(frozen=True)
class Magnitude(Criterion):
    """(sum |w|^p)^(1/p) over all parameters that surgery removes with the unit: rows, columns, biases, tables.

    Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, for p = 1; there over the filter alone, here over
    everything that goes.

    p   1 or 2
    """

    p: int = 2
    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise PluginError(f"magnitude: p={self.p!r}, allowed are 1 and 2.")

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """A norm per unit; looks at no data."""
        values = tuple(self._norms(context.model, site) for site in sites)
        return Scores(tuple(sites), values, self.name, info={"p": self.p})

    @torch.no_grad()
    def _norms(self, model: nn.Module, site: Site) -> Tensor:
        total = torch.zeros(site.size, dtype=torch.float64)
        for cut in site.cuts:
            weight = tensor_at(model, cut.tensor)
            if isinstance(weight, nn.Parameter):
                parts = weight.detach().movedim(cut.axis, 0).reshape(cut.groups, site.size, -1)  # (groups, units, rest)
                total += parts.to(torch.float64).abs().pow(self.p).sum((0, 2)).cpu()
        return total.pow(1 / self.p).float()
