"""Loads data for the command line: folders of images, which timm reads, and the built-in data set "digits"."""

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
"""The names of the built-in data sets. Any other name that a user gives is taken as the name of a folder."""
# The names that the folder of each split may have. The first folder that exists is used.
_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid")
_TEST = ("test",)


@dataclass(frozen=True)
class Data:
    """Training and validation data, which the command line prunes a model with.

    Attributes:
        train: Training batches in random order. Images from folders are augmented.
        val: Validation batches in a fixed order and without augmentation.
        classes: The number of classes.
        note: A sentence for the user about how the data were split.
    """

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: int
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """Data that the command line measures a model on.

    Attributes:
        loader: Batches in a fixed order and without augmentation.
        classes: The number of classes.
        split: "validation" or "test" if the data are one of these splits. "given" if they are all images of a folder
            without splits.
        note: A sentence for the user about which images are measured, and how many.
    """

    loader: DataLoader[Any]
    classes: int
    split: str
    note: str


def load_data(name: str, config: Mapping[str, Any], *, batch_size: int = 64, workers: int = 0, seed: int = 0) -> Data:
    """Loads a data set to prune a model with.

    A folder may contain the folders train/ and val/, each with one folder of images for each class. test/ is used if
    there is no val/. Or the folder contains the class folders directly. A tenth of the images, chosen at random, is
    then used for validation only.

    Args:
        name: "digits", or the name of a folder.
        config: Settings of the images, such as input_size (channels, height, width), mean and std.
            `timm.data.resolve_model_data_config` returns them.
        batch_size: The number of samples in a batch.
        workers: The number of processes that load data. 0 means that the data are loaded in this process.
        seed: The seed for the order of the training samples, and for the choice of the validation images.

    Returns:
        The training and the validation data.

    Raises:
        DataError: The folder does not exist, or its contents have another form.

    Example:
        >>> data = load_data("digits", {"input_size": (1, 8, 8)}, batch_size=16)
        >>> data.classes, next(iter(data.val))[0].shape
        (10, torch.Size([16, 1, 8, 8]))
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
    """Loads a data set to measure a model on.

    The images are those of val/, or of test/ if the folder has no val/. If the folder has neither of them and no
    train/, they are all images in its class folders. For "digits", they are the validation images.

    Args:
        name: "digits", or the name of a folder.
        config: Settings of the images, see `load_data`.
        batch_size: The number of samples in a batch.
        workers: The number of processes that load data. 0 means that the data are loaded in this process.

    Returns:
        The batches, with a sentence that says what they are.

    Raises:
        DataError: The folder does not exist, its contents have another form, or it has only a training split.
    """
    if name == "digits":
        _, images, classes = _digits(config)
        split, what = "validation", "images of digits that are held out for validation"
    else:
        root = Path(name)
        found = _splits(root)
        if found["train"] and not (found["val"] or found["test"]):
            raise DataError(
                f"{root} holds {found['train'].name}/ and neither val/ nor test/. To measure on the training images, "
                f"give {found['train']} as the folder."
            )
        folder = found["val"] or found["test"] or root
        split = "validation" if found["val"] else "test" if found["test"] else "given"
        images = _images(folder, _plain(config))
        classes = len(images.reader.class_to_idx)
        what = f"images of {folder}" + ("" if split != "given" else ", which has no splits") + _unread(folder)
    note = f"data: all {len(images):,} {what}"  # type: ignore[arg-type]
    return Measured(DataLoader(images, batch_size, num_workers=workers), classes, split, note)


def class_names(loader: DataLoader[Any]) -> tuple[str, ...] | None:
    """Returns the names of the class folders, in the order of the class indices.

    Returns None if the data of the loader do not come from class folders.
    """
    images: Any = loader.dataset
    reader = getattr(images.dataset if isinstance(images, Subset) else images, "reader", None)
    found: Mapping[str, int] = getattr(reader, "class_to_idx", {})
    return tuple(sorted(found, key=found.__getitem__)) or None


def digits(size: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the 1,797 images of handwritten digits that scikit-learn contains, and their labels.

    The original images are 8 x 8 (Alpaydin and Kaynak, 1998, UCI). Larger images are made by bilinear interpolation.

    Args:
        size: The height and width of the images.
        channels: The number of channels. All channels of an image are equal.

    Returns:
        A tuple (images, labels). The images are float32 (1797, channels, size, size) from -1 to 1. The labels are int64
        (1797,).

    Example:
        >>> images, labels = digits(16, channels=3)
        >>> images.shape, labels[:3]
        (torch.Size([1797, 3, 16, 16]), tensor([0, 1, 2]))
    """
    # scikit-learn is imported here because only this data set needs it, and the import takes long.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The grey values of the originals go from 0 to 16. The shape becomes (1797, 1, 8, 8).
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 8 - 1
    if size != 8:
        images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.repeat(1, channels, 1, 1), torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def _digits(config: Mapping[str, Any]) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Returns (training digits, validation digits, number of classes). Every fifth digit is a validation digit."""
    channels, height, _ = config["input_size"]
    images, labels = digits(height, channels)
    held = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~held], labels[~held]), TensorDataset(images[held], labels[held]), 10


def _splits(root: Path) -> dict[str, Path | None]:
    """Returns the folder of each split in a folder: "train", "val" and "test". None for a split that does not exist."""
    if not root.is_dir():
        raise DataError(
            f"{root} is neither a folder nor a known data set ({', '.join(KNOWN)}). Give a folder with train/ and "
            "val/, or with one folder for each class."
        )

    def first(names: tuple[str, ...]) -> Path | None:
        """Returns the first folder with one of these names that contains folders. Returns None if there is none."""
        # A class may have the name of a split, such as "test". Its folder contains images but no folders.
        folders = (root / name for name in names if (root / name).is_dir())
        return next((f for f in folders if any(entry.is_dir() for entry in f.iterdir())), None)

    return {"train": first(_TRAIN), "val": first(_VAL), "test": first(_TEST)}


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the transforms with and without augmentation have in common."""
    return {key: config[key] for key in ("input_size", "mean", "std", "interpolation") if key in config}


def _plain(config: Mapping[str, Any]) -> Any:
    """Returns timm's transform of images without augmentation."""
    # The import of timm takes seconds. So each function of this file imports only what it needs.
    from timm.data.transforms_factory import create_transform

    return create_transform(**_shared(config), crop_pct=config.get("crop_pct"))


def _folder(root: Path, config: Mapping[str, Any], seed: int) -> tuple[Dataset[Any], Dataset[Any], int, str]:
    """Loads the images of a folder with or without splits.

    Returns:
        A tuple (training images, validation images, number of classes, sentence about the split).
    """
    from timm.data.transforms_factory import create_transform

    found = _splits(root)
    augmented, plain = create_transform(**_shared(config), is_training=True), _plain(config)
    learn, measure = found["train"], found["val"] or found["test"]
    if learn and measure:
        train, val = _images(learn, augmented), _images(measure, plain)
        if train.reader.class_to_idx != val.reader.class_to_idx:
            raise DataError(
                f"{learn} and {measure} do not hold the same class folders. Both need one folder for each class, with "
                "the same names."
            )
        note = f"data: {len(train):,} images of {learn} to learn from, {len(val):,} of {measure} to measure on"
        return train, val, len(train.reader.class_to_idx), note
    if learn or measure:
        raise DataError(
            f"{root} holds {learn or measure} only: wanted train/ and val/, or class folders. Add the other split, or "
            "give the folder that holds the class folders."
        )
    # Both data sets contain all images, once with augmentation and once without. The indices below choose the images
    # for each.
    train, val = _images(root, augmented), _images(root, plain)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 10)
    note = (
        f"data: {root} has no train/ and val/: {held:,} of its {len(order):,} images, chosen at random with "
        f"seed {seed}, are held out to measure on"
    )
    return Subset(train, order[held:]), Subset(val, order[:held]), len(train.reader.class_to_idx), note


def _unread(folder: Path) -> str:
    """Returns a text about files in a folder that timm does not read because of their endings. "" if there are none."""
    from timm.data.readers.img_extensions import get_img_extensions

    known = set(get_img_extensions())
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    other = [path.suffix.lower() or "no ending" for path in files if path.suffix.lower() not in known]
    if not other:
        return ""
    return f"; {len(other):,} other files were not read ({', '.join(sorted(set(other))[:5])})"


class _Images(Dataset[Any]):
    """The images of a folder. A file that is not an image raises DataError with the name of the file.

    timm's own class would return the next image instead of an error.

    Args:
        root: The folder. It contains one folder for each class.
        transform: A function that turns an image into a tensor.

    Attributes:
        images: timm's data set. It gives the names of the files and the number of images.
        reader: timm's reader, which lists the files and the classes.
        transform: The function that turns an image into a tensor.
    """

    def __init__(self, root: str, transform: Any) -> None:
        from timm.data.dataset import ImageDataset

        self.images = ImageDataset(root, transform=transform)
        self.reader: Any = self.images.reader
        self.transform = transform

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        file, target = self.reader[index]
        try:
            with file:
                image = Image.open(file).convert("RGB")
        except OSError as error:
            name = self.images.filename(index, absolute=True)
            raise DataError(f"{name} cannot be read as an image: repair or remove the file.") from error
        return self.transform(image), target


def _images(root: Path, transform: Any) -> Any:
    """Returns the images in the class folders of a folder. Raises DataError if the folder has no class folders."""
    try:
        return _Images(str(root), transform=transform)
    except Exception as error:
        raise DataError(
            f"{root} is not an ImageFolder, which holds one folder of images for each class: {error}."
        ) from error
