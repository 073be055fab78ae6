"""Tests comparisons whose metric is not the accuracy: an error, where smaller is better and nothing is in %."""

import pytest
import torch

import xprune
from tests.support.models import Residual
from xprune.comparison.table import Comparison
from xprune.explain.curves import Curves, Faithfulness


def rows(**figures):
    """Returns two rows of criteria with an error, and one of the dense model."""
    shared = {"seed": 0, "metric_name": "RMSE", "higher_is_better": False, "percent": False, "macs": 0.5, **figures}
    return (
        {**shared, "criterion": "dense", "selection": "", "budget": "", "metric": 1.0},
        {**shared, "criterion": "good", "selection": "global", "budget": "macs 0.5", "metric": 1.25},
        {**shared, "criterion": "bad", "selection": "global", "budget": "macs 0.5", "metric": 12.5},
    )


def test_errors_are_shown_as_they_are(tmp_path):
    found = Comparison(rows(), {})
    assert found.metric_name == "RMSE" and not found.higher_is_better
    assert "| good | global | 1.250 |" in found.markdown() and "| bad | global | 12.500 |" in found.markdown()
    assert found.table().title == "RMSE: mean ± standard deviation over 1 seeds"
    plain = Comparison(tuple({k: v for k, v in row.items() if k not in KEYS} for row in rows()), {})
    assert plain.metric_name == "accuracy, %" and plain.higher_is_better, "files of older versions hold accuracies"
    assert found.plot(tmp_path / "picture.png").is_file()


KEYS = ("metric_name", "higher_is_better", "percent")


def test_the_best_of_a_picture_is_at_the_top(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "set_yticks", lambda axis, ticks, labels=None, **_: drawn.append(list(labels)))
    Comparison(rows(), {}).plot(tmp_path / "picture.png")
    # The last line is drawn at the top.
    assert drawn == [["bad", "good", "dense"]] or drawn == [["bad", "good"]]


def test_a_comparison_of_a_regression(tmp_path):
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x, x.sum(1))]
    task = xprune.Regression(measure="MAE")
    grid = xprune.Grid({"taylor": "taylor"}, budgets=(xprune.Budget(params=0.8),), seeds=(0,), finetune=None, task=task)
    found = xprune.compare(xprune.Case(Residual(1), batches, batches), grid, tmp_path)
    assert {key: found.rows[1][key] for key in KEYS} == {
        "metric_name": "MAE",
        "higher_is_better": False,
        "percent": False,
    }
    expected = (Residual(1)(x)[:, 0] - x.sum(1)).abs().mean()
    assert found.rows[0]["metric"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_gap_of_an_error_has_the_sign_of_a_loss():
    # Without its units, the error of the class rises from 1 to 3. That of the others rises from 1 to 2.
    curves = Curves(own=((3.0,),), others=((2.0,),), dense=(1.0,), others_dense=(1.0,))
    found = Faithfulness(
        "taylor", "scores", "error", 9, (0.1,), curves, curves, (curves,), curves, higher_is_better=False
    )
    assert found.gap == 1 and found.insertion_gap == -1
    assert found.to_json()["gaps"] == {"deletion": 1, "insertion": -1, "chance": [1], "agnostic": 1}
    assert Faithfulness("taylor", "scores", "accuracy", 9, (0.1,), curves, None, (), None).gap == -1
