"""Copies models, with or without shared weights, and takes models out of wrappers such as torch.compile."""

import copy
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn

from xprune.errors import ModelError
from xprune.modules.calls import tensors_in
from xprune.modules.norms import BATCH_NORMS

_TABLES = (OrderedDict, dict, set)
"""The classes of the containers that a module holds for its hooks, parameters and names."""
EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
"""The names of the attributes that torch gives to every module."""
_FIXED = frozenset({type(None), bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType})
"""Types whose objects cannot change, so that a copy holds the same objects."""


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside torch.compile, DistributedDataParallel or DataParallel, or the model itself.

    Raises:
        ModelError: The argument is not a module, or PEFT or FSDP has wrapped its layers.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"wanted a torch.nn.Module, got {type(model).__name__}. Give the model itself.")
    if type(model).__module__.startswith("peft."):
        raise ModelError(
            f"{type(model).__name__} wraps the model's layers: call merge_and_unload() and prune what it returns."
        )
    # FSDP may wrap only some modules of a model, so every module is checked.
    if any(type(part).__module__.startswith("torch.distributed.fsdp") for part in model.modules()):
        raise ModelError("the weights are sharded by FSDP: prune the model before it is wrapped.")
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False) if _wrapped(model) else model
    return inner


def _wrapped(model: nn.Module) -> bool:
    """Returns True if the model is compiled, or wrapped to run on several devices, else False."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return is_compiled_module(model) or isinstance(model, parallel)


def shared_copy(model: nn.Module, *, requires_grad: bool | None = None, device: str | None = None) -> nn.Module:
    """Returns a copy of a model in eval mode. The parameters of the copy share the memory of the model's parameters.

    You may replace modules and parameters of the copy, and add hooks to it, without any change to the model. But do not
    write into a parameter of the copy, because that changes the model too. Buffers and cached tensors are not shared,
    because the forward of some models writes into them.

    Args:
        model: The model to copy.
        requires_grad: The value of `requires_grad` for all floating-point parameters of the copy. None means that each
            parameter keeps the value that it has in the model.
        device: The device of the copy, for example "meta". Tensors that have to move to this device share no memory.
            None means that the copy stays on the model's device.

    Raises:
        ModelError: A parameter is not initialised, or the model holds an object that cannot be copied.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> twin = shared_copy(layer)
        >>> twin is layer, twin.weight.data_ptr() == layer.weight.data_ptr()
        (False, True)
    """
    # `copy.deepcopy` does not copy an object that is in `memo`, but uses the object that `memo` holds for it. So `memo`
    # decides which tensors are shared.
    memo: dict[int, object] = {}
    for name, tensor in tensors(model).items():
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ModelError(f"{name} is not initialised: run one forward pass of the model first.")
        data = tensor.detach() if device is None else tensor.detach().to(device)
        # A tensor that was created in inference mode can never have a gradient. A clone of the tensor can.
        if data.is_inference():
            data = data.clone()
        wants = tensor.requires_grad if requires_grad is None else requires_grad
        wants = wants and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter):
            # A tied parameter occurs several times in this loop. It has to become one parameter, so it is stored only
            # the first time.
            memo.setdefault(id(tensor), nn.Parameter(data, wants))
        elif id(tensor) not in memo:
            # If a buffer has moved to another device, `data` is a copy already.
            memo[id(tensor)] = data.clone() if data.data_ptr() == tensor.data_ptr() else data
    modules = list(model.modules())
    # Many modules hold the same config. It is searched once.
    seen = set[int]()
    for module in modules:
        for name, value in vars(module).items():
            if type(value) in _FIXED or name in EVERY_MODULE_HAS or id(value) in seen:
                continue
            seen.add(id(value))
            # A forward may have stored tensors as plain attributes. They are cloned here for two reasons. deepcopy
            # refuses a tensor that is part of an autograd graph. And the next forward of the copy may write into such a
            # tensor.
            for tensor in tensors_in(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        _copy_modules(modules, memo)
        return copy.deepcopy(model, memo).eval()
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}. It holds something that has no copy, such as a lock, "
            "an open file or a generator: take it off the model, or give its class a __deepcopy__."
        ) from error


def _copy_modules(modules: list[nn.Module], memo: dict[int, object]) -> None:
    """Copies modules as deepcopy does, several times as fast, and adds the copies to `memo`.

    deepcopy needs most of its time for the numbers, names and empty containers that each module holds. Modules whose
    classes have a way of their own to be copied are left to deepcopy.

    Args:
        modules: The modules. Parents come before their children.
        memo: The memo of deepcopy. It already holds the copies of all tensors.
    """
    kinds = {kind for kind in {type(module) for module in modules} if _copied_by_default(kind)}
    plain = [module for module in modules if type(module) in kinds and "__deepcopy__" not in vars(module)]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    # Children come first, so that a parent whose class reads its children in `__setstate__` finds them complete.
    for module in reversed(plain):
        state: dict[str, Any] = {}
        for name, value in module.__getstate__().items():
            if type(value) in _FIXED:
                state[name] = value
            elif name in EVERY_MODULE_HAS and type(value) in _TABLES:
                # A module holds about a dozen tables, mostly of hooks, and nearly all of them are empty.
                state[name] = _copied_table(value, memo) if value else type(value)()
            else:
                state[name] = copy.deepcopy(value, memo)
        memo[id(module)].__setstate__(state)  # type: ignore[attr-defined]


def _copied_table(table: Any, memo: dict[int, object]) -> Any:
    """Returns a copy of a dict or set. Its keys are names or numbers. Its values are copied with `memo`."""
    if isinstance(table, set):
        return set(table)
    return type(table)((key, memo[id(v)] if id(v) in memo else copy.deepcopy(v, memo)) for key, v in table.items())


def _copied_by_default(kind: type[nn.Module]) -> bool:
    """Returns True if deepcopy copies a module of this class attribute by attribute, else False."""
    ways = ("__reduce_ex__", "__reduce__", "__getstate__")
    by_attribute = all(getattr(kind, way) is getattr(nn.Module, way) for way in ways)
    slots = any(each.__dict__.get("__slots__") for each in kind.__mro__)
    return by_attribute and not slots and not hasattr(kind, "__deepcopy__") and kind.__new__ is object.__new__


@torch.no_grad()
def with_noise(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Returns a copy of a model with noise on every vector and on every tensor whose entries are all equal.

    xprune tests models with this copy, because freshly initialised weights can hide mistakes. A layer scale or
    projection of zeros hides every error before it. If all entries of a bias or norm weight are equal, the output does
    not depend on which of them were cut. With noise, every unit changes the output. All other tensors are shared with
    the model, so the copy needs little memory.

    Args:
        model: The model. It is not changed.
        scale: The standard deviation of the noise.

    Returns:
        The copy, in eval mode. Each call adds the same noise.
    """
    copy, generator = shared_copy(model), torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        # The noise is generated on the CPU, so that it is the same for models on all devices.
        return scale * torch.randn(tensor.shape, generator=generator).to(tensor)

    for parameter in copy.parameters():
        if parameter.is_floating_point() and (parameter.dim() < 2 or _all_equal(parameter)):
            parameter.data = parameter.data + noise(parameter)
    for module in copy.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            # A variance has to stay positive, so the noise can only increase it.
            module.running_mean = module.running_mean + noise(module.running_mean)
            module.running_var = module.running_var * (1 + noise(module.running_var).abs())
    return copy


def _all_equal(tensor: Tensor) -> bool:
    """Returns True if all entries of a tensor are equal, else False. Returns False for an empty tensor."""
    # For most tensors, the first 64 entries differ already. Then the rest of a large tensor is not read.
    few = tensor.flatten()[:64]
    return bool(tensor.numel()) and bool((few == few[0]).all()) and bool((tensor == few[0]).all())


def unshare(model: nn.Module, original: nn.Module) -> nn.Module:
    """Copies every tensor of `model` that shares memory with `original`, so that the two models share nothing.

    Tied tensors stay tied.

    Args:
        model: The copy that `shared_copy` returned. It is changed.
        original: The model that it was copied from.

    Returns:
        `model`.
    """
    shared = {tensor.data_ptr() for tensor in tensors(original).values() if tensor.numel()}
    done: dict[int, Tensor] = {}
    for tensor in tensors(model).values():
        if id(tensor) not in done and tensor.numel() and tensor.data_ptr() in shared:
            done[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
    return model


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns (name, tensor) for every parameter and buffer of a module, without those of its children.

    A tied tensor occurs once for each of its names.
    """
    named = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*named, *module.named_buffers(recurse=False, remove_duplicate=False)]


def tables_of(module: nn.Module) -> list[dict[Any, Any]]:
    """Returns the dicts that every module has: of its parameters, buffers, children and hooks.

    They are the dicts themselves, not copies.
    """
    return [held for name, held in vars(module).items() if name in EVERY_MODULE_HAS and isinstance(held, dict)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer by its name. A tied tensor occurs once for each of its names."""
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def reference_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter or buffer. Returns the CPU if the model has neither."""
    return next((tensor.device for tensor in tensors(model).values()), torch.device("cpu"))


def refuse_meta(model: nn.Module) -> None:
    """Raises ModelError if the model is on the meta device, where tensors have shapes and no values."""
    if reference_device(model).type == "meta":
        raise ModelError(
            "the model is on the meta device, where tensors have no values: load its weights first, for example "
            "model.to_empty(device='cpu') and then model.load_state_dict(...)."
        )
