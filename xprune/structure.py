"""Structure: copies that share weights, and carving units out of them. Needs neither data nor a trace."""

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xprune.errors import ModelError, PlanError
from xprune.interfaces import Adapter
from xprune.nest import tensors_in
from xprune.plan import Plan
from xprune.site import Site


class Removed(nn.Module):
    """What is left of an attention or MLP whose units all went: the bias of its last layer, for every token."""

    bias: nn.Parameter | None

    def __init__(self, layer: Any, module: nn.Module | None = None) -> None:
        super().__init__()
        self.out_features = int(layer.weight.shape[0]) if layer.bias is None else len(layer.bias)
        self.axis = -1 if layer.weight.dim() == 2 else 1  # a linear layer, or a convolution
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(batch, ..., features) to (batch, ..., out_features); whatever else an attention takes is ignored."""
        shape = list(x.shape)
        shape[self.axis] = self.out_features
        if self.bias is None:
            return x.new_zeros(shape)
        return (self.bias if self.axis == -1 else self.bias[:, None, None]).to(x.dtype).expand(shape)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and DataParallel.

    Raises ModelError for a PEFT model, whose adapters have to be merged first, and for what is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"wanted a torch.nn.Module, got {type(model).__name__}.")
    if type(model).__module__.startswith("peft."):
        raise ModelError(
            f"{type(model).__name__} wraps the model's layers: call merge_and_unload() and prune what it returns."
        )
    if any(type(part).__module__.startswith("torch.distributed.fsdp") for part in model.modules()):
        raise ModelError("the weights are sharded by FSDP: prune the model before it is wrapped.")
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False) if _wrapped(model) else model
    return inner


def _wrapped(model: nn.Module) -> bool:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return is_compiled_module(model) or isinstance(model, parallel)


def alias(model: nn.Module, *, requires_grad: bool | None = None, device: str | None = None) -> nn.Module:
    """A structural copy in eval mode whose tensors share the caller's storage (on `device`, e.g. "meta": new ones).

    Replacing modules and parameters of the copy, or hooking it, leaves the caller's model alone; writing into a
    tensor does not.
    """
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ModelError(f"{name} is not initialised: run one forward pass of the model first.")
        data = tensor.detach() if device is None else tensor.detach().to(device)
        wants = tensor.requires_grad if requires_grad is None else requires_grad
        wants = wants and tensor.is_floating_point()
        memo.setdefault(id(tensor), nn.Parameter(data, wants) if isinstance(tensor, nn.Parameter) else data)
    for module in model.modules():
        for tensor in tensors_in(vars(module)):  # what a forward has cached may hang on a graph
            memo.setdefault(id(tensor), tensor.detach())
    return copy.deepcopy(model, memo).eval()


def own(model: nn.Module, original: nn.Module) -> nn.Module:
    """Gives every tensor of `model` that still shares storage with `original` a storage of its own; ties survive."""
    shared = {tensor.data_ptr() for _, tensor in _tensors(original) if tensor.numel()}
    done: dict[int, Tensor] = {}
    for _, tensor in _tensors(model):
        if id(tensor) not in done and tensor.numel() and tensor.data_ptr() in shared:
            done[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
    return model


def carve(model: nn.Module, plan: Plan, adapters: Mapping[str, Adapter]) -> nn.Module:
    """Carries the plan out on `model` in place: cuts tensors, sets counts, replaces what is wholly gone.

    Raises PlanError where the plan does not fit the model; the model is then only partly carved, so carve a copy.
    """
    owners = _owners(model)
    pairs = zip(plan.sites, plan.keeps, strict=True)
    for site, keep in sorted(pairs, key=lambda pair: pair[0].kind != "channel"):  # of modules that then go as a whole
        check_fit(model, site, adapters)
        empties = bool(site.adapter) and adapters[site.adapter].empties
        if not keep and not empties:
            left = adapters[site.adapter].removed if site.adapter else None
            parts = model.get_submodule(site.layer), model.get_submodule(site.module)
            parent, _, child = site.module.rpartition(".")
            setattr(model.get_submodule(parent), child, (left or Removed)(*parts))
        elif len(keep) < site.size:
            counts = {path: attribute_at(model, path) for path in site.counts}
            _cut(model, site, keep, owners)
            _recount(model, {path: count * len(keep) // site.size for path, count in counts.items()})
            for adapter, path in _resized(model, site, adapters):
                adapter.resize(model.get_submodule(path), site, keep)
    return model


def _resized(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> list[tuple[Adapter, str]]:
    """The adapters of the modules that have lost units or channels, with the modules' paths."""
    if site.adapter:
        return [(adapters[site.adapter], site.owner)]
    touched = dict.fromkeys(prefix for cut in site.cuts for prefix in _prefixes(cut.tensor))
    found = []
    for path in touched if site.kind == "channel" else ():
        module = model.get_submodule(path)
        ours = (a for a in adapters.values() if a.serves(module) and a.along_stream(path, module) is not None)
        found += [(adapter, path) for adapter in islice(ours, 1)]
    return found


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def check_fit(model: nn.Module, site: Site, adapters: Mapping[str, Adapter]) -> None:
    """PlanError where the site's modules or tensors are not in the model, or have other shapes."""
    if site.adapter and site.adapter not in adapters:
        raise PlanError(f"{site.name}: no adapter {site.adapter!r} here; known: {', '.join(adapters)}.")
    try:
        for path in (*site.feeds, site.module, *site.norms):
            model.get_submodule(path)
        tensors = [tensor_at(model, cut.tensor) for cut in site.cuts]
        uneven = [path for path in site.counts if attribute_at(model, path) % site.size]
        if uneven:
            raise AttributeError(f"{uneven[0]} is {attribute_at(model, uneven[0])}, no multiple of {site.size}")
        if site.adapter and not adapters[site.adapter].serves(model.get_submodule(site.owner)):
            raise AttributeError(f"{site.owner} is a {type(model.get_submodule(site.owner)).__name__}")
    except AttributeError as error:
        raise PlanError(f"{site.name}: the plan does not fit this model: {error}.") from error
    for cut, tensor in zip(site.cuts, tensors, strict=True):
        wanted = cut.groups * site.size * cut.width
        if cut.axis >= tensor.dim() or tensor.shape[cut.axis] != wanted:
            raise PlanError(
                f"{site.name}: the plan does not fit this model: {cut.tensor} is {tuple(tensor.shape)}, "
                f"the plan wants {wanted} along axis {cut.axis}."
            )


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path; AttributeError where there is none."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is no tensor")
    return tensor


def attribute_at(model: nn.Module, path: str) -> int:
    """The whole number at a dotted path, that of a tuple at its index; AttributeError where there is none."""
    module, name, index = _count_at(model, path)
    value = getattr(module, name)
    if index is not None:
        value = value[index] if isinstance(value, tuple) and index < len(value) else None
    if type(value) is not int:
        raise AttributeError(f"{path} is no whole number")
    return value


def _count_at(model: nn.Module, path: str) -> tuple[nn.Module, str, int | None]:
    """(module, attribute, index in it): "rel_pos.bias_shape.2" is the third number of a tuple."""
    owner, _, name = path.rpartition(".")
    index = int(name) if name.isdigit() else None
    if index is not None:
        owner, _, name = owner.rpartition(".")
    return model.get_submodule(owner), name, index


def _cut(model: nn.Module, site: Site, keep: tuple[int, ...], owners: dict[int, list[tuple[nn.Module, str]]]) -> None:
    for cut in site.cuts:
        old = tensor_at(model, cut.tensor)
        new = old.detach().index_select(cut.axis, cut.index(keep, site.size).to(old.device))
        value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        places = owners.pop(id(old))
        for module, name in places:  # a tied tensor has several owners and stays tied
            setattr(module, name, value)
            _sync(module)
        owners[id(value)] = places
    for path in site.norms:
        norm: Any = model.get_submodule(path)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (norm.normalized_shape[0] * len(keep) // site.size,)
        elif isinstance(norm, nn.GroupNorm):
            norm.num_channels = norm.num_channels * len(keep) // site.size


def _recount(model: nn.Module, counts: Mapping[str, int]) -> None:
    for path, count in counts.items():
        module, name, index = _count_at(model, path)
        value: Any = count
        if index is not None:
            old = getattr(module, name)
            value = (*old[:index], count, *old[index + 1 :])
        setattr(module, name, value)
        _sync(module)


def is_linear(module: nn.Module) -> bool:
    """True for a linear layer: torch's, or one that calls its features channels, as PyG's own does."""
    weight = getattr(module, "weight", None)
    named = hasattr(module, "in_channels") and hasattr(module, "out_channels")
    return isinstance(module, nn.Linear) or (named and isinstance(weight, Tensor) and weight.dim() == 2)


def _sync(module: Any) -> None:
    """Sets the counts that a layer keeps beside its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        if module.groups > 1:  # whole groups go, with their inputs: all of depthwise convolutions, heads of others
            module.groups = module.groups * module.weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = (
            module.weight.shape[0],
            module.weight.shape[1] * module.groups,
        )
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif is_linear(module):
        module.out_channels, module.in_channels = tensor_at(module, "weight").shape
    elif isinstance(module, _BatchNorm):
        module.num_features = len(tensor_at(module, "weight" if module.affine else "running_mean"))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, name))
    return owners


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return dict(_tensors(model))


def reference_device(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    return next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))
