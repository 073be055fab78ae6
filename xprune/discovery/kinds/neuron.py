"""The unit kind "neuron": the hidden features of MLPs. The dependency graph or the structure of modules shows them."""

from collections.abc import Mapping, Sequence

from torch import nn

from xprune.core.site import Site
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.candidates import Structure, heads_of, linears_of


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
        from xprune.discovery.by_structure import sites_by_structure
        from xprune.discovery.dependency_graph import CannotTraceError
        from xprune.discovery.neurons import neuron_sites

        model, inputs = search.model, search.example_inputs
        in_graph, graph_left = list[Site](), dict[str, str]()
        try:
            in_graph, graph_left = neuron_sites(model, inputs, search.closed)
        except CannotTraceError as reason:
            # The model runs, but it cannot be traced. Sites of adapters and sites found by structure need no trace.
            graph_left = {type(model).__name__: str(reason)}
        from_graph = {site.name: site for site in in_graph}
        by_structure, structure_left = sites_by_structure(model, inputs, {**search.sites, **from_graph}, MlpStructure())
        found = {**search.sites, **from_graph, **by_structure}
        known_reasons = {**search.left, **structure_left}
        more = {path: why for path, why in graph_left.items() if not _is_explained(path, found, known_reasons)}
        return Found({**from_graph, **by_structure}, {**structure_left, **more})


class MlpStructure(Structure):
    """The rules for an MLP of an unknown class: it has two or more linear layers, and no attribute for heads.

    Example:
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> MlpStructure().fits(mlp)
        True
        >>> MlpStructure().sizes(mlp, features=6)
        [6]
    """

    kind = "neuron"
    called = "hidden neurons"
    normed = True
    around = True

    def fits(self, module: nn.Module) -> bool:
        """Returns True if the module has two or more linear layers and no attribute for a number of heads."""
        return heads_of(module) is None and len(linears_of(module)) > 1

    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """Returns [features], since each input feature of the last layer is a neuron. See Structure.sizes."""
        return [features]

    def too_few(self, module: nn.Module, layers: int) -> str:
        """Returns "", since a module that calls fewer than two linear layers is not an MLP. See Structure.too_few."""
        return ""

    def only_one(self) -> str:
        """Returns "", since a single hidden feature needs no reason. See Structure.only_one."""
        return ""

    def plausible(self, features: int, produced: Sequence[int]) -> bool:
        """Returns True if at least one number in `produced` is a multiple of `features`.

        See Structure.plausible.
        """
        return any(rows % features == 0 for rows in produced)


def _is_explained(path: str, found: Mapping[str, Site], left: Mapping[str, str]) -> bool:
    """Returns True for a layer that belongs to a site, or whose module has a reason for having no site. Else False."""
    in_site = any(path in site.consumers or path in site.modules for site in found.values())
    return in_site or any(path == other or path.startswith(f"{other}.") for other in left)
