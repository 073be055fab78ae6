"""Tests that wrong cuts are found in unusual outputs, in kept state and behind a large offset."""

import collections
import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import xprune
from xprune.testing import assert_untouched, random_plan, snapshot

WIDTH, HIDDEN = 16, 12


class Plain(nn.Module):
    """A stem, a residual MLP and a classifier. `finish` makes the output and may use the hidden features."""

    def __init__(self, finish=lambda y, hidden: y):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        self.finish = finish

    def forward(self, x):
        x = self.stem(x)
        hidden = self.mlp[1](self.mlp[0](x))
        return self.finish(self.head(x + self.mlp[2](hidden)), hidden)


@dataclasses.dataclass(slots=True)
class Slots:
    logits: torch.Tensor
    size: torch.Tensor


class Cache:
    """An object whose class has a name that transformers uses too."""

    def __init__(self, value):
        self.value = value


OUTPUTS = {
    "an object with slots": lambda y, h: (y, Slots(y, h.norm())),
    "an array": lambda y, h: (y, h.detach().norm().numpy()),
    "a number of numpy": lambda y, h: (y, np.float32(h.detach().norm().item())),
    "a set of one": lambda y, h: (y, {h.norm()}),
    "a deque": lambda y, h: (y, collections.deque([h.norm()])),
    "a complex number": lambda y, h: (y, complex(h.norm().item(), 1)),
    "an object called Cache": lambda y, h: (y, Cache(h.norm())),
}


def built(make):
    torch.manual_seed(0)
    return make().eval()


def inputs():
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def all_refused(model):
    """Checks that no wrong cut gets through: `find_sites` gives no site, or surgery refuses the plan."""
    try:
        sites = xprune.find_sites(model, inputs())
    except xprune.ModelError:
        return True
    with pytest.raises(xprune.SurgeryError):
        xprune.apply(model, random_plan(sites, 0, 0.0), inputs())
    return True


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_tells_of_hidden_features_is_seen(name):
    assert all_refused(built(lambda: Plain(OUTPUTS[name])))


class Remembers(Plain):
    """Adds to its output a number from the call before."""

    def __init__(self, memory, read, write):
        super().__init__()
        self.memory, self.read, self.write = memory, read, write

    def forward(self, x):
        x = self.stem(x)
        hidden = self.mlp[1](self.mlp[0](x))
        y = self.head(x + self.mlp[2](hidden)) + self.read(self.memory)
        self.write(self.memory, hidden.detach().mean())
        return y


MEMORIES = {
    "a deque": (lambda: collections.deque([torch.zeros(())]), lambda m: m[-1], lambda m, value: m.append(value)),
    "an array": (lambda: np.zeros(1), lambda m: float(m[0]), lambda m, value: m.__setitem__(0, float(value))),
    "deep in dicts": (
        lambda: {"a": {"b": {"c": {"d": {"e": 0.0}}}}},
        lambda m: m["a"]["b"]["c"]["d"]["e"],
        lambda m, value: m["a"]["b"]["c"]["d"].update(e=float(value)),
    ),
    "data of a tensor": (lambda: torch.zeros(()), lambda m: m.clone(), lambda m, value: m.data.copy_(value)),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_memory_of_the_call_before_is_seen(name):
    make, read, write = MEMORIES[name]
    assert all_refused(built(lambda: Remembers(make(), read, write)))


class Scaled(nn.Module):
    """An MLP whose output depends on the number of hidden features, so any cut is wrong."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        hidden = F.relu(self.fc1(x))
        return self.fc2(hidden) * (hidden.shape[-1] / HIDDEN)


class Offset(nn.Module):
    """A model whose outputs are large numbers that vary little."""

    def __init__(self, mlp, offset):
        super().__init__()
        self.stem, self.mlp, self.head, self.offset = nn.Linear(WIDTH, WIDTH), mlp(), nn.Linear(WIDTH, 3), offset

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.mlp(x)) + self.offset


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


@pytest.mark.parametrize("offset", [0.0, 100.0, 2000.0, 1e4])
def test_an_offset_hides_nothing(offset):
    assert all_refused(built(lambda: Offset(Scaled, offset)))
    honest = built(lambda: Offset(mlp, offset))
    xprune.apply(honest, random_plan(xprune.find_sites(honest, inputs()), 0, 0.0), inputs())


def test_a_module_at_two_places_keeps_a_unit():
    class Twice(Plain):
        def __init__(self):
            super().__init__()
            self.again = self.mlp

        def forward(self, x):
            x = self.stem(x)
            x = x + self.mlp(x)
            return self.head(x + self.again(x))

    model = built(Twice)
    for site in xprune.find_sites(model, inputs()):
        assert not site.module, "one of the two places would keep its units"
        xprune.apply(model, xprune.Plan((site,), ((0,),)), inputs())


def test_a_layer_that_two_modules_share_has_a_reason():
    class Shares(Plain):
        def __init__(self):
            super().__init__()
            self.other = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), self.mlp[2])

        def forward(self, x):
            x = self.stem(x)
            x = x + self.mlp(x)
            return self.head(x + self.other(x))

    assert all_refused_or_exact(built(Shares))


def all_refused_or_exact(model):
    try:
        sites = xprune.find_sites(model, inputs())
    except xprune.ModelError:
        return True
    xprune.apply(model, random_plan(sites, 0, 0.0), inputs())
    return True


def test_a_model_built_in_inference_mode_is_pruned():
    with torch.inference_mode():
        model = built(Plain)
    before = snapshot(model)
    sites = xprune.find_sites(model, inputs())
    xprune.apply(model, random_plan(sites, 0, 0.0), inputs())
    assert_untouched(model, before)


def test_a_model_without_values_or_without_a_copy_is_refused_by_name():
    with torch.device("meta"):
        bare = Plain().eval()
    with pytest.raises(xprune.XPruneError, match="meta device"):
        xprune.find_sites(bare, inputs())
    locked = built(Plain)
    locked.lock = threading.Lock()
    with pytest.raises(xprune.ModelError, match="cannot be copied"):
        xprune.find_sites(locked, inputs())


class Unreadable(Exception):
    """An error whose message cannot be read."""

    def __str__(self):
        raise ValueError("no text")


def test_an_error_without_a_readable_message_is_a_reason():
    def finish(y, hidden):
        if hidden.shape[-1] != HIDDEN:
            raise Unreadable
        return y

    assert all_refused_or_exact(built(lambda: Plain(finish)))
