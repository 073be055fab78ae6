"""Tests that `compare` runs every cell once, in the same way, and continues after a stop."""

import json
import math
import statistics

import pytest

import xprune
from tests.support.models import build, images, loader
from xprune.comparison.table import Comparison
from xprune.core.registry import resolve

TUNE = xprune.Finetune(epochs=2)


def grid(**changes):
    settings = {
        "criteria": {"chance": "random", "weights": "magnitude"},
        "selections": {"global": "global", "joint": xprune.LearnedThresholds(steps=3)},
        "budgets": (xprune.Budget(macs=0.6), xprune.Budget(macs=0.4)),
        "seeds": (0, 1),
        "finetune": TUNE,
    }
    return xprune.Grid(**{**settings, **changes})


def case():
    return xprune.Case(build("vit"), loader(16, 8), loader(14, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, xprune.compare(case(), grid(), out, data="stripes")


def test_every_cell_stands_in_the_file_once(folder):
    out, comparison = folder
    found = [(r["seed"], r["criterion"], r["selection"], r["budget"]) for r in comparison.rows]
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2 * 2)
    assert [row["criterion"] for row in comparison.rows[:1]] == ["dense"]
    assert json.loads((out / "comparison.json").read_text())["rows"] == list(comparison.rows)
    for row in comparison.rows:
        share = float(row["budget"].split()[-1]) if row["budget"] else 1.0
        assert row["macs"] <= share and row["updates_before"] == (3 if row["selection"] == "joint" else 0)


def test_a_cell_is_what_the_pruner_gives(folder):
    _, comparison = folder
    row = next(r for r in comparison.rows if r["criterion"] == "weights" and r["seed"] == 1)
    pruner = xprune.Pruner(build("vit"), "magnitude", xprune.Budget(macs=0.6), finetune=TUNE, seed=1)
    metrics = pruner.run(loader(16, 8), loader(14, 7)).metrics
    assert row["loss"] == pytest.approx(metrics["pruned"].loss) and row["metric"] == metrics["pruned"].metric
    assert row["tuned_loss"] == pytest.approx(metrics["finetuned"].loss)


def test_what_is_there_is_not_run_again(folder, tmp_path):
    out, comparison = folder
    (tmp_path / "comparison.json").write_text((out / "comparison.json").read_text())
    report = json.loads((out / "comparison.json").read_text())
    report["rows"] = report["rows"][:-1]
    (tmp_path / "comparison.json").write_text(json.dumps(report))

    ran = []

    def only(seed):
        ran.append(seed)
        return case()

    again = xprune.compare(only, grid(), tmp_path, data="stripes")
    assert ran == [0, 1], "what the cells are of has to be told for each seed"
    for a, b in zip(again.rows, comparison.rows, strict=True):
        same = {k: v for k, v in b.items() if not k.endswith("seconds")}
        assert {k: v for k, v in a.items() if not k.endswith("seconds")} == same
    other = grid(criteria={"chance": "random", "weights": "magnitude,p=1"}, selections={"global": "global"})
    changed = xprune.compare(only, other, tmp_path, data="stripes").rows
    assert len(changed) == len(again.rows)
    for a, b in zip(changed, again.rows, strict=True):
        stale = (a["criterion"], a["selection"]) == ("weights", "global")
        assert ("Magnitude(p=1)" in a["made_by"]) == stale and (stale or a == b), "and no other cell is run again"
    with pytest.raises(xprune.ArtefactError, match="cannot be shown"):
        xprune.compare(case(), grid(finetune=None), tmp_path, data="stripes")
    (tmp_path / "comparison.json").write_text("junk")
    with pytest.raises(xprune.ArtefactError, match="not a comparison"):
        xprune.compare(case(), grid(), tmp_path, data="stripes")


def test_a_wrong_name_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(xprune.PluginError, match="unknown criterion"):
        xprune.compare(case(), grid(criteria={"a": "random", "b": "chance"}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_peers_stand_beside_and_may_fail(tmp_path):
    def half(case, budget, seed):
        sites = xprune.find_sites(case.model, images())
        keeps = tuple(tuple(range(site.size // 2 or 1)) for site in sites)
        return xprune.apply(case.model, xprune.Plan(sites, keeps), images())

    def broken(case, budget, seed):
        raise ValueError("no such layer")

    peers = {"half": half, "broken": broken}
    found = xprune.compare(case(), grid(criteria={}, peers=peers, seeds=(0,), finetune=None), tmp_path)
    rows = {(row["criterion"], row["budget"]): row for row in found.rows}
    assert rows["half", "macs 0.6"]["macs"] < 0.6
    assert rows["broken", "macs 0.6"]["failed"] == "ValueError: no such layer"
    assert "| broken | its own | failed |" in found.markdown()
    half = [{**row, "seed": 9, "metric": 0.5, "tuned_metric": 0.5} for row in found.rows if "failed" in row]
    half = [{key: value for key, value in row.items() if key != "failed"} for row in half]
    table = Comparison((*found.rows, *half), found.report).markdown()
    assert "| broken | its own | 50.0 (1 of 2 failed) |" in table
    assert "(1 of 2 seeds)" in next(line for line in table.splitlines() if line.startswith("| half |"))


def test_mean_and_spread_by_hand(folder):
    _, comparison = folder
    rows = [r for r in comparison.rows if (r["criterion"], r["selection"]) == ("chance", "global")]
    values = [100 * r["metric"] for r in rows if r["budget"] == "macs 0.4"]
    wanted = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    line = next(line for line in comparison.markdown().splitlines() if line.startswith("| chance | global"))
    assert wanted in line
    assert math.isclose(comparison.table().row_count, 5)


def test_the_picture_is_written(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = folder[1].plot(tmp_path / "accuracy.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_of_one_budget_has_a_line_for_each_side_the_best_one_last(folder, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: drawn.append(self))
    rows = tuple(row for row in folder[1].rows if row["budget"] in ("", "macs 0.4"))
    Comparison(rows, {}).plot(tmp_path / "accuracy.png")
    first, *_, last = drawn[0].axes
    means = last.lines[1].get_xdata()
    assert list(means) == sorted(means)
    sides = {(r["criterion"], r["selection"]) for r in rows if r["selection"]}
    assert len(means) == len({label.get_text() for label in first.get_yticklabels()}) == len(sides)


def test_an_empty_comparison_says_so():
    with pytest.raises(xprune.DataError, match="no cells"):
        Comparison((), {}).table()


def test_settings_behind_the_name():
    def criterion(text):
        return resolve(text, xprune.CRITERIA, xprune.Criterion, "criterion")

    assert criterion("taylor,kind=abs,batches=3") == xprune.CRITERIA["taylor"](kind="abs", batches=3)
    assert criterion("xpruner,lambda_sparse=None,lr=0.2").lr == 0.2
    assert criterion("captum:IntegratedGradients,n_steps=4").n_steps == 4
    learned = resolve("learned,slope=[5,20],weights=frozen", xprune.SELECTIONS, xprune.Selection, "selection")
    assert learned == xprune.LearnedThresholds(slope=(5, 20), weights="frozen")
    for wrong, match in (
        ("taylor,kinds=abs", "it has kind, batches"),
        ("taylor,abs", "key=value"),
        ("tailor", "known:"),
    ):
        with pytest.raises(xprune.PluginError, match=match):
            criterion(wrong)
