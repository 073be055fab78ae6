"""Tests the task of detection with models of transformers and with models of a user."""

import copy
import math
from functools import cache

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import xprune
from tests.support.models import VIT
from xprune.criteria.xpruner.learner import OBJECTIVES
from xprune.tasks import mean_precision
from xprune.tasks.boxes import queries_of_objects
from xprune.tasks.detected import Detected, Objects, in_fractions
from xprune.testing import check_criterion, perturb

CLASSES, QUERIES, SIZE = 3, 6, (32, 32)
TASK = xprune.Detection(classes=CLASSES)


def target(labels, boxes=None, centred=True):
    """Returns a target with these labels. If boxes are not given, they are made up."""
    labels = torch.tensor(labels, dtype=torch.long)
    if boxes is None:
        boxes = [[0.3 + 0.1 * i, 0.5, 0.2, 0.3 + 0.05 * i] for i in range(len(labels))]
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    if not centred:
        boxes = in_fractions(boxes, SIZE, True) * SIZE[0]
    return {"class_labels" if centred else "labels": labels, "boxes": boxes}


LABELS = ([0, 2, 2], [1], [])
"""The labels of the images of a batch. The last image has no object."""


def batch(seed=0, centred=True):
    """Returns three images and their targets."""
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return images, [target(labels, centred=centred) for labels in LABELS]


def mapping(seed=0):
    """Returns the same batch as models of transformers read it."""
    images, labels = batch(seed)
    return {"pixel_values": images, "labels": labels}


# Models of transformers. The sizes are small, and the backbones are ResNets of transformers with random weights.


def small(size=16):
    return {
        "d_model": size,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_queries": QUERIES,
        "num_labels": CLASSES,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
    }


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
LEVELS = ["stage2", "stage3", "stage4"]


def yolos(t):
    options = {"image_size": list(SIZE), "patch_size": 8, "use_mid_position_embeddings": False}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = t.YolosConfig(num_detection_tokens=QUERIES, num_labels=CLASSES, **options, **sizes)
    return t.YolosForObjectDetection(config)


def detr(t):
    return t.DetrForObjectDetection(
        t.DetrConfig(backbone_config=t.ResNetConfig(out_features=["stage4"], **RESNET), **small())
    )


def conditional_detr(t):
    backbone = t.ResNetConfig(out_features=["stage4"], **RESNET)
    return t.ConditionalDetrForObjectDetection(t.ConditionalDetrConfig(backbone_config=backbone, **small()))


def deformable_detr(t, **options):
    backbone = t.ResNetConfig(out_features=LEVELS, **RESNET)
    points = {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2, **options}
    # Its group norms have 32 groups.
    return t.DeformableDetrForObjectDetection(t.DeformableDetrConfig(backbone_config=backbone, **points, **small(32)))


def two_stage_deformable_detr(t):
    return deformable_detr(t, two_stage=True, with_box_refine=True, two_stage_num_proposals=QUERIES)


def rt_detr(t):
    backbone = t.RTDetrResNetConfig(out_features=LEVELS, **RESNET)
    channels = {"encoder_hidden_dim": 16, "encoder_in_channels": [16] * 3, "decoder_in_channels": [16] * 3}
    options = {"encoder_ffn_dim": 24, "decoder_n_points": 2, "num_denoising": 4, "anchor_image_size": None}
    sizes = {k: v for k, v in small().items() if "backbone" not in k and k != "encoder_layers"}
    return t.RTDetrForObjectDetection(t.RTDetrConfig(backbone_config=backbone, **{**sizes, **channels, **options}))


FAMILIES = {
    # name: (builder, whether the logits have "no object", whether a query means the same in two models)
    "YOLOS": (yolos, True, True),
    "DETR": (detr, True, True),
    "Conditional DETR": (conditional_detr, False, True),
    "Deformable DETR": (deformable_detr, False, True),
    "two-stage Deformable DETR": (two_stage_deformable_detr, False, False),
    "RT-DETR": (rt_detr, False, False),
}


@cache
def family(name):
    """Returns a tiny random model of a family, in eval mode. Tests do not change it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'xprune[hf]'")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name][0](transformers).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers(name):
    model, task = family(name), xprune.Detection()
    inputs, targets = task.unpack(mapping())
    with torch.no_grad():
        outputs, expected = task.forward(model, inputs), model(**inputs)
    task.check(outputs, targets)
    assert (outputs.background, outputs.ordered) == FAMILIES[name][1:] and outputs.classes == CLASSES
    # The loss of RT-DETR is that of the model too.
    torch.testing.assert_close(task.loss(outputs, targets), expected.loss)
    assert task.classes(outputs, targets)[1] == CLASSES and task.size(targets) == 3
    for each in task.detections(outputs):
        assert each["scores"].shape == each["labels"].shape == each["boxes"].shape[:1]
        assert (each["scores"].diff() <= 0).all() and each["labels"].max() < CLASSES
    assert float(task.distillation(outputs, outputs, 2.0)) == pytest.approx(0, abs=1e-6)
    # In train mode, RT-DETR has more queries, which are left out.
    trained = task.forward(copy.deepcopy(model).train(), inputs)
    assert trained.logits.shape == outputs.logits.shape and trained.loss.requires_grad
    assert set(task.example(inputs, 3)) == {"pixel_values"} and len(task.example(inputs, 3)["pixel_values"]) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_has_gradients_in_eval_mode_with_gates(name):
    model, task = family(name), xprune.Detection()
    inputs, targets = task.unpack(mapping())
    mlps = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    path, layer = next((p, m) for p, m in mlps if m.out_features == 24)
    gate = torch.ones(len(targets), 24, requires_grad=True)
    hook = layer.register_forward_hook(lambda _m, _i, out: out * gate.view(3, *[1] * (out.dim() - 2), 24))
    try:
        (gradient,) = torch.autograd.grad(task.loss(task.forward(model, inputs), targets), gate)
    finally:
        hook.remove()
    assert gradient.isfinite().all() and gradient.abs().sum() > 0, path


def test_a_whole_run_of_yolos():
    pytest.importorskip("pycocotools")
    loader = [mapping(0), mapping(1)]
    tune = xprune.Finetune(epochs=1, distill=0.5)
    # Fewer sites are faster.
    sites = {"units": ["neuron"], "exclude": ["class_labels*", "bbox*"]}
    settings = {**sites, "latency": False, "finetune": tune, "task": xprune.Detection()}
    pruner = xprune.Pruner(family("YOLOS"), "taylor", xprune.Budget(macs=0.9), **settings)
    result = pruner.run(loader, loader)
    assert result.metrics["pruned"].macs <= 0.9 * result.metrics["dense"].macs + 1
    assert {each.metric_name for each in result.metrics.values()} == {"mAP"}
    assert result.metrics["finetuned"].loss != result.metrics["pruned"].loss


# Models of a user.


class QueryDetector(nn.Module):
    """A tiny ViT in which each patch is a query. It has the loss of the best patches only, which is enough here."""

    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(**VIT, num_classes=0, global_pool="", class_token=False)
        self.head = nn.Linear(24, CLASSES + 1 + 4)

    def forward(self, images, labels=None):
        images = torch.stack(images) if isinstance(images, list) else images
        outputs = self.head(self.vit(images))
        logits, boxes = outputs[..., : CLASSES + 1], outputs[..., CLASSES + 1 :].sigmoid()
        loss = logits.logsumexp(-1).mean()
        for image, each in enumerate(labels or ()):
            for kind, box in zip(each["class_labels"], each["boxes"], strict=True):
                query = (boxes[image] - box).abs().sum(-1).argmin()
                loss = loss - logits[image, query, kind] + (boxes[image, query] - box).abs().sum()
        return {"logits": logits, "pred_boxes": boxes, **({} if labels is None else {"loss": loss})}


class ListDetector(nn.Module):
    """A detector as in torchvision: a list of images, a dict of losses in train mode, detections in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.mlp = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
        self.head = nn.Linear(3, 4)
        self.calls = 0

    def forward(self, images, targets=None):
        self.calls += 1
        features = torch.stack([self.norm(image[None])[0].mean((1, 2)) for image in images])
        found = self.head(self.mlp(features))
        if self.training:
            wanted = torch.stack([each["boxes"].sum(0) / 32 for each in targets])
            return {"box": F.l1_loss(found, wanted), "size": found.square().mean()}
        shape = {"scores": found[:, :1].sigmoid(), "labels": torch.ones(len(images), 1, dtype=torch.long)}
        boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(len(images), 1, 4)
        rows = zip(shape["scores"], shape["labels"], boxes, strict=True)
        return [{"scores": s, "labels": k, "boxes": b} for s, k, b in rows]


def build(kind):
    torch.manual_seed(0)
    return perturb(kind()).eval()


@pytest.mark.parametrize("form", ["tensor", "list", "collated"])
def test_a_detector_of_a_user(form):
    images, targets = batch()
    model = build(QueryDetector)
    given = {"tensor": (images, targets), "list": [list(images), targets], "collated": (tuple(images), tuple(targets))}
    inputs, objects = TASK.unpack(given[form])
    outputs = TASK.forward(model, inputs)
    torch.testing.assert_close(outputs.loss, model(images, targets)["loss"])
    assert outputs.background and [len(each.labels) for each in objects] == [3, 1, 0]
    example = TASK.example(inputs, 3)
    assert len(example) == 2 and isinstance(example, torch.Tensor if form == "tensor" else list)


@pytest.mark.parametrize("criterion", ["random", "taylor", "captum:IntegratedGradients,n_steps=4", "xpruner,steps=6"])
def test_criteria(criterion):
    scores = check_criterion(criterion, build(QueryDetector), [batch(0), batch(1)], task=TASK)
    if criterion != "random":
        assert len(scores.classwise[0]) == CLASSES


def test_a_model_as_in_torchvision():
    pytest.importorskip("pycocotools")
    # Labels start with 1. There is no number of classes.
    images, targets = batch(centred=False)
    rows = list(images)[:2], [{**each, "labels": each["labels"] + 1} for each in targets[:2]]
    model, task = build(ListDetector), xprune.Detection()
    inputs, objects = task.unpack(rows)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = task.forward(model, inputs)
    # Dropout is off, and the batch norm does not change.
    torch.testing.assert_close(outputs.loss, task.forward(model, inputs).loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert task.classes(outputs, objects) is None and outputs.classes is None
    assert [each["boxes"].tolist() for each in task.detections(outputs)] == [[[0, 0, 16, 16]]] * 2
    model.train()
    model.calls = 0
    assert task.forward(model, inputs).found is None and model.calls == 1
    with pytest.raises(xprune.DataError, match="train mode"):
        task.detections(task.forward(model, inputs))
    model.eval()
    pruner = xprune.Pruner(
        model, "xpruner,steps=4", xprune.Budget(macs=0.7), finetune=xprune.Finetune(epochs=1), task=task
    )
    result = pruner.run([rows], [rows])
    assert result.metrics["pruned"].macs < result.metrics["dense"].macs
    with pytest.raises(xprune.DataError, match="returns none"):
        task.distillation(outputs, outputs, 1.0)


class Wrapper(nn.Module):
    """Hides the names of the arguments of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **given):
        return self.model(**given)


class Named(nn.Module):
    """Takes keyword arguments, and the targets as `targets`."""

    def forward(self, pixel_values, targets):
        return {"loss": pixel_values.sum() + len(targets)}


def test_the_names_of_arguments():
    inputs, _ = TASK.unpack(mapping())
    with torch.no_grad():
        plain, wrapped = (TASK.forward(model, inputs).loss for model in (family("YOLOS"), Wrapper(family("YOLOS"))))
    assert plain == wrapped
    images, targets = batch()
    assert TASK.forward(Named(), inputs).loss == TASK.forward(Named(), (images, targets)).loss == images.sum() + 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixed_precision():
    tune = xprune.Finetune(epochs=1, mixed_precision="bf16", distill=0.5)
    dense = build(QueryDetector)
    tuned = xprune.finetune(dense, [batch(0)], tune, teacher=dense, task=TASK)
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), dense.parameters(), strict=True))


def test_compare(tmp_path):
    pytest.importorskip("pycocotools")
    loader = [batch(0), batch(1)]
    budgets = (xprune.Budget(macs=0.7),)
    grid = xprune.Grid({"chance": "random"}, budgets=budgets, seeds=(0,), finetune=None, task=TASK)
    case = xprune.Case(build(QueryDetector), loader, loader, units=["neuron"])
    found = xprune.compare(case, grid, tmp_path)
    assert xprune.compare(case, grid, tmp_path).rows == found.rows and found.rows[1]["macs"] <= 0.7


# The metric.


def detected(rows, size=SIZE):
    """Returns outputs whose queries have these (class, probability, box), and no object otherwise."""
    logits = torch.full((1, len(rows), CLASSES + 1), -30.0)
    for query, (kind, chance, _) in enumerate(rows):
        logits[0, query, kind], logits[0, query, CLASSES] = math.log(chance), math.log(1 - chance)
    return Detected(torch.tensor(0.0), [size], logits, torch.tensor([[box for _, _, box in rows]]))


LEFT, RIGHT, NOWHERE = [0.25, 0.5, 0.2, 0.4], [0.75, 0.5, 0.2, 0.4], [0.5, 0.1, 0.1, 0.1]
HALF = [0.25, 0.5, 0.2, 0.24]  # overlaps LEFT with an IoU of 0.6


@pytest.mark.parametrize(
    "rows, labels, iou, expected",
    [
        ([(0, 0.9, LEFT), (1, 0.8, RIGHT)], [(0, LEFT), (1, RIGHT)], None, 1.0),
        # The class is wrong.
        ([(1, 0.9, LEFT)], [(0, LEFT)], None, 0.0),
        # One of two is found: the precision is 1 up to a recall of 0.5, and 51 of 101 recalls are at most 0.5.
        ([(0, 0.9, LEFT), (0, 0.8, NOWHERE)], [(0, LEFT), (0, RIGHT)], None, 51 / 101),
        # A wrong detection with a higher score halves the precision.
        ([(0, 0.8, LEFT), (0, 0.9, NOWHERE)], [(0, LEFT)], None, 0.5),
        # A second detection of the same object is wrong, but comes later.
        ([(0, 0.9, LEFT), (0, 0.8, LEFT)], [(0, LEFT)], None, 1.0),
        # An IoU of 0.6 is right at 3 of the 10 thresholds: 0.5, 0.55 and 0.6, or 2 of them if rounding is against it.
        ([(0, 0.9, HALF)], [(0, LEFT)], 0.5, 1.0),
        ([(0, 0.9, HALF)], [(0, LEFT)], 0.65, 0.0),
    ],
)
@pytest.mark.parametrize("size", [SIZE, (60, 200)])
def test_map_of_boxes_made_by_hand(rows, labels, iou, expected, size):
    pytest.importorskip("pycocotools")
    task = xprune.Detection(classes=CLASSES, iou=iou)
    wanted = target([kind for kind, _ in labels], [box for _, box in labels])
    metric = task.new_metric(None)
    task.update(metric, detected(rows, size), [Objects.read(wanted, 0)])
    # An image without objects and without confident detections changes nothing.
    task.update(metric, detected([(0, 1e-6, NOWHERE)], size), [Objects.read(target([]), 0)])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    assert task.metric_name == ("mAP" if iou is None else f"mAP at IoU {iou:g}")


def test_map_without_objects_is_refused():
    pytest.importorskip("pycocotools")
    metric = TASK.new_metric(None)
    TASK.update(metric, detected([(0, 0.5, LEFT)]), [Objects.read(target([]), 0)])
    with pytest.raises(xprune.DataError, match="no image of the data has an object"):
        metric.compute()


def test_without_pycocotools(monkeypatch):
    monkeypatch.setattr(mean_precision, "find_spec", lambda _name: None)
    with pytest.raises(xprune.ModelError, match=r"pip install 'xprune\[detection\]'"):
        TASK.new_metric(None)


def test_detections_with_probabilities_of_a_sigmoid():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]])
    outputs = Detected(torch.tensor(0.0), [(10, 20)], logits, torch.tensor([[LEFT, RIGHT]]), background=False)
    (found,) = TASK.detections(outputs)
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 0.0, -1.0]).sigmoid())
    assert found["labels"].tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(found["boxes"][:2], torch.tensor([[13.0, 3, 17, 7], [3.0, 3, 7, 7]]))


# Classes.


def random_outputs(background=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, QUERIES, CLASSES + background, generator=generator)
    boxes = torch.rand(3, QUERIES, 4, generator=generator) * 0.4 + 0.2
    return Detected(torch.tensor(1.0), [SIZE] * 3, logits, boxes, background=background)


def objects():
    return [Objects.read(each, i) for i, each in enumerate(batch()[1])]


def test_the_class_of_an_image_is_that_of_one_of_its_objects():
    targets, outputs = objects() * 100, random_outputs()
    torch.manual_seed(0)
    own, count = TASK.classes(outputs, targets)
    torch.manual_seed(0)
    assert torch.equal(own, TASK.classes(outputs, targets)[0]) and count == CLASSES
    first, second, empty = (own[i::3] for i in range(3))
    assert set(first.tolist()) == {0, 2} and set(second.tolist()) == {1} and set(empty.tolist()) == {0, 1, 2}
    # Two of three objects have the class 2.
    assert 0.5 < (first == 2).float().mean() < 0.8
    here, others = TASK.present(targets, CLASSES), TASK.other(targets, own, CLASSES)
    assert not here[range(300), others].any() and (others != own).all()
    drawn = OBJECTIVES["one-vs-rest"].draw(own, lambda: TASK.other(targets, own, CLASSES), CLASSES)
    assert drawn.shape == (300,)
    everything = [Objects.read(target([0, 1, 2]), 0)]
    assert int(TASK.other(everything, torch.tensor([1]), CLASSES)) in (0, 2)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("gone", [False, True])
def test_one_vs_rest_image_by_image(background, gone):
    outputs, targets, drawn = random_outputs(background), objects(), torch.tensor([2, 0, 1])
    slow = []
    for image, each in enumerate(targets):
        logits, kind = outputs.logits[image], int(drawn[image])
        p = logits.softmax(-1) if background else logits.sigmoid()
        query = queries_of_objects(
            p, in_fractions(outputs.boxes[image], SIZE, True), each.labels, in_fractions(each.boxes, SIZE, True)
        )
        count = int((each.labels == kind).sum())
        nothing = -(1 - p[:, kind]).log().sum() / max(count, 1)
        if count:
            own = torch.stack([p[q, kind].log() for q, k in zip(query, each.labels, strict=True) if k == kind])
            slow.append(nothing if gone else -own.mean())
        elif not gone:
            slow.append(nothing)
        elif background:
            wanted = torch.full((QUERIES,), CLASSES)
            wanted[query] = each.labels
            weights = torch.where(wanted == CLASSES, 0.1, 1.0)
            slow.append(-(weights * p[range(QUERIES), wanted].log()).sum() / weights.sum())
        else:
            total = torch.tensor(0.0)
            for q in range(QUERIES):
                for k in range(CLASSES):
                    right = any(q == int(a) and k == int(b) for a, b in zip(query, each.labels, strict=True))
                    chance = p[q, k] if right else 1 - p[q, k]
                    total -= (0.25 if right else 0.75) * (1 - chance) ** 2 * chance.log()
            slow.append(total / max(len(each.labels), 1))
    torch.testing.assert_close(TASK.one_vs_rest(outputs, targets, drawn, gone), torch.stack(slow).mean())


def test_losses_of_boxes_in_pixels_are_those_in_fractions():
    outputs, targets, drawn = random_outputs(), objects(), torch.tensor([2, 0, 1])
    pixels = [Objects.read(each, 0) for each in batch(centred=False)[1]]
    corners = in_fractions(outputs.boxes, SIZE, True) * 32
    other = Detected(outputs.loss, outputs.sizes, outputs.logits, corners, centred=False)
    for gone in (False, True):
        torch.testing.assert_close(
            TASK.one_vs_rest(outputs, targets, drawn, gone), TASK.one_vs_rest(other, pixels, drawn, gone)
        )
    torch.testing.assert_close(TASK.class_scores(outputs, targets, drawn), TASK.class_scores(other, pixels, drawn))
    teacher = random_outputs(seed=1)
    its = Detected(
        teacher.loss, teacher.sizes, teacher.logits, in_fractions(teacher.boxes, SIZE, True) * 32, centred=False
    )
    assert torch.isfinite(TASK.distillation(other, its, 1.0))


# Distillation.


@pytest.mark.parametrize("background", [True, False])
def test_distillation(background):
    outputs, teacher = random_outputs(background), random_outputs(background, seed=1)
    assert float(TASK.distillation(outputs, outputs, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(TASK.distillation(outputs, teacher, 2.0)) > 0.1
    shuffled = Detected(**{**vars(outputs), "logits": outputs.logits.flip(1), "boxes": outputs.boxes.flip(1)})
    assert float(TASK.distillation(shuffled, outputs, 2.0)) > 0.1
    sorts = {"ordered": False}
    same = TASK.distillation(Detected(**{**vars(shuffled), **sorts}), Detected(**{**vars(outputs), **sorts}), 2.0)
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_distillation_counts_boxes_of_objects():
    outputs = random_outputs()
    nothing = torch.zeros_like(outputs.logits)
    nothing[..., -1] = 50
    moved = outputs.boxes + 0.1
    for logits, expected in ((outputs.logits, 5 * 0.4), (nothing, 0.0)):
        a = Detected(outputs.loss, outputs.sizes, logits, outputs.boxes)
        b = Detected(outputs.loss, outputs.sizes, logits, moved)
        assert float(TASK.distillation(b, a, 1.0)) == pytest.approx(expected, abs=1e-4)


# Bad input.

IMAGES, ONE = torch.zeros(1, 3, *SIZE), torch.tensor([[0.5, 0.5, 0.2, 0.2]])


@pytest.mark.parametrize(
    "given, match",
    [
        ((IMAGES, torch.zeros(1, dtype=torch.long)), "the targets are a Tensor"),
        ((IMAGES, [torch.zeros(1)]), "list with a dict for each image"),
        ((IMAGES, [target([0]), target([1])]), "the batch has 1 images, but 2 targets"),
        ((torch.zeros(1, 8), [target([0])]), "a batch has no images"),
        ({"pixel_values": IMAGES, "boxes": ONE}, "wanted .inputs, labels. or a mapping with 'labels'"),
        ((IMAGES, [{"boxes": ONE}]), "image 0 of the batch has the entries boxes"),
        ((IMAGES, [{}]), "has the entries none"),
        (
            (IMAGES, [{"class_labels": torch.tensor([0.0]), "boxes": ONE}]),
            r"integers of shape \(objects,\), got float32",
        ),
        ((IMAGES, [{"class_labels": torch.tensor([0, 1]), "boxes": ONE}]), r"shape \(2, 4\)"),
        ((IMAGES, [{"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0)}]), r"give torch.zeros\(0, 4\)"),
        ((IMAGES, [{"class_labels": torch.tensor([0]), "boxes": ONE.long()}]), "got int64"),
        ((IMAGES, [target([-1])]), "has the label -1"),
        ((IMAGES, [{"class_labels": torch.tensor([0]), "boxes": 32 * ONE}]), "For boxes in pixels, name the classes"),
        ((IMAGES, [{"class_labels": torch.tensor([0]), "boxes": ONE * torch.nan}]), r"the box 0 is \(nan"),
        ((IMAGES, [{"labels": torch.tensor([0]), "boxes": ONE}]), "x0 < x1 and y0 < y1"),
    ],
)
def test_targets_that_do_not_fit_are_refused(given, match):
    with pytest.raises(xprune.DataError, match=match):
        TASK.unpack(given)


def test_labels_that_are_not_classes_are_refused_before_the_model_fails():
    for task, model in ((TASK, build(QueryDetector)), (xprune.Detection(), family("YOLOS"))):
        given = {"tensor": (IMAGES, [target([CLASSES])]), "mapping": {"pixel_values": IMAGES, "labels": [target([3])]}}
        inputs, _ = task.unpack(given["tensor" if task is TASK else "mapping"])
        with pytest.raises(xprune.DataError, match="has the label 3, but the model has 3 classes"):
            task.forward(model, inputs)
    with pytest.raises(xprune.DataError, match="has the label 3"):
        TASK.check(random_outputs(), [Objects.read(target([3]), 0)])


def test_models_that_do_not_fit_are_refused():
    images, targets = batch(centred=False)
    with pytest.raises(xprune.DataError, match="YolosForObjectDetection needs targets with 'class_labels'"):
        TASK.forward(family("YOLOS"), TASK.unpack({"pixel_values": images, "labels": targets})[0])
    with pytest.raises(xprune.DataError, match="the logits have 4 columns, but there are 5 classes"):
        xprune.Detection(classes=5).forward(build(QueryDetector), TASK.unpack(batch())[0])

    class Silent(nn.Module):
        def forward(self, images, targets=None):
            return {"logits": images}

    with pytest.raises(xprune.ModelError, match="Silent returned no loss"):
        TASK.forward(Silent(), TASK.unpack(batch())[0])


@pytest.mark.parametrize("settings", [{"classes": 0}, {"classes": 2.0}, {"iou": 0}, {"iou": 1.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(xprune.DataError, match="wanted"):
        xprune.Detection(**settings)
