"""What Captum's methods share: attributions of each sample, their mean over samples and over each class."""

import inspect
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from rich import get_console
from torch import Tensor

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.errors import DataError, PluginError
from xprune.modules.calls import lengths, pick_samples
from xprune.modules.undisturbed import seeded
from xprune.training.runtime import accelerator, batches, prepared, reduced

OURS = ("return_convergence_delta", "return_input_shape", "show_progress", "attribute_to_layer_input")
"""Arguments of Captum's that are not settings: they say how the answer is wrapped."""


def settings(function: Callable[..., Any]) -> Mapping[str, Any]:
    """name -> default of the arguments of a Captum method that are plain values, and so settings of the criterion."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if type(p.default) in (int, float, str, bool) and p.name not in OURS}


@dataclass(frozen=True)
class CaptumMethod(Criterion):
    """A Captum class as a criterion. Its plain arguments are fields beside these:

    batches   batches of the loader that are looked at, None: all
    """

    batches: int | None = None
    attribution: ClassVar[type[Any]]
    complete: ClassVar[bool] = False
    """True where the attributions of a sample sum to what all units add, as far as the method's steps go."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            optional = field.name in ("batches", "groups")
            fits = type(value) is wanted or (wanted is float and type(value) is int) or (optional and value is None)
            if not (fits or (optional and type(value) is int)):
                raise PluginError(f"{self.name}: {field.name}={value!r}, wanted a {wanted.__name__}.")
            if (type(value) is int and value < 1) or (field.name == "baseline" and not 0 <= value < 1):
                raise PluginError(
                    f"{self.name}: {field.name}={value!r}; numbers of things are at least 1, baseline lies in [0, 1)."
                )

    @abstractmethod
    def attributions(self, batch: "Batch", sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """(attributions (samples, units of all sites), completeness error (samples,))."""

    def passes(self, sites: Sequence[Site]) -> int:
        """Forward passes over a batch, of a method whose cost is worth saying before it starts; 0 for others."""
        return 0

    def given(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The settings that a function of the Captum class takes."""
        return {name: getattr(self, name) for name in settings(function)}

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Mean attribution per unit, over all samples and processes; class-wise by the samples' classes."""
        start, runner = time.perf_counter(), accelerator()
        sizes = [site.size for site in sites]
        table: Tensor | None = None  # (classes, units + 2): sums of attributions and of the error, samples
        loader, passes = prepared(runner, context.data(self.name)), self.passes(sites)
        with seeded(context.seed):
            for inputs, targets in batches(runner, loader, context.task, f"scoring ({self.name})", self.batches):
                batch = Batch(context, inputs, targets)
                if table is None and passes and runner.is_main_process:
                    self._announce(passes, batch.seconds, context)
                found, error = self._attributed(batch, sites)
                columns = torch.cat([found.float(), error[:, None].float(), torch.ones_like(error[:, None])], dim=1)
                table = torch.zeros(batch.count, columns.shape[1], device=runner.device) if table is None else table
                table.index_add_(0, batch.classes, columns.detach())
        assert table is not None  # the loader was checked
        table = reduced(runner, table).cpu()
        total = table.sum(0)
        values = (total[:-2] / total[-1]).split(sizes)
        for site, value in zip(sites, values, strict=True):
            if site.size > 1 and not bool(value.std() > 0):
                raise PluginError(
                    f"{self.name} gives every unit of {site.name} the same score, so that it orders none of them; "
                    "more samples (n_samples, batches) may help, or another method."
                )
        classwise = (table[:, :-2] / table[:, -1:]).split(sizes, dim=1)
        info: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "samples": int(total[-1])
        }
        if self.complete:
            info["completeness_error"] = float(total[-2] / total[-1])
        info["seconds"] = time.perf_counter() - start
        return Scores(tuple(sites), tuple(values), self.name, tuple(classwise), info, "loss")

    def _attributed(self, batch: "Batch", sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        try:
            with warnings.catch_warnings():
                # Captum's own warnings say that it does what is wanted here, such as to attribute many samples at
                # once, or that the method is slow, which `_announce` says before it starts. The model's still show.
                warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
                return self.attributions(batch, sites)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, TypeError, NotImplementedError, RuntimeError) as failure:
            raise PluginError(
                f"{self.name} cannot run on this model, Captum says: {failure} "
                "Others do: captum:InputXGradient, captum:IntegratedGradients."
            ) from failure

    def _announce(self, passes: int, seconds: float, context: Context) -> None:
        loader = context.data(self.name)
        total = len(loader) if isinstance(loader, Sized) else None
        count = min(total, self.batches) if total and self.batches else total or self.batches
        time_ = (
            f"{count} batches: about {passes * seconds * count:.0f} s" if count else f"{passes * seconds:.1f} s each"
        )
        get_console().print(f"{self.name}: {passes} forward passes a batch, {time_}", highlight=False)


class Batch:
    """A batch at hand, and the log probabilities of the classes that the model gives its samples."""

    def __init__(self, context: Context, inputs: Any, targets: Any) -> None:
        self.context, self.task, self.inputs, self.targets = context, context.task, inputs, targets
        start = time.perf_counter()
        with torch.no_grad():
            outputs = self.task.forward(context.model, inputs)
        self.seconds = time.perf_counter() - start
        self.task.check(outputs, targets)
        found = self.task.classes(outputs, targets)
        if found is None:
            raise DataError(f"{type(self.task).__name__} has no classes to attribute to: implement Task.classes.")
        self.classes, self.count = found
        self.index = torch.arange(self.task.size(targets), device=self.classes.device)

    def scores(self, index: Tensor) -> Tensor:
        """Log probability of the own class of the samples at `index`, int64 (rows,), which Captum repeats at will."""
        index = index.reshape(-1)
        if torch.equal(index, self.index):
            outputs = self.task.forward(self.context.model, self.inputs)
            return self.task.class_scores(outputs, self.targets, self.classes)
        samples, axis = len(self.index), self.task.batch_axis
        if any(n != samples for n in (*lengths(self.inputs, axis), *lengths(self.targets))):
            raise DataError(
                "this method repeats samples, which inputs without a row for each (graphs, shared masks) do not allow; "
                "captum:IntegratedGradients does not repeat any."
            )
        inputs = pick_samples(self.inputs, index, samples, axis)
        targets = pick_samples(self.targets, index, samples)
        return self.task.class_scores(self.task.forward(self.context.model, inputs), targets, self.classes[index])


def incompleteness(attributed: Tensor, difference: Tensor) -> Tensor:
    """|sum of attributions - difference| over |difference|, (samples,)."""
    return (attributed.sum(1) - difference).abs() / difference.abs().clamp_min(math.ulp(1.0))
