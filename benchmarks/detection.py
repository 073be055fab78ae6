"""Compares criteria on object detection (blood cells) at half of the MACs, with the dense model and with random scores.

    python -m benchmarks.detection --data DIR [--cache DIR] [--classes]

DIR holds bccd_320x240.npz: 205 images for training, 87 for validation and 72 for the test, with boxes of platelets, red
and white blood cells. The model is a small ViT with a query for each patch, trained with the loss of DETR from scratch.
The figures are the mean average precision (mAP, the mean over IoU 0.5 to 0.95) and the mAP at IoU 0.5 on the test
split, before and after fine-tuning. The training of the dense model was chosen with the validation split. Nothing is
trained or chosen with the test split. The result is docs/results/detection-bccd.json and detection-bccd.md.

With --classes, it measures instead whether class-wise scores belong to their classes. At each site, the 30 % of the
units with the highest scores of one class are removed. The figures are the average precision of each class at IoU 0.5,
on the test split, without fine-tuning. The result is docs/results/detection-classes.json.

There is one dense model. The seeds are those of scores and fine-tuning. The images are scaled to 128 x 160, so the
figures can be compared with each other, but not with published ones.
"""

import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision

import xprune
from benchmarks.peers import peers
from benchmarks.record import RESULTS, record
from xprune.pipeline import Run
from xprune.tasks.boxes import generalised_iou, queries_of_objects, to_corners

SIZE, PATCH, CLASSES, BATCH = (128, 160), 16, 3, 8
TASK, AT_HALF = xprune.Detection(classes=CLASSES), xprune.Detection(classes=CLASSES, iou=0.5)
DENSE = xprune.Finetune(epochs=100, lr=1e-3, weight_decay=0.05)
TUNE = xprune.Finetune(epochs=10, lr=5e-4)
SEEDS, BUDGET = (0, 1, 2), xprune.Budget(macs=0.5)
NAMES, REMOVED = ("platelets", "red cells", "white cells"), 0.3
CRITERIA = ("random", "magnitude", "taylor", "xpruner")
PEERS = ("torch-pruning taylor, isomorphic",)


def convolution(before: int, after: int) -> nn.Sequential:
    """Returns a 3x3 convolution that halves height and width, a batch norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Detector(nn.Module):
    """A ViT over patches of 16 x 16. Each patch is a query: it predicts a class, or no object, and a box.

    The box is predicted relative to the middle of the patch. So the queries need not learn where they are, and the
    model learns from few images. YOLOS and DETR need many more.
    """

    def __init__(self, hidden_size: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        rows, columns = SIZE[0] // PATCH, SIZE[1] // PATCH
        self.stem = nn.Sequential(
            convolution(3, 16), convolution(16, 32), convolution(32, 64), nn.Conv2d(64, hidden_size, 3, 2, 1)
        )
        self.positions = nn.Parameter(torch.randn(1, rows * columns, hidden_size) * 0.02)
        self.blocks = nn.Sequential(*[Block(hidden_size, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(hidden_size)
        self.classify = nn.Linear(hidden_size, CLASSES + 1)
        self.locate = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 4))
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = torch.stack([(x.flatten() + 0.5) / columns, (y.flatten() + 0.5) / rows], -1)
        # The logit of the middle of each patch, and of a box of a typical size.
        self.register_buffer("anchors", torch.cat([centres, torch.full_like(centres, 0.18)], -1).logit())

    def forward(self, images: Tensor, labels: Any = None) -> dict[str, Tensor]:
        """Maps (batch, 3, 128, 160) to "logits" (batch, 80, 4) and "pred_boxes" (batch, 80, 4), and "loss" if asked."""
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        tokens = self.norm(self.blocks(tokens))
        outputs = {"logits": self.classify(tokens), "pred_boxes": (self.anchors + self.locate(tokens)).sigmoid()}
        if labels is not None:
            outputs["loss"] = set_loss(outputs["logits"], outputs["pred_boxes"], labels)
        return outputs


def set_loss(logits: Tensor, boxes: Tensor, labels: Sequence[dict[str, Tensor]]) -> Tensor:
    """Returns the loss of DETR: cross-entropy of all queries, L1 distance and GIoU of the queries of objects."""
    classes = torch.full(logits.shape[:2], CLASSES, device=logits.device)
    objects = max(sum(len(each["class_labels"]) for each in labels), 1)
    total = logits.new_zeros(())
    for image, each in enumerate(labels):
        kinds, wanted = each["class_labels"], each["boxes"]
        query = queries_of_objects(logits[image].softmax(-1), to_corners(boxes[image]), kinds, to_corners(wanted))
        classes[image, query] = kinds
        found = boxes[image, query]
        overlap = generalised_iou(to_corners(found), to_corners(wanted)).diagonal()
        total = total + 5 * (found - wanted).abs().sum() + 2 * (1 - overlap).sum()
    weight = logits.new_tensor([1.0] * CLASSES + [0.1])
    return F.cross_entropy(logits.transpose(1, 2), classes, weight) + total / objects


class Cells(Dataset[Any]):
    """Images of blood with boxes.

    Args:
        images: uint8 (n, 3, 128, 160).
        labels: The class of each object, for each image.
        boxes: The box of each object, for each image, as (centre x, centre y, width, height) in fractions.
        augment: True: random flips along both axes.
    """

    def __init__(self, images: Tensor, labels: Sequence[Tensor], boxes: Sequence[Tensor], augment: bool) -> None:
        self.images, self.labels, self.boxes, self.augment = images, labels, boxes, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, boxes = self.images[index].float() / 255, self.boxes[index]
        if self.augment:
            if torch.rand(()) < 0.5:
                image, boxes = image.flip(2), torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)
            if torch.rand(()) < 0.5:
                image, boxes = image.flip(1), torch.cat([boxes[:, :1], 1 - boxes[:, 1:2], boxes[:, 2:]], 1)
        return (image - 0.7) / 0.2, {"class_labels": self.labels[index], "boxes": boxes}


def collate(rows: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Returns a batch: images (batch, 3, 128, 160) and a target for each image."""
    return torch.stack([image for image, _ in rows]), [target for _, target in rows]


def split(data: Path, name: str, augment: bool) -> Cells:
    """Decodes the JPEG files of a split, which are stored one after another with their offsets."""
    pack = np.load(data / "bccd_320x240.npz")
    files = [pack[f"{name}_data"][a:b].tobytes() for a, b in pairwise(pack[f"{name}_off"])]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    whole = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    small = F.interpolate(whole, size=SIZE, mode="bilinear", antialias=True).round().byte()
    corners = torch.from_numpy(pack[f"{name}_box"]) / torch.tensor([320, 240, 320, 240])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    labels, ends = torch.from_numpy(pack[f"{name}_y"]).long(), list(pairwise(pack[f"{name}_boff"]))
    return Cells(small, [labels[a:b] for a, b in ends], [boxes[a:b] for a, b in ends], augment)


def loaders(data: Path, seed: int, measured: str = "test") -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Returns training batches and the batches to measure on. The seed is that of the order of training images."""
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(split(data, "train", True), BATCH, shuffle=True, generator=generator, collate_fn=collate)
    return train, DataLoader(split(data, measured, False), 24, collate_fn=collate)


def figures(model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Returns the mAP, the mAP at IoU 0.5 and the loss of a model."""
    metrics = xprune.evaluate(model, loader, task=TASK)
    return {
        "mAP": metrics.metric,
        "mAP50": xprune.evaluate(model, loader, task=AT_HALF).metric,
        "loss": metrics.loss,
    }


def dense(data: Path, cache: Path) -> nn.Module:
    """Returns the dense model. It is trained if the cache does not have its weights."""
    file = cache / "bccd-vit.safetensors"
    torch.manual_seed(0)
    model: nn.Module = Detector()
    if not file.is_file():
        train, validation = loaders(data, 0, "val")
        model = xprune.finetune(model, train, DENSE, task=TASK, checkpoint_dir=cache / "running")
        print("dense, validation", figures(model, validation), flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def rows_of_seed(model: nn.Module, data: Path, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a seed. Rows that are in the folder already are read from there."""
    train, test = loaders(data, seed)
    run = Run(model, train, test, task=TASK, latency=False)
    rows = []
    for name in ("dense", *CRITERIA, *PEERS):
        file = folder / f"{name.replace(' ', '-')}-{seed}.json"
        if not file.is_file():
            print(f"seed {seed}: {name}", flush=True)
            start, pruned = time.perf_counter(), model
            if name in CRITERIA:
                pruned = run.cut(run.select(run.score(name, BUDGET, seed=seed), BUDGET, "global", seed=seed))
            elif name in PEERS:
                pruned = peers(TASK)[name](xprune.Case(model, train, test), BUDGET, seed)
            seconds = time.perf_counter() - start
            before = figures(pruned, test)
            tuned = figures(run.finetune(pruned, TUNE, seed=seed), test)
            costs = {each: run.measure(pruned).costs[each] / run.dense.costs[each] for each in ("macs", "params")}
            after = {f"{each} after": value for each, value in tuned.items()}
            row = {"criterion": name, "seed": seed, **costs, **before, **after, "pruning seconds": seconds}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row))
        rows.append(json.loads(file.read_text()))
    return rows


def precisions(model: nn.Module, loader: DataLoader[Any]) -> list[float]:
    """Returns the average precision of each class at IoU 0.5."""
    metric = MeanAveragePrecision(iou_thresholds=[0.5], class_metrics=True)
    with torch.no_grad():
        for batch in loader:
            inputs, targets = TASK.unpack(batch)
            TASK.update(metric, TASK.forward(model, inputs), targets)
    return [float(value) for value in metric.compute()["map_per_class"]]


def rows_by_class(model: nn.Module, data: Path) -> list[dict[str, Any]]:
    """Returns the rows of the measurement with --classes."""

    def row(criterion: str, seed: int, removed: str, pruned: nn.Module) -> dict[str, Any]:
        found = precisions(pruned, test)
        print(criterion, seed, removed, [round(value, 3) for value in found], flush=True)
        return {"criterion": criterion, "seed": seed, "removed": removed, **dict(zip(NAMES, found, strict=True))}

    _, test = loaders(data, 0)
    rows = [row("dense", 0, "nothing", model)]
    for seed in SEEDS:
        train, _ = loaders(data, seed)
        run = Run(model, train, test, task=TASK, latency=False)
        generator = torch.Generator().manual_seed(seed)
        chance = [torch.rand(site.size, generator=generator) for site in run.sites]
        orders = {("random", "units at random"): chance}
        for name in ("taylor", "xpruner"):
            tables = run.score(name, BUDGET, seed=seed).classwise or ()
            for kind, title in enumerate(NAMES):
                orders[name, f"units of {title}"] = [table[kind] for table in tables]
        for (name, removed), scores in orders.items():
            keeps = []
            for score in scores:
                stay = score.argsort()[: len(score) - int(REMOVED * len(score))]
                keeps.append(tuple(sorted(stay.tolist())))
            plan = xprune.Plan(tuple(run.sites), tuple(keeps))
            rows.append(row(name, seed, removed, xprune.apply(model, plan, run.example)))
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table with the mean and the standard deviation over seeds, in %."""
    columns = {
        "mAP": "mAP before fine-tuning",
        "mAP50": "mAP50 before",
        "mAP after": "mAP after",
        "mAP50 after": "mAP50 after",
    }
    lines = [f"| criterion | {' | '.join(columns.values())} | MACs |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for name in dict.fromkeys(row["criterion"] for row in rows):
        here, cells = [row for row in rows if row["criterion"] == name], []
        for column in (*columns, "macs"):
            values = [100 * row[column] for row in here]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f}" + (f" ± {spread:.1f}" if spread >= 0.05 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[Path, typer.Option(help="folder with bccd_320x240.npz")],
    cache: Annotated[Path, typer.Option(help="folder for the dense model and for finished rows")] = Path("dense"),
    classes: Annotated[bool, typer.Option("--classes", help="measure class-wise scores instead")] = False,
) -> None:
    """Trains the dense model if it is missing, compares the criteria, and writes the table."""
    torch.set_num_threads(1)
    model = dense(data, cache)
    if classes:
        about = f"average precision at IoU 0.5, after removing {REMOVED:.0%} of the units of each site"
        record("detection-classes", rows_by_class(model, data), about, dense=asdict(DENSE))
        return
    rows = [row for seed in SEEDS for row in rows_of_seed(model, data, seed, cache / "bccd-rows")]
    settings = {"dense": asdict(DENSE), "finetune": asdict(TUNE), "budget": str(BUDGET), "dense models": 1}
    record("detection-bccd", rows, "mAP on the test images of BCCD, 128 x 160, at half of the MACs", **settings)
    (RESULTS / "detection-bccd.md").write_text(markdown(rows))


if __name__ == "__main__":
    typer.run(main)
