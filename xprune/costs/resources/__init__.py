"""The table of resources: what a budget can limit. One file each; entry points of `xprune.resources` add more.

May import: costs, core. To add a resource, write a subclass of `Resource` in a file here and name it in the table.
"""

from collections.abc import MutableMapping

from xprune.core.registry import table
from xprune.core.resource import Resource
from xprune.costs.resources.macs import Macs
from xprune.costs.resources.params import Params

RESOURCES: MutableMapping[str, Resource] = table("resources", (Macs(), Params()), Resource)
"""Resource by name. A script adds its own here; a package, through an entry point."""
