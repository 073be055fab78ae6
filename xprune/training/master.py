"""Float32 master weights: half-precision models are trained in float32, and get their dtypes back afterwards.

bfloat16 has 8 bits for the digits of a number. An update of less than about 0.4 % of a weight is rounded away, so with
usual learning rates most weights would never move. float16 has more digits, but gradients and the squares that AdamW
keeps overflow or become 0. So each half-precision tensor is converted to float32 before the training. Small updates
then add up in float32. After the last step, each tensor is rounded to the dtype that it had.

Memory: a trained weight takes 16 bytes during the training: 4 for the weight, 4 for its gradient and 8 for AdamW. In
half precision it would take half as much.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from xprune.errors import TrainingError
from xprune.modules.calls import map_tensors
from xprune.modules.copies import tensors

HALF = (torch.float16, torch.bfloat16)
"""The dtypes that are converted to float32. Tensors of other dtypes, such as integers, stay as they are."""

Dtypes = Mapping[str, torch.dtype]
"""Name of a tensor -> the dtype that it had before it was converted."""


def half_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Returns the dtype of each half-precision parameter and buffer of a model, by name."""
    return {name: tensor.dtype for name, tensor in tensors(model).items() if tensor.dtype in HALF}


def widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Converts the half-precision parameters and buffers of a model to float32. The model is changed.

    Tied tensors stay tied.

    Args:
        model: A model that shares no tensor with the caller's model, or whose tensors may be replaced.

    Returns:
        The dtypes that `narrow` needs to convert the tensors back. It is empty if the model has no half precision.

    Example:
        >>> layer = nn.Linear(2, 2).to(torch.bfloat16)
        >>> dtypes = widen(layer)
        >>> layer.weight.dtype, narrow(layer, dtypes).weight.dtype
        (torch.float32, torch.bfloat16)
    """
    dtypes = half_dtypes(model)
    named = tensors(model)
    for name in dtypes:
        # A tied tensor occurs several times. It is converted at its first name.
        if named[name].dtype in HALF:
            named[name].data = named[name].data.float()
    return dtypes


def narrow(model: nn.Module, dtypes: Dtypes) -> nn.Module:
    """Converts the tensors of a model back to the dtypes that `widen` returned. The model is changed.

    Args:
        model: The trained model.
        dtypes: The dtypes by the names of the tensors. Names that the model does not have are skipped.

    Returns:
        `model`.

    Raises:
        TrainingError: A trained weight is too large for its dtype.
    """
    named = tensors(model)
    for name, dtype in dtypes.items():
        tensor = named.get(name)
        if tensor is None or tensor.dtype == dtype:
            continue
        narrowed = tensor.data.to(dtype)
        if not bool(torch.isfinite(narrowed).all()) and bool(torch.isfinite(tensor.data).all()):
            raise TrainingError(
                f"{name} was trained to values up to {float(tensor.data.abs().max()):g}, which {dtype} cannot hold. "
                "Lower lr, or give the model in float32 or bfloat16."
            )
        tensor.data = narrowed
    return model


def widened(inputs: Any) -> Any:
    """Returns the inputs of a model with all half-precision tensors converted to float32."""
    return map_tensors(inputs, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)


def precision_for(dtypes: Dtypes, wanted: str | None, device: torch.device) -> str | None:
    """Returns the precision of the forward pass for a model that was widened, as Accelerate names it.

    A bfloat16 model computes its products in bfloat16, as before. A float16 model computes them in float16 on a GPU.
    On the CPU, it computes in float32, because Accelerate offers float16 on accelerators only.

    Args:
        dtypes: The dtypes that the tensors had.
        wanted: The precision that the caller asks for. It is used if it is not None.
        device: The device of the training.
    """
    # `accelerate launch` sets this variable, so its setting counts as one of the caller.
    if wanted is not None or not dtypes or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return wanted
    if torch.bfloat16 in dtypes.values():
        return "bf16"
    return "fp16" if device.type != "cpu" else None


def in_float32(model: nn.Module) -> RemovableHandle:
    """Makes a widened model accept half-precision inputs: they are converted to float32 in each call.

    Returns:
        The handle of the hook that converts the inputs.
    """
    return model.register_forward_pre_hook(_widened_arguments, with_kwargs=True, prepend=True)


def _widened_arguments(_model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Converts the arguments of a call to float32. A forward pre-hook."""
    return widened(args), widened(kwargs)
