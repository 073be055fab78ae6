"""The private name of transformers that this package uses. No other file may use a private name of transformers.

transformers has a public way to set the implementation of attention, but no public way to read it. Any release may
rename the private attribute. `tests/test_private_names.py` then fails. There is no upper bound on the version of
transformers: without the attribute, a saved model is built with the default implementation of attention, which computes
the same up to rounding.
"""

from typing import Any

READ_FROM = "5.24.0"
"""The version of transformers whose source this name was read from."""


def attention_of(config: Any) -> str | None:
    """Returns the implementation of attention that a config names, such as "sdpa", or None if it names none.

    Args:
        config: A config of transformers.
    """
    return getattr(config, "_attn_implementation", None)
