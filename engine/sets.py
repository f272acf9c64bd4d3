"""Where each data set's images come from: scikit-learn, torchvision's downloads, or files that lie in the data directory.

The sets that fit into memory become arrays x_train, y_train, x_test, y_test, images (N, H, W, C) uint8 and labels (N,)
int64, which `make` keeps as <name>.npz. Where the files are sorted by class, the arrays are in a fixed random order:
otherwise the first or the last N images would be of a few classes only.
"""
from __future__ import annotations

import fcntl
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from engine import images, record
from engine.errors import Failure, Misuse

Arrays = dict[str, np.ndarray]

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
IMAGENET_LAYOUT = "torchvision's ImageFolder layout, a folder of images for each class in train/ and in val/"


def make(name: str, path: Path) -> None:
    """Writes <name>.npz, whole or not at all.

    Raises:
        Misuse: there is nothing to make it from, or that is not the data set.
        Failure: the download did not work, or an image is damaged.
    """
    with _alone(path):
        if path.is_file():  # another run has made it meanwhile
            return
        arrays = tiny_imagenet(path.parent) if name == "tiny-imagenet" else downloaded(name, path)
        with record.replacing(path) as file:
            np.savez(file, **arrays)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of several runs that want to make the same file at the same time, one after the other is inside."""
    new = not path.parent.is_dir()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks cannot
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
        if new:
            with suppress(OSError):  # something lies in it
                path.parent.rmdir()


def shuffled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the same random order, a function of their number alone: numpy promises that RandomState never changes."""
    order = np.random.RandomState(0).permutation(len(y))
    return x[order], y[order]


# ---- one function for each ------------------------------------------------------------------------------------------

def digits() -> Arrays:
    """scikit-learn's 1,797 real 8 x 8 digits (Alpaydin & Kaynak 1998), a fixed stratified split of 1,437 / 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = np.round(x.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    parts = train_test_split(x, y.astype(np.int64), test_size=360, stratify=y, random_state=0)
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts))


def downloaded(name: str, path: Path) -> Arrays:
    """From torchvision's data set, whose files lie in or are downloaded to the folder of `path`."""
    from torchvision import datasets

    source = getattr(datasets, name.upper())
    print(f"{path} is not there: making it from torchvision's {source.__name__}")
    try:
        parts = {part: source(path.parent, download=True, **({"train": part == "train"} if name.startswith("cifar") else {"split": part}))
                 for part in ("train", "test")}
    except Exception as error:  # torchvision raises many kinds, from URLError to RuntimeError
        raise Failure(f"{name} could not be downloaded ({error}): put {path.name}, or torchvision's files, into {path.parent}") from error
    arrays = {}
    for part, dataset in parts.items():
        arrays[f"x_{part}"], y = {"svhn": _svhn, "gtsrb": _gtsrb}.get(name, _cifar)(dataset)
        arrays[f"y_{part}"] = np.asarray(y, dtype=np.int64)
        if name == "gtsrb":
            arrays[f"x_{part}"], arrays[f"y_{part}"] = shuffled(arrays[f"x_{part}"], arrays[f"y_{part}"])
    return arrays


def _cifar(dataset) -> tuple[np.ndarray, list[int]]:
    return dataset.data, dataset.targets


def _svhn(dataset) -> tuple[np.ndarray, np.ndarray]:
    """The cropped digits, 73,257 / 26,032, without the extra ones; the digit 0 has label 0."""
    return np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1)), dataset.labels


def _gtsrb(dataset) -> tuple[np.ndarray, list[int]]:
    """26,640 / 12,630 signs of many sizes, resized to 32 x 32 by PIL's bilinear filter, as torchvision's Resize does.

    The training images are 30 of each physical sign, so that held-out images resemble training images.
    """
    paths, labels = zip(*dataset._samples)  # what its own __getitem__ reads; without it an error could not name the file
    if (found := len(set(labels))) < 43:
        raise Misuse(f"{Path(paths[0]).parent.parent} has images of {found} classes, GTSRB has 43: delete it to have it downloaded again")

    def read(path: str) -> np.ndarray:
        return np.asarray(images.rgb(path).resize((32, 32), Image.Resampling.BILINEAR))

    return images.stacked(read, paths, (32, 32, 3), "gtsrb"), list(labels)


def tiny_imagenet(folder: Path) -> Arrays:
    """Tiny ImageNet from its original files, classes in alphabetical order, as published loaders have them; its val folder is the test set.

    100,000 / 10,000 images of 200 classes, 64 x 64; some files are grey-scale. A part of it, with fewer classes, will do.

    Raises:
        Misuse: it is not there, or is not as it was published.
        Failure: an image is damaged.
    """
    with _tiny_imagenet_files(folder) as (where, names, read):
        print(f"making tiny-imagenet.npz from {where}")
        classes = {wnid: i for i, wnid in enumerate(sorted(read("wnids.txt").decode().split()))}
        annotations = [line.split("\t") for line in read("val/val_annotations.txt").decode().splitlines()]
        of_class = {
            "train": {name: match[1] for name in names if (match := re.fullmatch(r"train/(\w+)/images/[^./][^/]*\.JPEG", name))},
            "test": {f"val/images/{line[0]}": line[1] for line in annotations if len(line) > 1},
        }

        def pixels(name: str) -> np.ndarray:
            image = images.rgb(io.BytesIO(read(name)), f"{where}/{name}")
            if image.size != (64, 64):
                raise Failure(f"{where}/{name} is {image.size[0]} x {image.size[1]}, images of Tiny ImageNet are 64 x 64: replace it by a sound copy")
            return np.asarray(image)

        arrays = {}
        for part, wnids in of_class.items():
            wrong = [f"a {part} image of {wnid}, which wnids.txt has not" for wnid in wnids.values() if wnid not in classes]
            wrong += [f"no {name}, which val_annotations.txt has" for name in wnids.keys() - set(names)]
            wrong += [f"no train images of {wnid}, which wnids.txt has" for wnid in classes.keys() - set(wnids.values()) if part == "train"]
            if wrong or not wnids:
                raise Misuse(f"{where} has {min(wrong, default='no val images')}: {_tiny_imagenet_remedy(folder)}")
            x = images.stacked(pixels, list(wnids), (64, 64, 3), f"tiny-imagenet, {part}")
            arrays[f"x_{part}"], arrays[f"y_{part}"] = shuffled(x, np.array([classes[wnid] for wnid in wnids.values()], dtype=np.int64))
        return arrays


@contextmanager
def _tiny_imagenet_files(folder: Path) -> Iterator[tuple[Path, list[str], Callable[[str], bytes]]]:
    """Where the set lies, its files' names in order, and what reads one: from the folder, or from a zip file as it is."""
    root = folder / "tiny-imagenet-200"
    packed = [path for path in (root.with_name(root.name + ".zip"), *sorted(folder.glob("tiny-imagenet*.zip"))) if path.is_file()]
    if root.is_dir():
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        _as_published(root, names)
        yield root, names, lambda name: (root / name).read_bytes()
    elif packed:
        try:
            with zipfile.ZipFile(packed[0]) as file:
                names = sorted(name.removeprefix(f"{root.name}/") for name in file.namelist())
                _as_published(packed[0], names)
                yield packed[0], names, lambda name: file.read(f"{root.name}/{name}")
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise Misuse(f"{packed[0]} is damaged ({error}): {_tiny_imagenet_remedy(folder)}") from error
    else:
        raise Misuse(f"--dataset tiny-imagenet: there is neither {root} nor {root}.zip: {_tiny_imagenet_remedy(folder)}")


def _as_published(where: Path, names: list[str]) -> None:
    for name in ("wnids.txt", "val/val_annotations.txt"):
        if name not in names:
            raise Misuse(f"{where} has no {name}: {_tiny_imagenet_remedy(where.parent)}")


def _tiny_imagenet_remedy(folder: Path) -> str:
    return f"put {TINY_IMAGENET} into {folder}, packed or unpacked"


def imagenet(folder: Path) -> tuple[Arrays, int]:
    """ImageNet's files, as arrays of names instead of images, and its number of classes; its val folder is the test set.

    Classes are train's folders in alphabetical order. To evaluate, val alone is enough: there are then no training images.

    Raises:
        Misuse: it is not there, or is laid out in another way.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    root = next((root for root in (folder / "imagenet", folder) if (root / "val").is_dir()), None)
    if root is None:
        raise Misuse(f"--dataset imagenet: neither {folder / 'imagenet'} nor {folder} holds the folder val: put ImageNet there in {IMAGENET_LAYOUT}")
    arrays, numbers = {}, {}
    for part, inside in {"train": root / "train", "test": root / "val"}.items():
        samples = []
        if inside.is_dir():
            try:
                names, numbers_here = find_classes(inside)
                numbers = numbers or numbers_here
                samples = make_dataset(inside, numbers, IMG_EXTENSIONS, allow_empty=part == "test")
            except FileNotFoundError as error:
                raise Misuse(f"{inside} is not in {IMAGENET_LAYOUT}: {error}") from error
            if strange := sorted(set(names) - numbers.keys()):
                raise Misuse(f"{inside} has the folder {strange[0]}, which {root / 'train'} has not: it must be {IMAGENET_LAYOUT}")
            if not samples:
                raise Misuse(f"{inside} has no images: it must be {IMAGENET_LAYOUT}")
        paths, labels = [path for path, _ in samples], [label for _, label in samples]
        arrays[f"x_{part}"], arrays[f"y_{part}"] = shuffled(images.listed(paths), np.array(labels, dtype=np.int64))
    return arrays, len(numbers)
