"""Old module paths, from before 0.2, such as `xprune.site`. They forward to the modules that hold the names now.

They work for one more release. Importing one gives a DeprecationWarning that says the new path.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "adapters.attend": ("adapters.timm.attend",),
    "adapters.timm_forwards": ("adapters.timm.plain_forwards",),
    "adapters.timm_hybrid": ("adapters.timm.hybrid",),
    "adapters.timm_hybrid_forwards": ("adapters.timm.hybrid_forwards",),
    "adapters.timm_pyramid_forwards": ("adapters.timm.pyramid_forwards",),
    "adapters.timm_streams": ("adapters.timm.streams",),
    "adapters.timm_vit": ("adapters.timm.vit",),
    "adapters.timm_vit_forwards": ("adapters.timm.vit_forwards",),
    "along": ("discovery.stream_shapes",),
    "arch": ("artefact.rebuild",),
    "budget": (
        "core.budget",
        "core.costs",
    ),
    "carve": ("surgery.cut",),
    "channels": ("discovery.channels",),
    "checkpoint": ("training.checkpoint",),
    "cli_inputs": ("cli.inputs",),
    "compare": ("comparison.grid", "comparison.cell_file"),
    "comparison_plots": ("comparison.plots",),
    "consumers": ("discovery.consumers",),
    "cost": (
        "costs.measure",
        "costs.count",
        "costs.latency",
    ),
    "criteria.captum_base": ("criteria.captum.base",),
    "criteria.captum_gates": ("criteria.captum.gates",),
    "criteria.captum_layers": ("criteria.captum.layers",),
    "criteria.captum_methods": ("criteria.captum.methods",),
    "demo": ("cli.demo",),
    "evaluate": (
        "training.evaluate",
        "core.record",
    ),
    "export": ("artefact.onnx",),
    "finetune": ("training.finetune",),
    "gates": (
        "surgery.gates",
        "modules.norms",
    ),
    "generic": ("discovery.by_structure",),
    "graph": ("discovery.dependency_graph",),
    "interfaces": ("core.interfaces",),
    "landing": ("costs.allocation",),
    "libraries": ("artefact.libraries",),
    "libraries.library": ("artefact.libraries.library",),
    "libraries.timm": ("artefact.libraries.timm",),
    "libraries.transformers": ("artefact.libraries.transformers",),
    "loop": ("training.loop",),
    "mask_learner": ("criteria.xpruner.learner",),
    "masks": (
        "criteria.xpruner.masks",
        "costs.expected",
    ),
    "nest": ("modules.calls",),
    "neurons": ("discovery.neurons",),
    "optimise": ("training.optim",),
    "plan": ("core.plan",),
    "plots": ("report.plots",),
    "pointwise": ("tasks.pointwise",),
    "proposals": ("discovery.candidates",),
    "provenance": ("core.provenance",),
    "runtime": ("training.runtime",),
    "scores": ("core.scores",),
    "segmentation": ("tasks.segmentation",),
    "site": ("core.site",),
    "sites": ("discovery.find",),
    "stages": ("pipeline",),
    "standin": ("discovery.placeholders",),
    "streams": ("discovery.stream_walk",),
    "structure": (
        "modules.copies",
        "modules.paths",
        "modules.removed",
    ),
    "tables": ("core.registry",),
    "task": (
        "core.task",
        "tasks.classification",
    ),
    "tasks_graph": ("tasks.graphs",),
    "threshold_learner": ("selections.learned.learner",),
    "token_tasks": ("tasks.tokens",),
    "units": ("adapters.declarative",),
}
"""Old path below `xprune`, and the modules that now hold its names."""

RENAMED = {
    "Along": "StreamParts",
    "Kept": "CellFile",
    "alias": "shared_copy",
    "own": "unshare",
    "over_features": "is_feature_norm",
    "Landing": "Allocation",
    "StandIn": "Placeholder",
    "along_by_shape": "stream_parts_by_shape",
    "carve": "remove_units",
    "check_landing": "check_allocation",
    "generic_sites": "sites_by_structure",
    "stand_in": "put_placeholders",
}
"""Old and new name of everything that was renamed when it moved."""


class _Forward(ModuleType):
    """A module at an old path. It looks up each name in the modules that replace it."""

    def __getattr__(self, name: str) -> Any:
        """Returns the name from the first module that has it, also under its new name."""
        for path in MOVED.get(self.__name__.removeprefix("xprune."), ()):
            module = import_module(f"xprune.{path}")
            for known in (name, RENAMED.get(name, "")):
                if known and hasattr(module, known):
                    return getattr(module, known)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds old paths for Python's import system, and loads a `_Forward` module for each."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Returns a spec for an old path. None for any other path, which leaves it to the other finders."""
        old = fullname.removeprefix("xprune.")
        return ModuleSpec(fullname, self) if fullname.startswith("xprune.") and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns the forwarding module, and warns."""
        new = MOVED[spec.name.removeprefix("xprune.")]
        places = " and ".join(f"xprune.{path}" for path in new)
        warnings.warn(
            f"{spec.name} has moved to {places} and will be gone in the next release. Import from there.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _Forward(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: names are looked up when they are asked for."""


class _Package(ModuleType):
    """The class of the package `xprune` itself, which protects its functions.

    `xprune.compare` is a function and an old module path too. When Python imports a submodule, it sets the module as an
    attribute of the package, which would replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, unless an old module would replace a name of the package."""
        if not (isinstance(value, _Forward) and name in vars(self)):
            super().__setattr__(name, value)


KEPT: dict[str, tuple[str, ...]] = {
    "adapters.timm": ("adapters.timm.plain",),
    "adapters.torchvision": ("adapters.torchvision_forwards",),
    "artefact": ("artefact.save_load", "artefact.files"),
    "cli": ("cli.commands",),
    "comparison": ("comparison.table", "comparison.cells", "comparison.cell_file"),
    "criteria.xpruner": ("criteria.xpruner.criterion",),
    "result": ("report.text",),
    "selections.learned": ("selections.learned.selection",),
}
"""Modules that became folders of the same path or lost names, and the modules that now hold these names."""


def forward(name: str) -> None:
    """Makes a module of KEPT find the names that it held before.

    Args:
        name: Path of the module below `xprune`, a key of KEPT. It is imported already.
    """
    kept, places = sys.modules[f"xprune.{name}"], KEPT[name]

    def found(name: str) -> Any:
        """Returns an old name from the module that holds it now, and warns."""
        # A file of the folder is not an old name: Python imports it after this AttributeError. `hasattr(kept, name)`
        # would call this function again, so the file is looked up.
        own = "__path__" in vars(kept) and find_spec(f"{kept.__name__}.{name}")
        for place in () if own or name.startswith("__") else places:
            module = import_module(f"xprune.{place}")
            if hasattr(module, name):
                warnings.warn(
                    f"{kept.__name__}.{name} has moved to xprune.{place} and will be gone in the next release. Import "
                    "it from there.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {kept.__name__!r} has no attribute {name!r}")

    # Python calls a module's `__getattr__` for names that the module does not have.
    vars(kept)["__getattr__"] = found


def install() -> None:
    """Makes the old paths importable. It is called once, when the import of the package ends."""
    sys.modules["xprune"].__class__ = _Package
    for name in KEPT:
        if f"xprune.{name}" in sys.modules:
            forward(name)
    # First of all finders: the one for files would find libraries/timm.py at an old path, and load it a second time.
    sys.meta_path.insert(0, _Finder())
