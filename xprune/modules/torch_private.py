"""The private names of torch that this package uses. No other file may use one.

torch has no public names for these. They may move in any release, and `tests/test_private_names.py` says which one
moved. `pyproject.toml` sets no upper bound on torch all the same: a bound would keep users from every new torch until
we have read it. Instead, this module looks for the names when it is imported, and raises an error that says which one
is missing. The attributes of autograd nodes are the exception: without them, discovery treats an operation as unknown.
"""

from typing import Any

import torch
from torch import Tensor, nn

READ_FROM = "2.14.1"
"""The version of torch whose source these names were read from."""

try:
    # torch's documentation of __torch_dispatch__ uses this name, underscore included.
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    # (backend, operation) -> its setting. The public names (`torch.backends.cudnn.fp32_precision` and others) are not
    # enough: the setter of `torch.backends.mkldnn.fp32_precision` writes to the setting of all backends instead.
    get_precision = torch._C._get_fp32_precision_getter
    set_precision = torch._C._set_fp32_precision_setter
    # (class, shape, dtype=, device=) -> a tensor of a subclass, without memory of its own.
    make_wrapper = Tensor._make_wrapper_subclass
    # These three are used on instances, below.
    _ = Tensor._version, torch.ops.aten.detach.default._schema, nn.Identity()._forward_pre_hooks
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a private name that xprune uses: {error}. Install torch "
        f"{READ_FROM.rpartition('.')[0]}, or a newer xprune."
    ) from error


def version(tensor: Tensor) -> int:
    """Returns how often a tensor has been written into."""
    return int(tensor._version)


def schema(operation: Any) -> Any:
    """Returns the schema of an operation of torch.ops, which says the arguments that it writes into."""
    return operation._schema


def has_pre_hooks(module: nn.Module) -> bool:
    """True if a hook is called before the module's forward."""
    return bool(module._forward_pre_hooks)


def saved_dim(node: Any) -> Any:
    """Returns the axis or axes that an autograd node has saved, None if it has none.

    A negative axis may come as the unsigned number of 64 bits with the same bits.
    """
    return getattr(node, "_saved_dim", None)


def saved_sizes(node: Any) -> Any:
    """Returns the shape of the input that an autograd node has saved, None if it has none."""
    return getattr(node, "_saved_self_sym_sizes", None)


def saved_input(node: Any) -> Any:
    """Returns the input that an autograd node has saved, None if it has none."""
    return getattr(node, "_saved_self", None)


class NoFastPath:
    """A base of attentions that nn.TransformerEncoderLayer must call, and not replace by its fused kernel.

    The kernel needs heads that fill the hidden size. The layer asks for this attribute before it takes the kernel.
    """

    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)
