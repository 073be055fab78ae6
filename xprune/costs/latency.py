"""latency: measures the time of a forward pass."""

from typing import Any

import torch
from torch import nn

from xprune.modules.calls import call, map_tensors
from xprune.modules.copies import reference_device, shared_copy
from xprune.modules.eager import compiled
from xprune.modules.refused import RUN, refuse
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def latency(model: nn.Module, example_inputs: Any, seconds: float = 0.5) -> float:
    """Measures how long a forward pass takes, in eval mode and without gradients, on the model's device.

    Args:
        model: The model. It is not changed.
        example_inputs: One batch, with which the model is called: a tensor, a tuple of arguments, or a dict of keyword
            arguments. It is moved to the model's device.
        seconds: The forward pass is repeated for at least this time, in seconds.

    Returns:
        The median time of one forward pass of the whole batch, in milliseconds.

    Raises:
        ModelError: Weights of the model have no values, for example because they are on the meta device.

    Example:
        >>> latency(nn.Linear(4, 2), torch.randn(3, 4), seconds=0.01) > 0
        True
    """
    # The import is here because it searches for the compiler of CUDA. It prints a line if there is a compiler but no
    # GPU.
    from torch.utils.benchmark import Timer

    refuse(model, RUN)
    model = shared_copy(model)
    inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    # What is measured is the model as it will be used, so compiled parts run as compiled.
    with torch.inference_mode(), compiled():
        timer = Timer(
            "call(model, inputs)",
            globals={"call": call, "model": model, "inputs": inputs},
            # Without this number, a Timer uses one thread.
            num_threads=torch.get_num_threads(),
        )
        return float(timer.blocked_autorange(min_run_time=seconds).median * 1e3)
