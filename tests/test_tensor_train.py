import copy
import pickle

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from strategies import circuits

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv.backends.fourier import FourierCompiled
from qconv.backends.protocol import Compiled, Unsupported
from qconv.backends.statevector import StatevectorCompiled
from qconv.backends.sums import ONE, Sums, TooMany
from qconv.backends.tensor_train import TrainCompiled

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def evaluate(compiled, circuit, dtype=torch.float64, patches=5, filters=2, weights=None):
    """Values and both gradients of a weighted sum of them."""
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype).requires_grad_()
    w = rng.normal(size=(filters, circuit.n_weights)) if weights is None else weights
    w = torch.from_numpy(w).to(dtype).requires_grad_()
    y = compiled(x, w)
    assert y.shape == (patches, filters, len(circuit.observables))
    assert y.dtype == dtype
    total = (y * torch.linspace(0.5, 1.5, y.numel(), dtype=dtype).reshape(y.shape)).sum()
    if total.requires_grad:
        total.backward()
    return [t.double() for t in (y.detach(), *(torch.zeros_like(v) if v.grad is None else v.grad for v in (x, w)))]


def agree(circuit, reference, dtype=torch.float64, noise=None, **numbers):
    train = TrainCompiled(circuit, noise)
    want = evaluate(reference, circuit, **numbers)
    # In compiled loops where the fast extra is installed, and in torch operations.
    for function in (train, train.plain):
        for a, b in zip(evaluate(function, circuit, dtype, **numbers), want, strict=True):
            scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(a, b, atol=TOLERANCE[dtype] * scale, rtol=0)
    return train


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "wires", "depth"),
    [
        *(
            (name, wires, 1)
            for name in ("heisenberg", "strongly_entangling", "random", "product")
            for wires in (1, 2, 5)
        ),
        *((name, 7, 2) for name in ("strongly_entangling", "basic_entangler", "random")),
        ("basic_entangler", 5, 3),
        ("random", 7, 3),
        ("strongly_entangling", 2, 3),
        ("strongly_entangling", 7, 3),
        ("heisenberg", 2, 2),
    ],
)
def test_named_kernels_agree_with_all_coefficients(name, wires, depth, dtype):
    circuit = kernel(name, wires, depth)
    agree(circuit, FourierCompiled(circuit, None), dtype)


@pytest.mark.parametrize(
    ("name", "wires", "depth"), [("strongly_entangling", 11, 2), ("strongly_entangling", 8, 3), ("heisenberg", 10, 1)]
)
def test_many_wires_agree_with_the_statevector(name, wires, depth):
    circuit = kernel(name, wires, depth)
    agree(circuit, StatevectorCompiled(circuit), patches=3, filters=1)


@settings(max_examples=60)
@given(circuit=circuits(product_encoding=True, max_wires=4))
def test_any_shallow_product_encoded_circuit(circuit):
    try:
        train = TrainCompiled(circuit, None)
    except Unsupported:
        assume(False)
    reference = FourierCompiled(circuit, None)
    for a, b in zip(evaluate(train, circuit), evaluate(reference, circuit), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10 * max(1.0, float(b.abs().max()) if b.numel() else 1.0), rtol=0)


def test_values_are_the_oracles():
    circuit = kernel("strongly_entangling", 5, 2, readout=["ZIIII", "XIYIZ", "IYYII"])
    rng = np.random.default_rng(0)
    x, w = rng.uniform(-1, 1, 5), rng.normal(size=circuit.n_weights)
    values, dx, dw = oracle.run(circuit, x, w)
    a, b = torch.from_numpy(x[None]).requires_grad_(), torch.from_numpy(w[None]).requires_grad_()
    y = TrainCompiled(circuit, None)(a, b)
    np.testing.assert_allclose(y[0, 0].detach(), values, atol=1e-12)
    for k in range(3):
        gx, gw = torch.autograd.grad(y[0, 0, k], (a, b), retain_graph=True)
        np.testing.assert_allclose(gx[0], dx[k], atol=1e-11)
        np.testing.assert_allclose(gw[0], dw[k], atol=1e-11)


@pytest.mark.parametrize("name", ["strongly_entangling", "heisenberg", "basic_entangler"])
def test_weights_at_zero_have_the_right_gradient(name):
    # Ranks drop there: decompositions at each call would have no derivative.
    circuit = kernel(name, 4, 1 if name == "heisenberg" else 2)
    agree(circuit, FourierCompiled(circuit, None), weights=np.zeros((2, circuit.n_weights)))


NOISE = NoiseModel(
    (
        ("CNOT", Channel("depolarizing", 0.05)),
        ("Rot", Channel("amplitude_damping", 0.1)),
        ("*", Channel("phase_damping", 0.02)),
    )
)


@pytest.mark.parametrize("noise", [NOISE, NoiseModel((("*", Channel("bit_flip", 0.1)),))])
def test_noise_that_does_not_depend_on_data(noise):
    circuit = kernel("strongly_entangling", 4, 2, readout=["ZIII", "IXIZ", "YYII"])
    agree(circuit, FourierCompiled(circuit, noise), noise=noise)


def test_full_amplitude_damping_has_no_inverse():
    noise = NoiseModel((("RX", Channel("amplitude_damping", 1.0)),))
    circuit = kernel("basic_entangler", 4, 2)
    agree(circuit, FourierCompiled(circuit, noise), noise=noise)


@pytest.mark.parametrize("encoding", ["angle", "angle_x", "angle_z"])
def test_encodings(encoding):
    circuit = kernel("strongly_entangling", 4, 2, encoding=encoding, readout=["ZIII", "IXIZ"])
    agree(circuit, FourierCompiled(circuit, None))


def test_gates_between_distant_wires_and_unused_wires():
    w = [Angle("weight", k) for k in range(6)]
    gates = (
        *(Gate("RY", (k,), (Angle("input", k, 2.0),)) for k in (0, 2, 3)),
        Gate("RX", (4,), (w[0],)),
        Gate("CRY", (4, 1), (w[1],)),
        Gate("RXX", (0, 4), (w[2],)),
        Gate("SWAP", (1, 3)),
        Gate("RY", (3,), (w[3],)),
        Gate("CNOT", (3, 0)),
        Gate("RZ", (0,), (w[4],)),
        Gate("RX", (0,), (w[5],)),
    )
    circuit = Circuit(5, gates, ("ZIIII", "IIXII", "XIIZY", "IIIIZ"))
    agree(circuit, FourierCompiled(circuit, None))


def macs(train):
    return train.counts(1, 1)["mac:fp32*fp32"]


def test_work_grows_like_wires_and_not_like_coefficients():
    few, many = (
        TrainCompiled(kernel("strongly_entangling", wires, 2, readout=["ZZ" + "I" * (wires - 2)]), None)
        for wires in (12, 24)
    )
    assert macs(many) < 2.5 * macs(few)
    # 3^9 coefficients for each of nine outputs.
    assert macs(TrainCompiled(kernel("strongly_entangling", 9, 2), None)) < 3**9 * 9 / 300


def test_observables_share_work():
    first = ["I" * k + "Z" + "I" * (24 - k) for k in range(5)]
    few, every = (
        TrainCompiled(kernel("strongly_entangling", 25, 2, readout=readout), None) for readout in (first, "z")
    )
    assert macs(every) / 25 < 0.6 * macs(few) / 5


@pytest.mark.parametrize(
    ("wires", "message"),
    [
        (8, "8 wires or .* backend 'fourier' with all coefficients"),
        (12, "12 wires or .* use fewer layers, or backend 'sta"),
    ],
)
def test_too_much_is_refused(wires, message):
    with pytest.raises(Unsupported, match=message):
        TrainCompiled(kernel("heisenberg", wires, 3), None)


def test_chunks_and_checkpoints_change_nothing(monkeypatch):
    import qconv.backends.tensor_train as module

    circuit = kernel("strongly_entangling", 6, 2)
    train = TrainCompiled(circuit, None).plain
    whole = evaluate(train, circuit, patches=9000)
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 2**10)
    for a, b in zip(evaluate(train, circuit, patches=9000), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-12)


def test_second_derivatives():
    circuit = kernel("strongly_entangling", 3, 2)
    train = TrainCompiled(circuit, None)
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(1, circuit.n_weights, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(train, (x, w))


def test_protocol_copies_and_inference_mode():
    circuit = kernel("strongly_entangling", 5, 2)
    train = TrainCompiled(circuit, None)
    assert isinstance(train, Compiled)
    with torch.inference_mode():
        train(torch.zeros(1, 5), torch.zeros(1, circuit.n_weights))
    expected = evaluate(train, circuit, torch.float32)
    for copied in (copy.deepcopy(train), pickle.loads(pickle.dumps(train))):
        for a, b in zip(evaluate(copied, circuit, torch.float32), expected, strict=True):
            assert torch.equal(a, b)
    assert train(torch.zeros(0, 5), torch.zeros(3, circuit.n_weights)).shape == (0, 3, 5)


def test_counts_say_what_runs():
    circuit = kernel("strongly_entangling", 12, 2)
    train = TrainCompiled(circuit, None)
    program, counts = train._contraction.patches, train.counts(10, 2)
    assert counts["mac:fp32*fp32"] == 10 * 2 * sum(len(terms) for terms in program.sums)
    assert counts["device:gates_2q"] == 10 * 2 * 24
    assert train.stored_numbers(2) == train.coefficients(torch.zeros(2, circuit.n_weights)).numel()


def test_equal_sums_are_one():
    factors = Sums(100)
    sums = Sums(100, factors)
    sine, cosine = sums.wave((0, 1.0, 0.0))
    weight, _ = factors.wave((0, 1.0, 0.0))
    one = sums.add([(2.0, weight, sine, cosine), (4.0, weight, cosine, ONE)])
    other = sums.add([(-2.0, ONE, cosine, ONE), (-1.0, ONE, cosine, sine)])
    assert one == (4.0, weight, other[2])
    assert other[:2] == (-2.0, ONE)
    # Terms with equal operands are added up, and what is left of nothing is nothing.
    assert sums.add([(1.0, ONE, sine, ONE), (-1.0, ONE, ONE, sine)]) is None
    number, factor, place = sums.add([(1.0, ONE, sine, ONE), (1.0, weight, sine, ONE)])
    assert (number, place) == (1.0, sine)
    assert factors.cost(factor) == 3


def test_a_list_of_sums_has_a_limit():
    sums = Sums(4)
    sine, cosine = sums.wave((0, 1.0, 0.0))
    sums.add([(1.0, ONE, sine, cosine)])
    with pytest.raises(TooMany):
        sums.add([(1.0, ONE, sine, sine)])
