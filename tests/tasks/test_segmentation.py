"""Tests the task of segmentation: its loss, its classes and the mIoU over a data set."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import xprune
from tests.support.models import CLASSES, VIT, images
from xprune.criteria.xpruner.learner import OBJECTIVES
from xprune.testing import check_criterion, check_selection, perturb

VOID = 255
QUICK = {"xpruner": "xpruner,steps=6", "captum:IntegratedGradients": "captum:IntegratedGradients,n_steps=4"}
TASK = xprune.Segmentation(ignore_index=VOID)


class Segmenter(nn.Module):
    """A tiny ViT with a classifier for each patch."""

    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(**VIT, num_classes=0, global_pool="", class_token=False)
        self.head = nn.Conv2d(24, CLASSES, 1)

    def forward(self, x):
        return self.head(self.vit(x).transpose(1, 2).unflatten(2, (4, 4)))


def build():
    torch.manual_seed(0)
    return perturb(Segmenter())


def labels(rows, seed=0):
    """Returns labels with two classes in each image, and pixels to ignore."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, CLASSES, (rows, 1, 1), generator=generator).expand(rows, 32, 32).clone()
    first[:, 16:] = (first[:, 16:] + 2) % CLASSES
    first[:, :, 28:] = VOID
    return first


def loader(rows=8, batch=4):
    return DataLoader(TensorDataset(images(rows, seed=1), labels(rows)), batch_size=batch)


@pytest.mark.parametrize(
    "criterion", ["random", "magnitude", "taylor", "captum:IntegratedGradients", "xpruner,steps=6"]
)
def test_criteria(criterion):
    check_criterion(criterion, build(), loader(), task=TASK)


@pytest.mark.parametrize("selection", ["global", xprune.LearnedThresholds(weights="frozen", steps=5)])
def test_selections(selection):
    model = build()
    scores = xprune.score(model, xprune.find_sites(model, images()), loader(), "taylor", task=TASK)
    check_selection(selection, model, scores, loader(), xprune.Budget(macs=0.6), task=TASK)


def test_the_whole_way():
    tune = xprune.Finetune(epochs=2, distill=0.5)
    result = xprune.Pruner(build(), "taylor", xprune.Budget(macs=0.6), finetune=tune, task=TASK).run(loader(), loader())
    assert result.metrics["pruned"].macs <= 0.6 * result.metrics["dense"].macs + 1
    assert {m.metric_name for m in result.metrics.values()} == {"mIoU"}
    assert result.metrics["finetuned"].loss < result.metrics["pruned"].loss


def test_miou_is_of_the_data_set_whatever_the_batches():
    model, x, y = build(), images(8, seed=1), labels(8)
    with torch.no_grad():
        found = F.interpolate(model(x), size=(32, 32), mode="bilinear", align_corners=False).argmax(1)
    there = y != VOID
    ious = []
    for kind in range(CLASSES):
        both = ((found == kind) & (y == kind) & there).sum().item()
        either = (((found == kind) | (y == kind)) & there).sum().item()
        ious += [both / either] if either else []
    for batch in (8, 3):
        metrics = xprune.evaluate(model, loader(8, batch), task=TASK)
        assert metrics.metric == pytest.approx(math.fsum(ious) / len(ious)) and metrics.samples == 8
    with pytest.raises(AttributeError, match="mIoU"):
        _ = metrics.accuracy


@pytest.mark.parametrize("void", [VOID, 0, -1, CLASSES - 1])
def test_miou_pixel_by_pixel(void):
    """Pixels to ignore may have the label of a class that the model predicts elsewhere."""
    task, generator = xprune.Segmentation(ignore_index=void), torch.Generator().manual_seed(3)
    outputs = torch.randn(5, CLASSES, 6, 6, generator=generator)
    # Class 2 is never predicted, and no pixel has it.
    outputs[:, 2] = -10
    y = torch.randint(3, CLASSES, (5, 6, 6), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = void
    metric = task.new_metric(outputs)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        task.update(metric, outputs[rows], y[rows])
    both, either = [0] * CLASSES, [0] * CLASSES
    for said, is_ in zip(outputs.argmax(1).flatten().tolist(), y.flatten().tolist(), strict=True):
        if is_ != void:
            both[is_] += said == is_
            either[is_] += 1
            either[said] += said != is_
    ious = [a / b for a, b in zip(both, either, strict=True) if b]
    assert len(ious) < CLASSES
    assert float(metric.compute()) == pytest.approx(math.fsum(ious) / len(ious))


def test_void_enters_neither_loss_nor_gradient():
    outputs, y = torch.randn(2, CLASSES, 32, 32, requires_grad=True), labels(2)
    expected = F.cross_entropy(outputs, y, ignore_index=VOID)
    torch.testing.assert_close(TASK.loss(outputs, y), expected)
    for loss in (TASK.loss(outputs, y), TASK.one_vs_rest(outputs, y, torch.tensor([0, 1]))):
        (gradient,) = torch.autograd.grad(loss, outputs)
        assert gradient[:, :, :, 28:].abs().sum() == 0 and gradient[:, :, :, :28].abs().sum() > 0


def test_one_vs_rest_is_of_each_pixel_and_the_class_of_its_image():
    outputs, y, drawn = torch.randn(2, CLASSES, 4, 4), labels(2)[:, 14:18, 26:30], torch.tensor([3, 0])
    p, kept, gone = outputs.softmax(1), [], []
    for image in range(2):
        for row in range(4):
            for column in range(4):
                own, chance = int(y[image, row, column]), p[image, drawn[image], row, column]
                if own != VOID:
                    kept.append(-chance.log() if own == drawn[image] else -(1 - chance).log())
                    gone.append(-(1 - chance if own == drawn[image] else p[image, own, row, column]).log())
    for slow, away in ((kept, False), (gone, True)):
        found = TASK.one_vs_rest(outputs, y, drawn, away)
        torch.testing.assert_close(found, torch.stack(slow).mean(), rtol=1e-4, atol=1e-5)


def test_drawn_classes_are_present_half_of_the_time_and_absent_otherwise():
    y, outputs = labels(400), torch.zeros(400, CLASSES, 1, 1)
    own, count = TASK.classes(outputs, y)
    assert count == CLASSES
    there = TASK.present(y, CLASSES)
    assert there.sum(1).eq(2).all() and there[range(400), own].all()
    assert not there[range(400), TASK.other(y, own, CLASSES)].any()
    drawn = OBJECTIVES["one-vs-rest"].draw(own, lambda: TASK.other(y, own, CLASSES), CLASSES)
    assert 0.4 < there[range(400), drawn].float().mean() < 0.6


@pytest.mark.parametrize(
    "y, match",
    [
        (torch.zeros(2, dtype=torch.long), r"\(batch, height, width\), got \(2,\)"),
        (torch.full((2, 32, 32), VOID), "no point of the batch has a label"),
        (torch.full((2, 32, 32), 30), "labels go from 30 to 30"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, match):
    with pytest.raises(xprune.DataError, match=match):
        xprune.evaluate(build(), [(images(), y)], task=TASK)
