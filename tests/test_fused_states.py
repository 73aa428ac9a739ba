"""Compiled loops over states against the plain torch path, the oracle and PennyLane, whatever happens around them."""

import concurrent.futures
import copy
import multiprocessing

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ONE_WIRE, TWO_WIRES, circuits
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from circuits import GATES, Angle, Circuit, Gate, kernel
from qconv import QuantumConv2d, simulate
from qconv.backends import fused_states
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS
from qconv.backends.operators import fast_installed
from qconv.backends.statevector import StatevectorCompiled

pytestmark = pytest.mark.skipif(not fast_installed(), reason="the fast extra (llvmlite) is not installed")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def reupload(wires, uploads, name="strongly_entangling"):
    layer = whole = kernel(name, wires, 1)
    for _ in range(uploads - 1):
        whole = whole + layer.shift_weights(whole.n_weights)
    return whole


W4 = reupload(4, 3)


def draw(circuit, patches, filters=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (patches, circuit.n_inputs), (filters, circuit.n_weights)
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def results(function, x, w):
    """Values and both gradients of a sum in which every value has a weight of its own."""
    y = function(x, w)
    weighting = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    slopes = torch.autograd.grad((y * weighting).sum(), (x, w), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if s is None else s for s, t in zip(slopes, (x, w), strict=True))]


def close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=0)


def agree(circuit, patches=19, filters=2, dtype=torch.float64):
    compiled = StatevectorCompiled(circuit)
    assert compiled.fused is not None
    x, w = draw(circuit, patches, filters, dtype)
    ours = results(compiled, x, w)
    # In single precision the plain path has errors of its own.
    exact = results(compiled._plain, *(t.detach().double().requires_grad_() for t in (x, w)))
    close(ours, [t.to(dtype) for t in exact], TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(compiled(x, w), ours[0])


reading = circuits(max_wires=4).filter(lambda circuit: circuit.n_inputs > 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=60)
@given(circuit=reading, patches=st.integers(1, 40), filters=st.integers(1, 3))
def test_any_circuit_is_the_plain_path(dtype, circuit, patches, filters):
    agree(circuit, patches, filters, dtype)


@settings(max_examples=25)
@given(circuit=reading)
def test_any_circuit_is_the_oracle(circuit):
    x, w = draw(circuit, 3)
    y = StatevectorCompiled(circuit)(x, w)[:, 0]
    for p in range(3):
        want = oracle.run(circuit, x[p].detach().numpy(), w[0].detach().numpy())
        np.testing.assert_allclose(y[p].detach().numpy(), want[0], atol=1e-10)
        for k in range(len(circuit.observables)):
            slopes = torch.autograd.grad(y[p, k], (x, w), retain_graph=True, allow_unused=True)
            for slope, exact in zip((slopes[0][p], slopes[1]), (want[1][k], want[2][k]), strict=True):
                np.testing.assert_allclose(0 if slope is None else slope.numpy().ravel(), exact, atol=1e-10)


@pytest.mark.parametrize("name", [*ONE_WIRE, *TWO_WIRES])
def test_every_gate_reads_features_and_weights(name):
    spec = GATES[name]
    gates = [*(Gate("RY", (k,), (Angle("input", k),)) for k in range(3)), Gate("CZ", (2, 0)), Gate("CNOT", (0, 1))]
    for source in ("input", "weight", "const"):
        for wires in ((2, 0), (1, 2)):
            angles = [Angle(source, 0 if source == "const" else k, offset=0.3 + k) for k in range(spec.n_angles)]
            if source != "const":
                angles = [Angle(a.source, a.index, -0.7, a.offset) for a in angles]
            gates.append(Gate(name, wires[: spec.n_wires], tuple(angles)))
    agree(Circuit(3, tuple(gates), ("ZII", "XYI", "IYZ", "YIX")))


@pytest.mark.parametrize("circuit", [W4, reupload(3, 2, "heisenberg")], ids=["strongly_entangling", "heisenberg"])
def test_pennylane_agrees(circuit):
    x, w = draw(circuit, 3)
    close(
        results(lambda x, w: simulate(circuit, x, w, backend="statevector"), x, w),
        results(lambda x, w: simulate(circuit, x, w, backend="pennylane"), x, w),
        1e-10,
    )


@pytest.mark.parametrize("wires", [1, 5, 6, 8])
def test_wider_registers(wires):
    agree(reupload(wires, 2) if wires > 1 else Circuit(1, W4.with_observables(()).gates[:1], ("Z",)), 33)


# Fewer than a vector, a vector, just beyond a block, and more than a part of the work.
@pytest.mark.parametrize("patches", [0, 1, 15, 16, 17, 129, 5000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_number_of_patches(patches, dtype):
    agree(W4, patches, 1, dtype)


def test_circuits_without_weights_have_any_number_of_filters():
    gates = *(Gate("RX", (k,), (Angle("input", k),)) for k in (0, 1)), Gate("CRY", (0, 1), (Angle("input", 0, 0.5),))
    agree(Circuit(2, gates, ("ZI", "XY")), filters=3)


def test_derivatives_are_those_of_the_values():
    for circuit in (reupload(2, 2), reupload(2, 1, "heisenberg")):
        x, w = draw(circuit, 3, 2)
        compiled = StatevectorCompiled(circuit)
        assert gradcheck(compiled, (x, w))
        assert gradgradcheck(compiled, (x, w))
        assert gradgradcheck(lambda x, c=compiled, w=w: c(x, w.detach()), (x,))


def test_only_what_asks_gets_a_gradient():
    x, w = draw(W4, 20)
    compiled = StatevectorCompiled(W4)
    _, to_x, to_w = results(compiled, x, w)
    weighting = torch.linspace(0.5, 1.5, 80, dtype=torch.float64).reshape(20, 1, 4)
    assert torch.equal(torch.autograd.grad((compiled(x.detach(), w) * weighting).sum(), w)[0], to_w)
    assert torch.equal(torch.autograd.grad((compiled(x, w.detach()) * weighting).sum(), x)[0], to_x)
    assert not compiled(x.detach(), w.detach()).requires_grad


def test_any_strides():
    compiled = StatevectorCompiled(W4)
    x, w = draw(W4, 20, 2)
    want = results(compiled, x, w)
    wide = torch.zeros(20, 9, dtype=torch.float64)
    wide[:, ::2][:, :4] = x.detach()
    tall = torch.zeros(3, W4.n_weights, 2, dtype=torch.float64)
    tall[1] = w.detach().t()
    strided = wide[:, ::2][:, :4].requires_grad_(), tall[1].t().requires_grad_()
    assert not strided[0].is_contiguous()
    close(results(compiled, *strided), want, 1e-12)
    one = torch.full((1, 1), 0.3, dtype=torch.float64).expand(20, 4).requires_grad_()
    close(results(compiled, one, w), results(compiled, one.detach().clone().requires_grad_(), w), 1e-12)
    # The gradient of a sum is one number everywhere, of stride 0.
    (spread,) = torch.autograd.grad(compiled(x, w).sum(), x)
    (written,) = torch.autograd.grad(compiled(x, w), x, torch.ones(20, 2, 4, dtype=torch.float64))
    close([spread], [written], 1e-12)


def test_nan_and_infinity_stay_in_their_patches():
    compiled = StatevectorCompiled(W4)
    x, w = draw(W4, 40)
    with torch.no_grad():
        x[3, 1], x[39, 0] = torch.nan, torch.inf
    values = compiled(x, w)
    assert values.isnan().all(2).flatten().nonzero().flatten().tolist() == [3, 39]
    (slopes,) = torch.autograd.grad(values[:, 0].nansum(), x)
    assert slopes.isfinite().all(1).sum() == 38
    close([values[4:39].detach()], [compiled(x[4:39], w).detach()], 1e-12)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_sines_of_large_features_are_as_good_as_their_digits(size):
    circuit = reupload(2, 2)
    x, w = (t.detach() for t in draw(circuit, 200, dtype=torch.float32))
    exact = simulate(circuit, (size * x).double(), w.double(), backend="statevector")
    torch.testing.assert_close(simulate(circuit, size * x, w, backend="statevector").double(), exact, atol=3e-6, rtol=0)


def layer_of(circuit, dtype=torch.float32):
    torch.manual_seed(1)
    layer = QuantumConv2d(1, len(circuit.observables), 2, 2, kernel=circuit, backend="statevector", dtype=dtype)
    nn.init.normal_(layer.weight)
    return layer


def work(layer, images):
    x = images.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.weight))]


def test_threads_share_a_layer_and_repeat_bit_for_bit():
    layer, before = layer_of(W4), torch.get_num_threads()
    batches = [torch.rand(5, 1, 20, 20) for _ in range(6)]
    try:
        torch.set_num_threads(1)
        alone = [work(layer, images) for images in batches]
        torch.set_num_threads(2)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda images: work(layer, images), batches))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _forked(queue, compiled, x, w):
    queue.put([t.sum().item() for t in results(compiled, x, w)])


def test_forked_workers_run_it():
    compiled, (x, w), before = StatevectorCompiled(W4), draw(W4, 300), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = [t.sum().item() for t in results(compiled, x, w)]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        worker = context.Process(target=_forked, args=(queue, compiled, x, w), daemon=True)
        worker.start()
        assert queue.get(timeout=60) == want
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_operators_are_registered_as_torch_wants_them():
    x, w = draw(W4, 5, 2)
    compiled = StatevectorCompiled(W4)
    torch.library.opcheck(fused_states.circuit_states, (x, w, compiled.fused))
    torch.testing.assert_close(fused_states.circuit_states(x, w, compiled.fused).permute(2, 0, 1), compiled(x, w))


def test_compiled_models_see_one_operator():
    layer = layer_of(W4)
    images = torch.rand(2, 1, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(work(compiled, images), work(layer, images), 1e-6)


def test_exported_models_hold_one_operator():
    program = torch.export.export(layer_of(W4), (torch.rand(2, 1, 6, 6),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.qconv.circuit_states.default) == 1


def test_whoever_wants_to_see_torch_operations_does():
    compiled = StatevectorCompiled(W4)
    x, w = draw(W4, 6, 2)
    want = compiled(x, w)
    rows = torch.func.vmap(lambda row: compiled(row[None], w)[0])(x)
    torch.testing.assert_close(rows, want)
    with forward_ad.dual_level():
        direction = torch.randn_like(x)
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x.detach(), direction), w.detach())).tangent
    slopes = torch.autograd.functional.jvp(lambda x: compiled(x, w.detach()), x.detach(), direction)[1]
    torch.testing.assert_close(tangent, slopes)
    with torch._subclasses.FakeTensorMode() as mode:
        assert compiled(mode.from_tensor(x), mode.from_tensor(w)).shape == want.shape


def test_copies_and_inference_mode():
    layer, images = layer_of(W4), torch.rand(2, 1, 6, 6)
    with torch.inference_mode():
        first = copy.deepcopy(layer)(images)
    want = work(layer, images)
    assert torch.equal(first.clone(), want[0])
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert not torch.equal(layer(images), want[0])


def test_it_stands_aside_where_it_does_not_apply(monkeypatch):
    unread = Circuit(1, (Gate("RX", (0,), (Angle("weight", 0),)),), ("Z",))
    for circuit in (kernel("heisenberg", 4, encoding="amplitude"), unread, kernel("product", 13)):
        assert StatevectorCompiled(circuit).fused is None
        x, w = torch.rand(3, circuit.n_inputs), torch.rand(1, circuit.n_weights)
        assert StatevectorCompiled(circuit)(x, w).isfinite().all()
    monkeypatch.setattr(fused_states, "fast_installed", lambda: False)
    plain = StatevectorCompiled(W4)
    assert plain.fused is None
    monkeypatch.undo()
    x, w = draw(W4, 20, 2)
    close(results(plain, x, w), results(StatevectorCompiled(W4), x, w), 1e-10)


def test_counts_are_what_runs():
    # One rotation: 8 for its (a, b), 8 for the state, two squares and the constant; the wave once for both filters.
    small = Circuit(1, (Gate("RY", (0,), (Angle("input", 0),)),), ("Z",))
    counts = StatevectorCompiled(small).counts(5, 2)
    assert counts["mac:fp32*fp32"] == (8 + 8 + 2 + 1) * 10 + 5
    assert counts["mul:fp32"] == counts["add:fp32"] == SINCOS_MULTIPLICATIONS * 5
    # A CNOT costs nothing; a rotation behind it 16 a pair of amplitudes, and one about two wires 4 a pair of rows.
    two = Circuit(2, (*(Gate("RY", (w,), (Angle("input", w),)) for w in (0, 1)), Gate("CNOT", (0, 1))), ("ZI",))
    longer = [
        Circuit(2, (*two.gates, Gate(name, wires, (Angle("weight", 0),))), two.observables)
        for name, wires in (("RX", (0,)), ("RXX", (0, 1)))
    ]
    base, spin, turn = (StatevectorCompiled(c).counts(1, 1)["mac:fp32*fp32"] for c in (two, *longer))
    assert (spin - base, turn - base) == (32, 16)
    torch_path = StatevectorCompiled(W4)
    fused = torch_path.counts(196, 1)
    torch_path.fused = None
    assert 2 * fused["mac:fp32*fp32"] < torch_path.counts(196, 1)["mac:fp32*fp32"]
