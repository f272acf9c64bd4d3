"""The parameters' gradient of a penalty on the input gradient: what its forms cost, and how right they are.

    python -m benchmarks.second_derivative [--width 64] [--batch-size 4] [--archs preactresnet18,resnet18] [--compiled first]

GradAlign and GradSum (train_fgsm_ga.py, train_gradsum.py) add P(g) to their loss, g = grad_x L(x; theta), and need
grad_theta P(g). With v = dP/dg held constant that is grad_theta <v, grad_x L>, the derivative of grad_theta L(x + t v) at
t = 0, which can be had in several ways:

    double backward            through the graph of the backward pass, as the scripts do
    compiled double backward   the same, as one graph that torch.compile makes of torch.func.grad inside torch.func.grad
    forward over reverse       dual numbers x + t v through the forward and the backward pass
    central difference         (grad_theta L(x + h v) - grad_theta L(x - h v)) / 2h: two training passes
    ... in one linear piece    the same, where every ReLU stays on or off as it is at x

The network comes from the models package, after a few updates on random images and labels, with BatchNorm in training mode
and its running averages left alone. Errors and cosines are against a double backward in float64. A step is given as the
root mean square of h v over the batch, where 1 is the images' range. bf16 is autocast of the network, weights in fp32.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as dual
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.overrides import TorchFunctionMode

from benchmarks.throughput import Counted
from engine.device import chosen_device, clock
from utils import cosine, untracked

ROOT = Path(__file__).resolve().parent.parent
EPS = 8 / 255
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "misalignment": lambda gradient, clean: (1 - cosine(clean, gradient)).nanmean(),
    "gradient norm": lambda gradient, clean: gradient.square().sum().sqrt(),
}
"""Of the gradient at x + eta and the one at x, which is a constant: as in train_fgsm_ga.misalignment and train_gradsum.gradient_norm."""
PREDICTED = {
    "double backward": 6, "compiled double backward": 6, "forward over reverse": 9, "central difference": 8, "central difference in one linear piece": 8}
"""Forward passes' worth of convolutions. A gradient of the image costs 1 beside the forward pass, one of image and weights 2.

Double backward: 2 for g, and every convolution of both its passes is then gone through backwards, 2 each. A difference: 2 for g, 3
for each training pass. Forward over reverse: 2 for g, 2 for a forward pass with its tangents, and backwards 2 for the
gradients, 1 for the tangent of the image's and 2 for that of the weights', which is a product of two that both have one."""
STEPS = {"float64": (1e-6, 1e-8, 1e-9, 1e-10), "fp32": (1e-2, 1e-3, 3e-4, 1e-4, 1e-5), "bf16": (1e-1, 1e-2, 1e-3)}

Penalty = Callable[[Tensor], Tensor]
Form = Callable[[nn.Module, Tensor, Tensor, Penalty], list[Tensor]]


class Pieces(TorchFunctionMode):
    """Looks at the ReLUs of several forward passes: which are on in the first one, and how many differ in those that come `again`.

    Args:
        keep: the later passes stay in the first one's linear piece: every ReLU is on or off as it was there.
    """

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def first(self) -> Pieces:
        self.on, self.at, self.crossed = [], None, 0
        return self

    def again(self) -> Pieces:
        self.at = 0
        return self

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is not F.relu:
            return function(*arguments, **(named or {}))
        x = arguments[0]
        if self.at is None:
            self.on.append(x.detach() > 0)
            return function(x)
        on = self.on[self.at]
        self.at += 1
        if self.keep:
            return x * on
        self.crossed += ((x.detach() > 0) != on).sum()
        return function(x)

    @property
    def crossed_part(self) -> float:
        """How many of the ReLUs of two later passes were not as in the first."""
        return float(self.crossed) / (2 * sum(on.numel() for on in self.on))


def input_gradient(model: nn.Module, x: Tensor, target: Tensor, **more: Any) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), target), x, **more)[0]


def weight_gradients(model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(model(x), target), list(model.parameters()))


def direction(model: nn.Module, x: Tensor, target: Tensor, penalty: Penalty) -> Tensor:
    """v, like x."""
    gradient = input_gradient(model, x, target).requires_grad_()
    return torch.autograd.grad(penalty(gradient), gradient)[0]


def double_backward(model: nn.Module, x: Tensor, target: Tensor, penalty: Penalty) -> list[Tensor]:
    gradient = input_gradient(model, x, target, create_graph=True)
    return list(torch.autograd.grad(penalty(gradient), list(model.parameters()), materialize_grads=True))


def compiled_double_backward(backend: str = "inductor") -> Form:
    """Compiles when it is first called, and anew for another model or penalty."""
    @torch.compile(fullgraph=True, dynamic=False, backend=backend)
    def gradients(model: nn.Module, weights: dict[str, Tensor], x: Tensor, target: Tensor, penalty: Penalty) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, weights, (x,)), target)
        return grad(lambda weights: penalty(grad(loss, argnums=1)(weights, x)))(weights)

    def form(model: nn.Module, x: Tensor, target: Tensor, penalty: Penalty) -> list[Tensor]:
        with torch.no_grad():
            return list(gradients(model, {name: weight.detach() for name, weight in model.named_parameters()}, x, target, penalty).values())

    return form


def forward_over_reverse(model: nn.Module, x: Tensor, target: Tensor, penalty: Penalty) -> list[Tensor]:
    v = direction(model, x, target, penalty)
    with dual.dual_level():
        gradients = weight_gradients(model, dual.make_dual(x, v), target)
        return [dual.unpack_dual(gradient).tangent for gradient in gradients]


def difference(step: float, pieces: Pieces | None = None, sides: tuple[int, int] = (1, -1)) -> Form:
    """The central difference; with sides (1, 0) the forward one."""
    def form(model: nn.Module, x: Tensor, target: Tensor, penalty: Penalty) -> list[Tensor]:
        with pieces.first() if pieces else contextlib.nullcontext():
            v = direction(model, x, target, penalty)
        h = step / v.square().mean().sqrt()
        gradients = []
        for side in sides:
            with pieces.again() if pieces else contextlib.nullcontext():
                gradients.append(weight_gradients(model, x + side * h * v, target))
        return [(a - b) / ((sides[0] - sides[1]) * h) for a, b in zip(*gradients)]

    return form


def compared(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative error and one minus the cosine, of all parameters' gradients as one vector."""
    a, b = (torch.cat([gradient.detach().double().flatten() for gradient in gradients]) for gradients in (found, exact))
    return {"error": ((a - b).norm() / b.norm()).item(), "one_minus_cosine": (1 - F.cosine_similarity(a, b, dim=0)).item()}


def subject(arch: str, width: int, batch: int, updates: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network after some updates, images x, x + eta with noise eta within EPS, and labels, all in fp32."""
    import models

    torch.manual_seed(0)
    network = models.build(arch, width=width).train()
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    noisy = x + EPS * (2 * torch.rand(x.shape) - 1)
    network, x, noisy, y = (each.to(device) for each in (network, x, noisy, y))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(updates):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network, x, noisy, y


def arguments_at(precision: str, penalty: str, network: nn.Module, x: Tensor, noisy: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor, Penalty]:
    """What a form is called with: the network as scripts see it, x + eta, labels, and the penalty of the gradient there."""
    from engine.networks import Classifier

    dtype = torch.float64 if precision == "float64" else torch.float32
    with untracked(network):  # and so stays its copy
        model = Classifier(copy.deepcopy(network).to(dtype, memory_format=torch.channels_last), torch.bfloat16 if precision == "bf16" else None)
    clean = input_gradient(model, x.to(dtype), y)
    return model, noisy.to(dtype), y, lambda gradient: PENALTIES[penalty](gradient, clean)


def memory(device: torch.device) -> tuple[Callable[[], None], Callable[[], int | None]]:
    """Two functions: from here on; and the most bytes held since then, above what was held there.

    On a CPU they are the process's, and None where the system does not tell.
    """
    status, before = Path("/proc/self/status"), [0]

    def told(name: str) -> int:
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before[0] = torch.cuda.memory_allocated(device)
        elif status.is_file():
            with contextlib.suppress(AttributeError):  # not glibc
                ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would not be missed here
            Path("/proc/self/clear_refs").write_text("5")  # the process's peak is forgotten
            before[0] = told("VmRSS")

    def most() -> int | None:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) - before[0]
        return told("VmHWM") - before[0] if status.is_file() else None

    return begin, most


def costs(forms: dict[str, Form], arguments: tuple, repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Each form's median milliseconds, the forms taking turns, and the peak memory of one more call."""
    def milliseconds(form: Form) -> float:
        began = clock(device)
        form(*arguments)
        return 1000 * (clock(device) - began)

    times = [[milliseconds(form) for form in forms.values()] for _ in range(repeats + 1)][1:]  # the first round warms up
    found = {name: {"milliseconds": statistics.median(column)} for name, column in zip(forms, zip(*times))}
    begin, most = memory(device)
    for name, form in forms.items():
        begin()
        form(*arguments)
        found[name]["peak_memory_bytes"] = most()
    return found


def passes(form: Form, arguments: tuple) -> float:
    """Operations of convolutions and products, in those of a forward pass. A compiled form hides them."""
    with Counted() as forward:
        arguments[0](arguments[1])
    with Counted() as counted:
        form(*arguments)
    return counted.operations / forward.operations


def swept(pieces: Pieces, given: dict[str, tuple], exact: list[Tensor]) -> dict[str, Any]:
    """A central difference with every step of STEPS: the best of each precision, and all of them."""
    row: dict[str, Any] = {"steps": {}}
    for precision, steps in STEPS.items():
        tried = row["steps"][precision] = []
        for step in steps:
            tried.append({"step": step, **compared(difference(step, pieces)(*given[precision]), exact)})
            if not pieces.keep:
                tried[-1]["crossed"] = pieces.crossed_part
        row[precision] = min(tried, key=lambda found: found["error"])
    return row


def attempted(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the function returns; or what went wrong: torch lacks some derivatives, on some devices, under autocast."""
    try:
        return function()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def measure(name: str, given: dict[str, tuple], exact: list[Tensor], timed: str, forms: dict[str, Form]) -> dict[str, Any]:
    """How right a form is, and the work that it does; puts it among the `forms` that run in the precision in which they are to be timed."""
    compiled, pieces = "compiled" in name, Pieces(keep=True) if "piece" in name else None
    if "difference" in name:
        row = swept(pieces or Pieces(keep=False), given, exact)
        form = difference(row[timed]["step"], pieces)
    else:
        form = {"double backward": double_backward, "forward over reverse": forward_over_reverse}.get(name) or compiled_double_backward()
        precisions = {"double backward": ("fp32", "bf16"), "compiled double backward": (timed,)}.get(name, STEPS)
        began = time.perf_counter()
        row = {precision: attempted(lambda: compared(form(*given[precision]), exact)) for precision in precisions}  # called at once
        if compiled:
            row["seconds_first"] = time.perf_counter() - began
    row["passes"] = {"predicted": PREDICTED[name]} | ({} if compiled else {"counted": passes(form, given["fp32"])})
    if "failed" not in row[timed]:
        forms[name] = form
    return row


def main(argv: list[str] | None = None) -> None:
    from engine import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="preactresnet18,resnet18", help="with commas between them")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default: 64, the published network)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--updates", type=int, default=10, help="made before measuring (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which each form is timed once (default: 3)")
    parser.add_argument("--compiled", choices=("none", "first", "all"), default="first",
                        help="which network and penalty the compiled form is measured on; on a CPU each takes a minute to compile (default: first)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "second-derivative.json")
    args, code = parser.parse_args(argv), record.source()
    device = chosen_device(args.device)
    timed = "bf16" if device.type == "cuda" else "fp32"  # as scripts train there
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    left = {"none": 0, "first": 1}.get(args.compiled, 99)
    for arch in args.archs.split(","):
        network, *images = subject(arch, args.width, args.batch_size, args.updates, device)
        for penalty in PENALTIES:
            given = {precision: arguments_at(precision, penalty, network, *images) for precision in STEPS}
            exact = double_backward(*given["float64"])
            found = rows.setdefault(arch, {})[penalty] = {}
            forms: dict[str, Form] = {}
            for name in PREDICTED:
                if "compiled" in name:
                    if not left:
                        continue
                    left -= 1
                found[name] = attempted(lambda: measure(name, given, exact, timed, forms))  # called at once
            for name, cost in costs(forms, given[timed], args.repeats, device).items():
                found[name] |= cost
            for name, row in found.items():
                print(arch, penalty, name, json.dumps({key: value for key, value in row.items() if key != "steps"}), flush=True)
        exact = weight_gradients(*given["float64"][:3])
        loss[arch] = {precision: compared(weight_gradients(*given[precision][:3]), exact) for precision in ("fp32", "bf16")}
    record.write_json({
        "what": "the parameters' gradient of a penalty on the input gradient, 32 x 32 images", "timed_in": timed,
        "width": args.width, "batch_size": args.batch_size, "updates": args.updates, "repeats": args.repeats, "rows": rows,
        "loss": loss,  # the same for the gradient of the loss itself, beside which the penalty's precision is to be seen
        **record.provenance(device, "as in each row", code)}, args.out)


if __name__ == "__main__":
    main()
