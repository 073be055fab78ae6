"""The classes `Curve` and `TableCost`: a cost that was measured at some numbers of units, such as the latency."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xprune.core.costs import Cost, LinearCost


@dataclass(frozen=True)
class Curve:
    """A cost of one site that was measured at some numbers of units. Between two of them, it is a straight line.

    Args:
        counts: The measured numbers of units, in ascending order. The last one is the size of the site.
        amounts: The cost at each of these numbers.
        factor: False if the curve is the cost of the site's own modules. True if it is the cost of the whole model,
            because the units are channels of a stream that all modules read or write.

    Example:
        >>> Curve((0, 4, 8), (1.0, 2.0, 6.0)).at(6)
        4.0
    """

    counts: tuple[int, ...]
    amounts: tuple[float, ...]
    factor: bool = False

    @cached_property
    def values(self) -> list[float]:
        """The cost at each number of units, from 0 to the size of the site. Below the smallest count, it is flat."""
        found: list[float] = np.interp(range(self.counts[-1] + 1), self.counts, self.amounts).tolist()
        return found

    def at(self, count: int) -> float:
        """Returns the cost at a number of units."""
        return self.values[count]


@dataclass(frozen=True)
class TableCost(Cost):
    """A cost with a measured curve for each site. The curves of different sites are added up.

    With k_i units kept at site i, and n_i units in the dense model:

        total(k) = (dense + sum of (curve_i(k_i) - curve_i(n_i)))  *  product of curve_j(k_j) / curve_j(n_j)

    The sum goes over the sites with modules of their own, such as heads and neurons. The product goes over residual
    streams, whose channels make every other module cheaper too.

    Args:
        dense: The cost of the dense model.
        curves: The curve of each site.

    Example:
        >>> cost = TableCost(10.0, (Curve((0, 4), (0.0, 4.0)), Curve((1, 2), (5.0, 10.0), factor=True)))
        >>> cost.total([4, 2]), cost.total([2, 2]), cost.total([2, 1])
        (10.0, 8.0, 4.0)
    """

    dense: float
    curves: tuple[Curve, ...]

    def total(self, counts: Sequence[int]) -> float:
        """Returns the cost of a model whose sites keep these numbers of units."""
        return self._own(counts) * self._factors(counts)

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """See `Cost.step`. Uses the curve of this site only, unless the site is a stream."""
        curve = self.curves[index]
        if curve.factor:
            return super().step(counts, index, count)
        return (curve.at(count) - curve.at(counts[index])) * self._factors(counts)

    def _own(self, counts: Sequence[int]) -> float:
        """Returns the cost without the factors of streams."""
        pairs = zip(self.curves, counts, strict=True)
        return self.dense + sum(curve.at(count) - curve.amounts[-1] for curve, count in pairs if not curve.factor)

    def _factors(self, counts: Sequence[int]) -> float:
        """Returns the product of the factors of streams. It is 1 if there are none."""
        product = 1.0
        for index in self._streams:
            product *= self.curves[index].at(counts[index]) / self.curves[index].amounts[-1]
        return product

    @cached_property
    def _streams(self) -> tuple[int, ...]:
        """The indices of the curves that are factors."""
        return tuple(index for index, curve in enumerate(self.curves) if curve.factor)

    def linear(self, sizes: Sequence[int], around: Sequence[int] | None = None) -> LinearCost:
        """Returns a linear cost that equals this cost for the dense model. See `Cost.linear`.

        Args:
            sizes: The number of units of each site in the dense model.
            around: The number of units of each site at which the linear cost has to be right too, as far as it can.
                The cost of a unit is then the local slope of the curve: the saving between all units and this number,
                divided by the number of removed units. None means one unit.
        """
        if around is None:
            return super().linear(sizes)
        each = []
        for index, (size, kept) in enumerate(zip(sizes, around, strict=True)):
            # A site that keeps all its units there has its slope at the upper end.
            lower = min(kept, size - 1)
            each.append(-self.step(sizes, index, lower) / (size - lower))
        base = self.total(sizes) - sum(unit * size for unit, size in zip(each, sizes, strict=True))
        return LinearCost(base, (0.0,) * len(sizes), tuple(each))
