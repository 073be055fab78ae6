"""What is known of each attention and MLP class: which tensors shrink when a unit goes. `ADAPTERS` is the table.

May import: core, modules, errors. To add a class: an entry in the file of its library. To add a library: a file, and
its name in `OURS`. Another package uses the entry-point group `xprune.adapters`. `docs/adapters.md` shows an example.
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

ADAPTERS: MutableMapping[str, Adapter] = table("adapters", OURS, Adapter)
"""Adapter by name. A script adds its own here; a package, through an entry point."""
