"""Derives a forward that works with fewer units from a forward that takes the number of features from its input.

Many attentions contain lines such as these:

    B, N, C = x.shape
    q = self.q(x).reshape(B, N, self.num_heads, C // self.num_heads)

`C` is the number of features of the residual stream. The forward uses it as the number of features of all heads, which
is the same only as long as no head is removed. The derived forward is the same code with one line more: after the first
line, it sets `C` to the number of features of the heads that are left. The proof shows whether this is right.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.interfaces import Adapter
from xprune.core.site import Site
from xprune.errors import PlanError

KEPT, UNITS, DENSE = "kept_features", "kept_units", "dense_units"
"""The attributes in which surgery stores how many features are left, which units are left, and how many there were."""


class DerivedForward(Adapter):
    """Gives a module a forward that is derived from its own. `Site.rewrites` says how.

    Each rewrite is a text "module:function:variable": the path of a module inside the site's owner, which may be empty,
    the name of one of its methods, and the name of the variable. "#2" in place of a variable is the third place in the
    method at which the length of an axis is read inside an expression. "C@2-4" says that the variable C changes in the
    statements 2 to 4 of the method only, if the method uses it for the residual stream too.

    A rewrite "module:@argument:axis/width" concerns an argument of the forward that has an entry for each unit, such as
    a bias of the scores that the model computes for all heads. The derived forward picks the entries of the units that
    are left. `argument` is a name or a position, and a unit has `width` neighbouring entries along the axis.

    Example:
        >>> from xprune.adapters.derived import DerivedForward
        >>> DerivedForward().site("attn", nn.Identity()) is None  # discovery makes the sites
        True
    """

    name = "derived"
    classes = ()

    def serves(self, module: nn.Module) -> bool:
        """Returns True, since the module's own class is the base of the derived one."""
        return True

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns None. Discovery finds such sites by their structure."""
        return None

    def resize(self, module: nn.Module, site: Site, keep: Sequence[int]) -> None:
        """Changes the class of the modules that the site's rewrites name, and stores how many features are left."""
        if site.adapter != self.name:
            return
        by_module: dict[str, list[str]] = {}
        for rewrite in site.rewrites:
            path, _, change = rewrite.partition(":")
            by_module.setdefault(path, []).append(change)
        for path, changes in by_module.items():
            part = module.get_submodule(path)
            # A module that was pruned before has the derived class already. Only the number changes.
            units: tuple[int, ...] = getattr(part, UNITS, ()) or tuple(range(site.size))
            if not hasattr(part, KEPT):
                setattr(part, DENSE, site.size)
                kind: Any = type(part)
                part.__class__ = derived_class(kind, tuple(changes))
            setattr(part, KEPT, len(keep) * site.width)
            setattr(part, UNITS, tuple(units[index] for index in keep))


RANGES = 40
"""The largest number of ranges of statements that are tried for one variable."""


def rewrites_of(kind: type[nn.Module]) -> list[str]:
    """Returns all changes "function:variable" that could be made in the forward of a class and in its other methods."""
    found = list[str]()
    for function in _methods(kind):
        try:
            tree, _ = _source(function)
        # The source of classes that were made at run time may not exist.
        except (OSError, TypeError, SyntaxError, IndentationError):
            continue
        finder = _Rewriter(None)
        finder.visit(tree)
        names = list(dict.fromkeys(finder.found))
        found += [f"{function.__name__}:{name}" for name in (*names, *_ranges(tree, names))]
    return found


def _ranges(tree: ast.Module, names: Sequence[str]) -> list[str]:
    """Returns the changes of a variable in some statements of a method only, "variable@first-last"."""
    statements = getattr(tree.body[0], "body", [])
    found = list[str]()
    for name in names:
        uses = [
            place
            for place, statement in enumerate(statements)
            if any(
                isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(statement)
            )
        ]
        # The whole method is the change without a range.
        pairs = [(first, last) for first in uses for last in uses if first <= last]
        pairs.sort(key=lambda pair: pair[0] - pair[1])
        found += [f"{name}@{first}-{last}" for first, last in pairs[:RANGES]]
    return found


@cache
def derived_class(kind: Any, changes: tuple[str, ...]) -> type[nn.Module]:
    """Returns a subclass whose methods use the number of features that are left in place of some variables.

    Args:
        kind: The class of the module.
        changes: Texts "function:variable".

    Raises:
        PlanError: The class has no such method or variable, for example because its source has changed since.
    """
    by_function: dict[str, list[str]] = {}
    for change in changes:
        function, _, variable = change.partition(":")
        by_function.setdefault(function, []).append(variable)
    methods = {method.__name__: method for method in _methods(kind)}
    body: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce}
    for name, variables in by_function.items():
        try:
            if name.startswith("@"):
                body["forward"] = _with_picked(body.get("forward", kind.forward), name[1:], variables[0])
                continue
            body[name] = _rewritten(methods[name], variables)
        except (KeyError, OSError, TypeError, SyntaxError, ValueError, NameError) as error:
            raise PlanError(
                f"the forward of {kind.__qualname__} cannot be derived: its method {name} has no line that reads "
                f"{', '.join(variables)} from a shape. The plan was made for another version of this class: run "
                "find_sites again."
            ) from error
    made: type[nn.Module] = type(kind.__name__, (kind,), body)
    made.__qualname__ = kind.__qualname__
    made.derived_from = (kind, changes)  # type: ignore[attr-defined]
    return made


def is_derived(kind: type) -> bool:
    """Returns True for a class that `derived_class` made, else False."""
    return "derived_from" in vars(kind)


def _with_picked(forward: Any, argument: str, where: str) -> Any:
    """Returns a forward that picks the entries of the units that are left from one argument.

    Args:
        forward: The forward that is called with the picked argument.
        argument: The name or the position of the argument.
        where: The axis of the units, and the number of entries of one unit, as "axis/width".
    """
    axis, width = (int(number) for number in where.split("/"))
    names = list(inspect.signature(forward).parameters)[1:]
    place = int(argument) if argument.isdigit() else names.index(argument) if argument in names else -1
    name = names[place] if argument.isdigit() and place < len(names) else argument

    def picked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if 0 <= place < len(args):
            args = (*args[:place], _pick(self, args[place], axis, width), *args[place + 1 :])
        elif name in kwargs:
            kwargs = {**kwargs, name: _pick(self, kwargs[name], axis, width)}
        return forward(self, *args, **kwargs)

    return picked


def _pick(module: Any, tensor: Any, axis: int, width: int) -> Any:
    """Returns the entries of the units that are left. An argument without an entry for each unit is not changed."""
    dense: int = getattr(module, DENSE)
    if not isinstance(tensor, Tensor) or tensor.dim() <= axis or tensor.shape[axis] % (dense * width):
        return tensor
    index = torch.as_tensor(getattr(module, UNITS), device=tensor.device)
    # Samples and units may lie on one axis, one block of units for each sample.
    return tensor.unflatten(axis, (-1, dense, width)).index_select(axis + 1, index).flatten(axis, axis + 2)


def _reduce(self: Any, protocol: Any) -> Any:
    """Lets copy and pickle make a module of a derived class again, since the class has no name of its own."""
    kind, changes = type(self).derived_from
    return _empty, (kind, changes), self.__getstate__() if hasattr(self, "__getstate__") else vars(self)


def _empty(kind: Any, changes: tuple[str, ...]) -> nn.Module:
    """Returns a module of a derived class without any attributes. copy and pickle fill it."""
    made = derived_class(kind, changes)
    empty: nn.Module = made.__new__(made)
    return empty


def _methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yields the methods of a class that code outside of torch defines, `forward` first."""
    seen = dict[str, FunctionType]()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules.module") or base is object:
            continue
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not name.startswith("__"):
                seen.setdefault(name, value)
    yield from sorted(seen.values(), key=lambda method: method.__name__ != "forward")


def _source(function: FunctionType) -> tuple[ast.Module, FunctionType]:
    """Returns the syntax tree of a method, and the method inside its decorators."""
    inner = inspect.unwrap(function)
    return ast.parse(textwrap.dedent(inspect.getsource(inner))), inner


def _rewritten(function: FunctionType, variables: Sequence[str]) -> FunctionType:
    """Returns a method in which some variables that are read from a shape hold the number of features that are left."""
    tree, inner = _source(function)
    partly = [variable for variable in variables if "@" in variable]
    rewriter = _Rewriter({variable for variable in variables if "@" not in variable})
    names = _Rewriter(None)
    names.visit(tree)
    if {variable.partition("@")[0] for variable in variables} - set(names.found):
        raise ValueError(variables)
    for variable in partly:
        _change_range(tree.body[0], names.me, variable)
    tree = rewriter.visit(tree)
    definition: Any = tree.body[0]
    # The decorators are part of the definition, so they are applied to the new function too. Names from around the
    # class become arguments of a function around the definition.
    free = dict(zip(inner.__code__.co_freevars, (c.cell_contents for c in inner.__closure__ or ()), strict=True))
    module: Any = ast.parse(f"def _make({', '.join(free)}):\n    pass")
    module.body[0].body = [definition, ast.Return(ast.Name(definition.name, ast.Load()))]
    ast.fix_missing_locations(module)
    made: dict[str, Any] = {}
    exec(compile(module, inspect.getfile(inner), "exec"), inner.__globals__, made)
    result: FunctionType = made["_make"](**free)
    return result


def _change_range(definition: Any, me: str, variable: str) -> None:
    """Gives a variable another value in some statements of a method, in place. `variable` is "name@first-last"."""
    name, _, places = variable.partition("@")
    first, last = (int(place) for place in places.split("-"))
    body, kept = definition.body, ast.Attribute(ast.Name(me, ast.Load()), KEPT, ast.Load())
    saved = f"_dense_{name}"
    before = [
        ast.Assign([ast.Name(saved, ast.Store())], ast.Name(name, ast.Load()), None, lineno=1),
        ast.Assign([ast.Name(name, ast.Store())], kept, None, lineno=1),
    ]
    after = [ast.Assign([ast.Name(name, ast.Store())], ast.Name(saved, ast.Load()), None, lineno=1)]
    changed = body[first : last + 1]
    # After a return, nothing has to be put back.
    definition.body = [*body[:first], *before, *changed, *after, *body[last + 1 :]]


class _Rewriter(ast.NodeTransformer):
    """Finds the places where a method reads the length of an axis, and changes some of them.

    Args:
        wanted: The variables that are changed. None means that nothing is changed.

    Attributes:
        found: The names of all variables that could be changed, in the order of the code.
    """

    def __init__(self, wanted: set[str] | None) -> None:
        self.wanted, self.found, self.inline = wanted, list[str](), 0
        self.me = "self"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """Notes the name of the first argument, which is the module. Then visits the code."""
        if node.args.args and not self.found:
            self.me = node.args.args[0].arg
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        """Handles `B, N, C = x.shape` and `C = x.shape[-1]`."""
        names = _assigned(node)
        if not names:
            return self.generic_visit(node)
        self.found += names
        changed = [name for name in names if name in (self.wanted or ())]
        kept = [ast.Assign([ast.Name(n, ast.Store())], self._kept(), None, lineno=node.lineno) for n in changed]
        return [node, *kept]

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        """Handles `x.shape[-1]` inside an expression."""
        return self._inline(node) if _reads_one(node) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        """Handles `x.size(-1)` inside an expression."""
        return self._inline(node) if _reads_one(node) else self.generic_visit(node)

    def _inline(self, node: Any) -> Any:
        name = f"#{self.inline}"
        self.inline += 1
        self.found.append(name)
        return self._kept() if self.wanted is not None and name in self.wanted else node

    def _kept(self) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.me, ast.Load()), KEPT, ast.Load())


def _assigned(node: ast.Assign) -> list[str]:
    """Returns the variables that an assignment sets to the length of an axis that may hold features."""
    (target, *more), value = node.targets, node.value
    if more:
        return []
    whole = (isinstance(value, ast.Attribute) and value.attr == "shape") or (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "size"
        and not value.args
    )
    if isinstance(target, ast.Tuple) and whole:
        # Features lie on the last axis, or on the second axis in front of a convolution.
        places = [target.elts[-1], *(target.elts[1:2] if len(target.elts) > 2 else [])]
        return [place.id for place in places if isinstance(place, ast.Name) and not place.id.startswith("_")]
    return [target.id] if isinstance(target, ast.Name) and _reads_one(value) else []


def _reads_one(node: Any) -> bool:
    """Returns True for `x.shape[k]` and `x.size(k)` with a number k, else False."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and _is_number(node.slice)
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "size"
        and len(node.args) == 1
        and _is_number(node.args[0])
    )


def _is_number(node: Any) -> bool:
    """Returns True for a whole number such as 2 or -1, else False."""
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int
