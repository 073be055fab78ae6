"""The table of resources, which are the costs that a budget can limit.

To add a resource, write a subclass of `Resource` in a file here and name it in the table. Another package adds a
resource by an entry point of the group `xprune.resources`. This folder may import costs and core.
"""

from collections.abc import MutableMapping

from xprune.core.registry import table
from xprune.core.resource import Resource
from xprune.costs.resources.latency import Latency
from xprune.costs.resources.macs import Macs
from xprune.costs.resources.params import Params

RESOURCES: MutableMapping[str, Resource] = table("resources", (Macs(), Params(), Latency()), Resource)
"""The resources by their names. A script adds a resource by assigning to its name, a package by an entry point."""
