"""Adapters, which describe for known attention and MLP classes which tensors shrink when a unit is removed.

The table `ADAPTERS` holds all adapters. Most adapters are instances of `Units`, which describes a class by the names of
its layers. `docs/adapters.md` shows how to write one.

May import: core, modules, errors. To add a class, write an adapter in the file of its library. To add a library, write
a file with its adapters and add them to `OURS`. Another package adds its adapters through the entry-point group
`xprune.adapters`.
"""

from collections.abc import MutableMapping

from xprune.adapters.declarative import Units
from xprune.adapters.derived import DerivedForward
from xprune.adapters.hugging_face import HUGGING_FACE
from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream
from xprune.adapters.pyg import PYG
from xprune.adapters.timm import TIMM_ALL
from xprune.adapters.torch_nn import TORCH_NN
from xprune.adapters.torchvision import TORCHVISION
from xprune.core.interfaces import Adapter
from xprune.core.registry import table

__all__ = ["ADAPTERS", "OURS", "Also", "DerivedForward", "Features", "Forwards", "Scope", "Stream", "Units"]

OURS = (*TIMM_ALL, *TORCH_NN, *TORCHVISION, *HUGGING_FACE, *PYG, DerivedForward())
"""The adapters of this package. If several adapters describe one module, the first one that finds a site is used."""

ADAPTERS: MutableMapping[str, Adapter] = table("adapters", OURS, Adapter)
"""The adapters by name. A script can add adapters to this table. A package adds them through an entry point."""
