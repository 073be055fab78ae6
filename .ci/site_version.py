"""A hook of MkDocs that writes the version of xprune at the foot of each page."""

from pathlib import Path
from runpy import run_path
from typing import Any

VERSION = Path(__file__).parents[1] / "xprune" / "environment.py"


def on_config(config: Any) -> Any:
    """Called by MkDocs with its settings before it builds; returns them.

    The file is read alone: importing all of xprune takes seconds, and the site needs nothing else of it.
    """
    config.copyright = f"xprune {run_path(str(VERSION))['__version__']}"
    return config
