"""Tests that the sample axis is found by removing a sample, in models that take the batch or the tokens first."""

import pytest
import torch
from torch import nn

from tests.support.sequence_models import DIM, Classifier, Translator, Words, turned
from xprune.modules.samples import Samples, find_samples


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IDS = torch.tensor([[1, 4, 2, 7, 7, 3], [5, 0, 9, 1, 2, 2]])
CASES = {
    "a classifier": (Classifier, noise(2, 6, DIM)),
    "tokens a multiple of the batch": (Classifier, noise(3, 6, DIM)),
    "as many tokens as samples": (Classifier, noise(4, 4, DIM)),
    "one sample": (Classifier, noise(1, 6, DIM)),
    "a class for each token": (lambda first: Classifier(first, pool=False), noise(2, 6, DIM)),
    "a class for each of as many tokens": (lambda first: Classifier(first, pool=False), noise(4, 4, DIM)),
    "padded": (Classifier, (noise(2, 6, DIM), torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6]).bool())),
    "padded, as many tokens as samples": (Classifier, (noise(4, 4, DIM), torch.eye(4).bool())),
    "two sequences": (Translator, (noise(2, 6, DIM), noise(2, 4, DIM))),
    "two sequences of one length": (Translator, (noise(2, 6, DIM), noise(2, 6, DIM))),
    "words": (Words, IDS),
    "one row of words": (Words, IDS[:1]),
    "one word over and over": (Words, torch.ones(2, 6).long()),
}


class Similar(nn.Module):
    """Returns a table of the similarities of all samples, and then the features of each token, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, x):
        x = self.layer(x).cumsum(1)
        return x[:, -1] @ x[:, -1].T, x.mean(1), x


@pytest.mark.parametrize("shape", [(3, 6, DIM), (4, 4, DIM)])
def test_the_output_that_shows_the_axis_is_compared(shape):
    assert (find_samples(Similar(), noise(*shape)).axis, shape[0]) == (0, find_samples(Similar(), noise(*shape)).count)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_axis_is_found(name, batch_first):
    make, inputs = CASES[name]
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    found = find_samples(make(batch_first), inputs if batch_first else turned(inputs), ["head"])
    assert (found.axis, found.count) == (0 if batch_first else 1, len(first))
    assert found.layers["head"] == (0 if batch_first or name in POOLED else 1)


POOLED = [name for name, (make, _) in CASES.items() if make is Classifier]


class Folded(nn.Module):
    """Folds samples and tokens into one axis, in the order of the input."""

    def __init__(self):
        super().__init__()
        self.mix, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        tokens = 1 if self.tokens_second else 0
        x = x + self.mix(x).mean(tokens, keepdim=True)
        return self.layer(x.flatten(0, 1)).view(x.shape).mean(tokens)


@pytest.mark.parametrize(("tokens_second", "axis"), [(True, 0), (False, -1)])
def test_rows_that_are_folded_are_told_apart_only_where_samples_come_first(tokens_second, axis):
    model = Folded()
    model.tokens_second = tokens_second
    assert find_samples(model, noise(3, 3, 4), ["layer"]).layers["layer"] == axis


class Mixed(nn.Module):
    """Mixes samples and tokens."""

    def forward(self, x):
        return x - x.mean((0, 1), keepdim=True)


def test_what_cannot_be_told_is_not_guessed():
    assert find_samples(Mixed(), noise(3, 4, 5)) is None
    assert find_samples(Mixed(), noise(3, 4, 5), batch_axis=1).count == 4


def test_a_forward_that_fails_tells_nothing():
    assert find_samples(nn.Linear(3, 4), noise(2, 5)) is None


def test_shared_tensors_go_along_whole():
    mask, scale = torch.zeros(6, 6), torch.tensor(2.0)
    taken = Samples(0, 2).take({"x": noise(2, 6, 3), "mask": mask, "scale": scale, "lengths": torch.arange(2)}, [1])
    assert taken["x"].shape == (1, 6, 3) and taken["mask"] is mask and taken["scale"] is scale
    assert taken["lengths"].tolist() == [1]
    x, padding = Samples(1, 2).take((noise(6, 2, 3), torch.zeros(2, 6)), [0])
    assert x.shape == (6, 1, 3) and padding.shape == (1, 6)
