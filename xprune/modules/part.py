"""The class `Part`: a part of a model, named by patterns of module paths, such as the vision tower of a CLIP model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from xprune.errors import ModelError

SHOWN = 12
"""The largest number of module paths that an error message lists."""


@dataclass(frozen=True)
class Part:
    """Some modules of a model, together with all modules inside them. `find_sites(inside=)` makes a part.

    Args:
        patterns: The patterns that the modules were chosen with, in the notation of `fnmatch`.
        outer: The paths of the outermost modules of the part. No path lies inside another one.

    Example:
        >>> model = nn.ModuleDict({"vision": nn.Sequential(nn.Linear(2, 3)), "text": nn.Linear(2, 3)})
        >>> part = Part.of(model, ["vision.*"])
        >>> part.outer, part.holds("vision.0"), part.holds("text")
        (('vision',), True, False)
    """

    patterns: tuple[str, ...]
    outer: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, inside: str | Sequence[str]) -> "Part":
        """Finds the modules whose paths match.

        A pattern "name.*" means the module "name" and everything inside it, and so does the pattern "name".

        Args:
            model: The model.
            inside: One pattern or a list of patterns in the notation of `fnmatch`.

        Raises:
            ModelError: `inside` is not a pattern or a list of patterns, or a pattern matches no module. The message
                lists modules that exist.
        """
        patterns = checked_patterns(inside)
        # A module that is used at two places has two paths, and a pattern may match any of them.
        paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
        matched: dict[str, None] = {}
        for pattern in patterns:
            stem = pattern.removesuffix(".*")
            found = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, stem)]
            if not found:
                raise ModelError(
                    f"inside={pattern!r} matches no module. Correct the pattern. {type(model).__name__} has these "
                    f"modules: {_listed(paths)}."
                )
            matched |= dict.fromkeys(found)
        return Part(patterns, tuple(path for path in matched if not any(_in(path, other) for other in matched)))

    def holds(self, path: str) -> bool:
        """Returns True if the module at this path is in the part, else False.

        The path may also be that of a tensor or an attribute of a module. It is then in the part if its module is.
        """
        return any(path == other or _in(path, other) for other in self.outer)

    def cost(self, model: nn.Module, by_module: Mapping[str, float]) -> float:
        """Returns the cost of all modules of the part together. A module that has several paths counts once.

        Args:
            model: The model.
            by_module: Path of a module -> its cost, with the modules inside it. A path may be missing. The cost of the
                module is then the sum over the modules inside it.
        """
        paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)

        def cost(module: nn.Module) -> float:
            """Returns the cost of one module."""
            known = [by_module[path] for path in paths[id(module)] if path in by_module]
            # A ModuleList has no forward, so no operation is counted for the list itself.
            return known[0] if known else sum(cost(child) for child in module.children())

        modules = {id(module): module for module in (model.get_submodule(path) for path in self.outer)}
        return sum(cost(module) for module in modules.values())


def checked_patterns(inside: Any) -> tuple[str, ...]:
    """Returns patterns as a tuple. Raises ModelError if `inside` is not a pattern or a list of patterns."""
    patterns = (inside,) if isinstance(inside, str) else inside
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ModelError(
            f"inside={inside!r} is not a pattern or a list of patterns. Give paths of modules in the notation of "
            'fnmatch, such as inside=["vision_model.*"].'
        )
    return tuple(patterns)


def _in(path: str, other: str) -> bool:
    """Returns True if the module at `path` lies inside the module at `other`, and is not that module. Else False."""
    # The path of the model itself is "". Every other module lies inside it.
    return path != other and (not other or path.startswith(f"{other}."))


def _listed(paths: Sequence[str]) -> str:
    """Returns the outer modules of a model as a text: paths of one or two names, without the entries of lists."""
    names = [path for path in paths if path and path.count(".") < 2 and not path.rpartition(".")[2].isdigit()]
    names = names or [path for path in paths if path]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
