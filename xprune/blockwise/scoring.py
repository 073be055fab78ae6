"""Scores the units of a model whose weights are in files. What is read depends on what the criterion needs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xprune.blockwise.blocks import Alone, Blocks, empty, fill, in_block
from xprune.blockwise.folder import Opened
from xprune.blockwise.walk import offloaded
from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.errors import PluginError
from xprune.pipeline import checked_scores


def refuse_gradients(criterion: Criterion) -> None:
    """Raises PluginError if a criterion cannot score a model that is not in memory as a whole.

    Example:
        >>> import xprune
        >>> refuse_gradients(xprune.CRITERIA["magnitude"]())
        >>> refuse_gradients(xprune.CRITERIA["taylor"]())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        xprune.errors.PluginError: taylor: block by block, this criterion cannot score, because it needs gradients...
    """
    if criterion.needs == "gradients":
        raise PluginError(
            f"{criterion.name}: block by block, this criterion cannot score, because it needs gradients of the whole "
            "model. Give criterion='magnitude', or load the whole model and prune it with xprune.Pruner. If the "
            "criterion is your own and needs no gradients, set Criterion.needs."
        )
    if criterion.needs not in ("nothing", "weights", "forward"):
        raise PluginError(
            f"{criterion.name}: needs={criterion.needs!r} is not known. Criterion.needs has to be 'nothing', "
            "'weights', 'forward' or 'gradients'."
        )


@torch.no_grad()
def score_blocks(
    criterion: Criterion, opened: Opened, blocks: Blocks, sites: Sequence[Site], context: Context
) -> Scores:
    """Scores the units of all blocks.

    Args:
        criterion: The criterion. `Criterion.needs` says what is read. "nothing": no weights. "weights": those of one
            block at a time. "forward": those of one layer at a time, whenever the criterion runs the model.
        opened: The model.
        blocks: The list of blocks.
        sites: The sites of all blocks.
        context: The data and the settings. The model in it is replaced.

    Raises:
        PluginError: The criterion needs gradients, or does not return scores of these sites.
    """
    refuse_gradients(criterion)
    if criterion.needs == "nothing":
        return checked_scores(criterion, replace(context, model=opened.model), sites)
    if criterion.needs == "forward":
        with offloaded(opened.model, opened.stored) as model:
            return checked_scores(criterion, replace(context, model=model), sites)
    values: dict[int, Tensor] = {}
    info: dict[str, Any] = {}
    scale = "site"
    for index in range(blocks.count):
        places = in_block(tuple(sites), blocks, index)
        # A pattern of `exclude` may leave out all sites of a block.
        if not places:
            continue
        block = opened.model.get_submodule(blocks.at(index))
        fill(block, opened.stored, blocks.at(index))
        alone = Alone(blocks.at(index), block)
        found = checked_scores(criterion, replace(context, model=alone), tuple(sites[place] for place in places))
        values |= dict(zip(places, found.values, strict=True))
        info, scale = {**info, **found.info}, found.scale
        empty(block)
    return Scores(tuple(sites), tuple(values[place] for place in range(len(sites))), criterion.name, None, info, scale)
