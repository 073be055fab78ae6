"""Data of the command line: folders of images as timm reads them, and data sets the package knows by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.transforms_factory import create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from xprune.errors import DataError

KNOWN = ("digits",)
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


@dataclass(frozen=True)
class Data:
    """Training and validation batches, and the number of classes."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: int


def load_data(name: str, config: Mapping[str, Any], *, batch_size: int = 64, workers: int = 0, seed: int = 0) -> Data:
    """The data set of that name, or the ImageFolder in the directory of that name.

    config   input_size (channels, height, width), mean, std, ... as `timm.data.resolve_model_data_config` gives them

    A directory holds train/ and val/, each with one folder a class; or the class folders themselves, of which every
    tenth image is then kept for validation. Raises DataError for anything else.
    """
    if name == "digits":
        train, val, classes = _digits(config)
    else:
        train, val, classes = _folder(Path(name), config, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = DataLoader(train, batch_size, shuffle=True, generator=generator, num_workers=workers)
    return Data(shuffled, DataLoader(val, batch_size, num_workers=workers), classes)


def class_names(loader: DataLoader[Any]) -> tuple[str, ...] | None:
    """Names of the class folders by index, None for data that are no folders."""
    rows: Any = loader.dataset
    reader = getattr(rows.dataset if isinstance(rows, Subset) else rows, "reader", None)
    found: Mapping[str, int] = getattr(reader, "class_to_idx", {})
    return tuple(sorted(found, key=found.__getitem__)) or None


def digits(size: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 scanned digits, float32 (n, channels, size, size) in -1 to 1, and labels int64 (n,).

    8 x 8 originals (Alpaydin and Kaynak, 1998, UCI), enlarged bilinearly.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 8 - 1  # (n, 1, 8, 8)
    if size != 8:
        images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.repeat(1, channels, 1, 1), torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def _digits(config: Mapping[str, Any]) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Every fifth digit is for validation."""
    channels, height, _ = config["input_size"]
    images, labels = digits(height, channels)
    held = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~held], labels[~held]), TensorDataset(images[held], labels[held]), 10


def _folder(root: Path, config: Mapping[str, Any], seed: int) -> tuple[Dataset[Any], Dataset[Any], int]:
    if not root.is_dir():
        raise DataError(f"{root} is neither a directory nor a known data set ({', '.join(KNOWN)}).")
    shared = {key: config[key] for key in ("input_size", "mean", "std", "interpolation") if key in config}
    augmented = create_transform(**shared, is_training=True)
    plain = create_transform(**shared, crop_pct=config.get("crop_pct"))
    found = {split: next((root / n for n in names if (root / n).is_dir()), None) for split, names in _SPLITS.items()}
    if found["train"] and found["val"]:
        train, val = _images(found["train"], augmented), _images(found["val"], plain)
        if train.reader.class_to_idx != val.reader.class_to_idx:
            raise DataError(f"{found['train']} and {found['val']} do not hold the same class folders.")
        return train, val, len(train.reader.class_to_idx)
    if found["train"] or found["val"]:
        raise DataError(
            f"{root} holds {found['train'] or found['val']} only: wanted train/ and val/, or class folders."
        )
    train, val = _images(root, augmented), _images(root, plain)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 10)
    return Subset(train, order[held:]), Subset(val, order[:held]), len(train.reader.class_to_idx)


class _Images(ImageDataset):
    """timm's, which puts the next image in the place of one that cannot be read; this one says which it is."""

    def __getitem__(self, index: int) -> Any:
        file, target = self.reader[index]
        try:
            with file:
                image = Image.open(file).convert("RGB")
        except OSError as error:
            name = self.filename(index, absolute=True)
            raise DataError(f"{name} cannot be read as an image: mend or remove the file.") from error
        return self.transform(image), target


def _images(root: Path, transform: Any) -> Any:
    try:
        return _Images(str(root), transform=transform)
    except Exception as error:
        raise DataError(f"{root} is no ImageFolder (one folder of images a class): {error}.") from error
