"""Runs the dense, the gated and the pruned model under the same conditions, and collects all tensors they return."""

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
from xprune.modules.copies import EVERY_MODULE_HAS, reference_device, refuse_meta, shared_copy, tensors
from xprune.modules.digest import slots_of
from xprune.modules.precision import exact_arithmetic, lifted
from xprune.modules.sliced import fill
from xprune.modules.torch_private import version
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gates

SEED, OTHER_SEED = 0, 1
"""The seed of the random numbers of every forward, and another seed, which shows whether a forward draws any."""


SECOND = " of the second call"
"""The end of the name of an output that comes from the second call of a model."""


Outputs = dict[str, Tensor]
"""Every tensor that a model returns, by its place in the returned value: "['logits']", "[0].mean".

The name is "" if the model returns one tensor.
"""


class Runs:
    """Runs the forwards of one proof, each in the same dtype and with the same random numbers.

    Each forward runs on a copy that shares the weights of the model, in eval mode. The arithmetic is as exact as its
    dtype, see `exact_arithmetic`. A model in a narrower dtype is not converted. Each of its operations computes in the
    wider dtype, see `lifted`. Only if that fails, copies of the whole models are converted.

    Args:
        model: The dense model.
        example_inputs: The inputs that the models are called with. They are cloned before each call, since a forward
            may write into them.
        dtype: The dtype to compute in. None for float64 if all floating-point tensors of the model are in float64, else
            float32.
        twice: True to call each model a second time in any case. False to do so only if its forward left traces.
        own: True if the caller uses the models no more. They are then run themselves, not copies of them.

    Raises:
        ModelError: The model has no values, because it is on the meta device.

    Example:
        >>> Runs(nn.Linear(4, 2).to(torch.bfloat16), torch.ones(3, 4)).dense()[""].dtype
        torch.float32
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
        self.model, self.example_inputs, self.twice, self.own = model, example_inputs, twice, own
        refuse_meta(model)
        dtypes = {t.dtype for t in tensors(model).values() if t.is_floating_point()}
        self.dtype = dtype or (torch.float64 if dtypes == {torch.float64} else torch.float32)
        self.lifts = any(kind.itemsize < self.dtype.itemsize for kind in dtypes) or dtype is not None
        self.copies = False  # True once lifting has failed: whole copies are converted instead
        device = reference_device(model)
        self.inputs = map_tensors(example_inputs, lambda t: t.to(device, self.dtype if t.is_floating_point() else None))

    def dense(self, seed: int = SEED, twice: bool = False) -> Outputs:
        """Returns the outputs of the dense model.

        Args:
            seed: The seed of all random numbers.
            twice: True to add the outputs of a second call in any case.
        """
        return self._run_dense(Plan((), ()), seed, twice)

    def gated(self, plan: Plan, twice: bool = False) -> Outputs:
        """Returns the outputs of the dense model with the gates of removed units at 0, see `dense`."""
        return self._run_dense(plan, SEED, twice)

    def pruned(self, model: nn.Module, twice: bool = False) -> Outputs:
        """Returns the outputs of a pruned model, see `dense`. Call `dense` or `gated` first, see `_run_dense`."""
        return self._run(model, Plan((), ()), SEED, twice)

    def _run_dense(self, plan: Plan, seed: int, twice: bool) -> Outputs:
        """Runs the dense model, and finds out whether it runs while its operations are lifted.

        If it does not, this and all later runs convert whole copies. If it fails there too, the first error is raised.
        """
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
        """Runs a model with gates of 0 on the units that the plan removes. Returns all that it returns.

        Raises:
            SurgeryError: The model returns no tensor.
        """
        with torch.inference_mode(False):  # a forward may write into its buffers, which inference tensors refuse
            copy = model.eval() if self.own else shared_copy(model)
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
            before = _traces(copy)
            with self._lifting():
                found = dict(_named(self._call(copy)))
            # What a forward leaves in the model may hold features of units. The next call uses it, so it is compared.
            if twice or self.twice or _traces(copy) != before:
                with self._lifting():
                    found |= {f"{name}{SECOND}".strip(): t for name, t in _named(self._call(copy))}
        if not found:
            raise SurgeryError(
                "the model returns no tensor that could be compared. Return tensors. They may be inside tuples, lists, "
                "mappings and objects."
            )
        return found

    def _call(self, model: nn.Module) -> Any:
        """Returns what the model returns for a fresh copy of the inputs, into which it may write."""
        return call(model, map_tensors(self.inputs, Tensor.clone))

    @contextmanager
    def _lifting(self) -> Iterator[None]:
        """Computes each operation in the wider dtype, if the model is narrower and not converted as a whole."""
        if self.lifts and not self.copies:
            with lifted(self.dtype):
                yield
        else:
            yield


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Types whose objects are compared by value. All others are compared by identity."""


def _traces(model: nn.Module) -> list[Any]:
    """Returns a list that changes if a forward leaves something in the model.

    For the attributes and buffers of all modules, the list has plain values and the identities of other objects. For a
    tensor, it has the version too, which rises when something writes into the tensor. Containers and objects are
    followed to a depth of 4. The list holds the objects themselves, so that no new object gets the identity of an old
    one.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def mark(value: Any, depth: int) -> None:
        """Adds a value and what it contains."""
        if isinstance(value, _PLAIN):
            found.append(value)
            return
        found.append(_Same(value))
        if isinstance(value, Tensor):
            found.append(None if value.is_inference() else version(value))  # inference tensors have no version
        elif id(value) not in seen and not isinstance(value, (type, nn.Module)) and depth < 4:
            seen.add(id(value))  # objects may refer to each other in circles
            items = vars(value) if hasattr(value, "__dict__") else value
            if isinstance(value, Mapping):
                items = value
            for item in items.values() if isinstance(items, Mapping) else ():
                mark(item, depth + 1)
            for item in value if isinstance(value, (list, tuple)) else ():
                mark(item, depth + 1)

    for module in model.modules():
        for name, value in vars(module).items():
            # Torch's own attributes hold the weights and hooks, which do not change in a forward. Buffers may.
            if name not in EVERY_MODULE_HAS:
                mark(value, 0)
        for buffer in module.buffers(recurse=False):
            mark(buffer, 0)
    return found


class _Same:
    """Compares equal to another instance only if both hold the same object.

    Args:
        thing: The object.
    """

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    __hash__ = object.__hash__


def _named(value: Any, name: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor in what a model returns, with its place as its name.

    Arrays, floats and complex numbers count as tensors. Tuples, lists, mappings and the attributes of objects are
    searched. Left out are Python's integers, texts and generators. The caches of keys and values of transformers are
    left out too, since fewer heads leave fewer of them.

    Args:
        value: The returned value, or a part of it.
        name: The place of `value` in the returned value.
        inside: The ids of the objects that contain `value`. Objects may refer back to their owners.
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
        dtype = torch.complex128 if isinstance(value, complex) else torch.float64
        yield name, torch.tensor(value, dtype=dtype, device="cpu")
    elif isinstance(value, (str, bytes, type, nn.Module)) or id(value) in inside or _is_cache(value):
        return
    elif isinstance(value, (set, frozenset)) and len(value) == 1:  # the order of several items says nothing
        yield from _named(next(iter(value)), f"{name}{{}}", (*inside, id(value)))
    elif isinstance(value, (Mapping, tuple, list, deque)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(item, f"{name}[{key!r}]", (*inside, id(value)))
    else:
        attributes = {key: getattr(value, key) for key in slots_of(type(value)) if hasattr(value, key)}
        for key, item in {**attributes, **getattr(value, "__dict__", {})}.items():
            yield from _named(item, f"{name}.{key}", (*inside, id(value)))


def _is_cache(value: object) -> bool:
    """Returns True for the key-value caches of transformers, such as `DynamicCache`. Does not import transformers."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "transformers.cache_utils.Cache" for kind in type(value).__mro__
    )
