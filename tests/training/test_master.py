"""Tests that half-precision models are trained in float32, and get their dtypes back."""

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import Killed
from tests.support.ordinary_models import labels, net, pairs, tokens
from xprune.modules.copies import tensors
from xprune.training import runtime
from xprune.training.master import narrow, precision_for, widen, widened

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bfloat16": BF16, "float16": FP16}


def in_dtype(dtype, batches):
    return [(inputs.to(dtype), targets) for inputs, targets in batches]


def moved(before, after):
    """The fraction of all weights that differ."""
    pairs_ = list(zip(before.parameters(), after.parameters(), strict=True))
    return sum(int((a != b).sum()) for a, b in pairs_) / sum(a.numel() for a, _ in pairs_)


@pytest.mark.parametrize("name", DTYPES)
def test_small_updates_add_up(name):
    """At this learning rate, an update of a single step is rounded away in bfloat16, and AdamW fails in float16."""
    dtype = DTYPES[name]
    model = net().to(dtype)
    settings = xprune.Finetune(epochs=60, lr=5e-5, warmup=0.0, mixed_precision="no")
    tuned = xprune.finetune(model, in_dtype(dtype, pairs()), settings)
    assert {weight.dtype for weight in tuned.parameters()} == {dtype}
    # What is expected: the same training of the same weights in float32, rounded at the end.
    batches = [(inputs.float(), targets) for inputs, targets in in_dtype(dtype, pairs())]
    expected = xprune.finetune(net().to(dtype).float(), batches, settings)
    for found, wanted in zip(tuned.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted.to(dtype))
    assert moved(model, tuned) > 0.8


@pytest.mark.parametrize("name", DTYPES)
def test_a_whole_run_keeps_the_dtype(name):
    dtype = DTYPES[name]
    batches = in_dtype(dtype, pairs())
    settings = xprune.Finetune(epochs=4, lr=1e-3, distill=0.5, ema=0.5)
    for criterion, selection in (("taylor", "global"), ("xpruner,steps=4", "learned,steps=3")):
        pruner = xprune.Pruner(
            net().to(dtype), criterion, xprune.Budget(params=0.8), selection, settings, latency=False
        )
        result = pruner.run(batches)
        assert {tensor.dtype for tensor in tensors(result.model).values()} == {dtype}
        assert result.metrics["finetuned"].loss < result.metrics["pruned"].loss
        assert result.model(batches[0][0]).dtype is dtype


class Mixed(nn.Module):
    """Parameters and buffers of several dtypes, some of them tied or frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.same = nn.Linear(8, 8, dtype=BF16), nn.Linear(8, 3), nn.Linear(8, 8, dtype=BF16)
        self.same.weight = self.body.weight
        self.frozen = nn.Parameter(torch.ones(8, dtype=FP16), requires_grad=False)
        self.register_buffer("scale", torch.full((8,), 0.3, dtype=BF16))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        x = x.to(self.body.weight.dtype)
        x = torch.relu(self.same(self.body(x))) * self.scale * self.frozen
        return self.head(x.mean(1).to(self.head.weight.dtype))


@pytest.mark.parametrize("precision", [None, "no", "bf16"])
def test_each_tensor_keeps_its_dtype(precision):
    model = Mixed()
    before = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in tensors(model).items()}
    tuned = xprune.finetune(model, pairs(), xprune.Finetune(epochs=5, lr=1e-3, mixed_precision=precision))
    assert {name: (tensor.dtype, tensor.requires_grad) for name, tensor in tensors(tuned).items()} == before
    assert tuned.same.weight is tuned.body.weight
    for name in ("scale", "steps", "frozen"):
        assert torch.equal(getattr(tuned, name), getattr(model, name))
    assert not torch.equal(tuned.body.weight, model.body.weight)


class Breaks(list):
    """Batches whose reading fails after `left` of them."""

    left = 0

    def __iter__(self):
        for batch in super().__iter__():
            if not self.left:
                raise Killed
            self.left -= 1
            yield batch


def test_a_killed_selection_goes_on_from_the_float32_weights(tmp_path):
    def run(data, folder=None):
        settings, budget = xprune.Finetune(steps=5, lr=5e-5), xprune.Budget(params=0.8)
        given = {"checkpoint_dir": folder, "latency": False}
        pruner = xprune.Pruner(net().to(BF16), "magnitude", budget, "learned,steps=4", settings, **given)
        return pruner.run(data).model

    whole = run(in_dtype(BF16, pairs()))
    broken = Breaks(in_dtype(BF16, pairs()))
    # One batch is read at the start and two are evaluated. So the selection is killed after three of its four steps.
    broken.left = 6
    with pytest.raises(Killed):
        run(broken, xprune.Checkpoint(tmp_path, steps=1))
    assert (tmp_path / "select" / "checkpoint.safetensors").exists()
    assert moved(whole, run(in_dtype(BF16, pairs()), tmp_path)) == 0


def test_a_killed_run_goes_on_from_the_float32_weights(tmp_path):
    model, settings = net().to(BF16), xprune.Finetune(epochs=3, lr=5e-5)
    whole = xprune.finetune(model, in_dtype(BF16, pairs()), settings)
    broken = Breaks(in_dtype(BF16, pairs()))
    broken.left = 3
    with pytest.raises(Killed):
        xprune.finetune(model, broken, settings, checkpoint_dir=xprune.Checkpoint(tmp_path, steps=1))
    resumed = xprune.finetune(model, in_dtype(BF16, pairs()), settings, checkpoint_dir=tmp_path)
    assert moved(whole, resumed) == 0


def test_scores_of_a_float16_model_are_those_of_its_weights_in_float32():
    model, batches = net().to(FP16), in_dtype(FP16, pairs())
    # Gradients of a loss that is this small are 0 in float16.
    task = Small()
    sites = xprune.find_sites(model, batches[0][0])
    found = xprune.score(model, sites, batches, "taylor", task=task)
    wide = [(inputs.float(), targets) for inputs, targets in batches]
    expected = xprune.score(net().to(FP16).float(), sites, wide, "taylor", task=task)
    for one, other in zip(found.values, expected.values, strict=True):
        assert torch.equal(one, other) and one.max() > 0


class Small(xprune.Classification):
    """Classification with a tiny loss."""

    def loss(self, outputs, targets, label_smoothing=0.0):
        return 1e-7 * super().loss(outputs, targets, label_smoothing)


def test_weights_that_the_dtype_cannot_hold_are_named():
    layer = nn.Linear(2, 2, dtype=FP16)
    dtypes = widen(layer)
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(xprune.TrainingError, match=r"weight was trained to values up to 1e\+06.*float16 cannot hold"):
        narrow(layer, dtypes)


def test_a_precision_that_is_not_possible_is_named(monkeypatch):
    def refuses(**_):
        raise ValueError("bf16 mixed precision requires another device.")

    monkeypatch.setattr(runtime, "Accelerator", refuses)
    with pytest.raises(
        xprune.TrainingError, match=r"mixed_precision='bf16' is not possible on this device: bf16 mixed"
    ):
        runtime.accelerator("bf16")


def test_float16_on_the_cpu_computes_in_float32():
    model, settings = net().to(FP16), {"epochs": 2, "lr": 1e-3}
    batches = in_dtype(FP16, pairs())
    found = xprune.finetune(model, batches, xprune.Finetune(mixed_precision="fp16", **settings))
    expected = xprune.finetune(model, batches, xprune.Finetune(mixed_precision="no", **settings))
    assert moved(found, expected) == 0 and moved(model, found) > 0.5


@pytest.mark.parametrize(
    "dtypes, wanted, device, precision",
    [
        ((), None, "cuda", None),
        ((BF16,), None, "cpu", "bf16"),
        ((BF16,), None, "cuda", "bf16"),
        ((FP16,), None, "cpu", None),
        ((FP16,), None, "cuda", "fp16"),
        ((FP16, BF16), None, "cuda", "bf16"),
        ((FP16,), "no", "cuda", "no"),
        ((FP16,), "bf16", "cpu", "bf16"),
    ],
)
def test_the_precision_of_the_forward_pass(dtypes, wanted, device, precision):
    named = {str(index): dtype for index, dtype in enumerate(dtypes)}
    assert precision_for(named, wanted, torch.device(device)) == precision


def test_inputs_of_any_form_are_widened():
    inputs = {"a": [torch.ones(2, dtype=FP16), None], "b": (torch.ones(2).long(), 3, "text")}
    found = widened(inputs)
    assert found["a"][0].dtype is FP32 and found["a"][1] is None
    assert found["b"][0].dtype is torch.int64 and found["b"][1:] == (3, "text")


def test_a_model_in_float32_is_not_changed():
    model = net()
    assert widen(model) == {} and len(labels()) == len(tokens())
