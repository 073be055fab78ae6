"""A hook of MkDocs that writes the version of xprune at the foot of each page."""

from typing import Any

from xprune import __version__


def on_config(config: Any) -> Any:
    """Called by MkDocs with its settings before it builds; returns them."""
    config.copyright = f"xprune {__version__}"
    return config
