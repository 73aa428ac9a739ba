import copy
import io
import itertools
import pickle

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel, kernel_names
from qconv import FourierConv2d, QuantumConv2d, load_backend, simulate
from qconv.testing import check_layer

LAYERS = {"quantum": QuantumConv2d, "fourier": FourierConv2d}


def images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


pairs = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))


@st.composite
def arguments(draw):
    groups = draw(st.integers(1, 2))
    per_group = draw(st.integers(1, 2))
    kernel_size = draw(st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 2), st.integers(1, 3))))
    taps = np.prod(np.broadcast_to(kernel_size, 2))
    assume(per_group * taps <= 6)
    padding = draw(
        st.one_of(
            st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])
        )
    )
    return {
        "in_channels": groups * per_group,
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": kernel_size,
        "stride": 1 if padding == "same" else draw(pairs),
        "padding": padding,
        "dilation": draw(pairs),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=60)
@given(arguments=arguments(), height=st.integers(5, 8), width=st.integers(5, 8))
def test_output_shape_is_conv2ds(kind, arguments, height, width):
    reference = nn.Conv2d(**arguments)
    x = images(2, arguments["in_channels"], height, width)
    try:
        want = reference(x).shape
    except RuntimeError:
        # The kernel is larger than the padded image.
        with pytest.raises(ValueError, match="kernel reaches over"):
            LAYERS[kind](**arguments)(x)
        return
    layer = LAYERS[kind](**arguments)
    assert layer(x).shape == want
    assert layer(x[0]).shape == want[1:]
    assert layer.counts(x.shape[1:])["units"] == want[1:].numel()


@settings(max_examples=25)
@given(arguments=arguments())
def test_values_are_the_circuits_on_each_patch(arguments):
    # A loop over pixels, with numpy's padding, and the oracle on every patch.
    layer = QuantumConv2d(**arguments, kernel="strongly_entangling", depth=1, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(images(*p.shape, dtype=torch.float64, seed=3))
    x = images(1, arguments["in_channels"], 5, 6, dtype=torch.float64)
    (kh, kw), (sh, sw), (dh, dw) = layer.geometry.kernel_size, layer.geometry.stride, layer.geometry.dilation
    reference = nn.Conv2d(**arguments)
    flat = reference._reversed_padding_repeated_twice
    left, right, top, bottom = flat
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        arguments["padding_mode"]
    ]
    padded = np.pad(x[0].numpy(), ((0, 0), (top, bottom), (left, right)), mode=mode)
    try:
        want = torch.zeros(reference(x.float()).shape[1:], dtype=torch.float64)
    except RuntimeError:
        assume(False)
    groups = arguments["groups"]
    channels, outs, filters = len(padded) // groups, len(want) // groups, len(layer.weight) // groups
    step = max(1, want[0].numel() // 4)
    checked = list(itertools.product(range(want.shape[1]), range(want.shape[2])))[::step]
    got = layer(x)[0].detach()
    for g, (i, j) in itertools.product(range(groups), checked):
        rows = [i * sh + a * dh for a in range(kh)]
        columns = [j * sw + b * dw for b in range(kw)]
        patch = padded[g * channels : (g + 1) * channels][:, rows][:, :, columns].ravel()
        values = [
            oracle.run(layer.circuit, patch, w.detach().numpy())[0]
            for w in layer.weight[g * filters : (g + 1) * filters]
        ]
        row = np.concatenate(values)[:outs]
        if layer.bias is not None:
            row = row + layer.bias.detach().numpy()[g * outs : (g + 1) * outs]
        np.testing.assert_allclose(got[g * outs : (g + 1) * outs, i, j], row, atol=1e-10)


def test_fourier_layer_is_the_polynomial_of_its_features():
    layer = FourierConv2d(1, 2, (1, 2), dtype=torch.float64)
    x = images(1, 1, 1, 2, dtype=torch.float64)
    a, b = (np.array([1, np.sin(np.pi * v), np.cos(np.pi * v)]) for v in x.flatten().tolist())
    want = layer.weight.detach().numpy().reshape(2, 3, 3) @ b @ a
    np.testing.assert_allclose(layer(x).detach().flatten(), want, atol=1e-12)


def test_fourier_layer_can_be_every_angle_encoded_kernel():
    # The control has the kernel's features and no less: with the kernel's coefficients it is the kernel.
    quantum = QuantumConv2d(1, 3, 2, kernel="heisenberg", dtype=torch.float64)
    nn.init.normal_(quantum.weight)
    free = FourierConv2d(1, 3, 2, dtype=torch.float64)
    compiled = load_backend("fourier").compile(quantum.circuit)
    with torch.no_grad():
        free.weight.copy_(compiled.coefficients(quantum.weight).flatten(0, 1).flatten(1)[:3])
    x = images(2, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(free(x), quantum(x))


BACKENDS = ["statevector", "fourier", "pennylane", "qiskit", load_backend("pennylane", device="lightning.qubit")]


@pytest.mark.parametrize("backend", BACKENDS, ids=["statevector", "fourier", "default.qubit", "aer", "lightning"])
def test_one_state_dict_for_every_backend(backend):
    options = {"kernel": "heisenberg", "depth": 1, "bias": True}
    first = QuantumConv2d(1, 3, (1, 2), **options)
    nn.init.normal_(first.weight)
    nn.init.normal_(first.bias)
    second = QuantumConv2d(1, 3, (1, 2), backend=backend, **options)
    second.load_state_dict(first.state_dict(), strict=True)
    x = images(2, 1, 3, 3)
    grads = []
    for layer in (first, second):
        y = layer(x)
        (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum().backward()
        grads.append((y.detach(), layer.weight.grad, layer.bias.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=["statevector", "fourier", "default.qubit", "aer", "lightning"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_layer_conformance_on_every_backend(backend, stride):
    layer = QuantumConv2d(2, 3, (2, 1), stride=stride, kernel="strongly_entangling", depth=1, backend=backend)
    check_layer(layer, 2, size=4, stride=stride)


@pytest.mark.parametrize("name", kernel_names())
def test_layer_conformance_of_every_kernel(name):
    check_layer(QuantumConv2d(1, 6, 2, kernel=name, seed=4), 1)


def test_layer_conformance_with_shots():
    layer = QuantumConv2d(1, 2, (1, 2), backend="qiskit", shots=500, seed=1, depth=1)
    # Differences of two means of 500 samples: standard error below sqrt(2 / 500); 6 of them, 600 comparisons.
    check_layer(layer, 1, size=3, atol=6 * (2 / 500) ** 0.5)


def test_layer_conformance_of_the_control():
    check_layer(FourierConv2d(2, 3, (1, 2), stride=(1, 2), groups=1, bias=True), 2, stride=(1, 2))


def test_named_kernels_start_as_product_kernels():
    layer = QuantumConv2d(1, 4, 2)
    entangling = {a.index for g in layer.circuit.gates if len(g.wires) == 2 for a in g.angles}
    assert len(entangling) == 24
    rest = sorted(set(range(60)) - entangling)
    assert (layer.weight[:, sorted(entangling)] == 0).all()
    assert 0.04 < float(layer.weight.detach()[:, rest].std()) < 0.2


def test_random_kernel_draws_whole_turns_and_its_seed_its_gates():
    a, b, c = (QuantumConv2d(1, 16, 2, kernel="random", seed=s) for s in (1, 1, 2))
    assert a.circuit == b.circuit != c.circuit
    assert len(a.weight) == 4
    assert float(a.weight.detach().max()) > 3


def test_filters_outputs_and_groups():
    layer = QuantumConv2d(4, 10, 1, groups=2, readout=["ZI", "IZ", "XX"])
    assert layer.weight.shape == (4, layer.circuit.n_weights)
    x = images(1, 4, 3, 3)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        before = layer(x)
        layer.weight[2] += 1
        after = layer(x)
    changed = [k for k in range(10) if not torch.equal(before[0, k], after[0, k])]
    assert changed == [5, 6, 7]


def test_copies_and_files_keep_circuit_seed_and_weights():
    layer = QuantumConv2d(1, 4, 2, kernel="random", backend="qiskit", shots=50, seed=9)
    x = images(1, 1, 3, 3)
    want = copy.deepcopy(layer)(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert copied.circuit == layer.circuit
        assert copied.seed == 9
        torch.testing.assert_close(copied(x), want, atol=0, rtol=0)


def test_train_and_eval_change_nothing():
    layer = QuantumConv2d(1, 4, 2)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = images(1, 1, 4, 4)
    y = layer.train()(x)
    assert torch.equal(y, layer.eval()(x))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert list(before) == ["weight"]


def test_dtypes_and_devices_follow_to():
    layer = QuantumConv2d(1, 4, 2)
    x = images(1, 1, 4, 4, dtype=torch.float64)
    single = layer(x.float())
    double = layer.to(torch.float64)(x)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)
    assert layer.to("meta")(x.to("meta")).shape == (1, 4, 3, 3)
    assert QuantumConv2d(1, 4, 2, device="meta", dtype=torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision_never_enters_a_circuit(kind):
    layer = LAYERS[kind](1, 4, 2)
    x = images(1, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        z = layer(x.bfloat16())
    assert y.dtype == z.dtype == torch.float32
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("backend", ["fourier", "statevector"])
def test_vmap_and_per_sample_gradients(backend):
    layer = QuantumConv2d(1, 4, 2, backend=backend, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x = images(3, 1, 4, 4, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(p, image):
        return torch.func.functional_call(layer, p, (image,)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]
    for image, gradient in zip(x, together, strict=True):
        (alone,) = torch.autograd.grad(layer(image).square().sum(), layer.weight)
        torch.testing.assert_close(alone, gradient)
    weights = torch.stack([layer.weight.detach(), 2 * layer.weight.detach()])
    models = torch.func.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))(weights)
    torch.testing.assert_close(models[0], layer(x))


@pytest.mark.parametrize("backend", ["fourier", "statevector"])
def test_second_derivatives(backend):
    layer = QuantumConv2d(1, 2, (1, 2), depth=1, backend=backend, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x = images(1, 1, 1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight)
    )


def test_inference_mode_does_not_spoil_training():
    layer = QuantumConv2d(1, 4, 2, backend="statevector")
    x = images(1, 1, 3, 3)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_sits_in_a_sequential_and_trains():
    torch.manual_seed(0)
    net = nn.Sequential(QuantumConv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    x, target = images(16, 1, 4, 4), torch.arange(16) % 2
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # The entanglers started at 0 and did not stay there.
    assert (net[0].weight.detach() == 0).sum() == 0


def test_a_circuit_of_your_own():
    circuit = Circuit(
        2, (Gate("RY", (0,), (Angle("input", 0, np.pi),)), Gate("RX", (1,), (Angle("input", 1),))), ("ZZ", "IZ")
    )
    layer = QuantumConv2d(1, 2, (2, 1), kernel=circuit)
    assert layer.weight.shape == (1, 0)
    x = images(1, 1, 3, 2)
    want = simulate(circuit, torch.stack([x[0, 0, :2].flatten(), x[0, 0, 1:].flatten()], dim=1), torch.zeros(0))
    torch.testing.assert_close(layer(x)[0].flatten(1).t(), want)


def test_amplitude_encoding_pads_the_patch():
    layer = QuantumConv2d(1, 2, 3, encoding="amplitude")
    assert layer.circuit.n_wires == 4
    assert layer.backend.startswith("fourier (quadratic form): predicted")
    assert layer(torch.zeros(1, 1, 4, 4)).isfinite().all()


def test_counts_are_what_runs_and_what_a_device_would_run():
    layer = QuantumConv2d(1, 4, 2, stride=2)
    counts = layer.counts((1, 8, 8))
    patches = 16
    assert counts["device:circuits"] == patches
    assert counts["device:gates_2q"] == patches * 24
    assert counts["device:gates_1q"] == patches * 16
    assert counts["device:shots"] == patches * 1024
    # (1, sin, cos) of two wires on each side: 9 products a half, 81 coefficients for each of 4 outputs, 9 sums.
    assert counts["mac:fp32*fp32"] == patches * (4 * 81 + 4 * 9)
    assert counts["params"] == 60
    assert counts["weight_bits"] == 32 * 4 * 81
    direct = QuantumConv2d(1, 4, 2, stride=2, backend="statevector").counts((1, 8, 8))
    assert direct["weight_bits"] == 32 * 60
    assert direct["mac:fp32*fp32"] > counts["mac:fp32*fp32"]
    assert (
        QuantumConv2d(1, 4, 2, stride=2, backend="qiskit", shots=10).counts((1, 8, 8))["device:shots"] == patches * 10
    )


NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.1)),))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QuantumConv2d(3, 4, 2, groups=2), "in_channels is 3, which 2 groups do not divide"),
        (lambda: QuantumConv2d(2, 3, 2, groups=2), "out_channels is 3"),
        (lambda: QuantumConv2d(0, 4, 2), "in_channels is 0"),
        (lambda: QuantumConv2d(1, 4, 0), "kernel_size is 0"),
        (lambda: QuantumConv2d(1, 4, 2, stride=0), "stride is 0"),
        (lambda: QuantumConv2d(1, 4, 2, padding=-1), "padding is -1"),
        (lambda: QuantumConv2d(1, 4, 2, padding="sane"), "did you mean 'same'"),
        (lambda: QuantumConv2d(1, 4, 2, padding="same", stride=2), "stride (2, 2)"),
        (lambda: QuantumConv2d(1, 4, 2, padding_mode="zero"), "did you mean 'zeros'"),
        (
            lambda: QuantumConv2d(1, 4, 2, kernel=kernel("heisenberg", 9)),
            "kernel has 9 wires and takes 9 features but a 2x2 patch of 1 channel gives 4",
        ),
        (lambda: QuantumConv2d(1, 4, 2, kernel="heisenburg"), "did you mean 'heisenberg'"),
        (lambda: QuantumConv2d(1, 4, 2, kernel=3), "kernel is a int"),
        (lambda: QuantumConv2d(1, 4, 2, kernel=kernel("product", 4).with_observables(())), "0 observables"),
        (lambda: QuantumConv2d(1, 4, 2, encoding="angles"), "did you mean 'angle'"),
        (lambda: QuantumConv2d(1, 4, 2, channels="joined"), "did you mean 'joint'"),
        (lambda: QuantumConv2d(1, 4, 2, backend="qiskitt"), "did you mean 'qiskit'"),
        (lambda: QuantumConv2d(1, 4, 2, backend="fourier", shots=0), "shots is 0"),
        (lambda: QuantumConv2d(1, 11, (1, 11), backend="statevector", noise=NOISE), "16,777,216 bytes a patch"),
        (lambda: QuantumConv2d(1, 4, 2, dtype=torch.float16), "dtype is torch.float16"),
        (lambda: QuantumConv2d(1, 4, 5), "25 wires"),
        (
            lambda: QuantumConv2d(1, 4, 2)(torch.zeros(1, 3, 4, 4)),
            "1 input channels but images have shape (1, 3, 4, 4)",
        ),
        (lambda: QuantumConv2d(1, 4, 2)(torch.zeros(4, 4)), "2 dimensions (4, 4)"),
        (lambda: QuantumConv2d(1, 4, 2)(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)), "images are torch.uint8"),
        (
            lambda: QuantumConv2d(1, 4, 2)(torch.zeros(1, 1, 4, 4).double()),
            "images are torch.float64 but the layer is torch.float32",
        ),
        (
            lambda: QuantumConv2d(1, 4, 3, dilation=2)(torch.zeros(1, 1, 4, 4)),
            "kernel reaches over 5 pixels but the padded image has 4",
        ),
        (lambda: QuantumConv2d(1, 4, 2).counts((3, 8, 8)), "input_shape is (3, 8, 8)"),
        (lambda: FourierConv2d(2, 4, 3), "18 features"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


@pytest.mark.parametrize("kernel_name", ["heisenberg", "strongly_entangling"])
def test_torch_compiles_the_plain_path_without_breaks(kernel_name):
    layer = QuantumConv2d(1, 4, 2, kernel=kernel_name, backend="fourier")
    layer._compile().fused = None
    images = torch.rand(2, 1, 5, 5)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(found, layer(images))
