"""Measures what xprune can do with one model. The result is one row of plain data.

`benchmarks.prunability` calls `measure` in a child process. The row is reported after each step, so that the steps
before a time limit are kept.

A row has these keys:

- type, library, class, parameters, policy, inputs: what was pruned. "not built": why there is no model.
- attentions, mlps: {"expected", "found", "exact"}: numbers. `benchmarks.expected_units` counts the expected ones.
  An attention is found if a site of heads cuts a tensor inside of its module, or of the parent of its module. An MLP is
  found if a site of neurons cuts one of its first layers. It is exact if all plans of the model are exact too.
- missing: path -> reason of `sites.left`, for expected attentions and MLPs that are not found.
- single, others: attentions with one head, and mixers that are no attention. They are not counted.
- sites: number of sites of each kind. left: `sites.left`.
- plans: for each plan, the result ("exact", "wrong" or "refused"), the error and the reason. Wrong: `apply` returned a
  model, but its outputs differ from those of the gated dense model. The outputs are compared here again, without
  `xprune.surgery.exactness`.
- refused: the reason if `find_sites` raised an error of xprune.
- foreign: errors that are no errors of xprune, each with the step in which it was raised.
- saved: "exact" if a pruned model that was saved without `arch` gives bit for bit the same outputs when it is loaded
  again. Otherwise the reason.
- generated: "equal" if the pruned model generates the tokens of the gated dense model, with the default cache.
  Otherwise the reason. "" if the model does not generate.
"""

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import xprune
from benchmarks.children import Report
from benchmarks.expected_units import Expected, expected_units
from xprune.errors import XPruneError
from xprune.modules.calls import map_tensors
from xprune.surgery.gates import Gates
from xprune.testing import perturb, random_plan

ALLOWED = 1e-3
"""The largest difference of an output that counts as rounding, as a fraction of its largest absolute value.

It is larger than the tolerance of xprune, because here everything is computed in float32 only.
"""
NEW_TOKENS = 6
Build = Callable[[], tuple[nn.Module, Any]]


def measure(row: dict[str, Any], build: Build, report: Report) -> None:
    """Builds a model, prunes it and reports its row after each step.

    Args:
        row: The first keys of the row, such as "type". It is changed.
        build: Returns (model, example inputs).
        report: Called with the row after each step.
    """
    torch.manual_seed(0)
    model, inputs = build()
    row |= {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "inputs": list(inputs) if isinstance(inputs, Mapping) else [],
        "foreign": [],
        "step": "run",
    }
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = perturb(model)
    if not all(t.isfinite().all() for t in floats(_run(model, inputs))):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(plain[name])
    expected = expected_units(model, inputs)
    row |= {
        "attentions": {"expected": len(expected.attentions), "found": 0, "exact": 0},
        "mlps": {"expected": len(expected.mlps) + len(expected.experts), "found": 0, "exact": 0},
        "single": expected.single,
        "others": expected.others,
        "step": "find_sites",
    }
    report(row)
    try:
        sites = xprune.find_sites(model, inputs)
    except XPruneError as error:
        row |= {"refused": f"{type(error).__name__}: {error}"[:600], "step": "done"}
        return report(row)
    except Exception as error:
        row["foreign"].append(foreign("find_sites", error))
        row["step"] = "done"
        return report(row)
    kinds = [site.kind for site in sites]
    row["sites"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    row["left"] = {path: why[:400] for path, why in sites.left.items()}
    found, missing = compare_with_sites(expected, sites)
    for key in ("attentions", "mlps"):
        row[key]["found"] = found[key]
    row["missing"] = {path: reason_of(path, sites.left)[:400] for path in missing}
    row["step"] = "plans"
    report(row)
    plans = {"random 0": random_plan(sites, 0), "random 1": random_plan(sites, 1), "one unit": one_unit(sites)}
    row["plans"], kept = {}, None
    for name, plan in plans.items():
        row["plans"][name], pruned = try_plan(model, inputs, plan, row["foreign"])
        if pruned is not None and (kept is None or name == "random 1"):
            kept = (plan, pruned)
        report(row)
    if all(each["result"] == "exact" for each in row["plans"].values()):
        for key in ("attentions", "mlps"):
            row[key]["exact"] = row[key]["found"]
    if kept is not None:
        plan, pruned = kept
        row["step"] = "save"
        report(row)
        row["saved"] = guarded("save", row["foreign"], lambda: saved(pruned, inputs))
        row["step"] = "generate"
        report(row)
        row["generated"] = guarded("generate", row["foreign"], lambda: generated(model, pruned, plan, inputs))
    row["step"] = "done"
    report(row)


class _Everywhere(Gates):
    """Gates that need not be used in every forward pass.

    While an encoder-decoder generates, it calls its encoder once, and its decoder once for each token.
    """

    def _check_fired(self, *_: Any) -> None:
        pass


def one_unit(sites: Any) -> xprune.Plan:
    """Returns the plan that leaves the last unit of each site."""
    return xprune.Plan(tuple(sites), tuple((site.size - 1,) for site in sites))


def try_plan(model: nn.Module, inputs: Any, plan: Any, errors: list[str]) -> tuple[dict[str, Any], nn.Module | None]:
    """Applies a plan. Returns (result, pruned model). The model is None if it was refused."""
    try:
        pruned = xprune.apply(model, plan, inputs)
    except XPruneError as error:
        return {"result": "refused", "reason": f"{type(error).__name__}: {error}"[:600]}, None
    except Exception as error:
        errors.append(foreign("apply", error))
        return {"result": "refused", "reason": errors[-1]}, None
    try:
        with Gates(plan.sites, gates_of(plan)).attached(model):
            expected = floats(_run(model, inputs))
        got = floats(_run(pruned, inputs))
        error_size = worst(expected, got)
        if not error_size <= ALLOWED:
            # A model that selects the best of its boxes or tokens turns rounding into another selection.
            error_size = _in_float64(model, pruned, plan, inputs)
    except Exception as error:
        errors.append(foreign("forward", error))
        return {"result": "wrong", "reason": errors[-1]}, None
    exact = error_size <= ALLOWED
    return {"result": "exact" if exact else "wrong", "error": error_size}, pruned


def _in_float64(model: nn.Module, pruned: nn.Module, plan: Any, inputs: Any) -> float:
    """Returns the result of `worst` for outputs that are computed in float64."""
    dense, pruned = copy.deepcopy(model).double(), copy.deepcopy(pruned).double()
    inputs = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    with Gates(plan.sites, gates_of(plan)).attached(dense):
        expected = floats(_run(dense, inputs))
    return worst(expected, floats(_run(pruned, inputs)))


def gates_of(plan: Any) -> list[Tensor]:
    """Returns a gate of 1 for each unit that stays, and of 0 for each other unit."""
    return [
        torch.tensor([float(unit in keep) for unit in range(site.size)])
        for site, keep in zip(plan.sites, plan.keeps, strict=True)
    ]


def _run(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def floats(value: Any) -> list[Tensor]:
    """Returns all floating-point tensors in the outputs of a model, in a fixed order, without those of caches."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for each in value.values() for t in floats(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in floats(each)]
    return []


def worst(expected: list[Tensor], got: list[Tensor]) -> float:
    """Returns the largest difference of two outputs, as a fraction of the largest absolute value of the output."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        if not one.numel() or torch.equal(one, other):
            continue
        finite = one.isfinite()
        if not torch.equal(one[~finite], other[~finite]):
            return float("inf")
        size = one[finite].abs().max().item() if finite.any() else 0.0
        largest = max(largest, ((one - other)[finite].abs().max().item() / size) if size else float("inf"))
    return largest


def saved(pruned: nn.Module, inputs: Any) -> str:
    """Saves a pruned model without `arch`, loads it and compares the outputs. Returns "exact" or the reason."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        xprune.save(pruned, f"{folder}/pruned")
        said = [str(w.message) for w in caught if "architecture is not saved" in str(w.message)]
        if said:
            return said[0].replace(folder, "DIR")[:400]
        loaded = xprune.load(f"{folder}/pruned").eval()
    one, other = floats(_run(pruned, inputs)), floats(_run(loaded, inputs))
    same = len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return "exact" if same else f"the loaded model differs by {worst(one, other):.1e}"


def generated(model: Any, pruned: Any, plan: Any, inputs: Any) -> str:
    """Generates tokens with the gated dense model and with the pruned model. Returns "equal" or the reason."""
    if not isinstance(inputs, Mapping) or not getattr(model, "can_generate", bool)():
        return ""
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    if "attention_mask" in given and "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    if getattr(model.config, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 1

    def tokens(each: Any) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            out = each.generate(**given, **settings)
        # Some models of speech return an object instead of the tokens.
        return getattr(out, "sequences", out)

    try:
        tokens(model)
    except Exception as error:
        return f"the dense model does not generate: {type(error).__name__}: {error}"[:200]
    with _Everywhere(plan.sites, gates_of(plan)).attached(model):
        expected = tokens(model)
    got = tokens(pruned)
    same = expected.shape == got.shape and torch.equal(expected, got)
    return "equal" if same else f"other tokens: {expected[0].tolist()} became {got[0].tolist()}"


def guarded(step: str, errors: list[str], function: Callable[[], str]) -> str:
    """Calls a function. Returns its result, or the error that it raised, and notes errors that are not of xprune."""
    try:
        return function()
    except XPruneError as error:
        return f"{type(error).__name__}: {error}"[:400]
    except Exception as error:
        errors.append(foreign(step, error))
        return errors[-1]


def foreign(step: str, error: BaseException) -> str:
    """Returns one line about an error: the step, the error, and the last line of xprune and of all code in it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{f.filename.rpartition('/xprune/')[2]}:{f.lineno}" for f in frames if "/xprune/" in f.filename]
    last = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:240]
    return f"{step}: {type(error).__name__}: {text} ({', '.join([*ours[-1:], last])})"


def compare_with_sites(expected: Expected, sites: Any) -> tuple[dict[str, int], list[str]]:
    """Returns the numbers of attentions and MLPs that have a site, and the paths of those that have none."""
    heads = [[cut.tensor for cut in site.cuts] for site in sites if site.kind == "head"]
    inside = {
        path: [i for i, cuts in enumerate(heads) if any(_in(t, path) for t in cuts)] for path in expected.attentions
    }
    # A site of another attention does not count for this one, though both may have the same parent.
    taken = {i for found in inside.values() for i in found}
    missing = []
    for path, found in inside.items():
        parent = path.rpartition(".")[0]
        free = [cuts for i, cuts in enumerate(heads) if i not in taken]
        if not found and not (parent and any(_in(t, parent) for cuts in free for t in cuts)):
            missing.append(path)
    attentions = len(expected.attentions) - len(missing)
    neurons = [cut.tensor for site in sites if site.kind not in ("head", "channel") for cut in site.cuts]
    layers = {tensor.rpartition(".")[0] for tensor in neurons}
    lost = [path for path, first in expected.mlps.items() if not layers.intersection(first)]
    lost += [path for path in expected.experts if not any(_in(t, path) for t in neurons)]
    mlps = len(expected.mlps) + len(expected.experts) - len(lost)
    return {"attentions": attentions, "mlps": mlps}, missing + lost


def _in(tensor: str, path: str) -> bool:
    return not path or tensor.startswith(f"{path}.")


def reason_of(path: str, left: Mapping[str, str]) -> str:
    """Returns the reason of `sites.left` for a module, for the nearest module around it, or for one inside of it."""
    for name in (path, *[path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]):
        if name in left:
            return left[name] if name == path else f"({name}) {left[name]}"
    inside = next((name for name in left if name.startswith(f"{path}.")), "")
    return f"({inside}) {left[inside]}" if inside else "no reason given"
