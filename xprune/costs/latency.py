"""Latency: how long a forward pass takes."""

from typing import Any

import torch
from torch import nn

from xprune.modules.calls import call, map_tensors
from xprune.modules.copies import alias, reference_device
from xprune.modules.undisturbed import undisturbed


@undisturbed()
def latency(model: nn.Module, example_inputs: Any, seconds: float = 0.5) -> float:
    """Median milliseconds of a forward pass on the example inputs, on the model's device, eval mode."""
    # Its import looks for CUDA's compiler, and prints a line where there is one and no GPU.
    from torch.utils.benchmark import Timer

    model = alias(model)
    inputs = map_tensors(example_inputs, lambda t: t.to(reference_device(model)))
    with torch.inference_mode():
        timer = Timer(
            "call(model, inputs)",
            globals={"call": call, "model": model, "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        return float(timer.blocked_autorange(min_run_time=seconds).median * 1e3)
