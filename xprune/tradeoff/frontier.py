"""The class `Frontier`: the accuracy of a model against its cost. It adds pictures to `FrontierRecord`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xprune.tradeoff.drawing import draw
from xprune.tradeoff.page import write
from xprune.tradeoff.points import FrontierRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Frontier(FrontierRecord):
    """The accuracy of a model against its cost: one pruned model at each of several budgets, from one scoring.

    `xprune.frontier` returns an object of this class.

    Attributes:
        resource: The name of the resource that the budgets limited, such as "macs".
        dense: The metrics of the dense model.
        points: The pruned models, the largest budget first.
        chance: The same budgets with random scores instead. Empty if they were not measured.
        sites: The names, unit kinds and numbers of units of the sites, as dicts with the keys "name", "kind" and
            "size".
        settings: The criterion, the selection, the least fraction that can be reached, seconds, the hardware and the
            versions. They are a dict that JSON can hold.
        scores: The scores from which all plans were made. `xprune.select` makes a plan for any other budget from them.
            None if the frontier was loaded from a file.
        plans: The plan of each point. Empty if the frontier was loaded from a file.

    Example:
        >>> from xprune import Metrics, Point
        >>> dense = Metrics(0.95, 0.2, 1000, macs=100, params=100)
        >>> cut = [Metrics(0.94, 0.2, 1000, macs=50, params=60), Metrics(0.71, 0.9, 1000, macs=30, params=40)]
        >>> points = (Point(0.5, 0.5, (4,), cut[0]), Point(0.3, 0.3, (2,), cut[1]))
        >>> found = Frontier("macs", dense, points)
        >>> found.least(within=0.02).asked
        0.5
        >>> found.budget(found.points[1]).name
        'macs 0.3'
    """

    def plot(self, ax: "Axes | None" = None, cost: str | None = None) -> "Axes":
        """Draws the metric against a cost with matplotlib.

        Args:
            ax: The matplotlib axes to draw on. None means new axes on a new figure.
            cost: The name of a resource that was measured, or "latency". None means the resource of the frontier.

        Returns:
            The axes. To write the picture to a file, call `axes.figure.savefig(...)`.

        Raises:
            ModelError: matplotlib is not installed.
            BudgetError: This cost was not measured.
        """
        return draw(self, ax, self.checked(cost or self.resource))

    def report(self, path: str | Path) -> Path:
        """Writes an HTML page with an interactive picture. The page needs no internet connection.

        Args:
            path: The file to write. If xprune wrote a page with this name before, that page is replaced. Any other
                existing file is refused.

        Returns:
            The path of the page.

        Raises:
            ModelError: The packages of `pip install 'xprune[report]'` are missing.
            ArtefactError: `path` is a file that xprune did not write.
        """
        return write(self, path)
