"""What the proofs run on: real images, models small enough for two cores, and the recipe of each dense model."""

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

PACKS = {"cifar10": ("cifar10_jpeg.npz", "test"), "tinyimagenet": ("tinyimagenet_s0of4_jpeg.npz", "val")}
HELD = {"digits": 180, "cifar10": 5000, "tinyimagenet": 2500}
"""Training images that are set apart for validation; the test split is what each source calls its own."""
LIMITS = {"cifar10": (10_000, 5_000)}
"""Training images that pruning and fine-tuning use, and test images that figures are measured on: what two cores do."""


@dataclass(frozen=True)
class Workload:
    """A model, its data and the recipe of its dense weights. `data` is a key of PACKS, or digits."""

    data: str
    build: Callable[[], nn.Module]
    dense: xprune.Finetune
    tune: xprune.Finetune
    batch: int = 128


class Stem(nn.Module):
    """A patch embedding of strided 3x3 convolutions, which small data sets want (Xiao et al., NeurIPS 2021)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__()
        steps = int(np.log2(patch_size))
        widths = [in_chans, *(embed_dim // 2 ** (steps - 1 - step) for step in range(steps))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches, self.patch_size = self.grid_size[0] ** 2, (patch_size,) * 2
        self.last = options.get("output_fmt") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """(batch, patches, embed_dim), or (batch, height, width, embed_dim) for Swin."""
        x = self.net(images)
        return x.permute(0, 2, 3, 1) if self.last else x.flatten(2).transpose(1, 2)


def _vit(**options: Any) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**options)


def _swin(**options: Any) -> Callable[[], nn.Module]:
    return lambda: SwinTransformer(**options)


def _images(size: int, classes: int, patch: int) -> dict[str, Any]:
    return {"img_size": size, "patch_size": patch, "num_classes": classes, "embed_layer": Stem}


VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}
SWIN = {"embed_dim": 64, "depths": (2, 4), "num_heads": (4, 8), "window_size": 4}
DIGITS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10}
TRAIN = xprune.Finetune(epochs=8, lr=2e-3, weight_decay=0.05, label_smoothing=0.1)
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
}


class Images(Dataset[Any]):
    """Images uint8 (n, 3, size, size), handed out by the batch: normalised, and shifted and flipped where asked."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch: (float32 (batch, 3, size, size), int64 (batch,))."""
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
    """Loaders of a workload. Test images train nothing and choose nothing."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any]


def splits(workload: Workload, folder: Path | None, seed: int) -> Splits:
    """Training, validation and test batches; digits draws its split from the seed, the packs have a test split."""
    if workload.data == "digits":
        images, labels = digits(DIGITS["img_size"])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
        parts = [order[540:], order[360:540], order[:360]]
        train, val, test = (torch.utils.data.TensorDataset(images[p], labels[p]) for p in parts)
        return Splits(*(DataLoader(d, workload.batch, shuffle=d is train) for d in (train, val, test)))
    if folder is None:
        raise SystemExit(f"{workload.data} needs --data, the folder with {PACKS[workload.data][0]}.")
    pack, split = PACKS[workload.data]
    images, labels = _decoded(folder / pack, "train")
    held = HELD[workload.data]
    sets = (
        Images(images[held:], labels[held:], augment=True),
        Images(images[:held], labels[:held], augment=False),
        Images(*_decoded(folder / pack, split), augment=False),
    )
    return Splits(*(DataLoader(d, workload.batch, shuffle=d.augment, collate_fn=_whole) for d in sets))


def dense(name: str, folder: Path | None, seed: int, cache: Path) -> nn.Module:
    """The dense model of a workload and seed, trained by its recipe or read from the cache."""
    workload, path = WORKLOADS[name], cache / f"{name}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = workload.build()
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    train = splits(workload, folder, seed).train
    model = xprune.finetune(model, train, workload.dense, seed=seed, checkpoint_dir=cache / f"{name}-{seed}")
    cache.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return model


def first(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """A loader of `count` of the images, the same ones at every call."""
    found = loader.dataset
    assert isinstance(found, Images)
    some = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count]  # files may be sorted
    few = Images(found.images[some], found.labels[some], found.augment)
    return DataLoader(few, loader.batch_size, shuffle=found.augment, collate_fn=loader.collate_fn)


def _whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _decoded(pack: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images uint8 (n, 3, size, size), labels int64 (n,)) of a pack of JPEG files, labels renumbered from 0."""
    with np.load(pack) as file:
        data, offsets, y = (file[f"{split}_{part}"] for part in ("data", "off", "y"))
    files = (data[a:b].tobytes() for a, b in pairwise(offsets))
    arrays = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.unique(y, return_inverse=True)[1].astype(np.int64))


if __name__ == "__main__":  # trains the dense models ahead: python -m benchmarks.workloads NAME SEED DATA CACHE
    import sys

    target, number, data_folder, cache_folder = sys.argv[1:5]
    network = dense(target, Path(data_folder), int(number), Path(cache_folder))
    held_out = splits(WORKLOADS[target], Path(data_folder), int(number)).val
    print(target, number, xprune.evaluate(network, held_out))
