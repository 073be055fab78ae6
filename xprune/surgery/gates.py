"""Gates: factors from 0 to 1 that multiply the units of a model while it runs.

A gate of 0 gives the same outputs as removing the unit. So criteria learn gates or take gradients by them. The proof
compares a pruned model with the dense model whose gates are closed. Hooks apply the gates. No weight is changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.errors import GateError
from xprune.modules.calls import Given, call, map_tensors, slow_path, takes, tensors_in
from xprune.modules.norms import feature_axis, weighted_norm

Rows = Callable[[Site, Tensor, int, Given], Tensor | None] | Callable[[Site, Tensor, int], Tensor | None]
"""The type of `Task.rows`. Returns the sample of each row of a layer's input, or None if each sample has an equal block
of rows. Tasks from before 0.2 do not take the last argument."""


_LARGE = 1e4
"""A bound on the features that a gated norm returns for removed units. Features that are kept are far below it."""


class Gates:
    """Factors on the units of some sites, which multiply these units while they are attached to a model.

    The gates multiply the inputs of the consumers of each site. In norms over the units, each unit's share of the
    statistics is multiplied by its gate. The model's weights and its fused attention kernels stay as they are.

    Args:
        sites: The sites whose units are gated.
        values: The gates of each site, in the order of `sites`. Shape (units,) gives all samples the same gates. Shape
            (samples, units) gives each sample its own gates. Values are cast to the dtype and device of the layer's
            input, and gradients flow back to them. None for gates of 1.
        rows: Finds the sample of each row of a layer's input: `Task.rows`. Only gates of shape (samples, units) need
            it. None if each sample has an equal block of rows.

    Attributes:
        values: The gates in use. Assign new ones before each batch.

    Example:
        >>> import xprune
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> x = torch.randn(3, 4)
        >>> sites = xprune.find_sites(model, x)  # one site: the 6 neurons of the MLP
        >>> gates = Gates(sites, [torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])])
        >>> with gates.attached(model):
        ...     gated = model(x)
        >>> pruned = xprune.apply(model, xprune.Plan(sites, ((0, 2),)), x)
        >>> torch.allclose(pruned(x), gated, atol=1e-6)
        True
    """

    def __init__(self, sites: Sequence[Site], values: Sequence[Tensor] | None = None, rows: Rows | None = None) -> None:
        self.sites = tuple(sites)
        self.values: Sequence[Tensor] = values if values is not None else [torch.ones(s.size) for s in self.sites]
        self.rows = rows
        self._rows_take_given = rows is not None and takes(rows, 4)  # the rows of tasks from before 0.2 take three
        self._given = Given((), {})
        self._fired: set[str] = set()
        self._gated: list[tuple[Site, str]] = []  # each site with each path that has a gate

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """Attaches the gates to a model for the time of a `with` block.

        If activations are recomputed in the backward pass (activation checkpointing), the block has to span that pass
        too.

        Args:
            model: The model that the sites were found in. Its weights are not changed.

        Yields:
            The same model.

        Raises:
            GateError: A gate was not used in a forward pass, or a gate does not fit the input of its layer.
        """
        self._gated = []
        handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._check_fired),
        ]
        for index, site in enumerate(self.sites):
            unit_kind(site.kind).gate(site, _Hooks(self, index, model, handles))
        # A hook fires only if the forward calls its layer. Some forwards pass the layer's weight to a function instead.
        changed = with_gated_classes(model, self.sites)
        try:
            # nn.TransformerEncoder's fast inference path computes a whole block without calling its layers.
            with slow_path():
                yield model
        finally:
            for handle in handles:
                handle.remove()
            for module, kind in changed:
                module.__class__ = kind
            self._given = Given((), {})  # holds on to no batch

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the inputs of a forward pass as it begins. `Task.rows` may need them."""
        self._given = Given(args, kwargs)
        self._fired.clear()

    def _gate(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        """Returns a forward pre-hook that gates the first input of the module at `path` along `axis`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._fired.add(path)
            if args:
                gated = args[0] * self._factor(index, args[0], path, axis)
                # The same tensor may be given several times, as query, key and value are. Each place is gated.
                return tuple(gated if arg is args[0] else arg for arg in args), kwargs
            name = next(iter(kwargs), "")
            if not isinstance(kwargs.get(name), Tensor):
                raise GateError(f"{path} was called without an input tensor, so its units cannot be gated.")
            return args, {**kwargs, name: kwargs[name] * self._factor(index, kwargs[name], path, axis)}

        return hook

    def _output(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        """Returns a forward hook that gates the first tensor in the output of the module at `path` along `axis`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self._fired.add(path)
            first = tensors_in(output)[0]
            gated = first * self._factor(index, first, path, axis)
            return map_tensors(output, lambda tensor: gated if tensor is first else tensor)

        return hook

    def _norm(self, index: int, path: str) -> Callable[..., Any]:
        """Returns a forward hook that computes the norm at `path` again, with statistics over the kept units."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._fired.add(path)
            factor = self._factor(index, args[0], path, feature_axis(module)).float()
            normed = weighted_norm(module, args[0], factor)
            # The statistics ignore removed units, so their features may be huge after the norm. They would grow from
            # norm to norm until they overflow, and infinity times a gate of 0 is NaN.
            return torch.where(factor == 0, normed.clamp(-_LARGE, _LARGE), normed).to(output.dtype)

        return hook

    def _factor(self, index: int, x: Tensor, path: str, axis: int) -> Tensor:
        """Returns the gates of one site in the form that multiplies the input of a layer.

        Args:
            index: The index of the site.
            x: The input of the layer.
            path: The path of the layer.
            axis: The feature axis of `x`.

        Returns:
            A tensor that broadcasts to `x`, in the dtype of `x`.
        """
        site, value = self.sites[index], self.values[index].to(x.device)
        axis = axis % x.dim()
        groups, width = _order(site, path, x.shape[axis])
        if value.shape[-1] != site.size or value.dim() not in (1, 2):
            raise GateError(
                f"{site.name}: its gates have the shape {tuple(value.shape)}. Give the shape (units,) or "
                f"(samples, units), with {site.size} units."
            )
        # From one gate for each unit to one for each feature, in the order (groups, units, width).
        value = value.repeat_interleave(width, -1).repeat(*[1] * (value.dim() - 1), groups)
        shape = [1] * x.dim()
        shape[axis] = -1
        if value.dim() == 2:
            value = value[self._rows(site, x, len(value))]  # (rows, features)
            sample_axis = max(site.batch, 0)  # -1: only the task knows the samples, and rows lie along the first axis
            shape[sample_axis] = len(value)
            value = value if sample_axis < axis else value.T
        return value.view(shape).to(x.dtype)

    def _rows(self, site: Site, x: Tensor, samples: int) -> Tensor:
        """Returns the sample of each row of a layer's input, int64 (rows,). Raises GateError if it is unknown."""
        rows = self._rows_of_task(site, x, samples)
        if rows is None and site.batch < 0:
            raise GateError(
                f"{site.name}: it is unknown which row of the input of {site.consumers[0]} belongs to which sample. "
                "Give the axis of the samples, find_sites(..., batch_axis=), or the sample of each row, in Task.rows."
            )
        length = x.shape[max(site.batch, 0)]
        if rows is None:
            # Windows of an image are folded into the batch, so each sample may have several rows in a block.
            if length % samples:
                raise GateError(
                    f"{site.name}: the input of {site.consumers[0]} has {length} rows for {samples} samples. Give "
                    "the axis of the samples, find_sites(..., batch_axis=), or the sample of each row, in Task.rows."
                )
            rows = torch.arange(samples, device=x.device).repeat_interleave(length // samples)
        if len(rows) != length:
            raise GateError(
                f"{site.name}: Task.rows returned the shape {tuple(rows.shape)}, but the input of "
                f"{site.consumers[0]} has {length} rows. Return one sample for each row."
            )
        return rows.to(x.device)

    def _rows_of_task(self, site: Site, x: Tensor, samples: int) -> Tensor | None:
        """Calls `rows`. Returns None if there is no `rows` or if each sample has an equal block of rows."""
        if self.rows is None:
            return None
        arguments = (site, x, samples, self._given) if self._rows_take_given else (site, x, samples)
        found: Tensor | None = self.rows(*arguments)
        return found

    def _check_fired(self, *_: Any) -> None:
        """Raises GateError if a gate was not used. Without this check, its units would wrongly look useless."""
        for site, path in self._gated:
            if path not in self._fired:
                raise GateError(
                    f"{site.name}: the gate on {path} did not fire in this forward pass, so its units cannot be scored "
                    "or verified. Leave the site out: find_sites(..., exclude=[...])."
                )


@dataclass(frozen=True)
class _Hooks:
    """Attaches the gates of one site. A unit kind calls it, see `GateHooks`.

    Args:
        gates: The gates.
        index: The index of the site in the gates.
        model: The model that gets the hooks.
        handles: A list to which the handle of each hook is added, for its removal.
    """

    gates: Gates
    index: int
    model: nn.Module
    handles: list[Any]

    def on_input(self, path: str, axis: int) -> None:
        """See GateHooks.on_input."""
        hook = self.gates._gate(self.index, path, axis)
        self._add(path, self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, path: str, axis: int) -> None:
        """See GateHooks.on_output."""
        hook = self.gates._output(self.index, path, axis)
        self._add(path, self.model.get_submodule(path).register_forward_hook(hook))

    def on_norm(self, path: str) -> None:
        """See GateHooks.on_norm."""
        hook = self.gates._norm(self.index, path)
        self._add(path, self.model.get_submodule(path).register_forward_hook(hook))

    def _add(self, path: str, handle: Any) -> None:
        """Notes one hook, so that it is removed later and checked for having fired."""
        self.handles.append(handle)
        self.gates._gated.append((self.gates.sites[self.index], path))


def with_gated_classes(model: nn.Module, sites: Sequence[Site]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Changes the class of modules whose own forward does not call the layer that a gate needs, in place.

    For example, nn.MultiheadAttention passes the weight of its output projection to a function, so a hook on that layer
    never fires. The new class, `Adapter.gated`, computes the same and calls the layer.

    Args:
        model: The model. The classes of some of its modules change. Its tensors do not.
        sites: The sites that are going to be gated.

    Returns:
        Each changed module with the class that it had. Assign that class to undo the change.
    """
    changed = []
    for site in sites:
        gated = ADAPTERS[site.adapter].gated if site.adapter in ADAPTERS else None
        if gated is not None:
            module = model.get_submodule(site.owner)
            changed.append((module, type(module)))
            module.__class__ = gated
    return changed


def _order(site: Site, path: str, features: int) -> tuple[int, int]:
    """Returns the order of a layer's input features as (groups, width), see `Cut`.

    A site may have several consumers that order the units differently. So the order is taken from the cut of the
    layer's own weight, or of another tensor of the layer. Only a layer without such a cut gets the site's layout.

    Args:
        site: The site.
        path: The path of the layer.
        features: The number of input features of the layer.
    """
    fits = [cut for cut in site.cuts if cut.groups * cut.width * site.size == features]
    of_layer = [cut for cut in fits if cut.tensor == f"{path}.weight"] or [
        cut for cut in fits if cut.tensor.startswith(f"{path}.")
    ]
    if of_layer:
        return of_layer[0].groups, of_layer[0].width
    if features != site.size * site.width:
        raise GateError(
            f"{site.name}: its {site.size} units of {site.width} features do not fit the input of {path}, which has "
            f"{features} features."
        )
    return (1, site.width) if site.layout == "unit-major" else (site.width, 1)


class Gated(nn.Module):
    """A model together with a module that computes its gates.

    DistributedDataParallel, which Accelerate uses, only reduces gradients of the one module that it wraps and calls. So
    the model and the source of its gates are one module here. Enter `gated.gates.attached(model)` around the forward
    and the backward pass.

    Args:
        model: The model.
        sites: The sites whose units are gated.
        source: Computes the gates of all sites side by side, shape (units,) or (samples, units). It is called with the
            arguments that `forward` gets after the inputs.
        forward: Calls the model with its inputs: `Task.forward`.
        rows: Finds the sample of each row of a layer's input: `Task.rows`. None if each sample has an equal block of
            rows.

    Example:
        >>> import xprune
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> x, labels = torch.randn(3, 4), torch.tensor([0, 1, 1])
        >>> sites = xprune.find_sites(model, x)
        >>> gated = Gated(model, sites, source=nn.Embedding(2, 6))  # gates of 6 units for each of 2 classes
        >>> with gated.gates.attached(model):
        ...     gated(x, labels).sum().backward()
        >>> gated.source.weight.grad.shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        source: nn.Module,
        forward: Callable[[nn.Module, Any], Any] = call,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.model, self.source, self.call = model, source, forward
        self.gates = Gates(sites, rows=rows)

    def forward(self, inputs: Any, *args: Any) -> Any:
        """Returns the model's output for the inputs, with the gates that `source(*args)` computes."""
        self.gates.values = self.source(*args).split([site.size for site in self.gates.sites], dim=-1)
        return self.call(self.model, inputs)
