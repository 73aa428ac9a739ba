"""Amplitude encoding as a quadratic form: against dense matrices, state vectors and PennyLane's density matrices."""

import copy

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gates, observables
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qconv.backends.quadratic as module
from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import QuantumConv2d, load_backend, simulate
from qconv.backends import Unsupported, kept
from qconv.backends.quadratic import Matrices, QuadraticCompiled, Squares
from qconv.testing import check_layer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NOISE = NoiseModel(
    (
        ("CNOT", Channel("depolarizing", 0.05)),
        ("*", Channel("amplitude_damping", 0.07)),
        ("Rot", Channel("phase_flip", 0.03)),
        ("RX", Channel("phase_damping", 0.1)),
        ("RY", Channel("bit_flip", 0.02)),
    )
)
MIXED = load_backend("pennylane", device="default.mixed")


class Way:
    """The quadratic form evaluated one way, whichever is cheaper."""

    name = "way"

    def __init__(self, way):
        self.way = way

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled = QuadraticCompiled(circuit, noise)
        compiled._form = Squares(circuit) if self.way is Squares else Matrices(circuit, noise)
        return compiled


@st.composite
def amplitude_circuits(draw, max_wires=3):
    """Features in any order, used twice or scaled, then any gates that read none."""
    n = draw(st.integers(1, max_wires))
    features = draw(st.integers(1, 2**n))
    scales = st.sampled_from([1.0, 1.0, -0.7])
    angles = [Angle("input", draw(st.integers(0, features - 1)), draw(scales)) for _ in range(features)]
    plain = tuple(Angle("input", k) for k in range(features))
    first = Gate("Amplitude", tuple(range(n)), draw(st.sampled_from([plain, tuple(angles)])))
    body = draw(st.lists(gates(n, ("weight", "const"), 1, 4), max_size=10))
    return Circuit(n, (first, *body), draw(observables(n)))


def draw_numbers(circuit, patches=3, filters=2, dtype=torch.float64):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x.requires_grad_(), w.requires_grad_()


def value_and_gradients(backend, circuit, x, w, noise=None):
    values = simulate(circuit, x, w, backend=backend, noise=noise)
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)
    gradients = torch.autograd.grad((values * factors).sum(), (x, w), allow_unused=True, materialize_grads=True)
    return values.detach(), *gradients


def close(actual, expected, atol):
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs.to(ours), atol=atol * scale, rtol=0)


@pytest.mark.parametrize("way", [Matrices, Squares])
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(circuit=amplitude_circuits())
def test_both_ways_agree_with_the_oracle(circuit, dtype, way):
    x, w = draw_numbers(circuit, dtype=dtype)
    rows = [[oracle.run(circuit, p.double().numpy(), f.double().numpy()) for f in w.detach()] for p in x.detach()]
    values, dx, dw = (torch.from_numpy(np.array([[cell[k] for cell in row] for row in rows])) for k in range(3))
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64).reshape(values.shape)
    want = values, torch.einsum("pfo,pfok->pk", factors, dx), torch.einsum("pfo,pfok->fk", factors, dw)
    got = value_and_gradients(Way(way), circuit, x, w)
    assert all(part.dtype == dtype for part in got)
    close(got, want, TOLERANCE[dtype])


def density_matrix_values(circuit, x, w, noise):
    """Expectation values (n_obs,) from the oracle's dense matrices."""
    n, (first, *rest) = circuit.n_wires, circuit.gates
    state = np.zeros(2**n)
    state[: len(first.angles)] = [oracle.angle_value(angle, x, w) for angle in first.angles]
    rho = np.outer(state, state) / (state @ state)
    for gate in rest:
        matrix = oracle.gate_matrix(gate, [oracle.angle_value(angle, x, w) for angle in gate.angles], n)
        rho = matrix @ rho @ matrix.conj().T
        for channel, wire in ((c, wire) for name, c in noise.after if name in ("*", gate.name) for wire in gate.wires):
            kraus = [oracle.on_wires({wire: k}, n) for k in oracle.kraus_of(channel)]
            rho = sum(k @ rho @ k.conj().T for k in kraus)
    return [np.trace(oracle.pauli_string(text) @ rho).real for text in circuit.observables]


@pytest.mark.parametrize("dtype", TOLERANCE)
@given(circuit=amplitude_circuits())
def test_noise_agrees_with_the_oracle(circuit, dtype):
    x, w = (t.detach() for t in draw_numbers(circuit, dtype=dtype))
    want = [[density_matrix_values(circuit, p.double().numpy(), f.double().numpy(), NOISE) for f in w] for p in x]
    got = simulate(circuit, x, w, backend="auto", noise=NOISE)
    np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("features", [6, 8])
@pytest.mark.parametrize("name", ["strongly_entangling", "heisenberg"])
def test_noise_and_its_gradients_agree_with_pennylane(name, features, dtype):
    circuit = kernel(name, 3, encoding="amplitude", features=features, readout=["ZII", "YXY", "IIX"])
    x, w = draw_numbers(circuit, dtype=dtype)
    got = value_and_gradients("fourier", circuit, x, w, noise=NOISE)
    expected = value_and_gradients(MIXED, circuit, x.detach().double().requires_grad_(), w.double(), noise=NOISE)
    close(got, expected, TOLERANCE[dtype])
    assert (got[0] - simulate(circuit, x, w)).abs().max() > 0.1


@pytest.mark.parametrize("channel", ["depolarizing", "bit_flip", "phase_flip", "amplitude_damping", "phase_damping"])
def test_every_channel_agrees_with_pennylane(channel):
    circuit = kernel("strongly_entangling", 3, encoding="amplitude", features=6, readout=["ZII", "YXY", "IIX"])
    noise = NoiseModel((("*", Channel(channel, 0.1)),))
    x, w = draw_numbers(circuit)
    got = value_and_gradients("fourier", circuit, x, w, noise=noise)
    close(got, value_and_gradients(MIXED, circuit, x, w, noise=noise), 1e-10)
    assert (got[0] - simulate(circuit, x, w)).abs().max() > 0.02


def test_the_way_with_fewer_operations_is_taken():
    def way(wires, readout, noise=None):
        circuit = kernel("heisenberg", wires, encoding="amplitude", readout=readout)
        return type(load_backend("fourier").compile(circuit, noise=noise)._form)

    # One matrix of 16 x 16, and 16 products, against 32 rows of 16 and their squares.
    assert way(4, ["ZIII"]) is Matrices
    assert way(4, "z") is Squares
    # Four measurement settings: four times the states.
    assert way(4, ["ZIII", "XIII", "YIII", "YYXX"]) is Matrices
    assert way(4, "z", NOISE) is Matrices


@pytest.mark.parametrize(
    ("readout", "features", "noise"),
    [("z", 16, None), ("z", 9, None), (["ZIII", "XYZX"], 11, None), ("z", 16, NOISE)],
    ids=["z", "padded", "settings", "noise"],
)
def test_rows_without_a_direction_are_those_of_the_state_vector(readout, features, noise):
    circuit = kernel("heisenberg", 4, encoding="amplitude", readout=readout, features=features)
    x, w = (t.detach() for t in draw_numbers(circuit, patches=5))
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 0] = torch.inf
    values = [
        simulate(circuit, x, w, backend=name, noise=noise) for name in ("fourier", MIXED if noise else "statevector")
    ]
    torch.testing.assert_close(values[0][[0, 1, 4]], values[1][[0, 1, 4]], atol=1e-12, rtol=0)
    assert values[0][2:4].isnan().all()
    # The row of zeros is |0...0>: no gradient for the patch, the state's for the weights.
    two, w = x[:2].requires_grad_(), w.requires_grad_()
    gradients = value_and_gradients("fourier", circuit, two, w, noise)
    reference = value_and_gradients(MIXED if noise else "statevector", circuit, two, w, noise)
    close(gradients, reference, 1e-10)
    assert (gradients[1][1] == 0).all()
    assert (gradients[1][0] != 0).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("way", [Matrices, Squares])
def test_patches_of_any_size(way, size):
    circuit = kernel("strongly_entangling", 3, encoding="amplitude")
    x, w = draw_numbers(circuit, dtype=torch.float32)
    x = torch.sign(x.detach())  # numbers near the smallest have few digits
    want = simulate(circuit, x, w)
    torch.testing.assert_close(simulate(circuit, x * size, w, backend=Way(way)), want, atol=1e-6, rtol=0)


def test_features_may_be_shifted_and_constant():
    plain = kernel("heisenberg", 2, encoding="amplitude")
    angles = (Angle("input", 1, 2.0, 0.1), Angle("const", 0, 1.0, 0.3), Angle("input", 0), Angle("input", 1))
    circuit = Circuit(2, (Gate("Amplitude", (0, 1), angles), *plain.gates[1:]), plain.observables)
    x, w = draw_numbers(circuit)
    a, b = x.T
    expected = simulate(plain, torch.stack([2 * b + 0.1, torch.full_like(a, 0.3), a, b], dim=1), w)
    torch.testing.assert_close(simulate(circuit, x, w), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wires", [6, 8])
@pytest.mark.parametrize("way", [Matrices, Squares])
def test_up_to_256_features(way, wires):
    circuit = kernel("heisenberg", wires, depth=1, encoding="amplitude", features=2**wires - 5)
    x, w = draw_numbers(circuit, patches=2, filters=1)
    close(value_and_gradients(Way(way), circuit, x, w), value_and_gradients("statevector", circuit, x, w), 1e-10)


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize("readout", ["z", ["XY"]])
def test_derivatives_of_every_kind(readout, noise):
    circuit = kernel("strongly_entangling", 2, depth=1, encoding="amplitude", readout=readout)
    compiled = load_backend("fourier").compile(circuit, noise=noise)
    x, w = draw_numbers(circuit, patches=2)
    assert torch.autograd.gradcheck(compiled, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(compiled, (x, w))


@pytest.mark.parametrize("noise", [None, NOISE])
def test_vmap_over_models_and_samples(noise):
    layer = QuantumConv2d(1, 2, 2, encoding="amplitude", noise=noise, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer(x)  # what is kept for these weights must not reach the transforms

    def loss(weight, image):
        return torch.func.functional_call(layer, {"weight": weight}, (image,)).square().sum()

    weight = layer.weight.detach()
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for image, gradient in zip(x, together, strict=True):
        (alone,) = torch.autograd.grad(loss(layer.weight, image), layer.weight)
        torch.testing.assert_close(gradient, alone)
    models = torch.func.vmap(loss, (0, None))(torch.stack([weight, 2 * weight]), x)
    torch.testing.assert_close(models, torch.stack([loss(weight, x), loss(2 * weight, x)]))
    _, slope = torch.func.jvp(lambda v: loss(v, x), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(slope, torch.autograd.grad(loss(layer.weight, x), layer.weight)[0].sum())


@pytest.mark.parametrize("noise", [None, NOISE])
def test_compiles_without_graph_breaks(noise):
    layer = QuantumConv2d(1, 2, 2, encoding="amplitude", noise=noise)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("noise", [None, NOISE])
@pytest.mark.parametrize(("groups", "stride"), [(1, (1, 1)), (2, (2, 1))])
def test_layer_conformance(groups, stride, noise):
    layer = QuantumConv2d(
        2, 4, (3, 2), stride, groups=groups, encoding="amplitude", kernel="strongly_entangling", noise=noise, bias=True
    )
    assert layer.backend.startswith("fourier")
    check_layer(layer, 2, size=6, stride=stride)


@pytest.mark.parametrize("geometry", [{"padding": "same"}, {"padding": 2, "stride": 2, "dilation": (1, 2)}])
def test_padded_layers_are_those_of_the_state_vector(geometry):
    # Zeros around the image make patches that are zeros in part, and at the corners altogether.
    torch.manual_seed(0)
    first = QuantumConv2d(2, 6, 3, groups=2, encoding="amplitude", **geometry)
    second = QuantumConv2d(2, 6, 3, groups=2, encoding="amplitude", backend="statevector", **geometry)
    second.load_state_dict(first.state_dict())
    x = torch.rand(2, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    x[:, :, :3, :3] = 0
    results = []
    for layer in (first, second):
        image = x.clone().requires_grad_()
        y = layer(image)
        (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum().backward()
        results.append((y.detach(), image.grad, layer.weight.grad))
    close(*results, 1e-5)


def test_chunks_give_the_same_values_and_gradients(monkeypatch):
    circuit = kernel("heisenberg", 3, encoding="amplitude")
    results = []
    for numbers in (2**20, 2**8):
        monkeypatch.setattr(module, "CHUNK_NUMBERS", numbers)
        results.append(value_and_gradients("fourier", circuit, *draw_numbers(circuit, patches=1000)))
        with torch.no_grad():
            results.append((simulate(circuit, *draw_numbers(circuit, patches=1000)), *results[-1][1:]))
    for result in results[1:]:
        close(result, results[0], 1e-12)


def steps(layer):
    """Every way torch allows to change weights."""
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    yield optimizer.step
    yield lambda: layer.load_state_dict({"weight": layer.weight.detach() * 2})
    yield lambda: layer.weight.data.mul_(0.7)
    yield lambda: layer.weight.detach().copy_(layer.weight.detach() + 1)
    yield lambda: layer.weight.detach().numpy().__iadd__(0.5)
    yield lambda: setattr(layer, "weight", nn.Parameter(-layer.weight.detach()))


@pytest.mark.parametrize("noise", [None, NOISE])
def test_kept_matrices_are_never_stale(noise):
    layer = QuantumConv2d(2, 4, 2, groups=2, encoding="amplitude", noise=noise)
    nn.init.normal_(layer.weight)
    x = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for change in [lambda: None, *steps(layer)]:
        with torch.no_grad():
            before = layer(x)
        change()
        with torch.no_grad():
            after, copied = layer(x), copy.deepcopy(layer)(x)
        # With gradients nothing is kept.
        assert torch.equal(after, layer(x).detach())
        assert torch.equal(after, copied)
    assert not torch.equal(before, after)


def test_matrices_are_built_once_for_equal_weights(monkeypatch):
    circuit = kernel("heisenberg", 2, encoding="amplitude")
    compiled = load_backend("fourier").compile(circuit)
    built = []
    build = compiled._form.build
    monkeypatch.setattr(compiled._form, "build", lambda w: built.append(len(w)) or build(w))
    monkeypatch.setattr(kept, "_MOST", 8)
    x, w = draw_numbers(circuit)
    with torch.no_grad():
        for filters in (2, 2, 1, 1, 2):
            compiled(x, w[:filters])
        assert built == [2, 1]
        for k in range(20):
            compiled(x, w + k)
    assert len(compiled._build._results) == 8
    built.clear()
    compiled(x, w)
    compiled(x, w)
    assert built == [2, 2]
    # Frozen weights need no graph of their own, so an input's gradient does with what is kept.
    compiled(x, w.detach()).sum().backward()
    compiled(x, w.detach()).sum().backward()
    assert built == [2, 2, 2]


def test_filters_without_weights_are_told_apart():
    circuit = Circuit(1, (Gate("Amplitude", (0,), (Angle("input", 0), Angle("input", 1))),), ("Z", "X"))
    x = torch.tensor([[3.0, 4.0]])
    compiled = load_backend("fourier").compile(circuit)
    for filters in (1, 3, 1):
        values = compiled(x, torch.zeros(filters, 0))
        torch.testing.assert_close(values, torch.tensor([-0.28, 0.96]).expand(1, filters, 2))


def test_inference_mode_does_not_spoil_training():
    layer = QuantumConv2d(1, 2, 2, encoding="amplitude")
    x = torch.rand(1, 1, 3, 3)
    with torch.inference_mode():
        layer(x)
    layer.requires_grad_(False)
    image = x.clone().requires_grad_()
    layer(image).sum().backward()
    layer.requires_grad_(True)(x).sum().backward()
    assert layer.weight.grad is not None


def test_tensors_without_numbers_have_shapes():
    with torch.no_grad():
        layer = QuantumConv2d(1, 4, 2, encoding="amplitude", device="meta")
        assert layer(torch.zeros(1, 1, 4, 4, device="meta")).shape == (1, 4, 3, 3)
        with FakeTensorMode():
            layer = QuantumConv2d(1, 4, 2, encoding="amplitude")
            assert layer(torch.zeros(1, 1, 4, 4)).shape == (1, 4, 3, 3)


def test_counts_are_what_runs():
    patches = 3 * 3
    few = QuantumConv2d(1, 1, 3, encoding="amplitude", readout=["ZIII"])
    counts = few.counts((1, 5, 5))
    # M x for 9 features, x^T of it, and the squared norm; scaling and division.
    assert counts["mac:fp32*fp32"] == patches * (9 * 9 + 9 + 9)
    assert counts["mul:fp32"] == patches * (9 + 1)
    assert counts["cmp:fp32"] == patches * 9
    assert counts["weight_bits"] == 32 * 81
    assert counts["device:circuits"] == patches
    many = QuantumConv2d(2, 16, 4, encoding="amplitude", groups=2).counts((2, 6, 6))
    # Two groups of two filters: 16 complex amplitudes are 32 sums of 16 products, 32 squares and 4 signed sums of them.
    assert many["mac:fp32*fp32"] == patches * 2 * (2 * 32 * 16 + 16)
    assert many["mul:fp32"] == patches * 2 * (2 * 32 + 16 + 2 * 4)
    assert many["add:fp32"] == patches * 2 * 2 * 32 * 4
    assert many["params"] == 4 * 60
    assert many["weight_bits"] == 32 * 4 * 32 * 16


@pytest.mark.parametrize(("readout", "noise"), [("z", None), ("z", NOISE), (["XXXX"], None)])
def test_stored_numbers_are_those_that_are_built(readout, noise):
    compiled = load_backend("fourier").compile(
        kernel("product", 4, encoding="amplitude", readout=readout, features=13), noise=noise
    )
    built = compiled._form.build(torch.zeros(3, compiled.circuit.n_weights))
    assert compiled.stored_numbers(3) == built.numel()


AGAIN = Circuit(2, (Gate("RX", (1,), (Angle("input", 2),)),), ("ZI",))


@pytest.mark.parametrize(
    ("circuit", "noise", "says"),
    [
        (
            kernel("product", 2, encoding="amplitude") + AGAIN,
            None,
            "RX 1 x[2]) reads a feature again (re-uploading): use 'statevector'",
        ),
        (kernel("product", 2, encoding="amplitude") + AGAIN, NOISE, "use 'statevector' (up to 10 wires) or 'qiskit'"),
        (kernel("product", 9, encoding="amplitude"), None, "up to 8 wires but the kernel has 9 wires"),
        (kernel("product", 9, encoding="amplitude"), NOISE, "use 'statevector' (up to 10 wires) or 'qiskit'"),
        (
            Circuit(1, (Gate("Amplitude", (0,), (Angle("input", 0), Angle("weight", 0))),), ("Z",)),
            None,
            "weights among the amplitudes",
        ),
    ],
)
def test_what_is_no_quadratic_form_is_refused_and_says_who_can(circuit, noise, says):
    with pytest.raises(Unsupported) as error:
        load_backend("fourier").compile(circuit, noise=noise)
    assert says in str(error.value)
