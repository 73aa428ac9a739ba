"""The scripts of examples/reproduce: smoke runs, resuming, and what their tables say of rows that no training made."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_rows import make_row
from scipy import stats

from qconv.networks import ARCHITECTURES, NETWORKS
from qconv.rows import RunFolder, read_rows

NONE = "no difference shown"
SCRIPTS = Path(__file__).parents[1] / "examples" / "reproduce"


def table_of(text, number=0):
    """The Markdown tables of a text, as lists of rows of cells."""
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].strip().splitlines()]


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("protocol", "quantum_deformed", "tensor_networks", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("protocol")


@pytest.fixture
def call(protocol, monkeypatch, capsys):
    """Run a script in this process: exit code, standard output and standard error."""

    def called(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = importlib.import_module(name).main()
        return code, *capsys.readouterr()

    return called


def test_a_smoke_run_and_its_resumption(tmp_path, call):
    out = tmp_path / "runs"
    options = ["--dataset", "digits", "--quick", "--arch", "a", "--seeds", "2", "--out", out]
    command = [sys.executable, SCRIPTS / "quantum_deformed.py", *options]
    first = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    (rows_file,) = out.glob("*/rows.csv")
    assert rows_file.parent.name == "digits-epochs1-batch128-images300"
    rows = read_rows(rows_file)
    names = {name for name in NETWORKS if name.startswith("a_")}
    assert {(row.task.arm, row.task.seed) for row in rows} == {(name, seed) for name in names for seed in range(2)}
    assert first.stdout.startswith("smoke run: says nothing about accuracy\n")
    assert {line[4] for line in table_of(first.stdout, 1)[2:]} == {"not judged"}
    assert not re.search("beat|lost to|difference shown", first.stdout)
    table = table_of(first.stdout)
    assert table[0][:2] == ["network", "test %"]
    assert {re.search("`(.*)`", line[0])[1] for line in table[2:]} == names
    for line in table[2:]:
        values = [row.test_accuracy for row in rows if f"(`{row.task.arm}`)" in line[0]]
        assert line[1].startswith(f"{100 * np.mean(values):.2f} ± ")

    # As a kill leaves it: the last row is half-written.
    before = rows_file.read_bytes()
    rows_file.write_bytes(before[:-40])
    code, said, _ = call("quantum_deformed", *options)
    assert code == 0
    minutes = r"[\d.]+ \|$"  # the last column: how long it took, which is never the same
    assert re.sub(minutes, "", said, flags=re.MULTILINE) == re.sub(minutes, "", first.stdout, flags=re.MULTILINE)
    assert len(read_rows(rows_file)) == len(rows)
    kept = before[: before[:-40].rfind(b"\n") + 1]
    assert rows_file.read_bytes().startswith(kept)


def test_tensor_networks(tmp_path, call):
    options = ["--dataset", "digits", "--quick", "--networks", "mps", "--seeds", "1", "--out", tmp_path / "runs"]
    code, said, _ = call("tensor_networks", *options)
    assert code == 0
    differences = table_of(said, 1)
    assert differences[2][:2] == ["Matrix product state", "Hidden layer on cos, sin"]
    assert differences[0][4] == "outcome"
    assert differences[2][4:6] == ["not judged", "3,088 / 3,106"]
    assert differences[3][1] == "3x3 convolution on cos, sin"


@pytest.mark.data
def test_a_smoke_run_on_real_images(tmp_path, call):
    options = ["--dataset", "mnist", "--quick", "--arch", "A", "--seeds", "1", "--out", tmp_path / "runs"]
    code, said, _ = call("quantum_deformed", *options)
    assert code == 0
    assert "300 training, 10,000 validation, 10,000 test images" in said


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantum_deformed", ["--arch", "D"], "unknown --arch 'D': valid are A, B, C"),
        ("quantum_deformed", ["--arch", ","], "--arch names none"),
        ("tensor_networks", ["--networks", "mera"], "unknown --networks 'mera': valid are mps, eps, eps2"),
        ("tensor_networks", ["--seeds", "0"], "--seeds is 0"),
        ("tensor_networks", ["--epochs", "0"], "epochs must be at least 1, but is 0"),
        ("quantum_deformed", ["--workers", "0"], "workers must be at least 1, but is 0"),
        ("quantum_deformed", ["--dataset", "minst"], "did you mean 'mnist'"),
        ("quantum_deformed", ["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(tmp_path, call, monkeypatch, name, arguments, message):
    monkeypatch.delenv("QCONV_DATA", raising=False)
    code, said, errors = call(name, *arguments, "--out", tmp_path / "runs")
    assert (code, said) == (2, "")
    assert message in errors
    assert not (tmp_path / "runs").exists()


# --- what is trained ---


def test_every_network_of_the_paper_has_its_controls_beside_it(protocol):
    found = importlib.import_module("quantum_deformed").entries(list(ARCHITECTURES))
    keys = [entry.key for entry in found]
    assert len(set(keys)) == len(keys)
    assert {arm for arm, _ in keys} == {name for name in NETWORKS if name[:2] in ("a_", "b_", "c_")}
    for entry in found:
        assert set(entry.rivals) <= set(keys)
        assert len(entry.rates) == 3
    compared = {(entry.arm, name) for entry in found for name, _ in entry.rivals}
    for letter in ARCHITECTURES:
        assert (f"{letter}_deformed", f"{letter}_pbnn") in compared
        assert (f"{letter}_neighbors", f"{letter}_deformed") in compared


def test_both_scripts_name_goals_of_networks_that_exist(protocol):
    for module in ("quantum_deformed", "tensor_networks"):
        found = importlib.import_module(module)
        assert set(found.GOALS) | set(found.PUBLISHED) <= set(NETWORKS)


# --- tuning and tables, from rows that no training made ---


class Made:
    """Stands for `run`: rows whose validation accuracy is best at rate 0.03, and whose test accuracy is worst there."""

    def __init__(self):
        self.trained = []

    def __call__(self, tasks, folder, *, workers, data_dir, progress):
        self.trained += tasks
        rows = []
        for task in tasks:
            offset = {"a_pbnn": 0.0, "a_pbnn_control": 0.01}[task.arm]
            best = task.lr == 0.03
            made = make_row(
                task.arm,
                task.seed,
                val_accuracy=0.95 if best else 0.9,
                test_accuracy=(0.9 if best else 0.99) + 0.001 * task.seed**2 - offset,
                official_test=True,
                n_test=10_000,
                seconds=90.0,
            )
            rows.append(replace(made, task=task))
            progress(len(rows), len(tasks), rows[-1])
        return rows


def test_validation_chooses_the_rate_and_tables_hold_the_rows(protocol, monkeypatch, tmp_path):
    made = Made()
    monkeypatch.setattr(protocol, "run", made)
    goal, published = {"mnist": 92.0}, {"mnist": "about 91"}
    entry = protocol.Entry("a_pbnn", 7, (0.01, 0.03, 0.1), goal=goal, published=published)
    entries = protocol.with_rivals([entry])
    assert [(e.arm, e.epochs, e.rates, e.goal) for e in entries] == [
        ("a_pbnn", 7, (0.01, 0.03, 0.1), goal),
        ("a_pbnn_control", 7, (0.01, 0.03, 0.1), {}),
    ]
    options = protocol.Options("mnist", 3, tmp_path, None, 1, None)
    found = protocol.train(entries, options)
    assert {task.lr for task in made.trained if task.seed > 0} == {0.03}
    assert {task.lr for task in made.trained if task.seed == 0 and task.arm == "a_pbnn"} == {0.01, 0.03, 0.1}
    text = protocol.tables(entries, found, options)
    values = 100 * np.array([0.9, 0.901, 0.904])
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    line = table_of(text)[2]
    assert line[0] == "A, stochastic bits (`a_pbnn`)"
    assert line[1:4] == [f"{values.mean():.2f} ± {half:.2f}", "92.0", "about 91"]
    assert line[5:] == ["0.03", "7", "1.5"]
    # The same difference at every seed: its spread counts as one test image.
    step = stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    images = 100 * 1.96 * np.sqrt(sum(p * (1 - p) for p in (values.mean() / 100, values.mean() / 100 - 0.01)) / 10_000)
    assert table_of(text, 1)[2] == [
        *("A, stochastic bits", "A, linear on h", f"+1.00 ± {step:.2f}", f"{images:.2f}", "beat"),
        *("2,062 / 2,062", "7"),
    ]
    # A difference that other test images could have made is none, however alike the seeds are.
    closer = {
        key: replace(
            chosen, rows=tuple(replace(row, test_accuracy=0.9 - 0.005 * (key[0] != "a_pbnn")) for row in chosen.rows)
        )
        for key, chosen in found.items()
    }
    assert table_of(protocol.tables(entries, closer, options), 1)[2][2:5] == ["+0.50 ± 0.02", f"{images:.2f}", NONE]


def finish(protocol, folder, arms, best):
    """Rows of finished entries, as their script leaves them; each arm's validation accuracy is best at a rate."""
    entries = [entry for entry in importlib.import_module("quantum_deformed").entries(["a"]) if entry.arm in arms]
    options = protocol.Options("mnist", 2, folder, None, 1, None)
    for entry in entries:
        with RunFolder(options.folder(entry), {"dataset": "mnist"}) as run:
            for rate, seed in [*((rate, 0) for rate in best), (best[-1], 1)]:
                task = options.task(entry, rate, seed)
                accuracy = {"val_accuracy": 0.9 - abs(rate - best[-1]), "test_accuracy": 0.9 - 0.01 * seed}
                run.append(replace(make_row(entry.arm, seed, **accuracy), task=task))
    return entries, options


def test_the_page_holds_what_training_would_print_and_names_what_is_missing(protocol, monkeypatch, tmp_path, call):
    deformed = tmp_path / "deformed"
    arms = ("a_pbnn", "a_pbnn_control")
    entries, options = finish(protocol, deformed, arms, (0.01, 0.1, 0.03))
    folders = ["--deformed", deformed, "--tensor", tmp_path / "tensor", "--seeds", "2"]
    file = tmp_path / "docs" / "page.md"
    code, said, errors = call("report", *folders, "--write", file)
    assert (code, said, errors) == (0, "", "")
    page = file.read_text()
    assert page.startswith("<!-- Generated by `python examples/reproduce/report.py")
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## MNIST", "## Fashion-MNIST"]
    assert page.count("### ") == 12

    # What the script prints after training, from the same rows.
    def looked_up(tasks, folder, **options):
        rows = {row.task: row for row in read_rows(folder / "rows.csv")}
        return [rows[task] for task in tasks]

    monkeypatch.setattr(protocol, "run", looked_up)
    assert protocol.tables(entries, protocol.train(entries, options), options) in page
    assert "A, stochastic bits (`a_pbnn`) | 89.50 ± " in page
    missing = next(line for line in page.splitlines() if line.startswith("**Missing**"))
    for arm in ("a_deformed", "a_deformed_control", "a_linear_x", "a_neighbors"):
        assert f"`{arm}` (12 epochs)" in missing
    assert "a_pbnn" not in missing
    assert "not all rates and seeds were run: all networks. `python examples/reproduce/tensor_networks.py" in page

    code, said, _ = call("report", *folders)
    assert (code, said) == (0, page)


def test_the_page_takes_no_network_whose_best_rate_is_the_last_tried(protocol, tmp_path):
    entries, options = finish(protocol, tmp_path, ("a_pbnn",), (0.1, 0.03, 0.01))
    assert protocol.finished(entries, options) == {}  # 0.003 is to be tried
    entries, options = finish(protocol, tmp_path / "more", ("a_pbnn",), (0.1, 0.03, 0.003, 0.01))
    assert protocol.finished(entries, options)[entries[0].key].setting == (0.01, 1.0)
    assert protocol.finished(entries, replace(options, seeds=3)) == {}


def test_no_page_of_nothing(tmp_path, call):
    code, said, errors = call("report", "--deformed", tmp_path, "--tensor", tmp_path, "--write", tmp_path / "page.md")
    assert (code, said) == (2, "")
    assert "no network has 3 finished seeds" in errors
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.03, [0.01, 0.03, 0.1]),
        (0.003, [0.001, 0.003, 0.01, 0.03, 0.1]),
        (0.3, [0.01, 0.03, 0.1, 0.3, 1.0]),
        (9.0, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),  # three more, and no further
    ],
)
def test_rates_go_on_until_the_best_lies_between_others(protocol, monkeypatch, tmp_path, best, tried):
    trained = []

    def run(tasks, folder, *, workers, data_dir, progress):
        trained.extend(tasks)
        accuracy = {task: 1 / (1 + abs(np.log(task.lr / best))) for task in tasks}
        return [replace(make_row("mps", task.seed, val_accuracy=accuracy[task]), task=task) for task in tasks]

    monkeypatch.setattr(protocol, "run", run)
    entry = protocol.Entry("mps", 2, (0.01, 0.03, 0.1), rival=True)
    found = protocol.train([entry], protocol.Options("digits", 2, tmp_path, None, 1, None))
    assert sorted({task.lr for task in trained if task.seed == 0}) == tried
    assert found[entry.key].setting == (min(tried, key=lambda rate: abs(np.log(rate / best))), 1.0)
    assert {task.lr for task in trained if task.seed == 1} == {found[entry.key].setting[0]}


def test_an_interrupted_run_says_how_to_go_on(protocol, monkeypatch, tmp_path, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol, "run", interrupted)
    given = protocol.parser("", "x", "arch", ["A"]).parse_args(["--out", str(tmp_path / "runs")])
    assert protocol.reproduce([protocol.Entry("mps", 1, (0.01,))], given) == 130
    assert "the same command resumes" in capsys.readouterr().err
