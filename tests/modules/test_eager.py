"""Tests that models with compiled or checkpointed parts are pruned as the same models without."""

import threading

import pytest
import torch
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import xprune
from tests.support.ordinary_models import net, pairs, tokens
from xprune.modules.eager import eager


def compiled_block():
    model = net()
    model.block = torch.compile(model.block, backend="eager")
    return model


def compiled_mlp():
    model = net()
    model.block.mlp = torch.compile(model.block.mlp, backend="eager")
    return model


def compiled_in_place():
    model = net()
    model.block.compile(backend="eager")
    return model


WAYS = {
    "reentrant checkpointing": lambda: net(lambda block, x: checkpoint(block, x, use_reentrant=True)),
    "checkpointing": lambda: net(lambda block, x: checkpoint(block, x, use_reentrant=False)),
    "a compiled block": compiled_block,
    "a compiled MLP": compiled_mlp,
    "compiled in place": compiled_in_place,
}


CASES = [(way, "taylor") for way in WAYS]
CASES += [("reentrant checkpointing", "xpruner,steps=3"), ("a compiled MLP", "captum:IntegratedGradients,n_steps=2")]


@pytest.mark.parametrize(("way", "criterion"), CASES)
def test_the_scores_are_those_of_the_plain_model(way, criterion):
    model, plain = WAYS[way](), net()
    sites, expected_sites = xprune.find_sites(model, tokens()), xprune.find_sites(plain, tokens())
    assert [(site.kind, site.size, site.batch) for site in sites] == [(s.kind, s.size, s.batch) for s in expected_sites]
    found = xprune.score(model, sites, pairs(), criterion)
    expected = xprune.score(plain, expected_sites, pairs(), criterion)
    for one, other in zip(found.values, expected.values, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["reentrant checkpointing", "a compiled MLP"])
def test_a_whole_run_gives_the_plain_models_weights(way):
    def weights(model):
        settings = xprune.Finetune(epochs=2)
        budget = xprune.Budget(params=0.8)
        result = xprune.Pruner(model, "taylor", budget, "learned,steps=2", settings, latency=False).run(pairs())
        return [weight.detach() for weight in result.model.parameters()]

    for found, expected in zip(weights(WAYS[way]()), weights(net()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_callers_checkpointing_is_put_back():
    module = torch.utils.checkpoint
    with eager(), eager():
        assert module.CheckpointFunction is not CheckpointFunction
    assert module.CheckpointFunction is CheckpointFunction
    with pytest.raises(ZeroDivisionError), eager():
        raise ZeroDivisionError
    assert module.CheckpointFunction is CheckpointFunction


def test_blocks_of_two_threads_restore_the_settings():
    """The second thread begins inside the first one's block, and ends after it."""
    inside, first_ended = threading.Event(), threading.Event()
    module = torch.utils.checkpoint
    torch.compile(net())  # imports the compiler
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def second():
        with eager():
            inside.set()
            first_ended.wait(10)

    thread = threading.Thread(target=second)
    with eager():
        thread.start()
        assert inside.wait(10)
    assert module.CheckpointFunction is not CheckpointFunction
    first_ended.set()
    thread.join()
    assert module.CheckpointFunction is CheckpointFunction
    torch.compile(net(), backend=backend)(tokens())
    assert compiled


def test_a_compiled_part_is_timed_as_compiled(monkeypatch):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    model = net()
    model.block = torch.compile(model.block, backend=backend)
    xprune.find_sites(model, tokens())
    assert not calls
    xprune.latency(model, tokens())
    assert calls
