"""Samples: along which axis of the inputs they lie, told by taking one of them away."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xprune.modules.calls import call, lengths, map_tensors, pick_samples, slow_path, tensors_in
from xprune.modules.copies import reference_device, shared_copy, with_noise

SAME = 1e-6
"""Difference of two outputs, as a share of the largest, below which they count as the same."""


@dataclass(frozen=True)
class Samples:
    """Where the samples lie.

    Attributes:
        axis: Axis of the samples in the inputs.
        count: Number of samples.
        other_first: True where tensors beside the first have their samples along the other one of the first two axes.
        layers: For the path of each layer that was asked for, the axis of the samples in its input. -1: that input
            does not say which row belongs to which sample.
    """

    axis: int
    count: int
    other_first: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)

    def take(self, inputs: Any, index: Sequence[int]) -> Any:
        """The inputs with these samples alone. A tensor without an axis of samples goes along whole."""
        if self.axis != 1:
            return pick_samples(inputs, index, self.count, self.axis)
        first = next((t for t in tensors_in(inputs) if t.dim() > 1), None)

        def taken(tensor: Tensor) -> Tensor:
            # beside (tokens, samples, features) there may be a mask of (samples, tokens)
            axes = [0, 1] if self.other_first and tensor is not first else [1, 0]
            along = next((a for a in axes if tensor.dim() > a and tensor.shape[a] == self.count), None)
            if along is None:
                return tensor
            return tensor.index_select(along, torch.as_tensor(list(index), device=tensor.device))

        return map_tensors(inputs, taken)


def find_samples(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] = (),
    batch_axis: int | None = None,
    prepare: Callable[[nn.Module], object] = lambda _: None,
) -> Samples | None:
    """Finds the axis of the samples; None where it cannot be told.

    An axis holds samples where the model runs with one of them less and gives one row less. Where two axes do, as in
    a model that gives something for each token, the samples are what the model does not mix: another first sample
    changes no row but its own. Where both axes pass that too, the first one is taken: nothing tells them apart.

    Args:
        model: The model. It is not changed.
        inputs: What the model is called with.
        layers: Paths of layers whose inputs are looked at too.
        batch_axis: The axis, where the caller knows it.
        prepare: What is done to the copy of the model that is run: a forward that calls those layers, for example.
    """
    for device in ("meta", None):  # shapes are enough, but a forward that looks at values does not run on meta
        try:
            runner = _Runner(model, inputs, layers, prepare, device)
        except Exception:  # whoever needs the outputs calls the model again and says why it fails
            continue
        tried = [found for axis in ((0, 1) if batch_axis is None else (batch_axis,)) for found in runner.try_axis(axis)]
        break
    else:
        return None
    if batch_axis is not None:
        # The caller knows the axis. Where no other number of samples runs, the layers' axes are the usual ones.
        usual = 0 if batch_axis == 0 else -1
        given = Samples(batch_axis, samples_of(inputs, batch_axis), layers=dict.fromkeys(layers, usual))
        return tried[0].samples if tried else given
    best = [one for one in tried if one.rank == max(each.rank for each in tried)]
    chosen = best[0] if len(best) == 1 else _not_mixed(model, inputs, best)
    return chosen.samples if chosen else None


def samples_of(inputs: Any, axis: int) -> int:
    """The number of samples: what the first tensor that has the axis, or the first list, says; 0 for none."""
    return next(iter(lengths(inputs, axis)), 0)


@dataclass(frozen=True)
class _Tried:
    """An axis along which the model runs with another number of samples.

    rank   3: the output has as many rows less; 2: it has fewer, several for each sample; 1: it does not change
    axis   of the output that changes
    """

    samples: Samples
    rank: int
    axis: int = 0


class _Runner:
    """A copy of the model that says which shapes its layers are given and what shapes it gives."""

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
            self.copy.get_submodule(path).register_forward_pre_hook(self._look(path), with_kwargs=True)
        self.whole, self.given = self._run(self.inputs)

    def _look(self, path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = tensors_in((args, kwargs))
            self.seen[path] = found[0].shape if found else torch.Size()

        return hook

    @torch.no_grad()
    def _run(self, inputs: Any) -> tuple[list[torch.Size], dict[str, torch.Size]]:
        self.seen.clear()
        with slow_path():
            return [t.shape for t in tensors_in(call(self.copy, inputs))], dict(self.seen)

    def try_axis(self, axis: int) -> list[_Tried]:
        """What is seen with one sample less along the axis, or with one more; [] where both fail.

        A graph cannot lose a node that its edges lead to, but it can have one more.
        """
        count = samples_of(self.inputs, axis)
        fewer, more = list(range(count - 1)), [*range(count), count - 1]
        for index in (fewer, more) if count > 1 else (more,) if count else ():
            for other_first in (False, True) if axis == 1 else (False,):
                samples = Samples(axis, count, other_first)
                try:
                    outputs, given = self._run(samples.take(self.inputs, index))
                except Exception:  # that is the answer: this axis does not hold samples
                    continue
                layers = {p: _axis(shape, given.get(p), samples, len(index)) for p, shape in self.given.items()}
                return [self._judged(Samples(axis, count, other_first, layers), outputs, len(index))]
        return []

    def _judged(self, samples: Samples, outputs: list[torch.Size], left: int) -> _Tried:
        for before, after in zip(self.whole, outputs, strict=False):
            changed = _changed(before, after)
            if changed is not None and before[changed] * left == after[changed] * samples.count:
                return _Tried(samples, 3 if before[changed] == samples.count else 2, changed)
        # What the model gives does not follow the rows of its inputs, as with graphs of many nodes: whoever knows the
        # samples says which rows are theirs.
        usual = 0 if samples.axis == 0 else -1
        layers = {path: usual if axis < 0 else axis for path, axis in samples.layers.items()}
        return _Tried(replace(samples, layers=layers), 1)


def _changed(before: torch.Size, after: torch.Size) -> int | None:
    """The one axis along which two shapes differ."""
    axes = [a for a, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    return axes[0] if len(axes) == 1 and len(before) == len(after) else None


def _axis(before: torch.Size, after: torch.Size | None, samples: Samples, left: int) -> int:
    """The axis of the samples in a layer's input, -1 where rows cannot be told apart by their order."""
    axis = None if after is None else _changed(before, after)
    if axis is None or after is None or before[axis] * left != after[axis] * samples.count:
        return -1
    # Several rows a sample follow one another where samples come first, and lie scattered where tokens do.
    return axis if before[axis] == samples.count or samples.axis == 0 else -1


def _not_mixed(model: nn.Module, inputs: Any, tried: Sequence[_Tried]) -> _Tried | None:
    """The first of the axes along which the model mixes nothing; None where it mixes along all, or nothing tells."""
    told = [(one, _mixes(model, inputs, one, [each for each in tried if each is not one])) for one in tried]
    apart = [one for one, mixes in told if mixes is False]
    unknown = [one for one, mixes in told if mixes is None]
    return next(iter(apart), unknown[0] if len(unknown) == 1 else None)


@torch.no_grad()
def _mixes(model: nn.Module, inputs: Any, one: _Tried, others: Sequence[_Tried]) -> bool | None:
    """Whether another first sample changes more than that sample's rows; None where that cannot be seen.

    On weights with noise, since layers that start at zero hide what they mix; on short inputs, since that is enough.
    """
    copy = with_noise(model)
    inputs = map_tensors(inputs, lambda t: t.detach().to(reference_device(model)))
    count = min(one.samples.count, 3)
    small = one.samples.take(inputs, range(count))
    for other in others:
        small = other.samples.take(small, range(min(other.samples.count, 8)))
    if one.rank == 1 or count < 2:
        return None
    for given, samples in ((small, count), (inputs, one.samples.count)):
        try:
            with slow_path():
                before, after = (
                    next(t for t in tensors_in(call(copy, x)) if t.is_floating_point() and t.dim() > one.axis)
                    for x in (given, _another_first(given, one.samples.axis))
                )
        except Exception:  # it does not run on so little
            continue
        a, b = before.movedim(one.axis, 0).flatten(1), after.movedim(one.axis, 0).flatten(1)  # (rows, ...)
        moved = ~((a - b).abs().amax(1) <= SAME * a.abs().max())
        return bool(int(moved.sum()) > len(a) // samples) if bool(moved.any()) else None
    return None


def _another_first(inputs: Any, axis: int) -> Any:
    """The inputs with another first sample in their first tensor that has the axis."""
    main = next(t for t in tensors_in(inputs) if t.dim() > axis)

    def changed(tensor: Tensor) -> Tensor:
        if tensor is not main:
            return tensor
        made = tensor.clone()
        first = made.select(axis, 0)
        if tensor.is_floating_point():
            noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
            first.add_(noise * (1 + first.abs().max()))
        elif tensor.dtype == torch.bool:
            first.logical_not_()
        else:  # other indices, none beyond those that are there
            low, high = int(tensor.min()), int(tensor.max())
            first.copy_((first - low + 1) % (high - low + 1) + low if high > low else first - 1 if low else first + 1)
        return made

    return map_tensors(inputs, changed)
