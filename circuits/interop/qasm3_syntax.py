"""The syntax of OpenQASM 3 as far as circuits need it: tokens, expressions and definitions of gates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

_TOKEN = re.compile(
    r"(?P<space>\s+|//[^\n]*|/\*.*?\*/)"
    r"|(?P<number>0[xX][\da-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)([eE][+-]?\d+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r'|(?P<text>"[^"]*")'
    r"|(?P<sign>\*\*|->|[-+*/@()\[\]{},;=<>!&|:$#~^%.])",
    re.DOTALL,
)
_CONSTANTS = {"pi": math.pi, "π": math.pi, "tau": math.tau, "τ": math.tau, "euler": math.e, "ℇ": math.e}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    name: getattr(math, python)
    for name, python in (
        *((name, name) for name in ("sin", "cos", "tan", "exp", "sqrt", "floor")),
        ("ceiling", "ceil"),
        ("log", "log"),
        ("arcsin", "asin"),
        ("arccos", "acos"),
        ("arctan", "atan"),
    )
}


# What one text may ask for: nested gates and expressions double and recurse, and a readout names every wire.
MOST_WIRES = 1024
MOST_CALLS = 50_000
MOST_NESTED = 50


class Token(NamedTuple):
    """A word of a program: "number", "name", "text" or "sign", and the line where it stands."""

    kind: str
    text: str
    line: int


class Definition(NamedTuple):
    """A gate that a program defines; its body is read at each call."""

    parameters: tuple[str, ...]
    qubits: tuple[str, ...]
    body: tuple[Token, ...]

    def same_as(self, other: Definition) -> bool:
        """Whether both are written alike."""
        texts = [[token.text for token in definition.body] for definition in (self, other)]
        return self[:2] == other[:2] and texts[0] == texts[1]


class AtLine(ValueError):
    """An error that names its line already."""


def fail(line: int, message: str) -> NoReturn:
    """Raise the error that names its line."""
    raise AtLine(f"OpenQASM line {line}: {message}")


def tokens(text: str) -> tuple[Token, ...]:
    """A program's words without spaces and comments."""
    result = []
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            fail(line, f"unexpected character {text[position]!r}")
        if match.lastgroup != "space":
            kind = "number" if match["number"] else str(match.lastgroup)
            result.append(Token(kind, match[0], line))
        line += match[0].count("\n")
        position = match.end()
    return tuple(result)


class Statements:
    """Tokens with a place in them, and expressions read from it."""

    def __init__(self, tokens: Sequence[Token], values: Mapping[str, Any]) -> None:
        self._tokens = tokens
        self._next = 0
        self._nested = 0
        self.values = dict(values)

    @property
    def more(self) -> bool:
        """Whether anything is left."""
        return self._next < len(self._tokens)

    @property
    def line(self) -> int:
        """The line of the next word."""
        return self._tokens[min(self._next, len(self._tokens) - 1)].line if self._tokens else 1

    def peek(self, ahead: int = 0) -> str:
        """The next word or one after it, without taking it; empty at the end."""
        return self._tokens[self._next + ahead].text if self._next + ahead < len(self._tokens) else ""

    def take(self, expected: str | None = None) -> str:
        """The next word, which must be `expected` if that is given."""
        found = self.peek()
        if not found or (expected is not None and found != expected):
            fail(self.line, f"expected {expected or 'more'!r} but found {found or 'the end'!r}")
        self._next += 1
        return found

    def name(self) -> str:
        """The next word, which must be a name."""
        if not self.more or self._tokens[self._next].kind != "name":
            fail(self.line, f"expected a name but found {self.peek() or 'the end'!r}")
        return self.take()

    def accept(self, text: str) -> bool:
        """Take the next word if it is `text`, and say whether it was."""
        if self.peek() == text:
            self._next += 1
            return True
        return False

    def skip_to(self, end: str) -> tuple[Token, ...]:
        """Tokens before `end`, which is taken too."""
        start = self._next
        while self.take() != end:
            pass
        return tuple(self._tokens[start : self._next - 1])

    def expression(self) -> Any:
        """The value of an expression: a float, or a Linear where it depends on a parameter."""
        if self.peek() in (";", ",", ")", "]", ""):
            fail(self.line, f"expected an expression but found {self.peek() or 'the end'!r}")
        value = self._term()
        while self.peek() in ("+", "-"):
            value = value + self._term() if self.take() == "+" else value - self._term()
        if self.peek() in ("<", ">", "&", "|", "^"):
            fail(self.line, f"the operator {self.peek()!r} is not supported: use + - * / % **")
        return value

    def whole(self, what: str, most: int, least: int = 1) -> int:
        """An expression that must be a whole number from `least` to `most`.

        Raises:
            ValueError: With the line, if it is none, and what it was to be.
        """
        line, number = self.line, self.expression()
        if not isinstance(number, float) or not number.is_integer() or not least <= number <= most:
            fail(line, f"{what} is {_shown(number)}: give a whole number from {least} to {most}")
        return int(number)

    def selected(self, name: str, wires: tuple[int, ...]) -> tuple[int, ...]:
        """What an opened bracket after a register's name selects: an index, a set {0, 2}, or a range 0:3 or 0:2:6."""
        line, size = self.line, len(wires)
        separator = "," if self.accept("{") else ":"
        parts = [self._part()]
        while self.accept(separator):
            parts.append(self._part())
        if separator == ",":
            self.take("}")
        self.take("]")

        def place(value: Any) -> int:
            if not isinstance(value, float) or value != int(value) or not -size <= value < size:
                fail(line, f"{name}[{_shown(value)}] is outside the register of {size} qubits")
            return int(value) % size

        if separator == "," or len(parts) == 1:
            return tuple(wires[place(part)] for part in parts)
        step = parts[1] if len(parts) == 3 else 1.0
        if len(parts) > 3 or not isinstance(step, float) or not step.is_integer() or not step:
            fail(line, f"{name}[...] is no range: write start:stop or start:step:stop")
        ends = (0, size - 1) if step > 0 else (size - 1, 0)
        start, stop = (
            end if part is None else place(part) for part, end in zip((parts[0], parts[-1]), ends, strict=True)
        )
        # Unlike Python's, a range of OpenQASM has its end.
        found = tuple(wires[k] for k in range(start, stop + (1 if step > 0 else -1), int(step)))
        if not found:
            fail(line, f"{name}[{start}:{stop}] has no qubits: a range goes from its start to its stop")
        return found

    def _part(self) -> Any:
        """An end of a range, or None where it is left out."""
        return None if self.peek() == ":" or (self.peek() == "]" and self.peek(-1) == ":") else self.expression()

    def _term(self) -> Any:
        value = self._signed()
        while (sign := self.peek()) in ("*", "/", "%"):
            self.take()
            other = self._signed()
            value = value * other if sign == "*" else value / other if sign == "/" else self._remainder(value, other)
        return value

    def _remainder(self, value: Any, divisor: Any) -> float:
        # Of negative numbers, languages disagree.
        if not (isinstance(value, float) and isinstance(divisor, float) and value >= 0 and divisor > 0):
            fail(
                self.line, f"the remainder of {_shown(value)} by {_shown(divisor)} is not read: give positive constants"
            )
        return math.fmod(value, divisor)

    def _signed(self) -> Any:
        self._nested += 1
        if self._nested > MOST_NESTED:
            fail(self.line, f"an expression has more than {MOST_NESTED} nested parts: compute some of it as a const")
        if self.peek() in ("-", "+"):
            value = -self._signed() if self.take() == "-" else self._signed()
        else:
            base = self._atom()
            value = base ** self._signed() if self.accept("**") else base
        self._nested -= 1
        return value

    def _atom(self) -> Any:
        if self.accept("("):
            value = self.expression()
            self.take(")")
            return value
        line, kind, text = self.line, self._tokens[self._next].kind if self.more else "", self.take()
        if kind == "number":
            return _number(text)
        if text in self.values:
            return self.values[text]
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text == "mod" and self.accept("("):
            value = self.expression()
            self.take(",")
            value = self._remainder(value, self.expression())
            self.take(")")
            return value
        if text in _FUNCTIONS and self.accept("("):
            value = self.expression()
            self.take(")")
            # A symbol knows the functions of a feature by name, and refuses the others as a float.
            own = getattr(value, text, None)
            return float(_FUNCTIONS[text](value)) if own is None else own()
        fail(line, f"{text!r} in an expression is not defined: declare it with `input float {text};` or `const`")


def _shown(value: Any) -> str:
    """A number for messages: whole ones, which are floats here, as such."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value)) if whole else repr(value)


def _number(text: str) -> float:
    plain = text.replace("_", "")
    return float(int(plain, 0)) if plain[:2].lower() in ("0x", "0b", "0o") else float(plain)


def definition(at: Statements) -> Definition:
    """What follows `gate NAME`."""
    parameters: list[str] = []
    if at.accept("(") and not at.accept(")"):
        parameters = [at.name()]
        while at.accept(","):
            parameters.append(at.name())
        at.take(")")
    qubits = [at.name()]
    while at.accept(","):
        qubits.append(at.name())
    if len({*parameters, *qubits}) < len(parameters) + len(qubits):
        fail(at.line, f"a gate's angles and qubits {', '.join([*parameters, *qubits])} must have different names")
    at.take("{")
    return Definition(tuple(parameters), tuple(qubits), at.skip_to("}"))
