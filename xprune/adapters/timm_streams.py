"""Modules of timm that have no units but keep something beside their tensors that shrinks with a residual stream."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from xprune.interfaces import Adapter
from xprune.site import Along, Site


class Scale(Adapter):
    """MetaFormer's factor for each channel, which is reshaped to a size that it remembers."""

    name = "timm-scale"
    classes = ("timm.models.metaformer.Scale",)

    def site(self, path: str, module: nn.Module) -> Site | None:
        """None: it has no units."""
        return None

    def along_stream(self, path: str, module: nn.Module) -> Along:
        """See Adapter.along_stream."""
        return Along((), ((f"{path}.scale", 0),), ())

    def resize(self, module: Any, site: Site, keep: Sequence[int]) -> None:
        """Its shape is that of what is left."""
        module.shape = (len(module.scale), *module.shape[1:])
