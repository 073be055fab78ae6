"""Tests calls of a model with inputs of every form, and operations on the tensors in the inputs."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from xprune.modules.calls import call, first_rows, lengths, map_tensors, pick_samples, takes, tensors_in

Pair = namedtuple("Pair", ["left", "right"])


class Seen(nn.Module):
    """Returns its arguments."""

    def forward(self, *args, **kwargs):
        return args, kwargs


@pytest.mark.parametrize(
    "inputs, args, kwargs",
    [
        (1, (1,), {}),
        ((1, 2), (1, 2), {}),
        ([1, 2], ([1, 2],), {}),
        (([1, 2], 3), ([1, 2], 3), {}),
        ({"a": 1, "b": [2]}, (), {"a": 1, "b": [2]}),
    ],
)
def test_a_tuple_is_arguments_and_a_list_is_one(inputs, args, kwargs):
    assert call(Seen(), inputs) == (args, kwargs)


VALUES = {
    "list": [torch.ones(2), torch.ones(3)],
    "tuple": (torch.ones(2), torch.ones(3)),
    "named tuple": Pair(torch.ones(2), (torch.ones(3), "text")),
    "dict": {"a": [torch.ones(2)], "b": (torch.ones(3), None, 4)},
    "size": (torch.ones(2, 3).shape, torch.ones(2)),
    "of torch": torch.ones(2, 3).max(1),
}


@pytest.mark.parametrize("name", VALUES)
def test_containers_stay_what_they_are(name):
    def types(value):
        inside = list(value.values()) if isinstance(value, dict) else value
        return [type(value), *(types(item) for item in inside)] if isinstance(inside, (list, tuple)) else type(value)

    value = VALUES[name]
    doubled = map_tensors(value, lambda tensor: 2 * tensor)
    assert types(doubled) == types(value)
    for before, after in zip(tensors_in(value), tensors_in(doubled), strict=True):
        assert torch.equal(after, 2 * before)


def shapes(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: shapes(item) for name, item in value.items()}
    return type(value)(map(shapes, value)) if isinstance(value, (list, tuple)) else value


def of(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


CASES = {
    "a tensor": (of(5, 3), 0, (2, 3)),
    "a shared mask": ((of(5, 3), of(7, 7)), 0, ((2, 3), (7, 7))),
    "0-dim": ({"x": of(5, 3), "scale": of()}, 0, {"x": (2, 3), "scale": ()}),
    "the mask first": ({"mask": of(7, 7), "x": of(5, 7, 3)}, 0, {"mask": (7, 7), "x": (2, 7, 3)}),
    "positions of one row": ((of(5, 7), of(1, 7)), 0, ((2, 7), (1, 7))),
    "images of their own sizes": ([of(3, 4 + i, 5) for i in range(5)], 0, [(3, 4, 5), (3, 5, 5)]),
    "images beside a flag": (([of(5, 5)] * 5, True), 0, ([(5, 5), (5, 5)], True)),
    "a list of levels": ({"levels": [of(5, 4), of(5, 2)]}, 0, {"levels": [(2, 4), (2, 2)]}),
    "sequence first": ((of(9, 5, 3), of(5, 9)), 1, ((9, 2, 3), (5, 9))),
    "numbers": ((of(5, 2), 5, "text", None), 0, ((2, 2), 5, "text", None)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_samples_and_what_goes_along_whole(name):
    inputs, axis, expected = CASES[name]
    assert shapes(first_rows(inputs, 2, 5, axis)) == expected
    assert shapes(first_rows(inputs, 9, 5, axis)) == shapes(inputs), "there are no more than there are"
    assert lengths(inputs, axis).count(5) >= 1


def test_the_first_input_tells_the_samples_where_nobody_says_them():
    assert shapes(first_rows((of(), of(5, 3), of(7, 7)), 2)) == ((), (2, 3), (7, 7))
    assert shapes(first_rows([of(3, 4)] * 4, 2)) == [(3, 4)] * 2
    assert first_rows((of(), "text"), 2) == (of(), "text")


def test_samples_are_picked_in_any_order_and_again():
    batch = pick_samples({"x": of(4, 2), "each": [of(1), of(2), of(3), of(4)]}, torch.tensor([3, 0, 3]), 4)
    assert torch.equal(batch["x"], of(4, 2)[[3, 0, 3]])
    assert [len(item) for item in batch["each"]] == [4, 1, 4]


def test_how_many_arguments_a_function_takes():
    functions = lambda a, b: 0, lambda *a: 0, lambda a, b, c=1: 0, Seen().forward
    assert [[takes(function, n) for n in (2, 3)] for function in functions] == [[True, False]] + [[True, True]] * 3
