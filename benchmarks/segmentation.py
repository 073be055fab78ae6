"""Compares criteria on image segmentation (CamVid) at half of the MACs, with the dense model and with random scores.

    python -m benchmarks.segmentation --data DIR [--cache DIR]

DIR holds camvid_240x180.npz. The model is a small ViT with a decode head. The figure is the mean intersection over
union (mIoU) on the test split, before and after fine-tuning. Nothing is trained or chosen with the test split. The
result is docs/results/segmentation-camvid, with comparison.json and table.md.

The model is trained from scratch on small images of 96 x 128, so the figures can be compared with each other, but not
with published ones. There is one dense model. The seeds are those of scores and fine-tuning.
"""

import io
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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import xprune
from benchmarks.record import RESULTS

SIZE, CLASSES, BATCH = (96, 128), 11, 8
TASK = xprune.Segmentation(ignore_index=11)
DENSE = xprune.Finetune(epochs=100, lr=1.5e-3, weight_decay=0.05)
TUNE = xprune.Finetune(epochs=2, lr=5e-4)


def convolution(before: int, after: int) -> nn.Sequential:
    """Returns a 3x3 convolution that halves height and width, a batch norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Stem(nn.Module):
    """A patch embedding of three strided 3x3 convolutions, for patches of 8 x 8."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        widths = in_chans, embed_dim // 4, embed_dim // 2
        self.net = nn.Sequential(
            convolution(*widths[:2]), convolution(*widths[1:]), nn.Conv2d(widths[2], embed_dim, 3, 2, 1)
        )
        self.grid_size = img_size[0] // patch_size, img_size[1] // patch_size
        self.num_patches, self.patch_size = self.grid_size[0] * self.grid_size[1], (patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (batch, 3, height, width) to (batch, patches, embed_dim)."""
        return self.net(images).flatten(2).transpose(1, 2)


class Segmenter(nn.Module):
    """A ViT over patches of 8 x 8, and a decode head.

    The head joins the features of the ViT with features of two convolutions at a quarter of the image size.
    """

    def __init__(self, hidden_size: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        options: dict[str, Any] = {"class_token": False, "global_pool": "", "num_classes": 0, "embed_layer": Stem}
        self.vit = VisionTransformer(SIZE, 8, embed_dim=hidden_size, depth=depth, num_heads=heads, **options)
        self.detail = nn.Sequential(convolution(3, 16), convolution(16, 32))
        self.join = nn.Sequential(nn.Conv2d(hidden_size + 32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.classify = nn.Conv2d(64, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (batch, 3, 96, 128) to logits (batch, classes, 24, 32)."""
        # (batch, 192, hidden_size)
        tokens = self.vit(images)
        grid = tokens.transpose(1, 2).unflatten(2, (SIZE[0] // 8, SIZE[1] // 8))
        grid = F.interpolate(grid, scale_factor=2, mode="bilinear", align_corners=False)
        return self.classify(self.join(torch.cat([grid, self.detail(images)], 1)))


class Scenes(Dataset[Any]):
    """Images with a label for each pixel, in batches of 96 x 128.

    Args:
        images: uint8 (n, 3, 180, 240).
        labels: uint8 (n, 180, 240). 11 is a pixel to ignore.
        augment: True: a random crop, the same for all images of a batch, and random flips. The crop keeps at least half
            of each side.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns a batch: images float32 (batch, 3, 96, 128), labels int64 (batch, 96, 128)."""
        where = torch.as_tensor(indices)
        images, labels = self.images[where].float() / 255, self.labels[where]
        if self.augment:
            share = 0.5 + 0.5 * float(torch.rand(()))
            (high, wide), (height, width) = [int(share * n) for n in labels.shape[1:]], labels.shape[1:]
            top, left = (int(torch.randint(0, n + 1, ())) for n in (height - high, width - wide))
            images, labels = (x[..., top : top + high, left : left + wide] for x in (images, labels))
            flip = torch.rand(len(where)) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            labels = torch.where(flip[:, None, None], labels.flip(-1), labels)
        images = F.interpolate(images, size=SIZE, mode="bilinear", align_corners=False, antialias=True)
        labels = F.interpolate(labels[:, None].float(), size=SIZE, mode="nearest")[:, 0].long()
        return (images - 0.45) / 0.25, labels


def loaders(data: Path, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Returns training and test batches. The seed is that of the order of training images."""
    pack = np.load(data / "camvid_240x180.npz")

    def split(name: str, augment: bool) -> Scenes:
        """Decodes the JPEG files of a split, which are stored one after another with their offsets."""
        ends = pack[f"{name}_off"]
        files = [pack[f"{name}_data"][a:b].tobytes() for a, b in pairwise(ends)]
        images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        return Scenes(
            torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(pack[f"{name}_mask"]).clone(), augment
        )

    # `Scenes` returns whole batches, so nothing has to be put together.
    def unchanged(batch: Any) -> Any:
        return batch

    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(split("train", True), BATCH, shuffle=True, generator=generator, collate_fn=unchanged)
    return train, DataLoader(split("test", False), 16, collate_fn=unchanged)


def dense(data: Path, cache: Path) -> nn.Module:
    """Returns the dense model. It is trained if the cache does not have its weights."""
    file = cache / "camvid-vit.safetensors"
    torch.manual_seed(0)
    model = Segmenter()
    if not file.is_file():
        train, test = loaders(data, 0)
        model = xprune.finetune(model, train, DENSE, task=TASK)
        print("dense", xprune.evaluate(model, test, task=TASK))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def main(
    data: Annotated[Path, typer.Option(help="folder with camvid_240x180.npz")],
    cache: Annotated[Path, typer.Option(help="folder for the weights of dense models")] = Path("dense"),
) -> None:
    """Trains the dense model if it is missing, compares the criteria, and writes the table."""
    torch.set_num_threads(1)
    model = dense(data, cache)

    def case(seed: int) -> xprune.Case:
        """Returns the dense model with the batches of a seed."""
        return xprune.Case(model, *loaders(data, seed))

    criteria = {"random": "random", "magnitude": "magnitude", "taylor": "taylor", "xpruner": "xpruner"}
    grid = xprune.Grid(criteria, seeds=(0, 1, 2), finetune=TUNE, task=TASK)
    settings = {"model": "ViT, width 96, depth 4, decode head, 96 x 128", "dense": asdict(DENSE), "dense models": 1}
    folder = RESULTS / "segmentation-camvid"
    command = "python -m benchmarks.segmentation --data DIR"
    found = xprune.compare(case, grid, folder, command=command, metric="mIoU, test", **settings)
    (folder / "table.md").write_text(found.markdown())


if __name__ == "__main__":
    typer.run(main)
