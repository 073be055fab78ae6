"""Finds residual streams in the dependency graph and proves that their channels can be removed.

A residual stream is a set of features that at least two layers or modules write to, and to which blocks add. One
site is made for each stream, and its units are the channels. The site cuts every tensor on the stream:

1. `dependency_graph.trace` makes placeholders of the known attentions and MLPs. The graph shows the stream between
   them.
2. From each layer that writes, `stream_walk.holders` lists all that holds the same channels.
3. `_site` turns the holders into cuts. For a placeholder, the adapter of the module says which of its tensors hold the
   channels, or `stream_shapes` guesses it.
4. `_prove` removes channels from a copy of the model and compares the copy with the gated model.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.site import Cut, Site
from xprune.discovery.dependency_graph import trace
from xprune.discovery.placeholders import JoiningPlaceholder, Placeholder
from xprune.discovery.stream_shapes import stream_parts_by_shape
from xprune.discovery.stream_walk import PRODUCERS, Holder, Refused, holders
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, unshare
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import tensor_at
from xprune.modules.removed import Removed
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

_MIXING = ("Softmax", "Bmm", "ScaledDotProduct")
"""Parts of the names of operations of an attention. In a stream, they mean that an attention has no placeholder."""


@dataclass
class _Stream:
    """Collects the cuts, consumers and norms of one stream.

    Attributes:
        model: The model.
        size: The number of units.
        cuts: The cuts so far, by the identity of the tensor and the axis. A tied tensor is cut once.
        consumers: The paths of the consumers so far, with the feature axis of their input.
        norms: The paths of the norms over the channels so far.
        attributes: The paths of the attributes so far that hold a multiple of the channels.
    """

    model: nn.Module
    size: int
    cuts: dict[tuple[int, int], Cut] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, None] = field(default_factory=dict)

    def add_parameter(self, path: str, guessed_axis: int, width: int) -> None:
        """Adds a cut of a bare parameter, such as a class token or a layer scale.

        The cut is along an axis as long as the stream, or a multiple of it. If several axes fit, it is the guessed axis
        or else the last one. If no axis fits, nothing is added.

        Args:
            path: The path of the parameter.
            guessed_axis: The axis that torch-pruning takes: the last one with more than one entry.
            width: How many neighbouring channels a unit has.
        """
        shape, channels = tensor_at(self.model, path).shape, self.size * width
        fits = [axis for axis, length in enumerate(shape) if length == channels]
        fits = fits or [axis for axis, length in enumerate(shape) if length % channels == 0]
        if fits:
            self.add_cut(path, guessed_axis if guessed_axis in fits else fits[-1], width)

    def add_cut(self, path: str, axis: int, width: int) -> None:
        """Adds a cut of a tensor. Its axis holds the stream once, or several copies of it one after another.

        Args:
            path: The path of the tensor.
            axis: The axis.
            width: How many neighbouring channels a unit has.

        Raises:
            Refused: There is no such tensor, or its axis does not hold a whole number of copies.
        """
        try:
            tensor = tensor_at(self.model, path)
        except AttributeError as error:
            raise Refused(f"an adapter says that {path} holds them, but there is no such tensor: {error}") from error
        copies, rest = divmod(tensor.shape[axis] if axis < tensor.dim() else 1, self.size * width)
        if rest:
            raise Refused(
                f"axis {axis} of {path}, of shape {tuple(tensor.shape)}, is no multiple of {self.size * width} long"
            )
        self.cuts[id(tensor), axis] = Cut(path, axis, copies, width)
        owner = path.rpartition(".")[0]
        if is_feature_norm(self.model.get_submodule(owner)):
            self.norms[owner] = None


def channel_sites(
    model: nn.Module, example_inputs: Any, known: Mapping[str, Site], hidden: Sequence[Site]
) -> list[Site]:
    """Finds the residual streams of a model.

    Each stream is proved on a copy with other weights. Without one channel, and without half of the channels, the copy
    has to return what it returns with gates of 0. Streams that fail are left alone with a warning.

    Args:
        model: The model. It is not changed.
        example_inputs: What the model is called with.
        known: For the path of each module that the graph does not look into, its site.
        hidden: The sites of hidden neurons, whose features are no stream.

    Returns:
        One site for each stream. Its units are the channels.

    Raises:
        ModelError: The model cannot be traced, a module has lost all its units, or no stream can be pruned. The message
            has the reasons.
    """
    # The bias that replaces such a module is on the stream, but the walk finds no cut for it.
    if any(isinstance(module, Removed) for module in model.modules()):
        raise ModelError(
            "an attention or MLP of this model has lost all its units, so its channels can no longer be found. Remove "
            "channels before you remove whole modules, or both in one plan."
        )
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    inner = {cut.tensor for site in hidden for cut in site.cuts if cut.axis == 0}
    # Weights of layers at which no walk starts: they make hidden features, or an earlier walk has met them.
    sites, reasons, seen = [], [], set(inner)
    for module, path in paths.items():
        if not isinstance(module, PRODUCERS) or module not in graph.module2node or f"{path}.weight" in seen:
            continue
        size = graph.get_out_channels(module)
        if size == 1:
            continue
        found, refused = _holders(graph, module, size)
        producers = [paths[holder.module] for holder in found if holder.writes]
        seen |= {f"{paths[h.module]}.weight" for h in found if h.writes or h.sideways}
        if len(producers) < 2 or inner & {f"{producer}.weight" for producer in producers} or not _is_stream(found):
            continue
        # Only now is a refusal a reason for the user: these features are a stream.
        try:
            if refused:
                raise refused
            site = _site(model, graph, found, path, paths, known)
            _prove(model, site, example_inputs)
            sites.append(site)
        except Refused as reason:
            reasons.append(f"the {size} channels that {path} writes: {reason}")
    if reasons and sites:
        warnings.warn(f"some residual streams are left alone: {'; '.join(reasons)}.", stacklevel=4)
    if not sites:
        why = "; ".join(reasons) or "no two layers write to the same features"
        raise ModelError(f"channels cannot be pruned in this model: {why}. Leave 'channel' out of units=.")
    return sites


def _holders(graph: Any, producer: nn.Module, size: int) -> tuple[list[Holder], Refused | None]:
    """Returns all that holds the channels of a layer, and why the walk stopped early, or None if it did not."""
    found: list[Holder] = []
    try:
        found.extend(holders(graph, producer, size))
    except Refused as reason:
        return found, reason
    return found, None


def _is_stream(found: Sequence[Holder]) -> bool:
    """Returns True if the features look like a residual stream.

    One sign is enough: a known module that adds to its input. Otherwise there have to be three: the features are added
    up, a layer or module reads them, and a norm, a bare parameter or a known module is on the stream.
    """
    joins = any(isinstance(holder.module, JoiningPlaceholder) for holder in found)
    is_read = any(
        isinstance(h.module, (nn.Linear, nn.Conv2d, Placeholder)) and not h.out and not h.sideways for h in found
    )
    # A norm without statistics is a bare scale and shift, as in ResMLP.
    scaled = (Placeholder, nn.Parameter)
    in_blocks = any(_is_norm(holder.module) or isinstance(holder.module, scaled) for holder in found)
    return joins or (is_read and in_blocks and any("Add" in holder.node.name for holder in found))


def _is_norm(module: Any) -> bool:
    """Returns True for a batch norm, a group norm, or a norm over the features."""
    return isinstance(module, (*BATCH_NORMS, nn.GroupNorm)) or is_feature_norm(module)


def _site(
    model: nn.Module,
    graph: Any,
    found: Sequence[Holder],
    path: str,
    paths: Mapping[Any, str],
    known: Mapping[str, Site],
) -> Site:
    """Turns the holders of a stream into a site.

    Args:
        model: The model.
        graph: The graph of its copy with placeholders.
        found: The holders.
        path: The path of the first layer that writes to the stream. It names the site.
        paths: The path of each module of the copy.
        known: For the path of each placeholder, its site.

    Raises:
        Refused: A holder is of a kind that xprune cannot cut.
    """
    stream = _Stream(model, found[0].size)
    parameters = {parameter: name for name, parameter in graph.model.named_parameters()}
    for holder in found:
        module = holder.module
        if holder.node.type == tp.ops.OPTYPE.OUTPUT:
            raise Refused("the model returns them as its output")
        if any(mixing in holder.node.name for mixing in _MIXING):
            raise Refused("an attention that no adapter knows mixes them")
        if isinstance(module, nn.Parameter):
            stream.add_parameter(parameters[module], int(holder.node.pruning_dim), holder.width)
        elif module in paths and not holder.sideways:
            _add_module(stream, paths[module], holder, known)
    if not stream.consumers:
        raise Refused("no layer reads them")
    return Site(
        name=f"stream:{path}",
        kind="channel",
        size=stream.size,
        width=found[0].width,
        cuts=tuple(stream.cuts.values()),
        norms=tuple(stream.norms),
        consumers=tuple(stream.consumers),
        axes=tuple(stream.consumers.values()),
        attributes=tuple(stream.attributes),
    )


def _add_module(stream: _Stream, path: str, holder: Holder, known: Mapping[str, Site]) -> None:
    """Adds the cuts of a module on the stream, and a consumer if the module reads the stream.

    Raises:
        Refused: The module is of a class that xprune cannot cut, or its tensors do not fit.
    """
    module, out, width = holder.module, holder.out, holder.width
    if isinstance(module, Placeholder):
        inside, served = stream.model.get_submodule(path), ADAPTERS.get(known[path].adapter)
        # A module found in the graph or by structure has no adapter. Another adapter may know its class all the same.
        adapters = [served] if served else [a for a in ADAPTERS.values() if a.serves(inside)]
        known_parts = (adapter.stream_parts(path, inside) for adapter in adapters)
        parts = next(filter(None, known_parts), None) or stream_parts_by_shape(
            path, inside, known[path], stream.size * width
        )
        joins = isinstance(module, JoiningPlaceholder)
        if not (parts.writes if out else parts.reads):
            raise Refused(f"no adapter says which tensors of {path} hold them")
        for name, axis in (*(parts.reads if joins or not out else ()), *(parts.writes if out else ())):
            stream.add_cut(name, axis, width)
        stream.consumers |= {} if out and not joins else dict(parts.consumers)
        stream.attributes |= dict.fromkeys(parts.attributes)
        return
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    # A tensor without axes, such as the count of batches in a batch norm, holds no channels.
    names = [f"{path}.{name}" for name, tensor in tensors if tensor.dim()]
    # The weight of a transposed convolution is (in, out / groups, height, width), others are (out, in / groups, ...).
    transposed = isinstance(module, nn.ConvTranspose2d)
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and not out:
        stream.add_cut(f"{path}.weight", 0 if transposed else 1, width)
        stream.consumers[path] = -1 if isinstance(module, nn.Linear) else 1
    elif transposed:
        stream.add_cut(f"{path}.weight", 0 if module.groups > 1 else 1, width)
        if module.bias is not None:
            stream.add_cut(f"{path}.bias", 0, width)
    elif isinstance(module, nn.Embedding):
        stream.add_cut(f"{path}.weight", 1, width)
    elif isinstance(module, (nn.Linear, nn.Conv2d, *BATCH_NORMS)) or is_feature_norm(module):
        for name in names:
            stream.add_cut(name, 0, width)
    elif names:
        raise Refused(f"{path} is a {type(module).__name__}, and it is not known whether it keeps them apart")


@torch.no_grad()
def _prove(model: nn.Module, site: Site, example_inputs: Any) -> None:
    """Removes channels from a copy of the model with noise on its weights, and compares it with the gated copy.

    Raises:
        Refused: The outputs differ, or the channels cannot be cut out.
    """
    # The noise has a standard deviation of 0.02. It must not reach the caller's weights, hence `unshare`.
    copy, generator = unshare(shared_copy(model), model), torch.Generator().manual_seed(0)
    for tensor in dict.fromkeys(copy.parameters()):
        if tensor.is_floating_point():
            noise: Tensor = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(0.02 * noise)
    order = torch.randperm(site.size, generator=generator).tolist()
    for gone in {1, site.size // 2} - {0, site.size}:
        plan = Plan((site,), (tuple(sorted(order[gone:])),))
        try:
            pruned = remove_units(shared_copy(copy), plan, ADAPTERS)
        except Exception as problem:
            raise Refused(f"{gone} of them cannot be cut out: {type(problem).__name__}: {problem}") from problem
        why = exactness.problem(copy, pruned, plan, example_inputs)
        if why:
            raise Refused(f"without {gone} of them, {why.rstrip('.')}")
