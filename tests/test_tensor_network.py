import random

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import circuits

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends import chains, tensor_network
from qconv.backends.matrix_products import Chain
from qconv.backends.networks import contractions, distinct, largest, light_cone, merge

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CONTRACTION = load_backend("tensor_network", method="contraction")
MPS = load_backend("tensor_network", method="mps")


def draw(circuit, patches=3, filters=2, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


def with_gradients(backend, circuit, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    values = simulate(circuit, x, w, backend=backend)
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)
    if not values.requires_grad:  # neither features nor weights
        return values, torch.zeros_like(x), torch.zeros_like(w)
    (values * factors).sum().backward()
    return values.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (x, w))


def agree_with_oracle(backend, circuit, dtype):
    x, w = draw(circuit, dtype=dtype)
    rows = [[oracle.run(circuit, p.double().numpy(), f.double().numpy()) for f in w] for p in x]
    values, dx, dw = (np.array([[cell[k] for cell in row] for row in rows]) for k in range(3))
    factors = np.linspace(0.5, 1.5, values.size).reshape(values.shape)
    wanted = values, np.einsum("pfo,pfok->pk", factors, dx), np.einsum("pfo,pfok->fk", factors, dw)
    for got, want in zip(with_gradients(backend, circuit, x, w), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * max(1, np.abs(want).max(initial=0)))


def agree(one, other, circuit, x, w, tolerance):
    pairs = zip(with_gradients(one, circuit, x, w), with_gradients(other, circuit, x, w), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, atol=tolerance * max(1.0, float(want.abs().max())), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=15, deadline=None)
@given(circuit=circuits(max_wires=4))
def test_contraction_agrees_with_the_oracle(circuit, dtype):
    agree_with_oracle(CONTRACTION, circuit, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=5, deadline=None)
@given(circuit=circuits(max_wires=4))
def test_matrix_product_states_agree_with_the_oracle(circuit, dtype):
    agree_with_oracle(MPS, circuit, dtype)


@pytest.mark.parametrize("backend", [CONTRACTION, MPS], ids=["contraction", "mps"])
def test_amplitudes_enter(backend):
    agree_with_oracle(backend, kernel("basic_entangler", 3, 1, encoding="amplitude"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "wires", "depth"), [("heisenberg", 6, 3), ("strongly_entangling", 10, 1)])
def test_contraction_is_the_state_vector(name, wires, depth, dtype):
    circuit = kernel(name, wires, depth)
    agree(CONTRACTION, "statevector", circuit, *draw(circuit, dtype=dtype), TOLERANCE[dtype])


def test_twelve_wires_and_deep():
    circuit = kernel("heisenberg", 12, 4)
    x, w = draw(circuit, patches=2, filters=1)
    # Of its own accord it takes the order of the state vector, which all observables share.
    assert load_backend("tensor_network").compile(circuit).counts(4, 1) == load_backend("statevector").compile(
        circuit
    ).counts(4, 1)
    want = simulate(circuit, x, w, backend="statevector")
    for backend in ("tensor_network", MPS):
        torch.testing.assert_close(simulate(circuit, x, w, backend=backend), want, atol=1e-10, rtol=0)
    assert load_backend("tensor_network").compile(circuit).truncation_error.value_error == 0


def test_fifty_wires_against_the_train_of_sums():
    circuit = kernel("strongly_entangling", 50, 1, readout=["I" * k + "ZX" + "I" * (48 - k) for k in (0, 25, 48)])
    agree("tensor_network", "fourier", circuit, *draw(circuit), 1e-10)


def test_fifty_wires_of_the_default_kernel():
    # Values against matrix product states, slopes against differences.
    circuit = kernel("heisenberg", 50, 1, readout=["Z" + 49 * "I", 30 * "I" + "XY" + 18 * "I"])
    x, w = draw(circuit, filters=1)
    values, dx, dw = with_gradients("tensor_network", circuit, x, w)
    state = load_backend("tensor_network", max_bond=16).compile(circuit)
    torch.testing.assert_close(state(x, w), values, atol=1e-10, rtol=0)
    assert state.truncation_error.max_bond <= 16
    assert state.truncation_error.discarded < 1e-25
    factors, step = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64).reshape(values.shape), 1e-5
    u, v = draw(circuit, filters=1, seed=1)
    ends = [simulate(circuit, x + s * u, w + s * v) for s in (step, -step)]
    slope = float((factors * (ends[0] - ends[1])).sum() / (2 * step))
    assert abs(slope - float((dx * u).sum() + (dw * v).sum())) < 1e-7 * max(1, abs(slope))


@pytest.mark.parametrize(("name", "wires"), [("ttn", 64), ("mps", 60)])
def test_light_cones_leave_the_rest_out(name, wires):
    circuit = kernel(name, wires, 1)
    blocks = merge(circuit)
    cone, _ = light_cone(blocks, circuit.observables[0])
    assert len(cone) < 10 < len(blocks)
    x, w = draw(circuit)
    values = simulate(circuit.with_observables(circuit.observables[:1]), x, w, backend="tensor_network")
    assert values.shape == (3, 2, 1)
    assert values.abs().max() <= 1 + 1e-12


def test_what_depends_on_the_weights_alone_is_contracted_once():
    circuit = kernel("heisenberg", 8, 2)
    counts = [CONTRACTION.compile(circuit).counts(patches, 1)["mac:fp32*fp32"] for patches in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] < counts[0]


def test_observables_share_tensors():
    circuit = kernel("heisenberg", 30, 1)
    parts = contractions(circuit, merge(circuit), float("inf"), search=False)
    assert len(distinct(parts)) < sum(len(part.steps) for part in parts) / 3
    assert largest(distinct(parts)) <= 2**8


def test_the_search_leaves_the_users_random_numbers_alone():
    circuit = kernel("heisenberg", 8, 4)
    random.seed(3)
    before = random.getstate()
    search = contractions(circuit, merge(circuit), float("inf"), search=True)
    assert random.getstate() == before
    again = contractions(circuit, merge(circuit), float("inf"), search=True)
    assert [part.steps for part in search] == [part.steps for part in again]


@pytest.mark.parametrize("kept", [2**6, 2**10, 2**14])
def test_chunks_and_recomputation_change_nothing(monkeypatch, kept):
    circuit = kernel("heisenberg", 5, 1, readout=["ZIIII", "IIIIX", "IXIYI"])
    x, w = draw(circuit, patches=40)
    want = with_gradients(CONTRACTION, circuit, x, w)
    monkeypatch.setattr(tensor_network, "KEPT_NUMBERS", kept)
    monkeypatch.setattr(chains, "CHUNK_NUMBERS", kept)
    for got, exact in zip(with_gradients(CONTRACTION, circuit, x, w), want, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-11, rtol=0)
    torch.testing.assert_close(simulate(circuit, x, w, backend=MPS), want[0], atol=1e-11, rtol=0)


def bell(angle):
    return Circuit(
        2, (Gate("RY", (0,), (Angle("const", 0, 1.0, angle),)), Gate("CNOT", (0, 1))), ("ZI", "ZZ", "XX", "YY")
    )


def test_a_cut_bell_state_loses_its_smaller_schmidt_coefficient():
    angle = 1.1
    cut = load_backend("tensor_network", max_bond=1).compile(bell(angle))
    values = cut(torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64))[0, 0]
    torch.testing.assert_close(values, torch.tensor([1, 1, 0, 0], dtype=torch.float64))
    error = cut.truncation_error
    assert error.discarded == pytest.approx(np.sin(angle / 2) ** 2, abs=1e-14)
    assert error.fidelity == pytest.approx(np.cos(angle / 2) ** 2, abs=1e-14)
    assert error.value_error == pytest.approx(2 * np.sin(angle / 2), abs=1e-14)
    assert error.max_bond == 1
    # A cutoff above that weight does the same, one below it nothing.
    none = torch.zeros(1, 0, dtype=torch.float64)
    for cutoff, bond in ((error.discarded + 1e-6, 1), (error.discarded - 1e-6, 2)):
        compiled = load_backend("tensor_network", cutoff=cutoff).compile(bell(angle))
        compiled(none, none)
        assert compiled.truncation_error.max_bond == bond


@pytest.mark.parametrize("options", [{"max_bond": 6}, {"max_bond": 4}, {"cutoff": 1e-3}])
def test_values_stay_within_the_reported_error(options):
    circuit = kernel("heisenberg", 8, 2)
    x, w = draw(circuit, patches=2)
    w = 0.3 * w
    compiled = load_backend("tensor_network", **options).compile(circuit)
    worst = float((compiled(x, w) - simulate(circuit, x, w, backend="statevector")).abs().max())
    assert 1e-9 < worst < compiled.truncation_error.value_error < 2
    assert 0 < compiled.truncation_error.discarded < 1
    assert "discarded weight" in str(compiled.truncation_error)


def test_what_a_row_gives_does_not_depend_on_its_batch():
    circuit = kernel("heisenberg", 6, 2)
    x, w = draw(circuit, patches=5)
    compiled = load_backend("tensor_network", cutoff=1e-3).compile(circuit)
    alone = torch.cat([compiled(row[None], w) for row in x])
    torch.testing.assert_close(compiled(x, w), alone, atol=1e-12, rtol=0)


def test_entanglers_at_zero_learn():
    # Where nothing is entangled yet, singular values are 0 and have no derivative; a parameter shift does.
    circuit = kernel("heisenberg", 4, 1, readout=["XYII", "IIZZ"])
    x, w = draw(circuit)
    w[:, 12:24] = 0
    agree(load_backend("tensor_network", max_bond=4), "statevector", circuit, x, w, 1e-10)


def test_shots_stay_within_the_binomial_bound():
    circuit = kernel("strongly_entangling", 4, readout=["ZIII", "IZZI", "XIIY", "IIXI"])
    x, w = draw(circuit, patches=12)
    shots, exact = 400, simulate(circuit, x, w, backend="statevector")
    backend = load_backend("tensor_network")
    sampled = simulate(circuit, x, w, backend=backend, shots=shots, seed=7)
    ups = (sampled + 1) / 2 * shots
    torch.testing.assert_close(ups, ups.round(), atol=1e-6, rtol=0)
    z = (sampled - exact) / ((1 - exact**2) / shots).sqrt()
    # 96 values: p < 1e-3 for one of them beyond 4.5 standard errors.
    assert 1 < z.abs().max() < 4.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / 96) ** 0.5
    first, again = (backend.compile(circuit, shots=50, seed=5) for _ in range(2))
    one, two = first(x, w), first(x, w)
    assert torch.equal(one, again(x, w))
    assert not torch.equal(one, two)


def test_shots_are_drawn_in_chunks_that_fit_the_bonds(monkeypatch):
    circuit = kernel("basic_entangler", 30, 1, readout=["Z" * 30, "XX" + "I" * 28])
    x, w = draw(circuit, patches=16, filters=1)
    drawn, sample = [], Chain.sample

    def watched(self, basis, shots, generator):
        drawn.append((len(self.sites[0]), shots, self.bond))
        return sample(self, basis, shots, generator)

    monkeypatch.setattr(Chain, "sample", watched)
    compiled = load_backend("tensor_network").compile(circuit, shots=100, seed=0)
    compiled(x, w)
    # One chunk for both settings each: bonds of a ring of CNOTs are at most 4, not 2^15.
    assert [size[:2] for size in drawn] == [(16, 100)] * 2
    assert max(bond for *_, bond in drawn) <= 4
    monkeypatch.setattr(chains, "CHUNK_NUMBERS", 2**12)
    drawn.clear()
    values = compiled(x, w)
    assert len(drawn) > 32
    assert all(rows * (shots * (30 + 4 * bond)) <= 2**12 for rows, shots, bond in drawn)
    assert sum(rows * shots for rows, shots, _ in drawn) == 2 * 16 * 100
    ups = (values + 1) / 2 * 100
    torch.testing.assert_close(ups, ups.round(), atol=1e-6, rtol=0)
    # However many shots are asked, no more are held; a memory that does not hold one is refused.
    load_backend("tensor_network").compile(circuit, shots=10**12)
    needed = 16 * compiled._numbers
    monkeypatch.setattr(chains, "machine_memory", lambda: needed)
    load_backend("tensor_network", method="mps").compile(circuit)
    with pytest.raises(Unsupported, match=f"but this machine has {needed:,}"):
        load_backend("tensor_network").compile(circuit, shots=1)


def test_shots_of_one_state_are_correlated():
    # Of a Bell state, ZZ is 1 in every shot, and so are both bits together.
    backend = load_backend("tensor_network")
    none = torch.zeros(1, 0)
    values = backend.compile(bell(np.pi / 2), shots=64, seed=0)(none, none)[0, 0]
    assert values[1] == 1
    assert values[2] == 1
    assert values[3] == -1
    assert abs(values[0]) < 5 / 8


def test_not_a_number_stays_in_its_row():
    circuit = kernel("heisenberg", 3)
    x, w = draw(circuit)
    x[1, 0] = torch.nan
    for backend in (CONTRACTION, MPS):
        values = simulate(circuit, x, w, backend=backend)
        assert values[1].isnan().any()
        assert values[[0, 2]].isfinite().all()


def test_refusals_say_bytes_and_who_can(monkeypatch):
    noise = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
    with pytest.raises(ValueError, match="no noise: use backend 'fourier'"):
        CONTRACTION.compile(kernel("strongly_entangling", 3), noise=noise)
    with pytest.raises(ValueError, match="use method 'mps'"):
        CONTRACTION.compile(kernel("strongly_entangling", 3), shots=10)
    for module in (tensor_network, chains):
        monkeypatch.setattr(module, "machine_memory", lambda: 1e4)
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes a patch but this machine has 10,000: .*max_bond"):
        CONTRACTION.compile(kernel("heisenberg", 13, 3))
    with pytest.raises(ValueError, match=r"takes up to [\d,]+ bytes .* machine has 10,000: .*smaller"):
        MPS.compile(kernel("heisenberg", 13, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mpo"}, "unknown method 'mpo'"),
        ({"max_bond": 0}, "max_bond is 0"),
        ({"cutoff": 1.0}, r"cutoff is 1.0: give a weight in \[0, 1\)"),
        ({"method": "contraction", "max_bond": 4}, "discards nothing"),
        ({"bond": 4}, "does not take the options"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_backend("tensor_network", **options)


def test_a_layer_says_what_it_lost():
    torch.manual_seed(0)
    layer = QuantumConv2d(1, 4, 2, depth=3, backend=load_backend("tensor_network", max_bond=2))
    with torch.no_grad():
        layer.weight.normal_()
    layer(torch.rand(1, 1, 3, 3)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.truncation_error.discarded > 0
    assert QuantumConv2d(1, 4, 2).truncation_error is None
    assert "device:circuits" in layer.counts((1, 3, 3))


def test_auto_contracts_what_nothing_else_can_run():
    layer = QuantumConv2d(
        1, 1, 5, kernel="real_amplitudes", reupload=True, depth=2, readout=["Z" + 24 * "I"], dtype=torch.float64
    )
    assert layer.backend.startswith("tensor_network")
    images = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    state = QuantumConv2d(
        1,
        1,
        5,
        kernel="real_amplitudes",
        reupload=True,
        depth=2,
        readout=["Z" + 24 * "I"],
        backend=load_backend("tensor_network", max_bond=16),
        dtype=torch.float64,
    )
    state.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(images), state(images), atol=1e-10, rtol=0)
    assert state.truncation_error.discarded < 1e-20
    assert layer.counts((1, 5, 6))["mac:fp32*fp32"] > 0
