import copy
import io
from math import pi

import numpy as np
import pytest
import torch
from torch import nn

from circuits import Angle, Channel, Circuit, Gate, NoiseModel, kernel
from qconv import FourierConv2d, QuantumConv2d, Unsupported
from qconv.energy import count, estimate
from qconv.testing import check_layer

NOISE = NoiseModel((("*", Channel("amplitude_damping", 0.1)), ("CNOT", Channel("depolarizing", 0.05))))
DTYPES = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}  # two ways of summing in float32, kernels of up to 81 terms and more


def images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(layer, seed=0):
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(6 * images(*p.shape, dtype=torch.float64, seed=seed + k) - 3)
    return layer


def inp(index, scale=pi, offset=0.0):
    return Angle("input", index, scale, offset)


def product_circuit():
    """Two features on one wire, one feature on two wires, a feature that nothing reads, scales and offsets."""
    gates = (
        Gate("RY", (0,), (inp(0, 1.3, 0.4),)),
        Gate("RZ", (0,), (inp(1, -2.0),)),
        Gate("H", (1,)),
        Gate("RZ", (1,), (inp(0, 2.6),)),
        Gate("RX", (2,), (inp(3, 0.7, -1.0),)),
    )
    block = tuple(gate for gate in kernel("heisenberg", 3, 1).gates if not gate.depends_on("input"))
    return Circuit(3, gates + block, ("ZII", "XYZ", "IZX"))


def reuploading(wires, uploads=2):
    block = kernel("heisenberg", wires, 1)
    result = block
    for k in range(1, uploads):
        result = result + block.shift_weights(k * block.n_weights)
    return result


CASES = {
    "heisenberg": {"kernel_size": 2, "bias": True},
    "strided, padded, dilated": {
        "kernel_size": (1, 3),
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": 2,
        "padding_mode": "reflect",
    },
    "groups, surplus outputs": {"in_channels": 4, "out_channels": 6, "kernel_size": (1, 2), "groups": 2, "bias": True},
    "same": {"kernel_size": 2, "padding": "same", "kernel": "strongly_entangling"},
    "RX": {"kernel_size": 2, "encoding": "angle_x"},
    "H RZ": {"kernel_size": 2, "encoding": "angle_z"},
    "noise": {"kernel_size": 2, "noise": NOISE, "kernel": "strongly_entangling", "depth": 1},
    "general product": {"kernel_size": 2, "kernel": product_circuit()},
    "re-uploading": {"kernel_size": 2, "kernel": reuploading(4)},
    "noise and re-uploading": {"kernel_size": (1, 2), "kernel": reuploading(2, 3), "noise": NOISE},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_twin_gives_the_kernels_outputs(case, dtype):
    arguments = {"in_channels": 1, "out_channels": 5, **CASES[case]}
    layer = drawn(QuantumConv2d(**arguments, dtype=dtype))
    twin = layer.to_classical()
    x = 2 * images(2, arguments["in_channels"], 5, 6, dtype=dtype) - 1
    torch.testing.assert_close(twin(x), layer(x).detach(), atol=DTYPES[dtype], rtol=0)
    assert twin.geometry == layer.geometry
    assert type(twin) is FourierConv2d


def test_twin_is_frozen_and_on_its_own():
    layer = drawn(QuantumConv2d(1, 3, 2, bias=True))
    x = images(1, 1, 4, 4)
    state = torch.get_rng_state()
    twin = layer.to_classical()
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in twin.parameters()] == [False, False]
    before = twin(x)
    with torch.no_grad():
        layer.weight += 1
        layer.bias += 1
    assert torch.equal(twin(x), before)
    assert sorted(twin.state_dict()) == ["bias", "weight"]
    twin.requires_grad_()(x).sum().backward()
    assert twin.weight.grad is not None


def test_twin_of_a_layer_with_shots_is_its_limit():
    options = {"kernel": "heisenberg", "depth": 1}
    layer = drawn(QuantumConv2d(1, 2, (1, 2), backend="qiskit", shots=10, **options))
    exact = drawn(QuantumConv2d(1, 2, (1, 2), **options))
    x = images(1, 1, 3, 3)
    torch.testing.assert_close(layer.to_classical()(x), exact(x).detach(), atol=1e-5, rtol=0)


def test_twin_costs_what_the_kernel_costs_here():
    layer = QuantumConv2d(1, 4, 2, stride=2)
    mine = {k: v for k, v in layer.counts((1, 8, 8)).items() if not k.startswith(("device", "params"))}
    twin = dict(layer.to_classical().counts((1, 8, 8)))
    assert twin.pop("params") == 4 * 81
    assert twin == mine


def test_degrees_and_frequencies():
    layer = FourierConv2d(1, 2, (1, 2), degree=(2, 1), frequency=(pi, 0.5), dtype=torch.float64)
    x = images(1, 1, 1, 2, dtype=torch.float64)
    a, b = x.flatten().tolist()
    first = [1, np.sin(pi * a), np.cos(pi * a), np.sin(2 * pi * a), np.cos(2 * pi * a)]
    second = [1, np.sin(b / 2), np.cos(b / 2)]
    want = layer.weight.detach().numpy().reshape(2, 5, 3) @ second @ first
    np.testing.assert_allclose(layer(x).detach().flatten(), want, atol=1e-12)
    assert "degree=(2, 1), frequency=(3.14" in repr(layer)
    assert layer.counts((1, 1, 2))["mac:fp32*fp32"] == 2 * 15 + 2 * 5
    assert "degree=2\n" in repr(FourierConv2d(1, 1, 2, degree=2))


def test_new_coefficients_give_outputs_of_about_one_half():
    torch.manual_seed(0)
    layer = FourierConv2d(1, 200, 2, degree=2)
    spread = float(layer(4 * images(50, 1, 2, 2)).detach().std())
    assert 0.45 < spread < 0.55


def test_layer_conformance():
    check_layer(FourierConv2d(2, 3, (1, 2), stride=(1, 2), bias=True, degree=2, weight="int8"), 2, stride=(1, 2))


def test_copies_and_files():
    twin = drawn(QuantumConv2d(1, 4, 2, bias=True)).to_classical().quantize("int4")
    x = images(1, 1, 3, 3)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(twin), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), twin(x))
    assert twin.to(torch.float64)(x.double()).dtype == torch.float64
    assert FourierConv2d(1, 4, 2, device="meta")(x.to("meta")).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("name", ["int8", "int4_channel", "twn", "bnn", "xnor"])
def test_quantized_coefficients(name):
    twin = drawn(QuantumConv2d(1, 4, 2, bias=True)).to_classical()
    before = twin.weight.clone()
    small = twin.quantize(name)
    x = images(2, 1, 5, 5)
    want = copy.deepcopy(twin)
    stated = small.weight_quantizer.integers(before)
    with torch.no_grad():
        want.weight.copy_((stated.codes - stated.zero) * stated.scale)
    torch.testing.assert_close(small(x), want(x))
    assert torch.equal(twin.weight, before)
    assert twin.weight_quantizer.name == "float"
    counts, chosen = small.counts((1, 5, 5)), small.weight_quantizer
    outputs = 4 * 16
    assert counts[f"mac:{chosen.format}*fp32"] == outputs * 81
    assert counts["mac:fp32*fp32"] == outputs * 9
    constants = chosen.constants(before)
    assert counts["weight_bits"] == 4 * 81 * chosen.bits + 32 * (4 + constants)
    assert counts["params"] == 4 * 81 + 4 + constants
    assert counts["mul:fp32"] == twin.counts((1, 5, 5))["mul:fp32"] + (outputs if constants else 0)
    cheap, dear = (estimate(count(nn.Sequential(m), (1, 5, 5))).joules for m in (small, twin))
    assert cheap < dear


def test_eight_bits_change_a_kernel_little():
    layer = drawn(QuantumConv2d(1, 4, 2))
    x = images(2, 1, 8, 8)
    small = layer.to_classical().quantize("int8")
    # Each coefficient moves by at most half a step, and each feature is at most 1 in size.
    step = float(small.weight.abs().max()) / 127
    assert float((small(x) - layer(x).detach()).abs().max()) < 81 * step / 2


@pytest.mark.parametrize(
    ("name", "products", "multiplications", "additions"),
    [
        ("lq2", 2, 2, 1),  # two sums of signs an output, each times its basis number, put together
        ("naq5", 1, 4, 3),
        ("int4_affine", 1, 2, 1),  # the scale, and the zero point times the sum of all waves' products
    ],
)
def test_uneven_levels_and_zero_points_are_counted(name, products, multiplications, additions):
    twin = drawn(QuantumConv2d(1, 4, 2, bias=True)).to_classical()
    small = twin.quantize(name)
    before, after = twin.counts((1, 5, 5)), small.counts((1, 5, 5))
    outputs, patches = 4 * 16, 16
    sums = patches * 80 if name == "int4_affine" else 0
    assert after[f"mac:{small.weight_quantizer.format}*fp32"] == outputs * 81 * products
    assert after["mul:fp32"] - before["mul:fp32"] == outputs * multiplications
    assert after["add:fp32"] - before["add:fp32"] == outputs * additions + sums


def test_coefficients_train_through_their_quantizer():
    torch.manual_seed(0)
    layer = FourierConv2d(1, 2, (1, 2), weight="int4")
    x, target = images(4, 1, 4, 4), images(4, 2, 4, 3, seed=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((layer(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def twins():
    layer = drawn(QuantumConv2d(2, 4, (1, 2), bias=True, padding=1, stride=(2, 1)))
    grouped = drawn(QuantumConv2d(2, 4, 2, groups=2))
    return {
        "plain": layer.to_classical(),
        "groups": grouped.to_classical(),
        "one number": drawn(QuantumConv2d(1, 1, 1)).to_classical(),
        "re-uploading": drawn(QuantumConv2d(2, 2, 1, kernel=reuploading(2))).to_classical(),
        "int8": layer.to_classical().quantize("int8"),
        "twn": layer.to_classical().quantize("twn"),
    }


TWINS = twins()


@pytest.mark.parametrize("name", TWINS)
def test_export_with_any_batch_and_size(name):
    twin = TWINS[name].eval()
    batch, height, width = (torch.export.Dim(n, min=3) for n in ("batch", "height", "width"))
    x = images(3, twin.in_channels, 8, 7)
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: batch, 2: height, 3: width},))
    for shape in ((3, 8, 7), (5, 9, 12)):
        y = images(shape[0], twin.in_channels, *shape[1:], seed=1)
        torch.testing.assert_close(program.module()(y), twin(y), atol=1e-6, rtol=0)
    assert not any("qconv" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", TWINS)
def test_compile_without_graph_breaks(name):
    twin = TWINS[name]
    # The graph alone: writing and compiling C++ for it would take most of the test's time.
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(3, twin.in_channels, 8, 7)
    torch.testing.assert_close(compiled(x), twin(x), atol=1e-6, rtol=0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", TWINS)
def test_onnxruntime_gives_the_same(name, tmp_path):
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    twin, path = TWINS[name].eval(), tmp_path / "twin.onnx"
    x = images(3, twin.in_channels, 8, 7)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(twin, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(path)
    y = images(5, twin.in_channels, 8, 7, seed=1)
    (got,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    np.testing.assert_allclose(got, twin(y), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FourierConv2d(1, 4, 4), "43046721 coefficients an output, but at most 65536"),
        (lambda: FourierConv2d(1, 4, 2, degree=(1, 2)), "degree has 2 entries but a patch has 4 numbers"),
        (lambda: FourierConv2d(1, 4, 2, degree=-1), "degree is -1"),
        (lambda: FourierConv2d(1, 4, 2, frequency=0), "frequency is 0"),
        (lambda: FourierConv2d(1, 4, 2, weight="int88"), "'int8'"),
        (lambda: FourierConv2d(1, 4, 2).quantize("int1"), "int1"),
        (
            lambda: QuantumConv2d(1, 4, (1, 2), kernel=reuploading(2, 200)).to_classical(),
            "a polynomial of 160801 coefficients",
        ),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_amplitude_encoding_has_no_twin():
    with pytest.raises(Unsupported, match="no trigonometric polynomial"):
        QuantumConv2d(1, 2, 2, encoding="amplitude").to_classical()


def test_what_is_zero_has_no_sign_for_a_quantizer_to_read():
    torch.manual_seed(0)
    layer = QuantumConv2d(1, 4, 2, kernel="strongly_entangling")
    with torch.no_grad():
        layer.weight.zero_()
    coefficients = layer.to_classical().weight
    # CNOTs alone turn each Z into a product of Zs: one cosine a wire it reaches.
    assert (coefficients.count_nonzero(dim=1) == 1).all()
    torch.testing.assert_close(coefficients.sum(dim=1), torch.ones(4))
