"""Tests that public functions leave the caller's state unchanged, also after an error or Ctrl-C."""

from contextlib import ExitStack, suppress

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset

import xprune
from tests.support.callers_state import World
from tests.support.models import build, images, loader
from xprune.training import accelerate_state

BUDGET = xprune.Budget(macs=0.6)
IMAGES = images()
TUNE = xprune.Finetune(epochs=2)


class Fuse:
    """Counts its calls, and raises an error at a given call."""

    def __init__(self) -> None:
        self.set(None)

    def set(self, error, after=0) -> None:
        self.error, self.after, self.count = error, after, 0

    def __call__(self) -> None:
        self.count += 1
        if self.error and self.count == self.after:
            raise self.error("stopped in the middle")


FORWARDS, ROWS = Fuse(), Fuse()


class Counts(nn.Module):
    """A ViT whose forward changes state: a batch norm in training mode, a buffer and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = build("vit"), nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x):
        FORWARDS()
        self.calls += 1
        self.norm(x)
        torch.rand(3)
        return self.inner(x)


class Drawing(Dataset):
    """A data set that draws a random number for each sample."""

    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        ROWS()
        torch.rand(1)
        return self.data[index]


def data(generator=None):
    return DataLoader(Drawing(loader(16).dataset), 8, shuffle=True, generator=generator)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns the arguments of the functions. They are made with another model than the one that is tested."""
    model = Counts()
    sites = xprune.find_sites(model, IMAGES)
    scores = xprune.score(model, sites, loader(), "taylor")
    plan = xprune.select(model, scores, BUDGET, example_inputs=IMAGES)
    pruned = xprune.apply(model, plan, IMAGES)
    folder = tmp_path_factory.mktemp("saved")
    xprune.save(xprune.apply(build("vit"), full(), IMAGES), folder)
    return {"sites": sites, "scores": scores, "plan": plan, "pruned": pruned, "folder": folder}


def full():
    return xprune.Plan.full(xprune.find_sites(build("vit"), IMAGES))


def pruner(model, criterion, selection="global", **more):
    return xprune.Pruner(model, criterion, BUDGET, selection, TUNE, **more)


CRITERIA = ("random", "magnitude", "taylor", "captum:IntegratedGradients,n_steps=2", "xpruner,steps=3")
FUNCTIONS = {
    "find_sites": lambda w, m, out: xprune.find_sites(w.model, IMAGES),
    **{
        f"score {name}": lambda w, m, out, name=name: xprune.score(w.model, m["sites"], w.loader, name)
        for name in CRITERIA
    },
    "select": lambda w, m, out: xprune.select(w.model, m["scores"], BUDGET, example_inputs=IMAGES),
    "select learned": lambda w, m, out: xprune.select(
        w.model, m["scores"], BUDGET, xprune.LearnedThresholds(weights="frozen", steps=3), loader=w.loader
    ),
    "apply": lambda w, m, out: xprune.apply(w.model, m["plan"], IMAGES),
    "finetune": lambda w, m, out: xprune.finetune(w.model, w.loader, TUNE, checkpoint_dir=out),
    "evaluate": lambda w, m, out: xprune.evaluate(w.model, w.loader),
    "measure_costs": lambda w, m, out: xprune.measure_costs(w.model, m["sites"], IMAGES),
    "count_macs": lambda w, m, out: xprune.count_macs(w.model, IMAGES),
    "count_params": lambda w, m, out: xprune.count_params(w.model),
    "latency": lambda w, m, out: xprune.latency(w.model, IMAGES, seconds=0.01),
    "compare": lambda w, m, out: xprune.compare(
        xprune.Case(w.model, w.loader, w.loader, m["sites"]),
        xprune.Grid({"taylor": "taylor"}, seeds=(0,), budgets=(BUDGET,), finetune=TUNE, faithfulness=True),
        out,
    ),
    "Pruner.run": lambda w, m, out: pruner(
        w.model, "taylor", xprune.LearnedThresholds(weights="joint", steps=2), sites=m["sites"], latency=False
    ).run(w.loader, w.loader),
    "faithfulness": lambda w, m, out: xprune.explain.faithfulness(
        w.model, m["scores"], w.loader, fractions=(0.5,), chance=1
    ),
    "save": lambda w, m, out: xprune.save(build("vit"), out / "saved"),
    "load": lambda w, m, out: xprune.load(m["folder"], lambda: build("vit")),
}


@pytest.fixture
def world():
    """Returns the caller's state, with a new state of Accelerate."""
    with accelerate_state.kept():
        accelerate_state.forget()
        FORWARDS.set(None)
        ROWS.set(None)
        yield World(Counts(), data())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_world_is_as_before(name, world, made, tmp_path):
    FUNCTIONS[name](world, made, tmp_path / "whole")
    world.assert_as_before()
    # `latency` makes as many forwards as fit into its time, so an early one is chosen.
    for fuse, middle in ((FORWARDS, min(FORWARDS.count, 5)), (ROWS, ROWS.count)):
        for error in (KeyboardInterrupt, OSError) if middle else ():
            FORWARDS.set(None)
            ROWS.set(None)
            fuse.set(error, -(-middle // 2))
            # If a forward fails while sites are found, this may only be a reason to leave a module alone.
            expected = suppress(OSError, xprune.XPruneError) if error is OSError else pytest.raises(error)
            with expected:
                FUNCTIONS[name](world, made, tmp_path / f"stopped {error.__name__} {fuse is ROWS}")
            world.assert_as_before()


SETTINGS = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "double by default": lambda: restored(torch.set_default_dtype, torch.float64, torch.get_default_dtype()),
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, True, False),
}


class restored:
    """Calls a setter with one value, and at the end with another."""

    def __init__(self, setter, value, before) -> None:
        self.setter, self.value, self.before = setter, value, before

    def __enter__(self) -> None:
        self.setter(self.value)

    def __exit__(self, *_) -> None:
        self.setter(self.before)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["find_sites", "score taylor", "score xpruner,steps=3", "finetune", "evaluate"])
def test_the_callers_settings_are_put_aside_and_put_back(name, settings, made, world, tmp_path):
    plain = FUNCTIONS[name](world, made, tmp_path / "plain")
    with ExitStack() as stack:
        stack.enter_context(SETTINGS[settings]())
        inside = World(world.model, world.loader)
        found = FUNCTIONS[name](inside, made, tmp_path / "found")
        inside.assert_as_before()
    for a, b in zip(values(plain), values(found), strict=True):
        assert torch.equal(a, b), "and the result is what it is without them"


def values(found):
    """Returns the numbers of a result as tensors."""
    if isinstance(found, xprune.Scores):
        return found.values
    if isinstance(found, nn.Module):
        return tuple(found.parameters())
    if isinstance(found, xprune.Metrics):
        return (torch.tensor([found.metric, found.loss]),)
    return tuple(torch.tensor([site.size]) for site in found)


@pytest.mark.parametrize("name", ["score taylor", "finetune", "evaluate", "Pruner.run", "faithfulness"])
def test_a_loader_keeps_its_own_generator_and_its_order(name, world, made, tmp_path):
    def order():
        generator = torch.Generator().manual_seed(5)
        own = data(generator)
        world.loader, world.before = own, World(world.model, own).before
        return own

    untouched = [labels.tolist() for _, labels in order()]
    own = order()
    FUNCTIONS[name](world, made, tmp_path / "out")
    world.assert_as_before()
    assert [labels.tolist() for _, labels in own] == untouched


def test_without_an_accelerate_of_the_callers_the_next_one_starts_fresh(made):
    with accelerate_state.kept():
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._shared_state.clear()
        xprune.evaluate(build("vit"), loader())
        assert not any(kind._shared_state for kind in (AcceleratorState, GradientState, PartialState))
        assert Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2).mixed_precision == "bf16"
        xprune.finetune(build("vit"), loader(), xprune.Finetune(epochs=1, mixed_precision="no"))
        assert AcceleratorState().mixed_precision == "bf16" and GradientState().num_steps == 2
