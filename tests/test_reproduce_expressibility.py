"""The table of Sim's circuits: its order is the paper's, and what its columns are."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from circuits.ansatze import ansatz
from qconv.diagnostics import meyer_wallach, states

SCRIPTS = Path(__file__).parents[1] / "examples" / "reproduce"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "expressibility", raising=False)
    return importlib.import_module("expressibility")


def test_order_of_one_layer_is_the_papers(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expressibility.py", "--layers", "1", "--samples", "2000"])
    assert script.main() == 0
    said = capsys.readouterr().out
    rows = [line.strip("|").split("|") for line in said.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 20))
    assert [float(row[3]) for row in rows] == list(script.EXPRESSIBILITY[1])
    assert [float(row[7]) for row in rows] == list(script.ENTANGLING[1])
    for row in rows:
        low, high = map(float, row[2].split("to"))
        assert low <= high
    ranks = {name: float(rank) for name, rank in re.findall(r"Order of the ([a-z ]+) and .*Spearman ([0-9.]+)", said)}
    assert list(ranks) == ["divergence", "entangling capability", "halves normalized"]
    assert min(ranks.values()) > 0.95
    # The paper's figures of the entangling capability are those of normalized halves.
    assert ranks["halves normalized"] > 0.99
    assert int(re.search(r"(\d+) of 19 lie within 3 standard errors", said)[1]) >= 17


def test_layers_that_the_paper_is_not_known_for_have_no_order(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expressibility.py", "--layers", "2", "--samples", "20"])
    assert script.main() == 0
    said = capsys.readouterr().out
    assert "## 2 layers" in said
    assert "Spearman" not in said
    monkeypatch.setattr(sys, "argv", ["expressibility.py", "--layers", "0"])
    assert script.main() == 2
    assert "layers are [0]" in capsys.readouterr().err


def test_halves_are_normalized(script):
    # Of two wires, one turned by a and one entangled with it by a controlled phase.
    circuit = ansatz("sim3", 2, 1)
    mean, _ = script.normalized_halves(circuit, 500, 3)
    weights = 2 * torch.pi * torch.rand(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = states(circuit, weights[:, :0], weights)
    ones = found.abs().square().reshape(500, 2, 2)
    wires = []
    for axis in (2, 1):
        share = ones.sum(axis)
        # For two wires both have the same determinant of their density matrix, Q/4.
        wires.append(meyer_wallach(found) / (4 * share[:, 0] * share[:, 1]))
    assert mean == pytest.approx(float(torch.stack(wires).mean()), abs=1e-9)
