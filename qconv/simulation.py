"""Run one circuit on a batch of inputs, in one call."""

from concurrent.futures import Executor
from typing import Any

from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, Compiled, as_int, full_precision, warn_of_idle_noise
from qconv.gradients import compile_differentiable


def simulate(
    circuit: Circuit,
    inputs: Tensor,
    weights: Tensor,
    *,
    backend: Any = "auto",
    shots: int | None = None,
    noise: NoiseModel | None = None,
    seed: int | None = None,
    executor: Executor | None = None,
) -> Tensor:
    """Expectation values of a circuit's observables.

    Args:
        circuit: With at least one observable.
        inputs: Features (P, n_inputs), float32 or float64.
        weights: (n_weights,), or (F, n_weights) for several filters at once; of the same dtype.
        backend: As of QuantumConv2d.
        shots: Samples a circuit; None for exact values.
        noise: Channels after gates; None for none.
        seed: Makes shots repeatable. Without one torch.manual_seed does, but for backend "pennylane".
        executor: Of backend "qiskit", as of QuantumConv2d.

    Returns:
        (P, n_obs), or (P, F, n_obs) for several filters; in [-1, 1]. Differentiable in inputs and weights.

    Raises:
        ValueError: For what is no tensor, shapes or dtypes that do not fit, a circuit without observables, or a backend
            that cannot run it.
    """
    return evaluate(circuit, inputs, weights, as_backend(backend, executor), shots=shots, noise=noise, seed=seed)[0]


def evaluate(
    circuit: Circuit,
    inputs: Tensor,
    weights: Tensor,
    backend: Backend,
    *,
    shots: int | None,
    noise: NoiseModel | None,
    seed: int | None,
) -> tuple[Tensor, Compiled]:
    """What `simulate` gives, and what gave it."""
    if not circuit.observables:
        raise ValueError("circuit has 0 observables: add at least one with circuit.with_observables(('Z...',))")
    for name, values in (("inputs", inputs), ("weights", weights)):
        if not isinstance(values, Tensor):
            raise ValueError(
                f"{name} are a {type(values).__name__}: give a torch.Tensor, such as torch.as_tensor({name})"
            )
    if weights.ndim not in (1, 2):
        raise ValueError(f"weights have shape {tuple(weights.shape)}: give (n_weights,) or (filters, n_weights)")
    compiled = compile_differentiable(backend, circuit, shots=as_int(shots), noise=noise, seed=as_int(seed))
    warn_of_idle_noise(circuit, noise, stacklevel=4)
    with full_precision(weights):
        values = compiled(inputs, weights[None] if weights.ndim == 1 else weights)
    return (values[:, 0] if weights.ndim == 1 else values), compiled
