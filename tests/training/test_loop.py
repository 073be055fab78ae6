"""Tests that a killed training loop continues with the same bits, and that a damaged checkpoint is refused."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

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


@pytest.fixture
def kept_at_every_step(monkeypatch):
    monkeypatch.setattr(loop, "KEPT_EVERY", 0.0)


@pytest.mark.parametrize("learner", LEARNERS)
def test_killed_at_any_step_it_goes_on_to_the_same_bits(learner, kept_at_every_step, tmp_path):
    learn, whole = LEARNERS[learner], LEARNERS[learner](data())
    extra = BATCH if learner == "masks" else 0  # which look at a first batch
    for killed in (2, STEPS - 1, STEPS, STEPS + 3):  # batches that were read; Accelerate reads one ahead
        folder = tmp_path / str(killed)
        torch.rand(7)  # another process would have another state
        with pytest.raises(Killed):
            learn(data(after=extra + killed * BATCH + 1), folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
        state = dict(json.loads(header(folder)["state"])["dict"])
        assert state["step"]["plain"] == (killed - 1 if killed % STEPS else killed)
        random.seed(9)
        found = learn(data(), folder)
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), f"{name}, killed after {killed} batches"
        assert not list(folder.iterdir())


def header(folder):
    content = (folder / "checkpoint.safetensors").read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_the_state_is_kept_when_enough_seconds_have_gone_by(monkeypatch, tmp_path):
    clock, steps = iter(range(0, 10**6, 100)), []  # seconds: each look at the clock is 100 later
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(checkpoint, "write", lambda folder, state, fingerprint: steps.append(state["step"]))
    finetuned(data(), tmp_path)
    assert [step for step in steps if step % STEPS] == [3, 9], "every 300 seconds"
    assert [step for step in steps if not step % STEPS] == [STEPS]


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
def written(kept_at_every_step, tmp_path):
    with pytest.raises(Killed):
        finetuned(data(after=3 * BATCH + 1), tmp_path)
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
