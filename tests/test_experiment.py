import csv
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from made_rows import make_row
from safetensors.torch import load_file

import qconv.rows
from qconv import __version__
from qconv.backends.operators import fast_installed
from qconv.data import load_dataset
from qconv.experiment import check_agreement, grid, load_model, run, run_task, save_feature_maps
from qconv.models import DEFAULT_ARMS
from qconv.rows import COLUMNS, RunFolder, Task, model_path, read_rows
from qconv.train import evaluate

SETTINGS = {"dataset": "digits", "epochs": 1, "batch_size": 64, "n_train": 100, "protocol": 2, "qconv": __version__}
NOT_REPEATED = ("seconds", "measured_joules", "measured_scope")


def tiny(arms=("float", "heisenberg"), seeds=1):
    return grid("digits", arms, range(seeds), epochs=1, n_train=100)


def repeatable(rows):
    """All that must be the same whenever and wherever a task runs."""
    return {row.task.id: replace(row, **dict.fromkeys(NOT_REPEATED)) for row in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run: its folder and its rows."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run(tiny(), out)


# --- tasks and rows ---


def test_whole_networks_bring_their_controls():
    arms = [task.arm for task in grid("digits", ["eps", "a_deformed", "a_linear_x", "a_pbnn"], [0])[::4]]
    assert arms == ["eps", "eps_control", "a_deformed", "a_deformed_control", "a_linear_x", "a_pbnn"]
    assert {task.arm for task in grid("digits", ["mps_control"], [0])} == {"mps_control"}


def test_ids_are_the_same_for_ever():
    task = Task("digits", "heisenberg", 0, 0.01, 5, epochs=20)
    text = (
        '{"arm":"heisenberg","batch_size":64,"dataset":"digits","epochs":20,"lr":0.01,"n_train":null,"protocol":2,'
        '"seed":0,"slot_lr_multiplier":5.0}'
    )
    assert task.id == hashlib.sha256(text.encode()).hexdigest()
    assert task.id == "a82e257fe1cae3c39b951cafc1b33a5243f6f990e52266a339a18d9a08973261"
    assert task.id == replace(task, slot_lr_multiplier=5.0).id


def test_every_field_is_part_of_the_id():
    task = Task("digits", "float", 0, 0.01, 1.0, epochs=20)
    changed = {"dataset": "mnist", "arm": "int8", "n_train": 10}
    ids = {replace(task, **{f.name: changed.get(f.name, 7)}).id for f in fields(Task)}
    assert len(ids) == len(fields(Task))
    assert task.id not in ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, but is -1"),
        ({"epochs": 0}, "epochs must be at least 1, but is 0"),
        ({"n_train": 0}, "n_train must be at least 1, but is 0"),
        ({"lr": 0}, "lr must be a number above 0, but is 0"),
        ({"slot_lr_multiplier": float("nan")}, "slot_lr_multiplier must be a number above 0, but is nan"),
    ],
)
def test_tasks_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Task(**asdict(Task("digits", "float", 0, 0.01, 1.0, epochs=1)) | changes)


def test_grid_gives_every_arm_the_same_settings_on_every_seed():
    tasks = grid("digits", ["float", "heisenberg", "float"], range(3))
    assert len({task.id for task in tasks}) == len(tasks) == 2 * 4 * 3
    for arm in ("float", "heisenberg"):
        assert len({(t.seed, *t.setting) for t in tasks if t.arm == arm}) == 4 * 3
    assert {task.n_train for task in tasks} == {None}
    assert {task.n_train for task in grid("mnist", ["float"])} == {10_000}
    assert {task.arm for task in grid("digits")} == set(DEFAULT_ARMS)
    # As many settings for a whole network, which has no slot to be trained faster than the rest.
    whole = {task.setting for task in grid("digits", ["mps", "mps_control"])}
    assert len(whole) == len({task.setting for task in grid("digits", ["float"])}) == 4
    assert {multiplier for _, multiplier in whole} == {1.0}
    with pytest.raises(ValueError, match="did you mean 'float'"):
        grid("digits", ["flot"])
    with pytest.raises(ValueError, match="int8 fills the slot of one small network but mps is a whole network"):
        grid("digits", ["int8", "mps"])
    with pytest.raises(ValueError, match="at least one arm and one seed, but has 0 and 3"):
        grid("digits", [])


def test_rows_survive_the_file_exactly(tmp_path):
    rows = [
        make_row("float", 0, val_loss=float("inf"), test_accuracy=1 / 3),
        make_row("heisenberg", 1, measured_joules=12.5, measured_scope='CPU by "RAPL", all; 2 tasks'),
    ]
    settings = {k: v for k, v in asdict(rows[0].task).items() if k in SETTINGS}
    with RunFolder(tmp_path / "out", settings) as folder:
        for row in rows:
            folder.append(row)
    assert read_rows(tmp_path / "out" / "rows.csv") == rows
    with (tmp_path / "out" / "rows.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [c["id"] for c in cells] == [row.task.id for row in rows]
    assert json.loads(cells[1]["slot_counts"])["device:circuits"] == 49


def test_a_line_that_is_no_row_is_named(tmp_path, finished):
    lines = (finished[0] / "rows.csv").read_text().splitlines(keepends=True)
    for bad in (lines[2].replace(",digits,", ",digit,"), lines[2].replace(",1,", ",x,", 1), "1,2,3\n"):
        (tmp_path / "rows.csv").write_text("".join([*lines[:2], bad]))
        with pytest.raises(ValueError, match=r"rows.csv, line 3 is not a row of qconv"):
            read_rows(tmp_path / "rows.csv")


# --- one task ---


def test_row_says_what_was_done(finished):
    out, rows = finished
    for row in rows:
        model = load_model(row.task, out)
        split = load_dataset("digits").split(row.task.seed, n_train=100)
        test, validation = evaluate(model, *split.test), evaluate(model, *split.validation)
        assert (row.test_accuracy, row.n_test) == (test.accuracy, test.n)
        assert (row.n_fit, row.official_test) == (len(split.train.labels), False) == (100, False)
        assert (row.val_accuracy, row.val_loss, row.n_val) == (validation.accuracy, validation.loss, validation.n)
        assert row.parameters - row.slot_parameters == 16 * 37 + 10 * 145
        assert row.slot_energy_low <= row.slot_energy <= row.slot_energy_high < row.energy_high
        assert 0 < row.slot_arithmetic < row.slot_energy < row.energy
        assert all(row.counts[key] >= n for key, n in row.slot_counts.items())
        assert row.seconds > 0
        known = {"qconv", "python", "torch", "numpy", "scikit-learn"} | ({"llvmlite"} if fast_installed() else set())
        assert set(row.versions) == known
    by_arm = {row.task.arm: row for row in rows}
    assert by_arm["float"].slot_counts["mac:fp32*fp32"] == 7 * 7 * 4 * 4
    assert by_arm["float"].slot_parameters == 20
    assert by_arm["heisenberg"].slot_parameters == 60 + 4
    assert by_arm["heisenberg"].slot_counts["device:circuits"] == 49


def test_a_task_repeats_bit_for_bit_whatever_ran_before(tmp_path, finished):
    out, rows = finished
    row = rows[-1]
    torch.rand(3)
    torch.set_num_threads(2)
    try:
        again = run_task(row.task, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert repeatable([again]) == repeatable([row])
    assert model_path(tmp_path, row.task).read_bytes() == model_path(out, row.task).read_bytes()


# --- many tasks ---


def test_two_workers_give_the_rows_of_one(tmp_path, finished):
    rows = run(tiny(), tmp_path / "out", workers=2)
    assert [row.task for row in rows] == tiny()
    assert repeatable(rows) == repeatable(finished[1])


class Inline(Executor):
    """Runs what is submitted at once, and in this process."""

    def __init__(self):
        self.submitted = []

    def submit(self, fn, /, *args, **kwargs):
        self.submitted.append(args[0])
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_any_executor_will_do(tmp_path, finished):
    executor = Inline()
    rows = run(tiny(), tmp_path / "out", executor=executor)
    assert repeatable(rows) == repeatable(finished[1])
    assert executor.submitted == tiny()


def test_finished_tasks_are_not_run_again_and_more_can_be_added(tmp_path):
    out, steps = tmp_path / "out", []
    first = run(tiny(["float"]), out)
    before = (out / "rows.csv").read_bytes()
    rows = run(
        tiny(["float", "int8"], seeds=2), out, progress=lambda done, total, row: steps.append((done, total, row))
    )
    assert (out / "rows.csv").read_bytes().startswith(before)
    assert rows[:4] == first
    assert steps[0] == (4, 16, None)
    assert [done for done, _, _ in steps] == list(range(4, 17))
    assert {row.task.id for _, _, row in steps[1:]} == {row.task.id for row in rows} - {row.task.id for row in first}
    run(tiny(["float"]), out, progress=lambda done, total, row: steps.append("again" if row else None))
    assert "again" not in steps


@pytest.mark.parametrize("kept", [0, 1, 300, -1, -40])
def test_a_torn_file_loses_its_last_line_only(tmp_path, finished, kept):
    """Cut rows.csv as a kill or a full disk may: in its header, in the first row, one byte before the end, later."""
    whole = (finished[0] / "rows.csv").read_bytes()
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "rows.csv").write_bytes(whole[:kept])
    complete = max(whole[:kept].count(b"\n") - 1, 0)
    redone = []
    rows = run(tiny(), out, progress=lambda done, total, row: redone.append(row))
    assert len(redone) - 1 == len(rows) - complete
    assert repeatable(rows) == repeatable(finished[1])
    assert (out / "rows.csv").read_bytes().count(b"\n") == len(rows) + 1


def test_a_task_whose_model_is_missing_or_damaged_is_trained_again(tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = read_rows(out / "rows.csv")
    whole = {row.task.id: model_path(out, row.task).read_bytes() for row in before}
    missing, truncated, empty = (row.task for row in (before[1], before[2], before[4]))
    model_path(out, missing).unlink()
    model_path(out, truncated).write_bytes(whole[truncated.id][:-100])
    model_path(out, empty).write_bytes(b"")
    for task in (missing, truncated, empty):
        with pytest.raises(ValueError, match=rf"{task.id}.safetensors is missing or damaged: run the task again"):
            load_model(task, out)
    steps = []
    rows = run(tiny(), out, progress=lambda done, total, row: steps.append((done, row)))
    redone = {row.task.id: row for _, row in steps[1:]}
    assert [done for done, _ in steps] == list(range(len(rows) - 3, len(rows) + 1))
    assert set(redone) == {missing.id, truncated.id, empty.id}
    assert repeatable(rows) == repeatable(before)
    assert {row.task.id: model_path(out, row.task).read_bytes() for row in rows} == whole
    # The file is appended to, never rewritten; whoever reads it gets the new rows only.
    assert (out / "rows.csv").read_bytes().startswith((finished[0] / "rows.csv").read_bytes())
    read = {row.task.id: row for row in read_rows(out / "rows.csv")}
    assert len(read_rows(out / "rows.csv")) == len(read) == len(rows)
    assert read == {row.task.id: row for row in rows} == {row.task.id: row for row in before} | redone


def test_files_in_the_making_of_killed_runs_are_removed(tmp_path):
    with RunFolder(tmp_path, SETTINGS):
        (tmp_path / "models").mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [tmp_path / f".table.csv.{ended.pid}.part", tmp_path / "models" / f".abc.safetensors.{ended.pid}.part"]
    kept = [
        tmp_path / f".report.html.{os.getpid()}.part",  # somebody who lives may still be writing it
        tmp_path / "film.part",
        tmp_path / f"film.{ended.pid}.part",
    ]
    for path in dead + kept:
        path.write_text("half")
    with RunFolder(tmp_path, SETTINGS):
        assert [path.exists() for path in dead + kept] == [False, False, True, True, True]


def children(pid):
    tree = [int(p) for f in Path(f"/proc/{pid}/task").glob("*/children") for p in f.read_text().split()]
    return tree + [q for p in tree for q in children(p)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_a_killed_run_resumes_and_leaves_no_process(tmp_path, finished):
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from qconv.experiment import grid, run
if __name__ == "__main__":
    run(grid("digits", ["float", "heisenberg"], range(20), epochs=1, n_train=100), Path({str(out)!r}), workers=2)
"""
    script = tmp_path / "long_run.py"
    script.write_text(code)
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)})
    try:
        deadline = time.monotonic() + 60
        while not (out / "rows.csv").exists() or (out / "rows.csv").read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    survivors = (out / "rows.csv").read_bytes()
    survivors = survivors[: survivors.rfind(b"\n") + 1]
    assert survivors.count(b"\n") < 161
    rows = run(tiny(), out)
    assert (out / "rows.csv").read_bytes().startswith(survivors)
    assert repeatable(rows) == repeatable(finished[1])
    assert workers
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- folders that are not ours ---


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(tasks, out, message):
    before = contents(out) if out.is_dir() else None
    with pytest.raises((ValueError, OSError), match=message):
        run(tasks, out)
    assert (contents(out) if out.is_dir() else None) == before


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refuse(tiny(), tmp_path, "'thesis.tex'")
    (tmp_path / "rows.csv").write_text("a,b\n1,2")
    refuse(tiny(), tmp_path, "that qconv did not write")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    refuse(tiny(), tmp_path / "out", "is a file: choose another")
    refuse(tiny(), tmp_path / "out" / "deeper", "deeper cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(tiny(), tmp_path / "locked", "cannot be written")
    refuse(tiny(), tmp_path / "locked" / "out", "cannot be written")


def test_rows_of_another_kind_stay_as_they_are(tmp_path):
    with RunFolder(tmp_path / "out", SETTINGS):
        pass
    for text in ("a,b\n1,2", "id,dataset,arm\nx,", ",".join(COLUMNS) + ",more\n"):
        (tmp_path / "out" / "rows.csv").write_text(text)
        refuse(tiny(), tmp_path / "out", "has the columns")
    (tmp_path / "out" / "qconv-run.json").write_text("{}")
    refuse(tiny(), tmp_path / "out", "is not a file that qconv wrote")


def test_another_runs_settings_are_both_stated(finished):
    other = grid("digits", ["float"], range(1), epochs=2, n_train=200)
    refuse(other, finished[0], "a run with epochs 1, n_train 100, but this run has epochs 2, n_train 200")


def test_rows_of_another_version_of_qconv_are_not_mixed_with_ours(finished, monkeypatch):
    monkeypatch.setattr("qconv.experiment.__version__", "9.9")
    refuse(tiny(), finished[0], f"holds a run with qconv {__version__}, but this run has qconv 9.9: choose another")


def test_tasks_of_two_kinds_do_not_share_a_folder(tmp_path):
    tasks = tiny() + grid("digits", ["float"], range(1), epochs=3, n_train=100)
    refuse(tasks, tmp_path / "out", "these differ")
    refuse(tiny() + tiny(["a_pbnn"]), tmp_path / "out", "a_pbnn is a whole network")
    refuse([], tmp_path / "out", "no tasks")
    assert not (tmp_path / "out").exists()


def test_bad_data_leaves_no_folder(tmp_path):
    refuse(grid("digit", ["float"], range(1)), tmp_path / "out", "did you mean 'digits'")
    refuse(grid("digits", ["float"], range(1), n_train=5000), tmp_path / "out", "n_train=5000")
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_write_to_one_folder(finished):
    with RunFolder(finished[0], SETTINGS), pytest.raises(ValueError, match="another run is writing"):
        run(tiny(), finished[0])
    run(tiny(), finished[0])  # and the lock is gone with its owner


@pytest.mark.parametrize("step", ["write_atomically", "fcntl.flock"])
@pytest.mark.parametrize("place", ["new", "claimed"])
def test_one_of_two_runs_that_start_together_gets_the_folder(tmp_path, monkeypatch, step, place):
    """While one run is between two steps of entering, another tries to enter: at no point do both succeed."""
    if place == "claimed":
        with RunFolder(tmp_path / "out", SETTINGS):
            pass
    first, second = RunFolder(tmp_path / "out", SETTINGS), RunFolder(tmp_path / "out", SETTINGS | {"epochs": 2})
    if place == "claimed":
        second.settings = SETTINGS
    inside, refused = [], []

    def enter(folder):
        try:
            folder.__enter__()
        except ValueError as error:
            refused.append(str(error))
        else:
            inside.append(folder)

    def interrupted(*args):
        monkeypatch.setattr(f"qconv.rows.{step}", original)
        enter(second)
        return original(*args)

    original = functools.reduce(getattr, step.split("."), qconv.rows)
    monkeypatch.setattr(f"qconv.rows.{step}", interrupted)
    enter(first)
    assert len(inside) == len(refused) == 1
    assert "another run is writing" in refused[0]
    assert json.loads((tmp_path / "out" / RunFolder.MARKER).read_text())["settings"] == inside[0].settings
    inside[0].__exit__(None, None, None)


# --- trained models ---


def test_feature_maps_are_the_slots_outputs_on_two_classes(tmp_path, finished):
    out, rows = finished
    tasks = [rows[0].task, rows[4].task]
    tensors = load_file(save_feature_maps(tasks, out))
    assert tensors["images"].shape == (2, 1, 8, 8)
    assert tensors["labels"][0] != tensors["labels"][1]
    for task in tasks:
        slot = load_model(task, out).slot
        torch.testing.assert_close(tensors[f"map/{task.arm}"], slot(tensors["images"]).detach())


def test_a_whole_networks_row_has_one_account(tmp_path):
    task = tiny(["a_deformed"])[0]
    row = run_task(task, tmp_path)
    assert row.slot_parameters == row.parameters == 3 * 640 + 20
    assert row.slot_counts == row.counts
    assert row.slot_energy == row.energy
    split = load_dataset("digits").split(task.seed, n_train=100)
    assert evaluate(load_model(task, tmp_path), *split.test).accuracy == row.test_accuracy


def test_trained_kernel_on_other_simulators(finished):
    out, rows = finished
    task = next(row.task for row in rows if row.task.arm == "heisenberg")
    results = check_agreement([task], out, n_images=4, shots=100)
    assert [(r.backend, r.shots) for r in results] == [
        ("state vector", None),
        ("PennyLane default.qubit", None),
        ("Qiskit Aer", None),
        ("Qiskit Aer", 100),
    ]
    assert all(r.values == 4 * 4 * 49 and r.images == 4 for r in results)
    assert all(r.deviation < 1e-5 and r.changed == 0 for r in results[:3])
    # 784 means of 100 shots: standard errors of at most 0.1, and surely one of them beyond 0.05.
    assert 0.05 < results[3].deviation < 0.55
    assert json.loads((out / "agreement.json").read_text()) == [asdict(r) for r in results]
    with pytest.raises(ValueError, match="'float' has no circuit"):
        check_agreement([rows[0].task], out)
