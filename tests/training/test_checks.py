"""Tests that checks which are read late name their step, stop a run in time, and cost no waiting for the device."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import xprune
from tests.support.models import CLASSES, build, images, loader
from xprune.core.late_check import LateCheck
from xprune.core.task import Task
from xprune.criteria.xpruner.criterion import XPruner
from xprune.errors import DataError, TrainingError
from xprune.modules.torch_private import TorchDispatchMode
from xprune.training import checkpoint, checks, loop
from xprune.training.runtime import accelerator, stage

WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "is_nonzero", "equal", "masked_select")
"""The operations for which Python waits for the device."""


class Waits(TorchDispatchMode):
    """Counts the operations for which Python would wait for an accelerator, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        # Boolean masks as an index make a tensor whose size the device has to tell.
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        # Adam counts its steps in numbers on the CPU, also if the weights are on an accelerator.
        own_number = name == "_local_scalar_dense" and args[0].dtype == torch.float32 and id(args[0]) in self.steps
        if (name in WAITING or masked) and not own_number:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    steps: frozenset[int] = frozenset()


@pytest.fixture
def queued(monkeypatch):
    """Loops read their checks as on an accelerator, after each 20th step."""
    monkeypatch.setattr(loop, "read_every", lambda device: checks.READ_EVERY)


def counted(monkeypatch, settings, task=None, data=None, model=None):
    """The waits of each step of mask learning."""
    from xprune.criteria.xpruner import learner

    counts, real = [], learner.MaskLearner._step

    def step(self, inputs, targets):
        with Waits() as waits:
            states = [state for each in self.optimizers for state in each.state.values()]
            waits.steps = frozenset(id(state["step"]) for state in states if "step" in state)
            real(self, inputs, targets)
        counts.append(waits.counts)

    monkeypatch.setattr(learner.MaskLearner, "_step", step)
    # On an accelerator, each sample has its own row.
    monkeypatch.setattr(learner._GateSource, "_rows", lambda self, drawn: (drawn, None))
    model = model or build("vit")
    xprune.score(model, xprune.find_sites(model, images()), data or loader(28, 7), settings, task=task)
    return counts


@pytest.mark.parametrize("rank", [None, 3])
def test_no_step_of_mask_learning_waits_for_the_device(queued, monkeypatch, rank):
    counts = counted(monkeypatch, XPruner(steps=9, rank=rank, sparse=False))
    # The first steps of both kinds create the state of the optimizer.
    assert counts[3:] == [{}] * 6


def test_the_count_of_waits_sees_what_a_step_waited_for():
    with Waits() as waits:
        values = torch.tensor([1.0, 2.0])
        bool(values.sum() > 0), values[values > 1], values.unique()
    assert set(waits.counts) >= {"_local_scalar_dense", "_unique2"} and waits.counts.keys() & {"index", "nonzero"}


def rows_for_each_sample(monkeypatch):
    from xprune.criteria.xpruner import learner

    monkeypatch.setattr(learner._GateSource, "_rows", lambda self, drawn: (drawn, None))


@pytest.mark.parametrize("rank", [None, 3])
def test_a_row_for_each_sample_learns_what_a_row_for_each_class_learns(monkeypatch, rank):
    model, settings = build("vit"), XPruner(steps=8, rank=rank)
    sites = xprune.find_sites(model, images())
    few = xprune.score(model, sites, loader(28, 7), settings)
    rows_for_each_sample(monkeypatch)
    many = xprune.score(model, sites, loader(28, 7), settings)
    for name in ("values", "classwise"):
        for a, b in zip(getattr(few, name), getattr(many, name), strict=True):
            a, b = (t if isinstance(t, torch.Tensor) else t[:] for t in (a, b))
            assert (a - b).nan_to_num().abs().max() < 1e-3


def spoilt(at, steps=23):
    """Batches of which one has a pixel that is not a number."""
    batches = [(images(4), torch.arange(4) % CLASSES) for _ in range(steps)]
    batches[at] = (batches[at][0] * float("nan"), batches[at][1])
    return batches


@pytest.mark.parametrize("every", [1, 20])
@pytest.mark.parametrize("at", [0, 19, 22])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(monkeypatch, every, at, tmp_path):
    monkeypatch.setattr(loop, "read_every", lambda device: every)
    kept = xprune.Checkpoint(tmp_path, steps=1)
    written = []
    monkeypatch.setattr(checkpoint, "write", lambda folder, state, fingerprint: written.append(copy.deepcopy(state)))
    with pytest.raises(TrainingError, match=rf"fine-tuning, step {at} of 23: the loss is nan \(epoch 1\)"):
        xprune.finetune(build("vit"), spoilt(at), xprune.Finetune(epochs=1), checkpoint_dir=kept)
    assert all(state["step"] <= at for state in written), "no state from after the step is written"
    for state in written:
        assert all(torch.isfinite(tensor).all() for tensor in state["parts"]["model"].values())


@pytest.mark.parametrize("every", [1, 20])
@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_a_label_that_is_no_class_is_named_with_its_step(monkeypatch, every, bad):
    monkeypatch.setattr(loop, "read_every", lambda device: every)
    batches = [(images(4), torch.arange(4) % CLASSES) for _ in range(9)]
    batches[5] = (batches[5][0], torch.tensor([0, bad, 2, 3]))
    model = build("vit")
    match = rf"step 5 of 9: labels go from {min(bad, 0)} to {max(bad, 3)}, but the model's head has {CLASSES} classes"
    with pytest.raises(DataError, match=f"fine-tuning, {match}"):
        xprune.finetune(model, batches, xprune.Finetune(epochs=1))
    with pytest.raises(DataError, match=f"masks, {match}"):
        xprune.score(model, xprune.find_sites(model, images()), batches, XPruner(steps=9))


def test_a_task_of_a_user_is_checked_at_every_step(queued):
    seen = []

    class Mine(xprune.Classification):
        def check(self, outputs, targets):
            seen.append(len(targets))
            if len(seen) == 3:
                raise DataError("no third batch, please.")

    with pytest.raises(DataError, match="no third batch"):
        xprune.finetune(build("vit"), loader(28, 4), xprune.Finetune(epochs=1), task=Mine())
    assert seen == [4, 4, 4]

    class Loss(xprune.Classification):
        """Its loss may not bear wrong labels, so that it is checked first."""

        def loss(self, outputs, targets, label_smoothing=0.0):
            return outputs[range(len(targets)), targets].mean()

    with pytest.raises(DataError, match="labels go from 0 to 99"):
        xprune.finetune(build("vit"), [(images(2), torch.tensor([0, 99]))], xprune.Finetune(epochs=1), task=Loss())


def test_a_task_of_a_user_may_be_checked_late(queued):
    class Mine(xprune.Classification):
        late_check = xprune.Classification.late_check

        def check(self, outputs, targets):
            raise AssertionError("the late check is used")

    xprune.finetune(build("vit"), loader(8, 4), xprune.Finetune(epochs=1), task=Mine())


@pytest.mark.parametrize("bad", [-7, 50])
def test_tokens_out_of_range_are_named_with_their_step(queued, bad):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))
    batches = [(torch.randint(9, (2, 5)), torch.randint(9, (2, 5))) for _ in range(4)]
    batches[2][1][1, 3] = bad
    batches[0][1][:] = -100  # a batch without labels is allowed
    with pytest.raises(DataError, match=f"step 2 of 4: the label {bad} is out of range: the model has 9 classes"):
        xprune.finetune(model, batches, xprune.Finetune(epochs=1), task=xprune.TokenClassification())


def test_every_task_of_xprune_that_is_checked_late_says_so_itself():
    late = [task for task in xprune.TASKS.values() if task.late_check is not Task.late_check]
    assert late and all("check" not in vars(task) for task in late if "late_check" in vars(task))


def test_numbers_of_all_kinds_are_read_together():
    read = []

    def judge(numbers):
        read.append(numbers)

    values = [torch.tensor([1, 2**40]), torch.tensor([0.5]), torch.tensor([True]), torch.tensor([3, 4, 5])]
    with stage():
        found = checks.Checks(accelerator(), "counting", 9)
        for step, value in enumerate(values):
            found.add(step, LateCheck(value, judge))
        found.read()
        found.read()
    assert read == [value.tolist() for value in values], "each check is read once"


def test_a_run_over_a_data_loader_ends_with_the_same_weights_however_often_checks_are_read(monkeypatch):
    def tuned():
        data = DataLoader(loader(24).dataset, 4, shuffle=True)
        return xprune.finetune(build("vit"), data, xprune.Finetune(epochs=2), seed=3).state_dict()

    often = tuned()
    monkeypatch.setattr(loop, "read_every", lambda device: 5)
    assert all(torch.equal(a, b) for a, b in zip(often.values(), tuned().values(), strict=True))
