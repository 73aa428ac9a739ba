"""Compressions that resume: jobs and their records, the command, the scripts that reproduce papers."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from qconv.cli import main
from qconv.compression import Measures, comparison
from qconv.compression_runs import FloatJob, Job, Record, files, float_model, load_job, load_record, run_job, run_jobs
from qconv.data import load_dataset
from qconv.processes import in_processes
from qconv.train import evaluate

# --- jobs, records, resuming ---

FLOAT = FloatJob("digits", "lenet300", epochs=2, n_train=100)


def test_a_job_is_done_once(tmp_path):
    job = Job(FLOAT, "prune+share+huffman", epochs=1)
    told = []
    record = run_job(job, tmp_path, progress=lambda *a: told.append(a[0]))
    assert told == ["train", "train", "prune", "share"]
    where = files(job, tmp_path)
    assert where.model.stat().st_size == record.after.bytes
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {where.float_model, where.model, where.record}
    assert run_job(job, tmp_path, progress=lambda *a: told.append(a[0])) == record
    assert len(told) == 4
    assert load_record(job, tmp_path) == record
    split = load_dataset("digits").split(0, n_train=100)
    assert evaluate(load_job(job, tmp_path), *split.test).accuracy == record.after.accuracy
    assert record.n_fit == 100

    # Another method goes on from the same float network.
    told.clear()
    other = run_job(Job(FLOAT, "int8"), tmp_path, progress=lambda *a: told.append(a[0]))
    assert told == []
    assert other.before == record.before
    assert other.float_seconds == record.float_seconds

    # What is damaged is done again, and comes out the same.
    where.record.write_text(where.record.read_text()[:-30])
    where.float_model.write_bytes(where.float_model.read_bytes()[:1000])
    again = run_job(job, tmp_path)
    assert (again.before, again.after) == (record.before, record.after)
    assert where.model.read_bytes() == written[where.model]


def test_records_as_text(tmp_path):
    record = run_job(Job(FLOAT), tmp_path)
    assert Record.from_json(record.to_json()) == record
    assert json.loads(files(record.job, tmp_path).record.read_text())["after"]["bytes"] == record.after.bytes
    for text in ("", "[]", "{}", record.to_json().replace('"n_fit"', '"n_fits"'), '{"job": 3}'):
        with pytest.raises(ValueError, match="no record of a compression"):
            Record.from_json(text)


def test_what_differs_has_another_id():
    jobs = [Job(FLOAT), Job(FLOAT, "int4"), Job(FLOAT, lr=0.1), Job(replace(FLOAT, seed=1)), Job(FLOAT, distill=0.0)]
    assert len({job.id for job in jobs}) == len(jobs)
    assert Job(replace(FLOAT)).id == jobs[0].id
    with pytest.raises(ValueError, match="unknown step"):
        Job(FLOAT, "int99")


def test_many_jobs_train_each_float_network_once(tmp_path, monkeypatch):
    jobs = [Job(replace(FLOAT, seed=seed), method) for seed in (0, 1) for method in ("int8", "int4_channel", "int8")]
    jobs = [replace(job, epochs=0) for job in jobs]
    told = []
    records = run_jobs(jobs, tmp_path, progress=lambda *a: told.append(a))
    assert [record.job for record in records] == jobs
    assert records[0] is records[2]
    assert told == [(done, 6) for done in range(7)]
    assert len(list(tmp_path.glob("*float*"))) == 2
    told.clear()
    assert run_jobs(jobs, tmp_path, progress=lambda *a: told.append(a)) == records
    assert told == [(6, 6)]


def test_many_jobs_in_processes(tmp_path):
    jobs = [Job(replace(FLOAT, seed=seed), method, epochs=0) for seed in (0, 1) for method in ("int8", "int4_channel")]
    told = []
    records = run_jobs(jobs, tmp_path / "two", workers=2, progress=lambda *a: told.append(a))
    assert told == [(done, 6) for done in range(7)]
    assert [record.job for record in records] == jobs
    alone = run_jobs(jobs, tmp_path / "one")
    assert [(r.before, r.after) for r in records] == [(r.before, r.after) for r in alone]


def test_a_float_network_read_back_is_the_one_trained(tmp_path):
    (trained, seconds), (read, kept) = (float_model(FLOAT, tmp_path) for _ in range(2))
    assert seconds == kept > 0
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in trained.state_dict().items())
    assert not trained.training


def test_training_without_validation_needs_a_test_part_of_its_own(tmp_path):
    job = Job(replace(FLOAT, validate=False, n_train=None))
    with pytest.raises(ValueError, match="digits has no test part of its own"):
        run_job(job, tmp_path)


@pytest.mark.data
def test_training_on_all_images_leaves_the_test_part_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("qconv.compression_runs.fit", lambda model, images, labels, **_: seen.append(len(images)))
    float_model(FloatJob("mnist", "lenet300", validate=False), tmp_path)
    float_model(FloatJob("mnist", "lenet300"), tmp_path)
    assert seen == [60_000, 50_000]


def test_processes():
    jobs = [9.0, 4.0, 16.0]
    for workers in (1, 2):
        assert dict(in_processes(math.sqrt, jobs, workers)) == {9.0: 3.0, 4.0: 2.0, 16.0: 4.0}
        assert list(in_processes(math.sqrt, [], workers)) == []
        order = list(in_processes(math.sqrt, [256.0], workers, lambda job: [math.sqrt(job)] * (job > 4)))
        assert order == [(256.0, 16.0), (16.0, 4.0), (4.0, 2.0)]
    with pytest.raises(ValueError, match="math domain"):
        list(in_processes(math.sqrt, [1.0, -1.0], 1))
    with pytest.raises(ValueError, match="workers must be at least 1, but is 0"):
        list(in_processes(math.sqrt, jobs, 0))


# --- the command ---


def call(capsys, *args):
    """Exit code, standard output and standard error of `qconv ARGS`."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


TINY = ["compress", "--network", "lenet300", "--float-epochs", "2", "--n-train", "100"]


def test_the_command_trains_compresses_and_says_where_the_files_are(tmp_path, capsys):
    arguments = [*TINY, "--method", "lsq", "--bits", "4", "--epochs", "1", "--out", str(tmp_path)]
    code, said, errors = call(capsys, *arguments)
    assert (code, errors) == (0, "")
    assert "lenet300 on digits, lsq4, seed 0: 100 training images" in said
    (record_file,) = tmp_path.glob("*.json")
    record = Record.from_json(record_file.read_text())
    assert comparison(record.before, record.after) in said
    assert f"Record: {record_file}" in said
    assert f"Model: {record_file.with_suffix('.qcnv')}" in said
    before = record_file.read_bytes()
    code, again, _ = call(capsys, *arguments)
    assert code == 0
    assert again.splitlines()[-9:] == said.splitlines()[-9:]
    assert record_file.read_bytes() == before


def test_the_command_shows_what_data_free_quantization_left_out(tmp_path, capsys):
    arguments = ["compress", "--float-epochs", "1", "--n-train", "50", "--method", "dfq", "--out", str(tmp_path)]
    for _ in range(2):  # the second time from the record
        code, said, _ = call(capsys, *arguments)
        assert code == 0
        rows = [line.split()[:3] for line in said.splitlines()]
        assert ["range", "conv1", "done"] in rows
        assert ["range", "conv2", "skipped"] in rows
    (record_file,) = tmp_path.glob("*.json")
    record = Record.from_json(record_file.read_text())
    assert record.report in said
    old = json.loads(record.to_json())
    del old["report"]  # as written before there were reports
    assert replace(record, report="") == Record.from_json(json.dumps(old))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lsq77"], "unknown step of a method 'lsq77'"),
        (["--network", "lenet7"], "unknown network 'lenet7'"),
        (["--dataset", "minst"], "did you mean 'mnist'"),
        (["--sparsity", "0.5"], "method 'int8' prunes nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, message, tmp_path, capsys):
    code, said, errors = call(capsys, *TINY, *arguments, "--out", str(tmp_path / "out"))
    assert (code, said) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qconv.compression_runs.run_job", interrupted)
    code, _, errors = call(capsys, *TINY, "--out", str(tmp_path))
    assert code == 130
    assert "the same command goes on" in errors


# --- the scripts that reproduce papers ---

SCRIPTS = Path(__file__).parents[1] / "examples" / "reproduce"


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process: exit code, standard output and standard error."""
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("protocol", "compressions", "quantized_lenet", "binary_lenet", "pruned_lenet", "compressed_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def called(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = importlib.import_module(name).main()
        return code, *capsys.readouterr()

    return called


def cells(text):
    """Rows of the Markdown table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("name", "methods"), [("quantized_lenet", ("float", "int8", "twn")), ("pruned_lenet", ("12x", "19x"))]
)
def test_a_smoke_run_of_a_script_prints_what_the_records_hold(name, methods, tmp_path, script):
    options = ["--dataset", "digits", "--quick", "--methods", ",".join(methods), "--seeds", "2", "--workers", "1"]
    options += ["--out", tmp_path]
    code, said, _ = script(name, *options)
    assert code == 0
    assert "300 training, 359 test images; mean of 2 seeds" in said
    head, _, floating, *rows = cells(said)
    assert head[:2] == ["method", "test error %"]
    records = [Record.from_json(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(records) == 2 * len(methods)
    assert floating[1].startswith(f"{100 - 100 * np.mean([r.before.accuracy for r in records]):.2f} ± ")
    assert floating[5] == f"{records[0].before.bytes:,}"
    for row in rows:
        ours = [r for r in records if f"(`{r.job.method}`)" in row[0]]
        error = [1 - r.after.accuracy for r in ours]
        half = max(np.std(error, ddof=1), 1 / 359) / math.sqrt(2) * stats.t.ppf(0.975, 1)
        assert row[1] == f"{100 * np.mean(error):.2f} ± {100 * half:.2f}"
        assert row[5] == f"{np.mean([r.after.bytes for r in ours]):,.0f}"
        assert row[6] == f"{np.mean([r.before.bytes / r.after.bytes for r in ours]):.1f}"
        assert row[8] == f"{1e6 * np.mean([r.after.joules for r in ours]):.2f}"
    assert len(rows) == len(methods)
    assert script(name, *options)[1] == said


def test_one_page_holds_what_the_scripts_print(tmp_path, script, monkeypatch):
    report = importlib.import_module("compressed_report")
    smoke = ("--dataset", "digits", "--quick", "--methods", "int8", "--seeds", "1")
    monkeypatch.setattr(report, "PARTS", (("Eight bits", "quantized_lenet.py", smoke),))
    runs, file = tmp_path / "runs", tmp_path / "new" / "page.md"
    code, said, _ = script("compressed_report", "--lenet5", runs, "--workers", 1, "--write", file)
    assert (code, said) == (0, "")
    printed = script("quantized_lenet", *smoke, "--out", runs)[1].strip()
    assert printed in file.read_text()
    assert f"## Eight bits\n\n`python examples/reproduce/quantized_lenet.py {' '.join(smoke)}`" in file.read_text()
    monkeypatch.setattr(report, "PARTS", (("", "pruned_lenet.py", ("--seeds", "0")),))
    code, _, errors = script("compressed_report", "--write", tmp_path / "none.md")
    assert code == 2
    assert "pruned_lenet.py ended with exit code 2" in errors
    assert not (tmp_path / "none.md").exists()


def test_tuning_shows_validation_errors_and_the_rate_in_use(tmp_path, script):
    options = ["--dataset", "digits", "--quick", "--tune", "--methods", "int8", "--workers", "1", "--out", tmp_path]
    code, said, _ = script("quantized_lenet", *options)
    assert code == 0
    (record,) = (Record.from_json(path.read_text()) for path in tmp_path.glob("*.json"))
    error = f"0.001: {100 - 100 * record.after.validation:.2f}"
    assert cells(said)[2] == ["int8, calibrated only", error, "0.001", "0.001"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantized_lenet", ["--methods", "int3"], "unknown --methods 'int3': valid are float, int8, twn"),
        ("pruned_lenet", ["--seeds", "0"], "--seeds is 0"),
        ("pruned_lenet", ["--dataset", "minst"], "did you mean 'mnist'"),
        ("quantized_lenet", ["--workers", "0", "--dataset", "digits"], "workers must be at least 1, but is 0"),
    ],
)
def test_bad_input_to_a_script_is_one_sentence_and_code_2(name, arguments, message, tmp_path, script):
    code, said, errors = script(name, "--quick", *arguments, "--out", tmp_path / "runs")
    assert (code, said) == (2, "")
    assert message in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["quantized_lenet", "binary_lenet", "pruned_lenet"])
def test_rates_in_use_are_among_those_tried(name, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    entries = importlib.import_module(name).ENTRIES
    for entry in entries.values():
        assert entry.rate in entry.rates
        assert (entry.goal is None) == (entry.method == "float")


@pytest.mark.parametrize("name", ["quantized_lenet", "binary_lenet", "pruned_lenet"])
def test_the_control_trains_as_long_and_on_the_same_scores_as_compressed_networks(name, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    entries = importlib.import_module(name).ENTRIES
    control = entries["float"].job(FLOAT, entries["float"].rate, 0.7)
    others = [entry.job(FLOAT, entry.rate, 0.7) for entry in entries.values() if entry.method != "float"]
    trained = [job.recipe() for job in others if job.epochs != 0]
    assert control.recipe().schedule(60_000, 128) == {"float": trained[0].epochs}
    for recipe in trained:
        assert recipe.epochs == control.epochs
        assert recipe.distill == control.recipe().distill == 0.7
    assert control.lr in {job.lr for job in others}


@pytest.mark.parametrize(("dataset", "shown"), [("mnist", True), ("digits", False)])
def test_published_figures_stand_beside_those_of_mnist(dataset, shown, tmp_path, script, monkeypatch):
    def made(jobs, out, **_):
        measured = Measures(0.99, 0.99, 10_000, 10_000, 1000, {"fp32*fp32": 1}, 1.0, 1e-6, 1e-6, 1e-6)
        return [Record(job, measured, replace(measured, bytes=500), 60_000, 60.0, 60.0) for job in jobs]

    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(importlib.import_module("compressions"), "run_jobs", made)
    code, said, _ = script("quantized_lenet", "--dataset", dataset, "--out", tmp_path)
    assert code == 0
    published = {row[0].split(" (`")[0]: row[3] for row in cells(said)[2:]}
    assert published["float"] == "0.64" * shown
    assert published["RQ-ST 2/2"] == "0.63" * shown
    assert published["TWN, activations int8"] == "0.65, activations float" * shown
    assert published["int8, calibrated only"] == "0.56, RQ-ST 8/8" * shown
    assert published["float, trained on"] == ""
    assert "What “float, trained on” gains on “float”" in said
    _, said, _ = script("quantized_lenet", "--dataset", dataset, "--methods", "lsq2", "--out", tmp_path)
    assert "trained on" not in said


@pytest.mark.data
def test_scripts_train_on_all_images_and_look_at_the_test_part(tmp_path, script, monkeypatch):
    seen = []
    module = importlib.import_module("qconv.compression_runs")
    monkeypatch.setattr(module, "run_job", lambda job, *_: seen.append(job) or 1 / 0)
    monkeypatch.setattr(module, "float_model", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        script("pruned_lenet", "--workers", "1", "--out", tmp_path)
    assert (seen[0].float_job.dataset, seen[0].float_job.validate, seen[0].float_job.n_train) == ("mnist", False, None)
