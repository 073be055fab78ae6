"""Tests that measured costs are exact for any plan, for linear resources and for others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import xprune
from tests.support import reference
from tests.support.models import THREE, build, images, loader
from xprune.testing import assert_untouched, check_selection, snapshot

CACHE = {}


def case(name, units=("head", "neuron")):
    """Returns the model, its sites and their costs."""
    if (name, units) not in CACHE:
        model = build(name)
        sites = xprune.find_sites(model, images(), units=units)
        CACHE[name, units] = model, sites, xprune.measure_costs(model, sites, images())
    return CACHE[name, units]


def pruned_to(model, sites, counts):
    """Returns the model with these numbers of units kept at each site."""
    return xprune.apply(model, xprune.Plan(sites, tuple(tuple(range(count)) for count in counts)), images())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(name=st.sampled_from(THREE), chance=st.randoms())
def test_costs_are_exact_on_any_plan(name, chance):
    model, sites, costs = case(name)
    counts = [chance.randint(0, site.size) for site in sites]
    counted = xprune.count_resources(pruned_to(model, sites, counts), images())
    assert counted["macs"] == pytest.approx(costs.macs.total(counts), abs=1)
    assert counted["params"] == costs.params.total(counts)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(chance=st.randoms())
def test_costs_with_streams_are_exact_on_any_plan(chance):
    model, sites, costs = case("vit", ("head", "neuron", "channel"))
    counts = [chance.randint(1, site.size) for site in sites]
    counted = xprune.count_resources(pruned_to(model, sites, counts), images())
    assert counted["macs"] == pytest.approx(costs.macs.total(counts), abs=1)
    assert counted["params"] == pytest.approx(costs.params.total(counts), abs=1e-3)


def test_macs_by_hand():
    model, inputs = build("vit"), images()
    hand = reference.vit_macs(17, 24, 8, [3, 3], 8, [96, 96], 7)
    assert xprune.count_macs(model, inputs) == hand
    assert xprune.count_macs(model, images(5)) == hand, "MACs are of one sample"
    sites = xprune.find_sites(model, inputs)
    pruned = xprune.apply(model, xprune.Plan(sites, ((0,), (1, 5), (0, 2), tuple(range(40)))), inputs)
    assert xprune.count_macs(pruned, inputs) == reference.vit_macs(17, 24, 8, [1, 2], 8, [2, 40], 7)


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert xprune.count_params(model) == 16 + 8
    assert xprune.count_resources(model, torch.randn(2, 4)) == {"macs": 32, "params": 24}


def test_measuring_changes_nothing():
    model = build("vit").train()
    before = snapshot(model)
    xprune.measure_costs(model, xprune.find_sites(model, images()), images())
    xprune.count_resources(model, images())
    assert_untouched(model, before)


class Written(xprune.Resource):
    """The resource of the numbers that linear layers return for one sample."""

    name = "written"
    label = "numbers written"
    always = False

    def by_module(self, model, example_inputs, samples):
        """Counts the outputs of linear layers. A module has the sum of the layers in it."""
        found, device = {"": 0.0}, next(model.parameters()).device

        def look(path):
            def hook(module, args, output):
                parts = path.split(".")
                for end in range(len(parts) + 1):
                    name = ".".join(parts[:end])
                    found[name] = found.get(name, 0.0) + output.numel() / samples

            return hook

        layers = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_hook(look(path)) for path, module in layers]
        model(example_inputs.to(device))
        for handle in handles:
            handle.remove()
        return found


class Staircase(xprune.Cost):
    """A cost with a table for each site, from the number of units to the cost."""

    def __init__(self, tables):
        self.tables = tables

    def total(self, counts):
        """Returns the sum over the tables."""
        return sum(table[count] for table, count in zip(self.tables, counts, strict=True))


class Tiles(xprune.Resource):
    """The resource of tiles of 8 features, like the cost of a kernel that works on whole tiles."""

    name = "tiles"
    label = "tiles"
    unit = "t"

    def by_module(self, model, example_inputs, samples):
        """Counts the tiles of the whole model only."""
        heads = sum(
            -(-m.weight.shape[1] // 8)
            for n, m in model.named_modules()
            if n.endswith(("proj", "fc2")) and m.weight.dim() == 2
        )
        return {"": float(heads)}

    def cost(self, sites, example_inputs, samples, with_counts):
        """Counts the cost anew for each number of units of each site."""
        full = [site.size for site in sites]
        floor = self.by_module(with_counts([0] * len(sites)), example_inputs, samples)[""]
        tables = []
        for index, site in enumerate(sites):
            # Number of tiles -> cost. Another unit in a tile that is there costs nothing.
            steps = {}
            for count in range(1, site.size + 1):
                tiles = -(-count * site.width // 8)
                if tiles not in steps:
                    kept = [count if i == index else 0 for i in range(len(full))]
                    steps[tiles] = self.by_module(with_counts(kept), example_inputs, samples)[""] - floor
            tables.append([0.0, *(steps[-(-count * site.width // 8)] for count in range(1, site.size + 1))])
        return Staircase(tables)


class Crooked(Written):
    """A resource that says that it is linear, and is the square of a linear one."""

    name = "crooked"

    def by_module(self, model, example_inputs, samples):
        """Returns the squares of the linear costs."""
        return {path: cost**2 for path, cost in super().by_module(model, example_inputs, samples).items()}


@pytest.fixture(params=[Written, Tiles])
def resource(request, monkeypatch):
    """Registers a resource of a user for one test."""
    made = request.param()
    monkeypatch.setitem(xprune.RESOURCES, made.name, made)
    return made


def test_a_resource_from_outside_is_exact_on_any_plan(resource):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    costs = xprune.measure_costs(model, sites, images(), [resource.name])
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        counts = [int(torch.randint(0, site.size + 1, (), generator=generator)) for site in sites]
        counted = xprune.count_resources(pruned_to(model, sites, counts), images(), [resource.name])
        assert counted[resource.name] == pytest.approx(costs.of(resource.name).total(counts))


@pytest.mark.parametrize("selection", ["uniform", "global", xprune.LearnedThresholds(steps=3)])
@pytest.mark.parametrize("macs", [None, 0.8])
def test_a_budget_of_a_resource_from_outside_is_met_from_below(resource, selection, macs):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    scores = xprune.score(model, sites, loader(), "taylor")
    budget = xprune.Budget(macs=macs, resources={resource.name: 0.6})
    plan = check_selection(selection, model, scores, loader(), budget)
    assert set(plan.info["predicted"]) == set(budget.shares)


def test_masks_learn_at_a_budget_of_a_resource_from_outside(resource):
    model = build("vit")
    budget = xprune.Budget(resources={resource.name: 0.6})
    result = xprune.Pruner(model, "xpruner,steps=6", budget, finetune=None).run(loader())
    dense, pruned = (result.metrics[stage].costs[resource.name] for stage in ("dense", "pruned"))
    assert pruned <= 0.6 * dense and resource.label in result.summary()


def test_a_resource_is_measured_always_or_where_a_budget_asks(monkeypatch):
    monkeypatch.setitem(xprune.RESOURCES, "written", Written())
    monkeypatch.setitem(xprune.RESOURCES, "tiles", Tiles())
    assert set(xprune.count_resources(build("vit"), images())) == {"macs", "params", "tiles"}
    assert set(xprune.count_resources(build("vit"), images(), ["written"])) == {"macs", "params", "written", "tiles"}
    with pytest.raises(xprune.BudgetError, match="unknown resource 'joules'; known: macs, params, latency, written"):
        xprune.measure_costs(build("vit"), (), images(), ["joules"])


@pytest.mark.parametrize("given", [{}, {"": float("nan")}, {"": float("inf")}, {"blocks": 1.0}])
def test_a_resource_without_a_number_for_the_model_is_named(given, monkeypatch):
    monkeypatch.setattr(Written, "by_module", lambda *_: given)
    monkeypatch.setitem(xprune.RESOURCES, "written", Written())
    model = build("vit")
    for measure in (
        lambda: xprune.count_resources(model, images(), ["written"]),
        lambda: xprune.measure_costs(model, xprune.find_sites(model, images()), images(), ["written"]),
    ):
        with pytest.raises(xprune.PluginError, match=r"resource 'written' gave .* for the whole model"):
            measure()


def test_a_resource_that_is_not_as_linear_as_it_says_is_refused(monkeypatch):
    monkeypatch.setitem(xprune.RESOURCES, "crooked", Crooked())
    model = build("vit")
    with pytest.raises(xprune.ModelError, match=r"cannot be predicted here: .* predicted, .* counted"):
        xprune.measure_costs(model, xprune.find_sites(model, images()), images(), ["crooked"])
