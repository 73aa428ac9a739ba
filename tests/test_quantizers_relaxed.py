"""Relaxed quantization against its probabilities, computed densely, with the same noise."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from test_quantizers import sample
from torch import Tensor

from classical.quantizers import RelaxedQuantizer

Real = np.ndarray


def built(
    bits: int, step: float, spread: float, dtype: torch.dtype = torch.float64, **options: Any
) -> RelaxedQuantizer:
    """A quantizer with this step, and a spread of the noise in steps."""
    q = RelaxedQuantizer(bits, **{"temperature": 1.0} | options).to(dtype)
    q.fit(torch.ones(1, 1))
    with torch.no_grad():
        q.step.fill_(step)
        q.log_noise.fill_(float(np.log(spread)))
    return q


def probabilities(x: Real, step: float, spread: float, grid: Real) -> Real:
    """Probability that x, with logistic noise of scale spread * step, rounds to each point: (points, values)."""
    scale = spread * step
    upper, lower = (grid[:, None] * step + step / 2 - x) / scale, (grid[:, None] * step - step / 2 - x) / scale
    # Above x from the other end, where the difference of two numbers close to 1 would have no digits left.
    chance = np.where(lower > 0, expit(-lower) - expit(-upper), expit(upper) - expit(lower))
    return chance / chance.sum(0)


def reference(x: Real, step: float, spread: float, grids: Real, uniform: Real, temperature: float) -> tuple[Real, Real]:
    """Relaxed values, and the points of the hard choice; grids: (points, values)."""
    chance = np.stack([probabilities(x[[i]], step, spread, grids[:, i])[:, 0] for i in range(len(x))], 1)
    score = np.exp((np.log(chance) - np.log(-np.log(uniform))) / temperature)
    weights = score / score.sum(0)
    return (weights * grids * step).sum(0), step * grids[weights.argmax(0), np.arange(len(x))]


def run(q: RelaxedQuantizer, x: Tensor, seed: int = 3) -> tuple[Tensor, Real]:
    """Output in train(), and the uniform numbers behind its noise."""
    torch.manual_seed(seed)
    output = q(x)
    torch.manual_seed(seed)
    uniform = torch.rand(q.window, *x.shape, dtype=x.dtype)
    return output, uniform.double().numpy().reshape(q.window, -1)


def window(x: Real, step: float, q: RelaxedQuantizer) -> Real:
    """The q.window grid points nearest to each value: (points, values)."""
    points = np.array(list(q.grid))
    columns = [np.sort(points[np.argsort(np.abs(points - v / step), kind="stable")[: q.window]]) for v in x]
    return np.stack(columns, 1).astype(float)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("bits", "role", "size"),
    [(2, "weight", 4), (3, "weight", 8), (2, "activation", 4), (4, "weight", 3), (4, "activation", 5)],
)
def test_values_are_those_of_the_dense_distribution(bits: int, role: Any, size: int, temperature: float) -> None:
    x = sample(6, 7, scale=1.0)  # beyond the grid, too
    q = built(bits, 0.3, 0.4, role=role, window=size, temperature=temperature)
    output, uniform = run(q, x)
    v = x.numpy().ravel()
    soft, _ = reference(v, 0.3, 0.4, window(v, 0.3, q), uniform, temperature)
    np.testing.assert_allclose(output.detach().numpy().ravel(), soft, rtol=1e-9, atol=1e-12)


def test_single_precision_too() -> None:
    x = sample(40, 50, dtype=torch.float32)
    q = built(4, 0.1, 1 / 3, torch.float32)
    output, uniform = run(q, x)
    v = x.double().numpy().ravel()
    soft, _ = reference(v, float(np.float32(0.1)), 1 / 3, window(v, 0.1, q), uniform, 1.0)
    np.testing.assert_allclose(output.detach().numpy().ravel(), soft, atol=1e-4)


@pytest.mark.parametrize("name", ["x", "step", "log_noise"])
def test_gradients_are_those_of_the_dense_distribution(name: str) -> None:
    x = sample(3, 4, scale=0.5)
    q = built(3, 0.3, 0.4, window=3)
    x.requires_grad_()
    output, uniform = run(q, x)
    g = sample(3, 4, seed=9).numpy().ravel()
    (output.flatten() * torch.from_numpy(g)).sum().backward()
    v = x.detach().numpy().ravel()
    grids = window(v, 0.3, q)

    def loss(values: Real, step: float, log_noise: float) -> float:
        # The spread is log_noise's share of the step, so both move with the step.
        return float((g * reference(values, step, np.exp(log_noise), grids, uniform, 1.0)[0]).sum())

    h, at = 1e-6, (v, 0.3, np.log(0.4))
    if name == "x":
        assert x.grad is not None
        for i, shift in enumerate(h * np.eye(len(v))):
            expected = (loss(v + shift, *at[1:]) - loss(v - shift, *at[1:])) / (2 * h)
            assert x.grad.flatten()[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
        return
    place = {"step": 1, "log_noise": 2}[name]
    moved = [[*at[:place], at[place] + side * h, *at[place + 1 :]] for side in (1, -1)]
    expected = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)  # type: ignore[arg-type]
    parameter = getattr(q, name)
    assert parameter.grad.item() == pytest.approx(expected, rel=1e-5)


def test_straight_through_is_hard_forward_and_relaxed_backward() -> None:
    x = sample(5, 6, scale=0.5).requires_grad_()
    hard, soft = built(3, 0.3, 0.4, hard=True, window=3), built(3, 0.3, 0.4, window=3)
    output, uniform = run(hard, x)
    v = x.detach().numpy().ravel()
    _, chosen = reference(v, 0.3, 0.4, window(v, 0.3, hard), uniform, 1.0)
    np.testing.assert_allclose(output.detach().numpy().ravel(), chosen, rtol=1e-12, atol=1e-14)
    g = sample(5, 6, seed=9)
    grads = [
        torch.autograd.grad((out * g).sum(), (x, q.step, q.log_noise))
        for q, out in ((hard, output), (soft, run(soft, x)[0]))
    ]
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][2], grads[1][2])
    # The step multiplies the chosen points instead of the averaged ones.
    averaged = run(soft, x)[0].detach()
    torch.testing.assert_close(grads[0][1] - grads[1][1], (g * (output.detach() - averaged)).sum() / 0.3)


def test_hard_choices_have_the_probabilities_of_noisy_rounding() -> None:
    count = 40000
    q = built(2, 1.0, 0.4, hard=True, window=4)
    values = [-2.3, -0.4, 0.25, 0.5, 1.1]
    torch.manual_seed(0)
    drawn = q(torch.tensor(values, dtype=torch.float64).repeat(count, 1)).detach().numpy()
    grid = np.array([-2.0, -1, 0, 1])
    expected = probabilities(np.array(values), 1.0, 0.4, grid)
    found = np.stack([(drawn == point).mean(0) for point in grid])
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_noise_is_drawn_in_train_only_and_reproducibly() -> None:
    x = sample(4, 5)
    for hard in (False, True):
        q = built(4, 0.1, 1 / 3, hard=hard)
        assert torch.equal(run(q, x)[0], run(q, x)[0])
        assert not torch.equal(run(q, x)[0], run(q, x, seed=4)[0])
        state = torch.get_rng_state()
        rounded = q.eval()(x)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(rounded, (x / 0.1).round().clamp(-8, 7) * 0.1)


def test_little_noise_is_plain_rounding_and_far_values_stay_finite() -> None:
    x = torch.tensor([[0.11, -0.34, 0.26, 1e6, -1e6, 7.7]], dtype=torch.float64).requires_grad_()
    q = built(4, 0.1, 1e-3)
    output, _ = run(q, x)
    expected = torch.tensor([[0.1, -0.3, 0.3, 0.7, -0.8, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    for tensor in (x, *q.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    for dtype in (torch.float32, torch.float16):
        assert built(4, 0.1, 1 / 3, torch.float32)(torch.tensor([[1e4, -1e4]], dtype=dtype)).isfinite().all()


def test_high_temperatures_of_impossible_points_have_finite_gradients() -> None:
    q = built(3, 1.0, 1e-3)
    q.temperature = 4.0
    x = torch.tensor([[0.1, -1.4, 2.2]], dtype=torch.float64, requires_grad=True)
    output, _ = run(q, x)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *q.parameters()))


def test_temperatures_unless_said() -> None:
    assert (RelaxedQuantizer().temperature, RelaxedQuantizer(hard=True).temperature) == (0.25, 1)


def test_a_window_near_the_end_of_the_grid_lies_inside_it() -> None:
    q = built(3, 1.0, 0.3, window=3)
    points, chances = q.choice(torch.tensor([[-9.0, -3.6, 0.2, 2.9, 50.0]], dtype=torch.float64))
    assert points[:, 0].T.tolist() == [[-4, -3, -2], [-4, -3, -2], [-1, 0, 1], [1, 2, 3], [1, 2, 3]]
    assert chances.shape == points.shape


def test_eval_gradient_passes_inside_the_grid() -> None:
    q = built(2, 0.5, 0.3).eval()
    x = torch.tensor([[-1.3, -1.2, 0.0, 0.7, 0.8]], dtype=torch.float64, requires_grad=True)
    q(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.float64))
