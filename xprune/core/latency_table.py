"""The class `LatencyTable`: measured times of the sites of a model on a target, which a file can hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xprune.core.site import Site
from xprune.core.table_cost import Curve, TableCost
from xprune.core.target import Target
from xprune.errors import TargetError

_FORMAT = 1
"""The version of the format of the file."""


@dataclass(frozen=True)
class LatencyTable:
    """How long a model takes on a target, as a function of the number of units that each site keeps.

    `xprune.profile` measures a table. `Budget(latency=..., target=Target(table=FILE))` uses one that was saved, perhaps
    on another computer.

    Args:
        target: The target of the measurement.
        hardware: The hardware, as `xprune.environment.hardware` describes it.
        versions: The versions of Python and of packages.
        dense_ms: The time of a forward pass of the dense model, in milliseconds.
        sites: (name, unit kind, size) of each site.
        curves: The times of each site, in the order of `sites`, in milliseconds.
        seconds: How long the measurement took, in seconds.

    Example:
        >>> curve = Curve((0, 4, 8), (0.1, 0.6, 1.0))
        >>> table = LatencyTable(Target(batch=1), {}, {}, 5.0, (("mlp", "neuron", 8),), (curve,))
        >>> site = Site("mlp", "neuron", size=8, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> table.cost([site]).total([4])
        4.6
    """

    target: Target
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    dense_ms: float
    sites: tuple[tuple[str, str, int], ...]
    curves: tuple[Curve, ...]
    seconds: float = 0.0

    def cost(self, sites: Sequence[Site]) -> TableCost:
        """Returns the time in milliseconds as a function of the units that some sites keep.

        Args:
            sites: The sites. They may be fewer than those of the table.

        Raises:
            TargetError: The table has no such site, or one with another number of units.
        """
        known = dict(zip(self.sites, self.curves, strict=True))
        found = []
        for site in sites:
            key = (site.name, site.kind, site.size)
            if key not in known:
                raise TargetError(
                    f"the latency table has no times for {site.name} with {site.size} {site.kind}s, so it was measured "
                    "with another model or other units=. Measure a table of this model with `xprune profile`."
                )
            found.append(known[key])
        return TableCost(self.dense_ms, tuple(found))

    def save(self, path: str | Path) -> Path:
        """Writes the table to a JSON file, and returns its path."""
        file = Path(path)
        sites = [
            {"name": name, "kind": kind, "size": size, **asdict(curve)}
            for (name, kind, size), curve in zip(self.sites, self.curves, strict=True)
        ]
        data = {
            "format": _FORMAT,
            "target": asdict(self.target),
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "dense_ms": self.dense_ms,
            "seconds": self.seconds,
            "sites": sites,
        }
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return file

    @staticmethod
    def read(path: str | Path) -> "LatencyTable":
        """Reads a table that `save` has written.

        Raises:
            TargetError: There is no such file, or it holds no latency table.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TargetError(
                f"the latency table {str(path)!r} cannot be read: {error}. Give a file that `xprune profile` has "
                "written."
            ) from error
        except ValueError as error:
            raise TargetError(f"{str(path)!r} holds no JSON: {error}. Give a file of `xprune profile`.") from error
        try:
            return _table(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TargetError(
                f"{str(path)!r} is no latency table, or is damaged: {type(error).__name__}: {error}. Measure it anew "
                "with `xprune profile`."
            ) from error


def _table(data: Mapping[str, Any]) -> LatencyTable:
    """Returns the table in the data of a file. Raises an error of Python if the data are not as `save` writes them."""
    if data["format"] != _FORMAT:
        raise ValueError(f"its format is {data['format']!r}, and this version of xprune reads {_FORMAT}")
    sites, curves = [], []
    for row in data["sites"]:
        counts = tuple(int(count) for count in row["counts"])
        amounts = tuple(float(amount) for amount in row["amounts"])
        ascending = list(counts) == sorted(set(counts)) and counts[-1] == row["size"] and len(counts) == len(amounts)
        if not ascending or not all(0 <= amount < float("inf") for amount in amounts):
            raise ValueError(f"the times of {row['name']} are not in order")
        sites.append((str(row["name"]), str(row["kind"]), int(row["size"])))
        curves.append(Curve(counts, amounts, bool(row["factor"])))
    dense = float(data["dense_ms"])
    if not 0 < dense < float("inf"):
        raise ValueError(f"the time of the dense model is {dense}")
    return LatencyTable(
        Target(**data["target"]),
        dict(data["hardware"]),
        dict(data["versions"]),
        dense,
        tuple(sites),
        tuple(curves),
        float(data["seconds"]),
    )
