"""What of a module lies along a residual stream, where no adapter says: told from the units' cuts and the shapes."""

from torch import nn

from xprune.core.site import Site, StreamParts
from xprune.modules.paths import is_linear


def stream_parts_by_shape(path: str, module: nn.Module, site: Site, size: int) -> StreamParts:
    """Every axis of `size`, or several times that for what the layers read, that is not the units' own.

    path, module   the module, as it is before anything is cut
    site           its units, whose cuts say which axes are theirs
    size           channels of the stream

    A guess, which whoever asks has to prove.
    """
    own = {(cut.tensor, cut.axis) for cut in site.cuts}
    writes, reads, consumers = [], [], []
    for name, layer in module.named_modules(prefix=path):
        is_layer = isinstance(layer, nn.Conv2d) or is_linear(layer)
        for part, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            for axis, length in enumerate(tensor.shape):
                if length != size or (f"{name}.{part}", axis) in own or (is_layer and axis > 1):
                    continue
                if name == site.consumers[0] and axis == 0:
                    writes.append((f"{name}.{part}", axis))
                    continue
                reads.append((f"{name}.{part}", axis))
                if is_layer and part == "weight" and axis == 1:
                    consumers.append((name, 1 if isinstance(layer, nn.Conv2d) else -1))
    return StreamParts(tuple(reads), tuple(writes), tuple(consumers))
