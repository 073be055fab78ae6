"""The criterion Random: random scores. A useful criterion gives better pruned models than random scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site


@dataclass(frozen=True)
class Random(Criterion):
    """A criterion with random scores, uniform in [0, 1). They depend only on the seed and on the sizes of the sites.

    Use it as the baseline of a comparison: another criterion is useful only if it gives better models.

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
    needs: ClassVar[str] = "nothing"

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Generates a random score for each unit.

        Args:
            context: The inputs of a criterion. Only `context.seed` is used.
            sites: The sites to score. The numbers are generated in the order of the sites.

        Returns:
            The scores. Their scale is "site", which means that only scores of the same site can be compared.
        """
        # A separate generator leaves torch's random state unchanged. It is on the CPU to give the same numbers on every
        # device.
        generator = torch.Generator().manual_seed(context.seed)
        values = tuple(torch.rand(site.size, generator=generator) for site in sites)
        return Scores(tuple(sites), values, self.name, info={"seed": context.seed})
