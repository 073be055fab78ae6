"""The proof that a pruned model is exact: the one comparison with the gated dense model, and the one tolerance.

What is proved: a unit reaches the outputs only through its consumers. If its gate is 0, the consumers read zeros in its
place. Cutting the unit out of the weights takes these zeros away and changes nothing else. So the gated dense model and
the pruned model have to give the same outputs, up to rounding.

Why this finds errors: the gated model uses the original weights and a few hooks. The pruned model uses smaller weights
and no hooks. If surgery takes a wrong index, forgets a tensor, or sets a wrong number of heads, their outputs differ.

What is not proved: that the pruned model is accurate. The proof compares two models that have lost the same units. It
also uses the example inputs only. If the forward takes another branch for longer sequences, this branch is not tested.

How it is proved:

1. The gated dense model and the pruned model each run one forward on the same example inputs.
2. Both run in eval mode, which switches dropout off. Both get the same random numbers, since some models draw random
   numbers in eval mode too.
3. Both compute in float32, also if the model is in bfloat16 or float16. They compute in float64 if the whole model is
   in float64. TF32 and autocast are off.
4. Each tensor that the model returns is compared separately, so that a large output hides no error in a small one. An
   error may be at most TOLERANCE times the size of the output, see `Difference.scale`. Integers have to be equal.
5. `verify` calls each model a second time and compares the second outputs too, because the first call may leave a cache
   in the model that holds features of removed units. The other functions call the models a second time only if the
   first forward changed something in a model.
6. An adapter may give the gated model another class (`Adapter.gated`). The dense model is then also compared with
   itself in that class, with gates of 1. Otherwise that class and the class of the pruned model could be wrong in the
   same way.
7. If float32 finds an error, everything is computed again in float64. An error by rounding almost vanishes there. A
   wrong cut gives the same error as before.
8. If the error remains, the dense model is examined. If it returns NaN or differs from call to call, no pruned model
   can be compared with it, and the error message says so.

Surgery, discovery and the conformance tests all use this comparison. `verify` raises an error, `problem` returns the
reason as text, and `prove` returns both numbers and text.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xprune.adapters import ADAPTERS
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.errors import SurgeryError, XPruneError
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.forward import error_text
from xprune.modules.paths import tensor_at
from xprune.surgery.cut import remove_units
from xprune.surgery.outputs import OTHER_SEED, SECOND, SEED, Outputs, Runs

TOLERANCE = 1e-4
"""The largest error that an output may have, as a fraction of the output's size.

`Difference.scale` defines the size. If the error in float32 is larger, the outputs are computed again in float64. There
an error up to NOISE is accepted too.
"""
FLOOR = 1e-2
"""The size of an output is at least this fraction of the output's largest absolute value, see `Difference.scale`.

This matters if the numbers of an output are nearly equal, such as years, prices or temperatures. Such numbers differ
from each other by little more than the rounding of float32.
"""
NOISE = 2.0**-29 * 1000
"""The largest error in float64 that is accepted as rounding, as a fraction of the rounding error in float32.

Both errors are of the same output. float64 has 29 more bits than float32, so rounding shrinks by 2**-29. The factor
1000 leaves room. Some outputs are nothing but rounding, for example the difference of two equal numbers. The size of
such an output says nothing about the error that is allowed in it.
"""
OF_ZERO = 64 * 2.0**-52
"""The largest error that is accepted as rounding in an output that is exactly 0 in the dense model.

It is 64 times the rounding of float64 at 1. Such an output has no size, for example the sum of probabilities minus 1 in
a float64 model. In other dtypes, errors are compared with rounding, see NOISE.
"""


class Difference(NamedTuple):
    """How much an output of the pruned model differs from the same output of the gated model.

    Args:
        error: The largest absolute difference. It is infinite if integers, booleans or infinities differ. It is NaN if
            a number is NaN.
        scale: The size of the output, with which the error is compared. Only the numbers that differ between the two
            models count, so that the -1e9 of an attention mask does not hide an error in another number. The size is
            the largest of these numbers minus the smallest, but at most their largest absolute value and at least FLOOR
            times that value. So an offset that all numbers have in common hides no error.
        output: The place of the output in the value that the model returns, such as "['logits']". It is "" if the model
            returns one tensor.

    Example:
        >>> Difference(error=1e-6, scale=2.0).exact, Difference(error=0.5, scale=2.0).exact
        (True, False)
        >>> print("the pruned model", Difference(0.5, 2.0, "['logits']"))
        the pruned model is off by 5.00e-01 in its output ['logits'] (size of the output: 2.00e+00)
    """

    error: float = 0.0
    scale: float = 0.0
    output: str = ""

    @property
    def exact(self) -> bool:
        """True if the error is within TOLERANCE. False if it is larger or NaN."""
        return self.error <= TOLERANCE * self.scale or (self.scale == 0 and self.error <= OF_ZERO)

    @property
    def relative(self) -> float:
        """The error as a fraction of the scale. It is infinite if the error is NaN.

        If the scale is 0, it is 0 without an error, and infinite with an error.
        """
        if self.error != self.error:
            return float("inf")
        return self.error / self.scale if self.scale else float("inf" if self.error else 0.0)

    def __str__(self) -> str:
        where = f" in its output {self.output}" if self.output else ""
        if self.error != self.error:
            return f"gives NaN{where}"
        if self.error == float("inf"):
            return f"gives other whole numbers or infinities{where}"
        return f"is off by {self.error:.2e}{where} (size of the output: {self.scale:.2e})"


class Finding(NamedTuple):
    """The result of a proof.

    Args:
        difference: The difference of the output with the largest error in proportion to its size.
        problem: The reason why the pruned model is not exact, in one sentence without a full stop. It is "" if the
            pruned model is exact.
        of_model: True if the dense model itself is the reason, so that no site is wrong. False otherwise.
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
    """Compares the pruned model with the gated dense model, and explains a difference.

    Args:
        model: The dense model. It is not changed unless `own` is True.
        pruned: The model from which the plan removed units. It is not changed unless `own` is True.
        plan: The units that stayed.
        example_inputs: The inputs that both models are called with.
        thorough: If True, an error in float32 leads to a second comparison in float64 and to a search for a reason in
            the dense model. False takes less time, but may refuse an exact model whose outputs are tiny.
        twice: If True, each model is called a second time, and the second outputs are compared too. If False, this
            happens only if the first forward changed something in a model.
        own: If True, both models are run directly, and the caller must not use them afterwards. If False, copies of
            them are run.

    Returns:
        The finding. If the forward of the pruned model fails, the finding says so, and no exception is raised.

    Raises:
        SurgeryError: The model returns no tensor.
        ModelError: The dense model is on the meta device or cannot be copied.

    Example:
        >>> from xprune import find_sites
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
        >>> x = torch.randn(3, 4)
        >>> plan = Plan(find_sites(model, x), keeps=((0, 2, 5),))
        >>> pruned = remove_units(shared_copy(model), plan, ADAPTERS)
        >>> prove(model, pruned, plan, x).problem
        ''
        >>> pruned[0][2].weight.data += 1  # what a wrong cut could look like
        >>> prove(model, pruned, plan, x).difference.exact
        False
    """
    return prove_with(Runs(model, example_inputs, twice=twice, own=own), pruned, plan, thorough)


def prove_with(runs: Runs, pruned: nn.Module, plan: Plan, thorough: bool = True) -> Finding:
    """Does the same as `prove` with the forwards of a dense model that the caller keeps for several plans.

    Args:
        runs: The forwards of the dense model.
        pruned: The model from which the plan removed units.
        plan: The units that stayed.
        thorough: See `prove`.
    """
    found = _compare(runs, pruned, plan)
    if not found.problem or not thorough:
        return found
    # The error is 0 if a forward failed or if shapes differ. float64 would not change that.
    if found.difference.error:
        in_float64 = _in_float64(runs, pruned, plan)
        if in_float64 is not None:
            return Finding(in_float64)
    of_model = _reason_in_dense(runs)
    return Finding(found.difference, of_model, True) if of_model else found


def verify(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """Raises an error unless the pruned model is exact.

    `apply` calls it before it returns a pruned model. Each model is called twice.

    Args:
        model: The dense model. It is not changed.
        pruned: The model from which the plan removed units. It is not changed.
        plan: The units that stayed.
        example_inputs: The inputs that both models are called with.

    Returns:
        The largest absolute difference in one output: the output with the largest error in proportion to its size.

    Raises:
        SurgeryError: The pruned model is not exact. The message names each site that is not exact even if it is pruned
            alone. Or it says why no model can be compared with the dense model.
        ModelError: The dense model is on the meta device or cannot be copied.
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
    """Returns the reason why the pruned model is not exact, in one sentence, or None if it is exact.

    Discovery calls this for each proposed site. If the comparison raises an XPruneError, its message is returned as the
    reason.

    Args:
        model: The dense model. It is not changed unless `own` is True.
        pruned: The model from which the plan removed units. It is not changed unless `own` is True.
        plan: The units that stayed.
        example_inputs: The inputs that both models are called with.
        thorough: If True, an error in float32 leads to a second comparison in float64 and to a search for a reason in
            the dense model. False takes less time in a search over many proposed sites, but may refuse an exact model
            whose outputs are tiny.
        own: If True, both models are run directly, and the caller must not use them afterwards. If False, copies of
            them are run.
    """
    return problem_with(Runs(model, example_inputs, own=own), pruned, plan, thorough=thorough)


def problem_with(runs: Runs, pruned: nn.Module, plan: Plan, *, thorough: bool = True) -> str | None:
    """Does the same as `problem` with the forwards of a dense model that the caller keeps for several plans."""
    try:
        return prove_with(runs, pruned, plan, thorough).problem or None
    except XPruneError as refused:
        return str(refused)


def compare(model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any) -> tuple[float, float]:
    """Measures how far the pruned model is from the gated dense model, in float32 or better.

    Args:
        model: The dense model. It is not changed.
        pruned: The model from which the plan removed units. It is not changed.
        plan: The units that stayed.
        example_inputs: The inputs that both models are called with.

    Returns:
        (error, scale) of the output with the largest error in proportion to its size, see `Difference`.

    Raises:
        SurgeryError: A forward fails, or the two models return different outputs in number or shape.
    """
    found = prove(model, pruned, plan, example_inputs)
    # There is a problem, but no difference was measured: a forward failed, or the shapes differ.
    if found.problem and found.difference.exact:
        raise SurgeryError(f"{found.problem}.")
    return found.difference.error, found.difference.scale


def close(expected: Tensor, got: Tensor) -> bool:
    """Returns True if two tensors of one shape are equal, up to TOLERANCE times the size of the expected one."""
    return Difference(*_error_and_scale(expected, got)).exact


def gated_outputs(model: nn.Module, plan: Plan, example_inputs: Any) -> list[Tensor]:
    """Returns all outputs of the dense model with gates of 0 on the removed units.

    The model runs in eval mode and computes in float32 or better.
    """
    return list(Runs(model, example_inputs).gated(plan).values())


def effect(model: nn.Module, plan: Plan, example_inputs: Any) -> Difference:
    """Measures how much the outputs of the dense model change if the gates of the removed units are 0.

    Args:
        model: The dense model. It is not changed.
        plan: The units that stay. The gates of all other units are 0.
        example_inputs: The inputs that the model is called with.

    Returns:
        The difference of the output that changes most in proportion to its size. An error of 0 means that the units
        have no effect on the outputs.
    """
    return effect_with(Runs(model, example_inputs), plan)


def effect_with(runs: Runs, plan: Plan) -> Difference:
    """Does the same as `effect` with the forwards of a dense model that the caller keeps for several plans."""
    full = Plan.full(_swapped(plan))
    return _worst(*_with_same_calls(lambda twice: runs.gated(full, twice), lambda twice: runs.gated(plan, twice)))


def changes(runs: Runs, plan: Plan) -> bool:
    """Returns True if gates of 0 on the removed units change an output by more than rounding, else False.

    Discovery asks this about a proposed site. If the units have no effect on the outputs, any cut of them gives the
    same outputs, and a proof would prove nothing.

    Args:
        runs: The forwards of the dense model.
        plan: The units that stay.
    """
    if effect_with(runs, plan).relative > 1e-5:
        return True
    # The change may be smaller than the rounding of float32.
    return effect_with(Runs(runs.model, runs.example_inputs, torch.float64), plan).relative > 1e-10


def randomness(model: nn.Module, example_inputs: Any) -> str:
    """Returns the reason why two forwards of the model cannot be compared, or "" if they can.

    The reason is one sentence, for example that the forward draws random numbers.
    """
    return _randomness(Runs(model, example_inputs))


class _ForwardFailed(Exception):
    """Raised if a forward of one of the compared models fails.

    The message has the name of the forward and the error.
    """


def _comparisons(runs: Runs, pruned: nn.Module, plan: Plan) -> Iterator[tuple[str, Outputs, Outputs]]:
    """Runs all models of a proof, and yields the pairs of outputs that have to be equal.

    The first pair compares the pruned model with the gated dense model. There is a second pair if gates need another
    class of a module. It compares the dense model in that class, with gates of 1, with the dense model as it is.

    Yields:
        (name of the model that is tested, outputs that it should give, outputs that it gives).
    """

    def run(what: str, forward: Callable[[bool], Outputs]) -> Callable[[bool], Outputs]:
        """Returns a function that calls the forward, and raises any error of it as `_ForwardFailed`."""

        def named(twice: bool) -> Outputs:
            try:
                return forward(twice)
            except XPruneError:
                raise
            except Exception as failure:
                raise _ForwardFailed(f"{what} fails with {_in_words(failure)}") from failure

        return named

    gated = run("the model's forward with gates on it", lambda twice: runs.gated(plan, twice))
    cut = run("the pruned forward", lambda twice: runs.pruned(pruned, twice))
    yield "the pruned model", *_with_same_calls(gated, cut)
    if swapped := _swapped(plan):
        dense = run("the model's forward", lambda twice: runs.dense(SEED, twice))
        whole = run("the model's forward with gates on it", lambda twice: runs.gated(Plan.full(swapped), twice))
        yield "the dense model with gates of 1", *_with_same_calls(dense, whole)


def _swapped(plan: Plan) -> tuple[Site, ...]:
    """Returns the sites whose adapter gives the gated model another class, see `Adapter.gated`."""
    return tuple(site for site in plan.sites if site.adapter in ADAPTERS and ADAPTERS[site.adapter].gated)


def _with_same_calls(first: Callable[[bool], Outputs], second: Callable[[bool], Outputs]) -> tuple[Outputs, Outputs]:
    """Returns the outputs of two models, each called the same number of times.

    A model is called again if its first forward changed something in it. This may happen in only one of the two models:
    an attention that was removed has no cache that could change. Then both models are called twice.
    """
    a, b = first(False), second(False)
    if any(name.endswith(SECOND.strip()) for name in {*a} ^ {*b}):
        return first(True), second(True)
    return a, b


def _compare(runs: Runs, pruned: nn.Module, plan: Plan) -> Finding:
    """Makes all comparisons of a proof in the dtype of these runs. Stops at the first one that fails."""
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


def _in_words(failure: Exception) -> str:
    """Returns the class and the message of an error, without a full stop at the end."""
    return error_text(failure).rstrip(".: \n")


def _shapes(outputs: Outputs) -> Any:
    """Returns a dict with the shape of each output by its name. If one output has no name, returns its shape only."""
    found = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
    return found if len(found) > 1 or "" not in found else found[""]


def _worst(expected: Outputs, got: Outputs) -> Difference:
    """Returns the difference of the output with the largest error in proportion to its size."""
    found = [Difference(*_error_and_scale(expected[name], got[name]), name) for name in expected]
    return max(found, key=lambda difference: difference.relative, default=Difference())


def _error_and_scale(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """Returns (error, scale) of one output, see `Difference`."""
    if expected.is_complex() and got.is_complex():
        # Real and imaginary parts are compared as two real numbers.
        expected, got = torch.view_as_real(expected.resolve_conj()), torch.view_as_real(got.resolve_conj())
    if not (expected.is_floating_point() and got.is_floating_point()):
        return (0.0, 0.0) if torch.equal(expected, got) else (float("inf"), 0.0)
    if expected.isnan().any() or got.isnan().any():
        return float("nan"), 0.0
    # Numbers that are equal to the last bit do not count for the size. This leaves out equal infinities too.
    differ = expected != got
    expected, got = expected[differ], got[differ].to(expected.device)
    if not expected.numel():
        return 0.0, 0.0
    if expected.isinf().any() or got.isinf().any():
        return float("inf"), 0.0
    return float((expected - got).abs().max()), _scale(expected)


def _scale(numbers: Tensor) -> float:
    """Returns the size of the numbers that differ, see `Difference.scale`.

    The size is the largest number minus the smallest: an offset that all numbers share, such as 2000 in years, says
    nothing about how much the answers of a model vary. The size is at least FLOOR times the largest absolute value,
    since numbers in float32 that are much closer differ only by rounding.
    """
    largest, spread = float(numbers.abs().max()), float(numbers.max() - numbers.min())
    return max(min(spread, largest), FLOOR * largest) if spread else largest


def _in_float64(runs: Runs, pruned: nn.Module, plan: Plan) -> Difference | None:
    """Makes all comparisons again in float64, where rounding is 2**29 times smaller.

    Returns:
        If all errors are within TOLERANCE or NOISE, the difference of the output with the largest error in proportion
        to its size. If the pruned model is not exact in float64 either, or if a model does not run in float64, None.
    """
    if runs.dtype is torch.float64:
        # The first comparison was in float64 already.
        return None
    wide = Runs(runs.model, runs.example_inputs, torch.float64, twice=runs.twice)
    worst = Difference()
    try:
        pairs = list(zip(_comparisons(runs, pruned, plan), _comparisons(wide, pruned, plan), strict=True))
    # Not every operation has a float64 version.
    except Exception:
        return None
    for (_, coarse, _), (_, fine, got) in pairs:
        if coarse.keys() != fine.keys() or _shapes(fine) != _shapes(got):
            return None
        for name in fine:
            found = Difference(*_error_and_scale(fine[name], got[name]), name)
            if not (found.exact or found.error <= NOISE * _rounding(coarse[name], fine[name], got[name])):
                return None
            worst = max(worst, found, key=lambda difference: difference.relative)
    return worst


def _rounding(coarse: Tensor, fine: Tensor, got: Tensor) -> float:
    """Measures how much rounding to float32 changes an output.

    Only the numbers count that differ between the expected model and the tested model.

    Args:
        coarse: The output of the expected model, computed in float32.
        fine: The same output, computed in float64.
        got: The output of the tested model, computed in float64.

    Returns:
        The largest absolute change. It is 0 if that is not finite, or if the output has no real floating-point numbers.
    """
    differ = fine != got
    found = float((coarse[differ].to(fine.dtype) - fine[differ]).abs().max()) if fine.is_floating_point() else 0.0
    return found if found < float("inf") else 0.0


def _reason_in_dense(runs: Runs) -> str:
    """Returns the reason why no pruned model can be compared with this dense model, or "" if there is none."""
    try:
        outputs = runs.dense()
    except Exception as failure:
        return f"the model's own forward fails on the example inputs, with {_in_words(failure)}"
    bad = next((n for n, t in outputs.items() if t.is_floating_point() and bool(t.isnan().any())), None)
    if bad is not None:
        with_nan = [n for n, t in tensors(runs.model).items() if t.is_floating_point() and bool(t.isnan().any())]
        where = f" in its output {bad}" if bad else ""
        weights = ""
        if with_nan:
            weights = f": {', '.join(with_nan[:3])}{' and others hold' if len(with_nan) > 3 else ' holds'} NaN"
        return f"the dense model itself gives NaN{where} on the example inputs{weights}"
    return _randomness(runs)


def _randomness(runs: Runs) -> str:
    """Returns the reason why two forwards of the dense model cannot be compared, or "" if they can."""
    # The first test uses the same seed twice. A model that differs even then draws random numbers that no seed
    # controls.
    for seed, why in (
        (SEED, "its forward gives other outputs at each call, with the same inputs and the same random numbers"),
        (OTHER_SEED, "its forward draws random numbers"),
    ):
        first, second = runs.dense(), runs.dense(seed)
        if _shapes(first) != _shapes(second) or not _worst(first, second).exact:
            return (
                f"{why}, so a pruned model cannot be compared with it: switch off all randomness in eval mode, or give "
                "the random numbers as inputs"
            )
    return ""


def _blame(model: nn.Module, plan: Plan, example_inputs: Any) -> str:
    """Finds the sites of a failed plan that are wrong, by cutting each site alone.

    Returns:
        Sentences for the error message. They name the sites that fail and say how to leave them out.
    """
    bad = []
    for site, keep in zip(plan.sites, plan.keeps, strict=True):
        alone = Plan((site,), (keep,))
        try:
            wrong = problem(
                model, remove_units(shared_copy(model), alone, ADAPTERS), alone, example_inputs, thorough=False
            )
        except Exception as failure:
            wrong = _in_words(failure)
        if wrong:
            shapes = ", ".join(f"{cut.tensor} {tuple(tensor_at(model, cut.tensor).shape)}" for cut in site.cuts[:4])
            bad.append(f"{site.name} ({len(keep)} of {unit_kind(site.kind).many(site.size)} kept; {shapes})")
    if not bad:
        return "Each site is exact if it is pruned alone, but not all of them together. Your model is untouched."
    names = [entry.split(" ")[0] for entry in bad]
    return (
        f"Not exact: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. Your model is untouched. Leave these sites "
        f"out: find_sites(..., exclude={names[:5]}), or write an adapter for their class."
    )
