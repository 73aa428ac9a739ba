"""Circuits run on matrix product states: bonds may be cut, shots may be drawn, gradients come from evaluations.

The gradient of truncated values is taken by parameter shifts, not through the singular value decompositions. Where
singular values are 0 or equal, which they are in every state that has not entangled yet, the decomposition has no
derivative: a trainable entangler at angle 0 would stay there. Shifts are finite everywhere, exact where nothing is
discarded, and elsewhere as far from the exact gradient as truncated values are from exact ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit
from qconv.backends.matrix_products import Chain, Truncation
from qconv.backends.memory import machine_memory
from qconv.backends.networks import Block, block_tensor, dimension_bound, merge, operator_rank
from qconv.backends.outcomes import Setting
from qconv.backends.protocol import Unsupported, check_call, device_counts

CHUNK_NUMBERS = 2**22  # of all tensors of a chunk of circuits


class ChainCompiled:
    """A circuit evaluated on matrix product states.

    Args:
        circuit: With at least one observable.
        max_bond: Largest bond; None for as large as the circuit can need.
        cutoff: Weight that one cut may discard.
        shots: Bitstrings a circuit and measurement setting; None for expectation values.
        seed: Makes shots repeatable.

    Attributes:
        truncation_error: What the last evaluation lost, the worst of its circuits; None before the first one. In
            training, the shifted circuits of a backward pass are evaluations too.

    Raises:
        Unsupported: Where a state of bonds that large has more bytes than this machine.
    """

    differentiable = False

    def __init__(
        self, circuit: Circuit, *, max_bond: int | None, cutoff: float, shots: int | None, seed: int | None
    ) -> None:
        self.circuit, self.shots, self._seed = circuit, shots, seed
        self._max_bond, self._cutoff = max_bond, cutoff
        self.truncation_error: Truncation | None = None
        self._blocks = merge(circuit)
        self._settings = Setting.of(circuit.observables)
        self._numbers, self._multiplied, bond = _costs(circuit, self._blocks, max_bond)
        # Of a shot: its bits, and vectors on the bond that it has reached.
        self._shot_numbers = 0 if shots is None else circuit.n_wires + 4 * bond
        needed, available = 16 * (self._numbers + self._shot_numbers), machine_memory()
        if needed > available:
            raise Unsupported(
                f"a matrix product state of {circuit.n_wires} wires takes up to {needed:,} bytes for this circuit with "
                f"max_bond={max_bond} but this machine has {int(available):,}: give "
                "load_backend('tensor_network', max_bond=...) a smaller number"
            )
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        finite = inputs.isfinite().all(1)[:, None] & weights.isfinite().all(1)
        chunk = max(1, CHUNK_NUMBERS // (self._numbers + self._shot_numbers))
        many = min(len(weights), chunk)
        worst = Truncation(max_bond=1)
        values = inputs.new_empty(len(inputs), len(weights), len(self.circuit.observables))
        with torch.no_grad():
            x, w = inputs.nan_to_num(0, 0, 0), weights.nan_to_num(0, 0, 0)
            for first in range(0, len(w), max(1, many)):
                filters = slice(first, first + many)
                patches = max(1, chunk // many)
                for start in range(0, len(x), patches):
                    part = slice(start, start + patches)
                    chain = self._state(x[part], w[filters])
                    read = self._draw(chain) if self.shots else chain.expectations(self.circuit.observables)
                    values[part, filters] = read.reshape(len(x[part]), len(w[filters]), -1).to(values)
                    worst = Truncation(
                        max(worst.discarded, float(chain.discarded.max())),
                        max(worst.angle, float(chain.angle.max())),
                        max(worst.max_bond or 1, chain.bond),
                    )
        self.truncation_error = worst
        return torch.where(finite[..., None], values, torch.nan)

    def _state(self, inputs: Tensor, weights: Tensor) -> Chain:
        """States of all (patch, filter) pairs, a row each."""
        shape = len(inputs), len(weights)
        n = self.circuit.n_wires
        chain = Chain(shape[0] * shape[1], n, weights.device, self._max_bond, self._cutoff)
        for block in self._blocks:
            tensor = block_tensor(block, inputs.double(), weights.double())
            shared = tensor.shape[:2] == (1, 1) and not block.prepares
            rows = tensor[0] if shared else tensor.expand(*shape, *tensor.shape[2:]).flatten(0, 1)
            if block.prepares:
                chain.prepare(rows)
            else:
                chain.apply(rows, block.wires)
        return chain

    def _draw(self, chain: Chain) -> Tensor:
        device = chain.sites[0].device
        if self._seed is not None and device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        assert self.shots is not None
        rows = len(chain.sites[0])
        odd = torch.zeros(rows, len(self.circuit.observables), dtype=torch.float64, device=device)
        at_a_time = max(1, CHUNK_NUMBERS // (rows * self._shot_numbers))
        for setting in self._settings:
            for start in range(0, self.shots, at_a_time):
                shots = min(at_a_time, self.shots - start)
                bits = chain.sample(setting.basis, shots, self._generators.get(device))
                for member, text in zip(setting.members, setting.observables, strict=True):
                    support = torch.tensor([letter != "I" for letter in text], device=device)
                    odd[:, member] += (bits[..., support].sum(-1) % 2).sum(1)
        return 1 - 2 * odd / self.shots

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: an upper bound, bonds taken as large as the circuit and max_bond allow."""
        runs = patches * filters
        total = device_counts(self.circuit, len(self._settings), runs, self.shots)
        return total + Counter({"mac:fp32*fp32": 4 * self._multiplied * runs})


def chain_counts(circuit: Circuit, runs: int, max_bond: int | None) -> Counter[str]:
    """Arithmetic of a circuit's exact values on matrix product states, an upper bound.

    Args:
        circuit: With at least one observable.
        runs: (patch, filter) pairs.
        max_bond: Largest bond; None for as large as the circuit can need.
    """
    return Counter({"mac:fp32*fp32": 4 * _costs(circuit, merge(circuit), max_bond)[1] * runs})


def _costs(circuit: Circuit, blocks: Sequence[Block], max_bond: int | None) -> tuple[int, int, int]:
    """Complex numbers kept for a state at most, complex multiplications, and the last bond, from bounds on the bonds.

    A singular value decomposition of (m, n) with m >= n is taken for 7 m n^2 + 4 n^3 multiplications and a QR
    decomposition for 2 m n^2 (Golub & Van Loan, Matrix Computations, section 8.6 and 5.2, half their flops).
    """
    n = circuit.n_wires
    generator = torch.Generator().manual_seed(0)
    # Of generic angles: special ones only lower a rank.
    x, w = (torch.rand(1, k, generator=generator, dtype=torch.float64) for k in (circuit.n_inputs, circuit.n_weights))
    order, bonds = list(range(n)), [1] * (n + 1)
    ranks: list[tuple[tuple[int, ...], int]] = []
    numbers, multiplied, center = 2 * n, 0, 0

    def split(place: int) -> None:
        """Of the pair (place, place + 1)."""
        nonlocal numbers, multiplied, center
        near = place if center <= place else place + 1
        for k in range(min(center, near), max(center, near)):
            multiplied += 4 * bonds[k] * bonds[k + 1] * max(bonds[k], bonds[k + 1])
        sides = 2 * bonds[place], 2 * bonds[place + 2]
        short, long = min(sides), max(sides)
        multiplied += 4 * short * long + 7 * long * short**2 + 4 * short**3
        found = dimension_bound(set(order[: place + 1]), n, ranks)
        bonds[place + 1] = min(found, max_bond or found)
        # The pair, its factors and what the decomposition needs beside them.
        numbers = max(numbers, sum(2 * a * b for a, b in pairwise(bonds)) + 4 * short * long)
        center = place + 1

    for block in blocks:
        if block.prepares:
            ranks.append((block.wires, 2**n))
            for place in range(n - 1):
                found = dimension_bound(set(range(place + 1)), n, ranks)
                bonds[place + 1] = min(found, max_bond or found)
                rows, columns = 2 * bonds[place], 2 ** (n - place - 1)
                multiplied += 11 * max(rows, columns) * min(rows, columns) ** 2
            numbers = max(numbers, 4 * 2**n)
            center = n - 1
        elif len(block.wires) == 1:
            multiplied += 4 * bonds[(k := order.index(block.wires[0]))] * bonds[k + 1]
        else:
            a, b = (order.index(wire) for wire in block.wires)
            for place in range(max(a, b) - 1, min(a, b), -1):
                order[place], order[place + 1] = order[place + 1], order[place]
                split(place)
            ranks.append((block.wires, operator_rank(block_tensor(block, x, w))))
            multiplied += 16 * bonds[min(a, b)] * bonds[min(a, b) + 2]
            split(min(a, b))
    read = [2 * 2 * a * b * max(a, b) for a, b in pairwise(bonds)]
    spans = [np.flatnonzero([text[wire] != "I" for wire in order]) for text in circuit.observables]
    multiplied += 2 * sum(read) + sum(sum(read[span[0] : span[-1] + 1]) for span in spans if len(span))
    return numbers, multiplied, max(bonds)
