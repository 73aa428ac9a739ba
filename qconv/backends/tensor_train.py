"""Shallow circuits on many wires: the coefficients of a product-encoded kernel as exact tensor trains.

<O> = sum_P c_P(theta) prod_j b_{P_j}(x_j) as in fourier.py, but c is never formed: it is a product of one core a wire
(train_cores.py), contracted wire by wire with the features of all patches at once. Observables share work: those
whose trains agree on the first wires share the left part of the contraction, those that agree on the last wires the
right part, and each observable's parts meet at the bond where that is cheapest.

Source: Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011); Schollwoeck, Annals of Physics 326, 96 (2011), section 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS, scaled
from qconv.backends.fourier import Real, WireFeatures, split_encoding
from qconv.backends.protocol import check_call, device_counts, measurement_settings
from qconv.backends.train_cores import (
    SAMPLES,
    Constants,
    Cores,
    Operator,
    check_rank,
    from_left,
    from_right,
    meet,
    squeeze,
)

CHUNK_NUMBERS = 2**20  # numbers in the largest temporary of a chunk of patches
_MOVED = 16  # multiplications that take as long as writing one number of a product of features
_MAX_BLOCK = 5  # wires at an end whose features are multiplied out: 3^5 = 243 numbers a patch


@dataclass(frozen=True)
class _Level:
    """One wire taken in from one side by all nodes (distinct partial trains) of that side.

    Args:
        wire: Which wire.
        nodes: The nodes after it.
        parents: For each of them its parent's place among the nodes before; None if it is 0, 1, 2, ... up to the last.
        pool: Which pool its cores lie in, and `rows` (a number of Constants) their places there.
        before, after: The largest bonds of the nodes.
    """

    wire: int
    nodes: list[int]
    parents: list[int] | None
    pool: int
    rows: int
    before: int
    after: int


@dataclass
class _Side:
    """The partial trains from one end, as a tree: trains that agree on their first wires share nodes.

    Args:
        paths: For every observable its node after 0, 1, ... n wires.
        parents: For every node the node before it and the core between; (-1, -1) for the root.
        flip: True for the right end.
        gauges: For every node an orthonormal basis (D, d) of what its bond carries.
        block: Wires whose features are multiplied out, before others are taken in one by one.
        levels: One for each wire, those of the block included.
    """

    paths: list[list[int]]
    parents: list[tuple[int, int]]
    flip: bool
    gauges: list[Real] = field(default_factory=list)
    block: int = 0
    levels: list[_Level] = field(default_factory=list)

    @classmethod
    def of(cls, trains: list[list[int]], flip: bool, shared: bool) -> _Side:
        """trains[o][wire]: which core observable o has on a wire."""
        nodes: dict[tuple[int, int, int], int] = {(-1, -1, 0): 0}
        paths = []
        for observable, train in enumerate(trains):
            path = [0]
            for core in reversed(train) if flip else train:
                path.append(nodes.setdefault((path[-1], core, 0 if shared else observable), len(nodes)))
            paths.append(path)
        return cls(paths, [(parent, core) for parent, core, _ in nodes], flip)

    def bases(self, samples: list[Real], rng: np.random.Generator) -> list[Real]:
        """For every node what its bond can carry, seen from this side."""
        result = [np.eye(1)]
        for parent, core in self.parents[1:]:
            see = from_right if self.flip else from_left
            result.append(see(result[parent], samples[core], rng))
        return result

    def bond(self, node: int) -> int:
        """How many numbers a patch has at a node."""
        return int(self.gauges[node].shape[1])

    def nodes_after(self, wires: int) -> list[int]:
        """The nodes of the partial trains of so many wires that are kept."""
        return self.levels[wires - 1].nodes if wires else [0]

    def widest(self, wires: int) -> int:
        """The largest bond of those nodes."""
        return max(self.bond(node) for node in self.nodes_after(wires))


@dataclass(frozen=True)
class _Junction:
    """Observables whose left and right parts meet at the same bond.

    Args:
        cut: Wires to the left of it.
        left, right: Each observable's place among the nodes on either side; None if it is 0, 1, 2, ... up to the last.
        matrices: A number of Constants: (observables, d_left, d_right) between their bonds.
    """

    cut: int
    observables: list[int]
    left: list[int] | None
    right: list[int] | None
    matrices: int


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded(matrix: Real, columns: int) -> Real:
    return np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])))


def _pick(values: Tensor, places: list[int] | None) -> Tensor:
    """Entries of the second axis; None for all in order. Not by an index: its backward writes numbers one by one."""
    if places is None:
        return values
    parts = values.unbind(1)
    return torch.stack([parts[place] for place in places], dim=1)


class _Grow(torch.autograd.Function):
    """Products of numbers with features; its backward makes no temporary for the feature that is always 1."""

    @staticmethod
    def forward(state: Tensor, feature: Tensor) -> Tensor:
        """(..., d, P), (D, P) -> (..., d, D, P)."""
        return state[..., None, :] * feature

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        state, feature = ctx.saved_tensors
        parts = grads[0].unbind(-2)
        to_state = to_feature = None
        if ctx.needs_input_grad[0]:
            to_state = parts[0]
            for part, row in zip(parts[1:], feature[1:], strict=True):
                to_state = torch.addcmul(to_state, part, row)
        if ctx.needs_input_grad[1]:
            rows = [(part * state).flatten(0, -2).sum(0) for part in parts[1:]]
            to_feature = torch.stack([torch.zeros_like(feature[0]), *rows])
        return to_state, to_feature


def grow(state: Tensor, feature: Tensor) -> Tensor:
    """Products with a wire's features, of which the first is 1: (..., d, P), (D, P) -> (..., d * D, P)."""
    return cast(Tensor, _Grow.apply(state, feature)).flatten(-3, -2)  # type: ignore[no-untyped-call]


class TrainCompiled:
    """A product-encoded circuit as one tensor train an observable.

    Raises:
        Unsupported: For another encoding, or where a bond is wider than MAX_RANK.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        self.circuit = circuit
        encoders, block = split_encoding(circuit, noise)
        self.features = WireFeatures(encoders)
        self._constants = Constants()
        rng = np.random.default_rng(0)
        weights = rng.uniform(-np.pi, np.pi, (SAMPLES, max(1, circuit.n_weights)))
        numbers: dict[tuple[object, ...], int] = {}
        programs, samples, trains, self._factors = [], [], [], []
        for observable in circuit.observables:
            operator = Operator(observable, weights, rng)
            for op in reversed(block):
                operator.apply(op)
            train = []
            for wire, (letter, steps) in enumerate(zip(operator.letters, operator.steps, strict=True)):
                key = (wire, letter, *(step.key() for step in steps))
                if key not in numbers:
                    numbers[key] = len(numbers)
                    programs.append((letter, steps))
                    samples.append(operator.cores[wire] @ self.features.digits[wire])
                train.append(numbers[key])
            trains.append(train)
            self._factors.append(operator.factor)
        self._cores = Cores(programs, self._constants)
        # Sharing saves products, but a bond that serves one observable alone is often much narrower.
        plans = []
        for shared in (True, False):
            self._left, self._right = (_Side.of(trains, flip, shared) for flip in (False, True))
            self._find_gauges(samples, rng)
            meeting, cost = self._plan()
            plans.append((cost, meeting, self._left, self._right))
        _, meeting, self._left, self._right = min(plans, key=lambda plan: plan[0])
        self._pools: dict[tuple[bool, int, int, int], list[tuple[int, _Side, int, int]]] = {}
        for side, reach in ((self._left, meeting), (self._right, [circuit.n_wires - cut for cut in meeting])):
            side.levels = [self._level(side, k, reach) for k in range(1, max(reach) + 1)]
        self._fill_pools()
        self._junctions = [self._junction(cut, meeting) for cut in sorted(set(meeting))]
        order = [k for junction in self._junctions for k in junction.observables]
        self._order = None if order == sorted(order) else [order.index(k) for k in range(len(order))]

    def _find_gauges(self, samples: list[Real], rng: np.random.Generator) -> None:
        n = self.circuit.n_wires
        sides = (self._left, self._right)
        bases = [side.bases(samples, rng) for side in sides]
        for s, (side, other) in enumerate((sides, sides[::-1])):
            partners: list[set[int]] = [set() for _ in side.parents]
            for path, opposite in zip(side.paths, other.paths, strict=True):
                for k in range(n + 1):
                    partners[path[k]].add(opposite[n - k])
            side.gauges = [
                meet(own, np.concatenate([bases[1 - s][k] for k in sorted(seen)], axis=1))
                for own, seen in zip(bases[s], partners, strict=True)
            ]
            check_rank(max(map(side.bond, range(len(side.parents)))), n)

    def ranks(self) -> list[list[int]]:
        """For every observable the bonds of its train across the n - 1 cuts; true ranks are at most that."""
        n = self.circuit.n_wires
        return [
            [min(self._left.bond(a[k]), self._right.bond(b[n - k])) for k in range(1, n)]
            for a, b in zip(self._left.paths, self._right.paths, strict=True)
        ]

    def _plan(self) -> tuple[list[int], int]:
        """Where each observable's parts meet, and what a patch costs; sets the blocks of both sides."""
        n, sizes = self.circuit.n_wires, self.features.sizes
        sides = (self._left, self._right)
        edges = [
            [
                [
                    size * side.bond(before) * (side.bond(after) + _MOVED)
                    for before, after, size in zip(path, path[1:], sizes[::-1] if side.flip else sizes, strict=False)
                ]
                for path in side.paths
            ]
            for side in sides
        ]
        meeting = [n // 2] * len(self._factors)
        used = Counter(
            (s, node)
            for s, side in enumerate(sides)
            for path, cut in zip(side.paths, meeting, strict=True)
            for node in path[1 : 1 + (n - cut if s else cut)]
        )
        for _ in range(2):
            for o, cut in enumerate(meeting):
                costs = []
                for s, side in enumerate(sides):
                    path = side.paths[o][1:]
                    used.subtract((s, node) for node in path[: n - cut if s else cut])
                    own = [0 if used[s, node] else cost for node, cost in zip(path, edges[s][o], strict=True)]
                    costs.append(np.concatenate([[0], np.cumsum(own)]))
                joined = [
                    self._left.bond(self._left.paths[o][k]) * (self._right.bond(self._right.paths[o][n - k]) + _MOVED)
                    for k in range(n + 1)
                ]
                meeting[o] = int(np.argmin(costs[0] + costs[1][::-1] + joined))
                for s, side in enumerate(sides):
                    used.update((s, node) for node in side.paths[o][1 : 1 + (n - meeting[o] if s else meeting[o])])
        total_cost = sum(
            self._left.bond(left[cut]) * (self._right.bond(right[n - cut]) + _MOVED)
            for left, right, cut in zip(self._left.paths, self._right.paths, meeting, strict=True)
        )
        # Blocks are chosen for each side alone: a product with all features of a block against its wires one by one.
        for s, side in enumerate(sides):
            best = 2**62
            for block in range(min(_MAX_BLOCK, (n + 1 - s) // 2) + 1):
                features = int(np.prod(sizes[n - block :] if s else sizes[:block]))
                total = features * (_MOVED + sum(side.bond(node) for node in {path[block] for path in side.paths}))
                total += sum(
                    {
                        path[k + 1]: cost[k]
                        for path, cost, cut in zip(side.paths, edges[s], meeting, strict=True)
                        for k in range(block, n - cut if s else cut)
                    }.values()
                )
                if total < best:
                    best, side.block = total, block
            total_cost += best
        return [min(max(cut, self._left.block), n - self._right.block) for cut in meeting], total_cost

    def _level(self, side: _Side, wires: int, reach: list[int]) -> _Level:
        def nodes_after(k: int) -> list[int]:
            return list(dict.fromkeys(path[k] for path, far in zip(side.paths, reach, strict=True) if far >= k))

        before, nodes = nodes_after(wires - 1), nodes_after(wires)
        parents = [before.index(side.parents[node][0]) for node in nodes]
        wire = self.circuit.n_wires - wires if side.flip else wires - 1
        bonds = [max(map(side.bond, known)) for known in (before, nodes)]
        key = (side.flip, self.features.sizes[wire], _power(bonds[0]), _power(bonds[1]))
        pool = self._pools.setdefault(key, [])
        rows = np.arange(len(pool), len(pool) + len(nodes))
        pool += [(side.parents[node][1], side, node, wire) for node in nodes]
        return _Level(
            wire,
            nodes,
            None if parents == list(range(len(before))) else parents,
            list(self._pools).index(key),
            self._constants.keep(rows),
            *bonds,
        )

    def _fill_pools(self) -> None:
        """The matrices that bring formal bonds to those of the nodes, all edges of like size together."""
        keep = self._constants.keep
        self._recipes: list[tuple[list[tuple[int, int, int, int]], int, int]] = []
        for (flip, _, before, after), entries in self._pools.items():
            sources, order = [], []
            for group, members in enumerate(self._cores.members):
                chosen = [k for k, entry in enumerate(entries) if entry[0] in members]
                if not chosen:
                    continue
                order += chosen
                gauges = []
                for size, ends in ((before, False), (after, True)):
                    nodes = [entries[k][2] if ends else self._parent(entries[k]) for k in chosen]
                    side = entries[chosen[0]][1]
                    gauges.append(np.stack([_padded(side.gauges[node], size) for node in nodes]))
                places = keep(np.array([members.index(entries[k][0]) for k in chosen]))
                left, right = gauges[::-1] if flip else gauges
                sources.append((group, places, keep(left), keep(right)))
            digits = keep(np.stack([self.features.digits[entries[k][3]] for k in order]))
            self._recipes.append((sources, digits, keep(np.argsort(order))))

    @staticmethod
    def _parent(entry: tuple[int, _Side, int, int]) -> int:
        _, side, node, _ = entry
        return side.parents[node][0]

    def _junction(self, cut: int, meeting: list[int]) -> _Junction:
        n = self.circuit.n_wires
        observables = [o for o, where in enumerate(meeting) if where == cut]
        places: list[list[int] | None] = []
        for side, wires in ((self._left, cut), (self._right, n - cut)):
            nodes = side.nodes_after(wires)
            chosen = [nodes.index(side.paths[o][wires]) for o in observables]
            places.append(None if chosen == list(range(len(nodes))) else chosen)
        matrices = np.zeros((len(observables), self._left.widest(cut), self._right.widest(n - cut)))
        for k, o in enumerate(observables):
            left, right = (
                side.gauges[side.paths[o][wires]] for side, wires in ((self._left, cut), (self._right, n - cut))
            )
            matrices[k, : left.shape[1], : right.shape[1]] = self._factors[o] * left.T @ right
        return _Junction(cut, observables, places[0], places[1], self._constants.keep(matrices))

    def tensors(self, weights: Tensor) -> list[Tensor]:
        """What depends on the weights alone: weights (F, n_weights) -> blocks and cores as `contract` takes them."""
        constant = self._constants
        groups = self._cores(weights)
        pools = []
        for (flip, *_), (sources, digits, order) in zip(self._pools, self._recipes, strict=True):
            parts = [
                squeeze(groups[group][:, constant(places, weights)], constant(left, weights), constant(right, weights))
                for group, places, left, right in sources
            ]
            pool = torch.cat(parts, dim=1) @ constant(digits, weights)[:, None]
            # (F, edges, after, before, digit)
            pools.append((pool if flip else pool.transpose(2, 3))[:, constant(order, weights)])
        result = []
        for side in (self._left, self._right):
            block = weights.new_ones(len(weights), 1, 1, 1)
            cores = [pools[k.pool][:, constant(k.rows, weights), : k.after, : k.before] for k in side.levels]
            for core, level in zip(cores[: side.block], side.levels, strict=False):
                before = _pick(block, level.parents)
                grown = core.transpose(3, 4).flatten(2, 3) @ before  # (F, nodes, after * digit, features)
                block = grown.reshape(*core.shape[:3], core.shape[-1], -1).transpose(3, 4).flatten(3)
            result += [block, *(core.flatten(3) for core in cores[side.block :])]
        return result

    def contract(self, tensors: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Values of all patches.

        Args:
            tensors: Of `tensors`.
            features: For each wire its features at every patch, (D_j, P).

        Returns:
            (F, n_obs, P).
        """
        patches = features[0].shape[1]
        filters = len(tensors[0])
        chunk = max(256, CHUNK_NUMBERS // self._largest(filters))
        if patches <= chunk:
            return self._contract(tensors, features)
        wide = torch.is_grad_enabled() and patches * self._largest(filters) > 8 * CHUNK_NUMBERS
        parts = []
        for start in range(0, patches, chunk):
            part = [feature[:, start : start + chunk] for feature in features]
            if wide:
                # The temporaries of all wires are cheaper to compute again than to keep.
                parts.append(checkpoint(self._contract, tensors, part, use_reentrant=False))
            else:
                parts.append(self._contract(tensors, part))
        return torch.cat(parts, dim=-1)

    def _contract(self, tensors: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        n, constant = self.circuit.n_wires, self._constants
        patches = features[0].shape[1]
        rest = iter(tensors)
        kept: list[dict[int, Tensor]] = []
        for side in (self._left, self._right):
            block = next(rest)
            inside = [features[level.wire] for level in side.levels[: side.block]]
            product = features[0].new_ones(1, 1).expand(1, patches)
            for feature in inside:
                product = grow(product, feature)
            state = (block.flatten(0, 2) @ product).reshape(*block.shape[:3], patches)  # (F, nodes, bond, P)
            states = {side.block: state}
            for k, level in enumerate(side.levels[side.block :], side.block + 1):
                core, feature = next(rest), features[level.wire]
                state = _pick(state, level.parents)
                state = (core.flatten(0, 1) @ grow(state, feature).flatten(0, 1)).reshape(*core.shape[:3], patches)
                states[k] = state
            kept.append(states)
        values = []
        for junction in self._junctions:
            left = _pick(kept[0][junction.cut], junction.left)
            right = _pick(kept[1][n - junction.cut], junction.right)
            values.append((left * (constant(junction.matrices, left) @ right)).sum(2))
        return _pick(torch.cat(values, dim=1), self._order)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        return self.contract(self.tensors(weights), self.features(inputs)).movedim(-1, 0)

    def _shapes(self) -> list[tuple[int, int, int, int]]:
        """For each matrix product of a patch: (nodes, rows, columns, numbers multiplied out for it)."""
        result = []
        for side in (self._left, self._right):
            sizes = [self.features.sizes[level.wire] for level in side.levels]
            inside = sizes[: side.block]
            outer = sum(prod(inside[:k]) for k in range(2, side.block + 1))
            result.append((1, len(side.nodes_after(side.block)) * side.widest(side.block), prod(inside), outer))
            for level, size in zip(side.levels[side.block :], sizes[side.block :], strict=True):
                columns = level.before * size
                result.append((len(level.nodes), level.after, columns, len(level.nodes) * columns))
        return result

    def _largest(self, filters: int) -> int:
        """Numbers a patch of the largest temporary."""
        steps = [
            max(filters * nodes * rows, columns if nodes == 1 else filters * nodes * columns)
            for nodes, rows, columns, _ in self._shapes()
        ]
        return max(*steps, filters * len(self._factors))

    def estimated_macs(self, filters: int) -> int:
        """Multiply-accumulates of one patch once the cores are built: what a cost model compares."""
        n = self.circuit.n_wires
        total = sum(nodes * rows * columns for nodes, rows, columns, _ in self._shapes())
        for junction in self._junctions:
            left, right = self._left.widest(junction.cut), self._right.widest(n - junction.cut)
            total += len(junction.observables) * (left * right + left)
        return filters * total

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled. The cores are built once from the weights, not an inference."""
        angles = self.features.angle_count()
        sincos = SINCOS_MULTIPLICATIONS * angles
        shapes, block = self._shapes(), {0, 1 + len(self._left.levels) - self._left.block}
        outer = sum(outer if k in block else filters * outer for k, (_, _, _, outer) in enumerate(shapes))
        a_patch = Counter(
            {
                "mac:fp32*fp32": self.estimated_macs(filters),
                "mul:fp32": outer + sincos + angles,
                "add:fp32": sincos,
            }
        )
        settings = len(measurement_settings(self.circuit.observables))
        return scaled(a_patch, patches) + device_counts(self.circuit, settings, patches * filters, shots=None)

    def stored_numbers(self, filters: int) -> int:
        """Numbers that inference reads: blocks and cores."""
        return filters * sum(nodes * rows * columns for nodes, rows, columns, _ in self._shapes())
