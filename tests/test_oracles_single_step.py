"""The single-step methods replayed, in float64, by slow loops that were written without looking at the scripts.

Each oracle below is one reading of a method's paper and of the code published with it: perturbations pixel by pixel in Python
numbers, losses sample by sample, torch's own SGD, schedules in closed form, and the same network with BatchNorm put into its
mode by hand before every pass. A whole run of the script is recorded (first weights, batches, noise) and the oracle has to
arrive at the same weights and BatchNorm buffers after every update, and at the same memories in the end. An oracle that is
made wrong on purpose has to miss them.
"""

import copy
import functools
import importlib
import itertools
import math
import tempfile

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import engine
import train_fgsm_bp
import train_fgsm_ckpt
import train_fgsm_ep
import train_fgsm_mep
import train_free_at
import train_gat
import train_gradsum
import train_n_fgsm
import train_nuat
import train_vfsat
from engine import data, distributed, memory
from engine.memory import Memory
from tests.conftest import doubles

pytestmark = pytest.mark.usefixtures("float64")

SAME = 1e-9  # relative, over a whole run: rounding that a few updates have multiplied
DIFFERENT = 1e-6
EXACT = {"rtol": 0, "atol": 1e-12}
CLASSES = 10


# ---- a run and what is remembered of it ---------------------------------------------------------------------------------


class Watched(engine.Run):
    """A run that keeps its first network, every batch with its noise, and the weights after every update."""

    prepare, half = None, False

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        type(self).latest = self
        if self.prepare:
            self.prepare(self.network, self.cfg)
        self.first = copy.deepcopy(self.network)
        self.seen, self.states, self.losses, self.memories = [], [], [], {}

    def batches(self):
        for x, y, index in super().batches():
            self.seen.append(Batch(self.epoch, self.batch, x, y, index, self.positions))
            yield x, y, index

    def uniform(self, x):
        return self._noted(super().uniform(x))

    def normal(self, x):
        return self._noted(super().normal(x))

    def random(self, *size):
        return self._noted(super().random(*size))

    def _noted(self, noise):
        self.seen[-1].noise.append(noise.clone())
        return noise

    def memory(self, name, **options):
        kept = self.memories[name] = super().memory(name, **options)
        if self.half:  # as on a GPU with bf16
            kept.values = kept.values.half()
            self.keep(**{name: kept.values})
        return kept

    def update(self, loss, *arguments, **keywords):
        super().update(loss, *arguments, **keywords)
        self.losses.append(float(loss.detach()))
        self.states.append({name: value.clone() for name, value in self.network.state_dict().items()})

    def remembered(self, name):
        """The true values of a memory in the end, (rows, C, H, W), also where it is aligned with the images."""
        kept = self.memories[name]
        values = kept.values.double() / kept.scale
        return values.permute(0, 3, 1, 2) if kept.places else values


class Batch:
    def __init__(self, epoch, number, x, y, index, positions):
        self.epoch, self.number, self.noise = epoch, number, []
        self.x, self.y, self.index = x.clone(memory_format=torch.contiguous_format), y.clone(), index.clone()
        self.positions = positions


def warmed(network, cfg):
    """A network that knows some of the images: an untrained one classifies next to nothing as it should."""
    digits = data.load("digits", "")
    x, y = data.to_images(torch.from_numpy(digits.x_train[:64]), torch.float64), torch.from_numpy(digits.y_train[:64])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(16):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()
    with torch.no_grad():  # a probability of 1 up to rounding would leave a gradient that is nothing but rounding
        network.linear.weight *= 0.4
        network.linear.bias *= 0.4


def loud(network, cfg):
    """Logits so large that the gradient's norm passes any bound."""
    with torch.no_grad():
        network.linear.weight *= 40


@functools.cache
def record(script, *, prepare=None, half=False, **options):
    """A run of a script's `main` on a few digits; three batches an epoch unless the options say otherwise, the last one short."""
    module = importlib.import_module(script)
    settings = dict(
        dataset="digits", width=4, epochs=3, batch_size=8, train_size=19, val_size=4, lr=0.02, lr_schedule="multistep", milestones="2",
        epsilon=24, augment="none", device="cpu", measure="pgd10", resume="never",
    ) | options  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch, doubles():
        watched = type("ThisRun", (Watched,), dict(prepare=prepare and staticmethod(prepare), half=half))
        patch.setattr(engine, "Run", watched)
        module.main(module.Config(out_dir=directory, **settings))
    return watched.latest


def gap(ours, theirs):
    """The largest difference, relative to the largest entry; whole numbers must be equal."""
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else math.inf
    largest = float((ours - theirs).abs().max())
    return math.inf if math.isnan(largest) else largest / max(float(theirs.abs().max()), 1e-6)


class Replay:
    """The same network from the same first weights, trained by an oracle and compared with the run after every update."""

    def __init__(self, run, replays=1):
        self.run, self.cfg = run, run.cfg
        self.network = copy.deepcopy(run.first).to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0, momentum=0.9, weight_decay=self.cfg.weight_decay)
        self.epochs = 1 + max(batch.epoch for batch in run.seen)
        self.total = replays * len(run.seen)
        self.step, self.gap, self.first_gap = 0, 0.0, ""

    def __call__(self, x, mode="train"):
        self.network.train(mode == "train")
        return self.network(x)

    def gradient(self, x, loss, mode="train"):
        """The gradient at x of a loss of the logits, and the logits, whose graph is kept."""
        x = x.detach().clone().requires_grad_()
        logits = self(x, mode)
        return torch.autograd.grad(loss(logits), x, retain_graph=True)[0], logits

    def descend(self, loss, max_norm=None):
        self.optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            clip_norm([p.grad for p in self.network.parameters()], max_norm)
        lr, momentum = rates(self.cfg, self.step / self.total, self.epochs)
        self.optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        self.optimizer.step()
        self.compare("the loss", loss.detach(), torch.tensor(self.run.losses[self.step]))
        for name, value in self.network.state_dict().items():
            self.compare(name, value, self.run.states[self.step][name])
        self.step += 1

    def compare(self, what, ours, theirs):
        found = gap(ours, theirs)
        if found > SAME and not self.first_gap:
            self.first_gap = f"update {self.step}, {what}: {found:.1e}"
        self.gap = max(self.gap, found)


def rates(cfg, done, epochs):
    """Learning rate and momentum when the part `done` of all updates is done."""
    if cfg.lr_schedule == "cyclic":
        height = 1 - abs(2 * done - 1)
        return cfg.lr * height, 0.9 - 0.1 * height
    return cfg.lr * 0.1 ** sum(done * epochs >= float(epoch) - 1e-9 for epoch in cfg.milestones.split(",")), 0.9


def clip_norm(gradients, most):
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    for g in gradients:
        g *= min(1, most / (norm + 1e-6))  # torch's tiny number, which is visible at this precision


# ---- the formulas, slowly -----------------------------------------------------------------------------------------------


def sign(value):
    return 1.0 if value > 0 else -1.0 if value < 0 else 0.0


def clip(value, low, high):
    return low if value < low else high if value > high else value


def into_image(value, pixel):
    return clip(value, -pixel, 1 - pixel)


def pixels(function, *tensors):
    """A tensor of function(pixel of the first, pixel of the second, ...), in Python numbers."""
    columns = [tensor.detach().contiguous().view(-1).tolist() for tensor in tensors]
    return torch.tensor([function(*row) for row in zip(*columns, strict=True)]).view(tensors[0].shape)


def stepped(start, gradient, x, eps, alpha):
    """P_01(P_eps(start + alpha sign(gradient)))."""
    return pixels(lambda s, g, p: into_image(clip(s + alpha * sign(g), -eps, eps), p), start, gradient, x)


def stepped_freely(start, gradient, x, eps, alpha):
    """The same without the image's limits, as a mistake."""
    return pixels(lambda s, g: clip(s + alpha * sign(g), -eps, eps), start, gradient)


def wanted(y, factor, classes=CLASSES):
    """`factor` on the true class, the rest shared evenly."""
    return torch.tensor([[factor if column == label else (1 - factor) / (classes - 1) for column in range(classes)] for label in y.tolist()])


def cross_entropy(logits, target):
    total = 0
    for z, q in zip(logits, target):
        z = z - z.max().detach()
        total = total - (q * (z - z.exp().sum().log())).sum()
    return total / len(logits)


def squared_distance(logits, others, over):
    """Of the logits: over "mean" also the classes' mean, over "sum" their sum; always the mean over the samples."""
    total = 0
    for z, w in zip(logits, others):
        total = total + sum((a - b) ** 2 for a, b in zip(z, w))
    return total / len(logits) / (logits.shape[1] if over == "mean" else 1)


def probabilities(z):
    z = (z - z.max().detach()).exp()
    return z / z.sum()


def moved_probabilities(logits, others):
    """Mean over the samples of the squared distance of their probabilities."""
    total = 0
    for z, w in zip(logits, others):
        total = total + ((probabilities(z) - probabilities(w)) ** 2).sum()
    return total / len(logits)


def nuclear(matrix):
    """The sum of the singular values; its gradient is the matrix's orthogonal factor."""
    u, _, v = torch.linalg.svd(matrix.detach(), full_matrices=False)
    return ((u @ v) * matrix).sum()


def first_class(logits):
    """The class of the largest logit, of the first one where several are."""
    return logits.index(max(logits))


# ---- one oracle for each method -----------------------------------------------------------------------------------------
# Each takes the replay and the mistake to make, and returns what else than the weights must be equal, by name.


def standard(replay, wrong=None):
    for batch in replay.run.seen:
        logits = replay(batch.x)
        factor = 1.0 if wrong == "hard labels" else replay.cfg.label_factor
        loss = cross_entropy(logits, wanted(batch.y, factor))
        replay.descend(loss * len(batch.y) / replay.cfg.batch_size if wrong == "short batch by the full size" else loss)
    return {}


def free_at(replay, wrong=None):
    cfg = replay.cfg
    eps = cfg.epsilon / 255
    delta = torch.zeros(cfg.batch_size, *replay.run.shape)
    for batch in replay.run.seen:
        n = len(batch.x)
        if wrong == "starts anew with every batch":
            delta.zero_()
        for _ in range(cfg.replays):
            target = wanted(batch.y, cfg.label_factor)
            point = batch.x + delta[:n]
            if wrong == "input clipped to the image":
                point = point.clamp(0, 1)
            gradient, logits = replay.gradient(point, lambda z: cross_entropy(z, target), "eval" if wrong == "evaluation mode" else "train")
            replay.descend(cross_entropy(logits, target))
            if wrong == "moved by the new weights":
                before = copy.deepcopy(replay.network.state_dict())
                gradient, _ = replay.gradient(point, lambda z: cross_entropy(z, target))
                replay.network.load_state_dict(before)
            step = stepped_freely if wrong == "no clip to the image" else stepped
            delta[:n] = step(delta[:n], gradient, batch.x, eps, eps)
    return {"carried": delta}


def ckpt(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    replay.ends = {}
    for batch in replay.run.seen:
        x, target = batch.x, wanted(batch.y, cfg.label_factor)
        eta = pixels(lambda u, p: into_image(eps * u, p), batch.noise[0], x)
        mode = "train" if wrong == "attack in training mode" else "eval"
        gradient, noisy = replay.gradient(x + eta, lambda z: cross_entropy(z, target), mode)
        delta = stepped(eta, gradient, x, eps, alpha)
        checked = noisy if (cfg.correct_at == "noisy") != (wrong == "correct at the other image") else replay(x, "eval")
        chosen = []
        for sample, label in enumerate(batch.y.tolist()):
            image, whole = x[sample:sample + 1], delta[sample:sample + 1]
            right = first_class(checked[sample].tolist()) == label
            part = 1.0 if right or wrong == "misclassified images attacked" else 0.0
            for j in range(1, cfg.c) if right else ():
                if first_class(replay(image + whole * (j / cfg.c), "eval")[0].tolist()) != label:
                    part = j / cfg.c
                    if wrong != "the last checkpoint":
                        break
            replay.ends[part] = replay.ends.get(part, 0) + 1
            chosen.append(whole * part)
        replay.descend(cross_entropy(replay(x + torch.cat(chosen)), target))
    return {}


def begun(noise, init, eps):
    return pixels(lambda u: {"corner": eps * sign(u), "uniform": eps * u, "zero": 0.0}[init], noise)


def pgi_loss(replay, logits, prior, target, wrong):
    cfg = replay.cfg
    if wrong == "prior's logits detached":
        prior = prior.detach()
    over = {"mean": "sum", "sum": "mean"}[cfg.reduction] if wrong == "other reduction" else cfg.reduction
    return cross_entropy(logits, target) + cfg.pgi_lambda * squared_distance(logits, prior, over)


def prior_pass(replay, x, eta, target, wrong):
    """The pass at x + eta: the gradient and the logits of which the regulariser needs the graph."""
    point = (x + eta).clamp(0, 1) if wrong == "input clipped to the image" else x + eta
    return replay.gradient(point, lambda z: cross_entropy(z, target), "eval" if wrong == "prior in evaluation mode" else "train")


def bp(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    previous = begun(replay.run.seen[0].noise[0], cfg.init, eps)
    for batch in replay.run.seen:
        n, target = len(batch.x), wanted(batch.y, cfg.label_factor)
        eta = previous[:n].clone()
        if wrong == "clipped to the image first":
            eta = pixels(into_image, eta, batch.x)
        gradient, prior = prior_pass(replay, batch.x, eta, target, wrong)
        delta = stepped(eta, gradient, batch.x, eps, alpha)
        replay.descend(pgi_loss(replay, replay(batch.x + delta), prior, target, wrong))
        if wrong != "never remembered":
            previous[:n] = delta
    return {"previous": previous}


class Canvas:
    """A memory for every image: in the crop's own pixels or, aligned, in those of the padded image."""

    def __init__(self, run, rounded):
        self.rounded = rounded or (lambda rows: rows)
        pad = 1 if run.cfg.align else 0
        channels, height, width = run.shape
        self.images = torch.from_numpy(data.load("digits", "").x_train[:run.cfg.train_size]).permute(0, 3, 1, 2) / 255
        self.images = F.pad(self.images.double(), [pad] * 4)
        self.values = torch.zeros(len(self.images), channels, height + 2 * pad, width + 2 * pad)
        self.pad = pad

    def place(self, image, crop):
        """Where a crop was taken, found by looking: no digit is like itself when it is shifted."""
        side = crop.shape[-1]
        found = [
            (top, left) for top, left in itertools.product(range(2 * self.pad + 1), repeat=2)
            if not self.pad or torch.allclose(self.images[image][:, top:top + side, left:left + side], crop)
        ]  # fmt: skip
        (top, left), = found
        return slice(top, top + side), slice(left, left + side)

    def read(self, batch):
        return torch.stack([self.values[(i, slice(None), *self.place(i, crop))] for i, crop in zip(batch.index.tolist(), batch.x)])

    def write(self, batch, rows):
        for i, crop, row in zip(batch.index.tolist(), batch.x, self.rounded(rows)):
            self.values[(i, slice(None), *self.place(i, crop))] = row


def in_half(scale):
    """To half precision and back, made larger for that, as a momentum of 1e-6 would lose its digits."""
    return lambda rows: (rows * scale).half().double() / scale


def into_ball(eta, eps):
    """Out of which rounding may have led."""
    return pixels(lambda value: clip(value, -eps, eps), eta)


def begins_anew(cfg, epoch, wrong):
    if epoch == 0 or not cfg.reset or wrong == "never reset":
        return epoch == 0
    return epoch % cfg.reset == (1 if wrong == "reset an epoch late" else 0)


def ep(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    previous = Canvas(replay.run, in_half(1) if replay.run.half else None)
    if wrong == "not moved along with the crop":
        previous.place = lambda image, crop: (slice(0, crop.shape[1]), slice(0, crop.shape[2]))
    for batch in replay.run.seen:
        target = wanted(batch.y, cfg.label_factor)
        if begins_anew(cfg, batch.epoch, wrong):
            if batch.number == 0:
                previous.values.zero_()
            eta = begun(batch.noise[0], cfg.init, eps) if batch.noise else torch.zeros_like(batch.x)
        else:
            eta = previous.read(batch) if wrong == "start not clipped again" else into_ball(previous.read(batch), eps)
        gradient, prior = prior_pass(replay, batch.x, eta, target, wrong)
        delta = stepped(eta, gradient, batch.x, eps, alpha)
        replay.descend(pgi_loss(replay, replay(batch.x + delta), prior, target, wrong))
        previous.write(batch, eta if wrong == "remembers where it began" else delta)
    return {"previous": previous.values}


def gathered(gradient, past, mu, accumulate, wrong=None):
    """The new momentum."""
    if accumulate == "sign":
        return pixels(lambda g, m: sign(g) + mu * m, gradient, past)
    if wrong == "norm of each image":
        norms = [sum(abs(g) for g in image) for image in gradient.flatten(1).tolist()]
    else:
        norms = [sum(abs(g) for g in gradient.flatten().tolist())] * len(gradient)
    return torch.stack([pixels(lambda g, m, norm=norm: g / norm + mu * m, *rows) for *rows, norm in zip(gradient, past, norms)])


def mep(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    rounding = [in_half(1), in_half(1 if cfg.accumulate == "sign" else 2**18)] if replay.run.half else [None, None]
    prior, momenta = (Canvas(replay.run, rounded) for rounded in rounding)
    for batch in replay.run.seen:
        x, target = batch.x, wanted(batch.y, cfg.label_factor)
        if begins_anew(cfg, batch.epoch, wrong):
            if batch.number == 0:
                prior.values.zero_()
                momenta.values.zero_()
            eta = begun(batch.noise[0], cfg.init, eps) if batch.noise else torch.zeros_like(x)
            momentum = torch.zeros_like(x)
        else:
            eta, momentum = into_ball(prior.read(batch), eps), momenta.read(batch)
        gradient, logits = prior_pass(replay, x, eta, target, wrong)
        momentum = gathered(gradient, momentum, 1.0 if wrong == "no decay" else cfg.mu, cfg.accumulate, wrong)
        delta = stepped(eta, gradient, x, eps, alpha)
        trained_on = stepped(eta, momentum, x, eps, alpha) if wrong == "trained on the next start" else delta
        replay.descend(pgi_loss(replay, replay(x + trained_on), logits, target, wrong))
        prior.write(batch, delta if wrong == "momentum never used" else stepped(eta, momentum, x, eps, alpha))
        momenta.write(batch, momentum)
    return {"prior": prior.values, "momenta": momenta.values}


def cycle(cfg):
    """The epochs' radii, in 255ths."""
    if cfg.radii:
        return [float(radius) for radius in cfg.radii.split(",")]
    if cfg.epsilon == 16:
        return [2, 4, 6, 8, 10, 12, 14, 16, 16, 16, 16, 16]
    return [radius * cfg.epsilon / 8 for radius in (2, 4, 6, 8, 8, 8, 8, 8)]


def vfsat(replay, wrong=None):
    cfg = replay.cfg
    for batch in replay.run.seen:
        target, radii = wanted(batch.y, cfg.label_factor), cycle(cfg)
        number = batch.epoch + (1 if wrong == "a radius ahead" else 0)
        eps = (cfg.epsilon if wrong == "the full radius" else radii[number % len(radii)]) / 255
        gradient, _ = replay.gradient(batch.x, lambda z: cross_entropy(z, target), "eval" if wrong == "attack in evaluation mode" else "train")
        step = stepped_freely if wrong == "no clip to the image" else stepped
        delta = step(torch.zeros_like(batch.x), gradient, batch.x, eps, eps)
        replay.descend(cross_entropy(replay(batch.x + delta), target), max_norm=None if wrong == "norm not bounded" else 20)
    return {}


def gradsum(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    for batch in replay.run.seen:
        x, target = batch.x, wanted(batch.y, cfg.label_factor)
        gradient, _ = replay.gradient(x, lambda z: cross_entropy(z, target))
        delta = stepped(torch.zeros_like(x), gradient, x, eps, alpha)
        loss = cross_entropy(replay(x + delta), target)
        eta = pixels(lambda u: u * eps if wrong == "noise not rounded" else round(u * eps * 255) / 255, batch.noise[0])
        point = (x + (pixels(into_image, eta, x) if wrong == "noise clipped to the image" else eta)).requires_grad_()
        slope, = torch.autograd.grad(cross_entropy(replay(point), target), point, create_graph=wrong != "first derivative only")
        if wrong == "norm of each image":
            penalty = sum((image**2).sum().sqrt() for image in slope) / len(slope)
        else:
            penalty = sum((image**2).sum() for image in slope).sqrt()
        replay.descend(loss + cfg.gradsum_lambda * penalty, max_norm=None if wrong == "norm not bounded" else 20)
    return {}


def n_fgsm(replay, wrong=None):
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    for batch in replay.run.seen:
        x, target = batch.x, wanted(batch.y, cfg.label_factor)
        eta = pixels(lambda u, p: cfg.k * eps * u if wrong == "noise not clipped" else into_image(cfg.k * eps * u, p), batch.noise[0], x)
        gradient, _ = replay.gradient(x + eta, lambda z: cross_entropy(z, target), "eval" if wrong == "attack in evaluation mode" else "train")
        radius = eps if wrong == "clipped to the ball" else math.inf
        delta = stepped(eta, gradient, x, radius, alpha)
        replay.descend(cross_entropy(replay(x + delta), target))
    return {}


def guided(replay, wrong, distance, weight):
    """NuAT and GAT: `distance` of (logits, clean logits) and its `weight` in an epoch."""
    cfg = replay.cfg
    eps, alpha = cfg.epsilon / 255, cfg.alpha / 255
    for batch in replay.run.seen:
        x, target, factor = batch.x, wanted(batch.y, cfg.label_factor), weight(batch.epoch)
        if wrong != "no clean pass first":
            clean = replay(x).detach()
        if wrong in ("guide in evaluation mode", "no clean pass first"):
            clean = replay(x, "eval").detach()
        start = pixels(lambda u, p: clip(p + eps / 2 * sign(u), 0, 1) - p, batch.noise[0], x)
        odd = (batch.number + (wrong == "other parity")) % 2 == 1
        if wrong == "parity over the epochs":
            odd = replay.step % 2 == 1
        gradient, _ = replay.gradient(
            x + start, lambda z: cross_entropy(z, target) + (factor * distance(z, clean) if odd else 0),
            "train" if wrong == "attack in training mode" else "eval",
        )  # fmt: skip
        step = stepped_freely if wrong == "no clip to the image" else stepped
        delta = step(start, gradient, x, eps, alpha)
        moved = replay(x + delta)
        logits = replay(x)
        trained = moved if wrong == "cross-entropy of the attacked" else logits
        replay.descend(cross_entropy(trained, target) + factor * distance(moved, logits))
    return {}


def nuat(replay, wrong=None):
    cfg = replay.cfg

    def distance(logits, others):
        size = len(logits) if wrong == "short batch by its own size" else cfg.batch_size
        return nuclear(logits - others) / size

    def weight(epoch):
        return cfg.nuclear if wrong == "no ramp" else cfg.nuclear * min(1, epoch / (0.9 * cfg.epochs))

    return guided(replay, wrong, distance, weight)


def gat(replay, wrong=None):
    cfg = replay.cfg

    def distance(logits, others):
        return ((logits - others) ** 2).sum(1).mean() if wrong == "distance of the logits" else moved_probabilities(logits, others)

    def weight(epoch):
        late = epoch >= cfg.epochs * 6 / 7 and wrong != "never late"
        return cfg.guidance * (cfg.late_factor if late else 1)

    return guided(replay, wrong, distance, weight)


# ---- whole runs ---------------------------------------------------------------------------------------------------------

CROP = dict(augment="crop", epochs=4)
RUNS = {
    "standard": (standard, "train_standard", dict(label_factor=0.8)),
    "standard, hard labels": (standard, "train_standard", dict()),
    "standard, cyclic": (standard, "train_standard", dict(label_factor=0.8, lr_schedule="cyclic")),
    "free-at": (free_at, "train_free_at", dict(replays=3, epochs=2, lr=0.01, lr_schedule="cyclic")),
    "free-at, soft labels": (free_at, "train_free_at", dict(replays=2, epochs=2, label_factor=0.7, milestones="1")),
    "free-at, m 1": (free_at, "train_free_at", dict(replays=1)),
    "free-at, epochs divided": (free_at, "train_free_at", dict(replays=2, epochs=3, divide_epochs=True, lr=0.01, lr_schedule="cyclic")),
    **{f"ckpt, c {c}, {at}": (ckpt, "train_fgsm_ckpt", dict(c=c, correct_at=at, epsilon=60, prepare=warmed))
       for c, at in [(3, "noisy"), (3, "clean"), (1, "noisy"), (2, "clean"), (4, "noisy")]},
    "ckpt, soft labels": (ckpt, "train_fgsm_ckpt", dict(label_factor=0.7, alpha=20, epsilon=40, prepare=warmed)),
    **{f"bp, {init}, {reduction}": (bp, "train_fgsm_bp", dict(init=init, reduction=reduction))
       for init, reduction in [("corner", "mean"), ("uniform", "sum"), ("zero", "mean")]},
    "bp, other numbers": (bp, "train_fgsm_bp", dict(alpha=16, pgi_lambda=3.0, label_factor=0.9, augment="crop", lr_schedule="cyclic")),
    **{f"ep, {init}, {reduction}": (ep, "train_fgsm_ep", dict(init=init, reduction=reduction))
       for init, reduction in [("corner", "mean"), ("uniform", "sum"), ("zero", "mean")]},
    "ep, reset": (ep, "train_fgsm_ep", dict(reset=2, init="uniform", epochs=4)),
    "ep, never reset": (ep, "train_fgsm_ep", dict(reset=0, alpha=16)),
    "ep, crop": (ep, "train_fgsm_ep", CROP),
    "ep, crop, aligned": (ep, "train_fgsm_ep", CROP | dict(align=True)),
    "ep, crop, aligned, reset": (ep, "train_fgsm_ep", CROP | dict(align=True, reset=2, epochs=5)),
    **{f"mep, {init}, {reduction}, {accumulate}": (mep, "train_fgsm_mep", dict(init=init, reduction=reduction, accumulate=accumulate))
       for init, reduction, accumulate in [("corner", "mean", "normalised"), ("uniform", "sum", "sign"), ("zero", "mean", "normalised")]},
    "mep, reset": (mep, "train_fgsm_mep", dict(reset=3, mu=0.8, epochs=5)),
    "mep, never reset": (mep, "train_fgsm_mep", dict(reset=0, alpha=16, mu=0.8, epochs=4)),
    "mep, crop": (mep, "train_fgsm_mep", CROP | dict(mu=0.8)),
    "mep, crop, aligned": (mep, "train_fgsm_mep", CROP | dict(mu=0.8, align=True)),
    "mep, crop, aligned, reset": (mep, "train_fgsm_mep", CROP | dict(mu=0.8, align=True, reset=2, epochs=5)),
    "ep, half": (ep, "train_fgsm_ep", dict(half=True, epsilon=26)),
    "mep, half": (mep, "train_fgsm_mep", dict(half=True, epsilon=26, epochs=4, mu=0.8)),
    "mep, half, signs": (mep, "train_fgsm_mep", dict(half=True, epsilon=26, epochs=4, mu=0.8, accumulate="sign")),
    "vfsat": (vfsat, "train_vfsat", dict(epochs=4)),
    "vfsat, 8": (vfsat, "train_vfsat", dict(epsilon=8, epochs=10, train_size=11)),
    "vfsat, 16": (vfsat, "train_vfsat", dict(epsilon=16, epochs=14, train_size=5)),
    "vfsat, own radii, loud": (vfsat, "train_vfsat", dict(radii="5,30,1", epochs=5, lr=0.001, prepare=loud, label_factor=0.8)),
    "gradsum": (gradsum, "train_gradsum", dict()),
    "gradsum, other numbers": (gradsum, "train_gradsum", dict(alpha=16, gradsum_lambda=2.0, label_factor=0.8, augment="crop")),
    "gradsum, loud": (gradsum, "train_gradsum", dict(lr=0.001, prepare=loud, epochs=2, milestones="1")),
    "n-fgsm": (n_fgsm, "train_n_fgsm", dict()),
    "n-fgsm, other numbers": (n_fgsm, "train_n_fgsm", dict(k=3.0, alpha=10, label_factor=0.8, augment="crop", lr_schedule="cyclic")),
    "nuat": (nuat, "train_nuat", dict(epochs=4)),
    "nuat, 8": (nuat, "train_nuat", dict(epsilon=8, nuclear=3.0, label_factor=0.9, arch="resnet18-nuat", width=2, epochs=2, train_size=20,
                                          batch_size=12)),
    "gat": (gat, "train_gat", dict(epochs=7)),
    "gat, 8": (gat, "train_gat", dict(epsilon=8, alpha=5, guidance=20.0, late_factor=2.0, label_factor=0.9, epochs=7, train_size=11)),
}  # fmt: skip

MISTAKES = {
    "standard": ["hard labels", "short batch by the full size"],
    "free-at": ["starts anew with every batch", "no clip to the image", "input clipped to the image", "moved by the new weights", "evaluation mode"],
    "ckpt, c 3, noisy": ["attack in training mode", "correct at the other image", "misclassified images attacked", "the last checkpoint"],
    "bp, corner, mean": ["clipped to the image first", "never remembered", "prior's logits detached", "other reduction", "prior in evaluation mode"],
    "ep, reset": ["never reset", "reset an epoch late", "remembers where it began", "prior's logits detached", "input clipped to the image"],
    "ep, crop, aligned": ["not moved along with the crop", "remembers where it began", "prior in evaluation mode"],
    "mep, reset": ["never reset", "no decay", "norm of each image", "momentum never used", "trained on the next start", "prior's logits detached"],
    "mep, crop, aligned": ["no decay", "other reduction"],
    "ep, half": ["start not clipped again"],
    "vfsat": ["a radius ahead", "the full radius", "attack in evaluation mode", "no clip to the image"],
    "vfsat, own radii, loud": ["norm not bounded"],
    "gradsum": ["noise not rounded", "noise clipped to the image", "first derivative only", "norm of each image"],
    "gradsum, loud": ["norm not bounded"],
    "n-fgsm": ["noise not clipped", "clipped to the ball", "attack in evaluation mode"],
    "nuat": ["no clean pass first", "guide in evaluation mode", "other parity", "parity over the epochs", "attack in training mode",
             "no clip to the image", "cross-entropy of the attacked", "short batch by its own size", "no ramp"],
    "gat": ["no clean pass first", "guide in evaluation mode", "other parity", "parity over the epochs", "attack in training mode",
            "no clip to the image", "cross-entropy of the attacked", "distance of the logits", "never late"],
}  # fmt: skip


def replayed(name, wrong=None):
    oracle, script, options = RUNS[name]
    run = record(script, **options)
    replay = Replay(run, getattr(run.cfg, "replays", 1))
    replay.extras = {what: gap(run.remembered(what) if what in run.memories else run._kept[what], value)
                     for what, value in oracle(replay, wrong).items()}
    return replay


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_the_papers_say(name):
    replay = replayed(name)
    assert replay.gap < SAME, replay.first_gap
    assert replay.step == len(replay.run.states)
    assert all(difference < SAME for difference in replay.extras.values()), replay.extras


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name, mistakes in MISTAKES.items() for wrong in mistakes])
def test_a_wrong_oracle_is_noticed(name, wrong):
    assert replayed(name, wrong).gap > DIFFERENT


def test_fgsm_ckpt_met_every_case():
    """Otherwise its replay says nothing: misclassified, each checkpoint, and none misclassified."""
    assert replayed("ckpt, c 3, noisy").ends.keys() == replayed("ckpt, c 3, clean").ends.keys() == {0, 1 / 3, 2 / 3, 1}
    assert replayed("ckpt, c 4, noisy").ends.keys() == {0, 1 / 4, 2 / 4, 3 / 4, 1}
    assert replayed("ckpt, c 1, noisy").ends.keys() == {0, 1}


@pytest.mark.parametrize("epochs, m, divided", [(3, 2, 2), (4, 2, 2), (1, 8, 1), (9, 4, 3)])
def test_free_at_divides_the_epochs_by_m_rounded_up(epochs, m, divided):
    run = record("train_free_at", epochs=epochs, replays=m, divide_epochs=True, train_size=5, lr_schedule="constant")
    assert max(batch.epoch for batch in run.seen) + 1 == divided
    assert len(run.states) == divided * m


def test_fgsm_ep_is_fgsm_bp_when_there_is_one_image():
    """One batch of one image: the previous batch is the previous epoch."""
    options = dict(batch_size=1, train_size=1, epochs=4, milestones="3")
    ours, theirs = record("train_fgsm_ep", reset=0, **options), record("train_fgsm_bp", **options)
    for name, value in ours.states[-1].items():
        assert torch.equal(value, theirs.states[-1][name]), name


@pytest.mark.parametrize("script", [train_fgsm_ep, train_fgsm_mep])
def test_the_memory_starts_anew_after_40_epochs_or_10(script):
    """That it does is seen in the replays; ten where there are 100 classes or more."""
    published = dict.fromkeys(["digits", "cifar10", "svhn", "gtsrb"], 40) | dict.fromkeys(["cifar100", "tiny-imagenet", "imagenet"], 10)
    assert {name: script.Config(dataset=name).reset for name in published} == published
    assert [script.Config(dataset="cifar100", reset=reset).reset for reset in (0, 7)] == [0, 7]


# ---- the public pieces --------------------------------------------------------------------------------------------------

BATCH, CHANNELS, SIDE, EPS = 5, 2, 4, 8 / 255


class Small(nn.Module):
    """Convolution, BatchNorm, an activation, a linear layer."""

    def __init__(self, activation=F.relu, classes=3):
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * SIDE * SIDE, classes)
        self.activation = activation
        with torch.no_grad():  # what a fresh layer has would hide mistakes
            self.bn.weight.uniform_(0.5, 1.5)
            self.bn.bias.uniform_(-0.5, 0.5)
            self.bn.running_mean.uniform_(-0.5, 0.5)
            self.bn.running_var.uniform_(0.2, 0.8)

    def forward(self, x):
        return self.linear(self.activation(self.bn(self.convolution(x))).flatten(1))


class Blind(nn.Module):
    """A linear network that does not see the first eight pixels, so that their gradient is exactly zero."""

    def __init__(self, classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, CHANNELS * SIDE * SIDE))
        with torch.no_grad():
            self.weight[:, :8] = 0

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


NETWORKS = [Small, Blind]


def images(batch=BATCH):
    """Pixels on 0 and 1 and closer to them than a step is long."""
    x = torch.rand(batch, CHANNELS, SIDE, SIDE)
    flat = x.view(-1)
    flat[0::9], flat[1::9], flat[2::9], flat[3::9] = 0, 1, 0.4 * EPS, 1 - 0.3 * EPS
    return x


def noise(batch=BATCH):
    """U(-1, 1), some of it on the ends."""
    u = 2 * torch.rand(batch, CHANNELS, SIDE, SIDE) - 1
    u.view(-1)[0::7], u.view(-1)[4::7] = 1, -1
    return u


def targets(batch=BATCH, classes=3):
    return torch.softmax(torch.randn(batch, classes), 1)


def slope(model, point, loss):
    point = point.detach().clone().requires_grad_()
    logits = model(point)
    return torch.autograd.grad(loss(logits), point, retain_graph=True)[0], logits


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, **EXACT)


def same_state(ours, theirs):
    """Parameters, and what BatchNorm has seen."""
    for (name, mine), (_, yours) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        torch.testing.assert_close(mine, yours, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert all(p.grad is None and p.requires_grad for p in ours.parameters())


def test_free_at_moves_by_the_sign_and_stays_in_ball_and_image():
    x, delta, gradient = images(), EPS * noise(), noise()
    gradient.view(-1)[::5] = 0
    ours = train_free_at.perturb(delta.clone(), gradient, x, EPS)
    equal(ours, stepped(delta, gradient, x, EPS, EPS))
    assert not ours.requires_grad


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("multiple", [0.5, 1.0, 1.25, 3.0])
def test_fgsm_ckpts_direction_is_fgsm_rs(network, multiple):
    model, x, target = network().eval(), images(), targets()
    eta, theirs = pixels(into_image, EPS * noise(), x), copy.deepcopy(model)
    delta, logits = train_fgsm_ckpt.direction(model, x, target, eta, EPS, multiple * EPS)
    gradient, expected = slope(theirs, x + eta, lambda z: cross_entropy(z, target))
    equal(delta, stepped(eta, gradient, x, EPS, multiple * EPS))
    equal(logits.detach(), expected.detach())
    same_state(model, theirs)
    assert not delta.requires_grad


@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_fgsm_ckpt_takes_the_first_checkpoint_that_is_misclassified(c):
    model, x = Small().eval(), images(60)
    with torch.no_grad():
        classes = model(x).argmax(1)
    gradient, _ = slope(model, x, lambda z: F.cross_entropy(z, classes))
    lengths = torch.linspace(0.01, 1, 60).view(-1, 1, 1, 1)
    delta = pixels(into_image, lengths * gradient.sign(), x)
    logits = F.one_hot(classes, 3).double()
    logits[::6] = -logits[::6]  # these are wrong already
    expected, ends = [], set()
    for image, whole, label, row in zip(x, delta, classes.tolist(), logits.tolist()):
        part = 1.0 if first_class(row) == label else 0.0
        for j in range(c - 1, 0, -1):
            if part and first_class(model((image + whole * j / c)[None])[0].tolist()) != label:
                part = j / c
        ends.add(part)
        expected.append(whole * part)
    equal(train_fgsm_ckpt.shorten(model, x, classes, delta, logits, c), torch.stack(expected))
    assert len(ends) == c + 1


PGI = [train_fgsm_bp, train_fgsm_ep, train_fgsm_mep]


@pytest.mark.parametrize("script", PGI)
@pytest.mark.parametrize("init", ["corner", "uniform", "zero"])
def test_pgi_starts(script, init):
    u = noise()
    u.view(-1)[3] = 0
    equal(script.start(u.clone(), init, EPS), begun(u, init, EPS))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("multiple", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("script", [train_fgsm_bp, train_fgsm_ep])
def test_bp_and_ep_step_from_the_prior(script, multiple, network):
    model, x, target, eta = network(), images(), targets(), EPS * noise()
    assert float((x + eta).min()) < 0 and float((x + eta).max()) > 1
    theirs = copy.deepcopy(model)
    delta, prior = script.perturb(model, x, target, eta, EPS, multiple * EPS)
    gradient, expected = slope(theirs, x + eta, lambda z: cross_entropy(z, target))
    equal(delta, stepped(eta, gradient, x, EPS, multiple * EPS))
    equal(prior, expected)
    same_state(model, theirs)
    assert not delta.requires_grad
    for ours, other in zip(torch.autograd.grad(prior.square().sum(), list(model.parameters())),
                           torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))):
        equal(ours, other)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("accumulate", ["normalised", "sign"])
def test_mep_steps_from_the_prior_and_remembers_where_the_momentum_leads(accumulate, mu, network):
    model, x, target, eta, past = network(), images(), targets(), EPS * noise(), noise() / (1 if accumulate == "sign" else 50)
    past.view(-1)[::3] = 0
    theirs = copy.deepcopy(model)
    alpha = 0.75 * EPS
    delta, following, momentum, prior = train_fgsm_mep.perturb(model, x, target, eta, past.clone(), EPS, alpha, mu, accumulate)
    gradient, expected = slope(theirs, x + eta, lambda z: cross_entropy(z, target))
    expected_momentum = gathered(gradient, past, mu, accumulate)
    equal(delta, stepped(eta, gradient, x, EPS, alpha))
    equal(momentum, expected_momentum)
    equal(following, stepped(eta, expected_momentum, x, EPS, alpha))
    equal(prior, expected)
    same_state(model, theirs)
    assert not (delta.requires_grad or following.requires_grad or momentum.requires_grad) and prior.requires_grad
    if mu == 1:
        assert not torch.equal(delta, following)


def test_mep_stays_in_the_ball_where_the_whole_batch_has_no_gradient():
    model, x = Blind(), images()
    with torch.no_grad():
        model.weight.zero_()
    for accumulate in ("normalised", "sign"):
        delta, following, *_ = train_fgsm_mep.perturb(model, x, targets(), EPS * noise(), noise(), EPS, EPS, 0.3, accumulate)
        assert float(delta.abs().max()) <= EPS and float(following.abs().max()) <= EPS


@pytest.mark.parametrize("script", PGI)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pgis_loss_and_its_gradients_into_both_sides(script, reduction):
    target = targets(4, 3)
    logits, prior = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ours = script.regularised_loss(logits, prior, target, 2.5, reduction)
    equal(ours, cross_entropy(logits, target) + 2.5 * squared_distance(logits, prior, reduction))
    count = 4 * (3 if reduction == "mean" else 1)
    into_logits, into_prior = torch.autograd.grad(ours, [logits, prior])
    for sample, column in itertools.product(range(4), range(3)):
        z, w = logits[sample].tolist(), prior[sample].tolist()
        difference, p = z[column] - w[column], math.exp(z[column]) / sum(map(math.exp, z))
        assert float(into_prior[sample, column]) == pytest.approx(-2 * 2.5 * difference / count, abs=1e-12)
        expected = (p - float(target[sample, column])) / 4 + 2 * 2.5 * difference / count
        assert float(into_logits[sample, column]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("multiple", [0.5, 1.0, 2.0])
def test_steps_from_zero(network, multiple):
    model, x, target = network(), images(), targets()
    theirs = copy.deepcopy(model)
    gradient, _ = slope(theirs, x, lambda z: cross_entropy(z, target))
    if multiple == 1:
        equal(train_vfsat.perturb(copy.deepcopy(model), x, target, EPS), stepped(torch.zeros_like(x), gradient, x, EPS, EPS))
    equal(train_gradsum.perturb(model, x, target, EPS, multiple * EPS), stepped(torch.zeros_like(x), gradient, x, EPS, multiple * EPS))
    same_state(model, theirs)


@pytest.mark.parametrize("network", NETWORKS)
def test_n_fgsm_leaves_the_ball_and_not_the_image(network):
    model, x, target = network(), images(), targets()
    eta, theirs = pixels(into_image, 2 * EPS * noise(), x), copy.deepcopy(model)
    delta = train_n_fgsm.perturb(model, x, target, eta, EPS)
    gradient, _ = slope(theirs, x + eta, lambda z: cross_entropy(z, target))
    equal(delta, pixels(lambda e, g, p: into_image(e + EPS * sign(g), p), eta, gradient, x))
    assert float(delta.abs().max()) > 2 * EPS
    same_state(model, theirs)


def test_gradsums_penalty_is_one_norm_for_the_batch_and_can_be_differentiated():
    model, x, target, eta = Small(F.softplus).eval(), images(), targets(), EPS * noise()
    theirs = copy.deepcopy(model)
    ours = train_gradsum.gradient_norm(model, x, target, eta)
    gradient, _ = slope(theirs, x + eta, lambda z: cross_entropy(z, target))
    assert float(ours.detach()) == pytest.approx(math.sqrt(sum(g * g for g in gradient.flatten().tolist())), abs=1e-12)

    def shifted(name, position, by):
        moved = copy.deepcopy(theirs)
        with torch.no_grad():
            dict(moved.named_parameters())[name][position] += by
        gradient, _ = slope(moved, x + eta, lambda z: cross_entropy(z, target))
        return float(gradient.norm())

    names = [name for name, _ in model.named_parameters()]
    into = dict(zip(names, torch.autograd.grad(ours, list(model.parameters()), allow_unused=True), strict=True))
    for name, position in [("convolution.weight", (2, 1, 0, 1)), ("bn.weight", (1,)), ("linear.weight", (2, 7))]:
        quotient = (shifted(name, position, 1e-5) - shifted(name, position, -1e-5)) / 2e-5
        assert float(into[name][position]) == pytest.approx(quotient, rel=1e-6, abs=1e-9)


def curve(logits):
    """Something to guide an attack."""
    return (logits**3).mean()


@pytest.mark.parametrize("script", [train_nuat, train_gat])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("multiple", [0.5, 1.0, 2.0])
def test_nuat_and_gat_climb_the_loss_and_the_guide(script, network, multiple):
    model, x, target = network().eval(), images(), targets()
    start, theirs = pixels(into_image, EPS / 2 * noise().sign(), x), copy.deepcopy(model)
    delta = script.perturb(model, x, target, start, EPS, multiple * EPS, curve)
    gradient, _ = slope(theirs, x + start, lambda z: cross_entropy(z, target) + curve(z))
    equal(delta, stepped(start, gradient, x, EPS, multiple * EPS))
    same_state(model, theirs)
    unguided, _ = slope(theirs, x + start, lambda z: cross_entropy(z, target))
    assert not torch.equal(unguided.sign(), gradient.sign())


@pytest.mark.parametrize("batch", [3, 5, 8])
def test_the_nuclear_norm_by_eigenvalues(batch):
    """The roots of the eigenvalues of A A^T or A^T A, whichever is smaller, over the full batch size."""
    logits, clean = torch.randn(batch, 5, requires_grad=True), torch.randn(batch, 5)
    ours = train_nuat.nuclear_norm(logits, clean, 8)
    matrix = (logits - clean).detach()
    gram = matrix @ matrix.T if batch < 5 else matrix.T @ matrix
    assert float(ours.detach()) == pytest.approx(sum(math.sqrt(value) for value in torch.linalg.eigvalsh(gram).tolist()) / 8, abs=1e-9)
    gradient, = torch.autograd.grad(ours, logits)
    for position in [(0, 0), (2, 3), (batch - 1, 4)]:
        step = torch.zeros_like(logits)
        step[position] = 1e-6
        with torch.no_grad():
            quotient = (train_nuat.nuclear_norm(logits + step, clean, 8) - train_nuat.nuclear_norm(logits - step, clean, 8)) / 2e-6
        assert float(gradient[position]) == pytest.approx(float(quotient), rel=1e-6, abs=1e-8)


def test_the_nuclear_norm_of_logits_that_did_not_move():
    """Its gradient must be finite, or epsilon 0 and dead images would end a run."""
    clean = torch.randn(4, 3)
    logits = clean.clone().requires_grad_()
    value = train_nuat.nuclear_norm(logits, clean, 4)
    gradient, = torch.autograd.grad(value, logits)
    assert float(value.detach()) == 0 and gradient.isfinite().all()


def test_gats_distance_by_hand():
    logits, clean = torch.randn(4, 3) * 3, torch.randn(4, 3) * 3
    total = 0.0
    for z, w in zip(logits.tolist(), clean.tolist()):
        p, q = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (z, w))
        total += sum((a - b) ** 2 for a, b in zip(p, q))
    assert float(train_gat.distance(logits, clean)) == pytest.approx(total / 4, abs=1e-12)
    logits.requires_grad_(), clean.requires_grad_()
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(train_gat.distance(logits, clean), [logits, clean]))


# ---- the memory ---------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def kept_signs(scale, mu, size):
    """The smallest part of entries whose sign is that of float64, over 30 visits."""
    generator = torch.Generator().manual_seed(0)
    shape, rows = (3, 32, 32), torch.arange(4)
    kept, exact, worst = Memory(4, shape, dtype=torch.half, device=CPU, scale=scale), torch.zeros(4, *shape), 1.0
    for _ in range(30):
        gradient = size * torch.randn(4, *shape, generator=generator)
        exact = gradient + mu * exact
        ours = gradient + mu * kept[rows]
        kept[rows] = ours
        worst = min(worst, float((ours.sign() == exact.sign()).double().mean()))
    return worst


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_meps_momentum_keeps_its_signs_in_half_precision_only_when_it_is_scaled(mu):
    assert kept_signs(2**18, mu, size=1e-6) > 0.999
    assert kept_signs(1.0, mu, size=1e-6) < 0.999


@pytest.mark.parametrize("scale", [1.0, 2.0**18])
@pytest.mark.parametrize("dtype", [torch.half, torch.float32, torch.float64])
def test_a_memory_gives_back_what_was_written(dtype, scale):
    kept, rows = Memory(6, (2, 3, 3), dtype=dtype, device=CPU, scale=scale), torch.randn(2, 2, 3, 3) / scale
    index = torch.tensor([4, 1])
    rows.requires_grad_()
    kept[index] = rows
    read = kept[index]
    assert read.dtype == torch.float64 and not read.requires_grad and kept.values.dtype == dtype
    torch.testing.assert_close(read, rows.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7 / scale)
    assert not kept[torch.tensor([0, 2, 3, 5])].any()
    read.fill_(7)
    assert not (kept[index] == 7).any()


def test_an_aligned_memory_moves_with_the_shift_and_the_mirror():
    """Written through one crop and read through another, pixel by pixel; what no crop has shown stays zero."""
    side, pad, current = 4, 2, {}
    kept = Memory(3, (2, side, side), dtype=torch.float64, device=CPU, pad=pad, places=lambda: current["places"])
    canvas = [[[[0.0] * 8 for _ in range(8)] for _ in range(2)] for _ in range(3)]
    pairs = list(itertools.product(range(side), range(side)))
    for shifts in [[(0, 0, False), (2, 2, True)], [(4, 1, True), (3, 4, False)], [(1, 3, False), (0, 4, True)]]:
        index = torch.randperm(3)[:2]
        rows = torch.tensor([[top + r for r in range(side)] for top, _, _ in shifts])
        columns = torch.tensor([[left + (side - 1 - c if mirrored else c) for c in range(side)] for _, left, mirrored in shifts])
        current["places"] = rows, columns
        found = kept[index]
        for b, channel, (r, c) in itertools.product(range(2), range(2), pairs):
            assert float(found[b, channel, r, c]) == canvas[int(index[b])][channel][int(rows[b, r])][int(columns[b, c])]
        written = torch.randn(2, 2, side, side)
        kept[index] = written
        equal(kept[index], written)
        for b, channel, (r, c) in itertools.product(range(2), range(2), pairs):
            canvas[int(index[b])][channel][int(rows[b, r])][int(columns[b, c])] = float(written[b, channel, r, c])
    equal(kept.values.permute(0, 3, 1, 2), torch.tensor(canvas))
    assert (kept.values == 0).any()


def test_a_memory_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    needed = 1000 * 3 * 32 * 32 * 2
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    with pytest.raises(engine.Misuse, match=r"0\.0 GB"):
        Memory(1000, (3, 32, 32), dtype=torch.half, device=CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    Memory(1000, (3, 32, 32), dtype=torch.half, device=CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2_000_000_000)
    with pytest.raises(engine.Misuse, match=r"remembering 1281167 images of 3 x 224 x 224 needs 385\.7 GB, and cpu has 2\.0 GB left"):
        Memory(1_281_167, (3, 224, 224), dtype=torch.half, device=CPU)
    with pytest.raises(engine.Misuse, match=r"3\.1 GB"):  # the padding counts too
        Memory(100_000, (3, 64, 64), dtype=torch.half, device=CPU, pad=4, places=lambda: None)


@pytest.mark.parametrize("script", ["train_fgsm_ep", "train_fgsm_mep"])
def test_a_run_whose_memory_does_not_fit_ends_at_once(script, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    with pytest.raises(engine.Misuse, match="GB"):
        record(script, train_size=18)


def test_positions_count_a_short_batch_too():
    run = record(RUNS["bp, corner, mean"][1], **RUNS["bp, corner, mean"][2])
    assert [batch.positions.tolist() for batch in run.seen[:3]] == [list(range(8)), list(range(8)), [0, 1, 2]]
    assert run.memories["previous"].values.shape == (8, 1, 8, 8)


def test_positions_of_the_processes_make_up_the_batch(monkeypatch):
    run = record(RUNS["bp, corner, mean"][1], **RUNS["bp, corner, mean"][2])
    for size, world in itertools.product([1, 2, 3, 7, 8], [1, 2, 3]):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
            monkeypatch.setattr(run, "_global_batch", size)
            parts += run.positions.tolist()
        assert parts == list(range(size))
