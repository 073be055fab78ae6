"""Tables of plug-ins: ours, and those that other packages add through entry points."""

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from xprune.errors import PluginError


def table(group: str, ours: Iterable[Any]) -> dict[str, Any]:
    """name -> class, for our classes and for the entry points of the group `xprune.<group>`.

    Raises PluginError where a foreign plug-in takes a name that is taken.
    """
    found = {kind.name: kind for kind in ours}
    for point in entry_points(group=f"xprune.{group}"):
        kind = point.load()
        if kind.name in found:
            raise PluginError(
                f"{point.value} is called {kind.name!r} like {found[kind.name].__name__}; rename one of them."
            )
        found[kind.name] = kind
    return found


def resolve(what: Any, kinds: Mapping[str, Any], base: type, label: str) -> Any:
    """An instance: `what` itself where it is one, else the class of that name with its default settings.

    Raises PluginError listing the known names.
    """
    if isinstance(what, base):
        return what
    if isinstance(what, str) and what in kinds:
        return kinds[what]()
    raise PluginError(
        f"unknown {label} {what!r}; known: {', '.join(sorted(kinds))}, or an instance of xprune.{base.__name__}."
    )
