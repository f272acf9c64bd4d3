"""The networks against the published ones: parameter names, shapes, counts and outputs.

`fixtures/published_keys.json` holds the state_dict keys and shapes of the published classes, and
`fixtures/published_outputs.json` what those classes compute in float64 from the weights of `fill` and the
inputs of `images`, in evaluation mode and then in training mode. Both were recorded from FGSM-SDI at d54cac6,
fast_adversarial at 54f7287 and understanding-fast-adv-training at ceed494.
"""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models

FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED_KEYS = json.loads((FIXTURES / "published_keys.json").read_text())
PUBLISHED_OUTPUTS = json.loads((FIXTURES / "published_outputs.json").read_text())
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))

TWINS = {  # published class: (our name, options)
    "FGSM-SDI/models/resnet.py": ("resnet18", {}),
    "FGSM-SDI/Cifar100_models/resnet.py": ("resnet18", {"classes": 100}),
    "FGSM-SDI/models/preact_resnet.py": ("preactresnet18a", {}),
    "FGSM-SDI/ImageNet_models/preact_resnet.py": ("preactresnet18a", {"classes": 200, "image_size": 64}),
    "fast_adversarial/CIFAR10/preact_resnet.py": ("preactresnet18b", {}),
    "understanding-fast-adv-training/models.py": ("preactresnet18c", {}),
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
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def create(name, options):
    return models.PerturbationGenerator(**options) if name == "generator" else models.build(name, **options)


def weights(network):
    return {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("normalize.")}


def fill(network):
    """Weights that depend on nothing but names and shapes (numpy promises never to change this stream)."""
    for key, tensor in network.state_dict().items():
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
        ("resnet18-nuat", {}, 11_173_962),
        ("preactresnet18", {}, 11_171_146),
        ("preactresnet18a", {}, 11_171_146),
        ("preactresnet18b", {}, 11_172_170),
        ("preactresnet18c", {}, 11_171_146),
        ("preactresnet18d", {}, 11_172_170),
        ("preactresnet18", {"classes": 200, "image_size": 64}, 11_575_816),
        ("preactresnet18", {"classes": 200, "image_size": 32}, 11_268_616),
        ("wideresnet34-10", {}, 46_160_474),
        ("wideresnet34-10", {"classes": 100}, 46_218_164),
        ("wideresnet34-10-subblock", {}, 48_262_586),
        ("wideresnet34-10-subblock", {"classes": 100}, 48_320_276),
        ("wideresnet28-10", {}, 36_479_194),
        ("wideresnet34-20", {}, 184_531_674),
        ("wideresnet70-16", {}, 266_796_506),
        ("resnet8", {"channels": 1}, 77_754),
        ("generator", {}, 79_174),
    ],
)
def test_parameter_count(name, options, count):
    with torch.device("meta"):
        assert models.parameter_count(create(name, options)) == count


@pytest.mark.parametrize("published", PUBLISHED_KEYS)
def test_published_weights_fit(published):
    expected = {key: tuple(shape) for key, shape in PUBLISHED_KEYS[published].items()}
    if published.startswith("understanding"):  # GradAlign registers its first layers a second time
        duplicates = {key: expected.pop(key) for key in list(expected) if key.startswith("model_preact_hl1.")}
        assert set(duplicates) == {"model_preact_hl1.1.weight"} | {
            f"model_preact_hl1.2.{key}"
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
    with torch.device("meta"):
        network = create(*TWINS[published])
    assert {key: tuple(tensor.shape) for key, tensor in weights(network).items()} == expected


@pytest.mark.parametrize("published", PUBLISHED_OUTPUTS)
def test_published_outputs(published):
    name, options = TWINS[published]
    network = create(name, options).double()
    fill(network)
    inputs = [images(options.get("image_size", 32))]
    if name == "generator":
        inputs = [images(4), images(4).sub(0.5).sign()]
    for mode in ("eval", "train"):
        network.train(mode == "train")
        with torch.no_grad():
            output = network(*inputs)
        expected = torch.tensor(PUBLISHED_OUTPUTS[published][mode], dtype=torch.float64)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


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
    for size in (8, 28):
        assert network(images(size, channels=1)).shape == (2, 7)
    with torch.device("meta"):
        full, narrow = models.build(name), models.build(name, width=2)
    assert models.parameter_count(narrow) < models.parameter_count(full) / 4


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


SAME_AT_THIS_WIDTH = {"preactresnet18", "wideresnet34-20", "wideresnet70-16"}  # but for a depth


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(set(models.NAMES) - SAME_AT_THIS_WIDTH))
def test_double_backward(name, training):
    """Gradient alignment's kind of derivative: of <input gradient, v>, along u in inputs and weights."""
    network = tiny(name).train(training)
    parameters = {key: p.detach() for key, p in network.named_parameters() if p.requires_grad}
    # Off the initial zero biases, where a ReLU can sit on its kink; enough pixels to smooth batch statistics.
    points = [images(16, count=4)] + [p + 0.01 * torch.randn_like(p) for p in parameters.values()]
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
