"""What counts: loaders that count how they are read, and functions that count their calls."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.support.models import loader
from xprune import cli, comparison, criteria, pipeline, pruner  # noqa: F401 - the modules whose names are replaced

COUNTED = ("measure_costs", "find_sites", "latency", "evaluate")


class Counted:
    """Batches that count how often they are read: `first` for a first batch alone, `whole` for a pass."""

    def __init__(self, rows: int = 16, batch: int = 8) -> None:
        self.batches = list(loader(rows, batch))
        self.read = Counter()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.read["started"] += 1
        yield from self.batches[:-1]
        self.read["whole"] += 1  # a pass asks for the last batch, a look at the first does not
        yield self.batches[-1]

    @property
    def first(self) -> int:
        """Reads of a first batch that was then thrown away."""
        return self.read["started"] - self.read["whole"]
