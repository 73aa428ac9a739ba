"""Readouts: which Pauli strings are measured, and what a layer's outputs are made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from circuits.naming import unknown

NAMES = ("z", "z0", "zz", "paulis2", "probabilities", "ones", "most_likely_ones")
ROOT = "root"  # of named kernels that discard wires, see circuits.kernels.kernel_readout
MAX_STRINGS = 2**12  # observables of one circuit: probabilities of 12 wires


@dataclass(frozen=True)
class Readout:
    """What a circuit's outputs are.

    Args:
        observables: Pauli strings that are measured.
        outputs: How many numbers come out.
        kind: "values" (the expectation values themselves), "probabilities" or "ones" (an affine map of them, exact
            also for shots), or "most_likely" (decided by them, without a slope).
    """

    observables: tuple[str, ...]
    outputs: int
    kind: str = "values"

    def table(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """The affine map from expectation values: (outputs, n_obs) and (outputs,); None for the values themselves.

        Of "most_likely" the map to the probabilities, (2^n, n_obs) and (2^n,), which decide.
        """
        wires = len(self.observables[0])
        if self.kind == "values":
            return None
        if self.kind == "ones":
            # A wire is found in |1> with probability (1 - <Z>) / 2.
            return np.full((1, wires), -0.5), np.full(1, wires / 2)
        # The projector on a bit string is the product of (1 + (-1)^bit Z) / 2 over the wires: all strings of I and Z.
        bits = np.array(list(product((0, 1), repeat=wires)))
        read = np.array([[letter == "Z" for letter in text] for text in self.observables])
        return (-1.0) ** (bits @ read.T) / 2**wires, np.full(2**wires, 2.0**-wires)


def readout_names() -> tuple[str, ...]:
    """Names that `kernel(readout=...)` and `QuantumConv2d(readout=...)` take; numbers in them may be others.

    Named kernels that discard wires also take "root", see `kernel`.
    """
    return NAMES


def find_readout(readout: str | Sequence[str], wires: int) -> Readout:
    """A readout by name.

    Args:
        readout: "z": <Z> of every wire. "z0", "z1", ...: of that wire. "zz": <Z Z> of every pair of wires. "paulis1",
            "paulis2", ...: all Pauli strings on at most so many wires, by weight, wires and letters. "probabilities":
            of the 2^n bit strings, wire 0 the most significant bit, in [0, 1]. "ones": the expected number of ones, in
            [0, n]. "most_likely_ones": the number of ones in the most likely bit string (of several that are equally
            likely but for rounding the first), in {0 .. n}: it has no gradient. Or one Pauli string, or a list of them,
            each with one letter a wire.
        wires: Number of qubits.

    Raises:
        ValueError: For a name that is neither of these, a wire that does not exist, or more than 2^12 strings.

    Source: most_likely_ones: Henderson et al., Quanvolutional neural networks (arXiv:1904.04767), section 2.
    """
    if isinstance(readout, str):
        found = _named(readout, wires)
        if found is not None:
            return found
    strings = (readout,) if isinstance(readout, str) else tuple(readout)
    if not strings:
        raise ValueError('readout is an empty list: give "z" or at least one Pauli string such as "ZZII"')
    for text in strings:
        if not text or set(text) - set("IXYZ"):
            hint = unknown("readout", text, (*NAMES, ROOT))
            raise ValueError(f"readout {text!r} is no Pauli string of {wires} letters I, X, Y, Z, and {hint}")
    # Lengths are checked by Circuit, which knows them best.
    return Readout(strings, len(strings))


def _named(name: str, wires: int) -> Readout | None:
    if name == "z":
        return _values([_string(wires, {wire: "Z"}) for wire in range(wires)])
    if match := re.fullmatch(r"z(\d+)", name):
        wire = int(match[1])
        if wire >= wires:
            raise ValueError(f"readout {name!r} reads wire {wire} but there are {wires}: give z0 to z{wires - 1}")
        return _values([_string(wires, {wire: "Z"})])
    if name == ROOT:
        raise ValueError(
            "readout 'root' belongs to named kernels that discard wires, such as 'hur_qcnn' and 'ttn': of other "
            "circuits give the wire that is left, such as 'z0'"
        )
    if name == "zz":
        if wires < 2:
            raise ValueError("readout 'zz' reads pairs of wires but there is 1: use 'z'")
        return _values([_string(wires, dict.fromkeys(pair, "Z")) for pair in combinations(range(wires), 2)])
    if match := re.fullmatch(r"paulis(\d+)", name):
        weight = int(match[1])
        if not 1 <= weight <= wires:
            raise ValueError(f"readout {name!r} reads up to {weight} of {wires} wires: give paulis1 to paulis{wires}")
        count = 0
        strings = []
        for k in range(1, weight + 1):
            for on in combinations(range(wires), k):
                count += 3**k
                _check_number(name, count)
                strings += [_string(wires, dict(zip(on, letters, strict=True))) for letters in product("XYZ", repeat=k)]
        return _values(strings)
    if name == "ones":
        return Readout(_values([_string(wires, {wire: "Z"}) for wire in range(wires)]).observables, 1, "ones")
    if name in ("probabilities", "most_likely_ones"):
        _check_number(name, 2**wires - 1)
        strings = ["".join(letters) for letters in product("IZ", repeat=wires)][1:]
        if name == "probabilities":
            return Readout(tuple(strings), 2**wires, "probabilities")
        return Readout(tuple(strings), 1, "most_likely")
    return None


def _check_number(name: str, strings: int) -> None:
    if strings >= MAX_STRINGS:
        raise ValueError(
            f"readout {name!r} measures {strings} or more Pauli strings but at most {MAX_STRINGS - 1} are taken: use "
            "fewer wires, or read fewer strings"
        )


def _values(strings: list[str]) -> Readout:
    return Readout(tuple(strings), len(strings))


def _string(wires: int, letters: dict[int, str]) -> str:
    return "".join(letters.get(wire, "I") for wire in range(wires))
