"""Outputs: what the dense, the gated and the pruned model give, computed alike for one proof."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xprune.core.plan import Plan
from xprune.errors import SurgeryError, XPruneError
from xprune.modules.calls import call, map_tensors, slow_path
from xprune.modules.copies import EVERY_MODULE_HAS, alias, reference_device, refuse_meta, tensors
from xprune.modules.digest import slots_of
from xprune.modules.precision import exact_arithmetic, lifted
from xprune.modules.sliced import fill
from xprune.modules.torch_private import version
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gates

SEED, OTHER_SEED = 0, 1


SECOND = " of the second call"


Outputs = dict[str, Tensor]
"""Every tensor that a model returns, by where it stands in what is returned: "" for the only one, "['logits']"."""


class Runs:
    """The forwards of one proof: every one in the same arithmetic and with the same random numbers.

    Args:
        model: The dense model, which decides what is computed in: float64 where all of it is that, else float32.
        example_inputs: What the models are called with.
        dtype: Compute in this dtype instead.
        twice: Call each model a second time, whatever it seems to remember of the first.
        own: The models are nobody else's, and are not looked at afterwards: no copies are made.

    Raises:
        ModelError: The model has no values: it is on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        dtype: torch.dtype | None = None,
        *,
        twice: bool = False,
        own: bool = False,
    ) -> None:
        self.model, self.given, self.twice, self.own = model, example_inputs, twice, own
        refuse_meta(model)
        held = {t.dtype for t in tensors(model).values() if t.is_floating_point()}
        self.dtype = dtype or (torch.float64 if held == {torch.float64} else torch.float32)
        self.lifts = any(kind.itemsize < self.dtype.itemsize for kind in held) or dtype is not None
        self.copies = False  # convert whole copies, where the model does not run while operations are lifted
        device = reference_device(model)
        self.inputs = map_tensors(example_inputs, lambda t: t.to(device, self.dtype if t.is_floating_point() else None))

    def dense(self, seed: int = SEED, twice: bool = False) -> Outputs:
        """What the dense model returns. `twice`: in a second call too, even where the first left no traces."""
        return self._first(Plan((), ()), seed, twice)

    def gated(self, plan: Plan, twice: bool = False) -> Outputs:
        """What the dense model returns with the gates of removed units at 0."""
        return self._first(plan, SEED, twice)

    def pruned(self, model: nn.Module, twice: bool = False) -> Outputs:
        """What a pruned model returns."""
        return self._run(model, Plan((), ()), SEED, twice)

    def _first(self, plan: Plan, seed: int, twice: bool) -> Outputs:
        """A forward of the dense model, which also finds out how it can be computed in the wanted dtype."""
        try:
            return self._run(self.model, plan, seed, twice)
        except XPruneError:
            raise
        except Exception as failure:
            if not self.lifts or self.copies:
                raise
            self.copies = True
            try:
                return self._run(self.model, plan, seed, twice)
            except Exception:
                self.copies = False
                raise failure from None

    def _run(self, model: nn.Module, plan: Plan, seed: int, twice: bool) -> Outputs:
        with torch.inference_mode(False):  # what is copied can then be written to
            copy = model.eval() if self.own else alias(model)
        if self.copies:
            copy = fill(copy).to(self.dtype)
        values = []
        for site, keep in zip(plan.sites, plan.keeps, strict=True):
            value = torch.zeros(site.size, device="cpu")
            value[list(keep)] = 1.0
            values.append(value)
        with ExitStack() as stack:
            stack.enter_context(exact_arithmetic(self.dtype))
            stack.enter_context(seeded(seed))
            stack.enter_context(slow_path())
            stack.enter_context(Gates(plan.sites, values).attached(copy))
            before = _marks(copy)
            with self._lifted():
                found = dict(_named(self._call(copy)))
            # What it remembers of a call may hold units: then the next call shows them.
            if twice or self.twice or _marks(copy) != before:
                with self._lifted():
                    found |= {f"{name}{SECOND}".strip(): t for name, t in _named(self._call(copy))}
        if not found:
            raise SurgeryError(
                "the model returns no tensor that could be compared. Return tensors; they may stand in tuples, lists, "
                "mappings and objects."
            )
        return found

    def _call(self, model: nn.Module) -> Any:
        """What the model returns; it may write into its inputs."""
        return call(model, map_tensors(self.inputs, Tensor.clone))

    @contextmanager
    def _lifted(self) -> Iterator[None]:
        if self.lifts and not self.copies:
            with lifted(self.dtype):
                yield
        else:
            yield


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _marks(model: nn.Module) -> list[Any]:
    """What changes where a forward leaves something behind in the model: values, and tensors that it wrote into.

    Lists and mappings are looked into, and objects too. Things are held, so that no new one gets an old one's identity.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def mark(value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN):
            found.append(value)
            return
        found.append(_Same(value))
        if isinstance(value, Tensor):
            found.append(None if value.is_inference() else version(value))
        elif id(value) not in seen and not isinstance(value, (type, nn.Module)) and depth < 4:
            seen.add(id(value))
            items = vars(value) if hasattr(value, "__dict__") else value
            if isinstance(value, Mapping):
                items = value
            for item in items.values() if isinstance(items, Mapping) else ():
                mark(item, depth + 1)
            for item in value if isinstance(value, (list, tuple)) else ():
                mark(item, depth + 1)

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in EVERY_MODULE_HAS:
                mark(value, 0)
        for buffer in module.buffers(recurse=False):
            mark(buffer, 0)
    return found


class _Same:
    """Equal where it stands for the same thing."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    __hash__ = object.__hash__


def _named(value: Any, name: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, and every number that is not whole, in what a model returns, with its place in it.

    Whole numbers, texts and generators are left out, and caches of keys and values too: with fewer heads there are
    fewer of them.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            value = value.unbind()
        else:
            yield name, value if value.layout == torch.strided else value.to_dense()
            return
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fciub":
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, (float, complex)):
        yield (
            name,
            torch.tensor(value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64, device="cpu"),
        )
    elif isinstance(value, (str, bytes, type, nn.Module)) or id(value) in inside or _is_cache(value):
        return
    elif isinstance(value, (set, frozenset)) and len(value) == 1:  # several have no order to be compared in
        yield from _named(next(iter(value)), f"{name}{{}}", (*inside, id(value)))
    elif isinstance(value, (Mapping, tuple, list, deque)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(item, f"{name}[{key!r}]", (*inside, id(value)))
    else:
        held = {key: getattr(value, key) for key in slots_of(type(value)) if hasattr(value, key)}
        for key, item in {**held, **getattr(value, "__dict__", {})}.items():
            yield from _named(item, f"{name}.{key}", (*inside, id(value)))


def _is_cache(value: object) -> bool:
    """True for the caches of transformers: `DynamicCache` and its kin."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "transformers.cache_utils.Cache" for kind in type(value).__mro__
    )
