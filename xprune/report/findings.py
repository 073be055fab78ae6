"""What the headings of a report say: the finding of each section, in words and numbers."""

from collections.abc import Sequence

from xprune.core.unit_kind import UnitKind, kinds_of
from xprune.report.collect import Facts, SiteFacts
from xprune.report.text import measured


def title(facts: Facts) -> str:
    """What was cut, of the first resource that the budget limits, and what it cost in accuracy."""
    dense, last = next(iter(facts.metrics.values())), list(facts.metrics.values())[-1]
    known = [each for each in measured(facts.metrics) if dense.costs.get(each.name) and last.costs.get(each.name)]
    what = "Units"
    for resource in sorted(known, key=lambda each: each.name not in _limited(facts))[:1]:
        what = f"{percent(1 - last.costs[resource.name] / dense.costs[resource.name], 0)} of the {resource.label}"
    if dense.metric_name != "accuracy":
        return f"{what} cut: {dense.metric_name} from {dense.metric:.4g} to {last.metric:.4g}"
    return f"{what} cut: accuracy from {percent(dense.metric)} to {percent(last.metric)}"


def _limited(facts: Facts) -> set[str]:
    """Names of the resources that the budget of the run limits."""
    told = dict(facts.settings.get("budget") or {})
    return {name for name, share in told.items() if share} | {name for name, _ in told.get("resources", ())}


def kept(facts: Facts) -> str:
    """Units that stayed, by kind."""
    parts = []
    for kind in kinds_of(facts.sites):
        sites = _of(facts, kind)
        parts.append(f"{sum(len(s.kept) for s in sites):,} of {sum(s.size for s in sites):,} {kind.plural}")
    return " and ".join(parts) + " stay."


def network(facts: Facts) -> str:
    """The sites that lost the greatest share of their units, by kind."""
    return "; ".join(_hardest(_of(facts, kind), kind) for kind in kinds_of(facts.sites))


def class_map(facts: Facts) -> str:
    """Units that went although some class ranks them high, of kinds that are drawn one by one."""
    gone = [unit for unit in facts.units if not unit.kept and unit.classes]
    if not gone:
        return "Which class uses which unit"
    missed = sum(unit.classes[0][1] >= 75 for unit in gone)
    return f"{missed} of {len(gone)} removed {single(facts)[1]} are in the upper quarter for at least one class"


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


def single(facts: Facts) -> tuple[str, str]:
    """What one unit is called, and what many are, of all that are drawn one by one: ("head", "heads")."""
    names = {(kind.name, kind.plural) for kind in kinds_of(facts.sites) if kind.singly}
    return names.pop() if len(names) == 1 else ("unit", "units")


def binned(facts: Facts) -> str:
    """What units are called that are too many to draw one by one: "neurons and channels"; "" for none."""
    return " and ".join(kind.plural for kind in kinds_of(facts.sites) if not kind.singly)


def _of(facts: Facts, kind: UnitKind) -> list[SiteFacts]:
    return [site for site in facts.sites if site.kind == kind.name]


def percent(share: float, digits: int = 1) -> str:
    """A share as percent, with a space that does not break."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _hardest(sites: Sequence[SiteFacts], kind: UnitKind) -> str:
    shares = [len(site.kept) / site.size for site in sites]
    if min(shares) == 1:
        return f"every {kind.name} stays"
    hit = [site for site, share in zip(sites, shares, strict=True) if share == min(shares)]
    if len(hit) == len(sites):
        return f"every site keeps {len(hit[0].kept)} of {hit[0].size} {kind.plural}"
    who = hit[0].name if len(hit) == 1 else f"{hit[0].name} and {len(hit) - 1} more"
    gone = hit[0].size - len(hit[0].kept)
    return f"{who} lost most {kind.plural}, {gone} of {hit[0].size}{' each' if len(hit) > 1 else ''}"
