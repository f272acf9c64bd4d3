"""Trains and evaluates methods side by side, and shows what came out: `make demo`, `demo-all`, `demo-cifar`, `demo-cifar-all`.

Single-threaded processes, as many at a time as there are cores, on the CPU or sharing one GPU. Every run's numbers go to
output/demo-<name>/<run>.json; the table and the figure are made from those files alone. Runs that are finished there are not done
again: with --results results/, where the measured runs lie that README shows, only those that are missing.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from engine.config import Parser, numbers
from engine.data import load
from engine.device import cores
from engine.errors import Failure, Misuse, one_sentence
from experiments import show
from experiments.runner import Job, do_all


@dataclass(frozen=True)
class Demo:
    """methods: labels, keys of `METHODS`."""

    methods: tuple[str, ...]
    dataset: str
    common: tuple[str, ...]
    evaluation: tuple[str, ...]
    checkpoints: tuple[str, ...]
    seeds: tuple[int, ...]


# Label to script and flags; the slowest first, so that the cores are busy to the end. A comma marks another setting of the method before it.
METHODS = {
    "LAS-TRADES": ("train_las_at.py", "--base", "trades"), "LAS-AWP": ("train_las_at.py", "--base", "awp"), "LAS-AT": ("train_las_at.py",),
    "LAS-TRADES, interval 20": ("train_las_at.py", "--base", "trades", "--interval", "20"),
    "LAS-AWP, interval 20": ("train_las_at.py", "--base", "awp", "--interval", "20"),
    "TRADES-AWP": ("train_awp.py", "--base", "trades"), "AWP": ("train_awp.py",), "LBGAT": ("train_lbgat.py",),
    "TRADES": ("train_trades.py",), "MART": ("train_mart.py",), "PGD-AT": ("train_pgd_at.py",), "GAIRAT": ("train_gairat.py",),
    "FAT": ("train_fat.py",), "Free-AT": ("train_free_at.py",), "FGSM-GA": ("train_fgsm_ga.py", "--lr", "0.2"), "GradSum": ("train_gradsum.py",),
    "FGSM-SDI": ("train_fgsm_sdi.py",), "FGSM-SDI, hard labels": ("train_fgsm_sdi.py", "--label-factor", "1"),
    "NuAT": ("train_nuat.py",), "GAT": ("train_gat.py",), "FGSM-CKPT": ("train_fgsm_ckpt.py", "--lr", "0.2"), "FGSM-RS-CS": ("train_fgsm_rs_cs.py",),
    "LIET": ("train_liet.py",), "FGSM-UAP": ("train_fgsm_uap.py",), "FGSM-MEP": ("train_fgsm_mep.py",), "FGSM-EP": ("train_fgsm_ep.py",),
    "FGSM-BP": ("train_fgsm_bp.py",), "N-FGSM": ("train_n_fgsm.py",), "VFSAT": ("train_vfsat.py",), "FGSM-RS": ("train_fgsm_rs.py",),
    "FGSM-AT": ("train_fgsm_rs.py", "--init", "zero"), "Standard": ("train_standard.py",),
}
FIRST = ("PGD-AT", "FGSM-SDI", "FGSM-RS", "FGSM-AT")
DIGITS = ("--dataset", "digits", "--epsilon", "76.5", "--epochs", "40", "--augment", "none", "--measure", "clean,fgsm,pgd10,pgd20")
CIFAR = ("--dataset", "cifar10", "--epsilon", "16", "--arch", "resnet18", "--width", "16", "--train-size", "8000",
         "--val-size", "500", "--epochs", "16", "--lr-schedule", "cyclic", "--measure", "clean,fgsm,pgd10,pgd20")

DEMOS = {
    "digits": Demo(
        methods=FIRST, dataset="digits", common=DIGITS, evaluation=("--dataset", "digits"), checkpoints=("last",), seeds=(0, 1, 2)),
    "digits-all": Demo(
        methods=tuple(label for label in METHODS if label not in FIRST and "," not in label),
        dataset="digits", common=DIGITS, evaluation=("--dataset", "digits"), checkpoints=("last",), seeds=(0, 1, 2)),
    "cifar": Demo(
        methods=("FGSM-GA", "FGSM-SDI", "FGSM-SDI, hard labels", "FGSM-RS", "FGSM-AT"), dataset="cifar10", common=CIFAR,
        evaluation=("--dataset", "cifar10", "--n-ex", "500", "--batch-size", "100"), checkpoints=("best", "last"), seeds=(0,)),
    # Who collapses: PGD tells that, and AutoAttack on this many networks would take a CPU days. bf16, as on a GPU: on a CPU that has
    # instructions for it, it takes half the time.
    "cifar-all": Demo(
        methods=tuple(METHODS), dataset="cifar10", common=(*CIFAR, "--precision", "bf16"),
        evaluation=("--dataset", "cifar10", "--n-ex", "500", "--batch-size", "100", "--attacks", "clean,fgsm,pgd10,pgd20,pgd50,cw"),
        checkpoints=("last",), seeds=(0, 1, 2)),
}


def plain(label: str) -> str:
    """As in file names."""
    return label.lower().replace(", ", "-").replace(" ", "-")


def job(demo: Demo, label: str, seed: int, output: Path, results: Path) -> Job:
    """A run's training, and the evaluation of each of its checkpoints."""
    script, *flags = METHODS[label]
    name = f"{plain(label)}-seed{seed}"
    return Job(label, seed, (script, *demo.common, *flags, "--seed", str(seed)), demo.evaluation, demo.checkpoints,
               output / name, results / f"{name}.json")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("name", choices=DEMOS)
    parser.add_argument("--data-dir", default="data/", help="where data sets lie, and are downloaded to (default: data/)")
    parser.add_argument("--output", default="output/", help="where the runs' own files go (default: output/)")
    parser.add_argument("--results", default="output/", help="where the JSON and the figure go (default: output/)")
    parser.add_argument("--only", help="some of the methods by their file names, as fgsm-sdi,fgsm-sdi-hard-labels (default: all of the demo)")
    parser.add_argument("--seeds", help="as 0,1,2 (default: the demo's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes at a time (default: the number of cores)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise Misuse(f"--jobs {args.jobs}: must be at least 1")
    demo, began = DEMOS[args.name], time.perf_counter()
    output, results = Path(args.output) / f"demo-{args.name}", Path(args.results) / f"demo-{args.name}"
    load(demo.dataset, args.data_dir)  # once, before all processes want it
    known = {plain(label): label for label in demo.methods}
    wanted = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in wanted if plain(name) not in known]:
        raise Misuse(f"--only {args.only}: {unknown[0]} is not one of {', '.join(known)}")
    labels = [known[plain(name)] for name in wanted]
    seeds = [int(seed) for seed in numbers("seeds", args.seeds)] if args.seeds else demo.seeds
    jobs = [job(demo, label, seed, output, results) for seed in seeds for label in labels]
    print(f"runs: {len(jobs)}, {args.jobs} at a time; their files are in {output}", flush=True)
    failed, unfinished = do_all(jobs, Path(args.data_dir), [args.device] * args.jobs)
    minutes = (time.perf_counter() - began) / 60
    runs = show.read(results)
    if runs:
        print("\n" + show.table(runs, markdown=False) + f"\n\n{show.legend(runs)}".rstrip())
        (show.curves if len(runs) < 8 else show.panels)(runs, results / "curves")
        print(f"\nfigure: {results}/curves.png; results: {results}/*.json")
    print(f"{minutes:.1f} minutes on {cores()} cores")
    if failed or unfinished:
        raise Failure("; ".join([*failed, *unfinished]))


if __name__ == "__main__":
    with one_sentence():
        main()
