"""The table of unit kinds, one file each: heads, neurons, channels.

May import: discovery, core. To add a kind, write a subclass of `UnitKind` in a file here and name it in the table.
Another package adds a kind through the entry-point group `xprune.unit_kinds`.
"""

from collections.abc import MutableMapping

from xprune.core.registry import table
from xprune.core.unit_kind import UnitKind
from xprune.discovery.kinds.channel import Channel
from xprune.discovery.kinds.head import Head
from xprune.discovery.kinds.neuron import Neuron

UNIT_KINDS: MutableMapping[str, UnitKind] = table("unit_kinds", (Head(), Neuron(), Channel()), UnitKind)
"""Unit kind by name. A script adds a kind by assignment, a package through an entry point."""
