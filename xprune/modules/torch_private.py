"""The private names of torch that xprune uses. No other file may use a private name of torch.

torch has no public names for these, and any release of torch may rename them. `tests/test_private_names.py` then fails
and says which name is missing.

`pyproject.toml` sets no upper limit for the version of torch. With a limit, users would have to wait for us before they
can install a new torch. Instead, the import of this file raises an error if a name is missing. There is one exception:
if an attribute of autograd nodes is missing, discovery treats the operation as unknown.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

READ_FROM = "2.14.1"
"""The version of torch in whose source code we found these names."""

try:
    # The documentation of __torch_dispatch__ imports this class from the same private module.
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    # These two read and set the precision of one operation on one backend. Public attributes such as
    # `torch.backends.cudnn.fp32_precision` change the same settings with one exception:
    # `torch.backends.mkldnn.fp32_precision` changes the setting of all backends.
    get_precision = torch._C._get_fp32_precision_getter
    set_precision = torch._C._set_fp32_precision_setter
    # This function creates a tensor of a given class without memory. It is called with (class, shape, dtype=, device=).
    make_wrapper = Tensor._make_wrapper_subclass
    # The functions below read these three attributes. This line only checks that they exist.
    _ = Tensor._version, torch.ops.aten.detach.default._schema, nn.Identity()._forward_pre_hooks
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a private name that xprune uses: {error}. Install torch "
        f"{READ_FROM.rpartition('.')[0]}, or a newer xprune."
    ) from error


def compiler_is_loaded() -> bool:
    """Returns True if torch's compiler was imported, else False. Without it, no module can have been compiled.

    The import takes more than a second, so xprune does not import the compiler itself.
    """
    return "torch._dynamo" in sys.modules


def version(tensor: Tensor) -> int:
    """Returns how many times a tensor was written into."""
    return int(tensor._version)


def schema(operation: Any) -> Any:
    """Returns the schema of an operation of torch.ops. Among other things, it says which arguments are written into."""
    return operation._schema


def has_pre_hooks(module: nn.Module) -> bool:
    """Returns True if the module has a hook that runs before its forward, else False."""
    return bool(module._forward_pre_hooks)


def saved_dim(node: Any) -> Any:
    """Returns the axis or axes that an autograd node saved for the backward pass. Returns None if it saved none.

    Autograd may store a negative axis as an unsigned 64-bit number. For example, -1 becomes 2**64 - 1.
    """
    return getattr(node, "_saved_dim", None)


def saved_sizes(node: Any) -> Any:
    """Returns the shape of the input, if an autograd node saved it for the backward pass, else None."""
    return getattr(node, "_saved_self_sym_sizes", None)


def saved_input(node: Any) -> Any:
    """Returns the input, if an autograd node saved it for the backward pass, else None."""
    return getattr(node, "_saved_self", None)


class NoFastPath:
    """A base class of attentions for which nn.TransformerEncoderLayer must not use its fast path.

    The fast path is a single fused operation. It is wrong for an attention whose heads do not fill the hidden size. The
    layer reads the attribute below to decide whether it may use the fast path.
    """

    # The setter does nothing. It is needed because the constructor of nn.MultiheadAttention sets the attribute.
    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)


def grouped_products() -> list[Any]:
    """Returns the operations of torch that multiply rows with one of several matrices each.

    Mixtures of experts use them. Older versions of torch have none, and the list is then empty.
    """
    return [found for name in ("_grouped_mm", "grouped_mm") if (found := getattr(torch.ops.aten, name, None))]
