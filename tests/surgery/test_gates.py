"""Tests what gates scale, which sample gets which row of gates, and the error if a gate is never used."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import xprune
from tests.support import reference
from tests.support.models import THREE, assert_gated_apart, build, images
from xprune.modules.copies import shared_copy
from xprune.modules.norms import weighted_norm
from xprune.surgery.gates import Gated
from xprune.testing import assert_untouched, snapshot


@pytest.mark.parametrize("name", THREE)
def test_leaving_the_context_restores_the_model(name):
    model, inputs = build(name), images()
    sites, before, expected = xprune.find_sites(model, inputs), snapshot(model), model(inputs)
    gates = xprune.Gates(sites, [torch.rand(site.size) for site in sites])
    with gates.attached(model):
        assert not torch.equal(model(inputs), expected)
    assert_untouched(model, before)
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("name", THREE)
def test_each_sample_has_its_own_row(name):
    """Swin folds its windows into the batch. Sample i is gated as it is gated without the others."""
    model, inputs = build(name), images(3)
    sites = xprune.find_sites(model, inputs)
    assert_gated_apart(model, inputs, sites)


def test_rows_of_a_task_are_used():
    """With sequence-first input, rows are tokens, so the task says which sample each row belongs to."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
    # 5 tokens of 2 samples, in turn.
    x = torch.randn(10, 4)
    (site,) = xprune.find_sites(model, x)
    values = [torch.rand(2, site.size)]
    rows = torch.arange(10) % 2
    with xprune.Gates([site], values, rows=lambda *_: rows).attached(model):
        got = model(x)
    for row in range(10):
        with xprune.Gates([site], [values[0][rows[row]]]).attached(model):
            torch.testing.assert_close(got[row], model(x[row]))


def test_rows_that_do_not_fit_are_refused():
    model, inputs = build("vit"), images(3)
    sites = xprune.find_sites(model, inputs)
    gates = xprune.Gates(sites, [torch.ones(2, site.size) for site in sites])
    with gates.attached(model), pytest.raises(xprune.GateError, match=r"3 rows for 2 samples.*Task\.rows"):
        model(inputs)


class Bypass(nn.Module):
    """Uses the weight of a layer and does not call the layer."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.bypass = False

    def forward(self, x):
        if self.bypass:
            return nn.functional.linear(self.mlp[1](self.mlp[0](x)), self.mlp[2].weight)
        return self.mlp(x)


def test_a_gate_that_does_not_fire_is_an_error():
    model, x = Bypass(), torch.randn(2, 4)
    sites = xprune.find_sites(model, x)
    model.bypass = True
    with xprune.Gates(sites).attached(model), pytest.raises(xprune.GateError, match=r"mlp\.2 did not fire"):
        model(x)


@pytest.mark.parametrize("name", THREE)
def test_activation_checkpointing_sees_the_same_gates(name):
    # The copy is in eval mode, so no paths are dropped.
    model, inputs = shared_copy(build(name), requires_grad=True), images()
    sites = xprune.find_sites(model, inputs)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        values = [torch.full((2, site.size), 0.7, requires_grad=True) for site in sites]
        with xprune.Gates(sites, values).attached(model):
            model(inputs).square().sum().backward()
        gradients.append([value.grad for value in values])
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(with_, without)


def test_gates_take_the_dtype_of_the_input():
    model, inputs = build("vit").to(torch.bfloat16), images().to(torch.bfloat16)
    sites = xprune.find_sites(model, inputs)
    values = [torch.ones(2, site.size, requires_grad=True) for site in sites]
    with xprune.Gates(sites, values).attached(model):
        out = model(inputs)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(value.grad.dtype == torch.float32 and value.grad.abs().sum() > 0 for value in values)


def test_masks_are_prepared_by_accelerate_and_trained_alone():
    model, inputs = shared_copy(build("swin"), requires_grad=False), images(4)
    sites = xprune.find_sites(model, inputs)
    table = nn.Embedding(7, sum(site.size for site in sites))
    nn.init.ones_(table.weight)
    masked = xprune.Gated(model, sites, table)
    trainable = [name for name, parameter in masked.named_parameters() if parameter.requires_grad]
    assert trainable == ["source.weight"]
    runner = Accelerator(cpu=True)
    prepared, optimizer = runner.prepare(masked, torch.optim.Adam(table.parameters(), lr=0.1))
    with masked.gates.attached(masked.model):
        loss = prepared(inputs, torch.tensor([0, 1, 1, 2])).square().mean()
        runner.backward(loss)
    optimizer.step()
    moved = (table.weight != 1).any(dim=1)
    assert moved.tolist() == [True, True, True, False, False, False, False]


def test_a_norm_over_units_takes_its_statistics_from_those_kept():
    norm, x, keep = nn.LayerNorm(6), torch.randn(4, 5, 6), [0, 2, 5]
    nn.init.normal_(norm.weight)
    weight = torch.zeros(6)
    weight[keep] = 1
    torch.testing.assert_close(weighted_norm(norm, x, weight)[..., keep], reference.normed(norm, x, keep))
    torch.testing.assert_close(weighted_norm(norm, x, torch.ones(6)), norm(x))
    assert torch.isfinite(weighted_norm(norm, x, torch.zeros(6))).all()


class _Peft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = model


_Peft.__module__ = "peft.peft_model"


def test_wrappers_are_unwrapped_or_refused():
    model, inputs = build("vit"), images()
    sites = xprune.find_sites(model, inputs)
    assert xprune.find_sites(torch.compile(model, backend="eager"), inputs) == sites
    assert xprune.find_sites(nn.DataParallel(model), inputs) == sites
    with pytest.raises(xprune.ModelError, match="merge_and_unload"):
        xprune.find_sites(_Peft(model), inputs)
    with pytest.raises(xprune.ModelError, match=r"torch\.nn\.Module"):
        xprune.Pruner(lambda x: x)


class Half(nn.Module):
    """Gates of one half for each of 6 units. It notes whether it runs under autocast."""

    def __init__(self):
        super().__init__()
        self.value, self.autocast = nn.Parameter(torch.full((6,), 0.5)), None

    def forward(self):
        self.autocast = torch.is_autocast_enabled("cpu")
        return self.value


def test_gates_are_computed_in_full_precision_and_applied_in_that_of_the_model():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
    sites, source = xprune.find_sites(model, torch.randn(2, 4)), Half()
    gated = Gated(model, sites, source)
    with gated.gates.attached(model), torch.autocast("cpu", torch.bfloat16):
        gated(torch.randn(2, 4)).sum().backward()
    assert source.autocast is False and source.value.grad is not None


@pytest.mark.parametrize("name", THREE)
def test_gates_in_one_tensor_are_those_of_each_site(name):
    """Also with the gradients, and in a forward without gradients before one with gradients."""
    model, inputs = build(name), images(3)
    sites = xprune.find_sites(model, inputs)
    together = torch.rand(3, sum(site.size for site in sites), requires_grad=True)
    apart = [part.detach().requires_grad_() for part in together.split([site.size for site in sites], 1)]
    gates = xprune.Gates(sites, apart)
    with gates.attached(model):
        expected = model(inputs)
        expected.square().sum().backward()
        gates.join(together)
        with torch.no_grad():
            assert torch.equal(model(inputs), expected)
        model(inputs).square().sum().backward()
    torch.testing.assert_close(together.grad, torch.cat([part.grad for part in apart], 1))
