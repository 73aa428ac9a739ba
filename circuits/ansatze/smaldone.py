"""Kernels for images with many channels of Smaldone, Kyro & Batista."""

from collections.abc import Callable, Sequence
from functools import partial
from math import pi

from circuits.ansatze.builder import Ansatz, Builder, chain, ring
from circuits.circuit import Angle, Circuit, Gate
from circuits.naming import unknown
from circuits.options import is_flag, is_whole


def _u1(made: Builder, on: Sequence[int]) -> None:
    """CNOT powers 0 to 1, 1 to 2, ... and from the last wire to the first."""
    for a, b in ring(len(on)):
        made.power(on[a], on[b], *made.take(1))


def _u2(made: Builder, on: Sequence[int]) -> None:
    """Powers of CZ and CNOT on pairs a step apart, of which the first goes on: steps 1, 2, 4, ..."""
    step = 1
    while step < len(on):
        for first in range(0, len(on) - step, 2 * step):
            made.add("CP", on[first], on[first + step])
            made.power(on[first], on[first + step], *made.take(1))
        step *= 2


def _between_registers(made: Builder, firsts: Sequence[int]) -> None:
    if len(firsts) == 2:
        made.power(firsts[0], firsts[1], *made.take(1))
        return
    for a, b in ring(len(firsts)):
        made.power(firsts[b], firsts[a], *made.take(1))


def _between_ancillas(made: Builder, ancillas: int) -> None:
    closing = [(0, ancillas - 1)] if ancillas > 2 else []
    for a, b in chain(range(ancillas)) + closing:
        made.power(b, a, *made.take(1))


UNITARIES: dict[str, Callable[[Builder, Sequence[int]], None]] = {"u1": _u1, "u2": _u2}


def channel_overwrite(
    channels: int,
    pixels: int = 4,
    *,
    unitary: str = "u1",
    registers: int = 1,
    ancillas: int = 1,
    couple: bool = True,
) -> Circuit:
    """A kernel that reads one channel after another into the same wires and gathers them in ancillas.

    On |+> of the ancillas, for each round of channels: RX(pi x) on each register, the unitary, for several registers
    CNOT powers between their first wires, a CZ power from each first wire into an ancilla; after all but the last
    round the register is undone. Several ancillas meet at the end by CNOT powers. One register is "channel overwrite"
    (CO), several that write into one ancilla are "parallel channel overwrite" (PCO), with an ancilla each they are
    "PCO-T": in the authors' training script both have 3 coupled registers, and rdpa (registers an ancilla) 3 or 1.

    Args:
        channels: Channels of a patch, a multiple of `registers`.
        pixels: Pixels of a channel's patch: wires of a register.
        unitary: "u1", a ring of CNOT powers, or "u2", a tree of CZ and CNOT powers.
        registers: Channels that are read at once.
        ancillas: 1 to registers; register k writes into ancilla min(k, ancillas - 1).
        couple: Whether several registers meet by CNOT powers between their first wires (inter_U in the authors' code,
            where it is off by default).

    Returns:
        ancillas + registers * pixels wires, ancillas first; inputs ordered (channel, pixel); read out as X of the
        first ancilla, which the authors turn into arccos(<X>) / pi.

    Raises:
        ValueError: For sizes that do not fit each other, or an unknown unitary.

    Source: Smaldone, Kyro & Batista, Quantum convolutional neural networks for multi-channel supervised learning
        (arXiv:2305.18961), as in the authors' code, where an exponent t is an angle pi t here. With several registers
        that code undoes wrong weights in some configurations; here each gate is undone by its own inverse.
    """
    sizes = (channels, pixels, registers, ancillas)
    whole = all(is_whole(size) and size >= 1 for size in sizes)
    if not whole or channels % registers or ancillas > registers:
        raise ValueError(
            f"channel_overwrite was given {channels} channels of {pixels} pixels, {registers} registers and {ancillas} "
            "ancillas: give at least one of each, channels a multiple of registers, no more ancillas than registers"
        )
    if not is_flag(couple):
        raise ValueError(f"channel_overwrite was given couple={couple!r}: give True or False")
    if unitary not in UNITARIES:
        raise unknown("unitary", unitary, UNITARIES)
    starts = [ancillas + register * pixels for register in range(registers)]
    made = Builder(ancillas + registers * pixels)
    made.layer("H", on=range(ancillas))
    rounds = channels // registers
    for turn in range(rounds):
        begin = len(made.gates)
        for register, start in enumerate(starts):
            for pixel in range(pixels):
                feature = Angle("input", (turn * registers + register) * pixels + pixel, pi)
                made.add("RX", start + pixel, angles=(feature,))
        for start in starts:
            UNITARIES[unitary](made, range(start, start + pixels))
        if couple:
            _between_registers(made, starts)
        read: list[Gate] = made.gates[begin:]
        for register, start in enumerate(starts):
            made.add("CP", start, min(register, ancillas - 1))
        if turn < rounds - 1:
            made.gates += [gate.inverse() for gate in reversed(read)]
    _between_ancillas(made, ancillas)
    return made.circuit().with_observables(("X" + "I" * (made.wires - 1),))


def _repeated(unitary: str, wires: int, depth: int) -> Circuit:
    made = Builder(wires)
    for _ in range(depth):
        UNITARIES[unitary](made, range(wires))
    return made.circuit()


_SOURCE = (
    "Smaldone, Kyro & Batista, Quantum convolutional neural networks for multi-channel supervised learning "
    "(arXiv:2305.18961), for one channel: their control; all channels in one circuit are `channel_overwrite`. "
)

SMALDONE = {
    "smaldone_u1": Ansatz(
        partial(_repeated, "u1"),
        True,
        f"{_SOURCE}U1: CNOT powers around a ring. The authors' control closes it from wire 0 to the last, their "
        "multi-channel circuits from the last to wire 0, as here",
        "uniform",
        weights="d*(n if n > 2 else n - 1)",
        least_wires=2,
    ),
    "smaldone_u2": Ansatz(
        partial(_repeated, "u2"),
        True,
        f"{_SOURCE}U2: CZ and CNOT powers on a tree",
        "uniform",
        weights="2*d*(n - 1)",
        least_wires=2,
    ),
}
