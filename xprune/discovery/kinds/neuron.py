"""Neurons: the hidden features of MLPs, found in the dependency graph, or proposed by structure and proved."""

from collections.abc import Mapping, Sequence

from torch import nn

from xprune.core.site import Site
from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.candidates import Structure, heads_of, linears_of


class Neuron(UnitKind):
    """Neurons: hidden features of an MLP, between its layers."""

    name = "neuron"
    plural = "neurons"
    by_default = True
    needs = ("head",)
    found_by = "the graph, or proof"

    def find(self, search: Search) -> Found:
        """Finds neurons outside the modules that adapters and heads have taken."""
        from xprune.discovery.by_structure import sites_by_structure  # both need torch-pruning, which loading does not
        from xprune.discovery.dependency_graph import CannotTraceError
        from xprune.discovery.neurons import neuron_sites

        model, inputs = search.model, search.example_inputs
        in_graph, followed = list[Site](), dict[str, str]()
        try:
            in_graph, followed = neuron_sites(model, inputs, search.closed)
        except CannotTraceError as reason:  # it runs, so what is known of its modules still holds
            followed = {type(model).__name__: str(reason)}
        seen = {site.name: site for site in in_graph}
        proved, left = sites_by_structure(model, inputs, {**search.sites, **seen}, MlpStructure())
        found, known = {**search.sites, **seen, **proved}, {**search.left, **left}
        more = {path: why for path, why in followed.items() if not _covered(path, found, known)}
        return Found({**seen, **proved}, {**left, **more})


class MlpStructure(Structure):
    """A module without heads that has two or more linear layers of its own."""

    kind = "neuron"
    called = "hidden neurons"
    normed = True
    around = True

    def fits(self, module: nn.Module) -> bool:
        """See Structure.fits."""
        return heads_of(module) is None and len(linears_of(module)) > 1

    def sizes(self, module: nn.Module, features: int) -> list[int]:
        """See Structure.sizes."""
        return [features]

    def too_few(self, module: nn.Module, layers: int) -> str:
        """See Structure.too_few."""
        return ""

    def only_one(self) -> str:
        """See Structure.only_one."""
        return ""

    def plausible(self, features: int, made: Sequence[int]) -> bool:
        """See Structure.plausible."""
        return any(rows % features == 0 for rows in made)


def _covered(path: str, found: Mapping[str, Site], left: Mapping[str, str]) -> bool:
    """True for a layer that belongs to a site, or to a module that has a reason of its own."""
    ours = any(path in site.consumers or path in site.modules for site in found.values())
    return ours or any(path == other or path.startswith(f"{other}.") for other in left)
