"""The class `Stopwatch`, which runs models on a target and measures their times."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, cast

import torch
from torch import nn

from xprune.core.target import Target
from xprune.core.times import Times
from xprune.costs.timing import interleaved
from xprune.errors import TargetError
from xprune.modules.calls import call, map_tensors, tensors_in
from xprune.modules.copies import reference_device, shared_copy, unwrap
from xprune.modules.eager import compiled
from xprune.modules.forward import error_text, try_forward
from xprune.modules.refused import RUN, refuse
from xprune.modules.samples import find_samples


class Stopwatch:
    """Runs a dense model and smaller ones on a target, on the same inputs, and measures their times in turn.

    Args:
        target: Where and how the models run. Its `table` is not used.
        model: The dense model. It is not changed.
        inputs: One batch, in the form in which the model is called. It is copied to the target.
        batch_axis: The axis of the inputs along which samples lie. It is needed only if the target has another number
            of samples than the inputs. None means that it is found.

    Attributes:
        target: The target with the values in use: none of device, dtype and threads is None. `batch` is None if the
            target did not say it and the number of samples is not known.
        inputs: The inputs on the target.

    Raises:
        TargetError: This computer does not have the device, or the model does not run there in this way.
        ModelError: The model does not run, also as the caller has it.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
        >>> small = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
        >>> watch = Stopwatch(Target(batch=256, threads=1), mlp, torch.randn(2, 64))
        >>> watch.compare(small, seconds=0.05).relative(1) < 1
        True
    """

    def __init__(self, target: Target, model: nn.Module, inputs: Any, batch_axis: int | None = None) -> None:
        model = unwrap(model)
        refuse(model, RUN)
        self._dtype = getattr(torch, target.dtype) if target.dtype else None
        self._compiled = target.compiled
        self.device = _device(target, model)
        threads = target.threads or torch.get_num_threads()
        if target.batch is not None:
            inputs = with_samples(model, inputs, target.batch, batch_axis)
        self.inputs = map_tensors(inputs, self._moved)
        weights = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = self._dtype or next(weights, torch.float32)
        self.target = Target(
            str(self.device), str(dtype).removeprefix("torch."), target.batch, target.compiled, threads
        )
        try:
            self._dense = self.ready(model)
            with self._running():
                self._dense()
        except Exception as problem:
            # If the model does not run for its owner either, this raises the error that says so.
            try_forward(model, inputs)
            raise TargetError(
                f"{type(model).__name__} does not run on the target ({target.name}): {error_text(problem)}. Give "
                "another device, dtype or batch, or leave compiled= out."
            ) from problem

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the inputs on the device, and in the dtype of the target if it holds real numbers."""
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else None)

    def ready(self, model: nn.Module) -> Callable[[], object]:
        """Returns a function without arguments that runs a model on the inputs of the target.

        Args:
            model: The model. The function runs a copy of it, which shares the weights if they are on the device.
        """
        runs = self.placed(model)
        return lambda: call(runs, self.inputs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Sets the number of threads inside a block, where no gradients are computed."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.target.threads or before)
        try:
            # What is measured is the model as it will be used, so compiled parts run as compiled.
            with torch.inference_mode(), compiled():
                yield
        finally:
            torch.set_num_threads(before)

    def times(self, functions: Sequence[Callable[[], object]], seconds: float, least_rounds: int = 5) -> Times:
        """Measures the times of functions that work on the device of the target, see `interleaved`."""
        with self._running():
            return interleaved(functions, self.device, seconds=seconds, least_rounds=least_rounds)

    def compare(self, model: nn.Module, seconds: float = 1.0, least_rounds: int = 5) -> Times:
        """Measures the times of the dense model and of another model in turn.

        Args:
            model: The other model, for example a pruned one. It takes the same inputs.
            seconds: The time of the measurement, in seconds.
            least_rounds: The smallest number of rounds.

        Returns:
            The times. The index of the dense model is 0, that of the other model 1.
        """
        return self.compare_all([model], seconds, least_rounds)

    def compare_all(self, models: Sequence[nn.Module], seconds: float = 1.0, least_rounds: int = 5) -> Times:
        """Measures the times of the dense model and of several other models in turn. The dense model is the first."""
        return self.times([self._dense, *(self.ready(model) for model in models)], seconds, least_rounds)

    def alone(self, seconds: float = 1.0, least_rounds: int = 5) -> Times:
        """Measures the times of the dense model alone."""
        return self.times([self._dense], seconds, least_rounds)

    def capture(
        self, model: nn.Module, paths: Sequence[str], *, shapes_only: bool = False
    ) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Returns the arguments that modules get in the first call within a forward pass on the target.

        Args:
            model: The dense model. It is not changed.
            paths: The paths of the modules. The path "" is the model itself.
            shapes_only: If True, the tensors of the result are on the meta device and take no memory.

        Returns:
            Path of a module -> (args, kwargs). A module that the forward does not call is missing.
        """
        copy = shared_copy(model, requires_grad=False).to(self.device, self._dtype)
        found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("meta") if shapes_only else tensor.clone()

        for path in paths:

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                # A module may write into its inputs later, so they are copied.
                found.setdefault(path, map_tensors((args, kwargs), copied))

            copy.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        # A decoder of Hugging Face keeps keys and values of each call. A module that runs alone many times would then
        # get longer and longer sequences.
        config: Any = getattr(copy, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        with self._running():
            call(copy, self.inputs)
        return found

    def placed(self, module: nn.Module) -> nn.Module:
        """Returns a copy of a module on the device and in the dtype of the target, compiled if the target says so."""
        copy = shared_copy(module, requires_grad=False).to(self.device, self._dtype)
        # torch.compile keeps the class of what it is given, but its annotation says less.
        return cast(nn.Module, torch.compile(copy)) if self._compiled else copy


def with_samples(model: nn.Module, inputs: Any, samples: int, batch_axis: int | None = None) -> Any:
    """Returns inputs with another number of samples. The samples are repeated, or the first ones are taken.

    Args:
        model: The model that takes the inputs. It is not changed.
        inputs: The inputs of some samples.
        samples: The wanted number of samples.
        batch_axis: The axis along which samples lie. None means that it is found.

    Raises:
        TargetError: The axis of the samples cannot be found, so the number cannot be changed.
    """
    if not tensors_in(inputs):
        raise TargetError("the inputs hold no tensor, so their number of samples cannot be changed: leave batch= out.")
    found = find_samples(model, inputs, batch_axis=batch_axis)
    if found is None or not found.count:
        # If the forward fails on the inputs as they are, this raises the error, which explains more.
        try_forward(model, inputs)
        raise TargetError(
            f"batch={samples}: it is unknown where the samples lie in the inputs of {type(model).__name__}, so their "
            "number cannot be changed. Leave batch= out, and give a batch of the wanted size."
        )
    if found.count == samples:
        return inputs
    return found.take(inputs, list(islice(cycle(range(found.count)), samples)))


def _device(target: Target, model: nn.Module) -> torch.device:
    """Returns the device of a target. Raises TargetError if this computer does not have it."""
    if target.device is None:
        return reference_device(model)
    try:
        device = torch.device(target.device)
        torch.empty(1, device=device)
    # torch raises an error of another class for each kind of device.
    except Exception as problem:
        raise TargetError(
            f"device={target.device!r} cannot be used here: {error_text(problem)}. Give a device that this computer "
            "has. To prune for another computer, run `xprune profile` there and give Target(table=FILE) here."
        ) from problem
    if device.type == "meta":
        raise TargetError('device="meta" has no values, so nothing runs there. Give a device that computes.')
    return device
