"""Circuits as PennyLane quantum functions, and PennyLane functions, QNodes and tapes as circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from circuits.circuit import Circuit, Gate, Source
from circuits.features import Factor
from circuits.gates import AMPLITUDE, GATES
from circuits.interop.symbols import Linear, angle_of, evaluated, symbol, symbols, z_of_every_wire
from circuits.interop.tracing import NO_NUMBER, Shape, trace
from circuits.noise import NoiseModel

# Gate -> name of the operator in PennyLane; the inverses of S, T, SX and ISWAP are adjoints there.
_PENNYLANE = {
    "X": "PauliX",
    "Y": "PauliY",
    "Z": "PauliZ",
    "H": "Hadamard",
    "P": "PhaseShift",
    "CP": "ControlledPhaseShift",
    "RXX": "IsingXX",
    "RYY": "IsingYY",
    "RZZ": "IsingZZ",
    "CCX": "Toffoli",
}

# Gates that are written as their parts.
_PARTS = ("SQSWAP", "SQSWAPdg")

# What says nothing about the state, or only its global phase.
_IGNORED = ("Identity", "GlobalPhase", "Barrier", "WireCut", "Snapshot")
_STATE_PREPARATIONS = ("StatePrep", "AmplitudeEmbedding")


def apply_in_pennylane(
    circuit: Circuit, values: Sequence[Any], state: Any = None, noise: NoiseModel | None = None
) -> None:
    """Queue a circuit's gates inside a PennyLane quantum function.

    Args:
        circuit: Its gates are applied to wires 0 to n_wires - 1.
        values: One value for each angle of each gate in order (state preparation left out), each a number or a
            batch of numbers.
        state: Amplitudes (..., 2**n_wires) for a circuit that starts with a state preparation.
        noise: Channels after gates; needs a device that runs them, such as default.mixed. Errors of the readout are
            left to what measures.

    Raises:
        ValueError: If the noise names a wire that the circuit does not have.
    """
    import pennylane as qml

    if noise is not None:
        noise.check_wires(circuit.n_wires)
    remaining = iter(values)
    for gate in circuit.gates:
        wires = list(gate.wires)
        if gate.name == AMPLITUDE:
            qml.StatePrep(state, wires=wires)
            continue
        _queue(gate, [next(remaining) for _ in gate.angles])
        if noise is not None:
            for channel, on in noise.channels_after(gate):
                qml.QubitChannel(list(channel.kraus()), wires=on)


def _queue(gate: Gate, values: Sequence[Any]) -> None:
    import pennylane as qml

    wires = list(gate.wires)
    if gate.name in _PARTS:
        for part, (_, _, angles) in zip(gate.parts(), gate.spec.parts, strict=True):
            _queue(part, [values[angle] if isinstance(angle, int) else angle for angle in angles])
    elif gate.name == "CU3":
        qml.ctrl(qml.U3(*values, wires=wires[1]), control=wires[0])
    elif gate.name == "RZX":
        qml.PauliRot(*values, "ZX", wires=wires)
    elif gate.name.endswith("dg"):
        qml.adjoint(getattr(qml, gate.name.removesuffix("dg"))(wires=wires))
    else:
        getattr(qml, _PENNYLANE.get(gate.name, gate.name))(*values, wires=wires)


def pennylane_observable(text: str) -> Any:
    """A Pauli string as a PennyLane observable."""
    import pennylane as qml

    return qml.pauli.string_to_pauli_word(text)


def to_pennylane(circuit: Circuit) -> Callable[..., list[Any]]:
    """A circuit as a PennyLane quantum function.

    Args:
        circuit: The circuit.

    Returns:
        f(inputs, weights): queues the gates on wires 0 to n_wires - 1 and returns the expectation values of the
        observables. inputs (..., n_inputs) and weights (..., n_weights) are arrays of any of PennyLane's interfaces,
        or, without leading dimensions, lists. Put it into a qml.QNode, or qml.tape.make_qscript(f)(inputs, weights).
        Its attribute n_wires is the circuit's, for `from_pennylane`.
    """

    def function(inputs: Any = (), weights: Any = ()) -> list[Any]:
        import pennylane as qml

        for gate in circuit.gates:
            values = [evaluated(angle, inputs, weights, _applied) for angle in gate.angles]
            if gate.name == AMPLITUDE:
                _prepare(values, circuit.n_wires)
            else:
                _queue(gate, values)
        return [qml.expval(pennylane_observable(text)) for text in circuit.observables]

    # Wires that no gate or observable acts on are seen by nobody who calls it.
    function.n_wires = circuit.n_wires  # type: ignore[attr-defined]
    return function


def _prepare(features: list[Any], n_wires: int) -> None:
    import pennylane as qml

    wires = range(n_wires)
    if any(_is_symbol(feature) for feature in features):
        # Being read back: a norm of symbols is no symbol, so the reader takes features as they are.
        padded = symbols("input", 2**n_wires)
        padded[:] = [*features, *[0.0] * (2**n_wires - len(features))]
        qml.StatePrep(padded, wires=wires, validate_norm=False)
    else:
        stacked = qml.math.stack([qml.math.asarray(f) for f in features], axis=-1)
        qml.AmplitudeEmbedding(stacked, wires=wires, pad_with=0.0, normalize=True)


def _applied(factor: Factor, value: Any) -> Any:
    """A factor's function of a feature, in PennyLane's arithmetic or on a symbol that is being read back."""
    from pennylane import math as qml_math

    if _is_symbol(value):
        symbolic: Linear = value.item() if _symbolic(value) else value
        if factor.function == "arccos_square":
            return (symbolic * symbolic).arccos()
        return symbolic.applied(factor.function, *factor.parameters)
    if factor.function == "step":
        return qml_math.where(value > factor.parameters[0], 1.0, 0.0)
    if factor.function == "bit":
        bit, bits = factor.parameters
        gray = qml_math.floor(value * (2**bits - 1) + 0.5)
        return qml_math.floor(gray / 2**bit) % 2
    if factor.function == "arccos_square":
        return qml_math.arccos(value * value)
    return getattr(qml_math, factor.function)(value)


def _is_symbol(value: Any) -> bool:
    # An array of one symbol and no dimensions is what [..., k] takes out of an array of symbols.
    return isinstance(value.item() if _symbolic(value) and value.shape == () else value, Linear)


def from_pennylane(
    fn: Any,
    n_inputs: Shape = None,
    n_weights: Shape = None,
    wires: Iterable[Any] | None = None,
) -> Circuit:
    """A PennyLane quantum function, QNode or tape as a circuit.

    A function of features and weights, or of one of the two, is called with symbols in place of numbers, so every angle
    must be affine in one weight, or a sum of products of features (or of their arcsines). Arguments called x, input(s),
    feature(s), data, image(s), patch(es) or pixel(s) are the features, and those called w, weight(s), param(s),
    parameter(s), theta(s) or θ the weights, in whatever order; where neither name is one of these, the first argument
    is the features. Other arguments keep their defaults. Templates and other operations outside the gate table are
    decomposed as PennyLane does it. Global phases are dropped, and a QNode's transforms are not applied. An
    AmplitudeEmbedding of features divides by their norm and cannot be traced: write
    `circuits.encode("amplitude", n)` + the rest.

    Args:
        fn: The function, QNode or qml.qnn.TorchLayer (which knows the shape of its weights); or a tape, whose trainable
            parameters in their order become the features (the first n_inputs of them) and the weights. Its measurements
            must be expectation values of Pauli words; with none, Z of every wire is read.
        n_inputs: Number of features, or their shape, numbered in C order. None where the function asks for each by its
            index; for a tape, none.
        n_weights: The same for the weights, such as (2, 4, 3) for StronglyEntanglingLayers.
        wires: Labels of wires in the order 0, 1, ...; by default those of the QNode's device, else 0 to n_wires - 1
            of a function that `to_pennylane` made, else whole numbers as they are, else in order of appearance.

    Raises:
        ValueError: Naming the operation and its position, for what is no gate, has no decomposition into gates or has
            another angle; for arguments that are both called like features, or both like weights; for features or
            weights used as a whole whose shape was not given; and for measurements other than expectation values of
            Pauli words.
    """
    import pennylane as qml

    # A TorchLayer, known by what it has: importing its class would import torch.
    if hasattr(fn, "qnode_weights"):
        shapes = [tuple(weight.shape) for weight in fn.qnode_weights.values()]
        fn, n_weights = fn.qnode, shapes[0] if n_weights is None and len(shapes) == 1 else n_weights
    if isinstance(fn, qml.tape.QuantumScript):
        if n_weights is not None:
            raise ValueError(
                f"n_weights is {n_weights} for a tape: its trainable parameters tell, so give n_inputs only"
            )
        tape = _symbolic_tape(fn, 0 if n_inputs is None else n_inputs)
        operations, measurements = tape.operations, tape.measurements or None
    else:
        if isinstance(fn, qml.QNode):
            wires = fn.device.wires if wires is None else wires
            fn = fn.func
        wires = None if wires is None else list(wires)
        operations, measurements = trace(fn, n_inputs, n_weights, len(wires or ()))
    labels = _wire_labels(operations, measurements or [], wires, getattr(fn, "n_wires", 0))
    gates = [
        gate
        for position, operation in enumerate(operations)
        for gate in _gates_of(operation, labels, f"operation {position} ({operation.name})")
    ]
    if measurements is None:
        observables = z_of_every_wire(len(labels))
    else:
        observables = tuple(_pauli_string(m, labels, f"measurement {k}") for k, m in enumerate(measurements))
    return Circuit(len(labels), tuple(gates), observables)


def _symbolic_tape(tape: Any, n_inputs: Any) -> Any:
    if not isinstance(n_inputs, int):
        raise ValueError(f"n_inputs is {n_inputs!r} for a tape: give a whole number")
    parameters, trainable = tape.get_parameters(trainable_only=False), sorted(tape.trainable_params)
    taken = 0
    new = []
    for k in trainable:
        shape = getattr(parameters[k], "shape", ())
        own = symbols("weight", tuple(shape))
        for place in range(own.size):
            source: Source = "input" if taken < n_inputs else "weight"
            own.reshape(-1)[place] = symbol(source, taken if source == "input" else taken - n_inputs)
            taken += 1
        new.append(own if shape else own.item())
    if taken < n_inputs:
        raise ValueError(f"tape has {taken} trainable numbers but n_inputs is {n_inputs}: lower n_inputs")
    return tape.bind_new_parameters(new, trainable)


def _wire_labels(
    operations: list[Any], measurements: list[Any], wires: Iterable[Any] | None, n_wires: Any
) -> dict[Any, int]:
    used = [wire for thing in (*operations, *measurements) for wire in getattr(thing, "wires", ())]
    if wires is not None:
        labels = {label: k for k, label in enumerate(wires)}
        missing = [wire for wire in used if wire not in labels]
        if missing:
            raise ValueError(f"the circuit acts on wire {missing[0]!r} but its wires are {list(labels)}: name them all")
        return labels
    n_wires = n_wires if isinstance(n_wires, int) else 0
    if (used or n_wires) and all(isinstance(wire, int) and wire >= 0 for wire in used):
        return {wire: wire for wire in range(max([*(wire + 1 for wire in used), n_wires]))}
    return {label: k for k, label in enumerate(dict.fromkeys(used))}


_GATE = {foreign: name for name, foreign in _PENNYLANE.items()} | {"U1": "P"}

# Rotations exp(-i a P / 2) by the Pauli string P that generates them.
_ROTATIONS = {"RX": "X", "RY": "Y", "RZ": "Z", "IsingXX": "XX", "IsingYY": "YY", "IsingZZ": "ZZ"}
# Of controls of a rotation by a symbol, whose number of parts doubles with each.
_MOST_CONTROLS = 8


def _gates_of(operation: Any, labels: dict[Any, int], place: str) -> list[Gate]:
    """An operation as gates of the table."""
    import pennylane as qml

    foreign, on = _own_name(operation), tuple(labels[wire] for wire in operation.wires if wire in labels)
    if foreign in _IGNORED:
        return []
    try:
        if foreign.startswith("Adjoint("):
            return [gate.inverse() for gate in reversed(_gates_of(operation.base, labels, place))]
        if not all(getattr(operation, "control_values", ())):
            return _controlled_by_zeros(operation, labels, place)
        if foreign == "C(U3)" and len(on) == 2:
            return [Gate("CU3", on, tuple(map(angle_of, operation.parameters)))]
        if foreign == "PauliRot":
            word = operation.hyperparameters["pauli_word"]
            for name, order in (("R" + word, on), ("R" + word[::-1], on[::-1])):
                if name in GATES:
                    return [Gate(name, order, tuple(map(angle_of, operation.parameters)))]
        if foreign == "FermionicSWAP":
            # exp(i a/2) exp(-i a/4 (XX + YY + ZI + IZ)), whose phase PennyLane writes as a complex exponential.
            half = (angle_of(operation.parameters[0] * 0.5),)
            return [Gate(name, on, half) for name in ("RXX", "RYY")] + [Gate("RZ", (wire,), half) for wire in on]
        if foreign in _STATE_PREPARATIONS and _symbolic(operation.parameters[0]):
            return [Gate(AMPLITUDE, on, _features(operation.parameters[0]))]
        name = _GATE.get(foreign, foreign)
        if name in GATES and name != AMPLITUDE:
            return [Gate(name, on, tuple(map(angle_of, operation.parameters)))]
        if foreign.startswith("C(") and any(isinstance(value, Linear) for value in operation.parameters):
            parts = _controlled_rotations(operation)
            if parts:
                return [gate for part in parts for gate in _gates_of(part, labels, f"{place}, part {part.name}")]
        if not operation.has_decomposition:
            raise ValueError(f"{place} is no gate of qconv and PennyLane does not decompose it: use other operations")
        with qml.QueuingManager.stop_recording():
            parts = _as_arrays(operation).decomposition()
    except (*NO_NUMBER, ValueError) as error:
        if isinstance(error, ImportError) or "numpy.object_" in str(error):
            raise ValueError(
                f"{place} cannot be read: PennyLane decomposes it by its numbers only, not with a feature or weight in "
                "their place: write it as rotations"
            ) from error
        # What a part says names its place already.
        text = str(error) if str(error).startswith(place) else f"{place} cannot be read: {error}"
        raise ValueError(text) from error
    return [gate for part in parts for gate in _gates_of(part, labels, f"{place}, part {part.name}")]


def _own_name(operation: Any) -> str:
    """The name of PennyLane's own operation, controlled or not; empty for a user's, which may have any name."""
    is_own = type(operation).__module__.startswith("pennylane.")
    if is_own and operation.name.startswith("C("):
        is_own = type(operation.base).__module__.startswith("pennylane.")
    return str(operation.name) if is_own else ""


def _controlled_by_zeros(operation: Any, labels: dict[Any, int], place: str) -> list[Gate]:
    """A gate that acts where some controls are 0: the same gate between X on those."""
    import pennylane as qml

    controls = zip(operation.control_wires, operation.control_values, strict=True)
    flips = [Gate("X", (labels[wire],)) for wire, value in controls if not value]
    with qml.QueuingManager.stop_recording():
        by_ones = qml.ctrl(operation.base, control=operation.control_wires)
    return [*flips, *_gates_of(by_ones, labels, place), *flips]


def _controlled_rotations(operation: Any) -> list[Any]:
    """A rotation exp(-i a P / 2) or a phase with several controls, as rotations about Pauli words; else none.

    Controls at 1 project on prod (1 - Z_k) / 2, the sum over sets S of controls of (-1)^|S| Z_S / 2^n: the rotation is
    the product of those about Z_S P by (-1)^|S| a / 2^n, which commute. A phase projects on its target too.
    """
    import pennylane as qml

    base, controls = operation.base, list(operation.control_wires)
    phase = base.name in ("PhaseShift", "U1")
    pauli = "" if phase else _ROTATIONS.get(base.name, "")
    if not (phase or pauli) or not 2 <= len(controls) <= _MOST_CONTROLS:
        return []
    projected = controls + list(base.wires) * phase
    scale = (-2.0 if phase else 1.0) / 2 ** len(projected)
    parts = []
    with qml.QueuingManager.stop_recording():
        for bits in product((0, 1), repeat=len(projected)):
            own = [wire for wire, bit in zip(projected, bits, strict=True) if bit]
            word, wires = "Z" * len(own) + pauli, own + list(base.wires) * (not phase)
            # The empty word of a phase is a global one.
            if word:
                parts.append(qml.PauliRot(base.parameters[0] * (scale * (-1) ** len(own)), word, wires=wires))
    return parts


def _as_arrays(operation: Any) -> Any:
    """The same operation with its symbols as NumPy's, whose functions decompositions call."""
    import pennylane as qml

    if not any(isinstance(value, Linear) for value in operation.parameters):
        return operation
    arrays = [np.array(value, dtype=object) if isinstance(value, Linear) else value for value in operation.parameters]
    return qml.ops.functions.bind_new_parameters(operation, arrays)


def _symbolic(values: Any) -> bool:
    """Whether values are an array of symbols."""
    return getattr(getattr(values, "dtype", None), "kind", "") == "O"


def _features(values: Any) -> tuple[Any, ...]:
    # Zeros at the end are padding.
    angles = [angle_of(value) for value in values]
    while len(angles) > 1 and angles[-1].source == "const" and angles[-1].offset == 0:
        angles.pop()
    return tuple(angles)


def _pauli_string(measurement: Any, labels: dict[Any, int], place: str) -> str:
    import pennylane as qml

    if not isinstance(measurement, qml.measurements.ExpectationMP):
        raise ValueError(
            f"{place} is {measurement!r}: only expectation values of Pauli words are read, such as "
            "qml.expval(qml.Z(0) @ qml.Z(1)); return nothing, and choose another readout where the circuit is used, "
            "such as QuantumConv2d(..., readout='probabilities')"
        )
    sentence = None if measurement.obs is None else measurement.obs.pauli_rep
    terms = {} if sentence is None else dict(sentence.items())
    if len(terms) != 1:
        raise ValueError(
            f"{place} is of {measurement.obs!r}: it must be one Pauli word; give each term an expectation value of "
            "its own"
        )
    ((word, coefficient),) = terms.items()
    if not word or complex(coefficient) != 1:
        raise ValueError(
            f"{place} is of {measurement.obs!r}: it must be a Pauli word with coefficient 1, and not the identity"
        )
    letters = ["I"] * len(labels)
    for wire, letter in word.items():
        letters[labels[wire]] = letter
    return "".join(letters)
