"""Exactness: the one tolerance and the one comparison of a pruned model with the gated dense one.

Every check that a cut is exact, in surgery, discovery and the conformance tests, ends up here. A proof is

- one forward of the dense model with the removed units' gates at 0, and one of the pruned model;
- on the same inputs, with the same random numbers, in eval mode;
- at float32 or better, whatever the caller allows for products and whatever dtype the model has;
- each output judged by its own size, down to TOLERANCE of it.

Where float32 finds a difference, float64 has the last word: rounding vanishes there, a wrong cut does not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.errors import SurgeryError, XPruneError
from xprune.modules.calls import call, map_tensors, slow_path
from xprune.modules.copies import alias, reference_device, tensors
from xprune.modules.paths import tensor_at
from xprune.modules.precision import exact_arithmetic, lifted
from xprune.modules.seeds import seeded
from xprune.modules.sliced import fill
from xprune.surgery.cut import remove_units
from xprune.surgery.gates import Gates

TOLERANCE = 1e-4
"""The largest error allowed in an output, as a share of that output's largest absolute value."""
NOISE = 2.0**-29 * 1000
"""The largest error allowed in float64, as a share of what rounding to float32 does to the output.

float64 has 29 bits more. An output that is nothing but rounding (a difference of equal numbers) has no size of its own
to be judged by.
"""
SEED, OTHER_SEED = 0, 1

Outputs = dict[str, Tensor]
"""Every tensor that a model returns, by where it stands in what is returned: "" for the only one, "['logits']"."""


class Difference(NamedTuple):
    """How far an output of the pruned model is from that of the gated one.

    Args:
        error: The largest absolute difference; infinite where numbers that cannot be rounded differ, NaN where one is.
        scale: The largest absolute value among the numbers that differ. Numbers that are equal to the last bit, such
            as the -1e9 of a mask, say nothing about the size of the others.
        output: Where the output stands in what the model returns.
    """

    error: float = 0.0
    scale: float = 0.0
    output: str = ""

    @property
    def exact(self) -> bool:
        """True where the error is within the tolerance."""
        return self.error <= TOLERANCE * self.scale

    @property
    def relative(self) -> float:
        """The error as a share of the scale, infinite where it is NaN."""
        if self.error != self.error:
            return float("inf")
        return self.error / self.scale if self.scale else float("inf" if self.error else 0.0)

    def __str__(self) -> str:
        where = f" in its output {self.output}" if self.output else ""
        if self.error != self.error:
            return f"gives NaN{where}"
        if self.error == float("inf"):
            return f"gives other whole numbers or infinities{where}"
        return f"is off by {self.error:.2e}{where} (outputs up to {self.scale:.2e})"


class Finding(NamedTuple):
    """What a proof found.

    Args:
        difference: The worst of the outputs.
        problem: Why the pruned model is not exact, in one sentence without a full stop; "" where it is.
        of_model: True where the dense model is the reason, so that no site is to blame.
    """

    difference: Difference = Difference()
    problem: str = ""
    of_model: bool = False


def prove(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any, thorough: bool = True) -> Finding:
    """Compares the pruned model with the gated dense one; see `problem` for the arguments.

    First in the model's arithmetic, then in float64; then it looks for a reason in the dense model.
    """
    runs = _Runs(model, example_inputs)
    found = _once(runs, pruned, plan)
    if not found.problem or not thorough:
        return found
    if found.difference.error:  # something was measured, which may be rounding
        again = _in_float64(runs, pruned, plan)
        if again is not None:
            return Finding(again)
    of_model = _reason_in_dense(runs)
    return Finding(found.difference, of_model, True) if of_model else found


def verify(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """The largest error of the pruned against the gated dense model.

    Raises:
        SurgeryError: The pruned model is not exact. The message names the sites to blame, or says what of the dense
            model makes a comparison impossible.
    """
    found = prove(model, pruned, plan, example_inputs)
    if found.of_model:
        raise SurgeryError(f"{found.problem}. Your model is untouched.")
    if found.problem:
        raise SurgeryError(f"{found.problem}. {_blame(model, plan, example_inputs)}")
    return found.difference.error


def problem(
    model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any, *, thorough: bool = True
) -> str | None:
    """Why the pruned model is not exact, in one sentence; None where it is.

    Args:
        model: The dense model. It is not changed.
        pruned: The model that the plan was carried out on. It is not changed.
        plan: The units that stayed.
        example_inputs: What both are called with.
        thorough: Look again in float64 where float32 finds a difference, and look for a reason in the dense model.
            Without it a search over many proposals takes less time, but may refuse honest outputs that are tiny.
    """
    try:
        return prove(model, pruned, plan, example_inputs, thorough).problem or None
    except XPruneError as refused:
        return str(refused)


def compare(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> tuple[float, float]:
    """(largest |gated - pruned|, largest |gated|) of the output that is worst for its size, in float32 or better.

    Raises:
        SurgeryError: A forward fails, or the outputs have other shapes.
    """
    found = prove(model, pruned, plan, example_inputs)
    if found.problem and found.difference.exact:  # no difference was measured
        raise SurgeryError(f"{found.problem}.")
    return found.difference.error, found.difference.scale


def close(expected: Tensor, got: Tensor) -> bool:
    """True where two tensors of one shape are equal up to TOLERANCE of the expected one's size."""
    return Difference(*_apart(expected, got)).exact


def gated_outputs(model: nn.Module, plan: Plan, example_inputs: Any) -> list[Tensor]:
    """Outputs of the dense model with the gates of removed units at 0, at float32 or better, in eval mode."""
    return list(_Runs(model, example_inputs).gated(plan).values())


def changes(model: nn.Module, plan: Plan, example_inputs: Any) -> bool:
    """True where the gates of the units that the plan lets go change an output by more than rounding does."""
    full = Plan.full(plan.sites)
    for dtype, rounding in ((None, 1e-5), (torch.float64, 1e-10)):  # a change may be small and still be one
        runs = _Runs(model, example_inputs, dtype)
        if _worst(*_both(runs, partial(runs.gated, full), partial(runs.gated, plan))).relative > rounding:
            return True
    return False


def randomness(model: nn.Module, example_inputs: Any) -> str:
    """Why the model's outputs cannot be compared with those of another call, in one sentence; "" where they can."""
    return _randomness(_Runs(model, example_inputs))


class _Runs:
    """The forwards of one proof: every one in the same arithmetic and with the same random numbers.

    Args:
        model: The dense model, which decides what is computed in: float64 where all of it is that, else float32.
        example_inputs: What the models are called with.
        dtype: Compute in this dtype instead.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, dtype: torch.dtype | None = None) -> None:
        self.model, self.given = model, example_inputs
        held = {t.dtype for t in tensors(model).values() if t.is_floating_point()}
        self.dtype = dtype or (torch.float64 if held == {torch.float64} else torch.float32)
        self.lifts = any(kind.itemsize < self.dtype.itemsize for kind in held) or dtype is not None
        self.twice = False  # call each model twice, since one of them remembers something
        self.copies = False  # convert whole copies, where the model does not run while operations are lifted
        device = reference_device(model)
        self.inputs = map_tensors(example_inputs, lambda t: t.to(device, self.dtype if t.is_floating_point() else None))

    def dense(self, seed: int = SEED) -> Outputs:
        """What the dense model returns."""
        return self._first(Plan((), ()), seed)

    def gated(self, plan: Plan) -> Outputs:
        """What the dense model returns with the gates of removed units at 0."""
        return self._first(plan, SEED)

    def pruned(self, model: nn.Module) -> Outputs:
        """What a pruned model returns."""
        return self._run(model, Plan((), ()), SEED)

    def _first(self, plan: Plan, seed: int) -> Outputs:
        """A forward of the dense model, which also finds out how it can be computed in the wanted dtype."""
        try:
            return self._run(self.model, plan, seed)
        except XPruneError:
            raise
        except Exception as failure:
            if not self.lifts or self.copies:
                raise
            self.copies = True
            try:
                return self._run(self.model, plan, seed)
            except Exception:
                self.copies = False
                raise failure from None

    def _run(self, model: nn.Module, plan: Plan, seed: int) -> Outputs:
        with torch.inference_mode(False):  # what is copied can then be written to
            copy = alias(model, own_state=True)
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
            self.twice = self.twice or _marks(copy) != before
            if self.twice:  # what it remembers may hold units: the next call shows them
                with self._lifted():
                    found |= {f"{name} of the second call".strip(): t for name, t in _named(self._call(copy))}
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
            found.append(None if value.is_inference() else value._version)
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
            if name not in _OWN or name == "_buffers":
                mark(value, 0)
    return found


_OWN = set(vars(nn.Module()))
"""What every module has: its tensors, parts and hooks."""


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
    if isinstance(value, float):
        yield name, torch.tensor(value, dtype=torch.float64, device="cpu")
    elif isinstance(value, (str, type, nn.Module)) or id(value) in inside or _is_cache(value):
        return
    elif isinstance(value, (Mapping, tuple, list)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(item, f"{name}[{key!r}]", (*inside, id(value)))
    else:
        for key, item in getattr(value, "__dict__", {}).items():
            yield from _named(item, f"{name}.{key}", (*inside, id(value)))


def _is_cache(value: object) -> bool:
    """True for the caches of transformers: `DynamicCache` and its kin."""
    return any(kind.__qualname__ == "Cache" for kind in type(value).__mro__)


class _Fails(SurgeryError):
    """A forward that fails; the message is the sentence for it."""


def _once(runs: _Runs, pruned: nn.Module, plan: Plan) -> Finding:
    """The worst of all comparisons in one arithmetic."""
    worst = Difference()
    try:
        for who, expected, got in _comparisons(runs, pruned, plan):
            if _shapes(expected) != _shapes(got):
                return Finding(problem=f"outputs were {_shapes(expected)} and are now {_shapes(got)}")
            found = _worst(expected, got)
            if not found.exact:
                return Finding(found, f"{who} {found}")
            worst = max(worst, found, key=lambda difference: difference.relative)
    except _Fails as failure:
        return Finding(problem=str(failure))
    return Finding(worst)


def _comparisons(runs: _Runs, pruned: nn.Module, plan: Plan) -> Iterator[tuple[str, Outputs, Outputs]]:
    """(who is judged, outputs expected of it, its outputs): all that a proof compares.

    The pruned model with the gated one. Where gates need another class of a module, also the dense model with the one
    that has gates of 1: that class and the pruned one may be wrong alike.
    """
    yield "the pruned model", *_both(runs, lambda: runs.gated(plan), lambda: runs.pruned(pruned))
    swapped = tuple(s for s in plan.sites if s.adapter in ADAPTERS and ADAPTERS[s.adapter].gated)
    if swapped:
        yield (
            "the dense model with gates of 1",
            *_both(runs, runs.dense, lambda: runs.gated(Plan.full(swapped)), "the gated"),
        )


def _both(
    runs: _Runs, one: Callable[[], Outputs], other: Callable[[], Outputs], name: str = "the pruned"
) -> tuple[Outputs, Outputs]:
    """What two models return, both called twice where one of them remembers something."""
    try:
        expected = one()
    except XPruneError:
        raise
    except Exception as failure:
        raise _Fails(f"the model's forward fails with gates on it, with {_said(failure)}") from failure
    called_twice = runs.twice
    try:
        got = other()
        return (one() if runs.twice and not called_twice else expected), got
    except XPruneError:
        raise
    except Exception as failure:
        raise _Fails(f"{name} forward fails with {_said(failure)}") from failure


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".rstrip(".: \n")


def _shapes(outputs: Outputs) -> Any:
    """The shapes of the outputs, by name where there are several."""
    found = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
    return found if len(found) > 1 or "" not in found else found[""]


def _worst(expected: Outputs, got: Outputs) -> Difference:
    """The output that differs most for its size."""
    found = [Difference(*_apart(expected[name], got[name]), name) for name in expected]
    return max(found, key=lambda difference: difference.relative, default=Difference())


def _apart(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """(error, scale) of one output, see `Difference`."""
    if expected.is_complex() and got.is_complex():
        expected, got = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(got.resolve_conj())
    if not (expected.is_floating_point() and got.is_floating_point()):
        return (0.0, 0.0) if torch.equal(expected, got) else (float("inf"), 0.0)
    if expected.isnan().any() or got.isnan().any():
        return float("nan"), 0.0
    differ = expected != got
    expected, got = expected[differ], got[differ].to(expected.device)
    if not expected.numel():
        return 0.0, 0.0
    if expected.isinf().any() or got.isinf().any():
        return float("inf"), 0.0
    return float((expected - got).abs().max()), float(expected.abs().max())


def _in_float64(runs: _Runs, pruned: nn.Module, plan: Plan) -> Difference | None:
    """The worst difference in float64, None where one of the comparisons fails there too or does not run."""
    if runs.dtype is torch.float64:
        return None
    wide, worst = _Runs(runs.model, runs.given, torch.float64), Difference()
    wide.twice = runs.twice
    try:
        pairs = zip(_comparisons(runs, pruned, plan), _comparisons(wide, pruned, plan), strict=True)
        for (_, coarse, _), (_, fine, got) in pairs:
            if not _shapes(coarse) == _shapes(fine) == _shapes(got):
                return None
            for name in fine:
                found = Difference(*_apart(fine[name], got[name]), name)
                if not (found.exact or found.error <= NOISE * _noise(coarse[name], fine[name], got[name])):
                    return None
                worst = max(worst, found, key=lambda difference: difference.error)
    except Exception:  # not every operation has a float64 version
        return None
    return worst


def _noise(coarse: Tensor, fine: Tensor, got: Tensor) -> float:
    """What rounding to float32 does to the numbers of a float64 output that are in dispute; 0 for whole numbers."""
    differ = fine != got
    found = float((coarse[differ].to(fine.dtype) - fine[differ]).abs().max()) if fine.is_floating_point() else 0.0
    return found if found < float("inf") else 0.0


def _reason_in_dense(runs: _Runs) -> str:
    """Why no pruned model can be compared with this dense one, "" where the dense one is fine."""
    try:
        outputs = runs.dense()
    except Exception as failure:
        return f"the model's own forward fails on the example inputs, with {_said(failure)}"
    bad = next((n for n, t in outputs.items() if t.is_floating_point() and bool(t.isnan().any())), None)
    if bad is not None:
        held = [n for n, t in tensors(runs.model).items() if t.is_floating_point() and bool(t.isnan().any())]
        where = f" in its output {bad}" if bad else ""
        weights = f": {', '.join(held[:3])}{' and others hold' if len(held) > 3 else ' holds'} NaN" if held else ""
        return f"the dense model itself gives NaN{where} on the example inputs{weights}"
    return _randomness(runs)


def _randomness(runs: _Runs) -> str:
    for seed, why in (
        (SEED, "its forward gives other outputs at each call, with the same inputs and the same random numbers"),
        (OTHER_SEED, "its forward draws random numbers"),
    ):
        first, second = _both(runs, runs.dense, partial(runs.dense, seed))
        if _shapes(first) != _shapes(second) or not _worst(first, second).exact:
            return (
                f"{why}, so that a pruned model cannot be compared with it: switch off in eval mode what is random, "
                "or give the random numbers as inputs"
            )
    return ""


def _blame(model: nn.Module, plan: Plan, example_inputs: Any) -> str:
    """Which sites fail when they are cut alone, and what to do about it."""
    bad = []
    for site, keep in zip(plan.sites, plan.keeps, strict=True):
        alone = Plan((site,), (keep,))
        try:
            wrong = problem(model, remove_units(alias(model), alone, ADAPTERS), alone, example_inputs, thorough=False)
        except Exception as failure:
            wrong = _said(failure)
        if wrong:
            shapes = ", ".join(f"{cut.tensor} {tuple(tensor_at(model, cut.tensor).shape)}" for cut in site.cuts[:4])
            bad.append(f"{site.name} ({len(keep)} of {site.size} {site.kind}s kept; {shapes})")
    if not bad:
        return "No site fails alone; together they do. Your model is untouched."
    names = [entry.split(" ")[0] for entry in bad]
    return (
        f"Not exact: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. Your model is untouched. Leave them out: "
        f"find_sites(..., exclude={names[:5]}), or write an adapter for their class."
    )
