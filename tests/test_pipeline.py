"""Tests that a run reads, finds and measures everything once, and passes its results on."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from tests.support import ordinary_models
from tests.support.counting import Counted, count_calls
from tests.support.models import build, images, loader
from tests.support.stopwatch import fake_stopwatch
from xprune.cli import demo
from xprune.core.target import Target
from xprune.core.times import Ratio
from xprune.costs import on_target
from xprune.modules.copies import tensors
from xprune.pipeline import Run

BUDGET = xprune.Budget(macs=0.6)
TUNE = xprune.Finetune(epochs=2)
ONCE = (xprune.measure_costs, xprune.find_sites, xprune.evaluate)
CRITERIA = {
    "random": "random",
    "magnitude": "magnitude",
    "taylor": "taylor",
    "captum:IntegratedGradients": "captum:IntegratedGradients,n_steps=2",
    "xpruner": "xpruner,steps=3",
}


def loaders():
    return Counted(loader(24, 8)), Counted(loader(14, 7))


def test_every_criterion_of_the_table_is_tried():
    assert set(CRITERIA) == set(xprune.CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA.values())
@pytest.mark.parametrize("selection", ["global", "learned"])
def test_the_pruner_does_each_thing_once(criterion, selection, monkeypatch):
    calls, (train, val), watches = count_calls(monkeypatch, *ONCE), loaders(), watched(monkeypatch)
    xprune.Pruner(build("vit"), criterion, BUDGET, selection, TUNE).run(train, val)
    assert train.thrown_away + val.thrown_away <= 2
    assert val.whole == 3, "dense, pruned, fine-tuned"
    assert calls == {"measure_costs": 1, "find_sites": 1, "evaluate": 3}
    assert [watch.calls for watch in watches] == [["alone", "compare"]]


def watched(monkeypatch, **times):
    """Replaces the stopwatch of runs, and returns the list of all that will be made."""
    fake = fake_stopwatch(**times)
    monkeypatch.setattr(on_target, "Stopwatch", fake)
    return fake.made


def test_the_pruned_model_is_timed_beside_the_dense_one_on_the_whole_first_batch(monkeypatch):
    watches, train = watched(monkeypatch, dense=8.0, pruned=5.0), loader(24, 8)
    result = xprune.Pruner(build("vit"), "random", BUDGET, finetune=TUNE).run(train)
    dense, cut, tuned = (result.metrics[name] for name in ("dense", "pruned", "finetuned"))
    assert len(watches[0].inputs) == 8 and watches[0].given == Target()
    assert cut.speedup == Ratio(8 / 5, 8 / 10, 16 / 5) and dense.speedup is None
    assert dense.latency_ms == cut.dense_ms == 8 * 1.5, "the time in turn with the pruned model, not that alone"
    assert cut.latency_ms == 10 and dense.latency_rows == cut.latency_rows == 8
    assert cut.gain(dense) == pytest.approx(1.6 * cut.macs / dense.macs)
    assert {name: getattr(tuned, name) for name in ("latency_ms", "speedup", "dense_ms", "target")} == {
        name: getattr(cut, name) for name in ("latency_ms", "speedup", "dense_ms", "target")
    }


def test_times_are_measured_on_the_target(monkeypatch):
    watches = watched(monkeypatch)
    run = Run(build("vit"), loader(24, 8), target=Target(batch=3, compiled=True))
    assert run.dense.latency_rows == 3 and run.dense.target.compiled and run.dense.speedup is None
    assert watches[0].given == Target(batch=3, compiled=True)
    table = Run(build("vit"), loader(24, 8), target=Target(table="another computer.json"))
    assert table.dense.latency_rows == 8 and watches[1].given == Target(), "a table holds no times of whole models"


def test_without_latency_nothing_is_timed(monkeypatch):
    (train, _), watches = loaders(), watched(monkeypatch)
    result = xprune.Pruner(build("vit"), "random", BUDGET, finetune=TUNE, latency=False).run(train)
    assert not watches and train.thrown_away == 1
    assert all(row.latency_ms is None and row.latency_rows is None for row in result.metrics.values())
    assert all(row.speedup is None and row.gain(result.metrics["dense"]) is None for row in result.metrics.values())
    assert " - " in result.summary()
    assert {row.data for row in result.metrics.values()} == {"training"}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_compare_does_each_thing_once(seeds, monkeypatch, tmp_path):
    calls, (train, val), watches = count_calls(monkeypatch, *ONCE), loaders(), watched(monkeypatch)
    grid = xprune.Grid(
        {"random": "random", "xpruner": "xpruner,steps=3"},
        {"global": "global", "learned": xprune.LearnedThresholds(steps=3)},
        (BUDGET, xprune.Budget(macs=0.5)),
        seeds,
        TUNE,
    )
    found = xprune.compare(xprune.Case(build("vit"), train, val), grid, tmp_path)
    cells = 2 * 2 * 2
    assert len(found.rows) == len(seeds) * (1 + cells)
    assert train.thrown_away + val.thrown_away <= 2
    assert calls["measure_costs"] == calls["find_sites"] == 1 and not watches
    assert calls["evaluate"] == val.whole == 1 + len(seeds) * (1 + 2 * cells), "dense once, each cell cut and tuned"


def test_the_demo_does_each_thing_once(monkeypatch, tmp_path):
    calls, watches = count_calls(monkeypatch, *ONCE), watched(monkeypatch)
    x, y = demo.digits(demo.KWARGS["img_size"])
    train, val = (Counted(DataLoader(TensorDataset(x[a:b], y[a:b]), 16)) for a, b in ((0, 48), (48, 80)))
    monkeypatch.setattr(demo, "data", lambda: (train, val))
    monkeypatch.setattr(demo, "KWARGS", {**demo.KWARGS, "depth": 1})
    monkeypatch.setattr(demo, "DENSE", TUNE)
    monkeypatch.setattr(demo, "TUNE", TUNE)
    monkeypatch.setattr(xprune, "CRITERIA", {name: xprune.CRITERIA[name] for name in ("random", "magnitude", "taylor")})
    monkeypatch.setattr(demo.subprocess, "run", lambda command, check: demo.check(*map(Path, command[-2:])))
    # A library that does not exist is needed, so there is no report. Its pictures would read the data too.
    monkeypatch.setattr(demo.report, "NEEDED", ("nothing_of_this_name",))
    console = Console(record=True, width=120)
    demo.run(tmp_path / "pruned", tmp_path / "cache", console)
    assert train.thrown_away + val.thrown_away <= 2
    assert calls["measure_costs"] == calls["find_sites"] == 1
    assert calls["evaluate"] == val.whole == 1 + 3 * 2
    assert [watch.calls for watch in watches] == [["alone"] + 3 * ["compare"]]
    shown = console.export_text()
    assert all(word in shown for word in ("dense", "random", "magnitude", "taylor", "1.60x"))


def test_stages_called_alone_check_their_loader():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    scores = xprune.score(model, sites, criterion="random")
    stages = {
        "score": lambda bad: xprune.score(model, sites, bad, "taylor"),
        "select": lambda bad: xprune.select(model, scores, BUDGET, "learned", loader=bad),
        "finetune": lambda bad: xprune.finetune(model, bad),
        "evaluate": lambda bad: xprune.evaluate(model, bad),
        "faithfulness": lambda bad: xprune.explain.faithfulness(model, scores, bad),
        "run": lambda bad: Run(model, bad),
    }
    classwise = xprune.score(model, sites, loader(), "taylor")
    stages["faithfulness"] = lambda bad: xprune.explain.faithfulness(model, classwise, bad)
    for stage in stages.values():
        for bad in ([], iter([1]), 7, [(images(0), torch.zeros(0, dtype=torch.long))]):
            with pytest.raises(xprune.DataError, match=r"empty|only once|Give an iterable|no samples"):
                stage(bad)


def test_what_cannot_work_is_refused_before_anything_learns(monkeypatch):
    calls = count_calls(monkeypatch, xprune.evaluate, xprune.finetune)
    for budget, selection, error in (
        (xprune.Budget(macs=0.01), "global", xprune.BudgetError),
        (BUDGET, "learned,weights=joint,steps=50", xprune.PluginError),
    ):
        train, val = loaders()
        with pytest.raises(error):
            xprune.Pruner(build("vit"), "taylor", budget, selection, TUNE).run(train, val)
        assert not calls and train.whole == val.whole == 0


def test_a_run_that_is_shared_gives_what_runs_of_their_own_give():
    model, shared = build("vit"), Run(build("vit"), loader(), loader(14, 7), latency=False)
    for criterion in ("random", "taylor"):
        pruner = xprune.Pruner(model, criterion, BUDGET, finetune=TUNE, seed=3, latency=False)
        own, both = pruner.run(loader(), loader(14, 7)), pruner.carry_out(shared)
        assert own.metrics == both.metrics and own.plan == both.plan
        assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), both.model.parameters(), strict=True))


def test_units_and_names_to_leave_alone_are_looked_for_by_the_run():
    budget = xprune.Budget(macs=0.9)
    pruner = xprune.Pruner(build("vit"), "random", budget, finetune=None, units=["neuron"], exclude=["blocks.0.*"])
    found = pruner.run(loader())
    assert [site.name for site in found.plan.sites] == ["blocks.1.mlp"]


@dataclass(frozen=True)
class Old(xprune.Selection):
    """A selection of the old form: it changes the weights of the model and returns only a plan."""

    takes: int = 0
    name: ClassVar[str] = "old"

    def updates(self, available):
        return self.takes

    def select(self, context, scores, costs, budget):
        if self.takes:
            with torch.no_grad():
                context.model.get_submodule("head").bias.add_(1.0)
        return xprune.SELECTIONS["global"]().select(context, scores, costs, budget)


@dataclass(frozen=True)
class New(Old):
    """The same in the new form: it returns a `Selected`."""

    name: ClassVar[str] = "new"

    def select(self, context, scores, costs, budget):
        plan = super().select(context, scores, costs, budget)
        return xprune.Selected(plan, context.model, self.takes) if self.takes else plan


@pytest.mark.parametrize("kind", [Old, New])
def test_weights_that_learned_along_are_handed_on(kind):
    model = build("vit")
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    run = Run(model, loader(16, 4), latency=False)
    scores = run.score("random", BUDGET)
    selected = run.select(scores, BUDGET, kind(takes=3), TUNE)
    assert selected.updates == 3
    torch.testing.assert_close(run.cut(selected).head.bias, before["head.bias"] + 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert run.select(scores, BUDGET, kind(), TUNE) == xprune.Selected(selected.plan)
    plan = xprune.select(model, scores, BUDGET, kind(), example_inputs=images())
    assert plan == selected.plan
    with pytest.raises(xprune.PluginError, match=r"trains weights too.*Use xprune\.Pruner"):
        xprune.select(model, scores, BUDGET, kind(takes=3), example_inputs=images())


def test_a_number_in_the_plans_info_is_obeyed_by_nobody():
    @dataclass(frozen=True)
    class Boastful(Old):
        name: ClassVar[str] = "boastful"

        def select(self, context, scores, costs, budget):
            plan = super().select(context, scores, costs, budget)
            return xprune.Plan(plan.sites, plan.keeps, {**plan.info, "updates": 1000})

    result = xprune.Pruner(build("vit"), "random", BUDGET, Boastful(), TUNE, latency=False).run(loader())
    assert result.metrics["finetuned"].loss != result.metrics["pruned"].loss, "it was fine-tuned all the same"


@pytest.mark.parametrize("criterion", ["taylor", "xpruner,steps=3"])
def test_scores_that_do_not_say_which_units_should_stay_are_warned_of(criterion):
    model = ordinary_models.net()
    nn.init.zeros_(model.head.weight)
    budget = xprune.Budget(params=0.8)
    pruner = xprune.Pruner(model, criterion, budget, finetune=None, latency=False)
    with pytest.warns(UserWarning, match="gives all units of every site the same score"):
        result = pruner.run(ordinary_models.pairs())
    assert "the choice of the units that stay is arbitrary there" in " ".join(result.summary().split())
