"""Precision: arithmetic that is as exact as its dtype says, whatever the caller allows, and in a dtype of our choice.

`exact_arithmetic` puts the caller's settings aside for a while. `lifted` computes in a wider dtype than the model has,
one operation at a time, so that no second copy of the weights is made.
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
    """Computes float32 as float32, without gradients; everything is as the caller had it afterwards.

    Inside, these are off: TF32 and bfloat16 in float32 products and convolutions, sums in half precision, autocast
    of every device type, gradients, inference mode.

    Args:
        default_dtype: The dtype of tensors that a forward makes without naming one.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))  # its tensors could not be written to afterwards
        stack.enter_context(torch.no_grad())
        stack.enter_context(_full_float32())
        stack.enter_context(_full_sums())
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(default_dtype)
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 products and convolutions without TF32 or bfloat16.

    torch has two sets of settings for it. The old one is `set_float32_matmul_precision` and `allow_tf32`. The new one
    is `fp32_precision`, of an operation, of a backend, and of all; the most special one that is not "none" counts.
    Setting an old one sets new ones too, and reading an old one fails where the two disagree. So each setting is read
    by itself, both sets are changed, and the old ones are put back before the new ones.
    """
    parents = {}
    for key in _PARENTS:  # the general one first: while it is "none", the others read as they were set
        parents[key] = get_precision(*key)
        set_precision(*key, "none")
    leaves = {key: get_precision(*key) for key in _LEAVES}
    for key in _PARENTS:
        set_precision(*key, "ieee")
    # What reads "ieee" now is "ieee" itself or asks its parents. It is left alone: cuDNN starts with a TF32 that
    # gives way to a parent's setting, and no setter can bring that state back.
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
    """What `torch.backends.cudnn.allow_tf32` was set to, while the new settings say "ieee"."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # the old setting disagrees with "ieee": it is True
        return True


@contextmanager
def _full_sums() -> Iterator[None]:
    """Products of half-precision numbers that are summed up in float32."""
    matmul, names = torch.backends.cuda.matmul, ("fp16", "bf16")
    reductions = {f"allow_{name}_reduced_precision_reduction": True for name in names}
    before: dict[str, Any] = {}
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
    """A forward that `lifted` cannot run: it writes into a tensor that is narrower than the wanted dtype."""


@contextmanager
def lifted(dtype: torch.dtype) -> Iterator[None]:
    """Computes in `dtype` where tensors have a narrower one, without a copy of the model.

    Each operation gets its narrower floating-point arguments converted, and a narrower dtype that it is asked for is
    replaced by `dtype`. One weight at a time is converted, a large one in parts.

    Args:
        dtype: torch.float32 or torch.float64. Tensors that are as wide stay as they are.

    Raises:
        CannotLift: The forward writes into a narrower tensor, which would have to be rounded.

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
"""Operations that only pick values of their first argument: it need not be lifted as a whole."""
_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
"""Products of a matrix, and which of the arguments the weight is."""
PART = 2**22
"""Elements of a weight that are lifted at once."""
_CHECKED = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.scaled_dot_product_attention,
}
"""Functions that refuse arguments of several dtypes before any operation starts."""


class _LiftedEarly(TorchFunctionMode):
    """Lifts the arguments of functions that check them themselves."""

    def __init__(self, operations: "_Lifted") -> None:
        super().__init__()
        self.lift = operations.lift

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CHECKED:
            args, kwargs = map_leaves(args, self.lift), map_leaves(kwargs, self.lift)
        return func(*args, **kwargs)


class _Lifted(TorchDispatchMode):
    """Lifts the arguments of each operation, see `lifted`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation on lifted arguments."""
        kwargs = kwargs or {}
        if func.is_view:  # computes nothing: what reads the view lifts it
            return func(*args, **kwargs)
        if schema(func).is_mutable:
            self._check_writes(func, args, kwargs)
        if func in _PICKS:
            return self.lift(func(args[0], *map_leaves(args[1:], self.lift), **kwargs))
        if func in _PRODUCTS and self._narrow(args[_PRODUCTS[func]]) and args[_PRODUCTS[func]].numel() > PART:
            return self._product(*map_leaves(args[: _PRODUCTS[func]], self.lift), args[_PRODUCTS[func]], **kwargs)
        return func(*map_leaves(args, self.lift), **map_leaves(kwargs, self.lift))

    def _wider(self, dtype: torch.dtype) -> torch.dtype:
        if dtype is torch.complex64 and self.dtype is torch.float64:
            return torch.complex128
        return self.dtype if dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize else dtype

    def _narrow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self._wider(value.dtype) != value.dtype

    def lift(self, value: Any) -> Any:
        """A tensor or a dtype, wider if it was too narrow; anything else as it is."""
        if isinstance(value, torch.dtype):
            return self._wider(value)
        return value.to(self._wider(value.dtype)) if self._narrow(value) else value

    def _product(self, *args: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        """(bias,) rows, weight: the product made from parts of the weight's columns."""
        *bias, rows, weight = args
        step = max(1, PART // weight.shape[0])
        made = torch.cat([rows @ self.lift(part) for part in weight.split(step, 1)], 1)
        return torch.add(bias[0] * beta, made, alpha=alpha) if bias else made

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(schema(func).arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(self._narrow(t) for t in (value if isinstance(value, (list, tuple)) else (value,))):
                raise CannotLift(f"{func} writes into a tensor that is narrower than {self.dtype}")
