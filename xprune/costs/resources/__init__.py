"""The table of resources: what a budget can limit. Entry points of the group `xprune.resources` add more.

To add a resource, write a subclass of `Resource` in a file here and name it in the table. This folder may import costs
and core.
"""

from collections.abc import MutableMapping

from xprune.core.registry import table
from xprune.core.resource import Resource
from xprune.costs.resources.macs import Macs
from xprune.costs.resources.params import Params

RESOURCES: MutableMapping[str, Resource] = table("resources", (Macs(), Params()), Resource)
"""Resource by name. A script adds its own by assigning to a name, and a package adds its own by an entry point."""
