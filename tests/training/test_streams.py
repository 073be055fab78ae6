"""Tests that loaders without a length give what a list of the same batches gives, in every stage."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import xprune
from tests.support.models import Killed
from tests.support.ordinary_models import labels, net, pairs, tokens

ROWS, BATCH = 12, 6


class Stream(IterableDataset):
    """Samples that can only be iterated."""

    def __iter__(self):
        return iter(zip(tokens(ROWS), labels(ROWS), strict=True))


class SizedStream(Stream):
    """A stream that knows its length."""

    def __len__(self):
        return ROWS


class Batches:
    """A generator that starts again at each iteration."""

    def __iter__(self):
        yield from pairs(ROWS, BATCH)


class Endless:
    """Batches without an end."""

    def __iter__(self):
        while True:
            yield from pairs(ROWS, BATCH)


LOADERS = {
    "a data set that is iterated": lambda: DataLoader(Stream(), BATCH),
    "the same, with a length": lambda: DataLoader(SizedStream(), BATCH),
    "a generator": Batches,
    "a data set of batches": lambda: DataLoader(pairs(ROWS, BATCH), batch_size=None),
    "a sampler of batches": lambda: DataLoader(list(Stream()), batch_sampler=[list(range(6)), list(range(6, 12))]),
}


def scores(criterion):
    return lambda data: torch.cat(xprune.score(net(), xprune.find_sites(net(), tokens()), data, criterion).values)


def tuned(data):
    return torch.cat([w.flatten() for w in xprune.finetune(net(), data, xprune.Finetune(steps=5)).parameters()])


def run(data):
    settings = xprune.Finetune(steps=5)
    budget = xprune.Budget(params=0.8)
    pruner = xprune.Pruner(net(), "taylor", budget, "learned,steps=3", settings, latency=False)
    result = pruner.run(data, data)
    return torch.tensor([metrics.loss for metrics in result.metrics.values()])


STAGES = {
    "evaluate": lambda data: torch.tensor(xprune.evaluate(net(), data).loss),
    "taylor": scores("taylor"),
    "xpruner": scores("xpruner,steps=5"),
    "captum": scores("captum:IntegratedGradients,n_steps=2"),
    "finetune": tuned,
    "Pruner": run,
}
EXPECTED = {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_stream_gives_what_a_list_gives(name, stage):
    if stage not in EXPECTED:
        EXPECTED[stage] = STAGES[stage](pairs(ROWS, BATCH))
    torch.testing.assert_close(STAGES[stage](LOADERS[name]()), EXPECTED[stage])


def test_compare_reads_a_stream(tmp_path):
    case = xprune.Case(net(), DataLoader(Stream(), BATCH), DataLoader(SizedStream(), BATCH))
    budgets, settings = (xprune.Budget(params=0.8),), xprune.Finetune(steps=3)
    grid = xprune.Grid({"taylor": "taylor"}, budgets=budgets, seeds=(0,), finetune=settings)
    compared = xprune.compare(case, grid, tmp_path / "compared")
    assert len(compared.rows) == 2


def test_without_a_number_of_steps_it_is_asked_for_before_the_work(monkeypatch):
    with pytest.raises(xprune.DataError, match=r"needs a loader with a length.*Finetune\(steps=\.\.\.\)"):
        xprune.finetune(net(), Batches())
    monkeypatch.setattr(xprune.pipeline.Run, "score", lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(xprune.DataError, match=r"Finetune\(steps=\.\.\.\)"):
        xprune.Pruner(net(), "taylor", latency=False).run(Batches())


def test_steps_count_whatever_the_length(tmp_path):
    # Five steps over two batches: three epochs, the last one not whole.
    assert torch.equal(tuned(Endless()), tuned(pairs(ROWS, BATCH)))
    with pytest.raises(xprune.TrainingError, match=r"Finetune\(steps=0\) is out of range"):
        xprune.Finetune(steps=0)


def test_a_loader_with_fewer_batches_than_its_length_says_takes_all_steps():
    class Short(list):
        def __len__(self):
            return 5

    model = xprune.finetune(net(), Short(pairs(ROWS, BATCH)), xprune.Finetune(epochs=1))
    expected = xprune.finetune(net(), pairs(ROWS, BATCH), xprune.Finetune(steps=5))
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_killed_run_over_a_stream_goes_on_to_the_same_bits(tmp_path):
    every = xprune.Checkpoint(tmp_path, steps=1)

    class Breaks(Batches):
        left = 3

        def __iter__(self):
            for batch in pairs(ROWS, BATCH):
                if not self.left:
                    raise Killed
                self.left -= 1
                yield batch

    settings, whole = xprune.Finetune(steps=5), tuned(Batches())
    with pytest.warns(UserWarning, match="not known to be seeded"), pytest.raises(Killed):
        xprune.finetune(net(), Breaks(), settings, checkpoint_dir=every)
    with pytest.warns(UserWarning, match="not known to be seeded"):
        model = xprune.finetune(net(), Batches(), settings, checkpoint_dir=tmp_path)
    assert torch.equal(torch.cat([weight.flatten() for weight in model.parameters()]), whole)


def test_a_stream_that_ends_for_good_is_named():
    class Once:
        """Yields its batches only in the first iteration."""

        batches = iter(pairs(ROWS, BATCH))

        def __iter__(self):
            yield from self.batches

    with pytest.raises(xprune.DataError, match="epoch 2: the loader is empty"):
        xprune.finetune(net(), Once(), xprune.Finetune(steps=5))
