"""Small models that look as if units could be removed, while no removal is exact."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.generic_models import Fused, Packed
from xprune.testing import perturb

DIM, HIDDEN, TOKENS = 16, 12, 5


def tokens(rows: int = 2) -> Tensor:
    """Returns noise, float32 (rows, TOKENS, DIM)."""
    return torch.randn(rows, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """An MLP that applies the function `mix` to its hidden features. Its layers do not show it."""

    def __init__(self, mix: Callable[[Tensor], Tensor], hidden: int = HIDDEN) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


class Surrounded(nn.Module):
    """A model with an MLP that can be pruned, and one more part, which the caller gives."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(DIM, DIM)
        self.sound = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
        self.part, self.head = part, nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.sound(x)
        return self.head((x + self.part(x)).mean(1))


def _fill(x: Tensor, few: Tensor) -> Tensor:
    """Adds the mean of some features to all features."""
    return x + few.mean(-1, keepdim=True)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda x: x / (1 + x.std(-1, keepdim=True)),
    "var": lambda x: x / (1 + x.var(-1, keepdim=True)),
    "norm": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "1-norm": lambda x: F.normalize(x, 1, -1),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "sum": lambda x: x / (9 + x.sum(-1, keepdim=True).tanh()),
    "prod": lambda x: x + x.prod(-1, keepdim=True),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "amin": lambda x: x - x.amin(-1, keepdim=True),
    "aminmax": lambda x: x - x.aminmax(dim=-1, keepdim=True).max,
    "max": lambda x: x - x.max(-1, keepdim=True).values,
    "median": lambda x: x - x.median(-1, keepdim=True).values,
    "quantile": lambda x: x - x.quantile(0.5, -1, keepdim=True),
    "topk": lambda x: _fill(x, x.topk(3, -1).values),
    "kthvalue": lambda x: x - x.kthvalue(3, -1, keepdim=True).values,
    "mode": lambda x: x - x.mode(-1, keepdim=True).values,
    "sort": lambda x: x.sort(-1).values,
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "roll": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "cummax": lambda x: x.cummax(-1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "diff": lambda x: F.pad(x.diff(dim=-1), (1, 0)),
    "fft": lambda x: torch.fft.fft(x).real,
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x), x.shape[-1]) + torch.fft.rfft(x).abs().mean(-1, keepdim=True),
    "shift": lambda x: F.pad(x[..., 1:], (0, 1)),
    "indices": lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)],
    "gather": lambda x: x.gather(-1, x.argsort(-1)),
    "index select": lambda x: x.index_select(-1, torch.arange(x.shape[-1] - 1, -1, -1)),
    "take along": lambda x: x.take_along_dim(x.argsort(-1), -1),
    "interleave": lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
    "shuffle": lambda x: F.channel_shuffle(x.transpose(1, 2)[..., None], 3)[..., 0].transpose(1, 2),
    "chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "unfold": lambda x: F.pad(x, (0, 2)).unfold(-1, 3, 1).mean(-1),
    "average pool": lambda x: F.avg_pool1d(x, 3, 1, 1),
    "max pool": lambda x: F.max_pool1d(x, 3, 1, 1),
    "local response": lambda x: F.local_response_norm(x.transpose(1, 2), 3, alpha=1.0).transpose(1, 2),
    "product with itself": lambda x: x @ x.transpose(1, 2) @ x,
    "einsum": lambda x: torch.einsum("btf,bsf,bsg->btg", x, x, x),
    "outer": lambda x: (x[..., None] * x[..., None, :]).amax(-1),
    "distances": lambda x: x * torch.cdist(x, x).mean(-1, keepdim=True),
    "cosine": lambda x: x * F.cosine_similarity(x, x.roll(1, 1), -1)[..., None],
    "a fixed matrix": lambda x: x @ torch.linspace(-1, 1, HIDDEN * HIDDEN).view(HIDDEN, HIDDEN),
    "a fixed vector": lambda x: x * torch.linspace(1, 2, HIDDEN),
    "positions of features": lambda x: x + torch.arange(x.shape[-1]) / 10,
    "number of features": lambda x: x * x.shape[-1] ** -0.5,
    "tril": lambda x: x.tril(),
    "rot": lambda x: x.rot90(2, (1, 2)),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "glu of both": lambda x: F.glu(torch.cat([x, x.flip(-1)], -1), -1),
}
"""Name -> an operation that mixes features, so no cut of the features is exact."""

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu squared": lambda x: F.relu(x).square(),
    "gate by itself": lambda x: x * x.sigmoid(),
    "clamp": lambda x: x.clamp(-1, 1),
    "where": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "mish and tanh": lambda x: F.mish(x) + x.tanh(),
    "through a map": lambda x: x.transpose(1, 2).unflatten(-1, (1, -1)).relu().flatten(-2).transpose(1, 2),
}
"""Name -> an operation on each feature separately, so every cut is exact."""


class RawNorm(nn.Module):
    """A norm over the inputs of the model, which have no producer."""

    def __init__(self, norm: nn.Module, plain: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(norm, nn.Linear(DIM, DIM))
        self.mlp = nn.Identity() if plain else nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(0, 1)).view(x.shape)
        return self.head((x + self.mlp(x)).mean(1))


class TwoOutputs(nn.Module):
    """Returns its output and its values, for the next attention to add. T5 passes its position bias like this."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(DIM, 3 * 24), nn.Linear(24, DIM)

    def forward(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        v = v if values is None else v + values
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), v


class HandedOn(nn.Module):
    """Two blocks. The first attention passes its values to the second. The MLPs can be pruned."""

    def __init__(self, handed: bool = True) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(TwoOutputs() for _ in range(2))
        self.mlps, self.handed = nn.ModuleList(Packed() for _ in range(2)), handed
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = None
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            made, given = attention(x, values)
            values = given if self.handed else None
            x = x + made
            x = x + mlp(x)
        return self.head(x.mean(1))


class FrozenNorm(nn.Module):
    """A batch norm with buffers and no parameters, as in backbones for detection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean"):
            self.register_buffer(name, torch.randn(features, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.weight + self.bias


class Reshaped(nn.Module):
    """An MLP that reshapes to a fixed number of hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).reshape(-1, TOKENS, HIDDEN).relu())


class TiedHead(nn.Module):
    """The head of a masked language model. The decoder has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, DIM)
        self.block = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))
        self.predictions = nn.ModuleDict(
            {"dense": nn.Linear(DIM, DIM), "norm": nn.LayerNorm(DIM), "decoder": nn.Linear(DIM, 11)}
        )
        self.predictions["decoder"].weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.block(x.mean(1, keepdim=True))
        return self.predictions["decoder"](self.predictions["norm"](F.gelu(self.predictions["dense"](x))))


class MaskedHeads(nn.Module):
    """Takes an attention mask for each head and sample as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class Silent(Exception):
    """An error without a message."""


class Particular(nn.Module):
    """Runs only with all its hidden features. With fewer, it raises an error without a message."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Fused()
        self.num_heads, self.first, self.last = 4, nn.Linear(DIM, 24), nn.Linear(24, DIM)

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        if made.shape[-1] != 24:
            raise Silent
        return self.last(made)


class Hoarding(nn.Module):
    """An MLP that keeps its hidden features in a list, where another module reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.kept = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        self.kept[0] = hidden
        return self.last(hidden)


class Hoard(nn.Module):
    """Reads the hidden features that another module has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.keeper, self.reader = Hoarding(), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        made = self.keeper(x)
        return made + self.reader(self.keeper.kept[0]) + self.keeper.kept[0].std(-1, keepdim=True)


class Backwards(nn.Module):
    """Two consumers of one hidden layer. The second gets the features in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden) + self.other(hidden.flip(-1))


class Asleep(nn.Module):
    """An MLP that mixes its features, behind a layer scale of 0, as at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.scale = Mixer(lambda x: x - x.amax(-1, keepdim=True)), nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.mixer(x)


class AsleepInside(Asleep):
    """The same with an MLP whose output depends on the number of its hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Counting()


class Counting(nn.Module):
    """Multiplies its output by the number of its hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden) * hidden.shape[-1]


class Bare(nn.Module):
    """Multiplies its hidden features with a weight directly, and also calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden) + F.linear(hidden, self.last.weight)


class Reused(nn.Module):
    """Calls one layer twice, so its hidden features are also its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


class Growing(nn.Module):
    """Counts its calls, and doubles every second output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(x).relu()) * (1 + self.calls % 2)


TRICKY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen batch norm": (
        lambda: Surrounded(nn.Sequential(nn.Linear(DIM, HIDDEN), FrozenNorm(HIDDEN), nn.Linear(HIDDEN, DIM))),
        "part",
    ),
    "written-down reshape": (lambda: Surrounded(Reshaped()), "part"),
    "silent error": (lambda: Surrounded(Particular()), "part"),
    "hidden features kept for another": (lambda: Surrounded(Hoard()), "part"),
    "two outputs in two orders": (lambda: Surrounded(Backwards()), "part"),
    "asleep": (lambda: Surrounded(Asleep()), "part"),
    "asleep inside": (lambda: Surrounded(AsleepInside()), "part"),
    "counting features": (lambda: Surrounded(Counting()), "part"),
    "a bare product": (lambda: Surrounded(Bare()), "part"),
    "one layer twice": (lambda: Surrounded(Reused()), ""),
}
"""Name -> (a function that builds the model, a path). At or below the path there is a reason and no site.

The path is "" if nothing in the model looks like a site.
"""


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns the model with random weights, in eval mode. Parameters that are zero stay zero."""
    torch.manual_seed(0)
    model = make()
    zero = [p for p in model.parameters() if not p.any()]
    perturb(model)
    with torch.no_grad():
        for parameter in zero:
            parameter.zero_()
    return model
