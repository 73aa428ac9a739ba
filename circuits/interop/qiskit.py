"""Circuits as Qiskit QuantumCircuits with Parameters, and QuantumCircuits as circuits.

Qiskit counts qubits from the least significant bit and writes Pauli labels and bit strings from the most significant
one; our wire w is its qubit w, and `reversed_bits` is the one place that turns texts around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, reduce
from operator import add, mul
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import Angle, Circuit, Gate, Source, const
from circuits.features import Factor, Feature
from circuits.gates import AMPLITUDE, GATES
from circuits.interop.naming import is_feature, places, split_name
from circuits.interop.symbols import Linear, NotAffine, angle_of, evaluated, symbol, z_of_every_wire
from circuits.noise import AnyChannel, NoiseModel, ReadoutError

if TYPE_CHECKING:
    from qiskit import QuantumCircuit
    from qiskit.quantum_info import SparsePauliOp

FloatArray = NDArray[np.float64]

# Gate -> name of the method of QuantumCircuit.
_QISKIT = {"P": "p", "CNOT": "cx", "U3": "u"}

# Gates that are written as their parts.
_PARTS = ("CRot", "CU3", "SQSWAP", "SQSWAPdg", "ISWAPdg")

# Keys in a QuantumCircuit's metadata for the readout, as Qiskit's Pauli labels: what is written, and an older one.
METADATA = "qconv_observables"
_OLD_METADATA = "observables"


def reversed_bits(text: str) -> str:
    """A Pauli string or bit string of ours as Qiskit writes it, and back."""
    return text[::-1]


def build_qiskit(circuit: Circuit, values: Sequence[Any], noise: NoiseModel | None = None) -> QuantumCircuit:
    """A circuit as a Qiskit QuantumCircuit, without measurements.

    Args:
        circuit: The circuit.
        values: One number or Parameter for each angle of each gate in order. A state preparation takes the first
            2**n_wires - 1 of them, the angles of `preparation_angles`.
        noise: Channels after gates, as Kraus instructions; errors of the readout are left to `qiskit_observable` and
            `append_measurement`.

    Raises:
        ValueError: If the noise names a wire that the circuit does not have.
    """
    from qiskit import QuantumCircuit

    if noise is not None:
        noise.check_wires(circuit.n_wires)
    result = QuantumCircuit(circuit.n_wires)
    remaining = iter(values)
    for gate in circuit.gates:
        if gate.name == AMPLITUDE:
            for wire in range(circuit.n_wires):
                _uniformly_controlled_ry(result, list(range(wire)), wire, remaining)
            continue
        _append(result, gate, [next(remaining) for _ in gate.angles])
        if noise is not None:
            for channel, wires in noise.channels_after(gate):
                # Qiskit takes the first wire as the least significant.
                result.append(_kraus_instruction(channel), wires[::-1])
    return result


def _append(target: QuantumCircuit, gate: Gate, values: list[Any]) -> None:
    if gate.name == "Rot":
        phi, theta, omega = values
        target.rz(phi, gate.wires[0])
        target.ry(theta, gate.wires[0])
        target.rz(omega, gate.wires[0])
    elif gate.name in _PARTS:
        for part, (_, _, angles) in zip(gate.parts(), gate.spec.parts, strict=True):
            _append(target, part, [values[angle] if isinstance(angle, int) else angle for angle in angles])
    else:
        getattr(target, _QISKIT.get(gate.name, gate.name.lower()))(*values, *gate.wires)


def qiskit_observable(text: str, noise: NoiseModel | None = None) -> SparsePauliOp:
    """A Pauli string as a Qiskit operator; with errors of the readout, what measuring it measures."""
    from qiskit.quantum_info import SparsePauliOp

    terms = {text: 1.0} if noise is None else noise.measured(text)
    return SparsePauliOp([reversed_bits(term) for term in terms], list(terms.values()))


def append_measurement(target: QuantumCircuit, basis: str, noise: NoiseModel | None = None) -> None:
    """Measure every wire in a basis, bits misread as the noise says; bit w is that of wire w.

    Args:
        target: Changed in place.
        basis: A Pauli string, I where a wire's bit does not matter.
        noise: Of which the errors of the readout are read, as Kraus instructions before the measurements.
    """
    for wire, letter in enumerate(basis):
        if letter == "Y":
            target.sdg(wire)
        if letter in "XY":
            target.h(wire)
        error = None if noise is None else noise.readout_of(wire)
        if error is not None:
            target.append(_kraus_instruction(error), [wire])
    target.measure_all()


def _kraus_instruction(channel: AnyChannel | ReadoutError) -> Any:
    from qiskit.quantum_info import Kraus

    return Kraus(list(channel.kraus())).to_instruction()


def _uniformly_controlled_ry(target: QuantumCircuit, controls: list[int], wire: int, values: Any) -> None:
    # RY(a) CX RY(b) CX is RY(a + b) or RY(a - b) as the control is 0 or 1.
    if not controls:
        target.ry(next(values), wire)
        return
    _uniformly_controlled_ry(target, controls[1:], wire, values)
    target.cx(controls[0], wire)
    _uniformly_controlled_ry(target, controls[1:], wire, values)
    target.cx(controls[0], wire)


def preparation_angles(amplitudes: FloatArray) -> FloatArray:
    """RY angles that prepare real amplitudes from |0...0> in the circuit that `build_qiskit` writes.

    Args:
        amplitudes: (R, 2**n), each row of norm 1, signs allowed.

    Returns:
        (R, 2**n - 1) in radians.

    Source: Möttönen, Vartiainen, Bergholm & Salomaa, Transformation of quantum states using uniformly controlled
        rotations (quant-ph/0407010), section II.
    """
    rows, size = amplitudes.shape
    wires = size.bit_length() - 1
    columns = []
    for wire in range(wires):
        blocks = amplitudes.reshape(rows, 2**wire, 2, -1)
        # Signs are set by the last wire; the earlier ones split norms.
        halves = blocks[..., 0] if wire == wires - 1 else np.linalg.norm(blocks, axis=-1)
        columns.append(_leaf_angles(2 * np.arctan2(halves[:, :, 1], halves[:, :, 0])))
    return np.concatenate(columns, axis=1)


def _leaf_angles(angles: FloatArray) -> FloatArray:
    if angles.shape[1] == 1:
        return angles
    zero, one = np.split(angles, 2, axis=1)
    return np.concatenate([_leaf_angles((zero + one) / 2), _leaf_angles((zero - one) / 2)], axis=1)


def to_qiskit(circuit: Circuit) -> QuantumCircuit:
    """A circuit as a Qiskit QuantumCircuit: features are its ParameterVector x, weights its ParameterVector w.

    Wire w is qubit w. The readout stands in its metadata under "qconv_observables", as Qiskit's Pauli labels.

    Raises:
        ValueError: For a state preparation, whose angles are no expressions of the features, and for thresholds and
            bits of features.
    """
    from qiskit.circuit import ParameterVector

    if any(gate.name == AMPLITUDE for gate in circuit.gates):
        raise ValueError(
            "gate 0 (Amplitude) divides features by their norm, which no angle of a QuantumCircuit with Parameters "
            "does: use another encoding, or run the circuit with backend 'qiskit'"
        )
    x, w = ParameterVector("x", circuit.n_inputs), ParameterVector("w", circuit.n_weights)
    # Lists, because a vector's own indexing knows no Ellipsis.
    inputs, weights = list(x), list(w)
    angles = [evaluated(_distributed(a), inputs, weights, _applied) for gate in circuit.gates for a in gate.angles]
    result = build_qiskit(circuit, angles)
    result.metadata = {METADATA: [reversed_bits(text) for text in circuit.observables]}
    return result


def _distributed(angle: Angle) -> Angle:
    """The same angle; where factors of its terms are tiny, with each multiplied by the scale."""
    if angle.computed is None:
        return angle
    terms = angle.computed.terms
    # Qiskit takes a product with a number of about 1e-15 for the number, even if a large one multiplies it next.
    if min(abs(number) for number in (angle.scale, *(c for c, _ in terms))) > 1e-12:
        return angle
    return replace(angle, scale=1.0, computed=Feature(tuple((angle.scale * c, product) for c, product in terms)))


def _applied(factor: Factor, value: Any) -> Any:
    if factor.function == "arccos_square":
        return (value * value).arccos()
    if factor.function in ("arcsin", "arccos"):
        return getattr(value, factor.function)()
    raise ValueError(
        f"an angle reads {factor.text()}, which no ParameterExpression is: compute it before the circuit, or run the "
        "circuit with backend 'qiskit'"
    )


def from_qiskit(
    qc: QuantumCircuit,
    inputs: Any = None,
    weights: Any = None,
    observables: Any = None,
) -> Circuit:
    """A Qiskit QuantumCircuit as a circuit; qubit q becomes wire q.

    Instructions outside the gate table are decomposed by their definitions. Global phases and barriers are dropped, and
    so are measurements at the end: the readout is `observables`.

    Args:
        qc: The circuit.
        inputs: Its Parameters that are features: a Parameter, a ParameterVector or a sequence of these, in order. By
            default those called x, input(s) or feature(s), alone, as a vector or with a number (x, x[2], x_2, x2); if
            only `weights` is given, all others.
        weights: Its Parameters that are weights, likewise; by default all others. Parameters that are not listed take
            the number in their name as index where all of their kind are numbered alike (w[0], w[1] or w0, w1, ...),
            as in `from_qasm3`, else the order of qc.parameters. If one of those numbered alike is listed, the others
            are numbered anew.
        observables: Pauli strings, wire 0 first as in Circuit, or Pauli or SparsePauliOp objects, whose labels are
            Qiskit's (qubit 0 last): one or several; each term of a SparsePauliOp is an output and has coefficient 1. By
            default those in the metadata that `to_qiskit` writes, else Z of every wire.

    Raises:
        ValueError: Naming the instruction and its position, for what is no gate and has no definition, a gate after a
            measurement, or an angle that is neither affine in one Parameter nor a sum of products of features (or of
            their arcsines); for a Parameter that is neither feature nor
            weight; and for observables that are no Pauli strings.
    """
    reader = _Reader(_roles(qc, inputs, weights))
    reader.read(qc, list(range(qc.num_qubits)), "")
    return Circuit(qc.num_qubits, tuple(reader.gates), _observables(qc, observables))


def qiskit_inputs(qc: QuantumCircuit) -> list[Any]:
    """The Parameters that are features by their names."""
    return [p for p in qc.parameters if is_feature(p.name)]


def _flat(parameters: Any) -> list[Any]:
    from qiskit.circuit import Parameter

    if isinstance(parameters, Parameter):
        return [parameters]
    if isinstance(parameters, str) or not isinstance(parameters, Iterable):
        raise ValueError(f"{parameters!r} is no Parameter: give Parameters, ParameterVectors or sequences of them")
    return [parameter for item in parameters for parameter in _flat(item)]


def _roles(qc: QuantumCircuit, inputs: Any, weights: Any) -> dict[Any, tuple[Source, int]]:
    """What each Parameter of the circuit is."""
    listed: dict[Source, list[Any] | None] = {
        "input": None if inputs is None else _flat(inputs),
        "weight": None if weights is None else _flat(weights),
    }
    roles: dict[Any, tuple[Source, int]] = {}
    if listed["input"] is None and listed["weight"] is None:
        roles = _placed("input", qiskit_inputs(qc))
        listed["input"] = []
    for source, parameters in listed.items():
        for index, parameter in enumerate(parameters or []):
            if parameter in roles:
                raise ValueError(f"Parameter {parameter.name!r} is listed twice: list each once")
            roles[parameter] = (source, index)
    taken = {split_name(parameter.name)[0] for parameter in roles}
    rest = [p for p in qc.parameters if p not in roles]
    for source, parameters in listed.items():
        if parameters is None:
            roles |= _placed(source, rest, any(split_name(p.name)[0] in taken for p in rest))
            rest = []
    if rest:
        names = ", ".join(p.name for p in rest)
        raise ValueError(f"Parameters {names} are neither in inputs nor in weights: list them in one of the two")
    return roles


def _placed(source: Source, parameters: list[Any], dense: bool = False) -> dict[Any, tuple[Source, int]]:
    indices = places([parameter.name for parameter in parameters], dense)
    return {parameter: (source, index) for parameter, index in zip(parameters, indices, strict=True)}


def _angle(value: Any, roles: dict[Any, tuple[Source, int]]) -> Angle:
    from qiskit.circuit import ParameterExpression

    if not isinstance(value, ParameterExpression):
        return angle_of(value)
    parameters = list(value.parameters)
    if not parameters:
        return const(float(value.numeric()))
    if len(parameters) == 1:
        (parameter,) = parameters
        slope = value.gradient(parameter)
        if not (isinstance(slope, ParameterExpression) and slope.parameters):
            slope = slope.numeric() if isinstance(slope, ParameterExpression) else slope
            source, index = roles[parameter]
            return Angle(source, index, float(slope), float(value.bind({parameter: 0.0}).numeric()))
    return _computed(value, roles)


_NODES: dict[str, Callable[[Any, Any], Any]] = {"Add": add, "Mul": mul, "Pow": pow}


def _computed(value: Any, roles: dict[Any, tuple[Source, int]]) -> Angle:
    """An expression that is not affine in one Parameter: evaluated on symbols, which keep products of features."""
    names = ", ".join(sorted(p.name for p in value.parameters))
    by_name = {parameter.name: symbol(*roles[parameter]) for parameter in value.parameters}
    try:
        return angle_of(_evaluated(value.sympify(), by_name))
    except NotAffine as error:
        if any(roles[parameter][0] == "weight" for parameter in value.parameters):
            kind = "is not affine in" if len(value.parameters) == 1 else "depends on the Parameters"
            raise NotAffine(f"{value} {kind} {names}: an angle takes one weight, or products of features") from error
        raise NotAffine(f"{value} is no sum of products of {names}: {error}") from error


def _evaluated(node: Any, symbols: dict[str, Linear]) -> Any:
    """A node of SymPy's, or SymEngine's, tree of an expression."""
    if node.is_Symbol:
        return symbols[node.name]
    if node.is_Number or not node.args:
        return float(node)
    kind, parts = type(node).__name__, [_evaluated(part, symbols) for part in node.args]
    if kind in _NODES:
        return reduce(_NODES[kind], parts)
    known = {"asin": "arcsin", "acos": "arccos"}
    if kind in known and isinstance(parts[0], Linear):
        return parts[0].applied(known[kind])
    raise NotAffine(f"it has the function {kind}")


# Names of Qiskit's instructions -> gate; the others of the table are called like it in lower case.
_GATE = {name.lower(): name for name in GATES if name not in (AMPLITUDE, *_PARTS, "Rot")} | {
    "cx": "CNOT",
    "u": "U3",
    "u3": "U3",
    "u1": "P",
    "cu1": "CP",
    "cu3": "CU3",
}
_IGNORED = ("barrier", "id", "delay", "global_phase")


@cache
def _own_classes() -> dict[str, type]:
    """Classes of Qiskit's own instructions: another instruction may have any name."""
    from qiskit.circuit import Barrier
    from qiskit.circuit.library import get_standard_gate_name_mapping

    standard = {name: operation.base_class for name, operation in get_standard_gate_name_mapping().items()}
    return standard | {"barrier": Barrier}


class _Reader:
    """Collects gates and remembers which wires were used and measured."""

    def __init__(self, roles: dict[Any, tuple[Source, int]]) -> None:
        self.gates: list[Gate] = []
        self._roles = roles
        self._measured: set[int] = set()

    def read(self, qc: QuantumCircuit, wires: list[int], where: str) -> None:
        for position, item in enumerate(qc.data):
            on = tuple(wires[qc.find_bit(qubit).index] for qubit in item.qubits)
            place = f"{where}instruction {position} ({item.operation.name})"
            self._instruction(item.operation, on, place)

    def _instruction(self, operation: Any, on: tuple[int, ...], place: str) -> None:
        own = getattr(operation, "base_class", type(operation)) is _own_classes().get(operation.name)
        name = operation.name if own else ""
        if name in _IGNORED:
            return
        if name == "measure":
            self._measured |= set(on)
            return
        if self._measured & set(on):
            raise ValueError(f"{place} acts on a qubit after its measurement: measure at the end only")
        if name == "reset":
            if any(set(gate.wires) & set(on) for gate in self.gates):
                raise ValueError(f"{place} resets a qubit in the middle: it is no gate, so write the circuit without")
            return
        try:
            if name in _GATE and GATES[_GATE[name]].n_angles == len(operation.params):
                self.gates.append(Gate(_GATE[name], on, tuple(_angle(v, self._roles) for v in operation.params)))
                return
            if name == "cu":
                *angles, phase = (_angle(v, self._roles) for v in operation.params)
                self.gates += [Gate("P", on[:1], (phase,)), Gate("CU3", on, tuple(angles))]
                return
        # Qiskit raises RuntimeError where it knows no derivative.
        except (NotAffine, ArithmeticError, RuntimeError, TypeError) as error:
            raise ValueError(f"{place} has an angle that cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"{place} cannot be read: {error}") from error
        definition = getattr(operation, "definition", None)
        if definition is None:
            raise ValueError(f"{place} is no gate of qconv and has no definition to decompose it: use other gates")
        self.read(definition, list(on), f"{place}, ")


def _observables(qc: QuantumCircuit, observables: Any) -> tuple[str, ...]:
    from qiskit.quantum_info import Pauli, SparsePauliOp

    if observables is None:
        metadata = qc.metadata or {}
        if METADATA in metadata:
            if not _are_labels(metadata[METADATA], qc.num_qubits):
                raise ValueError(
                    f"metadata[{METADATA!r}] is {metadata[METADATA]!r}: it must be a list of Pauli labels of "
                    f"{qc.num_qubits} letters, or give observables=..."
                )
            return tuple(map(reversed_bits, metadata[METADATA]))
        # The older key is a common word, so others write it for things of their own.
        if _are_labels(metadata.get(_OLD_METADATA), qc.num_qubits):
            return tuple(map(reversed_bits, metadata[_OLD_METADATA]))
        return z_of_every_wire(qc.num_qubits)
    if isinstance(observables, (str, Pauli, SparsePauliOp)):
        observables = [observables]
    texts: list[str] = []
    for observable in observables:
        if isinstance(observable, str):
            texts.append(observable)
            continue
        if not isinstance(observable, (Pauli, SparsePauliOp)):
            raise ValueError(f"observable is a {type(observable).__name__}: give a Pauli string or a SparsePauliOp")
        for label, coefficient in SparsePauliOp(observable).to_list():
            if coefficient != 1:
                raise ValueError(f"observable {label} has coefficient {coefficient}: each output is one Pauli string")
            texts.append(reversed_bits(label))
    return tuple(texts)


def _are_labels(value: Any, n_qubits: int) -> bool:
    """Whether a value is a list of Pauli strings on so many qubits, as observables of a circuit are."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(label, str) and len(label) == n_qubits and not set(label) - set("IXYZ") and set(label) != {"I"}
        for label in value
    )
