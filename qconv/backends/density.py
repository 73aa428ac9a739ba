"""Noisy circuits of any form, exactly: density matrices of a batch of patches, written in Pauli strings.

rho = 2^-n sum_P r_P P with r_P = <P>, 4^n real numbers for the (2^n)^2 complex entries. A gate, a noise channel and a
misread bit are real matrices on the digits (I, X, Y, Z) of their wires, and r_P itself is what is read out. Up to the
last gate that sees a patch, the patches' numbers go through the circuit one operation after the other; what follows is
the same for all of them, so where patches are many the observables are pulled back through it instead, once.

Source: Wood, Biamonte & Cory (arXiv:1111.6950) for transfer matrices; Nielsen & Chuang, section 8.2.4.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.circuit import Circuit
from circuits.gates import AMPLITUDE
from circuits.noise import NoiseModel
from qconv.backends.angles import angle_value, normalized
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS
from qconv.backends.fourier import Coefficients, constant
from qconv.backends.memory import power_of_two
from qconv.backends.pauli_ops import PauliOp, noisy_ops, readout_ops
from qconv.backends.protocol import Unsupported, check_call, device_counts, measurement_settings

MAX_WIRES = 10  # 4 MB a patch in float32
MAX_WIRES_ELSEWHERE = 14  # 4 GB in Aer's complex128
# Numbers of the density matrices of a chunk of patches: a few copies of them are held at a time.
CHUNK_NUMBERS = 2**22

# Rows: what a pair of bits (of the row and the column of a density matrix) adds to <I>, <X>, <Y> and <Z>.
_PAULIS_OF_BITS = np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1j, -1j, 0], [1, 0, 0, -1]])


class DensityCompiled:
    """A noisy circuit as operations on the Pauli strings of its density matrix.

    Args:
        circuit: With at least one observable.
        noise: Channels after gates and errors of the readout; None for none.

    Raises:
        Unsupported: For more than MAX_WIRES wires, with the bytes that they would take.
        ValueError: If the noise names a wire that the circuit does not have.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        n = circuit.n_wires
        if n > MAX_WIRES:
            raise Unsupported(
                f"backend 'statevector' keeps 4^n numbers a patch for noise and takes up to {MAX_WIRES} wires but the "
                f"kernel has {n} wires, {power_of_two(2 * n + 2)} bytes a patch in float32: use fewer wires"
                + ("" if n > MAX_WIRES_ELSEWHERE else ", or backend 'qiskit', which takes one patch after another")
                + ", or backend 'fourier' for a shallow circuit"
            )
        self.circuit = circuit
        self._prepared = bool(circuit.gates) and circuit.gates[0].name == AMPLITUDE
        gates = circuit.gates[1:] if self._prepared else circuit.gates
        seen = max((k + 1 for k, gate in enumerate(gates) if gate.depends_on("input")), default=0)
        self._head = [op for gate in gates[:seen] for op in noisy_ops(gate, noise)]
        self._tail = [op for gate in gates[seen:] for op in noisy_ops(gate, noise)] + readout_ops(circuit, noise)
        small = len(circuit.observables) * 4**n <= CHUNK_NUMBERS
        self._pulled = Coefficients(circuit, self._tail) if small else None
        digits = np.array([["IXYZ".index(letter) for letter in text] for text in circuit.observables])
        self._read = digits @ 4 ** np.arange(n)[::-1]

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        patches, pulled = len(inputs), None
        if self._pulled is not None and len(self.circuit.observables) < patches:
            pulled = self._pulled(weights).flatten(2)
        chunk = max(1, CHUNK_NUMBERS // (len(weights) * 4**self.circuit.n_wires))
        if patches <= chunk:
            return self._values(inputs, weights, pulled)
        # What a large batch goes through is cheaper to compute again than to keep.
        run = partial(checkpoint, self._values, use_reentrant=False) if torch.is_grad_enabled() else self._values
        return torch.cat([run(part, weights, pulled) for part in torch.split(inputs, chunk)])

    def _values(self, inputs: Tensor, weights: Tensor, pulled: Tensor | None) -> Tensor:
        strings = self._start(inputs, weights)
        for op in self._head:
            strings = apply_op(strings, op, inputs, weights)
        if pulled is None:
            for op in self._tail:
                strings = apply_op(strings, op, inputs, weights)
            values = strings.flatten(2)[..., torch.as_tensor(self._read, device=weights.device)]
        else:
            values = torch.einsum("pfi,foi->pfo", strings.flatten(2).expand(-1, len(weights), -1), pulled)
        return values.expand(len(inputs), len(weights), -1)

    def _start(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Pauli strings of the first state: (P or 1, F or 1, 4, ..., 4)."""
        n = self.circuit.n_wires
        if not self._prepared:
            ground = np.zeros((4,) * n)
            ground[(slice(None, None, 3),) * n] = 1.0  # <I> and <Z> of every wire
            return constant(ground, weights)[None, None]
        angles = [angle_value(angle, inputs, weights) for angle in self.circuit.gates[0].angles]
        shape = torch.Size([max(angle.shape[axis] for angle in angles) for axis in (0, 1)])
        state = normalized(torch.stack([angle.expand(shape) for angle in angles], dim=-1), 2**n)
        grid = (state[..., :, None] * state[..., None, :]).reshape(*shape, *(2,) * (2 * n))
        # The two bits of each wire side by side, as one digit of four.
        order = [2 + place for wire in range(n) for place in (wire, n + wire)]
        strings = torch.complex(grid, torch.zeros_like(grid)).permute(0, 1, *order).reshape(*shape, *(4,) * n)
        to_paulis = constant(_PAULIS_OF_BITS, weights)
        for wire in range(n):
            strings = (strings.movedim(2 + wire, -1) @ to_paulis.mT).movedim(-1, 2 + wire)
        return strings.real

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: operations before the last feature for every patch, the others once where patches are many."""
        size, observables = 4**self.circuit.n_wires, len(self.circuit.observables)
        runs, pull = patches * filters, self._pulled is not None and observables < patches
        total = device_counts(self.circuit, len(measurement_settings(self.circuit.observables)), runs, shots=None)
        for ops, times in ((self._head, runs), (self._tail, filters * observables if pull else runs)):
            for op in ops:
                total["mac:fp32*fp32"] += times * size * 4 ** len(op.wires)
        total["mac:fp32*fp32"] += runs * observables * size if pull else 0
        angles = sum(op.angle is not None and op.angle.source == "input" for op in self._head)
        total["mul:fp32"] += SINCOS_MULTIPLICATIONS * angles * patches
        total["add:fp32"] += SINCOS_MULTIPLICATIONS * angles * patches
        return +total


def apply_op(strings: Tensor, op: PauliOp, inputs: Tensor, weights: Tensor) -> Tensor:
    """One operation on the digits of its wires: (P or 1, F or 1, 4, ..., 4)."""
    even, cosine, sine = (constant(part, weights) for part in op.parts)
    matrix = even[None, None]
    if op.angle is not None:
        angle = angle_value(op.angle, inputs, weights)[..., None, None]
        matrix = even + torch.cos(angle) * cosine + torch.sin(angle) * sine
    source = [2 + wire for wire in op.wires]
    target = list(range(-len(source), 0))
    moved = strings.movedim(source, target)
    rows = moved.reshape(*moved.shape[:2], -1, matrix.shape[-1]) @ matrix.mT
    return rows.reshape(*rows.shape[:2], *moved.shape[2:]).movedim(target, source)
