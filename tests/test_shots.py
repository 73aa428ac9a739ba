"""Shots on exact backends: bitstrings, their joint statistics, seeds, gradients, and layers whose shots change."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import Angle, Channel, Circuit, Gate, KrausChannel, NoiseModel, ReadoutError, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends import outcomes, sampling
from qconv.backends.outcomes import Setting, draw_values
from qconv.testing import check_layer

EXACT = ["fourier", "statevector"]
NOISE = NoiseModel(
    (("CNOT", Channel("depolarizing", 0.05)), ("*", Channel("amplitude_damping", 0.05))),
    readout={0: ReadoutError(0.02, 0.1), 2: ReadoutError(0.0, 0.05)},
)


def draw_numbers(circuit, patches=3, filters=2, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    w = torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)
    return x, w


def assert_binomial(sampled, exact, shots):
    """That 72 values are means of so many signs, as far from the exact ones as such means are."""
    # The number of +1 is an integer and binomial. 72 values within 4.5 sigma: p < 1e-3.
    ups = (sampled + 1) / 2 * shots
    torch.testing.assert_close(ups, ups.round(), atol=1e-6, rtol=0)
    z = (sampled - exact) / ((1 - exact**2) / shots).sqrt()
    assert z.abs().max() < 4.5
    # And they are spread as they should be: the sum of squares is chi-squared (here within 5 sigma, rows correlated).
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / 72) ** 0.5
    assert z.abs().max() > 1


@st.composite
def measured_together(draw):
    """Pauli strings that one setting measures."""
    n = draw(st.integers(1, 5))
    basis = draw(st.text("XYZ", min_size=n, max_size=n))
    masks = draw(st.lists(st.integers(1, 2**n - 1), min_size=1, max_size=6, unique=True))
    return [
        "".join(letter if bit == "1" else "I" for letter, bit in zip(basis, f"{mask:0{n}b}", strict=True))
        for mask in masks
    ]


@given(measured_together())
def test_joint_outcomes_are_those_of_all_bitstrings(observables):
    (setting,) = Setting.of(tuple(observables))
    n = len(observables[0])
    assert setting.members == tuple(range(len(observables)))
    bits = [[int(bit) for bit in f"{k:0{n}b}"] for k in range(2**n)]
    values = [
        [np.prod([1 - 2 * bit for bit, letter in zip(row, text, strict=True) if letter != "I"]) for text in observables]
        for row in bits
    ]
    # Every bitstring belongs to the outcome with its values, and every outcome occurs.
    np.testing.assert_array_equal(setting.signs[setting.outcome_of_bits], values)
    assert setting.outcomes == len(setting.signs) == len({tuple(row) for row in values})
    assert len(setting.strings) == setting.outcomes - 1
    # The strings are the products of observables, each a Pauli string over the setting's basis.
    for text in setting.strings:
        assert all(a in ("I", b) for a, b in zip(text, setting.basis, strict=True))


@settings(max_examples=10)
@given(measured_together(), st.integers(0, 3))
def test_both_ways_to_probabilities_are_the_oracles(observables, seed):
    n = len(observables[0])
    circuit = kernel("strongly_entangling", n, 1).with_observables(tuple(observables))
    x, w = draw_numbers(circuit, seed=seed)
    ways = [load_backend(name).compile(circuit, shots=1)._distribution for name in EXACT]
    assert [type(way).__name__ for way in ways] == ["FromStrings", "StateOutcomes"]
    (setting,) = Setting.of(circuit.observables)
    everything = tuple(setting.strings)
    exact, _, _ = zip(
        *[oracle.run(circuit.with_observables(everything), p.numpy(), f.numpy()) for p in x for f in w], strict=True
    )
    # The angle encoding's own scale: free inputs are angles.
    for way in ways:
        (p,) = way.probabilities(np.pi * x, w)
        assert p.shape == (3, 2, setting.outcomes)
        torch.testing.assert_close(p.sum(-1), torch.ones(3, 2, dtype=torch.float64))
        assert p.min() > -1e-12
        # Means of all products determine the distribution.
        signs = np.array([[1 - 2 * ((s & k).bit_count() & 1) for k in range(1, setting.outcomes)]
                          for s in range(setting.outcomes)])  # fmt: skip
        np.testing.assert_allclose((p.numpy() @ signs).reshape(6, -1), np.array(exact), atol=1e-12)


@pytest.mark.parametrize("shots", [5, 64, 3000])
def test_drawn_counts_are_multinomial(shots):
    # Five shots of eight outcomes are drawn one by one, more by conditional binomials.
    p = torch.tensor([0.3, 0.0, 0.05, 0.15, 0.2, 0.1, 0.0, 0.2], dtype=torch.float64)
    rows = 20_000
    generator = torch.Generator().manual_seed(0)
    counts = shots * draw_values(p.expand(rows, 8), np.eye(8), shots, generator)
    torch.testing.assert_close(counts, counts.round(), atol=1e-9, rtol=0)
    torch.testing.assert_close(counts.sum(1), torch.full((rows,), float(shots), dtype=torch.float64))
    assert torch.equal(counts[:, [1, 6]], torch.zeros(rows, 2, dtype=torch.float64))
    covariance = shots * (torch.diag(p) - torch.outer(p, p))
    # Means within 5 standard errors; covariances too, whose own error is at most sqrt((S_ii S_jj + S_ij^2 + k) / rows)
    # with a fourth cumulant k of at most shots.
    error = (covariance.diagonal() / rows).sqrt()
    assert ((counts.mean(0) - shots * p).abs() <= 5 * error + 1e-12).all()
    variances = covariance.diagonal()
    bound = 5 * ((torch.outer(variances, variances) + covariance**2 + shots) / rows).sqrt()
    assert ((counts.t().cov() - covariance).abs() <= bound).all()
    # The shape beyond two moments: counts of one outcome are binomial, by chi-squared.
    if shots == 5:
        k = np.arange(6)
        law = np.array([1, 5, 10, 10, 5, 1]) * 0.3**k * 0.7 ** (5 - k)
        found = np.bincount(counts[:, 0].long().numpy(), minlength=6)
        assert ((found - rows * law) ** 2 / (rows * law)).sum() < 5 + 5 * np.sqrt(2 * 5)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["pure", "noisy"])
@pytest.mark.parametrize("backend", EXACT)
def test_shots_stay_within_the_binomial_bound(backend, noise):
    circuit = kernel("strongly_entangling", 3, readout=["ZII", "IZZ", "XIY"])
    x, w = draw_numbers(circuit, patches=12)
    shots = 400
    exact = simulate(circuit, x, w, backend="fourier", noise=noise)
    sampled = simulate(circuit, x, w, backend=backend, noise=noise, shots=shots, seed=7)
    assert_binomial(sampled, exact, shots)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["pure", "noisy"])
@pytest.mark.parametrize("backend", EXACT)
def test_observables_of_one_setting_are_read_off_the_same_bits(backend, noise):
    circuit = kernel("strongly_entangling", 3, readout=["ZII", "IZI", "ZZI", "IZZ", "ZIZ", "IIX", "ZIX"])
    x, w = draw_numbers(circuit, patches=40)
    bits = simulate(circuit, x, w, backend=backend, noise=noise, shots=1, seed=0)
    assert torch.equal(bits.abs(), torch.ones_like(bits))
    # Products of measured signs, shot by shot; X on the last wire is a setting of its own.
    assert torch.equal(bits[..., 2], bits[..., 0] * bits[..., 1])
    assert torch.equal(bits[..., 4], bits[..., 2] * bits[..., 3])
    z_alone, x_alone = bits[..., 3] * bits[..., 1], bits[..., 5]
    assert not torch.equal(z_alone, x_alone)
    # Over many draws, their covariance is (<AB> - <A><B>) / shots.
    rows, shots = 4000, 20
    values = simulate(circuit, x[:1].expand(rows, -1), w[0], backend=backend, noise=noise, shots=shots, seed=1)
    product_of = {(0, 1): 2, (1, 2): 0, (1, 4): None, (2, 3): 4, (0, 5): 6}
    exact = simulate(circuit, x[:1], w[0], backend="fourier", noise=noise)[0]
    for (a, b), index in product_of.items():
        if index is None:
            continue
        together = exact[index]
        wanted = 0.0 if (a, b) == (0, 5) and not _share_a_setting(circuit, 0, 5) else together - exact[a] * exact[b]
        found = torch.cov(values[:, [a, b]].t())[0, 1] * shots
        assert abs(float(found - wanted)) < 5 * 2 / rows**0.5


def _share_a_setting(circuit, a, b):
    return any({a, b} <= set(setting.members) for setting in Setting.of(circuit.observables))


@pytest.mark.parametrize("backend", EXACT)
def test_shots_repeat_under_a_seed_and_differ_between_calls(backend):
    circuit = kernel("heisenberg", 2)
    x, w = draw_numbers(circuit)
    first, again, other = (load_backend(backend).compile(circuit, shots=200, seed=s) for s in (5, 5, 6))
    one, two = first(x, w), first(x, w)
    assert torch.equal(one, again(x, w))
    assert torch.equal(two, again(x, w))
    assert not torch.equal(one, two)
    assert not torch.equal(one, other(x, w))
    # Without a seed, torch's global generator draws.
    torch.manual_seed(3)
    drawn = simulate(circuit, x, w, backend=backend, shots=200)
    assert not torch.equal(drawn, simulate(circuit, x, w, backend=backend, shots=200))
    torch.manual_seed(3)
    assert torch.equal(drawn, simulate(circuit, x, w, backend=backend, shots=200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", EXACT)
def test_certain_outcomes_are_measured_as_they_are(backend, dtype):
    circuit = Circuit(3, (Gate("X", (0,)), Gate("H", (1,)), Gate("CNOT", (1, 2))), ("ZII", "IXX", "IZZ", "IYY"))
    x, w = torch.zeros(50, 0, dtype=dtype), torch.zeros(1, 0, dtype=dtype)
    want = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=dtype).expand(50, 1, 4)
    for shots in (1, 100):
        values = simulate(circuit, x, w, backend=backend, shots=shots, seed=0)
        assert values.dtype == dtype
        assert torch.equal(values, want)


@pytest.mark.parametrize("backend", EXACT)
def test_values_in_chunks_are_as_many_and_as_good(backend, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_NUMBERS", 64)
    circuit = kernel("strongly_entangling", 2)
    x, w = draw_numbers(circuit, patches=30)
    x, w = x.requires_grad_(), w.requires_grad_()
    values = simulate(circuit, x, w, backend=backend, shots=10**6, seed=0)
    exact = simulate(circuit, x, w)
    torch.testing.assert_close(values, exact, atol=6e-3, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, w)) for y in (values, exact)), strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)


def test_no_patches_give_no_values_and_nan_stays_in_its_row():
    circuit = kernel("heisenberg", 2)
    for backend in EXACT:
        assert simulate(circuit, torch.zeros(0, 2), torch.zeros(3, circuit.n_weights), backend=backend,
                        shots=9).shape == (0, 3, 2)  # fmt: skip
        x, w = draw_numbers(circuit)
        x[1, 0] = torch.inf
        values = simulate(circuit, x, w, backend=backend, shots=9, seed=0)
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()


W0, W1 = Angle("weight", 0), Angle("weight", 1, 0.5, 0.2)
GRADED = {
    "angle": kernel("strongly_entangling", 2, 1, readout=["ZI", "XY"]),
    "amplitude": kernel("strongly_entangling", 2, 1, encoding="amplitude", readout=["ZI", "XY"]),
    # Four-term rules, a shared and scaled weight, a feature used twice, a constant.
    "controlled": Circuit(
        2,
        (
            Gate("RY", (0,), (Angle("input", 0, 1.3),)),
            Gate("U3", (1,), (Angle("input", 1), Angle("const", 0, 1.0, 0.4), Angle("input", 0, -0.7, 0.1))),
            Gate("CRY", (0, 1), (W0,)),
            Gate("RX", (0,), (W1,)),
            Gate("CRX", (1, 0), (W0,)),
        ),
        ("ZI", "XY"),
    ),
}


@pytest.mark.parametrize("noise", [None, NoiseModel((("*", Channel("phase_flip", 0.1)),))], ids=["pure", "noisy"])
@pytest.mark.parametrize("case", GRADED)
@pytest.mark.parametrize("backend", EXACT)
def test_gradients_under_shots_are_parameter_shifts_of_shots(backend, case, noise):
    circuit = GRADED[case]
    x, w = draw_numbers(circuit, patches=2)
    factors = torch.linspace(0.5, 1.5, 2 * 2 * 2, dtype=torch.float64).reshape(2, 2, 2)

    def gradients(**options):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad((simulate(circuit, a, b, noise=noise, **options) * factors).sum(), (a, b))

    exact = gradients(backend="statevector")
    # Unbiased, with errors of the order 1 / sqrt(shots): with a hundred times the shots a tenth of them.
    shots = 4 * 10**6
    for got, want in zip(gradients(backend=backend, shots=shots, seed=0), exact, strict=True):
        torch.testing.assert_close(got, want, atol=30 / shots**0.5, rtol=0)
    few = [gradients(backend=backend, shots=100, seed=seed) for seed in range(60)]
    for k, want in enumerate(exact):
        stacked = torch.stack([row[k] for row in few])
        error = stacked.std(0) / 60**0.5
        assert ((stacked.mean(0) - want).abs() < 4.5 * error + 1e-9).all()
        assert stacked.std(0).max() > 0.05


def test_a_shifted_gradient_is_made_of_counts():
    # d<Z>/dw of RX(w) is half the difference of two measured means: a multiple of 1 / shots.
    circuit = Circuit(1, (Gate("RX", (0,), (W0,)),), ("Z",))
    w = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    for seed in range(5):
        value = simulate(circuit, torch.zeros(1, 0, dtype=torch.float64), w, backend="statevector", shots=7, seed=seed)
        (gradient,) = torch.autograd.grad(value.sum(), w)
        assert float(7 * gradient) == pytest.approx(round(float(7 * gradient)), abs=1e-9)


@pytest.mark.parametrize("case", GRADED)
@pytest.mark.parametrize("backend", EXACT)
def test_executions_are_those_that_are_drawn(backend, case, monkeypatch):
    circuit = GRADED[case]
    compiled = load_backend(backend).compile(circuit, shots=5, seed=0)
    drawn = []
    monkeypatch.setattr(
        compiled, "_draw", lambda x, w, own=compiled._draw: (drawn.append(len(x) * len(w)), own(x, w))[1]
    )
    for wanted in (True, False):
        drawn.clear()
        x, w = draw_numbers(circuit, patches=3)
        compiled(x.requires_grad_(wanted), w.requires_grad_()).sum().backward()
        assert sum(drawn) == compiled.executions(3, 2, inputs=wanted)


@pytest.mark.parametrize("backend", EXACT)
def test_the_exact_gradient_can_be_taken_at_sampled_values(backend):
    circuit = GRADED["angle"]
    x, w = (t.requires_grad_() for t in draw_numbers(circuit))
    runner = load_backend(backend, gradient="exact")
    sampled, exact = (simulate(circuit, x, w, backend=runner, shots=s, seed=0) for s in (50, None))
    assert torch.equal(sampled.detach(), simulate(circuit, x, w, backend=backend, shots=50, seed=0).detach())
    for a, b in zip(*(torch.autograd.grad(y.sum(), (x, w)) for y in (sampled, exact)), strict=True):
        torch.testing.assert_close(a, b)
    assert runner.compile(circuit, shots=50).executions(3, 2) == 6


@pytest.mark.parametrize("backend", EXACT)
def test_training_with_shots_lowers_the_loss(backend):
    torch.manual_seed(0)
    images, target = torch.rand(4, 1, 6, 6), torch.rand(4, 4, 3, 3)
    layer = QuantumConv2d(1, 4, 2, stride=2, kernel="strongly_entangling", backend=backend, shots=200, seed=0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        loss = (layer(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("backend", [*EXACT, "auto"])
def test_shots_of_a_layer_can_change(backend):
    torch.manual_seed(0)
    layer = QuantumConv2d(1, 4, 2, backend=backend, seed=1)
    images = torch.rand(2, 1, 4, 4)
    exact = layer(images)
    layer.shots = 50
    assert "shots=50" in repr(layer)
    sampled = layer(images)
    ups = (sampled + 1) / 2 * 50
    torch.testing.assert_close(ups, ups.round(), atol=1e-4, rtol=0)
    assert not torch.equal(sampled, exact)
    assert layer.counts((1, 4, 4))["device:shots"] == 9 * 50
    for wrong in (0, -5, 2.5, True, "many"):
        with pytest.raises(ValueError, match="shots is "):
            layer.shots = wrong
        assert layer.shots == 50
    fresh = QuantumConv2d(1, 4, 2, backend=backend, seed=1, shots=50)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(sampled, fresh(images))
    layer.shots = None
    assert torch.equal(layer(images), exact)


def test_shots_that_a_backend_cannot_run_leave_the_layer_as_it_was():
    layer = QuantumConv2d(1, 13, (1, 13), kernel="product", backend="fourier")
    images = torch.rand(1, 1, 2, 15)
    exact = layer(images)
    with pytest.raises(Unsupported, match="backend 'statevector'"):
        layer.shots = 100
    assert layer.shots is None
    assert torch.equal(layer(images), exact)


@pytest.mark.parametrize("backend", EXACT)
def test_a_layer_with_shots_is_a_layer(backend):
    layer = QuantumConv2d(1, 4, 2, backend=backend, shots=4000, seed=0)
    check_layer(layer, 1, size=5, atol=6 / 4000**0.5 * 2**0.5)


@pytest.mark.parametrize("backend", EXACT)
def test_the_ledger_counts_shots(backend):
    circuit = kernel("strongly_entangling", 3, readout=["ZII", "XII"])
    counts = load_backend(backend).compile(circuit, shots=30).counts(10, 2)
    assert counts["device:shots"] == 10 * 2 * 2 * 30
    assert counts["device:circuits"] == 40
    assert counts["mac:fp32*fp32"] > 0


WIDE = kernel("product", 13)
ALL = WIDE.with_observables(("Z" * 13,))


def inside_vmap():
    def run(row):
        return simulate(ALL, row[None], torch.zeros(WIDE.n_weights), shots=9, backend="statevector")

    return torch.func.vmap(run)(torch.zeros(2, 13))


WEIGHTED = Circuit(1, (Gate("Amplitude", (0,), (Angle("input", 0), W0)),), ("Z",))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: load_backend("fourier").compile(WIDE, shots=10), "8,192: use fewer observables, or backend 'state"),
        (lambda: load_backend("statevector").compile(kernel("product", 24), shots=10), "134,217,728 bytes a patch"),
        (lambda: load_backend("statevector").compile(WEIGHTED, shots=10), "no weights among the amplitudes"),
        (lambda: load_backend("fourier", gradient="adjoint"), "unknown gradient 'adjoint'"),
        (lambda: load_backend("statevector", gradient="Exact"), "did you mean 'exact'"),
        (inside_vmap, "shots are not drawn inside torch.func"),
    ],
)
def test_errors_say_what_works(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_many_wires_with_few_observables_are_sampled():
    # Nine wires have 512 outcomes, but two observables only four.
    circuit = kernel("strongly_entangling", 9, 1).with_observables(("Z" * 9, "ZZIIIIIII"))
    x, w = draw_numbers(circuit)
    exact = simulate(circuit, x, w)
    for backend in EXACT:
        sampled = simulate(circuit, x, w, backend=backend, shots=10**6, seed=0)
        torch.testing.assert_close(sampled, exact, atol=5e-3, rtol=0)


def test_noisy_shots_are_drawn_after_channels_on_two_wires():
    swap = np.eye(4)[[0, 2, 1, 3]]
    noise = NoiseModel((("CNOT", KrausChannel([swap])),), readout=ReadoutError(0.0, 1.0))
    # The X makes |10>, the CNOT leaves |11>, and every 1 is read as 0.
    circuit = Circuit(2, (Gate("X", (0,)), Gate("CNOT", (0, 1))), ("ZI", "ZZ"))
    values = simulate(circuit, torch.zeros(3, 0), torch.zeros(0), backend="statevector", noise=noise, shots=9)
    assert torch.equal(values, torch.ones(3, 2))


def test_walsh_hadamard_is_the_matrix_of_signs():
    from scipy.linalg import hadamard

    values = torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(outcomes.walsh_hadamard(values), values.numpy() @ hadamard(8), atol=1e-13)
