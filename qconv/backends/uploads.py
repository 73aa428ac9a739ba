"""States of circuits whose features enter in layers of one-wire rotations, once or again and again (re-uploading).

A rotation by a feature is diagonal in the eigenbasis of its axis, so a layer of them multiplies each amplitude by a
phase. The phases depend on the patch alone and are computed once for all layers that read the same angles. What stands
between two layers, changes of basis included, is one unitary for all patches: one matrix product a layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import GATES, Matrix
from qconv.backends.protocol import Real

# Axis -> V with axis = V Z V^+.
_BASES: dict[str, Matrix] = {
    "X": GATES["H"].matrix(),
    "Y": GATES["S"].matrix() @ GATES["H"].matrix(),
    "Z": np.eye(2, dtype=complex),
}


@dataclass(frozen=True)
class Upload:
    """One layer of rotations by features.

    Args:
        wires: Wires it turns, each once.
        axes: Their axes, such as "YYYY".
        angles: Their angles.
    """

    wires: tuple[int, ...] = ()
    axes: str = ""
    angles: tuple[Angle, ...] = ()

    def with_gate(self, gate: Gate) -> Upload:
        """The layer with one more rotation."""
        (rotation,) = gate.spec.rotations
        angle = gate.angles[0].times(rotation.factor)
        return Upload((*self.wires, gate.wires[0]), self.axes + rotation.pauli, (*self.angles, angle))

    def basis(self, n_wires: int) -> Matrix:
        """Change of basis V (2^n, 2^n) of all wires."""
        axis = dict(zip(self.wires, self.axes, strict=True))
        result = np.eye(1, dtype=complex)
        for wire in range(n_wires):
            result = np.kron(result, _BASES[axis.get(wire, "Z")])
        return result

    def phases(self, inputs: Tensor, n_wires: int) -> Tensor:
        """exp(-i/2 sum_j +-angle_j) of every basis state: (P, 2^n), complex."""
        columns = [inputs[:, angle.index] * angle.scale + angle.offset for angle in self.angles]
        signs = torch.from_numpy(_signs(self.wires, n_wires)).to(inputs)
        exponents = torch.stack(columns, dim=1) @ signs
        return torch.complex(torch.cos(exponents), torch.sin(exponents))


@cache
def _signs(wires: tuple[int, ...], n_wires: int) -> Real:
    """-1/2 times the eigenvalues of Z on each wire: (wires, 2^n)."""
    bits = np.stack(np.unravel_index(np.arange(2**n_wires), (2,) * n_wires))
    return np.asarray(bits[list(wires)] - 0.5, dtype=np.float64)


@dataclass(frozen=True)
class Uploads:
    """A circuit as blocks of gates that see no patch and uploads between them.

    Args:
        blocks: One more than uploads.
        uploads: At least one.
    """

    blocks: tuple[tuple[Gate, ...], ...]
    uploads: tuple[Upload, ...]

    @classmethod
    def of(cls, circuit: Circuit) -> Uploads | None:
        """Split a circuit, or None if a feature enters in another way."""
        blocks: list[list[Gate]] = [[]]
        uploads: list[Upload] = []
        for gate in circuit.gates:
            if not gate.depends_on("input"):
                # A gate that touches no wire turned since the last block commutes to before the upload.
                early = uploads and not set(gate.wires) & _touched(uploads[-1], blocks[-1])
                blocks[-2 if early else -1].append(gate)
                continue
            if len(gate.wires) > 1 or len(gate.spec.rotations) != 1:
                return None
            if not uploads or gate.wires[0] in _touched(uploads[-1], blocks[-1]):
                uploads.append(Upload())
                blocks.append([])
            uploads[-1] = uploads[-1].with_gate(gate)
        return cls(tuple(map(tuple, blocks)), tuple(uploads)) if uploads else None

    def counts(self, size: int, patches: int, filters: int) -> Counter[str]:
        """Operations for the patches; building the blocks' unitaries is of the order of `size` patches."""
        total: Counter[str] = Counter()
        for upload in set(self.uploads):
            total["mac:fp32*fp32"] += len(upload.wires) * size * patches
            total["mul:fp32"] += len(upload.wires) * patches
        for k in range(len(self.uploads)):
            # The first upload meets a state that all patches share.
            total["mac:fp32*fp32"] += 4 * size * patches * (filters if k else 1)
            total["mac:fp32*fp32"] += 4 * size * size * patches * filters
        return total


def _touched(upload: Upload, block: list[Gate]) -> set[int]:
    return set(upload.wires).union(*(gate.wires for gate in block))
