import numpy as np
import oracle
import pennylane as qml
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import circuits

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import load_backend, simulate
from qconv.backends import backend_names
from qconv.backends.contraction import contract
from qconv.backends.protocol import measurement_settings
from qconv.backends.uploads import Uploads
from qconv.testing import check_backend

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw_numbers(circuit, patches=3, filters=2, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


def expected(circuit, x, w):
    """Values (P, F, O) and derivatives from the oracle."""
    rows = [[oracle.run(circuit, p.double().numpy(), f.double().numpy()) for f in w] for p in x]
    return tuple(np.array([[cell[k] for cell in row] for row in rows]) for k in range(3))


def agree(backend, circuit, dtype, noise=None):
    x, w = draw_numbers(circuit, dtype=dtype)
    values, dx, dw = expected(circuit, x, w)
    x.requires_grad_(), w.requires_grad_()
    actual = simulate(circuit, x, w, backend=backend)
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual.detach(), values, atol=tolerance)
    factors = np.linspace(0.5, 1.5, actual.numel()).reshape(actual.shape)
    if actual.requires_grad:  # not so for a circuit without features and weights
        (actual * torch.from_numpy(factors).to(dtype)).sum().backward()
    for gradient, slopes, equation in ((x.grad, dx, "pfo,pfok->pk"), (w.grad, dw, "pfo,pfok->fk")):
        want = np.einsum(equation, factors, slopes)
        got = np.zeros_like(want) if gradient is None else gradient.numpy()
        np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max(initial=0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(circuit=circuits())
def test_statevector_agrees_with_the_oracle(circuit, dtype):
    agree("statevector", circuit, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(circuit=circuits(product_encoding=True))
def test_fourier_agrees_with_the_oracle(circuit, dtype):
    agree("fourier", circuit, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=10)
@given(circuit=circuits())
def test_pennylane_agrees_with_the_oracle(circuit, dtype):
    agree("pennylane", circuit, dtype)


@settings(max_examples=8)
@given(circuit=circuits())
def test_qiskit_agrees_with_the_oracle(circuit):
    agree("qiskit", circuit, torch.float64)


@settings(max_examples=5)
@given(circuit=circuits(max_wires=2))
def test_lightning_agrees_with_the_oracle(circuit):
    agree(load_backend("pennylane", device="lightning.qubit"), circuit, torch.float64)


@pytest.mark.parametrize("name", ["heisenberg", "strongly_entangling", "basic_entangler", "random", "product"])
@pytest.mark.parametrize("encoding", ["angle", "angle_x", "angle_z", "amplitude"])
@pytest.mark.parametrize("backend", ["statevector", "fourier", "pennylane"])
def test_named_kernels_agree_with_the_oracle(backend, encoding, name):
    circuit = kernel(name, 3, encoding=encoding, readout=["ZII", "IXY"])
    agree(backend, circuit, torch.float64)


def both(*names):
    """Two wires encoded by the gates named for each, with features, constants and weights told apart."""
    sources = {"x": Angle("input", 0, 0.8, 0.1), "y": Angle("input", 1, -1.1), "c": Angle("const", 0, 1.0, 0.4)}
    gates = []
    for wire, text in enumerate(names):
        for part in text.split():
            name, letters = part.split(":")
            gates.append(Gate(name, (wire,), tuple(sources[letter] for letter in letters)))
    return Circuit(2, (*gates, Gate("CNOT", (0, 1)), Gate("RX", (0,), (Angle("weight", 0),))), ("ZI", "IX", "YZ"))


@pytest.mark.parametrize(
    "circuit",
    [
        both("Rot:cxc", "Rot:yyy"),
        both("RX:c RY:x", "RX:y RY:y"),
        both("RX:x RY:y", "RX:c RY:y"),
        both("U3:xcc", "U3:cyc"),
        both("RX:c RY:x", "RX:c RY:y"),
        both("RY:x", "RZ:y"),
        both("H: RZ:x", "RY:y"),
    ],
)
@pytest.mark.parametrize("backend", ["fourier", "auto"])
def test_wires_encoded_almost_alike_are_told_apart(backend, circuit):
    agree(backend, circuit, torch.float64)


def test_half_precision_never_enters_a_circuit():
    circuit = kernel("heisenberg", 3)
    x, w = draw_numbers(circuit, dtype=torch.float32)
    for backend in ("fourier", "statevector"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = simulate(circuit, x, w, backend=backend)
        assert torch.equal(inside, simulate(circuit, x, w, backend=backend))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_amplitudes_of_any_size_are_normalized(size):
    circuit = kernel("strongly_entangling", 2, encoding="amplitude")
    x, w = draw_numbers(circuit, dtype=torch.float32)
    x = x * size
    values, dx, _ = expected(circuit, x, w)
    for backend in ("statevector", "fourier", "qiskit"):
        images = x.clone().requires_grad_()
        got = simulate(circuit, images, w, backend=backend)
        np.testing.assert_allclose(got.detach(), values, atol=1e-5)
        (gradient,) = torch.autograd.grad(got.sum(), images)
        np.testing.assert_allclose(gradient.double() * size, dx.sum((1, 2)) * size, atol=1e-4)


@pytest.mark.parametrize("filters", [1, 3])
@given(circuit=circuits())
def test_many_patches_take_the_same_road_as_few(circuit, filters):
    # More patches than basis states: what stands between the features is built once for all patches.
    x, w = draw_numbers(circuit, patches=9, filters=filters)
    x, w = x.requires_grad_(), w.requires_grad_()
    together = simulate(circuit, x, w, backend="statevector")
    alone = torch.cat([simulate(circuit, row[None], w, backend="statevector") for row in x])
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=0)
    if together.requires_grad:
        gradients = [torch.autograd.grad(y.square().sum(), (x, w), allow_unused=True) for y in (together, alone)]
        for ours, theirs in zip(*gradients, strict=True):
            if ours is not None or theirs is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("encoding", ["angle", "angle_x", "angle_z"])
def test_uploads_are_layers_of_phases(encoding):
    layer = kernel("heisenberg", 3, 1, encoding=encoding)
    circuit = layer + layer.shift_weights(layer.n_weights) + layer.shift_weights(2 * layer.n_weights)
    plan = Uploads.of(circuit)
    assert [upload.wires for upload in plan.uploads] == [(0, 1, 2)] * 3
    assert len(set(plan.uploads)) == 1
    assert sum(len(block) for block in plan.blocks) == len(circuit.gates) - 9
    x, w = draw_numbers(circuit, patches=11)
    values, _, _ = expected(circuit, x, w)
    np.testing.assert_allclose(simulate(circuit, x, w, backend="statevector"), values, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["fourier", "statevector"])
def test_strongly_entangling_is_pennylanes_template(backend, dtype):
    wires, depth = 4, 2
    device = qml.device("default.qubit", wires=wires)

    @qml.qnode(device, interface="torch", diff_method="backprop")
    def template(x, w):
        qml.AngleEmbedding(np.pi * x, wires=range(wires), rotation="Y")
        qml.StronglyEntanglingLayers(w.reshape(depth, wires, 3), wires=range(wires))
        return [qml.expval(qml.Z(wire)) for wire in range(wires)]

    circuit = kernel("strongly_entangling", wires, depth)
    x, w = draw_numbers(circuit, patches=6, filters=1)
    results = []
    for run, precision in (
        (lambda x, w: simulate(circuit, x, w, backend=backend), dtype),
        (lambda x, w: torch.stack(template(x, w), dim=-1), torch.float64),
    ):
        a = x.to(precision).clone().requires_grad_()
        b = w[0].to(precision).clone().requires_grad_()
        y = run(a, b)
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append((y.detach().double(), a.grad.double(), b.grad.double()))
    for ours, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype] * scale, rtol=0)


def test_basic_entangler_is_pennylanes_template():
    wires, depth = 3, 2

    @qml.qnode(qml.device("default.qubit", wires=wires))
    def template(x, w):
        qml.AngleEmbedding(np.pi * x, wires=range(wires), rotation="Y")
        qml.BasicEntanglerLayers(w.reshape(depth, wires), wires=range(wires))
        return [qml.expval(qml.Z(wire)) for wire in range(wires)]

    circuit = kernel("basic_entangler", wires, depth)
    x, w = draw_numbers(circuit, patches=1, filters=1)
    ours = simulate(circuit, x, w[0])[0]
    np.testing.assert_allclose(ours, template(x[0].numpy(), w[0].numpy()), atol=1e-12)


@pytest.mark.parametrize("encoding", ["angle", "amplitude"])
@pytest.mark.parametrize("options", [{}, {"shots": 50, "seed": 0}], ids=["exact", "shots"])
@pytest.mark.parametrize("backend", ["fourier", "statevector", "pennylane", "qiskit"])
def test_nan_stays_nan_and_in_its_row(backend, options, encoding):
    circuit = kernel("heisenberg", 2, encoding=encoding)
    x, w = draw_numbers(circuit)
    x[1, 0] = torch.nan
    values = simulate(circuit, x, w, backend=backend, **options)
    assert values[1].isnan().any()
    assert values[[0, 2]].isfinite().all()


def test_parameter_shifts_refuse_functorch():
    circuit = kernel("heisenberg", 2)
    x, w = draw_numbers(circuit)
    with pytest.raises(ValueError, match="use backend 'fourier' or 'statevector'"):
        torch.func.vmap(lambda row: simulate(circuit, row[None], w, backend="qiskit"))(x)


def test_a_row_of_zeros_is_the_ground_state_and_has_no_gradient():
    circuit = kernel("basic_entangler", 2, encoding="amplitude")
    w = torch.zeros(1, circuit.n_weights, dtype=torch.float64)
    for backend in ("statevector", "fourier", "pennylane", "qiskit"):
        x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        value = simulate(circuit, x, w, backend=backend)
        torch.testing.assert_close(value, torch.ones_like(value))
        value.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_constant_circuits_run_everywhere():
    circuit = Circuit(2, (Gate("H", (0,)), Gate("CNOT", (0, 1)), Gate("T", (1,))), ("XX", "ZZ", "XY"))
    x, w = torch.zeros(4, 0, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64)
    want = torch.tensor([2**-0.5, 1, 2**-0.5], dtype=torch.float64).expand(4, 2, 3)
    for backend in backend_names():
        torch.testing.assert_close(simulate(circuit, x, w, backend=backend), want)


def test_no_patches_give_no_values():
    circuit = kernel("heisenberg", 2)
    for backend in backend_names():
        values = simulate(circuit, torch.zeros(0, 2), torch.zeros(3, circuit.n_weights), backend=backend)
        assert values.shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pennylane", {}),
        ("pennylane", {"device": "lightning.qubit"}),
        ("qiskit", {}),
        ("auto", {}),
    ],
)
def test_conformance(name, options):
    assert len(check_backend(load_backend(name, **options))) == 8


def test_conformance_of_fourier():
    ran = check_backend(load_backend("fourier"), may_refuse=lambda case: case == "re-uploading")
    assert len(ran) == 7


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 700))
def test_contraction_is_the_sum_it_says(sizes, rows, patches):
    rng = np.random.default_rng(0)
    coefficients = torch.from_numpy(rng.normal(size=(rows, *sizes)))
    features = [torch.from_numpy(rng.normal(size=(size, patches))) for size in sizes]
    letters = "abcdefgh"[: len(sizes)]
    equation = f"r{letters}," + ",".join(f"{letter}p" for letter in letters) + "->rp"
    want = torch.einsum(equation, coefficients, *features)
    torch.testing.assert_close(contract(coefficients, features), want)


def test_wide_contraction_in_chunks_has_the_same_gradient(monkeypatch):
    import qconv.backends.contraction as contraction

    results = []
    for numbers in (2**20, 2**6):
        monkeypatch.setattr(contraction, "CHUNK_NUMBERS", numbers)
        coefficients = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 3, 3, 3))).requires_grad_()
        features = [torch.from_numpy(np.random.default_rng(k).normal(size=(3, 700))).requires_grad_() for k in range(4)]
        value = contract(coefficients, features)
        value.square().sum().backward()
        results.append([value.detach(), coefficients.grad, *(f.grad for f in features)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_measurement_settings_share_what_they_can():
    assert measurement_settings(("ZII", "IZI", "XXI", "IIX", "ZZX")) == [("ZZX", (0, 1, 3, 4)), ("XXI", (2,))]


def test_a_backend_of_your_own_is_differentiated_by_shifts():
    class Mine:
        name = "mine"

        def compile(self, circuit, *, shots=None, noise=None, seed=None):
            compiled = load_backend("statevector").compile(circuit)

            class Frozen:
                differentiable = False

                def __call__(self, inputs, weights):
                    return compiled(inputs.detach(), weights.detach())

                counts = compiled.counts

            return Frozen()

    assert len(check_backend(Mine())) == 8


NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.05)),))
BIG = Circuit(2, (Gate("RY", (0,), (Angle("input", 1),)), Gate("RX", (1,), (Angle("weight", 2),))), ("ZZ",))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, w: simulate(BIG, x, w, backend="forrier"), "did you mean 'fourier'"),
        (lambda x, w: simulate(BIG, x, w, shots=0), "shots is 0"),
        (lambda x, w: simulate(BIG, x, w, shots=True), "shots is True"),
        (lambda x, w: simulate(BIG, x, w, backend="fourier", shots=-1), "shots is -1"),
        (lambda x, w: simulate(BIG, x, w, backend="statevector", shots=1.5), "shots is 1.5"),
        (lambda x, w: simulate(BIG, x, w, backend="pennylane", noise=NOISE), "device='default.mixed'"),
        (lambda x, w: simulate(BIG, x[:, :1], w), "takes 2 inputs but inputs have shape (3, 1)"),
        (lambda x, w: simulate(BIG, torch.cat([x, x], 1), w), "takes 2 inputs but inputs have shape (3, 4)"),
        (lambda x, w: simulate(BIG, x, torch.cat([w, w], 1)), "takes 3 weights but weights have shape (2, 6)"),
        (lambda x, w: simulate(BIG, x, w, noise="depolarizing"), "noise is a str"),
        (lambda x, w: simulate(BIG, x, w, backend="qiskit", seed=-1), "seed is -1"),
        (lambda x, w: simulate(BIG, x, w[:, :2]), "takes 3 weights but weights have shape (2, 2)"),
        (lambda x, w: simulate(BIG, x.float(), w), "torch.float32 and weights torch.float64"),
        (lambda x, w: simulate(BIG, x.half(), w.half()), "must be torch.float32 or both torch.float64"),
        (lambda x, w: simulate(BIG, x, w[None]), "shape (1, 2, 3)"),
        (lambda x, w: simulate(BIG.with_observables(()), x, w), "0 observables"),
        (lambda x, w: load_backend("pennylane", device="default.qubits").compile(BIG), "does not load"),
        (lambda x, w: load_backend("statevector", device="cuda"), "does not take the options ['device']"),
        (lambda x, w: load_backend("qiskit", method="exact"), "no method 'exact'"),
        (
            lambda x, w: simulate(BIG, x, w, backend=load_backend("qiskit", method="statevector"), noise=NOISE),
            "samples noise",
        ),
        (
            lambda x, w: simulate(
                kernel("product", 25), x.new_zeros(1, 25), w.new_zeros(1, 225), backend="statevector"
            ),
            "25 wires",
        ),
    ],
)
def test_errors_say_both_values(call, says):
    x, w = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        call(x, w)
    assert says in str(error.value)
