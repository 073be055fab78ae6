"""Exactness: the one tolerance and the one comparison of a pruned model with the gated dense one.

Every check that a cut is exact, in surgery, discovery and the conformance tests, ends up here. A proof is

- one forward of the dense model with the removed units' gates at 0, and one of the pruned model;
- on the same inputs, with the same random numbers, in eval mode;
- at float32 or better, whatever the caller allows for products and whatever dtype the model has;
- each output judged by its own size, down to TOLERANCE of it.

Where float32 finds a difference, float64 has the last word: rounding vanishes there, a wrong cut does not.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.unit_kind import unit_kind
from xprune.errors import SurgeryError, XPruneError
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.forward import error_text
from xprune.modules.paths import tensor_at
from xprune.surgery.cut import remove_units
from xprune.surgery.outputs import OTHER_SEED, SECOND, SEED, Outputs, Runs

TOLERANCE = 1e-4
"""The largest error allowed in an output, as a share of the output's own size.

See `Difference.scale` for the size. Where float32 finds a larger error, float64 decides, down to NOISE.
"""
FLOOR = 1e-2
"""Least size of numbers that are all alike, as a share of their largest absolute value: years, prices, temperatures."""
NOISE = 2.0**-29 * 1000
"""The largest error allowed in float64, as a share of what rounding to float32 does to the output.

float64 has 29 bits more. An output that is nothing but rounding (a difference of equal numbers) has no size of its own
to be judged by.
"""


class Difference(NamedTuple):
    """How far an output of the pruned model is from that of the gated one.

    Args:
        error: The largest absolute difference; infinite where numbers that cannot be rounded differ, NaN where one is.
        scale: The size of the numbers that differ: how far they lie apart, but at most their largest absolute value and
            at least FLOOR of it. Numbers that are equal to the last bit, such as the -1e9 of a mask, do not count.
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


def prove(
    model: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example_inputs: Any,
    thorough: bool = True,
    *,
    twice: bool = False,
    own: bool = False,
) -> Finding:
    """Compares the pruned model with the gated dense one; see `problem` and `Runs` for the arguments.

    First in the model's arithmetic, then in float64; then it looks for a reason in the dense model.
    """
    runs = Runs(model, example_inputs, twice=twice, own=own)
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
    """The error of the pruned against the gated dense model, of the output that is worst for its size.

    Raises:
        SurgeryError: The pruned model is not exact. The message names the sites to blame, or says what of the dense
            model makes a comparison impossible.
    """
    found = prove(model, pruned, plan, example_inputs, twice=True)
    if found.of_model:
        raise SurgeryError(f"{found.problem}. Your model is untouched.")
    if found.problem:
        raise SurgeryError(f"{found.problem}. {_blame(model, plan, example_inputs)}")
    return found.difference.error


def problem(
    model: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    thorough: bool = True,
    own: bool = False,
) -> str | None:
    """Why the pruned model is not exact, in one sentence; None where it is.

    Args:
        model: The dense model. It is not changed.
        pruned: The model that the plan was carried out on. It is not changed.
        plan: The units that stayed.
        example_inputs: What both are called with.
        thorough: Look again in float64 where float32 finds a difference, and look for a reason in the dense model.
            Without it a search over many proposals takes less time, but may refuse honest outputs that are tiny.
        own: Both models are nobody else's, and are not looked at afterwards. It saves copies.
    """
    try:
        return prove(model, pruned, plan, example_inputs, thorough, own=own).problem or None
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
    return list(Runs(model, example_inputs).gated(plan).values())


def effect(model: nn.Module, plan: Plan, example_inputs: Any) -> Difference:
    """What closing the gates of the units that the plan lets go does to the outputs."""
    return _effect(Runs(model, example_inputs), plan)


def _effect(runs: Runs, plan: Plan) -> Difference:
    full = Plan.full(plan.sites)
    return _worst(*_alike(lambda twice: runs.gated(full, twice), lambda twice: runs.gated(plan, twice)))


def changes(model: nn.Module, plan: Plan, example_inputs: Any) -> bool:
    """True where the gates of the units that the plan lets go change an output by more than rounding does."""
    for dtype, rounding in ((None, 1e-5), (torch.float64, 1e-10)):  # a change may be small and still be one
        if _effect(Runs(model, example_inputs, dtype), plan).relative > rounding:
            return True
    return False


def randomness(model: nn.Module, example_inputs: Any) -> str:
    """Why the model's outputs cannot be compared with those of another call, in one sentence; "" where they can."""
    return _randomness(Runs(model, example_inputs))


class _ForwardFailed(Exception):
    """Which forward failed, and with what."""


def _comparisons(runs: Runs, pruned: nn.Module, plan: Plan) -> Iterator[tuple[str, Outputs, Outputs]]:
    """All that has to be equal: what is judged, what it should give, what it gives.

    That is the pruned model and the gated one; and, where gates need another class of a module, the dense model with
    gates of 1 and the dense model: that class and the pruned one may be wrong alike.
    """

    def run(what: str, forward: Callable[[bool], Outputs]) -> Callable[[bool], Outputs]:
        def named(twice: bool) -> Outputs:
            try:
                return forward(twice)
            except XPruneError:
                raise
            except Exception as failure:
                raise _ForwardFailed(f"{what} fails with {_said(failure)}") from failure

        return named

    gated = run("the model's forward with gates on it", lambda twice: runs.gated(plan, twice))
    cut = run("the pruned forward", lambda twice: runs.pruned(pruned, twice))
    yield "the pruned model", *_alike(gated, cut)
    swapped = tuple(s for s in plan.sites if s.adapter in ADAPTERS and ADAPTERS[s.adapter].gated)
    if swapped:
        dense = run("the model's forward", lambda twice: runs.dense(SEED, twice))
        whole = run("the model's forward with gates on it", lambda twice: runs.gated(Plan.full(swapped), twice))
        yield "the dense model with gates of 1", *_alike(dense, whole)


def _alike(first: Callable[[bool], Outputs], second: Callable[[bool], Outputs]) -> tuple[Outputs, Outputs]:
    """What two models return, of a second call too where one of them left traces of the first."""
    a, b = first(False), second(False)
    if any(name.endswith(SECOND.strip()) for name in {*a} ^ {*b}):
        return first(True), second(True)
    return a, b


def _once(runs: Runs, pruned: nn.Module, plan: Plan) -> Finding:
    """One comparison of all that has to be equal."""
    worst = Difference()
    try:
        for what, expected, got in _comparisons(runs, pruned, plan):
            if (shapes := _shapes(got)) != _shapes(expected):
                return Finding(problem=f"outputs were {_shapes(expected)} and are now {shapes}")
            found = _worst(expected, got)
            if not found.exact:
                return Finding(found, f"{what} {found}")
            worst = max(worst, found, key=lambda difference: difference.relative)
    except _ForwardFailed as failure:
        return Finding(problem=str(failure))
    return Finding(worst)


def _said(failure: Exception) -> str:
    return error_text(failure).rstrip(".: \n")


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
    return float((expected - got).abs().max()), _size(expected)


def _size(numbers: Tensor) -> float:
    """How large numbers are that are compared: how far they lie apart, since an offset says nothing of what varies.

    At least FLOOR of the largest absolute value, which float32 can tell apart.
    """
    largest, apart = float(numbers.abs().max()), float(numbers.max() - numbers.min())
    return max(min(apart, largest), FLOOR * largest) if apart else largest


def _in_float64(runs: Runs, pruned: nn.Module, plan: Plan) -> Difference | None:
    """The worst difference in float64, None where the pruned model is not exact there either or does not run."""
    if runs.dtype is torch.float64:
        return None
    wide, worst = Runs(runs.model, runs.given, torch.float64, twice=runs.twice), Difference()
    try:
        pairs = list(zip(_comparisons(runs, pruned, plan), _comparisons(wide, pruned, plan), strict=True))
    except Exception:  # not every operation has a float64 version
        return None
    for (_, coarse, _), (_, fine, got) in pairs:
        if coarse.keys() != fine.keys() or _shapes(fine) != _shapes(got):
            return None
        for name in fine:
            found = Difference(*_apart(fine[name], got[name]), name)
            if not (found.exact or found.error <= NOISE * _noise(coarse[name], fine[name], got[name])):
                return None
            worst = max(worst, found, key=lambda difference: difference.relative)
    return worst


def _noise(coarse: Tensor, fine: Tensor, got: Tensor) -> float:
    """What rounding to float32 does to the numbers of a float64 output that are in dispute; 0 for whole numbers."""
    differ = fine != got
    found = float((coarse[differ].to(fine.dtype) - fine[differ]).abs().max()) if fine.is_floating_point() else 0.0
    return found if found < float("inf") else 0.0


def _reason_in_dense(runs: Runs) -> str:
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


def _randomness(runs: Runs) -> str:
    for seed, why in (
        (SEED, "its forward gives other outputs at each call, with the same inputs and the same random numbers"),
        (OTHER_SEED, "its forward draws random numbers"),
    ):
        first, second = runs.dense(), runs.dense(seed)
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
            wrong = problem(
                model, remove_units(shared_copy(model), alone, ADAPTERS), alone, example_inputs, thorough=False
            )
        except Exception as failure:
            wrong = _said(failure)
        if wrong:
            shapes = ", ".join(f"{cut.tensor} {tuple(tensor_at(model, cut.tensor).shape)}" for cut in site.cuts[:4])
            bad.append(f"{site.name} ({len(keep)} of {unit_kind(site.kind).many(site.size)} kept; {shapes})")
    if not bad:
        return "No site fails alone; together they do. Your model is untouched."
    names = [entry.split(" ")[0] for entry in bad]
    return (
        f"Not exact: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. Your model is untouched. Leave them out: "
        f"find_sites(..., exclude={names[:5]}), or write an adapter for their class."
    )
