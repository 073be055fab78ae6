"""Tests the layout of the package: imports go to lower floors only, and each folder says what it holds."""

import ast
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import xprune
from xprune.moved import KEPT, MOVED

ROOT = Path(xprune.__file__).parent
FLOORS = (
    ("errors", "environment"),
    ("data",),
    ("modules",),
    ("core",),
    ("adapters", "tasks"),
    ("surgery", "training"),
    ("discovery", "costs", "artefact"),
    ("criteria", "selections"),
    ("pipeline",),
    ("explain", "blockwise"),
    ("comparison", "report"),
    ("result", "tradeoff"),
    ("pruner",),
    ("testing",),
    ("moved",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""Ground floor first. A file may import from floors below its own and from its own folder, nowhere else."""
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports anywhere: inside functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] == "xprune"]


def module_of(name: str) -> str:
    """The file, as a dotted path below the package, that "xprune.core.site.Cut" is imported from; "" for the top."""
    parts = name.split(".")[1:]
    while parts:
        path = ROOT.joinpath(*parts)
        if path.with_suffix(".py").is_file() or path.is_dir():
            return ".".join(parts)
        parts.pop()
    return ""


def home(file: str) -> str:
    """The entry of the package's folder that a file belongs to."""
    return file.split("/")[0].removesuffix(".py")


def test_every_entry_has_a_floor_and_there_are_few():
    entries = {home(file) for file in FILES}
    assert entries == set(LEVEL)
    assert len(entries) <= 27


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    level = LEVEL[home(file)]
    for name in imported(ROOT / file):
        target = module_of(name)
        entry = target.split(".")[0] or "__init__"
        if entry != home(file):
            assert LEVEL[entry] < level, f"{file} imports {name}, which is not on a floor below"


def test_no_circle_inside_a_folder():
    graph = {}
    for file in FILES:
        own = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        graph[own] = {module_of(name) for name in imported(ROOT / file)} - {own}
    done: set[str] = set()

    def visit(module: str, open_: tuple[str, ...]) -> None:
        assert module not in open_, f"a circle: {' -> '.join((*open_, module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*open_, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_holds(file):
    said = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    assert said and len(said) > 20


def test_every_folder_is_mirrored_by_a_folder_of_tests():
    tests = Path(__file__).parent
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    lacking = sorted(name for name in folders if not any((tests / name).glob("test_*.py")))
    assert not lacking


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_paths_forward(old):
    sys.modules.pop(f"xprune.{old}", None)
    with pytest.warns(DeprecationWarning, match="has moved to"):
        module = import_module(f"xprune.{old}")
    new = import_module(f"xprune.{MOVED[old][0]}")
    public = [name for name in vars(new) if not name.startswith("_")]
    assert all(getattr(module, name) is getattr(new, name) for name in public)
    with pytest.raises(AttributeError):
        module.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("kept", sorted(KEPT))
def test_names_that_a_module_of_the_same_path_held_are_found(kept):
    module = import_module(f"xprune.{kept}")
    places = [import_module(f"xprune.{place}") for place in KEPT[kept]]
    moved = {name for place in places for name in vars(place) if name.isupper() and not hasattr(type(module), name)}
    for name in sorted(moved - set(vars(module))):
        with pytest.warns(DeprecationWarning, match="has moved to"):
            assert any(getattr(module, name) is getattr(place, name, None) for place in places)
    with pytest.raises(AttributeError):
        getattr(module, "nothing_of_this_name")  # noqa: B009


def test_old_paths_leave_functions_of_their_name_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("compare", "evaluate", "finetune"):
            sys.modules.pop(f"xprune.{name}", None)
            import_module(f"xprune.{name}")
            assert callable(getattr(xprune, name))


def test_the_package_itself_uses_no_old_path(new_process):
    code = "import warnings; warnings.simplefilter('error', DeprecationWarning); import xprune, xprune.cli.demo"
    new_process(code, check=True)
