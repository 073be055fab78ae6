"""Tests that several small batches for one update give what one large batch gives."""

import pytest
import torch
from torch.utils.data import DataLoader

import xprune
from tests.support.models import Killed, build, images, loader
from tests.support.ordinary_models import net, pairs
from xprune.criteria.xpruner import learner
from xprune.modules.copies import tensors
from xprune.pipeline import Run
from xprune.training import loop


def in_float64(rows, batch):
    return [(x.double(), y) for x, y in DataLoader(loader(rows).dataset, batch)]


@pytest.mark.parametrize(("rows", "batch", "accumulate"), [(32, 4, 4), (27, 4, 2), (30, 4, 2)])
def test_fine_tuning_equals_that_with_large_batches(rows, batch, accumulate):
    """27 and 30 samples leave a last update of 3 samples, and of 4 and 2."""
    model = build("vit").double()  # so that rounding is far below what is compared
    settings = {"epochs": 2, "lr": 1e-3, "clip": 0.5}
    small = xprune.Finetune(**settings, accumulate=accumulate)
    data, large = in_float64(rows, batch), in_float64(rows, batch * accumulate)
    assert small.updates(data) == 2 * len(large)
    found, expected = xprune.finetune(model, data, small), xprune.finetune(model, large, xprune.Finetune(**settings))
    for name, tensor in tensors(expected).items():
        torch.testing.assert_close(tensors(found)[name], tensor, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_batches_weigh_as_many_samples_as_count():
    """Tokens without a label do not count, so batches of equal sizes weigh differently."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 9)).double()
    tokens = torch.randint(9, (8, 5))
    labels = tokens.clone()
    labels[:3], labels[5, 2:] = -100, -100
    task, settings = xprune.TokenClassification(), {"epochs": 3, "lr": 1e-2}
    small = [(tokens[i : i + 4], labels[i : i + 4]) for i in (0, 4)]
    found = xprune.finetune(model, small, xprune.Finetune(**settings, accumulate=2), task=task)
    expected = xprune.finetune(model, [(tokens, labels)], xprune.Finetune(**settings), task=task)
    torch.testing.assert_close(found[1].weight, expected[1].weight, rtol=0, atol=1e-10)
    assert not torch.equal(found[1].weight, model[1].weight)


def test_masks_equal_those_with_large_batches(monkeypatch):
    monkeypatch.setattr(learner, "sampled", lambda masks: masks)  # without chance
    model = build("vit")
    sites, scores = xprune.find_sites(model, images()), []
    for batch, accumulate in ((4, 4), (16, 1)):
        masks = xprune.criteria.xpruner.XPruner(steps=4, shared=1.0, accumulate=accumulate)
        scores.append(torch.cat(xprune.score(model, sites, loader(16, batch), masks).values))
    torch.testing.assert_close(*scores, rtol=0, atol=2e-3)
    assert scores[0].std() > 0.1


def killed_at(step, monkeypatch):
    """Kills a training in the second batch of an update."""
    backward = loop.Loop.backward

    def fails(self, loss):
        if self.step == step and not self.first:
            raise Killed
        backward(self, loss)

    monkeypatch.setattr(loop.Loop, "backward", fails)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, data = build("swin"), loader(28, 4, shuffle=True)  # 7 batches: updates of 3, 3 and 1
    settings = xprune.Finetune(epochs=2, accumulate=3)
    whole = xprune.finetune(model, data, settings)
    for step in (1, 4):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(step, patch)
            xprune.finetune(model, data, settings, checkpoint_dir=xprune.Checkpoint(tmp_path, steps=1))
        resumed = xprune.finetune(model, data, settings, checkpoint_dir=tmp_path)
        for name, tensor in tensors(whole).items():
            assert torch.equal(tensors(resumed)[name], tensor), name


def test_a_selection_takes_updates_and_not_batches():
    tune = xprune.Finetune(epochs=2, accumulate=2)
    chosen, budget = xprune.LearnedThresholds(accumulate=2), xprune.Budget(params=0.8)
    run = Run(net(), pairs(24, 4), latency=False)
    selected = run.select(run.score("magnitude", budget), budget, chosen, tune)
    assert selected.updates == 3, "half of two epochs of three updates"
    assert selected.plan.info["history"][-1]["step"] == 2


@pytest.mark.parametrize("plug_in", [xprune.LearnedThresholds, xprune.criteria.xpruner.XPruner])
def test_numbers_below_one_are_refused(plug_in):
    with pytest.raises(xprune.PluginError, match="accumulate=0"):
        plug_in(accumulate=0)
    with pytest.raises(xprune.TrainingError, match="accumulate=0"):
        xprune.Finetune(accumulate=0)
