"""Chance: the control every table needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores in (0, 1), drawn anew from `context.seed`. Looks at neither weights nor data."""

    name: ClassVar[str] = "random"

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """A number per unit that depends on the seed and the site's place alone."""
        generator = torch.Generator().manual_seed(context.seed)
        values = tuple(torch.rand(site.size, generator=generator) for site in sites)
        return Scores(tuple(sites), values, self.name, info={"seed": context.seed})
