"""A product-encoded circuit as the arrays that the fused kernel's loops read, and its coefficients.

Clifford gates cost nothing: signed permutations of Pauli strings, they are worked into the tables when the circuit is
read. What is left are rotations, each of which mixes pairs of strings, and noise. Pairs that no observable reaches,
or that no coefficient needs, are left out.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from circuits.gates import pauli_matrix
from qconv.backends.threads import run

if TYPE_CHECKING:
    from qconv.backends.fourier import FourierCompiled
    from qconv.backends.pauli_ops import PauliOp

Real = NDArray[np.float64]
Whole = NDArray[np.int64]

# Coefficients kept: circuits are shared by layers, whose weights all find room unless they are large.
_MOST, _BYTES = 64, 32 * 1024**2


@dataclass(frozen=True)
class WireForm:
    """How the Bloch vector of one wire comes from its features: digits @ (1, sin a, cos a), or with two angles
    digits @ (1, sin a cos b, sin a sin b, cos a).

    Args:
        inputs: The features in a and b.
        waves: (scale, offset) of a and b, in half turns: a = pi (scale x + offset).
        digits: (4, 3) or (4, 4).
    """

    inputs: tuple[int, ...]
    waves: tuple[tuple[float, float], ...]
    digits: Real

    @classmethod
    def of(cls, ops: list[PauliOp]) -> WireForm | None:
        """Read an encoding, or None where more than two angles or other products enter."""
        from qconv.backends.fourier import WireFeatures

        reading = [k for k, op in enumerate(ops) if op.angle is not None and op.angle.source == "input"]
        if not reading:
            constant = WireFeatures.bloch(ops, np.zeros((1, len(ops))))[0]
            return cls((), (), np.outer(constant, [1.0, 0, 0]))
        if len(reading) > 2:
            return None
        samples = np.random.default_rng(0).uniform(-np.pi, np.pi, (64, len(ops)))
        values = WireFeatures.bloch(ops, samples)
        angles = [ops[k].angle for k in reading]
        if len(reading) == 1:
            (k,) = reading
            features = np.stack([np.ones(64), np.sin(samples[:, k]), np.cos(samples[:, k])], axis=1)
            digits = _fitted(features, values)
            angle = angles[0]
            assert digits is not None
            assert angle is not None
            return cls((angle.index,), ((angle.scale / np.pi, angle.offset / np.pi),), digits)
        # The first rotation may start from a pole or from the equator, and either angle may be the polar one.
        for (first, second), shift in product(((0, 1), (1, 0)), (0.0, 0.5)):
            a, b = samples[:, reading[first]] + np.pi * shift, samples[:, reading[second]]
            features = np.stack([np.ones(64), np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)], axis=1)
            digits = _fitted(features, values)
            one, two = angles[first], angles[second]
            if digits is not None and one is not None and two is not None:
                waves = (one.scale / np.pi, one.offset / np.pi + shift), (two.scale / np.pi, two.offset / np.pi)
                return cls((one.index, two.index), waves, digits)
        return None

    def padded(self, angles: int, feature: int) -> WireForm:
        """The same with so many angles, those it lacks at 0 and reading any feature that is read anyway."""
        missing = angles - len(self.inputs)
        digits = self.digits
        if angles == 2 and digits.shape[1] == 3:
            digits = digits[:, [0, 1, 1, 2]] * [1, 1, 0, 1]
        own = (*self.inputs, *self.inputs[:1] * missing) if self.inputs else (feature,) * angles
        return WireForm(own, (*self.waves, *((0.0, 0.0),) * missing), digits)


def _fitted(features: Real, values: Real) -> Real | None:
    digits: Real = np.asarray(np.linalg.lstsq(features, values, rcond=None)[0].T, dtype=np.float64)
    if np.abs(features @ digits.T - values).max() > 1e-10:
        return None
    digits[np.abs(digits) < 1e-12] = 0
    return digits


def wire_forms(compiled: FourierCompiled) -> list[WireForm] | None:
    """The forms of all wires, with equally many angles each, or None where the fused kernel does not apply."""
    found = [WireForm.of(ops) for ops in compiled.features.encoders]
    forms = [form for form in found if form is not None]
    if len(forms) < len(found) or not any(form.inputs for form in forms):
        return None
    angles = max(len(form.inputs) for form in forms)
    feature = next(form.inputs[0] for form in forms if form.inputs)
    return [form.padded(angles, feature) for form in forms]


@dataclass
class _Op:
    """One operation on physical strings, in the order of evolution (last gate first).

    Args:
        rotation: Whether it is one; else new[target] = sum factor old[source].
        entries: (E, 2): the two strings of a pair, or (target, source).
        factors: (E,): the pair's sign, or the factor.
        angle: (weight or -1, scale, offset).
    """

    rotation: bool
    entries: Whole
    factors: Real
    angle: tuple[int, float, float] = (-1, 0.0, 0.0)


class Matrices(NamedTuple):
    """Coefficients of a program at some weights.

    Args:
        values: (groups, outs, numbers).
        address: Where they lie.
        final: (F * 4^n * observables,), the evolved observables; in the same memory as values, and before kept.
        kept: Where (F, operations, 4^n, observables) lie, what the backward pass cannot undo.
    """

    values: NDArray[Any]
    address: int
    final: NDArray[Any]
    kept: int


class Program:
    """A circuit as arrays for the loops.

    Args:
        compiled: A product-encoded circuit.
        forms: Its wires' encodings.
    """

    def __init__(self, compiled: FourierCompiled, forms: list[WireForm]) -> None:
        circuit = compiled.circuit
        self.wires, self.n_weights, self.observables = circuit.n_wires, circuit.n_weights, len(circuit.observables)
        self.angles = len(forms[0].inputs)
        self.inputs = tuple(feature for form in forms for feature in form.inputs)
        self.waves = np.array([wave for form in forms for wave in form.waves])
        self.numbers = (2 + self.angles) ** self.wires
        size = 4**self.wires
        first = [_index(observable) for observable in circuit.observables]
        ops, strings, signs = _physical(compiled.block, self.wires)
        # Coefficient k of an evolved observable: the sum over Pauli strings of the products of the wires' digits.
        projection: Real = np.eye(1)
        for form in forms:
            projection = np.asarray(np.kron(projection, form.digits), dtype=np.float64)
        logical, number = np.nonzero(np.abs(projection) > 1e-14)
        reads = np.stack([number, strings[logical]], axis=1)
        read_factors = projection[logical, number] * signs[logical]
        ops = _pruned(ops, size, first, set(reads[:, 1].tolist()))
        self._first = first
        self._steps, self._angles, self._entries, self._factors = _flattened(ops)
        self._kept = sum(not op.rotation for op in ops)
        order = np.argsort(reads[:, 0], kind="stable")
        self._reads, self._read_factors = np.ascontiguousarray(reads[order]), np.ascontiguousarray(read_factors[order])
        self._size = size
        self._template = lru_cache(maxsize=32)(self._new_template)
        self._caches: OrderedDict[tuple[Any, ...], Matrices] = OrderedDict()
        self._lock = threading.Lock()

    def matrices(self, weights: NDArray[Any], groups: int, outs: int) -> Matrices:
        """The coefficients, cached by value.

        The cache compares the numbers themselves: no way of changing weights in place can make it stale.
        """
        # The shape too: a circuit without weights has equal bytes for any number of filters.
        key = (weights.tobytes(), weights.shape, weights.dtype, groups, outs)
        with self._lock:
            found = self._caches.get(key)
            if found is not None:
                self._caches.move_to_end(key)
                return found
        from qconv.backends import coefficient_loops as loops

        template, start = self._template(weights.dtype, len(weights), groups, outs)
        data = type(template).from_buffer_copy(template)
        # One piece of memory: asking numpy for an address takes a microsecond, and a small layer takes twenty.
        numbers, length = groups * outs * self.numbers, len(weights) * start.size
        memory = np.empty(numbers + (1 + self._kept) * length, weights.dtype)
        address = memory.ctypes.data
        data[loops.WEIGHTS], data[loops.MATRICES] = weights.ctypes.data, address
        data[loops.FINAL] = address + weights.itemsize * numbers
        data[loops.KEPT] = data[loops.FINAL] + weights.itemsize * length
        run(loops.forward_task(weights.itemsize * 8), data, len(weights))
        values = memory[:numbers].reshape(groups, outs, self.numbers)
        result = Matrices(values, address, memory[numbers : numbers + length], data[loops.KEPT])
        with self._lock:
            self._caches[key] = result
            most = max(1, min(_MOST, _BYTES // memory.nbytes))
            while len(self._caches) > most:
                self._caches.popitem(last=False)
        return result

    def weight_gradient(self, grads: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
        """Gradient (F, n_weights) from those of the coefficients, (copies, groups, outs, numbers) to be added up."""
        from qconv.backends import coefficient_loops as loops

        found = self.matrices(weights, grads.shape[1], grads.shape[2])
        template, _ = self._template(weights.dtype, len(weights), grads.shape[1], grads.shape[2])
        data = type(template).from_buffer_copy(template)
        result, final = np.empty(weights.shape, weights.dtype), found.final.copy()
        data[loops.WEIGHTS], data[loops.GRADIENT] = weights.ctypes.data, result.ctypes.data
        data[loops.MATRICES], data[loops.COPIES], data[loops.COPY] = grads.ctypes.data, len(grads), grads[0].size
        data[loops.FINAL], data[loops.KEPT] = final.ctypes.data, found.kept
        data[loops.ROOM] = loops.room(final.size // len(weights), weights.itemsize * 8)
        run(loops.backward_task(weights.itemsize * 8), data, len(weights))
        return result

    def _new_template(
        self, dtype: Any, filters: int, groups: int, outs: int
    ) -> tuple[ctypes.Array[ctypes.c_int64], NDArray[Any]]:
        """What the loops are told that does not change from call to call, and the observables they start from."""
        from qconv.backends import coefficient_loops as loops

        start = np.zeros((self._size, -(-self.observables // loops.LANES) * loops.LANES), dtype)
        start[self._first, np.arange(self.observables)] = 1
        data = np.zeros(loops.LENGTH, dtype=np.int64)
        data[loops.PARTS], data[loops.N_WEIGHTS], data[loops.OPS] = filters, self.n_weights, len(self._steps)
        data[loops.SIZE], data[loops.CHUNKS] = self._size, start.shape[1] // loops.LANES
        data[loops.N_KEPT], data[loops.READS], data[loops.NUMBERS] = self._kept, len(self._reads), self.numbers
        data[loops.OBSERVABLES], data[loops.OUTS], data[loops.PER_GROUP] = self.observables, outs, filters // groups
        for place, array in (
            (loops.STEPS, self._steps),
            (loops.ANGLES, self._angles),
            (loops.PLACES, self._entries),
            (loops.FACTORS, self._factors),
            (loops.START, start),
            (loops.READ, self._reads),
            (loops.READ_FACTORS, self._read_factors),
        ):
            data[place] = array.ctypes.data
        return (ctypes.c_int64 * len(data))(*data.tolist()), start


def _index(pauli: str) -> int:
    index = 0
    for letter in pauli:
        index = 4 * index + "IXYZ".index(letter)
    return index


def _physical(block: list[PauliOp], wires: int) -> tuple[list[_Op], Whole, Real]:
    """The operations, and where each string ends up after them: its place and sign.

    A signed permutation moves no numbers: what is called a string from then on lies where another one was.
    """
    place, sign = np.arange(4**wires), np.ones(4**wires)
    ops: list[_Op] = []
    for op in reversed(block):
        if op.pauli is not None and op.angle is not None:
            text = "".join(dict(zip(op.wires, op.pauli, strict=True)).get(wire, "I") for wire in range(wires))
            pairs, signs = _rotation_table(text)
            angle = (op.angle.index if op.angle.source == "weight" else -1, op.angle.scale, op.angle.offset)
            ops.append(_Op(True, place[pairs], signs * sign[pairs].prod(axis=1), angle))
            continue
        matrix = op.parts[0]
        targets, sources, factors = _digit_table(matrix, op.wires, wires)
        single = np.round(np.abs(matrix))
        if np.allclose(np.abs(matrix), single) and (single.sum(0) == 1).all() and (single.sum(1) == 1).all():
            place[targets], sign[targets] = place[sources].copy(), factors * sign[sources]
            continue
        entries = np.stack([place[targets], place[sources]], axis=1)
        factors = factors * sign[targets] * sign[sources]
        diagonal = bool((entries[:, 0] == entries[:, 1]).all())
        if diagonal and ops and not ops[-1].rotation and (ops[-1].entries[:, 0] == ops[-1].entries[:, 1]).all():
            # Pauli channels that meet no rotation in between become one.
            total = np.zeros(4**wires)
            total[ops[-1].entries[:, 0]] = ops[-1].factors
            ops[-1] = _Op(False, entries, factors * total[entries[:, 0]])
        else:
            ops.append(_Op(False, entries, factors))
    return ops, place, sign


def _pruned(ops: list[_Op], size: int, first: list[int], needed: set[int]) -> list[_Op]:
    """The operations without entries that are zero for every observable, or that nothing reads in the end."""
    alive = np.zeros(size, dtype=bool)
    alive[first] = True
    reached = []
    for op in ops:
        if op.rotation:
            kept = alive[op.entries].any(axis=1)
            alive[op.entries[kept]] = True
        else:
            kept = alive[op.entries[:, 1]]
            alive = np.zeros(size, dtype=bool)
            alive[op.entries[kept, 0]] = True
        reached.append(_Op(op.rotation, op.entries[kept], op.factors[kept], op.angle))
    wanted = np.zeros(size, dtype=bool)
    wanted[list(needed)] = True
    result = []
    for op in reversed(reached):
        if op.rotation:
            kept = wanted[op.entries].any(axis=1)
            wanted[op.entries[kept]] = True
        else:
            kept = wanted[op.entries[:, 0]]
            wanted = np.zeros(size, dtype=bool)
            wanted[op.entries[kept, 1]] = True
        result.append(_Op(op.rotation, op.entries[kept], op.factors[kept], op.angle))
    return result[::-1]


def _flattened(ops: list[_Op]) -> tuple[Whole, Real, Whole, Real]:
    """(steps (ops, 4), angles (ops, 2) in units of pi, entries (E, 2), factors (E,)), see coefficient_loops."""
    bounds = np.cumsum([0, *(len(op.entries) for op in ops)])
    steps = [[int(not op.rotation), op.angle[0], bounds[k], bounds[k + 1]] for k, op in enumerate(ops)]
    return (
        np.array(steps, dtype=np.int64).reshape(-1, 4),
        np.array([op.angle[1:] for op in ops], dtype=np.float64).reshape(-1, 2) / np.pi,
        np.concatenate([np.zeros((0, 2), dtype=np.int64), *(op.entries for op in ops)]),
        np.concatenate([np.zeros(0), *(op.factors for op in ops)]),
    )


@cache
def _product_table() -> tuple[Any, Any]:
    """(digit of A B, phase of A B) for one-wire Paulis."""
    digit, phase = np.zeros((4, 4), dtype=np.int64), np.zeros((4, 4), dtype=complex)
    for a, first in enumerate("IXYZ"):
        for b, second in enumerate("IXYZ"):
            product = pauli_matrix(first) @ pauli_matrix(second)
            for c, third in enumerate("IXYZ"):
                overlap = np.trace(pauli_matrix(third) @ product) / 2
                if abs(overlap) > 0.5:
                    digit[a, b], phase[a, b] = c, overlap
    return digit, phase


def _strings(wires: int) -> Whole:
    """Digits of every string: (4^n, wires)."""
    return np.stack(np.unravel_index(np.arange(4**wires), (4,) * wires), axis=1)


@cache
def _rotation_table(pauli: str) -> tuple[Whole, Real]:
    """Pairs (Q, Q') with i P Q = sign Q', each once, and the signs: a rotation about P mixes just these."""
    digit, phase = _product_table()
    n = len(pauli)
    letters = np.array(["IXYZ".index(letter) for letter in pauli])
    partner = digit[letters, _strings(n)] @ (4 ** np.arange(n)[::-1])
    factor = 1j * phase[letters, _strings(n)].prod(axis=1)
    first = np.flatnonzero((np.abs(factor.imag) < 0.5) & (np.arange(4**n) < partner))
    return np.stack([first, partner[first]], axis=1), factor.real[first]


def _digit_table(matrix: Real, wires: tuple[int, ...], n: int) -> tuple[Whole, Whole, Real]:
    """(targets, sources, factors) of new[target] = sum factor old[source] for a row vector times a matrix."""
    powers = 4 ** np.arange(n)[::-1]
    local = _strings(n)[:, list(wires)] @ (4 ** np.arange(len(wires))[::-1])
    base = np.arange(4**n) - _strings(n)[:, list(wires)] @ powers[list(wires)]
    offsets = _strings(len(wires)) @ powers[list(wires)]
    targets, sources, factors = [], [], []
    for i, j in zip(*np.nonzero(np.abs(matrix) > 1e-14), strict=True):
        source = np.flatnonzero(local == i)
        targets.append(base[source] + offsets[j])
        sources.append(source)
        factors.append(np.full(len(source), matrix[i, j]))
    return np.concatenate(targets), np.concatenate(sources), np.concatenate(factors)
