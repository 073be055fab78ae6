"""The unit kind "channel": the features of residual streams. They are found in the dependency graph and proved."""

from xprune.core.unit_kind import Found, Search, UnitKind
from xprune.discovery.kinds.neuron import Neuron


class Channel(UnitKind):
    """Channels: features of a residual stream, which blocks read and add to.

    A channel is removed from every layer, norm layer and embedding that holds the stream. `find_sites` looks for
    channels only if `units` names them.

    Example:
        >>> import torch
        >>> import xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Linear(3, 8), block, nn.Linear(8, 2))
        >>> sites = xprune.find_sites(model, torch.randn(4, 5, 3), units="channel")
        >>> [(site.name, site.size, site.consumers) for site in sites]
        [('stream:0', 8, ('1.self_attn', '1.linear1', '2'))]
    """

    name = "channel"
    plural = "channels"
    needs = ("head", "neuron")
    # Channels are cut before heads and neurons. A module that loses all its units is replaced by the bias of its last
    # layer. This bias must have lost its channels by then.
    order = -1
    crosses = True
    found_by = "the graph"

    def find(self, search: Search) -> Found:
        """Finds the residual streams that connect the modules found so far.

        Args:
            search: The model and the sites so far. The features of neuron sites are not taken for a stream.

        Returns:
            One site for each stream.

        Raises:
            ModelError: No stream can be pruned exactly.
        """
        # This imports torch-pruning, which `xprune.load` does not need.
        from xprune.discovery.channels import channel_sites

        hidden = [site for site in search.sites.values() if site.kind == Neuron.name]
        found = channel_sites(search.model, search.example_inputs, search.closed, hidden)
        return Found({site.name: site for site in found})
