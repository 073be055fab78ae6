"""Tests tasks that users write: metrics, inputs of every form, the sample axis, and tasks of xprune 0.1."""

import math
import warnings

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import xprune
from tests.support.models import CLASSES, build, images, loader
from tests.support.tasks import OldMeanSquare, Rank, pairs
from xprune.core.task import example_of, unpacked
from xprune.pipeline import Run


def regressor():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4)), nn.Linear(4, 1))


@pytest.mark.parametrize("criterion", ["taylor", "xpruner,steps=6"])
def test_one_class_from_outside_is_all_that_a_task_needs(criterion, tmp_path):
    data = DataLoader(pairs(24), batch_size=8)
    tune = xprune.Finetune(epochs=2, lr=1e-2)
    result = xprune.Pruner(regressor(), criterion, xprune.Budget(params=0.7), finetune=tune, task=Rank()).run(data)
    with torch.no_grad():
        x, y = pairs(24).tensors
        for name, model in (("dense", result.dense), ("finetuned", result.model)):
            metrics = result.metrics[name]
            assert metrics.metric == pytest.approx(spearmanr(model(x)[:, 0], y).statistic, abs=1e-5)
            assert (metrics.metric_name, metrics.by_class, metrics.samples) == ("rank correlation", (), 24)
    assert "rank correlation" in result.summary()
    result.save(tmp_path / "pruned")


def test_a_task_of_the_last_release_still_works():
    with pytest.warns(DeprecationWarning, match=r"Counts\.summarise will be removed .* `new_metric`"):

        class Counts(OldMeanSquare):
            def summarise(self, total, samples):
                return super().summarise(total, samples)

    data = DataLoader(pairs(24), batch_size=8)
    result = xprune.Pruner(regressor(), "taylor", xprune.Budget(params=0.7), finetune=None, task=Counts()).run(data)
    x, y = pairs(24).tensors
    with torch.no_grad():
        expected = (result.model(x)[:, 0] - y).square().mean().sqrt()
    assert result.metrics["pruned"].metric == pytest.approx(float(expected), rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Plain(Rank):
            """A task of now, so it gives no warning."""


class Sure(xprune.Classification):
    """Gives a number for each sample (`metric`)."""

    metric_name = "probability"

    def metric(self, outputs, targets):
        return outputs.softmax(-1).gather(1, targets[:, None])[:, 0]


class F1(xprune.Classification):
    """Gives a metric of the whole data set (`new_metric`)."""

    metric_name = "F1"

    def new_metric(self, outputs):
        return MulticlassF1Score(outputs.shape[1], average="macro")


class Both(F1):
    """Gives both kinds of metric."""

    def new_metric(self, outputs):
        return super().new_metric(outputs)

    def metric(self, outputs, targets):
        return Sure.metric(self, outputs, targets)


class Again(F1):
    """Gives a number for each sample, while its base gives a metric of the data set."""

    def metric(self, outputs, targets):
        return Sure.metric(self, outputs, targets)


class Mixed(Again, Sure):
    """Inherits both kinds of metric. The nearest class decides."""


def by_hand(task, outputs, targets):
    hits = outputs.softmax(-1)[range(len(targets)), targets]
    f1 = []
    for kind in range(outputs.shape[1]):
        said, is_ = outputs.argmax(1) == kind, targets == kind
        f1 += [2 * float((said & is_).sum()) / float(said.sum() + is_.sum())] if (said | is_).any() else []
    return sum(f1) / len(f1) if isinstance(task, F1) and not isinstance(task, Again) else float(hits.mean())


@pytest.mark.parametrize("kind, per_class", [(Sure, True), (F1, False), (Both, True), (Again, True), (Mixed, True)])
def test_a_class_that_gives_one_metric_does_not_inherit_another(kind, per_class):
    model, data = build("vit"), loader(23, 8)
    metrics = xprune.evaluate(model, data, task=kind())
    x, y = data.dataset.tensors
    with torch.no_grad():
        outputs = model(x)
    assert metrics.metric == pytest.approx(by_hand(kind(), outputs, y), rel=1e-5)
    assert bool(metrics.by_class) == per_class
    if per_class:
        means = [float(outputs.softmax(-1)[y == label, label].mean()) for label in range(CLASSES)]
        assert [mean for mean, _ in metrics.by_class] == pytest.approx(means, rel=1e-5)


def test_the_accuracy_is_the_mean_of_samples_to_the_last_bit():
    model, data = build("vit"), loader(23, 8)
    metrics = xprune.evaluate(model, data)
    x, y = data.dataset.tensors
    with torch.no_grad():
        outputs = model(x)
    right = int((outputs.argmax(1) == y).sum())
    assert metrics.metric == right / 23
    assert metrics.metric == pytest.approx(float(MulticlassAccuracy(CLASSES, average="micro")(outputs, y)))
    assert sum(mean * n for mean, n in metrics.by_class) == pytest.approx(right)
    one_class = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    assert xprune.evaluate(one_class, [(torch.randn(3, 4), torch.zeros(3).long())]).metric == 1


def test_faithfulness_needs_a_metric_of_a_sample():
    model = build("vit")
    scores = xprune.score(model, xprune.find_sites(model, images()), loader(), "taylor", task=F1())
    with pytest.raises(
        xprune.DataError, match=r"F1 has no metric for each sample, which faithfulness needs: implement Task\.metric"
    ):
        xprune.explain.faithfulness(model, scores, loader(), task=F1())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_metrics_do_not_depend_on_the_default_dtype(dtype):
    model, data = build("vit"), loader(23, 8)
    expected = [xprune.evaluate(model, data, task=task).metric for task in (Sure(), xprune.Classification())]
    torch.set_default_dtype(dtype)
    try:
        found = [xprune.evaluate(model, data, task=task).metric for task in (Sure(), xprune.Classification())]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


class Broken(Sure):
    """Gives NaN for some samples."""

    def metric(self, outputs, targets):
        return torch.where(targets == 0, torch.nan, super().metric(outputs, targets))


class Several(xprune.Classification):
    """Gives a number for each class, where one number is expected."""

    def new_metric(self, outputs):
        return MulticlassAccuracy(outputs.shape[1], average=None)


class Silent(Rank):
    """Has no metric."""

    new_metric, update = xprune.Task.new_metric, xprune.Task.update


def test_metrics_that_are_no_number():
    assert math.isnan(xprune.evaluate(build("vit"), loader(), task=Broken()).metric), (
        "a sample that fails is not left out"
    )
    with pytest.raises(xprune.DataError, match=r"MulticlassAccuracy of Several gives a tensor \(7,\), wanted one numb"):
        xprune.evaluate(build("vit"), loader(), task=Several())
    with pytest.raises(xprune.DataError, match="Silent has no metric: implement `metric`"):
        xprune.evaluate(regressor(), DataLoader(pairs(4), 2), task=Silent())


class Detector(nn.Module):
    """A model that takes a list of images of different sizes, a mask for all of them and a number."""

    def __init__(self):
        super().__init__()
        self.mlp, self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)), nn.Linear(6, CLASSES)

    def forward(self, images, mask, scale):
        assert isinstance(images, list) and mask.shape == (6, 6) and scale.dim() == 0
        means = torch.stack([image.mean((1, 2)) for image in images])
        return self.head(means + self.mlp(means @ mask * scale))


class Lists(xprune.Classification):
    """A task whose batches are (list of images, labels)."""

    def unpack(self, batch):
        images, labels = batch
        return ([*images], torch.eye(6), torch.tensor(2.0)), torch.tensor(labels)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "captum:InputXGradient", "xpruner,steps=6"])
def test_a_list_of_images_a_shared_mask_and_a_number(criterion):
    torch.manual_seed(0)
    data = [(torch.randn(6, 3 + i % 4, 5), i % CLASSES) for i in range(12)]
    given = DataLoader(data, batch_size=4, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))
    tune = xprune.Finetune(epochs=1)
    result = xprune.Pruner(Detector(), criterion, xprune.Budget(params=0.8), finetune=tune, task=Lists()).run(given)
    assert [site.name for site in result.plan.sites] == ["mlp"] and result.plan.removed
    assert result.metrics["pruned"].samples == 12
    assert result.metrics["dense"].macs == 6 * 6 + 2 * 6 * 10 + 6 * CLASSES, "of a sample, not of an image's row"


class Twice(nn.Module):
    """A task whose model takes two arguments."""

    def __init__(self):
        super().__init__()
        self.mlp, self.head = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)), nn.Linear(4, CLASSES)

    def forward(self, first, second):
        return self.head(first + self.mlp(first + second))


def test_torchs_default_collation_of_tuples_gives_arguments():
    rows = [((torch.randn(4), torch.randn(4)), i % CLASSES) for i in range(9)]
    data = DataLoader(rows, batch_size=3)
    assert isinstance(next(iter(data))[0], list)
    assert isinstance(unpacked(next(iter(data)))[0], tuple)
    kept = [torch.zeros(3, 4)]
    assert unpacked((kept, torch.zeros(1)))[0] is kept
    result = xprune.Pruner(Twice(), "taylor", xprune.Budget(params=0.7), finetune=None).run(data)
    assert result.plan.removed


class Sequence(nn.Module):
    """Classifies sequences (tokens, batch, 8) by the mean over their tokens."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, CLASSES)
        self.tokens = 1 if batch_first else 0

    def forward(self, x):
        return self.head(self.encoder(x).mean(self.tokens))


# With 5 samples of 5 tokens, the shape does not say which axis is which.
@pytest.mark.parametrize("samples", [3, 5])
def test_sequence_first_inputs_are_cut_along_their_own_axis(samples):
    x, y = torch.randn(5, samples, 8), torch.arange(samples) % CLASSES
    task = xprune.Classification(batch_axis=1)
    assert torch.equal(example_of(task, x, y), x[:, :2])
    assert torch.equal(task.example(x), x[:, :2])
    metrics = []
    for first in (False, True):
        torch.manual_seed(0)
        model, data = Sequence(first).eval(), [(x.transpose(0, 1) if first else x, y)]
        metrics.append(xprune.evaluate(model, data, task=xprune.Classification(batch_axis=1 - first)))
    assert metrics[0].loss == pytest.approx(metrics[1].loss) and metrics[0].samples == samples


# With 5 samples of 5 tokens, only the model shows which axis is which.
@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("criterion", ["taylor", "xpruner,steps=4"])
def test_a_run_finds_the_axis_of_the_samples(samples, criterion):
    x, y, found = torch.randn(5, samples, 8), torch.arange(samples) % CLASSES, []
    for first in (True, False):
        torch.manual_seed(0)
        data = [(x.transpose(0, 1).contiguous() if first else x, y)]
        budget = xprune.Budget(macs=0.7)
        found.append(xprune.Pruner(Sequence(first).eval(), criterion, budget, finetune=None, latency=False).run(data))
    assert found[0].plan.keeps == found[1].plan.keeps
    for stage in ("dense", "pruned"):
        assert found[0].metrics[stage].macs == found[1].metrics[stage].macs
    for a, b in zip(found[0].scores.values, found[1].scores.values, strict=True):
        torch.testing.assert_close(a, b)


def test_a_square_batch_of_tokens_is_read_by_the_axis_that_was_found():
    model = Sequence(False)
    # Now the model gives a class for each token: (tokens, batch, classes).
    model.forward = lambda x: model.head(model.encoder(x))
    labels = torch.arange(25).view(5, 5) % CLASSES
    run = Run(model, [(torch.randn(5, 5, 8), labels)], task=xprune.TokenClassification(), latency=False)
    assert torch.equal(run.first[1], run.task.unpack((None, labels))[1])


def test_another_axis_of_samples_is_refused_by_name():
    with pytest.raises(xprune.DataError, match=r"3 samples, but no input has 3 rows along axis 0.*\(5, 3, 8\).*axis=1"):
        xprune.Classification().example(torch.randn(5, 3, 8), 3)
    for kind, axis in ((xprune.Classification, -1), (xprune.Segmentation, -1), (xprune.Classification, "1")):
        with pytest.raises(xprune.DataError, match=f"batch_axis={axis!r}, wanted a whole number"):
            kind(batch_axis=axis)


@pytest.mark.parametrize("kind", [xprune.TokenClassification, xprune.Classification, xprune.Segmentation])
def test_tasks_need_no_arguments(kind):
    assert (kind().batch_axis, kind(batch_axis=1).batch_axis) == (0, 1)


def test_subclasses_that_do_not_know_the_axis():
    class Own(xprune.Classification):
        def __init__(self, weight):
            self.weight = weight

    assert Own(2.0).batch_axis == 0 and torch.equal(Own(2.0).example(images()), images())


def test_tokens_that_come_sequence_first():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    tokens = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.where(tokens < 4, tokens, -100)
    labels[:, 0] = 1
    plain, turned = xprune.TokenClassification(), xprune.TokenClassification(batch_axis=1)
    expected = xprune.evaluate(model, [(tokens, labels)], task=plain)
    assert xprune.evaluate(model, [(tokens.T, labels.T)], task=turned) == expected
    with torch.no_grad():
        logits = model(tokens)
    losses = [F.cross_entropy(row, wanted, ignore_index=-100) for row, wanted in zip(logits, labels, strict=True)]
    assert expected.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    shares = [
        float((row.argmax(-1) == wanted)[wanted != -100].float().mean())
        for row, wanted in zip(logits, labels, strict=True)
    ]
    assert expected.metric == pytest.approx(sum(shares) / 3, rel=1e-6)
