"""timm's Attention: ViT, DeiT, DeiT-3, DINO and their kin, with or without q/k norm, gate and scale norm."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from xprune.interfaces import Adapter
from xprune.site import Cut, Site


@dataclass(frozen=True)
class TimmAttention(Adapter):
    """Heads of `timm.layers.attention.Attention`.

    Its forward reads head_dim and attn_dim, so that it needs no replacement. q and k norms are shared by the heads.
    A scale norm runs over the heads themselves: the site names it.
    """

    name: ClassVar[str] = "timm-attention"
    classes: ClassVar[tuple[str, ...]] = ("timm.layers.attention.Attention",)

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Heads, fused qkv in the order (3, heads, head_dim)."""
        attn: Any = module
        width = attn.head_dim
        cuts = [Cut(f"{path}.qkv.weight", 0, 3, width), Cut(f"{path}.proj.weight", 1, 1, width)]
        if attn.qkv.bias is not None:
            cuts.append(Cut(f"{path}.qkv.bias", 0, 3, width))
        if getattr(attn, "gate", None) is not None:
            cuts += [Cut(f"{path}.gate.{name}", 0, 1, width) for name, _ in attn.gate.named_parameters()]
        normed = not isinstance(attn.norm, nn.Identity)
        if normed:
            cuts += [Cut(f"{path}.norm.{name}", 0, 1, width) for name, _ in attn.norm.named_parameters()]
        return Site(
            name=path,
            kind="head",
            size=attn.num_heads,
            width=width,
            layer=f"{path}.proj",
            cuts=tuple(cuts),
            module=path,
            adapter=self.name,
            norm=f"{path}.norm" if normed else "",
        )

    def resize(self, module: nn.Module, kept: int) -> None:
        """num_heads, attn_dim."""
        attn: Any = module
        attn.num_heads = kept
        attn.attn_dim = kept * attn.head_dim
