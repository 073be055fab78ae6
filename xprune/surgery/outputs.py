"""Runs the dense, the gated and the pruned model under the same conditions, and collects all tensors they return.

The proof in `exactness` compares these tensors.
"""

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
"""SEED is the seed of the random numbers of every forward. OTHER_SEED is used for one more forward of the dense model.

If the outputs of that forward differ, the model draws random numbers in eval mode.
"""


SECOND = " of the second call"
"""The end of the name of an output that comes from the second call of a model."""


KEPT = 4
"""The outputs of this many plans are kept. Outputs may be large."""


Outputs = dict[str, Tensor]
"""The tensors that a model returns. A key is the place of a tensor in the returned value: "['logits']", "[0].mean".

If the model returns one tensor, its key is "".
"""


class Runs:
    """Runs the forwards of one proof, each in the same dtype and with the same random numbers.

    Each forward runs in eval mode, on a copy that shares the weights of the model. TF32 and similar shortcuts are off,
    see `exact_arithmetic`. If the tensors of a model have a narrower dtype than the proof, such as bfloat16, the model
    is not converted. Instead each operation computes in the wider dtype, see `lifted`. Only if this fails, copies of
    the whole models are converted.

    Args:
        model: The dense model.
        example_inputs: The inputs that the models are called with. They are cloned before each call, since a forward
            may write into them.
        dtype: The dtype to compute in. If None, it is float64 for a model whose floating-point tensors are all float64,
            and float32 for any other model.
        twice: If True, each model is called a second time, and the outputs of the second call are added. If False, this
            happens only if the first forward changed something in the model.
        own: If True, the models are run directly, and the caller must not use them afterwards. If False, copies of them
            are run.

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
        self._gated: dict[tuple[Any, ...], Outputs] = {}
        # A copy of the dense model that is as it was made.
        self._clean: nn.Module | None = None
        # It becomes True if the operations of the model cannot compute in the wider dtype, see `lifted`. Then whole
        # copies are converted to it.
        self.copies = False
        device = reference_device(model)
        self.inputs = map_tensors(example_inputs, lambda t: t.to(device, self.dtype if t.is_floating_point() else None))

    def dense(self, seed: int = SEED, twice: bool = False) -> Outputs:
        """Returns the outputs of the dense model.

        Args:
            seed: The seed of all random numbers.
            twice: If True, the outputs of a second call are added, even if `Runs` was made with `twice=False`.
        """
        return self._run_dense(Plan((), ()), seed, twice)

    def gated(self, plan: Plan, twice: bool = False) -> Outputs:
        """Returns the outputs of the dense model with gates of 0 on the units that the plan removes.

        The outputs of the last plans are kept, and are returned again for the same plan. For `twice`, see `dense`.
        """
        key = plan, twice, self.copies
        found = self._gated.pop(key, None)
        if found is None:
            found = self._run_dense(plan, SEED, twice)
        self._gated[key] = found  # the last one used comes last
        if len(self._gated) > KEPT:
            del self._gated[next(iter(self._gated))]
        return found

    def pruned(self, model: nn.Module, twice: bool = False) -> Outputs:
        """Returns the outputs of a pruned model. For `twice`, see `dense`.

        Call `dense` or `gated` before it. They find out whether operations can compute in the wider dtype. The pruned
        model has to run in the same way.
        """
        return self._run(model, Plan((), ()), SEED, twice)

    def _run_dense(self, plan: Plan, seed: int, twice: bool) -> Outputs:
        """Runs the dense model, and finds out whether its operations can compute in the wider dtype, see `lifted`.

        If they cannot, the whole copy is converted to the wider dtype, now and in all later runs. If the converted copy
        fails too, the first error is raised.
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
        """Runs a model with gates of 0 on the units that the plan removes. Returns all tensors that the model returns.

        Raises:
            SurgeryError: The model returns no tensor.
        """
        copy = self._copy_of(model)
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
            after = _traces(copy)
            # A forward may leave features of units in the model, for example in a cache. The next call uses them, so
            # the outputs of a second call are compared too.
            if twice or self.twice or after != before:
                with self._lifting():
                    found |= {f"{name}{SECOND}".strip(): t for name, t in _named(self._call(copy))}
                after = _traces(copy)
        # Gates are off again. If the forward changed nothing in the copy, it serves the next run.
        if model is self.model and not self.copies and after == before:
            self._clean = copy
        if not found:
            raise SurgeryError(
                "the model returns no tensor that could be compared. Change its forward so that it returns tensors. "
                "They may be inside tuples, lists, mappings and objects."
            )
        return found

    def _copy_of(self, model: nn.Module) -> nn.Module:
        """Returns a copy of a model for one run, or the model itself if it may be used up."""
        if self.own:
            return model.eval()
        if model is self.model and self._clean is not None:
            clean, self._clean = self._clean, None
            return clean
        # A forward may write into its buffers. Tensors that are made in inference mode do not allow that.
        with torch.inference_mode(False):
            copy = shared_copy(model)
        return fill(copy).to(self.dtype) if self.copies else copy

    def _call(self, model: nn.Module) -> Any:
        """Calls a model with a fresh copy of the inputs, since a forward may write into them. Returns its output."""
        return call(model, map_tensors(self.inputs, Tensor.clone))

    @contextmanager
    def _lifting(self) -> Iterator[None]:
        """Makes each operation in a `with` block compute in the wider dtype, if the model needs it.

        A model needs it if its tensors have a narrower dtype and it is not converted as a whole.
        """
        if self.lifts and not self.copies:
            with lifted(self.dtype):
                yield
        else:
            yield


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Types whose objects are compared by value. All others are compared by identity."""


def _traces(model: nn.Module) -> list[Any]:
    """Returns a list that changes if a forward changes something in the model, such as a cache.

    The list is compared before and after a forward. It covers the attributes and buffers of all modules. A plain value
    is in the list itself. Any other object is in it by its identity. For a tensor there is also its version number,
    which rises when an operation writes into the tensor. Containers and objects are followed to a depth of 4. The list
    keeps the objects alive, so that no new object gets the identity of an old one.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def mark(value: Any, depth: int) -> None:
        """Adds a value, and the values that it contains, to the list."""
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
            # The attributes that every module has hold weights and hooks, which do not change in a forward. They also
            # hold the buffers, which may change, so buffers are added below.
            if name not in EVERY_MODULE_HAS:
                mark(value, 0)
        for buffer in module.buffers(recurse=False):
            mark(buffer, 0)
    return found


class _Same:
    """A wrapper that equals another one only if both hold the same object.

    Args:
        thing: The object.
    """

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    __hash__ = object.__hash__


def _named(value: Any, name: str = "", inside: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of each tensor that a model returns. The name is its place, such as "[0].mean".

    NumPy arrays, floats and complex numbers count as tensors. Tuples, lists, mappings and the attributes of objects are
    searched. Python's integers, strings and generators are left out. The key-value caches of transformers are left out
    too, since a model with fewer heads caches fewer keys and values.

    Args:
        value: The returned value, or a part of it.
        name: The place of `value` in the returned value.
        inside: The ids of the objects that contain `value`. They are not searched again, since an object may refer to
            an object that contains it.
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
    # The items of a larger set have no fixed order, so they cannot be matched between two models.
    elif isinstance(value, (set, frozenset)) and len(value) == 1:
        yield from _named(next(iter(value)), f"{name}{{}}", (*inside, id(value)))
    elif isinstance(value, (Mapping, tuple, list, deque)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(item, f"{name}[{key!r}]", (*inside, id(value)))
    else:
        attributes = {key: getattr(value, key) for key in slots_of(type(value)) if hasattr(value, key)}
        for key, item in {**attributes, **getattr(value, "__dict__", {})}.items():
            yield from _named(item, f"{name}.{key}", (*inside, id(value)))


def _is_cache(value: object) -> bool:
    """Returns True for a key-value cache of transformers, such as `DynamicCache`. Does not import transformers."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "transformers.cache_utils.Cache" for kind in type(value).__mro__
    )
