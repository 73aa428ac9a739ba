"""The syntax of OpenQASM 3 as far as circuits need it: tokens, expressions and definitions of gates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

_TOKEN = re.compile(
    r"(?P<space>\s+|//[^\n]*|/\*.*?\*/)"
    r"|(?P<number>(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?)"
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
        value = self._term()
        while self.peek() in ("+", "-"):
            value = value + self._term() if self.take() == "+" else value - self._term()
        return value

    def _term(self) -> Any:
        value = self._signed()
        while self.peek() in ("*", "/"):
            value = value * self._signed() if self.take() == "*" else value / self._signed()
        return value

    def _signed(self) -> Any:
        if self.accept("-"):
            return -self._signed()
        if self.accept("+"):
            return self._signed()
        base = self._atom()
        return base ** self._signed() if self.accept("**") else base

    def _atom(self) -> Any:
        if self.accept("("):
            value = self.expression()
            self.take(")")
            return value
        line, kind, text = self.line, self._tokens[self._next].kind if self.more else "", self.take()
        if kind == "number":
            return float(text)
        if text in self.values:
            return self.values[text]
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text in _FUNCTIONS and self.accept("("):
            value = self.expression()
            self.take(")")
            # A symbol knows the functions of a feature by name, and refuses the others as a float.
            own = getattr(value, text, None)
            return _FUNCTIONS[text](value) if own is None else own()
        fail(line, f"{text!r} in an expression is not defined: declare it with `input float {text};` or `const`")


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
    at.take("{")
    return Definition(tuple(parameters), tuple(qubits), at.skip_to("}"))
