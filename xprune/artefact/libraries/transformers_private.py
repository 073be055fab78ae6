"""The private name of transformers that this package uses. No other file may use a private name of transformers.

transformers has a public way to set the implementation of attention, but none to read it. Any release may rename the
private one. `tests/test_private_names.py` then fails. There is no upper bound on the version of transformers. Without
the name, a saved model is rebuilt with the default implementation of attention, which computes the same up to rounding.
"""

from typing import Any

READ_FROM = "5.24.0"
"""The version of transformers whose source this name was read from."""


def attention_of(config: Any) -> str | None:
    """Returns the implementation of attention that a config names, such as "sdpa". None if it names none.

    Args:
        config: A config of transformers.
    """
    return getattr(config, "_attn_implementation", None)
