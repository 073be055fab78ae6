"""Gates: factors in [0, 1] on units' slices, applied by hooks on the layers the units feed."""

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
"""Task.rows: the sample that each row of a layer's input belongs to, None for contiguous blocks."""


_LARGE = 1e4
"""Far beyond what a norm gives of features that are kept."""


class Gates:
    """Applies `values` to the units of `sites` while attached to a model.

    values   per site, (units,) for every sample alike or (samples, units) for each sample its own; set them anew
             for each batch. They are cast to the dtype of the layer's input, gradients flow back to them.

    Attention stays fused, the model's weights are not touched, and the context has to span the backward pass where
    activations are recomputed in it.
    """

    def __init__(self, sites: Sequence[Site], values: Sequence[Tensor] | None = None, rows: Rows | None = None) -> None:
        self.sites = tuple(sites)
        self.values: Sequence[Tensor] = values if values is not None else [torch.ones(s.size) for s in self.sites]
        self.rows = rows
        self._tells_given = rows is not None and takes(rows, 4)  # tasks of 0.1 do not take what the model was given
        self._given = Given((), {})
        self._fired: set[str] = set()
        self._gated: list[tuple[Site, str]] = []  # every path that a gate is attached at

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with its gates. Raises GateError after a forward pass in which one of them did not fire."""
        self._gated = []
        handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._check_fired),
        ]
        for index, site in enumerate(self.sites):
            unit_kind(site.kind).gate(site, _Hooks(self, index, model, handles))
        own = with_gated_classes(model, self.sites)
        try:
            with slow_path():
                yield model
        finally:
            for handle in handles:
                handle.remove()
            for module, kind in own:
                module.__class__ = kind
            self._given = Given((), {})

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: rows are told from what it is given, until the next one begins."""
        self._given = Given(args, kwargs)
        self._fired.clear()

    def _gate(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._fired.add(path)
            if args:
                gated = args[0] * self._factor(index, args[0], path, axis)
                return tuple(gated if arg is args[0] else arg for arg in args), kwargs
            name = next(iter(kwargs), "")
            if not isinstance(kwargs.get(name), Tensor):
                raise GateError(f"{path} was called without an input tensor; its units cannot be gated.")
            return args, {**kwargs, name: kwargs[name] * self._factor(index, kwargs[name], path, axis)}

        return hook

    def _output(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self._fired.add(path)
            first = tensors_in(output)[0]
            gated = first * self._factor(index, first, path, axis)
            return map_tensors(output, lambda tensor: gated if tensor is first else tensor)

        return hook

    def _norm(self, index: int, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._fired.add(path)
            factor = self._factor(index, args[0], path, feature_axis(module)).float()
            made = weighted_norm(module, args[0], factor)
            # what is gone may lie far from the little that is kept, and would grow from norm to norm until it overflows
            return torch.where(factor == 0, made.clamp(-_LARGE, _LARGE), made).to(output.dtype)

        return hook

    def _factor(self, index: int, x: Tensor, path: str, axis: int) -> Tensor:
        """The gate of a site, shaped to multiply the input x of the layer at `path`, which may hold units in groups."""
        site, value = self.sites[index], self.values[index].to(x.device)
        axis = axis % x.dim()
        groups, width = _order(site, path, x.shape[axis])
        if value.shape[-1] != site.size or value.dim() not in (1, 2):
            raise GateError(
                f"{site.name}: gates are {tuple(value.shape)}, wanted (units,) or (samples, units), units {site.size}."
            )
        value = value.repeat_interleave(width, -1).repeat(*[1] * (value.dim() - 1), groups)
        shape = [1] * x.dim()
        shape[axis] = -1
        if value.dim() == 2:
            value = value[self._rows(site, x, len(value))]  # (rows, features)
            along = max(site.batch, 0)  # where only the task knows, rows lie along the first axis
            shape[along] = len(value)
            value = value if along < axis else value.T
        return value.view(shape).to(x.dtype)

    def _rows(self, site: Site, x: Tensor, samples: int) -> Tensor:
        rows = self._asked(site, x, samples)
        if rows is None and site.batch < 0:
            raise GateError(
                f"{site.name}: it is unknown which row of the input of {site.consumers[0]} belongs to which sample. "
                "Give the axis of the samples, find_sites(..., batch_axis=), or the sample of each row, in Task.rows."
            )
        length = x.shape[max(site.batch, 0)]
        if rows is None:
            if length % samples:
                raise GateError(
                    f"{site.name}: the input of {site.consumers[0]} has {length} rows for {samples} samples. Give "
                    "the axis of the samples, find_sites(..., batch_axis=), or the sample of each row, in Task.rows."
                )
            rows = torch.arange(samples, device=x.device).repeat_interleave(length // samples)
        if len(rows) != length:
            raise GateError(
                f"{site.name}: Task.rows gave {tuple(rows.shape)} for {length} rows at {site.consumers[0]}."
            )
        return rows.to(x.device)

    def _asked(self, site: Site, x: Tensor, samples: int) -> Tensor | None:
        if self.rows is None:
            return None
        asked = (site, x, samples, self._given) if self._tells_given else (site, x, samples)
        found: Tensor | None = self.rows(*asked)
        return found

    def _check_fired(self, *_: Any) -> None:
        for site, path in self._gated:
            if path not in self._fired:
                raise GateError(
                    f"{site.name}: the gate on {path} did not fire in this forward pass, so that its units cannot "
                    "be scored or verified. Leave the site out: find_sites(..., exclude=[...])."
                )


@dataclass(frozen=True)
class _Hooks:
    """Where a unit kind attaches the gates of one site, see `GateHooks`."""

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
        self.handles.append(handle)
        self.gates._gated.append((self.gates.sites[self.index], path))


def with_gated_classes(model: nn.Module, sites: Sequence[Site]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Gives modules whose own forward calls no layer that a hook could gate a class whose forward does, in place.

    Returns:
        Those modules, each with the class that it had.
    """
    had = []
    for site in sites:
        gated = ADAPTERS[site.adapter].gated if site.adapter in ADAPTERS else None
        if gated is not None:
            module = model.get_submodule(site.owner)
            had.append((module, type(module)))
            module.__class__ = gated
    return had


def _order(site: Site, path: str, features: int) -> tuple[int, int]:
    """(groups, width) of the `features` that the module at `path` is given, see Cut: as its weight has them."""
    fits = [cut for cut in site.cuts if cut.groups * cut.width * site.size == features]
    held = [cut for cut in fits if cut.tensor == f"{path}.weight"] or [
        cut for cut in fits if cut.tensor.startswith(f"{path}.")
    ]
    if held:
        return held[0].groups, held[0].width
    if features != site.size * site.width:
        raise GateError(f"{site.name}: {site.size} units of {site.width} features do not fit {features} at {path}.")
    return (1, site.width) if site.layout == "unit-major" else (site.width, 1)


class Gated(nn.Module):
    """A model behind gates that a module computes, so that Accelerate and DDP can prepare and reduce that module.

    source    gives the gates of all sites, (units,) or (samples, units), from whatever it is called with
    forward   how the model is called with inputs: `Task.forward`

    Enter `gated.gates.attached(model)` around forward and backward.
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
        """The model's output for the inputs, with the gates source(*args)."""
        self.gates.values = self.source(*args).split([site.size for site in self.gates.sites], dim=-1)
        return self.call(self.model, inputs)
