"""The papers' tables, with one command each: python reproduce.py list | run V | show V | figure NAME | site

list shows every table and how much of it is measured. run trains and evaluates what is missing, resumably; show puts what
was measured beside what was published, and leaves a cell empty where nothing was measured; figure draws; site writes one
HTML page with all of it.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from engine import record
from engine.config import Parser
from engine.data import load
from engine.errors import Failure, Misuse, one_sentence
from experiments import side_by_side, tables
from experiments.runner import all_devices, do_all
from experiments.site import page

ROOT = Path(__file__).resolve().parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--results", type=Path, default=ROOT / "results" / "tables", help="where the JSON of every run goes (default: results/tables)")
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
    run.add_argument("--time-limit", type=float, help="minutes, after which everything is saved and the next call goes on")
    run.add_argument("--devices", help="as cuda:0,cuda:1; one that stands there twice has two processes (default: every GPU, or every core)")
    run.add_argument("--data-dir", type=Path, default=Path("data/"), help="where data sets lie (default: data/)")
    run.add_argument("--output", type=Path, default=Path("output/tables"), help="where the runs' own files go (default: output/tables)")
    run.add_argument("--print", action="store_true", help="only print the commands")
    show = command("show", "what was measured of a table beside what was published")
    about_a_table(show)
    show.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    show.add_argument("--tolerance", type=float, default=1.0, help="points from the published accuracy beyond which a cell is marked (default: 1)")
    site = command("site", "writes one self-contained HTML page of everything measured and published")
    site.add_argument("--page", type=Path, default=ROOT / "results" / "index.html", help="the file (default: results/index.html)")
    return parser.parse_args(argv)


def list_(args: argparse.Namespace) -> None:
    for line in side_by_side.overview(args.results):
        print(line)


def run(args: argparse.Namespace) -> None:
    table, scale = tables.find(args.table, args.dataset), tables.SCALES[args.scale]
    offered = {row.name: row for row in table.rows if row.command}
    wanted = args.rows.split(",") if args.rows else list(offered)
    if unknown := [name for name in wanted if name not in offered]:
        raise Misuse(f"--rows {args.rows}: table {args.table} offers {', '.join(offered)}, not {unknown[0]}")
    if args.seeds < 1:
        raise Misuse(f"--seeds {args.seeds}: must be at least 1")
    jobs = [table.job(offered[name], seed, scale, args.output, args.results) for seed in range(args.seeds) for name in wanted]
    if args.print:
        for job in jobs:
            print("python", *job.train, "--data-dir", args.data_dir, "--out-dir", job.folder)
        return
    missing = [job for job in jobs if not job.is_done()]
    print(f"table {args.table}, {table.dataset}, scale {scale.name}: {len(jobs)} runs, {len(jobs) - len(missing)} of them done", flush=True)
    if missing:
        load(table.dataset, args.data_dir)  # once, before all processes want it
        devices = args.devices.split(",") if args.devices else all_devices()
        if said := do_all(missing, args.data_dir, devices, args.time_limit):
            raise Failure("; ".join(said))


def show(args: argparse.Namespace) -> None:
    table = tables.find(args.table, args.dataset)
    print(side_by_side.rendered(table, tables.SCALES[args.scale], args.results, args.format, args.tolerance))


def site(args: argparse.Namespace) -> None:
    record.write_text(page(args.results.parent), args.page)
    print(args.page)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    {"list": list_, "run": run, "show": show, "site": site}[args.command](args)


if __name__ == "__main__":
    with one_sentence():
        main()
