"""What the models look at: a few inputs, attention of a kept and a removed head, relevance dense beside pruned."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from xprune.core.record import Record
from xprune.core.site import Site
from xprune.core.unit_kind import unit_kind
from xprune.modules.copies import reference_device, shared_copy
from xprune.report.attention import attention

INPUTS, BATCHES = 4, 8


@dataclass(frozen=True)
class Example:
    """An input, float32 (height, width) or (height, width, 3) in 0 to 1; its class and what each model says of it.

    dense, pruned   (class, probability)
    maps            by title, float32 (height, width) of patches, 0 to 1
    """

    image: Tensor
    label: int
    dense: tuple[int, float]
    pruned: tuple[int, float]
    maps: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pictures:
    """Examples, and what their maps are of.

    site           the attention of the two heads, "" where no map could be had
    kept, removed  the heads
    from_token     True: what the class token attends to; False: the mean over all tokens
    block          at whose input relevance was taken
    """

    examples: tuple[Example, ...]
    site: str
    kept: int
    removed: int
    from_token: bool
    block: str


def look(result: Record) -> Pictures | str:
    """Pictures of a few inputs, or why there are none."""
    if result.dense is None or result.data is None or result.task is None:
        return "Pictures need the dense model and the data, which are not saved; `xprune report` takes them."
    device = reference_device(result.dense)
    models = {
        "dense": shared_copy(result.dense, requires_grad=True).to(device),
        "pruned": shared_copy(result.model, requires_grad=True).to(device),
    }
    chosen = _choose(result, models, device)
    if isinstance(chosen, str):
        return chosen
    inputs, labels, says = chosen
    last = _last(result)
    if last is None:
        return "No attention of the model kept a head, so that no token is looked at."
    grid, block = _grid(models["dense"]), last.name.rpartition(".")[0]
    titles = {}
    site, kept, removed, weights = _pair(result, models["dense"], inputs)
    prefix = 0
    if weights is not None:
        prefix, grid = _tokens(models["dense"], weights.shape[-1], grid)
    if weights is not None and grid:
        for title, head in ((f"kept head {kept}", kept), (f"removed head {removed}", removed)):
            rows = weights[:, head, 0] if prefix else weights[:, head].mean(1)  # (inputs, tokens)
            titles[title] = rows[:, prefix:].unflatten(1, grid)
    else:
        site = None
    for name, model in models.items():
        found = _relevance(model, last, inputs, labels, grid)
        if found is None:
            return f"Tokens at the input of {block} are no grid of patches, so that maps of them cannot be drawn."
        titles[f"relevance, {name}"] = found
    examples = []
    for i in range(len(inputs)):
        maps = {title: _to_one(maps[i]) for title, maps in titles.items()}
        dense, pruned = (says[name][i] for name in ("dense", "pruned"))
        examples.append(Example(_picture(inputs[i]), int(labels[i]), dense, pruned, maps))
    return Pictures(tuple(examples), site.name if site else "", kept, removed, prefix > 0, block)


@torch.no_grad()
def _choose(
    result: Record, models: Mapping[str, nn.Module], device: torch.device
) -> tuple[Tensor, Tensor, dict[str, list[tuple[int, float]]]] | str:
    """(inputs, labels, what each model says): one that pruning broke, where there is one, and some of other classes."""
    assert result.data is not None and result.task is not None
    rows: list[tuple[bool, Tensor, int, dict[str, tuple[int, float]]]] = []
    with torch.random.fork_rng(devices=[]):
        stream = list(islice(iter(result.data), BATCHES))
    for batch in stream:
        inputs, targets = result.task.unpack(batch)
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
            return "The inputs are not images, so that there is nothing to draw."
        outputs = {name: result.task.forward(model, inputs.to(device)) for name, model in models.items()}
        found = result.task.classes(outputs["dense"], targets)
        if found is None or any(not isinstance(out, Tensor) or out.dim() != 2 for out in outputs.values()):
            return "The task has no classes whose relevance could be drawn."
        chances = {name: out.float().softmax(-1).max(-1) for name, out in outputs.items()}
        for i, label in enumerate(found[0].tolist()):
            says = {name: (int(best.indices[i]), float(best.values[i])) for name, best in chances.items()}
            right = says["dense"][0] == label
            rows.append((right and says["pruned"][0] != label, inputs[i], label, says))
    broken = [row for row in rows if row[0]][:1]
    first = {row[2]: row for row in reversed(rows) if row[3]["dense"][0] == row[3]["pruned"][0] == row[2]}
    others = [first[label] for label in sorted(first) if not broken or label != broken[0][2]]
    chosen = (broken + others + rows)[:INPUTS]
    told = {name: [row[3][name] for row in chosen] for name in models}
    return torch.stack([row[1] for row in chosen]).to(device), torch.tensor([row[2] for row in chosen]), told


def _last(result: Record) -> Site | None:
    """The last attention within a block that kept a head: behind it, patches have nothing to say to a class token."""
    pairs = zip(result.plan.sites, result.plan.keeps, strict=True)
    found = [site for site, keep in pairs if unit_kind(site.kind).attends and keep and "." in site.name]
    return found[-1] if found else None


def _pair(result: Record, dense: nn.Module, inputs: Tensor) -> tuple[Site | None, int, int, Tensor | None]:
    """(site, its best kept head, its worst removed head, attention): the last site that has both and a map."""
    for i in reversed(range(len(result.plan.sites))):
        site, keep, scores = result.plan.sites[i], set(result.plan.keeps[i]), result.scores.values[i]
        if unit_kind(site.kind).attends and 0 < len(keep) < site.size:
            weights = attention(dense, site, inputs)
            if weights is not None and len(weights) == len(inputs):
                order = scores.argsort(descending=True).tolist()
                kept = next(unit for unit in order if unit in keep)
                return site, kept, next(unit for unit in reversed(order) if unit not in keep), weights
    return None, 0, 0, None


def _grid(model: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) of patches, of a model that says so."""
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return (int(size[0]), int(size[1])) if size is not None and len(size) == 2 else None


def _tokens(model: nn.Module, tokens: int, grid: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
    """(tokens before the patches, grid); a grid of None where patches cannot be told."""
    if grid is None:
        side = int(tokens**0.5)
        grid = (side, side)
    prefix = tokens - grid[0] * grid[1]
    return prefix, grid if 0 <= prefix == getattr(model, "num_prefix_tokens", prefix) else None


def _relevance(
    model: nn.Module, last: Site, inputs: Tensor, labels: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """Gradient x activation of the label's logit at the input of a site's block, positive, (inputs, rows, columns)."""
    method = LayerGradientXActivation(model, model.get_submodule(last.name.rpartition(".")[0]))
    found: Any = method.attribute(inputs, target=labels.to(inputs.device), attribute_to_layer_input=True)
    found = (found[0] if isinstance(found, tuple) else found).detach().float()
    if found.dim() == 4:  # (inputs, rows, columns, features), channels first where a convolution follows
        return found.sum(last.axes[0]).clamp_min(0)
    if found.dim() != 3:
        return None
    prefix, grid = _tokens(model, found.shape[1], grid)
    return found.sum(-1)[:, prefix:].unflatten(1, grid).clamp_min(0) if grid else None


def _to_one(values: Tensor) -> Tensor:
    """Scaled so that the largest is 1."""
    return (values / values.max().clamp_min(1e-12)).cpu()


def _picture(image: Tensor) -> Tensor:
    """Colours scaled to 0 to 1, channels last, one channel without an axis."""
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-12)).float().cpu()
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
