"""Tables of plug-ins by name: the built-in ones, and those that other packages add through entry points."""

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
    """Imports a module and returns one object of it.

    Args:
        where: The module and the name of the object, as "module:Name".

    Returns:
        The object.

    Example:
        >>> imported("torch.nn:Linear").__name__
        'Linear'
    """
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Later:
    """A built-in plug-in that is imported when it is looked up, since its library takes long to import.

    Args:
        name: The plug-in's name.
        where: The module and the name of the plug-in in it, as "module:Name".

    Example:
        >>> plugins = Table("examples", [Later("linear", "torch.nn:Linear")], object, classes=True)
        >>> plugins["linear"].__name__
        'Linear'
    """

    name: str
    where: str


class Table(UserDict[str, Any]):
    """The plug-ins of one group by name: the built-in ones first, then those of other packages.

    It is a mutable mapping, so a script adds a plug-in with `table[name] = plugin`. Plug-ins of other packages come
    from the entry points of the group `xprune.<group>`. They are loaded when the table is first read, not while xprune
    is imported, since their modules import xprune.

    Args:
        group: Name of the group, such as "criteria".
        ours: The built-in plug-ins. Each has a `name`.
        base: The base class of all plug-ins of the group.
        classes: True if plug-ins are subclasses of `base`. False if they are instances.

    Example:
        >>> import xprune
        >>> list(xprune.UNIT_KINDS)[:3]
        ['head', 'neuron', 'channel']
    """

    def __init__(self, group: str, ours: Iterable[Any], base: type, classes: bool) -> None:
        # UserDict.__init__ is not called: it would set `data`, which is a property here.
        self.group, self.base, self.classes, self._loaded = group, base, classes, False
        self._plugins = {plugin.name: plugin for plugin in ours}

    @property
    def data(self) -> dict[str, Any]:  # type: ignore[override]
        """The plug-ins by name. `UserDict` reads and writes them here.

        Raises:
            PluginError: A plug-in of another package cannot be loaded, is not of the class `base`, or has a name that
                is taken.
        """
        if not self._loaded:
            # Set before loading: a module that is being loaded may read the table.
            self._loaded = True
            try:
                for point in entry_points(group=f"xprune.{self.group}"):
                    self._load(point)
            except PluginError:
                # The next read raises the error again. Otherwise the plug-in would silently be missing.
                self._loaded = False
                raise
        return self._plugins

    def __getitem__(self, name: str) -> Any:
        """Returns the plug-in of that name. Imports it first if it is a `Later`."""
        found = super().__getitem__(name)
        if isinstance(found, Later):
            found = self._plugins[name] = imported(found.where)
        return found

    def _load(self, point: EntryPoint) -> None:
        """Loads the plug-in of one entry point and adds it. Raises PluginError if it does not fit the table."""
        where = f"{point.value}, in the group xprune.{self.group},"
        try:
            plugin = point.load()
        # The import runs code of another package, which may raise anything.
        except Exception as error:
            raise PluginError(
                f"the plug-in {where} cannot be loaded: {type(error).__name__}: {error}. Repair or uninstall the "
                "package that adds it."
            ) from error
        if self.classes:
            fits, wanted = isinstance(plugin, type) and issubclass(plugin, self.base), "a subclass"
        else:
            fits, wanted = isinstance(plugin, self.base), "an instance"
        if not fits:
            raise PluginError(f"the plug-in {where} is {plugin!r}, wanted {wanted} of xprune.{self.base.__name__}.")
        # After an error the entry points are loaded again: then a plug-in meets itself, which is allowed.
        known = self._plugins.setdefault(plugin.name, plugin)
        if known is not plugin:
            raise PluginError(
                f"the plug-in {where} is called {plugin.name!r} like {known!r}. Names are unique: rename one of them."
            )


_TABLES: dict[str, Table] = {}
"""Every table by the name of its group."""


def table(group: str, ours: Iterable[Any], base: type, *, classes: bool = False) -> Table:
    """Makes the table of one group of plug-ins, or returns it if it exists.

    Args:
        group: Name of the group. Entry points of the group `xprune.<group>` are added.
        ours: The built-in plug-ins. Each has a `name`. A `Later` is imported when it is looked up.
        base: The base class of all plug-ins of the group.
        classes: True if plug-ins are classes, which are instantiated with settings. False if they are instances.

    Returns:
        A mapping from name to plug-in. Reading it may raise PluginError, see `Table.data`.
    """
    return _TABLES.setdefault(group, Table(group, ours, base, classes))


def registered(group: str) -> Table:
    """Returns the table of a group.

    Use it in files that cannot import the table, since the file of the table imports them.
    """
    return _TABLES[group]


def named(group: str, name: str, label: str, error: type[XPruneError]) -> Any:
    """Returns the plug-in of a name.

    Args:
        group: Name of the group.
        name: Name of the plug-in.
        label: What a plug-in of the group is called in the message, such as "kind of unit".
        error: Class of the error.

    Raises:
        XPruneError: There is no plug-in of that name. The error is of the class `error` and lists the known names.
    """
    known = registered(group)
    if name not in known:
        raise error(
            f"unknown {label} {name!r}; known: {', '.join(known)}. If another package adds it, install that package."
        )
    return known[name]


def resolve(what: Any, kinds: Mapping[str, Any], base: type, label: str) -> Any:
    """Returns an instance of a plug-in from a name, a name with settings, or an instance.

    Settings follow the name, as in "taylor", "xpruner,objective=label,steps=200" or "learned,slope=[5,20]". A value is
    read as JSON. If it is not JSON, it is a string.

    A class with a static method `member` makes all classes whose names have the same text before the colon. So one
    class in the table gives every class of Captum: `member("captum:Saliency")` returns the class of that name.

    Args:
        what: A name with or without settings, or an instance of `base`, which is returned as it is.
        kinds: The classes by name.
        base: The base class.
        label: What a plug-in is called in the message, such as "criterion".

    Raises:
        PluginError: The name or a setting is not known. The message lists the known ones.

    Example:
        >>> import xprune
        >>> resolve("magnitude,p=1", xprune.CRITERIA, xprune.Criterion, "criterion").p
        1
    """
    if isinstance(what, base):
        return what
    # Commas inside brackets belong to a value.
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
    for key in given:
        if key not in known:
            raise PluginError(f"{what!r}: {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
    return kinds[name](**given)


def _setting(text: str) -> tuple[str, Any]:
    """Splits "key=value" into the key and the value, which is read as JSON if it is JSON, else as a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise PluginError(f"{text!r} is not a setting: wanted key=value, for example steps=200.")
    try:
        found = json.loads(value)
    except ValueError:
        # Python's words for the three JSON constants are accepted too.
        found = {"None": None, "True": True, "False": False}.get(value, value)
    # Settings are fields of frozen dataclasses, which are tuples and not lists.
    return key.strip(), tuple(found) if isinstance(found, list) else found
