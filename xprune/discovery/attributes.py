"""Finds the whole numbers that a forward reads, and proposes which of them shrink together with the units.

The forward of an attention may read its number of heads from an attribute, a tuple, a config, or the pattern of a
`Rearrange` layer. All of these are found by the same means: the attributes that the forward reads are noted while it
runs. Only numbers that are a multiple of the number of units may shrink.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xprune.discovery.alone import Alone, holds_settings
from xprune.discovery.watch import is_layer, is_norm
from xprune.modules.calls import call, slow_path
from xprune.modules.copies import EVERY_MODULE_HAS, shared_copy
from xprune.modules.paths import part_at

WORDS = ("head", "heads", "nhead", "nheads", "h")
"""Words in the name of an attribute that holds a number of heads."""

OTHER_WORDS = ("dim", "dims", "size", "width", "groups", "group", "ratio", "channels", "features", "idx", "index", "d")
"""Words that say that an attribute with one of `WORDS` in its name holds something else, such as the head size."""

TRIES = 40
"""The largest number of sets of attributes that are proposed."""


def integers_read(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Runs a copy of a model and returns the whole numbers that its forwards read, by their paths.

    Args:
        model: The model. It is not changed.
        inputs: The inputs that the model is called with.

    Returns:
        Path of the number, see `attribute_at` -> the number. Sizes that a layer holds of its weight are left out, since
        surgery updates them.
    """
    twin, found = shared_copy(model), dict[str, int]()
    for path, module in twin.named_modules():
        if isinstance(module, Alone):
            continue
        for name, value in list(vars(module).items()):
            if name not in EVERY_MODULE_HAS and holds_settings(value):
                # Other modules may hold the same object, so it is copied before it is watched.
                watched = copy.copy(value)
                _spy_on(watched, f"{path}.{name}" if path else name, found)
                vars(module)[name] = watched
        _spy_on(module, path, found)
    try:
        with torch.no_grad(), slow_path():
            call(twin, inputs)
    # The numbers that were read before the failure are still of use.
    except Exception:
        pass
    layers = {path for path, module in twin.named_modules() if is_layer(module) or is_norm(module)}
    return {
        path: value
        for path, value in found.items()
        if not any(path.startswith(f"{layer}.") and path[len(layer) + 1 :].split(".")[0] in _SIZES for layer in layers)
    }


_SIZES = {
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "nx", "nf", "embedding_dim"),
    *("normalized_shape", "num_channels", "num_features", "kernel_size", "stride", "padding", "dilation"),
}
"""Attributes of layers that surgery updates, or that have nothing to do with units."""


def with_twins(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the paths of numbers, together with those in a second attribute that holds the same numbers as a dict.

    The `Rearrange` layer of einops holds the lengths of its axes as a tuple of pairs and as a dict. Its forward reads
    the tuple, but a copy of the layer is made from the dict.
    """
    found = list(paths)
    for path in paths:
        owner, *inside = path.rsplit(".", 3)
        module = part_at(model, owner)
        # The path of a number in a tuple of pairs ends with the place of the pair and the place in the pair.
        if len(inside) != 3 or not isinstance(module, nn.Module) or not (inside[1] + inside[2]).isdigit():
            continue
        pairs = vars(module).get(inside[0])
        for name, value in vars(module).items():
            if isinstance(value, dict) and isinstance(pairs, tuple) and tuple(value.items()) == pairs:
                found.append(f"{owner}.{name}.{pairs[int(inside[1])][0]}")
    return tuple(dict.fromkeys(found))


def _spy_on(held: Any, path: str, found: dict[str, int]) -> None:
    """Changes the class of an object to one that notes the whole numbers that are read from it."""
    kind: Any = type(held)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        # A bool is an int in Python, but no number of heads.
        if not name.startswith("__"):
            _note(value, f"{path}.{name}" if path else name, found)
        return value

    try:
        held.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read})
    # Some classes do not allow this, such as those of torch.jit and enumerations. Their numbers are not found.
    except Exception:
        return


def _note(value: Any, path: str, found: dict[str, int]) -> None:
    """Notes a whole number, or the whole numbers inside a tuple, list or dict."""
    if type(value) is int:
        if value > 1:
            found.setdefault(path, value)
    elif type(value) in (tuple, list) and len(value) <= 8:
        for index, item in enumerate(value):
            _note(item, f"{path}.{index}", found)
    elif type(value) is dict and len(value) <= 8 and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            # A key with a point in it would not be found again.
            if "." not in key:
                _note(item, f"{path}.{key}", found)


def proposals(read: Mapping[str, int], size: int, features: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Proposes sets of attributes that shrink together with the units, the likelier ones first.

    Args:
        read: The whole numbers that the forward reads, see `integers_read`.
        size: The number of units.
        features: Numbers of features that all units have together in some layer. An attribute with such a value
            probably shrinks, whatever its name is.

    Yields:
        Paths of attributes, each at most once.
    """
    possible = [path for path, value in read.items() if value % size == 0]
    likely = {path for path in possible if names_heads(path) or (read[path] in features and _names_width(path))}
    # Names decide first, then one guess is changed after the other.
    tried = 0
    for changes in range(min(len(possible), 4) + 1):
        for changed in itertools.combinations(possible, changes):
            if tried == TRIES:
                return
            tried += 1
            yield tuple(path for path in possible if (path in likely) != (path in changed))


def _names_width(path: str) -> bool:
    """Returns True if an attribute may hold a number of features, by its name, else False."""
    name = path.rpartition(".")[2].lower()
    other = (
        "window",
        "position",
        "length",
        "layer",
        "patch",
        "kernel",
        "stride",
        "vocab",
        "max",
        "idx",
        "index",
        "num",
    )
    return name.isdigit() or not any(word in name for word in other)


def names_heads(path: str) -> bool:
    """Returns True if the name of an attribute says that it holds a number of heads, else False."""
    name = path.rpartition(".")[2].lower()
    if name.isdigit():
        # The number lies in a tuple. In the pattern of a Rearrange layer, it is the length of an axis.
        return "axes_lengths" in path
    words = name.strip("_").split("_")
    return any(word in WORDS for word in words) and not any(word in OTHER_WORDS for word in words)
