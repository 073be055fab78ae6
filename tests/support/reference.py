"""Slow and simple versions of computations of xprune, to compare its results with."""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.plan import Plan
from xprune.core.site import Site
from xprune.surgery.apply import apply


def taylor(model: nn.Module, site: Site, inputs: Tensor, labels: Tensor, step: float = 1e-4) -> Tensor:
    """Returns the derivative of each sample's loss by each unit's gate, (samples, units).

    It is a central difference in float64.
    """
    model = model.double().eval()
    layer = model.get_submodule(site.consumers[0])
    columns = []
    for unit in range(site.size):
        losses = []
        for gate in (1 + step, 1 - step):
            weight = layer.weight.detach().clone()
            span = slice(unit * site.width, (unit + 1) * site.width)
            scaled = weight.clone()
            # A gate on the input is a factor on the columns of the weight.
            scaled[:, span] *= gate
            layer.weight.data = scaled
            with torch.no_grad():
                losses.append(F.cross_entropy(model(inputs.double()), labels, reduction="none"))
            layer.weight.data = weight
        columns.append((losses[0] - losses[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def magnitude(model: nn.Module, site: Site, unit: int, inputs: Tensor, p: int) -> float:
    """Returns the p-norm of the weights that are removed with a unit.

    It is the difference between the whole model before and after.
    """
    keep = tuple(u for u in range(site.size) if u != unit)
    pruned = apply(model, Plan((site,), (keep,)), inputs)
    before, after = (
        sum(float(t.detach().double().abs().pow(p).sum()) for t in m.parameters()) for m in (model, pruned)
    )
    return (before - after) ** (1 / p)


def vit_macs(tokens: int, dim: int, patch: int, heads: list[int], width: int, neurons: list[int], classes: int) -> int:
    """Returns the MACs of a plain ViT, by formula.

    They are those of the patch embedding, of each block and of the classifier. A block has qkv, the two products of the
    attention, proj, fc1 and fc2. `width` is the head size.
    """
    total = (tokens - 1) * dim * 3 * patch * patch + dim * classes
    for h, n in zip(heads, neurons, strict=True):
        inner = h * width
        total += tokens * dim * 3 * inner + 2 * tokens * tokens * inner + tokens * inner * dim + 2 * tokens * dim * n
    return total


def best_uniform(sizes: list[int], cost: list[int], base: int, allowed: float) -> float:
    """Returns the largest ratio of kept units that costs at most `allowed`, by trying all ratios.

    A site keeps the ratio of its units, rounded down, and at least one.
    """
    ratios = sorted({k / s for s in sizes for k in range(1, s + 1)})
    fitting = [
        r
        for r in ratios
        if base + sum(max(1, int(r * s + 1e-9)) * c for s, c in zip(sizes, cost, strict=True)) <= allowed
    ]
    return max(fitting, default=0.0)


def every_plan(sizes: list[int]) -> list[tuple[int, ...]]:
    """Returns all combinations of numbers of kept units, with at least one unit at each site."""
    return list(product(*(range(1, size + 1) for size in sizes)))


def normed(norm: nn.LayerNorm, x: Tensor, keep: list[int]) -> Tensor:
    """Applies the norm to the kept features only."""
    return F.layer_norm(x[..., keep], (len(keep),), norm.weight[keep], norm.bias[keep], norm.eps)
