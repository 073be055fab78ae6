"""The unit kind "head": the heads of attentions. Adapters know them, or they are proposed by structure and proved."""

from torch import nn

from xprune.core.site import Cut, Site
from xprune.core.unit_kind import Found, Search, UnitKind

HEADS = ("num_heads", "n_head", "n_heads", "heads", "nhead", "num_attention_heads", "head_count")
"""Attributes that may hold the number of heads of an attention."""

KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
"""Attributes that may hold the number of key and value heads. Several query heads share one of these heads."""


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
        from xprune.discovery.by_structure import attention_sites

        found = attention_sites(search.model, search.example_inputs, search.sites, search.record)
        without_sites = {path: closed for path in found.left if (closed := _closed_attention(search.model, path))}
        return Found(found.sites, found.left, {**search.sites, **found.closed, **without_sites})


def heads_of(module: nn.Module) -> int | None:
    """Returns the number of heads that an attribute of the module holds, or None if there is no such attribute.

    HEADS lists the names of such attributes.

    Example:
        >>> heads_of(nn.MultiheadAttention(8, 2)), heads_of(nn.Linear(8, 8))
        (2, None)
    """
    return next((v for name in HEADS if type(v := vars(module).get(name)) is int and v > 0), None)


def _closed_attention(model: nn.Module, path: str) -> Site | None:
    """Returns a site with one unit for an attention that is left alone, so that the graph does not look inside.

    The graph needs to know two layers. The first layer of the attention reads the stream. The layer that writes to the
    stream is the last one with as many output features as the first layer has input features.
    """
    layers = {n: part for n, part in model.get_submodule(path).named_modules() if isinstance(part, nn.Linear)}
    if not layers or not path:
        return None
    first = next(iter(layers))
    to_stream = [name for name, part in layers.items() if part.out_features == layers[first].in_features]
    first, last = f"{path}.{first}", f"{path}.{(to_stream or list(layers))[-1]}"
    return Site(path, "head", 1, 1, (last,), cuts=(Cut(f"{first}.weight", 0), Cut(f"{last}.weight", 1)), module=path)
