from math import erf, sqrt

import numpy as np
import pytest
import torch
from bits import DTYPES, enumerated, numbers

from qconv.binary_laws import (
    Moments,
    agreement_law,
    binary_concrete,
    check_range,
    corrected_activation,
    exact_activation,
    normal_activation,
    transverse,
)


def test_agreement_law_is_the_poisson_binomial():
    means = numbers(3, 8)
    law = agreement_law(means)
    assert law.shape == (3, 9)
    for row, got in zip(means.tolist(), law.tolist(), strict=True):
        np.testing.assert_allclose(got, list(enumerated(row).values()), atol=1e-15)
    # Stable: hundreds of factors keep every digit, in the far tail too.
    fair = agreement_law(torch.zeros(400, dtype=torch.float64))
    assert abs(fair[0].log2().item() + 400) < 1e-9
    assert abs(fair.sum().item() - 1) < 1e-13


def test_agreement_law_of_pairs():
    single, pairs = numbers(2, 3, seed=1), torch.rand(2, 2, 3, dtype=torch.float64)
    pairs = pairs / pairs.sum(-1, keepdim=True)
    got = agreement_law(single, pairs)
    for b in range(2):
        want = np.array(list(enumerated(single[b].tolist()).values()))
        for k in range(2):
            want = np.convolve(want, pairs[b, k].numpy())
        np.testing.assert_allclose(got[b], want, atol=1e-15)
    assert agreement_law(single[:, :0], pairs).shape == (2, 5)


@pytest.mark.parametrize("scale", [1.7, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("shift", [0.0, 0.5, -2.0, 2.0, 30.0])
def test_thresholds_of_either_direction_and_ties(scale, shift):
    means = numbers(4)
    law = enumerated(means.tolist())
    want = 2 * sum(q for a, q in law.items() if scale * a + shift >= 0) - 1
    lines = torch.tensor([scale], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64)
    got = exact_activation(agreement_law(means)[None], *lines)
    assert abs(got.item() - want) < 1e-14
    mean, variance = means.sum()[None], (1 - means**2).sum()[None]
    corrected = corrected_activation(Moments(mean, variance), *lines, 4).item()
    if abs(want) in (0.0, 1.0):
        assert corrected == want
    else:
        assert abs(corrected - want) < 0.06


def test_continuity_correction_beats_the_plain_normal_law():
    for n in (4, 9, 16):
        means = numbers(200, n) * 0.8
        moments = Moments(means.sum(-1), (1 - means**2).sum(-1))
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        exact = exact_activation(agreement_law(means)[:, None], one, zero)[:, 0]
        plain = (normal_activation(moments) - exact).abs().max()
        corrected = (corrected_activation(moments, one, zero, n) - exact).abs().max()
        if n % 2:  # an odd sum has no tie, and 0 is half-way between two of its values
            assert torch.equal(plain, corrected)
        else:
            assert corrected < plain / 2


def test_corrected_activation_has_gradients_and_no_nan():
    mean, variance = torch.tensor([0.3, -4.0]).requires_grad_(), torch.tensor([1.0, 0.0]).requires_grad_()
    for shift in (0.0, 9.0, -9.0):
        out = corrected_activation(Moments(mean, variance), torch.ones(2), torch.full((2,), shift), 4)
        gradients = torch.autograd.grad(out.sum(), (mean, variance))
        assert all(torch.isfinite(g).all() for g in gradients)
        assert (gradients[0][0] > 0) == (shift == 0.0)


def test_normal_activation():
    mean, variance = numbers(50) * 3, numbers(50, seed=1).abs() * 2
    want = [erf(m / sqrt(2 * v)) for m, v in zip(mean.tolist(), variance.tolist(), strict=True)]
    np.testing.assert_allclose(normal_activation(Moments(mean, variance)), want, atol=1e-14)
    for dtype in DTYPES:
        mean = torch.tensor([0.0, -0.0, 1e-9, -1e-9, -5.0], dtype=dtype, requires_grad=True)
        variance = torch.tensor([0.0, -1e-7, 0.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
        steps = normal_activation(Moments(mean, variance))
        assert steps.tolist() == [1, 1, 1, -1, -1]
        steps[2:].sum().backward()
        assert mean.grad.tolist() == variance.grad.tolist() == [0] * 5


def test_gradients_of_the_normal_activation():
    inputs = [numbers(3, 4, 2) * 3, numbers(3, 4, 2, seed=1).abs() + 0.1, numbers(4, 1, seed=2), numbers(4, 1, seed=3)]
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v, *line: normal_activation(Moments(m, v), *line), inputs)
    z = (inputs[2] * inputs[0] + inputs[3]) / torch.sqrt(2 * inputs[2] ** 2 * inputs[1])
    torch.testing.assert_close(normal_activation(Moments(*inputs[:2]), *inputs[2:]), torch.erf(z))


def plain_activation(mean, variance, scale, shift):
    return torch.erf((scale * mean + shift) / torch.sqrt(2 * scale**2 * variance))


def test_second_derivatives_of_the_normal_activation():
    inputs = [numbers(3, 4, 2) * 2, numbers(3, 4, 2, seed=1).abs() + 0.2, numbers(4, 1, seed=2), numbers(4, 1, seed=3)]
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda m, v, *line: normal_activation(Moments(m, v), *line), inputs)


def test_gradients_are_the_same_with_and_without_a_graph():
    for dtype in DTYPES:
        inputs = [numbers(40, dtype=dtype) * 3, numbers(40, dtype=dtype, seed=1).abs() + 0.1]
        inputs += [numbers(1, dtype=dtype, seed=2), numbers(1, dtype=dtype, seed=3)]
        for x in inputs:
            x.requires_grad_()
        value = normal_activation(Moments(*inputs[:2]), *inputs[2:]).sum()
        plain = torch.autograd.grad(value, inputs, retain_graph=True)
        graph = torch.autograd.grad(value, inputs, create_graph=True)
        want = torch.autograd.grad(plain_activation(*inputs).sum(), inputs)
        for a, b, c in zip(plain, graph, want, strict=True):
            torch.testing.assert_close(a, b, rtol=20 * DTYPES[dtype], atol=DTYPES[dtype])
            torch.testing.assert_close(a, c, rtol=20 * DTYPES[dtype], atol=DTYPES[dtype])


def test_transforms_of_functions():
    mean, variance = numbers(4) * 2, numbers(4, seed=1).abs() + 0.2
    line = numbers(1, seed=2), numbers(1, seed=3)

    def ours(mean, variance):
        return normal_activation(Moments(mean, variance), *line)

    def plain(mean, variance):
        return plain_activation(mean, variance, *line)

    for argument in (0, 1):
        for depth in (1, 2):
            got, want = ours, plain
            for _ in range(depth):
                got, want = torch.func.jacrev(got, argument), torch.func.jacrev(want, argument)
            torch.testing.assert_close(got(mean, variance), want(mean, variance), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.vmap(ours)(mean[:, None], variance[:, None])[:, 0], plain(mean, variance))
    vectorized = torch.autograd.functional.jacobian(ours, (mean, variance), vectorize=True)
    torch.testing.assert_close(vectorized, torch.autograd.functional.jacobian(plain, (mean, variance)))
    h = 0.8 * numbers(3)
    twice = torch.func.jacrev(torch.func.jacrev(transverse))(h)
    torch.testing.assert_close(twice, torch.func.jacrev(torch.func.jacrev(lambda h: torch.sqrt(1 - h * h)))(h))


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_are_finite_where_nothing_varies(dtype):
    mean = torch.tensor([0.0, 1e-9, -5.0, 5.0, 300.0, 1.0], dtype=dtype)
    variance = torch.tensor([0.0, -1e-7, 0.0, 1e-30, 1e-20, 1.0], dtype=dtype)

    def second(function, *values):
        values = [v.clone().requires_grad_() for v in values]
        first = torch.autograd.grad(function(*values).sum(), values, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in first), values)

    for scale in (1.0, 0.0, -2.0):
        lines = torch.tensor([scale], dtype=dtype), torch.tensor([0.3 if scale else 40.0], dtype=dtype)
        found = second(lambda m, v, *line: normal_activation(Moments(m, v), *line), mean, variance, *lines)
        assert all(torch.isfinite(g).all() for g in found)
        if scale:
            want = second(plain_activation, mean[-1:], variance[-1:], *lines)
            torch.testing.assert_close(found[0][-1:], want[0])
            torch.testing.assert_close(found[1][-1:], want[1])
    (found,) = second(transverse, torch.tensor([-1.0, 1.0, 0.6, 0.0], dtype=dtype))
    # X'' = -1 / X^3.
    torch.testing.assert_close(found, torch.tensor([0, 0, -1 / 0.512, -1], dtype=dtype))


def test_ranges():
    x = torch.tensor([[0.0, 1.0 + 5e-5], [float("nan"), 0.5]])
    check_range(x[:1], 0, 1, "pixels are", "scale them")
    check_range(x, 0, 1, "pixels are", "scale them")
    check_range(x[:0], 0, 1, "pixels are", "scale them")
    check_range(torch.full((2,), 9.0, device="meta"), 0, 1, "pixels are", "scale them")
    for value in (1.01, -0.01):
        with pytest.raises(ValueError, match=f"pixels are from .*{value}.*, not within \\[0, 1\\]: scale them"):
            check_range(torch.tensor([0.5, value]), 0, 1, "pixels are", "scale them")


def test_transverse_component():
    h = torch.tensor([-1.0, -0.6, 0.0, 0.8, 1.0, 1.0 + 1e-7], dtype=torch.float64, requires_grad=True)
    x = transverse(h)
    np.testing.assert_allclose(x.detach(), [0, 0.8, 1, 0.6, 0, 0], atol=1e-15)
    (gradient,) = torch.autograd.grad(x.sum(), h)
    np.testing.assert_allclose(gradient, [0, 0.75, 0, -4 / 3, 0, 0], atol=1e-14)
    assert torch.autograd.gradcheck(transverse, h[1:4].detach().requires_grad_())


def test_binary_concrete():
    n = 40000
    h = torch.tensor([-1.0, -0.4, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    bits = binary_concrete(h.expand(n, 4), generator=torch.Generator().manual_seed(0))
    assert set(bits.detach().flatten().tolist()) == {-1.0, 1.0}
    assert bits[:, 0].eq(-1).all()
    assert bits[:, 3].eq(1).all()
    for k in (1, 2):
        assert abs(bits[:, k].mean().item() - h[k].item()) < 5 * sqrt((1 - h[k].item() ** 2) / n)
    # The relaxation tanh((logit q + L) / 2 tau), L logistic, by its own derivative at the same draw.
    u = torch.rand(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 1:3]
    for tau in (1.0, 0.5):
        bits = binary_concrete(h.expand(n, 4), tau, torch.Generator().manual_seed(0))
        (got,) = torch.autograd.grad(bits.sum(), h)
        z = (2 * torch.atanh(h[1:3]) + torch.log(u / (1 - u))) / (2 * tau)
        want = ((1 - torch.tanh(z) ** 2) / tau / (1 - h[1:3] ** 2)).sum(0)
        torch.testing.assert_close(got[1:3], want.detach(), rtol=1e-10, atol=0)
