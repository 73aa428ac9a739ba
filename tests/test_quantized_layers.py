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

from classical.integer import integer_twin
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import IntegerActivation, quantizer

PAIRS = [
    ("float", "float"),
    ("int8", "int8"),
    ("int4_channel", "int4"),
    ("int8_channel_affine", "dorefa4"),
    ("twn", "int8"),
    ("bnn", "bnn"),
    ("dorefa2", "dorefa1"),
    ("ttq", "hwgq2"),
    ("naq5", "lsq4"),
    ("lq2", "lq2"),
    ("lsq2", "lsq2"),
    ("rq4", "rq_st4"),
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
    with torch.random.fork_rng():  # relaxed quantization draws noise
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
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(2, 4, 3, weight=weight, activation=activation, dtype=dtype),
        nn.BatchNorm2d(4, dtype=dtype),
        conv(4, 3, 3, weight=weight, activation=activation, dtype=dtype, seed=1),
        nn.BatchNorm2d(3, dtype=dtype),
        nn.Flatten(),
        QuantizedLinear(27, 2, weight=weight, activation=activation, dtype=dtype),
    )
    output = model(x)
    output.square().sum().backward()
    assert output.dtype == dtype
    biases = {name for name, _ in model.named_parameters() if name in ("0.bias", "2.bias")}  # undone by normalization
    for name, tensor in (("x", x), *model.named_parameters()):
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0 or name in biases, name


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
    for part, name in (("weight_quantizer", weight), ("activation_quantizer", activation)):
        kind = name.rstrip("0123456789")
        stored = {"lsq": ("step",), "rq": ("step", "log_noise"), "rq_st": ("step", "log_noise"), "lq": ("basis",)}
        stored |= {"ttq": ("positive", "negative"), "naq": ("positive", "negative")}
        stored |= {"int": ("low", "high")} if part == "activation_quantizer" else {}
        expected |= {f"{part}.{key}" for key in stored.get(kind, ())}
    assert set(layer.state_dict()) == expected
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_a_layer_that_was_never_run_loads_what_another_one_stored(weight: str, activation: str) -> None:
    x = sample(2, 3, 6, 6)
    fresh, trained = (conv(3, 4, 3, weight=weight, activation=activation, seed=seed) for seed in (0, 1))
    keys = set(fresh.state_dict())
    for stored in (fresh.state_dict(), (trained(x), trained.state_dict())[1]):
        assert set(stored) == keys
        other = conv(3, 4, 3, weight=weight, activation=activation, seed=2)
        other.load_state_dict(stored)
        assert all(torch.equal(stored[key], value) for key, value in other.state_dict().items())
    assert torch.equal(other.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_channels_last(weight: str, activation: str, training: bool) -> None:
    x = sample(2, 3, 6, 6)
    layer = conv(3, 4, 3, padding=1, weight=weight, activation=activation)
    layer(x)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    results = []
    for one, images in ((layer, x), (other, x.to(memory_format=torch.channels_last))):
        one.train(training and "rq" not in weight)  # noise is drawn in the order of memory
        results.append([one(images)])
        results[-1][0].sum().backward()
        results[-1].append(one.weight.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("weight", "activation"), PAIRS[1:])
def test_torch_compiles_layers_without_breaks(weight: str, activation: str) -> None:
    x = sample(2, 3, 6, 6)
    layer = conv(3, 4, 3, weight=weight, activation=activation)
    layer(x)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    results = []
    for one in (layer, compiled):
        torch.manual_seed(0)
        results.append(one(x))
    torch.testing.assert_close(*results)


def test_a_learned_scale_starts_from_the_weights_of_its_layer() -> None:
    for name in ("lsq4", "ttq", "naq5", "lq2", "rq4"):
        layer = conv(3, 4, 3, weight=name)
        assert layer.weight_quantizer.calibrated
        alone = copy.deepcopy(layer.weight_quantizer)
        alone.fit(layer.weight)
        assert all(torch.equal(alone.state_dict()[key], v) for key, v in layer.weight_quantizer.state_dict().items())


def test_a_learned_quantizer_object_is_fitted_once() -> None:
    for name in ("lsq4", "lq2"):
        shared = quantizer(name)
        first = conv(3, 4, 3, weight=shared)
        before = copy.deepcopy(shared.state_dict())
        assert conv(3, 4, 3, weight=shared, seed=1).weight_quantizer is first.weight_quantizer
        assert all(torch.equal(before[key], value) for key, value in shared.state_dict().items())


def test_layers_built_without_memory_load_their_state() -> None:
    for weight, activation in PAIRS:
        layer = QuantizedConv2d(3, 4, 3, weight=weight, activation=activation, device="meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        donor = conv(3, 4, 3, weight=weight, activation=activation)
        layer.to_empty(device="cpu").load_state_dict(donor.state_dict())
        x = sample(2, 3, 6, 6)
        assert torch.equal(layer.eval()(x), donor.eval()(x)), weight


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


@pytest.mark.parametrize(("weight", "activation"), [("int8", "int8"), ("ttq", "lsq4"), ("lq2", "lq2")])
def test_export(weight: str, activation: str) -> None:
    layer = conv(2, 3, 3, padding=1, weight=weight, activation=activation)
    x = sample(2, 2, 5, 5)
    layer(x)
    layer.eval()
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


EVEN = [pair for pair in PAIRS[1:] if pair[0][:2] not in ("tt", "na", "lq")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weight", "activation"), [*EVEN, ("dorefa1", "hwgq1"), ("int4_affine", "hwgq3"), ("bnn", "dorefa1")]
)
def test_layers_of_even_levels_equal_their_integer_twins(weight: str, activation: str, dtype: torch.dtype) -> None:
    x = sample(4, 3, 6, 6, dtype=dtype)
    layer = conv(3, 4, 3, padding=1, weight=weight, activation=activation, dtype=dtype)
    layer(x)
    expected = layer.eval()(x).detach()
    found = integer_twin(layer)(x)
    assert (found - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-6) * expected.abs().max()


# 1 x 8 x 8, four 3 x 3 kernels: 64 input values, 36 positions, 144 outputs of 9 products each; all are float32.
BASE = {"units": 144, "params": 40, "weight_bits": 40 * 32, "activation_bits": 144 * 32}
# Each input value to a code: times 1 / scale, plus the zero point, clipped at both ends; each output times its scale.
CODED = {"mul:fp32": 64 + 144, "add:fp32": 64, "cmp:fp32": 2 * 64}
STEP = {"mul:fp32": 64 + 144, "cmp:fp32": 2 * 64}
COUNTS = [
    ("float", "float", {"mac:fp32*fp32": 1296}),
    ("int8", "int8", CODED | {"mac:int8*int8": 1296, "params": 43, "weight_bits": 36 * 8 + 7 * 32}),
    ("int4_channel", "int8", CODED | {"mac:int4*int8": 1296, "params": 46, "weight_bits": 36 * 4 + 10 * 32}),
    ("xnor", "int8", CODED | {"mac:binary*int8": 1296, "params": 46, "weight_bits": 36 + 10 * 32}),
    ("twn", "float", {"mac:ternary*fp32": 1296, "mul:fp32": 144, "params": 41, "weight_bits": 36 * 2 + 5 * 32}),
    # Signs: one comparison an input value, no scale.
    ("bnn", "bnn", {"mac:binary*binary": 1296, "cmp:fp32": 64, "weight_bits": 36 + 4 * 32}),
    # A zero point of the weights: 36 sums of a patch of 9, then a product and a sum for each output.
    (
        "int8_affine",
        "int8",
        CODED
        | {"mac:int8*int8": 1296, "add:int32": 36 * 8 + 144, "mul:int32": 144}
        | {"params": 44, "weight_bits": 36 * 8 + 8 * 32},
    ),
    (
        "int8_channel_affine",
        "float",
        {"mac:int8*fp32": 1296, "add:fp32": 36 * 8 + 144, "mul:fp32": 144 + 144}
        | {"params": 48, "weight_bits": 36 * 8 + 12 * 32},
    ),
    # No zero point: nothing is added. One bit: a comparison.
    ("dorefa2", "dorefa3", STEP | {"mac:int2*int3": 1296, "params": 42, "weight_bits": 36 * 2 + 6 * 32}),
    (
        "dorefa1",
        "hwgq1",
        {"mac:binary*binary": 1296, "cmp:fp32": 64, "mul:fp32": 144, "params": 42, "weight_bits": 36 + 6 * 32},
    ),
    ("lsq4", "hwgq2", STEP | {"mac:int4*int2": 1296, "params": 42, "weight_bits": 36 * 4 + 6 * 32}),
    ("rq_st3", "lsq5", STEP | {"mac:int3*int5": 1296, "params": 42, "weight_bits": 36 * 3 + 6 * 32}),
    # Levels one by one: two, then four products an output, and the sums of their parts.
    (
        "ttq",
        "lsq8",
        {"mac:ternary*int8": 1296, "mul:fp32": 64 + 288, "cmp:fp32": 128, "add:fp32": 144}
        | {"params": 43, "weight_bits": 36 * 2 + 7 * 32},
    ),
    (
        "naq5",
        "float",
        {"mac:ternary*fp32": 1296, "mul:fp32": 4 * 144, "add:fp32": 3 * 144, "params": 44}
        | {"weight_bits": 36 * 3 + 8 * 32},
    ),
    # Counting signs takes each of the two pairs of levels apart.
    (
        "naq5",
        "bnn",
        {"mac:ternary*binary": 2 * 1296, "cmp:fp32": 64, "mul:fp32": 4 * 144, "add:fp32": 3 * 144, "params": 44}
        | {"weight_bits": 36 * 3 + 8 * 32},
    ),
    # Two signs by three: six sums of signs, each with a factor; a basis of 2 for each of 4 outputs and one of 3.
    (
        "lq2",
        "lq3",
        {"mac:binary*binary": 6 * 1296, "cmp:fp32": 3 * 64, "mul:fp32": 6 * 144, "add:fp32": 5 * 144, "params": 51}
        | {"weight_bits": 36 * 2 + 15 * 32},
    ),
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
    for sizes in ((1, 2, 0), (1, 2, (3, 0)), (1, 2, 3, 0), (1, 2, 3, 1, 0, 0), (0, 2, 3), (1, 0, 3)):
        with pytest.raises(ValueError, match="must be 1 or more"):
            QuantizedConv2d(*sizes)
