"""The class `Coverage`: how much of a model's cost the units cover, and which modules were left alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xprune.core.costs import Costs
from xprune.errors import PlanError

LONGEST = 200
"""The largest number of characters of a reason in one line of text."""


@dataclass(frozen=True)
class Coverage:
    """Says which share of a model's MACs the units cover, and which modules were left alone.

    A layer is covered if its MACs change with the number of units that a site keeps. With C(k) as the measured MACs of
    the model whose sites keep k units:

        share = (C(all units) - C(no units)) / C(all units)

    C(no units) is what no unit covers, such as the patch embedding and the classifier. So `share` is the largest
    fraction of the MACs that pruning can remove, if every site loses all its units. If only a part of the model is
    pruned (`find_sites(inside=)`), the denominator is the MACs of this part in the dense model.

    Args:
        share: The share, from 0 to 1. None if it is not known.
        sites: The number of sites.
        left: The reason for each module that was left alone, by the path of the module. None if the caller gave the
            sites, so that nobody knows what was left alone.
        inside: The patterns of the part that is pruned. Empty if it is the whole model.
        part: The share of the model's MACs that lies in this part, from 0 to 1. None if the part is the whole model, or
            if the share is not known.

    Example:
        >>> why = "it has a single head, which is the whole attention, so no head can be removed."
        >>> coverage = Coverage(0.934, 24, {"pooler.attn": why})
        >>> print(coverage.text)  # doctest: +NORMALIZE_WHITESPACE
        Units cover 93.4 % of the model's MACs (24 sites). Left alone: pooler.attn: it has a single head, which is the
        whole attention, so no head can be removed.
        >>> Coverage.from_json(coverage.to_json()) == coverage
        True
    """

    share: float | None
    sites: int
    left: Mapping[str, str] | None = None
    inside: tuple[str, ...] = ()
    part: float | None = None

    @staticmethod
    def of(costs: Costs, left: Mapping[str, str] | None = None, inside: tuple[str, ...] = ()) -> "Coverage":
        """Computes the coverage from measured costs. It measures nothing again.

        Args:
            costs: The costs of the sites.
            left: The reason for each module that was left alone. None if it is not known.
            inside: The patterns of the part that is pruned. Empty for the whole model.

        Example:
            >>> from xprune import LinearCost, Site
            >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> costs = Costs((site,), {"macs": LinearCost(base=200.0, fixed=(0.0,), unit=(50.0,))})
            >>> Coverage.of(costs).share
            0.8
        """
        share = part = None
        if "macs" in costs.by_resource:
            full = [site.size for site in costs.sites]
            # A resource of another package may take the place of "macs" and not be linear.
            cost = costs.macs.linear(full)
            dense = cost.total(full)
            inner = dense if costs.part is None else costs.part.get("macs", 0.0)
            share = min(1.0, max(0.0, (dense - cost.base) / inner)) if inner > 0 else None
            part = inner / dense if costs.part is not None and dense > 0 else None
        return Coverage(share, len(costs.sites), left, inside, part)

    @property
    def text(self) -> str:
        """The coverage as one line: the share, the number of sites, and what was left alone, with the main reason."""
        what = "the model's MACs" if not self.inside else f"the MACs inside {', '.join(self.inside)}"
        share = "an unknown share" if self.share is None else percent(self.share)
        line = f"Units cover {share} of {what} ({self.sites} site{'s' if self.sites != 1 else ''})."
        if self.part is not None:
            line += f" This part has {percent(self.part)} of the model's MACs."
        return f"{line} {self._left}" if self.left is not None else line

    @property
    def reasons(self) -> list[tuple[str, tuple[str, ...]]]:
        """The reasons for which modules were left alone, the most frequent one first.

        Reasons that differ only in numbers and in the path of their module count as one reason.

        Returns:
            A tuple (reason, paths) for each reason. The text is that of the first module.

        Example:
            >>> left = {"a.0": "it has 3 heads in a.0", "b": "no hook", "a.1": "it has 4 heads in a.1"}
            >>> Coverage(None, 0, left).reasons
            [('it has 3 heads in a.0', ('a.0', 'a.1')), ('no hook', ('b',))]
        """
        found: dict[str, tuple[str, list[str]]] = {}
        for path, why in (self.left or {}).items():
            found.setdefault(_without_numbers(path, why), (why, []))[1].append(path)
        return [(why, tuple(paths)) for why, paths in sorted(found.values(), key=lambda each: -len(each[1]))]

    @property
    def _left(self) -> str:
        """A text about the modules that were left alone: how many, and the most frequent reason."""
        reasons = self.reasons
        if not reasons:
            return "No module was left alone."
        why, paths = reasons[0]
        count = sum(len(paths) for _, paths in reasons)
        if count == 1:
            return f"Left alone: {paths[0]}: {short_reason(why)}"
        times = "" if len(reasons) == 1 else f" for {len(reasons)} reasons"
        return f"Left alone: {count} modules{times}, for example {paths[0]}: {short_reason(why)}"

    def to_json(self) -> dict[str, Any]:
        """Returns the coverage as a dict that JSON can hold. `Coverage.from_json` reads the dict."""
        left = None if self.left is None else dict(self.left)
        return {
            "share": self.share,
            "sites": self.sites,
            "left": left,
            "inside": list(self.inside),
            "part": self.part,
        }

    @staticmethod
    def from_json(data: Any) -> "Coverage":
        """Makes a coverage from the dict that `to_json` returned.

        Raises:
            PlanError: The data do not have the form that `to_json` returns.
        """
        try:
            share, sites, left = data["share"], data["sites"], data["left"]
            inside, part = data["inside"], data["part"]
            fits = type(sites) is int and all(each is None or 0 <= each <= 1 for each in (share, part))
            texts = [*inside, *(left or {}), *(left or {}).values()]
            if not fits or isinstance(inside, str) or not all(isinstance(text, str) for text in texts):
                raise ValueError("a value is of the wrong type or out of range")
            return Coverage(share, sites, None if left is None else dict(left), tuple(inside), part)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"not a coverage: {error}. Give what Coverage.to_json returned.") from error


def percent(share: float) -> str:
    """Returns a share from 0 to 1 as a percentage with up to one decimal place.

    Example:
        >>> percent(0.934), percent(1.0)
        ('93.4 %', '100 %')
    """
    return f"{f'{100 * share:.1f}'.removesuffix('.0')} %"


def short_reason(why: str) -> str:
    """Returns the first sentence of a reason, which ends in a full stop. A very long sentence is cut.

    Example:
        >>> short_reason("its forward fails. Check that the model runs")
        'its forward fails.'
    """
    # A full stop inside a path or a number has no space after it.
    first = re.split(r"\.\s+(?=[A-Z])", " ".join(why.split()), maxsplit=1)[0].rstrip(".")
    return f"{first[: LONGEST - 3]}..." if len(first) > LONGEST else f"{first}."


def _without_numbers(path: str, why: str) -> str:
    """Returns a reason without its numbers and the path of its module, to compare it with other reasons."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", why.replace(path, "@") if path else why)
