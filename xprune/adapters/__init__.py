"""The table of adapters: what is known of an attention or MLP class. One file each; entry points add more."""

from collections.abc import Mapping

from xprune.adapters.timm_attention import TimmAttention
from xprune.adapters.timm_glu import TimmGlu
from xprune.adapters.timm_swin import TimmSwin
from xprune.adapters.timm_swinv2 import TimmSwinV2
from xprune.interfaces import Adapter
from xprune.tables import table

ADAPTERS: Mapping[str, Adapter] = {
    name: kind() for name, kind in table("adapters", (TimmAttention, TimmSwin, TimmSwinV2, TimmGlu)).items()
}
"""Adapter by name."""
