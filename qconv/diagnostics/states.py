"""States of a kernel for many weights and patches at once: what every diagnostic is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import inf, pi
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Angle, Circuit, Gate
from circuits.gates import AMPLITUDE, Rotation
from circuits.readouts import Readout
from qconv.backends.angles import angle_value, normalized
from qconv.backends.computed import with_plain_features
from qconv.backends.statevector import MAX_WIRES
from qconv.layers import QuantumConv2d
from qconv.patches import pad, unfold

Kernel = Circuit | QuantumConv2d

# Sim, Johnson & Aspuru-Guzik draw all angles from [0, 2 pi).
PERIOD = 2 * pi
# Amplitudes that are evolved in one go: 2 MB, which stay in a processor's cache.
AMPLITUDES_A_CALL = 2**17


def circuit_of(kernel: Kernel, *, noisy: bool = False) -> Circuit:
    """The circuit of a kernel.

    Args:
        kernel: A circuit or a layer.
        noisy: Whether a layer may have noise; pure states have none.

    Raises:
        ValueError: For something else, more wires than a state vector holds, or noise.
    """
    circuit = kernel.circuit if isinstance(kernel, QuantumConv2d) else kernel
    if not isinstance(circuit, Circuit):
        raise ValueError(f"kernel is a {type(kernel).__name__}: give a circuits.Circuit or a QuantumConv2d")
    if isinstance(kernel, QuantumConv2d) and kernel.noise is not None and not noisy:
        raise ValueError("layer has noise but this is measured on pure states: give layer.circuit, which has none")
    if circuit.n_wires > MAX_WIRES:
        raise ValueError(
            f"kernel has {circuit.n_wires} wires but diagnostics keep 2^n amplitudes a sample and take up to "
            f"{MAX_WIRES}: diagnose fewer wires"
        )
    return circuit


def readout_of(kernel: Kernel) -> Readout | None:
    """What a layer's outputs are made of its expectation values; None where they are these.

    Raises:
        ValueError: For a readout that decides, which has neither slopes nor waves.
    """
    if not isinstance(kernel, QuantumConv2d) or kernel.readout.kind == "values":
        return None
    if kernel.readout.kind == "most_likely":
        raise ValueError(
            "layer has readout 'most_likely_ones', which has no gradient and is no polynomial: diagnose one with "
            "readout='probabilities'"
        )
    return kernel.readout


def patches_of(kernel: Kernel, data: Tensor | None) -> Tensor:
    """The patches that a kernel is diagnosed on.

    Args:
        kernel: A circuit or a layer.
        data: For a circuit its inputs (P, n_inputs); for a layer images (B, C, H, W), of which a circuit sees the
            channels of one group or, where channels run separately, of one channel. None for one patch of zeros, which
            angle encodings turn into the identity: what is diagnosed is then the trainable block alone.

    Returns:
        (P, n_inputs), float64.

    Raises:
        ValueError: For data that the kernel does not take, or that are no finite numbers.
    """
    circuit = circuit_of(kernel)
    if data is None:
        return torch.zeros(1, circuit.n_inputs, dtype=torch.float64)
    check_numbers("data", data)
    if isinstance(kernel, QuantumConv2d):
        if data.ndim != 4 or data.shape[1] != kernel.in_channels:
            raise ValueError(
                f"layer has {kernel.in_channels} input channels but data have shape {tuple(data.shape)}: give images "
                f"(batch, {kernel.in_channels}, height, width)"
            )
        padded = pad(data.detach().double(), kernel.geometry)
        # A circuit sees the channels of one group, or a single one where channels run separately.
        runs = kernel.in_channels * kernel.geometry.taps // circuit.n_inputs
        data = torch.cat([unfold(part, kernel.geometry) for part in padded.chunk(runs, dim=1)])
    if data.ndim != 2 or data.shape[1] != circuit.n_inputs or not len(data):
        raise ValueError(
            f"circuit takes {circuit.n_inputs} inputs but data have shape {tuple(data.shape)}: give "
            f"(patches, {circuit.n_inputs}) with at least one patch"
        )
    return data.detach().double().cpu()


def generator_of(seed: int | None) -> torch.Generator | None:
    """A generator of that seed; None stands for torch's global one."""
    if seed is not None:
        at_least("seed", seed, 0)
    return None if seed is None else torch.Generator().manual_seed(seed)


def numpy_generator(generator: torch.Generator | None) -> np.random.Generator:
    """A generator of numpy's that follows from torch's."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def check_numbers(name: str, values: object) -> None:
    """Raise a ValueError unless these are a tensor of real, finite numbers."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} are a {type(values).__name__}: give a torch.Tensor, such as torch.as_tensor({name})")
    if values.is_complex():
        raise ValueError(f"{name} are {values.dtype}: give real numbers")
    wrong = int((~torch.isfinite(values)).sum())
    if wrong:
        raise ValueError(f"{name} hold {wrong} numbers of {values.numel()} that are infinite or NaN: give finite ones")


def at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError unless a count is a whole number and large enough."""
    if not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name} is {value}: give at least {least}")


def check_level(level: float) -> None:
    """Raise a ValueError unless intervals can have this level."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a probability above 0 and below 1, such as 0.95")


def positive(name: str, value: float) -> None:
    """Raise a ValueError unless a number is finite and above 0."""
    if not 0 < value < inf:
        raise ValueError(f"{name} is {value}: give a finite number above 0")


def draw(
    circuit: Circuit, patches: Tensor, samples: int, period: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Random weights, uniform on [0, period), each with a patch drawn at random.

    Returns:
        Inputs (samples, n_inputs) and weights (samples, n_weights), float64.
    """
    positive("period", period)
    weights = period * torch.rand(samples, circuit.n_weights, dtype=torch.float64, generator=generator)
    chosen = torch.randint(len(patches), (samples,), generator=generator)
    return patches[chosen], weights


def parts(circuit: Circuit, samples: int, copies: int = 1) -> Iterator[slice]:
    """Slices of samples that are evolved together, each `copies` states large."""
    step = max(1, AMPLITUDES_A_CALL // (copies << circuit.n_wires))
    return (slice(start, start + step) for start in range(0, samples, step))


# Shapes below: a stack of states is (2^n, ..., B), samples last, so that each operation runs along them.


@cache
def _pauli_action(pauli: str, wires: tuple[int, ...], n: int) -> tuple[NDArray[np.int64], NDArray[np.complex128]]:
    """(P psi)_j = phase_j psi_(source_j): sources and phases of a Pauli string."""
    source, phase = np.arange(2**n), np.ones(2**n, dtype=complex)
    for letter, wire in zip(pauli, wires, strict=True):
        bit = np.arange(2**n) >> (n - 1 - wire) & 1
        if letter in "XY":
            source = source ^ (1 << (n - 1 - wire))
        if letter in "YZ":
            # Y |0> = i |1> and Z |1> = -|1>.
            phase = phase * (np.where(bit, 1j, -1j) if letter == "Y" else 1 - 2 * bit)
    return source, phase


def _apply_pauli(stack: Tensor, rotation: Rotation, gate: Gate, n: int) -> Tensor:
    source, phase = _pauli_action(rotation.pauli, gate.wires, n)
    factor = torch.from_numpy(phase).reshape(-1, *[1] * (stack.ndim - 1))
    return factor * (stack if set(rotation.pauli) <= {"I", "Z"} else stack[torch.from_numpy(source)])


def _rotate(stack: Tensor, rotation: Rotation, gate: Gate, n: int, angle: Tensor) -> Tensor:
    """exp(-i f a P / 2) for angles a (B,)."""
    half = angle * (rotation.factor / 2)
    return torch.cos(half) * stack - 1j * torch.sin(half) * _apply_pauli(stack, rotation, gate, n)


def _apply_fixed(stack: Tensor, gate: Gate, n: int) -> Tensor:
    matrix = torch.from_numpy(np.array(gate.spec.matrix(), dtype=complex))
    front = tuple(range(len(gate.wires)))
    grid = stack.reshape(*(2,) * n, -1).movedim(gate.wires, front)
    return (matrix @ grid.reshape(len(matrix), -1)).reshape(grid.shape).movedim(front, gate.wires).reshape(stack.shape)


def _value(angle: Angle, inputs: Tensor, weights: Tensor) -> Tensor:
    """(B,), or (1,) of a constant."""
    return angle_value(angle, inputs, weights).reshape(-1)


def _initial(circuit: Circuit, inputs: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Gate, ...]]:
    """The state before the first gate that is a unitary, and the gates from there on."""
    size = 2**circuit.n_wires
    if circuit.gates and circuit.gates[0].name == AMPLITUDE:
        features = torch.stack([_value(angle, inputs, weights) for angle in circuit.gates[0].angles], dim=-1)
        return normalized(features, size).to(torch.complex128).t(), circuit.gates[1:]
    state = torch.zeros(size, len(weights), dtype=torch.complex128)
    state[0] = 1
    return state, circuit.gates


def _plain(circuit: Circuit, inputs: Tensor) -> tuple[Circuit, Tensor]:
    """The circuit and its inputs after what is computed from features has been computed."""
    plain, preparation = with_plain_features(circuit)
    return plain, inputs if preparation is None else preparation(inputs)


def _check_rows(inputs: Tensor, weights: Tensor) -> None:
    check_numbers("inputs", inputs)
    check_numbers("weights", weights)


def states(circuit: Circuit, inputs: Tensor, weights: Tensor) -> Tensor:
    """The circuit's states, exact and differentiable.

    Args:
        circuit: Its observables do not matter.
        inputs: (B, n_inputs), float64.
        weights: (B, n_weights), float64: row k goes with row k of the inputs.

    Returns:
        (B, 2^n) amplitudes, complex128, up to a phase of each state.

    Raises:
        ValueError: For what is no tensor of real, finite numbers.
    """
    n = circuit.n_wires
    _check_rows(inputs, weights)
    circuit, inputs = _plain(circuit, inputs)
    state, gates = _initial(circuit, inputs, weights)
    for gate in gates:
        if not gate.angles:
            state = _apply_fixed(state, gate, n)
        for rotation in gate.spec.rotations:
            state = _rotate(state, rotation, gate, n, _value(gate.angles[rotation.angle], inputs, weights))
    return state.t()


def states_and_slopes(circuit: Circuit, inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """States, and their derivatives by each weight in the same sweep.

    The product rule, gate by gate: exp(-i f a P / 2) turns the state and all derivatives, and adds -i f a' P psi / 2 to
    the derivative by the weight that a reads, a' its scale.

    Args:
        circuit: As in `states`.
        inputs: As in `states`.
        weights: As in `states`.

    Returns:
        (B, 2^n) and (B, n_weights, 2^n).
    """
    n = circuit.n_wires
    _check_rows(inputs, weights)
    circuit, inputs = _plain(circuit, inputs)
    state, gates = _initial(circuit, inputs, weights)
    stack = torch.zeros(len(state), 1 + circuit.n_weights, len(weights), dtype=torch.complex128)
    stack[:, 0] = state
    for gate in gates:
        if not gate.angles:
            stack = _apply_fixed(stack, gate, n)
        for rotation in gate.spec.rotations:
            angle = gate.angles[rotation.angle]
            stack = _rotate(stack, rotation, gate, n, _value(angle, inputs, weights))
            if angle.source == "weight":
                slope = _apply_pauli(stack[:, 0], rotation, gate, n)
                stack[:, 1 + angle.index] -= 0.5j * rotation.factor * angle.scale * slope
    return stack[:, 0].t(), stack[:, 1:].permute(2, 1, 0)
