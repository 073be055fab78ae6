"""Finds the list of blocks of a model, and the sites of all blocks from the sites of the first block."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from xprune.blockwise.folder import Opened, put
from xprune.core.site import Cut, Site, Sites
from xprune.discovery.find import find_sites
from xprune.discovery.kinds import UNIT_KINDS
from xprune.errors import ModelError
from xprune.modules.copies import shared_copy, tensors
from xprune.modules.samples import find_samples


@dataclass(frozen=True)
class Blocks:
    """The list of blocks of a model.

    Attributes:
        path: The path of the nn.ModuleList, such as "model.layers".
        count: The number of blocks.

    Example:
        >>> Blocks("model.layers", 32).at(3)
        'model.layers.3'
    """

    path: str
    count: int

    def at(self, index: int) -> str:
        """Returns the path of a block. The first block has the index 0."""
        return f"{self.path}.{index}"

    def holds(self, name: str, index: int) -> bool:
        """Returns True if a path is that of a block, or of a part of it."""
        return f"{name}.".startswith(f"{self.at(index)}.")

    def index_of(self, name: str) -> int | None:
        """Returns the index of the block that holds the part or tensor at a path. None if no block holds it."""
        start = f"{self.path}."
        number = name.removeprefix(start).partition(".")[0] if name.startswith(start) else ""
        return int(number) if number.isdigit() else None


def find_blocks(opened: Opened, path: str | None = None) -> Blocks:
    """Finds the list of blocks: the only nn.ModuleList of modules that are alike, outside of any other such list.

    Args:
        opened: The model.
        path: The path of the list. None means that it is found.

    Raises:
        ModelError: There is no such list, or more than one. Or the blocks are not alike, or a tensor inside a block is
            tied to another one.
    """
    model = opened.model
    if path is None:
        path = _only_list(model)
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = nn.Module()
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ModelError(f"blocks={path!r} is no nn.ModuleList of {type(model).__name__}. Give the path of its blocks.")
    first = _shape_of(found[0])
    for index, block in enumerate(found):
        mine = _shape_of(block)
        differs = next((key for key in {**first, **mine} if first.get(key) != mine.get(key)), None)
        if differs is not None:
            raise ModelError(
                f"the blocks of {path} differ: {path}.{index} and {path}.0 do not have the same {differs}. Block by "
                "block, xprune finds the units in the first block and takes the others to be alike. Load the whole "
                "model and prune it with xprune.Pruner."
            )
    blocks = Blocks(path, len(found))
    for name, other in opened.ties.items():
        inner = next((each for each in (name, other) if blocks.index_of(each) is not None), None)
        if inner is not None:
            raise ModelError(
                f"{name} is tied to {other}. A tied tensor inside a block would have to be cut at both places, but one "
                "block is in memory at a time. Load the whole model and prune it with xprune.Pruner."
            )
    return blocks


def _only_list(model: nn.Module) -> str:
    """Returns the path of the only list of at least two alike modules with parameters. See `find_blocks`."""
    found: list[str] = []
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(part, nn.ModuleList) and len(part) > 1 and not inside:
            kinds = {type(block) for block in part}
            if len(kinds) == 1 and all(any(True for _ in block.parameters()) for block in part):
                found.append(path)
    if len(found) != 1:
        what = f"{len(found)} lists of blocks: {', '.join(found)}" if found else "no nn.ModuleList of alike blocks"
        raise ModelError(
            f"{type(model).__name__} has {what}. Give the path of the list to prune with blocks=, such as "
            "blocks='model.layers'. All other parts of the model stay as they are."
        )
    return found[0]


def _shape_of(block: nn.Module) -> dict[str, Any]:
    """Returns the class of each part of a block, and the shape and dtype of each tensor, by their paths."""
    classes: dict[str, Any] = {f"class of {path or 'the block'}": type(part) for path, part in block.named_modules()}
    return classes | {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(block).items()}


@dataclass(frozen=True)
class Found:
    """What was found in the first block, for all blocks.

    Attributes:
        sites: The sites of all blocks.
        axis: The sample axis of the example inputs.
        count: The number of samples in the example inputs.
    """

    sites: Sites
    axis: int
    count: int


def find_in_blocks(
    opened: Opened, blocks: Blocks, example_inputs: Any, units: list[str] | None, exclude: list[str]
) -> Found:
    """Finds the sites in the first block, and proves them. The sites of the other blocks have the same form.

    The first block is searched in the model without its other blocks, so that the block gets the inputs that it gets in
    the model. `prune_folder` proves each of the other blocks too, when it has cut it.

    Args:
        opened: The model.
        blocks: The list of blocks.
        example_inputs: The inputs that the model is called with.
        units: The unit kinds to look for, or None for the default ones.
        exclude: Patterns of the names of sites that are left out.

    Raises:
        ModelError: A unit kind crosses blocks. Or the model does not run with one block. Or the block has no sites. Or
            a pattern matches no site. Or the sample axis of the inputs cannot be found.
    """
    crossing = [name for name in units or () if name in UNIT_KINDS and UNIT_KINDS[name].crosses]
    if crossing:
        raise ModelError(
            f"units={units!r}: units of the kind {crossing[0]} lie in all blocks at once, but one block is in memory "
            "at a time. Leave this kind out, or load the whole model and prune it with xprune.Pruner."
        )
    twin = _with_one_block(opened, blocks)
    samples = find_samples(twin, example_inputs)
    # If the forward fails, this raises the error that explains it.
    first = find_sites(twin, example_inputs, units=units, inside=f"{blocks.path}.*")
    if samples is None:
        raise ModelError(
            "the axis of the samples in the example inputs cannot be found. Give inputs of two samples or more, with "
            "the samples along the first axis."
        )
    sites = [_moved(site, blocks, index) for index in range(blocks.count) for site in first]
    left = {
        _path(name, blocks, index): why.replace(blocks.at(0), blocks.at(index))
        for index in range(blocks.count)
        for name, why in first.left.items()
        if blocks.holds(name, 0)
    }
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ModelError(
                f"exclude={pattern!r} matches no site. Correct the pattern. The sites of the first block are: "
                f"{', '.join(site.name for site in first)}."
            )
    kept = [site for site in sites if not any(fnmatchcase(site.name, pattern) for pattern in exclude)]
    if not kept:
        raise ModelError(f"exclude={exclude!r} leaves no site. Give fewer patterns.")
    return Found(Sites(kept, left, first.inside), samples.axis, samples.count)


def _with_one_block(opened: Opened, blocks: Blocks) -> nn.Module:
    """Returns a copy of the model that has its first block only. All its weights are read."""
    parent, _, name = blocks.path.rpartition(".")
    owner, whole = opened.model.get_submodule(parent), opened.model.get_submodule(blocks.path)
    assert isinstance(whole, nn.ModuleList)
    try:
        setattr(owner, name, nn.ModuleList([whole[0]]))
        twin = shared_copy(opened.model)
    finally:
        setattr(owner, name, whole)
    fill(twin, opened.stored)
    return twin


def fill(model: nn.Module, stored: Mapping[str, Tensor], path: str = "") -> None:
    """Reads the values of all parameters of a module that are on the meta device. Tied parameters stay tied.

    Args:
        model: The module, which is changed.
        stored: The tensors by their names in the model.
        path: The path of the module in the model.
    """
    read: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if old.is_meta:
            if id(old) not in read:
                read[id(old)] = nn.Parameter(stored[f"{path}.{name}" if path else name], False)
            put(model, name, read[id(old)])


def empty(model: nn.Module) -> None:
    """Frees the memory of all parameters of a module: they move to the meta device, and keep shape and dtype."""
    for name, old in list(model.named_parameters()):
        put(model, name, nn.Parameter(torch.empty_like(old, device="meta"), False))


def _path(path: str, blocks: Blocks, index: int) -> str:
    """Returns the path of the same part in another block. `path` lies in the first block."""
    return blocks.at(index) + path.removeprefix(blocks.at(0)) if blocks.holds(path, 0) else path


def _moved(site: Site, blocks: Blocks, index: int) -> Site:
    """Returns the site of another block that has the same form as a site of the first block."""

    def paths(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_path(name, blocks, index) for name in names)

    def cut(each: Cut) -> Cut:
        return replace(each, tensor=_path(each.tensor, blocks, index))

    return replace(
        site,
        name=_path(site.name, blocks, index),
        consumers=paths(site.consumers),
        cuts=tuple(cut(each) for each in site.cuts),
        module=_path(site.module, blocks, index),
        norms=paths(site.norms),
        attributes=paths(site.attributes),
        lists=paths(site.lists),
    )


def in_block(sites: tuple[Site, ...], blocks: Blocks, index: int) -> list[int]:
    """Returns the positions of the sites of one block."""
    return [place for place, site in enumerate(sites) if blocks.holds(site.name, index)]


class Alone(nn.Module):
    """A block as a model of its own, in which it has the same path as in the whole model. So sites and plans fit both.

    Args:
        path: The path of the block.
        block: The block.

    Example:
        >>> alone = Alone("model.layers.3", nn.Linear(2, 3))
        >>> [name for name, _ in alone.named_parameters()]
        ['model.layers.3.weight', 'model.layers.3.bias']
        >>> alone(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, path: str, block: nn.Module) -> None:
        super().__init__()
        owner: nn.Module = self
        *outer, last = path.split(".")
        for name in outer:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, block)
        self.path = path
        self.eval()

    @property
    def block(self) -> nn.Module:
        """The block. Surgery may have replaced it."""
        return self.get_submodule(self.path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block."""
        return self.block(*args, **kwargs)
