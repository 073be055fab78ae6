"""Tables that find plug-ins by name. Other packages add plug-ins to these tables through entry points."""

import json
import re
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any

from xprune.errors import PluginError, XPruneError


def imported(where: str) -> Any:
    """Imports a module and returns one object of it. `Table` calls it for plug-ins that are imported only when needed.

    Args:
        where: The module and the name of the object in it, as "module:Name".

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
    """The place of a built-in plug-in that is imported only when a user asks for it, because the import takes long.

    A `Table` may hold an object of this class instead of the plug-in.

    Args:
        name: The name of the plug-in.
        where: The module and the name of the plug-in's class in it, as "module:Name".

    Example:
        >>> plugins = Table("examples", [Later("linear", "torch.nn:Linear")], object, classes=True)
        >>> plugins["linear"].__name__
        'Linear'
    """

    name: str
    where: str


class Table(UserDict[str, Any]):
    """A dict from names to the plug-ins of one group, such as criteria. The tables of xprune are objects of this class.

    The built-in plug-ins come first. After them come the plug-ins of other packages, which are found by the entry-point
    group `xprune.<group>`. A script adds a plug-in with `table[name] = plugin`.

    Plug-ins of other packages are loaded when the table is read for the first time. They cannot be loaded while xprune
    is imported, because their modules import xprune.

    Args:
        group: The name of the group, such as "criteria".
        ours: The built-in plug-ins. Each has an attribute `name`.
        base: The base class of all plug-ins of the group.
        classes: True if the plug-ins are subclasses of `base`. False if they are instances of `base`.

    Example:
        >>> import xprune
        >>> list(xprune.UNIT_KINDS)[:3]
        ['head', 'neuron', 'channel']
    """

    def __init__(self, group: str, ours: Iterable[Any], base: type, classes: bool) -> None:
        # UserDict.__init__ is not called, because it would set the attribute `data`, which is a property here.
        self.group, self.base, self.classes, self._loaded = group, base, classes, False
        self._plugins = {plugin.name: plugin for plugin in ours}

    @property
    def data(self) -> dict[str, Any]:  # type: ignore[override]
        """The plug-ins by name. `UserDict` uses this dict for every access to the table.

        Raises:
            PluginError: A plug-in of another package cannot be loaded, is not of the class `base`, or has the name of
                another plug-in.
        """
        if not self._loaded:
            # This is set before the loading, because the module of a plug-in may read the table while it is imported.
            self._loaded = True
            try:
                for point in entry_points(group=f"xprune.{self.group}"):
                    self._load(point)
            except PluginError:
                # The next access then loads again and raises the same error. Otherwise it would return a table without
                # this plug-in.
                self._loaded = False
                raise
        return self._plugins

    def __getitem__(self, name: str) -> Any:
        """Returns the plug-in of that name. If the table holds a `Later` for it, imports the plug-in first."""
        found = super().__getitem__(name)
        if isinstance(found, Later):
            found = self._plugins[name] = imported(found.where)
        return found

    def _load(self, point: EntryPoint) -> None:
        """Loads the plug-in of one entry point and adds it to the table. Raises PluginError if it does not fit."""
        where = f"{point.value}, in the group xprune.{self.group},"
        try:
            plugin = point.load()
        # The import runs code of another package, which may raise any exception.
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
        # If an earlier access failed, this plug-in may be in the table already. Only another plug-in of this name is an
        # error.
        known = self._plugins.setdefault(plugin.name, plugin)
        if known is not plugin:
            raise PluginError(
                f"the plug-in {where} is called {plugin.name!r} like {known!r}. Names are unique: rename one of them."
            )


_TABLES: dict[str, Table] = {}
"""All tables, by the names of their groups."""


def table(group: str, ours: Iterable[Any], base: type, *, classes: bool = False) -> Table:
    """Makes the table of one group of plug-ins. Returns the existing table if the group already has one.

    Args:
        group: The name of the group. Plug-ins are also loaded from the entry-point group `xprune.<group>`.
        ours: The built-in plug-ins. Each has an attribute `name`. A plug-in whose import takes long may be given as a
            `Later`.
        base: The base class of all plug-ins of the group.
        classes: True if plug-ins are classes, which users instantiate with settings. False if they are instances.

    Returns:
        The table. Access to its entries may raise PluginError, see `Table.data`.
    """
    return _TABLES.setdefault(group, Table(group, ours, base, classes))


def registered(group: str) -> Table:
    """Returns the table of a group.

    Files that the module of the table imports cannot import the table, because the imports would form a circle. They
    call this function instead.
    """
    return _TABLES[group]


def named(group: str, name: str, label: str, error: type[XPruneError]) -> Any:
    """Returns the plug-in of a group that has a given name.

    Args:
        group: The name of the group, such as "unit_kinds".
        name: The name of the plug-in.
        label: What the error message calls a plug-in of this group, such as "kind of unit".
        error: The class of the error that is raised.

    Raises:
        XPruneError: There is no plug-in of that name. The error is of the class `error`, and its message lists the
            known names.
    """
    known = registered(group)
    if name not in known:
        raise error(
            f"unknown {label} {name!r}; known: {', '.join(known)}. If another package adds it, install that package."
        )
    return known[name]


def resolve(what: Any, kinds: Mapping[str, Any], base: type, label: str) -> Any:
    """Makes a plug-in from the text that a user gave, such as "taylor" or "xpruner,objective=label,steps=200".

    The text is the name of the plug-in, followed by its settings. The value of a setting is read as JSON, as in
    "learned,slope=[5,20]". A value that is not valid JSON is a string.

    Some plug-in classes serve many names with a common prefix, such as all names that begin with "captum:". Such a
    class has a static method `member`, which returns the class for a full name: `member("captum:Saliency")`. The table
    then needs one of these classes only.

    Args:
        what: A name with or without settings. An instance of `base` is also accepted and returned unchanged.
        kinds: The plug-in classes by name.
        base: The base class of the plug-ins.
        label: What the error message calls a plug-in, such as "criterion".

    Returns:
        An instance of the plug-in class with these settings.

    Raises:
        PluginError: The name or a setting is unknown. The message lists the known ones.

    Example:
        >>> import xprune
        >>> resolve("magnitude,p=1", xprune.CRITERIA, xprune.Criterion, "criterion").p
        1
    """
    if isinstance(what, base):
        return what
    # Splits at commas, except at commas inside brackets, which belong to a value.
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
    known = _settings_of(kinds[name])
    for key in given:
        if key not in known:
            raise PluginError(f"{what!r}: {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
    return kinds[name](**given)


def _settings_of(kind: type) -> list[str]:
    """Returns the names of the settings of a plug-in class: its fields, or the named arguments of its constructor."""
    if is_dataclass(kind):
        return [field.name for field in fields(kind)]
    arguments = signature(kind).parameters.values()
    return [one.name for one in arguments if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]


def _setting(text: str) -> tuple[str, Any]:
    """Splits "key=value" and returns (key, value). The value is read as JSON, or is a string if it is not JSON."""
    key, equals, value = text.partition("=")
    if not equals:
        raise PluginError(f"{text!r} is not a setting: wanted key=value, for example steps=200.")
    try:
        found = json.loads(value)
    except ValueError:
        # None, True and False are no JSON, but users of Python write them.
        found = {"None": None, "True": True, "False": False}.get(value, value)
    # A list becomes a tuple, because settings are fields of frozen dataclasses and have to be hashable.
    return key.strip(), tuple(found) if isinstance(found, list) else found


def plain_settings(settings: Any) -> dict[str, Any]:
    """Returns the fields of a plug-in, a budget or the settings of fine-tuning as a dict that JSON can hold.

    If the object has a name, the dict contains the name too.
    """
    fields: dict[str, Any] = {}
    if is_dataclass(settings) and not isinstance(settings, type):
        # The conversion to JSON and back turns tuples into lists, and values that JSON cannot hold into text.
        fields = json.loads(json.dumps(asdict(settings), default=str))
    return {"name": settings.name, **fields} if hasattr(settings, "name") else fields
