"""Shallow circuits on many wires: a product-encoded kernel as sums of products, contracted wire by wire.

<O> = sum_P c_P(theta) prod_j b_{P_j}(x_j) as in fourier.py, but c is never formed: it is a tensor train whose cores
are sparse, and what is left of the contraction is a program of sums (sweeps.py). It runs in compiled loops where the
`fast` extra is installed (fused_trains.py), in torch operations otherwise.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends import fused_trains, operators
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS, scaled
from qconv.backends.costs import Call, Work
from qconv.backends.kept import Kept
from qconv.backends.pauli_ops import split_encoding
from qconv.backends.protocol import Plain, check_call, device_counts, measurement_settings
from qconv.backends.sums import ONE
from qconv.backends.sweeps import Contraction, contract
from qconv.patches import Geometry

CHUNK_NUMBERS = 2**21  # of all sums of a chunk of patches, about


@lru_cache(maxsize=16)
def _contraction(circuit: Circuit, noise: NoiseModel | None) -> Contraction:
    # Copies of a layer compile their circuits anew.
    return contract(circuit, *split_encoding(circuit, noise))


class TrainCompiled:
    """A product-encoded circuit as a program of sums.

    Raises:
        Unsupported: For another encoding, or where the contraction takes too many sums.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        self.circuit = circuit
        self._contraction = _contraction(circuit, noise)
        self._kept = Kept(self.coefficients)
        self.fused = fused_trains.register(self._contraction, f"{circuit.text()}{noise}")

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        values = fused_trains.evaluate(self.fused, inputs, weights, len(self.circuit.observables), self.plain)
        return self.plain(inputs, weights) if values is None else values

    def convolve(
        self, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
    ) -> Tensor | None:
        """See Convolving."""
        return operators.convolve(self.fused, images, weights, geometry, groups, outs, plain)

    def plain(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """The same in torch operations."""
        program, columns = self._contraction.patches, inputs.t()
        coefficients = self._kept(weights)
        numbers = len(weights) * (program.first + len(program.sums))
        chunk = max(256, CHUNK_NUMBERS // numbers)
        if columns.shape[1] <= chunk:
            return program(columns, coefficients).movedim(-1, 0)
        parts = []
        for start in range(0, columns.shape[1], chunk):
            part = columns[:, start : start + chunk]
            if torch.is_grad_enabled() and columns.shape[1] > 32 * chunk:
                # The sums of a large batch are cheaper to compute again than to keep.
                parts.append(checkpoint(program, part, coefficients, use_reentrant=False))
            else:
                parts.append(program(part, coefficients))
        return torch.cat(parts, dim=-1).movedim(-1, 0)

    def coefficients(self, weights: Tensor) -> Tensor:
        """What depends on the weights alone: weights (F, n_weights) -> (F, numbers)."""
        constants = torch.from_numpy(self._contraction.constants[None]).to(weights)
        return self._contraction.weights(weights.t(), constants)[0].t()

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled. The coefficients are built once from the weights, not an inference."""
        program = self._contraction.patches
        terms = [term for sum_ in program.sums for term in sum_]
        angles = len(program.waves)
        sincos = SINCOS_MULTIPLICATIONS * angles
        a_patch = Counter(
            {
                "mac:fp32*fp32": filters * len(terms),
                # Of two operands, one is multiplied with the coefficient first.
                "mul:fp32": filters * sum(b != ONE for _, _, b in terms) + sincos + angles,
                "add:fp32": sincos,
            }
        )
        settings = len(measurement_settings(self.circuit.observables))
        return scaled(a_patch, patches) + device_counts(self.circuit, settings, patches * filters, shots=None)

    def work(self, call: Call) -> Work:
        """See costs.Priced."""
        compiled = self.fused is not None and call.device == "cpu"
        built = sum(1 + (b != ONE) for sum_ in self._contraction.weights.sums for _, _, b in sum_)
        return Work("compiled train" if compiled else "train", call.filters * built, kept=True)

    def stored_numbers(self, filters: int) -> int:
        """Coefficients that inference reads."""
        return filters * self._contraction.patches.coefficients
