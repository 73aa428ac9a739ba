"""Task -> row: train every arm of a comparison under one protocol, resumably, on any executor."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from qconv.backends.operators import fast_installed
from qconv.data import Dataset, load_dataset
from qconv.energy.count import Counts, count
from qconv.energy.meter import Meter
from qconv.energy.prices import estimate
from qconv.layers import QuantumConv2d
from qconv.models import (
    ARMS,
    DEFAULT_ARMS,
    SLOT_CHANNELS,
    SLOT_KERNEL,
    SlotCNN,
    WholeNetwork,
    arm,
    build_model,
    check_comparable,
    slot_stride,
    with_controls,
)
from qconv.rows import Row, RunFolder, Task, model_path, write_atomically
from qconv.train import evaluate, fit
from qconv.version import __version__

SLOT_SETTINGS = tuple((lr, multiplier) for lr in (0.01, 0.03) for multiplier in (1.0, 5.0))
"""The tuning grid of arms that fill a slot, (lr, slot_lr_multiplier): every arm gets the same four, no more."""

# A whole network is all slot: a multiplier would be one more rate, and chains of many sites want low ones.
WHOLE_SETTINGS = tuple((lr, 1.0) for lr in (0.001, 0.003, 0.01, 0.03))
"""The tuning grid of whole networks, as many settings."""

DEFAULT_EPOCHS = {"digits": 20, "mnist": 5, "fashion_mnist": 5}
DEFAULT_N_TRAIN = {"digits": None, "mnist": 10_000, "fashion_mnist": 10_000}


def grid(
    dataset: str,
    arms: Iterable[str] = DEFAULT_ARMS,
    seeds: Iterable[int] = range(3),
    *,
    epochs: int | None = None,
    n_train: int | None = None,
    batch_size: int = 64,
) -> list[Task]:
    """All tasks of a comparison: every arm at every setting of the tuning grid on every seed.

    Args:
        dataset: a name of `qconv.data.dataset_names()`.
        arms: keys of `qconv.models.ARMS`, either such that fill the slot or whole networks; these get their controls
            beside them (see `qconv.models.with_controls`).
        seeds: integers from 0.
        epochs: passes over the training images; by default 20 on digits, 5 on the larger sets.
        n_train: training images to use; by default all of digits, 10,000 of the larger sets.
        batch_size: images a step.

    Raises:
        ValueError: an unknown arm, no arm, no seed, a value out of range, or arms of both kinds.
    """
    named = list(arms)
    check_comparable(named)
    names = with_controls(named)
    seeds = list(dict.fromkeys(seeds))
    if not names or not seeds:
        raise ValueError(f"a comparison needs at least one arm and one seed, but has {len(names)} and {len(seeds)}")
    epochs = DEFAULT_EPOCHS.get(dataset, 5) if epochs is None else epochs
    n_train = DEFAULT_N_TRAIN.get(dataset) if n_train is None else n_train
    return [
        Task(dataset, name, seed, lr, multiplier, epochs, batch_size, n_train)
        for seed in seeds
        for name in names
        for lr, multiplier in (WHOLE_SETTINGS if ARMS[name].whole else SLOT_SETTINGS)
    ]


@cache
def _dataset(name: str, data_dir: Path | None) -> Dataset:
    return load_dataset(name, data_dir)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Sums over several threads depend on their number: with one, a task gives the same row on every machine of a kind.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def slot_counts(counts: Counts) -> Counts:
    """The part of a model's counts that belongs to its slot: of a whole network, all."""
    return Counts(tuple(row for row in counts.rows if row.name.split(".")[0] == "slot"))


def _versions() -> dict[str, str]:
    # scikit-learn draws the splits; with the fast extra small circuits run fused, and round in another order.
    packages = ["torch", "numpy", "scikit-learn"] + ["llvmlite"] * fast_installed()
    return {"qconv": __version__, "python": platform.python_version()} | {p: version(p) for p in packages}


def run_task(task: Task, out: Path, data_dir: Path | None = None, at_once: int = 1) -> Row:
    """Train and evaluate one task, and keep its model.

    Args:
        task: what to do.
        out: folder whose models/ takes the trained model, as safetensors.
        data_dir: folder of the image files; see `qconv.data.load_dataset`.
        at_once: tasks that share this machine, for the note on measured joules.

    Raises:
        ValueError: unknown arm or data set, or bad data.
    """
    dataset = _dataset(task.dataset, data_dir)
    split = dataset.split(task.seed, n_train=task.n_train)
    model = _fresh_model(task, dataset)
    with _one_thread():
        with Meter() as meter:
            fit(
                model,
                *split.train,
                epochs=task.epochs,
                lr=task.lr,
                slot_lr_multiplier=task.slot_lr_multiplier,
                weight_decay=arm(task.arm).weight_decay,
                batch_size=task.batch_size,
                seed=task.seed,
            )
        validation, test = evaluate(model, *split.validation), evaluate(model, *split.test)
    counts = count(model, dataset.image_shape)
    slot = slot_counts(counts)
    whole_energy, slot_energy = estimate(counts), estimate(slot)
    model_path(out, task).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(model_path(out, task), save({k: v.contiguous() for k, v in model.state_dict().items()}))
    sharing = f"; {at_once} tasks ran at once" if at_once > 1 and meter.measured.joules is not None else ""
    return Row(
        task=task,
        val_accuracy=validation.accuracy,
        val_loss=validation.loss,
        n_val=validation.n,
        test_accuracy=test.accuracy,
        n_test=test.n,
        n_fit=len(split.train.labels),
        official_test=dataset.official_test,
        slot_parameters=_trainable(model.slot),
        parameters=_trainable(model),
        slot_counts=dict(slot.operations),
        counts=dict(counts.operations),
        slot_energy=slot_energy.joules,
        slot_energy_low=slot_energy.low,
        slot_energy_high=slot_energy.high,
        slot_arithmetic=slot_energy.compute.typical,
        energy=whole_energy.joules,
        energy_low=whole_energy.low,
        energy_high=whole_energy.high,
        prices=whole_energy.prices,
        seconds=meter.measured.seconds,
        measured_joules=meter.measured.joules,
        measured_scope=meter.measured.scope + sharing,
        versions=_versions(),
    )


def _fresh_model(task: Task, dataset: Dataset) -> SlotCNN | WholeNetwork:
    channels, height, width = dataset.image_shape
    return build_model(task.arm, (channels, height, width), dataset.n_classes, task.seed)


def load_model(task: Task, out: Path, data_dir: Path | None = None) -> SlotCNN | WholeNetwork:
    """The trained model of a finished task, in eval mode.

    Raises:
        ValueError: its file is missing, damaged or of another model.
    """
    model = _fresh_model(task, _dataset(task.dataset, data_dir))
    try:
        model.load_state_dict(load_file(model_path(out, task)))
    except (OSError, SafetensorError, RuntimeError):
        raise ValueError(
            f"the trained model {model_path(out, task)} is missing or damaged: run the task again with the same folder"
        ) from None
    return model.eval()


def _has_model(task: Task, out: Path) -> bool:
    """Whether the task's model can be read; opening it compares the header with the size of the file."""
    try:
        with safe_open(model_path(out, task), "pt"):
            return True
    except (OSError, SafetensorError):
        return False


# --- running many ---------------------------------------------------------------------------------------------------


def _start_worker() -> None:
    # Ctrl-C ends a worker at once and in silence: the parent says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker whose parent was killed would wait for its next task for ever: it holds the queue's other end itself.
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait_for_any([sentinel]), os._exit(1)), daemon=True).start()


def run(
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    data_dir: Path | None = None,
    progress: Callable[[int, int, Row | None], None] | None = None,
) -> list[Row]:
    """Run the tasks that have no row and model in `out` yet, appending each row to out/rows.csv as it finishes.

    A killed run loses at most the tasks in progress: call it again with the same folder. A task whose model file is
    missing or damaged is trained again, and its new row replaces the old one.

    Args:
        tasks: tasks that agree in all but arm, seed, lr and slot_lr_multiplier.
        out: output folder, new, empty or of an earlier run with the same settings.
        workers: processes; with 1, the tasks run in this one.
        executor: any other concurrent.futures executor of processes to run on, instead of `workers`; its machines must
            see `out`. Threads will not do: they share torch's random state.
        data_dir: folder of the image files; see `qconv.data.load_dataset`.
        progress: called with (tasks done, tasks, row just finished or None at the start).

    Returns:
        The rows of `tasks`, in their order.

    Raises:
        ValueError: no tasks, tasks that do not belong together, a folder that is not ours or of another run.
        OSError: the folder cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, but is {workers}")
    settings = _settings(tasks)
    _sample(tasks[0], 1, data_dir)  # what is wrong with the data is said before the folder is touched
    with RunFolder(out, settings) as folder:
        todo = [task for task in tasks if task.id not in folder.rows or not _has_model(task, out)]
        done = len(tasks) - len(todo)
        if progress is not None:
            progress(done, len(tasks), None)
        for row in _finished(todo, out, workers, executor, data_dir):
            folder.append(row)
            done += 1
            if progress is not None:
                progress(done, len(tasks), row)
        return [folder.rows[task.id] for task in tasks]


def _settings(tasks: Sequence[Task]) -> dict[str, object]:
    shared = [
        {k: v for k, v in asdict(t).items() if k not in ("arm", "seed", "lr", "slot_lr_multiplier")} for t in tasks
    ]
    if not shared:
        raise ValueError("there are no tasks to run: give at least one")
    check_comparable(dict.fromkeys(task.arm for task in tasks))
    for other in shared:
        if other != shared[0]:
            raise ValueError(f"tasks of one folder share their settings, but these differ: {shared[0]} and {other}")
    return shared[0] | {"qconv": __version__}


def _finished(
    tasks: Sequence[Task], out: Path, workers: int, executor: Executor | None, data_dir: Path | None
) -> Iterator[Row]:
    """Rows as they finish."""
    workers = min(workers, len(tasks))
    if executor is not None:
        futures = {executor.submit(run_task, task, out, data_dir) for task in tasks}
        try:
            yield from _as_they_finish(futures)
        finally:
            for future in futures:
                future.cancel()
    elif workers <= 1:
        for task in tasks:
            yield run_task(task, out, data_dir)
    else:
        context = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads, half alive
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            yield from _as_they_finish({pool.submit(run_task, task, out, data_dir, workers) for task in tasks})
        except BrokenProcessPool:
            raise OSError(
                "a worker process ended unexpectedly (out of memory?); finished tasks are kept: run again with the "
                "same output folder, or with fewer workers"
            ) from None
        finally:
            # Cancelling here, not future by future: the pool trips over futures that were cancelled behind its back.
            pool.shutdown(wait=False, cancel_futures=True)


def _as_they_finish(futures: set[Future[Row]]) -> Iterator[Row]:
    while futures:
        ready, futures = wait(futures, return_when=FIRST_COMPLETED)
        for future in ready:
            yield future.result()


# --- looking at trained models ---------------------------------------------------------------------------------------

FEATURES = "features.safetensors"
AGREEMENT = "agreement.json"


def _sample(task: Task, n: int, data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """The first `n` test images of the task's split, with labels."""
    test = _dataset(task.dataset, data_dir).split(task.seed, n_train=task.n_train).test
    return test.images[:n], test.labels[:n]


@torch.no_grad()
def save_feature_maps(tasks: Sequence[Task], out: Path, *, data_dir: Path | None = None) -> Path:
    """What the trained slots make of two test images of different classes, kept in out/features.safetensors.

    Args:
        tasks: finished tasks with the same seed, one an arm, of arms that fill the slot; the first one's split gives
            the images.
        out: folder of the run.
        data_dir: folder of the image files.

    Returns:
        The file: "images" (2, C, H, W), "labels" (2,), and for each arm "map/ARM" (2, 4, H', W'), before the ReLU.
    """
    images, labels = _sample(tasks[0], 64, data_dir)
    other = int((labels != labels[0]).nonzero()[0])
    images, labels = images[[0, other]], labels[[0, other]]
    tensors = {"images": images, "labels": labels}
    for task in tasks:
        slot = load_model(task, out, data_dir).slot
        tensors[f"map/{task.arm}"] = slot(images).contiguous()
    write_atomically(out / FEATURES, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return out / FEATURES


@dataclass(frozen=True)
class Agreement:
    """How far one way of running a trained quantum slot is from the way it was trained.

    Args:
        arm: the trained arm.
        backend: what ran it.
        shots: samples a circuit, None for exact values.
        values: numbers compared.
        deviation: largest absolute difference of an expectation value.
        changed: images whose predicted class changes.
        images: images evaluated.
        seconds: wall-clock s of preparing the circuit and running the slot once, imports included.
    """

    arm: str
    backend: str
    shots: int | None
    values: int
    deviation: float
    changed: int
    images: int
    seconds: float


SIMULATORS = {"state vector": "statevector", "PennyLane default.qubit": "pennylane", "Qiskit Aer": "qiskit"}


@torch.no_grad()
def check_agreement(
    tasks: Sequence[Task], out: Path, *, n_images: int = 64, shots: int = 1024, data_dir: Path | None = None
) -> list[Agreement]:
    """Run trained quantum slots on other simulators and keep the deviations in out/agreement.json.

    Args:
        tasks: finished tasks of quantum arms.
        out: folder of the run.
        n_images: test images to evaluate.
        shots: samples a circuit on Aer, beside the exact run.
        data_dir: folder of the image files.

    Raises:
        ValueError: a task's arm has no circuit.
    """
    results = []
    for task in tasks:
        kernel = arm(task.arm).kernel
        if kernel is None:
            raise ValueError(f"arm {task.arm!r} has no circuit to simulate: choose a quantum arm")
        model = load_model(task, out, data_dir)
        images, _ = _sample(task, n_images, data_dir)
        values, classes = model.slot(images), model(images).argmax(1)
        stride = slot_stride(images.shape[2])
        for title, sampled in [*((title, None) for title in SIMULATORS), ("Qiskit Aer", shots)]:
            start = time.perf_counter()
            slot = QuantumConv2d(
                images.shape[1],
                SLOT_CHANNELS,
                SLOT_KERNEL,
                stride,
                bias=True,
                kernel=kernel,
                backend=SIMULATORS[title],
                shots=sampled,
                seed=task.seed,
            )
            slot.load_state_dict(model.slot.state_dict())
            theirs = slot.eval()(images)
            seconds = time.perf_counter() - start
            changed = int((model.after_slot(theirs).argmax(1) != classes).sum())
            deviation = float((theirs - values).abs().max())
            results.append(
                Agreement(task.arm, title, sampled, theirs.numel(), deviation, changed, len(images), seconds)
            )
    write_atomically(out / AGREEMENT, json.dumps([asdict(result) for result in results], indent=1).encode())
    return results
