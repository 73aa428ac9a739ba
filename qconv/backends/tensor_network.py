"""Many wires: <psi|O|psi> contracted as a tensor network, or matrix product states of limited entanglement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.circuit import Circuit
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.chains import ChainCompiled
from qconv.backends.costs import Call, Work
from qconv.backends.matrix_products import Truncation
from qconv.backends.memory import machine_memory
from qconv.backends.networks import (
    FILTER,
    PATCH,
    TYPICAL_SIZES,
    Block,
    Contraction,
    Step,
    block_tensor,
    contract,
    contractions,
    distinct,
    largest,
    merge,
    multiplications,
    numbers,
)
from qconv.backends.protocol import Unsupported, check_call, check_options, device_counts, measurement_settings
from qconv.backends.statevector import MAX_WIRES, StatevectorBackend, StatevectorCompiled

METHODS = ("contraction", "mps")
KEPT_NUMBERS = 2**24  # of intermediate tensors that are held at a time, about
FEW_PATCHES = 16  # that are still worth a pass through all contractions
# Multiplications an observable below which a state vector is cheap enough not to search for a better order.
STATES_TO = 2**18


@lru_cache(maxsize=16)
def _contractions(circuit: Circuit, blocks: tuple[Block, ...], search: bool, stop: bool) -> tuple[Contraction, ...]:
    # Copies of a layer compile their circuits anew, and a search takes seconds on many wires.
    return tuple(contractions(circuit, blocks, machine_memory() / 24, search, stop))


class NetworkCompiled:
    """A circuit whose expectation values are contracted exactly, each from its own light cone; differentiable.

    Args:
        circuit: With at least one observable.
        search: Whether orders may be searched for, which takes seconds on many wires.
        states: Whether a state vector, the order gate after gate that all observables share, may be taken where it
            needs fewer multiplications.

    Raises:
        Unsupported: Where an intermediate tensor would not fit in memory, with its bytes.
    """

    differentiable = True
    truncation_error = Truncation()  # nothing is discarded

    def __init__(self, circuit: Circuit, states: bool = True, search: bool = True) -> None:
        self.circuit = circuit
        self._blocks = merge(circuit)
        self._states: StatevectorCompiled | None = None
        share = None
        if states and circuit.n_wires <= MAX_WIRES:
            self._states = StatevectorBackend.pure(circuit)
            patches, filters = TYPICAL_SIZES[PATCH], TYPICAL_SIZES[FILTER]
            work = self._states.plain_counts(patches, filters)["mac:fp32*fp32"] // 4
            share = work / patches / len(circuit.observables)
        # Where states could run instead, what all contractions take together is compared with them.
        search = search and (share is None or share > STATES_TO)
        self._contractions = _contractions(circuit, self._blocks, search, self._states is None)
        self._steps = distinct(self._contractions)
        if self._states is not None and multiplications(self._steps, patches, filters) <= work:
            self._states = None
        self._check_memory(8)

    def _check_memory(self, bytes_a_number: int) -> None:
        # Two tensors and what they are contracted to.
        needed, available = 3 * bytes_a_number * largest(self._steps), machine_memory()
        if self._states is None and needed > available:
            raise Unsupported(
                f"the best order found to contract this kernel of {self.circuit.n_wires} wires needs {needed:,} bytes "
                f"a patch but this machine has {int(available):,}: use fewer layers, or "
                "load_backend('tensor_network', max_bond=...), which truncates and says by how much"
            )

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        if self._states is not None:
            return self._states(inputs, weights)
        check_call(self.circuit, inputs, weights)
        self._check_memory(8 if weights.dtype == torch.float32 else 16)
        blocks = [block_tensor(block, inputs, weights) for block in self._blocks]
        patches, filters = len(inputs), len(weights)
        chunk = self._chunk(self._steps, filters)
        if chunk >= min(patches, FEW_PATCHES):
            return self._in_chunks(self._contractions, chunk, patches, filters, blocks)
        # Observables one by one, each with larger chunks: what all patches share is computed once a chunk.
        values = [
            self._in_chunks((one,), self._chunk([step for _, step in one.steps], filters), patches, filters, blocks)
            for one in self._contractions
        ]
        return torch.cat(values, dim=-1)

    @staticmethod
    def _chunk(steps: Sequence[Step], filters: int) -> int:
        """How many patches KEPT_NUMBERS serve, at least 1."""
        fixed = numbers(steps, 0, filters)
        return max(1, (KEPT_NUMBERS - fixed) // max(1, numbers(steps, 1, filters) - fixed))

    def _in_chunks(
        self, some: tuple[Contraction, ...], chunk: int, patches: int, filters: int, blocks: Sequence[Tensor]
    ) -> Tensor:
        """Values (P, F, observables) of some contractions."""
        parts = []
        for start in range(0, max(1, patches), chunk):
            size = min(chunk, patches - start)
            own = [
                tensor[start : start + size] if PATCH in block.depends else tensor
                for block, tensor in zip(self._blocks, blocks, strict=True)
            ]
            if torch.is_grad_enabled() and (chunk < patches or len(some) < len(self._contractions)):
                # Autograd keeps all intermediate tensors: of many patches they are computed again instead.
                parts.append(checkpoint(self._values, some, size, filters, *own, use_reentrant=False))
            else:
                parts.append(self._values(some, size, filters, *own))
        return torch.cat(parts)

    def _values(self, some: tuple[Contraction, ...], patches: int, filters: int, *blocks: Tensor) -> Tensor:
        # Kept for the observables that follow; of one alone there are none.
        shared: dict[int, Tensor] | None = {} if len(some) > 1 else None
        values = []
        for contraction in some:
            value = contract(contraction, blocks, shared).real
            value = value if PATCH in contraction.marks else value[None]
            value = value if FILTER in contraction.marks else value[:, None]
            values.append(value.expand(patches, filters))
        return torch.stack(values, dim=-1)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: what depends on the weights alone, once for all patches."""
        if self._states is not None:
            return self._states.counts(patches, filters)
        total = multiplications(self._steps, patches, filters)
        for block in self._blocks:
            runs = (patches if PATCH in block.depends else 1) * (filters if FILTER in block.depends else 1)
            total += (len(block.gates) - 1) * 8 ** min(2, len(block.wires)) * runs
        settings = len(measurement_settings(self.circuit.observables))
        return Counter({"mac:fp32*fp32": 4 * total}) + device_counts(
            self.circuit, settings, patches * filters, shots=None
        )

    def work(self, call: Call) -> Work:
        """See costs.Priced: all multiplications are in `counts`."""
        return self._states.work(call) if self._states is not None else Work("network", 0, kept=False)


class TensorNetworkBackend:
    """Tensor networks in torch: shallow circuits on many wires exactly, deep ones with a truncation that is reported.

    By default values are exact and autograd flows through the contraction. With `max_bond` or `cutoff`, or with shots,
    a matrix product state runs; its gradients are parameter shifts, and `compiled.truncation_error`, or
    `layer.truncation_error`, says what the last evaluation discarded.

    Args:
        method: "contraction" of <psi|O|psi> (in the order of a state vector where that is cheapest and no method is
            named), or "mps"; None for contraction unless max_bond, cutoff or shots ask for a state.
        max_bond: Largest bond of the matrix product state, at least 1; None for any.
        cutoff: Weight, in [0, 1), that each truncation may discard of a state of norm 1.

    Raises:
        ValueError: For other values, or a truncation of a contraction.
    """

    name = "tensor_network"

    def __init__(self, method: str | None = None, *, max_bond: int | None = None, cutoff: float = 0.0) -> None:
        if method is not None and method not in METHODS:
            raise unknown("method", method, METHODS)
        if max_bond is not None and (isinstance(max_bond, bool) or not isinstance(max_bond, int) or max_bond < 1):
            raise ValueError(f"max_bond is {max_bond!r}: give a whole number of at least 1, or None for any")
        if isinstance(cutoff, bool) or not isinstance(cutoff, (int, float)) or not 0 <= cutoff < 1:
            raise ValueError(f"cutoff is {cutoff!r}: give a weight in [0, 1)")
        truncates = max_bond is not None or cutoff > 0
        if truncates and method == "contraction":
            raise ValueError(
                f"method 'contraction' was given max_bond={max_bond} and cutoff={cutoff} but discards nothing: use "
                "method 'mps', or give neither"
            )
        self.method = "mps" if truncates else method
        self.max_bond, self.cutoff = max_bond, float(cutoff)

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> NetworkCompiled | ChainCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if noise is not None:
            raise Unsupported(
                "backend 'tensor_network' has pure states and no noise: use backend 'fourier' for a shallow circuit, "
                "'statevector' or 'pennylane' on few wires, or 'qiskit' with shots and "
                "method='matrix_product_state' on many"
            )
        if shots is not None and self.method == "contraction":
            raise Unsupported("method 'contraction' gives no bitstrings: use method 'mps' of backend 'tensor_network'")
        if shots is None and self.method != "mps":
            return NetworkCompiled(circuit, states=self.method is None)
        return ChainCompiled(circuit, max_bond=self.max_bond, cutoff=self.cutoff, shots=shots, seed=seed)
