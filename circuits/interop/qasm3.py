"""Circuits written as OpenQASM 3, with parameters as `input float` and the readout as a comment."""

from __future__ import annotations

from math import pi

from circuits.circuit import Angle, Circuit
from circuits.features import Factor, Feature
from circuits.gates import AMPLITUDE

# What another reader skips and ours reads: Pauli strings of the readout, wire 0 first; roles of parameters.
COMMENT = "// qconv "

# Gate of the table -> gate of stdgates.inc.
_SAME_NAME = ("X", "Y", "Z", "H", "S", "Sdg", "T", "Tdg", "SX", "RX", "RY", "RZ", "P", "CY", "CZ", "CH", "CRX", "CRY")
STANDARD = {name: name.lower() for name in (*_SAME_NAME, "CRZ", "CP", "SWAP", "CCX", "CSWAP")} | {
    "CNOT": "cx",
    "U3": "u3",
}

# Gates that stdgates.inc lacks, as definitions; a reader that meets one of these very texts knows the gate by it.
DEFINITIONS = {
    "SXdg": "gate sxdg a { h a; sdg a; h a; }",
    "Rot": "gate rot(phi, theta, omega) a { rz(phi) a; ry(theta) a; rz(omega) a; }",
    "RZZ": "gate rzz(theta) a, b { cx a, b; rz(theta) b; cx a, b; }",
    "RXX": "gate rxx(theta) a, b { h a; h b; cx a, b; rz(theta) b; cx a, b; h a; h b; }",
    "RYY": "gate ryy(theta) a, b { rx(pi/2) a; rx(pi/2) b; cx a, b; rz(theta) b; cx a, b; rx(-pi/2) a; rx(-pi/2) b; }",
    "RZX": "gate rzx(theta) a, b { h b; cx a, b; rz(theta) b; cx a, b; h b; }",
    "CCZ": "gate ccz a, b, c { h c; ccx a, b, c; h c; }",
    "CRot": "gate crot(phi, theta, omega) a, b { crz(phi) a, b; cry(theta) a, b; crz(omega) a, b; }",
    "CU3": "gate cu3(theta, phi, lambda) a, b { cp(lambda) a, b; cry(theta) a, b; cp(phi) a, b; }",
    "ISWAP": "gate iswap a, b { s a; s b; h a; cx a, b; cx b, a; h b; }",
    "ISWAPdg": "gate iswapdg a, b { h b; cx b, a; cx a, b; h a; sdg b; sdg a; }",
    "ECR": "gate ecr a, b { s a; sx b; cx a, b; x a; }",
    "SQSWAP": "gate sqswap a, b { cx a, b; h a; cp(pi/2) b, a; h a; cx a, b; }",
    "SQSWAPdg": "gate sqswapdg a, b { cx a, b; h a; cp(-pi/2) b, a; h a; cx a, b; }",
}


def to_qasm3(circuit: Circuit) -> str:
    """A circuit as OpenQASM 3.

    Features are inputs x_0, x_1, ..., weights w_0, w_1, ...; the readout is a comment `// qconv observables: ...` that
    `from_qasm3` reads. Numbers are written so that they are read back exactly.

    Raises:
        ValueError: For a state preparation, which is no gate of OpenQASM, and for thresholds and bits of features,
            which are no expressions of it.

    Source: Cross et al., OpenQASM 3 (arXiv:2104.14722).
    """
    if any(gate.name == AMPLITUDE for gate in circuit.gates):
        raise ValueError(
            "gate 0 (Amplitude) divides features by their norm, which no OpenQASM 3 gate with affine angles does: use "
            "another encoding"
        )
    used = dict.fromkeys(gate.name for gate in circuit.gates)
    lines = [
        "OPENQASM 3.0;",
        'include "stdgates.inc";',
        " ".join([f"{COMMENT}observables:", *circuit.observables]),
        *(f"input float[64] x_{k};" for k in range(circuit.n_inputs)),
        *(f"input float[64] w_{k};" for k in range(circuit.n_weights)),
        *(DEFINITIONS[name] for name in DEFINITIONS if name in used),
        f"qubit[{circuit.n_wires}] q;",
    ]
    for gate in circuit.gates:
        angles = ", ".join(map(_angle_text, gate.angles))
        wires = ", ".join(f"q[{wire}]" for wire in gate.wires)
        name = STANDARD.get(gate.name, gate.name.lower())
        lines.append(f"{name}{f'({angles})' if angles else ''} {wires};")
    return "\n".join(lines) + "\n"


def _number_text(value: float) -> str:
    """A non-negative number as decimals, or as a fraction of pi that evaluates to the same float."""
    for divisor in (1, 2, 3, 4, 8):
        for factor in (1, 2, 3):
            if value == factor * pi / divisor:
                return f"{'' if factor == 1 else f'{factor}*'}pi{'' if divisor == 1 else f'/{divisor}'}"
    return repr(float(value))


def _angle_text(angle: Angle) -> str:
    offset = f"{'-' if angle.offset < 0 else ''}{_number_text(abs(angle.offset))}"
    if angle.source == "const":
        return offset
    name = f"{'x' if angle.source == 'input' else 'w'}_{angle.index}"
    if angle.computed is not None:
        name = _computed_text(angle.computed)
    factor = "" if abs(angle.scale) == 1 else f"{_number_text(abs(angle.scale))}*"
    text = f"{'-' if angle.scale < 0 else ''}{factor}{name}"
    if angle.offset == 0:
        return text
    return f"{text} {'-' if angle.offset < 0 else '+'} {_number_text(abs(angle.offset))}"


def _computed_text(feature: Feature) -> str:
    terms: list[str] = []
    for coefficient, product in feature.terms:
        factors = [] if abs(coefficient) == 1 else [_number_text(abs(coefficient))]
        sign = "-" if coefficient < 0 else "+" if terms else ""
        terms.append(sign + "*".join([*factors, *map(_factor_text, product)]))
    return f"({' '.join(terms)})" if len(terms) > 1 or terms[0].startswith("-") else terms[0]


def _factor_text(factor: Factor) -> str:
    name = f"x_{factor.index}"
    if factor.function == "x":
        return name
    if factor.function == "arccos_square":
        return f"arccos({name}*{name})"
    if factor.function in ("arcsin", "arccos"):
        return f"{factor.function}({name})"
    raise ValueError(
        f"an angle reads {factor.text()}, which no OpenQASM 3 expression of an input is: compute it before the circuit"
    )
