"""Amplitude encoding without states: every expectation value is a quadratic form of the patch.

The patch x is the state x / |x|, so <O> = x^T M x / x^T x with M = Re U^+ O U, a real symmetric matrix that depends on
the weights alone and is built once a call; noise that does not depend on data changes nothing but M. Without noise
there is a second way: where observables are measured together, the final state in their eigenbasis is one matrix times
x, and all of them are signed sums of the same squares. The way with fewer operations a patch is taken.

Source: Schuld, Supervised quantum machine learning models are kernel methods (arXiv:2101.11020): <O> = tr(rho(x) M).
"""

from __future__ import annotations

from collections import Counter
from functools import partial, reduce
from math import inf, prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import GATES, Matrix, pauli_matrix
from circuits.noise import NoiseModel
from qconv.backends.angles import evaluate_angles, features_of
from qconv.backends.contraction import CHUNK_NUMBERS, scaled
from qconv.backends.costs import Call, Work
from qconv.backends.fourier import Coefficients, Evolution, constant
from qconv.backends.kept import Kept
from qconv.backends.pauli_ops import Numbers, PauliOp, noisy_ops, readout_ops
from qconv.backends.protocol import Unsupported, check_call, device_counts, measurement_settings

MAX_WIRES = 8  # 256 features: 65,536 numbers an observable

# Rows are the eigenvectors of a Pauli matrix, that of +1 first.
_EIGENBASES: dict[str, Matrix] = {
    "I": np.eye(2, dtype=complex),
    "X": GATES["H"].matrix(),
    "Y": GATES["H"].matrix() @ GATES["Sdg"].matrix(),
    "Z": np.eye(2, dtype=complex),
}
_EIGENVALUES = {"I": np.array([1.0, 1.0])} | dict.fromkeys("XYZ", np.array([1.0, -1.0]))


class Matrices:
    """The matrices M of all observables, and x^T M x by one matrix product for all of them.

    Args:
        circuit: A state preparation, then gates that see no patch.
        noise: Channels after them.

    Source: Nielsen & Chuang, section 10.5.1, for Pauli strings as pairs of bit vectors.
    """

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        n, features = circuit.n_wires, len(features_of(circuit))
        self._observables = len(circuit.observables)
        block = [op for gate in circuit.gates[1:] for op in noisy_ops(gate, noise)]
        self._coefficients = Coefficients(circuit, block + readout_ops(circuit, noise))
        # X where m has ones, Z where z has, Y where both have: the string maps |j> to i^|m & z| (-1)^(z.j) |j xor m>.
        bits = (np.arange(2**n)[:, None] >> np.arange(n)[::-1]) & 1
        m, z = bits[:, None], bits[None]
        self._strings = ((m ^ z) + 2 * z) @ 4 ** np.arange(n)[::-1]  # its digits (I, X, Y, Z), read as one number
        # Strings with an odd number of Y are imaginary: a real state does not see them.
        self._phases = np.real(1j ** (m & z).sum(-1))
        self._parities = (-1.0) ** (bits @ bits[:features].T)
        column = np.arange(features)
        self._places = (column[:, None] ^ column) * features + column

    @staticmethod
    def shape(circuit: Circuit) -> tuple[int, int, int]:
        """Of what is built for one filter: (n_obs, features, features)."""
        features = len(features_of(circuit))
        return len(circuit.observables), features, features

    def multiplications(self, filters: int) -> int:
        """About how many `build` takes."""
        numbers = self._parities.size * len(self._strings) * self._observables
        return self._coefficients.multiplications(filters) + filters * numbers

    def build(self, weights: Tensor) -> Tensor:
        """(F, n_weights) -> (F, n_obs, features, features)."""
        c = self._coefficients(weights).flatten(2)
        c = c.index_select(2, torch.as_tensor(self._strings.ravel(), device=c.device))
        c = c.reshape(*c.shape[:2], *self._strings.shape) * constant(self._phases, c)
        by_mask = (c @ constant(self._parities, c)).flatten(2)  # (F, n_obs, (i xor j, j))
        matrices = by_mask.index_select(2, torch.as_tensor(self._places.ravel(), device=c.device))
        return matrices.reshape(*c.shape[:2], *self._places.shape)

    def values(self, matrices: Tensor, states: Tensor) -> Tensor:
        """x^T M x of each column x: (features, P) -> (F, n_obs, P)."""
        images = (matrices.flatten(0, 2) @ states).reshape(*matrices.shape[:3], -1)
        return (images * states).sum(2)

    @staticmethod
    def counts(circuit: Circuit, filters: int) -> Counter[str]:
        """Operations of `values` for one patch."""
        outputs, features = filters * len(circuit.observables), len(features_of(circuit))
        return Counter({"mac:fp32*fp32": outputs * (features + 1) * features})


class Squares:
    """The final state in the eigenbasis of each measurement setting, and values as signed sums of its squares.

    Args:
        circuit: A state preparation, then gates that see no patch.
    """

    def __init__(self, circuit: Circuit) -> None:
        self._features = len(features_of(circuit))
        settings = measurement_settings(circuit.observables)
        bases = np.concatenate([_kron(_EIGENBASES, basis) for basis, _ in settings])
        block = [op for gate in circuit.gates[1:] for op in unitary_ops(gate)]
        self._evolution = Evolution(bases.reshape(-1, *(2,) * circuit.n_wires), block)
        signs = np.zeros((len(circuit.observables), len(settings), 2**circuit.n_wires))
        for setting, (_, members) in enumerate(settings):
            for k in members:
                signs[k, setting] = _kron(_EIGENVALUES, circuit.observables[k])
        self._signs = np.tile(signs.reshape(len(signs), -1), 2)  # for the real parts, then the imaginary ones

    @staticmethod
    def shape(circuit: Circuit) -> tuple[int, int]:
        """Of what is built for one filter: (real numbers of the states, features)."""
        return 2 * 2**circuit.n_wires * len(measurement_settings(circuit.observables)), len(features_of(circuit))

    def multiplications(self, filters: int) -> int:
        """About how many `build` takes, four a complex one."""
        return 4 * self._evolution.multiplications(filters)

    def build(self, weights: Tensor) -> Tensor:
        """(F, n_weights) -> (F, real numbers of the states, features)."""
        rows = self._evolution(weights).flatten(2)[..., : self._features]
        return torch.cat([rows.real, rows.imag], dim=1)

    def values(self, rows: Tensor, states: Tensor) -> Tensor:
        """x^T M x of each column x: (features, P) -> (F, n_obs, P)."""
        amplitudes = (rows.flatten(0, 1) @ states).reshape(*rows.shape[:2], -1)
        return constant(self._signs, amplitudes) @ amplitudes.square()

    @staticmethod
    def counts(circuit: Circuit, filters: int) -> Counter[str]:
        """Operations of `values` for one patch."""
        (numbers, features), observables = Squares.shape(circuit), len(circuit.observables)
        return Counter(
            {
                "mac:fp32*fp32": filters * numbers * features,
                "mul:fp32": filters * numbers,
                "add:fp32": filters * numbers * observables,
            }
        )


def unitary_ops(gate: Gate) -> list[PauliOp]:
    """A gate as unitaries, up to a global phase, in the order of application."""
    if len(gate.wires) > 2:
        return [op for part in gate.parts() for op in unitary_ops(part)]
    if not gate.angles:
        matrix = gate.spec.matrix()
        return [PauliOp(gate.wires, (matrix, 0 * matrix, 0 * matrix))]
    ops = []
    for rotation in gate.spec.rotations:
        pauli = pauli_matrix(rotation.pauli)
        # exp(-i a P / 2) = cos(a / 2) - i sin(a / 2) P
        parts = (0 * pauli, np.eye(len(pauli), dtype=complex), -1j * pauli)
        ops.append(PauliOp(gate.wires, parts, gate.angles[rotation.angle].times(rotation.factor / 2)))
    return ops


def _kron(factors: dict[str, Numbers], letters: str) -> Numbers:
    return reduce(np.kron, [factors[letter] for letter in letters])


def directions(columns: Tensor) -> Tensor:
    """Patches (features, P) as states of any norm that is safe to square; see `angles.normalized`.

    A patch of zeros has no direction; by convention it becomes |0...0>, with gradient 0.
    """
    # Scaled by a constant, which changes neither a value nor its gradient but keeps the squares in range.
    largest = columns.detach().abs().amax(0)
    empty = largest == 0
    # Divided by infinity a patch of zeros stays as it is, and loses its gradient.
    states = columns / torch.where(empty, inf, largest)
    states[0] += empty
    return states


class QuadraticCompiled:
    """An amplitude-encoded circuit as quadratic forms.

    Args:
        circuit: A state preparation, then gates that see no patch; with at least one observable.
        noise: Channels after gates.

    Raises:
        Unsupported: For features in later gates, weights as amplitudes, or more than MAX_WIRES wires.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, noise: NoiseModel | None) -> None:
        self.circuit = circuit
        self._features = features_of(circuit)
        self._in_order = self._features == tuple(Angle("input", k) for k in range(circuit.n_inputs))
        self._check(noise)
        # The way with fewer operations a patch: matrices for very few observables, or many measurement settings.
        matrices, squares = (sum(way.counts(circuit, 1).values()) for way in (Matrices, Squares))
        self._form: Matrices | Squares = (
            Squares(circuit) if noise is None and squares < matrices else Matrices(circuit, noise)
        )
        self._build = Kept(self._built)

    def _built(self, weights: Tensor) -> Tensor:
        return self._form.build(weights)

    def _check(self, noise: NoiseModel | None) -> None:
        circuit = self.circuit
        who = "use 'statevector'" if noise is None else "use 'statevector' (up to 10 wires) or 'qiskit'"
        for position, gate in enumerate(circuit.gates[1:], 1):
            if gate.depends_on("input"):
                raise Unsupported(
                    f"an amplitude-encoded patch is a quadratic form but gate {position} ({gate.text()}) reads a "
                    f"feature again (re-uploading): {who}"
                )
        if circuit.gates[0].depends_on("weight"):
            raise Unsupported(
                f"an amplitude-encoded patch is a quadratic form but {circuit.gates[0].text()} has weights among the "
                "amplitudes: use 'pennylane'"
            )
        if circuit.n_wires > MAX_WIRES:
            raise Unsupported(
                f"quadratic forms of amplitudes have 4^n numbers an observable and take up to {MAX_WIRES} wires but "
                f"the kernel has {circuit.n_wires} wires, {4**circuit.n_wires:,} numbers: {who}"
            )

    def _columns(self, inputs: Tensor) -> Tensor:
        """Features (features, P) that become amplitudes."""
        if self._in_order:
            return inputs.t()
        return evaluate_angles(self._features, inputs, inputs.new_zeros(1, 0)).t()

    def _values(self, built: Tensor, columns: Tensor) -> Tensor:
        states = directions(columns)
        return self._form.values(built, states) / states.square().sum(0)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        built, columns = self._build(weights), self._columns(inputs)
        features, patches = columns.shape
        largest = max(1, built.numel() // features)
        chunk = max(256, CHUNK_NUMBERS // largest)
        if patches <= chunk:
            return self._values(built, columns).movedim(-1, 0)
        wide = torch.is_grad_enabled() and patches * largest > 32 * CHUNK_NUMBERS
        parts = []
        for part in torch.split(columns, chunk, dim=1):
            # The temporaries of many patches are cheaper to compute again than to keep.
            run = partial(checkpoint, self._values, use_reentrant=False) if wide else self._values
            parts.append(run(built, part))
        return torch.cat(parts, dim=-1).movedim(-1, 0)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled. The matrices are built once from the weights, not an inference."""
        features, outputs = len(self._features), filters * len(self.circuit.observables)
        # Scaled by the largest feature, and divided by the squared norm at the end.
        norm = Counter({"cmp:fp32": features, "mac:fp32*fp32": features, "mul:fp32": features + outputs})
        a_patch = norm + self._form.counts(self.circuit, filters)
        settings = len(measurement_settings(self.circuit.observables))
        return scaled(a_patch, patches) + device_counts(self.circuit, settings, patches * filters, shots=None)

    def work(self, call: Call) -> Work:
        """See costs.Priced."""
        return Work("quadratic form", self._form.multiplications(call.filters), kept=True)

    def stored_numbers(self, filters: int) -> int:
        """Numbers that inference reads: the matrices."""
        return filters * prod(self._form.shape(self.circuit))
