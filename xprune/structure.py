"""Structure: a model's tensors and attributes by path, and copies of it that share its weights."""

import copy
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn

from xprune.errors import ModelError
from xprune.nest import tensors_in


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


def part_at(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path, None for nothing or for no path."""
    found: Any = module if path else None
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path; AttributeError where there is none."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{path} is no tensor")
    return tensor


def attribute_at(model: nn.Module, path: str) -> int:
    """The whole number at a dotted path, that of a tuple at its index; AttributeError where there is none."""
    module, name, index = count_at(model, path)
    value = getattr(module, name)
    if index is not None:
        value = value[index] if isinstance(value, tuple) and index < len(value) else None
    if type(value) is not int:
        raise AttributeError(f"{path} is no whole number")
    return value


def count_at(model: nn.Module, path: str) -> tuple[nn.Module, str, int | None]:
    """(module, attribute, index in it): "rel_pos.bias_shape.2" is the third number of a tuple."""
    owner, _, name = path.rpartition(".")
    index = int(name) if name.isdigit() else None
    if index is not None:
        owner, _, name = owner.rpartition(".")
    return model.get_submodule(owner), name, index


def set_attribute(model: nn.Module, path: str, count: int) -> nn.Module:
    """Sets the whole number at a dotted path, that of a tuple at its index; the module that holds it."""
    module, name, index = count_at(model, path)
    old: Any = getattr(module, name)
    setattr(module, name, count if index is None else (*old[:index], count, *old[index + 1 :]))
    return module


def is_linear(module: nn.Module) -> bool:
    """True for a linear layer: torch's, or one that calls its features channels, as PyG's own does."""
    weight = getattr(module, "weight", None)
    named = hasattr(module, "in_channels") and hasattr(module, "out_channels")
    return isinstance(module, nn.Linear) or (named and isinstance(weight, Tensor) and weight.dim() == 2)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    return dict(_tensors(model))


def reference_device(model: nn.Module) -> torch.device:
    """The device of the model's first tensor."""
    return next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))
