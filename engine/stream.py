"""Images that stay in their files: worker processes decode and crop the next batches while the network learns from one.

What happens to an image is a function of (seed, epoch, image) alone, as in `data`: not of the number of workers either.
"""
from __future__ import annotations

import dataclasses
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torchvision.transforms import RandomResizedCrop, functional

from engine import data, distributed, images, nvjpeg, random_streams
from engine.device import cores
from engine.errors import Failure

SCALE, RATIO = [0.08, 1.0], [3 / 4, 4 / 3]  # a crop's part of the image's area, and its width by its height


class Batches:
    """The training images in `data.Batches`' order, each cropped, resized and mirrored at random anew in every epoch.

    Args:
        x, y: names of files as `images.listed` packs them, (N,), and (N,) int64.
        batch_size: images per batch over all processes; the last batch of an epoch may be short.
        size: side of the images that come out.
        augment: else every image is cut out at its centre, as for evaluation.
        workers: processes that read and decode; 0: this one does. The default is a process for each core there is, up to 16.
        decode: cpu, or gpu: see `nvjpeg`.
        shard: from a batch's size to this process's part of it.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, *, batch_size: int, seed: int, size: int, augment: bool = True, workers: int | None = None,
        decode: str = "cpu", device: torch.device | str = "cpu", shard: Callable[[int], slice] = lambda n: slice(0, n),
    ) -> None:
        self.n, self.size, self.batch_size, self.seed = len(x), size, batch_size, seed
        self.device, self.shard = torch.device(device), shard
        if decode == "gpu":
            nvjpeg.check(self.device)
        self.workers = min(16, cores()) if workers is None else workers
        self.crops = Crops(x, size, seed, augment, encoded=decode == "gpu")
        self.y = torch.from_numpy(y).to(self.device)

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.n // self.batch_size)

    def epoch(self, epoch: int, first: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields x (B, C, H, W) in [0, 1], y (B,) int64, index (B,) int64 of the images, from batch `first` on.

        Raises:
            Failure: a file is damaged.
        """
        order = torch.randperm(self.n, generator=random_streams.seeded(self.seed, random_streams.DATA, epoch))
        parts = self._parts(order, first)
        crops = dataclasses.replace(self.crops, epoch=epoch)
        loader = DataLoader(
            crops, batch_size=None, sampler=[part.numpy() for part in parts], num_workers=self.workers, worker_init_fn=_settle,
            multiprocessing_context="fork" if self.workers else None,  # else, from Python 3.14 on, every worker imports torch anew in each epoch
            pin_memory=self.device.type == "cuda" and not crops.encoded, generator=torch.Generator())  # its own: torch's is left alone
        for found, part, index in zip(loader, parts, self._parts(order.to(self.device), first)):
            if isinstance(found, str):
                raise Failure(found)
            if crops.encoded:
                pixels = nvjpeg.decoded(*found, self.size, self.device, [crops.path(i) for i in part.tolist()])
            else:
                pixels = found.to(self.device, non_blocking=True)
            yield data.to_images(pixels, dtype), self.y[index], index

    def _parts(self, order: Tensor, first: int) -> list[Tensor]:
        """This process's images of every batch from `first` on."""
        whole = [order[start:start + self.batch_size] for start in range(first * self.batch_size, self.n, self.batch_size)]
        return [batch[self.shard(len(batch))] for batch in whole]


@dataclass(frozen=True)
class Crops:
    """From the numbers of some images to their crops: what a worker process does in one epoch."""

    paths: np.ndarray
    size: int
    seed: int
    augment: bool
    encoded: bool
    epoch: int = 0

    def __getitem__(self, index: np.ndarray) -> Any:
        """(B, size, size, 3) uint8, or what `nvjpeg.decoded` makes it of; or, instead of raising Failure, its sentence."""
        try:
            if self.encoded:
                return tuple(map(shared, nvjpeg.encoded(self, index)))
            found = shared(torch.empty((len(index), self.size, self.size, 3), dtype=torch.uint8))
            for row, i in zip(found.numpy(), index):
                row[...] = self.pixels(i)
            return found
        except Failure as error:
            return str(error)

    def path(self, i: int) -> str:
        return images.path_of(self.paths[i])

    def pixels(self, i: int) -> np.ndarray:
        """Image i, (size, size, 3) uint8."""
        image = images.rgb(self.path(i))
        if not self.augment:
            return centre(image, self.size)
        box, mirror = self.drawn(i, image)
        crop = functional.resized_crop(image, *box, [self.size, self.size])
        return np.asarray(functional.hflip(crop) if mirror else crop)

    def drawn(self, i: int, image: Image.Image) -> tuple[tuple[int, int, int, int], bool]:
        """The random box (top, left, height, width) of image i, and whether it is mirrored; no pixel is looked at."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
            torch.default_generator.manual_seed(random_streams.stream_seed(self.seed, random_streams.CROP, self.epoch, int(i)))
            mirror = bool(torch.rand(()) < 0.5)
            return RandomResizedCrop.get_params(image, SCALE, RATIO), mirror


def shared(tensor: Tensor) -> Tensor:
    """The tensor, in a worker process already in the memory through which it is sent: where that is full, it is the worker's own error, of which the run hears."""
    return tensor.share_memory_() if get_worker_info() else tensor


def centre(image: Image.Image, size: int) -> np.ndarray:
    """The shorter side resized to 8/7 of `size` (224: 256), the middle cut out: (size, size, 3) uint8."""
    return np.asarray(functional.center_crop(functional.resize(image, round(size * 256 / 224)), size))


def centres(paths: np.ndarray, size: int) -> np.ndarray:
    """`centre` of every file, (N, size, size, 3) uint8.

    Raises:
        Failure: a file is damaged.
    """
    return images.stacked(lambda name: centre(images.rgb(images.path_of(name)), size), paths, (size, size, 3), "decoding")


def without_damaged(dataset: data.Dataset, device: torch.device) -> data.Dataset:
    """The data set without the files that cannot be read. Every process looks for them in its part of the files."""
    names = np.concatenate([dataset.x_train, dataset.x_test])
    part = names[distributed.shard(len(names))]
    found = images.stacked(lambda name: np.uint8(not images.readable(images.path_of(name))), part, (), "looking for damaged files")
    damaged = distributed.gathered(torch.from_numpy(found).to(device, torch.int32), len(names)).cpu().numpy().astype(bool)
    if distributed.rank() == 0 and damaged.any():
        print(f"left out {damaged.sum()} damaged files of {len(names)}: {', '.join(map(images.path_of, names[damaged]))}")
    train, test = ~damaged[:len(dataset.x_train)], ~damaged[len(dataset.x_train):]
    return dataclasses.replace(dataset, x_train=dataset.x_train[train], y_train=dataset.y_train[train],
                               x_test=dataset.x_test[test], y_test=dataset.y_test[test])


def _settle(worker: int) -> None:
    """At the start of a worker process: only its run may end it.

    A scheduler sends SIGTERM to the workers too, and the run may need a few batches more before it has saved itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_the_run, daemon=True).start()
    warnings.filterwarnings("ignore", module="PIL")  # of ImageNet's odd EXIF blocks, which nobody reads here


def _wait_for_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
