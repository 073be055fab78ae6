"""Data of the command line: folders of images as timm reads them, and data sets the package knows by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from xprune.errors import DataError

KNOWN = ("digits",)
_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid")
_TEST = ("test",)


@dataclass(frozen=True)
class Data:
    """Training and validation batches, the number of classes, and in words how the two were split."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: int
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """What a model is measured on.

    loader    batches in a fixed order, without augmentation
    classes   number of classes
    split     "validation" or "test" for a part of the data, "given" for all that was given
    note      the same in words, with the number of images
    """

    loader: DataLoader[Any]
    classes: int
    split: str
    note: str


def load_data(name: str, config: Mapping[str, Any], *, batch_size: int = 64, workers: int = 0, seed: int = 0) -> Data:
    """The data set of that name, or the ImageFolder in the directory of that name, to prune with.

    Args:
        name: "digits", or a directory. It holds train/ and val/ (or test/), each with one folder a class; or the class
            folders themselves, of which a tenth of the images, drawn at random, is then held out for validation.
        config: input_size (channels, height, width), mean, std, ... as `timm.data.resolve_model_data_config` gives
            them.
        batch_size: Samples a batch.
        workers: Processes that load data.
        seed: Of the order of training samples, and of the images that are held out.

    Raises:
        DataError: The directory holds something else.
    """
    if name == "digits":
        train, val, classes = _digits(config)
        note = f"data: digits, {len(val)} of {len(train) + len(val)} images are held out for validation"  # type: ignore[arg-type]
    else:
        train, val, classes, note = _folder(Path(name), config, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = DataLoader(train, batch_size, shuffle=True, generator=generator, num_workers=workers)
    return Data(shuffled, DataLoader(val, batch_size, num_workers=workers), classes, note)


def load_measured(name: str, config: Mapping[str, Any], *, batch_size: int = 64, workers: int = 0) -> Measured:
    """The data set of that name, or the ImageFolder in the directory of that name, to measure a model on.

    Args:
        name: "digits", whose validation part is taken; or a directory. Of one with splits, val/ is taken, or test/
            where there is no val/. Of one with class folders all images are taken.
        config: See `load_data`.
        batch_size: Samples a batch.
        workers: Processes that load data.

    Raises:
        DataError: The directory holds something else, or a training split alone.
    """
    if name == "digits":
        _, rows, classes = _digits(config)
        split, what = "validation", "images of digits that are held out for validation"
    else:
        root = Path(name)
        found = _splits(root)
        if found["train"] and not (found["val"] or found["test"]):
            raise DataError(
                f"{root} holds {found['train'].name}/ and neither val/ nor test/. To measure on the training images, "
                f"give {found['train']}."
            )
        folder = found["val"] or found["test"] or root
        split = "validation" if found["val"] else "test" if found["test"] else "given"
        rows = _images(folder, _plain(config))
        classes = len(rows.reader.class_to_idx)
        what = f"images of {folder}" + ("" if split != "given" else ", which has no splits") + _unread(folder)
    note = f"data: all {len(rows):,} {what}"  # type: ignore[arg-type]
    return Measured(DataLoader(rows, batch_size, num_workers=workers), classes, split, note)


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


def _splits(root: Path) -> dict[str, Path | None]:
    """The folders of the splits, None for one that is not there. A folder of images alone is a class, not a split."""
    if not root.is_dir():
        raise DataError(f"{root} is neither a directory nor a known data set ({', '.join(KNOWN)}).")

    def first(names: tuple[str, ...]) -> Path | None:
        folders = (root / name for name in names if (root / name).is_dir())
        return next((f for f in folders if any(entry.is_dir() for entry in f.iterdir())), None)

    return {"train": first(_TRAIN), "val": first(_VAL), "test": first(_TEST)}


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("input_size", "mean", "std", "interpolation") if key in config}


def _plain(config: Mapping[str, Any]) -> Any:
    """The transform without augmentation."""
    from timm.data.transforms_factory import create_transform  # here and below: importing timm takes long

    return create_transform(**_shared(config), crop_pct=config.get("crop_pct"))


def _folder(root: Path, config: Mapping[str, Any], seed: int) -> tuple[Dataset[Any], Dataset[Any], int, str]:
    """(images to learn from, images to measure on, number of classes, how they were split)."""
    from timm.data.transforms_factory import create_transform

    found = _splits(root)
    augmented, plain = create_transform(**_shared(config), is_training=True), _plain(config)
    learn, measure = found["train"], found["val"] or found["test"]
    if learn and measure:
        train, val = _images(learn, augmented), _images(measure, plain)
        if train.reader.class_to_idx != val.reader.class_to_idx:
            raise DataError(f"{learn} and {measure} do not hold the same class folders.")
        note = f"data: {len(train):,} images of {learn} to learn from, {len(val):,} of {measure} to measure on"
        return train, val, len(train.reader.class_to_idx), note
    if learn or measure:
        raise DataError(f"{root} holds {learn or measure} only: wanted train/ and val/, or class folders.")
    train, val = _images(root, augmented), _images(root, plain)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 10)
    note = (
        f"data: {root} has no train/ and val/: {held:,} of its {len(order):,} images, drawn at random with "
        f"seed {seed}, are held out to measure on"
    )
    return Subset(train, order[held:]), Subset(val, order[:held]), len(train.reader.class_to_idx), note


def _unread(folder: Path) -> str:
    """How many files of the class folders are no images that timm reads, by their endings; "" for none."""
    from timm.data.readers.img_extensions import get_img_extensions

    known = set(get_img_extensions())
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    other = [path.suffix.lower() or "no ending" for path in files if path.suffix.lower() not in known]
    if not other:
        return ""
    return f"; {len(other):,} other files were not read ({', '.join(sorted(set(other))[:5])})"


class _Images(Dataset[Any]):
    """timm's folders of images. timm puts the next image in the place of a broken one. This class says which is broken.

    Attributes:
        reader: timm's reader, which lists the files and the classes.
        transform: Makes a tensor of an image.
    """

    def __init__(self, root: str, transform: Any) -> None:
        from timm.data.dataset import ImageDataset

        self.images = ImageDataset(root, transform=transform)
        self.reader: Any = self.images.reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        file, target = self.reader[index]
        try:
            with file:
                image = Image.open(file).convert("RGB")
        except OSError as error:
            name = self.images.filename(index, absolute=True)
            raise DataError(f"{name} cannot be read as an image: mend or remove the file.") from error
        return self.transform(image), target


def _images(root: Path, transform: Any) -> Any:
    try:
        return _Images(str(root), transform=transform)
    except Exception as error:
        raise DataError(f"{root} is no ImageFolder (one folder of images a class): {error}.") from error
