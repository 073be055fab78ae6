"""Keeps module paths from before version 0.2 importable, such as `xprune.site`, for one more release.

A module at an old path finds its names in the modules that contain them now. The import of an old path gives a
DeprecationWarning with the new path.
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
    "generic": ("discovery.attentions",),
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
    "proposals": ("discovery.search",),
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
"""For each old path after "xprune.", the modules that now contain its names."""

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
    "generic_sites": "attention_sites",
    "stand_in": "put_placeholders",
}
"""The new name of everything that was renamed when it moved to another module, by its old name."""


class _Forward(ModuleType):
    """A module at an old path. It looks up each of its names in the modules that replaced it."""

    def __getattr__(self, name: str) -> Any:
        """Returns the name from the first module that has it, under its old or its new name."""
        for path in MOVED.get(self.__name__.removeprefix("xprune."), ()):
            module = import_module(f"xprune.{path}")
            for known in (name, RENAMED.get(name, "")):
                if known and hasattr(module, known):
                    return getattr(module, known)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds old paths for Python's import system, and creates a `_Forward` module for each of them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Returns a spec if `fullname` is the old path of a module that has moved.

        Returns None for other paths. Python then finds them as usual.
        """
        old = fullname.removeprefix("xprune.")
        return ModuleSpec(fullname, self) if fullname.startswith("xprune.") and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Returns the module for an old path, and gives a DeprecationWarning with the new path."""
        new = MOVED[spec.name.removeprefix("xprune.")]
        places = " and ".join(f"xprune.{path}" for path in new)
        warnings.warn(
            f"{spec.name} has moved to {places} and will be gone in the next release. Import from there.",
            DeprecationWarning,
            stacklevel=2,
        )
        return _Forward(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing, because the names of the module are looked up only when they are used."""


class _Package(ModuleType):
    """The class of the package `xprune`. It makes sure that an old module does not replace a function of the package.

    For example, `xprune.compare` is a function and also an old module path. When Python imports a submodule, it stores
    the module as an attribute of the package. Without this class, that would replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the package, unless the value is an old module and the attribute exists already."""
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
"""For some modules that still exist, the modules that now contain a part of their old names.

These modules became folders, or some of their names moved elsewhere.
"""


def forward(name: str) -> None:
    """Makes an existing module find the names that it contained before version 0.2 and that are elsewhere now.

    Args:
        name: The path of the module after "xprune.". It is a key of KEPT. The module has to be imported already.
    """
    kept, places = sys.modules[f"xprune.{name}"], KEPT[name]

    def found(name: str) -> Any:
        """Returns an old name from the module that contains it now, and gives a DeprecationWarning."""
        # If `name` is a file of the folder, it is not an old name. Python expects an AttributeError and then imports
        # the file. The file is looked up because `hasattr(kept, name)` would call this function again.
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

    # Python calls the function `__getattr__` of a module for names that the module does not have.
    vars(kept)["__getattr__"] = found


def install() -> None:
    """Makes the old paths importable. The package calls it once, at the end of its own import."""
    sys.modules["xprune"].__class__ = _Package
    for name in KEPT:
        if f"xprune.{name}" in sys.modules:
            forward(name)
    # This finder has to come first. The finder for files would find the file libraries/timm.py for an old path, and
    # load the file a second time.
    sys.meta_path.insert(0, _Finder())
