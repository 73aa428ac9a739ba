"""Noise as data, and exact noisy values of every backend against dense density matrices."""

from functools import reduce

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from circuits import Channel, Circuit, Gate, KrausChannel, NoiseModel, ReadoutError, ThermalRelaxation, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends import density
from qconv.testing import check_layer

NAMES = ("depolarizing", "bit_flip", "phase_flip", "amplitude_damping", "phase_damping")
# Not symmetric under an exchange of the wires, and not unital.
SWAPPED = [np.sqrt(0.8) * np.eye(4), np.sqrt(0.2) * np.array([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1j, 0, 0], [0, 0, 1, 0]])]
COOLED = ThermalRelaxation(50e-6, 70e-6, 10e-6, 0.2)
READOUT = {0: ReadoutError(0.02, 0.1), 2: ReadoutError(0.05, 0.0)}
NOISE = NoiseModel(
    (
        ("CNOT", KrausChannel(SWAPPED)),
        ("CNOT", Channel("depolarizing", 0.05), (1, 2)),
        ("*", COOLED),
        ("RY", Channel("amplitude_damping", 0.1), (1,)),
        ("CNOT", KrausChannel(SWAPPED[::-1]), (0, 1)),
    ),
    readout=READOUT,
)


def relaxed(rho, n, wire, channel):
    """Thermal relaxation by what it does to populations and coherences, without Kraus operators."""
    blocks = np.moveaxis(rho.reshape((2,) * (2 * n)), (wire, n + wire), (0, 1))
    reset, coherence = 1 - np.exp(-channel.duration / channel.t1), np.exp(-channel.duration / channel.t2)
    up, down = channel.excited_population * reset, (1 - channel.excited_population) * reset
    zero, one = blocks[0, 0], blocks[1, 1]
    new = np.array([[zero * (1 - up) + one * down, coherence * blocks[0, 1]],
                    [coherence * blocks[1, 0], one * (1 - down) + zero * up]])  # fmt: skip
    return np.moveaxis(new, (0, 1), (wire, n + wire)).reshape(rho.shape)


def on_two(operator, wires, n):
    """A matrix on two wires as a sum of products of matrix units."""
    result = 0
    for i in range(4):
        for j in range(4):
            units = []
            for a, b in ((i >> 1, j >> 1), (i & 1, j & 1)):
                unit = np.zeros((2, 2))
                unit[a, b] = 1
                units.append(unit)
            result = result + operator[i, j] * oracle.on_wires(dict(zip(wires, units, strict=True)), n)
    return result


def acted(rho, n, wires, channel):
    if isinstance(channel, ThermalRelaxation):
        return relaxed(rho, n, wires[0], channel)
    if isinstance(channel, Channel):
        operators = [oracle.on_wires({wires[0]: k}, n) for k in oracle.kraus_of(channel)]
    elif len(channel.operators[0]) == 2:
        operators = [oracle.on_wires({wires[0]: np.array(k)}, n) for k in channel.operators]
    else:
        operators = [on_two(np.array(k), wires, n) for k in channel.operators]
    return sum(k @ rho @ k.conj().T for k in operators)


def final_density(circuit, x, w, noise):
    n = circuit.n_wires
    rho = np.zeros((2**n, 2**n), dtype=complex)
    rho[0, 0] = 1
    for gate in circuit.gates:
        values = [oracle.angle_value(angle, x, w) for angle in gate.angles]
        if gate.name == "Amplitude":
            state = np.zeros(2**n)
            state[: len(values)] = values / np.linalg.norm(values)
            rho = np.outer(state, state).astype(complex)
            continue
        matrix = oracle.gate_matrix(gate, values, n)
        rho = matrix @ rho @ matrix.conj().T
        for name, channel, *among in noise.after:
            if name not in ("*", gate.name):
                continue
            double = isinstance(channel, KrausChannel) and len(channel.operators[0]) == 4
            for wires in [gate.wires] if double else [(wire,) for wire in gate.wires]:
                if not among or set(wires) <= set(among[0]):
                    rho = acted(rho, n, wires, channel)
    return rho


HADAMARD = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
TURNS = {"I": np.eye(2), "Z": np.eye(2), "X": HADAMARD, "Y": HADAMARD @ np.diag([1, -1j])}


def misread(rho, observable, noise):
    """Mean of the measured value: turn, measure all bits, misread each, multiply signs."""
    n = len(observable)
    turn = reduce(np.kron, [TURNS[letter] for letter in observable])
    probabilities = np.real(np.diag(turn @ rho @ turn.conj().T)).reshape((2,) * n)
    for wire in range(n):
        error = dict(noise.readout or ()).get(wire)
        if error is not None:
            table = np.array([[1 - error.p1_given_0, error.p0_given_1], [error.p1_given_0, 1 - error.p0_given_1]])
            probabilities = np.moveaxis(np.tensordot(table, probabilities, (1, wire)), 0, wire)
    signs = reduce(np.kron, [np.array([1, 1]) if letter == "I" else np.array([1, -1]) for letter in observable])
    return probabilities.ravel() @ signs


def dense(circuit, x, w, noise):
    rows = [[final_density(circuit, p.double().numpy(), f.double().numpy(), noise) for f in w] for p in x]
    return np.array([[[misread(rho, o, noise) for o in circuit.observables] for rho in row] for row in rows])


def draw_numbers(circuit, patches=3, filters=2, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


MIXED = ["ZII", "XYI", "IIZ", "ZZX"]
REUPLOAD = kernel("strongly_entangling", 3, 1, readout=MIXED)
CIRCUITS = {
    "angle": kernel("strongly_entangling", 3, readout=MIXED),
    "amplitude": kernel("strongly_entangling", 3, encoding="amplitude", readout=MIXED),
    "re-uploading": REUPLOAD + REUPLOAD.shift_weights(REUPLOAD.n_weights),
}
BACKENDS = {
    "fourier": lambda: load_backend("fourier"),
    "statevector": lambda: load_backend("statevector"),
    "aer": lambda: load_backend("qiskit"),
    "default.mixed": lambda: load_backend("pennylane", device="default.mixed"),
}


@pytest.mark.parametrize("case", CIRCUITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_noise_agrees_with_dense_density_matrices(backend, case):
    circuit = CIRCUITS[case]
    if backend == "fourier" and case == "re-uploading":
        pytest.skip("fourier takes no re-uploading")
    x, w = draw_numbers(circuit)
    want = dense(circuit, x, w, NOISE)
    assert np.abs(want - simulate(circuit, x, w, backend="statevector").numpy()).max() > 0.1
    got = simulate(circuit, x, w, backend=BACKENDS[backend](), noise=NOISE)
    np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("case", CIRCUITS)
@pytest.mark.parametrize("backend", ["fourier", "statevector"])
def test_float32_noise_is_within_a_millionth(backend, case):
    circuit = CIRCUITS[case]
    if backend == "fourier" and case == "re-uploading":
        pytest.skip("fourier takes no re-uploading")
    x, w = draw_numbers(circuit, dtype=torch.float32)
    got = simulate(circuit, x, w, backend=backend, noise=NOISE)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, dense(circuit, x, w, NOISE), atol=1e-6)


@st.composite
def noises(draw, n):
    p = st.floats(0, 1)
    one = st.one_of(
        st.builds(Channel, st.sampled_from(NAMES), p),
        st.builds(lambda t1, share, t, e: ThermalRelaxation(t1, share * t1, t, e), st.floats(0.1, 9),
                  st.floats(0.01, 2), st.floats(0, 5), p),
    )  # fmt: skip
    wires = st.sets(st.integers(0, n - 1), min_size=1).map(tuple)
    entries = [draw(st.tuples(st.sampled_from(["*", "RY", "CNOT", "H", "CRot", "CCX"]), one)) for _ in range(2)]
    entries.append((*draw(st.tuples(st.just("*"), one)), draw(wires)))
    entries.append((draw(st.sampled_from(["CNOT", "CRX", "RZZ", "SWAP"])), KrausChannel(SWAPPED)))
    return NoiseModel(entries, readout={wire: ReadoutError(draw(p), draw(p)) for wire in draw(wires)})


@pytest.mark.parametrize("patches", [2, 9])
@settings(max_examples=25)
@given(data=st.data())
def test_statevector_with_any_noise_is_the_density_matrix(data, patches):
    circuit = data.draw(circuits())
    noise = data.draw(noises(circuit.n_wires))
    x, w = draw_numbers(circuit, patches=patches)
    np.testing.assert_allclose(
        simulate(circuit, x, w, backend="statevector", noise=noise), dense(circuit, x, w, noise), atol=1e-10
    )


@settings(max_examples=15)
@given(data=st.data())
def test_fourier_with_any_noise_is_the_density_matrix(data):
    circuit = data.draw(circuits(product_encoding=True))
    noise = data.draw(noises(circuit.n_wires))
    x, w = draw_numbers(circuit)
    np.testing.assert_allclose(
        simulate(circuit, x, w, backend="fourier", noise=noise), dense(circuit, x, w, noise), atol=1e-10
    )


def test_trains_and_compiled_convolutions_misread_bits_too():
    # Eight wires are a tensor train, and a layer of four runs in compiled loops where those are installed.
    noise = NoiseModel((("CNOT", Channel("bit_flip", 0.05)),), readout=ReadoutError(0.02, 0.1))
    circuit = kernel("strongly_entangling", 8, 1, readout=["ZIIIIIII", "IIIXYIII"])
    x, w = draw_numbers(circuit)
    fourier, states = (simulate(circuit, x, w, backend=b, noise=noise) for b in ("fourier", "statevector"))
    torch.testing.assert_close(fourier, states, atol=1e-12, rtol=0)
    images = torch.rand(3, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for backend in ("auto", "statevector"):
        layer = QuantumConv2d(1, 4, 2, kernel="strongly_entangling", backend=backend, noise=noise, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-2, 2, layer.weight.numel()).reshape(layer.weight.shape))
            outputs.append(layer(images))
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("patches", [2, 9])
@pytest.mark.parametrize("case", CIRCUITS)
def test_noisy_gradients_are_the_oracles_differences(case, patches):
    circuit = CIRCUITS[case]
    x, w = draw_numbers(circuit, patches=patches, filters=1)
    factors = torch.linspace(0.5, 1.5, patches * len(MIXED), dtype=torch.float64).reshape(patches, 1, -1)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    (simulate(circuit, a, b, backend="statevector", noise=NOISE) * factors).sum().backward()
    step = 1e-5
    rng = np.random.default_rng(0)
    for row, k in [(int(rng.integers(patches)), int(rng.integers(circuit.n_inputs))) for _ in range(3)]:
        ends = []
        for sign in (1, -1):
            moved = x[row : row + 1].clone()
            moved[0, k] += sign * step
            ends.append((dense(circuit, moved, w, NOISE) * factors[row].numpy()).sum())
        assert float(a.grad[row, k]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)
    for k in rng.choice(circuit.n_weights, 3, replace=False):
        ends = []
        for sign in (1, -1):
            moved = w.clone()
            moved[0, k] += sign * step
            ends.append((dense(circuit, x, moved, NOISE) * factors.numpy()).sum())
        assert float(b.grad[0, k]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


def test_density_matrices_in_chunks_have_the_same_values_and_gradients(monkeypatch):
    circuit = CIRCUITS["re-uploading"]
    results = []
    for numbers in (density.CHUNK_NUMBERS, 4**3 * 2 * 5):
        monkeypatch.setattr(density, "CHUNK_NUMBERS", numbers)
        x, w = (t.requires_grad_() for t in draw_numbers(circuit, patches=13))
        values = simulate(circuit, x, w, backend="statevector", noise=NOISE)
        results.append([values.detach(), *torch.autograd.grad(values.square().sum(), (x, w))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_a_noisy_layer_of_states_is_a_layer():
    circuit = CIRCUITS["re-uploading"]
    layer = QuantumConv2d(1, 4, (1, 3), kernel=circuit, backend="statevector", noise=NOISE, dtype=torch.float64)
    check_layer(layer, 1, atol=1e-10)


@pytest.mark.parametrize("t2", [20e-6, 50e-6, 90e-6, 100e-6])
@pytest.mark.parametrize("excited", [0.0, 0.3, 1.0])
def test_thermal_relaxation_is_its_closed_form_and_the_peers(t2, excited):
    channel = ThermalRelaxation(50e-6, t2, 15e-6, excited)
    rng = np.random.default_rng(1)
    m = rng.normal(size=(2, 2)) + 1j * rng.normal(size=(2, 2))
    rho = m @ m.conj().T / np.trace(m @ m.conj().T)
    operators = channel.kraus()
    np.testing.assert_allclose(sum(k.conj().T @ k for k in operators), np.eye(2), atol=1e-15)
    got = sum(k @ rho @ k.conj().T for k in operators)
    np.testing.assert_allclose(got, relaxed(rho, 1, 0, channel), atol=1e-15)
    noise = pytest.importorskip("qiskit_aer.noise")
    info = pytest.importorskip("qiskit.quantum_info")
    theirs = info.SuperOp(noise.thermal_relaxation_error(50e-6, t2, 15e-6, excited)).data
    np.testing.assert_allclose(info.SuperOp(info.Kraus(list(operators))).data, theirs, atol=1e-14)
    qml = pytest.importorskip("pennylane")
    matrices = qml.ThermalRelaxationError(excited, 50e-6, t2, 15e-6, wires=0).kraus_matrices()
    np.testing.assert_allclose(got, sum(k @ rho @ k.conj().T for k in matrices), atol=1e-7)


def test_relaxation_forever_is_the_equilibrium():
    noise = NoiseModel((("H", ThermalRelaxation(1.0, 1.0, 1e3, 0.25)),))
    circuit = Circuit(1, (Gate("H", (0,)),), ("Z", "X"))
    values = simulate(circuit, torch.zeros(1, 0), torch.zeros(0), backend="statevector", noise=noise)
    torch.testing.assert_close(values, torch.tensor([[0.5, 0.0]]))


def test_a_channel_acts_on_the_wires_that_are_named():
    cnot, ry = Gate("CNOT", (2, 1)), Gate("RY", (1,), kernel("product", 2).gates[0].angles)
    flip, pair = Channel("bit_flip", 0.1), KrausChannel(SWAPPED)
    noise = NoiseModel([("*", flip, [1]), ("CNOT", pair), ("CNOT", pair, (0, 1)), ("CNOT", pair, (1, 2)), ("RY", flip)])
    assert noise.channels_after(cnot) == ((flip, (1,)), (pair, (2, 1)), (pair, (2, 1)))
    assert noise.channels_after(ry) == ((flip, (1,)), (flip, (1,)))
    assert noise.channels_after(kernel("product", 2, encoding="amplitude").gates[0]) == ()


def test_misread_observables_are_sums_of_pauli_strings():
    noise = NoiseModel(readout={0: ReadoutError(0.1, 0.3), 2: ReadoutError(0.2, 0.2)})
    got = noise.measured("XIZ")
    assert got == {"XIZ": pytest.approx(0.6 * 0.6), "IIZ": pytest.approx(0.2 * 0.6)}
    assert noise.measured("IYI") == {"IYI": 1.0}
    everywhere = NoiseModel(readout=ReadoutError(0.0, 0.5))
    assert everywhere.measured("ZZ") == {"ZZ": 0.25, "ZI": 0.25, "IZ": 0.25, "II": 0.25}
    np.testing.assert_array_equal(ReadoutError(0.1, 0.3).confusion(), [[0.9, 0.3], [0.1, 0.7]])


def test_noise_models_are_values():
    again = NoiseModel(
        (
            ["CNOT", KrausChannel(np.array(SWAPPED))],
            ["CNOT", Channel("depolarizing", 0.05), [1, 2]],
            ["*", ThermalRelaxation(50e-6, 70e-6, 10e-6, 0.2)],
            ["RY", Channel("amplitude_damping", 0.1), (1,)],
            ["CNOT", KrausChannel([k.tolist() for k in SWAPPED[::-1]]), (0, 1)],
        ),
        readout=dict(reversed(READOUT.items())),
    )
    assert again == NOISE
    assert hash(again) == hash(NOISE)
    # Compiled code is found again by this text: it has every digit.
    assert repr(again) == repr(NOISE)
    assert repr(NoiseModel((("X", Channel("bit_flip", 0.1 + 1e-16)),))) != repr(
        NoiseModel((("X", Channel("bit_flip", 0.1 + 5e-16)),))
    )


LEAKY = [np.diag([1.0, 0.9])]
WIDE = kernel("heisenberg", 12)
SMALL = Circuit(1, (Gate("X", (0,)),), ("Z",))
NO = torch.zeros(1, 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KrausChannel(LEAKY), "sum of K^+ K differs from the identity by up to 0.19"),
        (lambda: KrausChannel([]), "have shape (0,)"),
        (lambda: KrausChannel([np.eye(3)]), "have shape (1, 3, 3)"),
        (lambda: KrausChannel([np.eye(2), np.eye(4)]), "no matrices of one shape"),
        (lambda: KrausChannel([np.eye(2) * np.nan]), "not finite"),
        (lambda: Channel("bit_flip", 1.2), "probability 1.2: it must lie in [0, 1]"),
        (lambda: Channel("bit_flip", -0.1), "probability -0.1"),
        (lambda: Channel("bit_flip", float("nan")), "probability nan"),
        (lambda: Channel("bitflip", 0.1), "did you mean 'bit_flip'"),
        (lambda: ThermalRelaxation(50e-6, 101e-6, 1e-6), "t2 is 0.000101 s but t1 is 5e-05 s"),
        (lambda: ThermalRelaxation(0, 1, 1), "t1 is 0"),
        (lambda: ThermalRelaxation(1, -1, 1), "t2 is -1"),
        (lambda: ThermalRelaxation(1, 1, -1), "duration is -1"),
        (lambda: ThermalRelaxation(1, 1, 1, 1.5), "excited_population is 1.5"),
        (lambda: ReadoutError(1.1, 0), "p1_given_0 1.1"),
        (lambda: ReadoutError(0, -1), "p0_given_1 -1"),
        (NoiseModel, "0 channels and no readout error"),
        (lambda: NoiseModel((("X", 0.1),)), "noise after X is 0.1"),
        (lambda: NoiseModel((("CNOT",),)), "give (gate, channel) or (gate, channel, wires)"),
        (lambda: NoiseModel((("RY", KrausChannel(SWAPPED)),)), "follows RY, which acts on 1 wires"),
        (lambda: NoiseModel((("*", KrausChannel(SWAPPED)),)), "name a gate on 2 wires"),
        (lambda: NoiseModel((("X", COOLED, ()),)), "names the wires ()"),
        (lambda: NoiseModel((("X", COOLED, (-1,)),)), "names the wires (-1,)"),
        (lambda: NoiseModel(readout=0.1), "readout is 0.1"),
        (lambda: NoiseModel(readout={0: 0.1}), "readout of wire 0 is 0.1"),
        (lambda: NoiseModel(readout={"a": ReadoutError(0, 0)}), "names the wires ('a',)"),
        *(
            (lambda b=b: simulate(SMALL, NO, NO, backend=b, noise=NoiseModel((("X", COOLED, (0, 3)),))), "names wire 3")
            for b in ("fourier", "statevector", "qiskit")
        ),
        (
            lambda: load_backend("statevector").compile(SMALL, noise=NoiseModel(readout={1: ReadoutError(0, 0)})),
            "names wire 1 but the circuit has wires 0 to 0",
        ),
        (
            lambda: load_backend("statevector").compile(WIDE, noise=NoiseModel((("*", COOLED),))),
            "67,108,864 bytes a patch",
        ),
    ],
)  # fmt: skip
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_wide_noise_is_refused_by_name_before_it_is_allocated():
    with pytest.raises(Unsupported, match="takes up to 10 wires but the kernel has 20 wires, 4,398,046,511,104 bytes"):
        load_backend("statevector").compile(kernel("product", 20), noise=NoiseModel((("*", COOLED),)))
