"""The names of transformers that this package uses and that are private or not documented. No other file may use such.

transformers has a public way to set the implementation of attention, but no public way to read it. Any release may
rename the private attribute. `tests/test_private_names.py` then fails. There is no upper bound on the version of
transformers: without the attribute, a saved model is built with the default implementation of attention, which computes
the same up to rounding.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

READ_FROM = "5.24.0"
"""The version of transformers whose source this name was read from."""


def attention_of(config: Any) -> str | None:
    """Returns the implementation of attention that a config names, such as "sdpa", or None if it names none.

    Args:
        config: A config of transformers.
    """
    return getattr(config, "_attn_implementation", None)


def names_in_model(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Returns the name that a tensor of a checkpoint has in a model of transformers, for each name in the checkpoint.

    Some checkpoints have names of older releases, or lack the prefix of the base model. `from_pretrained` renames such
    tensors in the same way. It also converts tensors, for example stacks those of several experts, which is not done
    here: the names of such tensors stay as they are. PEFT uses the two functions of transformers too.

    Args:
        model: The model. If it is not one of transformers, all names stay as they are.
        keys: The names in the checkpoint.
    """
    if not hasattr(model, "base_model_prefix"):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known, prefix = model.state_dict(), str(model.base_model_prefix)
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]  # type: ignore[arg-type]
    return {key: rename_source_key(key, rules, [], prefix, known)[0] for key in keys}
