"""What every benchmark writes down: the rows, and the command, hardware and versions that made them."""

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
_START = time.time()


def record(name: str, rows: Sequence[dict[str, Any]], about: str, **settings: Any) -> Path:
    """Prints the rows as a table and writes docs/results/<name>.json."""
    given = ["DIR" if "/" in text else text for text in sys.argv[1:]]  # whose folders they were is nobody's concern
    report = {
        "about": about,
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *given]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.time() - _START),
        "hardware": hardware(),
        "versions": versions(),
        "settings": settings,
        "rows": list(rows),
    }
    show(rows, about)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The rows as a table on the terminal."""
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
