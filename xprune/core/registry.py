"""Tables of plug-ins: ours, and those that other packages add through entry points."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from xprune.errors import PluginError

_TABLES: dict[str, dict[str, Any]] = {}


def table(group: str, ours: Iterable[Any]) -> dict[str, Any]:
    """name -> plug-in (a class; for adapters an instance), ours and the entry points' of the group `xprune.<group>`.

    Raises PluginError where a foreign plug-in takes a name that is taken.
    """
    found = {kind.name: kind for kind in ours}
    for point in entry_points(group=f"xprune.{group}"):
        kind = point.load()
        if kind.name in found:
            raise PluginError(f"{point.value} is called {kind.name!r} like {found[kind.name]!r}; rename one of them.")
        found[kind.name] = kind
    _TABLES[group] = found
    return found


def registered(group: str) -> dict[str, Any]:
    """The table of that group, for a plug-in that asks for its siblings by name: a folder cannot import itself."""
    return _TABLES[group]


def resolve(what: Any, kinds: Mapping[str, Any], base: type, label: str) -> Any:
    """An instance: `what` itself where it is one, else the class of that name, with settings where they are given.

    "taylor", "xpruner,objective=label,steps=200", "learned,slope=[5,20]": values as JSON, or as they stand.
    A class with a `member` stands for a family, and makes the classes of names that begin as its own up to the colon:
    "captum:Saliency". Raises PluginError listing the known names, or the settings that the class has.
    """
    if isinstance(what, base):
        return what
    name, *settings = re.split(r",(?![^\[]*\])", what) if isinstance(what, str) else ("",)
    if name not in kinds and ":" in name:
        family = [kind for key, kind in kinds.items() if key.split(":")[0] == name.split(":")[0]]
        if family and hasattr(family[0], "member"):
            kinds = {name: family[0].member(name)}
    if name not in kinds:
        raise PluginError(
            f"unknown {label} {what!r}; known: {', '.join(sorted(kinds))}, or an instance of xprune.{base.__name__}."
        )
    given = dict(_setting(text) for text in settings)
    known = [field.name for field in fields(kinds[name])] if is_dataclass(kinds[name]) else []
    for key in (key for key in given if key not in known):
        raise PluginError(f"{what!r}: {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
    return kinds[name](**given)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise PluginError(f"{text!r} is not a setting: wanted key=value, for example steps=200.")
    try:
        found = json.loads(value)
    except ValueError:
        found = {"None": None, "True": True, "False": False}.get(value, value)
    return key.strip(), tuple(found) if isinstance(found, list) else found
