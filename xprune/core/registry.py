"""Tables of plug-ins: ours, and those that other packages add through entry points."""

import json
import re
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from xprune.errors import PluginError, XPruneError


def imported(where: str) -> Any:
    """Imports "module:Name" and returns what the module has under that name."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Later:
    """A plug-in of this package that is imported when it is looked up, because its library takes long to import.

    Args:
        name: The plug-in's name.
        where: Where it is, as "module:Name".
    """

    name: str
    where: str


class Table(UserDict[str, Any]):
    """Plug-ins of one group by name: ours, then those that other packages add through entry points.

    Entry points are loaded when the table is first looked at, not while this package is imported: their modules may
    import all of it. A script may add plug-ins of its own.
    """

    def __init__(self, group: str, ours: Iterable[Any], base: type, classes: bool) -> None:
        self.group, self.base, self.classes, self._loaded = group, base, classes, False
        self._held = {plugin.name: plugin for plugin in ours}

    @property
    def data(self) -> dict[str, Any]:  # type: ignore[override]
        """The plug-ins. Loads the entry points at first."""
        if not self._loaded:
            self._loaded = True  # a module that is loaded may look at the table
            try:
                for point in entry_points(group=f"xprune.{self.group}"):
                    self._add(point)
            except PluginError:
                self._loaded = False  # the next look says so again
                raise
        return self._held

    def __getitem__(self, name: str) -> Any:
        """The plug-in of that name. Imports it if it is a `Later`."""
        found = super().__getitem__(name)
        if isinstance(found, Later):
            found = self._held[name] = imported(found.where)
        return found

    def _add(self, point: EntryPoint) -> None:
        where = f"{point.value}, in the group xprune.{self.group},"
        try:
            plugin = point.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise PluginError(
                f"{where} cannot be loaded: {type(error).__name__}: {error}. Mend or uninstall the package of it."
            ) from error
        if self.classes:
            fits, wanted = isinstance(plugin, type) and issubclass(plugin, self.base), "a subclass"
        else:
            fits, wanted = isinstance(plugin, self.base), "an instance"
        if not fits:
            raise PluginError(f"{where} is {plugin!r}, wanted {wanted} of xprune.{self.base.__name__}.")
        held = self._held.setdefault(plugin.name, plugin)
        if held is not plugin:
            raise PluginError(f"{where} is called {plugin.name!r} like {held!r}; rename one of them.")


_TABLES: dict[str, Table] = {}


def table(group: str, ours: Iterable[Any], base: type, *, classes: bool = False) -> Table:
    """The table of one group of plug-ins.

    Args:
        group: Name of the group. Entry points are those of the group `xprune.<group>`.
        ours: The plug-ins of this package. Each has a `name`. A `Later` is imported when it is looked up.
        base: The class that every plug-in is of.
        classes: True where plug-ins are classes, made anew with settings; False where they are instances.

    Returns:
        Plug-in by name, ours first. To look into it raises PluginError where a foreign plug-in cannot be loaded, is no
        `base`, or takes a name that is taken.
    """
    return _TABLES.setdefault(group, Table(group, ours, base, classes))


def registered(group: str) -> Table:
    """The table of that group, for files that stand below the table or in it."""
    return _TABLES[group]


def named(group: str, name: str, label: str, error: type[XPruneError]) -> Any:
    """The plug-in of that name.

    Args:
        group: Whose table is asked.
        name: The name.
        label: What plug-ins of the group are called, in one word or two.
        error: What is raised, with the names that are known, where there is none of that name.
    """
    known = registered(group)
    if name not in known:
        raise error(
            f"unknown {label} {name!r}; known: {', '.join(known)}. Where another package adds it, install that package."
        )
    return known[name]


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
        family = [kinds[key] for key in kinds if key.split(":")[0] == name.split(":")[0]]
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
