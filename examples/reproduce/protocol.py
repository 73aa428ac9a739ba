"""What the scripts beside this file share: tune on validation images, repeat on seeds, print tables from the rows.

Every network gets as many learning rates; seed 0 is trained at each and the validation images choose one. While that
one is the lowest or the highest tried, the next in that direction is tried too, a few times at most: the same rule for
all. The other seeds are trained at the chosen rate alone. Test images choose nothing. Rows and models are kept in
folders, one for each number of epochs, so a killed run resumes with the same command.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qconv.analysis import Chosen, Comparison, Interval, compare
from qconv.data import dataset_names
from qconv.experiment import run
from qconv.models import ARMS
from qconv.networks import NETWORKS
from qconv.rows import Row, Task, read_rows

QUICK_IMAGES = 300  # of a smoke run, which says nothing about accuracy
SMOKE = "smoke run: says nothing about accuracy"
UNJUDGED = "not judged"  # in place of an outcome
EXTENSIONS = 3  # rates tried beyond the given ones


@dataclass(frozen=True)
class Entry:
    """A network to train.

    Args:
        arm: key of `qconv.models.ARMS`.
        epochs: passes over the training images.
        rates: learning rates to choose from, ascending; more follow while the best is the first or the last.
        batch_size: images a step.
        against: arms that it is compared with at the same number of epochs, besides its controls.
        goal: data set -> test accuracy in % that this library set out to reach.
        published: data set -> what others report, as text.
        rival: whether it is there only for others to be compared with.
    """

    arm: str
    epochs: int
    rates: tuple[float, ...]
    batch_size: int = 128
    against: tuple[str, ...] = ()
    goal: dict[str, float] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    rival: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """What tells entries apart."""
        return self.arm, self.epochs

    @property
    def rivals(self) -> list[tuple[str, int]]:
        """Keys of all that it is compared with."""
        names = () if self.rival else (*NETWORKS[self.arm].controls, *self.against)
        return [(name, self.epochs) for name in names]


@dataclass(frozen=True)
class Options:
    """The command line."""

    dataset: str
    seeds: int
    out: Path
    data_dir: Path | None
    workers: int
    n_train: int | None

    def folder(self, entry: Entry) -> Path:
        """Where the entry's rows are: all rows of a folder share these settings."""
        images = "" if self.n_train is None else f"-images{self.n_train}"
        return self.out / f"{self.dataset}-epochs{entry.epochs}-batch{entry.batch_size}{images}"

    def task(self, entry: Entry, rate: float, seed: int) -> Task:
        """One training run."""
        return Task(self.dataset, entry.arm, seed, rate, 1.0, entry.epochs, entry.batch_size, self.n_train)


def parser(description: str, out: str, choice: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all scripts have; `choice` names the option that takes some of `names`."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument(f"--{choice}", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    found.add_argument("--dataset", default="mnist", help=f"{', '.join(dataset_names())} (default: mnist)")
    found.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    found.add_argument("--epochs", type=int, help="the same number for all networks (default: as the README says)")
    found.add_argument("--out", type=Path, default=Path("runs") / out, help=f"output folder (default: runs/{out})")
    found.add_argument("--data-dir", type=Path, help="folder of the image files (default: QCONV_DATA, else a download)")
    found.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    found.add_argument("--quick", action="store_true", help=f"one epoch, one rate, {QUICK_IMAGES} images: a smoke run")
    return found


def chosen_names(given: str, names: Sequence[str], choice: str) -> list[str]:
    """The comma-separated names, checked."""
    found = [name.strip() for name in given.split(",") if name.strip()]
    # However they are written: no two names differ in their capitals alone.
    spelled = {name.lower(): name for name in names}
    for name in found:
        if name.lower() not in spelled:
            raise ValueError(f"unknown --{choice} {name!r}: valid are {', '.join(names)}")
    if not found:
        raise ValueError(f"--{choice} names none: valid are {', '.join(names)}")
    return list(dict.fromkeys(spelled[name.lower()] for name in found))


def with_rivals(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each followed by those that it is compared with and that are not there yet, at the same rates."""
    entries = list(entries)
    found = {}
    for entry in entries:
        found[entry.key] = entry
        for name, epochs in entry.rivals:
            rival = replace(entry, arm=name, goal={}, published={}, rival=True)
            if (name, epochs) not in {e.key for e in entries}:
                found.setdefault((name, epochs), rival)
    return list(found.values())


# --- running ---------------------------------------------------------------------------------------------------------


def _run(pairs: list[tuple[Entry, Task]], options: Options, bar: Progress, label: str) -> dict[Task, Row]:
    shown = bar.add_task(label, total=len(pairs))
    folders: dict[Path, list[Task]] = {}
    for entry, task in pairs:
        folders.setdefault(options.folder(entry), []).append(task)
    rows: dict[Task, Row] = {}
    for folder, tasks in folders.items():
        before = len(rows)

        def on_row(done: int, total: int, row: Row | None, before: int = before) -> None:
            bar.start()  # at the first call: by then folder and data have been found good
            bar.update(shown, completed=before + done)

        found = run(tasks, folder, workers=options.workers, data_dir=options.data_dir, progress=on_row)
        rows |= dict(zip(tasks, found, strict=True))
    return rows


def _rank(row: Row) -> tuple[float, float]:
    return row.val_accuracy, -row.val_loss if math.isfinite(row.val_loss) else -math.inf


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The rate to try next: beyond `best` if that is the first or the last of at least three, as they go on."""
    if len(rates) < 3 or best not in (rates[0], rates[-1]):
        return None
    edge = rates[:3] if best == rates[0] else rates[:-4:-1]
    return float(f"{edge[1] * edge[0] / edge[2]:.3g}")  # over two steps: 0.01, 0.03, 0.1 go on by 0.3


def _tune(entries: Sequence[Entry], options: Options, bar: Progress) -> dict[tuple[str, int], float]:
    """The rate of each entry that the validation images of seed 0 choose."""
    rates = {e.key: sorted(e.rates) for e in entries}
    best: dict[tuple[str, int], float] = {}
    asked = list(entries)
    while asked:
        rows = _run([(e, options.task(e, rate, 0)) for e in asked for rate in rates[e.key]], options, bar, "seed 0")
        best |= {
            e.key: max((rows[options.task(e, rate, 0)] for rate in rates[e.key]), key=_rank).task.lr for e in asked
        }
        asked = [e for e in asked if len(rates[e.key]) < len(e.rates) + EXTENSIONS]
        more = {e.key: _beyond(rates[e.key], best[e.key]) for e in asked}
        asked = [e for e in asked if more[e.key] is not None]
        rates |= {e.key: sorted([*rates[e.key], rate]) for e in asked if (rate := more[e.key]) is not None}
    return best


def train(entries: Sequence[Entry], options: Options) -> dict[tuple[str, int], Chosen]:
    """Tune on seed 0, then train the other seeds; what is finished is not trained again."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
    try:
        best = _tune(entries, options, bar)
        tasks = {e.key: [options.task(e, best[e.key], seed) for seed in range(options.seeds)] for e in entries}
        rows = _run([(e, task) for e in entries for task in tasks[e.key]], options, bar, "chosen rate, seeds")
    finally:
        bar.stop()
    return {e.key: Chosen(ARMS[e.arm], (best[e.key], 1.0), tuple(rows[task] for task in tasks[e.key])) for e in entries}


def finished(entries: Sequence[Entry], options: Options) -> dict[tuple[str, int], Chosen]:
    """What `train` gave for those entries that have all their rows; trains nothing."""
    found = {}
    for entry in entries:
        folder = options.folder(entry) / "rows.csv"
        rows = {row.task: row for row in read_rows(folder)} if folder.exists() else {}
        rates = sorted(entry.rates)
        while all(options.task(entry, rate, 0) in rows for rate in rates):
            best = max((rows[options.task(entry, rate, 0)] for rate in rates), key=_rank).task.lr
            more = _beyond(rates, best) if len(rates) < len(entry.rates) + EXTENSIONS else None
            if more is not None:
                rates = sorted([*rates, more])
                continue
            own = [rows.get(options.task(entry, best, seed)) for seed in range(options.seeds)]
            if None not in own:
                found[entry.key] = Chosen(ARMS[entry.arm], (best, 1.0), tuple(row for row in own if row is not None))
            break
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def points(interval: Interval, *, sign: str = "") -> str:
    """A mean and its interval in percent."""
    half = "" if math.isnan(interval.half) else f" ± {100 * interval.half:.2f}"
    return f"{100 * interval.mean:{sign}.2f}{half}"


def deliver(page: str, file: Path | None) -> None:
    """Write a page into a file, whose folder is made; print it without one."""
    if file is None:
        print(page, end="")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; numbers, right of the first column, are aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _of_images(pair: Comparison) -> float:
    """Half the width that drawing other test images gives a difference; the truth is less where errors coincide."""
    variances = math.fsum(p * (1 - p) for p in (pair.a.test.mean, pair.b.test.mean))
    return 1.96 * math.sqrt(variances / pair.a.rows[0].n_test)


def _outcome(pair: Comparison) -> str:
    if len(pair.a.rows) == 1:
        return "one seed"
    return pair.adjusted_outcome if abs(pair.interval.mean) > _of_images(pair) else "no difference shown"


def tables(entries: Sequence[Entry], found: dict[tuple[str, int], Chosen], options: Options) -> str:
    """Markdown of all accuracies found, and of each network against its rivals, paired by seed."""
    first = next(iter(found.values())).rows[0]
    smoke = options.n_train is not None
    results = []
    for entry in (entry for entry in entries if entry.key in found):
        chosen = found[entry.key]
        seconds = math.fsum(row.seconds for row in chosen.rows) / len(chosen.rows)
        goal = entry.goal.get(options.dataset)
        results.append(
            [
                f"{chosen.arm.title} (`{entry.arm}`)",
                points(chosen.test),
                "" if goal is None else f"{goal:.1f}",
                entry.published.get(options.dataset, ""),
                f"{chosen.rows[0].parameters:,}",
                f"{chosen.setting[0]:g}",
                str(entry.epochs),
                f"{seconds / 60:.1f}",
            ]
        )
    keys = [(e.key, rival) for e in entries for rival in e.rivals if e.key in found and rival in found]
    pairs = [compare(found[a], found[b], comparisons=len(keys)) for a, b in keys]
    differences = [
        [
            pair.a.arm.title,
            pair.b.arm.title,
            points(pair.interval, sign="+"),
            f"{100 * _of_images(pair):.2f}",
            UNJUDGED if smoke else _outcome(pair),
            f"{pair.a.rows[0].parameters:,} / {pair.b.rows[0].parameters:,}",
            str(epochs),
        ]
        for pair, ((_, epochs), _) in zip(pairs, keys, strict=True)
    ]
    head = ("network", "test %", "goal", "published", "parameters", "rate", "epochs", "min a run")
    against = ("network", "against", "difference", "± images", "outcome", "parameters", "epochs")
    note = (
        f"{options.dataset}: {first.n_fit:,} training, {first.n_val:,} validation, {first.n_test:,} test images; "
        f"mean of {options.seeds} seed{'s' if options.seeds > 1 else ''} ± 95 % interval over seeds (Student's t)."
    )
    parts = [*([SMOKE] if smoke else []), note, markdown(head, results)]
    if differences:
        parts += [
            "Differences in percentage points, paired by seed, ± 95 % interval over seeds of each alone. “± images”: "
            "what drawing other test images adds to one difference, at most (95 %, as if the two erred "
            f"independently). The words allow for all {len(pairs)} comparisons (Bonferroni) and for the images.",
            markdown(against, differences),
        ]
    return "\n\n".join(parts)


def reproduce(entries: list[Entry], given: argparse.Namespace) -> int:
    """Train and print; the exit code: 0 done, 2 bad input, 130 interrupted."""
    try:
        if given.seeds < 1:
            raise ValueError(f"--seeds is {given.seeds}: give at least 1")
        if given.quick:
            entries = [replace(entry, epochs=1, rates=entry.rates[:1]) for entry in entries]
        elif given.epochs is not None:
            entries = [replace(entry, epochs=given.epochs) for entry in entries]
        entries = list({entry.key: entry for entry in (*entries, *entries[::-1])}.values())  # the first of each key
        n_train = QUICK_IMAGES if given.quick else None
        options = Options(given.dataset, given.seeds, given.out, given.data_dir, given.workers, n_train)
        print(tables(entries, train(entries, options), options))
    except KeyboardInterrupt:
        print(f"\nstopped. Finished runs are kept in {given.out}: the same command resumes.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
