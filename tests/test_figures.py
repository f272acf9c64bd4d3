"""Figures: what is measured against plain forms of it, and drawing, which knows nothing but the JSON."""
from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reproduce
import train_fgsm_sdi
from conftest import Tiny
from engine import data, evaluate
from engine.errors import Misuse
from experiments import figures, tables
from experiments.figures import draw, measure
from experiments.figures.sources import Place, Setting, Trained, of_folders
from models import PerturbationGenerator
from utils import untracked

ORIGIN = {"label": "FGSM-SDI", "seed": 0, "commit": "0" * 40, "dirty": False, "device": "CPU", "config": {}}


def lines(*labels: str, seeds: int = 1) -> dict[str, list[dict[str, Any]]]:
    return {label: [{"seed": seed, "x": [1, 2, 3], "y": [10 + i, 20 + seed, 30 - i]} for seed in range(seeds)] for i, label in enumerate(labels)}


def picture(n: int, channels: int = 3) -> dict[str, Any]:
    return measure.packed((torch.arange(n * 16 * channels) % 251).to(torch.uint8).view(n, 4, 4, channels))


METHODS = ("FGSM-SDI", "FGSM-RS", "a new method")
MODE = {"clean": 40.0, "fgsm": 30.0, "perturbation": 10.0, "image": 60.0, "cosine": 0.9, "agreement": 0.1}
CONTENTS: dict[str, dict[str, Any]] = {
    "curves": {"n": {"train": [200], "held-out": [200, 300]}, "panels": {f"{part} {column}": lines(*METHODS, seeds=2) for part in ("train", "held-out") for column in ("clean", "pgd10")}},
    "attack-success": {"lines": lines(*METHODS)},
    "grad-cam": {"n": 9, "images": picture(2), "methods": {label: {"clean": picture(2, 1), "adversarial": picture(2, 1), "perturbed": picture(2), "wrong": [True, False],
                                                                  "cosine": 0.5, "compared": 9} for label in METHODS[:2]}},
    "landscape": {"n": 9, "epsilon": 8, "axis": [-8, 0, 8], "surfaces": {"FGSM-SDI": [[1, 2, 3], [1, 2, 4], [1, 2, 5]]}},
    "initialisations": {"n": 9, "epsilon": 8, "images": picture(1), "epochs": [{"epoch": 1, "eta": picture(1), "delta": picture(1), "eta_size": 0.25, "agreement": 0.5}]},
    "radius": {"n": 9, "epsilon": 8, "lines": lines(*METHODS)},
    "alignment": {"n": 9, "lines": lines(*METHODS)},
    "transplants": {"n": 9, "epsilon": 16, "methods": {label: [{"seed": seed, "training": dict(MODE, cosine=0.2 * i), "evaluation": MODE} for seed in (0, 1)]
                                                       for i, label in enumerate(METHODS)}},
    "strategies": {"n": 9, "options": {"radii": [3, 4], "steps": [1, 2], "step_sizes": [1, 2]},
                   "epochs": [{"epoch": e, "picked": dict.fromkeys(("radii", "steps", "step_sizes"), [0.5, 0.5])} for e in (1, 2)]},
    "pareto": {"n": 200, "device": "CPU", "column": "aa", "points": {label: [{"seed": 0, "minutes": 2 + i, "value": 40 + i, "interval": [35, 45], "trusted": True}] for i, label in enumerate(METHODS)}},
}


def written(name: str, path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"figure": name, "runs": [ORIGIN], "checkpoint": "best", "provenance": {"dirty": False}, **CONTENTS[name], **changes}))
    return path


@pytest.mark.parametrize("name", figures.FIGURES)
def test_drawing_is_of_the_json_alone_and_the_same_every_time(name: str, tmp_path: Path) -> None:
    for folder in "ab":
        figures.write_pictures(written(name, tmp_path / folder / f"{name}.json"))
    for kind in ("pdf", "png"):
        one, other = ((tmp_path / folder / f"{name}.{kind}").read_bytes() for folder in "ab")
        assert one == other and len(one) > 2000


def test_another_number_is_another_picture_and_a_dirty_tree_is_seen(tmp_path: Path) -> None:
    changed = copy.deepcopy(CONTENTS["radius"])
    changed["lines"]["FGSM-SDI"][0]["y"][1] += 5
    pictures = []
    for i, changes in enumerate(({}, changed, {"provenance": {"dirty": True}}, {"runs": [ORIGIN | {"dirty": True}]})):
        path = written("radius", tmp_path / str(i) / "radius.json", **changes)
        figures.write_pictures(path)
        pictures.append(path.with_suffix(".png").read_bytes())
    assert pictures[0] not in pictures[1:] and pictures[1] not in pictures[2:] and pictures[2] == pictures[3]


def test_a_methods_look_is_its_own_in_every_figure() -> None:
    every = [row.name for row in tables.find("PGI").rows]
    assert draw.looks(reversed(every))["FGSM-RS"] == draw.looks(["FGSM-RS"])["FGSM-RS"]
    for table in ("II", "V", "PGI", "FastAT", "LAS-2"):
        looks = draw.looks([row.name for row in tables.find(table).rows if row.command])
        assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == len(looks), table


# ---- measuring ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Tiny runs on the digits, and an evaluation of one."""
    tiny = Tiny(tmp_path_factory.mktemp("figures"))
    tiny.flags += ("--snapshots", "1,2", "--measure-train", "30", "--lr-schedule", "constant")
    names = ("fgsm_sdi", "fgsm_rs", "las_at")
    folders = [tiny.train(f"train_{name}", *(("--k", "1") if name == "fgsm_sdi" else ())) for name in names]
    done = tiny.command("test_FGSM_SDI", "--model-path", folders[1] / "best.pth", "--out-dir", folders[1] / "best", "--attacks", "clean,pgd50", "--n-ex", 30, "--device", "cpu")
    assert done.status == 0, done.err
    return dict(zip(names, of_folders(folders)))


SETTING = Setting(Path("data"), torch.device("cpu"), "last", 40)


def test_curves_are_the_logs(trained: dict[str, Trained]) -> None:
    runs = [trained["fgsm_sdi"], trained["fgsm_rs"]]
    found = measure.curves(runs, SETTING)
    assert found["n"] == {"train": [30], "held-out": [40]}
    for name, key in {"train clean": "train_clean", "train pgd10": "train_pgd10", "held-out clean": "val_clean", "held-out pgd10": "val_pgd10"}.items():
        line, = found["panels"][name]["FGSM-RS"]
        assert line == {"seed": 0, "x": [1, 2], "y": [row[key] for row in runs[1].log]}
    success, = measure.attack_success(runs, SETTING)["lines"]["FGSM-SDI"]
    assert [100 - y for y in success["y"]] == pytest.approx([row["train_accuracy"] for row in runs[0].log])


def test_what_was_not_measured_has_no_panel(trained: dict[str, Trained]) -> None:
    run = copy.deepcopy(trained["fgsm_rs"])
    for row in run.log:
        del row["train_clean"], row["train_pgd10"]
    run.result["config"]["measure_train"] = 0
    found = measure.curves([run], SETTING)
    assert sorted(found["panels"]) == ["held-out clean", "held-out pgd10"] and found["n"]["train"] == []


def test_radius_starts_at_clean_accuracy_and_never_rises(trained: dict[str, Trained]) -> None:
    run = trained["fgsm_rs"]
    line, = measure.radius([run], SETTING)["lines"]["FGSM-RS"]
    x, y = SETTING.images([run])
    network = run.network("last", SETTING.device)
    plain = {r: 100 * evaluate.verdicts(network, x, y, columns=("pgd20",), eps=r / 255, alpha=r / 1020, seed=0, batch_size=100)["pgd20"].double().mean().item() for r in line["x"][:4]}
    clean = 100 * (network(data.to_images(x)).argmax(1) == y).double().mean().item()
    assert line["y"][0] == pytest.approx(clean) and line["y"] == sorted(line["y"], reverse=True) and line["y"][-1] < clean
    assert line["x"] == [51 / 8 * r for r in measure.RADII]
    for r, accuracy in zip(line["x"][1:4], line["y"][1:4]):
        assert plain[r] - 5 <= accuracy <= plain[r] + 2.5 or accuracy == pytest.approx(plain[r])  # an image more or two less fall


class Known(Trained):
    """A run whose network is a function."""

    def network(self, name: str, device: torch.device) -> nn.Module:
        return nets[self.label]

    def snapshots(self) -> dict[int, Path]:
        return {1: Path()}

    def at(self, path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
        return nets[self.label], {}


class Logits(nn.Module):
    """Of two classes: 0, and a function of the mean or of the sum of squares. The parameter is there for its device."""

    def __init__(self, bent: bool) -> None:
        super().__init__()
        self.bent, self.scale = bent, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        value = torch.sin(20 * x).mean((1, 2, 3)) if self.bent else x.mean((1, 2, 3))
        return F.pad(torch.stack([torch.zeros_like(value), self.scale * value], 1), (0, 8))


nets = {"straight": Logits(False), "bent": Logits(True)}


def known(label: str) -> Trained:
    return Known(label, Path(), {"run": {"dataset": "digits", "seed": 0, "config": {"epsilon": 51.0}}, "log": [], "evaluations": {}})


def test_alignment_is_one_where_the_gradient_never_turns() -> None:
    found = measure.alignment([known("straight"), known("bent")], SETTING)["lines"]
    assert found["straight"][0]["y"][0] == pytest.approx(1, abs=1e-3) and abs(found["bent"][0]["y"][0]) < 0.6


BLOCK = torch.zeros(10, 64)  # the pixels in which a class's label is written
for k in range(10):
    BLOCK[k, 6 * k:6 * k + 6] = 1 / 6


class Grey:
    """Grey images, a little brighter in the pixels of their class."""

    def images(self, runs: list[Trained]) -> tuple[Tensor, Tensor]:
        y = torch.arange(45) * 7 % 10
        return (128 + 10 * (BLOCK[y] > 0)).to(torch.uint8).view(-1, 8, 8, 1), y

    device, checkpoint = torch.device("cpu"), "last"


class Reader(nn.Module):
    """Knows a class by its pixels' brightness and, `bonus`, by a darkness in them to which only a perturbation leads."""

    def __init__(self, bonus: float) -> None:
        super().__init__()
        self.bonus, self.scale = bonus, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        brightness = x.flatten(1) @ BLOCK.T
        return self.scale * brightness + self.bonus * (0.36 - brightness).relu()


def test_transplants_tell_reading_a_perturbation_from_looking_at_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nets, "reads", Reader(1e3))
    monkeypatch.setitem(nets, "looks", Reader(0.0))
    runs = [known("reads"), known("looks")]
    for run in runs:
        run.result["config"]["batch_size"] = 20
    found = measure.transplants(runs, Grey())
    assert (found["n"], found["epsilon"]) == (40, 51.0)
    for label, shares in {"reads": {"clean": 100, "fgsm": 100, "perturbation": 100, "image": 0}, "looks": {"clean": 100, "fgsm": 0, "perturbation": 0, "image": 100}}.items():
        for mode in ("training", "evaluation"):
            modes = found["methods"][label][0][mode]
            assert {key: modes[key] for key in shares} == shares and modes["cosine"] > 0.9
            assert modes["agreement"] == pytest.approx(60 / 64)  # four pixels belong to no class, and have no gradient


def test_transplants_are_those_of_a_plain_loop(trained: dict[str, Trained]) -> None:
    run = trained["fgsm_rs"]
    found = measure.transplants([run], SETTING)
    x, y = SETTING.images([run])
    images, y, n = data.to_images(x)[:32], y[:32], 32
    assert found["n"] == n and run.result["config"]["batch_size"] == n
    for mode in ("training", "evaluation"):
        network = run.network("last", SETTING.device).train(mode == "training")
        points = images.clone().requires_grad_()
        sign = torch.autograd.grad(F.cross_entropy(network(points), y), points)[0].sign()
        moved = torch.stack([(images[i - 1] + run.eps * sign[i]).clamp(0, 1) for i in range(n)])
        answers, own = network(moved).argmax(1).tolist(), network((images + run.eps * sign).clamp(0, 1)).argmax(1)
        pairs = [(answers[i], int(y[i]), int(y[i - 1])) for i in range(n) if y[i] != y[i - 1]]
        products = [(sign[i] * sign[j]).mean().item() for i in range(n) for j in range(n) if i != j and y[i] == y[j]]
        modes = found["methods"]["FGSM-RS"][0][mode]
        assert modes["perturbation"] == pytest.approx(100 * sum(a == b for a, b, _ in pairs) / len(pairs))
        assert modes["image"] == pytest.approx(100 * sum(a == c for a, _, c in pairs) / len(pairs))
        assert modes["fgsm"] == pytest.approx(100 * (own == y).double().mean().item())
        assert modes["agreement"] == pytest.approx(sum(products) / len(products), abs=1e-6)


def test_landscape_has_the_adversarial_direction_across_and_the_random_one_down() -> None:
    found = measure.landscape([known("straight")], SETTING)
    surface, axis = torch.tensor(found["surfaces"]["straight"]), found["axis"]
    x, y = SETTING.images([known("straight")])
    images, middle = data.to_images(x), len(axis) // 2
    assert (axis[0], axis[middle], axis[-1]) == (-102, 0, 102)
    assert surface[middle, middle].item() == pytest.approx(F.cross_entropy(nets["straight"](images), y).item(), abs=1e-6)
    sign = torch.where(y == 1, -1.0, 1.0)[:, None, None, None]  # of the gradient, every pixel's
    assert surface[middle, -1].item() == pytest.approx(F.cross_entropy(nets["straight"](images + 102 / 255 * sign), y).item(), abs=1e-5)
    across, down = (surface.max(dim).values - surface.min(dim).values for dim in (1, 0))
    assert across.min() > 4 * down.max()  # random signs cancel in the mean


def test_initialisations_are_those_of_training(trained: dict[str, Trained]) -> None:
    run = trained["fgsm_sdi"]
    found = measure.initialisations([run], SETTING)
    x, y = SETTING.images([run], n=32)
    x = data.to_images(x)
    network, state = run.at(run.folder / "state-2.pth", SETTING.device)
    generator = PerturbationGenerator(1).eval()
    generator.load_state_dict(state["kept"]["generator"])

    def delta(net: nn.Module) -> dict[str, Any]:
        s_x = train_fgsm_sdi.input_gradient(net, x, y).sign()
        made = train_fgsm_sdi.perturb(net, generator, x, y, s_x, run.eps, run.result["config"]["alpha"] / 255)
        return measure.packed(measure._bytes((made[:3] / run.eps + 1) / 2))

    with torch.no_grad():
        assert found["epochs"][1]["delta"] != delta(network.eval())
        with untracked(network.train()):
            assert found["epochs"][1]["delta"] == delta(network)
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2] and found["epochs"][0]["eta"] != found["epochs"][1]["eta"]
    assert 0 < found["epochs"][1]["eta_size"] < 1
    with pytest.raises(Misuse, match="no generator"):
        measure.initialisations([trained["fgsm_rs"]], SETTING)


def test_strategies_are_distributions_over_what_there_was_to_choose(trained: dict[str, Trained]) -> None:
    found = measure.strategies([trained["las_at"]], SETTING)
    assert found["options"]["radii"] == pytest.approx([51 / 8 * r for r in range(3, 16)]) and found["options"]["steps"] == list(range(3, 15))
    for epoch in found["epochs"]:
        for name, options in found["options"].items():
            assert sum(epoch["picked"][name]) == pytest.approx(1) and len(epoch["picked"][name]) == len(options)
    assert found["epochs"][0]["picked"] != found["epochs"][1]["picked"]
    with pytest.raises(Misuse, match="no strategy network"):
        measure.strategies([trained["fgsm_rs"]], SETTING)


def evaluated(label: str, value: float, column: str = "aa", n: int = 200, device: str = "CPU", seed: int = 0, epsilon: float = 8, dataset: str = "digits",
              card: dict[str, Any] | None = None) -> Trained:
    metric = {"value": value, "n": n, "interval": [value - 5, value + 5]}
    run = {"dataset": dataset, "seed": seed, "device": device, "seconds": {"training": 120}, "config": {"epsilon": epsilon}}
    return Trained(label, Path(), {"run": run, "log": [], "evaluations": {"last": ({} if card is None else {"card": card}) | {"device": device, "metrics": {column: metric, "pgd50": metric | {"value": value + 1}}}}})


def test_pareto_compares_only_what_can_be_compared(trained: dict[str, Trained]) -> None:
    found = measure.pareto([evaluated("A", 40), evaluated("A", 42, seed=1), evaluated("B", 45)], SETTING)
    assert found["column"] == "aa" and [point["value"] for point in found["points"]["A"]] == [40, 42] and found["points"]["B"][0]["minutes"] == 2
    assert measure.pareto([evaluated("A", 40), evaluated("B", 45, column="cw")], SETTING)["points"]["A"][0]["value"] == 41  # PGD-50, which both have
    for other in (evaluated("B", 45, n=100), evaluated("B", 45, device="GPU"), evaluated("B", 45, epsilon=4), evaluated("B", 45, dataset="cifar10")):
        with pytest.raises(Misuse, match="differ in"):
            measure.pareto([evaluated("A", 40), other], SETTING)
    real = Setting(Path("data"), torch.device("cpu"), "best", 40)
    assert measure.pareto([trained["fgsm_rs"], trained["fgsm_sdi"]], real)["column"] == "pgd50"  # the second was not evaluated


def test_pareto_marks_what_no_claim_card_stands_behind() -> None:
    sound, broken = {"trusted": True}, {"trusted": False}
    runs = [evaluated("A", 40, card=sound), evaluated("A", 42, seed=1, card=broken), evaluated("B", 45, card=sound), evaluated("C", 99)]
    found = measure.pareto(runs, SETTING)
    assert {label: [point["trusted"] for point in points] for label, points in found["points"].items()} == {"A": [True, False], "B": [True], "C": [False]}

    def drawn(points: dict[str, Any]) -> tuple[list[str], str, list[float], list[str]]:
        figure = draw.pareto({**found, "points": points})
        axis, legend = figure.axes[0], figure.legends[0]
        front, = (line.get_ydata() for line in axis.lines if line.get_linestyle() == "--")
        draw.plt.close(figure)
        return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text(), list(front), [bars.get_label() for bars in axis.containers if bars[0].get_alpha()]

    assert drawn(found["points"]) == (["A †", "B", "C †"], "†, pale: no claim card stands behind it", [45], ["A †", "C †"])
    assert drawn({"B": found["points"]["B"]}) == (["B"], "", [45], [])
    older = {label: [{key: point[key] for key in point if key != "trusted"} for point in points] for label, points in found["points"].items()}
    assert drawn(older)[::2] == (["A †", "B †", "C †"], []), "a file that does not say is not trusted"


def test_grad_cam_is_its_formula(trained: dict[str, Trained]) -> None:
    run = trained["fgsm_rs"]
    found = measure.grad_cam([run], SETTING)
    x, y = SETTING.images([run])
    network = run.network("last", SETTING.device)
    right = (network(data.to_images(x)).argmax(1) == y).nonzero().flatten().tolist()
    firsts: dict[int, int] = {}
    for i in right:
        firsts.setdefault(int(y[i]), i)
    chosen = sorted(firsts.values())[:6]
    images = data.to_images(x)[chosen]
    assert found["images"] == measure.packed(measure._bytes(images))
    kept: list[Tensor] = []
    network.layer3.register_forward_hook(lambda _, __, out: kept.append(out))
    logits = network(images)
    gradient, = torch.autograd.grad(logits[torch.arange(len(chosen)), y[chosen]].sum(), kept[0])
    cam = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)
    cam = cam / cam.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    ours = draw.unpacked(found["methods"]["FGSM-RS"]["clean"]).astype(int)
    assert abs(ours - measure._bytes(cam).numpy()).max() <= 1 and ours.max() == 255


# ---- the command ----------------------------------------------------------------------------------------------------


def test_from_runs_to_files_and_drawn_again(trained: dict[str, Trained], tmp_path: Path) -> None:
    folders = ",".join(str(trained[name].folder) for name in ("fgsm_rs", "fgsm_sdi"))
    command = ["figure", "curves", "--scale", "small", "--figures", str(tmp_path), "--device", "cpu"]
    command += ["--runs", folders]
    reproduce.main(command)
    content = json.loads((tmp_path / "runs" / "curves.json").read_text())
    assert [run["label"] for run in content["runs"]] == ["FGSM-RS", "FGSM-SDI"] and {"commit", "dirty", "device", "versions"} <= content["provenance"].keys()
    assert str(trained["fgsm_rs"].folder) not in json.dumps(content["runs"])
    before = (tmp_path / "runs" / "curves.png").read_bytes()
    (tmp_path / "runs" / "curves.png").unlink()
    reproduce.main([*command, "--redraw"])
    assert (tmp_path / "runs" / "curves.png").read_bytes() == before


def test_pareto_of_the_demos_files(tmp_path: Path) -> None:
    files = {name: Path(reproduce.__file__).parent / "results" / "demo-digits-all" / f"{name.lower()}-seed0.json" for name in ("N-FGSM", "Standard")}
    reproduce.main(["figure", "pareto", "--scale", "small", "--figures", str(tmp_path), "--device", "cpu", "--checkpoint", "last", "--runs", ",".join(map(str, files.values()))])
    points = json.loads((tmp_path / "runs" / "pareto-last.json").read_text())["points"]
    for name, path in files.items():
        run = json.loads(path.read_text())
        assert (points[name][0]["value"], points[name][0]["minutes"]) == (run["evaluations"]["last"]["metrics"]["aa"]["value"], run["run"]["seconds"]["training"] / 60)


def test_runs_of_one_script_with_other_flags_are_no_seeds_of_each_other(tiny: Tiny) -> None:
    folders = [tiny.train("train_fgsm_rs", "--epochs", 1, *flags) for flags in ((), ("--init", "zero"), ("--init", "zero", "--seed", 1))]
    assert [run.label for run in of_folders(folders)] == ["FGSM-RS --init uniform", "FGSM-RS --init zero", "FGSM-RS --init zero"]
    assert [run.label for run in of_folders(folders[1:])] == ["FGSM-RS", "FGSM-RS"]


def test_an_evaluation_of_other_weights_is_refused(tiny: Tiny) -> None:
    folder = tiny.train("train_fgsm_rs", "--epochs", 1)
    assert tiny.command("test_FGSM_SDI", "--model-path", folder / "best.pth", "--out-dir", folder / "mine", "--attacks", "clean", "--n-ex", 10, "--device", "cpu").status == 0
    assert of_folders([folder])[0].content["evaluations"].keys() == {"best", "last"}, "by the weights, whatever the folder is called; here they are the same"
    flags = ("--model-path", folder / "best.pth", "--attacks", "clean,fgsm", "--n-ex", 20, "--device", "cpu")
    assert tiny.command("test_FGSM_SDI", *flags, "--out-dir", folder / "another radius", "--epsilon", 4).status == 0
    assert of_folders([folder])[0].content["evaluations"]["best"]["n"] == 10, "of several, that at the radius of the training"
    assert tiny.command("test_FGSM_SDI", *flags, "--out-dir", folder / "more").status == 0
    assert of_folders([folder])[0].content["evaluations"]["best"]["n"] == 20, "then that of more images"
    for name in ("another radius", "more"):
        shutil.rmtree(folder / name)
    tiny.train("train_fgsm_rs", "--epochs", 1, "--seed", 1, out_dir=folder.with_name("other"))
    for name in ("result.json", "best.pth", "last.pth"):
        (folder.with_name("other") / name).replace(folder / name)
    with pytest.raises(Misuse, match="mine/evaluation.json is of other weights"):
        of_folders([folder])


def test_help_names_every_figure(tiny: Tiny) -> None:
    result = tiny.command("reproduce", "figure", "--help")
    assert result.status == 0 and all(f"  {name} " in result.out for name in figures.FIGURES)
    assert all(hasattr(module, name.replace("-", "_")) for name in figures.FIGURES for module in (measure, draw))


@pytest.mark.parametrize(("arguments", "said"), [
    (["grad-cam", "--scale", "small"], '--rows "FGSM-RS,FGSM-SDI" --output {0}/out --results {0}/none makes them'),
    (["radius"], "PGD-AT, FGSM-RS, FGSM-CKPT, FGSM-GA, Free-AT(m=8), FGSM-SDI: not measured at scale full; python reproduce.py run V --scale full"),
    (["strategies", "--rows", "LAS-AT"], 'the table "LAS-AT: the terms of the reward" offers LAS-AT L1, '),
    (["curves", "--runs", "{0}/none"], "{0}/none: there is no result.json"),
    (["pareto", "--runs", "{0}/none.json"], "{0}/none.json: it is not a run's JSON"),
    (["curves", "--redraw"], "curves.json is not there: leave out --redraw"),
    (["curve"], "invalid choice: 'curve'"),
])
def test_what_is_missing_is_said_in_one_sentence(tiny: Tiny, arguments: list[str], said: str) -> None:
    where = ("--results", tiny.directory / "none", "--figures", tiny.directory / "figures", "--output", tiny.directory / "out", "--device", "cpu")
    result = tiny.command("reproduce", "figure", *(word.format(tiny.directory) for word in arguments), *where)
    assert result.status == 2 and said.format(tiny.directory) in result.err and result.err.count("\n") == 1, result.err
    assert not (tiny.directory / "figures").exists()


def test_a_tables_runs_are_found_and_what_is_gone_is_named(trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, scale, run = tables.find("V"), tables.SCALES["small"], trained["fgsm_rs"]
    row = next(row for row in table.rows if row.name == "FGSM-RS")
    job = table.job(row, 0, scale, tmp_path / "out", tmp_path / "results")
    job.result.parent.mkdir(parents=True)
    job.result.write_text(json.dumps({"label": "FGSM-RS", **run.content}))
    place = Place("V", table, scale, tmp_path / "out", tmp_path / "results")
    found, = figures.runs(figures.FIGURES["curves"], place)
    assert (found.label, found.folder, found.log) == ("FGSM-RS", job.folder, run.log)
    assert "note: PGD-AT, FGSM-CKPT, FGSM-GA, Free-AT(m=8), FGSM-SDI: not measured" in capsys.readouterr().err
    with pytest.raises(Misuse, match="FGSM-SDI: not measured"):
        figures.runs(figures.FIGURES["grad-cam"], place)
    with pytest.raises(Misuse, match=r"best.pth, of FGSM-RS, is not there: reproduce.py run .* makes both anew"):
        found.network("best", torch.device("cpu"))
    job.folder.parent.mkdir(parents=True)
    job.folder.symlink_to(trained["fgsm_sdi"].folder)
    with pytest.raises(Misuse, match="of another training than the one that was measured as FGSM-RS"):
        found.network("best", torch.device("cpu"))
    job.folder.unlink()
    job.folder.symlink_to(run.folder)
    assert not found.network("best", torch.device("cpu")).training
    assert list(found.snapshots()) == [1, 2]
    other = Place("PGI", tables.find("PGI"), scale, tmp_path / "out", tmp_path / "results")
    assert [each.label for each in figures.runs(figures.FIGURES["pareto"], other)] == ["FGSM-RS"]  # once, though both tables have it
    assert [each.label for each in Place("IV", tables.find("IV"), scale, tmp_path / "out", tmp_path / "results").siblings()] == ["FGSM-RS"]
    assert not Place("VII", tables.find("VII"), scale, tmp_path / "out", tmp_path / "results").siblings()  # another schedule
