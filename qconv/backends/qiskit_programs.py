"""From circuits to what Qiskit runs: built and transpiled once, with the readout that shots or exact values need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from qiskit.circuit.library import IGate, get_standard_gate_name_mapping
from qiskit.primitives import BaseSamplerV2
from qiskit.providers import BackendV2
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel as AerNoiseModel

from circuits.circuit import Circuit, Gate
from circuits.interop.qiskit import append_measurement, build_qiskit, qiskit_observable
from circuits.noise import NoiseModel, ReadoutError
from qconv.backends.angles import angles_of, features_of
from qconv.backends.protocol import CircuitSize, Unsupported, measurement_settings
from qconv.backends.qiskit_runs import Program

# Aer (to 0.18.2) silently drops the bound parameter of a controlled rotation (Qiskit/qiskit-aer issues 2323 and 2403),
# so these are written as one-wire rotations and CNOTs.
_UNBINDABLE = {"crx", "cry", "crz", "cp", "cu1"}
# These, and what `build_qiskit` has no gate of Qiskit's for.
REWRITTEN = {*_UNBINDABLE, "cu3"}


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
    circuit: Circuit, noise: NoiseModel | None, target: Any, name: str, options: dict[str, Any]
) -> Program:
    """The circuit as it is written, saving the expectation values of all its observables.

    Args:
        circuit: The kernel.
        noise: See measured_program.
        target: See measured_program.
        name: See measured_program.
        options: See measured_program.
    """
    base, parameters = template(circuit, noise)
    (done,) = transpiled([base], circuit, target, name, options)
    places = list(range(circuit.n_wires)) if done.layout is None else done.layout.final_index_layout()
    operators = [qiskit_observable(text, noise) for text in circuit.observables]
    every = tuple(range(len(operators)))
    _save(done, places[: circuit.n_wires], dict(zip(every, operators, strict=True)))
    return Program((done,), parameters, (every,), (every,), len(every))


def saved_program(program: Program, circuit: Circuit, readout: dict[int | None, ReadoutError]) -> Program:
    """Measured circuits saving the means of what shots of them sample, noise in the change of basis included.

    Args:
        program: Of `measured_program`, without noise of ours.
        circuit: The kernel.
        readout: See readout_of.
    """
    circuits = []
    for measured, members in zip(program.circuits, program.members, strict=True):
        places = measured_places(measured)
        result = measured.copy()
        result.data = [item for item in measured.data if item.operation.name not in ("measure", "barrier")]
        found = {wire: readout.get(place, readout.get(None)) for wire, place in enumerate(places)}
        errors = {wire: error for wire, error in found.items() if error is not None}
        misread = NoiseModel(readout=errors) if errors else None
        bits = ("".join("IZ"[letter != "I"] for letter in circuit.observables[member]) for member in members)
        operators = {member: qiskit_observable(text, misread) for member, text in zip(members, bits, strict=True)}
        _save(result, places, operators)
        circuits.append(result)
    return replace(program, circuits=tuple(circuits))


def measured_places(measured: QuantumCircuit) -> list[int]:
    """The qubits that the wires of a transpiled circuit are measured on."""
    places = {
        measured.find_bit(item.clbits[0]).index: measured.find_bit(item.qubits[0]).index
        for item in measured.data
        if item.operation.name == "measure"
    }
    return [place for _, place in sorted(places.items())]


def _save(target: QuantumCircuit, places: list[int], operators: dict[int, Any]) -> None:
    """Save expectation values of operators on qubits, by the member's number."""
    touched = {qubit for item in target.data for qubit in item.qubits}
    for place in places:
        if target.qubits[place] not in touched:
            # Aer (0.18.2) leaves such qubits out of its state and then may take others for them. Under a label of its
            # own, noise that follows "id" does not follow this one.
            target.append(IGate(label="untouched"), [place])
    for member, operator in operators.items():
        target.save_expectation_value(operator, places, label=f"o{member}")


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
        lacking = next(
            (gate for gate in circuit.gates if not _translates(gate, circuit.n_wires, target, options)), None
        )
        if lacking is not None:
            others = ("reset", "delay", "measure")
            native = [gate for gate in options.get("basis_gates") or target.operation_names if gate not in others]
            raise Unsupported(
                f"{name} has gates {', '.join(native)}, of which {lacking.name} is not made up, but the kernel has "
                f"{lacking.name} on wires {lacking.wires}: use a kernel without it, or a device with other gates"
            ) from error
        gates = ", ".join(sorted(circuit.counts()))
        raise Unsupported(
            f"{name} does not run this kernel of the gates {gates} on {circuit.n_wires} wires: "
            f"{' '.join(str(error.message).split())[:400]}"
        ) from error
    for result in done:
        # Of no consequence, but where it has parameters Aer (0.18.2) does not bind them.
        result.global_phase = 0
    return done


def _translates(gate: Gate, n_wires: int, target: Any, options: dict[str, Any]) -> bool:
    try:
        transpile(template(Circuit(n_wires, (gate,), ()), None)[0], target, **options)
    except TranspilerError:
        return False
    return True


def sizes(program: Program) -> tuple[CircuitSize, ...]:
    """Gates and depth of every transpiled circuit, barriers, measurements and waiting left out."""
    return tuple(_size(circuit) for circuit in program.circuits)


def _size(circuit: QuantumCircuit) -> CircuitSize:
    def is_gate(item: Any) -> bool:
        name = item.operation.name
        return name not in ("barrier", "measure", "delay", "id", "kraus") and not name.startswith("save")

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


def forgotten_map(target: Any) -> list[list[int]] | None:
    """A coupling map that was given to AerSimulator as an option: qiskit.transpile does not find it there."""
    if not isinstance(target, AerSimulator) or target.coupling_map is None:
        return None
    # One that stands for a device knows which pairs its gates act on.
    known = any(len(qubits) == 2 for qubits in target.target.qargs or () if qubits)
    return None if known else [list(pair) for pair in target.coupling_map]


def noisy_gates(target: Any) -> set[str] | None:
    """Names of the gates that a simulator's own noise follows; None where that is not known."""
    model = target.options.noise_model if isinstance(target, AerSimulator) else None
    return None if model is None else {name for error in model.to_dict()["errors"] for name in error["operations"]}


def readout_of(model: AerNoiseModel | None) -> dict[int | None, ReadoutError]:
    """Errors of the readout by physical qubit; under None that of all others.

    Raises:
        Unsupported: For errors that only shots have: of several qubits together.
    """
    result: dict[int | None, ReadoutError] = {}
    for error in [] if model is None else model.to_dict()["errors"]:
        if "measure" not in error["operations"]:
            continue
        qubits = error.get("gate_qubits") or [(None,)]
        if error["type"] != "roerror" or len(error["probabilities"]) != 2 or any(len(q) != 1 for q in qubits):
            raise Unsupported(
                "noise_model has an error of the measurement that is no misread bit of single qubits, and shots=None "
                "was asked: give shots"
            )
        (_, up), (down, _) = error["probabilities"]
        result |= {qubit: ReadoutError(float(up), float(down)) for (qubit,) in qubits}
    return result
