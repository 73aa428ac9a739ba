"""The list of kernels, on the command line and in training."""

import json

import numpy as np
import oracle
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from circuits import channel_overwrite, encoding_names, kernel, kernel_names, readout_names
from qconv import QuantumConv2d
from qconv.channels import CHANNELS
from qconv.cli import main
from qconv.kernel_checks import Check, summary, unitary_of
from qconv.kernel_list import kernel_rows


def call(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main([*args])
    done = capsys.readouterr()
    return ended.value.code, done.out, done.err


def test_kernels_are_listed_with_sizes_and_sources(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = call(capsys, "kernels")
    assert code == 0
    shown = [line.split()[1] for line in said.splitlines() if line.startswith("│") and line.split()[1] != "│"]
    assert shown == list(kernel_names())
    assert "Circuit-centric quantum classifiers" in said
    assert "3*n*d" in said
    assert "Options: block='real', shared=False" in said
    for names in (encoding_names(), readout_names(), CHANNELS):
        assert ", ".join(names) in " ".join(said.split())


def test_one_kernel_is_listed_with_what_its_options_take(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = call(capsys, "kernels", "hur_qcnn", "--wires", "8", "--depth", "3")
    assert code == 0
    assert "Of the 8 wires it leaves wire 4, which readout root reads" in " ".join(said.split())
    assert "pooling='pooling1': pooling1, pooling2, pooling3: the pooling's block" in said
    assert "sim2" not in said
    assert "sim1 takes no options besides" in call(capsys, "kernels", "sim1")[1]
    code, said, _ = call(capsys, "kernels", "ttn", "--json")
    (row,) = json.loads(said)
    assert (row["name"], row["root"], list(row["takes"])) == ("ttn", [3], ["block", "shared"])
    code, _, errors = call(capsys, "kernels", "ttm")
    assert code == 2
    assert "did you mean 'ttn'" in errors


def test_kernels_as_json(capsys):
    code, said, _ = call(capsys, "kernels", "--json", "--wires", "3", "--depth", "1", "--seed", "4")
    rows = {row["name"]: row for row in json.loads(said)}
    assert code == 0
    assert list(rows) == list(kernel_names())
    for name, row in rows.items():
        block = kernel(name, 3, 1, seed=4)
        assert (row["wires"], row["weights"]) == (3, block.n_weights)
        # Three gates encode the patch.
        assert sum(row["gates"].values()) == len(block.gates) - 3
        assert len(row["citation"]) > 20
    assert rows["sim2"]["gates"] == {"CNOT": 2, "RX": 3, "RZ": 3}
    assert rows["sim2"]["depth"] == 4
    assert rows["ttn"]["options"] == {"block": "real", "shared": False}
    assert (rows["product"]["entangles"], rows["sim2"]["entangles"]) == (False, True)


def test_check_compares_all_and_says_so(capsys, monkeypatch):
    pytest.importorskip("pennylane")
    pytest.importorskip("qiskit")
    monkeypatch.setenv("COLUMNS", "140")
    code, said, _ = call(capsys, "kernels", "--check", "--wires", "2", "--depth", "1")
    assert code == 0
    assert "StronglyEntanglingLayers" in said
    assert "all agree" in said
    # What only passes through a translator is told from what a peer defines itself.
    assert f"{len(kernel_names())} translated for pennylane" in " ".join(said.split())
    assert "qiskit's own templates" in " ".join(said.split())
    code, said, _ = call(capsys, "kernels", "--check", "--json", "--wires", "2", "--depth", "1")
    checks = json.loads(said)
    assert code == 0
    assert {check["name"] for check in checks} == {*kernel_names(), "encoding zz", "encoding iqp"}
    own = {check["name"]: check["what"] for check in checks if check["what"] != "translated"}
    assert own["hardware_efficient"] == "n_local"
    assert (own["encoding zz"], own["encoding iqp"]) == ("zz_feature_map", "IQPEmbedding")
    assert all(check["passed"] and check["deviation"] < 1e-10 for check in checks)


def test_a_kernel_that_differs_fails_the_check(capsys, monkeypatch):
    wrong = [Check("sim3", "qiskit", "translated", 0.3), Check("sim3", "pennylane", "translated", 1e-15)]
    monkeypatch.setattr("qconv.kernel_list.check_kernels", lambda *sizes: iter(wrong))
    code, said, _ = call(capsys, "kernels", "--check")
    assert code == 1
    assert "3.0e-01 DIFFERS" in said
    assert "these differ: sim3 (qiskit)." in said
    assert summary([]) == "Nothing was compared: neither PennyLane nor Qiskit is installed."


def test_unitary_is_the_circuits():
    block = kernel("hur_qcnn", 3, 2, readout=["ZII", "IXY"])
    encoded = tuple(gate for gate in block.gates if not gate.depends_on("input"))
    weights = np.random.default_rng(0).normal(size=block.n_weights)
    state = unitary_of(type(block)(3, encoded), weights)[:, 0]
    values, _, _ = oracle.run(block, np.zeros(3), weights)
    np.testing.assert_allclose(np.vdot(state, oracle.pauli_string("ZII") @ state).real, values[0], atol=1e-12)
    np.testing.assert_allclose(np.vdot(state, oracle.pauli_string("IXY") @ state).real, values[1], atol=1e-12)


def test_rows_do_not_depend_on_the_console():
    assert [row.name for row in kernel_rows(2, 1)] == list(kernel_names())


def digits(count):
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images[:count] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.as_tensor(
        labels[:count]
    )


def trained(layer, images, labels):
    """First and last loss of a few steps; weights that matter have had a slope."""
    with torch.no_grad():
        head = nn.Sequential(nn.Flatten(), nn.Linear(layer(images)[0].numel(), 10))
    # The head stays as it was drawn: alone it would bring the loss down with any features.
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    slopes = torch.zeros_like(layer.weight)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(layer(images)), labels)
        loss.backward()
        slopes = slopes.maximum(layer.weight.grad.abs())
        optimizer.step()
        losses.append(loss.item())
    # No weight is stuck where it started.
    assert not ((slopes < 1e-7) & matters(layer, images)).any()
    return losses[0], losses[-1]


@pytest.mark.parametrize("as_circuit", [False, True], ids=["by name", "as a circuit"])
@pytest.mark.parametrize("name", kernel_names())
def test_every_kernel_trains(name, as_circuit):
    torch.manual_seed(0)
    chosen = kernel(name, 4) if as_circuit else name
    layer = QuantumConv2d(1, 4, 2, stride=2, kernel=chosen, backend="statevector")
    first, last = trained(layer, *digits(48))
    assert last < first - 1e-3


@pytest.mark.parametrize("unitary", ["u1", "u2"])
def test_channels_gathered_in_an_ancilla_train_as_a_circuit(unitary):
    torch.manual_seed(0)
    circuit = channel_overwrite(3, 4, unitary=unitary)
    layer = QuantumConv2d(3, 2, 2, stride=2, kernel=circuit, backend="statevector")
    images, labels = digits(24)
    first, last = trained(layer, images * torch.tensor([1.0, 0.5, 0.2])[:, None, None], labels)
    assert last < first - 1e-3


def test_named_kernels_still_start_as_product_kernels_and_others_do_not():
    named, own = QuantumConv2d(1, 4, 2, kernel="sim4"), QuantumConv2d(1, 4, 2, kernel=kernel("sim4", 4))
    entangling = sorted(a.index for g in named.circuit.gates if len(g.wires) == 2 for a in g.angles)
    assert (named.weight[:, entangling] == 0).all()
    assert float(own.weight[:, entangling].detach().abs().min()) > 0
    assert float(own.weight.detach().abs().max()) < 1


def matters(layer, images):
    """Weights with a slope somewhere: the last ones before the readout may have none anywhere."""
    generator = torch.Generator().manual_seed(1)
    result = torch.zeros_like(layer.weight)
    for _ in range(3):
        with torch.no_grad():
            layer.weight.copy_(6.28 * torch.rand(layer.weight.shape, generator=generator))
        out = layer(images[:4])
        (slope,) = torch.autograd.grad((out * torch.randn(out.shape, generator=generator)).sum(), layer.weight)
        result = result.maximum(slope.abs())
    return result > 1e-4
