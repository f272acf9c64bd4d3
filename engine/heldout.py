"""What is measured while a run trains: accuracies on held-out images, and on some training images where that is wished."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engine import distributed, evaluate
from engine.config import Config
from engine.data import Dataset
from engine.errors import Misuse


class HeldOut:
    """The images that are measured, this process's share of each split; random starts are a function of --seed and of the image.

    Args:
        splits: a split's name to its images and labels, as the data set has them; empty ones are left out.

    Raises:
        Misuse: --measure names what is no column, or one of AutoAttack's.
    """

    def __init__(self, cfg: Config, dataset: Dataset, splits: dict[str, tuple[np.ndarray, np.ndarray]], device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.columns = evaluate.columns_named(cfg.measure)
        if unfit := [column for column in self.columns if column in evaluate.AUTOATTACK_COLUMNS]:
            raise Misuse(f"--measure {cfg.measure}: {', '.join(unfit)} would take longer than the epoch; leave it out, and evaluate the "
                         "checkpoint with test_FGSM_SDI.py")
        self.criterion = f"{cfg.select_on}_pgd10"  # what picks best.pth
        self.batch_size = max(cfg.batch_size, 128)
        self.sizes = {split: len(images) for split, (images, _) in splits.items() if len(images)}  # over all processes
        self._images: dict[str, tuple[Tensor, Tensor]] = {}
        for split, n in self.sizes.items():
            images, labels = (array[distributed.shard(n)] for array in splits[split])
            self._images[split] = torch.from_numpy(dataset.pixels(images)), torch.from_numpy(labels)

    def accuracies(self, network: nn.Module) -> dict[str, float]:
        """In percent, as `<split>_<column>`."""
        found = {}
        for split in self.sizes:
            *counts, n = self.standing(network, split, self.columns)
            found |= {f"{split}_{column}": 100 * count / n for column, count in zip(self.columns, counts)}
        return found

    def standing(self, network: nn.Module, split: str, columns: Sequence[str], most: int | None = None) -> list[float]:
        """How many images are still classified right under each column, and how many there are, over all processes.

        Args:
            most: no more than so many of them, each process's first.
        """
        n = self.sizes[split]
        mine = distributed.shard(n if most is None else most)
        x, y = (images[:mine.stop - mine.start] for images in self._images[split])
        found = evaluate.verdicts(
            network, x, y, columns=columns, eps=self.cfg.eps, alpha=self.cfg.eps / 4, seed=self.cfg.seed,
            batch_size=self.batch_size, first=distributed.shard(n).start)
        counts = torch.tensor([*(float(found[column].sum()) for column in columns), len(y)], dtype=torch.float64, device=self.device)
        distributed.all_reduce([counts])
        return counts.tolist()

    def settings(self) -> dict[str, float]:
        """What the accuracies depend on besides the network."""
        return {"seed": self.cfg.seed, "batch_size": self.batch_size, "pgd_alpha": self.cfg.epsilon / 4}
