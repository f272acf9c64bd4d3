"""Evaluates a checkpoint, of any method here and of the published repositories, as the papers' tables do.

Clean accuracy; FGSM, PGD-10, -20 and -50 (one restart, random start); C&W (20 steps on the margin); APGD and AutoAttack
(standard version, by pyautoattack, one attack at a time: an interrupted evaluation continues). The verdict is fp32, in
eval mode, on inputs in [0, 1]. Writes evaluation.json, a verdict per image, the adversarial images, and the claim card:
checks without which the numbers are not to be trusted (docs/claim-card.md). Under torchrun every process takes its part
of the images.
"""
from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import card, checkpoint, data, distributed, evaluate, foreign, record
from engine.config import Parser, doubtful, spelled
from engine.errors import Misuse, one_sentence
from engine.device import chosen_device, keep_freed_memory

DATASET_OF = {(10, 1): "digits", (10, 3): "cifar10", (100, 3): "cifar100", (43, 3): "gtsrb", (200, 3): "tiny-imagenet", (1000, 3): "imagenet"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="the checkpoint")
    parser.add_argument("--model", help="architecture, where the file leaves it open: a name from models, or a published one such as ResNet18")
    parser.add_argument("--normalise", help="normalisation that the weights expect, where the file leaves it open: none, cifar10, cifar100, imagenet, ..., "
                        "or its own as mean/std, 0.5,0.5,0.5/0.25,0.25,0.25 say, of images in [0, 1]")
    parser.add_argument("--which", choices=foreign.SNAPSHOTS, default="best", help="of a file that holds both")
    parser.add_argument("--dataset", choices=list(data.SETS),
                        help="default: what the checkpoint says, or what its classes and channels fit")
    parser.add_argument("--data-dir", default="data/", help="where data sets lie (default: data/)")
    parser.add_argument("--norm", default="Linf", help="threat model: only Linf (default: Linf)")
    parser.add_argument("--epsilon", type=float, help="radius in 255ths (default: the checkpoint's own, or 8)")
    parser.add_argument("--pgd-alpha", type=float, help="step of PGD and C&W in 255ths (default: epsilon / 4)")
    parser.add_argument("--attacks", default=",".join(evaluate.COLUMNS), help=f"columns to measure (default: {','.join(evaluate.COLUMNS)})")
    parser.add_argument("--n-ex", type=int, help="the first N test images only (default: all); sets sorted by class are in a fixed random order")
    parser.add_argument("--card-n", type=int, default=256, help="images of the claim card; below 100, no card (default: 256)")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: as many as the evaluation had that is continued; 500 on the CPU; "
                        f"on a GPU what half of its free memory holds, up to {evaluate.LARGEST_BATCH})")
    parser.add_argument("--compile", action="store_true", help="let the attacks search with the compiled network; the verdict is the plain one's. "
                        "Has never been run on a GPU so far")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts and of AutoAttack (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--out-dir", help="where the results go (default: beside the checkpoint, in <name>-evaluation/)")
    args = parser.parse_args(argv)
    if args.norm != "Linf":
        raise Misuse(f"--norm {args.norm}: only Linf is implemented")
    for name in ("epsilon", "pgd_alpha", "n_ex", "batch_size"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise Misuse(f"{spelled(name)} {getattr(args, name)}: must be above 0, and finite")
    if not 0 <= args.seed < 2**63:
        raise Misuse(f"--seed {args.seed}: must lie in 0..2^63-1")
    if args.card_n < 0:
        raise Misuse(f"--card-n {args.card_n}: must not be below 0")
    return args


def main(args: argparse.Namespace) -> dict:
    """Evaluates, prints, writes; returns what it wrote to evaluation.json. Of torchrun's processes the first one does, and the others return {}."""
    began, source = time.perf_counter(), record.source()
    columns = evaluate.columns_named(args.attacks)
    device = distributed.start(chosen_device(args.device), seldom=True)
    leads = distributed.rank() == 0
    keep_freed_memory(device)
    path = Path(args.model_path)
    out_dir = Path(args.out_dir or path.with_name(path.stem + "-evaluation"))

    container = foreign.read(path)
    is_ours = {"method", "weights", "state_dict"} <= container.keys()  # another repository's epsilon may be a fraction of 1, and its names are not ours
    said = {key: value for key, value in container.items() if is_ours and isinstance(value, (int, float, str))}
    name = args.dataset or said.get("dataset") or suitable_dataset(path, container, args)
    with distributed.first_process_first():
        dataset = data.load(name, args.data_dir, said.get("image_size"))
    n = min(args.n_ex or len(dataset.x_test), len(dataset.x_test))
    x, y = torch.from_numpy(dataset.pixels(dataset.x_test[:n])), torch.from_numpy(dataset.y_test[:n])
    model, report = foreign.load(
        path, container=container, model=args.model, normalise=args.normalise, which=args.which, device=device,
        images=data.to_images(torch.from_numpy(dataset.pixels(dataset.x_train[:1000]))), labels=torch.from_numpy(dataset.y_train[:1000]))
    for what, wanted in (("classes", dataset.classes), ("channels", dataset.channels)):
        if report[what] != wanted:
            raise Misuse(f"{path} has {report[what]} {what}, {name} has {wanted}: choose another --dataset")
    if dataset.classes < 4 and "aa" in columns:
        raise Misuse(f"--attacks {args.attacks}: {name} has {dataset.classes} classes, and AutoAttack's targeted attack compares four logits; leave out aa")
    evaluate.check_finite(model, x)
    epsilon = args.epsilon or said.get("epsilon", 8.0)
    if isinstance(epsilon, str) or not 0 < epsilon <= 255:
        raise Misuse(f"the radius {epsilon}, of --epsilon or of {path}: must be a number of 255ths, above 0 and up to 255; give --epsilon")
    alpha = args.pgd_alpha or epsilon / 4
    asked = {"dataset": name, "arch": report["arch"], "epsilon": epsilon, "pgd_alpha": alpha, "norm": "Linf", "n": n, "seed": args.seed}
    evaluate.check_replaceable(out_dir / "evaluation.json", {"checkpoint": report, "metrics": columns, **asked})
    saved = out_dir / "autoattack.pth"
    settings = dict(eps=epsilon / 255, seed=args.seed)
    plain = [column for column in columns if column not in evaluate.AUTOATTACK_COLUMNS]
    settings["batch_size"] = evaluate.batch_size_for(model, x, y, asked=args.batch_size, path=saved if len(plain) < len(columns) else None, **settings)
    if leads:
        out_dir.mkdir(parents=True, exist_ok=True)
        _lock = checkpoint.lock(out_dir)  # held until this returns: two evaluations would write the same files
        print(f"{path}: {report['arch']} on {n} test images of {name}, epsilon {epsilon:g}/255", flush=True)

    found: dict[str, torch.Tensor] = {}
    seconds = {"loading": time.perf_counter() - began}
    search = None
    if args.compile:
        began = time.perf_counter()
        search = evaluate.CompiledSearch(model, x[:settings["batch_size"]], y[:settings["batch_size"]])
        seconds["compilation"] = time.perf_counter() - began
    if plain:
        began, part = time.perf_counter(), distributed.shard(n)
        with tqdm(total=len(x[part]), desc=", ".join(plain), unit="image", disable=None if leads else True) as bar:
            mine = evaluate.verdicts(model, x[part], y[part], columns=plain, alpha=alpha / 255, first=part.start,
                                     search=search, progress=bar.update, **settings)
        found.update({column: distributed.gathered(standing, n) for column, standing in mine.items()})
        seconds["pgd"] = time.perf_counter() - began
    if len(plain) < len(columns):
        found.update(evaluate.auto_attack(model, x, y, columns=columns, path=saved, search=search, classes=dataset.classes,
                                          log=functools.partial(print, flush=True) if leads else lambda line: None, **settings))
    if not leads:
        return {}

    attacked = checkpoint.load(saved) if len(plain) < len(columns) else {}
    if attacked:
        seconds["autoattack"] = attacked["seconds"]  # those of earlier parts among them
    claim = card.build(model, x, y, found=found, n=args.card_n, classes=dataset.classes, alpha=alpha / 255, **settings, saved=attacked or None)
    seconds["card"] = claim["seconds"]

    with evaluate.trustworthy():  # so that what is written is as it was while measuring
        provenance = record.provenance(device, "fp32", record.continued(source, attacked.get("source")))
    content = {
        "model_path": str(path), **{key: said.get(key) for key in ("method", "epoch", "weights")}, "checkpoint": report, **asked,
        "test_order": "a fixed permutation of the files" if dataset.shuffled else "of the files",
        "batch_size": settings["batch_size"], "compiled": args.compile, "processes": distributed.world_size(),
        "metrics": {column: record.percent(standing) for column, standing in found.items()},
        "warnings": [*doubtful(epsilon), *report["doubts"], *dict.fromkeys(attacked.get("warnings", [])), *card.warnings(claim, n, len(dataset.x_test))],
        "card": claim, "verdicts": "verdicts.npz",
        "config": vars(args), "seconds": seconds, "images_per_second": n / sum(seconds.get(part, 0.0) for part in ("pgd", "autoattack")),
        "peak_memory_bytes": record.peak_memory(device), **provenance,
    }
    with record.replacing(out_dir / "verdicts.npz") as file:
        np.savez_compressed(file, **{column: standing.numpy() for column, standing in found.items()})
    record.write_json(content, out_dir / "evaluation.json")
    show(content, out_dir)
    return content


def suitable_dataset(path: Path, container: dict, args: argparse.Namespace) -> str:
    """The data set with as many classes and channels as the weights have, for a file that does not name its own."""
    with foreign.naming(path):
        weights, origin = foreign.unwrap(container, args.which)
        network = foreign.candidates(weights, arch=origin.arch, model=args.model, normalise=args.normalise)[0]
    shape = network.classes, network.channels
    if shape not in DATASET_OF:
        raise Misuse(f"{path}: no data set here has {shape[0]} classes and {shape[1]} channels; say --dataset")
    return DATASET_OF[shape]


def show(content: dict, out_dir: Path) -> None:
    """The papers' columns, as text."""
    print(f"\n{content['model_path']}: {content['arch']}, normalisation {content['checkpoint']['normalise']} ({content['checkpoint']['reason']}), "
          f"on {content['n']} test images of {content['dataset']}, epsilon {content['epsilon']:g}/255, fp32")
    for column, metric in content["metrics"].items():
        print(f"  {column:6s} {metric['value']:6.2f} %{card.mark(content):1s}  (95 %: {metric['interval'][0]:.2f} to {metric['interval'][1]:.2f}, n = {metric['n']})")
    print(card.text(content["card"]))
    for sentence in content["warnings"]:
        print(f"warning: {sentence}")
    print(f"written to {out_dir}/evaluation.json")


if __name__ == "__main__":
    with distributed.leaving(), one_sentence():
        main(parse())
