"""The unit kind "head": heads of attentions, known by adapters or proposed by structure and proved."""

from collections.abc import Sequence

from torch import nn

from xprune.core.site import Cut, Site
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.candidates import HEADS, KV_HEADS, Structure, heads_of, sizes_of


class Head(UnitKind):
    """Attention heads: parallel parts of an attention, whose results its last layer joins.

    Example:
        >>> import torch
        >>> import xprune
        >>> from torch import nn
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        >>> (site,) = xprune.find_sites(model, torch.randn(4, 5, 8), units="head")
        >>> site.name, site.size, site.width
        ('0.self_attn', 2, 4)
    """

    name = "head"
    plural = "heads"
    by_default = True
    attends = True
    singly = True
    line = "-"

    def find(self, search: Search) -> Found:
        """Finds the heads of attentions that no adapter knows.

        Args:
            search: The model and the sites that adapters know.

        Returns:
            The sites that were proved, the attentions without a site with the reason, and both kinds of attention as
            closed modules: later unit kinds do not look inside them.
        """
        # The proof needs modules that `xprune.load` does not need. Importing them here keeps loading light.
        from xprune.discovery.by_structure import sites_by_structure

        sites, left = sites_by_structure(search.model, search.example_inputs, search.sites, AttentionStructure())
        without_sites = {path: _closed_attention(search.model, path) for path in left}
        return Found(sites, left, {**search.sites, **sites, **without_sites})


class AttentionStructure(Structure):
    """An attention as its structure shows it: a module with a number of heads among its attributes and linear layers.

    Example:
        >>> from torch import nn
        >>> attention = nn.Sequential(nn.Linear(8, 24), nn.Linear(8, 8))
        >>> AttentionStructure().fits(attention)
        False
        >>> attention.num_heads = 2
        >>> AttentionStructure().fits(attention)
        True
    """

    kind = "head"
    called = "heads"
    attributes = (*HEADS, *KV_HEADS)
    around = False

    def fits(self, module: nn.Module) -> bool:
        """Returns True if the module holds a linear layer and has an attribute for the number of heads."""
        return heads_of(module) is not None and any(isinstance(part, nn.Linear) for part in module.modules())

    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """Returns the numbers of heads to try: groups of heads with common keys first, see Structure.sizes."""
        return sizes_of(module)

    def too_few(self, module: nn.Module, layers: int) -> str:
        """Says that gates cannot reach the heads, see Structure.too_few."""
        return (
            f"it has {heads_of(module)} heads, but its forward calls {layers} of its linear layers as modules. A gate "
            "is a hook on such a call, so the heads cannot be gated. Write an adapter with a gated class, see "
            "docs/adapters.md."
        )

    def only_one(self) -> str:
        """Says that there is no head to spare, see Structure.only_one."""
        return "it has a single head, which is the whole attention, so there is nothing to choose from."

    def plausible(self, features: int, produced: Sequence[int]) -> bool:
        """Returns True: keys and values may be narrower than the heads, so any widths are possible."""
        return True


def _closed_attention(model: nn.Module, path: str) -> Site:
    """Returns a site of one unit for an attention that is left alone. With it, the graph does not look inside.

    The graph needs to know two things: the first layer, which reads the stream, and the last layer with as many
    output features as the first one reads, which writes to it.
    """
    layers = {n: part for n, part in model.get_submodule(path).named_modules() if isinstance(part, nn.Linear)}
    first = next(iter(layers))
    to_stream = [name for name, part in layers.items() if part.out_features == layers[first].in_features]
    first, last = f"{path}.{first}", f"{path}.{(to_stream or list(layers))[-1]}"
    return Site(path, "head", 1, 1, (last,), cuts=(Cut(f"{first}.weight", 0), Cut(f"{last}.weight", 1)), module=path)
