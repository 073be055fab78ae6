"""timm's packed gated MLP: fc1 holds values and gates, so that a neuron takes two of its rows."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from xprune.interfaces import Adapter
from xprune.site import Cut, Site


@dataclass(frozen=True)
class TimmGlu(Adapter):
    """Neurons of `timm.layers.mlp.GluMlp` (SwiGLUPacked). The split SwiGLU is found by the graph."""

    name: ClassVar[str] = "timm-glu"
    classes: ClassVar[tuple[str, ...]] = ("timm.layers.mlp.GluMlp",)

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Neurons; the rows of fc1 come as (2, neurons)."""
        mlp: Any = module
        cuts = [Cut(f"{path}.fc1.weight", 0, 2), Cut(f"{path}.fc2.weight", 1)]
        if mlp.fc1.bias is not None:
            cuts.append(Cut(f"{path}.fc1.bias", 0, 2))
        normed = not isinstance(mlp.norm, nn.Identity)
        if normed:
            cuts += [Cut(f"{path}.norm.{name}", 0) for name, _ in mlp.norm.named_parameters()]
        return Site(
            name=path,
            kind="neuron",
            size=mlp.fc2.weight.shape[1],
            width=1,
            layer=f"{path}.fc2",
            axis=-1 if isinstance(mlp.fc2, nn.Linear) else 1,
            cuts=tuple(cuts),
            module=path,
            adapter=self.name,
            norm=f"{path}.norm" if normed else "",
        )
