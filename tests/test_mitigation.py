"""Mitigated values against exact ones: folding, extrapolation, inverted readout errors."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, ReadoutError, ThermalRelaxation, kernel
from circuits.circuit import const
from circuits.gates import GATES
from circuits.interop import from_qiskit, to_qiskit
from qconv import QuantumConv2d, load_backend, simulate
from qconv.mitigation import (
    ReadoutInversion,
    ZeroNoise,
    extrapolation_weights,
    fold,
    folded_scale,
    measure_readout,
)

CNOTS = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
DAMPED = NoiseModel((("*", ThermalRelaxation(60e-6, 40e-6, 0.2e-6)),))
MISREAD = NoiseModel(CNOTS.after, readout={0: ReadoutError(0.02, 0.1), 1: ReadoutError(0.05, 0.05)})
BACKENDS = {
    "fourier": lambda: load_backend("fourier"),
    "statevector": lambda: load_backend("statevector"),
    "aer": lambda: load_backend("qiskit"),
    "default.mixed": lambda: load_backend("pennylane", device="default.mixed"),
}


def draw_numbers(circuit, patches=3, filters=2, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


@settings(max_examples=15)
@given(circuit=circuits(), scale=st.floats(1, 6))
def test_folded_circuits_do_the_same_with_more_gates(circuit, scale):
    folded = fold(circuit, scale)
    d = len(circuit.gates)
    assert len(folded.gates) == pytest.approx(folded_scale(circuit, scale) * d)
    assert abs(len(folded.gates) - scale * d) <= 1 + 1e-9
    x, w = (t[0].numpy() for t in draw_numbers(circuit))
    for one, other in zip(oracle.run(folded, x, w), oracle.run(circuit, x, w), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_odd_scales_repeat_every_gate_and_others_are_spread():
    x = Gate("RX", (0,), (Angle("weight", 0),))
    h, s, sdg = (Gate(name, (0,)) for name in ("H", "S", "Sdg"))
    circuit = Circuit(1, (x, h, s), ("Z",))
    assert fold(circuit, 1) == circuit
    assert fold(circuit, 3).gates == (x, x.inverse(), x, h, h, h, s, sdg, s)
    assert fold(circuit, 3, ["S"]).gates == (x, h, s, sdg, s)
    # Four CNOTs, two of them folded: the second and the fourth.
    four = Circuit(2, tuple(Gate("CNOT", wires) for wires in ((0, 1), (1, 0)) * 2), ("ZZ",))
    assert [g.wires[0] for g in fold(four, 2).gates] == [0, 1, 1, 1, 0, 1, 1, 1]
    assert folded_scale(four, 2.2) == 2
    assert folded_scale(four, 2.3) == 2.5


def test_a_state_preparation_is_not_folded():
    circuit = kernel("basic_entangler", 2, 1, encoding="amplitude")
    assert fold(circuit, 3).counts()["Amplitude"] == 1
    x, w = draw_numbers(circuit)
    torch.testing.assert_close(simulate(fold(circuit, 3), x, w), simulate(circuit, x, w))


def test_weights_of_extrapolation_are_the_textbooks():
    np.testing.assert_allclose(extrapolation_weights((1, 2, 3), "richardson"), [3, -3, 1])
    np.testing.assert_allclose(extrapolation_weights((1, 3), "linear"), [1.5, -0.5])
    scales = np.array([1, 2, 3.5, 5])
    for degree, kind in ((1, "linear"), (3, "richardson")):
        coefficients = np.random.default_rng(0).normal(size=degree + 1)
        values = np.polynomial.polynomial.polyval(scales, coefficients)
        assert extrapolation_weights(scales, kind) @ values == pytest.approx(coefficients[0])
    # Least squares of points on no line, against numpy's fit.
    values = np.array([0.3, 0.1, 0.2, -0.4])
    assert extrapolation_weights(scales, "linear") @ values == pytest.approx(np.polyfit(scales, values, 1)[1])


def test_our_extrapolations_are_mitiqs():
    zne = pytest.importorskip("mitiq.zne.inference", reason="needs the extra mitiq, in an environment of its own")
    scales, values = [1.0, 2.0, 3.0], [0.8, 0.65, 0.5]
    assert extrapolation_weights(scales, "linear") @ values == pytest.approx(
        zne.LinearFactory.extrapolate(scales, values)
    )
    assert extrapolation_weights(scales, "richardson") @ values == pytest.approx(
        zne.RichardsonFactory.extrapolate(scales, values)
    )


def test_mitiq_mitigates_our_backends_as_we_do():
    """Its folds of every gate, its line: the recipe of the module's docstring."""
    zne = pytest.importorskip("mitiq.zne", reason="needs the extra mitiq, in an environment of its own")
    circuit = kernel("strongly_entangling", 3, readout=("ZII",))
    x, w = draw_numbers(circuit)
    x, w = x[:1], w[:1]
    noise = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
    none = torch.zeros(1, 0, dtype=torch.float64)

    def run(folded):
        read = from_qiskit(folded, observables=circuit.observables)
        return float(simulate(read, none, none, backend="statevector", noise=noise))

    template = to_qiskit(circuit)
    numbers = {"x": x[0].tolist(), "w": w[0].tolist()}
    bound = template.assign_parameters({p: numbers[p.vector.name][p.index] for p in template.parameters})
    found = zne.execute_with_zne(
        bound, run, factory=zne.LinearFactory([1.0, 3.0, 5.0]), scale_noise=zne.scaling.fold_all
    )
    ours = simulate(circuit, x, w, backend=ZeroNoise("statevector"), noise=noise)
    assert found == pytest.approx(float(ours), abs=1e-6)


def test_exponential_decay_is_extrapolated_exactly():
    # Each of the d gates is followed by depolarizing noise: <Z> = (1 - 4p/3)^d <Z>_0, a pure exponential in the scale.
    circuit = Circuit(1, (Gate("RX", (0,), (Angle("weight", 0),)), *[Gate("X", (0,))] * 4), ("Z",))
    noise = NoiseModel((("X", Channel("depolarizing", 0.1)),))
    w = torch.tensor([[0.4], [2.0], [3.0]], dtype=torch.float64)
    none = torch.zeros(1, 0, dtype=torch.float64)
    exact = torch.cos(w).reshape(1, 3, 1)
    noisy = simulate(circuit, none, w, backend="statevector", noise=noise)
    torch.testing.assert_close(noisy, exact * (1 - 0.4 / 3) ** 4)
    runner = ZeroNoise("statevector", extrapolation="exponential")
    torch.testing.assert_close(simulate(circuit, none, w, backend=runner, noise=noise), exact, atol=1e-12, rtol=0)
    # Relaxation to |0> decays to 1, not to 0: the limit says so.
    relax = NoiseModel((("H", ThermalRelaxation(1.0, 1.0, 0.2)),))
    flips = Circuit(1, (Gate("X", (0,)), Gate("H", (0,)), Gate("H", (0,)), *[Gate("Z", (0,))] * 2), ("Z",))
    damped = NoiseModel((("Z", Channel("amplitude_damping", 0.2)),))
    values = simulate(
        flips, none, none, backend=ZeroNoise("statevector", (1, 3), "exponential", limit=1.0), noise=damped
    )
    torch.testing.assert_close(values, -torch.ones_like(values), atol=1e-12, rtol=0)
    assert abs(float(simulate(flips, none, none, backend="statevector", noise=relax)) + 1) > 0.05


def test_values_that_cross_the_limit_are_extrapolated_linearly():
    class Table:
        name = "table"

        def compile(self, circuit, *, shots=None, noise=None, seed=None):
            scale = len(circuit.gates)

            class Row:
                differentiable = True

                def __call__(self, inputs, weights):
                    return inputs.new_tensor([[[0.4 - 0.2 * scale, 0.5 / scale, 0.0, 0.1 * scale]]])

            return Row()

    circuit = Circuit(1, (Gate("X", (0,)),), ("Z",))
    none = torch.zeros(1, 0, dtype=torch.float64)
    (values,) = simulate(circuit, none, none[0], backend=ZeroNoise(Table(), (1, 3, 5), "exponential"))
    assert float(values[0]) == pytest.approx(0.4)
    decay = np.array([0.5, 0.5 / 3, 0.1])
    assert float(values[1]) == pytest.approx(np.exp(np.polyfit([1, 3, 5], np.log(decay), 1, w=decay)[1]))
    assert float(values[2]) == 0
    # Values that grow away from the limit decay to nothing that is known of.
    assert float(values[3]) == pytest.approx(np.polyfit([1, 3, 5], [0.1, 0.3, 0.5], 1)[1], abs=1e-12)


def errors(circuit, runner, plain, noise, **options):
    """Root-mean-square errors of noisy and of mitigated values."""
    x, w = draw_numbers(circuit, patches=6)
    exact = simulate(circuit, x, w, backend="statevector")
    found = [simulate(circuit, x, w, backend=b, noise=noise, **options) for b in (plain, runner)]
    return [float((values - exact).square().mean().sqrt()) for values in found]


@pytest.mark.parametrize("noise", [CNOTS, DAMPED], ids=["depolarized", "relaxed"])
@pytest.mark.parametrize(("kind", "share"), [("linear", 0.4), ("richardson", 0.15), ("exponential", 0.15)])
def test_zero_noise_extrapolation_reduces_the_error(kind, share, noise):
    circuit = kernel("strongly_entangling", 3)
    before, after = errors(circuit, ZeroNoise("fourier", extrapolation=kind), "fourier", noise)
    assert before > 0.01
    assert after < share * before


@pytest.mark.parametrize(("scales", "order"), [((1, 3), 2), ((1, 3, 5), 3), ((1, 3, 5, 7), 4)])
def test_what_richardson_leaves_is_of_the_order_of_its_points(scales, order):
    # Depolarizing noise of one wire commutes with its gates, so folding scales it exactly.
    circuit = kernel("strongly_entangling", 2, 3)
    left = []
    for p in (0.002, 0.001):
        noise = NoiseModel((("Rot", Channel("depolarizing", p)),))
        left.append(errors(circuit, ZeroNoise("fourier", scales, "richardson"), "fourier", noise))
    (one, many), (half, fewer) = left
    assert one / half == pytest.approx(2, rel=0.1)
    assert many / fewer == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("name", ["SX", "S", "T", "SQSWAP", "ISWAP"])
def test_noise_follows_a_gate_and_its_inverse_alike(name):
    gate = Gate(name, (0, 1)[: GATES[name].n_wires])
    turn = tuple(Gate("RY", (wire,), (const(0.9),)) for wire in (0, 1))
    circuit = Circuit(2, (*turn, gate, *turn, gate.inverse(), *turn), ("XI", "YI", "XY"))
    none = torch.zeros(1, 0, dtype=torch.float64)
    channels = [Channel("depolarizing", p) for p in (0.01, 0.02)]
    own, inverse = (name, channels[0]), gate.inverse().name
    for after in ((own,), (own, (inverse, channels[1])), (own, (inverse, channels[0]), (inverse, channels[0]))):
        with pytest.raises(ValueError, match=f"after {name} and after its inverse {inverse},"):
            simulate(circuit, none, none, backend=ZeroNoise("statevector"), noise=NoiseModel(after))
    noise = NoiseModel((own, (inverse, channels[0])))
    before, after = errors(circuit, ZeroNoise("statevector", extrapolation="richardson"), "statevector", noise)
    assert before > 0.005
    assert after < 0.05 * before


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_mitigates_alike(backend):
    circuit = kernel("strongly_entangling", 2, 1)
    x, w = draw_numbers(circuit, patches=2, filters=1)
    values = [
        simulate(circuit, x, w, backend=ZeroNoise(ReadoutInversion(b), (1, 3)), noise=MISREAD)
        for b in (BACKENDS[backend](), "statevector")
    ]
    torch.testing.assert_close(*values, atol=1e-10, rtol=0)


def test_folded_shots_reduce_the_error_as_well():
    circuit = kernel("strongly_entangling", 3)
    noise = NoiseModel((("CNOT", Channel("depolarizing", 0.04)),))
    before, after = errors(circuit, ZeroNoise("statevector", (1, 3)), "statevector", noise, shots=20_000, seed=0)
    assert after < 0.6 * before


def test_noise_of_the_backend_itself_folds_every_gate():
    aer = pytest.importorskip("qiskit_aer.noise")
    model = aer.NoiseModel()
    model.add_all_qubit_quantum_error(aer.depolarizing_error(0.05, 2), ["cx"])
    circuit = kernel("strongly_entangling", 2, 1)
    runner = load_backend("qiskit", noise_model=model)
    before, after = errors(circuit, ZeroNoise(runner), runner, None)
    assert before > 0.01
    assert after < 0.4 * before


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverted_readout_errors_leave_none(backend):
    circuit = kernel("strongly_entangling", 3, 1, readout=["ZII", "IXZ", "YYX"])
    noise = NoiseModel(readout={0: ReadoutError(0.02, 0.1), 1: ReadoutError(0.1, 0.1), 2: ReadoutError(0.7, 0.6)})
    x, w = draw_numbers(circuit, patches=2)
    exact = simulate(circuit, x, w, backend="statevector")
    noisy = simulate(circuit, x, w, backend=BACKENDS[backend](), noise=noise)
    assert float((noisy - exact).abs().max()) > 0.1
    mitigated = simulate(circuit, x, w, backend=ReadoutInversion(BACKENDS[backend]()), noise=noise)
    torch.testing.assert_close(mitigated, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("backend", ["fourier", "statevector", "qiskit"])
def test_inverted_shots_are_unbiased(backend):
    circuit = kernel("strongly_entangling", 2, readout=["ZI", "ZZ"])
    noise = NoiseModel(readout=ReadoutError(0.05, 0.15))
    shots = 100_000
    x, w = draw_numbers(circuit)
    exact = simulate(circuit, x, w, backend="statevector")
    noisy, mitigated = (
        simulate(circuit, x, w, backend=b, noise=noise, shots=shots, seed=1)
        for b in (backend, ReadoutInversion(backend))
    )
    assert float((noisy - exact).abs().max()) > 0.08
    # (sign - 0.1) / 0.8 is at most 1.1 / 0.8 in size, so a product of two has a variance below its fourth power.
    assert float((mitigated - exact).abs().max()) < 5 * (1.1 / 0.8) ** 2 / shots**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_readout_errors_are_measured(backend):
    noise = NoiseModel(readout={0: ReadoutError(0.02, 0.1), 2: ReadoutError(0.3, 0.0)})
    exact = measure_readout(BACKENDS[backend](), 3, shots=None, noise=noise)
    for wire in range(3):
        want = noise.readout_of(wire) or ReadoutError(0, 0)
        assert exact[wire].p1_given_0 == pytest.approx(want.p1_given_0, abs=1e-12)
        assert exact[wire].p0_given_1 == pytest.approx(want.p0_given_1, abs=1e-12)


def test_readout_errors_measured_with_shots_invert_them():
    noise = NoiseModel(readout={0: ReadoutError(0.02, 0.1), 1: ReadoutError(0.1, 0.3)})
    shots = 50_000
    found = measure_readout("statevector", 2, shots=shots, noise=noise, seed=0)
    for wire, error in found.items():
        for name in ("p1_given_0", "p0_given_1"):
            p = getattr(noise.readout_of(wire), name)
            assert abs(getattr(error, name) - p) < 5 * (p * (1 - p) / shots) ** 0.5
    assert found == measure_readout("statevector", 2, shots=shots, noise=noise, seed=0)
    assert found != measure_readout("statevector", 2, shots=shots, noise=noise, seed=1)
    circuit = kernel("strongly_entangling", 2)
    before, after = errors(circuit, ReadoutInversion("fourier", found), "fourier", noise)
    assert after < 0.05 * before


def test_mitigated_layers_train():
    torch.manual_seed(0)
    noise = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),), readout=ReadoutError(0.02, 0.05))
    options = {"kernel": "strongly_entangling", "depth": 1, "dtype": torch.float64}
    exact = QuantumConv2d(1, 4, 2, **options)
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    gradients = []
    for backend, own in (
        ("auto", None),
        ("fourier", noise),
        (ZeroNoise(ReadoutInversion("fourier"), extrapolation="richardson"), noise),
    ):
        layer = QuantumConv2d(1, 4, 2, backend=backend, noise=own, **options)
        layer.load_state_dict(exact.state_dict())
        layer(images).square().sum().backward()
        gradients.append(layer.weight.grad)
    before, after = ((g - gradients[0]).norm() for g in gradients[1:])
    assert after < 0.15 * before
    layer.shots = 100
    assert layer(images).shape == (2, 4, 3, 3)
    assert "zero-noise extrapolation" in layer.backend
    # One evaluation a scale.
    single = QuantumConv2d(1, 4, 2, backend="fourier", noise=noise, shots=100, **options).counts((1, 4, 4))
    assert layer.counts((1, 4, 4))["device:circuits"] == 3 * single["device:circuits"]


CIRCUIT = Circuit(1, (Gate("X", (0,)), Gate("X", (0,))), ("Z",))
NO = torch.zeros(1, 0)
FLAT = NoiseModel(readout=ReadoutError(0.4, 0.6))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fold(CIRCUIT, 0.5), "scale is 0.5"),
        (lambda: fold(CIRCUIT, 3, ["CNOTT"]), "did you mean 'CNOT'"),
        (lambda: fold(CIRCUIT, 3, ["CNOT"]), "0 gates to fold"),
        (lambda: ZeroNoise("statevector", (1,)), "give at least 2 different numbers"),
        (lambda: ZeroNoise("statevector", (1, 1)), "scales are (1, 1)"),
        (lambda: ZeroNoise("statevector", (0, 1)), "scales are (0, 1)"),
        (lambda: ZeroNoise("statevector", extrapolation="liner"), "did you mean 'linear'"),
        (lambda: extrapolation_weights((1, 3), "exponential"), "unknown extrapolation"),
        (lambda: simulate(CIRCUIT, NO, NO, backend=ZeroNoise("statevector", (1, 1.2))), "become (1.0, 1.0)"),
        (lambda: simulate(CIRCUIT, NO, NO, backend=ZeroNoise("statevector"), noise=CNOTS), "0 gates to fold"),
        (lambda: simulate(CIRCUIT, NO, NO, backend=ReadoutInversion("statevector")), "no errors to invert"),
        (lambda: simulate(CIRCUIT, NO, NO, backend=ReadoutInversion("statevector"), noise=FLAT), "about 1 together"),
        (
            lambda: simulate(CIRCUIT, NO, NO, backend=ReadoutInversion("fourier", {1: ReadoutError(0, 0)})),
            "names wire 1",
        ),
        (lambda: simulate(CIRCUIT, NO, NO, backend=ZeroNoise("statevector"), shots=0), "shots is 0"),
        (lambda: measure_readout("statevector", 2, shots=-1), "shots is -1"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_errors_are_those_of_the_qubits_that_a_circuit_ends_on():
    """Each qubit misreads in its own way, and gates along a line move wires."""
    from qiskit_aer.noise import NoiseModel as AerNoise
    from qiskit_aer.noise import ReadoutError as AerError

    model, own = AerNoise(), {}
    for qubit in range(5):
        up, down = 0.01 * (qubit + 1), 0.02 * (qubit + 1)
        own[qubit] = ReadoutError(up, down)
        model.add_readout_error(AerError([[1 - up, up], [down, 1 - down]]), [qubit])
    line = [[a, b] for a in range(5) for b in range(5) if abs(a - b) == 1]
    device = load_backend("qiskit", noise_model=model, coupling_map=line)
    circuit = kernel("strongly_entangling", 4)
    (places,) = device.measured_qubits(circuit, None)
    assert places != [0, 1, 2, 3]
    found = measure_readout(device, circuit, shots=None)
    for wire, place in enumerate(places):
        assert found[wire].p1_given_0 == pytest.approx(own[place].p1_given_0, abs=1e-9)
        assert found[wire].p0_given_1 == pytest.approx(own[place].p0_given_1, abs=1e-9)
    x, w = draw_numbers(circuit)
    exact = simulate(circuit, x, w)
    assert float((simulate(circuit, x, w, backend=device) - exact).abs().max()) > 0.01
    mitigated = simulate(circuit, x, w, backend=ReadoutInversion(device, found))
    torch.testing.assert_close(mitigated, exact, atol=1e-8, rtol=0)
    # Settings that end on different qubits have no errors in common.
    apart = circuit.with_observables(("ZIII", "XIII"))
    places = device.measured_qubits(apart, None)
    if places[0] != places[1]:
        with pytest.raises(ValueError, match="measurement settings of the circuit end on different qubits"):
            measure_readout(device, apart, shots=None)
    with pytest.raises(ValueError, match=r"circuit is a str: give a Circuit, such as layer\.circuit"):
        measure_readout(device, "strongly_entangling", shots=None)
    with pytest.raises(ValueError, match="wraps a backend that places circuits"):
        measure_readout(ReadoutInversion(device, found), circuit, shots=None)
