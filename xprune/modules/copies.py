"""Copies of a model that share its weights or own them, and the model inside its wrappers."""

import copy
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn

from xprune.errors import ModelError
from xprune.modules.calls import tensors_in
from xprune.modules.norms import BATCH_NORMS


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
    """A structural copy in eval mode whose parameters share the caller's storage.

    Buffers and cached tensors are copied: some forwards write into them. Replacing modules and parameters of the copy,
    or hooking it, leaves the caller's model alone; writing into a parameter does not.

    Args:
        model: What to copy.
        requires_grad: For all parameters of the copy. None: as they are.
        device: Where the copy is to be, for example "meta". It then shares nothing that has to move.

    Raises:
        ModelError: A parameter has no shape yet.
    """
    memo: dict[int, object] = {}
    for name, tensor in _tensors(model):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ModelError(f"{name} is not initialised: run one forward pass of the model first.")
        data = tensor.detach() if device is None else tensor.detach().to(device)
        if data.is_inference():  # of a model that was built in inference mode, whose tensors know no gradient
            data = data.clone()
        wants = tensor.requires_grad if requires_grad is None else requires_grad
        wants = wants and tensor.is_floating_point()
        if isinstance(tensor, nn.Parameter):
            memo.setdefault(id(tensor), nn.Parameter(data, wants))
        elif id(tensor) not in memo:
            memo[id(tensor)] = data.clone() if data.data_ptr() == tensor.data_ptr() else data
    for module in model.modules():
        for tensor in tensors_in(vars(module)):  # what a forward has cached may hang on a graph, and is written into
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
def stirred(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """A structural copy with noise on every vector and on every tensor of equal entries; all else is shared.

    A layer scale or a projection that starts at zero hides what stands before it, and biases and norms that are all
    alike hide in which order they are cut. With noise on these, every unit tells on the output. The large matrices
    stay as they are, so that the copy costs little memory.

    Args:
        model: The model. It is not changed.
        scale: Standard deviation of the noise.
    """
    copy, generator = alias(model), torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return scale * torch.randn(tensor.shape, generator=generator).to(tensor)

    for parameter in copy.parameters():
        if parameter.is_floating_point() and (parameter.dim() < 2 or _all_equal(parameter)):
            parameter.data = parameter.data + noise(parameter)
    for module in copy.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            module.running_mean = module.running_mean + noise(module.running_mean)
            module.running_var = module.running_var * (1 + noise(module.running_var).abs())
    return copy


def _all_equal(tensor: Tensor) -> bool:
    """True for a tensor whose entries are all the same; a look at a few of them answers for most tensors."""
    few = tensor.flatten()[:64]
    return bool(tensor.numel()) and bool((few == few[0]).all()) and bool((tensor == few[0]).all())


def own(model: nn.Module, original: nn.Module) -> nn.Module:
    """Gives every tensor of `model` that still shares storage with `original` a storage of its own; ties survive."""
    shared = {tensor.data_ptr() for _, tensor in _tensors(original) if tensor.numel()}
    done: dict[int, Tensor] = {}
    for _, tensor in _tensors(model):
        if id(tensor) not in done and tensor.numel() and tensor.data_ptr() in shared:
            done[id(tensor)] = tensor
            tensor.data = tensor.data.clone()
    return model


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer that a module holds itself, without those of its children."""
    named = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*named, *module.named_buffers(recurse=False, remove_duplicate=False)]


EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
"""Names of the attributes that torch gives to every module."""


def tables_of(module: nn.Module) -> list[dict[Any, Any]]:
    """The dictionaries that torch gives to every module: of parameters, of buffers, of children, and of hooks."""
    return [held for name, held in vars(module).items() if name in EVERY_MODULE_HAS and isinstance(held, dict)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return dict(_tensors(model))


def reference_device(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    return next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))


def refuse_meta(model: nn.Module) -> None:
    """ModelError for a model on the meta device, which has shapes and no values."""
    if reference_device(model).type == "meta":
        raise ModelError(
            "the model is on the meta device, where tensors have no values: load its weights first, for example "
            "model.to_empty(device='cpu') and then model.load_state_dict(...)."
        )
