"""How each data set is made from its files, and images that are streamed from theirs."""
from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import typing
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import engine
from engine import config, data, device, images, nvjpeg, random_streams, stream
from engine.errors import Failure, Misuse

ROOT = Path(__file__).resolve().parent.parent
NARROW = ("--arch", "resnet8", "--width", "16", "--device", "cpu", "--epochs", "2", "--measure", "clean,pgd10")


def refused(result, status: int, *words: Any) -> None:
    assert result.status == status, result.err + result.out
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and "Traceback" not in result.err
    for word in words:
        assert str(word) in result.err, result.err


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A smooth random picture, so that JPEG keeps it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def cut(path: Path, part: float = 0.6) -> None:
    """The file as an interrupted copy leaves it."""
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * part)])


def test_every_set_has_a_recipe_and_statistics():
    allowed = typing.get_args(typing.get_type_hints(engine.Config)["dataset"])
    assert set(allowed) == config.RECIPES.keys() == data.SETS.keys() == data.NORMALISATIONS.keys()
    for name, known in data.SETS.items():
        mean, std = data.NORMALISATIONS[name]
        assert len(mean) == len(std) == (1 if name == "digits" else 3) and known["flip"] == (name not in ("digits", "svhn", "gtsrb"))


@pytest.mark.parametrize("dataset, expected", [
    ("svhn", dict(arch="preactresnet18c", epochs=30, lr=0.05, lr_schedule="cyclic", epsilon=8, val_size=1000)),
    ("gtsrb", dict(arch="resnet18", epochs=110, lr=0.1, lr_schedule="multistep", epsilon=8)),
    ("tiny-imagenet", dict(arch="preactresnet18", epochs=110, batch_size=128, lr=0.1, epsilon=8, image_size=None)),
    ("imagenet", dict(arch="resnet50", epochs=90, batch_size=256, lr=0.1, epsilon=4, val_size=5000, image_size=224)),
])
def test_recipes(dataset, expected):
    cfg = engine.Config(dataset=dataset)
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_svhn_has_its_own_cyclic_peak():
    script = importlib.import_module("train_fgsm_ga")
    assert script.Config(dataset="svhn").lr == 0.05 and script.Config(dataset="cifar10", lr_schedule="cyclic").lr == 0.3
    assert script.Config(dataset="svhn", lr=0.1).lr == 0.1


# ---- svhn and gtsrb -------------------------------------------------------------------------------------------------

def test_svhn_is_made_from_its_mat_files(tmp_path, monkeypatch):
    """Images lie last axis first in them, and the digit 0 has label 10."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "download", lambda self: None)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    made = {}
    for part, n in (("train", 23), ("test", 11)):
        made[part] = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
        x, y = made[part]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]})
    first = data.load("svhn", tmp_path)
    monkeypatch.delattr(SVHN, "__init__")
    for dataset in (first, data.load("svhn", tmp_path)):
        assert (dataset.classes, dataset.flip, dataset.pad, dataset.image_size, dataset.channels) == (10, False, 4, 32, 3)
        for part, (x, y) in made.items():
            assert np.array_equal(getattr(dataset, f"x_{part}"), x) and np.array_equal(getattr(dataset, f"y_{part}"), y)
            assert getattr(dataset, f"y_{part}").dtype == np.int64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["svhn.npz", "test_32x32.mat", "train_32x32.mat"]


def gtsrb_files(folder: Path, classes: int = 43) -> dict[str, list[tuple[np.ndarray, int]]]:
    """As torchvision unpacks them, with a few signs of each class; returns what is to be made of them."""
    root, expected, lines = folder / "gtsrb", {"train": [], "test": []}, ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    (root / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    for label in range(classes):
        (root / "GTSRB" / "Training" / f"{label:05d}").mkdir(parents=True)
        for i in range(2):
            image = noise(10 * label + i, 15 + label, 60 - label)
            image.save(root / "GTSRB" / "Training" / f"{label:05d}" / f"00000_{i:05d}.ppm")
            expected["train"].append((np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)), label))
        image = noise(1000 + label, 40, 41)
        image.save(root / "GTSRB" / "Final_Test" / "Images" / f"{label:05d}.ppm")
        lines.append(f"{label:05d}.ppm;40;41;5;5;35;35;{label}")
        expected["test"].append((np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)), label))
    (root / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return expected


def test_gtsrb_is_made_from_its_folders(tmp_path):
    expected = gtsrb_files(tmp_path)
    dataset = data.load("gtsrb", tmp_path)
    assert (dataset.classes, dataset.flip, dataset.pad, dataset.shuffled) == (43, False, 4, True)
    for part, pairs in expected.items():
        x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
        assert sorted((label, image.tobytes()) for image, label in pairs) == sorted((label, image.tobytes()) for image, label in zip(x, y))
        assert len(set(y[-20:].tolist())) > 10, "the last images are of many classes"


def test_gtsrb_with_a_sign_that_is_damaged_or_missing(tmp_path, tiny):
    gtsrb_files(tmp_path / "cut")
    cut(tmp_path / "cut" / "gtsrb" / "GTSRB" / "Training" / "00007" / "00000_00001.ppm")
    refused(tiny.command("train_fgsm_rs", "--dataset", "gtsrb", "--data-dir", tmp_path / "cut", "--out-dir", tmp_path / "o"), 1,
            "00007/00000_00001.ppm", "sound copy")
    assert not (tmp_path / "cut" / "gtsrb.npz").exists()
    gtsrb_files(tmp_path / "few", classes=42)
    refused(tiny.command("train_fgsm_rs", "--dataset", "gtsrb", "--data-dir", tmp_path / "few", "--out-dir", tmp_path / "o"), 2, "42 classes", "43")


# ---- tiny-imagenet --------------------------------------------------------------------------------------------------

WNIDS = ["n03000000", "n01000000", "n02000000"]  # in no order, as the real file's


def tiny_imagenet_files(folder: Path, train: int = 6, test: int = 4) -> dict[tuple[str, int], list[bytes]]:
    """The original layout with three classes; some images are grey-scale. Returns the pixels that are to come out."""
    root, expected, lines = folder / "tiny-imagenet-200", {}, []
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\ta thing\n" for wnid in sorted(WNIDS)))

    def keep(path: Path, part: str, label: int, i: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = noise(100 * label + i + (50 if part == "test" else 0), 64, 64)
        (image.convert("L") if i % 3 == 1 else image).save(path, "JPEG", quality=95)
        with Image.open(path) as read:
            pixels = np.asarray(read)
        expected.setdefault((part, label), []).append(np.repeat(pixels[..., None], 3, 2).tobytes() if i % 3 == 1 else pixels.tobytes())

    for label, wnid in enumerate(sorted(WNIDS)):  # as published loaders number them
        for i in range(train):
            keep(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", "train", label, i)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(test):
            name = f"val_{len(lines)}.JPEG"
            lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
            keep(root / "val" / "images" / name, "test", label, i)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)
    noise(0, 64, 64).save(root / "test" / "images" / "test_0.JPEG")
    return expected


def zipped(folder: Path, name: str = "tiny-imagenet-200.zip") -> Path:
    """The same, as it is downloaded, in place of the folder."""
    root = folder / "tiny-imagenet-200"
    with zipfile.ZipFile(folder / name, "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(folder))
    shutil.rmtree(root)
    return folder / name


def test_tiny_imagenet_is_made_from_its_folder_or_its_zip_file(tmp_path):
    expected = tiny_imagenet_files(tmp_path)
    made = [data.load("tiny-imagenet", tmp_path)]
    (tmp_path / "tiny-imagenet.npz").unlink()
    path = zipped(tmp_path)
    made.append(data.load("tiny-imagenet", tmp_path))
    (tmp_path / "tiny-imagenet.npz").unlink()
    path.rename(tmp_path / "tiny-imagenet-mini.zip")
    made += [data.load("tiny-imagenet", tmp_path), data.load("tiny-imagenet", tmp_path)]  # from the zip file, and from the npz file
    for dataset in made:
        assert (dataset.classes, dataset.flip, dataset.pad, dataset.image_size, dataset.shuffled) == (3, True, 4, 64, True)
        for part in ("train", "test"):
            x, y = getattr(dataset, f"x_{part}"), getattr(dataset, f"y_{part}")
            assert np.array_equal(x, getattr(made[0], f"x_{part}")) and np.array_equal(y, getattr(made[0], f"y_{part}"))
            for label in range(3):
                assert sorted(expected[part, label]) == sorted(image.tobytes() for image in x[y == label])
    assert len(set(made[0].y_train[-6:].tolist())) > 1 < len(set(made[0].y_test[:4].tolist())), "not sorted by class"


def first(folder: Path, pattern: str) -> Path:
    return sorted((folder / "tiny-imagenet-200").glob(pattern))[0]


def rewrite(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


TINY_DAMAGE = {
    "nothing": (2, lambda d: shutil.rmtree(d / "tiny-imagenet-200"), ("cs231n.stanford.edu/tiny-imagenet-200.zip", "put")),
    "no list of classes": (2, lambda d: first(d, "wnids.txt").unlink(), ("wnids.txt",)),
    "an unknown class": (2, lambda d: rewrite(first(d, "wnids.txt"), lambda text: text.replace("n02000000\n", "")), ("n02000000", "wnids.txt")),
    "a class without images": (2, lambda d: rewrite(first(d, "wnids.txt"), lambda text: text + "n04000000\n"), ("n04000000",)),
    "a missing val image": (2, lambda d: first(d, "val/images/*").unlink(), ("val/images/val_0.JPEG", "val_annotations.txt")),
    "no val images": (2, lambda d: rewrite(first(d, "val/val_annotations.txt"), lambda text: ""), ("no val images",)),
    "a truncated image": (1, lambda d: cut(first(d, "train/n01000000/images/*")), ("n01000000_0.JPEG", "truncated")),
    "no image": (1, lambda d: first(d, "val/images/*").write_bytes(b"nothing"), ("val/images/val_0.JPEG",)),
    "another size": (1, lambda d: noise(0, 60, 64).save(first(d, "val/images/*")), ("val_0.JPEG", "60 x 64", "64 x 64")),
    "a damaged zip file": (2, lambda d: cut(zipped(d)), ("tiny-imagenet-200.zip", "damaged", "cs231n")),
    "a zip file of something else": (2, lambda d: (first(d, "wnids.txt").unlink(), zipped(d)), ("tiny-imagenet-200.zip", "wnids.txt")),
}


@pytest.mark.parametrize("what", TINY_DAMAGE)
def test_tiny_imagenet_that_is_not_as_it_should_be(what, tmp_path, tiny):
    status, change, words = TINY_DAMAGE[what]
    tiny_imagenet_files(tmp_path, train=2, test=1)
    change(tmp_path)
    refused(tiny.command("train_fgsm_rs", "--dataset", "tiny-imagenet", "--data-dir", tmp_path, "--out-dir", tmp_path / "o"), status, *words)
    assert not list(tmp_path.glob("*.npz"))


def test_tiny_imagenet_trains_and_is_evaluated(tmp_path, tiny):
    tiny_imagenet_files(tmp_path)
    result = tiny.command("train_fgsm_rs", *NARROW, "--dataset", "tiny-imagenet", "--data-dir", tmp_path, "--val-size", 6,
                          "--batch-size", 6, "--normalise", "dataset", "--out-dir", tmp_path / "o")
    assert result.status == 0, result.err
    saved = torch.load(tmp_path / "o" / "best.pth", weights_only=True)
    assert (saved["classes"], saved["image_size"]) == (3, 64) and saved["state_dict"]["linear.weight"].shape[0] == 3
    evaluated = tiny.command("test_FGSM_SDI", "--model-path", tmp_path / "o" / "best.pth", "--data-dir", tmp_path, "--attacks", "clean,pgd10")
    assert evaluated.status == 0, evaluated.err
    content = json.loads((tmp_path / "o" / "best-evaluation" / "evaluation.json").read_text())
    assert content["n"] == 12 and content["dataset"] == content["checkpoint"]["normalise"] == "tiny-imagenet"
    assert "permutation" in content["test_order"]


def small_cifar(folder: Path, n: int = 40) -> None:
    x = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", x_train=x, y_train=np.arange(n) % 10, x_test=x[:10], y_test=np.arange(10))


@pytest.mark.parametrize("augment, padding, expected", [("crop", "zero", (4, True)), ("crop", "reflect", (4, True)), ("none", "zero", (0, False))])
def test_a_run_augments_as_it_is_told(augment, padding, expected, tmp_path):
    small_cifar(tmp_path)
    cfg = engine.Config(dataset="cifar10", data_dir=str(tmp_path), out_dir=str(tmp_path / "run"), val_size=8, width=2, device="cpu", augment=augment, padding=padding)
    batches = engine.Run(cfg)._data
    assert (batches.pad, batches.flip) == expected
    border = batches.x[:, 0].any() if augment == "crop" else None
    assert border is None or bool(border) == (padding == "reflect")


def test_the_digits_are_the_real_ones_in_a_fixed_split():
    """Grey levels 0 to 16 as 0 to 255, and a digest of which images are where: a checkpoint's numbers are of these."""
    found = data.load("digits", ".")
    assert set(np.unique(found.x_train)) == {round(level * 255 / 16) for level in range(17)}
    assert (len(found.y_train), len(found.y_test)) == (1437, 360) and np.bincount(found.y_test).min() >= 34
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (found.x_train, found.y_train, found.x_test, found.y_test)))
    assert digest.hexdigest()[:16] == "3616d13d9b8a0a7a"


def test_the_streams_of_random_numbers_never_meet():
    generator, seeds = torch.Generator(), []
    for step in range(50):
        random_streams.noise_generator(generator, 0, step)
        seeds += [generator.initial_seed(), random_streams.seeded(0, random_streams.EVALUATION, step).initial_seed(),
                  random_streams.seeded(0, random_streams.DATA, step).initial_seed(), random_streams.seeded(0, random_streams.CROP, step).initial_seed()]
    assert len(set(seeds)) == len(seeds)
    assert len(set(random_streams.STREAMS.values())) == len(random_streams.STREAMS)


def test_sizes_that_differ_are_refused(tmp_path):
    small_cifar(tmp_path)
    with np.load(tmp_path / "cifar10.npz") as file:
        arrays = dict(file) | dict(x_test=np.zeros((10, 28, 28, 3), np.uint8))
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(Misuse, match=r"x_train are \(32, 32, 3\), of x_test \(28, 28, 3\)"):
        data.load("cifar10", tmp_path)


def test_one_class_is_refused(tmp_path):
    x = np.zeros((6, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "tiny-imagenet.npz", x_train=x, y_train=np.zeros(6, int), x_test=x, y_test=np.zeros(6, int))
    with pytest.raises(Misuse, match="two classes at least"):
        data.load("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("folder", ["", "not/there/yet"])
def test_runs_that_begin_together_make_a_set_once(folder, tmp_path, monkeypatch):
    """The second one waits, and then finds it made."""
    made = []

    def slow(name, path):
        made.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        time.sleep(0.3)
        return dict(x_train=np.zeros((10, 32, 32, 3), np.uint8), y_train=np.arange(10), x_test=np.zeros((10, 32, 32, 3), np.uint8), y_test=np.arange(10))

    monkeypatch.setattr(data.sets, "downloaded", slow)
    with ThreadPoolExecutor(4) as pool:
        def begin(number):
            time.sleep(0.05 * number)
            return data.load("cifar10", tmp_path / folder)

        assert len({len(found.x_train) for found in pool.map(begin, range(4))}) == 1
    assert made == ["cifar10"]


def test_classes_are_counted_in_an_npz_file_too(tmp_path):
    x = np.zeros((6, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "tiny-imagenet.npz", x_train=x, y_train=np.arange(6) % 5, x_test=x, y_test=np.arange(6))
    with pytest.raises(Misuse, match=r"y_test holds the label 5, labels of tiny-imagenet lie in 0\.\.4"):
        data.load("tiny-imagenet", tmp_path)


# ---- imagenet: which files ------------------------------------------------------------------------------------------

CLASSES, PER_CLASS, SIDE = ["n01", "n02", "n03"], 8, 32
ODD = {0: "L", 1: "CMYK", 2: "P"}  # the first images of each class: grey-scale, CMYK, and a PNG by a wrong name


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A data directory with a small ImageNet: images of several sizes and kinds."""
    root = tmp_path_factory.mktemp("data")
    for k, name in enumerate(CLASSES):
        for part, count in (("train", PER_CLASS), ("val", 4)):
            (root / "imagenet" / part / name).mkdir(parents=True)
            for i in range(count):
                image = noise(1000 * k + 10 * i + count, 40 + 7 * i, 70 - 5 * i).convert(ODD.get(i, "RGB"))
                image.save(root / "imagenet" / part / name / f"{part}_{i}.JPEG", "PNG" if image.mode == "P" else "JPEG", quality=95)
    return root


@pytest.fixture
def damaged(tree: Path, tmp_path: Path) -> Path:
    """The same, with three files that cannot be read."""
    shutil.copytree(tree / "imagenet", tmp_path / "imagenet")
    cut(tmp_path / "imagenet" / "train" / "n02" / "train_5.JPEG")
    (tmp_path / "imagenet" / "train" / "n03" / "train_6.JPEG").write_bytes(b"")
    cut(tmp_path / "imagenet" / "val" / "n01" / "val_3.JPEG", 0.97)
    return tmp_path


def files(x: np.ndarray) -> list[str]:
    return ["/".join(images.path_of(name).split("/")[-2:]) for name in x]


def test_imagenet_is_listed_in_a_fixed_random_order(tree, tmp_path):
    dataset = data.load("imagenet", tree, 48)
    assert (dataset.classes, dataset.streamed, dataset.channels, dataset.image_size) == (3, True, 3, 48)
    assert data.load("imagenet", tree).image_size == 224
    names = files(dataset.x_train)
    assert sorted(names) == [f"{name}/train_{i}.JPEG" for name in CLASSES for i in range(PER_CLASS)]
    assert [CLASSES.index(name.split("/")[0]) for name in names] == dataset.y_train.tolist()
    assert [CLASSES.index(name.split("/")[0]) for name in files(dataset.x_test)] == dataset.y_test.tolist()
    x, _, x_val, y_val = dataset.split(None, 9)
    assert set(y_val.tolist()) == {0, 1, 2} and not set(x.tolist()) & set(x_val.tolist()), "held-out images are of all classes"
    moved = tmp_path / "moved"  # the folders may lie in the data directory itself, and the order is the same there
    shutil.copytree(tree / "imagenet", moved)
    again = data.load("imagenet", moved)
    assert files(again.x_train) == names and files(again.x_test) == files(dataset.x_test)


def test_the_val_folder_alone_is_enough_to_evaluate(tree, tmp_path):
    shutil.copytree(tree / "imagenet" / "val", tmp_path / "val")
    dataset = data.load("imagenet", tmp_path, SIDE)
    assert dataset.classes == 3 and files(dataset.x_test) == files(data.load("imagenet", tree).x_test)
    assert dataset.pixels(dataset.x_train[:1000]).shape == (0, SIDE, SIDE, 3)
    with pytest.raises(Misuse, match="only 0 training images"):
        dataset.split(None, 5)


IMAGENET_DAMAGE = {
    "nothing": (lambda d: shutil.rmtree(d / "imagenet"), ("train/", "val/", "ImageFolder")),
    "val as it was packed": (lambda d: (shutil.rmtree(d / "imagenet" / "val"), (d / "imagenet" / "val").mkdir(),
                                        noise(0, 40, 40).save(d / "imagenet" / "val" / "a.JPEG")), ("imagenet/val", "class folder")),
    "another class in val": (lambda d: (d / "imagenet" / "val" / "n09").mkdir(), ("imagenet/val", "n09")),
    "a class without images": (lambda d: (d / "imagenet" / "train" / "n09").mkdir(), ("imagenet/train", "n09")),
    "val without images": (lambda d: [path.unlink() for path in (d / "imagenet" / "val").glob("*/*")], ("imagenet/val", "no images")),
}


@pytest.mark.parametrize("what", IMAGENET_DAMAGE)
def test_imagenet_that_is_not_as_it_should_be(what, tree, tmp_path, tiny):
    change, words = IMAGENET_DAMAGE[what]
    shutil.copytree(tree / "imagenet", tmp_path / "imagenet")
    change(tmp_path)
    refused(tiny.command("train_fgsm_rs", "--dataset", "imagenet", "--data-dir", tmp_path, "--out-dir", tmp_path / "o"), 2, *words)


# ---- imagenet: single images ----------------------------------------------------------------------------------------

def test_grey_scale_and_cmyk_files_become_rgb(tmp_path):
    colours = noise(1, 40, 30)
    for mode, error in (("RGB", 2), ("CMYK", 6)):
        colours.convert(mode).save(tmp_path / "a.JPEG", quality=100, subsampling=0)
        read = images.rgb(tmp_path / "a.JPEG")
        assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - np.asarray(colours)).mean() < error
    colours.convert("L").save(tmp_path / "a.JPEG", quality=100)
    read = np.asarray(images.rgb(tmp_path / "a.JPEG"))
    assert read.shape == (30, 40, 3) and np.array_equal(read[..., 0], read[..., 1]) and np.array_equal(read[..., 0], read[..., 2])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_ends_too_early_is_noticed(progressive, tmp_path):
    path = tmp_path / "a.JPEG"
    for part in (0.0, 0.01, 0.3, 0.7, 0.97, 0.99):
        noise(3, 200, 150).save(path, quality=95, progressive=progressive)
        assert images.readable(path)
        cut(path, part)
        assert not images.readable(path)
        with pytest.raises(Failure, match="a.JPEG cannot be read as an image"):
            images.rgb(path)
    assert not images.readable(tmp_path / "not there")


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError()], ids=str)
def test_a_file_that_the_system_withholds_is_not_damaged(error, tmp_path, monkeypatch):
    """It is not left out: the images would be others than before."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    assert images.readable(path)

    def withheld(*_):
        raise error

    monkeypatch.setattr(Image, "open", withheld)
    with pytest.raises(MemoryError if isinstance(error, MemoryError) else Failure):
        images.readable(path)


def test_evaluated_images_are_cut_out_at_the_centre(tmp_path):
    """At 224: the shorter side to 256, then the middle: here of a picture whose pixels say where they are."""
    column, row = np.meshgrid(np.arange(640) * 255 / 639, np.arange(512) * 255 / 511)
    Image.fromarray(np.stack([column, row, 0 * row], 2).round().astype(np.uint8)).save(tmp_path / "a.png")
    found = stream.centres(images.listed([str(tmp_path / "a.png")]), 224)[0].astype(float)
    assert found.shape == (224, 224, 3)
    left, top = (640 - 448) / 2, (512 - 448) / 2
    assert np.abs(found[..., 0] - (left + 2 * np.arange(224) + 0.5) * 255 / 639).max() < 1.5
    assert np.abs(found[..., 1] - (top + 2 * np.arange(224) + 0.5)[:, None] * 255 / 511).max() < 1.5


# ---- imagenet: batches ----------------------------------------------------------------------------------------------

def streamed(tree: Path, **more: Any) -> stream.Batches:
    dataset = data.load("imagenet", tree, SIDE)
    return stream.Batches(dataset.x_train, dataset.y_train, **dict(batch_size=10, seed=3, size=SIDE, workers=0) | more)


def equal(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for one, other in zip(a, b) for p, q in zip(one, other))


def by_image(batches) -> dict[int, Tensor]:
    return {int(i): image for x, _, index in batches for i, image in zip(index, x)}


def test_batches_do_not_depend_on_workers_and_begin_anywhere(tree):
    alone = list(streamed(tree).epoch(2))
    assert [x.shape for x, _, _ in alone] == [(10, 3, SIDE, SIDE), (10, 3, SIDE, SIDE), (4, 3, SIDE, SIDE)]
    assert sorted(torch.cat([index for *_, index in alone]).tolist()) == list(range(24)) and len(streamed(tree)) == 3
    labels = torch.from_numpy(data.load("imagenet", tree).y_train)
    for x, y, index in alone:
        assert x.dtype == torch.float32 and 0 <= x.min() < 0.2 and 0.8 < x.max() <= 1 and torch.equal(y, labels[index])
    for workers in (1, 2):
        assert equal(alone, list(streamed(tree, workers=workers).epoch(2)))
    assert equal(alone[1:], list(streamed(tree, workers=2).epoch(2, first=1)))
    once, others = by_image(alone), by_image(streamed(tree, batch_size=7).epoch(2))
    assert all(torch.equal(once[i], others[i]) for i in once)


def test_epochs_and_seeds_differ(tree):
    once = list(streamed(tree).epoch(0))
    for other in (list(streamed(tree).epoch(1)), list(streamed(tree, seed=4).epoch(0))):
        assert not torch.equal(once[0][2], other[0][2])
        a, b = by_image(once), by_image(other)
        assert not any(torch.equal(a[i], b[i]) for i in a)


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_own_random_numbers_are_left_alone(workers, tree):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(streamed(tree, workers=workers).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_crops_are_boxes_of_the_image_as_torchvision_draws_them(tmp_path):
    """From pictures whose red says the column and whose green says the row, the box can be read off."""
    width, height = 240, 180
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    Image.fromarray(np.stack([column, row, 0 * row], 2).astype(np.uint8)).save(tmp_path / "a.png")
    names = images.listed([str(tmp_path / "a.png")] * 200)
    batches = stream.Batches(names, np.zeros(200, np.int64), batch_size=200, seed=0, size=24, workers=0)
    (x, _, _), = batches.epoch(0)
    red, green = 255 * x[:, 0].mean(1), 255 * x[:, 1].mean(2)
    slope = (red[:, -4] - red[:, 3]) / (24 - 7)  # columns of the picture a column of the crop; negative: mirrored
    wide, high = 24 * slope.abs(), 24 * (green[:, -4] - green[:, 3]) / (24 - 7)
    assert 70 < (slope < 0).sum() < 130
    area, ratio = wide * high / (width * height), wide / high
    assert 0.07 < area.min() < 0.15 and 0.8 < area.max() < 1.02 and 0.4 < area.mean() < 0.56
    assert 0.7 < ratio.min() < 0.8 and 1.28 < ratio.max() < 1.4
    left, top = red.mean(1) - wide / 2, green.mean(1) - high / 2
    for start, length, whole in ((left, wide, width), (top, high, height)):
        assert start.min() > -2 and (start + length).max() < whole + 2
        assert (start < 5).any() and (start + length > whole - 5).any()


def test_without_augmentation_every_epoch_shows_the_evaluated_images(tree):
    dataset = data.load("imagenet", tree, SIDE)
    expected = data.to_images(torch.from_numpy(dataset.pixels(dataset.x_train)))
    for x, _, index in streamed(tree, augment=False).epoch(1):
        assert torch.equal(x, expected[index])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named(workers, damaged):
    with pytest.raises(Failure, match=r"imagenet/train/n0(2/train_5|3/train_6).JPEG cannot be read"):
        list(streamed(damaged, workers=workers).epoch(0))


@pytest.fixture
def another_start_method() -> Iterator[None]:
    """Python 3.14's, whatever this one's is."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_a_worker_that_is_killed(tree, tiny, monkeypatch, another_start_method):
    """It is a fork of this process, and so the patch is there."""
    def die(self, i):
        os._exit(9)

    monkeypatch.setattr(stream.Crops, "pixels", die)
    refused(tiny.command("train_fgsm_rs", *NARROW, "--dataset", "imagenet", "--data-dir", tree, "--image-size", SIDE, "--val-size", 4,
                         "--workers", 1, "--out-dir", tiny.directory / "o"), 1, "killed", "--workers")


def test_a_worker_sends_what_already_lies_in_shared_memory(tree, monkeypatch):
    crops = streamed(tree).crops
    assert not crops[np.arange(2)].is_shared()
    monkeypatch.setattr(stream, "get_worker_info", lambda: True)
    assert crops[np.arange(2)].is_shared() and all(part.is_shared() for part in dataclasses.replace(crops, encoded=True)[np.arange(2)])


def test_a_containers_share_of_the_cores(tmp_path, monkeypatch):
    cores = device.cores()
    monkeypatch.setattr(device, "QUOTA", tmp_path / "cpu.max")
    for text, expected in (("max 100000", None), ("50000 100000", 1), ("100000 100000", 1), ("99900000 100000", None), ("", None)):
        (tmp_path / "cpu.max").write_text(text)
        assert device.cores() == (expected or cores)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_decoding_elsewhere_gives_nearly_the_same(tree, damaged):
    """The GPU's path with torchvision's CPU decoder in its place: the same boxes, and files that are no RGB JPEG as before."""
    here, there = streamed(tree), streamed(tree)
    there.crops = dataclasses.replace(there.crops, encoded=True)
    a, b = by_image(here.epoch(1)), by_image(there.epoch(1))
    assert a.keys() == b.keys()
    kinds = {i: Image.open(here.crops.path(i)) for i in a}
    for i, image in a.items():
        if kinds[i].format == "PNG" or kinds[i].mode == "CMYK":
            assert torch.equal(image, b[i])
        else:
            assert (image - b[i]).abs().mean() < 0.01, here.crops.path(i)
    assert {(image.format, image.mode) for image in kinds.values()} == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P")}
    broken = streamed(damaged)
    broken.crops = dataclasses.replace(broken.crops, encoded=True)
    with pytest.raises(Failure, match="n0(2/train_5|3/train_6).JPEG"):
        list(broken.epoch(0))
    assert [x.shape for x in nvjpeg.encoded(there.crops, np.arange(0))] == [(0,), (0, 6)]
    assert nvjpeg.decoded(*nvjpeg.encoded(there.crops, np.arange(0)), SIDE, torch.device("cpu"), []).shape == (0, SIDE, SIDE, 3)


@pytest.mark.parametrize("flags, words", [
    (("--decode", "gpu"), ("--decode gpu", "cpu")),
    (("--decode", "gpu", "--augment", "none"), ("--decode gpu", "--augment crop")),
    (("--image-size", 4), ("--image-size 4", "at least 8")),
    (("--workers", -1), ("--workers -1", "at least 0")),
    (("--dataset", "cifar10"), ("--image-size 32", "cifar10")),
])
def test_flags_that_cannot_be(flags, words, tree, tiny):
    refused(tiny.command("train_fgsm_rs", *NARROW, "--dataset", "imagenet", "--data-dir", tree, "--image-size", SIDE, "--val-size", 4,
                         "--out-dir", tiny.directory / "o", *flags), 2, *words)


# ---- imagenet: runs -------------------------------------------------------------------------------------------------

def test_a_run_that_was_interrupted_sees_the_same_batches(tree, tiny, differences):
    flags = (*NARROW, "--dataset", "imagenet", "--data-dir", tree, "--image-size", SIDE, "--val-size", 4, "--batch-size", 8, "--workers", 1)
    assert tiny.command("train_fgsm_rs", *flags, "--out-dir", tiny.directory / "whole").status == 0
    stopped = tiny.command("train_fgsm_rs", *flags, "--out-dir", tiny.directory / "parts", "--time-limit", 0)
    assert stopped.status == 0 and "epoch 1, batch 1;" in stopped.out
    rest = tiny.command("train_fgsm_rs", *flags[:-1], 0, "--out-dir", tiny.directory / "parts")  # also with other workers
    assert rest.status == 0 and "epoch 1, batch 1" in rest.out
    states = [torch.load(tiny.directory / name / "state.pth", weights_only=True) for name in ("whole", "parts")]
    for part in ("kept", "history"):
        assert differences(*(state[part] for state in states)) == []


def test_damaged_files_end_a_run_or_are_left_out(damaged, tiny):
    flags = (*NARROW, "--dataset", "imagenet", "--data-dir", damaged, "--image-size", SIDE, "--batch-size", 8, "--workers", 0)
    refused(tiny.command("train_fgsm_rs", *flags, "--val-size", 4, "--out-dir", tiny.directory / "o"), 1, "cannot be read as an image", ".JPEG")
    refused(tiny.command("train_fgsm_rs", *flags, "--val-size", 0, "--select-on", "test", "--out-dir", tiny.directory / "o"), 1,
            "val/n01/val_3.JPEG", "truncated")
    result = tiny.command("train_fgsm_rs", *flags, "--val-size", 0, "--select-on", "test", "--skip-damaged", "--out-dir", tiny.directory / "o")
    assert result.status == 0, result.err
    line, = [line for line in result.out.splitlines() if "left out" in line]
    assert "3 damaged files of 36" in line and all(name in line for name in ("n02/train_5.JPEG", "n03/train_6.JPEG", "n01/val_3.JPEG"))
    written = json.loads((tiny.directory / "o" / "result.json").read_text())
    assert written["checkpoints"]["last"]["clean"]["n"] == 11
    log = json.loads((tiny.directory / "o" / "log.jsonl").read_text().splitlines()[0])
    assert round(log["train_accuracy"] * 22 / 100, 6) == round(log["train_accuracy"] * 22 / 100)


DRIVER = '''
"""One of several processes: keeps an epoch's batches, then trains."""
import sys
import torch
import engine, train_fgsm_rs
from engine import data, distributed, stream

tree, out = sys.argv[1:3]
if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    dataset = data.load("imagenet", tree, 32)
    batches = stream.Batches(dataset.x_train, dataset.y_train, batch_size=23, seed=3, size=32, workers=1, shard=distributed.shard)
    torch.save([tuple(part) for part in batches.epoch(1)], f"{out}/epoch{distributed.rank()}.pth")
    sys.argv = [train_fgsm_rs.__file__, *sys.argv[3:]]
    engine.launch(train_fgsm_rs.main, train_fgsm_rs.Config, train_fgsm_rs.__doc__)
'''


def test_two_processes_share_batches_out_and_train(tree, damaged, tiny):
    """24 images in batches of 23: the last batch has one, of which the second process gets nothing."""
    (tiny.directory / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py", tree, tiny.directory,
               *NARROW[:-2], "--dataset", "imagenet", "--data-dir", damaged, "--image-size", SIDE, "--val-size", 0, "--select-on", "test",
               "--batch-size", 7, "--workers", 1, "--skip-damaged", "--out-dir", "o"]
    done = subprocess.run([str(word) for word in command], cwd=tiny.directory, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    whole = list(streamed(tree, batch_size=23).epoch(1))
    parts = [torch.load(tiny.directory / f"epoch{rank}.pth", weights_only=True) for rank in range(2)]
    assert [len(y) for _, y, _ in parts[0]] == [12, 1] and [len(y) for _, y, _ in parts[1]] == [11, 0]
    assert equal(whole, [tuple(map(torch.cat, zip(*batch))) for batch in zip(*parts)])
    assert done.stdout.count("left out 3 damaged files") == 1
    result = json.loads((tiny.directory / "o" / "result.json").read_text())
    assert result["processes"] == 2 and result["updates"] == 8 and result["checkpoints"]["last"]["clean"]["n"] == 11

    evaluated = tiny.command("test_FGSM_SDI", "--model-path", tiny.directory / "o" / "last.pth", "--data-dir", tree, "--attacks", "clean,pgd10",
                             "--n-ex", 11)
    assert evaluated.status == 0, evaluated.err
    content = json.loads((tiny.directory / "o" / "last-evaluation" / "evaluation.json").read_text())
    assert (content["dataset"], content["n"], content["epsilon"]) == ("imagenet", 11, 4)
    assert any("first 11 of 12" in sentence for sentence in content["warnings"]) and "permutation" in content["test_order"]
