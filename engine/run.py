"""A training run: what a method's script calls, and everything that happens between two of its batches."""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import batchnorm, capture, checkpoint, data, distributed, networks, random_streams, record
from engine.config import Config, doubtful, numbers
from engine.device import chosen_device, clock, set_up
from engine.errors import Failure, Misuse
from engine.finite import Finite
from engine.guard import GOOD, GOOD_BEST, Guard
from engine.heldout import HeldOut
from engine.journal import Journal
from engine.kept import Kept
from engine.memory import Memory
from engine.schedule import MOMENTUM
from utils import moved

_GO_ON, _SAVE, _STOP = range(3)  # what `_wanted` answers: the most that any process wants
_BEFORE = "best-before.pth"  # what best.pth was, until state.pth knows of the new one


@dataclasses.dataclass
class Position:
    """Where a run is: whole epochs done, batches of this one done, updates of the classifier done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class Run:
    """One training run of one method. A script uses `model`, `batches`, `update`, `keep`, and `uniform`/`normal`.

    `batch` (in the epoch), `step` (updates of the classifier so far), `epoch` and `progress` (in [0, 1]) are to be read; all that
    a script may call is in docs/engine.md. What begins with an underscore is for the engine alone: the guard and captured steps use it too.

    Args:
        cfg: the method's configuration.
        updates_per_batch: how often the script updates the classifier for each batch (Free-AT: m).

    Raises:
        Misuse: what was asked for cannot be.
    """

    def __init__(self, cfg: Config, updates_per_batch: int = 1) -> None:
        self.cfg = cfg
        self.device = distributed.start(chosen_device(cfg.device))
        self.out_dir = Path(cfg.out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._lock = checkpoint.lock(self.out_dir) if distributed.rank() == 0 else None
        self._saved = self._find_saved()
        before = self._saved or {}
        self._source = record.continued(record.source(), before.get("source"))
        self._script = record.digest_of_script(type(cfg))
        if before.get("script", self._script) != self._script and distributed.rank() == 0:
            print(f"warning: {self.out_dir}/state.pth was saved by another version of this script, and the run goes on with this one; "
                  "--resume never starts it again from the beginning", file=sys.stderr)
        set_up(self.device, cfg.deterministic, same_sizes=cfg.SAME_SIZES)

        self._began = time.perf_counter()
        self._prepare_data()
        if before.get("data", self._identity) != self._identity:
            raise Misuse(f"--data-dir {cfg.data_dir}: {self.out_dir}/state.pth was saved with other training images of {cfg.dataset}: give the same, "
                         "or --resume never to start again, or another --out-dir")
        torch.manual_seed(cfg.seed)
        self._autocast = networks.autocast_dtype(cfg, self.device)
        self.network = networks.build(cfg, self.dataset, self.device, cfg.arch, cfg.width)
        self.average = copy.deepcopy(self.network) if cfg.ema else None
        machines = before.get("machines", [])
        if machines and machines[-1]["precision"] != self.precision:
            raise Misuse(f"{self.out_dir}/state.pth was trained in {machines[-1]['precision']}, and here it would go on in {self.precision}: "
                         "give --precision, or --resume never to start again, or another --out-dir")
        here = record.provenance(self.device, self.precision, self._source)
        machine = {"device": here["device"], "torch": here["versions"]["torch"], "precision": self.precision, "processes": distributed.world_size()}
        self._machines = [*(one for one in machines if one != machine), machine]
        self.model = networks.seen_by_scripts(self.network, cfg, self._autocast)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=cfg.lr, momentum=0.9, weight_decay=cfg.weight_decay, fused=True)

        self._position = Position()
        self._inside, self._away = False, False  # in a captured step; the weights moved
        self._updates_per_batch, self._updates_per_epoch = updates_per_batch, len(self._data) * updates_per_batch
        self.total = cfg.epochs * self._updates_per_epoch
        self._schedule = cfg.schedule()
        self._kept = Kept()
        self._generator = torch.Generator(self.device)
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in ("loss", "correct", "seen")}
        self._guard = Guard(cfg.co_guard, self._held_out.columns)
        self._journal = Journal(cfg, self._held_out)
        self._captures = cfg.compile and capture.possible(self.device) and distributed.world_size() == 1
        self._finite = Finite(cfg.on_nonfinite == "skip", self._updates_per_epoch, self.device,
                              deferred=self.device.type == "cuda" or self._captures, last_save=self.out_dir / "state.pth")
        self._steps: list[capture.Captured] = []
        if self._captures:
            self._graph = capture.Graph(self.device, [self._generator])
            self._rates = capture.Rates(map(self._rates_of, range(self.total)), self.device)
            self._steady: dict[int, list[Tensor]] = {}
        self._seconds = {"training": 0.0, "compilation": 0.0, "evaluation": 0.0, "saving": 0.0, "preparation": time.perf_counter() - self._began}
        self._asked_to_stop = False
        self.keep(classifier=self.network, optimizer=self.optimizer, **({"average": self.average} if cfg.ema else {}))

    @property
    def batch(self) -> int:
        """The batch's number in the epoch."""
        return self._outside("batch")

    @property
    def step(self) -> int:
        """How many updates of the classifier are done."""
        return self._outside("step")

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._outside("epoch")

    @property
    def progress(self) -> float:
        """The fraction of the run's classifier updates that is done, in [0, 1]."""
        return self.step / self.total

    @property
    def classes(self) -> int:
        return self.dataset.classes

    @property
    def channels(self) -> int:
        return self.dataset.channels

    @property
    def precision(self) -> str:
        """What the network trains in: bf16, fp32, or fp64 where that is torch's default."""
        return "bf16" if self._autocast else str(torch.get_default_dtype()).removeprefix("torch.").replace("float", "fp")

    @property
    def lr(self) -> float:
        """The learning rate of the classifier's next update."""
        return self._rates_of(self.step)[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.dataset.image_size, self.dataset.image_size

    # ---- what a script calls -------------------------------------------------------------------------------------

    def keep(self, **objects: Any) -> None:
        """Networks, optimizers and tensors that outlive a batch: saved, and restored by `batches`; networks are moved to the device.

        Networks and tensors begin as those of the first process, and the networks' BatchNorm is as --batchnorm says.
        A tensor must already lie on `run.device` and be updated in place; one that the script rebinds, so that the
        engine would save a forgotten copy, ends the run at the next save.
        """
        for name, kept in objects.items():
            if isinstance(kept, nn.Module):
                kept.to(self.device, memory_format=torch.channels_last)
                if self.cfg.batchnorm == "global" and distributed.world_size() > 1:
                    batchnorm.make_global(kept)
            if isinstance(kept, torch.optim.Optimizer) and self._captures:
                capture.make_recordable(kept)
            if isinstance(kept, nn.Module | Tensor):
                distributed.broadcast(list(kept.state_dict().values()) if isinstance(kept, nn.Module) else [kept])
            self._kept[name] = kept

    def classifier(self, arch: str, width: int | None = None) -> networks.Classifier:
        """Another network for this data set in training mode, like `run.model`: by its name and width in `models`.

        Raises:
            Misuse: there is none of that name for such images.
        """
        return networks.seen_by_scripts(networks.build(self.cfg, self.dataset, self.device, arch, width), self.cfg, self._autocast)

    def memory(self, name: str, *, per_image: bool = True, scale: float = 1.0, aligned: bool = False) -> Memory:
        """A kept memory of x's shape for every training image, read and written with the batch's `index`.

        One per image is half precision where the network runs in bf16.

        Args:
            per_image: False: for every position in the global batch instead, to be read with `run.positions`.
            scale: see `Memory`.
            aligned: remember in the image's own pixels: what was written is moved along with the crop and the flip.

        Raises:
            Misuse: it does not fit the device, or the images are streamed.
        """
        if aligned and self.dataset.streamed:
            raise Misuse(f"--dataset {self.cfg.dataset}: a memory cannot be aligned with images that are streamed")
        memory = Memory(
            self._data.n if per_image else self.cfg.batch_size, self.shape, scale=scale, device=self.device,
            dtype=torch.half if per_image and self._autocast else torch.get_default_dtype(), gather=lambda part: distributed.gathered(part, self._global_batch),
            **({"places": lambda: self._data.places, "pad": self._data.pad} if aligned else {}))
        self.keep(**{name: memory.values})
        return memory

    @property
    def share(self) -> float:
        """This process's part of the global batch's images, in [0, 1]; 1 on one process.

        A gradient of the mean loss over this process's images times this is that of the mean over the global batch.
        """
        return len(self._labels) / self._global_batch

    def gathered(self, part: Tensor) -> Tensor:
        """(B, ...) of this process's images to that of the global batch's, on every process; `part` itself on one process.

        For what couples the images of a batch: a norm over it, a normalisation, a reward. What is made of it is the same on all
        processes, and may stand in the loss: gradients flow, also twice. Every process must call it, in the same order. Its own
        images are at `positions`.
        """
        return distributed.gathered(part, self._global_batch)

    @property
    def positions(self) -> Tensor:
        """Where this process's images stand in the global batch, (B,)."""
        part = distributed.shard(self._global_batch)
        return torch.arange(part.start, part.stop, device=self.device)

    def captured(self, step: Callable[..., None]) -> capture.Captured:
        """Decorates the part of a method's loop that is the same in every batch: with --compile on one GPU it is recorded and replayed.

        It is called with the batch's tensors and with whatever it needs of `batch`, `step`, `epoch`, `progress` and `lr`, which
        it must not read itself: floats arrive as tensors where it is recorded, anything else makes another recording.

        Raises:
            Failure: called, where the step does what cannot be recorded: it returns something, reads the position, takes tensors that
                are not the batch's, or rebinds one that is kept.
        """
        self._steps.append(capture.Captured(step, self))
        return self._steps[-1]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields x (B, C, H, W) in [0, 1], y (B,) and the images' index (B,) until training is over.

        Between two batches it saves when it is time to; after an epoch it evaluates, logs and saves; after the last
        one it writes result.json.

        Raises:
            Misuse: the saved run is another version's.
            Failure: an update was not finite, a streamed image is damaged, or the guard ends the run.
            SystemExit: 0, saved, at --time-limit or after SIGTERM.
        """
        fresh = self._saved is None
        self._restore()
        limit = self.cfg.time_limit
        self._deadline = float("inf") if limit is None else self._began + 60 * limit
        self._last_save = time.perf_counter()
        self._buffers = self._kept.buffers()
        self._finite.watch(self._kept.buffers(without="average"))
        main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._ask_to_stop) if main_thread else None
        try:
            unfinished = self.epoch < self.cfg.epochs or not (self.out_dir / "result.json").is_file()
            if distributed.maximum(int(unfinished), self.device):  # the first process may write it while another one looks
                self._write_config(fresh)
                if distributed.rank() == 0:
                    here = self._machines[-1]
                    print(f"{self.cfg.METHOD}: {self.cfg.arch} on {self.cfg.dataset}, epsilon {self.cfg.epsilon:g}/255, in {here['precision']} on {here['device']}, "
                          f"torch {here['torch']}", flush=True)
                    for sentence in doubtful(self.cfg.epsilon):
                        print(f"warning: {sentence}", flush=True)
                self._guard.begin(self, fresh)
                while self.epoch < self.cfg.epochs:
                    yield from self._epoch()
                    if self.batch == len(self._data):  # not where the guard put the run back
                        self._end_of_epoch()
                self._finish()
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, before)
            if self._lock is not None:
                self._lock.close()

    def _find_saved(self) -> dict[str, Any] | None:
        """The saved run that this one goes on with, the same on every process, or None.

        Raises:
            Misuse: it is of another configuration.
            Failure: not all processes find the same.
        """
        saved = checkpoint.find(self.out_dir / "state.pth", self.cfg)
        somewhere = distributed.maximum(int(saved is not None), self.device)  # every process must ask
        if somewhere and saved is None:
            raise Failure(f"process {distributed.rank()} does not find {self.out_dir}/state.pth, from which another one continues: "
                          "--out-dir must lie where all machines see it")
        if not distributed.agree(repr((saved or {}).get("position")).encode(), self.device):
            raise Failure(f"process {distributed.rank()}: not all processes find the same {self.out_dir}/state.pth: start again when all machines see the newest")
        return saved

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer | None = None, *, logits: Tensor | None = None,
               max_norm: float | None = None, leaf: Tensor | None = None) -> None:
        """One descent step of `optimizer` (the classifier's when not given) on `loss`, the mean over this process's batch.

        Only gradients of that optimizer's parameters are computed, and averaged over processes by their batches' sizes.
        A loss or a gradient that is not finite never reaches the weights: that update is skipped, and the run ends at the
        next reading, or with --on-nonfinite skip goes on.

        Args:
            logits: (B, classes), of which the training accuracy in the log is taken.
            max_norm: the gradient's largest L2 norm over all parameters, to which it is scaled down, 0 for none; the classifier's is --max-grad-norm where not given.
            leaf: a tensor, the perturbed images say, in whose `.grad` the same backward pass leaves its gradient.

        Raises:
            Failure: the loss or a gradient is not finite; on a GPU `batches` raises it, at the next reading.
        """
        main = optimizer is None or optimizer is self.optimizer
        optimizer = self.optimizer if main else optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.zero_grad()
        if leaf is not None:
            leaf.grad = None
        loss.backward(inputs=parameters if leaf is None else [*parameters, leaf])
        value = loss.detach().to(torch.float64, copy=True)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.averaged([*gradients, value])
        if main and max_norm is None:
            max_norm = self.cfg.max_grad_norm
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        with self._finite.admitting(value, parameters, optimizer, step=self._rates.at if self._captures else self._position.step) as made:
            if main and self._inside and self._captures:
                self._rates.set(optimizer, made)
            elif main:
                self._set_rates(self._position.step)
            optimizer.step()
        distributed.broadcast(self._buffers)  # BatchNorm's averages: those of the first process's images
        if not main:
            return
        self._position.step += 1
        if self._captures:
            self._rates.at.add_(1)
        self._follow()
        self._sums["loss"] += torch.where(made, value, 0.0) * self._global_batch
        self._sums["seen"] += made * self._global_batch
        if logits is not None:
            correct = (logits.detach().argmax(1) == self._labels).sum().double()
            distributed.all_reduce([correct])
            self._sums["correct"] += made * correct

    @contextmanager
    def moved(self, weights: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
        """Perturbs the network's weights by `moves` inside the block, in which `update` is called once, and subtracts the moves afterwards.

        The weight average takes in what they are then.
        """
        self._away = True
        try:
            with moved(weights, moves):
                yield
        finally:
            self._away = False
        self._follow()

    def uniform(self, x: Tensor) -> Tensor:
        """Noise U(-1, 1) like x (B, ...): a function of (seed, batch of the run, position in the global batch)."""
        return self._noise(x, lambda noise: noise.uniform_(-1, 1, generator=self._generator))

    def normal(self, x: Tensor) -> Tensor:
        """Noise N(0, 1) like x (B, ...): a function of (seed, batch of the run, position in the global batch)."""
        return self._noise(x, lambda noise: noise.normal_(generator=self._generator))

    def averaged(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Averages gradients of this process's mean loss over the global batch, in place, and returns them; on one process they are that already."""
        if distributed.world_size() > 1:
            share = self.share
            torch._foreach_mul_(gradients, share) if share else torch._foreach_zero_(gradients)  # the mean over no images is nan
            distributed.all_reduce(gradients)
        return gradients

    def random(self, *size: int) -> Tensor:
        """Numbers U(0, 1) of that size, a function of (seed, batch of the run): the same in every process."""
        return torch.rand(size, generator=self._generator, device=self.device)

    # ---- one epoch ----------------------------------------------------------------------------------------------

    def _epoch(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self._data.epoch(self.epoch, self.batch, torch.get_default_dtype())
        bar = tqdm(total=len(self._data), initial=self.batch, desc=f"epoch {self.epoch + 1}/{self.cfg.epochs}", unit="batch",
                   leave=False, disable=not sys.stderr.isatty() or distributed.rank() > 0)
        began = time.perf_counter()
        for x, y, index in batches:
            self._global_batch = min(self.cfg.batch_size, self._data.n - self.batch * self.cfg.batch_size)
            random_streams.noise_generator(self._generator, self.cfg.seed, self.epoch * len(self._data) + self.batch)
            x = self._guard.noised(self, x)
            if self._captures:
                x, y, index = self._in_place(x, y, index)
            self._labels, before = y, self.step
            yield x, y, index
            if (updates := self.step - before) > self._updates_per_batch:
                raise Failure(f"the script updated the classifier {updates} times in a batch, and the schedule counts on {self._updates_per_batch}: "
                              f"say engine.Run(cfg, updates_per_batch={updates})")
            self._position.batch += 1
            bar.update()
            if self._guard.due(self):
                self._seconds["training"] += self._clock() - began
                if self._guard.look(self):
                    bar.close()
                    return
                began = time.perf_counter()
            if self.batch < len(self._data) and (wanted := self._wanted()):
                self._seconds["training"] += self._clock() - began
                self._save()
                if wanted == _STOP:
                    self._leave()
                began = time.perf_counter()
        bar.close()
        self._seconds["training"] += self._clock() - began

    def _wanted(self) -> int:
        """Whether it is time to save, or to save and stop; the same on all processes, though a signal reaches only one."""
        if distributed.world_size() > 1 and self.device.type == "cuda" and self.batch % 20:
            return _GO_ON  # asking makes a GPU wait
        now = time.perf_counter()
        wanted = (_STOP if self._asked_to_stop or now > self._deadline else
                  _SAVE if now > self._last_save + 60 * self.cfg.save_every else _GO_ON)
        return distributed.maximum(wanted, self.device)

    def _end_of_epoch(self) -> None:
        self._finite.read()
        sums = {name: value.item() for name, value in self._sums.items()}
        trained = self._seconds["training"]
        row: dict[str, Any] = {
            "epoch": self.epoch + 1, **dict(zip(("lr", "momentum"), self._rates_of(self.step - 1))),
            "loss": sums["loss"] / (sums["seen"] or math.nan), "train_accuracy": 100 * sums["correct"] / (sums["seen"] or math.nan),
            "images_per_second": self._data.n / (trained - (self._journal.rows[-1]["seconds"] if self._journal.rows else 0.0)), "seconds": trained,
        }
        row.update(self._accuracies(self.network))
        row["skipped_updates"] = int(self._finite.skipped)
        if self._guard.epoch_ended(self, row):
            return
        better = self._journal.add(row, self._accuracies(self.average) if self.average is not None else None)
        self._position = Position(self.epoch + 1, 0, self.step)
        for value in (*self._sums.values(), self._finite.skipped):
            value.zero_()
        if distributed.rank() == 0:
            self._journal.tell(better, self.out_dir)
            checkpoint.save(self._weights(self._journal.last_weights, row["epoch"]), self.out_dir / "last.pth")
            if better:
                if (self.out_dir / "best.pth").is_file():
                    checkpoint.link(self.out_dir / "best.pth", self.out_dir / _BEFORE)
                checkpoint.save(self._weights(row["weights"], row["epoch"]), self.out_dir / "best.pth")
            record.write_lines(self._journal.rows, self.out_dir / "log.jsonl")
        self._save()
        if self.epoch < self.cfg.epochs and self._wanted() == _STOP:
            self._leave()

    def _finish(self) -> None:
        """Writes result.json."""
        if distributed.rank() == 0 and self._journal.rows:
            checkpoints = self._journal.checkpoints()
            for name, found in checkpoints.items():
                found["sha256"] = checkpoint.digest(checkpoint.load(self.out_dir / f"{name}.pth")["state_dict"])
            record.write_json({
                "method": self.cfg.METHOD, "dataset": self.cfg.dataset, "arch": self.cfg.arch,
                "config": dataclasses.asdict(self.cfg), "seed": self.cfg.seed, **record.provenance(self.device, self.precision, self._source),
                "processes": distributed.world_size(), "seconds": self._seconds, "peak_memory_bytes": record.peak_memory(self.device),
                "images_per_second": self._data.n * self.cfg.epochs / self._seconds["training"], "updates": self.step,
                **({"earlier_machines": self._machines[:-1]} if self._machines[1:] else {}), "alarms": self._guard.alarms, "rollbacks": self._guard.rollbacks,
                "skipped_updates": sum(row.get("skipped_updates", 0) for row in self._journal.rows),
                "evaluation": self._held_out.settings(), "checkpoints": checkpoints,
            }, self.out_dir / "result.json")
            print(f"done: {self.out_dir}/best.pth (epoch {checkpoints['best']['epoch']}) and last.pth; "
                  f"evaluate with: python test_FGSM_SDI.py --model_path {self.out_dir}/best.pth --data-dir {self.cfg.data_dir}")
        distributed.barrier()

    # ---- what goes on inside ------------------------------------------------------------------------------------

    def _prepare_data(self) -> None:
        cfg = self.cfg
        with distributed.first_process_first():
            self.dataset = data.load(cfg.dataset, cfg.data_dir, cfg.image_size)
        if not distributed.agree(self.dataset.y_train.tobytes(), self.device):
            raise Failure(f"process {distributed.rank()}: the training images of {cfg.dataset} in {cfg.data_dir} are not as many, or not of the same classes, for all "
                          "processes: give all machines the same files")
        if self.dataset.streamed:
            from engine import stream  # which needs torchvision, and a second to import it
            if cfg.skip_damaged:
                self.dataset = stream.without_damaged(self.dataset, self.device)
        x, y, x_val, y_val = self.dataset.split(cfg.train_size, cfg.val_size)
        self._identity = {"n": len(y), "labels": hashlib.sha256(y.tobytes()).hexdigest()}  # what a resumed run must find again
        if cfg.select_on == "test":
            x_val, y_val = self.dataset.x_test, self.dataset.y_test
        splits = {cfg.select_on: (x_val, y_val), "train": (x[:cfg.measure_train], y[:cfg.measure_train])}
        self._held_out = HeldOut(cfg, self.dataset, splits, self.device)
        crop = cfg.augment == "crop"
        shared = dict(batch_size=cfg.batch_size, seed=cfg.seed, device=self.device, shard=distributed.shard)
        if self.dataset.streamed:
            self._data = stream.Batches(x, y, size=self.dataset.image_size, augment=crop, workers=cfg.workers, decode=cfg.decode, **shared)
        else:
            self._data = data.Batches(
                x, y, pad=self.dataset.pad if crop else 0, flip=self.dataset.flip and crop, padding=cfg.padding, **shared)

    def _noise(self, x: Tensor, fill) -> Tensor:
        noise = torch.empty((self._global_batch, *x.shape[1:]), dtype=x.dtype, device=x.device)
        return fill(noise)[distributed.shard(self._global_batch)]

    def _follow(self) -> None:
        """The weight average, one update on; later where the weights are away."""
        if self.average is not None and not self._away:
            networks.follow(self.average, self.network, self.cfg.ema)

    def _rates_of(self, step: int) -> tuple[float, float]:
        """Learning rate and momentum of the classifier's update after `step` others."""
        rates = self._schedule(step, self.total, self._updates_per_epoch)
        return self.cfg.lr * rates.lr, rates.momentum if self.cfg.cycle_momentum else MOMENTUM

    def _set_rates(self, step: int) -> None:
        lr, momentum = self._rates_of(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum

    def _in_place(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """The batch at addresses that are the same for all batches of its size, and with it where its pixels come from."""
        batch += getattr(self._data, "places", ())
        if (size := len(batch[0])) not in self._steady:
            self._steady[size] = [tensor.clone() for tensor in batch]
        for steady, tensor in zip(self._steady[size], batch):
            steady.copy_(tensor)
        x, y, index, *places = self._steady[size]
        if places:
            self._data.places = tuple(places)
        return x, y, index

    def _outside(self, name: str) -> int:
        """A number of the position, unless a recorded step asks: it would keep the answer for ever."""
        if self._inside:
            raise Failure(f"a captured step reads run.{name} (or lr, or progress): give it what it needs of that as an argument")
        return getattr(self._position, name)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """In a captured step."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """What goes on inside is compilation, not training."""
        began = self._clock()
        yield
        spent = self._clock() - began
        self._seconds["compilation"] += spent
        self._seconds["training"] -= spent  # where it will be added with the rest

    def _replayed(self, updates: int) -> None:
        """So many updates of the classifier were made without Python."""
        self._position.step += updates
        self._set_rates(max(self.step - 1, 0))

    def _accuracies(self, network: nn.Module) -> dict[str, float]:
        with self._evaluating():
            return self._held_out.accuracies(network)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """What goes on inside is evaluation."""
        began = self._clock()
        yield
        self._seconds["evaluation"] += self._clock() - began

    def _weights(self, kind: str, epoch: int) -> dict[str, Any]:
        return checkpoint.weights(self.average if kind == "ema" else self.network, {
            "method": self.cfg.METHOD, "dataset": self.cfg.dataset, "arch": self.cfg.arch, "width": self.cfg.width,
            "classes": self.classes, "channels": self.channels, "image_size": self.dataset.image_size,
            "epsilon": float(self.cfg.epsilon), "epoch": epoch, "weights": kind, "seed": self.cfg.seed})

    def _save(self) -> None:
        self._finite.read()
        kept, began = self._kept.state(), time.perf_counter()
        if distributed.rank() == 0:
            cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            state = {
                "position": dataclasses.asdict(self._position),
                "kept": kept, "sums": self._sums, "history": self._journal.rows, "best": self._journal.best, "seconds": self._seconds,
                "rng": torch.get_rng_state(), "rng_cuda": cuda,
                "guard": self._guard.state(), "finite": self._finite.state(), "source": self._source, "script": self._script, "machines": self._machines, "data": self._identity,
                "config": {"method": self.cfg.METHOD, **dataclasses.asdict(self.cfg)},
            }
            if self.batch == 0 and self.cfg.snapshots and self.epoch in numbers("snapshots", self.cfg.snapshots):
                checkpoint.save(state, self.out_dir / f"state-{self.epoch}.pth")  # first: a run killed in between does this epoch again
            checkpoint.save(state, self.out_dir / "state.pth")
            (self.out_dir / _BEFORE).unlink(missing_ok=True)
        distributed.barrier()
        self._last_save = time.perf_counter()
        self._seconds["saving"] += self._last_save - began
        self._guard.saved(self)

    def _write_config(self, fresh: bool) -> None:
        """config.json; and what another run left here goes before a new one begins."""
        if distributed.rank() == 0:
            for name in ("state.pth", "state-*.pth", "result.json", "log.jsonl", "best.pth", "last.pth", "events.out.tfevents.*", _BEFORE, GOOD, GOOD_BEST) if fresh else ():
                for path in self.out_dir.glob(name):
                    path.unlink()
            record.write_json({"method": self.cfg.METHOD, **dataclasses.asdict(self.cfg)}, self.out_dir / "config.json")

    def _restore(self) -> None:
        """Takes up the rest of a saved run, now that everything has been kept."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        self._kept.restore(saved["kept"], self.out_dir / "state.pth")
        self._position, self._seconds = Position(**saved["position"]), self._seconds | saved["seconds"]
        self._journal.rows, self._journal.best = saved["history"], saved["best"]
        if distributed.rank() == 0:
            self._put_best_back()
        for name, value in self._sums.items():
            value.copy_(saved["sums"][name])
        for step in self._steps:
            step.forget()
        if self._captures:
            self._graph = capture.Graph(self.device, [self._generator])  # the memory of recordings that are gone may not be recorded into again
            self._rates.at.fill_(self.step)
        self._guard.load(saved["guard"])
        self._finite.load(saved["finite"])
        self._finite.remember()
        torch.set_rng_state(saved["rng"])
        if saved["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng_cuda"], self.device)
        if distributed.rank() == 0:
            print(f"continuing {self.out_dir} at epoch {self.epoch + 1}, batch {self.batch}" if self.epoch < self.cfg.epochs
                  else f"{self.out_dir} is finished; --resume never trains it again")

    def _put_best_back(self) -> None:
        """After a kill between best.pth and state.pth: the epoch is done again, and may end as another one."""
        best, before = self.out_dir / "best.pth", self.out_dir / _BEFORE
        if not self._journal.rows:
            best.unlink(missing_ok=True)
        elif before.is_file() and checkpoint.load(best)["epoch"] != self._journal.best["epoch"]:
            os.replace(before, best)
        before.unlink(missing_ok=True)

    def _go_back(self, saved: dict[str, Any]) -> None:
        """Takes up an earlier state of this run; the training since then counts as rolled back."""
        seconds, self._saved = dict(self._seconds), saved
        self._restore()
        lost = seconds["training"] - self._seconds["training"]
        self._seconds = seconds | {"training": self._seconds["training"], "rolled_back": seconds.get("rolled_back", 0.0) + lost}

    def _clock(self) -> float:
        return clock(self.device)

    def _ask_to_stop(self, *_: Any) -> None:
        self._asked_to_stop = True

    def _leave(self) -> None:
        if distributed.rank() == 0:
            print(f"saved {self.out_dir}/state.pth at epoch {self.epoch + 1}, batch {self.batch}; run the same command again to continue")
        distributed.barrier()
        raise SystemExit(0)
