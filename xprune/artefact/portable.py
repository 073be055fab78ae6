"""Lists the parts of a pruned model that have a class of xprune, for which a pickle of the model needs xprune."""

from torch import nn

from xprune.adapters import ADAPTERS, OURS


def classes_of_xprune(model: nn.Module) -> dict[str, str]:
    """Lists the modules of a model whose class comes from xprune or from one of its adapters.

    Most pruned models have no such module. `torch.save(model)` then writes a file that needs only the library of the
    model. A model gets such a module in two cases: all units of an attention or MLP are removed, or the library's own
    forward assumes that the heads fill the hidden size. A process that reads a pickle of such a model needs xprune.

    `xprune.load` needs xprune in any case.

    Args:
        model: Any module.

    Returns:
        The full name of the class, by the path of the module. The path of the model itself is "".

    Example:
        >>> import torch
        >>> import xprune
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> model, x = nn.Sequential(mlp, nn.Linear(4, 2)), torch.randn(3, 4)
        >>> sites = xprune.find_sites(model, x)
        >>> classes_of_xprune(xprune.apply(model, xprune.Plan(sites, ((0, 2, 3),)), x))
        {}
        >>> classes_of_xprune(xprune.apply(model, xprune.Plan(sites, ((),)), x))
        {'0': 'xprune.modules.removed.Removed'}
    """
    # The classes of the built-in adapters are in xprune anyway. Asking for them would import the library of each.
    others = [adapter for adapter in ADAPTERS.values() if adapter not in OURS]
    added = {kind for adapter in others for kind in (adapter.pruned, adapter.removed) if kind is not None}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        # Classes of adapters in other packages are in `added`, those of xprune itself are known by their module.
        if kind in added or kind.__module__.split(".")[0] == "xprune":
            found[path] = f"{kind.__module__}.{kind.__qualname__}"
    return found
