"""Layers of bits and qubits as torch treats any layer: precision, copies, empty batches, devices, compiled programs."""

import copy
import io

import pytest
import torch
from bits import numbers
from torch import nn

from qconv.binary_laws import Moments
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear

DEFORMATIONS = ("none", "input", "traceless", "pair", "neighbors")
KINDS = (ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear, QuantumDeformedConv2d, QuantumDeformedLinear)


def means(*shape, seed=0):
    return numbers(*shape, dtype=torch.float32, seed=seed)


def small(kind, **options):
    """A layer in eval mode, and the shape of one input."""
    torch.manual_seed(0)
    if kind in (ProbabilisticBinaryConv2d, QuantumDeformedConv2d):
        return kind(2, 4, 3, padding=1, groups=2, **options).eval(), (2, 5, 6)
    return kind(7, 3, **options).eval(), (7,)


@pytest.mark.parametrize("deformation", DEFORMATIONS)
def test_copies_files_and_single_images(deformation):
    layer = QuantumDeformedConv2d(2, 3, 3, deformation=deformation, output="moments").eval()
    h = means(2, 2, 5, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    other = QuantumDeformedConv2d(2, 3, 3, deformation=deformation, output="moments").eval()
    other.load_state_dict(layer.state_dict())
    for copied in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), other):
        assert torch.equal(copied(h).variance, layer(h).variance)
    single = layer(h[0])
    assert isinstance(single, Moments)
    assert single.mean.shape == single.variance.shape == (3, 3, 3)
    torch.testing.assert_close(single.variance, layer(h).variance[0])
    dense = QuantumDeformedLinear(4, 3, deformation=deformation).eval()
    x = means(2, 5, 4)
    torch.testing.assert_close(dense(x)[1, 2], dense(x[1, 2]))


@pytest.mark.parametrize("output", ["activation", "moments"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_laws_in_full_precision(kind, output):
    layer, shape = small(kind, output=output)
    h = means(40, *shape)
    half = h.bfloat16()
    # Both references are computed outside.
    full, rounded = layer(h), layer(half.float())
    with torch.autocast("cpu", torch.bfloat16):
        found, from_half = layer(h), layer(half)
    for got, want in ((found, full), (from_half, rounded)):
        for a, b in zip(got, want, strict=True) if output == "moments" else [(got, want)]:
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 but the layer is torch\.float32"):
        layer(half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_half_precision_are_refused(kind, dtype):
    layer, shape = small(kind)
    layer = layer.to(dtype)
    with pytest.raises(ValueError, match=rf"the layer is {dtype} but laws need torch\.float32 or torch\.float64"):
        layer(means(2, *shape).to(dtype))
    assert layer.float()(means(2, *shape)).dtype == torch.float32


@pytest.mark.parametrize("law", ["clt", "corrected", "exact"])
@pytest.mark.parametrize("deformation", DEFORMATIONS)
def test_empty_batches(deformation, law):
    for kind in (QuantumDeformedConv2d, QuantumDeformedLinear):
        layer, shape = small(kind, deformation=deformation, law=law)
        assert layer(torch.zeros(0, *shape)).shape == (0, *layer(torch.zeros(1, *shape)).shape[1:])
        layer.output = "moments"
        assert layer(torch.zeros(0, *shape)).variance.shape == layer(torch.zeros(1, *shape)).variance[:0].shape


@pytest.mark.parametrize(
    ("kind", "deformation", "law"),
    [
        (QuantumDeformedConv2d, "none", "exact"),
        (QuantumDeformedConv2d, "input", "clt"),
        (QuantumDeformedConv2d, "pair", "corrected"),
        (QuantumDeformedConv2d, "neighbors", "clt"),
        (QuantumDeformedConv2d, "neighbors", "exact"),
        (QuantumDeformedLinear, "neighbors", "exact"),
        (QuantumDeformedLinear, "pair", "clt"),
    ],
)
def test_exports_for_any_batch_size(kind, deformation, law):
    layer, shape = small(kind, deformation=deformation, law=law)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(layer, (means(2, *shape),), dynamic_shapes=dynamic).module()
    h = means(5, *shape, seed=1)
    torch.testing.assert_close(exported(h), layer(h), atol=1e-6, rtol=0)


@pytest.mark.parametrize("deformation", ["none", "pair", "neighbors"])
def test_compiles_without_graph_breaks(deformation):
    layer = QuantumDeformedConv2d(2, 3, 3, deformation=deformation)
    h = means(4, 2, 6, 6)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), layer(h), atol=1e-6, rtol=0)


def test_compiled_gradients_are_the_same():
    layer = QuantumDeformedConv2d(2, 3, 3, deformation="pair")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    h = means(4, 2, 6, 6)
    for used in (layer, compiled):
        used(h).square().sum().backward()
    for a, b in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [QuantumDeformedConv2d, QuantumDeformedLinear])
def test_layers_built_without_memory(kind):
    layer, shape = small(kind, deformation="neighbors")
    h, state = means(3, *shape), layer.state_dict()
    for assign in (False, True):
        empty, _ = small(kind, deformation="neighbors", device="meta")
        if not assign:
            empty = empty.to_empty(device="cpu")
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty(h), layer(h))
    # In a container, as such models are loaded.
    model = nn.Sequential(small(kind, deformation="neighbors", device="meta")[0]).to_empty(device="cpu")
    model.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert torch.equal(model.eval()(h), layer(h))
    assert set(state) == {"weight", "angle", "offset", "gate"} | {f"norm.{k}" for k in layer.norm.state_dict()}
