"""Neurons: the hidden features of MLPs, found in the dependency graph, or proposed by structure and proved."""

from collections.abc import Sequence

from torch import nn

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
        from xprune.discovery.neurons import neuron_sites

        model, inputs = search.model, search.example_inputs
        seen = {site.name: site for site in neuron_sites(model, inputs, search.closed)}
        proved, left = sites_by_structure(model, inputs, {**search.sites, **seen}, MlpStructure())
        return Found({**seen, **proved}, left)


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
