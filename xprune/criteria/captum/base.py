"""The base class of all criteria from Captum. It computes mean attributions over all samples and for each class."""

import inspect
import math
import random
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from rich import get_console
from torch import Tensor

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.errors import DataError, PluginError
from xprune.modules.calls import lengths, pick_samples, tensors_in
from xprune.modules.undisturbed import seeded
from xprune.training.runtime import accelerator, batches, known_length, prepared, reduced
from xprune.training.sharding import refuse_sharding

SHORT = 3.0
"""The number of seconds that a user waits without being told. For longer scoring, an estimate is printed before."""

_Batch = TypeVar("_Batch")

OURS = ("return_convergence_delta", "return_input_shape", "show_progress", "attribute_to_layer_input")
"""Arguments of Captum's methods that are not settings of a criterion, because they change the form of the result."""


def settings(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the arguments of a Captum method that a criterion can offer as settings, with their defaults.

    These are the arguments whose default is a number, a text, True or False.

    Args:
        function: A method of a Captum class, or its `__init__`.

    Returns:
        The default of each argument, by the name of the argument.
    """
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if type(p.default) in (int, float, str, bool) and p.name not in OURS}


@dataclass(frozen=True)
class CaptumMethod(Criterion):
    """Base class of criteria that use an attribution class of Captum. They are named "captum:" plus the class name.

    The score of a unit is its mean attribution over all samples. An attribution says how much the unit adds to the log
    probability of the sample's own class. If the task has no classes, it says how much the unit adds to
    `Task.sample_scores`, and there are no class-wise scores. The fields of the criterion are `batches` and the
    arguments of the Captum class with a simple default, such as `n_steps`.

    **Which batches are used.** A method with `n_steps`, such as `captum:IntegratedGradients`, runs the model forward
    and backward for each step of a path, which takes long. So it has one more field, `every`: of each 4 consecutive
    batches, it uses one, and the seed says which one. With `every=1`, it uses all batches. The other methods use all
    batches. With `every=4`, the loader should be shuffled. If it is sorted by class, a class may get no batch, and its
    class-wise scores are then NaN.

    Args:
        batches: The number of batches to use. None means that the whole loader is read.

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
    """True if the attributions of a sample add up to the effect of all units together, apart from numerical errors."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            # The fields `batches` and `groups` may be None or a whole number, whatever the type of their default.
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
        """Computes the attributions for one batch.

        Args:
            batch: The batch.
            sites: The sites to score.

        Returns:
            A tuple (attributions, errors). The attributions are (samples, units), with the units of all sites side by
            side. The errors are the completeness error of each sample, (samples,), see `incompleteness`.
        """

    def passes(self, sites: Sequence[Site]) -> int:
        """Returns the number of forward passes for one batch. Scoring tells the user before it starts, if it is slow.

        A backward pass counts as two. The number is 0 if it is small, and nothing is told then. This implementation
        returns 0.
        """
        return 0

    def given(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Returns the settings of this criterion that a Captum method accepts, as a dict of keyword arguments."""
        return {name: getattr(self, name) for name in settings(function)}

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Computes the mean attribution of each unit. With several processes, the samples of all processes are used.

        Args:
            context: The inputs of a criterion. The model, the loader, the task and the seed are used.
            sites: The sites to score.

        Returns:
            The scores with the scale "loss". If the task has classes, also class-wise scores, which are NaN for a class
            without samples. `info`
            holds the settings, the number of samples and the seconds. If the method is complete, `info` also holds the
            mean completeness error.

        Raises:
            DataError: There is no loader, it does not fit the task, or the task has neither classes nor
                `Task.sample_scores`.
            PluginError: Captum cannot run the method on this model, or all units of a site get the same score.
        """
        start, runner = time.perf_counter(), accelerator()
        refuse_sharding(runner, self.name, "Score without FSDP, or with taylor, xpruner or magnitude.")
        sizes = [site.size for site in sites]
        # The shape is (classes, units + 2): for each class the sums of the attributions, the sum of the errors, and the
        # number of samples. If the task has no classes, all samples are in one row.
        table: Tensor | None = None
        has_classes = False
        loader, passes = prepared(runner, context.data(self.name)), self.passes(sites)
        limit = None if self.batches is None else self.batches * self._every
        with seeded(context.seed):
            stream = batches(runner, loader, context.task, f"scoring ({self.name})", limit)
            for inputs, targets in one_of_every(stream, self._every, context.seed):
                batch = Batch(context, inputs, targets)
                if table is None and passes and runner.is_main_process:
                    self._announce(passes, batch.seconds(), context)
                found, error = self._attributed(batch, sites)
                columns = torch.cat([found.float(), error[:, None].float(), torch.ones_like(error[:, None])], dim=1)
                table = torch.zeros(batch.count, columns.shape[1], device=runner.device) if table is None else table
                table.index_add_(0, batch.classes, columns.detach())
                has_classes = batch.has_classes
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
        return Scores(tuple(sites), tuple(values), self.name, tuple(classwise) if has_classes else None, info, "loss")

    def _attributed(self, batch: "Batch", sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Calls `attributions`. If Captum fails on this model, raises PluginError with Captum's message."""
        try:
            with warnings.catch_warnings():
                # Captum warns about things that we do on purpose, such as scoring many samples at once. It also warns
                # that a method is slow, which `_announce` has already told the user. Warnings of the model are still
                # shown.
                warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
                return self.attributions(batch, sites)
        except torch.OutOfMemoryError:
            # This error is a RuntimeError too. But the advice below, to use another method, would not help.
            raise
        except (AssertionError, TypeError, NotImplementedError, RuntimeError) as failure:
            raise PluginError(
                f"{self.name} cannot run on this model, Captum says: {failure} "
                "Use another method, for example captum:InputXGradient or captum:IntegratedGradients."
            ) from failure

    @property
    def _every(self) -> int:
        """Of this number of consecutive batches, one is used."""
        found: int = getattr(self, "every", 1)
        return found

    def _announce(self, passes: int, seconds: float, context: Context) -> None:
        """Prints how long scoring will take, if this is more than `SHORT`. It is estimated from one forward pass.

        Args:
            passes: The number of forward passes for a batch.
            seconds: The measured seconds of one forward pass.
            context: The context, whose loader may say the number of batches.
        """
        total = known_length(context.data(self.name))
        available = None if total is None else math.ceil(total / self._every)
        count = min(available, self.batches) if available and self.batches else available or self.batches
        if count and passes * seconds * count < SHORT:
            return
        time_ = (
            f"{count} batches: about {passes * seconds * count:.0f} s" if count else f"{passes * seconds:.1f} s each"
        )
        of_all = f" (of {total}, every={self._every})" if self._every > 1 and total else ""
        get_console().print(f"{self.name}: {passes} forward passes a batch, {time_}{of_all}", highlight=False)


def one_of_every(stream: Iterable[_Batch], every: int, seed: int) -> Iterator[_Batch]:
    """Yields one of each `every` consecutive batches, chosen at random. Each of them is as likely as the others.

    If batches are left over at the end, one of these is yielded too. So there is at least one batch.

    Args:
        stream: The batches.
        every: The number of consecutive batches.
        seed: The seed of the choice. All processes that read parts of the same batches choose the same ones.

    Example:
        >>> list(one_of_every(range(10), every=4, seed=0))
        [0, 5, 8]
        >>> list(one_of_every(range(3), every=1, seed=0))
        [0, 1, 2]
    """
    chance, place = random.Random(seed), 0
    chosen: list[_Batch] = []
    for batch in stream:
        place += 1
        # The k-th batch takes the place of the one chosen before with the probability 1/k. So each has the same chance
        # in the end, also if it is not known how many there are.
        if chance.random() * place < 1:
            chosen = [batch]
        if place == every:
            yield from chosen
            chosen, place = [], 0
    yield from chosen


class Batch:
    """One batch, and a function that computes a number for each sample: the log probability of its own class.

    If the task has no classes, the number is that of `Task.sample_scores`.

    Args:
        context: The context with the model and the task.
        inputs: The inputs of the batch.
        targets: The targets of the batch.

    Attributes:
        classes: The class of each sample, int64 (samples,). 0 for all samples if the task has no classes.
        count: The number of classes. 1 if the task has no classes.
        has_classes: True if the task has classes.
        index: The indices of the samples, 0 to samples - 1.

    Raises:
        DataError: The targets do not fit the model's outputs, or the task has neither classes nor
            `Task.sample_scores`.
    """

    def __init__(self, context: Context, inputs: Any, targets: Any) -> None:
        self.context, self.task, self.inputs, self.targets = context, context.task, inputs, targets
        with torch.no_grad():
            outputs = self.task.forward(context.model, inputs)
        self.task.check(outputs, targets)
        samples, self.dense = self.task.size(targets), outputs
        found = self.task.classes(outputs, targets)
        self.has_classes = found is not None
        if found is None:
            if self.task.sample_scores(outputs, targets, outputs) is None:
                raise DataError(
                    f"{type(self.task).__name__} has no classes, which criteria from Captum need: implement "
                    "Task.classes, or Task.sample_scores for a number to explain that needs no classes."
                )
            device = next(iter(tensors_in(outputs))).device
            found = torch.zeros(samples, dtype=torch.long, device=device), 1
        self.classes, self.count = found
        self.index = torch.arange(samples, device=self.classes.device)

    @torch.no_grad()
    def seconds(self) -> float:
        """Returns the time of one forward pass. The model has run before, so the time to start is not counted."""
        start = time.perf_counter()
        outputs = self.task.forward(self.context.model, self.inputs)
        # An accelerator may still be at work when the forward returns. Reading a number waits for it.
        next(iter(tensors_in(outputs))).flatten()[:1].tolist()
        return time.perf_counter() - start

    def scores(self, index: Tensor) -> Tensor:
        """Computes the number to explain for some samples of the batch, such as the log probability of the own class.

        Some methods of Captum repeat samples or change their order. The gates of the model then have the same order.

        Args:
            index: The indices of the wanted samples, int64, of any shape. It is flattened to (rows,).

        Returns:
            The numbers, (rows,).

        Raises:
            DataError: `index` repeats samples, but an input does not have one entry for each sample.
        """
        index = index.reshape(-1)
        if torch.equal(index, self.index):
            outputs = self.task.forward(self.context.model, self.inputs)
            return self._of_outputs(outputs, self.targets, self.dense, self.classes)
        samples, axis = len(self.index), self.task.batch_axis
        if any(n != samples for n in (*lengths(self.inputs, axis), *lengths(self.targets))):
            raise DataError(
                "this method repeats samples. That is not possible if an input has no row for each sample, as with "
                "graphs or shared masks. Use captum:IntegratedGradients, which repeats no samples."
            )
        inputs = pick_samples(self.inputs, index, samples, axis)
        targets = pick_samples(self.targets, index, samples)
        outputs = self.task.forward(self.context.model, inputs)
        return self._of_outputs(outputs, targets, pick_samples(self.dense, index, samples), self.classes[index])

    def _of_outputs(self, outputs: Any, targets: Any, dense: Any, classes: Tensor) -> Tensor:
        """Returns the number to explain for each sample, (rows,).

        Args:
            outputs: The outputs of the gated model.
            targets: The targets of the same samples.
            dense: The outputs of the dense model for the same samples.
            classes: The classes of the same samples.
        """
        if self.has_classes:
            return self.task.class_scores(outputs, targets, classes)
        found = self.task.sample_scores(outputs, targets, dense)
        assert found is not None  # the constructor has checked this
        return found


def incompleteness(attributed: Tensor, difference: Tensor) -> Tensor:
    """Computes the completeness error of attributions: how much their sum differs from the value that it should have.

    Args:
        attributed: The attributions, (samples, units).
        difference: The value that the attributions of a sample should add up to, (samples,): the log probability with
            all units minus the log probability with all units removed.

    Returns:
        |sum of attributions - difference| / |difference|, (samples,).
    """
    return (attributed.sum(1) - difference).abs() / difference.abs().clamp_min(math.ulp(1.0))
