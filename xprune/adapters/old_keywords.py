"""The old keyword arguments of `Units`. They still work for one release, with a DeprecationWarning."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from xprune.adapters.parts import Also, Features, Forwards, Scope, Stream

PARTS: Mapping[str, type] = {
    "also": Also,
    "features": Features,
    "forwards": Forwards,
    "stream": Stream,
    "scope": Scope,
}
"""Keyword argument of `Units` -> the class of its value."""
OLD: Mapping[str, tuple[str, str]] = {
    **{name: ("also", name) for name in ("tensors", "layers", "norm", "caches")},
    **{name: ("features", name) for name in ("layout", "transposed", "width")},
    **{name: ("forwards", name) for name in ("pruned", "gated", "removed")},
    **{name: ("scope", name) for name in ("needs", "unless", "inner", "whole")},
    "index": ("forwards", "built"),
    "stream": ("stream", "tensors"),
    "after": ("stream", "after"),
    "counts": ("also", "attributes"),
    "along": ("stream", "attributes"),
    "joins": ("stream", "joins"),
}
"""Old keyword argument -> (new keyword argument, field of its value)."""
RENAMED = {"readers": "producers", "writer": "consumer"}
"""Old keyword argument -> its new name."""


def accept_old_keywords(init: Callable[..., None]) -> Callable[..., None]:
    """Returns a wrapper of `Units.__init__` that also accepts the old keyword arguments, with a DeprecationWarning."""

    @wraps(init)
    def accepting(self: Any, *args: Any, **given: Any) -> None:
        # "stream" is both an old keyword argument, whose value is a tuple, and a new one, whose value is a `Stream`.
        old = {
            name: given.pop(name)
            for name in [*given]
            if name == "empties" or (name in OLD and not isinstance(given[name], PARTS.get(name, ())))
        }
        for name, value in old.items():
            if name in OLD:
                part, field = OLD[name]
                given[part] = replace(given.get(part) or PARTS[part](), **{field: value})
        # The old argument empties=True meant that a module without units stays, and that its `pruned` class runs.
        if old.get("empties"):
            given["forwards"] = replace(given["forwards"], removed=given["forwards"].pruned)

        renamed = {name: RENAMED[name] for name in given if name in RENAMED}
        if renamed:
            given = {renamed.get(name, name): value for name, value in given.items()}
            changes = ", ".join(f"{name}= is now {new}=" for name, new in renamed.items())
            warnings.warn(f"Units: {changes}. The next release drops the old names.", DeprecationWarning, stacklevel=2)
        if old:
            fields = dict.fromkeys(OLD.get(name, ("forwards", "removed")) for name in old)
            parts = ", ".join(f"{part}={PARTS[part].__name__}({field}=...)" for part, field in fields)
            warnings.warn(
                f"Write Units({parts}) instead of Units({', '.join(f'{name}=' for name in old)}). The parts are in "
                "xprune.adapters. The next release drops the old keywords.",
                DeprecationWarning,
                stacklevel=2,
            )
        init(self, *args, **given)

    return accepting
