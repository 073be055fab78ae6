"""latency: times a forward pass."""

from typing import Any

import torch
from torch import nn

from xprune.modules.calls import call, map_tensors
from xprune.modules.copies import reference_device, shared_copy
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def latency(model: nn.Module, example_inputs: Any, seconds: float = 0.5) -> float:
    """Measures how long a forward pass takes, in eval mode and without gradients, on the model's device.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs to time, a whole batch: a tensor, a tuple of arguments, or a dict of keyword
            arguments. They are moved to the model's device.
        seconds: How long to repeat the forward pass, in seconds.

    Returns:
        The median time of one forward pass of the whole batch, in milliseconds.

    Example:
        >>> latency(nn.Linear(4, 2), torch.randn(3, 4), seconds=0.01) > 0
        True
    """
    # This import looks for CUDA's compiler, and prints a line if there is a compiler but no GPU.
    from torch.utils.benchmark import Timer

    model = shared_copy(model)
    inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    with torch.inference_mode():
        timer = Timer(
            "call(model, inputs)",
            globals={"call": call, "model": model, "inputs": inputs},
            num_threads=torch.get_num_threads(),  # a Timer uses one thread unless it is given a number
        )
        return float(timer.blocked_autorange(min_run_time=seconds).median * 1e3)
