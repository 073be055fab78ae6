"""Placeholders: single operations in the place of attentions and MLPs, which keep the dependency graph simple.

The dependency graph follows each feature from operation to operation. Inside an attention it gets lost: reshapes and
products mix axes, and torch-pruning guesses. For modules whose sites are known already, the graph does not have to look
inside. It only needs to see that the module reads features of the stream and writes features to the stream.

So before the graph is built, each such module of a copy is replaced by a placeholder. A forward pass of the original
records the outputs. The placeholder then returns zeros of the same shapes in the same containers, made by one autograd
operation that depends on all inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site
from xprune.modules.calls import call, map_tensors, slow_path, tensors_in


class Placeholder(nn.Module):
    """A module in the place of another one, which the dependency graph sees as one operation.

    Attributes that the placeholder lacks are taken from the original module, since the code around it may ask for them.

    Args:
        in_features: The number of features of the stream that the original module reads.
        out_features: The number of features that it writes to the stream.
        outputs: What the original module returned, one entry for each of its calls in a forward pass.
        original: The original module.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> placeholder = Placeholder(3, 2, [torch.ones(4, 2)], original=mlp)
        >>> made = placeholder(torch.ones(4, 3))
        >>> made.shape, bool(made.any())
        (torch.Size([4, 2]), False)
    """

    def __init__(self, in_features: int, out_features: int, outputs: Sequence[Any], original: nn.Module) -> None:
        super().__init__()
        # nn.Module registers each module that is an attribute. Inside a tuple, the original is no submodule, and its
        # layers stay out of the graph.
        self.original = (original,)
        self.in_features, self.out_features = in_features, out_features
        self.outputs, self.calls = tuple(outputs), 0
        # One parameter, so that the output has a gradient even if no input has one.
        self.weight = nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copying asks for attributes before __init__ has run. Without this, the next line would never end.
            if "original" not in self.__dict__:
                raise
            return getattr(self.original[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the recorded output of this call, with zeros that depend on all inputs as its first tensor."""
        # A module that is called several times in one forward pass may return another shape each time.
        recorded = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        first = tensors_in(recorded)[0]
        inputs = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        zeros = _ZerosFrom.apply(first, self.weight.to(first.device), *inputs)
        return map_tensors(recorded, lambda t: zeros if t is first else t)


class JoiningPlaceholder(Placeholder):
    """A placeholder of a module that adds its input to its output itself, see Adapter.joins.

    The stream that such a module reads is the stream that it writes, so both lose the same channels.

    Example:
        >>> pruner = JoiningPlaceholderPruner()
        >>> pruner.prune_in_channels == pruner.prune_out_channels
        True
    """


class _ZerosFrom(torch.autograd.Function):
    """The operation of a placeholder: zeros like the first tensor, which depend on all other tensors.

    It has no backward, because the graph is only read.
    """

    @staticmethod
    def forward(ctx: Any, like: Tensor, *inputs: Tensor) -> Tensor:
        """Returns zeros. Autograd notes the dependence on `inputs`."""
        return torch.zeros_like(like)


class PlaceholderPruner(tp.BasePruningFunc):
    """Says how many features a placeholder reads and writes, in the form that torch-pruning asks for.

    torch-pruning needs a pruner for each class in its graph. Its two prune methods name the ends of a dependency: the
    inputs or the outputs of a layer. xprune never calls them, because surgery follows the cuts of a site.
    """

    def get_in_channels(self, layer: Placeholder) -> int:
        """Returns the number of features that the placeholder reads."""
        return layer.in_features

    def get_out_channels(self, layer: Placeholder) -> int:
        """Returns the number of features that the placeholder writes."""
        return layer.out_features

    def prune_in_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Returns the layer as it is. Names the inputs in the graph, and is never called."""
        return layer

    def prune_out_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Returns the layer as it is. Names the outputs in the graph, and is never called."""
        return layer


class JoiningPlaceholderPruner(PlaceholderPruner):
    """The pruner of a joining placeholder: its inputs and outputs lose the same channels.

    torch-pruning expresses this by one method for both ends, as it does for norms.
    """

    prune_in_channels = PlaceholderPruner.prune_out_channels


@torch.no_grad()
def put_placeholders(model: nn.Module, inputs: Any, known: Mapping[str, Site]) -> None:
    """Replaces modules of a model by placeholders, in place.

    The model runs once, to record the outputs of these modules.

    Args:
        model: The model, which is changed. Give a copy.
        inputs: What the model is called with.
        known: For the path of each module to replace, its site. The site says which features the module reads and
            writes.
    """
    outputs: dict[str, list[Any]] = {path: [] for path in known}

    def watch(path: str) -> Any:
        """Keeps each output of a module. `append` returns None, so the hook leaves the output alone."""
        return model.get_submodule(path).register_forward_hook(lambda _module, _args, out: outputs[path].append(out))

    handles = [watch(path) for path in known]
    try:
        with slow_path():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for path, site in known.items():
        # A module that the forward does not call is not in the graph, and needs no placeholder.
        if outputs[path]:
            # The first cut is of a producer's weight, along its output axis. The other axis is the stream.
            first_cut, given = site.cuts[0], tensors_in(outputs[path][0])[0]
            weight = model.get_parameter(first_cut.tensor)
            parent, _, child = path.rpartition(".")
            features = weight.shape[1 - first_cut.axis], given.shape[site.axes[0]]
            joins = site.adapter in ADAPTERS and ADAPTERS[site.adapter].joins
            placeholder = (JoiningPlaceholder if joins else Placeholder)(
                *features, outputs[path], model.get_submodule(path)
            )
            setattr(model.get_submodule(parent), child, placeholder.to(weight.device))
