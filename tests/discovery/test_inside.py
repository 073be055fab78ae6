"""Tests that a part of a model is pruned exactly, that the rest stays as it is, and that budgets may be of the part."""

import json
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import nn

import xprune
from tests.support.composite_models import MODELS, PARTS, Block, Towers, batches, task_and_batch, towers
from xprune.modules.part import Part
from xprune.testing import check_selection, random_plan


@cache
def built(name):
    """Returns a model of `MODELS` and its inputs. Nothing here changes them."""
    if name != "towers":
        pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]()


@cache
def found(name, inside=()):
    """Returns the sites of a model of `MODELS`."""
    return xprune.find_sites(*built(name), inside=inside)


def outside(model, part):
    """Returns the parameters and buffers outside of a part."""
    return {name: tensor for name, tensor in model.state_dict().items() if not part.holds(name)}


@pytest.mark.parametrize(("name", "inside"), PARTS)
def test_a_part_is_pruned_exactly_and_the_rest_stays(name, inside):
    model, x = built(name)
    part, sites, whole = Part.of(model, inside), found(name, inside), found(name)
    assert sites.inside == (inside,) and list(sites) == [site for site in whole if part.holds(site.name)] != list(whole)
    # `apply` compares the outputs with those of the gated dense model.
    pruned = xprune.apply(model, random_plan(sites, seed=1, gone=0.5), x)
    before, after = outside(model, part), outside(pruned, part)
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert xprune.count_params(pruned) < xprune.count_params(model)


@pytest.mark.parametrize(("name", "inside"), PARTS)
def test_a_budget_of_the_part_is_met_by_the_part(name, inside):
    model, x = built(name)
    sites, part = found(name, inside), Part.of(model, inside)
    scores, costs = xprune.score(model, sites, criterion="random"), xprune.measure_costs(model, sites, x)
    assert costs.part["params"] == xprune.count_params(nn.ModuleList(model.get_submodule(each) for each in part.outer))
    least = {n: costs.least(xprune.Budget(**{n: 1.0}, of="part"), n) for n in ("macs", "params")}
    budget = xprune.Budget(**{n: (1 + share) / 2 for n, share in least.items()}, of="part")
    plan = xprune.select(model, scores, budget, example_inputs=x)
    dense, pruned = (xprune.count_resources(each, x) for each in (model, xprune.apply(model, plan, x)))
    kept = {n: 1 - (dense[n] - pruned[n]) / costs.part[n] for n in least}
    assert all(kept[n] <= budget.shares[n] + 1e-4 for n in kept)
    assert any(kept[n] > 0.9 * budget.shares[n] for n in kept)
    assert plan.info["predicted"] == pytest.approx(kept, abs=1e-3) and plan.info["of"] == "part"


def test_a_budget_of_the_model_means_the_model():
    model, x = towers()
    sites = xprune.find_sites(model, x, inside="left.*")
    scores = xprune.score(model, sites, criterion="random")
    plan = xprune.select(model, scores, xprune.Budget(macs=0.8), example_inputs=x)
    assert 0.7 < xprune.count_macs(xprune.apply(model, plan, x), x) / xprune.count_macs(model, x) <= 0.8
    assert "of" not in plan.info


@pytest.mark.parametrize("selection", ["global", "uniform", "learned,steps=3"])
def test_every_selection_meets_it(selection):
    model, x = towers()
    sites = xprune.find_sites(model, x, inside="left.*")
    scores = xprune.score(model, sites, criterion="magnitude")
    check_selection(selection, model, scores, batches(), xprune.Budget(macs=0.6, of="part"))


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("part", r"macs=0.01 cannot be reached: .* the least is (0\.\d+) of the macs of the part that inside= names"),
        (
            "model",
            r"macs=0.01 cannot be reached: .* the least is (0\.\d+) of the macs of the whole model. .* it has 4\d",
        ),
    ],
)
def test_the_least_fraction_is_one_of_what_was_asked(of, says):
    model, x = towers()
    costs = xprune.measure_costs(model, xprune.find_sites(model, x, inside="left.*"), x)
    with pytest.raises(xprune.BudgetError, match=says) as error:
        costs.limits(xprune.Budget(macs=0.01, of=of))
    least = float(str(error.value).split("the least is ")[1].split()[0])
    costs.limits(xprune.Budget(macs=least, of=of))
    with pytest.raises(xprune.BudgetError):
        costs.limits(xprune.Budget(macs=least - 2e-4, of=of))


def test_a_budget_of_a_part_needs_a_part():
    model, x = towers()
    costs = xprune.measure_costs(model, xprune.find_sites(model, x), x)
    with pytest.raises(xprune.BudgetError, match='a budget with of="part" needs a part of the model: give inside='):
        costs.limits(xprune.Budget(macs=0.5, of="part"))
    with pytest.raises(xprune.BudgetError, match=r"of='half' is not known. Give of=\"model\""):
        xprune.Budget(macs=0.5, of="half")
    with pytest.raises(xprune.ModelError, match="sites= and inside= were both given"):
        xprune.Pruner(model, "random", sites=xprune.find_sites(model, x), inside="left").run(batches())


def test_only_modules_inside_are_said_to_be_left_alone():
    model = Towers()
    # Attentions with a single head are left alone.
    model.left.blocks[0] = Block(12, 1, 20)
    model.right.blocks[1] = Block(12, 1, 20)
    x = torch.randn(3, 5, 6)
    whole = xprune.find_sites(model, x)
    left = xprune.find_sites(model, x, inside="left.*")
    assert all(path.startswith("left.") for path in left.left)
    assert deepcopy(left).inside == ("left.*",) and deepcopy(left).left == left.left
    assert left.left == {path: why for path, why in whole.left.items() if path.startswith("left.")}


@pytest.mark.parametrize(("inside", "key"), [("left.*", "left.blocks.1"), ("right.*", "right.blocks.1")])
def test_units_that_lie_outside_too_are_left_alone(inside, key):
    model, x = towers(shared=True)
    assert model.left.blocks[1] is model.right.blocks[1]
    sites = xprune.find_sites(model, x, inside=inside)
    assert sites and all(site.name.startswith(f"{inside[:-1]}blocks.0") for site in sites)
    assert sites.left and all(path.startswith(key) for path in sites.left)
    assert all("which is not inside" in why for why in sites.left.values())
    both = xprune.find_sites(model, x, inside=["left.*", "right.*"])
    assert not any("not inside" in why for why in both.left.values())


@pytest.mark.filterwarnings("ignore:some residual streams are left alone")
def test_a_stream_that_leaves_the_part_is_left_alone():
    model, x = towers()
    sites = xprune.find_sites(model, x, units=("head", "channel"), inside="left.*")
    assert {site.kind for site in sites} == {"head"}
    (why,) = (why for path, why in sites.left.items() if path.startswith("stream"))
    assert "a cut of its units would also change right.enter.weight" in why
    inner = xprune.find_sites(model, x, units=("head", "channel"), inside=["left.*", "right.*", "head"])
    assert "channel" in {site.kind for site in inner}


def test_a_part_without_sites_says_where_it_looked():
    model, x = towers()
    with pytest.raises(xprune.ModelError, match=r"^Towers has no sites of units head, neuron inside head: "):
        xprune.find_sites(model, x, inside="head")
    with pytest.raises(xprune.ModelError, match="matches no site"):
        xprune.find_sites(model, x, inside="left.*", exclude="right.*")
    rest = xprune.find_sites(model, x, inside="left.*", exclude="*.mlp")
    assert {site.kind for site in rest} == {"head"}


@pytest.mark.parametrize(("name", "inside"), [PARTS[1], PARTS[2], PARTS[4], PARTS[6]])
def test_a_run_prunes_a_part_and_the_result_says_it(name, inside, tmp_path, capsys):
    model = deepcopy(built(name)[0])
    task, batch = task_and_batch(name)
    part = Part.of(model, inside)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(part.holds(path))
    budget, tune = xprune.Budget(macs=0.7, of="part"), xprune.Finetune(epochs=1)
    result = xprune.Pruner(model, "taylor", budget, finetune=tune, task=task, inside=inside, latency=False).run([batch])
    before, after = outside(model, part), outside(result.model, part)
    assert all(torch.equal(before[key], after[key]) for key in before), "frozen weights outside stay, bit for bit"
    saved = result.metrics["dense"].macs - result.metrics["pruned"].macs
    coverage = result.coverage
    kept = 1 - saved / (coverage.part * result.metrics["dense"].macs)
    assert 0.6 < kept <= 0.7 + 1e-6 and coverage.inside == (inside,)
    told = f"The budget is that of the part {inside}: the plan keeps {100 * kept:.1f}".removesuffix(".0")
    assert told in result.summary() and coverage.text in result.summary()
    assert coverage.text in capsys.readouterr().out
    assert result.settings["inside"] == [inside] and result.settings["budget"]["of"] == "part"
    json.dumps(result.settings)
    again = xprune.PruneResult.load(result.save(tmp_path / "saved"), None if name != "towers" else lambda: model)
    assert again.summary() == result.summary() and again.coverage == coverage
    assert again.plan.info["of"] == "part"


@pytest.mark.parametrize("criterion", ["xpruner,steps=3", "magnitude"])
def test_criteria_and_joint_selections_know_the_part(criterion):
    model, _ = towers()
    budget = xprune.Budget(macs=0.6, params=0.7, of="part")
    pruner = xprune.Pruner(
        model, criterion, budget, "learned,steps=2", finetune=xprune.Finetune(epochs=1), inside="right.*", latency=False
    )
    result = pruner.run(batches())
    predicted = result.plan.info["predicted"]
    assert predicted["macs"] <= 0.6 and predicted["params"] <= 0.7


def test_a_resource_without_modules_has_no_part():
    site = xprune.Site("mlp", "neuron", size=4, width=1, consumers=("mlp.fc2",), module="mlp")
    cost = xprune.LinearCost(2.0, (0.0,), (2.0,))
    costs = xprune.Costs((site,), {"macs": cost, "params": cost}, part={"macs": 0.0})
    with pytest.raises(xprune.BudgetError, match="params is not counted by module"):
        costs.limits(xprune.Budget(params=0.5, of="part"))
    with pytest.raises(xprune.BudgetError, match="the part costs nothing in macs"):
        costs.limits(xprune.Budget(macs=0.5, of="part"))


def test_a_comparison_of_a_part(tmp_path, capsys):
    model, _ = towers()
    data = batches()
    budgets = (xprune.Budget(macs=0.6, of="part"), xprune.Budget(macs=0.8))
    grid = xprune.Grid({"random": "random"}, budgets=budgets, seeds=(0,), finetune=None)
    found = xprune.compare(xprune.Case(model, data, data, inside="left.*"), grid, tmp_path)
    (line,) = found.coverage()
    assert "inside left.*" in line and line in capsys.readouterr().out
    assert found.budgets == ["macs 0.6 of part", "macs 0.8"]
    share = found.report["coverage"][found.rows[0]["subject"]]["part"]
    _, part, whole = (row["macs"] for row in found.rows)
    assert whole <= 0.8 and 1 - (1 - part) / share == pytest.approx(0.6, abs=0.03)
    # The sites are the same, but a larger part has other costs. So no cell may be used again.
    other = xprune.compare(xprune.Case(model, data, data, inside=["left.*", "head"]), grid, tmp_path)
    assert len(other.rows) == 3 and other.rows[1]["subject"] != found.rows[1]["subject"]
    assert "3 rows have other sites" in " ".join(capsys.readouterr().out.split())


def test_digests_of_budgets_of_a_model_have_not_changed():
    from dataclasses import dataclass, field

    from xprune.modules.digest import OPTIONAL, digest_of

    @dataclass(frozen=True)
    class Setting:
        rate: float

    old = digest_of(Setting(0.5))
    qualname = Setting.__qualname__

    @dataclass(frozen=True)
    class Setting:
        rate: float
        more: str = field(default="no", metadata=OPTIONAL)

    assert Setting.__qualname__ == qualname
    assert digest_of(Setting(0.5)) == old != digest_of(Setting(0.5, "yes"))
    assert digest_of(xprune.Budget(0.5)) != digest_of(xprune.Budget(0.5, of="part"))
