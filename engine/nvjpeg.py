"""JPEGs decoded on a GPU (--decode gpu): workers read bytes and draw boxes, nvJPEG and the GPU do the rest.

Experimental: it has been run with torchvision's CPU decoder in nvJPEG's place only. Pixels differ a little from PIL's,
and nvJPEG may pass over a truncated file.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional

from engine import images
from engine.errors import Misuse

if TYPE_CHECKING:
    from engine.stream import Crops


def check(device: torch.device) -> None:
    """Raises Misuse where JPEGs cannot be decoded on the device."""
    if device.type != "cuda":
        raise Misuse(f"--decode gpu: this run is on {device}; choose --decode cpu")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
        decode_jpeg([encode_jpeg(torch.zeros((3, 8, 8), dtype=torch.uint8))], ImageReadMode.RGB, device)
    except (ImportError, RuntimeError) as error:
        raise Misuse(f"--decode gpu: this torchvision cannot ({error}); choose --decode cpu") from error


def encoded(crops: Crops, index: np.ndarray) -> tuple[Tensor, Tensor]:
    """What a worker sends: all files' bytes one after the other, and for each (top, left, height, width, mirror, bytes).

    A file that nvJPEG would not decode, a PNG or a CMYK image, is cropped here: its height is 0, its bytes are pixels.
    """
    pieces, boxes = [], []
    for i in index:
        with images.opened(crops.path(i)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                box, mirror = crops.drawn(i, image)
                image.fp.seek(0)
                piece = image.fp.read()
            else:
                box, mirror, piece = (0, 0, 0, 0), False, crops.pixels(i).tobytes()
        pieces.append(piece)
        boxes.append((*box, mirror, len(piece)))
    blob = np.frombuffer(b"".join(pieces), np.uint8).copy()
    return torch.from_numpy(blob), torch.tensor(boxes, dtype=torch.int64).reshape(-1, 6)


def decoded(blob: Tensor, boxes: Tensor, size: int, device: torch.device, paths: list[str]) -> Tensor:
    """The crops, (B, size, size, 3) uint8 on the device.

    Raises:
        Failure: a file is damaged.
    """
    pieces, boxes = blob.split(boxes[:, 5].tolist()), boxes.tolist()
    jpegs = [k for k, box in enumerate(boxes) if box[2]]
    found = torch.empty((len(boxes), size, size, 3), dtype=torch.uint8, device=device)
    for k in set(range(len(boxes))) - set(jpegs):
        found[k] = pieces[k].view(size, size, 3)
    for k, image in zip(jpegs, _decoded([pieces[k] for k in jpegs], device, [paths[k] for k in jpegs])):
        top, left, height, width, mirror, _ = boxes[k]
        crop = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        found[k] = (crop.flip(-1) if mirror else crop).permute(1, 2, 0)
    return found


def _decoded(jpegs: list[Tensor], device: torch.device, paths: list[str]) -> list[Tensor]:
    """(3, H, W) uint8 on the device: all at once, or, where nvJPEG refuses one, by PIL, which can name a damaged file."""
    from torchvision.io import ImageReadMode, decode_jpeg  # here, since torchvision is going to give it up for TorchCodec

    try:
        return decode_jpeg(jpegs, ImageReadMode.RGB, device) if jpegs else []
    except RuntimeError:
        return [functional.pil_to_tensor(images.rgb(path)).to(device) for path in paths]
