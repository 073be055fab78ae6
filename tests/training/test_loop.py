"""Tests that a killed training loop continues with the same bits, and that a damaged checkpoint is refused."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, default_collate

import xprune
from tests.support.models import Killed, loader, vit
from xprune.modules.copies import tensors
from xprune.testing import perturb
from xprune.training import checkpoint, loop

ROWS, BATCH, EPOCHS = 24, 4, 2
STEPS = ROWS // BATCH


class Augmented(Dataset):
    """Rows with noise from every global source of random numbers; reading is over after so many."""

    def __init__(self, after=None) -> None:
        self.data, self.left, self.read = loader(ROWS).dataset, after, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        if self.left is not None and self.read >= self.left:
            raise Killed
        self.read += 1
        x, y = self.data[index]
        return x * random.uniform(0.5, 1.5) + float(np.random.rand()) + torch.rand(1), y


def build():
    """A model that drops paths, so that random numbers matter."""
    torch.manual_seed(0)
    return perturb(vit(drop_path_rate=0.3)())


def data(after=None):
    return DataLoader(Augmented(after), BATCH, shuffle=True)


def finetuned(batches, folder=None):
    settings = xprune.Finetune(epochs=EPOCHS, lr=1e-3, ema=0.9)
    return tensors(xprune.finetune(build(), batches, settings, seed=5, checkpoint_dir=folder))


def masks(batches, folder=None):
    model = build()
    sites = xprune.find_sites(model, torch.zeros(2, 3, 32, 32))
    scores = xprune.score(model, sites, batches, f"xpruner,steps={EPOCHS * STEPS}", seed=5, checkpoint_dir=folder)
    return {site.name: value for site, value in zip(sites, scores.values, strict=True)}


def thresholds(batches, folder=None):
    model = build()
    scores = xprune.score(model, xprune.find_sites(model, torch.zeros(2, 3, 32, 32)), criterion="magnitude")
    chosen = xprune.LearnedThresholds(weights="frozen", steps=EPOCHS * STEPS)
    given = {"loader": batches, "example_inputs": torch.zeros(2, 3, 32, 32), "seed": 5, "checkpoint_dir": folder}
    plan = xprune.select(model, scores, xprune.Budget(macs=0.6), chosen, **given)
    return {"thresholds": torch.tensor(plan.info["thresholds"])}


LEARNERS = {"fine-tuning": finetuned, "masks": masks, "thresholds": thresholds}


@pytest.mark.parametrize("learner", LEARNERS)
def test_killed_at_any_step_it_goes_on_to_the_same_bits(learner, tmp_path):
    learn, whole = LEARNERS[learner], LEARNERS[learner](data())
    extra = BATCH if learner == "masks" else 0  # which look at a first batch
    for killed in (STEPS - 1, STEPS):  # batches that were read; Accelerate reads one ahead
        folder = tmp_path / str(killed)
        torch.rand(7)  # another process would have another state
        with pytest.raises(Killed):
            learn(data(after=extra + killed * BATCH + 1), xprune.Checkpoint(folder, steps=1))
        assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
        state = dict(json.loads(header(folder)["state"])["dict"])
        assert state["step"]["plain"] == (killed - 1 if killed % STEPS else killed)
        random.seed(9)
        found = learn(data(), folder)
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), f"{name}, killed after {killed} batches"
        assert not list(folder.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("learner", LEARNERS)
def test_killed_in_a_step_it_skips_batches_to_the_same_bits(learner, workers, monkeypatch, tmp_path):
    """The data set changes images at random, in this process or in workers, and skipped batches are not read."""
    learn, step = LEARNERS[learner], STEPS + 4
    settings = {"batch_size": BATCH, "shuffle": True, "num_workers": workers, "collate_fn": mixed}
    whole = learn(DataLoader(Augmented(), **settings))
    backward = loop.Loop.backward

    def fails(self, loss):
        if self.step == step:
            raise Killed
        backward(self, loss)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Loop, "backward", fails)
        learn(DataLoader(Augmented(), **settings), xprune.Checkpoint(tmp_path, steps=3))
    assert dict(json.loads(header(tmp_path)["state"])["dict"])["step"]["plain"] == step - 1
    rest = Augmented()
    found = learn(DataLoader(rest, **settings), tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    if not workers:
        first = BATCH if learner == "masks" else 0
        assert rest.read == first + (EPOCHS * STEPS - step + 1) * BATCH, "skipped batches were read"


def mixed(samples):
    """Collates samples, and mixes them at random."""
    x, y = default_collate(samples)
    share = torch.rand(1)
    return share * x + (1 - share) * x.flip(0), y


def test_a_data_set_is_seen_as_it_is_by_workers_and_samplers(tmp_path):
    """Attributes of the data set can be read and set in worker_init_fn, and epochs are handed on to it."""

    class Opens(Augmented):
        opened, epochs = None, ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

        def __getitem__(self, index):
            assert self.opened == len(self), "worker_init_fn was not heard"
            return self.data[index]

    def opens(worker):
        info = torch.utils.data.get_worker_info()
        info.dataset.opened = len(info.dataset.data)

    samples = Opens()
    finetuned(DataLoader(samples, BATCH, num_workers=1, worker_init_fn=opens), tmp_path)
    assert samples.epochs[-1] == EPOCHS - 1 and samples.opened is None


def test_a_sampler_of_batches_without_a_size_is_skipped_too(tmp_path, monkeypatch):
    class Uneven(torch.utils.data.Sampler):
        """Batches of all sizes, in a random order that is drawn while they are read."""

        def __iter__(self):
            for size in (3, 5, 1, 4, 2):
                yield torch.randperm(ROWS)[:size].tolist()

        def __len__(self):
            return 5

    def data():
        return DataLoader(Augmented(), batch_sampler=Uneven())

    whole, backward = finetuned(data()), loop.Loop.backward

    def fails(self, loss):
        if self.step == 3:
            raise Killed
        backward(self, loss)

    with monkeypatch.context() as patch, pytest.raises(Killed), pytest.warns(UserWarning, match="seeded"):
        patch.setattr(loop.Loop, "backward", fails)
        finetuned(data(), xprune.Checkpoint(tmp_path, steps=1))
    rest = data()
    with pytest.warns(UserWarning, match="seeded"):
        found = finetuned(rest, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert rest.dataset.read == 4 + 2 + 15


@pytest.mark.parametrize("bad", [{"steps": 0}, {"minutes": 0}, {"steps": None, "minutes": None}])
def test_a_checkpoint_that_is_never_written_is_refused(bad):
    with pytest.raises(xprune.TrainingError, match=r"Checkpoint\("):
        xprune.Checkpoint("state", **bad)


def header(folder):
    content = (folder / "checkpoint.safetensors").read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_the_state_is_kept_when_enough_seconds_have_gone_by(monkeypatch, tmp_path):
    clock, steps = iter(range(0, 10**6, 100)), []  # seconds: each look at the clock is 100 later
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(checkpoint, "write", lambda folder, state, fingerprint: steps.append(state["step"]))
    finetuned(data(), xprune.Checkpoint(tmp_path, minutes=5))
    assert steps == [3, 6, 9], "every 300 seconds"
    steps.clear()
    finetuned(data(), xprune.Checkpoint(tmp_path, steps=5, minutes=None))
    assert steps == [5, 10]
    steps.clear()
    finetuned(data(), tmp_path)
    assert steps == [6], "every 10 minutes"


def test_a_step_draws_the_same_numbers_whatever_reading_draws(tmp_path):
    class Plain(Augmented):
        def __getitem__(self, index):
            return self.data[index]

    class Draws(Plain):
        def __getitem__(self, index):
            torch.rand(index)
            return self.data[index]

    a, b = (finetuned(DataLoader(kind(), BATCH, shuffle=True)) for kind in (Plain, Draws))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def written(tmp_path):
    with pytest.raises(Killed):
        finetuned(data(after=3 * BATCH + 1), xprune.Checkpoint(tmp_path, steps=1))
    return tmp_path / "checkpoint.safetensors"


def test_a_checkpoint_of_an_older_xprune_is_refused(written):
    old = {name: header(written.parent)[name] for name in ("state", "fingerprint")}
    save_file(load_file(written), written, old)
    with pytest.raises(xprune.TrainingError, match="written by another version of xprune"):
        finetuned(data(), written.parent)


def test_a_checkpoint_that_was_changed_is_refused(written):
    content, chance = written.read_bytes(), random.Random(0)
    places = [0, 9, 60, 200, len(content) // 2, len(content) - 1, *(chance.randrange(len(content)) for _ in range(12))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        written.write_bytes(changed)
        with pytest.raises(xprune.TrainingError, match=r"damaged|another version"):
            finetuned(data(), written.parent)
    written.write_bytes(content[: len(content) // 2])
    with pytest.raises(xprune.TrainingError, match="damaged"):
        finetuned(data(), written.parent)
