"""Copies of a model, with the weights of the model or with weights of their own, and the model inside its wrappers."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn

from xprune.errors import ModelError
from xprune.modules.calls import tensors_in
from xprune.modules.norms import BATCH_NORMS

_TABLES = (OrderedDict, dict, set)
"""The classes of the tables that a module holds: of hooks, of parameters, of names."""


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside torch.compile, DistributedDataParallel or DataParallel, or the model itself.

    Raises:
        ModelError: The argument is not a module, or its layers are wrapped by PEFT or FSDP.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"wanted a torch.nn.Module, got {type(model).__name__}. Give the model itself.")
    if type(model).__module__.startswith("peft."):
        raise ModelError(
            f"{type(model).__name__} wraps the model's layers: call merge_and_unload() and prune what it returns."
        )
    # FSDP may wrap parts of a model only, so every part is looked at.
    if any(type(part).__module__.startswith("torch.distributed.fsdp") for part in model.modules()):
        raise ModelError("the weights are sharded by FSDP: prune the model before it is wrapped.")
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False) if _wrapped(model) else model
    return inner


def _wrapped(model: nn.Module) -> bool:
    """Returns True if the model is compiled, or wrapped to run on several devices."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return is_compiled_module(model) or isinstance(model, parallel)


def shared_copy(model: nn.Module, *, requires_grad: bool | None = None, device: str | None = None) -> nn.Module:
    """Returns a copy of the modules, in eval mode, whose parameters share the memory of the model's.

    You may replace modules and parameters of the copy, and add hooks to it: the model does not change. Do not write
    into a parameter of the copy: it changes the model too. Buffers and cached tensors are real copies, since some
    forwards write into them.

    Args:
        model: The model to copy.
        requires_grad: For all floating-point parameters of the copy. None: as in the model.
        device: Device of the copy, for example "meta". Tensors that have to move share no memory. None: the model's.

    Raises:
        ModelError: A parameter is not initialised, or the model holds something that cannot be copied.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> twin = shared_copy(layer)
        >>> twin is layer, twin.weight.data_ptr() == layer.weight.data_ptr()
        (False, True)
    """
    # `copy.deepcopy` takes an object that it finds in the memo, and copies all others. So tensors are entered by hand.
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ModelError(f"{name} is not initialised: run one forward pass of the model first.")
        data = tensor.detach() if device is None else tensor.detach().to(device)
        # Tensors of a model that was built in inference mode never get gradients. A clone does.
        if data.is_inference():
            data = data.clone()
        wants = tensor.requires_grad if requires_grad is None else requires_grad
        wants = wants and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter):
            # A tied parameter comes once under each of its names. It has to stay one parameter.
            memo.setdefault(id(tensor), nn.Parameter(data, wants))
        elif id(tensor) not in memo:
            # A buffer that moved to another device is a copy already.
            memo[id(tensor)] = data.clone() if data.data_ptr() == tensor.data_ptr() else data
    for module in model.modules():
        for value in vars(module).values():
            # A module holds a dozen empty tables, mostly of hooks. deepcopy takes longer for these than for the rest.
            if type(value) in _TABLES and not value:
                memo[id(value)] = type(value)()
                continue
            # A forward may have cached tensors as plain attributes. They may belong to a graph, which deepcopy refuses,
            # and the next forward may write into them.
            for tensor in tensors_in(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo).eval()
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}. It holds something that has no copy, such as a lock, "
            "an open file or a generator: take it off the model, or give its class a __deepcopy__."
        ) from error


@torch.no_grad()
def with_noise(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Returns a copy of a model with noise on every vector and on every tensor of equal entries.

    Fresh weights hide mistakes. A layer scale or projection that is zero hides everything before it. Biases and norms
    whose entries are all equal hide which of them were cut. With noise on these, every unit changes the output. All
    other tensors are shared with the model, so the copy needs little memory.

    Args:
        model: The model. It is not changed.
        scale: Standard deviation of the noise.

    Returns:
        The copy, in eval mode. The noise is the same at each call.
    """
    copy, generator = shared_copy(model), torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        # Drawn on the CPU, so that every device gets the same noise.
        return scale * torch.randn(tensor.shape, generator=generator).to(tensor)

    for parameter in copy.parameters():
        if parameter.is_floating_point() and (parameter.dim() < 2 or _all_equal(parameter)):
            parameter.data = parameter.data + noise(parameter)
    for module in copy.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            # A variance has to stay positive.
            module.running_mean = module.running_mean + noise(module.running_mean)
            module.running_var = module.running_var * (1 + noise(module.running_var).abs())
    return copy


def _all_equal(tensor: Tensor) -> bool:
    """Returns True if all entries of a tensor are the same. False for an empty tensor."""
    # A few entries answer for most tensors, without reading all of a large one.
    few = tensor.flatten()[:64]
    return bool(tensor.numel()) and bool((few == few[0]).all()) and bool((tensor == few[0]).all())


def unshare(model: nn.Module, original: nn.Module) -> nn.Module:
    """Gives `model` its own memory for every tensor that it still shares with `original`.

    Tied tensors stay tied.

    Args:
        model: The model, which is changed.
        original: The model that it was copied from, see `shared_copy`.

    Returns:
        The same model.
    """
    shared = {tensor.data_ptr() for _, tensor in _tensors(original) if tensor.numel()}
    done: dict[int, Tensor] = {}
    for _, tensor in _tensors(model):
        if id(tensor) not in done and tensor.numel() and tensor.data_ptr() in shared:
            done[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
    return model


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns (name, tensor) of every parameter and buffer. A tied tensor comes once under each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns (name, tensor) of each parameter and buffer of a module, without those of its children.

    A tied tensor comes once under each of its names.
    """
    named = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*named, *module.named_buffers(recurse=False, remove_duplicate=False)]


EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
"""Names of the attributes that torch gives to every module."""


def tables_of(module: nn.Module) -> list[dict[Any, Any]]:
    """Returns the dictionaries that every module has: of its parameters, buffers, children and hooks.

    They are the dictionaries themselves, not copies.
    """
    return [held for name, held in vars(module).items() if name in EVERY_MODULE_HAS and isinstance(held, dict)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer by name. A tied tensor comes once under each of its names."""
    return dict(_tensors(model))


def reference_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's first tensor. The CPU for a model without tensors."""
    return next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))


def refuse_meta(model: nn.Module) -> None:
    """Raises ModelError if the model is on the meta device, where tensors have shapes and no values."""
    if reference_device(model).type == "meta":
        raise ModelError(
            "the model is on the meta device, where tensors have no values: load its weights first, for example "
            "model.to_empty(device='cpu') and then model.load_state_dict(...)."
        )
