"""The private names of torch that this package uses. No other file may use a private name of torch.

torch has no public names for these. Any release may rename them. `tests/test_private_names.py` then names the one that
is missing.

`pyproject.toml` still has no upper bound on torch. A bound would keep users from every new torch until we have read it.
Instead, this module looks for the names when it is imported, and raises an error with the name that is missing. The
attributes of autograd nodes are an exception: without them, discovery treats an operation as unknown.
"""

from typing import Any

import torch
from torch import Tensor, nn

READ_FROM = "2.14.1"
"""The version of torch whose source these names were read from."""

try:
    # torch's documentation of __torch_dispatch__ uses this name, underscore included.
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    # They get and set the precision of one operation of one backend. Public names, such as
    # `torch.backends.cudnn.fp32_precision`, reach every setting but one: the setter of
    # `torch.backends.mkldnn.fp32_precision` writes to the setting of all backends.
    get_precision = torch._C._get_fp32_precision_getter
    set_precision = torch._C._set_fp32_precision_setter
    # (class, shape, dtype=, device=) -> a tensor of that class without memory.
    make_wrapper = Tensor._make_wrapper_subclass
    # The functions below read these three from instances. Here they are only looked for.
    _ = Tensor._version, torch.ops.aten.detach.default._schema, nn.Identity()._forward_pre_hooks
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a private name that xprune uses: {error}. Install torch "
        f"{READ_FROM.rpartition('.')[0]}, or a newer xprune."
    ) from error


def version(tensor: Tensor) -> int:
    """Returns how many times a tensor was written into."""
    return int(tensor._version)


def schema(operation: Any) -> Any:
    """Returns the schema of an operation of torch.ops. It lists the arguments that the operation writes into."""
    return operation._schema


def has_pre_hooks(module: nn.Module) -> bool:
    """Returns True if a hook runs before the module's forward."""
    return bool(module._forward_pre_hooks)


def saved_dim(node: Any) -> Any:
    """Returns the axis or axes that an autograd node saved. None if it saved none.

    Autograd may store a negative axis as an unsigned 64-bit number: -1 is 2**64 - 1.
    """
    return getattr(node, "_saved_dim", None)


def saved_sizes(node: Any) -> Any:
    """Returns the shape of the input, if an autograd node saved it. None otherwise."""
    return getattr(node, "_saved_self_sym_sizes", None)


def saved_input(node: Any) -> Any:
    """Returns the input, if an autograd node saved it. None otherwise."""
    return getattr(node, "_saved_self", None)


class NoFastPath:
    """A base class of attentions that nn.TransformerEncoderLayer must call instead of its fast path.

    The fast path is a fused kernel, which needs heads that fill the hidden size. The layer reads the attribute below
    before it takes the fast path.
    """

    # The setter does nothing: nn.MultiheadAttention sets the attribute in its constructor.
    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)
