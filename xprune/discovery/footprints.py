"""Finds out which entries of which tensors each unit depends on. Gradients show it, whoever wrote the module.

A unit is a block of the consumer's input features, such as the features of one head. The gradient of these features
with respect to a weight is zero, except in the rows that the unit is computed from. These rows are the footprint of the
unit in the weight. If the rows of one head are different from those of all other heads, they can be removed together
with the head. So a footprint answers what the shapes of tensors leave open: the order of q, k and v in a fused layer,
groups of queries, tables and biases with an entry for each head, and weights that all heads share.

Two things hide a footprint, and are taken care of:

- A norm layer over all units makes each feature depend on all others. While gradients are computed, the statistics of
  norm layers are constants. Afterwards the norm layer is part of the site.
- The gradient of a key's bias is zero, since a softmax ignores it. A bias follows the weight of its layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from xprune.core.site import Cut
from xprune.discovery.watch import SOFTMAX
from xprune.modules.calls import map_tensors, slow_path, tensors_in
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.norms import BATCH_NORMS, is_feature_norm
from xprune.modules.paths import part_at, tensor_at

SMALL = {torch.float64: 1e-11, torch.float32: 1e-6}
"""Gradients below this fraction of the largest gradient are rounding errors, by dtype."""


class _Seen(Exception):
    """Ends a forward pass once the input of the consumer is known."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that units may depend on: a parameter or buffer of the module, or an argument of its call.

    Attributes:
        name: The name of the tensor in the module. For an argument, "@" and its name or position, such as "@mask" or
            "@0". "argument" for a tensor inside an argument.
        shape: Its shape.
        given: True for an argument, False for a tensor of the module.

    Example:
        >>> Leaf("qkv.weight", (24, 8)).given
        False
    """

    name: str
    shape: tuple[int, ...]
    given: bool = False


class Footprints:
    """The footprints of blocks of features in the input of one layer.

    Args:
        alone: A model that contains the module, and calls it with (args, kwargs). Its weights have noise.
        inputs: The arguments (args, kwargs).
        consumer: The path of the layer in `alone`, or of a parameter by which its owner multiplies.
        axis: The axis of the layer's input that holds the features, or the axis of the parameter.

    Attributes:
        features: The number of features of the consumer's input. 0 if the forward does not reach the consumer, or if no
            gradient can be computed.

    Example:
        >>> from xprune.discovery.alone import Alone
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        >>> prints = Footprints(Alone(mlp), ((torch.randn(3, 4),), {}), "module.2", -1)
        >>> prints.features
        6
        >>> [(cut.tensor, cut.axis) for cut in prints.cuts(6)]
        [('module.0.weight', 0), ('module.0.bias', 0)]
    """

    def __init__(self, alone: nn.Module, inputs: Any, consumer: str, axis: int) -> None:
        self.axis, self.features = axis, 0
        self.leaves: list[Leaf] = []
        self.dtype = torch.float64
        self._tensors: list[Tensor] = []
        self._x: Tensor | None = None
        self._scores: list[Tensor] = []
        self._keys: list[int] = []
        self._known: dict[tuple[int, ...], list[Tensor | None]] = {}
        self._found: dict[tuple[int, str], list[tuple[Leaf, Cut]] | None] = {}
        # float64 tells a gradient of zero from a small one. Some forwards do not run in float64.
        for dtype in (torch.float64, torch.float32):
            try:
                self._run(alone, inputs, consumer, dtype)
            except Exception:
                continue
            if self._x is not None and self._x.requires_grad:
                self.dtype = dtype
                self.features = self._x.shape[self.axis]
                break

    def _run(self, alone: nn.Module, inputs: Any, consumer: str, dtype: torch.dtype) -> None:
        """Runs the module until the consumer is called, and keeps the input of the consumer."""
        twin = shared_copy(alone, requires_grad=True).to(dtype)
        self.leaves, self._tensors = [], []
        done = set[int]()
        for name, tensor in tensors(twin).items():
            if not tensor.is_floating_point() or id(tensor) in done:
                continue
            if not isinstance(tensor, nn.Parameter):
                # The statistics of a batch norm cannot have gradients. They are cut together with its weight.
                if isinstance(twin.get_submodule(name.rpartition(".")[0]), BATCH_NORMS):
                    continue
                tensor = tensor.detach().clone().requires_grad_()
                owner, _, last = name.rpartition(".")
                twin.get_submodule(owner).register_buffer(last, tensor)
            done.add(id(tensor))
            self.leaves.append(Leaf(name, tuple(tensor.shape)))
            self._tensors.append(tensor)

        def as_leaf(tensor: Tensor, name: str = "argument") -> Tensor:
            if not tensor.is_floating_point():
                return tensor.detach().clone()
            leaf = tensor.detach().to(dtype).clone().requires_grad_()
            self.leaves.append(Leaf(name, tuple(leaf.shape), given=True))
            self._tensors.append(leaf)
            # A forward may write into its arguments, which a leaf does not allow.
            return leaf.clone()

        args, kwargs = inputs
        args = [self._given(value, f"@{place}", as_leaf) for place, value in enumerate(args)]
        kwargs = {name: self._given(value, f"@{name}", as_leaf) for name, value in kwargs.items()}
        for module in twin.modules():
            if is_feature_norm(module):
                module.register_forward_hook(_with_constant_statistics)

        # The other kernels of scaled_dot_product_attention refuse some inputs in float64.
        self._scores, self._keys = [], []
        with torch.enable_grad(), slow_path(), sdpa_kernel(SDPBackend.MATH), _ScoresSeen(self._scores, self._keys):
            if isinstance(part_at(twin, consumer), Tensor):
                self._run_to_the_end(twin, (tuple(args), kwargs), consumer)
                return

            def seen(_module: nn.Module, given: Any, named: Any) -> None:
                self._x = tensors_in((given, named))[0]
                raise _Seen

            twin.get_submodule(consumer).register_forward_pre_hook(seen, with_kwargs=True)
            with suppress(_Seen):
                twin(tuple(args), kwargs)

    def _run_to_the_end(self, twin: nn.Module, inputs: Any, weight: str) -> None:
        """Runs the module with a gate on each entry of a parameter, and keeps the gradients of these gates.

        The output is linear in a gate. So its gradient is the contribution of the unit, and depends on the weights that
        the unit is computed from.
        """
        owner, _, name = weight.rpartition(".")
        module, parameter = twin.get_submodule(owner), tensor_at(twin, weight)
        gate = torch.ones(parameter.shape[self.axis], dtype=parameter.dtype, requires_grad=True)
        shape = [1] * parameter.dim()
        shape[self.axis] = -1
        # An attribute of the instance comes before its parameters, so the forward reads the gated weight.
        vars(module)[name] = parameter * gate.view(shape)
        output = twin(*inputs)
        factor = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(output)
        (self._x,) = torch.autograd.grad((output * factor).sum(), gate, create_graph=True)
        self.axis = 0
        kept = [place for place, leaf in enumerate(self.leaves) if leaf.name != weight]
        self.leaves = [self.leaves[place] for place in kept]
        self._tensors = [self._tensors[place] for place in kept]

    def _given(self, value: Any, name: str, as_leaf: Callable[..., Tensor]) -> Any:
        """Returns one argument of the call with leaves in place of its tensors. Only a bare tensor gets its name."""
        return as_leaf(value, name) if isinstance(value, Tensor) else map_tensors(value, as_leaf)

    @torch.enable_grad()
    def _gradients(self, index: Sequence[int]) -> list[Tensor | None]:
        """Returns the absolute gradients of some features with respect to all leaves. None if there is no gradient."""
        key = tuple(index)
        if key not in self._known and self._x is not None:
            part = self._x.index_select(self.axis, torch.as_tensor(list(index)))
            weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(part)
            found = torch.autograd.grad((part * weights).sum(), self._tensors, retain_graph=True, allow_unused=True)
            self._known[key] = [None if g is None else g.abs() for g in found]
        return self._known[key]

    def blocks(self, size: int, layout: str = "unit-major") -> dict[int, list[int]]:
        """Returns the features of the first two units and of the last unit, by the index of the unit.

        Units whose features are all zero are left out, such as neurons that a ReLU sets to zero for all inputs. They
        have no footprint.
        """
        if self._x is None:
            return {}
        width, every = self.features // size, torch.arange(self.features)
        parts = every.view(size, width) if layout == "unit-major" else every.view(width, size).T
        live = self._x.detach().movedim(self.axis, 0).flatten(1).ne(0).any(1) if self._x.dim() > 1 else self._x.ne(0)
        alive = [unit for unit, part in enumerate(parts) if bool(live[part].all())]
        chosen = dict.fromkeys((*alive[:2], *alive[-1:])) if len(alive) > 1 else {}
        return {unit: parts[unit].tolist() for unit in chosen}

    def cuts(self, size: int, layout: str = "unit-major") -> list[Cut] | None:
        """Returns the cuts that remove the units, without those of the consumer.

        Args:
            size: The number of units to assume.
            layout: The order of the features of the units, see `Site.layout`.

        Returns:
            The cuts in the order of the module's tensors. None if the footprints of the units overlap in another way
            than that all units share some entries, or if a tensor cannot be cut along one axis.
        """
        found = self._cuts(size, layout)
        return None if found is None else [cut for leaf, cut in found if not leaf.given]

    def arguments(self, size: int, layout: str = "unit-major") -> list[tuple[Leaf, Cut]]:
        """Returns the arguments of the call that have an entry for each unit along one axis, with this axis."""
        found = self._cuts(size, layout)
        return [(leaf, cut) for leaf, cut in found or () if leaf.given]

    @torch.enable_grad()
    def of_scores(self, cuts: Sequence[Cut]) -> bool | None:
        """Returns True if the scores of an attention depend on one of these cuts, False if on none.

        A cut that touches only values removes features of values, and no heads. None if no scores were seen.
        """
        scores = [t for t in self._scores if t.requires_grad]
        if not scores:
            return None
        names = {cut.tensor for cut in cuts}
        wanted = [place for place, leaf in enumerate(self.leaves) if leaf.name in names]
        leaves = [self._tensors[place] for place in wanted]
        total = torch.stack([(t * torch.rand_like(t)).sum() for t in scores]).sum()
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) if leaves else ()
        return any(g is not None and bool(g.ne(0).any()) for g in found)

    @property
    def single_key(self) -> bool:
        """True if each token attends to one token only, so that the scores have no effect. Else False.

        There may be one token, or a mask may leave one.
        """
        if self._keys and max(self._keys) == 1:
            return True
        found = self._by_scores()
        return any(g is not None for g in found) and not any(g is not None and bool(g.ne(0).any()) for g in found)

    @torch.enable_grad()
    def _by_scores(self) -> Sequence[Tensor | None]:
        """Returns the gradients of the consumer's input with respect to the scores. None where there is none."""
        scores = [t for t in self._scores if t.requires_grad]
        if self._x is None or not self._x.requires_grad or not scores:
            return []
        weights = torch.rand_like(self._x)
        return torch.autograd.grad((self._x * weights).sum(), scores, retain_graph=True, allow_unused=True)

    @property
    def follows_attention(self) -> bool:
        """True if the input of the consumer depends on the scores of an attention, else False."""
        return any(g is not None for g in self._by_scores())

    def _cuts(self, size: int, layout: str) -> list[tuple[Leaf, Cut]] | None:
        """Returns (leaf, cut) of each leaf with an axis of units. None if the units cannot be told apart."""
        if (size, layout) not in self._found:
            self._found[size, layout] = self._divided(size, layout)
        return self._found[size, layout]

    def _divided(self, size: int, layout: str) -> list[tuple[Leaf, Cut]] | None:
        """Computes what `_cuts` returns."""
        if size < 2 or not self.features or self.features % size:
            return None
        blocks = self.blocks(size, layout)
        if not blocks:
            return None
        gradients = {unit: self._gradients(index) for unit, index in blocks.items()}
        largest = max(
            (float(g.max()) for gs in gradients.values() for g in gs if g is not None and g.numel()), default=0
        )
        small = SMALL[self.dtype] * largest
        found, of_owner = list[tuple[Leaf, Cut]](), dict[str, Cut]()
        # Weights come before biases.
        for position, leaf in sorted(enumerate(self.leaves), key=lambda item: -len(item[1].shape)):
            owner, _, name = leaf.name.rpartition(".")
            like = of_owner.get(owner)
            if like is not None and name == "bias" and leaf.shape == (like.length(size),):
                # A part of a bias may have no gradient, such as that of keys. It is divided like the weight's rows.
                found.append((leaf, replace(like, tensor=leaf.name, axis=0)))
                continue
            marks = {unit: _marks(gs[position], small) for unit, gs in gradients.items()}
            if all(mark is None for mark in marks.values()) or not leaf.shape:
                continue
            if any(mark is None for mark in marks.values()):
                if leaf.given:
                    continue
                # Only some units depend on this tensor at all, so it has no axis of units.
                return None
            cut = _cut_of(leaf, marks, size)  # type: ignore[arg-type]
            if cut is None:
                return None
            found += [(leaf, cut)] if cut.tensor else []
            if cut.tensor and name == "weight":
                of_owner[owner] = cut
        order = {leaf.name: position for position, leaf in enumerate(self.leaves)}
        found.sort(key=lambda item: order[item[0].name])
        return found if any(not leaf.given for leaf, _ in found) else None


class _ScoresSeen(TorchFunctionMode):
    """Notes the scores and the queries of attentions while a module runs.

    Args:
        seen: The list to which these tensors are added.
        keys: The list to which the numbers of keys are added.
    """

    def __init__(self, seen: list[Tensor], keys: list[int]) -> None:
        super().__init__()
        self.seen, self.keys = seen, keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tensors_in((args, kwargs or {}))
        if operands and ((func in SOFTMAX and operands[0].dim() > 2) or func is scaled_dot_product_attention):
            self.seen.append(operands[0])
            # The operands of scaled_dot_product_attention are queries and keys.
            self.keys.append(operands[0].shape[-1] if func in SOFTMAX else operands[1].shape[-2])
        return func(*args, **(kwargs or {}))


def _with_constant_statistics(norm: nn.Module, args: Any, output: Any) -> Any:
    """Returns the output of a norm layer, with gradients as if mean and variance were constants. A forward hook.

    The size of the gradients is not that of the norm layer, but only zeros matter here.
    """
    x = args[0] if args else None
    if not isinstance(output, Tensor) or not isinstance(x, Tensor) or x.shape != output.shape:
        return None
    result = output.detach() + (x - x.detach())
    for parameter in norm.parameters(recurse=False):
        if parameter.dim() == 1:
            axis = 1 if isinstance(norm, nn.GroupNorm) else -1
            shape = [1] * output.dim()
            shape[axis] = -1
            result = result + (parameter - parameter.detach()).view(shape)
        elif parameter.shape == output.shape[output.dim() - parameter.dim() :]:
            # The weight may have an entry for each head and feature.
            result = result + (parameter - parameter.detach())
    return result


def _marks(gradient: Tensor | None, small: float) -> Tensor | None:
    """Returns a tensor that is True where a unit depends on a leaf, or None if it depends on no entry."""
    if gradient is None:
        return None
    marks = gradient > small
    return marks if bool(marks.any()) else None


_SHARED = Cut("", 0)
"""Says that all units depend on the same entries of a leaf."""


def _cut_of(leaf: Leaf, marks: Mapping[int, Tensor], size: int) -> Cut | None:
    """Returns the cut of one leaf, `_SHARED` if the units share it, or None if the units cannot be told apart."""
    found, differs = list[Cut](), False
    for axis in range(len(leaf.shape)):
        others = [a for a in range(len(leaf.shape)) if a != axis]
        rows = {unit: mark.any(dim=others) if others else mark for unit, mark in marks.items()}
        first = next(iter(rows.values()))
        if all(bool((each == first).all()) for each in rows.values()):
            continue
        differs = True
        segments = _segments(rows, size)
        if segments is not None:
            found.append(Cut.of_segments(leaf.name, axis, segments))
    if len(found) == 1:
        # Other axes may differ by chance. For example, a ReLU sets a feature to zero for some tokens.
        return found[0]
    # A tensor whose entries differ along two axes would have to be cut along both.
    return None if (found or differs) and not leaf.given else _SHARED


def _segments(rows: Mapping[int, Tensor], size: int) -> tuple[int, ...] | None:
    """Finds how an axis is divided between the units.

    Args:
        rows: For some units, two of them neighbours, which entries along the axis the unit depends on. bool (entries,).
        size: The number of units.

    Returns:
        The segments of the axis in their order, see `Cut.segments`. None if there is no such division.
    """
    shared = torch.stack([*rows.values()]).all(0)
    own = {unit: (row & ~shared).nonzero().flatten().tolist() for unit, row in rows.items()}
    runs = {unit: _runs(entries) for unit, entries in own.items()}
    base = next(iter(runs))
    # The blocks that the unit 0 has, or would have.
    first = [(start - base * width, width) for start, width in runs[base]]
    if not first:
        return None
    for unit, each in runs.items():
        # The block of the unit lies `unit` widths after the block of the first unit, in each segment.
        if each != [(start + unit * length, length) for start, length in first]:
            return None
    length, end, segments = len(shared), 0, list[int]()
    for start, width in first:
        if start < end:
            return None
        segments += [end - start] if start > end else []
        segments.append(width)
        end = start + size * width
    if end > length:
        return None
    return (*segments, end - length) if end < length else tuple(segments)


def _runs(entries: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the runs of neighbouring numbers in an ascending list, as (first number, how many)."""
    runs = list[tuple[int, int]]()
    for entry in entries:
        if runs and entry == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((entry, 1))
    return runs
