"""Tests that reports show the class names of the task, and know in which direction a metric is better."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import xprune
from tests.support.models import Residual
from xprune.errors import ModelError
from xprune.report import findings
from xprune.report.collect import Measure, by_class, collect, names_of
from xprune.report.text import unseen

NAMES = ("cat", "dog", "a <b> fish")
X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(24) % 3)]


def run(task):
    """Returns the result of a small run."""
    pruner = xprune.Pruner(Residual(3), "taylor", xprune.Budget(params=0.8), finetune=None, task=task, latency=False)
    return pruner.run(BATCHES)


@pytest.fixture(scope="module")
def result():
    return run(xprune.Classification(class_names=NAMES))


def test_names_are_given_once(result, tmp_path):
    assert result.class_names == NAMES == names_of(result, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the model does not name its architecture
        result.save(tmp_path / "saved")
    again = xprune.PruneResult.load(tmp_path / "saved", lambda: Residual(3))
    assert again.class_names == NAMES
    for one in (result, again):
        page = one.report(tmp_path / "report.html").read_text()
        assert "dog" in page and "a <b> fish" not in page
        assert collect(one).classes == NAMES
        labels = {label.get_text() for label in one.plot("accuracy").get_yticklabels()}
        assert labels == set(NAMES)
    assert names_of(result, ["x", "y", "z"]) == ("x", "y", "z"), "names that are given here come first"


def test_names_of_a_file_are_not_believed(result):
    for names in ("cat", ["cat"], [1, 2, 3], None, {"a": 1}):
        edited = replace(result, settings={**result.settings, "classes": names})
        assert names_of(edited, None) == ("class 0", "class 1", "class 2")


def test_classes_without_scores_are_named(result):
    table = result.scores.classwise[0].clone()
    table[1] = torch.nan
    scores = replace(result.scores, classwise=(table,))
    assert "(dog)" in unseen(scores, NAMES) and "(1)" in unseen(scores)
    assert "(dog)" in replace(result, scores=scores).summary()


@pytest.mark.parametrize("names, message", [("cat", "wanted a list of texts"), ([1, 2, 3], "wanted a list of texts")])
def test_names_that_are_no_names_are_refused(names, message):
    for kind in (xprune.Classification, xprune.MultiLabel, xprune.Segmentation, xprune.NodeClassification):
        with pytest.raises(xprune.DataError, match=message):
            kind(class_names=names)


def test_too_few_names_are_refused_before_the_work(result):
    with pytest.raises(xprune.DataError, match="class_names has 2 names, but the model has 3 classes"):
        run(xprune.Classification(class_names=["cat", "dog"]))
    with pytest.raises(ModelError, match="classes= has 2 names"):
        names_of(result, ["cat", "dog"])


class Error(xprune.Classification):
    """Measures an error for each sample, where smaller is better."""

    metric_name, higher_is_better, percent = "cross-entropy", False, False

    def metric(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


def test_a_class_whose_error_rises_got_worse():
    result = run(Error(class_names=NAMES))
    dense, pruned = result.metrics.values()
    assert not dense.higher_is_better
    changes = [after[0] - before[0] for before, after in zip(dense.by_class, pruned.by_class, strict=True)]
    assert [row.index for row in by_class(result.metrics)] == sorted(range(3), key=lambda i: -changes[i])
    facts = collect(result)
    worse, worst = sum(change > 0 for change in changes), NAMES[max(range(3), key=changes.__getitem__)]
    text = findings.accuracy(facts)
    assert text.startswith(f"cross-entropy: {worse} of 3 classes got worse")
    assert worse == 0 or f"{worst} most" in text
    assert Measure.of(dense) == Measure("cross-entropy", 1, "", -1)
    curves = {"fractions": [0.0, 0.5], "own": [1.0, 3.0], "others": [1.0, 2.0]}
    text = findings.faithfulness(collect(result, faithfulness={"taylor": curves}))
    assert text == "taylor: the cross-entropy of a class is on average 0.5 above that of the other classes"
    assert result.plot("accuracy").get_xlabel() == "cross-entropy"
