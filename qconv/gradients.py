"""Parameter-shift gradients around any backend, for weights and inputs, batched over patches and filters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.gates import AMPLITUDE, shift_rule
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, with_free_angles
from qconv.backends.protocol import Backend, Compiled, check_call

# Rows of angles sent to the backend at a time while differentiating: bounds the memory of wide kernels.
ROWS_A_CALL = 2**15


class ParameterShift:
    """A circuit on a backend without autograd, made differentiable in inputs and weights.

    Every angle of every gate is shifted on its own and the chain rule back to features and weights is autograd's, so
    weights and features that occur in several gates, scaled or shared, need no special case. The amplitudes of a state
    preparation enter quadratically and have a two-term rule of their own.

    Args:
        backend: Where the circuit runs.
        circuit: The kernel.
        shots: As of Backend.compile; the gradient is then estimated from shots too.
        noise: As of Backend.compile.
        seed: As of Backend.compile.

    Source: Schuld, Bergholm, Gogolin, Izaac & Killoran, Phys. Rev. A 99, 032331 (2019); Wierichs et al.
        (arXiv:2107.12390) for gates with several frequencies.
    """

    differentiable = True

    def __init__(
        self, backend: Backend, circuit: Circuit, *, shots: int | None, noise: NoiseModel | None, seed: int | None
    ) -> None:
        self.circuit = circuit
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        self._rules = [
            shift_rule(frequencies)
            for gate in circuit.gates
            if gate.name != AMPLITUDE
            for frequencies in gate.spec.frequencies
        ]
        self._compiled = backend.compile(with_free_angles(circuit), shots=shots, noise=noise, seed=seed)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                "this backend has no autograd, and parameter shifts do not run inside torch.func transforms: use "
                "backend 'fourier' or 'statevector' there"
            )
        moving = {"input": inputs.requires_grad, "weight": weights.requires_grad, "const": False}
        angles = evaluate_angles(self._angles, inputs, weights)
        features = evaluate_angles(self._features, inputs, weights)
        active = tuple(k for k, angle in enumerate(self._angles) if moving[angle.source])
        values: Tensor = _Shift.apply(angles, features, self._compiled, self._rules, active)  # type: ignore[no-untyped-call]
        return values.reshape(len(inputs), len(weights), values.shape[1])

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: an evaluation without gradients."""
        return self._compiled.counts(patches * filters, 1)

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """Circuit evaluations of one forward and backward pass.

        Args:
            patches: Number of patches.
            filters: Number of filters.
            inputs: Whether the gradient with respect to the features is wanted too.
        """
        sources = ("input", "weight") if inputs else ("weight",)
        terms = sum(len(r) for r, a in zip(self._rules, self._angles, strict=True) if a.source in sources)
        return patches * filters * (1 + terms + (2 * len(self._features) if inputs else 0))


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, angles: Tensor, features: Tensor, compiled: Compiled, rules: list[Any], active: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(angles, features)
        ctx.compiled, ctx.rules, ctx.active = compiled, rules, active
        return _run(compiled, angles, features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        angles, features = ctx.saved_tensors
        grad_angles = torch.zeros_like(angles)
        # Each shifted copy of all rows is one block of a few large calls.
        terms = [(k, c, shift) for k in ctx.active for c, shift in ctx.rules[k]]
        a_call = max(1, ROWS_A_CALL // max(1, len(angles)))
        for start in range(0, len(terms), a_call):
            block = terms[start : start + a_call]
            shifted = angles.repeat(len(block), 1, 1)
            for copy, (k, _, shift) in zip(shifted, block, strict=True):
                copy[:, k] += shift
            values = _run(ctx.compiled, shifted.flatten(0, 1), features.repeat(len(block), 1))
            for value, (k, c, _) in zip(values.reshape(len(block), len(angles), -1), block, strict=True):
                grad_angles[:, k] += c * (grad * value).sum(-1)
        grad_features = _feature_gradient(ctx.compiled, angles, features, grad) if ctx.needs_input_grad[1] else None
        return grad_angles, grad_features, None, None, None


def _run(compiled: Compiled, angles: Tensor, features: Tensor) -> Tensor:
    rows = torch.cat([angles, features], dim=1)
    with torch.no_grad():
        return compiled(rows, rows.new_zeros(1, 0))[:, 0]


def _feature_gradient(compiled: Compiled, angles: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to the features of an amplitude encoding.

    f(x) = N(x) / |x|^2 with N quadratic in x, so a central difference of N with any step is exact; the step is the norm
    of x, which keeps the shots' noise in proportion.
    """
    result = torch.zeros_like(features)
    # f does not change with the length of x: in units of the largest feature the squares stay in range.
    largest = features.abs().amax(1, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    features = features / unit
    square = features.square().sum(1, keepdim=True)
    step = square.sqrt()
    value = _run(compiled, angles, features)
    for k in range(features.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = features.clone()
            moved[:, k] += sign * step[:, 0]
            ends.append(_run(compiled, angles, moved) * moved.square().sum(1, keepdim=True))
        slope = ((ends[0] - ends[1]) / (2 * step) - 2 * value * features[:, k, None]) / square
        # A patch of zeros alone stays |0...0> by convention, with gradient 0.
        result[:, k] = torch.where(square[:, 0] > 0, (grad * slope).sum(1), 0.0)
    return result / unit


def compile_differentiable(
    backend: Backend,
    circuit: Circuit,
    *,
    shots: int | None = None,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> Compiled:
    """Compile a circuit so that gradients flow on any backend: by autograd where it can, else by parameter shifts.

    Raises:
        Unsupported: If the backend cannot run the circuit.
    """
    compiled = backend.compile(circuit, shots=shots, noise=noise, seed=seed)
    if compiled.differentiable:
        return compiled
    return ParameterShift(backend, circuit, shots=shots, noise=noise, seed=seed)
