"""Counts the attentions and MLPs that a model uses, without xprune.

The result is what `benchmarks.prunability` compares the sites of xprune with. So this module imports nothing of xprune.

The model runs once, and every function of torch that it calls is noted, together with the module that calls it: the
innermost module whose forward is running and that has parameters.

- **An attention** is a module that calls `scaled_dot_product_attention` or `multi_head_attention_forward`, or that
  calls a softmax and at least one product of two tensors that are no weights. The number of heads is read from the
  scores, or from an attribute such as `num_heads`. Attentions with one head are listed separately. A module that calls
  `exp` and a sum over the edges of a graph is an attention too.
- **Another mixer** is a module without a softmax that computes at least two products of two tensors that are no weights
  (linear attentions, state space models), or with a softmax and `grid_sample` (deformable attentions). They are listed,
  and not counted.
- **An MLP** is a pair of linear layers: the output of the first goes through an elementwise nonlinearity into the
  second. A product with the output of another linear layer may lie between them, and so may reshapes and dropout.
  Convolutions with a kernel of 1 count as linear layers. Two pairs with the same second layer are one MLP.
- **Experts** are one MLP for each module that holds two or more three-dimensional weights itself.

Limits: a layer that does not run in this forward is not counted, such as an expert that no token chose. A layer between
the two layers of an MLP that is neither elementwise nor a reshape, such as a norm or a depthwise convolution, hides the
MLP. Small pairs that nobody would prune are counted too: a classifier with a hidden layer, squeeze-and-excitation, the
MLP of a position embedding. An attention that computes its softmax in a parent module is noted at the parent.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakIdKeyDictionary

ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
SCATTER = {"scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce", "scatter_reduce_"}
PRODUCTS = {"matmul", "bmm", "einsum", "__matmul__", "baddbmm", "__rmatmul__"}
NONLINEAR = {
    "gelu", "relu", "relu_", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "hardswish", "mish", "softplus", "relu6",
    "celu", "selu", "hardsigmoid", "hardtanh", "clamp", "erf", "square", "pow", "exp", "logsigmoid", "prelu",
    "__pow__", "clamp_min", "silu_", "sigmoid_", "tanh_", "gelu_", "rrelu", "glu",
}  # fmt: skip
KEEPING = {
    "mul", "__mul__", "__rmul__", "__imul__", "mul_", "add", "__add__", "__radd__", "__iadd__", "sub", "__sub__",
    "__rsub__", "div", "__truediv__", "neg", "dropout", "dropout_", "view", "reshape", "transpose", "permute",
    "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "chunk", "split", "to", "type", "float",
    "__getitem__",
    "view_as", "movedim", "type_as", "half", "clone", "tensor_split", "alpha_dropout", "feature_alpha_dropout", "where",
    "masked_fill", "masked_fill_", "rearrange", "unbind", "detach", "reshape_as", "swapaxes", "T", "mT",
}  # fmt: skip
JOINING = {"mul", "__mul__", "__rmul__", "__imul__", "mul_"}
HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "heads", "nhead", "num_query_heads", "n_local_heads",
         "h", "attention_heads", "encoder_attention_heads", "num_q_heads")  # fmt: skip


@dataclass
class Expected:
    """What a forward of a model used.

    Args:
        attentions: Path of a module -> number of heads, 0 if unknown.
        single: Paths of attentions with one head.
        others: Paths of other mixers -> what they call.
        mlps: Path of the second layer -> paths of the first layers.
        experts: Paths of modules with experts.
    """

    attentions: dict[str, int] = field(default_factory=dict)
    single: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    mlps: dict[str, list[str]] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)


class _Noting(TorchFunctionMode):
    """Notes which module calls which function, and which outputs of linear layers reach which linear layers."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.names = {id(m): name for name, m in model.named_modules()}
        self.has = {id(m): any(True for _ in m.parameters()) for m in model.modules()}
        self.owners = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False)}
        self.weights = {p.data_ptr(): n.rpartition(".")[0] for n, p in model.named_parameters() if p.dim() >= 2}
        self.stack: list[nn.Module] = []
        self.calls: dict[str, dict[str, int]] = {}
        self.heads: dict[str, int] = {}
        # Tensor -> (paths of linear layers, whether a nonlinearity came after them).
        self.tags: Any = WeakIdKeyDictionary()
        self.mlps: dict[str, set[str]] = {}
        self.ran: set[str] = set()

    def where(self) -> str:
        """Returns the path of the innermost running module with parameters."""
        return next((self.names[id(m)] for m in reversed(self.stack) if self.has.get(id(m))), "")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "") or ""
        if name == "__get__":
            name = (resolve_name(func) or "").split(".")[-2] if "." in (resolve_name(func) or "") else ""
        # A function that is called in a way that we do not know is not noted.
        with suppress(Exception):
            self._note(name, args, kwargs or {}, out)
        return out

    def _note(self, name: str, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        flat = [t for t in _tensors((args, tuple(kwargs.values())))]
        if name in ATTENTION:
            self._count(name)
            if name == "multi_head_attention_forward":
                self._heads(args[4] if len(args) > 4 else kwargs["num_heads"])
            else:
                q = args[0] if args else kwargs["query"]
                self._heads(q.shape[-3] if q.dim() >= 4 else 0)
            return
        if name == "softmax":
            x = flat[0]
            if x.dim() >= 3:
                self._count(name)
                if x.dim() == 4:
                    self._heads(x.shape[1])
                # Heads may lie along the axis of the samples.
                elif x.dim() == 3 and x.shape[0] % self.samples == 0:
                    self._heads(x.shape[0] // self.samples)
            return
        if name == "grid_sample" or name == "grid_sampler":
            self._count("grid_sample")
        if name == "exp" or name in SCATTER:
            self._count("scatter" if name in SCATTER else name)
        if name in PRODUCTS and len(flat) >= 2 and not any(self._is_weight(t) or t.dim() < 3 for t in flat[:2]):
            self._count("product")
        self._tag(name, args, kwargs, flat, out)

    def _is_weight(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or tensor.data_ptr() in self.weights

    def _count(self, name: str) -> None:
        mine = self.calls.setdefault(self.where(), {})
        mine[name] = mine.get(name, 0) + 1

    def _heads(self, count: int) -> None:
        self.heads.setdefault(self.where(), int(count))

    def _linear(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Returns (input, weight) if this is a call of a linear layer."""
        if name == "linear":
            return args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
        if name == "addmm":
            return args[1], args[2]
        if name in ("matmul", "__matmul__") and isinstance(args[1], nn.Parameter):
            return args[0], args[1]
        if name in ("conv1d", "conv2d"):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            if weight.shape[2:].numel() == 1 and groups == 1:
                return args[0], weight
        return None

    def _tag(self, name: str, args: Any, kwargs: Mapping[str, Any], flat: list[Tensor], out: Any) -> None:
        linear = self._linear(name, args, kwargs)
        if linear is not None:
            x, weight = linear
            owner = self.owners.get(id(weight), self.weights.get(weight.data_ptr(), self.where()))
            self.ran.add(owner)
            sources, active = self.tags.get(x, (frozenset(), False))
            if sources and active and owner not in sources:
                self.mlps.setdefault(owner, set()).update(sources)
            self.tags[out] = (frozenset([owner]), False)
            return
        if name not in KEEPING and name not in NONLINEAR:
            return
        features = [t for t in flat if not isinstance(t, nn.Parameter) and t.dim() >= 2]
        tagged = [self.tags[t] for t in features if t in self.tags]
        if not tagged:
            return
        # A product with features that no linear layer made is a gate on something else, such as that of an attention.
        if name in JOINING and len(features) > 1 and len(tagged) < len(features):
            widths = [t.shape[-1] for t in features if t not in self.tags]
            if any(width > 1 for width in widths):
                return
        # A residual sum ends an MLP.
        if name in ("add", "__add__", "__radd__", "__iadd__", "sub", "__sub__") and len(features) > 1:
            if len(tagged) < len(features):
                return
            if len({tag[0] for tag in tagged}) > 1:
                return
        tag = (frozenset().union(*(t[0] for t in tagged)), any(t[1] for t in tagged) or name in NONLINEAR)
        for each in _tensors(out):
            self.tags[each] = tag


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in _tensors(each)]
    return []


def expected_units(model: nn.Module, inputs: Any) -> Expected:
    """Runs a model once and returns what it uses.

    Args:
        model: The model, in eval mode.
        inputs: A dict of keyword arguments, a tuple of arguments, or one argument.
    """
    first = next(
        (t for t in _tensors(list(inputs.values()) if isinstance(inputs, Mapping) else inputs) if t.dim()), None
    )
    noting = _Noting(model, 1 if first is None else len(first))
    before = hooks.register_module_forward_pre_hook(lambda m, _: noting.stack.append(m))
    after = hooks.register_module_forward_hook(lambda m, _, __: noting.stack.pop() and None, always_call=True)
    try:
        with torch.no_grad(), _slow_path(), noting:
            torch.manual_seed(0)
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        before.remove()
        after.remove()
    return _sorted_out(model, noting)


@contextmanager
def _slow_path() -> Iterator[None]:
    """Switches off the fast path of nn.TransformerEncoder, which computes a whole block in one call."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _sorted_out(model: nn.Module, noting: _Noting) -> Expected:
    found = Expected()
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for path in sorted(noting.calls, key=lambda p: order.get(p, 0)):
        calls = noting.calls[path]
        soft, products = calls.get("softmax", 0), calls.get("product", 0)
        over_edges = calls.get("exp") and calls.get("scatter") and not products
        if any(name in calls for name in ATTENTION) or (soft and products) or over_edges:
            heads = _attribute(model.get_submodule(path)) or noting.heads.get(path, 0)
            if heads == 1:
                found.single.append(path)
            else:
                found.attentions[path] = heads
        elif soft and calls.get("grid_sample"):
            found.others[path] = "deformable"
        elif products >= 2:
            found.others[path] = "products without a softmax"
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        named = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
        if len(own) >= 2 and any("down" in n or "w2" in n or "output" in n or "fc2" in n for n in named):
            found.experts.append(path)
    for path, sources in sorted(noting.mlps.items(), key=lambda item: order.get(item[0], 0)):
        if path not in found.experts and not path.endswith(tuple(f".{e}" for e in found.experts)):
            found.mlps[path] = sorted(sources - set(found.experts)) or sorted(sources)
    return found


def _attribute(module: nn.Module) -> int:
    """Returns the number of heads that an attribute of a module gives, or 0."""
    for name in HEADS:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
