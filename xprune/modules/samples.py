"""Finds the sample axis of a model's inputs: runs the model with one sample less and compares the shapes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from xprune.modules.calls import call, lengths, map_tensors, pick_samples, shareable, slow_path, tensors_in
from xprune.modules.copies import reference_device, shared_copy, with_noise
from xprune.modules.forward import devices_for_shapes

SAME = 1e-6
"""Two outputs are considered equal if they differ by at most this fraction of the largest output."""


@dataclass(frozen=True)
class Samples:
    """Says along which axis the samples of a batch lie, in the inputs of a model and in the inputs of some layers.

    Attributes:
        axis: The sample axis of the first tensor of the inputs, and of most other tensors.
        count: The number of samples.
        other_first: True if the other tensors of the inputs have their samples along axis 0 while the first tensor has
            them along axis 1. An example is a mask (samples, tokens) beside tokens (tokens, samples, features). False
            in any other case.
        shared: The number of a set in `shareable`, which says which tensors all samples share. None if each tensor with
            the right length has a part for each sample.
        layers: The sample axis of the input of some layers, by the path of the layer. -1 if the rows of the input are
            in an order that does not show which sample a row belongs to.

    Example:
        >>> tokens_first = torch.zeros(5, 3, 8)  # 5 tokens of 3 samples
        >>> Samples(axis=1, count=3).take(tokens_first, [0, 2]).shape
        torch.Size([5, 2, 8])
    """

    axis: int
    count: int
    other_first: bool = False
    shared: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)

    def take(self, inputs: Any, index: Sequence[int]) -> Any:
        """Returns the inputs of the samples with the given indices. A tensor without a sample axis is not changed."""
        shared = self.shared_tensors(inputs)
        if self.axis != 1:
            return pick_samples(inputs, index, self.count, self.axis, shared)
        first = next((t for t in tensors_in(inputs) if t.dim() > 1), None)

        def taken(tensor: Tensor) -> Tensor:
            # If tokens are (tokens, samples, features), a mask may still be (samples, tokens).
            axes = [0, 1] if self.other_first and tensor is not first else [1, 0]
            axis = next((a for a in axes if tensor.dim() > a and tensor.shape[a] == self.count), None)
            if axis is None or id(tensor) in shared:
                return tensor
            return tensor.index_select(axis, torch.as_tensor(list(index), device=tensor.device))

        return map_tensors(inputs, taken)

    def shared_tensors(self, inputs: Any) -> frozenset[int]:
        """Returns the ids of the tensors in the inputs that all samples share, although their shape allows parts."""
        if self.shared is None:
            return frozenset()
        found = shareable(inputs, self.count, self.axis)
        return found[self.shared] if self.shared < len(found) else frozenset()


def find_samples(
    model: nn.Module,
    inputs: Any,
    layers: Sequence[str] = (),
    batch_axis: int | None = None,
    prepare: Callable[[nn.Module], object] = lambda _: None,
) -> Samples | None:
    """Finds the sample axis of the inputs of a model. The axis is 0 or 1.

    An axis may be the sample axis if the model runs with one entry less along this axis and then returns one row less.
    If a model returns something for each token, this is true for the token axis too. Then the test is whether the model
    mixes entries: a change of the first sample must not change the output for another sample. If both axes pass this
    test too, axis 0 is chosen, since nothing distinguishes the two.

    Args:
        model: The model. It is not changed.
        inputs: Inputs of the model.
        layers: The paths of layers. The sample axis of the input of each layer is found too.
        batch_axis: The sample axis of the inputs, if the caller knows it. None means that it has to be found.
        prepare: A function that is called with the copy of the model before the copy runs. For example, it may give
            modules another forward that calls the layers.

    Returns:
        A `Samples` object. None if the axis cannot be found, or if the forward fails.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)  # takes tokens first
        >>> find_samples(model, torch.randn(5, 3, 8), ["linear1"])
        Samples(axis=1, count=3, other_first=False, shared=None, layers={'linear1': 1})
    """
    # A forward that reads values fails on the meta device. Then the model's own device is tried.
    for device in devices_for_shapes(model, inputs):
        try:
            runner = _Runner(model, inputs, layers, prepare, device)
        # The error is not raised here. The caller runs the model too, and reports why it fails.
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
        # The model runs only with this number of samples, so nothing can be compared. If samples come first in the
        # inputs, they most likely come first in the layers too.
        usual = 0 if batch_axis == 0 else -1
        return Samples(batch_axis, samples_of(inputs, batch_axis), layers=dict.fromkeys(layers, usual))
    best = [one for one in candidates if one.rank == max(each.rank for each in candidates)]
    chosen = best[0] if len(best) == 1 else _without_mixing(model, inputs, best)
    return chosen.samples if chosen else None


def samples_of(inputs: Any, axis: int) -> int:
    """Returns the length of the first tensor along an axis, or of the first list. If there is neither, returns 0.

    If `axis` is the sample axis, this is the number of samples.
    """
    return next(iter(lengths(inputs, axis)), 0)


@dataclass(frozen=True)
class _Candidate:
    """A possible sample axis: the model also runs with another number of entries along it.

    Attributes:
        samples: Where the samples are if this is the sample axis.
        rank: How likely this is the sample axis. 3: the output loses as many rows as the inputs. 2: the output shrinks
            in proportion and has several rows for each sample. 1: the output keeps its shape.
        axis: The axis of the output that changes. 0 for rank 1.
        output: The index of this output among all outputs. 0 for rank 1.
    """

    samples: Samples
    rank: int
    axis: int = 0
    output: int = 0


class _Runner:
    """Runs a copy of a model, and records the shapes of its outputs and of the inputs of some layers.

    Args:
        model: The model. It is not changed.
        inputs: Inputs of the model.
        layers: The paths of the layers.
        prepare: A function that is called with the copy before it runs, see `find_samples`.
        device: The device to run on: "meta", or None for the model's own device.
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
        """Returns a hook that records the shape of the first tensor in the input of the layer at `path`."""

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found = tensors_in((args, kwargs))
            self.seen[path] = found[0].shape if found else torch.Size()

        return hook

    @torch.no_grad()
    def _run(self, inputs: Any) -> tuple[list[torch.Size], dict[str, torch.Size]]:
        """Runs the copy on some inputs.

        Returns:
            The shapes of the outputs, and a dict with the shape of the input of each layer by its path.
        """
        self.seen.clear()
        with slow_path():
            return _shapes(call(self.copy, inputs)), dict(self.seen)

    def try_axis(self, axis: int) -> list[_Candidate]:
        """Runs the model on inputs that have one entry less along `axis`. If this fails, runs it with one entry more.

        One entry more is needed for graphs: an edge may refer to a removed node, but an added node does no harm.

        Returns:
            A list with one candidate for the sample axis. An empty list if both runs fail.
        """
        # The first tensor is not always the one with the samples: it may be a mask that all samples share. The first
        # list may hold something else than samples.
        best: list[_Candidate] = []
        for place, count in enumerate(dict.fromkeys(lengths(self.inputs, axis))):
            found = self._try_count(axis, count)
            # Rank 1 says little. For example, a graph model also runs without one of the edges.
            least = best[0].rank if best else min(place, 1)
            if found and found[0].rank > least:
                best = found
            if best and best[0].rank == 3:
                break
        return best

    def _try_count(self, axis: int, count: int) -> list[_Candidate]:
        """Runs the model with one entry less, or one more, in all inputs that have `count` entries along `axis`."""
        fewer, more = list(range(count - 1)), [*range(count), count - 1]
        attempts: tuple[list[int], ...] = ()
        if count > 1:
            attempts = (fewer, more)
        elif count:
            attempts = (more,)
        if count in _lengths_of_lists(self.inputs):
            # The images of a list may have different sizes, and the model pads them. Without the largest image, the
            # others get another size too. So an image is added first.
            attempts = attempts[::-1]
        # The other tensors of the inputs may have their samples along axis 0, see `Samples.other_first`. If this fails
        # too, all samples may share them, see `Samples.shared`.
        several: list[list[tuple[bool, int | None]]] = [
            [(other_first, None) for other_first in ((False, True) if axis == 1 else (False,))],
            [(False, shared) for shared in range(len(shareable(self.inputs, count, axis)))],
        ]
        for ways, index in product(several, attempts):
            for other_first, shared in ways:
                samples = Samples(axis, count, other_first, shared)
                try:
                    inputs = samples.take(self.inputs, index)
                    # With a list of images, no tensor may have an entry for each sample along this axis. The inputs
                    # then stay as they are, and a run would say nothing about the axis.
                    if _shapes(inputs) == _shapes(self.inputs):
                        continue
                    outputs, given = self._run(inputs)
                # A failure means that this is not the sample axis.
                except Exception:
                    continue
                layers = {
                    path: _sample_axis(shape, given.get(path), samples, len(index))
                    for path, shape in self.given.items()
                }
                return [self._ranked(replace(samples, layers=layers), outputs, len(index))]
        return []

    def _ranked(self, samples: Samples, outputs: list[torch.Size], remaining: int) -> _Candidate:
        """Returns the axis that was tried as a `_Candidate`, with a rank that says how likely it is the sample axis.

        Args:
            samples: Where the samples would be if it is the sample axis.
            outputs: The shapes of the outputs in the run with another number of samples.
            remaining: The number of samples in that run.
        """
        lists = samples.count in _lengths_of_lists(self.inputs)
        if lists and len(outputs) != len(self.whole) and len(self.whole) * remaining == len(outputs) * samples.count:
            # The model returns something for each image of a list, so the number of outputs is that of the images.
            return _Candidate(samples, 3)
        for output, (before, after) in enumerate(zip(self.whole, outputs, strict=False)):
            axis = _changed_axis(before, after)
            # In proportion: before / count == after / remaining.
            if axis is not None and before[axis] * remaining == after[axis] * samples.count:
                return _Candidate(samples, 3 if before[axis] == samples.count else 2, axis, output)
        # The output keeps its shape. For example, a model may return one row for a graph of many nodes. Then the shapes
        # do not show which rows belong to which sample.
        usual = 0 if samples.axis == 0 else -1
        layers = {path: usual if axis < 0 else axis for path, axis in samples.layers.items()}
        return _Candidate(replace(samples, layers=layers), 1)


def _shapes(value: Any) -> list[torch.Size]:
    """Returns the shapes of all tensors in a value, see `tensors_in`."""
    return [tensor.shape for tensor in tensors_in(value)]


def _lengths_of_lists(inputs: Any) -> list[int]:
    """Returns the length of each list in the inputs."""
    # A tensor has no length along axis 99, so only lists are counted.
    return lengths(inputs, 99)


def _changed_axis(before: torch.Size, after: torch.Size) -> int | None:
    """Returns the only axis along which two shapes differ. Returns None if there is no such axis, or several."""
    axes = [a for a, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
    return axes[0] if len(axes) == 1 and len(before) == len(after) else None


def _sample_axis(before: torch.Size, after: torch.Size | None, samples: Samples, remaining: int) -> int:
    """Returns the sample axis of a layer's input.

    Args:
        before: The shape of the input in the run with all samples.
        after: The shape in the run with `remaining` samples. None if the layer was not called.
        samples: Where the samples are in the inputs of the model.
        remaining: The number of samples in the second run.

    Returns:
        The axis. -1 if the rows are in an order that does not show which sample a row belongs to.
    """
    axis = None if after is None else _changed_axis(before, after)
    if axis is None or after is None or before[axis] * remaining != after[axis] * samples.count:
        return -1
    # Samples and tokens may be folded into one axis. If samples come first, the rows of one sample are next to each
    # other. If tokens come first, the rows of one sample are scattered.
    return axis if before[axis] == samples.count or samples.axis == 0 else -1


def _without_mixing(model: nn.Module, inputs: Any, candidates: Sequence[_Candidate]) -> _Candidate | None:
    """Returns the first candidate along whose axis the model does not mix entries.

    If there is none, but the test cannot be run for exactly one candidate, returns that candidate. Otherwise returns
    None.
    """
    tested = [(one, _mixes(model, inputs, one, [each for each in candidates if each is not one])) for one in candidates]
    separate = [one for one, mixes in tested if mixes is False]
    unknown = [one for one, mixes in tested if mixes is None]
    return next(iter(separate), unknown[0] if len(unknown) == 1 else None)


@torch.no_grad()
def _mixes(model: nn.Module, inputs: Any, one: _Candidate, others: Sequence[_Candidate]) -> bool | None:
    """Tests whether a change of the first entry along an axis changes the output for other entries.

    Args:
        model: The model.
        inputs: Inputs of the model.
        one: The candidate whose axis is tested.
        others: The other candidates. Their axes are shortened to 8 entries to save time.

    Returns:
        True if rows of other entries change, so that the axis cannot be the sample axis. False if only rows of the
        first entry change. None if the test is not possible.
    """
    # Noise on the weights is needed because a layer whose weights are zero would hide that it mixes entries.
    copy = with_noise(model)
    inputs = map_tensors(inputs, lambda t: t.detach().to(reference_device(model)))
    count = min(one.samples.count, 3)
    small = one.samples.take(inputs, range(count))
    for other in others:
        small = other.samples.take(small, range(min(other.samples.count, 8)))
    if one.rank == 1 or count < 2:
        return None
    # Short inputs are tried first to save time. Some models run only on inputs of the full length.
    for given, samples in ((small, count), (inputs, one.samples.count)):
        try:
            with slow_path():
                before, after = (
                    _compared(tensors_in(call(copy, x)), one)
                    for x in (given, _with_another_first(given, one.samples.axis))
                )
        except Exception:
            continue
        # Both tensors have the shape (rows, all other features).
        a, b = before.movedim(one.axis, 0).flatten(1), after.movedim(one.axis, 0).flatten(1)
        # A comparison with NaN is False. In this form, a row with NaN counts as changed.
        moved = ~((a - b).abs().amax(1) <= SAME * a.abs().max())
        if not bool(moved.any()):
            return None
        return bool(int(moved.sum()) > len(a) // samples)
    return None


def _compared(outputs: Sequence[Tensor], one: _Candidate) -> Tensor:
    """Returns the output in which entries along the axis of a candidate are compared.

    It is the output whose shape showed the axis. The outputs before it may have other axes: those of CLIP begin with a
    table of the similarities of all samples, in which every sample changes a row and a column.
    """
    fit = [t for t in (outputs[one.output], *outputs) if t.is_floating_point() and t.dim() > one.axis]
    return fit[0]


def _with_another_first(inputs: Any, axis: int) -> Any:
    """Returns the inputs with other values in the first sample of their first tensor that has this axis."""
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
            # Integers are indices, such as token ids. The new ids stay between the smallest and the largest id, because
            # a larger id may be outside of the vocabulary. If all ids are equal, each is reduced by 1, or set to 1 if
            # it is 0.
            low, high = int(tensor.min()), int(tensor.max())
            if high > low:
                first.copy_((first - low + 1) % (high - low + 1) + low)
            else:
                first.copy_(first - 1 if low else first + 1)
        return result

    return map_tensors(inputs, changed)
