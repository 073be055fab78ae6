"""Exact arithmetic for proofs: no TF32 or other shortcuts, and a wider dtype than that of the model where it is needed.

`exact_arithmetic` replaces the caller's settings for a while. `lifted` computes in a wider dtype, one operation at a
time. So it needs no second copy of the weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from xprune.modules.calls import map_leaves
from xprune.modules.torch_private import TorchDispatchMode, get_precision, schema, set_precision

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu", "privateuseone")
"""The device types that torch 2.14 has an autocast for."""

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_LEAVES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_CONVOLUTIONS = (("cuda", "conv"), ("cuda", "rnn"))


@contextmanager
def exact_arithmetic(default_dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Makes float32 as exact as it can be inside a block. Afterwards all settings are as the caller had them.

    Inside the block these are off: TF32 and bfloat16 in products and convolutions of float32, sums in half precision,
    autocast of every device type, gradients, and inference mode.

    Args:
        default_dtype: Dtype of the tensors that a forward creates without naming a dtype.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic():
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        # Tensors of inference mode cannot be written to afterwards.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_float32())
        stack.enter_context(_full_sums())
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(default_dtype)
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Turns off TF32 and bfloat16 in float32 products and convolutions for a block.

    torch has two sets of settings for it. The old set is `set_float32_matmul_precision` and `allow_tf32`. The new set
    is `fp32_precision`, which exists for an operation, for a backend and for all backends. The most specific one that
    is not "none" counts.

    The two sets interact: writing an old setting writes new ones too, and reading an old one fails if both sets
    disagree. So each setting is read without the others, both sets are changed, and the old ones are put back before
    the new ones.
    """
    parents = {}
    # The most general one is set to "none" first. While it is, the others read as they were set.
    for key in _PARENTS:
        parents[key] = get_precision(*key)
        set_precision(*key, "none")
    leaves = {key: get_precision(*key) for key in _LEAVES}
    for key in _PARENTS:
        set_precision(*key, "ieee")
    # An operation that reads "ieee" now is set to "ieee", or follows its parents. It is not written to. The reason is
    # cuDNN: at start it has a TF32 that gives way to a parent's setting, and no setter can bring that state back.
    explicit = [key for key in _LEAVES if get_precision(*key) != "ieee"]
    for key in explicit:
        set_precision(*key, "ieee")
    products = torch.get_float32_matmul_precision()
    if products != "highest":
        torch.set_float32_matmul_precision("highest")
    convolutions = all(key in explicit for key in _CONVOLUTIONS) and _old_convolutions()
    if convolutions:
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if products != "highest":
            torch.set_float32_matmul_precision(products)
            explicit += [("cuda", "matmul"), ("mkldnn", "matmul")]
        if convolutions:
            torch.backends.cudnn.allow_tf32 = True
        for key in explicit:
            set_precision(*key, leaves[key])
        for key, value in parents.items():
            set_precision(*key, value)


def _old_convolutions() -> bool:
    """Returns the value of `torch.backends.cudnn.allow_tf32`, while the new settings are "ieee"."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    # Reading fails if the old setting disagrees with "ieee". Then it is True.
    except RuntimeError:
        return True


@contextmanager
def _full_sums() -> Iterator[None]:
    """Makes products of half-precision numbers sum up in float32 for a block."""
    matmul, names = torch.backends.cuda.matmul, ("fp16", "bf16")
    reductions = {f"allow_{name}_reduced_precision_reduction": True for name in names}
    before: dict[str, Any] = {}
    # The setter takes a bool, or a pair of bools whose second one is about split-k sums. Releases of torch without
    # split-k have no such attribute.
    for name in reductions:
        allowed, split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)
        before[name] = allowed if split else (allowed, split)
    accumulation, attention = matmul.allow_fp16_accumulation, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    for name in before:
        setattr(matmul, name, False)
    matmul.allow_fp16_accumulation = False
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        matmul.allow_fp16_accumulation = accumulation
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(attention)


class CannotLift(RuntimeError):
    """Raised if a forward writes into a tensor of a narrower dtype than wanted, so `lifted` cannot run it."""


@contextmanager
def lifted(dtype: torch.dtype) -> Iterator[None]:
    """Computes a block in a wider dtype than the model has, without a copy of the model.

    For each operation, arguments of a narrower floating-point dtype are converted to `dtype`. If the operation is asked
    for a narrower dtype, it gets `dtype` too. One weight at a time is converted, a large one in parts.

    Args:
        dtype: torch.float32 or torch.float64. Tensors that are as wide or wider stay as they are.

    Raises:
        CannotLift: The forward writes into a narrower tensor, which would round the result.

    Example:
        >>> layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
        >>> with torch.no_grad(), lifted(torch.float32):
        ...     layer(torch.ones(1, 2)).dtype
        torch.float32
    """
    operations = _Lifted(dtype)
    with operations, _LiftedEarly(operations):
        yield


_PICKS = (
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
)
"""Operations that only pick values of their first argument. The picked values are lifted, not the whole argument."""
_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
"""Products with a matrix, and the position of the weight among the arguments."""
PART = 2**22
"""Number of elements of a weight that are lifted at a time. A larger weight is lifted in parts."""
_CHECKED = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.scaled_dot_product_attention,
}
"""Functions that check their arguments before any operation starts, and refuse arguments of several dtypes."""


class _LiftedEarly(TorchFunctionMode):
    """Lifts the arguments of the functions in `_CHECKED`. For these, `_Lifted` comes too late."""

    def __init__(self, operations: "_Lifted") -> None:
        super().__init__()
        self.lift = operations.lift

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one function of torch, on lifted arguments if it checks them."""
        kwargs = kwargs or {}
        if func in _CHECKED:
            args, kwargs = map_leaves(args, self.lift), map_leaves(kwargs, self.lift)
        return func(*args, **kwargs)


class _Lifted(TorchDispatchMode):
    """Lifts the arguments of every operation inside the block, see `lifted`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation on lifted arguments."""
        kwargs = kwargs or {}
        # A view computes nothing. The operation that reads the view lifts it.
        if func.is_view:
            return func(*args, **kwargs)
        if schema(func).is_mutable:
            self._check_writes(func, args, kwargs)
        if func in _PICKS:
            return self.lift(func(args[0], *map_leaves(args[1:], self.lift), **kwargs))
        if func in _PRODUCTS:
            position = _PRODUCTS[func]
            weight = args[position]
            if self._narrow(weight) and weight.numel() > PART:
                return self._product(*map_leaves(args[:position], self.lift), weight, **kwargs)
        return func(*map_leaves(args, self.lift), **map_leaves(kwargs, self.lift))

    def _wider(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype to compute in, in place of `dtype`. Integers and wide dtypes stay as they are."""
        if dtype is torch.complex64 and self.dtype is torch.float64:
            return torch.complex128
        return self.dtype if dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize else dtype

    def _narrow(self, value: Any) -> bool:
        """Returns True for a tensor that has to be converted."""
        return isinstance(value, Tensor) and self._wider(value.dtype) != value.dtype

    def lift(self, value: Any) -> Any:
        """Returns a tensor or a dtype, wider if it was too narrow. Returns anything else as it is."""
        if isinstance(value, torch.dtype):
            return self._wider(value)
        return value.to(self._wider(value.dtype)) if self._narrow(value) else value

    def _product(self, *args: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """Computes `mm` or `addmm` by parts of the weight's columns, so that one part is lifted at a time.

        Args:
            *args: The bias for `addmm`, then the rows (n, in) and the weight (in, out).
            beta: Factor of the bias.
            alpha: Factor of the product.
        """
        *bias, rows, weight = args
        columns = max(1, PART // weight.shape[0])
        product = torch.cat([rows @ self.lift(part) for part in weight.split(columns, 1)], 1)
        return torch.add(bias[0] * beta, product, alpha=alpha) if bias else product

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises CannotLift if the operation writes into a narrower tensor."""
        for index, argument in enumerate(schema(func).arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            # Some operations write into a list of tensors.
            targets = value if isinstance(value, (list, tuple)) else (value,)
            if written and any(self._narrow(t) for t in targets):
                raise CannotLift(f"{func} writes into a tensor that is narrower than {self.dtype}")
