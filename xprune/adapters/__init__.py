"""Adapters: for each known attention or MLP class, which tensors shrink when a unit is removed.

`ADAPTERS` is the table. Most entries are `Units`, which describe a class as data. `docs/adapters.md` shows how to write
one.

May import: core, modules, errors. To add a class, write an entry in the file of its library. To add a library, write a
file and add its table to `OURS`. Another package adds its adapters through the entry-point group `xprune.adapters`.
"""

from collections.abc import MutableMapping

from xprune.adapters.declarative import Units
from xprune.adapters.hugging_face import HUGGING_FACE
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.adapters.pyg import PYG
from xprune.adapters.timm import TIMM_ALL
from xprune.adapters.torch_nn import TORCH_NN
from xprune.adapters.torchvision import TORCHVISION
from xprune.core.interfaces import Adapter
from xprune.core.registry import table

__all__ = ["ADAPTERS", "OURS", "Also", "Features", "Forwards", "Scope", "Stream", "Units"]

OURS = (*TIMM_ALL, *TORCH_NN, *TORCHVISION, *HUGGING_FACE, *PYG)
"""The adapters of this package. Where several serve one module, the first that finds a site is taken."""

ADAPTERS: MutableMapping[str, Adapter] = table("adapters", OURS, Adapter)
"""Adapters by name. A script adds its own here. A package uses an entry point."""
