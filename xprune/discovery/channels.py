"""Finds residual streams in the dependency graph, and proves that their channels can be removed.

A residual stream is a set of features that at least two layers or modules write to, and to which blocks add. Each
stream gives one site, whose units are the channels. The site cuts every tensor that has an axis of channels:

1. `dependency_graph.trace` replaces known attentions and MLPs by placeholders. The graph shows the stream between them.
2. The walk starts at each layer that writes to a stream. `stream_walk.holders` lists all nodes of the graph that hold
   the same channels: layers, modules, parameters and operations. We call them holders.
3. `_site` turns the holders into cuts. For a placeholder, the adapter of its module says which tensors hold the
   channels. Without an adapter, `stream_shapes` guesses it.
4. `_prove` removes channels from a copy of the model, and compares this copy with the gated model.
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
from xprune.modules.forward import error_text
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import tensor_at
from xprune.modules.removed import Removed
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

_MIXING = ("Softmax", "Bmm", "ScaledDotProduct")
"""Parts of the names of operations inside attentions. If a stream has one, an attention has no placeholder."""


@dataclass
class _Stream:
    """Collects the cuts, consumers and norm layers of one stream, while `_site` goes through its holders.

    Attributes:
        model: The model.
        size: The number of units.
        cuts: (id of the tensor, axis) -> the cut. So a tied tensor is cut once.
        consumers: Path of a consumer -> the feature axis of its input.
        norms: The paths of the norm layers over the channels.
        attributes: The paths of the attributes that hold a multiple of the number of channels.
    """

    model: nn.Module
    size: int
    cuts: dict[tuple[int, int], Cut] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, None] = field(default_factory=dict)

    def add_parameter(self, path: str, guessed_axis: int, width: int) -> None:
        """Adds a cut of a bare parameter: one that belongs to no layer, such as a class token or a layer scale.

        The cut is along an axis that is as long as the stream, or else along an axis whose length is a multiple of it.
        If several axes fit, it is the guessed axis if this one fits, and else the last one. If no axis fits, nothing is
        added.

        Args:
            path: The path of the parameter.
            guessed_axis: The axis that torch-pruning assumes: the last one with more than one entry.
            width: The number of neighbouring channels that form one unit.
        """
        shape, channels = tensor_at(self.model, path).shape, self.size * width
        fits = [axis for axis, length in enumerate(shape) if length == channels]
        fits = fits or [axis for axis, length in enumerate(shape) if length % channels == 0]
        if fits:
            self.add_cut(path, guessed_axis if guessed_axis in fits else fits[-1], width)

    def add_cut(self, path: str, axis: int, width: int) -> None:
        """Adds a cut of a tensor.

        Its axis holds the channels once, or several copies of all channels one after another.

        Args:
            path: The path of the tensor.
            axis: The axis.
            width: The number of neighbouring channels that form one unit.

        Raises:
            Refused: There is no such tensor, or the length of its axis is not a multiple of the number of channels.
        """
        try:
            tensor = tensor_at(self.model, path)
        except AttributeError as error:
            raise Refused(f"an adapter says that {path} holds them, but there is no such tensor: {error}") from error
        copies, rest = divmod(tensor.shape[axis] if axis < tensor.dim() else 1, self.size * width)
        if rest:
            raise Refused(
                f"the length of axis {axis} of {path}, of shape {tuple(tensor.shape)}, is not a multiple of "
                f"{self.size * width}"
            )
        self.cuts[id(tensor), axis] = Cut(path, axis, copies, width)
        owner = path.rpartition(".")[0]
        if is_feature_norm(self.model.get_submodule(owner)):
            self.norms[owner] = None


def channel_sites(
    model: nn.Module, example_inputs: Any, known: Mapping[str, Site], hidden: Sequence[Site]
) -> list[Site]:
    """Finds the residual streams of a model.

    Each stream is proved on a copy of the model with noise on its weights. One channel is removed, and then half of the
    channels. The outputs have to be those of the copy with gates of 0. A stream that fails gives no site. If other
    streams succeed, a warning names it.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.
        known: Path of a module -> its site. The graph does not look inside these modules.
        hidden: The sites of hidden neurons. Their features are not taken for a stream.

    Returns:
        One site for each stream. Its units are the channels.

    Raises:
        ModelError: The model cannot be traced. Or one of its modules has lost all its units. Or no stream can be
            pruned, and the message has the reasons.
    """
    # `Removed` replaces a module without units. Its bias has an entry for each channel, but the walk would not find it.
    if any(isinstance(module, Removed) for module in model.modules()):
        raise ModelError(
            "an attention or MLP of this model has lost all its units, so its channels can no longer be found. Remove "
            "channels before you remove whole modules, or both in one plan."
        )
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    inner = {cut.tensor for site in hidden for cut in site.cuts if cut.axis == 0}
    # `seen` holds the weights of layers at which no walk starts. These layers produce hidden neurons, or an earlier
    # walk has reached them.
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
        # Here it is known that the features are a stream. So now the user gets the reason if it cannot be pruned.
        try:
            if refused:
                raise refused
            site = _site(model, graph, found, path, paths, known)
            _prove(model, site, example_inputs)
            sites.append(site)
        except Refused as reason:
            reasons.append(f"the {size} channels that {path} writes: {reason}")
    if reasons and sites:
        warnings.warn(f"some residual streams are left alone: {'; '.join(reasons)}.", stacklevel=5)
    if not sites:
        why = "; ".join(reasons) or "no two layers write to the same features"
        raise ModelError(f"channels cannot be pruned in this model: {why}. Leave 'channel' out of units=.")
    return sites


def _holders(graph: Any, producer: nn.Module, size: int) -> tuple[list[Holder], Refused | None]:
    """Finds all holders of the channels that a layer writes.

    Returns:
        (holders, the reason why the walk stopped early). The reason is None if the walk did not stop early.
    """
    found: list[Holder] = []
    try:
        found.extend(holders(graph, producer, size))
    except Refused as reason:
        return found, reason
    return found, None


def _is_stream(found: Sequence[Holder]) -> bool:
    """Returns True if the features look like a residual stream, else False.

    They do if a known module adds to its input. Without such a module, three conditions have to hold: the features are
    part of an addition, a layer or module reads them, and a norm layer, a bare parameter or a known module holds them.
    """
    joins = any(isinstance(holder.module, JoiningPlaceholder) for holder in found)
    is_read = any(
        isinstance(h.module, (nn.Linear, nn.Conv2d, Placeholder)) and not h.out and not h.sideways for h in found
    )
    # A bare parameter counts too, since ResMLP has a scale and a shift in place of norm layers.
    scaled = (Placeholder, nn.Parameter)
    in_blocks = any(_is_norm(holder.module) or isinstance(holder.module, scaled) for holder in found)
    return joins or (is_read and in_blocks and any("Add" in holder.node.name for holder in found))


def _is_norm(module: Any) -> bool:
    """Returns True for a batch norm, a group norm, or a norm layer over the features. Else False."""
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
        graph: The dependency graph. It was built from a copy of the model with placeholders.
        found: The holders.
        path: The path of the first layer that writes to the stream. The site is named after it.
        paths: The path of each module of the copy.
        known: Path of a placeholder -> the site of the module that it replaces.

    Raises:
        Refused: xprune does not know how to cut one of the holders.
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
    """Adds the cuts of a module that holds the channels, and a consumer if the module reads the stream.

    Raises:
        Refused: xprune does not know how to cut modules of this class, or the tensors of the module do not fit.
    """
    module, out, width = holder.module, holder.out, holder.width
    if isinstance(module, Placeholder):
        inside, served = stream.model.get_submodule(path), ADAPTERS.get(known[path].adapter)
        # A site that was found in the graph or by structure has no adapter. But an adapter may still know the class of
        # the module.
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
    # A tensor without axes holds no channels. An example is `num_batches_tracked` of a batch norm.
    names = [f"{path}.{name}" for name, tensor in tensors if tensor.dim()]
    # The weight of a transposed convolution is (in, out / groups, height, width). The weights of other convolutions are
    # (out, in / groups, height, width).
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
        raise Refused(f"{path} is a {type(module).__name__}, which may mix them")


@torch.no_grad()
def _prove(model: nn.Module, site: Site, example_inputs: Any) -> None:
    """Removes channels from a copy of the model with noise on its weights, and compares it with the gated copy.

    One channel is removed, and then half of the channels, both at random.

    Raises:
        Refused: The outputs differ, or the channels cannot be cut out.
    """
    # The noise has a standard deviation of 0.02. `unshare` gives the copy separate weights, so that the caller's
    # weights get no noise.
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
            raise Refused(f"{gone} of them cannot be cut out: {error_text(problem)}") from problem
        why = exactness.problem(copy, pruned, plan, example_inputs)
        if why:
            raise Refused(f"without {gone} of them, {why.rstrip('.')}")
