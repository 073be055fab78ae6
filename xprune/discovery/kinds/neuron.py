"""The unit kind "neuron": the hidden features of MLPs. The dependency graph or the structure of modules shows them."""

from collections.abc import Mapping

from torch import nn

from xprune.core.site import Site
from xprune.core.unit_kind import Found, Search, UnitKind

ATTENTION_LAYERS = 5
"""The largest number of layers in an attention: queries, keys, values, the output, and a gate or a mix of heads."""


class Neuron(UnitKind):
    """Neurons: hidden features of an MLP, between its first and its last layer.

    Example:
        >>> import torch
        >>> import xprune
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> (site,) = xprune.find_sites(nn.Sequential(mlp, nn.Linear(4, 2)), torch.randn(3, 4), units="neuron")
        >>> site.name, site.size, site.consumers
        ('0', 6, ('0.2',))
    """

    name = "neuron"
    plural = "neurons"
    by_default = True
    needs = ("head",)
    found_by = "the graph, or proof"

    def find(self, search: Search) -> Found:
        """Finds neurons outside of the modules that already have sites of adapters or of heads.

        First, neurons are looked for in the dependency graph. Then modules without a site are tried by their structure,
        for example an MLP whose first layer computes gate and value with one weight.

        Args:
            search: The model, the sites so far, and the modules inside which nothing is looked for.

        Returns:
            The sites, and the reason for each MLP or layer that gives no site.
        """
        # This imports torch-pruning, which `xprune.load` does not need.
        from xprune.discovery.dependency_graph import CannotTraceError
        from xprune.discovery.hidden import hidden_sites
        from xprune.discovery.neurons import neuron_sites

        model, inputs = search.model, search.example_inputs
        in_graph, graph_left, untraced = list[Site](), dict[str, str](), dict[str, str]()
        try:
            in_graph, graph_left = neuron_sites(model, inputs, search.closed)
        except CannotTraceError as reason:
            # The model runs, but it cannot be traced. Sites of adapters and sites found by structure need no trace.
            untraced = {type(model).__name__: str(reason)}
        from_graph = {site.name: site for site in in_graph}
        # An attention that was left alone has no neurons: its layers make heads.
        attentions = {path for path in search.left if path and _few_layers(model.get_submodule(path))}
        structure = hidden_sites(model, inputs, {**search.sites, **from_graph}, search.record, attentions)
        by_structure = structure.sites
        structure_left = {p: why for p, why in structure.left.items() if not _is_explained(p, {}, search.left)}
        # The trace is not needed if the structure shows the neurons.
        graph_left |= {} if by_structure else untraced
        found = {**search.sites, **from_graph, **by_structure}
        known_reasons = {**search.left, **structure_left}
        more = {path: why for path, why in graph_left.items() if not _is_explained(path, found, known_reasons)}
        return Found({**from_graph, **by_structure}, {**structure_left, **more})


def _few_layers(module: nn.Module) -> bool:
    """Returns True if a module has no more layers than an attention, so that it is no whole block."""
    from xprune.discovery.watch import is_layer

    return sum(is_layer(part) for part in module.modules()) <= ATTENTION_LAYERS


def _is_explained(path: str, found: Mapping[str, Site], left: Mapping[str, str]) -> bool:
    """Returns True for a layer that belongs to a site, or whose module has a reason for having no site. Else False."""
    in_site = any(path in site.consumers or path in site.modules for site in found.values())
    return in_site or any(path == other or path.startswith(f"{other}.") for other in left)
