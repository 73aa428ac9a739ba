"""Backend "pennylane": every device with every differentiation, against matrices."""

from copy import deepcopy

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import circuits

from circuits import GATES, Angle, Channel, Circuit, Gate, NoiseModel, ReadoutError, kernel
from circuits.circuit import const
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.testing import check_backend

qml = pytest.importorskip("pennylane")

DEVICES = ("default.qubit", "lightning.qubit", "default.mixed")
OWN = {"default.qubit": ("backprop", "adjoint"), "lightning.qubit": ("adjoint",), "default.mixed": ("backprop",)}
METHODS = ("parameter-shift", "finite-diff", "best", None)
PAIRS = [(device, method) for device in DEVICES for method in (*OWN[device], *METHODS)]

# Features twice and scaled, a shared weight, a controlled rotation, a gate of three wires and three bases.
CIRCUIT = Circuit(
    3,
    (
        Gate("RY", (0,), (Angle("input", 0, np.pi),)),
        Gate("RX", (2,), (Angle("input", 1, 0.7, 0.2),)),
        Gate("Rot", (1,), (Angle("weight", 0), Angle("weight", 1, -0.5), const(0.4))),
        Gate("CCX", (0, 1, 2)),
        Gate("CRX", (2, 1), (Angle("weight", 0),)),
        Gate("RYY", (0, 2), (Angle("input", 0, -1.0),)),
    ),
    ("ZII", "XZY", "IXI"),
)
ROTATED = Circuit(1, (Gate("RY", (0,), (Angle("input", 0, np.pi),)),), ("Z",))
AMPLITUDE = kernel("basic_entangler", 2, 1, encoding="amplitude", features=3)


def draw_numbers(circuit, dtype=torch.float64, patches=3, filters=2):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


def errors(backend, circuit, dtype=torch.float64, **options):
    """Largest errors of values and of gradients for inputs and weights."""
    x, w = draw_numbers(circuit, dtype)
    rows = [[oracle.run(circuit, p.double().numpy(), f.double().numpy()) for f in w] for p in x]
    values, dx, dw = (np.array([[cell[k] for cell in row] for row in rows]) for k in range(3))
    x.requires_grad_(), w.requires_grad_()
    actual = simulate(circuit, x, w, backend=backend, **options)
    assert actual.dtype == dtype
    factors = np.linspace(0.5, 1.5, actual.numel()).reshape(actual.shape)
    if actual.requires_grad:  # not so for a circuit without features and weights
        (actual * torch.from_numpy(factors).to(dtype)).sum().backward()
    result = [np.abs(actual.detach().double().numpy() - values).max()]
    for gradient, slopes, equation in ((x.grad, dx, "pfo,pfok->pk"), (w.grad, dw, "pfo,pfok->fk")):
        want = np.einsum(equation, factors, slopes)
        got = 0 * want if gradient is None else gradient.double().numpy()
        result.append(np.abs(got - want).max(initial=0) / max(1, np.abs(want).max(initial=0)))
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("device", "method"), PAIRS)
@pytest.mark.parametrize("circuit", [CIRCUIT, AMPLITUDE], ids=["angles", "amplitudes"])
def test_every_device_differentiates_in_every_way(device, method, circuit, dtype):
    backend = load_backend("pennylane", device=device, diff_method=method)
    if circuit is AMPLITUDE and method == "adjoint":
        # Weights have their gradient, features a sentence.
        x, w = draw_numbers(circuit, dtype)
        gradients = []
        for way in (backend, "statevector"):
            b = w.clone().requires_grad_()
            gradients.append(torch.autograd.grad(simulate(circuit, x, b, backend=way).square().sum(), b)[0])
        torch.testing.assert_close(*gradients, atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=0)
        with pytest.raises(Unsupported, match="use diff_method 'backprop', 'parameter-shift' or 'best'"):
            simulate(circuit, x.requires_grad_(), w, backend=backend)
        return
    value, *gradients = errors(backend, circuit, dtype)
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    assert value < exact
    # Central differences: rounding over the step, 2^-53 / 6e-6, for sums of up to 18 values.
    assert max(gradients) < (1e-9 if method == "finite-diff" and dtype == torch.float64 else exact)


@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit"])
@settings(max_examples=6)
@given(circuit=circuits(max_wires=3))
def test_adjoint_of_any_circuit(device, circuit):
    assert max(errors(load_backend("pennylane", device=device, diff_method="adjoint"), circuit)) < 1e-10


@pytest.mark.parametrize(
    ("device", "method"), [("default.mixed", None), ("lightning.qubit", "best"), ("default.qubit", "parameter-shift")]
)
def test_conformance(device, method):
    assert len(check_backend(load_backend("pennylane", device=device, diff_method=method))) == 8


ANGLED = [name for name, spec in GATES.items() if spec.rotations]


@pytest.mark.parametrize(
    ("device", "method"),
    [("default.mixed", None), ("default.mixed", "best"), ("lightning.qubit", "adjoint"), ("default.qubit", "backprop")],
)
def test_every_gate_with_angles_has_its_gradient(device, method):
    # All in one circuit, an input each: a gradient that PennyLane loses on the way shows.
    angles = [Angle("input", k, 0.5 + 0.1 * k, 0.3) for k in range(sum(GATES[name].n_angles for name in ANGLED))]
    gates = [Gate("H", (0,)), Gate("CNOT", (0, 1))]
    for name in ANGLED:
        spec = GATES[name]
        gates += [
            Gate(name, (1, 0)[: spec.n_wires], tuple(angles.pop() for _ in range(spec.n_angles))),
            Gate("SX", (0,)),
        ]
    circuit = Circuit(2, tuple(gates), ("ZI", "XY"))
    assert max(errors(load_backend("pennylane", device=device, diff_method=method), circuit)) < 1e-10


@pytest.mark.parametrize("shots", [None, 100])
@pytest.mark.parametrize("device", DEVICES)
def test_best_is_what_pennylane_calls_best(device, shots):
    loaded = qml.device(device, wires=1)

    def function(angle):
        qml.RX(angle, wires=0)
        return qml.expval(qml.Z(0))

    node = qml.set_shots(qml.QNode(function, loaded, diff_method="best"), shots=shots)
    theirs = qml.workflow.get_best_diff_method(node)(0.3)
    ours = load_backend("pennylane", device=device, diff_method="best").compile(ROTATED, shots=shots)
    assert (ours._method or ours.differentiation.method) == theirs


@pytest.mark.parametrize(("device", "method"), PAIRS)
def test_two_layers_stack_and_train(device, method):
    def losses(backend):
        torch.manual_seed(0)
        options = {"kernel": "strongly_entangling", "depth": 1, "backend": backend, "dtype": torch.float64}
        net = torch.nn.Sequential(QuantumConv2d(1, 2, (1, 2), **options), QuantumConv2d(2, 2, 1, **options))
        images = torch.rand(1, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        optimizer, result = torch.optim.SGD(net.parameters(), lr=0.3), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = (net(images) - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result

    simulated = losses(load_backend("pennylane", device=device, diff_method=method))
    np.testing.assert_allclose(simulated, losses("statevector"), atol=1e-8 if method == "finite-diff" else 1e-10)
    assert simulated[-1] < simulated[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"diff_method": "parameter-shift"}, {"diff_method": "finite-diff", "step": 0.7}, {"diff_method": "spsa"}, {}],
    ids=lambda options: options.get("diff_method", "default"),
)
def test_shots_scatter_and_repeat_under_a_seed(device, options):
    circuit, shots = kernel("basic_entangler", 2, 1, readout=["ZI", "XY"]), 500
    backend = load_backend("pennylane", device=device, **options)
    x, w = draw_numbers(circuit, patches=4)
    results = []
    for seed in (1, 1, 2):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        values = simulate(circuit, a, b, backend=backend, shots=shots, seed=seed)
        results.append([values.detach(), *torch.autograd.grad(values.sum(), (a, b))])
    first, again, other = results
    for k in range(3):
        assert torch.equal(first[k], again[k])
        assert not torch.equal(first[k], other[k])
    exact = simulate(circuit, x, w, backend="statevector")
    ups = (first[0] + 1) / 2 * shots
    torch.testing.assert_close(ups, ups.round(), atol=1e-9, rtol=0)
    # 16 values: beyond 4.5 standard errors with probability 1e-4.
    assert ((first[0] - exact) / ((1 - exact**2) / shots).sqrt()).abs().max() < 4.5
    if options.get("diff_method") != "spsa":
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        dx, dw = torch.autograd.grad(simulate(circuit, a, b).sum(), (a, b))
        step = options.get("step", np.pi / 2)
        damped = np.sin(step) / step if "step" in options else 1.0
        # A slope is c (a - b) of two means of +-1 for every output: a variance of up to 2 c^2 / shots each.
        c = 0.5 if damped == 1 else 0.5 / step
        for got, want, terms, scale in ((first[1], dx, 2 * 2, np.pi), (first[2], dw, 4 * 2, 1.0)):
            sigma = scale * c * (2 * terms / shots) ** 0.5
            assert (got - damped * want).abs().max() < 4.5 * sigma


NOISE = NoiseModel(
    (("CNOT", Channel("depolarizing", 0.05)), ("RY", Channel("amplitude_damping", 0.2))),
    readout={0: ReadoutError(0.05, 0.15), 2: ReadoutError(0.1, 0.02)},
)
NOISY = kernel("strongly_entangling", 3, 1, readout=["ZII", "XYI", "IYZ", "XIX"])


def noisy_value(observable, x, w):
    """From the density matrix without readout error, by what is read on each wire."""
    gates = NoiseModel(NOISE.after)
    terms = {"": 1.0}
    for letter, error in zip(observable, ((0.05, 0.15), (0, 0), (0.1, 0.02)), strict=True):
        own = {"I": 1.0} if letter == "I" else {letter: 1 - sum(error), "I": error[1] - error[0]}
        terms = {text + p: a * b for text, a in terms.items() for p, b in own.items()}
    constant = terms.pop("III", 0.0)
    return constant + sum(
        a * oracle.run_noisy(NOISY.with_observables((text,)), x, w, gates)[0] for text, a in terms.items()
    )


@pytest.mark.parametrize("method", [None, "backprop", "parameter-shift"])
def test_noise_and_readout_errors_on_default_mixed(method):
    backend = load_backend("pennylane", device="default.mixed", diff_method=method)
    x, w = draw_numbers(NOISY, patches=2, filters=1)
    want = [[noisy_value(o, p.numpy(), w[0].numpy()) for o in NOISY.observables] for p in x]
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    values = simulate(NOISY, a, b, backend=backend, noise=NOISE)
    np.testing.assert_allclose(values[:, 0].detach(), want, atol=1e-10)
    gradients = torch.autograd.grad(values.square().sum(), (a, b))
    exact = [t.clone().requires_grad_() for t in (x, w)]
    theirs = torch.autograd.grad(simulate(NOISY, *exact, backend="fourier", noise=NOISE).square().sum(), exact)
    for ours, want in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, want, atol=1e-10, rtol=0)


def test_readout_errors_of_shots():
    x, w = draw_numbers(NOISY, patches=2, filters=1)
    backend = load_backend("pennylane", device="default.mixed")
    shots = 2000
    values = simulate(NOISY, x, w, backend=backend, noise=NOISE, shots=shots, seed=0)[:, 0].numpy()
    want = np.array([[noisy_value(o, p.numpy(), w[0].numpy()) for o in NOISY.observables] for p in x])
    assert np.abs((values - want) / np.sqrt((1 - want**2) / shots)).max() < 4.5


class Toy(qml.devices.Device):
    """Runs few gates, one row at a time."""

    def __init__(self, wires=None, gates=("RX", "RY", "RZ", "CNOT", "Hadamard", "GlobalPhase"), name="toy.qubit"):
        super().__init__(wires=wires)
        self._gates, self._name, self.rows = gates, name, 0

    @property
    def name(self):
        return self._name

    def preprocess_transforms(self, execution_config=None):
        program = qml.CompilePipeline()
        program.add_transform(
            qml.devices.preprocess.decompose, stopping_condition=lambda op: op.name in self._gates, name=self.name
        )
        return program

    def execute(self, circuits, execution_config=None):
        assert all(circuit.batch_size is None for circuit in circuits)
        self.rows += len(circuits)
        return qml.device("default.qubit").execute(circuits)


@pytest.mark.parametrize("method", [None, "parameter-shift", "best"])
def test_a_device_object_without_batches(method):
    device = Toy()
    backend = load_backend("pennylane", device=device, diff_method=method)
    # Gates that it lacks are taken apart by PennyLane.
    assert max(errors(backend, CIRCUIT)) < 1e-10
    assert device.rows > 6


@pytest.mark.parametrize("method", [None, "adjoint"])
def test_a_device_object_with_labels_of_its_own(method):
    device = qml.device("lightning.qubit", wires=["a", 0, "c", 7])
    assert max(errors(load_backend("pennylane", device=device, diff_method=method), CIRCUIT)) < 1e-10


def test_a_layer_on_a_device_object_can_be_copied():
    layer = QuantumConv2d(1, 2, (1, 2), backend=load_backend("pennylane", device=qml.device("default.qubit", wires=2)))
    images = torch.rand(1, 1, 2, 3)
    assert torch.equal(deepcopy(layer)(images), layer(images))


def test_a_gate_that_a_device_lacks_is_named_with_its_position():
    device = Toy(gates=("RX", "CNOT"))
    with pytest.raises(Unsupported, match=r"'toy.qubit' has no gate RY, which is gate 1 on wires \(2,\), and"):
        load_backend("pennylane", device=device).compile(
            Circuit(3, (Gate("RX", (0,), (const(0.3),)), Gate("RY", (2,), (const(0.3),))), ("ZII",))
        )


CLIFFORD = (
    *("Identity", "PauliX", "PauliY", "PauliZ", "Hadamard", "S", "Adjoint(S)", "SX", "Adjoint(SX)", "CNOT", "SWAP"),
    *("ISWAP", "Adjoint(ISWAP)", "CY", "CZ", "GlobalPhase"),
)


def default_clifford(wires):
    pytest.importorskip("stim")
    return qml.device("default.clifford", wires=wires)


CLIFFORD_DEVICES = [
    pytest.param(lambda wires: Toy(wires, CLIFFORD, "default.clifford"), id="its gates"),
    pytest.param(default_clifford, id="default.clifford"),
]


@pytest.mark.parametrize("device", CLIFFORD_DEVICES)
def test_clifford_devices_run_quarter_turns(device):
    sources = [Angle("input", k, np.pi / 2) for k in range(4)]
    circuit = Circuit(
        3,
        (
            Gate("RX", (0,), (sources[0],)),
            Gate("Rot", (1,), tuple(sources[:3])),
            Gate("RYY", (2, 0), (sources[3],)),
            Gate("ISWAP", (0, 1)),
            Gate("RZX", (1, 2), (sources[1],)),
            Gate("CP", (0, 2), (Angle("weight", 0, np.pi),)),
            Gate("CRY", (2, 1), (Angle("weight", 1, np.pi),)),
        ),
        ("ZII", "XYI", "IZX", "YYY"),
    )
    rng = np.random.default_rng(0)
    x, w = (torch.from_numpy(rng.integers(-3, 4, shape).astype(float)) for shape in ((25, 4), (2, 2)))
    want = np.array([[oracle.run(circuit, p.numpy(), f.numpy())[0] for f in w] for p in x])
    values = simulate(circuit, x, w, backend=load_backend("pennylane", device=device(3)))
    np.testing.assert_allclose(values, want, atol=1e-12)
    assert all(np.any(want[..., k]) for k in range(4))
    # Quarter turns in single precision are off by its rounding.
    single = simulate(circuit, x.float(), w.float(), backend=load_backend("pennylane", device=device(3)))
    np.testing.assert_allclose(single, want, atol=1e-6)


@pytest.mark.parametrize("device", CLIFFORD_DEVICES)
def test_quarter_turns_have_gradients_by_quarter_turns(device):
    circuit = kernel("basic_entangler", 2, 1, readout=["ZI", "ZZ"])
    x = torch.tensor([[0.0, 1.0], [0.5, 1.5], [-0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.0, np.pi]], dtype=torch.float64, requires_grad=True)
    results = []
    for backend in (load_backend("pennylane", device=device(2)), "statevector"):
        values = simulate(circuit, x, w, backend=backend)
        results.append([values.detach(), *torch.autograd.grad(values.sum(), (x, w))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)
    assert results[0][1].abs().max() > 1


def test_only_states_that_are_computed_are_counted():
    pytest.importorskip("stim")
    pytest.importorskip("quimb")
    circuit = kernel("basic_entangler", 24, 1)

    def counts(name, **options):
        return load_backend(name, **options).compile(circuit).counts(3, 2)

    assert not any(key.startswith("mac") for key in counts("pennylane", device="default.clifford"))
    for bond in (None, 2):
        tensor = counts("pennylane", device="default.tensor", **({} if bond is None else {"max_bond_dim": bond}))
        assert tensor == counts("tensor_network", method="mps", max_bond=bond)
        assert tensor["mac:fp32*fp32"] < 1e-3 * counts("pennylane")["mac:fp32*fp32"]


def test_default_tensor():
    pytest.importorskip("quimb")
    backend = load_backend("pennylane", device="default.tensor", diff_method="best")
    assert max(errors(backend, CIRCUIT)) < 1e-10


def test_large_images_go_in_chunks(monkeypatch):
    import qconv.backends.pennylane as module

    x, w = draw_numbers(CIRCUIT, patches=5)
    for device in ("default.qubit", "lightning.qubit"):
        whole = simulate(CIRCUIT, x, w, backend=load_backend("pennylane", device=device))
        monkeypatch.setattr(module, "CALL_BYTES", 3 * 16 * 8)
        monkeypatch.setattr(module, "TAPES_A_CALL", 3)
        parts = simulate(CIRCUIT, x, w, backend=load_backend("pennylane", device=device))
        monkeypatch.undo()
        torch.testing.assert_close(parts, whole, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("device", "method"), [*PAIRS, ("default.qubit", "spsa")])
def test_nan_stays_in_its_row(device, method):
    circuit = kernel("heisenberg", 2, 1)
    x, w = draw_numbers(circuit)
    x[1, 0] = torch.nan
    values = simulate(circuit, x, w, backend=load_backend("pennylane", device=device, diff_method=method))
    assert values[1].isnan().any()
    assert values[[0, 2]].isfinite().all()


def load(**options):
    return load_backend("pennylane", **options)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load(diff_method="adjoined"), "did you mean 'adjoint'"),
        (lambda: load(device=3), "device is a int"),
        (lambda: load(device="default.qubit", shots=10), "give shots=... to the layer"),
        (lambda: load(device=qml.device("default.qubit", wires=1), seed=3), "options ['seed']"),
        (lambda: load(samples=3), "samples is 3"),
        (lambda: load(diff_method="spsa", samples=0), "samples is 0"),
        (lambda: load(device="lightning.qubit", diff_method="backprop").compile(ROTATED), "choose from adjoint, par"),
        (lambda: load(device="default.mixed", diff_method="adjoint").compile(ROTATED), "choose from backprop, par"),
        (
            lambda: load(device="default.mixed", diff_method="backprop").compile(
                Circuit(1, (Gate("P", (0,), (Angle("weight", 0),)),), ("X",))
            ),
            "no diff_method 'backprop' through gates P or U3: choose from parameter-shift",
        ),
        (lambda: load(diff_method="adjoint").compile(ROTATED, shots=10), "'adjoint' with shots=10: choose from param"),
        (lambda: load(diff_method="backprop").compile(ROTATED, shots=10), "'backprop' with shots=10"),
        (
            lambda: simulate(
                ROTATED, torch.ones(1, 1), torch.ones(0), backend=load(diff_method="finite-diff"), shots=10
            ),
            "such as step=0.5",
        ),
        (lambda: load().compile(ROTATED, shots=0), "shots is 0"),
        (lambda: load(device="no.device").compile(ROTATED), "does not load"),
        (lambda: load(device=qml.device("default.qubit", wires=2)).compile(CIRCUIT), "has 3 wires but device"),
        (
            lambda: load(device=qml.device("default.qubit", wires=1)).compile(ROTATED, shots=5, seed=1),
            "seed is 1 for shots of a device object",
        ),
        (lambda: load(device="default.tensor").compile(ROTATED, shots=5), "'default.tensor' gives exact values"),
        (lambda: load().compile(CIRCUIT, noise=NOISE), "device='default.mixed'"),
        (lambda: load(device="default.mixed").compile(ROTATED, noise=NOISE), "names wire"),
        (lambda: load().compile(Circuit(60, (), ("Z" * 60,))), "takes 18,446,744,073,709,551,616 bytes"),
        (
            lambda: simulate(
                ROTATED, torch.ones(1, 1) / 3, torch.ones(0), backend=load(device=Toy(1, CLIFFORD, "default.clifford"))
            ),
            "gate 0 (RY on wires (0,)) has the angle 1.0472",
        ),
        (
            lambda: load(device=Toy(3, CLIFFORD, "default.clifford")).compile(
                Circuit(3, (Gate("RY", (0,), (Angle("input", 0),)), Gate("CCX", (0, 1, 2))), ("ZII",))
            ),
            "has no gate CCX, which is gate 1",
        ),
        (
            lambda: load(device=Toy(2, CLIFFORD, "default.clifford")).compile(AMPLITUDE),
            "amplitude encoding prepares no stabilizer state",
        ),
    ],
)
def test_errors_say_what_works(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)
