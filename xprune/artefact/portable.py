"""Portable: which parts of a pruned model have a class of xprune, so that a pickle of the whole model needs xprune."""

from torch import nn

from xprune.adapters import ADAPTERS, OURS


def classes_of_xprune(model: nn.Module) -> dict[str, str]:
    """The modules of a model whose class comes from xprune or from one of its adapters.

    Most pruned models have none. `torch.save(model)` then writes a file that needs only the library of the model.
    A model gets one where all units of an attention or MLP are gone, or where the library's own forward assumes that
    the heads fill the model's width. The process that reads a pickle of such a model needs xprune. The same holds for
    `xprune.load`, which needs it anyway.

    Args:
        model: Any module.

    Returns:
        The path of each such module ("" for the model itself) and the full name of its class.

    Example:
        >>> from torch import nn
        >>> classes_of_xprune(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        {}
    """
    # The classes of our own adapters are in xprune. To ask for them would import the library of each.
    others = [adapter for adapter in ADAPTERS.values() if adapter not in OURS]
    added = {kind for adapter in others for kind in (adapter.pruned, adapter.removed) if kind is not None}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind in added or kind.__module__.split(".")[0] == "xprune":
            found[path] = f"{kind.__module__}.{kind.__qualname__}"
    return found
