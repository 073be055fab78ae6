"""Gates: factors from 0 to 1 that multiply the units of a model while it runs.

A gate of 0 gives the same outputs as removing the unit. Some criteria learn gates, and others take the gradient of the
loss with respect to gates. The proof compares a pruned model with the dense model in which the removed units have gates
of 0. Hooks apply the gates. No weight is changed.
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
from xprune.modules.paths import layer_path

Rows = Callable[[Site, Tensor, int, Given], Tensor | None] | Callable[[Site, Tensor, int], Tensor | None]
"""The type of `Task.rows`, which says to which sample each row of a layer's input belongs.

It returns the sample of each row, or None if each sample has an equal block of neighbouring rows. In tasks written for
xprune before version 0.2, the method does not take the last argument.
"""


_LARGE = 1e4
"""A bound on the features that a gated norm layer returns for removed units. Features of kept units are far smaller."""


class Gates:
    """Factors on the units of some sites, which multiply these units while they are attached to a model.

    The gates multiply the inputs of the consumers of each site. In a norm layer over the units, the gate of a unit says
    how much the unit counts in the mean and the variance. The weights of the model and its fused attention kernels stay
    as they are.

    Args:
        sites: The sites whose units are gated.
        values: The gates of each site, in the order of `sites`. With the shape (units,), all samples get the same
            gates. With the shape (samples, units), each sample gets separate gates. Gates are cast to the dtype and
            device of the layer's input, and gradients flow back to them. If None, all gates are 1.
        rows: A function that finds the sample of each row of a layer's input, such as `Task.rows`. Only gates of shape
            (samples, units) need it. If None, each sample is taken to have an equal block of neighbouring rows.

    Attributes:
        values: The gates in use. Assign new gates before each batch.
        average: True if the samples of a batch may get the mean of their gates at units that a parameter reads, see
            `Site.consumers`. All samples share the parameter. If False, gates that differ between samples are an error
            there.

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
        self._values: Sequence[Tensor] = values if values is not None else [torch.ones(s.size) for s in self.sites]
        self.rows = rows
        # `Task.rows` of tasks that were written for xprune before version 0.2 takes three arguments.
        self.average = False
        self._rows_take_given = rows is not None and takes(rows, 4)
        self._given = Given((), {})
        # Gates of all sites in one tensor, and the same tensor in other dtypes, see `join`.
        self._joined: Tensor | None = None
        self._cast: dict[Any, Sequence[Tensor]] = {}
        self._orders: dict[tuple[int, str, int], tuple[int, int]] = {}
        self._fired: set[str] = set()
        # (site, path of a module that has a gate of this site).
        self._gated: list[tuple[Site, str]] = []

    @property
    def values(self) -> Sequence[Tensor]:
        """The gates of each site, see `Gates`."""
        return self._values

    @values.setter
    def values(self, values: Sequence[Tensor]) -> None:
        self._values, self._joined, self._cast = values, None, {}

    def join(self, gates: Tensor) -> None:
        """Assigns the gates of all sites at once: (units of all sites,) or (samples, units of all sites).

        It has the same effect as assigning the parts of the tensor to `values`, in less time.
        """
        self.values = gates.split([site.size for site in self.sites], dim=-1)
        self._joined = gates

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """Attaches the gates to a model for the time of a `with` block.

        With activation checkpointing, the backward pass computes activations again, so the block has to contain the
        backward pass too.

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
        # A hook runs only if the forward calls its layer. Some forwards pass the weight of the layer to a function
        # instead. The modules with such a forward get another class here.
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
            # Otherwise the inputs and the gates of the last batch would stay in memory.
            self._given = Given((), {})
            self._cast = {}

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the inputs of a forward pass when it begins, because `Task.rows` may need them. A forward pre-hook."""
        self._given = Given(args, kwargs)
        self._fired.clear()

    def _gate(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        """Returns a forward pre-hook that gates the first input of the module at `path` along `axis`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._fired.add(path)
            if args:
                gated = self._gated_units(index, args[0], path, axis)
                # The same tensor may be passed several times, for example as query, key and value. All of these
                # arguments are gated.
                return tuple(gated if arg is args[0] else arg for arg in args), kwargs
            name = next(iter(kwargs), "")
            if not isinstance(kwargs.get(name), Tensor):
                raise GateError(f"{path} was called without an input tensor, so its units cannot be gated.")
            return args, {**kwargs, name: self._gated_units(index, kwargs[name], path, axis)}

        return hook

    def _output(self, index: int, path: str, axis: int) -> Callable[..., Any]:
        """Returns a forward hook that gates the first tensor in the output of the module at `path` along `axis`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            self._fired.add(path)
            first = tensors_in(output)[0]
            gated = self._gated_units(index, first, path, axis)
            return map_tensors(output, lambda tensor: gated if tensor is first else tensor)

        return hook

    def _weight(self, index: int, path: str, axis: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns two hooks of the module that holds the parameter at `path`, which gate the parameter along `axis`.

        The first hook puts the gated weight in front of the parameter before the forward. The second one takes it away.
        """
        name = path.rpartition(".")[2]

        def before(module: nn.Module, _args: Any) -> None:
            self._fired.add(path)
            weight = getattr(module, name)
            value = self.values[index]
            if value.dim() == 2:
                if not self.average and not torch.equal(value, value[:1].expand_as(value)):
                    raise GateError(
                        f"{self.sites[index].name}: its units are read by the weight {path}, which all samples share. "
                        "So its gates cannot differ between samples, as those of classes do. Leave the site out: "
                        "find_sites(..., exclude=[...]). Or choose a criterion that gives one score to each unit."
                    )
                # If all rows are equal, their mean is each of them. Its gradient is shared out between the rows.
                value = value.mean(0)
            # An attribute of the instance comes before its parameters, so the forward reads the gated weight.
            vars(module)[name] = weight * self._factor(index, weight, path, axis, value)

        def after(module: nn.Module, _args: Any, _output: Any) -> None:
            vars(module).pop(name, None)

        return before, after

    def _norm(self, index: int, path: str) -> Callable[..., Any]:
        """Returns a forward hook that computes the norm layer at `path` again, with statistics over the kept units."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._fired.add(path)
            factor = self._factor(index, args[0], path, feature_axis(module)).float()
            normed = weighted_norm(module, args[0], factor)
            # The statistics ignore removed units, so the features of these units may be huge after the norm layer. They
            # would grow from norm layer to norm layer until they overflow, and infinity times a gate of 0 is NaN.
            return torch.where(factor == 0, normed.clamp(-_LARGE, _LARGE), normed).to(output.dtype)

        return hook

    def _gated_units(self, index: int, x: Tensor, path: str, axis: int) -> Tensor:
        """Returns the input of a layer, in which each unit is multiplied by its gate.

        The features of `x` are seen as (groups, units, width), and its rows as (samples, rows of a sample). So a gate
        multiplies all its features at once, and no tensor of repeated gates is built.

        Args:
            index: The index of the site.
            x: The input of the layer.
            path: The path of the layer.
            axis: The feature axis of `x`.

        Returns:
            A tensor of the shape and dtype of `x`.
        """
        site, axis = self.sites[index], axis % x.dim()
        value = self._value(index, x)
        sample_axis = max(site.batch, 0)
        rows = self._rows_of_task(site, x, len(value)) if value.dim() == 2 else None
        if rows is not None:
            # The rows of a sample may lie anywhere, so the gates of each row are looked up.
            return x * self._factor(index, x, path, axis, rows=rows)
        groups, width = self._order(index, path, x.shape[axis])
        # The shape that `x` is seen in, and the shape of the gates in it, which has 1 where all entries share a gate.
        seen, shape = list(x.shape), [1] * x.dim()
        seen[axis : axis + 1], shape[axis : axis + 1] = [groups, site.size, width], [1, site.size, 1]
        if value.dim() == 2:
            # Where features come before samples, the sample axis has moved.
            place = sample_axis if sample_axis < axis else sample_axis + 2
            count = self._rows_of_each(site, x, len(value))
            seen[place : place + 1], shape[place : place + 1] = [len(value), count], [len(value), 1]
            value = value if sample_axis < axis else value.T
        # Axes are only split, which needs no copy.
        gated: Tensor = x.view(seen) * value.view(shape)
        return gated.reshape(x.shape)

    def _value(self, index: int, x: Tensor, value: Tensor | None = None) -> Tensor:
        """Returns the gates of a site in the dtype and on the device of `x`: (units,) or (samples, units)."""
        site = self.sites[index]
        if value is None and self._joined is not None:
            key = (x.dtype, x.device, torch.is_grad_enabled())
            # All gates are cast at once, and once for each forward pass.
            if key not in self._cast:
                self._cast[key] = self._joined.to(x).split([each.size for each in self.sites], dim=-1)
            return self._cast[key][index]
        value = self.values[index] if value is None else value
        if value.shape[-1] != site.size or value.dim() not in (1, 2):
            raise GateError(
                f"{site.name}: its gates have the shape {tuple(value.shape)}. Give the shape (units,) or "
                f"(samples, units), with {site.size} units."
            )
        return value.to(x)

    def _order(self, index: int, path: str, features: int) -> tuple[int, int]:
        """Returns the order of a layer's input features, see `_order`. It is looked up once for each layer."""
        key = (index, path, features)
        if key not in self._orders:
            self._orders[key] = _order(self.sites[index], path, features)
        return self._orders[key]

    def _factor(
        self,
        index: int,
        x: Tensor,
        path: str,
        axis: int,
        value: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Returns the gates of one site as a tensor that the input of a layer can be multiplied by.

        Args:
            index: The index of the site.
            x: The input of the layer.
            path: The path of the layer.
            axis: The feature axis of `x`.
            value: The gates. None means `values[index]`.
            rows: The sample of each row of `x`, as `Task.rows` returned it. None means that it is not known yet.

        Returns:
            A tensor that broadcasts to `x`, in the dtype of `x`.
        """
        site, axis = self.sites[index], axis % x.dim()
        groups, width = self._order(index, path, x.shape[axis])
        value = self._value(index, x, value)
        # Each gate is repeated, so that there is one for each feature, in the order (groups, units, width).
        if groups * width > 1:
            value = value[..., None, :, None].expand(*value.shape[:-1], groups, site.size, width).flatten(-3)
        shape = [1] * x.dim()
        shape[axis] = -1
        if value.dim() == 2:
            value = value[self._rows(site, x, len(value), rows)]  # (rows, features)
            # If `site.batch` is -1, only the task knows the samples. Then the rows lie along the first axis.
            sample_axis = max(site.batch, 0)
            shape[sample_axis] = len(value)
            value = value if sample_axis < axis else value.T
        return value.view(shape)

    def _rows_of_each(self, site: Site, x: Tensor, samples: int) -> int:
        """Returns the number of rows of each sample in a layer's input, where they are next to each other.

        Raises:
            GateError: The sample of a row is unknown, or the samples do not have equal numbers of rows.
        """
        if site.batch < 0:
            raise GateError(
                f"{site.name}: it is unknown which row of the input of {site.consumers[0]} belongs to which sample. "
                "Give the axis of the samples in find_sites(..., batch_axis=), or return the sample of each row from "
                "Task.rows."
            )
        length = x.shape[site.batch]
        # Some models split an image into windows and put the windows along the sample axis. So each sample may have
        # several neighbouring rows.
        if length % samples:
            raise GateError(
                f"{site.name}: the input of {site.consumers[0]} has {length} rows for {samples} samples. Give "
                "the axis of the samples in find_sites(..., batch_axis=), or return the sample of each row from "
                "Task.rows."
            )
        return length // samples

    def _rows(self, site: Site, x: Tensor, samples: int, rows: Tensor | None = None) -> Tensor:
        """Returns the sample of each row of a layer's input, int64 (rows,).

        Args:
            site: The site.
            x: The input of the layer.
            samples: The number of samples.
            rows: The result, if `Task.rows` has returned it already. It is only checked then.

        Raises:
            GateError: The sample of a row is unknown, or `rows` returned another number of rows.
        """
        rows = self._rows_of_task(site, x, samples) if rows is None else rows
        length = x.shape[max(site.batch, 0)]
        if rows is None:
            each = self._rows_of_each(site, x, samples)
            rows = torch.arange(length, device=x.device) // each
        if len(rows) != length:
            raise GateError(
                f"{site.name}: Task.rows returned the shape {tuple(rows.shape)}, but the input of "
                f"{site.consumers[0]} has {length} rows. Return one sample for each row."
            )
        return rows.to(x.device)

    def _rows_of_task(self, site: Site, x: Tensor, samples: int) -> Tensor | None:
        """Calls the function `rows`. Returns None if there is no such function, or if the function returns None."""
        if self.rows is None:
            return None
        arguments = (site, x, samples, self._given) if self._rows_take_given else (site, x, samples)
        found: Tensor | None = self.rows(*arguments)
        return found

    def _check_fired(self, *_: Any) -> None:
        """Raises GateError if a gate was not used in the forward pass that ends. A forward hook.

        Without this check, the units of such a gate would wrongly look useless.
        """
        for site, path in self._gated:
            if path not in self._fired:
                raise GateError(
                    f"{site.name}: the gate on {path} did not fire in this forward pass, so its units cannot be scored "
                    "or verified. Leave the site out: find_sites(..., exclude=[...])."
                )


@dataclass(frozen=True)
class _Hooks:
    """Attaches the gates of one site to a model. `UnitKind.gate` gets it, see `GateHooks`.

    Args:
        gates: The gates of all sites.
        index: The index of the site in `gates.sites`.
        model: The model that gets the hooks.
        handles: A list to which the handle of each hook is added, so that the hook can be removed.
    """

    gates: Gates
    index: int
    model: nn.Module
    handles: list[Any]

    def on_input(self, path: str, axis: int) -> None:
        """Multiplies the input of the module at `path` by the gates, along `axis`. See GateHooks.on_input."""
        if layer_path(self.model, path) != path:
            before, after = self.gates._weight(self.index, path, axis)
            owner = self.model.get_submodule(layer_path(self.model, path))
            self._add(path, owner.register_forward_pre_hook(before))
            # The parameter has to come back even if the forward fails.
            self.handles.append(owner.register_forward_hook(after, always_call=True))
            return
        hook = self.gates._gate(self.index, path, axis)
        self._add(path, self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, path: str, axis: int) -> None:
        """Multiplies the output of the module at `path` by the gates, along `axis`. See GateHooks.on_output."""
        hook = self.gates._output(self.index, path, axis)
        self._add(path, self.model.get_submodule(path).register_forward_hook(hook))

    def on_norm(self, path: str) -> None:
        """Makes the norm layer at `path` compute its statistics over the kept units. See GateHooks.on_norm."""
        hook = self.gates._norm(self.index, path)
        self._add(path, self.model.get_submodule(path).register_forward_hook(hook))

    def _add(self, path: str, handle: Any) -> None:
        """Notes one hook. `attached` removes it later, and each forward pass checks that it was used."""
        self.handles.append(handle)
        self.gates._gated.append((self.gates.sites[self.index], path))


def with_gated_classes(model: nn.Module, sites: Sequence[Site]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Changes, in place, the class of modules whose forward does not call the layer that a gate needs.

    For example, nn.MultiheadAttention passes the weight of its output projection to a function, so a hook on that layer
    never runs. The new class, `Adapter.gated`, computes the same and calls the layer.

    Args:
        model: The model. The classes of some of its modules change. Its tensors do not.
        sites: The sites whose units will be gated.

    Returns:
        (module, class that it had before) of each changed module. To undo the change, assign this class to the module.
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

    A site may have several consumers in which the units have different orders. So the order is taken from the cut of
    the layer's weight, or of another tensor of the layer. If the layer has no such cut, `Site.layout` gives the order.

    Args:
        site: The site.
        path: The path of the layer.
        features: The number of input features of the layer.

    Raises:
        GateError: The units of the site have another number of features than the layer's input.
    """
    fits = [cut for cut in site.cuts if cut.length(site.size) == features and not cut.segments]
    of_layer = [cut for cut in fits if cut.tensor in (path, f"{path}.weight")] or [
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
    """A model together with a module that computes its gates, for training gates in several processes.

    With several processes, Accelerate uses DistributedDataParallel, which wraps one module. It combines the gradients
    of this module only. So this class puts the model and the module that computes the gates into one module. Enter
    `gated.gates.attached(model)` around the forward and the backward pass.

    Args:
        model: The model.
        sites: The sites whose units are gated.
        source: The module that computes the gates. It is called with the arguments that `forward` gets after the
            inputs. It returns the gates of all sites in one tensor, of the shape (units of all sites,) or
            (samples, units of all sites).
        forward: A function that calls the model with inputs, such as `Task.forward`.
        rows: A function that finds the sample of each row of a layer's input, such as `Task.rows`. If None,
            xprune assumes that all samples have the same number of rows, and that the rows of a sample lie next to
            each other.

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
        # Gates that are learned are drawn for each sample. Where samples share a parameter, they learn one gate.
        self.gates.average = True

    def forward(self, inputs: Any, *args: Any) -> Any:
        """Returns the model's output for the inputs, with the gates that `source(*args)` computes."""
        # Autocast would round the costs that gates depend on to a few digits, and the budget would be missed.
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            gates = self.source(*args)
        self.gates.join(gates)
        return self.call(self.model, inputs)
