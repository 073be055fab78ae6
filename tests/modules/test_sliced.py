"""Tests cutting in place: outputs are exact, memory stays low, and a failed cut leaves the model as it was."""

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import MODELS, build, images
from xprune.adapters import ADAPTERS
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.sliced import Sliced, fill, slice_of
from xprune.surgery.cut import remove_units
from xprune.testing import assert_untouched, random_plan, snapshot

# `from xprune.surgery import apply` would give the function of this name, not the module.
surgery = import_module("xprune.surgery.apply")


def equal(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2", "norms over units", "class attention"])
def test_sliced_is_cut(name):
    model, x = build(name), images()
    plan = random_plan(xprune.find_sites(model, x), 0)
    cut = remove_units(shared_copy(model), plan, ADAPTERS)
    sliced = remove_units(shared_copy(model), plan, ADAPTERS, slice_of)
    assert any(isinstance(t, Sliced) for t in tensors(sliced).values())
    assert torch.equal(sliced(x), cut(x))
    assert torch.equal(shared_copy(sliced)(x), cut(x))
    filled = fill(sliced)
    assert equal(filled, cut)
    assert {type(p) for p in filled.parameters()} == {nn.Parameter}


def test_two_cuts_of_one_tensor():
    weight = torch.arange(12.0).view(3, 4)
    once = slice_of(weight, 0, torch.tensor([0, 2]))
    twice = slice_of(once, 1, torch.tensor([3, 1]))
    assert twice.shape == (2, 2)
    assert twice.whole().tolist() == [[3.0, 1.0], [11.0, 9.0]]
    assert twice.source is once.source


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MODELS), ("vit", torch.bfloat16), ("swin", torch.bfloat16)]
)
def test_in_place_gives_what_a_copy_gives(name, dtype):
    model, x = build(name).to(dtype), images().to(dtype)
    plan = random_plan(xprune.find_sites(model, x), 1)
    expected = xprune.apply(model, plan, x)
    assert xprune.apply(model, plan, x, in_place=True) is model
    assert equal(model, expected) and torch.equal(model(x), expected(x))
    assert not any(isinstance(t, Sliced) for t in tensors(model).values())
    assert xprune.count_params(model) == xprune.count_params(expected)


def test_in_place_keeps_ties_and_frozen_weights():
    model, x = build("vit"), images()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    plan = random_plan(xprune.find_sites(model, x), 2, gone=0)
    xprune.apply(model, plan, x, in_place=True)
    assert model.blocks[1].mlp is model.blocks[0].mlp
    assert not model.blocks[0].mlp.fc1.weight.requires_grad and model.blocks[0].mlp.fc2.weight.requires_grad
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


FAILURES = [
    (where, failure)
    for where in ("remove_units", "inherit", "first tensor")
    for failure in (MemoryError, KeyboardInterrupt, RuntimeError)
    # That interrupt waits until the model is whole. Another test covers it.
    if (where, failure) != ("first tensor", KeyboardInterrupt)
]


@pytest.mark.parametrize(("where", "failure"), FAILURES)
def test_what_fails_on_the_way_leaves_the_model_as_it_was(where, failure, monkeypatch):
    model, x = build("vit"), images()
    plan = random_plan(xprune.find_sites(model, x), 1)
    before, out, held = snapshot(model), model(x), dict(model.named_parameters())
    if where == "first tensor":

        def whole(self):
            raise failure

        verify = surgery.verify
        monkeypatch.setattr(
            surgery, "verify", lambda *args: (verify(*args), monkeypatch.setattr(Sliced, "whole", whole))
        )
    else:
        function = getattr(surgery, where)

        def fails(given, *args):
            made = function(given, *args)
            # It fails only after the caller's model was changed.
            if given is model:
                raise failure
            return made

        monkeypatch.setattr(surgery, where, fails)
    with pytest.raises(failure):
        xprune.apply(model, plan, x, in_place=True)
    monkeypatch.undo()
    assert_untouched(model, before)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(x), out)


def test_an_interrupt_waits_until_the_model_is_whole(monkeypatch):
    model, x = build("vit"), images()
    plan = random_plan(xprune.find_sites(model, x), 1)
    expected, real, calls = xprune.apply(model, plan, x), Sliced.whole, []
    verify = surgery.verify

    def whole(self):
        calls.append(self)
        if len(calls) in (2, 3, 5):
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(surgery, "verify", lambda *args: (verify(*args), monkeypatch.setattr(Sliced, "whole", whole)))
    with pytest.raises(KeyboardInterrupt):
        xprune.apply(model, plan, x, in_place=True)
    monkeypatch.undo()
    assert equal(model, expected) and torch.equal(model(x), expected(x))


def test_in_place_refuses_a_wrapper():
    model, x = build("vit"), images()
    plan = random_plan(xprune.find_sites(model, x), 1)
    with pytest.raises(xprune.ModelError, match="inside a DataParallel"):
        xprune.apply(nn.DataParallel(model), plan, x, in_place=True)
