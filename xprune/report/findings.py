"""What the headings of a report say: the finding of each section, in words and numbers."""

from collections.abc import Mapping, Sequence

from xprune.core.record import Metrics
from xprune.report.collect import Facts, SiteFacts


def title(metrics: Mapping[str, Metrics]) -> str:
    """What was cut, and what it cost in accuracy."""
    dense, last = next(iter(metrics.values())), list(metrics.values())[-1]
    what = "Units"
    if dense.macs and last.macs:
        what = f"{percent(1 - last.macs / dense.macs, 0)} of the MACs"
    elif dense.params and last.params:
        what = f"{percent(1 - last.params / dense.params, 0)} of the parameters"
    if dense.metric_name != "accuracy":
        return f"{what} cut: {dense.metric_name} from {dense.metric:.4g} to {last.metric:.4g}"
    return f"{what} cut: accuracy from {percent(dense.metric)} to {percent(last.metric)}"


def kept(facts: Facts) -> str:
    """Units that stayed, by kind."""
    parts = []
    for kind in kinds(facts):
        sites = [site for site in facts.sites if site.kind == kind]
        parts.append(f"{sum(len(s.kept) for s in sites):,} of {sum(s.size for s in sites):,} {kind}s")
    return " and ".join(parts) + " stay."


def network(facts: Facts) -> str:
    """The sites that lost the greatest share of their units, by kind."""
    return "; ".join(_hardest([site for site in facts.sites if site.kind == kind]) for kind in kinds(facts))


def class_map(facts: Facts) -> str:
    """Heads that went although some class ranks them high."""
    heads = [unit for unit in facts.heads if not unit.kept and unit.classes]
    if not heads:
        return "Which class uses which unit"
    missed = sum(unit.classes[0][1] >= 75 for unit in heads)
    return f"{missed} of {len(heads)} removed heads are in the upper quarter for at least one class"


def accuracy(facts: Facts) -> str:
    """Classes that lost, and the one that lost most."""
    lost, gained = (sum(sign * (c.after - c.before) > 0 for c in facts.accuracy) for sign in (-1, 1))
    text, worst = f"{lost} of {len(facts.accuracy)} classes lost accuracy, {gained} gained", facts.accuracy[0]
    if not lost:
        return text
    return f"{text}; {facts.classes[worst.index]} lost most, {100 * (worst.before - worst.after):.0f} points"


def training(facts: Facts) -> str:
    """Where the highest and the lowest threshold ended."""
    ended: Sequence[float] = facts.history[-1]["thresholds"]
    low, high = (pick(range(len(ended)), key=ended.__getitem__) for pick in (min, max))
    names = [facts.sites[index].name for index in (high, low)]
    return f"{names[0]} learned the highest threshold, {ended[high]:.2f}; {names[1]} the lowest, {ended[low]:.2f}"


def faithfulness(facts: Facts) -> str:
    """The curve with the greatest mean distance between a class and the others."""
    gaps = {
        name: sum(b - a for a, b in zip(c["own"], c["others"], strict=True)) / len(c["own"])
        for name, c in facts.faithfulness.items()
    }
    most = max(gaps, key=lambda name: abs(gaps[name]))
    where = "below" if gaps[most] > 0 else "above"
    return f"{most}: a class's own accuracy lies {100 * abs(gaps[most]):.0f} points {where} the others' on average"


def kinds(facts: Facts) -> list[str]:
    """Kinds of units, in order."""
    return list(dict.fromkeys(site.kind for site in facts.sites))


def percent(share: float, digits: int = 1) -> str:
    """A share as percent, with a space that does not break."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _hardest(sites: Sequence[SiteFacts]) -> str:
    kind, shares = sites[0].kind, [len(site.kept) / site.size for site in sites]
    if min(shares) == 1:
        return f"every {kind} stays"
    hit = [site for site, share in zip(sites, shares, strict=True) if share == min(shares)]
    if len(hit) == len(sites):
        return f"every site keeps {len(hit[0].kept)} of {hit[0].size} {kind}s"
    who = hit[0].name if len(hit) == 1 else f"{hit[0].name} and {len(hit) - 1} more"
    gone = hit[0].size - len(hit[0].kept)
    return f"{who} lost most {kind}s, {gone} of {hit[0].size}{' each' if len(hit) > 1 else ''}"
