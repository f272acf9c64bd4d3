"""What is watched while a run trains: catastrophic overfitting.

Catastrophic overfitting (Wong et al., ICLR 2020): within some hundred updates a network trained by a single step keeps or
gains accuracy under FGSM while that under PGD falls towards zero. What the signs are, what they cost, how often they are
wrong, and what a rollback changes: docs/guard.md.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from engine import checkpoint, distributed
from engine.errors import Failure

if TYPE_CHECKING:
    from engine.run import Run

MEMORY, RISE, FALL = 10, 2.0, 0.85  # chosen on half of the methods of the FastAT Benchmark's curves: experiments/detector.py
PATIENCE = 5  # readings; chosen on runs of this repository
ANSWERED, LEFT = 10.0, 0.05  # points, and a part of the training accuracy: chosen on both
LOOK = 20  # batches between two looks at the training loss, each of which makes a GPU wait once
LOSS_FALL, LOSS_MEMORY = 0.7, 0.1  # a loss below this part of what it was of late is suspicious; how fast "of late" follows
TEST_IMAGES, TEST_EVERY = 256, 180_000  # images; the second: trained between two tests that nothing suspicious asked for
ROLLBACKS = 3
GOOD, GOOD_BEST = "good.pth", "good-best.pth"  # second names of state.pth and best.pth as they were when the last healthy epoch ended


class Reading(NamedTuple):
    """Accuracies in percent on n held-out images; random starts and step sizes are the evaluation's.

    train: on the training images as the script perturbs them, since the epoch began. nan where something was not measured.
    """

    fgsm: float
    pgd10: float
    n: int
    clean: float = math.nan
    train: float = math.nan


def overfitted(readings: Sequence[Reading]) -> list[bool]:
    """For each reading of a run whether it shows catastrophic overfitting, judged from itself and the ones before it.

    Three signs. Robustness is lost: against the medians of the last `MEMORY` readings that showed nothing, FGSM minus PGD-10 has
    grown by more than `RISE` points and PGD-10 has fallen below `FALL` of what it was, both by more than the error of n images.
    Or it does not come: FGSM is more than 5 points and twice that error above twice PGD-10, whose best in the last `PATIENCE`
    readings is no better than what was before them. Or only the training attack is answered: in this reading and the one before, training images
    under it are right more often than clean held-out ones, by more than `ANSWERED` points and that error, and PGD-10 leaves less than
    `LEFT` of that. Accuracy on clean images alone tells nothing: it may fall, stay or rise.
    """
    healthy: list[Reading] = []
    found, answered = [], False
    for number, (fgsm, pgd10, n, clean, train) in enumerate(readings, 1):
        error = 100 / n ** 0.5  # three standard errors of a gap of 10 points
        accuracies = [reading.pgd10 for reading in readings[:number]]
        stale = number > PATIENCE and max(accuracies[-PATIENCE:]) <= max(accuracies[:-PATIENCE])
        collapsed = stale and fgsm > 2 * pgd10 + 5 + 2 * error
        if recent := healthy[-MEMORY:]:
            rise = fgsm - pgd10 - statistics.median(reading.fgsm - reading.pgd10 for reading in recent)
            usual = statistics.median(reading.pgd10 for reading in recent)
            collapsed |= rise > RISE + error and pgd10 < min(FALL * usual, usual - error)
        before, answered = answered, train - clean > ANSWERED + error and pgd10 < LEFT * train
        collapsed |= before and answered
        if not collapsed:
            healthy.append(readings[number - 1])
        found.append(collapsed)
    return found


class Guard:
    """`--co-guard`: what it decides is a function of the run's updates alone, and no random number of the run is drawn for it.

    Args:
        mode: off, warn, stop or rollback.
        columns: what is measured after every epoch; without fgsm among them nothing is watched.
    """

    def __init__(self, mode: str, columns: Sequence[str]) -> None:
        self.mode = mode if "fgsm" in columns else "off"
        self.keeps = self.mode in ("stop", "rollback")  # the last healthy epoch's state, in a file of its own
        self.failure = ""  # why the run is to end once it is saved
        self.alarms: list[dict[str, Any]] = []
        self.alarmed = False  # whether the last reading was an alarm
        self.rollbacks = 0
        self.good = 0  # the update after which the last healthy epoch ended
        self.level: float | None = None  # the training loss of late
        self.sums = [0.0, 0.0]  # of the epoch's losses and images, at the last look
        self.tested = 0.0  # the epoch's images at the last test

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers and lists."""
        return {name: getattr(self, name) for name in ("alarms", "alarmed", "rollbacks", "good", "level", "sums", "tested")}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up a saved state."""
        vars(self).update(state)

    def begin(self, run: Run, fresh: bool) -> None:
        """Before the first batch: a collapse in the first epoch has something to go back to, and a resumed run has good.pth
        even if a kill came between it and state.pth."""
        if not fresh:
            self.saved(run)
        elif self.keeps:
            run._save()

    def saved(self, run: Run) -> None:
        """After state.pth was written, or a run began from it: keeps it where it is the one to go back to.

        Raises:
            Failure: the run is to stop, and now it can.
        """
        if self.keeps and (run.batch, run.step) == (0, self.good) and distributed.rank() == 0:
            for name, kept in (("best.pth", GOOD_BEST), ("state.pth", GOOD)):
                if (run.out_dir / name).is_file():
                    checkpoint.link(run.out_dir / name, run.out_dir / kept)
        if self.failure:
            raise Failure(self.failure)

    def noised(self, run: Run, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [0, 1]; after k rollbacks with noise U(-k eps, k eps), the one of N-FGSM (de Jorge et al., NeurIPS 2022).

        The script's own noise goes on in the same stream, and so is another one than before.
        """
        return (x + self.rollbacks * run.cfg.eps * run.uniform(x)).clamp(0, 1) if self.rollbacks else x

    def due(self, run: Run) -> bool:
        """Whether it is time for a look."""
        return self.mode != "off" and run.batch % LOOK == 0 and run.batch < len(run._data)

    def look(self, run: Run) -> bool:
        """Between two batches: the training loss and, where that fell or nothing was tested for long, a test.

        Returns:
            Whether the run was put back.

        Raises:
            Failure: the run is to stop.
        """
        run._finite.read()
        before, self.sums = self.sums, [run._sums["loss"].item(), run._sums["seen"].item()]
        loss = (self.sums[0] - before[0]) / max(self.sums[1] - before[1], 1.0)
        fell = bool(distributed.maximum(int(self.level is not None and loss < LOSS_FALL * self.level), run.device))
        self.level = loss if fell or self.level is None else self.level + LOSS_MEMORY * (loss - self.level)
        if not fell and self.sums[1] - self.tested < TEST_EVERY:
            return False
        self.tested = self.sums[1]
        put_back = self._judge(run, self._test(run))
        if self.failure:
            run._save()
        return put_back

    def epoch_ended(self, run: Run, row: dict[str, Any]) -> bool:
        """Judges an epoch's evaluation; writes into its row whether it was `overfitted`, and its `alarms`.

        Returns:
            Whether the run was put back.
        """
        self.sums, self.tested = [0.0, 0.0], 0.0
        if self.mode == "off":
            return False
        if self._judge(run, self._reading(run, row)):
            return True
        row["overfitted"] = self.alarmed
        if not self.alarmed:
            self.good = run.step
        if alarms := [alarm for alarm in self.alarms if alarm["epoch"] == row["epoch"]]:
            row["alarms"] = alarms
        return False

    # ---- what goes on inside ------------------------------------------------------------------------------------

    def _reading(self, run: Run, row: dict[str, Any]) -> Reading:
        split = run.cfg.select_on
        return Reading(row[f"{split}_fgsm"], row[f"{split}_pgd10"], run._held_out.sizes[split], row.get(f"{split}_clean", math.nan), row["train_accuracy"])

    def _test(self, run: Run) -> Reading:
        """The network as it is now on the first of the held-out images; every process has its share of them."""
        with run._evaluating():
            *counts, n = run._held_out.standing(run.network, run.cfg.select_on, ("fgsm", "pgd10", "clean"), TEST_IMAGES)
        fgsm, pgd10, clean = (100 * count / n for count in counts)
        return Reading(fgsm, pgd10, int(n), clean, 100 * (run._sums["correct"] / run._sums["seen"]).item())

    def _judge(self, run: Run, reading: Reading) -> bool:
        """Acts on a reading; returns whether the run was put back."""
        known = self.alarmed
        self.alarmed = overfitted([*(self._reading(run, row) for row in run._journal.rows), reading])[-1]
        if not self.alarmed or known and self.mode == "warn":
            return False
        action = "stop" if self.mode == "rollback" and self.rollbacks == ROLLBACKS else self.mode
        self.alarms.append({"epoch": run.epoch + 1, "update": run.step, **reading._asdict(), "action": action})
        sentence = (f"catastrophic overfitting at epoch {run.epoch + 1}, update {run.step}: accuracy on {reading.n} held-out images is {reading.fgsm:.1f} % under FGSM "
                    f"and {reading.pgd10:.1f} % under PGD-10, that on training images under the training attack {reading.train:.1f} %")
        if action == "rollback":
            self._roll_back(run, sentence)
            return True
        if action == "stop":
            remedy = (f"{ROLLBACKS} rollbacks did not help, choose a smaller --epsilon or another method" if self.mode == "rollback" else
                      "--co-guard rollback goes on from before it, --co-guard warn regardless")
            self.failure = f"{sentence}; the run is saved in {run.out_dir}: {remedy}"
        elif distributed.rank() == 0:
            print(f"warning: {sentence}; --co-guard stop or rollback would act on it", flush=True)
        return False

    def _roll_back(self, run: Run, sentence: str) -> None:
        """Puts everything back as it was when the last healthy epoch ended, apart from `alarms` and `rollbacks`, and saves that."""
        path = run.out_dir / GOOD
        saved = checkpoint.load_state(path) if path.is_file() else None
        if saved is None or saved["position"]["step"] != self.good:
            raise Failure(f"{sentence}; there is no {path} of update {self.good} to go back to, because the run began without "
                          "--co-guard rollback: start again with it and --resume never")
        alarms, rollbacks = self.alarms, self.rollbacks + 1
        if distributed.rank() == 0:
            print(f"warning: {sentence}; rollback {rollbacks} of at most {ROLLBACKS}, to update {self.good}: "
                  f"the images now come with noise of {rollbacks} x epsilon", flush=True)
            if (run.out_dir / GOOD_BEST).is_file():
                checkpoint.link(run.out_dir / GOOD_BEST, run.out_dir / "best.pth")  # a weight average may have become the best one since
        run._go_back(saved)
        self.alarms, self.rollbacks = alarms, rollbacks
        run._save()
