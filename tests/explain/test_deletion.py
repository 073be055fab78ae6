"""Compares the curves of `faithfulness` with a slow version that gates one class at a time."""

import json
import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr

import xprune
from tests.support.models import CLASSES, build, images, loader
from xprune.core.scores import LowRank
from xprune.explain import agreement, contrast, faithfulness
from xprune.explain.deletion import _average_ranks

ROWS = 2 * CLASSES
FRACTIONS = (0.2, 0.6)


class Probability(xprune.Classification):
    """Classification measured by the probability of the label, which every gate changes."""

    metric_name = "probability"

    def metric(self, outputs, targets):
        return outputs.softmax(-1).gather(1, targets[:, None])[:, 0]


TASK = Probability()


@pytest.fixture(scope="module")
def model():
    """Returns a model whose outputs depend on its units."""
    found = build("vit")
    with torch.no_grad():
        for site in xprune.find_sites(found, images()):
            found.get_submodule(site.consumers[0]).weight *= 12
    return found


@pytest.fixture(scope="module")
def scores(model):
    return xprune.score(model, xprune.find_sites(model, images()), loader(ROWS, 7), "captum:InputXGradient")


def by_hand(model, scores, label, fraction, order, insert=False):
    """Returns the mean probability of the label with the gates of one class.

    The first number is that of the samples of the class, the second that of the other samples.
    """
    gates = []
    for table in scores.classwise:
        row = table[label] if order == "scores" else table[label] - table.mean(0)
        gone = [
            unit
            for place, unit in enumerate(row.argsort(descending=True).tolist())
            if (place + 0.5) / len(row) < fraction
        ]
        gate = torch.full((len(row),), 0.0 if insert else 1.0)
        gate[torch.tensor(gone, dtype=torch.long)] = 1.0 if insert else 0.0
        gates.append(gate)
    x, y = (torch.cat(parts) for parts in zip(*loader(ROWS, 7), strict=True))
    with torch.no_grad(), xprune.Gates(scores.sites, gates).attached(model):
        right = Probability().metric(model(x), y)
    return float(right[y == label].mean()), float(right[y != label].mean())


@pytest.mark.parametrize("order", ["scores", "contrast"])
def test_curves_by_hand(model, scores, order):
    found = faithfulness(
        model,
        scores,
        loader(ROWS, 5),
        order=order,
        fractions=FRACTIONS,
        others=CLASSES - 1,
        chance=1,
        task=Probability(),
    )
    seen = set()
    for curves, insert in ((found.deletion, False), (found.insertion, True)):
        for index, fraction in enumerate(FRACTIONS):
            for label in range(CLASSES):
                wanted = by_hand(model, scores, label, fraction, order, insert)
                got = curves.own[index][label], curves.others[index][label]
                assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5), f"{fraction} class {label}"
                seen.add(round(got[0], 4))
    assert len(seen) > CLASSES, "the curves say nothing"
    assert found.samples == ROWS
    gaps = [
        (found.deletion.dense[c] - found.deletion.own[i][c])
        - (found.deletion.others_dense[c] - found.deletion.others[i][c])
        for i in range(2)
        for c in range(CLASSES)
    ]
    assert found.gap == pytest.approx(sum(gaps) / len(gaps)) and found.insertion_gap == pytest.approx(
        -found.insertion.gap
    )


def test_one_order_for_all_classes_has_no_gap(model, scores):
    found = faithfulness(
        model, scores, loader(ROWS, 7), others=CLASSES - 1, fractions=(0.4,), chance=0, task=Probability()
    )
    # Every class has as many samples, and every sample is measured with the gates of every class.
    assert found.agnostic.gap == pytest.approx(0, abs=1e-6)
    assert found.agnostic.own != found.deletion.own


def test_the_same_seed_gives_the_same_and_the_model_is_left_alone(model, scores):
    from xprune.testing import assert_untouched, snapshot

    before = snapshot(model)
    first, second = (
        faithfulness(model, scores, loader(ROWS, 7), fractions=(0.4,), seed=4, chance=2, task=TASK) for _ in range(2)
    )
    assert first == second and first.chance[0] != first.chance[1]
    assert_untouched(model, before)


def test_factors_are_read_as_the_table_they_stand_for(model, scores):
    sites, generator = scores.sites, torch.Generator().manual_seed(0)
    factors = []
    for site in sites:
        left, right = torch.randn(CLASSES, 2, generator=generator), torch.randn(2, site.size, generator=generator)
        factors.append(LowRank(left, right, torch.randn(site.size, generator=generator)))
    low = xprune.Scores(sites, scores.values, "low", tuple(factors))
    full = xprune.Scores(sites, scores.values, "low", tuple(factor[:] for factor in factors))
    for order in ("scores", "contrast"):
        a, b = (
            faithfulness(model, each, loader(ROWS, 7), order=order, chance=0, fractions=(0.4,)) for each in (low, full)
        )
        assert a == b
        assert all(value == pytest.approx(1) for row in agreement(low, full, order).values() for value in row)
    torch.testing.assert_close(contrast(factors[0])[:], contrast(factors[0][:]))


def test_classes_without_scores_are_left_out(model, scores):
    tables = tuple(table.clone() for table in scores.classwise)
    for table in tables:
        table[2] = torch.nan
    some = xprune.Scores(scores.sites, scores.values, "some", tables)
    found = faithfulness(model, some, loader(ROWS, 7), fractions=FRACTIONS, others=CLASSES - 1, chance=0)
    assert math.isnan(found.deletion.own[0][2]) and math.isnan(found.deletion.others[0][2])
    assert math.isfinite(found.gap)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["deletion"]["own"][0][2] is None
    assert all(math.isnan(row[2]) and not math.isnan(row[1]) for row in agreement(some, scores).values())


def test_agreement_is_spearmans(model, scores):
    other = xprune.score(model, scores.sites, loader(ROWS, 7), "taylor")
    found = agreement(scores, other)
    for site, a, b in zip(scores.sites, scores.classwise, other.classwise, strict=True):
        wanted = [spearmanr(a[c], b[c]).statistic for c in range(CLASSES)]
        assert found[site.name] == pytest.approx(wanted, abs=1e-6)


def _table_of_ranks():
    """Yields tables with unusual ranks: ties, equal values, infinities, signed zeros, a single value and NaN."""
    chance = torch.Generator().manual_seed(0)
    yield torch.rand(3, 9, generator=chance)
    yield torch.randint(4, (5, 11), generator=chance).float()
    yield torch.zeros(2, 6)
    yield torch.tensor([[torch.inf, 0.0, -torch.inf, 0.0, torch.inf]])
    yield torch.tensor([[-0.0, 0.0, 1e-30, -1e-30]])
    yield torch.tensor([[3.0], [1.0]])
    yield torch.tensor([[1.0, torch.nan, 1.0], [1.0, 2.0, 1.0]])


@pytest.mark.parametrize("values", list(_table_of_ranks()))
def test_equal_values_share_their_ranks(values):
    expected = rankdata(values.double().numpy(), axis=1, nan_policy="propagate")
    torch.testing.assert_close(_average_ranks(values.double()), torch.from_numpy(expected), equal_nan=True)


def test_table_and_picture(model, scores):
    pytest.importorskip("matplotlib")
    found = faithfulness(model, scores, loader(ROWS, 7), fractions=FRACTIONS, chance=1)
    assert found.table().row_count == len(found.fractions)
    axes = found.plot()
    assert len(axes.lines) == 4 and axes.get_xlabel() and found.plot(axes) is axes
    assert json.loads(json.dumps(found.to_json()))["gaps"]["deletion"] == pytest.approx(found.gap)


def test_what_cannot_be_measured_is_refused(model, scores):
    plain = xprune.score(model, scores.sites, criterion="magnitude")
    with pytest.raises(xprune.PluginError, match="magnitude has no class-wise scores"):
        faithfulness(model, plain, loader(ROWS, 7))
    for bad in ({"order": "values"}, {"fractions": (0.0,)}, {"fractions": ()}, {"others": 0}, {"chance": -1}):
        with pytest.raises(xprune.PluginError, match="faithfulness: "):
            faithfulness(model, scores, loader(ROWS, 7), **bad)
    few = xprune.Scores(scores.sites, scores.values, "few", tuple(table[:3] for table in scores.classwise))
    with pytest.raises(xprune.DataError, match="scores are of 3 classes, the task has 7"):
        faithfulness(model, few, loader(ROWS, 7))
    with pytest.raises(xprune.PluginError, match="different sites"):
        agreement(scores, xprune.Scores(scores.sites[:1], scores.values[:1], "one", scores.classwise[:1]))


def test_compare_has_the_gap_as_a_column(model, tmp_path):
    grid = xprune.Grid({"chance": "random", "taylor": "taylor"}, seeds=(0,), finetune=None, faithfulness=True)
    found = xprune.compare(xprune.Case(model, loader(ROWS, 7), loader(ROWS, 7)), grid, tmp_path)
    rows = {row["criterion"]: row for row in found.rows}
    scores = xprune.score(model, xprune.find_sites(model, images()), loader(ROWS, 7), "taylor")
    wanted = faithfulness(model, scores, loader(ROWS, 7), insertion=False, chance=0, agnostic=False).gap
    assert rows["taylor"]["deletion_gap"] == pytest.approx(wanted)
    assert "deletion_gap" not in rows["chance"] and "deletion_gap" not in rows["dense"]
    heading, _, *lines = found.markdown().splitlines()
    assert "class-specific gap" in heading and f"| {100 * wanted:.1f} |" in lines[-1]
