"""Pruning in one shot: which weights go, against torch.nn.utils.prune and brute force; masks and what they keep."""

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.pruning import finalize, gradient_scores, keep_zeros, prune, sparsity
from classical.pruning.masks import private_copy

DTYPES = (torch.float32, torch.float64)


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions, one of them in two groups, and a linear layer, on 6x6 images of two channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 5))
        return nn.Sequential(*layers).to(dtype)


NAMES = ("0", "2", "4")


def weights(model: nn.Module) -> list[Tensor]:
    return [model.get_submodule(name).weight.detach().clone() for name in NAMES]


# --- which weights go ---


@pytest.mark.parametrize("dtype", DTYPES)
@given(fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_layer_by_layer_is_l1_unstructured(dtype: torch.dtype, fraction: float, seed: int) -> None:
    ours, theirs = network(seed, dtype), network(seed, dtype)
    prune(ours, fraction)
    for name in NAMES:
        torch_prune.l1_unstructured(theirs.get_submodule(name), "weight", amount=fraction)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert torch.equal(a, b)


@given(fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_globally_is_global_unstructured(fraction: float, seed: int) -> None:
    ours, theirs = network(seed), network(seed)
    prune(ours, fraction, scope="global")
    layers = [(theirs.get_submodule(name), "weight") for name in NAMES]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=fraction)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("norm", "n"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize(("structure", "axis"), [("filter", 0), ("channel", 1)])
@given(fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_filters_and_channels_are_ln_structured(
    structure: Any, axis: int, norm: Any, n: int, fraction: float, seed: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ours = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(6, 8))
    theirs = copy.deepcopy(ours)
    prune(ours, fraction, structure=structure, norm=norm)
    for a, b in zip(ours, theirs, strict=True):
        torch_prune.ln_structured(b, "weight", amount=fraction, n=n, dim=axis)
        assert torch.equal(a.weight, b.weight)


@given(
    values=st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    gone=st.lists(st.booleans(), min_size=12, max_size=12),
    fraction=st.floats(0, 1),
)
def test_ties_go_in_order_and_the_pruned_go_first(values: list[int], gone: list[bool], fraction: float) -> None:
    layer = nn.Linear(4, 3)
    model = nn.Sequential(layer)
    layer.weight.data = torch.tensor(values, dtype=torch.float32).view(3, 4)
    torch_prune.custom_from_mask(layer, "weight", ~torch.tensor(gone).view(3, 4))  # an earlier round, by torch
    prune(model, fraction)
    order = sorted(range(12), key=lambda i: (not gone[i], abs(values[i]), i))
    dropped = set(order[: round(fraction * 12)]) | {i for i in range(12) if gone[i]}
    expected = [0 if i in dropped else value for i, value in enumerate(values)]
    assert layer.weight.flatten().tolist() == expected


def structures(structure: str, groups: int, shape: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """Brute force: the indices of each structure's weights, in memory's order."""
    out, inputs, *kernel = shape
    indices = list(itertools.product(range(out), range(inputs), *map(range, kernel)))
    group = [index[0] // (out // groups) for index in indices]
    keys = {
        "weight": indices,
        "filter": [index[0] for index in indices],
        "channel": [(g, index[1]) for g, index in zip(group, indices, strict=True)],
        "column": [(g, *index[1:]) for g, index in zip(group, indices, strict=True)],
        "layer": [0 for _ in indices],
    }[structure]
    found: dict[Any, list[tuple[int, ...]]] = {}
    for key, index in sorted(zip(keys, indices, strict=True)):
        found.setdefault(key, []).append(index)
    return list(found.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("structure", ["weight", "filter", "channel", "column", "layer"])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_structures_by_brute_force(structure: Any, norm: Any, scope: Any, fraction: float) -> None:
    if structure == scope and fraction not in (0, 1):
        pytest.skip("a layer's share of itself is refused")
    model = network(dtype=torch.float64)
    power = 1 if norm == "l1" else 2
    expected, ranked = {}, []
    for name in NAMES:
        layer = model.get_submodule(name)
        w = expected[name] = layer.weight.detach().numpy().copy()
        members = structures(structure, getattr(layer, "groups", 1), w.shape)
        ranked.append([(np.mean([abs(w[i]) ** power for i in part]) ** (1 / power), name, part) for part in members])
    for candidates in ranked if scope == "layer" else [list(itertools.chain(*ranked))]:
        candidates.sort(key=lambda entry: entry[0])
        for _, name, part in candidates[: round(fraction * len(candidates))]:
            for index in part:
                expected[name][index] = 0
    prune(model, fraction, structure=structure, norm=norm, scope=scope)
    for name in NAMES:
        np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), expected[name])


def test_thresholds() -> None:
    model = network()
    before = weights(model)
    border = before[0].abs().flatten()[7].item()  # a weight at the threshold goes
    prune(model, threshold={"0": border, "4": 0.1})
    expected = [before[0] * (before[0].abs() > border), before[1], before[2] * (before[2].abs() > 0.1)]
    for a, b in zip(weights(model), expected, strict=True):
        assert torch.equal(a, b)
    rms = expected[2].square().mean(1).sqrt()
    middle = rms.sort().values[2].item()
    prune(model, threshold=middle, structure="filter", norm="l2")
    assert int((rms > middle).sum()) == 2
    assert torch.equal(weights(model)[2], expected[2] * (rms > middle)[:, None])


def test_pruning_is_cumulative() -> None:
    once, twice = network(), network()
    prune(once, 0.6)
    for fraction in (0.3, 0.6, 0.1):  # what is pruned stays so
        prune(twice, fraction)
    for a, b in zip(weights(once), weights(twice), strict=True):
        assert torch.equal(a, b)


def test_what_is_pruned_goes_first_whatever_its_score() -> None:
    model = network()
    prune(model, {"4": 0.5})
    zero = model[4].weight == 0
    scores = torch.where(zero, 9.0, sample(5, 16).abs())
    prune(model, {"4": 0.6}, scores={"4": scores})
    left = torch.where(zero, -1, scores).flatten().argsort()[48:].sort().values
    assert torch.equal(model[4].weight.flatten().nonzero().flatten(), left)


def test_fractions_of_some_layers_and_skipped_layers() -> None:
    model = network()
    prune(model, {"4": 0.25})
    prune(model, 0.5, skip=("4",))
    assert [row.nonzero / row.weights for row in sparsity(model).rows] == [0.5, 0.5, 0.75]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_scores(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).to(dtype)
    x, y = sample(8, 3, dtype=dtype), sample(8, 2, seed=1, dtype=dtype)
    w = model[0].weight
    w.grad = torch.ones_like(w)
    scores = gradient_scores(
        model, ((model(a) - b).square().sum() for a, b in zip(x.split(4), y.split(4), strict=True))
    )
    by_hand = sum(  # dE/dw = 2 sum (x w - y)^T x, in absolute value for each batch of 4
        abs(2 * (a @ w.T - b).T @ a) for a, b in zip(x.split(4), y.split(4), strict=True)
    ) / 2 * w.abs()  # fmt: skip
    torch.testing.assert_close(scores["0"], by_hand.detach())
    assert torch.equal(w.grad, torch.ones_like(w))
    before = w.detach().clone()
    prune(model, 0.5, scores=scores)
    keep = scores["0"].flatten().argsort(descending=True)[:3].sort().values
    assert torch.equal(model[0].weight.flatten().nonzero().flatten(), keep)
    assert torch.equal(model[0].weight.flatten()[keep], before.flatten()[keep])


def test_a_score_is_what_removing_the_weight_does_to_the_loss() -> None:
    model = network(dtype=torch.float64)
    x = sample(3, 2, 6, 6, dtype=torch.float64)
    scores = gradient_scores(model, [model(x).square().mean()])
    layer = model[4]
    for row, column in ((0, 0), (2, 7), (4, 15)):
        twin = copy.deepcopy(model)
        share = 1e-6  # remove a millionth of the weight
        twin[4].weight.data[row, column] *= 1 - share
        change = (twin(x).square().mean() - model(x).square().mean()).abs() / share
        assert change.item() == pytest.approx(scores["4"][row, column].item(), rel=1e-4)
    assert scores["4"].shape == layer.weight.shape


# --- masks ---


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
        lambda parameters: torch.optim.Adam(parameters, 0.01),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_zeros_stay_zero_while_training(optimizer: Any, before: bool) -> None:
    model, x = network(), sample(4, 2, 6, 6)
    made = optimizer(model.parameters()) if before else None  # masks keep the parameters that it knows
    for _ in range(2):  # a first part without masks, so that momenta are not zero
        model(x).square().sum().backward()
        if made is not None:
            made.step()
    start = weights(model)
    prune(model, 0.5)
    made = made or optimizer(model.parameters())
    zeros = [w == 0 for w in weights(model)]
    for _ in range(3):
        made.zero_grad()
        model(x).square().sum().backward()
        made.step()
    for after, zero, first in zip(weights(model), zeros, start, strict=True):
        assert torch.equal(after == 0, zero)
        assert not torch.equal(after[~zero], first[~zero])
        assert not after[zero].signbit().any()


def test_copies_and_state_dicts() -> None:
    model, x = network(), sample(4, 2, 6, 6)
    prune(model, 0.5)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    finalize(twin)
    assert torch.equal(twin(x), model(x))  # the original still has its masks
    assert all(not torch.equal(a.parametrizations.weight.original, a.weight) for a in (model[0], model[2], model[4]))
    finalize(model)
    assert torch.equal(twin(x), model(x))
    stored, other = io.BytesIO(), network(seed=1)
    masked = network()
    prune(masked, 0.5)
    torch.save(masked.state_dict(), stored)
    stored.seek(0)
    prune(other, 0.0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(other(x), masked(x))
    assert sparsity(other).fraction == 0.5


def test_finalize_leaves_plain_layers_and_the_same_parameters() -> None:
    model, plain = network(), network()
    parameters = {id(p) for p in model.parameters()}
    prune(model, 0.5)
    zeroed = weights(model)
    assert finalize(model) is model
    assert {id(p) for p in model.parameters()} == parameters
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert list(model.state_dict()) == list(plain.state_dict()) or set(model.state_dict()) == set(plain.state_dict())
    for a, b in zip(weights(model), zeroed, strict=True):
        assert torch.equal(a, b)
    finalize(model)  # nothing is left to do
    model(sample(4, 2, 6, 6)).sum().backward()


def test_masks_of_torch_are_read_taken_over_and_removed() -> None:
    model = network()
    torch_prune.l1_unstructured(model[4], "weight", amount=0.5)
    torch_prune.l1_unstructured(model[4], "bias", amount=0.4)
    with torch.no_grad():  # as an optimizer would: torch's .weight is old until the next forward pass
        model[4].weight_orig.copy_(sample(5, 16, seed=3))
    zero = model[4].weight_mask == 0
    assert sparsity(model).rows[2].nonzero == 40
    twin = private_copy(model)  # copy.deepcopy refuses such a model
    finalize(twin)
    assert torch.equal(twin[4].weight == 0, zero)
    assert int((twin[4].bias == 0).sum()) == 2
    prune(model, {"4": 0.75})
    left = sample(5, 16, seed=3).masked_fill(zero, 0).flatten()
    assert torch.equal(model[4].weight.flatten().nonzero().flatten(), left.abs().argsort()[60:].sort().values)


def test_keep_zeros() -> None:
    model = network()
    prune(model, 0.5, skip=("0",))
    zeros = [w == 0 for w in weights(finalize(model))]
    keep_zeros(model)
    assert not hasattr(model[0], "parametrizations")  # nothing to keep there
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(sample(4, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    for after, zero in zip(weights(model), zeros, strict=True):
        assert torch.equal(after == 0, zero)


@pytest.mark.parametrize("name", ["int8", "int4_channel", "twn"])
def test_zeros_stay_zero_in_quantized_layers(name: str) -> None:
    model = nn.Sequential(
        QuantizedConv2d(2, 4, 3, weight=name), nn.ReLU(), nn.Flatten(), QuantizedLinear(64, 5, weight=name)
    )
    prune(model, 0.6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        model(sample(4, 2, 6, 6)).square().sum().backward()
        optimizer.step()
    zeros = [layer.weight == 0 for layer in (model[0], model[3])]
    assert [int(zero.sum()) for zero in zeros] == [round(0.6 * 72), round(0.6 * 320)]
    for layer, zero in zip((model[0], model[3]), zeros, strict=True):
        assert (layer.quantized_weight()[zero] == 0).all()
        assert (layer.quantized_weight()[~zero] != 0).any()
    output = model.eval()(sample(4, 2, 6, 6))
    assert torch.equal(finalize(model)(sample(4, 2, 6, 6)), output)


def test_quantum_kernels_are_pruned_like_any_weight() -> None:
    from qconv import QuantumConv2d

    layer = QuantumConv2d(1, 4, 2, seed=0)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(sample(*layer.weight.shape))
    prune(model, 0.5)
    twin = QuantumConv2d(1, 4, 2, seed=1)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
    x = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), twin(x))
    layer(x).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert torch.equal(gradient == 0, layer.weight == 0)


def test_table() -> None:
    model = network()
    prune(model, 0.5, structure="filter", skip=("4",))
    table = sparsity(model)
    assert (table.weights, table.nonzero) == (108 + 108 + 80, 54 + 54 + 80)
    assert table.fraction == pytest.approx(108 / 296)
    assert [row.empty_filters for row in table.rows] == [3, 2, 0]
    prune(model, 0.25, structure="channel", skip=("0", "2"))
    assert sparsity(model).rows[2].empty_channels == 4
    assert str(table).splitlines() == [
        "layer  shape    weights  non-zero   zeros  empty filters  empty channels",
        "0      6x2x3x3      108        54  50.00%              3               0",
        "2      4x3x3x3      108        54  50.00%              2               0",
        "4      5x16          80        80   0.00%              0               0",
        "total               296       188  36.49%",
    ]


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of them"),
        ({"fraction": 0.5, "threshold": 0.1}, "exactly one of them"),
        ({"fraction": 1.5}, "fraction to prune of '0' is 1.5 but must be from 0 to 1"),
        ({"fraction": float("nan")}, "is nan but must be from 0 to 1"),
        ({"threshold": -1.0}, "threshold for '0' is -1.0 but must be 0 or more"),
        ({"fraction": {"fc": 0.5}}, "no prunable layer 'fc': the layers are '0', '2', '4'"),
        ({"fraction": 0.5, "skip": ("1",)}, "no prunable layer '1'"),
        ({"fraction": 0.5, "skip": NAMES}, "no layer to prune"),
        ({"fraction": {"0": 0.5}, "scope": "global"}, "give one fraction"),
        ({"fraction": 0.5, "scope": "model"}, "scope is 'model'"),
        ({"fraction": 0.5, "structure": "layer"}, "rank layers with scope='global', or choose one with"),
        ({"fraction": {"2": 0.9}, "structure": "layer"}, "fraction {'2': 0.9} is no whole number"),
        ({"fraction": 0.5, "structure": "row"}, "structure is 'row' but must be one of weight, filter"),
        ({"fraction": 0.5, "structure": "filter", "norm": "max"}, "norm is 'max'"),
        ({"fraction": 0.5, "scores": {}}, "no scores for layer '0'"),
        ({"fraction": 0.5, "scores": dict.fromkeys(NAMES, torch.ones(3))}, r"shape \(3,\) but its weight has \(6, 2"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune(model, **arguments)
    for a, b in zip(weights(model), before, strict=True):
        assert torch.equal(a, b)
    assert not any(hasattr(layer, "parametrizations") for layer in model)


def test_what_has_no_rank_or_no_structure_is_refused() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2' has weights or scores that are infinite or not a number"):
        prune(model, 0.5)
    with pytest.raises(ValueError, match="ConvTranspose2d keeps its weights by input channel first"):
        prune(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), 0.5, structure="filter")
    with pytest.raises(ValueError, match="no layer to prune"):
        sparsity(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    for function in (sparsity, finalize, keep_zeros, lambda model: prune(model, 0.5)):
        with pytest.raises(ValueError, match=r"model is 'm' \(str\) but must be an nn.Module"):
            function("m")
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_scores(network(), [])
    model = network()
    with pytest.raises(ValueError, match="does not depend on the weight of '2'"):
        gradient_scores(model, [model[0](sample(1, 2, 6, 6)).sum()])
    model[4] = parametrizations.spectral_norm(model[4])
    prune(model, 0.5)
    with pytest.raises(ValueError, match="parametrization _SpectralNorm beside those of pruning"):
        finalize(model)
