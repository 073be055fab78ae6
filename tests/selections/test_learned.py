"""Tests that learned thresholds reach the budget, with frozen weights and with weights that learn too."""

import pytest
import torch

import xprune
from tests.support.models import Killed, build, fused, images, loader
from xprune.modules.copies import tensors
from xprune.selections.learned.learner import ThresholdLearner, ThresholdSettings
from xprune.selections.learned.selection import starting_thresholds, within_site
from xprune.testing import assert_untouched, snapshot

BUDGET = xprune.Budget(macs=0.5)
QUICK = xprune.LearnedThresholds(weights="frozen", steps=8)


def scored(name="vit", criterion="random"):
    model = build(name)
    return model, xprune.score(model, xprune.find_sites(model, images()), loader(), criterion)


def learner(settings=ThresholdSettings(), min_units=1):  # noqa: B008 - immutable
    model, scores = scored()
    context = xprune.pipeline.make_context(model, loader())
    costs = xprune.measure_costs(model, scores.sites, images())
    ranks, budget = [within_site(values) for values in scores.values], xprune.Budget(macs=0.5, min_units=min_units)
    start = starting_thresholds(scores, costs, budget)
    return ThresholdLearner(context, ranks, costs, budget, settings, start), ranks


def test_the_path_goes_from_the_dense_model_to_the_plan_of_the_global_selection():
    model, scores = scored(criterion="magnitude")
    found = starting_thresholds(scores, xprune.measure_costs(model, scores.sites, images()), BUDGET)
    plan = xprune.select(model, scores, BUDGET, "global", example_inputs=images())
    full = torch.tensor([site.size for site in plan.sites])
    assert (found[0] == 0).all() and (found.diff(dim=0) >= 0).all()
    short = (torch.tensor(plan.counts) - full * (1 - found[-1])).round()
    assert (short >= 0).all() and short.sum() <= len(full), "but for what filling up adds"
    start = xprune.select(
        model, scores, BUDGET, xprune.LearnedThresholds(weights="frozen", steps=1, lr=1e-9), loader=loader()
    )
    assert start == plan, "nothing learned: the global plan"


def test_ranks_keep_the_order_and_nothing_else():
    ranks = within_site(torch.tensor([0.1, 30.0, -2.0, 0.1]))
    assert ranks.tolist() == [0.625, 0.875, 0.125, 0.375]
    assert torch.equal(
        within_site(torch.randn(9).exp() * 0 + 1).sort(descending=True).values, within_site(torch.ones(9))
    )


def test_the_gate_is_the_tanh_step_of_the_paper_in_the_mean_and_in_the_gradient():
    run, ranks = learner()
    source, slope = run.source, 8.0
    theta = torch.tensor([0.3, 0.5, 0.7, 0.2])
    source.learned.data = theta - source.thresholds(1.0).detach()
    torch.manual_seed(0)
    gates = source(20_000, slope, 1.0)
    assert set(gates.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    smooth = []
    for threshold, rank in zip(source.thresholds(1.0), ranks, strict=True):
        soft = (1 + torch.tanh(slope * (rank.float() - threshold))) / 2
        # The best unit of a site always stays.
        smooth.append(torch.where(rank == rank.max(), torch.ones_like(soft), soft))
    torch.testing.assert_close(gates.detach().mean(0), torch.cat(smooth).detach(), atol=0.02, rtol=0)
    weight = torch.randn(gates.shape[1])
    found = torch.autograd.grad((gates * weight).sum(1).mean(), source.learned)[0]
    slow = torch.autograd.grad((torch.cat(smooth) * weight).sum(), source.learned)[0]
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)


def test_the_multiplier_is_ascended_and_the_lagrangian_is_that_of_the_cost():
    run, _ = learner()
    source = run.source
    source.learned.data.fill_(-2.0)
    source(4, 10.0, 1.0)
    excess = source._excess.detach()
    assert excess > 0.4, "everything is kept, half is allowed"
    expected = source.penalty / 2 * excess.square() + source.get_buffer("multipliers") * excess
    assert float(source.lagrangian().detach()) == pytest.approx(float(expected))
    assert float(source.ascend()) > 0 and float(source.get_buffer("multipliers")) > 0
    source.learned.data.fill_(2.0)
    source(4, 10.0, 1.0)
    before = float(source.get_buffer("multipliers"))
    source.ascend()
    assert float(source.get_buffer("multipliers")) < before, "it falls where the cost is below the target"


@pytest.mark.parametrize("criterion", ["random", "magnitude", "taylor"])
def test_the_plan_keeps_the_best_of_each_site_at_the_budget(criterion):
    model, scores = scored(criterion=criterion)
    before = snapshot(model)
    plan = xprune.select(model, scores, BUDGET, QUICK, loader=loader())
    assert_untouched(model, before)
    for values, keep in zip(scores.values, plan.keeps, strict=True):
        gone = [u for u in range(len(values)) if u not in keep]
        assert not gone or values[list(keep)].min() >= values[gone].max()
    assert plan == xprune.select(model, scores, BUDGET, QUICK, loader=loader()), "the same seed, the same plan"
    history = plan.info["history"]
    assert [record["step"] for record in history] == list(range(8))
    assert all(len(record["rates"]) == len(plan.sites) for record in history)
    assert xprune.Plan.from_json(plan.to_json()).info == plan.info


def test_a_site_that_the_model_needs_keeps_its_units():
    """The MLP of block 1 adds nothing. Thresholds learn this, while a uniform ratio cuts both blocks equally."""
    model, data = build("vit"), loader(28, 7, shuffle=True)
    dead = model.get_submodule("blocks.1.mlp.fc2")
    with torch.no_grad():
        dead.weight.zero_()
        model.get_submodule("blocks.0.mlp.fc2").weight.mul_(4)
    dead.weight.requires_grad_(False)
    model = xprune.finetune(model, data, xprune.Finetune(epochs=15, lr=3e-3, weight_decay=0.0))
    scores = xprune.score(model, xprune.find_sites(model, images(), units=["neuron"]), data, "random")
    chosen = xprune.LearnedThresholds(weights="frozen", steps=150)
    plan = xprune.select(model, scores, xprune.Budget(macs=0.75), chosen, loader=data)
    assert plan.counts[0] > 2 * plan.counts[1], plan.counts


def test_a_killed_run_goes_on_to_the_same_thresholds(tmp_path):
    model, scores = scored("swin")
    for chosen in (QUICK,):
        whole = xprune.select(model, scores, BUDGET, chosen, loader=fused(4), seed=3)
        with pytest.raises(Killed):
            data, every = fused(4, after=4 + 16 + 9), xprune.Checkpoint(tmp_path, steps=4)
            xprune.select(model, scores, BUDGET, chosen, loader=data, seed=3, checkpoint_dir=every)
        resumed = xprune.select(model, scores, BUDGET, chosen, loader=fused(4), seed=3, checkpoint_dir=tmp_path)
        assert resumed == whole and resumed.info == whole.info


def test_weights_that_learn_along_are_kept_and_their_updates_taken_off():
    model, data = build("vit"), loader(16, 4, shuffle=True)
    before = snapshot(model)
    tune = xprune.Finetune(epochs=4)
    result = xprune.Pruner(model, "random", BUDGET, "learned", tune).run(data)
    assert_untouched(model, before)
    assert result.plan.info["weights"] == "joint" and result.plan.info["updates"] == 8, "half of 4 x 4"
    assert len(result.plan.info["history"]) == 8
    alone = xprune.Pruner(model, "random", BUDGET, xprune.LearnedThresholds(weights="joint", steps=16), tune).run(data)
    tuned, cut = (alone.metrics[stage].loss for stage in ("finetuned", "pruned"))
    assert tuned == cut, "all updates were taken: there is nothing left to fine-tune"
    plain = xprune.apply(model, alone.plan, images())
    moved = [not torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(alone.model).values(), strict=True)]
    assert any(moved), "the pruned model has the weights that learned along"


def test_without_fine_tuning_weights_stay():
    plan = xprune.Pruner(build("vit"), "random", BUDGET, xprune.LearnedThresholds(steps=2), None).run(loader()).plan
    assert plan.info["weights"] == "frozen" and plan.info["updates"] == 0


def test_joint_weights_need_updates_to_take():
    joint = xprune.LearnedThresholds(weights="joint", steps=50)
    with pytest.raises(xprune.PluginError, match="needs 50 updates, but fine-tuning makes only 2"):
        xprune.Pruner(build("vit"), "random", BUDGET, joint, xprune.Finetune(epochs=1)).run(loader())
    with pytest.raises(xprune.PluginError, match="frozen"):
        xprune.Pruner(build("vit"), "random", BUDGET, joint, None).run(loader())


def test_it_needs_data():
    model, scores = scored()
    with pytest.raises(xprune.DataError, match="learned needs data"):
        xprune.select(model, scores, BUDGET, "learned", example_inputs=images())


@pytest.mark.parametrize(
    "bad", [{"weights": "both"}, {"steps": 0}, {"lr": 0}, {"slope": (1.0, -1.0)}, {"anneal": 2}, {"penalty": 0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(xprune.PluginError, match=next(iter(bad))):
        xprune.LearnedThresholds(**bad)
