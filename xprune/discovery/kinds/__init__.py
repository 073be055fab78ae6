"""The table of unit kinds: heads, neurons and channels, with one file for each kind.

This folder may import discovery and core. To add a kind, write a subclass of `UnitKind` in a file here and name it in
the table. Another package adds a kind by an entry point of the group `xprune.unit_kinds`.
"""

from collections.abc import MutableMapping

from xprune.core.registry import table
from xprune.core.unit_kind import UnitKind
from xprune.discovery.kinds.channel import Channel
from xprune.discovery.kinds.head import Head
from xprune.discovery.kinds.neuron import Neuron

UNIT_KINDS: MutableMapping[str, UnitKind] = table("unit_kinds", (Head(), Neuron(), Channel()), UnitKind)
"""The unit kinds by their names. A script adds a kind by assigning to its name, a package by an entry point."""
