"""Tests that inputs of every form give what the same tensors give alone, in every stage.

Each model takes its inputs in another form, and computes what the plain network computes.
"""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import xprune
from tests.support.ordinary_models import DIM, labels, net, tokens
from xprune.modules.calls import map_tensors, pick_samples, shareable, tensors_in

ROWS = 4


class Takes(nn.Module):
    """The plain network, called with what `unpack` makes of the arguments."""

    def __init__(self, unpack):
        super().__init__()
        self.net, self.unpack = net(), unpack

    def forward(self, *args, **kwargs):
        return self.net(*self.unpack(*args, **kwargs))


class TakesOne(Takes):
    """The same for a model with one argument."""

    def forward(self, batch):
        return self.net(*self.unpack(batch))


Pair = namedtuple("Pair", ["x", "mask"])


@dataclass
class Record:
    """Inputs as a dataclass."""

    x: Any
    mask: Any = None
    name: str = "text"


@dataclass(frozen=True)
class Frozen:
    """Inputs as a dataclass that cannot be changed."""

    x: Any
    mask: Any = None


class Output(OrderedDict):
    """Inputs as a mapping whose entries are attributes too, in the form of the outputs of Hugging Face models."""

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def output(**entries):
    found = Output()
    for name, value in entries.items():
        found[name] = value
    return found


def of_record(record):
    return record.x, record.mask


def plain_check(x, scale, flag=True, mode="mean", extra=None):
    """The arguments that are no tensors arrive as they were given."""
    assert flag is True and mode == "mean" and extra is None
    return (x * scale,)


def causal(length):
    return torch.ones(length, length).triu(1).bool()


def forms(length):
    """Name -> (model, inputs, the plain inputs)."""
    x, mask = tokens(ROWS, length), causal(length)
    half = torch.tensor(0.5)
    return {
        "a tuple": (Takes(lambda x, mask: (x, mask)), (x, mask), (x, mask)),
        "a shared mask first": (Takes(lambda mask, x: (x, mask)), (mask, x), (x, mask)),
        "a shared mask first, by name": (Takes(lambda mask, x: (x, mask)), {"mask": mask, "x": x}, (x, mask)),
        "a mask that is None": (Takes(lambda x, mask: (x, mask)), {"x": x, "mask": None}, (x,)),
        "shared positions": (
            Takes(lambda x, at: (x + at[:, None],)),
            (x, torch.linspace(0, 1, length)),
            (x + torch.linspace(0, 1, length)[:, None],),
        ),
        "a shared table": (
            Takes(lambda x, table: (x + table.mean(0),)),
            (x, tokens(length, length)),
            (x + tokens(length, length).mean(0),),
        ),
        "a 0-dim tensor": (Takes(plain_check), (x, half), (x * 0.5,)),
        "a 0-dim tensor first": (Takes(plain_check), {"scale": half, "mode": "mean", "x": x}, (x * 0.5,)),
        "numbers and strings": (Takes(plain_check), (x, 0.5, True, "mean", None), (x * 0.5,)),
        "nested": (
            Takes(lambda d: (d["a"][0]["x"] * d["b"],)),
            ({"a": [{"x": x}], "b": half, "c": (None, "text", 3)},),
            (x * 0.5,),
        ),
        "a list of samples": (TakesOne(lambda images: (torch.stack(images),)), list(x), (x,)),
        "a list of samples and a number": (
            Takes(lambda images, scale: (torch.stack(images) * scale,)),
            (list(x), half),
            (x * 0.5,),
        ),
        "a list of images of different sizes": (
            TakesOne(lambda images: (pad_sequence(images, batch_first=True),)),
            [image[: length - index] for index, image in enumerate(x)] if length > ROWS else list(x),
            (pad_sequence([i[: length - n] for n, i in enumerate(x)], batch_first=True) if length > ROWS else x,),
        ),
        "a named tuple": (Takes(lambda x, mask: (x, mask)), Pair(x, mask), (x, mask)),
        "a named tuple as one argument": (TakesOne(of_record), Pair(x, mask), (x, mask)),
        "a dataclass": (TakesOne(of_record), Record(x, mask), (x, mask)),
        "a frozen dataclass": (TakesOne(of_record), (Frozen(x),), (x,)),
        "an output of a model": (
            Takes(lambda features: (features.last_hidden_state,)),
            {"features": output(last_hidden_state=x, pooled=None)},
            (x,),
        ),
        "a mapping of another class": (Takes(lambda x, mask: (x, mask)), UserDict(x=x, mask=mask), (x, mask)),
    }


def scores(model, inputs, criterion):
    sites = xprune.find_sites(model, inputs)
    found = xprune.score(model, sites, [(inputs, labels(ROWS))], criterion)
    return [site.batch for site in sites], found.values


# A batch of as many samples as tokens has masks whose shape does not show whether samples share them.
@pytest.mark.parametrize("length", [6, ROWS])
@pytest.mark.parametrize("name", forms(6))
def test_every_form_gives_what_the_tensors_give(name, length):
    model, inputs, plain = forms(length)[name]
    dense, data, plain_data = net(), [(inputs, labels(ROWS))], [(plain, labels(ROWS))]
    assert xprune.count_macs(model, inputs) == xprune.count_macs(dense, plain)
    assert xprune.evaluate(model, data).loss == pytest.approx(xprune.evaluate(dense, plain_data).loss)
    (axes, found), (_, expected) = scores(model, inputs, "taylor"), scores(dense, plain, "taylor")
    assert axes == [0, 0]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    # A whole run takes long, so only the harder length is run.
    if length != ROWS:
        return
    settings, budget = xprune.Finetune(epochs=1), xprune.Budget(params=0.8)
    result = xprune.Pruner(model, "taylor", budget, finetune=settings).run(data, data)
    assert result.metrics["finetuned"].params <= 0.8 * result.metrics["dense"].params
    assert result.metrics["dense"].latency_ms > 0


def test_containers_keep_their_classes():
    x = torch.ones(2)
    for value in (output(a=x, b=None), UserDict(a=x), Record(x), Frozen((x, "text")), OrderedDict(a=[x])):
        doubled = map_tensors(value, lambda tensor: 2 * tensor)
        assert type(doubled) is type(value)
        assert torch.equal(tensors_in(doubled)[0], 2 * x) and torch.equal(tensors_in(value)[0], x)
    assert map_tensors(output(a=x), lambda tensor: 2 * tensor).a.sum() == 4


def test_a_dataclass_without_tensors_is_the_same_object():
    config = Record("nothing", mask=3)
    assert map_tensors((config,), lambda tensor: tensor)[0] is config
    config.mask = config
    assert tensors_in(config) == [] and pick_samples(config, [0], 2) is config


def test_what_samples_may_share():
    x, mask, flat = torch.ones(4, 4, DIM), torch.ones(4, 4), torch.ones(4)
    assert shareable((x, mask), 4) == [{id(mask)}]
    assert shareable((mask, x), 4) == [{id(mask)}]
    assert shareable((x, mask, flat), 4) == [{id(mask)}, {id(mask), id(flat)}]
    assert shareable(mask, 4) == shareable((x, torch.ones(5, 5)), 4) == []
    kept = pick_samples((x, mask), [0, 1], 4, shared={id(mask)})
    assert kept[0].shape == (2, 4, DIM) and kept[1] is mask
