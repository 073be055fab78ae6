"""Finds the architecture of the dense model, and proves that it leads to the pruned model.

An artefact holds the weights of the pruned model and the plan. `load` builds the dense model without weights, cuts it
according to the plan, and puts the weights in. To build the dense model, it needs an `Arch`: the library, the name of
the architecture in it, and its arguments. `save` writes the `Arch` only if these steps give a model like the one that
is saved. It checks this on the meta device, so the check needs no memory for weights.
"""

import ast
import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from xprune.adapters import ADAPTERS
from xprune.artefact.libraries import LIBRARIES
from xprune.artefact.libraries.library import plain
from xprune.core.plan import Plan
from xprune.core.provenance import Arch, provenance
from xprune.errors import ArtefactError
from xprune.modules.copies import tensors
from xprune.modules.forward import error_text
from xprune.surgery.cut import remove_units

FEW = 16
"""Tensors with at most this many numbers are compared by their values, and larger ones by their shapes."""


def build(arch: Arch, device: str = "meta") -> nn.Module:
    """Builds the model of an architecture and loads no weights.

    It downloads nothing and opens no file, even if the name or the arguments ask for it.

    Args:
        arch: The architecture: the library, the name in it, and the arguments.
        device: The device of the parameters. On "meta", the default, they have shapes but no values. If a module holds
            a tensor that is neither parameter nor buffer, the model is built on the CPU instead.

    Raises:
        ArtefactError: The library or the name is unknown. Or an argument is not plain data, or it would load weights.

    Example:
        >>> model = build(Arch("test_vit", (("num_classes", 3),)))
        >>> model.head.weight.shape, model.head.weight.device.type
        (torch.Size([3, 64]), 'meta')
    """
    library = LIBRARIES.get(arch.library) if isinstance(arch.library, str) else None
    if library is None:
        raise ArtefactError(
            f"models of the library {arch.library!r} cannot be built. Known libraries: {', '.join(LIBRARIES)}. "
            "Give load(..., model_fn=), a function that builds the dense model."
        )
    try:
        with torch.device(device):
            model = library.build(arch.name, dict(arch.kwargs))
        if device == "meta" and _holds_bare_tensors(model):
            # The file has no values for these tensors. Their values follow from the arguments, so they are computed.
            return build(arch, "cpu")
        return model
    except ArtefactError:
        raise
    except Exception as error:
        raise ArtefactError(
            f"{arch.library} cannot build {arch.name} with the arguments {dict(arch.kwargs)}: {error}."
        ) from error


def proved_arch(
    model: nn.Module, plan: Plan, given: Arch | str | tuple[str, Mapping[str, Any]] | None
) -> tuple[Arch | None, str]:
    """Finds the architecture of the dense model, and proves that it gives the pruned model when the plan cuts it.

    Args:
        model: The pruned model.
        plan: The plan from the dense model to the pruned model.
        given: The architecture: a timm name, a pair (timm name, keyword arguments), or an Arch. If None, the model
            itself has to name its architecture.

    Returns:
        (architecture, ""), or (None, the reason why there is no architecture).

    Raises:
        ArtefactError: The architecture in `given` leads to another model.

    Example:
        >>> proved_arch(nn.Linear(2, 3), Plan((), ()), given=None)
        (None, 'the model does not name its architecture, as models of timm or transformers do')
    """
    arch = _as_arch(given) or _carried(model)
    if arch is None:
        return None, f"the model does not name its architecture, as models of {' or '.join(LIBRARIES)} do"
    try:
        rebuilt = remove_units(build(arch), plan, ADAPTERS)
        difference = _difference(rebuilt, model, {"training", *LIBRARIES[arch.library].transient})
    except Exception as error:
        # An error may have no message, and an empty text would mean that nothing differs. So the text has the class of
        # the error too.
        difference = error_text(error)
    if difference and given is not None:
        raise ArtefactError(f"arch={given!r} does not rebuild this model: {difference.rstrip('.')}.")
    return (None, f"the {arch.name} that {arch.library} builds differs: {difference}") if difference else (arch, "")


def _as_arch(given: Arch | str | tuple[str, Mapping[str, Any]] | None) -> Arch | None:
    """Returns an `Arch` for the argument `given` of `proved_arch`. Names are taken as names of timm.

    Returns None if `given` is None.
    """
    if given is None or isinstance(given, Arch):
        return given
    if isinstance(given, str):
        return Arch(given)
    name, kwargs = given
    return Arch(name, tuple(sorted(kwargs.items())))


def _carried(model: nn.Module) -> Arch | None:
    """Returns the architecture that the model itself names, or None if it names none.

    A pruned model may hold it in its provenance, which says how the model was pruned. Otherwise timm or transformers
    may have written it on the model.
    """
    before = provenance(model)
    if before and before.arch:
        return before.arch
    found = (library.arch_of(model) for library in LIBRARIES.values())
    return next((arch for arch in found if arch is not None), None)


def _difference(rebuilt: nn.Module, model: nn.Module, transient: Collection[str]) -> str:
    """Returns a text about the first difference between two models, or "" if there is none.

    The paths and classes of modules, their plain attributes, and the shapes of tensors are compared. Weights are not
    compared, since the rebuilt model has none.

    Args:
        rebuilt: The model that the architecture gives.
        model: The model that is saved.
        transient: The names of attributes that may differ, because they only say how a model is run.
    """
    there, here = dict(rebuilt.named_modules()), dict(model.named_modules())
    for path in {**there, **here}:
        if path not in there or path not in here:
            return f"only one of the two models has the module {path}"
        if _class_of(there[path]) is not _class_of(here[path]):
            return (
                f"{path or 'the model'} is a {type(there[path]).__name__} in the architecture, but a "
                f"{type(here[path]).__name__} in the model"
            )
        values_there, values_here = _attributes(there[path]), _attributes(here[path])
        # A forward may keep something from its last call in an attribute that is None before the first call.
        kind: Any = type(here[path])
        kept = {name for name in set_in_methods(kind) if values_there.get(name) is None}
        for name in sorted({*values_there, *values_here} - set(transient) - kept):
            if values_there.get(name) != values_here.get(name):
                return (
                    f"{path}.{name} is {values_there.get(name)!r} in the architecture, but {values_here.get(name)!r} "
                    "in the model"
                ).lstrip(".")
    shapes_there, shapes_here = ({name: tuple(t.shape) for name, t in tensors(m).items()} for m in (rebuilt, model))
    for name in {**shapes_there, **shapes_here}:
        if shapes_there.get(name) != shapes_here.get(name):
            return f"{name} is {shapes_there.get(name)} in the architecture, but {shapes_here.get(name)} in the model"
    return ""


def _class_of(module: nn.Module) -> type:
    """Returns the class of a module, without the class that torch makes for one module with parametrised tensors."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def _holds_bare_tensors(model: nn.Module) -> bool:
    """Returns True if an attribute of a module is a tensor without values that is neither parameter nor buffer."""
    held = (value for module in model.modules() for value in vars(module).values())
    return any(isinstance(value, Tensor) and value.is_meta for value in held)


@cache
def set_in_methods(kind: Any) -> frozenset[str]:
    """Returns the names of the attributes that methods of a class other than `__init__` set, and cached properties.

    The result is empty if the source of the class is not known.

    Example:
        >>> from xprune.modules.removed import Removed
        >>> set_in_methods(Removed)
        frozenset()
    """
    found = set[str]()
    for base in kind.__mro__:
        # The methods of nn.Module set what every module has.
        if base in (nn.Module, object):
            continue
        found |= {name for name, value in vars(base).items() if isinstance(value, cached_property)}
        for tree in _classes_of(base.__module__).get(base.__qualname__, ()):
            found |= _set_in(tree)
    return frozenset(found)


@cache
def _classes_of(module: str) -> Mapping[str, Sequence[ast.ClassDef]]:
    """Returns the definitions of the classes in a module, by their qualified names. Empty without the source.

    `inspect.getsource` of a class reads the whole file anew for each class.
    """
    found: dict[str, list[ast.ClassDef]] = {}

    def collect(node: ast.AST, name: str) -> None:
        """Adds the classes inside a node. `name` is the qualified name of the node, with a dot at the end."""
        for child in ast.iter_child_nodes(node):
            inside = name
            if isinstance(child, ast.ClassDef):
                found.setdefault(name + child.name, []).append(child)
                inside = f"{name}{child.name}."
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = f"{name}{child.name}.<locals>."
            # Only statements hold classes.
            if isinstance(child, (ast.stmt, ast.excepthandler)):
                collect(child, inside)

    try:
        collect(ast.parse(inspect.getsource(sys.modules[module])), "")
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return found


def _set_in(tree: ast.ClassDef) -> set[str]:
    """Returns the names of the attributes that the methods of a class set, except `__init__`."""
    found = set[str]()
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name == "__init__" or not method.args.args:
            continue
        me = method.args.args[0].arg
        found |= {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == me
        }
    return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns name -> value of the public attributes of a module that are plain values.

    For an attribute that is a tensor, the value is a description. Such a tensor is neither a parameter nor a buffer, so
    it is not saved with the weights. The description has the device of the tensor. So it differs between a model on the
    meta device and the saved model, and the architecture is not accepted.
    """
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            few = value.tolist() if value.numel() <= FEW and not value.is_meta else tuple(value.shape)
            found[name] = f"a tensor that is neither parameter nor buffer ({few}, {value.device.type})"
        elif not name.startswith("_") and plain(value):
            found[name] = _with_tuples(value)
    return found


def _with_tuples(value: Any) -> Any:
    """Returns a plain value with tuples in place of lists, at any depth. JSON knows lists only."""
    return tuple(_with_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
