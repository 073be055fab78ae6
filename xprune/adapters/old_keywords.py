"""The keywords of `Units` before it had parts. They work for one release, with a DeprecationWarning."""

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
"""Old keyword -> (part, its field)."""
RENAMED = {"readers": "producers", "writer": "consumer"}
"""Old keyword -> its name now."""


def accept_old_keywords(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that takes the old keywords too, and warns."""

    @wraps(init)
    def made(self: Any, *args: Any, **given: Any) -> None:
        old = {
            name: given.pop(name)
            for name in [*given]
            if name == "empties" or (name in OLD and not isinstance(given[name], PARTS.get(name, ())))
        }
        for name, value in old.items():
            if name in OLD:
                part, field = OLD[name]
                given[part] = replace(given.get(part) or PARTS[part](), **{field: value})
        if old.get("empties"):
            given["forwards"] = replace(given["forwards"], removed=given["forwards"].pruned)
        renamed = {name: RENAMED[name] for name in given if name in RENAMED}
        if renamed:
            given = {renamed.get(name, name): value for name, value in given.items()}
            says = ", ".join(f"{name}= is {new}= now" for name, new in renamed.items())
            warnings.warn(
                f"Units: {says}. The old names will be gone in the next release.", DeprecationWarning, stacklevel=2
            )
        if old:
            now = dict.fromkeys(OLD.get(name, ("forwards", "removed")) for name in old)
            says = ", ".join(f"{part}={PARTS[part].__name__}({field}=...)" for part, field in now)
            warnings.warn(
                f"Units({', '.join(f'{name}=' for name in old)}) is said as Units({says}), with parts from "
                "xprune.adapters; the old keywords will be gone in the next release.",
                DeprecationWarning,
                stacklevel=2,
            )
        init(self, *args, **given)

    return made
