"""LeNet-5 and LeNet-300-100: sizes as published, shapes, initial weights."""

import pytest
import torch
from torch import nn

from qconv.energy.count import count
from qconv.lenets import LENETS, LeNet5, LeNet300, build_lenet


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_lenet5_is_32c5_mp2_64c5_mp2_512fc():
    model = LeNet5()
    norms = 2 * (32 + 64 + 512)
    assert parameters(model) == 25 * 32 + 25 * 32 * 64 + 4 * 4 * 64 * 512 + 512 * 10 + 10 + norms == 582_634
    assert count(model, (1, 28, 28)).macs() == {
        "fp32*fp32": 24 * 24 * 32 * 25 + 8 * 8 * 64 * 25 * 32 + 1024 * 512 + 512 * 10
    }


def test_lenet300_is_784_300_100_10():
    model = LeNet300()
    assert parameters(model) == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10 == 266_610
    # "1070 KB" of Han, Mao & Dally, arXiv:1510.00149, table 1: 4 bytes each, in thousands.
    assert round(4 * parameters(model) / 1000) in (1066, 1067)


def test_layers_of_lenet5_pool_before_they_normalize():
    kinds = [type(layer) for layer in LeNet5()]
    block = [nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [*block, *block, nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("name", LENETS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 16, 16), (2, 4, 4)])
def test_square_images_give_scores_for_each_class(name, shape):
    model = build_lenet(name, shape, 7, seed=0)
    assert model(torch.rand(5, *shape)).shape == (5, 7)
    assert count(model, shape).total("mac") > 0


@pytest.mark.parametrize("name", LENETS)
def test_weights_come_from_the_seed_alone(name):
    state = torch.get_rng_state()
    one, same, other = (build_lenet(name, (1, 8, 8), 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])


def test_lenet300_leaves_units_out_in_training_only():
    x = torch.rand(64, 1, 8, 8)
    model = LeNet300((1, 8, 8), dropout=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    whole = LeNet300((1, 8, 8), dropout=0.0)
    assert torch.equal(whole(x), whole(x))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lenet5", (1, 28, 27), "square images of at least 4x4 pixels, but these are 28x27"),
        ("lenet5", (1, 3, 3), "at least 4x4 pixels, but these are 3x3"),
        ("lenet300", (1, 2, 3), "but these are 2x3"),
        ("lenet6", (1, 28, 28), "unknown network 'lenet6': did you mean 'lenet5'"),
    ],
)
def test_bad_input_is_a_clear_error(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_lenet(name, shape, 10, seed=0)
