"""Files of images to uint8 pixels, on many threads. A file that cannot be read ends the run in a sentence that names it."""
from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from engine import distributed
from engine.errors import Failure


def rgb(source: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """The image in a file, whole and with three channels: grey-scale, palette and CMYK become RGB.

    A camera's orientation (EXIF) is not applied, as torchvision does not apply it either.

    Raises:
        Failure: `name`, the file's own unless given, is missing, damaged or no image.
    """
    with opened(source, name) as image:
        return image.convert("RGB")


@contextmanager
def opened(source: str | Path | IO[bytes], name: str | None = None) -> Iterator[Image.Image]:
    """The image in a file of which no more than the header has been read; what goes wrong in the block is a Failure too."""
    try:
        with Image.open(source) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds, from OSError to SyntaxError
        reason = "no image format that PIL knows" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None) or error
        raise Failure(f"{name or source} cannot be read as an image ({reason}): replace it by a sound copy") from error


def readable(path: str | Path) -> bool:
    """Whether what is in the file is an image.

    Raises:
        Failure: the system did not let it be read, which says nothing of that.
    """
    try:
        rgb(path)
    except Failure as error:
        if getattr(error.__cause__, "errno", None) not in (None, errno.ENOENT):
            raise
        return False
    return True


def stacked(read: Callable[[Any], np.ndarray], items: Sequence[Any], shape: tuple[int, ...], what: str) -> np.ndarray:
    """read(item) of every item, (N, *shape) uint8, with a progress bar that says `what`.

    PIL lets go of Python's lock while it decodes and resizes, so that threads do.
    """
    found = np.empty((len(items), *shape), np.uint8)
    with ThreadPoolExecutor() as pool, tqdm(desc=what, total=len(items), unit="image", disable=None if distributed.rank() == 0 else True) as bar:
        for start in range(0, len(items), 4096):  # a million at once would take gigabytes of waiting list
            for i, pixels in enumerate(pool.map(read, items[start:start + 4096]), start):  # gives up the others at the first error
                found[i] = pixels
                bar.update()
    return found


def path_of(name: bytes) -> str:
    """A file's name as `listed` packed it."""
    return os.fsdecode(bytes(name))


def listed(paths: Sequence[str]) -> np.ndarray:
    """File names as an array (N,) of bytes: a million of them stay one block that worker processes share."""
    return np.array([os.fsencode(path) for path in paths], dtype=bytes)
