"""Integer twins: equal to their layers, and integer all the way."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantized_layers import conv, geometries, sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from classical.integer import IntegerConv2d, IntegerLinear, fixed_point, integer_twin
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import Quantizer, quantizer

WEIGHTS = ("int2", "int4", "int8", "int8_channel", "twn", "bnn", "xnor")
ACTIVATIONS = ("int4", "int8", "bnn", "xnor")


def trained(layer: Any, x: Tensor) -> Any:
    layer(x)
    return layer.eval()


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= relative * expected.abs().max()


class IntegersOnly(TorchDispatchMode):
    """Fails where any operation sees or makes a real tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in (*args, *(results if isinstance(results, tuple | list) else (results,))):
            assert not (isinstance(value, Tensor) and value.dtype.is_floating_point), func
        return results


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about its own speed
@settings(max_examples=120, deadline=None)
@given(geometries(), st.sampled_from(WEIGHTS), st.sampled_from(ACTIVATIONS))
def test_conv_twin_equals_its_layer(case: tuple[dict[str, Any], Tensor], weight: str, activation: str) -> None:
    args, x = case[0], case[1].double()
    layer = trained(conv(**args, weight=weight, activation=activation, dtype=torch.float64), x)
    twin = integer_twin(layer)
    # Both are exact in float64 but for the bias, which the twin rounds to its last fraction bit.
    rounding = 1e-12 * (1 + layer(x).abs().max()) + (twin.scale.max() / 2 if args["bias"] else 0)
    assert (twin(x) - layer(x)).abs().max() <= rounding
    assert torch.equal(twin(x[0]), twin(x)[0])
    codes = twin.encode(x)
    with IntegersOnly():
        accumulators = twin.accumulate(codes)
    assert accumulators.dtype == torch.int32
    assert accumulators.shape == layer(x).shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 6)])
def test_linear_twin_equals_its_layer(shape: tuple[int, ...], weight: str, activation: str) -> None:
    x = sample(*shape)
    layer = trained(QuantizedLinear(6, 5, weight=weight, activation=activation), x)
    twin = integer_twin(layer)
    assert isinstance(twin, IntegerLinear)
    with torch.no_grad():
        assert_near(twin(x), layer(x))
    codes = twin.encode(x[None] if x.dim() == 1 else x)
    with IntegersOnly():
        twin.accumulate(codes)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_twin_equals_its_layer_to_the_rounding_of_the_dtype(dtype: torch.dtype, relative: float) -> None:
    x = sample(2, 3, 6, 6, dtype=dtype)
    for weight in WEIGHTS:
        for activation in ACTIVATIONS:
            args: dict[str, Any] = {"weight": weight, "activation": activation, "dtype": dtype}
            layer = trained(conv(3, 4, 3, padding=1, bias=dtype == torch.float32, **args), x)
            with torch.no_grad():
                assert_near(integer_twin(layer)(x), layer(x), relative)


def test_signs_are_counted_by_xnor() -> None:
    layer = conv(2, 1, (1, 3), weight="bnn", activation="bnn", padding=(0, 1), bias=False)
    x = sample(1, 2, 1, 5)
    image = np.where(x[0, :, 0].numpy() >= 0, 1, 0)
    kernel = np.where(layer.weight[0, :, 0].detach().numpy() >= 0, 1, 0)
    expected = []
    for position in range(5):
        taps = [tap for tap in range(3) if 0 <= position + tap - 1 < 5]  # padding holds no bit
        agree = sum(int(~(image[c, position + t - 1] ^ kernel[c, t]) & 1) for c in range(2) for t in taps)
        expected.append(2 * agree - 2 * len(taps))
    twin = integer_twin(layer)
    assert twin.accumulate(twin.encode(x)).flatten().tolist() == expected


def test_zero_point_and_bias_are_integers_of_the_equation() -> None:
    x = sample(2, 3, 6, 6) + 1.0  # a zero point far from the middle
    layer = trained(conv(3, 4, 3, padding=1), x)
    twin = integer_twin(layer)
    _, weight_scale, _ = layer.weight_quantizer.integers(layer.weight)
    input_codes, input_scale, zero = layer.activation_quantizer.integers(x)
    step = (weight_scale * input_scale.flatten()[0]).double()
    fraction = 2**twin.fraction_bits
    expected = (layer.bias / step - zero.flatten()[0] * twin.weight.double().sum((1, 2, 3))) * fraction
    assert (twin.bias - expected).abs().max() <= 0.5 + 1e-4 * fraction
    assert twin.weight.dtype == torch.int8
    assert twin.bias.dtype == torch.int32
    assert torch.equal(twin.encode(x).int(), input_codes)
    torch.testing.assert_close(twin.scale, (step / fraction).expand(4))


def test_accumulators_cannot_overflow() -> None:
    # The worst input: the smallest code wherever the weight is positive, the largest elsewhere, and the reverse.
    taps = 256
    with torch.no_grad():
        layer = QuantizedLinear(taps, 2, weight="int12", activation="int12")
        signs = torch.where(torch.arange(taps) % 2 == 0, 1.0, -1.0)
        layer.weight.copy_(torch.stack((signs, -signs)))
        layer.bias.copy_(torch.tensor([3.0, -3.0]))
        x = torch.stack((signs, -signs)) - 0.4
        twin = integer_twin(trained(layer, x))
        exact = twin.encode(x).long() @ twin.weight.long().T * 2**twin.fraction_bits + twin.bias.long()
        assert torch.equal(twin.accumulate(twin.encode(x)).long(), exact)
        assert exact.abs().max() > 2**29  # near the limit of the check
        assert_near(twin(x), layer(x))


def test_what_would_overflow_is_refused() -> None:
    x = sample(2, 64, 3, 3)
    layer = trained(conv(64, 2, 3, weight="int16", activation="int16"), x)
    with pytest.raises(
        ValueError, match=r"can reach .* but an int32 accumulator holds 2147483647: it adds 576 products"
    ):
        integer_twin(layer)
    dead = trained(QuantizedLinear(4, 3, weight="xnor"), sample(2, 4))
    with torch.no_grad():
        dead.weight[1] = 0  # its scale is 0: no number of steps makes the bias
    with pytest.raises(ValueError, match="output channel 1 can reach inf"):
        integer_twin(dead)
    with torch.no_grad():
        dead.bias[1] = 0
        assert_near(integer_twin(dead)(sample(2, 4)), dead(sample(2, 4)))


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("activation", ["int8", "bnn"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_requantized_codes_are_within_one_level(weight: str, activation: str, bits: int) -> None:
    x = sample(3, 4, 8, 8)
    layer = trained(conv(4, 6, 3, padding=1, weight=weight, activation=activation), x)
    following: Quantizer = trained(quantizer(f"int{bits}", "activation"), layer(x[:2]).relu().detach())
    twin = integer_twin(layer)
    accumulators = twin.accumulate(twin.encode(x))
    codes = twin.requantize(accumulators, following)
    expected = following.integers(layer(x)).codes  # the range starts at 0: clipping is the ReLU
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert (codes - expected).abs().max() <= 1
    assert (codes == expected).float().mean() > 0.99
    assert codes.unique().numel() >= min(2**bits, 32) // 2  # not all clipped


def test_a_whole_network_in_integers() -> None:
    x = sample(4, 1, 8, 8)
    layers = [
        conv(1, 4, 3, weight="int8", activation="int8"),
        conv(4, 4, 3, padding=1, weight="int8_channel", activation="int8", seed=1),
        conv(4, 3, 6, weight="twn", activation="int8", seed=2),
    ]
    model = trained(nn.Sequential(*layers), x)
    first, second, third = (integer_twin(layer) for layer in layers)
    codes = first.encode(x)
    for twin, following in ((first, second), (second, third)):
        codes = twin.requantize(twin.accumulate(codes), following.activation)
    output = third.accumulate(codes) * third.scale[:, None, None]
    expected = model(x).detach()
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()  # one level at most in each of two layers


def test_fixed_point_multipliers() -> None:
    factors = torch.tensor([0.0, 1.0, 0.5, 1 - 2**-40, 3e-4, 7.0, 2.0**-32, 2.0**29], dtype=torch.float64)
    multiplier, shift = fixed_point(factors)
    assert multiplier[0] == 0
    assert ((multiplier[1:] >= 2**30) & (multiplier[1:] < 2**31)).all()
    assert ((shift >= 1) & (shift <= 62)).all()
    torch.testing.assert_close(multiplier.double() * torch.exp2(-shift.double()), factors, rtol=2.0**-31, atol=0)
    for bad in (2.0**-34, 2.0**31):
        with pytest.raises(ValueError, match="must lie in 2\\^-32"):
            fixed_point(torch.tensor([bad]))


@pytest.mark.parametrize("activation", ["int8", "xnor"])
def test_the_twin_is_its_own(activation: str) -> None:
    x = sample(2, 2, 5, 5, dtype=torch.float64)
    layer = trained(conv(2, 2, 3, activation=activation, dtype=torch.float64), x)
    twin = integer_twin(layer)
    before = twin(x)
    layer.train()(10 * x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)
    assert isinstance(twin, IntegerConv2d)
    assert torch.equal(twin(x), before)
    assert twin.train()(10 * x).shape == before.shape
    assert torch.equal(twin(x), before)
    assert twin(torch.empty(0, 2, 5, 5)).shape == (0, 2, 3, 3)


def test_errors() -> None:
    x = sample(2, 2, 5, 5)
    with pytest.raises(ValueError, match="no integer twin of Conv2d: use QuantizedConv2d"):
        integer_twin(nn.Conv2d(1, 1, 1))
    with pytest.raises(
        ValueError, match=r"has seen no range yet: calibrate\(\) the network, or run a batch in train\(\)"
    ):
        integer_twin(conv(2, 2, 3))
    for names in ({"weight": "float"}, {"activation": "float"}):
        with pytest.raises(ValueError, match="'float' values have no integer codes"):
            integer_twin(trained(QuantizedConv2d(2, 2, 3, **names), x))
    twin = integer_twin(trained(conv(2, 2, 3), x))
    accumulators = twin.accumulate(twin.encode(x))
    with pytest.raises(ValueError, match=r"input is torch\.uint8"):
        twin(x.to(torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(3, 5, 5\) but the layer takes \(2, height, width\)"):
        twin(sample(1, 3, 5, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) but the layer takes \(..., 4\)"):
        integer_twin(QuantizedLinear(4, 1, weight="bnn", activation="bnn"))(sample(2, 3))
    with pytest.raises(ValueError, match="seen no range"):
        twin.requantize(accumulators, quantizer("int8", "activation"))
    with pytest.raises(ValueError, match=r"such as 'int8', not BNN\(bnn\)"):
        twin.requantize(accumulators, quantizer("bnn", "activation"))
    mapped = integer_twin(conv(2, 2, 3, weight="xnor", activation="xnor"))
    with pytest.raises(ValueError, match="no fixed multiplier"):
        mapped.requantize(mapped.accumulate(mapped.encode(x)), twin.activation)
