"""The algorithms against slow transcriptions of their papers, in float64.

Nothing here shares a helper with the code under test: perturbations are computed pixel by pixel in Python
numbers, losses sample by sample, and whole training runs are replayed with torch's own optimizers and
schedules. Papers: FGSM-SDI (Jia et al., TIP 2022; Eqs. 2-8 and Algorithms 1-3), FGSM-RS (Wong et al., ICLR
2020), PGD-AT (Madry et al., ICLR 2018; Rice et al., ICML 2020), GradAlign (Andriushchenko and Flammarion,
NeurIPS 2020).
"""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attacks
import engine
import train_fat
import train_fgsm_ckpt
import train_fgsm_ga
import train_fgsm_rs
import train_fgsm_sdi
import train_gairat
import train_pgd_at
import utils
from engine import networks
from engine.schedule import SCHEDULES

EXACT = {"rtol": 0, "atol": 1e-12}
BATCH, CHANNELS, SIDE, CLASSES = 4, 2, 4, 3
EPS = 8 / 255


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------
# Small networks and data
# ----------------------------------------------------------------------------------------------------------


class SmallNetwork(nn.Module):
    """Convolution, BatchNorm, an activation, a linear layer."""

    def __init__(self, activation=F.relu, channels=CHANNELS, side=SIDE, classes=CLASSES):
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * side * side, classes)
        self.activation = activation
        with torch.no_grad():  # BatchNorm's start of weight 1 and bias 0 would hide a missing parameter
            self.bn.weight.uniform_(0.5, 1.5)
            self.bn.bias.uniform_(-0.5, 0.5)

    def forward(self, x):
        return self.linear(self.activation(self.bn(self.convolution(x))).flatten(1))


class LinearNetwork(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


class TanhGenerator(nn.Module):
    """tanh(a x + b s_x + c): small enough to be differentiated by hand."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.9))
        self.b = nn.Parameter(torch.tensor(-0.4))
        self.c = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x, s_x):
        return torch.tanh(self.a * x + self.b * s_x + self.c)


class TableGenerator(nn.Module):
    """Its parameter is its output, so that every entry's gradient can be read off."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x, s_x):
        return self.table


def images(batch=BATCH, channels=CHANNELS, side=SIDE):
    """Uniform pixels, many of them pushed onto or close to 0 and 1, where the image clips."""
    x = torch.rand(batch, channels, side, side)
    flat = x.view(-1)
    flat[0::9] = 0
    flat[1::9] = 1
    flat[2::9] = 0.4 * EPS
    flat[3::9] = 1 - 0.3 * EPS
    return x


def probabilities(batch=BATCH, classes=CLASSES):
    return torch.softmax(torch.randn(batch, classes), 1)


def noise(x, eps):
    return (2 * torch.rand_like(x) - 1) * eps


# ----------------------------------------------------------------------------------------------------------
# The formulas, slowly
# ----------------------------------------------------------------------------------------------------------


def sign(value):
    return 1.0 if value > 0 else -1.0 if value < 0 else 0.0


def clip(value, low, high):
    return low if value < low else high if value > high else value


def pixel_by_pixel(function, *tensors):
    """A tensor of function(pixel of the first, pixel of the second, ...), in Python numbers."""
    columns = [tensor.detach().contiguous().view(-1).tolist() for tensor in tensors]
    result = [function(*pixels) for pixels in zip(*columns)]
    return torch.tensor(result, dtype=tensors[0].dtype).view(tensors[0].shape)


def slow_cross_entropy(logits, target):
    """Mean over samples of -sum_c q_c (z_c - log sum_k exp z_k)."""
    total = 0
    for sample in range(len(logits)):
        highest = max(logits[sample].tolist())
        log_sum = highest + torch.log(sum(torch.exp(value - highest) for value in logits[sample]))
        for q, z in zip(target[sample], logits[sample]):
            total = total - q * (z - log_sum)
    return total / len(logits)


def one_hot(y, classes):
    rows = [[1.0 if label == column else 0.0 for column in range(classes)] for label in y.tolist()]
    return torch.tensor(rows)


def slow_gradient(model, point, target, create_graph=False):
    """Gradient of the cross-entropy at `point`; runs the model once, in whatever mode it is."""
    point = point.detach().clone().requires_grad_()
    loss = slow_cross_entropy(model(point), target)
    return torch.autograd.grad(loss, point, create_graph=create_graph)[0]


def slow_step(delta, gradient, x, eps, alpha):
    """P_01(P_eps(delta + alpha sign(gradient)))."""
    return pixel_by_pixel(
        lambda d, g, pixel: clip(clip(d + alpha * sign(g), -eps, eps), -pixel, 1 - pixel), delta, gradient, x
    )


def slow_into_image(delta, x):
    return pixel_by_pixel(lambda d, pixel: clip(d, -pixel, 1 - pixel), delta, x)


def slow_rs(model, x, target, eta, eps, alpha):
    """Eq. 4, with the published code's clips to the image of both eta and delta."""
    eta = slow_into_image(eta, x)
    return slow_step(eta, slow_gradient(model, x + eta, target), x, eps, alpha)


def slow_pgd_at(model, x, target, eta, eps, alpha, steps):
    """Eq. 2 and Algorithm 1, clipped to the image; in training every image moves at every step."""
    delta = slow_into_image(eta, x)
    for _ in range(steps):
        delta = slow_step(delta, slow_gradient(model, x + delta, target), x, eps, alpha)
    return delta


def slow_sdi_start(generator, x, s_x, eps):
    """Eq. 6."""
    return pixel_by_pixel(lambda g: eps * g, generator(x, s_x))


def slow_sdi_sum(model, generator, x, y, s_x, eps, alpha):
    """What Eq. 7 projects: the start plus the step, which the published code clips to [-eps, eps]."""
    eta = slow_sdi_start(generator, x, s_x, eps)
    gradient = slow_gradient(model, x + eta, one_hot(y, CLASSES))
    return pixel_by_pixel(lambda e, g: e + clip(alpha * sign(g), -eps, eps), eta, gradient)


def slow_sdi(model, generator, x, y, s_x, eps, alpha):
    """Eq. 7: no clip to the image."""
    total = slow_sdi_sum(model, generator, x, y, s_x, eps, alpha)
    return pixel_by_pixel(lambda value: clip(value, -eps, eps), total)


def slow_norm(tensor):
    return math.sqrt(sum(value * value for value in tensor.detach().reshape(-1).tolist()))


def slow_misalignment(model, x, target, gradient, eta):
    """1 - mean cosine of the gradients at x and at x + eta, over the samples where neither is zero."""
    moved = slow_gradient(model, x + eta, target, create_graph=True)
    cosines = []
    for one, other in zip(gradient, moved):
        if slow_norm(one) == 0 or slow_norm(other) == 0:
            continue
        dot = sum(p * q for p, q in zip(one.detach().reshape(-1), other.reshape(-1)))
        squares = sum(q * q for q in other.reshape(-1))
        cosines.append(dot / (slow_norm(one) * torch.sqrt(squares)))
    return 1 - sum(cosines) / len(cosines)


def slow_margin(logits, y):
    total = 0.0
    for row, label in zip(logits.tolist(), y.tolist()):
        total += max(value for column, value in enumerate(row) if column != label) - row[label]
    return total / len(logits)


def slow_class(logits):
    values = logits.tolist()
    return values.index(max(values))


def slow_attack(model, x, y, start, eps, alpha, steps):
    """The evaluation's PGD, one image at a time; an image that is misclassified stays where it is."""
    result = []
    for image, label, delta in zip(x, y, start):
        image, label = image[None], label[None]
        delta = slow_into_image(delta[None], image)
        for _ in range(steps):
            if slow_class(model(image + delta)[0]) != int(label):
                break
            gradient = slow_gradient(model, image + delta, one_hot(label, CLASSES))
            delta = slow_step(delta, gradient, image, eps, alpha)
        result.append(delta)
    return torch.cat(result)


def assert_same_statistics(model, expected):
    """Running mean, running variance and number of passes: the two networks saw the same batches."""
    for (name, ours), (_, theirs) in zip(model.named_buffers(), expected.named_buffers()):
        torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_parameters(model, before):
    for (name, ours), (_, theirs) in zip(model.named_parameters(), before.named_parameters()):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad and ours.grad is None, name


# ----------------------------------------------------------------------------------------------------------
# 1. Perturbations and losses against the formulas, BatchNorm in training mode
# ----------------------------------------------------------------------------------------------------------

STEP_SIZES = [0.5, 1.0, 1.25, 3.0]  # as multiples of epsilon


@pytest.mark.parametrize("multiple", STEP_SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_fgsm_rs_is_equation_4(float64, multiple, training):
    model = SmallNetwork().train(training)
    x, target = images(), probabilities()
    eta = slow_into_image(noise(x, EPS), x)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    delta = train_fgsm_rs.perturb(ours, x, target, eta, EPS, multiple * EPS)
    torch.testing.assert_close(delta, slow_rs(theirs, x, target, eta, EPS, multiple * EPS), **EXACT)
    assert not delta.requires_grad
    assert_same_statistics(ours, theirs)
    assert int(ours.bn.num_batches_tracked) == (1 if training else 0)
    assert_same_parameters(ours, model)


@pytest.mark.parametrize("multiple, steps", [(0.25, 10), (0.25, 4), (0.5, 2), (1.0, 1), (0.5, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_pgd_at_is_algorithm_1(float64, multiple, steps, training):
    model = SmallNetwork().train(training)
    x, target = images(), probabilities()
    eta = slow_into_image(noise(x, EPS), x)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    delta = train_pgd_at.perturb(ours, x, target, eta, EPS, multiple * EPS, steps)
    expected = slow_pgd_at(theirs, x, target, eta, EPS, multiple * EPS, steps)
    torch.testing.assert_close(delta, expected, **EXACT)
    assert not delta.requires_grad
    assert_same_statistics(ours, theirs)
    assert int(ours.bn.num_batches_tracked) == (steps if training else 0)
    assert_same_parameters(ours, model)


@pytest.mark.parametrize("multiple", STEP_SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_fgsm_sdi_is_equation_7(float64, multiple, training):
    model = SmallNetwork().train(training)
    generator = TanhGenerator()
    x, y = images(), torch.randint(CLASSES, (BATCH,))
    s_x = pixel_by_pixel(sign, slow_gradient(copy.deepcopy(model), x, one_hot(y, CLASSES)))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    delta = train_fgsm_sdi.perturb(ours, generator, x, y, s_x, EPS, multiple * EPS)
    expected = slow_sdi(theirs, generator, x, y, s_x, EPS, multiple * EPS)
    torch.testing.assert_close(delta.detach(), expected, **EXACT)
    assert_same_statistics(ours, theirs)
    assert int(ours.bn.num_batches_tracked) == (1 if training else 0)
    assert_same_parameters(ours, model)


@pytest.mark.parametrize("multiple", STEP_SIZES)
def test_fgsm_ga_starts_from_zero(float64, multiple):
    model = SmallNetwork().train()
    x, target = images(), probabilities()
    gradient = slow_gradient(model, x, target)
    gradient[0, 0, 0] = 0  # the sign of zero is zero
    delta = train_fgsm_ga.perturb(x, gradient, EPS, multiple * EPS)
    expected = slow_step(torch.zeros_like(x), gradient, x, EPS, multiple * EPS)
    torch.testing.assert_close(delta, expected, **EXACT)
    if multiple >= 1:  # a longer step than epsilon is the step of epsilon: GradAlign's 1.25 is FGSM
        fgsm = slow_step(torch.zeros_like(x), gradient, x, EPS, EPS)
        torch.testing.assert_close(delta, fgsm, **EXACT)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_input_gradient_is_the_gradient_of_the_mean(float64, hard, training):
    model = SmallNetwork(F.softplus).train(training)
    x, y, target = images(), torch.randint(CLASSES, (BATCH,)), probabilities()
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    gradient = attacks.input_gradient(ours, x, y if hard else target)
    expected = slow_gradient(theirs, x, one_hot(y, CLASSES) if hard else target)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert not gradient.requires_grad
    assert_same_statistics(ours, theirs)
    # ... and the transcription's own gradient is right: a difference quotient at a few pixels.
    label = one_hot(y, CLASSES) if hard else target
    for position in [(0, 0, 0, 0), (1, 1, 2, 3), (3, 0, 3, 1)]:
        step = torch.zeros_like(x)
        step[position] = 1e-5
        quotient = slow_cross_entropy(model(x + step), label) - slow_cross_entropy(model(x - step), label)
        assert float(quotient.detach()) / 2e-5 == pytest.approx(float(gradient[position]), rel=1e-6, abs=1e-9)


def test_a_start_outside_the_image_is_clipped_first(float64):
    """The published code clips eta before the first forward pass; a small step shows what was clipped."""
    model = SmallNetwork().train()
    x, target = images(), probabilities()
    eta, alpha = noise(x, EPS), EPS / 8
    assert float((x + eta).min()) < 0 and float((x + eta).max()) > 1
    delta = train_fgsm_rs.perturb(model, x, target, eta, EPS, alpha)
    torch.testing.assert_close(delta, slow_rs(model, x, target, eta, EPS, alpha), **EXACT)
    delta = train_pgd_at.perturb(model, x, target, eta, EPS, alpha, 2)
    torch.testing.assert_close(delta, slow_pgd_at(model, x, target, eta, EPS, alpha, 2), **EXACT)


def test_fgsm_rs_on_a_linear_network_without_automatic_differentiation(float64):
    """The gradient of softmax cross-entropy is W^T (p - q) / B, here in Python loops."""
    weight, bias = torch.randn(CLASSES, CHANNELS * SIDE * SIDE), torch.randn(CLASSES)
    model = LinearNetwork(weight, bias)
    x, target = images(), probabilities()
    eta = slow_into_image(noise(x, EPS), x)
    expected = []
    for image, start, q in zip(x.flatten(1).tolist(), eta.flatten(1).tolist(), target.tolist()):
        point = [pixel + e for pixel, e in zip(image, start)]
        logits = [
            sum(w * p for w, p in zip(row, point)) + b for row, b in zip(weight.tolist(), bias.tolist())
        ]
        total = sum(math.exp(z) for z in logits)
        residual = [math.exp(z) / total - probability for z, probability in zip(logits, q)]
        for index, (pixel, e) in enumerate(zip(image, start)):
            slope = sum(float(weight[c, index]) * residual[c] for c in range(CLASSES)) / BATCH
            expected.append(clip(clip(e + 1.25 * EPS * sign(slope), -EPS, EPS), -pixel, 1 - pixel))
    delta = train_fgsm_rs.perturb(model, x, target, eta, EPS, 1.25 * EPS)
    torch.testing.assert_close(delta, torch.tensor(expected).view(x.shape), **EXACT)


def test_a_zero_gradient_does_not_move_a_pixel(float64):
    weight = torch.randn(CLASSES, CHANNELS * SIDE * SIDE)
    weight[:, :8] = 0
    model = LinearNetwork(weight, torch.zeros(CLASSES))
    x, target = images(), probabilities()
    eta = slow_into_image(noise(x, EPS), x)
    for delta in [
        train_fgsm_rs.perturb(model, x, target, eta, EPS, EPS),
        train_pgd_at.perturb(model, x, target, eta, EPS, EPS / 4, 3),
    ]:
        assert torch.equal(delta.flatten(1)[:, :8], eta.flatten(1)[:, :8])
        assert not torch.equal(delta.flatten(1)[:, 8:], eta.flatten(1)[:, 8:])


# ----------------------------------------------------------------------------------------------------------
# 1b. Whole training runs replayed: outer losses, optimizers, BatchNorm's passes and their order
# ----------------------------------------------------------------------------------------------------------


class Recording:
    """A real training run on the digits: its first network, every batch and its noise, its last network."""

    def __init__(self, script, monkeypatch, tmp_path, **options):
        self.batches, self.losses, self.passes, self.etas = [], [], [], []
        self.generator = self.first_generator = None
        start, perturb, update = engine.Run.__init__, script.perturb, engine.Run.update

        def started(run, *arguments, **keywords):
            start(run, *arguments, **keywords)
            self.run, self.first_model = run, copy.deepcopy(run.model)

        def perturbed(*arguments):
            if isinstance(arguments[1], nn.Module) and self.generator is None:
                self.generator, self.first_generator = arguments[1], copy.deepcopy(arguments[1])
            kept = [value.detach().clone() if torch.is_tensor(value) else value for value in arguments]
            delta = perturb(*arguments)
            self.batches.append((kept, delta.detach().clone()))
            return delta

        def updated(run, loss, *arguments, **keywords):
            self.losses.append(float(loss.detach()))
            self.passes.append(passes(run.model))
            return update(run, loss, *arguments, **keywords)

        monkeypatch.setattr(engine.Run, "__init__", started)
        monkeypatch.setattr(engine.Run, "update", updated)
        monkeypatch.setattr(script, "perturb", perturbed)
        if hasattr(script, "misalignment"):
            misalignment = script.misalignment

            def misaligned(*arguments, **named):
                self.etas.append([value.detach().clone() for value in arguments[1:]])
                return misalignment(*arguments, **named)

            monkeypatch.setattr(script, "misalignment", misaligned)
        self.cfg = script.Config(
            dataset="digits", epsilon=24, epochs=2, batch_size=64, train_size=160, val_size=40, lr=0.1,
            lr_schedule="cyclic", measure="pgd10", device="cpu", out_dir=str(tmp_path), **options,
        )  # fmt: skip
        script.main(self.cfg)
        self.model = self.run.model

    def optimizer(self, model):
        """The common recipe by torch's own means: 6 steps (2 epochs of 3 batches), momentum cycling too."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=0, max_lr=0.1, step_size_up=3, step_size_down=3
        )

        def descend(loss):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        return descend


def passes(model):
    return max(int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))


def bounded(delta, eps):
    """The published clamp, torch.max(torch.min(.)): at a tie half of the gradient passes."""
    bound = torch.full_like(delta, eps)
    return torch.max(torch.min(delta, bound), -bound)


def in_image(delta, x):
    return torch.max(torch.min(delta, 1 - x), 0 - x)


def leaf_gradient(model, point, target):
    point = point.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(point), target), point)[0]


def assert_replayed(model, recorded, what):
    """Equal but for float32 rounding, over parameters and BatchNorm's statistics."""
    for (name, ours), (_, theirs) in zip(recorded.state_dict().items(), model.state_dict().items()):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{what} {name}: {text}"
        )


def assert_uniform(eta, eps):
    assert float(eta.abs().max()) <= eps * (1 + 1e-6)
    assert float(eta.abs().max()) >= 0.98 * eps
    assert float(eta.std()) == pytest.approx(eps / math.sqrt(3), rel=0.05)
    assert abs(float(eta.mean())) < 0.05 * eps


def test_a_run_of_fgsm_rs_replayed(monkeypatch, tmp_path):
    recording = Recording(train_fgsm_rs, monkeypatch, tmp_path)
    model = recording.first_model.train()
    descend = recording.optimizer(model)
    eps, alpha = 24 / 255, 30 / 255
    for (arguments, ours), recorded_loss in zip(recording.batches, recording.losses, strict=True):
        _, x, target, eta, *_ = arguments
        inner = (x > eps) & (x < 1 - eps)
        assert_uniform(eta[inner], eps)
        eta = in_image(eta, x)
        delta = in_image(bounded(eta + alpha * leaf_gradient(model, x + eta, target).sign(), eps), x)
        assert float((delta - ours).abs().gt(1e-6).double().mean()) < 1e-3
        loss = F.cross_entropy(model(x + delta), target)
        assert recorded_loss == pytest.approx(float(loss.detach()), rel=1e-4)
        descend(loss)
    assert recording.passes == [2, 4, 6, 8, 10, 12]
    assert_replayed(model, recording.model, "FGSM-RS")


@pytest.mark.parametrize("attack_bn", ["train", "eval"])
def test_a_run_of_pgd_at_replayed(monkeypatch, tmp_path, attack_bn):
    recording = Recording(train_pgd_at, monkeypatch, tmp_path, steps=4, attack_bn=attack_bn)
    model = recording.first_model.train()
    descend = recording.optimizer(model)
    eps, alpha = 24 / 255, 6 / 255
    for (arguments, ours), recorded_loss in zip(recording.batches, recording.losses, strict=True):
        _, x, target, eta, *_ = arguments
        delta = in_image(eta, x)
        model.train(attack_bn == "train")
        for _ in range(4):
            delta = in_image(bounded(delta + alpha * leaf_gradient(model, x + delta, target).sign(), eps), x)
        model.train()
        assert float((delta - ours).abs().gt(1e-6).double().mean()) < 1e-3
        loss = F.cross_entropy(model(x + delta), target)
        assert recorded_loss == pytest.approx(float(loss.detach()), rel=1e-4)
        descend(loss)
    each = 5 if attack_bn == "train" else 1
    assert recording.passes == [each * number for number in range(1, 7)]
    assert_replayed(model, recording.model, "PGD-AT")


@pytest.mark.parametrize("options, factor, alpha, lr", [
    ({}, 0.5, 24 / 255, 1e-3), (dict(label_factor=0.9, alpha=12.0, generator_lr=3e-3), 0.9, 12 / 255, 3e-3)])
def test_a_run_of_fgsm_sdi_replayed(options, factor, alpha, lr, monkeypatch, tmp_path):
    recording = Recording(train_fgsm_sdi, monkeypatch, tmp_path, k=2, **options)
    model, generator = recording.first_model.train(), recording.first_generator
    descend = recording.optimizer(model)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=lr, weight_decay=5e-4)
    eps = 24 / 255
    calls, losses = iter(recording.batches), iter(recording.losses)
    counted, expected_passes = 0, []

    def adversarial_loss(arguments, ours, s_x):
        x, y = arguments[2], arguments[3]
        target = torch.full((len(y), 10), (1 - factor) / 9)
        target[torch.arange(len(y)), y] = factor
        eta = eps * generator(x, s_x)
        step = (alpha * leaf_gradient(model, x + eta, y).sign()).clamp(-eps, eps)
        delta = bounded(eta + step, eps)
        assert float((delta - ours).detach().abs().gt(1e-6).double().mean()) < 1e-3
        return F.cross_entropy(model(x + delta), target)

    for _ in range(2):
        for batch in range(3):
            arguments, ours = next(calls)
            x, y = arguments[2], arguments[3]
            s_x = leaf_gradient(model, x, y).sign()
            assert float((s_x - arguments[4]).abs().gt(0).double().mean()) < 1e-3
            if batch % 2 == 0:  # the count restarts with the epoch
                generator.train()
                loss = adversarial_loss(arguments, ours, s_x)
                assert next(losses) == pytest.approx(-float(loss.detach()), rel=1e-4)
                generator_optimizer.zero_grad()
                (-loss).backward()
                generator_optimizer.step()
                model.zero_grad()
                expected_passes.append(counted + 3)
                counted += 2
                arguments, ours = next(calls)
                assert torch.equal(arguments[2], x)
            generator.eval()
            loss = adversarial_loss(arguments, ours, s_x)
            assert next(losses) == pytest.approx(float(loss.detach()), rel=1e-4)
            descend(loss)
            counted += 3
            expected_passes.append(counted)
    assert next(calls, None) is None and next(losses, None) is None
    assert recording.passes == expected_passes == [3, 5, 8, 11, 13, 16, 18, 21, 24, 26]
    assert_replayed(model, recording.model, "FGSM-SDI")
    assert_replayed(generator, recording.generator, "generator")


def test_a_run_of_fgsm_ga_replayed(monkeypatch, tmp_path):
    recording = Recording(train_fgsm_ga, monkeypatch, tmp_path, ga_lambda=0.7, label_factor=0.8)
    model = recording.first_model.train()
    descend = recording.optimizer(model)
    eps, alpha = 24 / 255, 30 / 255
    for (arguments, ours), (_, target, _, eta), recorded_loss in zip(
        recording.batches, recording.etas, recording.losses, strict=True
    ):
        x = arguments[0]
        assert_uniform(eta, eps)
        assert target.amax(1).tolist() == pytest.approx([0.8] * len(target))
        assert float((x + eta).min()) < 0, "x + eta must not be clipped to the image"
        gradient = leaf_gradient(model, x, target)
        delta = in_image(bounded(alpha * gradient.sign(), eps), x)
        assert float((delta - ours).abs().gt(1e-6).double().mean()) < 1e-3
        loss = F.cross_entropy(model(x + delta), target)
        point = (x + eta).requires_grad_()
        moved = torch.autograd.grad(F.cross_entropy(model(point), target), point, create_graph=True)[0]
        one, other = gradient.flatten(1), moved.flatten(1)
        kept = (one.norm(dim=1) != 0) & (other.norm(dim=1) != 0)
        cosine = (one * other).sum(1)[kept] / (one.norm(dim=1) * other.norm(dim=1))[kept]
        loss = loss + 0.7 * (1 - cosine.mean())
        assert recorded_loss == pytest.approx(float(loss.detach()), rel=1e-4)
        descend(loss)
    assert recording.passes == [3, 6, 9, 12, 15, 18]
    assert_replayed(model, recording.model, "FGSM-GA")


# ----------------------------------------------------------------------------------------------------------
# 2. Threat model
# ----------------------------------------------------------------------------------------------------------


def every_pixel_value(batch=6):
    """All 256 values of a byte as the data give them, (batch, 1, 16, 16) in float32."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    return (values.float() / 255).repeat(batch, 1, 1, 1)


def assert_in_bound(delta, eps):
    assert float(delta.abs().max()) <= float(torch.tensor(eps, dtype=delta.dtype))


def assert_image(x):
    assert float(x.min()) >= 0 and float(x.max()) <= 1


def perturbations(model, x, eps):
    """Each method that promises both the bound and the image, from noise as wide as the bound."""
    target = torch.softmax(torch.randn(len(x), CLASSES), 1)
    y = torch.randint(CLASSES, (len(x),))
    eta = utils.inside_image(noise(x, eps), x)
    gradient = attacks.input_gradient(model, x, target)
    return {
        "FGSM-RS": train_fgsm_rs.perturb(model, x, target, eta, eps, 1.25 * eps),
        "PGD-AT": train_pgd_at.perturb(model, x, target, eta, eps, eps / 4, 3),
        "FGSM-GA": train_fgsm_ga.perturb(x, gradient, eps, 1.25 * eps),
        "PGD": attacks.pgd(model, x, y, eps=eps, alpha=eps / 4, steps=3, start=noise(x, eps)),
        "FGSM": attacks.fgsm(model, x, y, eps=eps),
    }


@pytest.mark.parametrize("epsilon", [1, 2, 4, 8, 12, 16, 76.5])
def test_bound_and_image_hold_exactly_in_float32(epsilon):
    x, eps = every_pixel_value(), epsilon / 255
    model = SmallNetwork(channels=1, side=16)
    for training in (True, False):
        for name, delta in perturbations(model.train(training), x, eps).items():
            assert delta.dtype == torch.float32, name
            assert_in_bound(delta, eps)
            assert_image(x + delta)
            assert float(delta.abs().max()) > 0.99 * eps, name


@pytest.mark.parametrize("epsilon", [2, 8, 76.5])
def test_fgsm_sdi_holds_the_bound_and_not_the_image(epsilon):
    x, eps = every_pixel_value(), epsilon / 255
    model, generator = SmallNetwork(channels=1, side=16), TanhGenerator()
    y = torch.randint(CLASSES, (len(x),))
    s_x = attacks.input_gradient(model, x, y).sign()
    delta = train_fgsm_sdi.perturb(model, generator, x, y, s_x, eps, eps).detach()
    assert_in_bound(delta, eps)
    assert float((x + delta).min()) < 0
    assert float((x + delta).max()) > 1


def test_inside_image_is_exact_for_every_byte():
    """In float32, where x + (1 - x) might round to something above 1."""
    x = every_pixel_value(1).view(1, 1, 1, 256).repeat(1001, 1, 1, 1)
    delta = torch.linspace(-1.5, 1.5, 1001).view(-1, 1, 1, 1).expand_as(x)
    for divided in (x, x.double().mul(255).round().mul(1 / 255).float()):  # two ways to divide by 255
        kept = utils.inside_image(delta, divided)
        assert_image(divided + kept)
        loose = (divided.double() + delta > 1e-6) & (divided.double() + delta < 1 - 1e-6)
        assert torch.equal(kept[loose], delta[loose])
        assert float((divided + kept - (divided + delta).clamp(0, 1)).abs().max()) < 2e-7


def test_inside_image_stops_the_gradient_and_leaves_its_arguments():
    x = torch.rand(2, 1, 3, 3)
    delta = torch.randn(2, 1, 3, 3, requires_grad=True)
    before = x.clone(), delta.detach().clone()
    assert not utils.inside_image(delta, x).requires_grad
    assert torch.equal(x, before[0]) and torch.equal(delta, before[1])


def test_project_and_its_derivative_with_ties():
    eps = 0.125  # a power of two, so that the ties are exact
    values = [-1.0, -0.25, -0.125, -0.0625, 0.0, 0.0625, 0.125, 0.1251, 3.0]
    delta = torch.tensor(values, requires_grad=True)
    projected = utils.project(delta, eps)
    assert projected.tolist() == [clip(value, -eps, eps) for value in values]
    weights = torch.arange(1.0, len(values) + 1)
    (gradient,) = torch.autograd.grad((projected * weights).sum(), delta)
    derivative = [1.0 if abs(value) < eps else 0.5 if abs(value) == eps else 0.0 for value in values]
    assert (gradient / weights).tolist() == derivative


@pytest.mark.parametrize("epsilon", [1, 3, 8, 10, 16, 76.5])
def test_project_ties_at_a_bound_that_float32_rounds(epsilon):
    """alpha = eps makes ties common; the bound must be the same number in the value and in the derivative."""
    eps = epsilon / 255
    delta = (eps * torch.tensor([1.0, -1.0, 0.5, 1.5])).requires_grad_()
    projected = utils.project(delta, eps)
    (gradient,) = torch.autograd.grad(projected.sum(), delta)
    assert gradient.tolist() == [0.5, 0.5, 1.0, 0.0]
    assert_in_bound(projected.detach(), eps)


# ----------------------------------------------------------------------------------------------------------
# 3. The evaluation's attacks
# ----------------------------------------------------------------------------------------------------------


def correct_labels(model, x):
    with torch.no_grad():
        return torch.tensor([slow_class(row) for row in model(x)])


def binary(weight, bias):
    """Logits (-w x - b, w x + b) / 2: class 1 where w x + b > 0."""
    return LinearNetwork(torch.stack([-weight, weight]) / 2, torch.tensor([-bias, bias]) / 2)


def test_predict_is_the_largest_logit(float64):
    model = SmallNetwork().eval()
    x = images(9)
    predicted = attacks.predict(model, x)
    assert predicted.dtype == torch.int64
    assert torch.equal(predicted, correct_labels(model, x))


def test_fgsm_is_one_step_of_epsilon(float64):
    """Eq. 3, clipped to the image; unlike PGD it moves misclassified images too."""
    model = SmallNetwork().eval()
    x = images(8)
    y = correct_labels(model, x)
    y[:3] = (y[:3] + 1) % CLASSES
    delta = attacks.fgsm(model, x, y, eps=EPS)
    expected = slow_step(torch.zeros_like(x), slow_gradient(model, x, one_hot(y, CLASSES)), x, EPS, EPS)
    torch.testing.assert_close(delta, expected, **EXACT)


def test_one_step_of_pgd_from_zero_is_fgsm(float64):
    model = SmallNetwork().eval()
    x = images(8)
    y = correct_labels(model, x)
    one_step = attacks.pgd(model, x, y, eps=EPS, alpha=EPS, steps=1)
    torch.testing.assert_close(one_step, attacks.fgsm(model, x, y, eps=EPS), **EXACT)
    assert float(one_step.abs().max()) == pytest.approx(EPS)


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
@pytest.mark.parametrize("start", ["zero", "noise"])
def test_pgd_is_the_loop_over_single_images(float64, steps, start):
    model = SmallNetwork().eval()
    x = images(12)
    y = correct_labels(model, x)
    y[::4] = (y[::4] + 1) % CLASSES  # some are misclassified from the beginning
    eps = 0.2
    begin = torch.zeros_like(x) if start == "zero" else noise(x, eps)
    delta = attacks.pgd(
        model, x, y, eps=eps, alpha=eps / 5, steps=steps, start=None if start == "zero" else begin
    )
    expected = slow_attack(model, x, y, begin, eps, eps / 5, steps)
    torch.testing.assert_close(delta, expected, **EXACT)
    assert not delta.requires_grad
    if steps == 8:  # otherwise this test says nothing about stopping midway
        lengths = [slow_attack(model, x, y, begin, eps, eps / 5, count) for count in range(9)]
        moved = [[not torch.equal(a[i], b[i]) for a, b in zip(lengths, lengths[1:])] for i in range(12)]
        assert any(flags[0] and not flags[-1] for flags in moved)
        assert any(not flags[0] for flags in moved) and any(flags[-1] for flags in moved)


def test_pgd_on_a_linear_network_has_a_closed_form(float64):
    """The margin falls fastest along the sign of the weights: -+eps sign(w), as far as the image lets."""
    weight = torch.randn(CHANNELS * SIDE * SIDE)
    weight[5] = 0
    x = images(6)
    for label, bias in [(1, 100.0), (0, -100.0)]:  # so wide a margin that nothing is ever misclassified
        model, y = binary(weight, bias), torch.full((6,), label)
        direction = [-sign(w) if label else sign(w) for w in weight.tolist()]
        expected = torch.empty_like(x)
        for sample in range(6):
            for index, way in enumerate(direction):
                pixel = float(x[sample].view(-1)[index])
                expected[sample].view(-1)[index] = clip(way * EPS, -pixel, 1 - pixel)
        # A margin of 100 leaves a gradient of exp(-100), far from underflow in float64.
        for loss in (F.cross_entropy, attacks.margin):
            delta = attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=4, loss=loss)
            torch.testing.assert_close(delta, expected, **EXACT)
            start = noise(x, EPS)
            delta = attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=8, start=start, loss=loss)
            mask = (weight != 0).view(1, CHANNELS, SIDE, SIDE).expand_as(x)
            torch.testing.assert_close(delta[mask], expected[mask], **EXACT)


def test_pgd_decides_exactly_which_images_a_linear_network_can_keep(float64):
    """An image survives if and only if its margin exceeds what the closed form can take away."""
    weight = torch.randn(CHANNELS * SIDE * SIDE)
    x = images(64)
    model = binary(weight, -float(x.flatten(1).mean(0) @ weight))
    y, eps = correct_labels(model, x), 0.1
    delta = attacks.pgd(model, x, y, eps=eps, alpha=eps / 4, steps=10)
    survives = []
    for image, label in zip(x.flatten(1), y.tolist()):
        way = 1 if label else -1
        value = way * (float(image @ weight) - float(x.flatten(1).mean(0) @ weight))
        for pixel, w in zip(image.tolist(), weight.tolist()):
            value += way * w * clip(-way * sign(w) * eps, -pixel, 1 - pixel)
        survives.append(value > 0)
    assert (attacks.predict(model, x + delta) == y).tolist() == survives
    assert 0 < sum(survives) < 64


def test_more_steps_never_raise_accuracy(float64):
    weight = torch.randn(CHANNELS * SIDE * SIDE)
    x = images(64)
    linear = binary(weight, -float(x.flatten(1).mean(0) @ weight))
    for model in (linear, SmallNetwork().eval()):
        y = correct_labels(model, x)
        start = noise(x, 0.02)
        accuracies = []
        for steps in range(16):
            delta = attacks.pgd(model, x, y, eps=0.15, alpha=0.01, steps=steps, start=start)
            accuracies.append(float((attacks.predict(model, x + delta) == y).double().mean()))
        assert all(later <= earlier for earlier, later in zip(accuracies, accuracies[1:]))
        assert accuracies[-1] < accuracies[0]


def test_pgd_has_no_memory(float64):
    model = SmallNetwork().eval()
    x = images(16)
    y = correct_labels(model, x)
    options = {"eps": 0.1, "alpha": 0.013}  # no divisor of eps: the iterates keep moving
    start = noise(x, 0.1)
    half = attacks.pgd(model, x, y, steps=10, start=start, **options)
    whole = attacks.pgd(model, x, y, steps=20, start=start, **options)
    torch.testing.assert_close(attacks.pgd(model, x, y, steps=10, start=half, **options), whole, **EXACT)
    assert not torch.equal(half, whole)


def test_pgd_leaves_misclassified_images_and_its_arguments(float64):
    model = SmallNetwork().eval()
    x = images(10)
    y = (correct_labels(model, x) + 1) % CLASSES
    start = noise(x, EPS)
    before = x.clone(), y.clone(), start.clone()
    # Where the start alone does not make an image correct, the attack returns that start, clipped.
    kept = slow_into_image(start, x)
    still = correct_labels(model, x + kept) != y
    assert still.any()
    moved = attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=5, start=start)
    torch.testing.assert_close(moved[still], kept[still], **EXACT)
    assert not attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=5).any()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and torch.equal(start, before[2])


def test_margin_is_the_loop(float64):
    logits = torch.randn(20, 7, requires_grad=True)
    y = torch.randint(7, (20,))
    value = attacks.margin(logits, y)
    assert float(value.detach()) == pytest.approx(slow_margin(logits, y), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, logits)
    expected = torch.zeros(20, 7)
    for sample, label in enumerate(y.tolist()):
        row = logits[sample].tolist()
        runner_up = max((column for column in range(7) if column != label), key=lambda column: row[column])
        expected[sample, runner_up] = 1 / 20
        expected[sample, label] = -1 / 20
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_margin_with_a_large_true_logit_and_without_a_hinge():
    logits = torch.tensor([[1e6, -1e6, -2e6], [-1e30, 0.0, 5.0]])
    assert float(attacks.margin(logits[:1], torch.tensor([0]))) == -2e6
    assert float(attacks.margin(logits[1:], torch.tensor([0]))) == pytest.approx(1e30)
    assert float(attacks.margin(logits[:1], torch.tensor([1]))) == 2e6


def test_pgd_at_is_the_evaluations_pgd_while_nothing_is_misclassified(float64):
    model = SmallNetwork().eval()
    x = images(24)
    y = correct_labels(model, x)
    start, steps = noise(x, EPS), 6
    # Keep the images that stay correct at every iterate; in evaluation mode an image does not see the others.
    stays = torch.ones(24, dtype=torch.bool)
    for count in range(steps + 1):
        delta = slow_attack(model, x, y, start, EPS, EPS / 4, count)
        stays &= correct_labels(model, x + delta) == y
    assert 3 < int(stays.sum())
    x, y, start = x[stays], y[stays], start[stays]
    evaluated = attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=steps, start=start)
    eta = slow_into_image(start, x)
    trained = train_pgd_at.perturb(model, x, one_hot(y, CLASSES), eta, EPS, EPS / 4, steps)
    torch.testing.assert_close(trained, evaluated, **EXACT)


def test_pgd_at_moves_misclassified_images_too(float64):
    """Rice et al. stop early only in evaluation."""
    model = SmallNetwork().eval()
    x = images(6)
    y = (correct_labels(model, x) + 1) % CLASSES
    delta = train_pgd_at.perturb(model, x, one_hot(y, CLASSES), torch.zeros_like(x), EPS, EPS / 4, 4)
    assert (delta.flatten(1).abs().amax(1) > EPS / 2).all()
    assert not attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=4).any()


# ----------------------------------------------------------------------------------------------------------
# 4. FGSM-SDI: what the generator learns from
# ----------------------------------------------------------------------------------------------------------


def derivative_of_projection(total, eps):
    return pixel_by_pixel(lambda v: 1.0 if abs(v) < eps else 0.5 if abs(v) == eps else 0.0, total)


def loss_slope(model, x, delta, target):
    """d loss / d delta at a given delta."""
    return slow_gradient(model, x + delta, target)


def sdi_case(activation=F.softplus):
    model, generator = SmallNetwork(activation).train(), TanhGenerator()
    x, y, target = images(), torch.randint(CLASSES, (BATCH,)), probabilities()
    s_x = pixel_by_pixel(sign, slow_gradient(model, x, one_hot(y, CLASSES)))
    return model, generator, x, y, target, s_x


@pytest.mark.parametrize("multiple", [0.5, 1.0, 1.25])
def test_the_generators_gradient_by_hand(float64, multiple):
    model, generator, x, y, target, s_x = sdi_case()
    delta = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, multiple * EPS)
    parameters = [generator.a, generator.b, generator.c]
    gradients = torch.autograd.grad(F.cross_entropy(model(x + delta), target), parameters)

    total = slow_sdi_sum(model, generator, x, y, s_x, EPS, multiple * EPS)
    mask = derivative_of_projection(total, EPS)
    slope = loss_slope(model, x, pixel_by_pixel(lambda v: clip(v, -EPS, EPS), total), target)
    by_hand = [0.0, 0.0, 0.0]
    a, b, c = (float(parameter.detach()) for parameter in parameters)
    columns = [tensor.reshape(-1).tolist() for tensor in (x, s_x, slope, mask)]
    for pixel, s, g, m in zip(*columns):
        output = math.tanh(a * pixel + b * s + c)
        common = g * m * EPS * (1 - output**2)
        for index, factor in enumerate((pixel, s, 1.0)):
            by_hand[index] += common * factor
    for ours, expected in zip(gradients, by_hand):
        assert float(ours) == pytest.approx(expected, abs=1e-12)
        assert expected != 0


@pytest.mark.parametrize("multiple", [0.5, 1.0])
def test_taking_the_sign_as_constant_is_exact(float64, multiple):
    """A difference quotient through the whole perturbation, the sign computed afresh on either side."""
    model, generator, x, y, target, s_x = sdi_case()
    alpha, width = multiple * EPS, 1e-6

    def loss_and_mask(parameter, shift):
        with torch.no_grad():
            parameter += shift
        total = slow_sdi_sum(model, generator, x, y, s_x, EPS, alpha)
        delta = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, alpha)
        value = float(F.cross_entropy(model(x + delta), target).detach())
        with torch.no_grad():
            parameter -= shift
        return value, derivative_of_projection(total, EPS)

    for parameter in generator.parameters():
        delta = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, alpha)
        gradient = torch.autograd.grad(F.cross_entropy(model(x + delta), target), parameter)[0]
        above, mask_above = loss_and_mask(parameter, width)
        below, mask_below = loss_and_mask(parameter, -width)
        assert torch.equal(mask_above, mask_below), "choose a case without a kink"
        assert (above - below) / (2 * width) == pytest.approx(float(gradient), rel=1e-6)


def table_case(alpha):
    """Starts on a grid of quarters of eps, a linear network, pixels that it ignores."""
    eps = 0.125
    weight = torch.randn(CLASSES, CHANNELS * SIDE * SIDE)
    weight[:, 16:24] = 0
    model = LinearNetwork(weight, torch.randn(CLASSES))
    grid = torch.tensor([-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0])
    table = grid[torch.randint(9, (BATCH, CHANNELS, SIDE, SIDE))]
    table.view(BATCH, -1)[:, 16:20] = torch.tensor([1.0, -1.0, 0.0, 0.5])
    generator = TableGenerator(table)
    x, y = images(), torch.randint(CLASSES, (BATCH,))
    delta = train_fgsm_sdi.perturb(model, generator, x, y, torch.zeros_like(x), eps, alpha * eps)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((delta * weights).sum(), generator.table)
    signs = pixel_by_pixel(sign, slow_gradient(model, x + eps * table, one_hot(y, CLASSES)))
    return table, signs, gradient / (eps * weights)


def test_starts_that_agree_with_the_step_saturate(float64):
    """With alpha = eps only a start that disagrees with the step learns; a start of zero is a tie."""
    table, signs, derivative = table_case(alpha=1.0)
    seen = set()
    columns = [tensor.view(-1).tolist() for tensor in (table, signs, derivative)]
    for start, step, value in zip(*columns):
        if step == 0:  # a pixel that the network ignores
            expected = 0.5 if abs(start) == 1 else 1.0
        elif start * step > 0:
            expected = 0.0
        elif start == 0:
            expected = 0.5
        else:
            expected = 1.0
        seen.add((step == 0, expected))
        assert value == pytest.approx(expected, abs=1e-12), (start, step)
    assert seen == {(True, 0.5), (True, 1.0), (False, 0.0), (False, 0.5), (False, 1.0)}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_ties_give_one_half_at_any_step_size(float64, alpha):
    table, signs, derivative = table_case(alpha)
    expected = pixel_by_pixel(
        lambda start, step: (lambda total: 1.0 if total < 1 else 0.5 if total == 1 else 0.0)(
            abs(start + clip(alpha * step, -1, 1))
        ),
        table,
        signs,
    )
    torch.testing.assert_close(derivative, expected, **EXACT)
    assert set(expected.view(-1).tolist()) == {0.0, 0.5, 1.0}


def test_nothing_reaches_the_classifier_through_the_perturbation(float64):
    model, generator, x, y, target, s_x = sdi_case(F.relu)
    weights = list(model.parameters())
    delta = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, EPS)
    assert delta.requires_grad
    reached = torch.autograd.grad(delta.sum(), weights, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in reached)
    through = torch.autograd.grad(F.cross_entropy(model(x + delta), target), weights)
    cut = torch.autograd.grad(F.cross_entropy(model(x + delta.detach()), target), weights)
    for ours, expected in zip(through, cut):
        assert torch.equal(ours, expected)
    assert all(weight.grad is None and weight.requires_grad for weight in weights)


def test_a_frozen_generator_yields_a_constant(float64):
    model, generator, x, y, _, s_x = sdi_case()
    free = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, EPS)
    with utils.frozen(generator):
        constant = train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, EPS)
    assert free.requires_grad and not constant.requires_grad
    assert torch.equal(free.detach(), constant)


# ----------------------------------------------------------------------------------------------------------
# 5. Labels
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 200])
@pytest.mark.parametrize("factor", [1.0, 0.8, 0.6, 0.5])
def test_soft_labels_are_torchs_label_smoothing_of_another_strength(float64, classes, factor):
    y = torch.randint(classes, (7,))
    target = utils.soft_labels(y, classes, factor)
    rest = (1 - factor) / (classes - 1)
    expected = [
        [factor if column == label else rest for column in range(classes)] for label in y.tolist()
    ]
    torch.testing.assert_close(target.double(), torch.tensor(expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(target.double().sum(1), torch.ones(7), rtol=0, atol=1e-6)
    logits = 3 * torch.randn(7, classes)
    smoothing = classes * (1 - factor) / (classes - 1)
    if smoothing <= 1:
        ours = F.cross_entropy(logits, target.double())
        theirs = F.cross_entropy(logits, y, label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_soft_labels_of_the_paper():
    target = utils.soft_labels(torch.tensor([3]), 10, 0.5)
    assert target.shape == (1, 10) and target.is_floating_point()
    assert float(target[0, 3]) == 0.5
    others = [value for column, value in enumerate(target[0].tolist()) if column != 3]
    assert others == pytest.approx([0.5 / 9] * 9, abs=1e-8)
    assert float(utils.soft_labels(torch.tensor([0]), 10, 0.6)[0, 9]) == pytest.approx(0.4 / 9, abs=1e-8)
    hard = utils.soft_labels(torch.tensor([1, 0]), 3, 1.0)
    assert hard.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


# ----------------------------------------------------------------------------------------------------------
# 6. GradAlign
# ----------------------------------------------------------------------------------------------------------


class ThresholdNetwork(nn.Module):
    """Units that look only at bright pixels: a dark image has an input gradient of exactly zero."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.linear = nn.Linear(4 * SIDE * SIDE, CLASSES)

    def forward(self, x):
        return self.linear(torch.tanh(self.convolution(F.relu(x - 0.5).square())).flatten(1))


@pytest.mark.parametrize("activation", [F.softplus, torch.tanh, F.relu])
def test_misalignment_is_the_loop(float64, activation):
    model = SmallNetwork(activation).train()
    x, target = images(), probabilities()
    eta = noise(x, 0.2)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    gradient = slow_gradient(model, x, target)
    penalty = train_fgsm_ga.misalignment(ours, x, target, gradient, eta)
    expected = slow_misalignment(theirs, x, target, gradient, eta)
    torch.testing.assert_close(penalty, expected, **EXACT)
    assert penalty.shape == () and 0 < float(penalty.detach()) <= 2
    assert_same_statistics(ours, theirs)
    assert int(ours.bn.num_batches_tracked) == 1
    weights = list(ours.parameters())
    for one, other in zip(
        torch.autograd.grad(penalty, weights, allow_unused=True),
        torch.autograd.grad(expected, list(theirs.parameters()), allow_unused=True),
    ):
        one = torch.zeros(()) if one is None else one
        other = torch.zeros(()) if other is None else other
        torch.testing.assert_close(one + torch.zeros_like(other), other + torch.zeros_like(one), **EXACT)
    assert_same_parameters(ours, model)


def difference_quotient(function, parameters, width):
    quotients = []
    for parameter in parameters:
        flat = parameter.data.view(-1)
        for index in range(len(flat)):
            value = float(flat[index])
            flat[index] = value + width
            above = function()
            flat[index] = value - width
            below = function()
            flat[index] = value
            quotients.append((above - below) / (2 * width))
    return torch.tensor(quotients)


def test_gradient_of_the_penalty_takes_the_gradient_at_x_as_constant(float64):
    model = SmallNetwork(F.softplus).train()
    x, target = images(), probabilities()
    eta = noise(x, 0.3)
    gradient = attacks.input_gradient(model, x, target)
    weights = list(model.parameters())

    penalty = train_fgsm_ga.misalignment(model, x, target, gradient, eta)
    found = torch.autograd.grad(penalty, weights, allow_unused=True)
    ours = torch.cat([torch.zeros(w.numel()) if g is None else g.reshape(-1) for g, w in zip(found, weights)])

    def constant():
        return float(train_fgsm_ga.misalignment(model, x, target, gradient, eta).detach())

    def moving():
        at_x = attacks.input_gradient(model, x, target)
        return float(train_fgsm_ga.misalignment(model, x, target, at_x, eta).detach())

    expected = difference_quotient(constant, weights, 1e-5)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    both = difference_quotient(moving, weights, 1e-5)
    assert float((ours - both).norm() / both.norm()) > 1e-2, "the two derivatives must be told apart"



@pytest.mark.parametrize("where", ["at x", "at x + eta"])
def test_samples_with_a_zero_gradient_are_dropped(float64, where):
    model = ThresholdNetwork()
    x = 0.6 + 0.4 * torch.rand(BATCH, CHANNELS, SIDE, SIDE)
    eta = noise(x, 0.05)
    x[1] = 0.45 if where == "at x" else 0.55
    eta[1] = 0.1 if where == "at x" else -0.1
    target = probabilities()
    gradient = attacks.input_gradient(model, x, target)
    moved = attacks.input_gradient(model, x + eta, target)
    assert (slow_norm(gradient[1]) == 0) == (where == "at x")
    assert (slow_norm(moved[1]) == 0) == (where != "at x")

    penalty = train_fgsm_ga.misalignment(model, x, target, gradient, eta)
    rest = [0, 2, 3]
    cosines = []
    for sample in rest:
        dot = sum(p * q for p, q in zip(gradient[sample].view(-1).tolist(), moved[sample].view(-1).tolist()))
        cosines.append(dot / slow_norm(gradient[sample]) / slow_norm(moved[sample]))
    assert float(penalty.detach()) == pytest.approx(1 - sum(cosines) / 3, abs=1e-12)

    weights = list(model.parameters())
    ours = torch.autograd.grad(penalty, weights, allow_unused=True)
    # The same batch without the sample; the cosine does not mind that the mean's divisor changed.
    alone = train_fgsm_ga.misalignment(model, x[rest], target[rest], gradient[rest], eta[rest])
    for one, other in zip(ours, torch.autograd.grad(alone, weights, allow_unused=True)):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, **EXACT)


def test_a_batch_of_nothing_but_zero_gradients_costs_nothing(float64):
    model = ThresholdNetwork()
    x = torch.full((BATCH, CHANNELS, SIDE, SIDE), 0.2)
    target = probabilities()
    gradient = attacks.input_gradient(model, x, target)
    assert not gradient.any()
    penalty = train_fgsm_ga.misalignment(model, x, target, gradient, noise(x, EPS))
    assert float(penalty.detach()) == 0
    loss = F.cross_entropy(model(x), target) + penalty
    for gradient in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_cosine_is_per_sample_and_nan_at_zero(float64):
    a, b = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
    a[1], b[2], a[3], b[3] = 0, 0, 0, 0
    b[4] = -2 * a[4]
    a.requires_grad_(), b.requires_grad_()
    found = utils.cosine(a, b)
    assert found.shape == (5,)
    for sample in range(5):
        if sample in (1, 2, 3):
            assert math.isnan(float(found[sample].detach()))
            continue
        dot = sum(p * q for p, q in zip(a[sample].reshape(-1).tolist(), b[sample].reshape(-1).tolist()))
        expected = dot / slow_norm(a[sample]) / slow_norm(b[sample])
        assert float(found[sample].detach()) == pytest.approx(expected, abs=1e-12)
    for gradient in torch.autograd.grad(found.nanmean(), (a, b)):
        assert gradient.isfinite().all()
        assert not gradient[1:4].any() and gradient[0].any()


def test_cosine_of_small_gradients_is_differentiated_as_in_float64():
    """A sure network's: the product of two such norms is no number of fp32."""
    a, b = (1e-20 * torch.randn(3, 2, 4, 4) for _ in range(2))
    found = {}
    for dtype in (torch.float32, torch.float64):
        one, other = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
        value = utils.cosine(one, other)
        found[dtype] = value, *torch.autograd.grad(value.sum(), (one, other))
    for single, double in zip(found[torch.float32], found[torch.float64]):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3 * double.detach().abs().max().item())


@pytest.mark.parametrize("inputs, channels", [("image", 1), ("gradient", 1), ("both", 2)])
def test_fgsm_sdis_generator_sees_what_was_asked_for(inputs, channels, tmp_path):
    """Of the digits, with their one channel."""
    generator, _ = sdi_run(tmp_path, generator_input=inputs)
    assert next(value for value in generator.values() if value.ndim == 4).shape[1] == channels


def test_fgsm_sdis_generator_layouts_differ(tmp_path):
    code, paper = (sdi_run(tmp_path / layout, generator_layout=layout)[0].keys() for layout in ("code", "paper"))
    assert code != paper


@pytest.mark.parametrize("clips", [True, False])
def test_fgsm_sdi_clips_the_classifiers_images_where_asked(clips, tmp_path):
    _, trained_on = sdi_run(tmp_path, clip_image=clips, epsilon=128)
    assert any(low < 0 or high > 1 for low, high in trained_on) == (not clips)


def sdi_run(out_dir, **flags):
    """The generator's state after a short run on the digits, and the range of every batch that the classifier learnt on."""
    seen = []
    cfg = train_fgsm_sdi.Config(dataset="digits", train_size=48, val_size=8, batch_size=16, epochs=1, width=2, measure="pgd10", device="cpu",
                                out_dir=str(out_dir), k=1, **flags)
    update = engine.Run.update

    def watched(run, loss, optimizer=None, **more):
        if optimizer is None:
            seen.append(passed[-1])
        update(run, loss, optimizer, **more)

    passed, forward = [], networks.Classifier.forward

    def watched_forward(self, x):
        passed.append((x.detach().min().item(), x.detach().max().item()))
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Run, "update", watched)
        patch.setattr(networks.Classifier, "forward", watched_forward)
        train_fgsm_sdi.main(cfg)
    return torch.load(out_dir / "state.pth", weights_only=True)["kept"]["generator"], seen


# ----------------------------------------------------------------------------------------------------------
# 7. Defaults that follow --epsilon
# ----------------------------------------------------------------------------------------------------------

MULTIPLES = [
    (train_fgsm_rs, {}, 1.25),
    (train_fgsm_sdi, {}, 1.0),
    (train_fgsm_ga, {}, 1.25),
    (train_pgd_at, {}, 0.25),
    (train_pgd_at, {"steps": 10}, 0.25),
    (train_pgd_at, {"steps": 4}, 0.25),
    (train_pgd_at, {"steps": 2}, 0.5),
]


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
@pytest.mark.parametrize("script, options, multiple", MULTIPLES)
def test_step_sizes_follow_epsilon(script, options, multiple, dataset):
    for epsilon in (1, 4, 8, 10.5, 16):
        cfg = script.Config(dataset=dataset, epsilon=epsilon, **options)
        assert cfg.alpha == pytest.approx(multiple * epsilon, abs=1e-12)
        assert cfg.eps == pytest.approx(epsilon / 255, abs=1e-15)
        for alpha in (3, 0.5, 2 * epsilon):
            assert script.Config(dataset=dataset, epsilon=epsilon, alpha=alpha, **options).alpha == alpha
    default = script.Config(dataset=dataset, **options)
    assert default.alpha == pytest.approx(multiple * default.epsilon)
    assert dataset == "digits" or default.epsilon == 8


@pytest.mark.parametrize("script, options, multiple", MULTIPLES)
def test_step_sizes_follow_epsilon_on_the_command_line(script, options, multiple):
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    for epsilon in (4, 8, 16):
        given = ["--dataset", "digits", "--epsilon", str(epsilon), *flags]
        assert script.Config.parse(argv=given).alpha == pytest.approx(multiple * epsilon)
        assert script.Config.parse(argv=[*given, "--alpha", "3"]).alpha == 3


def test_the_papers_step_sizes_at_the_papers_radius():
    assert train_fgsm_rs.Config(epsilon=8).alpha == 10
    assert train_fgsm_sdi.Config(epsilon=8).alpha == 8
    assert train_pgd_at.Config(epsilon=8).alpha == 2
    assert train_pgd_at.Config(epsilon=8, steps=2).alpha == 4
    assert train_pgd_at.Config(epsilon=8, steps=4).alpha == 2


LAMBDAS = [
    0.027, 0.036, 0.047, 0.063, 0.084, 0.112, 0.150, 0.200,
    0.267, 0.356, 0.474, 0.632, 0.843, 1.124, 1.5, 2.0,
]  # fmt: skip


@pytest.mark.parametrize("epsilon, published", list(enumerate(LAMBDAS, 1)))
def test_gradaligns_weight_follows_epsilon(epsilon, published):
    cfg = train_fgsm_ga.Config(dataset="cifar10", epsilon=epsilon)
    # The published table cuts or rounds this to three decimals (1.12468 became 1.124).
    assert cfg.ga_lambda == pytest.approx(math.exp(epsilon * math.log(10) / 8 + math.log(0.02)), abs=1e-3)
    assert cfg.ga_lambda == pytest.approx(published, abs=1e-3)
    assert train_fgsm_ga.Config(dataset="cifar10", epsilon=epsilon, ga_lambda=0.3).ga_lambda == 0.3
    assert train_fgsm_ga.Config(dataset="cifar10", epsilon=epsilon, ga_lambda=0.0).ga_lambda == 0


# ----------------------------------------------------------------------------------------------------------
# 8. Schedules
# ----------------------------------------------------------------------------------------------------------


def torchs(make, steps, momentum=0.9):
    """(lr, momentum) of each step of one of torch's schedules with a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=momentum)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step()
    return rates


def ours(name, total, per_epoch):
    return [tuple(SCHEDULES[name](step, total, per_epoch)) for step in range(total)]


def assert_same_rates(found, expected):
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12), step


def test_multistep_at_110_epochs_of_cifar():
    expected = torchs(
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [39100, 41055], gamma=0.1), 43010
    )
    assert_same_rates(ours("multistep", 43010, 391), expected)


@pytest.mark.parametrize("per_epoch", [1, 3, 23])
@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 10, 11, 15, 22, 30, 33, 55, 100, 110, 111, 200])
def test_multistep_decays_at_any_number_of_epochs(epochs, per_epoch):
    """The published milestones are floats compared by equality, and never fire when they are no integers."""
    total = epochs * per_epoch
    exact = [total * 100 / 110, total * 105 / 110]
    rates = ours("multistep", total, per_epoch)
    first, second = (
        next((step for step, (lr, _) in enumerate(rates) if lr < level), total) for level in (0.5, 0.05)
    )
    assert abs(first - exact[0]) < 1 and abs(second - exact[1]) < 1
    if total % 22 == 0:
        assert (first, second) == (total * 10 // 11, total * 21 // 22)
    for step, (lr, momentum) in enumerate(rates):
        decays = (step >= first) + (step >= second)
        assert lr == pytest.approx(0.1**decays, rel=1e-12) and momentum == pytest.approx(0.9)
    if total >= 22:
        assert 0 < first < second < total


@pytest.mark.parametrize("epochs, per_epoch", [(30, 391), (1, 2), (1, 3), (2, 3), (15, 23), (7, 9)])
def test_cyclic_is_torchs_with_its_momentum(epochs, per_epoch):
    total = epochs * per_epoch
    expected = torchs(
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=0, max_lr=1, step_size_up=total / 2, step_size_down=total / 2
        ),
        total,
    )
    found = ours("cyclic", total, per_epoch)
    assert_same_rates(found, expected)
    assert found[0] == pytest.approx((0, 0.9))
    if total % 2 == 0:
        assert found[total // 2] == pytest.approx((1, 0.8))


@pytest.mark.parametrize("epochs", [2, 3, 4, 5, 9, 10, 15, 30, 110, 200])
@pytest.mark.parametrize("per_epoch", [1, 23])
def test_onecycle_is_torchs_stepped_once_an_epoch(epochs, per_epoch):
    rates = torchs(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=epochs), epochs
    )
    expected = [rate for rate in rates for _ in range(per_epoch)]
    assert_same_rates(ours("onecycle", epochs * per_epoch, per_epoch), expected)


def test_constant_is_constant():
    assert set(ours("constant", 50, 5)) == {(1.0, 0.9)}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_stay_in_their_range(name):
    for epochs, per_epoch in [(1, 1), (1, 5), (2, 1), (3, 7), (30, 11)]:
        for lr, momentum in ours(name, epochs * per_epoch, per_epoch):
            assert 0 <= lr <= 1 + 1e-12 and 0.8 - 1e-12 <= momentum <= 0.95 + 1e-12


# ----------------------------------------------------------------------------------------------------------
# 9. What an attack leaves behind
# ----------------------------------------------------------------------------------------------------------


class WatchedProduct(torch.autograd.Function):
    """x W^T that notes whether its backward pass was asked for the gradient of W."""

    asked = []

    @staticmethod
    def forward(context, x, weight):
        context.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(context, above):
        x, weight = context.saved_tensors
        WatchedProduct.asked.append(tuple(context.needs_input_grad))
        return above @ weight, above.T @ x if context.needs_input_grad[1] else None


class WatchedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, CHANNELS * SIDE * SIDE))

    def forward(self, x):
        return WatchedProduct.apply(x.flatten(1), self.weight)


def attack_calls():
    """Everything that attacks a classifier, as functions of it."""
    x, y, target = images(), torch.randint(CLASSES, (BATCH,)), probabilities()
    s_x = torch.randint(-1, 2, x.shape).to(x)
    eta = torch.zeros_like(x)
    generator = TanhGenerator()
    return {
        "input_gradient": lambda model: attacks.input_gradient(model, x, y),
        "pgd": lambda model: attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=2),
        "margin pgd": lambda model: attacks.pgd(
            model, x, y, eps=EPS, alpha=EPS / 4, steps=2, loss=attacks.margin
        ),
        "fgsm": lambda model: attacks.fgsm(model, x, y, eps=EPS),
        "predict": lambda model: attacks.predict(model, x),
        "FGSM-RS": lambda model: train_fgsm_rs.perturb(model, x, target, eta, EPS, EPS),
        "PGD-AT": lambda model: train_pgd_at.perturb(model, x, target, eta, EPS, EPS / 4, 2),
        "FGSM-SDI": lambda model: train_fgsm_sdi.perturb(model, generator, x, y, s_x, EPS, EPS),
        "FGSM-CKPT": lambda model: train_fgsm_ckpt.direction(model, x, target, eta, EPS, EPS)[0],
        "GAIRAT": lambda model: train_gairat.perturb(model, x, y, target, eta, EPS, EPS / 4, 2)[0],
        "FAT": lambda model: train_fat.perturb(model, x, y, target, eta, EPS, EPS / 4, 2, 2, lambda: torch.zeros_like(x)),
    }


NAMES = ["input_gradient", "pgd", "margin pgd", "fgsm", "predict", "FGSM-RS", "PGD-AT", "FGSM-SDI", "FGSM-CKPT", "GAIRAT", "FAT"]


@pytest.mark.parametrize("name", NAMES)
def test_attacks_compute_no_weight_gradients(float64, name):
    attack = attack_calls()[name]
    WatchedProduct.asked.clear()
    attack(WatchedNetwork())
    assert all(wanted == (True, False) for wanted in WatchedProduct.asked)
    assert name == "predict" or WatchedProduct.asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_attacks_leave_the_classifier_as_it_was(float64, name, training):
    model = SmallNetwork().train(training)
    model.linear.bias.requires_grad_(False)
    model.convolution.weight.grad = torch.full_like(model.convolution.weight, 7.0)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    result = attack_calls()[name](model)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    for key, parameter in model.named_parameters():
        if key == "convolution.weight":
            assert torch.equal(parameter.grad, torch.full_like(parameter, 7.0))
        else:
            assert parameter.grad is None, key
        assert torch.equal(parameter, before[key]), key
    assert all(module.training == training for module in model.modules())
    assert name == "FGSM-SDI" or not result.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_attacks_restore_the_classifier_after_an_exception(float64, name):
    class Broken(SmallNetwork):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken()
    model.bn.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="broken"):
        attack_calls()[name](model)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key != "bn.weight") and parameter.grad is None, key
    assert all(module.training for module in model.modules())


def test_input_gradient_accepts_points_that_hang_on_a_graph(float64):
    """As FGSM-SDI's x + eta does; the point itself is left alone, and nothing flows back to the graph."""
    model = SmallNetwork().eval()
    x, y = images(), torch.randint(CLASSES, (BATCH,))
    root = torch.zeros_like(x, requires_grad=True)
    point = x + 2 * root
    gradient = attacks.input_gradient(model, point, y)
    torch.testing.assert_close(gradient, slow_gradient(model, x, one_hot(y, CLASSES)), **EXACT)
    assert not gradient.requires_grad and root.grad is None and point.requires_grad
    plain = x.clone()
    attacks.input_gradient(model, plain, y)
    assert not plain.requires_grad and plain.grad is None and torch.equal(plain, x)


def test_input_gradient_takes_any_loss(float64):
    model = SmallNetwork(F.softplus).eval()
    x, y = images(), torch.randint(CLASSES, (BATCH,))
    gradient = attacks.input_gradient(model, x, y, attacks.margin)
    for position in [(0, 0, 0, 1), (2, 1, 3, 0)]:
        step = torch.zeros_like(x)
        step[position] = 1e-6
        quotient = (slow_margin(model(x + step), y) - slow_margin(model(x - step), y)) / 2e-6
        assert quotient == pytest.approx(float(gradient[position]), rel=1e-6, abs=1e-9)


def test_frozen_restores_each_flag():
    model = SmallNetwork()
    model.bn.bias.requires_grad_(False)
    with utils.frozen(model) as inside:
        assert inside is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [key for key, parameter in model.named_parameters() if not parameter.requires_grad] == ["bn.bias"]
    with pytest.raises(KeyError), utils.frozen(model):
        raise KeyError
    assert [key for key, parameter in model.named_parameters() if not parameter.requires_grad] == ["bn.bias"]
    with utils.frozen(model), utils.frozen(model):
        pass
    assert model.linear.weight.requires_grad and not model.bn.bias.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_restores_the_mode(training):
    model = SmallNetwork().train(training)
    with utils.eval_mode(model):
        assert not any(module.training for module in model.modules())
        model(torch.rand(2, CHANNELS, SIDE, SIDE))
    assert all(module.training == training for module in model.modules())
    assert int(model.bn.num_batches_tracked) == 0
    with pytest.raises(KeyError), utils.eval_mode(model):
        raise KeyError
    assert all(module.training == training for module in model.modules())
    with utils.eval_mode(model, enabled=False):
        assert all(module.training == training for module in model.modules())
    assert all(module.training == training for module in model.modules())


def test_eval_mode_keeps_a_layer_that_was_in_evaluation_mode():
    model = SmallNetwork().train()
    model.bn.eval()
    with utils.eval_mode(model):
        assert not model.linear.training
    assert model.training and model.linear.training and not model.bn.training
