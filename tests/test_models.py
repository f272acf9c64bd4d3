"""The networks against the published ones: parameter names, shapes, counts and outputs.

`fixtures/published_keys.json` holds the state_dict keys and shapes of the published classes, and
`fixtures/published_outputs.json` what those classes compute in float64 from the weights of `fill` and the
inputs of `images`, in evaluation mode and then in training mode. Both were recorded from FGSM-SDI at d54cac6,
fast_adversarial at 54f7287, understanding-fast-adv-training at ceed494, LAS-AT at ee756b7, NuAT at 8962290,
robust_overfitting at c47a25c and Improving-Single-Step-Adversarial-Training-By-Local-Smoothing (VFSAT) at
9b877ea, for Tiny ImageNet with the last layer that it has as a comment. ResNet50 is compared with torchvision.
"""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import Bottleneck

import models
from published.strategy_keys import renamed

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED_KEYS = json.loads((FIXTURES / "published_keys.json").read_text())
PUBLISHED_OUTPUTS = json.loads((FIXTURES / "published_outputs.json").read_text())
VFSAT = "Improving-Single-Step-Adversarial-Training-By-Local-Smoothing/models.py"
GRADALIGN = "understanding-fast-adv-training/models.py"
STRATEGY = {"epsilon": 13, "steps": 12, "alpha": 5}
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))

TWINS = {  # published class: (our name, options)
    "FGSM-SDI/models/resnet.py": ("resnet18", {}),
    "FGSM-SDI/Cifar100_models/resnet.py": ("resnet18", {"classes": 100}),
    "FGSM-SDI/models/preact_resnet.py": ("preactresnet18a", {}),
    "FGSM-SDI/ImageNet_models/preact_resnet.py": ("preactresnet18a", {"classes": 200, "image_size": 64}),
    "fast_adversarial/CIFAR10/preact_resnet.py": ("preactresnet18b", {}),
    "robust_overfitting/preactresnet.py": ("preactresnet18d", {}),
    "NuAT/CIFAR10/ResNet.py": ("resnet18-nuat", {}),
    GRADALIGN: ("preactresnet18c", {}),
    f"{GRADALIGN} CNN 1 x 4": ("cnn1", {}),
    f"{GRADALIGN} CNN 4 x 16": ("cnn4", {}),
    f"{VFSAT} 34": ("preactresnet34", {}),
    f"{VFSAT} 34, Tiny": ("preactresnet34", {"classes": 200, "image_size": 64}),
    "FGSM-SDI/models/wide_resnet.py": ("wideresnet34-10-subblock", {}),
    "FGSM-SDI/ImageNet_models/wide_resnet.py": (
        "wideresnet34-10-subblock",
        {"classes": 200, "image_size": 64},
    ),
    "FGSM-SDI/models/wide_resnet.py width 1": ("wideresnet34-10-subblock", {"width": 1}),
    "FGSM-SDI/ImageNet_models/wide_resnet.py width 1": (
        "wideresnet34-10-subblock",
        {"width": 1, "classes": 200, "image_size": 64},
    ),
    "FGSM-SDI/attacker.py": ("generator", {}),
    "LAS-AT/LAS_PGD_AT/StrategyNet.py": ("strategy", {"actions": {"method": 1} | STRATEGY}),
    "LAS-AT/LAS_Trades/TinyImageNet_StrategyNet.py": (
        "strategy",
        {"actions": {"method": 1} | STRATEGY | {"beta": 5}, "image_size": 64},
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def create(name, options):
    if name == "strategy":
        return models.StrategyNetwork(**options)
    return models.PerturbationGenerator(**options) if name == "generator" else models.build(name, **options)


def weights(network):
    return {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("normalize.")}


def fill(state):
    """Weights that depend on nothing but names and shapes (numpy promises never to change this stream)."""
    for key, tensor in state.items():
        if key.startswith(("normalize.", "model_preact_hl1.", "sub_block1.")) or "num_batches" in key:
            continue
        noise = np.random.RandomState(zlib.crc32(key.encode())).uniform(-1, 1, tuple(tensor.shape))
        noise = torch.from_numpy(noise)
        if key.endswith("running_var"):
            noise = 1 + 0.5 * noise
        elif key.endswith(("running_mean", "bias")):
            noise = 0.2 * noise
        elif tensor.dim() == 1:
            noise = 1 + 0.3 * noise
        else:
            noise = noise * (6 / tensor[0].numel()) ** 0.5
        tensor.copy_(noise)


def images(size, channels=3, count=2):
    return torch.from_numpy(np.random.RandomState(size).uniform(0, 1, (count, channels, size, size)))


def tiny(name, **options):
    width = 1 if name.startswith("wide") else 4
    return models.build(name, **({"width": width, "classes": 3} | options)).double()


@pytest.mark.parametrize(
    "name, options, count",
    [
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"classes": 100}, 11_220_132),
        ("resnet18", {"classes": 200, "image_size": 64}, 11_271_432),
        ("resnet18-nuat", {}, 11_173_962),
        ("preactresnet18", {}, 11_171_146),
        ("preactresnet18a", {}, 11_171_146),
        ("preactresnet18b", {}, 11_172_170),
        ("preactresnet18c", {}, 11_171_146),
        ("preactresnet18d", {}, 11_172_170),
        ("preactresnet18", {"classes": 200, "image_size": 64}, 11_575_816),
        ("preactresnet18", {"classes": 200, "image_size": 32}, 11_268_616),
        ("preactresnet18-gap", {"classes": 200, "image_size": 64}, 11_268_616),
        ("preactresnet34", {}, 21_279_306),
        ("preactresnet34", {"classes": 200, "image_size": 64}, 21_683_976),
        ("resnet50", {"classes": 1000}, 25_557_032),
        ("resnet50", {"classes": 1000, "width": 128}, 68_883_240),
        ("wideresnet34-10", {}, 46_160_474),
        ("wideresnet34-10", {"classes": 100}, 46_218_164),
        ("wideresnet34-10-subblock", {}, 48_262_586),
        ("wideresnet34-10-subblock", {"classes": 100}, 48_320_276),
        ("wideresnet28-10", {}, 36_479_194),
        ("wideresnet34-20", {}, 184_531_674),
        ("wideresnet70-16", {}, 266_796_506),
        ("resnet8", {"channels": 1}, 77_754),
        ("cnn1", {}, 41_082),
        ("cnn1", {"width": 16}, 164_298),
        ("cnn1", {"width": 16, "channels": 1, "image_size": 28}, 125_610),
        ("cnn4", {}, 171_258),
        ("generator", {}, 79_174),
        ("strategy", {"actions": STRATEGY}, 11_184_222),
        ("strategy", {"actions": {"method": 1} | STRATEGY}, 11_184_735),
        ("strategy", {"actions": STRATEGY | {"beta": 5}, "image_size": 64}, 11_240_547),
    ],
)
def test_parameter_count(name, options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in create(name, options).parameters()) == count


@pytest.mark.parametrize("published", PUBLISHED_KEYS)
def test_published_weights_fit(published):
    expected = {key: tuple(shape) for key, shape in PUBLISHED_KEYS[published].items()}
    if published.startswith((GRADALIGN, VFSAT)):  # GradAlign registers its first layers a second time
        duplicates = {key: expected.pop(key) for key in list(expected) if key.startswith("model_preact_hl1.")}
        batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        again = {"1.weight", *(f"2.{key}" for key in batch_norm)}
        if "CNN" in published:
            again = {"0.weight", "0.bias"}
        assert set(duplicates) == {f"model_preact_hl1.{key}" for key in again}
    expected = renamed(expected)
    with torch.device("meta"):
        network = create(*TWINS[published])
    assert {key: tuple(tensor.shape) for key, tensor in weights(network).items()} == expected


@pytest.mark.parametrize("published", PUBLISHED_OUTPUTS)
def test_published_outputs(published):
    name, options = TWINS[published]
    network = create(name, options).double()
    state = network.state_dict()
    if name == "strategy":  # under the names that the published class has
        names = renamed({key: key for key in PUBLISHED_KEYS[published]})
        state = {names[key]: tensor for key, tensor in state.items()}
    fill(state)
    inputs = [images(options.get("image_size", 32))]
    if name == "generator":
        inputs = [images(4), images(4).sub(0.5).sign()]
    for mode in ("eval", "train"):
        network.train(mode == "train")
        with torch.no_grad():
            output = network(*inputs)
        if name == "strategy":
            output = torch.cat(list(output.values()), dim=1)
        expected = torch.tensor(PUBLISHED_OUTPUTS[published][mode], dtype=torch.float64)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_resnet50_is_torchvisions():
    options = {"num_classes": 7, "width_per_group": 8}
    theirs = torchvision.models.ResNet(Bottleneck, [3, 4, 6, 3], **options).double()
    torch.manual_seed(0)
    ours = models.build("resnet50", classes=7, width=8).double()
    torch.manual_seed(0)
    fresh = torchvision.models.ResNet(Bottleneck, [3, 4, 6, 3], **options).double()
    assert list(weights(ours)) == list(fresh.state_dict())
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in weights(ours).items())
    fill(theirs.state_dict())
    ours.load_state_dict(ours.state_dict() | theirs.state_dict())
    for training in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(ours.train(training)(images(48)), theirs.train(training)(images(48)))


def test_dead_block_changes_nothing():
    with_block, without = tiny("wideresnet34-10-subblock"), tiny("wideresnet34-10")
    state = with_block.state_dict()
    without.load_state_dict({key: state[key] for key in state if not key.startswith("sub_block1.")})
    assert torch.equal(with_block(images(16)), without(images(16)))
    assert not any(p.requires_grad for p in with_block.sub_block1.parameters())


def test_variants_with_equal_keys_differ():
    for one, other in (
        ("preactresnet18a", "preactresnet18c"),
        ("preactresnet18b", "preactresnet18d"),
        ("resnet18", "resnet18-nuat"),
    ):
        first, second = tiny(one), tiny(other)
        second.load_state_dict(first.state_dict())
        assert (first(images(16)) - second(images(16))).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="bn.weight"):
        tiny("preactresnet18a").load_state_dict(tiny("preactresnet18b").state_dict())


def test_variant_d_is_a_with_a_final_bn():
    plain, final = tiny("preactresnet18a"), tiny("preactresnet18d")
    final.load_state_dict(plain.state_dict(), strict=False)
    seen = []
    plain.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    plain(images(32))
    expected = final.linear(F.avg_pool2d(F.relu(final.bn(seen[0])), 4).flatten(1))
    torch.testing.assert_close(final(images(32)), expected)


def test_nuat_block_rectifies_before_the_sum():
    block = tiny("resnet18-nuat").layer2[0]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), F.relu(F.relu(residual) + block.shortcut(x)))


@pytest.mark.parametrize("name", models.NAMES)
def test_any_width_channels_and_size(name):
    network = tiny(name, channels=1, classes=7, image_size=8).eval()
    for size in (8,) if name.startswith("cnn") else (8, 28):
        assert network(images(size, channels=1)).shape == (2, 7)
    with torch.device("meta"):
        full, narrow = models.build(name), models.build(name, width=1)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in full.parameters()) / 3


@pytest.mark.parametrize("name", models.NAMES)
def test_every_parameter_learns(name):
    network = tiny(name, image_size=16)
    F.cross_entropy(network(images(16, count=4)), torch.tensor([0, 1, 2, 0])).backward()
    for key, parameter in network.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), key


def test_the_benchmarks_network_is_variant_a_with_global_pooling():
    """Its last pooling has a window of eight positions, all that a Tiny ImageNet image leaves."""
    network, windowed, small = tiny("preactresnet18-gap", image_size=64), tiny("preactresnet18a", image_size=64), tiny("preactresnet18a")
    small.load_state_dict(network.state_dict())
    seen = {}
    network.layer4.register_forward_hook(lambda *passed: seen.update(map=passed[2]))
    logits = network.eval()(images(64))
    assert seen["map"].shape[-2:] == (8, 8) and network.linear.in_features == windowed.linear.in_features / 4
    assert torch.equal(logits, small.eval()(images(64)))
    torch.testing.assert_close(logits, network.linear(seen["map"].mean((2, 3))))


def test_resnet8_has_eight_weighted_layers():
    network = models.build("resnet8", channels=1)
    layers = [key for key, tensor in weights(network).items() if tensor.dim() > 1 and "shortcut" not in key]
    assert len(layers) == 8 and network.conv1.out_channels == 16
    assert network.linear.in_features == 64
    assert not any(key.startswith("layer4") for key in weights(network))


def test_identity_normalisation_costs_nothing():
    network = models.build("resnet8")
    x = torch.rand(2, 3, 8, 8)
    assert network.normalize(x) is x
    assert network.state_dict()["normalize.mean"].tolist() == [0, 0, 0]
    assert network.state_dict()["normalize.std"].tolist() == [1, 1, 1]


def test_normalisation_is_the_first_layer():
    inside, outside = tiny("resnet8", normalise=CIFAR), tiny("resnet8")
    outside.load_state_dict(outside.state_dict() | weights(inside))
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in CIFAR)
    torch.testing.assert_close(inside(images(8)), outside((images(8) - mean) / std))


def test_normalisation_follows_the_loaded_state():
    x = torch.rand(2, 3, 8, 8)
    plain, normalised = models.build("resnet8").eval(), models.build("resnet8", normalise=CIFAR).eval()
    plain_copy, expected = copy.deepcopy(plain), normalised(x)
    plain.load_state_dict(normalised.state_dict())
    assert torch.equal(plain(x), expected) and plain.normalize(x) is not x
    assert plain_copy.normalize(x) is x
    plain.load_state_dict(plain_copy.state_dict())
    assert torch.equal(plain(x), plain_copy(x)) and plain.normalize(x) is x
    plain_copy.load_state_dict(normalised.state_dict())  # a copy decides by its own buffers
    assert torch.equal(plain_copy(x), expected) and plain.normalize(x) is x


def test_forward_never_reads_the_device():
    # A meta tensor has no values: any .item() or data-dependent branch raises.
    with torch.device("meta"):
        for normalise in (None, CIFAR):
            assert models.build("resnet8", normalise=normalise)(torch.rand(2, 3, 8, 8)).shape == (2, 10)
        materialised = models.build("resnet8")
    state = models.build("resnet8", normalise=CIFAR).state_dict()
    materialised.load_state_dict(state, assign=True)
    assert not materialised.normalize.identity


# But for a depth.
SAME_AT_THIS_WIDTH = {"preactresnet18", "preactresnet18-gap", "preactresnet34", "wideresnet34-20", "wideresnet70-16"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(set(models.NAMES) - SAME_AT_THIS_WIDTH))
def test_double_backward(name, training):
    """Gradient alignment's kind of derivative: of <input gradient, v>, along u in inputs and weights."""
    size = 64 if name == "resnet50" else 16  # either way 2 x 2 positions in the last stage
    network = tiny(name, image_size=size).train(training)
    parameters = {key: p.detach() for key, p in network.named_parameters() if p.requires_grad}
    # Off the initial zero biases, where a ReLU can sit on its kink; enough pixels to smooth batch statistics.
    points = [images(size, count=4)] + [p + 0.01 * torch.randn_like(p) for p in parameters.values()]
    v = torch.randn_like(points[0])
    directions = [torch.randn_like(point) for point in points]

    def slope(step, second):
        here = [(p + step * u).requires_grad_() for p, u in zip(points, directions)]
        logits = torch.func.functional_call(network, dict(zip(parameters, here[1:])), here[0])
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        (gradient,) = torch.autograd.grad(loss, here[0], create_graph=second)
        value = (gradient * v).sum()
        if not second:
            return value
        return sum((g * u).sum() for g, u in zip(torch.autograd.grad(value, here), directions))

    h = 1e-10  # so small, lest one ReLU of many changes sides; still five digits
    numeric = (slope(h, False) - slope(-h, False)) / (2 * h)
    torch.testing.assert_close(slope(0, True), numeric, rtol=1e-3, atol=1e-6)


def test_wide_resnet_starts_he_normal():
    network = models.build("wideresnet34-10", width=4)
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convs:
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.12)
    assert not network.fc.bias.any()


@pytest.mark.parametrize("name, layers", [("cnn1", 1), ("cnn4", 4)])
def test_cnn(name, layers):
    network = models.build(name, width=64, image_size=28)
    learnt = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(learnt) == layers + 1
    for layer in learnt:
        n = 9 * 64 if isinstance(layer, torch.nn.Conv2d) else 64 * 28 * 28
        assert layer.weight.std().item() == pytest.approx((2 / n) ** 0.5, rel=0.05)
        assert not layer.bias.any()
    with pytest.raises(RuntimeError):
        network(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "resnet19"}, ["'resnet19'", *models.NAMES]),
        ({"width": 0}, ["width", "0"]),
        ({"classes": 0}, ["classes", "0"]),
        ({"normalise": ((0.5,), (0.25,))}, ["3 channels", "1 means"]),
        ({"normalise": ((0.5,) * 3, (0.25, 0.0, 0.25))}, ["positive", "0.0"]),
        ({"normalise": ((0.5,) * 3, (0.25,))}, ["3 and 1"]),
    ],
)
def test_misuse_is_refused_in_one_sentence(change, words):
    options = {"name": "resnet8"} | change
    with pytest.raises(ValueError) as caught:
        models.build(options.pop("name"), **options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("layout", ["code", "paper"])
@pytest.mark.parametrize("inputs", ["both", "image", "gradient"])
@pytest.mark.parametrize("channels", [1, 3])
def test_generator(layout, inputs, channels):
    generator = models.PerturbationGenerator(channels, inputs, layout, width=8)
    assert generator.res_group[0].conv.in_channels == channels * (2 if inputs == "both" else 1)
    x = torch.rand(4, channels, 8, 8, requires_grad=True)
    s_x = torch.randn(4, channels, 8, 8).sign().requires_grad_()
    eta = generator(x, s_x)
    assert eta.shape == x.shape and eta.abs().max() <= 1 and eta.std() > 0.05
    eta.square().sum().backward()
    assert (x.grad is not None and bool(x.grad.any())) == (inputs != "gradient")
    assert (s_x.grad is not None and bool(s_x.grad.any())) == (inputs != "image")
    for name, parameter in generator.named_parameters():
        if name != "scale_last":
            assert parameter.grad is not None and parameter.grad.any(), name
    extreme = generator.eval()(1000 * x, 1000 * s_x)
    assert extreme.abs().max() <= 1


def test_generator_starts_as_published():
    generator = models.PerturbationGenerator()
    assert generator.scale_last.tolist() == [5] and not generator.scale_last.requires_grad
    assert sum(p.numel() for p in generator.parameters() if p.requires_grad) == 79_173
    block = generator.res_group[1]
    bound = 2**0.5 * (6 / (9 * 64 + 9 * 64)) ** 0.5  # Xavier uniform, gain sqrt(2)
    for conv in (block.c1, block.c2):
        assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert block.act1.weight.tolist() == [0.25] and generator.res_group[0].bn.eps == 1e-3
    with torch.device("meta"):
        paper = models.PerturbationGenerator(layout="paper")
    assert [key for key in paper.state_dict() if key.startswith("res_group.2.")][:3] == [
        "res_group.2.conv.weight",
        "res_group.2.bn.weight",
        "res_group.2.bn.bias",
    ]


def test_generator_output_keeps_precision_under_autocast():
    generator = models.PerturbationGenerator(width=8)
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator(x, x).dtype == torch.float32


def test_generator_refuses_unknown_choices():
    with pytest.raises(ValueError, match="'noise'.*both, image, gradient"):
        models.PerturbationGenerator(inputs="noise")
    with pytest.raises(ValueError, match="'table'.*code, paper"):
        models.PerturbationGenerator(layout="table")


@pytest.mark.parametrize(
    "options, size, inputs",
    [
        ({"width": 4}, 32, 32),
        ({"width": 4, "image_size": 64}, 64, 128),
        ({"width": 4, "channels": 1, "image_size": 8, "blocks": (1, 1, 1, 0)}, 8, 16),
    ],
)
def test_strategy(options, size, inputs):
    strategy = models.StrategyNetwork(STRATEGY, **options)
    assert all(head.in_features == inputs for head in strategy.heads.values())
    logits = strategy(images(size, options.get("channels", 3), count=4).float())
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        "epsilon": (4, 13),
        "steps": (4, 12),
        "alpha": (4, 5),
    }
    assert all(values.min() < 0 < values.max() for values in logits.values())  # no (log-)probabilities
    sum(values.log_softmax(1)[:, 0].sum() for values in logits.values()).backward()
    for name, parameter in strategy.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("image_size, blocks", [(8, (1, 1, 1, 0)), (32, (2, 2, 2, 2)), (64, (2, 2, 2, 2))])
def test_the_strategy_network_is_a_resnet18_or_for_tiny_images_a_resnet8(image_size, blocks):
    ours, told = (models.StrategyNetwork(STRATEGY, width=4, image_size=image_size, **more) for more in ({}, {"blocks": blocks}))
    assert {name: value.shape for name, value in ours.state_dict().items()} == {name: value.shape for name, value in told.state_dict().items()}


def test_strategy_is_a_resnet18_with_other_last_layers():
    strategy, classifier = models.StrategyNetwork({"epsilon": 10}, width=4), models.build("resnet18", width=4)
    state = {key.replace("heads.epsilon.", "linear."): value for key, value in strategy.state_dict().items()}
    assert state.keys() == weights(classifier).keys()
    classifier.load_state_dict(classifier.state_dict() | state)
    assert torch.equal(strategy(images(32).float())["epsilon"], classifier(images(32).float()))


def test_an_action_with_one_option_changes_nothing():
    with_method, without = (models.StrategyNetwork(a, width=4) for a in ({"method": 1} | STRATEGY, STRATEGY))
    without.load_state_dict({k: v for k, v in with_method.state_dict().items() if "method" not in k})
    x = images(32).float()
    for network in (with_method, without):
        sum(values.log_softmax(1)[:, 0].sum() for values in network(x).values()).backward()
    assert not with_method.heads["method"].weight.grad.any()
    for name, parameter in without.named_parameters():
        torch.testing.assert_close(parameter.grad, with_method.get_parameter(name).grad)


def test_published_strategy_names():
    theirs = {"conv1.weight": 0, "Attack_method.bias": 1, "Attack_iters.weight": 2, "Attack_step_size.bias": 3}
    ours = {"conv1.weight": 0, "heads.method.bias": 1, "heads.steps.weight": 2, "heads.alpha.bias": 3}
    assert renamed(theirs) == ours
    heads = {"Attack_iters": "k", "Attack_step_size": "alpha"}
    assert renamed(theirs, heads) == {"conv1.weight": 0, "heads.k.weight": 2, "heads.alpha.bias": 3}


@pytest.mark.parametrize("actions", [{}, {"epsilon": 13, "steps": 0}])
def test_strategy_refuses_actions_without_options(actions):
    with pytest.raises(ValueError, match="actions with options"):
        models.StrategyNetwork(actions)
