"""The class `Target`: the device, and the way of running, on which a latency is meant."""

import json
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any

from xprune.errors import TargetError

DTYPES = ("float32", "bfloat16", "float16")
"""The allowed values of `Target.dtype`."""


@dataclass(frozen=True)
class Target:
    """Says where and how a model runs when its latency is measured: device, dtype, batch, compiled or not, threads.

    A field that is None means "as the run has it". So `Target()` is the device and the dtype of the model, the first
    training batch, and the number of threads that torch uses.

    Args:
        device: A device of torch, such as "cpu", "cuda" or "cuda:1". None means the device of the model.
        dtype: The dtype of weights and inputs: "float32", "bfloat16" or "float16". None means that of the model.
        batch: The number of samples in a forward pass. The samples of the first batch are repeated as often as needed.
            None means the number of samples in the first batch.
        compiled: True if the model runs compiled by `torch.compile`, else False.
        threads: The number of CPU threads. None means the number that torch uses.
        table: The file of a latency table that `xprune profile` has measured, perhaps on another computer. Times come
            from this file, and the other fields are those of the file. None means that times are measured here.

    Raises:
        TargetError: A value is not allowed.

    Example:
        >>> Target(device="cuda", dtype="bfloat16", batch=256).name
        'device=cuda, dtype=bfloat16, batch=256'
        >>> Target.of("batch=1,threads=2") == Target(batch=1, threads=2)
        True
    """

    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    compiled: bool = False
    threads: int | None = None
    table: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TargetError(f"dtype={self.dtype!r} is not known. Give one of {', '.join(DTYPES)}, or leave it out.")
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise TargetError(f"{name}={value!r} has to be a whole number of at least 1. Or leave it out.")
        if not isinstance(self.compiled, bool):
            raise TargetError(f"compiled={self.compiled!r} has to be true or false.")
        for name in ("device", "table"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                # A path or a torch.device is as good as its text, and JSON can hold a text.
                object.__setattr__(self, name, str(value))
        others = [name for name in _FIELDS if name != "table" and getattr(self, name) not in (None, False)]
        if self.table is not None and others:
            raise TargetError(
                f"table= and {', '.join(others)}= were both given, but the table says already where it was measured. "
                "Give one of the two."
            )

    @staticmethod
    def of(text: str) -> "Target":
        """Reads a target from a text such as "device=cuda,batch=256,compiled=true", as the command line gives it.

        Raises:
            TargetError: The text is not a list of settings of a target.
        """
        given: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key not in _FIELDS:
                raise TargetError(
                    f"{part!r} is not a setting of a target. Write for example device=cuda,dtype=bfloat16,batch=256. "
                    f"The settings are {', '.join(_FIELDS)}."
                )
            try:
                given[key] = json.loads(value.lower()) if key in ("batch", "threads", "compiled") else value
            except ValueError as error:
                raise TargetError(f"{key}={value!r} is neither a number nor true or false.") from error
        return Target(**given)

    @property
    def name(self) -> str:
        """The target as a short text for tables and messages. A text of its own if every field is left out."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        return ", ".join(f"{name}={value}" for name, value in given.items()) or "as the model runs here"


_FIELDS = tuple(field.name for field in fields(Target))
