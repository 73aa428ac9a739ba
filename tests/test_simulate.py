"""`qconv simulate`: circuits from files and names, run and shown."""

import json

import numpy as np
import oracle
import pytest
import torch
from scipy.stats import chi2

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, ReadoutError, kernel
from qconv import load_backend, simulate
from qconv.backends.jobs import JobFailed
from qconv.cli import main
from qconv.simulate_arguments import read_backend, read_noise
from qconv.simulate_file import run_circuit, show

# Wires that differ, in two bases; the second wire is read by no observable.
CIRCUIT = Circuit(
    3,
    (
        Gate("RY", (0,), (Angle("input", 0, np.pi),)),
        Gate("CNOT", (0, 2)),
        Gate("RX", (1,), (Angle("input", 1),)),
        Gate("CRY", (1, 2), (Angle("weight", 0),)),
    ),
    ("ZII", "IIZ", "XIX"),
)
X, W = np.array([[0.3, 1.0]]), np.array([0.7])


def call(capsys, *args):
    """Exit code, standard output and standard error of `qconv simulate ARGS`."""
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *map(str, args)])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "circuit.qasm"
    path.write_text(CIRCUIT.to_qasm3())
    return path


def values_of(circuit, x, w, **options):
    return simulate(circuit, torch.as_tensor(x), torch.as_tensor(w), **options).numpy()


def test_a_program_gives_exact_values(program, capsys):
    code, said, errors = call(capsys, program, "--input", "0.3,1.0", "--weights", "0.7")
    assert (code, errors) == (0, "")
    right = oracle.run(CIRCUIT, X[0], W)[0]
    for observable, value in zip(CIRCUIT.observables, right, strict=True):
        assert any(observable in line and f"{value:+.6f}" in line for line in said.splitlines())
    assert "3 wires, backend auto, exact" in said
    assert "bits in" not in said


def test_a_kernel_by_name_and_observables(capsys):
    args = ["sim2", "--wires", 2, "--depth", 1, "--encoding", "angle_x", "--observables", "ZZ,XI", "--input", "0.1,0.2"]
    code, said, _ = call(capsys, *args, "--weights", "random", "--seed", 3, "--json")
    assert code == 0
    found = json.loads(said)
    circuit = kernel("sim2", 2, 1, encoding="angle_x", readout=["ZZ", "XI"])
    weights = np.array(found["weights"])
    assert len(set(weights.tolist())) == circuit.n_weights
    assert ((weights >= 0) & (weights < 2 * np.pi)).all()
    np.testing.assert_allclose(found["values"], [oracle.run(circuit, [0.1, 0.2], weights)[0]], atol=1e-12)
    assert (found["observables"], found["counts"], found["standard_errors"]) == (["ZZ", "XI"], None, None)
    again = json.loads(call(capsys, *args, "--weights", "random", "--seed", 3, "--json")[1])
    assert again == found


@pytest.mark.parametrize("form", ["npy", "csv", "one row"])
def test_rows_from_files(program, tmp_path, capsys, form):
    rows = np.array([[0.3, 1.0], [-0.2, 0.5], [1, 2]])
    path = tmp_path / f"rows.{'npy' if form != 'csv' else 'csv'}"
    if form == "csv":
        path.write_text("\n".join(", ".join(map(str, row)) for row in rows) + "\n\n")
    else:
        rows = rows[:1] if form == "one row" else rows
        np.save(path, rows[0] if form == "one row" else rows)
    (tmp_path / "w.csv").write_text("0.7\n")
    code, said, _ = call(capsys, program, "--input", path, "--weights", tmp_path / "w.csv", "--json")
    assert code == 0
    found = json.loads(said)
    np.testing.assert_allclose(found["values"], [oracle.run(CIRCUIT, row, W)[0] for row in rows], atol=1e-12)
    np.testing.assert_array_equal(found["inputs"], rows)


@pytest.mark.parametrize("name", ["statevector", "fourier", "pennylane", "qiskit", "auto"])
def test_bitstrings_are_those_of_the_shots(name):
    shots = 2000
    circuit = CIRCUIT if name != "fourier" else kernel("strongly_entangling", 3, 1, readout=CIRCUIT.observables)
    x, w = (X, W) if circuit is CIRCUIT else (np.array([[0.3, 0.1, 0.6]]), np.arange(circuit.n_weights) / 3)
    found = run_circuit(circuit, x, w, backend=load_backend(name), shots=shots, seed=1)
    assert [setting.basis for setting in found.counts] == ["ZZZ", "XZX"]
    assert [setting.observables for setting in found.counts] == [("ZII", "IIZ"), ("XIX",)]
    for setting in found.counts:
        row = setting.rows[0]
        assert sum(row.values()) == shots
        assert list(row.values()) == sorted(row.values(), reverse=True)
        # Values are means over these very bits.
        for observable in setting.observables:
            read = [k for k, letter in enumerate(observable) if letter != "I"]
            mean = sum(n * (-1) ** sum(bits[k] == "1" for k in read) for bits, n in row.items()) / shots
            at = found.observables.index(observable)
            assert found.values[0, at] == pytest.approx(mean, abs=1e-12)
            assert found.errors[0, at] == pytest.approx(np.sqrt((1 - mean**2) / (shots - 1)), abs=1e-12)
        # Their law is that of the exact values of all products: p(s) = 2^-n sum (-1)^(s.m) <m>.
        texts = ["".join(p if m >> (2 - k) & 1 else "I" for k, p in enumerate(setting.basis)) for m in range(1, 8)]
        means = np.array([1, *oracle.run(circuit.with_observables(texts), x[0], w)[0]])
        signs = np.array([[(-1) ** bin(s & m).count("1") for m in range(8)] for s in range(8)])
        expected = signs @ means / 8 * shots
        drawn = np.array([row.get(f"{s:03b}", 0) for s in range(8)])
        possible = expected > 1e-9
        assert drawn[~possible].sum() == 0
        score = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
        assert score < chi2.ppf(1 - 1e-5, possible.sum() - 1)


def test_wire_0_is_the_first_bit(tmp_path, capsys):
    path = tmp_path / "one.qasm"
    path.write_text('OPENQASM 3.0;\ninclude "stdgates.inc";\nqubit[3] q;\nx q[0];\n')
    code, said, _ = call(capsys, path, "--shots", 20, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["counts"] == [{"basis": "ZZZ", "observables": ["ZII", "IZI", "IIZ"], "rows": [{"100": 20}]}]
    assert found["values"] == [[-1, 1, 1]]
    assert found["standard_errors"] == [[0, 0, 0]]
    code, said, _ = call(capsys, path, "--shots", 1)
    assert code == 0
    assert "standard error" not in said  # one shot says nothing about its error
    assert "1.0000" in said


def test_shots_are_shown_with_errors_and_counts(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    args = [program, "--input", "0.3,1.0", "--weights", 0.7, "--shots", 500, "--backend", "statevector"]
    code, said, _ = call(capsys, *args, "--seed", 2)
    assert code == 0
    assert "500 shots a measurement setting" in said
    found = run_circuit(CIRCUIT, X, W, backend=load_backend("statevector"), shots=500, seed=2)
    assert f"{found.values[0, 2]:+.6f} │ {found.errors[0, 2]:.6f}" in said
    bits, count = next(iter(found.counts[1].rows[0].items()))
    assert f"│ {bits}  │ {count}   │ {count / 500:.4f} │" in said
    assert call(capsys, *args, "--seed", 2)[1] == said
    assert call(capsys, *args, "--seed", 3)[1] != said


def test_many_rows_are_shown_in_a_table(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    np.save(tmp_path / "rows.npy", np.array([[0.0, 0.0], [1.0, 0.0]]))
    args = [program, "--input", tmp_path / "rows.npy", "--weights", 0.7, "--observables", "z0"]
    code, said, _ = call(capsys, *args, "--shots", 50, "--backend", "statevector")
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("│")]
    assert ["000:50" in lines[0], "101:50" in lines[1]] == [True, True]
    assert "-1.0000 ± 0.0000" in lines[1]
    assert "+1.0000" in call(capsys, *args)[1]


def test_settings_are_measured_on_shots_of_their_own():
    # All outcomes are as likely in X as in Y: the same draws would give the same bits.
    circuit = Circuit(4, (), ("XXXX", "YYYY"))
    found = run_circuit(circuit, np.zeros((1, 0)), np.zeros(0), backend=load_backend("statevector"), shots=50, seed=0)
    assert found.counts[0].rows != found.counts[1].rows


def test_wide_circuits_have_values_without_bitstrings(capsys):
    code, said, _ = call(
        capsys, "product", "--wires", 11, "--depth", 1, "--observables", "z10", "--input", ",".join(["0.2"] * 11),
        "--weights", "random", "--seed", 0, "--shots", 100, "--backend", "fourier",
    )  # fmt: skip
    assert code == 0
    assert "Bitstrings are counted on up to 10 wires" in said
    assert "IIIIIIIIIIZ" in said


class Apart:
    """Measures every observable on shots of its own."""

    name = "apart"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        each = [
            load_backend("statevector").compile(circuit.with_observables((text,)), shots=shots, seed=k)
            for k, text in enumerate(circuit.observables)
        ]

        class Compiled:
            differentiable = True
            counts = each[0].counts

            def __call__(self, x, w):
                return torch.cat([one(x, w) for one in each], dim=-1)

        return Compiled()


def test_observables_measured_apart_have_no_bitstrings():
    found = run_circuit(CIRCUIT, X, W, backend=Apart(), shots=101, seed=0)
    assert found.counts is None
    np.testing.assert_allclose(found.values, values_of(CIRCUIT, X, W), atol=0.5)
    assert found.errors.shape == (1, 3)


def test_noise_and_options_arrive(program, capsys):
    args = [program, "--input", "0.3,1.0", "--weights", 0.7, "--json"]
    typed = ["--noise", "CNOT:depolarizing:0.1", "--noise", "*:bit_flip:0.05", "--readout-error", "0.01,0.03"]
    code, said, _ = call(capsys, *args, *typed, "--backend", "statevector")
    assert code == 0
    noise = NoiseModel(
        (("CNOT", Channel("depolarizing", 0.1)), ("*", Channel("bit_flip", 0.05))), readout=ReadoutError(0.01, 0.03)
    )
    right = values_of(CIRCUIT, X, W, noise=noise, backend="statevector")
    np.testing.assert_allclose(json.loads(said)["values"], right, atol=1e-12)
    assert read_noise((), None) is None
    backend = read_backend("qiskit", ["method=matrix_product_state", "matrix_product_state_max_bond_dimension=4"])
    assert backend.method == "matrix_product_state"
    assert backend.options == {"matrix_product_state_max_bond_dimension": 4}


@pytest.mark.parametrize(
    ("backend", "options", "says"),
    [
        ("qiskit", ["method=matrix_product_state", "matrix_product_state_max_bond_dimension=2"], "dimension 2"),
        ("pennylane", ["device=default.tensor", "max_bond_dim=2"], "bonds of at most 2"),
        ("pennylane", ["device=default.tensor", "cutoff=0.1"], "cutoff 0.1"),
    ],
)
def test_what_a_simulator_truncates_is_not_called_exact(capsys, backend, options, says):
    if backend == "pennylane":
        pytest.importorskip("quimb")
    outcome = run_circuit(CIRCUIT, X, W, backend=read_backend(backend, options))
    assert says in outcome.approximation
    assert outcome.record()["approximation"] == outcome.approximation
    show(outcome, as_json=False)
    said = capsys.readouterr().out
    assert "truncated by an unknown error" in said
    assert "exact" not in said
    assert run_circuit(CIRCUIT, X, W, backend=read_backend(backend, options[:1])).approximation == ""


def test_a_job_that_fails_is_one_sentence():
    class Failing(Apart):
        def compile(self, circuit, *, shots=None, noise=None, seed=None):
            class Compiled:
                differentiable = True

                def __call__(self, x, w):
                    raise JobFailed("out of memory", np.zeros((1, 1, 3)), np.ones((1, 1), dtype=bool))

            return Compiled()

    with pytest.raises(ValueError, match="a job on backend 'apart' did not finish: out of memory"):
        run_circuit(CIRCUIT, X, W, backend=Failing())


class Partly:
    """State vectors whose jobs lose some rows; after one of them nothing else may be asked."""

    name = "partly"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled = load_backend("statevector").compile(circuit, shots=shots, seed=seed)

        class Compiled:
            differentiable = True

            def __call__(own, x, w):
                missing = np.zeros((len(x), 1), dtype=bool)
                missing[1:3] = True
                values = np.where(missing[..., None], np.nan, compiled(x, w).numpy())
                self.compile = None
                raise JobFailed("worker died", values, missing)

        return Compiled()


@pytest.mark.parametrize("shots", [None, 50])
def test_rows_that_finished_are_shown(tmp_path, capsys, monkeypatch, shots):
    monkeypatch.setenv("COLUMNS", "200")
    x = np.array([[0.3, 1.0], [0.1, 0.2], [0.5, 0.5], [1.0, 1.0]])
    found = run_circuit(CIRCUIT, x, W, backend=Partly(), shots=shots, seed=2)
    exact = values_of(CIRCUIT, x, W, backend="statevector")
    there = [0, 3]
    says = "a job on backend 'partly' did not finish: worker died; rows 2 to 3 of 4 have no values, or not all"
    if shots is None:
        np.testing.assert_allclose(found.values[there], exact[there], atol=1e-12)
        assert np.isnan(found.values[1:3]).all()
        assert found.counts is None
    else:
        # The second setting was not run.
        says = says.replace("2 to 3", "1 to 4")
        assert np.isfinite(found.values[there, :2]).all()
        assert np.isnan(found.values[:, 2]).all()
        assert [sum(row.values()) for row in found.counts[0].rows] == [50, 0, 0, 50]
        assert [len(row) for row in found.counts[1].rows] == [0] * 4
    for as_json in (False, True):
        with pytest.raises(ValueError, match="worker died") as failed:
            show(found, as_json=as_json)
        assert str(failed.value) == found.failure == says
        said = capsys.readouterr().out
        if as_json:
            record = json.loads(said)
            assert record["failure"] == says
            assert record["values"][1] == [None] * 3
            assert record["values"][3][0] == found.values[3, 0]
        else:
            assert f"{found.values[3, 0]:+.4f}" in said
            assert said.count("missing") == (6 if shots is None else 8)


GIVEN = ("--input", "0.3,1.0", "--weights", "0.7")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["heisenbrg"], "unknown file or kernel 'heisenbrg': did you mean 'heisenberg'"),
        (["missing.qasm"], "'missing.qasm' cannot be read: No such file"),
        (["FILE", "--wires", "3"], "is a file, which has its own wires"),
        (["binary.qasm"], "binary.qasm is no text"),
        (["old.qasm"], "old.qasm is not read: OpenQASM line 1"),
        (["FILE", "--weights", "1"], "inputs needed: 2, given: 0. Give --input with 2 numbers"),
        (
            ["FILE", "--input", "1,2"],
            "weights needed: 1, given: 0. Give --weights with 1 numbers separated by commas, or",
        ),
        (["FILE", "--input", "1,2,3", "--weights", "1"], "inputs needed in a row: 2, given by --input: 1 row of 3"),
        (["FILE", "--input", "", "--weights", "1"], "given by --input: 0 rows of 0"),
        (["FILE", "--input", "1,b", "--weights", "1"], "--input: '1,b' is no list of inputs"),
        (["FILE", "--input", "nan,1", "--weights", "1"], "inputs of row 1 are [nan, 1.0]: give finite numbers"),
        (["FILE", "--input", "none.npy", "--weights", "1"], "No such file or directory: 'none.npy'"),
        (["FILE", "--input", "text.npy", "--weights", "1"], "text.npy is no .npy file of numbers"),
        (["FILE", "--input", "complex.npy", "--weights", "1"], "complex.npy holds an array of complex128"),
        (
            ["FILE", "--input", "ragged.csv", "--weights", "1"],
            "ragged.csv, line 3 has 1 numbers but the first row has 2",
        ),
        (["FILE", "--input", "words.csv", "--weights", "1"], "words.csv, line 1: 'a,b' is no list of inputs"),
        (["FILE", "--input", "1,2", "--weights", "two.csv"], "--weights gives 2 rows: give one"),
        (["FILE", *GIVEN, "--shots", "0"], "shots is 0: give a whole number of at least 1"),
        (["FILE", *GIVEN, "--backend", "qiskt"], "did you mean 'qiskit'"),
        (["FILE", *GIVEN, "--option", "method"], "--option 'method' is not KEY=VALUE"),
        (["FILE", *GIVEN, "--backend", "fourier", "--option", "x=1"], "backend 'fourier' does not take the options"),
        (["FILE", *GIVEN, "--observables", "ZZ"], "'ZZ' does not fit 3 wires"),
        (["FILE", *GIVEN, "--observables", "ABC"], "readout 'ABC' is no Pauli string of 3 letters"),
        (["FILE", *GIVEN, "--noise", "CNOT"], "--noise 'CNOT' is not GATE:CHANNEL:PROBABILITY"),
        (["FILE", *GIVEN, "--noise", "CNOT:depol:0.1"], "did you mean 'depolarizing'"),
        (["FILE", *GIVEN, "--noise", "CNOT:bit_flip:2"], "probability 2.0: it must lie in [0, 1]"),
        (["FILE", *GIVEN, "--noise", "CNOT:bit_flip:x"], "'x' is no list of probabilities"),
        (["FILE", *GIVEN, "--readout-error", "0.1"], "is not P(1|0),P(0|1)"),
    ],
)
def test_bad_input_is_one_clear_sentence(program, tmp_path, capsys, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.qasm").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "old.qasm").write_text("OPENQASM 2.0;\nqreg q[1];\n")
    (tmp_path / "text.npy").write_text("0.1")
    np.save(tmp_path / "complex.npy", np.array([1j, 2]))
    (tmp_path / "ragged.csv").write_text("1,2\n\n3\n")
    (tmp_path / "words.csv").write_text("a,b\n1,2\n")
    (tmp_path / "two.csv").write_text("1\n2\n")
    code, said, errors = call(capsys, *(program if arg == "FILE" else arg for arg in args))
    assert (code, said) == (2, "")
    assert says in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_root_of_a_named_kernel_is_an_observable(capsys):
    given = ("--input", "0.1,0.2,0.3,0.4", "--weights", "random", "--seed", 3, "--json")
    code, said, _ = call(capsys, "ttn", *given, "--observables", "root")
    assert code == 0
    assert said == call(capsys, "ttn", *given, "--observables", "IIIZ")[1]


def test_what_is_no_tensor_is_said():
    x, w = torch.from_numpy(X), torch.from_numpy(W)
    with pytest.raises(ValueError, match="inputs are a ndarray: give a torch"):
        simulate(CIRCUIT, X, w)
    with pytest.raises(ValueError, match="weights are a list: give a torch"):
        simulate(CIRCUIT, x, [0.7])
