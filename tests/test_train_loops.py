"""Contractions wire by wire in compiled loops against torch operations: the same, whatever happens around them."""

import concurrent.futures
import copy
import multiprocessing

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import circuits
from torch import nn

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import QuantumConv2d
from qconv.backends import fused_trains, operators
from qconv.backends.protocol import Unsupported
from qconv.backends.statevector import StatevectorCompiled
from qconv.backends.tensor_train import TrainCompiled
from qconv.backends.train_code import Code

pytestmark = pytest.mark.skipif(not operators.fast_installed(), reason="the fast extra (llvmlite) is not installed")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.05)), ("*", Channel("amplitude_damping", 0.07))))


def results(function, x, w):
    """Values, and both gradients of a weighted sum of them."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = function(x, w)
    weighting = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    # Values that depend on nothing have no graph.
    total = (y * weighting).sum() + 0 * (x.sum() + w.sum())
    gradients = torch.autograd.grad(total, (x, w))
    return [t.double() for t in (y.detach(), *gradients)]


def close(ours, theirs, dtype=torch.float64):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype] * scale, rtol=0)


def random_arguments(circuit, patches=5, filters=2, dtype=torch.float64):
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.uniform(-1, 1, (patches, circuit.n_inputs))).to(dtype)
    return x, torch.from_numpy(rng.normal(size=(filters, circuit.n_weights))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "wires", "depth"),
    [
        ("strongly_entangling", 9, 2),
        ("strongly_entangling", 6, 3),
        ("heisenberg", 7, 1),
        ("basic_entangler", 6, 3),
        ("random", 7, 3),
        ("product", 4, 2),
    ],
)
def test_loops_are_the_statevector(name, wires, depth, dtype):
    circuit = kernel(name, wires, depth)
    train = TrainCompiled(circuit, None)
    assert train.fused is not None
    x, w = random_arguments(circuit, dtype=dtype)
    want = results(StatevectorCompiled(circuit), x.double(), w.double())
    close(results(train, x, w), want, dtype)
    close(results(train.plain, x, w), want, dtype)


@settings(max_examples=60)
@given(circuit=circuits(product_encoding=True, max_wires=5), noisy=st.booleans(), filters=st.integers(1, 3))
def test_any_shallow_circuit(circuit, noisy, filters):
    try:
        train = TrainCompiled(circuit, NOISE if noisy else None)
    except Unsupported:
        assume(False)
    x, w = random_arguments(circuit, filters=filters)
    close(results(train, x, w), results(train.plain, x, w))
    if not noisy:
        for k in range(filters):
            values = np.stack([oracle.run(circuit, row.numpy(), w[k].numpy())[0] for row in x])
            np.testing.assert_allclose(train(x, w)[:, k], values, atol=1e-10)


def random_layer(*arguments, dtype=torch.float64, depth=2, **options):
    torch.manual_seed(1)
    options = {"kernel": "strongly_entangling", **options}
    layer = QuantumConv2d(*arguments, backend="fourier", dtype=dtype, depth=depth, **options)
    nn.init.normal_(layer.weight)
    return layer


def convolution(layer):
    """The layer as a function of images and weights, in compiled loops and in torch operations."""
    train = TrainCompiled(layer.circuit, layer.noise)
    outs = layer.out_channels // layer.groups

    def plain(padded, weights):
        return layer._over_patches(padded, weights, lambda patches, own: train.plain(patches, own).flatten(1))

    def loops(images, weights):
        result = train.convolve(images, weights, layer.geometry, layer.groups, outs, plain)
        assert result is not None
        return result

    def reference(images, weights):
        return plain(torch.nn.functional.pad(images, padding(layer)), weights)

    return loops, reference


def padding(layer):
    (top, bottom), (left, right) = layer.geometry.margins()
    return left, right, top, bottom


@settings(max_examples=25, deadline=None)
@given(
    features=st.sampled_from([(1, (1, 1)), (2, (1, 1)), (1, (1, 3)), (1, (3, 3)), (2, (2, 2)), (3, (2, 1))]),
    groups=st.integers(1, 2),
    outs=st.integers(1, 11),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    zeros=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    batch=st.integers(0, 3),
)
def test_every_geometry(features, groups, outs, stride, dilation, zeros, batch):
    channels, size = features
    layer = random_layer(channels * groups, outs * groups, size, stride, zeros, dilation, groups, depth=1)
    images = torch.rand(batch, channels * groups, 9, 8, dtype=torch.float64)
    loops, reference = convolution(layer)
    close(results(loops, images, layer.weight.detach()), results(reference, images, layer.weight.detach()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_blocks_and_parts(dtype):
    # Patches of an image share pixels, and blocks end in the middle of rows.
    layer = random_layer(2, 40, 2, dtype=dtype)
    images = torch.rand(5, 2, 23, 22, dtype=dtype)
    loops, reference = convolution(layer)
    want = results(reference, images.double(), layer.weight.detach().double())
    close(results(loops, images, layer.weight.detach()), want, dtype)


def test_layers_take_the_loops(monkeypatch):
    layer = random_layer(2, 6, 3, 2, 1, groups=2)
    shapes = []
    run = fused_trains.Convolution.forward
    monkeypatch.setattr(
        fused_trains.Convolution, "forward", lambda self, images, w: shapes.append(images.shape) or run(self, images, w)
    )
    slow = copy.deepcopy(layer)
    slow._compile().fused = None
    images = torch.rand(2, 2, 8, 9, dtype=torch.float64)
    outcomes = []
    for own in (layer, slow):
        x = images.clone().requires_grad_()
        y = own(x)
        outcomes.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, own.weight))))
    close(*outcomes)
    assert shapes == [(2, 2, 10, 11)]


def test_gradients_are_derivatives():
    circuit = kernel("strongly_entangling", 4, 2, readout=["ZIII", "IXIY"])
    train = TrainCompiled(circuit, None)
    x, w = (t.requires_grad_() for t in random_arguments(circuit, patches=2, filters=2))
    assert torch.autograd.gradcheck(train, (x, w))
    assert torch.autograd.gradgradcheck(train, (x[:, :].detach().requires_grad_(), w))


def test_functional_transforms_take_torch_operations():
    circuit = kernel("strongly_entangling", 3, 2)
    train = TrainCompiled(circuit, None)
    x, w = random_arguments(circuit)
    jacobian = torch.func.jacrev(lambda v: train(x, v).sum((0, 1)))(w)
    want = torch.autograd.functional.jacobian(lambda v: train(x, v).sum((0, 1)), w)
    torch.testing.assert_close(jacobian, want)
    with torch.autograd.forward_ad.dual_level():
        dual = train(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), w)
        slope = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(slope, torch.func.jvp(lambda v: train.plain(v, w), (x,), (torch.ones_like(x),))[1])


def edge_circuits():
    turn = tuple(Gate("RY", (k,), (Angle("input", k, 1.3, 0.2),)) for k in range(3))
    entangle = (Gate("CNOT", (0, 1)), Gate("CNOT", (1, 2)))
    weights = tuple(Gate("RX", (k,), (Angle("weight", k),)) for k in range(3))
    return {
        "no weights": Circuit(3, (*turn, *entangle), ("ZII", "IXY")),
        "no inputs": Circuit(3, (*weights, *entangle), ("ZII", "IIZ")),
        "a wire without either": Circuit(3, (*turn[:2], *weights[:1], *entangle), ("IIZ", "ZZZ")),
        "values that are always zero": Circuit(3, (*turn, *entangle), ("YII", "IIY")),
        "one value twice": Circuit(3, (*turn, *weights, *entangle[:1]), ("IIZ", "ZII", "ZII")),
        "a feature twice": Circuit(2, (*turn[:1], Gate("RZ", (0,), (Angle("input", 0),)), *turn[1:2]), ("XI", "IZ")),
    }


@pytest.mark.parametrize("case", edge_circuits())
def test_edges(case):
    circuit = edge_circuits()[case]
    train = TrainCompiled(circuit, None)
    x, w = random_arguments(circuit)
    want = results(StatevectorCompiled(circuit), x, w)
    close(results(train, x, w), want)
    close(results(train.plain, x, w), want)


def test_no_patches_and_no_images():
    circuit = kernel("strongly_entangling", 5, 2)
    train = TrainCompiled(circuit, None)
    x, w = torch.zeros(0, 5, requires_grad=True), torch.zeros(3, circuit.n_weights, requires_grad=True)
    y = train(x, w)
    assert y.shape == (0, 3, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_nan_and_infinity_stay_in_their_patches():
    layer = random_layer(1, 9, 3, 3, dtype=torch.float32)
    loops, _ = convolution(layer)
    images = torch.rand(2, 1, 30, 30)
    images[0, 0, 1, 1], images[1, 0, 28, 28] = torch.nan, torch.inf
    lost = loops(images, layer.weight.detach()).isnan().any(1)
    want = torch.zeros(2, 10, 10, dtype=torch.bool)
    want[0, 0, 0] = want[1, 9, 9] = True
    assert torch.equal(lost, want)
    x = images.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(loops(x, layer.weight.detach()).sum(), x)
    ruined = slopes.isnan().reshape(2, 10, 3, 10, 3).any(-1).any(2)
    assert torch.equal(ruined, want)


def test_views_are_read_as_what_they_show():
    circuit = kernel("strongly_entangling", 6, 2)
    train = TrainCompiled(circuit, None)
    x, w = random_arguments(circuit, patches=300)
    want = results(train.plain, x, w)
    wide = torch.zeros(2 * 300, 12, dtype=torch.float64)
    wide[::2, 1::2] = x
    other = torch.zeros(circuit.n_weights, 4, dtype=torch.float64)
    other[:, ::2] = w.t()
    ours = [wide.requires_grad_(), other.requires_grad_()]
    y = train(ours[0][::2, 1::2], ours[1][:, ::2].t())
    torch.testing.assert_close(y.detach(), want[0], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(y.sum(), ours)
    expected = torch.autograd.grad(train.plain(ours[0][::2, 1::2], ours[1][:, ::2].t()).sum(), ours)
    close(gradients, expected)


def test_only_what_needs_a_gradient_gets_one():
    circuit = kernel("strongly_entangling", 6, 2)
    train = TrainCompiled(circuit, None)
    x, w = random_arguments(circuit, patches=700)
    both = results(train, x, w)
    weighting = torch.linspace(0.5, 1.5, both[0].numel(), dtype=torch.float64).reshape(both[0].shape)
    for k in range(2):
        arguments = [x.clone(), w.clone()]
        arguments[k].requires_grad_()
        (train(*arguments) * weighting).sum().backward()
        assert torch.equal(arguments[k].grad, both[1 + k])
        assert arguments[1 - k].grad is None


def test_coefficients_are_never_stale():
    layer = random_layer(1, 9, 3)
    loops, reference = convolution(layer)
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    other = torch.randn_like(layer.weight)

    def step():
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        loops(images, layer.weight).sum().backward()
        optimizer.step()

    def data():
        layer.weight.data = other.clone()

    def numpy():
        layer.weight.detach().numpy()[:] = 0.1

    for change in (step, data, numpy, lambda: layer.load_state_dict({"weight": other * 3})):
        with torch.no_grad():
            before = loops(images, layer.weight)
        change()
        with torch.no_grad():
            after = loops(images, layer.weight)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, reference(images, layer.weight).detach(), atol=1e-12, rtol=0)


def test_training_goes_on_after_inference_mode():
    layer = random_layer(1, 9, 3)
    loops, _ = convolution(layer)
    images = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    with torch.inference_mode():
        want = loops(images, layer.weight)
    y = loops(images, layer.weight)
    assert torch.equal(y, want.clone())
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_results_repeat_bit_for_bit_on_any_number_of_threads():
    layer = random_layer(1, 9, 3, dtype=torch.float32)
    loops, _ = convolution(layer)
    images = torch.rand(9, 1, 20, 20)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(results(loops, images, layer.weight.detach()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True))


def test_threads_share_a_layer():
    layer = random_layer(1, 9, 3, dtype=torch.float32)
    loops, _ = convolution(layer)
    work = [(torch.rand(4, 1, 12, 12), torch.randn_like(layer.weight)) for _ in range(8)]
    alone = [results(loops, *arguments) for arguments in work]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: results(loops, *arguments), work))
    assert all(
        torch.equal(a, b) for one, two in zip(alone, together, strict=True) for a, b in zip(one, two, strict=True)
    )


def _forked(queue, loops, images, weights):
    queue.put(loops(images, weights).sum().item())


def test_forked_workers_run_it():
    layer = random_layer(1, 9, 3)
    loops, _ = convolution(layer)
    images, weights = torch.rand(6, 1, 20, 20, dtype=torch.float64), layer.weight.detach()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = loops(images, weights).sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        worker = context.Process(target=_forked, args=(queue, loops, images, weights))
        worker.start()
        assert queue.get(timeout=60) == pytest.approx(want, abs=1e-10)
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_operators_are_registered_as_torch_wants_them():
    circuit = kernel("strongly_entangling", 3, 2)
    train = TrainCompiled(circuit, None)
    images = torch.rand(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, circuit.n_weights, dtype=torch.float64, requires_grad=True)
    arguments = (images, weights, train.fused, [0, 0, 0, 0, 0, 1, 0, 0, 2], [1, 1], 1, 5)
    torch.library.opcheck(operators.circuit_convolution, arguments)
    grad = torch.randn_like(operators.circuit_convolution(*arguments)).detach()
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(operators.circuit_convolution_backward, (grad, *plain))
    with pytest.raises(ValueError, match="3 groups do not divide 1 channels and 2 filters"):
        operators.circuit_convolution(*plain[:-2], 3, 5)


def test_nan_of_one_group_does_not_reach_another():
    layer = QuantumConv2d(2, 6, 2, groups=2, padding=1, kernel="strongly_entangling", dtype=torch.float64)
    layer._compiled = TrainCompiled(layer.circuit, None)
    images = torch.rand(2, 2, 5, 7, dtype=torch.float64)
    images[:, 1] = torch.nan
    layer(images)[:, :3].sum().backward()
    first, second = layer.weight.grad.chunk(2)
    assert first.isfinite().all()
    assert second.isnan().any()


def test_compiled_models_see_one_operator():
    layer = random_layer(1, 9, 3, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    images = torch.rand(2, 1, 6, 6)
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = compiled(x), layer(y)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_noise_tells_kernels_apart():
    circuit = kernel("strongly_entangling", 4, 2)
    assert TrainCompiled(circuit, None).fused != TrainCompiled(circuit, NOISE).fused


def test_counts_are_what_the_loops_run():
    circuit = kernel("strongly_entangling", 9, 2)
    train = TrainCompiled(circuit, None)
    program = train._contraction.patches
    code, place, single, double = Code.forward(program, reuse=True), 0, 0, 0
    for _ in program.sums:
        ones, twos = (int(number) for number in code.numbers[place : place + 2])
        single, double, place = single + ones, double + twos, place + 3 + 2 * ones + 3 * twos
    assert place == len(code.numbers)
    counts = train.counts(10, 2)
    assert counts["mac:fp32*fp32"] == 10 * 2 * (single + double)
    # Beside what is read from the code: sines, cosines and angles of nine features.
    assert counts["mul:fp32"] == 10 * (2 * double + 9 * 15)
    assert train.stored_numbers(2) == train.coefficients(torch.zeros(2, circuit.n_weights)).numel()


def test_slots_are_used_again():
    program = TrainCompiled(kernel("strongly_entangling", 9, 2), None)._contraction.patches
    reused, kept = Code.forward(program, reuse=True), Code.forward(program, reuse=False)
    assert kept.slots == program.first + len(program.sums)
    assert reused.slots < kept.slots / 3
