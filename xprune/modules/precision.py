"""Exact arithmetic for proofs: without TF32 and similar shortcuts, and in a wider dtype where that is needed.

`exact_arithmetic` changes torch's settings inside a `with` block. `lifted` computes in a wider dtype than that of the
model's weights. It converts the arguments of one operation at a time, so it needs no second copy of the weights.
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
"""The device types for which torch 2.14 has an autocast."""

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_LEAVES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_CONVOLUTIONS = (("cuda", "conv"), ("cuda", "rnn"))


@contextmanager
def exact_arithmetic(default_dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Makes float32 arithmetic as exact as possible inside a `with` block. Afterwards all settings are as before.

    Inside the block, these are off: TF32 and bfloat16 in matrix products and convolutions of float32 tensors, sums in
    half precision, autocast on every device type, gradients, and inference mode.

    Args:
        default_dtype: The dtype of tensors that a forward creates without a given dtype.

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
        # Inference mode is turned off because its tensors cannot be written to later.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_float32())
        stack.enter_context(_full_sums())
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(default_dtype)
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Turns off TF32 and bfloat16 in float32 matrix products and convolutions inside a `with` block.

    torch has two sets of settings for this. The old set is `set_float32_matmul_precision` and `allow_tf32`. The new set
    is `fp32_precision`, which exists for each operation, for each backend and for all backends together. The most
    specific setting that is not "none" is used.

    The two sets influence each other. Writing an old setting also writes new ones, and reading an old setting fails if
    the two sets contradict each other. So each new setting is read while the general ones are "none". At the end, the
    old settings are restored before the new ones.
    """
    parents = {}
    # The general settings are set to "none" first, starting with the most general. Then a specific setting shows its
    # own value when it is read, not the value of a general one.
    for key in _PARENTS:
        parents[key] = get_precision(*key)
        set_precision(*key, "none")
    leaves = {key: get_precision(*key) for key in _LEAVES}
    for key in _PARENTS:
        set_precision(*key, "ieee")
    # If an operation reads "ieee" now, it is not written to. cuDNN is the reason. When torch starts, cuDNN uses TF32
    # but follows a more general setting, and no setter can restore that state.
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
    """Returns the value of `torch.backends.cudnn.allow_tf32`. It is called while the new settings are "ieee"."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    # Reading fails if the old setting contradicts "ieee". That is only so if the old setting is True.
    except RuntimeError:
        return True


@contextmanager
def _full_sums() -> Iterator[None]:
    """Makes matrix products of half-precision tensors use float32 for their sums inside a `with` block."""
    matmul, names = torch.backends.cuda.matmul, ("fp16", "bf16")
    reductions = {f"allow_{name}_reduced_precision_reduction": True for name in names}
    before: dict[str, Any] = {}
    # The setter accepts a bool, or a pair of bools. The second bool of a pair is for split-k sums. Releases of torch
    # without split-k have no attribute that ends in `_split_k`.
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
    """Raised by `lifted` if a forward writes into a tensor whose dtype is narrower than the wanted one."""


@contextmanager
def lifted(dtype: torch.dtype) -> Iterator[None]:
    """Computes in a wider dtype than that of the model inside a `with` block, without a copy of the model.

    Before each operation, arguments with a narrower floating-point dtype are converted to `dtype`. If the operation
    itself is asked for a narrower dtype, `dtype` is used instead. One weight is converted at a time, and a large weight
    in parts, so little memory is needed.

    Args:
        dtype: torch.float32 or torch.float64. Tensors that already have this or a wider dtype are not converted.

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
"""Operations that pick values from their first argument. Only the picked values are converted."""
_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
"""Matrix products, with the position of the weight among their arguments."""
PART = 2**22
"""The number of elements of a weight that are converted at a time. A larger weight is converted in parts."""
_CHECKED = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.scaled_dot_product_attention,
}
"""Functions that refuse arguments of different dtypes before they start their first operation."""


class _LiftedEarly(TorchFunctionMode):
    """Converts the arguments of the functions in `_CHECKED` before these functions check them.

    `_Lifted` sees only the operations that run after the check.
    """

    def __init__(self, operations: "_Lifted") -> None:
        super().__init__()
        self.lift = operations.lift

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one function of torch. If the function is in `_CHECKED`, its arguments are converted first."""
        kwargs = kwargs or {}
        if func in _CHECKED:
            args, kwargs = map_leaves(args, self.lift), map_leaves(kwargs, self.lift)
        return func(*args, **kwargs)


class _Lifted(TorchDispatchMode):
    """Converts the arguments of every operation to the wider dtype, see `lifted`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation with converted arguments."""
        kwargs = kwargs or {}
        # A view computes nothing, so it is not converted here. The operation that reads the view converts it.
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
        """Returns the wider dtype if `dtype` is a narrow floating-point dtype. Returns other dtypes unchanged."""
        if dtype is torch.complex64 and self.dtype is torch.float64:
            return torch.complex128
        return self.dtype if dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize else dtype

    def _narrow(self, value: Any) -> bool:
        """Returns True if the value is a tensor that has to be converted, else False."""
        return isinstance(value, Tensor) and self._wider(value.dtype) != value.dtype

    def lift(self, value: Any) -> Any:
        """Converts a narrow tensor to the wider dtype, and a narrow dtype into the wider one. Returns the result.

        Any other value is returned unchanged.
        """
        if isinstance(value, torch.dtype):
            return self._wider(value)
        return value.to(self._wider(value.dtype)) if self._narrow(value) else value

    def _product(self, *args: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """Computes `mm` or `addmm` for some columns of the weight at a time. Only these columns are converted.

        Args:
            *args: For `mm`, the inputs (n, in) and the weight (in, out). For `addmm`, the bias comes before them.
            beta: The factor of the bias.
            alpha: The factor of the product.
        """
        *bias, rows, weight = args
        columns = max(1, PART // weight.shape[0])
        product = torch.cat([rows @ self.lift(part) for part in weight.split(columns, 1)], 1)
        return torch.add(bias[0] * beta, product, alpha=alpha) if bias else product

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises CannotLift if the operation writes into a tensor that is narrower than the wanted dtype."""
        for index, argument in enumerate(schema(func).arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            # Some operations write into a list of tensors.
            targets = value if isinstance(value, (list, tuple)) else (value,)
            if written and any(self._narrow(t) for t in targets):
                raise CannotLift(f"{func} writes into a tensor that is narrower than {self.dtype}")
