"""Tests the frontier: one scoring, budgets that are met, honest files and a page without the internet."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import xprune
from tests.support.clock import clock  # noqa: F401 - a fixture
from tests.support.models import build, loader
from xprune.core.interfaces import Criterion
from xprune.tradeoff.estimate import duration
from xprune.tradeoff.page import render
from xprune.tradeoff.points import is_frontier

SCORED: list[str] = []


@dataclass(frozen=True)
class Counting(Criterion):
    """Scores as random ones do, and notes for which budget it was called."""

    at: bool = False
    name: ClassVar[str] = "counting"

    def budget_key(self, budget):
        return budget.name if self.at else ""

    def estimate(self, context, sites):
        return 130.0

    def score(self, context, sites):
        SCORED.append(context.budget.name)
        return xprune.Scores(tuple(sites), tuple(torch.arange(float(site.size)) for site in sites), self.name)


@pytest.fixture(scope="module")
def model():
    return build("vit")


@pytest.fixture(scope="module")
def found(model):
    return xprune.frontier(model, loader(), loader(), criterion="xpruner,budgets=any,steps=6", points=[0.4, 0.8])


def test_each_point_meets_its_budget_and_is_the_model_of_its_plan(model, found):
    assert [point.asked for point in found.points] == [0.8, 0.4]
    inputs = next(iter(loader()))[0]
    for point, plan in zip(found.points, found.plans, strict=True):
        pruned = xprune.apply(model, plan, inputs)
        assert xprune.count_macs(pruned, inputs) == point.metrics.macs <= point.asked * found.dense.macs
        assert point.metrics.macs / found.dense.macs == pytest.approx(point.predicted)
        assert xprune.evaluate(pruned, loader()).loss == pytest.approx(point.metrics.loss)
        assert point.counts == plan.counts and point.time > 0 and point.metrics.latency_ms > 0
    assert found.dense.loss == pytest.approx(xprune.evaluate(model, loader()).loss)
    assert [point.asked for point in found.chance] == [0.8, 0.4]
    assert all(point.time is None for point in found.chance)


def test_a_plan_for_another_budget_comes_from_the_same_scores(model, found):
    inputs = next(iter(loader()))[0]
    plan = xprune.select(model, found.scores, found.budget(found.points[1]), example_inputs=inputs)
    assert plan.keeps == found.plans[1].keeps


def test_budgets_of_the_latency(model, clock):  # noqa: F811
    quick = {"criterion": "magnitude", "chance": False, "target": "batch=4"}
    found = xprune.frontier(model, loader(), resource="latency", points=[0.8], **quick)
    point = found.points[0]
    assert found.measures == ["macs", "params", "latency"] and found.share(point, "latency") <= 0.8
    assert found.budget(point).target.batch == 4 and point.metrics.latency_rows == 4
    assert found.plot().get_xlabel() == "measured latency, % of dense"


def test_scores_are_computed_once_unless_they_depend_on_the_budget(model, capsys):
    SCORED.clear()
    settings = {"points": [0.8, 0.6, 0.5], "latency": False, "chance": False}
    xprune.frontier(model, loader(), criterion=Counting(), **settings)
    assert len(SCORED) == 1
    out = capsys.readouterr().out
    assert "Estimated time: about 2 min 1" in out and "scoring 2 min 10 s" in out and "4 of 4: 50 %" in out
    SCORED.clear()
    xprune.frontier(model, loader(), criterion=Counting(at=True), **settings)
    assert SCORED == ["macs 0.8", "macs 0.6", "macs 0.5"]
    assert "scoring 6 min 30 s" in capsys.readouterr().out


def test_the_default_budgets_are_those_that_can_be_reached(model):
    quick = {"criterion": "magnitude", "latency": False, "chance": False}
    found = xprune.frontier(model, loader(), resource="params", **quick)
    least = found.settings["least"]
    asked = [point.asked for point in found.points]
    assert asked == [share for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1) if share >= least]
    assert all(found.share(point, "params") <= point.asked for point in found.points)
    spaced = xprune.frontier(model, loader(), points=3, **quick)
    assert len(spaced.points) == 3 and spaced.points[-1].asked == pytest.approx(spaced.settings["least"], abs=2e-4)


def test_a_killed_scoring_is_not_shared_between_estimate_and_work(model, tmp_path):
    # The estimate makes steps of its own. They must leave no checkpoint behind, and change no score.
    settings = {"criterion": "xpruner,budgets=any,steps=6", "points": [0.5], "latency": False, "chance": False}
    found = xprune.frontier(model, loader(), checkpoint_dir=tmp_path, **settings)
    assert not list(tmp_path.rglob("*.safetensors"))
    run = xprune.pipeline.Run(model, loader(), latency=False)
    scores = run.score("xpruner,budgets=any,steps=6")
    assert all(torch.equal(a, b) for a, b in zip(scores.values, found.scores.values, strict=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"points": [0.001]}, "cannot be reached"),
        ({"points": [50]}, "not in \\(0, 1\\]"),
        ({"points": []}, "give fractions"),
        ({"points": 0}, "give fractions"),
        ({"points": True}, "give fractions"),
        ({"resource": "money"}, "money"),
        ({"criterion": "guess"}, "guess"),
    ],
)
def test_wrong_settings_are_refused(model, settings, says):
    with pytest.raises(xprune.XPruneError, match=says):
        xprune.frontier(model, loader(), **{"criterion": "magnitude", **settings})


def test_the_smallest_budget_within_a_loss():
    def point(asked, metric):
        return xprune.Point(asked, asked, (1,), xprune.Metrics(metric, 0.1, 10, metric_name="m", higher_is_better=up))

    up = True
    dense = xprune.Metrics(0.9, 0.1, 10)
    found = xprune.Frontier("macs", dense, (point(0.7, 0.9), point(0.5, 0.895), point(0.3, 0.6)))
    assert found.least(within=0.01).asked == 0.5
    assert found.least(within=0.001).asked == 0.7
    assert found.least(within=0.5).asked == 0.3
    up = False
    dense = xprune.Metrics(2.0, 0.1, 10, metric_name="m", higher_is_better=False)
    found = xprune.Frontier("macs", dense, (point(0.7, 1.9), point(0.5, 2.4), point(0.3, 3.0)))
    assert found.least(within=0.1).asked == 0.7
    assert found.least(within=-1.0) is None


def test_a_saved_frontier_is_read_back(found, tmp_path):
    path = found.save(tmp_path / "new" / "frontier.json")
    again = xprune.Frontier.load(path)
    assert again == xprune.Frontier(**{**vars(found), "settings": json.loads(json.dumps(found.settings))})
    assert again.scores is None and again.summary() == found.summary()
    assert is_frontier(path)
    found.save(path)


def test_other_files_are_neither_read_nor_replaced(found, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"kind": "something else"}')
    with pytest.raises(xprune.ArtefactError, match="does not hold a frontier"):
        xprune.Frontier.load(mine)
    with pytest.raises(xprune.ArtefactError, match="does not hold a frontier"):
        xprune.Frontier.load(tmp_path / "none.json")
    for write in (found.save, found.report):
        with pytest.raises(xprune.ArtefactError, match="did not write it"):
            write(mine)
    assert mine.read_text() == '{"kind": "something else"}'


def test_the_table_and_the_picture_show_every_point(found):
    text = found.summary()
    assert all(word in text for word in ("dense", "80 %", "40 %", "MACs", "latency", "chance", "The least that can be"))
    axes = found.plot(cost="params")
    assert axes.get_xlabel() == "parameters, % of dense" and len(axes.lines[2].get_xdata()) == 2
    found.plot(cost="latency")
    with pytest.raises(xprune.BudgetError, match="was not measured"):
        found.plot(cost="money")


def test_the_page_holds_everything_and_loads_nothing(found, tmp_path):
    path = found.report(tmp_path / "frontier.html")
    page = path.read_text()
    assert "default-src 'none'" in page
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert [point["asked"] for point in data["points"]] == [0.8, 0.4]
    assert set(data["labels"]) == {"macs", "params", "latency"}
    assert data["points"][1]["shares"]["macs"] == pytest.approx(100 * found.share(found.points[1], "macs"))
    found.report(path)


def test_names_on_the_page_are_escaped(found):
    sites = ({**found.sites[0], "name": "<b>x</b></script>"}, *found.sites[1:])
    assert "<b>x</b></script>" not in render(xprune.Frontier(**{**vars(found), "sites": sites}))


def test_durations():
    assert [duration(s) for s in (0.2, 59.4, 60, 3599, 3600, 90000)] == [
        "1 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 0 min",
    ]  # fmt: skip
