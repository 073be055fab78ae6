"""Random scores: the control that each other criterion has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site


@dataclass(frozen=True)
class Random(Criterion):
    """A criterion: random scores, uniform in [0, 1). They depend on the seed, not on weights or data.

    Use it as the control in a comparison: a criterion has to do better than random scores.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> sites = xprune.find_sites(model, torch.randn(3, 4, 8))
        >>> first, again, other = (xprune.score(model, sites, criterion="random", seed=seed) for seed in (1, 1, 2))
        >>> torch.equal(first.values[0], again.values[0]), torch.equal(first.values[0], other.values[0])
        (True, False)
    """

    name: ClassVar[str] = "random"

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Draws a score for each unit.

        Args:
            context: Only its seed is used.
            sites: The sites to score. The numbers are drawn for one site after the other, in this order.

        Returns:
            The scores. Scores of different sites are not comparable: `Scores.scale` is "site".
        """
        # A generator of our own, on the CPU: the same numbers on every device, and torch's own state stays as it is.
        generator = torch.Generator().manual_seed(context.seed)
        values = tuple(torch.rand(site.size, generator=generator) for site in sites)
        return Scores(tuple(sites), values, self.name, info={"seed": context.seed})
