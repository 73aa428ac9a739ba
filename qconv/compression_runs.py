"""Job -> record: train a float network, compress it, keep both; what is finished is not done again."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from qconv.compression import Measures, compress, load_compressed
from qconv.data import Dataset, Part, Split, load_dataset
from qconv.lenets import build_lenet
from qconv.processes import in_processes
from qconv.recipes import DISTILL, LEAST_STEPS, Progress, Recipe, recipe
from qconv.rows import write_atomically
from qconv.train import fit
from qconv.version import __version__

PROTOCOL = 1
"""Version of how networks are trained, compressed and measured, part of an id: change it whenever a record would."""

_FLOAT_EPOCHS = {"lenet5": 8, "lenet300": 20}
_WARMUP = 0.1


@dataclass(frozen=True)
class FloatJob:
    """The training of one float network, fully determined by its fields.

    Args:
        dataset: a name of `qconv.data`.
        network: a key of `qconv.lenets.LENETS`.
        seed: draws the split, the initial weights and the order of the images; from 0.
        epochs: passes over the images; None for 8 (lenet5) or 20 (lenet300), and for 1,000 batches at least.
        lr: highest learning rate, above 0.
        batch_size: images a step, from 1.
        n_train: images to train on; None for all.
        validate: False to train on the validation images too, once nothing is left to choose by them.
        protocol: version of the procedure.
    """

    dataset: str
    network: str
    seed: int = 0
    epochs: int | None = None
    lr: float = 2e-3
    batch_size: int = 128
    n_train: int | None = None
    validate: bool = True
    protocol: int = PROTOCOL

    @property
    def id(self) -> str:
        """The same on every machine."""
        return _digest(self)


@dataclass(frozen=True)
class Job:
    """One compression of one float network, fully determined by its fields.

    Args:
        float_job: how the float network comes about.
        method, bits, sparsity, epochs, lr, distill: as for `qconv.compression.compress`.
        batch_size: images a step, from 1.

    Raises:
        ValueError: see `qconv.recipes.recipe`.
    """

    float_job: FloatJob
    method: str = "int8"
    bits: int | None = None
    sparsity: float | None = None
    epochs: int | None = None
    lr: float | None = None
    distill: float = DISTILL
    batch_size: int = 128

    def __post_init__(self) -> None:
        self.recipe()  # refuses what does not fit together

    @property
    def id(self) -> str:
        """The same on every machine."""
        return _digest(self)

    def recipe(self) -> Recipe:
        """What the method does."""
        return recipe(
            self.method,
            bits=self.bits,
            sparsity=self.sparsity,
            epochs=self.epochs,
            lr=self.lr,
            distill=self.distill,
        )


@dataclass(frozen=True)
class Record:
    """What one job gave.

    Args:
        job: the job.
        before, after: the float network, and the compressed one.
        n_fit: training images.
        float_seconds, seconds: wall-clock s of training the float network, and of compressing it.
        versions: of Python and the packages that the numbers depend on.
        report: a table of what data-free quantization did and left out; empty of other methods.
    """

    job: Job
    before: Measures
    after: Measures
    n_fit: int
    float_seconds: float
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    report: str = ""

    def to_json(self) -> str:
        """As JSON, in the order of the fields."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Record:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            job = values.pop("job")
            job = Job(FloatJob(**job.pop("float_job")), **job)
            before, after = (Measures(**values.pop(name)) for name in ("before", "after"))
            return Record(job, before, after, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no record of a compression ({error}): remove it") from None


@dataclass(frozen=True)
class Files:
    """Where a folder keeps what belongs to a job."""

    float_model: Path
    model: Path
    record: Path


def files(job: Job, out: Path) -> Files:
    """Names begin with what is in the file, and end with the beginning of an id."""
    stem = f"{job.float_job.network}-{job.recipe().method}-{job.id[:12]}"
    return Files(_float_path(job.float_job, out), out / f"{stem}.qcnv", out / f"{stem}.json")


def load_record(job: Job, out: Path) -> Record | None:
    """The record of a finished job whose files are all there, else None."""
    where = files(job, out)
    try:
        record = Record.from_json(where.record.read_text(encoding="utf-8"))
        return record if record.job == job and where.model.exists() else None
    except (OSError, ValueError):
        return None


def float_model(
    job: FloatJob, out: Path, data_dir: Path | None = None, progress: Progress | None = None
) -> tuple[nn.Module, float]:
    """The trained float network of a job: from its file, or trained now and kept.

    Args:
        job: the job.
        out: folder of the file.
        data_dir: folder of the image files; see `qconv.data.load_dataset`.
        progress: called with ("train", epochs done, epochs, mean loss) after each epoch.

    Returns:
        The network in eval mode, and the wall-clock s that its training took.

    Raises:
        ValueError: unknown data set or network, bad data, or arguments out of range.
    """
    dataset = _dataset(job.dataset, data_dir)
    path = _float_path(job, out)
    if (kept := _kept_float(job, path, dataset)) is not None:
        return kept
    model = _untrained(job, dataset)
    train = _split(job, dataset).train
    batches = -(-len(train.labels) // job.batch_size)
    epochs = max(_FLOAT_EPOCHS[job.network], -(-LEAST_STEPS // batches)) if job.epochs is None else job.epochs
    start = time.perf_counter()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)  # dropout draws from the global generator
        fit(
            model,
            *train,
            epochs=epochs,
            lr=job.lr,
            warmup=_WARMUP,
            batch_size=job.batch_size,
            seed=job.seed,
            on_epoch=None if progress is None else lambda done, loss: progress("train", done, epochs, loss),
        )
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"seconds": repr(seconds)}))
    # Read back, so that a run that trains goes on with the very numbers of one that resumes.
    found = _kept_float(job, path, dataset)
    assert found is not None
    return found


def _kept_float(job: FloatJob, path: Path, dataset: Dataset) -> tuple[nn.Module, float] | None:
    model = _untrained(job, dataset)
    try:
        model.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            return model.eval(), float(file.metadata()["seconds"])
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None  # missing, damaged or of another network: to be trained (again)


def run_job(job: Job, out: Path, data_dir: Path | None = None, progress: Progress | None = None) -> Record:
    """Compress a job's float network, training that first if it is not there; a finished job is only looked up.

    Args:
        job: the job.
        out: folder that takes the float network, the compressed one and the record; see `files`.
        data_dir: folder of the image files; see `qconv.data.load_dataset`.
        progress: called with (step, epochs done, epochs, mean loss) after each epoch.

    Raises:
        ValueError: unknown data set or network, bad data, or arguments out of range.
    """
    if (found := load_record(job, out)) is not None:
        return found
    floating, float_seconds = float_model(job.float_job, out, data_dir, progress)
    split = _split(job.float_job, _dataset(job.float_job.dataset, data_dir))
    made = compress(
        floating,
        split,
        method=job.method,
        bits=job.bits,
        sparsity=job.sparsity,
        epochs=job.epochs,
        lr=job.lr,
        distill=job.distill,
        batch_size=job.batch_size,
        seed=job.float_job.seed,
        progress=progress,
    )
    where = files(job, out)
    made.save(where.model)
    n_fit = len(split.train.labels)
    report = "" if made.report is None else str(made.report)
    record = Record(job, made.before, made.after, n_fit, float_seconds, made.seconds, _versions(), report)
    write_atomically(where.record, record.to_json().encode())
    return record


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    data_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Run many jobs, each once its float network is there; a killed run loses what was in progress and can go on.

    Args:
        jobs: the jobs.
        out: as for `run_job`.
        workers: processes, one thread each.
        data_dir: as for `run_job`.
        progress: called with (networks trained and jobs done, how many there are of both).

    Returns:
        The records of `jobs`, in their order.

    Raises:
        ValueError: as run_job.
        OSError: a file cannot be written, or a process was killed.
    """
    floats = list(dict.fromkeys(job.float_job for job in jobs))
    for each in floats:
        _split(each, _dataset(each.dataset, data_dir))  # what is wrong with the data is said before anything is written
    records = {job: record for job in jobs if (record := load_record(job, out)) is not None}
    todo = [job for job in dict.fromkeys(jobs) if job not in records]
    lacking = [
        each
        for each in dict.fromkeys(job.float_job for job in todo)
        if _kept_float(each, _float_path(each, out), _dataset(each.dataset, data_dir)) is None
    ]
    total = len(floats) + len(set(jobs))
    done = total - len(lacking) - len(todo)

    def tell() -> None:
        if progress is not None:
            progress(done, total)

    tell()
    # Jobs wait for their float network: otherwise each would train one.
    for finished, record in in_processes(
        partial(_run_either, out=out, data_dir=data_dir),
        [*lacking, *(job for job in todo if job.float_job not in lacking)],
        workers,
        (lambda each: [job for job in todo if job.float_job == each]) if lacking else None,
    ):
        if isinstance(finished, Job) and record is not None:
            records[finished] = record
        done += 1
        tell()
    return [records[job] for job in jobs]


def _run_either(job: FloatJob | Job, out: Path, data_dir: Path | None) -> Record | None:
    if isinstance(job, Job):
        return run_job(job, out, data_dir)
    float_model(job, out, data_dir)  # a network need not travel between processes: its file is there
    return None


def load_job(job: Job, out: Path, data_dir: Path | None = None) -> nn.Module:
    """The compressed network of a finished job, in eval mode.

    Raises:
        ValueError: its file is damaged, or of another job.
        OSError: it cannot be read.
    """
    network = _untrained(job.float_job, _dataset(job.float_job.dataset, data_dir))
    return load_compressed(files(job, out).model, network, job.recipe())


@cache
def _dataset(name: str, data_dir: Path | None) -> Dataset:
    return load_dataset(name, data_dir)


def _split(job: FloatJob, dataset: Dataset) -> Split:
    split = dataset.split(job.seed, n_train=job.n_train)
    if job.validate:
        return split
    if not dataset.official_test or job.n_train is not None:
        raise ValueError(
            f"validate is False, but {dataset.name} "
            + (f"is to train on {job.n_train} images" if job.n_train is not None else "has no test part of its own")
            + ": only a whole published training part is trained on without validation"
        )
    return split._replace(train=Part(dataset.train_images, dataset.train_labels))


def _untrained(job: FloatJob, dataset: Dataset) -> nn.Module:
    channels, height, width = dataset.image_shape
    return build_lenet(job.network, (channels, height, width), dataset.n_classes, job.seed)


def _float_path(job: FloatJob, out: Path) -> Path:
    return out / f"{job.network}-float-{job.id[:12]}.safetensors"


def _digest(job: FloatJob | Job) -> str:
    text = json.dumps(asdict(job), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn")  # scikit-learn draws the splits
    return {"qconv": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}
