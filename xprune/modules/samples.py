"""Finds the sample axis of a model's inputs: it runs the model with one sample less and looks at what changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xprune.modules.calls import call, lengths, map_tensors, pick_samples, slow_path, tensors_in
from xprune.modules.copies import reference_device, shared_copy, with_noise

SAME = 1e-6
"""Two outputs count as the same if they differ by at most this share of the largest output."""


@dataclass(frozen=True)
class Samples:
    """Where the samples of a batch are.

    Attributes:
        axis: Sample axis of the inputs.
        count: Number of samples.
        other_first: True if the tensors after the first have their samples along the other one of the axes 0 and 1.
        layers: For the path of each layer that was asked for, the sample axis of its input. -1 if the order of its rows
            does not show which row belongs to which sample.

    Example:
        >>> tokens_first = torch.zeros(5, 3, 8)  # 5 tokens of 3 samples
        >>> Samples(axis=1, count=3).take(tokens_first, [0, 2]).shape
        torch.Size([5, 2, 8])
    """

    axis: int
    count: int
    other_first: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)

    def take(self, inputs: Any, index: Sequence[int]) -> Any:
        """Returns the inputs with the given samples only. A tensor without a sample axis stays whole."""
        if self.axis != 1:
            return pick_samples(inputs, index, self.count, self.axis)
        first = next((t for t in tensors_in(inputs) if t.dim() > 1), None)

        def taken(tensor: Tensor) -> Tensor:
            # Beside tokens (tokens, samples, features) there may be a mask of (samples, tokens).
            axes = [0, 1] if self.other_first and tensor is not first else [1, 0]
            axis = next((a for a in axes if tensor.dim() > a and tensor.shape[a] == self.count), None)
            if axis is None:
                return tensor
            return tensor.index_select(axis, torch.as_tensor(list(index), device=tensor.device))

        return map_tensors(inputs, taken)


def find_samples(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] = (),
    batch_axis: int | None = None,
    prepare: Callable[[nn.Module], object] = lambda _: None,
) -> Samples | None:
    """Finds the sample axis of the inputs, which is 0 or 1.

    An axis may hold samples if the model runs with one entry less along it and returns one row less. In a model that
    returns something for each token, both axes pass. Then samples are what the model does not mix: changing the first
    sample changes no other row. If both axes pass that test too, the first one is taken, since nothing separates them.

    Args:
        model: The model. It is not changed.
        inputs: Inputs of the model.
        layers: Paths of layers. The sample axis of their inputs is found too.
        batch_axis: The sample axis, if the caller knows it. None: it is found.
        prepare: Is called with the copy of the model before it runs. It may, for example, give modules a forward that
            calls the layers.

    Returns:
        Where the samples are. None if the axis cannot be found, or if the forward fails.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)  # takes tokens first
        >>> find_samples(model, torch.randn(5, 3, 8), ["linear1"])
        Samples(axis=1, count=3, other_first=False, layers={'linear1': 1})
    """
    # Shapes are enough, and the meta device gives them for free. A forward that looks at values does not run there, so
    # the model's own device comes next.
    for device in ("meta", None):
        try:
            runner = _Runner(model, inputs, layers, prepare, device)
        # No error here: the caller runs the model again, and then says why it fails.
        except Exception:
            continue
        axes = (0, 1) if batch_axis is None else (batch_axis,)
        candidates = [found for axis in axes for found in runner.try_axis(axis)]
        break
    else:
        return None
    if batch_axis is not None:
        if candidates:
            return candidates[0].samples
        # The model runs with this number of samples only. The axes in the layers are then the usual ones.
        usual = 0 if batch_axis == 0 else -1
        return Samples(batch_axis, samples_of(inputs, batch_axis), layers=dict.fromkeys(layers, usual))
    best = [one for one in candidates if one.rank == max(each.rank for each in candidates)]
    chosen = best[0] if len(best) == 1 else _without_mixing(model, inputs, best)
    return chosen.samples if chosen else None


def samples_of(inputs: Any, axis: int) -> int:
    """Returns the number of samples, as the first tensor with the axis or the first list shows it. 0 without these."""
    return next(iter(lengths(inputs, axis)), 0)


@dataclass(frozen=True)
class _Candidate:
    """An axis along which the model also runs with another number of entries.

    Attributes:
        samples: Where the samples would be.
        rank: How much speaks for the axis. 3: the output loses as many rows as the inputs. 2: the output shrinks in
            proportion, with several rows for each sample. 1: the output keeps its shape.
        axis: The axis of the output that changes. 0 for rank 1.
    """

    samples: Samples
    rank: int
    axis: int = 0


class _Runner:
    """Runs a copy of a model, and notes the shapes of its outputs and of the inputs of some layers.

    Args:
        model: The model. It is not changed.
        inputs: Inputs of the model.
        layers: Paths of the layers.
        prepare: See `find_samples`.
        device: Device to run on: "meta", or None for the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        layers: Sequence[str],
        prepare: Callable[[nn.Module], object],
        device: str | None,
    ) -> None:
        self.copy, self.seen = shared_copy(model, device=device), dict[str, torch.Size]()
        prepare(self.copy)
        self.inputs = map_tensors(inputs, lambda t: t.detach().to(device or reference_device(model)))
        for path in dict.fromkeys(layers):
            self.copy.get_submodule(path).register_forward_pre_hook(self._note_shape(path), with_kwargs=True)
        self.whole, self.given = self._run(self.inputs)

    def _note_shape(self, path: str) -> Any:
        """Returns a hook that notes the shape of the first tensor that the layer at `path` is given."""

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = tensors_in((args, kwargs))
            self.seen[path] = found[0].shape if found else torch.Size()

        return hook

    @torch.no_grad()
    def _run(self, inputs: Any) -> tuple[list[torch.Size], dict[str, torch.Size]]:
        """Returns the shapes of the outputs, and the shape of each layer's input by the path of the layer."""
        self.seen.clear()
        with slow_path():
            return [t.shape for t in tensors_in(call(self.copy, inputs))], dict(self.seen)

    def try_axis(self, axis: int) -> list[_Candidate]:
        """Runs the model with one entry less along the axis, or else with one more.

        A graph cannot lose a node that its edges refer to, but it can have one more.

        Returns:
            One candidate. [] if the model runs with neither.
        """
        count = samples_of(self.inputs, axis)
        fewer, more = list(range(count - 1)), [*range(count), count - 1]
        attempts: tuple[list[int], ...] = ()
        if count > 1:
            attempts = (fewer, more)
        elif count:
            attempts = (more,)
        for index in attempts:
            # Tensors beside the first may have samples and tokens the other way round, see `Samples.take`.
            for other_first in (False, True) if axis == 1 else (False,):
                samples = Samples(axis, count, other_first)
                try:
                    outputs, given = self._run(samples.take(self.inputs, index))
                # The failure is the answer: along this axis there are no samples.
                except Exception:
                    continue
                layers = {
                    path: _sample_axis(shape, given.get(path), samples, len(index))
                    for path, shape in self.given.items()
                }
                return [self._ranked(Samples(axis, count, other_first, layers), outputs, len(index))]
        return []

    def _ranked(self, samples: Samples, outputs: list[torch.Size], remaining: int) -> _Candidate:
        """Returns the candidate with its rank, from the shapes of the outputs with `remaining` samples."""
        for before, after in zip(self.whole, outputs, strict=False):
            axis = _changed_axis(before, after)
            # In proportion: before / count == after / remaining.
            if axis is not None and before[axis] * remaining == after[axis] * samples.count:
                return _Candidate(samples, 3 if before[axis] == samples.count else 2, axis)
        # The output does not follow the rows of the inputs, as in models that return one row for a graph of many nodes.
        # Only a caller who knows the samples can say which rows are theirs.
        usual = 0 if samples.axis == 0 else -1
        layers = {path: usual if axis < 0 else axis for path, axis in samples.layers.items()}
        return _Candidate(replace(samples, layers=layers), 1)


def _changed_axis(before: torch.Size, after: torch.Size) -> int | None:
    """Returns the one axis along which two shapes differ. None if they differ along no axis or along several."""
    axes = [a for a, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    return axes[0] if len(axes) == 1 and len(before) == len(after) else None


def _sample_axis(before: torch.Size, after: torch.Size | None, samples: Samples, remaining: int) -> int:
    """Returns the sample axis of a layer's input. -1 if the order of its rows does not show their samples.

    Args:
        before: Shape of the input with all samples.
        after: Shape with `remaining` samples. None if the layer was not called.
        samples: The samples of the inputs.
        remaining: Number of samples in the second run.
    """
    axis = None if after is None else _changed_axis(before, after)
    if axis is None or after is None or before[axis] * remaining != after[axis] * samples.count:
        return -1
    # Samples and tokens may be folded into one axis. If samples come first, the rows of a sample are next to each
    # other. If tokens come first, they are scattered.
    return axis if before[axis] == samples.count or samples.axis == 0 else -1


def _without_mixing(model: nn.Module, inputs: Any, candidates: Sequence[_Candidate]) -> _Candidate | None:
    """Returns the first candidate along whose axis the model mixes nothing.

    If the test fails to run for exactly one candidate, and the model mixes along the others, returns that one. Else
    None.
    """
    tested = [(one, _mixes(model, inputs, one, [each for each in candidates if each is not one])) for one in candidates]
    separate = [one for one, mixes in tested if mixes is False]
    unknown = [one for one, mixes in tested if mixes is None]
    return next(iter(separate), unknown[0] if len(unknown) == 1 else None)


@torch.no_grad()
def _mixes(model: nn.Module, inputs: Any, one: _Candidate, others: Sequence[_Candidate]) -> bool | None:
    """Returns True if a change of the first sample changes rows of other samples. None if it cannot be seen.

    Args:
        model: The model.
        inputs: Its inputs.
        one: The candidate whose axis is tested.
        others: The other candidates. Their axes are shortened to 8 entries, which saves time.
    """
    # Noise on the weights: a layer that starts at zero would hide that it mixes.
    copy = with_noise(model)
    inputs = map_tensors(inputs, lambda t: t.detach().to(reference_device(model)))
    count = min(one.samples.count, 3)
    small = one.samples.take(inputs, range(count))
    for other in others:
        small = other.samples.take(small, range(min(other.samples.count, 8)))
    if one.rank == 1 or count < 2:
        return None
    # Short inputs first. Some models run on their full length only.
    for given, samples in ((small, count), (inputs, one.samples.count)):
        try:
            with slow_path():
                before, after = (
                    next(t for t in tensors_in(call(copy, x)) if t.is_floating_point() and t.dim() > one.axis)
                    for x in (given, _with_another_first(given, one.samples.axis))
                )
        except Exception:
            continue
        # Both have the shape (rows, everything else).
        a, b = before.movedim(one.axis, 0).flatten(1), after.movedim(one.axis, 0).flatten(1)
        # Written as `not (a <= b)`, so that a NaN counts as moved.
        moved = ~((a - b).abs().amax(1) <= SAME * a.abs().max())
        if not bool(moved.any()):
            return None
        return bool(int(moved.sum()) > len(a) // samples)
    return None


def _with_another_first(inputs: Any, axis: int) -> Any:
    """Returns the inputs with other values in the first sample of their first tensor that has the axis."""
    main = next(t for t in tensors_in(inputs) if t.dim() > axis)

    def changed(tensor: Tensor) -> Tensor:
        if tensor is not main:
            return tensor
        result = tensor.clone()
        first = result.select(axis, 0)
        if tensor.is_floating_point():
            noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
            first.add_(noise * (1 + first.abs().max()))
        elif tensor.dtype == torch.bool:
            first.logical_not_()
        else:
            # Whole numbers are indices, such as tokens. New ones stay in the range of those that occur, since a larger
            # one may be outside of the vocabulary. If all are equal, the next lower number is taken, or 1 if all are 0.
            low, high = int(tensor.min()), int(tensor.max())
            if high > low:
                first.copy_((first - low + 1) % (high - low + 1) + low)
            else:
                first.copy_(first - 1 if low else first + 1)
        return result

    return map_tensors(inputs, changed)
