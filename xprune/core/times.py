"""The classes `Ratio` and `Times`, which hold measured times of several functions and compare them."""

import statistics
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measured times, with its spread.

    Args:
        median: The median over all rounds.
        low: One tenth of the rounds gave a smaller ratio.
        high: One tenth of the rounds gave a larger ratio.

    Example:
        >>> str(Ratio(1.92, 1.71, 2.04))
        '1.92x (1.71 to 2.04)'
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Times:
    """The times of several functions that ran in turn, in milliseconds.

    Args:
        rounds: One tuple for each round. It has one time for each function.

    Example:
        >>> times = Times(((4.0, 2.0), (8.0, 4.0), (4.4, 2.0)))  # the computer was busy in the second round
        >>> times.median(0), times.ratio(0, 1).median
        (4.4, 2.0)
    """

    rounds: tuple[tuple[float, ...], ...]

    def median(self, index: int) -> float:
        """Returns the median time of the function at `index`, in milliseconds."""
        return statistics.median(times[index] for times in self.rounds)

    def relative(self, index: int, to: int = 0) -> float:
        """Returns the time of one function as a fraction of the time of another one.

        It is the ratio of their lower quartiles. Other programs can only make a call longer, so the lower quartile
        changes less from measurement to measurement than the median.
        """
        return self._quartile(index) / self._quartile(to)

    def _quartile(self, index: int) -> float:
        """Returns the time that a quarter of the calls of a function did not exceed, in milliseconds."""
        return float(np.quantile([times[index] for times in self.rounds], 0.25))

    def ratio(self, index: int, to: int) -> Ratio:
        """Returns the ratio of the times of two functions, with its spread."""
        ratios = sorted(times[index] / times[to] for times in self.rounds)
        tenth = len(ratios) // 10
        return Ratio(statistics.median(ratios), ratios[tenth], ratios[-1 - tenth])
