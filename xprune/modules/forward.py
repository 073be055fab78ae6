"""Runs a model once on its inputs, to report a failure with a clear message before the real work starts."""

from typing import Any

import torch
from torch import nn

from xprune.errors import ModelError
from xprune.modules.calls import call, slow_path
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
