"""Pictures of a few inputs, with maps that show where the models look.

The maps are the attention of a kept and of a removed head, and the relevance of the patches for both models.
"""

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
"""How many inputs are shown, and from how many batches of the data they are chosen."""


@dataclass(frozen=True)
class Example:
    """One input with its maps.

    Attributes:
        image: The input, float32 (height, width) or (height, width, 3), 0 to 1.
        label: Index of its class.
        dense: Answer of the dense model: (class, probability).
        pruned: Answer of the pruned model: (class, probability).
        maps: Maps by their titles, each float32 (rows, columns) of patches, 0 to 1.
    """

    image: Tensor
    label: int
    dense: tuple[int, float]
    pruned: tuple[int, float]
    maps: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pictures:
    """The inputs that a report shows, and where their maps come from.

    Attributes:
        examples: The inputs.
        site: Name of the attention of the two heads. "" if there are no attention maps.
        kept: Index of the head that was kept.
        removed: Index of the head that was removed.
        from_token: True if the maps show what the class token attends to. False if they show the mean over all tokens.
        block: Path of the block at whose input relevance was measured.
    """

    examples: tuple[Example, ...]
    site: str
    kept: int
    removed: int
    from_token: bool
    block: str


def look(result: Record) -> Pictures | str:
    """Returns pictures of a few inputs, or a sentence that says why there are none."""
    if result.dense is None or result.data is None or result.task is None:
        return (
            "Pictures need the dense model and the data. A saved result does not hold them: give `--model` and "
            "`--data` to `xprune report`."
        )
    device = reference_device(result.dense)
    models = {
        "dense": shared_copy(result.dense, requires_grad=True).to(device),
        "pruned": shared_copy(result.model, requires_grad=True).to(device),
    }
    chosen = _choose(result, models, device)
    if isinstance(chosen, str):
        return chosen
    inputs, labels, answers = chosen
    last = _last(result)
    if last is None:
        return "No attention inside a block of the model kept a head, so there is nothing to show."
    grid, block = _grid(models["dense"]), last.name.rpartition(".")[0]
    titles = {}
    site, kept, removed, weights = _pair(result, models["dense"], inputs)
    prefix = 0
    if weights is not None:
        # A class token and registers come before the patches.
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
            return f"The tokens at the input of {block} are not a grid of patches, so no maps can be drawn."
        titles[f"relevance, {name}"] = found
    examples = []
    for i in range(len(inputs)):
        maps = {title: _to_one(maps[i]) for title, maps in titles.items()}
        dense, pruned = (answers[name][i] for name in ("dense", "pruned"))
        examples.append(Example(_picture(inputs[i]), int(labels[i]), dense, pruned, maps))
    return Pictures(tuple(examples), site.name if site else "", kept, removed, prefix > 0, block)


@torch.no_grad()
def _choose(
    result: Record, models: Mapping[str, nn.Module], device: torch.device
) -> tuple[Tensor, Tensor, dict[str, list[tuple[int, float]]]] | str:
    """Chooses the inputs to show.

    The first is one that only the pruned model gets wrong, if there is such an input. Then come inputs of other classes
    that both models get right, then any.

    Returns:
        Inputs (rows, channels, height, width), labels (rows,), and for each model its answer to each input as (class,
        probability). Or a sentence that says why there are no pictures.
    """
    assert result.data is not None and result.task is not None
    rows: list[tuple[bool, Tensor, int, dict[str, tuple[int, float]]]] = []
    # A loader that shuffles draws random numbers. The caller's generator stays as it was.
    with torch.random.fork_rng(devices=[]):
        stream = list(islice(iter(result.data), BATCHES))
    for batch in stream:
        inputs, targets = result.task.unpack(batch)
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
            return "The inputs are not images, so there is nothing to draw."
        outputs = {name: result.task.forward(model, inputs.to(device)) for name, model in models.items()}
        found = result.task.classes(outputs["dense"], targets)
        if found is None or any(not isinstance(out, Tensor) or out.dim() != 2 for out in outputs.values()):
            return "The task has no classes, so there is no relevance to draw."
        chances = {name: out.float().softmax(-1).max(-1) for name, out in outputs.items()}
        for i, label in enumerate(found[0].tolist()):
            answers = {name: (int(best.indices[i]), float(best.values[i])) for name, best in chances.items()}
            right = answers["dense"][0] == label
            rows.append((right and answers["pruned"][0] != label, inputs[i], label, answers))
    broken = [row for row in rows if row[0]][:1]
    # Reversed, so that the first input of a class replaces the later ones.
    first = {row[2]: row for row in reversed(rows) if row[3]["dense"][0] == row[3]["pruned"][0] == row[2]}
    others = [first[label] for label in sorted(first) if not broken or label != broken[0][2]]
    chosen = (broken + others + rows)[:INPUTS]
    by_model = {name: [row[3][name] for row in chosen] for name in models}
    return torch.stack([row[1] for row in chosen]).to(device), torch.tensor([row[2] for row in chosen]), by_model


def _last(result: Record) -> Site | None:
    """Returns the last attention inside a block that kept a head, or None.

    Later blocks do not mix tokens, so the patches cannot influence a class token there.
    """
    pairs = zip(result.plan.sites, result.plan.keeps, strict=True)
    found = [site for site, keep in pairs if unit_kind(site.kind).attends and keep and "." in site.name]
    return found[-1] if found else None


def _pair(result: Record, dense: nn.Module, inputs: Tensor) -> tuple[Site | None, int, int, Tensor | None]:
    """Returns the last attention that has a kept head, a removed head and a map.

    Returns:
        (site, its best kept head, its worst removed head, maps of all heads). (None, 0, 0, None) if there is none.
    """
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
    """Returns the grid (rows, columns) of patches if the model stores it, as timm's do, otherwise None."""
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return (int(size[0]), int(size[1])) if size is not None and len(size) == 2 else None


def _tokens(model: nn.Module, tokens: int, grid: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
    """Returns how many tokens come before the patches, and the grid of patches.

    A grid of None means that the tokens do not fit a grid. Without a known grid the largest square is tried.
    """
    if grid is None:
        side = int(tokens**0.5)
        grid = (side, side)
    prefix = tokens - grid[0] * grid[1]
    return prefix, grid if 0 <= prefix == getattr(model, "num_prefix_tokens", prefix) else None


def _relevance(
    model: nn.Module, last: Site, inputs: Tensor, labels: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """Returns the relevance of each patch for the label, or None if the tokens are not a grid of patches.

    Relevance is gradient x activation of the label's logit at the input of the block of a site. It is summed over the
    features, and negative sums become 0.

    Returns:
        Float32 (inputs, rows, columns).
    """
    method = LayerGradientXActivation(model, model.get_submodule(last.name.rpartition(".")[0]))
    found: Any = method.attribute(inputs, target=labels.to(inputs.device), attribute_to_layer_input=True)
    found = (found[0] if isinstance(found, tuple) else found).detach().float()
    # Maps are (inputs, rows, columns, features). With convolutions they are (inputs, features, rows, columns).
    if found.dim() == 4:
        return found.sum(last.axes[0]).clamp_min(0)
    if found.dim() != 3:
        return None
    prefix, grid = _tokens(model, found.shape[1], grid)
    return found.sum(-1)[:, prefix:].unflatten(1, grid).clamp_min(0) if grid else None


def _to_one(values: Tensor) -> Tensor:
    """Scales a map so that its largest value is 1."""
    return (values / values.max().clamp_min(1e-12)).cpu()


def _picture(image: Tensor) -> Tensor:
    """Returns an input (channels, height, width) as a picture.

    Its values are scaled to 0 to 1. A picture in colour is (height, width, 3), a grey one (height, width).
    """
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-12)).float().cpu()
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
