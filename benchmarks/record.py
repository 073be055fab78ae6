"""Prints and records the result of a benchmark, together with its command, hardware and versions."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xprune.environment import hardware, versions

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# This module is loaded when a benchmark starts, so the time taken counts from here.
_START = time.time()


def record(name: str, rows: Sequence[dict[str, Any]], about: str, **settings: Any) -> Path:
    """Prints the rows as a table and writes them to docs/results/NAME.json.

    The file also holds the command, the date, the seconds since the start, the hardware, the versions and the settings.

    Args:
        name: Name of the file, without .json.
        rows: One dictionary for each row of the table. All rows have the same keys.
        about: What was measured. It is also the title of the table.
        settings: Further plain data to keep in the file.

    Returns:
        The file.
    """
    # The folders of the person who ran the benchmark say nothing about the result.
    arguments = ["DIR" if "/" in text else text for text in sys.argv[1:]]
    report = {
        "about": about,
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.time() - _START),
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "rows": list(rows),
    }
    show(rows, about)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the rows as a table on the terminal. The keys of the first row are the headings."""
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
