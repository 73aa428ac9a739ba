"""What Qiskit's simulators, devices and samplers do not do, or only seem to: said before anything runs."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.primitives import BaseEstimatorV2, BaseSamplerV2
from qiskit.providers import BackendV2
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel as AerNoiseModel

from circuits.circuit import Circuit
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.clifford import check_fixed_gates
from qconv.backends.memory import machine_memory
from qconv.backends.protocol import Unsupported
from qconv.backends.qiskit_programs import REWRITTEN, noisy_gates, target_of

# Methods of AerSimulator that give neither expectation values nor counts of circuits with measurements.
_OTHERS = ("unitary", "superop")
# Those that run Clifford gates, and what else.
STABILIZER = {"stabilizer": (), "extended_stabilizer": ("T", "Tdg", "CCX", "CCZ")}


def check_arguments(method: Any, device: Any, noise_model: Any, executor: Any, circuits_a_job: Any) -> None:
    """Raise a ValueError for arguments of QiskitBackend that do not exist."""
    if method is not None and method not in AerSimulator().available_methods():
        known = ", ".join(m for m in AerSimulator().available_methods() if m not in _OTHERS)
        raise ValueError(f"Aer has no method {method!r} on this machine: choose from {known}")
    if method in _OTHERS:
        raise ValueError(
            f"Aer's method {method!r} computes matrices, no expectation values: use 'statevector' or 'density_matrix'"
        )
    if isinstance(device, BaseEstimatorV2) or (device is not None and "Estimator" in type(device).__name__):
        raise ValueError(
            f"device is a {type(device).__name__}: estimators of simulators add normal noise to exact values instead "
            "of sampling, so give the BackendV2 itself or a SamplerV2"
        )
    if device is not None and not isinstance(device, (str, BackendV2, BaseSamplerV2)):
        raise ValueError(f"device is a {type(device).__name__}: give a Qiskit BackendV2 or SamplerV2, 'CPU' or 'GPU'")
    if isinstance(device, BaseSamplerV2):
        _check_draws(device)
    if noise_model is not None and not isinstance(noise_model, (AerNoiseModel, BackendV2)):
        kind = (
            "our own, which is noise= of a layer or of simulate" if isinstance(noise_model, NoiseModel) else "no such"
        )
        raise ValueError(
            f"noise_model is a {type(noise_model).__name__} ({kind}): give a qiskit_aer NoiseModel or a BackendV2"
        )
    if executor is not None and not isinstance(executor, Executor):
        raise ValueError(
            f"executor is a {type(executor).__name__}: give a concurrent.futures Executor, such as "
            "ThreadPoolExecutor(2) or, of a Dask client, client.get_executor()"
        )
    whole = isinstance(circuits_a_job, int) and not isinstance(circuits_a_job, bool) and circuits_a_job >= 1
    if circuits_a_job is not None and not whole:
        raise ValueError(f"circuits_a_job is {circuits_a_job!r}: give a whole number of at least 1, or None")


def pairs_of(coupling_map: Any) -> list[list[int]]:
    """A coupling map as pairs of qubits.

    Raises:
        ValueError: It holds something else.
    """
    try:
        pairs = [[int(qubit) for qubit in pair] for pair in coupling_map]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise ValueError(
            f"coupling_map is {coupling_map!r}: give pairs of qubits that gates act on, such as [[0, 1], [1, 0]]"
        )
    return pairs


def _check_draws(sampler: BaseSamplerV2) -> None:
    """Raise a ValueError for a sampler that starts every job from the same seed."""
    options = getattr(sampler, "options", None)
    # Of Qiskit's and Aer's own samplers; of BackendSamplerV2; of Qiskit Runtime's; and of a simulator behind them.
    places = (
        getattr(sampler, "seed", None),
        getattr(options, "seed_simulator", None),
        getattr(getattr(options, "simulator", None), "seed_simulator", None),
        getattr(getattr(target_of(sampler), "options", None), "seed_simulator", None),
    )
    seed = next((place for place in places if isinstance(place, (int, np.integer))), None)
    if seed is not None:
        raise ValueError(
            f"device is a {type(sampler).__name__} with the seed {seed}, from which it draws the same shots in every "
            "job: give it none (StatevectorSampler: seed=numpy.random.default_rng(...)), or the simulator itself as "
            "device, of which seed= makes every job's shots repeatable"
        )


def check_sampler(sampler: BaseSamplerV2, seed: int | None) -> None:
    """Raise Unsupported where a sampler is asked for shots from a seed."""
    if seed is not None:
        raise Unsupported(
            f"seed={seed} was asked of a {type(sampler).__name__}, which draws from its own: leave it out, or give "
            "the BackendV2 itself as device"
        )


def check_errors(circuit: Circuit, runner: Any) -> None:
    """Raise Unsupported where errors of a simulator follow gates that are written as others."""
    gates = {gate.name.lower(): gate.name for gate in circuit.gates}
    if "cp" in gates:
        gates["cu1"] = gates["cp"]
    lost = sorted(gates.keys() & (noisy_gates(runner) or set()) & REWRITTEN)
    if lost:
        raise Unsupported(
            f"the noise model has errors of {', '.join(lost)}, which would not be run: Aer binds no angle of a "
            f"controlled rotation, so {', '.join(gates[name] for name in lost)} of this kernel is written as rotations "
            "of one qubit and cx. Give errors of those, or noise=NoiseModel(...) of qconv's"
        )


def check_options_of_aer(options: dict[str, Any], basis_gates: Any) -> None:
    """Raise a ValueError for a device, memory or gates that do not exist, which Qiskit would say only in the run."""
    devices = AerSimulator().available_devices()
    if options.get("device") not in (None, *devices):
        raise ValueError(
            f"Aer has no device {options['device']!r} on this machine: choose from {', '.join(devices)}, or give a "
            "BackendV2 object"
        )
    memory(options)
    gates = get_standard_gate_name_mapping()
    for gate in basis_gates or ():
        if gate not in gates:
            raise unknown("basis gate", gate, gates)


def check_sampling(circuit: Circuit, method: str, options: Any) -> None:
    """Raise Unsupported where Aer's extended stabilizer would sample by Metropolis steps.

    Its steps flip one bit at a time. Where entangling gates leave outcomes that differ in several bits, none of them
    leads from one to another, and counts are wrong (Qiskit Aer 0.18.2: half and half for H T H CNOT, which has 85% of
    00). Clifford circuits are sampled in another way.
    """
    sampling = options.extended_stabilizer_sampling_method
    if method == "extended_stabilizer" and sampling != "norm_estimation":
        found = next((gate.name for gate in circuit.gates if gate.name in STABILIZER[method]), None)
        if found is not None:
            raise Unsupported(
                f"extended_stabilizer_sampling_method is {sampling!r}, whose steps miss outcomes of circuits that "
                f"entangle, but the kernel has gate {found}: use 'norm_estimation'"
            )


def check_method(circuit: Circuit, method: str, shots: int | None, noisy: bool, noise: NoiseModel | None) -> None:
    """Raise Unsupported for what a method of AerSimulator does not run."""
    if method in STABILIZER:
        check_fixed_gates(circuit, method, STABILIZER[method])
        if noise is not None:
            raise Unsupported(
                f"Aer's method {method!r} runs no Kraus operators but noise was asked: use method "
                "'density_matrix', or a noise_model of qiskit_aer with Pauli errors"
            )
        if method == "extended_stabilizer" and shots is None:
            raise Unsupported(f"Aer's method {method!r} samples but shots=None (exact values) was asked: give shots")
    if noisy and shots is None and method != "density_matrix":
        raise Unsupported(
            f"Aer's method {method!r} samples noise but shots=None was asked: give shots, or method 'density_matrix'"
        )


def check_memory(wires: int, method: str, simulator: Any) -> None:
    """Raise Unsupported for a state that does not fit into memory."""
    options = {k: getattr(simulator.options, k, None) for k in ("precision", "max_memory_mb")}
    needed, available = state_bytes(wires, method, options), memory(options)
    if needed > available:
        raise Unsupported(
            f"Aer's method {method!r} keeps {needed:,} bytes for {wires} wires but {int(available):,} bytes of "
            "memory may be used (option max_memory_mb, or this machine's): use fewer wires, or method "
            "'matrix_product_state' for circuits of little entanglement"
        )


def state_bytes(wires: int, method: str, options: dict[str, Any]) -> int:
    """Memory of a state; 0 for methods whose states depend on the circuit."""
    amplitude = 8 if options.get("precision") == "single" else 16
    power = {"statevector": 1, "density_matrix": 2}.get(method)
    return 0 if power is None else amplitude * int(2 ** (power * wires))


def memory(options: dict[str, Any]) -> float:
    """Bytes that a simulation may use."""
    given = options.get("max_memory_mb")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0):
        raise ValueError(f"max_memory_mb is {given!r}: give a number of megabytes, or 0 for this machine's memory")
    return float(given) * 2**20 if given else machine_memory()
