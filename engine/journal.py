"""What a run tells of itself: a row for every epoch, and what best.pth and last.pth are."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import record
from engine.config import Config
from engine.errors import Misuse
from engine.heldout import HeldOut


class Journal:
    """The rows of log.jsonl, one for every finished epoch.

    Args:
        measured: whose columns the rows have.

    Raises:
        Misuse: --tensorboard, and the package is missing.
    """

    def __init__(self, cfg: Config, measured: HeldOut) -> None:
        self.cfg, self.measured, self.last_weights = cfg, measured, "ema" if cfg.ema else "raw"
        if cfg.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # slow to import; and now, not after an epoch
            except ImportError as error:
                raise Misuse("--tensorboard: the package is missing; pip install tensorboard") from error
            self._writer = SummaryWriter
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # score, epoch and weights of best.pth

    def add(self, row: dict[str, Any], averaged: dict[str, float] | None) -> bool:
        """An epoch's row, with the weights' accuracies in it, and those of their average; returns whether it is the best so far."""
        criterion = self.measured.criterion
        row["weights"], score = "raw", row[criterion]
        if averaged is not None:
            row.update({f"{key}_ema": value for key, value in averaged.items()})
            if averaged[criterion] >= score:
                row["weights"], score = "ema", averaged[criterion]
        self.rows.append(row)
        better = not self.best or score >= self.best["score"]  # a later epoch wins a tie, as in the published scripts
        if better:
            self.best = {"score": score, "epoch": row["epoch"], "weights": row["weights"]}
        return better

    def tell(self, better: bool, out_dir: Path) -> None:
        """Prints the last row, and gives it to TensorBoard."""
        row = self.rows[-1]
        held_out = "  ".join(f"{column} {row[f'{self.cfg.select_on}_{column}']:5.2f}" for column in self.measured.columns)
        print(f"epoch {row['epoch']:3d}/{self.cfg.epochs}  loss {row['loss']:.4f}  train {row['train_accuracy']:5.2f}  "
              f"{self.cfg.select_on}: {held_out}  lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s"
              f"{'  (best)' if better else ''}", flush=True)
        if self.cfg.tensorboard:
            with self._writer(str(out_dir)) as writer:  # a file per epoch, whole after a kill
                for name, value in row.items():
                    if isinstance(value, float):
                        writer.add_scalar(name, value, row["epoch"])

    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """What best.pth and last.pth are: epoch, weights, and their accuracies with intervals."""
        def at(epoch: int, weights: str) -> dict[str, Any]:
            row, suffix, split = self.rows[epoch - 1], "_ema" if weights == "ema" else "", self.cfg.select_on
            measured = {column: record.percent_of(row[f"{split}_{column}{suffix}"], self.measured.sizes[split]) for column in self.measured.columns}
            return {"epoch": epoch, "weights": weights, "split": split, **measured}

        return {"best": at(self.best["epoch"], self.best["weights"]), "last": at(self.cfg.epochs, self.last_weights)}
