"""Tasks, rows, and the folder that keeps the rows of finished tasks through crashes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

try:  # Windows has no flock: there, two runs in one folder are not kept apart
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

PROTOCOL = 2
"""Version of how a task is trained, evaluated and counted, part of a task's id: change it whenever a row would."""


@dataclass(frozen=True)
class Task:
    """One training run, fully determined by its fields.

    Args:
        dataset: a name of `qconv.data`.
        arm: a key of `qconv.models.ARMS`.
        seed: draws the split, the initial weights and the order of the images; from 0.
        lr: highest learning rate, above 0.
        slot_lr_multiplier: factor on `lr` for the slot, above 0.
        epochs: passes over the training images, from 1.
        batch_size: images a step, from 1.
        n_train: number of training images to use; None for all.
        protocol: version of the procedure.

    Raises:
        ValueError: a field is out of range.
    """

    dataset: str
    arm: str
    seed: int
    lr: float
    slot_lr_multiplier: float
    epochs: int
    batch_size: int = 64
    n_train: int | None = None
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal in Python but not in JSON, hence not in the id.
        object.__setattr__(self, "lr", float(self.lr))
        object.__setattr__(self, "slot_lr_multiplier", float(self.slot_lr_multiplier))
        for name, least in (("seed", 0), ("epochs", 1), ("batch_size", 1), ("n_train", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"a task's {name} must be at least {least}, but is {value}")
        for name in ("lr", "slot_lr_multiplier"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"a task's {name} must be a number above 0, but is {getattr(self, name)}")

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON: the same on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def setting(self) -> tuple[float, float]:
        """What is tuned: (lr, slot_lr_multiplier)."""
        return self.lr, self.slot_lr_multiplier


@dataclass(frozen=True)
class Row:
    """What one finished task gave.

    Args:
        task: the task.
        val_accuracy, val_loss, n_val: on the validation images, which choose the setting.
        test_accuracy, n_test: on the test images, which choose nothing.
        n_fit: training images used (the task's n_train, or all there are).
        official_test: whether the test images are the publishers' own, the same for every seed; else each seed splits
            them off anew.
        slot_parameters, parameters: trained numbers in the slot and in the whole model.
        slot_counts, counts: operations of one inference, in the vocabulary of `qconv.energy`.
        slot_energy, slot_energy_low, slot_energy_high: modeled J of one inference of the slot.
        slot_arithmetic: the part of slot_energy that is arithmetic; the rest is memory.
        energy, energy_low, energy_high: the same of the whole model.
        prices: name of the price table behind the modeled energy.
        seconds: wall-clock s of training.
        measured_joules, measured_scope: J that this machine spent on training, None where it cannot be read.
        versions: of Python and the packages that the numbers depend on.
    """

    task: Task
    val_accuracy: float
    val_loss: float
    n_val: int
    test_accuracy: float
    n_test: int
    n_fit: int
    official_test: bool
    slot_parameters: int
    parameters: int
    slot_counts: dict[str, int]
    counts: dict[str, int]
    slot_energy: float
    slot_energy_low: float
    slot_energy_high: float
    slot_arithmetic: float
    energy: float
    energy_low: float
    energy_high: float
    prices: str
    seconds: float
    measured_joules: float | None
    measured_scope: str
    versions: dict[str, str]

    def cells(self) -> dict[str, Any]:
        """Column -> value, in the order of rows.csv."""
        flat = {"id": self.task.id} | {f.name: getattr(self.task, f.name) for f in fields(Task)}
        return flat | {f.name: getattr(self, f.name) for f in fields(Row) if f.name != "task"}


COLUMNS = ["id", *(f.name for f in fields(Task)), *(f.name for f in fields(Row) if f.name != "task")]
_TEXT = {f.name for f in (*fields(Task), *fields(Row)) if f.type == "str"} | {"id"}


def _csv_line(values: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _to_line(row: Row) -> str:
    cells = row.cells()
    return _csv_line(
        [str(v) if k in _TEXT else json.dumps(v, sort_keys=True, separators=(",", ":")) for k, v in cells.items()]
    )


def _from_cells(cells: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {k: v if k in _TEXT else json.loads(v) for k, v in cells.items()}
    task = Task(**{f.name: values.pop(f.name) for f in fields(Task)})
    if values.pop("id") != task.id:
        raise ValueError("its id is not that of its task")
    return Row(task=task, **values)


def read_rows(path: Path) -> list[Row]:
    """Read rows.csv; of several rows of one task, which was then trained again, the last counts.

    Args:
        path: the file.

    Raises:
        ValueError: the header is not ours, or a line cannot be read.
        OSError: the file cannot be opened.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header != COLUMNS:
            raise ValueError(
                f"{path} has the columns {','.join(header or ['none'])}, but this version of qconv writes "
                f"{','.join(COLUMNS)}: choose another --out"
            )
        rows = {}
        for cells in reader:
            try:
                row = _from_cells(dict(zip(COLUMNS, cells, strict=True)))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num} is not a row of qconv ({error}): repair or remove it"
                ) from None
            rows[row.task.id] = row
    return list(rows.values())


_PART = re.compile(r"\..+\.(\d+)\.part")  # a file in the making; the number is the process that writes it


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a killed process leaves the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing (not so on Windows, where this is never called)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # somebody else's, or no number of a process here: leave its files alone
    return True


def model_path(out: Path, task: Task) -> Path:
    """Where the run's folder `out` keeps the trained model of `task`."""
    return out / "models" / f"{task.id}.safetensors"


class RunFolder:
    """The output folder of one comparison: settings, rows.csv, trained models.

    Entering it locks the folder, checks that it is ours and cleans up after killed runs: files in the making go, and so
    does a line of rows.csv that was left half-written.

    Args:
        path: the folder; created if missing.
        settings: what every row of the folder shares (dataset, epochs, ...); JSON values.

    Raises:
        ValueError: the folder holds somebody else's files, rows of other settings, or is in use by another run.
        OSError: it cannot be created or written.
    """

    MARKER = "qconv-run.json"
    LOCK = ".lock"  # never replaced nor removed: whoever holds its lock holds the folder

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.rows: dict[str, Row] = {}
        self._lock: IO[str] | None = None

    @property
    def rows_path(self) -> Path:
        """Where the rows are."""
        return self.path / "rows.csv"

    def __enter__(self) -> RunFolder:
        try:
            self._lock_folder()
            self._claim()
            self._clean_up()
            self._repair()
            self.rows = {row.task.id: row for row in read_rows(self.rows_path)}
        except OSError as error:
            self.__exit__(None, None, None)
            raise ValueError(
                f"the output folder {self.path} cannot be written ({error.strerror}): choose another --out"
            ) from error
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()  # releases the lock, as the end of the process does
            self._lock = None

    def append(self, row: Row) -> None:
        """Add one row; it is on the disk when this returns."""
        with self.rows_path.open("a", newline="", encoding="utf-8") as file:
            file.write(_to_line(row))
            file.flush()
            os.fsync(file.fileno())
        self.rows[row.task.id] = row

    def _refuse_foreign(self) -> None:
        """See that the folder is new, empty or of an earlier run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"the output folder {self.path} is a file: choose another --out")
        files = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        theirs = [name for name in files if name not in (self.LOCK, self.MARKER) and not _PART.fullmatch(name)]
        # Looked for after the others were listed: a run that starts meanwhile writes its marker first.
        if theirs and not (self.path / self.MARKER).exists():
            raise ValueError(
                f"the output folder {self.path} holds files that qconv did not write ({min(theirs)!r}): "
                "choose a new or empty folder"
            )

    def _lock_folder(self) -> None:
        """Create the folder if need be, and lock it; a foreign one is left without a trace."""
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / self.LOCK).open("a", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing to {self.path}: wait for it, or choose another --out"
                ) from None

    def _claim(self) -> None:
        """Under the lock: mark the folder as ours, or see that its rows are of these settings."""
        marker = self.path / self.MARKER
        self._refuse_foreign()
        if not marker.exists():
            write_atomically(marker, json.dumps({"qconv_run": 1, "settings": self.settings}, indent=1).encode())
        try:
            theirs = json.loads(marker.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{marker} is not a file that qconv wrote: choose another --out") from None
        if theirs != self.settings:
            different = [k for k in {**theirs, **self.settings} if theirs.get(k) != self.settings.get(k)]
            there, here = (", ".join(f"{k} {s.get(k)}" for k in different) for s in (theirs, self.settings))
            raise ValueError(
                f"the output folder {self.path} holds a run with {there}, but this run has {here}: choose another --out"
            )

    def _clean_up(self) -> None:
        """Under the lock: remove what killed processes were writing. A living one may still write its report."""
        if fcntl is None:  # pragma: no cover
            return
        for part in (*self.path.glob(".*.part"), *(self.path / "models").glob(".*.part")):
            match = _PART.fullmatch(part.name)
            if match is not None and not _is_running(int(match[1])):
                part.unlink(missing_ok=True)

    def _repair(self) -> None:
        """Drop what follows the last complete line, and see to a header; a foreign file is left as it is."""
        header = _csv_line(COLUMNS).encode()
        content = self.rows_path.read_bytes() if self.rows_path.exists() else b""
        if header.startswith(content):
            write_atomically(self.rows_path, header)
        elif content.startswith(header) and not content.endswith(b"\n"):
            write_atomically(self.rows_path, content[: content.rfind(b"\n") + 1])
