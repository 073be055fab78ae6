"""The base of all criteria from Captum: means of attributions over all samples, and over the samples of each class."""

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
"""Arguments of Captum's methods that are no settings of a criterion. They change the form of the result."""


def settings(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the settings of a Captum method: its arguments whose defaults are numbers, text, True or False.

    Args:
        function: A method of a Captum class, or its `__init__`.

    Returns:
        Name of an argument -> its default.
    """
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if type(p.default) in (int, float, str, bool) and p.name not in OURS}


@dataclass(frozen=True)
class CaptumMethod(Criterion):
    """A Captum attribution class as a criterion, under the name "captum:<class>".

    A unit's score is its mean attribution over all samples: how much the unit adds to the log probability of the
    sample's own class. Arguments of the Captum class with plain values are further fields of the criterion, such as
    `n_steps`.

    Args:
        batches: The number of batches of the loader to use. None: all.

    Raises:
        PluginError: A setting is out of range or of the wrong type.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> sites = xprune.find_sites(model, batches[0][0])
        >>> scores = xprune.score(model, sites, batches, "captum:IntegratedGradients,n_steps=4")
        >>> scores.classwise[1].shape  # 3 classes, 16 neurons
        torch.Size([3, 16])
    """

    batches: int | None = None
    attribution: ClassVar[type[Any]]
    complete: ClassVar[bool] = False
    """True if the attributions of a sample add up to the effect of all units together, except for numerical error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            # These two may be None or a whole number, so the type of the default is not enough.
            optional = field.name in ("batches", "groups")
            fits = type(value) is wanted or (wanted is float and type(value) is int) or (optional and value is None)
            if not (fits or (optional and type(value) is int)):
                raise PluginError(
                    f"{self.name}: {field.name}={value!r}, wanted a {wanted.__name__}, as {field.default!r}."
                )
            if (type(value) is int and value < 1) or (field.name == "baseline" and not 0 <= value < 1):
                raise PluginError(
                    f"{self.name}: {field.name}={value!r}; whole numbers are at least 1, and baseline lies in [0, 1)."
                )

    @abstractmethod
    def attributions(self, batch: "Batch", sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Computes the attributions of one batch.

        Args:
            batch: The batch.
            sites: The sites to score.

        Returns:
            The attributions (samples, units of all sites), and the completeness error (samples,), see `incompleteness`.
        """

    def passes(self, sites: Sequence[Site]) -> int:
        """Returns the number of forward passes for one batch, if a user should know it in advance. 0 if not."""
        return 0

    def given(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Returns the settings of this criterion that a method of the Captum class takes, as keyword arguments."""
        return {name: getattr(self, name) for name in settings(function)}

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Computes the mean attribution of each unit, over all samples and processes.

        Args:
            context: The model, the loader, the task and the seed are used.
            sites: The sites to score.

        Returns:
            The scores on the scale "loss", and class-wise scores. A class without samples has NaN there. `info` holds
            the settings, the number of samples, the seconds and, for complete methods, the mean completeness error.

        Raises:
            DataError: There is no loader, it does not fit the task, or the task has no classes.
            PluginError: Captum cannot run the method on this model, or all units of a site get the same score.
        """
        start, runner = time.perf_counter(), accelerator()
        sizes = [site.size for site in sites]
        # (classes, units + 2): sums of the attributions, the sum of the error, and the number of samples.
        table: Tensor | None = None
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
                    f"{self.name} gives every unit of {site.name} the same score, so it cannot say which should stay. "
                    "Use more samples (n_samples, batches), or another method."
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
        """Calls `attributions`. Raises PluginError if Captum fails on this model."""
        try:
            with warnings.catch_warnings():
                # Captum warns about what we do on purpose, such as scoring many samples at once. It also warns that a
                # method is slow, which `_announce` prints before the start. Warnings of the model still show.
                warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
                return self.attributions(batch, sites)
        except torch.OutOfMemoryError:
            # It is a RuntimeError too, but another method would not help.
            raise
        except (AssertionError, TypeError, NotImplementedError, RuntimeError) as failure:
            raise PluginError(
                f"{self.name} cannot run on this model, Captum says: {failure} "
                "Use another method, for example captum:InputXGradient or captum:IntegratedGradients."
            ) from failure

    def _announce(self, passes: int, seconds: float, context: Context) -> None:
        """Prints how long scoring will take, from the measured seconds of one forward pass."""
        loader = context.data(self.name)
        total = len(loader) if isinstance(loader, Sized) else None
        count = min(total, self.batches) if total and self.batches else total or self.batches
        time_ = (
            f"{count} batches: about {passes * seconds * count:.0f} s" if count else f"{passes * seconds:.1f} s each"
        )
        get_console().print(f"{self.name}: {passes} forward passes a batch, {time_}", highlight=False)


class Batch:
    """One batch, and the log probability that the model gives to the own class of each sample.

    Args:
        context: The model and the task.
        inputs: The inputs of the batch.
        targets: The targets of the batch.

    Attributes:
        classes: The class of each sample, int64 (samples,).
        count: The number of classes.
        index: The numbers of the samples, 0 to samples - 1.
        seconds: The time of one forward pass.

    Raises:
        DataError: The targets do not fit the model's outputs, or the task has no classes.
    """

    def __init__(self, context: Context, inputs: Any, targets: Any) -> None:
        self.context, self.task, self.inputs, self.targets = context, context.task, inputs, targets
        start = time.perf_counter()
        with torch.no_grad():
            outputs = self.task.forward(context.model, inputs)
        self.seconds = time.perf_counter() - start
        self.task.check(outputs, targets)
        found = self.task.classes(outputs, targets)
        if found is None:
            raise DataError(f"{type(self.task).__name__} has no classes to attribute to. Implement Task.classes.")
        self.classes, self.count = found
        self.index = torch.arange(self.task.size(targets), device=self.classes.device)

    def scores(self, index: Tensor) -> Tensor:
        """Computes the log probability of the own class for some samples of the batch.

        Some methods of Captum repeat samples, or take them in another order. The gates are then in that order too.

        Args:
            index: The numbers of the samples, int64 (rows,) or any shape with that many entries.

        Returns:
            Log probabilities (rows,).

        Raises:
            DataError: Samples are repeated, but an input has no entry for each sample.
        """
        index = index.reshape(-1)
        if torch.equal(index, self.index):
            outputs = self.task.forward(self.context.model, self.inputs)
            return self.task.class_scores(outputs, self.targets, self.classes)
        samples, axis = len(self.index), self.task.batch_axis
        if any(n != samples for n in (*lengths(self.inputs, axis), *lengths(self.targets))):
            raise DataError(
                "this method repeats samples. Inputs without a row for each sample, such as graphs or shared masks, do "
                "not allow that. Use captum:IntegratedGradients, which repeats none."
            )
        inputs = pick_samples(self.inputs, index, samples, axis)
        targets = pick_samples(self.targets, index, samples)
        return self.task.class_scores(self.task.forward(self.context.model, inputs), targets, self.classes[index])


def incompleteness(attributed: Tensor, difference: Tensor) -> Tensor:
    """Computes the completeness error: how far the attributions of a sample are from adding up to their total.

    Args:
        attributed: Attributions (samples, units).
        difference: The total (samples,): the log probability with all units, less that with all units removed.

    Returns:
        |sum of attributions - difference| / |difference|, (samples,).
    """
    return (attributed.sum(1) - difference).abs() / difference.abs().clamp_min(math.ulp(1.0))
