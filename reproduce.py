"""The papers' tables, with one command each: python reproduce.py list | run V | show V | seeds RUN ... | figure NAME | site

list shows every table and how much of it is measured. run trains and evaluates what is missing, resumably; show puts what
was measured beside what was published, and leaves a cell empty where nothing was measured; seeds puts runs of your own together,
each evaluated before; figure draws; site writes one HTML page with all of it.
"""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from engine import record
from engine.config import Parser, spelled
from engine.data import load
from engine.errors import Failure, Misuse, one_sentence
from engine.device import chosen_device, keep_freed_memory
from experiments import figures, side_by_side, tables
from experiments.figures import sources
from experiments.runner import all_devices, do_all
from experiments.show import Runs, over_seeds
from experiments.site import page

RESULTS = record.ROOT / "results"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text + more)
        added.add_argument("--results", type=Path, default=RESULTS / "tables", help="where the JSON of every run goes (default: results/tables)")
        return added

    def about_a_table(added: argparse.ArgumentParser) -> None:
        added.add_argument("table", help="its name, as list shows it")
        added.add_argument("--dataset", help="where a table has several (default: the first)")
        added.add_argument("--scale", choices=list(tables.SCALES), default="full",
                           help="full: as published; quick: evaluated on the first 1,000 images; small: minutes on a CPU (default: full)")

    command("list", "every table, and how much of it is measured")
    run = command("run", "trains and evaluates what is missing of a table")
    about_a_table(run)
    run.add_argument("--rows", help="some of its rows, with commas between them (default: all that are offered)")
    run.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on (default: 1)")
    run.add_argument("--time-limit", type=float, help="minutes, after which everything is saved and the status is 0, or 1 where a run failed; the next call goes on")
    run.add_argument("--devices", help="as cuda:0,cuda:1; one that stands there twice has two processes (default: every GPU, or every core)")
    run.add_argument("--data-dir", type=Path, default=Path("data/"), help="where data sets lie (default: data/)")
    run.add_argument("--output", type=Path, default=Path("output/tables"), help="where the runs' own files go (default: output/tables)")
    run.add_argument("--compile", action="store_true", help="train by the fast path (docs/performance.md)")
    run.add_argument("--print", action="store_true", help="only print the commands")
    show = command("show", "what was measured of a table beside what was published")
    about_a_table(show)
    show.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    show.add_argument("--measured", action="store_true", help="without the rows that have not been measured")
    show.add_argument("--tolerance", type=float, default=1.0,
                      help="points from the published accuracy beyond which a cell is marked, where so many images can tell (default: 1)")
    text = "mean and range over the seeds of runs of your own, each evaluated before"
    seeds = commands.add_parser("seeds", help=text, description=text)
    seeds.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="the --out-dir of a run; those that differ in the seed alone share a row")
    listed = "".join(f"\n  {name:<17} {each.text}" for name, each in figures.FIGURES.items())
    figure = command("figure", "measures and draws one of the papers' figures", f":\n{listed}\n\nDescribed in docs/figures.md.")
    figure.add_argument("name", choices=list(figures.FIGURES), metavar="NAME", help="one of those above")
    figure.add_argument("--table", help="whose runs (default: V; strategies: LAS-6)")
    figure.add_argument("--dataset", help="where a table has several (default: the first)")
    figure.add_argument("--scale", choices=list(tables.SCALES), default="full", help="of the runs (default: full)")
    figure.add_argument("--rows", help="some of the table's rows, with commas between them (default: the figure's own)")
    figure.add_argument("--runs", help="instead of a table's: folders that training scripts filled, or demos' JSON, with commas between them")
    figure.add_argument("--checkpoint", choices=("best", "last"), default="best", help="where networks are measured (default: best)")
    figure.add_argument("--data-dir", type=Path, default=Path("data/"), help="where data sets lie (default: data/)")
    figure.add_argument("--output", type=Path, default=Path("output/tables"), help="where the runs' own files lie (default: output/tables)")
    figure.add_argument("--figures", type=Path, default=RESULTS / "figures", help="where the JSON, .pdf and .png go (default: results/figures)")
    figure.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    figure.add_argument("--redraw", action="store_true", help="only draw again what was measured")
    site = command("site", "writes one self-contained HTML page of everything measured and published")
    site.add_argument("--page", type=Path, default=RESULTS / "index.html", help="the file (default: results/index.html)")
    return parser.parse_args(argv)


def list_(args: argparse.Namespace) -> None:
    for line in side_by_side.overview(args.results):
        print(line)


def run(args: argparse.Namespace) -> None:
    table, scale = tables.find(args.table, args.dataset), tables.SCALES[args.scale]
    rows = table.offered(args.rows.split(",") if args.rows else ())
    if args.seeds < 1:
        raise Misuse(f"--seeds {args.seeds}: must be at least 1")
    jobs = [table.job(row, seed, scale, args.output, args.results) for seed in range(args.seeds) for row in rows.values()]
    if args.compile:
        jobs = [replace(job, train=(*job.train, "--compile")) for job in jobs]
    if args.print:
        for job in jobs:
            print("python", *job.train, "--data-dir", args.data_dir, "--out-dir", job.folder)
        return
    missing = [job for job in jobs if not job.is_done()]
    devices = args.devices.split(",") if args.devices else all_devices()
    others = f", the others now, {len(devices)} at a time on {', '.join(dict.fromkeys(devices))}" if missing else ""
    print(f"table {args.table}, {table.dataset}, scale {scale.name}: {len(jobs)} runs, {len(jobs) - len(missing)} of them done{others}", flush=True)
    if changed := sum(side_by_side.dirty(record.read_json(job.result)) for job in jobs if job not in missing):
        print(f"warning: {changed} of those done {side_by_side.CHANGED}", flush=True)
    if missing:
        source = record.source()
        if source["dirty"]:
            why = "this tree differs from its commit" if source["commit"] else "git does not tell the commit of this tree (SOURCE_COMMIT in the environment would)"
            print(f"warning: {why}: what is measured now is written down, and never shown. Commit first, or run from a checkout of its own (git worktree add), "
                  "which nobody edits meanwhile", flush=True)
        load(table.dataset, args.data_dir)  # once, before all processes want it
        failed, unfinished = do_all(missing, args.data_dir, devices, args.time_limit)
        for said in unfinished:
            print(f"  {said}", flush=True)
        if failed:
            raise Failure("; ".join(failed))
        if unfinished:
            print(f"{len(unfinished)} of {len(missing)} runs are not finished: the same command goes on")
            return
    print("nothing is missing")


def show(args: argparse.Namespace) -> None:
    table = tables.find(args.table, args.dataset)
    print(side_by_side.rendered(table, tables.SCALES[args.scale], args.results, args.format, args.tolerance, args.measured))


def seeds(args: argparse.Namespace) -> None:
    runs: Runs = {}
    for one in sources.of_folders(args.folders):
        if not one.content["evaluations"]:
            raise Misuse(f"{one.folder} holds no evaluation: python test_FGSM_SDI.py --model_path {one.folder}/best.pth writes one")
        runs.setdefault(one.label, []).append(one.content)
    print(over_seeds(runs))


def figure(args: argparse.Namespace) -> None:
    figure, default, scale = figures.FIGURES[args.name], parse(["figure", args.name]), tables.SCALES[args.scale]
    name, table = args.table or figure.table, tables.find(args.table or figure.table, args.dataset)
    chosen = [*([name, table.dataset] if (args.table or args.dataset) and not args.runs else []), *(["some"] if args.rows else []),
              *([args.checkpoint] if args.checkpoint != default.checkpoint else [])]  # each another figure, in a file of its own
    path = args.figures / ("runs" if args.runs else scale.name) / f"{'-'.join([args.name, *chosen])}.json"
    if not args.redraw:
        device = chosen_device(args.device)
        keep_freed_memory(device)
        given = "".join(f" {spelled(key)} {getattr(args, key)}" for key in ("dataset", "data_dir", "output", "results")
                        if getattr(args, key) != getattr(default, key))
        if args.runs:
            runs = sources.of_folders([Path(folder) for folder in args.runs.split(",")])
        else:
            runs = figures.runs(figure, sources.Place(name, table, scale, args.output, args.results, given), args.rows.split(",") if args.rows else ())
        figures.write_measurement(args.name, runs, sources.Setting(args.data_dir, device, args.checkpoint, 200 if scale.shrunk else 1000), path)
    figures.write_pictures(path)
    print(f"{path}, and beside it {path.stem}.pdf and {path.stem}.png")


def site(args: argparse.Namespace) -> None:
    record.write_text(page(args.results), args.page)
    print(args.page)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    {"list": list_, "run": run, "show": show, "seeds": seeds, "figure": figure, "site": site}[args.command](args)


if __name__ == "__main__":
    with one_sentence():
        main()
