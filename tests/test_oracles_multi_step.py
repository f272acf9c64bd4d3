"""The methods with several steps, or several networks, replayed in float64 by slow loops written without looking at the scripts.

Each oracle is one reading of a method's paper and of the code published with it: images are moved as the authors move them
(x_adv, not delta), losses are sums over samples, AWP has its proxy network with an SGD of its own, LAS-AT its deep-copied
classifier, and BatchNorm is put into its mode by hand before every pass. A whole run of the script is recorded (first weights
of all networks, batches, noise, chosen actions) and the oracle, with torch's plain SGD, has to come to the same weights and
buffers after every batch. Every oracle is also made wrong on purpose, and then has to miss them.
"""

import contextlib
import copy
import functools
import importlib
import itertools
import math
import tempfile
import types

import pytest
import torch
import torch.nn as nn

import engine
import train_awp
import train_fat
import train_gairat
import train_las_at
import train_liet
import train_mart
import utils
from engine import data
from engine.record import ROOT
from tests.conftest import doubles

pytestmark = pytest.mark.usefixtures("float64")

SAME = 1e-8  # relative, over a whole run: rounding that the updates have multiplied
DIFFERENT = 1e-6
EXACT = {"rtol": 0, "atol": 1e-12}
CLASSES = 10
KNOWN = 64  # training images that the first network has seen


# ---- a run and what is remembered of it ---------------------------------------------------------------------------------


def bare(module):
    """The network inside an engine's classifier."""
    return getattr(module, "network", module)


def plain_copy(module):
    return copy.deepcopy(bare(module)).to(memory_format=torch.contiguous_format)


class Watched(engine.Run):
    """A run that remembers its first networks and tensors, every batch with its noise, and everything kept after every batch."""

    def __init__(self, *arguments, **keywords):
        self.first, self.watched, self.seen = {}, {}, []
        super().__init__(*arguments, **keywords)
        type(self).latest = self
        teach(self.network)
        self.first["classifier"] = plain_copy(self.network)

    def keep(self, **objects):
        super().keep(**objects)
        for name, kept in objects.items():
            if isinstance(kept, nn.Module):
                self.first[name] = plain_copy(kept)
                self.watched[name] = bare(kept).state_dict()
            elif torch.is_tensor(kept):
                self.first[name] = kept.clone()
                self.watched[name] = {"": kept}

    def batches(self):
        for x, y, index in super().batches():
            self.seen.append(Batch(self.epoch, self.batch, x, y))
            yield x, y, index
            self.seen[-1].after = {name: {key: value.clone() for key, value in state.items()} for name, state in self.watched.items()}

    def uniform(self, x):
        return self._noted(super().uniform(x))

    def normal(self, x):
        return self._noted(super().normal(x))

    def random(self, *size):
        return self._noted(super().random(*size))

    def _noted(self, noise):
        self.seen[-1].noise.append(noise.clone())
        return noise

    def update(self, loss, optimizer=None, **keywords):
        kind = "classifier" if optimizer in (None, self.optimizer) else "strategy"
        self.seen[-1].losses.append((kind, float(loss.detach())))
        super().update(loss, optimizer, **keywords)


class Batch:
    def __init__(self, epoch, number, x, y):
        self.epoch, self.number = epoch, number
        self.x, self.y = x.clone(memory_format=torch.contiguous_format), y.clone()
        self.noise, self.losses, self.actions = [], [], []


def teach(network):
    """Some knowledge of the images: an untrained network classifies next to nothing as it should."""
    digits = data.load("digits", "")
    x, y = data.to_images(torch.from_numpy(digits.x_train[:KNOWN]), torch.float64), torch.from_numpy(digits.y_train[:KNOWN])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()


@functools.cache
def record(script, **options):
    """A run of a script's `main`: three batches an epoch, the last one short, unless the options say otherwise."""
    module = importlib.import_module(script)
    settings = dict(
        dataset="digits", width=4, epochs=3, batch_size=8, train_size=19, val_size=2, lr=0.02, lr_schedule="multistep", milestones="2",
        epsilon=16, device="cpu", measure="pgd10", resume="never",
    ) | options  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch, doubles():
        patch.setattr(engine, "Run", Watched)
        if script == "train_las_at":
            patch.setattr(module, "choose", remembering(module.choose))
        module.main(module.Config(out_dir=directory, **settings))
    return Watched.latest


def remembering(choose):
    def wrapped(*arguments, **keywords):
        actions, log_probability = choose(*arguments, **keywords)
        Watched.latest.seen[-1].actions.append({name: action.clone() for name, action in actions.items()})
        return actions, log_probability
    return wrapped


def gap(ours, theirs):
    """The largest difference, relative to the largest entry; whole numbers must be equal."""
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else math.inf
    largest = float((ours - theirs).abs().max())
    return math.inf if math.isnan(largest) else largest / max(float(theirs.abs().max()), 1e-6)


class Replay:
    """The same networks from the same first weights, trained by an oracle and compared with the run after every batch."""

    def __init__(self, run, hopeless=math.inf):
        self.run, self.cfg, self.hopeless = run, run.cfg, hopeless
        self.networks = {name: copy.deepcopy(first) for name, first in run.first.items() if isinstance(first, nn.Module)}
        self.network = self.networks["classifier"]
        self.tensors = {}  # what the method keeps besides networks
        self.trained = [*self.network.parameters()]
        if "teacher" in self.networks:
            self.trained += self.networks["teacher"].parameters()
        self.optimizer = torch.optim.SGD(self.trained, lr=1.0, momentum=0.9, weight_decay=run.cfg.weight_decay)
        self.step, self.total = 0, len(run.seen)
        self.gap, self.first_gap, self.faintest = 0.0, "", 1.0

    def batches(self):
        for batch in self.run.seen:
            self.losses = []
            yield batch
            self.compare("the losses", torch.tensor([loss for _, loss in batch.losses]), torch.tensor(self.losses))
            for name, network in self.networks.items():
                for key, value in network.state_dict().items():
                    self.compare(f"{name}'s {key}", value, batch.after[name][key])
            for name, value in self.tensors.items():
                self.compare(name, value, batch.after[name][""])
            if self.gap > self.hopeless:
                return

    def __call__(self, x, mode="train"):
        return through(self.network, x, mode)

    def gradient(self, x, loss, mode, network=None):
        """The gradient at x of a loss of the logits, and the logits, whose graph is kept, back to x in `self.point`."""
        x = self.point = x.detach().clone().requires_grad_()
        logits = through(self.network if network is None else network, x, mode)
        found = torch.autograd.grad(loss(logits), x, retain_graph=True)[0]
        for size in found.abs():  # a sign that rounding could turn would make the comparison worthless
            if size.max() > 0:
                self.faintest = min(self.faintest, float(size[size > 0].min() / size.max()))
        return found, logits

    @property
    def rate(self):
        return rates(self.cfg, self.step / self.total)[0]

    def descend(self, loss):
        lr, momentum = rates(self.cfg, self.step / self.total)
        self.optimizer.param_groups[0].update(lr=lr, momentum=momentum)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1

    def compare(self, what, ours, theirs):
        found = gap(ours, theirs) if ours.shape == theirs.shape else math.inf
        if found > SAME and not self.first_gap:
            self.first_gap = f"batch {self.step}, {what}: {found:.1e}"
        self.gap = max(self.gap, found)


def through(network, x, mode):
    network.train(mode == "train")
    return network(x)


def rates(cfg, done):
    """Learning rate and momentum when the part `done` of all updates is done."""
    if cfg.lr_schedule == "cyclic":
        height = 1 - abs(2 * done - 1)
        return cfg.lr * height, 0.9 - 0.1 * height
    return cfg.lr * 0.1 ** sum(done * cfg.epochs >= float(epoch) - 1e-9 for epoch in cfg.milestones.split(",")), 0.9


# ---- the formulas, slowly -----------------------------------------------------------------------------------------------


def log_probabilities(z):
    z = z - z.max(-1, keepdim=True)[0].detach()
    return z - z.exp().sum(-1, keepdim=True).log()


def probabilities(z):
    return log_probabilities(z).exp()


def wanted(y, factor, classes=CLASSES):
    """`factor` on the true class, the rest shared evenly."""
    return torch.tensor([[factor if column == label else (1 - factor) / (classes - 1) for column in range(classes)] for label in y.tolist()])


def entropies(logits, target):
    return torch.stack([-(q * log_probabilities(z)).sum() for z, q in zip(logits, target, strict=True)])


def cross_entropy(logits, target):
    return sum(entropies(logits, target)) / len(logits)


def hard(y):
    return wanted(y, 1.0)


def relative_entropies(logits, reference):
    """KL(softmax(reference) || softmax(logits)), for every sample."""
    found = []
    for z, w in zip(logits, reference, strict=True):
        p = probabilities(w)
        found.append((p * (log_probabilities(w) - log_probabilities(z))).sum())
    return torch.stack(found)


def mean(values):
    return sum(values) / len(values)


def largest(row):
    row = row.tolist()
    return row.index(max(row))


def near(x_adv, x, eps):
    """Into the ball, then into the image."""
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)


def climb(replay, x, x_adv, loss, *, eps, alpha, steps, mode):
    for _ in range(steps):
        gradient, _ = replay.gradient(x_adv, loss, mode)
        x_adv = near(x_adv + alpha * gradient.sign(), x, eps)
    return x_adv


def sizes(cfg):
    return {"eps": cfg.epsilon / 255, "alpha": cfg.alpha / 255, "steps": cfg.steps}


# ---- one oracle for each method -----------------------------------------------------------------------------------------
# Each takes the replay and the mistake to make.


def climbing_divergence(replay, batch, wrong):
    """TRADES's attack."""
    mode = "train" if wrong == "attack in training mode" else "eval"
    x, scale = batch.x, replay.cfg.epsilon / 255 if wrong == "start as wide as the ball" else 0.001
    reference = replay(x, mode).detach()

    def loss(z):
        if wrong == "attack on the labels":
            return cross_entropy(z, hard(batch.y))
        return sum(relative_entropies(reference, z) if wrong == "divergence turned round" else relative_entropies(z, reference))

    return climb(replay, x, x + scale * batch.noise[0], loss, mode=mode, **sizes(replay.cfg))


def trades(replay, wrong=None):
    cfg = replay.cfg
    for batch in replay.batches():
        x_adv = climbing_divergence(replay, batch, wrong)
        clean, adversarial = replay(batch.x), replay(x_adv)
        again = clean if wrong == "two passes" else replay(batch.x)
        if wrong == "clean side detached":
            again = again.detach()
        target = wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        replay.descend(cross_entropy(clean, target) + cfg.beta * mean(relative_entropies(adversarial, again)))


def strongest_wrong(probability, label):
    return max((p, k) for k, p in enumerate(probability.tolist()) if k != label)[1]


def mart(replay, wrong=None):
    cfg = replay.cfg
    mode = "train" if wrong == "attack in training mode" else "eval"
    for batch in replay.batches():
        x, target = batch.x, wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        start = x + (cfg.epsilon / 255 if wrong == "start as wide as the ball" else 0.001) * batch.noise[0]
        x_adv = climb(replay, x, start, lambda z: cross_entropy(z, target), mode=mode, **sizes(cfg))
        clean, adversarial = replay(x), replay(x_adv)
        if wrong == "two clean passes":
            replay(x)
        boosted, weighted = boosted_terms(adversarial, batch.y, target), []
        for z, w, label in zip(adversarial, clean, batch.y.tolist()):
            p, q = probabilities(w), probabilities(z)
            true = p[label].detach() if wrong == "weight detached" else p[label]
            p = p.detach() if wrong == "clean side detached" else p
            weighted.append((p * (p.log() - (q + 1e-12).log())).sum() * (1.0000001 - true))
        replay.descend(mean(boosted) + cfg.beta * mean(weighted))


def boosted_terms(logits, y, target):
    found = []
    for z, label, entropy in zip(logits, y.tolist(), entropies(logits, target)):
        q = probabilities(z)
        found.append(entropy - (1.0001 - q[strongest_wrong(q, label)] + 1e-12).log())
    return found


def weight_direction(network, loss):
    """What AWP adds for gamma = 1, by name: a proxy takes one step of ascent, and the difference gets the layer's norm."""
    proxy = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-loss(proxy)).backward()
    optimizer.step()
    moved = {}
    for (name, w), new in zip(network.state_dict().items(), proxy.state_dict().values()):
        if w.ndim > 1 and "weight" in name:
            difference = new - w
            moved[name] = difference * w.norm() / (difference.norm() + 1e-20)
    return moved


def add_to_weights(network, direction, size):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in direction:
                parameter += size * direction[name]


@contextlib.contextmanager
def at_worse_weights(network, loss, gamma, wrong=None):
    before = copy.deepcopy(network.state_dict())
    direction = weight_direction(network, loss)
    if wrong == "vectors perturbed too":
        direction = {name: w.clone() for name, w in network.named_parameters() if w.ndim == 1} | direction
    if wrong == "one norm for all layers":
        whole = math.sqrt(sum(float((w.detach()**2).sum()) for w in network.parameters()))
        direction = {name: d * whole / before[name].norm() / len(direction) for name, d in direction.items()}
    add_to_weights(network, direction, -gamma if wrong == "weights descend" else gamma)
    yield
    if wrong != "weights not put back":
        add_to_weights(network, direction, -gamma)


def awp(replay, wrong=None):
    cfg, eps = replay.cfg, replay.cfg.epsilon / 255
    trades_too = cfg.base == "trades"
    mode = cfg.attack_bn or ("eval" if trades_too else "train")
    warmup = cfg.warmup if wrong != "an epoch early" else cfg.warmup - 1
    for batch in replay.batches():
        x, target = batch.x, wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        if trades_too:
            x_adv = climbing_divergence(replay, batch, wrong)
        else:
            other = {"train": "eval", "eval": "train"}[mode] if wrong == "attack in the other mode" else mode
            start = (x + eps * batch.noise[0]).clamp(0, 1)
            x_adv = climb(replay, x, start, lambda z: cross_entropy(z, target), mode=other, **sizes(cfg))

        def loss(network, reverse=False):
            if not trades_too:
                return cross_entropy(network(x_adv), target), None
            if wrong == "passes in TRADES's order":
                natural, adversarial = network(x), network(x_adv)
                clean = network(x)
            else:
                adversarial, natural = network(x_adv), network(x)
                clean = network(x)
            return cross_entropy(clean, target) + cfg.beta * mean(relative_entropies(adversarial, natural)), None

        replay.network.train()
        if batch.epoch >= warmup:
            if wrong == "the proxy moves BatchNorm":
                loss(replay.network)
            with at_worse_weights(replay.network, lambda network: loss(network)[0], cfg.gamma, wrong):
                replay.descend(loss(replay.network)[0])
        else:
            replay.descend(loss(replay.network)[0])


def tau_of(cfg, epoch, wrong=None):
    if cfg.tau is not None:
        return cfg.tau
    done = epoch + 1 if wrong == "tau an epoch early" else epoch
    return 0 if 12 * done < 5 * cfg.epochs else 1 if 12 * done < 9 * cfg.epochs else 2


def fat(replay, wrong=None):
    cfg, eps, alpha = replay.cfg, replay.cfg.epsilon / 255, replay.cfg.alpha / 255
    mode = "train" if wrong == "attack in training mode" else "eval"
    replay.stopped = set()
    for batch in replay.batches():
        x, target = batch.x, wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        noise = iter(batch.noise)
        x_adv = (x + eps * next(noise)).clamp(0, 1)
        left = [tau_of(cfg, batch.epoch, wrong)] * len(x)
        moving = [True] * len(x)
        for step in range(cfg.steps):
            gradient, logits = replay.gradient(x_adv, lambda z: cross_entropy(z, target), mode)
            for sample, label in enumerate(batch.y.tolist()):
                if not moving[sample] or (largest(logits[sample]) == label and wrong != "tau steps after the start"):
                    continue
                if left[sample] == 0 and wrong != "never stops":
                    moving[sample] = False
                    replay.stopped.add((step, tau_of(cfg, batch.epoch)))
                left[sample] -= 1
            if not any(moving):
                break
            shake = 0 if wrong == "no noise" else cfg.omega * next(noise, 0)
            moved = near(x_adv + alpha * gradient.sign() + shake, x, eps)
            x_adv = torch.stack([there if go else here for go, there, here in zip(moving, moved, x_adv)])
        replay.descend(cross_entropy(replay(x_adv), target))


def geometry_weight(kappa, steps, shift, function):
    half = steps // 2
    if function == "tanh":
        return (math.tanh(shift + 5 * (half - kappa) / half) + 1) / 2
    if function == "sigmoid":
        return 1 / (1 + math.exp(-(shift + 5 * (half - kappa) / half)))
    return (steps + 1 - kappa) / (steps + 1)


def gairat(replay, wrong=None):
    cfg, eps, alpha = replay.cfg, replay.cfg.epsilon / 255, replay.cfg.alpha / 255
    mode = "train" if wrong == "attack in training mode" else "eval"
    replay.kappas = set()
    for batch in replay.batches():
        x, target = batch.x, wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        x_adv, kappa = (x + eps * batch.noise[0]).clamp(0, 1), [0] * len(x)
        failed = [False] * len(x)
        for _ in range(cfg.steps):
            gradient, logits = replay.gradient(x_adv, lambda z: cross_entropy(z, target), mode)
            for sample, label in enumerate(batch.y.tolist()):
                right = largest(logits[sample]) == label
                failed[sample] |= not right
                kappa[sample] += right and not (failed[sample] and wrong == "only steps in a row")
            x_adv = near(x_adv + alpha * gradient.sign(), x, eps)
        if wrong == "also the last point":
            kappa = [k + (largest(z) == label) for k, z, label in zip(kappa, replay(x_adv, "eval"), batch.y.tolist())]
        losses = entropies(replay(x_adv), target)
        now = batch.epoch + 1 + (wrong == "weighted an epoch early") - (wrong == "weighted an epoch late")
        if now >= cfg.begin * cfg.epochs:
            replay.kappas |= set(kappa)
            weights = [geometry_weight(k, cfg.steps, cfg.gair_lambda, cfg.weights) for k in kappa]
            total = len(x) / 2 if wrong == "not scaled" else sum(weights)
            replay.descend(sum(w * loss for w, loss in zip(weights, losses)) / total)
        else:
            replay.descend(mean(losses))


def lbgat(replay, wrong=None):
    cfg, teacher = replay.cfg, replay.networks["teacher"]
    for batch in replay.batches():
        x_adv = climbing_divergence(replay, batch, wrong)
        adversarial = replay(x_adv)
        natural = adversarial if wrong == "no clean pass" else replay(batch.x)
        taught = through(teacher, batch.x, "eval" if wrong == "teacher in evaluation mode" else "train")
        led = taught.detach() if wrong == "teacher detached" else taught
        distance = sum(((z - w) ** 2).sum() for z, w in zip(adversarial, led)) / len(led) / (1 if wrong == "sum over classes" else CLASSES)
        target = wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        replay.descend(distance + cross_entropy(taught, target) + cfg.beta * mean(relative_entropies(adversarial, natural)))


def las_at(replay, wrong=None):
    cfg, strategy = replay.cfg, replay.networks["strategy"]
    decay = 0.0 if cfg.momentum == 0 or wrong == "no decay" else 5e-4
    optimizer = torch.optim.SGD(strategy.parameters(), lr=cfg.strategy_lr, momentum=cfg.momentum, weight_decay=decay)
    replay.rewards = []
    for number, batch in enumerate(replay.batches(), 1):
        noise, actions = iter(batch.noise), iter(batch.actions)
        number += wrong == "updated a batch early"
        if wrong == "counted anew in every epoch":
            number = batch.number + 1
        if number % cfg.interval == 0:
            heads = through(strategy, batch.x, "eval" if wrong == "strategy updated in evaluation mode" else "train")
            chosen, log_probability = sampled(replay, heads, noise, next(actions, None))
            x_adv, beta = attacked(replay, batch, chosen, noise, wrong)
            starts = [drawn(noise, batch.x) for _ in range(2)]
            r = reward(replay, batch, x_adv, beta, starts, wrong)
            replay.rewards.append(r)
            falls = [float(epoch) / cfg.epochs for epoch in cfg.milestones.split(",")]
            rate = 0.1 ** sum(number // cfg.interval - 1 >= round(part * replay.total) for part in falls)
            if cfg.base == "awp":
                rate = replay.rate / cfg.lr
            optimizer.param_groups[0]["lr"] = cfg.strategy_lr * (1 if wrong == "constant rate" else rate)
            optimizer.zero_grad()
            loss = -mean(log_probability) * (1.0 if wrong == "no reward" else sum(r))
            loss.backward()
            if wrong != "not clipped":
                norm = math.sqrt(sum(float((p.grad**2).sum()) for p in strategy.parameters()))
                for p in strategy.parameters():
                    p.grad *= min(1, 1 / (norm + 1e-6))  # torch's tiny number, which is visible at this precision
            optimizer.step()
            replay.losses.append(float(loss.detach()))
        heads = through(strategy, batch.x, "train" if wrong == "strategy used in training mode" else "eval")
        chosen, _ = sampled(replay, heads, noise, next(actions, None))
        x_adv, beta = attacked(replay, batch, chosen, noise, wrong)
        if cfg.base == "awp" and wrong != "not clipped to the ball":
            x_adv = near(x_adv, batch.x, cfg.epsilon / 255)
        loss = functools.partial(las_loss, cfg, x=batch.x, y=batch.y, x_adv=x_adv, beta=beta, wrong=wrong)
        replay.network.train()
        if cfg.base == "awp":
            with at_worse_weights(replay.network, lambda network: loss(network, smooth=False), cfg.gamma, wrong):
                replay.descend(loss(replay.network, smooth=False))
        else:
            replay.descend(loss(replay.network, smooth=True))


def las_loss(cfg, network, *, x, y, x_adv, beta, smooth, wrong=None, passes=2):
    """LAS-AT's and LAS-AWP's smoothed loss; LAS-TRADES's, whose copy passes the clean images twice."""
    target = wanted(y, cfg.label_factor if smooth and wrong != "hard labels" else 1.0)
    if cfg.base != "trades":
        return cross_entropy(network(x_adv), target)
    natural, adversarial = network(x), network(x_adv)
    again = network(x) if passes == 3 else natural
    beta = beta.mean() if wrong == "one beta for all" else beta
    return cross_entropy(natural, target) + mean(beta * relative_entropies(adversarial, again))


def drawn(noise, like):
    """The run's next noise; zeros where the run drew other noise, which only a wrong oracle asks for."""
    found = next(noise, None)
    return torch.zeros_like(like) if found is None or found.shape != like.shape else found


def sampled(replay, heads, noise, recorded):
    """Gumbel's trick on the noise of the run: the largest of logit - log(-log(u)); and the sum of the log-probabilities."""
    chosen, log_probability = {}, 0
    for name, logits in heads.items():
        u = (drawn(noise, logits) + 1) / 2
        chosen[name] = torch.tensor([largest(row) for row in logits.detach() - (-u.log()).log()])
        log_probability = log_probability + torch.stack([log_probabilities(z)[k] for z, k in zip(logits, chosen[name].tolist())])
        if recorded is not None:
            replay.compare(f"chosen {name}", chosen[name], recorded[name])
    return chosen, log_probability


def listed(text):
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [float(number) for number in text.split(",")]


def attacked(replay, batch, chosen, noise, wrong):
    """Attack_policy_batch: every image with its own radius, steps and step size, all in one batch."""
    cfg, x = replay.cfg, batch.x
    mode = "train" if wrong == "attack in training mode" else "eval"
    option = {name: torch.tensor([float(listed(getattr(cfg, name))[k]) for k in action.tolist()]) for name, action in chosen.items()}
    eps, alpha = (option[name].view(-1, 1, 1, 1) / 255 * cfg.epsilon / 8 for name in ("radii", "step_sizes"))
    left = option["steps"].view(-1, 1, 1, 1)
    u = drawn(noise, x)
    reference = through(replay.network, x, mode).detach()
    if cfg.base == "trades":
        x_adv = x + 0.001 * u
    else:
        x_adv = (x + (eps if wrong == "start as wide as the chosen radius" else cfg.epsilon / 255) * u).clamp(0, 1)

    def loss(z):
        return sum(relative_entropies(z, reference)) if cfg.base == "trades" else cross_entropy(z, hard(batch.y))

    for _ in range(int(left.max())):
        gradient, _ = replay.gradient(x_adv, loss, mode)
        go = torch.ones_like(left) if wrong == "the same number of steps for all" else (left >= 1).double()
        x_adv = near(x_adv + go * alpha * gradient.sign(), x, eps)
        left = left - 1
    return x_adv, option.get("betas")


def reward(replay, batch, x_adv, beta, starts, wrong):
    """Get_reward: how strong the attack is, and how robust and how accurate a copy is that has trained on it once."""
    cfg, x, y, label = replay.cfg, batch.x, batch.y, hard(batch.y)
    with torch.no_grad():
        if cfg.base == "trades":
            mode = "eval" if wrong == "first reward in evaluation mode" else "train"
            natural, adversarial = replay(x, mode), replay(x_adv, mode)
            strong = cross_entropy(natural, label) + mean(beta * relative_entropies(adversarial, natural))
        else:
            strong = cross_entropy(replay(x_adv, "eval"), label)
    twin = copy.deepcopy(replay.network).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=cfg.lr if wrong == "copy at the first rate" else replay.rate, momentum=0.9, weight_decay=5e-4)
    loss = functools.partial(las_loss, cfg, x=x, y=y, x_adv=x_adv, beta=beta, passes=3)
    optimizer.zero_grad()
    if cfg.base == "awp" and wrong != "copy without AWP":
        with at_worse_weights(twin, lambda network: loss(network, smooth=False), cfg.gamma):
            loss(twin, smooth=wrong != "copy with hard labels").backward()
            optimizer.step()
    elif wrong != "copy not trained":
        loss(twin, smooth=wrong != "copy with hard labels").backward()
        optimizer.step()
    worst = worst_of(replay, twin, batch, starts, "eval" if wrong == "copy attacked in evaluation mode" else "train", wrong)
    with torch.no_grad():
        robust, clean = (through(twin, point, "eval") for point in (worst, x))
    if cfg.reward == "accuracy":
        scores = [sum(largest(z) == k for z, k in zip(logits, y.tolist())) / len(y) for logits in (robust, clean)]
    else:
        scores = [-float(cross_entropy(logits, label)) for logits in (robust, clean)]
    if wrong != "first reward not clamped":
        strong = strong.clamp(0, 20 if cfg.base == "trades" else 10)
    return float(strong), cfg.robust * scores[0], cfg.clean * scores[1]


def worst_of(replay, network, batch, starts, mode, wrong=None):
    """attack_pgd: ten steps from each start; misclassified images rest, but stay in the batch; LAS-AWP's do not rest."""
    x, y, eps = batch.x, batch.y, replay.cfg.epsilon / 255
    label = hard(y)
    worst, highest = x.clone(), [0.0] * len(x)
    for u in starts[:1] if wrong == "one restart" else starts:
        x_adv = (x + eps * u).clamp(0, 1)
        for _ in range(10):
            gradient, logits = replay.gradient(x_adv, lambda z: cross_entropy(z, label), mode, network)
            rests = (replay.cfg.base != "awp") != (wrong == "the other rule of rest")
            right = [largest(z) == k or not rests for z, k in zip(logits, y.tolist())]
            if not any(right):
                break
            moved = near(x_adv + eps / 4 * gradient.sign(), x, eps)
            x_adv = torch.stack([there if go else here for go, there, here in zip(right, moved, x_adv)])
        with torch.no_grad():
            for sample, loss in enumerate(entropies(through(network, x_adv, mode), label).tolist()):
                if loss >= highest[sample]:
                    highest[sample], worst[sample] = loss, x_adv[sample]
    return worst


def uneven(y, factor, u, wrong=None):
    """`factor` on the true class, the rest shared among the others in proportion to random numbers."""
    rows = []
    for label, row in zip(y.tolist(), u.tolist()):
        total = sum(v for k, v in enumerate(row) if k != label)
        rows.append([factor if k == label else (1 - factor) * v / total for k, v in enumerate(row)])
    return wanted(y, factor) if wrong == "even labels" else torch.tensor(rows)


def liet(replay, wrong=None):
    cfg, eps, alpha = replay.cfg, replay.cfg.epsilon / 255, replay.cfg.alpha / 255
    wide = cfg.epsilon > 8
    replay.signs = set()
    for batch in replay.batches():
        x, y, noise = batch.x, batch.y, iter(batch.noise)
        weight = cfg.liet_lambda * (batch.epoch + (wrong != "weight from zero on")) / cfg.epochs
        if batch.number % cfg.refresh == 0:
            grey = torch.full((CLASSES, *x.shape[1:]), 0.5)
            target = uneven(torch.arange(CLASSES), cfg.label_factor, next(noise), wrong)
            mode = "train" if wrong == "information in training mode" else "eval"
            information, _ = replay.gradient(grey, lambda z: cross_entropy(z, target), mode)
            information = eps * information.sign()
            replay.tensors = {"information": information}
        ratio = next(noise) * (cfg.most_noise - cfg.least_noise) + cfg.least_noise
        values, mask, coin = next(noise), (next(noise) + 1) / 2 < ratio, next(noise)
        values = (2 if wide and wrong != "noise as wide as the ball" else 1) * eps * values
        start = torch.where(mask, values, information[y])
        if coin < 0.5 and wrong != "always the same sign":
            start = -start
        replay.signs.add(bool(coin < 0.5))
        one, two = (uneven(y, cfg.label_factor, (next(noise) + 1) / 2, wrong) for _ in range(2))
        begin = (x + start).clamp(0, 1)
        gradient, at_start = replay.gradient(begin, lambda z: cross_entropy(z, one), "train")
        x_adv = begin + alpha * gradient.sign()
        x_adv = x_adv.clamp(0, 1) if wide != (wrong == "the other rule for the ball") else near(x_adv, x, eps)
        at_end = replay(x_adv)
        if wrong == "start detached":
            at_start = at_start.detach()
        divergence = 0
        for z, w in zip(at_start, at_end):
            p, q = probabilities(z), probabilities(w)
            m = ((p + q) / 2).log()
            divergence = divergence + (p * (p.log() - m)).sum() + (q * (q.log() - m)).sum()
        replay.descend(cross_entropy(at_end, two) + weight * divergence / 2 / len(x))


def fgsm_uap(replay, wrong=None):
    cfg, eps, alpha, wider = replay.cfg, *(getattr(replay.cfg, name) / 255 for name in ("epsilon", "alpha", "uap_epsilon"))
    universal = replay.run.first["universal"]
    momentum = torch.zeros_like(universal)
    for batch in replay.batches():
        x, target = batch.x, wanted(batch.y, 1.0 if wrong == "hard labels" else cfg.label_factor)
        start = near(x + universal, x, wider if wrong == "start not clipped to the ball" else eps)
        gradient, at_start = replay.gradient(start, lambda z: cross_entropy(z, target), "eval" if wrong == "start in evaluation mode" else "train")
        x_adv = near(start + alpha * gradient.sign(), x, eps)
        at_end = replay(x_adv)
        if wrong == "start detached":
            at_start = at_start.detach()
        distance = sum(((z - w) ** 2).sum() for z, w in zip(at_end, at_start)) / len(x) / CLASSES
        loss = cross_entropy(at_end, target) + cfg.uap_lambda * distance
        if (cfg.momentum_of == "both") != (wrong == "the other gradient") and wrong != "start detached":
            gradient = gradient + torch.autograd.grad(loss, replay.point, retain_graph=True)[0]
        replay.descend(loss)
        direction = sum(gradient / gradient.abs().sum()) / len(x)
        momentum = direction + (0.0 if wrong == "no momentum" else cfg.mu) * momentum
        if wrong == "normalised image by image":
            momentum = sum(g / g.abs().sum() for g in gradient) / len(x) + cfg.mu * momentum
        universal = (universal + wider * momentum.sign()).clamp(-wider, wider)
        replay.tensors = {"universal": universal, "momentum": momentum}


def fgsm_rs_cs(replay, wrong=None):
    cfg, eps, alpha = replay.cfg, replay.cfg.epsilon / 255, replay.cfg.alpha / 255
    last, losses = 0.0, []
    replay.pulls = []
    for batch in replay.batches():
        if batch.number == 0 and batch.epoch > 0:
            images = sum(n for n, _ in losses)
            last = sum(loss for _, loss in losses) / len(losses) if wrong == "mean over batches" else sum(n * loss for n, loss in losses) / images
            losses = [] if wrong != "mean over the run" else losses
        x = (batch.x + eps * batch.noise[0]).clamp(0, 1)
        target = wanted(batch.y, cfg.label_factor)
        aim = target if wrong == "attack on the outer labels" else wanted(batch.y, cfg.attack_factor)
        gradient, _ = replay.gradient(x, lambda z: cross_entropy(z, aim), "train")
        x_adv = (x + alpha * gradient.sign()).clamp(0, 1)
        if wrong == "clipped to the ball":
            x_adv = near(x_adv, batch.x, eps)
        loss = cross_entropy(replay(x_adv), target)
        if wrong != "two passes":
            noisy = cross_entropy(replay(x), target)
        else:
            noisy = cross_entropy(through(copy.deepcopy(replay.network), x, "train"), target)
        losses.append((len(x), float(noisy.detach())))
        first = cfg.stride - (wrong == "an epoch early")
        if first < batch.epoch < cfg.epochs - cfg.stride and abs(losses[-1][1] - last) > cfg.gamma:
            sign = 1 if losses[-1][1] > last or wrong == "always down" else -1
            replay.pulls.append(sign)
            loss = loss + sign * cfg.cs_weight * noisy
        replay.descend(loss)


# ---- the runs -----------------------------------------------------------------------------------------------------------

LAS = dict(train_size=12, lr=0.01, milestones="1,2", radii="3-6", steps="2-4", step_sizes="2,4", interval=2, strategy_lr=0.2)
CASES = {
    "trades": (trades, "train_trades", dict(steps=3, label_factor=0.8), (
        "attack in training mode", "start as wide as the ball", "attack on the labels", "divergence turned round", "two passes",
        "clean side detached", "hard labels")),
    "trades, cyclic": (trades, "train_trades", dict(steps=2, alpha=9.0, beta=2.0, lr_schedule="cyclic"), ()),
    "mart": (mart, "train_mart", dict(steps=3, label_factor=0.8), (
        "attack in training mode", "start as wide as the ball", "hard labels", "weight detached", "clean side detached", "two clean passes")),
    "mart, hard labels": (mart, "train_mart", dict(steps=2, beta=2.0), ()),
    "awp": (awp, "train_awp", dict(steps=2, label_factor=0.8), (
        "attack in the other mode", "hard labels", "vectors perturbed too", "one norm for all layers", "weights descend", "weights not put back",
        "the proxy moves BatchNorm")),
    "awp, later": (awp, "train_awp", dict(steps=2, warmup=1, gamma=0.03, attack_bn="eval"), ("an epoch early", "attack in the other mode")),
    "awp on trades": (awp, "train_awp", dict(base="trades", steps=2, warmup=1), (
        "attack in training mode", "an epoch early", "passes in TRADES's order", "weights descend", "the proxy moves BatchNorm")),
    "fat": (fat, "train_fat", dict(steps=6, epochs=4, label_factor=0.8, epsilon=24), (
        "attack in training mode", "hard labels", "tau an epoch early", "never stops", "no noise", "tau steps after the start")),
    "fat, tau 1 and no noise": (fat, "train_fat", dict(steps=4, epochs=2, tau=1, omega=0.0, epsilon=24), ("never stops",)),
    "gairat": (gairat, "train_gairat", dict(epochs=4, steps=6, label_factor=0.8), (
        "attack in training mode", "hard labels", "weighted an epoch early", "weighted an epoch late", "not scaled", "also the last point")),
    "gairat, sigmoid": (gairat, "train_gairat", dict(epochs=2, steps=5, weights="sigmoid", begin=0.0, gair_lambda=0.5), ()),
    "gairat, discrete": (gairat, "train_gairat", dict(epochs=2, steps=4, weights="discrete", begin=0.0), ()),
    "lbgat": (lbgat, "train_lbgat", dict(steps=3, beta=3.0, label_factor=0.8), (
        "attack in training mode", "divergence turned round", "teacher in evaluation mode", "teacher detached", "sum over classes", "hard labels")),
    "lbgat, beta 0": (lbgat, "train_lbgat", dict(steps=2, lr_schedule="cyclic"), ("no clean pass",)),
    "las-at": (las_at, "train_las_at", LAS | dict(label_factor=0.7, robust=4.0, clean=2.0, momentum=0.0), (
        "updated a batch early", "strategy updated in evaluation mode", "strategy used in training mode", "no reward", "not clipped", "hard labels",
        "attack in training mode", "the same number of steps for all", "start as wide as the chosen radius", "one restart",
        "copy attacked in evaluation mode")),
    "las-at, clamped": (las_at, "train_las_at", LAS | dict(lr=0.3, epsilon=64, interval=1, label_factor=0.9, momentum=0.0), (
        "first reward not clamped",)),
    "las-at, cross-entropy": (las_at, "train_las_at", LAS | dict(label_factor=0.7, reward="cross-entropy", momentum=0.9, interval=1), (
        "no decay", "copy not trained", "copy with hard labels", "copy at the first rate", "one restart", "copy attacked in evaluation mode")),
    "las-trades": (las_at, "train_las_at", LAS | dict(base="trades", betas="2-4", robust=8.0, clean=4.0, momentum=0.9, interval=1), (
        "first reward in evaluation mode", "one beta for all", "attack in training mode", "constant rate")),
    "las-trades, cross-entropy": (las_at, "train_las_at", LAS | dict(base="trades", betas="2-4", reward="cross-entropy", momentum=0.0, interval=3), (
        "copy not trained", "counted anew in every epoch")),
    "las-awp": (las_at, "train_las_at", LAS | dict(base="awp", radii="7-12", step_sizes="4,6", robust=1.0, clean=1.0, momentum=0.0, gamma=0.02), (
        "constant rate", "not clipped to the ball", "weights descend")),
    "las-awp, cross-entropy": (las_at, "train_las_at", LAS | dict(base="awp", radii="7-12", reward="cross-entropy", momentum=0.9, interval=1), (
        "copy without AWP", "copy with hard labels", "the other rule of rest")),
    "liet": (liet, "train_liet", dict(epochs=3, refresh=2, liet_lambda=20.0), (
        "weight from zero on", "information in training mode", "noise as wide as the ball", "always the same sign", "the other rule for the ball",
        "start detached", "even labels")),
    "liet in the ball": (liet, "train_liet", dict(epochs=2, refresh=20, epsilon=8, least_noise=0.3), ("the other rule for the ball",)),
    "fgsm-uap, the attack's gradient": (fgsm_uap, "train_fgsm_uap", dict(momentum_of="attack"), ("the other gradient",)),
    "fgsm-uap": (fgsm_uap, "train_fgsm_uap", {}, (
        "the other gradient",
        "hard labels", "start not clipped to the ball", "start in evaluation mode", "start detached", "no momentum", "normalised image by image")),
    "fgsm-rs-cs": (fgsm_rs_cs, "train_fgsm_rs_cs", dict(epochs=5, milestones="4", gamma=0.14, cs_weight=1.5), (
        "mean over batches", "mean over the run", "attack on the outer labels", "clipped to the ball", "two passes", "an epoch early",
        "always down")),
}  # fmt: skip


@functools.cache
def replayed(case, wrong=None):
    oracle, script, options, _ = CASES[case]
    replay = Replay(record(script, **options), DIFFERENT if wrong else math.inf)
    oracle(replay, wrong)
    return replay


@pytest.mark.parametrize("case", CASES)
def test_a_run_replayed(case):
    replay = replayed(case)
    assert replay.faintest > 1e-11, "a gradient so near to zero that rounding may turn its sign: choose another run"
    assert replay.gap < SAME, replay.first_gap


@pytest.mark.parametrize("case, wrong", [(case, wrong) for case, (*_, mistakes) in CASES.items() for wrong in mistakes])
def test_a_wrong_oracle_misses_the_run(case, wrong):
    assert replayed(case, wrong).gap > DIFFERENT


def test_the_runs_show_what_they_are_to_show():
    """Images that stop early and late, weights of all sizes, rewards that differ, both pulls, both signs."""
    stopped = replayed("fat").stopped
    assert {tau for _, tau in stopped} == {0, 1, 2} and len(stopped) > 5
    assert len(replayed("gairat").kappas) > 3
    assert len({robust + clean for _, robust, clean in replayed("las-at").rewards}) > 1
    assert max(strong for strong, *_ in replayed("las-at, clamped").rewards) == 10
    assert set(replayed("fgsm-rs-cs").pulls) == {1, -1}
    assert replayed("liet").signs == {True, False}
    run = record("train_fgsm_uap")
    corner = run.first["universal"] * 255 / run.cfg.uap_epsilon
    torch.testing.assert_close(corner.abs(), torch.ones(run.shape), **EXACT)
    assert abs(float(corner.mean())) < 0.5 and not run.first["momentum"].any()


def published_epochs(module, name, monkeypatch, **options):
    """What a script's function is called with in a run of 120 epochs of one image, a list of (epoch from 1 on, arguments)."""
    calls, function = [], getattr(module, name)

    def wrapped(*arguments):
        calls.append((Watched.latest._position.epoch + 1, arguments))
        return function(*arguments)

    monkeypatch.setattr(module, name, wrapped)
    record.__wrapped__(module.__name__, epochs=120, train_size=1, val_size=1, milestones="1", **options)
    return calls


def test_fats_tau_at_120_epochs(monkeypatch):
    calls = published_epochs(train_fat, "perturb", monkeypatch, steps=1)
    assert [(epoch, arguments[8]) for epoch, arguments in calls] == [(e, 0 if e <= 50 else 1 if e <= 90 else 2) for e in range(1, 121)]


def test_gairat_weighs_from_epoch_60_of_120_on(monkeypatch):
    calls = published_epochs(train_gairat, "instance_weights", monkeypatch, steps=2)
    assert [epoch for epoch, _ in calls] == list(range(60, 121))


def test_awps_published_settings():
    pgd, trades_too = train_awp.Config(epochs=200), train_awp.Config(base="trades", epochs=200)
    assert (pgd.gamma, pgd.warmup, pgd.attack_bn) == (0.01, 0, "train")
    assert (trades_too.gamma, trades_too.attack_bn, trades_too.beta, trades_too.warmup) == (0.005, "eval", 6.0, 9), "from the 10th epoch of 200 on"


# ---- the pieces, image by image -----------------------------------------------------------------------------------------

EPS, ALPHA = 24 / 255, 6 / 255


@functools.cache
def some_network():
    """A small ResNet in evaluation mode that knows some of the images; images and labels, of which half are known."""
    with doubles(), torch.random.fork_rng():
        torch.manual_seed(1)
        network = engine.networks.models.build("resnet8", channels=1, width=4)
        teach(network)
        digits = data.load("digits", "")
        chosen = torch.arange(KNOWN - 8, KNOWN + 8)
        x, y = data.to_images(torch.from_numpy(digits.x_train)[chosen], torch.float64), torch.from_numpy(digits.y_train)[chosen]
        return network.eval(), x.contiguous(), y


def slope(network, image, target):
    """The logits of one image, and the sign of the gradient of its cross-entropy."""
    image = image[None].clone().requires_grad_()
    logits = network(image)
    return logits[0].detach(), torch.autograd.grad(cross_entropy(logits, target[None]), image)[0][0].sign()


@pytest.mark.parametrize("omega", [0.0, 0.02])
@pytest.mark.parametrize("tau", [0, 1, 2])
def test_fat_lets_go_of_every_image_on_its_own(tau, omega):
    network, x, y = some_network()
    target, steps = wanted(y, 0.9), 6
    eta = EPS * (2 * torch.rand_like(x) - 1)
    shakes = [omega * torch.randn_like(x) for _ in range(steps)]
    drawn = iter(shakes)
    delta = train_fat.perturb(network, x, y, target, eta, EPS, ALPHA, steps, tau, lambda: next(drawn))
    lengths = []
    for image, label, q, start, found, *shake in zip(x, y.tolist(), target, eta, delta, *shakes):
        point, misses, length = (image + start).clamp(0, 1), 0, 0
        for step in range(steps):
            logits, direction = slope(network, point, q)
            misses += largest(logits) != label
            if misses > tau:
                break
            point, length = near(point + ALPHA * direction + shake[step], image, EPS), length + 1
        torch.testing.assert_close(image + found, point, **EXACT)
        lengths.append(length)
    assert len(set(lengths)) > 2 and {min(lengths), max(lengths)} == {tau, steps}


def test_gairat_counts_the_points_that_are_classified_correctly():
    network, x, y = some_network()
    target, steps = wanted(y, 0.9), 7
    eta = EPS * (2 * torch.rand_like(x) - 1)
    delta, kappa = train_gairat.perturb(network, x, y, target, eta, EPS, ALPHA, steps)
    for image, label, q, start, found, count in zip(x, y.tolist(), target, eta, delta, kappa.tolist()):
        point, right = (image + start).clamp(0, 1), 0
        for _ in range(steps):
            logits, direction = slope(network, point, q)
            right += largest(logits) == label
            point = near(point + ALPHA * direction, image, EPS)
        torch.testing.assert_close(image + found, point, **EXACT)
        assert count == right
    assert len(set(kappa.tolist())) > 3


@pytest.mark.parametrize("steps", [10, 7, 2])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("function", ["tanh", "sigmoid", "discrete"])
def test_gairats_weights(function, shift, steps):
    kappa = torch.randint(0, steps + 1, (12,)).double()
    expected = [geometry_weight(k, steps, shift, function) for k in kappa.tolist()]
    found = train_gairat.instance_weights(kappa, steps, shift, function)
    torch.testing.assert_close(found, torch.tensor([12 * w / sum(expected) for w in expected]), **EXACT)
    assert float(found.mean()) == pytest.approx(1)


@pytest.mark.parametrize("steps, shift", [(3, -1.0), (10, -9.0)])
def test_gairats_weights_of_a_batch_that_withstands_every_step(steps, shift):
    """All alike, however little each one is before they are scaled."""
    kappa = torch.full((6,), steps, dtype=torch.float32)
    for function in ("tanh", "sigmoid", "discrete"):
        assert train_gairat.instance_weights(kappa, steps, shift, function).tolist() == pytest.approx([1] * 6)


def mart_case(loud):
    """Logits of which the true class is the largest, the second and the last; their copies that keep a graph."""
    logits, clean = loud * torch.randn(9, CLASSES), loud * torch.randn(9, CLASSES)
    order = logits.argsort(descending=True)
    y = torch.cat([order[:3, 0], order[3:6, 1], order[6:, -1]])
    return logits.requires_grad_(), clean.requires_grad_(), y


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors, retain_graph=True)


@pytest.mark.parametrize("loud", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_marts_margin_image_by_image(factor, loud):
    logits, _, y = mart_case(loud)
    target = wanted(y, factor)
    found, expected = train_mart.boosted_cross_entropy(logits, y, target), mean(boosted_terms(logits, y, target))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, logits), gradients(expected, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loud", [1.0, 3.0, 30.0])
def test_marts_divergence_image_by_image(loud):
    logits, clean, y = mart_case(loud)
    expected = 0
    for z, w, label in zip(logits, clean, y.tolist()):
        for k, (a, b) in enumerate(zip(probabilities(w), probabilities(z))):
            expected = expected + a * (log_probabilities(w)[k] - (b + 1e-12).log()) * (1.0000001 - probabilities(w)[label]) / len(y)
    found = train_mart.weighted_divergence(logits, clean, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, logits, clean), gradients(expected, logits, clean)):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Odd(nn.Module):
    """Weights of every kind: AWP knows its own by their names and dimensions."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3 * 36, CLASSES)
        self.table = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return self.linear((self.bn(self.convolution(x)) * self.table).tanh().flatten(1))


@pytest.mark.parametrize("script", [train_awp, train_las_at])
def test_awp_leaves_weights_that_are_frozen(script):
    """As the published wide ResNet's sub_block1, of which nothing is made."""
    network, (_, x, y) = Odd().train(), some_network()
    network.unused = nn.Linear(4, 4).requires_grad_(False)
    before = copy.deepcopy(network.unused.state_dict())
    with utils.moved(*script.perturb_weights(network, lambda: cross_entropy(network(x), hard(y)), 0.02)):
        assert all(torch.equal(value, before[name]) for name, value in network.unused.state_dict().items())
    trained = train_las_at.descended(network, x, y, torch.zeros_like(x), None, train_las_at.Config(base="awp", lr=0.1), CLASSES, 0.1)
    moved = {name.split(".")[0] for name, value in trained.state_dict().items() if not torch.equal(value, network.state_dict()[name])}
    assert moved == {"convolution", "bn", "linear", "table"}


@pytest.mark.parametrize("script", [train_awp, train_las_at])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_awp_moves_nothing_along_a_gradient_that_is_not_finite(script, bad):
    network, (_, x, _) = Odd().train(), some_network()
    before = copy.deepcopy(network.state_dict())
    with utils.moved(*script.perturb_weights(network, lambda: (network.linear(network.table.expand(3, -1, -1, -1).flatten(1)) * bad).sum() + network(x).sum(), 0.02)):
        assert torch.equal(network.linear.weight, before["linear.weight"]) and not torch.equal(network.convolution.weight, before["convolution.weight"])
    for name in ("linear.weight", "table"):
        assert torch.equal(network.state_dict()[name], before[name])


@pytest.mark.parametrize("script", [train_awp, train_las_at])
def test_awp_moves_weights_alone_and_puts_them_back(script):
    network, (_, x, y) = Odd().train(), some_network()
    target, before = hard(y), copy.deepcopy(network.state_dict())
    direction = weight_direction(network, lambda proxy: cross_entropy(proxy(x), target))
    assert set(direction) == {"convolution.weight", "linear.weight"}
    with utils.moved(*script.perturb_weights(network, lambda: cross_entropy(network(x), target), 0.02)):
        inside = copy.deepcopy(network.state_dict())
        with torch.no_grad():
            network.linear.weight += 0.25
    for name, value in before.items():
        moved = 0.02 * direction[name] if name in direction else torch.zeros_like(value)
        torch.testing.assert_close(inside[name] - value, moved, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        if name in direction:
            assert float((inside[name] - value).norm() / value.norm()) == pytest.approx(0.02)
        after = value + 0.25 if name == "linear.weight" else value
        torch.testing.assert_close(network.state_dict()[name], after, **EXACT)
    assert network.training and all(p.requires_grad for p in network.parameters()) and network.bn.track_running_stats


def unit_noise(like):
    return 2 * torch.rand_like(like) - 1


def test_las_at_samples_from_its_distribution():
    draws, rows = 20_000, {"radii": torch.tensor([0.0, 1.0, -2.0, 0.5]), "steps": torch.tensor([2.0, 2.5, 0.0])}
    logits = {name: row.expand(draws, -1) for name, row in rows.items()}
    actions, log_probability = train_las_at.choose(logits, unit_noise)
    p, q = map(probabilities, rows.values())
    counts, expected = torch.zeros(4, 3), draws * p[:, None] * q  # jointly: the choices are independent
    for pair in zip(*(actions[name].tolist() for name in rows)):
        counts[pair] += 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 1.0 < chi_square < 31.3, "11 degrees of freedom: outside one time in a thousand"
    expected = log_probabilities(rows["radii"])[actions["radii"]] + log_probabilities(rows["steps"])[actions["steps"]]
    torch.testing.assert_close(log_probability, expected, **EXACT)


def test_las_ats_log_probability_is_differentiated_and_its_choice_is_not():
    logits = {"radii": torch.randn(5, 4, requires_grad=True), "steps": torch.randn(5, 3, requires_grad=True)}
    actions, log_probability = train_las_at.choose(logits, unit_noise)
    for name, z in logits.items():
        chosen = torch.stack([row.eq(k) for row, k in zip(torch.arange(z.shape[1]).expand(5, -1), actions[name])]).double()
        torch.testing.assert_close(gradients(log_probability.sum(), z)[0], chosen - probabilities(z.detach()), **EXACT)


@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_las_at_survives_the_ends_of_the_noise(edge):
    logits = {"radii": torch.randn(6, 4)}
    noise = unit_noise(logits["radii"])
    noise[:, 2] = edge
    actions, log_probability = train_las_at.choose(logits, lambda like: noise)
    assert torch.isfinite(log_probability).all()
    assert ((actions["radii"] == 2).all() if edge == 1 else (actions["radii"] != 2).all())


@pytest.mark.parametrize("kind", ["cross-entropy", "divergence"])
def test_las_at_attacks_every_image_in_its_own_way(kind):
    network, x, y = some_network()
    n, column = len(x), (-1, 1, 1, 1)
    eps, alpha = (torch.rand(n) * 0.1 + 0.05).view(column), (torch.rand(n) * 0.04 + 0.01).view(column)
    steps = torch.randint(2, 6, (n,)).view(column)
    eta, clean = (x + 0.08 * unit_noise(x)).clamp(0, 1) - x, network(x).detach()

    def loss(logits, y):
        if kind == "divergence":
            return relative_entropies(logits, clean).mean()
        return cross_entropy(logits, hard(y))

    delta = train_las_at.perturb(network, x, y, eta, eps, alpha, steps, 5, loss)
    for i in range(n):
        point = x[i] + eta[i]
        for _ in range(int(steps[i])):
            leaf = point[None].clone().requires_grad_()
            logits = network(leaf)
            value = relative_entropies(logits, clean[i:i + 1]).sum() if kind == "divergence" else cross_entropy(logits, hard(y[i:i + 1]))
            point = near(point + alpha[i] * torch.autograd.grad(value, leaf)[0][0].sign(), x[i], eps[i])
        torch.testing.assert_close(x[i] + delta[i], point, **EXACT)


@pytest.mark.parametrize("epsilon", [8.0, 4.0])
@pytest.mark.parametrize("base, dataset, radii, steps, step_sizes", [
    ("pgd", "cifar10", (3, 15), (3, 14), (1, 5)), ("pgd", "cifar100", (3, 15), (3, 12), (1, 5)), ("pgd", "tiny-imagenet", (3, 15), (3, 14), (1, 5)),
    ("trades", "cifar10", (5, 9), (7, 14), (2, 4)), ("trades", "cifar100", (5, 10), (7, 14), (2, 4)),
    ("trades", "tiny-imagenet", (5, 10), (7, 14), (2, 4)), ("awp", "cifar10", (7, 15), (8, 16), (2, 5)),
    ("awp", "cifar100", (7, 15), (8, 15), (2, 5)), ("awp", "tiny-imagenet", (7, 15), (8, 15), (2, 5)),
])  # fmt: skip
def test_las_at_has_the_published_choices(base, dataset, radii, steps, step_sizes, epsilon):
    cfg = train_las_at.Config(base=base, dataset=dataset, epsilon=epsilon)
    for name, (first, last), unit in (("radii", radii, epsilon / 8 / 255), ("steps", steps, 1), ("step_sizes", step_sizes, epsilon / 8 / 255)):
        assert list(cfg.options(name)) == pytest.approx([unit * value for value in range(first, last + 1)])


@pytest.mark.parametrize("factor", [0.4, 0.2, 1.0])
def test_liets_labels(factor):
    y, u = torch.tensor([3, 0, 9]), torch.rand(3, CLASSES)
    found = train_liet.uneven_labels(y, factor, u)
    torch.testing.assert_close(found, uneven(y, factor, u), **EXACT)
    torch.testing.assert_close(found.sum(1), torch.ones(3), **EXACT)


@pytest.mark.parametrize("loud", [1.0, 10.0])
def test_liets_divergence(loud):
    one, two = (loud * torch.randn(4, CLASSES)).requires_grad_(), (loud * torch.randn(4, CLASSES)).requires_grad_()
    expected = 0
    for a, b in itertools.chain.from_iterable(zip(probabilities(z), probabilities(w)) for z, w in zip(one, two)):
        middle = ((a + b) / 2).log()
        expected = expected + (a * (a.log() - middle) + b * (b.log() - middle)) / 2 / len(one)
    found = train_liet.jensen_shannon(one, two)
    torch.testing.assert_close(found, expected, **EXACT)
    assert 0 < float(found.detach()) < math.log(2)
    for ours, theirs in zip(gradients(found, one, two), gradients(expected, one, two)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_every_script_has_an_oracle():
    """Those of the first four methods are runs that are replayed, in tests/test_algorithms.py."""
    from tests import test_oracles_single_step as single_step

    replayed = {script for _, script, *_ in (*single_step.RUNS.values(), *CASES.values())}
    assert replayed | {"train_fgsm_rs", "train_pgd_at", "train_fgsm_sdi", "train_fgsm_ga"} == {path.stem for path in ROOT.glob("train_*.py")}


@pytest.mark.parametrize("dataset, size", [("cifar10", 32), ("tiny-imagenet", 64)])
def test_las_ats_strategy_network_is_the_published_one(dataset, size, monkeypatch):
    built: dict = {}

    def build(actions, **more):
        built.update(more)
        raise StopIteration

    monkeypatch.setattr(engine, "Run", lambda cfg: types.SimpleNamespace(model=None, device="cpu", channels=3, shape=(3, size, size)))
    monkeypatch.setattr(train_las_at, "StrategyNetwork", build)
    with pytest.raises(StopIteration):
        train_las_at.main(train_las_at.Config(dataset=dataset))
    assert built == dict(channels=3, image_size=size, width=64)
