import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from circuits import (
    Angle,
    Circuit,
    Factor,
    Feature,
    Gate,
    computed,
    const,
    encode,
    from_pennylane,
    from_qasm3,
    from_qiskit,
    kernel,
)
from circuits.features import FUNCTIONS
from qconv import QuantumConv2d, load_backend, simulate, surrogate
from qconv.backends.computed import with_plain_features
from qconv.backends.protocol import Unsupported
from qconv.energy import count, estimate

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
X, Y = (Factor(0),), (Factor(1),)
XY = (Factor(0), Factor(1))


@st.composite
def factors(draw, smooth=False):
    names = [name for name in FUNCTIONS if not smooth or name in ("x", "arcsin", "arccos", "arccos_square")]
    name = draw(st.sampled_from(names))
    numbers = {"step": (0.5,), "bit": (draw(st.integers(0, 2)), 3)}.get(name, ())
    return Factor(draw(st.integers(0, 2)), name, numbers)


@st.composite
def angles(draw, smooth=False):
    coefficients = st.sampled_from([0.5, -1.0, 1.7, 2.0])
    products = st.lists(factors(smooth), min_size=1, max_size=3).map(lambda own: tuple(sorted(own)))
    return computed(draw(st.dictionaries(products, coefficients, min_size=1, max_size=3)), draw(coefficients))


@st.composite
def circuits(draw, smooth=False):
    gates = [Gate("RY", (k,), (Angle("input", 2 - k, 0.7),)) for k in range(draw(st.integers(0, 3)))]
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(["RX", "P", "RZZ", "CRY"]))
        on = tuple(draw(st.permutations(range(3)))[: 1 if len(name) < 3 else 2])
        gates += [Gate(name, on, (draw(angles(smooth)),)), Gate("RX", on[:1], (Angle("weight", 0, 0.8),))]
        gates.append(Gate("H", (draw(st.integers(0, 2)),)))
    found = Circuit(3, tuple(gates), ("ZII", "XYI", "IZZ"))
    assume(found.features)
    return found


def inside(circuit, rows, dtype, seed=0):
    # Away from the ends of functions and the steps of bits.
    x = np.random.default_rng(seed).choice(np.arange(0.08, 0.9, 0.09), (rows, circuit.n_inputs))
    return torch.from_numpy(x).to(dtype)


@settings(max_examples=30)
@given(circuit=circuits(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_values_and_gradients_are_the_oracles(circuit, dtype):
    x = inside(circuit, 3, dtype).requires_grad_()
    w = torch.full((2, circuit.n_weights), 0.4, dtype=dtype, requires_grad=True)
    values = simulate(circuit, x, w)
    want = [
        [oracle.run(circuit, row.detach().double().numpy(), own.detach().double().numpy()) for own in w] for row in x
    ]
    np.testing.assert_allclose(
        values.detach(), [[one[0] for one in row] for row in want], atol=10 * TOLERANCE[dtype], rtol=0
    )
    slopes = torch.autograd.grad(values.sum(), (x, w))
    of_inputs = [sum(one[1].sum(0) for one in row) for row in want]
    of_weights = [sum(row[f][2].sum(0) for row in want) for f in range(2)]
    for got, expected in zip(slopes, (of_inputs, of_weights), strict=True):
        np.testing.assert_allclose(
            got, np.array(expected), atol=300 * TOLERANCE[dtype], rtol=1e-3 * (dtype == torch.float32)
        )


@settings(max_examples=6)
@given(circuit=circuits(), backend=st.sampled_from(["pennylane", "qiskit", "statevector"]))
def test_every_backend_runs_them_with_gradients(circuit, backend):
    x = inside(circuit, 2, torch.float64).requires_grad_()
    w = torch.full((circuit.n_weights,), 0.4, dtype=torch.float64, requires_grad=True)
    got, want = (simulate(circuit, x, w, backend=name) for name in (backend, "auto"))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), (x, w)) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_functions_of_single_features_keep_the_polynomial():
    # What a threshold or an arcsine makes is one number a wire: the fast exact way takes it.
    circuit = kernel("heisenberg", 2, encoding="threshold")
    x, w = torch.tensor([[0.2, 0.9]], dtype=torch.float64), torch.full((circuit.n_weights,), 0.3, dtype=torch.float64)
    got = simulate(circuit, x, w, backend="fourier")[0]
    np.testing.assert_allclose(got, oracle.run(circuit, x[0].numpy(), w.numpy())[0], atol=1e-12)
    assert QuantumConv2d(1, 2, (1, 2), kernel=circuit).backend.startswith("fourier")


class TestData:
    def test_equal_functions_are_equal_data(self):
        one = computed({XY: 2.0, X: -1.0, Y: 0.0}, 0.3)
        assert one == computed({(Factor(1), Factor(0)): 2.0, X: -1.0}, 0.3)
        assert hash(one) == hash(computed({X: -1.0, XY: 2.0}, 0.3))
        assert one != computed({XY: 2.0, X: -1.5}, 0.3)

    def test_what_is_plain_stays_plain(self):
        assert computed({X: 2.0}, 0.5) == Angle("input", 0, 2.0, 0.5)
        assert computed({X: 0.0}, 0.5) == const(0.5)
        assert encode("angle", 3).features == ()

    def test_a_circuit_counts_the_features_it_reads(self):
        circuit = Circuit(1, (Gate("RX", (0,), (computed({(Factor(4), Factor(1)): 1.0}),)),), ("Z",))
        assert (circuit.n_inputs, circuit.n_weights) == (5, 0)
        moved = circuit.shift_inputs(2)
        assert moved.n_inputs == 7
        assert moved.gates[0].angles[0].reads == (3, 6)
        assert circuit.shift_weights(3) == circuit
        assert circuit.inverse().gates[0].angles[0].scale == -1.0

    def test_texts_differ(self):
        def text(terms):
            return Circuit(1, (Gate("RX", (0,), (computed(terms),)),), ("Z",)).text()

        step = Factor(0, "step", (0.5,))
        terms = [{XY: 1.0}, {X + X: 1.0}, {XY: 1.0, X: 1.0}, {(step,): 1.0}, {(Factor(0, "step", (0.4,)),): 1.0}]
        assert len({text(own) for own in terms}) == len(terms)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: Factor(0, "arcsine"), "did you mean 'arcsin'"),
            (lambda: Factor(-1), "index -1"),
            (lambda: Factor(0, "step"), "give 1 finite ones"),
            (lambda: Factor(0, "bit", (3, 3)), "from 0 to 3 - 1"),
            (lambda: Feature(()), "at least one that stays"),
            (lambda: Feature(((1.0, ()),)), "0 factors"),
            (lambda: Feature(((float("inf"), X),)), "finite"),
            (lambda: Angle("weight", 0, computed=Feature(((1.0, XY),))), "it reads features"),
        ],
    )
    def test_errors_name_what_is_wrong(self, make, says):
        with pytest.raises(ValueError, match=says):
            make()


class TestDrawing:
    def test_a_product_is_drawn_as_one(self):
        assert "P(2(x0-π)(x1-π))" in encode("zz", 2, reps=1).draw()
        assert "RZZ(x0x1)" in encode("iqp", 2).draw()
        assert "RY(π[x0>0.5])" in encode("threshold", 1).draw()
        assert "RY(arcsin(x0))─RZ(arccos(x0²))" in encode("arcsin", 1).draw()
        assert "RY(π/2·(x0-x1))" in encode("frqi", 2).draw()
        assert "f(x0..x7)" in encode("frqi", 8).draw()

    def test_what_is_no_product_of_brackets_is_drawn_as_a_sum(self):
        circuit = Circuit(1, (Gate("RX", (0,), (computed({XY: 2.0, X: 1.0}, 0.5),)),))
        assert "RX(2x0x1+x0+0.5)" in circuit.draw()

    @pytest.mark.parametrize("name", ["zz", "threshold", "arcsin", "neqr", "frqi"])
    def test_figures_are_drawn(self, name):
        assert encode(name, 4).draw("svg").startswith("<svg")


class TestOtherLibraries:
    @settings(max_examples=25, deadline=None)
    @given(circuit=circuits())
    def test_pennylane_reads_back_what_it_was_given(self, circuit):
        pytest.importorskip("pennylane")
        assert _alike(from_pennylane(circuit.to_pennylane()), circuit)

    @settings(max_examples=25, deadline=None)
    @given(circuit=circuits(smooth=True))
    def test_qasm_reads_back_what_it_was_given(self, circuit):
        assert _alike(from_qasm3(circuit.to_qasm3()), circuit)

    @settings(max_examples=15, deadline=None)
    @given(circuit=circuits(smooth=True))
    def test_qiskit_reads_back_what_it_was_given(self, circuit):
        pytest.importorskip("qiskit")
        back = from_qiskit(circuit.to_qiskit())
        x = inside(circuit, 1, torch.float64)[0].numpy()
        w = np.full(circuit.n_weights, 0.3)
        np.testing.assert_allclose(oracle.run(back, x, w)[0], oracle.run(circuit, x, w)[0], atol=1e-10)

    @pytest.mark.parametrize("name", ["threshold", "neqr"])
    def test_what_has_no_expression_is_named(self, name):
        circuit = encode(name, 1)
        for write in (circuit.to_qasm3, circuit.to_qiskit):
            with pytest.raises(ValueError, match=r"an angle reads (step|bit)\(x\[0\]"):
                write()

    def test_pennylane_templates_come_in(self):
        qml = pytest.importorskip("pennylane")
        found = from_pennylane(lambda x: nothing(qml.IQPEmbedding(x, wires=[0, 1, 2], n_repeats=2)), 3)
        assert {angle.computed for gate in found.gates for angle in gate.angles} >= set(encode("iqp", 3).features)

    def test_qiskit_products_of_weights_are_refused(self):
        pytest.importorskip("qiskit")
        from qiskit import QuantumCircuit
        from qiskit.circuit import Parameter

        a, x = Parameter("a"), Parameter("x")
        for value, says in ((a * x, "depends on the Parameters"), (x.exp(), "no sum of products")):
            qc = QuantumCircuit(1)
            qc.rx(value, 0)
            with pytest.raises(ValueError, match=says):
                from_qiskit(qc)


def nothing(_):
    return None


def _alike(found, wanted):
    """Equal but for rounding of the coefficients."""
    assert [(g.name, g.wires) for g in found.gates] == [(g.name, g.wires) for g in wanted.gates]
    assert found.observables == wanted.observables
    for one, two in zip(found.gates, wanted.gates, strict=True):
        for a, b in zip(one.angles, two.angles, strict=True):
            assert (a.source, a.reads) == (b.source, b.reads)
            np.testing.assert_allclose([a.scale, a.offset], [b.scale, b.offset], rtol=1e-14)
            if b.computed is not None:
                assert [product for _, product in a.computed.terms] == [product for _, product in b.computed.terms]
                np.testing.assert_allclose(*([c for c, _ in own.computed.terms] for own in (a, b)), rtol=1e-14)
    return True


class TestRanges:
    @pytest.mark.parametrize(("name", "bad"), [("arcsin", -1.5), ("arcsin", 1.01), ("neqr", -0.1), ("neqr", 1.5)])
    def test_features_outside_a_range_are_refused(self, name, bad):
        layer = QuantumConv2d(1, 1, (1, 2), kernel="product", encoding=name)
        with pytest.raises(ValueError, match="but this encoding takes"):
            layer(torch.tensor([[[[0.5, bad]]]]))

    def test_the_ends_have_finite_slopes(self):
        x = torch.tensor([[[[1.0, -1.0, 0.5]]]], dtype=torch.float64, requires_grad=True)
        layer = QuantumConv2d(1, 1, 1, encoding="arcsin", dtype=torch.float64)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad[0, 0, 0, 2] != 0

    @pytest.mark.parametrize("name", ["threshold", "neqr"])
    def test_steps_have_no_slope_but_weights_do(self, name):
        x = torch.rand(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        layer = QuantumConv2d(1, 1, (1, 2), encoding=name, dtype=torch.float64)
        layer(x).sum().backward()
        assert (x.grad == 0).all()
        assert layer.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("name", ["threshold", "zz", "neqr", "arcsin"])
    def test_nan_stays_nan(self, name):
        circuit = kernel("product", 4 + (name == "neqr"), 1, name, features=2)
        x = torch.tensor([[0.3, 0.4], [0.3, torch.nan]])
        values = simulate(circuit, x, torch.zeros(circuit.n_weights))
        assert values[0].isfinite().all()
        assert values[1].isnan().any()


class TestBackends:
    circuit = kernel("product", 2, 1, "iqp")

    def test_a_backend_called_by_hand_says_who_computes_features(self):
        compiled = load_backend("statevector").compile(self.circuit)
        with pytest.raises(Unsupported, match=r"qconv\.simulate"):
            compiled(torch.zeros(1, 2), torch.zeros(1, self.circuit.n_weights))

    def test_surrogates_say_that_it_is_no_polynomial(self):
        with pytest.raises(Unsupported, match="computed from features"):
            surrogate(self.circuit, torch.zeros(self.circuit.n_weights))
        with pytest.raises(Unsupported, match="computed from features"):
            QuantumConv2d(1, 1, (1, 2), kernel=self.circuit).to_classical()

    def test_plain_circuits_stay_as_they_are(self):
        circuit = kernel("heisenberg", 2)
        assert with_plain_features(circuit) == (circuit, None)

    def test_operations_are_in_the_ledger(self):
        plain, made = with_plain_features(self.circuit)
        assert plain.n_inputs == 3
        assert made.counts(10) == {"mul:fp32": 10}
        layer = QuantumConv2d(1, 1, (1, 2), kernel=self.circuit)
        assert estimate(count(layer, (1, 4, 4))).joules > 0
        assert with_plain_features(encode("threshold", 3))[1].counts(2) == {"cmp:fp32": 6}

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="circuit takes 2 inputs but inputs have shape"):
            simulate(self.circuit, torch.zeros(1, 3), torch.zeros(self.circuit.n_weights))

    def test_an_empty_batch_and_copies(self):
        import copy
        import pickle

        layer = QuantumConv2d(1, 1, (1, 2), kernel=self.circuit)
        assert layer(torch.zeros(0, 1, 3, 3)).shape == (0, 1, 3, 2)
        x = torch.rand(1, 1, 3, 3)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))
