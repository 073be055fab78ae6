"""Makes pictures of a few inputs, with attention maps and relevance maps, for the report.

The attention maps are those of a kept head and of a removed head. The relevance maps show for the dense and for the
pruned model how much each patch raises the logit of the label.
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
"""The number of inputs that the report shows, and the number of batches from which it chooses them."""


@dataclass(frozen=True)
class Example:
    """One input with its maps.

    Attributes:
        image: The input as a picture, float32 (height, width) or (height, width, 3), from 0 to 1.
        label: Index of the class of the input.
        dense: Answer of the dense model: (class, probability).
        pruned: Answer of the pruned model: (class, probability).
        maps: Mapping from a title to a map. A map has a number for each patch, float32 (rows, columns), from 0 to 1.
    """

    image: Tensor
    label: int
    dense: tuple[int, float]
    pruned: tuple[int, float]
    maps: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pictures:
    """The inputs that a report shows, and the heads and the block from which their maps were computed.

    Attributes:
        examples: The inputs.
        site: Name of the site of the two heads. "" if there are no attention maps.
        kept: Index of the kept head.
        removed: Index of the removed head.
        from_token: True if the attention maps show how much the class token attends to each patch. False if they show
            the mean over all tokens.
        block: Path of the block at whose input the relevance was computed.
    """

    examples: tuple[Example, ...]
    site: str
    kept: int
    removed: int
    from_token: bool
    block: str


def look(result: Record) -> Pictures | str:
    """Returns pictures of a few inputs, or a sentence that gives the reason why there are none."""
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
        return "No attention inside a block of the model kept a head, so there are no pictures."
    grid, block = _grid(models["dense"]), last.name.rpartition(".")[0]
    titles = {}
    site, kept, removed, weights = _pair(result, models["dense"], inputs)
    prefix = 0
    if weights is not None:
        # The class token and register tokens come before the patches.
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
            return f"The tokens at the input of {block} are not a grid of patches, so there are no pictures."
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

    The first input is one for which only the pruned model gives a wrong answer, if there is such an input. Then come
    inputs of other classes for which both models give the right answer. If these are too few, any inputs follow.

    Returns:
        (inputs (rows, channels, height, width), labels (rows,), answers). The answers are a mapping from the name of a
        model to a list with a pair (class, probability) for each input. Or a sentence that gives the reason why there
        are no pictures.
    """
    assert result.data is not None and result.task is not None
    rows: list[tuple[bool, Tensor, int, dict[str, tuple[int, float]]]] = []
    # A loader that shuffles uses random numbers. `fork_rng` restores the random state of the caller.
    with torch.random.fork_rng(devices=[]):
        stream = list(islice(iter(result.data), BATCHES))
    for batch in stream:
        inputs, targets = result.task.unpack(batch)
        if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
            return "The inputs are not images, so there are no pictures."
        outputs = {name: result.task.forward(model, inputs.to(device)) for name, model in models.items()}
        found = result.task.classes(outputs["dense"], targets)
        if found is None or any(not isinstance(out, Tensor) or out.dim() != 2 for out in outputs.values()):
            return "The task has no classes, so no relevance can be computed."
        chances = {name: out.float().softmax(-1).max(-1) for name, out in outputs.items()}
        for i, label in enumerate(found[0].tolist()):
            answers = {name: (int(best.indices[i]), float(best.values[i])) for name, best in chances.items()}
            right = answers["dense"][0] == label
            rows.append((right and answers["pruned"][0] != label, inputs[i], label, answers))
    broken = [row for row in rows if row[0]][:1]
    # The order is reversed, so that the first input of a class replaces the later ones in the dict.
    first = {row[2]: row for row in reversed(rows) if row[3]["dense"][0] == row[3]["pruned"][0] == row[2]}
    others = [first[label] for label in sorted(first) if not broken or label != broken[0][2]]
    chosen = (broken + others + rows)[:INPUTS]
    by_model = {name: [row[3][name] for row in chosen] for name in models}
    return torch.stack([row[1] for row in chosen]).to(device), torch.tensor([row[2] for row in chosen]), by_model


def _last(result: Record) -> Site | None:
    """Returns the last site of heads that is inside a block and kept a head. None if there is none.

    The relevance is computed at the input of this block. Later blocks do not mix tokens, so there the patches do not
    change the class token any more.
    """
    pairs = zip(result.plan.sites, result.plan.keeps, strict=True)
    found = [site for site, keep in pairs if unit_kind(site.kind).attends and keep and "." in site.name]
    return found[-1] if found else None


def _pair(result: Record, dense: nn.Module, inputs: Tensor) -> tuple[Site | None, int, int, Tensor | None]:
    """Chooses the two heads whose attention maps the report shows.

    Returns:
        (site, kept head with the highest score, removed head with the lowest score, attention maps of all heads). The
        site is the last one that has a kept head, a removed head and attention maps. (None, 0, 0, None) if there is no
        such site.
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
    """Returns the grid (rows, columns) of patches if the model stores it, as timm's models do, else None."""
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return (int(size[0]), int(size[1])) if size is not None and len(size) == 2 else None


def _tokens(model: nn.Module, tokens: int, grid: tuple[int, int] | None) -> tuple[int, tuple[int, int] | None]:
    """Returns (number of tokens before the patches, grid (rows, columns) of patches).

    If the grid is unknown, the largest square that fits is tried. The returned grid is None if the tokens do not fit.
    """
    if grid is None:
        side = int(tokens**0.5)
        grid = (side, side)
    prefix = tokens - grid[0] * grid[1]
    return prefix, grid if 0 <= prefix == getattr(model, "num_prefix_tokens", prefix) else None


def _relevance(
    model: nn.Module, last: Site, inputs: Tensor, labels: Tensor, grid: tuple[int, int] | None
) -> Tensor | None:
    """Computes how much each patch raises the logit of the label.

    The relevance is gradient x activation at the input of the block that contains the site `last`. It is summed over
    the features, and negative sums become 0.

    Returns:
        float32 (inputs, rows, columns). None if the tokens are not a grid of patches.
    """
    method = LayerGradientXActivation(model, model.get_submodule(last.name.rpartition(".")[0]))
    found: Any = method.attribute(inputs, target=labels.to(inputs.device), attribute_to_layer_input=True)
    found = (found[0] if isinstance(found, tuple) else found).detach().float()
    # The shape is (inputs, rows, columns, features), or (inputs, features, rows, columns) if the layers are
    # convolutions.
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
    """Returns an input (channels, height, width) as a picture with values from 0 to 1.

    A colour picture has the shape (height, width, 3), a grey picture (height, width).
    """
    low, high = image.min(), image.max()
    image = ((image - low) / (high - low).clamp_min(1e-12)).float().cpu()
    return image[0] if len(image) == 1 else image.permute(1, 2, 0)
