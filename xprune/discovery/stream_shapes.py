"""Guesses which tensors of a module hold the channels of a residual stream, from the shapes of the tensors.

The guess is used for attentions and MLPs whose adapter does not know it, or that have no adapter. `channels` proves it
before it is used.
"""

from torch import nn

from xprune.core.site import Site, StreamParts
from xprune.modules.paths import input_axis, is_linear


def stream_parts_by_shape(path: str, module: nn.Module, site: Site, size: int) -> StreamParts:
    """Returns every axis that has as many entries as the stream has channels, except the axes of the module's units.

    The first axis of the consumer's tensors is taken as output to the stream. Any other such axis is taken as input
    from the stream.

    Args:
        path: The path of the module in the model.
        module: The module, before anything is cut.
        site: The site of the module's units. Its cuts say which axes belong to units.
        size: The number of channels of the stream.

    Example:
        >>> from xprune.core.site import Cut
        >>> mlp = nn.Sequential(nn.Linear(8, 3, bias=False), nn.ReLU(), nn.Linear(3, 8, bias=False))
        >>> cuts = (Cut("mlp.0.weight", 0), Cut("mlp.2.weight", 1))
        >>> site = Site("mlp", "neuron", size=3, width=1, consumers=("mlp.2",), cuts=cuts)
        >>> parts = stream_parts_by_shape("mlp", mlp, site, size=8)
        >>> parts.reads, parts.writes, parts.consumers
        ((('mlp.0.weight', 1),), (('mlp.2.weight', 0),), (('mlp.0', -1),))
    """
    unit_axes = {(cut.tensor, cut.axis) for cut in site.cuts}
    writes, reads, consumers = [], [], []
    for name, layer in module.named_modules(prefix=path):
        is_layer = isinstance(layer, nn.Conv2d) or is_linear(layer)
        for part, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            for axis, length in enumerate(tensor.shape):
                # Axes 2 and 3 of a convolution's weight are the height and width of its kernel.
                if length != size or (f"{name}.{part}", axis) in unit_axes or (is_layer and axis > 1):
                    continue
                if name == site.consumers[0] and axis == 0:
                    writes.append((f"{name}.{part}", axis))
                    continue
                reads.append((f"{name}.{part}", axis))
                if is_layer and part == "weight" and axis == 1:
                    consumers.append((name, input_axis(layer)))
    return StreamParts(tuple(reads), tuple(writes), tuple(consumers))
