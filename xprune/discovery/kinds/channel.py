"""Channels: the features of residual streams, found in the dependency graph and proved."""

from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.kinds.neuron import Neuron


class Channel(UnitKind):
    """Channels: features of a residual stream, which every layer on the stream reads and writes."""

    name = "channel"
    plural = "channels"
    needs = ("head", "neuron")
    order = -1  # a module that goes as a whole afterwards leaves a bias, which has to have lost its channels by then
    crosses = True
    found_by = "the graph"

    def find(self, search: Search) -> Found:
        """Finds the streams between the modules that adapters and heads have taken."""
        from xprune.discovery.channels import channel_sites  # needs torch-pruning, which loading does not

        hidden = [site for site in search.sites.values() if site.kind == Neuron.name]
        found = channel_sites(search.model, search.example_inputs, search.closed, hidden)
        return Found({site.name: site for site in found})
