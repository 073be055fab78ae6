"""Tests which modules patterns choose as a part of a model, and what the part costs."""

import pytest
import torch
from torch import nn

from tests.support.composite_models import Towers, towers
from xprune.costs.count import macs_by_module
from xprune.errors import ModelError
from xprune.modules.part import Part


@pytest.mark.parametrize(
    ("inside", "outer"),
    [
        ("left", ("left",)),
        ("left.*", ("left",)),
        (["left.*", "left.blocks.0"], ("left",)),
        (["*.blocks.1"], ("left.blocks.1", "right.blocks.1")),
        ("*.blocks.[01].*", ("left.blocks.0", "left.blocks.1", "right.blocks.0", "right.blocks.1")),
        (("head", "right.blocks.0.mlp.*"), ("right.blocks.0.mlp", "head")),
        ("*", ("",)),
    ],
)
def test_patterns_choose_modules_with_all_that_is_inside(inside, outer):
    model = Towers()
    part = Part.of(model, inside)
    assert sorted(part.outer) == sorted(outer)
    for path, _ in model.named_modules():
        assert part.holds(path) == any(f"{path}.".startswith(f"{each}." if each else "") for each in outer), path
    assert part.holds("left.blocks.0.mlp.0.weight") == any("left.blocks.0.mlp.0".startswith(each) for each in outer)


@pytest.mark.parametrize("inside", ["lef", "left.block.*", ["left.*", "right.mlp.*"], "left."])
def test_a_pattern_without_a_module_is_an_error_that_lists_modules(inside):
    with pytest.raises(
        ModelError, match=r"matches no module. Correct the pattern. Towers has these modules: left, "
    ) as e:
        Part.of(Towers(), inside)
    assert "head" in str(e.value)


@pytest.mark.parametrize("inside", [5, ["left", 3], {"left.*"}, None])
def test_what_is_no_pattern_is_an_error(inside):
    with pytest.raises(ModelError, match="is not a pattern or a list of patterns"):
        Part.of(Towers(), inside)


def test_parts_add_up_to_the_model():
    model, x = towers()
    by_module = macs_by_module(model, x, len(x))
    assert "left.blocks" not in by_module, "a list of modules has no forward, so its cost has to be added up"
    whole, *parts = (Part.of(model, p).cost(model, by_module) for p in ("*", "left", "right", "head"))
    assert whole == pytest.approx(sum(parts)) == by_module[""]
    blocks, enter = (Part.of(model, p).cost(model, by_module) for p in ("left.blocks", "left.enter"))
    assert blocks + enter == pytest.approx(parts[0])


def test_a_module_with_two_paths_counts_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    assert Part.of(model, ["a.0", "b.0"]).cost(model, {"a.0": 7.0, "c": 2.0}) == 7.0
    assert Part.of(model, ["b.0", "c"]).cost(model, {"a.0": 7.0, "c": 2.0}) == 9.0
    assert torch.equal(model["a"][0].weight, model["b"][0].weight)
