"""Writes the headings of a report. Each heading says the main result of its section, in words and numbers."""

from collections.abc import Sequence

from xprune.core.unit_kind import UnitKind, kinds_of
from xprune.report.collect import Facts, SiteFacts
from xprune.report.text import measured


def title(facts: Facts) -> str:
    """Returns the title of the page: how much was removed, and how the metric changed.

    The title names the first resource that the budget limits. If the budget is unknown, it names the first resource
    that was measured.
    """
    dense, last = next(iter(facts.metrics.values())), list(facts.metrics.values())[-1]
    known = [each for each in measured(facts.metrics) if dense.costs.get(each.name) and last.costs.get(each.name)]
    amount = "Units"
    for resource in sorted(known, key=lambda each: each.name not in _limited(facts))[:1]:
        amount = f"{percent(1 - last.costs[resource.name] / dense.costs[resource.name], 0)} of the {resource.label}"
    if dense.metric_name != "accuracy":
        return f"{amount} cut: {dense.metric_name} from {dense.metric:.4g} to {last.metric:.4g}"
    return f"{amount} cut: accuracy from {percent(dense.metric)} to {percent(last.metric)}"


def _limited(facts: Facts) -> set[str]:
    """Returns the names of the resources that the budget of the run limits. Empty if the budget is unknown."""
    budget = dict(facts.settings.get("budget") or {})
    return {name for name, share in budget.items() if share} | {name for name, _ in budget.get("resources", ())}


def kept(facts: Facts) -> str:
    """Returns a sentence that gives the number of kept units of each unit kind."""
    parts = []
    for kind in kinds_of(facts.sites):
        sites = _of(facts, kind)
        parts.append(f"{sum(len(s.kept) for s in sites):,} of {sum(s.size for s in sites):,} {kind.plural}")
    return " and ".join(parts) + " were kept."


def coverage(facts: Facts) -> str:
    """Returns the share of the MACs that the units cover, and the number of modules that were left alone, as text."""
    found = facts.coverage
    if found is None or found.share is None:
        return "Which share of the MACs the units cover is not known"
    of = "the MACs of this part" if found.inside else "the MACs"
    left = (
        ""
        if found.left is None
        else f"; {len(found.left) or 'no'} module{'s were' if len(found.left) != 1 else ' was'} left alone"
    )
    return f"Units cover {percent(found.share)} of {of}{left}"


def network(facts: Facts) -> str:
    """Returns for each unit kind which site lost the largest share of its units, as text."""
    return "; ".join(_hardest(_of(facts, kind), kind) for kind in kinds_of(facts.sites))


def class_map(facts: Facts) -> str:
    """Returns how many removed units are among the 25 % of units that at least one class uses most, as text.

    It counts only units that the report draws one by one, such as heads.
    """
    gone = [unit for unit in facts.units if not unit.kept and unit.classes]
    if not gone:
        return "Which class uses which unit"
    missed = sum(unit.classes[0][1] >= 75 for unit in gone)
    return (
        f"{missed} of {len(gone)} removed {single(facts)[1]} are among the 25\N{NO-BREAK SPACE}% that a class uses most"
    )


def accuracy(facts: Facts) -> str:
    """Returns how many classes lost and gained accuracy, and which class lost most, as text.

    If the metric is not the accuracy, the text says how many classes got worse and better in it.
    """
    shown = facts.metric
    changes = [shown.sign * (c.after - c.before) for c in facts.accuracy]
    lost, gained = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    worst = facts.accuracy[0]
    if shown.name != "accuracy":
        text = f"{shown.name}: {lost} of {len(changes)} classes got worse, {gained} better"
        name = facts.classes[worst.index]
        return f"{text}; {name} most, from {worst.before:.4g} to {worst.after:.4g}" if lost else text
    text = f"{lost} of {len(changes)} classes lost accuracy, {gained} gained"
    if not lost:
        return text
    return f"{text}; {facts.classes[worst.index]} lost most, {-100 * changes[0]:.0f} points"


def training(facts: Facts) -> str:
    """Returns which sites learned the highest and the lowest threshold, as text."""
    ended: Sequence[float] = facts.history[-1]["thresholds"]
    low, high = (pick(range(len(ended)), key=ended.__getitem__) for pick in (min, max))
    names = [facts.sites[index].name for index in (high, low)]
    return f"{names[0]} learned the highest threshold, {ended[high]:.2f}; {names[1]} the lowest, {ended[low]:.2f}"


def faithfulness(facts: Facts) -> str:
    """Returns the name of the curves with the largest distance between a class and the others, and the distance.

    The distance is the metric on samples of other classes minus the metric on samples of the class, as the mean over
    the fractions of deleted units. The metric is usually the accuracy.
    """
    gaps = {
        name: sum(b - a for a, b in zip(c["own"], c["others"], strict=True)) / len(c["own"])
        for name, c in facts.faithfulness.items()
    }
    most = max(gaps, key=lambda name: abs(gaps[name]))
    where = "below" if gaps[most] > 0 else "above"
    shown = facts.metric
    size = f"{100 * abs(gaps[most]):.0f} points" if shown.name == "accuracy" else f"{abs(gaps[most]):.4g}"
    return f"{most}: the {shown.name} of a class is on average {size} {where} that of the other classes"


def single(facts: Facts) -> tuple[str, str]:
    """Returns the singular and the plural for the units that the report draws one by one: ("head", "heads").

    The result is ("unit", "units") if there are several such unit kinds, or none.
    """
    names = {(kind.name, kind.plural) for kind in kinds_of(facts.sites) if kind.singly}
    return names.pop() if len(names) == 1 else ("unit", "units")


def binned(facts: Facts) -> str:
    """Returns the plural of the units that are not drawn one by one, such as "neurons and channels". "" for none."""
    return " and ".join(kind.plural for kind in kinds_of(facts.sites) if not kind.singly)


def _of(facts: Facts, kind: UnitKind) -> list[SiteFacts]:
    """Returns the sites of a unit kind."""
    return [site for site in facts.sites if site.kind == kind.name]


def percent(share: float, digits: int = 1) -> str:
    """Returns a share from 0 to 1 as a percentage. A line cannot break before the % sign."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _hardest(sites: Sequence[SiteFacts], kind: UnitKind) -> str:
    """Returns which of the sites lost the largest share of its units, as text."""
    shares = [len(site.kept) / site.size for site in sites]
    if min(shares) == 1:
        return f"every {kind.name} was kept"
    hit = [site for site, share in zip(sites, shares, strict=True) if share == min(shares)]
    if len(hit) == len(sites):
        return f"every site keeps {len(hit[0].kept)} of {hit[0].size} {kind.plural}"
    names = hit[0].name if len(hit) == 1 else f"{hit[0].name} and {len(hit) - 1} more"
    removed = hit[0].size - len(hit[0].kept)
    return f"{names} lost the most {kind.plural}, {removed} of {hit[0].size}{' each' if len(hit) > 1 else ''}"
