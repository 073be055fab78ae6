"""Watches one forward pass of a model: which layers it calls, and in which modules attention is computed.

An attention is recognised by what it computes, and not by its class. Every attention turns scores into weights with a
softmax, or calls `scaled_dot_product_attention`, or multiplies two tensors that both depend on the input. The number of
heads is an axis of the tensors in that operation. So the record of one forward pass shows where attentions are and how
many heads they may have, whoever wrote the module.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from xprune.modules.calls import call, slow_path, tensors_in
from xprune.modules.copies import shared_copy
from xprune.modules.forward import try_forward
from xprune.modules.norms import BATCH_NORMS, is_feature_norm

SOFTMAX = {torch.softmax, Tensor.softmax, functional.softmax, torch.log_softmax, functional.log_softmax}
"""The functions that turn scores into weights."""

PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
}
"""The functions that multiply two tensors. Linear layers do not use them in a way that `Watch` could mistake."""


@dataclass
class Attended:
    """A module in whose forward attention is computed.

    Attributes:
        path: The path of the innermost module with parameters in whose forward it happened.
        first: The number of the first such operation in the order of the forward pass.
        last: The number of the last such operation during the first call of the module.
        heads: Numbers that may be the number of heads. They are lengths of axes of the tensors in these operations.
        sure: True if the operation was `scaled_dot_product_attention`, or a softmax over scores. Scores have four axes,
            or come after a product. False if it was only a product or another softmax, which other modules compute too.
        multiplied: True if a product of two tensors was seen.

    Example:
        >>> Attended("blocks.0.attn", first=3, last=5, heads={4}, sure=True).heads
        {4}
    """

    path: str
    first: int
    last: int
    heads: set[int] = field(default_factory=set)
    sure: bool = False
    multiplied: bool = False


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: a module with a weight matrix or a convolution's kernel.

    Attributes:
        path: The path of the layer.
        time: The number of the call in the order of the forward pass.

    Example:
        >>> LayerCall("blocks.0.attn.qkv", time=2).path
        'blocks.0.attn.qkv'
    """

    path: str
    time: int


@dataclass
class Record:
    """What was seen in one forward pass.

    Attributes:
        attended: The modules in whose forward attention is computed, by their paths, in the order of the forward pass.
        layers: All calls of layers, in their order.
        ran: The paths of all modules that the forward called.

    Example:
        >>> attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> record = watch(attention, torch.randn(2, 5, 8))
        >>> list(record.attended), [each.path for each in record.layers]
        (['self_attn'], ['linear1', 'linear2'])
    """

    attended: dict[str, Attended] = field(default_factory=dict)
    layers: list[LayerCall] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    def after(self, time: int) -> Iterator[str]:
        """Yields the paths of the layers that are called after a point in time, each once."""
        seen = set[str]()
        for each in self.layers:
            if each.time > time and each.path not in seen:
                seen.add(each.path)
                yield each.path


def is_norm(module: nn.Module) -> bool:
    """Returns True for a norm layer of any library, else False."""
    norms = (nn.GroupNorm, *BATCH_NORMS)
    return isinstance(module, norms) or is_feature_norm(module) or "norm" in type(module).__name__.lower()


def is_layer(module: nn.Module) -> bool:
    """Returns True for a linear layer or a convolution of any library: a module that multiplies by its weight.

    Embeddings and norm layers have a weight too, but they do not multiply features with each other.
    """
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() >= 2
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and not is_norm(module)
        and not any(True for child in module.children() for _ in child.parameters())
    )


@torch.no_grad()
def watch(model: nn.Module, example_inputs: Any) -> Record:
    """Runs a copy of a model once and returns the record of the forward pass.

    Args:
        model: The model. It is not changed.
        example_inputs: The inputs that the model is called with.

    Raises:
        ModelError: The forward of the model fails.
    """
    twin = shared_copy(model)
    mode = _Mode(twin)
    try:
        with slow_path(), mode:
            call(twin, example_inputs)
    except Exception:
        # This raises a ModelError that shows the cause. If the forward fails only while it is watched, the calls until
        # then are still worth something.
        try_forward(model, example_inputs)
    return mode.record


class _Mode(TorchFunctionMode):
    """Sees every function of torch that the forward calls, together with the modules that run at that time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record, self.time = Record(), 0
        # The paths of the modules that run, the outermost first. The second stack holds how often each was entered.
        self.running: list[tuple[str, nn.Module]] = []
        self.ended: set[str] = set()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(path))
            # `always_call` keeps the stack right if a forward raises an error that the model catches.
            module.register_forward_hook(self._leave(path), always_call=True)

    def _enter(self, path: str) -> Any:
        """Returns a forward pre-hook that notes the beginning of a module's call."""

        def hook(module: nn.Module, _args: Any) -> None:
            self.running.append((path, module))
            self.record.ran.add(path)
            if is_layer(module):
                self.time += 1
                self.record.layers.append(LayerCall(path, self.time))

        return hook

    def _leave(self, path: str) -> Any:
        """Returns a forward hook that notes the end of a module's call."""

        def hook(*_: Any) -> None:
            while self.running and self.running.pop()[0] != path:
                pass
            self.ended.add(path)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX or func is functional.scaled_dot_product_attention or func in PRODUCTS:
            self._note(func, [t for t in tensors_in((args, kwargs)) if isinstance(t, Tensor)])
        return func(*args, **kwargs)

    def _note(self, func: Any, operands: list[Tensor]) -> None:
        """Notes that attention may be computed in the module that runs."""
        if not operands or (func in SOFTMAX and operands[0].dim() < 3):
            return
        product = func in PRODUCTS
        if product:
            # A product with a weight is a linear layer. A product of a table and positions is a rotary embedding.
            operands = [t for t in operands if not isinstance(t, nn.Parameter)]
            if len(operands) < 2 or min(t.dim() for t in operands[:2]) < 3:
                return
        self.time += 1
        # A module without parameters, such as nn.Softmax, is a part of the attention around it.
        held = [(p, m) for p, m in self.running if any(True for _ in m.parameters())]
        if not held:
            return
        path = held[-1][0]
        seen = self.record.attended.setdefault(path, Attended(path, self.time, self.time))
        if path not in self.ended:
            seen.last = self.time
        shapes = [t.shape for t in operands[:2]]
        batch = max(shapes[0][0], 1)
        seen.heads |= {n for shape in shapes for n in shape[:-1]} | {
            n // other for shape in shapes for n in shape[:1] for other in (2, batch) if n % other == 0
        }
        scores = func in SOFTMAX and (seen.multiplied or operands[0].dim() > 3)
        seen.sure = seen.sure or scores or func is functional.scaled_dot_product_attention
        seen.multiplied = seen.multiplied or product
