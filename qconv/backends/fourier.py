"""Exact emulation without states: a product-encoded kernel as a trigonometric polynomial with 3^n coefficients.

In the Heisenberg picture U^+ O U is expanded in Pauli strings, <O> = sum_P c_P(theta) prod_j b_{P_j}(x_j), where b is
the Bloch vector (1, X, Y, Z) of one wire after its encoding. The coefficients c depend on the weights alone and are
built once a call, in real arithmetic: every gate, and every noise channel, is a real matrix on the Pauli digits of one
or two wires (its Pauli transfer matrix). What is left for each patch is a real contraction (see contraction.py).

Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021) for the Fourier picture; Wood, Biamonte & Cory
(arXiv:1111.6950) for transfer matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Angle, Circuit
from circuits.noise import NoiseModel
from qconv.backends import fused, operators
from qconv.backends.angles import features_of
from qconv.backends.contraction import contract, polynomial_counts, scaled
from qconv.backends.costs import Call, Work
from qconv.backends.kept import Kept
from qconv.backends.outcomes import FromStrings, Setting
from qconv.backends.pauli_ops import Numbers, PauliOp, Real, split_encoding
from qconv.backends.protocol import Plain, Unsupported, check_call, check_options, device_counts, measurement_settings
from qconv.backends.sampling import SampledCompiled, check_gradient, free_angles
from qconv.patches import Geometry

if TYPE_CHECKING:
    from qconv.backends.quadratic import QuadraticCompiled
    from qconv.backends.tensor_train import TrainCompiled

MAX_WIRES = 10  # 4^10 coefficients an observable: 4 MB in float32
MAX_COEFFICIENTS = 2**26  # of all observables while they are built: 256 MB in float32, several times over
# From here on a tensor train of the coefficients, where the circuit has a short one, is cheaper than all 3^n.
TRAIN_FROM = 8


def constant(array: Numbers, like: Tensor) -> Tensor:
    """A constant as a tensor of another one's precision, on its device."""
    tensor = torch.from_numpy(array)
    dtype = torch.promote_types(like.dtype, torch.complex64) if tensor.is_complex() else like.dtype
    return tensor.to(like.device, dtype)


@dataclass
class _Group:
    """Consecutive operations on the same one or two wires, multiplied together before they meet the coefficients."""

    wires: tuple[int, ...]
    ops: list[PauliOp] = field(default_factory=list)


def fuse(ops: list[PauliOp]) -> list[_Group]:
    """Gather operations into few groups on at most two wires, keeping the order on every wire."""
    groups: list[_Group] = []
    last: dict[int, _Group] = {}
    for op in ops:
        current = {id(last[wire]): last[wire] for wire in op.wires if wire in last}
        fitting = [group for group in current.values() if set(op.wires) <= set(group.wires)]
        if fitting and len(current) == 1:
            fitting[0].ops.append(op)
            continue
        group = _Group(op.wires)
        for wire in op.wires:
            # A one-wire group is still alone on its wire, so it can move up into this one.
            if wire in last and len(last[wire].wires) == 1:
                group.ops += last[wire].ops
                groups = [other for other in groups if other is not last[wire]]
        group.ops.append(op)
        groups.append(group)
        for wire in op.wires:
            last[wire] = group
    return groups


def _embed(op: PauliOp, wires: tuple[int, ...], base: int) -> tuple[Numbers, ...]:
    """Parts of an operation as matrices over the digits of a group's wires."""
    if op.wires == wires:
        return op.parts
    if len(op.wires) == 2:
        swap = np.arange(base**2).reshape(base, base).T.ravel()
        return tuple(part[np.ix_(swap, swap)] for part in op.parts)
    if op.wires[0] == wires[0]:
        return tuple(np.kron(part, np.eye(base)) for part in op.parts)
    return tuple(np.kron(np.eye(base), part) for part in op.parts)


class _Stack:
    """All groups of one width: their product matrices are built together, in few tensor operations."""

    def __init__(self, groups: list[_Group], base: int) -> None:
        length = max(len(group.ops) for group in groups)
        length = 1 << (length - 1).bit_length()
        dim = base ** len(groups[0].wires)
        dtype = np.result_type(*(part for group in groups for op in group.ops for part in op.parts))
        parts = np.zeros((3, len(groups), length, dim, dim), dtype)
        parts[0] = np.eye(dim)
        self.index = np.zeros((len(groups), length), dtype=np.int64)
        self.scale = np.zeros((len(groups), length))
        self.offset = np.zeros((len(groups), length))
        for g, group in enumerate(groups):
            for k, op in enumerate(group.ops):
                parts[:, g, k] = np.stack(_embed(op, group.wires, base))
                if op.angle is not None:
                    self.offset[g, k] = op.angle.offset
                    if op.angle.source == "weight":
                        self.index[g, k], self.scale[g, k] = op.angle.index, op.angle.scale
        self.parts = parts

    def matrices(self, weights: Tensor) -> Tensor:
        """Transfer matrices of all groups: weights (F, n_weights) -> (F, groups, d, d)."""
        if weights.shape[1] == 0:
            weights = weights.new_zeros(len(weights), 1)
        chosen = weights[:, torch.as_tensor(self.index, device=weights.device)]
        angles = chosen * constant(self.scale, weights) + constant(self.offset, weights)
        even, cosine, sine = constant(self.parts, weights)
        angles = angles[..., None, None]
        matrices: Tensor = even + torch.cos(angles) * cosine + torch.sin(angles) * sine
        while matrices.shape[2] > 1:
            # Later operations stand on the left; pairs are multiplied in a tree, so the chain stays short.
            matrices = matrices[:, :, 1::2] @ matrices[:, :, 0::2]
        return matrices[:, :, 0]


class Evolution:
    """Row vectors times the matrices of a block, the last operation first: the Heisenberg picture.

    Args:
        start: (rows, b, ..., b), one digit a wire: b = 4 for Pauli strings, 2 for states.
        block: The operations in order, matrices on those digits.
        digits: For every wire, a matrix (b, D_j) to the features that the wire's encoding has; none to leave all.
    """

    def __init__(self, start: Numbers, block: list[PauliOp], digits: Sequence[Real] = ()) -> None:
        self._groups = fuse(block)
        self._stacks: dict[int, _Stack] = {}
        self._place: list[tuple[int, int]] = []
        by_width: dict[int, list[_Group]] = {}
        for group in self._groups:
            same = by_width.setdefault(len(group.wires), [])
            self._place.append((len(group.wires), len(same)))
            same.append(group)
        self._stacks = {width: _Stack(groups, start.shape[1]) for width, groups in by_width.items()}
        self._start, self._digits = start, digits
        # The earliest group on each wire: once it is through, the wire's digits shrink to its features.
        self._first = {wire: g for g in reversed(range(len(self._groups))) for wire in self._groups[g].wires}

    def multiplications(self, filters: int) -> int:
        """About how many it takes."""
        base = self._start.shape[1]
        return filters * int(self._start.size) * sum(int(base ** len(group.wires)) for group in self._groups)

    def __call__(self, weights: Tensor) -> Tensor:
        """weights (F, n_weights) -> (F, rows, D_0, ..., D_{n-1})."""
        stacks = {width: stack.matrices(weights) for width, stack in self._stacks.items()}
        c = constant(self._start, weights).expand(len(weights), *self._start.shape)
        for wire in range(len(self._digits)):
            if wire not in self._first:
                c = _on_axis(c, wire, constant(self._digits[wire], weights))
        for g in reversed(range(len(self._groups))):
            wires = self._groups[g].wires
            width, index = self._place[g]
            c = _on_wires(c, wires, stacks[width][:, index])
            for wire in wires if self._digits else ():
                if self._first[wire] == g:
                    c = _on_axis(c, wire, constant(self._digits[wire], weights))
        return c


class Coefficients(Evolution):
    """Builds c_P(theta) of every observable from the weights, (F, n_obs, D_0, ..., D_{n-1}); see Evolution."""

    def __init__(self, circuit: Circuit, block: list[PauliOp], digits: Sequence[Real] = ()) -> None:
        start = np.zeros((len(circuit.observables), *(4,) * circuit.n_wires))
        for k, observable in enumerate(circuit.observables):
            start[(k, *("IXYZ".index(letter) for letter in observable))] = 1
        super().__init__(start, block, digits)


def _on_axis(c: Tensor, wire: int, matrix: Tensor) -> Tensor:
    return (c.movedim(2 + wire, -1) @ matrix).movedim(-1, 2 + wire)


def _on_wires(c: Tensor, wires: tuple[int, ...], matrix: Tensor) -> Tensor:
    """Row vectors times a matrix (F, d, d) on the digits of some wires."""
    axes = [2 + wire for wire in wires]
    ends = list(range(-len(wires), 0))
    moved = c.movedim(axes, ends)
    flat = moved.reshape(len(c), -1, matrix.shape[-1]) @ matrix
    return flat.reshape(moved.shape).movedim(ends, axes)


class WireFeatures:
    """Bloch vectors of the encoded wires, one evaluation for all wires that are encoded alike.

    Each wire starts as (1, 0, 0, 1) in the digits (1, X, Y, Z) and its encoding's transfer matrices act on it.
    """

    def __init__(self, encoders: list[list[PauliOp]]) -> None:
        self.encoders = encoders
        rng = np.random.default_rng(0)
        samples = np.stack([self.bloch(ops, rng.uniform(-np.pi, np.pi, (64, len(ops)))) for ops in encoders])
        # A digit that is constant for every feature value (0, or 1 as Z of an unused wire) needs no feature of its own.
        self.constant = np.ptp(samples, axis=1) < 1e-12
        self.active = [np.flatnonzero(~constant) for constant in self.constant]
        self.digits = []
        for wire, constant in enumerate(self.constant):
            to_features = np.zeros((4, 1 + len(self.active[wire])))
            to_features[constant, 0] = samples[wire, 0, constant]
            to_features[self.active[wire], 1 + np.arange(len(self.active[wire]))] = 1
            self.digits.append(to_features)
        alike: dict[tuple[object, ...], list[int]] = {}
        for wire, ops in enumerate(encoders):
            alike.setdefault((tuple(self.active[wire]), *(op.form() for op in ops)), []).append(wire)
        self._alike = list(alike.values())
        self._digits = [active.tolist() for active in self.active]
        # Plain numbers: torch.compile would look into arrays, and stop there.
        self._entries = {wires[0]: [op.entries() for op in encoders[wires[0]]] for wires in self._alike}

    @staticmethod
    def bloch(ops: list[PauliOp], angles: Real) -> Real:
        """Bloch vectors (N, 4) after an encoding's operations; angles (N, ops) are for those that read a feature."""
        vectors = np.tile([1.0, 0, 0, 1], (len(angles), 1))
        for k, op in enumerate(ops):
            even, cosine, sine = op.parts
            a = angles[:, k, None] if op.angle is not None and op.angle.source == "input" else 0 * angles[:, k, None]
            if op.angle is not None and op.angle.source == "const":
                a = a + op.angle.offset
            vectors = vectors @ even.T + np.cos(a) * (vectors @ cosine.T) + np.sin(a) * (vectors @ sine.T)
        return vectors

    @property
    def sizes(self) -> list[int]:
        """Features of every wire, the constant 1 included."""
        return [1 + len(active) for active in self.active]

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """inputs (P, n_inputs) -> for every wire its features (D_j, P), the constant 1 first."""
        columns = inputs.t()
        result: list[Tensor] = [inputs.new_empty(0)] * len(self.encoders)
        for wires in self._alike:
            values = self._evaluate([self.encoders[wire] for wire in wires], self._entries[wires[0]], columns)
            one = inputs.new_ones(()).expand(len(wires), inputs.shape[0])
            chosen = [one, *(values[digit] for digit in self._digits[wires[0]])]
            stacked = torch.stack(chosen, dim=1)
            for wire, features in zip(wires, stacked, strict=True):
                result[wire] = features
        return result

    def _evaluate(
        self, encoders: list[list[PauliOp]], entries: list[list[list[tuple[int, int, float]]]], columns: Tensor
    ) -> dict[int, Tensor]:
        # Components are plain numbers until an angle makes them tensors, so that zeros cost nothing.
        vector: list[Tensor | float] = [1.0, 0.0, 0.0, 1.0]
        for k, (op, rows) in enumerate(zip(encoders[0], entries, strict=True)):
            trigonometry: tuple[Tensor | float, ...] = (1.0, 0.0, 0.0)
            if op.angle is not None:
                angles = self._angles([encoder[k].angle for encoder in encoders], columns)
                trigonometry = (1.0, torch.cos(angles), torch.sin(angles))
            vector = [
                _sum([_times(_times(vector[column], number), trigonometry[part]) for part, column, number in row])
                for row in rows
            ]
        shape = (len(encoders), columns.shape[1])
        return {k: v.expand(shape) for k, v in enumerate(vector) if isinstance(v, Tensor)}

    @staticmethod
    def _angles(angles: list[Angle | None], columns: Tensor) -> Tensor:
        known = [angle for angle in angles if angle is not None]
        offset = constant(np.array([[angle.offset] for angle in known]), columns)
        if known[0].source == "const":
            return offset
        index = [angle.index for angle in known]
        chosen = columns if index == list(range(len(columns))) else columns[index]
        scale = constant(np.array([[angle.scale] for angle in known]), columns)
        return chosen * scale + offset if any(angle.offset for angle in known) else chosen * scale

    def angle_count(self) -> int:
        """Angles with a feature in them: one sine and cosine each a patch."""
        return sum(op.angle is not None and op.angle.source == "input" for ops in self.encoders for op in ops)


def _times(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if isinstance(a, float) and a in (0.0, 1.0):
        return b if a else 0.0
    if isinstance(b, float) and b in (0.0, 1.0):
        return a if b else 0.0
    return a * b


def _sum(terms: list[Tensor | float]) -> Tensor | float:
    total: Tensor | float = 0.0
    for term in terms:
        total = (
            term
            if isinstance(total, float) and total == 0.0
            else total
            if isinstance(term, float) and term == 0.0
            else total + term
        )
    return total


class FourierCompiled:
    """A product-encoded circuit as coefficients and features."""

    differentiable = True

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        self.circuit = circuit
        encoders, self.block = split_encoding(circuit, noise)
        wires, observables = circuit.n_wires, len(circuit.observables)
        if observables * 4**wires > MAX_COEFFICIENTS:
            raise Unsupported(
                f"{observables} observables on {wires} wires have {observables} * 4^{wires} coefficients, more than "
                f"2^{MAX_COEFFICIENTS.bit_length() - 1}: use fewer observables or wires, or "
                + ("backend 'statevector'" if noise is None else "backend 'statevector' (up to 10 wires) or 'qiskit'")
            )
        self.features = WireFeatures(encoders)
        self.coefficients = Coefficients(circuit, self.block, self.features.digits)
        self._kept = Kept(self.coefficients)
        self.fused = fused.register(self, f"{circuit.text()}{noise}")

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        c = self._kept(weights)
        values = contract(c.flatten(0, 1), self.features(inputs))
        return values.reshape(*c.shape[:2], len(inputs)).movedim(-1, 0)

    def convolve(
        self, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
    ) -> Tensor | None:
        """See Convolving."""
        return operators.convolve(self.fused, images, weights, geometry, groups, outs, plain)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled. The coefficients are built once from the weights, not an inference."""
        rows = filters * len(self.circuit.observables)
        a_patch = polynomial_counts(rows, self.features.sizes, self.features.angle_count())
        settings = len(measurement_settings(self.circuit.observables))
        return scaled(a_patch, patches) + device_counts(self.circuit, settings, patches * filters, shots=None)

    def work(self, call: Call) -> Work:
        """See costs.Priced."""
        compiled = self.fused is not None and call.images and call.device == "cpu"
        way = "compiled polynomial" if compiled else "polynomial"
        return Work(way, self.coefficients.multiplications(call.filters), kept=True)

    def stored_numbers(self, filters: int) -> int:
        """Coefficients that inference reads."""
        return filters * len(self.circuit.observables) * prod(self.features.sizes)


class FourierBackend:
    """Kernels as polynomials built from the weights: exact, differentiable, noise at no cost a patch.

    A product encoding makes a trigonometric polynomial. Up to 7 wires all 3^n coefficients are built; beyond, a tensor
    train of them where the circuit is shallow enough for a short one, and all of them up to 10 wires where it is not.
    An amplitude encoding makes a quadratic form, up to 8 wires. Shots are drawn from the probabilities that the
    products of the observables have, 2^n of them for Z of n wires.

    Args:
        gradient: Of values sampled with shots: "parameter-shift", as a device gives it, from shots too; or "exact",
            that of the exact values, which is much cheaper and which no device has.

    Raises:
        ValueError: For an unknown gradient.
    """

    name = "fourier"

    def __init__(self, gradient: str = "parameter-shift") -> None:
        self.gradient = check_gradient(gradient)

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> FourierCompiled | QuadraticCompiled | TrainCompiled | SampledCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if shots is None:
            return self._exact(circuit, noise)
        settings, free = Setting.of(circuit.observables), free_angles(circuit)
        distribution = FromStrings(free, settings, partial(self._exact, noise=noise), self.name)
        exact = self._exact(circuit, noise) if self.gradient == "exact" else None
        return SampledCompiled(circuit, distribution, settings, shots=shots, seed=seed, exact=exact)

    @staticmethod
    def _exact(circuit: Circuit, noise: NoiseModel | None) -> FourierCompiled | QuadraticCompiled | TrainCompiled:
        # What builds on this file, and is needed by few kernels.
        if features_of(circuit):
            from qconv.backends.quadratic import QuadraticCompiled

            return QuadraticCompiled(circuit, noise)
        if circuit.n_wires >= TRAIN_FROM:
            from qconv.backends.tensor_train import TrainCompiled

            try:
                return TrainCompiled(circuit, noise)
            except Unsupported:
                if circuit.n_wires > MAX_WIRES:
                    raise
        return FourierCompiled(circuit, noise)
