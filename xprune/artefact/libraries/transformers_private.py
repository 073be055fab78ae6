"""The private name of transformers that this package uses. No other file may use one.

transformers has a public way to set the implementation of attention, and none to read it. The name may move in any
release, and `tests/test_private_names.py` says so when it has. There is no upper bound on transformers: without the
name, a saved model is rebuilt with transformers' default implementation, which computes the same up to rounding.
"""

from typing import Any

READ_FROM = "5.24.0"
"""The version of transformers whose source this name was read from."""


def attention_of(config: Any) -> str | None:
    """Returns the implementation of attention that a config asks for, such as "sdpa". None if it does not say."""
    return getattr(config, "_attn_implementation", None)
