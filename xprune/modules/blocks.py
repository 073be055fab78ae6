"""Finds the blocks of a model: the equal parts that the model runs one after the other, such as transformer layers."""

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of a model by their paths, in the order in which the model holds them.

    A block is an entry of an `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`. It consists of several modules, and
    another entry has the same class. A stage that consists of blocks, as in Swin, is not a block. It is told by its
    weights: most of them are in the blocks inside it.

    Args:
        model: The model.

    Returns:
        Path -> block. It is empty if no part of the model repeats.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> list(blocks_of(nn.TransformerEncoder(layer, 3)))
        ['layers.0', 'layers.1', 'layers.2']
    """
    entries = {
        id(child): child
        for parent in model.modules()
        if isinstance(parent, _LISTS)
        for child in parent.children()
        if not isinstance(child, _LISTS) and _is_composed(child)
    }
    kinds = [type(each) for each in entries.values()]
    repeated = {key: each for key, each in entries.items() if kinds.count(type(each)) > 1}
    found: dict[str, nn.Module] = {}

    def look(path: str, module: nn.Module) -> None:
        """Adds the blocks in a module, or the module itself."""
        inside = _outermost(module, repeated)
        held = sum(_size(each) for each in inside)
        if id(module) in repeated and 2 * held <= _size(module):
            found[path] = module
            return
        for name, child in module.named_children():
            look(f"{path}.{name}" if path else name, child)

    look("", model)
    return found


def _is_composed(module: nn.Module) -> bool:
    """Returns True if a module has parameters and consists of other modules, else False."""
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


def _outermost(module: nn.Module, wanted: dict[int, nn.Module]) -> list[nn.Module]:
    """Returns the modules inside a module that are wanted, without those that are inside another one."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if id(child) in wanted else _outermost(child, wanted)
    return found


def _size(module: nn.Module) -> int:
    """Returns the number of weights in a module."""
    return sum(parameter.numel() for parameter in module.parameters())
