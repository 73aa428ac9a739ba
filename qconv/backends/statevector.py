"""Exact simulation: a batch of state vectors in torch, differentiable by autograd."""

from collections import Counter
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Circuit, Gate
from circuits.gates import AMPLITUDE, Matrix, pauli_matrix
from circuits.noise import NoiseModel
from qconv.backends import fused_states
from qconv.backends.angles import angle_value, normalized
from qconv.backends.costs import Call, Work
from qconv.backends.density import DensityCompiled
from qconv.backends.memory import power_of_two
from qconv.backends.outcomes import Distribution, FromStrings, Setting
from qconv.backends.protocol import Unsupported, check_call, check_options, device_counts, measurement_settings
from qconv.backends.sampling import SampledCompiled, check_gradient, free_angles
from qconv.backends.uploads import Uploads

MAX_WIRES = 20  # 8 MB a patch in complex64
MAX_WIRES_ONE_BY_ONE = 28  # 4 GB in Qiskit's complex128

# Shapes: a state is (P or 1, F or 1, 2**n), a matrix (P or 1, F or 1, d, d); 1 where nothing depends on the
# patch or the filter yet, so that work shared between patches is done once.


# Constants are cached as numpy arrays, not tensors: a tensor first made under torch.inference_mode could not be
# used in training later.
_pauli = cache(pauli_matrix)


def _constant(pauli: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(_pauli(pauli), dtype=dtype, device=device)


def gate_matrix(gate: Gate, inputs: Tensor, weights: Tensor) -> Tensor:
    """Matrix of a gate, up to a global phase: (P or 1, F or 1, d, d), complex."""
    dtype = torch.complex64 if weights.dtype == torch.float32 else torch.complex128
    spec = gate.spec
    if not gate.angles:
        return torch.as_tensor(spec.matrix(), dtype=dtype, device=weights.device)[None, None]
    angles = [angle_value(angle, inputs, weights) for angle in gate.angles]
    identity = _constant("I" * len(gate.wires), dtype, weights.device)
    result = None
    for rotation in spec.rotations:
        half = (angles[rotation.angle] * (rotation.factor / 2))[..., None, None]
        factor = torch.cos(half) * identity - 1j * torch.sin(half) * _constant(rotation.pauli, dtype, weights.device)
        result = factor if result is None else factor @ result
    assert result is not None
    return result


def apply_gate(state: Tensor, gate: Gate, n_wires: int, inputs: Tensor, weights: Tensor) -> Tensor:
    """Apply one gate to a batch of states."""
    if not gate.angles and _is_permutation(gate.name):
        return state[..., torch.as_tensor(_permutation(gate, n_wires), device=state.device)]
    matrix = gate_matrix(gate, inputs, weights)
    if len(gate.wires) == 1:
        (wire,) = gate.wires
        zero, one = state.reshape(*state.shape[:2], 2**wire, 2, 2 ** (n_wires - wire - 1)).unbind(-2)
        m = matrix[..., None, None]
        rows = [m[:, :, i, 0] * zero + m[:, :, i, 1] * one for i in (0, 1)]
        return torch.stack(rows, dim=-2).flatten(2)
    # Bring the gate's wires to the end, multiply, and bring them back.
    source = [2 + wire for wire in gate.wires]
    target = list(range(-len(source), 0))
    grid = state.reshape(*state.shape[:2], *(2,) * n_wires).movedim(source, target)
    turned = grid.reshape(*state.shape[:2], -1, 2 ** len(source)) @ matrix.mT
    return turned.reshape(*turned.shape[:2], *(2,) * n_wires).movedim(target, source).flatten(2)


@cache
def _is_permutation(name: str) -> bool:
    return name in ("X", "CNOT", "SWAP", "CCX", "CSWAP")


@cache
def _permutation(gate: Gate, n_wires: int) -> NDArray[np.int64]:
    index = np.arange(2**n_wires).reshape((2,) * n_wires)
    grid = np.moveaxis(index, gate.wires, range(len(gate.wires))).reshape(2 ** len(gate.wires), -1)
    moved = np.real(gate.spec.matrix()).astype(int) @ grid
    shape = (2,) * n_wires
    return np.moveaxis(moved.reshape(shape), range(len(gate.wires)), gate.wires).ravel()


def expectations(state: Tensor, observables: tuple[str, ...]) -> Tensor:
    """Expectation values of Pauli strings: (P, F, 2**n) -> (P, F, n_obs), real.

    A Pauli string maps |i> to phase(i) |i xor m>; strings with the same mask m share the products of amplitudes.
    """
    masks: dict[int, list[int]] = {}
    for k, observable in enumerate(observables):
        masks.setdefault(int("".join("01"[letter in "XY"] for letter in observable), 2), []).append(k)
    values: list[Tensor | None] = [None] * len(observables)
    index = np.arange(state.shape[-1])
    for mask, members in masks.items():
        phases = np.stack([_phases(observables[k]) for k in members], axis=-1)
        if mask == 0:
            density = state.real.square() + state.imag.square()
            part = density @ torch.as_tensor(phases.real, dtype=density.dtype, device=state.device)
        else:
            partner = torch.as_tensor(index ^ mask, device=state.device)
            products = state[..., partner].conj() * state
            part = (products @ torch.as_tensor(phases, dtype=state.dtype, device=state.device)).real
        for k, value in zip(members, part.unbind(-1), strict=True):
            values[k] = value
    return torch.stack([value for value in values if value is not None], dim=-1)


@cache
def _phases(observable: str) -> Matrix:
    phases = np.ones(1, dtype=complex)
    for letter in observable:
        phases = np.kron(phases, {"I": [1, 1], "X": [1, 1], "Y": [1j, -1j], "Z": [1, -1]}[letter])
    return phases


class StatevectorCompiled:
    """A circuit simulated exactly.

    Attributes:
        fused: Its key for fused_states, or None where that does not apply.
    """

    differentiable = True

    def __init__(self, circuit: Circuit) -> None:
        self.circuit = circuit
        data = [k for k, gate in enumerate(circuit.gates) if gate.depends_on("input")]
        # After the last gate that sees the patch, all patches go through the same unitary.
        self._split = data[-1] + 1 if data else 0
        self._uploads = Uploads.of(circuit)
        self.fused = fused_states.register(circuit)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        values = fused_states.evaluate(self.fused, inputs, weights, self._plain)
        return self._plain(inputs, weights) if values is None else values

    def _plain(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """In torch operations."""
        values = expectations(self.states(inputs, weights), self.circuit.observables)
        return values.expand(len(inputs), len(weights), -1)

    def states(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Final states, up to global phases: (P or 1, F or 1, 2^n), complex."""
        circuit = self.circuit
        n, size = circuit.n_wires, 2**circuit.n_wires
        dtype = torch.complex64 if weights.dtype == torch.float32 else torch.complex128
        state = torch.zeros(1, 1, size, dtype=dtype, device=weights.device)
        state[..., 0] = 1
        if self._uploads is not None and size <= len(inputs):
            return self._by_uploads(self._uploads, state, inputs, weights)
        for gate in circuit.gates[: self._split]:
            if gate.name == AMPLITUDE:
                features = torch.cat([angle_value(angle, inputs, weights) for angle in gate.angles], dim=-1)
                state = normalized(features, size)[:, None].to(dtype)
            else:
                state = apply_gate(state, gate, n, inputs, weights)
        tail = circuit.gates[self._split :]
        if size <= len(inputs) and tail:
            # Fewer basis states than patches: evolve the basis once, then one matrix product serves all patches.
            basis = torch.eye(size, dtype=dtype, device=weights.device)[:, None]
            for gate in tail:
                basis = apply_gate(basis, gate, n, inputs, weights)
            filters = max(state.shape[1], basis.shape[1])
            state = torch.einsum("pfi,ifj->pfj", state.expand(-1, filters, -1), basis.expand(-1, filters, -1))
        else:
            for gate in tail:
                state = apply_gate(state, gate, n, inputs, weights)
        return state

    def _by_uploads(self, plan: Uploads, state: Tensor, inputs: Tensor, weights: Tensor) -> Tensor:
        """The final state where there are fewer basis states than patches: blocks are built on the basis, once."""
        n = self.circuit.n_wires
        for gate in plan.blocks[0]:
            state = apply_gate(state, gate, n, inputs, weights)
        # From here on (F or 1, P or 1, 2^n); V^+ psi is the row psi times conj(V).
        bases = [torch.from_numpy(upload.basis(n)).to(state) for upload in plan.uploads]
        state = state.transpose(0, 1) @ bases[0].conj()
        phases = {upload: upload.phases(inputs, n) for upload in dict.fromkeys(plan.uploads)}
        for k, upload in enumerate(plan.uploads):
            rows = bases[k].mT[:, None]
            for gate in plan.blocks[k + 1]:
                rows = apply_gate(rows, gate, n, inputs, weights)
            block = rows.transpose(0, 1)
            if k + 1 < len(bases):
                block = block @ bases[k + 1].conj()
            state = (state * phases[upload]) @ block
        return state.transpose(0, 1)

    def work(self, call: Call) -> Work:
        """See costs.Priced: what is built from the weights is in `counts`, and is built anew each time."""
        return Work("compiled states" if self.fused is not None and call.device == "cpu" else "states", 0, kept=False)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: mirrors `__call__`, gates that see no patch once for all of them."""
        size = 2**self.circuit.n_wires
        settings = len(measurement_settings(self.circuit.observables))
        total = device_counts(self.circuit, settings, patches * filters, shots=None)
        if self.fused is not None:
            return total + fused_states.program(self.fused).counts(patches, filters)
        shared = not any(gate.depends_on("weight") for gate in self.circuit.gates)
        if shared and not (self._uploads is not None and size <= patches):
            filters = 1
        readout = readout_counts(size, len(self.circuit.observables), patches * filters)
        return total + self.plain_counts(patches, filters) + readout

    def plain_counts(self, patches: int, filters: int) -> Counter[str]:
        """Operations of `states`."""
        size, total = 2**self.circuit.n_wires, Counter[str]()
        if self._uploads is not None and size <= patches:
            return self._uploads.counts(size, patches, filters)
        head, tail = self.circuit.gates[: self._split], self.circuit.gates[self._split :]
        seen = per_filter = False
        for gate in head:
            seen, per_filter = seen or gate.depends_on("input"), per_filter or gate.depends_on("weight")
            runs = (patches if seen else 1) * (filters if per_filter else 1)
            total += gate_counts(gate, size, runs)
        per_filter = per_filter or any(gate.depends_on("weight") for gate in tail)
        runs = patches * (filters if per_filter else 1)
        if size <= patches and tail:
            for gate in tail:
                total += gate_counts(gate, size, size * filters)
            total["mac:fp32*fp32"] += 4 * size * size * runs
        else:
            for gate in tail:
                total += gate_counts(gate, size, runs)
        return total


def gate_counts(gate: Gate, size: int, runs: int) -> Counter[str]:
    """Real multiply-accumulates of one gate on `runs` states of `size` numbers, four a complex product.

    A permutation moves numbers and multiplies none; a state preparation normalizes its features.
    """
    if gate.name == AMPLITUDE:
        return Counter({"mac:fp32*fp32": len(gate.angles) * runs, "mul:fp32": len(gate.angles) * runs})
    if not gate.angles and _is_permutation(gate.name):
        return Counter()
    return Counter({"mac:fp32*fp32": 4 * size * 2 ** len(gate.wires) * runs})


def simulation_counts(circuit: Circuit, runs: int, noisy: bool) -> Counter[str]:
    """What a simulator runs that takes every patch and filter gate by gate.

    Args:
        circuit: The kernel.
        runs: (patch, filter) pairs.
        noisy: Whether it holds a density matrix: 4^n numbers, each gate from both sides.
    """
    size = 2**circuit.n_wires
    total = readout_counts(size, len(circuit.observables), runs)
    for gate in circuit.gates:
        total += gate_counts(gate, size, runs * (2 * size if noisy else 1))
    return total


def readout_counts(size: int, observables: int, runs: int) -> Counter[str]:
    """Squares of the amplitudes and their signed sums."""
    return Counter({"mac:fp32*fp32": 2 * size * runs, "add:fp32": observables * size * runs})


class StateOutcomes:
    """Probabilities of measured bits from state vectors; see sampling.Distribution.

    Args:
        states: The circuit.
        settings: Its measurement settings.
    """

    def __init__(self, states: StatevectorCompiled, settings: Sequence[Setting]) -> None:
        self._states, self.circuit, self._settings = states, states.circuit, settings
        self.numbers = 2 * 2**self.circuit.n_wires

    def probabilities(self, inputs: Tensor, weights: Tensor) -> list[Tensor]:
        """See Distribution."""
        states, result = self._states.states(inputs, weights), []
        for setting in self._settings:
            turned = states
            for gate in _basis_change(setting.basis):
                turned = apply_gate(turned, gate, self.circuit.n_wires, inputs, weights)
            squares = turned.real.square() + turned.imag.square()
            if not np.array_equal(setting.outcome_of_bits, np.arange(squares.shape[-1])):
                index = torch.as_tensor(setting.outcome_of_bits, device=squares.device)
                squares = squares.new_zeros(*squares.shape[:2], setting.outcomes).index_add_(-1, index, squares)
            result.append(squares.expand(len(inputs), len(weights), -1))
        return result

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Distribution."""
        size, runs = 2**self.circuit.n_wires, patches * filters
        total = self._states.plain_counts(patches, filters)
        for setting in self._settings:
            total += readout_counts(size, 0, runs) + Counter({"add:fp32": size * runs})
            for gate in _basis_change(setting.basis):
                total += gate_counts(gate, size, runs)
        return total


def _basis_change(basis: str) -> list[Gate]:
    """Gates behind which Z measures a Pauli string."""
    names = {"X": ("H",), "Y": ("Sdg", "H")}
    return [Gate(name, (wire,)) for wire, letter in enumerate(basis) for name in names.get(letter, ())]


class StatevectorBackend:
    """Batched state vectors in torch: any circuit, exact or sampled, differentiable.

    Noise takes density matrices in Pauli strings, 4^n numbers a patch.

    Args:
        gradient: Of values sampled with shots: "parameter-shift", as a device gives it, from shots too; or "exact",
            that of the exact values, which is much cheaper and which no device has.

    Raises:
        ValueError: For an unknown gradient.
    """

    name = "statevector"

    def __init__(self, gradient: str = "parameter-shift") -> None:
        self.gradient = check_gradient(gradient)

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> StatevectorCompiled | DensityCompiled | SampledCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if shots is None:
            return self._exact(circuit, noise)
        settings, free = Setting.of(circuit.observables), free_angles(circuit)
        distribution: Distribution = (
            StateOutcomes(self.pure(free), settings)
            if noise is None
            else FromStrings(free, settings, partial(self._exact, noise=noise), self.name, 4**circuit.n_wires)
        )
        exact = self._exact(circuit, noise) if self.gradient == "exact" else None
        return SampledCompiled(circuit, distribution, settings, shots=shots, seed=seed, exact=exact)

    @classmethod
    def _exact(cls, circuit: Circuit, noise: NoiseModel | None) -> StatevectorCompiled | DensityCompiled:
        return cls.pure(circuit) if noise is None else DensityCompiled(circuit, noise)

    @staticmethod
    def pure(circuit: Circuit) -> StatevectorCompiled:
        """A circuit without shots and noise.

        Raises:
            Unsupported: For more than MAX_WIRES wires.
        """
        if circuit.n_wires > MAX_WIRES:
            one_by_one, size = circuit.n_wires <= MAX_WIRES_ONE_BY_ONE, power_of_two(circuit.n_wires + 3)
            raise Unsupported(
                f"backend 'statevector' keeps 2^n amplitudes a patch and takes up to {MAX_WIRES} wires but the kernel "
                f"has {circuit.n_wires} wires, {size} bytes a patch: use fewer (in a layer: a "
                "smaller kernel_size, more groups, or encoding='amplitude')"
                + (", or backend 'qiskit', which takes one patch after another" if one_by_one else "")
            )
        return StatevectorCompiled(circuit)
