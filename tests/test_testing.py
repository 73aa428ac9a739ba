"""The conformance suite finds the faults it was written for."""

import pytest
import torch
from torch import nn

from classical import QuantizedConv2d
from qconv import ProbabilisticBinaryConv2d, QuantumConv2d, QuantumDeformedConv2d, load_backend
from qconv.testing import check_backend, check_layer


class Leaky(nn.Conv2d):
    """Its register is never reset: each image sees the one before."""

    def forward(self, x):
        return super().forward(x) + 0.1 * super().forward(x.roll(1, 0))


class Flipped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flip(0)


class Unshared(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y * torch.linspace(1, 2, y.shape[-1])


class Misplaced(nn.Conv2d):
    """Rows and columns of patches are confused."""

    def forward(self, x):
        y = super().forward(x)
        return y.mT.reshape(y.shape)


class Noisy(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.rand(())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Dropout(0.5), nn.BatchNorm2d(3)),
        ProbabilisticBinaryConv2d(2, 3, 2),
        QuantumDeformedConv2d(2, 3, 2),
    ],
    ids=["dropout", "probabilistic", "deformed"],
)
def test_layers_are_checked_in_eval_mode_and_left_in_their_own(layer):
    layer.train()
    if isinstance(layer, nn.Sequential):
        layer[2].eval()
    modes = [module.training for module in layer.modules()]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    check_layer(layer, 2)
    assert [module.training for module in layer.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with pytest.raises(AssertionError, match="two copies"):
        check_layer(nn.Sequential(layer, Noisy(3, 3, 1)), 2)
    assert [module.training for module in layer.modules()] == modes


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Leaky, "image 0 alone"),
        (Flipped, "alone against in the batch"),
        (Unshared, "shift equivariance along axis -1"),
        (Misplaced, "shift equivariance"),
        (Noisy, "two copies of the layer"),
    ],
)
def test_faulty_layers_are_found(fault, found):
    torch.manual_seed(0)
    check_layer(nn.Conv2d(2, 3, 2), 2)
    with pytest.raises(AssertionError, match=found):
        check_layer(fault(2, 3, 2), 2)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("float", "float"),
        ("int8", "int8"),
        ("int8_channel", "int4"),
        ("twn", "int8"),
        ("xnor", "int8"),
        ("bnn", "bnn"),
        ("xnor", "xnor"),
    ],
)
def test_quantized_layers_conform(weight, activation):
    torch.manual_seed(0)
    layer = QuantizedConv2d(2, 3, (2, 1), stride=(1, 2), groups=1, weight=weight, activation=activation)
    layer(torch.rand(4, 2, 9, 9))  # learns the range of its inputs, which is then the same for all images
    check_layer(layer.eval(), 2, stride=(1, 2))


def test_positions_are_found_by_the_constant_image_alone():
    from qconv.testing import check_weight_sharing

    with pytest.raises(AssertionError, match="weight sharing"):
        check_weight_sharing(Unshared(1, 2, 2), torch.rand(1, 1, 5, 5), 1e-5)


def test_a_wrong_stride_is_found():
    with pytest.raises(AssertionError, match="shift equivariance"):
        check_layer(QuantumConv2d(1, 4, 2, stride=2), 1)


def faulty(change):
    class Backend:
        name = "faulty"

        def compile(self, circuit, *, shots=None, noise=None, seed=None):
            compiled = load_backend("statevector").compile(circuit)

            class Wrong:
                differentiable = True
                counts = compiled.counts

                def __call__(self, x, w):
                    return change(compiled, x, w)

            return Wrong()

    return Backend()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f, x, w: f(x, w).flip(-1), "values"),
        (lambda f, x, w: f(x, w)[:, :1], "shape"),
        (lambda f, x, w: f(x.detach(), w) + 0 * x.sum(), "input gradient"),
        (lambda f, x, w: f(x, w.detach()) + 0 * w.sum(), "weight gradient"),
    ],
)
def test_faulty_backends_are_found(change, found):
    with pytest.raises(AssertionError, match=found):
        check_backend(faulty(change))


def test_a_refusal_must_be_announced():
    with pytest.raises(ValueError, match="product encoding"):
        check_backend(load_backend("fourier"))
