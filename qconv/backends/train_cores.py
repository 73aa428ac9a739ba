"""The cores of tensor trains: Pauli strings pulled back through a circuit, compressed without approximation.

A gate on one wire acts on one core; a gate on two wires is a short sum of products (its operator Schmidt form), so each
of its halves acts on one core and adds a leg to the bonds between. Legs are compressed by constant matrices found once,
when the circuit is compiled: orthonormal bases of all that a bond can carry for any weights, seen from its left and
from its right. Hence every core is a polynomial in sines and cosines of the weights: exact, and differentiable
everywhere. A decomposition at each call would be neither where weights are zero and ranks drop.

Source: Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011) for tensor trains; Schollwoeck, Annals of Physics 326, 96 (2011)
for matrix product operators applied to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Angle
from qconv.backends.fourier import PauliOp, Real
from qconv.backends.protocol import Unsupported

MAX_RANK = 64
_FORMAL = 32  # a bond wider than this is compressed before it gets another leg
SAMPLES = 64  # random weights whose trains span what a bond can carry
_TOLERANCE = 1e-10  # relative: singular values below it are rounding errors of zeros


@dataclass(frozen=True)
class Step:
    """What an operation does to one core.

    Args:
        parts: (1 or 3, digit in, left leg, right leg, digit out): constant, or parts with 1, cos and sin of the angle.
        angle: The weight's angle, None for a constant.
    """

    parts: Real
    angle: Angle | None = None

    @property
    def legs(self) -> tuple[int, int]:
        """Sizes of the left and the right leg."""
        return self.parts.shape[2], self.parts.shape[3]

    def key(self) -> tuple[object, ...]:
        """Equal for equal steps."""
        return self.parts.tobytes(), self.parts.shape, self.angle

    def then(self, later: Step) -> Step:
        """Two constants as one."""
        left, right = (a * b for a, b in zip(self.legs, later.legs, strict=True))
        parts = np.einsum("dlre,eLRf->dlLrRf", self.parts[0], later.parts[0], optimize=True)
        return Step(parts.reshape(1, 4, left, right, 4))


@dataclass(frozen=True)
class Gauge:
    """Compression of a core's bonds: (bond, fewer) on each side, None where nothing changes."""

    left: Real | None
    right: Real | None

    def key(self) -> tuple[object, ...]:
        """Equal for equal steps."""
        return tuple(None if side is None else (side.tobytes(), side.shape) for side in (self.left, self.right))


def _basis(vectors: Real, rng: np.random.Generator) -> Real:
    """Orthonormal basis (D, rank) of the rows of (N, D); at least one column."""
    n, dim = vectors.shape
    if n > dim + 8:
        # Random mixtures of many vectors span the same space.
        vectors = rng.normal(size=(dim + 8, n)) @ vectors
    _, values, rows = np.linalg.svd(vectors, full_matrices=False)
    result: Real = rows[: max(1, int((values > _TOLERANCE * values[0]).sum()))].T.copy()
    return result


def from_left(before: Real, cores: Real, rng: np.random.Generator) -> Real:
    """Basis of a bond seen from the left: (L, l), (samples, L, R, d) -> (R, r)."""
    seen = np.moveaxis(np.tensordot(before, cores, axes=(0, 1)), 2, -1)  # (l, samples, d, R)
    size = cores.shape[2]
    basis = _basis(seen[:, :-2].reshape(-1, size), rng)
    fresh = seen[:, -2:].reshape(-1, size)
    if np.abs(fresh - fresh @ basis @ basis.T).max() > 1e-9 * np.abs(fresh).max():
        return np.eye(size)  # too few samples to span the space: all of the bond is always right
    return basis


def from_right(after: Real, cores: Real, rng: np.random.Generator) -> Real:
    """Basis of a bond seen from the right: (R, r), (N, L, R, d) -> (L, l)."""
    return from_left(after, cores.swapaxes(1, 2), rng)


def meet(left: Real, right: Real) -> Real:
    """The part of the left basis that the right one can see: (D, l), (D, r) -> (D, rank)."""
    vectors, values, _ = np.linalg.svd(left.T @ right, full_matrices=False)
    result: Real = left @ vectors[:, : max(1, int((values > _TOLERANCE).sum()))]
    return result


def _thinned(cores: Real) -> Real:
    """No more samples than needed: the more alike a core's bonds (samples, L, R, 4), the more vectors one gives."""
    small, large = sorted(cores.shape[1:3])
    return cores[: 16 + 4 * large // small] if small >= 8 else cores


def _trigonometry(angle: Angle, weights: Real) -> Real:
    turns = angle.scale * weights[:, angle.index] + angle.offset
    return np.stack([np.ones_like(turns), np.cos(turns), np.sin(turns)], axis=-1)


class Operator:
    """One observable on its way through the block: its steps on every core, and the cores for random weights."""

    def __init__(self, observable: str, weights: Real, rng: np.random.Generator) -> None:
        n = len(observable)
        self.letters = ["IXYZ".index(letter) for letter in observable]
        self.factor = 1.0
        self.steps: list[list[Step | Gauge]] = [[] for _ in range(n)]
        self._moved = [False] * n
        self._cores: list[Real] | None = None
        self._legs = [1] * (n + 1)  # of each bond, 0 being the edge, since its last compression
        self._weights, self._rng = weights, rng
        self._const_right: dict[tuple[int, int], bool] = {}

    @property
    def cores(self) -> list[Real]:
        """(samples, L, R, 4) of every wire."""
        if self._cores is None:
            self._cores = [np.tile(np.eye(4)[letter], (len(self._weights), 1, 1, 1)) for letter in self.letters]
        return self._cores

    def apply(self, op: PauliOp) -> None:
        """Pull the operator back through one operation."""
        angle, parts = op.angle, np.stack(op.parts)
        if angle is None or angle.source == "const":
            turn = 0.0 if angle is None else angle.offset
            parts = (parts[0] + (0 if angle is None else np.cos(turn) * parts[1] + np.sin(turn) * parts[2]))[None]
            angle = None
        parts = np.where(np.abs(parts) < 1e-14, 0, parts)
        if not any(self._moved[wire] for wire in op.wires) and self._stays_a_string(op.wires, parts):
            return
        if len(op.wires) == 1:
            self._add(op.wires[0], Step(parts[:, :, None, None, :], angle))
        else:
            self._couple(op.wires, parts, angle)
        for wire in op.wires:
            self._moved[wire] = True

    def _stays_a_string(self, wires: tuple[int, ...], parts: Real) -> bool:
        """Clifford gates, Pauli channels and all that acts outside the light cone only change the Pauli string."""
        row = 0
        for wire in wires:
            row = 4 * row + self.letters[wire]
        if np.count_nonzero(parts[1:, row]) or np.count_nonzero(parts[0, row]) != 1:
            return False
        column = int(np.flatnonzero(parts[0, row])[0])
        self.factor *= float(parts[0, row, column])
        for wire in reversed(wires):
            column, letter = divmod(column, 4)
            if self._cores is not None and letter != self.letters[wire]:
                # Nothing but legs that pass has been here: they do not ask for the letter.
                core = self._cores[wire]
                self._cores[wire] = core[..., self.letters[wire], None] * np.eye(4)[letter]
            self.letters[wire] = letter
        return True

    def _couple(self, wires: tuple[int, ...], parts: Real, angle: Angle | None) -> None:
        a, b = wires
        grid = parts.reshape(-1, 4, 4, 4, 4)
        if a > b:
            a, b, grid = b, a, grid.transpose(0, 2, 1, 4, 3)
        # The half with the angle goes to the wire that carries more: a wire that still has one letter then adds at most
        # its four digits to the bond, whatever the angles. Gates that follow each other on a pair go the same way.
        lone = [not self._moved[wire] for wire in (a, b)]
        const_right = lone[1] if lone[0] != lone[1] else self._const_right.get((a, b), False)
        self._const_right = {p: side for p, side in self._const_right.items() if not {a, b} & set(p)}
        self._const_right[a, b] = const_right
        grid = grid.transpose(0, 2, 4, 1, 3) if const_right else grid.transpose(0, 1, 3, 2, 4)
        pairs = grid.reshape(len(grid), 16, 16).swapaxes(0, 1).reshape(16, -1)
        vectors, values, _ = np.linalg.svd(pairs, full_matrices=False)
        rank = int((values > 1e-12 * values[0]).sum())
        fixed = vectors[:, :rank].T
        turning = (fixed @ pairs).reshape(rank, -1, 4, 4).transpose(1, 2, 0, 3)  # (parts, in, leg, out)
        still = fixed.reshape(1, rank, 4, 4).transpose(0, 2, 1, 3)
        between = range(a + 1, b + 1)
        if any(self._legs[cut] > 1 and self.cores[cut].shape[1] * rank > _FORMAL for cut in between):
            self.compress()
        left, right = (turning, still) if const_right else (still, turning)
        self._add(a, Step(left[:, :, None], angle if const_right else None))
        self._add(b, Step(right[:, :, :, None], None if const_right else angle))
        through = np.eye(4)[:, None, None, :] * np.eye(rank)[None, :, :, None]
        for wire in between[:-1]:
            self._add(wire, Step(through[None]), moves=False)
        for cut in between:
            self._legs[cut] *= rank

    def _add(self, wire: int, step: Step, moves: bool = True) -> None:
        steps, core = self.steps[wire], self.cores[wire]
        parts = step.parts
        if step.angle is None:
            new = np.einsum("nLRd,dlre->nLlRre", core, parts[0], optimize=True)
        else:
            turn = _trigonometry(step.angle, self._weights[: len(core)])
            new = np.einsum("nLRd,ndlre->nLlRre", core, np.tensordot(turn, parts, axes=1), optimize=True)
        self.cores[wire] = _thinned(new.reshape(len(core), new.shape[1] * new.shape[2], new.shape[3] * new.shape[4], 4))
        if step.angle is None:
            # Constants are multiplied together; legs that only pass commute with rotations of the digit before them.
            place = len(steps)
            while not moves and place and isinstance(steps[place - 1], Step):
                before = steps[place - 1]
                if before.angle is None or before.legs != (1, 1):  # type: ignore[union-attr]
                    break
                place -= 1
            last = steps[place - 1] if place else None
            if isinstance(last, Step) and last.angle is None:
                steps[place - 1] = last.then(step)
            else:
                steps.insert(place, step)
        else:
            steps.append(step)

    def compress(self) -> None:
        """Reduce every bond that has got legs to what both sides can fill, for any weights."""
        n, cores, rng = len(self.letters), self.cores, self._rng
        # Other bonds are full: compressed before, and later gates on one side of them are invertible.
        left = [np.eye(1)]
        for cut in range(1, n + 1):
            size = cores[cut].shape[1] if cut < n else 1
            left.append(from_left(left[-1], cores[cut - 1], rng) if self._legs[cut] > 1 else np.eye(size))
        right = [np.eye(1)]
        for cut in range(n - 1, -1, -1):
            size = cores[cut].shape[1]
            right.insert(0, from_right(right[0], cores[cut], rng) if self._legs[cut] > 1 else np.eye(size))
        gauges = [meet(a, b) if legs > 1 else None for a, b, legs in zip(left, right, self._legs, strict=True)]
        widest = max((gauge.shape[1] for gauge in gauges if gauge is not None), default=1)
        check_rank(widest, n)
        for wire in range(n):
            gauge = Gauge(gauges[wire], gauges[wire + 1])
            if gauge.left is not None:
                cores[wire] = np.einsum("nLRd,Ll->nlRd", cores[wire], gauge.left, optimize=True)
            if gauge.right is not None:
                cores[wire] = np.einsum("nLRd,Rr->nLrd", cores[wire], gauge.right, optimize=True)
            cores[wire] = _thinned(cores[wire])
            if gauge.left is not None or gauge.right is not None:
                self.steps[wire].append(gauge)
        self._legs = [1] * (n + 1)


def check_rank(rank: int, wires: int) -> None:
    """Raise Unsupported if a bond is too wide."""
    if rank > MAX_RANK:
        others = "use backend 'fourier' with all coefficients, or 'statevector'" if wires <= 10 else "use 'statevector'"
        raise Unsupported(
            f"a tensor train of this kernel's coefficients on {wires} wires has rank {rank} but up to {MAX_RANK} is "
            f"taken: use fewer layers, or {others}"
        )


class Constants:
    """Constant arrays, and the same as tensors of the dtype and device of what they meet, converted once."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []
        self._tensors: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def keep(self, array: NDArray[Any]) -> int:
        """Store an array; the number it is asked for by."""
        self._arrays.append(array)
        return len(self._arrays) - 1

    def __call__(self, number: int, like: Tensor) -> Tensor:
        """Array `number`; one of whole numbers (an index) stays so."""
        tensors = self._tensors.setdefault((like.dtype, like.device), [])
        if number >= len(tensors):
            # A tensor made under inference_mode could not be used in training later.
            with torch.inference_mode(False):
                new = [torch.as_tensor(array, device=like.device) for array in self._arrays[len(tensors) :]]
                tensors += [tensor.to(like.dtype) if tensor.is_floating_point() else tensor for tensor in new]
        return tensors[number]


# What a group of cores does together; numbers are those of Constants.
@dataclass(frozen=True)
class _Chains:
    """Products of rotations on one wire: which of the chains, for each core."""

    numbers: int


@dataclass(frozen=True)
class _Legs:
    """Halves of gates on two wires."""

    parts: int
    angles: int | None
    legs: tuple[int, int]


@dataclass(frozen=True)
class _Squeezes:
    """Compressions of the bonds."""

    left: int | None
    right: int | None


class Cores:
    """Builds every distinct core from the weights, cores of like steps together.

    Args:
        programs: For each core, its Pauli letter and its steps.
    """

    def __init__(self, programs: Sequence[tuple[int, Sequence[Step | Gauge]]], constants: Constants) -> None:
        self._constant = constant = constants
        self._angles: dict[Angle, int] = {}
        chains: dict[tuple[object, ...], tuple[int, list[Step]]] = {}
        groups: dict[tuple[object, ...], list[tuple[int, int, list[object]]]] = {}
        for core, (letter, steps) in enumerate(programs):
            items: list[object] = []  # chains by number, other steps as they are
            position = 0
            while position < len(steps):
                chain = []
                for step in steps[position:]:
                    if not isinstance(step, Step) or step.legs != (1, 1):
                        break
                    chain.append(step)
                if chain:
                    key = tuple(step.key() for step in chain)
                    items.append(chains.setdefault(key, (len(chains), chain))[0])
                else:
                    items.append(steps[position])
                position += len(chain) or 1
            groups.setdefault(tuple(_signature(item) for item in items), []).append((core, letter, items))
        self.members = [[core for core, _, _ in group] for group in groups.values()]
        length = max([len(chain) for _, chain in chains.values()], default=1)
        length = 1 << (length - 1).bit_length()
        parts = np.zeros((max(len(chains), 1), length, 3, 16))
        parts[:, :, 0] = np.eye(4).ravel()
        chained = np.zeros(parts.shape[:2], dtype=np.int64)
        for number, chain in chains.values():
            for k, step in enumerate(chain):
                parts[number, k, : len(step.parts)] = step.parts.reshape(-1, 16)
                chained[number, k] = self._angle(step.angle)
        self._chain_parts, self._chained = constant.keep(parts), constant.keep(chained)
        self._groups = []
        for group in groups.values():
            start = np.eye(4)[[letter for _, letter, _ in group]]
            columns = zip(*(items for _, _, items in group), strict=True)
            self._groups.append((constant.keep(start), [self._stack(list(column)) for column in columns]))
        known = list(self._angles) or [Angle("const", 0)]
        table = np.array([[angle.scale * (angle.source == "weight"), angle.offset] for angle in known])
        self._index = constant.keep(np.array([angle.index for angle in known]))
        self._scale, self._offset = constant.keep(table[:, 0].copy()), constant.keep(table[:, 1].copy())

    def _angle(self, angle: Angle | None) -> int:
        return self._angles.setdefault(angle or Angle("const", 0), len(self._angles))

    def _stack(self, column: list[object]) -> _Chains | _Legs | _Squeezes:
        first, keep = column[0], self._constant.keep
        if isinstance(first, Gauge):
            sides = [[getattr(gauge, side) for gauge in column] for side in ("left", "right")]
            return _Squeezes(*(None if side[0] is None else keep(np.stack(side)) for side in sides))
        steps = [step for step in column if isinstance(step, Step)]
        if not steps:
            return _Chains(keep(np.array(column)))
        parts = np.stack([step.parts.reshape(len(step.parts), -1) for step in steps])
        turning = keep(np.array([self._angle(step.angle) for step in steps])) if parts.shape[1] > 1 else None
        return _Legs(keep(parts), turning, steps[0].legs)

    def __call__(self, weights: Tensor) -> list[Tensor]:
        """weights (F, n_weights) -> for each group its cores (F, members, L, R, 4)."""
        filters, constant = len(weights), self._constant
        if weights.shape[1] == 0:
            weights = weights.new_zeros(filters, 1)
        turns = weights[:, constant(self._index, weights)]
        turns = turns * constant(self._scale, weights) + constant(self._offset, weights)
        turns = torch.stack([torch.ones_like(turns), torch.cos(turns), torch.sin(turns)], dim=-1)  # (F, angles, 3)
        chosen = turns[:, constant(self._chained, weights)]
        parts = chosen.shape[1:3]
        chains = (chosen[..., None] * constant(self._chain_parts, weights)).sum(-2).reshape(filters, *parts, 4, 4)
        while chains.shape[2] > 1:
            chains = chains[:, :, 0::2] @ chains[:, :, 1::2]
        chains = chains[:, :, 0]
        result = []
        for start, steps in self._groups:
            core = constant(start, weights).expand(filters, -1, -1)[:, :, None, None]
            for step in steps:
                n, left, right = core.shape[1:4]
                if isinstance(step, _Chains):
                    core = (core.flatten(2, 3) @ chains[:, constant(step.numbers, weights)]).reshape(core.shape)
                elif isinstance(step, _Legs):
                    tensors = constant(step.parts, weights)
                    if step.angles is not None:
                        tensors = turns[:, constant(step.angles, weights), None] @ tensors
                    matrices = tensors.reshape(*tensors.shape[:-2], 4, -1)
                    grown = (core.flatten(2, 3) @ matrices).reshape(filters, n, left, right, *step.legs, 4)
                    core = grown.transpose(3, 4).flatten(4, 5).flatten(2, 3)
                else:
                    sides = (step.left, step.right)
                    core = squeeze(core, *(None if side is None else constant(side, weights) for side in sides))
            result.append(core)
        return result


def _signature(item: object) -> object:
    if isinstance(item, Gauge):
        return tuple(None if side is None else side.shape for side in (item.left, item.right))
    return item.parts.shape if isinstance(item, Step) else "chain"


def squeeze(core: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Bonds times matrices: (F, n, L, R, d), (n, L, l), (n, R, r) -> (F, n, l, r, d)."""
    if left is not None:
        core = (left.mT @ core.flatten(3)).reshape(*core.shape[:2], -1, *core.shape[3:])
    if right is not None:
        core = right.mT[:, None] @ core
    return core
