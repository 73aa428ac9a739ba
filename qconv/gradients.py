"""Gradients from evaluations alone, around any backend: for weights and inputs, batched over patches and filters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.gates import AMPLITUDE, shift_rule
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, with_free_angles
from qconv.backends.computed import PreparedCompiled, with_plain_features
from qconv.backends.differentiation import METHODS as METHODS
from qconv.backends.differentiation import Differentiation
from qconv.backends.jobs import JobFailed
from qconv.backends.loading import as_backend
from qconv.backends.matrix_products import Truncation, approximation_of, truncation_of
from qconv.backends.protocol import (
    Backend,
    CircuitSize,
    Compiled,
    Unsupported,
    check_call,
    check_options,
    circuit_sizes,
)

# Rows of angles sent to the backend at a time while differentiating: bounds the memory of wide kernels.
ROWS_A_CALL = 2**15

SPSA_STEP = 0.1  # radians

Rule = tuple[tuple[float, float], ...]


def executions(
    circuit: Circuit,
    patches: int,
    filters: int = 1,
    *,
    method: str = "parameter-shift",
    samples: int = 1,
    inputs: bool = True,
) -> int:
    """Circuit evaluations of one forward and backward pass, without running any.

    Args:
        circuit: The kernel.
        patches: Number of patches.
        filters: Number of filters.
        method: One of METHODS.
        samples: Directions of "spsa".
        inputs: Whether the gradient with respect to the features is wanted too, as it is behind another layer.

    Raises:
        ValueError: For an unknown method.
    """
    if method not in METHODS:
        raise unknown("gradient method", method, METHODS)
    sources = ("input", "weight") if inputs else ("weight",)
    features = len(features_of(circuit)) if inputs else 0
    terms = [
        len(rule) for rule, angle in zip(_rules(circuit), angles_of(circuit), strict=True) if angle.source in sources
    ]
    if method == "spsa":
        backward = 2 * samples if terms or features else 0
    else:
        shifts = sum(terms) if method == "parameter-shift" else 2 * len(terms)
        backward = shifts + (2 * features + 1 if features else 0)
    return patches * filters * (1 + backward)


def _rules(circuit: Circuit) -> list[Rule]:
    """Parameter-shift rule of every angle."""
    return [
        shift_rule(frequencies)
        for gate in circuit.gates
        if gate.name != AMPLITUDE
        for frequencies in gate.spec.frequencies
    ]


class FromEvaluations(ABC):
    """A circuit made differentiable in inputs and weights by evaluations of it at other angles.

    Only angles are moved, each on its own, and the chain rule back to features and weights is autograd's, so weights
    and features that occur in several gates, scaled or shared, need no special case. All patches and filters are rows
    of one call.

    Args:
        backend: Where the circuit runs.
        circuit: The kernel.
        shots: As of Backend.compile; the gradient is then estimated from shots too.
        noise: As of Backend.compile.
        seed: As of Backend.compile.
    """

    differentiable = True
    method: str  # of METHODS

    def __init__(
        self, backend: Backend, circuit: Circuit, *, shots: int | None, noise: NoiseModel | None, seed: int | None
    ) -> None:
        self.circuit = circuit
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        try:
            self._compiled = backend.compile(with_free_angles(circuit), shots=shots, noise=noise, seed=seed)
        except Unsupported as refusal:
            raise Unsupported(
                f"gradients from evaluations give every angle of the circuit a value of its own, which backend "
                f"{backend.name!r} does not take: {refusal}"
            ) from refusal

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "this backend has no autograd, and gradients from evaluations do not run inside torch.func transforms: "
                "use backend 'fourier' or 'statevector' there"
            )
        moving = {"input": inputs.requires_grad, "weight": weights.requires_grad, "const": False}
        angles = evaluate_angles(self._angles, inputs, weights)
        features = evaluate_angles(self._features, inputs, weights)
        active = tuple(k for k, angle in enumerate(self._angles) if moving[angle.source])
        shape = len(inputs), len(weights)
        try:
            values: Tensor = _Evaluate.apply(angles, features, self, active, shape)  # type: ignore[no-untyped-call]
        except JobFailed as failure:
            raise failure.of(*shape) from failure.__cause__
        return values.reshape(*shape, values.shape[1])

    @property
    def sizes(self) -> tuple[CircuitSize, ...]:
        """See Sized."""
        return circuit_sizes(self._compiled, self.circuit)

    @property
    def truncation_error(self) -> Truncation | None:
        """What the last evaluation lost where the backend truncates; see load_backend."""
        return truncation_of(self._compiled)

    @property
    def approximation(self) -> str:
        """See approximation_of."""
        return approximation_of(self._compiled)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: an evaluation without gradients."""
        return self._compiled.counts(patches * filters, 1)

    @abstractmethod
    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """Circuit evaluations of one forward and backward pass; see `executions`."""

    @abstractmethod
    def slopes(
        self, angles: Tensor, features: Tensor, grad: Tensor, active: tuple[int, ...], wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients with respect to angles and features.

        Args:
            angles: (R, K).
            features: Of an amplitude encoding, (R, k).
            grad: With respect to the values, (R, n_obs).
            active: Angles whose gradient is wanted.
            wanted: Whether the features' is.
        """

    def run(self, angles: Tensor, features: Tensor) -> Tensor:
        """Values (R, n_obs) of rows of angles."""
        rows = torch.cat([angles, features], dim=1)
        with torch.no_grad():
            return self._compiled(rows, rows.new_zeros(1, 0))[:, 0]


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        angles: Tensor,
        features: Tensor,
        circuit: FromEvaluations,
        active: tuple[int, ...],
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(angles, features)
        ctx.circuit, ctx.active, ctx.shape = circuit, active, shape
        return circuit.run(angles, features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        angles, features = ctx.saved_tensors
        try:
            slopes = ctx.circuit.slopes(angles, features, grad, ctx.active, ctx.needs_input_grad[1])
        except JobFailed as failure:
            raise failure.of(*ctx.shape) from failure.__cause__
        return *slopes, None, None, None


class ParameterShift(FromEvaluations):
    """Exact gradients: two evaluations an angle, four where a gate's generator has two spectral gaps.

    The amplitudes of a state preparation enter quadratically and have a two-term rule of their own.

    Source: Schuld, Bergholm, Gogolin, Izaac & Killoran, Phys. Rev. A 99, 032331 (2019); Wierichs et al.
        (arXiv:2107.12390) for gates with several frequencies.
    """

    method = "parameter-shift"

    def rules(self) -> list[Rule]:
        """Pairs (coefficient, shift) of every angle."""
        return _rules(self.circuit)

    def slopes(
        self, angles: Tensor, features: Tensor, grad: Tensor, active: tuple[int, ...], wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See FromEvaluations."""
        grad_angles = torch.zeros_like(angles)
        rules = self.rules()
        # Each shifted copy of all rows is one block of a few large calls.
        terms = [(k, c, shift) for k in active for c, shift in rules[k]]
        a_call = max(1, ROWS_A_CALL // max(1, len(angles)))
        for start in range(0, len(terms), a_call):
            block = terms[start : start + a_call]
            shifted = angles.repeat(len(block), 1, 1)
            for copy, (k, _, shift) in zip(shifted, block, strict=True):
                copy[:, k] += shift
            values = self.run(shifted.flatten(0, 1), features.repeat(len(block), 1))
            for value, (k, c, _) in zip(values.reshape(len(block), len(angles), -1), block, strict=True):
                grad_angles[:, k] += c * (grad * value).sum(-1)
        return grad_angles, self._feature_gradient(angles, features, grad) if wanted else None

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """See FromEvaluations."""
        return executions(self.circuit, patches, filters, inputs=inputs)

    def _feature_gradient(self, angles: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to the features of an amplitude encoding.

        f(x) = N(x) / |x|^2 with N quadratic in x, so a central difference of N with any step is exact; the step is the
        norm of x, which keeps the shots' noise in proportion.
        """
        result = torch.zeros_like(features)
        # f does not change with the length of x: in units of the largest feature the squares stay in range.
        largest = features.abs().amax(1, keepdim=True)
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        features = features / unit
        square = features.square().sum(1, keepdim=True)
        step = square.sqrt()
        # Not the value of the forward pass, whose shots are already in `grad`: their product would be biased.
        value = self.run(angles, features)
        for k in range(features.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = features.clone()
                moved[:, k] += sign * step[:, 0]
                ends.append(self.run(angles, moved) * moved.square().sum(1, keepdim=True))
            slope = ((ends[0] - ends[1]) / (2 * step) - 2 * value * features[:, k, None]) / square
            # A patch of zeros alone stays |0...0> by convention, with gradient 0.
            result[:, k] = torch.where(square[:, 0] > 0, (grad * slope).sum(1), 0.0)
        return result / unit


class FiniteDifferences(ParameterShift):
    """Central differences in every angle: off by O(step^2), the amplitudes of a state preparation by nothing.

    Args:
        backend: See FromEvaluations.
        circuit: See FromEvaluations.
        shots: See FromEvaluations.
        noise: See FromEvaluations.
        seed: See FromEvaluations.
        step: In radians; None for the cube root of double precision, where truncation and rounding are about equal.

    Raises:
        ValueError: For shots without a step, since their noise is divided by it.
    """

    method = "finite-diff"

    def __init__(
        self,
        backend: Backend,
        circuit: Circuit,
        *,
        shots: int | None,
        noise: NoiseModel | None,
        seed: int | None,
        step: float | None = None,
    ) -> None:
        if shots is not None and step is None:
            raise ValueError(
                f"finite differences of {shots} shots were asked without a step: give one, such as step=0.5 (a slope "
                "scatters by up to 1 / (step sqrt(2 shots))), or use method 'parameter-shift'"
            )
        super().__init__(backend, circuit, shots=shots, noise=noise, seed=seed)
        self._step = step or torch.finfo(torch.float64).eps ** (1 / 3)

    def rules(self) -> list[Rule]:
        """See ParameterShift."""
        return [((0.5 / self._step, self._step), (-0.5 / self._step, -self._step))] * len(self._angles)

    def slopes(
        self, angles: Tensor, features: Tensor, grad: Tensor, active: tuple[int, ...], wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See FromEvaluations: in double precision, since differences of close numbers lose half the digits."""
        grad_angles, grad_features = super().slopes(angles.double(), features.double(), grad.double(), active, wanted)
        return grad_angles.to(angles), None if grad_features is None else grad_features.to(features)

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """See FromEvaluations."""
        return executions(self.circuit, patches, filters, method="finite-diff", inputs=inputs)


class Spsa(FromEvaluations):
    """Simultaneous perturbation: two evaluations a direction, however many angles there are.

    All angles of a row (and the amplitudes of a state preparation, in units of their norm) move at once by the step
    along a direction d of random signs, drawn for every patch and filter on its own, and the estimate of the gradient
    of g is the mean over the samples of d (g(a + c d) - g(a - c d)) / 2c for a step c.

    What it scatters around: g is a Fourier series in the angles. Averaged over the signs, its term of frequencies n_j
    keeps the share sin(c n_i) / (c n_i) prod_{j != i} cos(c n_j) of its slope along i: a bias of O(c^2), towards 0.
    For Pauli rotations, |n_j| <= 1, the share of a term in m angles is sin(c) / c cos(c)^(m - 1).
    How much it scatters: the variance of entry i is sum_{j != i} (dg/da_j)^2 / samples + O(c^2), and shots add less
    than |dL/df|^2 / (2 c^2 samples shots): the fewer the shots, the larger the best step.

    Args:
        backend: See FromEvaluations.
        circuit: See FromEvaluations.
        shots: See FromEvaluations.
        noise: See FromEvaluations.
        seed: See FromEvaluations; draws the directions too. None takes them from torch's global generator.
        samples: Directions a row.
        step: c, in radians.

    Source: Spall, IEEE Transactions on Automatic Control 37, 332 (1992), eq. 2.1-2.2.
    """

    method = "spsa"

    def __init__(
        self,
        backend: Backend,
        circuit: Circuit,
        *,
        shots: int | None,
        noise: NoiseModel | None,
        seed: int | None,
        samples: int = 1,
        step: float = SPSA_STEP,
    ) -> None:
        super().__init__(backend, circuit, shots=shots, noise=noise, seed=seed)
        self._samples, self._step = samples, step
        self._generator: torch.Generator | None = None
        if seed is not None:
            # Not the seed itself: a backend that draws its shots from it would draw the same bits.
            own = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint32)[0]
            self._generator = torch.Generator().manual_seed(int(own))

    def slopes(
        self, angles: Tensor, features: Tensor, grad: Tensor, active: tuple[int, ...], wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See FromEvaluations."""
        rows, free = len(angles), len(active)
        # The value does not change with the length of the features.
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True) if wanted else features.new_ones(rows, 1)
        found = norm > 0
        units = torch.where(found, norm, 1.0)
        base = torch.cat([angles, features / units], dim=1)
        moved = [*active, *range(angles.shape[1], base.shape[1] if wanted else angles.shape[1])]
        slopes = torch.zeros_like(base)
        a_call = max(1, ROWS_A_CALL // max(1, 2 * rows))
        for start in range(0, self._samples if moved else 0, a_call):
            directions = torch.stack(
                [self._signs(rows, len(moved)) for _ in range(start, min(start + a_call, self._samples))]
            ).to(base)
            # A patch of zeros alone stays |0...0> by convention, with gradient 0.
            directions[..., free:] *= found
            ends = base.repeat(2, len(directions), 1, 1)
            ends[0, ..., moved] += self._step * directions
            ends[1, ..., moved] -= self._step * directions
            flat = ends.flatten(0, 2)
            values = self.run(flat[:, : angles.shape[1]], flat[:, angles.shape[1] :])
            upper, lower = values.reshape(2, len(directions), rows, -1)
            slope = (grad * (upper - lower)).sum(-1, keepdim=True) / (2 * self._step)
            slopes[:, moved] += (slope * directions).sum(0) / self._samples
        grad_features = slopes[:, angles.shape[1] :] / units
        return slopes[:, : angles.shape[1]], grad_features if wanted else None

    def _signs(self, rows: int, columns: int) -> Tensor:
        # One direction at a time, so that the numbers do not depend on how many go into a call.
        return 2 * torch.randint(2, (rows, columns), generator=self._generator) - 1

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """See FromEvaluations."""
        return executions(self.circuit, patches, filters, method="spsa", samples=self._samples, inputs=inputs)


@dataclass(frozen=True)
class DifferentiatedBackend:
    """A backend whose circuits are differentiated in a chosen way; made by `differentiate`."""

    backend: Backend
    differentiation: Differentiation

    @property
    def name(self) -> str:
        """Name of the backend, and the method."""
        return f"{self.backend.name} ({self.differentiation.method})"

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> FromEvaluations:
        """See Backend."""
        check_options(shots, noise, seed)
        return _from_evaluations(self.differentiation, self.backend, circuit, shots=shots, noise=noise, seed=seed)


def _from_evaluations(
    way: Differentiation,
    backend: Backend,
    circuit: Circuit,
    *,
    shots: int | None,
    noise: NoiseModel | None,
    seed: int | None,
) -> FromEvaluations:
    if way.method == "parameter-shift":
        return ParameterShift(backend, circuit, shots=shots, noise=noise, seed=seed)
    if way.method == "finite-diff":
        return FiniteDifferences(backend, circuit, shots=shots, noise=noise, seed=seed, step=way.step)
    samples, step = way.samples or 1, way.step or SPSA_STEP
    return Spsa(backend, circuit, shots=shots, noise=noise, seed=seed, samples=samples, step=step)


def differentiate(
    backend: str | Backend,
    method: str = "parameter-shift",
    *,
    samples: int | None = None,
    step: float | None = None,
) -> DifferentiatedBackend:
    """Any backend, with gradients from evaluations of the circuit in place of its own.

    Args:
        backend: A backend, or its name.
        method: "parameter-shift" (exact, 2 to 4 evaluations an angle), "spsa" (2 evaluations a sample for all angles
            together, scattered) or "finite-diff" (2 an angle, off by O(step^2)). `executions` tells what each costs.
        samples: Directions of "spsa"; 1 by default. The variance falls as 1 / samples.
        step: Of "spsa" (0.1 by default) and "finite-diff" (6e-6 by default; with shots it must be given), in radians,
            below pi/2.

    Returns:
        A backend for `QuantumConv2d(backend=...)` and `simulate`.

    Raises:
        ValueError: For an unknown method, or samples or a step that it does not take.

    Example:
        QuantumConv2d(1, 4, 2, backend=differentiate("qiskit", "spsa", samples=4), shots=1000)
    """
    return DifferentiatedBackend(as_backend(backend), Differentiation(method, samples, step))


def compile_differentiable(
    backend: Backend,
    circuit: Circuit,
    *,
    shots: int | None = None,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> Compiled:
    """Compile a circuit so that gradients flow on any backend: by autograd where it can, else from evaluations.

    Those are parameter shifts, but for a compiled circuit that names its own `differentiation`. Features that the
    circuit computes from others are made by torch, before the backend.

    Raises:
        Unsupported: If the backend cannot run the circuit.
    """
    plain, preparation = with_plain_features(circuit)
    compiled = backend.compile(plain, shots=shots, noise=noise, seed=seed)
    if not compiled.differentiable:
        way = getattr(compiled, "differentiation", Differentiation())
        compiled = _from_evaluations(way, backend, plain, shots=shots, noise=noise, seed=seed)
    return compiled if preparation is None else PreparedCompiled(circuit, compiled, preparation)
