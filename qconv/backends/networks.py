"""A circuit's expectation value <psi|O|psi> as a tensor network, and in which order it is contracted.

Gates are first merged into blocks on one or two wires. Of an observable only the blocks in its light cone are left:
every other one meets its own adjoint and is the identity. The patch and the filter are two more indices of those
tensors that depend on them, so whatever depends on the weights alone is contracted once for all patches.

Source: Markov & Shi, Simulating quantum computation by contracting tensor networks (arXiv:quant-ph/0511069).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from string import ascii_letters

import torch
from opt_einsum import RandomGreedy
from torch import Tensor

from circuits.circuit import Circuit, Gate
from circuits.gates import AMPLITUDE, PAULI
from qconv.backends.angles import angle_value, normalized
from qconv.backends.statevector import gate_matrix

Index = int | str  # a leg, or PATCH or FILTER
PATCH, FILTER = "p", "f"

# Orders are compared for about as many patches and filters as a convolution has at a time.
TYPICAL_SIZES: dict[Index, int] = {PATCH: 64, FILTER: 2}
# Multiplications a patch above which an order is searched for: below, a search takes longer than it saves.
SEARCH_FROM = 2**16
SEARCHES = 4


@dataclass(frozen=True)
class Block:
    """Gates that are one tensor, in the order of application.

    Args:
        gates: All on the block's wires; or one state preparation.
        wires: One or two, or those of the state preparation.
        depends: PATCH and FILTER, where it depends on them.
    """

    gates: tuple[Gate, ...]
    wires: tuple[int, ...]
    depends: frozenset[Index]

    @property
    def prepares(self) -> bool:
        """Whether it is a state, not an operator."""
        return self.gates[0].name == AMPLITUDE


def _depends(gate: Gate) -> frozenset[Index]:
    return frozenset(
        mark for mark, source in ((PATCH, "input"), (FILTER, "weight")) if any(a.source == source for a in gate.angles)
    )


def merge(circuit: Circuit) -> tuple[Block, ...]:
    """The circuit as blocks on one or two wires, up to a global phase.

    A gate joins a neighbor only where the whole then depends on no more than one of them did: what depends on the
    weights alone must not be computed for every patch.
    """
    blocks: list[Block | None] = []
    last: dict[int, int] = {}
    for gate in (part for whole in circuit.gates for part in _narrow(whole)):
        depends, before = _depends(gate), {last[wire] for wire in gate.wires if wire in last}
        if len(before) == 1 and gate.name != AMPLITUDE:
            (place,) = before
            block = blocks[place]
            assert block is not None
            nested = block.depends <= depends or depends <= block.depends
            if set(gate.wires) <= set(block.wires) and nested and not block.prepares:
                blocks[place] = replace(block, gates=(*block.gates, gate), depends=block.depends | depends)
                continue
        gates: tuple[Gate, ...] = (gate,)
        if len(gate.wires) == 2:
            for place in sorted(before):
                block = blocks[place]
                assert block is not None
                if len(block.wires) == 1 and block.depends <= depends and not block.prepares:
                    gates, blocks[place] = block.gates + gates, None
        blocks.append(Block(gates, gate.wires, depends))
        last.update(dict.fromkeys(gate.wires, len(blocks) - 1))
    return tuple(block for block in blocks if block is not None)


def _narrow(gate: Gate) -> tuple[Gate, ...]:
    return gate.parts() if len(gate.wires) > 2 and gate.name != AMPLITUDE else (gate,)


def block_tensor(block: Block, inputs: Tensor, weights: Tensor) -> Tensor:
    """A block's matrix (P or 1, F or 1, d, d), or the state (P or 1, F or 1, d) that it prepares; complex."""
    dtype = torch.complex64 if weights.dtype == torch.float32 else torch.complex128
    if block.prepares:
        shape = [len(rows) if mark in block.depends else 1 for mark, rows in ((PATCH, inputs), (FILTER, weights))]
        columns = [angle_value(angle, inputs, weights).expand(shape) for angle in block.gates[0].angles]
        return normalized(torch.stack(columns, dim=-1), 2 ** len(block.wires)).to(dtype)
    result: Tensor | None = None
    for gate in block.gates:
        matrix = gate_matrix(gate, inputs, weights)
        if len(gate.wires) < len(block.wires):
            other = torch.eye(2, dtype=dtype, device=weights.device)[None, None]
            matrix = _kron(matrix, other) if gate.wires[0] == block.wires[0] else _kron(other, matrix)
        elif gate.wires != block.wires:
            legs = matrix.reshape(*matrix.shape[:2], 2, 2, 2, 2).permute(0, 1, 3, 2, 5, 4)
            matrix = legs.reshape(matrix.shape)
        result = matrix if result is None else matrix @ result
    assert result is not None
    return result


def _kron(left: Tensor, right: Tensor) -> Tensor:
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)


@dataclass(frozen=True)
class Leaf:
    """One tensor of a network.

    Args:
        indices: PATCH and FILTER where it has them, then its legs: those that leave it, then those that enter.
        block: Which block it is; None for |0>, or for an observable's Pauli matrix.
        start: Whether a block's matrix is applied to |0> on its wire.
        pauli: Letter of an observable.
        adjoint: Whether it stands in <psi| rather than in |psi>.
        wires: Where it is.
        time: When it acts.
    """

    indices: tuple[Index, ...]
    block: int | None
    start: bool
    pauli: str
    adjoint: bool
    wires: tuple[int, ...]
    time: int


def light_cone(blocks: Sequence[Block], observable: str) -> tuple[list[int], set[int]]:
    """Blocks that an observable depends on, in order, and the wires that they and it touch."""
    wires = {wire for wire, letter in enumerate(observable) if letter != "I"}
    cone = []
    for k in reversed(range(len(blocks))):
        if wires & set(blocks[k].wires):
            cone.append(k)
            wires |= set(blocks[k].wires)
    return cone[::-1], wires


def network(blocks: Sequence[Block], observable: str) -> list[Leaf]:
    """The leaves of <psi|O|psi>; a leg that two leaves share is summed over.

    Legs are numbered by wire, time and side, so that parts which two observables have in common are told to be equal.
    """
    cone, wires = light_cone(blocks, observable)
    leaves: list[Leaf] = []

    def leg(wire: int, time: int, adjoint: bool) -> int:
        return 2 * ((time + 1) * len(observable) + wire) + adjoint

    ends: list[dict[int, int]] = []
    for adjoint in (False, True):
        open_legs: dict[int, int] = {}
        for k in cone:
            block, on = blocks[k], blocks[k].wires
            marks = tuple(mark for mark in (PATCH, FILTER) if mark in block.depends)
            start = block.prepares or (len(on) == 1 and on[0] not in open_legs)
            for wire in () if start else on:
                if wire not in open_legs:
                    open_legs[wire] = leg(wire, -1, adjoint)
                    leaves.append(Leaf((open_legs[wire],), None, True, "", adjoint, (wire,), -1))
            entering = () if start else tuple(open_legs[wire] for wire in on)
            open_legs.update((wire, leg(wire, k, adjoint)) for wire in on)
            leaving = tuple(open_legs[wire] for wire in on)
            leaves.append(Leaf((*marks, *leaving, *entering), k, start, "", adjoint, on, -1 if start else k))
        for wire in sorted(wires - set(open_legs)):
            open_legs[wire] = leg(wire, -1, adjoint)
            leaves.append(Leaf((open_legs[wire],), None, True, "", adjoint, (wire,), -1))
        ends.append(open_legs)
    kets, bras = ends
    for wire in sorted(wires):
        if observable[wire] != "I":
            leaves.append(Leaf((bras[wire], kets[wire]), None, False, observable[wire], False, (wire,), len(blocks)))
    same: dict[Index, Index] = {bras[wire]: kets[wire] for wire in wires if observable[wire] == "I"}
    return [replace(leaf, indices=tuple(same.get(index, index) for index in leaf.indices)) for leaf in leaves]


@dataclass(frozen=True)
class Step:
    """Contraction of two tensors, which are then gone; the result is appended.

    Args:
        left: Indices of the first tensor.
        right: Of the second.
        out: Of the result.
        summed: Numbers multiplied, for one patch and filter.
        kept: Numbers of the result, for one patch and filter.
    """

    left: tuple[Index, ...]
    right: tuple[Index, ...]
    out: tuple[Index, ...]
    summed: int
    kept: int

    @cached_property
    def equation(self) -> str:
        """For torch.einsum."""
        letter = dict(zip(dict.fromkeys(self.left + self.right), ascii_letters, strict=False))
        left, right, out = ("".join(letter[k] for k in indices) for indices in (self.left, self.right, self.out))
        return f"{left},{right}->{out}"

    def runs(self, patches: int, filters: int) -> int:
        """How often it runs for so many patches and filters."""
        return (patches if PATCH in self.out else 1) * (filters if FILTER in self.out else 1)


Keys = tuple[int, int, int]  # of the two tensors and of the result


@dataclass(frozen=True)
class Contraction:
    """One observable's network and its order.

    Args:
        leaves: By key; what has the same key in two contractions of a circuit is the same tensor.
        steps: In order; the last one gives the value.
    """

    leaves: dict[int, Leaf]
    steps: tuple[tuple[Keys, Step], ...]

    @property
    def marks(self) -> set[Index]:
        """PATCH and FILTER, where the value depends on them."""
        return {index for leaf in self.leaves.values() for index in leaf.indices if isinstance(index, str)}


def distinct(contractions: Iterable[Contraction]) -> list[Step]:
    """Steps of all contractions, a shared one once."""
    return list({keys[-1]: step for contraction in contractions for keys, step in contraction.steps}.values())


def multiplications(steps: Iterable[Step], patches: int, filters: int) -> int:
    """Complex multiplications of a contraction."""
    return sum(step.summed * step.runs(patches, filters) for step in steps)


def largest(steps: Iterable[Step]) -> int:
    """Complex numbers of the largest intermediate tensor, for one patch and filter."""
    return max((step.kept for step in steps), default=1)


def numbers(steps: Iterable[Step], patches: int, filters: int) -> int:
    """Complex numbers of all intermediate tensors, which autograd keeps."""
    return sum(step.kept * step.runs(patches, filters) for step in steps)


Path = Sequence[tuple[int, ...]]


def _steps(leaves: Sequence[Leaf], path: Path) -> list[Step]:
    terms = [leaf.indices for leaf in leaves]
    uses = Counter(index for term in terms for index in term)
    result = []
    for pair in path:
        a, b = sorted(pair)
        right, left = terms.pop(b), terms.pop(a)
        uses.subtract(left + right)
        both = dict.fromkeys(left + right)
        # The patch and the filter first, as batched products want them.
        marks = [mark for mark in (PATCH, FILTER) if mark in both]
        legs = [index for index in both if uses[index] > 0 and index not in marks]
        out = (*marks, *legs)
        uses.update(out)
        result.append(Step(left, right, out, 2 ** (len(both) - len(marks)), 2 ** len(legs)))
        terms.append(out)
    return result


def _one_by_one(order: Sequence[int]) -> list[tuple[int, int]]:
    """The path that multiplies leaf after leaf to one growing tensor, which always comes last."""
    first, second = sorted(order[:2])
    rest = [k for k in range(len(order)) if k not in (first, second)]
    path = [(first, second)]
    for leaf in order[2:]:
        place = rest.index(leaf)
        rest.pop(place)
        path.append((place, len(rest) + 1))
    return path


def plan(leaves: Sequence[Leaf], memory: float, search: bool = True) -> tuple[Path, list[Step]]:
    """The cheapest order found among those that fit.

    Tried are sweeps over the wires, best for shallow circuits, the order of time, best for deep ones on few wires, and
    for what is still expensive opt_einsum's greedy search with random moves, from fixed seeds.

    Args:
        leaves: The network.
        memory: Numbers that an intermediate tensor may have.
        search: Whether opt_einsum may be asked.
    """
    places = range(len(leaves))

    def early(k: int) -> tuple[int, bool]:
        return leaves[k].time, leaves[k].adjoint

    orders = [
        sorted(places, key=lambda k: (max(leaves[k].wires), *early(k))),
        sorted(places, key=lambda k: (-min(leaves[k].wires), *early(k))),
        # To the end of |psi>, and through <psi| back again.
        sorted(places, key=lambda k: (leaves[k].adjoint, (1 - 2 * leaves[k].adjoint) * leaves[k].time)),
    ]
    found: list[tuple[Path, list[Step]]] = []

    def attempt(path: Path) -> None:
        found.append((path, _steps(leaves, path)))

    def price(candidate: tuple[Path, list[Step]]) -> tuple[bool, int]:
        steps = candidate[1]
        return largest(steps) > memory, multiplications(steps, TYPICAL_SIZES[PATCH], TYPICAL_SIZES[FILTER])

    for order in orders:
        attempt(_one_by_one(order))
    if search and min(map(price, found)) > (False, SEARCH_FROM * TYPICAL_SIZES[PATCH]):
        attempt(_searched(leaves))
    return min(found, key=price)


def contractions(
    circuit: Circuit, blocks: Sequence[Block], memory: float, search: bool, stop: bool = False
) -> list[Contraction]:
    """One for each observable; see plan. To stop is to leave out those after the first that does not fit."""
    known: dict[object, int] = {}

    def key(of: object) -> int:
        return known.setdefault(of, len(known))

    result = []
    for observable in circuit.observables:
        leaves = network(blocks, observable)
        path, steps = plan(leaves, memory, search)
        present = [key(leaf) for leaf in leaves]
        named = dict(zip(present, leaves, strict=True))
        keyed = []
        for pair, step in zip(path, steps, strict=True):
            a, b = sorted(pair)
            right, left = present.pop(b), present.pop(a)
            # What a step sums over is told by what it keeps.
            present.append(key((left, right, step.out)))
            keyed.append(((left, right, present[-1]), step))
        result.append(Contraction(named, tuple(keyed)))
        if stop and largest(steps) > memory:
            break
    return result


def _searched(leaves: Sequence[Leaf]) -> Path:
    sizes = {index: 2 for leaf in leaves for index in leaf.indices} | TYPICAL_SIZES
    terms = [frozenset(leaf.indices) for leaf in leaves]
    # The search seeds Python's global generator, which is the user's.
    state = random.getstate()
    try:
        path = RandomGreedy(max_repeats=SEARCHES, parallel=False)(terms, frozenset(TYPICAL_SIZES), sizes)
    finally:
        random.setstate(state)
    return [pair for pair in path if len(pair) == 2]


def _tensor(leaf: Leaf, blocks: Sequence[Tensor]) -> Tensor:
    like = blocks[0]
    if leaf.pauli:
        return torch.as_tensor(PAULI[leaf.pauli], dtype=like.dtype, device=like.device)
    if leaf.block is None:
        ground = torch.zeros(2, dtype=like.dtype, device=like.device)
        ground[0] = 1
        return ground
    tensor = blocks[leaf.block]
    if leaf.start and tensor.ndim == 4:
        tensor = tensor[..., 0]
    # An index that the leaf does not have is there with size 1.
    tensor = tensor if FILTER in leaf.indices else tensor.select(1, 0)
    tensor = tensor if PATCH in leaf.indices else tensor.select(0, 0)
    marks = sum(isinstance(index, str) for index in leaf.indices)
    tensor = tensor.reshape(*tensor.shape[:marks], *(2,) * (len(leaf.indices) - marks))
    return tensor.conj() if leaf.adjoint else tensor


def contract(contraction: Contraction, blocks: Sequence[Tensor], shared: dict[int, Tensor] | None = None) -> Tensor:
    """Carry out a contraction.

    Args:
        contraction: At least one step.
        blocks: See block_tensor.
        shared: Keeps every tensor by key for other contractions; None forgets each once it is used.
    """
    present: dict[int, Tensor] = {} if shared is None else shared
    for key, leaf in contraction.leaves.items():
        if key not in present:
            present[key] = _tensor(leaf, blocks)
    for (left, right, key), step in contraction.steps:
        if key not in present:
            present[key] = torch.einsum(step.equation, present[left], present[right])
        if shared is None:
            del present[left], present[right]
    return present[key]


def operator_rank(matrix: Tensor) -> int:
    """Largest rank of operators (..., 4, 4) between their two wires: 1 for a product, 2 for a CNOT, 4 for a swap."""
    split = matrix.reshape(-1, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    return int(torch.linalg.matrix_rank(split, rtol=1e-8).max())


def dimension_bound(inside: set[int], n_wires: int, ranks: Iterable[tuple[tuple[int, ...], int]]) -> int:
    """Largest Schmidt rank of a state between some wires and the others.

    Args:
        inside: The wires.
        n_wires: Of the circuit.
        ranks: Wires and operator rank of every block so far.
    """
    most = min(len(inside), n_wires - len(inside))
    crossing = prod(rank for wires, rank in ranks if 0 < len(inside & set(wires)) < len(wires))
    return int(min(2**most, crossing))
