"""Holds the models, data sets and training recipes of the benchmarks that compare criteria on images.

    python -m benchmarks.workloads NAME SEED DATA CACHE

The models are small enough for two CPU cores. The digits come with scikit-learn. The other data sets are packs: files
.npz with the JPEG files of all images. The command trains a dense model ahead, saves its weights in the folder CACHE
and prints its metrics on validation images. Benchmarks with the option --cache find it there.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import xprune
from xprune.data import digits

# Data set -> its pack, and the name of the split in it that is used for the test.
PACKS = {"cifar10": ("cifar10_jpeg.npz", "test"), "tinyimagenet": ("tinyimagenet_s0of4_jpeg.npz", "val")}
VALIDATION = {"digits": 180, "cifar10": 5000, "tinyimagenet": 2500}
"""Data set -> number of training images that are kept for validation."""
LIMITS = {"cifar10": (10_000, 5_000)}
"""Data set -> number of training images for pruning and fine-tuning, and number of test images for the figures.

These are as many as two CPU cores can do.
"""


@dataclass(frozen=True)
class Workload:
    """A model, its data and its training recipes.

    Args:
        data: "digits", or a key of PACKS.
        build: Returns the model with random weights.
        dense: How the dense model is trained.
        tune: Fine-tuning after pruning, also of the dense model.
        batch: Images in a batch.
    """

    data: str
    build: Callable[[], nn.Module]
    dense: xprune.Finetune
    tune: xprune.Finetune
    batch: int = 128


class Stem(nn.Module):
    """A patch embedding of strided 3x3 convolutions (Xiao et al., NeurIPS 2021).

    ViTs learn better from small data sets with it.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__()
        steps = int(np.log2(patch_size))
        channels = [in_chans, *(embed_dim // 2 ** (steps - 1 - step) for step in range(steps))]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches, self.patch_size = self.grid_size[0] ** 2, (patch_size,) * 2
        self.last = options.get("output_fmt") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Returns (batch, patches, embed_dim), or (batch, height, width, embed_dim) for Swin."""
        x = self.net(images)
        return x.permute(0, 2, 3, 1) if self.last else x.flatten(2).transpose(1, 2)


def _vit(**options: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a ViT with these options."""
    return lambda: VisionTransformer(**options)


def _swin(**options: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds a Swin with these options."""
    return lambda: SwinTransformer(**options)


def _images(size: int, classes: int, patch: int) -> dict[str, Any]:
    """Returns the options of a model for images of this size, with the convolutional stem."""
    return {"img_size": size, "patch_size": patch, "num_classes": classes, "embed_layer": Stem}


VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}
SWIN = {"embed_dim": 64, "depths": (2, 4), "num_heads": (4, 8), "window_size": 4}
DIGITS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10}
TRAIN = xprune.Finetune(epochs=8, lr=2e-3, weight_decay=0.05, label_smoothing=0.1)
SHORT = xprune.Finetune(epochs=3, lr=2e-3, weight_decay=0.05)
TUNE = xprune.Finetune(epochs=1, lr=5e-4)

WORKLOADS = {
    "digits-vit": Workload(
        "digits",
        _vit(**DIGITS, embed_dim=96, depth=6, num_heads=6),
        xprune.Finetune(epochs=60, lr=2e-3),
        xprune.Finetune(epochs=10, lr=5e-4),
        batch=64,
    ),
    "cifar10-vit": Workload("cifar10", _vit(**_images(32, 10, 4), **VIT), TRAIN, TUNE),
    "cifar10-swin": Workload("cifar10", _swin(**_images(32, 10, 4), **SWIN), TRAIN, TUNE),
    "tinyimagenet-vit": Workload("tinyimagenet", _vit(**_images(64, 50, 8), **VIT), TRAIN, TUNE),
    # Smaller models, for benchmarks that learn masks many times.
    "digits-vit-small": Workload(
        "digits",
        _vit(**DIGITS, embed_dim=48, depth=4, num_heads=4),
        xprune.Finetune(epochs=40, lr=2e-3),
        xprune.Finetune(epochs=10, lr=5e-4),
        batch=64,
    ),
    "cifar10-vit-small": Workload(
        "cifar10", _vit(**_images(32, 10, 8), embed_dim=64, depth=4, num_heads=4), SHORT, TUNE, batch=64
    ),
    "cifar10-swin-small": Workload(
        "cifar10",
        _swin(**_images(32, 10, 4), embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4),
        SHORT,
        TUNE,
        batch=64,
    ),
}


class Images(Dataset[Any]):
    """Images with labels, in normalised batches.

    Args:
        images: uint8 (n, 3, size, size).
        labels: int64 (n,).
        augment: True: each image is shifted by up to an eighth of its size and flipped at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns a batch: images float32 (batch, 3, size, size), labels int64 (batch,)."""
        images = self.images[torch.as_tensor(indices)]
        if self.augment:
            size, pad = images.shape[-1], images.shape[-1] // 8
            padded = F.pad(images, (pad,) * 4)
            tops, lefts = torch.randint(0, 2 * pad + 1, (2, len(images))).tolist()
            flips = (torch.rand(len(images)) < 0.5).tolist()
            cut = [x[:, t : t + size, s : s + size] for x, t, s in zip(padded, tops, lefts, strict=True)]
            images = torch.stack([x.flip(-1) if flip else x for x, flip in zip(cut, flips, strict=True)])
        return (images.float() / 255 - 0.45) / 0.25, self.labels[torch.as_tensor(indices)]


@dataclass(frozen=True)
class Splits:
    """The loaders of a workload. Test images are only measured: nothing is trained or chosen with them."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any]


def splits(workload: Workload, folder: Path | None, seed: int) -> Splits:
    """Returns training, validation and test batches.

    The split of the digits depends on the seed. The packs have a fixed test split.

    Args:
        workload: The workload.
        folder: The folder with the packs. None is enough for digits.
        seed: The seed.
    """
    if workload.data == "digits":
        images, labels = digits(DIGITS["img_size"])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
        parts = [order[540:], order[360:540], order[:360]]
        train, val, test = (torch.utils.data.TensorDataset(images[p], labels[p]) for p in parts)
        return Splits(*(DataLoader(d, workload.batch, shuffle=d is train) for d in (train, val, test)))
    if folder is None:
        raise SystemExit(f"{workload.data} needs --data: give the folder with {PACKS[workload.data][0]}.")
    pack, split = PACKS[workload.data]
    images, labels = _decoded(folder / pack, "train")
    validation = VALIDATION[workload.data]
    sets = (
        Images(images[validation:], labels[validation:], augment=True),
        Images(images[:validation], labels[:validation], augment=False),
        Images(*_decoded(folder / pack, split), augment=False),
    )
    return Splits(*(DataLoader(d, workload.batch, shuffle=d.augment, collate_fn=_unchanged) for d in sets))


def dense(name: str, folder: Path | None, seed: int, cache: Path) -> nn.Module:
    """Returns the dense model of a workload and seed. It is trained if the cache does not have its weights."""
    workload, file = WORKLOADS[name], cache / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = workload.build()
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    train = splits(workload, folder, seed).train
    model = xprune.finetune(model, train, workload.dense, seed=seed, checkpoint_dir=cache / f"{name}-{seed}")
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that a stopped process leaves no half-written file behind.
    save_file(model.state_dict(), file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
    return model


def first(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """Returns a loader of `count` images of a loader. They are the same at every call."""
    found = loader.dataset
    assert isinstance(found, Images)
    # The images may be sorted by class, so the first ones would not do.
    some = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count]
    few = Images(found.images[some], found.labels[some], found.augment)
    return DataLoader(few, loader.batch_size, shuffle=found.augment, collate_fn=loader.collate_fn)


def _unchanged(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the batch. `Images` makes whole batches, so there is nothing to put together."""
    return batch


def _decoded(pack: Path, split: str) -> tuple[Tensor, Tensor]:
    """Decodes a split of a pack.

    The pack holds the JPEG files one after another ("data"), where each begins and ends ("off"), and the labels ("y").

    Returns:
        Images uint8 (n, 3, size, size), and labels int64 (n,), numbered from 0.
    """
    with np.load(pack) as file:
        data, offsets, y = (file[f"{split}_{part}"] for part in ("data", "off", "y"))
    files = (data[a:b].tobytes() for a, b in pairwise(offsets))
    arrays = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.unique(y, return_inverse=True)[1].astype(np.int64))


if __name__ == "__main__":
    import sys

    target, number, data_folder, cache_folder = sys.argv[1:5]
    network = dense(target, Path(data_folder), int(number), Path(cache_folder))
    held_out = splits(WORKLOADS[target], Path(data_folder), int(number)).val
    print(target, number, xprune.evaluate(network, held_out))
