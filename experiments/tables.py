"""The papers' tables as data: rows, the exact command of each, and the published numbers (published.csv).

A row names its script and the flags that are its own; the table adds those of its recipe, and a scale may add more. What
is measured belongs to a command, not to a table: a run that stands in several tables is done once.
"""
from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from engine.errors import Misuse
from experiments.runner import Job

Flags = tuple[str, ...]
SEEDS = range(100)  # as many as a table is ever looked up for


@dataclass(frozen=True)
class Row:
    """method, variant: as the paper has them. command: script and the row's own flags, or nothing where it is not offered here."""

    method: str
    command: Flags = ()
    variant: str = ""
    epsilon: str = "8"

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.method, self.variant, f"eps={self.epsilon}" if self.epsilon != "8" else "") if part)


@dataclass(frozen=True)
class Table:
    """paper, number, dataset: its key in published.csv. recipe: flags of every row. notes: what is known to be wrong in it, or open."""

    paper: str
    number: str
    dataset: str
    title: str
    recipe: Flags
    rows: tuple[Row, ...]
    checkpoints: tuple[str, ...] = ("best", "last")
    columns: tuple[str, ...] = ("clean", "pgd10", "pgd20", "pgd50", "cw", "apgd", "aa")
    notes: tuple[str, ...] = ()

    def command(self, row: Row, seed: int, scale: Scale) -> Flags:
        """Script and flags of a row's training run; where a flag stands there twice, the second one counts."""
        script, *own = row.command
        return (script, "--dataset", self.dataset, "--epsilon", row.epsilon, *self.recipe, *own, *scale.training(self, row), "--seed", str(seed))

    def job(self, row: Row, seed: int, scale: Scale, output: Path, results: Path) -> Job:
        """A row's run of one seed: what trains and evaluates it, and where in `output` and `results` its files go."""
        command = last_of_each(self.command(row, seed, scale))
        digest = hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
        name = f"{Path(command[0]).stem.removeprefix('train_')}-{self.dataset}-{digest}-seed{seed}"
        evaluation, kind = ("--dataset", self.dataset, "--epsilon", row.epsilon, *scale.evaluation), ""
        if "aa" not in self.columns:  # an evaluation of its own, that a table with all columns does not take for a whole one
            evaluation, kind = (*evaluation, "--attacks", ",".join(self.columns)), "-" + "-".join(self.columns)
        return Job(row.name, seed, command, evaluation, self.checkpoints, output / ("small" if scale.shrunk else "full") / name,
                   results / scale.name / f"{name}{kind}.json", ("-quick" if scale.name == "quick" else "") + kind)

    def done(self, row: Row, scale: Scale, output: Path, results: Path) -> list[Job]:
        """The row's runs whose JSON is there, by seed."""
        jobs = [self.job(row, seed, scale, output, results) for seed in SEEDS] if row.command else []
        return [job for job in jobs if job.result.is_file()]

    def offered(self, names: Sequence[str] = ()) -> dict[str, Row]:
        """The rows that have a command: those named, or all.

        Raises:
            Misuse: one that is named has none.
        """
        rows = {row.name: row for row in self.rows if row.command}
        if unknown := [name for name in names if name not in rows]:
            raise Misuse(f"the table \"{self.title}\" offers {', '.join(rows)}, not {unknown[0]}: choose with --rows, or another table")
        return {name: rows[name] for name in names or rows}

    def published(self, row: Row, checkpoint: str) -> dict[str, float]:
        """The row's published accuracies in percent, and minutes, of those that the paper gives."""
        found = published().get((self.paper, self.number, self.dataset, row.epsilon, row.method, row.variant, checkpoint), {})
        return {name: float(value) for name, value in found.items() if value}


def following(flags: Flags) -> dict[str, str]:
    """By each word of a command the next one: a flag's value, where it has one."""
    return dict(zip(flags, flags[1:]))


@dataclass(frozen=True)
class Scale:
    """How large a table is made.

    full: as in the papers. quick: the same runs, evaluated on the first 1,000 images only. small: a few thousand real
    images and narrow networks, minutes on a CPU; its numbers are of their own kind.
    """

    name: str
    evaluation: Flags = ()
    shrunk: bool = False

    def training(self, table: Table, row: Row) -> Flags:
        """Flags that shrink a row's training; none where it is as published."""
        if not self.shrunk:
            return ()
        wide = {"wideresnet34-10": "1", "wideresnet70-16": "1", "wideresnet34-20": "1", "resnet50": "8"}
        arch, own = following(table.recipe).get("--arch", "resnet18"), following(row.command)
        falls = [f"{10 * float(epoch) / float(own['--epochs']):g}" for epoch in own["--milestones"].split(",")] if "--milestones" in own else ()
        teacher = ("--teacher-width", "8") if row.command[0] == "train_lbgat.py" and arch in wide else ()
        return ("--width", wide.get(arch, "8"), *teacher, "--train-size", "4000", "--epochs", "10", "--batch-size", "64", "--select-on", "val", "--val-size", "200",
                "--measure-train", "200", "--snapshots", "1,4,7,10", *(("--milestones", ",".join(falls)) if falls else ()))


SCALES = {scale.name: scale for scale in (
    Scale("full"), Scale("quick", ("--n-ex", "1000")), Scale("small", ("--n-ex", "100", "--batch-size", "100"), shrunk=True))}


def last_of_each(command: Flags) -> Flags:
    """A command without the flags that a later one overrides, so that equal runs have equal commands."""
    script, *rest = command
    flags: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            flags.pop(word, None)
            flags[word] = []
        else:
            flags[list(flags)[-1]].append(word)
    return (script, *(word for name in sorted(flags) for word in (name, *flags[name])))


@cache
def published() -> dict[tuple[str, ...], dict[str, str]]:
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return {tuple(row.pop(key) for key in ("paper", "table", "dataset", "epsilon", "method", "variant", "checkpoint")): row
                for row in csv.DictReader(file)}


# ---- recipes --------------------------------------------------------------------------------------------------------

ON_TEST = ("--select-on", "test", "--val-size", "0")  # how the papers pick the best checkpoint
STEP = ON_TEST  # 110 epochs, x0.1 after 100 and 105: the scripts' own default
CYCLIC = (*ON_TEST, "--lr-schedule", "cyclic", "--epochs", "30")
WIDE = (*ON_TEST, "--arch", "wideresnet34-10")
TINY = (*ON_TEST, "--augment", "none")  # as the published Tiny ImageNet scripts
BENCHMARK = ("--epochs", "100", "--lr", "0.1", "--lr-schedule", "onecycle", "--ema", "0.9995", "--val-size", "1000")

SDI, SDI_PAPER = "train_fgsm_sdi.py", "FGSM-SDI"
PGD_AT, FGSM_RS = Row("PGD-AT", ("train_pgd_at.py",)), Row("FGSM-RS", ("train_fgsm_rs.py",))
CKPT, GA = Row("FGSM-CKPT", ("train_fgsm_ckpt.py",)), Row("FGSM-GA", ("train_fgsm_ga.py",))
FREE, FGSM_SDI = Row("Free-AT(m=8)", ("train_free_at.py", "--replays", "8")), Row("FGSM-SDI", (SDI, "--k", "20"))
HARD_LABELS = Row("FGSM-SDI", (*FGSM_SDI.command, "--label-factor", "1"), "label factor 1")  # the paper's other reading
NUAT, GAT = Row("NuAT", ("train_nuat.py",)), Row("GAT", ("train_gat.py",))
BP, EP, MEP = (Row(f"FGSM-{name.upper()}", (f"train_fgsm_{name}.py",)) for name in ("bp", "ep", "mep"))
SIX = (PGD_AT, FGSM_RS, CKPT, GA, FREE, FGSM_SDI)
TRADES, FAT = Row("TRADES", ("train_trades.py",)), Row("FAT", ("train_fat.py",))
GAIRAT, AWP, LBGAT = Row("GAIRAT", ("train_gairat.py",)), Row("AWP", ("train_awp.py",)), Row("LBGAT", ("train_lbgat.py", "--beta", "6"))
LAS_AT = Row("LAS-AT", ("train_las_at.py",))
LAS_TRADES = Row("LAS-TRADES", ("train_las_at.py", "--base", "trades", "--epochs", "100"))
LAS_TRADES_TINY = Row("LAS-TRADES", ("train_las_at.py", "--base", "trades"))  # 110 epochs, as its published command has them
AS_AWP = ("--normalise", "dataset", "--padding", "reflect")  # AWP's own code, and LAS-AWP's on CIFAR-10; on other sets the latter does neither
LAS_AWP = Row("LAS-AWP", ("train_las_at.py", "--base", "awp", "--epochs", "200"))
LAS_AWP_CIFAR10 = Row("LAS-AWP", (*LAS_AWP.command, *AS_AWP))


def at_radii(*rows: Row) -> tuple[Row, ...]:
    """ImageNet's three radii."""
    return tuple(replace(row, epsilon=epsilon) for row in rows for epsilon in ("2", "4", "8"))


def smoothed(classes: int, smoothing: float = 0.4) -> str:
    """torch's label smoothing as the label factor that is the same."""
    return f"{1 - smoothing * (classes - 1) / classes:g}"


def benchmark(dataset: str, classes: int) -> Table:
    """A data set's table of the FastAT Benchmark."""
    factor = ("--label-factor", smoothed(classes))
    liet = ("--label-factor", "0.2", "--liet-lambda", "200") if dataset == "cifar100" else ()
    twice = () if classes == 10 else ("--label-factor", f"{0.36 + 0.4 / classes:g}", "--attack-factor", smoothed(classes))  # the script's own: of ten classes
    tiny = ("--val-size", "2000", "--arch", "preactresnet18-gap") if dataset == "tiny-imagenet" else ()
    unclipped = ("--max-grad-norm", "0") if dataset == "tiny-imagenet" else ()  # the benchmark does not clip, FGSM-PGI's own script does
    pgd_at = ("train_pgd_at.py", "--attack-bn", "eval", *factor)  # by torchattacks, which puts the network into evaluation mode
    offered = {
        "FGSM-AT": ("train_fgsm_rs.py", "--init", "zero", *factor), "FGSM-RS": ("train_fgsm_rs.py", *factor), "N-FGSM": ("train_n_fgsm.py", *factor),
        "FREE-AT": ("train_free_at.py", "--replays", "4", "--epochs", "50", *factor), "GRAD-ALIGN": ("train_fgsm_ga.py", "--ga-lambda", "0.2", *factor),
        "NU-AT": ("train_nuat.py", "--nuclear", "4", *factor), "GAT": ("train_gat.py", *factor), "FGSM-PGI": ("train_fgsm_mep.py", "--reset", "40", *unclipped, *factor),
        "FGSM-UAP": ("train_fgsm_uap.py", *factor), "FGSM-RS-CS": ("train_fgsm_rs_cs.py", *twice), "LIET": ("train_liet.py", *liet),
        "PGD-AT": (*pgd_at, "--ema", "0"), "PGD-AT-WA": pgd_at,
    }
    absent = ("FGSM-CUAP", "FGSM-FUAP", "FGSM-PCO", "FGSM-MEP-CS", "N-AAER", "ZERO-GRAD", "ELLE", "SSAT")
    rows = [Row(name, command) for name, command in offered.items()] + [Row(name) for name in absent if dataset != "tiny-imagenet" or name != "N-AAER"]
    return Table("FastAT", "main", dataset, f"the FastAT Benchmark's recipe, {dataset}", (*BENCHMARK, *tiny),
                 (*rows, Row("FGSM-SDI", (*FGSM_SDI.command, *factor))), ("best",), ("clean", "pgd10", "pgd20", "pgd50", "aa"),
                 ("Published: means of 3 seeds.", "FGSM-SDI is not in the benchmark: it is here under the same recipe.",
                  "Best checkpoint: at equal PGD-10 the benchmark takes the raw weights before their average, then the higher clean accuracy, then the earlier epoch; "
                  "ours the average, then the later epoch.",
                  "PGD columns: in the benchmark's, torchattacks', every image takes all steps and the last point counts; in ours an image stops where it is misclassified, "
                  "so that from the same start they cannot be higher.",
                  "Free-AT: the benchmark's rate only rises (a cycle of 200 epochs, of which 50 are trained), and every batch begins at zero; here the cycle is whole, "
                  "and the perturbation is carried from batch to batch.",
                  "PGD-AT: the benchmark's attack has hard labels, ours those of the loss. GRAD-ALIGN: hard labels in its step and penalty there, and the noisy images clipped to [0, 1].",
                  "FGSM-PGI: the benchmark clips x + eta to [0, 1] before its first pass; here it may leave it, as in the method's own code.",
                  "NU-AT: the benchmark attacks in training mode, its weight grows over the whole run, and the norm of a short batch is divided by that batch's size; "
                  "here the attack is in evaluation mode, and the weight grows over nine tenths of the run, as in the method's own code.",
                  "GAT: in every other batch the benchmark's attack climbs the cross-entropy of a softmax of the softmax; here that of the logits."))


BASELINES = "The baselines' recipes are not given: they have this repository's common one."
CHOSEN = ("The paper does not give the label factor; its code has 0.5, which is what these rows have (--label-factor 1 is the other reading).",)
TABLES: dict[str, tuple[Table, ...]] = {
    "II": (Table(SDI_PAPER, "II", "cifar10", "FGSM-SDI: how often the generator learns", STEP,
                 tuple(Row("FGSM-SDI", (SDI, "--k", str(k)), f"k={k}") for k in (1, 2, 10, 20, 30, 40)), ("best",),
                 notes=(*CHOSEN, "Misprint: AA of k=20 is 48.52 here and 48.50 in Tables IV and V.")),),
    "III": (Table(SDI_PAPER, "III", "cifar10", "FGSM-SDI: what the generator sees", STEP,
                  (*(Row("FGSM-SDI", (SDI, "--k", "20", "--generator-input", value), f"input={name}") for name, value in (("Benign", "image"), ("Grad", "gradient"))),
                   Row("FGSM-SDI", FGSM_SDI.command, "input=Benign+Grad")),
                  columns=("clean", "pgd10", "pgd20", "pgd50", "cw", "aa"), notes=CHOSEN),),
    "IV": (Table(SDI_PAPER, "IV", "cifar10", "FGSM-SDI against PGD with few steps", STEP,
                 (*(Row(f"PGD{n}-AT", ("train_pgd_at.py", "--steps", str(n), "--init", "zero")) for n in (2, 4)), FGSM_SDI),
                 notes=CHOSEN),),
    "V": (Table(SDI_PAPER, "V", "cifar10", "ResNet18, step schedule", STEP, SIX,
                notes=(*CHOSEN, "Misprint: Free-AT's APGD of best and last, 42.18 and 45.22, cannot both be right.")),),
    "VI": (Table(SDI_PAPER, "VI", "cifar10", "WideResNet-34-10, step schedule", WIDE, SIX, ("best",),
                 notes=(*CHOSEN, "The text speaks of best and last; the table has one row per method.")),),
    "VII": (Table(SDI_PAPER, "VII", "cifar10", "ResNet18, cyclic schedule", CYCLIC, (*SIX, HARD_LABELS), notes=CHOSEN),),
    "VIII": (Table(SDI_PAPER, "VIII", "cifar100", "ResNet18, step schedule", STEP, SIX, notes=CHOSEN),),
    "IX": (Table(SDI_PAPER, "IX", "tiny-imagenet", "PreActResNet18, step schedule", TINY, SIX,
                 notes=(*CHOSEN, "The published numbers are of 5,000 images (all are multiples of 0.02).",
                        "FGSM-GA: 34.04 / 4.34 AA here, 43.44 / 14.28 in the FGSM-PGI paper for the same cell.")),),
    "X": (Table(SDI_PAPER, "X", "imagenet", "ResNet50", ON_TEST,
                at_radii(PGD_AT, Row("Free-AT(m=4)", ("train_free_at.py", "--replays", "4")), FGSM_RS, FGSM_SDI), ("best",),
                ("clean", "pgd10", "pgd50"), notes=CHOSEN),),
    "PGI": (
        *(Table("FGSM-PGI", "main", dataset, f"FGSM-PGI's table, {dataset}", recipe, (PGD_AT, FGSM_RS, CKPT, NUAT, GAT, GA, FREE, BP, EP, MEP),
                columns=("clean", "pgd10", "pgd20", "pgd50", "cw", "aa"), notes=notes)
          for dataset, recipe, notes in (
              ("cifar10", STEP, ("FGSM-EP: PGD-10 of the last checkpoint is above that of the best one, which is picked by PGD-10.",)),
              ("cifar100", STEP, ("Misprint: FGSM-BP's clean accuracy of the last checkpoint, 83.82, is another table's.",)),
              ("tiny-imagenet", TINY, ("Misprint: FGSM-EP's best row repeats FGSM-BP's.",
                                       "The published numbers are of 5,000 images (multiples of 0.02), but for FGSM-BP's and FGSM-EP's, which can only be of 10,000.")))),
        Table("FGSM-PGI", "main", "imagenet", "FGSM-PGI's table, ImageNet", ON_TEST,
              at_radii(Row("Free-AT(m=4)", ("train_free_at.py", "--replays", "4")), FGSM_RS, BP), ("best",), ("clean", "pgd10", "pgd50"))),
    "FastAT": (benchmark("cifar10", 10), benchmark("cifar100", 100), benchmark("tiny-imagenet", 200)),
    "LAS-1": (Table("LAS-AT", "1", "cifar10", "LAS-AT: how often the strategy network learns", STEP,
                    (PGD_AT, *(Row("LAS-AT", ("train_las_at.py", "--interval", str(k)), f"k={k}") for k in (1, 10, 20, 40, 60))), ("best",), ("clean", "pgd10")),),
    "LAS-1b": (Table("LAS-AT", "1b", "cifar10", "LAS-AWP against stronger fixed attacks", STEP,
                     (*(Row("AWP", (), f"train steps={n} train eps={e}") if e == "15" else
                        Row("AWP", ("train_awp.py", "--steps", n, "--epochs", "200", "--milestones", "100,150", *AS_AWP), f"train steps={n} train eps={e}")
                        for n, e in (("10", "8"), ("10", "15"), ("15", "8"))), LAS_AWP_CIFAR10), ("best",),
                     ("clean", "pgd10", "pgd20", "pgd50", "cw", "aa"),
                     ("A radius in training that differs from the evaluation's is not offered.",
                      "AWP has its own code's recipe here, 200 epochs and normalised images padded by reflection, as LAS-AWP has; in the other LAS tables "
                      "it has the common one, 110 epochs.")),),
    "LAS-2": (Table("LAS-AT", "2", "cifar10", "WideResNet-34-10", WIDE, (
                        PGD_AT, TRADES, Row("MART", ("train_mart.py", "--beta", "6")), FAT, GAIRAT, AWP, Row("LBGAT", ("train_lbgat.py", "--beta", "0")),
                        LAS_AT, LAS_TRADES, LAS_AWP_CIFAR10), ("best",), ("clean", "pgd10", "pgd20", "pgd50", "cw", "aa"),
                    (f"{BASELINES} They have the loss's weights that their own papers have on this network.",)),),
    "LAS-3": (Table("LAS-AT", "3", "cifar100", "WideResNet-34-10", WIDE, (PGD_AT, TRADES, Row("SAT"), AWP, LBGAT, LAS_AT, LAS_TRADES, LAS_AWP), ("best",),
                    ("clean", "pgd10", "pgd20", "pgd50", "cw", "aa"), (BASELINES,)),),
    "LAS-4": (Table("LAS-AT", "4", "tiny-imagenet", "PreActResNet18", TINY, (PGD_AT, TRADES, AWP, LAS_AT, LAS_TRADES_TINY, LAS_AWP), ("best",),
                    ("clean", "pgd50", "cw", "aa"),
                    (BASELINES, "LAS-AWP: the published script perturbs the weights from epoch 10 of 200 on, ours from the first.",
                     "The published numbers are of 5,000 images: all are multiples of 0.02, but for AWP's PGD-50.")),),
    "LAS-5": (Table("LAS-AT", "5", "cifar10", "WideResNet-70-16", (*ON_TEST, "--arch", "wideresnet70-16"), (Row("Gowal et al"), LAS_AWP_CIFAR10), ("best",), ("clean", "aa"),
                    ("Misprint or rerun: AA 57.86 here, 57.61 in its RobustBench submission.",)),
              Table("LAS-AT", "5", "cifar100", "WideResNet-34-20", (*ON_TEST, "--arch", "wideresnet34-20"), (LBGAT, LAS_AWP), ("best",), ("clean", "aa"),
                    (BASELINES,))),
    "LAS-6": (Table("LAS-AT", "6", "cifar10", "LAS-AT: the terms of the reward", STEP,
                    tuple(Row("LAS-AT", ("train_las_at.py", "--interval", "40", *weights), name) for name, weights in (
                        ("L1", ("--robust", "0", "--clean", "0")), ("L1+L2", ("--clean", "0")), ("L1+L3", ("--robust", "0")), ("L1+L2+L3", ()))),
                    ("best",), ("clean", "pgd10", "aa"), ("The whole row is Table 1's of k=40, which is why all have that interval.",)),),
    "LAS-7": (Table("LAS-AT", "7", "cifar10", "WideResNet-34-10, Madry's setting", WIDE, (Row("Madry-AT"), Row("CAT"), Row("DART"), FAT, Row("LAS-Madry-AT")), ("best",),
                    ("clean", "fgsm", "pgd20", "cw"), ("Madry's setting, and the other methods of this table, are not offered here.",)),),
    "LAS-GTSRB": (Table("LAS-AT", "GTSRB", "gtsrb", "GTSRB", STEP, (Row("Standard", ("train_standard.py",)), PGD_AT, TRADES, AWP, LAS_AT, LAS_TRADES, LAS_AWP), ("best",),
                        ("clean", "pgd50", "cw", "aa"), ("The paper does not say which network and recipe: these are the common ones.",)),),
}


def find(name: str, dataset: str | None = None) -> Table:
    """A table by its name, and where it has several data sets, that of one of them: the first when not said.

    Raises:
        Misuse: there is no such table.
    """
    if name not in TABLES:
        raise Misuse(f"table {name}: there are {', '.join(TABLES)}")
    for table in TABLES[name]:
        if dataset in (None, table.dataset):
            return table
    raise Misuse(f"table {name} --dataset {dataset}: it has {', '.join(table.dataset for table in TABLES[name])}")
