"""FactorizedConv2d and factorize: nn.Conv2d in geometry, a product of small tensors in weight."""

import copy
import io
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantized_layers import geometries, sample
from torch import nn

from classical.factorized import METHODS, FactorizedConv2d, factorize
from qconv.energy import count


def drawn(*args, dtype=torch.float64, seed=0, **options):
    conv = nn.Conv2d(*args, dtype=dtype, **options)
    with torch.no_grad():
        for k, parameter in enumerate(conv.parameters()):
            parameter.copy_(sample(*parameter.shape, seed=seed + k, dtype=torch.float64))
    return conv


def smooth(out=16, in_=8, size=7):
    """Gaussian blobs of channel-dependent width and place: what a decomposition should find easy."""
    o, i, h, w = np.ogrid[0 : 1 : out * 1j, 0 : 1 : in_ * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    values = np.exp(-((h - o + 0.5) ** 2) - (w - i + 0.5) ** 2 - h * w * o) * np.cos(2 * o + 3 * i)
    conv = drawn(in_, out, size)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(values))
    return conv


def relative(layer, conv):
    """Frobenius error from the responses to unit pulses: the weight that the chain as a whole has."""
    kh, kw = conv.kernel_size
    plain = copy.deepcopy(layer).double()
    per_group = conv.in_channels // conv.groups
    pulses = torch.zeros(conv.in_channels, conv.in_channels, kh, kw, dtype=torch.float64)
    answers = torch.zeros(conv.weight.shape, dtype=torch.float64)
    with torch.no_grad():
        for y in range(kh):
            for x in range(kw):
                pulses.zero_()
                pulses[range(conv.in_channels), range(conv.in_channels), y, x] = 1
                response = plain(pulses)[:, :, 0, 0]
                if layer.stages[-1].bias is not None:
                    response = response - plain.stages[-1].bias
                for channel in range(conv.in_channels):
                    group = channel // per_group
                    outs = slice(
                        group * conv.out_channels // conv.groups, (group + 1) * conv.out_channels // conv.groups
                    )
                    answers[outs, channel % per_group, y, x] = response[channel, outs]
    weight = conv.weight.detach().double()
    return float(torch.linalg.vector_norm(answers - weight) / torch.linalg.vector_norm(weight)), answers


@settings(max_examples=60)
@given(geometries(), st.sampled_from(METHODS))
def test_full_rank_is_the_convolution(case, method):
    args, x = case
    conv = drawn(**args)
    layer = factorize(conv, method, "full")
    assert layer.error < 1e-12
    torch.testing.assert_close(layer(x.double()), conv(x.double()), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x[0].double()), conv(x[0].double()), rtol=0, atol=1e-6)
    single = factorize(conv.float(), method, "full")
    assert single.stages[0].weight.dtype == torch.float32
    want = conv(x).detach()
    torch.testing.assert_close(single(x).detach(), want, rtol=0, atol=1e-5 * max(1, float(want.abs().max())))


@settings(max_examples=30)
@given(geometries(), st.sampled_from(METHODS), st.integers(1, 3))
def test_any_rank_is_the_convolution_of_its_dense_weight(case, method, rank):
    args, x = case
    layer = FactorizedConv2d(**args, method=method, rank=rank, dtype=torch.float64)
    dense = nn.Conv2d(**args, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        if args["bias"]:
            dense.bias.copy_(layer.stages[-1].bias)
    torch.testing.assert_close(layer(x.double()), dense(x.double()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_stated_error_is_that_of_the_responses(method, groups):
    conv = drawn(4, 6, (3, 2), groups=groups)
    layer = factorize(conv, method, 2)
    error, weight = relative(layer, conv)
    assert layer.error == pytest.approx(error, rel=1e-10)
    assert 0.1 < error < 1
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-12)
    single = factorize(drawn(4, 6, (3, 2), groups=groups).float(), method, "full")
    # Weights as stored: float32 rounds, and the error says so.
    assert 1e-9 < single.error < 1e-6


@pytest.mark.parametrize(
    ("method", "rank"), [("cp", 3), ("tucker", (2, 3)), ("tt", (2, 4, 3))], ids=["cp", "tucker", "tt"]
)
def test_planted_ranks_are_found(method, rank):
    conv = drawn(6, 8, 3)
    planted = FactorizedConv2d(6, 8, 3, method=method, rank=rank, dtype=torch.float64)
    with torch.no_grad():
        for k, stage in enumerate(planted.stages):
            stage.weight.copy_(sample(*stage.weight.shape, seed=10 + k, dtype=torch.float64))
        conv.weight.copy_(planted.dense_weight())
    layer = factorize(conv, method, rank)
    assert layer.rank == planted.rank
    assert layer.error < 1e-6
    x = sample(2, 6, 5, 5, dtype=torch.float64)
    want = conv(x).detach()
    torch.testing.assert_close(layer(x).detach(), want, rtol=0, atol=1e-6 * float(want.abs().max()))
    lower = rank - 1 if method == "cp" else (rank[0] - 1, *rank[1:])
    assert factorize(conv, method, lower).error > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_errors_fall_with_the_rank_and_smooth_kernels_need_less(method):
    random = [factorize(drawn(8, 16, 7), method, rank, iterations=100).error for rank in (1, 2, 4, 6)]
    easy = [factorize(smooth(), method, rank, iterations=100).error for rank in (1, 2, 4, 6)]
    assert all(a > b for a, b in pairwise(random))
    assert all(a > b for a, b in pairwise(easy))
    assert easy[-1] < 0.1 < 0.7 < random[-1]


def test_tucker_and_tt_errors_against_singular_values():
    weight = drawn(6, 8, 3).weight.detach().numpy()
    conv = drawn(6, 8, 3)
    # One axis alone: the best rank-2 approximation of its unfolding, Eckart and Young.
    values = np.linalg.svd(np.moveaxis(weight, 1, 0).reshape(6, -1), compute_uv=False)
    best = np.sqrt((values[2:] ** 2).sum()) / np.linalg.norm(weight)
    assert factorize(conv, "tucker", (2, 8)).error == pytest.approx(best, rel=1e-6)
    assert factorize(conv, "tt", (2, 24, 8)).error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1)}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_without_a_rank_the_largest_that_is_smaller_is_chosen(method, options):
    conv = drawn(8, 12, (3, 5), padding=(1, 2), **options)
    layer = factorize(conv, method, iterations=5)
    plain, chain = count(conv, (8, 64, 64)), count(layer, (8, 64, 64))
    assert chain.params < plain.params
    assert chain.macs().total() < plain.macs().total()
    # One more would not be smaller; caps of single ranks aside, which the constructor knows.
    more = FactorizedConv2d(8, 12, (3, 5), padding=(1, 2), method=method, rank=max(layer.rank) + 1, **options)
    larger = count(more, (8, 64, 64))
    assert larger.params >= plain.params or larger.macs().total() >= plain.macs().total()
    assert 0 < layer.error < 1


def test_what_cannot_shrink_is_refused_and_what_was_asked_for_is_said():
    # A depthwise convolution has 9 weights a group; a chain of rank 1 has them and more.
    for method, size in (("cp", "8 weights"), ("tucker", "11 weights"), ("tt", "8 weights")):
        conv = drawn(4, 4, 3, groups=4)
        if method != "tucker":
            assert sum(p.numel() for p in factorize(conv, method).parameters()) < 40
            conv = drawn(4, 4, 2, groups=4)
            size = "6 weights"
        with pytest.raises(ValueError, match=f"of rank 1, method '{method}', has {size}"):
            factorize(conv, method)
    # A stride of 4 lets the first stage see 16 times the pixels of the output.
    with pytest.raises(ValueError, match=r"conv has 36 weights a group .* 11 weights and 80 multiplications"):
        factorize(drawn(4, 1, 3, stride=4), "tt")
    with pytest.raises(ValueError, match="rank is 'half': give \"full\", None"):
        factorize(drawn(2, 2, 3), "tt", "half")
    assert factorize(drawn(4, 4, 3, groups=4), "tucker", "full").error < 1e-12
    with pytest.warns(UserWarning, match=re.escape("ranks (2, 4, 2), has 56 weights a group but conv has 36")):
        assert factorize(drawn(2, 2, 3), "tt", (2, 4, 2)).rank == (2, 4, 2)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_chain(method):
    layer = FactorizedConv2d(8, 12, (3, 5), (2, 1), (1, 2), groups=2, method=method, rank=2)
    whole, chain = count(layer, (8, 10, 9)), count(nn.Sequential(*layer.stages), (8, 10, 9))
    assert whole.operations == chain.operations
    assert len(chain.rows) == len(layer.stages)
    assert whole.params == sum(p.numel() for p in layer.parameters())
    # By hand: the first stage sees 10 x 9 pixels, rows are halved in the second.
    taps = {
        "cp": 90 * 4 * 4 + 45 * 4 * 3 + 45 * 4 * 5 + 45 * 12 * 2,
        "tucker": 90 * 4 * 4 + 45 * 4 * 2 * 15 + 45 * 12 * 2,
        "tt": 90 * 4 * 4 + 45 * 4 * 2 * 3 + 45 * 4 * 2 * 5 + 45 * 12 * 2,
    }
    assert whole.macs() == {"fp32*fp32": taps[method]}
    plain = count(nn.Conv2d(8, 12, (3, 5), (2, 1), (1, 2), groups=2), (8, 10, 9))
    assert whole.macs().total() < plain.macs().total()
    assert whole.params < plain.params
    assert count(layer.double(), (8, 10, 9)).macs() == {"fp64*fp64": taps[method]}


@pytest.mark.parametrize("method", METHODS)
def test_drawn_layers_start_with_the_variance_of_a_convolution(method):
    torch.manual_seed(0)
    x = torch.randn(8, 32, 12, 12)
    with torch.no_grad():
        ours = torch.stack([FactorizedConv2d(32, 64, 3, method=method, rank=16)(x) for _ in range(20)])
        theirs = torch.stack([nn.Conv2d(32, 64, 3)(x) for _ in range(20)])
    assert float(ours.std() / theirs.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_a_loss_and_gradients_are_right(method):
    layer = FactorizedConv2d(2, 3, 3, padding=1, method=method, rank=2, dtype=torch.float64)
    x = sample(2, 2, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    target = sample(2, 3, 4, 4, seed=1, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_copies_and_state():
    torch.manual_seed(1)
    layer = FactorizedConv2d(2, 4, 3, method="tt", rank=2)
    x = sample(1, 2, 5, 5)
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other = FactorizedConv2d(2, 4, 3, method="tt", rank=2)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(stored))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16  # as nn.Conv2d
    torch.testing.assert_close(half.float(), layer(x), rtol=0, atol=0.05)
    torch.manual_seed(1)
    assert torch.equal(FactorizedConv2d(2, 4, 3, method="tt", rank=2)(x), layer(x))


def test_factorizing_repeats_and_leaves_the_layer_and_torchs_generator():
    conv = drawn(4, 4, 3).eval()
    before = conv.weight.clone()
    torch.manual_seed(3)
    first = factorize(conv, "cp", 5)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(conv.weight, before)
    assert not first.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), factorize(conv, "cp", 5).parameters(), strict=True)
    )
    assert not torch.equal(factorize(conv, "cp", 5, seed=1).stages[0].weight, first.stages[0].weight)
    assert "error=" in repr(first)


def test_cp_terms_are_balanced():
    layer = factorize(drawn(6, 8, 3), "cp", 4)
    norms = [
        stage.weight.movedim(1, 0).flatten(1) if k == 3 else stage.weight.flatten(1)
        for k, stage in enumerate(layer.stages)
    ]
    sizes = torch.stack([torch.linalg.vector_norm(own, dim=1) for own in norms])
    torch.testing.assert_close(sizes, sizes[:1].expand_as(sizes))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_numpy(method):
    want = FactorizedConv2d(4, 6, 3, method=method, rank=2).rank
    for rank in (np.int64(2), np.array(2), np.full(len(want), 2), [np.int32(2)] * len(want)):
        layer = FactorizedConv2d(4, 6, 3, method=method, rank=rank)
        assert layer.rank == want
        assert all(type(r) is int for r in layer.rank)
    for rank in (np.float64(2), np.bool_(True), True, [True] * len(want), [2.0] * len(want), None, "2"):
        with pytest.raises(ValueError, match=re.escape(f"rank is {rank!r} but method {method!r} takes")):
            FactorizedConv2d(4, 6, 3, method=method, rank=rank)


def test_a_weight_of_zeros():
    conv = drawn(2, 3, 3)
    with torch.no_grad():
        conv.weight.zero_()
    layer = factorize(conv, "tt", 1)
    assert layer.error == 0
    assert torch.equal(layer(torch.zeros(1, 2, 3, 3).double())[0, :, 0, 0], conv.bias)


class Otherwise(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FactorizedConv2d(2, 2, 3, method="svd", rank=1), "unknown method 'svd'"),
        (lambda: FactorizedConv2d(2, 2, 3, method="tt", rank=(1, 2)), "rank is (1, 2) but method 'tt' takes 3"),
        (lambda: FactorizedConv2d(2, 2, 3, method="cp", rank=0), "rank is 0"),
        (lambda: FactorizedConv2d(3, 4, 3, groups=2, rank=1), "in_channels=3"),
        (lambda: FactorizedConv2d(2, 2, 3, rank=1).counts((3, 8, 8)), "(3, 8, 8)"),
        (lambda: FactorizedConv2d(2, 2, 3, rank=1).counts((2, 1, 8)), "(2, 1, 8)"),
        (lambda: factorize(Otherwise(2, 2, 3), "tt"), "conv is a Otherwise"),
        (lambda: factorize(nn.Linear(2, 2), "tt"), "conv is a Linear"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_weights_that_are_not_finite_are_refused():
    conv = drawn(2, 2, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        factorize(conv, "tt")


def test_without_tensorly_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tensorly")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ImportError, match=r"qconv\[tensor\]"):
        factorize(drawn(2, 2, 3), "tt")
    assert FactorizedConv2d(2, 2, 3, method="tt", rank=1)(torch.zeros(1, 2, 3, 3)).shape == (1, 2, 1, 1)
