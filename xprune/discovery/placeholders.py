"""Placeholders: modules that replace attentions and MLPs before the dependency graph is built, to keep it simple.

The dependency graph follows each feature from operation to operation. Inside an attention, this does not work: reshapes
and products mix axes, and torch-pruning guesses their effect. If the sites of a module are known already, the graph
does not have to look inside. It only needs to know that the module reads features of the stream and writes features to
the stream.

So in a copy of the model, each such module is replaced by a placeholder. Before, a forward pass records the outputs of
the module. The placeholder returns zeros of the same shapes, in the same tuples, dicts or objects. One autograd
operation makes these zeros, and they depend on all inputs. So the graph sees the module as one operation.
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
    """A module that replaces another module, and that the dependency graph sees as one operation.

    Attributes that the placeholder lacks are read from the original module, since other modules may use them.

    Args:
        in_features: The number of features that the original module reads from the stream.
        out_features: The number of features that the original module writes to the stream.
        outputs: The outputs that the original module returned, one for each of its calls in a forward pass.
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
        # nn.Module registers each attribute that is a module. Inside a tuple, the original is not registered, so its
        # layers are not part of the graph.
        self.original = (original,)
        self.in_features, self.out_features = in_features, out_features
        self.outputs, self.calls = tuple(outputs), 0
        # With a parameter, the output has a gradient even if no input has one.
        self.weight = nn.Parameter(torch.zeros(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A copy is asked for attributes before its __init__ has run. Without this test, the next line would call
            # this method again without end.
            if "original" not in self.__dict__:
                raise
            return getattr(self.original[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the recorded output of this call. Its first tensor is replaced by zeros that depend on all inputs."""
        # A module that is called several times in one forward pass may return another shape each time.
        recorded = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        first = tensors_in(recorded)[0]
        inputs = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        zeros = _ZerosFrom.apply(first, self.weight.to(first.device), *inputs)
        return map_tensors(recorded, lambda t: zeros if t is first else t)


class JoiningPlaceholder(Placeholder):
    """A placeholder for a module that adds its input to its output, see Adapter.joins.

    Such a module reads and writes the same stream. So its inputs and its outputs lose the same channels.

    Example:
        >>> pruner = JoiningPlaceholderPruner()
        >>> pruner.prune_in_channels == pruner.prune_out_channels
        True
    """


class _ZerosFrom(torch.autograd.Function):
    """The autograd operation of a placeholder. It returns zeros that depend on all given tensors.

    It has no backward, because no gradient is computed. Only the graph is read.
    """

    @staticmethod
    def forward(ctx: Any, like: Tensor, *inputs: Tensor) -> Tensor:
        """Returns zeros with the shape and dtype of `like`. Autograd notes that they depend on `inputs`."""
        return torch.zeros_like(like)


class PlaceholderPruner(tp.BasePruningFunc):
    """Says how many features a placeholder reads and writes, in the form that torch-pruning asks for.

    torch-pruning needs a pruner for each class of modules in its graph. The two prune methods of a pruner serve as
    names for the inputs and the outputs of a module. xprune never calls these methods, because surgery uses the cuts of
    a site.
    """

    def get_in_channels(self, layer: Placeholder) -> int:
        """Returns the number of features that the placeholder reads."""
        return layer.in_features

    def get_out_channels(self, layer: Placeholder) -> int:
        """Returns the number of features that the placeholder writes."""
        return layer.out_features

    def prune_in_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Returns the layer unchanged. The graph uses this method as a name for the inputs, and nobody calls it."""
        return layer

    def prune_out_channels(self, layer: Placeholder, idxs: Sequence[int]) -> Placeholder:
        """Returns the layer unchanged. The graph uses this method as a name for the outputs, and nobody calls it."""
        return layer


class JoiningPlaceholderPruner(PlaceholderPruner):
    """The pruner of a joining placeholder, whose inputs and outputs lose the same channels.

    So both have the same name in the graph: one method for inputs and outputs. torch-pruning does the same for norm
    layers.
    """

    prune_in_channels = PlaceholderPruner.prune_out_channels


@torch.no_grad()
def put_placeholders(model: nn.Module, inputs: Any, known: Mapping[str, Site]) -> None:
    """Replaces modules of a model by placeholders, in place.

    The model runs once, to record the outputs of these modules.

    Args:
        model: The model, which is changed. Give a copy.
        inputs: The inputs that the model is called with.
        known: Path of a module to replace -> its site. The first cut of the site and its axes say how many features the
            module reads and writes.
    """
    outputs: dict[str, list[Any]] = {path: [] for path in known}
    inputs_of: dict[str, list[Tensor]] = {}

    def watch(path: str) -> Any:
        """Adds a hook that records each output of a module, and the tensors of its inputs."""

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs_of.setdefault(path, [t for t in tensors_in((args, kwargs)) if t.is_floating_point()])
            outputs[path].append(output)

        return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(path) for path in known]
    try:
        with slow_path():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for path, site in known.items():
        # If the forward does not call a module, the module is not in the graph and needs no placeholder.
        if outputs[path]:
            # The first cut is of a producer's weight, along its output axis. The other axis has an entry for each
            # channel of the stream.
            first_cut, given = site.cuts[0], tensors_in(outputs[path][0])[0]
            weight = model.get_parameter(first_cut.tensor)
            parent, _, child = path.rpartition(".")
            reads = weight.shape[1 - first_cut.axis]
            # A layer of an attention that no adapter knows may read something else than the stream. But the module's
            # first input is the stream.
            if site.adapter not in ADAPTERS and inputs_of[path] and inputs_of[path][0].dim() == given.dim():
                reads = inputs_of[path][0].shape[site.axes[0]]
            features = reads, given.shape[site.axes[0]]
            joins = site.adapter in ADAPTERS and ADAPTERS[site.adapter].joins
            placeholder = (JoiningPlaceholder if joins else Placeholder)(
                *features, outputs[path], model.get_submodule(path)
            )
            setattr(model.get_submodule(parent), child, placeholder.to(weight.device))
