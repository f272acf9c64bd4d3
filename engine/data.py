"""Data sets as uint8 arrays that live on the training device; order and augmentation there. `stream` has ImageNet's.

What happens to an image is a function of (seed, epoch, image) alone: not of the device, the batch size, the number of
processes, or of how often the run was interrupted.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import random_streams, sets
from engine.errors import Misuse

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.3054,), (0.3760,)),
}
"""Channel means and standard deviations of the training images, in [0, 1]."""

SETS: dict[str, dict] = {
    "digits": dict(classes=10, flip=False, pad=1),
    "cifar10": dict(classes=10, flip=True, pad=4),
    "cifar100": dict(classes=100, flip=True, pad=4),
    "svhn": dict(classes=10, flip=False, pad=4),
    "gtsrb": dict(classes=43, flip=False, pad=4, shuffled=True),
    "tiny-imagenet": dict(classes=None, flip=True, pad=4, shuffled=True),  # as many classes as its labels have, normally 200
    "imagenet": dict(flip=True, pad=0, shuffled=True),
}
"""What is known of each data set beforehand: see `Dataset`."""

@dataclass(frozen=True)
class Dataset:
    """Images and labels (N,) int64 in [0, classes); `flip`: a mirror image keeps its class.

    Images are (N, H, W, C) uint8, or the names (N,) of files that are streamed: `crop` is then the side of what is cut out.
    """

    name: str
    classes: int
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    flip: bool
    pad: int  # how far a random shift goes, in pixels
    crop: int | None = None
    shuffled: bool = False  # the files are sorted by class, and the images here are in a fixed random order instead

    @property
    def streamed(self) -> bool:
        return self.crop is not None

    @property
    def channels(self) -> int:
        return 3 if self.streamed else self.x_train.shape[3]

    @property
    def image_size(self) -> int:
        return self.crop or self.x_train.shape[1]

    def pixels(self, x: np.ndarray) -> np.ndarray:
        """Some of the images as they are evaluated, (N, H, W, C) uint8: files are read, resized, and cut out at the centre.

        Raises:
            Failure: a file is damaged.
        """
        if not self.streamed:
            return x
        from engine import stream  # which needs torchvision, and a second to import it
        return stream.centres(x, self.crop)

    def split(self, train_size: int | None, val_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x_train, y_train, x_val, y_val: the last `val_size` training images are held out, the first ones train.

        Raises:
            Misuse: there are not as many.
        """
        n = len(self.x_train) - val_size
        if n < 1 or (train_size or 1) > n:
            raise Misuse(f"--val-size {val_size}{f' and --train-size {train_size}' if train_size else ''}: {self.name} has only {len(self.x_train)} training "
                         "images in --data-dir; give fewer")
        size = train_size or n
        return self.x_train[:size], self.y_train[:size], self.x_train[n:], self.y_train[n:]


def load(name: str, data_dir: str | Path, image_size: int | None = None) -> Dataset:
    """A data set by name, checked; <data_dir>/<name>.npz is made where it is not there and is needed: see `sets`.

    Args:
        image_size: side of ImageNet's crops, 224 unless given; the other sets have their own.

    Raises:
        Misuse: an unknown name; files that are missing, damaged, or not images and labels.
        Failure: the download did not work, or an image that the arrays are made from is damaged.
    """
    if name not in SETS:
        raise Misuse(f"--dataset {name}: allowed are {', '.join(SETS)}")
    if name == "digits":
        return Dataset(name, **sets.digits(), **SETS[name])
    if name == "imagenet":
        arrays, classes = sets.imagenet(Path(data_dir))
        return Dataset(name, classes, **arrays, **SETS[name], crop=image_size or 224)
    path = Path(data_dir) / f"{name}.npz"
    if not path.is_file():
        sets.make(name, path)
    return _checked(path, name, **SETS[name])


def _checked(path: Path, name: str, classes: int | None, **more: Any) -> Dataset:
    remedy = f"repair {path}, or move it away to have the original made"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except KeyError as error:
        raise Misuse(f"{path} has no array {error}: a data set holds x_train, y_train, x_test, y_test; {remedy}") from error
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise Misuse(f"{path} is damaged ({error}): {remedy}") from error
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[3] not in (1, 3) or len(x) == 0:
            raise Misuse(f"{path}: x_{part} is {x.dtype} {x.shape}, it must be uint8 (N, size, size, 1 or 3) with N > 0; {remedy}")
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            raise Misuse(f"{path}: y_{part} is {y.dtype} {y.shape}, it must be int64 ({len(x)},); {remedy}")
        classes = classes or int(y.max()) + 1  # the training labels, which come first, tell
        if y.min() < 0 or y.max() >= classes:
            wrong = y[(y < 0) | (y >= classes)][0]
            raise Misuse(f"{path}: y_{part} holds the label {wrong}, labels of {name} lie in 0..{classes - 1}; {remedy}")
        arrays[f"y_{part}"] = y.astype(np.int64)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise Misuse(f"{path}: images of x_train are {arrays['x_train'].shape[1:]}, of x_test {arrays['x_test'].shape[1:]}; {remedy}")
    if classes < 2:
        raise Misuse(f"{path}: all labels are 0, and there must be two classes at least; {remedy}")
    return Dataset(name, classes, **arrays, **more)


def to_images(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (N, H, W, C) to `dtype` (N, C, H, W) in [0, 1], channels last in memory as convolutions like it."""
    return x.permute(0, 3, 1, 2).to(dtype) / 255


class Batches:
    """The training images on `device`, in the order and with the shifts and flips of each epoch.

    Args:
        x, y: (N, H, W, C) uint8 and (N,) int64.
        batch_size: images per batch over all processes; the last batch of an epoch may be short.
        shard: from a batch's size to this process's part of it.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, *, batch_size: int, seed: int, pad: int, flip: bool,
        padding: str = "zero", device: torch.device | str = "cpu", shard=lambda n: slice(0, n),
    ) -> None:
        self.n, self.size = len(x), x.shape[1]
        self.places: tuple[Tensor, Tensor]  # where the current batch's pixels come from: rows (B, H), columns (B, W) of `x`
        self.batch_size, self.seed, self.pad, self.flip = batch_size, seed, pad, flip
        self.device, self.shard = torch.device(device), shard
        mode = {"zero": "constant", "reflect": "reflect"}[padding]
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)  # once: a batch is then one gather
        self.x = torch.from_numpy(padded).to(self.device)
        self.y = torch.from_numpy(y).to(self.device)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.n // self.batch_size)

    def epoch(self, epoch: int, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields x (B, C, H, W) in [0, 1], y (B,) int64, index (B,) int64 of the images, from batch `first` on."""
        generator = random_streams.seeded(self.seed, random_streams.DATA, epoch)
        order = torch.randperm(self.n, generator=generator).to(self.device)
        shift = torch.randint(0, 2 * self.pad + 1, (self.n, 2), generator=generator).to(self.device)
        mirror = (torch.rand(self.n, generator=generator) < 0.5).to(self.device) & self.flip
        ruler = torch.arange(self.size, device=self.device)
        for batch in range(first, len(self)):
            index = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            index = index[self.shard(len(index))]
            rows = shift[index, :1] + ruler
            columns = shift[index, 1:] + torch.where(mirror[index, None], ruler.flip(0), ruler)
            self.places = rows, columns
            yield to_images(self.x[index[:, None, None], rows[:, :, None], columns[:, None, :]], dtype), self.y[index], index
