"""The table of adapters: what is known of each attention or MLP class. A file a library; entry points add more."""

from collections.abc import Mapping

from xprune.adapters.timm import TIMM
from xprune.adapters.timm_streams import Scale
from xprune.interfaces import Adapter
from xprune.tables import table

ADAPTERS: Mapping[str, Adapter] = table("adapters", (*TIMM, Scale()))
"""Adapter by name."""
