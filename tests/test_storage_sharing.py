"""Weight sharing against scikit-learn's k-means, an exact search, and gradients summed by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from classical import QuantizedLinear
from classical.storage import SharedWeights, share, share_parameter

DTYPES = (torch.float32, torch.float64)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pruned(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    weight = sample(*shape, seed=seed, dtype=dtype)
    return torch.where(weight.abs() > 1, weight, 0)


def best_error(points: np.ndarray, clusters: int) -> float:
    """The least squared error of all ways to cut sorted points into runs, by dynamic programming."""
    points = np.sort(points)
    n = len(points)
    errors = {
        (i, j): float(((points[i:j] - points[i:j].mean()) ** 2).sum()) for i in range(n) for j in range(i + 1, n + 1)
    }
    best = [0.0] + [math.inf] * n
    for _ in range(clusters):
        best = [0.0] + [min(best[i] + errors[i, j] for i in range(j)) for j in range(1, n + 1)]
    return best[n]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 4])  # with more, some first levels get no weights, and each moves them its way
def test_levels_are_those_of_scikit_learn(bits: int, dtype: torch.dtype) -> None:
    weight = sample(60, 50, dtype=dtype)
    levels = share(weight, bits).levels
    points = weight.double().numpy().reshape(-1, 1)
    start = np.linspace(points.min(), points.max(), 2**bits)[:, None]
    theirs = KMeans(2**bits, init=start, n_init=1, max_iter=10_000, tol=0, algorithm="lloyd").fit(points)
    assert levels.dtype == dtype
    np.testing.assert_allclose(levels.numpy(), np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("init", ["linear", "density", "random"])
@pytest.mark.parametrize("bits", [1, 3, 5])
def test_nothing_moves_any_more(bits: int, init: str) -> None:
    weight = pruned(40, 50)
    codes, levels = share(weight, bits, init, generator=torch.Generator().manual_seed(3))
    values = levels[codes.long()]
    kept = weight != 0
    assert torch.equal(values == 0, ~kept)
    assert len(levels) == 2**bits + 1
    assert (levels.diff() > 0).all()
    clusters = levels[levels != 0]
    nearest = (weight[kept][:, None] - clusters).abs().min(1).values
    torch.testing.assert_close((weight - values)[kept].abs(), nearest)
    for level in clusters:
        torch.testing.assert_close(weight[kept & (values == level)].mean(), level)


@given(st.integers(3, 24), st.integers(1, 3), st.integers(0, 99))
def test_error_lies_between_the_least_possible_and_that_of_equal_steps(count: int, bits: int, seed: int) -> None:
    weight = sample(count, seed=seed)
    error = float((share(weight, bits).values() - weight).square().sum())
    steps = weight.min() + (weight.max() - weight.min()) * torch.arange(2**bits) / (2**bits - 1)
    rounding = float((weight[:, None] - steps).square().min(1).values.sum())
    assert best_error(weight.numpy(), 2**bits) - 1e-13 <= error <= rounding + 1e-13


def test_first_levels() -> None:
    # Nine weights at 0.1 ... 0.9 and one at 9: equal distances give the last a level of its own, equal counts do not.
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 9.0])
    torch.testing.assert_close(share(weight, 1, "linear").levels, torch.tensor([0.5, 9.0]))
    four = torch.tensor([1.0, 2.0, 10.0, 11.0])
    torch.testing.assert_close(share(four, 1, "density").levels, torch.tensor([1.5, 10.5]))
    drawn = {
        tuple(share(sample(30), 2, "random", generator=torch.Generator().manual_seed(seed)).levels.tolist())
        for seed in range(8)
    }
    assert len(drawn) > 1
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = share(sample(30), 2, "random")
        torch.manual_seed(5)
        assert torch.equal(share(sample(30), 2, "random").levels, first.levels)


def test_pruned_weights_use_all_levels_though_none_lie_between() -> None:
    weight = pruned(60, 50)
    assert len(share(weight, 4).levels) == 17
    lonely = torch.cat((torch.full((500,), 1.0), 1 + 1e-3 * torch.arange(20), torch.tensor([50.0])))
    codes, levels = share(lonely, 3)
    assert len(levels) == 8
    assert len(codes.unique()) == 8


def test_few_values_are_kept_as_they_are() -> None:
    for weight in (torch.tensor([3.0, -1.0, 3.0, 0.0, 2.5]), torch.tensor([0.7]), torch.zeros(4), torch.zeros(0, 3)):
        codes, levels = share(weight, 2)
        assert torch.equal(levels[codes.long()], weight)
        assert torch.equal(levels, weight.unique())
        assert codes.dtype == torch.int32
        assert codes.shape == weight.shape


def test_sharing_errors() -> None:
    weight = sample(9)
    with pytest.raises(ValueError, match="bits is 0 but must be 1 to 16"):
        share(weight, 0)
    with pytest.raises(ValueError, match="init is 'forgy' but must be 'linear', 'density' or 'random'"):
        share(weight, 2, "forgy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a weight is not finite"):
        share(torch.tensor([1.0, math.nan]), 2)
    with pytest.raises(ValueError, match="Linear has no parameter 'wait' of its own"):
        share_parameter(nn.Linear(3, 3), "wait")


# Training the levels.


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_level_is_the_sum_over_its_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(50, 20, dtype=dtype)
    weight = pruned(20, 50, dtype=dtype)
    layer.weight.data.copy_(weight)
    book = share(weight, 3)
    assert share_parameter(layer, bits=3) is layer
    torch.testing.assert_close(layer.weight, book.values())
    levels = layer.parametrizations.weight.original
    torch.testing.assert_close(levels.detach(), book.levels[book.levels != 0])
    g = sample(20, 50, seed=1, dtype=dtype)
    (layer.weight * g).sum().backward()
    expected = torch.stack([g[layer.weight == level].sum() for level in levels.detach()])
    torch.testing.assert_close(levels.grad, expected)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "parametrizations.weight.original"]


def test_training_moves_levels_and_leaves_zeros() -> None:
    layer = QuantizedLinear(30, 10, weight="float", activation="float", dtype=torch.float64)
    layer.weight.data.copy_(pruned(10, 30))
    target, x = sample(40, 10, seed=2), sample(40, 30, seed=3)
    share_parameter(layer, bits=2)
    zeros, before = layer.weight == 0, layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(layer.weight == 0, zeros)
    assert len(layer.weight.unique()) == 5
    assert not torch.equal(layer.weight, before)
    trained = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, trained)


def test_shared_weights_can_be_shared_again() -> None:
    layer = nn.Linear(30, 20)
    share_parameter(layer, bits=5)
    expected = share(layer.weight.detach(), 2).values()
    share_parameter(layer, bits=2)
    torch.testing.assert_close(layer.weight, expected)
    assert len(layer.parametrizations.weight) == 1


def test_masks_become_permanent() -> None:
    layer = nn.Conv2d(3, 8, 3)
    prune.l1_unstructured(layer, "weight", 0.7)
    zeros = layer.weight == 0
    share_parameter(layer, bits=4)
    assert torch.equal(layer.weight == 0, zeros)
    assert not hasattr(layer, "weight_mask")
    assert layer(torch.ones(1, 3, 5, 5)).shape == (1, 8, 3, 3)


def test_state_dict_and_assignment() -> None:
    first, second = nn.Linear(30, 20), nn.Linear(30, 20)
    for layer, seed in ((first, 0), (second, 1)):
        layer.weight.data.copy_(pruned(20, 30, seed=seed))
        share_parameter(layer, bits=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, first.weight)
    # An assigned weight is projected: each level becomes the mean of its places.
    assigned = sample(20, 30, seed=4, dtype=torch.float32)
    places = first.parametrizations.weight[0].codes
    first.weight = assigned
    for code in range(1, 5):
        here = places == code
        torch.testing.assert_close(first.weight[here], assigned[here].mean().expand(int(here.sum())))
    assert not first.weight[places == 0].any()


def test_levels_without_places_are_zero() -> None:
    module = SharedWeights(torch.tensor([[0, -1], [2, 2]]), 3)
    assert module.right_inverse(torch.tensor([[1.0, 5], [2, 4]])).tolist() == [1, 0, 3]
    assert module(torch.tensor([7.0, 8, 9])).tolist() == [[7, 0], [9, 9]]


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("init", ["linear", "density"])
def test_same_weights_share_the_same_way(bits: int, init: str) -> None:
    weight = pruned(30, 40)
    first, second = share(weight, bits, init), share(weight.clone(), bits, init)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.levels, second.levels)
