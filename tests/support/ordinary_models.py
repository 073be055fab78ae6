"""A small transformer of plain torch layers, whose parts tests replace, wrap or convert."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, CLASSES = 8, 3


class Mlp(nn.Module):
    """An MLP with a hidden layer."""

    def __init__(self, dim: int = DIM, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """An attention and an MLP."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True), Mlp(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    """One block and a head. `around` may be a function that calls the block, such as one that checkpoints it."""

    def __init__(self, around=None) -> None:
        super().__init__()
        self.block, self.head, self.around = Block(), nn.Linear(DIM, CLASSES), around

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.around(self.block, x) if self.around else self.block(x, mask)
        return self.head(x.mean(1))


def net(around=None) -> Net:
    """Returns the network with the same random weights at each call."""
    torch.manual_seed(0)
    return Net(around)


def tokens(rows: int = 6, length: int = 5, seed: int = 1) -> Tensor:
    """Returns noise, float32 (rows, length, DIM)."""
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 6) -> Tensor:
    """Returns the class of each row, int64 (rows,)."""
    return torch.arange(rows) % CLASSES


def pairs(rows: int = 12, batch: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Returns batches (tokens, labels)."""
    return list(zip(tokens(rows).split(batch), labels(rows).split(batch), strict=True))
