"""Tests `shared_copy`, `unshare` and `unwrap`."""

import copy

import pytest
import torch
from torch import nn

import xprune
from xprune.modules.copies import reference_device, shared_copy, tensors, unshare, unwrap


class Tied(nn.Module):
    """Two layers with one weight, a buffer under two names, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(3))
        self.norm = nn.Module()
        self.norm.register_buffer("scale", self.scale)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x)) * self.scale


MODELS = {
    "tied": Tied,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    "half precision": lambda: nn.Linear(3, 4).to(torch.bfloat16),
    "no tensors": lambda: nn.Sequential(nn.ReLU()),
    "an empty tensor": lambda: nn.Linear(0, 3),
}


def state(model):
    return {name: (id(t), t.requires_grad, t.clone()) for name, t in tensors(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_an_alias_shares_parameters_and_leaves_the_model_alone(name):
    model = MODELS[name]().train()
    before = state(model)
    twin = shared_copy(model)
    assert type(twin) is type(model) and not twin.training and model.training
    for key, tensor in tensors(twin).items():
        original = tensors(model)[key]
        shared = tensor.data_ptr() == original.data_ptr()
        assert tensor is not original and shared == isinstance(original, nn.Parameter)
        assert tensor.requires_grad == original.requires_grad and type(tensor) is type(original)
    for module in list(twin.modules()):
        for key in list(module._parameters):
            setattr(module, key, None)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(before[key][:2] == after[key][:2] and torch.equal(before[key][2], after[key][2]) for key in before)


def ties(model):
    """Returns the sets of names that belong to one tensor."""
    names = {}
    for name, tensor in tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    return sorted(names.values())


@pytest.mark.parametrize("name", MODELS)
def test_ties_survive_in_aliases_and_in_copies_of_their_own(name):
    model = MODELS[name]()
    assert ties(model) == ties(shared_copy(model)) == ties(unshare(shared_copy(model), model))


@pytest.mark.parametrize("name", MODELS)
def test_an_own_copy_shares_no_storage(name):
    model = MODELS[name]()
    twin = unshare(shared_copy(model), model)
    for key, tensor in tensors(twin).items():
        assert torch.equal(tensor, tensors(model)[key])
        assert not tensor.numel() or tensor.data_ptr() != tensors(model)[key].data_ptr()


@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_are_wanted_as_asked_of_what_can_have_them(wanted):
    model = Tied()
    model.register_buffer("index", torch.zeros(2, dtype=torch.long))
    model.count = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
    twin = shared_copy(model, requires_grad=wanted)
    assert {p.requires_grad for p in twin.parameters() if p.is_floating_point()} == {wanted}
    assert not twin.count.requires_grad


def test_an_alias_on_the_meta_device_has_shapes_alone():
    twin = shared_copy(Tied(), device="meta")
    assert all(tensor.is_meta for tensor in tensors(twin).values())
    assert twin(torch.zeros(2, 3, device="meta")).shape == (2, 3)
    assert reference_device(twin).type == "meta" and reference_device(nn.ReLU()).type == "cpu"


def test_what_a_forward_has_cached_can_hang_on_a_graph():
    model = nn.Linear(3, 3)
    model.cache = [model(torch.zeros(1, 3))]
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert not shared_copy(model).cache[0].requires_grad


class Counted(nn.Linear):
    """A layer with a way of its own to be copied. It also refers to a list that holds a layer."""

    def __init__(self):
        super().__init__(3, 3)
        self.copies, self.held = 0, [nn.Linear(3, 3)]

    def __deepcopy__(self, memo):
        twin = Counted()
        twin.copies = self.copies + 1
        return twin


class Restored(nn.Module):
    """A layer that reads a child while it is restored, and leaves out a part of its state."""

    def __init__(self):
        super().__init__()
        self.inner, self.lock = nn.Linear(3, 3), "a lock"

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = f"a lock for {self.inner.in_features} features"


def circle():
    """A model whose part refers to the whole in a plain attribute, and to its sibling by a method."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[1].whole, model[1].apply_first = [model], model[0].forward
    return model


def hooked():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize("make", [*MODELS.values(), Counted, Restored, circle, hooked])
def test_a_copy_holds_what_deepcopy_gives(make):
    model = make()
    twin, expected = shared_copy(model), copy.deepcopy(model).eval()
    for ours, theirs in zip(twin.modules(), expected.modules(), strict=True):
        assert type(ours) is type(theirs) and list(vars(ours)) == list(vars(theirs))
        for mine, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
            assert type(mine) is type(other)
            assert not isinstance(other, (bool, int, float, str, tuple)) or mine == other
    originals = {id(module) for module in model.modules()}
    assert not originals & {id(module) for module in twin.modules()}


def test_references_inside_a_copy_stay_inside():
    twin = shared_copy(circle())
    assert twin[1].whole[0] is twin and twin[1].apply_first.__self__ is twin[0]
    assert shared_copy(Counted()).copies == 1 and shared_copy(nn.Sequential(Counted()))[0].copies == 1
    assert shared_copy(Restored()).lock == "a lock for 3 features"


def test_a_lazy_layer_is_refused_by_its_name():
    with pytest.raises(xprune.ModelError, match=r"0\.weight is not initialised"):
        shared_copy(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))]
)
def test_unwrap_finds_the_model_inside(wrap):
    model = nn.Linear(3, 3)
    assert unwrap(wrap(model)) is model


def _named(module):
    """Returns a module whose class says that it comes from another library."""
    kind = type("Wrapper", (nn.Module,), {"__module__": module})
    return kind()


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (lambda: "a name", "wanted a torch.nn.Module, got str"),
        (lambda: nn.Linear, "wanted a torch.nn.Module, got type"),
        (lambda: _named("peft.peft_model"), "merge_and_unload"),
        (lambda: nn.Sequential(_named("torch.distributed.fsdp.api")), "before it is wrapped"),
    ],
)
def test_what_cannot_be_pruned_is_named(thing, says):
    with pytest.raises(xprune.ModelError, match=says):
        unwrap(thing())
