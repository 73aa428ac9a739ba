"""Vector code for the compiled loops: what an LLVM loop vectorizer finds by luck is written down here.

A kernel's inner part is a Python function that emits operations on whole vectors (numbers of as many patches), sizes
known, every loop over features unrolled: products stay in registers. The loops around it are ordinary numba. LLVM
cuts the vectors into what the machine has.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

cgutils: Any = _cgutils  # numba has no types here

BYTES = 64  # of a vector: one AVX-512 register, two of AVX2, four of NEON
_FUSE = ("contract", "reassoc", "nsz")

Value = Any  # an LLVM value


class Lanes:
    """Emits operations on vectors of one type of number.

    Args:
        builder: Where the code goes.
        number: numba's float32 or float64.
        size: Numbers in a vector; None for BYTES bytes of them.
    """

    def __init__(self, builder: Any, number: Any, size: int | None = None) -> None:
        self.builder, self.number = builder, number
        self.scalar = ir.FloatType() if number.bitwidth == 32 else ir.DoubleType()
        self.size = size or BYTES * 8 // int(number.bitwidth)
        self.type = ir.VectorType(self.scalar, self.size)

    def constant(self, value: float) -> Value:
        """The same number in all lanes."""
        return ir.Constant(self.type, [float(value)] * self.size)

    def _place(self, pointer: Value, offset: Value, kind: Any) -> Value:
        place = self.move(pointer, self.index(offset) if isinstance(offset, int) else offset)
        return self.builder.bitcast(place, kind.as_pointer())

    def load(self, pointer: Value, offset: Value = 0) -> Value:
        """A vector from `offset` numbers behind a pointer."""
        place = self._place(pointer, offset, self.type)
        return self.builder.load(place, align=self.number.bitwidth // 8, typ=self.type)

    def store(self, value: Value, pointer: Value, offset: Value = 0) -> None:
        """A vector to `offset` numbers behind a pointer."""
        self.builder.store(value, self._place(pointer, offset, self.type), align=self.number.bitwidth // 8)

    def read(self, pointer: Value, offset: Value = 0) -> Value:
        """One number, as a scalar."""
        return self.builder.load(self._place(pointer, offset, self.scalar), typ=self.scalar)

    def whole(self, pointer: Value, index: Value) -> Value:
        """An int64 from an array of them."""
        kind = ir.IntType(64)
        place = self.builder.gep(pointer, [index], source_etype=kind)
        return self.builder.load(place, typ=kind)

    def write(self, value: Value, pointer: Value, offset: Value = 0) -> None:
        """One number, to `offset` numbers behind a pointer."""
        self.builder.store(value, self._place(pointer, offset, self.scalar))

    def spread(self, scalar: Value) -> Value:
        """One number to all lanes."""
        one = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(one, ir.Constant(self.type, ir.Undefined), [0] * self.size)

    def broadcast(self, pointer: Value, offset: Value = 0) -> Value:
        """One number from memory to all lanes."""
        return self.spread(self.read(pointer, offset))

    def mul(self, a: Value, b: Value) -> Value:
        """a b."""
        return self.builder.fmul(a, b, flags=_FUSE)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self.builder.fadd(a, b, flags=_FUSE)

    def sub(self, a: Value, b: Value) -> Value:
        """a - b."""
        return self.builder.fsub(a, b, flags=_FUSE)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, one rounding where the machine has that."""
        return self._call("fmuladd", a, b, c)

    def fms(self, a: Value, b: Value, c: Value) -> Value:
        """c - a b."""
        return self._call("fmuladd", self.builder.fneg(a), b, c)

    def sum(self, vector: Value) -> Value:
        """The sum over the lanes, as a scalar, added in pairs."""
        function = ir.FunctionType(self.scalar, [self.scalar, self.type])
        name = f"llvm.vector.reduce.fadd.v{self.size}f{self.number.bitwidth}"
        callee = cgutils.get_or_insert_function(self.builder.module, function, name)
        return self.builder.call(callee, [ir.Constant(self.scalar, 0.0), vector], fastmath=_FUSE)

    def _call(self, name: str, *arguments: Value) -> Value:
        function = ir.FunctionType(self.type, [self.type] * len(arguments))
        full = f"llvm.{name}.v{self.size}f{self.number.bitwidth}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, full), arguments)

    def variable(self, value: Value) -> Value:
        """A place that a loop may change with `builder.store`; it becomes a register."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    def value(self, variable: Value) -> Value:
        """What a variable holds."""
        return self.builder.load(variable, typ=variable.allocated_type)

    def set(self, variable: Value, value: Value) -> None:
        """Change a variable."""
        self.builder.store(value, variable)

    def index(self, number: int) -> Value:
        """A constant for computing with indices."""
        return ir.Constant(ir.IntType(64), number)

    def vectors(self, count: Value) -> Value:
        """Whole vectors in so many numbers."""
        return self.builder.udiv(self.index(count) if isinstance(count, int) else count, self.index(self.size))

    def move(self, pointer: Value, offset: Value) -> Value:
        """A pointer `offset` numbers further."""
        return self.builder.gep(pointer, [offset], source_etype=self.scalar)

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """Repeat what is emitted inside for index 0 to count - 1."""
        if isinstance(count, int):
            count = self.index(count)
        with cgutils.for_range(self.builder, count) as step:
            yield step.index

    def times(self, index: Value, factor: int) -> Value:
        """An index times a constant."""
        return self.builder.mul(index, self.index(factor))

    def plus(self, index: Value, number: Value) -> Value:
        """An index plus a number."""
        return self.builder.add(index, self.index(number) if isinstance(number, int) else number)

    def shuffle(self, a: Value, b: Value, places: list[int]) -> Value:
        """Numbers chosen from two vectors, counted through both."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

    def from_lane(self, vector: Value, first: Value) -> Value:
        """The vector with zeros in the lanes before an index."""
        indices = ir.VectorType(ir.IntType(64), self.size)
        b, undefined = self.builder, ir.Constant(indices, ir.Undefined)
        one = b.insert_element(undefined, first, ir.Constant(ir.IntType(32), 0))
        chosen = b.icmp_signed(
            ">=", ir.Constant(indices, list(range(self.size))), self.shuffle(one, undefined, [0] * self.size)
        )
        return b.select(chosen, vector, self.constant(0))

    def sine_cosine(self, turns: Value) -> tuple[Value, Value]:
        """Sine and cosine of pi * turns.

        Reduced to quarters of a turn, which is exact, then Taylor's polynomials on [-pi/4, pi/4], whose error is below
        half a unit in the last place. NaN and infinity give NaN.
        """
        b = self.builder
        quarter = self._call("rint", self.mul(turns, self.constant(2)))
        # Exact: no rounding in 0.5 * quarter nor, up to huge angles, in the difference.
        t = self.mul(self.fms(quarter, self.constant(0.5), turns), self.constant(math.pi))
        u = self.mul(t, t)
        single = self.number.bitwidth == 32
        sine = self._series(u, [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 5 if single else 9)])
        cosine = self._series(u, [(-1) ** k / math.factorial(2 * k) for k in range(1, 6 if single else 10)])
        sine = self.fma(self.mul(sine, u), t, t)
        cosine = self.fma(cosine, u, self.constant(1))
        # The quarter modulo 4, as a float: no angle is too large for an integer.
        place = self.fms(self._call("floor", self.mul(quarter, self.constant(0.25))), self.constant(4), quarter)
        one, two, three = (b.fcmp_ordered("==", place, self.constant(k)) for k in (1, 2, 3))
        swapped = b.or_(one, three)
        s, c = b.select(swapped, cosine, sine), b.select(swapped, sine, cosine)
        return b.select(b.or_(two, three), b.fneg(s), s), b.select(b.or_(one, two), b.fneg(c), c)

    def _series(self, u: Value, factors: list[float]) -> Value:
        """Horner's rule: factors[0] + factors[1] u + ..."""
        result = self.constant(factors[-1])
        for factor in reversed(factors[:-1]):
            result = self.fma(result, u, self.constant(factor))
        return result


def vector_code(emit: Callable[..., None]) -> Any:
    """A function for compiled loops, from one that emits its code.

    Args:
        emit: emit(lanes, *arguments); arrays come as pointers to their first number, constants as Python integers,
            all else as values. The type of number is that of the first array.
    """

    def typing(typingctx: Any, *arguments: Any) -> Any:
        number = next(kind.dtype for kind in arguments if isinstance(kind, types.Array))

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = [
                kind.literal_value
                if isinstance(kind, types.IntegerLiteral)
                else context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(signature.args, values, strict=True)
            ]
            emit(Lanes(builder, number), *given)
            return context.get_dummy_value()

        return types.void(*arguments), code

    typing.__name__ = typing.__qualname__ = emit.__name__
    typing.__doc__ = emit.__doc__
    # numba counts arguments by the signature it sees.
    typing.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
    return intrinsic(prefer_literal=True)(typing)
