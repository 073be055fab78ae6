"""The class `Measure`: how the metric of a run is shown in texts and charts."""

from dataclasses import dataclass

from xprune.core.record import Metrics


@dataclass(frozen=True)
class Measure:
    """How the metric of a run is shown in texts and charts.

    Attributes:
        name: Name of the metric, such as "accuracy".
        factor: Shown numbers are multiplied by it: 100 for an accuracy, which is shown in %, else 1.
        unit: What follows the name on an axis: ", %" for an accuracy, else "".
        sign: 1 if a larger metric is better, -1 if a smaller one is better.

    Example:
        >>> Measure.of(Metrics(2.5, 0.3, 100, metric_name="RMSE", higher_is_better=False))
        Measure(name='RMSE', factor=1, unit='', sign=-1)
    """

    name: str
    factor: int
    unit: str
    sign: int

    @property
    def title(self) -> str:
        """The name with a capital letter, for the start of a line. The rest of the name stays as it is."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def worst(self) -> str:
        """A text that says which classes come first in a chart, such as "that lost most accuracy"."""
        return "that lost most accuracy" if self.name == "accuracy" else "that got worse by most"

    @staticmethod
    def of(metrics: Metrics) -> "Measure":
        """Returns how the metric of some metrics is shown."""
        share = metrics.metric_name == "accuracy"
        return Measure(
            metrics.metric_name,
            100 if share else 1,
            ", %" if share else "",
            1 if metrics.higher_is_better else -1,
        )
