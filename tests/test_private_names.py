"""The private names of other libraries: each is still there, and no file uses one but the file of its library."""

import ast
import importlib.util
import inspect
import pkgutil
import re
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import xprune
from xprune.artefact.libraries import transformers_private
from xprune.discovery import torch_pruning_private
from xprune.modules import torch_private
from xprune.training import accelerate_state

ROOT = Path(xprune.__file__).parent


def at(name):
    """What a dotted name stands for, the longest part that is a module imported."""
    parts = name.split(".")
    found = import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and inspect.ismodule(found):
            # Not read from the parent: a test that took the parent out of sys.modules leaves it without the part.
            found = import_module(".".join(parts[:end]))
        else:
            found = getattr(found, part)
    return found


def node(function):
    """The autograd node of what a function makes of feature maps (2, 4, 6, 6)."""
    return function(torch.ones(2, 4, 6, 6, requires_grad=True)).grad_fn


def graph():
    """torch-pruning's own graph."""
    return at("torch_pruning.DependencyGraph")()


def config():
    """A config of transformers."""
    return pytest.importorskip("transformers").ViTConfig()


MODULES = {
    torch_private: ("torch", "torch"),
    torch_pruning_private: ("torch-pruning", "torch_pruning"),
    accelerate_state: ("accelerate", "accelerate"),
    transformers_private: ("transformers", "transformers"),
}
"""Module that holds private names -> (the library's package, its module)."""

NAMES = {
    torch_private: {
        "torch.utils._python_dispatch.TorchDispatchMode": None,
        "torch._C._get_fp32_precision_getter": None,
        "torch._C._set_fp32_precision_setter": None,
        "torch.Tensor._make_wrapper_subclass": None,
        "torch.Tensor._version": None,
        "torch.ops.aten._grouped_mm": None,
        "torch._dynamo": None,
        "torch._ops.OpOverload._schema": lambda: torch.ops.aten.detach.default._schema.arguments,
        "torch.nn.Module._forward_pre_hooks": lambda: len(nn.Identity()._forward_pre_hooks),
        "torch.nn.MultiheadAttention._qkv_same_embed_dim": lambda: nn.MultiheadAttention(2, 1)._qkv_same_embed_dim,
        "MeanBackward1._saved_dim": lambda: node(lambda x: x.mean((2, 3)))._saved_dim,
        "MeanBackward1._saved_self_sym_sizes": lambda: node(lambda x: x.mean((2, 3)))._saved_self_sym_sizes,
        "SliceBackward0._saved_dim": lambda: node(lambda x: x[:, 1:])._saved_dim,
        "SliceBackward0._saved_self_sym_sizes": lambda: node(lambda x: x[:, 1:])._saved_self_sym_sizes,
        "AvgPool2DBackward0._saved_self": lambda: node(nn.AvgPool2d(2))._saved_self,
        "MaxPool2DWithIndicesBackward0._saved_self": lambda: node(nn.MaxPool2d(2))._saved_self,
    },
    torch_pruning_private: {
        "torch_pruning._helpers._HybridIndex": None,
        "torch_pruning.dependency.index_mapping._ConcatIndexMapping": None,
        "torch_pruning.dependency.index_mapping._SliceIndexMapping": None,
        "torch_pruning.dependency.index_mapping._SplitIndexMapping": None,
        "torch_pruning.DependencyGraph._2d_4d": lambda: graph()._2d_4d,
    },
    accelerate_state: {
        "accelerate.state.AcceleratorState._shared_state": None,
        "accelerate.state.GradientState._shared_state": None,
        "accelerate.state.PartialState._shared_state": None,
    },
    transformers_private: {
        "transformers.PreTrainedConfig._attn_implementation": lambda: config()._attn_implementation,
        # These are not documented.
        "transformers.conversion_mapping.get_model_conversion_mapping": None,
        "transformers.core_model_loading.WeightRenaming": None,
        "transformers.core_model_loading.rename_source_key": None,
    },
}
"""Module -> private name -> how it is read, None for what the dotted name itself stands for."""

STANDARD = {"_make"}
"""Names that Python documents, underscore included: those of named tuples."""
OURS = {"_xprune_provenance"}
"""Names that this package puts on objects of others."""


def path_of(module):
    """The file of a module, as a reader of the message looks for it."""
    return f"xprune/{Path(module.__file__).relative_to(ROOT)}"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("module", "name"), [pytest.param(module, name, id=name) for module, names in NAMES.items() for name in names]
)
def test_the_name_is_there(module, name):
    package, library = MODULES[module]
    pytest.importorskip(library)
    read = NAMES[module][name] or (lambda: at(name))
    try:
        read()
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{package} {version(package)} no longer has {name}: read it again (we read {module.READ_FROM}) and mend "
            f"{path_of(module)}. ({error})",
            pytrace=False,
        )


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and bool(name.strip("_"))


def private_parts(text):
    """The private names in a dotted name. None in a text that is no dotted name."""
    return [part for part in text.split(".") if is_private(part)] if re.fullmatch(r"[\w.]+", text) else []


@cache
def tree(path):
    return ast.parse(path.read_text())


def private_in(path):
    """Every private name that a file reads or imports: (line, name)."""
    inside = {id(part) for each in ast.walk(tree(path)) if isinstance(each, ast.JoinedStr) for part in each.values}
    found = []
    for each in ast.walk(tree(path)):
        if isinstance(each, ast.Attribute):
            names = private_parts(each.attr)
        elif isinstance(each, ast.Import):
            names = [name for alias in each.names for name in private_parts(alias.name)]
        elif isinstance(each, ast.ImportFrom):
            names = [name for alias in each.names for name in private_parts(f"{each.module}.{alias.name}")]
        elif isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in inside:
            names = private_parts(each.value)
        else:
            continue
        found += [(each.lineno, name) for name in names]
    return found


def defined_in(path):
    """Every name that a file gives to something: functions, classes, variables, attributes of self and cls."""
    found = set()
    for each in ast.walk(tree(path)):
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
            found.add(each.name)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            found.add(each.id)
        elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            found |= {each.attr} if isinstance(each.value, ast.Name) and each.value.id in ("self", "cls") else set()
    return found


FILES = sorted(ROOT.rglob("*.py"))
PRIVATE_FILES = {Path(module.__file__) for module in NAMES}


def test_no_other_file_uses_a_private_name():
    ours = STANDARD | OURS
    for path in FILES:
        ours |= defined_in(path) if path not in PRIVATE_FILES else set()
    found = [
        f"{path.relative_to(ROOT.parent)}:{line} uses {name}"
        for path in FILES
        if path not in PRIVATE_FILES
        for line, name in private_in(path)
        if name not in ours
    ]
    assert not found, f"{'; '.join(found)}: use a public name, or move it into {sorted(map(path_of, NAMES))}"


@pytest.mark.parametrize("module", NAMES, ids=path_of)
def test_every_name_of_such_a_file_is_in_the_table(module):
    path = Path(module.__file__)
    own = {each.name for each in tree(path).body if isinstance(each, (ast.FunctionDef, ast.ClassDef))}
    used = {name for _, name in private_in(path)} - own
    for kind in (each for each in tree(path).body if isinstance(each, ast.ClassDef)):
        used |= {each.name for each in kind.body if isinstance(each, ast.FunctionDef) and is_private(each.name)}
    known = {part for name in NAMES[module] for part in private_parts(name)}
    assert used <= known, f"{path_of(module)} uses {used - known}: add them to NAMES above"


def foreign(kind):
    """The base classes that neither this package nor Python brings."""
    return [b for b in kind.__mro__ if b.__module__.split(".")[0] not in {"xprune", *sys.stdlib_module_names}]


@cache
def named_in(kind):
    """The private names in the source of a class, and those that it has if it is written in C."""
    try:
        text = inspect.getsource(kind)
    except OSError:
        text = " ".join(dir(kind))
    return {name for name in re.findall(r"\b_\w+", text) if is_private(name)}


def taken_by(kind):
    """The private names that the definition of a class gives to its methods and attributes, or reads from `self`."""
    found = set()
    for each in ast.walk(kind):
        if isinstance(each, ast.FunctionDef):
            found.add(each.name)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            found.add(each.id)
        elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
            found.add(each.attr)
    return {name for name in found if is_private(name)}


def test_no_class_takes_a_private_name_of_its_base():
    """A base that reads `self._name` reads ours, even if the base sets it on instances only."""
    for info in pkgutil.walk_packages(xprune.__path__, "xprune."):
        if info.name == "xprune.__main__":  # runs the command line
            continue
        module = import_module(info.name)
        for kind in (each for each in tree(Path(module.__file__)).body if isinstance(each, ast.ClassDef)):
            if Path(module.__file__) not in PRIVATE_FILES:
                taken, bases = taken_by(kind), foreign(getattr(module, kind.name))
                clashes = [(base.__name__, both) for base in bases if (both := taken & named_in(base))]
                assert not clashes, f"{kind.name} takes names of {clashes}: rename them, or see MODULES above"


def test_a_torch_without_a_name_is_refused_with_the_name(monkeypatch):
    monkeypatch.delattr(torch._C, "_set_fp32_precision_setter")
    spec = importlib.util.spec_from_file_location("again", torch_private.__file__)
    wanted = rf"torch {re.escape(torch.__version__)} lacks .*_set_fp32_precision_setter.*Install torch 2\.\d+, or"
    with pytest.raises(ImportError, match=wanted):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
