"""The caller's world: random numbers and torch's switches, put back as they were, whatever happens in between."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of every global source of random numbers: Python's, numpy's, torch's, and the accelerators'."""

    python: Any
    numpy: Any
    torch: Tensor
    devices: Any

    @staticmethod
    def taken(devices: bool = True) -> "RandomState":
        """The state now.

        Args:
            devices: Take the accelerators' state too, which starts them up where nothing has used them yet.
        """
        module = _devices() if devices else None
        found = None
        if module is not None:
            found = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), found)

    def put_back(self) -> None:
        """Makes this the state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        module = _devices()
        if self.devices is not None and module is not None:
            every = hasattr(module, "set_rng_state_all")
            (module.set_rng_state_all if every else module.set_rng_state)(self.devices)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds every global source of random numbers, and puts their states back at the end."""
    before = RandomState.taken()
    seed_all(seed)
    try:
        yield
    finally:
        before.put_back()


def seed_all(seed: int) -> None:
    """Seeds Python, numpy, torch and the accelerators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs a block with torch's usual settings, and leaves the caller's as they were. Also a decorator.

    Inside, gradients are on, inference mode is off, new tensors are float32 on the CPU. At the end, also after an
    exception, the caller's own settings and all states of random numbers are back.
    """
    before, dtype = RandomState.taken(devices=_started()), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(before.put_back)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@cache
def _devices() -> Any:
    """The module of the accelerators, as `torch.cuda`; None without any."""
    return torch.get_device_module() if torch.accelerator.is_available() else None


def _started() -> bool:
    """Whether something has used the accelerators already; what nothing has used, nothing has drawn from."""
    module = _devices()
    return module is not None and bool(getattr(module, "is_initialized", lambda: True)())
