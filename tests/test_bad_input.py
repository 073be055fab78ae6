"""Tests that bad input raises a clear error before costly work."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xprune
from tests.support.models import build, images, loader
from xprune.data import load_data

EMPTY = DataLoader(TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long)))
LABELS = torch.tensor([0, 1])
LOADERS = {
    "empty": (EMPTY, "empty"),
    "an empty list": ([], "empty"),
    "an iterator": (iter([(images(), LABELS)]), "only once"),
    "no iterable": (3, "iterable"),
    "images alone": ([images()], r"wanted \(inputs, labels\)"),
    "three things": ([(images(), LABELS, LABELS)], r"wanted \(inputs, labels\)"),
    "a dict": ([{"x": images()}], "task="),
    "soft labels": ([(images(), torch.rand(2, 7))], "integer tensor"),
    "labels too large": ([(images(), torch.tensor([0, 7]))], "7 classes: 0 to 6"),
    "labels negative": ([(images(), torch.tensor([0, -1]))], "7 classes: 0 to 6"),
}


@pytest.mark.parametrize("case", LOADERS)
@pytest.mark.parametrize("role", ["train", "val"])
def test_loader(case, role):
    bad, message = LOADERS[case]
    pruner = xprune.Pruner(build("vit"), finetune=None)
    with pytest.raises(xprune.DataError, match=message):
        pruner.run(bad) if role == "train" else pruner.run(loader(), bad)


def test_weights_that_are_not_numbers():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    model.blocks[0].mlp.fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(xprune.TrainingError, match="loss is nan"):
        xprune.score(model, sites, loader(), "taylor")
    with pytest.raises(xprune.PluginError, match=r"blocks\.0\.mlp.*not finite"):
        xprune.score(model, sites, loader(), "magnitude")
    # Every forward passes through this layer.
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(xprune.ModelError, match=r"VisionTransformer cannot be compared with itself.*(?i:nan)"):
        xprune.find_sites(model, images())


def test_a_file_in_place_of_the_folder_of_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(xprune.pruner, "Run", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(xprune.TrainingError, match="is a file, wanted a folder"):
        xprune.Pruner(build("vit"), "random", checkpoint_dir=tmp_path / "notes").run(loader())


class Answers(xprune.Selection, xprune.Criterion):
    """A criterion that returns a given value."""

    name = "answers"

    def __init__(self, answer):
        self.answer = answer

    def score(self, context, sites):
        return self.answer(sites)

    def select(self, context, scores, costs, budget):
        return self.answer(scores.sites)


def test_plug_ins_that_give_something_else_are_named():
    model, data, cut = build("vit"), loader(), {"finetune": None, "latency": False}
    for answer, says in (
        (lambda sites: None, "select gave a NoneType"),
        (lambda sites: xprune.Plan.full(sites), "the plan costs .* and the budget allows"),
        (lambda sites: xprune.Plan.full(sites[:1]), "other sites"),
    ):
        with pytest.raises(xprune.PluginError, match=says):
            xprune.Pruner(model, "random", selection=Answers(answer), **cut).run(data)
    for answer, says in (
        (lambda sites: None, "score gave a NoneType"),
        (lambda sites: xprune.Scores(sites[:1], (torch.ones(sites[0].size),), "answers"), "scores are of 1 sites"),
    ):
        with pytest.raises(xprune.PluginError, match=says):
            xprune.Pruner(model, Answers(answer), **cut).run(data)


def test_names_that_are_not_known():
    model = build("vit")
    with pytest.raises(xprune.PluginError, match=r"'tailor'; known: .*magnitude.*random.*taylor"):
        xprune.Pruner(model, criterion="tailor")
    with pytest.raises(xprune.PluginError, match=r"known: .*global.*uniform"):
        xprune.Pruner(model, selection="best")
    with pytest.raises(xprune.ModelError, match=r"'block\.\*' matches no site\..* sites are: blocks\.0\.attn"):
        xprune.find_sites(model, images(), exclude=["block.*"])
    with pytest.raises(xprune.ModelError, match="head, neuron"):
        xprune.find_sites(model, images(), units=["layer"])


def test_a_budget_below_what_is_reachable_states_the_least():
    model = build("vit")
    scores = xprune.score(model, xprune.find_sites(model, images()), criterion="random")
    with pytest.raises(xprune.BudgetError, match=r"the least is 0\.") as caught:
        xprune.select(model, scores, xprune.Budget(macs=0.01), example_inputs=images())
    least = float(str(caught.value).split("the least is ")[1].split(". Ask")[0])
    plan = xprune.select(model, scores, xprune.Budget(macs=least), example_inputs=images())
    assert set(plan.counts) == {1}
    with pytest.raises(xprune.BudgetError, match="example_inputs"):
        xprune.select(model, scores, xprune.Budget(macs=0.5))


def test_a_model_without_sites():
    with pytest.raises(xprune.ModelError, match=r"no sites.*docs/adapters\.md"):
        xprune.find_sites(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())


def test_inputs_that_the_model_does_not_take():
    with pytest.raises(xprune.ModelError, match="forward fails on the example inputs"):
        xprune.find_sites(build("vit"), torch.randn(2, 3, 31, 31))


class Detached(nn.Module):
    """A forward that runs but cannot be traced, since it cuts the gradient."""

    def forward(self, x):
        return x.detach().numpy().sum()


def test_a_forward_that_cannot_be_traced():
    with pytest.raises(xprune.ModelError, match="cannot be traced"):
        xprune.find_sites(Detached(), torch.randn(2, 3))


def test_a_plan_of_another_model():
    model = build("vit")
    sites = xprune.find_sites(model, images())
    plan = xprune.Plan(sites, ((0,),) * len(sites))
    pruned = xprune.apply(model, plan, images())
    for other in (pruned, build("swin")):
        with pytest.raises(xprune.PlanError, match="does not fit"):
            xprune.apply(other, plan, images())


def test_a_plan_of_a_kind_of_unit_that_is_not_known():
    sites = xprune.find_sites(build("vit"), images())
    plan = xprune.Plan(sites, ((0,),) * len(sites)).to_json()
    plan["sites"][0]["kind"] = "expert"
    with pytest.raises(xprune.PlanError, match="unknown kind of unit 'expert'; known: head, neuron, channel"):
        xprune.Plan.from_json(plan)
    strange = xprune.Plan((replace(sites[0], kind="expert"),), ((0,),))
    for what in (xprune.apply, xprune.measure_costs):
        given = strange if what is xprune.apply else strange.sites
        with pytest.raises(xprune.PlanError, match="'expert'; known: head"):
            what(build("vit"), given, images())


def test_a_criterion_that_looks_at_data_asks_for_it():
    model = build("vit")
    with pytest.raises(xprune.DataError, match="taylor looks at data"):
        xprune.score(model, xprune.find_sites(model, images()), criterion="taylor")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / label / "0.png")
    (tmp_path / "val" / "dog" / "1.png").write_bytes((tmp_path / "val" / "dog" / "0.png").read_bytes()[:40])
    data = load_data(str(tmp_path), {"input_size": (3, 8, 8)})
    assert len(next(iter(data.train))[1]) == 2
    with pytest.raises(xprune.DataError, match=r"dog.1\.png cannot be read as an image"):
        list(data.val)
