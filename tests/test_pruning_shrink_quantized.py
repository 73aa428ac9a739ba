"""Smaller models of quantized layers: their scales and learned levels go with their filters, or keep them."""

import re

import pytest
import torch
from test_pruning_shrink import check, sample
from torch import nn
from torch.nn.utils import prune as torch_prune

from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.pruning import prune, shrink_plan
from classical.quantizers import quantizer_names


def quantized(weight: str, activation: str = "int8", columns: float = 0.0) -> nn.Sequential:
    """Calibrated, in eval(); every other filter of both convolutions pruned, and what reads it times `columns`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            QuantizedConv2d(1, 6, 3, weight=weight, activation=activation),
            nn.ReLU(),
            QuantizedConv2d(6, 6, 3, weight=weight, activation=activation),
            nn.ReLU(),
            nn.Flatten(),
            QuantizedLinear(96, 4, weight=weight, activation=activation),
        ).double()
    with torch.no_grad():
        for layer, reader, repeats in ((model[0], model[2], 1), (model[2], model[5], 16)):
            layer.weight[::2] = 0
            reader.weight[:, torch.arange(6).repeat_interleave(repeats) % 2 == 0] *= columns
        model(sample(8, 1, 8, 8))
    return model.eval()


@pytest.mark.parametrize("weight", ["int8", "int4", "int8_channel", "float"])
def test_quantized_networks(weight: str) -> None:
    small = check(quantized(weight), sample(4, 1, 8, 8, seed=1))
    assert [small[i].weight.shape[:2] for i in (0, 2, 5)] == [(3, 1), (3, 3), (4, 48)]


@pytest.mark.parametrize("weight", ["int8", "int4_channel"])
def test_constants_are_folded_as_the_next_layer_quantizes_them(weight: str) -> None:
    model = quantized(weight, columns=0.1)  # the largest weights, which set the scale, stay
    small = check(model, sample(4, 1, 8, 8, seed=1))
    assert [small[i].weight.shape[:2] for i in (0, 2, 5)] == [(3, 1), (3, 3), (4, 48)]
    assert not torch.equal(small[2].bias, model[2].bias[1::2])


def test_columns_that_set_the_scale_stay() -> None:
    model = quantized("int8", columns=0.1)
    with torch.no_grad():
        model[2].weight[1, 2, 0, 0] = 10.0
    small = check(model, sample(4, 1, 8, 8, seed=1))
    assert small[0].out_channels == 6
    assert small[2].out_channels == 3
    assert shrink_plan(model, sample(4, 1, 8, 8)).rows[0].kept == (
        "3 filters: '2' would quantize its other weights differently",
    )


def test_quantizers_whose_levels_depend_on_the_zeros_keep_them() -> None:
    model = quantized("twn")  # threshold and scale are means over all weights
    small = check(model, sample(4, 1, 8, 8, seed=1))
    assert [small[i].weight.shape[:2] for i in (0, 2, 5)] == [(6, 1), (6, 6), (4, 96)]
    assert shrink_plan(model, sample(4, 1, 8, 8)).rows[0].kept == (
        "3 filters: '0' would quantize its other weights differently",
    )


def test_activations_that_share_a_scale_keep_their_channels() -> None:
    small = check(quantized("int8", "xnor"), sample(4, 1, 8, 8, seed=1))
    assert [small[i].weight.shape[:2] for i in (0, 2, 5)] == [(6, 1), (6, 6), (4, 96)]
    model = nn.Sequential(QuantizedConv2d(1, 4, 3), nn.ReLU(), QuantizedConv2d(4, 2, 3)).double().eval()
    prune(model, {"0": 0.5}, structure="filter")  # never calibrated: a range a sample
    assert check(model, sample(4, 1, 8, 8))[0].out_channels == 4
    assert shrink_plan(model, sample(4, 1, 8, 8)).rows == ()


# --- what is stored for each filter ---


def trained(weight: str, dtype: torch.dtype) -> nn.Sequential:
    """Dense, depthwise and linear layers with learned levels unlike those that their weights would start them at."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            QuantizedConv2d(1, 6, 3, weight=weight),
            nn.ReLU(),
            QuantizedConv2d(6, 12, 3, groups=6, weight=weight),
            nn.ReLU(),
            nn.Conv2d(12, 8, 1),
            nn.ReLU(),
            nn.Flatten(),
            QuantizedLinear(128, 5, weight=weight),
            nn.ReLU(),
            nn.Linear(5, 4),
        ).to(dtype)
        model(sample(8, 1, 8, 8, dtype=dtype))
        for module in model.modules():
            if isinstance(module, QuantizedConv2d | QuantizedLinear):
                module.weight.data[2].view(-1)[:2] = torch.tensor([-1.0, 1.0])  # the largest, in a filter that stays
                module.weight_quantizer.fit(module.weight)
                for tensor in [*module.weight_quantizer.parameters(), *module.weight_quantizer.buffers()]:
                    tensor.data *= 1 + 0.3 * torch.rand(tensor.shape, dtype=dtype)
    return model.eval()


FAMILIES = sorted({re.sub(r"\d+", "", name): name for name in quantizer_names()}.values())  # the widest of each
MEANS = ("twn", "naq", "dorefa1")  # scales and thresholds that are means over all weights of a layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [*FAMILIES, "int4", "int4_channel_affine", "dorefa1", "dorefa2", "naq3", "lq2"])
def test_learned_levels_go_with_their_filters(weight: str, dtype: torch.dtype) -> None:
    model, x = trained(weight, dtype), sample(4, 1, 8, 8, seed=1, dtype=dtype)
    columns = {model[4]: [0, 1, 6, 7, 8], model[9]: [1, 4]}  # both filters of the depthwise inputs 0 and 3
    for reader, unread in columns.items():
        mask = torch.ones_like(reader.weight)
        mask[:, unread] = 0
        torch_prune.custom_from_mask(reader, "weight", mask)
    model(x)
    small = check(model, x, 1e-12 if dtype == torch.float64 else 1e-5)
    sizes = [len(small[i].weight) for i in (0, 2, 7)]
    assert sizes == ([6, 12, 5] if weight.startswith(MEANS) else [4, 8, 3])
    again = trained(weight, dtype)
    for i, kept in ((0, [1, 2, 4, 5]), (2, [2, 3, 4, 5, 8, 9, 10, 11]), (7, [0, 2, 3])):
        if not weight.startswith(MEANS):
            torch.testing.assert_close(small[i].quantized_weight(), again[i].quantized_weight()[kept])
    small.train()(x).square().sum().backward()  # learned levels move on
    assert all(p.grad is not None for p in small.parameters())
