"""Qiskit QuantumCircuits read as circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, reduce
from operator import add, mul
from typing import TYPE_CHECKING, Any

from circuits.circuit import Angle, Circuit, Gate, Source, const
from circuits.gates import AMPLITUDE, GATES
from circuits.interop.naming import is_feature, places, split_name
from circuits.interop.qiskit import METADATA, OLD_METADATA, PARTS, reversed_bits
from circuits.interop.symbols import Linear, NotAffine, angle_of, symbol, z_of_every_wire

if TYPE_CHECKING:
    from qiskit import QuantumCircuit


def from_qiskit(
    qc: QuantumCircuit,
    inputs: Any = None,
    weights: Any = None,
    observables: Any = None,
) -> Circuit:
    """A Qiskit QuantumCircuit as a circuit; qubit q becomes wire q.

    Instructions outside the gate table are decomposed by their definitions; that of an evolution by terms that do not
    commute (PauliEvolutionGate, EvolvedOperatorAnsatz) is its product formula, by default one step, and not the exact
    exponential. Global phases and barriers are dropped, and so are measurements at the end: the readout is
    `observables`.

    Args:
        qc: The circuit.
        inputs: Its Parameters that are features: a Parameter, a ParameterVector or a sequence of these, in order. By
            default those called x, input(s), feature(s), data, image(s), patch(es) or pixel(s), alone, as a vector or
            with a number (x, x[2], x_2, x2); if only `weights` is given, all others.
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
            their arcsines); for a Parameter that is neither feature nor weight, or listed but not in the circuit (nor
            any element of its vector); and for observables that are no Pauli strings.
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
    _check_present(qc, roles)
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


def _check_present(qc: QuantumCircuit, listed: Iterable[Any]) -> None:
    present = set(qc.parameters)
    # A circuit may use a part of a vector.
    strangers = [p for p in listed if p not in present and present.isdisjoint(getattr(p, "vector", ()))]
    if strangers:
        raise ValueError(
            f"Parameters {', '.join(p.name for p in strangers)} are listed but not in the circuit, which has "
            f"{', '.join(p.name for p in qc.parameters) or 'none'}: one of the same name that was made anew is another "
            "Parameter, so take them from qc.parameters"
        )


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
_GATE = {name.lower(): name for name in GATES if name not in (AMPLITUDE, *PARTS, "Rot")} | {
    "cx": "CNOT",
    "u": "U3",
    "u3": "U3",
    "u1": "P",
    "cu1": "CP",
    "cu3": "CU3",
}
# Repetitions of a gate that its power asks for.
_MOST_TIMES = 10_000
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
        if type(operation).__name__ == "AnnotatedOperation":
            self._annotated(operation, on, place)
            return
        definition = _definition(operation)
        if definition is None:
            raise ValueError(f"{place} is no gate of qconv and has no definition to decompose it: use other gates")
        self.read(definition, list(on), f"{place}, ")

    def _annotated(self, operation: Any, on: tuple[int, ...], place: str) -> None:
        """An operation with modifiers, of which a power repeats what the others make."""
        from qiskit.exceptions import QiskitError

        try:
            made, times = _modified(operation)
        except (QiskitError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{place} cannot be read: {error}") from error
        for _ in range(times):
            self._instruction(made, on, f"{place}, {made.name}")


def _modified(operation: Any) -> tuple[Any, int]:
    """What an operation with modifiers is, and how often it repeats."""
    from qiskit.circuit import ControlModifier, InverseModifier

    base, times = operation.base_op, 1
    if type(base) is type(operation):
        base, times = _modified(base)
    for modifier in operation.modifiers:
        if isinstance(modifier, InverseModifier):
            base = base.inverse(annotated=False)
        elif isinstance(modifier, ControlModifier):
            base = base.control(modifier.num_ctrl_qubits, ctrl_state=modifier.ctrl_state, annotated=False)
        elif modifier.power == int(modifier.power):
            base = base.inverse(annotated=False) if modifier.power < 0 else base
            times *= abs(int(modifier.power))
        else:
            raise ValueError(f"its power is {modifier.power}: give a whole number, or write the gate that it makes")
    if times > _MOST_TIMES:
        raise ValueError(f"it repeats a gate {times} times: at most {_MOST_TIMES}")
    return base, times


def _definition(operation: Any) -> QuantumCircuit | None:
    """The circuit that an instruction is; None if it has none."""
    from qiskit.circuit.library import PermutationGate
    from qiskit.synthesis import synth_permutation_basic

    if isinstance(operation, PermutationGate):
        return synth_permutation_basic(operation.pattern)
    found: QuantumCircuit | None = getattr(operation, "definition", None)
    return found


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
        if _are_labels(metadata.get(OLD_METADATA), qc.num_qubits):
            return tuple(map(reversed_bits, metadata[OLD_METADATA]))
        return z_of_every_wire(qc.num_qubits)
    if isinstance(observables, (str, Pauli, SparsePauliOp)):
        observables = [observables]
    if not isinstance(observables, Iterable):
        raise ValueError(f"observables are {observables!r}: give Pauli strings such as 'ZI', or SparsePauliOps")
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
