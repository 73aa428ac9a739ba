"""What every backend is: it compiles a circuit once and evaluates it on many patches."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.patches import Geometry

Real = NDArray[np.float64]
Plain = Callable[[Tensor, Tensor], Tensor]


class Unsupported(ValueError):
    """A backend cannot run what was asked; the message says who can."""


@runtime_checkable
class Compiled(Protocol):
    """A circuit ready to run.

    Args:
        differentiable: Whether autograd flows through `__call__` to inputs and weights. Where not,
            `qconv.gradients` wraps the backend in the parameter-shift rule.
    """

    differentiable: bool

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Expectation values: inputs (P, n_inputs), weights (F, n_weights) -> (P, F, n_obs), in [-1, 1]."""
        ...

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """Operations that one call on so many patches and filters runs, weights given (see qconv.energy)."""
        ...


@runtime_checkable
class Precomputed(Protocol):
    """A Compiled whose inference reads numbers built from the weights once, not the weights."""

    def stored_numbers(self, filters: int) -> int:
        """How many numbers it reads, for so many filters."""
        ...


@runtime_checkable
class Convolving(Protocol):
    """A Compiled that may take whole images, without a table of their patches."""

    def convolve(
        self, images: Tensor, weights: Tensor, geometry: Geometry, groups: int, outs: int, plain: Plain
    ) -> Tensor | None:
        """Convolve, or None where this does not apply.

        Args:
            images: (B, C, H, W), not padded.
            weights: (filters, n_weights).
            geometry: How the kernel moves.
            groups: Groups of channels.
            outs: Output channels a group.
            plain: The same function of (padded images, weights) in torch operations, for second derivatives.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """A way to evaluate circuits."""

    name: str

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> Compiled:
        """Do once what depends on the circuit alone.

        Args:
            circuit: With at least one observable, of plain features: those that are computed are taken care of before
                (see computed.py).
            shots: Samples a circuit; None for exact expectation values.
            noise: Channels after gates.
            seed: Makes sampling repeatable: the k-th call of a compiled circuit repeats under the same seed. None draws
                from torch's global generator, where the backend's sampler can be told.

        Raises:
            Unsupported: If this backend cannot run it; the message says who can.
        """
        ...


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch torch.autocast off on a tensor's device: half precision never enters a circuit."""
    # Asked first: a small layer takes some microseconds in all, and each question is one.
    if tensor.is_cpu:
        return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    device = tensor.device.type
    # Some devices, such as "meta", know no autocast at all.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def as_int(number: Any) -> Any:
    """A whole number of numpy's as Python's own, which simulators insist on; anything else as it is."""
    return int(number) if isinstance(number, np.integer) else number


def check_options(shots: int | None, noise: NoiseModel | None, seed: int | None) -> None:
    """Raise a ValueError unless shots, noise and seed are what every backend takes."""
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise ValueError(f"shots is {shots!r}: give a whole number of at least 1, or None for exact expectation values")
    if noise is not None and not isinstance(noise, NoiseModel):
        aer = type(noise).__module__.startswith("qiskit_aer")
        raise ValueError(
            f"noise is a {type(noise).__name__} of {type(noise).__module__.partition('.')[0]}: give a "
            "circuits.NoiseModel, or None for none"
            + ("; for this one take backend=load_backend('qiskit', noise_model=...)" if aer else "")
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ValueError(f"seed is {seed!r}: give a whole number of at least 0, or None")


def warn_of_idle_noise(circuit: Circuit, noise: NoiseModel | None, stacklevel: int = 3) -> None:
    """Warn where a noise model has channels, but none of them follows a gate of the circuit.

    A model may name more gates than a circuit has, such as all of a device, or every gate of one that has none.
    """
    if noise is None or not noise.after or any(entry[0] == "*" for entry in noise.after):
        return
    if any(noise.channels_after(gate) for gate in circuit.gates):
        return
    named = ", ".join(
        dict.fromkeys(entry[0] + (f" on wires {entry[2]}" if len(entry) == 3 else "") for entry in noise.after)
    )
    present = ", ".join(sorted({gate.name for gate in circuit.gates if gate.spec.n_wires is not None}))
    warnings.warn(
        f"noise follows {named}, which this circuit does not have, so that its channels do nothing: name gates that it "
        f"has ({present or 'none'}), or '*' for every gate",
        stacklevel=stacklevel,
    )


def check_call(circuit: Circuit, inputs: Tensor, weights: Tensor) -> None:
    """Raise an error for a circuit with computed features, or as `check_shapes`."""
    if circuit.features:
        raise Unsupported(
            f"circuit has {len(circuit.features)} angles that are computed from features, which backends leave to what "
            "calls them: use qconv.simulate, a layer, or qconv.gradients.compile_differentiable"
        )
    check_shapes(circuit, inputs, weights)


def check_shapes(circuit: Circuit, inputs: Tensor, weights: Tensor) -> None:
    """Raise a ValueError unless inputs are (P, n_inputs) and weights (F, n_weights), of one real dtype."""
    if inputs.ndim != 2 or inputs.shape[1] != circuit.n_inputs:
        raise ValueError(
            f"circuit takes {circuit.n_inputs} inputs but inputs have shape {tuple(inputs.shape)}: "
            f"give (patches, {circuit.n_inputs})"
        )
    if weights.ndim != 2 or weights.shape[1] != circuit.n_weights:
        raise ValueError(
            f"circuit takes {circuit.n_weights} weights but weights have shape {tuple(weights.shape)}: "
            f"give (filters, {circuit.n_weights})"
        )
    if inputs.dtype != weights.dtype or inputs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"inputs are {inputs.dtype} and weights {weights.dtype}: both must be torch.float32 or both torch.float64"
        )


def split_invalid(rows: Real) -> tuple[Real, NDArray[np.bool_]]:
    """Rows of angles for a simulator that samples: NaN and infinity replaced by 0, and which rows had them.

    A sampler would turn NaN into some plausible outcome; those rows' values are NaN, as on exact backends.
    """
    invalid = np.logical_not(np.isfinite(rows).all(axis=1), dtype=np.bool_)
    return np.where(invalid[:, None], 0.0, rows), invalid


@dataclass(frozen=True)
class CircuitSize:
    """What one execution of a circuit takes on a device, measurements left out.

    Args:
        gates_1q: Gates on one qubit.
        gates_2q: Gates on two.
        depth: Longest chain of gates that must run one after another.
    """

    gates_1q: int
    gates_2q: int
    depth: int


@runtime_checkable
class Sized(Protocol):
    """A Compiled that knows the circuits a device runs for it, one a measurement setting."""

    @property
    def sizes(self) -> tuple[CircuitSize, ...]:
        """Of each, the change of basis included."""
        ...


@runtime_checkable
class Composed(Protocol):
    """A Compiled whose values are made of those of others, which are what runs.

    Args:
        evaluates_again: Whether a backward pass runs the forward pass once more.
    """

    evaluates_again: bool

    @property
    def parts(self) -> tuple[tuple[Circuit, Compiled], ...]:
        """Each circuit with what evaluates it."""
        ...


@runtime_checkable
class Differentiating(Protocol):
    """A Compiled that knows what its gradients take."""

    method: str  # in a word

    def executions(self, patches: int, filters: int, *, inputs: bool = True) -> int:
        """Circuit evaluations of one forward and backward pass, each of which is measured in every setting."""
        ...


def circuit_size(circuit: Circuit) -> CircuitSize:
    """Of a circuit as it is written, gates on three wires taken apart, since devices have none."""
    gates = [part for gate in circuit.gates for part in (gate.parts() if len(gate.wires) > 2 else (gate,))]
    widths = [len(gate.wires) for gate in gates]
    return CircuitSize(widths.count(1), widths.count(2), replace(circuit, gates=tuple(gates)).depth())


def circuit_sizes(compiled: Compiled, circuit: Circuit) -> tuple[CircuitSize, ...]:
    """Of the circuits that a device runs for a compiled circuit, one a measurement setting of each of its parts."""
    if isinstance(compiled, Composed):
        return tuple(size for own, part in compiled.parts for size in circuit_sizes(part, own))
    if isinstance(compiled, Sized):
        return compiled.sizes
    return (circuit_size(circuit),) * len(measurement_settings(circuit.observables))


def device_counts(
    circuit: Circuit,
    settings: int,
    executions: int,
    shots: int | None,
    sizes: tuple[CircuitSize, ...] | None = None,
) -> Counter[str]:
    """What a quantum device would run: circuits, gates and shots for so many (patch, filter) pairs.

    Args:
        circuit: The kernel.
        settings: Measurement settings: groups of observables measured together.
        executions: (patch, filter) pairs.
        shots: Shots a circuit; None assumes DEVICE_SHOTS, since a device has no exact expectation values.
        sizes: Of the circuit of each setting where they are known; None for the circuit as it is written.
    """
    circuits = executions * settings
    sizes = sizes or (circuit_size(circuit),) * settings
    return +Counter(
        {
            "device:circuits": circuits,
            "device:gates_1q": executions * sum(size.gates_1q for size in sizes),
            "device:gates_2q": executions * sum(size.gates_2q for size in sizes),
            "device:shots": circuits * (shots or DEVICE_SHOTS),
        }
    )


# A standard error of at most 1/32 a value: what a device is assumed to spend where a layer itself is exact.
DEVICE_SHOTS = 1024


def measurement_settings(observables: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Group observables that one measurement serves.

    Args:
        observables: Pauli strings.

    Returns:
        Pairs (basis, members): a Pauli string to measure every wire in (I where no member cares), and the indices of
        the observables that are read off it. Greedy, in the order given.
    """
    groups: list[tuple[list[str], list[int]]] = []
    for index, observable in enumerate(observables):
        for basis, members in groups:
            if all(a in ("I", b) or b == "I" for a, b in zip(observable, basis, strict=True)):
                basis[:] = [a if a != "I" else b for a, b in zip(observable, basis, strict=True)]
                members.append(index)
                break
        else:
            groups.append((list(observable), [index]))
    return [("".join(basis), tuple(members)) for basis, members in groups]
