"""Heads: the units of attentions, known by adapters or proposed by structure and proved."""

from collections.abc import Sequence

from torch import nn

from xprune.core.site import Cut, Site
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.candidates import HEADS, KV_HEADS, Structure, heads_of, sizes_of


class Head(UnitKind):
    """Attention heads: what an attention computes several times over, side by side, and joins in its last layer."""

    name = "head"
    plural = "heads"
    by_default = True
    attends = True
    singly = True
    line = "-"

    def find(self, search: Search) -> Found:
        """Finds heads of attentions that no adapter knows. Later kinds do not look into any attention."""
        from xprune.discovery.by_structure import sites_by_structure  # needs torch-pruning, which loading does not

        sites, left = sites_by_structure(search.model, search.example_inputs, search.sites, AttentionStructure())
        opaque = {path: _opaque(search.model, path) for path in left}
        return Found(sites, left, {**search.sites, **sites, **opaque})


class AttentionStructure(Structure):
    """A module that says how many heads it has, and has linear layers."""

    kind = "head"
    called = "heads"
    attributes = (*HEADS, *KV_HEADS)
    around = False

    def fits(self, module: nn.Module) -> bool:
        """See Structure.fits."""
        return heads_of(module) is not None and any(isinstance(part, nn.Linear) for part in module.modules())

    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """See Structure.sizes."""
        return sizes_of(module)

    def too_few(self, module: nn.Module, layers: int) -> str:
        """See Structure.too_few."""
        return (
            f"it has {heads_of(module)} heads, but its forward calls {layers} of its linear layers as "
            "modules, so that no hook can gate what the heads feed: it needs an adapter with a gated class"
        )

    def only_one(self) -> str:
        """See Structure.only_one."""
        return "it has one head, which is the whole of it"

    def plausible(self, features: int, made: Sequence[int]) -> bool:
        """See Structure.plausible."""
        return True


def _opaque(model: nn.Module, path: str) -> Site:
    """What the graph needs to know of an attention that is left alone, so as not to look into it: its two ends."""
    layers = {n: part for n, part in model.get_submodule(path).named_modules() if isinstance(part, nn.Linear)}
    first = next(iter(layers))
    back = [name for name, part in layers.items() if part.out_features == layers[first].in_features]
    first, last = f"{path}.{first}", f"{path}.{(back or list(layers))[-1]}"
    return Site(path, "head", 1, 1, (last,), cuts=(Cut(f"{first}.weight", 0), Cut(f"{last}.weight", 1)), module=path)
