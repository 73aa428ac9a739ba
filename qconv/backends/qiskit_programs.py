"""From circuits to what Qiskit runs: built and transpiled once, with the readout that shots or exact values need."""

from __future__ import annotations

from typing import Any

from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.primitives import BaseSamplerV2
from qiskit.providers import BackendV2
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_aer.noise import NoiseModel as AerNoiseModel

from circuits.circuit import Circuit
from circuits.interop.qiskit import append_measurement, build_qiskit, qiskit_observable
from circuits.noise import NoiseModel, ReadoutError
from qconv.backends.angles import angles_of, features_of
from qconv.backends.protocol import CircuitSize, Unsupported, measurement_settings
from qconv.backends.qiskit_runs import Program

# Aer (to 0.18.2) silently drops the bound parameter of a controlled rotation (Qiskit/qiskit-aer issues 2323 and 2403),
# so these are written as one-wire rotations and CNOTs.
_UNBINDABLE = {"crx", "cry", "crz", "cp", "cu1"}


def prepared_angles(circuit: Circuit) -> int:
    """Angles of the gates that prepare an amplitude encoding."""
    return int(2**circuit.n_wires) - 1 if features_of(circuit) else 0


def template(circuit: Circuit, noise: NoiseModel | None) -> tuple[QuantumCircuit, tuple[Any, ...]]:
    """A circuit without readout, every angle a parameter of its own: those of the state preparation first."""
    parameters = tuple(ParameterVector("a", prepared_angles(circuit) + len(angles_of(circuit))))
    base = build_qiskit(circuit, list(parameters), noise)
    while set(base.count_ops()) & _UNBINDABLE:
        base = base.decompose(gates_to_decompose=list(_UNBINDABLE))
    return base, parameters


def measured_program(
    circuit: Circuit, noise: NoiseModel | None, target: Any, name: str, options: dict[str, Any]
) -> Program:
    """Every measurement setting as a circuit that ends in measurements.

    Args:
        circuit: The kernel.
        noise: Channels and errors of the readout as Kraus instructions; None for none.
        target: A backend to transpile for; None for none.
        name: Of the target, for messages.
        options: Of qiskit.transpile; empty for none.
    """
    base, parameters = template(circuit, noise)
    settings = measurement_settings(circuit.observables)
    circuits = []
    for basis, _ in settings:
        measured = base.copy()
        append_measurement(measured, basis, noise)
        circuits.append(measured)
    members = tuple(members for _, members in settings)
    masks = tuple(tuple(_mask(circuit.observables[k]) for k in group) for group in members)
    done = transpiled(circuits, circuit, target, name, options)
    return Program(tuple(done), parameters, members, masks, len(circuit.observables))


def exact_program(
    circuit: Circuit,
    noise: NoiseModel | None,
    readout: dict[int, ReadoutError] | None,
    target: Any,
    name: str,
    options: dict[str, Any],
) -> Program:
    """Circuits that save the expectation values of their observables.

    Args:
        circuit: The kernel.
        noise: Ours; None for none.
        readout: Errors by physical qubit where noise is the simulator's own: there, the change of basis is made of
            gates, which are noisy too, so that these are the means of what shots sample. None for no such noise.
        target: See measured_program.
        name: See measured_program.
        options: See measured_program.
    """
    base, parameters = template(circuit, noise)
    observables = circuit.observables
    settings = [("I" * circuit.n_wires, tuple(range(len(observables))))]
    if readout is not None:
        settings = measurement_settings(observables)
        observables = tuple("".join("IZ"[letter != "I"] for letter in text) for text in observables)
    circuits = []
    for basis, _ in settings:
        turned = base.copy()
        append_measurement(turned, basis)
        turned.remove_final_measurements()
        circuits.append(turned)
    done = transpiled(circuits, circuit, target, name, options)
    for result, (_, members) in zip(done, settings, strict=True):
        places = list(range(circuit.n_wires)) if result.layout is None else result.layout.final_index_layout()
        misread = noise
        if readout:
            errors = {wire: readout[place] for wire, place in enumerate(places) if place in readout}
            misread = NoiseModel(readout=errors) if errors else None
        for member in members:
            operator = qiskit_observable(observables[member], misread)
            result.save_expectation_value(operator, places[: circuit.n_wires], label=f"o{member}")
    groups = tuple(members for _, members in settings)
    return Program(tuple(done), parameters, groups, groups, len(observables))


def transpiled(
    circuits: list[QuantumCircuit], circuit: Circuit, target: Any, name: str, options: dict[str, Any]
) -> list[QuantumCircuit]:
    """The one call of qiskit.transpile.

    Raises:
        Unsupported: If the target has too few qubits, or gates that do not make up those of the circuit.
    """
    if target is None and not options:
        return circuits
    try:
        # A seed of its own: the same circuit is always routed the same way.
        done = list(transpile(circuits, target, seed_transpiler=0, **options))
    except TranspilerError as error:
        gates = ", ".join(sorted(circuit.counts()))
        raise Unsupported(
            f"{name} does not run this kernel of the gates {gates} on {circuit.n_wires} wires: "
            f"{' '.join(str(error.message).split())[:400]}"
        ) from error
    for result in done:
        # Of no consequence, but where it has parameters Aer (0.18.2) does not bind them.
        result.global_phase = 0
    return done


def sizes(program: Program) -> tuple[CircuitSize, ...]:
    """Gates and depth of every transpiled circuit, barriers, measurements and virtual operations left out."""
    return tuple(_size(circuit) for circuit in program.circuits)


def _size(circuit: QuantumCircuit) -> CircuitSize:
    def is_gate(item: Any) -> bool:
        name = item.operation.name
        return name not in ("barrier", "measure", "delay", "kraus") and not name.startswith("save")

    gates = [len(item.qubits) for item in circuit.data if is_gate(item)]
    return CircuitSize(gates.count(1), sum(n > 1 for n in gates), circuit.depth(is_gate))


def _mask(observable: str) -> int:
    """Bit mask of the wires whose measured bits multiply to the observable's value; qubit w is bit w."""
    return sum(1 << wire for wire, letter in enumerate(observable) if letter != "I")


def target_of(runner: Any) -> Any:
    """The backend to transpile for; None for a sampler of ideal circuits, which takes them as they are."""
    if not isinstance(runner, BaseSamplerV2):
        return runner
    for name in ("backend", "_backend"):
        found = getattr(runner, name, None)
        # A method in Qiskit Runtime, an attribute in Qiskit and Aer.
        found = found() if callable(found) else found
        if isinstance(found, BackendV2):
            return found
    return None


def standard_gates(names: list[str]) -> list[str]:
    """Those of Qiskit's own gates, on up to two qubits, that basis_gates of qiskit.transpile may name."""
    known = get_standard_gate_name_mapping()
    return [name for name in names if name in known and known[name].num_qubits <= 2]


def readout_of(model: AerNoiseModel) -> dict[int, ReadoutError]:
    """Errors of the readout by physical qubit.

    Raises:
        Unsupported: For errors that only shots have: correlated between qubits, or of all qubits at once.
    """
    result: dict[int, ReadoutError] = {}
    for error in model.to_dict()["errors"]:
        if "measure" not in error["operations"]:
            continue
        qubits = error.get("gate_qubits")
        if error["type"] != "roerror" or not qubits or any(len(q) != 1 for q in qubits):
            raise Unsupported(
                "noise_model has an error of the measurement that is not one of single named qubits, and shots=None "
                "was asked: give shots"
            )
        (_, up), (down, _) = error["probabilities"]
        result |= {int(qubit[0]): ReadoutError(float(up), float(down)) for qubit in qubits}
    return result
