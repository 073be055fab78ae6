"""Tests that fine-tuning learns, continues after a kill with the same bits, and stops with a clear error."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import xprune
from tests.support.models import Killed, build, fused, images, loader
from xprune.modules.copies import tensors
from xprune.testing import assert_untouched, snapshot

QUICK = xprune.Finetune(epochs=3, lr=1e-3)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True))


def test_it_learns_and_leaves_the_model_given_alone():
    model, data = build("vit"), loader(28, 7)
    before, start = snapshot(model), xprune.evaluate(model, data)
    trained = xprune.finetune(model, data, xprune.Finetune(epochs=12, lr=3e-3))
    assert_untouched(model, before)
    assert xprune.evaluate(trained, data).loss < 0.7 * start.loss
    assert not trained.training and "forward" not in vars(trained)


@pytest.mark.parametrize(
    "settings", [QUICK, xprune.Finetune(epochs=3, ema=0.9), xprune.Finetune(epochs=3, distill=0.5)]
)
def test_a_killed_run_goes_on_to_the_same_bits(settings, tmp_path):
    # Swin drops paths at random, so a wrong random state would change the result.
    model, data = build("swin"), loader(16).dataset
    teacher = build("swin") if settings.distill else None
    train = {"teacher": teacher, "seed": 5}
    every = xprune.Checkpoint(tmp_path, steps=1)
    whole = xprune.finetune(model, DataLoader(data, 4, shuffle=True), settings, **train)
    # A new process would have another random state.
    torch.rand(7)
    with pytest.raises(Killed):
        xprune.finetune(model, fused(4, after=16 + 9), settings, checkpoint_dir=every, **train)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    torch.rand(3)
    resumed = xprune.finetune(model, DataLoader(data, 4, shuffle=True), settings, checkpoint_dir=tmp_path, **train)
    assert same(resumed, whole) and not same(resumed, model)
    assert not list(tmp_path.iterdir()), "a run that ended leaves no checkpoint to be taken for another's"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    data = loader(16).dataset
    with pytest.raises(Killed):
        every = xprune.Checkpoint(tmp_path, steps=1)
        xprune.finetune(build("vit"), fused(4, after=16 + 9), QUICK, checkpoint_dir=every)
    other = DataLoader(data, 4, shuffle=True)
    with pytest.raises(xprune.TrainingError, match=r"another run: lr differ"):
        xprune.finetune(build("vit"), other, xprune.Finetune(epochs=3, lr=9e-4), checkpoint_dir=tmp_path)
    with pytest.raises(xprune.TrainingError, match=r"another run: start differ"):
        model = build("vit")
        model.head.bias.data += 1
        xprune.finetune(model, other, QUICK, checkpoint_dir=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"junk")
    with pytest.raises(xprune.TrainingError, match="Delete it"):
        xprune.finetune(build("vit"), other, QUICK, checkpoint_dir=tmp_path)


def test_an_order_that_is_not_known_is_warned_of(tmp_path):
    data = loader(16).dataset
    weighted = DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 16, 16))
    with pytest.warns(UserWarning, match="WeightedRandomSampler is not known to be seeded"):
        xprune.finetune(build("vit"), weighted, xprune.Finetune(epochs=1), checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    x, y = images(12), torch.zeros(12, dtype=torch.long)
    x[9] = float("nan")
    batches = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(xprune.TrainingError, match=r"step 2 of 9: the loss is nan \(epoch 1\); there is no checkpoint"):
        xprune.finetune(build("vit"), batches, QUICK, checkpoint_dir=tmp_path)


def test_the_seed_decides():
    model = build("swin")
    a, b, c = (
        xprune.finetune(model, loader(16, 4, shuffle=True), xprune.Finetune(epochs=1), seed=seed) for seed in (0, 0, 1)
    )
    assert same(a, b) and not same(a, c)


def test_the_global_random_state_is_put_back():
    model = build("vit")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    xprune.finetune(model, loader(8, 4, shuffle=True), xprune.Finetune(epochs=1))
    assert torch.equal(torch.rand(2), expected)


def test_mixed_precision_leaves_an_ordinary_model():
    trained = xprune.finetune(build("vit"), loader(8, 4), xprune.Finetune(epochs=1, mixed_precision="bf16"))
    assert {p.dtype for p in trained.parameters()} == {torch.float32} and "forward" not in vars(trained)
    assert trained(images()).dtype == torch.float32


def test_frozen_weights_stay_frozen():
    model = build("vit")
    model.patch_embed.requires_grad_(False)
    trained = xprune.finetune(model, loader(8, 4), xprune.Finetune(epochs=1, lr=1e-2))
    assert torch.equal(trained.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert not torch.equal(trained.head.weight, model.head.weight)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"lr": 0}, {"distill": 2}, {"ema": 1.0}, {"mixed_precision": "int4"}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(xprune.TrainingError, match=next(iter(bad))):
        xprune.Finetune(**bad)


def test_distillation_needs_a_teacher():
    with pytest.raises(xprune.TrainingError, match="teacher"):
        xprune.finetune(build("vit"), loader(8, 4), xprune.Finetune(distill=0.5))
