"""Tests of footprints: the rows that gradients show have to be those that a slow search by perturbation shows."""

import pytest
import torch
from torch import nn

from tests.support.generic_models import Apart, Fused, HeadFirst, Pair, Shared
from xprune.core.site import Cut
from xprune.discovery.alone import noisy
from xprune.discovery.footprints import Footprints

DIM, TOKENS = 16, 5

MODULES = {
    "fused": (Fused, "to_out.0"),
    "heads first": (HeadFirst, "proj"),
    "q and kv": (Pair, "proj"),
    "apart": (Apart, "to_out"),
    "one key for all": (Shared, "proj"),
}


def perturbed(alone, inputs, layer, name, row):
    """Returns which features of the layer's input change if one row of a tensor changes. bool (features,)."""
    seen = []
    handle = alone.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        alone(*inputs)
        tensor = dict(alone.named_parameters())[name]
        before = tensor[row].clone()
        tensor[row] += 1.0
        alone(*inputs)
        tensor[row] = before
    handle.remove()
    return (seen[0] - seen[1]).abs().amax((0, 1)) > 1e-6


@pytest.mark.parametrize("name", MODULES)
def test_rows_are_those_that_change_a_head_and_no_other(name):
    kind, layer = MODULES[name]
    module = kind(4, 3)
    alone, inputs = noisy(module), ((torch.randn(2, TOKENS, DIM),), {})
    prints = Footprints(alone, inputs, f"module.{layer}", -1)
    cuts = prints.cuts(4)
    assert cuts
    width = prints.features // 4
    for cut in cuts:
        parameter = dict(alone.named_parameters())[cut.tensor]
        if parameter.dim() < 2 or cut.axis:
            continue
        owners = cut.units(4)
        for unit in range(4):
            for row in owners[unit].tolist():
                changed = perturbed(alone, inputs, f"module.{layer}", cut.tensor, row).view(4, width).any(1)
                assert changed.tolist() == [other == unit for other in range(4)]


def test_a_wrong_number_of_heads_is_refused():
    module = Fused(4, 3)
    prints = Footprints(noisy(module), ((torch.randn(2, TOKENS, DIM),), {}), "module.to_out.0", -1)
    assert prints.features == 12 and prints.cuts(4) and prints.cuts(12) is None and prints.cuts(6) is None
    # Two heads together are two units that do not overlap. The search tries the larger number first.
    assert prints.cuts(2)


def test_values_of_a_single_head_are_no_heads():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, x):
            return self.o((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x))

    prints = Footprints(noisy(Single()), ((torch.randn(2, TOKENS, DIM),), {}), "module.o", -1)
    cuts = prints.cuts(4)
    assert {cut.tensor for cut in cuts} == {"module.v.weight", "module.v.bias"}
    assert prints.of_scores(cuts) is False and prints.follows_attention


@pytest.mark.parametrize(
    ("segments", "size", "keep", "index"),
    [
        ((2, 2), 3, [0, 2], [0, 1, 4, 5, 6, 7, 10, 11]),
        ((2, -3), 2, [1], [2, 3, 4, 5, 6]),
        ((-1, 1, 2), 2, [0], [0, 1, 3, 4]),
    ],
)
def test_segments(segments, size, keep, index):
    cut = Cut.of_segments("w", 0, segments)
    assert cut.index(keep, size).tolist() == index
    assert cut.length(size) == sum(n * size if n > 0 else -n for n in segments)
    assert sorted(cut.units(size)[keep].flatten().tolist() + [i for i in index if i not in cut.units(size)]) == index
