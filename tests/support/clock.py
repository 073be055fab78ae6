"""A clock that shows the same time on every computer: it counts operations instead of seconds."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from xprune.core.times import Times

MS_PER_FLOP = 1e-5
MS_PER_CALL = 1e-3


class _Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def milliseconds(function, power=1.0):
    """The time of a function: one part for the floating-point operations, one for the number of operations.

    With a power below 1, large models gain less from each unit than the sum of their modules, so a table is wrong.
    """
    # The mode that counts floating-point operations sees none in inference mode.
    with torch.inference_mode(False), torch.no_grad(), _Calls() as calls, FlopCounterMode(display=False) as flops:
        function()
    return (flops.get_total_flops() * MS_PER_FLOP + calls.count * MS_PER_CALL) ** power


def counted(power=1.0):
    """A function like `interleaved`, with this clock."""

    def interleaved(functions, device, **settings):
        return Times((tuple(milliseconds(function, power) for function in functions),))

    return interleaved


@pytest.fixture
def clock():
    """Replaces the clock. The fixture is a function of the power of the clock."""
    with mock.patch("xprune.costs.stopwatch.interleaved", counted()):
        yield lambda power: mock.patch("xprune.costs.stopwatch.interleaved", counted(power))
