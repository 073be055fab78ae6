"""Tests the tasks of tokens: language models, labels of tokens, and batches as mappings."""

import pytest
import torch

import xprune
from tests.support.hugging_face_models import build

pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")


def test_the_loss_of_a_language_model_is_its_own():
    model, inputs = build("hf llama")
    task, ids = xprune.LanguageModel(), inputs["input_ids"]
    _, targets = task.unpack({"input_ids": ids})
    with torch.no_grad():
        ours, theirs = task.loss(task.forward(model, {"input_ids": ids}), targets), model(ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)


def test_tokens_without_labels_do_not_count():
    task = xprune.TokenClassification()
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    _, targets = task.unpack({"input_ids": torch.zeros(2, 5).long(), "labels": torch.full((2, 5), -100)})
    targets[0, 1], targets[1, 2:] = 3, torch.tensor([4, 5, 6])
    task.check(logits, targets)
    logs = logits.log_softmax(-1)
    by_hand = -(logs[0, 1, 3] + (logs[1, 2, 4] + logs[1, 3, 5] + logs[1, 4, 6]) / 3) / 2
    torch.testing.assert_close(task.loss(logits, targets), by_hand)
    expected = [float(logits[0, 1].argmax() == 3), float((logits[1, 2:].argmax(-1) == targets[1, 2:]).float().mean())]
    torch.testing.assert_close(task.metric(logits, targets), torch.tensor(expected))
    batch = {"input_ids": targets.abs(), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    assert xprune.LanguageModel().unpack(batch)[1][1].tolist()[2:] == [-100] * 3


BAD = {
    "no labels": (xprune.Classification(), {"input_ids": torch.zeros(2, 3).long()}, "with 'labels'"),
    "no ids": (xprune.LanguageModel(), {"labels": torch.zeros(2, 3).long()}, "with 'input_ids'"),
    "a pair": (xprune.LanguageModel(), (torch.zeros(2, 3), torch.zeros(2, 3)), "TokenClassification"),
    "a label for a row": (
        xprune.TokenClassification(),
        {"x": 0, "labels": torch.zeros(2).long()},
        r"\(batch, tokens\)",
    ),
}


@pytest.mark.parametrize("how", BAD)
def test_batches_that_do_not_fit_are_refused(how):
    task, batch, message = BAD[how]
    with pytest.raises(xprune.DataError, match=message):
        task.unpack(batch)


@pytest.mark.parametrize("targets", [[[1, 7, 2]], [[1, -3, 2]]])
def test_labels_that_do_not_fit_are_refused(targets):
    with pytest.raises(xprune.DataError, match="out of range"):
        xprune.LanguageModel().check(torch.zeros(1, 3, 7), torch.tensor(targets))
