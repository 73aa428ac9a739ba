"""QuantizedConv2d and QuantizedLinear: torch's layers in everything but the values they use."""

import copy
import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import IntegerActivation

PAIRS = [
    ("float", "float"),
    ("int8", "int8"),
    ("int4_channel", "int4"),
    ("twn", "int8"),
    ("bnn", "bnn"),
    ("xnor", "xnor"),
]
FLOAT: dict[str, Any] = {"weight": "float", "activation": "float"}
BINARY: dict[str, Any] = {"weight": "xnor", "activation": "xnor"}


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def conv(*args: Any, seed: int = 0, **kwargs: Any) -> QuantizedConv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return QuantizedConv2d(*args, **kwargs)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a convolution and a batch that fits it."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    kernel, dilation = draw(pair), draw(pair)
    padding = draw(st.sampled_from(["valid", "same"]) | st.tuples(st.integers(0, 2), st.integers(0, 2)))
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    args: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else draw(pair),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [0, 0] if padding == "valid" else spans if padding == "same" else [2 * p for p in padding]
    assume(all(size + pad >= span for size, pad, span in zip((height, width), pads, spans, strict=True)))
    assume(args["padding_mode"] == "zeros" or all(size > pad for size, pad in zip((height, width), pads, strict=True)))
    return args, sample(draw(st.integers(1, 2)), args["in_channels"], height, width, seed=draw(st.integers(0, 9)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=60, deadline=None)
@given(geometries())
def test_float_conv_equals_torch_bit_for_bit(case: tuple[dict[str, Any], Tensor]) -> None:
    args, x = case
    ours, theirs = conv(**args, **FLOAT), nn.Conv2d(**args)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x[0]), theirs(x[0]))
    assert ours.geometry.output_shape(tuple(x.shape[1:])) == theirs(x[0]).shape


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=40, deadline=None)
@given(geometries(), st.sampled_from(PAIRS[1:-1]))
def test_quantized_conv_is_torch_on_quantized_tensors(
    case: tuple[dict[str, Any], Tensor], names: tuple[str, str]
) -> None:
    args, x = case
    ours, theirs = conv(**args, weight=names[0], activation=names[1]), nn.Conv2d(**args)
    ours(x)
    ours.eval()
    theirs.load_state_dict({"weight": ours.quantized_weight()} | ({"bias": ours.bias} if args["bias"] else {}))
    assert torch.equal(ours(x), theirs(ours.activation_quantizer(x)))  # so 0 is padded after quantization


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=40, deadline=None)
@given(geometries())
def test_xnor_conv_scales_each_position_by_its_patch(case: tuple[dict[str, Any], Tensor]) -> None:
    args, x = case
    ours, theirs = conv(**args, **BINARY), nn.Conv2d(**args | {"bias": False})
    theirs.load_state_dict({"weight": ours.quantized_weight()})
    box = nn.Conv2d(**args | {"bias": False})
    taps = box.weight[0].numel()
    box.load_state_dict({"weight": torch.full_like(box.weight, 1 / taps)})  # the mean over the patch of |x|
    expected = theirs(torch.where(x >= 0, 1.0, -1.0)) * box(x.abs())
    if ours.bias is not None:
        expected = expected + ours.bias[:, None, None]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_groups_are_independent_layers(weight: str, activation: str) -> None:
    x = sample(2, 4, 6, 6)
    whole = conv(4, 6, 3, groups=2, bias=False, weight="float", activation=activation)
    whole(x)
    whole.eval()
    for i in range(2):
        part = conv(2, 3, 3, bias=False, weight="float", activation=activation)
        part.load_state_dict(whole.state_dict() | {"weight": whole.weight[3 * i : 3 * i + 3]})
        half = part.eval()(x[:, 2 * i : 2 * i + 2])
        torch.testing.assert_close(whole(x)[:, 3 * i : 3 * i + 3], half)


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 4, 5)])
def test_linear(shape: tuple[int, ...], weight: str, activation: str) -> None:
    x = sample(*shape)
    layer = QuantizedLinear(5, 7, weight=weight, activation=activation)
    layer(x)
    layer.eval()
    values = layer.activation_quantizer(x[None])[0]
    scale = x.abs().mean(-1, keepdim=True) if activation == "xnor" else 1.0
    expected = values @ layer.quantized_weight().T * scale + layer.bias
    torch.testing.assert_close(layer(x), expected)
    if weight == activation == "float":
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_training_reaches_every_parameter_and_the_input(weight: str, activation: str, dtype: torch.dtype) -> None:
    x = (0.5 * sample(4, 2, 7, 7, dtype=dtype)).requires_grad_()
    model = nn.Sequential(
        conv(2, 3, 3, weight=weight, activation=activation, dtype=dtype),
        conv(3, 2, 3, weight=weight, activation=activation, dtype=dtype, seed=1),
        nn.Flatten(),
        QuantizedLinear(18, 2, weight=weight, activation=activation, dtype=dtype),
    )
    output = model(x)
    output.square().sum().backward()
    assert output.dtype == dtype
    for tensor in (x, *model.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_copies_give_the_same_outputs(weight: str, activation: str) -> None:
    x = sample(2, 3, 6, 6)
    layer = conv(3, 4, 3, padding=1, weight=weight, activation=activation)
    layer(x)
    layer.eval()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = conv(3, 4, 3, padding=1, weight=weight, activation=activation, seed=1).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert weight in repr(layer)
    assert f"({activation})" in repr(layer)
    expected = {"weight", "bias"}
    if activation.startswith("int"):
        expected |= {"activation_quantizer.low", "activation_quantizer.high"}
    assert set(layer.state_dict()) == expected
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_eval_changes_no_state_and_takes_samples_alone(weight: str, activation: str) -> None:
    layer = conv(2, 3, 3, weight=weight, activation=activation).eval()
    x = sample(3, 2, 6, 6) * torch.tensor([1.0, 3.0, 9.0])[:, None, None, None]
    for trained in (False, True):
        if trained:
            layer.train()
            layer(x)
            layer.eval()
        before = copy.deepcopy(layer.state_dict())
        together = layer(x)
        alone = torch.stack([layer(sample) for sample in x])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(torch.func.vmap(layer)(x), alone)
        layer.train().eval()
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_a_quantizer_object_is_used_as_it_is() -> None:
    shared = IntegerActivation(5, momentum=1.0)
    first, second = conv(1, 1, 1, activation=shared), QuantizedLinear(4, 1, activation=shared)
    first(torch.ones(1, 1, 2, 2) * 3)
    assert second.activation_quantizer is shared
    assert float(shared.high) == 3


def test_empty_batch() -> None:
    for weight, activation in PAIRS:
        layer = conv(2, 3, 3, weight=weight, activation=activation)
        assert layer(torch.empty(0, 2, 5, 5)).shape == (0, 3, 3, 3)
        assert layer.eval()(torch.empty(0, 2, 5, 5)).shape == (0, 3, 3, 3)


def test_export() -> None:
    layer = conv(2, 3, 3, padding=1)
    x = sample(2, 2, 5, 5)
    layer(x)
    layer.eval()
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


# 1 x 8 x 8, four 3 x 3 kernels: 64 input values, 36 positions, 144 outputs of 9 products each; all are float32.
BASE = {"units": 144, "params": 40, "weight_bits": 40 * 32, "activation_bits": 144 * 32}
# Each input value to a code: times 1 / scale, plus the zero point, clipped at both ends; each output times its scale.
CODED = {"mul:fp32": 64 + 144, "add:fp32": 64, "cmp:fp32": 2 * 64}
COUNTS = [
    ("float", "float", {"mac:fp32*fp32": 1296}),
    ("int8", "int8", CODED | {"mac:int8*int8": 1296, "params": 43, "weight_bits": 36 * 8 + 7 * 32}),
    ("int4_channel", "int8", CODED | {"mac:int4*int8": 1296, "params": 46, "weight_bits": 36 * 4 + 10 * 32}),
    ("xnor", "int8", CODED | {"mac:binary*int8": 1296, "params": 46, "weight_bits": 36 + 10 * 32}),
    ("twn", "float", {"mac:ternary*fp32": 1296, "mul:fp32": 144, "params": 41, "weight_bits": 36 * 2 + 5 * 32}),
    # Signs: one comparison an input value, no scale.
    ("bnn", "bnn", {"mac:binary*binary": 1296, "cmp:fp32": 64, "weight_bits": 36 + 4 * 32}),
    (  # K: 36 box sums of 8 additions each, 36 divisions by the area; then alpha, K and the bias for each output
        "xnor",
        "xnor",
        {"mac:binary*binary": 1296, "mul:fp32": 2 * 144 + 36, "add:fp32": 144 + 288, "cmp:fp32": 64}
        | {"params": 44, "weight_bits": 36 + 8 * 32},
    ),
]


@pytest.mark.parametrize(("weight", "activation", "expected"), COUNTS)
def test_conv_counts(weight: str, activation: str, expected: dict[str, int]) -> None:
    layer = conv(1, 4, 3, weight=weight, activation=activation)
    assert layer.counts((1, 8, 8)) == Counter(BASE | expected)


def test_counts_scale_with_groups_and_rows() -> None:
    plain, grouped = conv(4, 8, 3, padding=1, **BINARY), conv(4, 8, 3, padding=1, groups=2, **BINARY)
    assert plain.counts((4, 5, 5))["mac:binary*binary"] == 8 * 25 * 36
    assert grouped.counts((4, 5, 5))["mac:binary*binary"] == 8 * 25 * 18
    linear = QuantizedLinear(6, 5, bias=False, weight="twn", activation="int8")
    assert linear.counts((6,)) == Counter(
        {"mac:ternary*int8": 30, "mul:fp32": 6 + 5, "add:fp32": 6, "cmp:fp32": 12, "units": 5}
        | {"activation_bits": 5 * 32, "params": 33, "weight_bits": 60 + 96}
    )
    rows = linear.counts((7, 6))
    assert (rows["mac:ternary*int8"], rows["mul:fp32"], rows["cmp:fp32"]) == (210, 77, 84)


def test_inputs_are_quantized_once_however_many_outputs_read_them() -> None:
    strided, dense = conv(2, 3, 3, stride=3), conv(2, 3, 3, padding=1)
    assert strided.counts((2, 9, 9))["cmp:fp32"] == dense.counts((2, 9, 9))["cmp:fp32"] == 2 * 162


def test_errors() -> None:
    layer, linear = conv(2, 3, 3), QuantizedLinear(5, 2)
    with pytest.raises(ValueError, match=r"input is torch.uint8 .* pass x.float\(\) / 255"):
        layer(torch.zeros(1, 2, 5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"input is torch\.int64"):
        linear(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(1, 5, 5\) but the layer takes \(2, height, width\)"):
        layer(torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 5\) but"):
        layer.counts((2, 5))
    with pytest.raises(ValueError, match="kernel spans 3x3 but the padded input is 2x5"):
        layer(torch.zeros(1, 2, 2, 5))
    with pytest.raises(ValueError, match=r"shape \(1, 4\) but the layer takes \(..., 5\)"):
        linear(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="groups=2 must divide in_channels=3 and out_channels=4"):
        conv(3, 4, 3, groups=2)
    with pytest.raises(ValueError, match="nearest name is 'int8'"):
        conv(3, 4, 3, weight="in8")
    with pytest.raises(ValueError, match="'twn' is not for activations"):
        QuantizedLinear(3, 4, activation="twn")
