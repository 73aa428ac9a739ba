import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qconv.cli import main
from qconv.models import ARMS, DEFAULT_ARMS
from qconv.rows import read_rows

ROOT = Path(__file__).parents[1]
TINY = ["compare", "--seeds", "1", "--epochs", "1", "--n-train", "100", "--workers", "1"]


def call(capsys, *args):
    """Exit code, standard output and standard error of `qconv ARGS`."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def arms_in(table):
    return {line["arm"] for line in csv.DictReader(table.read_text().splitlines())}


def test_compare_from_command_to_report(capsys, tmp_path):
    out = tmp_path / "run"
    code, said, errors = call(capsys, *TINY, "--arms", "int8, heisenberg", "--out", str(out))
    assert (code, errors) == (0, "")
    assert len(read_rows(out / "rows.csv")) == 8
    for file in ("table.csv", "device.csv", "report.html", "accuracy_energy.png", "features.safetensors"):
        assert (out / file).stat().st_size > 0
    assert arms_in(out / "table.csv") == {"int8", "heisenberg"}
    assert "Qiskit Aer" in said
    assert f"Report: {out / 'report.html'}" in said
    closing = said.strip().splitlines()[-1]
    assert closing.startswith("Quantum, learned entanglement (")
    assert "no difference can be shown with one seed" in closing
    assert closing in (out / "report.html").read_text().replace("&#39;", "'")

    before = (out / "rows.csv").read_bytes()
    code, again, _ = call(capsys, *TINY, "--arms", "int8,heisenberg", "--out", str(out))
    assert code == 0
    assert again.strip().splitlines()[-1] == closing
    assert (out / "rows.csv").read_bytes() == before

    # Fewer arms from the same folder: the report is about what was asked for.
    code, fewer, _ = call(capsys, *TINY, "--arms", "int8", "--out", str(out))
    assert code == 0
    assert fewer.strip().endswith("No verdict: the run has no quantum arm.")
    assert arms_in(out / "table.csv") == {"int8"}

    code, _, errors = call(capsys, *TINY, "--epochs", "2", "--arms", "int8", "--out", str(out))
    assert code == 2
    assert "a run with epochs 1, but this run has epochs 2" in errors
    assert (out / "rows.csv").read_bytes() == before


def test_compare_whole_networks(capsys, tmp_path):
    out = tmp_path / "run"
    code, said, errors = call(capsys, *TINY, "--arms", "a_deformed,a_deformed_control", "--out", str(out))
    assert (code, errors) == (0, "")
    # The controls that were not named come along, and the first line says so.
    assert arms_in(out / "table.csv") == {"a_deformed", "a_deformed_control", "a_linear_x"}
    assert said.splitlines()[0] == "With the controls of these networks: a_linear_x"
    assert not (out / "features.safetensors").exists()
    assert "against A, linear on h, X" in said.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ("a_deformed,float", "float fills the slot of one small network but a_deformed is a whole network, so"),
        ("int8,mps,eps,float", "int8 and float fill the slot of one small network but mps and eps are whole"),
    ],
)
def test_arms_of_both_kinds_are_refused(capsys, tmp_path, arms, words):
    code, _, errors = call(capsys, *TINY, "--arms", arms, "--out", str(tmp_path / "mixed"))
    assert code == 2
    assert words in errors
    assert "compare either kind alone (`qconv arms` lists both)" in errors
    assert not (tmp_path / "mixed").exists()


def test_arms_lists_all_with_their_controls(capsys, monkeypatch):
    code, said, errors = call(capsys, "arms", "--json")
    assert (code, errors) == (0, "")
    listed = {line["name"]: line for line in json.loads(said)}
    assert set(listed) == set(ARMS)
    assert listed["mps"]["controls"] == ["mps_control", "mps_convolution"]
    assert listed["mps"]["whole"]
    assert not listed["float"]["whole"]
    assert [name for name, line in listed.items() if line["default"]] == list(DEFAULT_ARMS)
    assert all(line["title"] and line["note"] and line["family"] for line in listed.values())

    monkeypatch.setenv("COLUMNS", "160")
    code, said, _ = call(capsys, "arms")
    assert code == 0
    for name in ARMS:
        assert f" {name} " in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*TINY, "--arms", "flaot"], "unknown arm 'flaot': did you mean 'float'?"),
        ([*TINY, "--arms", ","], "at least one arm"),
        ([*TINY, "--dataset", "minst"], "did you mean 'mnist'?"),
        ([*TINY, "--n-train", "5"], "n_train=5"),
        ([*TINY, "--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        ([*TINY, "--out", "a_file"], "the output folder a_file is a file"),
        ([*TINY, "--out", "a_file/run"], "a_file"),
        ([*TINY, "--out", "theirs"], "holds files that qconv did not write ('precious.txt')"),
        (["draw", "heisenburg"], "unknown file or kernel 'heisenburg': did you mean 'heisenberg'?"),
        (["draw", "heisenberg", "--wires", "0"], "0 wires"),
        (["energy", "heisenburg"], "unknown arm 'heisenburg'"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QCONV_DATA", raising=False)
    Path("a_file").write_text("precious")
    Path("theirs").mkdir()
    Path("theirs/precious.txt").write_text("precious")
    code, said, errors = call(capsys, *args)
    assert code == 2
    assert message in errors
    assert errors.startswith("qconv: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors + said
    assert {str(p) for p in Path().rglob("*")} == {"a_file", "theirs", "theirs/precious.txt"}
    assert Path("a_file").read_text() == Path("theirs/precious.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "args",
    [
        ["compare", "--seeds", "0"],
        ["compare", "--seeds", "many"],
        ["comprae"],
        ["draw"],
        ["energy", "float", "--image-size", "4"],
    ],
)
def test_wrong_usage_is_explained_with_code_2(capsys, args):
    code, _, errors = call(capsys, *args)
    assert code == 2
    assert "Usage:" in errors
    assert "Traceback" not in errors


def test_interrupted_run_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("qconv.experiment.run", interrupted)
    code, _, errors = call(capsys, *TINY, "--out", str(tmp_path / "run"))
    assert code == 130
    assert errors.strip() == f"qconv: stopped. Finished tasks are kept in {tmp_path / 'run'}: the same command resumes."


def test_draw(capsys, monkeypatch):
    from circuits.kernels import kernel

    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = call(capsys, "draw", "strongly_entangling", "--wires", "3", "--depth", "1")
    assert code == 0
    assert said.strip() == kernel("strongly_entangling", wires=3, depth=1).draw().strip()


def test_energy_is_a_table_of_the_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, said, _ = call(capsys, "energy", "float", "--image-size", "28")
    assert code == 0
    # 14x14 outputs of the slot: 4 channels of 4 pixels; 16 channels of 4 times 3x3; 10 classes of 16 times 7x7.
    for macs in (14 * 14 * 4 * 4, 14 * 14 * 16 * 36, 7840):
        assert f"{macs:,}".replace(",", "\N{THIN SPACE}") + " fp32×fp32" in said
    assert "Together" in said
    assert "quantum device" not in said
    assert "49 circuits" in call(capsys, "energy", "heisenberg")[1]


def test_quick_commands_import_neither_pennylane_nor_qiskit():
    code = """
import sys
from qconv.cli import main
try:
    main(["version"])
except SystemExit as ended:
    assert ended.code == 0
slow = {"pennylane", "qiskit", "qiskit_aer", "matplotlib", "sklearn", "jinja2", "scipy", "safetensors"}
assert not slow & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()][:3] == ["qconv", "torch", "numpy"]


def test_as_a_module_an_error_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qconv.cli", "draw", "nothing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("qconv: unknown file or kernel 'nothing'")
    assert "Traceback" not in done.stderr
