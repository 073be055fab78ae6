"""Tests every method of Captum as a criterion, and compares some with slow references."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import xprune
from tests.support import reference
from tests.support.models import CLASSES, THREE, build, images, loader
from xprune.core.registry import resolve
from xprune.criteria.captum.base import one_of_every
from xprune.criteria.captum.methods import REFUSED, member, served
from xprune.testing import assert_untouched, check_criterion, snapshot

FEW = {"ShapleyValueSampling": ",n_samples=2", "KernelShap": ",n_samples=30", "ShapleyValues": ",groups=1"}
"""Settings under which the dear ones are quick."""
SERVED = [name for name in served() if name != "LayerLRP"]


def criterion(text):
    return resolve(text, xprune.CRITERIA, xprune.Criterion, "criterion")


def log_probability(model, x, y):
    return F.log_softmax(model(x), -1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("name", SERVED)
def test_contract(name):
    scores = check_criterion(f"captum:{name}{FEW.get(name, '')}", build("vit"), loader(7, 7))
    assert scores.criterion == f"captum:{name}"
    assert all(table.shape == (CLASSES, site.size) for site, table in zip(scores.sites, scores.classwise, strict=True))
    # There is one sample of each class, so the mean over classes is the score.
    for table, values in zip(scores.classwise, scores.values, strict=True):
        torch.testing.assert_close(table.mean(0), values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["FeatureAblation", "LayerGradientXActivation"])
@pytest.mark.parametrize("model", THREE[1:])
def test_windows_and_shifted_windows_too(name, model):
    check_criterion(f"captum:{name},batches=1", build(model), loader(4, 4))


def test_layers_whose_input_captum_cannot_fold_are_refused():
    # Swin folds its windows into the batch, so a batch has more rows than samples.
    model = build("swin")
    with pytest.raises(xprune.PluginError, match="captum:LayerConductance cannot run on this model"):
        xprune.score(model, xprune.find_sites(model, images()), loader(4, 4), "captum:LayerConductance")


def test_all_names_of_captum_are_served_or_refused_with_a_reason():
    assert {"IntegratedGradients", "Saliency", "InputXGradient", "GradientShap", "KernelShap"} <= set(SERVED)
    assert {"LayerConductance", "LayerLRP"} <= set(served()) and not set(served()) & set(REFUSED)
    for name, reason in REFUSED.items():
        with pytest.raises(xprune.PluginError, match="cannot score units") as caught:
            criterion(f"captum:{name}")
        assert reason in str(caught.value)


@pytest.mark.parametrize("per_eval", [1, 5])
def test_feature_ablation_is_surgery_one_unit_at_a_time(per_eval):
    model, (x, y) = build("vit"), next(iter(loader(4, 4)))
    sites = xprune.find_sites(model, x)[:2]
    text = f"captum:FeatureAblation,groups=None,perturbations_per_eval={per_eval}"
    scores = xprune.score(model, sites, [(x, y)], text)
    with torch.no_grad():
        dense = log_probability(model, x, y)
        for site, values, table in zip(sites, scores.values, scores.classwise, strict=True):
            for unit in (0, site.size // 2, site.size - 1):
                keep = tuple(u for u in range(site.size) if u != unit)
                pruned = xprune.apply(model, xprune.Plan((site,), (keep,)), x)
                drop = dense - log_probability(pruned, x, y)
                assert float(values[unit]) == pytest.approx(float(drop.mean()), rel=1e-3, abs=1e-6)
                torch.testing.assert_close(table[y, unit], drop, rtol=1e-3, atol=1e-6)


def test_groups_keep_their_sum_and_order_their_units():
    model, batch = build("vit"), next(iter(loader(8, 8)))
    site = max(xprune.find_sites(model, batch[0]), key=lambda site: site.size)
    grouped = xprune.score(model, [site], [batch], "captum:ShapleyValueSampling,groups=4,n_samples=2")
    assert grouped.values[0].unique().numel() == site.size
    with torch.no_grad():
        dense = log_probability(model, *batch)
        with xprune.Gates([site], [torch.zeros(site.size)]).attached(model):
            gone = log_probability(model, *batch)
    assert float(grouped.values[0].sum()) == pytest.approx(float((dense - gone).mean()), rel=1e-3)
    assert grouped.info["completeness_error"] < 1e-3


def test_saliency_is_the_gradient_by_finite_differences():
    model, (x, y) = build("vit"), next(iter(loader(7, 7)))
    site = xprune.find_sites(model, x)[1]
    # The loss is minus the log probability, so the signs differ.
    slow = reference.taylor(build("vit"), site, x, y)
    for text, wanted in (
        ("Saliency", slow.abs().mean(0)),
        ("Saliency,abs=False", -slow.mean(0)),
        ("InputXGradient", -slow.mean(0)),
    ):
        found = xprune.score(model, [site], [(x, y)], f"captum:{text}").values[0].double()
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", THREE)
def test_gradient_times_activation_at_the_layer_is_that_of_the_gate(name):
    model, batches = build(name), loader(4, 4)
    sites = xprune.find_sites(model, images())
    layer, gate = (
        xprune.score(model, sites, batches, f"captum:{m}") for m in ("LayerGradientXActivation", "InputXGradient")
    )
    for a, b in zip(layer.values, gate.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_integrated_gradients_are_complete_and_the_batches_do_not_matter():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    few, many = (xprune.score(model, sites, loader(8, size), "captum:IntegratedGradients,every=1") for size in (8, 4))
    assert few.info["completeness_error"] < 1e-3
    for a, b in zip(few.values, many.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_of_each_few_batches_one_is_used_and_the_seed_says_which():
    model, batches = build("vit"), list(loader(40, 4))
    sites = xprune.find_sites(model, images())
    default = member("captum:IntegratedGradients")()
    assert default.every == 4
    scores = xprune.score(model, sites, batches, default, seed=3)
    # 10 batches are two groups of 4, and 2 that are left over.
    chosen = list(one_of_every(batches, 4, seed=3))
    assert scores.info["samples"] == 12 and len(chosen) == 3
    places = [next(i for i, batch in enumerate(batches) if batch[0] is each[0]) for each in chosen]
    assert [place // 4 for place in places] == [0, 1, 2]
    alone = xprune.score(model, sites, chosen, "captum:IntegratedGradients,every=1", seed=3)
    for a, b in zip(scores.values, alone.values, strict=True):
        torch.testing.assert_close(a, b)
    assert xprune.score(model, sites, batches, "captum:IntegratedGradients,batches=2").info["samples"] == 8
    assert xprune.score(model, sites, batches[:1], default).info["samples"] == 4, "at least one batch is used"
    assert not hasattr(member("captum:InputXGradient")(), "every"), "methods without a path use all batches"


@pytest.mark.parametrize("count", [1, 3, 4, 9, 10])
def test_each_batch_of_a_group_is_equally_likely(count):
    drawn = [one_of_every(range(count), 4, seed) for seed in range(3000)]
    times = torch.bincount(torch.tensor([place for each in drawn for place in each]), minlength=count) / 3000
    sizes = [min(4, count - place // 4 * 4) for place in range(count)]
    torch.testing.assert_close(times, 1 / torch.tensor(sizes), atol=0.04, rtol=0)


def test_a_short_scoring_is_not_announced(capsys):
    model = build("vit")
    xprune.score(model, xprune.find_sites(model, images()), loader(4, 4), "captum:IntegratedGradients")
    assert not capsys.readouterr().out


def test_the_cost_is_printed_before_it_is_paid(capsys, monkeypatch):
    monkeypatch.setattr("xprune.criteria.captum.base.SHORT", 0.0)
    model = build("vit")
    xprune.score(model, xprune.find_sites(model, images()), loader(20, 4), "captum:IntegratedGradients")
    printed = " ".join(capsys.readouterr().out.split())
    assert "captum:IntegratedGradients: 48 forward passes a batch, 2 batches: about" in printed
    assert "(of 5, every=4)" in printed
    sites = xprune.find_sites(model, images(), units=("head",))
    everything = xprune.find_sites(model, images())
    xprune.score(model, sites, loader(8, 4), "captum:FeatureAblation")
    assert "captum:FeatureAblation: 7 forward passes a batch, 2 batches: about" in capsys.readouterr().out
    for where, text, match in (
        (everything, "ShapleyValues", "for 22 features are too many"),
        (sites, "KernelShap,n_samples=5", "are too few for 6 features"),
    ):
        with pytest.raises(xprune.PluginError, match=match) as caught:
            xprune.score(model, where, loader(8, 4), f"captum:{text}")
        assert "units=('head',)" in str(caught.value)


@pytest.mark.parametrize("name", ["Saliency", "LayerConductance", "LayerDeepLift", "KernelShap,n_samples=30"])
def test_warnings_of_the_model_are_shown_and_captums_are_not(name):
    model = build("vit")
    sites = xprune.find_sites(model, images())
    model.register_forward_pre_hook(lambda *_: warnings.warn("Input Tensor of the model", stacklevel=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        xprune.score(model, sites, loader(4, 4), f"captum:{name}")
    assert {str(each.message) for each in caught if each.category is UserWarning} == {"Input Tensor of the model"}


def test_layer_lrp_has_no_rules_for_transformers_and_leaves_the_model_alone():
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(xprune.PluginError, match=r"captum:LayerLRP cannot run on this model.*no rule"):
        xprune.score(model, xprune.find_sites(model, images()), loader(4, 4), "captum:LayerLRP")
    assert_untouched(model, before)


def test_names_and_settings():
    assert criterion("captum:FeatureAblation,perturbations_per_eval=4,batches=3") == member("captum:FeatureAblation")(
        batches=3, perturbations_per_eval=4
    )
    assert criterion("captum:IntegratedGradients,method=riemann_trapezoid").method == "riemann_trapezoid"
    for text, match in (
        ("captum:Salience", "unknown criterion 'captum:Salience'.*FeatureAblation.*Saliency"),
        ("captum:Saliency,n_steps=3", "has no setting 'n_steps'; it has batches, abs"),
        ("captum:IntegratedGradients,n_steps=0", "n_steps=0; .* at least 1"),
        ("captum:IntegratedGradients,n_steps=many", "n_steps='many', wanted a int"),
        ("captum:IntegratedGradients,baseline=1", r"baseline lies in \[0, 1\)"),
        ("captum:FeatureAblation,groups=x", "groups='x'"),
        ("zennit:Epsilon", "unknown criterion 'zennit:Epsilon'; known"),
    ):
        with pytest.raises(xprune.PluginError, match=match):
            criterion(text)


def test_constant_scores_are_refused():
    model = build("vit")
    for parameter in model.head.parameters():
        parameter.data.zero_()
    with pytest.raises(xprune.PluginError, match="the same score"):
        xprune.score(model, xprune.find_sites(model, images()), loader(8, 8), "captum:Saliency")


def test_integrated_gradients_sum_to_what_the_units_add():
    model, (x, y) = build("vit"), next(iter(loader(4, 4)))
    sites = xprune.find_sites(model, x)
    scores = xprune.score(model, sites, [(x, y)], "captum:IntegratedGradients,n_steps=300")
    with torch.no_grad():
        there = log_probability(model, x, y)
        with xprune.Gates(sites, [torch.zeros(site.size) for site in sites]).attached(model):
            gone = log_probability(model, x, y)
    assert float(sum(v.sum() for v in scores.values)) == pytest.approx(float((there - gone).mean()), rel=1e-2)
    assert scores.info["completeness_error"] < 0.02
    rough = xprune.score(model, sites, [(x, y)], "captum:IntegratedGradients,n_steps=2")
    assert rough.info["completeness_error"] > scores.info["completeness_error"]
