"""Small models with one hidden layer to cut. In some the cut is exact, in others it changes an output or a state."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.plan import Plan
from xprune.core.site import Cut, Site

WIDTH, HIDDEN = 8, 6
Finish = Callable[["Hidden", Tensor, Tensor, Tensor], Any]
"""A function of (model, input, hidden features, output). It returns the output of the model."""


class Hidden(nn.Module):
    """Two layers with a ReLU. `finish` makes the output. If it uses the hidden features, a cut is wrong."""

    def __init__(self, finish: Finish) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("seen", torch.zeros(1))
        self.before: Any = None
        # Neither a parameter nor a buffer, so state_dict does not show it.
        self.plain = torch.zeros(1)
        self.kept = SimpleNamespace(state={"last": torch.zeros(1)})
        self.finish = finish

    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.fc1(self.stem(x)))
        return self.finish(self, x, hidden, self.fc2(hidden))


SITE = Site(
    name="hidden",
    kind="neuron",
    size=HIDDEN,
    width=1,
    consumers=("fc2",),
    cuts=(Cut("fc1.weight", 0), Cut("fc1.bias", 0), Cut("fc2.weight", 1)),
)
PLAN = Plan((SITE,), ((0, 2, 5),))


def build(finish: Finish) -> Hidden:
    """Returns a model with the same random weights for each `finish`. Every weight changes the output."""
    torch.manual_seed(0)
    return Hidden(finish).eval()


def inputs() -> Tensor:
    """Returns float32 (4, WIDTH)."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def _mixed(model: Hidden, hidden: Tensor) -> Tensor:
    """Applies fc2 to hidden features in another order. It is wrong when some are removed."""
    return F.linear(hidden.roll(1, -1), model.fc2.weight, model.fc2.bias)


@dataclass
class Answer:
    """The output of some models."""

    logits: Tensor
    size: Any


def _remembers(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    before, model.before = model.before, hidden.mean()
    return y if before is None else y + before


def _appends(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    model.before = model.before if model.before is not None else []
    model.before.append(hidden.mean())
    return y + sum(model.before[:-1])


def _replaces(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    y = y + model.kept.state["last"]
    model.kept.state["last"] = hidden.mean()
    return y


def _writes(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    y = y + model.plain
    model.plain.add_(hidden.mean())
    return y


def _counts_in_a_buffer(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    y = y + model.seen
    model.seen += hidden.mean()
    return y


def _masked(y: Tensor, value: float) -> Tensor:
    return y.masked_fill(torch.arange(WIDTH) >= WIDTH - 2, value)


WRONG: dict[str, Finish] = {
    "mixed": lambda m, x, h, y: _mixed(m, h) + y,
    "second output": lambda m, x, h, y: (y, h.mean(-1)),
    "tiny output": lambda m, x, h, y: 1e-5 * (y + _mixed(m, h)),
    "tiny part of a tiny output": lambda m, x, h, y: 1e-7 * y + 1e-9 * _mixed(m, h),
    "beside a large output": lambda m, x, h, y: {"logits": y + 0.05 * h.mean(-1, True), "hidden": 1e4 * y},
    "beside a mask of -1e9": lambda m, x, h, y: _masked(y + h.mean(-1, True), -1e9),
    "beside the least number": lambda m, x, h, y: _masked(y + h.mean(-1, True), torch.finfo(y.dtype).min),
    "whole numbers": lambda m, x, h, y: (y, (h > 0.1).sum(-1)),
    "booleans": lambda m, x, h, y: {"y": y, "large": h.mean(-1) > 0.1},
    "infinities": lambda m, x, h, y: y.masked_fill(h.mean(-1, True) > 0.1, -torch.inf),
    "a number": lambda m, x, h, y: (y, h.mean().item()),
    "complex numbers": lambda m, x, h, y: (y, torch.fft.fft(h.mean(-1))),
    "a dataclass": lambda m, x, h, y: Answer(y, h.norm()),
    "an object": lambda m, x, h, y: [y, SimpleNamespace(inner={"size": [h.norm()]})],
    "a sparse tensor": lambda m, x, h, y: (y, (h.mean(-1, True) * torch.eye(4)).to_sparse()),
    "remembered": _remembers,
    "remembered in a list": _appends,
    "remembered in a buffer": _counts_in_a_buffer,
    "remembered in an object": _replaces,
    "remembered in a plain tensor": _writes,
    "written into the input": lambda m, x, h, y: (y, x.add_(h.mean())),
    "a nested tensor": lambda m, x, h, y: torch.nested.as_nested_tensor([y + h.mean(), y[:1]], layout=torch.strided),
    "a distribution": lambda m, x, h, y: torch.distributions.Normal(y, 1 + h.mean(-1, True)),
    "half precision": lambda m, x, h, y: (y, h.mean(-1).half()),
    "a shared tensor": lambda m, x, h, y: y + m.fc1.weight.mean(),
    "a shape": lambda m, x, h, y: y * h.shape[-1],
    "another shape": lambda m, x, h, y: (y, h),
    "a failure": lambda m, x, h, y: h.view(4, 2, 3).sum() + y,
    "NaN": lambda m, x, h, y: y + (h.shape[-1] - 3.0) / (h.shape[-1] - 3.0),
    "a branch": lambda m, x, h, y: y if h.sum() > 3 else -y,
}
"""Name -> a model in which no cut of the hidden layer is exact."""


def _counts(model: Hidden, x: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
    model.seen += 1
    model.before = (model.before or 0) + 1
    return y + model.seen


HONEST: dict[str, Finish] = {
    "plain": lambda m, x, h, y: y,
    "tiny": lambda m, x, h, y: 1e-6 * y,
    "very tiny": lambda m, x, h, y: 1e-20 * y,
    "left of a cancellation": lambda m, x, h, y: (y + 1e4) - 1e4,
    "nothing but rounding": lambda m, x, h, y: (y, y.softmax(-1).sum(-1) - 1),
    "zeros": lambda m, x, h, y: (y, 0 * y),
    "several sizes": lambda m, x, h, y: {"logits": 1e-5 * y, "hidden": [1e6 * y, y]},
    "masks": lambda m, x, h, y: (_masked(y, -torch.inf), _masked(y, -1e9), _masked(y, torch.finfo(y.dtype).min)),
    "whole numbers": lambda m, x, h, y: (y.argmax(-1), y > 0, None, "text", 3),
    "an empty output": lambda m, x, h, y: (y, y[:0]),
    "half precision inside": lambda m, x, h, y: (y.to(torch.bfloat16) * 3).float(),
    "counts its calls": _counts,
    "noise of its own": lambda m, x, h, y: y + torch.rand(len(x), 1),
    "noise of numpy": lambda m, x, h, y: y + np.random.rand(),
    "a random mask": lambda m, x, h, y: y.gather(0, torch.rand(4, WIDTH).argsort(0)),
}
"""Name -> a model in which every cut of the hidden layer is exact."""

RANDOM: dict[str, tuple[Finish, str]] = {
    "dropout that is on": (
        lambda m, x, h, y: m.fc2(F.dropout(h, 0.5, training=True)),
        "its forward draws random numbers",
    ),
    "noise on the hidden features": (
        lambda m, x, h, y: m.fc2(h + torch.rand_like(h)),
        "its forward draws random numbers",
    ),
    "noise that no seed settles": (
        lambda m, x, h, y: y + float(np.random.default_rng().normal()),
        "its forward gives other outputs at each call",
    ),
    "NaN outputs": (lambda m, x, h, y: y * float("nan"), "the dense model itself gives NaN on the example inputs"),
    "NaN in one output": (
        lambda m, x, h, y: {"y": y, "bad": (y - y) / (y - y)},
        r"the dense model itself gives NaN in its output \['bad'\]",
    ),
    "nothing to compare": (lambda m, x, h, y: "text", "returns no tensor that could be compared"),
}
"""Name -> a model whose outputs cannot be compared, and the reason in the error. The reason is no site."""
