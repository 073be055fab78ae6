"""Works with places in a model: paths of modules, the layers at them, and which of them belong to a site already."""

from collections.abc import Mapping

from torch import nn

from xprune.core.site import Site
from xprune.modules.paths import part_at, weight_axes


def joined(*paths: str) -> str:
    """Returns the path that leads along several paths, without those that are empty.

    Example:
        >>> joined("", "blocks.0", "attn")
        'blocks.0.attn'
    """
    return ".".join(path for path in paths if path)


def common(first: str, second: str) -> str:
    """Returns the path of the innermost module that contains both paths, "" for the model itself."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    shared = list[str]()
    for one, other in pairs:
        if one != other:
            break
        shared.append(one)
    return ".".join(shared)


def relative(path: str, scope: str) -> str:
    """Returns the path of a part inside the module at `scope`. "" is the scope of the model itself.

    Example:
        >>> relative("blocks.0.attn.proj", "blocks.0.attn"), relative("attn.proj", "")
        ('proj', 'attn.proj')
    """
    return path[len(scope) + 1 :] if scope else path


def caller_of(model: nn.Module, path: str) -> str:
    """Returns the path of the innermost module around `path` that a forward can call. Lists of modules have none."""
    while path and isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Returns (number of input features, number of output features) of a layer."""
    weight, axes = part_at(layer, "weight"), weight_axes(layer)
    groups = getattr(layer, "groups", 1)
    return int(weight.shape[axes[0]]) * (groups if type(groups) is int else 1), int(weight.shape[axes[1]])


class Taken:
    """The parts of a model that belong to known sites.

    Args:
        known: The known sites, by their names.
    """

    def __init__(self, known: Mapping[str, Site]) -> None:
        self.owners, self.paths = set[str](), set[str]()
        # The tensors that units are rows of, with the name of the site.
        self.tensors = dict[str, str]()
        for site in known.values():
            self.add(site)

    def add(self, site: Site) -> None:
        """Adds the parts of one more site."""
        # If all units of a site can be removed, the whole module belongs to the site. Otherwise only the layers that
        # the site cuts or gates belong to it.
        owners = {site.module} if site.module else {site.name} if site.adapter else set[str]()
        layers = {cut.tensor.rpartition(".")[0] for cut in site.cuts} | set(site.consumers)
        self.owners |= owners | {site.name}
        self.tensors |= {cut.tensor: site.name for cut in site.cuts if cut.axis == 0}
        self.paths |= owners | {path for path in layers if path}

    def holds(self, path: str) -> bool:
        """Returns True if a module belongs to a known site, else False."""
        return any(path == other or path.startswith(f"{other}.") for other in self.paths)
