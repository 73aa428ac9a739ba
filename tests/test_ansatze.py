"""Named ansaetze beside gate lists typed from their sources, their formulas and their controls."""

import re
from collections import Counter
from math import pi
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from circuits import Angle, Circuit, Gate, channel_overwrite, kernel, kernel_names, without_entanglement
from circuits.ansatze import ANSATZE, ansatz, ansatz_option_values, ansatz_options
from qconv.diagnostics import states

LINES = [
    line for line in (Path(__file__).parent / "golden/circuits.txt").read_text().splitlines() if line and line[0] != "#"
]


def angle_of(text):
    if "." in text:
        return Angle("const", 0, 1.0, float(text) * pi)
    return Angle("weight", abs(int(text)), -1.0 if text[0] == "-" else 1.0)


def read(line):
    """Arguments of `ansatz`, and the gates that a golden line lists."""
    head, body = line.split(" = ")
    name, wires, depth, *options = head.split()
    values = {"True": True, "False": False}
    chosen = {key: values.get(value, value) for key, value in (option.split("=") for option in options)}
    gates, used = [], 0
    for token in body.split():
        gate, on, angles = re.fullmatch(r"(\w+):(\*|\d+)(?:\((.*)\))?", token).groups()
        for where in [(w,) for w in range(int(wires))] if on == "*" else [tuple(map(int, on))]:
            if angles is None:
                size = {"Rot": 3, "U3": 3, "CRot": 3}.get(gate, 0 if gate in ("H", "X", "CZ", "CNOT") else 1)
                gates.append(Gate(gate, where, tuple(Angle("weight", used + k) for k in range(size))))
                used += size
            else:
                gates.append(Gate(gate, where, tuple(map(angle_of, angles.split(",")))))
    return (name, int(wires), int(depth)), chosen, Circuit(int(wires), tuple(gates))


@pytest.mark.parametrize("line", LINES, ids=[line.split(" = ")[0] for line in LINES])
def test_gates_are_the_sources(line):
    arguments, options, expected = read(line)
    assert ansatz(*arguments, **options).text() == expected.text()


def test_every_kernel_with_a_fixed_structure_has_a_golden_list():
    assert {line.split()[0] for line in LINES} == set(ANSATZE) - {"random", "random_layers", "henderson"}


@pytest.mark.parametrize("name", kernel_names())
def test_weights_are_as_many_as_the_formula_says_and_all_used(name):
    found = ANSATZE[name]
    for wires in range(found.least_wires, 7):
        for depth in (1, 2, 3):
            block = ansatz(name, wires, depth, seed=3)
            used = {a.index for g in block.gates for a in g.angles if a.source == "weight"}
            assert used == set(range(block.n_weights))
            if found.weights:
                assert block.n_weights == eval(found.weights, {"n": wires, "d": depth})


def test_weights_are_the_published_numbers():
    # Blocks of convolutions on 8, 4 and 2 wires, and poolings, of 3 weights each.
    assert ansatz("qiskit_qcnn", 8, 3).n_weights == 3 * (8 + 4 + 2) + 3 * (4 + 2 + 1)
    # A tree of 7 blocks, and 3 + 1 disentanglers.
    assert ansatz("mera", 8, 1).n_weights == 2 * (7 + 3 + 1)
    # Sim et al., on 4 wires.
    counts = [8, 8, 11, 11, 28, 28, 19, 19, 4, 8, 12, 12, 16, 16, 8, 11, 11, 12, 12]
    assert [ansatz(f"sim{k}", 4, 1).n_weights for k in range(1, 20)] == counts
    # Hur, Kim & Park: those of one block, which a layer shares.
    hur = {"ttn": 2, "u9": 2, "u15": 4, "u13": 6, "u14": 6, "so4": 6, "u5": 10, "u6": 10, "su4": 15}
    assert {name: ansatz(f"hur_{name}", 8, 1).n_weights for name in hur} == hur


@pytest.mark.parametrize("name", kernel_names())
def test_control_is_the_same_without_gates_on_several_wires(name):
    full, control = ansatz(name, 4, 2, seed=1), ansatz(name, 4, 2, seed=1, entangle=False)
    assert control.n_weights >= 1
    if not name.startswith("smaldone"):
        kept = [(g.name, g.wires) for g in full.gates if len(g.wires) == 1]
        assert [(g.name, g.wires) for g in control.gates] == kept
    assert (control == full) == (not ANSATZE[name].entangles)
    used = {a.index for g in control.gates for a in g.angles if a.source == "weight"}
    assert used == set(range(control.n_weights))
    assert kernel(name, 4, seed=1, entangle=False).gates[4:] == control.gates


def test_control_keeps_shared_weights_shared():
    w = [Angle("weight", k) for k in range(4)]
    gates = (
        Gate("RY", (0,), (w[3],)),
        Gate("CRX", (0, 1), (w[0],)),
        Gate("RX", (1,), (w[1],)),
        Gate("RX", (0,), (w[3],)),
    )
    control = without_entanglement(Circuit(2, gates, ("ZI",)))
    assert [gate.angles[0].index for gate in control.gates] == [1, 0, 1]
    assert control.observables == ("ZI",)


@pytest.mark.parametrize("name", ["smaldone_u1", "smaldone_u2"])
def test_powers_of_cnot_leave_a_turn_of_their_target(name):
    full, control = ansatz(name, 4, 1), ansatz(name, 4, 1, entangle=False)
    turned = {"smaldone_u1": [1, 2, 3, 0], "smaldone_u2": [1, 3, 2]}[name]
    assert control.gates == tuple(Gate("RX", (wire,), (Angle("weight", k),)) for k, wire in enumerate(turned))
    # Powers of CZ are diagonal: without their control nothing of them is left.
    assert control.n_weights == full.n_weights - [gate.name for gate in full.gates].count("CP") + len(turned)
    # With its control in |1>, the power is that turn.
    w = np.array([0.7])
    power = Circuit(2, (Gate("H", (1,)), Gate("CP", (0, 1), (Angle("weight", 0),)), Gate("H", (1,))), ("IZ", "IY"))
    one = Circuit(2, (Gate("X", (0,)), *power.gates), power.observables)
    alone = Circuit(2, (Gate("X", (0,)), *without_entanglement(power).gates), power.observables)
    np.testing.assert_allclose(oracle.run(one, w[:0], w)[0], oracle.run(alone, w[:0], w)[0], atol=1e-12)


def test_a_control_that_sees_no_feature_is_refused():
    with pytest.raises(ValueError, match=r"reads out the wires \[0\] but .* features are on \[1, 2\]"):
        without_entanglement(channel_overwrite(2, 2))


@pytest.mark.parametrize("number", [13, 14, 15, 18, 19])
def test_rings_of_sim_may_be_exchanged(number):
    copies, exchanged = ansatz(f"sim{number}", 4, 2), ansatz(f"sim{number}", 4, 2, exchanged=True)
    assert [g.wires for g in exchanged.gates] == [g.wires[::-1] for g in copies.gates]
    assert [(g.name, g.angles) for g in exchanged.gates] == [(g.name, g.angles) for g in copies.gates]


@pytest.mark.parametrize(("number", "published"), [(14, 0.6604), (15, 0.8184), (19, 0.5916)])
def test_exchanged_rings_have_the_published_entangling_capability(number, published):
    """The measure of the paper's figures as docs/diagnostics.md has it: halves of the state normalized."""
    found = {}
    for exchanged in (False, True):
        circuit = ansatz(f"sim{number}", 4, 1, exchanged=exchanged)
        weights = (
            2
            * pi
            * torch.rand(4000, circuit.n_weights, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )
        state = states(circuit, weights[:, :0], weights)
        overlaps = []
        for wire in range(4):
            u, v = (torch.nn.functional.normalize(h.flatten(1)) for h in state.reshape(4000, 2**wire, 2, -1).unbind(2))
            overlaps.append((u.conj() * v).sum(1).abs().square())
        measured = 1 - torch.stack(overlaps).mean(0)
        # 5000 samples of the paper's own.
        error = float(measured.std()) * (1 / 4000 + 1 / 5000) ** 0.5
        found[exchanged] = abs(float(measured.mean()) - published) / error
    assert found[True] < 3
    if number != 14:
        assert found[False] > 6


def test_hurs_network_of_eight_wires():
    network = ansatz("hur_qcnn", 8, 3, convolution="hur_ttn", pooling="pooling2")
    # QCNN_circuit.py of takh04/QCNN; what comes before the bar is a convolution, after it a pooling.
    layers = "07 01 23 45 67 12 34 56 | 10 32 54 76", "06 02 46 24 | 20 64", "04 | 04"
    expected = []
    for layer in layers:
        convolution, pooling = layer.split("|")
        expected += [("CNOT", *map(int, pair)) for pair in convolution.split()]
        expected += [("CRZ", *map(int, pair)) for pair in pooling.split()]
    assert [(gate.name, *gate.wires) for gate in network.gates if len(gate.wires) == 2] == expected
    assert network.n_weights == 3 * (2 + 1)


def entanglement(block, seed):
    """Mean linear entropy of the wires of the block's state at random weights."""
    weights = np.random.default_rng(seed).uniform(-pi, pi, block.n_weights)
    n = block.n_wires
    start = tuple(Gate("RY", (wire,), (Angle("const", 0, 1.0, 0.5 + wire),)) for wire in range(n))
    strings = tuple("I" * wire + letter + "I" * (n - wire - 1) for wire in range(n) for letter in "XYZ")
    values, _, _ = oracle.run(Circuit(n, start + block.gates, strings), np.zeros(0), weights)
    return 1 - np.square(values).sum() / n


@pytest.mark.parametrize("name", kernel_names())
def test_entangles_says_whether_states_entangle(name):
    # A random structure may have no gate on two wires: it entangles if it does for some seed.
    most = max(entanglement(ansatz(name, 3, 1, seed=seed), seed) for seed in range(5))
    assert (most > 1e-3) == ANSATZE[name].entangles
    assert abs(entanglement(ansatz(name, 3, 1, seed=5, entangle=False), 0)) < 1e-12


def test_general_block_is_any_unitary():
    # 15 directions: the derivatives of the block span su(4).
    block = ansatz("ttn", 2, 1, block="general")
    weights = np.random.default_rng(0).normal(size=15)
    directions = []
    for k in range(15):
        ends = []
        for shift in (1e-4, -1e-4):
            moved = weights + shift * (np.arange(15) == k)
            total = np.eye(4, dtype=complex)
            for gate in block.gates:
                total = oracle.gate_matrix(gate, [oracle.angle_value(a, None, moved) for a in gate.angles], 2) @ total
            ends.append(total)
        slope = (ends[0] - ends[1]) @ ends[1].conj().T
        directions.append(np.concatenate([slope.real.ravel(), slope.imag.ravel()]) / 2e-4)
    assert np.linalg.matrix_rank(np.array(directions), tol=1e-3) == 15


def test_random_structures_are_their_seeds():
    for name in ("random_layers", "henderson"):
        assert ansatz(name, 4, 2, 7) == ansatz(name, 4, 2, 7)
        assert len({ansatz(name, 4, 2, seed) for seed in range(8)}) == 8


def test_hendersons_numbers_of_gates():
    one_wire, pairs = [], []
    for seed in range(400):
        counts = Counter(len(gate.wires) for gate in ansatz("henderson", 3, 1, seed).gates)
        one_wire.append(counts[1])
        pairs.append(counts[2])
    assert set(one_wire) == set(range(17))  # 0 to 2 * 9 - 2
    # Three pairs, each with probability 0.15: 180 gates, standard deviation 12.4.
    assert abs(sum(pairs) - 180) < 50
    full = ansatz("henderson", 3, 1, 0, connection=1.0)
    assert {frozenset(g.wires) for g in full.gates if len(g.wires) == 2} == {
        frozenset(p) for p in ((0, 1), (0, 2), (1, 2))
    }
    names = {g.name for seed in range(60) for g in ansatz("henderson", 3, 1, seed).gates}
    assert names == {"CU3", "CNOT", "SWAP", "SQSWAP", "RX", "RY", "RZ", "U3", "P", "T", "H"}


def test_one_channel_of_smaldone_in_closed_form():
    circuit = channel_overwrite(1, 2, unitary="u1")
    assert (circuit.n_wires, circuit.n_inputs, circuit.n_weights) == (3, 2, 2)
    x, w = np.array([0.3, 0.45]), np.array([0.8, 1.3])
    (value,), _, _ = oracle.run(circuit, x, w)
    # The first pixel controls only, so it stays 1 with probability sin^2(pi x / 2); then |+> gets the phase w_1.
    one = np.sin(pi * x[0] / 2) ** 2
    assert value == pytest.approx(1 - one * (1 - np.cos(w[1])), abs=1e-12)


def test_channels_of_smaldone_are_undone():
    # Without deposits, a second channel meets the register as it was.
    circuit = channel_overwrite(2, 4, unitary="u2")
    assert (circuit.n_wires, circuit.n_inputs, circuit.n_weights) == (5, 8, 14)
    rng = np.random.default_rng(0)
    deposits = [k for k, g in enumerate(circuit.gates) if g.name == "CP" and g.wires[1] == 0]
    gates = [gate for k, gate in enumerate(circuit.gates) if k not in deposits]
    # What follows the last deposit of the first channel up to its end is the inverse of what came before.
    first = gates[1 : 1 + 2 * (deposits[0] - 1)]
    total = np.eye(32, dtype=complex)
    x, w = rng.normal(size=8), rng.normal(size=14)
    for gate in first:
        total = oracle.gate_matrix(gate, [oracle.angle_value(a, x, w) for a in gate.angles], 5) @ total
    np.testing.assert_allclose(total, np.eye(32), atol=1e-12)


@pytest.mark.parametrize(("registers", "ancillas", "weights"), [(1, 1, 15), (3, 1, 18), (3, 3, 21), (3, 2, 19)])
def test_parallel_channels_of_smaldone(registers, ancillas, weights):
    # Per channel 4 powers and a deposit; between three registers 3; between ancillas one a pair of the ring.
    circuit = channel_overwrite(3, 4, registers=registers, ancillas=ancillas)
    assert circuit.n_weights == weights
    assert circuit.n_wires == ancillas + 4 * registers
    assert circuit.n_inputs == 12
    assert circuit.observables == ("X" + "I" * (circuit.n_wires - 1),)
    touched = {
        gate.wires[1] for gate in circuit.gates if gate.name == "CP" and gate.wires[0] >= ancillas > gate.wires[1]
    }
    assert touched == set(range(ancillas))


def test_pairs_of_parallel_channels_are_the_authors():
    def pairs(**sizes):
        return [gate.wires for gate in channel_overwrite(**sizes).gates if gate.name == "CP"]

    # Inside the registers, between their first wires 3, 5, 7, into the ancillas, between the ancillas.
    three = [(3, 4), (5, 6), (7, 8), (5, 3), (7, 5), (3, 7), (3, 0), (5, 1), (7, 2), (1, 0), (2, 1), (2, 0)]
    assert pairs(channels=3, pixels=2, registers=3, ancillas=3) == three
    # Two registers meet once, the other way around, and share an ancilla.
    assert pairs(channels=2, pixels=2, registers=2) == [(1, 2), (3, 4), (1, 3), (1, 0), (3, 0)]


def test_registers_may_stay_apart():
    apart = channel_overwrite(channels=2, pixels=2, registers=2, couple=False)
    assert [gate.wires for gate in apart.gates if gate.name == "CP"] == [(1, 2), (3, 4), (1, 0), (3, 0)]
    assert channel_overwrite(2, 2, registers=1, couple=False) == channel_overwrite(2, 2, registers=1)


def test_options_are_listed():
    assert ansatz_options("strongly_entangling") == {"ranges": None}
    assert ansatz_options("sim3") == {}
    assert ansatz_options("mera") == {"block": "real", "shared": False}
    assert ansatz_options("hur_u9") == {"shared": True}
    spread = kernel("strongly_entangling", 5, 2, ranges=(2, 4))
    assert [g.wires for g in spread.gates if g.name == "CNOT"][::5] == [(0, 2), (0, 4)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ansatz("sim3", 1), "was given 1 wire: it needs at least 2"),
        (lambda: ansatz("sim20", 4), "did you mean 'sim2"),
        (lambda: kernel("ttn", 4, blok="real"), "option of kernel 'ttn' 'blok': did you mean 'block'"),
        (lambda: kernel("ttn", 4, block="reel"), "did you mean 'real'"),
        (lambda: kernel("sim1", 4, shared=True), "unknown option of kernel 'sim1' 'shared'"),
        (lambda: kernel("strongly_entangling", 4, ranges=(1,)), "depth 2 on 4 wires was given ranges (1,)"),
        (lambda: kernel("strongly_entangling", 4, ranges=(1, 4)), "give 2 of 1 to 3"),
        (lambda: kernel("basic_entangler", 4, rotation="R"), "unknown rotation 'R'"),
        (lambda: kernel("real_amplitudes", 4, entanglement="ful"), "did you mean 'full'"),
        (lambda: kernel("hur_qcnn", 4, convolution="su4"), "unknown convolution 'su4'"),
        (lambda: kernel("hur_qcnn", 4, pooling="pooling4"), "unknown pooling 'pooling4'"),
        (lambda: kernel("henderson", 4, connection=1.5), "connection 1.5"),
        (lambda: kernel("random_layers", 4, ratio=1.0), "ratio 1.0"),
        (lambda: kernel("random_layers", 4, rotations=-1), "rotations -1: give a whole number of at least 1"),
        (lambda: channel_overwrite(3, 4, registers=2), "3 channels of 4 pixels, 2 registers"),
        (lambda: channel_overwrite(2, 4, unitary="u3"), "unknown unitary 'u3'"),
        (lambda: channel_overwrite(2, 4, registers="2"), "give at least one of each"),
        (lambda: kernel("sim1", "4"), "was given '4' wires and depth 2: both must be whole numbers"),
        (lambda: kernel("sim1", 2.0), "was given 2.0 wires"),
        (lambda: kernel("sim1", 4, "2"), "wires and depth '2'"),
        (lambda: kernel("sim2", 4, entangle="no"), "was given entangle='no': give True or False"),
        (lambda: kernel("sim2", 4, reupload="no"), "was given reupload='no': give True or False"),
        (lambda: kernel("random", 4, seed=-1), "was given seed -1: give a whole number of at least 0"),
        (lambda: kernel("sim2", 4, seed=-1), "was given seed -1"),
        (lambda: kernel("random_layers", 4, rotations=["RX"]), "rotations ['RX']: give a whole number"),
        (lambda: kernel("random_layers", 4, ratio="0.3"), "ratio '0.3': give a number of 0 to below 1"),
        (lambda: kernel("hur_u9", 4, shared="no"), "shared 'no': give true or false"),
        (lambda: kernel("ttn", 4, block=["real"]), "block ['real']: give real, complex, general"),
        (lambda: kernel("strongly_entangling", 4, ranges=2), "ranges 2: give a list of whole numbers"),
        (lambda: kernel("efficient_su2", 4, entanglement=[(0, 4)]), "the pair (0, 4): give two different wires of 0"),
        (lambda: kernel("efficient_su2", 4, entanglement=[1, 2]), "entanglement [1, 2]: give reverse_linear, linear"),
    ],
)
def test_errors_say_what_to_do(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_every_option_says_what_it_takes_and_takes_its_default():
    for name in kernel_names():
        defaults = ansatz_options(name)
        assert ansatz_option_values(name).keys() == defaults.keys()
        defaults.pop("seed", None)
        assert kernel(name, 4, 2, **defaults) == kernel(name, 4, 2)
    assert ansatz_option_values("ttn")["block"].startswith("real, complex, general: ")


def test_lists_are_options_as_tuples_are():
    assert kernel("strongly_entangling", 4, ranges=[1, 3]) == kernel("strongly_entangling", 4, ranges=(1, 3))


@pytest.mark.parametrize("pairs", [[(0, 1), (2, 3)], [[0, 1], [2, 3]]])
def test_pairs_of_wires_are_an_entanglement_as_in_qiskit(pairs):
    library = pytest.importorskip("qiskit.circuit.library")
    ours = kernel("efficient_su2", 4, 2, entanglement=pairs)
    theirs = library.efficient_su2(4, reps=2, entanglement=pairs)
    found = [tuple(theirs.find_bit(q).index for q in each.qubits) for each in theirs.data if each.name == "cx"]
    assert [gate.wires for gate in ours.gates if gate.name == "CNOT"] == found


QCNNS = ("hur_qcnn", "cong_qcnn", "cirq_qcnn", "qiskit_qcnn")


def read_wires(circuit):
    assert all(text.count("Z") == 1 and set(text) <= set("IZ") for text in circuit.observables)
    return {text.index("Z") for text in circuit.observables}


@pytest.mark.parametrize("wires", [3, 5, 7, 8])
@pytest.mark.parametrize("name", QCNNS)
def test_the_root_is_what_the_next_layer_works_on(name, wires):
    for depth in (1, 2, 3):
        root = read_wires(kernel(name, wires, depth, readout="root"))
        before, after = ansatz(name, wires, depth), ansatz(name, wires, depth + 1)
        assert after.gates[: len(before.gates)] == before.gates
        later = {wire for gate in after.gates[len(before.gates) :] for wire in gate.wires}
        assert later == (root if len(root) > 1 else set())
        # The pooling before it sends something to each wire that is left.
        assert root <= {wire for gate in before.gates for wire in gate.wires}


@pytest.mark.parametrize(
    ("name", "root"), [("hur_qcnn", 4), ("cong_qcnn", 0), ("cirq_qcnn", 7), ("qiskit_qcnn", 7), ("ttn", 7), ("mera", 7)]
)
def test_the_root_of_eight_wires(name, root):
    assert read_wires(kernel(name, 8, 3, readout="root")) == {root}
    assert read_wires(kernel(name, 8, 3)) == set(range(8))
    assert read_wires(kernel(name, 8, 3, readout="root", entangle=False)) == {root}


@pytest.mark.parametrize("name", ["ttn", "mera"])
@pytest.mark.parametrize("wires", [2, 5, 6])
def test_every_weight_and_feature_of_a_tree_reaches_its_root(name, wires):
    circuit = kernel(name, wires, 1, readout="root", block="complex")
    rng = np.random.default_rng(1)
    _, by_input, by_weight = oracle.run(circuit, rng.random(wires), rng.random(circuit.n_weights))
    assert circuit.observables == ("I" * (wires - 1) + "Z",)
    assert (np.abs(by_weight) > 1e-6).all()
    assert (np.abs(by_input) > 1e-6).all()


def test_uploads_between_layers_make_each_a_network_of_its_own():
    assert read_wires(kernel("hur_qcnn", 8, 3, readout="root", reupload=True)) == {0, 2, 4, 6}


def test_a_root_is_asked_of_kernels_that_have_one():
    with pytest.raises(ValueError, match="'sim3' discards none: give 'z', or one of the kernels hur_qcnn, cong_qcnn"):
        kernel("sim3", 4, readout="root")
