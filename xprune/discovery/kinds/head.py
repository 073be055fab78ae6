"""The unit kind "head": the heads of attentions. Adapters know them, or they are proposed by structure and proved."""

from collections.abc import Sequence

from torch import nn

from xprune.core.site import Cut, Site
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.candidates import HEADS, KV_HEADS, Structure, heads_of, sizes_of


class Head(UnitKind):
    """Attention heads: parallel parts of an attention. The last layer of the attention joins their results.

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
            The sites that were proved, and the reason for each attention without a site. All these attentions, and the
            sites of adapters, are in `closed`: later unit kinds do not look inside them.
        """
        # The proof needs modules that `xprune.load` does not need. They are imported here, so that loading a model
        # stays fast.
        from xprune.discovery.by_structure import sites_by_structure

        sites, left = sites_by_structure(search.model, search.example_inputs, search.sites, AttentionStructure())
        without_sites = {path: _closed_attention(search.model, path) for path in left}
        return Found(sites, left, {**search.sites, **sites, **without_sites})


class AttentionStructure(Structure):
    """The rules for an attention of an unknown class: it has an attribute for the number of heads, and linear layers.

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
        """Returns the numbers of units to assume. See Structure.sizes.

        If several query heads share key and value heads, the number of key and value heads comes first.
        """
        return sizes_of(module)

    def too_few(self, module: nn.Module, layers: int) -> str:
        """Returns the reason that gates cannot reach the heads. See Structure.too_few."""
        return (
            f"it has {heads_of(module)} heads, but its forward calls {layers} of its linear layers as modules. A gate "
            "is a hook on such a call, so the heads cannot be gated. Write an adapter with a gated class, see "
            "docs/adapters.md."
        )

    def only_one(self) -> str:
        """Returns the reason that a single head cannot be removed. See Structure.only_one."""
        return "it has a single head, which is the whole attention, so no head can be removed."

    def plausible(self, features: int, produced: Sequence[int]) -> bool:
        """Returns True, since keys and values may have fewer features than the heads. See Structure.plausible."""
        return True


def _closed_attention(model: nn.Module, path: str) -> Site:
    """Returns a site with one unit for an attention that is left alone, so that the graph does not look inside.

    The graph needs to know two layers. The first layer of the attention reads the stream. The layer that writes to the
    stream is the last one with as many output features as the first layer has input features.
    """
    layers = {n: part for n, part in model.get_submodule(path).named_modules() if isinstance(part, nn.Linear)}
    first = next(iter(layers))
    to_stream = [name for name, part in layers.items() if part.out_features == layers[first].in_features]
    first, last = f"{path}.{first}", f"{path}.{(to_stream or list(layers))[-1]}"
    return Site(path, "head", 1, 1, (last,), cuts=(Cut(f"{first}.weight", 0), Cut(f"{last}.weight", 1)), module=path)
