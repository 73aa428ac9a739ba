"""Quantizers of uneven, learned levels against their equations, written again here in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from test_quantizers import gradient, ready, sample
from torch import Tensor

from classical.quantizers import LQ, NAQ, TTQ, quantizer

Real = np.ndarray
DTYPES = (torch.float32, torch.float64)


def set_levels(q: Any, positive: list[float], negative: list[float]) -> None:
    with torch.no_grad():
        q.positive.copy_(torch.tensor(positive))
        q.negative.copy_(torch.tensor(negative))


# --- Trained ternary and n-ary levels ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_ttq_levels_and_gradients(dtype: torch.dtype) -> None:
    w = sample(3, 4, 3, 3, dtype=dtype, scale=1.0)
    w[0, 0, 0] = torch.tensor([1.0, -1.0, 0.5])
    w *= 4 / w.abs().max()  # so that the threshold 0.25 * 4 = 1 is exact
    w[0, 0, 1, :2] = torch.tensor([1.0, -1.0])  # on the threshold: 0
    q = TTQ(threshold=0.25).to(dtype)
    q.fit(w)
    v = w.double().numpy()
    above, below = v > 1, v < -1
    assert q.positive.tolist() == pytest.approx([v[above].mean()], rel=1e-5)
    assert q.negative.tolist() == pytest.approx([-v[below].mean()], rel=1e-5)
    set_levels(q, [0.75], [1.5])
    np.testing.assert_array_equal(q(w).detach().numpy(), 0.75 * above - 1.5 * below)
    found, given = gradient(q, w)
    g = given.double().numpy()
    np.testing.assert_allclose(found.double().numpy(), g * np.where(above, 0.75, np.where(below, 1.5, 1)), rtol=1e-6)
    assert q.positive.grad is not None
    assert q.negative.grad is not None
    assert q.positive.grad.item() == pytest.approx(g[above].sum(), rel=1e-5)
    assert q.negative.grad.item() == pytest.approx(-g[below].sum(), rel=1e-5)


def test_ttq_threshold_is_a_twentieth_of_the_largest_weight_unless_said() -> None:
    w = torch.tensor([[-20.0, -1.01, -1.0, 0.3, 1.0, 1.01, 3.0]])
    assert quantizer("ttq").codebook(w).codes.tolist() == [[0, 0, 1, 1, 1, 2, 2]]


def nested_means(side: Real, count: int) -> list[float]:
    found, rest = [], side[side > 0]
    for _ in range(count):
        found.append(rest.mean())
        rest = rest[rest > rest.mean()]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [3, 5, 7, 9])
def test_naq_levels_and_gradients(levels: int, dtype: torch.dtype) -> None:
    w = sample(8, 4, 3, 3, dtype=dtype) + 0.1  # both sides have thresholds of their own
    v, half = w.double().numpy(), levels // 2
    cells = np.digitize(v, nested_means(v, half)) - np.digitize(-v, nested_means(-v, half))
    assert set(cells.ravel()) == set(range(-half, half + 1))
    q = NAQ(levels).to(dtype)
    q.fit(w)
    means = [v[cells == cell].mean() if cell else 0 for cell in range(-half, half + 1)]
    book = q.codebook(w)
    np.testing.assert_array_equal(book.codes.numpy(), cells + half)
    np.testing.assert_allclose(book.levels.numpy(), means, rtol=1e-5)
    found, given = gradient(q, w)
    g = given.double().numpy()
    assert torch.equal(found, given)
    for k in range(1, half + 1):
        assert q.positive.grad is not None
        assert q.negative.grad is not None
        assert q.positive.grad[k - 1].item() == pytest.approx(g[cells == k].sum(), rel=1e-4)
        assert q.negative.grad[k - 1].item() == pytest.approx(-g[cells == -k].sum(), rel=1e-4)


def test_nested_means_by_hand() -> None:
    # Above 0: mean of 1 2 3 6 8 is 4, of 6 8 is 7. Below: mean of 1 3 is 2, of 3 alone 3, which nothing exceeds.
    w = torch.tensor([[1.0, 2, 3, 6, 8, 0, -1, -3]])
    assert NAQ(3).codebook(w).codes.tolist() == [[1, 1, 1, 2, 2, 1, 1, 0]]
    assert NAQ(5).codebook(w).codes.tolist() == [[2, 2, 2, 3, 4, 2, 2, 1]]
    assert NAQ(5).codebook(w).levels.tolist() == [-8, -3, 0, 6, 8]  # an empty cell takes the largest size


def test_levels_that_changed_places_are_listed_in_order() -> None:
    w = torch.tensor([[1.0, 2, 3, 6, 8, 0, -1, -3]])
    q = NAQ(5)
    q.fit(w)
    set_levels(q, [5.0, 2.0], [1.0, 3.0])
    book = q.codebook(w)
    assert book.levels.tolist() == [-3, -1, 0, 2, 5]
    assert book.codes.tolist() == [[2, 2, 2, 4, 3, 2, 2, 1]]
    assert torch.equal(book.values(), q(w))
    assert torch.equal(q(w), torch.tensor([[0.0, 0, 0, 5, 2, 0, 0, -1]]))


@pytest.mark.parametrize("name", ["ttq", "naq3", "naq7"])
def test_first_levels_minimize_the_error_of_their_cells(name: str) -> None:
    w = sample(6, 4, 3, 3)
    q = quantizer(name)
    best = q.double().codebook(w)
    q.fit(w)
    for k, level in enumerate(best.levels):
        cell = w[best.codes == k]
        if level != 0:
            torch.testing.assert_close(level, cell.mean())


# --- LQ-Nets ---


def digits(bits: int, low: int) -> Real:
    return np.array([[1 if i >> j & 1 else low for j in range(bits)] for i in range(2**bits)], float)


def lq_codes(x: Real, basis: Real, low: int) -> tuple[Real, Real]:
    """Rows of digits B of the nearest levels for a row x, and the levels that x gets."""
    table = digits(len(basis), low)
    nearest = np.abs(x[:, None] - (table @ basis)[None]).argmin(1)
    return table[nearest], (table @ basis)[nearest]


def lq_least_squares(x: Real, basis: Real, low: int) -> Real:
    """min |B v - x|^2 + 1e-4 |v - basis|^2 as one least-squares system."""
    rows, _ = lq_codes(x, basis, low)
    system = np.vstack([rows, 1e-2 * np.eye(len(basis))])
    return np.linalg.lstsq(system, np.concatenate([x, 1e-2 * basis]), rcond=None)[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_lq_quantizes_to_the_nearest_level_and_moves_its_basis(bits: int, role: Any) -> None:
    x = sample(3, 40, 2, 2) if role == "weight" else sample(3, 40, 2, 2).relu()
    low = -1 if role == "weight" else 0
    q = LQ(bits, role=role).double()
    q.fit(x)
    for step in range(3):  # the first basis is a fixed point of x; then other data
        seen = (x if step == 0 else 1.5 * sample(3, 40, 2, 2, seed=step)).relu() if low == 0 else x * (1 + 0.5 * step)
        before = q.basis.numpy().copy()
        output = q(seen)
        rows = seen.flatten(1).numpy() if role == "weight" else seen.reshape(1, -1).numpy()
        for row, basis, after, found in zip(
            rows, before, q.basis.numpy(), output.detach().reshape(len(rows), -1).numpy(), strict=True
        ):
            np.testing.assert_allclose(found, lq_codes(row, basis, low)[1], rtol=1e-12, atol=1e-14)
            expected = 0.9 * basis + 0.1 * lq_least_squares(row, basis, low)
            np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-12)
            if step == 0:
                np.testing.assert_allclose(
                    after, basis, rtol=1e-2
                )  # 20 rounds of fitting came close to the fixed point


def gaussian(count: int = 4000) -> Tensor:
    """A sample whose distribution is N(0, 1) without noise."""
    return torch.from_numpy(norm.ppf((np.arange(count) + 0.5) / count))


def test_lq_weights_of_two_bits_reach_the_best_four_levels_for_a_gaussian() -> None:
    # Any four symmetric levels are +-v1 +-v2, so least squares end at Max's: 0.4528 and 1.5104 (Max 1960, table I).
    levels = ready("lq2", "weight", gaussian()[None]).codebook(gaussian()[None]).levels
    assert levels.flatten().tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=3e-3)


def test_lq_weights_of_one_bit_are_the_mean_size_of_each_channel() -> None:
    w = sample(5, 4, 3, 3)
    expected = w.abs().mean((1, 2, 3), keepdim=True) * w.sign()
    torch.testing.assert_close(ready("lq1", "weight", w)(w), expected, rtol=1e-4, atol=0)  # the ridge of 1e-4


def test_lq_activations_of_two_bits_reach_the_best_levels_for_a_half_gaussian() -> None:
    x = gaussian().relu()[None]

    def error(basis: Real) -> float:
        levels = digits(2, 0) @ basis
        return float(np.square(np.abs(x.numpy()[0][:, None] - levels[None]).min(1)).sum())

    best = minimize(error, [0.5, 1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    q = quantizer("lq2", "activation").double()
    q.fit(x)
    assert error(q.state_dict()["basis"].numpy()[0]) == pytest.approx(best.fun, rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lq_gradients(dtype: torch.dtype) -> None:
    w = sample(3, 4, 3, 3, dtype=dtype)
    found, g = gradient(ready("lq2", "weight", w), w)
    assert torch.equal(found, g)
    x = sample(3, 4, 3, 3, dtype=dtype)
    q = ready("lq2", "activation", x.relu())
    top = q.codebook(x).levels[-1]
    found, g = gradient(q, x)
    torch.testing.assert_close(found, g * (x <= top), rtol=1e-6, atol=0)
    assert (x > top).any()
    assert (x < 0).any()


def test_lq_survives_a_batch_that_is_not_finite_and_unused_digits() -> None:
    q = ready("lq3", "activation", sample(2, 8).relu()).train()
    before = q.state_dict()["basis"].clone()
    q(torch.tensor([[1.0, torch.nan]], dtype=torch.float64))
    q(torch.tensor([[1.0, torch.inf]], dtype=torch.float64))
    assert torch.equal(q.state_dict()["basis"], before)
    q(torch.zeros(1, 8, dtype=torch.float64))  # B^T B is 0: the ridge keeps the basis
    torch.testing.assert_close(q.state_dict()["basis"], before)
    constant = LQ(3)
    constant.fit(torch.full((2, 8), 0.3))
    torch.testing.assert_close(constant.eval()(torch.full((2, 8), 0.3)), torch.full((2, 8), 0.3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_lq_waits_for_something_else_than_zeros(role: Any) -> None:
    zeros, x = torch.zeros(4, 30), gaussian(120).reshape(4, 30).abs()
    waited, fresh = LQ(2, role), LQ(2, role)
    for _ in range(2):
        assert not waited.train()(zeros).any()
    assert not waited.calibrated
    loaded = LQ(2, role).eval()
    loaded.load_state_dict(waited.state_dict())
    assert torch.equal(loaded(x), waited.eval()(x))
    assert torch.equal(waited.train()(x), fresh.train()(x))
    assert torch.equal(waited.basis, fresh.basis)
    loaded.load_state_dict(waited.state_dict())
    assert waited.calibrated
    assert loaded.calibrated
    assert torch.equal(loaded(x), waited.eval()(x))
