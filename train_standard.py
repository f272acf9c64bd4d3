"""Standard training: no attack. The reference that says what robustness costs in clean accuracy.

The other methods' recipe without their inner maximisation, as the robust-overfitting repository (Rice, Wong & Kolter,
ICML 2020) has it. docs/methods.md#standard-training.
"""
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

import engine
from utils import soft_labels


@dataclass
class Config(engine.Config):
    METHOD = "standard"

    co_guard: Literal["off", "warn", "stop", "rollback"] = "off"  # there is no robustness that could be lost


def main(cfg: Config) -> None:
    run = engine.Run(cfg)

    @run.captured
    def step(x, y):
        logits = run.model(x)
        run.update(F.cross_entropy(logits, soft_labels(y, run.classes, cfg.label_factor)), logits=logits)

    for x, y, _ in run.batches():
        step(x, y)


if __name__ == "__main__":
    engine.launch(main, Config, __doc__)
