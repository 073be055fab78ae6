"""The table of adapters: what is known of each attention or MLP class. A file a library; entry points add more."""

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
