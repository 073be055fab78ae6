"""Tests of budgets of the latency, from the table to the corrected plan, with a clock that counts operations."""

import json

import pytest
import torch
from torch import nn

import xprune
from tests.support.clock import clock, milliseconds  # noqa: F401 - a fixture
from tests.support.models import build, images, loader
from xprune.core.target import Target
from xprune.costs.realised import GOOD
from xprune.costs.stopwatch import Stopwatch
from xprune.selections.learned.learner import ThresholdLearner

pytestmark = pytest.mark.usefixtures("clock")


def realised(model, plan, inputs):
    """The fraction of the dense model's time that the pruned model takes, by the clock of the tests."""
    pruned = xprune.apply(model, plan, inputs)
    times = [milliseconds(lambda each=each: each(inputs)) for each in (model, pruned)]
    return times[1] / times[0]


def scored(name, units=None, criterion="magnitude"):
    model = build(name).eval()
    return model, xprune.score(model, xprune.find_sites(model, images(), units=units), criterion=criterion)


@pytest.mark.parametrize(
    ("name", "units", "selection"),
    [
        ("vit", None, "global"),
        ("vit", None, "uniform"),
        ("vit", None, xprune.LearnedThresholds(steps=3, weights="frozen")),
        ("swin", None, "global"),
        ("vit", ["neuron", "head", "channel"], "global"),
    ],
)
def test_a_plan_takes_the_time_that_was_asked_for(name, units, selection):
    model, scores = scored(name, units)
    budget = xprune.Budget(latency=0.7)
    data = {"loader": loader()} if not isinstance(selection, str) else {"example_inputs": images()}
    plan = xprune.select(model, scores, budget, selection, **data)
    note = plan.info["latency"]
    assert note["realised"] <= 0.7
    if units is None:
        # A few channels are all that these small streams have, so their steps are coarse.
        assert note["realised"] >= GOOD[0] * 0.7 - 0.02
    inputs = images() if isinstance(selection, str) else next(iter(loader()))[0]
    assert realised(model, plan, inputs) == pytest.approx(note["realised"], rel=1e-6)


def test_a_table_that_is_wrong_for_the_whole_model_is_corrected(clock):  # noqa: F811
    model, scores = scored("vit")
    with clock(0.6):
        plan = xprune.select(model, scores, xprune.Budget(latency=0.75), example_inputs=images())
    note = plan.info["latency"]
    assert len(note["tried"]) > 1
    assert 0.95 * 0.75 <= note["realised"] <= 0.75


def test_several_limits_hold_together():
    model, scores = scored("vit")
    costs = xprune.measure_costs(model, scores.sites, images())
    budget = xprune.Budget(macs=0.6, params=0.9, latency=0.8)
    plan = xprune.select(model, scores, budget, example_inputs=images())
    assert costs.fraction(budget, plan.counts, "macs") <= 0.6
    assert costs.fraction(budget, plan.counts, "params") <= 0.9
    # The MACs are the narrower limit here, and they are used.
    assert costs.fraction(budget, plan.counts, "macs") > 0.58
    assert plan.info["latency"]["realised"] <= 0.8


def test_a_time_in_milliseconds_is_a_fraction_of_the_dense_time():
    model, scores = scored("vit")
    dense = milliseconds(lambda: model(images()))
    plan = xprune.select(model, scores, xprune.Budget(latency_ms=0.7 * dense), example_inputs=images())
    assert plan.info["latency"]["asked"] == pytest.approx(0.7, rel=1e-3)
    assert plan.info["latency"]["pruned_ms"] <= 0.7 * dense * 1.001
    slow = xprune.select(model, scores, xprune.Budget(latency_ms=3 * dense), example_inputs=images())
    assert slow.removed == 0


def test_what_cannot_be_reached_is_told_with_the_least():
    model, scores = scored("vit")
    with pytest.raises(xprune.BudgetError, match=r"latency=0.01 cannot be reached: .* takes 0\.\d+ of") as error:
        xprune.select(model, scores, xprune.Budget(latency=0.01), example_inputs=images())
    least = float(str(error.value).split(" takes ")[1].split(" of")[0])
    plan = xprune.select(model, scores, xprune.Budget(latency=least / GOOD[0]), example_inputs=images())
    assert sum(plan.counts) < 3 * len(plan.counts)
    # A run says it before it scores.
    pruner = xprune.Pruner(model, "taylor", xprune.Budget(latency=0.01), latency=False)
    with pytest.raises(xprune.BudgetError, match=r"latency=0.01 cannot be reached: .* the least is 0\.\d+"):
        pruner.run(loader())


def test_a_table_of_another_computer_is_used_without_measuring(tmp_path, monkeypatch):
    model, scores = scored("vit")
    table = xprune.profile(model, images(), "batch=3", sites=scores.sites)
    file = table.save(tmp_path / "table.json")
    assert xprune.LatencyTable.read(file) == table
    monkeypatch.setattr(Stopwatch, "times", None)
    budget = xprune.Budget(latency=0.7, target=f"table={file}")
    plan = xprune.select(model, scores, budget, example_inputs=images())
    assert plan.info["latency"]["realised"] is None
    assert plan.info["predicted"]["latency"] == pytest.approx(0.7, abs=0.03)
    other, others = scored("swin")
    with pytest.raises(xprune.TargetError, match="another model"):
        xprune.select(other, others, budget, example_inputs=images())


@pytest.mark.parametrize("damage", ["", "[]", "{}", "no json", "unsorted", "negative", "format"])
def test_a_damaged_table_is_a_named_error(tmp_path, damage):
    model, scores = scored("vit")
    file = xprune.profile(model, images(), sites=scores.sites).save(tmp_path / "table.json")
    data = json.loads(file.read_text())
    if damage == "unsorted":
        data["sites"][0]["counts"].reverse()
    elif damage == "negative":
        data["dense_ms"] = -1
    elif damage == "format":
        data["format"] = 99
    file.write_text(json.dumps(data) if damage in ("unsorted", "negative", "format") else damage)
    with pytest.raises(xprune.TargetError):
        xprune.LatencyTable.read(file)
    with pytest.raises(xprune.TargetError):
        xprune.LatencyTable.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"device": "no-such"}, "device='no-such' cannot be used here"),
        ({"device": "meta"}, "no values"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"batch": 0}, "batch=0"),
        ({"threads": True}, "threads=True"),
        ({"table": "t.json", "batch": 2}, "were both given"),
    ],
)
def test_a_bad_target_is_a_named_error(target, what):
    model, scores = scored("vit")
    with pytest.raises(xprune.TargetError, match=what):
        xprune.select(model, scores, xprune.Budget(latency=0.7, target=Target(**target)), example_inputs=images())


class OnlyFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("only float32")
        return self.mlp(x)


def test_a_model_that_does_not_run_on_the_target_is_a_named_error():
    with pytest.raises(xprune.TargetError, match=r"does not run on the target .*dtype=bfloat16.*only float32"):
        xprune.profile(OnlyFloat32(), torch.randn(2, 8), Target(dtype="bfloat16"))
    with pytest.raises(xprune.ModelError, match="forward fails"):
        xprune.profile(OnlyFloat32(), torch.randn(2, 3), Target(batch=4), sites=())


def test_modules_of_like_shape_are_measured_once(monkeypatch):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    measured = []
    monkeypatch.setattr("xprune.pipeline._tell_profile", lambda done, total: measured.append(total))
    table = xprune.profile(model, images(), sites=sites)
    kinds = {site.kind for site in sites}
    assert len(sites) > len(kinds)
    assert measured[-1] == len(kinds)
    for kind in kinds:
        curves = {curve for (_, one, _), curve in zip(table.sites, table.curves, strict=True) if one == kind}
        assert len(curves) == 1


def test_a_table_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XPRUNE_CACHE", str(tmp_path))
    model = build("vit")
    first = xprune.profile(model, images())
    monkeypatch.setattr("xprune.costs.profile._measured", None)
    assert xprune.profile(model, images()) == first
    for file in tmp_path.iterdir():
        file.write_text("damaged")
    with pytest.raises(TypeError):
        xprune.profile(model, images())


def test_the_target_changes_the_batch_and_the_dtype():
    model = build("vit")
    one = xprune.profile(model, images(2), "batch=1")
    eight = xprune.profile(model, images(2), Target(batch=8, dtype="bfloat16"))
    assert eight.dense_ms > 6 * one.dense_ms
    assert eight.target.dtype == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


def test_learned_thresholds_are_learned_once(monkeypatch, clock):  # noqa: F811
    runs = []
    run = ThresholdLearner.run

    def counted_run(self, *args, **kwargs):
        runs.append(1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(ThresholdLearner, "run", counted_run)
    budget = xprune.Budget(latency=0.75)
    selection = xprune.LearnedThresholds(steps=3, weights="joint")
    pruner = xprune.Pruner(build("vit"), "magnitude", budget, selection, xprune.Finetune(epochs=1), latency=False)
    with clock(0.6):
        result = pruner.run(loader(32))
    assert len(runs) == 1
    assert len(result.plan.info["latency"]["tried"]) > 1
    assert result.plan.info["latency"]["realised"] <= 0.75


def test_masks_are_learned_at_a_budget_of_the_latency():
    budget = xprune.Budget(latency=0.7, target=Target(batch=4))
    pruner = xprune.Pruner(build("vit"), xprune.CRITERIA["xpruner"](steps=6), budget, finetune=None, latency=False)
    result = pruner.run(loader(32))
    assert 0.6 < result.plan.info["latency"]["realised"] <= 0.7
    assert "batch=4" in result.plan.info["latency"]["target"]


def test_a_budget_of_the_latency_has_one_limit_and_a_target_that_fits():
    assert xprune.Budget(latency=0.5).limited == ("latency",)
    assert xprune.Budget(macs=0.5, latency_ms=3).limited == ("macs", "latency")
    assert xprune.Budget(latency=0.5, target="batch=4").target == Target(batch=4)
    for wrong in ({"latency": 0.5, "latency_ms": 3}, {"latency_ms": -1}, {"latency_ms": float("nan")}, {"latency": 2}):
        with pytest.raises(xprune.BudgetError):
            xprune.Budget(**wrong)
    with pytest.raises(xprune.BudgetError, match="does not limit the time"):
        xprune.Budget(macs=0.5, target="batch=4")
    with pytest.raises(xprune.BudgetError, match="part"):
        xprune.Budget(latency=0.5, of="part")
    with pytest.raises(xprune.TargetError, match="not a setting of a target"):
        xprune.Budget(latency=0.5, target="bath=4")
