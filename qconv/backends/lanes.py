"""Vector code for the compiled loops: what an LLVM loop vectorizer finds by luck is written down here.

A Python function emits operations on whole vectors (numbers of as many patches), sizes known, every loop over features
unrolled: products stay in registers. LLVM cuts the vectors into what the machine has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

BYTES = 64  # of a vector: one AVX-512 register, two of AVX2, four of NEON
_FUSE = ("contract", "reassoc", "nsz")

_WHOLE = ir.IntType(64)

Value = Any  # an LLVM value


class Lanes:
    """Emits operations on vectors of one type of number.

    Args:
        builder: Where the code goes.
        bits: 32 or 64, of a float.
        size: Numbers in a vector; None for BYTES bytes of them.
    """

    def __init__(self, builder: Any, bits: int, size: int | None = None) -> None:
        self.builder, self.bits = builder, bits
        self.scalar = ir.FloatType() if bits == 32 else ir.DoubleType()
        self.size = size or BYTES * 8 // bits
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
        return self.builder.load(place, align=self.bits // 8, typ=self.type)

    def store(self, value: Value, pointer: Value, offset: Value = 0) -> None:
        """A vector to `offset` numbers behind a pointer."""
        self.builder.store(value, self._place(pointer, offset, self.type), align=self.bits // 8)

    def read(self, pointer: Value, offset: Value = 0) -> Value:
        """One number, as a scalar."""
        return self.builder.load(self._place(pointer, offset, self.scalar), typ=self.scalar)

    def whole(self, pointer: Value, index: Value) -> Value:
        """An int64 from an array of them."""
        index = self.index(index) if isinstance(index, int) else index
        return self.builder.load(self.builder.gep(pointer, [index], source_etype=_WHOLE), typ=_WHOLE)

    def fixed(self, pointer: Value, index: Value) -> Value:
        """The same from an array that nothing changes as long as the code runs."""
        value = self.whole(pointer, index)
        # Else it would be read again after every store, which might have been to it.
        value.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return value

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
        name = f"llvm.vector.reduce.fadd.v{self.size}f{self.bits}"
        callee = self._function(name, self.scalar, [self.scalar, self.type])
        return self.builder.call(callee, [ir.Constant(self.scalar, 0.0), vector], fastmath=_FUSE)

    def _call(self, name: str, *arguments: Value) -> Value:
        name = f"llvm.{name}.v{self.size}f{self.bits}"
        return self.builder.call(self._function(name, self.type, [self.type] * len(arguments)), arguments)

    def _function(self, name: str, result: Value, arguments: list[Value]) -> Value:
        module = self.builder.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(result, arguments), name)
        return module.globals[name]

    def variable(self, value: Value) -> Value:
        """A place that a loop may change with `builder.store`; it becomes a register."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(value.type)
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
        return ir.Constant(_WHOLE, number)

    def vectors(self, count: Value) -> Value:
        """Whole vectors in so many numbers."""
        return self.builder.udiv(self.index(count) if isinstance(count, int) else count, self.index(self.size))

    def move(self, pointer: Value, offset: Value) -> Value:
        """A pointer `offset` numbers further."""
        return self.builder.gep(pointer, [offset], source_etype=self.scalar)

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """Repeat what is emitted inside for index 0 to count - 1."""
        b = self.builder
        before, head = b.block, b.append_basic_block()
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(_WHOLE)
        index.add_incoming(self.index(0), before)
        body, end = b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("<", index, self.index(count) if isinstance(count, int) else count), body, end)
        b.position_at_end(body)
        yield index
        index.add_incoming(b.add(index, self.index(1), flags=("nsw",)), b.block)
        b.branch(head)
        b.position_at_end(end)

    def times(self, index: Value, factor: int) -> Value:
        """An index times a constant."""
        return self.builder.mul(index, self.index(factor))

    def plus(self, index: Value, number: Value) -> Value:
        """An index plus a number."""
        return self.builder.add(index, self.index(number) if isinstance(number, int) else number)

    def least(self, a: Value, b: Value) -> Value:
        """The smaller of two indices."""
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)

    def shuffle(self, a: Value, b: Value, places: list[int]) -> Value:
        """Numbers chosen from two vectors, counted through both."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

    def from_lane(self, vector: Value, first: Value) -> Value:
        """The vector with zeros in the lanes before an index."""
        indices = ir.VectorType(_WHOLE, self.size)
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
        single = self.bits == 32
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
