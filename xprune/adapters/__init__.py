"""The table of adapters: what is known of each attention or MLP class. A file a library; entry points add more."""

from xprune.adapters.hugging_face import HUGGING_FACE
from xprune.adapters.pyg import PYG
from xprune.adapters.timm import TIMM
from xprune.adapters.timm_hybrid import TIMM_HYBRID
from xprune.adapters.timm_streams import STREAMS
from xprune.adapters.timm_vit import TIMM_VIT
from xprune.adapters.torch_nn import TORCH_NN
from xprune.adapters.torchvision import TORCHVISION
from xprune.interfaces import Adapter
from xprune.tables import table

OURS = (*TIMM, *TIMM_VIT, *TIMM_HYBRID, *STREAMS, *TORCH_NN, *TORCHVISION, *HUGGING_FACE, *PYG)

ADAPTERS: dict[str, Adapter] = table("adapters", OURS)
"""Adapter by name. A script adds its own here; a package, through an entry point."""
