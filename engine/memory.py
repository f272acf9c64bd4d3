"""What a method remembers of every training image, or of every position in a batch, from one visit to the next."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.device import free_bytes
from engine.errors import Misuse


class Memory:
    """Rows of shape (C, H, W): `memory[index]` reads a copy, `memory[index] = rows` writes; zero at first, and where nan was written.

    Args:
        rows: how many.
        shape: (C, H, W) of a row.
        dtype: as stored; rows go in and out in torch's default dtype.
        scale: stored values are this many times the true ones, so that small ones survive half precision.
        pad, places: for rows that are aligned with the image instead of with its shifted and mirrored crop: `places()`
            gives the pixel rows and columns, (B, H) and (B, W), that the current crops have in images with `pad` more
            pixels on every side. What of an image no crop has shown stays zero.
        gather: from this process's part of a batch to the whole batch. Every process holds all rows and writes all.

    Raises:
        Misuse: it does not fit into what the device has left.
    """

    def __init__(
        self, rows: int, shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device, scale: float = 1.0, pad: int = 0,
        places: Callable[[], tuple[Tensor, Tensor]] | None = None, gather: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> None:
        channels, height, width = shape
        self.scale, self.places, self.gather = scale, places, gather
        size = torch.Size((rows, height + 2 * pad, width + 2 * pad, channels) if places else (rows, *shape))
        needed, free = size.numel() * dtype.itemsize, free_bytes(device)
        if needed > free:
            raise Misuse(f"remembering {rows} images of {channels} x {height} x {width} needs {needed / 1e9:.1f} GB, and {device} has "
                         f"{free / 1e9:.1f} GB left: train_fgsm_bp.py remembers one batch only; or use fewer images (--train-size)")
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.places is None:
            found = self.values[index]
        else:
            rows, columns = self.places()
            found = self.values[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return found.to(torch.get_default_dtype()) / self.scale

    def __setitem__(self, index: Tensor, rows: Tensor) -> None:
        rows = self.gather((rows.detach() * self.scale).to(self.values.dtype).nan_to_num(0))
        index = self.gather(index)
        if self.places is None:
            self.values[index] = rows
        else:
            row, column = map(self.gather, self.places())
            self.values[index[:, None, None], row[:, :, None], column[:, None, :]] = rows.permute(0, 2, 3, 1)

    def forget(self) -> None:
        """All rows are zero again."""
        self.values.zero_()
