"""Runs a model once on its inputs, to report a failure with a clear message before the real work starts."""

from typing import Any

import torch
from torch import nn

from xprune.errors import ModelError
from xprune.modules.calls import call, slow_path, tensors_in
from xprune.modules.copies import shared_copy


def try_forward(model: nn.Module, example_inputs: Any) -> None:
    """Runs a copy of the model on the example inputs. Raises ModelError with the cause if the forward fails."""
    # A copy is used because a forward may change buffers, such as the statistics of a batch norm.
    copy = shared_copy(model)
    try:
        with torch.no_grad(), slow_path():
            call(copy, example_inputs)
    except Exception as error:
        raise ModelError(
            f"the model's forward fails on the example inputs: {error_text(error)}. "
            "Give inputs as the model takes them: a tensor, a tuple of arguments, or a dict of keyword arguments."
        ) from error


SMALL = 1e10
"""A model is small if its number of weights times the number of entries of its inputs is at most this number.

The product is an upper bound of the MACs of most models.
"""


def devices_for_shapes(model: nn.Module, example_inputs: Any) -> tuple[str | None, str | None]:
    """Returns the devices on which to run a forward of which only shapes are needed, the faster one first.

    On the meta device there is no arithmetic, so a large model takes little time and no memory. But Python computes the
    shapes there, in about 0.2 ms for each operation. Small models are faster on their own device.

    Args:
        model: The model.
        example_inputs: The inputs that it is called with.

    Returns:
        ("meta", None), or (None, "meta") for a small model. None stands for the model's own device.

    Example:
        >>> devices_for_shapes(nn.Linear(4, 4), torch.zeros(2, 4))
        (None, 'meta')
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    entries = sum(tensor.numel() for tensor in tensors_in(example_inputs))
    return (None, "meta") if weights * entries <= SMALL else ("meta", None)


def error_text(error: BaseException) -> str:
    """Returns the class and the message of an error, such as "ValueError: bad shape".

    If the error has no message, it returns the class only.
    """
    try:
        message = str(error)
    # The class may come from another library, and its __str__ may fail.
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
