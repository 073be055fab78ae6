"""Says what the removal of units gained in time, and what to do where it gained little."""

from collections.abc import Mapping
from typing import Any

from xprune.core.coverage import percent
from xprune.core.record import Metrics
from xprune.core.target import Target

LEAST = 0.6
"""A gain below this number is called small. Of the time that the removed MACs should save, too much is not saved."""
_FAST_WIDTH = 16
"""Widths that are multiples of this number are no reason for slow kernels, so no other rounding is advised."""
_LARGE = {"cpu": 16}
"""Type of a device -> the number of samples from which a larger batch is not advised. Other devices: `_LARGE_ELSE`."""
_LARGE_ELSE = 256
"""Accelerators work on many samples at once, so they need larger batches than the CPU."""


def latency_text(metrics: Metrics) -> str:
    """Returns the time of a forward pass as text, and how many times as fast as the dense model the model is.

    Example:
        >>> from xprune.core.times import Ratio
        >>> latency_text(Metrics(0.9, 0.3, 100, latency_ms=24.9))
        '24.9 ms'
        >>> latency_text(Metrics(0.8, 0.5, 100, latency_ms=15.7, speedup=Ratio(1.58, 1.5, 1.66)))
        '15.7 ms, 1.58x (1.50 to 1.66)'
    """
    if metrics.latency_ms is None:
        return "-"
    time = milliseconds(metrics.latency_ms)
    return time if metrics.speedup is None else f"{time}, {metrics.speedup}"


def milliseconds(time: float) -> str:
    """Returns a time as text. Times of small models have two digits.

    Example:
        >>> milliseconds(24.94), milliseconds(0.0571)
        ('24.9 ms', '0.057 ms')
    """
    return f"{time:.1f} ms" if time >= 1 else f"{time:.2g} ms"


def gain_text(metrics: Metrics, dense: Metrics) -> str:
    """Returns the gain of a model as text. "-" if it was not measured."""
    gain = metrics.gain(dense)
    return "-" if gain is None else f"{gain:.2f}"


def gain_note(metrics: Mapping[str, Metrics], settings: Mapping[str, Any] | None = None) -> str:
    """Returns a text for a model that is slower than the dense one, or has a small gain: what was found, what to do.

    Args:
        metrics: Mapping from the name of a model to its metrics. The first is the dense model, the last the model that
            the user gets.
        settings: The settings of the run. The text leaves out what the budget does already.

    Returns:
        The text, in one line. "" if the gain is good, or if the time was not measured.

    Example:
        >>> from xprune.core.times import Ratio
        >>> dense = Metrics(0.9, 0.3, 100, macs=200, latency_ms=24.9)
        >>> pruned = Metrics(0.8, 0.5, 100, macs=100, latency_ms=33.1, latency_rows=256, speedup=Ratio(0.75, 0.7, 0.8),
        ...     target=Target("cuda", "bfloat16"))
        >>> gain_note({"dense": dense, "pruned": pruned}).partition(" What")[0]
        'The pruned model is slower than the dense model: 0.75x (0.70 to 0.80), with 50 % of the MACs (gain 0.38).'
        >>> gain_note({"dense": dense})
        ''
    """
    dense, last = next(iter(metrics.values())), list(metrics.values())[-1]
    gain, speedup = last.gain(dense), last.speedup
    # A gain needs the MACs of both models. A slower model is slower without them too.
    slower = speedup is not None and speedup.median < 1
    if speedup is None or not (slower or (gain is not None and gain < LEAST)):
        return ""
    share = ""
    if gain is not None and last.macs and dense.macs:
        share = f", with {percent(last.macs / dense.macs)} of the MACs (gain {gain:.2f})"
    found = (
        f"The pruned model is slower than the dense model: {speedup}{share}."
        if slower
        else f"The pruned model gains little time: it is {speedup} as fast as the dense model{share}."
    )
    return f"{found} What can help: {'; '.join(_advice(last, settings or {}))}."


def _advice(metrics: Metrics, settings: Mapping[str, Any]) -> list[str]:
    """Returns what can make a pruned model faster. Each text is one way that the run has not used."""
    target, budget = metrics.target or Target(), dict(settings.get("budget") or {})
    device = (target.device or "").partition(":")[0]
    found = []
    # On the CPU in float32, rounding changes the time by some percent only, see docs/results/latency-cpu.json.
    any_width = device == "cpu" and target.dtype == "float32"
    if not any_width and not _rounds(budget.get("round_to", 1)):
        found.append('widths that fast kernels like (round_to="auto" in the budget)')
    if not {"latency", "latency_ms"} & _limited(budget):
        found.append("a budget of time instead of MACs (latency=0.5)")
    rows, large = metrics.latency_rows, _LARGE.get(device, _LARGE_ELSE)
    if rows is None or rows < large:
        found.append(f"a larger batch{'' if rows is None else f' than {rows}'}")
    if not target.compiled:
        found.append("torch.compile")
    return found or ["fewer blocks or residual channels, because what is left of the time does not follow the MACs"]


def _rounds(round_to: Any) -> bool:
    """Returns True if a budget rounds widths to what fast kernels like: "auto", or a large number for each site.

    Args:
        round_to: The value of `Budget.round_to`, as JSON holds it: a number, a text, or pairs (site, number).
    """
    if isinstance(round_to, str):
        return True
    multiples = [pair[1] for pair in round_to] if isinstance(round_to, (list, tuple)) else [round_to]
    return min(multiples, default=1) >= _FAST_WIDTH


def _limited(budget: Mapping[str, Any]) -> set[str]:
    """Returns the names of the resources that a budget limits. The budget is in the form of the settings of a run."""
    pairs = budget.get("resources") or ()
    return {name for name, share in budget.items() if share is not None} | {name for name, _ in pairs}
