"""Exact laws are refused before they would fill the memory, and what is said of their bytes is what they take."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qconv import binary_laws
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.energy import count
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside, at their most."""

    def __init__(self):
        super().__init__()
        self.bytes, self.live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
                self.bytes = max(self.bytes, sum(self.live.values()))
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fan_in", [9, 40])
@pytest.mark.parametrize("deformation", ["none", "pair", "neighbors"])
def test_bytes_are_what_a_layer_takes(deformation, fan_in, backward, dtype):
    layer = QuantumDeformedLinear(fan_in, 8, deformation=deformation, law="exact", norm=False, dtype=dtype)
    h = torch.zeros(100, fan_in, dtype=dtype)
    with torch.set_grad_enabled(backward), Peak() as peak:
        out = layer(h)
        if backward:
            out.sum().backward()
    said = binary_laws.exact_bytes(100 * 8, fan_in, dtype.itemsize, backward)
    # Pairs of neighbors take half the steps, with laws of three numbers each.
    least = 0.65 if deformation == "neighbors" else 0.95
    assert least * said < peak.bytes < 1.1 * said


def test_a_convolution_that_would_fill_the_memory():
    layer = ProbabilisticBinaryConv2d(32, 64, 3, 2, law="exact")
    h = torch.zeros(128, 32, 13, 13)
    with Peak() as peak, pytest.raises(ValueError) as error:
        layer(h)
    # 128 x 2304 laws of 288 bits: 288 x 299 numbers of 4 bytes each.
    assert (
        "would take about 101,581,848,576 bytes with what gradients need for 128 inputs of 2,304 outputs with 288 "
        in (str(error.value))
    )
    assert "more than 4,294,967,296: give at most 5 inputs at a time, or call it under torch.no_grad()" in str(
        error.value
    )
    assert "or build the layer with law 'clt' or 'corrected'" in str(error.value)
    # The sums of the norm are made, no law is.
    assert peak.bytes < 5e7


@pytest.mark.parametrize("kind", ["conv", "groups", "dense", "deformed"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_number_of_inputs_that_is_named_is_taken(kind, backward, monkeypatch):
    layer, shape = {
        "conv": (ProbabilisticBinaryConv2d(2, 4, 3, padding=1, law="exact"), (2, 5, 5)),
        "groups": (ProbabilisticBinaryConv2d(2, 4, 3, groups=2, law="exact"), (2, 5, 5)),
        "dense": (ProbabilisticBinaryLinear(18, 40, law="exact"), (18,)),
        "deformed": (QuantumDeformedConv2d(2, 4, 3, padding=1, law="exact", deformation="neighbors"), (2, 5, 5)),
    }[kind]
    layer.eval()
    outputs = layer(torch.zeros(1, *shape)).numel()
    # Of two groups one is made after the other, but gradients need both.
    at_once = 2 if kind == "groups" and not backward else 1
    fan_in = layer.fan_in
    numbers = outputs // at_once * fan_in * (fan_in + 11 if backward else 8)
    monkeypatch.setattr(binary_laws, "EXACT_BYTES", 4 * numbers * 3 + 1)
    with torch.set_grad_enabled(backward):
        assert len(layer(torch.zeros(3, *shape))) == 3
        with pytest.raises(ValueError, match="give at most 3 inputs at a time"):
            layer(torch.zeros(4, *shape))
        monkeypatch.setattr(binary_laws, "EXACT_BYTES", 4 * numbers - 1)
        with pytest.raises(ValueError, match=r"^((?!at a time).)*$"):
            layer(torch.zeros(1, *shape))


def test_inputs_that_need_gradients_and_weights_that_need_none(monkeypatch):
    layer = ProbabilisticBinaryLinear(10, 10, law="exact", norm=False).requires_grad_(False)
    monkeypatch.setattr(binary_laws, "EXACT_BYTES", 4 * 10 * 10 * 8)
    h = torch.zeros(1, 10)
    assert layer(h).shape == (1, 10)
    with pytest.raises(ValueError, match="with what gradients need"):
        layer(h.requires_grad_())


def test_other_laws_and_devices_without_memory_are_not_refused(monkeypatch):
    monkeypatch.setattr(binary_laws, "EXACT_BYTES", 1)
    for law in ("clt", "corrected"):
        assert ProbabilisticBinaryLinear(10, 10, law=law)(torch.zeros(2, 10)).shape == (2, 10)
    for output in ("moments", "mean"):
        ProbabilisticBinaryLinear(10, 10, law="exact", output=output)(torch.zeros(2, 10))
    assert count(ProbabilisticBinaryLinear(10, 10, law="exact", device="meta"), (10,)).total("units") == 10
