"""Tests that residual channels are removed exactly and within budgets, or refused."""

import copy

import pytest
import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.metaformer import GroupNorm1, MetaFormer
from timm.models.pit import PoolingVisionTransformer
from torch import nn
from torch.nn import functional as F

import xprune
from tests.support.models import CLASSES, assert_gated_apart, build, images, loader, vit
from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.modules.norms import weighted_norm
from xprune.testing import check_adapter, check_selection, perturb, random_plan

ALL = ("head", "neuron", "channel")
STAGES = {"depths": (1, 1), "dims": (6, 10), "num_classes": CLASSES}
MODELS = {
    # This model has a class token, registers and LayerScale.
    "everything": vit("vit_small_patch14_reg4_dinov2", qk_norm=True, depth=1),
    "metaformer": lambda: MetaFormer(**STAGES, norm_layers=GroupNorm1),
    # Between stages, a grouped convolution makes two channels from each one.
    "pit": lambda: PoolingVisionTransformer(32, 16, 8, "overlap", (8, 8), (1, 1), (1, 2), 2, num_classes=CLASSES),
    "convnext": lambda: ConvNeXt(depths=(1,) * 4, dims=(4, 4, 6, 6), num_classes=CLASSES),
}
STREAMS = {"everything": 1, "deit-distilled": 1, "convolutional stem": 1, "packed glu with norm": 1, "pit": 1}
STREAMS |= {"swin": 2, "swinv2": 2, "metaformer": 2, "convnext": 4}


def model_of(name):
    if name not in MODELS:
        return build(name)
    torch.manual_seed(0)
    return perturb(MODELS[name]())


def channels(sites):
    return [site for site in sites if site.kind == "channel"]


@pytest.mark.parametrize("name", STREAMS)
def test_pruned_equals_gated(name):
    sites = check_adapter(model_of(name), images(), seeds=range(2), units=ALL)
    assert len(channels(sites)) == STREAMS[name]


def test_a_stream_goes_from_everything_that_holds_it():
    model = model_of("everything")
    (site,) = channels(xprune.find_sites(model, images(), units=ALL))
    pruned = xprune.apply(model, Plan((site,), (tuple(range(5, 24)),)), images())
    assert pruned.cls_token.shape[-1] == pruned.reg_token.shape[-1] == pruned.pos_embed.shape[-1] == 19
    block = pruned.blocks[0]
    assert block.attn.qkv.weight.shape == (72, 19) and block.attn.proj.weight.shape == (19, 24)
    assert block.norm1.normalized_shape == (19,) and block.ls1.gamma.shape == (19,)
    assert block.mlp.fc1.in_features == block.mlp.fc2.out_features == pruned.head.in_features == 19
    assert pruned.patch_embed.proj.out_channels == 19
    assert not any(24 in t.shape[-1:] for n, t in pruned.named_parameters() if "proj.weight" not in n)


def test_the_reference_is_zeros_at_readers_and_norms_over_what_is_kept():
    """Compares the gates with the equation by hand, on one block without an attention."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
            self.mlp = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.mlp(self.norm(x)))

    model, x, keep = perturb(Block()), torch.randn(4, 3), [0, 3, 4, 7]
    (site,) = channels(xprune.find_sites(model, x, units=("channel",)))
    gate = torch.zeros(8)
    gate[keep] = 1
    stream = model.stem(x)
    normed = torch.zeros(4, 8)
    normed[:, keep] = F.layer_norm(stream[:, keep], (4,), model.norm.weight[keep], model.norm.bias[keep])
    expected = model.head((stream + model.mlp(normed)) * gate)
    with xprune.Gates([site], [gate]).attached(model):
        torch.testing.assert_close(model(x), expected)
    pruned = xprune.apply(model, Plan((site,), (tuple(keep),)), x)
    torch.testing.assert_close(pruned(x), expected)


def test_patch_merging_reads_four_copies():
    sites = xprune.find_sites(build("swin"), images(), units=("channel",))
    groups = {cut.tensor: cut.groups for cut in sites[0].cuts}
    assert groups["layers.1.downsample.reduction.weight"] == groups["layers.1.downsample.norm.weight"] == 4


def test_convolutions_of_groups_tie_channels():
    model = model_of("pit")
    (site,) = xprune.find_sites(model, images(), units=("channel",))
    widths = {cut.tensor: cut.width for cut in site.cuts}
    assert site.size == 8 and widths["norm.weight"] == 2 and widths["patch_embed.conv.weight"] == 1
    pool = xprune.apply(model, Plan((site,), ((0, 3, 4),)), images()).transformers[1].pool.conv
    assert (pool.groups, pool.in_channels, pool.out_channels) == (3, 3, 6)


@pytest.mark.parametrize("name", ["everything", "swin", "pit"])
def test_each_sample_has_its_own_row(name):
    model, inputs = model_of(name), images(3)
    sites = xprune.find_sites(model, inputs, units=("channel",))
    assert_gated_apart(model, inputs, sites)


@pytest.mark.parametrize("kind", [LayerNorm2d, GroupNorm1])
def test_norms_of_maps_take_their_statistics_from_those_kept(kind):
    norm, x, keep = kind(6), torch.randn(2, 6, 4, 4), [0, 2, 5]
    nn.init.normal_(norm.weight)
    weight, small = torch.zeros(1, 6, 1, 1), kind(3)
    weight[:, keep] = 1
    small.weight.data, small.bias.data = norm.weight[keep], norm.bias[keep]
    torch.testing.assert_close(weighted_norm(norm, x, weight)[:, keep], small(x[:, keep]))
    torch.testing.assert_close(weighted_norm(norm, x, torch.ones(1, 6, 1, 1)), norm(x))


@pytest.mark.parametrize("name", ["everything", "swin", "convnext", "pit"])
def test_costs_are_exact_on_any_plan(name):
    model = model_of(name)
    sites = xprune.find_sites(model, images(), units=ALL)
    costs = xprune.measure_costs(model, sites, images())
    for seed in range(2):
        plan = random_plan(sites, seed)
        pruned = xprune.apply(model, plan, images())
        assert xprune.count_macs(pruned, images()) == pytest.approx(costs.macs.total(plan.counts), abs=1)
        assert xprune.count_params(pruned) == pytest.approx(costs.params.total(plan.counts), abs=1e-3)
        for index, count in enumerate(plan.counts):
            more = [count + 1 if i == index else n for i, n in enumerate(plan.counts)]
            step = costs.macs.total(more) - costs.macs.total(plan.counts)
            assert costs.macs.step(plan.counts, index, count + 1) == pytest.approx(step)


@pytest.mark.parametrize(
    ("selection", "budget"),
    [
        ("global", xprune.Budget(macs=0.5)),
        ("uniform", xprune.Budget(params=0.3)),
        (xprune.LearnedThresholds(steps=3), xprune.Budget(macs=0.6, params=0.4, min_units=2, round_to=4)),
    ],
)
def test_budgets_are_met_with_all_kinds_of_units(selection, budget):
    model = model_of("everything")
    sites = xprune.find_sites(model, images(), units=ALL)
    scores = xprune.score(model, sites, criterion="random")
    plan = check_selection(selection, model, scores, loader(), budget)
    lost = {site.kind for site, count in zip(sites, plan.counts, strict=True) if count < site.size}
    assert "channel" in lost


def test_the_budget_of_a_pyramid_is_met_with_several_streams():
    model = model_of("convnext")
    sites = xprune.find_sites(model, images(), units=ALL)
    budget = xprune.Budget(macs=0.5, params=0.5)
    plan = xprune.select(model, xprune.score(model, sites, criterion="random"), budget, example_inputs=images())
    pruned = xprune.apply(model, plan, images())
    assert xprune.count_macs(pruned, images()) <= 0.5 * xprune.count_macs(model, images()) + 1
    assert xprune.count_params(pruned) <= 0.5 * xprune.count_params(model)


@pytest.mark.parametrize("criterion", ["random", "magnitude", "taylor", "xpruner,steps=4"])
def test_criteria_score_channels(criterion):
    model = model_of("everything")
    sites = xprune.find_sites(model, images(), units=("channel",))
    scores = xprune.score(model, sites, loader(), criterion, seed=3)
    again = xprune.score(model, sites, loader(), criterion, seed=3)
    assert torch.equal(scores.values[0], again.values[0]) and scores.values[0].std() > 0
    assert criterion != "taylor" or scores.classwise[0].shape == (CLASSES, 24)


def test_magnitude_is_of_every_weight_that_leaves():
    model = model_of("everything")
    (site,) = xprune.find_sites(model, images(), units=("channel",))
    (values,) = xprune.score(model, [site], criterion="magnitude").values
    pruned = xprune.apply(model, Plan((site,), (tuple(range(1, 24)),)), images())
    before, after = (sum(float(p.detach().double().square().sum()) for p in m.parameters()) for m in (model, pruned))
    assert float(values[0]) == pytest.approx((before - after) ** 0.5, rel=1e-4)


def test_saved_equals_loaded_with_wholly_removed_modules_too(tmp_path):
    torch.manual_seed(0)
    model = perturb(build("swinv2"))
    sites = xprune.find_sites(model, images(), units=ALL)
    keeps = [() if site.kind == "neuron" else tuple(range(0, site.size, 2)) for site in sites]
    pruned = xprune.apply(model, Plan(sites, tuple(keeps)), images())
    with pytest.warns(UserWarning, match="model_fn"):
        xprune.save(pruned, tmp_path / "m")
    loaded = xprune.load(tmp_path / "m", model_fn=lambda: copy.deepcopy(model))
    assert torch.equal(loaded(images()), pruned(images()))
    with pytest.raises(xprune.ModelError, match="lost all its units"):
        xprune.find_sites(pruned, images(), units=ALL)


def test_pruning_again_composes():
    model = model_of("everything")
    sites = xprune.find_sites(model, images(), units=ALL)
    first = random_plan(sites, 1, gone=0)
    once = xprune.apply(model, first, images())
    second = random_plan(xprune.find_sites(once, images(), units=ALL), 2, gone=0)
    twice, direct = xprune.apply(once, second, images()), xprune.apply(model, first.then(second), images())
    torch.testing.assert_close(twice(images()), direct(images()))


def test_old_files_with_one_norm_are_read():
    data = {"name": "a", "kind": "neuron", "size": 2, "width": 1, "layer": "l", "cuts": [], "norm": "n"}
    assert Site.from_json(data).norms == ("n",) and Site.from_json({**data, "norm": ""}).norms == ()


class Fixed(nn.Module):
    """Adds a fixed tensor that is no parameter, so no channel can be removed."""

    def __init__(self, inner):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(3, 8), inner, nn.Linear(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 8))

    def forward(self, x):
        x = self.inner(self.stem(x))
        return self.head(x + self.mlp(x) + torch.arange(8.0))


def test_channels_that_cannot_go_are_refused_with_the_reason():
    x = torch.randn(2, 3)
    with pytest.raises(xprune.ModelError, match=r"stem writes.*forward fails.*Leave 'channel' out"):
        xprune.find_sites(Fixed(nn.LayerNorm(8)), x, units=ALL)
    with pytest.raises(xprune.ModelError, match=r"channels cannot be pruned in this model"):
        xprune.find_sites(Fixed(nn.GroupNorm(2, 8)), x, units=ALL)
    assert xprune.find_sites(Fixed(nn.LayerNorm(8)), x)[0].kind == "neuron"
    backbone = build("vit")
    backbone.head = nn.Identity()
    with pytest.raises(xprune.ModelError, match="the model returns them"):
        xprune.find_sites(backbone, images(), units=("channel",))
