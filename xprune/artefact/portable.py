"""Lists the parts of a pruned model that have a class of xprune.

A pickle of such a model can only be read with xprune.
"""

from torch import nn

from xprune.adapters import ADAPTERS, OURS
from xprune.adapters.derived import is_derived


def classes_of_xprune(model: nn.Module) -> dict[str, str]:
    """Lists the modules of a model whose class comes from xprune or from an adapter.

    It tells whether a file that `torch.save(model)` writes can be read without xprune. Most pruned models have no such
    module, and the file then needs only the library of the model. A model has such a module in two cases: an attention
    or MLP lost all its units, or the library's own forward assumes that the heads fill the hidden size. `xprune.load`
    needs xprune in any case.

    Args:
        model: Any module.

    Returns:
        A dict: path of the module -> full name of its class. The path of the model itself is "".

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
    # The classes of the built-in adapters are in xprune, so they are recognised below. To read them here would import
    # the library of each adapter.
    others = [adapter for adapter in ADAPTERS.values() if adapter not in OURS]
    added = {kind for adapter in others for kind in (adapter.pruned, adapter.removed) if kind is not None}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        # `added` has the classes of adapters in other packages. The classes of xprune are recognised by their module.
        if is_derived(kind):
            # The class is made at run time, by a function of xprune.
            found[path] = f"xprune.adapters.derived of {kind.__module__}.{kind.__qualname__}"
        elif kind in added or kind.__module__.split(".")[0] == "xprune":
            found[path] = f"{kind.__module__}.{kind.__qualname__}"
    return found
