"""Sequence models in pairs: one takes the batch first, its twin takes the tokens first, with the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from xprune.testing import perturb

DIM, CLASSES = 16, 3


class Classifier(nn.Module):
    """An nn.TransformerEncoder and a classifier. It takes (batch, tokens, DIM), or (tokens, batch, DIM)."""

    def __init__(self, batch_first: bool, pool: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(DIM, 4, 12, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.tokens, self.pool = nn.Linear(DIM, CLASSES), 1 if batch_first else 0, pool
        perturb(self)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.mean(self.tokens) if self.pool else x)


class Translator(nn.Module):
    """An nn.Transformer that gives a class for each target token."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Transformer(DIM, 4, 1, 1, 12, batch_first=batch_first)
        self.head = nn.Linear(DIM, CLASSES)
        perturb(self)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target))


class Words(nn.Module):
    """A language model: an encoder with a causal mask that predicts the next word for each token."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(DIM, 4, 12, batch_first=batch_first)
        self.embed, self.encoder = nn.Embedding(11, DIM), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.tokens = nn.Linear(DIM, 11), 1 if batch_first else 0
        perturb(self)

    def forward(self, ids: Tensor) -> Tensor:
        ahead = nn.Transformer.generate_square_subsequent_mask(ids.shape[self.tokens], device=ids.device)
        return self.head(self.encoder(self.embed(ids), mask=ahead, is_causal=True))


def turned(inputs: Any) -> Any:
    """Turns the inputs of a batch-first model into those of its twin.

    Samples and tokens change places. Boolean masks stay (batch, tokens), as nn.Transformer takes them in both cases.
    """
    if isinstance(inputs, tuple):
        return tuple(x if x.dtype == torch.bool else x.transpose(0, 1) for x in inputs)
    return inputs.transpose(0, 1)
