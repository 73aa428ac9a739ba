"""A circuit as what the compiled loops over states run: chains of one-wire gates, and tables of amplitudes.

Gates on one wire gather in chains that cost as much as one gate; permutations and signs of amplitudes only relabel what
is stored; every other gate is a product of rotations about Pauli strings, see the gate table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Angle, Circuit, Gate, Source
from circuits.gates import AMPLITUDE, GATES, Matrix
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS

Integers = NDArray[np.int64]

# Columns of a chain: its first gate, and how many; its first wave, how many features turn it, and how many of these,
# the last ones first, have weights before them (-1 without weights); where its numbers and its slopes begin; what it
# does, and to which entries.
FIRST, COUNT, WAVE, FEATURES, REACH, NUMBERS, SLOPES, KIND, ENTRY, PAIRS = range(10)
COLUMNS = 10
# Kinds of gates, with what their numbers are: (scale, offset) of half an angle in units of pi, (a, b), a sign.
WEIGHT, FIXED, FEATURE = 0, 1, 2
# Kinds of operations, see state_lanes: START is a spin on |0> of a wire that no other wire met yet.
START, SPIN, TURN = 0, 1, 2
_Y = 1  # the axis of turns


@dataclass(frozen=True)
class Step:
    """A gate of a chain: a rotation about an axis (X, Y, Z are 0, 1, 2), or fixed.

    Args:
        axis: The axis.
        angle: From a weight or a feature; None for a fixed gate.
        unitary: (Re a, Im a, Re b, Im b) of a fixed gate [[a, -b*], [b, a*]].
    """

    axis: int = 0
    angle: Angle | None = None
    unitary: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)


def _rotation(axis: int, angle: Angle) -> Step:
    if angle.source != "const":
        return Step(axis, angle)
    sine = math.sin(angle.offset / 2)
    z, y, x = (sine if axis == k else 0.0 for k in (2, 1, 0))
    return Step(unitary=(math.cos(angle.offset / 2), -z, y, -x))


def _fixed(matrix: Matrix) -> Step:
    """A one-wire gate without angles, up to its phase."""
    special = matrix / np.sqrt(np.linalg.det(matrix))
    a, b = complex(special[0, 0]), complex(special[1, 0])
    return Step(unitary=(a.real, a.imag, b.real, b.imag))


class Register:
    """Where amplitudes are stored: that of basis state i at place[i], as sign[i] times what stands there.

    Rows 2k and 2k + 1 are the real and the imaginary part of what is stored at k.
    """

    def __init__(self, n_wires: int) -> None:
        self.n_wires = n_wires
        self.place = np.arange(2**n_wires)
        self.sign = np.ones(2**n_wires)

    def relabel(self, gate: Gate) -> None:
        """Apply a gate whose matrix is a permutation with signs."""
        matrix = gate.spec.matrix().real
        index = np.arange(2**self.n_wires).reshape((2,) * self.n_wires)
        grid = np.moveaxis(index, gate.wires, range(len(gate.wires))).reshape(len(matrix), -1)
        source = np.abs(matrix).argmax(axis=1)
        factors = matrix[np.arange(len(matrix)), source, None]
        place, sign = self.place.copy(), self.sign.copy()
        place[grid], sign[grid] = self.place[grid[source]], factors * self.sign[grid[source]]
        self.place, self.sign = place, sign

    def spin(self, wire: int) -> Integers:
        """Rows of all pairs of amplitudes that a gate on one wire mixes: (2^(n-1), 4)."""
        bit = 2 ** (self.n_wires - 1 - wire)
        zero = np.flatnonzero(np.arange(2**self.n_wires) & bit == 0)
        p, q = 2 * self.place[zero], 2 * self.place[zero | bit]
        rows = np.stack([p, p + 1, q, q + 1], axis=1)
        # Where signs differ [[a, b*], [-b, a*]] is meant, which is the same formula on the rows in reverse.
        alike = self.sign[zero] == self.sign[zero | bit]
        return np.where(alike[:, None], rows, rows[:, ::-1])

    def turn(self, pauli: str) -> Integers:
        """Pairs of rows (u, v) that a rotation exp(-i t pauli) turns: u to u cos t + v sin t; (2^n, 2)."""
        return self._gains(pauli, -1j)

    def read(self, pauli: str) -> tuple[Integers, int]:
        """Pairs of rows (u, v), so many first ones with a plus: <pauli> is twice the sum of +-u v, minus 1 if diagonal.

        Of a diagonal one the added squares are enough, since all squares add up to 1.
        """
        added, less = self._gains(pauli, 1), self._gains(pauli, -1)
        added, less = added[added[:, 0] <= added[:, 1]], less[less[:, 0] < less[:, 1]]
        return np.concatenate([added, less]), len(added)

    def _gains(self, pauli: str, factor: complex) -> Integers:
        """Pairs of rows (u, v) where factor * pauli times the state has v in u with a plus."""
        phases = np.full(1, factor, dtype=complex)
        for letter in pauli:
            phases = np.kron(phases, {"I": [1, 1], "X": [1, 1], "Y": [1j, -1j], "Z": [1, -1]}[letter])
        state = np.arange(2**self.n_wires)
        image = state ^ int("".join("01"[letter in "XY"] for letter in pauli), 2)
        phases *= self.sign[state] * self.sign[image]
        v, u = 2 * self.place[state], 2 * self.place[image]
        pairs = [
            np.stack([u + to, v + of], axis=1)[np.abs(phases - phase) < 0.5]
            for phase, to, of in ((1, 0, 0), (1, 1, 1), (1j, 1, 0), (-1j, 0, 1))
        ]
        return np.concatenate(pairs)


@dataclass
class Chain:
    """Gates that act as one.

    Args:
        kind: START, SPIN or TURN.
        table: Rows it acts on: an entry is a pair of amplitudes as 4 rows, or for a TURN a pair of rows.
        steps: The gates.
    """

    kind: int
    table: Integers
    steps: list[Step]

    def angles(self, source: Source) -> list[Angle]:
        """Angles from features or from weights."""
        return [step.angle for step in self.steps if step.angle is not None and step.angle.source == source]


class Program:
    """A circuit in the order in which the loops run it.

    Args:
        circuit: One that `runs`.

    Attributes:
        chains: First every wire's gates before its first entangling one, then all others.
        reads: For every observable its pairs of rows, how many of them are added, and the constant.
        waves: Distinct angles that read features: (feature, scale, offset), of positive scale.
    """

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        register = Register(circuit.n_wires)
        self.chains = [Chain(START, register.spin(wire), []) for wire in range(circuit.n_wires)]
        pending = [chain.steps for chain in self.chains]
        fresh = set(range(circuit.n_wires))

        def settle(wires: Iterable[int]) -> None:
            for wire in wires:
                if wire not in fresh and pending[wire]:
                    self.chains.append(Chain(SPIN, register.spin(wire), pending[wire]))
                fresh.discard(wire)
                pending[wire] = []

        for gate in _spelled_out(circuit):
            if not gate.angles and len(gate.wires) == 1:
                pending[gate.wires[0]].append(_fixed(gate.spec.matrix()))
            elif not gate.angles:
                settle(gate.wires)
                register.relabel(gate)
            for rotation in gate.spec.rotations:
                angle = gate.angles[rotation.angle].times(rotation.factor)
                letters = {w: letter for w, letter in zip(gate.wires, rotation.pauli, strict=True) if letter != "I"}
                if len(letters) == 1:
                    ((wire, letter),) = letters.items()
                    pending[wire].append(_rotation("XYZ".index(letter), angle))
                else:
                    settle(letters)
                    pauli = "".join(letters.get(wire, "I") for wire in range(circuit.n_wires))
                    self.chains.append(Chain(TURN, register.turn(pauli), [_rotation(_Y, angle)]))
        settle(range(circuit.n_wires))
        self.reads = [(*register.read(o), 0 if set(o) & {"X", "Y"} else -1) for o in circuit.observables]
        angles = (angle for chain in self.chains for angle in chain.angles("input"))
        self.waves = list(dict.fromkeys(_wave(angle)[0] for angle in angles))

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """Operations for so many patches and filters; what patches share is built once a call and left out."""
        macs = 8 * (2**self.circuit.n_wires - 1) + sum(len(pairs) + 1 for pairs, _, _ in self.reads)
        for chain in self.chains:
            features = len(chain.angles("input"))
            # The first feature turns numbers that patches share.
            macs += 20 * features - 12 if features else 0
            macs += chain.table.size * chain.table.shape[1] if chain.kind != START else 0
        sincos = len(self.waves) * SINCOS_MULTIPLICATIONS * patches
        macs = macs * patches * filters + len(self.waves) * patches
        return +Counter({"mac:fp32*fp32": macs, "mul:fp32": sincos, "add:fp32": sincos})


class Tables:
    """A program as arrays.

    Args:
        program: The program.

    Attributes:
        waves: (waves, 2): scale and offset of half an angle in units of pi, which is what lanes.sine_cosine takes.
        wave_inputs: Which feature each reads.
        chains: (chains, 10), columns above.
        chain_waves: Waves of all chains, one chain after the other.
        gates: (gates of all chains, 3): kind, axis, and which weight.
        gate_numbers: (gates, 4), see the kinds.
        entries: Rows of all tables, one after the other.
        reads: (observables, 4): first entry, products added, products taken away, constant.
        numbers: Numbers of all chains that patches share: 8, and 3 for each feature.
        slopes: Slopes of all chains: 3, and 3 for each feature.
    """

    def __init__(self, program: Program) -> None:
        waves = np.array(program.waves, dtype=np.float64).reshape(-1, 3)
        self.wave_inputs, self.waves = waves[:, 0].astype(np.int64), waves[:, 1:] / (2 * math.pi)
        self._entries: list[Integers] = []
        self._places: dict[bytes, int] = {}
        self.numbers = self.slopes = 0
        chains: list[tuple[int, ...]] = []
        chain_waves: list[int] = []
        gates: list[tuple[int, int, int]] = []
        gate_numbers: list[tuple[float, float, float, float]] = []
        for chain in program.chains:
            place, reach, features = (len(gates), len(chain.steps), len(chain_waves)), -1, len(chain.angles("input"))
            passed = 0
            for step in chain.steps:
                angle = step.angle
                if angle is None:
                    gate, numbers = (FIXED, 0, 0), step.unitary
                elif angle.source == "weight":
                    half = angle.times(0.5 / math.pi)
                    gate, numbers = (WEIGHT, step.axis, angle.index), (half.scale, half.offset, 0.0, 0.0)
                    reach = max(reach, features - passed)
                else:
                    wave, sign = _wave(angle)
                    gate, numbers = (FEATURE, step.axis, 0), (sign, 0.0, 0.0, 0.0)
                    chain_waves.append(program.waves.index(wave))
                    passed += 1
                gates.append(gate)
                gate_numbers.append(numbers)
            entry = self._place(chain.table)
            chains.append((*place, features, reach, self.numbers, self.slopes, chain.kind, entry, len(chain.table)))
            self.numbers += 8 + 3 * features
            self.slopes += 3 + 3 * features
        reads = [(self._place(pairs), added, len(pairs) - added, constant) for pairs, added, constant in program.reads]
        self.chains, self.chain_waves = np.array(chains), np.array(chain_waves, dtype=np.int64)
        self.gates, self.gate_numbers = np.array(gates, dtype=np.int64), np.array(gate_numbers, dtype=np.float64)
        self.reads, self.entries = np.array(reads), np.concatenate(self._entries)

    def _place(self, table: Integers) -> int:
        # Equal tables are kept once, so that they stay in the caches.
        key = table.tobytes()
        if key not in self._places:
            self._places[key] = sum(map(len, self._entries))
            self._entries.append(table.ravel())
        return self._places[key]


def _wave(angle: Angle) -> tuple[tuple[int, float, float], float]:
    """An angle with positive scale as (feature, scale, offset), and its sign."""
    sign = -1.0 if angle.scale < 0 else 1.0
    return (angle.index, sign * angle.scale, sign * angle.offset), sign


def _spelled_out(circuit: Circuit) -> Iterator[Gate]:
    """The gates; a fixed one on several wires that does more than permute amplitudes and turn signs as its parts."""
    for gate in circuit.gates:
        if _simple(gate):
            yield gate
        else:
            yield from gate.parts()


def _simple(gate: Gate) -> bool:
    return bool(gate.angles) or len(gate.wires) == 1 or _relabels(gate.name)


@cache
def _relabels(name: str) -> bool:
    matrix = GATES[name].matrix()
    return np.array_equal(matrix, matrix.real.round())


def runs(circuit: Circuit) -> bool:
    """Whether there is a program: all gates are rotations, on one wire, or permutations with signs."""
    if any(gate.name == AMPLITUDE for gate in circuit.gates):
        return False
    return all(_simple(gate) for gate in _spelled_out(circuit))
