"""Run one circuit on a batch of inputs, in one call."""

from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, full_precision
from qconv.gradients import compile_differentiable


def simulate(
    circuit: Circuit,
    inputs: Tensor,
    weights: Tensor,
    *,
    backend: str | Backend = "auto",
    shots: int | None = None,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> Tensor:
    """Expectation values of a circuit's observables.

    Args:
        circuit: With at least one observable.
        inputs: Features (P, n_inputs), float32 or float64.
        weights: (n_weights,), or (F, n_weights) for several filters at once; of the same dtype.
        backend: A backend's name, or a backend of your own.
        shots: Samples a circuit; None for exact values.
        noise: Channels after gates; None for none.
        seed: Makes shots repeatable.

    Returns:
        (P, n_obs), or (P, F, n_obs) for several filters; in [-1, 1]. Differentiable in inputs and weights.

    Raises:
        ValueError: For shapes or dtypes that do not fit, a circuit without observables, or a backend that cannot run
            it.
    """
    if not circuit.observables:
        raise ValueError("circuit has 0 observables: add at least one with circuit.with_observables(('Z...',))")
    if weights.ndim not in (1, 2):
        raise ValueError(f"weights have shape {tuple(weights.shape)}: give (n_weights,) or (filters, n_weights)")
    runner = as_backend(backend)
    compiled = compile_differentiable(runner, circuit, shots=shots, noise=noise, seed=seed)
    with full_precision(weights):
        values = compiled(inputs, weights[None] if weights.ndim == 1 else weights)
    return values[:, 0] if weights.ndim == 1 else values
