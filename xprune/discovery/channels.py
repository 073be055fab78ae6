"""Channels: residual streams, found in the dependency graph and proved before they are taken."""

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
from xprune.discovery.stream_walk import WRITERS, Holder, Refused, holders
from xprune.errors import ModelError
from xprune.modules.copies import alias, own
from xprune.modules.norms import BATCH_NORMS, over_features
from xprune.modules.paths import tensor_at
from xprune.modules.removed import Removed
from xprune.surgery import exactness
from xprune.surgery.cut import remove_units

_MIXING = ("Softmax", "Bmm", "ScaledDotProduct")


@dataclass
class _Stream:
    """What is known of one stream so far."""

    model: nn.Module
    size: int  # units
    cuts: dict[tuple[int, int], Cut] = field(default_factory=dict)
    feeds: dict[str, int] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    counts: dict[str, None] = field(default_factory=dict)

    def bare(self, path: str, guess: int, width: int) -> None:
        """Takes a bare parameter along the axis as long as the stream, the guessed one of several; without one, not."""
        shape, channels = tensor_at(self.model, path).shape, self.size * width
        fits = [axis for axis, length in enumerate(shape) if length == channels]
        fits = fits or [axis for axis, length in enumerate(shape) if length % channels == 0]
        if fits:
            self.cut(path, guess if guess in fits else fits[-1], width)

    def cut(self, path: str, axis: int, width: int) -> None:
        """Takes a tensor whose axis holds the stream once, or several copies of it one after another."""
        try:
            tensor = tensor_at(self.model, path)
        except AttributeError as error:
            raise Refused(f"{path} is said to lie along them, but is not there: {error}") from error
        copies, rest = divmod(tensor.shape[axis] if axis < tensor.dim() else 1, self.size * width)
        if rest:
            raise Refused(f"{path} {tuple(tensor.shape)} is not a multiple of {self.size * width} along axis {axis}")
        self.cuts[id(tensor), axis] = Cut(path, axis, copies, width)
        owner = path.rpartition(".")[0]
        if over_features(self.model.get_submodule(owner)):
            self.norms[owner] = None


def channel_sites(
    model: nn.Module, example_inputs: Any, known: Mapping[str, Site], hidden: Sequence[Site]
) -> list[Site]:
    """The residual streams of a model, a site each, whose units are the stream's channels.

    known    sites of the modules that the graph does not look into, by path
    hidden   sites of hidden neurons, whose features are no stream

    A stream is what at least two layers or modules write to. It is proposed by the graph and proved on a copy with
    other weights: without one channel, and without half of them, the copy has to give what it gives with gates. A
    stream that fails is left alone with a warning; ModelError, with the reasons, where none is left.
    """
    if any(isinstance(module, Removed) for module in model.modules()):
        raise ModelError("an attention or MLP is wholly gone: remove channels before, or together with, whole modules.")
    copy, graph = trace(model, example_inputs, known)
    paths = {module: path for path, module in copy.named_modules()}
    inner = {cut.tensor for site in hidden for cut in site.cuts if cut.axis == 0}
    sites, reasons, seen = [], [], set(inner)
    for module, path in paths.items():
        if not isinstance(module, WRITERS) or module not in graph.module2node or f"{path}.weight" in seen:
            continue
        size = graph.get_out_channels(module)
        if size == 1:
            continue
        found, reason = _followed(graph, module, size)
        writers = [paths[holder.module] for holder in found if holder.writes]
        seen |= {f"{paths[h.module]}.weight" for h in found if h.writes or h.sideways}
        if len(writers) < 2 or inner & {f"{writer}.weight" for writer in writers} or not _is_stream(found):
            continue
        try:
            if reason:
                raise reason
            site = _site(model, graph, found, path, paths, known)
            _prove(model, site, example_inputs)
            sites.append(site)
        except Refused as reason:
            reasons.append(f"the {size} channels that {path} writes: {reason}")
    if reasons and sites:
        warnings.warn(f"left alone: {'; '.join(reasons)}.", stacklevel=4)
    if not sites:
        why = "; ".join(reasons) or "no two layers write to the same features"
        raise ModelError(f"channels cannot be pruned here: {why}. Leave 'channel' out of units=.")
    return sites


def _followed(graph: Any, writer: nn.Module, size: int) -> tuple[list[Holder], Refused | None]:
    """What holds the stream, as far as it can be followed, and why no farther."""
    found: list[Holder] = []
    try:
        found.extend(holders(graph, writer, size))
    except Refused as reason:
        return found, reason
    return found, None


def _is_stream(found: Sequence[Holder]) -> bool:
    """True where features are added up and read, behind a norm or by a module that an adapter knows."""
    joins = any(isinstance(holder.module, JoiningPlaceholder) for holder in found)
    reads = any(
        isinstance(h.module, (nn.Linear, nn.Conv2d, Placeholder)) and not h.out and not h.sideways for h in found
    )
    scaled = (Placeholder, nn.Parameter)  # norms without statistics are bare parameters
    inside = any(_owner_is_norm(holder.module) or isinstance(holder.module, scaled) for holder in found)
    return joins or (reads and inside and any("Add" in holder.node.name for holder in found))


def _owner_is_norm(module: Any) -> bool:
    return isinstance(module, (*BATCH_NORMS, nn.GroupNorm)) or over_features(module)


def _site(
    model: nn.Module,
    graph: Any,
    found: Sequence[Holder],
    path: str,
    paths: Mapping[Any, str],
    known: Mapping[str, Site],
) -> Site:
    """The site of a stream in the graph; `Refused` where something that holds it is not understood."""
    stream = _Stream(model, found[0].size)
    bare = {parameter: name for name, parameter in graph.model.named_parameters()}
    for holder in found:
        module = holder.module
        if holder.node.type == tp.ops.OPTYPE.OUTPUT:
            raise Refused("the model returns them")
        if any(mix in holder.node.name for mix in _MIXING):
            raise Refused("they are mixed by an attention that no adapter knows")
        if isinstance(module, nn.Parameter):
            stream.bare(bare[module], int(holder.node.pruning_dim), holder.width)
        elif module in paths and not holder.sideways:
            _member(stream, paths[module], holder, known)
    if not stream.feeds:
        raise Refused("no layer reads them")
    return Site(
        name=f"stream:{path}",
        kind="channel",
        size=stream.size,
        width=found[0].width,
        layer=next(iter(stream.feeds)),
        axis=next(iter(stream.feeds.values())),
        cuts=tuple(stream.cuts.values()),
        norms=tuple(stream.norms),
        feeds=tuple(stream.feeds),
        axes=tuple(stream.feeds.values()),
        counts=tuple(stream.counts),
    )


def _member(stream: _Stream, path: str, holder: Holder, known: Mapping[str, Site]) -> None:
    """Adds a module of the group: what it loses, and where its channels are gated if it reads them."""
    module, out, width = holder.module, holder.out, holder.width
    if isinstance(module, Placeholder):
        inside, served = stream.model.get_submodule(path), ADAPTERS.get(known[path].adapter)
        adapters = [served] if served else [a for a in ADAPTERS.values() if a.serves(inside)]
        said = (adapter.along_stream(path, inside) for adapter in adapters)
        along = next(filter(None, said), None) or stream_parts_by_shape(path, inside, known[path], stream.size * width)
        joins = isinstance(module, JoiningPlaceholder)
        if not (along.writes if out else along.reads):
            raise Refused(f"no adapter says what of {path} lies along them")
        for name, axis in (*(along.reads if joins or not out else ()), *(along.writes if out else ())):
            stream.cut(name, axis, width)
        stream.feeds |= {} if out and not joins else dict(along.feeds)
        stream.counts |= dict.fromkeys(along.counts)
        return
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    names = [f"{path}.{name}" for name, tensor in held if tensor.dim()]
    turned = isinstance(module, nn.ConvTranspose2d)  # whose weight is (in, out / groups, height, width)
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and not out:
        stream.cut(f"{path}.weight", 0 if turned else 1, width)
        stream.feeds[path] = -1 if isinstance(module, nn.Linear) else 1
    elif turned:
        stream.cut(f"{path}.weight", 0 if module.groups > 1 else 1, width)
        if module.bias is not None:
            stream.cut(f"{path}.bias", 0, width)
    elif isinstance(module, nn.Embedding):
        stream.cut(f"{path}.weight", 1, width)
    elif isinstance(module, (nn.Linear, nn.Conv2d, *BATCH_NORMS)) or over_features(module):
        for name in names:
            stream.cut(name, 0, width)
    elif names:
        raise Refused(f"{path} is a {type(module).__name__}, which is not known to keep channels apart")


@torch.no_grad()
def _prove(model: nn.Module, site: Site, example_inputs: Any) -> None:
    """`Refused` where a copy with noise on its weights does not give without channels what it gives with gates."""
    copy, generator = own(alias(model), model), torch.Generator().manual_seed(0)
    for tensor in dict.fromkeys(copy.parameters()):
        if tensor.is_floating_point():
            noise: Tensor = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(0.02 * noise)
    order = torch.randperm(site.size, generator=generator).tolist()
    for gone in {1, site.size // 2} - {0, site.size}:
        plan = Plan((site,), (tuple(sorted(order[gone:])),))
        try:
            pruned = remove_units(alias(copy), plan, ADAPTERS)
        except Exception as problem:
            raise Refused(f"{gone} of them cannot be cut out: {type(problem).__name__}: {problem}") from problem
        why = exactness.problem(copy, pruned, plan, example_inputs)
        if why:
            raise Refused(f"without {gone} of them {why}")
