"""Forward: one try of a model on its inputs, with an error in words where it fails."""

from typing import Any

import torch
from torch import nn

from xprune.errors import ModelError
from xprune.modules.calls import call, slow_path
from xprune.modules.copies import shared_copy


def try_forward(model: nn.Module, example_inputs: Any) -> None:
    """ModelError where the model's forward fails on the example inputs."""
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
    """The kind of an error and its message. An error may have none, or one that cannot be read."""
    try:
        message = str(error)
    except Exception:  # of somebody else's class
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
