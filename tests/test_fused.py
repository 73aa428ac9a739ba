"""The fused kernel against the plain torch path: the same values and gradients, whatever happens around it."""

import concurrent.futures
import copy
import multiprocessing
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import QuantumConv2d
from qconv.backends import fused, operators

pytestmark = pytest.mark.skipif(not operators.fast_installed(), reason="the fast extra (llvmlite) is not installed")

NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.05)), ("*", Channel("amplitude_damping", 0.07))))


def plain(layer):
    """The same layer without the fused kernel."""
    other = copy.deepcopy(layer)
    other._compile().fused = None
    return other


def random_layer(*arguments, dtype=torch.float64, **options):
    torch.manual_seed(1)
    layer = QuantumConv2d(*arguments, backend="fourier", dtype=dtype, **options)
    nn.init.normal_(layer.weight)
    return layer


def agree(layer, images):
    assert layer._compile().fused is not None
    tolerance = 1e-10 if images.dtype == torch.float64 else 2e-5
    results = []
    for one in (layer, plain(layer)):
        x = images.clone().requires_grad_()
        y = one(x)
        weighting = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append(
            (y.detach(), *torch.autograd.grad((y * weighting).sum(), (x, one.weight), materialize_grads=True))
        )
        with torch.no_grad():
            assert torch.equal(one(images), y)
    for ours, theirs in zip(*results, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("noise", [None, NOISE], ids=["clean", "noisy"])
@pytest.mark.parametrize("encoding", ["angle", "angle_x", "angle_z"])
@pytest.mark.parametrize("name", ["heisenberg", "strongly_entangling", "basic_entangler", "random"])
def test_fused_kernel_is_the_plain_path(name, encoding, noise, dtype):
    layer = random_layer(1, 4, 2, kernel=name, encoding=encoding, noise=noise, dtype=dtype)
    agree(layer, torch.randn(3, 1, 6, 7, dtype=dtype))


@settings(max_examples=25)
@given(
    features=st.sampled_from([(1, (1, 1)), (2, (1, 1)), (1, (1, 3)), (2, (2, 1)), (1, (5, 1)), (1, (2, 3))]),
    groups=st.integers(1, 2),
    outs=st.integers(1, 6),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    batch=st.integers(0, 3),
    width=st.sampled_from([5, 6, 9, 14, 17, 20, 40, 400]),
)
def test_every_geometry(features, groups, outs, stride, dilation, padding, mode, batch, width):
    channels, size = features
    layer = random_layer(
        channels * groups, outs * groups, size, stride, padding, dilation, groups, padding_mode=mode, depth=1
    )
    images = torch.rand(batch, channels * groups, 9, width, dtype=torch.float64)
    assume(layer.geometry.output_size(9, width))
    if batch:
        agree(layer, images)
    else:
        assert layer(images).shape == plain(layer)(images).shape


def test_circuits_of_your_own():
    circuit = Circuit(
        2,
        (
            *(Gate(n, (w,), (Angle("input", w, 0.7, 0.3),)) for w in (0, 1) for n in ("RX",)),
            Gate("T", (0,)),
            Gate("CRY", (0, 1), (Angle("weight", 0, 2.0, 0.1),)),
            Gate("SWAP", (0, 1)),
            Gate("U3", (1,), (Angle("weight", 0), Angle("const", 0, 1.0, 0.4), Angle("weight", 1, -1.0))),
            Gate("CP", (1, 0), (Angle("weight", 1),)),
        ),
        ("ZI", "XY", "YI"),
    )
    agree(random_layer(1, 3, (1, 2), kernel=circuit), torch.randn(2, 1, 4, 5, dtype=torch.float64))


def test_circuits_without_weights_have_any_number_of_filters():
    circuit = Circuit(
        2, (*tuple(Gate("RY", (w,), (Angle("input", w),)) for w in (0, 1)), Gate("CNOT", (0, 1))), ("ZI", "XY")
    )
    for outs in (2, 6, 2):
        layer = random_layer(1, outs, (1, 2), kernel=circuit)
        images = torch.rand(2, 1, 4, 5, dtype=torch.float64)
        assert layer._compile().fused is not None
        torch.testing.assert_close(layer(images), plain(layer)(images))


@st.composite
def product_encodings(draw):
    """Up to two rotations of a wire by any features, constant gates before and between, wires without features too."""
    wires = draw(st.integers(1, 4))
    unread = list(range(draw(st.integers(1, 2 * wires))))
    number = st.floats(-2, 2)
    gates = []
    for wire in range(wires):
        own = draw(st.integers(0, min(2, len(unread))))
        for _ in range(own):
            gates += [Gate(name, (wire,)) for name in draw(st.lists(st.sampled_from(["H", "S", "T"]), max_size=1))]
            angle = Angle("input", unread.pop(draw(st.integers(0, len(unread) - 1))), draw(number), draw(number))
            gates.append(Gate(draw(st.sampled_from(["RX", "RY", "RZ"])), (wire,), (angle,)))
    assume(gates and any(gate.depends_on("input") for gate in gates))
    features = 1 + max(angle.index for gate in gates for angle in gate.angles)
    entangle = (
        kernel("strongly_entangling", wires, 2).gates[wires:]
        if wires > 1
        else (Gate("RX", (0,), (Angle("weight", 0),)),)
    )
    letters = st.text("IXYZ", min_size=wires, max_size=wires).filter(lambda text: set(text) != {"I"})
    return Circuit(wires, (*gates, *entangle), tuple(draw(st.lists(letters, min_size=1, max_size=5)))), features


@settings(max_examples=60, deadline=None)
@given(case=product_encodings(), outs=st.integers(1, 7), noisy=st.booleans())
def test_every_product_encoding(case, outs, noisy):
    circuit, features = case
    layer = random_layer(1, outs, (1, features), kernel=circuit, noise=NOISE if noisy else None)
    compiled = layer._compile()
    # Two angles of one wire that meet a T gate in between need more products than the loops have.
    assume(compiled.fused is not None)
    agree(layer, torch.randn(2, 1, 3, features + 3, dtype=torch.float64))


def test_swapped_and_dense_angles_are_fused():
    turn = Gate("CRX", (0, 1), (Angle("weight", 0),))
    swapped = Circuit(2, (*(Gate("RY", (w,), (Angle("input", 1 - w),)) for w in (0, 1)), turn), ("ZZ", "XI"))
    dense = [
        Circuit(
            2,
            (
                *(Gate(n, (w,), (Angle("input", 2 * w + k, 3.0),)) for w in (0, 1) for k, n in enumerate(names)),
                *kernel("strongly_entangling", 2, 1).gates[2:],
            ),
            ("ZI", "IX"),
        )
        for names in (("RY", "RZ"), ("RX", "RY"), ("RX", "RZ"))
    ]
    for circuit in (swapped, *dense):
        layer = random_layer(1, 2, (1, circuit.n_inputs), kernel=circuit)
        agree(layer, torch.rand(2, 1, 5, 7, dtype=torch.float64))


def test_it_stands_aside_where_it_does_not_apply():
    many = Circuit(1, tuple(Gate(n, (0,), (Angle("input", k),)) for k, n in enumerate(("RX", "RY", "RX"))), ("Z",))
    for layer in (random_layer(1, 7, (1, 7)), random_layer(1, 1, (1, 3), kernel=many)):
        assert layer._compile().fused is None
        assert layer(torch.rand(1, 1, 7, 7, dtype=torch.float64)).isfinite().all()


def test_images_that_need_no_gradient_get_none():
    layer = random_layer(1, 4, 2)
    images = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    layer(images).sum().backward()
    want = layer.weight.grad.clone()
    agree(layer, images)
    layer.weight.grad = None
    layer(images.requires_grad_()).sum().backward()
    assert torch.equal(layer.weight.grad, want)
    layer.weight.requires_grad_(False)
    (slopes,) = torch.autograd.grad(layer(images).sum(), images)
    torch.testing.assert_close(slopes, images.grad)


def test_nan_and_infinity_stay_in_their_patches():
    layer = random_layer(1, 4, 2, stride=2, dtype=torch.float32)
    images = torch.rand(2, 1, 8, 8)
    images[0, 0, 0, 0], images[1, 0, 7, 7] = torch.nan, torch.inf
    lost = layer(images).isnan().any(1)
    want = torch.zeros(2, 4, 4, dtype=torch.bool)
    want[0, 0, 0] = want[1, 3, 3] = True
    assert torch.equal(lost, want)


@pytest.mark.parametrize("width", [6, 40])  # gathered, and read in place
def test_nan_of_one_group_does_not_reach_another(width):
    layer = random_layer(2, 8, 2, groups=2)
    images = torch.rand(2, 2, 5, width, dtype=torch.float64)
    images[:, 1] = torch.nan
    layer(images)[:, :4].sum().backward()
    first, second = layer.weight.grad.chunk(2)
    assert first.isfinite().all()
    assert second.isnan().any()


def test_the_default_device_of_others_changes_nothing():
    layer, images = random_layer(1, 4, 2), torch.rand(1, 1, 5, 5, dtype=torch.float64)
    want = layer(images)
    with torch.device("meta"):
        assert torch.equal(layer(images), want)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_sines_of_large_features_are_as_good_as_their_digits(size):
    layer = random_layer(1, 1, 1, dtype=torch.float32)
    images = size * torch.randn(1, 1, 50, 50)
    exact = copy.deepcopy(layer).double()(images.double())
    torch.testing.assert_close(layer(images).double(), exact, atol=2e-6, rtol=0)


def test_coefficients_are_never_stale():
    layer = random_layer(1, 4, 2).eval()
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    other = torch.randn_like(layer.weight)

    def step():
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        layer(images).sum().backward()
        optimizer.step()

    def fill():
        layer.weight.data.fill_(0.3)

    def data():
        layer.weight.data = other.clone()

    def copied():
        with torch.no_grad():
            layer.weight.copy_(other * 2)

    def numpy():
        layer.weight.detach().numpy()[:] = 0.1

    for change in (step, fill, data, copied, numpy, lambda: layer.load_state_dict({"weight": other * 3})):
        with torch.no_grad():
            before = layer(images)
        change()
        with torch.no_grad():
            after = layer(images)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, plain(layer)(images).detach(), atol=1e-12, rtol=0)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(0.5)
        torch.testing.assert_close(twin(images), plain(twin)(images), atol=1e-12, rtol=0)


def test_threads_share_a_layer(monkeypatch):
    monkeypatch.setattr(fused, "_GRAIN", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = random_layer(1, 4, 2, dtype=torch.float32)
        batches = [torch.rand(5, 1, 12, 12) for _ in range(8)]

        def work(images):
            x = images.clone().requires_grad_()
            gradients = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
            return layer(images).detach(), *gradients

        alone = [work(images) for images in batches]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = list(pool.map(work, batches))
        # Bit for bit: each thread's part of a sum is added in a fixed order.
        assert all(
            torch.equal(a, b) for one, two in zip(alone, together, strict=True) for a, b in zip(one, two, strict=True)
        )
    finally:
        torch.set_num_threads(before)


def _forked(queue, layer, images):
    queue.put(layer(images).sum().item())


def test_forked_workers_run_it(monkeypatch):
    monkeypatch.setattr(fused, "_GRAIN", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = random_layer(1, 4, 2)
        images = torch.rand(4, 1, 6, 6, dtype=torch.float64)
        want = layer(images).sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        worker = context.Process(target=_forked, args=(queue, layer, images))
        worker.start()
        assert queue.get(timeout=60) == pytest.approx(want, abs=1e-12)
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_operators_are_registered_as_torch_wants_them():
    layer = random_layer(2, 4, (1, 2), groups=1, depth=1, kernel="strongly_entangling")
    taps = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1]
    images = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    arguments = (images, layer.weight, layer._compile().fused, taps, [1, 1], 1, 4)
    torch.library.opcheck(operators.circuit_convolution, arguments)
    grad = torch.randn_like(layer(images)).detach()
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(operators.circuit_convolution_backward, (grad, *plain))
    torch.testing.assert_close(operators.circuit_convolution(*arguments), layer(images))


def test_compiled_models_see_one_operator():
    layer = random_layer(1, 4, 2, dtype=torch.float32)
    images = torch.rand(2, 1, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = compiled(x), layer(y)
    torch.testing.assert_close(ours, theirs)
    for one, out in ((x, ours), (y, theirs)):
        out.square().sum().backward()
        assert one.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


def test_kernel_registry_tells_noise_apart():
    clean, noisy = (random_layer(1, 4, 2, kernel="strongly_entangling", noise=n) for n in (None, NOISE))
    assert clean._compile().fused != noisy._compile().fused


def test_who_wants_to_see_torch_operations_sees_them():
    layer = random_layer(1, 4, 2, dtype=torch.float32)
    images, along = torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, along)
        slope = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    step = 1e-3
    with torch.no_grad():
        want = (layer(images + step * along) - layer(images - step * along)) / (2 * step)
    torch.testing.assert_close(slope, want, atol=2e-3, rtol=0)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(images)).shape == (2, 4, 5, 5)


@pytest.mark.parametrize("size", [1, (2, 1), (1, 2), 2])
def test_every_image_is_computed(size):
    layer = random_layer(1, 2, size)
    for _ in range(3):
        torch.full((7, 2, 28, 28), torch.nan, dtype=torch.float64)  # what new memory may hold
        agree(layer, torch.rand(7, 1, 28, 28, dtype=torch.float64))


def test_results_repeat_on_any_number_of_threads():
    layer, images = random_layer(1, 4, 2, dtype=torch.float32), torch.rand(9, 1, 28, 28)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = images.clone().requires_grad_()
            y = layer(x)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_pixels_that_no_patch_reads_do_not_matter():
    layer = random_layer(1, 4, 2, stride=2)
    images = torch.rand(3, 1, 29, 29, dtype=torch.float64)
    images[:, :, 28], images[..., 28] = torch.nan, torch.inf
    layer(images).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_many_gradients_at_once_and_second_ones_without_weights():
    layer, images = random_layer(1, 1, (1, 2)), torch.rand(1, 1, 1, 4, dtype=torch.float64)
    one, all_at_once = (torch.autograd.functional.jacobian(layer, images, vectorize=v) for v in (False, True))
    torch.testing.assert_close(one, all_at_once)
    gates = (*(Gate("RY", (w,), (Angle("input", w),)) for w in (0, 1)), Gate("CNOT", (0, 1)))
    for backend in ("fourier", "statevector"):
        bare = QuantumConv2d(1, 1, (1, 2), kernel=Circuit(2, gates, ("ZZ",)), backend=backend, dtype=torch.float64)
        assert torch.autograd.gradgradcheck(bare, images.clone().requires_grad_())


def test_traced_layers_hold_torch_operations():
    layer, images = random_layer(1, 4, 2, dtype=torch.float32), torch.rand(2, 1, 5, 5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that sizes become constants, and that it is no longer kept up
        traced = torch.jit.trace(layer, images)
        torch.testing.assert_close(traced(images + 0.1), layer(images + 0.1), atol=1e-5, rtol=0)


def test_weights_of_another_shape_are_refused():
    layer = random_layer(1, 8, 2)
    for shape in ((1, 3), (1, layer.weight.shape[1])):
        layer.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(ValueError, match="change its values"):
            layer(torch.rand(1, 1, 4, 4, dtype=torch.float64))


def test_what_is_kept_is_bounded():
    layer = random_layer(1, 6, (2, 3), noise=NoiseModel((("*", Channel("amplitude_damping", 0.1)),)))
    program = operators._MAKERS[layer._compile().fused].args[0]
    with torch.no_grad():
        for _ in range(12):
            layer.weight.add_(0.01)
            layer(torch.rand(1, 1, 3, 4, dtype=torch.float64))
    held = sum(kept.final.base.nbytes for kept in program._caches.values())
    assert held <= 32 * 1024**2 or len(program._caches) == 1


def test_a_compiler_that_fails_is_not_used(monkeypatch):
    def fail(name):
        raise RuntimeError("no LLVM for this machine")

    monkeypatch.setattr(operators.importlib, "import_module", fail)
    operators.fast_installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match="runs in torch operations"):
            assert not operators.fast_installed()
        layer = random_layer(1, 1, (1, 3), depth=1)
        assert layer._compile().fused is None
        assert layer(torch.rand(1, 1, 4, 4, dtype=torch.float64)).isfinite().all()
    finally:
        operators.fast_installed.cache_clear()
