"""OpenQASM 3 read as circuits: gates, their definitions, `input float` parameters and affine expressions of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from circuits.circuit import Circuit, Gate, Source
from circuits.interop.naming import is_feature, places
from circuits.interop.qasm3 import COMMENT, DEFINITIONS, STANDARD
from circuits.interop.qasm3_syntax import (
    MOST_CALLS,
    MOST_NESTED,
    MOST_WIRES,
    AtLine,
    Definition,
    Statements,
    Token,
    definition,
    fail,
    tokens,
)
from circuits.interop.symbols import Linear, NotAffine, angle_of, symbol, z_of_every_wire

# Keywords of statements that are no gates; "#" and "pragma" tell a compiler something.
_UNSUPPORTED = re.compile(
    r"if|else|for|while|switch|def|extern|return|output|box|cal|defcal|defcalgrammar|delay|array|bool|int|uint|float"
    r"|angle|complex|duration|stretch|end|break|continue|nop|qreg|pragma|#"
)
_REALS = ("float", "angle", "int", "uint")
# Gates that are named by standard name; "U" and "u2" have angles of their own.
_GATE = {standard: name for name, standard in STANDARD.items()} | {
    "CX": "CNOT",
    "phase": "P",
    "cphase": "CP",
    "u1": "P",
}
_CONTROLLED = {
    "X": "CNOT",
    "Y": "CY",
    "Z": "CZ",
    "H": "CH",
    "RX": "CRX",
    "RY": "CRY",
    "RZ": "CRZ",
    "P": "CP",
    "SWAP": "CSWAP",
    "CNOT": "CCX",
    "CZ": "CCZ",
}


def is_qasm3(text: str) -> bool:
    """Whether a text is a program and not a kernel's name."""
    return "OPENQASM" in text or ";" in text


def from_qasm3(text: str) -> Circuit:
    """An OpenQASM 3 program as a circuit.

    Read are gate calls of stdgates.inc and of the program's own gate definitions with the modifiers inv, ctrl, negctrl
    and pow of a whole number, `input float` parameters, `const`, pi and arithmetic, qubit and bit declarations, `let`
    aliases of qubits, barriers, and measurements at the end, which are dropped: the readout stands in a comment
    `// qconv observables: ZII IZI` (Pauli strings, wire 0 first), else it is Z of every wire. Global phases are
    dropped. Wires are numbered in the order of declaration.

    Parameters called x, input(s), feature(s), data, image(s), patch(es) or pixel(s), alone or with a number, are
    features; the others are weights. Each takes the number in its name as index where all of its kind are numbered
    alike, else its place among the declarations (those that differ by a number only, in the order of the numbers).
    Comments `// qconv inputs: a b` and `// qconv weights: c d` list them instead.

    A text that somebody else wrote may be read: qubits, nesting and calls of gates in gates have limits.

    Raises:
        ValueError: With the line, for what is not read, what is not defined, or an angle that is neither affine in
            one weight nor a sum of products of features.

    Source: Cross et al., OpenQASM 3 (arXiv:2104.14722).
    """
    reader = _Program(tokens(text), _roles(text))
    reader.read()
    if reader.n_wires == 0:
        raise ValueError("the OpenQASM program declares no qubit: it needs `qubit[n] q;`")
    observables = _comment(text, "observables")
    readout = z_of_every_wire(reader.n_wires) if observables is None else tuple(observables)
    return Circuit(reader.n_wires, tuple(reader.gates), readout)


def _comment(text: str, key: str) -> list[str] | None:
    found = re.search(rf"^[ \t]*{COMMENT}{key}:(.*)$", text, re.MULTILINE)
    return None if found is None else found[1].split()


def _roles(text: str) -> dict[str, Linear]:
    """What each declared parameter stands for."""
    program = tokens(text)
    names = []
    for k, token in enumerate(program):
        if token.text == "input" and token.kind == "name":
            end = next((j for j in range(k, len(program)) if program[j].text == ";"), len(program))
            names.append(program[end - 1].text)
    listed = {"input": _comment(text, "inputs"), "weight": _comment(text, "weights")}
    free = [name for name in names if not any(name in (own or ()) for own in listed.values())]
    features = {name for name in free if is_feature(name)}
    kinds: dict[Source, dict[str, int]] = {
        "input": _indices([name for name in free if name in features], listed["input"]),
        "weight": _indices([name for name in free if name not in features], listed["weight"]),
    }
    return {name: symbol(source, index) for source, own in kinds.items() for name, index in own.items()}


def _indices(names: list[str], listed: list[str] | None) -> dict[str, int]:
    if listed is not None:
        return {name: k for k, name in enumerate([*listed, *names])}
    return dict(zip(names, places(names), strict=True))


class _Program:
    """Runs through a program and collects gates."""

    def __init__(self, tokens: tuple[Token, ...], roles: dict[str, Linear]) -> None:
        self.gates: list[Gate] = []
        self.n_wires = 0
        self._top = Statements(tokens, {})
        self._roles = roles
        self._standard = False
        self._registers: dict[str, tuple[int, ...]] = {}
        self._definitions: dict[str, Definition] = {}
        self._measured: set[int] = set()
        self._open: list[str] = []
        self._calls = 0
        self._names: set[str] = set()
        self._readers: dict[str, Callable[[Statements], None]] = {
            "OPENQASM": self._read_version,
            "include": self._read_include,
            "input": self._read_input,
            "const": self._read_const,
            "qubit": self._read_qubit,
            "let": self._read_let,
            "gate": self._read_gate,
            "barrier": self._skip,
            "gphase": self._skip,
            "measure": self._read_measure,
            "reset": self._read_reset,
        }
        self._known = {name: self._own_definition(text) for name, text in DEFINITIONS.items()}

    @staticmethod
    def _own_definition(text: str) -> Definition:
        statements = Statements(tokens(text), {})
        statements.take("gate")
        statements.name()
        return definition(statements)

    def read(self) -> None:
        while self._top.more:
            line = self._top.line
            try:
                self._statement(self._top)
            except NotAffine as error:
                fail(line, f"the angle cannot be read: {error}")
            except (ArithmeticError, TypeError) as error:
                fail(line, f"an expression has no value: {error}")
            except AtLine:
                raise
            except ValueError as error:
                fail(line, f"an expression has no value: {error}")

    def _statement(self, at: Statements) -> None:
        word = at.peek()
        if _UNSUPPORTED.fullmatch(word):
            fail(at.line, f"{word!r} is not supported: only gates, declarations and measurements at the end are read")
        if word in self._readers:
            at.take()
            self._readers[word](at)
        elif word in ("bit", "creg"):
            at.take()
            self._read_bits(at)
        elif "measure" in self._words(at):
            self._read_assignment(at)
        else:
            self.gates += self._call(at, self._registers)

    @staticmethod
    def _words(at: Statements) -> list[str]:
        words: list[str] = []
        while at.peek(len(words)) not in ("", ";", "{"):
            words.append(at.peek(len(words)))
        return words

    def _read_version(self, at: Statements) -> None:
        line, version = at.line, at.take()
        if not re.fullmatch(r"3(\.\d+)?", version):
            fail(line, f"the program is OpenQASM {version}: only version 3 is read")
        at.take(";")

    def _read_include(self, at: Statements) -> None:
        line, file = at.line, at.take()
        if file != '"stdgates.inc"':
            fail(line, f'include {file} is not read: only "stdgates.inc" is known')
        at.take(";")
        self._standard = True

    def _read_input(self, at: Statements) -> None:
        line, kind = at.line, at.name()
        if kind not in ("float", "angle"):
            fail(line, f"input of type {kind!r} is not read: use `input float`")
        if at.accept("["):
            at.skip_to("]")
        name = at.name()
        at.take(";")
        self._declare(name, line)
        at.values[name] = self._roles[name]

    def _read_const(self, at: Statements) -> None:
        line, kind = at.line, at.name()
        if kind not in _REALS:
            fail(line, f"const of type {kind!r} is not read: use float")
        if at.accept("["):
            at.skip_to("]")
        name = at.name()
        at.take("=")
        value = at.expression()
        at.take(";")
        self._declare(name, line)
        at.values[name] = value

    def _declare(self, name: str, line: int) -> None:
        if name in self._names:
            fail(line, f"{name!r} is declared twice: give each a name of its own")
        self._names.add(name)

    def _read_qubit(self, at: Statements) -> None:
        line, size = at.line, 1
        if at.accept("["):
            size = at.whole("the size of a register of qubits", MOST_WIRES)
            at.take("]")
        name = at.name()
        at.take(";")
        if self.n_wires + size > MOST_WIRES:
            fail(line, f"the program declares {self.n_wires + size} qubits: at most {MOST_WIRES} are read")
        self._declare(name, line)
        self._registers[name] = tuple(range(self.n_wires, self.n_wires + size))
        self.n_wires += size

    def _read_let(self, at: Statements) -> None:
        line, name = at.line, at.name()
        at.take("=")
        wires = self._operand(at, self._registers)
        while at.accept("+"):
            at.take("+")
            wires += self._operand(at, self._registers)
        at.take(";")
        if len(set(wires)) < len(wires):
            fail(line, f"{name!r} has a qubit twice: name each once")
        self._declare(name, line)
        self._registers[name] = wires

    def _read_bits(self, at: Statements) -> None:
        if at.accept("["):
            at.skip_to("]")
        self._declare(at.peek(), at.line)
        # What is measured into them must be seen; constants that they start with do not matter.
        if "measure" in self._words(at):
            self._read_assignment(at)
        else:
            at.skip_to(";")

    def _read_gate(self, at: Statements) -> None:
        line, name = at.line, at.name()
        self._declare(name, line)
        self._definitions[name] = definition(at)

    def _skip(self, at: Statements) -> None:
        at.skip_to(";")

    def _read_reset(self, at: Statements) -> None:
        line, wires = at.line, self._operand(at, self._registers)
        at.take(";")
        if any(set(gate.wires) & set(wires) for gate in self.gates):
            fail(line, "reset of a qubit in the middle is no gate: write the circuit without it")

    def _read_assignment(self, at: Statements) -> None:
        """`bits = measure qubits;`."""
        at.name()
        if at.accept("["):
            at.skip_to("]")
        at.take("=")
        at.take("measure")
        self._measured |= set(self._operand(at, self._registers))
        at.take(";")

    def _read_measure(self, at: Statements) -> None:
        """What follows `measure`: qubits, and bits after an arrow."""
        self._measured |= set(self._operand(at, self._registers))
        if at.accept("->"):
            at.skip_to(";")
        else:
            at.take(";")

    def _operand(self, at: Statements, registers: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        if at.peek() == "$":
            fail(at.line, "physical qubits are not supported: declare `qubit[n] q;` and use q[0]")
        line, name = at.line, at.name()
        if name not in registers:
            fail(line, f"qubit {name!r} is not declared: declare it with `qubit {name};`")
        wires = registers[name]
        return at.selected(name, wires) if at.accept("[") else wires

    def _call(self, at: Statements, registers: Mapping[str, tuple[int, ...]]) -> list[Gate]:
        """One gate call; on whole registers, once for each of their qubits."""
        line = at.line
        modifiers: list[tuple[str, int]] = []
        while at.peek() in ("inv", "ctrl", "negctrl", "pow"):
            word, times = at.take(), 1
            if word == "pow":
                at.take("(")
                times = at.whole("the power of a gate", MOST_CALLS, -MOST_CALLS)
                at.take(")")
            elif word != "inv" and at.accept("("):
                times = at.whole("the number of controls", MOST_WIRES)
                at.take(")")
            at.take("@")
            modifiers.append((word, times))
            if len(modifiers) > MOST_NESTED:
                fail(line, f"a gate has more than {MOST_NESTED} modifiers: define the gate that they make")
        name = at.name()
        self._check_known(name, line)
        values: list[Any] = []
        if at.accept("(") and not at.accept(")"):
            values = [at.expression()]
            while at.accept(","):
                values.append(at.expression())
            at.take(")")
        if at.peek() == ";":
            fail(line, f"gate {name} is called without qubits: write `{name} q[0];`")
        operands = [self._operand(at, registers)]
        while at.accept(","):
            operands.append(self._operand(at, registers))
        at.take(";")
        width = max(map(len, operands))
        if any(len(wires) not in (1, width) for wires in operands):
            fail(line, f"gate {name} acts on registers of {[len(wires) for wires in operands]} qubits: make them equal")
        gates: list[Gate] = []
        for k in range(width):
            wires = tuple(own[k % len(own)] for own in operands)
            if self._measured & set(wires):
                fail(line, f"gate {name} acts on a qubit after its measurement: measure at the end only")
            if k:
                self._count(line)
            try:
                gates += self._modified(name, values, wires, modifiers, line)
            except (NotAffine, AtLine):
                raise
            except ValueError as error:
                fail(line, str(error))
        return gates

    def _count(self, line: int, calls: int = 1) -> None:
        self._calls += calls
        if self._calls > MOST_CALLS:
            fail(line, f"the program makes more than {MOST_CALLS} calls in gates and on registers: write fewer")

    def _check_known(self, name: str, line: int) -> None:
        if name in self._definitions or name == "U" or (self._standard and name in (*_GATE, "id", "u2", "cu")):
            return
        if name == "gphase":
            fail(line, "modifiers of gphase are not supported: write ctrl @ gphase(a) q; as p(a) q;")
        hint = "" if self._standard else ', and the program does not include "stdgates.inc"'
        fail(line, f"instruction {name!r} is not supported: it is no gate that is defined here{hint}")

    def _modified(
        self, name: str, values: list[Any], wires: tuple[int, ...], modifiers: list[tuple[str, int]], line: int
    ) -> list[Gate]:
        controls = sum(times for word, times in modifiers if word in ("ctrl", "negctrl"))
        gates = self._gates(name, values, wires[controls:], line)
        if controls and (name in self._definitions or name in ("U", "u2", "u3")):
            fail(line, f"ctrl @ {name} depends on the phase of {name}: define the controlled gate, or use cu")
        own, flips = controls, list[Gate]()
        for word, times in reversed(modifiers):
            if word == "inv" or (word == "pow" and times < 0):
                gates = [gate.inverse() for gate in reversed(gates)]
            if word == "pow":
                self._count(line, len(gates) * abs(times))
                gates = gates * abs(times)
            for _ in range(times if word in ("ctrl", "negctrl") else 0):
                own -= 1
                if word == "negctrl":
                    flips.append(Gate("X", (wires[own],)))
                for gate in gates:
                    if gate.name not in _CONTROLLED:
                        fail(line, f"ctrl @ of gate {gate.name} is not supported: define the controlled gate")
                gates = [Gate(_CONTROLLED[gate.name], (wires[own], *gate.wires), gate.angles) for gate in gates]
        # A control by 0 is one by 1 between X; those may stand around everything, as they act on controls alone.
        return [*flips, *gates, *flips]

    def _gates(self, name: str, values: list[Any], wires: tuple[int, ...], line: int) -> list[Gate]:
        if name in self._definitions:
            return self._defined(name, values, wires, line)
        if name == "U":
            return [Gate("U3", wires, tuple(map(angle_of, values)))]
        if name == "id":
            return []
        if name == "u2":
            return [Gate("U3", wires, tuple(map(angle_of, (math.pi / 2, *values))))]
        if name == "cu":
            if len(values) != 4:
                fail(line, f"gate cu takes 4 angles but was given {len(values)}")
            return [
                Gate("P", wires[:1], (angle_of(values[3]),)),
                Gate("CU3", wires, tuple(map(angle_of, values[:3]))),
            ]
        return [Gate(_GATE[name], wires, tuple(map(angle_of, values)))]

    def _defined(self, name: str, values: list[Any], wires: tuple[int, ...], line: int) -> list[Gate]:
        known = self._definitions[name]
        if name in self._open:
            fail(line, f"gate {name} is defined by itself: a gate may use those defined before it")
        if len(self._open) == MOST_NESTED:
            fail(line, f"gate {name} is defined through more than {MOST_NESTED} others: define it directly")
        if (len(values), len(wires)) != (len(known.parameters), len(known.qubits)):
            fail(
                line,
                f"gate {name} takes {len(known.parameters)} angles and {len(known.qubits)} qubits but was "
                f"given {len(values)} and {len(wires)}",
            )
        for gate, own in self._known.items():
            if self._standard and gate.lower() == name and known.same_as(own):
                return [Gate(gate, wires, tuple(map(angle_of, values)))]
        constants = {key: value for key, value in self._top.values.items() if not isinstance(value, Linear)}
        at = Statements(known.body, constants | dict(zip(known.parameters, values, strict=True)))
        registers = {qubit: (wire,) for qubit, wire in zip(known.qubits, wires, strict=True)}
        gates: list[Gate] = []
        self._open.append(name)
        while at.more:
            self._count(at.line)
            if at.peek() in ("barrier", "gphase"):
                at.skip_to(";")
            else:
                gates += self._call(at, registers)
        self._open.pop()
        return gates
