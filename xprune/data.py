"""Data for the command line: folders of images, which timm reads, and the built-in data set "digits"."""

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
"""Names of the built-in data sets. Any other name is the name of a folder."""
# Names that the folders of the splits may have. The first one that exists is taken.
_TRAIN = ("train", "training")
_VAL = ("val", "validation", "valid")
_TEST = ("test",)


@dataclass(frozen=True)
class Data:
    """Data to prune with.

    Attributes:
        train: Training batches, shuffled, with augmentation for folders of images.
        val: Validation batches, in a fixed order and without augmentation.
        classes: Number of classes.
        note: A sentence for the user that says how the data were split.
    """

    train: DataLoader[Any]
    val: DataLoader[Any]
    classes: int
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """Data to measure a model on.

    Attributes:
        loader: Batches in a fixed order, without augmentation.
        classes: Number of classes.
        split: "validation" or "test" for that split of the data, "given" for all images of a folder without splits.
        note: A sentence for the user that says the same, with the number of images.
    """

    loader: DataLoader[Any]
    classes: int
    split: str
    note: str


def load_data(name: str, config: Mapping[str, Any], *, batch_size: int = 64, workers: int = 0, seed: int = 0) -> Data:
    """Loads a data set to prune with.

    Args:
        name: "digits", or a folder. The folder holds train/ and val/ (or test/), each with one folder for each class.
            Or it holds the class folders themselves. A tenth of their images, drawn at random, is then held out for
            validation.
        config: Settings of the images: input_size (channels, height, width), mean, std and others, as
            `timm.data.resolve_model_data_config` gives them.
        batch_size: Samples in a batch.
        workers: Number of processes that load data. 0 loads in this process.
        seed: Seed of the order of training samples, and of the images that are held out.

    Raises:
        DataError: The folder does not exist, or holds something else.

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

    Args:
        name: "digits", or a folder. Of "digits" the validation part is loaded. Of a folder with splits, val/ is loaded,
            or test/ if there is no val/. Of a folder of class folders, all images are loaded.
        config: See `load_data`.
        batch_size: Samples in a batch.
        workers: Number of processes that load data. 0 loads in this process.

    Raises:
        DataError: The folder does not exist, holds something else, or holds a training split only.
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
    """Returns the names of the class folders in the order of the class indices. None for data that are not folders."""
    images: Any = loader.dataset
    reader = getattr(images.dataset if isinstance(images, Subset) else images, "reader", None)
    found: Mapping[str, int] = getattr(reader, "class_to_idx", {})
    return tuple(sorted(found, key=found.__getitem__)) or None


def digits(size: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scikit-learn's 1,797 scanned digits.

    The originals are 8 x 8 (Alpaydin and Kaynak, 1998, UCI). Larger images are made by bilinear interpolation.

    Args:
        size: Height and width of the images.
        channels: Number of channels. All of them are the same.

    Returns:
        Images, float32 (n, channels, size, size) in -1 to 1, and labels, int64 (n,).

    Example:
        >>> images, labels = digits(16, channels=3)
        >>> images.shape, labels[:3]
        (torch.Size([1797, 3, 16, 16]), tensor([0, 1, 2]))
    """
    # Imported here, since only this data set needs it and the import takes long.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Grey values are 0 to 16. The shape becomes (n, 1, 8, 8).
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 8 - 1
    if size != 8:
        images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.repeat(1, channels, 1, 1), torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def _digits(config: Mapping[str, Any]) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Returns training digits, validation digits and the number of classes. Every fifth digit is for validation."""
    channels, height, _ = config["input_size"]
    images, labels = digits(height, channels)
    held = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~held], labels[~held]), TensorDataset(images[held], labels[held]), 10


def _splits(root: Path) -> dict[str, Path | None]:
    """Returns the folder of each split: "train", "val" and "test". None for a split that does not exist."""
    if not root.is_dir():
        raise DataError(
            f"{root} is neither a folder nor a known data set ({', '.join(KNOWN)}). Give a folder with train/ and "
            "val/, or with one folder for each class."
        )

    def first(names: tuple[str, ...]) -> Path | None:
        """Returns the first folder of these names that holds folders."""
        # A class may have the name of a split. Its folder holds images and no folders.
        folders = (root / name for name in names if (root / name).is_dir())
        return next((f for f in folders if any(entry.is_dir() for entry in f.iterdir())), None)

    return {"train": first(_TRAIN), "val": first(_VAL), "test": first(_TEST)}


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the transforms with and without augmentation share."""
    return {key: config[key] for key in ("input_size", "mean", "std", "interpolation") if key in config}


def _plain(config: Mapping[str, Any]) -> Any:
    """Returns timm's transform without augmentation."""
    # Importing timm takes seconds, so each function here imports what it needs.
    from timm.data.transforms_factory import create_transform

    return create_transform(**_shared(config), crop_pct=config.get("crop_pct"))


def _folder(root: Path, config: Mapping[str, Any], seed: int) -> tuple[Dataset[Any], Dataset[Any], int, str]:
    """Returns images to learn from, images to measure on, the number of classes, and a sentence about the split."""
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
    # The same images twice, with and without augmentation. Which of them are held out is drawn below.
    train, val = _images(root, augmented), _images(root, plain)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 10)
    note = (
        f"data: {root} has no train/ and val/: {held:,} of its {len(order):,} images, drawn at random with "
        f"seed {seed}, are held out to measure on"
    )
    return Subset(train, order[held:]), Subset(val, order[:held]), len(train.reader.class_to_idx), note


def _unread(folder: Path) -> str:
    """Returns a text about files in a folder whose endings timm does not read. "" if there are none."""
    from timm.data.readers.img_extensions import get_img_extensions

    known = set(get_img_extensions())
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    other = [path.suffix.lower() or "no ending" for path in files if path.suffix.lower() not in known]
    if not other:
        return ""
    return f"; {len(other):,} other files were not read ({', '.join(sorted(set(other))[:5])})"


class _Images(Dataset[Any]):
    """Images of a folder. Raises DataError with the name of a file that is not an image.

    timm's own class would silently return the next image in its place.

    Attributes:
        images: timm's data set, which is asked for the names of files and the number of images.
        reader: timm's reader, which lists the files and the classes.
        transform: Turns an image into a tensor.
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
    """Returns the images below a folder, with their classes. Raises DataError if it does not hold class folders."""
    try:
        return _Images(str(root), transform=transform)
    except Exception as error:
        raise DataError(
            f"{root} is not an ImageFolder, which holds one folder of images for each class: {error}."
        ) from error
