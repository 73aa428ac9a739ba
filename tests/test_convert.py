"""quantize(model): the same network with quantized layers, whatever is tied, hooked, masked or nested in it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from classical import quantize
from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.quantizers import LSQ, IntegerActivation, quantizer


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="circular", bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, padding="same"), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.Linear(8, 3),
        )


def images(seed: int = 0) -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def names(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The quantizers of every quantized layer."""
    return {
        name: (layer.weight_quantizer.name, layer.activation_quantizer.name)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedConv2d | QuantizedLinear)
    }


def test_float_quantizers_change_nothing() -> None:
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    turned = quantize(model, weight="float", activation="float")
    assert torch.equal(turned(images()), model(images()))
    assert set(names(turned)) == {"0", "3.0", "5", "6"}
    assert names(model) == {}  # the model stays as it was
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert turned.training is False
    with torch.no_grad():
        turned[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


def test_every_layer_is_what_its_constructor_would_make() -> None:
    model = network()
    turned = quantize(model, weight="int4_channel", activation="int8")
    for name in ("0", "3.0", "5"):
        old, new = model.get_submodule(name), turned.get_submodule(name)
        options: dict[str, Any] = {"weight": "int4_channel", "activation": "int8", "bias": old.bias is not None}
        if isinstance(old, nn.Conv2d):
            built: nn.Module = QuantizedConv2d(
                old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
                padding_mode=old.padding_mode, **options,
            )  # fmt: skip
        else:
            built = QuantizedLinear(64, 8, **options)
        built.load_state_dict(new.state_dict())
        x = torch.randn(2, *{"0": (1, 8, 8), "3.0": (4, 4, 4), "5": (64,)}[name])
        assert repr(new) == repr(built)
        assert torch.equal(new.eval()(x), built.eval()(x))


def test_first_last_and_skip() -> None:
    model, pair = network(), ("twn", "int4")
    byte, real = ("int8", "int8"), ("float", "float")
    assert names(quantize(model)) == dict.fromkeys(("0", "3.0", "5", "6"), byte)
    found = names(quantize(model, weight="twn", activation="int4", first=byte, last=real))
    assert found == {"0": byte, "3.0": pair, "5": pair, "6": real}
    found = names(quantize(model, weight="twn", activation="int4", first=byte, last=real, skip=("0", "6")))
    assert found == {"3.0": byte, "5": real}
    assert names(quantize(model, weight="twn", activation="int4", last=byte, skip="5")) == {
        "0": pair,
        "3.0": pair,
        "6": byte,
    }
    assert names(quantize(nn.Sequential(nn.Linear(2, 2)), first=pair, last=real)) == {"0": pair}
    assert names(quantize(nn.Linear(2, 2), weight="twn")) == {"": ("twn", "int8")}


@pytest.mark.parametrize("name", ["lsq4", "ttq", "naq5", "lq2", "rq4"])
def test_learned_scales_start_from_the_weights(name: str) -> None:
    model = network()
    turned = quantize(model, weight=name, activation="int8")
    for part in ("0", "3.0", "5", "6"):
        expected = quantizer(name)
        expected.fit(model.get_submodule(part).weight)  # type: ignore[arg-type]
        found = turned.get_submodule(part).weight_quantizer.state_dict()  # type: ignore[union-attr, operator]
        assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


def test_every_layer_has_quantizers_of_its_own() -> None:
    turned = quantize(network(), weight=LSQ(3), activation=IntegerActivation(5, momentum=0.5))
    parts = [layer for layer in turned.modules() if isinstance(layer, QuantizedConv2d | QuantizedLinear)]
    assert len({id(part.weight_quantizer) for part in parts}) == 4
    assert len({id(part.activation_quantizer) for part in parts}) == 4
    assert {part.activation_quantizer.momentum for part in parts} == {0.5}


def test_it_trains_from_where_the_float_network_was() -> None:
    model = network()
    turned = quantize(model, weight="lsq4", activation="lsq4", first=("int8", "int8"))
    turned(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in turned.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    reference = quantize(model)
    reference(images())
    expected = model.eval()(images())
    assert (reference.eval()(images()) - expected).abs().max() < 0.05 * expected.abs().max()


def test_tied_modules_and_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = self.again = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.once.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.other(self.again(self.once(x)))
            return out

    turned = quantize(Tied(), weight="float", activation="float")
    assert turned.once is turned.again
    assert turned.other.weight is turned.once.weight
    assert len(list(turned.parameters())) == 3


def test_hooks_stay() -> None:
    model = network()
    seen: list[str] = []
    model[5].register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    quantize(model)(images())
    assert seen == ["QuantizedLinear"]


def test_masks_of_torch_prune_stay() -> None:
    model = network()
    prune.l1_unstructured(model[5], "weight", 0.7)
    model(images()).sum().backward()  # the masked weight now carries a graph, which deepcopy refuses
    turned = quantize(model, weight="lsq4", activation="int8")
    zero = model[5].weight_mask == 0
    optimizer = torch.optim.SGD(turned.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        turned(images()).square().sum().backward()
        optimizer.step()
    turned(images())
    assert (turned[5].quantized_weight()[zero] == 0).all()
    assert (turned[5].quantized_weight() == 0).float().mean() < 0.95
    assert zero.float().mean() > 0.69


def test_parametrizations_stay() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = network()
    parametrize.register_parametrization(model[0], "weight", Half())
    parametrize.register_parametrization(model[6], "weight", Half())
    turned = quantize(model, weight="int8", activation="float")
    for name, base in (("0", QuantizedConv2d), ("6", QuantizedLinear)):
        layer: Any = turned.get_submodule(name)
        assert isinstance(layer, base)
        assert parametrize.is_parametrized(layer, "weight")
        assert torch.equal(layer.quantized_weight(), quantizer("int8")(layer.parametrizations.weight.original / 2))
        assert type(model.get_submodule(name)).__bases__ != (base,)
    turned(images()).sum().backward()
    other = copy.deepcopy(turned)
    assert torch.equal(other.eval()(images()), turned.eval()(images()))
    parametrize.remove_parametrizations(turned[0], "weight")
    assert type(turned[0]) is QuantizedConv2d
    assert parametrize.is_parametrized(model[0], "weight")


def test_layers_derived_from_torchs_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    assert set(names(quantize(model))) == {"1"}
    again = quantize(quantize(nn.Sequential(nn.Linear(4, 4), Own(4, 4))[:1].append(nn.Linear(4, 4)), skip="1"))
    assert names(again) == {"0": ("int8", "int8"), "1": ("int8", "int8")}


def test_dtype_and_mode_are_kept() -> None:
    turned = quantize(network().double().eval(), weight="ttq", activation="lsq4")
    assert {value.dtype for value in turned.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert not any(module.training for module in turned.modules())
    assert turned(images().double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (network(), {"weight": "int99"}, "nearest name is 'int9'"),
        (network(), {"first": ("int8", "ttq")}, "'ttq' is not for activations"),
        (network(), {"skip": ["4", "conv"]}, "nothing to skip at 4, conv: the layers are 0, 3.0, 5, 6"),
        ("net", {}, r"model is 'net' \(str\) but must be an nn.Module"),
        (network(), {"first": "int8"}, r"first is 'int8' but must be a pair of quantizers, \(weight, activation\)"),
        (network(), {"first": ("int8", "int8", "int8")}, "must be a pair of quantizers"),
        (network(), {"last": ("int8",)}, r"last is \('int8',\) but must be a pair"),
        (nn.ReLU(), {}, r"ReLU has no nn.Conv2d or nn.Linear to quantize$"),
        (nn.Sequential(nn.Linear(2, 2)), {"skip": "0"}, "to quantize but the skipped"),
        (nn.Sequential(nn.ReLU()), {"skip": "0"}, r"the layers are \(none\)"),
    ],
)
def test_errors(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(model, **options)
