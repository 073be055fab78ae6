"""The keywords that `Units` had before it had parts. They work for one release, with a DeprecationWarning."""

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
"""Keyword of `Units` -> class of the part."""
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
"""Old keyword -> (part, field of the part)."""
RENAMED = {"readers": "producers", "writer": "consumer"}
"""Old keyword -> its name now."""


def accept_old_keywords(init: Callable[..., None]) -> Callable[..., None]:
    """Wraps `Units.__init__` so that it also takes the old keywords, with a DeprecationWarning for them."""

    @wraps(init)
    def accepting(self: Any, *args: Any, **given: Any) -> None:
        # "stream" is an old keyword and a new one. The value tells them apart: a tuple is old, a `Stream` is new.
        old = {
            name: given.pop(name)
            for name in [*given]
            if name == "empties" or (name in OLD and not isinstance(given[name], PARTS.get(name, ())))
        }
        for name, value in old.items():
            if name in OLD:
                part, field = OLD[name]
                given[part] = replace(given.get(part) or PARTS[part](), **{field: value})
        # empties=True meant that the module stays and its `pruned` class runs with zero units.
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
