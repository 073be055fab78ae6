"""Checks that a public function leaves the caller's model, loader, settings and random state unchanged."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch import nn

from xprune.testing import assert_untouched, snapshot

# Name -> a function that reads a global setting of torch, numpy or Python.
SWITCHES = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "gradients on": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "only warns": torch.is_deterministic_algorithms_warn_only_enabled,
    "cudnn deterministic": lambda: torch.backends.cudnn.deterministic,
    "cudnn benchmark": lambda: torch.backends.cudnn.benchmark,
    "precision of products": torch.get_float32_matmul_precision,
    "TF32 in products": lambda: torch.backends.cuda.matmul.allow_tf32,
    "TF32 in convolutions": lambda: torch.backends.cudnn.allow_tf32,
    "fast path of attention": torch.backends.mha.get_fastpath_enabled,
    "autocast on CPUs": lambda: torch.is_autocast_enabled("cpu"),
    "threads": torch.get_num_threads,
    "Python's random state": random.getstate,
    "numpy's random state": lambda: tuple(map(str, np.random.get_state())),
    "torch's random state": lambda: tuple(torch.get_rng_state().tolist()),
}


class World:
    """The state of a caller: a model with gradients, a loader, an Accelerator and global settings.

    It is noted when the object is made. `assert_as_before` compares it with the state at that moment.
    """

    def __init__(self, model: nn.Module, loader: Any) -> None:
        self.model, self.loader = model, loader
        self.accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.before = self._now()

    def _now(self) -> dict[str, Any]:
        """Returns the whole state as plain values and copies."""
        sampler = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        return {
            **{name: read() for name, read in SWITCHES.items()},
            "Accelerate's precision": self.accelerator.mixed_precision,
            "Accelerate's accumulation": self.accelerator.gradient_accumulation_steps,
            "Accelerate's processes": dict(PartialState().__dict__),
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()},
            "model": snapshot(self.model),
            "hooks": {n: _hooks(module) for n, module in self.model.named_modules()},
            "the loader's sampler": id(sampler),
            "its generator": _state(getattr(sampler, "generator", None)),
            "the loader's generator": _state(getattr(self.loader, "generator", None)),
        }

    def assert_as_before(self) -> None:
        """Raises AssertionError with the name of the first thing that has changed."""
        now = self._now()
        assert_untouched(self.model, self.before["model"])
        for name, value in self.before.items():
            if name == "gradients":
                for key, grad in value.items():
                    assert torch.equal(now[name][key], grad), f"the gradient of {key} has changed"
            elif name != "model":
                assert now[name] == value, f"{name} has changed"


def _hooks(module: nn.Module) -> dict[str, int]:
    """Returns the number of hooks of each kind."""
    return {name: len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks is not None}


def _state(generator: Any) -> Any:
    """Returns the state of a generator, or None if there is no generator."""
    return tuple(generator.get_state().tolist()) if isinstance(generator, torch.Generator) else None
