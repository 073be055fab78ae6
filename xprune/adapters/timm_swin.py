"""timm's Swin window attention: a relative-position table with one column a head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from xprune.interfaces import Adapter
from xprune.site import Cut, Site


@dataclass(frozen=True)
class TimmSwin(Adapter):
    """Heads of `timm.models.swin_transformer.WindowAttention`, whose forward reads num_heads and nothing else."""

    name: ClassVar[str] = "timm-swin"
    classes: ClassVar[tuple[str, ...]] = ("timm.models.swin_transformer.WindowAttention",)

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Heads, fused qkv in the order (3, heads, head_dim)."""
        attn: Any = module
        width = attn.proj.in_features // attn.num_heads
        cuts = [
            Cut(f"{path}.qkv.weight", 0, 3, width),
            Cut(f"{path}.proj.weight", 1, 1, width),
            Cut(f"{path}.relative_position_bias_table", 1),
        ]
        if attn.qkv.bias is not None:
            cuts.append(Cut(f"{path}.qkv.bias", 0, 3, width))
        return Site(
            path,
            "head",
            attn.num_heads,
            width,
            f"{path}.proj",
            cuts=tuple(cuts),
            module=path,
            adapter=self.name,
        )

    def resize(self, module: nn.Module, kept: int) -> None:
        """num_heads."""
        attn: Any = module
        attn.num_heads = kept
