"""Tests that a pruned model can be copied, exported, compiled and trained."""

import copy
import re

import pytest
import torch

import xprune
from tests.support.models import build, images
from xprune.artefact.onnx import export_onnx
from xprune.modules.removed import Removed
from xprune.testing import random_plan


def pruned(name: str, *, empty: bool = False) -> torch.nn.Module:
    """Returns a model pruned at random. With `empty`, the first attention and the last MLP are removed."""
    model = build(name)
    sites = xprune.find_sites(model, images())
    keeps = list(random_plan(sites, 4, gone=0).keeps)
    if empty:
        keeps[0] = keeps[-1] = ()
    return xprune.apply(model, xprune.Plan(sites, tuple(keeps)), images())


# What stands in for a module that is gone is the same in every model. swinv2 has all that a swin has, and more.
@pytest.fixture(params=[("vit", False), ("vit", True), ("swinv2", True)], ids=str)
def model(request):
    name, empty = request.param
    return pruned(name, empty=empty)


def test_deepcopy(model):
    twin = copy.deepcopy(model)
    expected = model(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(images()), expected)


def test_export(model):
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(5)), model(images(5)), atol=1e-5, rtol=1e-4)


def test_compile(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "swinv2"])
def test_onnx(name, tmp_path):
    error = export_onnx(pruned(name, empty=True), images(), tmp_path / "out" / "model.onnx")
    assert error < 1e-4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_gradients_reach_every_weight(model):
    model(images()).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    gone = {path.rpartition(".")[0] for path, part in model.named_modules() if isinstance(part, Removed)}
    # The norm before a removed module has no gradient, since nothing reads its output.
    assert all(re.fullmatch(r"(.*)\.norm\d\.(weight|bias)", name)[1] in gone for name in without)


def test_the_state_dict_is_plain(model):
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert {name: tuple(t.shape) for name, t in twin.named_parameters()} == {
        name: tuple(t.shape) for name, t in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_pruned_swin_takes_another_image_size(name):
    model = pruned(name)
    model.set_input_size(img_size=64, window_size=4)
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()
